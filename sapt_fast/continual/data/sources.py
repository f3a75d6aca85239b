"""Where the model and the tasks of a run come from; run.json records it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from sapt_fast.checks import MOST_SEED, require_choice, require_count
from sapt_fast.continual.data.image_folders import (
    CLASS_ORDERS,
    IMAGE_DEVS,
    IMAGE_SPLITS,
    IMAGES,
    class_tasks,
    draw_images,
    read_image_tasks,
)
from sapt_fast.continual.data.image_models import (
    DEMO_IMAGES,
    demo_image_tasks,
    load_image_model,
    load_image_transform,
)
from sapt_fast.continual.data.models import (
    DEMO,
    DTYPES,
    attentions,
    check_folder,
    check_model,
    load_model,
    load_tokenizer,
    torch_dtype,
)
from sapt_fast.continual.data.orders import resolve_order
from sapt_fast.continual.data.rows import (
    BENCHMARKS,
    Example,
    TaskData,
    draw_rows,
    list_tasks,
    read_task,
)

__all__ = ["DEMO", "Source", "demo_tasks", "torch_dtype"]

_DEVS = ("from_train", "released")
_KINDS = ("auto", "seq2seq", "causal", "encoder")
# The fields of images alone, with their defaults; a run on text does not note them.
_OF_IMAGES: dict[str, Any] = {
    "split": "classes",
    "classes_per_task": None,
    "class_order": "seeded",
    "image_size": None,
    "convert_images": False,
}


@dataclass(frozen=True)
class Source:
    """A model and a sequence of tasks, as the command line names them.

    Raises:
        ValueError: if a value is not one of those that its field names, or `data` is missing, or
            given with the demo's tasks.
    """

    model: str = field(metadata={"help": f"Folder or name of a transformers model, or '{DEMO}'."})
    benchmark: str = field(
        metadata={
            "help": f"'SuperNI', 'Long_Sequence', '{IMAGES}', or '{DEMO}' or '{DEMO_IMAGES}' for "
            "generated tasks."
        }
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder that contains SuperNI/ or Long_Sequence/; of images, train/<class> and "
            "test/<class>, or other layouts of --split."
        },
    )
    tasks: str | None = field(
        default=None, metadata={"help": "A published order, or task names separated by commas."}
    )
    dev: str = field(
        default="from_train",
        metadata={
            "help": "'from_train': hold out training rows; 'released': use dev.json, which in the "
            "original data contains the test rows; 'in_train', of images: training rows that are "
            "trained on too."
        },
    )
    max_train: int | None = field(
        default=None,
        metadata={
            "help": "Keep at most N training examples per task; of images, evenly over the "
            "classes.",
            "default": "all",
        },
    )
    max_eval: int | None = field(
        default=None,
        metadata={"help": "Keep at most N dev and N test examples per task.", "default": "all"},
    )
    dtype: str = field(
        default="float32", metadata={"help": f"Dtype of the weights: {', '.join(DTYPES)}."}
    )
    kind: str = field(
        default="auto",
        metadata={
            "help": "'seq2seq', 'causal' or 'encoder' (inputs are matched to label strings); "
            "'auto' decides by the model's architecture."
        },
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation of transformers, such as 'eager' or 'sdpa'.",
            "default": "the model's own",
        },
    )
    split: str = field(
        default="classes",
        metadata={
            "help": "Tasks of images: 'classes' (each has --classes-per-task), 'domains' (each "
            "folder, all with the same classes) or 'tasks' (each folder, with its own classes)."
        },
    )
    classes_per_task: int | None = field(
        default=None, metadata={"help": "Classes of a task, with --split classes."}
    )
    class_order: str = field(
        default="seeded",
        metadata={"help": "Order of the classes, with --split classes: 'seeded' or 'sorted'."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of images.", "default": "the image processor's"},
    )
    convert_images: bool = field(
        default=False,
        metadata={
            "help": "Convert grey, palette and transparent images to the model's channels; "
            "otherwise they are errors."
        },
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the choice of dev rows, of the rows that are kept and of the order "
            "of classes."
        },
    )

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("kind", self.kind, _KINDS)
        require_choice("dev", self.dev, IMAGE_DEVS if self.has_images else _DEVS)
        for name in ("max_train", "max_eval"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        require_count("seed", self.seed, least=0, most=MOST_SEED)
        if self.attention is not None:
            require_choice("attention", self.attention, attentions())
        if self.has_images:
            self._check_images()
            return
        for name, default in _OF_IMAGES.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected it with benchmark {IMAGES!r} "
                    "only"
                )
        if self.model == DEMO and self.kind not in ("auto", "seq2seq"):
            raise ValueError(f"kind: got {self.kind!r}, but the demo's model is seq2seq")
        if self.benchmark == DEMO:
            if self.data is not None:
                raise ValueError(f"data: got {self.data!r}, but the demo's tasks are generated")
            return
        if self.benchmark.lower() not in [name.lower() for name in BENCHMARKS]:
            raise ValueError(
                f"benchmark: got {self.benchmark!r}, expected one of "
                f"{', '.join((*BENCHMARKS, IMAGES, DEMO, DEMO_IMAGES))}"
            )
        if self.data is None:
            raise ValueError(
                f"data: benchmark {self.benchmark!r} needs the folder that contains it"
            )

    @property
    def has_images(self) -> bool:
        """Whether the rows are images."""
        return self.benchmark in (IMAGES, DEMO_IMAGES)

    def _check_images(self) -> None:
        require_choice("split", self.split, IMAGE_SPLITS)
        require_choice("class_order", self.class_order, CLASS_ORDERS)
        for name in ("classes_per_task", "image_size"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        if self.kind != "auto":
            raise ValueError(f"kind: got {self.kind!r}, expected 'auto' for images")
        if self.benchmark == DEMO_IMAGES:
            generated = {"data": None, "tasks": None, "dev": "from_train", **_OF_IMAGES}
            for name, default in generated.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r}, but the demo's images are generated"
                    )
        elif self.data is None:
            raise ValueError(f"data: benchmark {IMAGES!r} needs the folder that contains it")

    def check_files(self) -> None:
        """Checks the folders of the model and the data before anything is loaded.

        Raises:
            FileNotFoundError: if a folder does not exist or contains no model.
            NotADirectoryError: if it is a file.
        """
        if self.model != DEMO:
            check_model(self.model)
        if self.data is not None:
            check_folder("data", self.data, "the folder that contains the benchmark")

    def load_model(self) -> tuple[Any, Any]:
        """Loads the model and its tokenizer; for images, the model and an `ImageTransform`.

        Raises:
            ValueError: if the tokenizer has neither a pad nor an end token, the model is not of
                the given `kind`, or it does not have this `attention`.
            OSError: if there is no such model.
        """
        if self.has_images:
            classes = len(class_tasks(self.load_tasks()))
            model = load_image_model(self.model, self.dtype, self.attention, classes)
            return model, self._transform()
        model = load_model(self.model, self.kind, self.dtype, self.attention)
        return model, load_tokenizer(self.model)

    def _transform(self) -> Any:
        return load_image_transform(self.model, self.image_size, self.convert_images)

    def _load_images(self) -> list[TaskData]:
        if self.benchmark == DEMO_IMAGES:
            return demo_image_tasks(self.seed)
        return read_image_tasks(
            Path(str(self.data)), split=self.split, classes_per_task=self.classes_per_task,
            class_order=self.class_order, tasks=self.tasks, dev=self.dev, seed=self.seed,
            transform=self._transform(),
        )  # fmt: skip

    def load_tasks(self) -> list[TaskData]:
        """Loads the tasks in learning order.

        Raises:
            FileNotFoundError, ValueError: as `continual.data.rows.read_task` or
                `continual.data.image_folders.read_image_tasks`, and if the demo has no such task.
        """
        if self.has_images:
            tasks = self._load_images()
            return [draw_images(task, self.max_train, self.max_eval, self.seed) for task in tasks]
        if self.benchmark == DEMO:
            tasks = demo_tasks(self.seed)
            names = [task.name for task in tasks]
            chosen = names if self.tasks is None else resolve_order(self.tasks)
            unknown = sorted(set(chosen) - set(names))
            if unknown:
                raise ValueError(f"tasks: the demo has no {unknown}, it has {', '.join(names)}")
            kept = [tasks[names.index(name)] for name in chosen]
            return [draw_rows(task, self.max_train, self.max_eval, self.seed) for task in kept]
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
        """Returns a JSON-ready dict for `Source(**...)`, with absolute paths of folders."""
        values = asdict(self)
        if not self.has_images:
            values = {n: value for n, value in values.items() if n not in _OF_IMAGES}
        for name in ("model", "data"):
            if values[name] is not None and Path(values[name]).is_dir():
                values[name] = str(Path(values[name]).resolve())
        return values


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
