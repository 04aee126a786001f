"""The direct launch: the same kernel and arguments as Triton's own launch, found again only where they are the same.

In a process of its own, with a driver that compiles and launches nothing: here Triton is in its interpreter.
"""
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import sys
sys.path.insert(0, "benchmarks")
import torch, triton
from host_cost import NoLaunch
from mvam_fast.kernels.pool_forward import _launch, pool_forward

launches = []

class Recording(NoLaunch):
    @staticmethod
    def launcher_cls(source, metadata):
        def run(*arguments):
            given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[9:]]
            launches.append((arguments[:3], metadata.hash, given))
        return run

triton.runtime.driver.set_active(Recording())
calls = []

def call(length, tokens, **options):
    launches.clear()
    results = pool_forward(tokens, codes, None, None, None, 0.1, True, **options)
    calls.append(results)  # kept, so that no address is used twice
    return launches[0], len(_launch._compiled)

storage = torch.randn(40000, dtype=torch.bfloat16)
codes = torch.randn(16, 64, dtype=torch.bfloat16)
tokens = storage[: 5 * 32 * 64].view(5, 32, 64)
first, again = call(32, tokens), call(32, tokens)
outputs = slice(5, 8)  # P, G, lse: allocated by each call
assert first[1] == again[1] == 1, "the second launch was not found"
assert first[0][:2] == again[0][:2]
inputs = lambda given: given[:5] + given[8:]
assert inputs(first[0][2]) == inputs(again[0][2])
assert all(address % 16 == 0 for address in again[0][2][outputs])

shifted = storage[1 : 1 + 5 * 32 * 64].view(5, 32, 64)  # not aligned: another kernel
assert call(32, shifted)[1] == 2 and launches[0][1] != first[0][1]
longer = storage[: 5 * 48 * 64].view(5, 48, 64)  # other numbers with the same properties: the same kernel
assert call(48, longer)[1] == 2 and launches[0][1] == first[0][1]
odd = storage[: 5 * 33 * 64].view(5, 33, 64)  # a length that 16 does not divide
assert call(33, odd)[1] == 3
pool_forward(tokens, codes, None, None, None, 0.1, False)  # no Gram matrix: another configuration
assert len(_launch._compiled) == 4
print("ok")
"""


def test_direct_launch():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=os.path.join(os.path.dirname(__file__), ".."),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"
