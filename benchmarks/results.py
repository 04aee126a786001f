"""Result files: sealed when written, checked when read, so that a number that was typed by hand is found out.

A file is JSON: kind, format, machine, settings, complete, rows (one line each) and a seal, the SHA-256 of the rest.
Times are kept as every repetition, in the blocks they were measured in; the statistics beside them must follow.
"""
from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from pathlib import Path

from timing import summary

from mvam_fast.files import read_json, write_text

FORMAT = 1
# The facts that a run which is gone on with must share.
SAME = ("device", "driver", "source_sha256", "torch", "packages", "threads")
FOLDER = Path(__file__).parent / "results"


def folder_of(machine: dict) -> Path:
    """Where a result of this machine is kept: results/DATE_DEVICE_COMMIT."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return FOLDER / f"{machine['date'][:10]}_{device}_{machine['commit'][:8].replace(' ', '-')}"


def write(path: Path, kind: str, result: dict) -> None:
    """Writes `result` (machine, settings, complete, rows, and what else there is) atomically, with its seal."""
    result = {"kind": kind, "format": FORMAT, **{k: v for k, v in result.items() if k not in ("kind", "format")}}
    result = json.loads(json.dumps(result))  # as it will be read: tuples are lists, keys are strings
    head = {name: value for name, value in result.items() if name not in ("rows", "seal")} | {"seal": _seal(result)}
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    write_text(path, json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')


def read(path: Path, kind: str | None = None) -> dict:
    """The content of a result file; ValueError that says what is wrong with one that is damaged or edited."""
    result = read_json(path, "results")
    if not isinstance(result, dict) or result.get("format") != FORMAT or "rows" not in result:
        raise ValueError(f"results: {path} is no result file of format {FORMAT}")
    if kind is not None and result["kind"] != kind:
        raise ValueError(f"results: {path} holds {result['kind']!r}; {kind!r} is needed")
    if result.get("seal") != _seal(result):
        raise ValueError(f"results: {path} was changed after it was measured: its seal does not fit its content")
    for index, row in enumerate(result["rows"]):
        _check_statistics(row, f"results: {path}, row {index}")
    return result


def resumed(path: Path, kind: str, now: dict) -> dict:
    """The earlier run that `now` (machine, settings) goes on with; exits with what differs between them."""
    before = read(path, kind)
    for part, names in (("machine", SAME), ("settings", now["settings"])):
        for name in names:
            earlier, present = before[part].get(name), now[part].get(name)
            if earlier != present:
                sys.exit(f"--resume: {name} was {earlier}, now it is {present}; name another --out")
    return before


def _check_statistics(row: dict, where: str) -> None:
    """Every NAME_blocks_ms has its statistics beside it, and they are those of its repetitions."""
    for name in [name for name in row if name.endswith("blocks_ms")]:
        prefix = name.removesuffix("blocks_ms")
        for statistic, value in summary([time for block in row[name] for time in block]).items():
            if not math.isclose(row.get(prefix + statistic, math.nan), value, rel_tol=1e-9):
                raise ValueError(f"{where}: {prefix + statistic} does not follow from the repetitions")


def _seal(result: dict) -> str:
    content = {name: value for name, value in result.items() if name != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
