"""Reads image benchmarks from folders, and cuts them into tasks.

    <root>/train/<class>/*, <root>/test/<class>/*      split "classes"
    <root>/<class>/*                                   the same, with test images held out
    <root>/<task>/train/<class>/*, .../test/<class>/*  split "domains" or "tasks"
    <root>/<task>/<class>/*                            the same, with test images held out

- "classes" cuts the classes into tasks of the same size (class-incremental learning).
- "domains" learns each folder as a task; all have the same classes (domain-incremental learning).
- "tasks" learns each folder as a task; no two have a class in common.

Which task a test image belongs to is never told to the model.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sapt_fast.checks import require_choice, require_count
from sapt_fast.continual.data.image_transform import ImageTransform
from sapt_fast.continual.data.orders import resolve_order
from sapt_fast.continual.data.rows import Example, TaskData, draw_rows

__all__ = [
    "CLASS_ORDERS",
    "IMAGES",
    "IMAGE_DEVS",
    "IMAGE_SPLITS",
    "ImageExample",
    "class_tasks",
    "draw_images",
    "read_image_tasks",
]

logger = logging.getLogger(__name__)

IMAGES = "images"
IMAGE_SPLITS = ("classes", "domains", "tasks")
CLASS_ORDERS = ("seeded", "sorted")
IMAGE_DEVS = ("from_train", "in_train", "released")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_HELD_OUT = {"test": 0.2, "dev": 0.1}  # fractions of each class
_PARTS = ("train", "test", "dev")


@dataclass(frozen=True, slots=True)
class ImageExample(Example):
    """One image of a task.

    Attributes:
        input: the file's path below the benchmark's folder.
        prompt: a digest of the file's content, so that runs notice other images.
        output: the name of the class.
        source: the file, or the image itself.
    """

    source: Any = None

    def image(self) -> Image.Image:
        """Reads the image.

        Raises:
            ValueError: if the file cannot be read.
        """
        if isinstance(self.source, Image.Image):
            return self.source
        try:
            with Image.open(self.source) as opened:
                opened.load()
                return opened
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.source}: cannot be read as an image ({error})") from error


def read_image_tasks(
    root: Path,
    *,
    split: str = "classes",
    classes_per_task: int | None = None,
    class_order: str = "seeded",
    tasks: str | Sequence[str] | None = None,
    dev: str = "from_train",
    seed: int = 0,
    transform: ImageTransform | None = None,
) -> list[TaskData]:
    """Reads the tasks of an image benchmark, in learning order.

    Every file is read once and decoded, so that damaged ones are found before a run starts. Test
    images whose file is also a training image are counted in a warning.

    Args:
        root: the benchmark's folder, as in the module's docstring.
        split: "classes", "domains" or "tasks".
        classes_per_task: for split "classes"; the classes must divide evenly.
        class_order: "seeded" draws the order of the classes by `seed`, "sorted" keeps that of their
            names; for split "classes".
        tasks: folders in learning order, for the other splits; None sorts all by name.
        dev: "from_train" holds a tenth of each class's training images out; "in_train" uses these
            as dev images and trains on them too; "released" reads the folders dev/<class>.
        seed: draws the order of the classes and the images that are held out.
        transform: checks mode and size of each image; None leaves that out.

    Raises:
        FileNotFoundError, NotADirectoryError: if a folder is missing.
        ValueError: if there are no images, a class folder is empty or is in one part only, a class
            is in two tasks, domains differ in their classes, or a class has too few images.
        ValueError: if a file cannot be read, has another mode or size, or is not an image.
    """
    require_choice("split", split, IMAGE_SPLITS)
    require_choice("class_order", class_order, CLASS_ORDERS)
    require_choice("dev", dev, IMAGE_DEVS)
    if split == "classes":
        if tasks is not None:
            raise ValueError(
                f"tasks: got {tasks!r}, but split 'classes' makes tasks of the classes; expected "
                "--class-order and --classes-per-task, or another --split"
            )
        parts = _read_parts(root, root, dev, seed, transform)
        groups = _grouped(sorted(parts["train"]), classes_per_task, class_order, seed)
        width = len(str(len(groups)))
        return _warned(
            root,
            [
                _task(f"classes{number:0{width}}", parts, classes)
                for number, classes in enumerate(groups, start=1)
            ],
        )
    if classes_per_task is not None:
        raise ValueError(
            f"classes_per_task: got {classes_per_task} with split {split!r}, expected it with "
            "split 'classes' only"
        )
    named = {
        name: _read_parts(root, root / name, dev, seed, transform)
        for name in _task_folders(root, tasks)
    }
    (_require_same_classes if split == "domains" else _require_own_classes)(named)
    read = [_task(name, parts, sorted(parts["train"])) for name, parts in named.items()]
    return _warned(root, read)


def class_tasks(tasks: Sequence[TaskData]) -> tuple[str, ...]:
    """Returns the distinct classes of tasks, in learning order."""
    return tuple(dict.fromkeys(label for task in tasks for label in task.labels or ()))


def draw_images(task: TaskData, max_train: int | None, max_eval: int | None, seed: int) -> TaskData:
    """As `draw_rows`, but draws training images evenly over the classes.

    Raises:
        ValueError: if `max_train` is less than the number of classes.
    """
    drawn, classes = draw_rows(task, None, max_eval, seed), task.labels or ()
    if max_train is None or len(task.train) <= max_train:
        return drawn
    if max_train < len(classes):
        raise ValueError(
            f"max_train: got {max_train} for the {len(classes)} classes of task {task.name!r}, "
            f"expected at least {len(classes)}, one image of each"
        )
    order = list(range(len(task.train)))
    random.Random(f"{seed}/{task.name}/train").shuffle(order)
    seen = dict.fromkeys(classes, 0)
    rounds: dict[int, int] = {}  # by image: how many of its class come before it
    for index in order:
        label = task.train[index].output
        rounds[index], seen[label] = seen[label], seen[label] + 1
    kept = sorted(sorted(order, key=rounds.__getitem__)[:max_train])
    return replace(drawn, train=tuple(task.train[index] for index in kept))


# --- folders ---


def _task_folders(root: Path, tasks: str | Sequence[str] | None) -> tuple[str, ...]:
    there = sorted(path.name for path in _folders(root))
    if tasks is None:
        if not there:
            raise ValueError(f"{root}: got no folders of tasks, expected at least one")
        return tuple(there)
    names = resolve_order(
        [t.strip() for t in tasks.split(",")] if isinstance(tasks, str) else tasks
    )
    missing = [name for name in names if name not in there]
    if missing:
        raise FileNotFoundError(f"{root} has no folders {missing}; it has {', '.join(there)}")
    return names


def _folders(root: Path) -> list[Path]:
    """Returns the folders in a folder.

    Raises:
        ValueError: if two of them are links to one.
    """
    found = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    known: dict[Path, Path] = {}
    for path in found:
        other = known.setdefault(path.resolve(), path)
        if other is not path:
            raise ValueError(
                f"{path}: got the same folder as {other}, expected a folder of its own"
            )
    return found


_Parts = dict[str, dict[str, tuple[ImageExample, ...]]]


def _read_parts(
    root: Path, folder: Path, dev: str, seed: int, transform: ImageTransform | None
) -> _Parts:
    """Returns the images of a folder: {"train", "dev", "test"} by class."""
    names = {path.name for path in _folders(folder)}
    if "train" in names:
        wanted = ("train", "test", "dev") if dev == "released" else ("train", "test")
        missing = [part for part in wanted if part not in names]
        if missing:
            raise FileNotFoundError(f"{folder} has train/, but no {missing[0]}/")
        parts = {part: _read_classes(root, folder / part, transform) for part in wanted}
        for part in wanted[1:]:
            _require_classes(folder, part, parts)
    else:
        if dev == "released":
            raise FileNotFoundError(f"dev: got 'released', but {folder} has no train/ and dev/")
        whole = _read_classes(root, folder, transform)
        parts = {
            "train": {c: _split(folder / c, rows, "test", seed)[0] for c, rows in whole.items()},
            "test": {c: _split(folder / c, rows, "test", seed)[1] for c, rows in whole.items()},
        }
    if dev != "released":
        held = {c: _split(folder / c, rows, "dev", seed) for c, rows in parts["train"].items()}
        parts["dev"] = {c: out for c, (_, out) in held.items()}
        if dev == "from_train":
            parts["train"] = {c: kept for c, (kept, _) in held.items()}
    return parts


def _require_classes(folder: Path, part: str, parts: _Parts) -> None:
    unknown = sorted(parts[part].keys() - parts["train"].keys())
    missing = sorted(parts["train"].keys() - parts[part].keys())
    if unknown or missing:
        raise ValueError(
            f"{folder / part}: got classes {unknown} that train/ lacks, and none of {missing}, "
            "expected the classes of train/"
        )


def _read_classes(
    root: Path, folder: Path, transform: ImageTransform | None
) -> dict[str, tuple[ImageExample, ...]]:
    classes = {
        path.name: tuple(_read_image(root, file, path.name, transform) for file in _files(path))
        for path in _folders(folder)
    }
    if not classes:
        raise ValueError(f"{folder}: got no folders of classes, expected <class>/<image>")
    return classes


def _files(folder: Path) -> list[Path]:
    """Returns the image files of a class.

    Raises:
        ValueError: if there are none, or others.
    """
    found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder}: got a class without images, expected at least one")
    for path in found:
        if path.is_dir() or path.suffix.lower() not in _SUFFIXES:
            kind = "a folder" if path.is_dir() else "a file"
            raise ValueError(
                f"{path}: got {kind} in the folder of a class, expected images "
                f"({', '.join(_SUFFIXES)}); is --split right?"
            )
    return found


def _read_image(
    root: Path, file: Path, label: str, transform: ImageTransform | None
) -> ImageExample:
    state = file.stat()
    digest, mode, size = _looked_at(file, state.st_mtime_ns, state.st_size)
    if transform is not None:
        transform.require(mode, size, str(file))
    below = file.relative_to(root).as_posix()
    return ImageExample("", below, digest, label, (label,), file)


@cache
def _looked_at(file: Path, changed: int, length: int) -> tuple[str, str, tuple[int, int]]:
    """Reads a file once: a digest of its content, and the image's mode and (W, H).

    Raises:
        ValueError: if it is no image, or is damaged.
    """
    content = file.read_bytes()
    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
            return sha256(content).hexdigest()[:16], image.mode, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: cannot be read as an image ({error})") from error


# --- splits ---


def _split(
    folder: Path, rows: tuple[ImageExample, ...], part: str, seed: int
) -> tuple[tuple[ImageExample, ...], tuple[ImageExample, ...]]:
    """Returns the images of a class that stay, and those that are held out, at least one each."""
    count = max(1, round(_HELD_OUT[part] * len(rows)))
    if count >= len(rows):
        raise ValueError(
            f"{folder}: got {len(rows)} images, of which {count} would be held out for {part}, "
            "expected more"
        )
    name = f"{seed}/{rows[0].input}/{part}"
    chosen = set(random.Random(name).sample(range(len(rows)), count))
    return (
        tuple(row for index, row in enumerate(rows) if index not in chosen),
        tuple(row for index, row in enumerate(rows) if index in chosen),
    )


def _grouped(classes: list[str], per_task: int | None, order: str, seed: int) -> list[list[str]]:
    if per_task is None:
        raise ValueError("classes_per_task: got none, which split 'classes' needs")
    require_count("classes_per_task", per_task)
    if len(classes) % per_task:
        raise ValueError(
            f"classes_per_task: got {per_task} for {len(classes)} classes, expected a divisor"
        )
    if order == "seeded":
        random.Random(f"{seed}/classes").shuffle(classes)
    return [classes[start : start + per_task] for start in range(0, len(classes), per_task)]


def _require_same_classes(named: dict[str, _Parts]) -> None:
    first, *others = named
    expected = named[first]["train"].keys()
    for name in others:
        if (found := named[name]["train"].keys()) != expected:
            raise ValueError(
                f"{name}: differs from {first} in the classes {sorted(found ^ expected)}, expected "
                "the same classes in each domain; with other classes in each, use split 'tasks'"
            )


def _require_own_classes(named: dict[str, _Parts]) -> None:
    owner: dict[str, str] = {}
    for name, parts in named.items():
        for label in parts["train"]:
            if label in owner:
                raise ValueError(
                    f"{name}: has the class {label!r}, as has the task {owner[label]!r}; expected "
                    "each class in one task. Rename the folder of one, or use split 'domains' if "
                    "both mean the same"
                )
            owner[label] = name


def _warned(root: Path, tasks: list[TaskData]) -> list[TaskData]:
    """Warns of test images that are training images too; returns the tasks."""
    trained = {row.prompt for task in tasks for row in task.train}
    tested = [row.input for task in tasks for row in task.test if row.prompt in trained]
    if tested:
        logger.warning(
            "%s: %d test images are also training images, so scores are too high; one is %s",
            root,
            len(tested),
            tested[0],
        )
    return tasks


def _task(name: str, parts: _Parts, classes: Sequence[str]) -> TaskData:
    rows: dict[str, Any] = {
        part: tuple(
            ImageExample(name, row.input, row.prompt, row.output, row.outputs, row.source)
            for label in classes
            for row in parts[part][label]
        )
        for part in _PARTS
    }
    return TaskData(name, IMAGES, "", labels=tuple(classes), **rows)
