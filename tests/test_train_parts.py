"""Training by several processes, or in parts of a batch, is training by one on the whole."""
import json
import os
import subprocess
import sys

import pytest
import torch
from train_cases import assert_same_run, dying_at, rows, weights
from train_cases import kit_config as config

from mvam_fast import MVAM
from mvam_fast.retrieval.scenes import make_scenes
from mvam_fast.retrieval.training import train as train_module
from mvam_fast.retrieval.training.config import flags_of
from mvam_fast.retrieval.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=64, val=16, test=16, progress=False)


@pytest.fixture(scope="module")
def launched():
    def launch(settings):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mvam_fast.cli"]
        done = subprocess.run(
            [sys.executable, *command, "train", *flags_of(settings)], capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return launch


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(data, out), progress=False)
    return out


def test_two_processes_equal_one(data, whole, tmp_path, launched):
    launched(config(data, tmp_path / "two"))
    assert json.loads((tmp_path / "two/result.json").read_text())["processes"] == 2
    assert_same_run(tmp_path / "two", whole, rtol=2e-5)
    for name, value in weights(whole).items():
        # Adam divides by the root of a mean square: where a gradient is all rounding, so is the step's direction.
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=1e-3, msg=name)


def test_two_processes_go_on_with_what_one_began(data, tmp_path, launched):
    """In cached parts, with an average of the weights and evaluations."""
    changes = {"accumulation_steps": 2, "global_view": True, "ema": 0.9, "eval_every": 3, "save_every": 2}
    train(config(data, tmp_path / "whole", **changes), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        dying_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "cut", **changes), progress=False)
    launched(config(data, tmp_path / "cut", resume=True, **changes))
    result = json.loads((tmp_path / "cut/result.json").read_text())
    assert (result["processes"], result["resumed_at"]) == (2, 2)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", rtol=2e-5)
    expected = weights(tmp_path / "whole")
    for name, value in weights(tmp_path / "cut").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-4, msg=name)


def test_parameters_that_no_loss_reaches_are_frozen(data):
    """SigLIP's own pooling, where only learned views are kept: several processes would wait for its gradient."""
    open_clip = pytest.importorskip("open_clip")
    model = MVAM(open_clip.create_model("ViT-B-16-SigLIP", pretrained=None), 2)
    store = type("Store", (), {
        "load": lambda self, indices: (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), [0]),
        "normalize": lambda self, images: images.float(),
    })()  # fmt: skip
    training = type("Training", (), {
        "model": model, "val_store": store, "tokenizer": lambda self, texts: torch.ones(2, 64, dtype=torch.long),
    })()  # fmt: skip
    train_module._Training._freeze_what_is_not_reached(training)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".trunk.attn_pool." in name for name in frozen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_cached_parts_equal_the_whole_batch(data, whole, tmp_path):
    train(config(data, tmp_path / "parts", accumulation_steps=4), progress=False)
    assert_same_run(tmp_path / "parts", whole, rtol=2e-5)


def test_separate_parts_have_fewer_negatives(data, whole, tmp_path):
    train(config(data, tmp_path / "parts", accumulation_steps=4, accumulation="separate"), progress=False)
    first, other = rows(tmp_path / "parts")[0], rows(whole)[0]
    assert first["contrastive_loss"] < other["contrastive_loss"] - 0.5  # about ln 4 less, of ln 16
    assert first["image_diversity_loss"] == pytest.approx(other["image_diversity_loss"], rel=1e-5)


def test_gradients_of_parts_are_those_of_the_whole(data, tmp_path, monkeypatch):
    """Parameter by parameter, as they stand when the optimizer is about to use them."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for name, changes in (("one", {}), ("parts", {"accumulation_steps": 8})):
        train(config(data, tmp_path / name, steps=1, grad_clip=0.0, global_view=True, **changes), progress=False)
    largest = max(gradient.abs().max() for gradient in seen[0])
    for one, parts in zip(*seen, strict=True):
        torch.testing.assert_close(parts, one, rtol=1e-4, atol=1e-6 * largest.item())


def test_parts_must_divide_the_batch(data, tmp_path):
    with pytest.raises(ValueError, match="accumulation_steps is 3; it must divide the 16 images"):
        train(config(data, tmp_path / "run", accumulation_steps=3), progress=False)


def test_checkpointed_encoders_learn_the_same(data, whole, tmp_path):
    train(config(data, tmp_path / "run", grad_checkpointing=True), progress=False)
    assert_same_run(tmp_path / "run", whole, rtol=1e-5)
