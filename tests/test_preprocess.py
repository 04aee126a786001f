"""Tokenizers of a model's text_cfg."""
import pytest
import torch

open_clip = pytest.importorskip("open_clip")
from mvam_fast.preprocess import tokenizer_of  # noqa: E402

TEXTS = ["a red circle", "two dogs run across a field of snow", ""]


def test_clips_own_tokenizer_at_any_length():
    ids = tokenizer_of({"context_length": 9})(TEXTS)
    assert ids.shape == (3, 9) and torch.equal(ids, open_clip.SimpleTokenizer(context_length=9)(TEXTS))


def test_a_configuration_cannot_ask_to_run_code():
    with pytest.raises(ValueError, match="tokenizer_kwargs holds trust_remote_code"):
        tokenizer_of({"hf_tokenizer_name": "someone/else", "tokenizer_kwargs": {"trust_remote_code": True}})


def test_a_tokenizer_of_hugging_face_by_name_or_folder(tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *"a red circle two dogs run".split()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path)
    ids = tokenizer_of({"hf_tokenizer_name": str(tmp_path), "context_length": 5})(TEXTS)
    assert ids.tolist() == [[2, 3, 4, 0, 0], [5, 6, 7, 1, 2], [0, 0, 0, 0, 0]]
