"""A sum of LoRA adapters: every adapter has weight 1, whatever the input.

The pool of O-LoRA (Wang et al., "Orthogonal Subspace Learning for Language Model Continual
Learning", Findings of EMNLP 2023, equation 5: W + sum_t A_t B_t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapt_fast.methods.sapt import SaptHandle
from sapt_fast.methods.task_config import TaskConfig, require

__all__ = ["LoraSumConfig", "LoraSumHandle"]


@dataclass
class LoraSumConfig(TaskConfig["LoraSumHandle"]):
    """Shape and placement of the adapters; the fields of the router have no effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.adapter == "lora", "adapter", self.adapter, "'lora'")

    @property
    def method(self) -> str:
        """The name of the method."""
        return "lora_sum"


class LoraSumHandle(SaptHandle):
    """`SaptHandle` that sums its adapters; its router does not train.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.lora_sum import LoraSumConfig
        >>> model = sapt_fast.patch(load_backbone(), LoraSumConfig(r=4))
        >>> model.sapt.add_task("first")
        >>> model.sapt.add_task("second")
        >>> model.sapt.route(torch.tensor([[4, 5, 6]])).tolist()
        [[1.0, 1.0]]
    """

    Config = LoraSumConfig
    method = "lora_sum"
    trains_router = False
    weights_sum_to_one = False

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns ones [1, K], for all inputs."""
        return torch.ones(1, len(self.tasks), device=self._device)
