#!/usr/bin/env python3
"""virtio-pmem with stock QEMU 11 and a stock Debian 13 guest (issue 7: P1, P2, P7, P9, survival)."""
import subprocess
import sys
import threading
import time
from pathlib import Path

import harness  # first: it finds the guest package
from guest import Guest, QemuPmem, VfioUser, VhostUser
from guest.daemon import Daemon, programs, sparse

HERE = Path(__file__).resolve().parent
CONFIG = """
[disk.d1]
path = "d1.img"
[disk.d2]
path = "d2.img"
[group.t]
weight = 100
[export.vm1]
device = "virtio-pmem"
volume = "d1"
group = "t"
socket = "vm1.sock"
file = "vm1.pmem"
trim_socket = "trim.sock"
[export.vm2]
device = "virtio-pmem"
volume = "d2"
group = "t"
socket = "vm2.sock"
file = "vm2.pmem"
"""
MIB1, MIB2 = 512, 96  # the second one is no power of two: a sparse BAR


class Pmem(harness.VmTest):

    def setUp(self):
        super().setUp()
        sparse(self.folder / "d1.img", MIB1)
        sparse(self.folder / "d2.img", MIB2)
        self.tool = self.folder / "pmem_guest"
        subprocess.run(["cc", "-static", "-O2", "-o", self.tool, HERE / "pmem_guest.c"], check=True)
        self.daemon = self.started(Daemon(self.folder, CONFIG, ["vm1.sock", "vm2.sock", "trim.sock"]))

    def guest(self, disks, **options):
        files = {"/bin/pg": self.tool, **options.pop("files", {})}
        options = {"kernel": "trixie", "qemu": "trixie", "memory": 512, "files": files, **options}
        return self.started(Guest("pm", disks, **options))

    def up(self, g, count=1):
        g.run("modprobe virtio_pmem; modprobe nd_pmem; for i in 1 2 3 4 5 6 7 8 9 10; do "
              f"[ -b /dev/pmem{count - 1} ] && break; sleep 0.3; done; [ -b /dev/pmem{count - 1} ]")

    def sock(self, name):
        return str(self.folder / name)

    def test_binds_mounts_dax_refuses_map_sync_and_keeps_data_over_reboot(self):  # P1, P2
        g = self.guest([VfioUser(self.sock("vm1.sock")), VfioUser(self.sock("vm2.sock"))], reboot=True)
        self.up(g, 2)
        self.assertEqual(g.run("cat /sys/block/pmem*/queue/dax").split(), ["1", "1"])
        sizes = sorted(int(x) // 2048 for x in g.run("cat /sys/block/pmem0/size /sys/block/pmem1/size").split())
        self.assertEqual(sizes, [MIB2, MIB1])
        big = g.run("for d in pmem0 pmem1; do [ $(cat /sys/block/$d/size) -gt 300000 ] && echo $d; done; true").strip()
        small = "pmem1" if big == "pmem0" else "pmem0"
        g.run(f"mkfs.xfs -f -q -m reflink=0 /dev/{big} && mkdir -p /x /e && mount -t xfs -o dax=always /dev/{big} /x")
        g.run(f"mkfs.ext4 -q /dev/{small} && mount -o dax=always /dev/{small} /e")
        self.assertIn("dax=always", g.run("grep ' /e ' /proc/mounts"))
        self.assertIn("dax=always", g.run("grep ' /x ' /proc/mounts"))
        for where in ("/x", "/e"):
            self.assertEqual(g.run(f"pg mapsync {where}/s").strip(), "EOPNOTSUPP")
            self.assertEqual(g.run(f"pg fill {where}/f 16 7").strip(), "filled")
        g.run("umount /x /e; sync")
        mark = g.mark()
        g.qmp("system_reset")
        g.wait_for("booted", 240, after=mark)
        self.up(g, 2)
        g.run(f"mkdir -p /x /e; mount -t xfs -o dax=always /dev/{big} /x && mount -o dax=always /dev/{small} /e")
        for f in ("/e/f", "/x/f"):
            self.assertEqual(g.run(f"pg check {f} 16 7").strip(), "wrong 0")

    def test_fsynced_data_is_in_the_image_after_a_power_cut_of_the_guest(self):  # P1
        g = self.guest([VfioUser(self.sock("vm1.sock"))])
        self.up(g)
        g.run("mkfs.ext4 -q /dev/pmem0 && mkdir /e && mount -o dax=always /dev/pmem0 /e")
        self.assertEqual(g.run("pg fill /e/f 32 3").strip(), "filled")
        g.stop()
        g = self.guest([QemuPmem(str(self.folder / "vm1.pmem"))], qemu="host", kernel="bookworm")  # QEMU 7.2: own device
        self.up(g)
        g.run("mkdir /e && mount -o dax=always /dev/pmem0 /e")
        self.assertEqual(g.run("pg check /e/f 32 3").strip(), "wrong 0")

    def test_twenty_kills_under_load_lose_nothing(self):  # survival by holder and RESEND
        g = self.guest([VfioUser(self.sock("vm1.sock"))])
        self.up(g)
        g.run("mkfs.ext4 -q /dev/pmem0 && mkdir /e && mount -o dax=always /dev/pmem0 /e")
        g.run("pg fill /e/f 24 0")
        job = g.spawn("pg churn /e/f 24 0 60")
        for _ in range(20):
            time.sleep(1)
            self.daemon.kill_worker()
        status, text = g.join(job, 300)
        self.assertEqual((status, text.split()[:2]), (0, ["wrong", "0"]), text)
        print("kills: 20,", text.strip(), file=sys.stderr)

    def test_space_comes_back_while_the_guest_runs(self):  # P7
        def used():
            return (self.folder / "d1.img").stat().st_blocks * 512
        tool = programs() / "spillway-trim"
        for make in ("mkfs.ext4 -q", "mkfs.xfs -f -q -m reflink=0"):
            with self.subTest(make):
                g = self.guest([VfioUser(self.sock("vm1.sock")), VhostUser(self.sock("trim.sock"))],
                               files={"/bin/spillway-trim": tool})
                self.up(g)
                kind = make.split()[0].removeprefix("mkfs.")
                g.run(f"{make} /dev/pmem0 && mkdir /e && mount -t {kind} -o dax=always /dev/pmem0 /e && sync")
                g.run("pg fill /e/keep 16 1")
                job = g.spawn("pg churn /e/keep 16 1 40")
                before = used()
                g.run("pg fill /e/big 256 5; sync", timeout=300)
                full = used()
                self.assertGreater(full, before + (250 << 20))
                g.run("rm /e/big; sync")
                text = g.run("spillway-trim /e /dev/vda", timeout=300)
                after = used()
                print(f"{make}: {before >> 20} -> {full >> 20} -> {after >> 20} MiB; {text.strip()}", file=sys.stderr)
                self.assertLess(after, before + 0.05 * (full - before))
                status, text = g.join(job, 300)
                self.assertEqual((status, text.split()[:2]), (0, ["wrong", "0"]), text)
                g.stop()


if __name__ == "__main__":
    harness.main()
