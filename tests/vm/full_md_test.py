#!/usr/bin/env python3
"""The way back (V1): arrays made and written here assemble with mdadm and the kernel of Debian 12, with equal contents
and mismatch_cnt 0; what the kernel then writes reads back here."""
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import harness  # first: it finds the guest package
from guest import File, Guest

BIN = Path(os.environ.get("SPILLWAY_BIN", harness.TREE / "build/dev/bin"))


@dataclass
class Array:
    name: str
    sizes: tuple         # MiB
    options: tuple
    gone: int = -1       # not given to the guest
    level: str = ""


ARRAYS = [
    Array("linear", (12, 20, 16), ("--layer", "linear"), level="linear"),
    Array("stripe", (12, 20, 16), ("--layer", "stripe", "--chunk", "65536"), level="raid0"),
    Array("mirror", (16, 16), ("--layer", "mirror"), level="raid1"),
    Array("r5ls", (16, 16, 16), ("--layer", "raid5", "--chunk", "65536"), level="raid5"),
    Array("r5ra", (16, 16, 16), ("--layer", "raid5", "--chunk", "16384", "--layout", "right-asymmetric",
                                 "--consistency", "resync"), level="raid5"),
    Array("r5ppl", (16, 16, 16, 16), ("--layer", "raid5", "--chunk", "32768", "--consistency", "ppl"), level="raid5"),
    Array("r5kill", (16, 16, 16), ("--layer", "raid5", "--consistency", "ppl", "--kill"), level="raid5"),
    Array("r5deg", (16, 16, 16), ("--layer", "raid5", "--layout", "left-asymmetric", "--fail", "r5deg1.img"), gone=1,
          level="raid5"),
]


class MdTest(harness.VmTest):

    def writer(self, files, *options):
        out = subprocess.run([BIN / "md_writer", *files, *options], check=True, capture_output=True, text=True)
        size, sha = out.stdout.split()
        return int(size), sha

    def test_arrays_made_here_are_the_kernels(self):
        made, disks = {}, []
        for a in ARRAYS:
            files = []
            for i, mib in enumerate(a.sizes):
                path = self.folder / f"{a.name}{i}.img"
                with open(path, "wb") as f:
                    f.truncate(mib << 20)
                files.append(path)
            size, sha = self.writer(files, *a.options)
            mine = [f for i, f in enumerate(files) if i != a.gone]
            first = len(disks)
            disks += [File(str(f)) for f in mine]
            made[a.name] = (a, mine, size, sha, [f"/dev/vd{chr(97 + first + i)}" for i in range(len(mine))])
        guest = self.started(Guest("md", disks, tools=("mdadm", "util"), memory=512), timeout=400)
        for m in ("md_mod", "linear", "raid0", "raid1", "raid456"):
            guest.run(f"modprobe {m}", timeout=400)
        guest.run("echo 1000000 > /proc/sys/dev/raid/speed_limit_min")
        after = {}
        for n, (name, (a, files, size, sha, devices)) in enumerate(made.items()):
            with self.subTest(array=name):
                md = f"/dev/md{n}"
                guest.run(f"mdadm --assemble --run {md} {' '.join(devices)}", timeout=400)
                guest.run(f"until grep -q idle /sys/block/md{n}/md/sync_action 2>/dev/null || "
                          f"[ ! -e /sys/block/md{n}/md/sync_action ]; do sleep 1; done", timeout=300)
                self.assertEqual(guest.run(f"cat /sys/block/md{n}/md/level", timeout=400).strip(), a.level)
                self.assertEqual(int(guest.run(f"blockdev --getsize64 {md}")), size)
                self.assertEqual(guest.run(f"sha256sum {md}", timeout=400).split()[0], sha)
                if a.level in ("raid1", "raid5") and a.gone < 0:
                    guest.run(f"echo check > /sys/block/md{n}/md/sync_action; sleep 1; "
                              f"until grep -q idle /sys/block/md{n}/md/sync_action; do sleep 1; done", timeout=300)
                    self.assertEqual(guest.run(f"cat /sys/block/md{n}/md/mismatch_cnt").strip(), "0")
                guest.run(f"dd if=/dev/urandom of={md} bs=64k count=40 seek=17 conv=fsync 2>/dev/null", timeout=400)
                after[name] = guest.run(f"sha256sum {md}", timeout=400).split()[0]
                guest.run(f"mdadm --stop {md}", timeout=400)
        guest.run("sync")
        guest.stop()
        for name, sha in after.items():
            with self.subTest(read_back=name):
                a, files, size, _, _ = made[name]
                self.assertEqual(self.writer(files, "--read"), (size, sha))


if __name__ == "__main__":
    harness.main()
