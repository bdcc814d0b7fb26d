"""N guests from one base image (issue 9, P5): each boots its root filesystem from a qcow2 overlay of its own, each is
a tenant of its own, and the base's blocks are cached once for all. Compared with what N copies would hold.
"""
import hashlib
import subprocess
import threading
import time
from pathlib import Path

from .daemon import Daemon, programs
from .image import root_image
from .vm import Guest, best_accel
from .disks import VhostUser

MIB = 1 << 20


def config(n, cache_mib):
    text = f'[cache]\nsize = "{cache_mib}M"\n'
    for i in range(1, n + 1):
        text += (f'[group.tenant-{i}]\nweight = 100\n[disk.overlay{i}]\npath = "vm{i}.qcow2"\n'
                 f'[volume.vm{i}]\nlayer = "qcow2"\nmembers = ["overlay{i}"]\n'
                 f'[export.vm{i}]\ndevice = "virtio-blk"\nvolume = "vm{i}"\ngroup = "tenant-{i}"\n'
                 f'queues = 1\nsocket = "vm{i}.sock"\n')
    return text


class SharedBase:
    def __init__(self, folder, guests=3, show=print):
        self.folder, self.n, self.show = Path(folder), guests, show
        self.checks, self.reports = [], []

    def _check(self, name, ok, detail=""):
        self.checks.append({"name": name, "ok": bool(ok), "detail": detail})
        self.show(f"{'ok  ' if ok else 'FAIL'} {name}" + (f" ({detail})" if detail else ""))

    def _image(self, *words):
        subprocess.run([programs() / "spillway", "image", *map(str, words)], check=True, stdout=subprocess.DEVNULL,
                       cwd=self.folder)

    def run(self):
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        raw = self.folder / "base.raw"
        root_image(raw, 160, release="bookworm")
        self._image("convert", "base.raw", "base.qcow2", "-O", "qcow2")
        base_bytes = (self.folder / "base.qcow2").stat().st_blocks * 512
        expect = hashlib.sha256(raw.read_bytes()).hexdigest()
        for i in range(1, self.n + 1):
            self._image("create", f"vm{i}.qcow2", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2")
        sockets = [f"vm{i}.sock" for i in range(1, self.n + 1)]
        daemon = Daemon(self.folder, config(self.n, 2 * base_bytes // MIB + 64 * self.n), sockets)
        guests, report = [], {}
        try:
            daemon.start()
            self.show(f"one base of {base_bytes / MIB:.0f} MiB, {self.n} overlays (guests under {best_accel()})")
            errors = []

            def one(i):
                try:
                    self._guest(i, guests, expect)
                except Exception as e:  # a thread's failure is a failed check
                    errors.append(f"vm{i}: {e}")

            threads = [threading.Thread(target=one, args=(i,)) for i in range(1, self.n + 1)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            self._check(f"{self.n} guests booted from one base and kept their own writes", not errors,
                        "; ".join(errors)[:300])
            status = daemon.status()
            cache = status["cache"]
            copies = sum(t["view_bytes"] for t in cache["tenants"])
            held = daemon.memfd_bytes()
            report = {"base_bytes": base_bytes, "memory_bytes": held, "resident_bytes": cache["resident_bytes"],
                      "copies_bytes": copies, "tenants": cache["tenants"]}
            self._check("one copy serves all", cache["resident_bytes"] < copies * (0.5 + 0.5 / self.n),
                        f"{held / MIB:.0f} MiB held for what {self.n} private caches would need "
                        f"{copies / MIB:.0f} MiB for")
        finally:
            for g in guests:
                g.stop()
            self._check("spillwayd ended cleanly", daemon.stop() == 0)
        for i in range(1, self.n + 1):
            p = subprocess.run(["qemu-img", "check", self.folder / f"vm{i}.qcow2"], capture_output=True, text=True)
            self._check(f"vm{i}.qcow2: qemu-img check", p.returncode == 0, p.stdout.strip().splitlines()[0][:80])
        return {"schema": 1, "ok": all(c["ok"] for c in self.checks), "guests": self.reports, "memory": report,
                "checks": self.checks, "seconds": round(time.monotonic() - started, 1)}

    def _guest(self, i, guests, base_sha):
        g = Guest(f"vm{i}", [VhostUser(str(self.folder / f"vm{i}.sock"))], memory=256,
                  folder=self.folder / f"vm{i}", root="/dev/vda ext4 rw")
        guests.append(g)
        g.start(240)
        g.run("cat /bin/* >/dev/null; dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null")
        word = hashlib.sha256(f"vm{i}".encode()).hexdigest()
        g.run(f"i=0; while [ $i -lt 64 ]; do echo {word} $i; i=$((i+1)); done >/own; sync; "
              "echo 3 >/proc/sys/vm/drop_caches")
        lines = g.run("cat /own").split()
        written = [word, "0"]
        if lines[:2] != written or lines.count(word) != 64:
            raise RuntimeError("did not read back what it wrote")
        self.reports.append({"name": f"vm{i}", "bytes_written": sum(map(len, lines)), "bytes_verified": sum(map(len, lines)),
                             "mismatches": 0, "io_errors": 0})


def print_summary(report):
    m = report["memory"]
    if m:
        print(f"\n{len(report['guests'])} guests, one base: {m['memory_bytes'] / MIB:.0f} MiB of cache held; private caches "
              f"would hold {m['copies_bytes'] / MIB:.0f} MiB")
    print(f"{'All checks held' if report['ok'] else 'NOT ALL CHECKS HELD'} in {report['seconds']:.0f} s.")

