"""Reader of the CL_Benchmark layout: SuperNI and Long Sequence tasks, and pseudo-samples.

    <root>/<benchmark>/<task>/{train,dev,test}.json     Definition, Instances: [{input, output}]
    <root>/Long_Sequence/<task>/labels.json             the task's label strings

Prompts are the zero-shot ones of the original SAPT code (`src/cl_dataset.py`), character for
character. It uses the first definition only and no positive examples, and it never reads
labels.json: there is no list of options in a prompt.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

from sapt_fast.files.reading import DATA_BYTES, read_json

__all__ = [
    "BENCHMARKS",
    "SPLITS",
    "Example",
    "TaskData",
    "draw_rows",
    "list_tasks",
    "merged",
    "read_pseudo_samples",
    "read_split",
    "read_task",
]

logger = logging.getLogger(__name__)

BENCHMARKS = ("SuperNI", "Long_Sequence")
SPLITS = ("train", "dev", "test")
# qqp's original labels.json has False/True, its rows have no/yes.
_RELEASED_LABEL_FAULTS: dict[tuple[str, str, tuple[str, ...]], tuple[str, ...]] = {
    ("Long_Sequence", "qqp", ("False", "True")): ("no", "yes")
}

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    Attributes:
        task: the task's name.
        input: the instance's text as the file has it.
        prompt: what the model reads: definition and `input`, ending in "Output: ".
        output: the training target. If a row has several outputs, one of them, drawn by the
            reader's seed (the original code draws one too).
        outputs: every accepted output; scores take the best over them. (The original code scores
            against the drawn one alone: use `(output,)` for that.)
    """

    task: str
    input: str
    prompt: str
    output: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TaskData:
    """One task, read and split.

    Attributes:
        name: the task's name.
        benchmark: "SuperNI" or "Long_Sequence".
        definition: the instruction, "" if the task has none (copa).
        train: training rows.
        dev: rows for model selection.
        test: test rows.
        labels: label strings of labels.json, None if the task has no such file (SuperNI).
    """

    name: str
    benchmark: str
    definition: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] | None

    def describe(self) -> dict[str, Any]:
        """Returns a JSON-ready dict: the benchmark, the rows of each split and a digest of them."""
        splits = {name: getattr(self, name) for name in SPLITS}
        rows = [
            [(row.input, row.prompt, row.output, *row.outputs) for row in split]
            for split in splits.values()
        ]
        counts = {name: len(split) for name, split in splits.items()}
        content = _digest([self.definition, self.labels, *rows])
        return {"benchmark": self.benchmark, **counts, "digest": content}

    def digest_of_prompts(self) -> str:
        """A digest of the prompts and outputs of all rows; `describe` covers the files' content."""
        return _digest(
            [
                (row.prompt, row.output, *row.outputs)
                for split in SPLITS
                for row in getattr(self, split)
            ]
        )


def merged(tasks: Sequence[TaskData]) -> TaskData:
    """All tasks as one, under the name of the last."""
    rows: dict[str, Any] = {
        split: tuple(row for task in tasks for row in getattr(task, split)) for split in SPLITS
    }
    return replace(tasks[-1], definition="", labels=None, **rows)


def _digest(content: Any) -> str:
    """The first 16 hex digits of the SHA-256 of JSON-ready content; runs are compared by it."""
    return sha256(json.dumps(content).encode()).hexdigest()[:16]


def list_tasks(root: str | os.PathLike[str], benchmark: str) -> tuple[str, ...]:
    """Names of the tasks under `root/benchmark` that have a train.json, sorted.

    Raises:
        ValueError: if `benchmark` is not one of `BENCHMARKS`.
        FileNotFoundError: if the folder does not exist.
    """
    folder = Path(root) / _canonical_benchmark(benchmark)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; expected a root that contains {' or '.join(BENCHMARKS)}"
        )
    return tuple(sorted(path.parent.name for path in folder.glob("*/train.json")))


def read_split(
    root: str | os.PathLike[str],
    benchmark: str,
    task: str,
    split: Literal["train", "dev", "test"] = "train",
    *,
    seed: int = 0,
) -> tuple[Example, ...]:
    """Reads the rows of one file, without a split and without a check against labels.json.

    Args:
        root: folder that contains `benchmark`.
        benchmark: "SuperNI" or "Long_Sequence" (any case).
        task: name of the task's folder.
        split: which file.
        seed: draws the target of rows with several outputs.

    Returns:
        The rows in file order.

    Raises:
        FileNotFoundError: if there is no such root, task or file; near names are listed.
        ValueError: if the benchmark or split is unknown, the JSON is damaged (with its position), a
            field is missing or malformed, or there are no rows.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    benchmark = _canonical_benchmark(benchmark)
    folder = _task_folder(root, benchmark, task)
    return _read_examples(folder / f"{split}.json", benchmark, task, seed)[1]


def read_pseudo_samples(
    root: str | os.PathLike[str], benchmark: str, task: str
) -> tuple[str, tuple[Example, ...]]:
    """Reads the pseudo-samples of a task: original ones or those of `run.pseudo_samples`.

    Args:
        root: folder that contains `benchmark`, such as `generated_data/lora_gen_superni_t5`.
        benchmark: as the task names it. Outside of `BENCHMARKS` the prompt is the bare input.
        task: name of the task's folder.

    Returns:
        The generated definition, which the prompts carry, and the rows; outputs may be "".

    Raises:
        FileNotFoundError, ValueError: as `read_split`.
    """
    known = benchmark in BENCHMARKS
    folder = _task_folder(root, benchmark, task) if known else Path(root) / benchmark / task
    return _read_examples(folder / "train.json", benchmark, task, 0)


def read_task(
    root: str | os.PathLike[str],
    benchmark: str,
    task: str,
    *,
    dev: Literal["from_train", "released"] = "from_train",
    dev_size: int | float = 0.1,
    max_train: int | None = None,
    max_eval: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Reads one task with its training, dev and test rows.

    The original dev.json has the rows of test.json, so selecting a model on it selects on the test
    set. By default dev rows are therefore held out of train.json. The split depends on `seed` and
    the task alone; rows with the same input stay on the same side.

    Args:
        root: folder that contains `benchmark`.
        benchmark: "SuperNI" or "Long_Sequence" (any case).
        task: name of the task's folder.
        dev: "from_train", or "released" for dev.json as it is.
        dev_size: rows (int) or share of train.json (float in (0, 1)) for dev; at least one row.
            Used with "from_train" only.
        max_train: keep at most this many training rows, drawn by `seed` after the split.
        max_eval: keep at most this many dev and this many test rows, drawn by `seed`.
        seed: draws the split, the kept rows and the target of rows with several outputs.

    Returns:
        The task. Rows keep their order in the files.

    Raises:
        FileNotFoundError: if there is no such root, task or split file, or a Long Sequence task has
            no labels.json.
        ValueError: if an argument is not valid, a file is damaged or a split is empty.
        ValueError: if an output is absent from labels.json: any in train, or all in dev or test.
            (If only some in dev or test are, they are logged and kept: the original mnli test set
            has 131 rows labelled "-".)

    Example:
        >>> data = read_task("tests/data/CL_Benchmark", "Long_Sequence", "copa", dev_size=4)
        >>> data.labels, len(data.dev)
        (('A', 'B'), 4)
    """
    benchmark = _canonical_benchmark(benchmark)
    if dev not in ("from_train", "released"):
        raise ValueError(f"dev: got {dev!r}, expected 'from_train' or 'released'")
    for name, limit in (("max_train", max_train), ("max_eval", max_eval)):
        if limit is not None and (not _is_int(limit) or limit < 1):
            raise ValueError(f"{name}: got {limit!r}, expected None or an int of at least 1")
    folder = _task_folder(root, benchmark, task)
    definition, train_rows = _read_examples(folder / "train.json", benchmark, task, seed)
    test_rows = _read_examples(folder / "test.json", benchmark, task, seed)[1]
    labels = _read_labels(folder, benchmark, task)
    if dev == "from_train":
        train_rows, dev_rows = _split_dev(train_rows, dev_size, f"{seed}/{task}", folder)
    else:
        dev_rows = _read_examples(folder / "dev.json", benchmark, task, seed)[1]
        if {row.input for row in dev_rows} & {row.input for row in test_rows}:
            logger.warning("%s shares rows with test.json", folder / "dev.json")
    if labels is not None:
        for split, rows in (("train", train_rows), ("dev", dev_rows), ("test", test_rows)):
            _check_labels(rows, labels, split, folder)
    whole = TaskData(task, benchmark, definition, train_rows, dev_rows, test_rows, labels)
    return draw_rows(whole, max_train, max_eval, seed)


def draw_rows(task: TaskData, max_train: int | None, max_eval: int | None, seed: int) -> TaskData:
    """The task with at most `max_train` training rows, and `max_eval` dev and test rows each."""
    return replace(
        task,
        train=_draw(task.train, max_train, f"{seed}/{task.name}/train"),
        dev=_draw(task.dev, max_eval, f"{seed}/{task.name}/dev"),
        test=_draw(task.test, max_eval, f"{seed}/{task.name}/test"),
    )


def _canonical_benchmark(benchmark: str) -> str:
    for name in BENCHMARKS:
        if isinstance(benchmark, str) and benchmark.lower() == name.lower():
            return name
    raise ValueError(f"benchmark: got {benchmark!r}, expected one of {', '.join(BENCHMARKS)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _task_folder(root: str | os.PathLike[str], benchmark: str, task: str) -> Path:
    tasks = list_tasks(root, benchmark)
    if task in tasks:
        return Path(root) / benchmark / task
    near = [name for name in tasks if name.startswith(f"{task}_")]
    near += [name for name in difflib.get_close_matches(str(task), tasks) if name not in near]
    hint = f"near matches: {', '.join(near)}" if near else f"there are: {', '.join(tasks) or '-'}"
    raise FileNotFoundError(
        f"{Path(root) / benchmark} has no task {task!r} with a train.json; {hint}"
    )


def _load_json(path: Path) -> Any:
    try:
        return read_json(path, DATA_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected a CL_Benchmark file") from None


def _read_examples(
    path: Path, benchmark: str, task: str, seed: int
) -> tuple[str, tuple[Example, ...]]:
    data = _load_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    for key in ("Definition", "Instances"):
        if key not in data:
            raise ValueError(
                f"{path}: no {key!r}; it has {', '.join(map(repr, data)) or 'no keys'}"
            )
    definition = _definition(data["Definition"], benchmark, path)
    instances = data["Instances"]
    if not isinstance(instances, list):
        raise ValueError(f"{path}: 'Instances': got {type(instances).__name__}, expected a list")
    if not instances:
        raise ValueError(f"{path}: 'Instances' is empty, expected at least one row")
    draw = random.Random(f"{seed}/{task}/{path.stem}/output")
    rows = []
    for number, instance in enumerate(instances):
        text, outputs = _fields(instance, f"{path}: Instances[{number}]")
        output = outputs[0] if len(outputs) == 1 else draw.choice(outputs)
        prompt = _prompt(definition, text, benchmark)
        rows.append(Example(task, text, prompt, output, outputs))
    return definition, tuple(rows)


def _strings(value: object, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: got {value!r}, expected a string or a list of strings")
    return texts


def _definition(value: object, benchmark: str, path: Path) -> str:
    texts = _strings(value, f"{path}: 'Definition'")
    definition = texts[0].strip() if texts else ""
    if not definition and benchmark == "SuperNI":
        raise ValueError(f"{path}: 'Definition' is empty; a SuperNI task needs one")
    return definition


def _fields(instance: object, where: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(instance, dict):
        raise ValueError(f"{where}: got {type(instance).__name__}, expected an object")
    for key in ("input", "output"):
        if key not in instance:
            raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(repr, instance))}")
    text = instance["input"]
    if not isinstance(text, str):
        raise ValueError(f"{where}: 'input': got {type(text).__name__}, expected a string")
    outputs = _strings(instance["output"], f"{where}: 'output'")
    if not outputs:
        raise ValueError(f"{where}: 'output' is an empty list, expected at least one string")
    return text, tuple(outputs)


def _prompt(definition: str, text: str, benchmark: str) -> str:
    if benchmark == "SuperNI":
        return (
            f"Definition: {definition}\n\n"
            f"Now complete the following example -\nInput: {text}\nOutput: "
        )
    if benchmark not in BENCHMARKS:
        return text
    head = f"{definition}\n" if definition else ""
    return f"{head}{text}\nOutput: "


def _read_labels(folder: Path, benchmark: str, task: str) -> tuple[str, ...] | None:
    path = folder / "labels.json"
    if not path.exists():
        if benchmark == "Long_Sequence":
            raise FileNotFoundError(f"{path} does not exist; expected a JSON list of label strings")
        return None
    labels = tuple(_strings(_load_json(path), f"{path}: its content"))
    if not labels or "" in labels or len(set(labels)) != len(labels):
        raise ValueError(f"{path}: expected distinct, non-empty label strings, got {labels!r}")
    return _RELEASED_LABEL_FAULTS.get((benchmark, task, labels), labels)


def _check_labels(
    rows: Sequence[Example], labels: tuple[str, ...], split: str, folder: Path
) -> None:
    unknown = [row.output for row in rows if row.output not in labels]
    if not unknown:
        return
    found = ", ".join(map(repr, sorted(set(unknown))[:5]))
    message = (
        f"{folder}: {len(unknown)} of {len(rows)} {split} rows have an output that is absent from "
        f"labels.json: {found}; expected one of {', '.join(map(repr, labels))}"
    )
    if split == "train" or len(unknown) == len(rows):
        raise ValueError(message)
    logger.warning("%s", message)


def _split_dev(
    rows: Sequence[Example], size: int | float, seed: str, folder: Path
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    if _is_int(size) and size >= 1:
        wanted = int(size)
    elif isinstance(size, float) and 0.0 < size < 1.0:
        wanted = max(1, round(size * len(rows)))
    else:
        raise ValueError(f"dev_size: got {size!r}, expected an int >= 1 or a float in (0, 1)")
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.input, []).append(index)
    order = list(groups.values())
    random.Random(f"{seed}/split").shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if len(chosen) in (0, len(rows)):
        raise ValueError(
            f"{folder / 'train.json'}: dev_size {size!r} of {len(rows)} rows leaves train or dev "
            "empty; choose fewer dev rows"
        )
    return (
        tuple(row for index, row in enumerate(rows) if index not in chosen),
        tuple(row for index, row in enumerate(rows) if index in chosen),
    )


def _draw(rows: Iterable[_Row], limit: int | None, seed: str) -> tuple[_Row, ...]:
    rows = tuple(rows)
    if limit is None or len(rows) <= limit:
        return rows
    kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return tuple(rows[index] for index in kept)
