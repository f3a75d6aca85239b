"""Methods whose pools are prefixes of attention layers of image models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step
from sapt_fast.continual.strategies.base import Strategy, options_from
from sapt_fast.methods.coda import CodaConfig
from sapt_fast.methods.dualprompt import DualPromptConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["Coda", "CodaOptions", "DualPrompt"]

_SHARED = ("query_layer", "query_pooling", "modules_to_save", "autocast_adapter_dtype")


class _Prefixes(Strategy):
    """L = CE + the method's own term, `key_loss`."""

    Config: ClassVar[Any]
    data = ("images",)

    def configure(self, config: TaskConfig[Any]) -> Any:
        shared = {name: getattr(config, name) for name in _SHARED}
        return self.Config(**shared, **asdict(self.options))

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.grow(task.name)

    def objective(self, step: Step) -> Tensor:
        own: Tensor = self.handle.key_loss()  # of the forward that has just run
        return step.loss + own


class DualPrompt(_Prefixes):
    """DualPrompt (Wang et al., ECCV 2022): `sapt_fast.methods.dualprompt.DualPromptHandle`.

    L = CE(y | G, E_t) - lambda (1 / B) sum_b cos(q(x_b), k_t)
    """

    Config = DualPromptConfig
    Options = options_from(
        "DualPromptOptions",
        DualPromptConfig,
        *("g_length", "e_length", "g_layers", "e_layers", "strength", "copy_previous"),
    )


@dataclass(frozen=True)
class CodaOptions:
    """Options of `Coda`, fields of `CodaConfig`; the number of tasks is that of the run."""

    pool: int = field(default=100, metadata={"help": "Components of each layer, for all tasks."})
    length: int = field(default=8, metadata={"help": "Rows of a component, keys and values."})
    layers: Sequence[int] = field(
        default=(0, 1, 2, 3, 4), metadata={"help": "Encoder layers with prefixes, from 0."}
    )
    orthogonality: float = field(
        default=0.0, metadata={"help": "lambda, weight of the orthogonality penalty."}
    )


class Coda(_Prefixes):
    """CODA-Prompt (Smith et al., CVPR 2023): `sapt_fast.methods.coda.CodaHandle`.

    L = CE(y | sum_k cos(q(x) * A_k, K_k) P_k) + lambda penalty(P, K, A)
    """

    Config = CodaConfig
    Options = CodaOptions

    def configure(self, config: TaskConfig[Any]) -> Any:
        shared = {name: getattr(config, name) for name in _SHARED}
        bench: Any = self.bench
        return CodaConfig(**shared, **asdict(self.options), n_tasks=bench.task_count)
