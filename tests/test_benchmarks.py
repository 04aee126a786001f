"""The benchmark harness: its bytes, its gate, its rows, its files. What it measures is never asserted."""
import importlib
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mvam_fast import reference
from mvam_fast.converters import folding

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
cases, compare, gate, inserts, plots, providers, report, results, schema, sections, shapes, throughput, timing, work = (
    importlib.import_module(name)
    for name in (
        "cases", "compare", "gate", "inserts", "plots", "providers", "report", "results", "schema", "sections",
        "shapes", "throughput", "timing", "work",
    )
)  # fmt: skip
CPU = torch.device("cpu")
FUSED = [name for name, provider in providers.PROVIDERS.items() if provider.original]


@pytest.fixture
def pool():
    return work.works(2, 5, 64, 3, torch.float32, CPU)["pool"]


def test_bytes_and_arithmetic_are_counted_by_hand(pool):
    tokens, codes, pooled, gram = 2 * 5 * 64 * 4, 3 * 64 * 4, 2 * 3 * 64 * 4, 2 * 3 * 3 * 4
    assert pool.moved_bytes("forward") == tokens + codes + pooled + gram
    assert pool.moved_bytes("backward") == 2 * (tokens + codes) + pooled + gram
    assert pool.moved_bytes("forward+backward") == pool.moved_bytes("forward") + pool.moved_bytes("backward")
    half = work.works(2, 5, 64, 3, torch.bfloat16, CPU)["pool"]
    assert half.moved_bytes("forward") == (tokens + codes + pooled) // 2 + gram
    product = 2 * 2 * 5 * 3 * 64  # S; as many for P, dA, two for dX, dC
    assert pool.flops("forward") == 2 * product + 2 * 2 * 5 * 3 * 3
    assert pool.flops("forward+backward") == 6 * product + 2 * (2 * 2 * 5 * 3 * 3)


def wrong_ops(op):
    return {
        "P": lambda x, c, *rest: (op(x, c, *rest)[0] * 1.0001, op(x, c, *rest)[1]),
        "G": lambda x, c, *rest: (op(x, c, *rest)[0], 1.0001 * op(x, c, *rest)[1]),
        "dX": lambda x, c, *rest: op(x.detach() + 0 * x, c, *rest),
        "dC": lambda x, c, *rest: op(x, c.detach() + 0 * c, *rest),
        "no dC": lambda x, c, *rest: op(x, c.detach(), *rest),
        "P's shape": lambda x, c, *rest: (op(x, c, *rest)[0][:, :1], op(x, c, *rest)[1]),
    }


MESSAGES = {"no dC": "wrong: there is no dC", "P's shape": r"wrong: P is \[2, 1, 64\], must be \[2, 3, 64\]"}


@pytest.mark.parametrize("name", ["pool", "norm+pool"])
@pytest.mark.parametrize("wrong", ["P", "G", "dX", "dC", "no dC", "P's shape"])
def test_the_gate_stops_wrong_outputs_and_wrong_gradients(name, wrong):
    chosen = work.works(2, 5, 64, 3, torch.float32, CPU)[name]
    op = wrong_ops(chosen.specification)[wrong]
    with pytest.raises(gate.Wrong, match=MESSAGES.get(wrong, f"wrong: {wrong} is off by")):
        found = gate.outputs_of(op, chosen) if "shape" in wrong else gate.results_of(op, chosen)
        gate.check(found, chosen)


def test_the_gate_stops_what_is_no_number(pool):
    found = gate.results_of(pool.specification, pool)
    found["P"] = torch.full_like(found["P"], float("nan"))
    with pytest.raises(gate.Wrong, match="wrong: P is off by nan"):
        gate.check(found, pool)


def test_the_gate_stops_a_percent_in_bfloat16():
    chosen = work.works(4, 40, 128, 4, torch.bfloat16, CPU)["pool"]
    off = lambda x, c: (1.03 * reference.multi_view_pool(x, c)[0], reference.multi_view_pool(x, c)[1])  # noqa: E731
    with pytest.raises(gate.Wrong, match="wrong: P"):
        gate.check(gate.outputs_of(off, chosen), chosen)
    gate.check(gate.results_of(chosen.specification, chosen), chosen)


@pytest.mark.parametrize("name", ["pool", "norm+pool", "model"])
def test_judging_in_chunks_changes_nothing(name, monkeypatch):
    chosen = work.works(5, 7, 64, 3, torch.float32, CPU)[name]
    found = gate.results_of(chosen.specification, chosen)
    whole = gate.errors_of(found, chosen)
    assert whole.keys() == {*chosen.d_outputs, *(f"d{leaf}" for leaf in chosen.leaves)}
    monkeypatch.setattr(gate, "CHUNK", 2 * 7 * 64)  # two samples at a time, and one left over
    assert gate.errors_of(found, chosen) == pytest.approx(whole, rel=1e-6)


def test_a_pooler_is_judged_by_itself_in_float64():
    tokens = torch.randn(3, 5, 64, requires_grad=True)
    module = providers.attentional_pooler(5, 64, 2)
    own = work.own_work(module, tokens)
    errors = gate.check(gate.results_of(work.own_op(module), own), own)
    assert {"Y", "dX", "dquery", "dattn.in_proj_weight"} <= errors.keys() and 0 < max(errors.values()) < 1e-5
    with pytest.raises(gate.Wrong, match="wrong: Y"):
        gate.check({"Y": module(tokens).detach() * 1.001}, own)


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_pooler_is_judged_by_its_original(name, monkeypatch):
    provider, given = providers.PROVIDERS[name], work.works(3, 10, 64, 2, torch.float32, CPU)
    original, fused = (providers.PROVIDERS[n].make(given, 2) for n in (provider.original, name))
    assert fused.work.leaves.keys() == original.work.leaves.keys() and "fused" in provider.label and provider.ours
    for leaf, value in original.work.leaves.items():  # they are built apart, and are the same
        assert torch.equal(value, fused.work.leaves[leaf])
    assert fused.details == "forward torch, backward torch"
    errors = gate.check(gate.results_of(fused.op, fused.work), fused.work)
    assert errors.keys() == {"Y", *(f"d{leaf}" for leaf in original.work.leaves)} and max(errors.values()) < 1e-5
    pool = folding.pool
    monkeypatch.setattr(folding, "pool", lambda tokens, codes, **options: pool(tokens, 1.01 * codes, **options))
    found = gate.results_of(fused.op, fused.work)
    with pytest.raises(gate.Wrong, match="wrong: Y is off by"):
        gate.check(found, fused.work)


def test_pools_of_grids_take_the_patches_of_square_grids_only():
    tokens = torch.randn(2, 10, 3)
    assert torch.equal(providers.PatchGrid(10)(tokens)[1, :, 1, 2], tokens[1, 1 + 3 + 2])  # after the class token
    assert torch.equal(providers.PatchGrid(9)(tokens[:, :9])[1, :, 1, 2], tokens[1, 3 + 2])
    given = work.works(2, 77, 64, 3, torch.float32, CPU)
    for name in ("attention-pool2d", "fused-attention-pool2d-timm"):
        with pytest.raises(gate.Unavailable, match="77 tokens are no square grid"):
            providers.PROVIDERS[name].make(given, 3)


def test_a_pooler_that_is_left_alone_has_no_fused_time():
    given = work.works(2, 5, 64, 16, torch.float32, CPU)
    with pytest.raises(gate.Unavailable, match="folded into 128 views it would take"):
        providers.PROVIDERS["fused-attentional-pooler"].make(given, 16)


def shrink(monkeypatch):
    """Shapes that take no time, and ceilings that are not measured."""
    monkeypatch.setattr(throughput, "ceilings", lambda device: {
        "copy_gb_s": 10.0, "read_gb_s": 20.0, "float32_gflop_s": 100.0,
    })  # fmt: skip
    for name in ("vit-b-32", "vit-b-16", "text-512"):
        monkeypatch.setitem(shapes.SHAPES, name, (5, 64))
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1024)


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)


def asked(out, *more):
    return [
        "--quick", "--device", "cpu", "--shapes", "vit-b-32", "--batch", "2", "--views", "3", "--out", str(out), *more,
    ]  # fmt: skip


def run(out, *more):
    throughput.main(asked(out, *more))
    return results.read(out / "throughput.json", "throughput")


def broken(given, views):
    raise RuntimeError("it does not build\nsecond line")


def without_backward(given, views):
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tokens, codes):
            return reference.multi_view_pool(tokens, codes)

        @staticmethod
        def backward(ctx, *gradients):
            raise NotImplementedError("forward only")

    return providers.Made(ForwardOnly.apply, given["pool"])


def replaced(monkeypatch, name, make):
    old = providers.PROVIDERS[name]
    monkeypatch.setitem(providers.PROVIDERS, name, providers.Provider(old.label, old.work, make, ours=old.ours))


def test_a_run_writes_rows_reasons_and_plots(tmp_path, monkeypatch, capsys, tiny):
    replaced(monkeypatch, "attention-pool-latent", broken)
    replaced(monkeypatch, "flex", without_backward)
    off = wrong_ops(reference.multi_view_pool)["G"]
    replaced(monkeypatch, "sdpa", lambda given, views: providers.Made(off, given["pool"]))
    chosen = ["sdpa", "flex", "torch", "triton", "norm-torch", "attentional-pooler", "attention-pool-latent"]
    monkeypatch.setattr(cases, "SETTINGS", {"eager": cases.MODES})
    monkeypatch.setattr(throughput, "SETTINGS", {"eager": cases.MODES})
    result = run(tmp_path, "--providers", *chosen)
    schema.validate(result)
    rows = {(row["provider"], row["mode"]): row for row in result["rows"]}
    assert len(rows) == 9 * 3  # both naive versions are added: the ratios are to them
    for provider in ("naive", "norm-naive", "torch", "norm-torch", "attentional-pooler"):
        row = rows[provider, "forward+backward"]
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and len(row["blocks_ms"]) == 5
        assert row["gb_s"] == pytest.approx(row["percent_of_copy"] * 10 / 100)
        assert row["gb_s"] == pytest.approx(row["percent_of_read"] * 20 / 100)
        assert row["peak_extra_mb"] > 0 and row["first_call_s"] > 0 and max(row["errors"].values()) < 1e-5
    row, ours, naive = (rows[p, "forward"] for p in ("attentional-pooler", "torch", "naive"))
    assert row["ours_ratio"] == pytest.approx(row["median_ms"] / ours["median_ms"])
    assert row["ratio"] == pytest.approx(naive["median_ms"] / row["median_ms"]) and naive["ratio"] == 1
    assert rows["torch", "forward"]["details"] == "forward torch, backward torch"
    for mode in cases.MODES:
        assert rows["sdpa", mode]["reason"].startswith("wrong: G is off") and "median_ms" not in rows["sdpa", mode]
        assert "needs a CUDA GPU" in rows["triton", mode]["reason"]
        assert rows["attention-pool-latent", mode]["reason"] == "RuntimeError: it does not build"
    assert "median_ms" in rows["flex", "forward"] and "saved_mb" not in rows["flex", "forward"]
    assert rows["flex", "backward"]["reason"] == "NotImplementedError: forward only"
    for name in ("times", "roofline", "memory"):
        with Image.open(tmp_path / f"throughput-{name}.png") as image:
            assert image.width > 800 and image.text["Source"] == result["seal"]
    printed = capsys.readouterr().out
    assert "On a CPU" in printed and "open_clip AttentionalPooler *" in printed and "wrong: G is off" in printed


def test_a_quick_run_compiles_in_its_first_case_only(tmp_path, monkeypatch, tiny):
    given = []
    monkeypatch.setattr(throughput, "measure", lambda case, *rest: given.append(rest[:2]) or [])
    run(tmp_path, "--batch", "2", "4", "--providers", "naive", "compile", "flex", "torch")
    assert given[0] == (["naive", "compile", "flex", "torch"], ["eager", "compiled model"])
    assert given[1] == (["naive", "torch"], ["eager"])


@pytest.mark.slow
def test_the_op_is_timed_inside_a_compiled_model(tiny):
    case = cases.Case("vit-b-32", 2, 3, "float32")
    rows = cases.measure(case, ["naive", "torch", "norm-naive"], ["compiled model"], CPU, 0.0, lambda text: None)
    assert [(row["provider"], row["mode"]) for row in rows] == [
        ("naive", "forward"), ("torch", "forward"), ("naive", "forward+backward"), ("torch", "forward+backward"),
    ]  # fmt: skip
    assert all({"f", "G", "dX", "dC", "dγ", "dβ", "dW"} == row["errors"].keys() for row in rows)
    assert rows[2]["errors"] != rows[3]["errors"]  # ours is another graph than the naive one


def test_an_interrupted_run_goes_on_and_refuses_another_code_or_setting(tmp_path, monkeypatch, tiny):
    only = ["--providers", "naive", "torch"]
    monkeypatch.setattr(throughput, "SETTINGS", {"eager": cases.MODES})
    measure, calls = throughput.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(throughput, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *only, "--batch", "2", "4")
    first = results.read(tmp_path / "throughput.json")
    assert not first["complete"] and {row["batch"] for row in first["rows"]} == {2}
    part = run(tmp_path, *only, "--resume", "--batch", "2")
    assert part["rows"] == first["rows"] and not part["complete"]  # a part of what was asked for is not all of it
    again = run(tmp_path, *only, "--resume", "--batch", "2", "4")
    assert again["rows"][: len(first["rows"])] == first["rows"] and len(again["rows"]) == 2 * len(first["rows"])
    assert again["complete"]
    with pytest.raises(SystemExit, match="--resume: providers was"):
        run(tmp_path, "--providers", "naive", "--resume")
    monkeypatch.setattr(throughput, "machine", lambda device: {**first["machine"], "source_sha256": "0" * 64})
    with pytest.raises(SystemExit, match="--resume: source_sha256 was"):
        run(tmp_path, *only, "--resume")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        monkeypatch.setattr(throughput, "SETTINGS", {"eager": cases.MODES})
        run(folder := tmp_path_factory.mktemp("measured"), "--providers", "naive", "torch")
    return folder / "throughput.json"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Results of three poolers and the same fused, one of which could not be built."""
    chosen = ("fused-attentional-pooler", "fused-siglip-head", "fused-attention-pool2d")
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        monkeypatch.setattr(throughput, "SETTINGS", {"eager": cases.MODES})
        replaced(monkeypatch, "attention-pool2d", broken)
        folder = tmp_path_factory.mktemp("pairs")
        throughput.run(throughput.parse(asked(folder, "--providers", *chosen)))  # without its plots, which take longer
    return folder / "throughput.json"


def test_fused_poolers_stand_beside_their_originals(pairs):
    result = results.read(pairs)
    schema.validate(result)
    rows = {(row["provider"], row["mode"]): row for row in result["rows"]}
    assert len(rows) == 7 * 3  # the originals were added, and the naive version
    one, other, naive = (rows[name, "forward"] for name in ("siglip-head", "fused-siglip-head", "naive"))
    assert other["ratio"] == naive["median_ms"] / other["median_ms"] and "ours_ratio" not in other
    ratio = one["median_ms"] / other["median_ms"]
    printed = throughput.throughput_table(result)
    line = next(line for line in printed.splitlines() if "SigLIP head, 1 probe, fused" in line)
    assert line.split("*")[1].split()[5] == f"{ratio:.2f}"
    page = sections.throughput(result)
    assert page.count("| original ÷ it |") == 3 and f" | {ratio:.2f}× |\n" in page
    section = sections.poolers(result)
    blocks = zip(one["blocks_ms"], other["blocks_ms"], strict=True)
    by_block = [statistics.median(a) / statistics.median(b) for a, b in blocks]
    written = f"**{ratio:.2f}×** | {min(by_block):.2f}–{max(by_block):.2f}× |"
    assert f"| {sections.number(one['median_ms'])} | {sections.number(other['median_ms'])} | {written}" in section
    assert section.count("\n| ") == 2 + 2 * 3  # heads, rule, and the two pairs that were timed
    assert "- No time for open_clip AttentionPool2d (forward, eager; " in section
    figure = plots.times(result, [row for row in result["rows"] if "median_ms" in row])
    assert f"{other['median_ms']:.2f} ms, {ratio:.2f}× original" in {text.get_text() for text in figure.axes[0].texts}
    assert "by mvam_fast where it is fused" in figure.get_suptitle()


def test_a_run_of_poolers_only_compiles_no_model_around_the_naive_version():
    options = throughput.parse(["--device", "cpu", "--providers", "fused-siglip-head"])
    assert options.providers == ["naive", "siglip-head", "fused-siglip-head"] and options.settings == ["eager"]
    assert throughput.parse(["--device", "cpu"]).settings == ["eager", "compiled model"]


def test_a_run_of_poolers_joins_that_of_the_op_and_does_not_take_its_place(measured, pairs, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for name, path, date in (("op", measured, "2026-01-01"), ("pairs", pairs, "2026-01-02")):
        assert report.converters(tmp_path).startswith("Not measured yet: no complete result")
        assert "original and fused" not in report.page(tmp_path, {})
        content = results.read(path)
        content["machine"]["date"] = f"{date}T00:00:00+00:00"
        content["settings"]["quick"] = False
        results.write(tmp_path / name / "throughput.json", "throughput", content)
    found = report.newest(tmp_path)
    assert {key: path.parent.name for key, (path, _) in found.items()} == {
        ("throughput", "cpu"): "op", ("poolers", "cpu"): "pairs",
    }  # fmt: skip
    assert "### Other libraries' poolers, original and fused" in report.page(tmp_path, {})
    section = report.converters(tmp_path)
    assert "From [`pairs/throughput.json`](../pairs/throughput.json)" in section
    assert "| open_clip AttentionalPooler: forward, eager |" in section


@pytest.mark.parametrize("path", report.INSERTS, ids=lambda path: path.name)
def test_measured_sections_say_what_the_results_say(path):
    assert inserts.between(path) == report.INSERTS[path](results.FOLDER).strip("\n")


def test_a_section_is_replaced_between_its_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{inserts.BEGIN}\nold\n{inserts.END}\nafter\n")
    inserts.replace(page, "| new |\n\nlines\n")
    assert inserts.between(page) == "| new |\n\nlines"
    assert page.read_text() == f"before\n{inserts.BEGIN}\n| new |\n\nlines\n{inserts.END}\nafter\n"
    for text in ("", f"{inserts.END}{inserts.BEGIN}", 2 * f"{inserts.BEGIN}{inserts.END}", inserts.BEGIN):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"page.md: <!-- measured: begin --> and .* once each"):
            inserts.replace(page, "new")


@pytest.fixture
def sealed(measured, tmp_path):
    return Path(shutil.copy(measured, tmp_path))


@pytest.mark.parametrize("edit", ["time", "median", "reason", "commit", "removed"])
def test_a_file_that_was_edited_by_hand_is_refused(edit, sealed):
    content = json.loads(sealed.read_text())
    row = content["rows"][0]
    if edit == "time":
        row["blocks_ms"][0][0] /= 2
    elif edit == "median":
        row["median_ms"] /= 2
    elif edit == "reason":
        content["rows"][1] = {**{k: row[k] for k in schema.CASE}, "reason": "it was slow"}
    elif edit == "commit":
        content["machine"]["commit"] = "another"
    else:
        del content["rows"][1]
    sealed.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed after it was measured"):
        results.read(sealed)


def test_statistics_that_do_not_follow_are_refused_though_sealed(sealed):
    content = results.read(sealed)
    content["rows"][0]["median_ms"] *= 0.5
    results.write(sealed, "throughput", content)
    with pytest.raises(ValueError, match="row 0: median_ms does not follow from the repetitions"):
        results.read(sealed)


def test_the_schema_names_what_does_not_fit(sealed):
    content = results.read(sealed)
    schema.validate(content)
    content["rows"][0]["mode"] = "sideways"
    with pytest.raises(ValueError, match=r"throughput: \$\.rows\[0\]"):
        schema.validate(content)


def slower(result, factor, provider="torch"):
    changed = json.loads(json.dumps(result))
    for row in changed["rows"]:
        if row["provider"] == provider:
            row["blocks_ms"] = [[factor * t for t in block] for block in row["blocks_ms"]]
            row |= timing.summary([t for block in row["blocks_ms"] for t in block])
    return changed


def calm(result):
    """As measured on a machine that does nothing else: every block repeats the median, but for some percent."""
    changed = json.loads(json.dumps(result))
    for row in (row for row in changed["rows"] if "blocks_ms" in row):
        row["blocks_ms"] = [[row["median_ms"] * (1 + i / 100 + j / 200) for j in (0, 1)] for i in range(3)]
        row |= timing.summary([t for block in row["blocks_ms"] for t in block])
    return changed


def test_compare_tells_a_change_from_noise(sealed, tmp_path, capsys):
    result = calm(results.read(sealed))
    sealed = tmp_path / "calm.json"
    results.write(sealed, "throughput", result)
    results.write(tmp_path / "slow.json", "throughput", slower(result, 50.0))
    results.write(tmp_path / "fast.json", "throughput", slower(result, 0.02))
    results.write(tmp_path / "control.json", "throughput", slower(result, 50.0, "naive"))
    files = [str(sealed), *(str(tmp_path / f"{name}.json") for name in ("slow", "fast", "control"))]
    assert compare.main([files[0], files[0]]) == 0 and "ours: 0 beyond the noise" in capsys.readouterr().out
    assert compare.main([files[0], files[1]]) == 1 and "50.00x slower than the control" in capsys.readouterr().out
    assert compare.main([files[0], files[2]]) == 0 and "50.00x faster than the control" in capsys.readouterr().out
    # All that is not ours 50 times slower, the machine that is: ours kept its time, so it got faster beside them.
    assert compare.main([files[0], files[3]]) == 0
    printed = capsys.readouterr().out
    assert "control (code that is not ours): the new run is 0.020x" in printed and "not ours: 0 beyond" in printed
    both = slower(slower(result, 50.0), 50.0, "naive")
    results.write(tmp_path / "both.json", "throughput", both)
    assert compare.main([files[0], str(tmp_path / "both.json")]) == 0
    assert "ours: 0 beyond the noise" in capsys.readouterr().out


def test_compare_reports_what_stopped_working_and_refuses_other_devices(sealed, tmp_path, capsys):
    result = results.read(sealed)
    failed = json.loads(json.dumps(result))
    failed["rows"][1] = {**{k: failed["rows"][1][k] for k in schema.CASE}, "reason": "wrong: P is off"}
    results.write(tmp_path / "failed.json", "throughput", failed)
    assert compare.main([str(sealed), str(tmp_path / "failed.json")]) == 1
    assert "has no time any more: wrong: P is off" in capsys.readouterr().out
    failed["machine"]["device"] = "another"
    results.write(tmp_path / "failed.json", "throughput", failed)
    assert compare.main([str(sealed), str(tmp_path / "failed.json")]) == 2
    assert compare.main([str(sealed), str(tmp_path / "none.json")]) == 2
    assert "device differs" in (printed := capsys.readouterr().err) and "no such file" in printed


def test_summary_of_repetitions():
    expected = {"median_ms": 3, "p20_ms": 1.8, "p80_ms": 4.2, "min_ms": 1}
    assert timing.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx(expected)
    assert timing.summary([2.0])["p80_ms"] == 2.0


def test_saved_bytes_count_what_autograd_keeps_once_and_not_the_inputs():
    x = torch.randn(10, 5, requires_grad=True)
    assert timing.saved_mb(lambda: x.square(), (x,)) == 0  # its own input
    assert timing.saved_mb(lambda: x.exp(), (x,)) == pytest.approx(200e-6)  # its result
    assert timing.saved_mb(lambda: (y := x.exp()) * y, (x,)) == pytest.approx(200e-6)


def test_peak_memory_counts_what_lives_at_once():
    def step():
        for _ in range(3):  # one after another, never two at a time
            torch.zeros(250_000)
        return torch.zeros(500_000)

    assert timing.peak_extra_mb(step, CPU) == pytest.approx(2, rel=0.01)


def test_a_step_that_fails_while_it_is_timed_does_not_stop_the_others(tiny):
    calls = []

    def fails():
        calls.append(1)
        if len(calls) > 7:
            raise RuntimeError("out of memory, say")

    found, failed = timing.Clock(CPU).interleaved_blocks_ms({"a": fails, "b": list}, seconds=0)
    assert found.keys() == {"b"} and len(found["b"]) == 5 and str(failed["a"]) == "out of memory, say"


def test_blocks_take_turns_and_what_goes_before_is_not_timed(tiny):
    calls = []

    class Step:
        def __init__(self, name):
            self.name = name

        def before(self):
            calls.append("(" + self.name)

        def __call__(self):
            calls.append(")")

    steps = {name: Step(name) for name in "ab"}
    found, _ = timing.Clock(CPU).interleaved_blocks_ms(steps, seconds=0, rounds=2)
    assert {name: [len(block) for block in blocks] for name, blocks in found.items()} == {"a": [3, 3], "b": [3, 3]}
    assert "".join(calls) == 2 * (5 * "(a)" + 5 * "(b)")  # two of five are warm-up


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_is_captured_in_a_graph_and_replayed():
    case = cases.Case("vit-b-32", 2, 8, "bfloat16")
    rows = cases.measure(case, ["naive", "torch", "triton"], ["CUDA graph"], torch.device("cuda"), 0.0, lambda _: None)
    assert all("median_ms" in row for row in rows), rows
