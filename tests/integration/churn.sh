#!/bin/bash
# Workers leave and join a training group 20 times (elastic_test.cc); a few minutes. Prints the median and the
# longest step.
set -e
cd "$(dirname "$0")/../.."
exec bazel test //tests/integration:elastic_churn_test --test_filter='*WorkersLeaveAndJoin' --test_output=all "$@"
