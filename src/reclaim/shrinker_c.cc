// The kernel-shaped C interface on top of the C++ one.
#include "spillway/shrinker.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "spillway/reclaim/reclaim.h"

namespace sr = spillway::reclaim;

sr::Registry& spillway_c_registry() {
  // Never destroyed: C programs end with shrinkers registered.
  static sr::Registry* r = new sr::Registry();
  return *r;
}

namespace {

struct CShrinker : shrinker {
  sr::Shrinker handle;
};

sr::MemoryGroup* group_of(mem_cgroup* m) { return reinterpret_cast<sr::MemoryGroup*>(m); }
mem_cgroup* memcg_of(sr::MemoryGroup* g) { return reinterpret_cast<mem_cgroup*>(g); }

shrink_control control_of(const sr::ScanRequest& q) {
  shrink_control sc{};
  sc.gfp_mask = q.may_block ? GFP_KERNEL : GFP_NOWAIT;
  sc.nid = q.node;
  sc.nr_to_scan = sc.nr_scanned = q.nr_to_scan;
  sc.memcg = memcg_of(q.group);
  sc.target_bytes = q.target_bytes;
  return sc;
}
std::uint64_t object_bytes(const CShrinker& s) { return s.object_bytes != 0 ? s.object_bytes : 4096; }

sr::CountReport count(CShrinker& s, const sr::ScanRequest& q) {
  shrink_control sc = control_of(q);
  const unsigned long n = s.count_objects(&s, &sc);
  // A kernel shrinker that is not memcg-aware sets no bits, so its bits must stay; for it EMPTY is nothing now.
  if (n == SHRINK_EMPTY) {
    return (s.flags & SHRINKER_MEMCG_AWARE) != 0 ? sr::CountReport::empty() : sr::CountReport{};
  }
  return {n, n * object_bytes(s), 0, false};
}

sr::ScanReport scan(CShrinker& s, const sr::ScanRequest& q) {
  shrink_control sc = control_of(q);
  const unsigned long freed = s.scan_objects(&s, &sc);
  sr::ScanReport r;
  if (freed == SHRINK_STOP) {
    r.status = sr::ScanStatus::kStop;
    return r;
  }
  r.scanned = sc.nr_scanned;
  r.freed_objects = freed;
  r.freed_bytes = freed * object_bytes(s);
  return r;
}

// A reference that C holds: a GroupRef by its pointer.
sr::MemoryGroup* new_reference(const sr::GroupRef& g) { return sr::GroupRef::share(*g).release(); }
void drop_reference(sr::MemoryGroup* g) { sr::GroupRef::adopt(g); }

}  // namespace

extern "C" {

struct shrinker* shrinker_alloc(unsigned int flags, const char* fmt, ...) {
  char name[128];
  va_list ap;
  va_start(ap, fmt);
  std::vsnprintf(name, sizeof name, fmt, ap);
  va_end(ap);
  auto f = sr::ShrinkerFlags::kNone;
  if ((flags & SHRINKER_NUMA_AWARE) != 0) f = f | sr::ShrinkerFlags::kNumaAware;
  if ((flags & SHRINKER_MEMCG_AWARE) != 0) f = f | sr::ShrinkerFlags::kGroupAware;
  if ((flags & SHRINKER_NOBLOCK) != 0) f = f | sr::ShrinkerFlags::kNoBlock;
  try {
    auto* s = new (std::nothrow) CShrinker();
    if (s == nullptr) return nullptr;
    s->handle = spillway_c_registry().alloc(f, name);
    if (!s->handle) {
      delete s;
      return nullptr;
    }
    s->seeks = DEFAULT_SEEKS;
    s->flags = flags;
    s->id = static_cast<int>(s->handle.id());
    return s;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void shrinker_register(struct shrinker* shrinker) {
  auto* s = static_cast<CShrinker*>(shrinker);
  if (s->count_objects == nullptr || s->scan_objects == nullptr) {
    std::fprintf(stderr, "shrinker_register: %s without callbacks\n", s->handle.name().c_str());
    std::abort();
  }
  s->handle.set_count([s](const sr::ScanRequest& q) { return count(*s, q); });
  s->handle.set_scan([s](const sr::ScanRequest& q) { return scan(*s, q); });
  s->handle.set_seeks(s->seeks > 0 ? static_cast<unsigned>(s->seeks) : 0);
  s->handle.set_batch(s->batch > 0 ? static_cast<unsigned>(s->batch) : 0);
  s->handle.set_private_data(s->private_data);
  s->handle.register_();
  // One that is not memcg-aware is asked as long as it lives, one that is once for what it held before.
  sr::Registry& r = spillway_c_registry();
  const sr::GroupRef root = r.root();
  for (int node = 0; node < r.options().nodes; ++node) s->handle.set_bit(*root, node);
}

void shrinker_free(struct shrinker* shrinker) {
  if (shrinker == nullptr) return;
  auto* s = static_cast<CShrinker*>(shrinker);
  const sr::Errc e = s->handle.free();
  if (e == sr::Errc::kSelfFree || e == sr::Errc::kDeadlock) {
    std::fprintf(stderr, "shrinker_free: %s: %s\n", s->handle.name().c_str(),
                 std::string(sr::to_string(e)).c_str());
    std::abort();
  }
  delete s;
}

void set_shrinker_bit(struct mem_cgroup* memcg, int nid, int shrinker_id) {
  if (shrinker_id < 0) return;
  sr::Registry& r = spillway_c_registry();
  const sr::GroupRef root = r.root();
  r.set_bit(static_cast<std::uint32_t>(shrinker_id), memcg != nullptr ? *group_of(memcg) : *root, nid);
}

struct mem_cgroup* mem_cgroup_create(const char* path) {
  try {
    sr::Registry& r = spillway_c_registry();
    std::string_view p(path);
    const std::size_t slash = p.rfind('/');
    sr::GroupRef parent = r.root();
    if (slash != p.npos && slash != 0) parent = r.find_group(p.substr(0, slash));
    if (!parent) return nullptr;
    sr::GroupRef g = r.create_group(slash == p.npos ? p : p.substr(slash + 1), parent.get());
    return g ? memcg_of(new_reference(g)) : nullptr;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

struct mem_cgroup* mem_cgroup_get_by_path(const char* path) {
  sr::GroupRef g = spillway_c_registry().find_group(std::string_view(path));
  return g ? memcg_of(new_reference(g)) : nullptr;
}

void mem_cgroup_put(struct mem_cgroup* memcg) {
  if (memcg != nullptr) drop_reference(group_of(memcg));
}
int mem_cgroup_remove(struct mem_cgroup* memcg) {
  return spillway_c_registry().remove_group(*group_of(memcg)) == sr::Errc::kOk ? 0 : -1;
}
unsigned short mem_cgroup_id(struct mem_cgroup* memcg) {
  return memcg != nullptr ? static_cast<unsigned short>(group_of(memcg)->id()) : 0;
}

uint64_t spillway_reclaim(struct mem_cgroup* memcg, int nid, uint64_t bytes, gfp_t gfp_mask) {
  sr::ReclaimRequest q;
  q.group = group_of(memcg);
  q.node = nid;
  q.target_bytes = bytes;
  q.may_block = (gfp_mask & __GFP_DIRECT_RECLAIM) != 0;
  return spillway_c_registry().reclaim(q).freed_bytes;
}

unsigned long spillway_scan(int shrinker_id, struct mem_cgroup* memcg, int nid, unsigned long nr) {
  sr::Registry& r = spillway_c_registry();
  const sr::GroupRef root = r.root();
  sr::ScanReport out;
  if (shrinker_id < 0 || r.scan(static_cast<std::uint32_t>(shrinker_id), memcg != nullptr ? *group_of(memcg) : *root,
                                nid, nr, &out) != sr::Errc::kOk) {
    return SHRINK_STOP;
  }
  return out.status == sr::ScanStatus::kStop ? SHRINK_STOP : out.freed_objects;
}

char* spillway_shrinker_text(void) {
  try {
    return ::strdup(spillway_c_registry().to_text().c_str());
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // extern "C"
