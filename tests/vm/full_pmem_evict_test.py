#!/usr/bin/env python3
"""The host takes a pmem guest's memory back all the time (issue 7, P9): nothing that a store or a device put there is lost.

SECONDS (default 120) says for how long each."""
import os
import subprocess
import sys

import harness  # first: it finds the guest package
from guest import File, QemuPmem, VfioUser
from pmem_vm import MAKE, Evictor, PmemTest

SECONDS = int(os.environ.get("SECONDS_EACH", "120"))
MIB = 48


class PmemEviction(PmemTest):

    def disk(self):
        """A disk whose first half is a pattern that `pg dma` knows."""
        path = self.folder / "dma.img"
        subprocess.run([self.tool, "fill", path, str(MIB), "5"], check=True, capture_output=True)
        os.truncate(path, MIB << 21)
        return str(path)

    def run_dma(self, g, seconds):
        self.up(g)
        self.mounted(g, "/dev/pmem0", "/e", MAKE["ext4"])
        g.run(f"pg fill /e/f {MIB} 5", timeout=300)
        disk = g.run(f"for d in /sys/block/vd*; do [ $(cat $d/size) = {MIB * 4096} ] && echo /dev/${{d##*/}}; done; true")
        evictor = Evictor(self.daemon)
        try:
            status, text = g.run(f"pg dma /e/f {MIB} 5 {seconds} {disk.strip()}", timeout=seconds + 300, check=False)
        finally:
            evictor.stop()
        print(f"{text.strip()}; {evictor.passes} passes took {evictor.freed >> 20} MiB", file=sys.stderr)
        self.zero_wrong(status, text)
        self.assertGreater(evictor.freed, MIB << 20)

    def test_o_direct_into_dax_mappings_of_a_vmm_with_its_own_device(self):
        # QEMU reads its disk with O_DIRECT right into the mapping of our file: real DMA into pages that we evict.
        disk = File(self.disk(), cache="none")
        self.run_dma(self.guest([QemuPmem(self.sock("vm1.pmem")), disk], qemu="host", kernel="bookworm"), SECONDS)

    def test_o_direct_into_dax_mappings_of_a_vfio_user_device(self):
        # QEMU bounces DMA into a BAR: only with these options is its bounce buffer large enough (docs/pmem.md).
        disk = File(self.disk(), cache="none", properties={
            "disable-legacy": "on", "iommu_platform": "on", "x-max-bounce-buffer-size": 1 << 20})
        self.run_dma(self.guest([VfioUser(self.sock("vm1.sock")), disk]), SECONDS)


if __name__ == "__main__":
    harness.main()
