"""`sapt-fast bench`: times the mixed LoRA layer on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from sapt_fast import dispatch
from sapt_fast.checks import require_choice, require_number
from sapt_fast.commands.layer_size import LayerSize
from sapt_fast.commands.output import show
from sapt_fast.continual.data.sources import torch_dtype
from sapt_fast.ops import mixed_lora_linear

__all__ = ["bench_table", "show_times", "time_layer"]


def show_times(size: LayerSize, device: str, dtype: str, seconds: float) -> None:
    """Prints a table of the forward pass and one of forward and backward; arguments as in
    `time_layer`."""
    for backward, title in ((False, "forward"), (True, "forward and backward")):
        times = time_layer(
            size, device=device, dtype=torch_dtype(dtype), backward=backward, seconds=seconds
        )
        show(bench_table(size, times, f"{title}, {dtype} on {device}"))


def time_layer(
    size: LayerSize,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    seconds: float = 0.5,
) -> dict[str, float]:
    """Measures `mixed_lora_linear` in each backend that runs here.

    Args:
        size: sizes of the layer, the adapters and the batch.
        device: "cpu" or "cuda".
        dtype: dtype of the inputs and the weights.
        backward: time the forward and the backward pass, with gradients of the newest adapter.
        seconds: duration of each measurement, at most an hour.

    Returns:
        Median seconds by name: "base linear" (the layer without adapters), then the backends.

    Raises:
        ValueError: if the device is not available, a value is out of range, or the layer does not
            fit into memory.
    """
    require_choice("device", device, ("cpu", "cuda"))
    require_number("seconds", seconds, most=3600, positive=True)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but torch sees no GPU; use 'cpu'")
    memory = _memory(device)
    if size.bytes(dtype.itemsize) > memory:
        raise ValueError(
            f"batch, tokens, inputs, outputs, tasks, rank: got {size}, whose tensors take "
            f"{size.bytes(dtype.itemsize) / 1e9:.3g} GB, but {device} has {memory / 1e9:.3g} GB"
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
