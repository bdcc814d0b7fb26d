#!/usr/bin/env python3
"""Shares of a disk from outside (issue 6; Q1): two tenants' real vhost-user clients on a running daemon, weights changed live,
what iostat says about it, and a disk's calibration. The disk is a modelled one that seeks, so it is the bottleneck on any machine."""
import hashlib
import json
import subprocess
import time
import unittest

from programs import BIN, ProgramTest
from vhost_client import OUT, Load

CONFIG = """[disk.d0]
kind = "sim"
model = "hdd"
size = "1G"
[volume.va]
layer = "slice"
members = ["d0"]
length = "512M"
[volume.vb]
layer = "slice"
members = ["d0"]
offset = "512M"
[group.a]
weight = 100
[group.b]
weight = 300
[export.vm-a]
device = "virtio-blk"
volume = "va"
group = "a"
cache = "none"
socket = "a.sock"
[export.vm-b]
device = "virtio-blk"
volume = "vb"
group = "b"
cache = "none"
socket = "b.sock"
"""
FILE = """[disk.d0]
path = "d0.img"
[disk.small]
path = "small.img"
[export.vm]
device = "virtio-blk"
volume = "d0"
cache = "none"
socket = "vm.sock"
"""


class Shares(ProgramTest):
    def setUp(self):
        super().setUp()
        self.path = self.config(CONFIG)
        self.daemon(self.path)

    def load(self, name, depth=32, **more):
        load = Load(self.folder / f"{name}.sock", depth, 512 << 20, **more)
        load.start()
        return load

    def ask(self, *words):
        p = self.spillway("--config", self.path, "--json", *words)
        self.assertEqual(p.returncode, 0, p.stderr.decode())
        return [json.loads(line) for line in p.stdout.decode().splitlines()]

    def settle(self, *loads, n):
        """Until each has done n more: the scheduler has seen what it needs. A client without a completion says so itself."""
        until = [(load, load.done + n) for load in loads]
        while any(load.done < end for load, end in until):
            for load in loads:
                self.assertTrue(load.is_alive(), load.error)
            time.sleep(0.02)

    def ratio(self, a, b, n=300):
        """b's completions by a's while a does n: no clock in it. What is in the device at either end is up to 32 of them, and
        the drive serves those in its own order."""
        a0, b0 = a.done, b.done
        self.settle(a, n=n)
        return (b.done - b0) / (a.done - a0)

    def test_weights_hold_for_real_clients_and_change_live(self):
        a = self.load("a")
        self.settle(a, n=100)
        (now,) = self.ask("iostat")
        (group,) = now["disks"][0]["groups"]
        self.assertEqual((group["name"], group["share_wanted"], group["share_got"]), ("a", 1, 1))
        b = self.load("b", seed=2)
        self.settle(a, n=100)
        self.assertAlmostEqual(self.ratio(a, b), 3, delta=0.35)
        p = self.spillway("--config", self.path, "group", "set", "b", "weight=100")
        self.assertEqual(p.returncode, 0, p.stderr)
        self.settle(a, n=100)
        self.assertAlmostEqual(self.ratio(a, b), 1, delta=0.15)
        # A cap holds the one, the other has the rest.
        p = self.spillway("--config", self.path, "group", "set", "b", "io.riops=10")
        self.assertEqual(p.returncode, 0, p.stderr)
        self.settle(a, n=200)  # what was in the device by then is through
        (now,) = self.ask("iostat", "2", "1")
        rates = {g["name"]: g["reads_per_s"] for g in now["disks"][0]["groups"]}
        self.assertAlmostEqual(rates["b"], 10, delta=2)
        self.assertGreater(rates["a"], 4 * rates["b"])
        a.stop(), b.stop()

    def test_iostat_says_who_wants_and_gets_what(self):
        a, b = self.load("a"), self.load("b", kind=OUT, length=8192)
        self.settle(a, n=100)
        p = self.spillway("--config", self.path, "--json", "iostat", "-l", "1", "2")
        self.assertEqual(p.returncode, 0, p.stderr)
        first, second = [json.loads(line) for line in p.stdout.decode().splitlines()]
        for sample in (first, second):
            (disk,) = sample["disks"]
            self.assertEqual(disk["name"], "d0")
            self.assertAlmostEqual(disk["seconds"], 1, delta=0.5)
            groups = {g["name"]: g for g in disk["groups"]}
            self.assertEqual(set(groups), {"a", "b"})
            self.assertAlmostEqual(groups["a"]["share_wanted"], 0.25)
            self.assertAlmostEqual(groups["b"]["share_wanted"], 0.75)
            self.assertAlmostEqual(groups["b"]["share_got"], 0.75, delta=0.1)
            self.assertEqual((groups["a"]["writes_per_s"], groups["b"]["reads_per_s"]), (0, 0))
            for g in groups.values():
                self.assertGreater(g["device_us"], 1000)  # it seeks
                self.assertGreater(g["queue_us"], 1000)
                self.assertLessEqual(g["p50_us"], g["p99_us"])
            mb = groups["a"]["reads_per_s"] * 4096 / 1e6, groups["b"]["writes_per_s"] * 8192 / 1e6
            self.assertAlmostEqual(groups["a"]["read_mb_per_s"], mb[0], places=6)
            self.assertAlmostEqual(groups["b"]["write_mb_per_s"], mb[1], places=6)
        text = self.spillway("--config", self.path, "iostat", "-l").stdout.decode()
        self.assertRegex(text, r"d0: depth \d+ \(knee \d+\), \d+ in flight, \d+ waiting")
        self.assertRegex(text, r"group +want +got +reads/s +writes/s +MB/s r +MB/s w +queue us +device us +p50 us +p99 us")
        self.assertRegex(text, r"\n  b +75\.0% ")
        self.assertNotIn("p99", self.spillway("--config", self.path, "iostat").stdout.decode())
        a.stop(), b.stop()
        (idle,) = self.ask("iostat", "1", "1")
        self.assertEqual(idle["disks"][0]["groups"], [])
        self.assertEqual((idle["disks"][0]["in_flight"], idle["disks"][0]["waiting"]), (0, 0))

    def test_mistakes_are_named(self):
        for words in (("iostat", "often"), ("iostat", "0"), ("iostat", "1", "-3"), ("top", "1.5x")):
            p = self.spillway("--config", self.path, *words)
            self.assertEqual(p.returncode, 2, words)
            self.assertIn(words[-1].encode(), p.stderr, words)


class Calibrate(ProgramTest):
    def setUp(self):
        super().setUp()
        self.path = self.config(FILE)
        with open(self.folder / "d0.img", "wb") as f:
            f.write(bytes(range(256)) * ((64 << 20) // 256))
        self.disk("small.img", 1 << 20)
        self.model = self.folder / "f.toml.d" / "d0.model"

    def calibrate(self, *words):
        return self.spillway("disk", "calibrate", *words, "--config", self.path)

    def sum(self):
        return hashlib.sha256((self.folder / "d0.img").read_bytes()).hexdigest()

    def test_the_result_is_stored_and_used_and_contents_stay(self):
        before = self.sum()
        p = self.calibrate("d0", "--seconds", "2", "--writes")
        self.assertEqual(p.returncode, 0, p.stderr.decode())
        self.assertEqual(self.sum(), before)
        model = dict(line.split() for line in self.model.read_text().splitlines())
        for kind in ("read-random", "read-sequential", "write-random", "write-sequential"):
            self.assertGreater(float(model[f"{kind}.fixed_ns"]) + float(model[f"{kind}.byte_ns"]), 0)
        self.assertIn("stored in", p.stdout.decode())
        # A hand-made depth shows that the daemon reads it.
        self.model.write_text(self.model.read_text().replace(f"depth {model['depth']}", "depth 77"))
        self.daemon(self.path)
        p = self.spillway("--config", self.path, "--json", "iostat")
        self.assertEqual({d["name"]: d["knee"] for d in json.loads(p.stdout)["disks"]}["d0"], 77)
        # In use now.
        p = self.calibrate("d0", "--seconds", "1", "--writes")
        self.assertNotEqual(p.returncode, 0)
        self.assertIn(b"d0.img", p.stderr)

    def test_mistakes_are_named_and_store_nothing(self):
        for words, code, says in ((("nope",), 3, b"nope"), (("small", "--seconds", "1"), 2, b"16 MiB"),
                                  (("d0", "--seconds", "0"), 2, b"seconds")):
            p = self.calibrate(*words)
            self.assertEqual(p.returncode, code, (words, p.stderr))
            self.assertIn(says, p.stderr, words)
        self.assertFalse(self.model.exists())

    def test_a_model_that_is_not_understood_is_refused_by_name(self):
        self.model.parent.mkdir()
        self.model.write_text("depth 32\nread-random.colour 5\n")
        p = subprocess.run([BIN / "spillwayd", "--config", self.path], capture_output=True, text=True, timeout=60)
        self.assertNotEqual(p.returncode, 0)
        self.assertIn("d0.model", p.stderr)
        self.assertIn("read-random.colour", p.stderr)


if __name__ == "__main__":
    unittest.main()
