"""What a call costs on the CPU before the GPU has anything to do: microseconds per call, the launch itself excluded.

    python benchmarks/host_cost.py [--out FOLDER]

Runs without a GPU: Triton's driver is replaced by one that compiles for sm_90 and launches nothing, the tensors lie on
the CPU, and everything else (checks, dispatch, autograd, allocation, Triton's own lookup of the compiled kernel) is
what a GPU run does. CPU allocation stands for the caching allocator's. The launch itself adds a few microseconds.
"""
from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent))
import results  # noqa: E402
from machine import machine  # noqa: E402

import mvam_fast  # noqa: E402
from mvam_fast import dispatch  # noqa: E402

BATCH, LENGTH, WIDTH, VIEWS = 8, 32, 64, 16  # small: what PyTorch computes here on the CPU should not count


class NoLaunch:
    """A Triton driver whose kernels are compiled, looked up and never run."""

    class utils:  # noqa: N801 - the name that Triton looks for
        @staticmethod
        def load_binary(*_):
            return 1, 1, 0, 0, 1024

        @staticmethod
        def get_device_properties(_):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    @staticmethod
    def launcher_cls(*_):
        return lambda *_: None

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def microseconds(step, repeats: int = 400, rounds: int = 15) -> dict[str, float]:
    for _ in range(20):
        step()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        found.append(1e6 * (time.perf_counter() - began) / repeats)
    return {"median_us": statistics.median(found), "least_us": min(found), "most_us": max(found)}


def measure() -> list[dict]:
    tokens = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    codes = torch.randn(VIEWS, WIDTH, requires_grad=True)
    lengths = torch.full((BATCH,), LENGTH)
    norm = {"norm_weight": torch.ones(WIDTH, requires_grad=True), "norm_bias": torch.zeros(WIDTH, requires_grad=True)}
    rows = []
    for name, options in (("plain", {}), ("lengths", {"lengths": lengths}), ("norm", norm)):

        def call(options=options):
            return mvam_fast.multi_view_pool(tokens, codes, backend="triton", **options)

        def forward(call=call):
            with torch.no_grad():
                call()

        pooled, gram = call()
        assert mvam_fast.last_backend()[:2] == ("triton", "triton"), mvam_fast.last_backend()
        leaves = [tokens, codes, *(norm.values() if name == "norm" else ())]
        gradients = torch.randn_like(pooled), torch.randn_like(gram)

        def backward(pooled=pooled, gram=gram, leaves=leaves, gradients=gradients):
            torch.autograd.grad((pooled, gram), leaves, gradients, retain_graph=True)

        for mode, step in (("forward", forward), ("forward, training", call), ("backward", backward)):
            rows.append({"inputs": name, "mode": mode, **microseconds(step)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder to write host_cost.json into")
    options = parser.parse_args()
    triton.runtime.driver.set_active(NoLaunch())
    # The kernels would be refused on CPU tensors; what is asked once per kind of input is cached, as on a GPU.
    dispatch._obstacles = functools.cache(lambda *_: ("", ""))
    torch.set_num_threads(1)
    rows = measure()
    print(f"CPU-side cost of a call (any size of input), bfloat16, {VIEWS} views; the launch itself excluded")
    for row in rows:
        print(
            f"{row['inputs']:10}{row['mode']:20}{row['median_us']:8.1f} us"
            f"   ({row['least_us']:.1f} to {row['most_us']:.1f})"
        )
    if options.out:
        settings = {"batch": BATCH, "length": LENGTH, "width": WIDTH, "views": VIEWS}
        result = {"machine": machine(torch.device("cpu")), "settings": settings, "complete": True, "rows": rows}
        results.write(options.out / "host_cost.json", "host_cost", result)
        print(options.out / "host_cost.json")


if __name__ == "__main__":
    main()
