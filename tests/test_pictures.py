"""Pictures: attention is drawn where it is, views come in order, files and errors are as said."""
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
open_clip = pytest.importorskip("open_clip")
from mvam_fast import MVAM, cli, get_tokenizer  # noqa: E402
from mvam_fast.preprocess import eval_transform  # noqa: E402
from mvam_fast.retrieval.evaluation.evaluate import load_model  # noqa: E402
from mvam_fast.retrieval.pictures.curves import curves_figure  # noqa: E402
from mvam_fast.retrieval.pictures.geometry import PatchMap  # noqa: E402
from mvam_fast.retrieval.pictures.measures import entropy_share, ranked, view_cosine  # noqa: E402
from mvam_fast.retrieval.pictures.patch_overlay import half_of_it, patch_overlay  # noqa: E402
from mvam_fast.retrieval.pictures.retrieval_sheet import Found, Query, retrieval_sheet  # noqa: E402
from mvam_fast.retrieval.pictures.visualize import visualize  # noqa: E402
from mvam_fast.retrieval.pictures.word_grid import word_grid  # noqa: E402
from mvam_fast.retrieval.pictures.words import WordAttention  # noqa: E402
from mvam_fast.retrieval.scenes import make_scenes  # noqa: E402


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    data = make_scenes(tmp_path_factory.mktemp("scenes"), train=4, val=4, test=12, progress=False)
    return data, data.parent / "images"


@pytest.fixture
def texts_of(monkeypatch):
    """The texts of every figure that is saved, by file name."""
    import matplotlib.figure as module
    from matplotlib.text import Text

    seen = {}
    savefig = module.Figure.savefig

    def record(figure, path, **options):
        seen[len(seen)] = [text.get_text() for text in figure.findobj(Text) if text.get_text()]
        savefig(figure, path, **options)

    monkeypatch.setattr(module.Figure, "savefig", record)
    return seen


def pixels_of(path):
    return np.asarray(Image.open(path).convert("L")).astype(int)


# Measures and order


def test_views_are_sorted_by_entropy():
    attention = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]])
    views = ranked(attention)
    assert views.order == [1, 3, 2, 0]  # of the two one-hot ones the lower number first
    assert views.entropy == pytest.approx([0, 0, 0.5, 1])
    first = (0 + 0.5**0.5 + 0.5) / 3  # to the other one-hot, to the half, to the uniform view
    assert views.overlap[0] == pytest.approx(first) and len(views.overlap) == 4
    assert views.labels()[0] == ("view 2", "0 %", f"{first:.2f}")
    alone = ranked(attention[:1])
    assert alone.overlap == [None] and alone.labels() == [("view 1", "100 %", "")]


def test_entropy_counts_only_what_takes_part():
    attention = torch.zeros(2, 2, 6)
    attention[0, :, :2] = 0.5  # two tokens
    attention[1, :, :1] = 1  # a single one
    assert entropy_share(attention).tolist() == [[1, 1], [0, 0]]
    assert view_cosine(attention).shape == (2, 2, 2)


# Word grids


def words_of(count, views):
    attention = torch.rand(views, count).pow(4)
    words = ["⟨start⟩", *["word" * (1 + number % 3) for number in range(count - 2)], "⟨end⟩"]
    return WordAttention(words, attention / attention.sum(1, keepdim=True), [True, *[False] * (count - 2), True], True)


def test_every_view_and_word_is_in_the_grid(tmp_path, texts_of):
    words = words_of(42, 16)
    word_grid(words, ranked(words.attention), tmp_path / "w.png", "title")
    texts = texts_of[0]
    assert [text for text in texts if text in words.words] == words.words
    bands = texts.count("entropy")
    assert bands > 1  # such a caption is longer than the figure is wide
    for view in range(1, 17):
        assert texts.count(f"view {view}") == bands
    width, height = Image.open(tmp_path / "w.png").size
    assert width < 1600 and height < 3000


def test_the_shade_is_the_attention(tmp_path):
    attention = torch.tensor([[0.0, 1.0]])
    words = WordAttention(["aaaa", "bbbb"], attention, [False, False], True)
    word_grid(words, ranked(attention), tmp_path / "w.png", "t")
    blue = np.asarray(Image.open(tmp_path / "w.png").convert("RGB")).astype(int)
    dark, pale = ((blue == colour).all(-1) for colour in ((8, 48, 107), (247, 251, 255)))
    assert dark.sum() > 300 and pale.sum() > 300  # the ends of the scale
    assert np.argwhere(dark)[:, 1].min() > np.argwhere(pale)[:, 1].max()


@pytest.mark.parametrize("caption", ["東京 😀 \U000fffff", "$a$ and $ $\\frac$", "tab\there\nand there", "x" * 500])
def test_any_caption_can_be_drawn(caption, tmp_path, texts_of):
    attention = torch.tensor([[0.5, 0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        word_grid(WordAttention([caption, "b"], attention, [False, False], True), ranked(attention),
                  tmp_path / "w.png", caption)  # fmt: skip
    assert ("□: a character that this picture's font lacks." in texts_of[0]) == ("東" in caption)


def test_positions_are_said_to_be_positions(tmp_path, texts_of):
    attention = torch.tensor([[0.5, 0.5]])
    word_grid(WordAttention(["1", "2"], attention, [False, False], False), ranked(attention), tmp_path / "w.png", "t")
    assert any("tells no words" in text for text in texts_of[0])


# Overlays


def even_map(size, grid):
    return PatchMap(size, np.linspace(0, size[0], grid[1] + 1), np.linspace(0, size[1], grid[0] + 1))


@pytest.mark.parametrize("prefix", [0, 1])
def test_attention_is_drawn_where_it_is(prefix, tmp_path):
    """All attention on one patch of a white picture: that patch is white, the others are dark."""
    attention = torch.zeros(1, prefix + 12)
    attention[0, prefix + 4 * 2 + 3] = 1  # row 2, column 3 of 3 × 4
    white, path = Image.new("L", (80, 60), 255), tmp_path / "p.png"
    patch_overlay(white, attention, prefix, even_map((80, 60), (3, 4)), ranked(attention), path, "title")
    pixels = pixels_of(path)
    dark = np.abs(pixels - round(255 * (0.2 + 0.8 * 0.12))) <= 2
    (top, bottom), (left, right) = (np.flatnonzero(dark.sum(axis) > 50)[[0, -1]] for axis in (1, 0))
    rows, columns = np.linspace(top, bottom, 7).astype(int)[1::2], np.linspace(left, right, 9).astype(int)[1::2]
    lit = pixels[np.ix_(rows, columns)] > 240
    assert lit.tolist() == [[(r, c) == (2, 3) for c in range(4)] for r in range(3)]


def test_panels_come_in_order_with_their_numbers(tmp_path, texts_of):
    attention = torch.full((3, 5), 0.2)
    attention[1] = torch.tensor([0.5, 0.5, 0, 0, 0])
    attention[2] = torch.tensor([0.1, 0, 0.9, 0, 0])
    image = Image.new("RGB", (30, 30))
    patch_overlay(image, attention, 1, even_map((30, 30), (2, 2)), ranked(attention), tmp_path / "p.png", "title")
    titles = [text.split("\n") for text in texts_of[0] if text.startswith("view ")]
    assert [first.split(" · ")[0] for first, _ in titles] == ["view 3", "view 2", "view 1"]
    assert titles[0][1] == "peak 90 % · class token 10 %" and titles[1][1] == "peak 50 % · class token 50 %"


@pytest.mark.parametrize("mode, size", [("L", (60, 10)), ("P", (10, 60)), ("RGBA", (30, 20)), ("1", (1, 1))])
def test_any_picture_can_be_drawn(mode, size, tmp_path):
    attention, image = torch.rand(4, 4).softmax(1), Image.new(mode, size)
    patches = PatchMap(size, np.array([0.2, 0.5, 0.9]) * size[0], np.array([-0.2, 0.5, 1.2]) * size[1])
    patch_overlay(image, attention, 0, patches, ranked(attention), tmp_path / "p.png", "")
    width, height = Image.open(tmp_path / "p.png").size
    assert 100 < height < 1600 and 400 < width < 1600


@pytest.mark.parametrize("views", [1, 33, 64])
def test_any_number_of_views_can_be_drawn(views, tmp_path, texts_of):
    attention = torch.rand(views, 4).softmax(1)
    patch_overlay(Image.new("L", (2, 2)), attention, 0, even_map((2, 2), (2, 2)), ranked(attention), tmp_path / "p.png",
                  "")  # fmt: skip
    assert sum(text.startswith("view ") for text in texts_of[0]) == views
    width, height = Image.open(tmp_path / "p.png").size
    assert width < 1600 and height < 2200


def test_the_unseen_is_hatched_only_where_there_is_some(tmp_path, texts_of):
    attention = torch.full((1, 4), 0.25)
    image = Image.new("RGB", (40, 40))
    cut = PatchMap((40, 40), np.array([10.0, 20, 30]), np.array([0.0, 20, 40]))
    for patches in (cut, even_map((40, 40), (2, 2))):
        patch_overlay(image, attention, 0, patches, ranked(attention), tmp_path / "p.png", "title")
    assert ["hatched" in " ".join(texts) for texts in texts_of.values()] == [True, False]


def test_attention_to_padding_is_told(tmp_path, texts_of):
    """Two of four rows of patches lie outside of the picture."""
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    patches = PatchMap((40, 20), np.array([0.0, 40]), np.array([-10.0, 0, 10, 20, 30]))
    patch_overlay(Image.new("RGB", (40, 20)), attention, 0, patches, ranked(attention), tmp_path / "p.png", "title")
    assert any(text.endswith("peak 40 % · padding 50 %") for text in texts_of[0])


def test_half_of_the_attention():
    light = np.array([[0.1, 0.3], [0.25, 0.0]])
    assert half_of_it(light).tolist() == [[False, True], [True, False]]  # 0.3 alone is less than half of 0.65
    assert half_of_it(np.array([[0.6, 0.2], [0.1, 0.1]])).tolist() == [[True, False], [False, False]]
    assert half_of_it(np.full((2, 2), 0.25)).all()  # equals belong together


def test_tokens_that_do_not_fit_the_grid(tmp_path):
    attention = torch.full((2, 7), 1 / 7)
    with pytest.raises(ValueError, match="attention is over 7 tokens; it must be over 1 and then a grid of 2 × 2"):
        patch_overlay(Image.new("RGB", (4, 4)), attention, 1, even_map((4, 4), (2, 2)), ranked(attention),
                      tmp_path / "p.png", "")  # fmt: skip


# Sheets


@pytest.mark.parametrize("k", [1, 6])
def test_only_the_true_image_is_framed(k, tmp_path, texts_of):
    image = Image.new("RGB", (20, 30), "white")
    right = Found([(image, 0.9, rank == k - 1) for rank in range(k)], k)
    wrong = Found([(image, 0.9, False) for _ in range(k)], 77)
    free = Found([(image, 0.9, False) for _ in range(k)], None)
    queries = [Query("one", image, {"a": wrong, "b": right}), Query("two", None, {"a": free, "b": free})]
    retrieval_sheet(queries, tmp_path / "s.png")
    assert [text for text in texts_of[0] if text.startswith("✓") and "frame" not in text] == [f"✓ {k} · 0.90"]
    assert "a, true image at rank 77" in texts_of[0] and f"b, true image at rank {k}" in texts_of[0]
    assert texts_of[0].count("a") == texts_of[0].count("b") == 1  # the free query has no rank
    colours = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    green = np.argwhere((colours == (0, 158, 115)).all(-1))
    assert len(green) > 500 and np.ptp(green[:, 1]) < 130  # one frame


def test_curves_of_runs(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "contrastive_loss": 1.9, "image_view_overlap": 0.4}, {"step": 1, "rsum": 100.0}]
    curves_figure({"a": rows, "b": [{"step": 1, "loss": 2.0, "contrastive_loss": 1.9}]}, tmp_path / "c.png")
    assert pixels_of(tmp_path / "c.png").std() > 10


# The whole


def test_visualize_draws_what_it_says(scenes, checkpoint_of, tmp_path, texts_of):
    found = visualize(
        checkpoint_of("views"), *scenes, tmp_path, baseline=checkpoint_of("single"), count=1, texts=["a red circle"],
        progress=False, device="cpu",
    )  # fmt: skip
    files = [f"figures/{kind}-{number}.png" for number in (0, 1) for kind in ("words", "patches")]
    assert [figure["file"] for figure in found] == ["figures/retrieval.png", *files]
    assert "baseline beside MVAM" in found[0]["caption"] and "at random" in found[0]["caption"]
    for figure in found:
        pixels = pixels_of(tmp_path / figure["file"])
        assert pixels.shape[0] > 100 and pixels.std() > 10
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(f["file"][8:] for f in found)
    sheet, words, patches = texts_of[0], texts_of[1], texts_of[2]
    assert "“a red circle”" in sheet and "free query,\nno true image" in sheet
    for view in range(1, 5):
        assert f"view {view}" in words and any(text.startswith(f"view {view} ") for text in patches)
    assert "best image for “a red circle”" in texts_of[4]


def test_the_numbers_in_the_pictures_are_the_models(scenes, checkpoint_of, tmp_path, texts_of):
    visualize(checkpoint_of("global"), *scenes, tmp_path, count=0, texts=["a red circle"], progress=False, device="cpu")
    model, transform, tokenizer = load_model(checkpoint_of("global"), "cpu")
    assert model.num_vectors == 4  # the global view has no attention; the three learned ones are drawn
    with torch.no_grad():
        views = ranked(model.text_attention(tokenizer(["a red circle"]))[0])
    shown = [text for text in texts_of[1] if text.startswith("view ")]
    assert shown == [name for name, _, _ in views.labels()]
    for _, entropy, overlap in views.labels():
        assert entropy in texts_of[1] and overlap in texts_of[1]


def test_images_can_be_chosen_by_id(scenes, checkpoint_of, tmp_path, texts_of):
    from mvam_fast.retrieval.data.datasets import open_dataset

    dataset = open_dataset(*scenes, "test")
    arguments = checkpoint_of("views"), *scenes, tmp_path
    found = visualize(*arguments, count=0, ids=[dataset.image_ids[3]], k=12, progress=False, device="cpu")
    assert found[1]["caption"][1:-1] in dataset.captions[3] and len(found) == 3
    assert sum(text.startswith("✓ ") and "frame" not in text for text in texts_of[0]) == 1  # k is all images
    with pytest.raises(ValueError, match="ids has nothing, which is no image of the split 'test'; it has "):
        visualize(*arguments, ids=["nothing"])


def test_the_rank_is_the_place_in_the_order_shown(scenes, checkpoint_of, tmp_path, monkeypatch):
    from mvam_fast.retrieval.pictures import visualize as module

    sheets = []
    monkeypatch.setattr(module, "retrieval_sheet", lambda queries, path: sheets.append(queries))
    monkeypatch.setattr(module, "_draw_words", lambda *_: None)
    monkeypatch.setattr(module, "_draw_patches", lambda *_: None)
    # Scores of another kind, so that a rank by other scores is told from one by these.
    monkeypatch.setattr(module, "top_k", lambda queries, corpus, k: torch.cdist(queries, -corpus).topk(k))
    tokenized = []
    parts = load_model(checkpoint_of("views"), "cpu")
    monkeypatch.setattr(module, "load_model", lambda *_: (
        *parts[:2], lambda texts: (tokenized.extend(texts), parts[2](texts))[1]))  # fmt: skip
    visualize("folder", *scenes, tmp_path, count=12, k=12, progress=False)
    (queries,) = sheets
    assert len(queries) == 12 and tokenized == [query.text for query in queries]  # none of the other 48 captions
    for query in queries:
        found = query.found["MVAM"]
        scores, right = [score for _, score, _ in found.images], [right for _, _, right in found.images]
        assert sum(right) == 1 and scores == sorted(scores, reverse=True)
        assert found.rank == sum(score >= scores[right.index(True)] for score in scores)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": 13}, "count is 13; it must be 1 to 12, the images of the split"),
        ({"count": 0}, "count is 0; it must be 1 to 12"),
        ({"k": 0}, "k is 0; it must be 1 to 12"),
        ({"texts": [" "]}, "texts has ' '; a query must have a character"),
    ],
)
def test_errors_name_the_argument(options, message, scenes, checkpoint_of, tmp_path):
    with pytest.raises(ValueError, match=message):
        visualize(checkpoint_of("views"), *scenes, tmp_path, **options)
    assert not (tmp_path / "figures").exists()


def test_a_model_without_views(scenes, checkpoint_of, tmp_path):
    with pytest.raises(ValueError, match="has num_views = 0: without learned views there is no attention to draw"):
        visualize(checkpoint_of("single"), *scenes, tmp_path, progress=False)


def test_a_tower_without_class_token(scenes, tmp_path, texts_of, monkeypatch):
    """SigLIP of transformers: all 16 tokens are patches, and the text tower reads its padding."""
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 49408, "max_position_embeddings": 24, "projection_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 8})
    model = MVAM(transformers.SiglipModel(config), num_views=2).eval()
    transform = eval_transform({"size": 32, "resize_mode": "squash"})
    parts = model, transform, get_tokenizer("scenes-ViT-T-16")
    monkeypatch.setattr("mvam_fast.retrieval.pictures.visualize.load_model", lambda folder, device: parts)
    visualize("folder", *scenes, tmp_path, count=1, progress=False)
    assert any("patches: 4 × 4" in text for text in texts_of[2]) and not any("token" in text for text in texts_of[2])
    assert any(text.startswith("⟨padding ×") for text in texts_of[1])


def test_a_tower_without_grid(scenes, tmp_path):
    pytest.importorskip("timm")
    text = {"context_length": 24, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 1}
    vision = {"timm_model_name": "resnet10t", "timm_proj": "linear", "timm_pool": "avg", "image_size": 64}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    known = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {"size": 64}}
    MVAM(open_clip.CustomTextCLIP(**config), num_views=2, open_clip_config=known).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: its image tower \(TimmTower\) has no grid of patches"):
        visualize(tmp_path / "model", *scenes, tmp_path, count=1, progress=False, device="cpu")


def test_the_command_passes_on_its_flags(monkeypatch, capsys):
    from mvam_fast.retrieval.pictures import visualize as module

    given = {}

    def visualize(*arguments, **options):
        given.update(options, arguments=arguments)
        return [{"file": "figures/a.png"}]

    monkeypatch.setattr(module, "visualize", visualize)
    command = ["visualize", "m", "--data", "d", "--images", "i", "--out", "o", "--text", "a dog", "--text", "a cat"]
    assert cli.main([*command, "--k", "3", "--ids", "7", "8", "--count", "0", "--baseline", "b"]) == 0
    assert given["arguments"] == ("m", "d", "i", "o") and given["texts"] == ["a dog", "a cat"]
    assert given["k"] == 3 and given["ids"] == ["7", "8"] and given["count"] == 0 and given["baseline"] == "b"
    assert capsys.readouterr().out == "o/figures/a.png\n"
