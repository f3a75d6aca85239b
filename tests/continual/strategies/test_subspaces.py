"""InfLoRA, GainLoRA and SD-LoRA against their equations, worked out another way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from strategy_cases import KINDS, TASKS, made, shaken, step_of
from tiny_tasks import make_settings
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.continual.objective import Step, forward, supervised
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.continual.subspaces import Subspace, grown, leading_directions, of_one_length
from sapt_fast.continual.workbench import Workbench
from sapt_fast.demo.tasks import CharTokenizer

FORMULAS = Path(__file__).parents[2] / "data" / "formulas" / "gainlora.safetensors"


def projector(kept: Subspace) -> Tensor:
    """The matrix [D, D] that projects to a subspace."""
    inside = kept.basis.double() @ kept.basis.double().T
    return torch.eye(len(inside), dtype=torch.float64) - inside if kept.complement else inside


def near(found: Tensor, expected: Tensor | float, by: float = 1e-5) -> None:
    wide = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wide.expand(found.shape), rtol=0, atol=by)


def moment_of(seed: int, width: int = 9, rank: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, rank, generator=generator) * torch.logspace(0, -1.5, rank)
    x = x @ torch.randn(rank, width, generator=generator)
    return x.T @ x / 40


# --- subspaces ---


def test_a_memory_grows_by_the_projected_directions_of_each_task() -> None:
    kept, sizes = None, []
    basis = torch.zeros(9, 0, dtype=torch.float64)
    for seed, threshold in enumerate((0.97, 0.97, 0.99, 0.99)):
        m = moment_of(seed).double()
        kept = grown(kept, m.float(), threshold)
        rest = m - basis @ basis.T @ m
        vectors, values, _ = torch.linalg.svd(rest)
        shares = (values**2 / m.square().sum()).tolist()
        count, share = 0, 1 - sum(shares)
        # The first task stops before the threshold, later ones behind it.
        while (share + shares[count] if seed == 0 else share) < threshold:
            share += shares[count]
            count += 1
        basis = torch.cat([basis, vectors[:, : max(count, seed == 0)]], dim=1)
        near(projector(kept), basis @ basis.T)
        sizes.append(basis.shape[1])
        assert kept.complement == (sizes[-1] > 4.5)
        assert kept.basis.shape[1] == min(sizes[-1], 9 - sizes[-1])
        rows = torch.randn(3, 9).double()
        near(kept.off(rows), rows - rows @ basis @ basis.T)
    assert sizes[0] < sizes[1] < 5 < sizes[2] < sizes[3] < 9
    assert grown(kept, moment_of(3), 0.9) is kept


def test_directions_are_off_the_memory_even_where_the_inputs_have_none() -> None:
    kept = grown(None, moment_of(0, rank=3), 0.9999)
    moment = moment_of(1, rank=2)
    rows = leading_directions(moment, 4, kept)
    near(rows @ projector(kept), 0, 1e-6)
    near(rows @ rows.T, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), 1e-6)
    assert not leading_directions(moment, 3, Subspace(torch.eye(9))).any()
    assert not leading_directions(moment * 0, 2, None).any()
    assert grown(None, moment * 0, 0.9).basis.shape == (9, 0)
    with pytest.raises(ValueError, match="moment: got non-finite values"):
        leading_directions(moment * torch.nan, 2, None)


def test_batches_of_one_length_have_all_rows() -> None:
    rows = [{"input_ids": [0] * n, "labels": [1] * m} for n, m in ((2, 1), (3, 1), (2, 1), (2, 2))]
    batches = list(of_one_length(rows, 1)) + list(of_one_length(rows, 2))
    assert [[len(r["input_ids"]) for r in b] for b in batches[4:]] == [[2, 2], [2], [3]]
    assert [len(b) for b in batches[:4]] == [1] * 4
    assert sorted(id(row) for b in batches[4:] for row in b) == sorted(map(id, rows))


# --- InfLoRA ---


def inputs_of(strategy: Any, rows: Any) -> dict[str, Tensor]:
    """What every layer reads of rows, one row at a time, [N, D]."""
    seen: dict[str, list[Tensor]] = {path: [] for path in strategy.handle.pools}
    layers = strategy.handle.layers
    hooks = [
        layers[path].register_forward_pre_hook(lambda _, args, to=to: to.append(args[0][0]))
        for path, to in seen.items()
    ]
    strategy.model.eval()
    for row in strategy.bench.encode(rows):
        batch = strategy.bench.collate([row])
        with torch.no_grad():
            forward(strategy.model, batch, strategy.mixture(batch["input_ids"], None))
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts).double() for path, parts in seen.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_inflora_designs_each_layer_from_its_inputs(kind: str) -> None:
    strategy = made("inflora", kind, tasks=1, threshold=0.9, rows=7)
    memory, groups = dict(strategy._memory), strategy.input_groups()
    learned = inputs_of(strategy, TASKS[0].train[:7])
    for first in groups:
        m = learned[first].T @ learned[first] / len(learned[first])
        near(projector(memory[f"layers.{first}"]), projector(grown(None, m, 0.9)), 1e-3)
    strategy.begin_task(TASKS[1], TASKS[:1])
    new = inputs_of(strategy, TASKS[1].train[:7])
    names = {name for name, _ in strategy.trained()}
    assert names
    assert all(name.endswith("sapt_pool.b.trainable") for name in names)
    shaken(strategy, seed=8)
    for path, pool in strategy.handle.pools.items():
        p = projector(memory[f"layers.{next(f for f, own in groups.items() if pool in own)}"])
        a, b = (part.double() for part in pool.adapter(1))
        near(a @ p, 0, 1e-6)
        vectors, _, _ = torch.linalg.svd((torch.eye(len(p)) - p) @ (new[path].T @ new[path]))
        near(3 * a.T @ a, vectors[:, :2] @ vectors[:, :2].T, 1e-3)
        # Inputs inside of the memory are not changed, others are.
        assert (torch.randn(5, len(p)).double() @ p @ a.T @ b).abs().max() < 1e-5
        assert (new[path] @ a.T @ b).abs().max() > 1e-2


def test_inflora_at_random_is_off_the_memory_with_rows_of_one_norm() -> None:
    strategy = made("inflora", tasks=1, design="random", threshold=0.9)
    strategy.begin_task(TASKS[1], TASKS[:1])
    drawn = set()
    for first, pools in strategy.input_groups().items():
        p = projector(strategy._memory[f"layers.{first}"])
        for pool in pools:
            rows = pool.a.trainable.detach()
            near(rows.double() @ p, 0, 1e-6)
            near(rows.norm(dim=1), 3**-0.5)
            drawn.add(rows[0, 0].item())
    assert len(drawn) == len(strategy.handle.pools)


def test_inflora_says_when_no_direction_is_left(caplog: pytest.LogCaptureFixture) -> None:
    strategy = made("inflora", tasks=1)
    width = len(next(iter(strategy._memory.values())).basis)
    strategy._memory = {n: Subspace(torch.eye(width)) for n in strategy._memory}
    strategy.begin_task(TASKS[1], TASKS[:1])
    assert "fewer than r directions left" in caplog.text
    assert all(not pool.a.trainable.any() for pool in strategy.handle.pools.values())


# --- SD-LoRA ---


@pytest.mark.parametrize("normalize", [True, False])
def test_sd_lora_is_its_equation(normalize: bool) -> None:
    strategy = made("sd_lora", tasks=2, normalize=normalize)
    handle = strategy.handle
    learned = {
        path: [part.detach().clone() for part in pool.adapter(1)]
        for path, pool in handle.pools.items()
    }
    kept = handle.magnitudes.detach().clone()
    strategy.begin_task(TASKS[2], TASKS[:2])
    start = [0.8] * 3 if normalize else [*kept.tolist(), 0.8]
    assert handle.magnitudes.tolist() == pytest.approx(start)
    shaken(strategy, seed=5)
    names = [name for name, _ in strategy.trained() if "sapt_pool" not in name]
    assert names == ["sapt.magnitudes"]
    batch = strategy.bench.collate(strategy.bench.encode(TASKS[2].dev))
    found = F.cross_entropy(*strategy.token_logits(batch))
    (gradient,) = torch.autograd.grad(found, [handle.magnitudes])

    s = handle.magnitudes.detach().clone().requires_grad_()
    weights = {}
    for path, pool in handle.pools.items():
        total = strategy.model.get_submodule(path).weight.detach()
        for k in range(3):
            a, b = (part.detach() for part in pool.adapter(k))
            if k == 1:  # as it was learned, before its norms were taken out
                a, b = learned[path]
            scale = 1 / (a.norm() * b.norm()) if normalize and k < 2 else 2.0
            total = total + s[k] * scale * (b.T @ a)
        weights[f"{path}.weight"] = total
    sapt_fast.unpatch(strategy.model)
    logits = torch.func.functional_call(strategy.model, weights, kwargs=dict(batch)).logits
    expected = F.cross_entropy(*supervised(logits, batch["labels"], strategy.bench.causal))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, [s])[0], rtol=1e-3, atol=1e-5
    )
    assert gradient.abs().min() > 1e-5


def test_sd_lora_keeps_adapters_that_are_zero() -> None:
    strategy = made("sd_lora")
    for k in range(2):
        strategy.begin_task(TASKS[k], TASKS[:k])
    assert all(p.isfinite().all() for p in strategy.model.parameters())


# --- GainLoRA ---


def gates_by_hand(strategy: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The weights of every gate for every row, in float64."""
    table = strategy.model.get_input_embeddings().weight.detach().double()
    handle, rows = strategy.handle, []
    down, up = (t.detach().double() for t in handle.gates.projections())
    keys = handle.router.keys.rows().double()
    for row, seen in zip(ids, mask.bool(), strict=True):
        e, found = table[row[seen]].mean(0), []
        for k in range(len(keys)):
            g = F.silu(up[k] @ F.silu(down[k] @ e))
            cosine = (g @ keys[k]) / g.norm() / keys[k].norm()
            found.append((2 / (1 + torch.exp(-4 * cosine)) - 1).abs())
        rows.append(torch.stack(found))
    return torch.stack(rows)


@pytest.mark.parametrize("branch", ["inflora", "olora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_gate_is_zero_on_earlier_inputs_while_it_trains(kind: str, branch: str) -> None:
    options = {"threshold": 1.0, "gate_threshold": 1.0, "branch": branch}
    strategy = made("gainlora", kind, tasks=1, **options)
    given = [strategy.bench.pad(strategy.bench.inputs(task.train)) for task in TASKS]
    for new in (1, 2):
        strategy.begin_task(TASKS[new], TASKS[:new])
        assert strategy.handle.route(*given[new])[:, new].mean() > 0.05
        for step in range(3):
            shaken(strategy, seed=step)
            moved = [p.detach().clone() for p in strategy.gate().values()]
            free = strategy.handle.route(*given[0])[:, new]
            strategy.after_step()
            for task in range(new):
                weights = strategy.handle.route(*given[task])
                near(weights, gates_by_hand(strategy, *given[task]))
                assert weights[:, new].max() < 1e-4
                assert weights[:, task].min() > 1e-3
            assert free.max() > 1e-2
            now = strategy.gate().values()
            assert not any(map(torch.equal, moved, now))
        strategy.end_task(TASKS[new])
    trained = {name.removeprefix("sapt.") for name, _ in strategy.trained() if "sapt." in name}
    assert trained == {"gates.down.trainable", "gates.up.trainable", "router.keys.trainable"}


def test_gainlora_adds_olora_s_overlap() -> None:
    strategy = made("gainlora", tasks=1, branch="olora", orthogonality=0.3)
    strategy.begin_task(TASKS[1], TASKS[:1])
    step = step_of(strategy, TASKS[1].dev)
    pools = strategy.handle.pools.values()
    overlap = sum((p.adapter(0)[0] @ p.adapter(1)[0].T).abs().sum() for p in pools)
    torch.testing.assert_close(strategy.objective(step), step.loss + 0.3 * overlap)
    assert made("gainlora").objective(step) is step.loss


def test_a_key_without_a_direction_starts_at_random_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = made("gainlora", tasks=1)
    strategy._memory["gate.outputs"] = Subspace(torch.eye(strategy.handle.router.keys.width))
    strategy.begin_task(TASKS[1], TASKS[:1])
    assert "its key starts at random" in caplog.text
    assert strategy.handle.router.keys.trainable.norm() > 0


@pytest.mark.parametrize("name", ["inflora", "gainlora"])
def test_memories_come_back_from_their_state(name: str) -> None:
    strategy = made(name, tasks=2, threshold=0.99)
    strategy._memory["one"] = Subspace(torch.eye(4)[:, :1], complement=True)
    state = strategy.state()
    assert {n.partition(".")[0] for n in state} == {"memory", "complement"}
    again = made(name)
    again.load_state(state)
    assert again._memory.keys() == strategy._memory.keys()
    for key, kept in strategy._memory.items():
        assert torch.equal(again._memory[key].basis, kept.basis)
        assert again._memory[key].complement == kept.complement


class Rows(SimpleNamespace):
    """A task of encoded rows."""

    name: str
    train: list[dict[str, list[int]]]


def test_gainlora_repeats_a_run_of_its_formulas() -> None:
    """`benchmarks/formulas_gainlora.py` recorded it, without this package."""
    with safe_open(FORMULAS, "pt") as file:
        meta = {name: json.loads(value) for name, value in file.metadata().items()}
    recorded, s = load_file(FORMULAS), meta["settings"]
    assert "not by running the authors' code" in meta["made_from"]
    model = LlamaForCausalLM(LlamaConfig(**meta["model"])).double().eval()
    base = {n.removeprefix("base."): t for n, t in recorded.items() if n.startswith("base.")}
    model.load_state_dict(base)
    chosen = {n: s[n] for n in ("threshold", "gate_threshold", "expected_tasks")}
    bench: Any = Workbench(
        model, CharTokenizer(), make_settings(strategy="gainlora", strategy_options=chosen)
    )
    bench.encode = list
    strategy: Any = STRATEGIES["gainlora"](
        bench, STRATEGIES["gainlora"].options_of("gainlora", chosen)
    )
    config = SaptConfig(
        r=s["r"], lora_alpha=s["lora_alpha"], query_hidden_dim=s["hidden"],
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    sapt_fast.patch(model, strategy.configure(config))
    handle = strategy.handle
    for number, rows in enumerate(recorded["rows"].tolist()):
        mask = [-100] * s["prompt"]
        encoded = [{"input_ids": row, "labels": mask + row[s["prompt"] :]} for row in rows]
        task = Rows(name=f"task{number}", train=encoded)
        handle.add_task(task.name)
        with torch.no_grad():
            handle.router.keys.trainable.copy_(recorded["start.keys"][number])
            if number == 0:
                handle.gates.down.trainable.copy_(recorded["start.down"])
                handle.gates.up.trainable.copy_(recorded["start.up"])
        strategy.prepare(task)
        trained = [parameter for _, parameter in strategy.trained()]
        optimizer = torch.optim.AdamW(trained, lr=s["learning_rate"], weight_decay=0.0)
        for step in range(s["steps"]):
            places = [(step * s["batch"] + i) % s["rows"] for i in range(s["batch"])]
            batch = bench.collate([encoded[i] for i in places])
            logits = forward(model, batch).logits
            loss = F.cross_entropy(*supervised(logits, batch["labels"], causal=True))
            near(loss.detach(), recorded["losses"][number, step], 1e-4)
            optimizer.zero_grad()
            strategy.objective(Step(step, batch, logits, loss)).backward()
            optimizer.step()
            strategy.after_step()
        strategy.end_task(task)
        for path, pool in handle.pools.items():
            a, b = pool.adapter(number)
            near(b.T @ a, recorded[f"delta.{number}.{path}"], 1e-4)
        near(handle.gates.down.trainable, recorded[f"down.{number}"], 1e-4)
        near(handle.gates.up.trainable, recorded[f"up.{number}"], 1e-4)
        key, expected = handle.router.keys.trainable[0].detach(), recorded[f"key.{number}"]
        near(key * (key @ expected.double()).sign(), expected, 1e-4)
        prompts = recorded["rows"].flatten(0, 1)[:, : s["prompt"]]
        near(handle.route(prompts), recorded[f"weights.{number}"], 1e-4)
    sizes = {"down": "gate.inputs", "up": "gate.hidden", "key": "gate.outputs"}
    groups = {f"layers.{path}" for path in strategy.input_groups()}
    for name, kept in strategy._memory.items():
        found = len(kept.basis) - kept.basis.shape[1] if kept.complement else kept.basis.shape[1]
        where = next((short for short, full in sizes.items() if full == name), name[7:])
        assert found == recorded[f"sizes.{s['tasks'] - 1}.{where}"]
    assert strategy._memory.keys() == groups | set(sizes.values())
