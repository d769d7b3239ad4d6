"""The count at the end of tests/run.sh: nothing that failed may be lost from it."""

import json
import os
import tempfile
import unittest

from tests import summarize

_GTEST = """<testsuites><testsuite name="A">
<testcase name="Passes" status="run" result="completed" classname="A"/>
<testcase name="Fails" status="run" result="completed" classname="A"><failure message="x"/></testcase>
<testcase name="Skips" status="run" result="skipped" classname="A"><skipped message="a_test.cc:5&#x0A;no data"/></testcase>
<testcase name="DISABLED_Off" status="notrun" result="suppressed" classname="A"/>
</testsuite></testsuites>"""
_BAZEL_CRASH = """<testsuites><testsuite name="b"><testcase name="b" status="run">
<error message="exited with error code 139"/></testcase></testsuite></testsuites>"""
_BAZEL_SCRIPT = """<testsuites><testsuite name="s"><testcase name="s" status="run"/></testsuite></testsuites>"""


class SummarizeTest(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory(dir=os.environ.get("TEST_TMPDIR"))
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def _configured(self, label):
        return {"id": {"targetConfigured": {"label": label}}, "configured": {"testSize": "SMALL"}}

    def _result(self, label, status, xml, attempt=1):
        path = os.path.join(self.folder, f"{label.strip('/:')}{attempt}.xml")
        if xml is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(xml)
        return {
            "id": {"testResult": {"label": label, "run": 1, "shard": 1, "attempt": attempt}},
            "testResult": {
                "status": status,
                "testActionOutput": [{"name": "test.xml", "uri": "file://" + path}],
            },
        }

    def test_counts_cases_of_gtest(self):
        tally = summarize.summarize([self._configured("//:a"), self._result("//:a", "FAILED", _GTEST)])
        self.assertEqual(tally.passed, 1)
        self.assertEqual(tally.failed, ["//:a A.Fails"])
        self.assertEqual(
            tally.skipped,
            [("//:a A.Skips", "no data"), ("//:a A.DISABLED_Off", "disabled in the source")],
        )

    def test_script_counts_as_one(self):
        tally = summarize.summarize([self._result("//:s", "PASSED", _BAZEL_SCRIPT)])
        self.assertEqual((tally.passed, tally.failed), (1, []))

    def test_crash_is_one_failure(self):
        tally = summarize.summarize([self._result("//:b", "FAILED", _BAZEL_CRASH)])
        self.assertEqual((tally.passed, tally.failed), (0, ["//:b (FAILED)"]))

    def test_status_counts_where_the_xml_shows_no_failure(self):
        tally = summarize.summarize([self._result("//:s", "TIMEOUT", _BAZEL_SCRIPT)])
        self.assertEqual(tally.failed, ["//:s (TIMEOUT)"])

    def test_missing_xml_is_a_failure(self):
        tally = summarize.summarize([self._result("//:s", "PASSED", None)])
        self.assertEqual(len(tally.failed), 1)

    def test_target_without_result_is_a_failure(self):
        tally = summarize.summarize([self._configured("//:c")])
        self.assertEqual(tally.failed, ["//:c (not built)"])

    def test_incompatible_target_is_skipped(self):
        events = [
            self._configured("//:gpu"),
            {"id": {"targetCompleted": {"label": "//:gpu"}}, "aborted": {"reason": "SKIPPED"}},
        ]
        tally = summarize.summarize(events)
        self.assertEqual(tally.failed, [])
        self.assertEqual([name for name, _ in tally.skipped], ["//:gpu"])

    def test_last_attempt_counts(self):
        tally = summarize.summarize([
            self._result("//:s", "FAILED", _BAZEL_CRASH, attempt=1),
            self._result("//:s", "PASSED", _BAZEL_SCRIPT, attempt=2),
        ])
        self.assertEqual((tally.passed, tally.failed), (1, []))

    def test_reads_events_cut_short(self):
        path = os.path.join(self.folder, "events")
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"id": {}}) + "\n{\"id\": {\"test")
        self.assertEqual(list(summarize.read_events(path)), [{"id": {}}])


if __name__ == "__main__":
    unittest.main()
