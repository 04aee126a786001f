"""export/to_trt.py up to where TensorRT is needed: settings, the dry run, exit codes, and every refusal."""
from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from mvam_fast.export import samples, to_onnx, to_trt, trt_build
from mvam_fast.export.bundle import read_manifest, write_manifest
from mvam_fast.export.trt_engine import check_engine, engines_of, profiles_of
from mvam_fast.export.trt_library import Missing, find, unsupported
from mvam_fast.export.trt_settings import Profile, Settings, buckets, profile_at, profiles_for
from onnx import TensorProto, helper, numpy_helper

from mvam_fast.serving.trt_runner import TrtRunner

ROOT = Path(__file__).resolve().parent.parent
WIDTH, SIDE, CONTEXT = 6, 4, 5
PREPROCESS = {"size": SIDE, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def write_graph(path, name, output, row, weights):
    """input [batch,*row] → L2-normalised product with `weights`."""
    kind = TensorProto.FLOAT if len(row) > 1 else TensorProto.INT64
    nodes = [
        helper.make_node("Cast", [name], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["product"]),
        helper.make_node("ReduceL2", ["product", "last"], ["norm"]),
        helper.make_node("Div", ["product", "norm"], [output]),
    ]
    graph = helper.make_graph(
        nodes, "tower", [helper.make_tensor_value_info(name, kind, ["batch", *row])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([-1], np.int64), "last")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def make_bundle(folder, **changes):
    """An ONNX bundle by hand: each tower is one matrix product. `changes` are made to its manifest."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    inputs = {"image": samples.normalised(pixels, PREPROCESS), "text": rng.integers(1, 9, (3, CONTEXT))}
    towers, embeds = {}, {}
    for tower, (name, output) in {"image": ("image", "image_embeds"), "text": ("token_ids", "text_embeds")}.items():
        row = list(inputs[tower].shape[1:])
        weights = rng.standard_normal((math.prod(row), WIDTH)).astype(np.float32)
        write_graph(folder / f"{tower}.onnx", name, output, row, weights)
        product = inputs[tower].reshape(3, -1).astype(np.float32) @ weights
        embeds[tower] = product / np.linalg.norm(product, axis=1, keepdims=True)
        towers[tower] = {
            "file": f"{tower}.onnx",
            "input": {"name": name, "dtype": str(inputs[tower].dtype), "shape": ["batch", *row]},
            "output": {"name": output, "dtype": "float32", "shape": ["batch", WIDTH]},
        }
    samples.save(folder, pixels, inputs["text"], embeds)
    manifest = {
        "kind": "onnx", "precision": "fp32", "towers": towers, "embedding_width": WIDTH, "preprocess": PREPROCESS,
        "tokenizer": {}, "parity": {}, "pooling": {"image": "plain", "text": "plain"},
        "graphs": {"image": {"nodes": 5}, "text": {"nodes": 5}},
    }  # fmt: skip
    write_manifest(folder, manifest | changes)
    return folder


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def nowhere(monkeypatch):
    """A machine with neither TensorRT nor a GPU, wherever this runs."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*arguments):
    return to_trt.main([str(argument) for argument in arguments])


# Settings


@pytest.mark.parametrize("text", ["1,8", "1,8,64,128", "1,x,8", "", "1.5,2,3", "1 2 3"])
def test_a_profile_that_is_no_three_numbers(text):
    with pytest.raises(ValueError, match="batch: .* must be three whole numbers MIN,OPT,MAX"):
        Profile.parse(text)


@pytest.mark.parametrize("text", ["0,1,8", "8,4,16", "1,16,8", "-1,1,1", "2,1,1"])
def test_a_profile_that_is_out_of_order(text):
    with pytest.raises(ValueError, match=f"batch: {text} must satisfy 1 <= MIN <= OPT <= MAX"):
        Profile.parse(text)


def test_profiles_and_the_batch_sizes_that_are_run():
    assert Profile.parse(" 1, 8,64") == Profile(1, 8, 64) == Settings().profiles[0]
    assert Profile(1, 8, 64).shapes([3, 2]) == {"min": [1, 3, 2], "opt": [8, 3, 2], "max": [64, 3, 2]}
    assert Profile(4, 4, 4).batches == Profile(4, 4, 4).buckets == (4,)
    assert Profile(1, 8, 64).buckets == (1, 2, 4, 8, 16, 32, 64)
    assert Profile(3, 24, 100).buckets == (3, 4, 8, 16, 24, 32, 64, 100)
    two = (Profile(1, 1, 1), Profile(8, 32, 96))
    assert buckets(two) == (1, 8, 16, 32, 64, 96)
    assert buckets((Profile(1, 8, 16), Profile(2, 8, 32))) == (1, 2, 4, 8, 16, 32)
    for batch in buckets(two):
        number = profile_at(batch, two)
        assert two[number].min <= batch <= two[number].max
    assert profile_at(8, (Profile(1, 8, 64), Profile(4, 8, 16), Profile(8, 8, 16))) == 1  # the tightest, the first such
    with pytest.raises(ValueError, match="no profile of the engine allows a batch of 4"):
        profile_at(4, two)


def test_a_graph_with_a_fixed_batch_has_one_profile():
    assert profiles_for(None, None) == (Profile(1, 8, 64),)
    assert profiles_for(["1,1,1", "2,4,8"], None) == (Profile(1, 1, 1), Profile(2, 4, 8))
    assert profiles_for(None, 16) == profiles_for(["16,16,16"], 16) == (Profile(16, 16, 16),)
    with pytest.raises(ValueError, match="batch: the source's graphs take 16 rows and nothing else"):
        profiles_for(["1,8,16"], 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"profiles": ()}, "batch: there must be at least one profile"),
        ({"profiles": (Profile(1, 2, 3),) * 2}, "batch: the same profile is given twice"),
        ({"workspace_gib": 0.0}, "workspace is 0.0; it must be more than 0 GiB"),
        ({"workspace_gib": math.nan}, "workspace is nan"),
        ({"optimization_level": 6}, "optimization-level is 6; it must be from 0 to 5"),
        ({"optimization_level": -1}, "optimization-level is -1"),
        ({"hardware_compatibility": "all"}, "hardware-compatibility is 'all'; it must be one of none, ampere., same"),
        ({"timing_cache": ROOT}, "timing-cache: .* is a folder"),
        ({"timing_cache": Path("x"), "optimization_level": 0}, "does not use one at optimization-level 0"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_settings_are_told_without_this_machines_paths():
    settings = Settings(timing_cache=Path("secret/cache"), workspace_gib=0.5, hardware_compatibility="same")
    told = json.dumps(settings.resolved())
    assert "secret" not in told and '"timing_cache": true' in told and '"tf32": false' in told
    assert settings.workspace_bytes == 2**29 and Settings().workspace_bytes is None


# The dry run


def test_dry_run(bundle, tmp_path, capsys, nowhere):
    out = tmp_path / "out"
    assert run(bundle, "--out", out, "--dry-run", "--batch", "1,1,1", "--batch", "4,6,8", "--strip") == 0
    text, _, last = capsys.readouterr().out.rpartition("}")
    told = json.loads(text + "}")
    assert "nothing is built" in last and not out.exists()
    assert told["precision"] == "fp32" and told["settings"]["strip"] and not told["settings"]["refit"]
    image, tokens = told["towers"]["image"], told["towers"]["text"]
    assert image["shapes"][1] == {"min": [4, 3, 4, 4], "opt": [6, 3, 4, 4], "max": [8, 3, 4, 4]}
    assert image["input"] == {"name": "image", "dtype": "float32"} and tokens["input"]["dtype"] == "int64"
    assert tokens["shapes"][0] == {"min": [1, 5], "opt": [1, 5], "max": [1, 5]}
    assert image["batch_sizes_run"] == [[1], [4, 6, 8]] and image["lint"]["opset"] == 20


def test_dry_run_of_what_is_no_bundle_exports_it_first(bundle, tmp_path, capsys, monkeypatch, nowhere):
    asked = []

    def export(source, out, **options):
        asked.append((source, options))
        shutil.copytree(bundle, out)

    monkeypatch.setattr(to_onnx, "export_bundle", export)
    assert run("ViT-B-32", "--pretrained", "openai", "--out", tmp_path / "out", "--dry-run", "--precision", "fp32") == 0
    (source, options), = asked
    assert source == "ViT-B-32"
    assert (options["pretrained"], options["precision"], options["pooling"]) == ("openai", "fp32", "plain")
    asked.clear()
    assert run("ViT-B-32", "--out", tmp_path / "out", "--dry-run", "--plugin") == 1  # this bundle has plain pooling
    assert (asked[0][1]["precision"], asked[0][1]["pooling"]) == ("fp16", "node")
    assert "plugin: image and text of the source pool by plain operators" in capsys.readouterr().err


def test_help_and_dry_run_need_torch_alone(bundle, tmp_path):
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"tensorrt", "onnx", "onnxruntime", "open_clip", "safetensors", "triton", "PIL"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from mvam_fast.export import to_trt
assert to_trt.main([{str(bundle)!r}, "--out", {str(tmp_path / "out")!r}, "--dry-run"]) == 0
assert to_trt.main([{str(bundle)!r}, "--out", {str(tmp_path / "out")!r}]) == 3
to_trt.main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "onnx is not installed; this is from the export" in done.stdout and '"nodes": 5' in done.stdout
    assert "--timing-cache" in done.stdout and "TensorRT: it is not installed" in done.stderr


# What is missing


def test_what_is_missing_is_named_all_at_once(bundle, tmp_path, capsys, nowhere):
    assert run(bundle, "--out", tmp_path / "out") == 3
    told = capsys.readouterr().err
    assert "TensorRT: it is not installed; get it with pip install 'tensorrt>=10.12,<12'" in told
    assert "https://pypi.nvidia.com" in told and "a GPU: PyTorch" in told
    assert not (tmp_path / "out").exists()
    assert run("ViT-B-32", "--out", tmp_path / "out") == 3  # before minutes are spent on an export


@pytest.mark.parametrize("version", ["8.6.1", "10.11.0.33", "12.0.0.1", "nonsense"])
def test_versions_that_are_not_for_use(version, monkeypatch):
    assert f"TensorRT {version} is installed; needed is 10.12" in unsupported(version)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Missing, match=f"TensorRT {version} is installed(?s:.*)device 1: PyTorch sees 1 CUDA"):
        find(1)


@pytest.mark.parametrize("version", ["10.12.0.36", "10.13.3.9", "11.4.0.106", "11.9.0.1.post1"])
def test_versions_that_are_for_use(version):
    assert unsupported(version) == ""


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Missing, match="it is installed but does not load .libnvinfer.so.11: cannot open"):
        find(0)


def test_the_runner_without_the_library(bundle, nowhere):
    with pytest.raises(ImportError, match=r"'tensorrt' here.*pip install 'mvam_fast\[trt\]'"):
        TrtRunner(bundle, read_manifest(bundle))


# Bad input


def truncated_graph(bundle):
    path = bundle / "image.onnx"
    path.write_bytes(path.read_bytes()[:-7])


def truncated_graph_with_its_hash(bundle):
    truncated_graph(bundle)
    write_manifest(bundle, json.loads((bundle / "bundle.json").read_text()))


def lost_file(bundle):
    (bundle / "text.onnx").unlink()


def lost_samples(bundle):
    (bundle / "samples.safetensors").unlink()
    write_manifest(bundle, json.loads((bundle / "bundle.json").read_text()))


def changed(**entries):
    def change(bundle):
        manifest = json.loads((bundle / "bundle.json").read_text())
        (bundle / "bundle.json").write_text(json.dumps(manifest | entries))

    return change


def no_shape(bundle):
    manifest = json.loads((bundle / "bundle.json").read_text())
    del manifest["towers"]["text"]["input"]["shape"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated_graph, "image.onnx is not the file that the bundle was made with"),
        (truncated_graph_with_its_hash, "image.onnx cannot be read as ONNX|image.onnx is not valid ONNX"),
        (lost_file, "lacks its file text.onnx"),
        (lost_samples, "source: .* has no samples.safetensors"),
        (no_shape, "source: .*bundle.json lacks towers.text.input.shape"),
        (changed(files={}), "lacks files.image.onnx"),
        (changed(format=99), "has format 99"),
        (changed(kind="trt"), "is of kind 'trt'; it must be 'onnx'"),
        (changed(precision="int8"), "source: .* is in int8, by dynamic quantisation, which TensorRT cannot build"),
    ],
)
def test_bundles_that_are_refused(change, message, bundle, tmp_path, capsys, nowhere):
    change(bundle)
    assert run(bundle, "--out", tmp_path / "out", "--dry-run") == 1
    told = capsys.readouterr().err
    assert re.search(f"to_trt: error: .*({message})", told), told
    assert "Traceback" not in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "8,4,16"], "batch: 8,4,16 must satisfy"),
        (["--batch", "0,1,2"], "batch: 0,1,2 must satisfy"),
        (["--batch", "1,8"], "batch: '1,8' must be three whole numbers"),
        (["--workspace", "-1"], "workspace is -1.0"),
        (["--optimization-level", "9"], "optimization-level is 9"),
        (["--timing-cache", ROOT], "is a folder"),
        (["--precision", "fp16"], "precision is 'fp16', and the bundle .* in fp32"),
        (["--pretrained", "openai"], "pretrained, fuse-poolers: the bundle"),
        (["--strip", "--serving", "models"], "serving, strip: the server does not put weights back"),
        (["--plugin"], "plugin: image and text of the source pool by plain operators"),
    ],
)
def test_arguments_that_are_refused(arguments, message, bundle, tmp_path, capsys, nowhere):
    assert run(bundle, "--out", tmp_path / "out", *arguments) == 1
    assert re.search(f"to_trt: error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_sources_and_outs_that_are_refused(bundle, tmp_path, capsys, nowhere):
    (tmp_path / "empty").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("all of it")
    before = contents(bundle), contents(tmp_path / "precious")
    assert run(tmp_path / "empty", "--out", tmp_path / "out") == 1
    assert run(bundle / "image.onnx", "--out", tmp_path / "out") == 1
    assert run(bundle, "--out", tmp_path / "precious", "--dry-run") == 1
    assert run(bundle, "--out", bundle) == 1
    told = capsys.readouterr().err
    assert told.count("is neither a bundle (no bundle.json) nor a checkpoint") == 2
    assert "precious exists and is no bundle" in told and "bundle is the source itself" in told
    assert (contents(bundle), contents(tmp_path / "precious")) == before
    with pytest.raises(SystemExit) as usage:
        run(bundle)
    assert usage.value.code == 2


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), to_trt.ExportError("no tactic found")])
def test_a_build_that_fails_leaves_the_older_bundle(failure, bundle, tmp_path, capsys, monkeypatch):
    """A builder that fails at the second tower: a machine with TensorRT up to there."""
    out = make_bundle(tmp_path / "out")
    before, built = contents(out), []

    def fails(path, settings, trt):
        if built:
            raise failure
        built.append(path)
        return b"half of it"

    monkeypatch.setattr(to_trt, "find", lambda device: SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(to_trt, "build_engine", fails)
    assert run(bundle, "--out", out) == 1
    assert f"to_trt: error: {failure}" in capsys.readouterr().err
    assert contents(out) == before and {path.name for path in tmp_path.iterdir()} == {"bundle", "out"}
    (tmp_path / "file").write_text("")
    assert run(bundle, "--out", tmp_path / "file" / "out") == 1
    assert "File exists" in capsys.readouterr().err


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(tmp_path, capsys):
    nothing = SimpleNamespace(serialize=lambda: None)
    trt_build._keep_timing_cache(nothing, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    trt_build._keep_timing_cache(SimpleNamespace(serialize=lambda: b"timed"), tmp_path / "file" / "cache")
    told = capsys.readouterr().err
    assert told.count("warning: timing-cache: ") == 2 and "TensorRT does not serialise it" in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Engines of another place

HERE = {
    "gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "tensorrt": "11.4.0.106", "cuda": "13.0",
    "driver": "580.1", "platform": "Linux x86_64",
}  # fmt: skip


def engines(**settings):
    return {"built_on": HERE, "settings": Settings(**settings).resolved(), "graphs": {}}


@pytest.mark.parametrize(
    ("settings", "place", "reason"),
    [
        ({}, {}, ""),
        ({}, {"driver": "999", "cuda": "12.8"}, ""),
        ({}, {"gpu": "NVIDIA H200"}, "built for NVIDIA H100 80GB HBM3 .9.0., here is NVIDIA H200 .9.0."),
        ({}, {"tensorrt": "11.4.0.107"}, "built by TensorRT 11.4.0.106, here is 11.4.0.107; install that version"),
        ({}, {"platform": "Windows AMD64"}, "built on Linux x86_64, this is Windows AMD64"),
        ({}, {"tensorrt": "12.0.0.1"}, "TensorRT 12.0.0.1 is installed; needed is"),
        ({"hardware_compatibility": "same"}, {"gpu": "NVIDIA H200"}, ""),
        ({"hardware_compatibility": "same"}, {"compute_capability": "8.9"}, "need the same compute capability"),
        ({"hardware_compatibility": "ampere+"}, {"gpu": "A100", "compute_capability": "8.0"}, ""),
        ({"hardware_compatibility": "ampere+"}, {"gpu": "B200", "compute_capability": "10.0"}, ""),
        ({"hardware_compatibility": "ampere+"}, {"gpu": "T4", "compute_capability": "7.5"}, "8.0 or higher"),
        ({"hardware_compatibility": "ampere+"}, {"tensorrt": "11.5.0.1"}, "install that version, or build it here"),
        ({"version_compatible": True}, {"tensorrt": "11.10.0.1"}, ""),
        ({"version_compatible": True}, {"tensorrt": "11.3.0.5"}, "run on the same or a later version"),
        ({"version_compatible": True}, {"tensorrt": "11.5.0.1", "gpu": "NVIDIA H200"}, "here is NVIDIA H200"),
    ],
)
def test_engines_that_cannot_run_here(settings, place, reason):
    told = check_engine(engines(**settings), {**HERE, **place})
    assert re.search(reason, told) if reason else told == ""


def test_what_a_bundle_says_of_its_engines():
    described = engines(profiles=(Profile(1, 1, 1), Profile(2, 4, 8)))
    assert profiles_of(json.loads(json.dumps(described))) == (Profile(1, 1, 1), Profile(2, 4, 8))
    assert engines_of({"engines": described}) is described
    with pytest.raises(ValueError, match="bundle.json lacks engines.built_on, engines.settings, engines.graphs"):
        engines_of({})
    del described["settings"]["profiles"]
    with pytest.raises(ValueError, match="bundle.json lacks engines.settings.profiles"):
        engines_of({"engines": described})
