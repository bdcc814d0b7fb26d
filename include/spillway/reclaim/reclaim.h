// Spillway::reclaim: lockless shrinkers, memory groups, pressure sources. The facade.
#pragma once

#include "spillway/reclaim/group.h"
#include "spillway/reclaim/list_lru.h"
#include "spillway/reclaim/pressure.h"
#include "spillway/reclaim/rcu.h"
#include "spillway/reclaim/registry.h"
#include "spillway/reclaim/shrinker.h"
#include "spillway/reclaim/types.h"
