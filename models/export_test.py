"""Tests of the exporter and of every model of this folder. Run with the Python that has torch."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest

import torch
from torch.nn import functional

_FOLDER = pathlib.Path(os.path.abspath(__file__)).parent
sys.path.insert(0, str(_FOLDER.parent))

from models import export, tensor_files  # noqa: E402

_MODELS = {
    "mlp": {"in_features": "6", "hidden": "16,12", "num_classes": "5", "dropout": "0.1"},
    "ctr": {"numeric": "3", "cardinalities": "4,7", "embedding": "5", "hidden": "8"},
    "resnet": {"depth": "8", "width": "8", "num_classes": "10"},
    "lstm_lm": {"vocabulary": "30", "embedding": "8", "hidden": "12", "dropout": "0.5"},
}
_TORCH_DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "I8": torch.int8,
}
# A module of a user, with everything that is awkward about tensors.
_AWKWARD = """
    import torch
    from torch import nn
    from models.options import Options

    class Awkward(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.embed = nn.Embedding(7, size)
            self.decode = nn.Linear(size, 7)
            self.decode.weight = self.embed.weight
            self.shared = nn.Linear(size, size)
            self.again = self.shared
            self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)
            self.register_buffer("mask", torch.ones(3), persistent=False)
            self.register_buffer("seen", torch.tensor([True, False, True]))
            self.register_buffer("low", torch.arange(3).to(torch.bfloat16))
            self.register_buffer("small", torch.tensor([-128, 3, 127], dtype=torch.int8))
            self.register_buffer("absent", None)
            self.register_buffer("empty", torch.zeros(0, 4))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.decode(self.again(self.shared(self.embed(tokens)))) * self.scale

    def build(options):
        opts = Options("awkward", options)
        size = opts.integer("size")
        opts.finish()
        return Awkward(size)
"""


def parse_tensor_list(path):
    """[(name, shape, dtype, role, tied_to)] of a file, which must have nothing else in it."""
    line_re = re.compile(
        r'tensors \{ name: "([^"]+)"((?: shape: \d+)*) dtype: (DT_\w+) '
        r'role: (\w+)(?: tied_to: "([^"]+)")? \}'
    )
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        if line.startswith("#"):
            continue
        name, shape, dtype, role, tied_to = line_re.fullmatch(line).groups()
        sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
        rows.append((name, sizes, dtype, role, tied_to))
    return rows


def load_safetensors(path):
    """{name: tensor}, read by hand."""
    tensors = {}
    for name, (dtype, shape, data) in tensor_files.read_safetensors(path).items():
        dtype = _TORCH_DTYPES[dtype]
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0).to(dtype)
        tensors[name] = flat.reshape(shape)
    return tensors


class ExportTest(unittest.TestCase):
    def setUp(self):
        root = os.environ.get("TEST_TMPDIR")
        holder = tempfile.TemporaryDirectory(dir=root)
        self.addCleanup(holder.cleanup)
        self.dir = pathlib.Path(holder.name)

    def export(self, module, options=None, out="alpha", seed=1):
        """Runs the exporter in this process; returns (status, stdout, stderr)."""
        argv = ["--module", str(module), "--seed", str(seed), "--out", str(self.dir / out)]
        for key, value in (_MODELS[module] if options is None else options).items():
            argv += ["--option", f"{key}={value}"]
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = export.main(argv)
        return status, stdout.getvalue(), stderr.getvalue()

    def must_export(self, *args, **kwargs):
        status, _, stderr = self.export(*args, **kwargs)
        self.assertEqual(status, 0, stderr)
        return stderr

    def user_module(self, source):
        path = self.dir / "mine.py"
        path.write_text(textwrap.dedent(source))
        return path

    def test_files_agree_with_the_archive(self):
        for module in _MODELS:
            with self.subTest(module):
                self.must_export(module, out=module)
                archive = torch.jit.load(str(self.dir / f"{module}.pt"))
                rows = parse_tensor_list(self.dir / f"{module}.tensors.textproto")
                expected = [(name, "PARAMETER") for name, _ in archive.named_parameters()]
                expected += [(name, "BUFFER") for name, _ in archive.named_buffers()]
                self.assertEqual([(row[0], row[3]) for row in rows], expected)

                state = archive.state_dict()
                stored = load_safetensors(self.dir / f"{module}.safetensors")
                self.assertEqual(set(stored), set(state))
                for name, shape, dtype, _, _ in rows:
                    self.assertEqual(stored[name].dtype, state[name].dtype, name)
                    self.assertEqual(tuple(stored[name].shape), shape, name)
                    self.assertTrue(torch.equal(stored[name], state[name]), name)
                    wanted = {torch.float32: "DT_FLOAT", torch.int64: "DT_INT64"}
                    self.assertEqual(dtype, wanted[state[name].dtype], name)

    def test_mlp_names(self):
        self.must_export("mlp")
        rows = parse_tensor_list(self.dir / "alpha.tensors.textproto")
        self.assertEqual(
            [row[:4] for row in rows],
            [
                ("fc1.weight", (16, 6), "DT_FLOAT", "PARAMETER"),
                ("fc1.bias", (16,), "DT_FLOAT", "PARAMETER"),
                ("fc2.weight", (12, 16), "DT_FLOAT", "PARAMETER"),
                ("fc2.bias", (12,), "DT_FLOAT", "PARAMETER"),
                ("fc3.weight", (5, 12), "DT_FLOAT", "PARAMETER"),
                ("fc3.bias", (5,), "DT_FLOAT", "PARAMETER"),
            ],
        )

    def test_batch_norm_statistics_are_buffers(self):
        self.must_export("resnet")
        rows = parse_tensor_list(self.dir / "alpha.tensors.textproto")
        self.assertIn(("norm.running_mean", (8,), "DT_FLOAT", "BUFFER", None), rows)
        self.assertIn(("norm.num_batches_tracked", (), "DT_INT64", "BUFFER", None), rows)

    def test_every_dtype_survives(self):
        values = {
            name: torch.tensor([1, 0, 1, 1, 0, 1, 0]).to(dtype)
            for name, dtype in _TORCH_DTYPES.items()
        }
        values["scalar"] = torch.tensor(-3, dtype=torch.int64)
        specs = [tensor_files.TensorSpec(k, "BUFFER", None, v) for k, v in values.items()]
        path = self.dir / "all.safetensors"
        path.write_bytes(tensor_files.safetensors_bytes(specs, {"format": "pt"}))
        stored = load_safetensors(path)
        for name, value in values.items():
            self.assertEqual(stored[name].dtype, value.dtype)
            self.assertTrue(torch.equal(stored[name], value), name)
        # Wider elements first and a padded header: every tensor lies at a multiple of its size.
        content = path.read_bytes()
        self.assertEqual(int.from_bytes(content[:8], "little") % 8, 0)

    def test_damaged_safetensors_are_refused(self):
        self.must_export("mlp")
        path = self.dir / "alpha.safetensors"
        content = path.read_bytes()
        for damaged in (b"", content[:6], content[:100], content[:-1], b"\xff" * 8 + content[8:]):
            path.write_bytes(damaged)
            with self.assertRaisesRegex(ValueError, "alpha.safetensors"):
                tensor_files.read_safetensors(path)

    def test_tensor_list_is_text_proto(self):
        protoc = shutil.which("protoc")
        root = _FOLDER.parent
        if protoc is None or not (root / "proto" / "model.proto").is_file():
            self.skipTest("needs protoc and proto/model.proto")
        path = self.user_module(_AWKWARD)
        self.must_export(path, {"size": "4"})
        encoded = subprocess.run(
            [protoc, "-I.", "--encode=codistill.TensorList", "proto/model.proto"],
            input=(self.dir / "alpha.tensors.textproto").read_bytes(),
            capture_output=True,
            cwd=root,
        )
        self.assertEqual(encoded.returncode, 0, encoded.stderr)
        self.assertIn(b"decode.weight", encoded.stdout)

    def test_same_seed_same_bytes(self):
        for module in _MODELS:
            with self.subTest(module):
                contents = []
                for folder in ("one", "two"):
                    # A process each: nothing may depend on hash seeds or addresses.
                    argv = [sys.executable, str(_FOLDER / "export.py"), "--module", module]
                    argv += ["--seed", "9", "--out", str(self.dir / folder / "alpha")]
                    for key, value in _MODELS[module].items():
                        argv += ["--option", f"{key}={value}"]
                    subprocess.run(argv, check=True, capture_output=True)
                    contents.append(
                        [
                            (self.dir / folder / f"alpha{ending}").read_bytes()
                            for ending in (".safetensors", ".tensors.textproto")
                        ]
                    )
                self.assertEqual(contents[0], contents[1])

    def test_seeds_differ_and_equal_weights_are_warned_of(self):
        self.must_export("mlp", out="alpha", seed=1)
        warning = self.must_export("mlp", out="beta", seed=2)
        self.assertEqual(warning, "")
        alpha = load_safetensors(self.dir / "alpha.safetensors")
        beta = load_safetensors(self.dir / "beta.safetensors")
        self.assertFalse(torch.equal(alpha["fc1.weight"], beta["fc1.weight"]))
        warning = self.must_export("mlp", out="gamma", seed=2)
        self.assertIn("beta.safetensors starts from the same weights as gamma", warning)
        self.assertNotIn("alpha", warning)
        # Writing the same file again is not a pair of groups.
        self.assertNotIn("gamma.safetensors", self.must_export("mlp", out="gamma", seed=2))

    def test_awkward_module_of_a_user(self):
        path = self.user_module(_AWKWARD)
        self.must_export(path, {"size": "4"})
        rows = parse_tensor_list(self.dir / "alpha.tensors.textproto")
        self.assertEqual(
            [(row[0], row[1], row[3], row[4]) for row in rows],
            [
                ("scale", (), "FROZEN", None),
                ("embed.weight", (7, 4), "PARAMETER", None),
                ("decode.weight", (7, 4), "TIED", "embed.weight"),
                ("decode.bias", (7,), "PARAMETER", None),
                ("shared.weight", (4, 4), "PARAMETER", None),
                ("shared.bias", (4,), "PARAMETER", None),
                ("again.weight", (4, 4), "TIED", "shared.weight"),
                ("again.bias", (4,), "TIED", "shared.bias"),
                ("mask", (3,), "BUFFER", None),
                ("seen", (3,), "BUFFER", None),
                ("low", (3,), "BUFFER", None),
                ("small", (3,), "BUFFER", None),
                ("empty", (0, 4), "BUFFER", None),
            ],
        )
        self.assertEqual(
            {row[0]: row[2] for row in rows if row[2] != "DT_FLOAT"},
            {"seen": "DT_BOOL", "low": "DT_BFLOAT16", "small": "DT_INT8"},
        )
        stored = load_safetensors(self.dir / "alpha.safetensors")
        self.assertEqual(set(stored), {row[0] for row in rows if row[3] != "TIED"})

        # The tie holds in the loaded archive: one gradient for both uses.
        archive = torch.jit.load(str(self.dir / "alpha.pt"))
        archive(torch.tensor([1, 2])).sum().backward()
        self.assertIs(archive.embed.weight, archive.decode.weight)

    def test_refused_modules(self):
        header = "import torch\nfrom torch import nn\n"
        cases = [
            (
                "class M(nn.Module):\n"
                "    def __init__(self):\n"
                "        super().__init__()\n"
                "        self.w = nn.Parameter(torch.ones(2).double())\n"
                "    def forward(self, x: torch.Tensor):\n"
                "        return x * self.w\n"
                "def build(options):\n"
                "    return M()\n",
                1,
                "parameter w is torch.float64; a trained parameter must be torch.float32",
            ),
            (
                "class M(nn.Module):\n"
                "    def __init__(self):\n"
                "        super().__init__()\n"
                "        base = torch.ones(4)\n"
                "        self.a = nn.Parameter(base[:2])\n"
                "        self.b = nn.Parameter(base[2:])\n"
                "    def forward(self, x: torch.Tensor):\n"
                "        return x * self.a * self.b\n"
                "def build(options):\n"
                "    return M()\n",
                1,
                "tensors a and b share memory",
            ),
            ("def build(options):\n    return 3\n", 1, "build() returned int"),
            ("def make(options):\n    return 3\n", 2, "has no function build(options)"),
            ("def build(options:\n", 1, "SyntaxError"),
        ]
        for source, wanted_status, message in cases:
            with self.subTest(message):
                path = self.user_module(header + source)
                status, _, stderr = self.export(path, {})
                self.assertEqual(status, wanted_status)
                self.assertIn(message, stderr)
                self.assertFalse((self.dir / "alpha.pt").exists())

    def test_bad_options(self):
        cases = [
            ("mlp", {"in_features": "6"}, "needs option 'num_classes'"),
            ("mlp", {"in_features": "six"}, "option in_features is 'six'"),
            ("mlp", {"in_features": "6", "hidden": "3,-1"}, "option hidden is '3,-1'"),
            ("mlp", dict(_MODELS["mlp"], hiden="3"), "mlp has no option 'hiden'; it has"),
            ("mlp", dict(_MODELS["mlp"], activation="sin"), "option activation is 'sin'"),
            ("mlp", dict(_MODELS["mlp"], dropout="1"), "option dropout is '1'"),
            ("mlp", dict(_MODELS["mlp"], dropout="nan"), "option dropout is 'nan'"),
            ("ctr", {"numeric": "0", "cardinalities": ""}, "option cardinalities is ''"),
            ("ctr", {"numeric": "1"}, "ctr needs option 'cardinalities'"),
            ("ctr", {"numeric": "1", "rows": "2", "cardinalities": "4"}, "option rows is '2'"),
            ("ctr", {"numeric": "1", "cardinalities": "4,x"}, "option cardinalities is '4,x'"),
            ("resnet", {"depth": "10", "num_classes": "2"}, "option depth is '10'"),
            ("resnet", {"layout": "large", "depth": "20", "num_classes": "2"}, "option depth is"),
            ("resnet", dict(_MODELS["resnet"], std="1,0,1"), "option std is"),
            ("resnet", dict(_MODELS["resnet"], mean="1,2"), "option mean is"),
            ("resnet", dict(_MODELS["resnet"], norm="group", width="4"), "option width is '4'"),
            ("lstm_lm", {"vocabulary": "1"}, "option vocabulary is '1'"),
            ("lstm_lm", {"vocabulary": "9", "tied": "yes"}, "option tied is 'yes'"),
            ("vgg", {}, "--module 'vgg'"),
            ("nowhere.py", {}, "no file nowhere.py"),
        ]
        for module, options, message in cases:
            with self.subTest(message):
                status, _, stderr = self.export(module, options)
                self.assertEqual(status, 2)
                self.assertIn(message, stderr)
                self.assertEqual(list(self.dir.iterdir()), [])

    def test_bad_arguments(self):
        for argv, message in (
            (["--module", "mlp"], "--out"),
            (["--module", "mlp", "--out", "x", "--seed", "-1"], "--seed"),
            (["--module", "mlp", "--out", "x", "--option", "depth"], "KEY=VALUE"),
            (["--module", "mlp", "--out", "x", "--option", "a=1", "--option", "a=1"], "twice"),
        ):
            with self.subTest(message):
                done = subprocess.run(
                    [sys.executable, str(_FOLDER / "export.py")] + argv,
                    capture_output=True,
                    text=True,
                    cwd=self.dir,
                )
                self.assertEqual(done.returncode, 2)
                self.assertIn(message, done.stderr)

    def test_unwritable_folder(self):
        (self.dir / "file").write_text("")
        status, _, stderr = self.export("mlp", out="file/alpha")
        self.assertEqual(status, 1)
        self.assertIn("file", stderr)

    def test_relative_module_path(self):
        self.user_module(_AWKWARD)
        argv = ["--module", "mine.py", "--module_dir", str(self.dir), "--option", "size=4"]
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(export.main(argv + ["--out", str(self.dir / "alpha")]), 0)
        self.assertTrue((self.dir / "alpha.pt").is_file())


class ModelTest(unittest.TestCase):
    """Every archive trains as a worker trains it: scripted, loaded, JIT optimisation off."""

    def setUp(self):
        optimize = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)
        self.addCleanup(torch._C._set_graph_executor_optimize, optimize)
        torch.manual_seed(3)

    def load(self, module, **changes):
        options = dict(_MODELS[module], **changes)
        scripted = export.build_scripted(export.load_module(module, "."), options, seed=5)
        return torch.jit.load(io.BytesIO(export.archive_bytes(scripted)))

    def train(self, model, inputs, labels, rate=0.05, steps=30):
        """Overfits one batch by SGD; every parameter must get a gradient and the loss must fall."""
        model.train()
        losses = []
        for _ in range(steps):
            output = model(*inputs)
            logits = output[0] if isinstance(output, tuple) else output
            if logits.shape[-1] == 1:
                loss = functional.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
            else:
                loss = functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
            for parameter in model.parameters():
                parameter.grad = None
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    self.assertIsNotNone(parameter.grad, name)
                    self.assertTrue(torch.isfinite(parameter.grad).all(), name)
                    parameter -= rate * parameter.grad
        self.assertLess(losses[-1], 0.8 * losses[0])

    def test_mlp(self):
        for hidden in ("16,12", ""):
            model = self.load("mlp", hidden=hidden, dropout="0")
            x = torch.randn(32, 6)
            self.assertEqual(model(x).shape, (32, 5))
            self.train(model, [x], x[:, :5].argmax(dim=1), rate=0.5, steps=100)

    def test_ctr(self):
        numeric, categorical = torch.randn(16, 3), torch.randint(0, 4, (16, 2))
        labels = (numeric[:, 0] > 0).long()
        for classes in (1, 2):
            model = self.load("ctr", num_classes=str(classes))
            self.assertEqual(model(numeric, categorical).shape, (16, classes))
            self.train(model, [numeric, categorical], labels, rate=0.3)
        with self.assertRaises(Exception):  # never another row
            model(numeric, categorical + 7)

    def test_ctr_without_numeric_or_categorical_columns(self):
        labels = torch.tensor([0, 1, 0, 1])
        none = torch.zeros(4, 0)
        model = self.load("ctr", numeric="0")
        self.train(model, [none, torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])], labels, rate=0.5)
        model = self.load("ctr", cardinalities="", hidden="")
        self.train(model, [torch.randn(4, 3), none.long()], labels, rate=0.5)

    def test_ctr_of_given_rows(self):
        numeric, rows = torch.randn(16, 3), torch.randn(16, 4, 5)
        labels = (numeric[:, 0] * rows[:, 1, 2] > 0).long()
        for cross in ("0", "2"):
            model = self.load("ctr", cardinalities="", rows="4", cross=cross)
            self.assertEqual(model(numeric, rows).shape, (16, 1))
            self.train(model, [numeric, rows], labels, rate=0.3)
            self.assertFalse(any("embedding" in name for name, _ in model.named_parameters()))

    def test_ctr_cross_layers(self):
        model = self.load("ctr", cardinalities="", rows="1", cross="1", hidden="", numeric="2")
        numeric, rows = torch.randn(4, 2), torch.randn(4, 1, 5)
        x = torch.cat([numeric, rows.flatten(1)], dim=1)
        tower = model.tower
        crossed = x * getattr(tower.cross, "0")(x) + x
        wanted = tower.output(torch.cat([crossed, x], dim=1))
        self.assertTrue(torch.allclose(model(numeric, rows), wanted, atol=1e-6))

    def test_resnet(self):
        image, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 3, 6, 9])
        for depth, norm in (("8", "batch"), ("14", "group")):
            model = self.load("resnet", depth=depth, norm=norm)
            self.assertEqual(model(image).shape, (4, 10))
            self.train(model, [image], labels)

    def test_resnet_for_large_images(self):
        # Parameters as in table 1 of the paper, and as every library that has these networks says.
        for depth, parameters in (("18", 11_689_512), ("50", 25_557_032)):
            model = self.load("resnet", layout="large", depth=depth, width="64", num_classes="1000")
            self.assertEqual(sum(p.numel() for p in model.parameters()), parameters, depth)
            self.assertEqual(model(torch.rand(2, 3, 64, 64)).shape, (2, 1000), depth)

    def test_resnet_statistics_move_in_training_only(self):
        model = self.load("resnet")
        image = torch.rand(4, 3, 32, 32)
        before = model.norm.running_mean.clone()
        model.eval()
        first = model(image)
        self.assertTrue(torch.equal(model(image), first))
        self.assertTrue(torch.equal(model.norm.running_mean, before))
        model.train()
        model(image)
        self.assertFalse(torch.equal(model.norm.running_mean, before))
        self.assertEqual(model.norm.num_batches_tracked.item(), 1)

    def test_resnet_normalises_its_input(self):
        model = self.load("resnet", mean="0.5,0.5,0.5", std="0.25,0.25,0.25").eval()
        reference = self.load("resnet", mean="0,0,0", std="1,1,1").eval()
        image = torch.rand(2, 3, 32, 32)
        self.assertTrue(torch.allclose(model(image), reference((image - 0.5) / 0.25), atol=1e-5))

    def test_lstm_lm(self):
        tokens = torch.randint(0, 30, (5, 9))
        for tied, layers, hidden in (("true", 1, 12), ("true", 2, 8), ("false", 2, 12)):
            with self.subTest(tied=tied, layers=layers, hidden=hidden):
                model = self.load(
                    "lstm_lm", tied=tied, layers=str(layers), hidden=str(hidden), dropout="0"
                )
                zeros = torch.zeros(layers, 5, hidden)
                logits, h, c = model(tokens, zeros, zeros)
                self.assertEqual(logits.shape, (5, 9, 30))
                self.assertEqual(h.shape, zeros.shape)
                self.assertEqual(c.shape, zeros.shape)
                self.train(model, [tokens, zeros, zeros], tokens, rate=3.0, steps=150)

    def test_lstm_lm_state_continues_the_text(self):
        model = self.load("lstm_lm").eval()
        tokens = torch.randint(0, 30, (3, 10))
        zeros = torch.zeros(1, 3, 12)
        whole, h, c = model(tokens, zeros, zeros)
        first, h1, c1 = model(tokens[:, :4], zeros, zeros)
        second, h2, c2 = model(tokens[:, 4:], h1, c1)
        self.assertTrue(torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-6))
        self.assertTrue(torch.allclose(h2, h, atol=1e-6) and torch.allclose(c2, c, atol=1e-6))

    def test_dropout_acts_in_training_only(self):
        zeros = torch.zeros(1, 2, 12)
        for model, inputs in (
            (self.load("mlp", dropout="0.5"), [torch.randn(4, 6)]),
            (self.load("lstm_lm"), [torch.randint(0, 30, (2, 5)), zeros, zeros]),
        ):
            model.train()
            one, two = model(*inputs), model(*inputs)
            one, two = (one[0], two[0]) if isinstance(one, tuple) else (one, two)
            self.assertFalse(torch.equal(one, two))
            model.eval()
            one, two = model(*inputs), model(*inputs)
            one, two = (one[0], two[0]) if isinstance(one, tuple) else (one, two)
            self.assertTrue(torch.equal(one, two))


if __name__ == "__main__":
    unittest.main()
