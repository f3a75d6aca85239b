"""`sapt-fast train-router`: trains the classifier that chooses Skeleton-of-Thought."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sapt_fast.checks import require_count, require_folder, require_number
from sapt_fast.commands.options import option, with_fields
from sapt_fast.commands.output import show
from sapt_fast.continual.data.models import load_config
from sapt_fast.continual.run.processes import require_device
from sapt_fast.generation.router.classifier import ClassifierRouter, require_free
from sapt_fast.generation.router.confusion import Confusion, choose_threshold
from sapt_fast.generation.router.questions import (
    LabelledQuestion,
    packaged_questions,
    read_questions,
    split_questions,
)
from sapt_fast.generation.router.training import (
    TINY,
    RouterSettings,
    load_classifier,
    train_router,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["router_report", "train_router_command"]

# A new encoder needs more steps than a pretrained one.
_TINY_VALUES = {"epochs": 30, "learning_rate": 1e-3}
_NAMES = [one.name for one in fields(RouterSettings)]
_PANELS = {
    "Data": ("data", "max_length"),
    "Training": tuple(_NAMES),
    "Threshold": ("threshold", "false_positive_rate"),
    "Machine": ("device", "progress"),
}


@with_fields(_NAMES, RouterSettings, panels=_PANELS)
def train_router_command(
    output: Annotated[Path, option("Folder for the router; a router in it is replaced.")],
    model: Annotated[
        str,
        option(
            "Folder or name of a transformers encoder, such as roberta-base; 'tiny' for a small "
            "new one, which needs no download."
        ),
    ] = TINY,
    data: Annotated[
        Path | None,
        option(
            "JSONL, an object a line: question, label (1: independent points suit), and optional "
            "split (train, dev, test), category and language.",
            panel="Data",
            default="the 613 questions of the package",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        option(
            "Tokens of a question that are read.",
            panel="Data",
            default="the model's limit, at most 512",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        option("Passes over the training questions.", panel="Training", default="8; 30 for 'tiny'"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        option(
            "Largest learning rate of AdamW.", "--learning-rate", "--lr",
            panel="Training", default="1e-4; 1e-3 for 'tiny'",
        ),
    ] = None,
    threshold: Annotated[
        str,
        option(
            "A question gets a skeleton if its probability is above this number. 'auto' chooses "
            "it on the dev questions, for --false-positive-rate.",
            panel="Threshold",
        ),
    ] = "0.5",
    false_positive_rate: Annotated[
        float,
        option(
            "With --threshold auto: the largest share of dev questions with label 0 that may get "
            "a skeleton.",
            panel="Threshold",
        ),
    ] = 0.05,
    device: Annotated[
        str | None, option("'cpu' or 'cuda'.", panel="Machine", default="a GPU if there is one")
    ] = None,
    progress: Annotated[bool, option("Show a progress bar.", panel="Machine")] = True,
    **values: Any,
) -> None:  # fmt: skip
    """Trains, chooses the threshold, saves, and prints the confusion tables."""
    from torch.cuda import is_available

    require_folder("output", output)
    require_free(output)
    require_device(device)
    given = {"epochs": epochs, "learning_rate": learning_rate}
    defaults = _TINY_VALUES if model == TINY else {}
    chosen = {**defaults, **{name: v for name, v in given.items() if v is not None}}
    settings = RouterSettings(**{**values, **chosen})
    fixed = _fixed_threshold(threshold, false_positive_rate)
    if max_length is not None:
        require_count("max_length", max_length, least=4)
    rows = packaged_questions() if data is None else read_questions(data)
    parts = split_questions(rows, settings.seed)
    if fixed is None and not any(not row.label for row in parts["dev"]):
        raise ValueError("threshold: 'auto' needs dev questions with label 0, and there is none")
    if model != TINY:
        load_config(model)  # names a model that is not there
    questions = [row.question for row in parts["train"]]
    classifier, tokenizer = load_classifier(model, questions, settings.seed)
    classifier.to(device or ("cuda" if is_available() else "cpu"))
    router = train_router(
        classifier, tokenizer, parts["train"], settings, max_length=max_length, progress=progress
    )
    scores = {name: router.scores([row.question for row in part]) for name, part in parts.items()}
    labels = {name: [row.label for row in part] for name, part in parts.items()}
    router.threshold = (
        choose_threshold(scores["dev"], labels["dev"], false_positive_rate)
        if fixed is None
        else fixed
    )
    report = {
        "model": model,
        "data": None if data is None else str(data),
        "settings": asdict(settings),
        "false_positive_rate": false_positive_rate if fixed is None else None,
        **router_report(router, parts, scores),
    }
    router.save_pretrained(output, report)
    show(_table(parts, report), f"threshold {router.threshold:.3f}; written to {output}")


def _fixed_threshold(threshold: str, rate: float) -> float | None:
    """Returns the number, or None for 'auto'."""
    require_number("false_positive_rate", rate, most=1.0)
    if threshold == "auto":
        return None
    try:
        value = float(threshold)
    except ValueError:
        raise ValueError(
            f"threshold: got {threshold!r}, expected a number in [0, 1] or 'auto'"
        ) from None
    require_number("threshold", value, most=1.0)
    return value


def router_report(
    router: ClassifierRouter,
    parts: dict[str, list[LabelledQuestion]],
    scores: dict[str, list[float]],
) -> dict[str, Any]:
    """Returns threshold, confusion counts and rates by part, and the test questions it gets wrong.

    Args:
        router: gives the threshold.
        parts: questions by "train", "dev" and "test".
        scores: the router's, in the same order.
    """
    counts = {
        name: Confusion.of(scores[name], [row.label for row in part], router.threshold)
        for name, part in parts.items()
    }
    wrong = [
        {**asdict(row), "score": score}
        for row, score in zip(parts["test"], scores["test"], strict=True)
        if (score > router.threshold) != bool(row.label)
    ]
    return {
        "threshold": router.threshold,
        "confusion": {name: {**asdict(c), **c.rates()} for name, c in counts.items()},
        "wrong": wrong,
    }


def _table(parts: dict[str, list[LabelledQuestion]], report: dict[str, Any]) -> Table:
    from rich.table import Table

    shares = ("accuracy", "false_positive_rate", "false_negative_rate")
    table = Table(title="questions by label and decision")
    table.add_column("part")
    for heading in (
        "1 as 1", "0 as 1", "0 as 0", "1 as 0", "accuracy", "false positives", "false negatives",
        "majority",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, part in parts.items():
        counts = report["confusion"][name]
        kinds = ("true_positives", "false_positives", "true_negatives", "false_negatives")
        majority = max(Counter(row.label for row in part).values(), default=0)
        rates = [*(counts[share] for share in shares), majority / len(part) if part else None]
        table.add_row(
            name,
            *(str(counts[kind]) for kind in kinds),
            *("-" if rate is None else f"{rate:.1%}" for rate in rates),
        )
    return table
