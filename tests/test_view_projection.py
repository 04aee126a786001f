"""Narrow views: widths that fit a budget, how they start, dropping views, saving, export."""
import pytest
import torch

from mvam_fast import MVAM, create_model_and_transforms, get_tokenizer
from mvam_fast.view_projection import ViewProjection, resolve

NAME = "scenes-ViT-T-16"  # its encoders project to E = 32


def made(**settings):
    torch.manual_seed(0)
    return create_model_and_transforms(NAME, None, **{"num_views": 4, **settings})[0].eval()


@pytest.fixture(scope="module")
def inputs():
    texts = get_tokenizer(NAME)(["a red circle", "two", "a small blue bar above a cross"])
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)), texts


def similarities(model, inputs):
    with torch.no_grad():
        output = model(*inputs)
    return output["image_features"] @ output["text_features"].T


@pytest.mark.parametrize("num_views, view_dim", [(4, 8), (8, 4), (3, 32), (8, 12), (64, 1)])
def test_a_wrapped_model_keeps_its_similarities(num_views, view_dim, inputs):
    """Wherever M·e is a multiple of E; 8·12 = 3·32."""
    model = made(num_views=num_views, view_dim=view_dim, global_view=True)
    clip = model.clip
    expected = clip.encode_image(inputs[0], normalize=True) @ clip.encode_text(inputs[1], normalize=True).T
    torch.testing.assert_close(similarities(model, inputs), expected.detach(), rtol=0, atol=1e-6)
    assert model(*inputs)["image_features"].shape == (3, 32 + num_views * view_dim)


@pytest.mark.parametrize("projection", ["shared", "per_view"])
def test_against_a_loop(projection):
    projected = ViewProjection(6, 4, 3, projection)
    torch.nn.init.normal_(projected.weight)
    views = torch.randn(2, 3, 6)
    found = projected(views)
    for i in range(3):
        matrix = projected.weight[0 if projection == "shared" else i]
        torch.testing.assert_close(found[:, i], views[:, i] @ matrix)


def test_it_draws_no_random_numbers_of_the_weights():
    assert all(
        torch.equal(a, b) for a, b in zip(made().parameters(), list(made(view_dim=8).parameters())[:-2], strict=True)
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((None, None, None), ("encoder", 512)),
        ((None, 64, None), ("per_view", 64)),
        (("shared", 64, None), ("shared", 64)),
        (("per_view", None, None), ("per_view", 512)),
        ((None, None, 9000), ("encoder", 512)),  # 16 · 512 fit
        ((None, None, 2000), ("per_view", 125)),
        (("shared", None, 4000), ("shared", 250)),
        ((None, 100, 2000), ("per_view", 100)),
    ],
)
def test_widths_that_fit(arguments, expected):
    assert resolve(*arguments, num_views=16, global_view=False, width=512) == expected


def test_the_global_view_counts_in_the_budget():
    assert resolve(None, None, 2000, 16, True, 512) == ("per_view", 93)
    model = made(max_width=60, global_view=True)
    assert model.view_dim == 7 and model.embedding_width(32) == 32 + 4 * 7


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"projection": "own"}, "projection is 'own'; it must be None or one of encoder, shared, per_view"),
        ({"view_dim": 0}, "view_dim is 0"),
        ({"view_dim": 8, "projection": "encoder"}, "leaves views at the encoder's width 32"),
        ({"max_width": 3}, "max_width is 3, too little for 4 views; it must be at least 4"),
        ({"max_width": 33, "global_view": True}, "beside the global view of 32; it must be at least 36"),
        ({"max_width": 30, "view_dim": 8}, "max_width is 30, but 4 views of view_dim 8 are 32 numbers"),
        ({"num_views": 0, "global_view": True, "view_dim": 8}, "num_views is 0; projection, view_dim and max_width"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"view_dim": 5}, {"projection": "shared", "view_dim": 5}, {"view_dim": 5, "global_view": True}]
)
def test_dropped_views_leave_the_others(settings, inputs):
    model = made(**settings)
    if model.global_view:
        torch.nn.init.uniform_(model.image_gates)
        torch.nn.init.uniform_(model.text_gates)
    kept = model.select_views([3, 1])
    width, own = model.view_dim or 32, 32 * model.global_view
    pieces = [slice(0, own), slice(own + 3 * width, own + 4 * width), slice(own + width, own + 2 * width)]
    with torch.no_grad():
        for encode in ("encode_image", "encode_text"):
            whole = getattr(model, encode)(inputs[encode == "encode_text"])
            found = getattr(kept, encode)(inputs[encode == "encode_text"])
            torch.testing.assert_close(found, torch.cat([whole[:, piece] for piece in pieces], 1), rtol=0, atol=1e-6)
    assert (model.num_views, kept.num_views) == (4, 2)
    assert kept.image_attention(inputs[0]).shape[1] == 2


@pytest.mark.parametrize("views", [[], [0, 0], [4], [-1]])
def test_views_that_there_are_not(views):
    with pytest.raises(ValueError, match="it must name at least one of the views 0 to 3, each once"):
        made().select_views(views)


def test_saved_and_read(tmp_path, inputs):
    for name, model in (("whole", made(view_dim=6)), ("kept", made(view_dim=6).select_views([2, 0]))):
        model.save_pretrained(tmp_path / name)
        read = MVAM.from_pretrained(tmp_path / name)
        assert (read.view_dim, read.num_views) == (6, model.num_views)
        torch.testing.assert_close(similarities(read, inputs), similarities(model, inputs))


@pytest.mark.parametrize("settings", [{"view_dim": 5, "global_view": True}])
def test_exported(settings, tmp_path, inputs):
    """The export compares with PyTorch itself; here, that its manifest tells the widths."""
    pytest.importorskip("onnxruntime")
    from mvam_fast.export.to_onnx import export_bundle

    made(**settings).save_pretrained(tmp_path / "model")
    manifest = export_bundle(tmp_path / "model", tmp_path / "bundle")
    own = 32 * settings.get("global_view", False)
    assert manifest["embedding_width"] == own + 4 * 5 and manifest["vector_width"] == 5
