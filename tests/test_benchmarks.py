"""The benchmark harness: its bytes, its gate, its rows. What it measures is never asserted."""
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mvam_fast import reference

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
providers = importlib.import_module("providers")
throughput = importlib.import_module("throughput")
timing = importlib.import_module("timing")


@pytest.fixture
def inputs():
    return providers.Inputs.make(2, 5, 64, 3, torch.float32, torch.device("cpu"))


def test_bytes_are_counted_by_hand(inputs):
    tokens, codes, pooled, gram = 2 * 5 * 64 * 4, 3 * 64 * 4, 2 * 3 * 64 * 4, 2 * 3 * 3 * 4
    assert inputs.moved_bytes("forward") == tokens + codes + pooled + gram
    assert inputs.moved_bytes("forward+backward") == 2 * (tokens + codes + pooled + gram) + tokens + codes
    half = providers.Inputs.make(2, 5, 64, 3, torch.bfloat16, torch.device("cpu"))
    assert half.moved_bytes("forward") == (tokens + codes + pooled) // 2 + gram


@pytest.mark.parametrize("name", ["eager", "sdpa", "torch"])
def test_the_gate_lets_right_providers_through(name, inputs):
    assert providers.gate(providers.SAME_WORK[name](inputs.tokens, inputs.codes), inputs) is None


WRONG = {
    "P is off": lambda x, c: (reference.multi_view_pool(x, c)[0] * 1.01, reference.multi_view_pool(x, c)[1]),
    "G is off": lambda x, c: (reference.multi_view_pool(x, c)[0], 1.01 * reference.multi_view_pool(x, c)[1]),
    "dX is off": lambda x, c: reference.multi_view_pool(x.detach() + 0 * x, c),
    "dC is off": lambda x, c: reference.multi_view_pool(x, c.detach() + 0 * c),
}


@pytest.mark.parametrize("message", WRONG)
def test_the_gate_stops_wrong_outputs_and_wrong_gradients(message, inputs):
    with pytest.raises(providers.Unavailable, match=f"wrong: {message}"):
        providers.gate(WRONG[message], inputs)


def test_a_run_writes_rows_reasons_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(throughput.SHAPES, "vit-b-32", (5, 64))
    monkeypatch.setattr(timing, "copy_gb_s", lambda device: 10.0)

    def broken(width, views):
        raise RuntimeError("it does not build\nsecond line")

    monkeypatch.setitem(providers.OTHER_WORK, "timm AttentionPoolLatent", broken)
    monkeypatch.setitem(providers.SAME_WORK, "sdpa", lambda tokens, codes: WRONG["G is off"])
    chosen = ["torch", "sdpa", "triton", "open_clip AttentionalPooler", "timm AttentionPoolLatent"]
    throughput.main([
        "--quick", "--device", "cpu", "--shapes", "vit-b-32", "--batch", "2", "--views", "3", "--providers", *chosen,
        "--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png"),
    ])  # fmt: skip
    result = json.loads((tmp_path / "t.json").read_text())
    rows = {(row["provider"], row["mode"]): row for row in result["rows"]}
    assert len(rows) == 12  # eager is added: the ratios are to it
    for provider in ("eager", "torch", "open_clip AttentionalPooler"):
        row = rows[provider, "forward"]
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and len(row["repetitions_ms"]) >= 5
        assert row["gb_s"] == pytest.approx(row["percent_of_copy"] * result["copy_gb_s"] / 100)
    assert rows["eager", "forward"]["ratio"] == 1
    assert rows["sdpa", "forward"]["reason"].startswith("wrong: G is off")
    assert "median_ms" not in rows["sdpa", "forward"]
    assert "needs a CUDA GPU" in rows["triton", "forward"]["reason"]
    assert rows["timm AttentionPoolLatent", "forward"]["reason"] == "RuntimeError: it does not build"
    assert {"device", "threads", "torch", "commit", "date"} <= set(result["machine"])
    assert Image.open(tmp_path / "t.png").width > 800 and result["plot"] == "t.png"
    assert "On a CPU" in capsys.readouterr().out


def test_summary_of_repetitions():
    expected = {"median_ms": 3, "p20_ms": 1.8, "p80_ms": 4.2, "min_ms": 1}
    assert timing.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx(expected)
    assert timing.summary([2.0])["p80_ms"] == 2.0


def test_saved_bytes_count_what_autograd_keeps_once_and_not_the_inputs():
    x = torch.randn(10, 5, requires_grad=True)
    assert timing.saved_mb(lambda: x.square(), (x,)) == 0  # its own input
    assert timing.saved_mb(lambda: x.exp(), (x,)) == pytest.approx(200e-6)  # its result
    assert timing.saved_mb(lambda: (y := x.exp()) * y, (x,)) == pytest.approx(200e-6)


def test_interleaved_steps_are_all_repeated():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.interleaved_ms(steps, torch.device("cpu"), seconds=0, rounds=2)
    assert {name: len(times) for name, times in found.items()} == {"a": 6, "b": 6}
    assert "".join(calls) == 2 * (5 * "a" + 5 * "b")  # two of five are warm-up
