#!/bin/bash
# Bazel for scripts, with what it assumes of a machine put right: works as root in a chroot or container, without HOME, with stdin closed.
#
#   deploy/bazel.sh build --config=opt //server:parameter_server
#
# BAZEL_USER_ROOT chooses where it keeps its state (default: Bazel's own, under ~/.cache).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

startup=()
if [ -n "${BAZEL_USER_ROOT:-}" ]; then
  startup+=("--output_user_root=$BAZEL_USER_ROOT")
elif [ -z "${HOME:-}" ] || [ ! -w "${HOME:-/}" ]; then
  startup+=("--output_user_root=${TMPDIR:-/tmp}/codistill-bazel-$(id -u)")
fi
# Bazel names its folders after the user and asks the environment first.
export HOME="${HOME:-/}" USER="${USER:-$(id -un 2>/dev/null || id -u)}"
exec bazel "${startup[@]}" "$@" </dev/null
