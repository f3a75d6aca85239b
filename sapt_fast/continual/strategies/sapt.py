"""SAPT: one key per adapter, and a reflection loss on the routing of earlier tasks' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.reflection import Replay
from sapt_fast.continual.strategies.base import Strategy

__all__ = ["Sapt"]

_ROWS_FOR_KEY = 64


class Sapt(Strategy):
    """Shared attention over one adapter per task (Zhao et al., SAPT, ACL 2024).

        L = CE(x, y; sum_k a_k(x) adapter_k) + kl_ratio sum_{i<t} KL(a_bar_i || a(x_i))

    a(x) are the router's weights of the input. a_bar_i is their mean over task i's dev examples
    when it had been learned. x_i are the inputs that `replay` keeps of task i: real ones or
    pseudo-samples. The adapter, the key and the query projection train.
    """

    data: ClassVar[tuple[str, ...]] = ("text", "images")
    pseudo = True
    routes = True

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        sapt = self.handle
        sapt.add_task(task.name)
        if sapt.config.key_init == "mean_query":
            rows = self.bench.inputs(task.train[:_ROWS_FOR_KEY])
            sapt.init_key(**self.bench.routing_inputs(rows))

    def reflection(self, learned: Sequence[TaskData]) -> list[Replay]:
        targets = self.handle.targets
        kept = ((task.name, self.bench.kept(task)) for task in learned)
        return [Replay(name, self.bench.inputs(rows), targets[name]) for name, rows in kept if rows]
