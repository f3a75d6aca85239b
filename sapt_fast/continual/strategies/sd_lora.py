"""SD-LoRA: earlier adapters keep their directions, and their magnitudes go on training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import Strategy, options_from, require
from sapt_fast.methods.sd_lora import SdLoraConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["SdLora"]


class SdLora(Strategy):
    """Decoupled magnitudes and directions (Wu et al., SD-LoRA, ICLR 2025): L = CE.

    `sapt_fast.methods.sd_lora.SdLoraHandle` has the equation and the differences from the authors'
    code. Their training uses SGD with momentum, ours the optimizer of all strategies (AdamW). Their
    penalty on the overlap of adapters is computed, but not part of their loss; ours has none.
    """

    Options = options_from("SdLoraOptions", SdLoraConfig, "magnitude", "normalize")
    data: ClassVar[tuple[str, ...]] = ("text", "images")

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        kind = settings.sapt.adapter
        require(kind == "lora", "adapter", kind, "'lora', which has a direction")

    def configure(self, config: TaskConfig[Any]) -> SdLoraConfig:
        options = {"magnitude": self.options.magnitude, "normalize": self.options.normalize}
        return SdLoraConfig(**{**config.to_dict(), **options})

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)
