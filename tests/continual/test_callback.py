"""SaptCallback, Reflection and Replay.from_dataset in Trainers that know nothing of SAPT."""

import copy

import pytest
import torch
from continual.test_trainer import arguments, patched, replays, rows
from tiny_peft import peft_model
from transformers import (
    DefaultDataCollator,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

import sapt_fast
from sapt_fast import Reflection, Replay, SaptCallback
from sapt_fast.continual.data.collate import Collator


class _Reporter(TrainerCallback):
    """Stands for TensorBoard, wandb and trackio, which a Trainer calls before other callbacks."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def plain(model, folder, replay=(), callbacks=(), own=None, **options):
    kind = sapt_fast.SaptTrainer if own is not None else Trainer
    trainer = kind(
        model,
        arguments(folder, **{"per_device_train_batch_size": 4, "max_steps": 4, **options}),
        train_dataset=rows("llama", 16),
        eval_dataset=rows("llama", 4, seed=9),
        data_collator=Collator(0),
        callbacks=[*callbacks],
        **(own or {}),
    )
    if own is None:
        trainer.add_callback(SaptCallback(trainer, replay))
    return trainer


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_plain_trainer_trains_as_saptrainer(tmp_path):
    first, second, reporter = patched("llama"), patched("llama"), _Reporter()
    replay, options = replays(), {"max_grad_norm": 0.5, "max_steps": 2}
    own = plain(first, tmp_path, own={"replay": replay}, **options)
    own.train()
    trainer = plain(second, tmp_path, replay, [reporter], **options)
    trainer.train()
    for name, value in trained(first).items():
        torch.testing.assert_close(trained(second)[name], value, rtol=1e-4, atol=1e-5)
    wanted = {f"attention/task{i}/task{j}" for i in range(3) for j in range(3)}
    wanted |= {"kl", "kl/task0", "kl/task1"}
    for step in range(2):
        logs = trainer.state.log_history[step]
        assert reporter.logs[step].keys() >= wanted
        assert logs.keys() >= wanted
        assert logs["kl"] == pytest.approx(own.state.log_history[step]["kl"], rel=1e-4)
        assert sum(logs[f"attention/task2/task{j}"] for j in range(3)) == pytest.approx(1)
    without = patched("llama")
    plain(without, tmp_path, **options).train()
    key = "sapt.router.keys.trainable"
    assert not torch.allclose(trained(without)[key], trained(first)[key], atol=1e-4)


def test_accumulation_keeps_one_reflection_per_step(tmp_path):
    models = [patched("llama"), patched("llama")]
    for model, steps in zip(models, (1, 2), strict=True):
        options = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        options["max_steps"] = 2
        trainer = plain(model, tmp_path, **options)
        trainer.pop_callback(SaptCallback)
        trainer.add_callback(SaptCallback(trainer, replays(), batch_size=4))
        trainer.train()
    for name, value in trained(models[0]).items():
        torch.testing.assert_close(trained(models[1])[name], value, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_has_equal_losses(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = plain(patched("llama"), tmp_path, replays(), **options)
    whole.train()
    resumed = plain(patched("llama"), tmp_path, replays(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name in ("loss", "kl", "attention/task0/task2"):
        assert resumed.state.log_history[1][name] == whole.state.log_history[1][name]
    for name, value in trained(whole.model).items():
        assert torch.equal(trained(resumed.model)[name], value), name


def test_early_stopping_loads_the_best(tmp_path):
    options = {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "drift",
        "greater_is_better": False, "max_steps": 9,
    }  # fmt: skip
    seen = []

    def compute_metrics(prediction):
        seen.append(trained(model))
        return {"drift": float(len(seen))}

    model = patched("llama")
    trainer = plain(model, tmp_path, replays(), [EarlyStoppingCallback(2)], **options)
    trainer.compute_metrics = compute_metrics
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(torch.equal(trained(model)[name], value) for name, value in seen[0].items())


def test_a_loop_of_ones_own():
    model, replay = patched("llama"), replays()
    reflection = Reflection(model, replay, batch_size=8)
    expected = sum(
        model.sapt.reflection_loss(torch.tensor([row]), entry.target) / 8
        for entry in replay
        for row in entry.inputs
    )
    loss = reflection.loss(step=5)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.sapt.router.keys.trainable.grad.any()
    logs = reflection.logs()
    assert logs["kl"] == pytest.approx(expected.item(), rel=1e-5)
    assert "attention/task2/task0" not in logs  # there was no forward
    mean = sum(model.sapt.route(torch.tensor([row])) for row in replay[0].inputs)[0] / 8
    assert logs["attention/task0/task2"] == pytest.approx(mean[2].item(), rel=1e-4)
    assert "kl" not in reflection.logs()


class TestFromDataset:
    def test_it_is_what_the_lines_by_hand_are(self):
        model, data = patched("llama"), rows("llama", 7)
        prompts = [
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
            for row in data
        ]
        target = sum(model.sapt.route(torch.tensor([ids]))[0] for ids in prompts) / 7
        replay = Replay.from_dataset(model, "task2", data, batch_size=3)
        assert replay.task == "task2"
        assert replay.inputs == prompts
        torch.testing.assert_close(replay.target, target.detach())
        assert torch.equal(model.sapt.targets["task2"], replay.target)
        padded = DefaultDataCollator()([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}])
        assert Replay.from_dataset(
            model, "task2", [{n: t[0] for n, t in padded.items()}]
        ).inputs == [[5, 6]]
        trl = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
        assert Replay.from_dataset(model, "task2", [trl]).inputs == [[5, 6]]

    def test_a_share_and_earlier_tasks(self):
        model, data = patched("t5"), rows("t5", 20)
        replay = Replay.from_dataset(model, "task2", data, share=0.1, held_out=data[:1])
        assert len(replay.inputs) == 2
        assert all({"input_ids": i} in [{"input_ids": r["input_ids"]} for r in data]
                   for i in replay.inputs)  # fmt: skip
        ids = torch.tensor([data[0]["input_ids"]])
        torch.testing.assert_close(replay.target, model.sapt.route(ids)[0].detach())
        with pytest.raises(ValueError, match="'task1' has no target"):
            Replay.from_dataset(model, "task1", data)
        model.sapt.targets["task1"] = torch.tensor([0.5, 0.5])
        assert Replay.from_dataset(model, "task1", data).target.tolist() == [0.5, 0.5]
        for wrong, message in (
            ({"task": "x"}, "task: got 'x'"),
            ({"dataset": []}, "dataset: got no rows"),
            ({"dataset": [{"text": "a"}]}, r"dataset: got a row with \['text'\]"),
            ({"dataset": [{"input_ids": [5], "seq_lengths": [1]}]}, "got rows with seq_lengths"),
            ({"share": 0}, "share: got 0"),
            ({"batch_size": 0}, "batch_size"),
        ):
            before = copy.deepcopy(model.sapt.targets)
            with pytest.raises(ValueError, match=message):
                Replay.from_dataset(**{"model": model, "task": "task2", "dataset": data, **wrong})
            assert model.sapt.targets.keys() == before.keys()


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {"own_key_loss": 0.1}, "own_key_loss"),
        ({"fp16": True}, {}, "fp16"),
    ],
)
def test_what_would_give_other_gradients_is_refused(tmp_path, options, config, message):
    trainer = Trainer(patched("llama", **config), arguments(tmp_path))
    for name, value in options.items():
        object.__setattr__(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        SaptCallback(trainer, replays())
    SaptCallback(trainer, replays(), kl_ratio=0)
    own = plain(patched("llama"), tmp_path, own={"replay": replays()})
    with pytest.raises(ValueError, match="pass none here"):
        SaptCallback(own, replays())
    own.add_callback(SaptCallback(own))
    own.train()
    assert "attention/task0/task2" in own.state.log_history[0]


def test_a_pool_of_peft(tmp_path):
    model = sapt_fast.patch(peft_model("llama"))
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=rows("llama", 8), data_collator=Collator(0)
    )
    trainer.add_callback(SaptCallback(trainer))
    with model.sapt.fixed(torch.tensor([0.5, 0.25, 0.25])):
        trainer.train()
    names, logs = model.sapt.tasks, trainer.state.log_history[0]
    assert [logs[f"attention/inputs/{name}"] for name in names] == [0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match="has no router to reflect"):
        SaptCallback(trainer, replays())
