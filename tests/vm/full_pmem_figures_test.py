#!/usr/bin/env python3
"""What a pmem guest sees (issue 7), as figures, not gates (TCG): cold and warm loads and fsync, beside QEMU's own virtio-pmem on a
raw file and virtio-blk on the same volume; cold loads with and without `spillway vmm-exec`."""
import os
import re
import statistics
import sys

import harness  # first: it finds the guest package
from guest import QemuPmem, VfioUser, VhostUser
from guest.daemon import programs
from pmem_vm import MAKE, PmemTest

MIB, LOADS, ROUNDS = 192, 16, 5  # few loads: under stock QEMU each brings 4 MiB
BLK = """
[export.vm1]
device = "virtio-blk"
volume = "d1"
group = "t"
socket = "vm1.sock"
"""


class PmemFigures(PmemTest):
    mib = (320, )

    def cold(self):
        """Nothing of the volume is in the host's memory any more."""
        while self.daemon.call("reclaim")["freed_bytes"] > 1 << 20:
            pass

    def measured(self, what, g, cold):
        rounds, served = [], 0
        for _ in range(ROUNDS):
            cold()
            reads = self.reads()
            text = g.run(f"pg touch /e/f {MIB} {LOADS}", timeout=300)
            served += self.reads() - reads
            rounds.append([int(x) for x in re.findall(r" (\d+)", text)])
        load, worst, warm = (statistics.median(column) for column in zip(*rounds))
        g.run("pg fill /e/g 8 1", timeout=100)
        churn = g.run("pg churn /e/g 8 1 5", timeout=100)
        print(f"{what}: cold load {load / 1e3:.1f} us (p99 {worst / 1e3:.0f}), warm {warm} ns, "
              f"{int(churn.split()[5]) / 5:.0f} rounds/s of 64 page writes and an fsync; "
              f"{served / ROUNDS / LOADS / 1024:.0f} KiB read a load", file=sys.stderr)
        self.zero_wrong(0, churn)
        return load

    def reads(self):
        """Bytes the daemon has served; none while QEMU has the image to itself."""
        if self.daemon.process.poll() is not None:
            return 0
        return sum(e["read_bytes"] for e in self.daemon.status()["exports"])

    def prepared(self, g, disk, dax=True):
        g.run(f"mkdir -p /e; mount {'-o dax=always' if dax else ''} {disk} /e")

    def test_loads_and_fsyncs(self):
        g = self.guest([VfioUser(self.sock("vm1.sock"))])
        self.up(g)
        self.mounted(g, "/dev/pmem0", "/e", MAKE["ext4"])
        g.run(f"pg fill /e/f {MIB} 5 && pg fill /e/g 8 1 && umount /e", timeout=300)
        self.prepared(g, "/dev/pmem0")
        stock = self.measured("vfio-user, stock QEMU", g, self.cold)
        g.stop()
        g = self.guest([VfioUser(self.sock("vm1.sock"))], launcher=[str(programs() / "spillway"), "vmm-exec", "--"])
        self.up(g)
        self.prepared(g, "/dev/pmem0")
        plain = self.measured("vfio-user, spillway vmm-exec", g, self.cold)
        g.stop()
        self.assertLess(plain, stock)
        self.daemon.stop()

        image = self.folder / "d1.img"

        def dropped():
            with open(image, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        g = self.guest([QemuPmem(str(image))])
        self.up(g)
        self.prepared(g, "/dev/pmem0")
        self.measured("QEMU's virtio-pmem on the raw file", g, dropped)
        g.stop()

        self.daemon.config.write_text(self.daemon.config.read_text().split("[export.")[0] + BLK)
        self.daemon.sockets = [self.folder / "vm1.sock", self.daemon.control]
        self.daemon.start()
        g = self.guest([VhostUser(self.sock("vm1.sock"))])
        self.prepared(g, "/dev/vda", dax=False)
        self.measured("virtio-blk on the same volume", g, lambda: g.run("echo 3 >/proc/sys/vm/drop_caches"))
        g.stop()


if __name__ == "__main__":
    harness.main()
