"""Random shapes, strides, masks, options and gradient layouts through every path, against the float64 reference."""
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_cases import Case, error, inputs, results

from mvam_fast import reference
from mvam_fast.functional import multi_view_pool

# Derandomised: the same cases in every run. Shrinking is left to whoever runs this by hand.
CASES = settings(
    max_examples=320, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip


def kernel_cases(count: int) -> settings:
    """Fewer on a GPU, where a case compiles kernels of its own, for seconds; no compiler is in the interpreter."""
    return settings(CASES, max_examples=count // 8 if torch.cuda.is_available() else count)


@st.composite
def cases(draw, dtype):
    kinds = [draw(st.sampled_from(["plain", "lengths", "mask"]))]
    if kinds != ["plain"]:
        kinds += ["garbage"] * draw(st.booleans())
    kinds += draw(st.lists(st.sampled_from(["strided", "percodes", "transposed", "constant"]), unique=True, max_size=2))
    key_width = draw(st.none() | st.integers(1, 70))
    if key_width is None and draw(st.booleans()):
        kinds += ["norm"] + ["unbiased"] * draw(st.booleans())
        kinds = [kind for kind in kinds if kind != "constant"]
    # One wide axis at a time keeps the interpreter quick: many tokens reach the splits, many samples the long loops.
    wide = draw(st.sampled_from(["batch", "length", "length", "width", "views"]))
    batch = draw(st.integers(0, 11 if wide == "batch" else 3))
    length = draw(st.integers(100, 200) if wide == "length" else st.integers(1, 34))
    width = draw(st.integers(2, 300 if wide == "width" else 48))
    if "norm" in kinds:  # over a few numbers x^ is +-1 whatever they are, and gradients are nothing but cancellation
        width = max(width, 16)
    views = draw(st.integers(10, 64) if wide == "views" else st.integers(1, 9))
    return Case(batch, length, width, views, key_width, "+".join(kinds), dtype)


def check(case, device, backend, dtype):
    given_ = inputs(case, device)
    need_gram = case.length % 5 != 0
    exact = results(reference.multi_view_pool, given_, torch.float64, need_gram=need_gram)
    found = results(multi_view_pool, given_, dtype, need_gram=need_gram, backend=backend)
    plain = results(reference.multi_view_pool, given_, dtype, need_gram=need_gram) if dtype != torch.float32 else None
    for name in exact:
        # Absolute below 1, and some gradients are differences that cancel, to 0 for one token: 3e-5 is their rounding.
        # A LayerNorm over few numbers is steep where these happen to be close.
        if plain is None:
            allowed = 1e-4 if "norm" in case.kind else 3e-5
        else:
            allowed = 3 * max(error(plain[name], exact[name]), torch.finfo(dtype).eps)
        assert error(found[name], exact[name]) <= allowed, (name, case)


@kernel_cases(160)
@given(cases(torch.float32))
def test_kernels_in_float32(device, case):
    check(case, device, "triton", torch.float32)


@kernel_cases(100)
@given(cases(torch.float16))
def test_kernels_in_float16(device, case):
    check(case, device, "triton", torch.float16)


@CASES
@given(cases(torch.float32))
def test_portable_path_in_float32(device, case):
    check(case, device, "torch", torch.float32)


@kernel_cases(60)
@given(
    cases(torch.float32),
    st.sampled_from(["expanded", "sliced", "transposed", "pooled only", "gram only"]),
    st.sampled_from(["triton", "torch"]),
)
def test_incoming_gradients_of_any_layout(device, case, use, backend):
    given_ = inputs(case, device)
    uses = {
        "expanded": lambda p, g: p.sum() + g.sum(),
        "sliced": lambda p, g: torch.cat([p, p], 1)[:, 1:].square().sum() + g[:, :2].square().sum(),
        "transposed": lambda p, g: (p.mT.contiguous().mT * p).sum() + (g.mT.contiguous().mT * g).sum(),
        "pooled only": lambda p, g: p.square().sum(),
        "gram only": lambda p, g: g.square().sum(),
    }
    found = []
    for op, dtype, options in (
        (multi_view_pool, torch.float32, {"backend": backend}), (reference.multi_view_pool, torch.float64, {}),
    ):  # fmt: skip
        tensors = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in given_.items() if v is not None}
        tensors["tokens"].requires_grad_()
        tensors["codes"].requires_grad_()
        loss = uses[use](*op(**tensors, **options))
        found.append(torch.autograd.grad(loss, [tensors["tokens"], tensors["codes"]], allow_unused=True))
    for name, one, exact in zip(("tokens", "codes"), *found, strict=True):
        if exact is None:  # not used: separate keys, and only the Gram matrix
            assert not one.any(), (name, case, use)
        else:
            assert error(one, exact) <= (2e-4 if "norm" in case.kind else 5e-5), (name, case, use)


def test_the_cases_reach_every_layout():
    """Not only a count: persistent, split and grouped kernels, and per-sample codes, are among the float32 cases."""
    pytest.importorskip("triton")
    from mvam_fast.kernels import schedule

    seen = []

    @CASES
    @given(cases(torch.float32))
    def collect(case):
        seen.append(case)

    collect()
    assert len(seen) >= 300
    plans = [schedule.forward(torch.empty(c.batch, c.length, 1), 16, "percodes" in c.kind) for c in seen if c.batch]
    assert sum(plan.persistent for plan in plans) >= 10
    assert sum(plan.splits > 1 for plan in plans) >= 10
    assert sum(case.views > 32 for case in seen) >= 5
