# Functions for a script that runs in a test guest (sourced by `. /lib/guest.sh`).

# say KEY VALUE...: one line to the host.
say() { echo "@@ $*" >&3; }

# hear: the next line from the host, on standard output.
hear() { local line; read -r line <&3; echo "$line"; }

# await WORD: waits until the host says WORD; other lines are dropped.
await() { local line; while read -r line <&3; do [ "$line" = "$1" ] && return 0; done; }

# fail TEXT: says so and ends the script.
fail() { say fail "$*"; exit 1; }

# wait_for_path PATH [SECONDS]: until a device node is there.
wait_for_path() {
  local left=$((${2:-30} * 10))
  while [ ! -e "$1" ]; do
    [ $left -gt 0 ] || return 1
    left=$((left - 1)); usleep 100000
  done
}

# io_errors: how many block I/O errors the kernel has logged.
io_errors() { dmesg | grep -cE 'I/O error|critical (target|medium|space) error|EXT4-fs error|XFS .*(corruption|log I/O error)'; }
