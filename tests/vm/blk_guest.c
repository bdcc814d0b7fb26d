/* What full_blk_test.py runs in the guest (static).
 *   fsx FILE OPS SEED            random operations on one file against a model in memory: write, read, mmap, O_DIRECT, truncate,
 *                                punch, zero range, fsync, dropped page cache; prints "ok" or what differs
 *   tree DIR OPS SEED            random creates, renames, links, removes below DIR, some synced; prints "ok"
 *   punch DEVICE OFFSET BYTES    fallocate(punch hole): write zeroes with unmap; prints "ok"
 *   dio MAP DEVICE OFFSET MIB    O_DIRECT from and to a shared mapping of MAP; prints "wrote E1 read E2 wrong N" (E: errno's
 *                                name or ok)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static uint64_t state;
static uint64_t next(void) {
  state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state;
}
static void die(const char *what, long op) {
  printf("failed: %s: %s (operation %ld)\n", what, strerrorname_np(errno), op);
  exit(1);
}

enum { kMax = 4 << 20, kSpan = 256 << 10 };
static uint8_t model[kMax], *buffer;
static long size;

static void compare(const uint8_t *got, long at, long n, long op, const char *how) {
  for (long i = 0; i < n; ++i)
    if (got[i] != model[at + i]) {
      printf("differs: byte %ld is %02x, not %02x (%s of %ld at %ld, operation %ld)\n", at + i, got[i], model[at + i], how,
             n, at, op);
      exit(1);
    }
}
static void scribble(uint8_t *to, long n) {
  for (long i = 0; i < n; i += 8) {
    const uint64_t v = next();
    memcpy(to + i, &v, n - i < 8 ? (size_t)(n - i) : 8);
  }
}

static int fsx(const char *path, long ops) {
  int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), direct = open(path, O_RDWR | O_DIRECT);
  if (fd < 0 || direct < 0) die("open", 0);
  for (long op = 1; op <= ops; ++op) {
    const int what = (int)(next() % 20);
    long at = (long)(next() % kMax), n = 1 + (long)(next() % kSpan);
    if (at + n > kMax) n = kMax - at;
    if (what < 5) {  /* write */
      scribble(buffer, n);
      if (pwrite(fd, buffer, (size_t)n, at) != n) die("write", op);
      memcpy(model + at, buffer, (size_t)n);
      if (at + n > size) size = at + n;
    } else if (what < 7) {  /* O_DIRECT write, whole blocks */
      at &= ~4095L, n = (n + 4095) & ~4095L;
      if (at + n > kMax) continue;
      scribble(buffer, n);
      if (pwrite(direct, buffer, (size_t)n, at) != n) die("direct write", op);
      memcpy(model + at, buffer, (size_t)n);
      if (at + n > size) size = at + n;
    } else if (what < 12) {  /* read */
      if (at >= size) continue;
      if (at + n > size) n = size - at;
      if (pread(fd, buffer, (size_t)n, at) != n) die("read", op);
      compare(buffer, at, n, op, "read");
    } else if (what < 14) {  /* O_DIRECT read */
      at &= ~4095L, n &= ~4095L;
      if (n == 0 || at >= size) continue;
      const long want = at + n > size ? size - at : n;
      if (pread(direct, buffer, (size_t)n, at) != want) die("direct read", op);
      compare(buffer, at, want, op, "direct read");
    } else if (what == 14) {  /* mapping: write and read */
      if (at >= size) continue;
      if (at + n > size) n = size - at;
      uint8_t *p = mmap(0, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      if (p == MAP_FAILED) die("mmap", op);
      compare(p + at, at, n, op, "mapped read");
      scribble(buffer, n);
      memcpy(p + at, buffer, (size_t)n);
      memcpy(model + at, buffer, (size_t)n);
      if (next() % 2 && msync(p, (size_t)size, MS_SYNC)) die("msync", op);
      munmap(p, (size_t)size);
    } else if (what == 15) {  /* truncate either way */
      if (ftruncate(fd, at)) die("truncate", op);
      if (at < size) memset(model + at, 0, (size_t)(size - at));
      size = at;
    } else if (what == 16) {  /* punch */
      if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, n)) die("punch", op);
      memset(model + at, 0, (size_t)n);
    } else if (what == 17) {  /* zero */
      if (fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, at, n)) die("zero range", op);
      memset(model + at, 0, (size_t)n);
    } else {  /* on the disk, and read from there again */
      if (fsync(fd)) die("fsync", op);
      if (what == 19 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)) die("fadvise", op);
    }
  }
  if (fsync(fd)) die("fsync", ops);
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  struct stat st;
  if (fstat(fd, &st) || st.st_size != size) die("size", ops);
  for (long at = 0; at < size; at += kSpan) {
    const long n = at + kSpan > size ? size - at : kSpan;
    if (pread(fd, buffer, (size_t)n, at) != n) die("read", ops);
    compare(buffer, at, n, ops, "last read");
  }
  puts("ok");
  return 0;
}

static int tree(const char *dir, long ops) {
  if (chdir(dir)) die("chdir", 0);
  char a[64], b[64];
  for (long op = 1; op <= ops; ++op) {
    snprintf(a, sizeof a, "d%d/f%d", (int)(next() % 8), (int)(next() % 40));
    snprintf(b, sizeof b, "d%d/f%d", (int)(next() % 8), (int)(next() % 40));
    const int what = (int)(next() % 10);
    int r = 0;
    if (what < 4) {
      int fd = open(a, O_RDWR | O_CREAT | (what == 0 ? O_TRUNC : 0), 0600);
      if (fd >= 0) {
        const long n = (long)(next() % kSpan);
        scribble(buffer, n);
        if (pwrite(fd, buffer, (size_t)n, (off_t)(next() % kSpan)) != n) die("write", op);
        if (next() % 8 == 0 && fsync(fd)) die("fsync", op);
        close(fd);
      } else {
        r = -1;
      }
    } else if (what < 6) r = rename(a, b);
    else if (what == 6) r = link(a, b);
    else if (what == 7) r = unlink(a);
    else if (what == 8) r = symlink(a, b);
    else {
      a[2] = 0;
      r = next() % 4 ? mkdir(a, 0700) : rmdir(a);
    }
    if (r != 0 && (errno == EIO || errno == ENOSPC || errno == EROFS)) die("operation", op);
  }
  sync();
  puts("ok");
  return 0;
}

static int dio(const char *file, const char *device, long offset, long bytes) {
  int m = open(file, O_RDWR | O_CREAT, 0600), d = open(device, O_RDWR | O_DIRECT);
  if (m < 0 || d < 0 || ftruncate(m, bytes)) die("open", 0);
  uint8_t *p = mmap(0, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m, 0);
  if (p == MAP_FAILED) die("mmap", 0);
  const char *wrote = "ok", *read_back = "ok";
  long wrong = 0;
  for (long at = 0; at < bytes; at += 65536) {
    scribble(p + at, 65536);
    memcpy(model, p + at, 65536);
    if (pwrite(d, p + at, 65536, offset + at) != 65536) wrote = strerrorname_np(errno);
    memset(p + at, 0x55, 65536);
    if (pread(d, p + at, 65536, offset + at) != 65536) read_back = strerrorname_np(errno);
    else wrong += memcmp(model, p + at, 65536) != 0;
  }
  printf("wrote %s read %s wrong %ld\n", wrote, read_back, wrong);
  return 0;
}

static int punch(const char *device, long offset, long bytes) {
  const int fd = open(device, O_RDWR);
  if (fd < 0 || fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes) || fsync(fd)) die("punch", 0);
  puts("ok");
  return 0;
}

int main(int argc, char **argv) {
  if (argc < 5) return 2;
  buffer = aligned_alloc(4096, kMax);
  state = 0x9e3779b97f4a7c15ULL * (strtoull(argv[4], 0, 0) + 1);
  const long number = strtol(argv[3], 0, 0);
  if (!strcmp(argv[1], "fsx")) return fsx(argv[2], number);
  if (!strcmp(argv[1], "tree")) return tree(argv[2], number);
  if (!strcmp(argv[1], "punch")) return punch(argv[2], number, strtol(argv[4], 0, 0));
  if (!strcmp(argv[1], "dio") && argc == 6) return dio(argv[2], argv[3], strtol(argv[4], 0, 0), strtol(argv[5], 0, 0) << 20);
  return 2;
}
