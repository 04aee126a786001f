"""MVAM over transformers' CLIP, MetaCLIP 2, SigLIP and SigLIP 2: tokens, masks, projections, gradients and folders."""
import copy
import json
import socket
import warnings

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.tokenization_utils_base import BatchEncoding

from mvam_fast import MVAM, MVAMLoss, fuse_attention_poolers, get_tokenizer, multi_view_pool
from mvam_fast.towers import TowerAdapter

SOT, EOT, PAD = 98, 99, 1
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[SOT, 5, 6, 7, EOT, EOT, EOT], [SOT, 8, EOT, PAD, PAD, PAD, PAD]])
LENGTHS = torch.tensor([5, 3])
# Images of 3x4 and 2x3 patches, padded to 12, as SigLIP 2's image processor returns them.
PATCHES = {
    "pixel_values": torch.randn(2, 12, 192, generator=torch.Generator().manual_seed(1)),
    "pixel_attention_mask": torch.tensor([[1] * 12, [1] * 6 + [0] * 6]),
    "spatial_shapes": torch.tensor([[3, 4], [2, 3]]),
}


def tiny(model_class, config_class, eos=EOT, **vision):
    """A random model of 24-wide image tokens and 32-wide text tokens; scales and biases of its norms are random too."""
    layers = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        "hidden_size": 32, "vocab_size": 100, "max_position_embeddings": 16, "projection_size": 24,
        "bos_token_id": SOT, "eos_token_id": eos, "pad_token_id": PAD, **layers,
    }  # fmt: skip
    vision = {"hidden_size": 24, "image_size": 32, "patch_size": 8, "num_patches": 16, **layers, **vision}
    projection = {} if model_class in (SiglipModel, Siglip2Model) else {"projection_dim": 24}
    torch.manual_seed(0)
    model = model_class(config_class(text_config=text, vision_config=vision, **projection))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight), torch.nn.init.normal_(module.bias)
    return model.eval()


MAKERS = {
    "clip": lambda **more: tiny(CLIPModel, CLIPConfig, **more),
    "metaclip2": lambda **more: tiny(MetaClip2Model, MetaClip2Config, **more),
    "siglip": lambda **more: tiny(SiglipModel, SiglipConfig, **more),
    "siglip2": lambda **more: tiny(Siglip2Model, Siglip2Config, **more),
}


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


def images_for(kind):
    return PATCHES if kind == "siglip2" else IMAGES


def library_features(model, kind):
    """What the library's own functions give: image and text features, each [2,24]."""
    images = images_for(kind)
    found = model.get_image_features(**images) if kind == "siglip2" else model.get_image_features(images)
    return vector(found), vector(model.get_text_features(IDS))


def vector(features):
    """Up to transformers 4 its functions return the tensor itself."""
    return getattr(features, "pooler_output", features)


def test_views_are_pooled_from_normalised_tokens(kind):
    """Against tokens seen by hooks, normalised and projected by hand."""
    clip = MAKERS[kind]()
    model = MVAM(clip, num_views=3)
    seen = {}
    towers = {"image": clip.vision_model, "text": clip.text_model}
    hooks = [
        tower.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output.last_hidden_state}))
        for name, tower in towers.items()
    ]
    image, text = model.encode_image(images_for(kind)), model.encode_text(IDS)
    for hook in hooks:
        hook.remove()
    if kind in ("clip", "metaclip2"):
        views, _ = multi_view_pool(clip.vision_model.post_layernorm(seen["image"]), model.image_pool.codes)
        torch.testing.assert_close(image, clip.visual_projection(views).flatten(1))
        views, _ = multi_view_pool(seen["text"], model.text_pool.codes, lengths=LENGTHS)
        torch.testing.assert_close(text, clip.text_projection(views).flatten(1))
    else:
        mask = PATCHES["pixel_attention_mask"].bool() if kind == "siglip2" else None
        views, _ = multi_view_pool(seen["image"], model.image_pool.codes, mask=mask)
        torch.testing.assert_close(image, views.flatten(1))
        views, _ = multi_view_pool(seen["text"], model.text_pool.codes)
        torch.testing.assert_close(text, clip.text_model.head(views).flatten(1))


def test_the_final_norm_of_clips_images_is_left_to_the_pooling():
    clip = MAKERS["clip"]()
    tower = MVAM(clip, num_views=1).image_tower
    assert tower.tokens(IMAGES, need_pooled=False).norm is clip.vision_model.post_layernorm
    assert (tower.width, tower.grid, tower.prefix_tokens) == (24, (4, 4), 1)


def test_adapters_meet_the_protocol(kind):
    model = MVAM(MAKERS[kind](), num_views=1)
    for tower, inputs in ((model.image_tower, images_for(kind)), (model.text_tower, IDS)):
        assert isinstance(tower, TowerAdapter)
        hidden = tower.tokens(inputs, need_pooled=False).hidden
        assert hidden.shape[2] == tower.width
        if tower.grid is not None:
            assert hidden.shape[1] == tower.prefix_tokens + tower.grid[0] * tower.grid[1]


@pytest.mark.parametrize("num_views", [0, 3])
def test_freshly_wrapped_it_is_the_model_exactly(kind, num_views):
    clip = MAKERS[kind]()
    expected = library_features(clip, kind)
    model = MVAM(clip, num_views, global_view=True)
    features = model.encode_image(images_for(kind)), model.encode_text(IDS)
    for found, wanted in zip(features, expected, strict=True):
        for view in found.unflatten(1, (model.num_vectors, 24)).unbind(1):
            assert torch.equal(view, wanted)
    output = model(images_for(kind), IDS)
    scores = output["image_features"] @ output["text_features"].T * output["logit_scale"]
    inputs = images_for(kind) if kind == "siglip2" else {"pixel_values": IMAGES}
    own = clip(input_ids=IDS, **inputs).logits_per_image
    torch.testing.assert_close(scores + output.get("logit_bias", 0), own)


def test_names_and_inputs_of_transformers(kind):
    model = MVAM(MAKERS[kind](), num_views=2)
    image, text = model.encode_image(images_for(kind)), model.encode_text(IDS)
    inputs = PATCHES if kind == "siglip2" else {"pixel_values": IMAGES}
    assert torch.equal(model.get_image_features(**inputs), image)
    assert torch.equal(model.get_text_features(IDS), text)
    assert torch.equal(model.get_text_features(input_ids=IDS, attention_mask=None), text)
    assert torch.equal(model.encode_text(BatchEncoding({"input_ids": IDS})), text)  # what a tokenizer returns


def test_padding_after_the_end_of_text_takes_no_part():
    for kind in ("clip", "metaclip2"):
        model = MVAM(MAKERS[kind](), num_views=3, global_view=True)
        with torch.no_grad():
            model.text_gates.fill_(0.5)
        expected, attention = model.encode_text(IDS), model.text_attention(IDS)
        for row, length in enumerate(LENGTHS):
            assert (attention[row, :, length:] == 0).all() and (attention[row, :, :length] > 0).all()
        changed = IDS.clone()
        changed[0, 5:], changed[1, 3:] = 42, torch.tensor([EOT, 3, SOT, 7])
        torch.testing.assert_close(model.encode_text(changed), expected)
        torch.testing.assert_close(model.encode_text(IDS[:, :5]), expected)  # and how much of it there is


def test_the_old_rule_for_the_end_of_text_is_clips_alone():
    """With eos_token_id = 2 CLIP pools the highest id, wherever the 2 is; MetaCLIP 2 the first 2."""
    ids = torch.tensor([[SOT, 2, 6, 7, EOT, 0], [SOT, EOT, 2, 0, 0, 0]])
    for kind, lengths in (("clip", [5, 2]), ("metaclip2", [2, 3])):
        clip = MAKERS[kind](eos=2)
        model = MVAM(clip, num_views=2, global_view=True)
        tokens = model.text_tower.tokens(ids, need_pooled=True)
        assert tokens.lengths.tolist() == lengths
        assert torch.equal(tokens.pooled, vector(clip.get_text_features(ids)))


def test_a_text_without_end_counts_by_its_first_token_as_the_model_pools_it():
    clip = MAKERS["clip"]()
    model = MVAM(clip, num_views=2, global_view=True)
    ids = torch.tensor([[SOT, 5, 6]])
    tokens = model.text_tower.tokens(ids, need_pooled=True)
    assert tokens.lengths.tolist() == [1]
    assert torch.equal(tokens.pooled, vector(clip.get_text_features(ids)))


def test_siglip_reads_a_fixed_length_and_its_padding():
    for kind in ("siglip", "siglip2"):
        model = MVAM(MAKERS[kind](), num_views=2)
        assert (model.text_attention(IDS) > 0).all()
        changed = IDS.clone()
        changed[1, 5] = 42
        assert not torch.allclose(model.encode_text(changed)[1], model.encode_text(IDS)[1])


def test_an_attention_mask_is_obeyed(kind):
    """By the library's encoder and by the views."""
    clip = MAKERS[kind]()
    model = MVAM(clip, num_views=2, global_view=True)
    with torch.no_grad():
        model.text_gates.fill_(0.5)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
    inputs = {"input_ids": IDS, "attention_mask": mask}
    tokens = model.text_tower.tokens(inputs, need_pooled=True)
    assert torch.equal(tokens.pooled, vector(clip.get_text_features(IDS, attention_mask=mask)))
    attention = model.text_attention(inputs)
    assert (attention.transpose(1, 2)[mask == 0] == 0).all() and (attention.transpose(1, 2)[mask == 1] > 0).all()
    if kind in ("clip", "metaclip2"):  # the others pool the last position, whatever the mask says
        changed = IDS.where(mask == 1, 42)
        torch.testing.assert_close(model.get_text_features(changed, mask), model.get_text_features(IDS, mask))


def test_patches_that_pad_an_image_take_no_part():
    model = MVAM(MAKERS["siglip2"](), num_views=2)
    attention = model.image_attention(PATCHES)
    assert (attention[1, :, 6:] == 0).all() and (attention[1, :, :6] > 0).all() and (attention[0] > 0).all()
    changed = copy.deepcopy(PATCHES)
    changed["pixel_values"][1, 6:] += 1
    torch.testing.assert_close(model.encode_image(changed), model.encode_image(PATCHES))


def test_gradients_reach_encoder_codes_and_gates_with_and_without_checkpointing(kind):
    gradients = []
    for checkpointing in (False, True):
        model = MVAM(MAKERS[kind](), num_views=2, global_view=True).train()
        with torch.no_grad():
            model.image_gates.fill_(0.5), model.text_gates.fill_(0.5)
        torch.manual_seed(0)
        with torch.no_grad():
            model.image_pool.codes.normal_(), model.text_pool.codes.normal_()
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # transformers renamed it, and warns of the old name
            model.set_grad_checkpointing(True)
            model.set_grad_checkpointing(checkpointing)
        layer = model.clip.vision_model.encoder.layers[0]
        assert layer.gradient_checkpointing == checkpointing
        MVAMLoss(0.01)(**model(images_for(kind), IDS)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    # A bias adds the same to all scores of the contrastive loss, and key biases cancel in every attention.
    without = {name for name, _ in model.named_parameters()} - gradients[0].keys()
    assert without <= {"clip.logit_bias"}
    for name in ("image_pool.codes", "text_pool.codes", "image_gates", "text_gates", "clip.logit_scale"):
        assert gradients[0][name].abs().sum() > 0
    for tower in ("vision_model", "text_model"):
        assert gradients[0][f"clip.{tower}.encoder.layers.0.mlp.fc1.weight"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype):
    clip = MAKERS[kind]()
    torch.manual_seed(0)
    model = MVAM(clip, num_views=2, global_view=True)
    with torch.no_grad():
        model.image_gates.fill_(0.5), model.text_gates.fill_(0.5)
    expected = model(images_for(kind), IDS)
    clip.to(dtype)  # the encoder alone, then all of it
    for half in (model, model.to(dtype)):
        output = half(images_for(kind), IDS)
        assert output["image_features"].dtype == output["text_features"].dtype == dtype
        for name in ("image_features", "text_features", "image_gram"):
            torch.testing.assert_close(output[name].float(), expected[name], rtol=0.1, atol=0.05)


def test_a_fused_head_inside_is_the_same_model():
    clip = MAKERS["siglip"]()
    model = MVAM(clip, num_views=2, global_view=True)
    expected = model.encode_image(IMAGES)
    assert fuse_attention_poolers(model, always=True) == ["clip.vision_model.head"]
    torch.testing.assert_close(model.encode_image(IMAGES), expected)


def test_a_subclass_is_wrapped_as_what_it_is():
    class Mine(CLIPModel):
        pass

    model = MVAM(tiny(Mine, CLIPConfig), num_views=1)
    assert type(model.text_tower).__name__ == "CLIPTextTower"


def test_names_of_what_is_not_decayed_exist(kind):
    model = MVAM(MAKERS[kind](), num_views=2)
    names = model.no_weight_decay()
    assert "clip.text_model.embeddings.position_embedding.weight" in names and "image_pool.codes" in names
    assert names <= {name for name, _ in model.named_parameters()}


@pytest.fixture
def no_network(monkeypatch):
    def connect(*arguments):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_folder_round_trip(kind, tmp_path, no_network):
    model = MVAM(MAKERS[kind](), num_views=3, global_view=True, scoring="projected", key_dim=8)
    with torch.no_grad():
        model.image_gates.uniform_(), model.text_gates.uniform_()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "mvam_config.json"]
    config = json.loads((tmp_path / "mvam_config.json").read_text())
    assert config["format"] == 2 and config["encoder"] == {"library": "transformers", "own_towers": []}
    again = MVAM.from_pretrained(tmp_path)
    assert not again.training and type(again.clip) is type(model.clip)
    assert torch.equal(again.encode_image(images_for(kind)), model.encode_image(images_for(kind)))
    assert torch.equal(again.encode_text(IDS), model.encode_text(IDS))
    # The folder is one of transformers as well: its encoder, without the views.
    encoder = AutoModel.from_pretrained(tmp_path)
    for found, wanted in zip(library_features(encoder, kind), library_features(model.clip, kind), strict=True):
        assert torch.equal(found, wanted)


def test_a_model_saved_in_half_precision_comes_back_in_float32(tmp_path):
    model = MVAM(MAKERS["clip"](), num_views=2).half()
    model.clip.config.dtype = torch.float16  # as a model says that transformers loaded so
    model.save_pretrained(tmp_path)
    again = MVAM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again.encode_text(IDS), model.encode_text(IDS).float(), rtol=0.1, atol=0.05)


def test_bad_folders_are_named(tmp_path, no_network):
    MVAM(MAKERS["clip"](), num_views=2).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer_config.json; save the model with processor=..."):
        get_tokenizer(tmp_path)
    config = tmp_path / "mvam_config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({"format": 3}, r"has format 3, .* reads formats \(1, 2\) .*update mvam_fast"),
        ({"encoder": {"library": "jax"}}, "with the encoder {'library': 'jax'}.*update mvam_fast"),
        ({"num_views": 5}, r"does not fit.*image_pool.codes is \(2, 24\), the model has \(5, 24\)"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            MVAM.from_pretrained(tmp_path)
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no tower of its user's own, and image_tower given to from_pretrained"):
        MVAM.from_pretrained(tmp_path, image_tower=torch.nn.Identity())
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="folder: no such file: .*config.json"):
        MVAM.from_pretrained(tmp_path)


def test_bad_inputs_are_named():
    model = MVAM(MAKERS["clip"](), num_views=1)
    with pytest.raises(ValueError, match="inputs holds images; this tower takes pixel_values"):
        model.encode_image({"images": IMAGES})
    with pytest.raises(ValueError, match="inputs holds input_ids, token_type_ids; this tower takes input_ids"):
        model.get_text_features(IDS, token_type_ids=IDS)
    with pytest.raises(TypeError, match="inputs is list; it must be a tensor or a mapping with input_ids"):
        model.encode_text([[SOT, EOT]])
    model = MVAM(MAKERS["siglip2"](), num_views=1)
    with pytest.raises(ValueError, match="inputs lacks pixel_attention_mask, spatial_shapes; SigLIP 2 takes"):
        model.encode_image(PATCHES["pixel_values"])
    model = MVAM(tiny(SiglipModel, SiglipConfig, vision_use_head=False), num_views=1, global_view=True)
    with pytest.raises(ValueError, match="global_view is True, but the SiglipImageTower has no pooled vector"):
        model.encode_image(IMAGES)
    with pytest.raises(ValueError, match="lock_image_tower is for towers of open_clip, and this one is a SiglipImageT"):
        model.lock_image_tower()
    with pytest.raises(TypeError, match="tokenizer is str, without save_pretrained"):
        model.save_pretrained("unused", tokenizer="clip")
    with pytest.raises(ValueError, match="model is a CLIPVision.* without .visual; .* of transformers CLIPModel"):
        MVAM(MAKERS["clip"]().vision_model, num_views=1)
