"""Encoder over checkpoints and ONNX bundles: what reaches the model, what comes back, and what is refused."""
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvam_fast import MVAM, Encoder, get_tokenizer
from mvam_fast.preprocess import eval_transform

# Of many lengths; one with id 0 ("!") as a word, one that is cut at the context's end.
TEXTS = ["a", "!~", "a small red circle above a large bar", "two " * 60, "hi!", "an orange cross", "x y z", "bar"]
KINDS = {"checkpoint": "torch", "float": "onnxruntime-cpu", "uint8, batch 3": "onnxruntime-cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint_of, exported):
    """What an Encoder can be loaded from, by kind."""
    folder = tmp_path_factory.mktemp("encoders")
    (folder / "checkpoint").symlink_to(checkpoint_of("views"))
    (folder / "float").symlink_to(exported("views"))
    (folder / "uint8, batch 3").symlink_to(exported("views", image_input="uint8", batch=3, external_data=True))
    return folder


@pytest.fixture(scope="module")
def model(folders):
    return MVAM.from_pretrained(folders / "checkpoint")


@pytest.fixture(scope="module")
def transform(model):
    return eval_transform(model.open_clip_config["preprocess_cfg"])


@pytest.fixture(params=KINDS)
def encoder(request, folders):
    with Encoder.load(folders / request.param, KINDS[request.param], device="cpu", workers=3) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """17 paths and PIL images of several modes and sizes; one PIL image stands there twice, not yet read."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = [Image.fromarray(rng.integers(0, 256, (64 + 9 * i, 140 - 5 * i, 3), dtype=np.uint8)) for i in range(15)]
    found[3], found[4] = found[3].convert("L"), found[4].convert("RGBA")
    for position, mode in ((0, "RGB"), (5, "RGBA"), (6, "P"), (7, "L"), (8, "RGB")):
        found[position].convert(mode).save(folder / f"{position}.png")
        found[position] = folder / f"{position}.png"
    found[8] = str(found[8])
    opened = Image.open(folder / "0.png")
    return [*found, opened, opened]


def prepared(pictures, transform):
    """As in training: files are made RGB when they are read."""
    opened = [p if isinstance(p, Image.Image) else Image.open(p).convert("RGB") for p in pictures]
    return torch.stack([transform(picture) for picture in opened])


class Spy:
    """Stands in front of a runner and keeps copies, and addresses, of what reaches it."""

    def __init__(self, encoder, monkeypatch):
        self.device, self.runner, self.batches, self.addresses = encoder.device, encoder._runner, [], []
        monkeypatch.setattr(encoder, "_runner", self)

    def run(self, tower, inputs):
        assert inputs.is_contiguous() and not inputs.requires_grad
        self.batches.append(inputs.clone())
        self.addresses.append(inputs.data_ptr())
        return self.runner.run(tower, inputs)

    def close(self):
        self.runner.close()


@pytest.mark.parametrize("batch", [1, 3, 8, 17])
def test_equals_pytorch(batch, encoder, model, transform, folders, pictures):
    images, texts = prepared(pictures[:batch], transform), (TEXTS * 3)[:batch]
    ids = get_tokenizer(folders / "checkpoint")(texts)
    with torch.no_grad():
        expected = {"image": model.encode_image(images, normalize=True).numpy()}
        expected["text"] = model.encode_text(ids, normalize=True).numpy()
    found = [
        ("image", encoder.embed_images(pictures[:batch])),
        ("image", encoder.embed_images(pictures[:batch], batch_size=5)),
        ("text", encoder.embed_texts(texts)),
        ("text", encoder.embed_texts(texts, batch_size=2)),
        ("text", encoder.encode_text(ids.numpy())),
        ("text", encoder.encode_text(ids.int()).numpy()),
    ]
    if encoder.manifest["towers"]["image"]["input"]["dtype"] == "float32":
        found.append(("image", encoder.encode_image(images.numpy())))
    for tower, embeds in found:
        assert embeds.dtype == np.float32 and embeds.shape == (batch, encoder.width)
        assert np.abs(embeds - expected[tower]).max() <= 1e-5


def test_the_model_sees_training_s_pixels_bit_for_bit(encoder, transform, pictures, monkeypatch):
    spy = Spy(encoder, monkeypatch)
    encoder.embed_images(pictures, batch_size=7)
    seen, expected = torch.cat(spy.batches), prepared(pictures, transform)
    if seen.dtype == torch.uint8:
        assert seen.shape == (17, 64, 64, 3)
        seen = torch.stack([transform.transforms[-1](transform.transforms[-2](pixels.numpy())) for pixels in seen])
    assert torch.equal(seen, expected)


def test_buffers_are_reused_by_batches_of_other_sizes(encoder, transform, pictures, monkeypatch):
    spy = Spy(encoder, monkeypatch)
    serial = encoder.embed_images(pictures, batch_size=6)
    assert len(set(spy.addresses)) == 2 and spy.addresses[0] == spy.addresses[2]
    for size in (1, 4, 17, 5):
        assert np.abs(encoder.embed_images(pictures, batch_size=size) - serial).max() <= 1e-6
    spy.addresses.clear()
    encoder.embed_images(pictures[:10], batch_size=3)
    assert len(set(spy.addresses)) == 2  # of those that larger batches had
    assert len(encoder._decoder._staging._free) == 2


def test_batches_are_padded_and_split_to_the_size_that_a_bundle_has(folders, pictures, monkeypatch):
    with Encoder.load(folders / "uint8, batch 3", device="cpu") as encoder:
        session, sizes, addresses = encoder.session("image"), [], []

        class Recorder:
            def run(self, outputs, inputs):
                sizes.append(len(inputs["image"]))
                addresses.append(inputs["image"].ctypes.data)
                return session.run(outputs, inputs)

        monkeypatch.setitem(encoder._sessions, "image", Recorder())
        pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        found = encoder.encode_image(pixels)
        assert sizes == [3, 3, 3]
        assert addresses[:2] == [pixels.ctypes.data, pixels[3:].ctypes.data]  # whole batches are not copied
        alone = np.concatenate([encoder.encode_image(pixels[i : i + 1]) for i in range(8)])
        assert np.abs(found - alone).max() <= 1e-6


@pytest.mark.parametrize("kind", ["checkpoint", "float"])
def test_input_in_the_right_form_is_not_copied(kind, folders, monkeypatch):
    with Encoder.load(folders / kind, device="cpu") as encoder:
        spy = Spy(encoder, monkeypatch)
        images, ids = torch.randn(5, 3, 64, 64), torch.randint(1, 400, (5, 24))
        for call, tensor in ((encoder.encode_image, images), (encoder.encode_text, ids)):
            for given in (tensor, tensor[2:], tensor.clone().requires_grad_(tensor.is_floating_point())):
                call(given)
                call(given.detach().numpy())
                assert spy.addresses[-2:] == [given.data_ptr()] * 2


@pytest.mark.filterwarnings("error")  # PyTorch warns of memory that is not to be written
def test_input_in_another_form_is_converted(encoder, monkeypatch):
    Spy(encoder, monkeypatch)  # checks that what arrives is contiguous
    rng = np.random.default_rng(0)
    spec = encoder.manifest["towers"]["image"]["input"]
    images = rng.uniform(0, 255, (4, *spec["shape"][1:])).astype(spec["dtype"])
    ids = rng.integers(1, 200, (4, 24))
    frozen, backwards = images.copy(), images[::-1].copy()
    frozen.flags.writeable = False
    channels_last = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
    others = [frozen, backwards[::-1], channels_last]
    if spec["dtype"] == "float32":
        others += [images.astype(np.float64), images.astype(">f4"), torch.from_numpy(images).double()]
    expected = encoder.encode_image(images)
    for other in others:
        assert np.abs(np.asarray(encoder.encode_image(other)) - expected).max() <= 1e-6
    expected = encoder.encode_text(ids)
    for kind in (np.uint8, np.int16, np.uint32, ">i8"):
        assert np.array_equal(encoder.encode_text(ids.astype(kind)), expected)
    assert np.array_equal(encoder.encode_text(torch.from_numpy(ids).short()), expected)


def test_onnx_runtime_reads_pytorch_s_memory(folders, monkeypatch):
    with Encoder.load(folders / "float", "onnxruntime-cpu") as encoder:
        session, seen = encoder.session("image"), []

        class Recorder:
            def run(self, outputs, inputs):
                (found,) = session.run(outputs, inputs)
                seen.append((inputs["image"].ctypes.data, found.ctypes.data))
                return [found]

        monkeypatch.setitem(encoder._sessions, "image", Recorder())
        images = torch.randn(2, 3, 64, 64)
        found = encoder.encode_image(images)
        array = encoder.encode_image(images.numpy())
    assert seen == [(images.data_ptr(), found.data_ptr()), (images.data_ptr(), array.ctypes.data)]


def test_arrays_give_arrays_and_tensors_tensors(encoder):
    ids = torch.randint(1, 400, (4, 24))
    array, tensor = encoder.encode_text(ids.numpy()), encoder.encode_text(ids)
    assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor) and tensor.device == ids.device
    kept = tensor.clone()
    encoder.encode_text(ids + 1)
    assert torch.equal(tensor, kept) and np.array_equal(array, kept.numpy())  # later calls leave results alone
    torch.nn.Linear(encoder.width, 2)(tensor).sum().backward()  # and they may be trained on
    row = tuple(encoder.manifest["towers"]["image"]["input"]["shape"][1:])
    dtype = getattr(np, encoder.manifest["towers"]["image"]["input"]["dtype"])
    assert encoder.encode_image(np.zeros((0, *row), dtype)).shape == (0, encoder.width)
    assert encoder.encode_text(ids[:0]).shape == (0, encoder.width)
    assert encoder.embed_texts([]).shape == encoder.embed_images([]).shape == (0, encoder.width)


def test_wrong_input_is_named(folders):
    images, ids = torch.zeros(2, 3, 64, 64), torch.ones(2, 24, dtype=torch.long)
    floats, pixels = (Encoder.load(folders / kind, device="cpu") for kind in ("float", "uint8, batch 3"))
    image, text = floats.encode_image, floats.encode_text
    for call, value, error, message in (
        (image, images[0], ValueError, r"images has shape \[3, 64, 64\]; it must be \[B, 3, 64, 64\]"),
        (image, images.numpy()[..., :5], ValueError, r"images has shape \[2, 3, 64, 5\]"),
        (image, np.array(1.0), ValueError, r"images has shape \[\]"),
        (image, images.byte(), TypeError, r"images has dtype uint8; it must be floating point \[B, 3, 64, 64\]"),
        (image, images.bool(), TypeError, "images has dtype bool"),
        (image, images.numpy().astype(complex), TypeError, "images has dtype complex128"),
        (image, images.tolist(), TypeError, "images is a list; it must be an array or a tensor"),
        (pixels.encode_image, images, TypeError, r"images has dtype float32; it must be uint8 \[B, 64, 64, 3\]"),
        (pixels.encode_image, images.byte(), ValueError, r"images has shape \[2, 3, 64, 64\]; .*\[B, 64, 64, 3\]"),
        (text, ids.float(), TypeError, r"token_ids has dtype float32; it must be integers \[B, 24\]"),
        (text, ids[:, :7], ValueError, r"token_ids has shape \[2, 7\]; it must be \[B, 24\]"),
        (text, ids[0].numpy(), ValueError, r"token_ids has shape \[24\]"),
        (text, ["a"], TypeError, "token_ids is a list"),
    ):
        with pytest.raises(error, match=message):
            call(value)


def test_wrong_lists_are_named(encoder):
    with pytest.raises(TypeError, match="texts is a str; it must be a list"):
        encoder.embed_texts("a cat")
    with pytest.raises(TypeError, match="texts holds a int"):
        encoder.embed_texts([1])
    with pytest.raises(TypeError, match="images is a .*Path; it must be a list"):
        encoder.embed_images(Path("a.png"))
    with pytest.raises(TypeError, match="images holds a int; it must hold paths or PIL images"):
        encoder.embed_images([1])
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size is {size}; it must be at least 1"):
            encoder.embed_texts(["a"], batch_size=size)
        with pytest.raises(ValueError, match=f"batch_size is {size}; it must be at least 1"):
            encoder.embed_images([], batch_size=size)


def test_unreadable_images_are_named_and_leave_the_encoder_usable(encoder, pictures, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:2000])
    expected = encoder.embed_images(pictures)
    for where in (0, 4, 16):
        images = list(pictures)
        images[where] = tmp_path / "broken.jpg"
        with pytest.raises(ValueError, match="cannot read the image .*broken.jpg"):
            encoder.embed_images(images, batch_size=4)
        images[where] = Image.open(tmp_path / "cut.png")
        with pytest.raises(ValueError, match=f"cannot read the image at position {where}: "):
            encoder.embed_images(images, batch_size=4)
    with pytest.raises(ValueError, match="cannot read the image .*none.png"):
        encoder.embed_images([tmp_path / "none.png"])
    assert np.abs(encoder.embed_images(pictures) - expected).max() <= 1e-6


def test_several_threads_may_call_at_once(encoder, pictures):
    ids = torch.randint(1, 400, (5, 24))

    def everything(_):
        found = [encoder.embed_images(pictures, batch_size=4), encoder.embed_texts(TEXTS, batch_size=3)]
        return [*found, encoder.encode_text(ids.numpy())]

    serial = everything(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(everything, range(8)):
            assert all(np.array_equal(one, other) for one, other in zip(found, serial, strict=True))


def test_one_thread_at_a_time_uses_the_tokenizer(folders, monkeypatch):
    """Those of Hugging Face fail otherwise."""
    with Encoder.load(folders / "float", device="cpu") as encoder:
        tokenize, inside = encoder._tokenizer, threading.Semaphore(1)

        def alone(texts):
            assert inside.acquire(blocking=False)
            time.sleep(0.01)
            inside.release()
            return tokenize(texts)

        monkeypatch.setattr(encoder, "_tokenizer", alone)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(encoder.embed_texts, [TEXTS[:2]] * 6))


def test_close(folders, pictures):
    encoder = Encoder.load(folders / "float", device="cpu")
    encoder.embed_images(pictures[:3])
    before = threading.active_count()
    encoder.close()
    encoder.close()
    assert threading.active_count() < before  # the pool's threads have ended
    ids = torch.ones(1, 24, dtype=torch.long)
    for call in (
        lambda: encoder.embed_images([]), lambda: encoder.embed_texts(["a"]), lambda: encoder.encode_text(ids),
        lambda: encoder.session("text"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="this Encoder is closed"):
            call()


def test_a_checkpoint_is_described_as_its_bundle_is(folders):
    described = json.loads((folders / "float" / "bundle.json").read_text())
    with Encoder.load(folders / "checkpoint", device=torch.device("cpu")) as encoder:
        assert (encoder.backend, encoder.reason) == ("torch", "nothing else runs a checkpoint")
        shared = encoder.manifest.keys() & described.keys() - {"kind", "source", "towers"}
        assert {"embedding_width", "preprocess", "tokenizer", "logit_scale", "precision", "num_views"} <= shared
        assert all(encoder.manifest[key] == described[key] for key in shared)
        for tower, entry in encoder.manifest["towers"].items():
            assert {**entry, "file": f"{tower}.onnx"} == described["towers"][tower]
