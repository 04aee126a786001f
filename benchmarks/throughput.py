"""Times multi-view pooling on the device at hand, beside every other way of doing it.

    python benchmarks/throughput.py [--quick] [--shapes NAME ...] [--json FILE] [--plot FILE]

Same work: eager PyTorch (the reference), torch.compile of it, SDPA with the codes as queries, and mvam_fast's "torch"
and "triton" paths; P, G, dX and dC of each are checked against float64 on the inputs that are timed, or there is no
number. Their own work: open_clip's AttentionalPooler and timm's AttentionPoolLatent. On a CPU batches are smaller.
"""
from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from plot import plot  # noqa: E402
from providers import OTHER_WORK, SAME_WORK, Inputs, Unavailable, gate  # noqa: E402
from timing import copy_gb_s, interleaved_ms, peak_extra_mb, saved_mb, summary  # noqa: E402

from mvam_fast.files import write_json  # noqa: E402
from mvam_fast.version import __version__  # noqa: E402

SHAPES = {  # tokens × width of the encoders people have
    "vit-b-32": (50, 768), "vit-b-16": (197, 768), "vit-l-14": (257, 1024), "vit-l-14-336": (577, 1024),
    "vit-h-14": (257, 1280), "so400m-14-384": (729, 1152), "text-512": (77, 512), "text-768": (77, 768),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODES = ("forward", "forward+backward")
BYTES_NOTE = "GB/s counts least traffic: forward X + C + P + G; backward X + C + dP + dG read, dX + dC written."


def time_case(shape: str, batch: int, views: int, dtype: torch.dtype, device: torch.device, options, bar) -> list[dict]:
    """The rows of one shape: every provider in both modes; one that fails is a row that says why."""
    length, width = SHAPES[shape]
    inputs = Inputs.make(batch, length, width, views, dtype, device)
    about = {"shape": shape, "batch": batch, "views": views, "dtype": str(dtype)[6:]}
    rows, ready = [], {}
    for provider in options.providers:
        bar.set_description(f"{shape} {provider}")
        common = {**about, "provider": provider, "same_work": provider in SAME_WORK}
        try:
            ready[provider] = common, *_steps(provider, inputs)
        except Exception as error:  # whatever a peer does, the others are still timed
            reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
            rows += [{**common, "mode": mode, "reason": reason.strip().splitlines()[0][:200]} for mode in MODES]
            bar.update(len(MODES))
    for mode in MODES:
        bar.set_description(f"{shape} {mode}")
        steps = {provider: steps[mode] for provider, (_, steps, _) in ready.items()}
        times = interleaved_ms(steps, device, seconds=options.seconds)
        for provider, (common, _, extra) in ready.items():
            row = {**common, **extra, "mode": mode, **summary(times[provider])}
            row["gb_s"] = inputs.moved_bytes(mode) / row["median_ms"] / 1e6
            row["peak_extra_mb"] = peak_extra_mb(steps[provider], device)
            rows.append({**row, "repetitions_ms": times[provider]})
            bar.update()
    eager = {row["mode"]: row for row in rows if row["provider"] == "eager"}
    for row in rows:
        if "median_ms" in row:
            row["ratio"] = eager[row["mode"]]["median_ms"] / row["median_ms"]
            row["ratio_of_minima"] = eager[row["mode"]]["min_ms"] / row["min_ms"]
    return rows


def _steps(provider: str, inputs: Inputs) -> tuple[dict, dict]:
    """The callables to time, by mode, after the gate; and what the first call cost."""
    began = time.perf_counter()
    if provider in SAME_WORK:
        op = SAME_WORK[provider](inputs.tokens, inputs.codes)
        gate(op, inputs)
        leaves = (inputs.tokens, inputs.codes)

        def outputs():
            pooled, gram = op(*leaves)
            return (pooled, gram), (inputs.d_pooled.to(pooled.dtype), inputs.d_gram.to(gram.dtype))
    else:
        views, width = inputs.codes.shape
        module = OTHER_WORK[provider](width, views).to(inputs.tokens.device, inputs.tokens.dtype)
        leaves = (inputs.tokens, *module.parameters())

        def outputs():
            return (module(inputs.tokens),), (inputs.d_pooled,)

    def forward():
        with torch.no_grad():
            outputs()

    def forward_backward():
        results, gradients = outputs()
        torch.autograd.grad(results, leaves, gradients, allow_unused=True)

    forward()
    forward_backward()
    extra = {"first_call_s": time.perf_counter() - began, "saved_mb": saved_mb(lambda: outputs()[0], leaves)}
    return dict(zip(MODES, (forward, forward_backward), strict=True)), extra


def machine(device: torch.device) -> dict:
    """What the numbers were measured on and with."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "mvam_fast": __version__, "commit": commit or "not a checkout",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(device))}
    return found


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(rows: list[dict]) -> str:
    left = f"{'shape':16}{'batch':>6} {'mode':18}{'provider':29}"
    lines = [f"{left}{'median ms':>10}{'ratio':>7}{'by min':>8}{'saved MB':>10}{'GB/s':>8}{'% of copy':>11}"]
    for row in rows:
        left = f"{row['shape']:16}{row['batch']:>6} {row['mode']:18}{row['provider']:29}"
        if "median_ms" in row:
            times = f"{row['median_ms']:10.3f}{row['ratio']:7.2f}{row['ratio_of_minima']:8.2f}"
            lines.append(f"{left}{times}{row['saved_mb']:10.2f}{row['gb_s']:8.1f}{row['percent_of_copy']:11.1f}")
        else:
            lines.append(f"{left}  {row['reason']}")
    return "\n".join(lines)


def run(options) -> dict:
    device = torch.device(options.device)
    cases = [(shape, options.batch, views) for shape in options.shapes for views in options.views]
    result = {"machine": machine(device), "copy_gb_s": copy_gb_s(device), "note": BYTES_NOTE, "rows": []}
    with tqdm(total=len(cases) * len(options.providers) * len(MODES), unit="row", file=sys.stderr) as bar:
        for shape, batch, views in cases:
            rows = time_case(shape, batch, views, DTYPES[options.dtype], device, options, bar)
            for row in rows:
                if "gb_s" in row:
                    row["percent_of_copy"] = 100 * row["gb_s"] / result["copy_gb_s"]
            result["rows"] += rows
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    providers = [*SAME_WORK, *OTHER_WORK]
    parser.add_argument("--quick", action="store_true", help="two shapes, 8 views, little time each")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all, or vit-b-32 text-512 with --quick")
    parser.add_argument("--batch", type=int, help="default: 256 on a GPU, 16 on a CPU")
    parser.add_argument("--views", nargs="+", type=int, help="default: 16, or 8 with --quick")
    parser.add_argument("--providers", nargs="+", choices=providers, default=providers)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write every repetition here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    options = parser.parse_args(arguments)
    gpu = options.device.startswith("cuda")
    options.shapes = options.shapes or (["vit-b-32", "text-512"] if options.quick else list(SHAPES))
    options.batch = options.batch or (256 if gpu else 16)
    options.views = options.views or ([8] if options.quick else [16])
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.seconds = 0.4 if options.quick else 1.5
    if "eager" not in options.providers:
        options.providers = ["eager", *options.providers]  # the ratios are to it
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    result = run(options)
    about = result["machine"]
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {options.dtype}")
    if not options.device.startswith("cuda"):
        print("On a CPU: small batches, and no Triton kernel.")
    print(f"copy: {result['copy_gb_s']:.1f} GB/s. {result['note']}")
    print("ratio: eager's median time over the provider's, and the same of the minima; saved: what autograd keeps")
    print("for the backward besides the inputs. Poolers with a library's name do other, costlier work.")
    print(table(result["rows"]))
    if options.plot:
        plot(result["rows"], options.plot, f"{about['device']}, torch {about['torch']}, {options.dtype}")
        result["plot"] = options.plot.name
        print(options.plot)
    if options.json:
        write_json(options.json, result)
        print(options.json)


if __name__ == "__main__":
    main()
