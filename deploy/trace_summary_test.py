"""Tests of trace_summary.py on made-up traces whose figures are known."""

import contextlib
import io
import json
import os
import tempfile
import unittest

from deploy import trace_summary


def span(category, name, begin, end, **args):
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": begin,
            "dur": end - begin, "args": args}


def step(number, at):
    """A step of 10 ms with 8 ms of passes."""
    return [
        span("step", "step", at, at + 10000, step=number),
        span("compute", "forward", at + 1000, at + 3000, step=number),
        span("compute", "loss", at + 3000, at + 3500, step=number),
        span("compute", "backward", at + 3500, at + 9000, step=number),
    ]


class SummaryTest(unittest.TestCase):
    def summarize(self, extra, skip=1):
        spans = sum((step(n, n * 10000) for n in range(4)), []) + extra
        spans.sort(key=lambda s: s["ts"])
        return trace_summary.summarize(spans, skip)

    def test_times_of_steps_and_passes(self):
        figures = self.summarize([])
        self.assertEqual(figures["steps"], 3)
        self.assertAlmostEqual(figures["step_ms"], 10)
        self.assertAlmostEqual(figures["compute_ms"], 8)
        self.assertAlmostEqual(figures["compute_fraction"], 0.8)
        self.assertAlmostEqual(figures["compute"]["backward"], 5.5)
        self.assertIsNone(figures["kinds"]["pull"]["under_compute"])

    def test_what_lies_under_passes_and_what_is_exposed(self):
        figures = self.summarize([
            # Two shards at once: 9 to 12 ms of step 1, of which 9 to 11 are exposed.
            span("pull", "pull shard", 19000, 21000, shard=0),
            span("pull", "pull shard", 20500, 22000, shard=1),
            span("teacher", "teacher request", 12000, 14000, step=3),
            span("teacher", "teacher request", 13000, 18000, step=4),
        ])
        pull = figures["kinds"]["pull"]
        self.assertEqual(pull["spans"], 2)
        self.assertAlmostEqual(pull["ms"], 1)
        self.assertAlmostEqual(pull["exposed_ms"], 2 / 3)
        self.assertAlmostEqual(pull["under_compute"], 1 / 3)
        teacher = figures["kinds"]["teacher"]
        self.assertAlmostEqual(teacher["ms"], 2)
        self.assertAlmostEqual(teacher["under_compute"], 1)

    def test_the_first_steps_are_left_out(self):
        figures = self.summarize([span("pull", "pull shard", 0, 9000)])
        self.assertEqual(figures["kinds"]["pull"]["ms"], 0)

    def test_the_first_gradient(self):
        pushes = []
        for n in range(4):
            at = n * 10000 + 3500
            pushes.append(span("push", "push frame", at + 1000, at + 1100, step=n))
            pushes.append(span("push", "push frame", at + 4000, at + 5000, step=n))
        figures = self.summarize(pushes)
        self.assertAlmostEqual(figures["first_gradient_at"], 0.2)
        self.assertAlmostEqual(figures["kinds"]["push"]["ms"], 1.1)

    def test_waits(self):
        figures = self.summarize([span("wait", "wait for the weights", 20000, 21000),
                                  span("wait", "wait for the weights", 30000, 30500)])
        self.assertAlmostEqual(figures["waits"]["wait for the weights"], 0.5)


class FileTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "trace.json")

    def run_on(self, text, *options):
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(text)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = trace_summary.main([self.path, *options])
        return code, out.getvalue(), err.getvalue()

    def trace(self):
        events = sum((step(n, n * 10000) for n in range(4)), [])
        events.append({"ph": "M", "name": "process_name", "pid": 1, "tid": 1,
                       "args": {"name": "worker alpha.0"}})
        events.append({"ph": "M", "name": "spans_dropped", "pid": 1, "tid": 1,
                       "args": {"count": 7}})
        return json.dumps({"traceEvents": events})

    def test_table_and_json(self):
        code, out, _ = self.run_on(self.trace())
        self.assertEqual(code, 0)
        self.assertIn("worker alpha.0: 2 steps of 10.00 ms, 80.0 %", out)
        self.assertIn("7 older spans", out)
        code, out, _ = self.run_on(self.trace(), "--json", "--skip", "0")
        self.assertEqual(code, 0)
        self.assertEqual(json.loads(out)["steps"], 4)

    def test_what_is_no_trace_of_a_worker_is_named(self):
        for text in ("", "{}", "[", json.dumps({"traceEvents": []})):
            code, out, err = self.run_on(text)
            self.assertEqual(code, 1)
            self.assertEqual(out, "")
            self.assertIn(self.path, err)


if __name__ == "__main__":
    unittest.main()
