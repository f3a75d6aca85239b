"""Answers of a patched model to a task's rows, their score, and the mean attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from sapt_fast.continual.data.collate import pad_rows, prompt_ids
from sapt_fast.continual.data.encoder import LabelSpace
from sapt_fast.continual.data.kinds import model_kind
from sapt_fast.continual.data.rows import Example
from sapt_fast.continual.run import processes
from sapt_fast.continual.scores.metrics import BENCHMARK_METRICS, Metric, score_predictions
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.devices import execution_device
from sapt_fast.methods.tasks import pool_of

__all__ = [
    "Mixture",
    "answers",
    "diverged",
    "mean_attention",
    "metric_of",
    "require_scores",
    "score",
]

# Weights [B, K] or [1, K] for input ids and mask [B, T], or for images [B, C, H, W] and None; None
# for the router's.
Mixture = Callable[[Tensor, "Tensor | None"], "Tensor | None"]


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    benchmark: str,
    settings: ContinualSettings,
    mixture: Mixture | None = None,
    space: LabelSpace | None = None,
) -> float:
    """Returns the score of the model's answers to `rows` in percent; arguments as in `answers`."""
    predictions = answers(model, tokenizer, rows, settings, mixture, space)
    return score_predictions(
        predictions, [row.outputs for row in rows], metric_of(benchmark, settings)
    )


def metric_of(benchmark: str, settings: ContinualSettings) -> Metric:
    """Returns the metric of the settings, otherwise the benchmark's own, otherwise exact match."""
    chosen = settings.metric or BENCHMARK_METRICS.get(benchmark, "exact_match")
    return "rouge_l" if chosen == "rouge_l" else "exact_match"


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    settings: ContinualSettings,
    mixture: Mixture | None = None,
    space: LabelSpace | None = None,
) -> list[str]:
    """Generates greedy answers, in the order of `rows`; the model stays in evaluation mode.

    An encoder needs one forward and runs under the autocast of its training. A model that generates
    runs without autocast, which would cast all weights again at every token. Several processes
    divide the batches, and each returns all answers.

    Args:
        model: a patched model.
        tokenizer: its tokenizer.
        rows: at least one row of a task.
        settings: give lengths, batch size, autocast and progress bars.
        mixture: returns the weights of the adapters for each batch; None uses the router's.
        space: the labels of an encoder, whose answer is the label that fits best.

    Raises:
        ValueError: if logits are NaN: training has diverged.
    """
    model.eval()
    causal = model_kind(model) == "causal"
    texts: list[list[str]] = []
    for ids, mask in _batches(model, tokenizer, rows, settings, "answering"):
        weights = None if mixture is None else mixture(ids, mask)
        if space is not None:
            with settings.autocast(ids.device):
                outputs = model(input_ids=ids, attention_mask=mask, mixture=weights)
            scores = require_scores(space(outputs.last_hidden_state, mask)[:, 0])
            texts.append([space.labels[best] for best in scores.argmax(-1)])
            continue
        watch = _Watch()
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.max_target_length,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([watch]),
            mixture=weights,
        )
        if watch.broken.any():
            raise diverged("logits")
        new = generated[:, ids.shape[1] :] if causal else generated
        texts.append(tokenizer.batch_decode(new, skip_special_tokens=True))
    return [text.strip() for batch in processes.gathered(texts) for text in batch]


def require_scores(scores: Tensor) -> Tensor:
    """Returns scores [B, C], of which the largest of each row is the answer.

    Raises:
        ValueError: if a score is NaN or Inf: argmax would still return a class.
    """
    if not scores.isfinite().all():
        raise diverged("logits")
    return scores


def diverged(what: str) -> ValueError:
    """Returns the error for numbers that are NaN or infinite."""
    return ValueError(
        f"model: got NaN or Inf as {what}, expected finite numbers: training has diverged; use a "
        "smaller learning_rate"
    )


class _Watch(LogitsProcessor):
    """Notes whether the logits of a generation are NaN; it changes none and does not wait."""

    def __init__(self) -> None:
        self.broken = torch.zeros(1, dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.broken = self.broken.to(scores.device) | scores.isnan().any()
        return scores


@torch.no_grad()
def mean_attention(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    settings: ContinualSettings,
    mixture: Mixture | None = None,
) -> Tensor:
    """The mean over `rows` of the adapters' weights, [K] float32 on the CPU, in learning order.

    Arguments and several processes as in `answers`.
    """
    model.eval()
    sums = []
    for ids, mask in _batches(model, tokenizer, rows, settings, "routing"):
        weights = None if mixture is None else mixture(ids, mask)
        if weights is None:
            weights = pool_of(model).route(ids, mask)
        sums.append(weights.double().expand(len(ids), -1).sum(0).cpu())
    return (torch.stack(processes.gathered(sums)).sum(0) / len(rows)).float()


def _batches(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    settings: ContinualSettings,
    what: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    causal = model_kind(model) == "causal"
    prompts = [row.prompt for row in rows]
    encoded = prompt_ids(tokenizer, prompts, settings.max_source_length, causal)
    device, size = execution_device(model.get_input_embeddings()), settings.eval_batch_size
    starts = processes.share(range(0, len(encoded), size))
    for start in tqdm(
        starts, desc=f"{what} {rows[0].task}", leave=False, disable=not settings.progress
    ):
        ids, mask = pad_rows(encoded[start : start + size], tokenizer.pad_token_id, left=causal)
        yield ids.to(device), mask.to(device)
