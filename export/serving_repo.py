"""A bundle as a model repository of NVIDIA's Triton Inference Server: two models, one per encoder.

    DIR/mvam_image/{config.pbtxt, 1/model.onnx or model.plan}
    DIR/mvam_text/...

The server pads nothing and normalises nothing: what a client has to know (preprocessing, tokenizer, width) stands under
`parameters`, which the server hands out with the model's configuration.
"""
from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from mvam_fast.export.bundle import TOWERS, check_files, read_manifest, replace_folder

MARK = "# Written by mvam_fast."
MOST = 64  # largest batch that the server may form for a graph that takes any
PREFERRED = (4, 8, 16, 32, 64)
QUEUE_DELAY_US = 500
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8", "int64": "TYPE_INT64"}
_TYPES["int32"] = "TYPE_INT32"


def write_model_repository(bundle: str | Path, directory: str | Path) -> list[Path]:
    """Writes the models into `directory`, and returns their folders. Other models there are left alone.

    A model that this function wrote before is replaced, whole; ValueError where something else has its name, or where
    the server has no backend for the bundle's kind.
    """
    bundle, directory = Path(bundle), Path(os.path.abspath(directory))
    manifest = read_manifest(bundle)
    if manifest["kind"] not in ("onnx", "trt"):
        raise ValueError(f"bundle: {bundle} is of kind {manifest['kind']!r}; the server runs onnx and trt")
    check_files(bundle, manifest)
    targets = {tower: directory / f"mvam_{tower}" for tower in TOWERS}
    for target in targets.values():
        config = target / "config.pbtxt"
        if target.exists() and not (config.is_file() and config.read_text().startswith(MARK)):
            raise ValueError(f"serving: {target} exists and was not written by mvam_fast; choose another folder")
    directory.mkdir(parents=True, exist_ok=True)
    # Outside: a server that polls the repository must not meet it. Both are made before either takes its place.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as staging:
        for tower, target in targets.items():
            temporary = Path(staging) / target.name
            (temporary / "1").mkdir(parents=True)
            file = manifest["towers"][tower]["file"]
            shutil.copyfile(bundle / file, temporary / "1" / f"model{Path(file).suffix}")
            if (bundle / f"{file}.data").is_file():  # under the name by which the graph knows it
                shutil.copyfile(bundle / f"{file}.data", temporary / "1" / f"{file}.data")
            (temporary / "config.pbtxt").write_text(config_text(tower, manifest), encoding="utf-8")
        for target in targets.values():
            replace_folder(Path(staging) / target.name, target)
    return list(targets.values())


def config_text(tower: str, manifest: dict) -> str:
    """config.pbtxt of a tower, in protobuf's text format."""
    entry = manifest["towers"][tower]
    batch, *row = entry["input"]["shape"]
    free, is_plan = batch == "batch", manifest["kind"] == "trt"
    most = _most(manifest) if free else 0
    prefix = [] if free else [batch]  # without batching by the server, shapes are told in full
    lines = [
        MARK,
        f'name: "mvam_{tower}"',
        'platform: "tensorrt_plan"' if is_plan else 'backend: "onnxruntime"',
        f"max_batch_size: {most}",
        _tensor("input", entry["input"], [*prefix, *row]),
        _tensor("output", entry["output"], [*prefix, *entry["output"]["shape"][1:]]),
        f"instance_group [ {{ {_instance(manifest, free)} }} ]",
    ]
    if most:
        preferred = ", ".join(str(size) for size in PREFERRED if size <= most)
        preferred = f"preferred_batch_size: [ {preferred} ] " if preferred else ""
        lines.append(f"dynamic_batching {{ {preferred}max_queue_delay_microseconds: {QUEUE_DELAY_US} }}")
    if is_plan:
        lines.append("optimization { cuda { graphs: true } }")
    for size in sorted({1, most}) if most else [0]:
        lines.append(_warm_up(entry["input"], [*prefix, *row], size))
    known = {name: manifest[name] for name in ("embedding_width", "preprocess", "tokenizer", "precision")}
    for name, value in known.items():
        value = value if isinstance(value, str) else json.dumps(value)
        lines.append(f'parameters {{ key: "{name}" value {{ string_value: {json.dumps(value)} }} }}')
    return "\n".join(lines) + "\n"


def _profile(manifest: dict) -> int:
    """The number of the profile that the server is to use: it has one limit for all batches, which begin at 1."""
    profiles = manifest["engines"]["settings"]["profiles"]
    fit = [number for number, profile in enumerate(profiles) if profile["min"] == 1]
    if not fit:
        raise ValueError(f"serving: the server forms batches from 1 on, and no profile of {profiles} has that")
    return max(fit, key=lambda number: profiles[number]["max"])


def _most(manifest: dict) -> int:
    if manifest["kind"] == "onnx":
        return MOST
    return manifest["engines"]["settings"]["profiles"][_profile(manifest)]["max"]


def _instance(manifest: dict, free: bool) -> str:
    if manifest["kind"] == "trt":
        return "kind: KIND_GPU count: 1" + (f' profile: [ "{_profile(manifest)}" ]' if free else "")
    return f"kind: {'KIND_CPU' if manifest['precision'] == 'int8' else 'KIND_AUTO'} count: 1"


def _tensor(kind: str, entry: dict, dims: list[int]) -> str:
    shape = ", ".join(map(str, dims))
    return f'{kind} [ {{ name: "{entry["name"]}" data_type: {_TYPES[entry["dtype"]]} dims: [ {shape} ] }} ]'


def _warm_up(entry: dict, dims: list[int], size: int) -> str:
    """Random pictures; token ids of zero, since random ones would lie outside the vocabulary."""
    data = "zero_data" if entry["dtype"].startswith("int") else "random_data"
    shape = ", ".join(map(str, dims))
    value = f"value {{ data_type: {_TYPES[entry['dtype']]} dims: [ {shape} ] {data}: true }}"
    return f'model_warmup [ {{ name: "batch {size}" batch_size: {size} inputs {{ key: "{entry["name"]}" {value} }} }} ]'
