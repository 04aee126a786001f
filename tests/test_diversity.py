"""The diversity report: its numbers against the model's attention, dead views that were made so, and its files."""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("open_clip")
from mvam_fast import MVAM, cli, create_model_and_transforms  # noqa: E402
from mvam_fast.retrieval.data.datasets import UnreadableImage, open_dataset  # noqa: E402
from mvam_fast.retrieval.evaluation.evaluate import load_model  # noqa: E402
from mvam_fast.retrieval.pictures.diversity import ViewStatistics, diversity  # noqa: E402
from mvam_fast.retrieval.pictures.measures import mean_to_others, view_cosine  # noqa: E402
from mvam_fast.retrieval.scenes import make_scenes  # noqa: E402


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    data = make_scenes(tmp_path_factory.mktemp("scenes"), train=4, val=8, test=4, progress=False)
    return data, data.parent / "images"


@pytest.fixture
def unwritten(monkeypatch):
    """The numbers alone: no files, whose drawing takes most of the time."""
    monkeypatch.setattr("mvam_fast.retrieval.pictures.diversity.write_report", lambda report, out: report)


def measured(*batches):
    statistics = ViewStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch, {})
    return statistics.result()


def reasons(result):
    return [view["dead"] for view in result["views"]]


def drawn(samples, views, tokens, seed=0):
    """Attention that depends on the sample."""
    return torch.randn(samples, views, tokens, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


# Dead views that were made


def test_views_that_live():
    assert reasons(measured(drawn(20, 4, 9))) == [[], [], [], []]


def test_a_uniform_view_is_dead():
    attention = drawn(20, 3, 9)
    attention[:, 1] = 1 / 9
    assert reasons(measured(attention)) == [[], ["uniform", "constant"], []]


def test_a_view_of_positions_alone_is_dead():
    attention = drawn(20, 3, 9)
    attention[:, 2] = drawn(1, 1, 9)[0]
    assert reasons(measured(attention)) == [[], [], ["constant"]]
    assert reasons(measured(attention[:1])) == [[], [], []]  # a single sample tells nothing of it
    assert measured(attention[:1])["views"][0]["constancy"] is None


def test_a_view_of_the_end_of_the_text_is_dead():
    """Texts of different lengths: the last token is always another position, counted from the start."""
    attention = torch.zeros(20, 2, 12)
    for sample, row in enumerate(drawn(20, 1, 12)[:, 0]):
        length = 4 + sample % 7
        attention[sample, 0, :length] = row[:length] / row[:length].sum()
        attention[sample, 1, length - 1] = 1
    result = measured(attention)
    assert reasons(result) == [[], ["constant"]]
    assert result["views"][1]["constancy"] == pytest.approx(1) and result["tokens"] == 10


def test_the_later_of_two_equal_views_is_dead():
    attention = drawn(20, 4, 9)
    attention[:, 3] = attention[:, 1]
    result = measured(attention)
    assert reasons(result) == [[], [], [], ["duplicates view 2"]] and result["dead"] == [4]


def test_one_view_has_no_others():
    result = measured(drawn(3, 1, 5))
    assert result["mean_cosine"] is None and result["views"][0]["cosine_to_others"] is None
    json.dumps(result, allow_nan=False)


# Numbers


def test_batches_do_not_matter_and_may_be_of_any_length():
    attention = drawn(12, 3, 9)
    attention[:6, :, 7:] = 0  # as of a batch that is padded to seven tokens only
    attention /= attention.sum(-1, keepdim=True)
    whole, parts = measured(attention), measured(attention[:4, :, :7], attention[4:6, :, :7], attention[6:])
    flat = [json.dumps(result, default=float) for result in (whole, parts)]
    numbers = [[float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)] for text in flat]
    assert len(numbers[0]) > 20
    np.testing.assert_allclose(*numbers, rtol=1e-9)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="samples is 0"):
        ViewStatistics(2).result()


def test_the_report_against_the_models_attention(scenes, checkpoint_of, tmp_path, unwritten):
    folder = checkpoint_of("views")
    report = diversity(folder, *scenes, tmp_path, batch_size=3, device="cpu", progress=False)
    model, transform, tokenizer = load_model(folder, "cpu")
    dataset = open_dataset(*scenes, "val")
    captions = [caption for found in dataset.captions for caption in found]
    ids = tokenizer(captions)
    with torch.no_grad():
        pictures = torch.stack([transform(dataset.load_image(i)) for i in range(8)])
        image, text = model.image_attention(pictures).double(), model.text_attention(ids).double()
    for name, attention, tokens in (("image", image, torch.full((8,), 17)), ("text", text, ids.argmax(1) + 1)):
        tower = report["towers"][name]
        assert (tower["samples"], tower["tokens"]) == (len(attention), int(tokens.max()))
        entropy = -(attention * attention.clamp_min(1e-300).log()).sum(-1) / tokens[:, None].log()
        cosine = torch.nn.functional.cosine_similarity(attention[:, :, None], attention[:, None], dim=-1).mean(0)
        off = cosine[~torch.eye(4, dtype=bool)]
        column = {key: [view[key] for view in tower["views"]] for key in tower["views"][0]}
        np.testing.assert_allclose(column["entropy"], entropy.mean(0), rtol=1e-5)
        np.testing.assert_allclose(column["entropy_spread"], entropy.std(0, correction=0), rtol=1e-4)
        np.testing.assert_allclose(tower["cosine"], cosine, rtol=1e-5)
        np.testing.assert_allclose(column["cosine_to_others"], off.view(4, 3).mean(1), rtol=1e-5)
        assert tower["mean_cosine"] == pytest.approx(off.mean().item())
        assert tower["mean_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    shares = [view["share"] for view in report["towers"]["image"]["views"]]
    np.testing.assert_allclose([share["class token"] for share in shares], image[..., 0].mean(0), rtol=1e-5)
    shares = [view["share"] for view in report["towers"]["text"]["views"]]
    np.testing.assert_allclose([share["start"] for share in shares], text[..., 0].mean(0), rtol=1e-5)
    end = text[torch.arange(len(text)), :, ids.argmax(1)].mean(0)
    np.testing.assert_allclose([share["end"] for share in shares], end, rtol=1e-5)
    assert all(share["padding"] == 0 for share in shares)
    pairs = mean_to_others(view_cosine(image)).mean(0)
    found = [view["cosine_to_others"] for view in report["towers"]["image"]["views"]]
    np.testing.assert_allclose(found, pairs, rtol=1e-5)


def test_a_model_with_dead_views_is_told(scenes, tmp_path):
    """A view code of 0 looks everywhere alike; one that is copied is a duplicate."""
    torch.manual_seed(0)
    model = create_model_and_transforms("scenes-ViT-T-16", num_views=4)[0]
    with torch.no_grad():
        for pool in (model.image_pool, model.text_pool):
            pool.codes[0] = 0
            pool.codes[3] = pool.codes[2]
    model.save_pretrained(tmp_path / "model")
    report = diversity(tmp_path / "model", *scenes, tmp_path / "out", device="cpu", progress=False)
    for tower in report["towers"].values():
        found = reasons(tower)
        assert "uniform" in found[0] and found[3][-1] == "duplicates view 3" and "duplicates" not in str(found[:3])
        assert {1, 4} <= set(tower["dead"]) and "4 (" in tower["sentence"]
    page = (tmp_path / "out/diversity.html").read_text()
    assert "duplicates view 3" in page and "uniform" in page


# Files


def test_the_files(scenes, checkpoint_of, tmp_path):
    report = diversity(checkpoint_of("global"), *scenes, tmp_path, device="cpu", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diversity.html", "diversity.json", "diversity.png"]
    assert json.loads((tmp_path / "diversity.json").read_text()) == report
    page = (tmp_path / "diversity.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 1
    for tower in report["towers"].values():
        assert tower["sentence"] in page
        for view in tower["views"]:
            assert f"{100 * view['entropy']:.1f} %" in page and f"<td>{view['gate']:.2f}</td>" in page
            assert all(f"{100 * share:.1f} %" in page for share in view["share"].values() if share)
    assert np.asarray(Image.open(tmp_path / "diversity.png").convert("L")).std() > 10


def test_a_tokenizer_that_names_nothing(scenes, checkpoint_of, tmp_path, monkeypatch):
    model, transform, tokenizer = load_model(checkpoint_of("views"), "cpu")

    def bare(texts):
        return tokenizer(texts)

    name = "mvam_fast.retrieval.pictures.diversity.load_model"
    monkeypatch.setattr(name, lambda folder, device: (model, transform, bare))
    report = diversity("folder", *scenes, tmp_path, progress=False)
    assert report["towers"]["text"]["views"][0]["share"] == {}
    assert "does not tell which tokens are special" in (tmp_path / "diversity.html").read_text()


def test_a_tower_without_grid_is_measured_too(scenes, tmp_path, monkeypatch, checkpoint_of, unwritten):
    model, transform, tokenizer = load_model(checkpoint_of("views"), "cpu")
    model.image_tower.grid, model.image_tower.prefix_tokens = None, 0
    monkeypatch.setattr(
        "mvam_fast.retrieval.pictures.diversity.load_model", lambda folder, device: (model, transform, tokenizer)
    )
    report = diversity("folder", *scenes, tmp_path, progress=False)
    assert report["towers"]["image"]["tokens"] == 17 and report["towers"]["image"]["views"][0]["share"] == {}


def test_unreadable_images(checkpoint_of, tmp_path):
    data = make_scenes(tmp_path / "scenes", train=4, val=8, test=4, progress=False)
    images = data.parent / "images"
    paths = sorted((images / "val").iterdir())
    paths[2].write_bytes(b"no picture")
    arguments = checkpoint_of("views"), data, images, tmp_path / "out"
    with pytest.raises(UnreadableImage, match=paths[2].name):
        diversity(*arguments, device="cpu", progress=False)
    report = diversity(*arguments, strict=False, batch_size=1, device="cpu", progress=False)
    assert report["unreadable_images"] == 1 and report["towers"]["image"]["samples"] == 7
    assert "left out as unreadable: 1 images" in (tmp_path / "out/diversity.html").read_text()
    for path in paths:
        path.write_bytes(b"no picture")
    with pytest.raises(UnreadableImage):
        diversity(*arguments, strict=False, device="cpu", progress=False)


def test_errors_name_the_argument(scenes, checkpoint_of, tmp_path):
    with pytest.raises(ValueError, match="has num_views = 0: it has no learned views to compare"):
        diversity(checkpoint_of("single"), *scenes, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        diversity(checkpoint_of("views"), *scenes, tmp_path / "out", batch_size=0)
    assert not (tmp_path / "out").exists()


def test_the_command(scenes, checkpoint_of, tmp_path, capsys):
    command = ["diversity", str(checkpoint_of("views")), "--data", str(scenes[0]), "--images", str(scenes[1])]
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out/diversity.json").read_text())
    assert report["split"] == "val"
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [tower["sentence"] for tower in report["towers"].values()]
    assert lines[2] == f"report: {tmp_path}/out/diversity.html"


def test_it_is_of_the_learned_views_only(scenes, checkpoint_of, tmp_path, unwritten):
    report = diversity(checkpoint_of("global"), *scenes, tmp_path, device="cpu", progress=False)
    model = MVAM.from_pretrained(checkpoint_of("global"))
    for name, tower in report["towers"].items():
        gates = [view["gate"] for view in tower["views"]]
        assert gates == getattr(model, f"{name}_gates").tolist() and len(gates) == 3
