#!/usr/bin/env python3
"""`spillway volume cat` of the images the kernel and qemu-img made equals their manifests (V1, P8), and changes nothing."""
import hashlib
import re
import subprocess
import unittest
from pathlib import Path

from programs import TREE, ProgramTest

VECTORS = TREE / "tests/vectors"


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Vectors(ProgramTest):
    def cat(self, name, config):
        p = self.spillway("volume", "cat", name, "--config", config)
        self.assertEqual(p.returncode, 0, p.stderr.decode())
        return p.stdout

    def test_md_arrays_read_as_the_kernel_served_them(self):
        rows = [l.split(" | ") for l in (VECTORS / "md/MANIFEST.txt").read_text().splitlines() if l[0] != "#"]
        self.assertGreater(len(rows), 5)
        for row in rows:
            name, size, digest = row[0], int(row[4]), row[5]
            with self.subTest(array=name):
                folder = self.folder / name
                folder.mkdir()
                subprocess.run(["tar", "-xJf", VECTORS / f"md/{name}.tar.xz", "-C", folder], check=True)
                images = sorted(folder.rglob("*.img"))
                before = [sha(i) for i in images]
                text = "".join(f'[disk.m{i}]\npath = "{p}"\n' for i, p in enumerate(images))
                members = ", ".join(f'"m{i}"' for i in range(len(images)))
                config = self.config(text + f'[volume.a]\nlayer = "md"\nmembers = [{members}]\n', f"{name}.toml")
                data = self.cat("a", config)
                self.assertEqual(len(data), size)
                self.assertEqual(hashlib.sha256(data).hexdigest(), digest)
                self.assertEqual([sha(i) for i in images], before)

    def test_qcow2_images_read_as_qemu_img_says(self):
        subprocess.run(["tar", "-xJf", VECTORS / "qcow2/images.tar.xz", "-C", self.folder], check=True)
        rows = [l.split() for l in (VECTORS / "qcow2/MANIFEST.txt").read_text().splitlines() if l[0] != "#"]
        self.assertGreater(len(rows), 4)
        for name, size, digest in rows:
            with self.subTest(image=name):
                path = next(self.folder.rglob(name))
                text = f'[disk.f]\npath = "{path}"\n'
                volume = "f"
                if name.endswith(".qcow2"):
                    text += '[volume.v]\nlayer = "qcow2"\nmembers = ["f"]\n'
                    volume = "v"
                data = self.cat(volume, self.config(text, re.sub(r"\W", "-", name) + ".toml"))
                self.assertEqual(len(data), int(size))
                self.assertEqual(hashlib.sha256(data).hexdigest(), digest)


if __name__ == "__main__":
    unittest.main()
