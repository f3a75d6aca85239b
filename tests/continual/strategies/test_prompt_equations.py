"""The methods with prompts against their equations, and against prompts written in by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategy_cases import KINDS, TASKS, made, step_of
from tiny_tasks import make_model
from torch import Tensor

from sapt_fast.continual.objective import supervised


def by_hand(strategy: Any, row: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of one row's answer by a bare model whose input begins with `prompt`."""
    model = make_model("llama" if strategy.bench.causal else "t5").eval()
    (encoded,) = strategy.bench.encode([row])
    ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
    embeds = torch.cat([prompt[None], model.get_input_embeddings()(ids)], 1)
    if strategy.bench.causal:
        labels = F.pad(labels, (len(prompt), 0), value=-100)
        logits = model(inputs_embeds=embeds).logits
    else:
        logits = model(inputs_embeds=embeds, labels=labels).logits
    return supervised(logits, labels, strategy.bench.causal)


def prompts_of(strategy: Any, rows: int) -> Tensor:
    stack = strategy.handle.prompts.rows
    return stack.rows().view(-1, rows, stack.width)


@pytest.mark.parametrize("kind", KINDS)
def test_sapt_prompt_mixes_prompts_by_the_routers_weights(kind: str) -> None:
    strategy = made("sapt_prompt", kind, tasks=2, config={"prompt_length": 3})
    assert strategy.model.sapt.config.adapter == "prompt"
    row = TASKS[0].dev[0]
    ids, mask = strategy.bench.pad(strategy.bench.inputs([row]))
    weights = strategy.model.sapt.route(ids, mask)[0]
    prompt = torch.einsum("k,kpd->pd", weights, prompts_of(strategy, 3))
    logits, labels = by_hand(strategy, row, prompt)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(step_of(strategy, [row]).loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_progprompt_puts_the_newest_prompt_first_and_trains_it_alone(kind: str) -> None:
    strategy = made("progprompt", kind, tasks=3, config={"prompt_length": 2})
    prompts = prompts_of(strategy, 2)
    assert len(prompts) == 3
    prompt = torch.cat([prompts[2], prompts[1], prompts[0]])
    rows = TASKS[1].dev
    total = [by_hand(strategy, row, prompt) for row in rows]
    expected = F.cross_entropy(torch.cat([t[0] for t in total]), torch.cat([t[1] for t in total]))
    step = step_of(strategy, rows)
    torch.testing.assert_close(step.loss, expected, rtol=1e-4, atol=1e-5)
    strategy.objective(step).backward()
    trained = dict(strategy.trained())
    assert [p.shape[0] for p in trained.values()] == [2]
    (newest,) = trained.values()
    assert newest.grad.abs().max() > 0
    assert strategy.handle.prompts.rows.frozen.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_l2p_takes_the_prompts_of_the_nearest_keys(kind: str) -> None:
    options = {"prompts": 5, "top": 2, "length": 3, "strength": 0.4}
    strategy = made("l2p", kind, tasks=1, **options)
    keys = strategy.handle.prompt_keys
    assert sorted(p.shape for _, p in strategy.trained()) == sorted(
        [keys.shape, strategy.handle.prompts.rows.trainable.shape]
    )
    table = make_model(kind).get_input_embeddings().weight
    losses, similar = [], []
    rows = TASKS[0].dev
    for row in rows:
        (ids,) = strategy.bench.inputs([row])
        query = table[torch.tensor(ids)].mean(0)
        cosines = F.cosine_similarity(query[None], keys)
        best = cosines.argsort(descending=True)[:2]
        similar.append(cosines[best].sum())
        prompt = prompts_of(strategy, 3)[best].flatten(0, 1)
        losses.append(by_hand(strategy, row, prompt))
    expected = F.cross_entropy(torch.cat([t[0] for t in losses]), torch.cat([t[1] for t in losses]))
    step = step_of(strategy, rows)
    torch.testing.assert_close(step.loss, expected, rtol=1e-4, atol=1e-5)
    strategy.handle.picked.zero_()
    similarity = torch.stack(similar).mean()
    loss = strategy.objective(step)
    torch.testing.assert_close(loss, step.loss - 0.4 * similarity, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert keys.grad.abs().max() > 0
    assert strategy.handle.prompts.rows.trainable.grad.abs().max() > 0


def test_l2p_passes_over_prompts_that_past_tasks_used() -> None:
    strategy = made("l2p", prompts=4, top=2, length=1)
    strategy.begin_task(TASKS[0], [])
    ids, mask = strategy.bench.pad(strategy.bench.inputs(TASKS[0].train[:1]))
    handle = strategy.handle
    queries = handle.router.pool(strategy.model.get_input_embeddings(), ids, None, mask)
    query = queries[0]
    other = torch.zeros_like(query)
    other[0], other[1] = query[1], -query[0]
    other = other * query.norm() / other.norm()  # orthogonal to the query
    # Cosines 0.8, 0.6, 0, -0.6, so distances 0.2, 0.4, 1, 1.6.
    parts = [(0.8, 0.6), (0.6, 0.8), (0.0, 1.0), (-0.6, 0.8)]
    with torch.no_grad():
        strategy.handle.prompt_keys.copy_(torch.stack([a * query + b * other for a, b in parts]))
    assert handle.pick(queries, True)[1].tolist() == [[0, 1]]
    # Shares 0.6, 0.2, 0.1, 0.1: 0.12, 0.08, 0.1, 0.16.
    handle.picked = torch.tensor([6, 2, 1, 1])
    cosines, places = handle.pick(queries, True)
    assert places.tolist() == [[1, 2]]
    torch.testing.assert_close(cosines, torch.tensor([[0.6, 0.0]]), atol=1e-5, rtol=0)
    assert handle.pick(queries, False)[1].tolist() == [[0, 1]]
    # What was never picked comes first, the nearer one before the other.
    handle.picked = torch.tensor([6, 2, 0, 0])
    assert handle.pick(queries, True)[1].tolist() == [[2, 3]]
    # A task counts what its training rows picked.
    handle.picked = torch.zeros(4, dtype=torch.int64)
    ids, mask = strategy.bench.pad(strategy.bench.inputs(TASKS[0].train))
    queries = handle.router.pool(strategy.model.get_input_embeddings(), ids, None, mask)
    before = handle.pick(queries, True)[1]
    strategy.end_task(TASKS[0])
    assert handle.picked.tolist() == torch.bincount(before.flatten(), minlength=4).tolist()
    assert handle.picked.sum() == 2 * len(TASKS[0].train)
