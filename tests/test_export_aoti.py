"""AOTInductor packages: a CPU bundle that agrees with PyTorch, and the fused kernel's way into one for a GPU."""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mvam_fast.export import samples, to_aoti
from mvam_fast.export.bundle import ExportError, read_manifest

from mvam_fast import Encoder, reference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def checkpoint(checkpoint_of):
    return checkpoint_of("views")


@needs_compiler
def test_a_bundle_of_packages_gives_the_vectors_of_pytorch(checkpoint, tmp_path, monkeypatch):
    # Compiling is most of it: neither the speed of the wrapper nor headers for later packages are wanted here.
    monkeypatch.setattr("torch._inductor.config.aot_inductor.compile_wrapper_opt_level", "O0")
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    report = to_aoti.export_bundle(checkpoint, tmp_path / "bundle", progress=False)
    assert report == read_manifest(tmp_path / "bundle", kind="aoti")
    assert set(report["files"]) == {"image.pt2", "text.pt2", "samples.safetensors"}
    assert report["pooling"] == {"image": "plain", "text": "plain"} and report["compiled_for"]["machine"]
    for tower in ("image", "text"):
        assert set(report["parity"][tower]) == {"1", "3", "8", "17"}
        assert all(row["max_abs"] <= 1e-5 for row in report["parity"][tower].values())
    kept = samples.load(tmp_path / "bundle")
    with Encoder.load(tmp_path / "bundle") as encoder:
        assert (encoder.backend, encoder.device.type) == ("aoti", "cpu")
        batches = [kept["token_ids"][:batch] for batch in (1, 3, 8, 17)] * 3
        with ThreadPoolExecutor(4) as pool:
            for given, found in zip(batches, pool.map(encoder.encode_text, batches), strict=True):
                assert np.abs(found - kept["text_embeds"][: len(given)]).max() <= 1e-5
        images = samples.inputs_of("image", kept, report, 2)
        assert np.abs(encoder.encode_image(images) - kept["image_embeds"][:2]).max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision is 'int8'; it must be one of fp32, fp16, bf16"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
    ],
)
def test_bad_options_are_named(options, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_aoti.export_bundle(checkpoint, tmp_path / "bundle", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_packages_are_compiled_where_they_will_run(checkpoint, tmp_path, capsys):
    assert to_aoti.main([str(checkpoint), "--out", str(tmp_path / "bundle"), "--device", "cuda"]) == 1
    assert "to_aoti: error: device is 'cuda', but there is no CUDA GPU" in capsys.readouterr().err


def test_a_tower_that_cannot_be_compiled_is_told_as_such(tmp_path):
    class BranchesOnData(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="tower.pt2: torch cannot compile this tower"):
        to_aoti.compile_package(BranchesOnData(), torch.ones(2, 3), tmp_path / "tower.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "views", "width"), [(1, 17, 3, 64), (3, 50, 16, 123), (2, 5, 33, 96)])
def test_the_launch_that_is_compiled_in_equals_the_reference(batch, length, views, width, dtype, device):
    """The kernel through Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from mvam_fast.export.pool_triton import launch
    from mvam_fast.kernels.plugin_forward import multi_view_pool_plugin

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, length, width, generator=generator).to(device, dtype)
    codes = torch.randn(views, width, generator=generator).to(device, dtype)
    lengths = torch.randint(0, length + 1, (batch,), generator=generator).to(device)
    valid = torch.arange(length, device=device) < lengths[:, None]
    tokens[~valid] = float("nan")
    found = launch(multi_view_pool_plugin, tokens, codes, valid.int(), 0.1)
    exact, _ = reference.multi_view_pool(tokens.double(), codes.double(), mask=valid, scale=0.1)
    own, _ = reference.multi_view_pool(tokens, codes, mask=valid, scale=0.1)
    assert found.dtype == dtype
    allowed = max(2 * (own - exact).abs().max().item(), 1e-5)
    assert (found - exact).abs().max().item() <= allowed


TRACE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import wrap_triton
torch.cuda.get_device_capability = lambda *_: (9, 0)
import mvam_fast
from mvam_fast.dispatch import exporting_as
from mvam_fast.export import pool_triton
from mvam_fast.kernels.plugin_forward import multi_view_pool_plugin

class Pool(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = torch.nn.Parameter(torch.empty(16, 768, device="cuda", dtype=torch.float16))
    def forward(self, tokens, lengths):
        return mvam_fast.multi_view_pool(tokens, self.codes, lengths=lengths, need_gram=False)[0]

with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
    pool, form = Pool(), pool_triton.TritonForm()
    tokens = torch.empty(2, 197, 768, device="cuda", dtype=torch.float16)
    lengths = torch.empty(2, dtype=torch.int32, device="cuda")
    with exporting_as(form):
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(pool, (tokens, lengths), dynamic_shapes=({0: batch},) * 2, strict=False)
    print(form.found, [str(n.target) for n in program.graph.nodes if "mvam" in str(n.target)])
    mask = torch.empty(2, 197, device="cuda", dtype=torch.int32)
    kernel = wrap_triton(multi_view_pool_plugin)
    graph = make_fx(lambda *given: pool_triton.launch(kernel, *given, 0.1))(tokens, pool.codes, mask).graph
    (node,) = [n for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    print(node.kwargs["grid"], sorted(n for n, v in node.kwargs["kwargs"].items() if isinstance(v, torch.fx.Node)))
"""


def test_a_package_for_a_gpu_holds_the_kernel_for_any_batch():
    """As far as can be seen without one: the exported program has our operator, which is a launch of our kernel."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRACE], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    exported, launched = done.stdout.splitlines()
    assert exported == "['triton'] ['mvam.graph_pool.default']"
    assert launched == "[(2, 1, 1)] ['C', 'MASK', 'P', 'X']"
