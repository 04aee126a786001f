"""The bundle as a folder: written whole or not at all, and read only as it was written."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from mvam_fast.export import bundle, samples
from mvam_fast.export.bundle import check_files, check_replaceable, new_bundle, read_manifest, write_manifest

MANIFEST = {
    "kind": "onnx", "precision": "fp32", "embedding_width": 8, "preprocess": {}, "tokenizer": {}, "parity": {},
    "towers": {"image": {"file": "image.onnx"}, "text": {"file": "text.onnx"}},
}  # fmt: skip


def make(out, content=b"graph", **changes):
    with new_bundle(out) as folder:
        for tower in bundle.TOWERS:
            (folder / f"{tower}.onnx").write_bytes(content)
        write_manifest(folder, MANIFEST | changes)
    return Path(out)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_is_read_back_and_knows_its_files(tmp_path):
    made = make(tmp_path / "made")
    manifest = read_manifest(made)
    check_files(made, manifest)
    assert manifest["format"] == bundle.FORMAT and set(manifest["files"]) == {"image.onnx", "text.onnx"}
    assert {"kind": "onnx"}.items() <= read_manifest(made, kind="onnx").items()
    with pytest.raises(ValueError, match="is of kind 'onnx'; it must be 'trt'"):
        read_manifest(made, kind="trt")


def test_whatever_goes_wrong_leaves_the_older_bundle(tmp_path, monkeypatch):
    out = make(tmp_path / "bundle")
    before = contents(out)
    with pytest.raises(OSError, match="no space left"), new_bundle(out) as folder:
        (folder / "image.onnx").write_bytes(b"half")
        raise OSError("no space left")
    assert contents(out) == before and list(tmp_path.iterdir()) == [out]

    rename = os.rename

    def fails_at_the_end(source, target):
        if Path(target) == out and (Path(source) / "image.onnx").read_bytes() == b"new":
            raise OSError("disk full")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "rename", fails_at_the_end)
        make(out, b"new")
    assert contents(out) == before and list(tmp_path.iterdir()) == [out]
    make(out, b"new")
    assert contents(out)["image.onnx"] == b"new" and list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_not_ours_alone_is_never_replaced(tmp_path):
    foreign, mixed = tmp_path / "foreign", make(tmp_path / "mixed")
    foreign.mkdir()
    (foreign / "bundle.json").write_text('{"name": "of another program"}')
    (mixed / "thesis.txt").write_text("precious")
    before = contents(foreign), contents(mixed)
    with pytest.raises(ValueError, match="foreign exists and is no bundle"):
        make(foreign)
    with pytest.raises(ValueError, match="mixed holds more than a bundle .thesis.txt"):
        make(mixed)
    assert (contents(foreign), contents(mixed)) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists and is no bundle"):
        check_replaceable(tmp_path / "file")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="bundle: no such folder"):
        read_manifest(tmp_path / "none")
    made = make(tmp_path / "made")
    path = made / "bundle.json"
    whole = json.loads(path.read_text())
    for text, message in (
        ("[]", "has format None"),
        ("{", "is not valid JSON"),
        (json.dumps(whole | {"format": 99}), r"has format 99; this version reads 2 \(a newer mvam_fast wrote it"),
        (json.dumps(whole | {"format": 1}), r"has format 1; .* \(export the checkpoint again"),
        (json.dumps(whole | {"files": {}}), "lacks files.image.onnx, files.text.onnx"),  # would skip the hashes
        (json.dumps(whole | {"towers": {}}), "lacks towers.image, towers.text"),
        (json.dumps(whole | {"towers": []}), "lacks towers.image, towers.text"),
        (json.dumps(whole | {"kind": "zip"}), "is of kind 'zip'; it must be one of onnx, aoti, trt"),
        (json.dumps(whole | {"kind": "aoti"}), "lacks device"),
        (json.dumps(whole | {"files": whole["files"] | {"../x": ""}}), "names files outside of the bundle: ../x"),
        *((json.dumps({k: v for k, v in whole.items() if k != lost}), f"lacks .*{lost}") for lost in bundle.KEYS),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(made)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="bundle.json"):
        read_manifest(made)


def test_a_file_that_was_edited_or_lost_is_named(tmp_path):
    made = make(tmp_path / "made")
    manifest = read_manifest(made)
    (made / "text.onnx").write_bytes(b"grap")
    with pytest.raises(ValueError, match="text.onnx is not the file that the bundle was made with"):
        check_files(made, manifest)
    (made / "text.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="lacks its file text.onnx"):
        check_files(made, manifest)


def test_samples_survive_any_memory_layout(tmp_path):
    """safetensors writes memory as it lies: an array with other strides came back scrambled."""
    pixels = samples.pictures(3, 8, 10).transpose(0, 2, 1, 3)
    embeds = {tower: np.arange(12.0, dtype=np.float32).reshape(4, 3).T for tower in bundle.TOWERS}
    samples.save(tmp_path, pixels, np.arange(6).reshape(3, 2), embeds)
    kept = samples.load(tmp_path)
    assert (kept["pixels"] == pixels).all() and (kept["image_embeds"] == embeds["image"]).all()
    assert kept["pixels"].std() > 30 and (samples.pictures(3, 8, 10) == samples.pictures(3, 8, 10)).all()
