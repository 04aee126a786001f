"""MVAM in open_clip's own training loop: `python -m mvam_fast.open_clip_training [OPTIONS] -- OPEN_CLIP_ARGUMENTS`.

`open_clip_train` has no registry and no hook for a model or a loss of one's own. While `mvam_training` is active, the
names by which its `main` creates the model, the loss and the optimizer are bound to this project's; afterwards they are
what they were. Everything else (data, precision, accumulation, distribution, evaluation, checkpoints) is open_clip's.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from ._optional import require
from .encoders import OPEN_CLIP_CONFIG
from .factory import create_model_and_transforms
from .files import atomic
from .functional import DIVERSITY_KINDS
from .loss import MVAMLoss
from .model import MVAM
from .model_folder import MVAM_CONFIG, WEIGHTS
from .pooling import SCORINGS


@dataclass(frozen=True)
class Settings:
    """What MVAM adds to open_clip's arguments; see `MVAM` and `MVAMLoss`."""

    views: int = 16
    global_view: bool = False
    scoring: str = "dot"
    key_dim: int | None = None
    backend: str = "auto"
    diversity_weight: float = 0.0
    diversity_kind: str = "frobenius"


class LoopMVAM(MVAM):
    """MVAM as open_clip's loops call a model; the same weights under the same names."""

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        """As `MVAM.forward`, with open_clip's argument names and without the keys that hold nothing: gradient
        accumulation concatenates every value that a model returns."""
        return {name: value for name, value in super().forward(image, text).items() if value is not None}

    def set_grad_checkpointing(self, enable: bool = True, **options) -> None:
        self.clip.set_grad_checkpointing(enable, **options)  # the loop of open_clip 4 gives an option, `impl`


@contextlib.contextmanager
def mvam_training(settings: Settings) -> Iterator[ModuleType]:
    """Inside the block, `open_clip_train.main.main(arguments)` trains MVAM. Yields that module.

    Replaced in it, and put back at the end of the block, whatever happens there: `create_model_and_transforms`; and

    - in open_clip 3: `create_loss`, and `optim`, in which only AdamW differs: no weight decay for view codes. Besides,
      timm's `create_optimizer_v2` is handed the model out of its DistributedDataParallel wrapper, behind which it does
      not find `no_weight_decay`.
    - in the coming open_clip 4, told by its feature: `create_task`. Its optimizers ask `no_weight_decay` themselves.
    """
    loop = require("open_clip_train.main", extra="scale")
    replaced = _replacements(loop, _Run(settings))
    stock = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield loop
    finally:
        for module, name, value in stock:
            setattr(module, name, value)


def _replacements(loop: ModuleType, run: _Run) -> list[tuple[ModuleType, str, object]]:
    """(module, name, what takes its place); ImportError where `loop` is one that MVAM cannot be put into."""
    names = ("create_model_and_transforms", "create_loss", "create_task", "optim")
    found = [name for name in names if hasattr(loop, name)]
    model = (loop, "create_model_and_transforms", run.create_model_and_transforms)
    if set(found) >= {"create_model_and_transforms", "create_loss", "optim"}:
        timm_optim = require("timm.optim", extra="scale")
        return [
            model,
            (loop, "create_loss", functools.partial(run.create_loss, loop.create_loss)),
            (loop, "optim", SimpleNamespace(**{**vars(loop.optim), "AdamW": run.adamw})),
            (timm_optim, "create_optimizer_v2", _unwrapped(timm_optim.create_optimizer_v2)),
        ]
    if set(found) >= {"create_model_and_transforms", "create_task"}:
        return [model, (loop, "create_task", functools.partial(run.create_task, loop.create_task))]
    version = require("open_clip", extra="scale").__version__
    raise ImportError(
        f"open_clip_train.main of open_clip {version} has {', '.join(found) or 'none'} of {', '.join(names)}, which is "
        "too little to put MVAM into it; take a version that is known to work: pip install 'open_clip_torch==3.3.0'"
    )


class _Run:
    """The replacements for one block of `mvam_training`, and the model they share."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model: LoopMVAM | None = None
        self._loss()  # a wrong setting is told now, not when the data has been read

    def _loss(self, **arguments) -> MVAMLoss:
        return MVAMLoss(self.settings.diversity_weight, self.settings.diversity_kind, **arguments)

    def create_model_and_transforms(self, model_name: str, pretrained: str | None = None, **arguments):
        if self.model is not None:
            raise ValueError(
                "a second model in one mvam_training: distillation (--distill-model) is not supported, "
                "and each training needs a block of its own"
            )
        if arguments.get("jit"):
            raise ValueError("--torchscript: MVAM is not scriptable")
        # Without views it holds the encoder and what is needed to build it again, and draws no random numbers.
        plain, train, val = create_model_and_transforms(model_name, pretrained, 0, global_view=True, **arguments)
        settings = self.settings
        self.model = LoopMVAM(
            plain.clip, settings.views, global_view=settings.global_view, scoring=settings.scoring,
            key_dim=settings.key_dim, backend=settings.backend, open_clip_config=plain.open_clip_config,
        )  # fmt: skip
        return self.model, train, val

    def create_loss(self, stock, args) -> MVAMLoss:
        self._save_config(args)
        return self._loss(contrastive=stock(args))

    def create_task(self, stock, args, **arguments):
        self._save_config(args)
        task = stock(args, **arguments)
        task.loss = self._loss(contrastive=task.loss)
        return task

    def _save_config(self, args) -> None:
        """Checkpoints hold weights alone: what `convert` needs besides is put beside them."""
        folder = Path(args.checkpoint_path)
        # A resumed run has it already, and it must outlive an attempt to resume with other settings.
        if args.rank == 0 and (args.resume is None or not (folder / MVAM_CONFIG).exists()):
            self.model.save_config(folder)

    def adamw(self, groups: list[dict], **options) -> torch.optim.AdamW:
        """AdamW with the loop's groups, but MVAM's own parameters without weight decay. The loop spares parameters of
        one dimension; the codes have two. The encoder's stay where the loop puts them."""
        names = (name for name in self.model.no_weight_decay() if not name.startswith("clip."))
        spared = {id(self.model.get_parameter(name)) for name in names}
        moved = []
        for group in groups:
            if group["weight_decay"]:
                moved += [parameter for parameter in group["params"] if id(parameter) in spared]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in spared]
        return torch.optim.AdamW([*groups, {"params": moved, "weight_decay": 0.0}] if moved else groups, **options)


def _unwrapped(create_optimizer):
    def create(model, *args, **kwargs):
        return create_optimizer(getattr(model, "module", model), *args, **kwargs)

    return create


def convert(checkpoint: str | Path, out: str | Path) -> Path:
    """Turns a checkpoint of a training of MVAM (`epoch_1.pt`) into a folder for `MVAM.from_pretrained`, `mvam-fast
    evaluate` and the exports.

    The two JSON files that the training wrote beside the checkpoint must still be there. Returns `out`.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {checkpoint}")
    configs = [checkpoint.with_name(name) for name in (OPEN_CLIP_CONFIG, MVAM_CONFIG)]
    missing = [str(config) for config in configs if not config.is_file()]
    if missing:
        raise FileNotFoundError(
            f"checkpoint: {checkpoint} must lie beside the configs that its training wrote; not there: "
            f"{', '.join(missing)}"
        )
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = content.get("state_dict", content)
    save_file = require("safetensors.torch", extra="train").save_file
    with tempfile.TemporaryDirectory() as folder:
        for config in configs:
            Path(folder, config.name).write_bytes(config.read_bytes())
        # Distributed training saves the names of the wrapper.
        save_file(
            {name.removeprefix("module."): tensor.contiguous() for name, tensor in weights.items()},
            Path(folder, WEIGHTS),
        )
        MVAM.from_pretrained(folder).save_pretrained(out)  # only after a strict look at names and shapes
    return out


def write_csv(
    data: str | Path, images: str | Path, split: str, out: str | Path, *, captions_per_image: int | None = None
) -> Path:
    """Writes the CSV that open_clip reads (tab separated, `filepath` and `title`) from data in Karpathy's format: one
    row for each caption, with absolute paths. Arguments as of `KarpathyDataset`; returns `out`."""
    from .retrieval.data.datasets import KarpathyDataset

    dataset = KarpathyDataset(data, images, split, captions_per_image=captions_per_image)
    with atomic(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["filepath", "title"])
        for path, captions in zip(dataset.image_paths, dataset.captions, strict=True):
            writer.writerows(zip(itertools.repeat(path.resolve()), captions, strict=False))
    return Path(out)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"convert": _convert_command, "csv": _csv_command}
    if arguments[:1] and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _train_command(arguments)


PROGRAM = "python -m mvam_fast.open_clip_training"


def _train_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, usage="%(prog)s [options] -- arguments of open_clip_train",
        description="Train MVAM with open_clip's own training loop.",
        epilog=f"Other commands, each with --help: {PROGRAM} csv (data for open_clip), {PROGRAM} convert (a checkpoint "
        "into a model folder). See docs/open_clip_training.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    default = Settings()
    parser.add_argument("--views", type=int, default=default.views, help="learned views")
    parser.add_argument("--global-view", action="store_true", help="keep the encoder's own vector as one more view")
    parser.add_argument("--scoring", choices=SCORINGS, default=default.scoring, help="how codes score tokens")
    parser.add_argument("--key-dim", type=int, default=default.key_dim, help="width of the keys, if not the tokens'")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default=default.backend, help="of the op")
    parser.add_argument(
        "--diversity-weight", type=float, default=default.diversity_weight, help="of each tower's diversity loss"
    )
    parser.add_argument("--diversity-kind", choices=DIVERSITY_KINDS, default=default.diversity_kind, help="its formula")
    own, passed_on = arguments, None
    if "--" in arguments:
        own, passed_on = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    options = parser.parse_args(own)
    if passed_on is None:
        parser.error("the arguments of open_clip_train come after ' -- '")
    with contextlib.ExitStack() as stack:
        try:
            settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
            loop = stack.enter_context(mvam_training(settings))
        except (ValueError, ImportError) as error:
            parser.error(str(error))
        # It reports what stops it before it begins (a run of that name exists) by -1 and a line on stdout.
        return 1 if loop.main(passed_on) == -1 else 0


def _convert_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} convert", description="A checkpoint of open_clip_train into a model folder of mvam_fast."
    )
    parser.add_argument("checkpoint", help="LOGS/NAME/checkpoints/epoch_N.pt")
    parser.add_argument("--out", required=True, help="folder to write: for mvam-fast evaluate, export/to_onnx.py, ...")
    options = parser.parse_args(arguments)
    return _report(parser, lambda: convert(options.checkpoint, options.out))


def _csv_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} csv", description="The CSV that open_clip_train reads, from data in Karpathy's format."
    )
    parser.add_argument("--data", required=True, help="Karpathy JSON")
    parser.add_argument("--images", required=True, help="folder of its images")
    parser.add_argument("--split", required=True, help="train, val or test")
    parser.add_argument("--captions-per-image", type=int, help="keep the first so many; 1 for --val-data")
    parser.add_argument("--out", required=True, help="file to write, .csv")
    options = parser.parse_args(arguments)
    return _report(
        parser,
        lambda: write_csv(
            options.data, options.images, options.split, options.out, captions_per_image=options.captions_per_image
        ),
    )


def _report(parser: argparse.ArgumentParser, work) -> int:
    try:
        print(work())
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
