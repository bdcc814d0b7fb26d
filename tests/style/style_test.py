#!/usr/bin/env python3
"""Holds the include direction of docs/architecture.md and a few habits of the source.

A folder may include only what stands below it; siblings never include each other.
"""
import re
import sys
import unittest
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]

# What a folder may include besides itself. `include/spillway` is the public face of src/reclaim.
BELOW = {
    "src/base": set(),
    "src/io": {"src/base"},
    "src/volume": {"src/io"},
    "src/qos": {"src/volume"},
    "src/reclaim": set(),           # stands alone: nothing of this tree but its own headers
    "src/cache": {"src/volume", "src/reclaim"},
    "src/image": {"src/cache"},
    "src/virtio": {"src/image"},
    "src/export": {"src/virtio"},
    "src/export/vhost_user": {"src/export"},
    "src/export/fuse": {"src/export"},
    "src/export/vfio_user": {"src/export"},
    "src/control": {"src/export/vhost_user", "src/export/fuse", "src/export/vfio_user"},
    "src/host": {"src/control", "src/qos"},
    "app": {"src/host"},
}


def reachable(folder, seen=None):
    seen = set() if seen is None else seen
    for below in BELOW[folder]:
        if below not in seen:
            seen.add(below)
            reachable(below, seen)
    return seen


def folder_of(path):
    """The longest key of BELOW that the path lies in, or None."""
    matches = [f for f in BELOW if path == f or path.startswith(f + "/")]
    return max(matches, key=len) if matches else None


def sources(*folders):
    for folder in folders:
        for path in sorted((TREE / folder).rglob("*")):
            if path.suffix in (".h", ".cc", ".c"):
                yield path


class IncludeDirection(unittest.TestCase):
    def test_includes_follow_the_architecture(self):
        wrong, seen = [], 0
        for path in sources("src", "app"):
            name = path.relative_to(TREE).as_posix()
            own = folder_of(name)
            self.assertIsNotNone(own, f"{name}: in no folder of the architecture")
            allowed = reachable(own) | {own}
            for number, line in enumerate(path.read_text().splitlines(), 1):
                match = re.match(r'\s*#\s*include\s+["<]((?:src|app|include)/[^">]+|spillway/[^">]+)[">]', line)
                if not match:
                    continue
                seen += 1
                target = match.group(1)
                used = "src/reclaim" if target.startswith(("spillway/", "include/")) else folder_of(target)
                if used is None or used not in allowed:
                    wrong.append(f"{name}:{number}: {own} must not include {target}")
        self.assertGreater(seen, 100, "the test no longer sees the includes")
        self.assertEqual(wrong, [])

    def test_layers_of_volume_meet_only_through_the_interface(self):
        """Layers do not know each other; md, which opens whatever the superblocks say, knows them all."""
        shared = {"md"}
        wrong = []
        for path in sources("src/volume"):
            name = path.relative_to(TREE).as_posix()
            parts = name.split("/")
            if len(parts) < 4 or parts[2] == "md" or name.endswith("_test.cc"):
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                match = re.match(r'\s*#\s*include "src/volume/([a-z0-9_]+)/', line)
                if match and match.group(1) != parts[2] and match.group(1) not in shared:
                    wrong.append(f"{name}:{number}: {parts[2]} must not include {match.group(1)}")
        self.assertEqual(wrong, [])


class Habits(unittest.TestCase):
    def test_no_registry_is_named(self):
        """Hosts of package registries come from the machine's own apt configuration, never from a commit."""
        hosts = re.compile(r"\b(?:deb|security|snapshot)\.debian\.org|registry\.npmjs\.org|archive\.ubuntu\.com")
        found = []
        for path in TREE.rglob("*"):
            relative = path.relative_to(TREE)
            if not path.is_file() or relative.parts[0] in (".git", "build") or path == Path(__file__):
                continue
            if path.suffix in (".xz", ".png", ".img") or path.stat().st_size > 1 << 20:
                continue
            if hosts.search(path.read_text(errors="replace")):
                found.append(relative.as_posix())
        self.assertEqual(found, [])

    def test_no_co_await_in_a_conditional(self):
        """GCC 12 evaluates both sides of ?: when one of them holds co_await."""
        bad = re.compile(r"\?[^;{}?]*\bco_await\b")
        found = []
        for p in sources("src", "app", "include", "tests", "benchmarks", "fuzz"):
            text = re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"', "", p.read_text())
            found += [f"{p.relative_to(TREE)}: {' '.join(m.group(0).split())}" for m in bad.finditer(text)]
        self.assertEqual(found, [])

    def test_names_say_what_things_are(self):
        """STYLE: no Manager, Util, Helper, Common as names of types."""
        bad = re.compile(r"\b(?:class|struct)\s+\w*(?:Manager|Util|Utils|Helper|Common)\b")
        found = [f"{p.relative_to(TREE)}: {m.group(0)}" for p in sources("src", "app", "include")
                 for m in bad.finditer(p.read_text())]
        self.assertEqual(found, [])


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v"])
