"""The parts that the Encoder is made of, which backend it takes, and what it refuses to load."""
import json
import shutil
import threading
import time
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from mvam_fast.export.bundle import write_manifest
from PIL import Image

from mvam_fast import Encoder
from mvam_fast.retrieval.data.datasets import UnreadableImage
from mvam_fast.serving import images, loading
from mvam_fast.serving.buckets import BUCKETS, Padded, check_buckets, pieces
from mvam_fast.serving.choice import Choice, choose
from mvam_fast.serving.decoding import Decoder, make_pool
from mvam_fast.serving.gate import Gate
from mvam_fast.serving.staging import Staging

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a CUDA GPU")

PREPROCESS = {"size": [4, 4], "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
ROWS = {"image": [3, 4, 4], "text": [5]}
SPECS = {
    tower: {
        "input": {"name": f"{tower}_in", "dtype": dtype, "shape": ["batch", *ROWS[tower]]},
        "output": {"name": f"{tower}_out", "dtype": "float32", "shape": ["batch", 8]},
    }
    for tower, dtype in (("image", "float32"), ("text", "int64"))
}


def manifest(kind, **extra):
    towers = {tower: {"file": f"{tower}.{kind}", **spec} for tower, spec in SPECS.items()}
    described = {"kind": kind, "precision": "fp32", "embedding_width": 8, "preprocess": PREPROCESS}
    return {**described, "tokenizer": {"context_length": 5}, "towers": towers, **extra}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Two towers of one matrix product each."""
    onnx = pytest.importorskip("onnx")
    helper, types_ = onnx.helper, onnx.TensorProto
    folder = tmp_path_factory.mktemp("bundle")
    for tower, spec in SPECS.items():
        kind = types_.FLOAT if tower == "image" else types_.INT64
        given, result = (spec[side]["name"] for side in ("input", "output"))
        rows = int(np.prod(ROWS[tower]))
        nodes = [
            helper.make_node("Cast", [given], ["floats"], to=types_.FLOAT),
            helper.make_node("Flatten", ["floats"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], [result]),
        ]
        weights = np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32)
        graph = helper.make_graph(
            nodes, tower, [helper.make_tensor_value_info(given, kind, spec["input"]["shape"])],
            [helper.make_tensor_value_info(result, types_.FLOAT, ["batch", 8])],
            [onnx.numpy_helper.from_array(weights, "weights")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / f"{tower}.onnx")
    write_manifest(folder, manifest("onnx"))
    return folder


def test_batches_are_split_above_the_largest_size_and_padded_up_to_the_next():
    assert pieces(1, BUCKETS) == [(0, 1, 1)] and pieces(5, BUCKETS) == [(0, 5, 8)]
    assert pieces(64, BUCKETS) == [(0, 64, 64)]
    assert pieces(131, BUCKETS) == [(0, 64, 64), (64, 64, 64), (128, 3, 4)]
    assert pieces(4, (4,)) == [(0, 4, 4)] and pieces(3, (4,)) == [(0, 3, 4)]
    for sizes in ((1, 2, 4), (3,), (2, 7), BUCKETS):
        for rows in range(1, 150):
            found = pieces(rows, sizes)
            assert [row for start, count, _ in found for row in range(start, start + count)] == list(range(rows))
            assert all(1 <= count <= size and size in sizes for _, count, size in found)
            assert all(size < count for _, count, taken in found for size in sizes if size < taken)


def test_buckets_are_checked():
    assert check_buckets(None) == BUCKETS and check_buckets([8, 1, 8]) == (1, 8)
    for wrong, error, message in (
        ([], TypeError, "buckets is \\[\\]"), (8, TypeError, "buckets is 8; it must be a list of batch sizes"),
        ([0], ValueError, "buckets holds 0"), ([1, 2.0], ValueError, "buckets holds 2.0"),
        ([True], ValueError, "buckets holds True"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            check_buckets(wrong)


class Doubling:
    """A runner that returns each row's sum, twice, and keeps what it was given."""

    device = torch.device("cpu")

    def __init__(self):
        self.given, self.closed = [], False

    def run(self, tower, inputs):
        self.given.append(inputs)
        return 2 * inputs.sum(1, keepdim=True)

    def close(self):
        self.closed = True


def test_padding_is_cut_off_and_whole_batches_are_not_copied():
    runner, inputs = Doubling(), torch.arange(22.0).reshape(11, 2)
    padded = Padded(runner, {"image": (2, 4)})
    for rows in range(1, 12):
        runner.given.clear()
        assert torch.equal(padded.run("image", inputs[:rows]), 2 * inputs[:rows].sum(1, keepdim=True))
        assert {len(given) for given in runner.given} <= {2, 4} and all(g.is_contiguous() for g in runner.given)
    assert [given.data_ptr() for given in runner.given[:2]] == [inputs.data_ptr(), inputs[4:].data_ptr()]
    padded.run("text", inputs)  # any batch
    assert runner.given[-1] is inputs
    padded.close()
    assert runner.closed


def test_a_buffer_serves_whatever_fits_and_is_one_user_s_at_a_time():
    found = Staging((2, 3), torch.uint8, pinned=False)
    large, other = found.take(8), found.take(4)
    assert large.shape == (8, 2, 3) and large.dtype == torch.uint8 and other.data_ptr() != large.data_ptr()
    found.give(large)
    found.give(other)
    assert found.take(3) is other and found.take(3) is large  # the smallest that fits
    found.give(large)
    found.give(other)
    assert len(found.take(9)) == 9  # in the place of the smallest
    assert found.take(5) is large and found.take(4) is not other


class Rows:
    """Writes the number that an "image" is. `before(position)` is called first and may wait or raise."""

    def __init__(self, before=lambda position: None):
        self.before, self.written = before, 0

    def fill(self, image, position, row):
        self.before(position)
        row[:] = int(image)
        self.written += 1


def staging():
    return Staging((1,), torch.uint8, pinned=False)


def numbers(count):
    return [str(number) for number in range(count)]


@pytest.fixture
def pool():
    with make_pool(3) as pool:
        yield pool


@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_batches_come_in_order(size, pool):
    decoder = Decoder(Rows(lambda position: time.sleep(0.002 * (position % 3))), staging(), pool)
    found = [batch[:, 0].tolist() for batch in decoder.batches(numbers(17), size)]
    assert [len(batch) for batch in found] == [min(size, 17 - start) for start in range(0, 17, size)]
    assert sum(found, []) == list(range(17))
    assert list(decoder.batches([], size)) == []


def test_the_next_batch_is_prepared_while_one_is_used_and_writes_elsewhere(pool):
    started = [threading.Event() for _ in range(9)]
    decoder = Decoder(Rows(lambda position: started[position].set()), staging(), pool)
    for number, batch in enumerate(decoder.batches(numbers(9), 3)):
        following = range(3 * number + 3, min(3 * number + 6, 9))
        assert all(started[position].wait(20) for position in following)
        assert batch[:, 0].tolist() == [3 * number, 3 * number + 1, 3 * number + 2]
        assert not any(event.is_set() for event in started[3 * number + 6 :])


@pytest.mark.parametrize("stopped_by", ["an unreadable image", "the user"])
def test_buffers_are_given_back_only_when_nothing_writes_into_them(stopped_by, pool):
    def before(position):
        if position == 0 and stopped_by == "an unreadable image":
            raise UnreadableImage("cannot read the image 0")
        time.sleep(0.05 * (position > 0))

    rows, buffers, given_back_after = Rows(before), staging(), []
    buffers.give = lambda buffer: given_back_after.append(rows.written)
    with closing(Decoder(rows, buffers, pool).batches(numbers(8), 4)) as batches:
        if stopped_by == "the user":
            next(batches)
        else:
            with pytest.raises(UnreadableImage, match="cannot read the image 0"):
                next(batches)
    time.sleep(0.2)
    assert given_back_after == [rows.written] * 2 and rows.written < 8  # what had not begun never does


def test_an_image_that_stands_in_the_list_twice_is_read_before_threads_share_it(pool):
    class Opened:
        read_by = None

        def load(self):
            self.read_by = self.read_by or threading.current_thread()

        def __int__(self):
            return 7

    once, twice = Opened(), Opened()
    (batch,) = Decoder(Rows(), staging(), pool).batches([once, twice, twice], 3)
    assert batch[:, 0].tolist() == [7, 7, 7]
    assert once.read_by is None and twice.read_by is threading.current_thread()


def test_closing_waits_for_those_inside_and_refuses_others():
    gate, entered, leave, order = Gate("Door"), threading.Event(), threading.Event(), []

    def user():
        with gate:
            entered.set()
            leave.wait(20)
            order.append("left")

    def closer():
        order.append(f"closed {gate.close()}")

    inside, closing_ = threading.Thread(target=user), threading.Thread(target=closer)
    inside.start()
    assert entered.wait(20)
    closing_.start()
    while not gate._closed:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="this Door is closed"), gate:
        pass
    leave.set()
    inside.join(20), closing_.join(20)
    assert order == ["left", "closed True"] and gate.close() is False


def test_a_transform_that_cannot_be_cut_is_refused(monkeypatch):
    compose = types.SimpleNamespace(transforms=[lambda image: image])
    monkeypatch.setattr(images, "eval_transform", lambda _: compose)
    with pytest.raises(ValueError, match="preprocess has the steps .'function'.; it must end in ToTensor, Normalize"):
        images.ImageRows(PREPROCESS, (3, 4, 4), np.dtype(np.float32))


def test_half_precision_rows_and_towers_of_another_size():
    row, picture = np.zeros((3, 4, 4), np.float16), Image.effect_noise((9, 7), 90).convert("RGB")
    images.ImageRows(PREPROCESS, (3, 4, 4), row.dtype).fill(picture, 0, row)
    exact = images.eval_transform(PREPROCESS)(picture)
    assert np.array_equal(row, exact.half().numpy())
    with pytest.raises(ValueError, match=r"makes uint8 \[4, 4, 3\] of the image at position 2; the tower .*\[6,"):
        images.ImageRows(PREPROCESS, (6, 6, 3), np.dtype(np.uint8)).fill(picture, 2, np.zeros((6, 6, 3), np.uint8))


def test_what_runs_and_why(bundle):
    with Encoder.load(bundle, "onnxruntime-cpu", threads=1) as encoder:
        assert (encoder.backend, encoder.device, encoder.width) == ("onnxruntime-cpu", torch.device("cpu"), 8)
        assert encoder.reason == "the backend argument asks for onnxruntime-cpu"
        assert encoder.session("image").get_providers() == ["CPUExecutionProvider"]
        assert encoder.session("text").get_session_options().intra_op_num_threads == 1
        with pytest.raises(ValueError, match="tower is 'audio'; it must be one of image, text"):
            encoder.session("audio")
    with Encoder.load(str(bundle), device="cpu") as encoder:
        assert (encoder.backend, encoder.reason) == ("onnxruntime-cpu", "the device argument asks for cpu")


def test_choices_that_need_no_gpu(tmp_path):
    assert choose(tmp_path, manifest("onnx", precision="int8"), "auto", None)[::2] == (
        "onnxruntime-cpu", "int8 bundles are made for CPUs",
    )  # fmt: skip
    assert choose(tmp_path, manifest("aoti", device="cpu"), "auto", None) == (
        "aoti", torch.device("cpu"), "nothing else runs a bundle of kind 'aoti'", False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="device is 'cuda', but the bundle was compiled for cpu"):
        choose(tmp_path, manifest("aoti", device="cpu"), "aoti", "cuda")
    with pytest.raises(ValueError, match="device is 'cpu', but trt runs on cuda"):
        choose(tmp_path, manifest("trt"), "auto", "cpu")


@no_gpu
def test_what_runs_without_a_gpu(bundle, tmp_path):
    with Encoder.load(bundle) as encoder:
        assert encoder.backend == "onnxruntime-cpu"
        assert encoder.reason in ("there is no CUDA GPU", "this ONNX Runtime is built without CUDA")
    for options in ({"backend": "onnxruntime-cuda"}, {"device": "cuda"}, {"device": "cuda:1"}):
        with pytest.raises(RuntimeError, match="'onnxruntime-cuda' needs a CUDA GPU here, and PyTorch sees none"):
            Encoder.load(bundle, **options)
    for kind in ("trt", "aoti"):
        with pytest.raises(RuntimeError, match=f"'{kind}' needs a CUDA GPU here"):
            choose(tmp_path, manifest(kind, device="cuda"), "auto", None)


@no_gpu
@pytest.mark.parametrize("insisted", [False, True])
def test_a_provider_that_does_not_start_is_told(insisted, bundle, monkeypatch):
    """Here ONNX Runtime has none that starts; that there is a GPU is all that is made up."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: types.SimpleNamespace(device=gpu, cuda_stream=0))
    choice = Choice("onnxruntime-cuda", gpu, "there is a CUDA GPU", insisted)
    monkeypatch.setattr(loading, "choose", lambda *_: choice)
    message = "ONNX Runtime could not start CUDAExecutionProvider and took CPUExecutionProvider"
    if insisted:
        with pytest.raises(RuntimeError, match=f"backend 'onnxruntime-cuda': {message}"):
            Encoder.load(bundle, "onnxruntime-cuda")
        return
    with pytest.warns(RuntimeWarning, match=f"onnxruntime-cpu runs .*: there is a CUDA GPU, but {message}") as caught:
        encoder = Encoder.load(bundle)
    assert caught[0].filename == __file__
    assert (encoder.backend, encoder.device.type) == ("onnxruntime-cpu", "cpu")
    assert encoder.reason == f"there is a CUDA GPU, but {message}"
    assert encoder.encode_text(np.ones((2, 5), np.int64)).shape == (2, 8)


def test_wishes_that_contradict_the_path_are_refused(bundle, tmp_path):
    (tmp_path / "mvam_config.json").write_text("{}")
    for path, options, message in (
        (bundle, {"backend": "torch"}, "of kind 'onnx', which can be run by: onnxruntime-cuda, onnxruntime-cpu"),
        (bundle, {"backend": "trt"}, "backend is 'trt', but .* can be run by"),
        (tmp_path, {"backend": "onnxruntime-cpu"}, "is a checkpoint, which can be run by: torch"),
        (bundle, {"backend": "tpu"}, "backend is 'tpu'; it must be one of auto, onnxruntime-cpu"),
        (bundle, {"backend": "onnxruntime-cpu", "device": "cuda"}, "device is 'cuda', but onnxruntime-cpu runs on cpu"),
        (bundle, {"backend": "onnxruntime-cuda", "device": "cpu"}, "'cpu', but onnxruntime-cuda runs on cuda"),
        (bundle, {"device": "mps"}, "device is 'mps'; it must be cpu, cuda or cuda:N"),
        (bundle, {"device": "gpu"}, "device is 'gpu'; it must be"),
        (bundle, {"threads": 0}, "threads is 0; it must be at least 1"),
        (bundle, {"workers": 0}, "workers is 0; it must be at least 1"),
        (bundle, {"buckets": [4, 0]}, "buckets holds 0; it must hold whole numbers of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Encoder.load(path, **options)


def test_bad_bundles_are_named(bundle, tmp_path):
    with pytest.raises(FileNotFoundError, match="path: no such folder"):
        Encoder.load(tmp_path / "none")
    bundle = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    text = bundle / "text.onnx"
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(ValueError, match="text.onnx is not the file that the bundle was made with"):
        Encoder.load(bundle)
    text.unlink()
    with pytest.raises(FileNotFoundError, match="lacks its file text.onnx"):
        Encoder.load(bundle)
    whole = json.loads((bundle / "bundle.json").read_text())

    def refused(error, message, **changed):
        content = {key: value for key, value in (whole | changed).items() if value is not None}
        (bundle / "bundle.json").write_text(json.dumps(content))
        with pytest.raises(error, match=message):
            Encoder.load(bundle)

    refused(ValueError, "has format 99; this version reads 2 .a newer mvam_fast wrote it: update", format=99)
    refused(ValueError, "has format 1; this version reads 2 .export the checkpoint again", format=1)
    for lost in ("embedding_width", "tokenizer", "files", "towers"):
        refused(ValueError, f"bundle.json lacks .*{lost}", **{lost: None})
    refused(ValueError, "lacks files.image.onnx, files.text.onnx", files={})  # would skip the check of the hashes
    (bundle / "bundle.json").write_text("[]")
    with pytest.raises(ValueError, match="has format None"):
        Encoder.load(bundle)
    (bundle / "bundle.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither a bundle .no bundle.json. nor a checkpoint"):
        Encoder.load(bundle)
