"""One export: of which model and in which form, what it cost, and how near to PyTorch its vectors are."""
from __future__ import annotations

import copy
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from encoder_models import CLIP, FUSED, TOWERS, random_model
from gate import reason
from mvam_fast.export import samples, to_aoti, to_onnx
from mvam_fast.export.source import Source, of_model, open_source
from torch._inductor.utils import fresh_cache

from mvam_fast.converters import fuse_attention_poolers
from mvam_fast.factory import open_clip_with_own_configs

POOLER, CHECKPOINT = "fused pooler", "checkpoint"
VARIANTS = (CLIP, FUSED, POOLER, CHECKPOINT)
AOTI = "aoti"
FORMS = {  # name: arguments of the export
    "fp32 plain": {}, "fp32 node": {"pooling": "node"}, "fp32 opset 23": {"opset": 23},
    "fp16 plain": {"precision": "fp16"}, "fp16 node": {"precision": "fp16", "pooling": "node"},
    "int8": {"precision": "int8"}, AOTI: {},
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model to export; `make` builds it, in float32."""

    model: str
    variant: str
    make: Callable[[], Source] = field(compare=False)

    def can(self, form: str) -> bool:
        """Nothing in plain CLIP pools by views: there the node would be the plain form under another name."""
        return self.variant != CLIP or FORMS[form].get("pooling") != "node"


def views_subject(name: str, variant: str, views: int) -> Subject:
    """Plain CLIP or MVAM over it, both with the weights that `encoder_models.Compared` has."""

    def make() -> Source:
        model = random_model(name, views)
        return of_model(model.clip if variant == CLIP else model, model.open_clip_config)

    return Subject(name, variant, make)


def pooler_subject(name: str, folder: Path) -> Subject:
    """An open_clip model whose attention pooler runs as the fused op (SigLIP's); its tokenizer lies in `folder`."""

    def make() -> Source:
        open_clip = open_clip_with_own_configs()
        torch.manual_seed(0)
        model = open_clip.create_model(name)
        if not fuse_attention_poolers(model):
            raise ValueError(f"siglip: {name} has no attention pooler that fuses")
        model_cfg = copy.deepcopy(open_clip.get_model_config(name))
        if model_cfg["text_cfg"].get("hf_tokenizer_name"):
            model_cfg["text_cfg"]["hf_tokenizer_name"] = str(small_tokenizer(folder))
        config = {"model_cfg": model_cfg, "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
        return of_model(model, config)

    return Subject(name, POOLER, make)


def small_tokenizer(folder: Path) -> Path:
    """A Hugging Face tokenizer that stands in for one that would have to be downloaded: pairs of bytes, learned from
    the sentences that exports are checked with. Returns `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(samples.SENTENCES, trainer)
    end = (specials[1], tokenizer.token_to_id(specials[1]))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {specials[1]}", special_tokens=[end])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[1])
    wrapped.save_pretrained(folder)
    return folder


def checkpoint_subject(folder: Path) -> Subject:
    return Subject(checkpoint_name(folder), CHECKPOINT, partial(open_source, folder))


def checkpoint_name(folder: Path) -> str:
    """What tells checkpoints apart, without where they lie: training calls each of them "model"."""
    return "/".join(folder.resolve().parts[-2:])


def load_exporter() -> None:
    """What torch.onnx loads when first used is no part of any export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own internals
        torch.onnx.export(torch.nn.Linear(1, 1).eval(), (torch.zeros(1, 1),), dynamo=True, verbose=False)


class Exports:
    """Bundles below `folder`: each is made once. Those of `keep` stay; `made` have stayed from earlier.

    The model that was exported last is held, since its other forms come next.
    """

    def __init__(self, folder: Path, device: torch.device, keep: Collection = (), made: Collection = ()):
        self._folder, self._device, self._keep = folder, device, set(keep)
        self._found: dict[tuple[Subject, str], Path | Exception] = {
            key: self._path(*key) for key in made if self._path(*key).is_dir()
        }
        self._held: tuple[Subject, Source] | None = None

    def measure(self, subject: Subject, form: str, tick: Callable[[str], object]) -> list[dict]:
        """The row of an export, with a reason instead of numbers if it failed. `tick(text)` is called as it begins."""
        tick(f"{subject.model} {subject.variant}, {form}")
        row = {"work": "export", "model": subject.model, "variant": subject.variant, "form": form}
        path = self._path(subject, form)
        try:
            seconds, manifest = self._export(subject, form)
            return [row | {"seconds": seconds} | facts(path, manifest)]
        except Exception as error:
            self._found[subject, form] = error
            return [row | {"reason": reason(error)}]
        finally:
            if (subject, form) not in self._keep:
                shutil.rmtree(path, ignore_errors=True)

    def of(self, subject: Subject, form: str) -> Path:
        """The bundle; an export that failed once is not tried again."""
        if (subject, form) not in self._found:
            try:
                self._export(subject, form)
            except Exception as error:
                self._found[subject, form] = error
        found = self._found[subject, form]
        if isinstance(found, Exception):
            raise found
        return found

    def let_go(self) -> None:
        """Frees the model that is held."""
        self._held = None

    def _export(self, subject: Subject, form: str) -> tuple[float, dict]:
        if self._held is None or self._held[0] != subject:
            self.let_go()  # before the next is made: two would need twice the memory
            self._held = subject, subject.make()
        source, path = self._held[1], self._path(subject, form)
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        if form == AOTI:
            with fresh_cache():  # an earlier run's kernels would make compiling look cheap
                manifest = to_aoti.export_bundle(source, path, device=self._device.type, progress=False)
        else:
            manifest = to_onnx.export_bundle(source, path, progress=False, **FORMS[form])
        seconds = time.perf_counter() - began
        self._found[subject, form] = path
        return seconds, manifest

    def _path(self, subject: Subject, form: str) -> Path:
        return self._folder / re.sub(r"[^A-Za-z0-9]+", "-", f"{subject.model} {subject.variant} {form}")


def facts(bundle: Path, manifest: dict) -> dict:
    """What a bundle.json says, by tower, and the bytes of the encoders' files."""
    towers = {}
    for tower in TOWERS:
        graph = manifest.get("graphs", {}).get(tower, {})
        towers[tower] = {
            "bytes": sum(path.stat().st_size for path in bundle.glob(f"{tower}.*")),
            "pooling": manifest["pooling"][tower], "parity": manifest["parity"][tower],
            **{name: graph[name] for name in ("nodes", "opset", "int8_products") if name in graph},
        }  # fmt: skip
        if "half_arithmetic" in manifest:
            towers[tower]["half_arithmetic"] = manifest["half_arithmetic"][tower]
    return {"bytes": sum(about["bytes"] for about in towers.values()), "views": manifest["num_views"], "towers": towers}
