/* Kernel-shaped C interface of Spillway::reclaim: a shrinker written for Linux (alloc / register / free
 * with count_objects and scan_objects) compiles against this header. C11 and C++.
 *
 * The fields and return codes have the kernel's meaning. What user space adds stands at the end of each
 * structure and may be left zero. All of it works on one process-wide registry, made at first use;
 * spillway_c_registry() gives it to C++.
 */
#ifndef SPILLWAY_SHRINKER_H
#define SPILLWAY_SHRINKER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef __GFP_FS
typedef unsigned int gfp_t;
#define __GFP_IO 0x40u
#define __GFP_FS 0x80u
#define __GFP_DIRECT_RECLAIM 0x400u
#define GFP_KERNEL (__GFP_DIRECT_RECLAIM | __GFP_IO | __GFP_FS)
#define GFP_NOFS (__GFP_DIRECT_RECLAIM | __GFP_IO)
#define GFP_NOWAIT 0u
#endif

/* Opaque here: a memory group; NULL stands for the root. */
struct mem_cgroup;

struct shrink_control {
  gfp_t gfp_mask;            /* without __GFP_DIRECT_RECLAIM the callback must not block */
  int nid;                   /* node to take from */
  unsigned long nr_to_scan;  /* scan_objects: look at most at this many */
  unsigned long nr_scanned;  /* scan_objects: set to nr_to_scan before the call; lower it if fewer */
  struct mem_cgroup *memcg;  /* group to take from */
  /* user space: */
  uint64_t target_bytes;     /* still wanted, 0 = unknown */
};

#define SHRINK_STOP (~0UL)
#define SHRINK_EMPTY (~0UL - 1)
#define DEFAULT_SEEKS 2

#define SHRINKER_NUMA_AWARE (1u << 2)
#define SHRINKER_MEMCG_AWARE (1u << 3)
#define SHRINKER_NONSLAB (1u << 4)    /* accepted, without effect: every shrinker sees every group it asked for */
/* user space: never blocks, so it is called without __GFP_DIRECT_RECLAIM too */
#define SHRINKER_NOBLOCK (1u << 16)

struct shrinker {
  unsigned long (*count_objects)(struct shrinker *, struct shrink_control *sc);
  unsigned long (*scan_objects)(struct shrinker *, struct shrink_control *sc);
  long batch;              /* reclaim batch size, 0 = default */
  int seeks;               /* seeks to recreate an object, DEFAULT_SEEKS is set by shrinker_alloc */
  unsigned flags;          /* SHRINKER_* */
  void *private_data;
  int id;                  /* set by shrinker_alloc */
  /* user space: bytes that one object gives back; 0 = one page of 4096 */
  size_t object_bytes;
};

/* An inactive shrinker; fill it in, then register. NULL: no memory or no id. */
struct shrinker *shrinker_alloc(unsigned int flags, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
void shrinker_register(struct shrinker *shrinker);
/* Registered or not. No callback runs when it returns. */
void shrinker_free(struct shrinker *shrinker);

/* Adder's half of the empty protocol (the kernel's set_shrinker_bit): after the first object came. */
void set_shrinker_bit(struct mem_cgroup *memcg, int nid, int shrinker_id);

/* Groups. Names are relative to the root ("a", "a/b"); references are counted. */
struct mem_cgroup *mem_cgroup_create(const char *path);
struct mem_cgroup *mem_cgroup_get_by_path(const char *path);
void mem_cgroup_put(struct mem_cgroup *memcg);
int mem_cgroup_remove(struct mem_cgroup *memcg); /* 0, or -1: it has children or is removed already */
unsigned short mem_cgroup_id(struct mem_cgroup *memcg);

/* Runs the shrinkers of `memcg` (NULL: all) on `nid` (-1: all) until `bytes` are freed; returns bytes. */
uint64_t spillway_reclaim(struct mem_cgroup *memcg, int nid, uint64_t bytes, gfp_t gfp_mask);
/* As debugfs: one scan call by hand. Returns what scan_objects returned, SHRINK_STOP if there is none. */
unsigned long spillway_scan(int shrinker_id, struct mem_cgroup *memcg, int nid, unsigned long nr);
/* "name-id" lines and counters of everything; free() it. */
char *spillway_shrinker_text(void);

#ifdef __cplusplus
}
namespace spillway::reclaim {
class Registry;
}
/// The registry behind the C interface. Lives until the process ends.
spillway::reclaim::Registry &spillway_c_registry();
#endif
#endif
