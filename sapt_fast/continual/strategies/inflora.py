"""InfLoRA: every task trains in directions in which the inputs of earlier tasks are small."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import forward, routed_inputs
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import Strategy, require
from sapt_fast.continual.subspaces import (
    Subspace,
    gathered_moments,
    grown,
    leading_directions,
    of_one_length,
)
from sapt_fast.continual.workbench import Workbench
from sapt_fast.methods.lora_sum import LoraSumConfig
from sapt_fast.methods.task_config import TaskConfig
from sapt_fast.pools.lora import AdapterPool

__all__ = ["InfLora", "InfLoraOptions", "MemoryOptions"]

logger = logging.getLogger(__name__)

_DESIGNS = ("inputs", "random")
_KEPT, _COMPLEMENT = "memory.", "complement."
_LEAST_NORM = 1e-6  # of a row of A: less is rounding


@dataclass(frozen=True)
class MemoryOptions:
    """Options of a memory of the subspaces that inputs of earlier tasks span."""

    threshold: float = field(
        default=0.995,
        metadata={
            "help": "Share of the inputs' energy that the memory takes in after the first task."
        },
    )
    expected_tasks: int = field(
        default=15,
        metadata={"help": "Number of tasks over which the share rises linearly to 1."},
    )
    rows: int = field(
        default=1000,
        metadata={"help": "Largest number of training examples from which a subspace is computed."},
    )

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")
        require(self.expected_tasks >= 1, "expected_tasks", self.expected_tasks, "at least 1")
        require(self.rows >= 1, "rows", self.rows, "at least 1")


@dataclass(frozen=True)
class InfLoraOptions(MemoryOptions):
    """Options of `InfLora`."""

    design: str = field(
        default="inputs",
        metadata={
            "help": "A of a new adapter: 'inputs', the directions in which the task's inputs are "
            "largest; 'random', a random A. Both are orthogonal to the memory."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.design in _DESIGNS, "design", self.design, f"one of {_DESIGNS}")


class InfLora(Strategy):
    """Interference-free LoRA (Liang and Li, InfLoRA, CVPR 2024): L = CE of the newest B.

    All adapters are summed for every input, y = W x + sum_{k<=t} (alpha / r) B_k A_k x. The past
    ones are frozen. Of the new one, A is designed before the task and frozen, and B trains:

        M = mean of x x^T over the task's inputs x of the layer
        A_t = (r leading left singular vectors of (I - P) M)^T / sqrt(3)

    P projects to the layer's memory, a subspace that contains most of the earlier tasks' inputs. An
    input inside of it is not changed by the new adapter, because A_t x = 0. After the task, the
    memory takes in directions of (I - P) M, with M of the trained model, until it has a share
    epsilon_t of |M|^2 = sum of the squared singular values of M (`continual.subspaces.grown`):

        epsilon_t = threshold + (1 - threshold) (t - 1) / expected_tasks

    Source: the authors' code for images (github.com/liangyanshuo/InfLoRA) and for T5
    (github.com/liangyanshuo/gainlora). threshold, expected_tasks and the 1 / sqrt(3), which is the
    norm of a row of a Kaiming-uniform A, are those of the code for T5. For plain InfLoRA, that code
    has `design="random"`: a Kaiming-uniform A times I - P, each row with the norm 1 / sqrt(3).

    Where ours differs:

    - Padding is left out of M; theirs for T5 includes it.
    - Each layer has the M of its own input. Theirs for T5 has one per attention module, of its
      queries' input, also for the values of cross-attention, which read the encoder's output.
    - M is computed from at most `rows` examples, theirs for T5 from at most 1001 batches.
    - If the inputs have fewer than r directions off the memory, the other rows of A are 0. Theirs
      takes arbitrary singular vectors, which may lie in the memory.
    - epsilon_t stays at 1 after `expected_tasks`.
    - Theirs for images classifies with a head per task and trains keys and values; ours trains
      `target_modules`.
    """

    Options: ClassVar[Any] = InfLoraOptions
    _memory: dict[str, Subspace]

    def __init__(self, bench: Workbench, options: Any) -> None:
        super().__init__(bench, options)
        self._memory = {}

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        kind = settings.sapt.adapter
        require(kind == "lora", "adapter", kind, "'lora', whose A is designed")

    def configure(self, config: TaskConfig[Any]) -> Any:
        return LoraSumConfig(**config.to_dict())

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)
        self.design(self.moments(task) if self.options.design == "inputs" else {})

    def end_task(self, task: TaskData) -> None:
        self.remember(self.moments(task))

    # --- the adapters ---

    @torch.no_grad()
    def design(self, moments: Mapping[str, Tensor]) -> None:
        """Sets and freezes A of the newest adapter of every layer.

        Args:
            moments: of `moments`; layers without one get a random A off the memory.
        """
        without = []
        for first, pools in self.input_groups().items():
            name = f"layers.{first}"
            kept, rank = self._memory.get(name), pools[0].ranks[-1]
            found = leading_directions(moments[name], rank, kept) if name in moments else None
            for pool in pools:
                newest = pool.a.trainable
                newest.requires_grad_(False)
                if found is not None:
                    rows = found
                elif kept is not None:
                    rows = kept.off(newest.double().cpu())
                else:
                    continue
                norms = rows.norm(dim=1, keepdim=True)
                newest.copy_(torch.where(norms > _LEAST_NORM, rows / norms / 3**0.5, 0.0))
                if (norms <= _LEAST_NORM).any():
                    without.append(first)
        if without:
            logger.warning(
                "%s: %d of %d layers have fewer than r directions left off the memory, %s first; "
                "lower r or the threshold", self.handle.tasks[-1], len(without),
                len(self.handle.pools), without[0],
            )  # fmt: skip

    def input_groups(self) -> dict[str, list[AdapterPool]]:
        """Returns the pools of all layers, grouped by layers with one input.

        Returns:
            By the path of the group's first layer, the pools of its layers.
        """
        groups: dict[Any, tuple[str, list[AdapterPool]]] = {}
        for path, layer in self.handle.layers.items():
            key = getattr(layer, "sapt_group", None) or layer
            groups.setdefault(key, (path, []))[1].append(layer.sapt_pool)
        return dict(groups.values())

    # --- the memory ---

    @torch.no_grad()
    def moments(self, task: TaskData) -> dict[str, Tensor]:
        """Returns the mean of x x^T over a task's training inputs, [D, D] float32.

        The names are "layers.<path>", one of each group of `input_groups`.
        """
        layers = self.handle.layers
        watched = {f"layers.{path}": layers[path] for path in self.input_groups()}
        self.model.eval()
        with gathered_moments(watched) as found, self.bench.settings.autocast(self.bench.device):
            for batch in self.batches(task):
                weights = self.mixture(*routed_inputs(batch, self.bench.causal))
                forward(self.model, batch, weights, space=self.bench.space)
        return found

    def batches(self, task: TaskData) -> Iterator[dict[str, Tensor]]:
        """Yields batches of a task's first training examples, without padding."""
        rows = self.bench.encode(task.train[: self.options.rows])
        for few in of_one_length(rows, self.bench.settings.eval_batch_size):
            yield self.bench.collate(few)

    def remember(self, moments: Mapping[str, Tensor]) -> None:
        """Takes the newest task's inputs into the memory.

        Args:
            moments: of `moments`, after training.
        """
        self.grow_memory(moments, self.options.threshold)

    def grow_memory(self, moments: Mapping[str, Tensor], threshold: float) -> None:
        """Takes inputs into memories, until each has epsilon_t of the newest task t.

        Args:
            moments: by the memories' names.
            threshold: epsilon_1.
        """
        done = min(1.0, (len(self.handle.tasks) - 1) / self.options.expected_tasks)
        share = threshold + (1 - threshold) * done
        for name, moment in moments.items():
            self._memory[name] = grown(self._memory.get(name), moment, share)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{_COMPLEMENT if kept.complement else _KEPT}{name}": kept.basis
            for name, kept in self._memory.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._memory = {
            name.removeprefix(prefix): Subspace(basis.cpu(), prefix == _COMPLEMENT)
            for prefix in (_KEPT, _COMPLEMENT)
            for name, basis in state.items()
            if name.startswith(prefix)
        }
