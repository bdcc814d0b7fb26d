// pattern: writes and checks files whose every 512-byte sector says which file and place it belongs to, so
// that lost, stale, torn and misplaced blocks all show. Static, for test guests; also fine on a host.
//
//   pattern write FILE MIB SEED [direct] [sync]    pattern check FILE MIB SEED [direct]    pattern sync FILE
//
// write and check print "BYTES MISMATCHES IO_ERRORS": bytes done, 4 KiB blocks that are not as expected, and
// system calls that failed. Exit 0 when the last two are 0, else 1; 2 for usage.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { kChunk = 1 << 20, kBlock = 4096, kSector = 512 };

static void fill(uint64_t* words, uint64_t offset, uint64_t seed) {
  for (size_t i = 0; i < kChunk / 8; i++) {
    uint64_t sector = (offset + i * 8) / kSector;
    words[i] = (sector * 0x9e3779b97f4a7c15ull) ^ (seed * 0xc2b2ae3d27d4eb4full) ^ (i % (kSector / 8));
  }
}

static int has(int argc, char** argv, const char* word) {
  for (int i = 5; i < argc; i++)
    if (!strcmp(argv[i], word)) return 1;
  return 0;
}

static int finish(uint64_t bytes, uint64_t mismatches, uint64_t errors) {
  printf("%llu %llu %llu\n", (unsigned long long)bytes, (unsigned long long)mismatches,
         (unsigned long long)errors);
  return mismatches || errors ? 1 : 0;
}

static int write_file(int fd, uint64_t chunks, uint64_t seed, char* buffer, int sync) {
  uint64_t done = 0, errors = 0;
  for (uint64_t c = 0; c < chunks; c++) {
    fill((uint64_t*)buffer, c * kChunk, seed);
    ssize_t n = pwrite(fd, buffer, kChunk, (off_t)(c * kChunk));
    if (n == kChunk) {
      done += kChunk;
    } else {
      errors++;
      fprintf(stderr, "pattern: write at %llu: %s\n", (unsigned long long)(c * kChunk),
              n < 0 ? strerror(errno) : "short");
      if (n < 0 && errno == ENOSPC) break;
    }
  }
  if (sync && fsync(fd)) errors++;
  return finish(done, 0, errors);
}

static int check_file(int fd, uint64_t chunks, uint64_t seed, char* buffer, char* expected) {
  uint64_t done = 0, mismatches = 0, errors = 0;
  for (uint64_t c = 0; c < chunks; c++) {
    ssize_t n = pread(fd, buffer, kChunk, (off_t)(c * kChunk));
    if (n < 0) {
      errors++;
      fprintf(stderr, "pattern: read at %llu: %s\n", (unsigned long long)(c * kChunk), strerror(errno));
      continue;
    }
    fill((uint64_t*)expected, c * kChunk, seed);
    for (int b = 0; b < kChunk; b += kBlock) {
      if (b + kBlock <= n && !memcmp(buffer + b, expected + b, kBlock)) {
        done += kBlock;
      } else if (++mismatches <= 4) {
        fprintf(stderr, "pattern: block at %llu is not what was written\n",
                (unsigned long long)(c * kChunk + b));
      }
    }
  }
  return finish(done, mismatches, errors);
}

int main(int argc, char** argv) {
  if (argc == 3 && !strcmp(argv[1], "sync")) {
    int fd = open(argv[2], O_RDWR);
    if (fd < 0 || fsync(fd)) {
      fprintf(stderr, "pattern: %s: %s\n", argv[2], strerror(errno));
      return 1;
    }
    return 0;
  }
  int writing = argc >= 5 && !strcmp(argv[1], "write");
  if (argc < 5 || (!writing && strcmp(argv[1], "check"))) {
    fprintf(stderr, "usage: pattern write|check FILE MIB SEED [direct] [sync] | pattern sync FILE\n");
    return 2;
  }
  int flags = (writing ? O_RDWR | O_CREAT : O_RDONLY) | (has(argc, argv, "direct") ? O_DIRECT : 0);
  int fd = open(argv[2], flags, 0644);
  if (fd < 0) {
    fprintf(stderr, "pattern: %s: %s\n", argv[2], strerror(errno));
    return finish(0, 0, 1);
  }
  uint64_t chunks = strtoull(argv[3], NULL, 10), seed = strtoull(argv[4], NULL, 10);
  char *buffer, *expected;
  if (posix_memalign((void**)&buffer, 4096, kChunk) || posix_memalign((void**)&expected, 4096, kChunk))
    return 2;
  return writing ? write_file(fd, chunks, seed, buffer, has(argc, argv, "sync"))
                 : check_file(fd, chunks, seed, buffer, expected);
}
