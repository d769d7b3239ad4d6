"""Tests of with_weights.py. Run with the Python that has torch."""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
import unittest

import torch

_FOLDER = pathlib.Path(os.path.abspath(__file__)).parent
sys.path.insert(0, str(_FOLDER.parent))

from models import export, tensor_files, with_weights  # noqa: E402


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.decode = torch.nn.Linear(4, 7)
        self.decode.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decode(self.norm(self.embed(tokens)))


class WithWeightsTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def path(self, name):
        return str(self.folder / name)

    def write(self, seed, name):
        torch.manual_seed(seed)
        scripted = torch.jit.script(Tied())
        scripted.norm.running_mean.fill_(float(seed))
        torch.jit.save(scripted, self.path(name + ".pt"))
        content = tensor_files.safetensors_bytes(tensor_files.tensor_specs(scripted), {})
        pathlib.Path(self.path(name + ".safetensors")).write_bytes(content)
        return scripted.eval()

    def run_main(self, archive, weights, out):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = with_weights.main(
                ["--archive", self.path(archive), "--weights", self.path(weights)]
                + ["--out", self.path(out)]
            )
        return code, errors.getvalue()

    def test_the_new_archive_computes_what_the_weights_owner_did(self):
        self.write(1, "one")
        two = self.write(2, "two")
        self.assertEqual(self.run_main("one.pt", "two.safetensors", "new.pt"), (0, ""))
        new = torch.jit.load(self.path("new.pt"))
        self.assertFalse(new.training)
        tokens = torch.arange(7)
        self.assertTrue(torch.equal(new(tokens), two(tokens)))
        # Still one tensor under two names.
        specs = {spec.name: spec.role for spec in tensor_files.tensor_specs(new)}
        self.assertEqual(sorted(specs.values()).count("TIED"), 1)

    def test_everything_that_does_not_fit_is_named(self):
        self.write(1, "one")
        specs = tensor_files.tensor_specs(torch.jit.load(self.path("one.pt")))
        changed = [spec for spec in specs if spec.name != "decode.bias"]
        changed = [
            spec._replace(tensor=torch.zeros(5)) if spec.name == "norm.weight" else spec
            for spec in changed
        ]
        changed.append(tensor_files.TensorSpec("extra", "BUFFER", None, torch.zeros(2)))
        content = tensor_files.safetensors_bytes(changed, {})
        pathlib.Path(self.path("bad.safetensors")).write_bytes(content)
        code, errors = self.run_main("one.pt", "bad.safetensors", "new.pt")
        self.assertEqual(code, 1)
        self.assertIn("no tensor decode.bias", errors)
        self.assertIn("norm.weight is F32[5]", errors)
        self.assertIn("extra", errors)
        self.assertFalse(os.path.exists(self.path("new.pt")))

    def test_damaged_files_are_named(self):
        self.write(1, "one")
        pathlib.Path(self.path("cut.safetensors")).write_bytes(b"12345")
        code, errors = self.run_main("one.pt", "cut.safetensors", "new.pt")
        self.assertEqual(code, 1)
        self.assertIn("cut.safetensors", errors)

    def test_exported_models_take_their_own_weights(self):
        out = self.path("alpha")
        arguments = ["--module", "mlp", "--out", out, "--seed", "3"]
        for option in ("in_features=6", "hidden=8", "num_classes=3"):
            arguments += ["--option", option]
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(export.main(arguments), 0)
        self.assertEqual(self.run_main("alpha.pt", "alpha.safetensors", "same.pt"), (0, ""))


if __name__ == "__main__":
    unittest.main()
