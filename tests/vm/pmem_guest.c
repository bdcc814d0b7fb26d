/* What the pmem tests run in the guest. Built static by full_pmem_test.py.
 *   mapsync FILE           prints ok or the errno's name of mmap(MAP_SYNC) (P2)
 *   fill FILE MIB SEED     writes a pattern through a shared mapping, msync; prints filled
 *   check FILE MIB SEED    prints "wrong N"
 *   churn FILE MIB SEED S  for S seconds: writes, fsyncs and re-reads random pages through the mapping
 *   fsync FILE             rewrites a page of it and prints ok or the errno's name of fsync
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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
  if (!strcmp(argv[1], "fill") && ftruncate(fd, size)) die("truncate");
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
  }
  return 0;
}
