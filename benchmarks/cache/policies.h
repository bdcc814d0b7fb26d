// Replacement policies to compare with, each as its paper has it. One page a key. Thread-confined.
#pragma once

#include <cstdint>
#include <deque>
#include <algorithm>
#include <list>
#include <queue>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace spillway::bench {

using Trace = std::vector<uint32_t>;

inline double lru(const Trace& t, size_t capacity) {
  std::list<uint32_t> order;
  std::unordered_map<uint32_t, std::list<uint32_t>::iterator> at;
  uint64_t hits = 0;
  for (uint32_t k : t) {
    if (auto it = at.find(k); it != at.end()) {
      ++hits;
      order.splice(order.begin(), order, it->second);
      continue;
    }
    if (at.size() == capacity) {
      at.erase(order.back());
      order.pop_back();
    }
    order.push_front(k);
    at[k] = order.begin();
  }
  return static_cast<double>(hits) / static_cast<double>(t.size());
}

// Megiddo and Modha, FAST 2003.
inline double arc(const Trace& t, size_t c) {
  enum List { kT1, kT2, kB1, kB2 };
  std::list<uint32_t> l[4];
  struct Where {
    List list;
    std::list<uint32_t>::iterator it;
  };
  std::unordered_map<uint32_t, Where> at;
  size_t p = 0;
  uint64_t hits = 0;
  auto drop_last = [&](List from) {
    at.erase(l[from].back());
    l[from].pop_back();
  };
  auto move = [&](uint32_t k, List to) {
    auto& w = at[k];
    l[to].splice(l[to].begin(), l[w.list], w.it);
    w = {to, l[to].begin()};
  };
  auto replace = [&](bool in_b2) {
    if (!l[kT1].empty() && (l[kT1].size() > p || (in_b2 && l[kT1].size() == p))) move(l[kT1].back(), kB1);
    else if (!l[kT2].empty()) move(l[kT2].back(), kB2);
    else move(l[kT1].back(), kB1);
  };
  for (uint32_t k : t) {
    auto it = at.find(k);
    if (it != at.end() && (it->second.list == kT1 || it->second.list == kT2)) {
      ++hits;
      move(k, kT2);
    } else if (it != at.end() && it->second.list == kB1) {
      p = std::min(c, p + std::max<size_t>(1, l[kB2].size() / l[kB1].size()));
      replace(false);
      move(k, kT2);
    } else if (it != at.end()) {
      const size_t d = std::max<size_t>(1, l[kB1].size() / l[kB2].size());
      p = p > d ? p - d : 0;
      replace(true);
      move(k, kT2);
    } else {
      const size_t l1 = l[kT1].size() + l[kB1].size();
      const size_t all = l1 + l[kT2].size() + l[kB2].size();
      if (l1 == c) {
        if (l[kT1].size() < c) {
          drop_last(kB1);
          replace(false);
        } else {
          drop_last(kT1);
        }
      } else if (all >= c) {
        if (all == 2 * c) drop_last(kB2);
        replace(false);
      }
      l[kT1].push_front(k);
      at[k] = {kT1, l[kT1].begin()};
    }
  }
  return static_cast<double>(hits) / static_cast<double>(t.size());
}

// Yang et al., SOSP 2023: small a tenth, move to main after more than one use, ghosts as many as main.
inline double s3fifo(const Trace& t, size_t c) {
  struct Page {
    uint8_t uses = 0;
  };
  std::unordered_map<uint32_t, Page> at;
  std::deque<uint32_t> small, main, ghost;
  std::unordered_set<uint32_t> in_ghost;
  const size_t small_max = std::max<size_t>(1, c / 10);
  uint64_t hits = 0;
  auto evict_main = [&] {
    for (;;) {
      const uint32_t k = main.front();
      main.pop_front();
      if (at[k].uses > 0) {
        --at[k].uses;
        main.push_back(k);
        continue;
      }
      at.erase(k);
      return;
    }
  };
  auto evict = [&] {
    while (small.size() >= small_max || main.empty()) {
      if (small.empty()) break;
      const uint32_t k = small.front();
      small.pop_front();
      if (at[k].uses > 1) {
        at[k].uses = 0;
        main.push_back(k);
        if (main.size() > c - small_max) return evict_main();
        continue;
      }
      at.erase(k);
      ghost.push_back(k);
      in_ghost.insert(k);
      if (ghost.size() > c - small_max) {
        in_ghost.erase(ghost.front());
        ghost.pop_front();
      }
      return;
    }
    evict_main();
  };
  for (uint32_t k : t) {
    if (auto it = at.find(k); it != at.end()) {
      ++hits;
      if (it->second.uses < 3) ++it->second.uses;
      continue;
    }
    if (at.size() >= c) evict();
    if (in_ghost.erase(k) != 0) main.push_back(k);
    else small.push_back(k);
    at[k] = {};
  }
  return static_cast<double>(hits) / static_cast<double>(t.size());
}

// The optimum: evicts what is needed farthest in the future.
inline double belady(const Trace& t, size_t c) {
  std::vector<uint32_t> next(t.size());
  std::unordered_map<uint32_t, uint32_t> last;
  for (size_t i = t.size(); i-- > 0;) {
    auto it = last.find(t[i]);
    next[i] = it == last.end() ? UINT32_MAX : it->second;
    last[t[i]] = static_cast<uint32_t>(i);
  }
  std::set<std::pair<uint32_t, uint32_t>> by_next;
  std::unordered_map<uint32_t, uint32_t> at;
  uint64_t hits = 0;
  for (size_t i = 0; i < t.size(); ++i) {
    if (auto it = at.find(t[i]); it != at.end()) {
      ++hits;
      by_next.erase({it->second, t[i]});
    } else if (at.size() == c) {
      auto far = std::prev(by_next.end());
      at.erase(far->second);
      by_next.erase(far);
    }
    at[t[i]] = next[i];
    by_next.insert({next[i], t[i]});
  }
  return static_cast<double>(hits) / static_cast<double>(t.size());
}

}  // namespace spillway::bench
