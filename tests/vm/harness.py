"""What the tests in this folder share: a folder of their own, and things that are ended after a test.

SPILLWAY_BIN names the folder of the programs (tools/guest/daemon.py). Only processes started here are
ended, by pid.
"""
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(TREE / "tools"))

SKIPPED = 77  # CTest: SKIP_RETURN_CODE


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
    """Runs the tests of the calling file; a run with nothing but skips exits with what CTest takes for that."""
    outcome = unittest.main(module="__main__", exit=False, verbosity=2).result
    if not outcome.wasSuccessful():
        sys.exit(1)
    sys.exit(SKIPPED if outcome.testsRun == len(outcome.skipped) else 0)
