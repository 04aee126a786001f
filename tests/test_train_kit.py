"""Training beyond the plain loop: several processes, parts of a batch, averages, early stopping, failures."""
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from train_cases import config as case
from train_cases import rows, weights

from mvam_fast import MVAM
from mvam_fast.files import write_json
from mvam_fast.retrieval.evaluation.metrics import recall_metrics
from mvam_fast.retrieval.scenes import make_scenes
from mvam_fast.retrieval.training import checkpoints
from mvam_fast.retrieval.training import train as train_module
from mvam_fast.retrieval.training.config import TrainConfig, flags_of
from mvam_fast.retrieval.training.optimization import diversity_weight, make_optimizer
from mvam_fast.retrieval.training.train import TrainingFailed, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=64, val=16, test=16, progress=False)


def config(data, out, **changes):
    return case(data, out, **{"save_every": 100, "tensorboard": False, "diversity_weight": 0.1, **changes})


def assert_same_run(out, expected, rtol):
    for row, other in zip(rows(out), rows(expected), strict=True):
        assert row.keys() == other.keys()
        for name in other:
            if "loss" in name or name in ("logit_scale", "lr") or name.endswith("overlap"):
                assert row[name] == pytest.approx(other[name], rel=rtol), (other["step"], name)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(data, out), progress=False)
    return out


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


def test_the_average_is_what_is_kept(data, whole, tmp_path):
    """By hand over the weights of every step, which a run that is cut after each of them leaves."""
    decay, average = 0.5, None
    for steps in range(1, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "rate_at", lambda config, step: 1.0)
            train(config(data, tmp_path / f"{steps}", steps=steps), progress=False)
            now = weights(tmp_path / f"{steps}")
            average = now if average is None else {n: average[n] * decay + now[n] * (1 - decay) for n in now}
            if steps == 3:
                train(config(data, tmp_path / "ema", steps=3, ema=decay), progress=False)
    for name, value in weights(tmp_path / "ema").items():
        torch.testing.assert_close(value, average[name], msg=name)


def test_a_resumed_average_goes_on(data, tmp_path):
    changes = {"ema": 0.9, "save_every": 2, "eval_every": 3}
    train(config(data, tmp_path / "whole", **changes), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        dying_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "cut", **changes), progress=False)
    train(config(data, tmp_path / "cut", resume=True, **changes), progress=False)
    assert json.loads((tmp_path / "cut/result.json").read_text())["resumed_at"] == 4
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "cut").items())


def dying_at(patch, step):
    """Training dies as it takes this step."""
    asked = train_module.rate_at

    def rate(config, now):
        if now == step:
            raise KeyboardInterrupt
        return asked(config, now)

    patch.setattr(train_module, "rate_at", rate)


def falling_recall(patch, values):
    found = iter(values)
    patch.setattr(train_module, "recall_metrics", lambda *features: {**recall_metrics(*features), "rsum": next(found)})


def test_early_stopping_keeps_the_best_model(data, tmp_path, monkeypatch):
    changes = {"steps": 30, "eval_every": 2, "early_stopping": 2, "save_every": 3}
    falling_recall(monkeypatch, [50.0, 90.0, 80.0, 90.0])
    train(config(data, tmp_path / "run", **changes), progress=False)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["best_step"]) == (8, 4)  # an equal RSUM is not better
    assert not list((tmp_path / "run").glob("best-*"))
    with monkeypatch.context() as patch:  # cut after the evaluation of step 6, and the checkpoint there
        falling_recall(patch, [50.0, 90.0, 80.0])
        dying_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "cut", **changes), progress=False)
        patch.undo()
        falling_recall(patch, [90.0])
        train(config(data, tmp_path / "cut", resume=True, **changes), progress=False)
    result = json.loads((tmp_path / "cut/result.json").read_text())
    assert (result["steps"], result["best_step"], result["resumed_at"]) == (8, 4, 6)
    assert (tmp_path / "cut/model/model.safetensors").read_bytes() == (
        tmp_path / "run/model/model.safetensors"
    ).read_bytes()


def test_a_loss_that_is_no_number_stops_with_what_to_look_at(data, tmp_path):
    """Step 2 is taken far too far: its checkpoint is whole, but what it holds is good for nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "rate_at", lambda config, step: 1e30 if step == 2 else 1.0)
        message = "the loss of step 3 is not finite .* last good checkpoint is .*-000001:"
        with pytest.raises(TrainingFailed, match=message):
            train(config(data, tmp_path / "run", save_every=1), progress=False)
    report = json.loads((tmp_path / "run/failure-0.json").read_text())
    assert report["step"] == 3 and len(report["batch"]) == 16
    assert all(".png (id " in name for name in report["batch"])
    assert not (tmp_path / "run/result.json").exists()
    train(config(data, tmp_path / "run", save_every=1, resume=True), progress=False)
    assert json.loads((tmp_path / "run/result.json").read_text())["resumed_at"] == 1
    assert all(row["loss"] < 10 for row in rows(tmp_path / "run") if "loss" in row)


def test_a_gradient_that_is_no_number_is_not_used(data, tmp_path, monkeypatch):
    backward = torch.Tensor.backward

    def spoiled(self, *arguments, **options):
        backward(self, *arguments, **options)
        if train_steps[-1] == 3:
            logit_scale[0].grad.fill_(math.nan)

    train_steps, logit_scale, real = [], [], train_module.rate_at
    monkeypatch.setattr(train_module, "rate_at", lambda config, step: (train_steps.append(step), real(config, step))[1])
    made = train_module.make_model
    monkeypatch.setattr(
        train_module, "make_model", lambda config: (found := made(config), logit_scale.append(found[0].logit_scale))[0]
    )
    monkeypatch.setattr(torch.Tensor, "backward", spoiled)
    message = "the gradient of step 3 is not finite .* last good checkpoint is .*-000001:"
    with pytest.raises(TrainingFailed, match=message):
        train(config(data, tmp_path / "run", save_every=1), progress=False)
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {"failed-step-000002", "step-000001"}


def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    real = checkpoints.write_json

    def full(path, value):
        if value.get("progress", {}).get("step") == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(checkpoints, "write_json", full)
    message = "step-000002, is whole; the checkpoint of step 4 could not be written to .*No space"
    with pytest.raises(OSError, match=message):
        train(config(data, tmp_path / "run", save_every=2), progress=False)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    train(config(data, tmp_path / "run", save_every=2, resume=True), progress=False)
    assert json.loads((tmp_path / "run/result.json").read_text())["resumed_at"] == 2


def test_a_full_disk_leaves_no_half_model(data, tmp_path, monkeypatch):
    real = MVAM.save_pretrained

    def full(self, folder, **tools):
        real(self, folder, **tools)
        if "model" in folder.name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(MVAM, "save_pretrained", full)
    message = "the last checkpoint is .*step-000004; the model could not be written .*No space"
    with pytest.raises(OSError, match=message):
        train(config(data, tmp_path / "run", save_every=4), progress=False)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "config.json", "metrics.jsonl"}


def test_a_run_cut_short_at_its_very_end_is_finished(data, tmp_path, monkeypatch):
    """Between the best model and the result."""
    changes = {"steps": 8, "eval_every": 2, "early_stopping": 9, "save_every": 6}
    with monkeypatch.context() as patch:
        falling_recall(patch, [90.0, 80.0, 70.0, 60.0])
        patch.setattr(train_module, "write_json", write_unless_result)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "run", **changes), progress=False)
    falling_recall(monkeypatch, [60.0])
    train(config(data, tmp_path / "run", resume=True, **changes), progress=False)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["best_step"], result["validation"]["rsum"], result["last_validation"]["rsum"]) == (2, 90.0, 60.0)
    assert not list((tmp_path / "run").glob("best-*")) and MVAM.from_pretrained(tmp_path / "run/model").num_views == 2


def write_unless_result(path, value):
    if path.name == "result.json":
        raise KeyboardInterrupt
    write_json(path, value)


def test_other_files_among_the_checkpoints_are_left_alone(data, tmp_path):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    (folder / ".nfs0001").write_text("")
    (folder / "step-000001.bak").mkdir()
    train(config(data, tmp_path / "run", save_every=1), progress=False)
    assert {path.name for path in folder.iterdir()} == {".nfs0001", "step-000001.bak", "step-000004", "step-000005"}


def test_it_warns_of_views_that_coincide(data, tmp_path, capsys):
    train(config(data, tmp_path / "equal", steps=2, warmup=1, code_std=0.001), progress=False)
    assert "warning: the image views coincide at step 1" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "equal/result.json").read_text())["warnings"]) == 2  # one for each tower
    train(config(data, tmp_path / "apart", steps=2, warmup=1), progress=False)
    assert json.loads((tmp_path / "apart/result.json").read_text())["warnings"] == []


def test_tensorboard_has_the_same_rows(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(data, tmp_path / "run", tensorboard=True, steps=3), progress=False)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(row["step"], row["loss"]) for row in rows(tmp_path / "run") if "loss" in row]
    assert losses == [(step, pytest.approx(loss)) for step, loss in expected]
    assert [event.step for event in events.Scalars("val/rsum")] == [3]


def test_groups_of_parameters():
    from mvam_fast import create_model_and_transforms

    model, _, _ = create_model_and_transforms("scenes-ViT-T-16", None, 2, global_view=True, view_dim=8)
    groups = make_optimizer(model, TrainConfig(lr=1e-4, head_lr=1e-2, weight_decay=0.1)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        (group["peak"], group["weight_decay"]): {names[id(p)] for p in group["params"]} for group in groups
    }  # fmt: skip
    assert found[1e-2, 0.0] == {"image_pool.codes", "text_pool.codes", "image_gates", "text_gates"}
    assert found[1e-2, 0.1] == {"image_projection.weight", "text_projection.weight"}
    assert {"clip.visual.proj", "clip.text_projection"} <= found[1e-4, 0.1] and "clip.logit_scale" in found[1e-4, 0.0]
    assert sum(map(len, found.values())) == len(names)


def test_schedules_of_the_diversity_weight():
    for schedule, expected in (("constant", [2, 2]), ("rise", [0.5, 2]), ("fall", [1.5, 0])):
        settings = TrainConfig(steps=4, diversity_weight=2.0, diversity_schedule=schedule)
        assert [diversity_weight(settings, step) for step in (1, 4)] == expected


def test_codes_can_stay_as_they_are(data, tmp_path):
    """One view with codes of 0 is mean pooling."""
    train(config(data, tmp_path / "mean", views=1, code_std=0.0, train_codes=False), progress=False)
    model = MVAM.from_pretrained(tmp_path / "mean/model")
    assert not model.image_pool.codes.any()
    attention = model.image_attention(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(attention, torch.full_like(attention, 1 / 17))


@pytest.mark.slow
def test_ten_kills_at_random_steps(data, tmp_path):
    """Each of ten runs is killed once at a random moment and resumed: the same metrics and weights as without."""
    changes = {"steps": 40, "save_every": 3, "eval_every": 10}
    train(config(data, tmp_path / "whole", **changes), progress=False)
    expected, seconds = rows(tmp_path / "whole"), random.Random(0)
    for number in range(10):
        out = tmp_path / f"killed-{number}"
        command = [sys.executable, "-m", "mvam_fast.cli", "train", *flags_of(config(data, out, resume=True, **changes))]
        step = seconds.randrange(1, 40)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and last_step(out) < step:
            time.sleep(0.002)
        time.sleep(seconds.random() * 0.1)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
        subprocess.run(command, check=True, capture_output=True)
        assert rows(out) == expected, (number, step)
        assert all(torch.equal(value, weights(tmp_path / "whole")[name]) for name, value in weights(out).items())
        print(f"run {number}: killed after step {step}", math.isfinite(expected[-1]["rsum"]))


def last_step(out):
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except FileNotFoundError:
        return 0
