"""The dry run of `export.py --check JOB`: what forward() takes and gives, before anything is trained.

Runs the scripted model on made-up examples (normal numbers, zeros for integers) as workers and prediction
servers will: with the job's inputs and states, in training and in evaluation mode.
"""

import collections

import torch

from models import job_file, tensor_files

_BATCH = 4
_TORCH = {
    "FLOAT": torch.float32,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "UINT8": torch.uint8,
}
_NAMES = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
_RANDOM = ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "Dropout1d", "Dropout2d", "Dropout3d")


def _shape(sizes):
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def _example(spec):
    shape = (_BATCH, *spec.shape)
    dtype = _TORCH.get(spec.dtype)
    if dtype is None:
        raise tensor_files.ModelError(f"input {spec.name}: {spec.dtype} is no dtype of a batch")
    return torch.randn(shape) if dtype == torch.float32 else torch.zeros(shape, dtype=dtype)


def _check_names(scripted, model):
    arguments = scripted.forward.schema.arguments[1:]
    wanted = [spec.name for spec in model.inputs] + [state.name for state in model.states]
    got = []
    for argument in arguments:
        if len(got) >= len(wanted) and argument.has_default_value():
            break  # one that may be left alone
        got.append(argument.name)
    if got != wanted:
        raise tensor_files.ModelError(
            f"forward() takes ({', '.join(got)}); the job's model.inputs and model.states are "
            f"({', '.join(wanted)}): the names and their order must be the same"
        )


def _run(scripted, model, arguments, training, bf16=False):
    """(logits, states), checked."""
    scripted.train(training)
    mode = "training" if training else "evaluation"
    if bf16:
        mode += " with precision BF16"
    versions = [argument._version for argument in arguments]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            result = scripted(*arguments)
    except Exception as error:  # whatever the model raises
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        taken = ", ".join(
            f"{spec.name} {spec.dtype} {_shape(['B', *spec.shape])}" for spec in model.inputs
        )
        raise tensor_files.ModelError(
            f"forward({taken}) failed in {mode} mode, B = {_BATCH}: {last}"
        ) from error
    parts = list(result) if isinstance(result, tuple) else [result]
    if len(parts) != 1 + len(model.states) or not all(isinstance(p, torch.Tensor) for p in parts):
        wanted = "the logits" if not model.states else "(logits, " + ", ".join(
            state.name for state in model.states
        ) + ")"
        kinds = ", ".join(type(part).__name__ for part in parts)
        what = f"a tuple of {kinds}" if isinstance(result, tuple) else type(result).__name__
        raise tensor_files.ModelError(f"forward() returned {what}; it must return {wanted}")
    logits = parts[0]
    if (
        logits.dim() < 2
        or logits.size(0) != _BATCH
        or logits.size(-1) != model.num_outputs
        or not logits.dtype.is_floating_point
    ):
        raise tensor_files.ModelError(
            f"forward() gave logits {_shape(logits.shape)} for {_BATCH} examples; they must be "
            f"[{_BATCH}, ..., {model.num_outputs}] (model.num_outputs is {model.num_outputs})"
        )
    for state, part in zip(model.states, parts[1:]):
        wanted = [_BATCH if size == -1 else size for size in state.shape]
        if list(part.shape) != wanted:
            raise tensor_files.ModelError(
                f"forward() gave state {state.name} the shape {_shape(part.shape)}; it must be "
                f"{_shape(wanted)}"
            )
    names = [spec.name for spec in model.inputs] + [state.name for state in model.states]
    for name, argument, version in zip(names, arguments, versions):
        if argument._version != version:
            raise tensor_files.ModelError(
                f"forward() writes into its argument {name}; it must compute out of place"
            )
    return logits, parts[1:]


def _kinds(scripted):
    counts = collections.Counter(
        getattr(module, "original_name", type(module).__name__) for module in scripted.modules()
    )
    return [
        (name, count)
        for name, count in sorted(counts.items())
        if name in _RANDOM or name.startswith("BatchNorm")
    ]


def check(scripted, model, report=print):
    """Raises ModelError at the first thing that training would refuse; reports what there is."""
    _check_names(scripted, model)
    torch.manual_seed(1)
    arguments = [_example(spec) for spec in model.inputs]
    arguments += [
        torch.zeros([_BATCH if size == -1 else size for size in state.shape])
        for state in model.states
    ]
    specs = tensor_files.tensor_specs(scripted)
    logits, _ = _run(scripted, model, arguments, training=True, bf16=model.bf16)
    dtype = _NAMES.get(logits.dtype, str(logits.dtype))
    logits.float().square().sum().backward()
    trained = [parameter for parameter in scripted.named_parameters() if parameter[1].requires_grad]
    idle = [name for name, parameter in trained if parameter.grad is None]
    with torch.no_grad():
        before = {name: buffer.clone() for name, buffer in scripted.named_buffers()}
        first, _ = _run(scripted, model, arguments, training=False)
        again, _ = _run(scripted, model, arguments, training=False)
    for name, buffer in scripted.named_buffers():
        if not torch.equal(before[name], buffer):
            raise tensor_files.ModelError(
                f"forward() changes buffer {name} in evaluation mode; it may do so in training only "
                "(a traced batch norm does not know one from the other)"
            )
    if not torch.equal(first, again):
        raise tensor_files.ModelError(
            "in evaluation mode two passes over the same examples differ: is there dropout that "
            "train() and eval() do not switch, as in a traced model?"
        )

    count = sum(spec.tensor.numel() for spec in specs if spec.role == "PARAMETER")
    report(f"parameters   {count} in {sum(spec.role == 'PARAMETER' for spec in specs)} tensors")
    for spec in model.inputs:
        report(f"input        {spec.name}  {spec.dtype} {_shape(['B', *spec.shape])}")
    for state in model.states:
        report(f"state        {state.name}  FLOAT {_shape('B' if s == -1 else s for s in state.shape)}")
    report(f"logits       {dtype} {_shape(['B', *logits.shape[1:]])}" + (
        ", computed with precision BF16" if model.bf16 else ""
    ))
    for name, number in _kinds(scripted):
        report(f"in training  {number} x {name}")
    for name in idle:
        report(f"warning      no gradient reaches {name}: it stays as it is")
