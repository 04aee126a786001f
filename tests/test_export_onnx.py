"""Export to ONNX: every form of it agrees with PyTorch, and what does not agree leaves no bundle."""
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from mvam_fast.export import bundle, samples, source, to_onnx, verify
from mvam_fast.export.bundle import ExportError, read_manifest
from mvam_fast.export.graph import write_graph
from mvam_fast.export.lint import check_graph
from mvam_fast.export.pool_node import NodeForm
from mvam_fast.export.recall import RecallData
from PIL import Image

from mvam_fast import MVAM, functional, get_tokenizer
from mvam_fast.dispatch import exporting_as
from mvam_fast.preprocess import eval_transform
from mvam_fast.retrieval.scenes import make_scenes

# Of many lengths; one with id 0 ("!") as a word, one that is cut at the context's end.
TEXTS = ["a", "!~", "a small red circle above a large bar", "two " * 60, "hi!", "an orange cross", "x y z", "bar"]
# What is exported, how.
VARIANTS = {
    "views": ("views", {}),
    "single bf16": ("single", {"precision": "bf16"}),
    "additive, opset 23": ("additive", {"opset": 23, "pooling": "node"}),
    "node": ("views", {"pooling": "node"}),
    "node fp16": ("global", {"pooling": "node", "precision": "fp16", "image_input": "uint8", "opset": 23}),
    "pixels, three at a time": ("views", {"image_input": "uint8", "batch": 3, "external_data": True}),
    "int8": ("global", {"precision": "int8"}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, checkpoint_of):
    folder = tmp_path_factory.mktemp("by_name")
    for name, _ in VARIANTS.values():
        if not (folder / name).exists():
            (folder / name).symlink_to(checkpoint_of(name))
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, exported):
    """The reports, by variant; the bundles lie in the folder `path`."""
    path = tmp_path_factory.mktemp("bundles")
    for variant, (checkpoint, options) in VARIANTS.items():
        (path / variant).symlink_to(exported(checkpoint, **options))
    return path, {variant: json.loads((path / variant / "bundle.json").read_text()) for variant in VARIANTS}


def run(path, tower, inputs):
    session = onnxruntime.InferenceSession(str(path / f"{tower}.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "bf16" not in name])
def test_a_bundle_gives_the_vectors_of_pytorch(variant, bundles, checkpoints):
    """On other inputs than those of the export's own gate, through training's transform and tokenizer."""
    path, reports = bundles
    checkpoint, options = VARIANTS[variant]
    batch = options.get("batch") or 5
    model = MVAM.from_pretrained(checkpoints / checkpoint)
    pixels = np.random.default_rng(7).integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
    transform = eval_transform(model.open_clip_config["preprocess_cfg"])
    images = torch.stack([transform(Image.fromarray(picture)) for picture in pixels])
    token_ids = get_tokenizer(checkpoints / checkpoint)(TEXTS[:batch])
    with torch.no_grad():
        expected = {
            "image": model.encode_image(images, normalize=True).numpy(),
            "text": model.encode_text(token_ids, normalize=True).numpy(),
        }
    inputs = {"image": pixels if options.get("image_input") else images.numpy(), "text": token_ids.numpy()}
    limits = verify.LIMITS[reports[variant]["precision"]]
    for tower in bundle.TOWERS:
        found = run(path / variant, tower, inputs[tower])
        assert found.dtype == np.float32 and found.shape == expected[tower].shape
        assert np.abs(found - expected[tower]).max() <= limits.max_abs
        assert (found * expected[tower]).sum(1).min() >= limits.cosine


@pytest.mark.parametrize("variant", ["node fp16", "single bf16"])
def test_half_precision_keeps_its_islands(variant, bundles):
    """Softmax and final normalisation in float32, LayerNorm statistics too; everything else in half."""
    for tower in bundle.TOWERS:
        model = onnx.load(bundles[0] / variant / f"{tower}.onnx")
        model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
        half = onnx.TensorProto.BFLOAT16 if "bf16" in variant else onnx.TensorProto.FLOAT16
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        types |= {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
        kinds = {}
        for node in model.graph.node:
            kinds.setdefault(node.op_type, set()).add(types[node.input[0]] if node.input else None)
            if node.op_type == "LayerNormalization":
                assert {a.name: a.i for a in node.attribute}.get("stash_type", 1) == onnx.TensorProto.FLOAT
        assert kinds["Softmax"] == kinds["ReduceL2"] == {onnx.TensorProto.FLOAT}
        assert kinds["LayerNormalization"] == kinds["MatMul"] == kinds["Gelu"] == {half}


@pytest.mark.parametrize("variant", ["node", "node fp16"])
def test_the_pooling_is_one_node_with_a_body(variant, bundles):
    for tower in bundle.TOWERS:
        model = onnx.load(bundles[0] / variant / f"{tower}.onnx")
        (node,) = [node for node in model.graph.node if node.domain == "mvam"]
        (function,) = model.functions
        assert (node.op_type, function.domain, function.name) == ("MultiViewPool", "mvam", "MultiViewPool")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        scale = attributes.pop("scale")
        assert attributes == {"plugin_namespace": b"mvam", "plugin_version": b"1", "aot": 1}
        assert scale == pytest.approx(96**-0.5) and len(node.input) == 3
    assert bundles[1][variant]["pooling"] == {"image": "node", "text": "node"}


def test_a_pooling_that_no_node_can_do_is_written_plainly_and_says_so(bundles):
    """Additive scoring has keys of its own."""
    path, reports = bundles
    assert reports["additive, opset 23"]["pooling"]["image"].startswith("plain operators")
    model = onnx.load(path / "additive, opset 23" / "image.onnx")
    assert not model.functions
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 2  # one per block


def test_int8_products_are_in_int8_and_the_pooling_is_not(bundles):
    path, reports = bundles
    report = reports["int8"]
    assert report["graphs"]["image"]["int8_products"] == 4 * 2  # qkv, output and two of the MLP, in two blocks
    full, small = ((path / variant / "image.onnx").stat().st_size for variant in ("views", "int8"))
    assert small < 0.5 * full


def test_weights_lie_beside_the_graph_when_asked_for(bundles):
    path, reports = bundles
    report = reports["pixels, three at a time"]
    assert set(report["files"]) == {
        "image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data", "samples.safetensors",
    }  # fmt: skip
    assert report["towers"]["image"]["input"] == {"name": "image", "dtype": "uint8", "shape": [3, 64, 64, 3]}
    assert set(report["parity"]["text"]) == {"3"}


def test_recall_is_measured_in_pytorch_and_as_exported(checkpoints, tmp_path):
    data = make_scenes(tmp_path / "scenes", train=4, val=4, test=12)
    given = RecallData(data, Path(data).parent / "images", "test")
    report = to_onnx.export_bundle(checkpoints / "views", tmp_path / "bundle", recall=given, progress=False)
    assert report["recall"]["split"] == "test"
    assert report == json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    pytorch, exported = (report["recall"]["metrics"][name] for name in ("PyTorch", "exported"))
    assert pytorch["images"] == exported["images"] == 12 and pytorch["captions"] == exported["captions"] == 60
    assert abs(pytorch["rsum"] - exported["rsum"]) < 20  # of 600; random weights rank by hairs


def test_an_open_clip_model_without_views_is_exported_too(tmp_path):
    report = to_onnx.export_bundle("scenes-ViT-T-16", tmp_path / "bundle", progress=False)
    assert report["num_vectors"] == 1 and report["source"] == {"open_clip": "scenes-ViT-T-16", "pretrained": None}
    kept = samples.load(tmp_path / "bundle")
    found = run(tmp_path / "bundle", "image", samples.inputs_of("image", kept, report, 4))
    assert np.abs(found - samples.expected("image", kept, 4)).max() <= 1e-5


def test_samples_are_what_pytorch_says(bundles, checkpoints):
    """A bundle carries its own proof: inputs, and float32 answers of the model that it was made from."""
    kept = samples.load(bundles[0] / "node fp16")
    model = MVAM.from_pretrained(checkpoints / "global")
    images = torch.from_numpy(samples.normalised(kept["pixels"], model.open_clip_config["preprocess_cfg"]))
    with torch.no_grad():
        assert np.abs(model.encode_image(images, normalize=True).numpy() - kept["image_embeds"]).max() < 1e-6
    assert len(kept["pixels"]) == len(samples.SENTENCES) == 17
    assert len(np.unique(kept["pixels"].reshape(17, -1), axis=0)) == 17
    rows = samples.inputs_of("text", kept, bundles[1]["node fp16"], 20)
    assert rows.shape == (20, 24) and (rows[17:] == rows[:3]).all()


def test_the_bundle_says_what_it_is(bundles):
    path, reports = bundles
    for variant, report in reports.items():
        assert report == read_manifest(path / variant)
        limits = verify.LIMITS[report["precision"]]
        for tower in ("image", "text"):
            free = report["towers"][tower]["input"]["shape"][0] == "batch"
            assert set(report["parity"][tower]) == ({"1", "3", "8", "17"} if free else {"3"})
            assert all(row["max_abs"] <= limits.max_abs for row in report["parity"][tower].values())
    report = reports["node fp16"]
    assert report["num_vectors"] == 4 and report["tokenizer"]["context_length"] == 24
    assert report["half_arithmetic"]["text"]["cosine"] >= 0.9999 and "half_arithmetic" not in reports["views"]


def test_the_graph_is_plain_onnx_with_a_free_batch(bundles):
    for tower in ("image", "text"):
        model = onnx.load(bundles[0] / "views" / f"{tower}.onnx")
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        (value,) = model.graph.input
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param and all(d.dim_value for d in dims[1:])


def test_the_bundle_says_how_to_feed_it_and_nothing_about_this_machine(bundles):
    path, reports = bundles
    report = reports["node fp16"]
    assert report["opset"] == report["graphs"]["image"]["opset"] == report["graphs"]["text"]["opset"] == 23
    assert report["vector_width"] * report["num_vectors"] == report["embedding_width"]
    assert report["tokenizer"]["kind"] == "open_clip SimpleTokenizer" and report["versions"]["open_clip"]
    for variant in ("node fp16", "int8"):
        for file in (path / variant).iterdir():
            assert str(Path(to_onnx.__file__).parent.parent).encode() not in file.read_bytes()
        for tower in bundle.TOWERS:
            nodes = onnx.load(path / variant / f"{tower}.onnx").graph.node
            assert not any(node.metadata_props or node.doc_string for node in nodes)


def test_weights_of_several_gigabytes_lie_beside_the_graph(checkpoints, tmp_path, monkeypatch):
    """The exporter does so above its threshold, which is lowered here."""
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1)
    found = source.open_source(checkpoints / "single")
    images = torch.from_numpy(samples.normalised(samples.pictures(2, 64, 64), found.preprocess))
    tower = source.Tower(found, "image").eval()
    write_graph(tower, images, tmp_path / "image.onnx", "image", opset=20)
    assert {path.name for path in tmp_path.iterdir()} == {"image.onnx", "image.onnx.data"}
    with torch.no_grad():
        assert np.abs(run(tmp_path, "image", images.numpy()) - tower(images).numpy()).max() <= 1e-5


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failed_gate_leaves_the_older_bundle_as_it_was(bundles, checkpoints, tmp_path, monkeypatch, capsys):
    out = tmp_path / "bundle"
    shutil.copytree(bundles[0] / "views", out)
    before = contents(out)
    monkeypatch.setitem(verify.LIMITS, "fp32", verify.Limits(0.0, 0.9999, 1e-3))
    assert to_onnx.main([str(checkpoints / "single"), "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "to_onnx: error: image.onnx disagrees with PyTorch" in told and "allowed are max_abs ≤ 0.0" in told
    assert contents(out) == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 18}, "opset is 18; it must be from 20 to"), ({"opset": 999}, "opset is 999; it must be from 20 to"),
        ({"opset": 20, "precision": "bf16"}, "opset is 20; bfloat16 needs 22"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be one of fp32"),
        ({"pooling": "magic"}, "pooling is 'magic'; it must be one of plain, node"),
        ({"image_input": "jpeg"}, "image_input is 'jpeg'; it must be one of float, uint8"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"pretrained": "openai"}, "has its own weights"),
        ({"precision": "int8", "external_data": True}, "an int8 graph is written as one file"),
        ({"precision": "bf16", "recall": RecallData("data", "images")}, "recall cannot be measured in bf16"),
        ({"fuse_poolers": True}, "no attention pooler of this model can be fused .there are none"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, message, checkpoints, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_onnx.export_bundle(checkpoints / "views", tmp_path / "bundle", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_none_is_named(checkpoints, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a model that open_clip knows"):
        to_onnx.export_bundle(tmp_path / "none", tmp_path / "bundle")
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="is no checkpoint: it has neither mvam_config.json nor open_clip_config.json"):
        to_onnx.export_bundle(tmp_path / "precious", tmp_path / "bundle")
    with pytest.raises(ValueError, match="exists and is no bundle"):
        to_onnx.export_bundle(checkpoints / "views", tmp_path / "precious")
    assert to_onnx.main([str(tmp_path / "none"), "--out", str(tmp_path / "bundle")]) == 1
    assert capsys.readouterr().err.count("to_onnx: error: ") == 1
    shutil.copytree(checkpoints / "views", tmp_path / "newer")
    config = json.loads((tmp_path / "newer" / "mvam_config.json").read_text())
    (tmp_path / "newer" / "mvam_config.json").write_text(json.dumps({**config, "format": 99, "mvam_fast": "9.0"}))
    with pytest.raises(ValueError, match="has format 99, written by mvam_fast 9.0.*update mvam_fast"):
        to_onnx.export_bundle(tmp_path / "newer", tmp_path / "bundle")


def test_a_model_in_memory_is_exported_as_it_is_or_refused(checkpoints, tmp_path):
    model = MVAM.from_pretrained(checkpoints / "views")
    found = source.of_model(model, model.open_clip_config)
    with pytest.raises(ValueError, match="pretrained is 'openai', but the source is a model in memory"):
        to_onnx.export_bundle(found, tmp_path / "bundle", pretrained="openai")
    with pytest.raises(ValueError, match="fuse_poolers is for models that are opened here"):
        to_onnx.export_bundle(found, tmp_path / "bundle", fuse_poolers=True)
    model.half()
    with pytest.raises(ValueError, match="source: the model is in torch.float16 on cpu; exports start from float32"):
        to_onnx.export_bundle(found, tmp_path / "bundle", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_pooling_in_another_thread_is_itself_while_a_graph_is_exported(checkpoints):
    """Whether something is being exported is a fact about the process, not about the thread that pools."""
    tokens, codes = torch.randn(2, 7, 96), torch.randn(4, 96)
    expected = functional.multi_view_pool(tokens, codes, need_gram=False)[0]
    found = []

    class Pool(torch.nn.Module):
        def forward(self, given):
            other = threading.Thread(
                target=lambda: found.append(functional.multi_view_pool(tokens, codes, need_gram=False)[0])
            )
            other.start(), other.join()
            return functional.multi_view_pool(given, codes, need_gram=False)[0]

    form = NodeForm()
    with exporting_as(form), torch.no_grad():
        torch.export.export(Pool(), (torch.randn(2, 7, 96),), strict=False)
    assert form.found == ["node"]
    torch.testing.assert_close(found[0], expected)


def test_a_tower_that_torch_cannot_export_is_told_as_such(checkpoints, tmp_path, monkeypatch, capsys):
    def branches_on_data(self, images, normalize=False):
        return images.flatten(1) if images.mean() > 0 else -images.flatten(1)

    monkeypatch.setattr(MVAM, "encode_image", branches_on_data)
    assert to_onnx.main([str(checkpoints / "single"), "--out", str(tmp_path / "bundle")]) == 1
    assert "error: image.onnx: torch cannot export this tower" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_half_precision_that_overflows_is_refused(checkpoints):
    """ONNX Runtime's CPU would not notice: it computes in float32."""
    found = source.open_source(checkpoints / "views")
    kept = {"pixels": samples.pictures(3, 64, 64), "token_ids": found.tokenizer()(TEXTS[:3]).numpy()}
    manifest = {"precision": "fp16", "preprocess": found.preprocess, "towers": {"image": {"input": {}}}}
    with torch.no_grad():
        found.model.clip.visual.ln_pre.weight *= 1e5
        images = torch.from_numpy(samples.normalised(kept["pixels"], found.preprocess))
        kept["image_embeds"] = source.Tower(found, "image")(images).numpy()
    found.model.half()
    with pytest.raises(ExportError, match="the image encoder in fp16: PyTorch's own arithmetic gives .*another"):
        verify.check_half_arithmetic(source.Tower(found, "image", torch.float16), "image", kept, manifest)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_pooling_is_plain_while_exporting_even_if_kernels_are_asked_for(tower, checkpoints, tmp_path, monkeypatch):
    """On the kernels (here Triton's interpreter) the export would fail; on "torch" the graph happens to be plain."""
    chosen, choose = [], functional.choose

    def watched(*arguments, **options):
        chosen.append(choose(*arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(functional, "choose", watched)
    model = MVAM.from_pretrained(checkpoints / "views", backend="triton")
    found = source.of_model(model, model.open_clip_config)
    example = {"image": torch.randn(2, 3, 64, 64), "text": get_tokenizer(checkpoints / "views")(TEXTS[:2])}[tower]
    write_graph(source.Tower(found, tower).eval(), example, tmp_path / "tower.onnx", tower, opset=20)
    assert {path.forward for path in chosen} == {"reference"}
    check_graph(tmp_path / "tower.onnx")


def test_parity_sees_a_wrong_encoder_and_forgives_ties(bundles):
    kept, manifest = samples.load(bundles[0] / "views"), bundles[1]["views"]

    def slightly_wrong(token_ids):
        wrong = run(bundles[0] / "views", "text", token_ids) + 0.01
        return wrong / np.linalg.norm(wrong, axis=1, keepdims=True)

    with pytest.raises(ExportError, match="it disagrees with PyTorch"):
        verify.check_parity("it", slightly_wrong, "text", kept, manifest)
    with pytest.raises(ExportError, match="it: output is .3, 5., PyTorch gives .3, 128."):
        verify.check_parity("it", lambda token_ids: np.zeros((3, 5)), "text", kept, manifest, batches=(3,))
    scores = np.array([[9.0, 8.0, 7.0, 6.0, 5.0, 5.0 - 1e-7, 1.0]])
    swapped = scores[:, [0, 1, 2, 3, 5, 4, 6]]
    assert verify._same_neighbours(swapped, scores, 1e-6).all()
    assert not verify._same_neighbours(swapped, scores, 0).all()
    assert not verify._same_neighbours(-scores, scores, 1e-6).all()
