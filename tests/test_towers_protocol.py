"""Towers of the user's own: what is asked of them, that they are trained and saved, and what is refused."""
import copy
import json

import open_clip
import pytest
import torch
from torch import nn

from mvam_fast import MVAM, MVAMLoss, create_model_and_transforms, get_tokenizer
from mvam_fast.towers import Tokens, TowerAdapter

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [9, 9, 9, 9]])  # 0 is padding
EMBED = 32


class ImageTower(nn.Module):
    """Patches of 16 pixels and their mean in front, through a LayerNorm that is left to the pooling."""

    width, prefix_tokens, grid = 24, 1, (4, 4)

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, self.width, 16, stride=16)
        self.norm = nn.LayerNorm(self.width)
        self.projection = nn.Linear(self.width, EMBED, bias=False)

    def tokens(self, inputs, need_pooled):
        hidden = self.patches(inputs).flatten(2).mT
        hidden = torch.cat([hidden.mean(1, keepdim=True), hidden], 1)
        pooled = self.project(self.norm(hidden[:, 0])) if need_pooled else None
        return Tokens(hidden, norm=self.norm, pooled=pooled)

    def project(self, views):
        return self.projection(views)

    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable

    def no_weight_decay(self):
        return {"norm.weight"}


class TextTower(nn.Module):
    """Words by themselves, of another width; padding does not count."""

    width, prefix_tokens, grid = 16, 0, None

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, self.width)
        self.projection = nn.Linear(self.width, EMBED)

    def tokens(self, inputs, need_pooled):
        hidden, mask = self.words(inputs), inputs != 0
        pooled = self.project(hidden[:, 0]) if need_pooled else None
        return Tokens(hidden, mask=mask, pooled=pooled)

    def project(self, views):
        return self.projection(views)


class Borrowed(nn.Module):
    """A part of another model with something of its own behind it; what is borrowed has two names in the end."""

    prefix_tokens, grid = 1, (4, 4)

    def __init__(self, visual):
        super().__init__()
        self.visual, self.width = visual, visual.ln_post.normalized_shape[0]
        self.more = nn.Linear(self.width, EMBED)

    def tokens(self, inputs, need_pooled):
        hidden = self.visual.transformer(self.visual._embeds(inputs))
        return Tokens(self.visual.ln_post(hidden))

    def project(self, views):
        return self.more(views)


def own(**arguments):
    torch.manual_seed(0)
    return MVAM(image_tower=ImageTower(), text_tower=TextTower(), **arguments).eval()


def scenes_clip():
    torch.manual_seed(0)
    return create_model_and_transforms("scenes-ViT-T-16", num_views=1)[0].eval()


def test_a_pair_of_own_towers():
    model = own(num_views=3, global_view=True)
    assert isinstance(model.image_tower, TowerAdapter) and isinstance(model.text_tower, TowerAdapter)
    tower = model.image_tower
    image = model.encode_image(IMAGES).unflatten(1, (4, EMBED))
    expected = tower.tokens(IMAGES, need_pooled=True).pooled
    assert all(torch.equal(view, expected) for view in image.unbind(1))
    assert model.encode_text(IDS).shape == (3, 4 * EMBED)
    output = model(IMAGES, IDS)
    torch.testing.assert_close(output["logit_scale"], torch.tensor(1 / 0.07))
    assert "logit_bias" not in output and output["image_gram"].shape == (3, 3, 3)
    attention = model.text_attention(IDS)
    assert (attention[1, :, 1:] == 0).all() and (attention[2] > 0).all()
    assert model.image_attention(IMAGES).shape == (3, 3, 17)


def test_their_parameters_are_trained_with_the_model():
    model = own(num_views=2).train()
    assert {"image_tower.patches.weight", "text_tower.words.weight", "clip.logit_scale"} <= {
        name for name, _ in model.named_parameters()
    }
    MVAMLoss(0.01)(**model(IMAGES, IDS)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.no_weight_decay() == {"image_pool.codes", "text_pool.codes", "image_tower.norm.weight"}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.image_tower.patches.weight.zero_()
    assert twin.image_tower.patches.weight.abs().sum() > 0 and twin.image_tower is not model.image_tower


def test_their_folder(tmp_path):
    model = own(num_views=2, global_view=True)
    with torch.no_grad():
        model.image_gates.uniform_(), model.text_gates.uniform_()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mvam_config.json").read_text())
    assert config["format"] == 2
    assert config["encoder"] == {"library": None, "own_towers": ["image_tower", "text_tower"]}
    again = MVAM.from_pretrained(tmp_path, image_tower=ImageTower(), text_tower=TextTower())
    assert torch.equal(again.encode_image(IMAGES), model.encode_image(IMAGES))
    assert torch.equal(again.encode_text(IDS), model.encode_text(IDS))
    message = "has image_tower and text_tower of its user's own, and {} given to from_pretrained"
    with pytest.raises(ValueError, match=message.format("no tower")):
        MVAM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message.format("text_tower")):
        MVAM.from_pretrained(tmp_path, text_tower=TextTower())
    with pytest.raises(FileNotFoundError, match="has no tokenizer_config.json"):
        get_tokenizer(tmp_path)


def test_one_tower_instead_of_the_models(tmp_path):
    plain = scenes_clip()
    model = MVAM(plain.clip, 2, image_tower=ImageTower(), open_clip_config=plain.open_clip_config).eval()
    ids = get_tokenizer("scenes-ViT-T-16")(["a red circle"])
    assert model.text_tower.tokens(ids, need_pooled=False).lengths.tolist() == [5]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "mvam_config.json").read_text())
    assert config["format"] == 2 and config["encoder"] == {"library": "open_clip", "own_towers": ["image_tower"]}
    assert not (tmp_path / "preprocessor_config.json").exists()  # it would be of the tower that is not used
    assert torch.equal(get_tokenizer(tmp_path)(["a red circle"]), ids)
    again = MVAM.from_pretrained(tmp_path, image_tower=ImageTower())
    assert torch.equal(again.encode_image(IMAGES), model.encode_image(IMAGES))
    assert torch.equal(again.encode_text(ids), model.encode_text(ids))
    model.lock_text_tower()
    with pytest.raises(ValueError, match="lock_image_tower is for towers of open_clip, and this one is a ImageTower"):
        model.lock_image_tower()
    model.set_grad_checkpointing()
    assert model.image_tower.checkpointing and model.clip.transformer.grad_checkpointing


def test_a_tower_may_share_parameters_with_the_model(tmp_path):
    plain = scenes_clip()
    tower = Borrowed(plain.clip.visual)
    model = MVAM(plain.clip, 2, image_tower=tower, open_clip_config=plain.open_clip_config).eval()
    assert sum(name.endswith("visual.conv1.weight") for name, _ in model.named_parameters()) == 1
    with torch.no_grad():
        plain.clip.visual.ln_post.weight.uniform_()
    model.save_pretrained(tmp_path)
    again = MVAM.from_pretrained(tmp_path, image_tower=Borrowed(open_clip.create_model("scenes-ViT-T-16").visual))
    assert torch.equal(again.encode_image(IMAGES), model.encode_image(IMAGES))
    assert torch.equal(again.clip.visual.ln_post.weight, tower.visual.ln_post.weight)


def test_what_cannot_serve_is_refused_by_name():
    clip = scenes_clip().clip
    for arguments, error, message in (
        ({}, ValueError, "clip is None, and image_tower and text_tower too; without a clip both towers must be given"),
        ({"text_tower": TextTower()}, ValueError, "clip is None, and image_tower too"),
        ({"clip": clip, "image_tower": ImageTower(), "text_tower": TextTower()}, ValueError, "clip is a CLIP, of wh"),
        ({"clip": clip, "text_tower": TowerAdapter}, TypeError, "text_tower is .*; it must be a torch.nn.Module, so"),
        ({"clip": clip, "image_tower": nn.Linear(2, 2)}, TypeError, "image_tower is a Linear without width, prefix_t"),
    ):
        with pytest.raises(error, match=message):
            MVAM(**arguments, num_views=2)
    tower = ImageTower()
    tower.width = 0
    with pytest.raises(ValueError, match="image_tower.width is 0; it must be an int, at least 1"):
        MVAM(clip, 2, image_tower=tower)
    with pytest.raises(ValueError, match="text_tower is a TextTower with neither set_grad_checkpointing nor"):
        own(num_views=1).set_grad_checkpointing()
    tower = ImageTower()
    tower.tokens = lambda inputs, need_pooled: Tokens(torch.zeros(2, 5, 24))
    with pytest.raises(ValueError, match="global_view is True, but the ImageTower has no pooled vector of its own"):
        MVAM(image_tower=tower, text_tower=TextTower(), num_views=1, global_view=True).encode_image(IMAGES)
