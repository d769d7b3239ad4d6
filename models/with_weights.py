"""Writes a TorchScript archive again with other values: a trained model for PyTorch or libtorch.

    python3 models/with_weights.py --archive DIR/alpha.pt --weights trained.safetensors --out trained.pt

Every parameter and buffer of the archive takes its value from the safetensors file; names, shapes
and types must agree, and no tensor may be left over on either side. The result is in eval mode.

Exit status: 0 done; 1 the files do not fit one another or cannot be read or written; 2 a bad
argument.
"""

import argparse
import os
import pathlib
import sys

_FOLDER = pathlib.Path(os.path.abspath(__file__)).parent
if str(_FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(_FOLDER.parent))

try:
    import torch
except ImportError as import_error:
    sys.exit(
        f"with_weights.py: {sys.executable} has no torch ({import_error}); "
        "on Debian install python3-torch and run /usr/bin/python3"
    )

from models import tensor_files  # noqa: E402


def install(scripted, weights, source):
    """Copies every value of `weights` into `scripted`; ValueError names all that does not fit."""
    faults = []
    left = dict(weights)
    for spec in tensor_files.tensor_specs(scripted):
        value = left.pop(spec.name, None)
        if spec.role == "TIED":
            continue  # its owner brings the value
        if value is None:
            faults.append(f"{source} has no tensor {spec.name}")
            continue
        dtype, shape, content = value
        ours = tensor_files.dtype_name(spec.tensor.dtype)
        if (dtype, shape) != (ours, tuple(spec.tensor.shape)):
            faults.append(
                f"tensor {spec.name} is {dtype}{list(shape)} in {source}, "
                f"{ours}{list(spec.tensor.shape)} in the archive"
            )
            continue
        if spec.tensor.numel() == 0:
            continue
        new = torch.frombuffer(bytearray(content), dtype=spec.tensor.dtype).reshape(shape)
        with torch.no_grad():
            dict(tensor_files.named_tensors(scripted))[spec.name].copy_(new)
    faults += [f"the archive has no tensor {name}, which is in {source}" for name in left]
    if faults:
        raise ValueError("\n".join(faults))


def main(argv):
    parser = argparse.ArgumentParser(
        prog="with_weights.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--archive", required=True, help="TorchScript archive to begin from")
    parser.add_argument("--weights", required=True, help="safetensors file with the values")
    parser.add_argument("--out", required=True, help="archive to write")
    args = parser.parse_args(argv)
    try:
        scripted = torch.jit.load(args.archive, map_location="cpu")
        install(scripted, tensor_files.read_safetensors(args.weights), args.weights)
        scripted.eval()
        temporary = f"{args.out}.{os.getpid()}.tmp"
        try:
            torch.jit.save(scripted, temporary)
            os.replace(temporary, args.out)
        finally:
            pathlib.Path(temporary).unlink(missing_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"with_weights.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
