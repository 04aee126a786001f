"""The ablation: cells can be trained, earlier rows are reused only where they fit, the page says what the rows say."""
import importlib
import json
import random
import sys
from pathlib import Path
from statistics import mean

import pytest

from mvam_fast import create_model_and_transforms
from mvam_fast.files import write_json
from mvam_fast.retrieval.training.config import TrainConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def cells(on_path):
    return importlib.import_module("ablation_cells")


@pytest.fixture(scope="module")
def ablation(on_path):
    return importlib.import_module("ablation")


@pytest.fixture(scope="module")
def page(on_path):
    return importlib.import_module("ablation_page")


def made_up_row(cell, seed, draw):
    recalls = {f"{way}_r{k}": draw.uniform(5, 90) for way in ("i2t", "t2i") for k in (1, 5, 10)}
    views = {"mean_cosine": draw.random(), "mean_entropy": draw.random(), "dead": []}
    return {
        "settings": cell.settings, "data": cell.data, "seed": seed, "parameters": 5_000_000, "embedding_width": 256,
        "validation": {**recalls, "rsum": sum(recalls.values())}, "test": {**recalls, "rsum": sum(recalls.values())},
        "views": {"image": views, "text": views}, "train_seconds": 1.0, "warnings": [],
    }  # fmt: skip


@pytest.fixture
def result(cells):
    """Of all trainings, with numbers that mean nothing."""
    draw = random.Random(0)
    rows = {
        (cells.folder_name(cell.settings), cell.data, 0): made_up_row(cell, 0, draw) for cell in cells.TUNING.values()
    }
    for group in cells.groups(cells.rates_of(list(rows.values()))).values():
        for cell in group.cells:
            for seed in group.seeds:
                key = cells.folder_name(cell.settings), cell.data, seed
                rows.setdefault(key, made_up_row(cell, seed, draw))
    machine = {"device": "made up", "cores": 2, "torch": "2.11", "date": "2026-11-24T00:00:00+00:00"}
    return {"machine": machine, "base": cells.BASE, "oracle": {"rsum": 470.0}, "rows": list(rows.values())}


def test_every_cell_is_a_training_of_its_own(cells):
    found = {}
    for group in cells.groups({name: 1e-3 for name in cells.POOLINGS}).values():
        assert group.reference in [cell.label for cell in group.cells]
        assert len({cell.label for cell in group.cells}) == len(group.cells)
        for cell in group.cells:
            config = TrainConfig(data="d.json", images="i", out="o", **{**cells.BASE, **cell.settings})
            config.check()
            assert cell.data in cells.DATA
            same = found.setdefault((cells.folder_name(cell.settings), cell.data), config)
            assert same == config  # groups share trainings, and nothing else


def test_every_pooling_makes_256_numbers(cells):
    for changes in cells.POOLINGS.values():
        settings = {**cells.BASE, **changes}
        model, _, _ = create_model_and_transforms(
            settings["model"], None, settings["views"], global_view=settings.get("global_view", False),
            embed_dim=settings["embed_dim"],
        )  # fmt: skip
        assert model.embedding_width(settings["embed_dim"]) == 256


def test_the_best_rate_is_that_of_the_validation_split(cells, result):
    for row in result["rows"]:
        row["validation"]["rsum"] = 600.0 if row["settings"].get("lr") == 5e-4 and row["seed"] == 0 else 100.0
        row["test"]["rsum"] = 700 - row["validation"]["rsum"]
    assert set(cells.rates_of(result["rows"]).values()) == {5e-4}


def test_multiply_adds(page):
    """By hand, of 17 and 24 tokens of 96 numbers."""
    assert page.multiply_adds({"views": 0, "global_view": True, "embed_dim": 256}) == 2 * 96 * 256 / 1e6
    views = sum(2 * 8 * tokens * 96 for tokens in (17, 24)) + 2 * 8 * 96 * 32
    assert page.multiply_adds({}) == views / 1e6
    assert page.multiply_adds({"scoring": "projected"}) == (views + 2 * 8 * 96 * 96) / 1e6
    assert page.multiply_adds({"scoring": "additive"}) == (views + (17 + 24) * 96 * 96) / 1e6
    wide = sum(2 * 8 * tokens * 96 for tokens in (17, 24)) + 2 * 8 * (96 * 96 + 96 * 32)
    assert page.multiply_adds({"embed_dim": 96, "view_dim": 32}) == wide / 1e6


def test_differences_are_taken_seed_by_seed(page, cells):
    def of(*values):
        return page.Measured(cells.Cell("", {}), [{"test": {"rsum": value}} for value in values])

    assert page.against(of(110, 120, 130), of(100, 105, 90)) == "+21.7 (+10.0 to +40.0) **apart**"
    assert page.against(of(110, 95, 130), of(100, 105, 90)) == "+13.3 (-10.0 to +40.0)"
    assert page.against(of(80, 70, 60), of(100, 105, 90)).endswith("**apart**")


def test_the_page_is_built_from_all_groups(page, cells, result, tmp_path):
    write_json(tmp_path / "ablation.json", result)
    (tmp_path / "page.md").write_text("text\n<!-- measured: begin -->\n<!-- measured: end -->\nmore\n")
    written = page.build(tmp_path / "ablation.json", tmp_path / "page.md")
    groups = cells.groups(cells.rates_of(result["rows"]))
    assert {path.name for path in written} == {"page.md", "rates.png", *(f"{name}.png" for name in groups)}
    assert all(path.stat().st_size > 1000 for path in written)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("text\n") and text.endswith("\nmore\n") and "Not yet trained" not in text
    for group in groups.values():
        assert f"### {group.title}" in text and all(f"| {cell.label} |" in text for cell in group.cells)


def test_cells_that_lack_a_seed_are_named_and_not_shown(page, cells, result):
    def without(cell):
        rows = [row for row in result["rows"] if row["settings"] != cell.settings or row["seed"] != 2]
        return {**result, "rows": rows}

    group = cells.groups(cells.rates_of(result["rows"]))["views"]
    text = page.section(without(group.cells[-1])).split(f"### {group.title}")[1].split("###")[0]
    assert text.rstrip().endswith("--groups views'`): 32, 1024.") and "| 32, 1024 |" not in text
    assert "| 16, 512 |" in text and "views.png" in text
    reference = next(cell for cell in group.cells if cell.label == group.reference)
    text = page.section(without(reference)).split(f"### {group.title}")[1].split("###")[0]
    assert "|" not in text and "views.png" not in text and all(cell.label in text for cell in group.cells)


def test_rows_of_another_recipe_are_refused(ablation, result, tmp_path):
    path = tmp_path / "ablation.json"
    assert ablation.load_rows(path, fresh=False) == {}
    write_json(path, result)
    assert len(ablation.load_rows(path, fresh=False)) == len(result["rows"])
    write_json(path, {**result, "base": {**result["base"], "steps": 500}})
    with pytest.raises(ValueError, match=r"measured with another recipe \(steps\); pass --fresh"):
        ablation.load_rows(path, fresh=False)
    assert ablation.load_rows(path, fresh=True) == {}


def test_the_committed_page_says_what_the_committed_rows_say(ablation, page):
    inserts = importlib.import_module("inserts")
    committed = json.loads(ablation.RESULT.read_text())
    assert inserts.between(page.PAGE) == page.section(committed).strip("\n")
    for name in page.pictures(committed):
        assert ablation.RESULT.with_name(name).is_file()


def test_the_readme_says_what_the_committed_rows_say(ablation, page):
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    shown = page.shown(json.loads(ablation.RESULT.read_text()))
    for cell in [*shown["pooling"], *shown["longer"]]:
        rsum = cell.test("rsum")
        assert f"{mean(rsum):.1f} ({min(rsum):.1f} to {max(rsum):.1f})" in readme, cell.cell.label
