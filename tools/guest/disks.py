"""What can be plugged into a guest, each as QEMU arguments.

arguments(number, new_qemu): number is the place in the guest's list (the device's id is disk<number>);
new_qemu says that it is Debian 13's QEMU 11 and not Debian 12's 7.2.
"""
import json
import os
from dataclasses import dataclass, field


def options(head, pairs):
    """head,key=value,... with on/off for truth values; keys as QEMU spells them; None leaves out."""
    words = [head]
    for key, value in pairs.items():
        if value is not None:
            value = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            words.append(f"{key}={value}")
    return ",".join(words)


@dataclass
class VhostUser:
    """A vhost-user-blk disk of the server behind `socket`. properties: further ones of the device."""
    socket: str
    queues: int = 1
    queue_size: int = 128
    reconnect: bool = True
    properties: dict = field(default_factory=dict)

    def arguments(self, number, new_qemu):
        again = {}
        if self.reconnect:
            # 7.2 counts in seconds only, 11 in milliseconds only.
            again = {"reconnect-ms": 200} if new_qemu else {"reconnect": 1}
        chardev = options("socket", {"id": f"vub{number}", "path": self.socket, **again})
        device = options("vhost-user-blk-pci", {
            "id": f"disk{number}", "chardev": f"vub{number}", "num-queues": self.queues,
            "queue-size": self.queue_size, **self.properties})
        return ["-chardev", chardev, "-device", device]


@dataclass
class File:
    """QEMU's own virtio-blk on an image file: the disk to compare with, or to put data in a guest."""
    path: str
    readonly: bool = False
    format: str = "raw"
    cache: str = "writeback"
    properties: dict = field(default_factory=dict)

    def arguments(self, number, new_qemu):
        drive = options("if=none", {
            "id": f"drv{number}", "file": self.path, "format": self.format, "cache": self.cache,
            "readonly": self.readonly, "discard": "unmap"})
        device = options("virtio-blk-pci", {"id": f"disk{number}", "drive": f"drv{number}",
                                            **self.properties})
        return ["-drive", drive, "-device", device]


@dataclass
class QemuPmem:
    """QEMU's own virtio-pmem on a file (for instance one on Spillway's FUSE mount)."""
    path: str
    size: int = 0
    readonly: bool = False

    def memory(self):
        return self.size or os.stat(self.path).st_size

    def arguments(self, number, new_qemu):
        backend = options("memory-backend-file", {
            "id": f"pmem{number}", "mem-path": self.path, "size": self.memory(), "share": True,
            "readonly": self.readonly or None})
        return ["-object", backend, "-device", f"virtio-pmem-pci,id=disk{number},memdev=pmem{number}"]


@dataclass
class VfioUser:
    """A vfio-user PCI device (needs qemu="trixie")."""
    socket: str
    properties: dict = field(default_factory=dict)

    def arguments(self, number, new_qemu):
        return ["-device", json.dumps({
            "driver": "vfio-user-pci", "id": f"disk{number}",
            "socket": {"type": "unix", "path": self.socket}, **self.properties})]


@dataclass
class Raw:
    """QEMU arguments as they are, for what has no class here."""
    words: list

    def arguments(self, number, new_qemu):
        return list(self.words)
