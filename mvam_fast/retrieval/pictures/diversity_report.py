"""What `diversity` found, as a picture, a page and JSON."""
from __future__ import annotations

from html import escape
from pathlib import Path

from ...files import write_json, write_text
from ..page import picture, table, whole_page
from .drawing import BLUE, GREEN, GREY, ORANGE, new_figure, save

_COLOURS = (ORANGE, BLUE, GREEN, "#cc79a7", "#56b4e9", "#d55e00")


def write_report(report: dict, out: Path) -> dict:
    """Writes OUT/diversity.png, .html and .json; returns `report`, with a "sentence" added to each tower.

    `report`: model, data, split, mvam_fast (texts), unreadable_images, definitions {word: meaning}, towers {"image",
    "text"}: each what `ViewStatistics.result` gives.
    """
    for name, tower in report["towers"].items():
        tower["sentence"] = _sentence(name, tower)
    _draw(report["towers"], out / "diversity.png")
    sentences = " ".join(tower["sentence"] for tower in report["towers"].values())
    drawn = {"file": "diversity.png", "title": "Views of both towers", "caption": "† after a number: a dead view."}
    about = f"{report['model']} on the split {report['split']} of {report['data']}, mvam_fast {report['mvam_fast']}"
    if report["unreadable_images"]:
        about += f"; left out as unreadable: {report['unreadable_images']} images"
    body = [
        "<h1>Diversity of views</h1>", f"<p class='lead'>{escape(sentences)}</p>", f"<p>{escape(about)}.</p>",
        picture(drawn, out), *(_section(name, tower) for name, tower in report["towers"].items()),
        "<h2>What the words mean</h2>",
        *(f"<p><b>{escape(word)}</b>: {escape(meaning)}.</p>" for word, meaning in report["definitions"].items()),
    ]  # fmt: skip
    write_text(out / "diversity.html", whole_page(f"Diversity of views: {report['model']}", body))
    write_json(out / "diversity.json", report)
    return report


def _sentence(name: str, tower: dict) -> str:
    views, dead = len(tower["views"]), tower["dead"]
    found = f"{name.capitalize()} tower: {views - len(dead)} of {views} views live"
    if dead:
        why = (f"{view['view']} ({', '.join(view['dead'])})" for view in tower["views"] if view["dead"])
        found += f"; dead: {'; '.join(why)}"
    if tower["mean_cosine"] is not None:
        found += f"; mean cosine between views {tower['mean_cosine']:.2f}"
    return f"{found}; mean entropy {100 * tower['mean_entropy']:.0f} % of the largest possible."


def _section(name: str, tower: dict) -> str:
    shares = _shares(tower["views"])
    header = ["view", "entropy", "±", "cosine to others", "constancy", *(f"share on {s}" for s in shares)]
    gates = tower["views"][0]["gate"] is not None
    rows = []
    for view in tower["views"]:
        numbers = [view["cosine_to_others"], view["constancy"]]
        rows.append([
            view["view"], f"{100 * view['entropy']:.1f} %", f"{100 * view['entropy_spread']:.1f}",
            *("" if number is None else f"{number:.3f}" for number in numbers),
            *(f"{100 * view['share'][share]:.1f} %" for share in shares),
            *([f"{view['gate']:.2f}"] if gates else []), ", ".join(view["dead"]),
        ])  # fmt: skip
    what = f"{tower['samples']:,} {'images' if name == 'image' else 'captions'}, up to {tower['tokens']} tokens each."
    if not tower.get("special_tokens_known", True):
        what += " The tokenizer does not tell which tokens are special."
    cosine = [[row + 1, *(f"{value:.2f}" for value in line)] for row, line in enumerate(tower["cosine"])]
    matrix = table(["cosine", *range(1, len(cosine) + 1)], cosine)
    by_view = table([*header, *(["gate"] if gates else []), "dead"], rows)
    return (
        f"<h2>{escape(name.capitalize())} tower</h2><p>{escape(what)}</p>{by_view}"
        f"<details><summary>Cosine between every two views</summary>{matrix}</details>"
    )


def _shares(views: list[dict]) -> list[str]:
    """What attention falls on besides patches and words; padding that a tower never reads is not worth a column."""
    return [name for name in views[0]["share"] if any(view["share"][name] > 0 for view in views)]


def _draw(towers: dict[str, dict], path: Path) -> None:
    """A row per tower: cosines of every two views, and beside each view its entropy and where its attention goes."""
    views = max(len(tower["views"]) for tower in towers.values())
    side = min(max(0.3 * views, 2.0), 8.0)
    figure = new_figure(2 * side + 6.2, 2 * (side + 1.1), layout="constrained")
    for strip, (name, tower) in zip(figure.subfigures(len(towers), 1), towers.items(), strict=True):
        mean = "" if tower["mean_cosine"] is None else f", mean {tower['mean_cosine']:.2f}"
        overlap, entropy, shares = strip.subplots(1, 3, width_ratios=[1.15, 1, 1])
        _draw_cosine(overlap, tower["cosine"], strip)
        overlap.set_title(f"{name} tower: cosine between views{mean}", fontsize=9)
        rows, values = range(len(tower["views"])), [100 * view["entropy"] for view in tower["views"]]
        entropy.barh(rows, values, color=BLUE, height=0.75, xerr=[100 * v["entropy_spread"] for v in tower["views"]],
                     error_kw={"ecolor": GREY, "lw": 1})  # fmt: skip
        entropy.set_title("entropy, % of the largest possible ± spread", fontsize=9)
        _draw_shares(shares, tower["views"], "patches" if name == "image" else "words")
        labels = [f"{view['view']}{' †' if view['dead'] else ''}" for view in tower["views"]]
        for axes in (overlap, entropy, shares):
            axes.set_yticks(rows, labels, fontsize=8)
            axes.tick_params(length=0)
            axes.set_ylim(len(labels) - 0.5, -0.5)
        for axes in (entropy, shares):
            axes.set_xlim(0, 100)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="x", labelsize=8)
    save(figure, path)


def _draw_cosine(axes, cosine: list[list[float]], strip) -> None:
    shown = axes.imshow(cosine, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(cosine)), range(1, len(cosine) + 1), fontsize=8)
    if len(cosine) <= 16:
        for row, line in enumerate(cosine):
            for column, value in enumerate(line):
                ink = "white" if value > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}".removeprefix("0"), size=6, color=ink, ha="center", va="center")
    strip.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)


def _draw_shares(axes, views: list[dict], rest: str) -> None:
    """Bars of all shares, one after another; what is left are patches or words."""
    rows, left = range(len(views)), [0.0] * len(views)
    for name, colour in zip(_shares(views), _COLOURS, strict=False):
        values = [100 * view["share"][name] for view in views]
        axes.barh(rows, values, left=left, color=colour, height=0.75, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.barh(rows, [100 - a for a in left], left=left, color="#dddddd", height=0.75, label=rest)
    axes.set_title("where attention goes, %", fontsize=9)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
