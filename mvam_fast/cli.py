"""The command mvam-fast: one subcommand per job, each a thin layer over a function."""
from __future__ import annotations

import argparse
import dataclasses
import logging
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mvam-fast", description="Multi-view attention for image-text matching.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_scenes, _add_train, _add_evaluate, _add_visualize):
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
    parser.add_argument("--steps", type=int, default=500, help="training steps of both models")
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
    from .retrieval.train import TrainConfig, train

    def run(options):
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        print(train(TrainConfig(**{name: value for name, value in vars(options).items() if name in fields})))

    parser = _command(commands, "train", "train MVAM, or its single-vector baseline, on a Karpathy data set", run)
    for field in dataclasses.fields(TrainConfig):
        flag, about = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.default is False:
            parser.add_argument(flag, action="store_true", help=about)
        elif field.metadata.get("required"):
            parser.add_argument(flag, required=True, default=argparse.SUPPRESS, help=about)
        else:
            kind = str if field.default is None else type(field.default)
            kind = int if field.name == "embed_dim" else kind
            parser.add_argument(flag, type=kind, default=field.default, help=about)


def _data_arguments(parser) -> None:
    parser.add_argument("model", help="folder of a model (OUT/model of a training)")
    parser.add_argument("--data", required=True, default=argparse.SUPPRESS, help="Karpathy JSON")
    parser.add_argument("--images", required=True, default=argparse.SUPPRESS, help="folder of its images")
    parser.add_argument("--split", default="test", help="split of the data")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")


def _add_evaluate(commands) -> None:
    def run(options):
        from .retrieval.evaluate import evaluate, recall_table

        result = evaluate(
            options.model, options.data, options.images, split=options.split, device=options.device,
            captions_per_image=options.captions_per_image, batch_size=options.batch_size,
            strict=not options.skip_unreadable, out=options.out,
        )  # fmt: skip
        print(recall_table({options.split: result["metrics"]}))
        if result["protocol"]["unreadable_images"]:
            print(f"left out as unreadable: {result['protocol']['unreadable_images']} images")

    parser = _command(commands, "evaluate", "recall at 1, 5, 10 both ways, RSUM and median ranks", run)
    _data_arguments(parser)
    parser.add_argument("--captions-per-image", type=int, help="keep the first so many; 5 for COCO 5K")
    parser.add_argument("--batch-size", type=int, default=256, help="images or captions at once")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out, do not stop")
    parser.add_argument("--out", help="write the result as JSON")


def _add_visualize(commands) -> None:
    def run(options):
        from .retrieval.figures import visualize

        figures = visualize(
            options.model, options.data, options.images, options.out, split=options.split, device=options.device,
            baseline=options.baseline, count=options.count, seed=options.seed,
        )  # fmt: skip
        print("\n".join(f"{options.out}/{figure['file']}" for figure in figures))

    parser = _command(commands, "visualize", "draw per-view attention, and the five best images per caption", run)
    _data_arguments(parser)
    parser.add_argument("--out", required=True, default=argparse.SUPPRESS, help="pictures go to OUT/figures")
    parser.add_argument("--baseline", help="folder of a model to show beside")
    parser.add_argument("--count", type=int, default=4, help="samples")
    parser.add_argument("--seed", type=int, default=0, help="which samples")


if __name__ == "__main__":
    sys.exit(main())
