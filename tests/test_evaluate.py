"""Evaluation: the features are the model's own, and the result says what was measured, and how."""
import functools
import json
import shutil
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mvam_fast import cli, create_model_and_transforms, factory
from mvam_fast.factory import needs_quick_gelu
from mvam_fast.retrieval.data.datasets import ImageStore, KarpathyDataset, UnreadableImage
from mvam_fast.retrieval.evaluation import evaluate as evaluate_module
from mvam_fast.retrieval.evaluation import protocols
from mvam_fast.retrieval.evaluation.embedding import embed, embed_images, embed_texts
from mvam_fast.retrieval.evaluation.evaluate import embed_dataset, evaluate, load_model, recall_table, report_of
from mvam_fast.retrieval.evaluation.protocols import Protocol
from mvam_fast.retrieval.evaluation.provenance import code_sha256, sha256_of_file, sha256_of_value
from mvam_fast.retrieval.evaluation.published import published
from mvam_fast.retrieval.scenes import make_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """JSON and image folder of 16 test images; not to be changed."""
    data = make_scenes(tmp_path_factory.mktemp("evaluate"), train=4, val=8, test=16, progress=False)
    return data, data.parent / "images"


@pytest.fixture
def own_scenes(scenes, tmp_path):
    """The same to be changed."""
    folder = shutil.copytree(scenes[0].parent, tmp_path / "own")
    return folder / scenes[0].name, folder / "images"


@pytest.fixture
def trained(scenes, checkpoint_of):
    """(model folder, JSON, image folder)."""
    return checkpoint_of("views"), *scenes


@pytest.fixture
def small_protocols(monkeypatch):
    """The published protocols, on 16 images, in folds of 4."""
    for name, fold in (("coco-5k", None), ("coco-1k", 4), ("flickr30k-1k", None)):
        monkeypatch.setitem(protocols.PROTOCOLS, name, Protocol(name, images=16, captions=5, fold=fold))


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    """A file of weights for open_clip's own model."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(create_model_and_transforms("scenes-ViT-T-16", None, 1)[0].clip.state_dict(), path)
    return path


@functools.cache
def loaded(folder):
    return load_model(folder, "cpu")


def embed_test(trained, batch_size=256, **options):
    folder, data, images = trained
    model, preprocess, tokenizer = loaded(folder)
    store = ImageStore(KarpathyDataset(data, images, "test"), preprocess, **options)
    return model, store, embed_dataset(model, store, tokenizer, batch_size=batch_size, progress=False)


def test_features_are_the_models_own_one_by_one(trained):
    model, store, (images, texts, owner) = embed_test(trained)
    _, preprocess, tokenizer = loaded(trained[0])
    captions = [caption for captions in store.dataset.captions for caption in captions]
    assert images.dtype == texts.dtype == torch.float32
    assert owner.tolist() == [image for image in range(16) for _ in range(5)]
    with torch.no_grad():
        for index in (0, 15):
            alone = F.normalize(model.encode_image(preprocess(store.dataset.load_image(index))[None]), dim=-1)
            torch.testing.assert_close(images[index : index + 1], alone, rtol=1e-5, atol=1e-6)
        for index in (0, 79):
            alone = F.normalize(model.encode_text(tokenizer([captions[index]])), dim=-1)
            torch.testing.assert_close(texts[index : index + 1], alone, rtol=1e-5, atol=1e-6)


def test_the_batch_size_changes_nothing(trained):
    _, _, whole = embed_test(trained)
    _, _, pieces = embed_test(trained, batch_size=7)  # divides neither 16 images nor 80 captions
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_given_back(trained, training):
    model, store, _ = embed_test(trained)
    model.train(training)
    embed_dataset(model, store, loaded(trained[0])[2], progress=False)
    assert model.training is training
    model.eval()


def test_equal_captions_have_the_very_same_features(trained, own_scenes):
    data, images = own_scenes
    content = json.loads(data.read_text())
    test = [row for row in content["images"] if row["split"] == "test"]
    for row in test[1::3]:
        row["sentences"][4] = test[0]["sentences"][2]
    data.write_text(json.dumps(content))
    _, store, (_, texts, _) = embed_test((trained[0], data, images), batch_size=7)
    captions = [caption for captions in store.dataset.captions for caption in captions]
    places = [row for row, caption in enumerate(captions) if caption == captions[2]]
    assert len(places) >= 6
    assert all(torch.equal(texts[row], texts[2]) for row in places)
    assert len({tuple(row) for row in texts.tolist()}) == len(set(captions))
    found = evaluate(trained[0], data, images, device="cpu", batch_size=7, progress=False)["metrics"]
    assert found["rsum"] <= found["rsum_if_ties_count_for"]


@pytest.mark.parametrize("batch_size", [1, 256])  # of one image, nothing is left of its batch
def test_captions_of_an_unreadable_image_go_with_it(trained, own_scenes, batch_size):
    here = (trained[0], *own_scenes)
    _, _, (images, texts, _) = embed_test(here)
    (own_scenes[1] / "test/000002.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match="000002.png"):
        embed_test(here, strict=True)
    model, store, (fewer, fewer_texts, owner) = embed_test(here, batch_size=batch_size)
    kept = [index for index in range(16) if index != 2]
    assert len(store.unreadable) == 1
    torch.testing.assert_close(fewer, images[kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fewer_texts, texts.view(16, 5, -1)[kept].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert owner.tolist() == [row for row in range(15) for _ in range(5)]
    assert embed(model, store, loaded(here[0])[2], progress=False).readable == kept


def test_unreadable_images_are_counted_and_change_the_hashes(trained, own_scenes, small_protocols):
    def protocol(**options):
        return evaluate(trained[0], *own_scenes, device="cpu", progress=False, **options)["protocol"]

    whole = protocol()
    (own_scenes[1] / "test/000002.png").unlink()
    with pytest.raises(UnreadableImage, match="000002.png"):
        protocol()
    less = protocol(strict=False)
    assert whole["unreadable_images"] == 0 and less["unreadable_images"] == 1
    assert all(whole[f"{of}_sha256"] != less[f"{of}_sha256"] for of in ("image_ids", "captions"))
    with pytest.raises(ValueError, match="strict is False .*, but the protocol 'coco-5k' needs every image"):
        protocol(strict=False, protocols=["full", "coco"])
    for path in (own_scenes[1] / "test").iterdir():
        path.unlink()
    with pytest.raises(UnreadableImage, match="none of 16 could be read; of .*png: cannot read"):
        protocol(strict=False)


def test_the_result_says_what_was_measured(trained, tmp_path):
    def result(split, out=None):
        return evaluate(*trained, split=split, out=out, device="cpu", progress=False)

    found = result("test", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == found
    test, val = found["protocol"], result("val")["protocol"]
    assert test == result("test")["protocol"]
    assert test["data"] == "dataset_scenes.json" and test["model"] == str(trained[0])
    assert test["captions_per_image"] == "all" and test["unreadable_images"] == 0 and test["left_out"] == {}
    assert (test["split"], val["split"]) == ("test", "val")
    for name in ("image_ids_sha256", "captions_sha256"):
        assert test[name] != val[name] and len(test[name]) == 64
    assert test["weights_sha256"] == val["weights_sha256"] == sha256_of_file(trained[0] / "model.safetensors")
    assert test["num_views"] == 4 and test["global_view"] is False and test["embedding_width"] == 128
    assert test["pretrained"] is None and test["protocols"] == ["full"]
    assert test["code_sha256"] == code_sha256() and test["ties"] == "count against the query"
    assert found["metrics"] == found["by_protocol"]["full"] and found["published"] == {}


def test_a_hash_tells_which_caption_is_whose():
    values = [["a", "b"], ["c"]], [["a"], ["b", "c"]], [["b", "a"], ["c"]], [["a", "b"], ["C"]], [["é", "\ud800"]]
    assert len({sha256_of_value(value) for value in values}) == len(values)
    assert sha256_of_value([["a"]]) == sha256_of_value([["a"]])


def test_the_ranks_of_every_query_are_beside_it(trained, tmp_path, small_protocols):
    found = evaluate(*trained, protocols=["coco", "full"], out=tmp_path / "a.json", device="cpu", progress=False)
    assert found["ranks"] == {"file": "a.ranks.safetensors", "sha256": sha256_of_file(tmp_path / "a.ranks.safetensors")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.ranks.safetensors"]
    ranks = load_file(tmp_path / "a.ranks.safetensors")
    assert list(found["by_protocol"]) == found["protocol"]["protocols"] == ["coco-5k", "coco-1k", "full"]
    assert found["metrics"] == found["by_protocol"]["coco-5k"]
    for name, metrics in found["by_protocol"].items():
        assert 100 * (ranks[f"{name}.i2t"] <= 5).double().mean().item() == pytest.approx(metrics["i2t_r5"])
        assert 100 * (ranks[f"{name}.t2i"] <= 5).double().mean().item() == pytest.approx(metrics["t2i_r5"])
        assert ranks[f"{name}.image_of_text"].tolist() == [image for image in range(16) for _ in range(5)]
    assert ranks["coco-1k.fold_of_image"].tolist() == [image // 4 for image in range(16)]
    assert ranks["coco-1k.i2t"].max() <= 16 and found["by_protocol"]["coco-1k"]["folds"] == 4
    assert found["by_protocol"]["coco-1k"]["t2i_mean_rank"] < found["by_protocol"]["coco-5k"]["t2i_mean_rank"]


def test_one_pass_of_the_encoders_for_all_protocols(trained, monkeypatch, small_protocols):
    passes = []
    monkeypatch.setattr(evaluate_module, "load_model", lambda *_, **__: loaded(trained[0]))
    monkeypatch.setattr(evaluate_module, "embed", lambda *a, **o: passes.append(1) or embed(*a, **o))
    both = evaluate(*trained, protocols=["coco"], device="cpu", progress=False)
    assert len(passes) == 1
    for name in ("coco-5k", "coco-1k"):
        alone = evaluate(*trained, protocols=[name], device="cpu", progress=False)
        assert alone["metrics"] == both["by_protocol"][name]


def test_data_that_does_not_fit_stops_before_the_work(trained, own_scenes, small_protocols, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_model", None)  # not reached
    data, images = own_scenes
    content = json.loads(data.read_text())
    next(row for row in content["images"] if row["split"] == "test")["sentences"].pop()
    data.write_text(json.dumps(content))
    for options, message in (
        ({"protocols": ["coco"]}, "'coco-5k', which needs 5 captions of each image; 1 of 16 images have fewer"),
        ({"protocols": ["coco-1k"], "split": "val"}, "'coco-1k', which needs 16 images; the data has 8"),
        ({"protocols": ["flickr30k-1k"], "captions_per_image": 4}, "captions_per_image is 4, but .* takes 5"),
        ({"protocols": ["flickr"]}, "protocol is 'flickr'; it must be one of"),
        ({"captions_per_image": 0}, "captions_per_image is 0"),
        ({"split": "dev"}, r"split is 'dev'.*test \(16\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate(trained[0], data, images, progress=False, **options)


def test_an_encoder_that_gives_nan_is_found_out(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["text_pool.codes"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="text_features holds NaN or infinite values in 80 of 80 rows"):
        evaluate(folder, *trained[1:], device="cpu", progress=False)


def test_open_clips_model_as_it_is(scenes, clip_weights):
    """Its own encoders, called without this package, have the same features; the result names the weights."""
    found = evaluate("scenes-ViT-T-16", *scenes, pretrained=str(clip_weights), device="cpu", progress=False)
    said = found["protocol"]
    assert said["model"] == "scenes-ViT-T-16" and said["pretrained"] == str(clip_weights)
    assert said["weights_sha256"] == sha256_of_file(clip_weights)
    assert said["num_views"] == 0 and said["embedding_width"] == 32
    model, preprocess, tokenizer = load_model("scenes-ViT-T-16", "cpu", pretrained=str(clip_weights))
    store = ImageStore(KarpathyDataset(*scenes, "test"), preprocess)
    images, texts, _ = embed_dataset(model, store, tokenizer, progress=False)
    clip = model.clip
    clip.load_state_dict(torch.load(clip_weights, weights_only=True))
    captions = [caption for captions in store.dataset.captions for caption in captions]
    with torch.no_grad():
        pictures = torch.stack([preprocess(store.dataset.load_image(index)) for index in range(16)])
        torch.testing.assert_close(images, clip.encode_image(pictures, normalize=True), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(texts, clip.encode_text(tokenizer(captions), normalize=True), rtol=1e-5, atol=1e-6)


def test_what_a_model_can_be(trained, clip_weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="model: no such folder: ViT-B-32; .* --pretrained"):
        load_model("ViT-B-32", "cpu")
    with pytest.raises(ValueError, match="pretrained is 'openai', but model .* is a folder"):
        load_model(trained[0], "cpu", pretrained="openai")
    with pytest.raises(ValueError, match="model_name is 'ViT-nope'"):
        load_model("ViT-nope", "cpu", pretrained="openai")
    with pytest.raises(RuntimeError, match="'nope' is not a known tag"):
        load_model("scenes-ViT-T-16", "cpu", pretrained="nope")
    with pytest.raises(ValueError, match="pretrained is 'openai', but model local-dir:.* brings its own"):
        load_model(f"local-dir:{tmp_path}", "cpu", pretrained="openai")


def test_a_folder_of_open_clip_itself(clip_weights, trained, tmp_path):
    shutil.copy(trained[0] / "open_clip_config.json", tmp_path)
    state = torch.load(clip_weights, weights_only=True)
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    model, _, tokenizer = load_model(f"local-dir:{tmp_path}", "cpu")
    assert all(torch.equal(value, state[name]) for name, value in model.clip.state_dict().items())
    assert tokenizer(["a"]).shape == (1, 24)


def test_the_activation_is_the_one_that_the_weights_were_trained_with(clip_weights, monkeypatch):
    """open_clip's config of ViT-B-32 has another than OpenAI's weights."""
    for name, tag, wanted in (
        ("ViT-B-32", "openai", True), ("ViT-B/32", "openai", True), ("ViT-B-32-quickgelu", "openai", False),
        ("ViT-B-32", "laion2b_s34b_b79k", False), ("ViT-B-16-SigLIP", "webli", False), ("ViT-nope", "openai", False),
        ("scenes-ViT-T-16", "weights.pt", False),
    ):  # fmt: skip
        assert needs_quick_gelu(name, tag) is wanted

    for needs, activation in ((True, "QuickGELU"), (False, "GELU")):
        monkeypatch.setattr(factory, "needs_quick_gelu", lambda *_, needs=needs: needs)
        model = load_model("scenes-ViT-T-16", "cpu", pretrained=str(clip_weights))[0]
        assert {type(m).__name__ for m in model.modules() if type(m).__name__.endswith("GELU")} == {activation}
        assert model.open_clip_config["model_cfg"].get("quick_gelu", False) is needs


def test_what_was_published_stands_beside(trained, own_scenes, monkeypatch, small_protocols):
    monkeypatch.setattr(evaluate_module, "load_model", lambda *_, **__: loaded(trained[0]))
    own, images = own_scenes
    data = own.rename(own.with_name("dataset_flickr30k.json"))

    def result(tag="openai", **options):
        wanted = ["flickr30k-1k", "coco"] if tag == "openai" else ["full"]
        return evaluate("ViT-B/32", data, images, pretrained=tag, device="cpu", progress=False, **{
            "protocols": wanted, **options,
        })  # fmt: skip

    found = result()
    assert list(found["published"]) == ["flickr30k-1k", "coco-5k"]  # nothing is known by coco-1k
    row = found["published"]["flickr30k-1k"]
    assert row["metrics"] == published("ViT-B-32", "openai", "flickr30k-1k") and row["source"].startswith("open_clip")
    for name, value in row["metrics"].items():
        assert row["difference"][name] == pytest.approx(found["metrics"][name] - value)
    assert found["published"]["coco-5k"]["recognised"] is False
    lines = report_of(found).splitlines()
    numbers = [line for line in lines if line.startswith(("flickr30k-1k, ", "coco-5k, "))]
    assert numbers[0].startswith("flickr30k-1k, published ") and numbers[1].startswith("flickr30k-1k, difference ")
    assert " 504.4" in numbers[0] and len(numbers) == 4
    assert "by others, open_clip" in numbers[2] and "on Flickr30K, test of Karpathy's split" in numbers[2]
    assert numbers[2].endswith("told by the names of file and split alone")
    assert numbers[3].startswith("coco-5k, published: by others") and "on COCO, test of Karpathy's" in numbers[3]
    assert numbers[3].endswith("left out, for dataset_flickr30k.json, split 'test', cannot be recognised as that")
    monkeypatch.setitem(protocols.PROTOCOLS, "flickr30k-1k", Protocol("flickr30k-1k", images=8, captions=5))
    val = result(protocols=["flickr30k-1k"], split="val")
    assert val["published"]["flickr30k-1k"]["recognised"] is False and " 504.4" not in report_of(val)
    other = result("laion2b_e16")
    assert other["published"] == {} and "published" not in report_of(other)


def test_workers_change_nothing_but_who_decodes(trained, monkeypatch):
    decoding = set()
    load = KarpathyDataset.load_image
    monkeypatch.setattr(KarpathyDataset, "load_image", lambda self, index: (
        decoding.add(threading.current_thread()), load(self, index))[1])  # fmt: skip
    alone = evaluate(*trained, device="cpu", progress=False)
    assert decoding == {threading.current_thread()}
    decoding.clear()
    assert evaluate(*trained, workers=2, device="cpu", progress=False) == alone
    assert decoding and threading.current_thread() not in decoding


def test_images_and_captions_alone_are_those_of_both(trained):
    model, store, (images, texts, _) = embed_test(trained)
    tokenizer = loaded(trained[0])[2]
    alone, readable = embed_images(model, store, progress=False)
    assert torch.equal(alone, images) and readable == list(range(16))
    captions = [caption for captions in store.dataset.captions for caption in captions]
    assert torch.equal(embed_texts(model, captions, tokenizer, progress=False), texts)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        embed_texts(model, captions, tokenizer, batch_size=0, progress=False)


def test_an_error_gives_the_models_mode_back(trained, own_scenes):
    (own_scenes[1] / "test/000002.png").unlink()
    model, preprocess, tokenizer = loaded(trained[0])
    store = ImageStore(KarpathyDataset(*own_scenes, "test"), preprocess, strict=True)
    model.train()
    with pytest.raises(UnreadableImage):
        embed_dataset(model, store, tokenizer, progress=False)
    assert model.training
    model.eval()


def test_the_table_has_every_number(trained):
    metrics = evaluate(*trained, device="cpu", progress=False)["metrics"]
    oracle = {name: value for name, value in metrics.items() if "rank" not in name}  # as a perfect reader has none
    header, first, second = recall_table({"first": metrics, "a longer name": oracle}).splitlines()
    assert [cell for cell in header.split() if cell.startswith("R@")] == ["R@1", "R@5", "R@10"] * 2
    shown = [f"{metrics[f'{way}_r{k}']:.1f}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert first.split()[1:8] == second.split()[3:] == [*shown, f"{metrics['rsum']:.1f}"]
    assert first.split()[8:] == [f"{metrics['i2t_median_rank']:.0f}", "/", f"{metrics['t2i_median_rank']:.0f}"]


def test_the_report_tells_of_ties_and_of_what_was_left_out(trained):
    found = evaluate(*trained, device="cpu", progress=False)
    found["by_protocol"]["full"] |= {"i2t_tied_queries": 3, "t2i_tied_queries": 0, "rsum_if_ties_count_for": 123.4}
    found["protocol"] |= {"unreadable_images": 2, "left_out": {"empty captions": 7}}
    _, _, ties, unreadable, left_out = report_of(found).splitlines()
    assert "3 images and 0 captions" in ties and ties.endswith("123.4")
    assert unreadable == "left out as unreadable: 2 images" and left_out == "left out of the data: 7 empty captions"


def test_command_line(trained, clip_weights, tmp_path, capsys, small_protocols):
    where = ["--data", str(trained[1]), "--images", str(trained[2]), "--device", "cpu"]
    out = tmp_path / "a.json"
    wanted = ["--protocol", "coco", "--protocol", "full"]
    assert cli.main(["evaluate", str(trained[0]), *where, *wanted, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["coco-5k", "coco-1k", "full"]
    found = json.loads(out.read_text())
    assert all(f"{found['by_protocol'][name]['rsum']:.1f}" in "\n".join(lines) for name in found["by_protocol"])
    zero_shot = ["evaluate", "scenes-ViT-T-16", "--pretrained", str(clip_weights)]
    assert cli.main([*zero_shot, *where, "--captions-per-image", "2", "--workers", "2"]) == 0
    assert "full" in capsys.readouterr().out
    assert cli.main(["evaluate", "scenes-ViT-T-16", *where]) == 2
    assert cli.main([*zero_shot, *where, "--protocol", "coco", "--split", "val"]) == 2
    assert cli.main([*zero_shot, *where, "--workers", "-1"]) == 2
    errors = capsys.readouterr().err
    assert "mvam-fast: error: model: no such folder: scenes-ViT-T-16;" in errors
    assert "mvam-fast: error: workers is -1; it must be at least 0" in errors
    assert "mvam-fast: error: protocol is 'coco-5k', which needs 16 images; the data has 8" in errors
