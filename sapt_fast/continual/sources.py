"""Where the model and the tasks of a run come from; what run.json notes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from sapt_fast.continual.collate import Kind, model_kind
from sapt_fast.continual.data import Example, TaskData, list_tasks, read_task
from sapt_fast.continual.orders import resolve_order

__all__ = ["DEMO", "Source", "demo_tasks", "torch_dtype"]

DEMO = "demo"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KINDS = ("auto", "seq2seq", "causal", "encoder")


@dataclass(frozen=True)
class Source:
    """A model and a sequence of tasks, as the command line names them."""

    model: str = field(metadata={"help": f"Folder or name of a transformers model, or '{DEMO}'."})
    benchmark: str = field(
        metadata={"help": f"'SuperNI', 'Long_Sequence', or '{DEMO}' for the generated tasks."}
    )
    data: str | None = field(default=None, metadata={"help": "Folder that holds the benchmark."})
    tasks: str | None = field(
        default=None, metadata={"help": "A published order, or task names separated by commas."}
    )
    dev: str = field(
        default="from_train",
        metadata={"help": "'from_train', or 'released' for dev.json (the test rows, as released)."},
    )
    max_train: int | None = field(default=None, metadata={"help": "Training rows kept of a task."})
    max_eval: int | None = field(
        default=None, metadata={"help": "Dev rows and test rows kept of a task."}
    )
    dtype: str = field(default="float32", metadata={"help": f"One of {', '.join(_DTYPES)}."})
    kind: str = field(
        default="auto",
        metadata={
            "help": "'seq2seq', 'causal' or 'encoder' (classification by matching label strings); "
            "'auto' goes by the model's architecture."
        },
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation of transformers: 'eager', 'sdpa', ...; none for the "
            "model's own."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Draws the dev rows and the rows that are kept."}
    )

    def __post_init__(self) -> None:
        torch_dtype(self.dtype)
        if self.kind not in _KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(_KINDS)}")
        if self.benchmark != DEMO and self.data is None:
            raise ValueError(f"data: benchmark {self.benchmark!r} needs the folder that holds it")

    def load_model(self) -> tuple[Any, Any]:
        """Model and tokenizer.

        Raises:
            ValueError: the tokenizer has neither a pad nor an end token, or the model is not of
                the `kind` asked for.
            OSError: there is no such model.
        """
        if self.model == DEMO:
            from sapt_fast.demo.backbone import load_backbone
            from sapt_fast.demo.tasks import CharTokenizer

            return load_backbone(torch_dtype(self.dtype)), CharTokenizer()
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.model)
        kind = _architecture(config) if self.kind == "auto" else self.kind
        loader = {
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
            "causal": transformers.AutoModelForCausalLM,
            "encoder": transformers.AutoModel,
        }[kind]
        options = {} if self.attention is None else {"attn_implementation": self.attention}
        model = loader.from_pretrained(self.model, dtype=torch_dtype(self.dtype), **options)
        if model_kind(model) != kind:
            raise ValueError(
                f"kind: got {kind!r}, but {self.model} is {model_kind(model)} "
                f"({type(model).__name__})"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    f"model: the tokenizer of {self.model} has no pad and no end token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer

    def load_tasks(self) -> list[TaskData]:
        """The tasks in learning order.

        Raises:
            FileNotFoundError, ValueError: as `continual.data.read_task`.
        """
        if self.benchmark == DEMO:
            tasks = demo_tasks(self.seed)
            names = [task.name for task in tasks]
            chosen = names if self.tasks is None else resolve_order(self.tasks)
            unknown = sorted(set(chosen) - set(names))
            if unknown:
                raise ValueError(f"tasks: the demo has no {unknown}, it has {', '.join(names)}")
            return [tasks[names.index(name)] for name in chosen]
        root = Path(str(self.data))
        wanted: Sequence[str] = (
            list_tasks(root, self.benchmark) if self.tasks is None else resolve_order(self.tasks)
        )
        dev = cast('Literal["from_train", "released"]', self.dev)
        return [
            read_task(
                root, self.benchmark, name,
                dev=dev, max_train=self.max_train, max_eval=self.max_eval, seed=self.seed,
            )
            for name in wanted
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, which `Source(**...)` takes; folders made absolute."""
        values = asdict(self)
        for name in ("model", "data"):
            if values[name] is not None and Path(values[name]).is_dir():
                values[name] = str(Path(values[name]).resolve())
        return values


def _architecture(config: Any) -> Kind:
    """What a saved model is for. Encoders are those that were pretrained on masked words."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    named = getattr(config, "architectures", None) or []
    generates = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if masked and not generates else "causal"


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: none of "float32", "bfloat16", "float16".
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype: got {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def demo_tasks(seed: int = 0) -> list[TaskData]:
    """The six generated tasks of `sapt_fast.demo` in the loop's form, scored by exact match."""
    from sapt_fast.demo.tasks import make_demo_tasks

    made = []
    for task in make_demo_tasks(seed):
        splits = {
            split: tuple(
                Example(task.name, row.source, row.source, row.target, (row.target,))
                for row in getattr(task, split)
            )
            for split in ("train", "dev", "test")
        }
        made.append(TaskData(task.name, DEMO, task.instruction, labels=None, **splits))
    return made
