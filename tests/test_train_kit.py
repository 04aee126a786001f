"""Training beyond the plain loop: averages, early stopping, groups of parameters, schedules, logs."""
import json

import pytest
import torch
from train_cases import dying_at, falling_recall, rows, weights
from train_cases import kit_config as config

from mvam_fast import MVAM
from mvam_fast.retrieval.scenes import make_scenes
from mvam_fast.retrieval.training import train as train_module
from mvam_fast.retrieval.training.config import TrainConfig
from mvam_fast.retrieval.training.optimization import diversity_weight, make_optimizer
from mvam_fast.retrieval.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=64, val=16, test=16, progress=False)


def test_the_average_is_what_is_kept(data, tmp_path):
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
