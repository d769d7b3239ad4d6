#!/bin/bash
# Installs what is missing, checks the style, builds everything and runs every test. Further arguments go to Bazel:
#
#   tests/run.sh --config=asan
#
# CODISTILL_DATA names the folder of the real data sets (default: shared/data beside the repository); tests that need one skip without it.
# CODISTILL_TRITON_PYTHON names a Python with the packages of tests/interop/requirements.txt; by default they are installed into a virtual
# environment of their own in the user's cache, and the tests that need them skip where PyPI is out of reach.
# The last line is `N passed, N failed`; the exit code is 0 only when nothing failed. Code is compiled with warnings as errors, except under
# a sanitizer, whose instrumentation makes the compiler warn of code that is right.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1

other_failures=()
events=$(mktemp "${TMPDIR:-/tmp}/codistill-events.XXXXXX")
trap 'rm -f "$events"' EXIT

finish() {
  /usr/bin/python3 tests/summarize.py "$events" "$1" "${other_failures[@]}"
  exit
}

if ! deploy/install_deps.sh; then
  echo "FAILED: deploy/install_deps.sh"
  echo "0 passed, 1 failed"
  exit 1
fi

echo "== style"
# The clone may belong to another user than the one that tests it.
unformatted=$(git -c safe.directory='*' ls-files '*.cc' '*.h' '*.cu' '*.cuh' | while read -r file; do
  [ ! -e "$file" ] || clang-format --dry-run -Werror "$file" >/dev/null 2>&1 || echo "$file"
done) || other_failures+=("style (git ls-files failed: not a clone?)")
if [ -n "$unformatted" ]; then
  echo "not formatted (clang-format -i mends it):"
  echo "$unformatted"
  other_failures+=("style (clang-format)")
fi

flags=("$@")
case " $* " in
  *--config=asan* | *--config=ubsan*) ;;
  *) flags+=(--config=werror) ;;
esac
data=${CODISTILL_DATA:-$(readlink -f ../shared/data || true)}
test_flags=()
if [ -n "$data" ] && [ -d "$data" ]; then
  test_flags+=("--test_env=CODISTILL_DATA=$(readlink -f "$data")")
else
  echo "no real data: CODISTILL_DATA is not set and ../shared/data does not exist"
fi

triton=${CODISTILL_TRITON_PYTHON:-$(tests/interop/install_tritonclient.sh)} && test_flags+=("--test_env=CODISTILL_TRITON_PYTHON=$triton")

echo "== build and test"
deploy/bazel.sh test --keep_going --show_progress_rate_limit=10 --build_event_json_file="$events" \
  "${flags[@]}" "${test_flags[@]}" -- //...
bazel_code=$?

echo "== CUDA"
if [ ! -d cuda ]; then
  echo "skipped: there is no folder cuda"
elif [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  deploy/bazel.sh build --keep_going --show_progress_rate_limit=10 --config=cuda "${flags[@]}" -- //cuda/... ||
    other_failures+=("build of //cuda/... with --config=cuda")
else
  echo "skipped: no CUDA Toolkit (neither CUDA_HOME nor /usr/local/cuda holds bin/nvcc)"
fi

echo "== summary"
finish "$bazel_code"
