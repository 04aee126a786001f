"""Folders that transformers' AutoImageProcessor, AutoTokenizer and AutoProcessor read; a tool that evaluates CLIPs."""
import html
import json
import random
import sys

import ftfy
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
)

from mvam_fast import MVAM, create_model_and_transforms, get_tokenizer, hf_files
from mvam_fast.preprocess import eval_transform
from mvam_fast.retrieval.data.datasets import KarpathyDataset
from mvam_fast.retrieval.evaluation.metrics import recall_metrics
from mvam_fast.retrieval.scenes import make_scenes

NAME = "scenes-ViT-T-16"
CAPTIONS = [
    "a large red circle", "Three OBJECTS, on navy background with a small bar & a dotted white cross!", "hi!", "", " ",
    "it's they'll I'M we've you're he'd DON'T", "A photo of 2 cats (1999), №5 … 100%", "!!! ?! #hash @user",
    "“curly” ‘quotes’ — and the café’s crème brûlée", "ÜBER STRAẞE naïve Ångström", "ΟΔΟΣ ΤΟΥ ΣΟΦΟΥ, Σ. Α'Σ",
    "Привет, МИР", "東京の夜景 ｆｕｌｌ　ｗｉｄｔｈ！", "한국어 사진", "صورة ١٢٣", "👩‍👩‍👧 🏳️‍🌈 👍🏽😀", "oﬃce ﬁsh ĳs",
    "tab\tnew\nline\u2028sep\u00a0nbsp\u200bzero", "e\u0301 x\u0345 \u1e9b\u0323", "\x1b[31mred\x1b[0m \x07bell\ufeff",
    "<start_of_text> a <END_OF_TEXT> b", "supercalifragilisticexpialidocious " * 9, "word " * 200,
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small open_clip-based model and the folder that it was saved into."""
    torch.manual_seed(0)
    model = create_model_and_transforms(NAME, num_views=4)[0].eval()
    folder = tmp_path_factory.mktemp("face")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def tokenizers(saved):
    return AutoTokenizer.from_pretrained(saved[1]), get_tokenizer(saved[1])


def ids_of(tokenizer, text):
    return tokenizer(text, truncation=True).input_ids


def open_clip_ids(tokenizer, text):
    """Up to the end of the text; what follows is padding."""
    row = tokenizer(text)[0].tolist()
    return row[: row.index(max(row)) + 1]


@pytest.mark.parametrize("text", CAPTIONS)
def test_token_ids_are_open_clips(text, tokenizers):
    if "start_of_text" in text:  # its row ends at the first end of text that stands in the text itself
        fast, own = tokenizers
        assert own(text)[0, :6].tolist() == ids_of(fast, text) == [49406, 49406, 320, 49407, 321, 49407]
        return
    assert ids_of(tokenizers[0], text) == open_clip_ids(tokenizers[1], text)


def test_token_ids_of_random_texts(tokenizers):
    fast, own = tokenizers
    alphabets = [
        "abcdefghijklmnopqrstuvwxyz ", "ABCDEFGHIJ .,!?'\"-0123456789 ", "éèüñçßøÅÉ ĲŉﬁﬂŁ", "αβγδΣςσΤΩ ΆΈ'", "абвЖЗИ й",
        "漢字かなカナｶﾞＡＢ！　", "한국어조선", "ابتث ١٢٣", "😀👍🏽👨‍👩‍👧™©…—–‘’“”«»", "\t\n\r \u00a0\u2003\u200b\u200d",
        "A\u0300ẛ\u0323\u0301\u0308", "'s 't 're 've 'm 'll 'd 'S 'LL ſ", " &;<>#@",
    ]  # fmt: skip
    rng, compared = random.Random(0), 0
    while compared < 3000:
        letters = "".join(rng.choice(alphabets) for _ in range(rng.randint(1, 3)))
        text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 30)))
        if ftfy.fix_encoding(text) == text and html.unescape(text) == text:
            compared += 1
            assert ids_of(fast, text) == open_clip_ids(own, text), repr(text)


def test_what_the_tokenizer_file_cannot_do_is_what_the_docs_name(tokenizers):
    fast, own = tokenizers
    for text in ("fish &amp; chips", "cafÃ©", "an \x85 old control", "!!<start_of_text>"):
        assert ids_of(fast, text) != open_clip_ids(own, text)


def test_padding_truncation_and_decoding(saved, tokenizers):
    model, (fast, own) = saved[0], tokenizers
    assert fast.model_max_length == 24
    batch = fast(CAPTIONS[:8], padding="max_length", truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == (8, 24) and batch.keys() == {"input_ids", "attention_mask"}
    padded = batch.attention_mask == 0
    expected = own(CAPTIONS[:8])
    assert torch.equal(batch.input_ids[~padded], expected[~padded])
    assert (batch.input_ids[padded] == 49407).all() and (expected[padded] == 0).all()
    # Neither padding is read.
    text = model.encode_text(expected)
    torch.testing.assert_close(model.encode_text(batch), text)
    torch.testing.assert_close(model.get_text_features(**batch), text)
    torch.testing.assert_close(model.get_text_features(**fast(CAPTIONS[:1], return_tensors="pt")), text[:1])
    assert fast.decode(batch.input_ids[0], skip_special_tokens=True).strip() == CAPTIONS[0]
    assert fast.decode(ids_of(fast, "Café 東京"), skip_special_tokens=True).strip() == "café 東京"


def picture(rng, height, width):
    small = rng.integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


@pytest.mark.parametrize(
    "cfg",
    [
        {"size": 64}, {"size": (64, 64), "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)},
        {"size": 64, "resize_mode": "squash"}, {"size": (48, 64), "resize_mode": "squash"},
    ],
    ids=["shortest", "bilinear", "squash", "wide"],
)  # fmt: skip
def test_images_are_prepared_as_open_clip_does(cfg, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hf_files.preprocessor_config(cfg)))
    transform, rng = eval_transform(cfg), np.random.default_rng(0)
    processors = [AutoImageProcessor.from_pretrained(tmp_path, backend=name) for name in ("pil", "torchvision")]
    levels = torch.tensor(processors[0].image_std)[:, None, None] * 255
    for _ in range(40):
        height, width = (int(edge) for edge in rng.integers(20, 200, 2))
        cut = int(64 * max(height, width) / min(height, width)) - 64
        if cut % 4 == 3 and cfg.get("resize_mode") != "squash":
            continue  # transformers rounds the half pixel at the edge the other way
        image = picture(rng, height, width)
        wanted = transform(image)
        exact, near = (processor(image, return_tensors="pt").pixel_values[0] for processor in processors)
        torch.testing.assert_close(exact, wanted)
        assert ((near - wanted).abs() * levels).max() < 2.1
    assert eval_transform(hf_files.preprocess_cfg(tmp_path)).transforms[0].size == transform.transforms[0].size


def test_a_processor_for_both(saved):
    model, folder = saved
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    image = picture(np.random.default_rng(0), 64, 80)
    inputs = processor(text=CAPTIONS[:2], images=image, return_tensors="pt", padding=True, truncation=True)
    transform = eval_transform(model.open_clip_config["preprocess_cfg"])
    found = model.get_image_features(inputs["pixel_values"])
    torch.testing.assert_close(found, model.encode_image(transform(image)[None]))
    found = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(found, model.encode_text(get_tokenizer(folder)(CAPTIONS[:2])))


def test_only_what_is_exact_is_written(tmp_path):
    config = {"model_cfg": {"text_cfg": {}}, "preprocess_cfg": {"size": 64}}
    everything = {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    for index, (text, preprocess, written) in enumerate((
        ({}, {}, everything),
        ({"tokenizer_kwargs": {"clean": "lower"}}, {}, everything),
        ({"hf_tokenizer_name": "x"}, {}, {"preprocessor_config.json"}),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, {}, {"preprocessor_config.json"}),
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, {}, {"preprocessor_config.json"}),
        ({"no_causal_mask": True}, {}, {"preprocessor_config.json"}),
        ({"pool_type": "last"}, {}, {"preprocessor_config.json"}),
        ({"text_arch": "modern"}, {}, {"preprocessor_config.json"}),
        ({}, {"resize_mode": "longest"}, everything - {"preprocessor_config.json"}),
        ({}, {"size": (48, 64)}, everything - {"preprocessor_config.json"}),
    )):  # fmt: skip
        folder = tmp_path / str(index)
        folder.mkdir()
        config = {"model_cfg": {"text_cfg": text}, "preprocess_cfg": {"size": 64, **preprocess}}
        hf_files.write_open_clip(folder, config, [])
        assert {path.name for path in folder.iterdir()} == written
    folder = tmp_path / "own"
    folder.mkdir()
    hf_files.write_open_clip(folder, config, ["image_tower", "text_tower"])
    assert not list(folder.iterdir())


def test_it_is_written_without_transformers(tmp_path, monkeypatch):
    model = create_model_and_transforms(NAME, num_views=1)[0]
    hf_files._clip_tokenizer.cache_clear()
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()


def test_the_folder_is_still_one_of_open_clip(saved):
    tokenizer = open_clip.get_tokenizer(f"local-dir:{saved[1]}")
    assert torch.equal(tokenizer(CAPTIONS), get_tokenizer(NAME)(CAPTIONS))


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer of CLIP's kind that knows letters and no words."""
    folder, alphabet = tmp_path_factory.mktemp("letters"), "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder)


def test_an_open_clip_model_with_a_tokenizer_of_transformers(tmp_path, letters):
    """Its name may be of the Hub: saved with the model, the tokenizer is read from the folder."""
    model = create_model_and_transforms(NAME, num_views=1)[0]
    model.open_clip_config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/nowhere"
    model.save_pretrained(tmp_path, tokenizer=letters)
    found = get_tokenizer(tmp_path)(["ab c"])
    assert found.shape == (1, 24) and found[0, :6].tolist() == [52, 0, 27, 28, 53, 53]
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["ab c"]), found)


def transformers_model():
    layers = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"eos_token_id": 53, "bos_token_id": 52}
    text = {"hidden_size": 32, "vocab_size": 54, "max_position_embeddings": 12, **special, **layers}
    vision = {"hidden_size": 24, "image_size": 32, "patch_size": 8, **layers}
    torch.manual_seed(0)
    return MVAM(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), num_views=2).eval()


@pytest.mark.parametrize("whole", [True, False], ids=["processor", "its parts"])
def test_a_model_of_transformers_with_its_processor(whole, tmp_path, letters):
    model, edges = transformers_model(), {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=edges)
    processor = CLIPProcessor(image_processor, letters)
    if whole:
        model.save_pretrained(tmp_path, processor=processor)
    else:
        model.save_pretrained(tmp_path, image_processor=image_processor, tokenizer=letters)
    image = picture(np.random.default_rng(0), 40, 60)
    wanted = processor(text=["ab c", "d"], images=image, return_tensors="pt", padding=True)
    again, loaded = MVAM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs = loaded(text=["ab c", "d"], images=image, return_tensors="pt", padding=True)
    for name in wanted:
        assert torch.equal(inputs[name], wanted[name])
    features = again.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    ids = get_tokenizer(tmp_path)(["ab c", "d"])  # of the full length, as open_clip's tokenizers give them
    assert ids.shape == (2, 12) and get_tokenizer(tmp_path)("d").shape == (1, 12)
    torch.testing.assert_close(again.encode_text(ids), features)
    transform = eval_transform(hf_files.preprocess_cfg(tmp_path))
    torch.testing.assert_close(transform(image), inputs["pixel_values"][0], atol=0.04, rtol=0)


def test_a_tokenizer_beside_a_text_tower_of_ones_own(tmp_path, letters):
    """Nothing says how long its texts are: they are as long as the longest."""
    letters.save_pretrained(tmp_path)
    assert hf_files.FolderTokenizer(tmp_path)(["ab c", "d"]).tolist() == [[52, 0, 27, 28, 53], [52, 29, 53, 53, 53]]
    assert hf_files.FolderTokenizer(tmp_path)(["ab c"], context_length=3).tolist() == [[52, 0, 53]]


def test_image_processors_that_open_clips_transform_can_follow(tmp_path):
    for index, (processor, expected) in enumerate((
        (SiglipImageProcessor(), {"size": (224, 224), "resize_mode": "squash", "interpolation": "bicubic"}),
        (CLIPImageProcessor(resample=2), {"size": 224, "resize_mode": "shortest", "interpolation": "bilinear"}),
    )):  # fmt: skip
        processor.save_pretrained(tmp_path / str(index))
        assert hf_files.preprocess_cfg(tmp_path / str(index)).items() >= expected.items()
    for index, (processor, message) in enumerate((
        (CLIPImageProcessor(size={"shortest_edge": 256}), "crop_size is {'height': 224, 'width': 224}"),
        (CLIPImageProcessor(do_normalize=False, resample=1), "do_normalize is False; resample is 1"),
        (Siglip2ImageProcessor(), "size is None"),
    )):  # fmt: skip
        processor.save_pretrained(tmp_path / f"bad{index}")
        with pytest.raises(ValueError, match=f"cannot do what the image processor in .* does: {message}"):
            hf_files.preprocess_cfg(tmp_path / f"bad{index}")


def test_clip_benchmark_finds_the_same_recall(saved, tmp_path):
    """Its zero-shot retrieval, unchanged, and with other numbers of captions. What ties with the right answer counts
    against the query here, and by chance there: a caption that two scenes share is kept for the first only."""
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    model, folder = saved
    data = make_scenes(tmp_path, train=4, val=4, test=24, progress=False)
    dataset = KarpathyDataset(data, tmp_path / "images", "test")
    transform = eval_transform(model.open_clip_config["preprocess_cfg"])
    images = torch.stack([transform(dataset.load_image(index)) for index in range(len(dataset))])
    first_of = {caption: index for index in reversed(range(24)) for caption in dataset.captions[index]}
    captions = [[text for text in dataset.captions[index] if first_of[text] == index] for index in range(24)]
    batches = [(images[start : start + 8], captions[start : start + 8]) for start in range(0, 24, 8)]
    texts = [text for row in captions for text in row]
    owner = [index for index, row in enumerate(captions) for _ in row]
    own, fast = get_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        features = model.encode_image(images, normalize=True), model.encode_text(own(texts), normalize=True)
    wanted = recall_metrics(*features, torch.tensor(owner))
    for tokenizer in (own, lambda batch: fast(batch, padding=True, truncation=True, return_tensors="pt")):
        found = retrieval.evaluate(model, batches, tokenizer, device="cpu", amp=False, recall_k_list=[1, 5, 10])
        for k in (1, 5, 10):
            assert 100 * found[f"image_retrieval_recall@{k}"] == pytest.approx(wanted[f"t2i_r{k}"], abs=1e-4)
            assert 100 * found[f"text_retrieval_recall@{k}"] == pytest.approx(wanted[f"i2t_r{k}"], abs=1e-4)
    assert 0 < wanted["t2i_r10"] < 100
