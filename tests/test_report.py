"""The report: what it holds, and that the page needs nothing beside it."""
import re

import pytest

from mvam_fast.retrieval.demo import verdict
from mvam_fast.retrieval.report import build_report
from mvam_fast.retrieval.scenes import make_scenes

METRICS = {f"{d}_r{k}": 10.0 * k for d in ("i2t", "t2i") for k in (1, 5, 10)}
METRICS |= {"rsum": 320.0, "i2t_median_rank": 3.0, "t2i_median_rank": 4.0}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with the picture that the pages here show."""
    folder = tmp_path_factory.mktemp("report")
    make_scenes(folder / "scenes", train=4, val=4, test=4, progress=False)
    return folder


def report(**changes):
    run = {"settings": {"lr": 0.001, "views": 8}, "metrics": METRICS, "train_seconds": 70.0, "parameters": 5000000}
    row = {"shape": "s", "batch": 1, "mode": "forward", "setting": "eager"}
    return {
        "title": "A <title>", "created": "2026-01-01", "sentence": "It & works.",
        "data": {"counts": {"train": 4}, "preview": "scenes/preview.png"},
        "runs": {
            "baseline": {**run, "label": "single"},
            "mvam": {**run, "label": "many", "metrics": {**METRICS, "rsum": 400.0}},
        },
        "oracle": METRICS, "figures": [{"file": "scenes/preview.png", "title": "T", "caption": "<b>"}],
        "export": {"parity": {"image": {"1": {"max_abs": 1e-7, "cosine": 1.0, "top5": True}}}, "check": "Same five."},
        "throughput": {
            "bytes": "least traffic", "plot": "scenes/preview.png",
            "rows": [
                {**row, "provider": "naive", "median_ms": 1.0, "ratio": 1.0, "gb_s": 2.0},
                {**row, "provider": "triton", "reason": "needs a GPU"},
            ],
        },
        "seconds": {"training": 71.2}, "machine": {"cores": 2}, **changes,
    }  # fmt: skip


def test_report_is_one_page_that_needs_nothing_else(out):
    path = build_report(report(), out)
    page = path.read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "A &lt;title&gt;" in page and "It &amp; works." in page and "<figcaption><b>T.</b> &lt;b&gt;" in page
    assert "+80.0" in page and "needs a GPU" in page and "Same five." in page and "perfect reader" in page
    assert (out / "report.json").exists()


def test_report_says_what_is_missing(out):
    page = build_report(report(export=None, throughput=None, oracle=None), out).read_text()
    assert "Not part of this run." in page and "Not measured in this run" in page and "perfect reader" not in page


def test_the_verdict_follows_the_numbers():
    assert verdict(114.3).startswith("MVAM gains 114 RSUM points")
    assert verdict(20.0).startswith("This run does not show the claim: MVAM's RSUM is +20")
    assert "-5" in verdict(-5.0)
