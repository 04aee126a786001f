"""The files by which transformers' AutoImageProcessor, AutoTokenizer and AutoProcessor read an open_clip model's
folder, and a folder's tokenizer in the form of open_clip's.

They are written as plain JSON: neither transformers nor tokenizers is needed for that. docs/models.md says where they
differ from open_clip's own transform and tokenizer.
"""
from __future__ import annotations

import functools
import json
from pathlib import Path

from torch import Tensor

from ._optional import require
from .encoders import TRANSFORMERS_CONFIG
from .files import read_json, write_json, write_text

PREPROCESSOR_CONFIG = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_PROCESSOR = {"processor_class": "CLIPProcessor"}  # what AutoProcessor puts the two into


def write_open_clip(folder: Path, open_clip_config: dict, own_towers: list[str]) -> None:
    """Writes those of the files into `folder` that say exactly what this open_clip model needs; see docs/models.md.
    Nothing is said of `own_towers`, which took the place of the model's."""
    preprocessor = None if "image_tower" in own_towers else preprocessor_config(open_clip_config["preprocess_cfg"])
    if preprocessor is not None:
        write_json(folder / PREPROCESSOR_CONFIG, preprocessor)
    text_cfg = open_clip_config["model_cfg"]["text_cfg"]
    if "text_tower" not in own_towers and _has_clip_tokenizer(text_cfg):
        write_text(folder / TOKENIZER, _clip_tokenizer())
        write_json(folder / TOKENIZER_CONFIG, _clip_tokenizer_config(text_cfg.get("context_length") or 77))


def preprocessor_config(preprocess_cfg: dict) -> dict | None:
    """A `preprocess_cfg` as the config of a CLIPImageProcessor, or None where that cannot say it (resize_mode
    "longest", and "shortest" to what is no square)."""
    cfg = require("open_clip.transform", extra="train").PreprocessCfg(**preprocess_cfg)
    height, width = (cfg.size, cfg.size) if isinstance(cfg.size, int) else cfg.size
    if cfg.resize_mode == "squash":
        size, crop = {"height": height, "width": width}, {"do_center_crop": False}
    elif cfg.resize_mode == "shortest" and height == width:
        size = {"shortest_edge": height}
        crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    else:
        return None
    return {
        "image_processor_type": "CLIPImageProcessor", **_PROCESSOR,
        "do_convert_rgb": True,
        "do_resize": True, "size": size, "resample": 2 if cfg.interpolation == "bilinear" else 3,  # of PIL
        **crop,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(cfg.mean), "image_std": list(cfg.std),
    }  # fmt: skip


def preprocess_cfg(folder: str | Path) -> dict:
    """The `preprocess_cfg` of a folder's image processor, for `mvam_fast.preprocess.eval_transform`; ValueError where
    that cannot do what the processor does."""
    folder = Path(folder)
    whole = folder / "processor_config.json"  # transformers 5 writes a whole processor into one file
    config = read_json(whole, "folder").get("image_processor") if whole.is_file() else None
    config = config or read_json(folder / PREPROCESSOR_CONFIG, "folder")
    size = config.get("size") or {}
    square = "shortest_edge" in size
    found = {
        "size": size["shortest_edge"] if square else (size.get("height"), size.get("width")),
        "resize_mode": "shortest" if square else "squash",
        "interpolation": "bilinear" if config.get("resample") == 2 else "bicubic",
        "mean": config.get("image_mean") or [], "std": config.get("image_std") or [],
    }  # fmt: skip
    # It is right if it would be written as what was read, whatever the processor is called.
    said, meant = {"do_center_crop": False, **config}, preprocessor_config(found)
    names = meant.keys() - {"image_processor_type", "processor_class", "do_convert_rgb"}
    wrong = [f"{name} is {said.get(name)}" for name in sorted(names) if said.get(name) != meant[name]]
    if wrong:
        raise ValueError(f"folder: mvam_fast cannot do what the image processor in {folder} does: {'; '.join(wrong)}")
    return found


def _has_clip_tokenizer(text_cfg: dict) -> bool:
    """Whether the texts of this model are cut by CLIP's own tokenizer and end at its end-of-text token. Where they do
    not end there, padding would be read, and a tokenizer of transformers cannot pad by id 0, which is "!" here too."""
    options = {name: value for name, value in (text_cfg.get("tokenizer_kwargs") or {}).items() if value}
    return (
        not text_cfg.get("hf_tokenizer_name")
        and not text_cfg.get("tokenizer_type")  # tiktoken, in open_clip 4
        and text_cfg.get("text_arch", "clip") == "clip"
        and options.items() <= {"clean": "lower"}.items()
        and text_cfg.get("pool_type", "argmax") in ("argmax", "eos")
        and not text_cfg.get("no_causal_mask")
    )


def _clip_tokenizer_config(context_length: int) -> dict:
    start, end = _special_tokens()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", **_PROCESSOR,
        "bos_token": start["content"], "eos_token": end["content"], "pad_token": end["content"],
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in (start, end)
        },
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def _special_tokens() -> tuple[dict, dict]:
    """Start and end of text. open_clip looks for them in the text after cleaning and lowercasing it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    return ({"id": 49406, "content": "<start_of_text>", **flags}, {"id": 49407, "content": "<end_of_text>", **flags})


@functools.cache
def _clip_tokenizer() -> str:
    """open_clip's SimpleTokenizer as the content of a tokenizer.json."""
    tokenizer = require("open_clip", extra="train").SimpleTokenizer()
    start, end = _special_tokens()
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    # U+0345 alone is neither letter nor other for open_clip's pattern, which ignores case, and so is dropped by it.
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [start, end],
        "normalizer": {"type": "Sequence", "normalizers": _cleaning()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(start), _sequence("A", 0), _special(end)],
            "pair": [_special(start), _sequence("A", 0), _special(end), _sequence("B", 1), _special(end, 1)],
            "special_tokens": {
                token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
                for token in (start, end)
            },
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            _replace({"String": "</w>"}, " "),
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": tokenizer.encoder, "merges": [" ".join(merge) for merge in merges],
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False)


def _special(token: dict, type_id: int = 0) -> dict:
    return {"SpecialToken": {"id": token["content"], "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _cleaning() -> list[dict]:
    """What open_clip does to a text before it looks for words: ftfy's replacements of characters, and lowercase."""
    chars = require("ftfy.chardata", extra="train")
    # Python's lower() makes ς of Σ after a letter, perhaps with a mark between, where no letter follows in the word;
    # the normalizer looks at each character alone.
    cased, ignored = r"[\p{Lu}\p{Ll}\p{Lt}]", r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'.:·’]"
    final_sigma = rf"(?<={cased}|{cased}{ignored})Σ(?!{ignored}*{cased})"
    return [
        *[_replace({"String": chr(code)}, plain) for code, plain in (chars.LIGATURES | chars.WIDTH_MAP).items()],
        _replace({"Regex": chars.SINGLE_QUOTE_RE.pattern}, "'"),
        _replace({"Regex": chars.DOUBLE_QUOTE_RE.pattern}, '"'),
        _replace({"Regex": r"\x1B\[[0-9;]*[a-zA-Z]"}, ""),
        _replace({"Regex": r"[\x00-\x08\x0B\x0E-\x1F\x7F\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]"}, ""),
        {"type": "NFC"},
        _replace({"Regex": final_sigma}, "ς"),
        {"type": "Lowercase"},
    ]


class FolderTokenizer:
    """The tokenizer of transformers that lies in a model folder, called as open_clip's are: texts → ids [B,L]. L is the
    context length of the encoder if that is of transformers, else the longest of the texts."""

    def __init__(self, folder: Path):
        if not (folder / TOKENIZER_CONFIG).is_file():
            raise FileNotFoundError(
                f"folder: {folder} has no {TOKENIZER_CONFIG}; save the model with processor=... or tokenizer=..."
            )
        transformers = require("transformers", extra="hf")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.context_length = None
        if (folder / TRANSFORMERS_CONFIG).is_file():
            encoder = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            self.context_length = encoder.text_config.max_position_embeddings

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        return self.tokenizer(
            [texts] if isinstance(texts, str) else list(texts), return_tensors="pt",
            padding="max_length" if length else True, truncation=True, max_length=length,
        ).input_ids  # fmt: skip
