#!/usr/bin/env python3
"""virtio-pmem under hard memory limits (issue 7): daemon and VMM in memory cgroups of their own, the VMM at its limit.

No guest: pmem_guest.c maps the file as a VMM does. Needs root and a mounted memory controller (cgroup v1 or v2)."""
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import harness  # first: it finds the guest package
from guest.daemon import Daemon, sparse, until
from pmem_vm import HERE, config

MIB = 256
VMM_LIMIT = 48 << 20
DAEMON_ROOM = 56 << 20  # above what it needs at rest: docs/pmem.md says what a tenant with a pmem file may cost


class Cgroup:
    """A memory cgroup of this test's own."""

    def __init__(self, name):
        self.v2 = False
        base = None
        for line in Path("/proc/mounts").read_text().splitlines():
            _, where, kind, options = line.split()[:4]
            if kind == "cgroup" and "memory" in options.split(","):
                base = Path(where)
            elif kind == "cgroup2" and base is None and "memory" in (Path(where) / "cgroup.subtree_control").read_text():
                base, self.v2 = Path(where), True
        if base is None:
            raise unittest.SkipTest("no memory cgroup controller is mounted with children enabled")
        self.path = Path(tempfile.mkdtemp(prefix=f"spillway-{name}-", dir=base))

    def command(self, words):
        """`words`, run inside."""
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *map(str, words)]

    def limit(self, size):
        (self.path / ("memory.max" if self.v2 else "memory.limit_in_bytes")).write_text(str(size))

    def usage(self):
        return int((self.path / ("memory.current" if self.v2 else "memory.usage_in_bytes")).read_text())

    def _fields(self, name):
        return dict(line.split() for line in (self.path / name).read_text().splitlines())

    def limit_hits(self):
        if self.v2:
            return int(self._fields("memory.events")["max"])
        return int((self.path / "memory.failcnt").read_text())

    def oom_kills(self):
        return int(self._fields("memory.events" if self.v2 else "memory.oom_control")["oom_kill"])

    def remove(self):
        """When the processes in it have ended."""
        def gone():
            try:
                self.path.rmdir()
            except OSError:
                return False
            return True
        until(gone, f"end of {self.path}", 20)


class PmemInCgroups(harness.VmTest):

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest("needs root")
        self.tool = self.folder / "pmem_guest"
        subprocess.run(["cc", "-static", "-O2", "-o", self.tool, HERE / "pmem_guest.c"], check=True)
        sparse(self.folder / "d1.img", MIB)
        self.ours, self.vmm = Cgroup("daemon"), Cgroup("vmm")
        self.addCleanup(self.vmm.remove)
        self.addCleanup(self.ours.remove)
        self.daemon = Daemon(self.folder, '[cache]\nsize = "16M"\n' + config(["d1"]), ["vm1.sock"])
        self.daemon.command = self.ours.command(self.daemon.command)
        self.started(self.daemon)

    def run_tool(self, *words, meanwhile=lambda: None):
        # Ended by unmounting should it hang: a process in a fault on a dead mount cannot be killed.
        with subprocess.Popen(self.vmm.command([self.tool, *words]), stdout=subprocess.PIPE, text=True) as p:
            try:
                meanwhile()
                out, _ = p.communicate(timeout=240)
            except BaseException:
                p.kill()
                subprocess.run(["umount", "-f", "-l", (self.folder / "vm1.pmem").resolve().parent], check=False)
                raise
        self.assertEqual(p.returncode, 0, f"{out}\n{self.daemon.tail()}")
        return out.strip()

    def test_vmm_at_its_hard_limit_and_a_kill_neither_hang_nor_lose(self):
        file = self.folder / "vm1.pmem"
        self.vmm.limit(VMM_LIMIT)
        room = self.ours.usage() + DAEMON_ROOM
        self.ours.limit(room)
        self.assertEqual(self.run_tool("fill", file, MIB, 3), "filled")
        churned = self.run_tool("churn", file, MIB, 3, 15)
        killed = self.run_tool("churn", file, MIB, 3, 10, meanwhile=self.daemon.kill_worker) \
            if self.run_tool("fill", file, MIB, 3) == "filled" else ""
        for text in (churned, killed):
            self.assertEqual(text.split()[:2], ["wrong", "0"], text)
        print(f"limits {VMM_LIMIT >> 20} and {room >> 20} MiB, hit {self.vmm.limit_hits()} and {self.ours.limit_hits()} "
              f"times; {churned}; with a kill: {killed}", file=sys.stderr)
        self.assertGreater(self.vmm.limit_hits(), 100)
        self.assertEqual((self.vmm.oom_kills(), self.ours.oom_kills()), (0, 0))
        self.assertEqual(self.daemon.status()["restarts"], 1)


if __name__ == "__main__":
    harness.main()
