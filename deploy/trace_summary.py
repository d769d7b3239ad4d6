#!/usr/bin/env python3
"""Says of traces (worker --trace, codistillctl run --trace) what went on under computation.

    python3 deploy/trace_summary.py FILE... [--json] [--skip STEPS]

For every worker's file a table: how long each kind of work took in a step, how much of that time lay
under the passes of the model (forward, loss, backward), and how much was exposed. Time counts once
where several spans of a kind overlap. The first STEPS steps (default 2), in which caches are cold
and nothing could be asked for early, are left out. --json prints one object a file instead.
"""

import argparse
import json
import statistics
import sys

# Kinds of work, by category of their spans. Waiting is not work: the last table has it.
KINDS = [
    ("pull", "weights come in"),
    ("push", "gradients go out"),
    ("decision", "from END to the decision about the push"),
    ("teacher", "from a question to its answer"),
    ("batch", "batches are built"),
    ("assignment", "the leader is asked for steps"),
]


class TraceError(Exception):
    pass


def load(path):
    """Complete spans of a trace file, by when they began, and the name of its process."""
    try:
        with open(path, encoding="utf-8") as file:
            trace = json.load(file)
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {error}") from error
    events = trace.get("traceEvents") if isinstance(trace, dict) else trace
    if not isinstance(events, list):
        raise TraceError(f"{path}: no traceEvents: not a Chrome trace")
    spans, process, dropped = [], "", 0
    for event in events:
        if event.get("ph") == "X":
            spans.append(event)
        elif event.get("name") == "process_name":
            process = event["args"]["name"]
        elif event.get("name") == "spans_dropped":
            dropped = event["args"]["count"]
    spans.sort(key=lambda span: span["ts"])
    return spans, process, dropped


def union(intervals):
    """The same time as disjoint intervals, in order."""
    merged = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def length(intervals):
    return sum(end - begin for begin, end in intervals)


def overlap(a, b):
    """Time in both of two lists of disjoint intervals."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def clip(intervals, begin, end):
    return [[max(b, begin), min(e, end)] for b, e in intervals if e > begin and b < end]


def first_gradients(spans, steps):
    """For each step, when its first gradient had left, as a fraction of the backward pass."""
    backward, first = {}, {}
    for span in spans:
        step = span["args"].get("step")
        if span["cat"] == "compute" and span["name"] == "backward":
            backward.setdefault(step, span)
        elif span["cat"] == "push":
            end = span["ts"] + span["dur"]
            first[step] = min(first.get(step, end), end)
    return [
        (first[step] - span["ts"]) / span["dur"]
        for step, span in backward.items()
        if step in steps and step in first and span["dur"] > 0
    ]


def summarize(spans, skip):
    """The figures of one worker's trace; milliseconds are means of a step."""
    by_category = {}
    for span in spans:
        by_category.setdefault(span["cat"], []).append(span)
    steps = by_category.get("step", [])[skip:]
    if not steps:
        raise TraceError(f"no steps after the first {skip}: not the trace of a worker, or too short")
    begin, end = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]

    def times(category):
        found = [[s["ts"], s["ts"] + s["dur"]] for s in by_category.get(category, [])]
        return clip(union(found), begin, end)

    per_step = 1e-3 / len(steps)
    compute = times("compute")
    figures = {
        "steps": len(steps),
        "step_ms": (end - begin) * per_step,
        "compute_ms": length(compute) * per_step,
        "compute_fraction": length(compute) / (end - begin),
        "kinds": {},
        "waits": {},
    }
    for kind, _ in KINDS:
        time = times(kind)
        total, hidden = length(time), overlap(time, compute)
        figures["kinds"][kind] = {
            "spans": sum(1 for s in by_category.get(kind, []) if begin <= s["ts"] <= end),
            "ms": total * per_step,
            "exposed_ms": (total - hidden) * per_step,
            "under_compute": hidden / total if total > 0 else None,
        }
    for span in by_category.get("wait", []):
        if begin <= span["ts"] <= end:
            waits = figures["waits"]
            waits[span["name"]] = waits.get(span["name"], 0.0) + span["dur"] * per_step
    parts = {}
    for span in by_category.get("compute", []):
        if begin <= span["ts"] <= end:
            parts[span["name"]] = parts.get(span["name"], 0.0) + span["dur"] * per_step
    figures["compute"] = parts
    numbers = {s["args"].get("step") for s in steps}
    fractions = first_gradients(spans, numbers)
    figures["first_gradient_at"] = statistics.median(fractions) if fractions else None
    return figures


def table(figures, process, dropped):
    lines = [
        f"{process}: {figures['steps']} steps of {figures['step_ms']:.2f} ms, "
        f"{100 * figures['compute_fraction']:.1f} % of the time in passes of the model",
        "  passes      "
        + ", ".join(f"{name} {ms:.2f} ms" for name, ms in figures["compute"].items()),
        f"  {'kind':<12}{'ms a step':>10}{'exposed':>10}{'hidden':>9}",
    ]
    for kind, meaning in KINDS:
        k = figures["kinds"][kind]
        if k["spans"] == 0:
            continue
        hidden = f"{100 * k['under_compute']:.0f} %" if k["under_compute"] is not None else "-"
        lines.append(f"  {kind:<12}{k['ms']:>10.2f}{k['exposed_ms']:>10.2f}{hidden:>9}  {meaning}")
    for name, ms in figures["waits"].items():
        lines.append(f"  {name + ':':<26}{ms:.2f} ms a step")
    if figures["first_gradient_at"] is not None:
        lines.append(
            "  the first gradient has left after "
            f"{100 * figures['first_gradient_at']:.0f} % of the backward pass"
        )
    if dropped:
        lines.append(f"  {dropped} older spans were dropped: this is the end of a longer run")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--skip", type=int, default=2, metavar="STEPS")
    options = parser.parse_args(argv)
    failed = False
    for path in options.files:
        try:
            spans, process, dropped = load(path)
            figures = summarize(spans, options.skip)
        except TraceError as error:
            print(f"trace_summary: {path}: {error}", file=sys.stderr)
            failed = True
            continue
        if options.json:
            print(json.dumps({"file": path, "process": process, "dropped": dropped, **figures}))
        else:
            print(table(figures, process, dropped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
