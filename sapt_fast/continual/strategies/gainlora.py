"""GainLoRA: gates that stay at zero on the inputs of earlier tasks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step, routed_inputs
from sapt_fast.continual.strategies.base import require
from sapt_fast.continual.strategies.inflora import InfLora, MemoryOptions
from sapt_fast.continual.strategies.olora import overlap
from sapt_fast.continual.subspaces import Moment, Subspace, leading_directions
from sapt_fast.methods.gainlora import GainLoraConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["GainLora", "GainLoraOptions"]

logger = logging.getLogger(__name__)

_BRANCHES = ("inflora", "olora")
# By the name of a memory, what the gate multiplies its vectors by.
_INPUTS, _HIDDEN, _OUTPUTS = _GATE = ("gate.inputs", "gate.hidden", "gate.outputs")
_LEAST_NORM = 1e-6


@dataclass(frozen=True)
class GainLoraOptions(MemoryOptions):
    """Options of `GainLora`."""

    branch: str = field(
        default="inflora",
        metadata={
            "help": "How adapters are trained: 'inflora', with the A of InfLoRA; 'olora', with "
            "O-LoRA's penalty."
        },
    )
    gate_threshold: float = field(
        default=0.995, metadata={"help": "As threshold, of the memories of the gates."}
    )
    orthogonality: float = field(
        default=0.5, metadata={"help": "Weight of the overlap, with branch='olora'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.branch in _BRANCHES, "branch", self.branch, f"one of {_BRANCHES}")
        share, weight = self.gate_threshold, self.orthogonality
        require(0 < share <= 1, "gate_threshold", share, "in (0, 1]")
        require(weight >= 0, "orthogonality", weight, "at least 0")


class GainLora(InfLora):
    """Gated integration of LoRA (Liang et al., GainLoRA, NeurIPS 2025), without replay.

        L = CE(x, y; sum_k w_k(x) adapter_k) [+ orthogonality sum_layers sum |A_past A_t^T|]

    `sapt_fast.methods.gainlora.GainLoraHandle` has the equation of the gates w_k. The newest gate
    and its key train with the newest adapter: as in InfLoRA, where only B trains
    (`strategies.inflora.InfLora`), or as in O-LoRA, with the second term.

    Memories P_1, P_2, P_3 keep the subspaces of what earlier tasks' inputs are in their gates: the
    pooled embeddings e [D], the hidden vectors SiLU(D_k e) [H] and the outputs g_k(e) [D]. They
    grow after each task as InfLoRA's do, with `gate_threshold`. Before a task:

        D_t = D_{t-1},   U_t = U_{t-1},
        key_t = (leading left singular vector of (I - P_3) M_3) |random key|

    M_3 is the mean of g g^T over the task's inputs. After every optimizer step, D_t, U_t and key_t
    are projected: their difference from the start keeps only its part off P_1, P_2 and P_3. So on
    an input inside of the memories, g_t(e) is what the earlier gate computed, its cosine with key_t
    is 0, and the new adapter has the weight 0, at the start and during the training.

    Source: the authors' code (github.com/liangyanshuo/gainlora), which has the branch 'inflora' for
    T5. Where ours differs, besides what the two classes above list:

    - Theirs scales every row of D_t, U_t and every key, after each projection, to the norm that it
      had before. This moves what the gate computes of earlier inputs; ours leaves it out.
    - The branch 'olora' follows the paper's name for it and O-LoRA's code, since theirs lacks it.
    - If the task's inputs have no direction off P_3, the key starts at random off P_3, and a
      warning is logged. Theirs takes an arbitrary singular vector.
    """

    Options = GainLoraOptions
    routes = True
    _start: dict[str, tuple[Tensor, Subspace]]

    @classmethod
    def adds_to_loss(cls, options: Any) -> bool:
        return options.branch == "olora" or cls.objective is not GainLora.objective

    def configure(self, config: TaskConfig[Any]) -> GainLoraConfig:
        return GainLoraConfig(**config.to_dict())

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)
        self.prepare(task)

    def prepare(self, task: TaskData) -> None:
        """Designs the newest adapter and starts the newest key, from the task's inputs."""
        moments = self.moments(task)
        if self._designs:
            self.design(moments)
        self.start_key(moments[_OUTPUTS])
        self._start = {
            # A copy in memory of its own: products depend on alignment, and resumed runs repeat.
            name: (p.detach().clone(), self._memory[name].copy_to(p.device))
            for name, p in self.gate().items()
            if name in self._memory
        }

    def objective(self, step: Step) -> Tensor:
        if self._designs:
            return step.loss
        return step.loss + self.options.orthogonality * overlap(self.handle.pools.values())

    @torch.no_grad()
    def after_step(self) -> None:
        parameters = self.gate()
        for name, (start, kept) in self._start.items():
            wide = torch.promote_types(start.dtype, torch.float32)
            moved = parameters[name].to(wide) - start
            parameters[name].copy_(start + kept.off(moved))

    @property
    def _designs(self) -> bool:
        """Whether adapters are InfLoRA's."""
        return bool(self.options.branch == "inflora")

    def gate(self) -> dict[str, Tensor]:
        """Returns the matrices of the newest gate, by the memory of the vectors they multiply."""
        gates = self.handle.gates
        parameters = gates.down.trainable, gates.up.trainable, self.handle.router.keys.trainable
        return dict(zip(_GATE, parameters, strict=True))

    @torch.no_grad()
    def start_key(self, moment: Tensor) -> None:
        """Sets the newest key to the main direction of the task's inputs off the memory.

        Args:
            moment: M_3 [D, D], the mean of g g^T over the task's inputs.
        """
        key, kept = self.handle.router.keys.trainable, self._memory.get(_OUTPUTS)
        (direction,) = leading_directions(moment, 1, kept)
        if not direction.any():
            drawn = key.double().cpu()
            (direction,) = drawn if kept is None else kept.off(drawn)
            if direction.norm() < _LEAST_NORM * drawn.norm():
                (direction,) = drawn
            logger.warning(
                "%s: the gate computes nothing of its inputs that it does not of earlier tasks'; "
                "its key starts at random: lower gate_threshold", self.handle.tasks[-1],
            )  # fmt: skip
        key.copy_(direction / direction.norm() * key.double().norm().cpu())

    # --- the memory ---

    @torch.no_grad()
    def moments(self, task: TaskData) -> dict[str, Tensor]:
        """Returns the moments of the newest gate's vectors; with branch='inflora' of layers too."""
        found = super().moments(task) if self._designs else {}
        gate = {name: Moment() for name in _GATE}
        for batch in self.batches(task):
            inputs = routed_inputs(batch, self.bench.causal)
            for moment, x in zip(gate.values(), self.handle.features(*inputs), strict=True):
                moment.add(x)
        means = {name: moment.mean() for name, moment in gate.items()}
        return {**found, **{name: mean for name, mean in means.items() if mean is not None}}

    def remember(self, moments: Mapping[str, Tensor]) -> None:
        gate = {name: moment for name, moment in moments.items() if name in _GATE}
        self.grow_memory(gate, self.options.gate_threshold)
        super().remember({n: moment for n, moment in moments.items() if n not in gate})
