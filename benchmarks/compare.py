"""Prints what got faster or slower between two runs of the same benchmark, beyond the noise of the runs.

    python benchmarks/compare.py OLD.json NEW.json

Code that this project does not own (PyTorch's own versions, other libraries' poolers) is the control: by how much it
changed, the machine did. Every time was measured in blocks. A change counts if, the control's taken out, the medians of
the new blocks all lie on one side of the old ones': if blocks were independent this would happen by chance in 2 of 252
rows with five blocks each, and in 2 of 20 with three (training). Exit code: 0, or 1 if something of ours got slower, or
2 if the files cannot be compared.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import results  # noqa: E402
from providers import PROVIDERS  # noqa: E402

# What a row is known by; and where to see whether it times code of ours.
KEYS = {
    "throughput": ("shape", "batch", "views", "dtype", "provider", "setting", "mode"),
    "encoders": ("work", "tower", "model", "backend", "batch"),
}
OURS = {
    "throughput": ("provider", [name for name, provider in PROVIDERS.items() if provider.ours]),
    "encoders": ("model", ["mvam"]),
}
MUST_AGREE = ("model", "views", "dtype", "train_dtype")  # of the settings, where a kind has them


def compare(old: dict, new: dict) -> dict:
    """What changed, each with its `speedup` (0: fails now, ∞: failed before), and the median speedup of the control."""
    key, (owner, ours) = KEYS[new["kind"]], OURS[new["kind"]]
    for name in ("device", "threads"):
        if old["machine"][name] != new["machine"][name]:
            raise ValueError(f"{name} differs: {old['machine'][name]} and {new['machine'][name]}")
    for name in MUST_AGREE if new["kind"] == "encoders" else ():
        if old["settings"][name] != new["settings"][name]:
            raise ValueError(f"{name} differs: {old['settings'][name]} and {new['settings'][name]}")
    before, after = ({tuple(row.get(k) for k in key): row for row in result["rows"]} for result in (old, new))
    both = [(name, before[name], row) for name, row in after.items() if name in before]
    timed = [(name, one, other) for name, one, other in both if "reason" not in one and "reason" not in other]
    speedups = {name: one["median_ms"] / other["median_ms"] for name, one, other in timed}
    of_others = [speedups[name] for name, _, row in timed if row.get(owner) not in ours]
    control = statistics.median(of_others) if of_others else 1.0
    changes = []
    for name, one, other in both:
        about = {"name": " ".join(str(part) for part in name if part is not None), "ours": other.get(owner) in ours}
        if name not in speedups:
            if "reason" not in one:
                changes.append({**about, "speedup": 0.0, "text": f"has no time any more: {other['reason']}"})
            elif "reason" not in other:
                changes.append({**about, "speedup": math.inf, "text": f"had no time: {one['reason']}"})
        elif _apart(one["blocks_ms"], other["blocks_ms"], control):
            speedup = speedups[name] / control
            by, word = max(speedup, 1 / speedup), "faster" if speedup > 1 else "slower"
            times = f"{one['median_ms']:.3f} -> {other['median_ms']:.3f} ms"
            changes.append({**about, "speedup": speedup, "text": f"{by:.2f}x {word} than the control, {times}"})
    return {
        "changes": changes, "control": control, "rows": len(timed),
        "only_in": (len(before.keys() - after.keys()), len(after.keys() - before.keys())),
    }  # fmt: skip


def _apart(old: list[list[float]], new: list[list[float]], control: float) -> bool:
    first = [statistics.median(block) for block in old]
    second = [control * statistics.median(block) for block in new]
    return max(first) < min(second) or max(second) < min(first)


def text(found: dict) -> str:
    old_only, new_only = found["only_in"]
    lines = [
        f"{found['rows']} rows in both files, {old_only} in the old only, {new_only} in the new only",
        f"control (code that is not ours): the new run is {found['control']:.3f}x as fast, median of its rows",
    ]
    for title, ours in (("ours", True), ("not ours", False)):
        rows = [row for row in found["changes"] if row["ours"] == ours]
        lines.append(f"{title}: {len(rows)} beyond the noise")
        lines += [f"  {row['name']}: {row['text']}" for row in sorted(rows, key=lambda row: row["speedup"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        new = results.read(options.new)
        if new["kind"] not in KEYS:
            raise ValueError(f"{options.new} holds {new['kind']!r}; comparable are {', '.join(KEYS)}")
        found = compare(results.read(options.old, new["kind"]), new)
    except (ValueError, FileNotFoundError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    print(text(found))
    return int(any(row["ours"] and row["speedup"] < 1 for row in found["changes"]))


if __name__ == "__main__":
    sys.exit(main())
