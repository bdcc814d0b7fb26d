"""Stock Debian kernels, fetched into the cache, and which of their modules a guest needs."""
import lzma
import os
import shutil
import subprocess
from pathlib import Path

from . import debs

# release -> (meta package, what it is for)
KERNELS = {
    "bookworm": "linux-image-cloud-amd64",
    "trixie": "linux-image-cloud-amd64",
    "bookworm-generic": "linux-image-amd64",
}

# Modules carried into the image with everything they depend on (modprobe works in the guest).
CARRIED = """virtio_pci virtio_mmio virtio_blk virtio_net virtio_console virtio_pmem virtio_balloon
  nd_pmem nd_virtio dax_pmem device_dax ext4 xfs vfat fuse virtiofs overlay loop dm_mod md_mod linear
  raid0 raid1 raid10 raid456 crc32c_generic crc32c_intel crct10dif_generic libcrc32c nbd tmpfs
  null_blk nls_cp437 nls_ascii""".split()
# Modules that init loads at once; the rest waits for modprobe.
LOADED = "virtio_pci virtio_blk crc32c_intel".split()


class Kernel:
    """One kernel: .image (bzImage), .version, .modules (folder lib/modules/VERSION)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.version = next((self.folder / "lib/modules").iterdir()).name
        self.image = self.folder / f"boot/vmlinuz-{self.version}"
        self.modules = self.folder / "lib/modules" / self.version
        self._deps = {}
        self._builtin = {Path(l).stem.replace("-", "_") for l in
                         (self.modules / "modules.builtin").read_text().split()}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, needs = line.partition(":")
            self._deps[path] = needs.split()
        self._by_name = {self.name_of(p): p for p in self._deps}

    @staticmethod
    def name_of(path):
        return Path(path).name.split(".ko")[0].replace("-", "_")

    def closure(self, names):
        """Paths (below .modules) of the named modules and their dependencies, in loading order.
        Built-in ones and ones this kernel has not got are left out."""
        order = []

        def add(path):
            if path not in order:
                for need in reversed(self._deps[path]):
                    add(need)
                if path not in order:
                    order.append(path)

        for name in names:
            path = self._by_name.get(name.replace("-", "_"))
            if path:
                add(path)
        return order

    def has(self, name):
        name = name.replace("-", "_")
        return name in self._by_name or name in self._builtin

    def read(self, path):
        """A module's contents, uncompressed: busybox inserts plain ones only."""
        data = (self.modules / path).read_bytes()
        if path.endswith(".xz"):
            return lzma.decompress(data)
        if path.endswith(".zst"):
            return subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True).stdout
        return data


def kernel(release="bookworm"):
    """The stock kernel of that Debian release, fetched on first use."""
    if release not in KERNELS:
        raise debs.FetchError(f"unknown kernel '{release}' (one of {', '.join(KERNELS)})")
    folder = debs.cache_dir() / "kernels" / release
    with debs.locked("kernel-" + release):
        if not (folder / "done").exists():
            _fetch(release, folder)
    return Kernel(folder)


def _fetch(release, folder):
    suite = debs.Suite(release.split("-")[0])
    with debs.locked("apt-" + suite.folder.name):
        suite.update()
        work = folder.with_name(folder.name + f".tmp{os.getpid()}")
        shutil.rmtree(work, ignore_errors=True)
        try:
            name = suite.real_kernel(KERNELS[release])
            files = suite.download([name], work / "debs")
            debs.unpack(files, work / "root")
            root = work / "root"
            version = next((root / "lib/modules").iterdir()).name
            subprocess.run(["/sbin/depmod", "-b", str(root), version], check=True)
            made = work / "made"
            (made / "lib/modules").mkdir(parents=True)
            shutil.move(root / "usr/lib/modules" / version, made / "lib/modules" / version)
            shutil.move(root / "boot", made / "boot")
            (made / "done").write_text(name + "\n")
            folder.parent.mkdir(parents=True, exist_ok=True)
            debs.publish(made, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
