"""What goes wrong in a training: where it stops, what it keeps, and that it goes on from there."""
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
from train_cases import falling_recall, rows, weights
from train_cases import kit_config as config

from mvam_fast import MVAM
from mvam_fast.files import write_json
from mvam_fast.retrieval.scenes import make_scenes
from mvam_fast.retrieval.training import checkpoints
from mvam_fast.retrieval.training import train as train_module
from mvam_fast.retrieval.training.config import flags_of
from mvam_fast.retrieval.training.train import TrainingFailed, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=64, val=16, test=16, progress=False)


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
