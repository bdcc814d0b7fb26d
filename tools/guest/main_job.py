"""The main job's guest (issue 2): a filesystem on its own disk, checked files, a shared read-only disk.

The host drives it step by step, so that it can cut memory or kill the worker at a known moment.
"""
import hashlib
import os
import subprocess
import threading
from pathlib import Path

from . import debs
from .disks import VhostUser
from .vm import Guest

HERE = Path(__file__).resolve().parent


def pattern_program():
    """pattern.c, compiled statically into the cache."""
    source = HERE / "pattern.c"
    name = "pattern-" + hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    final = debs.cache_dir() / name
    with debs.locked("pattern"):
        if not final.exists():
            new = final.with_suffix(f".tmp{os.getpid()}")
            subprocess.run(["gcc", "-O2", "-static", "-o", str(new), str(source)], check=True)
            os.replace(new, final)
    return final


def make_shared_image(path, mib, seed=7):
    """Fills a file with the pattern; returns its sha256."""
    subprocess.run([pattern_program(), "write", str(path), str(mib), str(seed)], check=True,
                   stdout=subprocess.DEVNULL)
    with open(path, "rb") as image:
        return hashlib.file_digest(image, "sha256").hexdigest()


class Worker:
    """One guest of the main job. own, shared: vhost-user sockets (or disks of disks.py). Steps return when
    the guest has done them; start_step() and finish_step() split that. report() may be called at any time."""

    def __init__(self, name, own, shared, shared_sha256, *, fs="ext4", files=4, mib=8, seed=1, queues=1,
                 memory=256, smp=1, **options):
        settings = f"FS={fs} FILES={files} MIB={mib} SEED={seed} SHARED={shared_sha256}\n"
        disks = [VhostUser(str(own), queues=queues) if isinstance(own, (str, Path)) else own]
        if shared:
            disks.append(VhostUser(str(shared)) if isinstance(shared, (str, Path)) else shared)
        self.name = name
        self.guest = Guest(name, disks, settings + (HERE / "workload.sh").read_text(),
                           files={"/bin/pattern": pattern_program()},
                           tools=["ext4" if fs == "ext4" else "xfs"], memory=memory, smp=smp, **options)
        self._mark = 0
        self._lock = threading.Lock()

    def start(self, timeout=120):
        self.guest.start(timeout)
        self.guest.wait_for("ready")
        return self

    def start_step(self, step):
        self._mark = self.guest.mark()
        self.guest.send(step)

    def finish_step(self, step, timeout=300):
        self.guest.wait_for("done " + step.split()[0], timeout, after=self._mark)

    def step(self, step, timeout=300):
        with self._lock:
            self.start_step(step)
            self.finish_step(step, timeout)

    def setup(self):
        self.step("setup")

    def round(self, number):
        self.step(f"round {number}")

    def shared(self, times=1):
        self.step(f"shared {times}")

    def unflushed(self, mib=8):
        """After this the disk has acknowledged `mib` MiB that nobody has flushed."""
        self.step(f"unflushed {mib}")

    def flush(self):
        """Flushes them and reads them back past the guest's cache."""
        self.step("flush")

    def trim(self):
        self.step("trim")

    def finish(self):
        """Unmounts, checks the filesystem, powers off."""
        self.step("finish")
        self.guest.wait_off()

    def stop(self):
        self.guest.stop()

    def report(self):
        def last(key, default=0):
            values = self.guest.values(key)
            return int(values[-1]) if values else default
        return {"name": self.name, "bytes_written": last("bytes_written"),
                "bytes_verified": last("bytes_verified"), "mismatches": last("mismatches"),
                "io_errors": last("io_errors"), "rounds": last("round"),
                "shared_reads": last("shared_reads"), "fsck_errors": last("fsck", None),
                "errors": self.guest.values("error")[:20]}
