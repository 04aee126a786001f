"""MVAM through open_clip's own training loop: what it trains, saves, resumes, and leaves as it was."""
import argparse
import json
import logging
import subprocess
import sys
import types

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from mvam_fast import MVAM, MVAMLoss, get_tokenizer
from mvam_fast.factory import open_clip_with_own_configs
from mvam_fast.open_clip_training import LoopMVAM, Settings, convert, main, mvam_training
from mvam_fast.retrieval.scenes import make_scenes

pandas = pytest.importorskip("pandas")
loop = pytest.importorskip("open_clip_train.main")

NAME = "scenes-ViT-T-16"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of a scenes set with train.csv and val.csv."""
    folder = tmp_path_factory.mktemp("scenes")
    source = make_scenes(folder, train=16, val=8, test=4, progress=False)
    for split in ("train", "val"):
        command = f"csv --data {source} --images {folder}/images --split {split} --out {folder}/{split}.csv"
        assert main([*command.split(), "--captions-per-image", "1"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """open_clip_train adds handlers to the root logger and sets the level of every logger there is."""

    def loggers():
        return [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]

    levels, handlers = {logger: logger.level for logger in loggers()}, list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers
    for logger in loggers():
        logger.setLevel(levels.get(logger, logging.NOTSET))


@pytest.fixture
def seen(monkeypatch):
    """What the loop hands to `train_one_epoch`, which runs unless seen["skip"] is set."""
    found, stock = {"skip": False}, loop.train_one_epoch
    names = ("model", "data", "loss", "epoch", "optimizer")

    def train_one_epoch(*arguments, **options):
        found.update(zip(names, arguments, strict=False))
        if not found["skip"]:
            stock(*arguments, **options)

    monkeypatch.setattr(loop, "train_one_epoch", train_one_epoch)
    return found


def arguments(data, logs, *more, epochs=1):
    return [
        *f"--train-data {data}/train.csv --model {NAME} --logs {logs} --name run --epochs {epochs}".split(),
        *"--batch-size 8 --workers 0 --device cpu --lr 1e-3 --warmup 1 --log-every-n-steps 1".split(), *more,
    ]  # fmt: skip


def weights(logs, epoch):
    return torch.load(logs / f"run/checkpoints/epoch_{epoch}.pt")["state_dict"]


def images(count=3):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "own, passed_on",
    [
        ("--views 3", "--precision fp32"),
        ("--views 3 --global-view", "--precision amp_bf16 --accum-freq 2 --grad-checkpointing --grad-clip-norm 1"),
        ("--views 2 --scoring additive", "--precision fp32 --siglip --accum-freq 2 --force-custom-text"),
    ],
    ids=["plain", "accumulated", "siglip"],
)
def test_it_trains_evaluates_saves_and_converts(own, passed_on, data, tmp_path, seen):
    command = arguments(data, tmp_path, "--val-data", str(data / "val.csv"), *passed_on.split(), epochs=2)
    assert main([*own.split(), "--diversity-weight", "0.01", "--", *command]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run/checkpoints/results.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and all(0 <= row["text_to_image_R@5"] <= 1 for row in rows)
    log = (tmp_path / "run/out.log").read_text()
    assert "Contrastive_loss" in log and "Image_diversity_loss" in log and "Text_diversity_loss" in log

    model, (before, after) = seen["model"].eval(), (weights(tmp_path, epoch) for epoch in (1, 2))
    assert type(model) is LoopMVAM and after.keys() == model.state_dict().keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {"image_pool.codes", "text_pool.codes", "clip.visual.conv1.weight", "clip.logit_scale"} <= moved
    if "--global-view" in own:
        assert after["image_gates"].abs().min() > 0 and after["text_gates"].abs().min() > 0
    assert ("clip.logit_bias" in moved) == ("--siglip" in passed_on)

    again = MVAM.from_pretrained(convert(tmp_path / "run/checkpoints/epoch_2.pt", tmp_path / "model"))
    ids = get_tokenizer(tmp_path / "model")(["a large red circle", "hi!", "a bar"])
    with torch.no_grad():
        assert torch.equal(again.encode_image(images()), model.encode_image(images()))
        assert torch.equal(again.encode_text(ids), model.encode_text(ids))


def test_without_views_the_run_is_open_clips_own(data, tmp_path):
    """Weight for weight: so a baseline may be trained by either, and nothing else in the loop was changed."""
    open_clip_with_own_configs()
    more = ["--precision", "fp32", "--accum-freq", "2", "--wd", "0.5"]
    assert loop.main(arguments(data, tmp_path / "stock", *more)) is None
    assert main(["--views", "0", "--global-view", "--", *arguments(data, tmp_path / "ours", *more)]) == 0
    stock, ours = weights(tmp_path / "stock", 1), weights(tmp_path / "ours", 1)
    assert {f"clip.{name}" for name in stock} == ours.keys()
    for name, value in stock.items():
        assert torch.equal(value, ours[f"clip.{name}"]), name


def test_one_accumulated_step_equals_one_with_the_whole_batch():
    """But for the gradient of the temperature, which open_clip's loop counts once for each part of the batch."""
    from open_clip_train.train import train_one_epoch

    class Batches(list):
        num_samples = 16

        @property
        def num_batches(self):
            return len(self)

    pixels, ids = images(16), torch.randint(1, 40000, (16, 24), generator=torch.Generator().manual_seed(0))
    steps, logged = {}, []
    for accum_freq in (1, 2):
        args = argparse.Namespace(
            device="cpu", precision="fp32", distill=False, accum_freq=accum_freq, skip_scheduler=True, horovod=False,
            grad_clip_norm=None, rank=0, world_size=1, log_every_n_steps=1, batch_size=16 // accum_freq, wandb=False,
        )  # fmt: skip
        torch.manual_seed(0)
        with mvam_training(Settings(views=4, global_view=True, diversity_weight=0.5)) as inside:
            model, *_ = inside.create_model_and_transforms(NAME)
        with torch.no_grad():
            model.image_gates += 0.5
            model.text_gates += 0.5
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        batches = Batches(zip(pixels.split(args.batch_size), ids.split(args.batch_size), strict=True))
        data = {"train": types.SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = MVAMLoss(0.5)
        loss.register_forward_hook(lambda module, inputs, terms: logged.append({**terms}))
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)
        steps[accum_freq] = {name: parameter.detach() - start[name] for name, parameter in model.named_parameters()}
    whole, parts = logged[0], logged[1:]
    assert len(parts) == 2
    for part in parts:
        assert part.keys() == {"contrastive_loss", "image_diversity_loss", "text_diversity_loss"}
        torch.testing.assert_close(part["contrastive_loss"], whole["contrastive_loss"])
    for name, step in steps[1].items():
        if name != "clip.logit_scale":
            torch.testing.assert_close(steps[2][name], step, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(steps[2]["clip.logit_scale"], 2 * steps[1]["clip.logit_scale"], rtol=1e-4, atol=1e-6)
    assert steps[1]["image_pool.codes"].abs().max() > 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "timm/adamw"])
def test_codes_and_gates_have_no_weight_decay(optimizer, data, tmp_path, seen):
    seen["skip"] = True
    more = ["--precision", "fp32", "--opt", optimizer, "--wd", "0.3", "--beta1", "0.9", "--beta2", "0.98"]
    more += ["--eps", "1e-6", "--save-frequency", "0"]
    assert main(["--views", "3", "--global-view", "--", *arguments(data, tmp_path, *more)]) == 0
    names = {parameter: name for name, parameter in seen["model"].named_parameters()}
    decay = [(names[p], group["weight_decay"]) for group in seen["optimizer"].param_groups for p in group["params"]]
    assert sorted(name for name, _ in decay) == sorted(names.values())
    decay = dict(decay)
    for name in ("image_pool.codes", "text_pool.codes", "image_gates", "text_gates", "clip.logit_scale"):
        assert decay[name] == 0, name
    assert decay["clip.visual.conv1.weight"] == decay["clip.token_embedding.weight"] == 0.3
    assert decay["clip.positional_embedding"] == (0.3 if optimizer == "adamw" else 0), "as open_clip has it"


def test_timm_finds_what_to_spare_behind_a_distributed_wrapper():
    from timm.optim import create_optimizer_v2 as stock

    with mvam_training(Settings(views=2)) as inside:
        from timm.optim import create_optimizer_v2

        model, *_ = inside.create_model_and_transforms(NAME)
        wrapped = torch.nn.DataParallel(model)
        optimizer = create_optimizer_v2(wrapped, "adamw", lr=1e-3, weight_decay=0.3)
    codes = model.image_pool.codes
    for made, expected in ((optimizer, 0), (stock(wrapped, "adamw", lr=1e-3, weight_decay=0.3), 0.3)):
        assert [g["weight_decay"] for g in made.param_groups if any(p is codes for p in g["params"])] == [expected]


@pytest.mark.parametrize("custom_text", [[], ["--force-custom-text"]], ids=["CLIP", "CustomTextCLIP"])
def test_locked_towers_and_learning_codes(custom_text, data, tmp_path, seen):
    more = "--precision fp32 --lock-image --lock-text --lock-text-freeze-layer-norm --grad-checkpointing"
    assert main(["--views", "2", "--", *arguments(data, tmp_path, *more.split(), *custom_text)]) == 0
    learning = {name for name, parameter in seen["model"].named_parameters() if parameter.requires_grad}
    assert {name for name in learning if not name.startswith("clip.")} == {"image_pool.codes", "text_pool.codes"}
    assert not any(name.startswith("clip.visual") or "transformer" in name for name in learning)
    torch.manual_seed(0)
    with mvam_training(Settings(views=2)) as inside:
        fresh = inside.create_model_and_transforms(NAME, force_custom_text=bool(custom_text))[0].state_dict()
    trained = weights(tmp_path, 1)
    assert torch.equal(trained["clip.visual.conv1.weight"], fresh["clip.visual.conv1.weight"])
    assert not torch.equal(trained["image_pool.codes"], fresh["image_pool.codes"])


def test_resume_restores_weights_and_optimizer_and_goes_on(data, tmp_path, seen):
    own = ["--views", "3", "--global-view", "--"]
    assert main([*own, *arguments(data, tmp_path, "--precision", "fp32")]) == 0
    assert main([*own, *arguments(data, tmp_path, "--precision", "fp32")]) == 1  # a run of this name exists
    before = torch.load(tmp_path / "run/checkpoints/epoch_1.pt")
    still = ["--precision", "fp32", "--resume", "latest", "--lr", "0"]
    assert main([*own, *arguments(data, tmp_path, *still, epochs=2)]) == 0
    after = torch.load(tmp_path / "run/checkpoints/epoch_2.pt")
    assert seen["epoch"] == 1
    for name, value in before["state_dict"].items():  # nothing moves at a learning rate of 0
        assert torch.equal(after["state_dict"][name], value), name
    assert {state["step"].item() for state in before["optimizer"]["state"].values()} == {2}
    assert {state["step"].item() for state in after["optimizer"]["state"].values()} == {4}
    sizes = [[len(group["params"]) for group in saved["optimizer"]["param_groups"]] for saved in (before, after)]
    assert sizes[0] == sizes[1] and sizes[0][-1] == 2  # the codes' own group

    config = (tmp_path / "run/checkpoints/mvam_config.json").read_text()
    with pytest.raises(RuntimeError, match="size mismatch for image_pool.codes"):
        main(["--views", "4", "--global-view", "--", *arguments(data, tmp_path, "--resume", "latest", epochs=3)])
    assert (tmp_path / "run/checkpoints/mvam_config.json").read_text() == config


def test_convert_takes_distributed_names_and_refuses_what_does_not_fit(tmp_path):
    torch.manual_seed(0)
    with mvam_training(Settings(views=2)) as inside:
        model, *_ = inside.create_model_and_transforms(NAME)
    model.save_config(tmp_path / "run")
    checkpoint = tmp_path / "run/epoch_latest.pt"
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, checkpoint)
    assert main(["convert", str(checkpoint), "--out", str(tmp_path / "model")]) == 0
    again = MVAM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())

    torch.save({"state_dict": {**state, "module.image_pool.codes": torch.zeros(5, 96)}}, checkpoint)
    with pytest.raises(ValueError, match=r"image_pool.codes is \(5, 96\), the model has \(2, 96\)"):
        convert(checkpoint, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(FileNotFoundError, match="checkpoint: no such file"):
        convert(tmp_path / "none.pt", tmp_path / "other")
    (tmp_path / "run/mvam_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="must lie beside the configs.*mvam_config.json"):
        convert(checkpoint, tmp_path / "other")


def test_the_stock_names_are_put_back():
    import timm.optim

    def names():
        replaced = [getattr(loop, name) for name in ("create_model_and_transforms", "create_loss", "optim")]
        return [*replaced, timm.optim.create_optimizer_v2]

    before = names()
    with pytest.raises(KeyError), mvam_training(Settings()):
        assert not any(now is then for now, then in zip(names(), before, strict=True))
        raise KeyError
    assert all(now is then for now, then in zip(names(), before, strict=True))
    assert before[:2] == [open_clip.create_model_and_transforms, open_clip.create_loss]
    for wrong in ({"diversity_weight": -1}, {"diversity_kind": "l2"}):
        with pytest.raises(ValueError, match=f"is {list(wrong.values())[0]!r}"), mvam_training(Settings(**wrong)):
            pass


def test_a_model_out_holds_no_none_and_takes_open_clips_names():
    with mvam_training(Settings(views=0, global_view=True)) as inside:
        model, *_ = inside.create_model_and_transforms(NAME)
        ids = torch.ones(3, 24, dtype=torch.long)
        assert model(images(), ids).keys() == {"image_features", "text_features", "logit_scale"}
        assert model(image=images()).keys() == {"image_features", "logit_scale"}  # as zero-shot evaluation calls
        with pytest.raises(ValueError, match="--distill-model"):
            inside.create_model_and_transforms(NAME)
    with mvam_training(Settings()) as inside, pytest.raises(ValueError, match="--torchscript"):
        inside.create_model_and_transforms(NAME, jit=True)


def test_the_loop_of_tasks(monkeypatch, tmp_path):
    """open_clip 4 as far as MVAM meets it: a task that holds model and loss."""

    def create_task(args, model, dist_model=None):
        return types.SimpleNamespace(model=model, loss=SigLipLoss())

    newer = types.ModuleType("open_clip_train.main")
    newer.create_model_and_transforms, newer.create_task = open_clip.create_model_and_transforms, create_task
    monkeypatch.setitem(sys.modules, "open_clip_train.main", newer)
    with mvam_training(Settings(views=2, diversity_weight=0.2, diversity_kind="offdiag")) as inside:
        model, *_ = inside.create_model_and_transforms(NAME)
        model.set_grad_checkpointing()
        task = inside.create_task(argparse.Namespace(rank=0, resume=None, checkpoint_path=tmp_path), model=model)
    assert type(task.loss) is MVAMLoss and type(task.loss.contrastive) is SigLipLoss
    assert (task.loss.diversity_weight, task.loss.kind) == (0.2, "offdiag")
    assert json.loads((tmp_path / "mvam_config.json").read_text())["num_views"] == 2
    assert newer.create_task is create_task
    del newer.create_task
    too_little = pytest.raises(ImportError, match="has create_model_and_transforms of .* pip install")
    with too_little, mvam_training(Settings()):
        pass


def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path):
    for command, message in (
        (["--views", "8"], "come after ' -- '"),
        (["--diversity-weight", "-1", "--"], "diversity_weight is -1.0; it must be ≥ 0"),
        (["convert", str(tmp_path / "x.pt"), "--out", "y"], "checkpoint: no such file"),
        (["csv", "--data", "x", "--images", str(tmp_path), "--split", "val", "--out", "y.csv"], "no such file: x"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "open_clip_train.main", None)
    with pytest.raises(SystemExit):
        main(["--"])
    assert "pip install 'mvam_fast[scale]'" in capsys.readouterr().err


def test_csv_is_what_open_clip_reads(tmp_path):
    (tmp_path / "folder").mkdir()
    captions = ['a "quoted" cat', "tab\there", "a, b", "plain"]
    rows = [{"split": "train", "filename": "1.png", "sentences": [{"raw": caption} for caption in captions]}]
    (tmp_path / "set.json").write_text(json.dumps({"images": rows}))
    command = f"csv --data {tmp_path}/set.json --images {tmp_path}/folder --split train --out {tmp_path}/x.csv"
    assert main(command.split()) == 0
    read = pandas.read_csv(tmp_path / "x.csv", sep="\t")
    assert read["title"].tolist() == captions
    assert set(read["filepath"]) == {str(tmp_path / "folder/1.png")}


def test_siglip_loss_and_diversity():
    torch.manual_seed(0)
    features = {name: F.normalize(torch.randn(4, 6), dim=-1) for name in ("image_features", "text_features")}
    scales = {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}
    grams = {"image_gram": torch.rand(4, 3, 3), "text_gram": torch.rand(4, 3, 3)}
    terms = MVAMLoss(0.3, contrastive=SigLipLoss())(**features, **scales, **grams, output_dict=True)
    torch.testing.assert_close(terms["contrastive_loss"], SigLipLoss()(**features, **scales))
    beside_clip = MVAMLoss(0.3)(**features, **scales, **grams, output_dict=True)
    torch.testing.assert_close(terms["image_diversity_loss"], beside_clip["image_diversity_loss"])


WORKER = """
import os, sys, torch, torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from mvam_fast import MVAMLoss
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
data, found = torch.load(f"{folder}/data.pt"), {}
for name, loss in (("clip", ClipLoss), ("siglip", SigLipLoss)):
    mine = {k: v[4 * rank : 4 * rank + 4].clone().requires_grad_() for k, v in data.items()}
    total = MVAMLoss(0.1, contrastive=loss(rank=rank, world_size=2))(
        **mine, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-10.0)
    )
    total.backward()
    found[name] = {"loss": total.detach(), **{k: v.grad for k, v in mine.items()}}
torch.save(found, f"{folder}/out{rank}.pt")
dist.barrier()
# As in test_distributed.py: gloo's threads must not meet the interpreter's end.
os._exit(0)
"""


def test_two_processes_weigh_diversity_as_one_does(tmp_path):
    """By open_clip_train's defaults (no --gather-with-grad) the averaged gradient of ClipLoss is 1/2 of the whole
    batch's, so that of the diversity must be too; SigLipLoss's is whole, and so is the diversity's beside it."""
    torch.manual_seed(0)
    data = {
        "image_features": F.normalize(torch.randn(8, 6), dim=-1),
        "text_features": F.normalize(torch.randn(8, 6), dim=-1),
        "image_gram": torch.rand(8, 3, 3), "text_gram": torch.rand(8, 3, 3),
    }  # fmt: skip
    torch.save(data, tmp_path / "data.pt")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    found = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)]
    scales = {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}
    for name, loss, share in (("clip", ClipLoss, 0.5), ("siglip", SigLipLoss, 1)):
        whole = {key: value.clone().requires_grad_() for key, value in data.items()}
        expected = MVAMLoss(0.1, contrastive=loss())(**whole, **scales)
        expected.backward()
        torch.testing.assert_close((found[0][name]["loss"] + found[1][name]["loss"]) / 2, expected.detach())
        for key, value in whole.items():
            averaged = torch.cat([process[name][key] for process in found]) / 2
            torch.testing.assert_close(averaged, share * value.grad, msg=f"{name} {key}")
