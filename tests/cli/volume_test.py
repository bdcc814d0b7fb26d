#!/usr/bin/env python3
"""spillway volume create, assemble, status, fail, remove, add, replace, scrub, grow on real files, offline and through the
daemon (issue 5: V1, V2, V5)."""
import hashlib
import json
import os
import signal
import subprocess
import time
import unittest

from programs import BIN, ProgramTest

MIB = 1 << 20
R5 = """[volume.r5]
layer = "raid5"
members = ["d0", "d1", "d2"]
chunk = "64K"
"""


class VolumeTest(ProgramTest):
    def write_config(self, volumes, disks=6, exports=""):
        return self.config("".join(f'[disk.d{i}]\npath = "d{i}.img"\n' for i in range(disks)) + volumes + exports)

    def setUp(self):
        super().setUp()
        for i in range(6):
            self.disk(f"d{i}.img", (8 + (i == 5) * 8) * MIB)

    def run_(self, *words, code=0, stdin=None, yes=True):
        p = self.spillway(*words, "--config", self.path, *(["--yes"] if yes else []), stdin=stdin)
        self.assertEqual(p.returncode, code, (words, p.stdout[-500:], p.stderr.decode()))
        if code == 0 or p.stdout:
            return p.stdout.decode()
        errors = [line for line in p.stderr.decode().splitlines() if line.startswith("spillway: ")]
        self.assertEqual(len(errors), 1, p.stderr)  # one clear line (warnings have a time and a place)
        return errors[0]

    def status(self, name, code=0):
        p = self.spillway("--config", self.path, "--json", "volume", "status", name)
        self.assertEqual(p.returncode, code, p.stderr.decode())
        return json.loads(p.stdout)

    def states(self, name, code=0):
        return {m["name"]: m["state"] for m in self.status(name, code)["members"]}

    def idle(self, name, limit_s=60):
        deadline = time.monotonic() + limit_s
        while True:
            p = self.spillway("--config", self.path, "--json", "volume", "status", name)
            s = json.loads(p.stdout)
            if s["operation"] == "idle" and "rebuilding" not in str(s["members"]) and "replacing" not in str(s["members"]):
                return s
            self.assertLess(time.monotonic(), deadline, s)
            time.sleep(0.05)

    def contents(self, name):
        p = self.spillway("volume", "cat", name, "--config", self.path)
        self.assertEqual(p.returncode, 0, p.stderr)
        return hashlib.sha256(p.stdout).hexdigest()

    def image(self, *disks):
        return [hashlib.sha256((self.folder / f"{d}.img").read_bytes()).hexdigest() for d in disks]

    def filled(self, name, seed=b"x"):
        size = self.status(name)["size"]
        data = hashlib.shake_256(seed).digest(size)
        self.run_("volume", "write", name, stdin=data)
        return hashlib.sha256(data).hexdigest()

    # --- offline ---

    def test_create_asks_before_it_destroys_and_says_what_it_would_do(self):
        self.path = self.write_config(R5)
        with open(self.folder / "d1.img", "r+b") as f:
            f.write(b"somebody's data")
        before = self.image("d0", "d1", "d2")
        text = self.run_("volume", "create", "r5", "--dry-run")
        self.assertIn("d1: holds data, which is lost", text)
        self.assertIn("raid5 left-symmetric", text)
        p = self.spillway("volume", "create", "r5", "--config", self.path)  # no terminal, no --yes
        self.assertEqual(p.returncode, 1)
        self.assertEqual(self.image("d0", "d1", "d2"), before)
        self.assertIn("r5: created", self.run_("volume", "create", "r5"))
        text = self.run_("volume", "assemble", "r5")
        self.assertIn("[3/3] [UUU]", text)
        self.assertIn("md 1.2", text)
        sha = self.filled("r5")
        self.assertEqual(self.contents("r5"), sha)
        self.run_("volume", "check", "r5")

    def test_scrub_offline_finds_and_repairs(self):
        self.path = self.write_config(R5)
        self.run_("volume", "create", "r5")
        sha = self.filled("r5")
        with open(self.folder / "d2.img", "r+b") as f:  # a parity chunk: row 0 of left-symmetric
            f.seek(MIB + 4096)
            f.write(b"\xff" * 512)
        p = self.spillway("volume", "scrub", "r5", "--config", self.path)
        self.assertNotEqual(p.returncode, 0)
        self.assertIn(b"1 sectors differ", p.stderr)
        self.run_("volume", "scrub", "r5", "mode=repair")
        self.run_("volume", "scrub", "r5")
        self.assertEqual(self.contents("r5"), sha)

    def test_status_without_a_member_reads_and_changes_nothing(self):
        self.path = self.write_config(R5)
        self.run_("volume", "create", "r5")
        sha = self.filled("r5")
        os.rename(self.folder / "d1.img", self.folder / "gone.img")
        before = self.image("d0", "d2")
        text = self.run_("volume", "status", "r5", code=5)
        self.assertIn("[3/2] [U_U]", text)
        self.assertIn("next: open it writable and add a disk: spillway volume add r5 DISK", text)
        self.assertEqual(self.contents("r5"), sha)
        self.assertEqual(self.image("d0", "d2"), before)

    def test_dirty_and_degraded_needs_force(self):
        self.path = self.write_config(R5)
        out = subprocess.run([BIN / "md_writer", *(self.folder / f"d{i}.img" for i in range(3)), "--layer", "raid5",
                              "--chunk", "65536", "--consistency", "resync", "--kill"], check=True, capture_output=True, text=True)
        sha = out.stdout.split()[1]
        os.rename(self.folder / "d1.img", self.folder / "gone.img")
        before = self.image("d0", "d2")
        text = self.run_("volume", "write", "r5", code=5, stdin=b"x" * 4096)
        self.assertIn("dirty and degraded without a partial parity log", text)
        self.assertEqual(self.image("d0", "d2"), before)
        self.assertEqual(self.contents("r5"), sha)
        self.run_("volume", "write", "r5", "--force", "--offset", "4096", stdin=b"x" * 4096)
        text = self.run_("volume", "status", "r5", code=5)
        self.assertIn("[3/2] [U_U]", text)

    # --- through the daemon ---

    def test_life_of_a_raid5(self):
        self.path = self.write_config(R5, exports='[export.vm]\ndevice = "virtio-blk"\nvolume = "r5"\nsocket = "vm.sock"\n'
                                      '[export.other]\ndevice = "virtio-blk"\nvolume = "d4"\nsocket = "o.sock"\n')
        self.run_("volume", "create", "r5")
        sha = self.filled("r5")
        self.daemon_process = self.daemon(self.path)
        text = self.run_("volume", "status", "r5")
        for part in ("r5: clean raid5", "[3/3] [UUU]", "consistency bitmap", "next: nothing to do"):
            self.assertIn(part, text)
        # fail: asks; a dry run does nothing
        self.run_("volume", "fail", "r5", "member=d1", "--dry-run")
        self.assertEqual(self.states("r5"), {"d0": "active", "d1": "active", "d2": "active"})
        self.assertEqual(self.spillway("volume", "fail", "r5", "member=d1", "--config", self.path).returncode, 1)
        self.assertIn("no member nobody", self.run_("volume", "fail", "r5", "member=nobody", code=3))
        text = self.run_("volume", "fail", "r5", "member=d1")
        self.assertIn("[3/2] [U_U]", text)
        self.assertIn("no redundancy left: spillway volume add r5 DISK", text)
        self.assertIn("cannot do without member d0", self.spillway(
            "volume", "fail", "r5", "member=d0", "--yes", "--config", self.path).stderr.decode())
        # add: not what is in use, not what holds data without --yes
        self.assertIn("is a member already", self.run_("volume", "add", "r5", "member=d0", code=1))
        self.assertIn("is export other", self.run_("volume", "add", "r5", "member=d4", code=4))
        with open(self.folder / "d3.img", "r+b") as f:
            f.write(b"somebody's data")
        self.assertEqual(self.spillway("volume", "add", "r5", "member=d3", "--config", self.path).returncode, 1)
        self.assertTrue((self.folder / "d3.img").read_bytes().startswith(b"somebody's data"))
        self.assertIn("in use; fail it first", self.run_("volume", "remove", "r5", "member=d2", code=4))
        self.run_("volume", "remove", "r5", "member=d1")
        self.assertIn('put "d3" into members of [volume.r5]', self.run_("volume", "add", "r5", "member=d3"))
        self.idle("r5")
        self.assertEqual(self.states("r5"), {"d0": "active", "d3": "active", "d2": "active"})
        # scrub
        self.run_("volume", "scrub", "r5")
        self.assertEqual(self.idle("r5")["mismatch_sectors"], 0)
        # replace: the old one stays in use until the new one is full
        self.run_("volume", "replace", "r5", "member=d2", "with=d5")
        self.idle("r5")
        self.assertEqual(self.states("r5"), {"d0": "active", "d3": "active", "d5": "active", "d2": "faulty"})
        self.assertIn("take the faulty member out", self.status("r5")["advice"])
        self.run_("volume", "remove", "r5", "member=d2")
        self.assertEqual(self.status("r5")["advice"], "nothing to do")
        self.run_("volume", "scrub", "r5", "mode=repair")
        self.assertEqual(self.idle("r5")["mismatch_sectors"], 0)
        self.assertIn("cannot grow by a member", self.run_("volume", "grow", "r5", "member=d1", code=1))
        self.daemon_process.send_signal(signal.SIGTERM)
        self.assertEqual(self.daemon_process.wait(30), 0)
        # The old config is not enough, in one line; the new one is, in any order, and the removed ones are not believed.
        self.path = self.write_config(R5.replace('"d0", "d1", "d2"', '"d5", "d0", "d3"'))
        self.assertEqual(self.contents("r5"), sha)
        self.assertEqual(self.status("r5")["state"], "read-only")
        self.path = self.write_config(R5.replace('"d0", "d1", "d2"', '"d0", "d3", "d2"'))
        self.assertEqual(self.states("r5", code=5), {"d0": "active", "d3": "active", "-": "missing"})
        self.assertEqual(self.contents("r5"), sha)

    def test_hot_spare_and_a_kill_in_the_middle_of_the_rebuild(self):
        # Real time: the new member is slow, so the rebuild is under way when the worker is killed.
        for i in range(4):
            self.disk(f"d{i}.img", 40 * MIB)
        self.path = self.write_config(R5 + 'spares = ["d3"]\n', disks=4,
                                      exports='[export.vm]\ndevice = "virtio-blk"\nvolume = "r5"\nsocket = "vm.sock"\n')
        self.run_("volume", "create", "r5")
        sha = self.filled("r5")
        process = self.daemon(self.path)
        self.assertEqual(self.states("r5")["d3"], "spare")
        pid = json.loads(self.spillway("--config", self.path, "--json", "status").stdout)["pid"]
        self.run_("volume", "fail", "r5", "member=d1")
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            p = self.spillway("--config", self.path, "--json", "status")
            if p.returncode == 0 and json.loads(p.stdout)["pid"] != pid:
                break
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        self.idle("r5")
        self.assertEqual({k: v for k, v in self.states("r5").items() if k != "-"},
                         {"d0": "active", "d3": "active", "d2": "active"})
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(30), 0)
        self.assertEqual(self.contents("r5"), sha)

    def test_linear_grows_plain_and_md(self):
        for metadata in ("none", "md"):
            with self.subTest(metadata=metadata):
                for i in range(6):
                    self.disk(f"d{i}.img", (8 + (i == 5) * 8) * MIB)
                volume = f'[volume.lin]\nlayer = "linear"\nmembers = [MEMBERS]\nmetadata = "{metadata}"\n'
                self.path = self.write_config(volume.replace("MEMBERS", '"d0", "d1"'),
                                              exports='[export.vm]\ndevice = "virtio-blk"\nvolume = "lin"\nsocket = "vm.sock"\n')
                if metadata == "md":
                    self.run_("volume", "create", "lin")
                self.filled("lin")
                size = self.status("lin")["size"]
                process = self.daemon(self.path)
                self.assertIn("is a member already", self.run_("volume", "grow", "lin", "member=d1", code=1))
                text = self.run_("volume", "grow", "lin", "member=d5")
                self.assertIn('put "d5" into members of [volume.lin]', text)
                grown = self.status("lin")["size"]
                self.assertEqual(grown - size, (16 if metadata == "none" else 15) * MIB)
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(30), 0)
                if metadata == "md":
                    self.assertIn("2 members but the superblocks say 3", self.run_("volume", "status", "lin", code=2))
                self.path = self.write_config(volume.replace("MEMBERS", '"d0", "d1", "d5"'))
                self.assertEqual(self.status("lin")["size"], grown)


if __name__ == "__main__":
    unittest.main(verbosity=2)
