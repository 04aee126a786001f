"""How work is laid out, and where the rows of the launch table come from."""
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from mvam_fast.kernels import launch_table, schedule, tiles  # noqa: E402

from mvam_fast.functional import multi_view_pool  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.mark.parametrize(
    ("batch", "length", "at_once", "expected"),
    [
        (1, 577, 264, (8, 80)),  # 37 tiles: as many splits as leave four tiles each, then no split is empty
        (1, 197, 264, (3, 80)),
        (100, 577, 264, (2, 304)),  # two programs per sample fill the multiprocessors
        (133, 577, 264, (1, 592)),  # more samples than that: none
        (1, 77, 264, (1, 80)),
        (1, 1, 264, (1, 16)),
        (0, 197, 264, (1, 208)),
    ],
)
def test_splits(batch, length, at_once, expected):
    splits, span = schedule.splits_of(batch, length, 16, at_once)
    assert (splits, span) == expected
    assert (splits - 1) * span < length <= splits * span


def test_short_samples_share_programs_and_the_grid_has_room_for_any_batch():
    def tokens(batch, length):
        return torch.empty(batch, length, 1, device="meta")

    at_once = schedule.slots(torch.device("cpu"))
    assert schedule.forward(tokens(1000, 77), 16, False).persistent
    assert not schedule.forward(tokens(1000, 77), 16, True).persistent  # each program holds one sample's codes
    assert not schedule.forward(tokens(1000, 129), 16, False).persistent
    assert not schedule.forward(tokens(at_once, 77), 16, False).persistent
    plan = schedule.forward(tokens(70_000, 50), 16, False)
    assert plan.programs * schedule.MOST_SAMPLES >= 70_000
    for make in (schedule.forward, schedule.backward):  # samples lie on the axis that takes 2^31 blocks, splits do not
        plan = make(tokens(70_000, 577), 16, True)
        assert plan.programs == 70_000 and plan.splits == 1


def test_views_beyond_32_are_shared_out_forward_only():
    for kernel, width, views, groups in (
        ("forward", 768, 64, 2), ("forward", 768, 32, 1), ("forward", 2048, 64, 4), ("forward", 64, 3, 1),
        ("backward", 128, 64, 1),
    ):  # fmt: skip
        tile = tiles.tile_for(kernel, (9, 0), torch.bfloat16, width, None, views)
        assert tile.groups(views) == groups


def test_every_family_has_a_row_for_everything():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None):
        for kernel in tiles.KERNELS:
            for dtype in tiles.DTYPES:
                for views in (1, 16, 17, 64):
                    for norm in (False, True):
                        tile = tiles.tile_for(kernel, capability, dtype, 2048, None, views, norm)
                        assert tile.num_warps in (4, 8, 16) and 1 <= tile.num_stages <= 4


def measured(tmp_path, device):
    row = {"kernel": "forward", "norm": False, "dtype": "float32", "D": 64, "views": 4}
    table = {"device": device, "rows": [{**row, "num_warps": 2, "num_stages": 4, "maxnreg": 64}]}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    return str(path)


def test_a_measured_table_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.setenv("MVAM_LAUNCH_TABLE", measured(tmp_path, launch_table.device_name()))
    found = launch_table.row("forward", (9, 0), torch.float32, 64, 4, False)
    assert found == launch_table.Row(2, 4, 64)
    assert launch_table.row("backward", (9, 0), torch.float32, 64, 16, False).num_warps == 4


def test_a_table_of_another_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MVAM_LAUNCH_TABLE", measured(tmp_path, "another GPU"))
    with pytest.raises(ValueError, match="MVAM_LAUNCH_TABLE=.* was measured on another GPU, this is .*; tune again"):
        launch_table.row("forward", (9, 0), torch.float32, 64, 4, False)


def test_tuner_writes_a_table_that_is_used_and_goes_on_where_it_stopped(tmp_path, monkeypatch, device):
    import tune

    monkeypatch.setattr(tune, "LENGTH", 20)
    monkeypatch.setattr(tune, "CANDIDATES", [launch_table.Row(2, 2), launch_table.Row(3, 3)])  # 3 warps cannot be
    path = tmp_path / "table.json"
    arguments = ["--out", str(path), "--widths", "64", "--views", "4", "--dtypes", "float32", "--seconds", "0"]
    tune.main(arguments)
    table = json.loads(path.read_text())
    assert [row["kernel"] for row in table["rows"]] == ["forward", "backward"]
    for row in table["rows"]:
        own, two, three = row["tried"]
        assert own["median_ms"] > 0 and two["median_ms"] > 0
        assert three["median_ms"] is None and three["reason"]
        assert row["num_warps"] in (2, 4)
    tune.main(arguments)
    assert json.loads(path.read_text()) == table

    monkeypatch.setenv("MVAM_LAUNCH_TABLE", str(path))
    tiles.forget()
    tile = tiles.choose("forward", torch.empty(1, 5, 64, device=device), 4, None)
    assert tile.num_warps == table["rows"][0]["num_warps"]
    multi_view_pool(torch.randn(2, 5, 64, device=device), torch.randn(4, 64, device=device), backend="triton")
    tiles.forget()
