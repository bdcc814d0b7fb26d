#!/usr/bin/env python3
"""What this machine has not got, in a Debian guest (S5, S10): two NUMA nodes (QEMU -numa) with a background thread
each, and cgroup v2: PSI and memory.events of a real cgroup with a real limit."""
import os
from pathlib import Path

import harness  # first: it finds the guest package
from guest import Guest

BIN = Path(os.environ.get("SPILLWAY_BIN", harness.TREE / "build/dev/bin"))


class Reclaim(harness.VmTest):
    def guest(self, name, **options):
        return self.started(Guest(name, files={"/t/reclaim_guest": str(BIN / "reclaim_guest")}, tools=(),
                                  append="psi=1", **options), timeout=300)

    def test_pressure_on_one_node_takes_from_that_node(self):
        guest = self.guest("numa", smp=2, numa=2, memory=512)
        print(guest.run("ls -d /sys/devices/system/node/node*; /t/reclaim_guest numa", timeout=400))

    def test_cgroup_v2_limit_is_survived_and_without_reclaim_is_not(self):
        guest = self.guest("cgroup2", cgroup2=True, memory=384)
        # The limit alone: whoever fills it four times is killed.
        guest.run("mkdir /sys/fs/cgroup/plain && cd /sys/fs/cgroup/plain && echo 64M >memory.max")
        status, _ = guest.run("/t/reclaim_guest plain /sys/fs/cgroup/plain 256", check=False, timeout=300)
        self.assertEqual(status, 137)
        kills = guest.run("cat /sys/fs/cgroup/plain/memory.events")
        self.assertIn("oom_kill 1", kills)
        # With it: `high` wakes the sources long before `max`.
        guest.run("mkdir /sys/fs/cgroup/with && cd /sys/fs/cgroup/with && echo 64M >memory.max && echo 48M >memory.high")
        text = guest.run("/t/reclaim_guest cgroup2 /sys/fs/cgroup/with 256", timeout=400)
        print(text)
        self.assertIn("/sys/fs/cgroup/with/memory.events, active", text)
        self.assertIn("source psi: /sys/fs/cgroup/with/memory.pressure", text)


if __name__ == "__main__":
    harness.main()
