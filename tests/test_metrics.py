"""Retrieval metrics against a loop over every pair."""
import pytest
import torch

from mvam_fast.retrieval.metrics import recall_metrics, top_k


def by_loops(image, text, owner, ks):
    scores = image.double() @ text.double().T
    ranks = {"i2t": [], "t2i": []}
    for i in range(len(image)):
        own = [t for t in range(len(text)) if owner[t] == i]
        best = max(scores[i, t] for t in own)
        ranks["i2t"].append(1 + sum(bool(scores[i, t] >= best) for t in range(len(text)) if owner[t] != i))
    for t in range(len(text)):
        right = scores[owner[t], t]
        ranks["t2i"].append(1 + sum(bool(scores[i, t] >= right) for i in range(len(image)) if i != owner[t]))
    found = {f"{d}_r{k}": 100 * sum(r <= k for r in ranks[d]) / len(ranks[d]) for d in ranks for k in ks}
    found["rsum"] = sum(found.values())
    for d in ranks:
        found[f"{d}_mean_rank"] = float(sum(ranks[d]) / len(ranks[d]))
        found[f"{d}_median_rank"] = float(torch.tensor(ranks[d]).double().quantile(0.5))
    return found


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_against_loops_with_ties_and_uneven_captions(block):
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6])[torch.randperm(13, generator=generator)]
    image = torch.randint(-2, 3, (7, 4), generator=generator).float()  # integers: many exact ties
    text = torch.randint(-2, 3, (13, 4), generator=generator).float()
    found = recall_metrics(image, text, owner, ks=(1, 2, 5), block=block)
    expected = by_loops(image, text, owner, (1, 2, 5))
    assert found.pop("images") == 7 and found.pop("captions") == 13
    assert found == pytest.approx(expected)


def test_perfect_and_constant_models():
    features = torch.eye(20)
    owner = torch.arange(20)
    assert recall_metrics(features, features, owner)["rsum"] == 600
    constant = torch.ones(20, 4)
    found = recall_metrics(constant, constant, owner)
    assert found["rsum"] == 0 and found["i2t_median_rank"] == 20


def test_bad_input_is_named():
    features, owner = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="text_features holds NaN"):
        recall_metrics(features, torch.full((3, 3), float("nan")), owner)
    with pytest.raises(ValueError, match="image_of_text has shape"):
        recall_metrics(features, features, owner[:2])
    with pytest.raises(ValueError, match="each needs a caption"):
        recall_metrics(features, features, torch.tensor([0, 0, 1]))


def test_top_k():
    corpus, queries = torch.randn(30, 5), torch.randn(7, 5)
    scores, indices = top_k(queries, corpus, 4, block=3)
    full = queries @ corpus.T
    assert torch.equal(indices, full.argsort(1, descending=True)[:, :4])
    torch.testing.assert_close(scores, full.gather(1, indices))
    assert top_k(queries, corpus, 99)[1].shape == (7, 30)
