#!/usr/bin/env python3
"""virtio-pmem in stock Debian guests, what it is: bound, mounted, durable, rebooted, plugged, a root (issue 7: P1, P2)."""
import harness  # first: it finds the guest package
from guest import QemuPmem, VfioUser
from guest import image
from guest.daemon import until
from pmem_vm import MAKE, PmemTest


class Pmem(PmemTest):
    mib = (512, 96)  # the second one is no power of two: a sparse BAR

    def test_two_devices_mount_dax_refuse_map_sync_and_keep_data_over_reboot(self):  # P1, P2
        g = self.guest([VfioUser(self.sock("vm1.sock")), VfioUser(self.sock("vm2.sock"))], reboot=True)
        self.up(g, 2)
        self.assertEqual(g.run("cat /sys/block/pmem*/queue/dax").split(), ["1", "1"])
        sizes = sorted(int(x) // 2048 for x in g.run("cat /sys/block/pmem0/size /sys/block/pmem1/size").split())
        self.assertEqual(sizes, [96, 512])
        big = g.run("for d in pmem0 pmem1; do [ $(cat /sys/block/$d/size) -gt 300000 ] && echo $d; done; true").strip()
        small = "pmem1" if big == "pmem0" else "pmem0"
        self.mounted(g, f"/dev/{big}", "/x", MAKE["xfs"])
        self.mounted(g, f"/dev/{small}", "/e", MAKE["ext4"])
        for where in ("/x", "/e"):
            self.assertIn("dax=always", g.run(f"grep ' {where} ' /proc/mounts"))
            self.assertEqual(g.run(f"pg mapsync {where}/s").strip(), "EOPNOTSUPP")
            self.assertEqual(g.run(f"pg fill {where}/f 8 7").strip(), "filled")
        g.run("umount /x /e; sync")
        mark = g.mark()
        g.qmp("system_reset")
        g.wait_for("agent ready", 240, after=mark)
        self.up(g, 2)
        g.run(f"mkdir -p /x /e; mount -t xfs -o dax=always /dev/{big} /x && mount -o dax=always /dev/{small} /e")
        for f in ("/e/f", "/x/f"):
            self.assertEqual(g.run(f"pg check {f} 8 7").strip(), "wrong 0")

    def test_fsynced_data_is_in_the_image_after_a_power_cut_and_serves_another_vmm(self):  # P1
        g = self.guest([VfioUser(self.sock("vm1.sock"))])
        self.up(g)
        self.mounted(g, "/dev/pmem0", "/e", MAKE["ext4"])
        self.assertEqual(g.run("pg fill /e/f 16 3").strip(), "filled")
        g.stop()
        # Debian 12's QEMU 7.2 has a virtio-pmem of its own, and a kernel 6.1 needs no SHMEM_REGION with it.
        g = self.guest([QemuPmem(self.sock("vm1.pmem"))], qemu="host", kernel="bookworm")
        self.up(g)
        g.run("mkdir /e && mount -o dax=always /dev/pmem0 /e")
        self.assertEqual(g.run("pg check /e/f 16 3").strip(), "wrong 0")
        self.assertEqual(g.run("pg fsync /e/f").strip(), "ok")

    def test_plugged_into_a_running_guest(self):
        g = self.guest([], extra=["-device", "pcie-root-port,id=rp0,slot=1,pref64-reserve=512M"])
        g.run("modprobe virtio_pmem; modprobe nd_pmem; ! ls /dev/pmem* 2>/dev/null")
        g.qmp("device_add", driver="vfio-user-pci", id="hot", bus="rp0",
              socket={"type": "unix", "path": self.sock("vm2.sock")})
        until(lambda: "pmem0" in g.run("ls /dev"), "hot-plugged pmem disk", 30, step=0.5)
        self.mounted(g, "/dev/pmem0", "/e", MAKE["ext4"])
        self.assertEqual(g.run("pg fill /e/f 4 3").strip(), "filled")
        self.assertEqual(g.run("pg check /e/f 4 3").strip(), "wrong 0")


class PmemRoot(PmemTest):
    mib = (192, )

    def setUp(self):
        super().setUp()
        self.daemon.stop()
        image.root_image(str(self.folder / "d1.img"), 192)
        self.daemon.start()

    def test_is_the_root_filesystem(self):
        g = self.guest([VfioUser(self.sock("vm1.sock"))], root="/dev/pmem0 ext4 dax")
        self.assertIn("/dev/pmem0 / ext4", g.run("cat /proc/mounts"))
        self.assertIn("dax", g.run("grep ' / ' /proc/mounts"))
        g.run("echo here >/kept && sync")
        g.stop()
        g = self.guest([VfioUser(self.sock("vm1.sock"))], root="/dev/pmem0 ext4 dax")
        self.assertEqual(g.run("cat /kept").strip(), "here")


if __name__ == "__main__":
    harness.main()
