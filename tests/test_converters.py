"""Fused poolers against the originals: values, gradients, masks, precisions, paths, compilation, export."""
import pytest
import timm.layers
import torch
from converter_cases import KINDS, AttentionalPooler, case, results
from op_cases import error
from open_clip.transformer import LayerNormFp32
from torch import nn

import mvam_fast
from mvam_fast import dispatch
from mvam_fast.converters import fuse_attention_poolers, restore_attention_poolers

# Beside twice the original's error: in a tensor of a few numbers the original's own may be small by luck, and a few
# roundings of the largest number are nobody's mistake. Four are: 200 drawn cases of each kind need 3.3 at most.
ROUNDINGS = 4


def fused(pooler, **options):
    assert fuse_attention_poolers(pooler, always=True, **options) == [""]
    return pooler


def compare(pooler, arguments, dtype=torch.float32, **call) -> tuple[float, float]:
    """Fuses the pooler; every output and gradient beside the original's. Returns the sums of both's errors."""
    exact = results(pooler, arguments, torch.float64)
    own = results(pooler, arguments, dtype, **call)
    found = results(fused(pooler), arguments, dtype, **call)
    double = results(pooler, arguments, torch.float64)
    assert list(found) == list(own) == list(double) == list(exact)  # no gradient is missing
    errors = []
    for name, value in exact.items():
        assert found[name].shape == own[name].shape and found[name].dtype == own[name].dtype, name
        assert error(double[name], value) < 1e-12, name
        errors.append((error(found[name], value), error(own[name], value)))
        allowed = 2 * errors[-1][1] + ROUNDINGS * torch.finfo(own["output 0"].dtype).eps
        assert errors[-1][0] <= allowed, name
    return tuple(map(sum, zip(*errors, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_random_configurations(kind):
    """float64: equal to 1e-12. float32: at most twice the original's error, each tensor and all together."""
    totals = [compare(*case(kind, number)) for number in range(50)]
    assert sum(found for found, _ in totals) <= 2 * sum(own for _, own in totals)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    totals = []
    for number in range(8):
        pooler, arguments = case(kind, number)
        totals.append(compare(pooler.to(dtype), (arguments[0].to(dtype), *arguments[1:]), dtype))
    assert sum(found for found, _ in totals) <= 2 * sum(own for _, own in totals)


def _autocast(pooler):
    return torch.autocast("cpu", torch.bfloat16)(pooler)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """The original's output dtypes, and float32 gradients for float32 parameters."""
    _, own = compare(*case(kind, 3), run=_autocast)
    assert own > 1e-4  # it did compute in bfloat16: float32 is a hundred times as exact


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind):
    torch._dynamo.reset()
    pooler, arguments = case(kind, 3)
    expected = results(fused(pooler), arguments)
    found = results(
        pooler, arguments, run=lambda pooler: torch.compile(pooler, fullgraph=True, backend="aot_eager")
    )
    torch.testing.assert_close(found, expected)


def test_compiles_by_inductor(monkeypatch):
    monkeypatch.undo()  # inductor takes the poison of torch.empty for a change in place
    torch._dynamo.reset()
    pooler, tokens = timm.layers.AttentionPoolLatent(16, 0, num_heads=2), torch.randn(2, 5, 16)
    expected = pooler(tokens)
    with torch.no_grad():
        # Without vectors, whose headers take most of the compiler's time.
        found = torch.compile(fused(pooler), fullgraph=True, options={"cpp.simdlen": 1})(tokens)
    torch.testing.assert_close(found, expected)


def test_a_graph_compiled_before_fusing_notices():
    torch._dynamo.reset()
    pooler, arguments = case("SigLIP head", 3)
    graphs = []
    compiled = torch.compile(pooler, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    expected = compiled(*arguments)
    fused(pooler)
    torch.testing.assert_close(compiled(*arguments), expected)
    assert len(graphs) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_exports_as_plain_operators(kind):
    pooler, arguments = case(kind, 3)
    expected = pooler(*arguments)
    program = torch.export.export(fused(pooler), arguments)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if getattr(target, "namespace", "aten") != "aten"]
    assert list(program.state_dict) == list(pooler.state_dict())
    torch.testing.assert_close(program.module()(*arguments), expected)


@pytest.mark.parametrize("kind", ["open_clip AttentionalPooler", "SigLIP 2 head", "CLIP AttentionPool2d", "additive"])
def test_on_the_kernels(kind, device, monkeypatch):
    """With the LayerNorm in front, a mask, codes of each sample, separate keys: what the converters ask of them."""
    monkeypatch.setenv("MVAM_BACKEND", "triton")
    pooler, arguments = case(kind, 3)
    exact = results(pooler, arguments, torch.float64)
    found = results(fused(pooler), arguments, device=device)
    assert mvam_fast.last_backend().forward == mvam_fast.last_backend().backward == "triton"
    assert all(error(found[name].cpu(), value) < 1e-5 for name, value in exact.items())


def test_more_views_than_the_kernels_take(device):
    pooler, tokens = AttentionalPooler(32, 32, 8, 9).to(device), torch.randn(2, 5, 32, device=device)
    expected = pooler(tokens)
    torch.testing.assert_close(fused(pooler)(tokens), expected)
    assert mvam_fast.last_backend().forward == "torch"
    path = dispatch._kernel_path(tokens, torch.empty(72, 32, device=device), None, norm=True)
    assert path.forward == path.backward == "torch" and "up to 64 views, not 72" in path.reason


def _latent_masks(heads, latents, length):
    generator = torch.Generator().manual_seed(0)
    return {
        "additive": torch.randn(3, 1, 1, length, generator=generator),
        "of each head": torch.rand(3, heads, 1, length, generator=generator) > 0.2,
        "of each latent": torch.rand(latents, length, generator=generator) > 0.2,
    }


@pytest.mark.parametrize("mask", _latent_masks(1, 1, 1))
def test_masks_that_do_not_fold_run_as_before(mask):
    pooler = timm.layers.AttentionPoolLatent(16, num_heads=4, latent_len=2)
    arguments = torch.randn(3, 9, 16), _latent_masks(4, 2, 9)[mask]
    expected = pooler(*arguments)
    assert torch.equal(fused(pooler)(*arguments), expected)


def test_a_boolean_mask_that_timm_adds_as_a_number():
    """Without its fused attention timm adds True and False to the logits; so does the fused pooler."""
    pooler = timm.layers.AttentionPoolLatent(16, num_heads=4)
    pooler.fused_attn = False
    arguments = torch.randn(2, 9, 16), torch.rand(2, 1, 1, 9) > 0.5
    expected = pooler(*arguments)
    assert torch.equal(fused(pooler)(*arguments), expected)


def test_siglip2_masks_that_do_not_fold_run_as_before():
    """A mask with an axis for queries is added to the logits; one for an attention without masks is ignored."""
    pooler, (tokens, _) = case("SigLIP 2 head", 3)
    added, kept = torch.randn(len(tokens), 1, 1, tokens.shape[1]), torch.rand(tokens.shape[:2]) > 0.2
    for implementation, mask in ("sdpa", added), ("of another kind", kept):
        pooler.config._attn_implementation = implementation
        expected = pooler(tokens, mask)
        assert torch.equal(fused(pooler, verify=False)(tokens, mask), expected)
        restore_attention_poolers(pooler)


def test_a_sample_without_tokens_pools_nothing():
    """As in timm's pooler; the original SigLIP 2 head averages the padding, the additive attention makes NaN."""
    for kind in ("timm AttentionPoolLatent", "SigLIP 2 head", "additive"):
        pooler, (tokens, *_) = case(kind, 3)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        mask[0] = True
        given = {"timm AttentionPoolLatent": mask[:, None, None], "SigLIP 2 head": mask, "additive": ~mask}[kind]
        expected = pooler(tokens, given)
        found = fused(pooler)(tokens, given)
        if kind == "timm AttentionPoolLatent":
            torch.testing.assert_close(found, expected)
        elif kind == "SigLIP 2 head":
            attended = nn.functional.linear(torch.zeros(1, tokens.shape[2]), *pooler.attention.out_proj.parameters())
            attended = attended + pooler.mlp(pooler.layernorm(attended))
            torch.testing.assert_close(found[1:], attended.expand_as(found[1:]))
        else:
            assert (found[0][1:] == 0).all() and expected[0][1:].isnan().all()


@pytest.mark.parametrize("kind", ["timm AttentionPoolLatent", "SigLIP 2 head", "additive"])
def test_masked_tokens_do_not_reach_the_output(kind):
    pooler, (x, *_) = case(kind, 3)
    mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.5
    mask[:, 0] = True
    given = {"timm AttentionPoolLatent": mask[:, None, None], "SigLIP 2 head": mask, "additive": ~mask}[kind]
    expected = fused(pooler)(x, given)
    torch.testing.assert_close(pooler(x.masked_fill(~mask[..., None], torch.nan), given), expected)


def test_a_norm_that_takes_no_float64():
    """open_clip's LayerNormFp32: verifying makes do with float32."""
    pooler, x = AttentionalPooler(16, 16, 2, 2, LayerNormFp32), torch.randn(2, 7, 16)
    expected = pooler(x)
    torch.testing.assert_close(fused(pooler)(x), expected)


def test_a_second_derivative_is_refused():
    pooler, (tokens,) = case("SigLIP head", 3)
    output = fused(pooler)(tokens.requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(output, tokens, create_graph=True)
