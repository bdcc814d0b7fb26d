#!/bin/sh
# The default script: runs what the host sends, for Guest.run() and Guest.spawn().
#   from the host:  run ID BASE64      bg ID BASE64      quit
#   to the host:    @@ out ID TEXT...  @@ rc ID STATUS
. /lib/guest.sh
# one ID BASE64: the status sent is the command's own, not that of the pipe's end.
one() {
  echo "$2" | base64 -d >/run/cmd.$1
  { sh /run/cmd.$1 </dev/null 2>&1 3>&-; echo $? >/run/rc.$1; } |
    while IFS= read -r l || [ -n "$l" ]; do echo "@@ out $1 $l" >&3; done
  echo "@@ rc $1 $(cat /run/rc.$1)" >&3
  rm -f /run/cmd.$1 /run/rc.$1
}
say agent ready
while read -r verb id text <&3; do
  case $verb in
    run) one "$id" "$text" ;;
    # Not a child of this shell: when one ends, busybox restarts the read and drops what it has read.
    bg) (one "$id" "$text" &) ;;
    quit) break ;;
  esac
done
