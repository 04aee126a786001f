"""A fine-grained image-caption set that can be made anywhere: small scenes, in Karpathy's format.

Three to five objects (6 shapes, 8 colours, 2 sizes, 3 textures) stand on a 4×4 grid. Each scene draws from a small
palette, so that attributes repeat and a caption must bind them to the right object. Scenes come in families of four: a
base and three copies with one edit each (two colours or two places swapped, one attribute changed), which a single
vector finds hard to tell apart. Five captions per image, one of each template, name subsets of the scene.
"""
from __future__ import annotations

import copy
import multiprocessing
import os
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .._optional import require
from ..files import atomic, read_json, write_json

GRID = 4
FAMILY = 4
SPLITS = ("train", "val", "test")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
COLORS = {
    "red": (214, 40, 40), "green": (44, 160, 44), "blue": (50, 90, 220), "yellow": (240, 220, 60),
    "purple": (140, 60, 180), "orange": (245, 140, 30), "cyan": (70, 210, 220), "white": (245, 245, 245),
}  # fmt: skip
BACKGROUNDS = {"gray": (110, 110, 110), "dark": (30, 30, 36), "brown": (95, 66, 42), "navy": (24, 30, 76)}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {3: "three", 4: "four", 5: "five"}


def random_scene(rng: np.random.Generator) -> dict:
    """{"objects": [{shape, color, size, texture, row, column}], "background", "gradient"}, all by name or number."""
    count = int(rng.integers(3, 6))
    cells = rng.choice(GRID * GRID, count, replace=False)
    colors = rng.choice(list(COLORS), rng.integers(2, 5), replace=False)
    shapes = rng.choice(SHAPES, rng.integers(2, 5), replace=False)
    pairs = [(str(shape), str(color)) for shape in shapes for color in colors]
    rng.shuffle(pairs)
    objects = []
    for index, cell in enumerate(cells):
        shape, color = pairs[index % len(pairs)]
        objects.append({
            "shape": shape, "color": color, "size": str(rng.choice(SIZES)),
            "texture": str(rng.choice(TEXTURES, p=(0.5, 0.25, 0.25))),
            "row": int(cell) // GRID, "column": int(cell) % GRID,
        })  # fmt: skip
    background = str(rng.choice(list(BACKGROUNDS)))
    return {"objects": objects, "background": background, "gradient": bool(rng.integers(2))}


def edited(scene: dict, rng: np.random.Generator) -> dict:
    """A copy of the scene with one edit."""
    scene = copy.deepcopy(scene)
    first, second = (scene["objects"][i] for i in rng.choice(len(scene["objects"]), 2, replace=False))
    edit = rng.choice(("swap colors", "swap places", "size", "texture", "color"))
    if edit == "swap colors":
        first["color"], second["color"] = second["color"], first["color"]
    elif edit == "swap places":
        for axis in ("row", "column"):
            first[axis], second[axis] = second[axis], first[axis]
    else:
        values = {"size": SIZES, "texture": TEXTURES, "color": tuple(COLORS)}[edit]
        first[edit] = str(rng.choice([value for value in values if value != first[edit]]))
    return scene


def random_family(rng: np.random.Generator) -> list[dict]:
    """Four scenes that all differ: a base and three single edits of it."""
    family = [random_scene(rng)]
    while len(family) < FAMILY:
        scene = edited(family[0], rng)
        if all(picture_key(scene) != picture_key(other) for other in family):
            family.append(scene)
    return family


def picture_key(scene: dict) -> tuple:
    """What can be seen of a scene, whatever the order of its objects."""
    return scene["background"], scene["gradient"], tuple(sorted(tuple(o.values()) for o in scene["objects"]))


def draw(scene: dict, size: int, rng: np.random.Generator):
    """The scene as a PIL image of size × size pixels, with jitter of a pixel and a little noise."""
    image, image_draw = require("PIL.Image", extra="train"), require("PIL.ImageDraw", extra="train")
    canvas = np.empty((size, size, 3))
    canvas[:] = BACKGROUNDS[scene["background"]]
    if scene["gradient"]:
        ramp = np.linspace(0.6, 1.6, size)
        canvas *= (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    canvas += rng.normal(0, 3, canvas.shape)
    rows, columns = np.mgrid[:size, :size]
    cell = size // GRID
    for item in scene["objects"]:
        x, y = (item[axis] * cell + cell // 2 + int(rng.integers(-1, 2)) for axis in ("column", "row"))
        radius = cell * (7 if item["size"] == "large" else 4) // 16
        stencil = image.new("L", (size, size))
        _outline(image_draw.Draw(stencil), item["shape"], x, y, radius)
        shade = np.ones((size, size))
        if item["texture"] == "striped":
            shade = np.where(rows // 2 % 2, 0.35, 1.0)
        elif item["texture"] == "dotted":
            shade = np.where((rows // 2 % 2 == 0) & (columns // 2 % 2 == 0), 0.2, 1.0)
        inside = np.asarray(stencil) > 0
        canvas[inside] = (np.array(COLORS[item["color"]]) * shade[..., None])[inside]
    return image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _outline(pen, shape: str, x: int, y: int, r: int) -> None:
    thin = max(1, r // 3)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        pen.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=255)
    elif shape == "triangle":
        pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=255)
    elif shape == "diamond":
        pen.polygon(((x, y - r), (x + r, y), (x, y + r), (x - r, y)), fill=255)
    elif shape == "cross":
        pen.rectangle((x - thin, y - r, x + thin, y + r), fill=255)
        pen.rectangle((x - r, y - thin, x + r, y + thin), fill=255)
    else:
        pen.rectangle((x - r, y - r // 2, x + r, y + r // 2), fill=255)


def quadrant(item: dict) -> str:
    half = GRID // 2
    return f"{'top' if item['row'] < half else 'bottom'} {'left' if item['column'] < half else 'right'}"


def relation_holds(relation: str, a: dict, b: dict) -> bool:
    return {
        "left of": a["column"] < b["column"], "right of": a["column"] > b["column"],
        "above": a["row"] < b["row"], "below": a["row"] > b["row"],
    }[relation]  # fmt: skip


def captions(scene: dict, rng: np.random.Generator) -> list[dict]:
    """Five captions, each {"raw": text, "claims": what it says}; see `scene_truth.is_true` for the claims' meaning."""
    order = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))]
    first, second, third = order[:3]

    def mention(item: dict, chance: float, with_quadrant: bool = False) -> tuple[str, dict]:
        claim = {"shape": item["shape"], "color": item["color"]}
        if rng.random() < chance:
            claim["size"] = item["size"]
        if item["texture"] != "plain" and rng.random() < chance:
            claim["texture"] = item["texture"]
        words = [claim.get("size"), claim.get("texture"), item["color"], item["shape"]]
        if with_quadrant:
            claim["quadrant"] = quadrant(item)
            words += ["at the", claim["quadrant"]]
        phrase = " ".join(word for word in words if word)
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}", claim

    (a, claim_a), (b, claim_b) = mention(first, 1), mention(second, 1)
    found = [{"raw": f"{a} and {b}", "claims": {"objects": [claim_a, claim_b]}}]

    mentions = [mention(item, 0.25) for item in (first, second, third)]
    (a, b, c), claims = zip(*mentions, strict=True)
    found.append({"raw": f"{a}, {b} and {c}", "claims": {"objects": list(claims)}})

    (a, claim_a), (b, claim_b) = mention(first, 0.5), mention(second, 0.5)
    relation = str(rng.choice([r for r in RELATIONS if relation_holds(r, first, second)]))
    found.append({"raw": f"{a} {relation} {b}", "claims": {"objects": [claim_a, claim_b], "relation": relation}})

    (a, claim_a), (b, claim_b) = mention(first, 0.3, True), mention(second, 0.3, True)
    found.append({"raw": f"{a}, {b}", "claims": {"objects": [claim_a, claim_b]}})

    (a, claim_a), (b, claim_b) = mention(first, 0.3), mention(second, 0.3)
    ground = f"{scene['background']}{' gradient' if scene['gradient'] else ''}"
    claims = {"objects": [claim_a, claim_b], "count": len(order)}
    claims |= {"background": scene["background"], "gradient": scene["gradient"]}
    text = f"{NUMBERS[len(order)]} objects on {ground} background with {a} and {b}"
    found.append({"raw": text, "claims": claims})
    return found


def _write_family(job: tuple) -> list[dict]:
    """Draws one family into its folder; its rows of the JSON. Depends on the job alone, so any process may do it."""
    folder, split, index, image_size, seed = job
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    rows = []
    for member, scene in enumerate(random_family(rng)):
        name = f"{index * FAMILY + member:06d}.png"
        draw(scene, image_size, rng).save(Path(folder) / split / name, compress_level=1)
        sentences = captions(scene, rng)
        for sentence in sentences:
            sentence["tokens"] = sentence["raw"].replace(",", "").split()
        row = {"filepath": split, "filename": name, "split": split}
        rows.append({**row, "family": index, "scene": scene, "sentences": sentences})
    return rows


def make_scenes(
    out: str | Path,
    *,
    train: int = 16000,
    val: int = 1000,
    test: int = 1000,
    image_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes OUT/dataset_scenes.json (Karpathy's format), OUT/images/SPLIT/*.png and OUT/preview.png.

    The same arguments give the same bytes, whatever the number of processors. An `out` that already holds this very set
    is left as it is.

    Args:
        train, val, test: images of each split, multiples of 4 (the family); the splits are disjoint by their seeds.
        image_size: pixels per side, a multiple of 16.

    Returns:
        the path of the JSON.
    """
    counts = {"train": train, "val": val, "test": test}
    for name, count in counts.items():
        if count < FAMILY or count % FAMILY:
            raise ValueError(f"{name} is {count}; it must be a positive multiple of {FAMILY}")
    if image_size < 32 or image_size % 16:
        raise ValueError(f"image_size is {image_size}; it must be a multiple of 16, at least 32")
    config = {**counts, "image_size": image_size, "seed": seed}
    out = Path(out)
    target = out / "dataset_scenes.json"
    if target.exists():
        present = read_json(target, "out").get("config")
        if present == config:
            return target
        raise ValueError(f"out: {out} holds scenes made with {present}, not {config}; choose another folder")

    folder = out / "images"
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
    jobs = [(folder, s, i, image_size, seed) for s in SPLITS for i in range(counts[s] // FAMILY)]
    images = []
    tqdm = require("tqdm", extra="train").tqdm
    bar = tqdm(total=len(jobs) * FAMILY, desc="scenes", unit="image", disable=not progress)
    workers = min(os.cpu_count() or 1, 8) if len(jobs) > 200 else 0
    with bar:
        for rows in _run(jobs, workers):
            images += rows
            bar.update(len(rows))
    sentence_id = 0
    for image_id, row in enumerate(images):
        row["imgid"] = image_id
        for sentence in row["sentences"]:
            sentence |= {"imgid": image_id, "sentid": sentence_id}
            sentence_id += 1
        row["sentids"] = [sentence["sentid"] for sentence in row["sentences"]]
    _preview(images, folder, out / "preview.png")
    write_json(target, {"dataset": "scenes", "config": config, "images": images})
    return target


def _run(jobs, workers):
    if not workers:
        yield from map(_write_family, jobs)
        return
    # Spawned, not forked: the caller may hold threads of torch.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_family, jobs, chunksize=25)


def _preview(images: list[dict], folder: Path, path: Path) -> None:
    """Three families with one caption each, for people."""
    figure_class = require("matplotlib.figure", extra="train").Figure
    image = require("PIL.Image", extra="train")
    families = min(3, len(images) // FAMILY)
    figure = figure_class(figsize=(11, 3.2 * families), dpi=100, layout="constrained")
    axes = figure.subplots(families, FAMILY, squeeze=False)
    for index, axis in enumerate(axes.flat):
        row = images[index]
        axis.imshow(image.open(folder / row["filepath"] / row["filename"]), interpolation="nearest")
        axis.set_title(textwrap.fill(row["sentences"][index % 5]["raw"], 34), fontsize=9)
        axis.set_axis_off()
    with atomic(path) as temporary:
        figure.savefig(temporary)
