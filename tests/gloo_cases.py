"""What the tests run in one process and in two, with the same rows in every step.

What a case needs is imported here: every process is forked from one that has it.
"""

import json
import os
from pathlib import Path

import cpu_accelerate
import matplotlib.pyplot  # noqa: F401  for the plots of a run
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from continual.test_trainer import patched, replays, trainer_of
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
from sapt_fast.pools.sharding import is_sharded, whole

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
