"""SD-LoRA: a sum of LoRA adapters whose directions are frozen and whose magnitudes are trained.

Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", ICLR
2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.sapt import SaptHandle
from sapt_fast.methods.task_config import TaskConfig, require

__all__ = ["SdLoraConfig", "SdLoraHandle"]

_MOST_MAGNITUDE = 2.0**30  # as of an adapter's scaling


@dataclass
class SdLoraConfig(TaskConfig["SdLoraHandle"]):
    """Shape and placement of the adapters; the fields of the router have no effect."""

    magnitude: float = field(
        default=0.8, metadata={"help": "Value with which the magnitudes start."}
    )
    normalize: bool = field(
        default=True,
        metadata={
            "help": "Divide an adapter by its norms once the next task begins, and start all "
            "magnitudes again, as in the authors' code; otherwise earlier adapters and magnitudes "
            "keep their values, so that the next task starts from the learned function."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.adapter == "lora", "adapter", self.adapter, "'lora'")
        number = isinstance(self.magnitude, (int, float)) and not isinstance(self.magnitude, bool)
        require(
            number and 0 < self.magnitude <= _MOST_MAGNITUDE, "magnitude", self.magnitude,
            f"a positive number, at most {_MOST_MAGNITUDE:g}",
        )  # fmt: skip
        require(isinstance(self.normalize, bool), "normalize", self.normalize, "True or False")

    @property
    def method(self) -> str:
        """The name of the method."""
        return "sd_lora"


class SdLoraHandle(SaptHandle):
    """`SaptHandle` whose weights are trained magnitudes, one per task, for all inputs.

        y = W x + sum_{k<t} s_k B_k A_k x / (|B_k| |A_k|) + s_t (alpha / r) B_t A_t x

    |.| is the Frobenius norm. All s train, with A_t and B_t; earlier adapters are frozen. A
    magnitude is one number for all layers. Every task starts with all s at `magnitude`: `add_task`
    divides the previous task's adapter by its norms, in place.

    Source: the authors' code (github.com/WuYichen-97/SD-Lora-CL). The paper's figure divides every
    adapter by |B_k A_k|; the code divides earlier ones by |B_k| |A_k|, and the newest, whose B
    starts at 0, by nothing. Where ours differs from the code:

    - The newest adapter is scaled by alpha / r; theirs is not, which is `lora_alpha=r`.
    - An adapter with the norm 0 stays 0; theirs becomes NaN.
    - Theirs trains a classifier beside the adapters; ours trains `modules_to_save`, if any.

    With `normalize=False`, y = W x + sum_k s_k (alpha / r) B_k A_k x, and only the newest s starts
    at `magnitude`.

    Attributes:
        magnitudes: s [K], in the adapters' dtype.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.sd_lora import SdLoraConfig
        >>> model = sapt_fast.patch(load_backbone(), SdLoraConfig(r=4))
        >>> model.sapt.add_task("first")
        >>> model.sapt.add_task("second")
        >>> model.sapt.magnitudes.tolist()
        [0.800000011920929, 0.800000011920929]
    """

    Config = SdLoraConfig
    method = "sd_lora"
    trains_router = False
    weights_sum_to_one = False
    magnitudes: nn.Parameter

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        weight = self.router.norm.weight  # has the adapters' device and dtype
        self.magnitudes = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns the magnitudes [1, K], in float32 at least, for all inputs."""
        wide = torch.promote_types(self.magnitudes.dtype, torch.float32)
        return self.magnitudes[None].to(wide)

    @torch.no_grad()
    def _add_adapters(self) -> None:
        super()._add_adapters()
        last = len(self.tasks) - 1  # the new task is not among them yet
        if last >= 0 and self.config.normalize:
            for pool in self.pools.values():
                a, b = pool.adapter(last)
                a.copy_(_direction(a, 1.0))
                b.copy_(_direction(b, pool.scaling[last]))

    def _add_key(self) -> None:
        super()._add_key()
        kept = self.magnitudes.detach()
        start = torch.full_like(kept.new_empty(len(kept) + 1), self.config.magnitude)
        if not self.config.normalize:
            start[:-1] = kept
        self.magnitudes = nn.Parameter(start)

    def put_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`SaptHandle.put_task`; adapters before the newest are stored as they are used."""
        super().put_task(name, adapters, key, modules)
        start = self.magnitudes.new_full((1,), self.config.magnitude)
        self.magnitudes = nn.Parameter(torch.cat([self.magnitudes.detach(), start]))

    def _require_order(self, order: Sequence[int]) -> None:
        raise ValueError(
            "tasks: got another selection or order, but all magnitudes of SD-LoRA train as one "
            "parameter, and the newest adapter alone is not divided by its norms"
        )

    def _growing(self) -> Iterator[nn.Parameter]:
        yield self.magnitudes
        yield from super()._growing()  # last: the first task's modules have no predecessors

    def state(self, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the magnitudes [K]."""
        name = f"{self.attribute}.magnitudes"
        return {"magnitudes": (held or {}).get(name, self.magnitudes).detach()}

    @torch.no_grad()
    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets the magnitudes from what `state` returned."""
        self.magnitudes.copy_(state["magnitudes"])

    @classmethod
    def require_state(
        cls, model: Any, config: Any, state: Mapping[str, Tensor], tasks: int, source: Path
    ) -> None:
        """Raises ValueError unless the state has finite magnitudes, one per task."""
        found = state.get("magnitudes")
        got = "none" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        fits = found is not None and found.is_floating_point() and tuple(found.shape) == (tasks,)
        if found is None or not fits or not (found.abs() <= _MOST_MAGNITUDE).all():
            raise ValueError(
                f"{source}: got magnitudes: {got}, expected floats of shape ({tasks},), at most "
                f"{_MOST_MAGNITUDE:g}"
            )


def _direction(matrix: Tensor, scaling: float) -> Tensor:
    """Returns matrix / (|matrix| scaling), or 0 if either is 0."""
    size = matrix.double().norm() * scaling
    return torch.where(size == 0, 0.0, matrix.double() / size).to(matrix.dtype)
