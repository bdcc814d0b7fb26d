"""spillwayd and spillway from outside, for the tests of this folder."""
import os
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SPILLWAY_BIN", TREE / "build/release/bin"))


class ProgramTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="spillway-cli-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def disk(self, name, size=64 << 20):
        with open(self.folder / name, "wb") as f:
            f.truncate(size)

    def config(self, text, name="f.toml"):
        path = self.folder / name
        path.write_text(text)
        return path

    def spillway(self, *words, stdin=None):
        return subprocess.run([BIN / "spillway", *map(str, words)], input=stdin, capture_output=True, timeout=120)

    def check(self, text):
        """spillwayd --check on a config: (exit code, stderr)."""
        p = subprocess.run([BIN / "spillwayd", "--config", self.config(text), "--check"], capture_output=True,
                           text=True, timeout=60)
        return p.returncode, p.stderr

    def daemon(self, config):
        """A running spillwayd; ends with the test."""
        p = subprocess.Popen([BIN / "spillwayd", "--config", config, "--log-level", "warn"],
                             stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

        def end():
            if p.poll() is None:
                p.send_signal(signal.SIGTERM)
                try:
                    p.wait(30)
                except subprocess.TimeoutExpired:
                    p.kill()
                    p.wait()
            p.stderr.close()

        self.addCleanup(end)
        deadline = time.monotonic() + 30
        while self.spillway("--config", config, "status").returncode != 0:
            self.assertIsNone(p.poll(), "spillwayd ended")
            self.assertLess(time.monotonic(), deadline, "spillwayd does not answer")
            time.sleep(0.05)
        return p
