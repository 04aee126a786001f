"""What an export costs and gains: seconds, bytes and accuracy of every form, and the latency of what comes out.

    python benchmarks/exports.py [--quick] [--checkpoint FOLDER ...] [--aoti] [--out FOLDER] [--resume]

Models have random weights (nothing is downloaded) but for those of --checkpoint. FOLDER gets exports.json, written
after every export and every case of latency, and the bundles that are timed. An export that fails, or whose vectors
are not PyTorch's, is a row with the reason.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import export_cases  # noqa: E402
import results  # noqa: E402
from arguments import add_run, on_gpu, positive  # noqa: E402
from encoder_models import CLIP, FUSED, TOWERS  # noqa: E402
from export_cases import AOTI, FORMS, Exports, Subject  # noqa: E402
from export_latency import BUNDLES, Latency  # noqa: E402
from export_tables import exports_table  # noqa: E402
from machine import machine  # noqa: E402
from mvam_fast.export.bundle import sha256  # noqa: E402

from mvam_fast.model_folder import MVAM_CONFIG, WEIGHTS  # noqa: E402

NONE = "none"
QUICK_FORMS = ("fp32 plain", "fp16 node", "int8")
NOTE = (
    "Weights are random, except a checkpoint's: times and sizes are those of trained ones, accuracy is not. Exports: "
    "each once, on the CPU; seconds from the model in memory to the bundle on disk, both towers and every gate "
    "included, in a process that has exported before; MB, 10⁶ bytes, of the encoders' files. Accuracy: the worst over "
    "batches of 1, 3, 8 and 17 samples, by ONNX Runtime on the CPU, which computes fp16 in float32; what fp16 "
    "arithmetic costs is told by PyTorch's own. Same top 5: how many embeddings kept their five nearest of a random "
    "gallery, in the largest batch and the worse tower. SigLIP's attention pooler is fused first; its text is split by "
    "a small tokenizer that was learned on the spot, since its own would have to be downloaded. Plain CLIP has no node "
    "form: nothing in it pools by views. Latency: wall clock of call and synchronisation, inputs in the device's "
    "memory; all ways take turns in five blocks, two calls before each for warm-up, after a check against float64. "
    "ONNX Runtime has as many threads as PyTorch. The bare session's input and output are bound; on a CPU it is the "
    "session that the Encoder calls."
)


def run(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    path = options.out / "exports.json"
    names = ("quick", "models", "views", "siglip", "forms", "latency", "batch", "towers", "seconds")
    settings = {name: getattr(options, name) for name in names}
    settings["checkpoints"] = {
        export_cases.checkpoint_name(folder): sha256(folder / WEIGHTS) for folder in options.checkpoint
    }
    result = {"machine": machine(device), "settings": settings, "note": NOTE, "rows": []}
    if options.resume and path.exists():
        result["rows"] = results.resumed(path, "exports", result)["rows"]
    done = {_key(row) for row in result["rows"]}
    cases = cases_of(options, device, done)
    left = {case: measure for case, measure in cases.items() if case not in done}
    print(f"{len(cases) - len(left)} cases done before, {len(left)} to do", file=sys.stderr)
    if left:
        export_cases.load_exporter()
    with tqdm(total=len(left), unit="case", file=sys.stderr) as bar:
        for case, measure in left.items():
            result["rows"] += measure(bar.set_description)
            bar.update()
            results.write(path, "exports", {**result, "complete": case == list(left)[-1]})
    return results.read(path, "exports")


def _key(row: dict) -> tuple:
    """The case that a row belongs to."""
    if row["work"] == "latency":
        return "latency", row["tower"], row["batch"]
    return "export", row["model"], row["variant"], row["form"]


def cases_of(options: argparse.Namespace, device: torch.device, done: set[tuple]) -> dict[tuple, Callable]:
    """What gives the rows of each case: the exports that are timed, their times, then all other exports."""
    cases = product(subjects_of(options), options.forms)
    wanted = {("export", s.model, s.variant, form): (s, form) for s, form in cases if s.can(form)}
    timed = [(_subject(options, options.latency, model), form) for model, form in BUNDLES]
    earlier = [pair for case, pair in wanted.items() if case in done]
    exports = Exports(options.out / "bundles", device, keep=timed, made=earlier)
    measured = {case: partial(exports.measure, *pair) for case, pair in wanted.items()}
    found: dict[tuple, Callable] = {}
    if options.latency != NONE:
        found |= {case: measured[case] for case, pair in wanted.items() if pair in timed}
        latency = Latency(options.latency, options.views, device, exports)
        for tower, batch in product(options.towers, options.batch):
            found["latency", tower, batch] = partial(latency.measure, tower, batch, options.seconds)
    return found | measured


def subjects_of(options: argparse.Namespace) -> list[Subject]:
    found = [_subject(options, name, variant) for name in options.models for variant in (CLIP, FUSED)]
    if options.siglip != NONE:
        found.append(export_cases.pooler_subject(options.siglip, options.out / "tokenizer"))
    return found + [export_cases.checkpoint_subject(folder) for folder in options.checkpoint]


def _subject(options: argparse.Namespace, name: str, variant: str) -> Subject:
    return export_cases.views_subject(name, variant, options.views)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="scenes-ViT-T-16 alone, three forms; a minute on a CPU")
    parser.add_argument("--models", nargs="*", metavar="NAME", help="open_clip models, exported as plain CLIP and with "
                        "MVAM (default: ViT-B-32 ViT-B-16; with --quick scenes-ViT-T-16)")  # fmt: skip
    parser.add_argument("--views", type=positive, default=16, help="of MVAM (default: %(default)s)")
    parser.add_argument("--siglip", metavar="NAME", help="open_clip model whose attention pooler is fused, or 'none' "
                        "(default: ViT-B-16-SigLIP; with --quick none)")  # fmt: skip
    parser.add_argument("--checkpoint", nargs="+", type=Path, default=[], metavar="FOLDER", help="trained ones, too")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default: all but aoti; with --quick three of them")
    parser.add_argument("--aoti", action="store_true", help="compile by AOTInductor, too; minutes for each model")
    parser.add_argument("--latency", metavar="NAME", help="open_clip model to time, or 'none' "
                        "(default: ViT-B-32; with --quick scenes-ViT-T-16)")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 8], help="of latency (default: 1 8)")
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), help="of latency; default: both")
    add_run(parser, "runs/exports")
    options = parser.parse_args(arguments)
    on_gpu(parser, options.device)
    if options.models is None:
        options.models = ["scenes-ViT-T-16"] if options.quick else ["ViT-B-32", "ViT-B-16"]
    options.siglip = options.siglip or (NONE if options.quick else "ViT-B-16-SigLIP")
    options.latency = options.latency or ("scenes-ViT-T-16" if options.quick else "ViT-B-32")
    options.forms = list(options.forms or (QUICK_FORMS if options.quick else [form for form in FORMS if form != AOTI]))
    if options.aoti and AOTI not in options.forms:
        options.forms.append(AOTI)
    for folder in options.checkpoint:
        if not (folder / MVAM_CONFIG).is_file():
            parser.error(f"--checkpoint {folder}: no checkpoint, it has no {MVAM_CONFIG}")
    names = [export_cases.checkpoint_name(folder) for folder in options.checkpoint]
    if len(set(names)) < len(names):
        parser.error(f"--checkpoint: two would have the same name in the results: {', '.join(names)}")
    options.seconds = 0.5 if options.quick else 2.0
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    print(exports_table(run(options)))
    print(options.out / "exports.json")


if __name__ == "__main__":
    main()
