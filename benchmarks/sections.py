"""The sections of docs/performance.md: one function for each kind of result, Markdown out."""
from __future__ import annotations

from itertools import groupby
from pathlib import Path

from providers import PROVIDERS
from tables import OWN_WORK, group_title, label, original_of, times_original, times_original_by_block

CLAIM = {"shape": "vit-b-16", "batch": 32, "views": 16}  # the case the project's own targets are stated for
STATIC = "Static: what ptxas makes of each entry of the launch table; nothing was run."
MODELLED = (
    "Modelled, not measured: bytes by formula (`benchmarks/kernel_report.py`) over an assumed {gb_s:.0f} GB/s, for "
    "{samples:,} samples of {tokens} tokens. No kernel can be faster on such a device; how close one comes has to be "
    "timed."
)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *rows]) + "\n"


def number(value: float) -> str:
    """Three digits, more for what is 1,000 or larger."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def about(result: dict) -> str:
    machine = result["machine"]
    found = [machine["device"], f"{machine['threads']} threads", f"torch {machine['torch']}"]
    found += [f"driver {machine['driver']}"] if machine.get("driver") else []
    changed = ", with uncommitted changes" if machine["uncommitted_changes"] else ""
    return ", ".join(found) + f"; commit `{machine['commit'][:8]}`{changed}, {machine['date']}."


def files(found: dict, root: Path) -> str:
    rows = [
        [f"`{path.relative_to(root)}`", result["machine"]["device"], result["machine"]["date"][:10],
         f"`{result['machine']['commit'][:8]}`", str(len(result["rows"]))]
        for path, result in dict(found.values()).items()
    ]  # fmt: skip
    return table(["file", "device", "date", "commit", "rows"], rows)


def throughput(result: dict) -> str:
    ceilings = {name: number(value) for name, value in result["ceilings"].items()}
    parts = [
        f"{about(result)} In the same run: copy {ceilings['copy_gb_s']} GB/s, read {ceilings['read_gb_s']} GB/s, "
        f"float32 matrix product {ceilings['float32_gflop_s']} GFLOP/s. {result['method']}\n",
        result["bytes"][0].upper() + result["bytes"][1:] + "\n",
    ]
    cases = {title: list(rows) for title, rows in groupby(result["rows"], key=group_title)}
    claimed = [title for title, rows in cases.items() if _is_claimed(rows[0])]
    parts += [_case(title, cases[title]) for title in claimed]
    parts.append("\\" + OWN_WORK + "\n")
    for title in cases:
        if title not in claimed:
            parts.append(f"<details><summary>{title}</summary>\n\n{_case(title, cases[title])}\n</details>\n")
    return "\n".join(parts)


def _is_claimed(row: dict) -> bool:
    return all(row[name] == value for name, value in CLAIM.items())


HEADS = (
    "median ms", "20–80 %", "naive ÷ it", "it ÷ ours", "GB/s", "% of copy", "% of read", "peak MB", "kept MB",
    "call ms",
)  # fmt: skip


def _case(title: str, rows: list[dict]) -> str:
    """Providers that have a time, by setting and mode; those that have none, with their reasons, once each."""
    parts = [f"**{title}**\n"]
    for (setting, mode), found in groupby(rows, key=lambda row: (row["setting"], row["mode"])):
        group = [row for row in found if "reason" not in row]
        originals = [times_original(row, group) for row in group]
        heads, lines = [f"{mode}, {setting}", *HEADS], [_cells(row) for row in group]
        if any(originals):  # results from before there were fused poolers have no such column
            heads.append("original ÷ it")
            for line, ratio in zip(lines, originals, strict=True):
                line.append("" if ratio is None else f"{ratio:.2f}×")
        parts.append(table(heads, lines))
    parts += _failures(rows)
    return "\n".join(parts) + "\n"


def _failures(rows: list[dict]) -> list[str]:
    """Who has no time and why, once each with all modes and settings."""
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            where = failed.setdefault((PROVIDERS[row["provider"]].label, row["reason"]), [])
            where.append(f"{row['mode']}, {row['setting']}")
    return [f"- No time for {name} ({'; '.join(where)}): {reason}" for (name, reason), where in failed.items()]


POOLERS = (
    "Poolers of other libraries, each beside the same one after `fuse_attention_poolers`: same parameters, outputs and "
    "gradients, in turns in one run. A fused pooler gets a time only if its outputs and all gradients are at most "
    "twice as far from its original in float64 as the original is in its own precision, or as rounding alone is (a key "
    "bias that is a parameter of its own is frozen: its gradient is zero). AttentionalPooler, with 8 heads, has as "
    "many queries and AttentionPoolLatent as many latents as there are views, the SigLIP head one probe, and "
    "AttentionPool2d one query, the mean of the patches. By block: the least and the largest ratio of the blocks in "
    "which they took turns. Peak: memory beyond what was there before; kept: what autograd keeps; original → fused."
)
MEMORY = ("peak_extra_mb", "saved_mb")


def poolers(result: dict, every_case: bool = True) -> str:
    """Original and fused poolers; of one case only, that is the claimed one, or the first if that is not there."""
    cases = [list(rows) for _, rows in groupby(result["rows"], key=group_title)]
    if not every_case:
        claimed = [rows for rows in cases if _is_claimed(rows[0])]
        cases = (claimed or cases)[:1]
    return "\n".join([f"{about(result)} {POOLERS}\n", *(_poolers_of_case(rows) for rows in cases)])


def _poolers_of_case(rows: list[dict]) -> str:
    """The pairs of which both were timed, the modes of each together; and why others were not."""
    rows = [row for row in rows if row["work"] == "own"]
    lines = []
    for row in sorted(rows, key=lambda row: list(PROVIDERS).index(row["provider"])):
        original = original_of(row, rows)
        if original is None or "reason" in row:
            continue
        ratio = original["median_ms"] / row["median_ms"]
        by_block = times_original_by_block(row, original)
        lines.append([
            f"{PROVIDERS[original['provider']].label}: {row['mode']}, {row['setting']}",
            number(original["median_ms"]), number(row["median_ms"]), f"**{ratio:.2f}×**",
            f"{min(by_block):.2f}–{max(by_block):.2f}×",
            *(f"{number(original[name])} → {number(row[name])}" if name in row else "" for name in MEMORY),
        ])  # fmt: skip
    heads = ["original ms", "fused ms", "original ÷ fused", "by block", "peak MB", "kept MB"]
    return "\n".join([table([group_title(rows[0]), *heads], lines), *_failures(rows)]) + "\n"


def _cells(row: dict) -> list[str]:
    name = label(row).replace("*", "\\*")
    return [
        f"**{name}**" if PROVIDERS[row["provider"]].ours else name, number(row["median_ms"]),
        _spread(row), _ratio(row, "ratio"), _ratio(row, "ours_ratio"),
        number(row["gb_s"]), number(row["percent_of_copy"]), number(row["percent_of_read"]),
        *(number(row[name]) if name in row else "" for name in ("peak_extra_mb", "saved_mb", "call_median_ms")),
    ]  # fmt: skip


def _ratio(row: dict, name: str) -> str:
    return f"{row[name]:.2f}×" if name in row else ""


def encoders(result: dict) -> str:
    settings = result["settings"]
    parts = [
        f"{about(result)} {settings['model']}, {settings['views']} views, served in {settings['dtype']}, trained in "
        f"{settings['train_dtype']}. {result['note']}\n",
    ]
    heads = ["per s", "median ms", "20–80 %", "p99 ms", "× CLIP", "first result s", "off by"]
    for tower, batch in sorted({(row["tower"], row["batch"]) for row in result["rows"] if row["work"] == "inference"}):
        rows = [row for row in result["rows"] if (row.get("tower"), row["batch"]) == (tower, batch)]
        parts.append(_encoder_table(f"{tower}, batch {batch}", heads, rows, _inference))
    heads = ["per s", "step ms", "20–80 %", "× CLIP", "first step s", "peak MB", "kept MB", "gradients off by"]
    for batch in sorted({row["batch"] for row in result["rows"] if row["work"] == "training"}):
        rows = [row for row in result["rows"] if (row["work"], row["batch"]) == ("training", batch)]
        parts.append(_encoder_table(f"training step, batch {batch}", heads, rows, _training))
    return "\n".join(parts)


def _encoder_table(title: str, heads: list[str], rows: list[dict], cells) -> str:
    def name(row: dict) -> str:
        backend = f", {row['backend']}" if "backend" in row else ""
        return f"**{row['model']}{backend}**" if row["model"] == "mvam" else f"{row['model']}{backend}"

    text = table([title, *heads], [[name(row), *cells(row)] for row in rows if "reason" not in row])
    failed = [f"- No time for {name(row)}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join([text, *failed])


def _inference(row: dict) -> list[str]:
    late = number(row["p99_ms"]) if "p99_ms" in row else f"{number(row['max_ms'])} (largest)"
    return [
        number(row["per_s"]), number(row["median_ms"]), _spread(row), late, _ratio(row, "times_clip"),
        number(row["first_result_s"]), f"{row['errors']['distance']:.1e}",
    ]  # fmt: skip


def _training(row: dict) -> list[str]:
    return [
        number(row["per_s"]), number(row["median_ms"]), _spread(row), _ratio(row, "times_clip"),
        number(row["first_step_s"]), number(row["peak_extra_mb"]), number(row["saved_mb"]),
        f"{row['errors']['gradients']:.1e}",
    ]  # fmt: skip


def _spread(row: dict) -> str:
    return f"{number(row['p20_ms'])}–{number(row['p80_ms'])}"


def tests(result: dict) -> str:
    """The kernels' tests on that device; a page of numbers is worth what these say."""
    outcomes = [row["outcome"] for row in result["rows"]]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))
    failed = [f"- failed: `{row['test']}`: {row['message']}" for row in result["rows"] if row["outcome"] == "failed"]
    return "\n".join([f"{about(result)} {counts}.\n", *failed])


def profile(result: dict) -> str:
    """Bytes that DRAM moved beside those of the formula."""
    heads = ["kernel", "µs", "% of DRAM", "MB by formula", "MB moved", "registers", "occupancy %"]
    rows = []
    for row in result["rows"]:
        name = f"{row['shape']} × {row['batch']}{', LayerNorm' if row['norm'] else ''}: `{row['kernel']}`"
        values = (
            row.get("duration_ns", 0) / 1e3, row.get("dram_percent", 0), row["bytes_by_formula"] / 1e6,
            row.get("bytes_measured", 0) / 1e6, row.get("registers", 0), row.get("occupancy_percent", 0),
        )  # fmt: skip
        rows.append([name, *(number(value) if value else "" for value in values)])
    return f"{about(result)} Hardware counters, by Nsight Compute; caches empty.\n\n" + table(heads, rows)


def host_cost(result: dict) -> str:
    text = (
        "What the CPU does for one call of the Triton path before the GPU has anything to do, the launch itself "
        "excluded: `benchmarks/host_cost.py`, whose driver launches nothing.\n\n"
    )
    rows = [
        [f"{row['inputs']}, {row['mode']}", *(number(row[name]) for name in ("median_us", "least_us", "most_us"))]
        for row in result["rows"]
    ]
    return f"{about(result)} {text}" + table(["call", "median µs", "least", "most"], rows)


def kernel_report(result: dict) -> str:
    chosen = _hopper(result)
    columns = ("D", "registers", "spill_bytes", "shared_bytes", "blocks_per_sm")
    heads = ["kernel", "D", "registers", "spilled bytes", "shared bytes", "blocks per multiprocessor"]
    text = f"{STATIC} bfloat16, 16 views, sm_90; {len(result['rows'])} configurations are in the file.\n\n"
    return text + table(heads, [[_kernel(row), *(str(row[name]) for name in columns)] for row in chosen])


def _hopper(result: dict) -> list[dict]:
    wanted = {"dtype": "bfloat16", "M": 16, "arch": "sm_90"}
    rows = [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]
    return [row for row in rows if "reason" not in row]


def floors(result: dict) -> str:
    widths, layouts = (512, 768, 1024), ("forward", "backward")
    chosen = [row for row in _hopper(result) if row["D"] in widths and row["kernel"] in layouts]
    rows = [[_kernel(row), str(row["D"]), f"{row['bytes'] / 1e6:,.0f}", number(row["floor_us"])] for row in chosen]
    return MODELLED.format(**result["settings"]) + "\n\n" + table(["kernel", "D", "MB", "least µs"], rows)


def _kernel(row: dict) -> str:
    return row["kernel"] + (" + LayerNorm" if row["norm"] else "")
