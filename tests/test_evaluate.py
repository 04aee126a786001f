"""Evaluation: the features are the model's own, and the protocol block tells two protocols apart."""
import json

import pytest
import torch
import torch.nn.functional as F

from mvam_fast.retrieval.datasets import ImageStore, KarpathyDataset, UnreadableImage
from mvam_fast.retrieval.evaluate import embed_dataset, evaluate, load_model, recall_table
from mvam_fast.retrieval.scenes import make_scenes
from mvam_fast.retrieval.train import TrainConfig, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model folder, JSON, image folder) of a run of two steps."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = make_scenes(folder / "scenes", train=32, val=8, test=16, progress=False)
    paths = {"data": str(data), "images": str(data.parent / "images"), "out": str(folder / "run")}
    settings = {"model": "scenes-ViT-T-16", "views": 2, "batch_size": 8, "steps": 2, "warmup": 0, "device": "cpu"}
    return train(TrainConfig(**paths, **settings), progress=False), data, data.parent / "images"


def embed(trained, batch_size=256, **options):
    folder, data, images = trained
    model, preprocess, tokenizer = load_model(folder, "cpu")
    store = ImageStore(KarpathyDataset(data, images, "test"), preprocess, **options)
    return model, store, embed_dataset(model, store, tokenizer, batch_size=batch_size, progress=False)


def test_features_are_the_models_own_one_by_one(trained):
    model, store, (images, texts, owner) = embed(trained)
    _, preprocess, tokenizer = load_model(trained[0], "cpu")
    captions = [caption for captions in store.dataset.captions for caption in captions]
    assert images.dtype == texts.dtype == torch.float32
    assert owner.tolist() == [image for image in range(16) for _ in range(5)]
    with torch.no_grad():
        for index in (0, 15):
            alone = F.normalize(model.encode_image(preprocess(store.dataset.load_image(index))[None]), dim=-1)
            torch.testing.assert_close(images[index : index + 1], alone, rtol=1e-5, atol=1e-6)
        for index in (0, 79):
            alone = F.normalize(model.encode_text(tokenizer([captions[index]])), dim=-1)
            torch.testing.assert_close(texts[index : index + 1], alone, rtol=1e-5, atol=1e-6)


def test_the_batch_size_changes_nothing(trained):
    _, _, whole = embed(trained)
    _, _, pieces = embed(trained, batch_size=7)  # divides neither 16 images nor 80 captions
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_given_back(trained, training):
    model, store, _ = embed(trained)
    model.train(training)
    embed_dataset(model, store, load_model(trained[0], "cpu")[2], progress=False)
    assert model.training is training


def test_captions_of_an_unreadable_image_go_with_it(trained, tmp_path):
    data = make_scenes(tmp_path / "scenes", train=32, val=8, test=16, progress=False)
    here = (trained[0], data, data.parent / "images")
    _, _, (images, texts, _) = embed(here)
    (tmp_path / "scenes/images/test/000002.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match="000002.png"):
        embed(here, strict=True)
    _, store, (fewer, fewer_texts, owner) = embed(here, batch_size=2)
    kept = [index for index in range(16) if index != 2]
    assert len(store.unreadable) == 1
    torch.testing.assert_close(fewer, images[kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fewer_texts, texts.view(16, 5, -1)[kept].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert owner.tolist() == [row for row in range(15) for _ in range(5)]


def test_the_protocol_tells_splits_apart(trained, tmp_path):
    def protocol(split, out=None):
        return evaluate(*trained, split=split, out=out, device="cpu", progress=False)["protocol"]

    test, val = protocol("test", tmp_path / "result.json"), protocol("val")
    assert json.loads((tmp_path / "result.json").read_text())["protocol"] == test == protocol("test")
    assert test["data"] == "dataset_scenes.json" and test["model"] == str(trained[0])
    assert test["captions_per_image"] == "all" and test["unreadable_images"] == 0
    assert (test["split"], val["split"]) == ("test", "val")
    assert test["image_ids_sha256"] != val["image_ids_sha256"] and len(test["image_ids_sha256"]) == 64


def test_a_split_that_is_not_there_is_named(trained):
    with pytest.raises(ValueError, match=r"split is 'dev'.*test \(16\)"):
        evaluate(*trained, split="dev", device="cpu", progress=False)


def test_the_table_has_every_number(trained):
    metrics = evaluate(*trained, device="cpu", progress=False)["metrics"]
    oracle = {name: value for name, value in metrics.items() if "rank" not in name}  # as a perfect reader has none
    header, first, second = recall_table({"first": metrics, "a longer name": oracle}).splitlines()
    assert [cell for cell in header.split() if cell.startswith("R@")] == ["R@1", "R@5", "R@10"] * 2
    shown = [f"{metrics[f'{way}_r{k}']:.1f}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert first.split()[1:8] == second.split()[3:] == [*shown, f"{metrics['rsum']:.1f}"]
    assert first.split()[8:] == [f"{metrics['i2t_median_rank']:.0f}", "/", f"{metrics['t2i_median_rank']:.0f}"]
