// The kernel-shaped interface: a shrinker in C, ported by recompiling it.
#include "spillway/shrinker.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "src/reclaim/kernel_port_test_shrinker.h"

TEST(KernelPort, count_scan_stop_empty_and_free) {  // S1, S10
  ASSERT_EQ(port_cache_init("ext9"), 0);
  port_cache_add(1000);
  const uint64_t freed = spillway_reclaim(nullptr, -1, 4096 * 10, GFP_KERNEL);
  EXPECT_EQ(freed / 4096, 1000 - port_cache_size());
  EXPECT_LT(port_cache_size(), 1000u);
  EXPECT_GE(port_cache_size(), 500u) << "the target bounds the scan";
  const unsigned long left = port_cache_size();
  EXPECT_EQ(spillway_scan(port_cache_id(), nullptr, 0, 5), 5u);
  EXPECT_EQ(port_cache_size(), left - 5);
  port_cache_stop(1);
  EXPECT_EQ(spillway_reclaim(nullptr, -1, 1u << 30, GFP_KERNEL), 0u);
  EXPECT_EQ(spillway_scan(port_cache_id(), nullptr, 0, 5), SHRINK_STOP);
  port_cache_stop(0);
  char* text = spillway_shrinker_text();
  EXPECT_NE(std::string(text).find("port-ext9-" + std::to_string(port_cache_id())), std::string::npos) << text;
  std::free(text);
  EXPECT_EQ(spillway_reclaim(nullptr, -1, 1u << 30, GFP_NOWAIT), 0u) << "may block: not asked";
  EXPECT_GT(spillway_reclaim(nullptr, -1, 1u << 30, GFP_KERNEL), 0u);
  EXPECT_EQ(port_cache_size(), 0u);
  port_cache_add(3);
  EXPECT_GT(spillway_reclaim(nullptr, -1, 1u << 30, GFP_KERNEL), 0u) << "one that is not memcg-aware sets no bits, in the kernel as here";
  port_cache_exit();
}

TEST(KernelPort, groups_by_path) {
  mem_cgroup* a = mem_cgroup_create("a");
  ASSERT_NE(a, nullptr);
  mem_cgroup* b = mem_cgroup_create("a/b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(mem_cgroup_create("x/y"), nullptr);
  mem_cgroup* again = mem_cgroup_get_by_path("/a/b");
  EXPECT_EQ(mem_cgroup_id(again), mem_cgroup_id(b));
  mem_cgroup_put(again);
  EXPECT_EQ(mem_cgroup_remove(a), -1);
  EXPECT_EQ(mem_cgroup_remove(b), 0);
  EXPECT_EQ(mem_cgroup_remove(a), 0);
  mem_cgroup_put(b);
  mem_cgroup_put(a);
}
