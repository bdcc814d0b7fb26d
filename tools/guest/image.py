"""The initramfs, made on the spot: busybox, kernel modules, chosen programs of this machine.

A cpio archive (newc) written here, since it needs device nodes and no root. It is not compressed:
unpacking under TCG costs more than reading it.
"""
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from . import debs, kernels

HERE = Path(__file__).resolve().parent

# group name -> programs of the host, copied with the libraries they need
TOOLS = {
    "ext4": ["mkfs.ext4", "e2fsck", "dumpe2fs", "tune2fs", "resize2fs"],
    "xfs": ["mkfs.xfs", "xfs_io", "xfs_repair", "xfs_growfs"],
    "fio": ["fio"],
    "mdadm": ["mdadm"],
    "util": ["fstrim", "lsblk", "blkdiscard", "findmnt", "filefrag", "fallocate", "losetup",
             "wipefs", "blkid"],
}
DEFAULT_TOOLS = ("ext4", "xfs", "util")


class Cpio:
    """Collects entries; parents are added by themselves; the last entry of a path wins."""

    def __init__(self):
        self._entries = {}

    def _parents(self, path):
        for parent in reversed(Path(path).parents):
            if str(parent) not in (".", "/"):
                self._entries.setdefault(str(parent).lstrip("/"), (stat.S_IFDIR | 0o755, b"", 0))

    def _put(self, path, mode, data=b"", rdev=(0, 0)):
        path = str(path).lstrip("/")
        # /bin and so on are links in the image: an entry below them, as a path of its own, would make
        # the kernel replace the link by a folder.
        if path.startswith(("bin/", "sbin/", "lib/", "lib64/")):
            path = "usr/" + path
        if path.startswith("usr/sbin/"):
            path = "usr/bin/" + path[len("usr/sbin/"):]
        self._parents(path)
        self._entries[path] = (mode, data, rdev)

    def folder(self, path):
        self._put(path, stat.S_IFDIR | 0o755)

    def file(self, path, data, mode=0o644):
        self._put(path, stat.S_IFREG | mode, data)

    def link(self, path, target):
        self._put(path, stat.S_IFLNK | 0o777, str(target).encode())

    def char(self, path, major, minor):
        self._put(path, stat.S_IFCHR | 0o600, rdev=(major, minor))

    def write_tree(self, folder):
        """The same as files below a folder, but for device nodes."""
        for name, (mode, data, _) in self._entries.items():
            path = folder / name
            if stat.S_ISDIR(mode):
                path.mkdir(parents=True, exist_ok=True)
            elif stat.S_ISLNK(mode):
                path.symlink_to(data.decode())
            elif stat.S_ISREG(mode):
                path.write_bytes(data)
                path.chmod(mode & 0o777)

    def bytes(self):
        out = bytearray()

        def one(name, mode, data, rdev, inode):
            fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(name) + 1, 0)
            out.extend(b"070701" + b"".join(b"%08X" % f for f in fields) + name + b"\0")
            out.extend(b"\0" * (-len(out) % 4))
            out.extend(data)
            out.extend(b"\0" * (-len(out) % 4))

        for i, (name, (mode, data, rdev)) in enumerate(self._entries.items(), 1):
            one(name.encode(), mode, data, rdev or (0, 0), i)
        one(b"TRAILER!!!", 0, b"", (0, 0), 0)
        return bytes(out)


def _find(program):
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")
    if not path:
        raise debs.FetchError(f"guest image: no program {program} here (tools/deps test installs it)")
    return path


def libraries(path):
    """What ldd says a program needs, as paths; nothing for a static one."""
    p = subprocess.run(["ldd", str(path)], capture_output=True, text=True)
    if p.returncode:
        return []
    missing = re.findall(r"(\S+) => not found", p.stdout)
    if missing:
        raise debs.FetchError(f"{path}: library {missing[0]} not found")
    return re.findall(r"(/\S+) \(0x", p.stdout)


def _add_program(cpio, host_path, guest_path, seen):
    real = os.path.realpath(host_path)
    cpio.file(guest_path, Path(real).read_bytes(), 0o755)
    for lib in libraries(real):
        if lib not in seen:
            seen.add(lib)
            cpio.file(os.path.normpath(lib), Path(os.path.realpath(lib)).read_bytes(), 0o755)


def _add_modules(cpio, kernel, extra):
    folder = f"lib/modules/{kernel.version}"
    plain = lambda p: re.sub(r"\.(xz|zst|gz)$", "", p)
    carried = kernel.closure([*kernels.CARRIED, *extra])
    for path in carried:
        cpio.file(f"{folder}/{plain(path)}", kernel.read(path))
    keep = set(carried)
    for index in ("modules.dep", "modules.alias", "modules.softdep", "modules.builtin"):
        lines = (kernel.modules / index).read_text().splitlines()
        if index == "modules.dep":
            lines = [" ".join(plain(w) if w[-1] != ":" else plain(w[:-1]) + ":" for w in l.split())
                     for l in lines if l.split(":")[0] in keep]
        elif index == "modules.alias":
            names = {kernel.name_of(p) for p in carried}
            lines = [l for l in lines if l.split()[-1] in names]
        cpio.file(f"{folder}/{index}", ("\n".join(lines) + "\n").encode())
    now = [plain(p) for p in kernel.closure(kernels.LOADED)]
    cpio.file("etc/modules.now", "".join(p + "\n" for p in now).encode())


def base(kernel, tools=DEFAULT_TOOLS, modules=()):
    """The part that does not change from guest to guest, as a file in the cache."""
    programs = []
    for group in tools:
        programs += TOOLS[group] if group in TOOLS else [group]
    busybox = _find("busybox")
    key = hashlib.sha256()
    for item in (kernel.version, *sorted(modules), *kernels.CARRIED, *kernels.LOADED):
        key.update(item.encode() + b"\0")
    for path in [busybox, *map(_find, programs)]:
        st = os.stat(path)
        key.update(f"{path} {st.st_size} {st.st_mtime_ns}\n".encode())
    for name in ("image.py", "init.sh", "guest.sh", "agent.sh"):
        key.update((HERE / name).read_bytes())
    final = debs.cache_dir() / "initramfs" / (key.hexdigest()[:20] + ".cpio")
    with debs.locked("initramfs"):
        if not final.exists():
            final.parent.mkdir(exist_ok=True)
            temporary = final.with_suffix(f".tmp{os.getpid()}")
            temporary.write_bytes(_make(kernel, programs, modules, busybox).bytes())
            os.replace(temporary, final)
    return final


def root_image(path, mib, release="trixie", tools=DEFAULT_TOOLS):
    """An ext4 image (4 KiB blocks, so that it may be mounted with dax) with the same system on it, for
    Guest(root=...). Needs no root: mkfs.ext4 -d fills it from a folder."""
    kernel = kernels.kernel(release)
    programs = [p for t in tools for p in TOOLS.get(t, [t])]
    with tempfile.TemporaryDirectory(prefix="spillway-root-") as folder:
        _make(kernel, programs, (), _find("busybox")).write_tree(Path(folder))
        with open(path, "wb") as image:
            image.truncate(mib << 20)
        subprocess.run([_find("mkfs.ext4"), "-q", "-F", "-b", "4096", "-d", folder, str(path)], check=True,
                       capture_output=True)
    return path


def _make(kernel, programs, modules, busybox):
    cpio = Cpio()
    for d in ("usr/bin", "usr/lib", "usr/lib64", "dev", "proc", "sys", "tmp", "run",
              "mnt", "root", "etc"):
        cpio.folder(d)
    for d in ("bin", "sbin", "lib", "lib64"):
        cpio.link(d, "usr/" + d)
    cpio.link("usr/sbin", "bin")
    cpio.char("dev/console", 5, 1)
    cpio.char("dev/null", 1, 3)
    if libraries(busybox):
        raise debs.FetchError("guest image: busybox is not static (package busybox-static)")
    cpio.file("usr/bin/busybox", Path(busybox).read_bytes(), 0o755)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for name in applets.stdout.split():
        if name not in ("busybox", "mke2fs", "dpkg", "rpm", "init"):
            cpio.link(f"usr/bin/{name}", "busybox")
    seen = set()
    for program in programs:
        _add_program(cpio, _find(program), f"usr/bin/{Path(program).name}", seen)
    if os.path.exists("/etc/mke2fs.conf"):
        cpio.file("etc/mke2fs.conf", Path("/etc/mke2fs.conf").read_bytes())
    cpio.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    cpio.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    _add_modules(cpio, kernel, modules)
    cpio.file("init", (HERE / "init.sh").read_bytes(), 0o755)
    cpio.file("usr/lib/guest.sh", (HERE / "guest.sh").read_bytes())
    cpio.file("agent.sh", (HERE / "agent.sh").read_bytes(), 0o755)
    return cpio


def overlay(script, files=(), cgroup2=False, root=None):
    """The part of one guest: its script and files. files: {guest path: host path or bytes}; a host
    program brings the libraries it needs."""
    cpio = Cpio()
    cpio.file("script.sh", script if isinstance(script, bytes) else script.encode(), 0o755)
    if cgroup2:
        cpio.file("etc/cgroup2", b"")
    if root:
        cpio.file("etc/root", (root + "\n").encode())
    seen = set()
    for guest_path, source in dict(files).items():
        if isinstance(source, bytes):
            cpio.file(guest_path, source, 0o755)
        elif os.access(source, os.X_OK) and Path(source).read_bytes()[:4] == b"\x7fELF":
            _add_program(cpio, source, guest_path, seen)
        else:
            mode = 0o755 if os.access(source, os.X_OK) else 0o644
            cpio.file(guest_path, Path(source).read_bytes(), mode)
    return cpio.bytes()
