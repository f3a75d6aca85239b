"""Methods that put several prompts one after the other before an input: L2P and ProgPrompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor

from sapt_fast.methods.sapt_prompt import PromptHandle
from sapt_fast.methods.task_config import TaskConfig, require
from sapt_fast.sites.warm import run_backward

__all__ = ["ConcatenatedConfig", "ConcatenatedHandle"]

_Handle = TypeVar("_Handle")


@dataclass
class ConcatenatedConfig(TaskConfig[_Handle]):
    """The config of methods whose weights are the places of prompts."""

    adapter: str = field(default="prompt", metadata={"help": "Prompts: no other kind fits."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.adapter == "prompt", "adapter", self.adapter, "'prompt'")
        keyless = "0: a prompt has no weight"
        require(self.own_key_loss == 0, "own_key_loss", self.own_key_loss, keyless)
        expected = "False: there are no weights by which outputs of modules could be mixed"
        require(not self.modules_per_task, "modules_per_task", True, expected)


class ConcatenatedHandle(PromptHandle):
    """`PromptHandle` whose running weights are the places [B, N] of the prompts."""

    trains_router = False

    def _run_mixture(self, weights: Tensor, ids: Tensor) -> None:
        embedding, routing = self._model.get_input_embeddings(), cast(Any, self.routing)
        index = weights.expand(len(ids), -1)
        run_backward(lambda: [routing.pool(index, embedding, ids)], [self.prompts.rows.trainable])

    def mixed_adapter(self, weights: Tensor, shared: Mapping[str, Tensor]) -> Any:
        """Not possible: raises ValueError, since the prompts are not mixed."""
        raise ValueError(
            f"export_adapter: not available for {self.method}, which puts whole prompts one after "
            "the other and mixes none"
        )
