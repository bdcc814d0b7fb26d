#!/usr/bin/env python3
"""Space comes back from a running pmem guest (issue 7, P7): 1 GiB filled, deleted, trimmed; a writer beside it."""
import sys

import harness  # first: it finds the guest package
from guest import VfioUser, VhostUser
from guest.daemon import programs
from pmem_vm import MAKE, PmemTest

MIB = 1024


class PmemTrim(PmemTest):
    mib = (1536, )

    def used(self):
        return (self.folder / "d1.img").stat().st_blocks * 512

    def trim(self, kind):
        g = self.guest([VfioUser(self.sock("vm1.sock")), VhostUser(self.sock("vm1-trim.sock"))],
                       files={"/bin/spillway-trim": programs() / "spillway-trim"})
        self.up(g)
        self.mounted(g, "/dev/pmem0", "/e", MAKE[kind])
        g.run("pg fill /e/keep 8 1; sync")
        before = self.used()
        g.run(f"pg fill /e/big {MIB} 5; sync", timeout=500)
        full = self.used()
        self.assertGreaterEqual(full, before + (MIB << 20))
        job = g.spawn("pg churn /e/keep 8 1 20")
        g.run("rm /e/big; sync")
        text = g.run("spillway-trim /e /dev/vda", timeout=300)
        status, churn = g.join(job, 300)
        self.zero_wrong(status, churn)
        after = self.used()
        print(f"{kind}: {before >> 20} -> {full >> 20} -> {after >> 20} MiB; {text.strip()}; {churn}", file=sys.stderr)
        self.assertLess(after, before + 0.05 * (full - before))
        g.run("umount /e && mount -o dax=always /dev/pmem0 /e && ls /e/keep")

    def test_ext4(self):
        self.trim("ext4")

    def test_xfs(self):
        self.trim("xfs")


if __name__ == "__main__":
    harness.main()
