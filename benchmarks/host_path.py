"""Host time of a GPU call of op `mixed_lora` in eager mode, measured without a GPU.

    python benchmarks/host_path.py [--rounds N]

Prints thread CPU time in microseconds, then as its last line one JSON object of ratios, ours over
stacked. Stacked is linear, mul, linear, addmm of each projection, with weights that are already
laid out by rank. Cases: one projection, and two of one input; 4 rows, without gradients, and
forward and backward.

What is counted: all Python and C++ code of ours, of Triton and of torch up to the call of the
driver: checks, dispatch, autograd, allocations, `JITFunction.run` and Triton's launcher class.

What is not counted, or stands in for something else:

- The driver's launch is a function that does nothing, and nothing is compiled. On a GPU every
  launch costs a few microseconds more, on either side.
- Tensors are on the CPU. Allocations cost what the CPU's allocator asks, device guards nothing.
- Ours names its backend. To have it chosen takes about a microsecond more.
- Layers and router: `mix` is called with pools that are stacked already.
- The operations of the stacked form are those of tensors of width 8 on the CPU: torch's dispatch
  and autograd with next to no arithmetic. Ours calls none of cuBLAS at these sizes.

So the ratios compare host code. They are no prediction of times on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default changes with Triton 3.10

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.runtime.jit import JITFunction

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from sapt_fast import dispatch
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.triton_kernels.blocks import common

ROWS, WIDTH, ADAPTERS, RANK = 4, 1024, 15, 4
_CAPABILITY, _NUM_SMS = 90, 132

Call = Callable[[], object]
Launch = tuple[str, tuple[Any, ...], tuple[Any, ...]]


class Filled(NamedTuple):
    """What a kernel gets of a tensor descriptor."""

    address: int
    fields: tuple[Any, ...]


class StubKernel:
    """What Triton makes of a kernel, behind its own launcher, but for the driver's call."""

    def __init__(self, name: str, signature: dict[str, str], launches: list[Launch] | None) -> None:
        described = [s for s in signature.values() if str(s).startswith("tensordesc")]
        meta = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [64, 64]}
        meta["fp4_padded"] = False

        def launch(*arguments: Any) -> None:
            if launches is not None:
                # Not the hooks and what they get: None with plans, and without them none is set.
                kept = *arguments[:8], *arguments[11:-1]
                launches.append((name, kept, arguments[-1]))

        launcher: Any = object.__new__(driver.CudaLauncher)
        launcher.gsan_enabled, launcher.num_ctas = False, 1
        launcher.arg_annotations = launcher.kernel_signature = None
        launcher.global_scratch_size, launcher.global_scratch_align = 0, 1
        launcher.profile_scratch_size, launcher.profile_scratch_align = 0, 1
        launcher.launch_cooperative_grid = launcher.launch_pdl = False
        launcher.launch = driver.wrap_handle_tensordesc(
            launch, signature, [meta] * len(described) or None
        )
        self.run, self.function, self.packed_metadata = launcher, 0, ()

    def launch_metadata(self, *_: Any) -> None:
        return None


@contextlib.contextmanager
def stubbed(launches: list[Launch] | None = None) -> Iterator[None]:
    """Makes Triton kernels take CPU tensors and end at the driver.

    Triton's driver stays replaced: a machine without a GPU has none to go back to.

    Args:
        launches: receives of every launch the name, what the driver gets before the kernel's
            arguments (the grid first), and these; None where time is measured.
    """

    def compiled(self: Any, key: str, signature: dict[str, str], device: int, *_: Any) -> Any:
        kernel = StubKernel(self.fn.__name__, signature, launches)
        self.device_caches[device][0][key] = kernel
        return kernel

    target, traits = GPUTarget("cuda", _CAPABILITY, 32), common.DeviceTraits(_CAPABILITY, _NUM_SMS)
    utils = SimpleNamespace(fill_tma_descriptor_tiled=lambda *fields: Filled(fields[0], fields[1:]))
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            allocate_default_profile_scratch=lambda *_: None,
            utils=utils,
        )
    )
    replaced = [
        (JITFunction, "_do_compile", compiled),
        (common, "device_traits", lambda device: traits),
        (dispatch, "unavailable", lambda *_: None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    dispatch._resolve.cache_clear()
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        dispatch._resolve.cache_clear()


def ours(members: int, training: bool, backend: str = "triton") -> Call:
    """A call of `mix` on `members` projections of one input; the last adapter trains."""
    ranks = ADAPTERS * RANK
    trained = ranks - RANK

    def empty(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    pooled = []
    for _ in range(members):
        a, b = empty(ranks, WIDTH), empty(ranks, WIDTH)
        table = torch.arange(ADAPTERS, dtype=torch.int32).repeat_interleave(RANK), torch.ones(ranks)
        parts = [[torch.nn.Parameter(stack[trained:])] for stack in (a, b)]
        projection = Projection(empty(WIDTH, WIDTH), None, a, b, *table)
        pooled.append(PooledProjection(projection, *parts, [trained, ranks]))
    x, mixture = empty(ROWS, WIDTH), torch.rand(ROWS, ADAPTERS)
    if not training:
        return lambda: mix(x, mixture, pooled, backend=backend)
    x.requires_grad_()
    mixture.requires_grad_()
    leaves = [x, mixture, *(p for each in pooled for p in (*each.train_a, *each.train_b))]
    dys = [torch.ones(ROWS, WIDTH, dtype=torch.bfloat16) for _ in range(members)]

    def step() -> object:
        return torch.autograd.grad(mix(x, mixture, pooled, backend=backend), leaves, dys)

    return step


def stacked(members: int, training: bool) -> Call:
    """The same by torch's own operations, on tensors of width 8."""
    x, weight = torch.randn(ROWS, 8), torch.randn(8, 8)
    factors = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(members)]
    weights = torch.rand(ROWS, 4)

    def forward() -> list[Tensor]:
        ys = []
        for a, b in factors:
            h = F.linear(x, a) * weights
            ys.append(torch.addmm(F.linear(x, weight), h, b))
        return ys

    if not training:
        return forward
    leaves = [x, weights, *(t for pair in factors for t in pair)]
    for leaf in leaves:
        leaf.requires_grad_()
    dys = [torch.ones(ROWS, 8) for _ in range(members)]
    return lambda: torch.autograd.grad(forward(), leaves, dys)


def interleaved_us(functions: dict[str, Call], rounds: int, calls: int = 10) -> dict[str, float]:
    """Least thread CPU time of a call in microseconds; batches of the functions alternate.

    The least, because whatever else the machine does only adds to it.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.thread_time_ns()
            for _ in range(calls):
                function()
            times[name].append((time.thread_time_ns() - start) / calls / 1e3)
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    """Measures and prints all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200, help="batches of each [default: 200]")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    ratios = {}
    with stubbed():
        for mode, training in (("no_grad", False), ("train", True)):
            for group, members in (("one", 1), ("qv", 2)):
                with torch.set_grad_enabled(training):
                    us = interleaved_us(
                        {"ours": ours(members, training), "stacked": stacked(members, training)},
                        rounds,
                    )
                ratios[f"{mode}_{group}"] = round(us["ours"] / us["stacked"], 2)
                print(f"{mode}_{group}: ours {us['ours']:.1f} us, stacked {us['stacked']:.1f} us")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
