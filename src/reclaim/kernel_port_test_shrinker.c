/* Written as a file system would write it for Linux; only the include line is ours. */
#include "spillway/shrinker.h"

#include <stdatomic.h>

#include "src/reclaim/kernel_port_test_shrinker.h"

struct port_cache {
  atomic_ulong nr_cached;
  atomic_int stop;
  struct shrinker *shrinker;
};

static struct port_cache cache;

static unsigned long port_count(struct shrinker *shrink, struct shrink_control *sc) {
  struct port_cache *c = shrink->private_data;
  unsigned long n = atomic_load(&c->nr_cached);

  (void)sc;
  return n ? n : SHRINK_EMPTY;
}

static unsigned long port_scan(struct shrinker *shrink, struct shrink_control *sc) {
  struct port_cache *c = shrink->private_data;
  unsigned long nr = sc->nr_to_scan, have = atomic_load(&c->nr_cached);

  if (atomic_load(&c->stop) || !(sc->gfp_mask & __GFP_FS))
    return SHRINK_STOP;
  if (nr > have)
    nr = have;
  sc->nr_scanned = nr;
  atomic_fetch_sub(&c->nr_cached, nr);
  return nr;
}

int port_cache_init(const char *name) {
  cache.shrinker = shrinker_alloc(0, "port-%s", name);
  if (!cache.shrinker)
    return -1;
  cache.shrinker->count_objects = port_count;
  cache.shrinker->scan_objects = port_scan;
  cache.shrinker->seeks = DEFAULT_SEEKS;
  cache.shrinker->private_data = &cache;
  shrinker_register(cache.shrinker);
  return 0;
}

void port_cache_add(unsigned long n) {
  atomic_fetch_add(&cache.nr_cached, n);
}
unsigned long port_cache_size(void) { return atomic_load(&cache.nr_cached); }
int port_cache_id(void) { return cache.shrinker->id; }
void port_cache_stop(int on) { atomic_store(&cache.stop, on); }
void port_cache_exit(void) { shrinker_free(cache.shrinker); }
