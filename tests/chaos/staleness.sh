#!/bin/bash
# The bound of BOUNDED_STALENESS, in full: a million steps under a simulated clock, ten thousand over gRPC with one worker ten times slower.
# The everyday tests do a tenth of each. About five minutes on two cores.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

deploy/bazel.sh test --config=opt --show_progress_rate_limit=10 --test_output=errors --test_timeout=900 \
  //server:leader_async_long_test //server:async_server_long_test
