"""What a case of an op is: its inputs, our op, plain torch, bytes moved, and kernels launched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


class OpCase(ABC):
    """One op at one size.

    Attributes:
        op: its name.
        trains: the inputs whose gradients are compared.
        floor: the error that is allowed whatever plain torch's is.
    """

    op: str
    trains: tuple[str, ...]
    floor = 0.0

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        """Fresh inputs, the same for the same arguments."""

    @abstractmethod
    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        """What is compared with float64; indices are checked by what they point to."""

    def bare(self, inputs: Inputs, backend: str) -> Callable[[], object]:
        """Our op alone, without what `run` adds to check an index."""
        return lambda: self.run(inputs, backend)

    def incoming(self, output: Tensor) -> Tensor:
        """The gradient of the first output."""
        generator = torch.Generator(output.device).manual_seed(1)
        return torch.randn(output.shape, generator=generator, device=output.device)

    def fits(self, backend: str) -> bool:
        """Whether the kernels of a backend that has the op take this size."""
        return True

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        """The op in plain torch."""
        return {}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        """The least that a forward reads and writes."""
        raise NotImplementedError


class Extra(NamedTuple):
    """Peak memory beside the inputs over so many bytes: what it is called and at most."""

    what: str
    of: Callable[[Any], int]
    most: float


@dataclass(frozen=True)
class Timed:
    """A case that gpu_check times, and what is asked of its speed in the full size.

    Attributes:
        name: of the case in the table of targets.
        graph_milliseconds: at most, replayed as a CUDA graph.
        share: by name of our functions ("ours", "cuda"), of the bandwidth of a copy at least.
        over_torch: ours over plain torch at most.
    """

    full: OpCase
    quick: OpCase
    name: str
    graph_milliseconds: float | None = None
    share: dict[str, float] = field(default_factory=dict)
    over_torch: float | None = None
    extra: Extra | None = None


class NewTensor(Protocol):
    """Allocates an input of a launch, of the case's dtype unless another is named."""

    def __call__(self, *shape: int, dtype: torch.dtype = ...) -> Tensor: ...


class LaunchCase(Protocol):
    """Calls that launch Triton kernels."""

    name: str
    dtype: torch.dtype
    quick: bool
    aligned: bool  # sizes are multiples of 16

    def launch(self, tensor: NewTensor) -> None:
        """Make the calls, with inputs from `tensor`."""


class Draw:
    """Normal numbers in one dtype on one device, from a fixed seed."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.options: dict[str, Any] = {"device": device, "generator": self.generator}
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, **self.options).mul_(scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, **self.options)

    def weights(self, *shape: int) -> Tensor:
        return torch.rand(shape, **self.options)

    def table(self, rows: int, width: int) -> Tensor:
        """No two rows are equal in any column."""
        order = self.weights(rows, width).argsort(0)
        return ((order - rows // 2) / 64).to(self.dtype)
