#!/usr/bin/env python3
"""The main job end to end with real guests (issue 2: S4, S9, B1, V1; cache given back, kill -9 survived)."""
import json

import harness  # first: it finds the guest package
from guest.scenario import MIB, Scenario


class MainJobTest(harness.VmTest):

    def test_two_guests_under_pressure_and_a_killed_worker(self):
        report = Scenario(self.folder / "job", rounds=4).run()
        failed = [c for c in report["checks"] if not c["ok"]]
        self.assertEqual(failed, [], json.dumps(report["failures"], indent=1))
        self.assertEqual([g["name"] for g in report["guests"]], ["vm1", "vm2"])
        self.assertLessEqual(report["cache"]["after_bytes"], 36 * MIB)
        self.assertEqual(report["restarts"], 1)


if __name__ == "__main__":
    harness.main()
