"""The main job, end to end: a host, two guests, memory pressure twice, the worker killed once (issue 2).

    d0 d1 -> stripe s0 \\
                        linear pool -> slices vm1 (ext4), vm2 (xfs)       shared: read-only for both guests
    d2 d3 -> stripe s1 /

Each guest runs in a thread; the main thread watches, cuts the cache's limit to a quarter, writes to the FIFO that
systemd's memory-pressure protocol names, and kills the worker between vm1's write and its flush. Every claim is
one of `checks`; the run is good when all hold.
"""
import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

from .daemon import Daemon, sparse, until
from .main_job import Worker, make_shared_image
from .vm import GuestError, best_accel

MIB = 1 << 20
CONFIG = """# Made by ./run. Two stripes of two disks, in a row; each guest has a slice of them.
[cache]
size = "{cache}M"

[group.tenant-a]
weight = 200

[group."tenant-a/vm1"]
[group."tenant-a/vm2"]

[disk.d0]
path = "d0.img"
[disk.d1]
path = "d1.img"
[disk.d2]
path = "d2.img"
[disk.d3]
path = "d3.img"
[disk.library]
path = "shared.img"
readonly = true

[volume.s0]
layer = "stripe"
members = ["d0", "d1"]
chunk = "64K"
[volume.s1]
layer = "stripe"
members = ["d2", "d3"]
chunk = "64K"
[volume.pool]
layer = "linear"
members = ["s0", "s1"]
[volume.vm1]
layer = "slice"
members = ["pool"]
offset = "0"
length = "{first}M"
[volume.vm2]
layer = "slice"
members = ["pool"]
offset = "{first}M"
length = "{second}M"

[export.vm1]
device = "virtio-blk"
volume = "vm1"
group = "tenant-a/vm1"
queues = 2
socket = "vm1.sock"
[export.vm2]
device = "virtio-blk"
volume = "vm2"
group = "tenant-a/vm2"
socket = "vm2.sock"
[export.library-vm1]
device = "virtio-blk"
volume = "library"
group = "tenant-a/vm1"
readonly = true
socket = "library-vm1.sock"
[export.library-vm2]
device = "virtio-blk"
volume = "library"
group = "tenant-a/vm2"
readonly = true
socket = "library-vm2.sock"
"""


class Scenario:
    """One run in `folder`. Sizes in MiB. run() returns the report; `show(text)` gets each event as a line."""

    def __init__(self, folder, rounds=4, cache=128, disk=192, shared=64, files=4, file_mib=8, show=print):
        self.folder, self.rounds, self.show = Path(folder).absolute(), max(rounds, 4), show
        self.cache, self.disk, self.shared = cache * MIB, disk, shared
        self.files, self.file_mib = files, file_mib
        self.daemon = None
        self.workers = []
        self.doing = {}          # guest -> what it is at
        self.phase = "starting"
        self.checks = []
        self.pressure = []       # what each pressure event did
        self.status = {}         # the newest status of the daemon
        self.past = []           # the last status of each worker that is gone
        self._gates = {}         # name -> Event: guests wait there for the main thread, or the other way round
        self._polling = threading.Lock()
        self._failed = threading.Event()
        self._failures = []

    # -- the whole -------------------------------------------------------------------------------

    def run(self):
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        threads = []
        try:
            self._start()
            threads = [threading.Thread(target=self._guest, args=(w,), name=w.name) for w in self.workers]
            for t in threads:
                t.start()
            self._conduct()
            for t in threads:
                t.join(600)
        except (GuestError, RuntimeError, TimeoutError, OSError) as error:
            self._fail("host", error)
        finally:
            self._failed.set()
            for gate in list(self._gates.values()):
                gate.set()
            final = self._end(threads)
        return self._report(final, time.monotonic() - started)

    def _start(self):
        first = self.disk * 2 - 32           # the border of vm1 and vm2 lies inside the first stripe
        config = CONFIG.format(cache=self.cache // MIB, first=first, second=4 * self.disk - first)
        for i in range(4):
            sparse(self.folder / f"d{i}.img", self.disk)
        sha = make_shared_image(self.folder / "shared.img", self.shared)
        self.fifo = self.folder / "memory-pressure"
        self.fifo.unlink(missing_ok=True)
        os.mkfifo(self.fifo)
        exports = ["vm1", "vm2", "library-vm1", "library-vm2"]
        for name in [*exports, "spillwayd"]:
            (self.folder / f"{name}.sock").unlink(missing_ok=True)
        self.daemon = Daemon(self.folder, config, [f"{e}.sock" for e in exports],
                             env={"MEMORY_PRESSURE_WATCH": str(self.fifo)})
        self.daemon.start()
        self.show(f"spillwayd serves {len(exports)} disks out of a {self.cache // MIB} MiB cache "
                  f"(guests under {best_accel()})")
        for i, (name, fs) in enumerate((("vm1", "ext4"), ("vm2", "xfs")), 1):
            self.workers.append(Worker(
                name, self.folder / f"{name}.sock", self.folder / f"library-{name}.sock", sha, fs=fs, seed=i,
                files=self.files, mib=self.file_mib, queues=2 if i == 1 else 1, folder=self.folder / name))

    def _conduct(self):
        """The main thread's part, in step with the guests."""
        self.phase = "guests fill the cache"
        self._await_gate("warm-vm1", "warm-vm2")
        self._open("go-2")
        # 1: the limit cut to a quarter while both guests work.
        self.phase = "limit cut to a quarter"
        self._squeeze("limit cut to a quarter",
                      lambda: self.daemon.call("cache set", size=self.cache // 4), self.cache // 4)
        self._await_gate("tight-vm1", "tight-vm2")
        self.daemon.call("cache set", size=self.cache)
        self.phase = "limit restored"
        self._open("go-3")
        self._await_gate("full-vm1", "full-vm2")
        # 2: systemd's protocol: whoever watches the FIFO gives memory back.
        self._open("go-4")
        self.phase = "memory pressure event"
        self._squeeze("event on systemd's FIFO", self._write_fifo, None)
        # 3: kill -9 between vm1's write and its flush.
        self._await_gate("written-vm1")
        self.phase = "worker killed"
        before = self.daemon.worker_pid()
        dirty = self.poll()["cache"]["dirty_bytes"]
        after = self.daemon.kill_worker()
        self.show(f"worker {before} killed with {dirty // MIB} MiB dirty, not flushed; the holder started {after}")
        self._open("flush")
        self._check("worker came back", after and after != before, f"pid {before} -> {after}")
        self._check("written and not flushed when it was killed", dirty > 0, f"{dirty / MIB:.1f} MiB dirty")
        self._await_gate("flushed-vm1")
        self.phase = "finishing"

    def _guest(self, worker):
        """One guest's part."""
        n = worker.name
        try:
            self._at(n, "booting")
            worker.start()
            self._at(n, "mkfs")
            worker.setup()
            self._work(worker, 1)
            self._work(worker, 2, gate=f"warm-{n}", reads=1)
            self._await_gate("go-2")
            self._work(worker, 3, gate=f"tight-{n}")
            self._await_gate("go-3")
            self._work(worker, 4, gate=f"full-{n}")
            self._await_gate("go-4")
            for k in range(5, self.rounds + 1):
                self._work(worker, k)
            if n == "vm1":
                self._at(n, "writes, unflushed")
                worker.unflushed(8)
                self._open(f"written-{n}")
                self._await_gate("flush")
                self._at(n, "flush")
                worker.flush()
                self._open(f"flushed-{n}")
            else:
                self._work(worker, self.rounds + 1, reads=0)
            self._at(n, "fsck")
            worker.finish()
            self._at(n, "done")
        except (GuestError, OSError, TimeoutError) as error:
            self._fail(n, error)

    def _work(self, worker, number, gate=None, reads=2):
        self._at(worker.name, f"round {number}: files")
        worker.round(number)
        for _ in range(reads):
            self._at(worker.name, f"round {number}: shared disk")
            worker.shared()
        if gate:
            self._open(gate)

    # -- pressure --------------------------------------------------------------------------------

    def _write_fifo(self):
        # systemd opens nothing and writes a byte; the watcher must be there already.
        fd = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, b"\0")
        os.close(fd)

    def _squeeze(self, what, act, target):
        """Presses, then waits until the kernel says that the memory is back: memfd blocks and RSS."""
        before = self._memory()
        act()
        lowest = dict(before)

        def fell():
            now = self._memory()
            for key in ("memfd", "rss"):
                lowest[key] = min(lowest[key], now[key])
            lowest["reclaimed"] = now["reclaimed"]
            slack = 4 * MIB
            small = now["memfd"] <= target + slack if target else now["memfd"] <= before["memfd"] - MIB
            return small and now["reclaimed"] > before["reclaimed"] and now["rss"] < before["rss"]

        held = True
        try:
            until(fell, what, timeout=30, step=0.05)
        except TimeoutError:
            held = False
        text = (f"memfd {before['memfd'] / MIB:.0f} -> {lowest['memfd'] / MIB:.0f} MiB, RSS "
                f"{before['rss'] / MIB:.0f} -> {lowest['rss'] / MIB:.0f} MiB, reclaimed "
                f"{(lowest['reclaimed'] - before['reclaimed']) / MIB:.0f} MiB")
        self.pressure.append({"what": what, "memfd_before": before["memfd"], "memfd_after": lowest["memfd"],
                              "rss_before": before["rss"], "rss_after": lowest["rss"],
                              "reclaimed_bytes": lowest["reclaimed"] - before["reclaimed"]})
        self.show(f"{what}: {text}")
        self._check(f"{what}: memory went back", held, text)

    def _memory(self):
        status = self.poll()
        return {"memfd": self.daemon.memfd_bytes(), "rss": self.daemon.rss_bytes(),
                "reclaimed": status["cache"]["reclaimed_bytes"]}

    def poll(self):
        """The daemon's newest status; the last one while the worker restarts."""
        with contextlib.suppress(OSError, ValueError):
            status = self.daemon.status()
            with self._polling:  # the live picture asks too
                if self.status and self.status["pid"] != status["pid"]:
                    self.past.append(self.status)
                self.status = status
        return self.status

    def _total(self, status, section, key):
        """A counter over all workers of the run: each starts at 0."""
        return sum(s.get(section, {}).get(key, 0) for s in [*self.past, status])

    def _shrinkers(self, status):
        """The last worker's shrinkers, with what their namesakes in earlier workers did added."""
        rows = [dict(x) for x in status.get("reclaim", {}).get("shrinkers", [])]
        for past in self.past:
            for x in past["reclaim"]["shrinkers"]:
                for row in rows:
                    if row["name"] == x["name"]:
                        for key in ("count_calls", "scan_calls", "scanned", "freed_objects", "freed_bytes", "time_ms"):
                            row[key] += x[key]
        return rows

    # -- order and outcome -----------------------------------------------------------------------

    def _gate(self, name):
        return self._gates.setdefault(name, threading.Event())

    def _open(self, name):
        self._gate(name).set()

    def _await_gate(self, *names):
        for name in names:
            deadline = time.monotonic() + 300
            while not self._gate(name).wait(0.2):
                if self._failed.is_set() or time.monotonic() > deadline:
                    raise TimeoutError(f"waited in vain for '{name}'")
        if self._failed.is_set():
            raise TimeoutError("the run was broken off")

    def _at(self, name, what):
        self.doing[name] = what

    def _check(self, name, ok, detail=""):
        self.checks.append({"name": name, "ok": bool(ok), "detail": detail})

    def _fail(self, who, error):
        if not self._failed.is_set():
            self._failures.append(f"{who}: {error}")
            self.show(f"{who}: {str(error).splitlines()[0]}")
        self._failed.set()

    def _end(self, threads):
        final = self.poll() if self.daemon and self.daemon.process else {}
        for worker in self.workers:
            worker.stop()
        for t in threads:
            t.join(30)
        if self.daemon:
            try:
                code = self.daemon.stop()
                self._check("spillwayd ended cleanly", code == 0, f"exit {code}")
            except RuntimeError as error:
                self._check("spillwayd ended cleanly", False, str(error).splitlines()[0])
        return final

    def _report(self, status, seconds):
        guests = [w.report() for w in self.workers]
        for g in guests:
            name = g["name"]
            self._check(f"{name}: what it wrote is what it read", g["bytes_written"] > 0
                        and g["bytes_verified"] > g["bytes_written"] and g["mismatches"] == 0,
                        f"{g['bytes_written'] // MIB} MiB written, {g['bytes_verified'] // MIB} MiB verified, "
                        f"{g['mismatches']} mismatches")
            self._check(f"{name}: no I/O error", g["io_errors"] == 0, f"{g['io_errors']} errors")
            self._check(f"{name}: finished, filesystem clean", g["fsck_errors"] == 0)
        cache = status.get("cache", {})
        hits, misses = self._total(status, "cache", "hits"), self._total(status, "cache", "misses")
        hit_ratio = hits / (hits + misses) if hits + misses else 0.0
        peak = max([cache.get("peak_bytes", 0), *(p["memfd_before"] for p in self.pressure)])
        after = min([p["memfd_after"] for p in self.pressure], default=0)
        restarts = status.get("restarts", 0)
        self._check("one restart", restarts == 1, f"{restarts}")
        self._check("the cache was worth having", hit_ratio > 0.2, f"hit ratio {hit_ratio:.2f}")
        if self._failures:
            self._check("the run went through", False, self._failures[0])
        return {
            "ok": all(c["ok"] for c in self.checks), "seconds": round(seconds, 1), "accel": best_accel(),
            "guests": guests,
            "cache": {"limit_bytes": self.cache, "peak_bytes": peak, "after_bytes": after,
                      "reclaimed_bytes": sum(p["reclaimed_bytes"] for p in self.pressure),
                      "hit_ratio": hit_ratio, "hits": hits, "misses": misses,
                      "adopted_pages": cache.get("adopted_pages", 0)},
            "reclaim": {"passes": self._total(status, "reclaim", "passes"),
                        "duration_ms": self._total(status, "reclaim", "duration_ms"),
                        "shrinkers": self._shrinkers(status)},
            "pressure": self.pressure, "restarts": restarts, "checks": self.checks,
            "failures": self._failures}

    def clean(self):
        shutil.rmtree(self.folder, ignore_errors=True)
