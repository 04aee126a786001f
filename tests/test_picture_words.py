"""Tokens as words: pieces merged, special tokens named, for every kind of tokenizer."""
import pytest
import torch

pytest.importorskip("open_clip")
from mvam_fast import get_tokenizer  # noqa: E402
from mvam_fast.retrieval.pictures.words import vocabulary_of, words_and_attention  # noqa: E402


@pytest.fixture(scope="module")
def clip_tokenizer():
    return get_tokenizer("scenes-ViT-T-16")


def attention_to(count, length, views=3):
    """Random attention [views,length] to the first `count` positions."""
    attention = torch.rand(views, length) + 0.01
    attention[:, count:] = 0
    return attention / attention.sum(1, keepdim=True)


def test_pieces_are_merged_into_words(clip_tokenizer):
    text = "a xylotile circle, unfathomableness!"
    ids = clip_tokenizer([text])[0]
    length = int(ids.argmax()) + 1
    attention = attention_to(length, 24)
    found = words_and_attention(clip_tokenizer, text, attention)
    assert found.words == ["⟨start⟩", "a", "xylotile", "circle", ",", "unfathomableness", "!", "⟨end⟩"]
    assert found.special == [True, *[False] * 6, True] and found.named
    torch.testing.assert_close(found.attention.sum(1), torch.ones(3))
    torch.testing.assert_close(found.attention[:, [0, 1, -1]], attention[:, [0, 1, length - 1]])
    pieces = [clip_tokenizer.decoder[token] for token in ids[:length].tolist()]
    end = pieces.index("circle</w>")
    assert end > 3  # the word before it has more than one piece
    torch.testing.assert_close(found.attention[:, 2], attention[:, 2:end].sum(1))


def test_any_script_is_read(clip_tokenizer):
    found = words_and_attention(clip_tokenizer, "café 東京 😀 $5", attention_to(24, 24))
    assert found.words[:7] == ["⟨start⟩", "café", "東京", "😀", "$", "5", "⟨end⟩"]


def test_padding_that_is_attended_is_one_column(clip_tokenizer):
    """A tower of fixed length reads what follows the end; id 0 is "!" in the vocabulary and padding here."""
    attention = attention_to(24, 24)
    found = words_and_attention(clip_tokenizer, "a dog!", attention)
    assert found.words == ["⟨start⟩", "a", "dog", "!", "⟨end⟩", "⟨padding ×19⟩"]
    torch.testing.assert_close(found.attention[:, -1], attention[:, 5:].sum(1))


def test_a_caption_that_was_cut_still_ends(clip_tokenizer):
    found = words_and_attention(clip_tokenizer, "dog " * 50, attention_to(24, 24))
    assert found.words == ["⟨start⟩", *["dog"] * 22, "⟨end⟩"]


PIECES = {
    "▁": ["▁a", "▁blue", "bell", "▁tree", "house", "!"],
    "Ġ": ["a", "Ġblue", "bell", "Ġtree", "house", "!"],
    "##": ["a", "blue", "##bell", "tree", "##house", "!"],
    "</w>": ["a</w>", "blue", "bell</w>", "tree", "house</w>", "!</w>"],
    "words": ["a", "bluebell", "treehouse", "!"],
}
MERGED = {
    "▁": ["a", "bluebell", "treehouse!"], "Ġ": ["a", "bluebell", "treehouse!"],
    "##": ["a", "bluebell", "treehouse", "!"], "</w>": ["a", "bluebell", "treehouse", "!"],
    "words": ["a", "bluebell", "treehouse", "!"],
}  # fmt: skip


def hugging_face(pieces, **special):
    """A fast tokenizer that maps a text of space-separated pieces to their ids, with start and end around."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    names = ["<s>", "</s>", "<pad>", "<unk>"]
    vocabulary = {piece: number for number, piece in enumerate([*names, *dict.fromkeys(pieces)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    if any("Ġ" in piece for piece in pieces):
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


class Wrapped:
    """As open_clip's HFTokenizer and a model folder's tokenizer are called."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts):
        return self.tokenizer(texts, return_tensors="pt", padding="max_length", max_length=12).input_ids


@pytest.mark.parametrize("mark", PIECES)
def test_pieces_of_hugging_face_tokenizers(mark):
    pieces = PIECES[mark]
    tokenizer = Wrapped(hugging_face(pieces))
    attention = attention_to(12, 12)
    found = words_and_attention(tokenizer, " ".join(pieces), attention)
    padding = 12 - len(pieces) - 2
    assert found.words == ["⟨start⟩", *MERGED[mark], "⟨end⟩", f"⟨padding ×{padding}⟩"]
    torch.testing.assert_close(found.attention.sum(1), torch.ones(3))
    if mark != "words":
        torch.testing.assert_close(found.attention[:, 2], attention[:, 2:4].sum(1))


def test_padding_may_share_the_id_of_the_end():
    """As in T5's and CLIP's tokenizers."""
    tokenizer = Wrapped(hugging_face(["a", "dog"], pad_token="</s>"))
    found = words_and_attention(tokenizer, "a dog", attention_to(12, 12))
    assert found.words == ["⟨start⟩", "a", "dog", "⟨end⟩", "⟨padding ×8⟩"]
    masked = words_and_attention(tokenizer, "a dog", attention_to(4, 12))  # no attention to padding: none shown
    assert masked.words == ["⟨start⟩", "a", "dog", "⟨end⟩"]


def test_a_class_token_and_an_unknown_word():
    tokenizer = hugging_face(["a", "dog"], bos_token=None, cls_token="<s>", sep_token="</s>", eos_token=None)
    found = words_and_attention(Wrapped(tokenizer), "a cat", attention_to(4, 12))
    assert found.words == ["⟨class⟩", "a", "<unk>", "⟨end⟩"]
    assert found.special == [True, False, False, True]


def test_the_folders_own_tokenizer_gives_the_same_words(clip_tokenizer, checkpoint_of):
    """open_clip's tokenizer, and the one of transformers that is saved with a model."""
    transformers = pytest.importorskip("transformers")
    saved = transformers.AutoTokenizer.from_pretrained(checkpoint_of("views"), local_files_only=True)

    def tokenize(texts):
        return saved(texts, return_tensors="pt", padding="max_length", max_length=24).input_ids

    tokenize.tokenizer = saved
    for text in ("a xylotile circle, unfathomableness!", "café 東京"):
        length = int(clip_tokenizer([text])[0].argmax()) + 1
        attention = attention_to(length, 24)
        ours, theirs = (words_and_attention(t, text, attention) for t in (clip_tokenizer, tokenize))
        assert ours.words == theirs.words and ours.special == theirs.special
        torch.testing.assert_close(ours.attention, theirs.attention)


def test_without_words_there_are_positions():
    def tokenizer(texts):
        return torch.arange(8)[None]

    assert vocabulary_of(tokenizer) is None
    attention = attention_to(5, 8)
    found = words_and_attention(tokenizer, "whatever", attention)
    assert found.words == ["1", "2", "3", "4", "5"] and not found.named and not any(found.special)
    torch.testing.assert_close(found.attention, attention[:, :5])
