"""Image-caption data in tar files, as webdataset writes them, read in any order."""
from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

from .captioned import CaptionedImages, check_limit, check_local, first_repeated, keep_captions
from .images import UnreadableImage, read_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class _Place(NamedTuple):
    """Where a file lies: which shard, the name inside it, and its bytes. A link has none."""

    shard: int
    name: str
    offset: int
    size: int
    is_link: bool


class ShardDataset(CaptionedImages):
    """Tar files of samples; the attributes are those of `CaptionedImages`.

    Files whose names differ only in what follows the first dot are a sample: one image (jpg, jpeg, png or webp), and
    its captions in a .json (`captions`, a list of strings, or `caption`, a string) or, without these, in a .txt (one).
    All headers are read once, and the captions; images are read when asked for, wherever they lie, so that a batch is a
    function of its step here too, and a run resumes exactly. Samples without an image or without a caption that is not
    empty are left out and counted in `left_out`, and so are those whose image is a hard or symbolic link.

    Args:
        shards: a path, a pattern with braces ("shards-{000..012}.tar", "{a,b}.tar") or wildcards ("shards-*.tar"), or a
            list of them. Local and not compressed.
        split: what to call the data; tar files have no splits.
        captions_per_image: keep the first this many of each image.

    An id is SHARD/KEY, SHARD relative to the folder that all shards share. ValueError names the shard that is not a
    whole tar file, or the file in it that is there twice or cannot be understood.
    """

    def __init__(
        self,
        shards: str | Path | list[str | Path] | tuple[str | Path, ...],
        split: str = "train",
        *,
        captions_per_image: int | None = None,
    ):
        check_limit(captions_per_image)
        self.shards = find_shards(shards)
        folder = Path(os.path.commonpath([shard.parent for shard in self.shards]))
        left_out: Counter[str] = Counter()
        self._places: list[_Place] = []
        captions, ids = [], []
        for number, shard in enumerate(self.shards):
            for key, image, raw in _samples(number, shard):
                kept = keep_captions(raw, captions_per_image, left_out)
                if image is None:
                    left_out["samples without an image"] += 1
                elif image.is_link:
                    left_out["samples whose image is a link"] += 1
                elif not kept:
                    left_out["samples without a caption"] += 1
                else:
                    self._places.append(image)
                    captions.append(kept)
                    ids.append(f"{shard.relative_to(folder)}/{key}")
        if not ids:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "no samples"
            raise ValueError(f"data: {_shown(shards)} has no image with a caption: {reasons}")
        super().__init__(_shown(shards), split, captions, ids, left_out=left_out)

    def load_image(self, index: int):
        place, name = self._places[index], self.image_name(index)
        try:
            content = _read(self.shards[place.shard], place)
        except OSError as error:
            raise UnreadableImage(f"cannot read the image {name}: {error}") from error
        return read_image(io.BytesIO(content), name)

    def image_name(self, index: int) -> str:
        place = self._places[index]
        return f"{self.shards[place.shard]}:{place.name}"


def find_shards(shards: str | Path | list[str | Path] | tuple[str | Path, ...]) -> list[Path]:
    """The tar files that paths and patterns stand for, in the order given; those of a wildcard by name."""
    given = [shards] if isinstance(shards, (str, Path)) else list(shards)
    found: list[Path] = []
    for pattern in map(str, given):
        check_local(pattern)
        for path in expand_braces(pattern):
            wild = re.search(r"[*?\[]", path) and not os.path.isfile(path)
            matching = sorted(glob(path)) if wild else [path]
            if not matching:
                raise FileNotFoundError(f"data: no file is called like {path}")
            found += map(Path, matching)
    missing = [path for path in found if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"data: {len(missing)} of {len(found)} shards do not exist, first: {missing[0]}")
    if not found:
        raise ValueError("data is an empty list; it must name at least one tar file")
    repeated = first_repeated(map(os.path.realpath, found))
    if repeated is not None:
        raise ValueError(f"data: the shard {repeated} is named more than once")
    return found


def expand_braces(pattern: str) -> list[str]:
    """ "a{00..02}.tar" → a00.tar, a01.tar, a02.tar; "{x,y}.tar" → x.tar, y.tar; the last of several turns fastest."""
    parts = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = []
    for text, inside in itertools.zip_longest(parts[::2], parts[1::2]):
        if "{" in text or "}" in text:
            raise ValueError(f"data: the braces of {pattern} do not match, or stand within each other")
        choices.append([text])
        if inside is not None:
            choices.append(_choices(inside, pattern))
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers:
        first, last = numbers.groups()
        if int(first) > int(last):
            raise ValueError(f"data: the range {{{inside}}} of {pattern} must run upwards")
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise ValueError(f"data: {{{inside}}} of {pattern} must be a range as {{000..012}} or a list as {{a,b}}")


def _samples(number: int, shard: Path) -> Iterator[tuple[str, _Place | None, list[str]]]:
    """(key, where the image lies if there is one, captions as they are) of each sample, in order of appearance. A link
    counts as a sample's image where it has no other."""
    samples: dict[str, dict[str, _Place]] = {}
    linked: dict[str, _Place] = {}
    for place in _files(number, shard):
        folder, _, name = place.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem or not extension:
            continue  # a hidden file, or one that belongs to no sample
        key = f"{folder}/{stem}" if folder else stem
        files = samples.setdefault(key, {})
        if place.is_link:
            if extension.lower() in IMAGE_EXTENSIONS:
                linked[key] = place
            continue
        if extension.lower() in files:
            raise ValueError(f"data: {shard} holds the file {place.name} more than once")
        files[extension.lower()] = place
    for key, files in samples.items():
        images = [files[extension] for extension in IMAGE_EXTENSIONS if extension in files]
        if len(images) > 1:
            raise ValueError(f"data: {shard} has two images for one sample: {images[0].name} and {images[1].name}")
        yield key, images[0] if images else linked.get(key), _captions(shard, files)


def _files(number: int, shard: Path) -> Iterator[_Place]:
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile() or member.islnk() or member.issym():
                    yield _Place(number, member.name, member.offset_data, member.size, not member.isfile())
            end = archive.offset  # of the first block that is no member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"data: {shard} is not a whole, uncompressed tar file: {error}") from error
    # Behind the first header tarfile takes a damaged one for the end, and a shard would lose samples without a word.
    with open(shard, "rb") as file:
        file.seek(end)
        if any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b"")):
            raise ValueError(f"data: {shard} is damaged, or two tar files in one: more follows its end at byte {end}")
        if file.tell() < end + _BLOCK:  # cut between two members, it would look like a shorter one
            raise ValueError(
                f"data: {shard} is not whole: it stops at byte {file.tell()} without the zeros that end a tar file"
            )


def _captions(shard: Path, files: dict[str, _Place]) -> list[str]:
    if "json" in files:
        place = files["json"]
        try:
            content = json.loads(_read(shard, place))
        except ValueError as error:
            raise ValueError(f"data: {shard}:{place.name} is not valid JSON ({error})") from error
        found = None
        if isinstance(content, dict):
            found = content["captions"] if content.get("captions") is not None else content.get("caption")
        if isinstance(found, str):
            return [found]
        if isinstance(found, list) and all(isinstance(caption, str) for caption in found):
            return found
        if found is not None:
            raise ValueError(f"data: {shard}:{place.name} has the captions {found!r}; they must be strings")
    if "txt" in files:
        try:
            return [_read(shard, files["txt"]).decode("utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {shard}:{files['txt'].name} is not UTF-8 ({error})") from error
    return []


def _read(shard: Path, place: _Place) -> bytes:
    # Opened each time: a file kept open has one position, which threads would share, and there may be thousands.
    with open(shard, "rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def _shown(shards) -> str:
    if isinstance(shards, (str, Path)):
        return str(shards)
    return str(shards[0]) if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
