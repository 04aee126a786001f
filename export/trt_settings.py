"""What a TensorRT engine is built for and how: batch profiles and builder settings, checked; no TensorRT needed."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HARDWARE = ("none", "ampere+", "same")
MAX_LEVEL = 5  # of the builder's optimisation levels


@dataclass(frozen=True)
class Profile:
    """Batch sizes that one optimisation profile covers: from `min` to `max`, tuned for `opt`."""

    min: int
    opt: int
    max: int

    def __post_init__(self):
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"batch: {self.min},{self.opt},{self.max} must satisfy 1 <= MIN <= OPT <= MAX")

    @classmethod
    def parse(cls, text: str) -> Profile:
        """From "MIN,OPT,MAX"."""
        parts = text.split(",")
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) != 3:
            raise ValueError(f"batch: {text!r} must be three whole numbers MIN,OPT,MAX, such as 1,8,64")
        return cls(*numbers)

    @property
    def batches(self) -> tuple[int, ...]:
        """Min, opt and max, without repetition."""
        return tuple(sorted({self.min, self.opt, self.max}))

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes to run it at: powers of two within, and its min, opt and max."""
        powers = (1 << exponent for exponent in range(self.max.bit_length()))
        return tuple(sorted({size for size in powers if size >= self.min} | set(self.batches)))

    def shapes(self, row: Sequence[int]) -> dict[str, list[int]]:
        """{"min": [batch, *row], "opt": ..., "max": ...} of an input with rows of shape `row`."""
        return {name: [batch, *row] for name, batch in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Settings:
    """How to build; see `python export/to_trt.py --help`. Precision is not among them: it is the ONNX graph's own."""

    profiles: tuple[Profile, ...] = (Profile(1, 8, 64),)
    workspace_gib: float | None = None  # None: as much as the GPU has
    optimization_level: int | None = None  # None: TensorRT's default
    timing_cache: Path | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    strip: bool = False
    plugin: bool = False

    def __post_init__(self):
        if not self.profiles:
            raise ValueError("batch: there must be at least one profile MIN,OPT,MAX")
        if len(set(self.profiles)) < len(self.profiles):
            raise ValueError("batch: the same profile is given twice")
        # "not >" rather than "<=": NaN is refused too.
        if self.workspace_gib is not None and not self.workspace_gib > 0:
            raise ValueError(f"workspace is {self.workspace_gib}; it must be more than 0 GiB")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= MAX_LEVEL:
            raise ValueError(f"optimization-level is {self.optimization_level}; it must be from 0 to {MAX_LEVEL}")
        if self.hardware_compatibility not in HARDWARE:
            raise ValueError(
                f"hardware-compatibility is {self.hardware_compatibility!r}; it must be one of {', '.join(HARDWARE)}"
            )
        if self.timing_cache is not None and self.timing_cache.is_dir():
            raise ValueError(f"timing-cache: {self.timing_cache} is a folder; it must be a file, or not be there yet")
        if self.timing_cache is not None and self.optimization_level == 0:
            raise ValueError("timing-cache: TensorRT does not use one at optimization-level 0")

    @property
    def workspace_bytes(self) -> int | None:
        return None if self.workspace_gib is None else int(self.workspace_gib * 2**30)

    def resolved(self) -> dict:
        """As it is printed and kept in a manifest: JSON values only, nothing of this machine."""
        return {
            "profiles": [dataclasses.asdict(profile) for profile in self.profiles],
            "typing": "strong: every tensor has the type that the ONNX graph gives it",
            "tf32": False,
            "workspace_gib": self.workspace_gib,
            "optimization_level": self.optimization_level,
            "timing_cache": self.timing_cache is not None,
            "hardware_compatibility": self.hardware_compatibility,
            "version_compatible": self.version_compatible,
            "refit": self.refit,
            "strip": self.strip,
            "plugin": self.plugin,
        }


def buckets(profiles: Sequence[Profile]) -> tuple[int, ...]:
    """The batch sizes, ascending, that engines with these profiles are run at; others are padded and split."""
    return tuple(sorted({size for profile in profiles for size in profile.buckets}))


def profile_at(batch: int, profiles: Sequence[Profile]) -> int:
    """The number of the profile to run `batch` rows in: of those that allow it, the one tuned closest, by its max."""
    fitting = [(profile.max, number) for number, profile in enumerate(profiles) if profile.min <= batch <= profile.max]
    if not fitting:
        raise ValueError(f"no profile of the engine allows a batch of {batch}")
    return min(fitting)[1]


def profiles_for(given: Sequence[str] | None, fixed_batch: int | None) -> tuple[Profile, ...]:
    """The profiles of `--batch` arguments; of a graph whose batch is fixed, the only one that it allows."""
    if fixed_batch is None:
        return tuple(Profile.parse(text) for text in given) if given else Settings.profiles
    only = Profile(fixed_batch, fixed_batch, fixed_batch)
    if given and tuple(Profile.parse(text) for text in given) != (only,):
        raise ValueError(f"batch: the source's graphs take {fixed_batch} rows and nothing else; leave --batch out")
    return (only,)
