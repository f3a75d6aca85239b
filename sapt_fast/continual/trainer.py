"""A transformers Trainer with SAPT's losses, for models that generate and for encoders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer

from sapt_fast.continual.data.kinds import model_kind
from sapt_fast.continual.objective import Space, Step, forward, routed_inputs, token_loss
from sapt_fast.continual.reflection import Reflection, Replay, RowStream
from sapt_fast.files.directories import atomic_write_bytes
from sapt_fast.files.reading import parse_json
from sapt_fast.methods.base import handles
from sapt_fast.methods.tasks import TaskHandle, learner_of
from sapt_fast.pools.sharding import is_sharded, whole
from sapt_fast.storage.pretrained_files import own_names
from sapt_fast.storage.tensors import read_tensors, require_finite, tensor_bytes

__all__ = ["Replay", "RowStream", "SaptTrainer", "model_given_back"]

STATE_NAME = "sapt_state.safetensors"


class SaptTrainer(Seq2SeqTrainer):
    """Trains the newest adapter, its key and the query projection of a patched model.

    The loss of an optimizer step (SAPT, ACL 2024) is

        (sum of the token losses) / tokens + kl_ratio * (sum over earlier tasks of KL)
            + own_key_loss * mean(-log(weight of the task's own adapter))

    with `kl_ratio` and `own_key_loss` of the model's SaptConfig. It does not depend on how the step
    is divided into micro-batches and processes. Every micro-batch draws one pseudo-batch of each
    earlier task. The draw depends only on the seed and the step, so a resumed run draws the same
    inputs.

    Checkpoints contain the adapters and the router, not the frozen base model. To use the model
    after training, save it with `model.sapt.save_pretrained`, as `save_model` does.

    Args:
        model: a patched model with at least one task.
        args: Seq2SeqTrainingArguments; `remove_unused_columns=False` for custom data sets.
        replay: one entry per earlier task; empty for no reflection loss.
        replay_batch_size: number of inputs of each earlier task per micro-batch, over all
            processes, limited to the task's inputs. None for the training batch size.
        pad_token_id: pads replayed inputs; defaults to the tokenizer's, else the model's.
        key_learning_rate: learning rate of the newest key; defaults to `args.learning_rate`.
        query_learning_rate: learning rate of the query projection; defaults to
            `args.learning_rate`.
        kl_per_micro_batch: whether to add the whole reflection loss in every micro-batch, as the
            original SAPT code does, instead of its fraction.
        mixture: called with the input ids and the mask of a batch, [B, T], or with images
            [B, C, H, W] and None; returns the weights [B, K] or [1, K] that replace the router's,
            or None. None for the router's.
        objective: called with a `Step` in training; returns the loss that replaces the token loss.
            None for the token loss.
        space: the labels of an encoder's tasks, or the classes of images; None for models that
            generate.
        load_replay: makes the keyword arguments of `reflection_loss` from replayed inputs; None for
            token ids, which are padded.
        **kwargs: further arguments of Seq2SeqTrainer.

    Raises:
        ValueError: if the model is not patched, or has no task.
        ValueError: if an encoder has no `space`, or another model has one.
        ValueError: if a replay entry has no inputs, or a target of another length.
        ValueError: if replay_batch_size is less than 1, or kwargs has compute_loss_func.

    Example:
        >>> import sapt_fast, tempfile, torch, transformers
        >>> from sapt_fast.continual.trainer import Replay
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone())
        >>> model.sapt.add_task("old")
        >>> model.sapt.add_task("new")
        >>> args = transformers.Seq2SeqTrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, save_strategy="no", report_to="none")
        >>> trainer = sapt_fast.SaptTrainer(
        ...     model, args, train_dataset=[{"input_ids": [4, 5, 6], "labels": [5, 1]}] * 8,
        ...     replay=[Replay("old", inputs=[[9, 8, 7]], target=torch.tensor([1.0]))])
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2
    """

    model: Any
    args: Any
    mixture: Callable[[Tensor, Tensor | None], Tensor | None] | None
    objective: Callable[[Step], Tensor] | None

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        replay: Sequence[Replay] = (),
        replay_batch_size: int | None = None,
        pad_token_id: int | None = None,
        key_learning_rate: float | None = None,
        query_learning_rate: float | None = None,
        kl_per_micro_batch: bool = False,
        mixture: Callable[[Tensor, Tensor | None], Tensor | None] | None = None,
        objective: Callable[[Step], Tensor] | None = None,
        space: Space | None = None,
        load_replay: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        sapt = learner_of(model) if handles(model) else None
        if sapt is None or not sapt.tasks:
            raise ValueError(
                f"model: got a {type(model).__name__} without a task, expected a patched model "
                "with a task; call sapt_fast.patch(model) and model.sapt.add_task(name) first"
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func: not supported, because SaptTrainer has its own loss; pass "
                "objective"
            )
        if replay_batch_size is not None and replay_batch_size < 1:
            raise ValueError(
                f"replay_batch_size: got {replay_batch_size}, expected at least 1 or None"
            )
        kind = model_kind(model)
        if (space is not None) != (kind == "encoder"):
            raise ValueError(
                f"space: got {'none' if space is None else 'one'} for {type(model).__name__}, "
                "expected a label space for an encoder, and None for a model that generates"
            )
        super().__init__(model=model, args=args, **kwargs)
        self.sapt: Any = sapt
        self._causal = kind == "causal"
        self.space = space
        # The token loss is divided by the tokens of the whole step, unlike the model's own loss.
        self.model_accepts_loss_kwargs = True
        self.replay = list(replay)
        self.key_learning_rate = key_learning_rate
        self.query_learning_rate = query_learning_rate
        self.kl_per_micro_batch = kl_per_micro_batch
        self.mixture = mixture
        self.objective = objective
        self.load_replay = load_replay
        if pad_token_id is None:
            pad_token_id = getattr(self.processing_class, "pad_token_id", None)
        self._reflection = Reflection(
            model,
            replay,
            batch_size=replay_batch_size
            or self.args.per_device_train_batch_size * self.args.world_size,
            pad_token_id=pad_token_id,
            seed=self.args.seed,
            load_replay=load_replay,
            device=self.args.device,
        )
        self._micro_batch = (-1, 0)
        # The KL of each micro-batch and its fraction of a step.
        self._kl_since_log: list[tuple[Tensor, float]] = []
        self._finite = torch.ones((), dtype=torch.bool)

    # --- the loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the loss in the class's docstring; in evaluation, only the token loss.

        Args:
            model: the model, possibly wrapped.
            inputs: `input_ids` and `attention_mask` [B, T], or `pixel_values` [B, C, H, W]; and
                `labels` [B, T'].
            return_outputs: whether to return the model's outputs too.
            num_items_in_batch: the number of tokens of the optimizer step.

        Returns:
            The loss, a scalar; or (loss, outputs).
        """
        outputs = self._forward(model, inputs)
        loss = self._token_loss(outputs.logits, inputs["labels"], num_items_in_batch)
        if model.training:
            # Without num_items_in_batch the Trainer divides the whole loss itself.
            normalized = num_items_in_batch is not None
            steps = self.current_gradient_accumulation_steps if normalized else 1
            own_key = self._own_key_loss()
            number = self._next_micro_batch()
            if self.objective is not None:
                loss = self.objective(Step(number, inputs, outputs.logits, loss * steps)) / steps
            loss = loss + own_key / steps
            if self.replay:
                kl = self._reflection_loss(number)
                share = 1 / self.current_gradient_accumulation_steps
                self._kl_since_log.append((kl.detach(), share))
                scale = 1 if self.kl_per_micro_batch else steps
                loss = loss + self.sapt.config.kl_ratio * kl / scale
            self._finite = self._finite.to(loss.device) & loss.detach().isfinite()
        return (loss, outputs) if return_outputs else loss

    @property
    def diverged(self) -> bool:
        """Whether a loss of this process's training was NaN or infinite. Waits for the device."""
        return not bool(self._finite)

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        base = self.accelerator.unwrap_model(model)
        weights = None
        if self.mixture is not None:
            weights = self.mixture(*routed_inputs(inputs, self._causal))
        return forward(model, inputs, weights, base=base, space=self.space)

    def _token_loss(
        self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        smoothing = self.args.label_smoothing_factor
        total, tokens = token_loss(logits, labels, self._causal, smoothing)
        if num_items_in_batch is None:
            return total / tokens.clamp(min=1)
        # The tokens are counted over all processes, which average their gradients later.
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * scale / num_items_in_batch

    def _own_key_loss(self) -> Tensor | float:
        ratio = getattr(self.sapt.config, "own_key_loss", 0.0)
        weights = self.sapt.routing.weights_of_texts if ratio else None
        if weights is None:
            return 0.0
        own = weights[..., -1].clamp(min=torch.finfo(weights.dtype).tiny)
        return -ratio * own.log().mean()

    def _reflection_loss(self, number: int) -> Tensor:
        """Returns the sum over earlier tasks of KL(target || prediction) on their next inputs."""
        world = self.args.world_size
        return self._reflection.loss(number // world, rank=self.args.process_index, world=world)

    def _next_micro_batch(self) -> int:
        """Returns the number of the running micro-batch, counted over all steps and processes."""
        step, index = self._micro_batch
        index = index + 1 if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, index)
        number = self.state.global_step * self.args.gradient_accumulation_steps + index
        return number * self.args.world_size + self.args.process_index

    # --- what is optimised ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the Trainer's optimizer, with the learning rates of key and projection."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if not isinstance(self.sapt, TaskHandle):
            return optimizer
        router = self.sapt.router
        key = [router.keys.trainable]
        query = [p for p in router.parameters() if p.requires_grad and p is not key[0]]
        _separate(optimizer, key, self.key_learning_rate)
        _separate(optimizer, query, self.query_learning_rate)
        return optimizer

    # --- logs and checkpoints ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `kl` to the logs: the unweighted KL, averaged over the steps since the last log."""
        if "loss" in logs and self.replay and self._kl_since_log:
            steps = sum(share for _, share in self._kl_since_log)
            kl = torch.stack([value * share for value, share in self._kl_since_log]).sum() / steps
            logs["kl"] = self.accelerator.gather(kl).mean().item()
            self._kl_since_log.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Calls `model.sapt.save_pretrained(output_dir)`.

        Every process of a sharded model has to call this.
        """
        if _internal_call and output_dir is not None:  # a checkpoint
            self._save(output_dir)
            return
        self.sapt.save_pretrained(
            output_dir or self.args.output_dir, is_main_process=self.args.should_save
        )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        held = state_dict or self.model.state_dict(keep_vars=is_sharded(self.model))
        trained = (
            self.sapt.trained_tensors()
            if isinstance(self.sapt, TaskHandle)
            else (name for name, p in self.model.named_parameters() if p.requires_grad)
        )
        kept = {*own_names(self.model), *trained}
        tensors = {name: tensor for name, tensor in held.items() if name in kept}
        tensors = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
        folder = Path(output_dir or self.args.output_dir)
        why = "not written: training has diverged, use a smaller learning rate"
        require_finite(f"{folder / STATE_NAME}: {why}", tensors)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        data = tensor_bytes(tensors, {"tasks": json.dumps(self.sapt.tasks)})
        atomic_write_bytes(folder / STATE_NAME, data)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Loads a checkpoint into the existing parameters, which share memory with the pool."""
        path = os.path.join(resume_from_checkpoint, STATE_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{resume_from_checkpoint}: not a checkpoint of SaptTrainer, it has no {STATE_NAME}"
            )
        target = self.model if model is None else model
        held, metadata = read_tensors(Path(path))
        require_finite(path, held)
        # Earlier versions trained the tasks of every strategy at `model.sapt`.
        place = f"{self.sapt.attribute}."
        tensors: dict[str, Any] = {re.sub(r"^sapt\.", place, n): t for n, t in held.items()}
        tasks = parse_json(metadata.get("tasks", "null").encode(), path)
        if tasks != self.sapt.tasks:
            raise ValueError(f"{path}: got tasks {tasks}, expected {self.sapt.tasks}, the model's")
        if is_sharded(target):
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                set_model_state_dict,
            )

            options = StateDictOptions(full_state_dict=True, strict=False)
            keys = set_model_state_dict(target, tensors, options=options)
        else:
            keys = target.load_state_dict(tensors, strict=False)
        missing = sorted(set(keys.missing_keys) & set(own_names(target)))
        if missing or keys.unexpected_keys:
            raise ValueError(
                f"{path}: does not fit the model: missing {missing}, "
                f"unexpected {keys.unexpected_keys}"
            )

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # DeepSpeed has its own checkpoints
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


@contextmanager
def model_given_back(model: Any) -> Iterator[None]:
    """Returns a context that undoes the changes of a Trainer to its model.

    A Trainer disables the cache and, for bf16, wraps `forward` in autocast. accelerate's own
    unwrapping would also remove the decorators of `forward`. It would leave the mark by which the
    next Trainer assumes that the model has its autocast.
    """
    config, own = vars(model.config), vars(model)
    cache = {name: config[name] for name in ("use_cache",) if name in config}
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: own[name] for name in names if name in own}
    try:
        yield
    finally:
        config.pop("use_cache", None)
        config.update(cache)
        for name in names:
            own.pop(name, None)
        own.update(before)


def _separate(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float | None
) -> None:
    """Moves parameters to new groups with the given learning rate, unless it is None."""
    if rate is None:
        return
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in chosen]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": moved, "lr": rate})
