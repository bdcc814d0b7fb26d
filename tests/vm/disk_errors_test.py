#!/usr/bin/env python3
"""A disk that returns EIO (issue 2): the guest sees an I/O error for that request, and only for it. And an idle daemon
with connected guests uses no measurable CPU."""
import os
import time
from pathlib import Path

import harness  # first: it finds the guest package
from guest import Guest, VhostUser
from guest.daemon import Daemon

CONFIG = """[cache]
size = "16M"
[disk.bad]
kind = "sim"
size = "64M"
model = "null"
faults = ["read error 1M+4K", "write error 2M+4K"]
[disk.good]
kind = "memory"
size = "64M"
[export.bad]
device = "virtio-blk"
volume = "bad"
cache = "{cache}"
socket = "bad.sock"
[export.good]
device = "virtio-blk"
volume = "good"
socket = "good.sock"
"""


def cpu_ticks(pid):
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        fields = Path(f"/proc/{pid}/task/{task}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total


class DiskErrors(harness.VmTest):
    def start(self, cache):
        daemon = self.started(Daemon(self.folder, CONFIG.format(cache=cache), ["bad.sock", "good.sock"]))
        guest = self.started(Guest("errors", [VhostUser(str(self.folder / "bad.sock")),
                                              VhostUser(str(self.folder / "good.sock"))]))
        return daemon, guest

    def dd(self, guest, words):
        status, _ = guest.run(f"dd {words} 2>/dev/null", check=False)
        return status == 0

    def test_eio_reaches_the_request_and_nobody_else(self):
        self.errors_stay_apart("isolated")

    def test_eio_without_a_cache(self):
        self.errors_stay_apart("none")

    def errors_stay_apart(self, cache):
        daemon, guest = self.start(cache)
        read = "if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct skip="
        self.assertFalse(self.dd(guest, read + "256"))
        for skip in (254, 255, 257, 258):
            self.assertTrue(self.dd(guest, f"{read}{skip}"), skip)
        self.assertTrue(self.dd(guest, "if=/dev/vdb of=/dev/null bs=1M count=8 iflag=direct"))
        # A write that the disk refuses: an error at the write (no cache) or at the flush that needs it.
        self.assertFalse(self.dd(guest, "if=/dev/zero of=/dev/vda bs=4k count=1 seek=512 oflag=direct conv=fsync"))
        self.assertTrue(self.dd(guest, "if=/dev/zero of=/dev/vdb bs=1M count=8 oflag=direct conv=fsync"))
        errors = {e["name"]: e["errors"] for e in daemon.status()["exports"]}
        self.assertGreater(errors["bad"], 0)
        self.assertEqual(errors["good"], 0)

    def test_idle_daemon_uses_no_cpu(self):
        daemon, guest = self.start("isolated")
        guest.run("cat /dev/vdb >/dev/null")
        time.sleep(3)  # write-back and grow-back timers of the work before have run out
        worker = daemon.worker_pid()
        before = cpu_ticks(worker)
        time.sleep(10)
        # Ticks are 10 ms: at most 0.2 % of one CPU over ten seconds.
        self.assertLessEqual(cpu_ticks(worker) - before, 2)


if __name__ == "__main__":
    harness.main()
