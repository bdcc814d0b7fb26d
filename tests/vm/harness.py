"""What the tests in this folder share: a running spillwayd, other servers, and guests.

SPILLWAY_BIN names the folder of the programs (default build/release/bin, else build/dev/bin). Only
processes started here are ended, by pid. A test folder lives under the system's temporary one.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(TREE / "tools"))

SKIPPED = 77  # CTest: SKIP_RETURN_CODE


def programs():
    """The folder with spillwayd and spillway; raises when nothing is built."""
    named = os.environ.get("SPILLWAY_BIN")
    for folder in [named] if named else [TREE / "build/release/bin", TREE / "build/dev/bin"]:
        if (Path(folder) / "spillwayd").exists():
            return Path(folder)
    raise FileNotFoundError(f"no spillwayd in {named or 'build/release/bin'} (SPILLWAY_BIN)")


def until(condition, what, timeout=20.0, step=0.02):
    """Waits for condition() to be true and returns its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout} s")
        time.sleep(step)


class Server:
    """A program that listens on unix sockets; its output goes to a log in `folder`."""

    def __init__(self, folder, command, sockets, env=None):
        self.folder, self.command = Path(folder), [str(c) for c in command]
        self.sockets = [Path(s) for s in sockets]
        self.log = self.folder / (Path(self.command[0]).name + ".log")
        self.env = {**os.environ, **(env or {})}
        self.process = None

    def start(self, timeout=20):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, env=self.env, stdout=log,
                                            stderr=log, stdin=subprocess.DEVNULL)

        def ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.command[0]} ended ({self.process.returncode}):\n{self.tail()}")
            return all(s.exists() for s in self.sockets)

        until(ready, f"sockets of {self.command[0]}", timeout)
        return self

    @property
    def pid(self):
        return self.process.pid

    def tail(self, lines=30):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, timeout=20):
        """SIGTERM; returns the exit status. Kills it (and says so) if it will not go."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise RuntimeError(f"{self.command[0]} did not end on SIGTERM:\n{self.tail()}") from None
        return self.process.returncode


class Daemon(Server):
    """spillwayd on a config. config: TOML text; sockets: those that must exist before start() returns."""

    def __init__(self, folder, config, sockets, env=None, control="spillwayd.sock"):
        folder = Path(folder)
        self.config = folder / "spillway.toml"
        self.config.write_text(config)
        self.control = folder / control
        super().__init__(folder, [programs() / "spillwayd", "--config", self.config],
                         [*(folder / s for s in sockets), self.control], env)

    def cli(self, *words, check=True, timeout=60):
        """`spillway --socket SOCKET words...`: its standard output."""
        p = subprocess.run([programs() / "spillway", "--socket", self.control, *map(str, words)],
                           capture_output=True, text=True, timeout=timeout)
        if check and p.returncode:
            raise RuntimeError(f"spillway {' '.join(map(str, words))}: {p.returncode} {p.stderr.strip()}")
        return p.stdout

    def status(self):
        """`spillway status --json`, parsed."""
        return json.loads(self.cli("status", "--json"))

    def worker_pid(self):
        """The worker: the holder's only child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def kill_worker(self, timeout=20):
        """kill -9 of the worker; returns when the holder has a new one."""
        old = until(self.worker_pid, "worker", timeout)
        os.kill(old, signal.SIGKILL)
        return until(lambda: (lambda p: p if p and p != old else None)(self.worker_pid()),
                     "new worker", timeout)


def qemu_storage_daemon(folder, exports):
    """Debian's own vhost-user server, to tell a fault of ours from one of the guest's side.
    exports: {socket name: (image path, writable)}."""
    words = []
    for i, (sock, (path, writable)) in enumerate(exports.items()):
        mode = "off" if writable else "on"
        words += ["--blockdev", f"file,node-name=n{i},filename={path},read-only={mode}",
                  "--export", f"vhost-user-blk,id=e{i},node-name=n{i},addr.type=unix,addr.path={sock},"
                              f"writable={'on' if writable else 'off'},num-queues=2"]
    return Server(folder, ["qemu-storage-daemon", *words], [Path(folder) / s for s in exports])


def sparse(path, mib):
    """A sparse file of that size; returns the path."""
    with open(path, "wb") as f:
        f.truncate(mib << 20)
    return path


class VmTest(unittest.TestCase):
    """A test with a folder of its own; what is given to started() is ended after the test, last first."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="spillway-vm-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def started(self, thing, **options):
        """thing.start(**options), and thing.stop() at the end whatever happens."""
        self.addCleanup(thing.stop)
        thing.start(**options)
        return thing


def main():
    """Runs the tests of the calling file; a skipped-only run exits with what CTest takes for skipped."""
    outcome = unittest.main(module="__main__", exit=False, verbosity=2).result
    if not outcome.wasSuccessful():
        sys.exit(1)
    sys.exit(SKIPPED if outcome.testsRun == len(outcome.skipped) else 0)
