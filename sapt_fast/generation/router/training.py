"""Trains a classifier that decides between Skeleton-of-Thought and ordinary decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from sapt_fast.checks import MOST_SEED, require_count, require_number
from sapt_fast.generation.router.classifier import ClassifierRouter
from sapt_fast.generation.router.loss import router_loss
from sapt_fast.generation.router.questions import LabelledQuestion

__all__ = ["TINY", "RouterSettings", "load_classifier", "train_router"]

TINY = "tiny"
_LABELS = {0: "plain", 1: "skeleton"}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RouterSettings:
    """How a classifier is trained.

    The loss, batch size, decay and warm-up are those of Skeleton-of-Thought's router, which was
    trained for 2 epochs with a learning rate of 5e-5 on 824 questions. The package has 338 for
    training, which need more steps: `epochs` and `learning_rate` suit them.

    Raises:
        ValueError: if a value is out of range.
    """

    epochs: int = _setting(8, "Passes over the training questions.")
    learning_rate: float = _setting(1e-4, "Largest learning rate of AdamW.")
    batch_size: int = _setting(32, "Questions of a step.")
    weight_decay: float = _setting(0.01, "Of AdamW, on all weights but biases and norms.")
    warmup: float = _setting(0.01, "Share of the steps in which the learning rate rises.")
    max_grad_norm: float = _setting(1.0, "Clip the norm of the gradient.")
    tversky: float = _setting(0.75, "Weight of the Tversky term; the rest is cross-entropy.")
    balance: bool = _setting(False, "Weight both labels alike in the cross-entropy.")
    seed: int = _setting(0, "Seed of the new weights, the order of questions and the dropout.")

    def __post_init__(self) -> None:
        require_count("epochs", self.epochs)
        require_count("batch_size", self.batch_size)
        require_count("seed", self.seed, least=0, most=MOST_SEED)
        require_number("learning_rate", self.learning_rate, positive=True)
        require_number("weight_decay", self.weight_decay)
        require_number("warmup", self.warmup, most=1.0)
        require_number("max_grad_norm", self.max_grad_norm, positive=True)
        require_number("tversky", self.tversky, most=1.0)


def load_classifier(name: str, questions: Sequence[str], seed: int = 0) -> tuple[Any, Any]:
    """Returns a classifier with two labels in float32, and its tokenizer.

    Args:
        name: folder or name of a transformers encoder, or "tiny" for a new one of 0.6 million
            weights with a tokenizer made from the questions.
        questions: of the training.
        seed: seed of the weights that the encoder does not have.

    Raises:
        OSError: if there is no such model.
        ValueError: if its tokenizer has neither a pad nor an end token.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == TINY:
            return _tiny(questions)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, id2label=_LABELS, label2id={v: k for k, v in _LABELS.items()},
            dtype=torch.float32, ignore_mismatched_sizes=True,
        )  # fmt: skip
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model: the tokenizer of {name} has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _tiny(questions: Sequence[str]) -> tuple[Any, Any]:
    """Returns a new BERT of two layers, and a byte-level BPE tokenizer of these questions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]"]
    built: Any = Tokenizer(models.BPE())
    built.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(questions, trainer)
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=256,
    )  # fmt: skip
    config: Any = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=256,
        id2label=_LABELS,
        label2id={name: label for label, name in _LABELS.items()},
        pad_token_id=0,
    )
    return BertForSequenceClassification(config), tokenizer


def train_router(
    model: Any,
    tokenizer: Any,
    rows: Sequence[LabelledQuestion],
    settings: RouterSettings | None = None,
    *,
    max_length: int | None = None,
    progress: bool = False,
) -> ClassifierRouter:
    """Trains a classifier on labelled questions, in place and in float32.

    AdamW with a linear warm-up and decay, on `router_loss`. The same seed gives the same weights.

    Args:
        model, tokenizer, max_length: as in `ClassifierRouter`.
        rows: the questions for training.
        settings: default to `RouterSettings()`.
        progress: show a bar with the remaining time on the standard error.

    Returns:
        The router, with the threshold 0.5.

    Raises:
        ValueError: if there are no questions, or only one label with `balance`.
        ValueError: if the loss is not finite.
    """
    settings = settings or RouterSettings()
    router = ClassifierRouter(model, tokenizer, max_length=max_length)
    if not rows:
        raise ValueError("rows: got no questions")
    device = model.device
    labels = torch.tensor([row.label for row in rows], device=device)
    weights = None
    if settings.balance:
        counts = labels.bincount(minlength=2)
        if not counts.all():
            raise ValueError(f"balance: got the label {int(labels[0])} only, expected both")
        weights = len(rows) / (2 * counts.float())
    batches = -(-len(rows) // settings.batch_size)
    steps = settings.epochs * batches
    optimizer, schedule = _optimizer(model, settings, steps)
    devices = [device.index or 0] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        tqdm(total=steps, desc="training", unit="step", disable=not progress) as bar,
    ):
        torch.manual_seed(settings.seed)
        model.train()
        for _ in range(settings.epochs):
            for chosen in torch.randperm(len(rows)).split(settings.batch_size):
                inputs = router.encoded([rows[place].question for place in chosen.tolist()])
                with torch.autocast(device.type, enabled=False):
                    logits = model(**inputs).logits
                    loss = router_loss(
                        logits, labels[chosen.to(device)],
                        tversky=settings.tversky, class_weights=weights,
                    )  # fmt: skip
                if not loss.isfinite():
                    raise ValueError(
                        f"loss: got {loss.item()}, expected a finite number; lower learning_rate"
                    )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
                bar.update()
    model.eval()
    return router


def _optimizer(model: Any, settings: RouterSettings, steps: int) -> tuple[Any, Any]:
    """Returns AdamW and its schedule; biases and norms do not decay."""
    from transformers import get_linear_schedule_with_warmup

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    warmup = -(-steps * settings.warmup // 1)
    return optimizer, get_linear_schedule_with_warmup(optimizer, int(warmup), steps)
