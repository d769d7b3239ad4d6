"""Runs one unittest file and writes its results as the XML that Bazel collects (XML_OUTPUT_FILE), one element a case.

With names after the file only those cases run: `unittest_main.py FILE [Class[.method]...]`.
"""

import importlib.util
import os
import sys
import time
import unittest
from xml.etree import ElementTree


class _Result(unittest.TextTestResult):
    """Remembers how each case ended and how long it took."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cases = []  # (id, seconds, kind, message); kind: passed, failure or skipped

    def startTest(self, test):
        self._started = time.monotonic()
        super().startTest(test)

    def _add(self, test, kind, message=""):
        started = getattr(self, "_started", None)
        seconds = time.monotonic() - started if started is not None else 0.0
        self.cases.append((test.id(), seconds, kind, message))

    def addSuccess(self, test):
        super().addSuccess(test)
        self._add(test, "passed")

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._add(test, "failure", self.failures[-1][1])

    def addError(self, test, err):
        super().addError(test, err)
        self._add(test, "failure", self.errors[-1][1])

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._add(test, "skipped", reason)

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self._add(test, "passed")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self._add(test, "failure", "passed though marked as an expected failure")

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._add(subtest, "failure", self._exc_info_to_string(err, test))


def _write_xml(path, suite_name, cases):
    suite = ElementTree.Element(
        "testsuite",
        name=suite_name,
        tests=str(len(cases)),
        failures=str(sum(kind == "failure" for _, _, kind, _ in cases)),
        skipped=str(sum(kind == "skipped" for _, _, kind, _ in cases)),
        errors="0",
    )
    for name, seconds, kind, message in cases:
        classname, _, method = name.rpartition(".")
        case = ElementTree.SubElement(
            suite, "testcase", name=method, classname=classname, time=f"{seconds:.3f}"
        )
        if kind != "passed":
            ElementTree.SubElement(case, kind, message=message.strip())
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def main(argv):
    path, names = argv[1], argv[2:]
    module_name = os.path.splitext(path)[0].replace(os.sep, ".")
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    loader = unittest.defaultTestLoader
    if names:
        suite = loader.loadTestsFromNames(names, module)
    else:
        suite = loader.loadTestsFromModule(module)
    result = unittest.TextTestRunner(resultclass=_Result, verbosity=2).run(suite)
    if os.environ.get("XML_OUTPUT_FILE"):
        _write_xml(os.environ["XML_OUTPUT_FILE"], module_name, result.cases)
    if not result.cases:
        print(f"{path}: no test case ran", file=sys.stderr)
        return 1
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
