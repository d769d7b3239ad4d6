#!/bin/bash
# Fuzzes what reads bytes of others, with libFuzzer and AddressSanitizer.
#
#   tests/fuzz/run.sh [--seconds N] [NAME...]
#
# NAME: frame_fuzz, job_fuzz, checkpoint_fuzz, inference_fuzz; default: all, N seconds each (600). A finding is written beside this script as corpus/NAME-<hash>,
# where NAME_test tries it from then on, and the exit code is 1.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

seconds=600
if [ "${1:-}" = --seconds ]; then
  seconds=${2:?usage: tests/fuzz/run.sh [--seconds N] [NAME...]}
  shift 2
fi
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(frame_fuzz job_fuzz checkpoint_fuzz inference_fuzz)

deploy/install_deps.sh --fuzz
targets=()
for name in "${names[@]}"; do targets+=("//tests/fuzz:${name}_libfuzzer"); done
deploy/bazel.sh build --config=fuzz --show_progress_rate_limit=10 -- "${targets[@]}"
bin=$(deploy/bazel.sh info --config=fuzz bazel-bin 2>/dev/null)/tests/fuzz

work=$(mktemp -d "${TMPDIR:-/tmp}/codistill-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT
export TEST_TMPDIR=$work
mkdir -p tests/fuzz/corpus
code=0
for name in "${names[@]}"; do
  mkdir -p "$work/$name"
  CODISTILL_FUZZ_SEEDS=$work/$name "$bin/${name}_libfuzzer"
  echo "== $name, $seconds s"
  # Inputs beyond a few frames find nothing new and are slow.
  if ! "$bin/${name}_libfuzzer" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=3000 -print_final_stats=1 \
    -artifact_prefix="$PWD/tests/fuzz/corpus/$name-" "$work/$name" >"$work/$name.log" 2>&1; then
    code=1
    echo "$name: FINDING"
    tail -60 "$work/$name.log"
  else
    grep -E "^stat::number_of_executed_units|^stat::peak_rss_mb|^Done" "$work/$name.log"
    grep -E "cov:" "$work/$name.log" | tail -1
  fi
done
exit $code
