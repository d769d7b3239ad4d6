#!/bin/bash
# Runs the unittest file named by the first argument; third_party/bazel/python.bzl.
set -eu
export PYTHONPATH="$PWD" PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3 third_party/bazel/unittest_main.py "$@"
