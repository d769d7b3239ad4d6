"""What stands beside an archive: the list of its tensors and their initial values.

tensor_specs() lists the tensors of a scripted module as libtorch will enumerate them. The other
functions write and read the two files that parameter servers, which never link libtorch, start from.
"""

import json
import struct
from typing import NamedTuple, Optional

import torch

# torch type -> (DataType of proto/model.proto, safetensors name)
_DTYPES = {
    torch.float32: ("DT_FLOAT", "F32"),
    torch.float64: ("DT_DOUBLE", "F64"),
    torch.float16: ("DT_HALF", "F16"),
    torch.bfloat16: ("DT_BFLOAT16", "BF16"),
    torch.int32: ("DT_INT32", "I32"),
    torch.int64: ("DT_INT64", "I64"),
    torch.uint8: ("DT_UINT8", "U8"),
    torch.bool: ("DT_BOOL", "BOOL"),
    torch.int8: ("DT_INT8", "I8"),
}

# The safetensors reader of Hugging Face refuses longer headers; so do we, before writing one.
_MAX_HEADER_BYTES = 100_000_000


class ModelError(Exception):
    """A model that cannot be trained by parameter servers, with the tensor at fault."""


class TensorSpec(NamedTuple):
    name: str
    role: str  # PARAMETER, BUFFER, FROZEN or TIED
    tied_to: Optional[str]  # role TIED only
    tensor: torch.Tensor  # detached, contiguous, on the CPU


def _named_slots(module, kind, prefix=""):
    """Yields (name, tensor) depth first, tensors of a module before its submodules.

    Python's named_parameters() leaves out the second name of a tensor and of a shared submodule;
    torch::jit::Module::named_parameters() does not, and it is what workers and followers see.
    """
    own = module._parameters if kind == "parameter" else module._buffers
    for name, tensor in own.items():
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_slots(child, kind, f"{prefix}{name}.")


def named_tensors(scripted):
    """Yields (name, tensor) of all parameters, then all buffers, second names included."""
    yield from _named_slots(scripted, "parameter")
    yield from _named_slots(scripted, "buffer")


def dtype_name(dtype):
    """What safetensors files call a torch.dtype."""
    return _DTYPES[dtype][1]


def tensor_specs(scripted):
    """The tensors of a scripted module: all parameters, then all buffers.

    TorchScript keeps non-persistent buffers like any other, and libtorch lists them; they are
    buffers here too.
    """
    slots = [(name, tensor, True) for name, tensor in _named_slots(scripted, "parameter")]
    slots += [(name, tensor, False) for name, tensor in _named_slots(scripted, "buffer")]
    specs = []
    owners = {}  # address of the storage -> (name, tensor) of its first appearance
    for name, tensor, is_parameter in slots:
        if tensor.layout != torch.strided:
            raise ModelError(f"tensor {name} is {tensor.layout}; only dense tensors can be trained")
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"tensor {name} is {tensor.dtype}; it must be one of "
                + ", ".join(str(dtype) for dtype in _DTYPES)
            )
        trained = is_parameter and tensor.requires_grad
        if trained and tensor.dtype != torch.float32:
            raise ModelError(
                f"parameter {name} is {tensor.dtype}; a trained parameter must be torch.float32"
            )
        role = "PARAMETER" if trained else "FROZEN" if is_parameter else "BUFFER"
        tied_to = None
        address = tensor.storage().data_ptr() if tensor.numel() else 0
        if address != 0 and address in owners:
            tied_to, owner = owners[address]
            same = (
                owner.data_ptr() == tensor.data_ptr()
                and owner.shape == tensor.shape
                and owner.stride() == tensor.stride()
            )
            if not same:
                raise ModelError(
                    f"tensors {tied_to} and {name} share memory but are not the same tensor; "
                    "tie whole tensors or none"
                )
            role = "TIED"
        elif address != 0:
            owners[address] = (name, tensor)
        specs.append(TensorSpec(name, role, tied_to, tensor.detach().cpu().contiguous()))
    return specs


def _quoted(text):
    """A string literal of the protobuf text format; names are almost always plain ASCII."""
    out = []
    for byte in text.encode("utf-8"):
        char = chr(byte)
        if char in "\"\\":
            out.append("\\" + char)
        elif 0x20 <= byte < 0x7F:
            out.append(char)
        else:
            out.append(f"\\{byte:03o}")
    return '"' + "".join(out) + '"'


def tensor_list_text(specs):
    """Message codistill.TensorList (proto/model.proto) in text format, one tensor a line."""
    lines = ["# proto-file: proto/model.proto", "# proto-message: codistill.TensorList"]
    for spec in specs:
        fields = [f"name: {_quoted(spec.name)}"]
        fields += [f"shape: {size}" for size in spec.tensor.shape]
        fields += [f"dtype: {_DTYPES[spec.tensor.dtype][0]}", f"role: {spec.role}"]
        if spec.tied_to is not None:
            fields.append(f"tied_to: {_quoted(spec.tied_to)}")
        lines.append("tensors { " + " ".join(fields) + " }")
    return "\n".join(lines) + "\n"


def tensor_bytes(tensor):
    if tensor.numel() == 0:
        return b""
    # numpy has no bfloat16; every dtype can be seen as bytes once it has a dimension.
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def safetensors_bytes(specs, metadata):
    """A safetensors file of every tensor that has storage of its own.

    Wider elements come first, so that each tensor is aligned in the file, as the reference writer
    does it; among equals the order of the list.
    """
    owned = [spec for spec in specs if spec.role != "TIED"]
    owned.sort(key=lambda spec: -spec.tensor.element_size())
    header = {"__metadata__": metadata}
    chunks = []
    offset = 0
    for spec in owned:
        data = tensor_bytes(spec.tensor)
        header[spec.name] = {
            "dtype": _DTYPES[spec.tensor.dtype][1],
            "shape": list(spec.tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ModelError(f"{len(owned)} tensors need a header of {len(text)} bytes: too many names")
    return b"".join([struct.pack("<Q", len(text)), text] + chunks)


def read_safetensors(path):
    """Returns {name: (dtype name, shape, bytes)}; ValueError names what is wrong with the file."""
    with open(path, "rb") as file:
        content = file.read()
    if len(content) < 8:
        raise ValueError(f"{path}: {len(content)} bytes are too short for a safetensors file")
    (length,) = struct.unpack_from("<Q", content)
    if length > min(len(content) - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"{path}: header of {length} bytes in a file of {len(content)}")
    try:
        header = json.loads(content[8 : 8 + length])
        data = memoryview(content)[8 + length :]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"tensor {name} lies outside the file")
            tensors[name] = (entry["dtype"], tuple(entry["shape"]), bytes(data[begin:end]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: bad safetensors header: {error}") from error
    return tensors
