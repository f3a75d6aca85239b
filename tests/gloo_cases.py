"""What the tests run in one process and in two, with the same rows in every step.

What a case needs is imported here: every process is forked from one that has it.
"""

import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import cpu_accelerate
import matplotlib.pyplot  # noqa: F401  for the plots of a run
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from continual.test_trainer import patched, replays, trainer_of
from killed_edits import die_in_a_save
from peft import LoraConfig, get_peft_model
from tiny_models import checkpointed, settings, tiny, token_ids
from tiny_tasks import make_model, make_settings, make_tasks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

import sapt_fast
from sapt_fast import cli
from sapt_fast.continual.compare.compare import compare, settings_of_rows
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run import loop
from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.pools.collectives import Group
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.key_index import ExactIndex
from sapt_fast.pools.row_optimizers import RowAdam
from sapt_fast.pools.sharded_experts import ShardedExperts, sharded_search
from sapt_fast.pools.sharding import is_sharded, whole
from sapt_fast.storage.bank_files import load_bank, save_bank
from sapt_fast.storage.sharded_bank_files import load_sharded_bank, save_sharded_bank

ROWS = 4  # of a step, over all processes


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def mine(rows):
    """This process's share of a step's rows."""
    return rows[rank() :: world()].contiguous()


def build(kind: str):
    model = tiny(kind).double()
    torch.manual_seed(0)
    return sapt_fast.patch(model, settings())


def begin(model, number: int, optimizer=None) -> None:
    """Adds a task that already does something; every process draws the same."""
    torch.manual_seed(number)
    model.sapt.add_task(f"task{number}", optimizer)
    for pool in model.sapt.pools.values():
        torch.nn.init.normal_(pool.b.trainable.data, std=0.1)


def shard(model, kind: str):
    """FSDP2, every block on its own."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = inner.model.layers if kind == "llama" else [*inner.encoder.block, *inner.decoder.block]
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


def wrap(model, kind: str, how: str):
    """The model as it is called. how: "plain", "ddp" or "fsdp"."""
    if how == "ddp":
        return DistributedDataParallel(model)
    return shard(model, kind) if how == "fsdp" else model


def step(called, model, optimizer, number: int) -> float:
    """An optimizer step; the loss over all rows. From the second task on with reflection."""
    ids = mine(token_ids(ROWS, 9, seed=number))
    loss = called(input_ids=ids, labels=ids).loss
    if len(getattr(model.sapt, "targets", ())):
        old = mine(token_ids(ROWS, 6, seed=50 + number))
        loss = loss + 0.5 * model.sapt.reflection_loss(old, model.sapt.targets["task0"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss = loss.detach()
    if world() > 1:
        dist.all_reduce(loss)
    return loss.item() / world()


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def keep(folder: Path, name: str, losses, model) -> None:
    """Stores what rank 0 came to."""
    state = model.state_dict(keep_vars=True)
    trained = {n: t for n, t in state.items() if "sapt" in n or "lora" in n}
    state = {n: whole(t).clone() for n, t in trained.items()}
    if rank() == 0:
        torch.save({"losses": losses, "state": state}, folder / f"{name}.pt")


def train(folder: Path, kind: str, how: str, recompute: bool = False) -> None:
    """Two tasks in turn: the earlier adapter is frozen and replayed."""
    model, losses = build(kind), []
    for number in range(2):
        if how == "fsdp" and number:
            saved = folder / f"{kind}-task{number}"
            model.sapt.save_pretrained(saved)
            dist.barrier()
            model = sapt_fast.load_pretrained(tiny(kind).double(), saved)
        if recompute:
            model.train()
            checkpointed(model, {"use_reentrant": recompute == "reentrant"})
        begin(model, number)
        if number:
            model.sapt.targets["task0"] = torch.ones(1, dtype=torch.float64)
        called, optimizer = wrap(model, kind, how), adam(model)
        losses += [step(called, model, optimizer, 10 * number + i) for i in range(2)]
    keep(folder, f"{kind}-{how}", losses, model)


def train_amp(folder: Path, kind: str, half: str) -> None:
    """Autocast and a scaled loss, under DDP where there are several; the first step overflows."""
    model = tiny(kind)
    torch.manual_seed(0)
    sapt_fast.patch(model, settings())
    begin(model, 0)
    begin(model, 1)
    model.sapt.targets["task0"] = torch.ones(1)
    called = wrap(model, kind, "ddp" if world() > 1 else "plain")
    parameters = list(model.sapt.trainable_parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117)
    for number in range(4):
        optimizer.zero_grad()
        ids = mine(token_ids(ROWS, 9, seed=number))
        with torch.autocast("cpu", getattr(torch, half)):
            loss = called(input_ids=ids, labels=ids).loss
            loss = loss + 0.5 * model.sapt.reflection_loss(ids, model.sapt.targets["task0"])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        unmoved = [torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
        assert all(unmoved) if number == 0 else not any(unmoved)
    for parameter in parameters if world() > 1 else ():
        largest = parameter.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        assert torch.equal(largest, parameter)
    moved = [(p.detach() - old).flatten() for p, old in zip(parameters, before, strict=True)]
    if rank() == 0:
        torch.save(torch.cat(moved), folder / f"amp-{world()}.pt")


def train_accelerate(folder: Path, kind: str) -> None:
    """Two tasks; where there are several processes accelerate shards the model, as on GPUs."""
    model = build(kind)
    begin(model, 0)
    begin(model, 1)
    model.sapt.targets["task0"] = torch.ones(1, dtype=torch.float64)
    called, optimizer, name = model, adam(model), "plain"
    if world() > 1:
        accelerator = Accelerator(cpu=True)
        # On CPUs it takes no plugin; examples/configs/fsdp2.yaml comes to this one.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        called, optimizer = accelerator.prepare(model, optimizer)
        assert is_sharded(model)
        name = "accelerate"
    losses = [step(called, model, optimizer, number) for number in range(3)]
    keep(folder, f"{kind}-{name}", losses, model)
    model.sapt.save_pretrained(folder / name)


def train_peft(folder: Path, kind: str, how: str) -> None:
    """Two PEFT adapters, both active, on a patched PeftModel."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v", "q_proj", "v_proj"])
    torch.manual_seed(0)
    model = get_peft_model(tiny(kind), config, adapter_name="a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(["a", "b"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model = sapt_fast.patch(model.double())
    called = wrap(model, kind, how)
    optimizer = adam(model)
    keep(folder, f"{kind}-{how}", [step(called, model, optimizer, i) for i in range(2)], model)


def resume(folder: Path, kind: str, part: str) -> None:
    """Two steps in the first process group, two in the second; "whole" for all in one."""
    how = "fsdp" if world() > 1 else "plain"
    model = build(kind)
    begin(model, 0)
    begin(model, 1)
    model.sapt.targets["task0"] = torch.ones(1, dtype=torch.float64)
    called = wrap(model, kind, how)
    optimizer = adam(model)
    if part == "second":
        torch.manual_seed(5)
        for parameter in model.sapt.trainable_parameters():
            torch.nn.init.normal_(parameter)
        weights, moments = get_state_dict(model, optimizer)
        stored = {"model": weights, "optimizer": moments}
        dcp.load(stored, checkpoint_id=folder / "first")
        set_state_dict(
            model, optimizer, model_state_dict=stored["model"],
            optim_state_dict=stored["optimizer"],
        )  # fmt: skip
    steps = {"first": (0, 1), "second": (2, 3), "whole": (0, 1, 2, 3)}[part]
    losses = [step(called, model, optimizer, number) for number in steps]
    if part == "first":
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "first")
    keep(folder, part, losses, model)


def refusals(folder: Path) -> None:
    """What would go wrong without a word raises."""
    model = build("llama")
    begin(model, 0)
    called = DistributedDataParallel(model)
    optimizer = adam(model)
    step(called, model, optimizer, 0)
    begin(model, 1, optimizer)
    with pytest.raises(RuntimeError, match="wrap the model again after add_task"):
        step(called, model, optimizer, 1)
    with torch.no_grad():
        called(input_ids=token_ids())
    step(DistributedDataParallel(model), model, optimizer, 1)

    shard(model, "llama")
    ids = token_ids()
    with pytest.raises(RuntimeError, match=r"functional_call, FSDP.*shard that"):
        model.sapt.add_task("later")
    assert model.sapt.tasks == ["task0", "task1"]
    with pytest.raises(RuntimeError, match="after the model's forward and before the backward"):
        model.sapt.reflection_loss(ids, torch.ones(1).double())
    for change in (sapt_fast.patch, sapt_fast.unpatch):
        with pytest.raises(ValueError, match="its parameters are sharded"):
            change(model if change is sapt_fast.unpatch else shard(tiny("llama"), "llama"))
    with torch.no_grad():
        routed = model.sapt.route(ids)
        model(input_ids=ids)
    torch.testing.assert_close(routed, model.sapt.attention)


def save(folder: Path, kind: str) -> None:
    """save_pretrained and export_adapter, called by all processes, written by one."""
    model = build(kind)
    begin(model, 0)
    begin(model, 1)
    model.sapt.targets["task0"] = torch.ones(1)
    if world() > 1:
        shard(model, kind)
        ids = token_ids()
        with torch.no_grad():  # leaves the outermost parameters whole
            model(input_ids=ids, labels=ids)
    model.sapt.save_pretrained(folder / "tasks")
    model.sapt.export_adapter([0.25, 0.75], folder / "mixture")


def run_trainer(folder: Path, kind: str, resume: bool = False, how: str = "ddp") -> None:
    """SaptTrainer on a third task; rows of each process such that a step has eight.

    how: where there are several, "ddp", or as accelerate does it on GPUs "fsdp", "zero2", "zero3".
    """
    options = {
        "per_device_train_batch_size": 4 // world(), "gradient_accumulation_steps": 2,
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "data_seed": 1,
    }  # fmt: skip
    if how != "ddp":
        _accelerate(how)
        options |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    # The first of the three with one row for both processes, one of which has none to replay.
    replay = replays(count=1)[:1] + replays(count=3)[1:]
    trainer = trainer_of(
        patched(kind, own_key_loss=0.3), kind, folder / "training", data=32, replay=replay,
        options=options,
    )  # fmt: skip
    trainer.train(str(folder / "training" / "checkpoint-2") if resume else None)
    trainer.save_model(str(folder / "saved"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert is_sharded(model) == (how in ("fsdp", "zero3"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    losses = [log[name] for log in logs for name in ("loss", "kl")]
    keep(folder, f"trainer-{world()}-{resume}", losses, model)


def _accelerate(how: str) -> None:
    """What `accelerate launch` sets with examples/configs, and the CPU in place of a GPU."""
    stage = {"zero2": "2", "zero3": "3"}.get(how)
    os.environ |= (
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
        if stage
        else {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }
    )
    cpu_accelerate.act_as_on_gpus()


def run_continual(folder: Path, name: str, stop: int | None = None) -> None:
    """A continual run over three tasks; killed before task `stop` is scored."""
    own, calls = loop._Run.score_seen, []

    def watched(run, index):
        if index == stop:
            raise KeyboardInterrupt
        calls.append(index)
        return own(run, index)

    loop._Run.score_seen = watched
    options = make_settings(accumulation=1, save_steps=2)
    model = make_model("t5").double()
    try:
        loop.run_continual(model, CharTokenizer(), make_tasks(), folder / name, options)
    except KeyboardInterrupt:
        return
    keep(folder, f"{name}-weights", calls, model)


def run_comparison(folder: Path, name: str) -> None:
    """Two methods on two tasks, with FWT and TensorBoard's files."""
    _comparison(folder / name, "sapt", "seqlora")


def _comparison(folder: Path, *rows: str) -> None:
    class Tiny(Source):
        def load_tasks(self):
            return make_tasks(2, train=8, held_out=2)

        def load_model(self):
            return make_model("t5").double(), CharTokenizer()

    base = make_settings(steps=2, save_steps=1, accumulation=1)
    compare(
        Tiny(model="demo", benchmark="demo"), settings_of_rows(base, rows, {}), folder,
        alone=base, tensorboard=True, progress=False,
    )  # fmt: skip


def run_commands(folder: Path) -> None:
    """What this process prints of `train`, `eval` and `compare`."""
    common = ("--model", "demo", "--benchmark", "demo", "--device", "cpu", "--no-progress")
    short = (*common, "--max-train", "8", "--max-eval", "4")
    steps = ("--steps", "1", "--max-target-length", "2")
    train = ("train", *short, "--tasks", "last_first", *steps)
    compare = ("compare", *short, "--order", "last_first", "--set", "steps=1", "--no-fwt")
    commands = {
        "single": (*train, "--strategy", "single", "--output", str(folder / "alone")),
        "train": (*train, "--strategy", "seqlora", "--output", str(folder / "run")),
        "eval": ("eval", str(folder / "run"), "--no-progress"),
        "compare": (*compare, "--strategies", "seqlora", "--output", str(folder / "compare")),
    }
    printed = {}
    for name, command in commands.items():
        result = CliRunner().invoke(cli.app, list(command), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        printed[name] = result.stdout
    (folder / f"printed-{rank()}.json").write_text(json.dumps(printed))


def refuse_continual(folder: Path) -> None:
    """What several processes cannot do as one would."""
    for options, message in (
        ({"batch_size": 3}, "batch_size: got 3, expected a multiple of 2"),
        ({"strategy": "ewc"}, "strategy: 'ewc' does not support several processes"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.run_continual(
                make_model("t5"), CharTokenizer(), make_tasks(), folder, make_settings(**options)
            )
    with pytest.raises(ValueError, match="strategy: 'ewc' does not support several processes"):
        _comparison(folder, "sapt", "ewc")
    assert not list(folder.iterdir())


# --- a bank of experts that is sharded by rows ---

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
