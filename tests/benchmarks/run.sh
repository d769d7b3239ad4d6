#!/bin/bash
# Builds and runs one benchmark. The last line of its output is a JSON object with the figures and all that they depend on.
#
#   tests/benchmarks/run.sh NAME [--quick]
#
# --quick: fewer rounds, for a first look; not for figures that are told to anybody. Leave the machine alone meanwhile.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

names="worker_overhead teacher_overhead push_pull publish embedding fan_in optimizers hot_swap overload teacher_formats prediction kernels loss"

usage() {
  echo "usage: tests/benchmarks/run.sh NAME [--quick]; NAME is one of: $names" >&2
  exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] || usage
name=$1
case " $names " in
  *" $name "*) ;;
  *) usage ;;
esac
case "${2:-}" in
  "" | --quick) ;;
  *) usage ;;
esac

deploy/bazel.sh build -c opt --show_progress_rate_limit=10 "//tests/benchmarks:$name" >&2
binary=$(deploy/bazel.sh info -c opt bazel-bin 2>/dev/null)/tests/benchmarks/$name
TEST_TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/codistill-benchmark.XXXXXX")
export TEST_TMPDIR
trap 'rm -rf "$TEST_TMPDIR"' EXIT
# Binaries and the exporter are found from the root of the runfiles.
cd "$binary.runfiles/codistill"
"$binary" "${@:2}"
