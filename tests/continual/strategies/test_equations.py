"""What each method adds to the token loss, against values computed another way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategy_cases import KINDS, TASKS, made, mean_loss, one_by_one, shaken, step_of
from tiny_tasks import make_model, with_pseudo_samples
from torch import Tensor, nn

import sapt_fast
from sapt_fast.continual.data.collate import Collator
from sapt_fast.continual.objective import Step, supervised
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.continual.strategies.lwf import softened_kl
from sapt_fast.demo.tasks import CharTokenizer

# --- one adapter ---


def test_seqlora_joint_and_single_train_their_adapter_alone() -> None:
    for name in ("seqlora", "joint", "single"):
        strategy = made(name, tasks=1)
        names = [n for n, _ in strategy.trained()]
        assert names
        assert all(".sapt_pool." in n for n in names)
        step = step_of(strategy, TASKS[0].dev)
        assert strategy.objective(step) is step.loss
    strategy = made("seqlora", tasks=2)
    assert strategy.model.sapt.tasks == ["shared"]


@pytest.mark.parametrize("kind", KINDS)
def test_replay_adds_the_loss_of_the_next_rows_of_its_buffer(kind: str) -> None:
    strategy = made("replay", kind, tasks=1, buffer="all", weight=0.5)
    first = step_of(strategy, TASKS[0].dev)
    assert strategy.objective(first) is first.loss
    strategy.begin_task(TASKS[1], TASKS[:1])
    shaken(strategy, seed=1)
    seen: Counter[int] = Counter()
    for number in range(3):
        step = step_of(strategy, TASKS[1].dev, number)
        rows = [TASKS[0].train[i] for i in strategy._stream.batch(number, 4)]
        expected = mean_loss(strategy, TASKS[1].dev) + 0.5 * mean_loss(strategy, rows)
        torch.testing.assert_close(strategy.objective(step), expected)
        seen.update(strategy._stream.batch(number, 4))
    assert seen == Counter(range(12))


def test_buffers_hold_what_they_are_named_after() -> None:
    sizes = {}
    for buffer in ("share", "all", "balanced", "reservoir"):
        strategy = made("replay", buffer=buffer, size=9, replay_share=0.25)
        rows = strategy.buffer(TASKS[:2])
        assert len(set(rows)) == len(rows)
        sizes[buffer] = Counter(row.task for row in rows)
        assert rows == strategy.buffer(TASKS[:2])
    first, second = TASKS[0].name, TASKS[1].name
    assert sizes["share"] == {first: 3, second: 3}
    assert sizes["all"] == {first: 12, second: 12}
    assert sorted(sizes["balanced"].values()) == [4, 5]
    assert sum(sizes["reservoir"].values()) == 9
    # With labels each class has its share, and a small class leaves the rest to the others.
    rows = tuple(replace(row, output="ab"[i == 0]) for i, row in enumerate(TASKS[0].train))
    labelled = replace(TASKS[0], train=rows, labels=("a", "b"))
    kept = made("replay", buffer="balanced", size=9).buffer([labelled, TASKS[1]])
    counts = Counter((row.task, row.output if row.task == first else "") for row in kept)
    assert counts == {(first, "b"): 1, (first, "a"): 4, (second, ""): 4}


def test_a_reservoir_is_a_uniform_sample_of_the_stream() -> None:
    import random

    from sapt_fast.continual.strategies.replay import _reservoir

    rows: Any = list(range(10))
    counts = Counter(
        row for seed in range(3000) for row in _reservoir(rows, 3, random.Random(seed))
    )
    for row in rows:
        assert counts[row] == pytest.approx(900, abs=90)  # three deviations are 75


def test_replay_draws_a_batch_of_each_earlier_task_if_asked() -> None:
    strategy = made("replay", tasks=1, buffer="all", batch_per_task=True)
    strategy.begin_task(TASKS[2], TASKS[:2])
    assert len(strategy.drawn(0)) == 2 * strategy.bench.settings.batch_size
    strategy.bench.settings.replay_batch_size = 100
    assert sorted(strategy.drawn(0)) == list(range(24))


def test_generative_replay_lets_the_old_model_answer(tmp_path: Path) -> None:
    tasks = with_pseudo_samples(tmp_path, TASKS[:2])
    strategy = made("generative_replay", replay=str(tmp_path), tasks=1)
    (buffer,) = [strategy.buffer(tasks[:1])]
    assert [row.input for row in buffer] == [row.input for row in tasks[0].train[:5]]
    for row in buffer:
        ids = torch.tensor(strategy.bench.inputs([row]))
        answer = strategy.model.generate(ids, max_new_tokens=4, do_sample=False)
        assert row.output == CharTokenizer().decode(answer[0]).strip()
    strategy.begin_task(tasks[1], tasks[:1])
    shaken(strategy, seed=5)
    rows = [buffer[i] for i in strategy._stream.batch(0, 4)]
    expected = mean_loss(strategy, tasks[1].dev) + mean_loss(strategy, rows)
    torch.testing.assert_close(strategy.objective(step_of(strategy, tasks[1].dev)), expected)
    strategy.bench.settings.limit_pseudo_samples = True
    fewer = strategy.buffer(tasks[:1])
    assert len(fewer) == 2  # replay_share is a fifth of 12 rows
    assert set(fewer) <= set(buffer)
    given = [replace(row, output="kept") for row in buffer]
    strategy.bench.kept = lambda task: given
    assert strategy.buffer(tasks[:1]) == given


# --- EWC ---


class Two(nn.Module):
    """Two parameters of the model that EWC knows, in place of a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, 2.0]))


def toy_ewc(strength: float) -> Any:
    """EWC of logits (theta_1 x, theta_2) for rows (x, class)."""
    model = Two()
    bench = SimpleNamespace(
        model=model, device=torch.device("cpu"), encode=list, collate=lambda rows: rows[0]
    )
    strategy: Any = STRATEGIES["ewc"](
        bench, STRATEGIES["ewc"].options_of("ewc", {"strength": strength, "rows": 2})
    )

    def token_logits(row: tuple[float, int]) -> tuple[Tensor, Tensor]:
        x, label = row
        return torch.stack([model.theta[0] * x, model.theta[1]])[None], torch.tensor([label])

    strategy.token_logits = token_logits
    return strategy


def test_fisher_and_penalty_of_two_parameters_by_hand() -> None:
    strategy = toy_ewc(strength=10.0)
    assert strategy.penalty() == 0
    # p(1) = sigmoid(theta_2 - theta_1 x); the gradient of log p(y) is (y = 0: +, y = 1: -) the
    # other class's probability, times x for theta_1. Three rows are given, two are taken.
    task = SimpleNamespace(train=[(0.5, 0), (-1.0, 1), (9.0, 1)])
    p1 = torch.sigmoid(torch.tensor([2 - 0.5, 2 + 1.0], dtype=torch.float64))
    first, second = p1[0], 1 - p1[1]
    expected = [(0.25 * first**2 + second**2) / 2, (first**2 + second**2) / 2]
    strategy.end_task(task)
    torch.testing.assert_close(strategy._fisher["theta"].double(), torch.stack(expected))
    assert strategy.penalty() == 0

    with torch.no_grad():
        strategy.model.theta += torch.tensor([0.3, -0.2])
    first_task = expected[0] * 0.3**2 + expected[1] * 0.2**2
    assert strategy.penalty().item() == pytest.approx(first_task.item(), rel=1e-5)
    step = Step(0, {}, torch.empty(0), torch.tensor(2.0))
    assert strategy.objective(step).item() == pytest.approx(2 + 5 * first_task.item(), rel=1e-5)

    # The second task's quadratic is added to the first one's, around its own place.
    strategy.end_task(SimpleNamespace(train=[(2.0, 1)]))
    later = torch.sigmoid(torch.tensor(2 * 1.3 - 1.8, dtype=torch.float64)) ** 2
    other = [4 * later, later]
    assert strategy.penalty().item() == pytest.approx(first_task.item(), rel=1e-4)
    with torch.no_grad():
        strategy.model.theta.copy_(torch.tensor([0.0, 0.0]))
    both = expected[0] * 1 + expected[1] * 4 + other[0] * 1.3**2 + other[1] * 1.8**2
    assert strategy.penalty().item() == pytest.approx(both.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(strategy.penalty(), [strategy.model.theta])
    by_hand = -2 * torch.stack([expected[0] + 1.3 * other[0], 2 * expected[1] + 1.8 * other[1]])
    torch.testing.assert_close(gradient.double(), by_hand, rtol=1e-4, atol=1e-6)

    again = toy_ewc(strength=10.0)
    again.load_state(strategy.state())
    with torch.no_grad():
        again.model.theta.zero_()
    assert again.penalty() == strategy.penalty()


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_of_a_model_is_the_mean_of_squared_gradients(kind: str) -> None:
    strategy = made("ewc", kind, tasks=1, rows=3)
    names, parameters = zip(*strategy.trained(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for row in TASKS[0].train[:3]:
        logits, labels = one_by_one(strategy, [row])
        log_p = F.log_softmax(logits[0], -1).gather(1, labels[0][:, None]).sum()
        for sum_, gradient in zip(total, torch.autograd.grad(log_p, parameters), strict=True):
            sum_ += gradient**2 / 3
    assert max(t.max() for t in total) > 1e-6
    for name, expected in zip(names, total, strict=True):
        torch.testing.assert_close(strategy._fisher[name], expected, rtol=1e-3, atol=1e-8)
    assert strategy.penalty() == 0
    before = {n: p.detach().clone() for n, p in strategy.trained()}
    strategy.begin_task(TASKS[1], TASKS[:1])
    shaken(strategy, seed=3)
    moved = sum(
        (t * (p - before[n]) ** 2).sum()
        for (n, p), t in zip(strategy.trained(), total, strict=True)
    )
    torch.testing.assert_close(strategy.penalty(), moved, rtol=1e-3, atol=1e-8)


# --- LwF ---


def test_softened_divergence_by_hand() -> None:
    old, new = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    # Row 1: p_old^2 = (s, 1 - s), s = sigmoid(1); p_new^2 = (1/2, 1/2). Row 2: the reverse.
    s, t = torch.sigmoid(torch.tensor(1.0)), torch.sigmoid(torch.tensor(-2.0))
    first = s * (2 * s).log() + (1 - s) * (2 * (1 - s)).log()
    second = 0.5 * (0.5 / t).log() + 0.5 * (0.5 / (1 - t)).log()
    torch.testing.assert_close(softened_kl(old, new, 2.0), 4 * (first + second) / 2)
    assert softened_kl(old, old, 2.0) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_lwf_distils_the_model_before_the_task(kind: str) -> None:
    strategy = made("lwf", kind, tasks=1, strength=0.7, temperature=3.0)
    first = step_of(strategy, TASKS[0].dev)
    assert strategy.objective(first) is first.loss
    old, _ = one_by_one(strategy, TASKS[1].dev)
    old = [rows.detach() for rows in old]
    strategy.begin_task(TASKS[1], TASKS[:1])
    step = step_of(strategy, TASKS[1].dev)
    torch.testing.assert_close(strategy.objective(step), step.loss)
    shaken(strategy, seed=4)
    step = step_of(strategy, TASKS[1].dev)
    new, _ = one_by_one(strategy, TASKS[1].dev)
    p = F.softmax(torch.cat(old) / 3, -1)
    divergence = (p * (p.log() - F.log_softmax(torch.cat(new) / 3, -1))).sum(-1).mean()
    loss = strategy.objective(step)
    torch.testing.assert_close(loss, step.loss + 0.7 * 9 * divergence)
    # The gradient goes through the new model alone, and training mode comes back.
    strategy.model.train()
    assert strategy.objective(step).requires_grad
    assert strategy.model.training
    after, _ = one_by_one(strategy, TASKS[1].dev)
    torch.testing.assert_close(torch.cat(after), torch.cat(new))


def test_lwf_compares_the_old_classes_alone_without_the_square_if_asked() -> None:
    strategy = made("lwf", tasks=1, strength=0.7, temperature=3.0, squared_temperature=False)
    strategy.begin_task(TASKS[1], TASKS[:1])
    shaken(strategy, seed=4)
    step = step_of(strategy, TASKS[1].dev)
    old, _ = strategy._old.token_logits(step.batch)
    new, _ = strategy.token_logits(step.batch)
    added = strategy.objective(step) - step.loss
    torch.testing.assert_close(added, 0.7 * softened_kl(old, new, 3.0) / 9)
    # As an encoder with four labels, of which the earlier task has two.
    strategy._classes = [3, 1]
    q, p = (F.softmax(logits[:, [1, 3]] / 3, -1) for logits in (old, new))
    added = strategy.objective(step) - step.loss
    torch.testing.assert_close(added, 0.7 * (q * (q / p).log()).sum(-1).mean())
    with pytest.raises(ValueError, match="old_classes: got True, expected False for a model that"):
        made("lwf", old_classes=True)


# --- adapters of their own ---


def test_olora_overlap_by_hand() -> None:
    strategy = made("olora", tasks=2, orthogonality=0.5, norm=0.1)
    strategy.begin_task(TASKS[2], TASKS[:2])
    shaken(strategy, seed=2)
    total = size = 0.0
    for pool in strategy.model.sapt.pools.values():
        newest, b = (t.double() for t in pool.adapter(2))
        size += newest.square().sum().sqrt().item() + b.square().sum().sqrt().item()
        for past in range(2):
            for row in pool.adapter(past)[0].double():
                for own in newest:
                    total += abs((row * own).sum().item())
    assert total > 1
    assert strategy.overlap().item() == pytest.approx(total, rel=1e-5)
    step = step_of(strategy, TASKS[2].dev)
    expected = step.loss.item() + 0.5 * total + 0.1 * size
    assert strategy.objective(step).item() == pytest.approx(expected, rel=1e-5)
    # Rows (1, 2) of the past and (-1, 0), (1, 1) of the present: |-1| + |3|, not 1 + 9.
    pool = SimpleNamespace(
        a=SimpleNamespace(
            frozen=torch.tensor([[1.0, 2.0]]), trainable=torch.tensor([[-1.0, 0.0], [1.0, 1.0]])
        )
    )
    strategy.bench = SimpleNamespace(handle=SimpleNamespace(pools={"layer": pool}))
    assert strategy.overlap() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_olora_adds_up_all_adapters(kind: str) -> None:
    strategy = made("olora", kind, tasks=2)
    rows = TASKS[1].dev
    given, _ = strategy.token_logits(strategy.bench.collate(strategy.bench.encode(rows)))
    handle = strategy.model.sapt
    deltas = {
        path: sum(2.0 * (pool.adapter(k)[1].T @ pool.adapter(k)[0]) for k in range(2))
        for path, pool in handle.pools.items()
    }
    sapt_fast.unpatch(strategy.model)
    with torch.no_grad():
        for path, delta in deltas.items():
            strategy.model.get_submodule(path).weight += delta
    batch = Collator(0)(strategy.bench.encode(rows))
    logits = strategy.model(**batch).logits
    expected, _ = supervised(logits, batch["labels"], strategy.bench.causal)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_epi_distances_by_hand() -> None:
    handle = made("epi", shrinkage=0.5).handle
    handle.means = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    handle.scatter = torch.tensor([[8.0, 4.0], [4.0, 8.0]], dtype=torch.float64)
    handle.rows = torch.tensor(4)
    # Covariance [[2, 1], [1, 2]], half of it and half of 2 I: [[2, .5], [.5, 2]], whose inverse is
    # [[2, -.5], [-.5, 2]] / 3.75.
    found = handle.distances(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    expected = torch.tensor([[3.0, 5.0], [0.0, 8.0]], dtype=torch.float64) / 3.75
    torch.testing.assert_close(found, expected)
    # One row for each task: no spread, so the distance is that of Euclid, over the shrinkage.
    handle.restore_state({**handle.state(), "scatter": torch.zeros(2, 2, dtype=torch.float64)})
    found = handle.distances(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert found.tolist() == [[4.0, 4.0], [0.0, 8.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_epi_statistics_are_those_of_the_base_models_features(kind: str) -> None:
    strategy = made("epi", kind, tasks=2)
    base = make_model(kind).eval()
    features = []
    for task in TASKS[:2]:
        rows = []
        for ids in strategy.bench.inputs(task.train):
            backbone = base.model if kind == "llama" else base.encoder
            rows.append(backbone(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0))
        features.append(torch.stack(rows).double())
    means = torch.stack([f.mean(0) for f in features])
    torch.testing.assert_close(strategy.handle.means, means, rtol=1e-4, atol=1e-5)
    centred = torch.cat([f - f.mean(0) for f in features])
    torch.testing.assert_close(strategy.handle.scatter, centred.T @ centred, rtol=1e-3, atol=1e-4)
    # Padding on either side changes nothing.
    inputs = strategy.bench.inputs(TASKS[0].train[:3])
    ids, mask = strategy.bench.pad(inputs)
    right = strategy.handle.features(ids, mask)
    left = strategy.handle.features(F.pad(ids, (2, 0)), F.pad(mask, (2, 0)))
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(right.double(), features[0][:3], rtol=1e-4, atol=1e-5)


def test_epi_trains_its_own_adapter_and_answers_with_that_of_the_nearest_task() -> None:
    strategy = made("epi", tasks=2)
    ids, mask = strategy.bench.pad(strategy.bench.inputs(TASKS[1].test))
    handle = strategy.handle
    nearest = handle.distances(handle.features(ids, mask)).argmin(1)
    chosen = strategy.mixture(ids, mask)
    assert chosen.argmax(1).tolist() == nearest.tolist()
    assert chosen.sum(1).tolist() == [1.0] * len(ids)
    strategy.begin_task(TASKS[2], TASKS[:2])
    assert strategy.mixture(ids, mask).tolist() == [[0.0, 0.0, 1.0]]
    step = step_of(strategy, TASKS[2].dev)
    assert strategy.objective(step) is step.loss


# --- SAPT ---


def test_sapt_holds_the_router_to_each_earlier_tasks_attention() -> None:
    strategy = made("sapt", tasks=2, replay_share=0.25)
    sapt = strategy.model.sapt
    assert sapt.tasks == [task.name for task in TASKS[:2]]
    sapt.targets[TASKS[0].name] = torch.tensor([1.0])
    sapt.targets[TASKS[1].name] = torch.tensor([0.3, 0.7])
    strategy.begin_task(TASKS[2], TASKS[:2])
    trained = [n for n, _ in strategy.trained() if n.startswith("sapt.")]
    assert sorted(trained) == [
        f"sapt.router.{n}"
        for n in ("down.weight", "keys.trainable", "norm.bias", "norm.weight", "up.weight")
    ]
    entries = strategy.reflection(TASKS[:2])
    assert [entry.task for entry in entries] == [task.name for task in TASKS[:2]]
    for entry, task in zip(entries, TASKS[:2], strict=True):
        assert len(entry.inputs) == 3
        assert all(row in strategy.bench.inputs(task.train) for row in entry.inputs)
        assert entry.target is sapt.targets[task.name]
    assert made("sapt", tasks=1, replay="none").reflection(TASKS[:1]) == []


# --- LFPT5 ---


@pytest.mark.parametrize("kind", KINDS)
def test_lfpt5_is_its_equation(kind: str, tmp_path: Path) -> None:
    tasks = with_pseudo_samples(tmp_path, TASKS[:2])
    options = {"kl_share": 0.2, "lm_weight": 0.3, "replay": str(tmp_path)}
    strategy = made("lfpt5", kind, tasks=1, **options)
    tokenizer = CharTokenizer()

    def generation(rows: Any) -> Tensor:
        total, count = torch.zeros(()), 0
        start = tokenizer.encode("__gen__", add_special_tokens=False)
        for row in rows:
            (prompt,) = strategy.bench.inputs([row])
            answer = [i for i in strategy.bench.encode([row])[0]["labels"] if i != -100]
            target = [*(i for i in prompt if i != 1), *answer]
            weights = torch.ones(1)
            with strategy.model.sapt.fixed(weights):
                if kind == "t5":
                    ids = torch.tensor([[*start, 1]])
                    logits = strategy.model(input_ids=ids, labels=torch.tensor([target])).logits[0]
                else:
                    ids = torch.tensor([start + target])
                    logits = strategy.model(input_ids=ids).logits[0, len(start) - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(target), reduction="sum")
            count += len(target)
        return total / count

    step = step_of(strategy, tasks[0].dev)
    expected = 0.8 * (mean_loss(strategy, tasks[0].dev) + 0.3 * generation(tasks[0].dev))
    torch.testing.assert_close(strategy.objective(step), expected, rtol=1e-4, atol=1e-5)

    buffer = strategy.buffer(tasks[:1])
    strategy.begin_task(tasks[1], tasks[:1])
    rows = [buffer[i] for i in strategy._stream.batch(0, 4)]
    old, _ = one_by_one(strategy, rows)
    p = F.softmax(torch.cat(old), -1).detach()
    shaken(strategy, seed=6)
    step = step_of(strategy, tasks[1].dev)
    new, _ = one_by_one(strategy, rows)
    loss = mean_loss(strategy, tasks[1].dev) + 0.3 * generation(tasks[1].dev)
    loss = loss + mean_loss(strategy, rows) + 0.3 * generation(rows)
    divergence = (p * (p.log() - F.log_softmax(torch.cat(new), -1))).sum(-1).mean()
    expected = 0.8 * loss + 0.2 * divergence
    torch.testing.assert_close(strategy.objective(step), expected, rtol=1e-4, atol=1e-5)


def test_lfpt5_in_the_form_of_its_authors(tmp_path: Path) -> None:
    tasks = with_pseudo_samples(tmp_path, TASKS[:2])
    options = {"kl_share": 0.2, "lm_weight": 0.0, "replay": str(tmp_path)}
    losses = []
    for kl_sum in (False, True):
        strategy = made("lfpt5", tasks=1, kl_sum=kl_sum, **options)
        strategy.begin_task(tasks[1], tasks[:1])
        shaken(strategy, seed=6)
        losses.append(strategy.objective(step_of(strategy, tasks[1].dev)))
    batch = strategy.replayed(0)
    old, new = strategy._old.token_logits(batch)[0], strategy.token_logits(batch)[0]
    more = 0.2 * (len(new) - 1) * softened_kl(old, new)
    torch.testing.assert_close(losses[1] - losses[0], more)


def test_lfpt5_generates_from_a_marker_of_the_task() -> None:
    strategy = made("lfpt5", tasks=1, task_markers=True, generate=True, replay="none")
    tokenizer = CharTokenizer()
    marker = tokenizer.encode(f"__gen_{TASKS[0].name}__", add_special_tokens=False)
    middle = tokenizer.encode("__ans__", add_special_tokens=False)
    rows = strategy.bench.encode(TASKS[0].dev[:1])
    made_of = strategy.generation(strategy.bench.collate(rows), [TASKS[0].name])
    assert made_of["input_ids"][0].tolist() == [*marker, 1]
    expected = [*rows[0]["input_ids"][:-1], *middle, *rows[0]["labels"]]
    assert made_of["labels"][0].tolist() == expected
    # What the model samples is read back; what has no answer is not.
    drawn = torch.tensor([[0, *expected], [0, *expected[:3]] + [1] * (len(expected) - 3)])
    strategy.model.generate = lambda **given: drawn
    [row] = strategy.generated(TASKS[0], 1)
    assert (row.prompt, row.output) == (TASKS[0].dev[0].prompt, TASKS[0].dev[0].output)
    with pytest.raises(ValueError, match="expected 'none' with generate=True"):
        ContinualSettings(
            strategy="lfpt5", strategy_options={"task_markers": True, "generate": True}
        )
