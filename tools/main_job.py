#!/usr/bin/env python3
"""The main job, live: two stock guests on one Spillway host (./run).

A linear volume over two stripes of two disks each, a slice of it for each guest, one read-only disk that both share.
The guests write, sync and check files while the host cuts the cache to a quarter, then signals memory pressure through
a FIFO (systemd's memory-pressure protocol), then kills the worker between a guest's write and its flush.

--smoke: finite and without a terminal; exit 0 only if every check held. --report FILE: JSON.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
sys.dont_write_bytecode = True
sys.path.insert(0, str(TREE / "tools"))
from guest.main_job import Worker, make_shared_image  # noqa: E402

MIB = 1 << 20
DISK_MIB, OWN_MIB, SHARED_MIB, CACHE_MIB = 512, 768, 64, 192

CONFIG = """# Written by tools/main_job.py: a linear volume over two stripes of two disks each.
[cache]
size = "{cache}M"

[disk.d0]
path = "d0.img"
[disk.d1]
path = "d1.img"
[disk.d2]
path = "d2.img"
[disk.d3]
path = "d3.img"

[volume.left]
layer = "stripe"
members = ["d0", "d1"]
chunk = "64K"
[volume.right]
layer = "stripe"
members = ["d2", "d3"]
chunk = "64K"
[volume.pool]
layer = "linear"
members = ["left", "right"]

[volume.vm1]
layer = "slice"
members = ["pool"]
offset = 0
length = "{own}M"
[volume.vm2]
layer = "slice"
members = ["pool"]
offset = "{own}M"
length = "{own}M"
[volume.base]
layer = "slice"
members = ["pool"]
offset = "{base}M"
length = "{shared}M"

[group.tenant-a]
weight = 200
[group.tenant-b]
weight = 100

[export.vm1]
device = "virtio-blk"
volume = "vm1"
group = "tenant-a"
queues = 2
socket = "vm1.sock"
[export.vm2]
device = "virtio-blk"
volume = "vm2"
group = "tenant-b"
queues = 2
socket = "vm2.sock"
[export.base1]
device = "virtio-blk"
volume = "base"
group = "tenant-a"
readonly = true
socket = "base1.sock"
[export.base2]
device = "virtio-blk"
volume = "base"
group = "tenant-b"
readonly = true
socket = "base2.sock"
"""


def size(n):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024


class Host:
    """spillwayd with a pressure FIFO; adds up counters over restarts of the worker."""

    def __init__(self, folder, programs, cache_mib):
        self.folder, self.programs = folder, programs
        self.fifo = folder / "pressure.fifo"
        self.config = folder / "spillway.toml"
        self.config.write_text(CONFIG.format(cache=cache_mib, own=OWN_MIB, base=2 * OWN_MIB, shared=SHARED_MIB))
        self.log = folder / "spillwayd.log"
        self.process = None
        self.past = []       # last status of each worker that has died
        self.latest = None
        self.peak = 0
        self._lock = threading.Lock()

    def cli(self, *words, stdin=None):
        p = subprocess.run([self.programs / "spillway", "--config", self.config, *words], stdin=stdin,
                           capture_output=True, timeout=120)
        if p.returncode:
            raise RuntimeError(f"spillway {' '.join(words)}: exit {p.returncode}: {p.stderr.decode().strip()}")
        return p.stdout

    def start(self):
        os.mkfifo(self.fifo)
        env = {**os.environ, "MEMORY_PRESSURE_WATCH": str(self.fifo)}
        env.pop("MEMORY_PRESSURE_WRITE", None)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([self.programs / "spillwayd", "--config", self.config], env=env,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"spillwayd ended ({self.process.returncode}): {self.log.read_text()[-2000:]}")
            try:
                return self.status()
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def status(self):
        s = json.loads(self.cli("status", "--json"))
        with self._lock:
            if self.latest and self.latest["pid"] != s["pid"]:
                self.past.append(self.latest)
            self.latest = s
            self.peak = max(self.peak, s["cache"]["peak_bytes"])
        return s

    def total(self, *path):
        """A counter over all workers so far (exact but for what a killed one did after its last status)."""
        total = 0
        for s in [*self.past, self.latest]:
            for key in path:
                s = s[key]
            total += s
        return total

    def worker_rss(self, pid):
        """(RSS, shared part of it: the frames) of the worker, in bytes."""
        fields = dict(l.split(":", 1) for l in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["RssShmem"].split()[0]) * 1024

    def pressure(self):
        """One event, as systemd's protocol has it for a FIFO: a byte that can be read."""
        fd = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, b"!")
        os.close(fd)

    def kill_worker(self):
        old = self.status()["pid"]
        os.kill(old, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            try:
                s = self.status()
                if s["pid"] != old:
                    return s
            except RuntimeError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError("no new worker within 30 s")
            time.sleep(0.05)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode if self.process else 0


class Screen:
    """What a terminal shows while it runs; plain lines where there is none."""

    def __init__(self, host, workers, live):
        self.host, self.workers, self.live = host, workers, live
        self.events = []
        self.started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self):
        if self.live:
            self._thread.start()

    def stop(self):
        self._stop.set()
        if self.live:
            self._thread.join()
            self.draw()

    def event(self, text):
        line = f"{time.monotonic() - self.started:6.1f} s  {text}"
        self.events.append(line)
        if not self.live:
            print(line, flush=True)

    def _loop(self):
        while not self._stop.wait(0.5):
            try:
                self.host.status()
            except RuntimeError:
                continue  # the worker is being replaced
            self.draw()

    def draw(self):
        s = self.host.latest
        if s is None:
            return
        c = s["cache"]
        width = 40
        full = min(width, int(width * c["resident_bytes"] / max(1, CACHE_MIB * MIB)))
        limit = min(width - 1, int(width * c["capacity_bytes"] / (CACHE_MIB * MIB)))
        bar = "".join("#" if i < full else "|" if i == limit else "." for i in range(width))
        lines = ["Spillway: two guests on one host cache", "",
                 f"cache    [{bar}] {size(c['resident_bytes'])} of {size(c['capacity_bytes'])},"
                 f" {size(c['dirty_bytes'])} dirty",
                 f"hits     {100 * c['hit_ratio']:.1f} %   reclaimed {size(self.host.total('cache', 'reclaimed_bytes'))}"
                 f"   restarts {s['restarts']}",
                 "pressure " + "; ".join(f"{p['kind']}: {p['events']} events" for p in s["pressure"] if p["active"]),
                 ""]
        for w in self.workers:
            r = w.report()
            lines.append(f"{w.name:8} round {r['rounds']}   written {size(r['bytes_written'])}   verified "
                         f"{size(r['bytes_verified'])}   mismatches {r['mismatches']}   I/O errors {r['io_errors']}")
        lines.append("")
        for k in s["reclaim"]["shrinkers"]:
            lines.append(f"shrinker {k['name']:16} holds {size(k['bytes']):>10}   freed {size(k['freed_bytes']):>10}"
                         f"   {k['scan_calls']} scans")
        lines += ["", *self.events[-8:]]
        print("\033[H\033[2J" + "\n".join(lines), flush=True)


class Checks:
    def __init__(self, screen):
        self.screen, self.rows = screen, []

    def add(self, what, ok, detail=""):
        self.rows.append({"check": what, "ok": bool(ok), "detail": detail})
        self.screen.event(f"{'ok  ' if ok else 'FAIL'} {what}{': ' + detail if detail else ''}")

    @property
    def ok(self):
        return all(r["ok"] for r in self.rows)


def in_parallel(*jobs):
    errors = []

    def run(job):
        try:
            job()
        except Exception as e:  # reported by the caller, with the others
            errors.append(e)

    threads = [threading.Thread(target=run, args=(j,)) for j in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def wait_until(condition, timeout=20):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def pressure_phase(host, checks):
    """While the guests work: the limit is cut to a quarter, then a pressure event comes through the FIFO."""
    def resident(s):
        return s["cache"]["resident_bytes"]

    quarter = CACHE_MIB * MIB // 4
    # Worth taking only when the cache is fuller than what will be left.
    wait_until(lambda: resident(host.status()) > 2 * quarter, 60)
    before = host.status()
    rss_before, frames_before = host.worker_rss(before["pid"])
    host.cli("cache", "set", f"size={quarter}")
    wait_until(lambda: host.status()["cache"]["backed_bytes"] <= quarter + 4 * MIB, 30)
    after = host.status()
    rss_after, frames_after = host.worker_rss(after["pid"])
    checks.add("limit cut to a quarter: the memfd's blocks fell below it",
               after["cache"]["backed_bytes"] <= quarter + 4 * MIB < before["cache"]["backed_bytes"],
               f"{size(before['cache']['backed_bytes'])} -> {size(after['cache']['backed_bytes'])}")
    checks.add("limit cut to a quarter: the worker's RSS fell", rss_after < rss_before,
               f"{size(rss_before)} -> {size(rss_after)} (frames mapped {size(frames_before)} -> {size(frames_after)})")

    def freed(s):
        return sum(k["freed_bytes"] for k in s["reclaim"]["shrinkers"])

    def events(s):
        return sum(p["events"] for p in s["pressure"] if p["active"])

    wait_until(lambda: resident(host.status()) > 8 * MIB, 30)
    before = host.status()
    host.pressure()
    wait_until(lambda: freed(host.status()) > freed(before), 20)
    after = host.status()
    checks.add("memory-pressure event through the FIFO: seen", events(after) > events(before),
               f"{events(after) - events(before)} events")
    checks.add("memory-pressure event through the FIFO: shrinkers freed memory", freed(after) > freed(before),
               f"{size(freed(after) - freed(before))} freed by scans")


def main_job(args, folder, programs):
    for i in range(4):
        with open(folder / f"d{i}.img", "wb") as f:
            f.truncate(DISK_MIB * MIB)
    shared = folder / "shared.raw"
    sha = make_shared_image(shared, SHARED_MIB)
    host = Host(folder, programs, CACHE_MIB)
    with open(shared, "rb") as image:
        host.cli("volume", "write", "base", stdin=image)
    shared.unlink()
    workers = [Worker("vm1", folder / "vm1.sock", folder / "base1.sock", sha, fs="ext4", files=3, mib=8, seed=1,
                      queues=2),
               Worker("vm2", folder / "vm2.sock", folder / "base2.sock", sha, fs="xfs", files=3, mib=8, seed=2,
                      queues=2, memory=320)]
    screen = Screen(host, workers, not args.smoke and sys.stdout.isatty())
    checks = Checks(screen)
    a, b = workers
    exit_code = None
    report = {"schema": 1}
    try:
        host.start()
        screen.event("spillwayd serves a linear volume over two stripes of two disks")
        screen.start()
        in_parallel(a.start, b.start)
        screen.event("both guests have booted")
        in_parallel(a.setup, b.setup)
        screen.event("mkfs.ext4 and mkfs.xfs done, mounted")
        in_parallel(lambda: (a.round(1), a.shared(2)), lambda: (b.round(1), b.shared(2)))
        screen.event("round 1 written, synced, read back; shared disk read twice by both")

        in_parallel(lambda: (a.round(2), a.shared(1)), lambda: (b.round(2), b.shared(1)),
                    lambda: pressure_phase(host, checks))
        screen.event("round 2 done under memory pressure")
        host.cli("cache", "set", f"size={CACHE_MIB * MIB}")

        in_parallel(lambda: a.unflushed(8), lambda: b.round(3))
        status = host.status()
        screen.event(f"vm1 has 8 MiB acknowledged and not flushed ({size(status['cache']['dirty_bytes'])} dirty): "
                     "kill -9 of the worker")

        def kill_and_flush():
            restarted = host.kill_worker()
            checks.add("worker killed with -9: the holder started another", restarted["restarts"] == 1,
                       f"{restarted['cache']['adopted_pages']} pages adopted, "
                       f"{restarted['cache']['adopted_dirty_pages']} of them dirty")
            a.flush()

        before = a.report()
        in_parallel(kill_and_flush, lambda: b.round(4))
        after = a.report()
        checks.add("what vm1 flushed after the kill is there", after["bytes_verified"] > before["bytes_verified"]
                   and after["mismatches"] == 0 and after["io_errors"] == 0,
                   f"{size(after['bytes_verified'] - before['bytes_verified'])} read back")
        in_parallel(lambda: a.shared(1), lambda: b.shared(1))
        in_parallel(a.finish, b.finish)
        screen.event("both guests unmounted, filesystems checked, powered off")
        status = host.status()
        exit_code = host.stop()
        checks.add("spillwayd ended in order", exit_code == 0, f"exit {exit_code}")
    except Exception as e:
        checks.add("the run went to its end", False, f"{type(e).__name__}: {e}")
        status = host.latest
    finally:
        screen.stop()
        for w in workers:
            w.stop()
        if exit_code is None:
            host.stop()

    guests = [w.report() for w in workers]
    for g in guests:
        checks.add(f"{g['name']}: nothing lost", g["mismatches"] == 0 and g["io_errors"] == 0 and
                   g["bytes_verified"] > 0 and g["fsck_errors"] == 0,
                   f"{size(g['bytes_written'])} written, {size(g['bytes_verified'])} verified, "
                   f"{g['mismatches']} mismatches, {g['io_errors']} I/O errors, fsck {g['fsck_errors']}")
    if status:
        hits, misses = host.total("cache", "hits"), host.total("cache", "misses")
        report.update({
            "guests": guests,
            "cache": {"peak_bytes": host.peak, "after_bytes": status["cache"]["resident_bytes"],
                      "reclaimed_bytes": host.total("cache", "reclaimed_bytes"),
                      "hit_ratio": hits / (hits + misses) if hits + misses else 0.0,
                      "hits": hits, "misses": misses},
            "reclaim": {"passes": host.total("reclaim", "passes"),
                        "duration_ms": host.total("reclaim", "duration_ms"),
                        "shrinkers": status["reclaim"]["shrinkers"]},
            "pressure": status["pressure"],
            "restarts": status["restarts"],
        })
        checks.add("the cache was worth having", report["cache"]["hit_ratio"] > 0.1,
                   f"{100 * report['cache']['hit_ratio']:.1f} % hits")
    report["checks"] = checks.rows
    report["ok"] = checks.ok
    report["seconds"] = round(time.monotonic() - screen.started, 1)
    return report


def summary(report):
    print("\nSummary")
    for g in report.get("guests", []):
        print(f"  {g['name']}: wrote {size(g['bytes_written'])}, verified {size(g['bytes_verified'])}, "
              f"{g['mismatches']} mismatches, {g['io_errors']} I/O errors")
    c = report.get("cache")
    if c:
        print(f"  cache: peak {size(c['peak_bytes'])}, now {size(c['after_bytes'])}, {100 * c['hit_ratio']:.1f} % hits, "
              f"{size(c['reclaimed_bytes'])} reclaimed")
        print(f"  reclaim: {report['reclaim']['passes']} passes, {report['reclaim']['duration_ms']:.1f} ms; worker "
              f"restarts: {report['restarts']}")
    for r in report["checks"]:
        print(f"  {'ok  ' if r['ok'] else 'FAIL'} {r['check']}")
    print(f"  {report['seconds']} s: {'everything held' if report['ok'] else 'SOMETHING FAILED'}")


def main():
    parser = argparse.ArgumentParser(prog="./run", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="finite, no terminal, exit 0 only if every check held")
    parser.add_argument("--report", help="write the JSON report here")
    parser.add_argument("--keep", action="store_true", help="keep the folder with disks and logs")
    args = parser.parse_args()
    programs = Path(os.environ.get("SPILLWAY_BIN", TREE / "build/release/bin"))
    folder = Path(tempfile.mkdtemp(prefix="spillway-run-"))
    try:
        report = main_job(args, folder, programs)
        if args.report:
            Path(args.report).write_text(json.dumps(report, indent=2) + "\n")
        summary(report)
        if not report["ok"]:
            log = folder / "spillwayd.log"
            if log.exists():
                print("last lines of spillwayd's log:\n" + "\n".join(log.read_text().splitlines()[-20:]))
        return 0 if report["ok"] else 1
    finally:
        if args.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
