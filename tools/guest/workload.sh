#!/bin/sh
# The main job inside a guest, step by step as the host says (main_job.py). Settings come first in the
# file: FS (ext4 or xfs), FILES a round, MIB a file, SEED, SHARED (sha256 of the whole read-only disk).
#   from the host: setup | round K | shared N | unflushed MIB | flush | trim | finish
#   to the host:   @@ done STEP   after each; before it the counters that changed:
#                  @@ bytes_written N  @@ bytes_verified N  @@ mismatches N  @@ io_errors N
. /lib/guest.sh
D=/mnt/d
written=0 verified=0 mismatches=0 errors=0 shared_reads=0

count() { # count KIND "BYTES MISMATCHES ERRORS"
  set -- $1 $2
  case $1 in
    write) written=$((written + ${2:-0})) ;;
    check) verified=$((verified + ${2:-0})) ;;
  esac
  mismatches=$((mismatches + ${3:-1})); errors=$((errors + ${4:-1}))
}
report() {
  say bytes_written $written; say bytes_verified $verified
  say mismatches $mismatches; say io_errors $((errors + $(io_errors)))
}
drop() { echo 3 >/proc/sys/vm/drop_caches; }
seed() { echo $((SEED * 1000000 + $1 * 1000 + $2)); }

setup() {
  wait_for_path /dev/vda || fail "no /dev/vda"
  mkdir -p $D
  case $FS in
    xfs) mkfs.xfs -q -f /dev/vda || fail "mkfs.xfs" ;;
    ext4) mkfs.ext4 -q -F /dev/vda || fail "mkfs.ext4" ;;
  esac
  mount -t $FS /dev/vda $D || fail "mount"
}
check_round() {
  local i=1
  while [ $i -le $FILES ]; do
    count check "$(pattern check $D/r$1-$i $MIB $(seed $1 $i) 2>>/tmp/errors)"
    i=$((i + 1))
  done
}
# A round writes new files, then reads them and those of the round before cold; older ones are deleted.
round() {
  local k=$1 i=1
  rm -f $D/r$((k - 2))-*
  while [ $i -le $FILES ]; do
    count write "$(pattern write $D/r$k-$i $MIB $(seed $k $i) 2>>/tmp/errors)"
    i=$((i + 1))
  done
  sync; drop
  [ -e $D/r$((k - 1))-1 ] && check_round $((k - 1))
  check_round $k
  say round $k
}
shared() {
  local n=0 bytes sum
  bytes=$(blockdev --getsize64 /dev/vdb)
  while [ $n -lt $1 ]; do
    blockdev --flushbufs /dev/vdb; drop
    sum=$(dd if=/dev/vdb bs=1M 2>/dev/null | sha256sum)
    if [ "${sum%% *}" = "$SHARED" ]; then count check "$bytes 0 0"; else count check "0 1 0"; fi
    n=$((n + 1)); shared_reads=$((shared_reads + 1)); say shared_reads $shared_reads
  done
}
# Leaves data acknowledged by the disk and not flushed: direct writes over blocks that exist already.
unflushed() {
  held=$1
  count write "$(pattern write $D/held $held 1 sync 2>>/tmp/errors)"; sync
  count write "$(pattern write $D/held $held $(seed 999 1) direct 2>>/tmp/errors)"
}
flush() {
  pattern sync $D/held 2>>/tmp/errors || errors=$((errors + 1))
  drop
  count check "$(pattern check $D/held $held $(seed 999 1) direct 2>>/tmp/errors)"
}
trim() { fstrim $D || errors=$((errors + 1)); }
finish() {
  local bad=0
  umount $D || fail "umount"
  case $FS in
    xfs) xfs_repair -n /dev/vda >/tmp/fsck 2>&1 || bad=1 ;;
    ext4) e2fsck -fn /dev/vda >/tmp/fsck 2>&1 || bad=1 ;;
  esac
  say fsck $bad
  [ $bad = 0 ] || mismatches=$((mismatches + 1))
}

say ready
while line=$(hear); do
  step=${line%% *}
  case $step in
    setup | round | shared | unflushed | flush | trim | finish) $line ;;
    *) fail "unknown step '$line'" ;;
  esac
  report
  head -c 2000 /tmp/errors 2>/dev/null | while read -r l; do say error "$l"; done
  : >/tmp/errors
  say done $step
  [ $step = finish ] && break
done
