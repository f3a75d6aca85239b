"""Op `own_lora`: sizes. It has no GPU kernels, and takes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from op_case import Draw, Inputs, OpCase
from torch import Tensor

from sapt_fast.ops.own_lora import Adapter, own_lora


@dataclass(frozen=True)
class OwnLoraCase(OpCase):
    """A linear layer in which each sample has its own adapter, one after the other."""

    samples: int
    tokens: int
    width: int
    out: int
    adapters: int
    rank: int
    op: str = "own_lora"
    trains: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = Draw(dtype, device)
        return {
            "x": draw(self.samples, self.tokens, self.width),
            "weight": draw(self.out, self.width, scale=self.width**-0.5),
            "a": draw(self.adapters, self.rank, self.width, scale=self.width**-0.5),
            "b": draw(self.adapters, self.out, self.rank),
        }

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        x, weight, a, b = inputs.values()
        adapters = [Adapter(*factors, 0.5) for factors in zip(a, b, strict=True)]
        return {"y": own_lora(x, weight, None, adapters, self._owner, backend=backend)}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        x, weight, a, b = inputs.values()
        owner = torch.tensor(self._owner, device=x.device)

        def plain() -> Tensor:
            mine, theirs = a[owner].transpose(1, 2), b[owner].transpose(1, 2)
            return F.linear(x, weight) + 0.5 * (x @ mine @ theirs)

        return {"torch": plain}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        read = min(self.samples, self.adapters)
        factors = read * self.rank * (self.width + self.out)
        rows = self.samples * self.tokens * (self.width + self.out)
        return (self.width * self.out + factors + rows) * dtype.itemsize

    @property
    def _owner(self) -> list[int]:
        return [sample % self.adapters for sample in range(self.samples)]


CHECKED = (OwnLoraCase(8, 64, 1024, 1024, 4, 8), OwnLoraCase(3, 7, 100, 90, 2, 5))
CHECKED_QUICK = (OwnLoraCase(4, 3, 48, 40, 2, 4),)
CPU_CHECKED = CHECKED
CPU_TIMED = (
    (OwnLoraCase(8, 1, 1024, 1024, 4, 8), torch.float32),
    (OwnLoraCase(8, 1, 1024, 1024, 4, 8), torch.bfloat16),
)
CPU_TIMED_QUICK = ((CHECKED_QUICK[0], torch.float32),)
