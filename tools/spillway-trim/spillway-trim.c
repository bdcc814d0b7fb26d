/* spillway-trim: gives the free space of a file system on virtio-pmem back to the host, while it runs (P7).
 *
 * virtio-pmem has no discard. So: take the free space for ourselves (fallocate of a nameless file), ask the file
 * system where it lies (FIEMAP), discard exactly those ranges through the companion disk of the same volume, close the
 * file. As long as we hold it nobody else can be given these blocks, so there is no race and nothing stands still.
 * A reserve is left, so that writers running beside do not see a full disk. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { kOk, kFailed, kUsage };
static const uint64_t kMiB = 1 << 20;
static const uint64_t kPieceMin = 1 << 20, kPieceMax = 1 << 30, kAlign = 4096;

static int failed(const char *what) {
  fprintf(stderr, "spillway-trim: %s: %s\n", what, strerror(errno));
  return kFailed;
}

static int read_text(const char *path, char *out, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t n = read(fd, out, size - 1);
  close(fd);
  if (n < 0) return -1;
  out[n] = 0;
  out[strcspn(out, "\n")] = 0;
  return 0;
}

/* Where the file system's device begins on its disk, and how long that disk is; both in bytes. */
static int place_of(dev_t dev, uint64_t *start, uint64_t *disk) {
  char path[160], text[64];
  snprintf(path, sizeof path, "/sys/dev/block/%u:%u/partition", major(dev), minor(dev));
  const int part = access(path, F_OK) == 0;
  snprintf(path, sizeof path, "/sys/dev/block/%u:%u/start", major(dev), minor(dev));
  *start = part && read_text(path, text, sizeof text) == 0 ? strtoull(text, 0, 10) * 512 : 0;
  snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%ssize", major(dev), minor(dev), part ? "../" : "");
  if (read_text(path, text, sizeof text) != 0) return -1;
  *disk = strtoull(text, 0, 10) * 512;
  return 0;
}

/* Nothing but the companion of this very volume may be discarded: same size, and a serial that says so. */
static int check_companion(const char *path, const struct stat *st, uint64_t size, uint64_t disk, int force) {
  char name[160], serial[64] = "";
  snprintf(name, sizeof name, "/sys/dev/block/%u:%u/serial", major(st->st_rdev), minor(st->st_rdev));
  (void)read_text(name, serial, sizeof serial);
  if (size != disk) {
    fprintf(stderr, "spillway-trim: %s has %llu bytes, the pmem disk %llu: not its companion\n", path,
            (unsigned long long)size, (unsigned long long)disk);
    return -1;
  }
  const size_t n = strlen(serial);
  if (!force && n != 0 && (n < 5 || strcmp(serial + n - 5, "-trim") != 0)) {
    fprintf(stderr, "spillway-trim: %s has the serial '%s': not a trim disk (--force overrides)\n", path, serial);
    return -1;
  }
  return 0;
}

static int discard_file(int file, int disk, uint64_t start, uint64_t *bytes) {
  const unsigned count = 256;
  struct fiemap *map = calloc(1, sizeof *map + count * sizeof *map->fm_extents);
  if (!map) return -1;
  int last = 0, result = 0;
  uint64_t at = 0;
  while (!last && result == 0) {
    memset(map, 0, sizeof *map);
    map->fm_start = at;
    map->fm_length = FIEMAP_MAX_OFFSET - at;
    map->fm_extent_count = count;
    map->fm_flags = FIEMAP_FLAG_SYNC;
    if (ioctl(file, FS_IOC_FIEMAP, map) != 0) { result = -1; break; }
    if (map->fm_mapped_extents == 0) break;
    for (unsigned i = 0; i < map->fm_mapped_extents; ++i) {
      const struct fiemap_extent *e = &map->fm_extents[i];
      last = (e->fe_flags & FIEMAP_EXTENT_LAST) != 0;
      at = e->fe_logical + e->fe_length;
      const uint32_t unfit = FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC | FIEMAP_EXTENT_ENCODED |
                             FIEMAP_EXTENT_NOT_ALIGNED | FIEMAP_EXTENT_DATA_INLINE | FIEMAP_EXTENT_SHARED;
      if (e->fe_flags & unfit) continue;
      const uint64_t from = (start + e->fe_physical + kAlign - 1) / kAlign * kAlign;
      const uint64_t to = (start + e->fe_physical + e->fe_length) / kAlign * kAlign;
      if (from >= to) continue;
      uint64_t range[2] = {from, to - from};
      if (ioctl(disk, BLKDISCARD, range) != 0) { result = -1; break; }
      *bytes += to - from;
    }
  }
  free(map);
  return result;
}

static int usage(void) {
  fputs("usage: spillway-trim [--force] [--reserve MIB] MOUNTPOINT TRIM-DISK\n"
        "Discards the free space of the file system at MOUNTPOINT through the companion disk of its pmem device.\n"
        "--reserve MIB  free space left untouched for others (default 2 %, at least 8)\n", stderr);
  return kUsage;
}

int main(int argc, char **argv) {
  int force = 0;
  uint64_t reserve = 0;
  const char *where[2] = {0, 0};
  for (int i = 1, n = 0; i < argc; ++i) {
    if (!strcmp(argv[i], "--force")) force = 1;
    else if (!strcmp(argv[i], "--reserve") && i + 1 < argc) reserve = strtoull(argv[++i], 0, 10) * kMiB;
    else if (argv[i][0] == '-' || n == 2) return usage();
    else where[n++] = argv[i];
  }
  if (!where[1]) return usage();
  const int root = open(where[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (root < 0) return failed(where[0]);
  const int disk = open(where[1], O_WRONLY | O_CLOEXEC);
  if (disk < 0) return failed(where[1]);
  struct stat fs, st;
  uint64_t size = 0, start = 0, whole = 0;
  if (fstat(root, &fs) || fstat(disk, &st) || ioctl(disk, BLKGETSIZE64, &size)) return failed(where[1]);
  if (place_of(fs.st_dev, &start, &whole)) return failed("no block device behind the mount point");
  if (check_companion(where[1], &st, size, whole, force)) return kFailed;
  struct statvfs free_space;
  if (fstatvfs(root, &free_space)) return failed(where[0]);
  uint64_t left = (uint64_t)free_space.f_bavail * free_space.f_frsize;
  if (reserve == 0) reserve = left / 50 > 8 * kMiB ? left / 50 : 8 * kMiB;
  left = left > reserve ? left - reserve : 0;
  const int file = openat(root, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) return failed("a temporary file");
  uint64_t taken = 0, piece = kPieceMax, bytes = 0;
  while (left >= kPieceMin && piece >= kPieceMin) {
    const uint64_t now = piece < left ? piece : left / kAlign * kAlign;
    if (fallocate(file, 0, (off_t)taken, (off_t)now) == 0) {
      taken += now;
      left -= now;
    } else if (errno == ENOSPC) {
      piece = now / 2;
    } else if (errno != EINTR) {
      return failed("fallocate");
    }
  }
  /* The allocation must be stable before its blocks lose what was in them: after a crash they belong to nobody. */
  if (fsync(file)) return failed("fsync");
  if (discard_file(file, disk, start, &bytes)) return failed("discard");
  printf("%llu bytes discarded\n", (unsigned long long)bytes);
  return kOk;
}
