"""Command line arguments that several benchmarks share."""
from __future__ import annotations

import argparse
from pathlib import Path

import torch


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_run(parser: argparse.ArgumentParser, out: str) -> None:
    """Where it is measured, where the results go, whether an earlier run is gone on with."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the cases that an earlier run into --out finished")


def on_gpu(parser: argparse.ArgumentParser, device: str) -> bool:
    gpu = torch.device(device).type == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error(f"--device {device}: PyTorch sees no CUDA GPU here")
    return gpu
