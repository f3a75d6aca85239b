"""Strategies on tiny models, and their losses worked out row by row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tiny_tasks import make_model, make_settings, make_tasks
from torch import Tensor

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.continual.objective import Step, forward, prompt_mask, supervised
from sapt_fast.continual.strategies import STRATEGIES, Strategy
from sapt_fast.continual.workbench import Workbench
from sapt_fast.demo.tasks import CharTokenizer

KINDS = ("t5", "llama")
TASKS = make_tasks(3, train=12, held_out=4)


def made(
    name: str,
    kind: str = "t5",
    tasks: int = 0,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A strategy on a patched model that has begun and ended `tasks` tasks."""
    given = {n: options.pop(n) for n in ("replay", "replay_share") if n in options}
    torch.manual_seed(0)
    model = make_model(kind)
    settings = make_settings(strategy=name, strategy_options=options, **given)
    bench = Workbench(model, CharTokenizer(), settings)
    strategy = STRATEGIES[name](bench, STRATEGIES[name].options_of(name, options))
    sapt_fast.patch(model, strategy.configure(SaptConfig(r=2, lora_alpha=4, **(config or {}))))
    strategy.load_state({})
    for index in range(tasks):
        strategy.begin_task(TASKS[index], TASKS[:index])
        shaken(strategy, seed=index)
        strategy.end_task(TASKS[index])
    return strategy


@torch.no_grad()
def shaken(strategy: Strategy, seed: int, by: float = 0.2) -> None:
    """Moves what trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in strategy.trained():
        parameter += by * torch.randn(parameter.shape, generator=generator)


def step_of(strategy: Any, rows: Any, number: int = 0) -> Step:
    batch = strategy.bench.collate(strategy.bench.encode(rows))
    strategy.model.eval()
    weights = strategy.mixture(batch["input_ids"], prompt_mask(batch, strategy.bench.causal))
    logits = forward(strategy.model, batch, weights).logits
    loss = F.cross_entropy(*supervised(logits, batch["labels"], strategy.bench.causal))
    return Step(number, batch, logits, loss)


def one_by_one(strategy: Any, rows: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each row's answer under teacher forcing and its labels, without padding."""
    logits, labels = [], []
    for row in strategy.bench.encode(rows):
        ids, target = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        weights = strategy.mixture(ids, torch.ones_like(ids))
        if weights is None:
            weights = strategy.model.sapt.route(ids)
        with strategy.model.sapt.fixed(weights.detach()):
            if strategy.bench.causal:
                start = int((target == -100).sum())
                given = strategy.model(input_ids=ids).logits[0, start - 1 : -1]
                target = target[:, start:]
            else:
                given = strategy.model(input_ids=ids, labels=target).logits[0]
        logits.append(given)
        labels.append(target[0])
    return logits, labels


def mean_loss(strategy: Any, rows: Any) -> Tensor:
    logits, labels = one_by_one(strategy, rows)
    return F.cross_entropy(torch.cat(logits), torch.cat(labels))
