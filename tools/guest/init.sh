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
say booted "$(uname -r) $(cut -d' ' -f1 /proc/uptime)"
sh /script.sh </dev/null
say exit $?
sync
poweroff -f
