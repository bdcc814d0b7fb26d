#!/usr/bin/env python3
"""A wide, seeded matrix of images made by qemu-img and qemu-io: what spillway says of each is what QEMU says of it.

For every image: `volume cat` equals `qemu-img convert -O raw` by sha256, `image map --json` equals `qemu-img map`, `image check` agrees
with `qemu-img check`, `image info --json` has qemu-img's values, each internal snapshot reads as QEMU reads it, `image convert`
both ways compares equal, and none of that changes a byte of any file. SPILLWAY_MATRIX=N: how many images (default 12),
SPILLWAY_MATRIX_SEED=S: another sample.
"""
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
from programs import ProgramTest  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Shape:
    """One point of the matrix: how the image is made."""

    def __init__(self, r):
        self.compat = r.choice(["0.10", "1.1", "1.1", "1.1", "1.1"])
        self.cluster = r.choice([512, 1 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 64 * KIB, 256 * KIB, 2 * MIB])
        v3 = self.compat == "1.1"
        self.refcount_bits = r.choice([1, 2, 4, 8, 16, 16, 32, 64]) if v3 else 16
        self.extended = v3 and self.cluster >= 16 * KIB and r.random() < 0.4
        self.zstd = v3 and r.random() < 0.4
        self.lazy = v3 and r.random() < 0.2
        self.data_file = r.choice([None, None, None, None, "std", "raw"]) if v3 else None
        self.backing = r.choice([None, None, "raw", "qcow2", "chain"])
        if self.data_file == "raw":
            self.backing = None
        self.prealloc = r.choice(["off", "off", "off", "metadata", "falloc", "full"])
        if self.backing and self.prealloc != "off" and not self.extended:
            self.prealloc = "off"  # QEMU allows it with subclusters only
        self.compress = not self.data_file and r.random() < 0.35
        self.snapshots = 0 if self.data_file or self.refcount_bits == 1 else r.choice([0, 0, 1, 2])
        self.size = r.choice([1 * MIB + 512, 3 * MIB, 5 * MIB + 1536, 12 * MIB, 17 * MIB + 512])
        self.backing_size = r.choice([512 * KIB, 2 * MIB + 512, 20 * MIB])
        self.writes = r.randrange(5, 40)

    def options(self):
        o = [f"compat={self.compat}", f"cluster_size={self.cluster}"]
        if self.compat == "1.1":
            o += [f"refcount_bits={self.refcount_bits}"]
            o += ["extended_l2=on"] if self.extended else []
            o += ["compression_type=zstd"] if self.zstd else []
            o += ["lazy_refcounts=on"] if self.lazy else []
        return o

    def __str__(self):
        return " ".join(f"{k}={v}" for k, v in vars(self).items())


class Matrix(ProgramTest):
    def qemu(self, *words, ok=True):
        p = subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=self.folder, timeout=120)
        if ok:
            self.assertEqual(p.returncode, 0, f"{words}: {p.stdout}{p.stderr}")
        return p

    def ours(self, *words):
        p = self.spillway(*words)
        self.assertEqual(p.returncode, 0, f"{words}: {p.stderr.decode()}")
        return p.stdout

    def scribble(self, r, path, size, n, discards):
        lines = []
        for _ in range(n):
            at = r.randrange(size // 512) * 512
            length = min(size - at, (r.randrange(r.choice([512, 4096, 65536, 65536, 1 << 20])) // 512 + 1) * 512)
            what = r.random()
            if what < 0.6:
                lines.append(f"write -P {r.randrange(1, 256)} {at} {length}")
            elif what < 0.7:
                lines.append(f"write -z {at} {length}")
            elif what < 0.85:
                lines.append(f"write -z -u {at} {length}")
            elif discards:
                lines.append(f"discard {at} {length}")
        lines.append("flush")
        p = subprocess.run(["qemu-io", "-d", "unmap", "-f", path.suffix[1:], path], input="\n".join(lines) + "\n", text=True,
                           capture_output=True, cwd=self.folder, timeout=120)
        self.assertEqual(p.returncode, 0, p.stdout + p.stderr)

    def make_backing(self, r, s):
        if s.backing is None:
            return []
        base = self.folder / "base.raw"
        self.qemu("qemu-img", "create", "-f", "raw", base, s.backing_size)
        self.scribble(r, base, s.backing_size, 12, False)
        if s.backing == "raw":
            return ["-F", "raw", "-b", "base.raw"]
        top, fmt = base, "raw"
        for i in range(1 if s.backing == "qcow2" else 3):
            mid = self.folder / f"mid{i}.qcow2"
            size = r.choice([s.backing_size, s.backing_size // 1024 * 512, s.backing_size + MIB])
            self.qemu("qemu-img", "create", "-f", "qcow2", "-o", f"cluster_size={r.choice([512, 4096, 65536])}", "-F", fmt, "-b",
                      top.name, mid, size)
            self.scribble(r, mid, size, 10, True)
            top, fmt = mid, "qcow2"
        return ["-F", "qcow2", "-b", top.name]

    def make(self, r, s):
        path = self.folder / "image.qcow2"
        backing = self.make_backing(r, s)
        if s.compress:
            source = self.folder / "source.raw"
            self.qemu("qemu-img", "create", "-f", "raw", source, s.size)
            self.scribble(r, source, s.size, 30, False)
            o = s.options()
            self.qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", ",".join(o), source, path)
            if backing:  # put it under the compressed image, as it is
                self.qemu("qemu-img", "rebase", "-u", "-f", "qcow2", *backing, path)
        else:
            o = s.options()
            if s.data_file:
                o += ["data_file=data.bin", f"data_file_raw={'on' if s.data_file == 'raw' else 'off'}"]
            if s.prealloc != "off":
                o += [f"preallocation={s.prealloc}"]
            self.qemu("qemu-img", "create", "-f", "qcow2", "-o", ",".join(o), *backing, path, s.size)
        for i in range(s.snapshots + 1):
            if i > s.snapshots:
                break
            self.scribble(r, path, s.size, s.writes, True)
            if i < s.snapshots:
                if self.qemu("qemu-img", "snapshot", "-c", f"snap{i}", path, ok=False).returncode != 0:
                    s.snapshots = i  # narrow refcounts cannot count that often
        return path

    @staticmethod
    def joined(entries, drop=("compressed",)):
        out = []
        for e in entries:
            e = {k: v for k, v in e.items() if k not in drop}
            if out:
                last = out[-1]
                same = all(last[k] == e[k] for k in ("depth", "present", "zero", "data")) and ("offset" in last) == ("offset" in e)
                if same and ("offset" not in e or last["offset"] + last["length"] == e["offset"]):
                    last["length"] += e["length"]
                    continue
            out.append(e)
        return out

    def cat(self, text, digest, size):
        data = self.ours("volume", "cat", "v", "--config", self.config(text))
        self.assertEqual(len(data), size)
        self.assertEqual(hashlib.sha256(data).hexdigest(), digest)

    def verify(self, path, s):
        files = sorted(p for p in self.folder.iterdir() if p.suffix in (".raw", ".qcow2", ".bin"))
        before = {p: sha(p) for p in files}
        config = f'[disk.f]\npath = "{path}"\n[volume.v]\nlayer = "qcow2"\nmembers = ["f"]\n'
        raw = self.folder / "theirs.out"
        self.qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
        self.cat(config, sha(raw), s.size)
        for i in range(s.snapshots):
            snap = self.folder / "snap.out"
            self.qemu("qemu-img", "convert", "-f", "qcow2", "-l", f"snap{i}", "-O", "raw", path, snap)
            self.cat(config + f'snapshot = "snap{i}"\n', sha(snap), s.size)
        theirs = json.loads(self.qemu("qemu-img", "map", "--output=json", "-f", "qcow2", path).stdout)
        ours = json.loads(self.ours("image", "map", path, "--json"))
        self.assertEqual(self.joined(ours), self.joined(theirs))
        theirs = json.loads(self.qemu("qemu-img", "info", "--output=json", "-f", "qcow2", path).stdout)
        ours = json.loads(self.ours("image", "info", path, "--json"))
        for key in ("virtual-size", "cluster-size", "format", "dirty-flag", "backing-filename", "backing-filename-format", "filename",
                    "actual-size", "snapshots"):
            a, b = ours.get(key), theirs.get(key)
            if key == "snapshots" and b:
                b = [{k: v for k, v in x.items() if k != "icount"} for x in b]
            self.assertEqual(a, b, key)
        self.assertEqual({k: v for k, v in theirs["format-specific"]["data"].items()}, ours["format-specific"]["data"])
        p = self.qemu("qemu-img", "check", "-f", "qcow2", path, ok=False)
        q = self.spillway("image", "check", path)
        self.assertEqual(q.returncode == 0, p.returncode == 0, f"{p.stdout}{p.stderr} ours: {q.stdout.decode()}{q.stderr.decode()}")
        # And back: what we convert is theirs too.
        for name, words in (("c.raw", ["-O", "raw"]), ("c.qcow2", ["-O", "qcow2", "--cluster-size", "4K"]),
                            ("z.qcow2", ["-O", "qcow2", "-c", "--compression", "zstd"])):
            out = self.folder / name
            self.ours("image", "convert", path, out, *words)
            fmt = out.suffix[1:]
            self.qemu("qemu-img", "compare", "-f", "qcow2", "-F", fmt, path, out)
            if fmt == "qcow2":
                self.qemu("qemu-img", "check", "-f", "qcow2", out)
            out.unlink()
        self.assertEqual({p: sha(p) for p in files}, before)

    def test_images_of_many_kinds_are_read_as_qemu_reads_them(self):
        if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
            self.skipTest("qemu-img and qemu-io are not installed")
        n, seed = int(os.environ.get("SPILLWAY_MATRIX", "12")), int(os.environ.get("SPILLWAY_MATRIX_SEED", "1"))
        for i in range(n):
            r = random.Random(seed * 1000003 + i)
            s = Shape(r)
            with self.subTest(seed=seed, image=i, shape=str(s)):
                for p in self.folder.iterdir():
                    p.unlink()
                self.verify(self.make(r, s), s)


if __name__ == "__main__":
    unittest.main()
