#!/usr/bin/env python3
"""virtio-blk as real guests see it (issue 4): geometry, growth, cache mode, packed rings, the loss of holder and worker, stress
on filesystems, buffers outside of guest RAM. Each test runs under Debian 12's QEMU 7.2 or Debian 13's QEMU 11."""
import os
import signal
import subprocess
import time
from pathlib import Path

import harness  # first: it finds the guest package
from guest import Guest, QemuPmem, VfioUser, VhostUser
from guest.daemon import Daemon, sparse, until

HERE = Path(__file__).resolve().parent
NEW = {"kernel": "trixie", "qemu": "trixie"}
CONFIG = """
[cache]
size = "64M"
[disk.s0]
path = "s0.img"
[disk.s1]
path = "s1.img"
[disk.s2]
path = "s2.img"
[disk.s3]
path = "s3.img"
[volume.stripes]
layer = "stripe"
members = ["s0", "s1", "s2", "s3"]
chunk = "64K"
[disk.big]
path = "big.img"
block_size = 4096
[disk.g0]
path = "g0.img"
[disk.g1]
path = "g1.img"
[volume.grows]
layer = "linear"
members = ["g0"]
[export.v]
device = "virtio-blk"
volume = "stripes"
queues = 2
socket = "v.sock"
[export.big]
device = "virtio-blk"
volume = "big"
socket = "big.sock"
[export.ro]
device = "virtio-blk"
volume = "big"
readonly = true
socket = "ro.sock"
[export.g]
device = "virtio-blk"
volume = "grows"
queues = 2
socket = "g.sock"
"""
SOCKETS = ["v.sock", "big.sock", "ro.sock", "g.sock"]
FIO = ("fio --name=v --filename={file} --rw=randwrite --bsrange=4k-64k --size={size} --offset={offset} --direct=1 "
       "--iodepth=16 --ioengine=libaio --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 "
       "--output-format=terse {more}")


class BlkTest(harness.VmTest):

    def setUp(self):
        super().setUp()
        for name, mib in (("s0", 512), ("s1", 512), ("s2", 512), ("s3", 512), ("big", 64), ("g0", 64), ("g1", 32)):
            sparse(self.folder / f"{name}.img", mib)
        self.tool = self.folder / "blk_guest"
        subprocess.run(["cc", "-static", "-O2", "-o", self.tool, HERE / "blk_guest.c"], check=True)
        self.daemon = self.started(Daemon(self.folder, CONFIG, SOCKETS))

    def guest(self, *disks, **options):
        options = {"smp": 2, "files": {"/bin/blk_guest": self.tool}, **options}
        return self.started(Guest("blk", list(disks), **options))

    def disk(self, name, **options):
        return VhostUser(str(self.folder / f"{name}.sock"), **options)

    def no_errors(self, guest):
        self.assertEqual(guest.run(". /lib/guest.sh; io_errors", check=False)[1], "0", guest.run("dmesg | tail -20"))

    def image(self, name, at, length):
        with open(self.folder / f"{name}.img", "rb") as f:
            f.seek(at)
            return f.read(length)

    # -- what the guest is told ---------------------------------------------------------------------

    def geometry(self, **machine):
        g = self.guest(self.disk("v", queues=2), self.disk("big"), self.disk("ro"), **machine)
        queue = lambda d, what: int(g.run(f"cat /sys/block/{d}/queue/{what}"))
        self.assertEqual((queue("vda", "minimum_io_size"), queue("vda", "optimal_io_size")), (64 << 10, 256 << 10))
        self.assertEqual((queue("vda", "logical_block_size"), queue("vda", "physical_block_size")), (512, 4096))
        self.assertEqual(queue("vdb", "logical_block_size"), 4096)
        self.assertEqual(len(g.run("ls /sys/block/vda/mq").split()), 2)
        self.assertEqual(g.run("cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial").split(), ["v", "big"])
        # mkfs.xfs takes su and sw from the topology by itself (V3).
        made = g.run("mkfs.xfs -f /dev/vda && mkdir /x && mount -t xfs /dev/vda /x")
        self.assertRegex(made, r"sunit=16 +swidth=64 blks")
        g.run("umount /x")
        # Whole 4096-byte blocks only, and nothing by way of the read-only export.
        g.run("mkfs.ext4 -q /dev/vdb && mkdir /e && mount /dev/vdb /e && cp /bin/busybox /e/b && sync && cmp /bin/busybox /e/b")
        g.run("umount /e; blockdev --flushbufs /dev/vdc")
        self.assertEqual(g.run("blockdev --getro /dev/vdc"), "1")
        self.assertNotEqual(g.run("dd if=/dev/zero of=/dev/vdc bs=4096 count=1 oflag=direct", check=False)[0], 0)
        g.run("mount -o ro /dev/vdc /e && cmp /bin/busybox /e/b && umount /e")
        # Discard and write zeroes give the space back.
        g.run("dd if=/dev/urandom of=/dev/vda bs=1M count=16 oflag=direct conv=fsync 2>/dev/null")
        blocks = lambda: sum((self.folder / f"s{i}.img").stat().st_blocks * 512 for i in range(4))
        before = blocks()
        g.run("blkdiscard -o 0 -l 8388608 /dev/vda && blk_guest punch /dev/vda 8388608 8388608")
        self.assertLess(blocks(), before - (15 << 20))
        self.assertEqual(g.run("dd if=/dev/vda bs=1M count=16 iflag=direct 2>/dev/null | tr -d '\\000' | wc -c"), "0")
        self.no_errors(g)

    def test_geometry_under_qemu_7(self):
        self.geometry()

    def test_geometry_under_qemu_11(self):
        self.geometry(**NEW)

    # -- what changes while it runs ------------------------------------------------------------------

    def changes(self, **machine):
        g = self.guest(self.disk("g", queues=2), **machine)
        # Cache mode: what is written in write-through mode is in the image when the guest has its answer.
        written = lambda byte, at: g.run(
            f"dd if=/dev/zero bs=64k count=1 2>/dev/null | tr '\\000' '\\{byte:03o}' | "
            f"dd of=/dev/vda bs=64k seek={at} oflag=direct conv=notrunc 2>/dev/null")
        stable = lambda byte, at: self.image("g0", at << 16, 1 << 16) == bytes([byte]) * (1 << 16)
        mode = lambda: g.run("cat /sys/block/vda/cache_type; cat /sys/block/vda/queue/write_cache").split("\n")
        self.assertEqual(mode(), ["write back", "write back"])
        written(0o101, 1)
        self.assertFalse(stable(0o101, 1), "a write in write-back mode went to the disk at once: this proves nothing")
        g.run("echo 'write through' > /sys/block/vda/cache_type")
        self.assertEqual(mode(), ["write through", "write through"])
        self.assertTrue(stable(0o101, 1), "what was cached before the switch")
        written(0o102, 2)
        self.assertTrue(stable(0o102, 2))
        # A stop of the machine resets the device behind the guest's back: the guest still does not flush.
        g.qmp("stop")
        g.qmp("cont")
        written(0o103, 3)
        self.assertTrue(stable(0o103, 3), "write-through was forgotten over stop and cont")
        self.daemon.kill_worker()
        written(0o104, 4)
        self.assertTrue(stable(0o104, 4), "write-through was forgotten by the successor")
        self.lose_holder_and_worker()
        written(0o105, 5)
        self.assertTrue(stable(0o105, 5), "write-through was forgotten over a new connection")
        g.run("echo 'write back' > /sys/block/vda/cache_type")
        self.assertEqual(mode(), ["write back", "write back"])
        written(0o106, 6)
        self.assertFalse(stable(0o106, 6))
        g.run("sync; blockdev --flushbufs /dev/vda; dd if=/dev/null of=/dev/vda conv=fsync,notrunc 2>/dev/null")
        self.assertTrue(stable(0o106, 6))
        # Size: the driver hears of it, and the new end is there.
        size = lambda: int(g.run("blockdev --getsize64 /dev/vda"))
        self.assertEqual(size(), 64 << 20)
        self.daemon.call("volume grow", name="grows", member="g1")
        until(lambda: size() == 96 << 20, "new size in the guest", 20, 0.2)
        g.run("dd if=/dev/urandom of=/r bs=64k count=1 2>/dev/null; dd if=/r of=/dev/vda bs=64k seek=1535 oflag=direct 2>/dev/null;"
              "dd if=/dev/vda bs=64k skip=1535 iflag=direct 2>/dev/null | cmp - /r")
        self.no_errors(g)

    def test_cache_mode_and_growth_under_qemu_7(self):
        self.changes()

    def test_cache_mode_and_growth_under_qemu_11(self):
        self.changes(**NEW)

    def lose_holder_and_worker(self):
        """SIGKILL of the holder (the kernel ends the worker with it), then the daemon anew; QEMU connects again by itself."""
        worker = self.daemon.worker_pid()
        self.daemon.process.send_signal(signal.SIGKILL)
        self.daemon.process.wait()
        until(lambda: not os.path.exists(f"/proc/{worker}"), "end of the worker")
        for s in [*SOCKETS, "spillwayd.sock"]:
            (self.folder / s).unlink(missing_ok=True)
        self.daemon.start()
        until(lambda: any(e["connected"] for e in self.daemon.call("export list")), "QEMU's reconnection", 30, 0.1)

    # Acknowledged but unflushed writes are in the holder's memory: gone with it, as a disk's volatile cache with its power
    # (docs/vhost-user.md). What was flushed stays, and no request of the guest fails or is lost.
    def reconnect(self, **machine):
        g = self.guest(self.disk("v", queues=2), tools=["fio"], **machine)
        g.run(FIO.format(file="/dev/vda", size="16M", offset=0, more="--end_fsync=1"), timeout=300)
        load = g.spawn("fio --name=w --filename=/dev/vda --rw=randrw --bs=16k --size=32M --offset=64M --direct=1 --iodepth=16 "
                       "--ioengine=libaio --time_based --runtime=600 --output-format=terse")
        for _ in range(3):
            done = sum(e["writes"] for e in self.daemon.call("export list"))
            until(lambda: sum(e["writes"] for e in self.daemon.call("export list")) > done + 100, "load", 60)
            self.lose_holder_and_worker()
            until(lambda: sum(e["writes"] for e in self.daemon.call("export list")) > 100, "load after the loss", 60)
            g.run(FIO.format(file="/dev/vda", size="16M", offset=0, more="--verify_only=1"), timeout=300)
        g.run("killall -INT fio", check=False)
        status, output = g.join(load, 60)
        terse = [l for l in output.splitlines() if l.startswith("3;")]
        self.assertEqual([l.split(";")[4] for l in terse], ["0"], output)
        self.no_errors(g)

    def test_holder_and_worker_lost_under_qemu_7(self):
        self.reconnect()

    def test_holder_and_worker_lost_under_qemu_11(self):
        self.reconnect(**NEW)

    # -- packed rings -------------------------------------------------------------------------------

    def packed(self, **machine):
        g = self.guest(self.disk("v", queues=2, properties={"packed": True}), tools=["fio"], **machine)
        bits = g.run("cat /sys/block/vda/device/features").strip()
        self.assertEqual(bits[34], "1", bits)  # VIRTIO_F_RING_PACKED, negotiated
        g.run(FIO.format(file="/dev/vda", size="32M", offset=0, more=""), timeout=400)
        load = g.spawn(FIO.format(file="/dev/vda", size="32M", offset="64M", more="--loops=1000 --verify_backlog=64"))
        for _ in range(5):
            time.sleep(1)
            self.daemon.kill_worker()
        self.lose_holder_and_worker()
        g.run("killall -INT fio", check=False)
        g.join(load, 60)  # its own checks end with the loss: what was not flushed may be old
        g.run(FIO.format(file="/dev/vda", size="32M", offset="96M", more=""), timeout=400)
        self.no_errors(g)

    def test_packed_ring_under_qemu_7(self):
        self.packed()

    def test_packed_ring_under_qemu_11(self):
        self.packed(**NEW)

    # -- filesystems --------------------------------------------------------------------------------

    def test_fsx_and_trees_on_ext4_and_xfs_while_the_worker_dies_and_the_cache_shrinks(self):
        g = self.guest(self.disk("v", queues=2), self.disk("g", queues=2))
        g.run("mkfs.xfs -q -f /dev/vda && mkfs.ext4 -q /dev/vdb && mkdir /x /e && mount -t xfs /dev/vda /x && mount /dev/vdb /e && "
              "mkdir /x/t /e/t")
        jobs = [g.spawn(f"blk_guest fsx {fs}/f{i} 1500 {i}") for i, fs in enumerate(("/x", "/e", "/x"))]
        jobs += [g.spawn(f"blk_guest tree {fs}/t 1500 9") for fs in ("/x", "/e")]
        for size in ("8M", "64M", "4M", "32M", "64M"):
            time.sleep(2)
            self.daemon.call("cache set", size=size)
            self.daemon.kill_worker()
        for job in jobs:
            self.assertEqual(g.join(job, 400), (0, "ok"))
        g.run("umount /x /e && xfs_repair -n /dev/vda && e2fsck -fn /dev/vdb", timeout=300)
        self.no_errors(g)
        self.assertEqual(self.daemon.status()["restarts"], 5)


PMEM = """
[disk.p]
path = "p.img"
[disk.b]
path = "b.img"
[group.t]
weight = 100
[export.p]
device = "virtio-pmem"
volume = "p"
group = "t"
socket = "p.sock"
file = "p.pmem"
[export.b]
device = "virtio-blk"
volume = "b"
group = "t"
socket = "b.sock"
"""


class OutsideRamTest(harness.VmTest):
    """O_DIRECT on the disk with a buffer that is a DAX mapping of our own pmem region: the worker that serves the disk would
    fault on the file that it serves. As QEMU's own virtio-pmem on the FUSE file the region is in the memory table: it works, by blocking
    workers. As a vfio-user BAR it is not: that one request fails. The disk goes on in both cases."""

    def run_dio(self, device, expected, **machine):
        sparse(self.folder / "p.img", 128)
        sparse(self.folder / "b.img", 64)
        tool = self.folder / "blk_guest"
        subprocess.run(["cc", "-static", "-O2", "-o", tool, HERE / "blk_guest.c"], check=True)
        self.started(Daemon(self.folder, PMEM, ["p.sock", "b.sock"]))
        g = self.started(Guest("dio", [VhostUser(str(self.folder / "b.sock")), device()], kernel="trixie", qemu="trixie",
                               memory=512, files={"/bin/blk_guest": tool}))
        g.run("modprobe virtio_pmem; modprobe nd_pmem; for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/pmem0 ] && break; sleep 0.3; "
              "done; mkfs.ext4 -q -b 4096 /dev/pmem0 && mkdir /e && mount -o dax=always /dev/pmem0 /e")
        said = g.run("blk_guest dio /e/map /dev/vda 0 8", timeout=120)
        self.assertIn(said, expected)
        print("O_DIRECT with a DAX buffer:", said)
        g.run("dd if=/dev/urandom of=/r bs=64k count=16 2>/dev/null; dd if=/r of=/dev/vda bs=64k oflag=direct 2>/dev/null; "
              "dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | cmp - /r", timeout=60)
        g.run("echo more > /e/more && sync", timeout=60)

    def test_file_in_the_memory_table_works(self):
        self.run_dio(lambda: QemuPmem(str(self.folder / "p.pmem")), ["wrote ok read ok wrong 0"])

    def test_bar_outside_of_the_table_fails_alone(self):
        self.run_dio(lambda: VfioUser(str(self.folder / "p.sock")), ["wrote EIO read EIO wrong 0", "wrote ok read ok wrong 0"])


if __name__ == "__main__":
    harness.main()
