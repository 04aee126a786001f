"""docs/performance.md says what the results say: built again here and compared, numbers, files and pictures."""
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
report, results, schema = (importlib.import_module(name) for name in ("report", "results", "schema"))


def test_the_page_says_what_the_results_say():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(results.FOLDER, report.drawn())


def test_the_pictures_were_drawn_of_the_files_that_the_page_names():
    used = report.newest(results.FOLDER)
    paths = {key: paths for key, paths in report.drawn().items() if paths}
    assert ("throughput", "cpu") in paths
    for key, pictures in paths.items():
        for path in pictures:
            with Image.open(path) as image:
                assert image.text["Source"] == used[key][1]["seal"], path
    assert {path for pictures in paths.values() for path in pictures} == set(report.PICTURES.glob("*.png"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the results, to be tampered with."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return Path(shutil.copytree(results.FOLDER, tmp_path / "results"))


def newest(folder):
    return report.newest(folder)["throughput", "cpu"]


def test_a_result_that_was_edited_by_hand_stops_the_page(folder):
    path, content = newest(folder)
    content["rows"][0]["median_ms"] /= 2
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed after it was measured"):
        report.page(folder, {})


def test_a_result_with_another_number_is_another_page(folder):
    before = report.page(folder, {})
    path, content = newest(folder)
    content["ceilings"]["copy_gb_s"] = 123.0
    results.write(path, "throughput", content)
    assert report.page(folder, {}) != before and "copy 123 GB/s" in report.page(folder, {})


def test_only_complete_results_count_and_the_newest_wins(folder):
    path, content = newest(folder)
    later = {**content, "machine": {**content["machine"], "date": "2999-01-01T00:00:00+00:00"}}
    (folder / "later").mkdir()
    for changes, wins in (
        ({"complete": False}, False),
        ({"settings": {**content["settings"], "quick": True}}, False),
        ({}, True),
    ):
        results.write(folder / "later/throughput.json", "throughput", {**later, **changes})
        assert (newest(folder)[0].parent.name == "later") == wins


def test_gpu_results_are_pending_until_there_are_some(folder):
    if any(kind == "cuda" for _, kind in report.newest(folder)):
        pytest.skip("there are some")
    assert "Pending: no complete throughput result of a CUDA GPU" in report.page(folder, {})
    path, content = newest(folder)
    machine = {**content["machine"], "kind": "cuda", "driver": "1.2", "device": "A GPU"}
    results.write(path, "throughput", {**content, "machine": machine})
    page = report.page(folder, {})
    assert "Pending" not in page and "A GPU" in page and "driver 1.2" in page


def test_every_section_names_its_file(folder):
    page = report.page(folder, {})
    for path, result in report.newest(folder).values():
        assert page.count(f"From [`{path.relative_to(report.ROOT)}`]") >= 1, result["kind"]
