"""The paired bootstrap: known cases, its coverage on made-up data, and what it refuses to compare."""
import json
import shutil

import numpy as np
import pytest

from mvam_fast import cli
from mvam_fast.retrieval.evaluation import protocols, significance
from mvam_fast.retrieval.evaluation.evaluate import evaluate
from mvam_fast.retrieval.evaluation.protocols import Protocol
from mvam_fast.retrieval.evaluation.significance import Ranks, bootstrap, compare, comparison_table
from mvam_fast.retrieval.scenes import make_scenes


def made_up(images, captions=5, folds=1, seed=0, easy=0.0):
    """Ranks of random queries; with `easy`, that share of them is answered by the first item."""
    rng = np.random.default_rng(seed)
    owner = np.arange(images).repeat(captions)

    def ranks(count):
        return np.where(rng.random(count) < easy, 1, rng.integers(1, 40, count))

    return Ranks(ranks(images), ranks(len(owner)), owner, np.arange(images) * folds // images)


def recalls_by_loops(ranks):
    """RSUM and recalls, fold by fold."""
    found, folds = {}, sorted(set(ranks.fold_of_image.tolist()))
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            each = []
            for fold in folds:
                images = [i for i, f in enumerate(ranks.fold_of_image) if f == fold]
                queries = [r for i, r in enumerate(ranks.i2t) if i in images]
                if way == "t2i":
                    queries = [r for r, i in zip(ranks.t2i, ranks.image_of_text, strict=True) if i in images]
                each.append(100 * sum(r <= k for r in queries) / len(queries))
            found[f"{way}_r{k}"] = sum(each) / len(each)
    return {"rsum": sum(found.values()), **found}


@pytest.mark.parametrize("folds", [1, 4])
def test_values_and_differences_are_the_recalls_own(folds):
    a, b = made_up(24, folds=folds, seed=1), made_up(24, folds=folds, seed=2, easy=0.3)
    uneven = np.sort(np.concatenate([np.arange(24), np.random.default_rng(0).integers(0, 24, 96)]))
    a, b = a._replace(image_of_text=uneven), b._replace(image_of_text=uneven)
    found = bootstrap(a, b, resamples=200)
    before, after = recalls_by_loops(a), recalls_by_loops(b)
    assert list(found) == list(before)
    for name, row in found.items():
        assert row["a"] == pytest.approx(before[name]) and row["b"] == pytest.approx(after[name])
        assert row["difference"] == pytest.approx(after[name] - before[name])
        assert row["low"] <= row["difference"] <= row["high"]


@pytest.mark.parametrize("folds", [1, 5])
def test_identical_results_differ_by_nothing(folds):
    one = made_up(50, folds=folds)
    for row in bootstrap(one, one, resamples=300).values():
        assert row["difference"] == row["low"] == row["high"] == 0 and row["a"] == row["b"]


@pytest.mark.parametrize("folds", [1, 5])
def test_a_clear_difference_excludes_nothing_changed(folds):
    row = bootstrap(made_up(200, folds=folds), made_up(200, folds=folds, seed=1, easy=0.5), resamples=500)["rsum"]
    assert 0 < row["low"] < row["difference"] < row["high"]
    back = bootstrap(made_up(200, folds=folds, seed=1, easy=0.5), made_up(200, folds=folds), resamples=500)["rsum"]
    assert (back["low"], back["high"]) == pytest.approx((-row["high"], -row["low"]))


def test_against_a_bootstrap_image_by_image():
    """The same draws, counted by loops over the drawn images."""
    a, b = made_up(30, seed=1), made_up(30, seed=2, easy=0.2)
    found = bootstrap(a, b, resamples=40, seed=7)
    rng, differences = np.random.default_rng(7), []
    for drawn in rng.integers(30, size=(40, 30)):
        sums = [0.0, 0.0]
        for number, ranks in enumerate((a, b)):
            for k in (1, 5, 10):
                i2t = [ranks.i2t[i] <= k for i in drawn]
                t2i = [rank <= k for i in drawn for rank in ranks.t2i[ranks.image_of_text == i]]
                sums[number] += 100 * sum(i2t) / len(i2t) + 100 * sum(t2i) / len(t2i)
        differences.append(sums[1] - sums[0])
    low, high = np.percentile(differences, [2.5, 97.5])
    assert found["rsum"]["low"] == pytest.approx(low) and found["rsum"]["high"] == pytest.approx(high)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Of 150 pairs of samples, where the true difference of i2t R@1 is 10 points."""
    inside = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        same = rng.random(150)
        owner = np.arange(150)
        a, b = (
            Ranks(np.where(same < share, 1, 20), np.full(150, 20), owner, np.zeros(150, int)) for share in (0.4, 0.5)
        )
        row = bootstrap(a, b, resamples=300, seed=seed)["i2t_r1"]
        inside += row["low"] <= 10 <= row["high"]
    assert 0.88 <= inside / 150 <= 1


def test_the_seed_decides_and_the_block_does_not(monkeypatch):
    a, b = made_up(30), made_up(30, seed=1, easy=0.1)
    first = bootstrap(a, b, resamples=100, seed=3)
    monkeypatch.setattr(significance, "_BLOCK_BYTES", 8 * 30 * 7)
    assert bootstrap(a, b, resamples=100, seed=3) == first != bootstrap(a, b, resamples=100, seed=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory, checkpoint_of):
    """Folder of a.json (4 views), b.json (3 and the global one), by COCO's protocols on 16 images, and others."""
    folder = tmp_path_factory.mktemp("compare")
    data = make_scenes(folder / "scenes", train=4, val=4, test=16, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, fold in (("coco-5k", None), ("coco-1k", 4)):
            patch.setitem(protocols.PROTOCOLS, name, Protocol(name, images=16, captions=5, fold=fold))
        for file, model, wanted, options in (
            ("a", "views", ["coco"], {}), ("b", "global", ["coco"], {}), ("full", "views", ["full"], {}),
            ("three", "views", ["full"], {"captions_per_image": 3}), ("val", "views", ["full"], {"split": "val"}),
        ):  # fmt: skip
            evaluate(
                checkpoint_of(model), data, data.parent / "images", protocols=wanted, out=folder / f"{file}.json",
                device="cpu", progress=False, **options,
            )  # fmt: skip
    return folder


def test_two_models_by_each_protocol(results, tmp_path):
    found = compare(results / "a.json", results / "b.json", resamples=200, out=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert list(found["by_protocol"]) == ["coco-5k", "coco-1k"] and found["interval"] == 95
    measured = [json.loads((results / f"{name}.json").read_text())["by_protocol"] for name in "ab"]
    for protocol, rows in found["by_protocol"].items():
        for name, row in rows.items():
            assert row["a"] == pytest.approx(measured[0][protocol][name])
            assert row["b"] == pytest.approx(measured[1][protocol][name])
    table = comparison_table(found)
    row = found["by_protocol"]["coco-1k"]["rsum"]
    assert f"{row['difference']:+.2f}" in table and f"{row['low']:+.2f} to {row['high']:+.2f}" in table


def test_what_was_measured_on_other_queries_is_refused(results):
    def refuses(a, b, message):
        with pytest.raises(ValueError, match=message):
            compare(results / f"{a}.json", results / f"{b}.json")

    refuses("a", "full", r"they differ in protocols: \['coco-5k', 'coco-1k'\] and \['full'\]$")
    refuses("full", "three", "they differ in captions: ")
    refuses("full", "val", "they differ in split: test and val; images .*; captions: ")


def test_files_that_are_no_results_or_do_not_belong_together(results, tmp_path):
    with pytest.raises(FileNotFoundError, match="b: no such file"):
        compare(results / "a.json", results / "nope.json")
    (tmp_path / "other.json").write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match="a: .*other.json is no result of mvam-fast evaluate --out"):
        compare(tmp_path / "other.json", results / "a.json")
    with pytest.raises(ValueError, match="resamples is 0"):
        compare(results / "a.json", results / "a.json", resamples=0)
    shutil.copy(results / "a.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="which is not there"):
        compare(tmp_path / "a.json", results / "b.json")
    shutil.copy(results / "b.ranks.safetensors", tmp_path / "a.ranks.safetensors")
    with pytest.raises(ValueError, match="a.ranks.safetensors is not the file that .*a.json was written with"):
        compare(tmp_path / "a.json", results / "b.json")


def test_command_line(results, tmp_path, capsys):
    files = [str(results / "a.json"), str(results / "b.json")]
    assert cli.main(["compare", *files, "--resamples", "50", "--seed", "2", "--out", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown and "50 resamples, seed 2" in shown and "coco-1k" in shown
    assert json.loads((tmp_path / "c.json").read_text()) == compare(*files, resamples=50, seed=2)
    assert cli.main(["compare", files[0], str(results / "full.json")]) == 2
    assert "mvam-fast: error: a and b were not measured on the same queries" in capsys.readouterr().err
