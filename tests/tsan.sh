#!/bin/bash
# Runs under ThreadSanitizer every test without gRPC and libtorch in it, and those of the servers' domain classes, which link gRPC but open no socket.
# Tests that need a GPU are left out, and emulated ones: one thread, on stacks that the sanitizer does not know. Further arguments go to Bazel.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

readarray -t targets < <(deploy/bazel.sh query 2>/dev/null 'kind("cc_test rule", //...)
    except rdeps(//..., //third_party:grpc)
    except rdeps(//..., //third_party:torch)
    except attr("tags", "manual", //...)
    except attr("tags", "[\[ ]gpu[,\]]", //...)
    except rdeps(//..., //cuda/testing:emulated_cuda)
  union kind("cc_test rule", //server:all)
    except rdeps(//server:all, //server:server)
    except rdeps(//..., //third_party:torch)
    except attr("tags", "manual", //...)')
if [ ${#targets[@]} -lt 50 ]; then
  echo "tests/tsan.sh: ${#targets[@]} tests were found; something is wrong with the query" >&2
  exit 1
fi
echo "${#targets[@]} tests"
data=${CODISTILL_DATA:-$(readlink -f ../shared/data || true)}
[ -z "$data" ] || set -- "--test_env=CODISTILL_DATA=$data" "$@"
exec deploy/bazel.sh test --config=tsan --keep_going --show_progress_rate_limit=10 "$@" -- "${targets[@]}"
