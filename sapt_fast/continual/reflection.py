"""The reflection loss on inputs of earlier tasks, for any training loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapt_fast.checks import require_count
from sapt_fast.continual.data.collate import pad_rows
from sapt_fast.methods.sapt_router import tokens_of_prompt
from sapt_fast.methods.tasks import learner_of

__all__ = ["Reflection", "Replay", "RowStream"]


@dataclass(frozen=True)
class Replay:
    """Inputs of an earlier task and their target attention, for the reflection loss.

    Attributes:
        task: the task's name.
        inputs: token ids of each input, without its answer, or what `load_replay` of `SaptTrainer`
            takes; at least one input.
        target: [K'], mean attention over the task's inputs when it had been learned, in learning
            order.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone())
        >>> model.sapt.add_task("first")
        >>> rows = [{"input_ids": [4, 5, 6]}, {"input_ids": [9, 8]}]
        >>> sapt_fast.Replay.from_dataset(model, "first", rows)
        Replay(task='first', inputs=[[4, 5, 6], [9, 8]], target=tensor([1.]))
    """

    task: str
    inputs: Sequence[Any]
    target: Tensor

    @classmethod
    def from_dataset(
        cls,
        model: Any,
        task: str,
        dataset: Iterable[Mapping[str, Any]],
        *,
        held_out: Iterable[Mapping[str, Any]] | None = None,
        share: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        pad_token_id: int | None = None,
    ) -> Replay:
        """Records how a task's inputs are routed; call it when the task has been learned.

        For the newest task, the target is computed and also stored in `model.sapt.targets`, which
        is saved with the adapters. For an earlier task, the stored target is used.

        Args:
            model: a patched model with a router, such as SAPT's.
            task: the task's name.
            dataset: rows with `input_ids` and, optional, `attention_mask`. For a decoder-only model
                also `labels`, which are -100 on the prompt, or TRL's `completion_mask`: only the
                prompt's tokens are kept, as the model routes by them in training.
            held_out: rows to compute the target from; None for those of `dataset`.
            share: the fraction of the inputs to keep, at least one; drawn by the seed. The
                published recipe keeps 0.02.
            seed: see `share`.
            batch_size: inputs that are routed together.
            pad_token_id: pads the inputs; None for that of the model's config, else 0.

        Raises:
            ValueError: if there is no row, or a row has no `input_ids` or is packed.
            ValueError: if the model has no such task, or it is an earlier one without a target.
            ValueError: if share is not in (0, 1], or batch_size is less than 1.
        """
        handle = _router_of(model)
        if task not in handle.tasks:
            raise ValueError(f"task: got {task!r}, expected one of {handle.tasks}")
        newest = task == handle.tasks[-1]
        if not newest and task not in handle.targets:
            raise ValueError(
                f"task: {task!r} has no target in model.{handle.attribute}.targets, and it is not "
                f"the newest task ({handle.tasks[-1]!r}): call from_dataset before add_task"
            )
        if not 0 < share <= 1:
            raise ValueError(f"share: got {share}, expected a fraction, above 0 and at most 1")
        require_count("batch_size", batch_size)
        inputs = _inputs_of(model, dataset, "dataset")
        if newest:
            routed = inputs if held_out is None else _inputs_of(model, held_out, "held_out")
            padding = _padding(model, pad_token_id)
            handle.targets[task] = _mean_weights(handle, routed, padding, batch_size)
        count = max(1, round(share * len(inputs)))
        if count < len(inputs):
            chosen = sorted(random.Random(f"{seed}/{task}").sample(range(len(inputs)), count))
            inputs = [inputs[row] for row in chosen]
        return cls(task, inputs, handle.targets[task].detach().clone())


class Reflection:
    """The reflection loss of a training loop, and what to log of it.

        loss(step) = sum over earlier tasks of KL(target || prediction), on their next inputs

    Every call draws one batch of each earlier task. The draw depends only on seed and step, so a
    resumed run draws the same inputs.

    Args:
        model: a patched model with a router and at least one task.
        replay: one entry per earlier task.
        batch_size: inputs of each earlier task in a batch, limited to the task's inputs.
        pad_token_id: pads the inputs; None for that of the model's config, else 0.
        seed: the seed of the draws.
        load_replay: makes the keyword arguments of `reflection_loss` from replayed inputs; None for
            token ids, which are padded.
        device: where the inputs go; None for the model's device.

    Raises:
        ValueError: if the model is not patched, or cannot compute the loss.
        ValueError: if a replay entry has no inputs, or a target of another length.
        ValueError: if batch_size is less than 1.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone())
        >>> model.sapt.add_task("old")
        >>> old = sapt_fast.Replay.from_dataset(model, "old", [{"input_ids": [4, 5, 6]}])
        >>> model.sapt.add_task("new")
        >>> reflection = sapt_fast.Reflection(model, [old], batch_size=8)
        >>> ids = torch.tensor([[9, 8, 7]])
        >>> loss = model(ids, labels=ids).loss + 0.5 * reflection.loss(step=0)
        >>> loss.backward()
        >>> reflection.logs().keys() >= {"kl", "kl/old", "attention/old/new"}
        True
    """

    def __init__(
        self,
        model: Any,
        replay: Sequence[Replay],
        *,
        batch_size: int,
        pad_token_id: int | None = None,
        seed: int = 0,
        load_replay: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.handle: Any = _router_of(model) if replay else learner_of(model)
        require_count("batch_size", batch_size)
        for entry in replay:
            _check_entry(entry, len(self.handle.tasks))
        self.replay = list(replay)
        self.batch_size = batch_size
        self.load_replay = load_replay
        self._padding = _padding(model, pad_token_id)
        self._device = device if device is not None else next(model.parameters()).device
        self._streams = [RowStream(len(entry.inputs), f"{seed}/{entry.task}") for entry in replay]
        self._sums: dict[str, Tensor] = {}
        self._calls = 0

    def loss(self, step: int, *, rank: int = 0, world: int = 1) -> Tensor:
        """Returns the sum over earlier tasks of the divergence on their next inputs, a scalar.

        Args:
            step: the number of the optimizer step, or of the micro-batch counted over all steps.
            rank, world: this process's index and the number of processes. Each takes its share of
                a batch; the mean over the processes is the loss of the whole batch.
        """
        total = torch.zeros((), device=self._device)
        for entry, stream in zip(self.replay, self._streams, strict=True):
            rows = stream.batch(step, min(self.batch_size, len(entry.inputs)))
            mine = rows[rank::world]
            share = len(mine) * world / len(rows)  # so that processes average to the inputs' mean
            # All processes of a sharded model gather the router, also one without inputs.
            mine = mine or rows[:1]
            inputs = self._loaded([entry.inputs[row] for row in mine])
            kl = self.handle.reflection_loss(target=entry.target, **inputs) * share
            self._sums[entry.task] = self._sums.get(entry.task, 0) + kl.detach()
            total = total + kl
        self._calls += 1
        return total

    def logs(self) -> dict[str, float]:
        """Returns numbers to log, by name; waits for the device.

        - `kl`, `kl/<task>`: the divergence, averaged over the calls of `loss` since the last call.
        - `attention/<task>/<adapter>`: the mean weight of each task's adapter for some replayed
          inputs of each earlier task, always the same, and for the inputs of the last forward,
          which belong to the newest task. Of a PEFT pool: `attention/inputs/<adapter>`.
        """
        found = {}
        if self._sums:
            each = {f"kl/{task}": float(kl) / self._calls for task, kl in self._sums.items()}
            found = {"kl": sum(each.values()), **each}
        self._sums, self._calls = {}, 0
        tasks, latest = self.handle.tasks, self.handle.attention
        with torch.no_grad():
            rows = {
                entry.task: self.handle.route(**self._loaded(entry.inputs[: self.batch_size])).mean(
                    0
                )
                for entry in self.replay
            }
        if latest is not None and latest.is_floating_point() and latest.shape[-1] == len(tasks):
            own = tasks[-1] if hasattr(self.handle, "reflection_loss") else "inputs"
            rows[own] = latest.flatten(0, -2).float().mean(0)
        for task, weights in rows.items():
            for adapter, weight in zip(tasks, weights.tolist(), strict=True):
                found[f"attention/{task}/{adapter}"] = weight
        return found

    def _loaded(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        if self.load_replay is not None:
            return {name: t.to(self._device) for name, t in self.load_replay(inputs).items()}
        ids, mask = pad_rows(inputs, self._padding)
        return {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}


class RowStream:
    """An endless stream of row numbers in seeded permutations.

    Args:
        rows: the number of rows.
        seed: the seed of the permutations.
    """

    def __init__(self, rows: int, seed: str) -> None:
        self.rows = rows
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, number: int, size: int) -> list[int]:
        """Returns the elements `number * size` to `(number + 1) * size` of the stream."""
        positions = range(number * size, (number + 1) * size)
        return [self._permutation(p // self.rows)[p % self.rows] for p in positions]

    def _permutation(self, number: int) -> list[int]:
        if self._order[0] != number:
            order = list(range(self.rows))
            random.Random(f"{self.seed}/{number}").shuffle(order)
            self._order = (number, order)
        return self._order[1]


def _router_of(model: Any) -> Any:
    """Returns the handle whose router the reflection loss trains.

    Raises:
        ValueError: if the model is not patched, or its method has no such router.
    """
    handle = learner_of(model)
    if not hasattr(handle, "reflection_loss"):
        raise ValueError(f"model: {handle.method} has no router to reflect, expected one like SAPT")
    return handle


def _check_entry(entry: Replay, tasks: int) -> None:
    if not len(entry.inputs):
        raise ValueError(f"replay: got no inputs of task {entry.task!r}, expected at least one")
    if entry.target.dim() != 1 or not 1 <= len(entry.target) <= tasks:
        raise ValueError(
            f"replay: got a target of shape {tuple(entry.target.shape)} for task {entry.task!r}, "
            f"expected [k] with 1 <= k <= {tasks}, the number of tasks"
        )


def _padding(model: Any, given: int | None) -> int:
    known = (given, getattr(model.config, "pad_token_id", None))
    return next((i for i in known if i is not None), 0)


def _inputs_of(model: Any, dataset: Iterable[Mapping[str, Any]], name: str) -> list[list[int]]:
    """Returns the token ids of each row without padding and without its answer."""
    found = []
    for row in dataset:
        if "input_ids" not in row:
            raise ValueError(
                f"{name}: got a row with {sorted(row)}, expected input_ids (and labels, for a "
                "decoder-only model): tokenize the rows first"
            )
        if packed := sorted({"position_ids", "seq_lengths"} & row.keys()):
            raise ValueError(
                f"{name}: got rows with {packed[0]}, which hold several texts; expected one text a "
                "row, such as the rows before packing"
            )
        ids = torch.as_tensor(row["input_ids"])[None]
        mask, labels = row.get("attention_mask"), row.get("labels")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)[None]
        if labels is not None:
            labels = torch.as_tensor(labels)[None]
        elif "completion_mask" in row:
            labels = ids.where(torch.as_tensor(row["completion_mask"])[None] != 0, -100)
        chosen = tokens_of_prompt(model, mask, labels)
        kept = mask != 0 if chosen is None else (mask != 0) & chosen
        found.append(ids[kept].tolist())
    if not found:
        raise ValueError(f"{name}: got no rows, expected at least one")
    return found


@torch.no_grad()
def _mean_weights(
    handle: Any, inputs: Sequence[Sequence[int]], padding: int, batch_size: int
) -> Tensor:
    """Returns the router's mean weights [K] of inputs, on the CPU."""
    total = torch.zeros(len(handle.tasks))
    for start in range(0, len(inputs), batch_size):
        ids, mask = pad_rows(inputs[start : start + batch_size], padding)
        device = handle._device
        weights = handle.route(input_ids=ids.to(device), attention_mask=mask.to(device))
        total += weights.expand(len(ids), -1).sum(0).float().cpu()
    return total / len(inputs)
