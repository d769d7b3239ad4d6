"""Writes what a group starts from: a TorchScript archive, its initial weights, its tensor list.

    python3 models/export.py --module mlp --option in_features=32 --option num_classes=20 \\
        --seed 7 --out DIR/alpha

writes DIR/alpha.pt (torch.jit archive), DIR/alpha.safetensors (initial value of every parameter and
buffer) and DIR/alpha.tensors.textproto (message codistill.TensorList). The last two have the same
bytes whenever module, options, seed and torch are the same.

--module is the name of a module of this folder or the path of a Python file of yours with

    def build(options: dict[str, str]) -> torch.nn.Module

Its forward() takes the job's inputs in the job's order (then recurrent states) and returns the
logits (then the new states). It must go through torch.jit.script, or be traced by build() itself.
Reading options with models.options.Options gives checked values and clear errors.

    python3 models/export.py --check JOB.textproto

writes nothing: it builds the job's model and runs forward() on made-up examples of the job's inputs,
in training and evaluation mode, and tells names, shapes and dtypes, or the first thing that is wrong.

Exit status: 0 done; 1 the model cannot be exported or a file cannot be written; 2 a bad argument or
option.
"""

import argparse
import importlib.util
import io
import json
import os
import pathlib
import random
import sys
import traceback

_FOLDER = pathlib.Path(os.path.abspath(__file__)).parent
if str(_FOLDER.parent) not in sys.path:
    # Modules import models.options from wherever they are started.
    sys.path.insert(0, str(_FOLDER.parent))

# Some virtual machines announce AMX without the shape of its tiles, and kernels that use them end the
# process (common/base/blas_kernels.h). A check needs no AMX.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

try:
    import torch
except ImportError as import_error:
    sys.exit(
        f"export.py: {sys.executable} has no torch ({import_error}); "
        "on Debian install python3-torch and run /usr/bin/python3"
    )

from models import check, job_file, tensor_files  # noqa: E402
from models.options import OptionError  # noqa: E402

BUILTIN = ("ctr", "lstm_lm", "mlp", "resnet")


class UsageError(Exception):
    """A bad argument; the exit status is 2."""


def load_module(name, directory):
    """The Python module for --module: a name of BUILTIN, or a path relative to `directory`."""
    if name in BUILTIN:
        path = _FOLDER / f"{name}.py"
    elif name.endswith(".py"):
        path = pathlib.Path(directory, name)
        if not path.is_file():
            raise UsageError(f"--module {name}: no file {path}")
    else:
        raise UsageError(
            f"--module {name!r}: it must be one of {', '.join(BUILTIN)}, or the path of a .py file"
        )
    # The name keeps clear of installed packages; torch.jit needs the entry in sys.modules.
    module_name = f"codistill_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if name not in BUILTIN:
        sys.path.append(str(path.resolve().parent))  # files that it imports from its own folder
    spec.loader.exec_module(module)
    if not callable(getattr(module, "build", None)):
        raise UsageError(f"--module {name}: {path} has no function build(options)" + _hint(module))
    return module


def _hint(module):
    """How build() might look, where the file has a network to return."""
    classes = [
        value.__name__
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, torch.nn.Module)
        and value.__module__ == module.__name__
    ]
    if not classes:
        return ""
    return f"; for example:\n\n    def build(options):\n        return {classes[-1]}()\n"


def script(model):
    """The model as torch.jit.script compiles it; ModelError says what the compiler said, and a way out."""
    try:
        return torch.jit.script(model)
    except Exception as error:  # of several kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = "\n".join(f"    {line}" for line in lines[:16])
        raise tensor_files.ModelError(
            f"torch.jit.script cannot compile {type(model).__name__}.forward():\n{text}\n"
            "What TorchScript can do: https://pytorch.org/docs/stable/jit_language_reference.html. "
            "Arguments that are no\ntensors need annotations; *args, **kwargs, and most of the standard "
            "library have no place in forward().\n"
            "Where a part has no branches that depend on data, build() may trace it instead:\n"
            "    model.part = torch.jit.trace(model.part, example)    # of a batch of 2 or more\n"
            "Dropout and batch norm must stay outside what is traced: a trace does not know train() "
            "from eval()."
        ) from None


def build_scripted(module, options, seed):
    """Builds the model with weights of `seed` and scripts it, in training mode."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    model = module.build(dict(options))
    if not isinstance(model, torch.nn.Module):
        raise tensor_files.ModelError(
            f"build() returned {type(model).__name__}; it must return a torch.nn.Module"
        )
    model.train()
    return model if isinstance(model, torch.jit.ScriptModule) else script(model)


def archive_bytes(scripted):
    """The archive, checked to list the same tensors with the same values once it is loaded."""
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    content = buffer.getvalue()
    before = tensor_files.tensor_specs(scripted)
    after = tensor_files.tensor_specs(torch.jit.load(io.BytesIO(content)))
    if [spec[:3] for spec in before] != [spec[:3] for spec in after]:
        raise tensor_files.ModelError("the archive lists other tensors than the module it is from")
    if tensor_files.safetensors_bytes(before, {}) != tensor_files.safetensors_bytes(after, {}):
        raise tensor_files.ModelError("the archive holds other values than the module it is from")
    return content


def write_atomically(path, content):
    """Nobody ever sees half a file, nor loses the old one to a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def twins(out, specs):
    """Safetensors files beside `out` whose trained parameters are bit-equal to these."""
    mine = {
        spec.name: (tuple(spec.tensor.shape), tensor_files.tensor_bytes(spec.tensor))
        for spec in specs
        if spec.role == "PARAMETER"
    }
    found = []
    for path in sorted(out.parent.glob("*.safetensors")):
        if path.stem == out.name or not mine:
            continue
        try:
            theirs = tensor_files.read_safetensors(path)
        except (ValueError, OSError):
            continue  # not ours to judge
        if all(theirs.get(name, (None,))[1:] == value for name, value in mine.items()):
            found.append(path)
    return found


def parse_options(pairs):
    options = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError(f"--option {pair!r}: it must be KEY=VALUE")
        if key in options:
            raise UsageError(f"--option {key} is given twice")
        options[key] = value
    return options


def seed_argument(text):
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text}: it must be in [0, 2^64)")
    return value


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--module", help=", ".join(BUILTIN) + ", or FILE.py")
    what.add_argument("--check", metavar="JOB", help="try the model of a job file, write nothing")
    parser.add_argument(
        "--module_dir", default=".", help="folder that a relative FILE.py is taken from"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="option of the module"
    )
    parser.add_argument("--seed", type=seed_argument, default=1, help="of the initial weights")
    parser.add_argument("--out", help="path of the files, without their endings")
    args = parser.parse_args(argv)
    if args.module is not None and args.out is None:
        parser.error("--module needs --out")
    return args


def run_check(args):
    model = job_file.read_model(args.check)
    args.module = model.module  # whom errors name
    args.option = [f"{key}={value}" for key, value in model.options.items()]
    module = load_module(model.module, pathlib.Path(args.check).resolve().parent)
    scripted = build_scripted(module, model.options, args.seed)
    print(f"{args.check}: {model.module} builds {scripted.original_name}")
    check.check(scripted, model, report=lambda line: print(f"  {line}"))
    archive_bytes(scripted)
    print("  ok")


def run(args):
    options = parse_options(args.option)
    module = load_module(args.module, args.module_dir)
    scripted = build_scripted(module, options, args.seed)
    specs = tensor_files.tensor_specs(scripted)
    archive = archive_bytes(scripted)
    metadata = {
        "format": "pt",
        "module": os.path.basename(args.module),
        "options": json.dumps(options, sort_keys=True),
        "seed": str(args.seed),
    }

    if args.out.endswith(os.sep):
        raise UsageError(f"--out {args.out}: it must end in a file name, such as the group's")
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for ending, content in (
        (".pt", archive),
        (".safetensors", tensor_files.safetensors_bytes(specs, metadata)),
        (".tensors.textproto", tensor_files.tensor_list_text(specs).encode("ascii")),
    ):
        write_atomically(out.with_name(out.name + ending), content)

    trained = [spec.tensor.numel() for spec in specs if spec.role == "PARAMETER"]
    print(f"{out}: {sum(trained)} parameters in {len(trained)} tensors, {len(specs)} tensors in all")
    for path in twins(out, specs):
        print(
            f"export.py: warning: {path} starts from the same weights as {out.name}; groups that "
            "are equal have nothing to teach each other: give each its own --seed",
            file=sys.stderr,
        )


def _given(args, error):
    """What a build() that misses an option might have been told."""
    if not isinstance(error, KeyError):
        return ""
    return f"; options given: {', '.join(args.option) or 'none'}"


def main(argv):
    args = parse_arguments(argv)
    # One thread: the order of additions in an initializer must not depend on the machine's cores.
    torch.set_num_threads(1)
    try:
        run_check(args) if args.check is not None else run(args)
        return 0
    except (UsageError, OptionError, job_file.JobFileError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except (tensor_files.ModelError, OSError) as error:
        print(f"export.py: {args.module}: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # whatever a user's module or torch.jit raises
        traceback.print_exc()
        print(
            f"export.py: {args.module} failed: {type(error).__name__}: {error}{_given(args, error)}",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
