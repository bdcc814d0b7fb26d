#!/usr/bin/env python3
"""What a hostile or careless image may lead to through the daemon's graph: nowhere outside its folder, nothing written by its choice."""
import hashlib
import os
import shutil
import subprocess
import unittest

from programs import ProgramTest


@unittest.skipIf(shutil.which("qemu-img") is None, "qemu-img is not installed")
class ImageNames(ProgramTest):
    def setUp(self):
        super().setUp()
        self.images = self.folder / "images"
        self.images.mkdir()
        self.secret = self.folder / "secret"
        self.secret.write_bytes(b"s" * (1 << 20))

    def qemu_img(self, *words):
        p = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, cwd=self.images)
        self.assertEqual(p.returncode, 0, p.stderr)

    def make(self, name, *words):
        self.qemu_img("create", "-q", "-f", "qcow2", *words, name, "1M")
        return self.images / name

    def text(self, path, extra=""):
        return f'[disk.f]\npath = "{path}"\n[volume.v]\nlayer = "qcow2"\nmembers = ["f"]\n{extra}'

    def refused(self, path, *expect, extra="", words=("volume", "cat")):
        before = {p: hashlib.sha256(p.read_bytes()).digest() for p in self.folder.rglob("*") if p.is_file() and p.suffix != ".toml"}
        p = self.spillway(*words, "v", "--config", self.config(self.text(path, extra)), stdin=b"x" * 512)
        self.assertNotEqual(p.returncode, 0, path)
        self.assertEqual(p.stdout, b"")
        message = p.stderr.decode()
        self.assertEqual(message.strip().count("\n"), 0, message)
        for word in expect:
            self.assertIn(word, message)
        after = {p: hashlib.sha256(p.read_bytes()).digest() for p in before}
        self.assertEqual(before, after)

    def test_backing_names_outside_the_folder_are_refused(self):
        os.symlink(self.secret, self.images / "link")
        for name in ("../secret", str(self.secret), "link", "/etc/passwd", "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
                     "nbd://127.0.0.1/x", "http://127.0.0.1/x", "fd:0"):
            with self.subTest(name=name):
                image = self.make("a.qcow2")
                self.qemu_img("rebase", "-u", "-F", "raw", "-b", name, image)
                self.refused(image, "a.qcow2")

    def test_the_config_may_widen_the_folder(self):
        image = self.make("a.qcow2")
        self.qemu_img("rebase", "-u", "-F", "raw", "-b", "../secret", image)
        p = self.spillway("volume", "cat", "v", "--config", self.config(self.text(image, f'image_folder = "{self.folder}"\n')))
        self.assertEqual((p.returncode, p.stdout), (0, self.secret.read_bytes()), p.stderr)

    def test_a_fifo_is_not_waited_for(self):
        os.mkfifo(self.images / "fifo")
        image = self.make("a.qcow2")
        self.qemu_img("rebase", "-u", "-F", "raw", "-b", "fifo", image)
        self.refused(image, "neither a file nor a block device")

    def test_loops_are_refused(self):
        a, b = self.make("a.qcow2"), self.make("b.qcow2")
        self.qemu_img("rebase", "-u", "-F", "qcow2", "-b", "b.qcow2", a)
        self.qemu_img("rebase", "-u", "-F", "qcow2", "-b", "a.qcow2", b)
        self.refused(a, "loop")
        self.qemu_img("rebase", "-u", "-F", "qcow2", "-b", "a.qcow2", a)
        self.refused(a, "loop")

    def test_names_in_an_image_that_was_guessed_are_not_followed(self):
        # The guest of base.img, a raw disk, has written a header into it that names the neighbour.
        (self.images / "neighbour.raw").write_bytes(b"n" * (1 << 20))
        base = self.make("base.img")
        self.qemu_img("rebase", "-u", "-F", "raw", "-b", "neighbour.raw", base)
        image = self.make("a.qcow2")
        self.qemu_img("rebase", "-u", "-F", "qcow2", "-b", "base.img", image)
        p = self.spillway("volume", "cat", "v", "--config", self.config(self.text(image)))
        self.assertEqual((p.returncode, p.stdout), (0, b"n" * (1 << 20)), p.stderr)
        data = bytearray(image.read_bytes())  # drop the backing format extension: type 0xe2792aca becomes unknown
        at = data.index(bytes.fromhex("e2792aca"))
        data[at:at + 4] = bytes.fromhex("0badf00d")
        image.write_bytes(data)
        self.refused(image, "does not say")

    def test_what_is_written_is_the_configs_choice(self):
        image = self.make("a.qcow2", "-o", "data_file=data.bin")
        p = self.spillway("volume", "cat", "v", "--config", self.config(self.text(image)))
        self.assertEqual(p.returncode, 0, p.stderr)
        self.refused(image, 'data_file = "DISK"', words=("volume", "write"))
        named = f'data_file = "d"\n[disk.d]\npath = "{self.images / "data.bin"}"\n'
        p = self.spillway("volume", "write", "v", "--config", self.config(self.text(image, named)), stdin=b"y" * 512)
        self.assertEqual(p.returncode, 0, p.stderr)
        self.assertEqual((self.images / "data.bin").read_bytes()[:512], b"y" * 512)

    def test_a_backing_file_that_an_export_writes_is_refused(self):
        (self.images / "base.raw").write_bytes(b"b" * (1 << 20))
        image = self.make("a.qcow2", "-F", "raw", "-b", "base.raw")
        other = (f'[disk.b]\npath = "{self.images / "base.raw"}"\n[export.b]\ndevice = "virtio-blk"\nvolume = "b"\nsocket = "b.sock"\n')
        code, error = self.check(self.text(image, other + '[export.v]\ndevice = "virtio-blk"\nvolume = "v"\nsocket = "v.sock"\n'))
        self.assertEqual(code, 2, error)
        self.assertIn('is written by export "b"', error)
        code, error = self.check(self.text(image, 'backing = "b"\n' + other))
        self.assertEqual(code, 2, error)
        self.assertIn('is written by export "b"', error)


if __name__ == "__main__":
    unittest.main()
