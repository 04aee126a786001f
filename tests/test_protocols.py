"""Protocols against a computation that goes item by item, with folds small enough for it."""
import brute_recall as brute
import pytest
import torch

from mvam_fast.retrieval.evaluation.protocols import GROUPS, PROTOCOLS, Protocol, measure, protocols_of


def tensors(scores, owner):
    image, text = brute.features(scores)
    return torch.tensor(image), torch.tensor(text), torch.tensor(owner)


@pytest.mark.parametrize("captions", [None, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_one_search_takes_the_first_captions(captions, seed):
    scores, owner = brute.random_case(seed, images=11, least=3)
    kept = list(range(len(owner))) if captions is None else brute.first_captions(owner, captions)
    scores_kept, owner_kept = [[row[t] for t in kept] for row in scores], [owner[t] for t in kept]
    found = measure(Protocol("one", captions=captions), *tensors(scores, owner))
    assert found.metrics == pytest.approx(brute.metrics(scores_kept, owner_kept))
    assert {way: found.ranks[way].tolist() for way in ("i2t", "t2i")} == brute.ranks(scores_kept, owner_kept)
    assert found.image_of_text.tolist() == owner_kept and found.fold_of_image.tolist() == [0] * 11


@pytest.mark.parametrize("fold", [2, 3, 12])
@pytest.mark.parametrize("captions", [None, 2])
def test_folds_are_data_sets_of_their_own(fold, captions):
    scores, owner = brute.random_case(fold, images=12, least=2)
    kept = list(range(len(owner))) if captions is None else brute.first_captions(owner, captions)
    scores_kept, owner_kept = [[row[t] for t in kept] for row in scores], [owner[t] for t in kept]
    each = brute.of_folds(scores_kept, owner_kept, fold)
    found = measure(Protocol("folds", captions=captions, fold=fold), *tensors(scores, owner))
    counts = ("images", "captions", "i2t_tied_queries", "t2i_tied_queries")
    expected = {
        name: sum(one[name] for one in each) / (1 if name in counts else len(each)) for name in each[0]
    }
    assert found.metrics == pytest.approx({**expected, "folds": 12 // fold})
    assert all(isinstance(found.metrics[name], int) for name in counts)
    assert found.fold_of_image.tolist() == [image // fold for image in range(12)]
    hits = [100 * (found.ranks["i2t"][found.fold_of_image == f] <= 1).float().mean() for f in range(12 // fold)]
    assert found.metrics["i2t_r1"] == pytest.approx(float(sum(hits)) / len(hits))


def test_the_order_of_captions_changes_nothing_where_all_count():
    scores, owner = brute.random_case(5, images=12)
    order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))
    image, text, owner = tensors(scores, owner)
    straight, shuffled = (
        measure(Protocol("folds", fold=4), image, text[rows], owner[rows]) for rows in (slice(None), order)
    )
    assert straight.metrics == shuffled.metrics
    assert torch.equal(straight.ranks["t2i"][order], shuffled.ranks["t2i"])


def test_the_fields_own_protocols():
    assert PROTOCOLS["coco-5k"] == Protocol("coco-5k", images=5000, captions=5)
    assert PROTOCOLS["coco-1k"] == Protocol("coco-1k", images=5000, captions=5, fold=1000)
    owner = torch.arange(1000).repeat_interleave(5)
    image = torch.eye(8)[torch.arange(1000) % 8]  # eight kinds of images, and of captions
    metrics = measure(PROTOCOLS["flickr30k-1k"], image, image[owner], owner).metrics
    assert metrics["images"] == 1000 and metrics["captions"] == 5000 and "folds" not in metrics
    # All images of the caption's kind tie, so its rank is how many there are; an image's own captions do not count.
    assert metrics["t2i_mean_rank"] == 125 and metrics["t2i_tied_queries"] == 5000
    assert metrics["i2t_mean_rank"] == 1 + 124 * 5


def test_what_does_not_fit_is_said():
    for protocol, counts, message in (
        (PROTOCOLS["coco-5k"], [5] * 4999, "protocol is 'coco-5k', which needs 5000 images; the data has 4999"),
        (PROTOCOLS["coco-1k"], [5] * 1000, "needs 5000 images; the data has 1000"),
        (
            PROTOCOLS["flickr30k-1k"], [5] * 998 + [4, 3],
            "needs 5 captions of each image; 2 of 1000 images have fewer, the first is number 998 with 4",
        ),
        (Protocol("thirds", fold=3), [1] * 10, "protocol is 'thirds', with folds of 3 images; 10 cannot be so cut"),
        (PROTOCOLS["full"], [1, 0], "needs 1 captions of each image; 1 of 2 images have fewer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            protocol.check(counts)
    PROTOCOLS["full"].check([1, 9])
    with pytest.raises(ValueError, match="needs 3 captions"):
        measure(Protocol("three", captions=3), torch.eye(2), torch.eye(2), torch.arange(2))


def test_names():
    assert [protocol.name for protocol in protocols_of(["full", "coco", "coco-5k"])] == ["full", "coco-5k", "coco-1k"]
    assert set(GROUPS["coco"]) < set(PROTOCOLS)
    with pytest.raises(ValueError, match="protocol is 'coco-10k'; it must be one of full, coco-5k"):
        protocols_of(["coco-10k"])
    with pytest.raises(ValueError, match="protocols is empty"):
        protocols_of([])
