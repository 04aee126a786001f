"""The kernels at the sizes that encoders have, on a GPU: values, layouts, large tensors, repetition, graphs, streams.

What small sizes show is in test_kernels.py, which runs on a GPU too; `make gpu` runs both.
"""
import sys
from pathlib import Path

import pytest
import torch
from gpu_checks import check, draw, results
from op_cases import Case

import mvam_fast
from mvam_fast.functional import multi_view_pool

pytest.importorskip("triton")
from mvam_fast.kernels import schedule, tiles  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from shapes import SHAPES  # noqa: E402
from timing import WARM_UPS, captured  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; the interpreter has its own")

KINDS = ["plain", "lengths", "norm"]
HALF = [torch.bfloat16, torch.float16]


def run(given: dict, **options) -> dict[str, torch.Tensor]:
    return results(multi_view_pool, given, given["tokens"].dtype, backend="triton", **options)


def filling(shape: str, views: int, dtype: torch.dtype, kind: str, device: str) -> Case:
    """A batch of some 100 MB and at least one more than a wave of programs, so that the last wave is not full."""
    length, width = SHAPES[shape]
    wave = schedule.slots(torch.device(device, torch.cuda.current_device()))
    return Case(max(100_000_000 // (2 * length * width), wave + 7), length, width, views, kind=kind, dtype=dtype)


def check_shape(shape, views, dtype, kind, device):
    case = filling(shape, views, dtype, kind, device)
    given = draw(case, device)
    check(given, run(given))
    path = mvam_fast.last_backend()
    capability = torch.cuda.get_device_capability()
    no_backward = tiles.obstacle("backward", capability, dtype, case.width, None, views)
    assert path[:2] == ("triton", "torch" if no_backward else "triton"), path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_real_shapes(dtype, kind, shape, device):
    check_shape(shape, 16, dtype, kind, device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views", [8, 32, 1])
def test_other_numbers_of_views(views, kind, shape, device):
    check_shape(shape, views, torch.bfloat16, kind, device)


@pytest.mark.late
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views", [8, 32, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_numbers_of_views_in_other_precisions(dtype, views, kind, shape, device):
    check_shape(shape, views, dtype, kind, device)


LAYOUTS = {
    "splits": [
        Case(1, 577, 1024, 16), Case(4, 577, 1024, 16, kind="lengths"), Case(16, 729, 1152, 16, kind="norm+mask"),
        Case(1, 197, 768, 8, kind="norm"), Case(7, 577, 1024, 16, kind="percodes"),
        Case(1, 4096, 768, 16),
    ],
    "persistent": [
        Case(4096, 50, 768, 16), Case(4096, 77, 512, 16, kind="lengths"), Case(3001, 77, 768, 8, kind="norm+lengths"),
        Case(2048, 128, 512, 16, kind="mask"), Case(20_011, 17, 384, 4, kind="lengths"),
    ],
    "groups": [
        Case(300, 197, 768, 64), Case(300, 197, 512, 48, kind="lengths"), Case(300, 77, 2048, 32, kind="norm"),
        Case(2, 577, 768, 64, kind="mask"),  # and splits
    ],
    "a program per sample": [
        Case(300, 77, 512, 16, kind="percodes+lengths"), Case(300, 197, 768, 16, kind="strided"),
        Case(300, 577, 1024, 16, kind="strided+norm+mask"), Case(300, 197, 768, 16, key_width=256),
        Case(300, 257, 512, 8, key_width=512, kind="lengths+percodes"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "case"), [(k, c) for k, cases in LAYOUTS.items() for c in cases], ids=str)
def test_every_layout(layout, case, dtype, device):
    case = Case(**{**vars(case), "dtype": dtype})
    given = draw(case, device)
    capability = torch.cuda.get_device_capability()
    norm = "norm" in case.kind
    obstacle = tiles.obstacle("forward", capability, dtype, case.width, case.key_width, case.views, norm)
    if obstacle:
        pytest.skip(f"no kernel here: {obstacle}")
    tile = tiles.choose("forward", given["tokens"], case.views, case.key_width, norm)
    plan = schedule.forward(given["tokens"], tile.block_n, "percodes" in case.kind)
    held = [
        name
        for name, holds in (
            ("splits", plan.splits > 1), ("persistent", plan.persistent), ("groups", tile.groups(case.views) > 1),
        )
        if holds
    ]  # fmt: skip
    assert layout in (held or ["a program per sample"])
    check(given, run(given))


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["plain", "norm+lengths"])
def test_more_than_two_to_the_31_elements(kind, device):
    case = Case(4096, 729, 768, 16, kind=kind, dtype=torch.bfloat16)
    elements = case.batch * case.length * case.width
    assert elements > 2**31
    need, (free, _) = 4 * elements + (6 << 30), torch.cuda.mem_get_info()
    if free < need:
        pytest.skip(f"needs {need >> 30} GiB of GPU memory, {free >> 30} are free")
    given = draw(case, device)
    found = run(given)
    assert found["d_tokens"].numel() > 2**31
    check(given, found)


@pytest.mark.parametrize(
    "case",
    [
        Case(300, 197, 768, 16, kind="norm+lengths"), Case(2048, 77, 512, 16, kind="lengths"), Case(2, 577, 1024, 16),
        Case(100, 197, 768, 64),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_repeats_bit_for_bit_eager_and_as_a_graph(case, dtype, device):
    given = draw(Case(**{**vars(case), "dtype": dtype}), device)
    first = run(given)
    for _ in range(50):
        again = run(given)
        assert all(torch.equal(first[name], again[name]) for name in first)
    replay, held = captured(lambda: run(given))
    for _ in range(3):
        for tensor in held.values():
            tensor.fill_(float("nan"))
        replay()
        assert all(torch.equal(first[name], held[name]) for name in first)


class Training:
    """Steps of a head of views on fixed tokens: the op with its LayerNorm, the diversity loss, an optimiser."""

    def __init__(self, device: str):
        torch.manual_seed(0)
        self.tokens = torch.randn(256, 197, 768, device=device, dtype=torch.bfloat16)
        self.lengths = torch.randint(1, 198, (256,), device=device)
        self.norm = torch.nn.LayerNorm(768, device=device)
        self.codes = torch.nn.Parameter(torch.randn(16, 768, device=device))
        self.parameters = [self.codes, *self.norm.parameters()]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-3, capturable=True)
        self.loss = torch.zeros((), device=device)

    def step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        pooled, gram = multi_view_pool(
            self.tokens, self.codes, lengths=self.lengths, backend="triton",
            norm_weight=self.norm.weight, norm_bias=self.norm.bias,
        )  # fmt: skip
        loss = pooled.float().square().mean() + 0.01 * mvam_fast.diversity_loss(gram)
        loss.backward()
        self.optimiser.step()
        self.loss.copy_(loss.detach())


def test_a_training_step_is_captured_as_a_graph(device):
    eager, graphed = Training(device), Training(device)
    replay, _ = captured(graphed.step)  # the capture itself runs nothing
    for _ in range(WARM_UPS):
        eager.step()
    before = [parameter.detach().clone() for parameter in eager.parameters]
    for _ in range(5):
        eager.step()
        replay()
        torch.testing.assert_close(graphed.loss, eager.loss)
        for one, other in zip(graphed.parameters, eager.parameters, strict=True):
            torch.testing.assert_close(one, other)
    assert all((one != other).any() for one, other in zip(before, graphed.parameters, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiles_without_graph_breaks(dtype, kind, device):
    torch._dynamo.reset()
    given = draw(Case(256, 197, 768, 16, kind=kind, dtype=dtype), device)
    compiled = torch.compile(lambda **arguments: multi_view_pool(**arguments, backend="triton"), fullgraph=True)
    check(given, results(compiled, given, dtype))


def test_autocast_in_a_real_model(device, monkeypatch):
    """bfloat16 autocast in an MVAM of ViT-B-32: as near to float32 as the portable path, twice its error at most."""
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model, *_ = mvam_fast.create_model_and_transforms("ViT-B-32", num_views=16)
    texts = torch.randint(1, 1000, (64, 77))
    texts[:, 20] = 49407  # the end of a text has the largest id
    check_autocast(model.to(device), torch.randn(64, 3, 224, 224, device=device), texts.to(device), monkeypatch)


def check_autocast(model, images, texts, monkeypatch):
    device = images.device.type
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def gradients(backend: str, enabled: bool) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("MVAM_BACKEND", backend)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            output = model(images, texts)
            scores = output["image_features"].float() @ output["text_features"].float().T
            loss = torch.nn.functional.cross_entropy(10 * scores, torch.arange(len(images), device=device))
            loss = loss + mvam_fast.diversity_loss(output["image_gram"]) + mvam_fast.diversity_loss(output["text_gram"])
        assert mvam_fast.last_backend().forward == backend and output["image_gram"].dtype == torch.float32
        loss.backward()
        found = {name: output[name].detach() for name in ("image_features", "text_features", "image_gram", "text_gram")}
        return found | {"d_image_codes": model.image_pool.codes.grad, "d_text_codes": model.text_pool.codes.grad}

    exact, portable, ours = gradients("torch", False), gradients("torch", True), gradients("triton", True)
    for name, value in exact.items():
        theirs, own = ((found[name].double() - value).norm() / value.norm() for found in (portable, ours))
        assert own <= 2 * theirs.clamp_min(torch.finfo(torch.bfloat16).eps / 2), name


def test_two_streams_at_once(device):
    """Each stream's launches go to it and its tensors stay its own, forward and backward."""
    given = [draw(Case(200, 197, 768, 16, kind=kind, dtype=torch.bfloat16), device) for kind in ("lengths", "norm")]
    expected = [run(one) for one in given]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(10):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[index].append(run(given[index]))
    torch.cuda.synchronize()
    for one, repeats in zip(expected, found, strict=True):
        for again in repeats:
            assert all(torch.equal(one[name], again[name]) for name in one)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_decide_on_which_gpu_it_runs():
    case = Case(300, 197, 768, 16, kind="norm+lengths", dtype=torch.bfloat16)
    given = draw(case, "cuda:1")
    with torch.cuda.device(0):
        found = run(given)
    assert all(tensor.device == torch.device("cuda:1") for tensor in found.values())
    check(given, found)
