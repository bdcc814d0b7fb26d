#!/bin/sh
# PID 1 of a test guest. The console (ttyS0) is the kernel's log on the host; the second serial line
# (ttyS1) carries the protocol: lines "@@ KEY VALUE" to the host, plain lines from it.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/shm /dev/pts /tmp /run /mnt /root /var/lib
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
ln -sf /proc/mounts /etc/mtab
ln -sf /proc/self/fd /dev/fd
dmesg -n 4
stty -F /dev/ttyS1 raw -echo -onlcr 2>/dev/null
exec 3<>/dev/ttyS1
. /lib/guest.sh
if [ -n "$ON_ROOT" ]; then : >/etc/modules.now; fi
while read -r path; do
  insmod "/lib/modules/$(uname -r)/$path" || say fail "insmod $path"
done </etc/modules.now
if [ -e /etc/cgroup2 ]; then
  mount -t cgroup2 cg /sys/fs/cgroup
  for c in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control
  done
fi
ip link set lo up 2>/dev/null
if [ -e /etc/root ] && [ -z "$ON_ROOT" ]; then
  # Guest(root=...): the same init goes on from a disk made by image.root_image().
  read -r device type options </etc/root
  modprobe -a virtio_pmem nd_pmem "$type" 2>/dev/null
  wait_for_path "$device" 30 || { say fail "no root device $device"; poweroff -f; }
  mkdir -p /newroot
  mount -t "$type" -o "$options" "$device" /newroot || { say fail "cannot mount $device"; poweroff -f; }
  cp /script.sh /newroot/script.sh
  umount /tmp /run /sys /proc
  exec 3>&-
  ON_ROOT=1 exec switch_root /newroot /init
fi
say booted "$(uname -r) $(cut -d' ' -f1 /proc/uptime)"
sh /script.sh </dev/null
say exit $?
sync
poweroff -f
