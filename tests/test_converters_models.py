"""What fusing does to a model: names, parameters, hooks, copies, undoing, refusals; whole models of three libraries."""
import copy
import pickle
import re

import open_clip
import pytest
import timm
import timm.layers
import torch
from converter_cases import KINDS, AttentionalPooler, AttentionPool2d, LaterAttentionalPooler, case
from torch import nn
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverAttention
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from mvam_fast.converters import folding, fuse_attention_poolers, restore_attention_poolers, siglip


def poolers() -> nn.ModuleDict:
    """One of each kind."""
    return nn.ModuleDict({kind.replace(".", ""): case(kind, 3)[0] for kind in KINDS})


def tokens(width: int) -> torch.Tensor:
    return torch.randn(3, 9, width, generator=torch.Generator().manual_seed(0))


def test_what_is_fused_stays_what_it_is():
    model = poolers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    saved = copy.deepcopy(model.state_dict())
    classes = {name: type(module) for name, module in model.items()}
    assert fuse_attention_poolers(model, always=True) == list(classes)
    assert dict(model.named_modules()) == modules
    assert list(model.named_parameters()) == list(parameters.items())
    assert list(model.state_dict()) == list(saved)
    for name, own in classes.items():
        assert isinstance(model[name], own) and type(model[name]).__name__ == f"Fused{own.__name__}"
    model.load_state_dict(saved)  # of the original into the fused, and back
    poolers().load_state_dict(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((p - saved[name]).abs().max() > 0.09 for name, p in model.named_parameters())


def test_fusing_twice_and_a_pooler_itself():
    pooler, _ = case("SigLIP head", 0)
    found = fuse_attention_poolers(pooler)
    assert isinstance(found, list) and found == [""] and found.left_alone == {}
    again = fuse_attention_poolers(pooler)
    assert again == [] and again.left_alone == {}
    assert restore_attention_poolers(pooler) == [""] and restore_attention_poolers(pooler) == []


def test_models_without_poolers_and_what_is_no_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    assert fuse_attention_poolers(model) == [] == restore_attention_poolers(model)
    for function in (fuse_attention_poolers, restore_attention_poolers):
        with pytest.raises(TypeError, match="model is dict; it must be a torch.nn.Module"):
            function({})


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_sgd_gives_the_same_weights(kind):
    pooler, arguments = case(kind, 4)
    own, other = copy.deepcopy(pooler).double(), copy.deepcopy(pooler).double()
    fuse_attention_poolers(other, always=True)
    for model in (own, other):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        output = model(arguments[0].double(), *arguments[1:])
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(dict(other.named_parameters()), dict(own.named_parameters()), rtol=1e-11, atol=1e-11)


def test_key_biases_stand_still_under_adam():
    """They change nothing. Their gradient is rounding noise in the original, which Adam scales up to whole steps."""
    pooler, (x,) = case("SigLIP head", 4)
    key_bias = pooler.attention.in_proj_bias.detach().chunk(3)[1].clone()
    fuse_attention_poolers(pooler)
    pooler(x).square().sum().backward()
    torch.optim.Adam(pooler.parameters(), 0.1).step()
    query, key, value = (bias.abs().max() for bias in pooler.attention.in_proj_bias.grad.chunk(3))
    assert query > 0 and key == 0 and value > 0
    assert torch.equal(pooler.attention.in_proj_bias.chunk(3)[1], key_bias)


def test_tied_and_shared():
    """A weight that two poolers and a third module share, and one pooler under two names."""
    model = nn.Module()
    model.first, model.second = (timm.layers.AttentionPoolLatent(16, num_heads=2) for _ in range(2))
    model.again, model.linear = model.first, nn.Linear(16, 32)
    model.second.kv.weight = model.linear.weight = model.first.kv.weight
    x = tokens(16).double()

    def gradients():
        model.zero_grad()
        output = model.first(x) + model.second(x) * model.again(2 * x) + model.linear(x)[:, 0, :16]
        output.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.double()
    expected = gradients()
    assert fuse_attention_poolers(model) == ["first", "second", "again"]
    assert model.again is model.first and model.second.kv.weight is model.linear.weight
    torch.testing.assert_close(gradients(), expected, rtol=1e-11, atol=1e-11)
    assert restore_attention_poolers(model) == ["first", "second", "again"]


def test_attention_without_biases():
    pooler = _attention(bias=False, batch_first=True)
    expected = pooler(tokens(16))
    assert fuse_attention_poolers(pooler) == [""]
    torch.testing.assert_close(pooler(tokens(16)), expected)


def test_copies_and_pickles():
    model = poolers()
    fuse_attention_poolers(model, always=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for kind, name in zip(KINDS, model, strict=True):
            arguments = case(kind, 3)[1]
            assert type(other[name]) is type(model[name]) and other[name] is not model[name]
            torch.testing.assert_close(other[name](*arguments), model[name](*arguments))
            assert not {*other[name].parameters()} & {*model[name].parameters()}
        assert restore_attention_poolers(other) == list(model) and restore_attention_poolers(other) == []
    assert restore_attention_poolers(model) == list(model)


@pytest.mark.parametrize("overwrite", [False, True])
def test_restoring_keeps_the_present(overwrite):
    """Mode, dtype and parameters as they are when it is undone, not as they were."""
    pooler, (x,) = case("SigLIP head", 3)
    own = type(pooler)
    fuse_attention_poolers(pooler)
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        pooler.double().eval()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    pooler.probe = nn.Parameter(torch.ones_like(pooler.probe))
    output = pooler(x.double())
    restore_attention_poolers(pooler)
    assert type(pooler) is own and not pooler.training and (pooler.probe == 1).all()
    torch.testing.assert_close(pooler(x.double()), output, rtol=1e-11, atol=1e-11)


def test_a_class_changed_afterwards_is_not_restored():
    pooler, _ = case("SigLIP head", 3)
    fuse_attention_poolers(pooler)
    nn.utils.parametrize.register_parametrization(pooler, "probe", nn.Identity())
    with pytest.raises(RuntimeError, match="changed afterwards, to ParametrizedFusedSiglip"):
        restore_attention_poolers(pooler)
    nn.utils.parametrize.remove_parametrizations(pooler, "probe")
    assert restore_attention_poolers(pooler) == [""]


def test_hooks_run_as_before():
    pooler, (x,) = case("SigLIP head", 3)
    calls = []
    pooler.register_forward_pre_hook(lambda module, given: calls.append("before"))
    pooler.register_forward_hook(lambda module, given, output: calls.append("after"))
    pooler.register_full_backward_hook(lambda module, *gradients: calls.append("backward"))
    pooler.mlp.register_forward_hook(lambda module, given, output: output + 1)
    expected = pooler(x.requires_grad_())
    expected.square().sum().backward()
    assert fuse_attention_poolers(pooler) == [""] and calls == ["before", "after", "backward"]
    found = pooler(x)
    found.sum().backward()
    assert calls == 2 * ["before", "after", "backward"]
    torch.testing.assert_close(found, expected)


def test_verifying_leaves_no_trace():
    """Random state, mode, running statistics, hooks, and whatever device the user creates tensors on."""
    pooler, _ = case("SigLIP head", 3)
    pooler.mlp = nn.Sequential(nn.BatchNorm1d(1), pooler.mlp, nn.Dropout(0.5))
    pooler.mlp.register_forward_hook(lambda *given: pytest.fail("a hook was called"))
    saved, state = copy.deepcopy(pooler.state_dict()), torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert fuse_attention_poolers(pooler) == [""]
    assert torch.equal(torch.get_rng_state(), state) and pooler.training and pooler.mlp[0].training
    assert all(torch.equal(value, saved[name]) for name, value in pooler.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verifying_refuses_a_wrong_fusion(dtype, monkeypatch):
    """By values, here by codes that are 1% off, and by what comes out; all or nothing."""
    model = nn.ModuleDict({"right": case("additive", 0)[0], "wrong": case("SigLIP head", 0)[0]}).to(dtype)
    classes = {name: type(module) for name, module in model.items()}
    fold = folding.fold
    with monkeypatch.context() as patch:
        patch.setattr(folding, "fold", lambda *given: fold(*given) * 1.01)
        with pytest.raises(RuntimeError, match=r"'wrong' \(Siglip.* gives other values: in torch.float64 they"):
            fuse_attention_poolers(model, always=True)
    with monkeypatch.context() as patch:
        patch.setattr(siglip.Fusion, "forward", lambda self, x: siglip.head(self, x).double())
        with pytest.raises(RuntimeError, match=r"'wrong' .* torch.float64 instead of .*; nothing was changed"):
            fuse_attention_poolers(model, always=True)
    assert {name: type(module) for name, module in model.items()} == classes


class Perceiver(nn.Module):
    """Stand-in for open_flamingo's PerceiverAttention, by its submodules."""

    def __init__(self):
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(8), nn.LayerNorm(8)
        self.to_q, self.to_kv, self.to_out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)


class MaskedHead(SiglipMultiheadAttentionPoolingHead):
    """A SigLIP head that must be told which tokens there are, as Phi-4's."""

    def forward(self, hidden_state, attention_mask):
        return self.attention(self.probe, hidden_state, hidden_state, key_padding_mask=~attention_mask)[0]


def _siglip_head(kind=SiglipMultiheadAttentionPoolingHead):
    return kind(SiglipVisionConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16))


def _changed(pooler, change):
    change(pooler)
    return pooler


def _attention(**options):
    return _changed(
        AttentionalPooler(16, 16, 2, 1), lambda p: setattr(p, "attn", nn.MultiheadAttention(16, 2, **options))
    )


def _latent(**options):
    return timm.layers.AttentionPoolLatent(16, num_heads=2, **options)


def _patched_attention():
    return _changed(_attention(batch_first=True), lambda p: setattr(p.attn, "forward", print))


def _later(name, value):
    return _changed(LaterAttentionalPooler(16, 16, 2, 1), lambda p: setattr(p.attn, name, value))


LEFT_ALONE = {
    "keys are the tokens and the latents together": Perceiver,
    "after the first layer the latents": lambda: IdeficsPerceiverAttention(16, 2, 8, False),
    "rotary positions": lambda: timm.layers.RotAttentionPool2d(16, num_heads=2, class_token=True),
    "every position is a query": lambda: timm.layers.AttentionPool2d(16, 3, num_heads=2, pool_type=""),
    "drop acts on all positions with p = 0.1": lambda: timm.layers.AttentionPool2d(16, 3, num_heads=2, drop_rate=0.1),
    r"normalised \(qk_norm\)": lambda: _latent(qk_norm=True),
    "kv is a Sequential, not a Linear": lambda: _changed(_latent(), lambda p: setattr(p, "kv", nn.Sequential(p.kv))),
    "kv has hooks": lambda: _changed(_latent(), lambda p: p.kv.register_forward_hook(print)),
    "the forward of attn was replaced": _patched_attention,
    "its forward was replaced": lambda: _changed(_latent(), lambda p: setattr(p, "forward", print)),
    r"takes \(hidden_state, attention_mask\), not \(hidden_state\)": lambda: _siglip_head(MaskedHead),
    "attn drops out attention with p = 0.1": lambda: _attention(dropout=0.1, batch_first=True),
    "batch second": _attention,
    "zero token": lambda: _attention(add_zero_attn=True, batch_first=True),
    "attn has bias_k": lambda: _attention(add_bias_kv=True, batch_first=True),
    r"attn.ln_k \(LayerNorm\) does not fold": lambda: _later("ln_k", nn.LayerNorm(8)),
    "attn has head_scale": lambda: _later("head_scale", nn.Parameter(torch.ones(2, 1, 1))),
    "attn.attn_drop drops out with p = 0.2": lambda: _later("attn_drop", nn.Dropout(0.2)),
    "attn is a Linear, which lacks": lambda: _changed(_attention(), lambda p: setattr(p, "attn", nn.Linear(2, 2))),
    "q_proj has no bias": lambda: _changed(AttentionPool2d(3, 16, 2), lambda p: setattr(p.q_proj, "bias", None)),
    "TorchScript": lambda: torch.jit.script(AttentionPool2d(3, 16, 2)),
    "softmax is Softmax": lambda: _changed(case("additive", 0)[0], lambda p: setattr(p, "softmax", nn.Softmax(2))),
    "512 views it would take 65,536 .* instead of 12,288; always=True": lambda: AttentionalPooler(32, 32, 8, 64),
    "its own forward failed: NotImplementedError": lambda: _siglip_head().to("meta"),
    "outputs are not finite": lambda: _changed(_siglip_head(), lambda p: nn.init.constant_(p.probe, torch.inf)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_is_left_alone_is_named_with_the_reason(reason):
    model = nn.ModuleDict({"fused": _siglip_head(), "left": LEFT_ALONE[reason]()})
    kept = type(model["left"])
    found = fuse_attention_poolers(model)
    assert found == ["fused"] and list(found.left_alone) == ["left"] and type(model["left"]) is kept
    assert re.search(reason, found.left_alone["left"])


def test_where_folding_stops_to_pay():
    """4·H·Q·D against 4·E·(D + Q); the additive attention saves nothing. `always` fuses them all the same."""
    for queries, pays in ((10, True), (11, False)):  # 4·Q·32 against 32·(32 + Q)
        pooler = AttentionalPooler(32, 32, 4, queries)
        assert fuse_attention_poolers(pooler) == ([""] if pays else [])
    assert fuse_attention_poolers(pooler, always=True) == [""]
    additive, _ = case("additive", 3)
    assert fuse_attention_poolers(additive).left_alone and fuse_attention_poolers(additive, always=True) == [""]


def _open_clip_siglip():
    """open_clip's CustomTextCLIP around a timm ViT that pools by a latent, as its SigLIP models are."""
    text = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True}
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_proj": "none"}
    model = open_clip.CustomTextCLIP(32, vision, text | {"pool_type": "last", "proj_bias": True})
    model.visual.trunk = timm.models.vision_transformer.VisionTransformer(
        32, 8, embed_dim=32, depth=1, num_heads=4, num_classes=0, global_pool="map", class_token=False
    )
    return model, ["visual.trunk.attn_pool"]


def _open_clip_coca():
    tower = {"width": 32, "layers": 1, "mlp_ratio": 2.0}
    vision = tower | {"image_size": 32, "patch_size": 8, "head_width": 8, "attentional_pool": True}
    vision |= {"attn_pooler_heads": 4, "attn_pooler_queries": 5}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 4, "layers": 1, "embed_cls": True}
    model = open_clip.coca_model.CoCa(
        32, text | {"attn_pooler_heads": 4}, text | {"output_tokens": True}, vision | {"output_tokens": True}
    )
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it as the memory was
    return model, ["visual.attn_pool"]


def _transformers_siglip():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config=sizes | {"vocab_size": 40, "max_position_embeddings": 8},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
    )
    return SiglipModel(config), ["vision_model.head"]


def _embeddings(model, images, ids) -> list[torch.Tensor]:
    if isinstance(model, SiglipModel):
        output = model(pixel_values=images, input_ids=ids)
        return [output.image_embeds, output.text_embeds]
    return [model.encode_image(images), model.encode_text(ids)]


@pytest.mark.parametrize("build", [_open_clip_siglip, _open_clip_coca, _transformers_siglip])
def test_whole_models_embed_and_train_as_before(build):
    """In float64, where rounding hides nothing: embeddings, and all weights after a step of SGD."""
    torch.manual_seed(0)
    model, names = build()
    model = model.double()
    other = copy.deepcopy(model)
    assert fuse_attention_poolers(other) == names
    images, ids = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(1, 40, (4, 7))
    embeddings = []
    for each in (model, other):
        embeddings.append(_embeddings(each, images, ids))
        loss = open_clip.ClipLoss()(*(nn.functional.normalize(e, dim=-1) for e in embeddings[-1]), torch.tensor(10.0))
        if hasattr(each, "text_decoder"):  # CoCa's other image tokens feed its decoder
            loss = loss + each(images, ids)["logits"].square().mean()
        loss.backward()
        torch.optim.SGD(each.parameters(), 0.5).step()
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dict(other.named_parameters()), dict(model.named_parameters()), rtol=1e-10, atol=1e-11)
    restore_attention_poolers(other)
    torch.testing.assert_close(_embeddings(other, images, ids), _embeddings(model, images, ids), rtol=1e-9, atol=1e-9)
