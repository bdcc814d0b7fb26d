// A hash-map cache made reclaimable: an LruItem in the object, add and del where it comes and goes, two callbacks.
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include <spillway/reclaim/reclaim.h>

namespace sr = spillway::reclaim;

class Cache {
 public:
  explicit Cache(sr::Registry& reg) : root_(reg.root()), lru_(reg) {
    shrinker_ = reg.alloc(sr::ShrinkerFlags::kNone, "hash-map");
    lru_.attach(&shrinker_);
    shrinker_.set_count([this](const sr::ScanRequest& q) { return lru_.count(q); });
    shrinker_.set_scan([this](const sr::ScanRequest& q) {
      std::lock_guard lock(m_);
      return lru_.walk(q, [this](sr::LruItem& item, sr::ListLru::Walker& w) {
        auto& e = static_cast<Entry&>(item);
        w.isolate(item, e.value.size());
        map_.erase(e.key);  // destroys e
        return sr::LruVerdict::kRemoved;
      });
    });
    shrinker_.register_();
  }
  ~Cache() {
    shrinker_.free();  // from here nobody calls back
    for (auto& [key, e] : map_) lru_.del(*e, *root_, 0, e->value.size());
  }
  void put(int key, std::string value) {
    std::lock_guard lock(m_);
    auto& e = map_[key];
    if (e) lru_.del(*e, *root_, 0, e->value.size());
    e = std::make_unique<Entry>(Entry{{}, key, std::move(value)});
    lru_.add(*e, *root_, 0, e->value.size());
  }
  std::size_t size() const { return map_.size(); }

 private:
  struct Entry : sr::LruItem { int key; std::string value; };
  std::mutex m_;
  std::unordered_map<int, std::unique_ptr<Entry>> map_;  // guarded by m_
  sr::GroupRef root_;
  sr::ListLru lru_;
  sr::Shrinker shrinker_;
};

int main() {
  sr::Registry registry;
  Cache cache(registry);
  for (int i = 0; i < 10'000; ++i) cache.put(i, std::string(4096, 'x'));
  const auto r = registry.reclaim({.target_bytes = 20u << 20});
  std::printf("%s%zu entries left\n", sr::to_text(r).c_str(), cache.size());
  return r.status == sr::ReclaimStatus::kReached && cache.size() < 5'000 ? 0 : 1;
}
