"""A Debian guest under QEMU that a program on the host drives.

States: new -> start() -> running -> stop(), or off by itself. One thread reads the protocol line and one
waits for QEMU; every public function may be called from any thread. QEMU dies with this process.
"""
import base64
import concurrent.futures
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from . import debs, image, kernels, trixie
from .disks import VhostUser

HOST_QEMU = "/usr/bin/qemu-system-x86_64"
# PR_SET_PDEATHSIG fires when the *thread* that forked ends, so one thread that stays forks them all.
_spawner = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="qemu-spawner")
_libc = ctypes.CDLL(None)


class GuestError(RuntimeError):
    """The guest did not do what was asked; the message ends with the tail of its console."""


def _die_with_parent():
    _libc.prctl(1, signal.SIGKILL)


class Guest:
    """One guest. See README.md for an example.

    disks      VhostUser, File, QemuPmem, VfioUser or Raw; a str is the socket of a VhostUser
    script     text run by busybox sh as the guest's only task; without one an agent that serves run()
    files      {path in the guest: path on the host, or bytes}; programs bring their libraries
    tools      groups of image.TOOLS or names of programs of this machine
    modules    kernel modules to carry beyond kernels.CARRIED (`modprobe NAME` loads them)
    kernel     "bookworm" (6.1, cloud), "bookworm-generic" (6.1) or "trixie" (6.12, cloud)
    qemu       "host" (7.2), "trixie" (11), or the path of a program
    memory     MiB; numa: number of nodes that memory and CPUs are split over
    cgroup2    mounts cgroup v2 with all controllers at /sys/fs/cgroup
    root       "DEVICE TYPE OPTIONS", as "/dev/pmem0 ext4 dax": go on from there (image.root_image made it)
    launcher   words in front of QEMU's command line
    env        extra environment of QEMU
    """

    def __init__(self, name, disks=(), script=None, *, files=(), tools=image.DEFAULT_TOOLS, modules=(),
                 kernel="bookworm", qemu="host", memory=384, smp=1, numa=1, cgroup2=False, accel=None, cpu="max",
                 append="", machine="q35", machine_options="", extra=(), launcher=(), env=(),
                 folder=None, reboot=False, root=None):
        self.name = name
        self.disks = [VhostUser(d) if isinstance(d, (str, Path)) else d for d in disks]
        self.memory, self.smp, self.numa = memory, smp, numa
        self.machine, self.machine_options = machine, machine_options
        self.append, self.extra, self.launcher = append, list(extra), list(launcher)
        self.env, self.reboot, self.accel, self.cpu = dict(env), reboot, accel, cpu
        self._kernel = kernels.kernel(kernel)
        self._new_qemu = qemu == "trixie" or "trixie" in str(qemu)
        self.qemu = {"host": HOST_QEMU}.get(qemu) or (trixie.qemu() if qemu == "trixie" else qemu)
        self._base = image.base(self._kernel, tools, modules)
        self._overlay = image.overlay(script or ". /agent.sh", files, cgroup2, root)
        self._own_folder = folder is None
        self.folder = Path(folder or tempfile.mkdtemp(prefix=f"spillway-{name}-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console_log = self.folder / "console.log"
        self.lines = []          # every protocol line so far, without "@@ "
        self._news = threading.Condition()
        self._process = None
        self._finished = False   # protocol line closed: nothing more will come
        self._control = self._qmp = None
        self._next_id = 0

    # -- life ------------------------------------------------------------------------------------

    def start(self, timeout=120):
        """Starts QEMU and waits for the guest's init. Returns self."""
        accel = self.accel or best_accel(self.qemu)
        initrd = self.folder / "initrd"
        with open(initrd, "wb") as out, open(self._base, "rb") as base:
            shutil.copyfileobj(base, out)
            out.write(b"\0" * (-out.tell() % 4))
            out.write(self._overlay)
        listeners = {}
        for end in ("ctl", "qmp"):
            path = self.folder / f"{end}.sock"
            path.unlink(missing_ok=True)
            listeners[end] = socket.socket(socket.AF_UNIX)
            listeners[end].bind(str(path))
            listeners[end].listen(1)
            listeners[end].settimeout(timeout)
        self.command = [*self.launcher, str(self.qemu), *self._arguments(accel, initrd)]
        (self.folder / "command").write_text(" ".join(self.command) + "\n")
        errors = open(self.folder / "qemu.log", "wb")
        env = {**os.environ, **self.env}
        self._process = _spawner.submit(
            subprocess.Popen, self.command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            preexec_fn=_die_with_parent, env=env).result()
        errors.close()
        threading.Thread(target=self._reap, daemon=True).start()
        try:
            self._qmp = _Qmp(self._accept(listeners["qmp"], timeout))
            self._control = self._accept(listeners["ctl"], timeout)
        except (OSError, ValueError):
            self._process.wait(10)
            raise self._error("QEMU ended at once") from None
        finally:
            for listener in listeners.values():
                listener.close()
        threading.Thread(target=self._read, args=(self._control,), daemon=True).start()
        self.wait_for("booted", timeout)
        initrd.unlink()
        return self

    def stop(self):
        """Ends QEMU at once (a guest's power cut) and removes the temporary folder."""
        if self._process and self._process.poll() is None:
            self._process.kill()
        if self._process:
            self._process.wait()
        for end in (self._control, self._qmp):
            if end:
                end.close()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    @property
    def pid(self):
        """QEMU's process id."""
        return self._process.pid

    def alive(self):
        return self._process is not None and self._process.poll() is None

    def wait_off(self, timeout=120):
        """Waits for the guest to power off; returns QEMU's exit status."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._error(f"still running after {timeout} s") from None

    # -- protocol --------------------------------------------------------------------------------

    def send(self, line):
        """One line to the guest's script (`hear`, `await`)."""
        self._control.sendall(line.encode() + b"\n")

    def wait_for(self, prefix, timeout=120, after=0):
        """Waits for a protocol line equal to `prefix` or starting with it and a space; returns the rest
        of the line. Looks at lines from number `after` on (see mark()). A line "fail ..." raises."""
        deadline = time.monotonic() + timeout
        seen = after
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if line == prefix or line.startswith(prefix + " "):
                        return line[len(prefix) + 1:]
                    if line.startswith("fail "):
                        raise self._error(line)
                seen = len(self.lines)
                if self._finished or not self.alive():
                    self._news.wait(0.2)
                    if len(self.lines) > seen:
                        continue
                    raise self._error(f"went off before it said '{prefix}'")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._error(f"did not say '{prefix}' within {timeout} s")
                self._news.wait(left)

    def mark(self):
        """The number of lines so far, for wait_for(after=)."""
        return len(self.lines)

    def values(self, key):
        """The values of all lines `@@ key value` so far."""
        return [l[len(key) + 1:] for l in list(self.lines) if l.startswith(key + " ")]

    def spawn(self, command):
        """Starts a shell command in the guest (agent only); returns an id for join()."""
        return self._order("bg", command)

    def join(self, ident, timeout=120):
        """Waits for a spawned command; returns (status, output)."""
        status = int(self.wait_for(f"rc {ident}", timeout))
        prefix = f"out {ident} "
        return status, "\n".join(l[len(prefix):] for l in list(self.lines) if l.startswith(prefix))

    def run(self, command, timeout=120, check=True):
        """Runs a shell command in the guest (agent only) and returns its output; check: a status other
        than 0 raises."""
        status, output = self.join(self._order("run", command), timeout)
        if check and status:
            raise self._error(f"command failed ({status}): {command}\n{output}")
        return output if check else (status, output)

    def _order(self, verb, command):
        with self._news:
            self._next_id += 1
            ident = self._next_id
        self.send(f"{verb} {ident} {base64.b64encode(command.encode()).decode()}")
        return ident

    def qmp(self, command, **arguments):
        """A QMP command to QEMU; returns its answer."""
        return self._qmp.execute(command, arguments)

    def console(self, tail=15):
        """The end of the guest's console."""
        try:
            text = self.console_log.read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        return "\n".join(text.splitlines()[-tail:])

    # -- inside ----------------------------------------------------------------------------------

    def _arguments(self, accel, initrd):
        cpu = "host" if accel == "kvm" else self.cpu
        # QEMU 7.2 lets about one in seven boots of a 6.12 kernel on several CPUs crash while the kernel
        # patches its own code; on one TCG thread it does not happen.
        racy = self.smp > 1 and not self._new_qemu and self._kernel.version.startswith("6.12")
        threads = "single" if racy else "multi"
        how = "kvm" if accel == "kvm" else f"tcg,thread={threads},tb-size=128"
        words = f"console=ttyS0 8250.nr_uarts=2 mitigations=off no_timer_check panic=-1 {self.append}"
        args = ["-name", f"{self.name},process={self.name[:15]}", "-nodefaults", "-no-user-config",
                "-display", "none", "-accel", how, "-cpu", cpu, "-smp", str(self.smp)]
        if not self.reboot:
            args.append("-no-reboot")
        args += self._memory_arguments()
        args += ["-kernel", str(self._kernel.image), "-initrd", str(initrd), "-append", words,
                 "-chardev", f"file,id=con,path={self.console_log}", "-serial", "chardev:con",
                 "-chardev", f"socket,id=ctl,path={self.folder}/ctl.sock", "-serial", "chardev:ctl",
                 "-chardev", f"socket,id=qmp,path={self.folder}/qmp.sock",
                 "-mon", "chardev=qmp,mode=control"]
        for number, disk in enumerate(self.disks):
            args += disk.arguments(number, self._new_qemu)
        return args + self.extra

    def _memory_arguments(self):
        size = self.memory << 20
        pluggable = sum(d.memory() for d in self.disks if hasattr(d, "memory"))
        memory = f"{self.memory}M"
        if pluggable:
            # The device memory area has to hold each region aligned to its own size.
            memory += f",slots=8,maxmem={size + 2 * pluggable + (1 << 30)}"
        machine = ",".join(filter(None, [self.machine, self.machine_options]))
        backend = "memory-backend-memfd,share=on"
        if self.numa == 1:
            return ["-m", memory, "-object", f"{backend},id=mem,size={size}",
                    "-machine", f"{machine},memory-backend=mem"]
        args = ["-m", memory, "-machine", machine]
        for node in range(self.numa):
            first, last = (node * self.smp // self.numa, (node + 1) * self.smp // self.numa - 1)
            cpus = f",cpus={first}-{last}" if last >= first else ""
            args += ["-object", f"{backend},id=mem{node},size={size // self.numa}",
                     "-numa", f"node,nodeid={node},memdev=mem{node}{cpus}"]
        return args

    def _accept(self, listener, timeout):
        """QEMU connects to us; if it ends before, its own message is the reason."""
        deadline = time.monotonic() + timeout
        listener.settimeout(0.2)
        while True:
            try:
                return listener.accept()[0]
            except socket.timeout:
                if not self.alive():
                    raise self._error("QEMU ended at once") from None
                if time.monotonic() > deadline:
                    raise self._error("QEMU did not connect") from None

    def _read(self, control):
        rest = b""
        control.settimeout(None)
        while True:
            try:
                data = control.recv(65536)
            except OSError:
                data = b""
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            with self._news:
                for line in whole:
                    line = line.decode(errors="replace").rstrip("\r")
                    if line.startswith("@@ "):
                        self.lines.append(line[3:])
                self._news.notify_all()
        with self._news:
            self._finished = True
            self._news.notify_all()

    def _reap(self):
        self._process.wait()
        with self._news:
            self._news.notify_all()

    def _error(self, text):
        try:
            log = (self.folder / "qemu.log").read_text(errors="replace").strip()[-1000:]
        except OSError:
            log = ""
        said = "\n".join("@@ " + l for l in self.lines[-10:])
        return GuestError(f"guest {self.name}: {text}\n-- qemu: {log}\n-- said:\n{said}\n"
                          f"-- console:\n{self.console()}")


class _Qmp:
    """The smallest QMP client: one command at a time."""

    def __init__(self, sock):
        sock.settimeout(60)
        self._sock, self._file, self._lock = sock, sock.makefile("rw"), threading.Lock()
        json.loads(self._file.readline())
        self.execute("qmp_capabilities", {})

    def execute(self, command, arguments):
        with self._lock:
            self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self._file.flush()
            while True:
                line = self._file.readline()
                if not line:
                    raise GuestError(f"qmp {command}: QEMU closed the line")
                answer = json.loads(line)
                if "error" in answer:
                    raise GuestError(f"qmp {command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]

    def close(self):
        self._sock.close()


def best_accel(qemu=HOST_QEMU):
    """"kvm" where a stock kernel really boots with it here, else "tcg". Tried once per host boot."""
    if os.environ.get("SPILLWAY_ACCEL"):
        return os.environ["SPILLWAY_ACCEL"]
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    answer = debs.cache_dir() / f"accel-{Path(qemu).resolve().parent.as_posix().replace('/', '_')}"
    with debs.locked("accel"):
        if answer.exists() and answer.read_text().split()[0] == boot:
            return answer.read_text().split()[1]
        probe = Guest("kvm-probe", script="true", qemu=qemu, accel="kvm", memory=256)
        try:
            probe.start(timeout=8)
            found = "kvm"
        except GuestError:
            found = "tcg"
        finally:
            probe.stop()
        answer.write_text(f"{boot} {found}\n")
        return found
