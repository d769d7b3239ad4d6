#!/bin/bash
# Trains through 20 kills and a bad network, again and again, and compares every bit at the end with an undisturbed run.
#
#   tests/chaos/soak.sh [--seed N] [--runs K]
#
# A run takes one to two minutes. A failure names its seed; with that seed the same kills come at the same places.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

seed=1
runs=1
while [ $# -gt 0 ]; do
  case "$1 ${2:-}" in
    "--seed "[0-9]*) seed=$2 ;;
    "--runs "[0-9]*) runs=$2 ;;
    *)
      echo "usage: tests/chaos/soak.sh [--seed N] [--runs K]" >&2
      exit 2
      ;;
  esac
  shift 2
done

deploy/bazel.sh test --show_progress_rate_limit=10 --test_output=all --test_timeout=$((300 + runs * 300)) \
  --test_env=CODISTILL_SOAK_SEED="$seed" --test_env=CODISTILL_SOAK_RUNS="$runs" //tests/chaos:soak_test
