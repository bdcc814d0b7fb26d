#!/bin/sh
# The same RocksDB, the same cgroup limit, the same too large block cache: without reclaim it is killed by the
# OOM killer, with it it lives. Needs root and a writable cgroup v1 memory controller (or v2 at the root).
# usage: rocksdb_under_limit.sh PROGRAM [SCANS]
set -eu
program=$(realpath "$1"); scans=${2:-400}
work=$(mktemp -d /tmp/spillway-rocksdb-XXXXXX)
name=spillway-rocksdb-$$
limit_mib=160; cache_mib=1024
if [ -e /sys/fs/cgroup/memory/memory.limit_in_bytes ]; then
  group=/sys/fs/cgroup/memory/$name; mkdir "$group"
  echo $((limit_mib << 20)) >"$group/memory.limit_in_bytes"
  echo 0 >"$group/memory.swappiness" 2>/dev/null || true
elif grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null; then
  echo +memory >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true
  group=/sys/fs/cgroup/$name; mkdir "$group"
  echo $((limit_mib << 20)) >"$group/memory.max"; echo 0 >"$group/memory.swap.max" 2>/dev/null || true
else
  echo "SKIP: no writable memory cgroup" >&2; exit 77
fi
trap 'exit 1' INT TERM
trap 'rm -rf "$work"; sleep 0.2; rmdir "$group" 2>/dev/null || true' EXIT

inside() { # runs a command in the cgroup; its status
  sh -c 'echo $$ >"$0/cgroup.procs"; exec "$@"' "$group" "$@"
}

"$program" "$work/db" load
status=0; inside "$program" "$work/db" run "$scans" $cache_mib >"$work/plain" 2>&1 || status=$?
echo "without reclaim: exit status $status $( [ $status = 137 ] && echo '(killed)' )"; cat "$work/plain"
plain=$status
status=0; inside "$program" "$work/db" run --reclaim "$scans" $cache_mib >"$work/reclaim" 2>&1 || status=$?
echo "with reclaim: exit status $status"; cat "$work/reclaim"
[ "$plain" = 137 ] && [ "$status" = 0 ]
