"""Export to ONNX, its gates, and the Encoder that runs a bundle."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mvam_fast.export import to_onnx, verify
from mvam_fast.export.bundle import ExportError, check_replaceable
from PIL import Image

from mvam_fast import MVAM, Encoder, create_model_and_transforms, functional, get_tokenizer
from mvam_fast.preprocess import eval_transform

# Of many lengths; one with id 0 ("!") as a word, one that is cut at the context's end.
TEXTS = ["a", "!~", "a small red circle above a large bar", "two " * 60, "hi!", "an orange cross", "x y z", "bar"]
VARIANTS = {
    "views": {"num_views": 4},
    "global": {"num_views": 3, "global_view": True},
    "single": {"num_views": 0, "global_view": True},
    "additive": {"num_views": 2, "scoring": "additive"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, arguments in VARIANTS.items():
        torch.manual_seed(0)
        model = create_model_and_transforms("scenes-ViT-T-16", **arguments)[0]
        if model.image_gates is not None:
            with torch.no_grad():
                model.image_gates.uniform_(), model.text_gates.uniform_()
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def bundles(checkpoints, tmp_path_factory):
    """The reports, by variant; the bundles lie in the folder `path`."""
    path = tmp_path_factory.mktemp("bundles")
    reports = {name: to_onnx.export_bundle(checkpoints / name, path / name, progress=False) for name in VARIANTS}
    return path, reports


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)) for _ in range(8)]
    pictures[3] = pictures[3].convert("L")
    pictures[0].save(tmp_path / "picture.png")
    return [tmp_path / "picture.png", *pictures[1:]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_encoder_equals_pytorch(variant, batch, bundles, checkpoints, pictures):
    encoder = Encoder.load(bundles[0] / variant)
    model = MVAM.from_pretrained(checkpoints / variant)
    assert encoder.width == model.num_vectors * 32
    transform = eval_transform(model.open_clip_config["preprocess_cfg"])
    opened = [Image.open(p) if i == 0 else p for i, p in enumerate(pictures[:batch])]
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(p) for p in opened]), normalize=True).numpy()
        texts = model.encode_text(get_tokenizer(checkpoints / variant)(TEXTS[:batch]), normalize=True).numpy()
    for found, expected in (
        (encoder.embed_images(pictures[:batch]), images), (encoder.embed_texts(TEXTS[:batch], batch_size=2), texts),
    ):  # fmt: skip
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-4
        assert (found * expected).sum(1).min() >= 0.9999


def test_the_bundle_says_what_it_is(bundles):
    path, reports = bundles
    for variant, report in reports.items():
        assert json.loads((path / variant / "bundle.json").read_text()) == report
        assert set(report["files"]) == {"image.onnx", "text.onnx"}
        for tower in ("image", "text"):
            assert set(report["parity"][tower]) == {"1", "3", "8"}
            assert all(row["max_abs"] <= 1e-4 and row["top5"] for row in report["parity"][tower].values())
    assert reports["global"]["num_vectors"] == 4 and reports["global"]["tokenizer"]["context_length"] == 24


def test_the_graph_is_plain_onnx_with_a_free_batch(bundles):
    for tower in ("image", "text"):
        model = onnx.load(bundles[0] / "views" / f"{tower}.onnx")
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        (value,) = model.graph.input
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param and all(d.dim_value for d in dims[1:])


def test_the_bundle_says_how_to_feed_it_and_nothing_about_this_machine(bundles):
    path, reports = bundles
    report = reports["global"]
    assert report["opset"] == report["graphs"]["image"]["opset"] == report["graphs"]["text"]["opset"] == 20
    assert report["vector_width"] * report["num_vectors"] == report["embedding_width"]
    assert report["tokenizer"]["kind"] == "open_clip SimpleTokenizer" and report["versions"]["open_clip"]
    for file in (path / "global").iterdir():
        assert str(Path(to_onnx.__file__).parent.parent).encode() not in file.read_bytes()
    for tower in ("image", "text"):
        nodes = onnx.load(path / "global" / f"{tower}.onnx").graph.node
        assert not any(node.metadata_props or node.doc_string for node in nodes)


def test_weights_of_several_gigabytes_lie_beside_the_graph(checkpoints, tmp_path, monkeypatch):
    """The exporter does so above its threshold, which is lowered here."""
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1)
    report = to_onnx.export_bundle(checkpoints / "single", tmp_path / "bundle", progress=False)
    assert set(report["files"]) == {"image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"}
    ids = get_tokenizer(checkpoints / "single")(TEXTS)
    with torch.no_grad():
        expected = MVAM.from_pretrained(checkpoints / "single").encode_text(ids, normalize=True).numpy()
    assert np.abs(Encoder.load(tmp_path / "bundle").embed_texts(TEXTS) - expected).max() <= 1e-4
    (tmp_path / "bundle" / "text.onnx.data").unlink()
    with pytest.raises(FileNotFoundError, match="lacks its file text.onnx.data"):
        Encoder.load(tmp_path / "bundle")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_older_bundle_stays_until_the_new_one_is_there(bundles, checkpoints, tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    shutil.copytree(bundles[0] / "views", out)
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(verify, "MIN_COSINE", 2.0)
        with pytest.raises(ExportError, match="disagrees"):
            to_onnx.export_bundle(checkpoints / "single", out, progress=False)
    assert contents(out) == before

    rename = os.rename

    def no_new_folder(source, target):
        if (Path(source) / "new").exists():
            raise OSError("disk full")
        rename(source, target)

    new = tmp_path / "next"
    new.mkdir()
    (new / "new").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", no_new_folder)
        with pytest.raises(OSError, match="disk full"):
            to_onnx._replace(new, out)
    assert contents(out) == before
    to_onnx._replace(new, out)
    assert set(contents(out)) == {"new"} and list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_not_ours_alone_is_never_replaced(bundles, checkpoints, tmp_path):
    foreign, mixed = tmp_path / "foreign", tmp_path / "mixed"
    foreign.mkdir()
    (foreign / "bundle.json").write_text('{"name": "of another program"}')
    shutil.copytree(bundles[0] / "views", mixed)
    (mixed / "thesis.txt").write_text("precious")
    before = contents(foreign), contents(mixed)
    with pytest.raises(ValueError, match="foreign exists and is no bundle"):
        to_onnx.export_bundle(checkpoints / "views", foreign)
    with pytest.raises(ValueError, match="mixed holds more than a bundle .thesis.txt"):
        to_onnx.export_bundle(checkpoints / "views", mixed)
    assert (contents(foreign), contents(mixed)) == before
    check_replaceable(bundles[0] / "views")


@pytest.mark.parametrize("opset", [12, 17, 999])
def test_an_opset_that_cannot_be_written_is_refused(opset, checkpoints, tmp_path):
    with pytest.raises(ValueError, match=f"opset is {opset}; it must be from 18 to"):
        to_onnx.export_bundle(checkpoints / "views", tmp_path / "bundle", opset=opset)


def test_the_graph_gate_names_what_it_refuses(bundles, tmp_path):
    def changed(change):
        model = onnx.load(bundles[0] / "views" / "text.onnx")
        change(model)
        onnx.save(model, tmp_path / "text.onnx")
        return tmp_path / "text.onnx"

    def unknown_input(model):
        model.graph.node[0].input[0] = "nowhere"

    def cumulative_sum(model):
        axis = onnx.helper.make_tensor("axis_of_sum", onnx.TensorProto.INT64, [], [1])
        model.graph.initializer.append(axis)
        model.graph.node.insert(0, onnx.helper.make_node("CumSum", ["token_ids", "axis_of_sum"], ["sum_of_ids"]))

    def own_operator(model):
        model.opset_import.append(onnx.helper.make_opsetid("mvam", 1))
        model.graph.node.append(onnx.helper.make_node("pool", ["token_ids"], ["pooled"], domain="mvam"))

    def fixed_batch(model):
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    for change, message in (
        (unknown_input, "text.onnx is not valid ONNX"),
        (cumulative_sum, "operators that TensorRT does not build: CumSum"),
        (own_operator, "operators that TensorRT does not build: mvam::pool"),
        (fixed_batch, "the batch alone may vary|not valid ONNX"),
    ):
        with pytest.raises(ExportError, match=message):
            verify.check_graph(changed(change))


def test_a_tower_that_torch_cannot_export_is_told_as_such(checkpoints, tmp_path, monkeypatch, capsys):
    def branches_on_data(self, images, normalize=False):
        return images if images.mean() > 0 else -images

    monkeypatch.setattr(MVAM, "encode_image", branches_on_data)
    assert to_onnx.main([str(checkpoints / "single"), "--out", str(tmp_path / "bundle")]) == 1
    assert "error: image.onnx: torch cannot export this tower" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tower", ["image", "text"])
def test_pooling_is_plain_while_exporting_even_if_kernels_are_asked_for(tower, checkpoints, tmp_path, monkeypatch):
    """On the kernels (here Triton's interpreter) the export would fail; on "torch" the graph happens to be plain."""
    chosen, choose = [], functional.choose

    def watched(*arguments, **options):
        chosen.append(choose(*arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(functional, "choose", watched)
    model = MVAM.from_pretrained(checkpoints / "views", backend="triton")
    encode = {"image": model.encode_image, "text": model.encode_text}[tower]
    example = {"image": torch.randn(2, 3, 64, 64), "text": get_tokenizer(checkpoints / "views")(TEXTS[:2])}[tower]
    to_onnx._export(to_onnx._Tower(encode).eval(), example, tmp_path / "tower.onnx", "input", "output", 20)
    assert {path.forward for path in chosen} == {"reference"}
    verify.check_graph(tmp_path / "tower.onnx")


def test_a_failed_gate_leaves_no_bundle(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "MAX_ABS", 0.0)
    with pytest.raises(ExportError, match="image.onnx disagrees with PyTorch.*allowed are max_abs"):
        to_onnx.export_bundle(checkpoints / "single", tmp_path / "bundle", progress=False)
    assert list(tmp_path.iterdir()) == []
    assert to_onnx.main([str(checkpoints / "single"), "--out", str(tmp_path / "bundle")]) == 1
    assert "disagrees with PyTorch" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_parity_sees_a_wrong_encoder(bundles, checkpoints):
    model = MVAM.from_pretrained(checkpoints / "views")
    ids = get_tokenizer(checkpoints / "views")(TEXTS)

    def slightly_wrong(ids):
        return torch.nn.functional.normalize(model.encode_text(ids) + 0.01, dim=-1)

    with pytest.raises(ExportError, match="text.onnx disagrees"):
        verify.check_parity(bundles[0] / "views" / "text.onnx", slightly_wrong, ids)


def test_bad_arguments_of_the_export(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        to_onnx.export_bundle(tmp_path / "none", tmp_path / "bundle")
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="exists and is no bundle"):
        to_onnx.export_bundle(checkpoints / "views", tmp_path / "precious")
    assert to_onnx.main([str(tmp_path / "none"), "--out", str(tmp_path / "bundle")]) == 1


def test_encoder_says_what_runs_and_takes_empty_lists(bundles):
    encoder = Encoder.load(bundles[0] / "views", backend="onnxruntime-cpu")
    assert (encoder.backend, encoder.reason) == ("onnxruntime-cpu", "asked for")
    assert encoder.embed_texts([]).shape == encoder.embed_images([]).shape == (0, 128)


def test_bad_bundles_and_inputs_are_named(bundles, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles[0] / "views", bundle)
    encoder = Encoder.load(bundle)
    with pytest.raises(TypeError, match="texts is a str; it must be a list"):
        encoder.embed_texts("a cat")
    with pytest.raises(TypeError, match="texts holds a int"):
        encoder.embed_texts([1])
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size is {size}; it must be at least 1"):
            encoder.embed_texts(["a"], batch_size=size)
    with pytest.raises(TypeError, match="images holds a int"):
        encoder.embed_images([1])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read the image .*broken.jpg"):
        encoder.embed_images([tmp_path / "broken.jpg"])
    with pytest.raises(ValueError, match="backend is 'tpu'; it must be one of auto"):
        Encoder.load(bundle, backend="tpu")
    with pytest.raises(FileNotFoundError, match="bundle: no such folder"):
        Encoder.load(tmp_path / "none")
    text = bundle / "text.onnx"
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(ValueError, match="text.onnx is not the file that the bundle was made with"):
        Encoder.load(bundle)
    text.unlink()
    with pytest.raises(FileNotFoundError, match="lacks its file text.onnx"):
        Encoder.load(bundle)
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        Encoder.load(bundle)
    for lost in ("embedding_width", "tokenizer", "files"):
        (bundle / "bundle.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != lost}))
        with pytest.raises(ValueError, match=f"bundle.json lacks .*{lost}"):
            Encoder.load(bundle)
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "files": {}}))  # would skip the check of the hashes
    with pytest.raises(ValueError, match="lacks files.image.onnx, files.text.onnx"):
        Encoder.load(bundle)
    (bundle / "bundle.json").write_text("[]")
    with pytest.raises(ValueError, match="has format None"):
        Encoder.load(bundle)
    (bundle / "bundle.json").unlink()
    with pytest.raises(FileNotFoundError, match="bundle.json"):
        Encoder.load(bundle)
