/* What the pmem tests run in the guest. Built static by full_pmem_test.py.
 *   mapsync FILE           prints ok or the errno's name of mmap(MAP_SYNC) (P2)
 *   fill FILE MIB SEED     writes a pattern through a shared mapping, msync; prints filled
 *   check FILE MIB SEED    prints "wrong N"
 *   churn FILE MIB SEED S  for S seconds: writes, fsyncs and re-reads random pages through the mapping
 *   fsync FILE             rewrites a page of it and prints ok or the errno's name of fsync
 *   dma FILE MIB SEED S DISK  for S seconds: O_DIRECT reads of DISK (made by fill with the same MIB and SEED) into the
 *                          mapping, O_DIRECT writes of the mapping into the second half of DISK's size, stores, and
 *                          re-reads; every page is checked against what must be in it
 *   touch FILE MIB N       N loads of scattered pages: prints the medians in ns: cold (first touch), warm (second touch)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_SYNC
#define MAP_SYNC 0x80000
#endif
#ifndef MAP_SHARED_VALIDATE
#define MAP_SHARED_VALIDATE 3
#endif

static uint64_t mix(uint64_t x) {
  x ^= x >> 33; x *= 0xff51afd7ed558ccdULL; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ULL; return x ^ x >> 33;
}
static void die(const char *what) { printf("failed %s: %s\n", what, strerrorname_np(errno)); exit(1); }
static void put(uint64_t *p, uint64_t page, uint64_t tag) {
  for (int i = 0; i < 512; ++i) p[i] = mix(page * 512 + i + tag * 0x9e3779b97f4a7c15ULL) | 1;
}
static int same(const uint64_t *p, uint64_t page, uint64_t tag) {
  for (int i = 0; i < 512; ++i)
    if (p[i] != (mix(page * 512 + i + tag * 0x9e3779b97f4a7c15ULL) | 1)) return 0;
  return 1;
}

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}
static int less(const void *a, const void *b) {
  const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  const uint64_t mib = argc > 3 ? strtoull(argv[3], 0, 0) : 0, seed = argc > 4 ? strtoull(argv[4], 0, 0) : 0;
  const uint64_t size = mib << 20, pages = size / 4096;
  int fd = open(argv[2], O_RDWR | O_CREAT, 0600);
  if (fd < 0) die("open");
  if (!strcmp(argv[1], "mapsync")) {
    if (ftruncate(fd, 4096)) die("truncate");
    void *p = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);
    puts(p != MAP_FAILED ? "ok" : strerrorname_np(errno));
    return 0;
  }
  if (!strcmp(argv[1], "fsync")) {
    char page[4096];
    memset(page, (int)time(0) | 1, sizeof page);
    if (pwrite(fd, page, sizeof page, 0) != sizeof page) die("write");
    puts(fsync(fd) == 0 ? "ok" : strerrorname_np(errno));
    return 0;
  }
  struct stat st;
  if (fstat(fd, &st)) die("stat");
  if (!strcmp(argv[1], "fill") && S_ISREG(st.st_mode) && (uint64_t)st.st_size != size && ftruncate(fd, (off_t)size))
    die("truncate");
  char *base = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) die("mmap");
  if (!strcmp(argv[1], "fill")) {
    for (uint64_t i = 0; i < pages; ++i) put((uint64_t *)(base + i * 4096), i, seed);
    if (msync(base, size, MS_SYNC)) die("msync");
    puts("filled");
  } else if (!strcmp(argv[1], "check")) {
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < pages; ++i) wrong += !same((uint64_t *)(base + i * 4096), i, seed);
    printf("wrong %llu\n", (unsigned long long)wrong);
  } else if (!strcmp(argv[1], "churn")) {
    const time_t end = time(0) + strtol(argv[5], 0, 0);
    uint32_t *tag = calloc(pages, sizeof *tag);
    uint64_t r = seed, wrong = 0, ops = 0, syncs = 0;
    for (uint64_t i = 0; i < pages; ++i) tag[i] = (uint32_t)seed;
    while (time(0) < end) {
      for (int n = 0; n < 64; ++n, ++ops) {
        const uint64_t i = (r = mix(r + 1)) % pages, j = mix(r) % pages;
        put((uint64_t *)(base + i * 4096), i, ++tag[i]);
        wrong += !same((uint64_t *)(base + j * 4096), j, tag[j]);
      }
      if (fsync(fd)) die("fsync");
      ++syncs;
    }
    for (uint64_t i = 0; i < pages; ++i) wrong += !same((uint64_t *)(base + i * 4096), i, tag[i]);
    printf("wrong %llu ops %llu syncs %llu\n", (unsigned long long)wrong, (unsigned long long)ops,
           (unsigned long long)syncs);
  } else if (!strcmp(argv[1], "dma")) {
    const time_t end = time(0) + strtol(argv[5], 0, 0);
    const int disk = open(argv[6], O_RDWR | O_DIRECT);
    if (disk < 0) die("open disk");
    uint64_t *block = calloc(pages, sizeof *block), *tag = calloc(pages, sizeof *tag);  /* what page i holds */
    uint64_t r = seed, wrong = 0, reads = 0, writes = 0, syncs = 0;
    for (uint64_t i = 0; i < pages; ++i) { block[i] = i; tag[i] = seed; }
    while (time(0) < end) {
      for (int k = 0; k < 32; ++k) {
        r = mix(r + 1);
        const uint64_t n = 1 + r % 16, i = (r >> 8) % (pages - n), j = (r >> 32) % (pages - n);
        if (r >> 60 < 8) {  /* the device writes into the mapping */
          if (pread(disk, base + i * 4096, n * 4096, (off_t)(j * 4096)) != (ssize_t)(n * 4096)) die("pread");
          for (uint64_t k2 = 0; k2 < n; ++k2) { block[i + k2] = j + k2; tag[i + k2] = seed; }
          reads += n;
        } else if (r >> 60 < 11) {  /* the device reads from the mapping */
          if (pwrite(disk, base + i * 4096, n * 4096, (off_t)(size + i * 4096)) != (ssize_t)(n * 4096)) die("pwrite");
          static char copy[16 * 4096] __attribute__((aligned(4096)));
          if (pread(disk, copy, n * 4096, (off_t)(size + i * 4096)) != (ssize_t)(n * 4096)) die("pread back");
          for (uint64_t k2 = 0; k2 < n; ++k2)
            wrong += !same((uint64_t *)(copy + k2 * 4096), block[i + k2], tag[i + k2]);
          writes += n;
        } else {
          for (uint64_t k2 = 0; k2 < n; ++k2) {
            tag[i + k2] = seed + 1 + (r & 0xffff) + k2;
            put((uint64_t *)(base + (i + k2) * 4096), block[i + k2], tag[i + k2]);
          }
        }
        const uint64_t v = mix(r) % pages;
        wrong += !same((uint64_t *)(base + v * 4096), block[v], tag[v]);
      }
      if (++syncs % 8 == 0 && fsync(fd)) die("fsync");
    }
    for (uint64_t i = 0; i < pages; ++i) wrong += !same((uint64_t *)(base + i * 4096), block[i], tag[i]);
    printf("wrong %llu dma-in %llu dma-out %llu rounds %llu\n", (unsigned long long)wrong, (unsigned long long)reads,
           (unsigned long long)writes, (unsigned long long)syncs);
  } else if (!strcmp(argv[1], "touch")) {
    const uint64_t n = seed < pages ? seed : pages, first = now();
    uint64_t *cold = calloc(n, sizeof *cold), *warm = calloc(n, sizeof *warm), sum = 0;
    for (uint64_t i = 0; i < n; ++i) {
      volatile uint64_t *p = (uint64_t *)(base + (first + i * 40503) % pages * 4096);  /* scattered: an odd stride */
      const uint64_t t0 = now(); sum += *p;
      const uint64_t t1 = now(); sum += p[8];
      const uint64_t t2 = now();
      cold[i] = t1 - t0; warm[i] = t2 - t1;
    }
    qsort(cold, n, sizeof *cold, less); qsort(warm, n, sizeof *warm, less);
    printf("cold %llu p99 %llu warm %llu\n", (unsigned long long)cold[n / 2], (unsigned long long)cold[n * 99 / 100],
           (unsigned long long)warm[n / 2]);
    (void)sum;
  }
  return 0;
}
