"""Debian guests for Spillway's runs and tests. Python standard library only; see README.md."""
from .disks import File, QemuPmem, Raw, VfioUser, VhostUser
from .vm import Guest, GuestError

__all__ = ["Guest", "GuestError", "VhostUser", "File", "QemuPmem", "VfioUser", "Raw"]
