"""Image-caption data: Karpathy's format (COCO, Flickr30K, scenes), and the choice among formats."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

from ...files import read_json
from .batches import PairBatches
from .caption_tables import CaptionTable
from .captioned import CaptionedImages, check_limit, check_local, first_repeated, keep_captions
from .image_store import ImageStore
from .images import UnreadableImage, read_image
from .shards import ShardDataset

__all__ = ["ImageStore", "KarpathyDataset", "PairBatches", "UnreadableImage", "open_dataset", "read_image"]


def open_dataset(
    data: str | Path | list[str | Path] | tuple[str | Path, ...],
    images: str | Path | None = None,
    split: str = "train",
    *,
    captions_per_image: int | None = None,
) -> CaptionedImages:
    """Image-caption data in the format that its name tells.

    Args:
        data: FILE.json in Karpathy's format (`KarpathyDataset`), a table FILE.csv or FILE.tsv (`CaptionTable`), or tar
            files as webdataset writes them: FILE.tar, a pattern or a list of them (`ShardDataset`). Local files.
        images: the folder of the images. Needed with a JSON; with a table what relative paths start from, if not the
            table's own folder; not for tar files, which hold their images.
        split: of a JSON "train" (with "restval"), "val" or "test". Other formats have no splits: it only names them.
        captions_per_image: keep the first this many of each image; None keeps all.
    """
    several = isinstance(data, (list, tuple))
    if not several:
        check_local(str(data))
    ending = ".tar" if several else Path(data).suffix.lower()
    if ending == ".json":
        if images is None:
            raise ValueError(f"images is None; {data} needs the folder of its images")
        return KarpathyDataset(data, images, split, captions_per_image=captions_per_image)
    if ending in (".csv", ".tsv"):
        return CaptionTable(data, images, split, captions_per_image=captions_per_image)
    # A list in braces may hold the ending: "{a.tar,b.tar}".
    if ending == ".tar" or "}" in ending:
        if images is not None:
            raise ValueError(f"images is {str(images)!r}; it must be left out, for tar files hold their images")
        return ShardDataset(data, split, captions_per_image=captions_per_image)
    raise ValueError(f"data is {str(data)!r}; it must be a .json (Karpathy's format), .csv, .tsv or .tar (webdataset)")


class KarpathyDataset(CaptionedImages):
    """One split of a `dataset_*.json` in Karpathy's format; the attributes are those of `CaptionedImages`.

    Args:
        json_path: dataset_coco.json, dataset_flickr30k.json, or what `mvam-fast scenes` wrote.
        image_root: the images' folder: IMAGE_ROOT/filepath/filename (COCO, scenes) or IMAGE_ROOT/filename (Flickr30K).
        split: "train", "val" or "test". "train" takes "restval" too, as the literature does on COCO.
        captions_per_image: keep the first this many; 5 is the protocol of COCO 5K (25,010 captions become 25,000).

    ValueError names the row, as images[N], that lacks something, the image that has only empty captions, or the image
    that is there twice.
    """

    def __init__(
        self, json_path: str | Path, image_root: str | Path, split: str, *, captions_per_image: int | None = None
    ):
        root = Path(image_root)
        if not root.is_dir():
            raise FileNotFoundError(f"image_root: no such folder: {root}")
        check_limit(captions_per_image)
        content = read_json(json_path, "json_path")
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise ValueError(f"json_path: {json_path} has no list 'images'; it must be in Karpathy's format")
        for number, row in enumerate(content["images"]):
            fault = _fault(row)
            if fault:
                raise ValueError(f"json_path: {json_path}, images[{number}] {fault}")
        wanted = ("train", "restval") if split == "train" else (split,)
        rows = [row for row in content["images"] if row["split"] in wanted]
        if not rows:
            present = ", ".join(f"{name} ({n})" for name, n in Counter(r["split"] for r in content["images"]).items())
            raise ValueError(f"split is {split!r}; {json_path} has {present or 'no images'}")
        left_out: Counter[str] = Counter()
        captions = [keep_captions((s["raw"] for s in row["sentences"]), captions_per_image, left_out) for row in rows]
        bare = next((row for row, kept in zip(rows, captions, strict=True) if not kept), None)
        if bare is not None:
            raise ValueError(f"json_path: {json_path} has no sentence for the image {bare['filename']}")
        self.json_path, self.image_paths = Path(json_path), [_path(root, row) for row in rows]
        twice = first_repeated(self.image_paths)
        if twice is not None:
            raise ValueError(f"json_path: {json_path} has the image {twice} more than once in the split {split!r}")
        super().__init__(
            str(json_path), split, captions,
            [row.get("cocoid", row.get("imgid", index)) for index, row in enumerate(rows)],
            families=[row["family"] for row in rows] if all("family" in row for row in rows) else None,
            left_out=left_out,
        )  # fmt: skip

    def load_image(self, index: int):
        return read_image(self.image_paths[index])

    def image_name(self, index: int) -> str:
        return str(self.image_paths[index])


def _path(root: Path, row: dict) -> Path:
    return root / row.get("filepath", "") / row["filename"]


def _fault(row) -> str | None:
    """What is wrong with a row of 'images', or None."""
    if not isinstance(row, dict):
        return "is not an object"
    for key, kind in (("split", str), ("filename", str), ("sentences", list)):
        if not isinstance(row.get(key), kind):
            return f"has {row.get(key)!r} as {key!r}; it must be a {'string' if kind is str else 'list'}"
    for sentence in row["sentences"]:
        if not isinstance(sentence, dict) or not isinstance(sentence.get("raw"), str):
            return f"has the sentence {sentence!r}; it must be an object with a string 'raw'"
    return None
