"""The kernels compiled ahead of time for three architectures: what a GPU would load exists, fits and does not spill."""
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from mvam_fast.kernels import launch_table  # noqa: E402

SCRIPT = """
import json, sys, torch
from mvam_fast.kernels import aot, tiles
for line in sys.stdin:
    kernel, capability, dtype, views, width, key_width, masking, norm, *persistent = json.loads(line)
    dtype = getattr(torch, dtype)
    options = {"masking": masking, "norm": norm, "persistent": bool(persistent)}
    found = aot.compile_kernel(kernel, capability, dtype, views, width, key_width, **options)
    tile = tiles.tile_for(kernel, (capability // 10, capability % 10), dtype, width, key_width, views, norm)
    print(json.dumps({**found._asdict(), "stages": tile.num_stages, "bound": tiles.shared_bytes(tile, width, key_width),
                      "limit": tiles.shared_limit((capability // 10, capability % 10))}), flush=True)
"""


def compile_all(configurations):
    """In a process of its own: this one may have chosen the interpreter, which cannot be undone."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    lines = "\n".join(json.dumps(c) for c in configurations)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# ATOMS, in shared memory, is how Blackwell allocates its tensor memory.
GLOBAL_ATOMICS = {"ATOM", "ATOMG", "RED"}


def family(instruction):
    return instruction.split(".")[0]


WIDTHS = (384, 512, 640, 768, 1024, 1152, 1280)


@pytest.mark.parametrize("capability", [80, 90, 100], ids="sm_{}".format)
def test_half_precision_up_to_16_views_does_not_spill(capability):
    configurations = [
        (kernel, capability, "bfloat16" if width % 256 else "float16", 16, width, None, *rest)
        for width in WIDTHS
        for kernel, *rest in (
            ("forward", 0, False), ("forward", 2, False), ("forward", 0, True), ("forward", 1, False, "persistent"),
            ("forward", 2, True, "persistent"), ("backward", 0, False), ("backward", 2, False), ("backward", 1, True),
        )
    ]  # fmt: skip
    spilled = {}
    for configuration, found in zip(configurations, compile_all(configurations), strict=True):
        kernel, width, norm = configuration[0], configuration[4], configuration[7]
        if found["spill_bytes"] > launch_table.SPILLS.get((kernel, norm, width), 0):
            spilled[configuration] = found["spill_bytes"]
        assert found["shared_bytes"] <= found["bound"] <= found["limit"], configuration
        assert found["blocks_per_sm"] >= 1, configuration
        instructions = found["instructions"]
        assert any(name.startswith("HMMA") for name in instructions), configuration
        assert any(name.startswith("LDGSTS") for name in instructions) == (found["stages"] > 1), configuration
        assert not GLOBAL_ATOMICS & set(map(family, instructions)), configuration
    assert not spilled


def test_persistent_forward_loads_across_samples():
    """Copies of later tiles are under way while one is computed: the loop's wait leaves some outstanding."""
    script = """
import re, torch
from mvam_fast.kernels import aot
aot._resources = lambda compiled, *_: compiled.asm["ttgir"]
for masking in (0, 1):
    text = aot.compile_kernel("forward", 90, torch.bfloat16, 16, 768, masking=masking, persistent=True)
    print(max(int(n) for n in re.findall(r"async_wait .*num = (\\d+)", text)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(line) for line in done.stdout.split()] == [3, 3]  # the three chunks of one tile


@pytest.mark.parametrize("capability", [80, 90, 100], ids="sm_{}".format)
def test_every_kind_of_configuration_compiles_within_its_bound(capability):
    configurations = [
        ("forward", capability, "float32", 16, 768, None, 0, False),
        ("forward", capability, "float32", 1, 1536, None, 1, False),
        ("forward", capability, "bfloat16", 33, 512, None, 0, False),
        ("forward", capability, "bfloat16", 3, 123, None, 2, False),
        ("forward", capability, "float16", 16, 2048, None, 0, False),
        ("forward", capability, "bfloat16", 64, 384, 64, 1, False),
        ("backward", capability, "float32", 16, 384, None, 0, False),
        ("backward", capability, "float32", 5, 96, 40, 2, False),
        ("backward", capability, "bfloat16", 33, 128, None, 1, False),
        ("backward", capability, "bfloat16", 1, 123, None, 2, False),
        ("backward", capability, "float16", 16, 768, 384, 2, False),
        ("forward", capability, "float32", 16, 384, None, 2, True),
        ("backward", capability, "float32", 8, 123, None, 1, True),
        ("forward", capability, "bfloat16", 33, 384, None, 1, True),
        ("forward", capability, "bfloat16", 64, 1280, None, 1, False, "persistent"),
        ("forward", capability, "float16", 16, 512, 384, 2, False, "persistent"),
    ]
    for configuration, found in zip(configurations, compile_all(configurations), strict=True):
        assert found["shared_bytes"] <= found["bound"] <= found["limit"], configuration
        assert found["blocks_per_sm"] >= 1, configuration
        assert not GLOBAL_ATOMICS & set(map(family, found["instructions"])), configuration


def test_kernel_report_has_a_row_for_every_configuration(tmp_path):
    script = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "kernel_report.py")
    command = [sys.executable, script, "--arch", "80", "--dtypes", "bfloat16", "--widths", "384", "1280"]
    command += ["--views", "16", "64", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "kernel_report.json").read_text())["rows"]
    # Two widths: forward and backward at two numbers of views, the persistent forward at one; each also with a norm.
    assert len(rows) == 2 * (2 * 2 * 2 + 2) == done.stdout.count("sm_80")
    for row in rows:
        assert {"kernel", "arch", "dtype", "D", "M"} <= set(row)
        if (row["kernel"], row["D"], row["M"]) == ("backward", 1280, 64):
            assert "shared memory" in row["reason"]
        elif "reason" not in row:
            assert row["spill_bytes"] >= 0 and row["registers"] > 0 and row["bytes"] > 0
    names = ("kernel", "norm", "D", "M")
    forward = next(row for row in rows if [row[name] for name in names] == ["forward", False, 384, 16])
    # 1,024 samples of 197 tokens: X, C, P in two bytes; G and lse in four.
    by_hand = 2 * (1024 * 197 * 384 + 16 * 384 + 1024 * 16 * 384) + 4 * 1024 * (16 * 16 + 16)
    assert forward["bytes"] == by_hand
