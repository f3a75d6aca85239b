"""Image folders and settings for tests of image benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sapt_fast import SaptConfig
from sapt_fast.continual.data.image_models import demo_image_tasks, load_image_transform
from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.demo.images import demo_image, demo_vision_model


def write_images(folder: Path, classes: Any, count: int, size: int = 16) -> None:
    """Writes generated images <folder>/<class>/<number>.png."""
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(count):
            image = demo_image(label, f"{folder.name}/{number}").resize((size, size))
            image.save(folder / label / f"{number}.png")


def image_tasks(count: int = 3, train: int = 4, held_out: int = 2) -> list[TaskData]:
    """Tasks of two classes, with `train` images of each class."""

    def few(rows: Any, number: int) -> Any:
        half = len(rows) // 2
        return rows[:number] + rows[half : half + number]

    return [
        replace(
            task, train=few(task.train, train), dev=few(task.dev, 1), test=few(task.test, held_out)
        )
        for task in demo_image_tasks()[:count]
    ]


def image_model(tasks: Any) -> tuple[Any, Any]:
    """A tiny ViT with a head for all classes of the tasks, and its transform."""
    classes = len({label for task in tasks for label in task.labels})
    return demo_vision_model(classes), load_image_transform("demo", None, False)


def image_settings(**options: Any) -> ContinualSettings:
    defaults = {
        "sapt": SaptConfig(r=2, lora_alpha=4),
        "learning_rate": 1e-2,
        "steps": 2,
        "save_steps": 1,
        "batch_size": 4,
        "accumulation": 1,
        "device": "cpu",
        "progress": False,
    }
    return ContinualSettings(**{**defaults, **options})
