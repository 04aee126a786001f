"""Serving files for Triton Inference Server, read back by the server's own configuration schema."""
import json
from pathlib import Path

import pytest
from mvam_fast.export.bundle import INPUT_NAMES, OUTPUT_NAMES, new_bundle, write_manifest
from mvam_fast.export.serving_repo import config_text, write_model_repository

ROWS = {"image": [3, 64, 64], "text": [24]}


def manifest_of(kind="onnx", batch="batch", pixels=False, **more):
    def tower(name):
        row, dtype = (ROWS[name], "int64" if name == "text" else "float32")
        if pixels and name == "image":
            row, dtype = [64, 64, 3], "uint8"
        return {
            "file": f"{name}.{'plan' if kind == 'trt' else kind}",
            "input": {"name": INPUT_NAMES[name], "dtype": dtype, "shape": [batch, *row]},
            "output": {"name": OUTPUT_NAMES[name], "dtype": "float32", "shape": [batch, 128]},
        }

    manifest = {
        "kind": kind, "precision": "fp16", "embedding_width": 128, "parity": {}, "tokenizer": {"context_length": 24},
        "preprocess": {"size": 64, "mean": [0.5, 0.5, 0.5], "interpolation": 'bi"cubic\\'},
        "towers": {name: tower(name) for name in ROWS}, **more,
    }  # fmt: skip
    if kind == "aoti":
        manifest["device"] = "cpu"
    if kind == "trt":
        profiles = [{"min": 1, "opt": 1, "max": 1}, {"min": 1, "opt": 8, "max": 48}]
        manifest["engines"] = {"settings": {"profiles": profiles}}
    return manifest


def bundle_of(path, **options):
    with new_bundle(path) as folder:
        manifest = manifest_of(**options)
        for tower in manifest["towers"].values():
            (folder / tower["file"]).write_bytes(tower["file"].encode())
        if options.get("kind", "onnx") == "onnx":
            (folder / "image.onnx.data").write_bytes(b"weights")
        write_manifest(folder, manifest)
    return path


def parsed(text):
    """ModelConfig by the schema that the server is built with; a field that it does not know is an error."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


@pytest.mark.parametrize("kind", ["onnx", "trt"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_configurations_fit_the_servers_schema(kind, tower):
    config = parsed(config_text(tower, manifest_of(kind, pixels=tower == "image")))
    assert (config.backend, config.platform) == (("", "tensorrt_plan") if kind == "trt" else ("onnxruntime", ""))
    assert config.name == f"mvam_{tower}" and config.max_batch_size == (48 if kind == "trt" else 64)
    (given,), (output,) = config.input, config.output
    assert (given.name, list(given.dims)) == (INPUT_NAMES[tower], {"image": [64, 64, 3], "text": [24]}[tower])
    assert config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[given.data_type].name == (
        {"image": "TYPE_UINT8", "text": "TYPE_INT64"}[tower]
    )
    assert (output.name, list(output.dims)) == (OUTPUT_NAMES[tower], [128])
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert preferred == ([4, 8, 16, 32] if kind == "trt" else [4, 8, 16, 32, 64])
    assert [warm.batch_size for warm in config.model_warmup] == [1, config.max_batch_size]
    for warm in config.model_warmup:
        value = warm.inputs[INPUT_NAMES[tower]]
        assert list(value.dims) == list(given.dims) and value.data_type == given.data_type
        assert value.zero_data if tower == "text" else value.random_data
    assert config.optimization.cuda.graphs == (kind == "trt")
    assert list(config.instance_group[0].profile) == (["1"] if kind == "trt" else [])
    assert json.loads(config.parameters["preprocess"].string_value) == manifest_of()["preprocess"]
    assert config.parameters["precision"].string_value == "fp16"


def test_engines_that_take_no_single_sample_cannot_be_batched_by_the_server():
    manifest = manifest_of("trt")
    manifest["engines"]["settings"]["profiles"] = [{"min": 8, "opt": 8, "max": 64}]
    with pytest.raises(ValueError, match="serving: the server forms batches from 1 on"):
        config_text("image", manifest)


def test_a_fixed_batch_is_told_in_full_and_not_batched():
    config = parsed(config_text("image", manifest_of(batch=3)))
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [3, 3, 64, 64] and list(config.output[0].dims) == [3, 128]


def test_int8_graphs_stay_on_the_cpu():
    kinds = {
        precision: parsed(config_text("text", manifest_of() | {"precision": precision})).instance_group[0].kind
        for precision in ("int8", "fp32")
    }
    names = parsed("").instance_group.add().Kind
    assert {precision: names.Name(kind) for precision, kind in kinds.items()} == {
        "int8": "KIND_CPU", "fp32": "KIND_AUTO",
    }  # fmt: skip


def test_the_repository_has_models_in_version_folders(tmp_path):
    (tmp_path / "repository" / "other").mkdir(parents=True)
    folders = write_model_repository(bundle_of(tmp_path / "bundle"), tmp_path / "repository")
    assert [folder.name for folder in folders] == ["mvam_image", "mvam_text"]
    found = {str(p.relative_to(tmp_path / "repository")) for p in (tmp_path / "repository").rglob("*")}
    assert found == {
        "other", "mvam_image", "mvam_image/config.pbtxt", "mvam_image/1", "mvam_image/1/model.onnx",
        "mvam_image/1/image.onnx.data", "mvam_text", "mvam_text/config.pbtxt", "mvam_text/1", "mvam_text/1/model.onnx",
    }  # fmt: skip
    # Written anew from engines: the ONNX files go.
    write_model_repository(bundle_of(tmp_path / "engines", kind="trt"), tmp_path / "repository")
    assert [p.name for p in (tmp_path / "repository/mvam_image/1").iterdir()] == ["model.plan"]
    assert (tmp_path / "repository/mvam_text/1/model.plan").read_bytes() == b"text.plan"


def test_what_is_not_ours_is_left_and_what_cannot_be_served_is_refused(tmp_path):
    bundle = bundle_of(tmp_path / "bundle")
    theirs = tmp_path / "repository" / "mvam_text"
    theirs.mkdir(parents=True)
    (theirs / "config.pbtxt").write_text("name: 'mine'")
    with pytest.raises(ValueError, match="mvam_text exists and was not written by mvam_fast"):
        write_model_repository(bundle, tmp_path / "repository")
    assert [p.name for p in (tmp_path / "repository").iterdir()] == ["mvam_text"]
    with pytest.raises(ValueError, match="is of kind 'aoti'; the server runs onnx and trt"):
        write_model_repository(bundle_of(tmp_path / "packages", kind="aoti"), tmp_path / "repository")
    (Path(bundle) / "text.onnx").write_bytes(b"edited")
    with pytest.raises(ValueError, match="not the file that the bundle was made with"):
        write_model_repository(bundle, tmp_path / "other")
