"""Tiny models over the demo's characters, and a few rows of its tasks."""

import json
from dataclasses import replace

import torch
from tiny_models import tiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sapt_fast import SaptConfig
from sapt_fast.continual.data.rows import Example, TaskData
from sapt_fast.continual.data.sources import demo_tasks
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.demo.tasks import CharTokenizer

VOCABULARY = CharTokenizer().vocab_size


def make_model(kind: str, dropout: float = 0.0) -> PreTrainedModel:
    """A random model, "t5" or "llama"; the same weights every time."""
    name = "dropout_rate" if kind == "t5" else "attention_dropout"
    return tiny(kind, vocab_size=VOCABULARY, **{name: dropout})


def make_tasks(count: int = 3, train: int = 24, held_out: int = 5) -> list[TaskData]:
    return [
        replace(task, train=task.train[:train], dev=task.dev[:held_out], test=task.test[:held_out])
        for task in demo_tasks()[:count]
    ]


def with_pseudo_samples(folder, tasks: list[TaskData]) -> list[TaskData]:
    """The tasks as such that find the pseudo-samples, without answers, which this writes."""
    for task in tasks:
        target = folder / "SuperNI" / task.name
        target.mkdir(parents=True, exist_ok=True)
        rows = [{"input": row.input, "output": ""} for row in task.train[:5]]
        content = {"Definition": ["d"], "Instances": rows}
        (target / "train.json").write_text(json.dumps(content))
    return [replace(task, benchmark="SuperNI") for task in tasks]


def make_settings(**options) -> ContinualSettings:
    defaults = {
        "sapt": SaptConfig(r=2, lora_alpha=4),
        "learning_rate": 1e-2,
        "steps": 5,
        "save_steps": 2,
        "batch_size": 4,
        "accumulation": 2,
        "max_source_length": 16,
        "max_target_length": 4,
        "replay_share": 0.2,
        "device": "cpu",
        "progress": False,
    }
    return ContinualSettings(**{**defaults, **options})


def save_byte_model(folder, family="t5", dtype=torch.float32, **config) -> None:
    """A tiny model and its tokenizer of one token per byte, as `from_pretrained` reads them."""
    symbols = sorted(ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *symbols])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    layers = "num_layers" if family == "t5" else "num_hidden_layers"
    model = tiny(family, vocab_size=len(vocabulary), **{layers: 1, **config})
    model.to(dtype).save_pretrained(folder)


WORDS = ("yes", "no", "red", "blue", "north", "south", "pick", "choose", "word", "of", "a", "b")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`, between [CLS] and [SEP], as BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_encoder(seed: int = 0, vocabulary: int = 4 + len(WORDS)) -> PreTrainedModel:
    """A tiny BertModel without pooler; the same weights every time."""
    bert = tiny("bert", seed, vocab_size=vocabulary, initializer_range=0.5).bert
    return bert.eval()


def word_tasks(rows: int = 16) -> list[TaskData]:
    """Three tasks, each between two labels of which the input names one; two share theirs."""
    made = []
    for name, definition, labels in (
        ("colour", "pick a word of a b", ("red", "blue")),
        ("answer", "choose word", ("yes", "no")),
        ("again", "word of a b choose", ("no", "yes")),
    ):
        examples = tuple(
            Example(name, f"{('a', 'b', 'of')[i % 3]} {label}", "", label, (label,))
            for i in range(rows)
            for label in (labels[i % 2],)
        )
        made.append(
            TaskData(name, "SuperNI", definition, examples, examples[:4], examples[:6], labels)
        )
    return made
