#!/usr/bin/env python3
"""The guests themselves, against Debian's qemu-storage-daemon: a failure here is none of spillwayd's."""
import os
import threading

import harness  # first: it finds the guest package
from guest.daemon import qemu_storage_daemon, sparse
from guest import Guest, VhostUser
from guest.main_job import Worker, make_shared_image


class GuestTest(harness.VmTest):

    def test_main_job_passes_on_a_correct_server(self):
        sha = make_shared_image(self.folder / "shared.img", 16)
        exports = {}
        for name in ("a", "b"):
            exports[f"{name}.sock"] = (sparse(self.folder / f"{name}.img", 384), True)
            exports[f"{name}s.sock"] = (self.folder / "shared.img", False)
        self.started(qemu_storage_daemon(self.folder, exports))
        workers = [Worker(n, self.folder / f"{n}.sock", self.folder / f"{n}s.sock", sha, fs=fs, seed=i)
                   for i, (n, fs) in enumerate((("a", "ext4"), ("b", "xfs")))]
        threads = [threading.Thread(target=self._work, args=(w,)) for w in workers]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for w in workers:
            r = w.report()
            self.assertEqual((r["mismatches"], r["io_errors"], r["fsck_errors"]), (0, 0, 0), r)
            self.assertEqual((r["rounds"], r["shared_reads"]), (2, 2), r)
            self.assertEqual(r["bytes_written"], (2 * 4 * 8 + 8 + 8) << 20)
            self.assertEqual(r["bytes_verified"], (3 * 4 * 8 + 8 + 2 * 16) << 20)

    def _work(self, worker):
        self.started(worker)
        worker.setup()
        for k in (1, 2):
            worker.round(k)
            worker.shared()
        worker.unflushed(8)
        worker.flush()
        worker.finish()

    def test_a_lost_write_is_noticed(self):
        image = sparse(self.folder / "a.img", 256)
        self.started(qemu_storage_daemon(self.folder, {"a.sock": (image, True)}))
        worker = self.started(Worker("lost", self.folder / "a.sock", None, "-", files=1, mib=8))
        worker.setup()
        worker.unflushed(8)
        # One sector of the held file goes back to zeros behind the guest's back.
        seed, sector = 1 * 1000000 + 999 * 1000 + 1, (5 << 20) // 512
        word = (sector * 0x9e3779b97f4a7c15 ^ seed * 0xc2b2ae3d27d4eb4f) & (1 << 64) - 1
        data = image.read_bytes()
        at = data.find(word.to_bytes(8, "little"))
        self.assertGreater(at, 0)
        self.assertEqual(at % 512, 0)
        fd = os.open(image, os.O_WRONLY)
        os.pwrite(fd, bytes(512), at)
        os.close(fd)
        worker.flush()
        report = worker.report()
        self.assertEqual((report["mismatches"], report["io_errors"]), (1, 0), report)

    def test_two_nodes_with_cgroup2(self):
        guest = self.started(Guest("numa", numa=2, smp=2, cgroup2=True, files={"/t/true": "/bin/true"}))
        self.assertEqual(guest.run("ls -d /sys/devices/system/node/node? | wc -l"), "2")
        self.assertIn("memory", guest.run("cat /sys/fs/cgroup/cgroup.subtree_control"))
        guest.run("mkdir /sys/fs/cgroup/x && echo 64M >/sys/fs/cgroup/x/memory.high && /t/true")

    def test_commands_run_side_by_side(self):
        disk = sparse(self.folder / "a.img", 64)
        self.started(qemu_storage_daemon(self.folder, {"a.sock": (disk, True)}))
        guest = self.started(Guest("bg", [VhostUser(str(self.folder / "a.sock"), queues=2)], smp=2))
        first = guest.spawn("while [ ! -e /tmp/go ]; do usleep 50000; done; echo went; exit 3")
        self.assertEqual(guest.run("echo one; echo two"), "one\ntwo")
        self.assertEqual(guest.run("touch /tmp/go; false", check=False), (1, ""))
        self.assertEqual(guest.join(first), (3, "went"))
        self.assertEqual(guest.run("blockdev --getsize64 /dev/vda"), str(64 << 20))


if __name__ == "__main__":
    harness.main()
