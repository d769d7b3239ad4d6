"""Counts what a `bazel test` did, case by case.

Usage: summarize.py BUILD_EVENTS_JSON BAZEL_EXIT_CODE [OTHER_FAILURE...]

Reads the events Bazel wrote (--build_event_json_file) and the XML of every test in them: gtest writes a case for each TEST, the Python
runner one for each method, any other test counts as one. A target that was not built, timed out or crashed is one failure. Each
OTHER_FAILURE is the name of one more check that failed. Prints failures, then skipped tests with their reasons, then, as the last line,
`N passed, N failed`. The exit code is 1 if anything failed.
"""

import json
import os
import sys
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree


def read_events(path):
    """Yields Bazel's events; a file cut short (a killed Bazel) ends early."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


class Tally:
    """Passed, failed and skipped cases so far."""

    def __init__(self):
        self.passed = 0
        self.failed = []  # names
        self.skipped = []  # (name, reason)

    def add_xml(self, label, status, path):
        """Adds the cases in one test.xml; returns how many of them failed."""
        failures = 0
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            # Bazel writes the XML of a test that did not (a script, a crash): one case, no class.
            classname = case.get("classname")
            name = f"{label} {classname}.{case.get('name')}" if classname else label
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                self.failed.append(name if classname else f"{name} ({status})")
                failures += 1
            elif skip is not None or case.get("result") == "skipped":
                message = (skip.get("message") if skip is not None else "") or "no reason given"
                # gtest puts file:line on a line of its own before the message.
                self.skipped.append((name, message.strip().splitlines()[-1].strip()))
            elif case.get("status") == "notrun":
                self.skipped.append((name, "disabled in the source"))
            else:
                self.passed += 1
        return failures


def summarize(events):
    """Tallies all test targets of one invocation."""
    configured = set()
    built = set()
    last_attempt = {}  # (label, run, shard) -> (attempt, status, xml path)
    incompatible = []
    for event in events:
        identity = event.get("id", {})
        if "targetConfigured" in identity and event.get("configured", {}).get("testSize"):
            configured.add(identity["targetConfigured"]["label"])
        elif "targetCompleted" in identity:
            label = identity["targetCompleted"]["label"]
            if event.get("aborted", {}).get("reason") == "SKIPPED":
                incompatible.append(label)
            elif event.get("completed", {}).get("success"):
                built.add(label)
        elif "testResult" in identity and "testResult" in event:
            key = identity["testResult"]
            outputs = {
                output["name"]: unquote(urlparse(output.get("uri", "")).path)
                for output in event["testResult"].get("testActionOutput", [])
            }
            where = (key["label"], key.get("run", 1), key.get("shard", 1))
            result = (key.get("attempt", 1), event["testResult"]["status"], outputs.get("test.xml"))
            last_attempt[where] = max(last_attempt.get(where, result), result, key=lambda r: r[0])

    tally = Tally()
    for (label, _, _), (_, status, xml) in sorted(last_attempt.items()):
        failures = 0
        try:
            failures = tally.add_xml(label, status, xml) if xml else 0
        except (OSError, ElementTree.ParseError) as error:
            tally.failed.append(f"{label} (results unreadable: {error})")
            failures = 1
        if status not in ("PASSED", "FLAKY") and failures == 0:
            tally.failed.append(f"{label} ({status})")
    tested = {label for label, _, _ in last_attempt}
    for label in sorted(configured - tested):
        if label in incompatible:
            tally.skipped.append((label, "needs CUDA: built with --config=cuda only"))
        else:
            tally.failed.append(f"{label} ({'did not run' if label in built else 'not built'})")
    return tally


def main(argv):
    tally = summarize(read_events(argv[1]))
    tally.failed += argv[3:]
    if argv[2] != "0" and not tally.failed:
        tally.failed.append(f"bazel (exit code {argv[2]}; its messages are above)")
    for name in tally.failed:
        print(f"FAILED: {name}")
    reasons = {}
    for name, reason in tally.skipped:
        reasons.setdefault(reason, []).append(name)
    print(f"{len(tally.skipped)} skipped" + (":" if reasons else ""))
    for reason, names in sorted(reasons.items()):
        print(f"  {len(names)}: {reason} ({', '.join(names)})")
    print(f"{tally.passed} passed, {len(tally.failed)} failed")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
