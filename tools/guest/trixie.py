"""Programs of Debian 13 run on this machine, from a folder, through their own dynamic loader.

No chroot and no namespace, so sockets, images and /proc/PID mean what they mean to everybody else:
CACHE/trixie/bin/qemu-system-x86_64 (QEMU 11 of trixie-backports), qemu-img, qemu-io,
qemu-storage-daemon. libblkio for tools/blkload comes from the same release.
"""
import os
import shutil
import subprocess
from pathlib import Path

from . import debs

PACKAGES = ["qemu-system-x86", "qemu-utils", "qemu-block-extra", "libblkio1"]
PROGRAMS = ["qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-storage-daemon"]
LIB = "usr/lib/x86_64-linux-gnu"


def root():
    """CACHE/trixie, fetched on first use; its bin/ has a wrapper for each of PROGRAMS."""
    folder = debs.cache_dir() / "trixie"
    with debs.locked("trixie"):
        if not (folder / "done").exists():
            _fetch(folder)
        (folder / "bin").mkdir(exist_ok=True)
        for name in PROGRAMS:
            _wrapper(folder / "bin" / name, name, folder / "root")
    return folder


def qemu():
    return root() / "bin/qemu-system-x86_64"


def _fetch(folder):
    suite = debs.Suite("trixie", backports=True)
    with debs.locked("apt-" + suite.folder.name):
        suite.update()
        work = folder.with_name(folder.name + f".tmp{os.getpid()}")
        shutil.rmtree(work, ignore_errors=True)
        try:
            debs.unpack(suite.download_closure(PACKAGES, "trixie-backports"), work / "root")
            suite.clean()
            shutil.copy(work / "root" / LIB / "ld-linux-x86-64.so.2", work / "root/usr/bin/ld.so")
            (work / "done").touch()
            debs.publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _wrapper(path, name, r):
    paths = ":".join(f"{r}/{p}" for p in (LIB, LIB + "/pulseaudio", "usr/lib"))
    text = f"""#!/bin/sh
# QEMU looks for firmware beside its own program file, as /proc/self/exe names it. That is the loader
# here, hence the copy of the loader in usr/bin.
QEMU_MODULE_DIR="{r}/{LIB}/qemu" exec "{r}/usr/bin/ld.so" --library-path "{paths}" --argv0 {name} "{r}/usr/bin/{name}" "$@"
"""
    if path.exists() and path.read_text() == text:
        return
    new = path.with_suffix(f".tmp{os.getpid()}")
    new.write_text(text)
    new.chmod(0o755)
    os.replace(new, path)


def blkload(source):
    """Builds tools/blkload against Debian 13's libblkio; returns the program's path."""
    folder = debs.cache_dir() / "blkio"
    with debs.locked("blkio"):
        if not (folder / "root/done").exists():
            suite = debs.Suite("trixie", backports=True)
            with debs.locked("apt-" + suite.folder.name):
                suite.update()
                work = folder.with_name(folder.name + f".tmp{os.getpid()}")
                shutil.rmtree(work, ignore_errors=True)
                try:
                    files = suite.download(["libblkio1", "libblkio-dev"], work / "debs")
                    debs.unpack(files, work / "root")
                    (work / "root/done").touch()
                    folder.mkdir(exist_ok=True)
                    debs.publish(work / "root", folder / "root")
                finally:
                    shutil.rmtree(work, ignore_errors=True)
        program = folder / "blkload"
        if not program.exists() or program.stat().st_mtime < Path(source).stat().st_mtime:
            usr = folder / "root/usr"
            libs = usr / "lib/x86_64-linux-gnu"
            new = folder / f"blkload.tmp{os.getpid()}"
            subprocess.run(["gcc", "-O2", f"-I{usr}/include", str(source), "-o", str(new),
                            f"-L{libs}", "-lblkio", "-lpthread", f"-Wl,-rpath,{libs}"], check=True)
            os.replace(new, program)
    return program
