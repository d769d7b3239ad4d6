#!/bin/bash
# Everything there is to check on a machine with an NVIDIA GPU, from a fresh clone:
#
#   deploy/gpu/check.sh [--quick] [--only PART]
#
#   build        installs what is missing, builds the CUDA code and its tests
#   tests        runs every test that needs a GPU; one that finds none has failed
#   sanitizer    runs compute-sanitizer over them: memcheck, racecheck, initcheck, synccheck
#   benchmarks   runs tests/benchmarks/gpu_*: kernels beside the device's own copy
#   pytorch      measures the loss beside PyTorch's (deploy/gpu/loss_pytorch.py)
#   worker       measures a ResNet-50 worker beside libtorch alone, and what teachers cost (tests/benchmarks/device_overhead)
#   training     trains two groups that teach one another, all on cuda:0
#
# --quick: fewer rounds, memcheck alone, a short training; not for figures that are told to anybody.
# --only PART: that part alone, with what it needs built. May be given several times.
#
# LIBTORCH names a libtorch for CUDA (docs/gpu.md says where to get one): what computes models needs it and is left out, by name, without.
# CODISTILL_PYTHON names a Python with a PyTorch for CUDA (default: python3). CUDA_HOME names the CUDA Toolkit (default: /usr/local/cuda). A part
# whose tool is absent is skipped, by name.
#
# The last line is a JSON object with the result and the figures of every part. Exit code: 0 when nothing failed, 1 when a part did, 2 when the
# machine lacks what all parts need, or for a wrong flag.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.." || exit 2

all_parts="build tests sanitizer benchmarks pytorch worker training"
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
wrong() {
  echo "check: $1" >&2
  usage >&2
  exit 2
}

quick=
parts=
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --quick) quick=--quick ;;
    --only)
      [ $# -ge 2 ] || wrong "--only needs a part: one of $all_parts"
      case " $all_parts " in
        *" $2 "*) parts="$parts $2" ;;
        *) wrong "--only $2: no such part; want one of $all_parts" ;;
      esac
      shift
      ;;
    *) wrong "unknown argument $1" ;;
  esac
  shift
done
: "${parts:=$all_parts}"

# ---- What the machine has. ----

cuda_home=${CUDA_HOME:-/usr/local/cuda}
missing=()
if ! command -v python3 >/dev/null; then
  missing+=("python3: not on the path; this script writes its results with it")
fi
if [ ! -x "$cuda_home/bin/nvcc" ]; then
  missing+=("nvcc: neither CUDA_HOME nor /usr/local/cuda holds bin/nvcc; install the CUDA Toolkit (13.0) or set CUDA_HOME")
fi
devices=
if ! command -v nvidia-smi >/dev/null; then
  missing+=("nvidia-smi: not on the path; install NVIDIA's driver, or run this on a machine with a GPU")
elif ! devices=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1) || [ -z "$devices" ]; then
  missing+=("a GPU: nvidia-smi finds none: ${devices:-no output}")
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "check: this machine lacks what the checks need:" >&2
  printf '  - %s\n' "${missing[@]}" >&2
  exit 2
fi
toolkit=$("$cuda_home/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
echo "== GPU: $(echo "$devices" | head -1); CUDA Toolkit $toolkit"

sanitizer=
for candidate in "$(command -v compute-sanitizer || true)" "$cuda_home/bin/compute-sanitizer" "$cuda_home/compute-sanitizer/compute-sanitizer"; do
  if [ -z "$sanitizer" ] && [ -n "$candidate" ] && [ -x "$candidate" ]; then sanitizer=$candidate; fi
done

work=$(mktemp -d "${TMPDIR:-/tmp}/codistill-gpu.XXXXXX") || exit 2
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/figures" "$work/tmp"

flags=(-c opt --config=opt --config=cuda)
[ -z "${LIBTORCH:-}" ] || flags+=("--repo_env=LIBTORCH=$LIBTORCH")

# ---- What parts have in common. ----

build() { deploy/bazel.sh build "${flags[@]}" --show_progress_rate_limit=10 "$@"; }

# Says why a part failed or was skipped; what is said first stays.
because() {
  echo "$1" >&2
  [ -s "$work/reason" ] || echo "$1" >"$work/reason"
}
skip() {
  because "$1"
  return 3
}

bin_folder() { deploy/bazel.sh info "${flags[@]}" bazel-bin 2>/dev/null; }
binary_of() { # LABEL
  local path=${1#//}
  echo "$bin/${path/://}"
}

# The tests and the benchmarks that need a GPU.
test_labels() { deploy/bazel.sh query 'attr("tags", "[\[ ]gpu[,\]]", tests(//...))' 2>/dev/null | sort; }
benchmark_labels() { deploy/bazel.sh query 'filter("/benchmarks:gpu_", kind("cc_binary", //tests/benchmarks:all))' 2>/dev/null | sort; }

# Builds the tests. Those outside cuda/ are of models, which need LIBTORCH.
build_tests() {
  local label
  bin=$(bin_folder) || return 1
  built=()
  for label in $(test_labels); do
    if [ -n "${LIBTORCH:-}" ] || [ "${label#//cuda}" != "$label" ]; then
      built+=("$label")
    else
      echo "left out without LIBTORCH: $label"
    fi
  done
  if [ ${#built[@]} -eq 0 ]; then
    because "bazel query finds no test with the tag gpu"
    return 1
  fi
  if ! build "${built[@]}"; then
    because "the tests do not build"
    return 1
  fi
}

# Runs a binary where its data are, at most $1 seconds. Further words before the binary are put in front of it.
run_for() { # SECONDS BINARY [ARGUMENT...]
  local seconds=$1 binary=$2
  shift 2
  (
    if [ -d "$binary.runfiles/codistill" ]; then cd "$binary.runfiles/codistill" || exit 1; fi
    export TEST_TMPDIR="$work/tmp" TEST_SRCDIR="$binary.runfiles" TEST_WORKSPACE=codistill
    timeout "$seconds" "${front[@]}" "$binary" "$@" </dev/null
  )
}

# The last line of a log, if it is a JSON object, as figures of that name.
keep_figures() { # NAME LOG
  if ! tail -n 1 "$2" | python3 -c 'import json, sys
assert isinstance(json.load(sys.stdin), dict)' 2>/dev/null; then
    because "$1: the last line of its output is no JSON object"
    return 1
  fi
  tail -n 1 "$2" >"$work/figures/$1.json"
}

# ---- The parts. Each returns 0, or 3 when it was skipped. ----

part_build() {
  if ! deploy/install_deps.sh; then
    because "deploy/install_deps.sh failed"
    return 1
  fi
  if ! build -- //cuda/...; then
    because "//cuda/... does not build"
    return 1
  fi
  build_tests
}

part_tests() {
  local label name code failed=0
  build_tests || return 1
  front=()
  for label in "${built[@]}"; do
    name=${label##*:}
    echo "-- $label"
    run_for 1200 "$(binary_of "$label")" "--gtest_output=json:$work/$name.json" | tee "$work/$name.log"
    code=${PIPESTATUS[0]}
    # A crash leaves no file. Tests that find no GPU skip and say so; others may skip for good reasons.
    if ! python3 - "$work/$name.json" "$work/figures/$name.json" "$code" "$work/$name.log" <<'PYTHON'; then
import json, os, sys
report, to, code = sys.argv[1], sys.argv[2], int(sys.argv[3])
cases = []
if os.path.exists(report):
    with open(report) as file:
        cases = [case for suite in json.load(file)["testsuites"] for case in suite["testsuite"]]
skipped = [case for case in cases if case.get("result") == "SKIPPED"]
failed = [case["name"] for case in cases if case.get("failures")]
with open(to, "w") as file:
    json.dump({"passed": len(cases) - len(skipped) - len(failed), "failed": failed, "skipped": len(skipped), "exit_code": code}, file)
with open(sys.argv[4], errors="replace") as file:
    no_device = any("no cuda device" in line.lower() for line in file)
if no_device:
    print("it finds no CUDA device")
sys.exit(1 if code != 0 or not cases or failed or no_device or len(skipped) == len(cases) else 0)
PYTHON
      because "$name: $(cat "$work/figures/$name.json")"
      failed=1
    fi
  done
  return $failed
}

part_sanitizer() {
  local tool label name failed=0 tools="memcheck racecheck initcheck synccheck"
  [ -n "$sanitizer" ] || {
    skip "compute-sanitizer is neither on the path nor in $cuda_home"
    return
  }
  [ -z "$quick" ] || tools=memcheck
  build_tests || return 1
  for tool in $tools; do
    for label in "${built[@]}"; do
      name=${label##*:}
      echo "-- $tool $label"
      # Tests ask for errors of the runtime, which are no errors of ours.
      front=("$sanitizer" --tool "$tool" --error-exitcode 86 --report-api-errors no)
      if run_for 1800 "$(binary_of "$label")" >"$work/$tool.log" 2>&1; then
        echo '{"clean": true}' >"$work/figures/${tool}_$name.json"
      else
        tail -n 60 "$work/$tool.log"
        echo '{"clean": false}' >"$work/figures/${tool}_$name.json"
        because "$tool finds faults in $name, or it did not end: $(grep -m 1 'ERROR SUMMARY\|========= .*\(Invalid\|Race\|Uninit\|Barrier\)' "$work/$tool.log")"
        failed=1
      fi
    done
  done
  front=()
  return $failed
}

part_benchmarks() {
  local label name failed=0
  bin=$(bin_folder) || return 1
  mapfile -t benchmarks < <(benchmark_labels)
  if [ ${#benchmarks[@]} -eq 0 ]; then
    because "bazel query finds no benchmark //tests/benchmarks:gpu_*"
    return 1
  fi
  if ! build "${benchmarks[@]}"; then
    because "the benchmarks do not build"
    return 1
  fi
  front=()
  for label in "${benchmarks[@]}"; do
    name=${label##*:}
    echo "-- $label"
    # shellcheck disable=SC2086  # --quick or nothing
    run_for 1800 "$(binary_of "$label")" $quick | tee "$work/$name.log"
    if [ "${PIPESTATUS[0]}" -ne 0 ]; then
      because "$name failed or did not end: $(tail -n 1 "$work/$name.log")"
      failed=1
    else
      keep_figures "$name" "$work/$name.log" || failed=1
    fi
  done
  return $failed
}

part_pytorch() {
  local python=${CODISTILL_PYTHON:-python3} script=deploy/gpu/loss_pytorch.py
  [ -f "$script" ] || {
    skip "there is no $script"
    return
  }
  if ! "$python" -c 'import sys, torch
sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
    skip "$python has no PyTorch for CUDA; CODISTILL_PYTHON may name one that has"
    return
  fi
  # shellcheck disable=SC2086  # --quick or nothing
  timeout 1800 "$python" "$script" $quick </dev/null | tee "$work/pytorch.log"
  if [ "${PIPESTATUS[0]}" -ne 0 ]; then
    because "$script failed or did not end"
    return 1
  fi
  keep_figures loss_pytorch "$work/pytorch.log"
}

part_worker() {
  local label=//tests/benchmarks:device_overhead
  [ -n "${LIBTORCH:-}" ] || {
    skip "LIBTORCH is not set; docs/gpu.md says where to get a libtorch for CUDA"
    return
  }
  bin=$(bin_folder) || return 1
  if ! build "$label"; then
    because "$label does not build with LIBTORCH=$LIBTORCH"
    return 1
  fi
  front=()
  # shellcheck disable=SC2086  # --quick or nothing
  run_for 3600 "$(binary_of "$label")" --device=cuda:0 $quick | tee "$work/worker.log"
  if [ "${PIPESTATUS[0]}" -ne 0 ]; then
    because "device_overhead failed or did not end: $(tail -n 1 "$work/worker.log")"
    return 1
  fi
  keep_figures device_overhead "$work/worker.log"
}

part_training() {
  local job=$work/two_groups.textproto steps=2000
  [ -n "${LIBTORCH:-}" ] || {
    skip "LIBTORCH is not set; docs/gpu.md says where to get a libtorch for CUDA"
    return
  }
  [ -z "$quick" ] || steps=600
  if ! build //server:parameter_server //predserver:prediction_server //worker:worker //control:codistillctl; then
    because "the daemons do not build with LIBTORCH=$LIBTORCH"
    return 1
  fi
  # The job of the quickstart, every worker, prediction server and the evaluator on the GPU.
  sed -e 's/^\(groups {.*\) }$/\1 devices: "cuda:0" prediction_devices: "cuda:0" }/' \
    -e "s/^stop {.*/stop { steps: $steps }/" deploy/jobs/quickstart.textproto >"$job"
  echo 'evaluator { device: "cuda:0" }' >>"$job"
  if [ "$(grep -c 'devices: "cuda:0"' "$job")" -ne 2 ] || ! grep -q "^stop { steps: $steps }" "$job"; then
    because "deploy/jobs/quickstart.textproto is not as this script expects it: two lines 'groups { ... }' and one 'stop { ... }'"
    return 1
  fi
  if ! timeout 1800 "$(bin_folder)/control/codistillctl" run "$job" --out "$work/run" </dev/null; then
    because "codistillctl run failed or did not end"
    find "$work/run" -name '*.log' -exec tail -n 5 {} + 2>/dev/null
    return 1
  fi
  # Done when both groups made all their steps, learned from one another and were evaluated.
  if ! python3 - "$work/run/summary.json" "$work/figures/two_groups.json" "$steps" <<'PYTHON'; then
import json, sys
with open(sys.argv[1]) as file:
    summary = json.load(file)
steps = int(sys.argv[3])
figures = {"wall_seconds": summary["wall_seconds"], "group_disagreement": summary.get("group_disagreement")}
problems = []
for group in summary["groups"]:
    teacher = group.get("teacher", {})
    figures[group["name"]] = {
        "steps": int(group["steps"]),
        "examples_per_second": group["examples_per_second"],
        "final": group.get("final"),
        "teacher_used_steps": int(teacher.get("used_steps", 0)),
        "teacher_failures": int(teacher.get("failures", 0)),
    }
    if int(group["steps"]) < steps:
        problems.append("%s made %s steps of %d" % (group["name"], group["steps"], steps))
    if not int(teacher.get("used_steps", 0)):
        problems.append(group["name"] + " never heard its teacher")
    if not group.get("final"):
        problems.append(group["name"] + " was not evaluated")
with open(sys.argv[2], "w") as file:
    json.dump(figures, file)
print("; ".join(problems) or json.dumps(figures))
sys.exit(1 if problems or len(summary["groups"]) != 2 else 0)
PYTHON
    because "the run of two groups is not as it should be: see above"
    return 1
  fi
}

# ---- All that were asked for. ----

failed=()
for part in $parts; do
  echo "== $part"
  rm -rf "$work/figures" "$work/reason"
  mkdir -p "$work/figures"
  began=$(date +%s)
  "part_$part"
  code=$?
  case $code in
    0) result=passed ;;
    3) result=skipped ;;
    *)
      result=failed
      failed+=("$part")
      ;;
  esac
  echo "== $part: $result"
  python3 - "$work" "$part" "$result" "$(($(date +%s) - began))" <<'PYTHON'
import json, os, sys
work, part, result, seconds = sys.argv[1:]
entry = {"result": result, "seconds": int(seconds)}
reason = os.path.join(work, "reason")
if os.path.exists(reason) and result != "passed":
    with open(reason) as file:
        entry["reason"] = file.read().strip()
folder = os.path.join(work, "figures")
for name in sorted(os.listdir(folder)):
    with open(os.path.join(folder, name)) as file:
        entry.setdefault("figures", {})[name[: -len(".json")]] = json.load(file)
path = os.path.join(work, "report.json")
report = {}
if os.path.exists(path):
    with open(path) as file:
        report = json.load(file)
report[part] = entry
with open(path, "w") as file:
    json.dump(report, file)
PYTHON
done

[ ${#failed[@]} -eq 0 ] || echo "FAILED: ${failed[*]}"
python3 - "$work/report.json" "$devices" "$toolkit" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(git -c safe.directory='*' rev-parse HEAD 2>/dev/null)" "$quick" <<'PYTHON'
import json, sys
path, devices, toolkit, date, commit, quick = sys.argv[1:]
with open(path) as file:
    parts = json.load(file)
failed = [name for name, part in parts.items() if part["result"] == "failed"]
print(json.dumps({
    "check": "gpu", "date": date, "commit": commit, "quick": bool(quick), "devices": devices.splitlines(), "cuda_toolkit": toolkit,
    "failed": failed, "skipped": [name for name, part in parts.items() if part["result"] == "skipped"], "parts": parts}))
PYTHON
[ ${#failed[@]} -eq 0 ] || exit 1
