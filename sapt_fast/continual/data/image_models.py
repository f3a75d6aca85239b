"""Loads an image classifier with its transform, and makes the generated demo tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sapt_fast.continual.data.image_folders import IMAGES, ImageExample
from sapt_fast.continual.data.image_transform import ImageTransform
from sapt_fast.continual.data.models import DEMO, load_config, torch_dtype, with_attention
from sapt_fast.continual.data.rows import TaskData

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DEMO_IMAGES", "demo_image_tasks", "load_image_model", "load_image_transform"]

DEMO_IMAGES = "demo-images"
_DEMO_ROWS = {"train": 24, "dev": 4, "test": 10}


def load_image_model(model: str, dtype: str, attention: str | None, classes: int) -> Any:
    """Loads an image classifier whose head has a row for every class.

    The head that was stored is not used: the run starts it at zero.

    Args:
        model: folder or name of a transformers model, or "demo".
        dtype: one of `models.DTYPES`.
        attention: attention implementation; None for the model's own.
        classes: number of classes.

    Raises:
        ValueError: if the model is no image classifier, or does not have this `attention`.
        OSError: if there is no such model.
    """
    if model == DEMO:
        from sapt_fast.demo.images import demo_vision_model

        return with_attention(demo_vision_model(classes, torch_dtype(dtype)), attention)
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    config = load_config(model)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"model: got {model!r} (model type {config.model_type!r}), expected an image model "
            "that AutoModelForImageClassification loads"
        )
    loaded = transformers.AutoModelForImageClassification.from_pretrained(
        model, num_labels=classes, ignore_mismatched_sizes=True, dtype=torch_dtype(dtype)
    )
    return with_attention(loaded, attention)


def load_image_transform(model: str, image_size: int | None, convert: bool) -> ImageTransform:
    """Makes the transform of a model's image processor.

    Args:
        model: folder or name of a transformers model, or "demo".
        image_size: height and width of the images, instead of the processor's.
        convert: whether to convert images of other modes.

    Raises:
        ValueError: if the model has no preprocessor_config.json, or it gives no size.
    """
    if model == DEMO:
        from sapt_fast.demo.images import DEMO_IMAGE_SIZE

        half = (0.5, 0.5, 0.5)
        edge = image_size or DEMO_IMAGE_SIZE
        return ImageTransform((edge, edge), (edge, edge), mean=half, std=half, convert=convert)
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except OSError as error:
        raise ValueError(
            f"model: {model} has no preprocessor_config.json, which gives size and normalisation "
            "of its images; save it with AutoImageProcessor.save_pretrained"
        ) from error
    config = load_config(model)
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    return ImageTransform.of_processor(
        values, channels=channels, image_size=image_size, convert=convert
    )


def demo_image_tasks(seed: int = 0) -> list[TaskData]:
    """Returns three tasks of two generated classes each."""
    from sapt_fast.demo.images import DEMO_CLASSES, demo_image

    def rows(task: str, labels: tuple[str, ...], part: str) -> tuple[ImageExample, ...]:
        made = []
        for label in labels:
            for number in range(_DEMO_ROWS[part]):
                name = f"{part}/{number}/{seed}"
                image: Image.Image = demo_image(label, name)
                made.append(ImageExample(task, f"{label}/{name}", "", label, (label,), image))
        return tuple(made)

    tasks = []
    for number, start in enumerate(range(0, len(DEMO_CLASSES), 2), start=1):
        name, labels = f"classes{number}", DEMO_CLASSES[start : start + 2]
        parts = {part: rows(name, labels, part) for part in _DEMO_ROWS}
        tasks.append(TaskData(name, IMAGES, "", labels=labels, **parts))
    return tasks
