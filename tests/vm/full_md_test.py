#!/usr/bin/env python3
"""md both ways (V1): arrays made and written here assemble with mdadm and the kernel of Debian 12, with equal contents and
mismatch_cnt 0, and what the kernel then writes reads back here; arrays that mdadm made with other options read here, and
what is written here the kernel reads. A guest sees a volume grow while it writes (V5)."""
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import harness  # first: it finds the guest package
from guest import File, Guest, VhostUser
from guest.daemon import Daemon

BIN = Path(os.environ.get("SPILLWAY_BIN", harness.TREE / "build/dev/bin"))
MODULES = ("md_mod", "linear", "raid0", "raid1", "raid456")
MIB = 1 << 20


@dataclass
class Array:
    name: str
    sizes: tuple         # MiB
    options: tuple
    gone: int = -1       # not given to the guest
    level: str = ""


@dataclass
class Made:
    """By mdadm in the guest."""
    name: str
    sizes: tuple         # MiB, in the order of the slots
    create: str          # options of mdadm --create
    level: str
    then: tuple = ()     # shell commands in the guest; MD is the array, D0.. its members
    order: tuple = ()    # in which the members are given to us
    gone: tuple = ()     # members not given to us
    refused: str = ""    # what we say instead of opening it
    state: tuple = ()    # of member states, in slot order, where they are not all active


ARRAYS = [
    Array("linear", (12, 20, 16), ("--layer", "linear"), level="linear"),
    Array("grown", (12, 16, 20), ("--layer", "linear", "--grow", "grown2.img"), level="linear"),
    Array("stripe", (12, 20, 16), ("--layer", "stripe", "--chunk", "65536"), level="raid0"),
    Array("stripe1", (12, 12, 12), ("--layer", "stripe", "--chunk", "16384"), level="raid0"),
    Array("stripe12", (12, 12), ("--layer", "stripe", "--chunk", "12288"), level="raid0"),
    Array("mirror", (12, 12), ("--layer", "mirror"), level="raid1"),
    Array("r5ls", (12, 12, 12), ("--layer", "raid5", "--chunk", "65536"), level="raid5"),
    Array("r5ra", (12, 12, 12), ("--layer", "raid5", "--chunk", "16384", "--layout", "right-asymmetric",
                                 "--consistency", "resync"), level="raid5"),
    Array("r5rs", (12, 12, 12), ("--layer", "raid5", "--chunk", "4096", "--layout", "right-symmetric"), level="raid5"),
    Array("r5ppl", (12, 12, 12, 12), ("--layer", "raid5", "--chunk", "32768", "--consistency", "ppl"), level="raid5"),
    Array("r5kill", (12, 12, 12), ("--layer", "raid5", "--consistency", "ppl", "--kill"), level="raid5"),
    Array("r5deg", (12, 12, 12), ("--layer", "raid5", "--layout", "left-asymmetric", "--fail", "r5deg1.img"), gone=1,
          level="raid5"),
    # The replaced member is given to the kernel, too: it must not be taken for one.
    Array("r5swap", (12, 12, 12, 12), ("--layer", "raid5", "--replace", "r5swap1.img", "r5swap3.img"), level="raid5"),
]

MADE = [
    Made("m-lin", (8, 12), "--level=linear --raid-devices=2 --name=host:lin --rounding=32", "linear", order=(1, 0)),
    Made("m-r0", (8, 8), "--level=0 --raid-devices=2 --chunk=12 --data-offset=3M", "stripe"),
    Made("m-r0mz", (8, 16, 12), "--level=0 --raid-devices=3 --chunk=64 --layout=original", "stripe", order=(2, 0, 1)),
    Made("m-r0alt", (8, 12, 12, 16), "--level=0 --raid-devices=4 --chunk=128 --layout=alternate", "stripe"),
    Made("m-r1", (10, 12, 10), "--level=1 --raid-devices=3 --bitmap=internal --bitmap-chunk=4K", "mirror", order=(2, 1, 0)),
    Made("m-r5", (10, 10, 10, 10, 10), "--level=5 --raid-devices=5 --chunk=4 --layout=ra --bitmap=internal --bitmap-chunk=64K",
         "raid5", order=(3, 1, 4, 0, 2)),
    Made("m-r5ppl", (10, 10, 10), "--level=5 --raid-devices=3 --chunk=64 --consistency-policy=ppl --layout=rs", "raid5"),
    Made("m-r5deg", (10, 10, 10, 10), "--level=5 --raid-devices=4 --chunk=256 --bitmap=none --layout=ls", "raid5",
         then=("mdadm MD --fail D2", "dd if=/dev/urandom of=MD bs=64k count=40 seek=5 conv=fsync 2>/dev/null"),
         state=("active", "active", "missing", "active")),
    Made("m-r5new", (10, 10, 10, 10), "--level=5 --raid-devices=3 --spare-devices=1 --chunk=64 --bitmap=none", "raid5",
         then=("mdadm MD --fail D0", "cat /sys/block/MDN/md/sync_action"), gone=(0,)),
    Made("m-r6", (8, 8, 8, 8), "--level=6 --raid-devices=4 --bitmap=none", "raid6", refused="md raid6 is not supported"),
    Made("m-r10", (8, 8), "--level=10 --raid-devices=2 --bitmap=none", "raid10", refused="md raid10 is not supported"),
    Made("m-v10", (8, 8), "--level=1 --raid-devices=2 --metadata=1.0 --bitmap=none", "mirror",
         refused="md superblock version 1.0 is not supported (1.2 is)"),
    Made("m-v11", (8, 8), "--level=1 --raid-devices=2 --metadata=1.1 --bitmap=none", "mirror",
         refused="md superblock version 1.1 is not supported (1.2 is)"),
    Made("m-v090", (8, 8), "--level=1 --raid-devices=2 --metadata=0.90 --bitmap=none", "mirror",
         refused="md superblock version 0.90 is not supported (1.2 is)"),
]


def device(n):
    return "/dev/vd" + (chr(97 + n) if n < 26 else chr(96 + n // 26) + chr(97 + n % 26))


def batches(arrays, limit=26):
    """As many as a guest has PCI slots for their disks."""
    batch, disks = [], 0
    for a in arrays:
        if disks + len(a.sizes) > limit:
            yield batch
            batch, disks = [], 0
        batch.append(a)
        disks += len(a.sizes)
    yield batch


class MdTest(harness.VmTest):
    def writer(self, files, *options):
        out = subprocess.run([BIN / "md_writer", *files, *options], check=True, capture_output=True, text=True)
        size, sha = out.stdout.split()
        return int(size), sha

    def sparse(self, name, mib):
        path = self.folder / name
        with open(path, "wb") as f:
            f.truncate(mib * MIB)
        return path

    def md_guest(self, name, disks):
        guest = self.started(Guest(name, disks, tools=("mdadm", "util"), memory=512), timeout=400)
        for m in MODULES:
            guest.run(f"modprobe {m}", timeout=400)
        guest.run("echo 1000000 > /proc/sys/dev/raid/speed_limit_min; echo 1000000 > /proc/sys/dev/raid/speed_limit_max")
        return guest

    def wait_idle(self, guest, n):
        guest.run(f"until grep -q idle /sys/block/md{n}/md/sync_action 2>/dev/null || "
                  f"[ ! -e /sys/block/md{n}/md/sync_action ]; do sleep 0.2; done", timeout=300)

    def check(self, guest, n):
        guest.run(f"echo check > /sys/block/md{n}/md/sync_action", timeout=300)
        self.wait_idle(guest, n)
        self.assertEqual(guest.run(f"cat /sys/block/md{n}/md/mismatch_cnt").strip(), "0")

    def test_arrays_made_here_are_the_kernels(self):
        for batch in batches(ARRAYS):
            self.made_here(batch)

    def made_here(self, batch):
        made, disks = {}, []
        for a in batch:
            files = [self.sparse(f"{a.name}{i}.img", mib) for i, mib in enumerate(a.sizes)]
            size, sha = self.writer(files, *a.options)
            mine = [f for i, f in enumerate(files) if i != a.gone]
            first = len(disks)
            disks += [File(str(f)) for f in mine]
            made[a.name] = (a, mine, size, sha, [device(first + i) for i in range(len(mine))])
        guest = self.md_guest("md", disks)
        after = {}
        for n, (name, (a, files, size, sha, devices)) in enumerate(made.items()):
            with self.subTest(array=name):
                md = f"/dev/md{n}"
                guest.run(f"mdadm --assemble --run {md} {' '.join(devices)}", timeout=400)
                self.wait_idle(guest, n)
                self.assertEqual(guest.run(f"cat /sys/block/md{n}/md/level", timeout=400).strip(), a.level)
                self.assertEqual(int(guest.run(f"blockdev --getsize64 {md}")), size)
                self.assertEqual(guest.run(f"sha256sum {md}", timeout=400).split()[0], sha)
                if a.level in ("raid1", "raid5") and name != "r5deg":
                    self.check(guest, n)
                guest.run(f"dd if=/dev/urandom of={md} bs=64k count=40 seek=17 conv=fsync 2>/dev/null", timeout=400)
                after[name] = guest.run(f"sha256sum {md}", timeout=400).split()[0]
                guest.run(f"mdadm --stop {md}", timeout=400)
        guest.run("sync")
        guest.stop()
        for name, sha in after.items():
            with self.subTest(read_back=name):
                a, files, size, _, _ = made[name]
                self.assertEqual(self.writer(files, "--read"), (size, sha))

    def test_arrays_made_by_mdadm_are_ours(self):
        for batch in batches(MADE):
            self.made_by_mdadm(batch)

    def made_by_mdadm(self, batch):
        disks, made = [], {}
        for a in batch:
            files = [self.sparse(f"{a.name}{i}.img", mib) for i, mib in enumerate(a.sizes)]
            first = len(disks)
            disks += [File(str(f)) for f in files]
            made[a.name] = (a, files, [device(first + i) for i in range(len(files))])
        guest = self.md_guest("mdmade", disks)
        said = {}
        for n, (name, (a, files, devices)) in enumerate(made.items()):
            with self.subTest(made=name):
                md = f"/dev/md{n}"
                guest.run(f"yes | mdadm --create {md} {a.create} {' '.join(devices)} 2>&1", timeout=400)
                self.wait_idle(guest, n)
                guest.run(f"dd if=/dev/urandom of={md} bs=1M conv=fsync 2>/dev/null; true", timeout=400)
                for command in a.then:
                    for i, d in enumerate(devices):
                        command = command.replace(f"D{i}", d)
                    guest.run(command.replace("MDN", f"md{n}").replace("MD", md), timeout=400)
                self.wait_idle(guest, n)
                size = int(guest.run(f"blockdev --getsize64 {md}"))
                said[name] = (size, guest.run(f"sha256sum {md}", timeout=400).split()[0])
                guest.run(f"mdadm --stop {md}", timeout=400)
        guest.run("sync")
        guest.stop()
        rewritten = {}
        for name, (size, sha) in said.items():
            a, files, _ = made[name]
            with self.subTest(opened=name):
                before = [hashlib.sha256(f.read_bytes()).digest() for f in files]
                order = [i for i in (a.order or range(len(files))) if i not in a.gone]
                config = self.folder / "f.toml"
                config.write_text("".join(f'[disk.m{i}]\npath = "{files[i]}"\n' for i in order) +
                                  f'[volume.v]\nlayer = "md"\nmembers = {json.dumps([f"m{i}" for i in order])}\n')
                cat = subprocess.run([BIN / "spillway", "volume", "cat", "v", "--config", config], capture_output=True)
                if a.refused:
                    self.assertNotEqual(cat.returncode, 0)
                    self.assertIn(a.refused, cat.stderr.decode())
                    self.assertEqual(cat.stderr.count(b"\n"), 1, cat.stderr)
                else:
                    self.assertEqual(cat.returncode, 0, cat.stderr)
                    self.assertEqual((len(cat.stdout), hashlib.sha256(cat.stdout).hexdigest()), (size, sha))
                    status = json.loads(subprocess.run([BIN / "spillway", "--json", "volume", "status", "v", "--config", config],
                                                       capture_output=True).stdout)
                    if a.level in ("mirror", "raid5"):
                        self.assertEqual([m["state"] for m in status["members"] if m["role"] >= 0],
                                         list(a.state) or ["active"] * sum(m["role"] >= 0 for m in status["members"]))
                self.assertEqual([hashlib.sha256(f.read_bytes()).digest() for f in files], before)
                if a.refused:
                    continue
                data = hashlib.shake_256(name.encode()).digest(size)  # all of it, written here
                subprocess.run([BIN / "spillway", "volume", "write", "v", "--config", config], input=data, check=True,
                               capture_output=True)
                rewritten[name] = hashlib.sha256(data).hexdigest()
        guest = self.md_guest("mdback", disks)
        for n, (name, sha) in enumerate(rewritten.items()):
            with self.subTest(back=name):
                a, files, devices = made[name]
                md = f"/dev/md{n}"
                mine = [d for i, d in enumerate(devices) if i not in a.gone]
                guest.run(f"mdadm --assemble --run {md} {' '.join(mine)}", timeout=400)
                self.wait_idle(guest, n)
                self.assertEqual(guest.run(f"sha256sum {md}", timeout=400).split()[0], sha)
                if a.level in ("mirror", "raid5") and not a.state:
                    self.check(guest, n)
                guest.run(f"mdadm --stop {md}", timeout=400)

    def test_a_guest_sees_its_volume_grow_while_it_writes(self):
        for i, mib in enumerate((16, 16, 24)):
            self.sparse(f"g{i}.img", mib)
        sock = self.folder / "vm.sock"
        config = ("".join(f'[disk.g{i}]\npath = "g{i}.img"\n' for i in range(3)) +
                  '[volume.lin]\nlayer = "linear"\nmembers = ["g0", "g1"]\nmetadata = "md"\n'
                  '[export.vm]\ndevice = "virtio-blk"\nvolume = "lin"\nsocket = "vm.sock"\n')
        path = self.folder / "grow.toml"
        path.write_text(config)

        def run(*words):
            return subprocess.run([BIN / "spillway", *words, "--config", path], capture_output=True, text=True)
        self.assertEqual(run("volume", "create", "lin").returncode, 0)
        daemon = self.started(Daemon(self.folder, config, ["vm.sock"]))
        guest = self.started(Guest("grow", [VhostUser(str(sock))], memory=384), timeout=400)
        self.assertEqual(int(guest.run("blockdev --getsize64 /dev/vda")), 30 * MIB)
        load = guest.spawn("for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/dev/vda bs=64k count=400 oflag=direct || exit 1; done")
        p = run("volume", "grow", "lin", "member=g2")
        self.assertEqual(p.returncode, 0, p.stderr)
        guest.run(f"until [ $(blockdev --getsize64 /dev/vda) = {53 * MIB} ]; do sleep 0.2; done", timeout=60)
        status, text = guest.join(load, timeout=300)
        self.assertEqual(status, 0, text)
        guest.run("dd if=/dev/urandom of=/dev/vda bs=64k conv=fsync 2>/dev/null; true", timeout=300)
        sha = guest.run("sha256sum /dev/vda", timeout=300).split()[0]
        guest.stop()
        daemon.stop()
        path.write_text(config.replace('"g0", "g1"]', '"g0", "g1", "g2"]'))
        cat = subprocess.run([BIN / "spillway", "volume", "cat", "lin", "--config", path], capture_output=True)
        self.assertEqual((len(cat.stdout), hashlib.sha256(cat.stdout).hexdigest()), (53 * MIB, sha), cat.stderr)


if __name__ == "__main__":
    harness.main()
