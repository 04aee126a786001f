"""The benchmark of whole encoders: what is compared, its gates, its rows, its file. No time is asserted."""
import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

from mvam_fast import last_backend

pytest.importorskip("open_clip")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
cases, models, training, encoders, gate, results, schema, timing = (
    importlib.import_module(name)
    for name in (
        "encoder_cases", "encoder_models", "encoder_training", "encoders", "gate", "results", "schema", "timing",
    )
)  # fmt: skip
MODEL, CPU = "scenes-ViT-T-16", torch.device("cpu")


@pytest.fixture(scope="module")
def compared():
    return models.Compared(MODEL, 4, CPU, torch.float32)


@pytest.fixture
def bundles(compared, tmp_path):
    return models.Bundles(tmp_path, compared, resume=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As few repetitions as there can be, a small cache to flush, and no other code if a file is edited meanwhile."""
    parse = encoders.parse
    monkeypatch.setattr(encoders, "parse", lambda given: argparse.Namespace(**{**vars(parse(given)), "seconds": 0.0}))
    found = {**encoders.machine(CPU), "source_sha256": "0" * 64}
    monkeypatch.setattr(encoders, "machine", lambda device: found)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1024)


def plant(monkeypatch, name, make, only=models.MODELS):
    monkeypatch.setitem(cases.BACKENDS, name, cases.Backend(make, only))


def shifted(by):
    def make(compared, bundles, model, tower, inputs):
        right = cases.eager(compared, bundles, model, tower, inputs)
        return cases.Made(lambda: right.step() + by, "float32")

    return make


def broken(*given):
    raise RuntimeError("it does not build\nsecond line")


def run(out, *more):
    encoders.main([
        "--quick", "--device", "cpu", "--views", "4", "--batch", "1", "2", "--towers", "image", "--train-batch", "0",
        "--backends", "eager", "--out", str(out), *more,
    ])  # fmt: skip
    return results.read(out / "encoders.json", "encoders")


def measured(compared, bundles, backend, tower="image", batch=2, seconds=0.0):
    return {row["model"]: row for row in cases.measure(compared, bundles, backend, tower, batch, seconds, lambda _: 0)}


@pytest.mark.parametrize("tower", models.TOWERS)
def test_the_three_models_share_their_weights_and_differ_in_pooling_alone(tower, compared):
    clip, naive, fused = (compared.trained[name] for name in models.MODELS)
    ours, others, plain = ({id(p) for p in model.parameters()} for model in (fused, naive, clip))
    assert ours == others > plain
    inputs = compared.inputs(tower, 3)
    with torch.no_grad():
        before = models.encode(fused, tower)(inputs)
        path = last_backend()
        torch.testing.assert_close(models.encode(naive, tower)(inputs), before, rtol=0, atol=1e-6)
    assert last_backend() is path  # the naive one does not go through the library's choice of path
    assert before.shape == (3, 4 * 32) and models.encode(clip, tower)(inputs).shape == (3, 32)


@pytest.mark.parametrize("tower", models.TOWERS)
def test_a_row_has_its_times_errors_and_ratios(tower, compared, bundles):
    rows = measured(compared, bundles, "eager", tower, seconds=0.0)
    assert set(rows) == set(models.MODELS)
    for row in rows.values():
        times = [time for block in row["blocks_ms"] for time in block]
        assert len(row["blocks_ms"]) == cases.ROUNDS and row["repetitions"] == len(times) == 25
        assert row["max_ms"] == max(times) and "p99_ms" not in row
        assert row["per_s"] == pytest.approx(2000 / row["median_ms"]) and row["first_result_s"] > 0
        assert row["times_clip"] == pytest.approx(row["median_ms"] / rows["clip"]["median_ms"])
        assert 0 < row["errors"]["distance"] < 1e-5 and row["errors"]["cosine"] > 0.999999
    assert rows["mvam"]["details"].startswith("torch: ") and rows["mvam naive"]["details"] == ""


def test_half_precision_is_judged_by_float64(bundles):
    rows = measured(models.Compared(MODEL, 4, CPU, torch.bfloat16), bundles, "eager", "text")
    for row in rows.values():
        assert row["precision"] == "bfloat16" and 1e-4 < row["errors"]["distance"] < cases.LIMITS["bfloat16"]


@pytest.mark.parametrize("by", [1e-3, float("nan")])
def test_a_wrong_backend_gets_a_reason_and_no_time(by, compared, bundles, monkeypatch):
    plant(monkeypatch, "planted", shifted(by))
    for row in measured(compared, bundles, "planted").values():
        assert row["reason"].startswith("wrong: an embedding is off by") and "in float32" in row["reason"]
        assert not {"median_ms", "blocks_ms", "per_s", "first_result_s"} & row.keys()


def test_embeddings_of_another_shape_are_wrong():
    with pytest.raises(gate.Wrong, match=r"embeddings are \[2, 3\], must be \[2, 4\]"):
        cases.check(torch.ones(2, 3), torch.ones(2, 4).double(), "float32")


def test_what_does_not_build_or_fails_later_says_why_and_the_others_are_timed(compared, bundles, monkeypatch):
    calls = []

    def make(compared, bundles, model, tower, inputs):
        if model == models.CLIP:
            broken()
        right = cases.eager(compared, bundles, model, tower, inputs)

        def step():
            calls.append(model)
            if model == models.NAIVE and calls.count(model) > 9:
                raise MemoryError("no more")
            return right.step()

        return cases.Made(step, "float32")

    plant(monkeypatch, "planted", make)
    rows = measured(compared, bundles, "planted")
    assert rows["clip"]["reason"] == "RuntimeError: it does not build"
    assert rows["mvam naive"]["reason"] == "MemoryError: no more" and "blocks_ms" not in rows["mvam naive"]
    assert rows["mvam"]["repetitions"] == 25 and "times_clip" not in rows["mvam"]


def test_a_99th_percentile_needs_a_hundred_repetitions():
    times = [float(time) for time in range(1, 101)]
    assert cases.tail(times[:99]) == {"max_ms": 99.0}
    assert cases.tail(times) == {"p99_ms": pytest.approx(99.01)}


def test_an_exported_model_is_timed_and_its_export_counted_once(compared, bundles, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plant(monkeypatch, "planted", cases.onnx, (models.CLIP,))  # MVAM's export has its own tests
    image = measured(compared, bundles, "planted")["clip"]
    again = models.Bundles(bundles.folder, compared, resume=True)
    assert again.seconds == bundles.seconds
    text = measured(compared, again, "planted", "text", batch=3)["clip"]
    for row in (image, text):
        assert row["details"] == "onnxruntime-cpu" and row["errors"]["distance"] < 1e-5
        assert row["first_result_s"] > bundles.seconds["clip"]
    assert not models.Bundles(bundles.folder, compared, resume=False).seconds


def test_an_export_that_fails_is_tried_once(compared, bundles, monkeypatch):
    tried = []
    monkeypatch.setattr(bundles, "_export", lambda model: (tried.append(model), broken()))
    for _ in range(2):
        assert measured(compared, bundles, "onnx")["mvam"]["reason"] == "RuntimeError: it does not build"
    assert tried == ["clip", "mvam"]


@pytest.fixture(scope="module")
def trained(compared):
    before = {name: value.clone() for name, value in compared.trained["mvam"].state_dict().items()}
    rows = {row["model"]: row for row in training.measure(compared, 4, "float32", 0.0, lambda _: 0)}
    return rows, before


@pytest.mark.slow
def test_training_rows_agree_on_the_loss_and_say_what_they_cost(trained, compared):
    rows, before = trained
    assert rows["mvam"]["loss"] == pytest.approx(rows["mvam naive"]["loss"], rel=1e-5)
    assert rows["clip"]["loss"] != pytest.approx(rows["mvam"]["loss"], rel=1e-3)
    for row in rows.values():
        assert row["peak_extra_mb"] > row["saved_mb"] > 0 and row["first_step_s"] > 0
        assert row["repetitions"] == 9 and row["per_s"] == pytest.approx(4000 / row["median_ms"])
        assert row["errors"].keys() == {"loss", "gradients"}
    assert 0 < rows["mvam"]["errors"]["gradients"] < 1e-4 and "backward torch" in rows["mvam"]["details"]
    after = compared.trained["mvam"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # each step starts from the same
    assert not compared.trained["mvam"].training


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_wrong_training_step_gets_a_reason_and_no_time(what, compared, monkeypatch):
    right = training.Training.loss

    def wrong(self, name, precision):
        loss = right(self, name, precision)
        if name != models.FUSED:
            return loss
        return 1.01 * loss if what == "loss" else loss + 0.01 * (loss - loss.detach())

    monkeypatch.setattr(training.Training, "loss", wrong)
    rows = {row["model"]: row for row in training.measure(compared, 4, "float32", 0.0, lambda _: 0)}
    assert rows["mvam"]["reason"].startswith(f"wrong: {what} off by 1.0e-02") and "median_ms" not in rows["mvam"]
    assert "median_ms" in rows["mvam naive"]


def test_without_its_measure_a_training_step_is_not_timed(compared, monkeypatch):
    right = training.Training.loss
    monkeypatch.setattr(
        training.Training, "loss", lambda self, name, precision: (
            broken() if name == models.NAIVE else right(self, name, precision)
        ),
    )  # fmt: skip
    rows = {row["model"]: row for row in training.measure(compared, 4, "float32", 0.0, lambda _: 0)}
    assert all("it does not build" in rows[name]["reason"] for name in ("mvam naive", "mvam"))
    assert "median_ms" in rows["clip"] and "times_clip" in rows["clip"]


def test_a_run_writes_a_file_and_a_table(tmp_path, monkeypatch, capsys):
    plant(monkeypatch, "broken", broken)
    plant(monkeypatch, "wrong", shifted(1.0))
    result = run(tmp_path, "--backends", "eager", "broken", "wrong", "--train-batch", "2")
    schema.validate(result)
    assert result["complete"] and result["settings"]["batch"] == [1, 2] and "Random weights" in result["note"]
    assert result["machine"]["kind"] == "cpu" and result["settings"]["train_dtype"] == "float32"
    assert len(result["rows"]) == 3 + 3 * 2 * 3  # training, and three backends at two batches
    assert all(("reason" in row) != ("median_ms" in row) for row in result["rows"])
    printed = capsys.readouterr().out
    for text in (
        "On a CPU: small batches", "image, batch 2", "training, batch 2", "mvam naive, eager", "* the largest",
        "RuntimeError: it does not build", "wrong: an embedding is off by", "encoders.json", "encoders-latency.png",
    ):  # fmt: skip
        assert text in printed


def test_an_interrupted_run_goes_on_and_refuses_another_code_or_setting(tmp_path, monkeypatch):
    whole = cases.measure

    def stopped(*given):
        if given[4] == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(cases, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    first = results.read(tmp_path / "encoders.json", "encoders")
    assert not first["complete"] and [row["batch"] for row in first["rows"]] == [1, 1, 1]
    monkeypatch.setattr(cases, "measure", whole)
    again = run(tmp_path, "--resume")
    assert again["complete"] and again["rows"][:3] == first["rows"] and len(again["rows"]) == 6
    assert run(tmp_path, "--resume")["rows"] == again["rows"]
    with pytest.raises(SystemExit, match="--resume: views was 4, now it is 3"):
        run(tmp_path, "--resume", "--views", "3")
    other = {**first["machine"], "source_sha256": "1" * 64}
    monkeypatch.setattr(encoders, "machine", lambda device: other)
    with pytest.raises(SystemExit, match="--resume: source_sha256 was"):
        run(tmp_path, "--resume")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--train-batch", "-1"], "--train-batch -1: it must be at least 0"), (["--batch", "0"], "0 is not at least 1")],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        encoders.parse(arguments)
    assert message in capsys.readouterr().err
