#!/usr/bin/env python3
"""Times PyTorch on what //tests/benchmarks:gpu_loss times: the codistillation loss and its gradient.

  loss_pytorch.py [--quick]

Softmax cross-entropy plus half the soft cross-entropy with one teacher, mean over rows, forward and backward to the logits; eager and
torch.compile, by CUDA events, in alternation with a copy on the device that moves as many bytes (logits, teacher and gradient, once
each). The results of the two are compared with each other and, for a few rows, with float64. Keys are those of gpu_loss. The last line
is a JSON object; `null` stands for what did not fit the device's memory.
"""

import json
import platform
import statistics
import sys

import torch
import torch.nn.functional as F

VARIANTS = [("logits_t1", False, 1.0), ("logits_t2", False, 2.0), ("probabilities_t1", True, 1.0)]
FORMATS = [("fp32", torch.float32), ("bf16", torch.bfloat16)]


def make_loss(given, temperature):
    """The loss as one writes it down; in float32 whatever the logits are in."""

    def loss(logits, labels, teacher):
        z = logits.float()
        q = teacher.float() if given else F.softmax(teacher.float() / temperature, dim=1)
        phi = F.cross_entropy(z, labels)
        psi = -(q * F.log_softmax(z / temperature, dim=1)).sum(dim=1).mean()
        return phi + 0.5 * temperature**2 * psi

    return loss


def gradient_of(loss, logits, labels, teacher):
    value = loss(logits, labels, teacher)
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient


def seconds(body, calls):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        body()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def check(name, loss, got, logits, labels, teacher, given, temperature):
    """A few rows against float64."""
    rows = min(8, logits.shape[0])
    z = logits[:rows].detach().double().requires_grad_(True)
    q = teacher[:rows].double() if given else F.softmax(teacher[:rows].double() / temperature, dim=1)
    value = F.cross_entropy(z, labels[:rows], reduction="sum")
    value = value - 0.5 * temperature**2 * (q * F.log_softmax(z / temperature, dim=1)).sum()
    (want,) = torch.autograd.grad(value / logits.shape[0], z)
    error = (got[:rows].double() - want).norm() / want.norm()
    limit = 1e-4 if got.dtype == torch.float32 else 1e-2
    if not error <= limit:
        sys.exit(f"{name}: the gradient is {error:.1e} away from float64")


def measure(name, rows, classes, dtype, given, temperature, rounds):
    generator = torch.Generator(device="cuda").manual_seed(1)

    def normal():
        return (2 * torch.randn(rows, classes, device="cuda", generator=generator)).to(dtype)

    logits = normal().requires_grad_(True)
    teacher = normal()
    if given:
        teacher = F.softmax(teacher.float(), dim=1).to(dtype)
    labels = torch.randint(classes, (rows,), device="cuda", generator=generator)
    moved = 3 * logits.numel() * logits.element_size()
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    bodies = {"copy": lambda: target.copy_(source)}
    torch._dynamo.reset()
    eager = make_loss(given, temperature)
    for key, loss in (("eager", eager), ("compiled", torch.compile(make_loss(given, temperature), dynamic=False))):
        try:
            got = gradient_of(loss, logits, labels, teacher)
            check(f"{name} {key}", loss, got, logits, labels, teacher, given, temperature)
            del got
            bodies[key] = lambda loss=loss: gradient_of(loss, logits, labels, teacher)
            for _ in range(3):
                bodies[key]()
        except torch.cuda.OutOfMemoryError:
            bodies.pop(key, None)
            torch.cuda.empty_cache()
    torch.cuda.synchronize()

    times = {key: [] for key in bodies}
    order = list(bodies)
    for turn in range(rounds):
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            times[key].append(seconds(bodies[key], 5))
    medians = {key: statistics.median(values) for key, values in times.items()}
    figures = {"copy_gbps": moved / medians["copy"] / 1e9}
    for key in ("eager", "compiled"):
        figures[f"{key}_us"] = 1e6 * medians[key] if key in medians else None
        figures[f"{key}_vs_copy"] = medians["copy"] / medians[key] if key in medians else None
    return figures


def main():
    quick = "--quick" in sys.argv[1:]
    if not torch.cuda.is_available():
        sys.exit("loss_pytorch: PyTorch finds no CUDA device")
    rounds = 3 if quick else 10
    properties = torch.cuda.get_device_properties(0)
    report = {
        "benchmark": "loss_pytorch",
        "rounds": rounds,
        "pytorch": torch.__version__,
        "python": platform.python_version(),
        "device": {"name": properties.name, "multiprocessors": properties.multi_processor_count},
    }
    for rows in [2048] if quick else [2048, 8192]:
        for classes in (24000, 128000):
            for format_name, dtype in FORMATS:
                for variant, given, temperature in VARIANTS:
                    name = f"{rows}x{classes}_{format_name}_{variant}"
                    report[name] = measure(name, rows, classes, dtype, given, temperature, rounds)
                    torch.cuda.empty_cache()
                    print(name, json.dumps(report[name]), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
