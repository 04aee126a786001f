"""The Encoder's backends that need a C++ compiler or a CUDA GPU."""
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mvam_fast.export.bundle import write_manifest
from mvam_fast.export.to_onnx import export_bundle
from PIL import Image
from test_encoder_serving import SPECS, manifest
from torch import nn

from mvam_fast import Encoder, create_model_and_transforms

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(48, 8))

    def forward(self, images):
        return images.flatten(1) @ self.weights


def aoti_bundle(folder, device):
    """One small package that stands for both towers; returns the module that it was made of."""
    tower = Product().to(device).eval()
    with torch.no_grad():
        program = torch.export.export(
            tower, (torch.zeros(2, 3, 4, 4, device=device),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "tower.pt2"),
            # The first pays from the second package on; how fast this one runs is nothing to us.
            inductor_configs={
                "cpp_cache_precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0",
            },
        )  # fmt: skip
    describe(folder, device=device)
    return tower


def describe(folder, **extra):
    entry = {"file": "tower.pt2", **SPECS["image"]}
    write_manifest(folder, manifest("aoti", towers={"image": entry, "text": entry}, **extra))


def test_packages_of_another_machine_or_torch_are_refused(tmp_path):
    """What a good one does is in test_export_aoti.py."""
    package = tmp_path / "tower.pt2"
    package.write_bytes(b"a package")
    describe(tmp_path, device="cpu", versions={"torch": "1.0"})
    with pytest.raises(RuntimeError, match="was compiled with torch 1.0 and does not load with"):
        Encoder.load(tmp_path)
    for found in ({"machine": "abacus"}, {"instructions": ["avx9999"]}):
        describe(tmp_path, device="cpu", compiled_for=found)
        with pytest.raises(RuntimeError, match="was compiled for another machine: it needs .*; export it here"):
            Encoder.load(tmp_path)
    package.write_bytes(b"a pack")
    with pytest.raises(ValueError, match="tower.pt2 is not the file that the bundle was made with"):
        Encoder.load(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    create_model_and_transforms("scenes-ViT-T-16", num_views=4)[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_gpu(checkpoint, tmp_path_factory):
    """What runs on a GPU, by backend."""
    folder = tmp_path_factory.mktemp("on_gpu")
    export_bundle(checkpoint, folder, progress=False)
    return {"torch": checkpoint, "onnxruntime-cuda": folder}


def load(on_gpu, backend, **options):
    if backend.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    return Encoder.load(on_gpu[backend], backend, **options)


def inputs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 400, (count, 24), generator=generator)
    return torch.randn(count, 3, 64, 64, generator=generator), ids


@needs_gpu
@pytest.mark.parametrize("backend", ["torch", "onnxruntime-cuda"])
def test_a_replayed_graph_equals_a_plain_call(backend, on_gpu):
    with load(on_gpu, backend, buckets=(1, 4, 8)) as graphed, load(on_gpu, backend, graphs=False) as plain:
        assert "without CUDA graphs" not in graphed.reason
        for seed, count in enumerate((1, 3, 4, 8, 17, 2, 8)):  # later ones replay what earlier ones recorded
            images, ids = (given.cuda() for given in inputs(count, seed))
            for name, given in (("encode_image", images), ("encode_text", ids)):
                found, expected = getattr(graphed, name)(given), getattr(plain, name)(given)
                assert found.device == given.device and found.shape == (count, 128)
                assert (found - expected).abs().max() <= 2e-3  # TF32; another batch may have another algorithm
        kept = graphed.encode_image(images)
        copy = kept.clone()
        graphed.encode_image(-images)
        assert torch.equal(kept, copy)


@needs_gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("backend", ["torch", "onnxruntime-cuda"])
def test_threads_and_streams_on_a_gpu(backend, graphs, on_gpu):
    images, ids = inputs(7)
    with load(on_gpu, backend, graphs=graphs) as encoder:
        expected = encoder.encode_image(images), encoder.encode_text(ids)

        def on_a_stream(number):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(1_000_000)  # inputs that are late
                here = images.cuda(non_blocking=True), ids.cuda(non_blocking=True)
                found = encoder.encode_image(here[0] + 0), encoder.encode_text(here[1] + 0)
                for tensor in here:
                    tensor.zero_()  # after they were read
                return [result.cpu() for result in found]

        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(on_a_stream, range(12)):
                assert all((one - other).abs().max() <= 1e-4 for one, other in zip(found, expected, strict=True))


@needs_gpu
def test_pictures_go_through_pinned_buffers(on_gpu):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)) for _ in range(21)]
    with load(on_gpu, "torch") as encoder, load(on_gpu, "torch", device="cpu") as reference:
        found = encoder.embed_images(pictures, batch_size=4)
        assert found.dtype == np.float32 and np.abs(found - reference.embed_images(pictures)).max() <= 2e-3
        free = encoder._decoder._staging._free
        assert len(free) == 2 and all(buffer.is_pinned() for buffer in free)
        array = encoder.encode_image(inputs(3)[0].numpy())
        assert isinstance(array, np.ndarray) and array.shape == (3, 128)


@needs_gpu
@needs_compiler
@pytest.mark.parametrize("graphs", [True, False])
def test_aoti_on_a_gpu(graphs, tmp_path):
    tower = aoti_bundle(tmp_path, "cuda")
    with Encoder.load(tmp_path, graphs=graphs) as encoder:
        for batch in (1, 3, 8, 70, 3):
            given = torch.randn(batch, 3, 4, 4, device="cuda")
            assert torch.allclose(encoder.encode_image(given), tower(given), atol=1e-2)
