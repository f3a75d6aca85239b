"""The model and the tasks of a command, from its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapt_fast.continual.data.image_models import DEMO_IMAGES
from sapt_fast.continual.data.sources import DEMO, Source

__all__ = ["SOURCE_FIELDS", "source_of"]

SOURCE_FIELDS = (
    "model", "benchmark", "data", "kind", "dev", "max_train", "max_eval", "dtype", "attention",
    "split", "classes_per_task", "class_order", "image_size", "convert_images",
)  # fmt: skip


def source_of(values: Mapping[str, Any], preset: str | None, **others: Any) -> Source:
    """Makes a `Source` from options.

    Args:
        values: has all of `SOURCE_FIELDS`.
        preset: of the command; with one, dev rows default to dev.json.
        others: other fields of `Source`.

    Raises:
        ValueError: if a value does not fit, or `dev` is given for the demo's tasks.
    """
    dev, data = values["dev"], values["data"]
    if dev is not None and values["benchmark"] in (DEMO, DEMO_IMAGES):
        raise ValueError(f"dev: got {dev!r}, but the demo's tasks have dev rows of their own")
    if dev is None:
        dev = "from_train" if preset is None else "released"
    given = {name: values[name] for name in SOURCE_FIELDS}
    return Source(**{**given, "dev": dev, "data": None if data is None else str(data), **others})
