"""The kernels compiled ahead of time for three architectures: what a GPU would load exists, fits and does not spill."""
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys, torch
from mvam_fast.kernels import aot, tiles
for line in sys.stdin:
    kernel, capability, dtype, views, width, key_width, masking, norm = json.loads(line)
    dtype = getattr(torch, dtype)
    found = aot.compile_kernel(kernel, capability, dtype, views, width, key_width, masking=masking, norm=norm)
    tile = tiles.tile_for(kernel, (capability // 10, capability % 10), dtype, width, key_width, views, norm)
    print(json.dumps({**found._asdict(), "bound": tiles.shared_bytes(tile, width, key_width),
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
        (kernel, capability, "bfloat16" if width % 256 else "float16", 16, width, None, masking, norm)
        for width in WIDTHS
        for kernel in ("forward", "backward")
        for masking, norm in (((0, False), (2, False), (0, True)) if width in (512, 768) else ((1, False), (1, True)))
    ]
    for configuration, found in zip(configurations, compile_all(configurations), strict=True):
        # Two places are known to keep 8 bytes: the backward at D = 1024, and the masked forward at D = 768 on sm_80.
        # With the LayerNorm fused up to 40 bytes, and a backward that is not pipelined from D = 1024 on.
        kernel, width, norm = configuration[0], configuration[4], configuration[-1]
        allowed = 40 if norm else 8 if (kernel, width) in {("backward", 1024), ("forward", 768)} else 0
        assert found["spill_bytes"] <= allowed, configuration
        assert found["shared_bytes"] <= found["bound"] <= found["limit"], configuration
        assert found["blocks_per_sm"] >= 1, configuration
        instructions = found["instructions"]
        assert any(name.startswith("HMMA") for name in instructions), configuration
        pipelined = any(name.startswith("LDGSTS") for name in instructions)
        assert pipelined or (norm and kernel == "backward" and width >= 1024), configuration
        assert not GLOBAL_ATOMICS & set(map(family, instructions)), configuration


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
    ]
    for configuration, found in zip(configurations, compile_all(configurations), strict=True):
        assert found["shared_bytes"] <= found["bound"] <= found["limit"], configuration
        assert found["blocks_per_sm"] >= 1, configuration
        assert not GLOBAL_ATOMICS & set(map(family, found["instructions"])), configuration


def test_kernel_report_has_a_row_for_every_configuration(tmp_path):
    script = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "kernel_report.py")
    command = [sys.executable, script, "--arch", "80", "--dtypes", "bfloat16", "--widths", "384", "1280"]
    command += ["--views", "16", "64", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(rows) == 8 == done.stdout.count("sm_80")
    for row in rows:
        assert {"kernel", "arch", "dtype", "D", "M"} <= set(row)
        if row["D"] == 1280 and row["M"] == 64:
            assert "shared memory" in row["reason"]
        elif "reason" not in row:
            assert row["spill_bytes"] >= 0 and row["registers"] > 0 and row["bytes"] > 0
    forward = next(row for row in rows if (row["kernel"], row["D"], row["M"]) == ("forward", 384, 16))
    # 1,024 samples of 197 tokens: X, C, P in two bytes; G and lse in four.
    by_hand = 2 * (1024 * 197 * 384 + 16 * 384 + 1024 * 16 * 384) + 4 * 1024 * (16 * 16 + 16)
    assert forward["bytes"] == by_hand
