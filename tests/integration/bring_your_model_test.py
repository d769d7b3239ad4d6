"""Does what docs/bring-your-model.md says: its files are written, its commands run, its outputs looked for.

A fenced block of the page whose first word is a language may say more:
  file=NAME      the block is that file
  sh             commands, run with `sh -eu` in the folder of the files
  sh setup       commands that every later one comes after, in the same shell
  sh fails       the last command must fail
  sh needs=NAME  only where that environment variable is set
  text           right after commands: lines of their output, in this order; `...` within a line is
                 anything, and a line of nothing else any number of lines; a number with decimals
                 stands for any
"""

import csv
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import unittest

_PAGE = pathlib.Path("docs/bring-your-model.md")
_PATIENCE_S = 240
_PR_SET_CHILD_SUBREAPER = 36


def blocks(text):
    """[(info, content)] of the fenced blocks."""
    return re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def missing_line(wanted, output):
    """The first line of `wanted` that `output` does not have after those before it; None if all are there."""
    lines = iter(output.splitlines())
    for want in wanted.splitlines():
        if not want.strip() or want.strip() == "...":
            continue
        pattern = ".*".join(
            r"\d+\.\d+".join(re.escape(piece) for piece in re.split(r"\d+\.\d+", part))
            for part in want.rstrip().split("...")
        )
        if not any(re.fullmatch(pattern, line.rstrip()) for line in lines):
            return want
    return None


class BringYourModelTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # Daemons of a command that failed become our children, and go with us.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        root = os.getcwd()
        cls.dir = pathlib.Path(tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR")))
        cls.bin = pathlib.Path(tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR")))
        (cls.bin / "python3").symlink_to("/usr/bin/python3")
        (cls.bin / "codistillctl").symlink_to(os.path.join(root, "control/codistillctl"))
        cls.environment = dict(
            os.environ,
            CODISTILL=root,
            PATH=f"{cls.bin}:{os.environ.get('PATH', '')}:/usr/bin:/bin",
            PYTHONDONTWRITEBYTECODE="1",
        )
        cls.environment.pop("PYTHONPATH", None)

    @classmethod
    def tearDownClass(cls):
        while True:
            try:
                with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                    children = [int(pid) for pid in file.read().split()]
            except OSError:
                break
            if not children:
                break
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        shutil.rmtree(cls.dir, ignore_errors=True)
        shutil.rmtree(cls.bin, ignore_errors=True)

    def run_commands(self, setup, script):
        """(exit status, output)"""
        process = subprocess.Popen(
            ["sh", "-eu", "-c", setup + script],
            cwd=self.dir,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            self.fail(f"{script}took longer than {_PATIENCE_S} s:\n{output}")
        return process.returncode, output

    def test_the_page_does_what_it_says(self):
        setup, output, script, ran = "", None, "", 0
        for info, content in blocks(_PAGE.read_text(encoding="utf-8")):
            language, *words = info.split()
            options = dict(word.partition("=")[::2] for word in words)
            if "file" in options:
                (self.dir / options["file"]).write_text(content, encoding="utf-8")
                output = None
            elif language == "sh" and "setup" in options:
                setup += content
            elif language == "sh":
                if options.get("needs") and not os.environ.get(options["needs"]):
                    print(f"left out, {options['needs']} is not set:\n{content}", flush=True)
                    output = None
                    continue
                status, output = self.run_commands(setup, content)
                script = content
                ran += 1
                print(f"$ {content}{output}", flush=True)
                self.assertEqual(status != 0, "fails" in options, f"{script}\n{output}")
            elif language == "text" and output is not None:
                absent = missing_line(content, output)
                self.assertIsNone(absent, f"{script}\nhas no such line now:\n{absent}\n\n{output}")
                output = None
        self.assertGreater(ran, 10)
        self.look_at_the_runs()

    def look_at_the_runs(self):
        losses = {}
        for name in ("run", "larger"):
            summary = json.loads((self.dir / name / "summary.json").read_text())
            self.assertEqual([group["name"] for group in summary["groups"]], ["alpha", "beta"])
            self.assertGreater(summary["group_disagreement"], 0)
            with open(self.dir / name / "metrics.csv", encoding="ascii") as file:
                curves = list(csv.DictReader(file))
            for group in summary["groups"]:
                self.assertEqual(group["steps"], 1000)
                self.assertEqual(group["teacher"]["used_steps"], 600)
                self.assertEqual(group["teacher"]["skipped_steps"], 0)
                # The labels alone are worth 0.64 nats.
                self.assertLess(group["final"]["validation_loss"], 0.4)
                self.assertGreater(group["final"]["validation_auc"], 0.9)
                trained = [
                    float(row["value"])
                    for row in curves
                    if row["group"] == group["name"] and row["name"] == "train_loss"
                ]
                self.assertLess(trained[-1], 0.7 * trained[0])
                losses[name, group["name"]] = group["final"]["validation_loss"]
        # Mixed precision and micro-batches change the roundings and the noise, not what is learnt.
        for group in ("alpha", "beta"):
            self.assertAlmostEqual(losses["larger", group], losses["run", group], delta=0.06)
        words = json.loads((self.dir / "words/summary.json").read_text())
        for group in words["groups"]:
            # Of five words only the animal and the bird are news: (log 3 + log 2) / 6 a token.
            self.assertLess(group["final"]["validation_loss"], 0.6)


class MissingLineTest(unittest.TestCase):
    def test_lines_are_looked_for_in_order(self):
        output = "one 1\ntwo 22 x\nthree\n"
        self.assertIsNone(missing_line("one 1\nthree\n", output))
        self.assertIsNone(missing_line("one ...\n...\ntwo ... x\n", output))
        self.assertEqual(missing_line("three\none 1\n", output), "one 1")
        self.assertEqual(missing_line("two ... y\n", output), "two ... y")
        self.assertIsNone(missing_line("loss 0.25 of 3\n", "loss 1.75 of 3\n"))
        self.assertEqual(missing_line("loss 0.25 of 4\n", "loss 1.75 of 3\n"), "loss 0.25 of 4")


if __name__ == "__main__":
    unittest.main()
