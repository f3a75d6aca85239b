"""SaptTrainer: losses, replay, what is optimised, checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tiny_tasks import make_model
from transformers import Seq2SeqTrainingArguments, TrainerCallback

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.continual.data.collate import Collator
from sapt_fast.continual.trainer import Replay, SaptTrainer

KINDS = ("t5", "llama")


def rows(kind: str, count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows with prompts and targets of different lengths, as `encode_rows` makes them."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [rng.randrange(3, 67) for _ in range(rng.randint(3, 7))]
        target = [rng.randrange(3, 67) for _ in range(rng.randint(1, 5))]
        if kind == "llama":
            made.append({"input_ids": prompt + target, "labels": [-100] * len(prompt) + target})
        else:
            made.append({"input_ids": prompt, "labels": target})
    return made


def replays(count: int = 8, lengths: tuple[int, ...] = (1, 2)) -> list[Replay]:
    rng = random.Random(5)
    made = []
    for number, length in enumerate(lengths):
        inputs = [[rng.randrange(3, 67) for _ in range(rng.randint(2, 6))] for _ in range(count)]
        target = torch.rand(length, generator=torch.Generator().manual_seed(number)) + 0.1
        made.append(Replay(f"task{number}", inputs, target / target.sum()))
    return made


def patched(kind: str, tasks: int = 3, dropout: float = 0.0, **config: Any) -> Any:
    torch.manual_seed(1)
    model = sapt_fast.patch(make_model(kind, dropout), SaptConfig(r=3, lora_alpha=6, **config))
    for number in range(tasks):
        model.sapt.add_task(f"task{number}")
        for pool in model.sapt.pools.values():
            torch.nn.init.normal_(pool.b.trainable.data, std=0.2)
    return model


def arguments(folder: Path, **options: Any) -> Seq2SeqTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "max_grad_norm": 0.0,
        "seed": 3,
    }
    return Seq2SeqTrainingArguments(**{**defaults, **options})


def trainer_of(
    model: Any, kind: str, folder: Path, *, data: int = 8, replay: Any = (), options: Any = None,
    **kwargs: Any,
) -> SaptTrainer:  # fmt: skip
    return SaptTrainer(
        model,
        arguments(folder, **(options or {})),
        train_dataset=rows(kind, data),
        eval_dataset=rows(kind, 4, seed=9),
        data_collator=Collator(0),
        replay=replay,
        **kwargs,
    )


class _Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.flat = torch.cat(
            [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_of_one_and_four_agree(kind: str, tmp_path: Path) -> None:
    gradients, losses = [], []
    for steps in (1, 4):
        model = patched(kind, own_key_loss=0.3)
        callback = _Gradients()
        options = {
            "per_device_train_batch_size": 8 // steps,
            "gradient_accumulation_steps": steps,
        }
        trainer = trainer_of(
            model, kind, tmp_path, replay=replays(), options=options, callbacks=[callback]
        )
        trainer.train()
        gradients.append(callback.flat)
        losses.append(trainer.state.log_history[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    for name in ("loss", "kl"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-5)
    assert losses[0]["kl"] > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_sum_of_its_parts(kind: str, tmp_path: Path) -> None:
    model = patched(kind, kl_ratio=0.7, own_key_loss=0.2)
    replay = replays(count=4)
    trainer = trainer_of(model, kind, tmp_path, replay=replay)
    trainer.current_gradient_accumulation_steps = 1
    batch = Collator(0)(rows(kind, 8))
    model.eval()
    expected = model(**batch).loss.double()
    weights = model.sapt.routing.weights
    expected = expected - 0.2 * weights[:, -1].log().mean()
    for entry in replay:
        ids = torch.zeros(4, 6, dtype=torch.int64)
        for index, row in enumerate(entry.inputs):
            ids[index, : len(row)] = torch.tensor(row)
        scores = model.sapt.route(ids, (ids != 0).long()).log()
        target = F.pad(entry.target, (0, 3 - len(entry.target))).expand(4, 3)
        expected = expected + 0.7 * F.kl_div(scores, target, reduction="batchmean")
    labels = batch["labels"] if kind == "t5" else batch["labels"][:, 1:]
    tokens = (labels != -100).sum()
    model.train()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=tokens)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    # In evaluation only the token loss counts.
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch).loss)


def test_released_scale_adds_the_whole_kl_in_each_micro_batch(tmp_path: Path) -> None:
    model = patched("t5")
    batch = Collator(0)(rows("t5", 2))
    tokens = (batch["labels"] != -100).sum()
    losses = {}
    for released in (False, True):
        trainer = trainer_of(model, "t5", tmp_path, replay=replays(), kl_per_micro_batch=released)
        trainer.current_gradient_accumulation_steps = 4
        model.train()
        losses[released] = trainer.compute_loss(model, batch, num_items_in_batch=tokens)
        kl = trainer._kl_since_log[0][0]
    difference = losses[True] - losses[False]
    torch.testing.assert_close(difference, 0.5 * kl * 3 / 4, rtol=1e-4, atol=1e-6)


def test_replay_draws_every_row_of_each_task_and_repeats_itself(
    tmp_path: Path, monkeypatch: Any
) -> None:
    model = patched("t5")
    replay = replays(count=6)
    drawn: list[tuple[int, list[list[int]]]] = []
    own = model.sapt.reflection_loss

    def watched(*, target, input_ids, attention_mask):
        rows = zip(input_ids, attention_mask, strict=True)
        drawn.append((len(target), [row[: int(m.sum())].tolist() for row, m in rows]))
        return own(input_ids, target, attention_mask)

    monkeypatch.setattr(model.sapt, "reflection_loss", watched)
    trainer = trainer_of(
        model, "t5", tmp_path, data=16, replay=replay, replay_batch_size=2,
        options={"max_steps": 3, "per_device_train_batch_size": 4},
    )  # fmt: skip
    trainer.train()
    # One pseudo-batch of each earlier task in every step; three steps see all six rows.
    assert [length for length, _ in drawn] == [1, 2] * 3
    for length, entry in zip((1, 2), replay, strict=True):
        seen = [row for k, batch in drawn if k == length for row in batch]
        assert sorted(seen) == sorted(entry.inputs)
    before, drawn[:] = list(drawn), []
    trainer = trainer_of(
        model, "t5", tmp_path, data=16, replay=replay, replay_batch_size=2,
        options={"max_steps": 3, "per_device_train_batch_size": 4},
    )  # fmt: skip
    trainer.train()
    assert drawn == before


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_what_trains_and_nothing_else(kind: str, tmp_path: Path) -> None:
    model = patched(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"weight_decay": 0.5, "max_steps": 3}
    trainer_of(model, kind, tmp_path, replay=replays(), options=options).train()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    expected = {n for n in before if n.endswith(("a.trainable", "b.trainable"))}
    expected |= {f"sapt.router.{n}" for n in ("down.weight", "up.weight", "keys.trainable")}
    expected |= {f"sapt.router.norm.{n}" for n in ("weight", "bias")}
    assert changed == expected


def test_learning_rates_reach_their_parameters(tmp_path: Path) -> None:
    model = patched("t5")
    trainer = trainer_of(model, "t5", tmp_path, key_learning_rate=0.5, query_learning_rate=0.25)
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        rates.update({id(p): group["lr"] for p in group["params"]})
    router = model.sapt.router
    assert rates.pop(id(router.keys.trainable)) == 0.5
    for parameter in (router.down.weight, router.up.weight, router.norm.weight, router.norm.bias):
        assert rates.pop(id(parameter)) == 0.25
    assert set(rates.values()) == {1e-2}
    assert len(rates) == 2 * len(model.sapt.pools)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_with_generate(kind: str, tmp_path: Path) -> None:
    model = patched(kind)
    options = {"predict_with_generate": True, "generation_max_length": 14}
    trainer = trainer_of(model, kind, tmp_path, replay=replays(), options=options)
    result = trainer.predict(rows(kind, 4))
    assert result.predictions.shape[0] == 4
    assert result.metrics["test_loss"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_a_checkpoint_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    options = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 5, "weight_decay": 0.1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    model = patched(kind, dropout=0.1)
    kwargs: dict[str, Any] = {"data": 14, "replay": replays(), "options": options}
    trainer_of(model, kind, tmp_path, **kwargs).train()
    names = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert "sapt_state.safetensors" in names
    assert "model.safetensors" not in names
    again = patched(kind, dropout=0.1)
    torch.manual_seed(77)
    addresses = {n: p.data_ptr() for n, p in again.named_parameters()}
    trainer_of(again, kind, tmp_path, **kwargs).train(str(tmp_path / "checkpoint-5"))
    assert {n: p.data_ptr() for n, p in again.named_parameters()} == addresses
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_save_model_writes_what_load_pretrained_reads(tmp_path: Path) -> None:
    model = patched("t5")
    trainer_of(model, "t5", tmp_path, replay=replays()).save_model(str(tmp_path / "saved"))
    loaded = sapt_fast.load_pretrained(make_model("t5"), tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_best_checkpoint_is_loaded_in_place(tmp_path: Path) -> None:
    model = patched("t5")
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "greater_is_better": False, "learning_rate": 1.0,
    }  # fmt: skip
    trainer = trainer_of(model, "t5", tmp_path, replay=replays(), options=options)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_bad_input_is_named(tmp_path: Path) -> None:
    model = make_model("t5")
    with pytest.raises(ValueError, match=r"model: got .* expected a patched model with a task"):
        trainer_of(model, "t5", tmp_path)
    model = patched("t5", tasks=2)
    with pytest.raises(ValueError, match="no inputs of task 'old'"):
        trainer_of(model, "t5", tmp_path, replay=[Replay("old", [], torch.ones(1))])
    with pytest.raises(ValueError, match=r"target of shape \(3,\) for task 'old'"):
        trainer_of(model, "t5", tmp_path, replay=[Replay("old", [[3]], torch.ones(3) / 3)])
    with pytest.raises(ValueError, match="replay_batch_size: got 0"):
        trainer_of(model, "t5", tmp_path, replay_batch_size=0)
    trainer = trainer_of(model, "t5", tmp_path)
    with pytest.raises(ValueError, match=r"no sapt_state\.safetensors"):
        trainer.train(str(tmp_path))
    trainer._save(str(tmp_path))
    model.sapt.add_task("third")
    with pytest.raises(ValueError, match=r"got tasks \['task0', 'task1'\]"):
        trainer_of(model, "t5", tmp_path)._load_from_checkpoint(str(tmp_path))


def test_a_row_costs_the_same_beside_a_longer_one() -> None:
    """Learned absolute positions must not move with the padding of the batch."""
    model = sapt_fast.patch(tiny_models.tiny("gpt2"), SaptConfig(r=2))
    model.sapt.add_task("a")
    short, long = ([{"input_ids": [5] * n, "labels": [-100] * 2 + [5] * (n - 2)}] for n in (4, 9))
    logits = []
    for batch in (Collator(0)(short), Collator(0)(short + long)):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits.append(model(input_ids=ids, attention_mask=mask, labels=batch["labels"]).logits[0])
    torch.testing.assert_close(logits[1][:4], logits[0])
