"""What the virtio-pmem guest tests share (issue 7): the daemon, the program pmem_guest.c, and guests."""
import subprocess
import threading
from pathlib import Path

import harness  # first: it finds the guest package
from guest import Guest
from guest.daemon import Daemon, sparse

HERE = Path(__file__).resolve().parent
DISK = """
[disk.{name}]
path = "{name}.img"
"""
EXPORT = """
[export.{name}]
device = "virtio-pmem"
volume = "{volume}"
group = "t"
socket = "{name}.sock"
file = "{name}.pmem"
trim_socket = "{name}-trim.sock"
"""


def config(volumes, more=""):
    """Disks d<N> of the names in `volumes` as exports vm<N>."""
    text = '[group.t]\nweight = 100\n' + more
    for number, name in enumerate(volumes, 1):
        text += DISK.format(name=name) + EXPORT.format(name=f"vm{number}", volume=name)
    return text


class PmemTest(harness.VmTest):
    mib = (256, )  # a disk and an export for each: d1 and vm1, ...
    more = ""

    def setUp(self):
        super().setUp()
        names = [f"d{n}" for n in range(1, len(self.mib) + 1)]
        for name, mib in zip(names, self.mib):
            sparse(self.folder / f"{name}.img", mib)
        self.tool = self.folder / "pmem_guest"
        subprocess.run(["cc", "-static", "-O2", "-o", self.tool, HERE / "pmem_guest.c"], check=True)
        sockets = [f"vm{n}{end}" for n in range(1, len(self.mib) + 1) for end in (".sock", "-trim.sock")]
        self.daemon = self.started(Daemon(self.folder, config(names, self.more), sockets))

    def guest(self, disks, **options):
        files = {"/bin/pg": self.tool, **options.pop("files", {})}
        options = {"kernel": "trixie", "qemu": "trixie", "memory": 512, "files": files, **options}
        return self.started(Guest("pm", disks, **options))

    def up(self, g, count=1):
        """Waits for the guest's pmem disks."""
        g.run("modprobe virtio_pmem; modprobe nd_pmem; for i in 1 2 3 4 5 6 7 8 9 10; do "
              f"[ -b /dev/pmem{count - 1} ] && break; sleep 0.3; done; [ -b /dev/pmem{count - 1} ]")

    def mounted(self, g, disk, where, make):
        """Makes the file system and mounts it for direct access."""
        kind = make.split()[0].removeprefix("mkfs.")
        g.run(f"{make} {disk} && mkdir -p {where} && mount -t {kind} -o dax=always {disk} {where} && sync")

    def sock(self, name):
        return str(self.folder / name)

    def zero_wrong(self, status, text):
        self.assertEqual((status, text.split()[:2]), (0, ["wrong", "0"]), text)

    def shrinker(self):
        """The pmem shrinker as the status shows it."""
        return next(s for s in self.daemon.status()["reclaim"]["shrinkers"] if s["name"].startswith("pmem"))


class Evictor:
    """Has the daemon take memory back all the time, until stop()."""

    def __init__(self, daemon):
        self.daemon, self.freed, self.passes, self.error = daemon, 0, 0, None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            while not self._end.is_set():
                self.freed += self.daemon.call("reclaim")["freed_bytes"]
                self.passes += 1
        except Exception as e:  # pylint: disable=broad-except
            self.error = e

    def stop(self):
        self._end.set()
        self._thread.join()
        if self.error:
            raise self.error


MAKE = {"ext4": "mkfs.ext4 -q -b 4096", "xfs": "mkfs.xfs -f -q -m reflink=0"}
__all__ = ["PmemTest", "Evictor", "MAKE", "config"]
