"""The model, tokenizer and settings of a run, with functions that encode examples for them.

Here text and images part: the loop, the trainer and the strategies know no kind of data.
`Workbench` makes batches of rows of text and scores the answers, `ImageBench` those of images.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.continual.data.collate import Collator, encode_rows, pad_rows, prompt_ids
from sapt_fast.continual.data.encoder import (
    LabelSpace,
    encode_label_rows,
    encode_labels,
    label_strings,
    plain_prompts,
)
from sapt_fast.continual.data.kinds import model_kind
from sapt_fast.continual.data.rows import Example, TaskData, read_pseudo_samples
from sapt_fast.continual.objective import Space
from sapt_fast.continual.run.evaluate import Mixture, answers, mean_attention, metric_of
from sapt_fast.continual.scores.metrics import score_predictions
from sapt_fast.continual.settings import IMAGE_SETTINGS, ContinualSettings
from sapt_fast.devices import execution_device
from sapt_fast.methods.task_config import TaskConfig
from sapt_fast.methods.tasks import learner_of

__all__ = ["Workbench"]


class Workbench:
    """The objects that the loop and the strategies share.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        settings: the run's settings.

    Attributes:
        model: the model, patched while tasks are learned.
        tokenizer: its tokenizer.
        settings: the run's settings.
        kind: "seq2seq", "causal", "encoder" or "images".
        causal: whether kind is "causal".
        has_images: whether rows are images.
        writes: whether the model generates text.
        pseudo_samples: the folder of the pseudo-samples that the run generates.
        space: the labels that an encoder predicts; None for the other kinds.

    Raises:
        ValueError: if the tokenizer has no pad token, or a setting is one of images.
    """

    has_images = False

    def __init__(self, model: Any, tokenizer: Any, settings: ContinualSettings) -> None:
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError("tokenizer: got one without a pad token; set tokenizer.pad_token")
        for name, default in IMAGE_SETTINGS.items():
            if getattr(settings, name) != default:
                raise ValueError(
                    f"{name}: got {getattr(settings, name)!r}, expected {default!r} for text"
                )
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.kind: str = model_kind(model)
        self.causal = self.kind == "causal"
        self.writes = self.kind != "encoder"
        self.space: LabelSpace | None = None
        self.pseudo_samples: Path | None = None

    def prepare(self, tasks: Sequence[TaskData]) -> tuple[TaskData, ...]:
        """Converts tasks for the model.

        For an encoder, prompts become plain, and the labels of all tasks are encoded. Call this
        before the model has adapters.

        Raises:
            ValueError: if an encoder has a head.
            ValueError: if a prompt has no tokens.
        """
        prepared = tuple(tasks) if self.kind != "encoder" else self._as_encoder_reads(tasks)
        for task in prepared:
            for split in ("train", "dev", "test"):
                self._require_tokens(
                    getattr(task, split), f"tasks: {task.name!r} has a {split} example"
                )
        return prepared

    def _as_encoder_reads(self, tasks: Sequence[TaskData]) -> tuple[TaskData, ...]:
        if self.model.base_model is not self.model:
            raise ValueError(
                f"model: got {type(self.model).__name__}, expected a model that generates or an "
                "encoder without a head; load it with AutoModel"
            )
        labels = [label for task in tasks for label in label_strings(task)]
        temperature = self.settings.label_temperature
        self.space = encode_labels(self.model, self.tokenizer, labels, temperature)
        return tuple(
            replace(
                task,
                train=self._plain(task.train, task.definition),
                dev=self._plain(task.dev, task.definition),
                test=self._plain(task.test, task.definition),
            )
            for task in tasks
        )

    @property
    def handle(self) -> Any:
        """The handle of the method that the model is patched with."""
        return learner_of(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings."""
        return execution_device(self.model.get_input_embeddings())

    def configure(self, config: TaskConfig[Any]) -> TaskConfig[Any]:
        """Returns the settings of the adapters, with what this kind of data needs."""
        return config

    def inputs(self, rows: Sequence[Example]) -> Sequence[Any]:
        """Returns the token ids of the examples' prompts."""
        prompts = [row.prompt for row in rows]
        return prompt_ids(self.tokenizer, prompts, self.settings.max_source_length, self.causal)

    def encode(self, rows: Sequence[Example]) -> Any:
        """Returns the token ids of training examples.

        Uses `encoder.encode_label_rows` for an encoder, else `collate.encode_rows`.
        """
        if not rows:  # transformers' tokenizers do not support an empty list
            return []
        if self.space is not None:
            limit = self.settings.max_source_length
            return encode_label_rows(self.tokenizer, rows, self.space, limit)
        return encode_rows(
            self.tokenizer,
            rows,
            max_source_length=self.settings.max_source_length,
            max_target_length=self.settings.max_target_length,
            causal=self.causal,
        )

    def encode_task(self, task: TaskData) -> Any:
        """Returns the training rows of a task as `encode` does, for the Trainer."""
        return self.encode(task.train)

    def pad(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Returns ids [B, T] and mask [B, T] of inputs, padded on the right, on the device."""
        ids, mask = pad_rows(inputs, self.tokenizer.pad_token_id)
        return ids.to(self.device), mask.to(self.device)

    def batches(self, rows: Sequence[Example]) -> Iterator[tuple[Tensor, ...]]:
        """Yields what `pad` returns of the examples, `eval_batch_size` at a time."""
        inputs, size = self.inputs(rows), self.settings.eval_batch_size
        return (self.pad(inputs[start : start + size]) for start in range(0, len(inputs), size))

    def routing_inputs(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """Returns the arguments of a router for `inputs`, by name."""
        names = ("input_ids", "attention_mask")
        return dict(zip(names, self.pad(inputs), strict=True))

    @property
    def collator(self) -> Callable[[Any], dict[str, Tensor]]:
        """A function that makes a batch of encoded examples."""
        return Collator(self.tokenizer.pad_token_id)

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Returns the batch of encoded examples, on the device."""
        return {name: tensor.to(self.device) for name, tensor in self.collator(rows).items()}

    def space_of(self, task: TaskData) -> Space | None:
        """Returns what the model chooses among while it trains on a task; None if it writes."""
        return self.space

    # --- scores ---

    def answers(self, rows: Sequence[Example], mixture: Mixture | None = None) -> list[str]:
        """Returns the model's answers to the examples; as `run.evaluate.answers`."""
        return answers(self.model, self.tokenizer, rows, self.settings, mixture, self.space)

    def score(self, rows: Sequence[Example], benchmark: str, mixture: Mixture | None) -> float:
        """Returns the score of the model's answers in percent."""
        expected = [row.outputs for row in rows]
        return score_predictions(
            self.answers(rows, mixture), expected, metric_of(benchmark, self.settings)
        )

    def mean_attention(self, rows: Sequence[Example], mixture: Mixture | None) -> Tensor:
        """Returns the mean weights of the adapters [K]; as `run.evaluate.mean_attention`."""
        return mean_attention(self.model, self.tokenizer, rows, self.settings, mixture)

    def describe(self) -> dict[str, Any]:
        """Returns a JSON-ready description of what runs must share besides model and settings."""
        return {}

    def seeded(self) -> AbstractContextManager[None]:
        """Returns a context in which draws outside of training depend on the seed alone."""
        return nullcontext()

    # --- what a bench itself learns, besides the model ---

    def reset(self) -> None:
        """Makes the model what it was before the run; it is not patched."""

    def end_task(self, task: TaskData, mixture: Mixture | None) -> None:
        """Ends a task, after the strategy has."""

    def state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint contains besides the strategy's state."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned; ignores other names."""

    def require_state(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Raises ValueError if a checkpoint lacks what predictions need.

        Args:
            state: of the checkpoint.
            folder: that of the checkpoint.
        """

    def report(self, tasks: Sequence[TaskData]) -> dict[str, Any]:
        """Returns further entries of results.json, once all tasks are learned."""
        return {}

    def kept(self, task: TaskData) -> Sequence[Example]:
        """Returns the examples that `settings.replay` keeps of an earlier task.

        They are real ones or pseudo-samples.

        Raises:
            OSError, ValueError: if pseudo-samples cannot be read.
            ValueError: if the prompt of a pseudo-sample has no tokens.
        """
        if self.settings.replay == "none":
            return []
        if self.settings.replay != "real":
            root = self.settings.replay
            if root == "generated":
                if self.pseudo_samples is None:
                    raise ValueError(
                        "replay: got 'generated', but the run's folder of pseudo-samples is not set"
                    )
                root = str(self.pseudo_samples)
            definition, rows = read_pseudo_samples(root, task.benchmark, task.name)
            rows = self._plain(rows, definition) if self.kind == "encoder" else rows
            self._require_tokens(rows, f"pseudo-samples: {task.name!r} has an example")
            return self._share_of(task, rows) if self.settings.limit_pseudo_samples else rows
        return self._share_of(task, task.train)

    def _share_of(self, task: TaskData, rows: Sequence[Example]) -> Sequence[Example]:
        """Draws `replay_share` of the task's number of training rows, at least one."""
        count = max(1, int(self.settings.replay_share * len(task.train)))
        draw = random.Random(f"{self.settings.seed}/{task.name}/replay")
        return [rows[i] for i in sorted(draw.sample(range(len(rows)), min(count, len(rows))))]

    def _require_tokens(self, rows: Sequence[Example], what: str) -> None:
        # Only blank texts can have no tokens, so only those are tokenized.
        blank = [row for row in rows if not row.prompt.strip()]
        if blank and not all(self.inputs(blank)):
            raise ValueError(
                f"{what} whose prompt has no tokens, expected at least one; add an input, or use a "
                "tokenizer that adds a start token"
            )

    def _plain(self, rows: Sequence[Example], definition: str) -> tuple[Example, ...]:
        return plain_prompts(rows, definition, self.tokenizer, self.settings.instruction_tokens)
