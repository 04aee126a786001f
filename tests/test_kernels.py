"""The Triton kernels against float64: on a GPU where there is one, otherwise through Triton's interpreter."""
import numpy as np
import pytest
import torch
from op_cases import Case, error, inputs, results, rounding_of_logits
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import mvam_fast
from mvam_fast import dispatch, portable, reference
from mvam_fast.functional import multi_view_pool

pytest.importorskip("triton")
from mvam_fast.kernels import tiles  # noqa: E402

SHAPES = [
    Case(2, 1, 64, 1),
    Case(3, 15, 96, 3),
    Case(2, 16, 64, 8),
    Case(2, 17, 123, 3),
    Case(1, 49, 384, 16),
    Case(5, 50, 128, 17),
    Case(1, 197, 768, 16),
    Case(1, 77, 512, 33),
    Case(1, 20, 1024, 8),
    Case(1, 20, 1152, 5),
    Case(1, 17, 1280, 16),
    Case(1, 18, 2048, 4),
    Case(1, 17, 80, 64),
    Case(4, 33, 384, 16, kind="lengths"),
    Case(5, 40, 96, 8, kind="lengths+garbage+strided"),
    Case(4, 33, 123, 4, kind="mask"),
    Case(4, 70, 64, 16, kind="mask+garbage+strided"),
    Case(3, 21, 64, 5, key_width=40),
    Case(4, 21, 40, 5, key_width=136, kind="lengths"),
    Case(4, 35, 64, 16, key_width=32, kind="mask+percodes+strided"),
    Case(3, 20, 256, 8, kind="percodes"),
    Case(2, 20, 64, 4, kind="transposed"),
    Case(2, 33, 64, 4, kind="large"),
    Case(4, 33, 64, 4, kind="negative+lengths"),
    Case(2, 33, 64, 4, kind="constant"),
    Case(2, 17, 123, 3, kind="norm"),
    Case(1, 50, 384, 16, kind="norm"),
    Case(4, 33, 768, 8, kind="norm+lengths+garbage+strided"),
    Case(4, 40, 96, 5, kind="norm+mask+garbage"),
    Case(3, 20, 64, 17, kind="norm+percodes+unbiased"),
    Case(1, 18, 1280, 16, kind="norm+shifted"),
    Case(9, 18, 64, 4),  # more samples than programs of the interpreter's backward
]
LARGE = ("large", "negative+lengths")


def on_kernels(given, dtype, **options):
    found = results(multi_view_pool, given, dtype, backend="triton", **options)
    path = mvam_fast.last_backend()
    assert path[:3] == ("triton", "triton", "the backend argument asks for triton")
    assert path.norm_fused == ("norm_weight" in given)
    return found


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_float32(case, device):
    given = inputs(case, device)
    exact = results(reference.multi_view_pool, given, torch.float64)
    found = on_kernels(given, torch.float32)
    tolerance = 1e-5 + (rounding_of_logits(given) if case.kind in LARGE else 0)
    for name in exact:
        assert error(found[name], exact[name]) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in SHAPES if c.kind not in (*LARGE, "constant")], ids=str)
def test_half_precision(case, dtype, device):
    """At most twice the error of plain PyTorch in the same precision, both against float64 on the same inputs."""
    given = inputs(Case(**{**vars(case), "dtype": dtype}), device)
    exact = results(reference.multi_view_pool, given, torch.float64)
    plain = results(reference.multi_view_pool, given, dtype)
    found = on_kernels(given, dtype)
    assert found["P"].dtype == dtype and found["G"].dtype == torch.float32
    for name in exact:
        # One rounding of the largest value is allowed where PyTorch happens to be exact.
        least = torch.finfo(dtype).eps * 0.5
        assert error(found[name], exact[name]) <= 2 * max(error(plain[name], exact[name]), least), name


def test_without_gram_and_with_pooled_or_gram_gradient_alone(device):
    given = inputs(Case(3, 21, 64, 4, kind="lengths"), device)
    exact = results(reference.multi_view_pool, given, torch.float64, need_gram=False)
    found = on_kernels(given, torch.float32, need_gram=False)
    for name in exact:
        assert error(found[name], exact[name]) <= 1e-5, name
    for use in (lambda p, g: p.square().sum(), lambda p, g: g.square().sum()):
        gradients = []
        for op, dtype, options in (
            (multi_view_pool, torch.float32, {"backend": "triton"}),
            (reference.multi_view_pool, torch.float64, {}),
        ):
            tokens = given["tokens"].detach().to(dtype, copy=True).requires_grad_()
            use(*op(tokens, given["codes"].to(dtype), lengths=given["lengths"], **options)).backward()
            gradients.append(tokens.grad)
        assert error(*gradients) <= 1e-5


def test_gradients_in_any_layout(device):
    """Expanded, sliced and transposed gradients reach the kernel; neither gradcheck nor opcheck would notice."""
    given = inputs(Case(3, 19, 64, 4), device)
    uses = {
        "expanded": lambda p, g: p.sum() + g.sum(),
        "sliced": lambda p, g: torch.cat([p, p], 1)[:, 1:6].square().sum() + g[:, :2].square().sum(),
        "transposed": lambda p, g: (p.mT.contiguous().mT * p).sum() + (g.mT * g[:1]).sum(),
    }
    for name, use in uses.items():
        gradients = []
        for op, dtype, options in (
            (multi_view_pool, torch.float32, {"backend": "triton"}),
            (reference.multi_view_pool, torch.float64, {}),
        ):
            tokens = given["tokens"].detach().to(dtype, copy=True).requires_grad_()
            use(*op(tokens, given["codes"].to(dtype), **options)).backward()
            gradients.append(tokens.grad)
        assert error(*gradients) <= 1e-5, name


def test_only_what_is_needed_is_computed(device):
    given = inputs(Case(2, 20, 64, 4, key_width=32), device)
    codes = given["codes"].requires_grad_()
    pooled, gram = multi_view_pool(given["tokens"], codes, keys=given["keys"], backend="triton")
    (pooled.square().sum() + gram.sum()).backward()
    exact = given["codes"].detach().double().requires_grad_()
    pooled, gram = reference.multi_view_pool(given["tokens"].double(), exact, keys=given["keys"].double())
    (pooled.square().sum() + gram.sum()).backward()
    assert error(codes.grad, exact.grad) <= 1e-5
    assert given["tokens"].grad is None and given["keys"].grad is None


def test_repeats_bit_for_bit(device):
    given = inputs(Case(9, 20, 64, 4, kind="lengths"), device)
    first = on_kernels(given, torch.float32)
    for _ in range(50):
        again = on_kernels(given, torch.float32)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_large_logits_of_any_sign(device):
    """Logits of ±1e4: A is one-hot there, and what is computed again in the backward must not overflow."""
    given = inputs(Case(3, 33, 64, 4, kind="lengths"), device)
    for sign in (1, -1):
        tokens = given["tokens"].abs() * sign
        codes = given["codes"].abs() * 2e3
        logits = codes.double() @ tokens.double().mT * 64**-0.5
        assert logits.abs().max() > 1e4
        changed = {**given, "tokens": tokens, "codes": codes}
        exact = results(reference.multi_view_pool, changed, torch.float64)
        found = on_kernels(changed, torch.float32)
        for name in exact:
            assert error(found[name], exact[name]) <= 1e-5 + rounding_of_logits(changed), name


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_one_sample_holds_does_not_reach_another(value, device):
    """Nine short samples, several to a program: the second's Inf or NaN stays its own, forward and backward."""
    given = inputs(Case(9, 18, 64, 4), device)
    exact = results(reference.multi_view_pool, given, torch.float64)
    given["tokens"] = given["tokens"].clone()
    given["tokens"][1, 3] = value
    found = on_kernels(given, torch.float32)
    others = [0, *range(2, 9)]
    for name in ("P", "G", "d_tokens"):
        assert error(found[name][others], exact[name][others]) <= 1e-5, name
        assert not found[name][1].isfinite().all(), name


@pytest.mark.alone
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter would take hours")
@pytest.mark.parametrize("length", [3, 200])
def test_more_samples_than_a_grid_axis_has_blocks(length, device):
    given = inputs(Case(70_001, length, 64, 4, kind="lengths"), device)
    exact = results(reference.multi_view_pool, given, torch.float64)
    found = on_kernels(given, torch.float32)
    for name in exact:
        assert error(found[name], exact[name]) <= 1e-4, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["lengths", "norm+lengths", "mask"])
def test_is_captured_in_a_cuda_graph(kind, device):
    """Neither a synchronisation nor a read of the lengths: captured once, replayed on other values."""
    given = {k: v for k, v in inputs(Case(4, 33, 64, 4, kind=kind), device).items() if v is not None}
    leaves = [given[name].requires_grad_() for name in ("tokens", "codes")]

    def step():
        pooled, gram = multi_view_pool(**given, backend="triton")
        return pooled, gram, *torch.autograd.grad(pooled.square().sum() + gram.sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        given["tokens"].mul_(0.5)
        if "lengths" in given:
            given["lengths"].copy_(given["lengths"].flip(0))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, other)


def test_empty_batch(device):
    codes = torch.randn(3, 64, device=device, requires_grad=True)
    tokens = torch.randn(0, 5, 64, device=device, requires_grad=True)
    pooled, gram = multi_view_pool(tokens, codes, backend="triton")
    (pooled.sum() + gram.sum()).backward()
    assert pooled.shape == (0, 3, 64) and gram.shape == (0, 3, 3)
    assert tokens.grad.shape == (0, 5, 64) and (codes.grad == 0).all()


def test_offsets_pass_two_to_the_31(device):
    """Three samples 1.2e9 elements apart: int32 offsets would wrap. The memory between them is never touched."""
    stride, length, width = 1_200_000_000, 17, 64
    if device == "cuda":
        storage = torch.empty(2 * stride + length * width, dtype=torch.float16, device=device)
    else:
        storage = torch.from_numpy(np.empty(2 * stride + length * width, np.float16))
    far = storage.as_strided((3, length, width), (stride, width, 1))
    near = inputs(Case(3, length, width, 4, dtype=torch.float16), device)
    far.copy_(near["tokens"])
    expected = multi_view_pool(near["tokens"], near["codes"], backend="triton")
    tokens = far.requires_grad_()
    found = multi_view_pool(tokens, near["codes"], backend="triton")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    (gradient,) = torch.autograd.grad(found[0].float().square().sum(), tokens)
    near_tokens = near["tokens"].requires_grad_()
    pooled, _ = multi_view_pool(near_tokens, near["codes"], backend="triton")
    assert torch.equal(gradient, torch.autograd.grad(pooled.float().square().sum(), near_tokens)[0])


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_paths_mix_and_the_missing_kernel_is_named(broken, device, monkeypatch, request):
    """Where one direction has no kernel the other still runs, and `last_backend` says which and why."""
    obstacle = tiles.obstacle
    dispatch._obstacles.cache_clear()
    request.addfinalizer(dispatch._obstacles.cache_clear)
    monkeypatch.setattr(
        tiles, "obstacle", lambda kernel, *a: "it is too large" if kernel == broken else obstacle(kernel, *a)
    )
    monkeypatch.setenv("MVAM_BACKEND", "triton")
    given = inputs(Case(3, 21, 64, 4, kind="lengths"), device)
    if broken == "forward":
        with pytest.raises(ValueError, match="MVAM_BACKEND asks for triton, which cannot run here: it is too large"):
            multi_view_pool(given["tokens"], given["codes"])
        return
    found = results(multi_view_pool, given, torch.float32)
    path = mvam_fast.last_backend()
    assert (path.forward, path.backward) == ("triton", "torch") and "it is too large" in path.reason
    exact = results(reference.multi_view_pool, given, torch.float64)
    for name in exact:
        assert error(found[name], exact[name]) <= 1e-5, name


def test_what_a_gpu_cannot_hold_is_refused_by_name():
    float32, bfloat16 = torch.float32, torch.bfloat16
    assert not tiles.obstacle("forward", (9, 0), bfloat16, 1280, None, 16)
    assert not tiles.obstacle("backward", (9, 0), bfloat16, 1280, None, 16)
    assert "227" in tiles.obstacle("backward", (9, 0), float32, 2048, None, 16)
    assert "99" in tiles.obstacle("backward", (8, 6), bfloat16, 1280, None, 16)
    assert "capability 8.0 or newer" in tiles.obstacle("forward", (7, 5), torch.float16, 64, None, 4)
    assert "widths up to 2048" in tiles.obstacle("forward", (9, 0), bfloat16, 2049, None, 4)
    assert "up to 64 views" in tiles.obstacle("forward", (9, 0), bfloat16, 64, None, 65)
    assert "float64" in tiles.obstacle("forward", None, torch.float64, 64, None, 4)


def op_arguments(device, keys=False, need_d_tokens=True):
    given = inputs(Case(4, 18, 64, 4, key_width=32 if keys else None, kind="lengths"), device)
    forward = (given["tokens"], given["codes"], given["keys"], given["lengths"], None, 0.1, True)
    pooled, gram, lse = torch.ops.mvam.pool_forward(*forward)
    backward = (
        torch.randn_like(pooled), torch.randn_like(gram), *forward[:5], pooled, gram, lse, 0.1, need_d_tokens, keys,
    )  # fmt: skip
    return forward, backward


@pytest.mark.parametrize("keys", [False, True], ids=["shared", "separate"])
def test_opcheck(keys, device):
    forward, backward = op_arguments(device, keys, need_d_tokens=not keys)
    torch.library.opcheck(torch.ops.mvam.pool_forward.default, forward)
    torch.library.opcheck(torch.ops.mvam.pool_forward.default, (*forward[:-1], False))
    torch.library.opcheck(torch.ops.mvam.pool_backward.default, backward)


def test_opcheck_with_a_norm(device):
    given = inputs(Case(4, 18, 64, 4, kind="norm+lengths"), device)
    norm = (given["norm_weight"], given["norm_bias"], 1e-5)
    forward = (given["tokens"], given["codes"], *norm, given["lengths"], None, 0.1, True)
    pooled, gram, lse, unit, stats = torch.ops.mvam.norm_pool_forward(*forward)
    # Statistics of tokens that take no part are unset, and opcheck compares results: fill them.
    every = (*forward[:5], None, None, 0.1, True)
    torch.library.opcheck(torch.ops.mvam.norm_pool_forward.default, every)
    saved = (gram, lse, unit, stats.nan_to_num())
    backward = (torch.randn_like(pooled), torch.randn_like(gram), *forward[:3], *forward[5:7], *saved, 0.1, True)
    torch.library.opcheck(torch.ops.mvam.norm_pool_backward.default, backward)


def test_norm_statistics_stand_large_means(device):
    """A mean 30 times the deviation: sums of squares would cancel to 1e-4, a second look at the tile does not."""
    given = inputs(Case(2, 18, 384, 4), device)
    norm = {"norm_weight": torch.ones(384, device=device), "norm_eps": 1e-6}
    tokens = given["tokens"] + 30
    found = multi_view_pool(tokens, given["codes"], backend="triton", **norm)
    exact = reference.multi_view_pool(tokens.double(), given["codes"].double(), **norm)
    plain = reference.multi_view_pool(tokens, given["codes"], **norm)
    for one, other, right in zip(found, plain, exact, strict=True):
        assert error(one, right) <= 2 * max(error(other, right), 1e-5)


def test_portable_path_recovers_the_attention_from_the_kernels_lse(device):
    forward, _ = op_arguments(device)
    tokens, codes, _, lengths = (None if t is None else t.double() if t.is_floating_point() else t for t in forward[:4])
    lse = torch.ops.mvam.pool_forward(*forward)[2]
    assert lse.isinf().any()  # a sample without a valid token
    valid = reference.valid_tokens(tokens, lengths, None)
    found = portable.recomputed_attention(tokens, codes, None, valid, lse.double(), 0.1)
    expected = reference.view_attention(tokens, codes, lengths=lengths, scale=0.1)
    torch.testing.assert_close(found.mT, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("need_gram", [True, False])
@pytest.mark.parametrize("kind", ["lengths", "lengths+norm"])
def test_compiles_without_graph_breaks(kind, need_gram, device):
    torch._dynamo.reset()
    given = inputs(Case(3, 18, 64, 4, kind=kind), device)
    norm = {"norm_weight": given.get("norm_weight"), "norm_bias": given.get("norm_bias")}

    def step(tokens, codes):
        pooled, gram = multi_view_pool(
            tokens, codes, lengths=given["lengths"], need_gram=need_gram, backend="triton", **norm
        )
        return pooled.square().sum() + (mvam_fast.diversity_loss(gram) if need_gram else 0)

    leaves = given["tokens"].requires_grad_(), given["codes"].requires_grad_()
    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@pytest.mark.parametrize("norm", [False, True])
def test_kernels_are_in_the_graphs_that_are_compiled_and_not_in_those_exported(norm, device):
    """Equal values would not show it: the reference has them too."""
    torch._dynamo.reset()
    given = inputs(Case(3, 18, 64, 4, kind="norm" if norm else "plain"), device)
    weights = {"norm_weight": given.get("norm_weight"), "norm_bias": given.get("norm_bias")}
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    class Pool(torch.nn.Module):
        def forward(self, tokens, codes):
            return multi_view_pool(tokens, codes, backend="triton", **weights)

    def operators(graph):
        return {str(node.target) for node in graph.nodes if "mvam" in str(node.target)}

    leaves = given["tokens"].requires_grad_(), given["codes"].requires_grad_()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, inference_compiler=keep)
    compiled = torch.compile(Pool(), backend=backend, fullgraph=True)
    pooled, gram = compiled(*leaves)
    (pooled.sum() + gram.sum()).backward()
    with torch.no_grad():
        compiled(*leaves)
    name = "mvam.norm_pool" if norm else "mvam.pool"
    expected = [{f"{name}_forward.default"}, {f"{name}_backward.default"}, {f"{name}_forward.default"}]
    assert [operators(graph.graph) for graph in graphs] == expected
    for strict in (False, True):
        program = torch.export.export(Pool(), tuple(leaf.detach() for leaf in leaves), strict=strict)
        assert not operators(program.graph) and len(program.graph.nodes) > 5


def test_autocast(device):
    given = inputs(Case(2, 18, 64, 4), device)
    codes = given["codes"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        pooled, gram = multi_view_pool(given["tokens"], codes, backend="triton")
    assert pooled.dtype == torch.bfloat16 and gram.dtype == torch.float32
    exact = reference.multi_view_pool(given["tokens"].bfloat16().double(), codes.double())
    assert error(pooled.detach(), exact[0].detach()) < 2e-2 and error(gram.detach(), exact[1].detach()) < 2e-2
    pooled.float().sum().backward()
    assert codes.grad.dtype == torch.float32 and codes.grad.isfinite().all()
