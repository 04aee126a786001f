"""The op on the "torch" path, and the specification itself: values, gradients, masks, dtypes, compilation."""
import pytest
import torch
from op_cases import Case, error, inputs, results, rounding_of_logits

import mvam_fast
from mvam_fast import reference
from mvam_fast.functional import diversity_loss, multi_view_pool, view_attention

CASES = [
    Case(3, 17, 64, 4),
    Case(4, 15, 123, 3, kind="lengths"),
    Case(4, 16, 96, 17, kind="mask+strided"),
    Case(2, 49, 40, 8, key_width=24, kind="mask"),
    Case(4, 9, 32, 5, key_width=48, kind="lengths+percodes"),
    Case(3, 12, 64, 4, kind="percodes"),
    Case(2, 20, 48, 3, kind="transposed"),
    Case(2, 33, 64, 4, kind="large"),
    Case(4, 33, 64, 4, kind="negative+lengths"),
    Case(2, 33, 64, 4, kind="constant"),
    Case(1, 1, 16, 1),
    Case(3, 17, 64, 4, kind="norm"),
    Case(4, 15, 40, 3, kind="norm+lengths+garbage"),
    Case(4, 16, 96, 5, key_width=24, kind="norm+mask+percodes"),
    Case(2, 9, 48, 3, kind="norm+unbiased"),
]


def plain_loops(tokens, codes, keys, lengths, mask, scale):
    """The op written token by token in float64, independent of every vectorised form."""
    tokens = tokens.double()
    keys = tokens if keys is None else keys.double()
    batch, length, width = tokens.shape
    views = codes.shape[-2]
    pooled, gram = torch.zeros(batch, views, width).double(), torch.zeros(batch, views, views).double()
    for b in range(batch):
        code = (codes if codes.dim() == 2 else codes[b]).double()
        valid = [
            n for n in range(length)
            if (lengths is None or n < lengths[b]) and (mask is None or bool(mask[b, n]))
        ]  # fmt: skip
        if not valid:
            continue
        attention = []
        for i in range(views):
            weights = torch.stack([(scale * (code[i] * keys[b, n]).sum()).exp() for n in valid])
            attention.append(weights / weights.sum())
            pooled[b, i] = sum(w * tokens[b, n] for w, n in zip(attention[i], valid, strict=True))
        for i in range(views):
            for j in range(views):
                gram[b, i, j] = (attention[i] * attention[j]).sum()
    return pooled, gram


SMALL = [c for c in CASES if c.kind not in ("large", "negative+lengths") and "norm" not in c.kind]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_formula(case):
    given = inputs(case, "cpu")
    scale = 0.3
    pooled, gram = reference.multi_view_pool(
        *(given[k].double() for k in ("tokens", "codes")),
        keys=None if given["keys"] is None else given["keys"].double(),
        lengths=given["lengths"], mask=given["mask"], scale=scale,
    )
    expected_pooled, expected_gram = plain_loops(**given, scale=scale)
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gram, expected_gram, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_path_matches_the_reference(case, device):
    given = inputs(case, device)
    exact = results(reference.multi_view_pool, given, torch.float64)
    double = results(multi_view_pool, given, torch.float64, backend="torch")
    single = results(multi_view_pool, given, torch.float32, backend="torch")
    assert mvam_fast.last_backend().forward == mvam_fast.last_backend().backward == "torch"
    rounding = rounding_of_logits(given) if case.kind in ("large", "negative+lengths") else 0
    for name in exact:
        assert error(double[name], exact[name]) < 1e-12 + 1e-8 * rounding, name  # float64 rounds 1e-9 as coarsely
        assert error(single[name], exact[name]) < 1e-5 + rounding, name


@pytest.mark.parametrize("kind", ["lengths+garbage", "mask+garbage"])
@pytest.mark.parametrize("op", [reference.multi_view_pool, multi_view_pool], ids=["reference", "torch"])
def test_padding_is_never_touched(kind, op, device):
    """NaN in tokens that take no part changes nothing; their gradient is exactly 0."""
    case = Case(4, 20, 32, 4, kind=kind)
    given = inputs(case, device)
    found = results(op, given, torch.float32)
    assert all(value.isfinite().all() for value in found.values())
    valid = reference.valid_tokens(given["tokens"], given["lengths"], given["mask"])
    assert (found["d_tokens"][~valid] == 0).all()
    empty = ~valid.any(1)
    assert empty.any() and (found["P"][empty] == 0).all() and (found["G"][empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_path_in_half_precision(dtype, device):
    """At most twice the error that the plain operators make in the same precision."""
    given = inputs(Case(4, 50, 128, 8, kind="lengths", dtype=dtype), device)
    exact = results(reference.multi_view_pool, given, torch.float64)
    plain = results(reference.multi_view_pool, given, dtype)
    found = results(multi_view_pool, given, dtype, backend="torch")
    assert found["P"].dtype == dtype and found["G"].dtype == torch.float32
    for name in exact:
        assert error(found[name], exact[name]) <= 2 * error(plain[name], exact[name]), name


@pytest.mark.parametrize("op", [reference.multi_view_pool, multi_view_pool], ids=["reference", "torch"])
@pytest.mark.parametrize("keys", [False, True], ids=["shared", "separate"])
def test_gradcheck(op, keys):
    torch.manual_seed(0)
    tokens = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True) if keys else None
    codes = torch.randn(*((3, 4, 5) if keys else (4, 8)), dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([6, 0, 3])

    def call(tokens, codes, key=None):
        return op(tokens, codes, keys=key, lengths=lengths)

    assert torch.autograd.gradcheck(call, (tokens, codes) + ((key,) if keys else ()))


def test_a_norm_in_front_is_layer_norm_and_then_pooling():
    torch.manual_seed(0)
    tokens, codes, weight, bias = torch.randn(2, 7, 16), torch.randn(3, 16), torch.rand(16), torch.randn(16)
    normal = torch.nn.functional.layer_norm(tokens, (16,), weight, bias, 1e-3)
    norm = {"norm_weight": weight, "norm_bias": bias, "norm_eps": 1e-3}
    for op in (multi_view_pool, reference.multi_view_pool):
        torch.testing.assert_close(op(tokens, codes, **norm), op(normal, codes))
    torch.testing.assert_close(view_attention(tokens, codes, **norm), view_attention(normal, codes))
    keys = torch.randn(2, 7, 16)  # only the values are normalised then
    torch.testing.assert_close(
        multi_view_pool(tokens, codes, keys=keys, **norm), multi_view_pool(normal, codes, keys=keys)
    )


def test_second_derivative_is_refused_clearly():
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    pooled, _ = multi_view_pool(tokens, torch.randn(3, 8))
    with pytest.raises(RuntimeError, match="differentiated once.*reference"):
        torch.autograd.grad(pooled.sum(), tokens, create_graph=True)
    pooled, _ = reference.multi_view_pool(tokens, torch.randn(3, 8))
    (first,) = torch.autograd.grad(pooled.square().sum(), tokens, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), tokens)
    assert second.abs().sum() > 0


def test_gradients_of_any_layout_and_absence(device):
    """Expanded, sliced, transposed or missing gradients of either output."""
    given = inputs(Case(3, 12, 32, 4), device)

    def gradient(use):
        tokens = given["tokens"].detach().requires_grad_()
        use(*multi_view_pool(tokens, given["codes"])).backward()
        reference_tokens = given["tokens"].detach().double().requires_grad_()
        use(*reference.multi_view_pool(reference_tokens, given["codes"].double())).backward()
        return tokens.grad, reference_tokens.grad

    uses = {
        "expanded": lambda p, g: p.sum() + g.sum(),
        "sliced": lambda p, g: torch.cat([p, p], 1)[:, 1:6].square().sum() + g[:, :2].square().sum(),
        "transposed": lambda p, g: (p.mT.contiguous().mT * p).sum() + (g.mT * g[:1]).sum(),
        "pooled only": lambda p, g: p.square().sum(),
        "gram only": lambda p, g: g.square().sum(),
    }
    for name, use in uses.items():
        found, exact = gradient(use)
        assert error(found, exact) < 1e-5, name


def test_frozen_inputs_get_no_gradient(device):
    given = inputs(Case(2, 7, 16, 3, key_width=8), device)
    codes = given["codes"].requires_grad_()
    pooled, gram = multi_view_pool(given["tokens"], codes, keys=given["keys"])
    (pooled.sum() + gram.sum()).backward()
    assert codes.grad is not None and given["tokens"].grad is None and given["keys"].grad is None


def test_properties(device):
    given = inputs(Case(3, 29, 48, 6), device)
    tokens, codes = given["tokens"], given["codes"]
    attention = view_attention(tokens, codes)
    pooled, gram = multi_view_pool(tokens, codes)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    torch.testing.assert_close(attention @ tokens, pooled)
    torch.testing.assert_close(attention @ attention.mT, gram)
    assert (gram.diagonal(dim1=1, dim2=2).sum(-1) <= codes.shape[0] + 1e-5).all()
    order = torch.randperm(29)
    torch.testing.assert_close(multi_view_pool(tokens[:, order], codes)[0], pooled)  # no order among tokens
    keys = torch.cat([tokens, torch.ones_like(tokens[..., :1])], -1)  # a key bias cancels
    shifted = torch.cat([codes, 7 * torch.ones_like(codes[:, :1])], -1)
    again, _ = multi_view_pool(tokens, shifted, keys=keys, scale=codes.shape[-1] ** -0.5)
    torch.testing.assert_close(again, pooled)


def test_need_gram_false_and_empty_batch(device):
    given = inputs(Case(2, 7, 16, 3), device)
    pooled, gram = multi_view_pool(given["tokens"], given["codes"], need_gram=False)
    assert gram is None
    torch.testing.assert_close(pooled, multi_view_pool(given["tokens"], given["codes"])[0])
    codes = given["codes"].requires_grad_()
    pooled, gram = multi_view_pool(given["tokens"][:0], codes)
    assert pooled.shape == (0, 3, 16) and gram.shape == (0, 3, 3)
    (pooled.sum() + diversity_loss(gram)).backward()
    assert (codes.grad == 0).all()


def test_autocast_and_mixed_dtypes(device):
    given = inputs(Case(2, 9, 32, 4), device)
    codes = given["codes"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        pooled, gram = multi_view_pool(given["tokens"], codes)
    assert pooled.dtype == torch.bfloat16 and gram.dtype == torch.float32
    pooled.float().sum().backward()
    assert codes.grad.dtype == torch.float32
    pooled, _ = multi_view_pool(given["tokens"].bfloat16(), codes)  # float32 codes, bfloat16 tokens
    assert pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 0])], ids=["all", "lengths"])
@pytest.mark.parametrize("need_gram", [True, False])
def test_compiles_without_graph_breaks(lengths, need_gram):
    torch._dynamo.reset()
    tokens, codes = torch.randn(2, 7, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)

    def step(tokens, codes):
        pooled, gram = multi_view_pool(tokens, codes, lengths=lengths, need_gram=need_gram)
        return pooled.square().sum() + (diversity_loss(gram) if need_gram else 0)

    expected = torch.autograd.grad(step(tokens, codes), (tokens, codes))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(tokens, codes), (tokens, codes))
    torch.testing.assert_close(found, expected)


KINDS = {
    "frobenius": lambda g, eye: (g - eye).square().sum((1, 2)),
    "norm": lambda g, eye: (g - eye).square().sum((1, 2)).sqrt(),
    "offdiag": lambda g, eye: (g * (1 - eye)).square().sum((1, 2)),
    "cosine": lambda g, eye: (
        g / (g.diagonal(dim1=1, dim2=2)[:, :, None] * g.diagonal(dim1=1, dim2=2)[:, None]).sqrt() - eye
    ).square().sum((1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_diversity_loss(kind):
    torch.manual_seed(0)
    attention = torch.randn(5, 4, 9, dtype=torch.float64).softmax(-1)
    gram = (attention @ attention.mT).requires_grad_()
    expected = KINDS[kind](gram, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(diversity_loss(gram, kind, "none"), expected)
    torch.testing.assert_close(diversity_loss(gram, kind), expected.mean())
    torch.testing.assert_close(diversity_loss(gram, kind, "sum"), expected.sum())
    assert torch.autograd.gradcheck(lambda g: diversity_loss(g, kind), gram)


@pytest.mark.parametrize("kind", KINDS)
def test_diversity_loss_at_its_minimum_and_when_empty(kind):
    """One-hot disjoint attention and an empty sample both cost 0, and their gradient is finite."""
    gram = torch.stack([torch.eye(3), torch.zeros(3, 3)]).requires_grad_()
    loss = diversity_loss(gram, kind, "none")
    assert (loss == 0).all()
    loss.sum().backward()
    assert gram.grad.isfinite().all()
    assert float(diversity_loss(torch.zeros(0, 3, 3), kind)) == 0


X, C = torch.zeros(2, 5, 8), torch.zeros(3, 8)
BAD = {
    "tokens has shape": dict(tokens=torch.zeros(5, 8), codes=C),
    "codes has shape": dict(tokens=X, codes=torch.zeros(8)),
    r"codes has shape \(3, 3, 8\)": dict(tokens=X, codes=torch.zeros(3, 3, 8)),
    "codes holds no view": dict(tokens=X, codes=torch.zeros(0, 8)),
    "codes has width 7.*width 8": dict(tokens=X, codes=torch.zeros(3, 7)),
    "keys has shape": dict(tokens=X, codes=C, keys=torch.zeros(2, 4, 8)),
    "keys has dtype": dict(tokens=X, codes=C, keys=torch.zeros(2, 5, 8).half()),
    "tokens has dtype torch.int64": dict(tokens=X.long(), codes=C),
    "codes is list": dict(tokens=X, codes=[1.0]),
    "codes is on meta": dict(tokens=X, codes=C.to("meta")),
    "both lengths and mask": dict(tokens=X, codes=C, lengths=torch.tensor([1, 2]), mask=torch.ones(2, 5).bool()),
    r"lengths lies in 1..6; allowed is 0..N = 0..5": dict(tokens=X, codes=C, lengths=torch.tensor([1, 6])),
    r"lengths lies in -1..2": dict(tokens=X, codes=C, lengths=torch.tensor([-1, 2])),
    "lengths has dtype": dict(tokens=X, codes=C, lengths=torch.tensor([1.0, 2.0])),
    r"lengths has shape \(3,\)": dict(tokens=X, codes=C, lengths=torch.tensor([1, 2, 3])),
    "mask has dtype": dict(tokens=X, codes=C, mask=torch.ones(2, 5)),
    "mask has shape": dict(tokens=X, codes=C, mask=torch.ones(5, 2).bool()),
    r"norm_weight has shape \(7,\); it must be \[D\]": dict(tokens=X, codes=C, norm_weight=torch.ones(7)),
    "norm_bias was given without norm_weight": dict(tokens=X, codes=C, norm_bias=torch.ones(8)),
    "norm_weight is on meta": dict(tokens=X, codes=C, norm_weight=torch.ones(8, device="meta")),
    "scale is str": dict(tokens=X, codes=C, scale="1"),
    "backend is 'cuda'": dict(tokens=X, codes=C, backend="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        multi_view_pool(**BAD[message])


def test_bad_diversity_arguments_are_named():
    with pytest.raises(ValueError, match="kind is 'l2'; it must be one of frobenius"):
        diversity_loss(torch.eye(3)[None], "l2")
    with pytest.raises(ValueError, match="reduction is 'max'"):
        diversity_loss(torch.eye(3)[None], reduction="max")
    with pytest.raises(ValueError, match="gram has shape"):
        diversity_loss(torch.eye(3))


def test_the_environment_chooses_and_the_choice_is_told(monkeypatch):
    monkeypatch.setenv("MVAM_BACKEND", "torch")
    multi_view_pool(X, C)
    path = mvam_fast.last_backend()
    assert path[:3] == ("torch", "torch", "the environment variable MVAM_BACKEND asks for torch")
    monkeypatch.setenv("MVAM_BACKEND", "fast")
    with pytest.raises(ValueError, match="MVAM_BACKEND is 'fast'; it must be one of auto, triton, torch"):
        multi_view_pool(X, C)
    monkeypatch.delenv("MVAM_BACKEND")
    with pytest.raises(ValueError, match="asks for triton, which cannot run here: .*float64"):
        multi_view_pool(X.double(), C.double(), backend="triton")
