"""Engines that are built and run: needs TensorRT's libraries and a CUDA GPU (`make trt-check`), and is skipped else.

Each build goes through export/to_trt.py's own gates, which compare every profile at its min, opt and max with PyTorch.
"""
from __future__ import annotations

import importlib.util
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from mvam_fast.export import samples, to_onnx, to_trt
from mvam_fast.export.bundle import read_manifest
from mvam_fast.export.trt_library import Missing, find
from mvam_fast.export.trt_settings import Profile, Settings
from mvam_fast.export.trt_verify import COSINE

from mvam_fast import Encoder, create_model_and_transforms
from mvam_fast.serving.trt_runner import TrtRunner

pytestmark = pytest.mark.trt
QUICK = {"optimization_level": 1}  # what is tested here does not depend on how long the builder searches
TOWERS = ("image", "text")
GRAPHS = {
    "fp32": {"precision": "fp32"}, "fp16": {"precision": "fp16"}, "bf16": {"precision": "bf16"},
    "uint8": {"precision": "fp16", "image_input": "uint8"}, "node": {"precision": "fp16", "pooling": "node"},
    "fixed": {"precision": "fp16", "batch": 4}, "other": {"precision": "fp16"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def trt():
    lacking = ["no TensorRT"] * (importlib.util.find_spec("tensorrt") is None)
    lacking += ["no GPU"] * (not torch.cuda.is_available())
    if lacking:
        pytest.skip(f"not run: {' / '.join(lacking)}")
    try:
        return find(0)
    except Missing as error:
        pytest.skip(f"not run: {error}")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(name of GRAPHS) → folder of its ONNX bundle, made when first asked for; "other" has other weights."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(name):
        if name not in made:
            torch.manual_seed(name == "other")
            checkpoint = folder / f"checkpoint-{name == 'other'}"
            if not checkpoint.exists():
                create_model_and_transforms("scenes-ViT-T-16", num_views=4)[0].save_pretrained(checkpoint)
            to_onnx.export_bundle(checkpoint, folder / name, progress=False, **GRAPHS[name])
            made[name] = folder / name
        return made[name]

    return get


@pytest.fixture(scope="module")
def built(exported, tmp_path_factory):
    """(name of GRAPHS, settings) → (folder of its engines, manifest), built when first asked for."""
    folder, made = tmp_path_factory.mktemp("trt"), {}

    def get(name, **settings):
        settings = Settings(**QUICK | settings)
        if (name, settings) not in made:
            source, out = exported(name), folder / f"{name}-{len(made)}"
            made[name, settings] = out, to_trt.build_bundle(source, read_manifest(source), out, settings, 0)
        return made[name, settings]

    return get


@pytest.fixture
def run_with():
    """TrtRunner, closed when the test is over."""
    opened = []

    def make(bundle, **options):
        opened.append(TrtRunner(bundle, read_manifest(bundle, kind="trt"), **options))
        return opened[-1]

    yield make
    for runner in opened:
        runner.close()


def rows(bundle, tower, batch):
    """Inputs on the GPU, and what PyTorch makes of them in float32."""
    kept, manifest = samples.load(bundle), read_manifest(bundle)
    inputs = torch.from_numpy(samples.inputs_of(tower, kept, manifest, batch)).cuda()
    return inputs, samples.expected(tower, kept, batch)


def least_cosine(found, expected):
    found = found.double().cpu().numpy()
    return (found * expected).sum(1).min() / np.linalg.norm(found, axis=1).max()


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "uint8"])
@pytest.mark.parametrize("tower", TOWERS)
def test_embeddings_are_pytorchs_at_any_batch(name, tower, built, run_with):
    """Min, opt and max; between; and beyond, where the batch is split."""
    bundle, manifest = built(name, profiles=(Profile(1, 4, 8),))
    assert set(manifest["parity"][tower]) == {"1", "2", "4", "8"}
    runner = run_with(bundle)
    for batch in (1, 3, 4, 7, 8, 9, 21):
        inputs, expected = rows(bundle, tower, batch)
        found = runner.run(tower, inputs)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert least_cosine(found, expected) >= COSINE[manifest["precision"]]


@pytest.mark.parametrize("tower", TOWERS)
def test_two_profiles(tower, built, run_with):
    bundle, _ = built("fp16", profiles=(Profile(1, 1, 1), Profile(2, 4, 8)))
    runner = run_with(bundle)
    assert runner.sizes == (1, 2, 4, 8)
    for profile, batches in ((0, (1,)), (1, (2, 5, 8))):
        for batch in batches:
            inputs, expected = rows(bundle, tower, batch)
            assert least_cosine(runner.engines.run(tower, inputs, profile=profile), expected) >= COSINE["fp16"]
    inputs, expected = rows(bundle, tower, 12)
    assert least_cosine(runner.run(tower, inputs), expected) >= COSINE["fp16"]


@pytest.mark.parametrize("tower", TOWERS)
def test_a_graphs_replay_equals_the_plain_run(tower, built, run_with):
    bundle, _ = built("fp16", profiles=(Profile(1, 4, 8),))
    graphed, plain = run_with(bundle), run_with(bundle, graphs=False)
    for batch in (8, 3, 1, 8, 20):
        inputs, _ = rows(bundle, tower, batch)
        first = graphed.run(tower, inputs)
        kept = first.clone()
        assert torch.equal(first, plain.run(tower, inputs))
        graphed.run(tower, inputs.flip(0))
        assert torch.equal(first, kept)  # it is the caller's: later calls leave it alone


def test_threads_with_streams_of_their_own(built, run_with):
    bundle, _ = built("fp16", profiles=(Profile(1, 4, 8),))
    runner, wrong = run_with(bundle), []
    jobs = [(tower, rows(bundle, tower, batch)[0]) for tower in TOWERS for batch in (1, 3, 8, 11)]
    expected = [runner.run(tower, inputs).cpu() for tower, inputs in jobs]
    torch.cuda.synchronize()

    def work(offset):
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(40):
                number = (offset + turn) % len(jobs)
                if not torch.equal(runner.run(*jobs[number]).cpu(), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inputs_that_do_not_fit_and_empty_ones(built, run_with):
    bundle, manifest = built("fp16", profiles=(Profile(1, 4, 8),))
    runner = run_with(bundle)
    inputs, _ = rows(bundle, "text", 4)
    assert runner.run("text", inputs[:0]).shape == (0, manifest["embedding_width"])
    for wrong, error in (
        (inputs.int(), TypeError), (inputs.cpu(), ValueError), (inputs[:, :3], ValueError),
        (inputs.t().contiguous().t(), ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="inputs (is|has)"):
            runner.run("text", wrong)
    with pytest.raises(ValueError, match="tower is 'sound'"):
        runner.run("sound", inputs)
    unaligned = torch.cat([inputs, inputs])[1:5]
    assert torch.equal(runner.engines.run("text", unaligned), runner.engines.run("text", unaligned.clone()))


def test_a_fixed_batch(built, run_with):
    bundle, _ = built("fixed", profiles=(Profile(4, 4, 4),))
    for batch in (1, 4, 6):
        inputs, expected = rows(bundle, "image", batch)
        assert least_cosine(run_with(bundle).run("image", inputs), expected) >= COSINE["fp16"]


def test_refit_gives_the_other_checkpoints_embeddings(built, exported, run_with):
    bundle, _ = built("fp16", profiles=(Profile(1, 2, 4),), refit=True)
    runner, other = run_with(bundle), exported("other")
    for tower in TOWERS:
        inputs, expected = rows(other, tower, 4)
        assert least_cosine(runner.run(tower, inputs), expected) < 0.99  # with the weights that it was built with
        runner.refit(tower, other / f"{tower}.onnx")
        assert least_cosine(runner.run(tower, inputs), expected) >= COSINE["fp16"]


def test_engines_without_refit_keep_their_weights(built, exported, run_with):
    runner = run_with(built("fp16", profiles=(Profile(1, 4, 8),))[0])
    with pytest.raises(ValueError, match="build with --refit"):
        runner.refit("image", exported("other") / "image.onnx")


def test_stripped_engines_take_their_weights_from_the_bundle(built, run_with):
    whole, _ = built("fp16", profiles=(Profile(1, 4, 8),))
    bundle, manifest = built("fp16", profiles=(Profile(1, 4, 8),), strip=True)
    assert {"image.onnx", "text.onnx"} <= set(manifest["files"])
    for tower in TOWERS:
        assert (bundle / f"{tower}.plan").stat().st_size < (whole / f"{tower}.plan").stat().st_size
        inputs, expected = rows(bundle, tower, 5)
        assert least_cosine(run_with(bundle).run(tower, inputs), expected) >= COSINE["fp16"]


def test_the_timing_cache_is_reused_and_a_foreign_one_replaced(built, tmp_path, capsys):
    cache = tmp_path / "timing.cache"
    settings = {"profiles": (Profile(1, 2, 2),), "optimization_level": 2, "timing_cache": cache}
    built("fp16", **settings)
    assert cache.stat().st_size > 0 and "warning" not in capsys.readouterr().err
    built("fp16", **settings | {"workspace_gib": 2.0})
    assert cache.stat().st_size > 0 and "warning" not in capsys.readouterr().err
    cache.write_bytes(b"of another device" * 100)
    built("fp16", **settings | {"workspace_gib": 3.0})
    assert "timing-cache: " in capsys.readouterr().err and not cache.read_bytes().startswith(b"of another")


def test_engines_of_another_place_and_damaged_ones_are_refused(built, tmp_path):
    made, manifest = built("fp16", profiles=(Profile(1, 4, 8),))
    for key, value, message in (
        ("tensorrt", "10.12.0.1", "install that version, or build it here"), ("gpu", "NVIDIA T4", "here is"),
    ):  # fmt: skip
        changed = json.loads(json.dumps(manifest))
        changed["engines"]["built_on"][key] = value
        with pytest.raises(RuntimeError, match=message):
            TrtRunner(made, changed)
    bundle = tmp_path / "bundle"
    shutil.copytree(made, bundle)
    plan = bundle / "text.plan"
    plan.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])
    with pytest.raises(RuntimeError, match="text.plan is no engine that TensorRT .* loads, or is damaged"):
        TrtRunner(bundle, manifest)
    with pytest.raises(ValueError, match="text.plan is not the file that the bundle was made with"):
        Encoder.load(bundle)


def test_engines_for_other_gpus_and_later_versions(built, run_with):
    bundle, _ = built(
        "fp16", profiles=(Profile(1, 2, 4),), hardware_compatibility="ampere+", version_compatible=True
    )
    inputs, expected = rows(bundle, "image", 3)
    assert least_cosine(run_with(bundle).run("image", inputs), expected) >= COSINE["fp16"]


@pytest.mark.parametrize("fused", [False, True], ids=["function body", "plugin"])
def test_the_pooling_node(fused, trt, built, run_with):
    plugin = pytest.importorskip("mvam_fast.export.plugin")
    if fused and plugin.blocked(trt.__version__):
        pytest.skip(f"not run: {plugin.blocked(trt.__version__)}")
    bundle, _ = built("node", profiles=(Profile(1, 4, 8),), plugin=fused)
    for tower in TOWERS:
        inputs, expected = rows(bundle, tower, 8)
        assert least_cosine(run_with(bundle).run(tower, inputs), expected) >= COSINE["fp16"]


def test_the_command_and_the_encoder(exported, tmp_path, capsys):
    out, models = tmp_path / "engines", tmp_path / "models"
    arguments = [exported("fp16"), "--out", out, "--batch", "1,4,8", "--optimization-level", "1", "--serving", models]
    assert to_trt.main([str(argument) for argument in arguments]) == 0
    told = capsys.readouterr().out
    assert "embeddings/s" in told and "image  batch 8: max abs" in told
    manifest = read_manifest(out, kind="trt")
    assert set(manifest["files"]) == {"image.plan", "text.plan", "samples.safetensors"}
    assert set(manifest["engines"]["latency"]["text"]) == {"1", "2", "4", "8"}
    assert (models / "mvam_image" / "1" / "model.plan").read_bytes() == (out / "image.plan").read_bytes()
    texts = ["a small red circle", "hi!", "a bar"] * 5
    onnx = Encoder.load(exported("fp16"), backend="onnxruntime-cpu").embed_texts(texts)
    assert (Encoder.load(out).embed_texts(texts) * onnx).sum(1).min() >= COSINE["fp16"]
