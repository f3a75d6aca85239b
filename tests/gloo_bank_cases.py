"""What the tests of sharded banks run in one process and in several: see gloo_cases.py."""

import copy
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gloo_cases import rank, world
from killed_edits import die_in_a_save
from tiny_models import tiny

import sapt_fast
from sapt_fast.methods.memory.folder import FactFolder
from sapt_fast.methods.mome import MomeConfig
from sapt_fast.pools.collectives import Group
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.key_index import ExactIndex
from sapt_fast.pools.row_optimizers import RowAdam
from sapt_fast.pools.sharded_experts import ShardedExperts, sharded_search
from sapt_fast.storage.bank_files import load_bank, save_bank
from sapt_fast.storage.sharded_bank_files import load_sharded_bank, save_sharded_bank

EXPERTS, WIDTHS = 10, (6, 5)


def bank_inputs():
    """Queries and inputs of all processes; two experts have the same key, some have none."""
    torch.manual_seed(0)
    keys = torch.randn(EXPERTS, 4)
    keys[7] = keys[2]
    queries = torch.randn(5, 4)
    queries[3] = 3 * keys[2]
    return keys, queries, torch.randn(5, WIDTHS[0]), torch.randn(5, WIDTHS[1])


def memorise(search, experts, optimizer, index, x, target, rows):
    """Three steps on this process's rows; returns scores, choices, and outputs before and after."""
    scores, chosen = search(index, rows)
    outputs = []
    for _ in range(3):
        used = chosen[chosen >= 0].unique()
        local, a, b = experts.training_rows(used)
        weights = scores.masked_fill(chosen < 0, 0).softmax(1).requires_grad_()
        inputs = x[rows].clone().requires_grad_()
        delta = experts.mix(inputs, chosen, weights)
        (delta - target[rows]).square().sum().backward()
        optimizer.step(local, (a.grad, b.grad))
        outputs.append(torch.cat([delta.detach(), inputs.grad, weights.grad], 1))
    with torch.no_grad():
        outputs.append(experts.mix(x[rows], chosen, weights))
    return [scores.detach(), chosen, *outputs]


def sharded_bank(folder: Path, dtype: str = "float32") -> None:
    """The rows are divided unevenly; one process without torch.distributed is the plain bank."""
    keys, queries, x, target = bank_inputs()
    rows = torch.arange(5)[torch.arange(5).mul(2).remainder(7).remainder(world()) == rank()]
    experts = ShardedExperts(EXPERTS, 1, *WIDTHS, seed=1, dtype=getattr(torch, dtype))
    shards = experts.shards
    index = ExactIndex(shards.count, 4)
    mine_ids = torch.arange(shards.first, shards.first + shards.count)
    kept = mine_ids != 4  # has no key
    index.set_rows(mine_ids[kept] - shards.first, keys[mine_ids[kept]])
    optimizer = RowAdam(experts.bank, lr=0.05)
    for _ in range(2):  # the second time from the saved state
        found = memorise(
            lambda index, rows: sharded_search(index, shards, queries[rows], 3),
            experts, optimizer, index, x, target, rows,
        )  # fmt: skip
        everyone = [shards.group.gather_ragged(part) for part in (rows, *found)]
        order = everyone[0].argsort()
        results = [part[order] for part in everyone[1:]]
        save_sharded_bank(folder / f"bank-{world()}-{dtype}", experts, optimizer, index)
        experts = ShardedExperts(EXPERTS, 1, *WIDTHS, dtype=getattr(torch, dtype))
        index = ExactIndex(shards.count, 4)
        optimizer = load_sharded_bank(folder / f"bank-{world()}-{dtype}", experts, index)
    state = [shards.group.gather_ragged(rows) for rows in experts.bank.dense()]
    if rank() == 0:
        torch.save([*results, *state], folder / f"sharded-{world()}-{dtype}.pt")


def bank_traffic(folder: Path) -> None:
    """Counts the bytes that this process receives from the others."""
    received = 0
    gather, exchange = Group.gather, Group.exchange

    def gathered(group, rows):
        nonlocal received
        received += rows.nbytes * (world() - 1)
        return gather(group, rows)

    def exchanged(group, rows, sent=None, counts=None):
        nonlocal received
        found = exchange(group, rows, sent, counts)
        counts = counts or [len(rows) // world()] * world()
        received += (len(found) - counts[rank()]) * rows[:1].nbytes
        return found

    experts = ShardedExperts(EXPERTS, 1, 6, 6)
    index = ExactIndex(experts.shards.count, 4)
    index.set_rows(torch.arange(experts.shards.count), torch.randn(experts.shards.count, 4))
    weights = torch.ones(4, 3, requires_grad=True)
    chosen = torch.tensor([[0, 1, 9], [1, 1, -1], [8, 7, 9], [-1, -1, -1]])  # both, one, one, none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "gather", gathered)
        patch.setattr(Group, "exchange", exchanged)
        totals = [0]
        sharded_search(index, experts.shards, torch.randn(4, 4), 3)
        totals.append(received)
        delta = experts.mix(torch.randn(4, 6, requires_grad=True), chosen, weights)
        totals.append(received)
        delta.sum().backward()
        totals.append(received)
    if rank() == 0:
        steps = [end - start for start, end in itertools.pairwise(totals)]
        (folder / "traffic.json").write_text(json.dumps(steps))


def plain_bank(folder: Path) -> None:
    """What `sharded_bank` does, by an index and a bank of all experts."""
    keys, queries, x, target = bank_inputs()
    bank, index = ExpertBank(EXPERTS, 1, *WIDTHS, seed=1), ExactIndex(EXPERTS, 4)
    kept = torch.arange(EXPERTS) != 4
    index.set_rows(kept.nonzero().squeeze(1), keys[kept])
    optimizer, rows = RowAdam(bank, lr=0.05), torch.arange(5)
    plain = SimpleNamespace(training_rows=lambda ids: (ids, *bank.training_rows(ids)), mix=bank.mix)
    for _ in range(2):
        results = memorise(
            lambda index, rows: index.search(queries[rows], 3),
            plain, optimizer, index, x, target, rows,
        )  # fmt: skip
    torch.save([*results, *bank.dense()], folder / "plain.pt")


def resharded_bank(folder: Path, saved: int) -> None:
    """Loads what another number of processes saved; keys, rows and moments."""
    experts = ShardedExperts(EXPERTS, 1, *WIDTHS)
    shards = experts.shards
    index = ExactIndex(shards.count, 4)
    optimizer = load_sharded_bank(folder / f"bank-{saved}-float32", experts, index)
    found = list(experts.bank.dense())
    scores, chosen = sharded_search(index, shards, bank_inputs()[1], 3)
    state = optimizer.state_dict()
    moments = torch.zeros(shards.count, WIDTHS[0])
    moments[state["ids"]] = state["tensors"]["exp_avg_sq_down"][:, 0]
    found = [shards.group.gather_ragged(rows) for rows in (*found, moments)]
    if rank() == 0:
        torch.save([scores, chosen, *found], folder / f"loaded-{saved}-{world()}.pt")
    with pytest.raises(NotADirectoryError, match="is a file"):  # on every process
        save_sharded_bank(Path(__file__), experts, optimizer, index)
    for wrong, message in (
        (ExactIndex(shards.count + 1, 4), f"got {shards.count + 1} keys, expected {shards.count}"),
        (ExactIndex(shards.count, 5), "Size mismatch"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sharded_bank(folder / f"bank-{saved}-float32", experts, wrong)
    damaged = sorted((folder / f"bank-{saved}-float32").glob("*.safetensors"))[-1]
    if world() > 1:
        dist.barrier()
    if rank() == 0:
        data = damaged.read_bytes()
        damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if world() > 1:
        dist.barrier()
    with pytest.raises(ValueError, match=f"{damaged.name}: its SHA-256 does not match"):
        load_sharded_bank(folder / f"bank-{saved}-float32", experts, index)
    if world() > 1:
        dist.barrier()
    if rank() == 0:
        damaged.write_bytes(data)


def killed_bank(folder: Path) -> None:
    """Trains with a save after each step: once, and once killed in a save and started again."""
    expected = _trained_in_child(folder / "whole")
    assert _trained_in_child(folder / "killed", kill=5) == -signal.SIGKILL
    assert 0 < _steps(load_bank(folder / "killed")[1]) < 4
    assert _trained_in_child(folder / "killed") == expected == 0
    found = [load_bank(folder / name) for name in ("whole", "killed")]
    (one, its), (other, theirs) = found
    assert all(map(torch.equal, one.dense(), other.dense()))
    assert all(map(torch.equal, one.master_rows(one.touched), other.master_rows(one.touched)))
    for name, moments in its.state_dict()["tensors"].items():
        assert torch.equal(moments, theirs.state_dict()["tensors"][name])


def _steps(optimizer: RowAdam) -> int:
    return int(optimizer.stored_rows.used("steps").sum()) // 3


def _trained_in_child(folder: Path, kill: int = 0) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    bank = ExpertBank(EXPERTS, 1, *WIDTHS, seed=1, dtype=torch.bfloat16)
    optimizer = RowAdam(bank, lr=0.05)
    try:
        if kill:
            die_in_a_save(kill)
        if (folder / "bank.json").exists() or (folder.parent / ".killed.previous").exists():
            bank, optimizer = load_bank(folder)
        for step in range(_steps(optimizer), 4):
            torch.manual_seed(step)
            ids = torch.randperm(EXPERTS)[:3]
            a, b = bank.training_rows(ids)
            optimizer.step(ids, (torch.randn_like(a), torch.randn_like(b)))
            save_bank(folder, bank, optimizer)
        os._exit(0)
    finally:
        os._exit(1)


def mome_model(folder: Path | None = None):
    """A tiny model with a sharded memory: an empty one, or one from a folder."""
    model = tiny("llama", initializer_range=0.3)
    if folder is not None:
        return sapt_fast.load_pretrained(model, folder)
    config = MomeConfig(
        num_experts=65, k=4, components=6, threshold=0.9, learning_rate=0.1, sharded=True
    )  # fmt: skip
    sapt_fast.patch(model, config)
    generator = torch.Generator().manual_seed(0)
    model.mome.fit_router(torch.randint(3, 60, (20, 5), generator=generator).unbind())
    return model


def sharded_mome(folder: Path, loaded: int = 0) -> None:
    """Memorises, changes and forgets facts, answers and saves; or loads what others saved."""
    facts = [([5, 6, 7], [20, 1]), ([8, 9], [21, 31, 32, 1]), ([12], [22, 30, 1])]
    if loaded:
        model = mome_model(folder / f"mome-{loaded}")
    else:
        model = mome_model()
        model.mome.memorise(facts[:2], until=1.0, batch_size=1, folder=folder / "run")
        if world() > 1:
            resumed_mome(model, facts[:2], folder / "run")
        report = model.mome.memorise([*facts[1:], ([40], [41, 1])], until=1.0, batch_size=3)
        assert report.unfitted == []
        model.mome.forget(report.facts[-1])
        model.mome.save_pretrained(folder / f"mome-{world()}")
    (bank,), group = model.mome.banks, model.mome.shards.group
    assert len(model.mome.facts) == 3
    if world() == 2:
        assert len(bank.touched) in (4, 8)  # new facts are spread over both
    bare = copy.deepcopy(model)
    sapt_fast.unpatch(bare)
    (mine, target), other = facts[rank() % 3], [50, 51]  # answers of different lengths
    rows = [answered(m, p) for m, p in ((model, mine), (model, other), (bare, other))]
    assert rows[0][: len(target)] == target
    assert rows[1] == rows[2]
    assert model.mome.experts_of(mine).acts
    logits = model(input_ids=torch.tensor([facts[0][0]])).logits[0, -1].detach()
    rows = bank.touched + bank.first, *bank.master_rows(bank.touched)
    ids, *tables = (group.gather_ragged(t) for t in rows)
    if rank() == 0:
        found = [logits, *(t[ids.argsort()] for t in (ids, *tables))]
        torch.save(found, folder / f"mome-{world()}-{loaded}.pt")
    if world() > 1 and not loaded:
        wrong_mome(model, folder / f"mome-{world()}")


def killed_mome(folder: Path, at: int | None = None) -> None:
    """Memorises into a folder; at the save of group `at`, the last process is killed."""

    def save(self, number, *rest) -> None:
        if number == at and rank() == world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        own(self, number, *rest)

    own, FactFolder.save = FactFolder.save, save
    model = mome_model()
    facts = [([5, 6, 7], [20, 1]), ([8, 9], [21, 31, 32, 1]), ([12], [22, 30, 1])]
    model.mome.memorise(facts, until=1.0, batch_size=1, folder=folder / "run")
    model.mome.save_pretrained(folder / "saved")
    torch.save([bank.stored() for bank in model.mome.banks], folder / f"rows-{rank()}.pt")


def answered(model, prompt):
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=5, do_sample=False)[0, len(prompt) :].tolist()


def resumed_mome(model, facts, folder: Path) -> None:
    """A group that one process has not saved is trained again by both."""
    if rank() == 1:
        shutil.rmtree(folder / f"process-1-of-{world()}" / "groups" / "00001")
    again = mome_model()
    again.mome.memorise(facts, until=1.0, batch_size=1, folder=folder)
    for one, other in zip(model.mome.banks, again.mome.banks, strict=True):
        assert all(map(torch.equal, one.stored().values(), other.stored().values()))


def wrong_mome(model, saved: Path) -> None:
    """Errors are raised by both processes."""
    with pytest.raises(ValueError, match="got others than process"):
        model.mome.memorise([([30 + rank()], [9, 1])])
    shard = max(saved.glob("mome_bank_*/*.safetensors"))
    dist.barrier()
    if rank() == 0:
        shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    dist.barrier()
    with pytest.raises(ValueError, match=f"{shard.name}: its SHA-256"):
        mome_model(saved)
