#!/usr/bin/env python3
"""Independent clients on one spillwayd (issue 4; B1, V2's flush rule): libblkio, qemu-io 11, Debian 12 and 13 guests, and
a kill loop. Each client keeps its own books: blkload and pattern stamp every sector, fio has crc32c."""
import json
import subprocess
import unittest

import harness  # first: it finds the guest package
from guest import Guest, VhostUser, trixie
from guest.daemon import Daemon, sparse
from guest.main_job import pattern_program

CONFIG = """
[cache]
size = "64M"
[disk.d0]
path = "d0.img"
[disk.d1]
path = "d1.img"
[volume.v]
layer = "stripe"
members = ["d0", "d1"]
chunk = "64K"
[export.v]
device = "virtio-blk"
volume = "v"
queues = 2
socket = "v.sock"
"""
FIO = ("fio --name=v --filename={file} --rw=randwrite --bsrange=4k-64k --size={size} --offset={offset} --direct=1 "
       "--iodepth=16 --ioengine=libaio --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 "
       "--output-format=terse {more}")


class InteropTest(harness.VmTest):

    def setUp(self):
        super().setUp()
        for name in ("d0.img", "d1.img"):
            sparse(self.folder / name, 128)
        self.daemon = self.started(Daemon(self.folder, CONFIG, ["v.sock"]))
        self.socket = str(self.folder / "v.sock")

    def blkload(self, *words):
        program = trixie.blkload(harness.TREE / "tools/blkload/blkload.c")
        p = subprocess.run([program, "-s", self.socket, *map(str, words)], capture_output=True, text=True,
                           timeout=300)
        self.assertEqual(p.returncode, 0, p.stderr + p.stdout)
        return json.loads(p.stdout)

    def test_libblkio_reads_what_it_wrote_one_and_two_queues(self):
        for queues in (1, 2):
            for op in ("write", "read"):
                r = self.blkload("-o", op, "-b", "16K", "-q", 16, "-n", queues, "--verify", "--seed", queues)
                self.assertEqual((r["errors"], r["verify_bad_sectors"]), (0, 0), r)

    def test_qemu_io_11_reads_what_it_wrote(self):
        qemu_io = trixie.root() / "bin/qemu-io"
        where = f"driver=virtio-blk-vhost-user,path={self.socket},cache.direct=on"
        steps = ["write -P 0x5a 64k 1M", "flush", "read -P 0x5a 64k 1M", "discard 64k 64k", "read -P 0x5a 128k 960k",
                 "write -z 256k 128k", "read -P 0 256k 128k", "write -P 1 200M 4k", "read -P 1 200M 4k"]
        words = [w for s in steps for w in ("-c", s)]
        p = subprocess.run([qemu_io, "--image-opts", where, *words], capture_output=True, text=True, timeout=120)
        said = p.stdout + p.stderr
        self.assertEqual(p.returncode, 0, said)
        self.assertNotIn("Pattern verification failed", said)
        self.assertNotIn("failed", said)

    def fio_in_guest(self, **machine):
        guest = self.started(Guest("fio", [VhostUser(self.socket, queues=2)], tools=["fio"], smp=2, **machine))
        guest.run(FIO.format(file="/dev/vda", size="48M", offset=0, more=""), timeout=300)
        self.assertEqual(guest.run(". /lib/guest.sh; io_errors", check=False)[1], "0")

    def test_fio_crc32c_in_a_debian_12_guest(self):
        self.fio_in_guest()

    def test_fio_crc32c_in_a_debian_13_guest_under_qemu_11(self):
        self.fio_in_guest(kernel="trixie", qemu="trixie")

    def test_thirty_kills_lose_nothing_flushed(self):
        guest = self.started(Guest("kills", [VhostUser(self.socket, queues=2)], tools=["fio", "ext4"], smp=2,
                                   files={"/bin/pattern": pattern_program()}))
        guest.run("mkfs.ext4 -q -b 4096 /dev/vda 128M && mkdir /d && mount /dev/vda /d")
        load = guest.spawn(FIO.format(file="/dev/vda", size="64M", offset="160M",
                                      more="--loops=1000 --verify_backlog=64 --allow_mounted_write=1"))
        for i in range(30):
            guest.run(f"pattern write /d/f 4 {i} direct sync")
            self.daemon.kill_worker()
            guest.run(f"pattern check /d/f 4 {i} direct", timeout=60)
        guest.run("killall -INT fio", check=False)
        status, output = guest.join(load)
        self.assertNotIn("verify:", output, f"fio: {status}")
        terse = [l for l in output.splitlines() if l.startswith("3;")]
        self.assertEqual([l.split(";")[4] for l in terse], ["0"], output)          # errors
        for kib in (5, 46):                                                        # read back, written
            self.assertGreater(int(terse[0].split(";")[kib]), 4096, output)
        self.assertEqual(guest.run(". /lib/guest.sh; io_errors", check=False)[1], "0")
        guest.run("umount /d && e2fsck -fn /dev/vda")
        self.assertEqual(self.daemon.status()["restarts"], 30)


if __name__ == "__main__":
    unittest.util._MAX_LENGTH = 2000
    harness.main()
