"""How the work is laid out over programs: one per sample, many samples per program, or several programs per sample.

With SM the number of multiprocessors, two programs on each, and T = ⌈N / BN⌉ tiles in a sample:

    splits = clamp(⌊2 SM / B⌋, 1, ⌊T / 4⌋)    few samples: programs share one, down to four tiles each, below which a
                                              program spends its time on filling its pipeline
    persistent if T ≤ 8 and B > 2 SM          short samples, and more of them than run at once

All of it is fixed by the shapes and the device, so that results repeat bit for bit. The bounds 4 and 8 are reasoned,
not yet measured on a GPU.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import torch

PROGRAMS_PER_SM = 2
LEAST_TILES = 4
SHORT_TILES = 8
MOST_SAMPLES = 32  # of a persistent program, which looks them up in a vector; a power of two
INTERPRETED_SMS = 2  # so that small tests reach every layout


class Plan(NamedTuple):
    programs: int
    splits: int
    span: int  # tokens of a split
    persistent: bool = False  # the forward has a kernel of its own for that


@functools.cache
def slots(device: torch.device) -> int:
    """How many programs run at once."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED_SMS
    return PROGRAMS_PER_SM * count


def splits_of(batch: int, length: int, block_n: int, at_once: int) -> tuple[int, int]:
    """(splits, tokens of a split): the formula above; no split is empty."""
    tiles = max(-(-length // block_n), 1)
    wanted = max(min(at_once // batch, tiles // LEAST_TILES), 1) if batch else 1
    span = -(-tiles // wanted)
    return -(-tiles // span), span * block_n


def forward(tokens: torch.Tensor, block_n: int, per_sample: bool) -> Plan:
    """For tokens [B,N,D]; codes that differ per sample are loaded once per program, so those never share one."""
    batch, length, _ = tokens.shape
    at_once = slots(tokens.device)
    persistent = not per_sample and batch > at_once and length <= SHORT_TILES * block_n
    programs = max(at_once, -(-batch // MOST_SAMPLES)) if persistent else batch
    return Plan(programs, *splits_of(batch, length, block_n, at_once), persistent)


def backward(tokens: torch.Tensor, block_n: int, per_sample: bool) -> Plan:
    """A program walks over samples, dC in registers, whatever their length, unless codes differ per sample."""
    batch, length, _ = tokens.shape
    at_once = slots(tokens.device)
    programs = batch if per_sample else min(batch, at_once)
    return Plan(programs, *splits_of(batch, length, block_n, at_once))
