"""The command line: flags reach the functions, errors are one line, and the demo's verdict follows its numbers."""
import dataclasses
import json
import logging
import subprocess
import sys

import pytest

from mvam_fast import cli
from mvam_fast.retrieval import demo as demo_module
from mvam_fast.retrieval.demo import THRESHOLD, config_of, demo, verdict
from mvam_fast.retrieval.scenes import make_scenes
from mvam_fast.retrieval.training import train as train_module
from mvam_fast.retrieval.training.config import TrainConfig, flags_of


@pytest.fixture
def parsed(monkeypatch):
    """What `mvam-fast train` hands to `train`, without training."""
    configs = []
    monkeypatch.setattr(train_module, "train", configs.append)
    return configs


def test_every_field_has_a_flag_and_its_default(parsed):
    assert cli.main(["train", "--data", "d.json", "--images", "i", "--out", "o"]) == 0
    assert parsed == [TrainConfig(data="d.json", images="i", out="o")]


@pytest.mark.parametrize("run", list(demo_module.RUNS))
def test_the_demos_flags_give_back_its_config(run, parsed, tmp_path):
    config = config_of(run, tmp_path / "d.json", tmp_path / "o", steps=7, seed=3)
    assert cli.main(["train", *flags_of(config)]) == 0
    assert parsed == [config]


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "peak learning rate (default: 1e-05)" in shown


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FileExistsError, PermissionError, ImportError])
def test_an_error_is_one_line_and_exit_code_2(error, monkeypatch, capsys):
    def fail(config):
        raise error("what went wrong")

    monkeypatch.setattr(train_module, "train", fail)
    arguments = ["train", "--data", "d.json", "--images", "i", "--out", "o"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "mvam-fast: error: what went wrong\n"
    with pytest.raises(error):
        cli.main(["--debug", *arguments])


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(config):
        raise KeyError("a bug of ours")

    monkeypatch.setattr(train_module, "train", fail)
    with pytest.raises(KeyError):
        cli.main(["train", "--data", "d.json", "--images", "i", "--out", "o"])


def test_a_flag_takes_back_what_the_file_says(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("max_width: 2000\nhead_lr: 1e-3\nval_images: v\n")
    found = []
    monkeypatch.setattr(train_module, "train", found.append)
    command = ["train", "--config", str(tmp_path / "config.yaml")]
    cli.main([*command, "--max-width", "none", "--head-lr", "none", "--val-images", "none"])
    cli.main(command)
    assert [(c.max_width, c.head_lr, c.val_images) for c in found] == [(None, None, None), (2000, 1e-3, "v")]
    for wrong in (["--max-width", "wide"], ["--steps", "none"]):
        with pytest.raises(SystemExit):
            cli.main([*command, *wrong])
    refused = capsys.readouterr().err
    assert "invalid int (or none) value: 'wide'" in refused and "invalid int value: 'none'" in refused


def test_only_the_warning_of_random_weights_is_silent(monkeypatch, caplog):
    def warn(config):
        logging.warning("No pretrained weights loaded for model 'x'. Model initialized randomly.")
        logging.warning("something else")

    monkeypatch.setattr(train_module, "train", warn)
    before = list(logging.getLogger().filters)
    cli.main(["train", "--data", "d.json", "--images", "i", "--out", "o"])
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert logging.getLogger().filters == before


def test_training_as_a_process_of_its_own(tmp_path):
    data = make_scenes(tmp_path / "scenes", train=32, val=8, test=8, progress=False)
    command = [sys.executable, "-m", "mvam_fast.cli", "train", "--data", str(data), "--images"]
    command += [str(data.parent / "images"), "--out", str(tmp_path / "run"), "--model", "scenes-ViT-T-16"]
    command += ["--views", "2", "--batch-size", "8", "--steps", "2", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run/model")
    assert "2/2" in done.stderr and "loss=" in done.stderr  # the progress bar
    assert "No pretrained weights" not in done.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("mvam-fast: error: out: ")


def test_the_verdict_follows_the_numbers():
    assert "gains 50 RSUM points" in verdict(THRESHOLD)
    assert "does not show the claim" in verdict(THRESHOLD - 0.1)
    assert "-7 points" in verdict(-7.0)


@pytest.mark.parametrize(
    "content, message",
    [(None, "throughput: no such file"), ("{", "is not valid JSON"), ("{}", "is no throughput.json with plots")],
)
def test_the_demo_reads_the_throughput_before_it_works(content, message, tmp_path):
    path = tmp_path / "throughput.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        demo(tmp_path / "out", throughput=path)
    assert not (tmp_path / "out").exists()


def test_a_failed_training_stops_the_demo(tmp_path, capfd):
    """16 images are too few for a batch of 128."""
    data = make_scenes(tmp_path / "scenes", train=16, val=8, test=8, progress=False)
    with pytest.raises(RuntimeError, match="the training of baseline, mvam failed"):
        demo_module.train_pair(data, tmp_path, steps=1, seed=0)
    assert "mvam-fast: error: batch_size is 128; it must be 1 to 16" in capfd.readouterr().err


def test_finished_trainings_are_not_repeated(tmp_path):
    data = make_scenes(tmp_path / "scenes", train=128, val=8, test=8, progress=False)
    results = [tmp_path / run / "result.json" for run in demo_module.RUNS]
    demo_module.train_pair(data, tmp_path, steps=2, seed=0)
    before = [path.stat().st_mtime_ns for path in results]
    assert all(json.loads(path.read_text())["steps"] == 2 for path in results)
    demo_module.train_pair(data, tmp_path, steps=2, seed=0)
    assert [path.stat().st_mtime_ns for path in results] == before
