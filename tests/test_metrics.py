"""Retrieval metrics against a computation that goes item by item."""
import brute_recall as brute
import pytest
import torch

from mvam_fast.retrieval.evaluation import metrics
from mvam_fast.retrieval.evaluation.metrics import (
    metrics_of_ranks,
    query_blocks,
    recall_metrics,
    retrieval_ranks,
    top_k,
)


def tensors(scores, owner):
    image, text = brute.features(scores)
    return torch.tensor(image), torch.tensor(text), torch.tensor(owner)


@pytest.mark.parametrize("block", [None, 1, 3, 1024])
@pytest.mark.parametrize("seed", range(4))
def test_against_loops_with_ties_and_uneven_captions_in_any_order(block, seed):
    scores, owner = brute.random_case(seed, images=5 + 4 * seed)
    found = recall_metrics(*tensors(scores, owner), ks=(1, 2, 5), block=block)
    assert found == pytest.approx(brute.metrics(scores, owner, (1, 2, 5)))
    assert found["i2t_tied_queries"] > 0 and found["t2i_tied_queries"] > 0


def test_the_rank_of_every_query_and_its_ties():
    scores, owner = brute.random_case(9, images=13)
    found = retrieval_ranks(*tensors(scores, owner))
    strict, lenient = brute.ranks(scores, owner), brute.ranks(scores, owner, ties_count_against=False)
    for way in ("i2t", "t2i"):
        assert found[way].dtype == torch.int64 and found[way].tolist() == strict[way]
        assert (found[way] - found[f"{way}_ties"]).tolist() == lenient[way]
    assert metrics_of_ranks(found) == recall_metrics(*tensors(scores, owner))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(dtype):
    image, text, owner = tensors(*brute.random_case(1, images=8))
    assert recall_metrics(image.to(dtype), text.to(dtype), owner) == recall_metrics(image, text, owner)


def test_a_block_keeps_to_its_memory(monkeypatch):
    """By what each product of matrices gives, all in all what the bound has room for."""
    monkeypatch.setattr(metrics, "SCORE_MEMORY", 4000)
    sizes, product = [], torch.Tensor.__matmul__

    def spying(self, other):
        result = product(self, other)
        sizes.append(result.numel() * 10)
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", spying)
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(20, 4, generator=generator), torch.randn(100, 4, generator=generator)
    recall_metrics(image, text, torch.arange(100) // 5)
    assert max(sizes) <= 4000 and len(sizes) == 5 + 5
    assert sum(sizes) == 2 * 10 * 20 * 100


@pytest.mark.parametrize("queries, size", [(1, 5), (10, 3), (10, 10), (11, 1000), (25, 24), (7, 1)])
def test_blocks_are_whole_and_even(queries, size):
    blocks = list(query_blocks(queries, size))
    assert [query for start, stop in blocks for query in range(start, stop)] == list(range(queries))
    lengths = [stop - start for start, stop in blocks]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


def test_float32_features_are_not_copied(monkeypatch):
    image, text, owner = tensors(*brute.random_case(2, images=8))
    seen, product = set(), torch.Tensor.__matmul__

    def spying(self, other):
        seen.update((self.untyped_storage().data_ptr(), other.untyped_storage().data_ptr()))
        return product(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spying)
    recall_metrics(image, text, owner)
    assert seen == {image.untyped_storage().data_ptr(), text.untyped_storage().data_ptr()}


def test_perfect_and_constant_models():
    features = torch.eye(20)
    owner = torch.arange(20)
    perfect = recall_metrics(features, features, owner)
    assert perfect["rsum"] == perfect["rsum_if_ties_count_for"] == 600 and perfect["i2t_tied_queries"] == 0
    constant = torch.ones(20, 4)
    found = recall_metrics(constant, constant, owner)
    assert found["rsum"] == 0 and found["i2t_median_rank"] == 20
    assert found["rsum_if_ties_count_for"] == 600 and found["t2i_tied_queries"] == 20


@pytest.mark.parametrize("texts", [20, 333])
def test_equal_captions_of_two_images_tie(texts):
    """Whatever the place of a caption in the matrix: nothing of the rounding may decide between them."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(texts, 64, generator=generator), dim=1)
    distinct = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator), dim=1)
    text = distinct.repeat(texts, 1)
    found = retrieval_ranks(image, text, torch.arange(texts))
    assert found["i2t"].tolist() == [texts] * texts and found["i2t_ties"].tolist() == [texts - 1] * texts


def test_bad_input_is_named():
    features, owner = torch.eye(3), torch.arange(3)
    bad = features.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="text_features holds NaN or infinite values in 1 of 3 rows"):
        recall_metrics(features, bad, owner)
    with pytest.raises(ValueError, match="image_features holds NaN or infinite values in 3 of 3 rows"):
        recall_metrics(torch.full((3, 3), float("inf")), features, owner)
    with pytest.raises(ValueError, match="image_of_text has shape"):
        recall_metrics(features, features, owner[:2])
    with pytest.raises(ValueError, match="each needs a caption"):
        recall_metrics(features, features, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="image_of_text goes from 0 to 3; it must lie in 0 to 2"):
        recall_metrics(features, features, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"image_features has shape \(3, 3\) and text_features \(3, 2\)"):
        recall_metrics(features, features[:, :2], owner)
    with pytest.raises(ValueError, match="names 0 images of 0"):
        recall_metrics(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))


def test_top_k():
    corpus, queries = torch.randn(30, 5), torch.randn(7, 5)
    scores, indices = top_k(queries, corpus, 4, block=3)
    full = queries @ corpus.T
    assert torch.equal(indices, full.argsort(1, descending=True)[:, :4])
    torch.testing.assert_close(scores, full.gather(1, indices))
    assert top_k(queries, corpus, 99)[1].shape == (7, 30)
