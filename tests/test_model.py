"""MVAM over open_clip's towers, its loss, and its folders."""
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F

import mvam_fast
from mvam_fast import MVAM, MultiViewPool, MVAMLoss, create_model_and_transforms, get_tokenizer, multi_view_pool

CAPTIONS = ["a large red circle", "hi!", "three objects on navy background with a small bar and a dotted white cross"]
NAME = "scenes-ViT-T-16"


@pytest.fixture(scope="module")
def token_ids():
    return get_tokenizer(NAME)(CAPTIONS)


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tiny(**arguments):
    torch.manual_seed(0)
    return create_model_and_transforms(NAME, **arguments)[0].eval()


def tiny_clip(**overrides):
    """A plain open_clip model of the size of the scenes model."""
    torch.manual_seed(0)
    create_model_and_transforms(NAME, num_views=1)  # registers the config
    return open_clip.create_model(NAME, **overrides).eval()


def test_shapes_and_interface(images, token_ids):
    model = tiny(num_views=8)
    assert model.num_vectors == 8
    assert model.encode_image(images).shape == model.encode_text(token_ids).shape == (3, 8 * 32)
    torch.testing.assert_close(model.encode_image(images, normalize=True).norm(dim=-1), torch.ones(3))
    output = model(images, token_ids)
    assert {k: tuple(v.shape) for k, v in output.items()} == {
        "image_features": (3, 256), "text_features": (3, 256), "logit_scale": (),
        "image_gram": (3, 8, 8), "text_gram": (3, 8, 8),
    }  # fmt: skip
    torch.testing.assert_close(output["text_features"], model.encode_text(token_ids, normalize=True))
    assert model(images=images)["text_features"] is None


@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_views_are_pooled_from_normalised_tokens_up_to_end_of_text(custom_text, images, token_ids):
    """Against tokens read from open_clip by hooks on its final LayerNorms."""
    clip = tiny_clip(force_custom_text=custom_text)
    assert type(clip).__name__ == ("CustomTextCLIP" if custom_text else "CLIP")
    model = MVAM(clip, num_views=4)
    seen = {}
    text = clip.text if custom_text else clip
    hooks = [
        clip.visual.ln_post.register_forward_hook(lambda m, i, o: seen.update(image=o)),
        text.ln_final.register_forward_hook(lambda m, i, o: seen.update(text=o)),
    ]
    with torch.no_grad():
        clip.encode_image(images), clip.encode_text(token_ids)
    for hook in hooks:
        hook.remove()
    assert seen["image"].shape == (3, 17, 96)  # class token included
    image = multi_view_pool(seen["image"], model.image_pool.codes)[0] @ clip.visual.proj
    torch.testing.assert_close(model.encode_image(images), image.flatten(1))
    lengths = torch.tensor([len(ids[: ids.argmax() + 1]) for ids in token_ids])
    text = multi_view_pool(seen["text"], model.text_pool.codes, lengths=lengths)[0] @ text.text_projection
    torch.testing.assert_close(model.encode_text(token_ids), text.flatten(1))


def test_the_word_of_id_zero_takes_part_and_padding_does_not():
    """CLIP's padding id 0 is also the word "!": a mask by id would drop it."""
    model, tokenizer = tiny(num_views=4), get_tokenizer(NAME)
    ids = tokenizer(["!~ cat", "a cat"])
    assert ids[0, 1] == 0
    attention = model.text_attention(ids)
    assert (attention[0, :, 1] > 0).all()
    length = int(ids[1].argmax()) + 1
    assert (attention[1, :, length:] == 0).all() and (attention[1, :, :length] > 0).all()
    short = model.encode_text(ids[1:])
    ids[1, length:] = 5  # whatever stands after the end of the text
    torch.testing.assert_close(model.encode_text(ids[1:]), short)


@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_global_view_keeps_the_scores_of_the_wrapped_model(custom_text, images, token_ids):
    clip = tiny_clip(force_custom_text=custom_text)
    expected = clip.encode_image(images, normalize=True) @ clip.encode_text(token_ids, normalize=True).T
    model = MVAM(clip, num_views=4, global_view=True)
    assert model.num_vectors == 5
    image, text = model.encode_image(images, normalize=True), model.encode_text(token_ids, normalize=True)
    torch.testing.assert_close(image @ text.T, expected, rtol=0, atol=1e-6)


def test_global_view_can_learn_from_the_first_step(images, token_ids):
    """Gates at 0 that scaled the views of both towers would have a gradient of exactly 0: these have not."""
    model = tiny(num_views=4, global_view=True)
    MVAMLoss(0.0)(**model(images, token_ids)).backward()
    assert (model.image_gates.grad != 0).all() and (model.text_gates.grad != 0).all()
    with torch.no_grad():
        model.image_gates += 0.1
    model.zero_grad()
    MVAMLoss(0.0)(**model(images, token_ids)).backward()
    assert model.image_pool.codes.grad.abs().sum() > 0


def test_without_views_it_is_the_single_vector_model(images, token_ids):
    clip = tiny_clip()
    model = MVAM(clip, num_views=0, global_view=True)
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(images))
    torch.testing.assert_close(model.encode_text(token_ids), clip.encode_text(token_ids))
    output = model(images, token_ids)
    assert output["image_gram"] is None
    assert MVAMLoss(0.1)(**output).isfinite()
    with pytest.raises(ValueError, match="num_views is 0"):
        model.image_attention(images)


def test_default_codes_keep_the_views_distinct(images):
    """On normalised tokens N(0,1) codes give attentions that differ; a deviation of 0.02 does not (retrieval study)."""
    model = tiny(num_views=8)

    def overlap(attention):
        unit = F.normalize(attention, dim=-1)
        cosine = unit @ unit.mT
        return (cosine.sum((1, 2)) - 8).mean().item() / 56

    assert overlap(model.image_attention(images)) < 0.8
    with torch.no_grad():
        model.image_pool.codes.mul_(0.02)
    assert overlap(model.image_attention(images)) > 0.999


def test_image_tower_kinds(images):
    """Average pooling, LayerNorm after pooling, and a timm trunk: the single vector is open_clip's own in each."""
    vision = {"image_size": 64, "patch_size": 16, "width": 96, "head_width": 24, "layers": 1}
    for extra in ({"pool_type": "avg"}, {"pool_type": "tok", "final_ln_after_pool": True}):
        clip = tiny_clip(vision_cfg={**vision, **extra})
        model = MVAM(clip, num_views=2, global_view=True)
        torch.testing.assert_close(model.encode_image(images)[:, :32], clip.encode_image(images))
    for proj in ("linear", "none", ""):
        timm = {
            "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token",
            "timm_proj": proj, "image_size": 64,
        }  # fmt: skip
        clip = tiny_clip(vision_cfg=timm, force_image_size=None)
        clip.visual.trunk.set_input_size((64, 64))
        model = MVAM(clip, num_views=2, global_view=True)
        tokens = model.image_tower.tokens(images, need_pooled=True)
        assert tokens.hidden.shape == (3, 17, 192) and model.image_tower.grid == (4, 4)
        torch.testing.assert_close(tokens.pooled, clip.encode_image(images))
        torch.testing.assert_close(model.image_tower.project(tokens.hidden[:, 0]), tokens.pooled)


def test_resnet_tower():
    torch.manual_seed(0)
    clip = tiny_clip(vision_cfg={"image_size": 64, "layers": [1, 1, 1, 1], "width": 16})
    images = torch.randn(2, 3, 64, 64)
    model = MVAM(clip, num_views=3, global_view=True)
    tokens = model.image_tower.tokens(images, need_pooled=True)
    assert tokens.hidden.shape == (2, 5, 512)  # the mean and a 2x2 grid
    torch.testing.assert_close(tokens.pooled, clip.encode_image(images))
    # Pooling with one attention head and the pool's own folded query is what the projections must reproduce.
    pool = clip.visual.attnpool
    heads = [pool.num_heads, 1]
    pool.num_heads = 1
    query = pool.q_proj(tokens.hidden[:, :1]) @ pool.k_proj.weight
    views, _ = multi_view_pool(tokens.hidden, query, scale=512**-0.5)
    expected = model.image_tower.tokens(images, need_pooled=True).pooled
    pool.num_heads = heads[0]
    torch.testing.assert_close(model.image_tower.project(views)[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_hf_text_tower(images):
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    clip = tiny_clip(force_custom_text=True)
    clip.text = HFTextEncoder("roberta", 32, config=config, pooler_type="mean_pooler", proj_type="linear").eval()
    ids = torch.tensor([[0, 5, 6, 2, 1, 1], [0, 7, 2, 1, 1, 1]])  # 1 is RoBERTa's padding
    model = MVAM(clip, num_views=3, global_view=True)
    torch.testing.assert_close(model.encode_text(ids)[:, :32], clip.encode_text(ids))
    attention = model.text_attention(ids)
    assert (attention[0, :, 4:] == 0).all() and (attention[0, :, :4] > 0).all()


def test_what_it_cannot_read_is_refused_by_name():
    with pytest.raises(ValueError, match="model is a Linear without .visual"):
        MVAM(torch.nn.Linear(2, 2))
    coca = open_clip.create_model("coca_ViT-B-32", vision_cfg={
        "image_size": 64, "layers": 1, "width": 96, "head_width": 24, "patch_size": 16,
        "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True,
    })  # fmt: skip
    with pytest.raises(ValueError, match="attentional_pool"):
        MVAM(coca)
    with pytest.raises(ValueError, match="num_views is 0; it must be at least 1"):
        MVAM(tiny_clip(), num_views=0)
    with pytest.raises(ValueError, match="model_name is 'ViT-X'"):
        create_model_and_transforms("ViT-X")


def test_scorings():
    torch.manual_seed(0)
    tokens = torch.randn(2, 9, 16)
    dot = MultiViewPool(16, 4)
    torch.testing.assert_close(dot(tokens)[0], multi_view_pool(tokens, dot.codes)[0])
    folded = MultiViewPool(16, 4, scoring="projected", key_dim=8)
    unfolded = multi_view_pool(tokens, folded.codes, keys=folded.key_projection(tokens))
    torch.testing.assert_close(folded(tokens), unfolded)
    additive = MultiViewPool(16, 4, scoring="additive", key_dim=8)
    logits = torch.tanh(additive.key_projection(tokens)) @ additive.codes.T / 8**0.5
    torch.testing.assert_close(additive.attention(tokens), logits.softmax(1).mT)
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.uniform_(norm.weight)
    for pool in (dot, folded, additive):
        torch.testing.assert_close(pool(tokens, norm=norm), pool(norm(tokens)))
        torch.testing.assert_close(pool.attention(tokens, norm=norm), pool.attention(norm(tokens)))
    for bad, message in (
        ({"scoring": "mlp"}, "scoring is 'mlp'; it must be one of dot, projected, additive"),
        ({"key_dim": 8}, "key_dim is 8; with scoring 'dot'"),
        ({"num_views": 0}, "num_views 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiViewPool(**{"dim": 16, "num_views": 4, **bad})


def test_loss_is_open_clips_plus_weighted_diversity(images, token_ids):
    model = tiny(num_views=4)
    output = model(images, token_ids)
    contrastive = open_clip.ClipLoss()(output["image_features"], output["text_features"], output["logit_scale"])
    for kind in ("frobenius", "norm", "offdiag", "cosine"):
        terms = MVAMLoss(0.3, kind)(**output, output_dict=True)
        assert set(terms) == {"contrastive_loss", "image_diversity_loss", "text_diversity_loss"}
        expected = 0.3 * mvam_fast.diversity_loss(output["image_gram"], kind)
        torch.testing.assert_close(terms["image_diversity_loss"], expected)
        torch.testing.assert_close(terms["contrastive_loss"], contrastive)
        torch.testing.assert_close(MVAMLoss(0.3, kind)(**output), sum(terms.values()))
    with pytest.raises(ValueError, match="diversity_weight is -1"):
        MVAMLoss(-1)
    with pytest.raises(ValueError, match="kind is 'l2'"):
        MVAMLoss(kind="l2")


def test_folder_round_trip(tmp_path, images, token_ids):
    model = tiny(num_views=3, global_view=True, embed_dim=24, force_image_size=64)
    with torch.no_grad():
        model.image_gates.uniform_(), model.text_gates.uniform_()
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "model.safetensors", "mvam_config.json", "open_clip_config.json",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "model/mvam_config.json").read_text())["format"] == 1  # older versions read it
    again = MVAM.from_pretrained(tmp_path / "model")
    assert not again.training
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(token_ids), model.encode_text(token_ids))
    assert torch.equal(get_tokenizer(tmp_path / "model")(CAPTIONS), token_ids)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: no such folder"):
        MVAM.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="mvam_config.json"):
        MVAM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="open_clip_config is None"):
        MVAM(tiny_clip(), num_views=2).save_pretrained(tmp_path / "x")
    tiny(num_views=3).save_pretrained(tmp_path / "model")
    config = tmp_path / "model/mvam_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "num_views": 4}))
    with pytest.raises(ValueError, match=r"does not fit.*image_pool.codes is \(3, 96\), the model has \(4, 96\)"):
        MVAM.from_pretrained(tmp_path / "model")
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        MVAM.from_pretrained(tmp_path / "model")
    config.write_text(json.dumps(settings))
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        MVAM.from_pretrained(tmp_path / "model")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        MVAM.from_pretrained(tmp_path / "model")


def test_no_weight_decay_names_exist():
    model = tiny(num_views=2, global_view=True)
    names = model.no_weight_decay()
    assert {"image_pool.codes", "text_pool.codes", "image_gates", "text_gates"} <= names
    assert names <= {name for name, _ in model.named_parameters()}


def test_grad_checkpointing_gives_the_same_gradients(images, token_ids):
    gradients = []
    for checkpointing in (False, True):
        model = tiny(num_views=2).train()
        model.set_grad_checkpointing(checkpointing)
        MVAMLoss(0.01)(**model(images, token_ids)).backward()
        gradients.append(model.clip.visual.conv1.weight.grad)
    torch.testing.assert_close(*gradients)
