#!/usr/bin/env bash
# A command under a cap of memory (page cache counts) and a limit of what it reads from a disk, and the exact number of
# bytes it read. Usage, as root: box.sh MEMORY_BYTES READ_BYTES_PER_SECOND MOUNT COMMAND…
#
# cgroup v1 (memory, blkio), mounted for this command alone. The limit is on the device that MOUNT lies on. The last
# line of stderr is `box: rc=… limit=… peak=… read=… oom=…`, in bytes; 90 or 91: there are no such groups here.
set -uo pipefail
[[ $# -ge 4 ]] || { sed -n 2,6p "$0" >&2; exit 2; }
[[ -n ${BOXED-} ]] || BOXED=1 exec unshare --cgroup --mount bash "$0" "$@"
memory=$1 rate=$2 mount=$3
shift 3
top=$(mktemp -d)
mkdir "$top/memory" "$top/blkio"
mount -t cgroup -o memory none "$top/memory" && mount -t cgroup -o blkio none "$top/blkio" || exit 90
of_memory=$top/memory/box.$$ of_disk=$top/blkio/box.$$
mkdir "$of_memory" "$of_disk" || exit 91
echo "$memory" >"$of_memory/memory.limit_in_bytes"
device=$(mountpoint -d "$mount")
echo "$device $rate" >"$of_disk/blkio.throttle.read_bps_device"
(
  echo "$BASHPID" >"$of_memory/cgroup.procs"
  echo "$BASHPID" >"$of_disk/cgroup.procs"
  exec "$@"
)
rc=$?
read_bytes=$(awk -v d="$device" '$1 == d && $2 == "Read" {n = $3} END {print n + 0}' "$of_disk/blkio.throttle.io_service_bytes")
oom=$(awk '/oom_kill / {print $2}' "$of_memory/memory.oom_control")
echo "box: rc=$rc limit=$(<"$of_memory/memory.limit_in_bytes") peak=$(<"$of_memory/memory.max_usage_in_bytes") read=$read_bytes oom=$oom" >&2
rmdir "$of_memory" "$of_disk"
umount "$top/memory" "$top/blkio"
rmdir "$top/memory" "$top/blkio" "$top"
exit "$rc"
