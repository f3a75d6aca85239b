"""Tiny models over the demo's characters, and a few rows of its tasks."""

from dataclasses import replace

from tiny_models import tiny
from transformers import PreTrainedModel

from sapt_fast import SaptConfig
from sapt_fast.continual.data import TaskData
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.sources import demo_tasks
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
