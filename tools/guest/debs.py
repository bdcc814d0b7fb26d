"""Debian packages fetched and unpacked without installing them.

apt resolves and verifies them (signatures as usual) in a private state folder inside the cache, so
neither the machine's package state nor its sources change, and no root is needed. The mirror is the
one that the machine's own sources name, read at run time.
"""
import contextlib
import fcntl
import glob
import os
import re
import shutil
import subprocess
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class FetchError(RuntimeError):
    """A package could not be fetched; the message is one line."""


def cache_dir():
    """The folder for everything fetched or made here; always outside the source tree."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spillway"
    path = Path(os.environ.get("SPILLWAY_CACHE") or default).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(name):
    """One process at a time makes the cache entry `name`; the others wait, then find it there."""
    folder = cache_dir() / "locks"
    folder.mkdir(exist_ok=True)
    with open(folder / (name + ".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish(temporary, final):
    """Puts a finished folder or file in place in one step, so that half-made entries never show."""
    if Path(final).is_dir():
        shutil.rmtree(final)
    os.replace(temporary, final)


def mirror():
    """The archive address in this machine's own apt sources."""
    for name in sorted(glob.glob("/etc/apt/sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", Path(name).read_text(errors="replace")):
            fields = dict(re.findall(r"^(\w[\w-]*):[ \t]*(.*)$", stanza, re.M))
            suites = fields.get("Suites", "").split()
            if "main" in fields.get("Components", "").split() and any(
                    s in ("bookworm", "trixie", "stable") for s in suites):
                return fields["URIs"].split()[0].rstrip("/")
    lists = ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*.list"))]
    for name in lists:
        if not os.path.exists(name):
            continue
        for line in Path(name).read_text(errors="replace").splitlines():
            m = re.match(r"deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(bookworm|trixie|stable)\s.*\bmain\b", line)
            if m:
                return m.group(1).rstrip("/")
    raise FetchError("no Debian archive in this machine's apt sources (looked for suite bookworm, main)")


class Suite:
    """A private apt for one Debian release (and its backports)."""

    def __init__(self, name, backports=False):
        self.name = name
        self.folder = cache_dir() / "apt" / (name + ("-backports" if backports else ""))
        self.suites = [name] + ([name + "-backports"] if backports else [])

    def _options(self):
        f = self.folder
        pairs = {
            "Dir::Etc": f / "etc", "Dir::Etc::sourcelist": f / "etc/sources.list",
            "Dir::Etc::sourceparts": "/dev/null", "Dir::State": f / "state",
            "Dir::State::status": f / "state/status", "Dir::Cache": f / "cache",
            "APT::Sandbox::User": "", "APT::Install-Recommends": "false",
            "APT::Architecture": "amd64", "APT::Architectures": "amd64",
            "Acquire::Languages": "none", "Acquire::Retries": "3",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
        }
        return [x for k, v in pairs.items() for x in ("-o", f"{k}={v}")]

    def _run(self, *command, cwd=None):
        env = dict(os.environ, LC_ALL="C", DEBIAN_FRONTEND="noninteractive")
        p = subprocess.run([command[0], *self._options(), *command[1:]], cwd=cwd, env=env,
                           stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if p.returncode:
            why = [l for l in p.stderr.splitlines() if l.startswith("E:")] or [p.stderr.strip()]
            raise FetchError(f"apt ({self.name}): {' '.join(command[1:3])}: {why[-1]}")
        return p.stdout

    def update(self):
        f = self.folder
        for sub in ("etc/apt.conf.d", "etc/preferences.d", "state/lists/partial",
                    "cache/archives/partial"):
            (f / sub).mkdir(parents=True, exist_ok=True)
        if not os.path.exists(KEYRING):
            raise FetchError(f"{KEYRING} is missing (package debian-archive-keyring)")
        (f / "state/status").touch()
        lines = [f"deb [signed-by={KEYRING}] {mirror()} {s} main\n" for s in self.suites]
        (f / "etc/sources.list").write_text("".join(lines))
        self._run("apt-get", "update", "-q")

    def real_kernel(self, meta):
        """The versioned package behind a kernel meta package."""
        out = self._run("apt-cache", "depends", "--important", meta)
        for name in re.findall(r"Depends: (linux-image-\S+)", out):
            return name
        raise FetchError(f"{meta} names no kernel image")

    def download(self, packages, into):
        """Fetches just these packages; returns the .deb files."""
        Path(into).mkdir(parents=True, exist_ok=True)
        self._run("apt-get", "download", "-q", *packages, cwd=into)
        return sorted(Path(into).glob("*.deb"))

    def download_closure(self, packages, release=None):
        """Fetches packages with all they depend on; returns the .deb files."""
        args = ["install", "-q", "-y", "--download-only"]
        if release:
            args += ["-t", release]
        self._run("apt-get", "-o", "Debug::NoLocking=true", "clean")
        self._run("apt-get", "-o", "Debug::NoLocking=true", *args, *packages)
        return sorted((self.folder / "cache/archives").glob("*.deb"))

    def clean(self):
        self._run("apt-get", "-o", "Debug::NoLocking=true", "clean")


def unpack(debs, root):
    """Unpacks packages over one another. A merged /usr, as Debian 12 and 13 have it, is laid first."""
    root = Path(root)
    for d in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / d).mkdir(parents=True, exist_ok=True)
        if not (root / d).is_symlink():
            (root / d).symlink_to("usr/" + d)
    for deb in debs:
        # Not dpkg-deb -x: it would replace the links by folders of packages that still ship /lib.
        data = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
        tar = subprocess.run(["tar", "-x", "-C", str(root), "--keep-directory-symlink",
                              "--no-same-owner"], stdin=data.stdout, capture_output=True, text=True)
        data.stdout.close()
        if data.wait() or tar.returncode:
            raise FetchError(f"cannot unpack {Path(deb).name}: {tar.stderr.strip()[:200]}")
