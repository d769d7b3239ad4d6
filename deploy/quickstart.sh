#!/bin/bash
# From a fresh clone to two groups teaching one another: installs the dependencies, builds, and runs deploy/jobs/quickstart.textproto here.
#
#   deploy/quickstart.sh [--out DIR] [further flags of `codistillctl run`]
#
# Without --out the results go to a new folder under runs/.
set -euo pipefail
caller=$PWD
root=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
cd "$root"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

out=
flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --out)
      [ $# -ge 2 ] || { echo "quickstart: --out needs a folder" >&2; exit 2; }
      out=$2
      shift ;;
    --out=*) out=${1#--out=} ;;
    *) flags+=("$1") ;;
  esac
  shift
done
if [ -z "$out" ]; then
  out=$root/runs/quickstart-$(date +%Y%m%d-%H%M%S)
elif [ "${out#/}" = "$out" ]; then
  out=$caller/$out
fi

deploy/install_deps.sh
echo "quickstart: building (minutes the first time)"
deploy/bazel.sh build --config=opt --show_progress_rate_limit=5 --ui_event_filters=-info \
  //server:parameter_server //predserver:prediction_server //worker:worker //control:codistillctl
bin=$(deploy/bazel.sh info --config=opt bazel-bin 2>/dev/null)
mkdir -p "$(dirname "$out")"
echo "quickstart: running; results go to $out"
exec "$bin/control/codistillctl" run deploy/jobs/quickstart.textproto --out "$out" "${flags[@]}"
