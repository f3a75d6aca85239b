"""A small timing of the mixed LoRA layer on this machine, for `sapt-fast bench`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from sapt_fast import dispatch
from sapt_fast.checks import require_choice, require_count, require_number
from sapt_fast.ops import mixed_lora_linear

__all__ = ["LayerSize", "bench_table", "time_layer"]


@dataclass(frozen=True)
class LayerSize:
    """A layer and a batch: `batch` samples of `tokens`, `tasks` adapters of rank `rank`."""

    batch: int = 8
    tokens: int = 128
    inputs: int = 1024
    outputs: int = 1024
    tasks: int = 15
    rank: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require_count(name, value)

    def bytes(self, dtype: torch.dtype) -> int:
        """What the tensors of a forward and backward pass take at least."""
        rank, rows = self.tasks * self.rank, self.batch * self.tokens
        weights = self.inputs * self.outputs + rank * (self.inputs + self.outputs)
        return dtype.itemsize * (weights + 2 * rows * (self.inputs + self.outputs))


def time_layer(
    size: LayerSize,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    seconds: float = 0.5,
) -> dict[str, float]:
    """Median seconds of `mixed_lora_linear` in each backend that runs here.

    Args:
        size: shapes.
        backward: time forward and backward, the newest adapter training, instead of the forward.
        seconds: time spent on each measurement.

    Returns:
        By name: "base linear" (the layer without adapters), then the backends.

    Raises:
        ValueError: no such device or it is not here, `seconds` is no duration of an hour at most,
            or the layer does not fit into this machine's memory.
    """
    require_choice("device", device, ("cpu", "cuda"))
    require_number("seconds", seconds, most=3600, positive=True)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but torch sees no GPU; use 'cpu'")
    memory = _memory(device)
    if size.bytes(dtype) > memory:
        raise ValueError(
            f"batch, tokens, inputs, outputs, tasks, rank: got {size}, whose tensors take "
            f"{size.bytes(dtype) / 1e9:.3g} GB, but {device} has {memory / 1e9:.3g} GB"
        )
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rank = size.tasks * size.rank
    x = draw(size.batch, size.tokens, size.inputs).requires_grad_(backward)
    weight, lora_a, lora_b = (
        draw(size.outputs, size.inputs),
        draw(rank, size.inputs).requires_grad_(backward),
        draw(rank, size.outputs).requires_grad_(backward),
    )
    mixture = torch.softmax(draw(size.batch, size.tasks).float(), -1).requires_grad_(backward)
    dy = draw(size.batch, size.tokens, size.outputs)

    def mixed(backend: str) -> Callable[[], Tensor]:
        return lambda: mixed_lora_linear(
            x, weight, None, lora_a, lora_b, mixture,
            ranks=size.rank, trainable=[size.tasks - 1], backend=backend,
        )  # fmt: skip

    layers: dict[str, Callable[[], Tensor]] = {
        "base linear": lambda: torch.nn.functional.linear(x, weight)
    }
    kind = torch.device(device).type
    for backend in dispatch.BACKENDS:
        interpreted = backend == "triton" and kind != "cuda"
        if not interpreted and dispatch.unavailable("mixed_lora", backend, kind) is None:
            layers[backend] = mixed(backend)
    return {name: _seconds(layer, dy, backward, seconds) for name, layer in layers.items()}


def _seconds(layer: Callable[[], Tensor], dy: Tensor, backward: bool, seconds: float) -> float:
    def step() -> None:
        if backward:
            layer().backward(dy)
        else:
            with torch.no_grad():
                layer()

    step()
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def _memory(device: str) -> int:
    """Bytes of the GPU or of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bench_table(size: LayerSize, times: dict[str, float], title: str) -> Table:
    """Milliseconds and the ratio to the base layer."""
    table = Table(
        title=title,
        caption=f"{size.batch} x {size.tokens} tokens, {size.inputs} to {size.outputs}, "
        f"{size.tasks} adapters of rank {size.rank}",
    )
    table.add_column("layer")
    table.add_column("ms", justify="right")
    table.add_column("/ base", justify="right")
    base = next(iter(times.values()))
    for name, value in times.items():
        table.add_row(name, f"{1e3 * value:.3f}", f"{value / base:.2f}")
    return table
