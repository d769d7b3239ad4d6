"""Tests of check.sh: what it makes of a machine without a GPU, and of builds, tests, tools and
benchmarks that go well and wrong. Bazel, the CUDA Toolkit, the driver and all programs are made up."""

import json
import os
import shutil
import subprocess
import tempfile
import unittest

BAZEL = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
case "$1" in
  info) echo "$FAKE_ROOT/bin" ;;
  query)
    case "$2" in
      *tags*) printf '%s\\n' //cuda:good_cuda_test $FAKE_TESTS ;;
      *) printf '%s\\n' //tests/benchmarks:gpu_one ;;
    esac ;;
  build) exit "${FAKE_BUILD_CODE:-0}" ;;
esac
"""

# A binary of tests: its cases' results are in a variable of its own.
TEST = """#!/bin/bash
for argument in "$@"; do
  case "$argument" in --gtest_output=json:*) report=${argument#*json:} ;; esac
done
[ "%(code)d" -lt 128 ] || exit %(code)d
[ -z "${report:-}" ] || cat >"$report" <<'JSON'
{"testsuites": [{"testsuite": %(cases)s}]}
JSON
echo '%(says)s'
exit %(code)d
"""

PASSED = {"name": "Passes", "result": "COMPLETED"}
FAILED = {"name": "Fails", "result": "COMPLETED", "failures": [{"failure": "it is wrong"}]}
SKIPPED = {"name": "Skips", "result": "SKIPPED"}


class CheckTest(unittest.TestCase):
    def setUp(self):
        self.root = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))
        self.addCleanup(shutil.rmtree, self.root)
        for path in ["deploy/gpu/check.sh", "deploy/bazel.sh"]:
            os.makedirs(os.path.join(self.root, os.path.dirname(path)), exist_ok=True)
            shutil.copy(path, os.path.join(self.root, path))
        self.program("path/bazel", BAZEL)
        self.environment = {
            "PATH": os.path.join(self.root, "path") + ":/usr/bin:/bin",
            "HOME": self.root,
            "TMPDIR": self.root,
            "FAKE_ROOT": self.root,
            "CUDA_HOME": os.path.join(self.root, "cuda"),
            "CODISTILL_PYTHON": "/nonexistent/python",
        }

    def program(self, path, text):
        path = os.path.join(self.root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o755)

    def make_tests(self, name, cases, code=0, says=""):
        text = TEST % {"cases": json.dumps(cases), "code": code, "says": says}
        self.program("bin/cuda/" + name, text)

    def machine(self):
        """Gives the machine a GPU, a toolkit, a test and a benchmark that pass."""
        self.program("path/nvidia-smi", "#!/bin/bash\necho 'Made-up GPU, 1.0, 1 MiB'\n")
        self.program("cuda/bin/nvcc", "#!/bin/bash\necho 'Cuda release 13.0, V13.0.1'\n")
        self.make_tests("good_cuda_test", [PASSED])
        self.benchmark("echo starting; echo '{\"figure\": 7}'")

    def benchmark(self, body):
        self.program("bin/tests/benchmarks/gpu_one", "#!/bin/bash\n" + body + "\n")

    def check(self, *flags):
        done = subprocess.run([os.path.join(self.root, "deploy/gpu/check.sh"), *flags],
                              env=self.environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=60, check=False)
        self.errors = done.stderr
        lines = done.stdout.splitlines()
        self.report = json.loads(lines[-1]) if done.returncode < 2 and lines else None
        return done.returncode

    def part(self, name):
        self.assertEqual(self.check("--only", name) != 0, name in self.report["failed"])
        return self.report["parts"][name]

    def test_says_what_a_machine_without_a_gpu_lacks(self):
        self.environment["PATH"] = os.path.join(self.root, "path") + ":" + self.some_tools()
        self.assertEqual(self.check(), 2)
        self.assertIn("nvcc: neither CUDA_HOME", self.errors)
        self.assertIn("nvidia-smi: not on the path", self.errors)

    def some_tools(self):
        """A folder with what the script calls before it looks for a GPU: no nvidia-smi here."""
        for tool in ["bash", "dirname", "readlink", "python3", "sed", "env"]:
            os.makedirs(os.path.join(self.root, "tools"), exist_ok=True)
            os.symlink(shutil.which(tool), os.path.join(self.root, "tools", tool))
        return os.path.join(self.root, "tools")

    def test_says_when_the_driver_finds_no_gpu(self):
        self.machine()
        self.program("path/nvidia-smi", "#!/bin/bash\necho 'No devices were found'\nexit 6\n")
        self.assertEqual(self.check(), 2)
        self.assertIn("nvidia-smi finds none: No devices were found", self.errors)

    def test_refuses_flags_it_does_not_know(self):
        for flags in [["--slow"], ["--only"], ["--only", "everything"]]:
            self.assertEqual(self.check(*flags), 2)
            self.assertIn("check: ", self.errors)
        self.assertEqual(self.check("--only", "everything"), 2)
        self.assertIn("no such part", self.errors)

    def test_reports_parts_that_pass_and_skips_by_name(self):
        self.machine()
        only = sum((["--only", part] for part in
                    ["tests", "sanitizer", "benchmarks", "pytorch", "worker", "training"]), [])
        self.assertEqual(self.check(*only), 0)
        parts = self.report["parts"]
        self.assertEqual(parts["tests"]["result"], "passed")
        self.assertEqual(parts["tests"]["figures"]["good_cuda_test"]["passed"], 1)
        self.assertEqual(parts["benchmarks"]["figures"], {"gpu_one": {"figure": 7}})
        self.assertEqual(self.report["skipped"], ["sanitizer", "pytorch", "worker", "training"])
        self.assertIn("compute-sanitizer", parts["sanitizer"]["reason"])
        self.assertIn("LIBTORCH is not set", parts["training"]["reason"])
        self.assertEqual(self.report["devices"], ["Made-up GPU, 1.0, 1 MiB"])
        self.assertEqual(self.report["cuda_toolkit"], "13.0")

    def test_fails_with_a_test_that_fails_or_crashes_or_finds_no_gpu(self):
        self.machine()
        self.environment["FAKE_TESTS"] = "//cuda:other_cuda_test"
        for cases, code, says in [([PASSED, FAILED], 1, ""), ([PASSED], 139, ""), ([], 0, ""),
                                  ([PASSED, SKIPPED], 0, "no CUDA device"), ([SKIPPED], 0, "")]:
            self.make_tests("other_cuda_test", cases, code, says)
            part = self.part("tests")
            self.assertEqual(part["result"], "failed", (cases, code, says))
            self.assertIn("other_cuda_test", part["reason"])
            self.assertEqual(part["figures"]["good_cuda_test"]["passed"], 1)
        self.make_tests("other_cuda_test", [PASSED, SKIPPED], 0, "there is a CUDA device")
        self.assertEqual(self.part("tests")["result"], "passed")

    def test_leaves_tests_of_models_out_without_libtorch(self):
        self.machine()
        self.environment["FAKE_TESTS"] = "//worker:cuda_step_test"
        self.assertEqual(self.part("tests")["result"], "passed")
        self.environment["LIBTORCH"] = "/nonexistent"
        self.assertEqual(self.part("tests")["result"], "failed")

    def test_fails_when_the_sanitizer_finds_faults(self):
        self.machine()
        self.program("path/compute-sanitizer", "#!/bin/bash\n"
                     "[ \"$2\" != racecheck ] || { echo '========= ERROR SUMMARY: 3 errors'; exit 86; }\n")
        part = self.part("sanitizer")
        self.assertEqual(part["result"], "failed")
        self.assertIn("racecheck finds faults in good_cuda_test", part["reason"])
        self.assertIn("3 errors", part["reason"])
        self.assertTrue(part["figures"]["memcheck_good_cuda_test"]["clean"])
        self.assertFalse(part["figures"]["racecheck_good_cuda_test"]["clean"])
        self.assertEqual(self.check("--quick", "--only", "sanitizer"), 0)

    def test_fails_with_a_benchmark_that_fails_or_says_nothing(self):
        self.machine()
        for body in ["echo '{}'; exit 1", "echo 7", "true"]:
            self.benchmark(body)
            part = self.part("benchmarks")
            self.assertEqual(part["result"], "failed", body)
            self.assertIn("gpu_one", part["reason"])

    def test_measures_a_worker_on_the_first_gpu(self):
        self.machine()
        self.environment["LIBTORCH"] = "/nonexistent"
        path = "bin/tests/benchmarks/device_overhead"
        self.program(path, "#!/bin/bash\necho \"{\\\"device\\\": \\\"$1\\\"}\"\n")
        self.assertEqual(self.part("worker")["figures"], {"device_overhead": {"device": "--device=cuda:0"}})
        self.program(path, "#!/bin/bash\necho 'losses do not fall'\nexit 1\n")
        self.assertIn("losses do not fall", self.part("worker")["reason"])

    def test_fails_where_nothing_builds(self):
        self.machine()
        self.environment["FAKE_BUILD_CODE"] = "1"
        for name in ["tests", "benchmarks"]:
            part = self.part(name)
            self.assertEqual(part["result"], "failed")
            self.assertIn("do not build", part["reason"])


if __name__ == "__main__":
    unittest.main()
