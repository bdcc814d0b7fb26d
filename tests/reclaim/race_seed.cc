// A race on purpose, which TSAN must report: an object is freed without a grace period while a reader is
// inside (`retire` left out). With argument "ok" the same is done right, and TSAN must be silent. The test
// (CMakeLists.txt) runs both; it proves that the annotations of rcu.h hide nothing and invent nothing.
#include <atomic>
#include <cstring>
#include <thread>

#include "spillway/reclaim/rcu.h"

using namespace spillway::reclaim;

struct Node : RcuObject<Node> {
  int value = 42;
};

int main(int argc, char** argv) {
  const bool right = argc > 1 && std::strcmp(argv[1], "ok") == 0;
  RcuPtr<Node> published(new Node);
  std::atomic<bool> end{false};
  std::atomic<long> reads{0};  // relaxed: paces the two threads and orders nothing
  long sum = 0;
  std::thread reader([&] {
    while (!end.load(std::memory_order_relaxed)) {
      RcuGuard g;
      sum += published.load()->value;
      reads.fetch_add(1, std::memory_order_relaxed);
    }
  });
  for (int i = 0; i < 2000; ++i) {
    Node* old = published.exchange(new Node);
    if (right) {
      old->retire();
    } else {
      old->value = -1;  // what a free does to the memory, without leaving the heap in ruins
    }
    if (i % 100 != 0) continue;
    const long seen = reads.load(std::memory_order_relaxed);  // both run, however busy the machine is
    while (reads.load(std::memory_order_relaxed) < seen + 2) std::this_thread::yield();
  }
  end = true;
  reader.join();
  published.load()->retire();
  rcu_barrier();
  return sum == 1 ? 2 : 0;
}
