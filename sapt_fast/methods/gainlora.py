"""GainLoRA: a gate per task decides how much of its LoRA adapter each input gets.

Liang et al., "Gated Integration of Low-Rank Adaptation for Continual Learning of Large Language
Models", NeurIPS 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapt_fast.methods.sapt import SaptHandle
from sapt_fast.methods.task_config import TaskConfig, require
from sapt_fast.ops._common import without_autocast
from sapt_fast.ops.route import TaskProjections, route
from sapt_fast.pools.rows import RowStack
from sapt_fast.sites.towers import input_width
from sapt_fast.storage.task_saving import stacked_rows

__all__ = ["GainLoraConfig", "GainLoraHandle", "TaskGates"]

_TEMPERATURE = 0.25  # the authors' code multiplies the cosine by 4


@dataclass
class GainLoraConfig(TaskConfig["GainLoraHandle"]):
    """Shape and placement of the adapters and their gates.

    The hidden size of a gate is `query_hidden_dim`, the divisor of the cosine is `temperature`
    [default: 1/4]. `key_init` has no effect.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.adapter == "lora", "adapter", self.adapter, "'lora'")

    @property
    def method(self) -> str:
        """The name of the method."""
        return "gainlora"


class TaskGates(nn.Module):
    """The two matrices of each task's gate, g_k(x) = SiLU(U_k SiLU(D_k x)), without biases.

    Args:
        width: D, the width of the input embeddings.
        config: hidden size H (`query_hidden_dim`), `query_init` and `reserve_tasks`.
        initializer_range: standard deviation of the first gate with `query_init="normal"`.
        device, dtype: of the parameters.

    Attributes:
        down: the stacked D_k, [K H, D].
        up: the stacked U_k, [K D, H].
    """

    def __init__(
        self,
        width: int,
        config: GainLoraConfig,
        *,
        initializer_range: float = 0.02,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hidden, tasks = config.query_hidden_dim, config.reserve_tasks
        self.down = RowStack(width, tasks * hidden, device=device, dtype=dtype)
        self.up = RowStack(hidden, tasks * width, device=device, dtype=dtype)
        self._deviation = initializer_range if config.query_init == "normal" else None

    def add(self) -> None:
        """Adds a trainable gate, a copy of the newest one; earlier gates freeze."""
        for stack, rows in ((self.down, self.up.width), (self.up, self.down.width)):
            stack.append(rows, self._fill(stack))

    def _fill(self, stack: RowStack) -> Callable[[Tensor], object]:
        if len(stack):
            return lambda rows: rows.copy_(stack.trainable)
        deviation = self._deviation
        if deviation is not None:
            return lambda rows: nn.init.normal_(rows, std=deviation)
        return lambda rows: nn.init.kaiming_uniform_(rows, a=5**0.5)  # as nn.Linear

    def stacked(self, down: Tensor, up: Tensor) -> TaskProjections:
        """Returns rows of `down` and `up` as [K, H, D] and [K, D, H]."""
        width, hidden = self.down.width, self.up.width
        return TaskProjections(down.view(-1, hidden, width), up.view(-1, width, hidden))

    def projections(self) -> TaskProjections:
        """Returns the matrices of all gates; those of the newest one receive gradients."""
        return self.stacked(self.down.joined(), self.up.joined())

    @torch.no_grad()
    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the newest gate computes of x [B, D].

        Returns:
            SiLU(D_K x) [B, H], and g_K(x) [B, D].
        """
        hidden = F.silu(x @ self.down.trainable.T)
        return hidden, F.silu(hidden @ self.up.trainable.T)


class GainLoraHandle(SaptHandle):
    """`SaptHandle` whose weights are gates: one per task, for each input, that do not sum to 1.

        w_k(x) = |2 sigmoid(4 cos(g_k(e(x)), key_k)) - 1|,   g_k(e) = SiLU(U_k SiLU(D_k e))

    e(x) is the pooled input embedding. The newest gate, its key and its adapter train; a new gate
    starts as a copy of the previous one, with a new key. The first gate starts as nn.Linear does.

    Source: the authors' code (github.com/liangyanshuo/gainlora). Where ours differs:

    - e(x) is the mean over the prompt's tokens. Theirs divides the sum over the tokens by the
      padded length, so that padding changes the weights.
    - A gate whose vectors are zero has the weight 0; theirs is NaN.

    What makes a new gate zero on earlier tasks' inputs (the start of its key, and the projection of
    its updates) is computed from the task's inputs, by the strategy `gainlora`:
    `sapt_fast.continual.strategies.gainlora.GainLora`. `add_task` alone starts a key at random.

    Attributes:
        gates: the gates' matrices; the keys are `router.keys`. The rest of `router` is not used.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.gainlora import GainLoraConfig
        >>> model = sapt_fast.patch(load_backbone(), GainLoraConfig(r=4))
        >>> model.sapt.add_task("first")
        >>> model.sapt.add_task("second")
        >>> model.sapt.route(torch.tensor([[4, 5, 6], [9, 8, 7]])).shape
        torch.Size([2, 2])
    """

    Config = GainLoraConfig
    method = "gainlora"
    trains_router = False
    weights_sum_to_one = False

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        weight = self.router.norm.weight  # has the adapters' device and dtype
        self.gates = TaskGates(
            input_width(model),
            config,
            initializer_range=getattr(model.config, "initializer_range", 0.02),
            device=weight.device,
            dtype=weight.dtype,
        )

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns the gates' weights [B, K] for inputs with one text or image per row."""
        config = self.config
        with self._in_one_piece(), self._in_one_piece(self.gates):
            pooled = self._pooled(**inputs)
            with without_autocast(pooled.device):
                return route(
                    pooled,
                    self.router.keys.joined(),
                    self.gates.projections(),
                    gate="abs_sigmoid",
                    similarity="cosine",
                    temperature=config.temperature or _TEMPERATURE,
                    top_k=config.top_k,
                    threshold=config.threshold,
                )

    @torch.no_grad()
    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what the newest gate computes of prompts.

        Args:
            input_ids, attention_mask: [B, T].

        Returns:
            e(x) [B, D], SiLU(D_K e(x)) [B, H], and g_K(e(x)) [B, D].

        Raises:
            RuntimeError: if there is no task yet.
        """
        self._require_task()
        pooled = self._pooled(input_ids, None, attention_mask)
        with without_autocast(pooled.device):
            return pooled, *self.gates.features(pooled)

    # --- tasks ---

    def _task_added(self, name: str) -> None:
        super()._task_added(name)
        self.gates.add()
        self.router.keys.trainable.requires_grad_(True)

    def _rows(self) -> Iterator[tuple[RowStack, Sequence[int]]]:
        for rows, of_task in ((self.gates.down, self.gates.up), (self.gates.up, self.gates.down)):
            yield rows, [of_task.width] * len(self.tasks)
        yield from super()._rows()

    def _growing(self) -> Iterator[nn.Parameter]:
        yield from (self.gates.down.trainable, self.gates.up.trainable)
        yield from super()._growing()  # last: the first task's modules have no predecessors

    # --- on disk ---

    def state(self, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the gates' matrices: gates.down [K, H, D] and gates.up [K, D, H]."""
        path = f"{self.attribute}.gates"
        down, up = (stacked_rows(f"{path}.{n}", getattr(self.gates, n), held) for n in _SIDES)
        return dict(zip(_NAMES, self.gates.stacked(down, up), strict=True))

    @torch.no_grad()
    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets the gates from what `state` returned."""
        for side, name in zip(_SIDES, _NAMES, strict=True):
            rows = getattr(self.gates, side).rows()
            rows.copy_(state[name].reshape(rows.shape))

    @classmethod
    def require_state(
        cls, model: Any, config: Any, state: Mapping[str, Tensor], tasks: int, source: Path
    ) -> None:
        """Raises ValueError unless the state has finite gates of all tasks."""
        width, hidden = input_width(model), config.query_hidden_dim
        shapes = ((tasks, hidden, width), (tasks, width, hidden))
        for name, shape in zip(_NAMES, shapes, strict=True):
            found = state.get(name)
            got = "none" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
            if found is None or not found.is_floating_point() or tuple(found.shape) != shape:
                raise ValueError(f"{source}: got {name}: {got}, expected floats of shape {shape}")


_SIDES = ("down", "up")
_NAMES = tuple(f"gates.{side}" for side in _SIDES)
