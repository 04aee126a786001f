"""Dropping views: from the columns it gives what the smaller model gives, and noise is what goes first."""
import csv
import json

import pytest
import torch
import torch.nn.functional as F

from mvam_fast import MVAM, cli, create_model_and_transforms
from mvam_fast.retrieval.data.datasets import ImageStore, KarpathyDataset, open_dataset
from mvam_fast.retrieval.evaluation import view_dropping
from mvam_fast.retrieval.evaluation.evaluate import embed_dataset, evaluate, load_model
from mvam_fast.retrieval.evaluation.metrics import recall_metrics
from mvam_fast.retrieval.evaluation.view_dropping import (
    drop_views,
    dropping_table,
    eliminate,
    rsums_without_each,
    shared_images,
    view_columns,
    without,
)
from mvam_fast.retrieval.scenes import make_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    data = make_scenes(tmp_path_factory.mktemp("dropping"), train=4, val=12, test=16, progress=False)
    return data, data.parent / "images"


@pytest.fixture
def tables(scenes, tmp_path):
    """The splits val and test as tables, with paths from the folder of the images."""
    found = []
    for split in ("val", "test"):
        dataset = KarpathyDataset(*scenes, split)
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filepath", "title"])
            for path, captions in zip(dataset.image_paths, dataset.captions, strict=True):
                writer.writerows([path.relative_to(scenes[1]), caption] for caption in captions)
        found.append(tmp_path / f"{split}.csv")
    return found


def made_up(noise, *, views=4, width=8, first=0, images=40, seed=0):
    """Features of `views` views (and a global one of `first` numbers), of which those in `noise` know nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    owner = torch.arange(images).repeat_interleave(3)
    image, text = [], []
    for view, numbers in ((None, first), *((view, width) for view in range(views))):
        meaning = draw(images, numbers)
        image.append(meaning)
        text.append(draw(len(owner), numbers) * 2 if view in noise else meaning[owner] + draw(len(owner), numbers))
    starts = [first + view * width for view in range(views)]
    columns = {None: range(first), **{view: range(start, start + width) for view, start in enumerate(starts)}}
    return (F.normalize(torch.cat(image, 1), dim=1), F.normalize(torch.cat(text, 1), dim=1), owner), columns


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("noise", [{1}, {2, 3}])
def test_noise_goes_first(noise, first):
    features, columns = made_up(noise, first=first)
    steps = eliminate(*features, columns, progress=False)
    assert {view for view, _ in steps[1 : 1 + len(noise)]} == noise
    assert steps[len(noise)][1] > steps[0][1]  # without noise it is better
    assert len(steps) == (5 if first else 4) and steps[0] == (None, recall_metrics(*features)["rsum"])


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("memory", [None, 3000])
def test_the_shared_products_give_the_rsum_of_the_renormalised_rest(first, memory, monkeypatch):
    if memory:
        monkeypatch.setattr(view_dropping, "SCORE_MEMORY", memory)
    features, columns = made_up({0}, first=first, images=24)
    for kept in ([0, 1, 2, 3], [3, 1], *([[2]] if first else [])):
        found = rsums_without_each(*features, columns, kept)
        assert list(found) == kept
        for view, rsum in found.items():
            rest = without(features, columns, [other for other in kept if other != view])
            assert rsum == pytest.approx(recall_metrics(*rest)["rsum"])


def test_every_step_is_the_best_of_its_candidates():
    features, columns = made_up({2})
    kept = [0, 1, 2, 3]
    for view, rsum in eliminate(*features, columns, progress=False):
        if view is not None:
            candidates = {
                one: recall_metrics(*without(features, columns, [k for k in kept if k != one]))["rsum"] for one in kept
            }
            assert rsum == pytest.approx(max(candidates.values())) == pytest.approx(candidates[view])
            kept.remove(view)
    assert len(kept) == 1


@pytest.mark.parametrize("name", ["views", "global"])
def test_a_saved_model_gives_what_was_measured(name, scenes, checkpoint_of, tmp_path):
    folder = checkpoint_of(name)
    result = drop_views(folder, *scenes, out=tmp_path, save=[2], device="cpu", progress=False)
    assert json.loads((tmp_path / "drop_views.json").read_text()) == result
    assert (tmp_path / "drop_views.png").stat().st_size > 1000
    views, smallest = result["num_views"], 0 if name == "global" else 1
    assert [row["views"] for row in result["sizes"]] == list(range(views, smallest - 1, -1))
    assert sorted(result["dropped"] + result["sizes"][-1]["kept"]) == list(range(views))
    for before, after in zip(result["sizes"], result["sizes"][1:], strict=False):
        assert set(after["kept"]) < set(before["kept"]) and after["width"] == before["width"] - 32
    row = next(row for row in result["sizes"] if row["views"] == 2)
    assert row["model"] == str(tmp_path / "model-2") and not (tmp_path / "model-1").exists()

    small = MVAM.from_pretrained(tmp_path / "model-2")
    assert small.num_views == 2 and small.global_view is (name == "global")
    measured = evaluate(tmp_path / "model-2", *scenes, device="cpu", progress=False)
    assert measured["metrics"] == pytest.approx(row["metrics"])
    assert measured["protocol"]["embedding_width"] == row["width"]
    whole, preprocess, tokenizer = load_model(folder, "cpu")
    store = ImageStore(KarpathyDataset(*scenes, "test"), preprocess)
    features = embed_dataset(whole, store, tokenizer, progress=False)
    cut = without(features, view_columns(whole, features[0].shape[1]), row["kept"])
    for one, other in zip(cut, embed_dataset(small, store, tokenizer, progress=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_views_narrower_than_the_global_one():
    options = {"num_views": 3, "global_view": True, "view_dim": 8}
    model = create_model_and_transforms("scenes-ViT-T-16", **options)[0].eval()
    assert view_columns(model, 56) == {None: range(32), 0: range(32, 40), 1: range(40, 48), 2: range(48, 56)}
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole, small = (m.encode_image(image, normalize=True) for m in (model, model.select_views([0, 2])))
    assert whole.shape == (2, 56)
    cut = without((whole, whole, None), view_columns(model, 56), [0, 2])[0]
    torch.testing.assert_close(cut, small, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_is_said(scenes, checkpoint_of, tmp_path):
    for name, options, message in (
        ("single", {}, "has 0 learned views; there is none that could be dropped"),
        ("views", {"keep": [5]}, "keep is 5; it must be 1 to 4"),
        ("views", {"keep": [0]}, "keep is 0; it must be 1 to 4"),
        ("global", {"save": [0]}, "save is 0; it must be 1 to 3"),
        ("views", {"choose_on": "dev"}, "split is 'dev'"),
        ("views", {"choose_on": "test"}, "choose_on is 'test', and 16 of its 16 images in .* are among .*--choose-on"),
        ("views", {"choose_images": "here"}, "choose_images is 'here', but choose_data, .* is not given"),
    ):
        with pytest.raises(ValueError, match=message):
            drop_views(checkpoint_of(name), *scenes, out=tmp_path / "out", device="cpu", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_data_without_splits_needs_other_data_to_choose_on(scenes, tables, checkpoint_of, tmp_path):
    val, test = tables
    options = {"out": tmp_path / "out", "keep": [1], "device": "cpu", "progress": False}
    copied = tmp_path / "copy.csv"
    copied.write_bytes(test.read_bytes())
    for chosen in ({}, {"choose_data": test, "choose_images": scenes[1]}, {"choose_data": copied},
                   {"choose_on": "test", "choose_data": scenes[0], "choose_images": scenes[1]}):  # fmt: skip
        with pytest.raises(ValueError, match="and 16 of its 16 images .* are among .* as choose_data .--choose-data"):
            drop_views(checkpoint_of("views"), test, scenes[1], **chosen, **options)
    assert not (tmp_path / "out").exists()
    found = drop_views(checkpoint_of("views"), test, scenes[1], choose_data=val, choose_images=scenes[1], workers=2,
                       **options)  # fmt: skip
    by_json = drop_views(checkpoint_of("views"), *scenes, **options)
    assert found["sizes"] == by_json["sizes"] and found["dropped"] == by_json["dropped"]
    assert found["data"]["choose"] | {"image_ids_sha256": "", "captions_sha256": ""} == {
        "data": str(val), "images_from": str(scenes[1]), "split": "val", "images": 12, "captions": 60,
        "image_ids_sha256": "", "captions_sha256": "",
    }  # fmt: skip
    assert found["data"]["measure"]["data"] == str(test) and found["data"]["measure"]["split"] == "test"
    assert dropping_table(found).splitlines()[-1] == "measured on test.csv (test); chosen on val.csv (val)"


def test_which_images_are_shared(scenes, tables, tmp_path):
    val, test = (open_dataset(table, scenes[1]) for table in tables)
    assert shared_images(val, test) == 0 and shared_images(test, test) == 16
    lines = tables[1].read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join([lines[0], *lines[1:11:5], *tables[0].read_text().splitlines()[1:]]))
    assert shared_images(open_dataset(tmp_path / "few.csv", scenes[1]), test) == 2  # with fewer captions, in one place
    # Ids that are the same by chance: another image in another place.
    test.captions = [[f"another {caption}" for caption in captions] for captions in test.captions]
    test.image_paths = [tmp_path / path.name for path in test.image_paths]
    assert shared_images(test, open_dataset(tables[1], scenes[1])) == 0


def test_command_line(scenes, checkpoint_of, tmp_path, capsys):
    where = ["--data", str(scenes[0]), "--images", str(scenes[1]), "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["drop-views", str(checkpoint_of("global")), *where, "--keep", "3", "1", "--save", "2"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "drop_views.json").read_text())
    assert [row["views"] for row in result["sizes"]] == [3, 2, 1] and dropping_table(result) in shown
    assert result["data"]["choose"]["split"] == "val" and result["data"]["choose"]["images"] == 12
    assert (tmp_path / "model-2/model.safetensors").is_file()
    assert f"global {' '.join(map(str, result['sizes'][1]['kept']))}" in shown
    other = ["--choose-data", str(scenes[0]), "--choose-images", str(scenes[1]), "--choose-on", "train"]
    again = ["drop-views", str(checkpoint_of("views")), *where, *other, "--keep", "1", "--workers", "1"]
    assert cli.main(again) == 0 and "chosen on dataset_scenes.json (train)" in capsys.readouterr().out
    assert cli.main(["drop-views", str(checkpoint_of("single")), *where]) == 2
    assert "mvam-fast: error: model: " in capsys.readouterr().err
