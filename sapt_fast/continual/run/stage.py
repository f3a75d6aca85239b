"""Trains one stage of a continual run with the Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerState,
)

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.run import processes
from sapt_fast.continual.run.evaluate import diverged
from sapt_fast.continual.run.state import TRAINER_STATE, last_checkpoint
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import Strategy
from sapt_fast.continual.trainer import SaptTrainer, model_given_back
from sapt_fast.continual.workbench import Workbench

__all__ = ["steps_of", "train_stage"]


def train_stage(
    bench: Workbench,
    strategy: Strategy,
    task: TaskData,
    learned: Sequence[TaskData],
    folder: Path,
    seed: int,
    steps: int,
) -> None:
    """Trains the parameters that `strategy.begin_task` left trainable; resumes from a checkpoint.

    Args:
        bench: the run's model, tokenizer and settings.
        strategy: gives the loss, the reflection targets and the weights of the adapters.
        task: the rows to train on.
        learned: the tasks before.
        folder: the folder of the Trainer's checkpoints.
        seed: the seed of the order of rows and of dropout.
        steps: optimizer steps; -1 trains for `settings.epochs`.

    Raises:
        ValueError: if a loss or a weight is NaN or infinite.
    """
    model, settings = bench.model, bench.settings
    rows = bench.encode_task(task)
    with model_given_back(model):
        trainer = SaptTrainer(
            model,
            _arguments(settings, folder, seed, steps, bench.device),
            train_dataset=rows,
            eval_dataset=bench.encode(task.dev),
            data_collator=bench.collator,
            replay=strategy.reflection(learned),
            replay_batch_size=settings.replay_batch_size,
            key_learning_rate=settings.key_learning_rate,
            query_learning_rate=settings.query_learning_rate,
            kl_per_micro_batch=settings.kl_per_micro_batch,
            mixture=strategy.mixture,
            objective=strategy.objective,
            space=bench.space_of(task),
            load_replay=bench.routing_inputs if bench.has_images else None,
            pad_token_id=getattr(bench.tokenizer, "pad_token_id", None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_AfterStep(strategy))
        if hasattr(rows, "set_epoch"):
            trainer.add_callback(_Epochs(rows))
        with processes.first_goes_first():  # it deletes incomplete checkpoints
            checkpoint = last_checkpoint(folder)
        try:
            if settings.gradient_checkpointing:
                _recompute_activations(model, True)
            if checkpoint is None or not _finished(trainer, checkpoint):
                trainer.train(None if checkpoint is None else str(checkpoint))
            if any(processes.gathered([trainer.diverged])):
                raise diverged("a loss")
        finally:
            if settings.gradient_checkpointing:
                _recompute_activations(model, False)


class _AfterStep(TrainerCallback):
    """Calls `Strategy.after_step`, before the Trainer evaluates or saves."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.strategy.after_step()


def steps_of(settings: ContinualSettings, rows: int, steps: int) -> int:
    """Returns the optimizer steps of a stage, as the Trainer counts them.

    Args:
        settings: the run's settings.
        rows: the number of training rows.
        steps: as in `train_stage`.
    """
    if steps > 0:
        return steps
    batches = math.ceil(rows / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))


class _Epochs(TrainerCallback):
    """Sets the epoch of a data set. accelerate 1.15 does not in several processes."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.set_epoch(int(state.epoch))


def _arguments(
    settings: ContinualSettings, folder: Path, seed: int, steps: int, device: torch.device
) -> Seq2SeqTrainingArguments:
    save = settings.save_steps
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size // processes.count(),
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=save if save < 1 else int(save),
        save_total_limit=1,
        eval_strategy="steps" if settings.load_best else "no",
        eval_steps=(save if save < 1 else int(save)) if settings.load_best else None,
        load_best_model_at_end=settings.load_best,
        metric_for_best_model="loss" if settings.load_best else None,
        greater_is_better=False if settings.load_best else None,
        prediction_loss_only=True,
        logging_steps=0.1,
        report_to=[],
        disable_tqdm=not settings.progress,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
    )
    # One GPU: on several the Trainer would use DataParallel, which routing does not support.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _recompute_activations(model: Any, enable: bool) -> None:
    # transformers 5.23 renamed gradient to activation checkpointing.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()
        model.disable_input_require_grads()


def _finished(trainer: SaptTrainer, checkpoint: Path) -> bool:
    """Loads the weights of a training that was already finished; False if it was not."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    if state.global_step < state.max_steps:
        return False
    best = state.best_model_checkpoint
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else str(checkpoint))
    return True
