"""spillwayd, and servers like it, as child processes of a run or a test."""
import json
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]


def programs():
    """The folder with spillwayd and spillway: SPILLWAY_BIN, else build/release/bin, else build/dev/bin."""
    named = os.environ.get("SPILLWAY_BIN")
    for folder in [named] if named else [TREE / "build/release/bin", TREE / "build/dev/bin"]:
        if (Path(folder) / "spillwayd").exists():
            return Path(folder)
    raise FileNotFoundError(f"no spillwayd in {named or 'build/release/bin'} (SPILLWAY_BIN names the folder)")


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

    def stop(self, timeout=30):
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

    def call(self, command, timeout=60, **arguments):
        """A command over the control socket; its result. While the worker restarts it simply waits."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(timeout)
            s.connect(str(self.control))
            s.sendall(json.dumps({"command": command, "args": arguments}).encode() + b"\n")
            with s.makefile() as answers:
                line = answers.readline()
        if not line:
            raise ConnectionError(f"{command}: the daemon closed the control connection")
        answer = json.loads(line)
        if not answer["ok"]:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["result"]

    def status(self):
        return self.call("status")

    def worker_pid(self):
        """The worker: the holder's only child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def kill_worker(self, timeout=20):
        """kill -9 of the worker; returns when the holder has started a new one."""
        old = until(self.worker_pid, "worker", timeout)
        os.kill(old, signal.SIGKILL)
        return until(lambda: (lambda p: p if p and p != old else None)(self.worker_pid()),
                     "new worker", timeout)

    def memfd_bytes(self):
        """What the kernel says the cache's frames hold: blocks of the memfds with frames that the holder keeps
        (guests' memory and in-flight logs are memfds as well, but not the cache's)."""
        held = {}
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                if "memfd:spillway-cache-frames" in os.readlink(fd):
                    st = fd.stat()
                    if stat.S_ISREG(st.st_mode):
                        held[st.st_ino] = st.st_blocks * 512
            except FileNotFoundError:
                pass
        return sum(held.values())

    def rss_bytes(self):
        """Resident memory of the worker."""
        pid = self.worker_pid()
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (FileNotFoundError, ProcessLookupError):
            return 0


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
