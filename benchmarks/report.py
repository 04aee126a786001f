"""Builds docs/performance.md and its plots from the newest complete results. Nothing on the page is typed by hand.

    python benchmarks/report.py

Pages that are written by hand have measured sections between two comments (`inserts.py`), which are built too. Every
table names the file that it was made of. Files are checked (seal, statistics, schema) before they are used, and tests
build all of it again and compare.
"""
from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import export_section  # noqa: E402
import inserts  # noqa: E402
import plots  # noqa: E402
import results  # noqa: E402
import schema  # noqa: E402
import sections  # noqa: E402
from machine import ROOT  # noqa: E402
from providers import PROVIDERS  # noqa: E402

from mvam_fast.files import write_text  # noqa: E402

PAGE = ROOT / "docs/performance.md"
PICTURES = ROOT / "docs/performance"
EXPORTS = frozenset({"exports"})  # kinds of results that docs/export.md shows, and the page does not
HEAD = """# Performance

This page is built by `python benchmarks/report.py` from the sealed result files in `benchmarks/results/`, and
`make test` fails when the two disagree. Measured, static (what a compiler says) and modelled (what a formula says)
figures stand apart and are labelled.
"""
PENDING = """**Pending: no complete throughput result of a CUDA GPU is in `benchmarks/results/`.** Nothing on this page
says how fast the Triton kernels are. On a machine with such a GPU, `make gpu` measures and writes what is missing here.
"""


def topics(result: dict) -> list[str]:
    """What a result is used for: as its kind says, but runs of throughput.py may be of the op, of fused poolers, or of
    both, and a later run of one must not take the place of the other."""
    if result["kind"] != "throughput":
        return [result["kind"]]
    timed = {row["provider"] for row in result["rows"] if "median_ms" in row}
    op = any(PROVIDERS[name].ours and not PROVIDERS[name].original for name in timed)
    fused = any(PROVIDERS[name].original for name in timed)
    return ["throughput"] * op + ["poolers"] * fused


def newest(
    folder: Path, kinds: Collection[str] = frozenset(schema.ROWS) - EXPORTS
) -> dict[tuple[str, str], tuple[Path, dict]]:
    """(topic, kind of machine) → the newest complete file that is not a quick run's, and its content; of the page's
    `kinds` of results, if none are given."""
    found: dict[tuple[str, str], tuple[Path, dict]] = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.stem not in kinds:
            continue
        result = results.read(path, path.stem)
        schema.validate(result)
        if not result["complete"] or result["settings"].get("quick"):
            continue
        for key in ((topic, result["machine"]["kind"]) for topic in topics(result)):
            if key not in found or found[key][1]["machine"]["date"] < result["machine"]["date"]:
                found[key] = path, result
    return found


def page(folder: Path, pictures: dict[tuple[str, str], list[Path]]) -> str:
    """The page's text; `pictures`: what was drawn of each file."""
    found = newest(folder)
    parts = [HEAD, sections.files(found, ROOT)]

    def add(title: str, kind: str, device: str, section) -> None:
        if (kind, device) in found:
            path, result = found[kind, device]
            name = path.relative_to(ROOT).as_posix()
            drawn = [image.relative_to(PAGE.parent).as_posix() for image in pictures.get((kind, device), [])]
            images = "\n".join(f"![{Path(image).stem}]({image})" for image in drawn)
            source = f"From [`{name}`](../{name}).\n"
            parts.append("\n".join(part for part in (f"### {title}\n", source, section(result), images) if part))

    for heading, device in (("On a GPU", "cuda"), ("On a CPU", "cpu")):
        parts.append(f"## {heading}: measured\n")
        if device == "cuda" and ("throughput", "cuda") not in found:
            parts.append(PENDING)
        add("The kernels' tests", "tests", device, sections.tests)
        add("The pooling op", "throughput", device, sections.throughput)
        add("Other libraries' poolers, original and fused", "poolers", device, sections.poolers)
        add("Whole encoders", "encoders", device, sections.encoders)
        add("The kernels under the profiler", "profile", device, sections.profile)
        add("What a call costs on the host", "host_cost", device, sections.host_cost)
    parts.append("## Static: what the compiler makes of the kernels\n")
    add("Resources", "kernel_report", "static", sections.kernel_report)
    parts.append("## Modelled\n")
    add("Least time at an assumed bandwidth", "kernel_report", "static", sections.floors)
    return "\n".join(part.rstrip() + "\n" for part in parts)


def converters(folder: Path) -> str:
    """The measured section of docs/converters.md: one case of each kind of machine."""
    found, parts = newest(folder), []
    for device in ("cuda", "cpu"):
        if ("poolers", device) in found:
            path, result = found["poolers", device]
            name = path.relative_to(ROOT).as_posix()
            parts.append(f"From [`{name}`](../{name}): {sections.poolers(result, every_case=False)}")
    return "\n".join(parts) or "Not measured yet: no complete result in `benchmarks/results/` has fused poolers."


def exports(folder: Path) -> str:
    """The measured section of docs/export.md."""
    found, parts = newest(folder, EXPORTS), []
    for device in ("cuda", "cpu"):
        if ("exports", device) in found:
            path, result = found["exports", device]
            name = path.relative_to(ROOT).as_posix()
            parts.append(f"From [`{name}`](../{name}): {export_section.section(result)}")
    return "\n".join(parts) or (
        "Not measured yet: no complete result of `python benchmarks/exports.py` is in `benchmarks/results/`."
    )


# Pages written by hand, and what builds the section of each that is not.
INSERTS = {ROOT / "docs/converters.md": converters, ROOT / "docs/export.md": exports}


def draw(folder: Path) -> dict[tuple[str, str], list[Path]]:
    found = {}
    for (kind, device), (_, result) in newest(folder).items():
        if kind in plots.DRAWN:
            found[kind, device] = plots.draw(result, PICTURES, f"{kind}-{device}")
    return found


def drawn() -> dict[tuple[str, str], list[Path]]:
    """The pictures that are there, as `draw` left them."""
    found = {}
    for kind, names in plots.DRAWN.items():
        for device in ("cuda", "cpu"):
            paths = [PICTURES / f"{kind}-{device}-{name}.png" for name in names]
            found[kind, device] = [path for path in paths if path.exists()]
    return found


def main() -> None:
    for old in PICTURES.glob("*.png"):
        old.unlink()
    write_text(PAGE, page(results.FOLDER, draw(results.FOLDER)))
    print(PAGE)
    for path, section in INSERTS.items():
        inserts.replace(path, section(results.FOLDER))
        print(path)


if __name__ == "__main__":
    main()
