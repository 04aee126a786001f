"""The tables and plots of docs/results.md, from the ablation's JSON: python benchmarks/ablation_page.py [JSON]"""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent))
from ablation_cells import (  # noqa: E402
    BASE,
    POOLINGS,
    RATES,
    Cell,
    Group,
    folder_name,
    groups,
    rates_of,
    tuning_recall,
)  # fmt: skip
from ablation_plots import plot_diversity, plot_groups, plot_rates, plot_views  # noqa: E402
from inserts import replace  # noqa: E402
from sections import table as markdown  # noqa: E402

from mvam_fast.files import read_json  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/results.md"
TOKENS = {"image": 17, "text": 24}  # of scenes-ViT-T-16, and their width
WIDTH = 96


@dataclass
class Measured:
    """A cell with its rows, one for each seed, in order."""

    cell: Cell
    rows: list[dict]

    def test(self, name: str) -> list[float]:
        return [row["test"][name] for row in self.rows]

    def of_views(self, name: str) -> list[float] | None:
        """[image, text]: the mean over the seeds, None where there are no views to compare."""
        found = [[row.get("views", {}).get(tower, {}).get(name) for row in self.rows] for tower in ("image", "text")]
        return None if any(value is None for values in found for value in values) else [mean(v) for v in found]


def measured(group: Group, rows: list[dict]) -> tuple[list[Measured], list[str]]:
    """The cells that have all their seeds, in order, and the labels of the others. No cell without the reference."""
    by_key = {(folder_name(row["settings"]), row["data"], row["seed"]): row for row in rows}
    found, missing = [], []
    for cell in group.cells:
        own = [by_key.get((folder_name(cell.settings), cell.data, seed)) for seed in group.seeds]
        if None in own:
            missing.append(cell.label)
        else:
            found.append(Measured(cell, own))
    if group.reference in missing or len(found) < 2:
        return [], [cell.label for cell in group.cells]
    return found, missing


def multiply_adds(settings: dict) -> float:
    """Millions, of pooling and projecting one image and one text, counted and not timed: scores and sums over the
    tokens for each view (a class or end token is just taken), then the encoder's projection of each vector, then that
    of the view."""
    merged = {**BASE, **settings}
    views, width = merged["views"], merged["embed_dim"]
    total = 0
    for tokens in TOKENS.values():
        pooled = 2 * views * tokens * WIDTH
        if merged.get("scoring", "dot") == "projected":
            pooled += views * WIDTH * WIDTH
        elif merged.get("scoring", "dot") == "additive":
            pooled += tokens * WIDTH * WIDTH
        projected = max(views, 1) * WIDTH * width + views * width * (merged.get("view_dim") or 0)
        total += pooled + projected
    return total / 1e6


def table(group: Group, cells: list[Measured]) -> str:
    reference = next(one for one in cells if one.cell.label == group.reference)
    header = [
        "", "numbers", "parameters", "million multiply-adds", "RSUM, validation", "RSUM, test", "least to most",
        "difference", "i2t R@1", "t2i R@1", "overlap, image / text", "entropy, image / text",
    ]  # fmt: skip
    lines = []
    for one in cells:
        rsum = one.test("rsum")
        overlap, entropy = one.of_views("mean_cosine"), one.of_views("mean_entropy")
        lines.append([
            one.cell.label, str(one.rows[0]["embedding_width"]), f"{one.rows[0]['parameters']:,}",
            f"{multiply_adds(one.cell.settings):.2f}", f"{mean(row['validation']['rsum'] for row in one.rows):.1f}",
            spread(rsum), f"{min(rsum):.1f} to {max(rsum):.1f}", "" if one is reference else against(one, reference),
            f"{mean(one.test('i2t_r1')):.1f}", f"{mean(one.test('t2i_r1')):.1f}", pair(overlap), pair(entropy),
        ])  # fmt: skip
    return markdown(header, lines)


def spread(values: list[float]) -> str:
    return f"**{mean(values):.1f}** ± {stdev(values):.1f}" if len(values) > 1 else f"**{values[0]:.1f}**"


def against(one: Measured, reference: Measured) -> str:
    """The mean difference of RSUM, seed by seed, and its range; marked where the ranges of the two do not overlap."""
    found, base = one.test("rsum"), reference.test("rsum")
    differences = [a - b for a, b in zip(found, base, strict=True)]
    apart = len(found) > 1 and (min(found) > max(base) or max(found) < min(base))
    shown = f"{mean(differences):+.1f} ({min(differences):+.1f} to {max(differences):+.1f})"
    return f"{shown} **apart**" if apart else shown


def pair(values: list[float] | None) -> str:
    return "" if values is None else f"{values[0]:.2f} / {values[1]:.2f}"


def section(result: dict) -> str:
    """Markdown: what was run, then every group that is complete."""
    about, rates = result["machine"], rates_of(result["rows"])
    parts = [
        f"Built by `make ablation` from [ablation.json](../benchmarks/results/ablation/ablation.json): "
        f"{len(result['rows'])} trainings on {about['device']}, {about['cores']} cores, one thread each, float32, "
        f"torch {about['torch']}, finished {about['date'][:10]}. RSUM: sum of recall at 1, 5, 10 in percent, both "
        "ways, 1,000 images, 5,000 captions. Test: mean ± standard deviation over the seeds 0, 1, 2; *difference*: "
        "from the row without one, seed by seed, mean (least to most); **apart**: the ranges of the two rows do not "
        "overlap. Overlap: mean cosine of the attentions of two views; entropy: share of the largest possible; both on "
        f"the validation split. A reader that understands every caption and guesses among the images it fits: RSUM "
        f"{result['oracle']['rsum']:.1f}.",
    ]
    recall = tuning_recall(result["rows"])

    def cell(name: str, rate: float) -> str:
        return f"**{recall[name, rate]:.1f}**" if rate == rates[name] else f"{recall[name, rate]:.1f}"

    tuned = [[name, *(cell(name, rate) for rate in RATES)] for name in POOLINGS]
    parts.append("### Learning rates\n\nRSUM on the validation split, seed 0; the best one (bold) is used below.\n\n"
                 + markdown(["", *(f"{rate:g}" for rate in RATES)], tuned)
                 + "\n![RSUM by learning rate](../benchmarks/results/ablation/rates.png)")  # fmt: skip
    for name, group in groups(rates).items():
        cells, missing = measured(group, result["rows"])
        text = f"### {group.title}\n\n"
        if cells:
            text += f"{table(group, cells)}\n![{group.title}](../benchmarks/results/ablation/{name}.png)\n"
        if missing:
            command = f"make ablation ARGS='--groups {name}'"
            text += f"\nNot yet trained with all seeds (`{command}`): {', '.join(missing)}.\n"
        parts.append(text.rstrip())
    return "\n\n".join(parts)


def shown(result: dict) -> dict[str, list[Measured]]:
    """The cells of every group of which there is something to show, by the group's name."""
    found = {name: measured(group, result["rows"])[0] for name, group in groups(rates_of(result["rows"])).items()}
    return {name: cells for name, cells in found.items() if cells}


def pictures(result: dict) -> list[str]:
    """The names of the plots that the page shows."""
    return [*(f"{name}.png" for name in shown(result)), "rates.png"]


def build(path: Path, page: Path = PAGE) -> list[Path]:
    """Writes the plots beside the JSON and the measured part of the page; the paths of all."""
    result = read_json(path, "json")
    chosen = groups(rates_of(result["rows"]))
    for name, cells in shown(result).items():
        group, target = chosen[name], path.with_name(f"{name}.png")
        if name in ("budget", "views"):
            plot_views(group.title, cells, target)
        elif "diversity" in name:
            plot_diversity(group.title, cells, group.reference, target)
        else:
            plot_groups(group.title, cells, result["oracle"]["rsum"], target)
    plot_rates(result, path.with_name("rates.png"))
    replace(page, section(result))
    return [*(path.with_name(name) for name in pictures(result)), page]


if __name__ == "__main__":
    print(*build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks/results/ablation/ablation.json"),
          sep="\n")  # fmt: skip
