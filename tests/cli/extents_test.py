#!/usr/bin/env python3
"""P6: two tenants' writable disks that share extents by reflink are refused, or unshared; also when it comes later."""
import os
import subprocess
import time
import unittest

from programs import BIN, ProgramTest

CONFIG = """[host]
extent_check_s = 1
[disk.a]
path = "m/a.img"
[disk.b]
path = "m/b.img"
[group.tenant-a]
[group.tenant-b]
[export.a]
device = "virtio-blk"
volume = "a"
group = "tenant-a"
socket = "a.sock"
[export.b]
device = "virtio-blk"
volume = "b"
group = "tenant-b"
socket = "b.sock"
"""


class SharedExtents(ProgramTest):
    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest("mounting a loop device needs root")
        image, mount = self.folder / "fs", self.folder / "m"
        with open(image, "wb") as f:
            f.truncate(512 << 20)
        mount.mkdir()
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
        p = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, text=True)
        if p.returncode:
            self.skipTest(f"no loop-mounted xfs here: {p.stderr.strip()}")
        self.addCleanup(lambda: subprocess.run(["umount", mount], check=True))
        (mount / "a.img").write_bytes(os.urandom(16 << 20))

    def clone(self):
        subprocess.run(["cp", "--reflink=always", self.folder / "m/a.img", self.folder / "m/b.img"], check=True)

    def test_reflinked_disks_are_refused_with_a_line(self):
        self.clone()
        p = subprocess.run([BIN / "spillwayd", "--config", self.config(CONFIG), "--log-level", "warn"],
                           capture_output=True, text=True, timeout=60)
        self.assertEqual(p.returncode, 2, p.stderr)
        self.assertRegex(p.stderr, r"f\.toml:\d+: \[disk\.[ab]\] path: .*share")

    def test_unshare_copies_them(self):
        self.clone()
        p = subprocess.Popen([BIN / "spillwayd", "--config", self.config(CONFIG), "--unshare"], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while not (self.folder / "b.sock").exists():
            self.assertIsNone(p.poll())
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        flags = subprocess.run(["filefrag", "-v", self.folder / "m/a.img"], capture_output=True, text=True).stdout
        p.terminate()
        self.assertEqual(p.wait(30), 0)
        p.stderr.close()
        self.assertNotIn("shared", flags)

    def test_sharing_that_comes_later_ends_the_writers(self):
        (self.folder / "m/b.img").write_bytes(os.urandom(16 << 20))
        config = self.config(CONFIG)
        self.daemon(config)
        # The disk stays the same file (it is open): its contents become a clone of the other's.
        clone = subprocess.run(["xfs_io", "-c", f"reflink {self.folder}/m/a.img 0 0 {16 << 20}",
                                self.folder / "m/b.img"], capture_output=True, text=True)
        self.assertEqual(clone.returncode, 0, clone.stderr)
        deadline = time.monotonic() + 30
        while b"vhost-user-blk" in self.spillway("--config", config, "status").stdout:
            self.assertLess(time.monotonic(), deadline, "the exports still run")
            time.sleep(0.1)


if __name__ == "__main__":
    unittest.main()
