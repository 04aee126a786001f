"""Hardware counters of the kernels by Nsight Compute: bytes that DRAM really moved, throughput, occupancy, registers.

    python benchmarks/ncu.py --out FOLDER [--resume]

Needs `ncu` on the PATH and the right to read the counters. Clocks are left as they are (--clock-control none); ncu
empties the caches before each of its passes. FOLDER gets profile.json, written after every case. The parser is tested
on ncu's format; the whole has not yet been run on a GPU.
"""
from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import results  # noqa: E402
from machine import machine  # noqa: E402

CASES = [("vit-b-16",), ("vit-b-16", "--norm"), ("vit-l-14-336",), ("vit-l-14-336", "--norm")]
METRICS = {  # ncu's name: ours, and the unit it must come in where there are several
    "dram__bytes_read.sum": ("dram_read_bytes", "byte"),
    "dram__bytes_write.sum": ("dram_written_bytes", "byte"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram_percent", None),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("sm_percent", None),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy_percent", None),
    "launch__registers_per_thread": ("registers", None),
    "launch__shared_mem_per_block_dynamic": ("shared_bytes", "byte/block"),
    "gpu__time_duration.sum": ("duration_ns", "ns"),
}
UNITS = {"nsecond": "ns"}  # as older versions say it


def command_of(case: tuple[str, ...], log: Path) -> list[str]:
    return [
        "ncu", "--csv", "--page", "details", "--print-units", "base", "--log-file", str(log), "--force-overwrite",
        "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", "regex:pool_.*",
        "--metrics", ",".join(METRICS), sys.executable, str(Path(__file__).with_name("ncu_target.py")), *case,
    ]  # fmt: skip


def launches(text: str) -> list[dict]:
    """Kernel, grid and metrics of each launch, in order, from ncu's details page: a line per launch and metric."""
    found: dict[str, dict] = {}
    lines = [line for line in text.splitlines() if line.startswith('"')]  # the others are ncu's own words
    for line in csv.DictReader(lines):
        launch = found.setdefault(line["ID"], {"kernel": line["Kernel Name"], "grid": line["Grid Size"]})
        if line["Metric Name"] not in METRICS or "n/a" in line["Metric Value"]:
            continue
        name, unit = METRICS[line["Metric Name"]]
        told = UNITS.get(line["Metric Unit"], line["Metric Unit"])
        if unit not in (None, told):
            raise ValueError(f"ncu gives {line['Metric Name']} in {told!r}; {unit!r} is needed")
        launch[name] = float(line["Metric Value"].replace(",", ""))
    return list(found.values())


def rows_of(text: str, about: dict) -> list[dict]:
    """A row for each launch, with the bytes of the formula beside those that were measured."""
    rows = []
    for launch in launches(text):
        direction = "backward" if "backward" in launch["kernel"] else "forward"
        row = {**about["case"], **launch, "bytes_by_formula": about["bytes_by_formula"][direction]}
        if {"dram_read_bytes", "dram_written_bytes"} <= launch.keys():
            row["bytes_measured"] = launch["dram_read_bytes"] + launch["dram_written_bytes"]
        rows.append(row)
    return rows


def measure(case: tuple[str, ...], log: Path) -> list[dict]:
    """The rows of a case; RuntimeError with what ncu says where it cannot count."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "LC_ALL": "C"}  # other locales write other signs between the digits
    done = subprocess.run(command_of(case, log), capture_output=True, text=True, env=environment)
    said = log.read_text() if log.exists() else ""
    about = [line for line in done.stdout.splitlines() if line.startswith('{"case"')]
    rows = rows_of(said, json.loads(about[-1])) if about else []
    if done.returncode or not rows:
        lines = (said + done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if line.startswith("==ERROR==") or "Error: " in line]
        raise RuntimeError(f"ncu, exit code {done.returncode}: {' '.join(errors[:3]) or 'no launch was counted'}")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--resume", action="store_true", help="keep the cases that an earlier run into --out finished")
    options = parser.parse_args(arguments)
    if shutil.which("ncu") is None:
        sys.exit("ncu (Nsight Compute) is not on the PATH")
    path = options.out / "profile.json"
    result = {"machine": machine(torch.device("cuda")), "settings": {"metrics": list(METRICS)}, "rows": []}
    if options.resume and path.exists():
        result["rows"] = results.resumed(path, "profile", result)["rows"]
    done = {(row["shape"], *(("--norm",) if row["norm"] else ())) for row in result["rows"]}
    for case in tqdm([case for case in CASES if case not in done], unit="case", file=sys.stderr):
        try:
            result["rows"] += measure(case, options.out / "logs" / f"ncu-{'-'.join(case).replace('---', '-')}.csv")
        except RuntimeError as error:
            sys.exit(str(error))
        complete = len({(row["shape"], row["norm"]) for row in result["rows"]}) == len(CASES)
        results.write(path, "profile", {**result, "complete": complete})
    for row in result["rows"]:
        print(f"{row['shape']:14}{'norm' if row['norm'] else '':5}{row['kernel']:22}"
              f"{row.get('duration_ns', 0) / 1e3:10.1f} us{row.get('dram_percent', 0):6.1f} % of DRAM, "
              f"{row.get('bytes_measured', 0) / row['bytes_by_formula']:.3f} of the formula's bytes")  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
