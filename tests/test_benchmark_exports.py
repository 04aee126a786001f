"""The benchmark of exports: what is exported, its rows, its file, its part of docs/export.md. No time is asserted."""
import argparse
import copy
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mvam_fast.export import samples
from mvam_fast.export.bundle import MANIFEST, ExportError, read_manifest
from mvam_fast.export.source import of_model

for package in ("open_clip", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
encoder_models, cases, latency, tables, exports, report, results, schema, timing = (
    importlib.import_module(name)
    for name in (
        "encoder_models", "export_cases", "export_latency", "export_tables", "exports", "report", "results", "schema",
        "timing",
    )
)  # fmt: skip
MODEL, VIEWS, CPU = "scenes-ViT-T-16", 4, torch.device("cpu")
EXPORT = cases.to_onnx.export_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The one export that is really made."""
    path = tmp_path_factory.mktemp("bundles") / "mvam"
    model = encoder_models.random_model(MODEL, VIEWS)
    EXPORT(of_model(model, model.open_clip_config), path, progress=False)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch, bundle):
    """As few repetitions as there can be, no other code if a file is edited meanwhile, and exports that take no time:
    each is `bundle`, whose precision is then what was asked for. Those of plain CLIP are wrong, and half fails."""
    parse = exports.parse
    monkeypatch.setattr(exports, "parse", lambda given: argparse.Namespace(**{**vars(parse(given)), "seconds": 0.0}))
    found = {**exports.machine(CPU), "source_sha256": "0" * 64}
    monkeypatch.setattr(exports, "machine", lambda device: found)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1024)
    monkeypatch.setattr(cases, "load_exporter", lambda: None)
    made = []

    def export(source, out, *, precision="fp32", pooling="plain", opset=20, progress):
        made.append((type(source.model).__name__, precision, pooling))
        if precision == "fp16":
            raise ExportError("image.onnx does not agree\nsecond line")
        shutil.copytree(bundle, out)
        manifest = json.loads((out / MANIFEST).read_text())
        (out / MANIFEST).write_text(json.dumps(manifest | {"precision": precision}))
        return read_manifest(out)

    monkeypatch.setattr(cases.to_onnx, "export_bundle", export)
    return made


def run(out, *more):
    exports.main(["--quick", "--device", "cpu", "--views", str(VIEWS), "--batch", "2", "--out", str(out), *more])
    return results.read(out / "exports.json", "exports")


def keyed(rows):
    return {(row["model"], row["runner"], row["form"]): row for row in rows}


def test_a_quick_run_writes_a_file_and_a_table(tmp_path, capsys, quick):
    result = run(tmp_path)
    schema.validate(result)
    assert result["complete"] and result["settings"]["forms"] == list(exports.QUICK_FORMS)
    assert quick == [  # those that are timed come first
        ("CLIP", "fp32", "plain"), ("MVAM", "fp32", "plain"), ("MVAM", "int8", "plain"),
        ("CLIP", "int8", "plain"), ("MVAM", "fp16", "node"),
    ]  # fmt: skip
    exported = [row for row in result["rows"] if row["work"] == "export"]
    assert len(exported) == 5 and len(result["rows"]) == 5 + 2 * len(latency.WAYS)
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == [
        "scenes-ViT-T-16-clip-fp32-plain", "scenes-ViT-T-16-mvam-fp32-plain", "scenes-ViT-T-16-mvam-int8",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for text in (
        "scenes-ViT-T-16, plain CLIP\n", "scenes-ViT-T-16, MVAM, 4 views\n", "scenes-ViT-T-16, text, batch 2\n",
        "ExportError: image.onnx does not agree\n", "wrong: embeddings are [2, 128], must be [2, 32]", "exports.json",
    ):  # fmt: skip
        assert text in printed


def test_an_export_row_is_what_the_bundle_says(tmp_path, bundle):
    (row,) = cases.Exports(tmp_path, CPU).measure(cases.views_subject(MODEL, "mvam", VIEWS), "fp32 plain", lambda _: 0)
    manifest = read_manifest(bundle)
    for tower, about in row["towers"].items():
        assert about["bytes"] == (bundle / f"{tower}.onnx").stat().st_size
        assert about["parity"] == manifest["parity"][tower] and list(about["parity"]) == ["1", "3", "8", "17"]
        assert about["nodes"] == manifest["graphs"][tower]["nodes"] and about["pooling"] == "plain"
    assert row["bytes"] == sum(about["bytes"] for about in row["towers"].values()) and row["views"] == VIEWS
    assert row["seconds"] > 0 and not list(tmp_path.iterdir())  # nobody asked to keep it


def test_weights_beside_the_graph_count(tmp_path, bundle):
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle/image.onnx.data").write_bytes(bytes(1000))
    manifest = read_manifest(bundle)
    before, found = (cases.facts(path, manifest)["bytes"] for path in (bundle, tmp_path / "bundle"))
    assert found == before + 1000


def test_an_export_that_fails_is_a_row_with_a_reason_and_is_tried_once(tmp_path, quick):
    subject = cases.views_subject(MODEL, "mvam", VIEWS)
    made = cases.Exports(tmp_path, CPU, keep=[(subject, "fp16 node")])
    (row,) = made.measure(subject, "fp16 node", lambda _: 0)
    assert row == {
        "work": "export", "model": MODEL, "variant": "mvam", "form": "fp16 node",
        "reason": "ExportError: image.onnx does not agree",
    }  # fmt: skip
    for _ in range(2):
        with pytest.raises(ExportError, match="does not agree"):
            made.of(subject, "fp16 node")
    assert len(quick) == 1


def test_a_model_that_cannot_be_built_is_a_row_with_a_reason(tmp_path):
    subject = cases.pooler_subject(MODEL, tmp_path / "tokenizer")
    (row,) = cases.Exports(tmp_path, CPU).measure(subject, "fp32 plain", lambda _: 0)
    assert row["reason"] == f"ValueError: siglip: {MODEL} has no attention pooler that fuses"


def test_plain_clip_has_no_node_form(tmp_path):
    options = exports.parse(["--models", MODEL, "--siglip", "none", "--latency", "none", "--out", str(tmp_path)])
    found = set(exports.cases_of(options, CPU, set()))
    forms = {form for _, _, variant, form in found if variant == "mvam"}
    assert forms == set(cases.FORMS) - {"aoti"} == set(options.forms)
    assert {form for _, _, variant, form in found if variant == "clip"} == forms - {"fp32 node", "fp16 node"}
    assert exports.parse(["--aoti"]).forms == list(cases.FORMS)


def test_aoti_is_compiled_for_the_device_and_has_no_nodes(tmp_path, monkeypatch, bundle):
    def export(source, out, *, device, progress):
        out.mkdir()
        assert device == "cpu"
        return {key: value for key, value in read_manifest(bundle).items() if key != "graphs"}

    monkeypatch.setattr(cases.to_aoti, "export_bundle", export)
    (row,) = cases.Exports(tmp_path, CPU).measure(cases.views_subject(MODEL, "mvam", VIEWS), "aoti", lambda _: 0)
    assert "nodes" not in row["towers"]["image"] and tables.cells(row)[2] == ""


def test_the_small_tokenizer_is_one_of_hugging_face(tmp_path):
    pytest.importorskip("transformers")
    tokenizers = importlib.import_module("open_clip.tokenizer")
    tokenizer = tokenizers.HFTokenizer(str(cases.small_tokenizer(tmp_path)), context_length=16, clean="canonicalize")
    found = tokenizer(list(samples.SENTENCES))
    assert found.shape == (len(samples.SENTENCES), 16) and found.max() < 512
    lengths = (found != 0).sum(1)
    assert lengths.min() < 5 and lengths.max() == 16 and (found == 1).any(1).all()  # padded, cut, and ended


def test_checkpoints_are_told_apart_by_name_and_weights(tmp_path, capsys, bundle):
    folders = [tmp_path / name for name in ("one/model", "two/model", "else/one/model")]
    model = encoder_models.random_model(MODEL, VIEWS)
    for folder in folders:
        model.save_pretrained(folder)
    result = run(
        tmp_path / "out", "--models", "--latency", "none", "--forms", "fp32 plain", "--checkpoint",
        *map(str, folders[:2]),
    )  # fmt: skip
    assert [row["model"] for row in result["rows"]] == ["one/model", "two/model"]
    assert len(set(result["settings"]["checkpoints"].values())) == 1 and str(tmp_path) not in json.dumps(result)
    assert "one/model, checkpoint\n" in capsys.readouterr().out
    for given, message in (
        ([folders[0], folders[2]], "two would have the same name in the results"), ([tmp_path], "no checkpoint"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            exports.parse(["--checkpoint", *map(str, given)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("tower", encoder_models.TOWERS)
def test_all_ways_are_checked_and_timed_in_turns(tower, tmp_path, monkeypatch):
    turns, in_turns = [], latency.blocks_in_turns
    monkeypatch.setattr(
        latency, "blocks_in_turns", lambda clock, ready, seconds: turns.append(ready) or in_turns(clock, ready, seconds)
    )
    timed = latency.Latency(MODEL, VIEWS, CPU, cases.Exports(tmp_path, CPU))
    rows = keyed(timed.measure(tower, 2, 0.0, lambda _: 0))
    assert list(rows) == list(latency.WAYS) and len(turns[0]) == len(latency.WAYS) - 1
    assert "wrong: embeddings are [2, 128]" in rows.pop(("clip", "session", "fp32 plain"))["reason"]
    for (_, _, form), row in rows.items():
        assert row["repetitions"] == 25 and row["per_s"] == pytest.approx(2000 / row["median_ms"])
        assert row["precision"] == ("int8" if form == "int8" else "float32")
        assert 0 < row["errors"]["distance"] < 1e-5
    assert rows["mvam", "encoder", "int8"]["details"] == "onnxruntime-cpu"
    assert "times_clip" in rows["mvam", "eager", "fp32"] and "times_clip" not in rows["mvam", "session", "fp32 plain"]
    assert "times_session" in rows["mvam", "encoder", "fp32 plain"]


def test_on_a_cpu_the_bare_session_is_the_encoders_own_with_pytorchs_threads(tmp_path, bundle, monkeypatch):
    asked = []
    load = latency.Encoder.load
    monkeypatch.setattr(
        latency.Encoder, "load", lambda *given, **more: asked.append(more["threads"]) or load(*given, **more)
    )
    with latency.ExitStack() as opened:
        encoders = latency.Encoders(CPU, opened)
        one, other = (encoders.of(bundle, graphs=graphs) for graphs in (True, False))
    assert one is other and asked == [torch.get_num_threads()]
    with pytest.raises(RuntimeError, match="closed"):
        one.session("image")


def block_row(way, *medians):
    model, runner, form = way
    return {
        "work": "latency", "tower": "image", "batch": 1, "model": model, "runner": runner, "form": form,
        "blocks_ms": [[median, median, median] for median in medians], "median_ms": medians[1],
    }  # fmt: skip


def test_ratios_are_of_blocks_that_took_turns():
    eager, session, encoder, int8, _, clip = (
        block_row(way, *medians)
        for way, medians in zip(
            latency.WAYS, [(8, 12, 16), (4, 5, 8), (4, 6, 8), (2, 2, 2), (1, 1, 1), (2, 5, 1)], strict=True
        )
    )
    latency.with_ratios([eager, session, encoder, int8, clip])
    assert encoder["times_session"] == {"median": 1.0, "least": 1.0, "most": 1.2}
    assert encoder["times_eager"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    assert int8["times_eager"]["least"] == 0.125 and session["times_clip"]["most"] == 8
    assert "times_clip" not in eager  # plain CLIP by PyTorch has no time here


def test_an_interrupted_run_goes_on_and_refuses_another_setting(tmp_path, monkeypatch, quick):
    whole = latency.Latency.measure

    def stopped(self, tower, *given):
        if tower == "text":
            raise KeyboardInterrupt
        return whole(self, tower, *given)

    monkeypatch.setattr(latency.Latency, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    first = results.read(tmp_path / "exports.json", "exports")
    assert not first["complete"] and len(first["rows"]) == 3 + len(latency.WAYS)
    monkeypatch.setattr(latency.Latency, "measure", whole)
    quick.clear()
    again = run(tmp_path, "--resume")
    assert again["complete"] and again["rows"][: len(first["rows"])] == first["rows"]
    assert len(again["rows"]) == len(first["rows"]) + len(latency.WAYS) + 2
    assert quick == [("CLIP", "int8", "plain"), ("MVAM", "fp16", "node")]  # the bundles that are timed were still there
    with pytest.raises(SystemExit, match="--resume: views was 4, now it is 3"):
        run(tmp_path, "--resume", "--views", "3")


def by_hand():
    """A result as a run writes it, with numbers to be found again."""
    best, worst = {"max_abs": 1e-7, "cosine": 1.0, "top5": 1.0}, {"max_abs": 3e-7, "cosine": 0.9998, "top5": 0.5}
    parity = {"1": best, "8": worst, "17": best | {"top5": 0.75}}
    tower = {"bytes": 1_500_000, "pooling": "node", "parity": parity, "nodes": 96, "opset": 20}
    export = {"work": "export", "model": "ViT-X", "variant": "mvam"}
    half = tower | {"half_arithmetic": {"max_abs": 1e-3, "cosine": 0.99, "top5": 1.0}}
    way = {"work": "latency", "tower": "text", "batch": 8, "model": "mvam", "runner": "encoder", "form": "int8"}
    times = {
        "blocks_ms": [[2.0, 2.0]] * 5, **timing.summary([2.0] * 10), "max_ms": 2.0, "repetitions": 10,
        "per_s": 4000.0, "clocks": {}, "precision": "int8", "details": "onnxruntime-cpu",
        "errors": {"distance": 0.02, "cosine": 0.999, "max_abs": 0.01},
        "times_eager": {"median": 0.5, "least": 0.4, "most": 0.62},
    }  # fmt: skip
    return {
        "machine": exports.machine(CPU), "note": "A note.", "complete": True,
        "settings": {"latency": "ViT-Y", "views": 16, "quick": False},
        "rows": [
            export | {"form": "fp16 node", "seconds": 12.34, "bytes": 3_000_000, "views": 16}
            | {"towers": {"image": tower, "text": half}},
            export | {"form": "int8", "reason": "ExportError: it is off"},
            way | times,
            way | {"model": "clip", "runner": "eager", "form": "fp32", "reason": "MemoryError: no more"},
        ],
    }  # fmt: skip


def test_the_text_table_of_a_result_made_by_hand():
    lines = tables.exports_table(by_hand()).splitlines()
    at = lines.index("ViT-X, MVAM, 16 views")
    assert lines[at + 2].split() == [
        "fp16", "node", "12.3", "3.0", "96", "+", "96", "3.0e-07", "2.0e-04", "3.0e-07", "2.0e-04", "75%", "1.0e-02",
    ]  # fmt: skip
    assert lines[at + 3].split(maxsplit=1) == ["int8", "ExportError: it is off"]
    at = lines.index("ViT-Y, text, batch 8")
    assert lines[at + 2].split() == [
        "mvam,", "Encoder,", "int8", "2.000", "2.00", "-", "2.00", "2.00*", "4000.0", "0.500", "(0.40-0.62)", "2.0e-02",
    ]  # fmt: skip
    assert lines[at + 3].strip() == "clip, eager PyTorch           MemoryError: no more"
    assert lines[at + 1].index("x eager") + 7 == lines[at + 2].index(")") + 1  # under its head


def test_the_schema_takes_such_a_result_and_refuses_what_does_not_belong(tmp_path):
    results.write(tmp_path / "exports.json", "exports", by_hand())
    right = results.read(tmp_path / "exports.json", "exports")
    schema.validate(right)
    for row, change in (
        (0, {"seconds": 0}), (0, {"reason": "both"}), (0, {"towers": {}}), (1, {"reason": ""}), (1, {"variant": "x"}),
        (2, {"runner": "else"}), (2, {"times_eager": 0.5}), (2, {"path": "a"}), (3, {"work": "export"}),
    ):  # fmt: skip
        wrong = copy.deepcopy(right)
        wrong["rows"][row] |= change
        with pytest.raises(ValueError, match=rf"exports: \$\.rows\[{row}\]"):
            schema.validate(wrong)


def test_the_measured_part_of_the_page_follows_the_newest_result(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks/results"
    assert report.exports(folder) == (
        "Not measured yet: no complete result of `python benchmarks/exports.py` is in `benchmarks/results/`."
    )
    page = report.page(folder, {})
    results.write(folder / "one/exports.json", "exports", by_hand())
    text = report.exports(folder)
    assert report.page(folder, {}) == page  # another page's matter
    assert text.startswith("From [`benchmarks/results/one/exports.json`](../benchmarks/results/one/exports.json): ")
    for expected in (
        "A note.", "| ViT-X, MVAM, 16 views | seconds | MB |", "| fp16 node | 12.3 | 3.0 | 96 + 96 |",
        "- No numbers for int8: ExportError: it is off\n", "| ViT-Y, text, batch 8 | p50 ms |", " | 2.00\\* | ",
        "| 0.500 (0.40-0.62) |", "- No numbers for clip, eager PyTorch: MemoryError: no more",
    ):  # fmt: skip
        assert expected in text
    later = by_hand()
    later["machine"] = later["machine"] | {"date": "2999-01-01T00:00:00+00:00"}
    results.write(folder / "two/exports.json", "exports", later | {"complete": False})
    assert report.exports(folder) == text
    results.write(folder / "two/exports.json", "exports", later | {"note": "Later."})
    assert "results/two/" in report.exports(folder) and "Later." in report.exports(folder)
