"""Batches for training: a function of the seed and the step, whoever makes them; and what becomes of bad images."""
import random
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from mvam_fast.retrieval import scenes
from mvam_fast.retrieval.data import tokens
from mvam_fast.retrieval.data.datasets import ImageStore, KarpathyDataset, PairBatches, UnreadableImage
from mvam_fast.retrieval.data.loading import TrainBatches, count_truncated

PLAIN, RANDOM = (open_clip.image_transform(48, is_train=train) for train in (False, True))
TOKENIZER = open_clip.SimpleTokenizer(context_length=24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return scenes.make_scenes(tmp_path_factory.mktemp("scenes"), train=48, val=4, test=4, progress=False)


@pytest.fixture
def dataset(made):
    return KarpathyDataset(made, made.parent / "images", "train")


def spoil(dataset, indices, tmp_path):
    """Makes images unreadable: the first is missing, the others are cut off."""
    for index in indices:
        cut = tmp_path / f"cut{index}.png"
        if index != indices[0]:
            cut.write_bytes(dataset.image_paths[index].read_bytes()[:200])
        dataset.image_paths[index] = cut
    return {str(dataset.image_paths[index]) for index in indices}


def batches(dataset, preprocess=RANDOM, size=16, **options):
    return TrainBatches(dataset, preprocess, TOKENIZER, size, **{"stop_step": 4, **options})


def equal(found, expected):
    return found.step == expected.step and all(
        torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True)
    )


def test_a_batch_is_what_was_drawn_for_its_step(dataset):
    loaded = batches(dataset, PLAIN, seed=3, siblings=2, cache=True)
    assert loaded.steps_per_epoch == 3 and loaded.truncated == 0
    pairs, store = PairBatches(dataset, 16, seed=3, siblings=2), ImageStore(dataset, PLAIN)
    captions = [caption for captions in dataset.captions for caption in captions]
    for _ in range(2):  # the second time from memory
        for step, batch in enumerate(loaded, 1):
            images, drawn = pairs.batch(step - 1)
            assert batch.step == step and batch.image_indices.tolist() == images.tolist()
            assert batch.images.dtype == torch.uint8 and torch.equal(batch.images, store.load(images)[0])
            assert torch.equal(batch.token_ids, TOKENIZER([captions[i] for i in drawn]))
        assert step == 4
    assert torch.equal(loaded.normalize(batch.images), store.normalize(batch.images))
    first = batch.image_indices[0].item()
    assert loaded.describe(batch)[0] == f"{dataset.image_paths[first]} (id {dataset.image_ids[first]})"


def test_processes_workers_and_resuming_change_nothing(dataset, tmp_path):
    bad = spoil(dataset, [5, 6, 7, 30], tmp_path)
    single = batches(dataset)
    expected = list(single)
    assert single.unreadable.keys() == bad and [batch.step for batch in expected] == [1, 2, 3, 4]
    halves = [batches(dataset, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(expected, *halves, strict=True):
        assert all(len(part.images) == 8 for part in parts)
        joined = [torch.cat(fields) for fields in list(zip(*parts, strict=True))[1:]]
        assert equal(type(whole)(whole.step, *joined), whole)
    assert halves[0].unreadable | halves[1].unreadable == single.unreadable
    resumed = list(batches(dataset, start_step=2))
    assert len(resumed) == 2 and all(equal(*pair) for pair in zip(resumed, expected[2:], strict=True))

    # Now by workers; and neither way touches the generators of the process that trains.
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    ahead = batches(dataset, workers=2)
    assert all(equal(*pair) for pair in zip(ahead, expected, strict=True))
    assert ahead.unreadable == single.unreadable
    list(batches(dataset, stop_step=1))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    # An error comes from a worker as it is, and a loop may end early.
    with pytest.raises(UnreadableImage, match=r"^cannot read the image .*cut\d+\.png: [^\n]*$"):
        list(batches(dataset, workers=1, strict=True))
    assert next(iter(batches(dataset, workers=1))).step == 1


def test_augmentation_depends_on_seed_step_and_place(dataset):
    crops = [batch.images for batch in batches(dataset, size=48, stop_step=2)]
    order = [batch.image_indices.argsort() for batch in batches(dataset, size=48, stop_step=2)]
    assert not torch.equal(crops[0][order[0]], crops[1][order[1]])  # the same images, in another step
    again, other = (next(iter(batches(dataset, size=48, seed=seed))).images for seed in (0, 1))
    assert torch.equal(again, crops[0]) and not torch.equal(other, crops[0])


class Jitter:
    """Draws from every global generator that a transform may use."""

    def __call__(self, image):
        draws = (random.randrange(99), np.random.randint(99), torch.randint(99, ()).item())
        return image.resize((8, 8)).point(lambda value: (value + sum(draws)) % 256)


def test_every_generator_is_seeded(dataset):
    preprocess = SimpleNamespace(transforms=[Jitter(), *PLAIN.transforms[-2:]])
    one, two = (list(batches(dataset, preprocess)) for _ in range(2))
    assert all(equal(*pair) for pair in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="cache is True, but preprocess is random"):
        batches(dataset, preprocess, cache=True)


@pytest.mark.parametrize("size, indices", [(8, list(range(0, 48, 6))), (16, [3, 20])])
def test_replacements_are_readable_and_distinct(dataset, tmp_path, size, indices):
    bad = spoil(dataset, indices, tmp_path)
    loaded = batches(dataset, PLAIN, size, stop_step=24)
    pairs, replaced = PairBatches(dataset, size), 0
    for batch in loaded:
        images, planned = batch.image_indices.numpy(), pairs.batch(batch.step - 1)[0]
        assert len(set(images)) == size and not set(images) & set(indices)
        good = ~np.isin(planned, indices)
        assert (images[good] == planned[good]).all() and not set(images[~good]) & set(planned)
        replaced += (~good).sum()
        for index, ids in zip(images, batch.token_ids, strict=True):
            assert ids.tolist() in TOKENIZER(dataset.captions[index]).tolist()
    assert replaced >= 16 and loaded.unreadable.keys() == bad
    assert all(reason.startswith("cannot read the image") for reason in loaded.unreadable.values())


def test_an_image_that_nothing_can_replace_is_an_error(dataset, tmp_path):
    spoil(dataset, [20], tmp_path)
    whole = batches(dataset, PLAIN, 48)
    fault = "cut20.png: .*; and none of the 0 images kept for its place in step 1 can replace it: the data set has 48 "
    with pytest.raises(UnreadableImage, match=fault):
        next(iter(whole))
    assert list(whole.unreadable) == [str(dataset.image_paths[20])]
    with pytest.raises(UnreadableImage, match="^cannot read the image .*cut20.png"):
        next(iter(batches(dataset, PLAIN, 48, strict=True)))
    dataset.image_paths = [tmp_path / "none.png"] * 48
    with pytest.raises(UnreadableImage, match="none of the 2 images kept for its place"):
        next(iter(batches(dataset, PLAIN, 16)))


def test_a_cache_reads_every_image_once(dataset, monkeypatch):
    read = []
    monkeypatch.setattr(KarpathyDataset, "load_image", lambda self, i, load=KarpathyDataset.load_image: (
        read.append(i), load(self, i))[1])  # fmt: skip
    assert len(list(batches(dataset, PLAIN, stop_step=9, cache=True))) == 9
    assert sorted(read) == list(range(48))


@pytest.mark.parametrize("options, fault", [
    ({"world_size": 3}, "world_size is 3; it must be at least 1 and divide batch_size, 16"),
    ({"rank": 2, "world_size": 2}, "rank is 2; it must be 0 to 1"), ({"workers": -1}, "workers is -1"),
    ({"start_step": 5}, "start_step is 5; it must be 0 to 4"),
    ({"cache": True, "workers": 2}, "cache is True and workers is 2"),
    ({"size": 64}, "batch_size is 64; it must be 1 to 48"),
])  # fmt: skip
def test_wrong_arguments_are_named(dataset, options, fault):
    with pytest.raises(ValueError, match=fault):
        batches(dataset, PLAIN, **options)
    with pytest.raises(ValueError, match="must end in ToTensor, Normalize"):
        batches(dataset, lambda image: image)


def test_long_captions_are_cut_and_counted(dataset):
    dataset.captions[0] = ["many " * 30, "a " * 22, "short"]  # 30 ids, 22 that just fit between the two marks, 1
    loaded = batches(dataset, PLAIN)
    assert loaded.truncated == 1
    captions = dataset.captions[0]
    assert count_truncated(TOKENIZER, captions, TOKENIZER(captions)) == 1


def test_rows_that_fill_the_context_are_counted_of_other_tokenizers():
    rows = torch.tensor([[1, 5, 5, 2], [1, 5, 2, 2], [1, 2, 2, 2]])
    for inner, full in ((SimpleNamespace(pad_token_id=0), 3), (SimpleNamespace(pad_token_id=2, eos_token_id=2), 1)):
        tokenizer = SimpleNamespace(tokenizer=inner, context_length=4)
        assert count_truncated(tokenizer, ["x"] * 3, rows) == full
    longest = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, model_max_length=9), context_length=None)
    assert count_truncated(longest, ["x"] * 3, rows) == 0


def test_beyond_the_limit_captions_are_tokenised_when_drawn(dataset, monkeypatch):
    dataset.captions[0] = ["many " * 30]
    table = batches(dataset, PLAIN, size=48, stop_step=2)
    monkeypatch.setattr(tokens, "TABLE_LIMIT", 100)
    drawn = batches(dataset, PLAIN, size=48, stop_step=2)
    assert (table.truncated, drawn.truncated) == (1, 0)
    assert all(equal(*pair) for pair in zip(drawn, table, strict=True))
    assert drawn.truncated == 2  # once in each epoch
