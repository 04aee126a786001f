"""What the exporters' command lines share."""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What every exporter has to know of a source."""
    parser.add_argument("source", help="checkpoint folder, or name of an open_clip model")
    parser.add_argument("--pretrained", help="weights of an open_clip model: a tag or a file (default: random)")
    parser.add_argument("--fuse-poolers", action="store_true", help="convert attention poolers to the fused op")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")


def summary(manifest: dict) -> Iterator[str]:
    """Parity and recall, a line each, for people."""
    for tower, report in manifest["parity"].items():
        for batch, row in report.items():
            top5 = "same top 5" if row["top5"] == 1 else f"same top 5 for {row['top5']:.0%}"
            yield f"{tower:6} batch {batch}: max abs {row['max_abs']:.1e}, cosine {row['cosine']:.7f}, {top5}"
    for tower, row in manifest.get("half_arithmetic", {}).items():
        yield f"{tower:6} PyTorch in {manifest['precision']}: cosine {row['cosine']:.7f}"
    for name, metrics in manifest.get("recall", {}).get("metrics", {}).items():
        yield f"RSUM {name}: {metrics['rsum']:.2f}"
