#!/usr/bin/env python3
"""A running daemon from outside: status, live changes, restart by the holder, end (issue 2; S9)."""
import json
import os
import signal
import time
import unittest

from programs import ProgramTest

CONFIG = """[cache]
size = "32M"
[disk.d0]
path = "d0.img"
[group.tenant-a]
weight = 200
memory.low = "1M"
[group."tenant-a/vm1"]
[export.vm1]
device = "virtio-blk"
volume = "d0"
group = "tenant-a/vm1"
queues = 2
socket = "vm1.sock"
"""


class Live(ProgramTest):
    def setUp(self):
        super().setUp()
        self.disk("d0.img")
        self.path = self.config(CONFIG)
        self.process = self.daemon(self.path)

    def ask(self, *words, code=0):
        p = self.spillway("--config", self.path, "--json", *words)
        self.assertEqual(p.returncode, code, p.stderr.decode())
        return json.loads(p.stdout) if code == 0 else p.stderr.decode()

    def test_status_has_what_reports_need(self):
        status = self.ask("status")
        self.assertEqual(status["schema"], 1)
        self.assertEqual(status["restarts"], 0)
        self.assertEqual(status["cache"]["capacity_bytes"], 32 << 20)
        for key in ("peak_bytes", "resident_bytes", "reclaimed_bytes", "hit_ratio", "dirty_bytes"):
            self.assertIn(key, status["cache"])
        self.assertEqual([e["name"] for e in status["exports"]], ["vm1"])
        self.assertTrue(any(s["name"].startswith("cache-frames") for s in status["reclaim"]["shrinkers"]))
        text = self.spillway("--config", self.path, "status").stdout.decode()
        self.assertIn("vhost-user-blk", text)
        self.assertIn(b"spillway_cache_capacity_bytes 33554432", self.spillway("--config", self.path, "metrics").stdout)

    def test_live_changes_hold_and_mistakes_change_nothing(self):
        self.ask("group", "set", "tenant-a", "weight=300", "memory.max=16M")
        group = next(g for g in self.ask("group", "list") if g["name"] == "tenant-a")
        self.assertEqual((group["weight"], group["memory.max"]), (300, 16 << 20))
        self.assertIn("weight", self.ask("group", "set", "tenant-a", "weight=0", code=2))
        self.assertIn("unknown key", self.ask("group", "set", "tenant-a", "wieght=5", code=2))
        self.assertIn("no group", self.ask("group", "set", "nobody", "weight=5", code=3))
        group = next(g for g in self.ask("group", "list") if g["name"] == "tenant-a")
        self.assertEqual(group["weight"], 300)
        self.assertEqual(self.ask("cache", "set", "size=8M")["capacity_bytes"], 8 << 20)
        self.assertEqual(self.ask("shrinker", "scan", "cache-frames-0", "nr=10")["freed_objects"], 0)
        self.assertIn("no shrinker", self.ask("shrinker", "scan", "nope", code=3))
        self.assertEqual([d["name"] for d in self.ask("iostat")["disks"]], ["d0"])
        self.assertEqual(self.ask("volume", "status", "d0")["name"], "d0")

    def test_a_disk_in_use_is_refused_to_others(self):
        p = self.spillway("volume", "write", "d0", "--config", self.path, stdin=b"x" * 512)
        self.assertNotEqual(p.returncode, 0)
        self.assertIn(b"d0.img", p.stderr)

    def test_the_holder_starts_a_killed_worker_again(self):
        self.ask("group", "set", "tenant-a", "weight=300")
        self.ask("group", "set", "tenant-a", "memory.max=16M")
        for n in (1, 2, 3):
            pid = self.ask("status")["pid"]
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 30
            while True:
                p = self.spillway("--config", self.path, "--json", "status")
                status = json.loads(p.stdout) if p.returncode == 0 else {"pid": pid}
                if status["pid"] != pid:
                    break
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)
            self.assertEqual(status["restarts"], n)
            group = next(g for g in self.ask("group", "list") if g["name"] == "tenant-a")
            self.assertEqual((group["weight"], group["memory.max"]), (300, 16 << 20))  # what was set live is kept

    def test_sigterm_ends_in_order(self):
        self.process.send_signal(signal.SIGTERM)
        self.assertEqual(self.process.wait(30), 0)
        self.assertFalse((self.folder / "vm1.sock").exists())
        self.assertEqual(self.spillway("--config", self.path, "status").returncode, 6)


if __name__ == "__main__":
    unittest.main()
