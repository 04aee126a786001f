"""Launches a kernel with the least work on the CPU.

Triton's own launch sorts every argument into a signature in Python each time. Here the signature is the few properties
that its compiler specialises on, and what was compiled for it is launched directly. `benchmarks/host_cost.py` measures
what that gains.
"""
from __future__ import annotations

import triton

from . import tiles


class Configuration:
    """Compile-time constants and launch options of a kernel. Told apart by identity: whoever makes them keeps them."""

    def __init__(self, constants: dict, options: dict):
        self.constants, self.options = constants, options


class Launcher:
    """`launcher(grid, given, made, numbers, configuration)`: the kernel's arguments in the order of its source.

    `given` are tensors of any alignment, or None. `made` were allocated for this launch, so they are aligned; which of
    them there are, and their dtypes, follow from the rest. `numbers`: integers that Triton specialises on, and floats.
    """

    def __init__(self, kernel):
        self._kernel = kernel
        self._compiled = {}

    def __call__(self, grid: tuple[int, int], given: tuple, made: tuple, numbers: tuple, configuration: Configuration):
        arguments = given + made + numbers
        if tiles.interpreting():
            self._kernel[grid](*arguments, **configuration.constants)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        signature = (
            device,
            configuration,
            # What Triton specialises on: a pointer's dtype and alignment; a number being 1, a multiple of 16, wide.
            *[None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16) for tensor in given],
            *[n if n == 1 else (n % 16 == 0, n < 2147483648) for n in numbers if type(n) is int],
        )
        found = self._compiled.get(signature)
        if found is None:
            constants = configuration.constants
            compiled = self._kernel[grid](*arguments, **constants, **configuration.options)
            rest = tuple(constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._compiled[signature] = compiled, rest
        else:
            compiled, rest = found
            compiled[(*grid, 1)](*arguments, *rest, stream=driver.get_current_stream(device))
