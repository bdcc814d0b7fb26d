#!/usr/bin/env python3
"""Bad input of issue 2: each a one-line error naming file, line and field, exit 2, nothing touched."""
import hashlib
import socket
import subprocess
import unittest

from programs import BIN, ProgramTest

GOOD = """[disk.d0]
path = "d0.img"
[disk.d1]
path = "d1.img"
[volume.fast]
layer = "stripe"
members = ["d0", "d1"]
chunk = "64K"
[export.vm1]
device = "virtio-blk"
volume = "fast"
socket = "vm1.sock"
"""


class BadConfig(ProgramTest):
    def setUp(self):
        super().setUp()
        self.disk("d0.img")
        self.disk("d1.img")

    def refused(self, text, line, section, field, words):
        before = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in self.folder.glob("*.img")}
        path = self.config(text)
        for extra in (["--check"], []):  # a start refuses what a check refuses
            p = subprocess.run([BIN / "spillwayd", "--config", path, *extra, "--log-level", "warn"],
                               capture_output=True, text=True, timeout=60)
            self.assertEqual(p.returncode, 2, p.stderr)
            self.assertEqual(len(p.stderr.splitlines()), 1, p.stderr)
            self.assertTrue(p.stderr.startswith(f"{path}:{line}: [{section}] {field}: "), p.stderr)
            self.assertIn(words, p.stderr)
        after = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in self.folder.glob("*.img")}
        self.assertEqual(before, after)
        self.assertFalse((self.folder / "vm1.sock").exists())

    def test_good_is_good(self):
        code, text = self.check(GOOD)
        self.assertEqual((code, text), (0, ""))

    def test_typo_in_a_key(self):
        self.refused(GOOD.replace("chunk =", "chnuk ="), 8, "volume.fast", "chnuk", "unknown key")

    def test_missing_disk(self):
        (self.folder / "d1.img").unlink()
        self.refused(GOOD, 4, "disk.d1", "path", "No such file")

    def test_size_no_multiple_of_the_chunk(self):
        self.disk("d1.img", (64 << 20) + 4096)
        self.refused(GOOD, 8, "volume.fast", "chunk", "d1")

    def test_socket_in_use(self):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(self.folder / "vm1.sock"))
            s.listen(1)
            p = subprocess.run([BIN / "spillwayd", "--config", self.config(GOOD), "--log-level", "warn"],
                               capture_output=True, text=True, timeout=60)
            self.assertEqual(p.returncode, 2, p.stderr)
            self.assertRegex(p.stderr, r":12: \[export.vm1\] socket: .*already in use")

    def test_stale_socket_is_replaced(self):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(self.folder / "vm1.sock"))
        self.assertEqual(self.check(GOOD)[0], 0)

    def test_overlapping_writable_exports(self):
        self.refused(GOOD + '[export.vm2]\ndevice = "virtio-blk"\nvolume = "d0"\nsocket = "vm2.sock"\n', 15,
                     "export.vm2", "volume", "overlaps the writable export")

    def test_no_toml(self):
        p = subprocess.run([BIN / "spillwayd", "--config", self.config("[disk\n")], capture_output=True, text=True)
        self.assertEqual(p.returncode, 2)
        self.assertIn("f.toml:1: ", p.stderr)


class VolumeCommands(ProgramTest):
    def test_write_and_cat_agree_and_stripe_as_they_should(self):
        self.disk("d0.img", 1 << 20)
        self.disk("d1.img", 1 << 20)
        config = self.config(GOOD)
        data = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(40000))  # 1.28 MB, unaligned end
        p = self.spillway("volume", "write", "fast", "--config", config, "--offset", "1000", stdin=data)
        self.assertEqual(p.returncode, 0, p.stderr)
        p = self.spillway("volume", "cat", "fast", "--config", config, "--offset", "1000", "--length", len(data))
        self.assertEqual(p.returncode, 0, p.stderr)
        self.assertEqual(p.stdout, data)
        whole = self.spillway("volume", "cat", "fast", "--config", config).stdout
        self.assertEqual(len(whole), 2 << 20)
        members = [(self.folder / f"d{i}.img").read_bytes() for i in (0, 1)]
        chunk = 64 << 10
        for i in range(len(whole) // chunk):
            own = members[i % 2][i // 2 * chunk:(i // 2 + 1) * chunk]
            self.assertEqual(whole[i * chunk:(i + 1) * chunk], own, f"chunk {i}")

    def test_exit_codes(self):
        self.disk("d0.img")
        self.disk("d1.img")
        config = self.config(GOOD)
        self.assertEqual(self.spillway("volume", "cat", "nope", "--config", config).returncode, 3)
        self.assertEqual(self.spillway("--config", config, "status").returncode, 6)
        self.assertEqual(self.spillway("no-such-command").returncode, 2)
        p = self.spillway("volume", "cat", "fast", "--config", config, "--offset", "1T")
        self.assertNotEqual(p.returncode, 0)
        self.assertIn(b"beyond the end", p.stderr)


if __name__ == "__main__":
    unittest.main()
