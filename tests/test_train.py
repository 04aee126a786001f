"""Training: it learns, it can be killed at any moment and resumed exactly, and it counts what it could not read."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from train_cases import config, rows

from mvam_fast import MVAM, cli
from mvam_fast.retrieval.data.datasets import UnreadableImage
from mvam_fast.retrieval.evaluation.evaluate import evaluate, recall_table
from mvam_fast.retrieval.scenes import make_scenes
from mvam_fast.retrieval.training import checkpoints
from mvam_fast.retrieval.training.optimization import rate_at
from mvam_fast.retrieval.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=64, val=16, test=16, progress=False)


def test_it_learns_and_leaves_a_model_and_a_log(data, tmp_path):
    changes = {"steps": 40, "save_every": 100, "eval_every": 20, "diversity_weight": 0.01}
    model = train(config(data, tmp_path / "run", **changes), progress=False)
    assert model == tmp_path / "run/model" and MVAM.from_pretrained(model).num_views == 2
    log = rows(tmp_path / "run")
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for row in log:
        if "loss" in row:
            parts = row["contrastive_loss"] + row["image_diversity_loss"] + row["text_diversity_loss"]
            assert row["loss"] == pytest.approx(parts, rel=1e-5)
            assert 0 < row["image_view_overlap"] <= 1
    assert [row["step"] for row in log if row.get("split") == "val"] == [20, 40]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["validation"]["images"] == 16 and result["unreadable"] == {}


def stop_at(step, monkeypatch):
    """Training dies when it asks for the temperature of this step, as if killed in the middle of it."""
    clamp, calls = torch.Tensor.clamp_, []

    def dying(self, *arguments):
        calls.append(self)
        if len(calls) == step:
            raise KeyboardInterrupt
        return clamp(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "clamp_", dying)


@pytest.mark.parametrize("changes", [{}, {"views": 0, "global_view": True}], ids=["mvam", "baseline"])
def test_resuming_repeats_the_uninterrupted_run(changes, data, tmp_path, monkeypatch):
    train(config(data, tmp_path / "whole", **changes), progress=False)
    with monkeypatch.context() as patch:
        stop_at(6, patch)  # the last whole checkpoint is of step 4
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "cut", **changes), progress=False)
    assert checkpoints.newest(tmp_path / "cut/checkpoints").name == "step-000004"
    assert not (tmp_path / "cut/model").exists()
    train(config(data, tmp_path / "cut", resume=True, **changes), progress=False)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert json.loads((tmp_path / "cut/result.json").read_text())["resumed_at"] == 4
    weights = [(tmp_path / run / "model/model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_kill_leaves_the_last_checkpoint_whole(data, tmp_path):
    """SIGKILL in the middle of a run that saves at every step; then it finishes with the right losses. Ten such runs:
    tests/test_train_failures.py."""
    train(config(data, tmp_path / "whole", steps=30, save_every=1), progress=False)
    settings = config(data, tmp_path / "killed", steps=30, save_every=1, resume=True)
    module = "mvam_fast.retrieval.training.train"
    source = f"from {module} import *; train(TrainConfig(**{vars(settings)!r}), progress=False)"
    kills = 0
    while not (tmp_path / "killed/result.json").exists():
        process = subprocess.Popen([sys.executable, "-c", source])
        folder = tmp_path / "killed/checkpoints"
        before = checkpoints.newest(folder)
        while process.poll() is None and (kills == 1 or checkpoints.newest(folder) in (None, before)):
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert kills < 2
    assert kills == 1
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_resume_refuses_another_run(data, tmp_path):
    train(config(data, tmp_path / "run", steps=2), progress=False)
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        train(config(data, tmp_path / "run", steps=2), progress=False)
    with pytest.raises(ValueError, match="lr is 0.5, but the run in .* was begun with 0.001"):
        train(config(data, tmp_path / "run", steps=2, lr=0.5, resume=True), progress=False)
    before = (tmp_path / "run/result.json").stat().st_mtime_ns
    train(config(data, tmp_path / "run", steps=2, resume=True), progress=False)  # finished: nothing to do
    assert (tmp_path / "run/result.json").stat().st_mtime_ns == before


def test_a_run_that_could_not_begin_leaves_the_folder_free(data, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 1000"):
        train(config(data, tmp_path / "run", steps=2, batch_size=1000), progress=False)
    assert train(config(data, tmp_path / "run", steps=2), progress=False) == tmp_path / "run/model"


def test_resume_refuses_a_run_with_other_fields(data, tmp_path):
    """As a config.json of another version has them."""
    train(config(data, tmp_path / "run", steps=2), progress=False)
    saved = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**saved, "momentum": 0.9}))
    with pytest.raises(ValueError, match="momentum is None, but the run in .* was begun with 0.9"):
        train(config(data, tmp_path / "run", steps=2, resume=True), progress=False)


def test_a_half_written_checkpoint_of_the_same_pid_is_replaced(data, tmp_path):
    """In a container a restarted run often has the pid of the one that was killed."""
    left = tmp_path / f"run/checkpoints/.step-000002.{os.getpid()}"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    train(config(data, tmp_path / "run", steps=3), progress=False)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-000002"}


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    for name in ("step-999999", "step-1000000", ".step-2000000.17"):
        (tmp_path / name).mkdir()
    assert checkpoints.newest(tmp_path).name == "step-1000000"


def test_a_resumed_run_tells_what_was_unreadable_before(tmp_path, monkeypatch):
    data = make_scenes(tmp_path / "scenes", train=64, val=8, test=8, progress=False)
    broken = tmp_path / "scenes/images/train/000003.png"
    broken.write_bytes(b"no picture")
    settings = {"batch_size": 32, "steps": 4, "save_every": 3}  # two steps see every image
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "run", **settings), progress=False)
    broken.write_bytes((tmp_path / "scenes/images/train/000002.png").read_bytes())  # repaired meanwhile
    train(config(data, tmp_path / "run", resume=True, **settings), progress=False)
    assert list(json.loads((tmp_path / "run/result.json").read_text())["unreadable"]) == [str(broken)]


def test_unreadable_images_are_counted_or_stop(tmp_path, capsys):
    data = make_scenes(tmp_path / "scenes", train=32, val=8, test=8, progress=False)
    broken = tmp_path / "scenes/images/train/000003.png"
    broken.write_bytes(b"no picture")
    train(config(data, tmp_path / "run", steps=4), progress=False)
    assert list(json.loads((tmp_path / "run/result.json").read_text())["unreadable"]) == [str(broken)]
    assert "1 images could not be read" in capsys.readouterr().err
    with pytest.raises(UnreadableImage, match="000003.png"):
        train(config(data, tmp_path / "strict", steps=4, strict=True), progress=False)


def test_mixed_precision_augmentation_and_clipping(data, tmp_path):
    settings = {"precision": "amp_bf16", "augment": True, "grad_clip": 0.0, "global_view": True, "workers": 2}
    train(config(data, tmp_path / "run", steps=3, **settings), progress=False)
    train(config(data, tmp_path / "fp32", steps=3, **{**settings, "precision": "fp32"}), progress=False)
    for row, exact in zip(rows(tmp_path / "run"), rows(tmp_path / "fp32"), strict=True):
        if "loss" in row:  # 8 bits of mantissa
            assert row["loss"] != exact["loss"] and row["loss"] == pytest.approx(exact["loss"], rel=2e-2)


def test_bad_settings_are_named(data, tmp_path):
    for changes, message in (
        ({"precision": "int8"}, "precision is 'int8'; it must be one of fp32"),
        ({"steps": 0}, "steps is 0"),
        ({"diversity_kind": "l2"}, "kind is 'l2'"),
        ({"batch_size": 1000}, "batch_size is 1000; it must be 1 to 64"),
        ({"model": "ViT-nope"}, "model_name is 'ViT-nope'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(data, tmp_path / message[:9], **changes), progress=False)


def test_learning_rate_warms_up_and_falls_to_zero(data, tmp_path):
    settings = config(data, tmp_path, steps=100, warmup=10)
    rates = [rate_at(settings, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] == pytest.approx(0)


def test_evaluation_tells_its_protocol(data, tmp_path):
    folder = train(config(data, tmp_path / "run", steps=2), progress=False)
    found = evaluate(folder, data, data.parent / "images", out=tmp_path / "result.json", progress=False)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["metrics"]["images"] == 16 and found["metrics"]["captions"] == 80
    assert found["protocol"]["split"] == "test" and found["protocol"]["embedding_width"] == 64
    small = evaluate(folder, data, data.parent / "images", captions_per_image=2, batch_size=5, progress=False)
    assert small["metrics"]["captions"] == 32 and small["protocol"]["captions_per_image"] == 2
    table = recall_table({"a long name": found["metrics"]})
    assert f"{found['metrics']['rsum']:.1f}" in table and "t2i R@10" in table


def test_evaluation_with_a_broken_image(tmp_path):
    data = make_scenes(tmp_path / "scenes", train=32, val=8, test=8, progress=False)
    folder = train(config(data, tmp_path / "run", steps=1), progress=False)
    (tmp_path / "scenes/images/test/000002.png").unlink()
    with pytest.raises(UnreadableImage, match="000002.png"):
        evaluate(folder, data, data.parent / "images", progress=False)
    found = evaluate(folder, data, data.parent / "images", strict=False, progress=False)
    assert found["metrics"]["images"] == 7 and found["protocol"]["unreadable_images"] == 1


def test_command_line(tmp_path, capsys):
    scenes = tmp_path / "scenes"
    assert cli.main(["scenes", str(scenes), "--train", "32", "--val", "8", "--test", "8"]) == 0
    data, images = str(scenes / "dataset_scenes.json"), str(scenes / "images")
    where = ["--data", data, "--images", images]
    common = ["train", *where, "--model", "scenes-ViT-T-16", "--views", "2", "--batch-size", "8", "--steps", "2"]
    assert cli.main([*common, "--embed-dim", "16", "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["evaluate", str(tmp_path / "run/model"), *where]) == 0
    assert "RSUM" in capsys.readouterr().out
    assert cli.main([*common, "--out", str(tmp_path / "run")]) == 2
    assert cli.main(["evaluate", str(tmp_path / "run/model"), *where, "--split", "dev"]) == 2
    errors = capsys.readouterr().err
    assert "mvam-fast: error: out: " in errors and "split is 'dev'" in errors and "Traceback" not in errors
    with pytest.raises(ValueError, match="split is 'dev'"):
        cli.main(["--debug", "evaluate", str(tmp_path / "run/model"), *where, "--split", "dev"])
