#include "src/qos/domain.h"

#include <utility>

#include <fmt/core.h>

namespace spillway {
namespace {

Status check_weight(const std::string& name, uint32_t weight) {
  if (weight >= 1 && weight <= 10000) return {};
  return fail(ErrorKind::kInvalid, fmt::format("group {}: weight {}: 1 to 10000", name, weight));
}

}  // namespace

QosDomain::QosDomain() {
  auto first = std::make_shared<QosGroups>();
  first->generation = 1;
  first->groups[GroupId::kRoot].name = "/";
  static constexpr std::pair<const char*, uint32_t> kDefaults[kBackgrounds] = {
      {"rebuild", 50}, {"scrub", 20}, {"writeback", 100}};
  for (size_t i = 0; i < kBackgrounds; ++i)
    first->background[i] = {.name = kDefaults[i].first, .weight = kDefaults[i].second};
  now_ = std::move(first);
}

Status QosDomain::set(GroupId id, QosGroup group) {
  if (static_cast<uint32_t>(id) >= kMaxGroups)
    return fail(ErrorKind::kInvalid, fmt::format("group {}: id {}: at most {}", group.name,
                                                 static_cast<uint32_t>(id), kMaxGroups - 1));
  SPILLWAY_CHECK(check_weight(group.name, group.weight));
  SPILLWAY_CHECK(check_weight(group.name, group.read_ahead_weight));
  std::lock_guard lock(mutex_);
  for (GroupId p = group.parent; id != GroupId::kRoot && p != GroupId::kRoot;) {
    auto it = now_->groups.find(p);
    if (it == now_->groups.end() || p == id)
      return fail(ErrorKind::kInvalid, fmt::format("group {}: parent {} {}", group.name, static_cast<uint32_t>(p),
                                                   p == id ? "is below it" : "does not exist"));
    p = it->second.parent;
  }
  auto next = std::make_shared<QosGroups>(*now_);
  if (id == GroupId::kRoot) group.parent = GroupId::kRoot;
  next->groups[id] = std::move(group);
  publish(std::move(next));
  return {};
}

Status QosDomain::set_background(Background which, QosGroup group) {
  SPILLWAY_CHECK(check_weight(group.name, group.weight));
  std::lock_guard lock(mutex_);
  auto next = std::make_shared<QosGroups>(*now_);
  auto& b = next->background[static_cast<size_t>(which)];
  if (group.name.empty()) group.name = b.name;
  b = std::move(group);
  publish(std::move(next));
  return {};
}

Status QosDomain::remove(GroupId id) {
  if (id == GroupId::kRoot) return fail(ErrorKind::kInvalid, "group /: the root stays");
  std::lock_guard lock(mutex_);
  auto it = now_->groups.find(id);
  if (it == now_->groups.end())
    return fail(ErrorKind::kNotFound, fmt::format("group {}", static_cast<uint32_t>(id)));
  const GroupId up = it->second.parent;
  auto next = std::make_shared<QosGroups>(*now_);
  next->groups.erase(id);
  for (auto& [child, group] : next->groups)
    if (group.parent == id) group.parent = up;
  publish(std::move(next));
  return {};
}

std::shared_ptr<const QosGroups> QosDomain::snapshot() const {
  std::lock_guard lock(mutex_);
  return now_;
}

void QosDomain::publish(std::shared_ptr<QosGroups> next) {
  const uint64_t generation = ++next->generation;
  now_ = std::move(next);
  generation_.store(generation, std::memory_order_release);
}

}  // namespace spillway
