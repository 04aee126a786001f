"""Karpathy's format, batches, images for evaluation; and the scenes that are made in that format."""
import json
import threading

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mvam_fast.retrieval import scene_truth, scenes
from mvam_fast.retrieval.data.datasets import ImageStore, KarpathyDataset, PairBatches, UnreadableImage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return scenes.make_scenes(tmp_path_factory.mktemp("scenes"), train=48, val=16, test=16, progress=False)


@pytest.fixture
def dataset(made):
    return KarpathyDataset(made, made.parent / "images", "train")


def karpathy(tmp_path, rows):
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": rows}))
    return path


def row(name, split, captions, **extra):
    return {"filename": name, "split": split, "sentences": [{"raw": c} for c in captions], **extra}


def test_splits_paths_and_captions(tmp_path):
    path = karpathy(tmp_path, [
        row("a.jpg", "train", [" one ", "two"], filepath="train2014", cocoid=7),
        row("b.jpg", "restval", ["three"] * 6, filepath="val2014", cocoid=8),
        row("c.jpg", "test", ["four"], imgid=3),
    ])  # fmt: skip
    train = KarpathyDataset(path, tmp_path, "train", captions_per_image=5)
    assert len(train) == 2 and train.image_ids == [7, 8] and train.families is None
    assert train.image_paths == [tmp_path / "train2014/a.jpg", tmp_path / "val2014/b.jpg"]
    assert train.captions == [["one", "two"], ["three"] * 5]
    test = KarpathyDataset(path, tmp_path, "test")
    assert test.image_paths == [tmp_path / "c.jpg"] and test.image_ids == [3]
    assert (test.source, test.split, test.image_name(0)) == (str(path), "test", str(tmp_path / "c.jpg"))


def test_bad_data_is_named(tmp_path):
    path = karpathy(tmp_path, [row("a.jpg", "train", ["x"]), row("b.jpg", "val", [])])
    with pytest.raises(ValueError, match=r"split is 'test'; .* has train \(1\), val \(1\)"):
        KarpathyDataset(path, tmp_path, "test")
    with pytest.raises(ValueError, match="no sentence for the image b.jpg"):
        KarpathyDataset(path, tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="image_root: no such folder"):
        KarpathyDataset(path, tmp_path / "none", "train")
    with pytest.raises(FileNotFoundError, match="json_path: no such file"):
        KarpathyDataset(tmp_path / "none.json", tmp_path, "train")
    with pytest.raises(ValueError, match="captions_per_image is 0"):
        KarpathyDataset(path, tmp_path, "train", captions_per_image=0)
    path = karpathy(tmp_path, [row("a.jpg", "test", ["x"], cocoid=4), row("b.jpg", "test", ["y"], cocoid=4)])
    with pytest.raises(ValueError, match="has the image id 4 more than once in the split 'test'"):
        KarpathyDataset(path, tmp_path, "test")
    path = karpathy(tmp_path, [row("a.jpg", "test", ["x"]), row("a.jpg", "test", ["y"])])
    with pytest.raises(ValueError, match=r"has the image .*a\.jpg more than once in the split 'test'"):
        KarpathyDataset(path, tmp_path, "test")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no list 'images'"):
        KarpathyDataset(path, tmp_path, "train")


@pytest.mark.parametrize("change, fault", [
    ({"split": None}, "has None as 'split'; it must be a string"),
    ({"filename": 3}, "has 3 as 'filename'; it must be a string"),
    ({"sentences": "x"}, "has 'x' as 'sentences'; it must be a list"),
    ({"sentences": [{"tokens": ["x"]}]}, "has the sentence .* an object with a string 'raw'"),
])  # fmt: skip
def test_a_malformed_row_is_named(tmp_path, change, fault):
    path = karpathy(tmp_path, [row("a.jpg", "train", ["x"]), {**row("b.jpg", "train", ["y"]), **change}])
    with pytest.raises(ValueError, match=r"images\[1\] " + fault):
        KarpathyDataset(path, tmp_path, "train")


def test_empty_captions_are_dropped_and_counted(tmp_path):
    rows = [row("a.jpg", "train", ["", "  ", "Zürich, 東京 🚲", "two"]), row("b.jpg", "test", ["\t"])]
    path = karpathy(tmp_path, rows)
    train = KarpathyDataset(path, tmp_path, "train", captions_per_image=1)
    assert train.captions == [["Zürich, 東京 🚲"]] and train.left_out == {"empty captions": 2}
    with pytest.raises(ValueError, match="no sentence for the image b.jpg"):
        KarpathyDataset(path, tmp_path, "test")


def test_batches_are_a_function_of_the_step(dataset):
    batches = PairBatches(dataset, 16, seed=3)
    assert batches.steps_per_epoch == 3
    epoch = [batches.batch(step) for step in range(3)]
    assert sorted(np.concatenate([images for images, _ in epoch])) == list(range(48))
    again = PairBatches(dataset, 16, seed=3)
    for step in (7, 2, 0):  # in any order, without the steps before
        for found, expected in zip(again.batch(step), PairBatches(dataset, 16, seed=3).batch(step), strict=True):
            assert (found == expected).all()
    assert (batches.batch(0)[0] != batches.batch(3)[0]).any()
    owner = np.repeat(np.arange(48), 5)
    for step in range(6):
        images, captions = batches.batch(step)
        assert (owner[captions] == images).all()


@pytest.mark.parametrize("siblings, images, captions", [
    (1, [41, 11, 27, 8, 47, 44, 18, 10], [205, 57, 138, 44, 237, 223, 94, 53]),
    (2, [4, 7, 45, 47, 31, 28, 13, 14], [20, 37, 228, 239, 157, 143, 69, 73]),
])  # fmt: skip
def test_draws_are_those_of_earlier_runs(dataset, siblings, images, captions):
    found = PairBatches(dataset, 8, seed=3, siblings=siblings).batch(7)
    assert found[0].tolist() == images and found[1].tolist() == captions


def test_siblings_stand_together(dataset):
    batches = PairBatches(dataset, 16, siblings=2)
    families = np.asarray(dataset.families)
    for step in range(4):
        images, _ = batches.batch(step)
        assert len(set(images)) == 16
        assert all((np.bincount(families[images]) % 2) == 0)
    with pytest.raises(ValueError, match="siblings is 3; it must be at least 1 and divide the batch size 16"):
        PairBatches(dataset, 16, siblings=3)
    with pytest.raises(ValueError, match="batch_size is 49; it must be 1 to 48"):
        PairBatches(dataset, 49)


def test_families_that_fill_no_batch(dataset):
    assert PairBatches(dataset, 48, siblings=4).steps_per_epoch == 1  # families of four
    dataset.families = [number // 3 for number in range(48)]
    assert PairBatches(dataset, 32, siblings=2).steps_per_epoch == 1
    with pytest.raises(ValueError, match="siblings is 2 and batch_size 34, but of the 48 images .* only 32 are left"):
        PairBatches(dataset, 34, siblings=2)
    with pytest.raises(ValueError, match="only 0 are left in full groups of 4 of a family; batch_size must be at most"):
        PairBatches(dataset, 8, siblings=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_equal_the_whole_preprocess(dataset, workers):
    preprocess = open_clip.image_transform(48, is_train=False)
    store = ImageStore(dataset, preprocess, cache=True, workers=workers)
    for _ in range(2):  # the second time from memory
        images, kept = store.load([5, 0, 11])
        assert kept == [0, 1, 2] and images.dtype == torch.uint8
        expected = torch.stack([preprocess(Image.open(dataset.image_paths[i])) for i in (5, 0, 11)])
        assert torch.equal(store.normalize(images), expected)


def test_threads_decode_and_none_is_left(dataset, tmp_path, monkeypatch):
    decoding, both = set(), threading.Barrier(2, timeout=60)
    load = KarpathyDataset.load_image

    def load_image(self, index):
        decoding.add(threading.current_thread())
        both.wait()  # each waits for another that decodes
        return load(self, index)

    monkeypatch.setattr(KarpathyDataset, "load_image", load_image)
    preprocess = open_clip.image_transform(48, is_train=False)
    store = ImageStore(dataset, preprocess, strict=True, workers=2)
    before = threading.active_count()
    for _ in range(2):
        assert len(store.load(range(8))[0]) == 8 and threading.active_count() == before
    assert len(decoding) == 4 and threading.current_thread() not in decoding
    dataset.image_paths = [tmp_path / "none.png"] * 48
    with pytest.raises(UnreadableImage, match="none.png"):
        store.load(range(8))
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="workers is -1; it must be at least 0"):
        ImageStore(dataset, preprocess, workers=-1)


def test_a_preprocess_that_cannot_be_split_or_cached_is_refused(dataset):
    with pytest.raises(ValueError, match="it must end in ToTensor, Normalize"):
        ImageStore(dataset, lambda image: image)
    random = open_clip.image_transform(48, is_train=True)
    with pytest.raises(ValueError, match="cache is True, but preprocess is random"):
        ImageStore(dataset, random, cache=True)
    assert ImageStore(dataset, random).load([0])[0].shape == (1, 3, 48, 48)


def test_unreadable_images_are_skipped_and_counted_or_raise(tmp_path, dataset):
    dataset.image_paths = list(dataset.image_paths)
    truncated = tmp_path / "half.png"
    truncated.write_bytes(dataset.image_paths[1].read_bytes()[:200])
    dataset.image_paths[1], dataset.image_paths[2] = truncated, tmp_path / "gone.png"
    preprocess = open_clip.image_transform(48, is_train=False)
    store = ImageStore(dataset, preprocess)
    images, kept = store.load([0, 1, 2, 3])
    assert kept == [0, 3] and len(images) == 2
    assert set(store.unreadable) == {str(truncated), str(tmp_path / "gone.png")}
    with pytest.raises(UnreadableImage, match="none of 1 images"):
        store.load([1])
    with pytest.raises(UnreadableImage, match="half.png"):
        ImageStore(dataset, preprocess, strict=True).load([1])


def test_scenes_are_in_karpathys_format_and_reproducible(made, tmp_path):
    content = json.loads(made.read_text())
    assert {r["split"] for r in content["images"]} == {"train", "val", "test"} and len(content["images"]) == 80
    assert all(len(r["sentences"]) == 5 and len(r["sentids"]) == 5 for r in content["images"])
    again = scenes.make_scenes(tmp_path / "again", train=48, val=16, test=16, progress=False)
    assert json.loads(again.read_text()) == content
    for r in content["images"][:5]:
        name = f"images/{r['filepath']}/{r['filename']}"
        assert (made.parent / name).read_bytes() == (again.parent / name).read_bytes()
    other = scenes.make_scenes(tmp_path / "other", train=48, val=16, test=16, seed=1, progress=False)
    assert json.loads(other.read_text())["images"] != content["images"]
    before = made.stat().st_mtime_ns
    assert scenes.make_scenes(made.parent, train=48, val=16, test=16) == made and made.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds scenes made with"):
        scenes.make_scenes(made.parent, train=52, val=16, test=16)
    with pytest.raises(ValueError, match="val is 3; it must be a positive multiple of 4"):
        scenes.make_scenes(tmp_path / "x", val=3)


def test_processes_do_not_change_the_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 2)
    parallel = scenes.make_scenes(tmp_path / "a", train=804, val=4, test=4, progress=False)
    monkeypatch.setattr(scenes, "_run", lambda jobs, workers: map(scenes._write_family, jobs))
    serial = scenes.make_scenes(tmp_path / "b", train=804, val=4, test=4, progress=False)
    assert parallel.read_text() == serial.read_text()


def test_captions_are_true_and_families_differ(made):
    rows = json.loads(made.read_text())["images"]
    assert all(scene_truth.is_true(s["claims"], r["scene"]) for r in rows for s in r["sentences"])
    families = {}
    for r in rows:
        families.setdefault((r["split"], r["family"]), []).append(scenes.picture_key(r["scene"]))
    assert all(len(keys) == len(set(keys)) == 4 for keys in families.values())
    told = [
        scene_truth.is_true(s["claims"], other["scene"])
        for r in rows for s in r["sentences"] for other in rows if other["family"] == r["family"] and other is not r
    ]  # fmt: skip
    assert 0.1 < np.mean(told) < 0.9  # siblings share some captions and not others
    tokenizer = open_clip.SimpleTokenizer()
    longest = max(len(tokenizer.encode(s["raw"])) for r in rows for s in r["sentences"])
    assert longest + 2 <= 24  # fits the scenes model's context


def test_truth_by_hand():
    objects = [
        {"shape": "circle", "color": "red", "size": "small", "texture": "plain", "row": 0, "column": 0},
        {"shape": "circle", "color": "red", "size": "large", "texture": "dotted", "row": 3, "column": 2},
        {"shape": "bar", "color": "blue", "size": "small", "texture": "plain", "row": 1, "column": 1},
    ]
    scene = {"objects": objects, "background": "navy", "gradient": False}
    red, bar = {"shape": "circle", "color": "red"}, {"shape": "bar", "color": "blue"}
    true = scene_truth.is_true
    assert true({"objects": [red, red]}, scene) and not true({"objects": [bar, bar]}, scene)
    assert true({"objects": [red, bar], "relation": "above"}, scene)
    assert true({"objects": [red, bar], "relation": "below"}, scene)
    assert not true({"objects": [{**red, "size": "large"}, bar], "relation": "above"}, scene)
    assert true({"objects": [{**red, "quadrant": "bottom right"}]}, scene)
    assert not true({"objects": [bar], "count": 4}, scene)
    assert not true({"objects": [bar], "background": "gray"}, scene)


def test_oracle_recall_is_the_chance_of_a_guess_among_the_true(made):
    found = scene_truth.oracle_recall(made, "test")
    rows = [r for r in json.loads(made.read_text())["images"] if r["split"] == "test"]
    claims = [s["claims"] for r in rows for s in r["sentences"]]
    true = np.array([[scene_truth.is_true(c, r["scene"]) for r in rows] for c in claims])
    assert found["t2i_r1"] == pytest.approx(100 * (1 / true.sum(1)).mean())
    assert found["t2i_r10"] <= 100 and found["i2t_r1"] == pytest.approx(100 * (5 / true.sum(0)).mean())
    assert found["rsum"] == pytest.approx(sum(v for k, v in found.items() if k != "rsum"))
