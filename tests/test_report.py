"""Pictures and the report: what they hold, and that the page needs nothing beside it."""
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mvam_fast import create_model_and_transforms, get_tokenizer
from mvam_fast.retrieval import figures
from mvam_fast.retrieval.demo import verdict
from mvam_fast.retrieval.report import build_report
from mvam_fast.retrieval.scenes import make_scenes

METRICS = {f"{d}_r{k}": 10.0 * k for d in ("i2t", "t2i") for k in (1, 5, 10)}
METRICS |= {"rsum": 320.0, "i2t_median_rank": 3.0, "t2i_median_rank": 4.0}


def test_pieces_are_merged_into_words():
    tokenizer = get_tokenizer("scenes-ViT-T-16")
    text = "a xylotile circle, unfathomableness!"
    ids = tokenizer([text])[0]
    length = int(ids.argmax()) + 1
    attention = torch.rand(3, 24)
    attention[:, length:] = 0
    words, merged = figures.words_and_attention(tokenizer, text, attention)
    assert words == ["⟨start⟩", "a", "xylotile", "circle", ",", "unfathomableness", "!", "⟨end⟩"]
    torch.testing.assert_close(merged.sum(1), attention.sum(1))
    torch.testing.assert_close(merged[:, [0, 1, -1]], attention[:, [0, 1, length - 1]])
    pieces = [i for i, t in enumerate(ids[:length].tolist()) if tokenizer.decoder[t].removesuffix("</w>") in "xylotile"]
    torch.testing.assert_close(merged[:, 2], attention[:, [p for p in pieces if 1 < p < 6]].sum(1))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pictures of two untrained models on a few scenes."""
    out = tmp_path_factory.mktemp("drawn")
    data = make_scenes(out / "scenes", train=4, val=4, test=12, progress=False)
    for name, arguments in (("mvam", {"num_views": 3}), ("baseline", {"num_views": 0, "global_view": True})):
        create_model_and_transforms("scenes-ViT-T-16", **arguments)[0].save_pretrained(out / name)
    found = figures.visualize(
        out / "mvam", data, data.parent / "images", out, baseline=out / "baseline", count=2, progress=False
    )
    return out, data, found


def test_visualize_draws_what_it_says(drawn):
    out, data, found = drawn
    assert [f["file"] for f in found] == ["figures/top5.png", "figures/attention-0.png", "figures/attention-1.png"]
    assert "baseline beside MVAM" in found[0]["caption"] and "at random" in found[0]["caption"]
    for figure in found:
        pixels = np.asarray(Image.open(out / figure["file"]).convert("L"))
        assert pixels.shape[0] > 200 and pixels.std() > 10  # something is drawn
    with pytest.raises(ValueError, match="count is 13; it must be 1 to 12"):
        figures.visualize(out / "mvam", data, data.parent / "images", out, count=13)


def test_attention_is_drawn_where_it_is(tmp_path):
    """All attention on one patch of a white image: that patch is white, the others are dark."""
    attention = torch.zeros(1, 17)
    attention[0, 1 + 4 * 2 + 3] = 1  # row 2, column 3 of a 4 × 4 grid after the class token
    white = Image.new("RGB", (64, 64), "white")
    path = tmp_path / "a.png"
    figures.attention_figure(white, ["a", "b"], attention, torch.tensor([[0.3, 0.7]]), (4, 4), 1, path, "title")
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)
    dark = np.argwhere(np.abs(pixels - int(0.18 * 255)) <= 1)  # where the image is but no light
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    rows, columns = np.linspace(top, bottom, 9).astype(int)[1::2], np.linspace(left, right, 9).astype(int)[1::2]
    lit = pixels[np.ix_(rows, columns)] > 200
    assert lit.tolist() == [[(r, c) == (2, 3) for c in range(4)] for r in range(4)]


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


def test_report_is_one_page_that_needs_nothing_else(drawn):
    out = drawn[0]
    path = build_report(report(), out)
    page = path.read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "A &lt;title&gt;" in page and "It &amp; works." in page and "<figcaption><b>T.</b> &lt;b&gt;" in page
    assert "+80.0" in page and "needs a GPU" in page and "Same five." in page and "perfect reader" in page
    assert (out / "report.json").exists()


def test_report_says_what_is_missing(drawn):
    page = build_report(report(export=None, throughput=None, oracle=None), drawn[0]).read_text()
    assert "Not part of this run." in page and "Not measured in this run" in page and "perfect reader" not in page


def test_the_verdict_follows_the_numbers():
    assert verdict(114.3).startswith("MVAM gains 114 RSUM points")
    assert verdict(20.0).startswith("This run does not show the claim: MVAM's RSUM is +20")
    assert "-5" in verdict(-5.0)
