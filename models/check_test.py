"""Tests of `export.py --check` and of what the exporter says of modules that it cannot export."""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
import textwrap
import unittest

_FOLDER = pathlib.Path(os.path.abspath(__file__)).parent
sys.path.insert(0, str(_FOLDER.parent))

from models import export, job_file  # noqa: E402

_NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embedding = nn.Embedding(5, 2)
            self.body = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
            self.head = nn.Linear(width, 2)

        def forward(self, x, kind):
            BODY
            return self.head(self.body(torch.cat([x, self.embedding(kind)], dim=1)))

    def build(options):
        return Net(int(options["width"]))
"""
_JOB = """
    name: 'tried'  # a comment { that } means "nothing"
    model {
      export { module: "net.py" options { key: "width" value: "8" } }
      inputs { name: "x" shape: [3] }
      inputs: < name: "kind", dtype: DT_INT64 >
      num_outputs: 2
    }
    training { batch_size: 8 }
"""


class CheckTest(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory(dir=os.environ.get("TEST_TMPDIR"))
        self.addCleanup(holder.cleanup)
        self.dir = pathlib.Path(holder.name)

    def check(self, net=_NET, job=_JOB):
        """Runs the check in this process; returns (status, stdout, stderr)."""
        (self.dir / "net.py").write_text(textwrap.dedent(net.replace("BODY", "pass")))
        (self.dir / "job.textproto").write_text(textwrap.dedent(job))
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = export.main(["--check", str(self.dir / "job.textproto")])
        return status, stdout.getvalue(), stderr.getvalue()

    def refused(self, *words, net=_NET, job=_JOB, status=1):
        got, _, stderr = self.check(net, job)
        self.assertEqual(got, status, stderr)
        for word in words:
            self.assertIn(word, stderr)

    def test_reports_what_forward_takes_and_gives(self):
        status, out, error = self.check()
        self.assertEqual((status, error), (0, ""))
        for line in (
            "net.py builds Net",
            "parameters   92 in 7 tensors",
            "input        x  FLOAT [B, 3]",
            "input        kind  INT64 [B]",
            "logits       FLOAT [B, 2]",
            "in training  1 x BatchNorm1d",
            "in training  1 x Dropout",
            "  ok",
        ):
            self.assertIn(line + "\n", out)
        self.assertNotIn("warning", out)
        self.assertEqual(sorted(os.listdir(self.dir)), ["job.textproto", "net.py"])

    def test_bf16_is_tried(self):
        status, out, error = self.check(job=_JOB.replace("batch_size: 8", "precision: BF16"))
        self.assertEqual(status, 0, error)
        self.assertIn("logits       BFLOAT16 [B, 2], computed with precision BF16\n", out)

    def test_states_and_rows(self):
        net = """
            import torch
            class Net(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.cell = torch.nn.GRU(4, 6, batch_first=True)
                    self.head = torch.nn.Linear(6, 3)
                    self.idle = torch.nn.Parameter(torch.zeros(1))
                def forward(self, rows, h):
                    y, after = self.cell(rows, h)
                    return self.head(y), after
            def build(options):
                return Net()
        """
        job = """
            model {
              export { module: "net.py" }
              inputs { name: "rows" field: "tokens" dtype: DT_INT64 shape: 7 embedding_table: "words" }
              states { name: "h" shape: 1 shape: -1 shape: 6 }
              num_outputs: 3
              embedding_tables { name: "words" dim: 4 }
            }
        """
        status, out, error = self.check(net, job)
        self.assertEqual(status, 0, error)
        self.assertIn("input        rows  FLOAT [B, 7, 4]\n", out)
        self.assertIn("state        h  FLOAT [1, B, 6]\n", out)
        self.assertIn("logits       FLOAT [B, 7, 3]\n", out)
        self.assertIn("warning      no gradient reaches idle: it stays as it is\n", out)
        self.refused(
            "gave state h the shape [1, 4, 6]; it must be [2, 4, 6]",
            net=net.replace("self.cell(rows, h)", "self.cell(rows, h[:1])"),
            job=job.replace("shape: 1 shape: -1", "shape: 2 shape: -1"),
        )
        self.refused(
            "forward() returned a tuple of Tensor, Tensor; it must return the logits",
            net=net.replace("rows, h)", "rows)"),
            job=job.replace('states { name: "h" shape: 1 shape: -1 shape: 6 }', ""),
        )

    def test_tells_what_does_not_fit_the_job(self):
        self.refused(
            "forward() takes (x, kind); the job's model.inputs and model.states are (y, kind)",
            job=_JOB.replace('"x"', '"y"'),
        )
        self.refused(
            "logits [4, 2] for 4 examples; they must be [4, ..., 7] (model.num_outputs is 7)",
            job=_JOB.replace("num_outputs: 2", "num_outputs: 7"),
        )
        self.refused(
            "forward(x FLOAT [B, 4], kind INT64 [B]) failed in training mode, B = 4: ",
            "cannot be multiplied",
            job=_JOB.replace("shape: [3]", "shape: [4]"),
        )
        self.refused("KeyError: 'width'; options given: wide=8", job=_JOB.replace("width", "wide"))

    def test_tells_what_training_would_spoil(self):
        self.refused("writes into its argument x", net=_NET.replace("BODY", "x.add_(1)"))
        self.refused(
            "in evaluation mode two passes over the same examples differ",
            net=_NET.replace("BODY", "x = torch.dropout(x, 0.5, True)"),
        )
        self.refused(
            "changes buffer body.1.running_mean in evaluation mode",
            net=_NET.replace(
                'return Net(int(options["width"]))',
                "return torch.jit.trace(Net(8), (torch.ones(4, 3), torch.zeros(4).long()), "
                "check_trace=False)",
            ),
        )

    def test_what_cannot_be_scripted_is_shown_with_a_way_out(self):
        self.refused(
            "torch.jit.script cannot compile Net.forward()",
            "<--- HERE",
            "torch.jit.trace",
            net=_NET.replace("BODY", "yield x"),
        )
        self.refused(
            "has no function build(options); for example:",
            "return Net()",
            net=_NET.replace("def build", "def make"),
            status=2,
        )

    def test_job_files(self):
        self.refused("job.textproto:1: ", job="model { ? }", status=2)
        self.refused("} is missing", job="model { export {", status=2)
        self.refused("model is missing", job="name: 'x'", status=2)
        self.refused("no table 'words'", status=2, job=_JOB.replace(
            "shape: [3]", "embedding_table: 'words'"))
        parsed = job_file.parse("a: 'x' \"y\" b { c: 1 c: [2, 3]; d <> } # end")
        self.assertEqual(parsed, {"a": ["xy"], "b": [{"c": ["1", "2", "3"], "d": [{}]}]})
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            self.assertEqual(export.main(["--check", "/nowhere"]), 2)
        self.assertIn("/nowhere: No such file", stderr.getvalue())


if __name__ == "__main__":
    unittest.main()
