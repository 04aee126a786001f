"""Where patches lie on the original picture: against the transforms themselves, with a bright square in the dark."""
import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("open_clip")
from mvam_fast import MVAM, create_model_and_transforms  # noqa: E402
from mvam_fast.preprocess import eval_transform  # noqa: E402
from mvam_fast.retrieval.pictures.geometry import patch_map, patch_size  # noqa: E402

SIZES = {"landscape": (301, 200), "portrait": (150, 333), "strip": (600, 100), "small": (40, 31)}
MODES = ("shortest", "squash", "longest")


def transform_of(mode, size=64, **more):
    return eval_transform({"size": size, "resize_mode": mode, "mean": (0, 0, 0), "std": (1, 1, 1), **more})


def light_by_patch(transform, image, grid):
    """Mean brightness of the model's input in each patch [R,C]."""
    pixels = transform(image).mean(0).numpy()
    rows, columns = grid
    return pixels.reshape(rows, pixels.shape[0] // rows, columns, pixels.shape[1] // columns).mean((1, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size, grid", [(64, (4, 4)), ((48, 96), (3, 6)), ((96, 64), (3, 2))])
def test_what_is_drawn_into_a_patch_arrives_in_it(mode, shape, size, grid):
    """Each patch's box is filled on a black original: the input of the model is then bright there and only there."""
    transform, whole = transform_of(mode, size), SIZES[shape]
    patches = patch_map(transform, whole, grid)
    tried = 0
    for row, column in np.ndindex(grid):
        left, top, right, bottom = patches.box(row, column)
        if right - left < 6 or bottom - top < 6:  # padding, or hardly a pixel
            continue
        image = Image.new("RGB", whole)
        ImageDraw.Draw(image).rectangle((np.ceil(left), np.ceil(top), right - 1, bottom - 1), fill="white")
        light = light_by_patch(transform, image, grid)
        assert np.unravel_index(light.argmax(), grid) == (row, column)
        assert light[row, column] > 0.9 * light.sum()
        tried += 1
    assert tried >= 2 or shape == "small"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["landscape", "portrait"])
def test_a_bright_square_is_found_in_the_box_of_the_brightest_patch(mode, shape):
    width, height = SIZES[shape]
    transform, grid = transform_of(mode), (8, 8)
    patches = patch_map(transform, (width, height), grid)
    for across, down in ((0.5, 0.5), (0.4, 0.55), (0.62, 0.35)):
        x, y = across * width, down * height
        image = Image.new("RGB", (width, height))
        ImageDraw.Draw(image).rectangle((x - 4, y - 4, x + 4, y + 4), fill="white")
        light = light_by_patch(transform, image, grid)
        left, top, right, bottom = patches.box(*np.unravel_index(light.argmax(), grid))
        assert left - 4 <= x <= right + 4 and top - 4 <= y <= bottom + 4


def test_borders_to_the_pixel():
    """640 × 480, shortest side to 224: 298 × 224 (its width cut to a whole number), of which 37 columns go left."""
    patches = patch_map(transform_of("shortest", 224), (640, 480), (7, 7))
    np.testing.assert_allclose(patches.columns, (37 + 32 * np.arange(8)) * 640 / 298)
    np.testing.assert_allclose(patches.rows, np.linspace(0, 480, 8))
    assert patches.is_cut and patches.seen == pytest.approx((37 * 640 / 298, 0, 261 * 640 / 298, 480))
    squashed = patch_map(transform_of("squash", 224), (640, 480), (7, 7))
    np.testing.assert_allclose(squashed.columns, np.linspace(0, 640, 8))
    assert not squashed.is_cut
    # 224 × 168 between two bars of 28 rows: the first and the last row of patches are padding, but for 4 rows each.
    padded = patch_map(transform_of("longest", 224), (640, 480), (7, 7))
    np.testing.assert_allclose(padded.rows, (32 * np.arange(8) - 28) * 480 / 168)
    assert not padded.is_cut and padded.seen == (0, 0, 640, 480)
    assert padded.box(0, 0) == pytest.approx((0, 0, 640 / 7, 4 * 480 / 168))
    bars = patch_map(transform_of("longest", 224), (640, 100), (7, 7))
    left, top, right, bottom = bars.box(0, 3)
    assert bottom - top == 0 and bars.padding[0].all()  # all of it is padding
    assert bars.padding.sum(0).tolist() == [4] * 7  # the picture is in rows 94 to 129, which is in three of them
    assert not padded.padding.any()


def test_patches_that_end_before_the_input_does():
    """SigLIP's 384 pixels in patches of 14: 27 of them, and six pixels that no patch covers."""
    patches = patch_map(transform_of("squash", 384), (384, 384), (27, 27), patch=(14, 14))
    np.testing.assert_allclose(patches.rows, 14 * np.arange(28))
    assert patches.is_cut and patches.seen == (0, 0, 378, 378)


def test_the_librarys_patch_size():
    model = create_model_and_transforms("scenes-ViT-T-16", num_views=1)[0]
    assert patch_size(model.image_tower) == (16, 16)
    assert patch_size(model.text_tower) is None
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    config = transformers.SiglipConfig(text_config={**layers, "vocab_size": 9}, vision_config=vision)
    assert patch_size(MVAM(transformers.SiglipModel(config), num_views=1).image_tower) == (8, 8)


def test_what_cannot_be_followed_is_named():
    random = create_model_and_transforms("scenes-ViT-T-16", num_views=1)[1]
    with pytest.raises(ValueError, match="preprocess has the step RandomResizedCrop, whose geometry is unknown"):
        patch_map(random, (64, 64), (4, 4))
    with pytest.raises(ValueError, match="preprocess is a function; it must be a torchvision Compose"):
        patch_map(lambda image: image, (64, 64), (4, 4))
    with pytest.raises(ValueError, match=r"grid \(0, 4\); all four numbers must be at least 1"):
        patch_map(transform_of("squash"), (64, 64), (0, 4))
