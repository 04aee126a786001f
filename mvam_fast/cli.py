"""The command mvam-fast: one subcommand per job, each a thin layer over a function."""
from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mvam-fast", description="Multi-view attention for image-text matching.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_demo, _add_scenes, _add_train, _add_evaluate, _add_compare, _add_drop_views, _add_visualize,
        _add_diversity,
    ):  # fmt: skip
        add(commands)
    options = parser.parse_args(arguments)
    logging.getLogger().addFilter(_is_wanted)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        print(f"mvam-fast: error: {error}", file=sys.stderr)
        return 2
    finally:
        logging.getLogger().removeFilter(_is_wanted)
    return 0


def _is_wanted(record: logging.LogRecord) -> bool:
    """All but open_clip's warning of random weights: whoever leaves out --pretrained asked for them."""
    return not record.getMessage().startswith("No pretrained weights loaded")


def _command(commands, name: str, help_text: str, run):
    parser = commands.add_parser(
        name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands) -> None:
    def run(options):
        from .retrieval.demo import demo

        demo(
            options.out, seed=options.seed, steps=options.steps, train_images=options.train_images,
            throughput=options.throughput,
        )  # fmt: skip

    parser = _command(commands, "demo", "train, compare, draw and export on scenes made here; writes report.html", run)
    parser.add_argument("--out", default="runs/demo", help="folder of everything that is written")
    parser.add_argument("--seed", type=int, default=0, help="of data and training")
    parser.add_argument("--steps", type=int, default=800, help="training steps of both models")
    parser.add_argument("--train-images", type=int, default=16000, help="images to train on")
    parser.add_argument("--throughput", help="JSON of benchmarks/throughput.py, shown in the report")


def _add_scenes(commands) -> None:
    def run(options):
        from .retrieval.scenes import make_scenes

        counts = {"train": options.train, "val": options.val, "test": options.test}
        print(make_scenes(options.out, **counts, image_size=options.image_size, seed=options.seed))

    parser = _command(commands, "scenes", "draw a fine-grained image-caption set in Karpathy's format", run)
    parser.add_argument("out", help="folder to write into")
    for split, count in (("train", 16000), ("val", 1000), ("test", 1000)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images of the {split} split")
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set")


def _add_train(commands) -> None:
    from .retrieval.training.config import TrainConfig, from_flag, read_config

    def run(options):
        from .retrieval.training.train import train

        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        given = {name: value for name, value in vars(options).items() if name in fields}
        print(train(read_config(options.config, given)), flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # gloo's threads outlive the process group, and sometimes abort a process that tears itself down
            # (pytorch/pytorch 190489). Everything is on the disk.
            sys.stderr.flush()
            os._exit(0)

    parser = _command(commands, "train", "train MVAM, or its single-vector baseline, on images with captions", run)
    parser.add_argument("--config", help="YAML file of the same settings, which flags override; see recipes/")
    for field in dataclasses.fields(TrainConfig):  # a flag that is not given leaves no trace: the file decides
        flag, about = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if isinstance(field.default, bool):
            about += f" (default: {field.default})"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=about)
        else:
            about += "" if field.metadata.get("required") else f" (default: {field.default})"
            parser.add_argument(flag, type=from_flag(field), default=argparse.SUPPRESS, help=about)


def _data_arguments(parser) -> None:
    parser.add_argument("model", help="folder of a model (OUT/model of a training)")
    parser.add_argument("--data", required=True, default=argparse.SUPPRESS, help="Karpathy JSON, CSV or tars")
    parser.add_argument("--images", help="folder of its images; tars need none")
    parser.add_argument("--split", default="test", help="split of the data")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")


def _add_evaluate(commands) -> None:
    from .retrieval.evaluation.protocols import NAMES

    def run(options):
        from .retrieval.evaluation.evaluate import evaluate, report_of

        result = evaluate(
            options.model, options.data, options.images, pretrained=options.pretrained, split=options.split,
            protocols=getattr(options, "protocol", ["full"]), device=options.device, batch_size=options.batch_size,
            captions_per_image=options.captions_per_image, strict=not options.skip_unreadable, out=options.out,
            workers=options.workers,
        )  # fmt: skip
        print(report_of(result))

    parser = _command(commands, "evaluate", "recall at 1, 5, 10 both ways, RSUM and median ranks", run)
    _data_arguments(parser)
    parser.add_argument("--pretrained", help="tag or file of weights: MODEL is then the name of an open_clip model")
    about = "which captions count and what is searched; may be given more than once (default: full)"
    parser.add_argument("--protocol", action="append", choices=NAMES, default=argparse.SUPPRESS, help=about)
    parser.add_argument("--captions-per-image", type=int, help="keep the first so many; with the protocol full")
    parser.add_argument("--batch-size", type=int, default=256, help="images or captions at once")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode images")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out, do not stop")
    parser.add_argument("--out", help="write the result as JSON, and the rank of every query beside it")


def _add_compare(commands) -> None:
    def run(options):
        from .retrieval.evaluation.significance import compare, comparison_table

        found = compare(options.a, options.b, resamples=options.resamples, seed=options.seed, out=options.out)
        print(comparison_table(found))

    parser = _command(commands, "compare", "what changed between two results of evaluate, beyond chance", run)
    parser.add_argument("a", help="OUT of one evaluation")
    parser.add_argument("b", help="OUT of another, on the same data by the same protocols")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the paired bootstrap over images")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--out", help="write the comparison as JSON")


def _add_drop_views(commands) -> None:
    def run(options):
        from .retrieval.evaluation.view_dropping import drop_views, dropping_table

        found = drop_views(
            options.model, options.data, options.images, out=options.out, keep=options.keep, save=options.save,
            choose_on=options.choose_on, choose_data=options.choose_data, choose_images=options.choose_images,
            split=options.split, batch_size=options.batch_size, workers=options.workers, device=options.device,
        )  # fmt: skip
        print(dropping_table(found))

    parser = _command(commands, "drop-views", "which learned views can go, and what that costs in recall", run)
    _data_arguments(parser)
    parser.add_argument("--choose-on", default="val", help="split on which it is chosen what to drop")
    parser.add_argument("--choose-data", help="data of that split, if not DATA; needed where DATA has no splits")
    parser.add_argument("--choose-images", help="folder of its images; tars need none")
    parser.add_argument("--keep", type=int, nargs="+", help="numbers of views to measure; all by default")
    parser.add_argument("--save", type=int, nargs="+", default=[], help="write models of so many views, OUT/model-K")
    parser.add_argument("--batch-size", type=int, default=256, help="images or captions at once")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode images")
    parser.add_argument("--out", required=True, default=argparse.SUPPRESS, help="folder of the result")


def _add_visualize(commands) -> None:
    def run(options):
        from .retrieval.pictures.visualize import visualize

        figures = visualize(
            options.model, options.data, options.images, options.out, split=options.split, device=options.device,
            baseline=options.baseline, count=options.count, seed=options.seed, ids=options.ids, texts=options.text,
            k=options.k,
        )  # fmt: skip
        print("\n".join(f"{options.out}/{figure['file']}" for figure in figures))

    parser = _command(commands, "visualize", "draw what views attend to in words and images, and what is found", run)
    _data_arguments(parser)
    parser.add_argument("--out", required=True, default=argparse.SUPPRESS, help="pictures go to OUT/figures")
    parser.add_argument("--baseline", help="folder of a model whose finds to show beside")
    parser.add_argument("--count", type=int, default=4, help="captions drawn at random; 0 with --ids or --text")
    parser.add_argument("--seed", type=int, default=0, help="which captions")
    parser.add_argument("--ids", nargs="+", default=[], metavar="ID", help="images to show as well, by id in the data")
    parser.add_argument("--text", action="append", default=[], help="a query of your own; may be given again")
    parser.add_argument("--k", type=int, default=5, help="images shown per query")


def _add_diversity(commands) -> None:
    def run(options):
        from .retrieval.pictures.diversity import diversity

        report = diversity(
            options.model, options.data, options.images, options.out, split=options.split, device=options.device,
            batch_size=options.batch_size, strict=not options.skip_unreadable,
        )  # fmt: skip
        print("\n".join(tower["sentence"] for tower in report["towers"].values()))
        print(f"report: {options.out}/diversity.html")

    parser = _command(commands, "diversity", "measure how views differ on a split, and which are dead", run)
    _data_arguments(parser)
    parser.set_defaults(split="val")
    parser.add_argument("--out", required=True, default=argparse.SUPPRESS, help="folder of diversity.{html,png,json}")
    parser.add_argument("--batch-size", type=int, default=64, help="images or captions at once")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out, do not stop")


if __name__ == "__main__":
    sys.exit(main())
