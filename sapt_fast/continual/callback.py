"""Adds the reflection loss, and what to log of it, to other people's Trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from sapt_fast.continual.reflection import Reflection, Replay
from sapt_fast.continual.trainer import SaptTrainer
from sapt_fast.methods.tasks import learner_of

__all__ = ["SaptCallback"]


class SaptCallback(TrainerCallback):
    """Trains the reflection loss in any transformers Trainer (also TRL's), and logs the routing.

    Before the micro-batches of an optimizer step, the gradient of

        kl_ratio * (sum over earlier tasks of KL)

    is added to those of the Trainer's own loss, one batch of each earlier task for a step. So it
    does not depend on the Trainer's loss or on gradient accumulation, and takes part in gradient
    clipping. The logged `loss` does not contain it.

    What `Reflection.logs` returns is added to every log of the training loss, before TensorBoard,
    wandb, trackio and the progress bar get it.

    Args:
        trainer: the Trainer of a patched model. Then call `trainer.add_callback(callback)`.
        replay: one entry per earlier task; empty for logs of the attention alone. Of a
            `SaptTrainer`, which adds the loss itself, its own entries are logged.
        batch_size: inputs of each earlier task per step; None for the training batch size.
        kl_ratio: the loss's factor; None for that of the model's config. With 0 the KL is only
            logged.
        pad_token_id: pads replayed inputs; None for the tokenizer's, else the model's.
        load_replay: as in `Reflection`.

    Raises:
        ValueError: if the model is not patched, or a replay entry does not fit it.
        ValueError: if `replay` is given for a `SaptTrainer`.
        ValueError: if the loss is to train with float16 gradient scaling or DeepSpeed, on several
            processes, or together with `own_key_loss`: use `SaptTrainer`.

    Example:
        >>> import sapt_fast, tempfile, transformers
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone())
        >>> rows = [{"input_ids": [4, 5, 6], "labels": [5, 1]}] * 8
        >>> model.sapt.add_task("old")
        >>> replay = [sapt_fast.Replay.from_dataset(model, "old", rows)]
        >>> model.sapt.add_task("new")
        >>> args = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=1, logging_steps=1, report_to="none",
        ...     save_strategy="no", disable_tqdm=True)
        >>> trainer = transformers.Trainer(model, args, train_dataset=rows)
        >>> trainer.add_callback(sapt_fast.SaptCallback(trainer, replay))
        >>> _ = trainer.train()
        {...'attention/new/new': ...}
        >>> "kl/old" in trainer.state.log_history[0]
        True
    """

    def __init__(
        self,
        trainer: Any,
        replay: Sequence[Replay] = (),
        *,
        batch_size: int | None = None,
        kl_ratio: float | None = None,
        pad_token_id: int | None = None,
        load_replay: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None,
    ) -> None:
        args, tokenizer = trainer.args, trainer.processing_class
        own = isinstance(trainer, SaptTrainer)
        if own and replay:
            raise ValueError("replay: SaptTrainer adds the loss of its own replay; pass none here")
        config = learner_of(trainer.model).config
        if kl_ratio is None:
            kl_ratio = getattr(config, "kl_ratio", 0.0)
        self.kl_ratio = 0.0 if own or not replay else float(kl_ratio)
        if self.kl_ratio:
            _require_one_backward(args, config)
        if pad_token_id is None:
            pad_token_id = getattr(tokenizer, "pad_token_id", None)
        self.trainer = trainer
        self.own = own
        self.reflection = Reflection(
            trainer.model,
            trainer.replay if own else replay,
            batch_size=args.per_device_train_batch_size if batch_size is None else batch_size,
            pad_token_id=pad_token_id,
            seed=args.seed,
            load_replay=trainer.load_replay if own else load_replay,
            device=args.device,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the callback before those that report logs."""
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient of the reflection loss to the gradients of the coming step."""
        if self.own or not self.reflection.replay:
            return
        with torch.set_grad_enabled(self.kl_ratio != 0):
            loss = self.reflection.loss(state.global_step)
        if self.kl_ratio:
            (self.kl_ratio * loss).backward()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Adds the routing to a log of the training loss, and to the Trainer's history."""
        if not logs or "loss" not in logs:
            return
        extra = self.reflection.logs()
        logs.update(extra)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(extra)


def _require_one_backward(args: Any, config: Any) -> None:
    """Raises ValueError if a backward of its own would give other gradients."""
    if args.fp16 or args.deepspeed:
        raise ValueError(
            "fp16, deepspeed: the gradients are scaled, so SaptCallback cannot add those of the "
            "reflection loss; use SaptTrainer, or kl_ratio=0 to log alone"
        )
    if args.world_size > 1:
        raise ValueError(
            f"replay: got {args.world_size} processes, expected one: SaptCallback runs a backward "
            "of its own; use SaptTrainer, or kl_ratio=0 to log alone"
        )
    if getattr(config, "own_key_loss", 0):
        raise ValueError(
            f"own_key_loss: got {config.own_key_loss}, expected 0: only SaptTrainer adds it"
        )
