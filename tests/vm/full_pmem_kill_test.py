#!/usr/bin/env python3
"""virtio-pmem survives its worker (issue 7): twenty kills under load, by holder and FUSE_NOTIFY_RESEND."""
import sys
import time

import harness  # first: it finds the guest package
from guest import VfioUser
from pmem_vm import MAKE, PmemTest


class PmemKills(PmemTest):

    def test_twenty_kills_under_load_lose_nothing(self):
        g = self.guest([VfioUser(self.sock("vm1.sock"))])
        self.up(g)
        self.mounted(g, "/dev/pmem0", "/e", MAKE["ext4"])
        g.run("pg fill /e/f 16 0")
        job = g.spawn("pg churn /e/f 16 0 40")
        for _ in range(20):
            time.sleep(1)
            self.daemon.kill_worker()
        status, text = g.join(job, 300)
        self.zero_wrong(status, text)
        self.assertEqual(g.run("dmesg | grep -ciE 'i/o error|ext4-fs error'; true").strip(), "0")
        print("kills: 20,", text.strip(), file=sys.stderr)


if __name__ == "__main__":
    harness.main()
