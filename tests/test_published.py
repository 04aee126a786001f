"""What others published: the page shows the file, and a result finds its row."""
from pathlib import Path

import pytest

from mvam_fast.files import read_json
from mvam_fast.retrieval.evaluation.published import FILE, PROTOCOLS, beside, markdown_table, published

PAGE = Path(__file__).parent.parent / "docs/evaluation.md"


def test_the_page_shows_the_file():
    page = PAGE.read_text(encoding="utf-8")
    table = read_json(FILE, "published")
    assert markdown_table() in page and table["source"] in page and table["url"] in page
    assert "published by others and not measured here" in page


def test_every_row_is_whole_and_plausible():
    table = read_json(FILE, "published")
    for row in table["rows"]:
        for protocol in PROTOCOLS:
            found = published(row["model"], row["pretrained"], protocol)
            assert found["rsum"] == pytest.approx(sum(row[protocol]))
            for way in ("i2t", "t2i"):
                assert 0 < found[f"{way}_r1"] < found[f"{way}_r5"] < found[f"{way}_r10"] < 100
    assert len({(row["model"], row["pretrained"]) for row in table["rows"]}) == len(table["rows"])


def test_every_row_names_weights_that_open_clip_knows():
    open_clip = pytest.importorskip("open_clip")
    for row in read_json(FILE, "published")["rows"]:
        assert row["pretrained"] in open_clip.list_pretrained_tags_by_model(row["model"])


def test_the_row_of_a_model():
    found = published("ViT-B/32", "openai", "flickr30k-1k")
    assert found["i2t_r1"] == 78.9 and found["t2i_r10"] == 90.02 and found["rsum"] == 504.36
    for model, tag, protocol in (
        ("ViT-B-32", "laion2b_e16", "coco-5k"), ("ViT-B-32", None, "coco-5k"), ("ViT-B-32", "openai", "coco-1k"),
    ):  # fmt: skip
        assert published(model, tag, protocol) is None
        assert beside({}, model, tag, protocol, data="dataset_coco.json", split="test") is None


def test_the_difference_is_what_was_measured_less_what_was_published():
    found = published("ViT-L-14", "openai", "coco-5k")
    measured = {name: value + 0.5 for name, value in found.items()}
    row = beside(measured, "ViT-L-14", "openai", "coco-5k", data="coco/dataset_coco.json", split="test")
    assert row["metrics"] == found and row["difference"] == pytest.approx(dict.fromkeys(found, 0.5))
    assert row["recognised"] is True and row["of"] == "COCO, test of Karpathy's split (dataset_coco.json)"


@pytest.mark.parametrize("protocol, data, split", [
    ("coco-5k", "dataset_coco.json", "val"), ("coco-5k", "dataset_flickr30k.json", "test"),
    ("coco-5k", "val2017.csv", "test"), ("flickr30k-1k", "dataset_coco.json", "test"),
    ("flickr30k-1k", "dataset_scenes.json", "test"), ("flickr30k-1k", "dataset_flickr30k.json", "train"),
])  # fmt: skip
def test_other_data_has_no_published_numbers_beside_it(protocol, data, split):
    measured = published("ViT-L-14", "openai", protocol)
    row = beside(measured, "ViT-L-14", "openai", protocol, data=data, split=split)
    assert row["recognised"] is False and not {"metrics", "difference"} & set(row)
    assert row["of"].startswith("COCO, test" if protocol == "coco-5k" else "Flickr30K, test")
