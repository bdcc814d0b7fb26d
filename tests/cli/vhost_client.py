"""A vhost-user-blk front-end small enough to read: one split ring, written from QEMU's vhost-user.rst and virtio 1.2.

It shares no code with the daemon, so the CLI tests that need I/O have a client without a guest or a package."""
import mmap
import os
import random
import select
import socket
import struct
import threading

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL = 8, 9, 10, 12, 13
GET_PROTOCOL, SET_PROTOCOL, SET_VRING_ENABLE = 15, 16, 18
VERSION_1, FLUSH, PROTOCOL_FEATURES = 1 << 32, 1 << 9, 1 << 30
REPLY_ACK = 1 << 3
NEXT, WRITE = 1, 2
GUEST = 0x100000000
HEADS, DATA, SIZE = 0x4000, 0x10000, 16 << 20
IN, OUT, FLUSH_REQUEST = 0, 1, 4


class VhostBlk:
    """Up to 64 requests outstanding, one per slot; `length` bytes of data at most 128 KiB each."""
    SLOTS = 64

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.memory_fd = os.memfd_create("vhost-client")
        os.ftruncate(self.memory_fd, SIZE)
        self.memory = mmap.mmap(self.memory_fd, SIZE)
        # The rings' indices, which the daemon reads at any moment: each is one 16-bit store. struct.pack_into is not: it
        # clears the bytes before it writes them, and an index seen as 0 in between is one no driver could have written.
        self.words = memoryview(self.memory).cast("H")
        self.kick, self.call = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        self.last_used = self.next_avail = 0
        features = self._get(GET_FEATURES) & (VERSION_1 | FLUSH | PROTOCOL_FEATURES)
        self._get(GET_PROTOCOL)
        self._send(SET_PROTOCOL, struct.pack("<Q", REPLY_ACK))
        self._send(SET_OWNER, b"")
        self._set(SET_FEATURES, struct.pack("<Q", features))
        self._set(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GUEST, SIZE, GUEST, 0), [self.memory_fd])
        # Descriptors (3 per slot) at 0, the available ring at 0x2000, the used ring at 0x3000; user = guest addresses.
        self._set(SET_VRING_NUM, struct.pack("<II", 0, 256))
        self._set(SET_VRING_BASE, struct.pack("<II", 0, 0))
        self._set(SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, GUEST, GUEST + 0x3000, GUEST + 0x2000, 0))
        self._set(SET_VRING_CALL, struct.pack("<Q", 0), [self.call])
        self._set(SET_VRING_KICK, struct.pack("<Q", 0), [self.kick])
        self._set(SET_VRING_ENABLE, struct.pack("<II", 0, 1))

    def close(self):
        self.socket.close()
        for fd in (self.memory_fd, self.kick, self.call):
            os.close(fd)
        self.words.release()
        self.memory.close()

    def submit(self, slot, kind, sector=0, length=0):
        head, data = HEADS + slot * 64, DATA + slot * (128 << 10)
        struct.pack_into("<IIQ", self.memory, head, kind, 0, sector)
        self.memory[head + 16] = 0xEE
        pieces = [(GUEST + head, 16, 0)]
        if length:
            pieces.append((GUEST + data, length, WRITE if kind == IN else 0))
        pieces.append((GUEST + head + 16, 1, WRITE))
        for i, (address, size, flags) in enumerate(pieces):
            last = i == len(pieces) - 1
            struct.pack_into("<QIHH", self.memory, (slot * 3 + i) * 16, address, size, flags | (0 if last else NEXT),
                             0 if last else slot * 3 + i + 1)
        self.words[(0x2004 + self.next_avail % 256 * 2) // 2] = slot * 3
        self.next_avail = (self.next_avail + 1) % 65536
        self.words[0x2002 // 2] = self.next_avail
        os.eventfd_write(self.kick, 1)

    def wait(self):
        """The slots that have completed since; raises when a status is not OK, the daemon has ended the connection, or
        nothing completes for 30 s."""
        while True:
            done = []
            used = self.words[0x3002 // 2]
            while self.last_used != used:
                slot = struct.unpack_from("<I", self.memory, 0x3004 + self.last_used % 256 * 8)[0] // 3
                self.last_used = (self.last_used + 1) % 65536
                if self.memory[HEADS + slot * 64 + 16] != 0:
                    raise IOError(f"status {self.memory[HEADS + slot * 64 + 16]}")
                done.append(slot)
            if done:
                return done
            ready = self._ready()
            if self.socket in ready:
                raise ConnectionError("the daemon ended the connection")
            os.eventfd_read(self.call)

    def _ready(self):
        for _ in range(3):  # a machine that stood still for a while makes one of them pass
            ready = select.select([self.call, self.socket], [], [], 10)[0]
            if ready:
                return ready
        raise TimeoutError("no completion")

    def _send(self, request, payload, fds=(), flags=1):
        message = struct.pack("<III", request, flags, len(payload)) + payload
        socket.send_fds(self.socket, [message], list(fds))

    def _reply(self):
        head = self._receive(12)
        return self._receive(struct.unpack("<III", head)[2])

    def _receive(self, n):
        data = b""
        while len(data) < n:
            more = self.socket.recv(n - len(data))
            if not more:
                raise ConnectionError("the daemon closed the connection")
            data += more
        return data

    def _get(self, request):
        self._send(request, b"")
        return struct.unpack("<Q", self._reply())[0]

    def _set(self, request, payload, fds=()):
        self._send(request, payload, fds, flags=1 | 8)
        if struct.unpack("<Q", self._reply())[0] != 0:
            raise ConnectionError(f"request {request} was refused")


class Load(threading.Thread):
    """`depth` random requests outstanding until stop(); counts completions."""

    def __init__(self, path, depth, size, length=4096, kind=IN, seed=1):
        super().__init__(daemon=True)
        self.client, self.depth, self.size, self.length, self.kind = VhostBlk(path), depth, size, length, kind
        self.random = random.Random(seed)
        self.stopping = threading.Event()
        self.done = 0
        self.error = None

    def run(self):
        try:
            def again(slot):
                sector = self.random.randrange(self.size // self.length) * self.length // 512
                self.client.submit(slot, self.kind, sector, 0 if self.kind == FLUSH_REQUEST else self.length)
            for slot in range(self.depth):
                again(slot)
            outstanding = self.depth
            while outstanding:
                for slot in self.client.wait():
                    self.done += 1
                    if self.stopping.is_set():
                        outstanding -= 1
                    else:
                        again(slot)
        except (OSError, ValueError) as e:
            self.error = e

    def stop(self):
        self.stopping.set()
        self.join(60)
        self.client.close()
        if self.error is not None:
            raise self.error
