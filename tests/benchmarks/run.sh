#!/bin/bash
# Builds and runs one benchmark. The last line of its output is a JSON object with the figures and all that they depend on.
#
#   tests/benchmarks/run.sh NAME [--quick] [--device=cuda:N]
#
# --quick: fewer rounds, for a first look; not for figures that are told to anybody. Leave the machine alone meanwhile.
# --device: worker_overhead and teacher_overhead (both in one) of a ResNet-50 there, by a build with LIBTORCH and --config=cuda (docs/gpu.md).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

names="worker_overhead teacher_overhead push_pull publish embedding fan_in optimizers hot_swap overload teacher_formats prediction kernels loss"

usage() {
  echo "usage: tests/benchmarks/run.sh NAME [--quick]; NAME is one of: $names" >&2
  exit 2
}
[ $# -ge 1 ] && [ $# -le 3 ] || usage
name=$1
shift
case " $names " in
  *" $name "*) ;;
  *) usage ;;
esac
flags=(-c opt)
for argument in "$@"; do
  case "$argument" in
    --quick) ;;
    --device=*)
      case "$name" in
        worker_overhead | teacher_overhead | device_overhead) name=device_overhead ;;
        *) usage ;;
      esac
      case "$argument" in
        --device=cuda:*) flags+=(--config=cuda "--repo_env=LIBTORCH=${LIBTORCH:?names a libtorch for CUDA, as docs/gpu.md says}") ;;
      esac
      ;;
    *) usage ;;
  esac
done

deploy/bazel.sh build "${flags[@]}" --show_progress_rate_limit=10 "//tests/benchmarks:$name" >&2
binary=$(deploy/bazel.sh info "${flags[@]}" bazel-bin 2>/dev/null)/tests/benchmarks/$name
TEST_TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/codistill-benchmark.XXXXXX")
export TEST_TMPDIR
trap 'rm -rf "$TEST_TMPDIR"' EXIT
# Binaries and the exporter are found from the root of the runfiles.
cd "$binary.runfiles/codistill"
"$binary" "$@"
