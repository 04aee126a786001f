"""Without a GPU the kernels run through Triton's interpreter, which must be chosen before triton loads."""
import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """torch.empty hands out NaN, so that a kernel that leaves a value unwritten cannot pass by luck."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _exact_float32():
    """No TF32 in what the kernels are compared with."""
    torch.backends.cuda.matmul.allow_tf32 = False


CHECKPOINTS = {
    "views": {"num_views": 4},
    "global": {"num_views": 3, "global_view": True},
    "single": {"num_views": 0, "global_view": True},
    "additive": {"num_views": 2, "scoring": "additive"},
}


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """checkpoint_of("views"): the folder of a small model with random weights, made when first asked for."""
    pytest.importorskip("open_clip")
    from mvam_fast import create_model_and_transforms

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("checkpoints") / name
        torch.manual_seed(0)
        model = create_model_and_transforms("scenes-ViT-T-16", **CHECKPOINTS[name])[0]
        if model.image_gates is not None:
            with torch.no_grad():
                model.image_gates.uniform_(), model.text_gates.uniform_()
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory, checkpoint_of):
    """exported("views", precision="fp16"): the ONNX bundle of such a checkpoint, exported once. Not to be changed."""
    pytest.importorskip("onnxruntime")
    from mvam_fast.export.to_onnx import export_bundle

    @functools.cache
    def make(name, **options):
        folder = tmp_path_factory.mktemp("exported") / "bundle"
        export_bundle(checkpoint_of(name), folder, progress=False, **options)
        return folder

    return make


@pytest.fixture
def device():
    return DEVICE
