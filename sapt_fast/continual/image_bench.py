"""Image classification in a continual run: how images become batches, and how they are scored.

One head has a row for every class of the run, in learning order, and starts at zero. Training masks
the rows of other tasks' classes; prediction never does, and the task of an image is not known.
Instead of the head, a head in closed form may predict: its statistics of the features are updated
when a task ends (`continual.closed_form`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from sapt_fast.continual.closed_form import ClassStatistics
from sapt_fast.continual.data.classes import ClassSpace
from sapt_fast.continual.data.image_folders import ImageExample, class_tasks
from sapt_fast.continual.data.image_transform import ImageTransform
from sapt_fast.continual.data.rows import Example, TaskData
from sapt_fast.continual.registry import strategies
from sapt_fast.continual.run import processes
from sapt_fast.continual.run.evaluate import Mixture, require_scores
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.workbench import Workbench
from sapt_fast.methods.task_config import TaskConfig
from sapt_fast.routing.images import ImageRouting
from sapt_fast.sites.image_embeddings import vision_parts
from sapt_fast.sites.image_queries import ImageQueries

__all__ = ["ImageBench", "ImageRows"]

HEAD = "classifier"


class ImageRows(Dataset[dict[str, Any]]):
    """Images with their classes, read when they are asked for.

    Args:
        rows: the images.
        transform: makes tensors of them.
        space: gives the class's row of the head.
        augmentation: as `ImageTransform.augmented`.
        seed: of the augmentation, which also depends on the image and the epoch.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        transform: ImageTransform,
        space: ClassSpace,
        augmentation: str = "none",
        seed: int = 0,
    ) -> None:
        self.rows, self.transform, self.space = rows, transform, space
        self.augmentation, self.seed = augmentation, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, before each one and when training resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: Any = self.rows[index]
        draw = random.Random(f"{self.seed}/{self.epoch}/{row.input}")
        pixels = self.transform.augmented(row.image(), self.augmentation, draw)
        return {"pixel_values": pixels, "labels": self.space.index(row.output)}


class ImageBench(Workbench):
    """The model, transform and settings of a run on images.

    Args:
        model: an image classifier of transformers, whose `classifier` is a linear layer.
        transform: turns images into tensors; in place of a tokenizer.
        settings: the run's settings.

    Raises:
        ValueError: if the model has no such head, or does not take the transform's images.
        ValueError: if a setting does not fit images.
    """

    has_images = True
    causal = writes = False
    kind = "images"
    pseudo_samples = None
    classes: ClassSpace

    def __init__(self, model: Any, transform: ImageTransform, settings: ContinualSettings) -> None:
        self.model, self.tokenizer, self.settings = model, transform, settings
        self.transform = transform
        parts = vision_parts(model)
        if not isinstance(getattr(model, HEAD, None), nn.Linear):
            raise ValueError(
                f"model: got {type(model).__name__}, expected an image classifier with a linear "
                f"layer {HEAD!r}; load it with AutoModelForImageClassification"
            )
        parts.require_images(torch.zeros(1, transform.channels, *transform.size))
        if settings.metric not in (None, "exact_match"):
            raise ValueError(f"metric: got {settings.metric!r}, expected 'exact_match' for images")
        self.queries = ImageQueries(model, settings.sapt.query_layer, settings.sapt.query_pooling)
        kind: Any = strategies()[settings.strategy]
        if kind.head and settings.head not in ("own", kind.head):
            raise ValueError(
                f"head: got {settings.head!r}, expected {kind.head!r} for strategy "
                f"{settings.strategy!r}"
            )
        if kind.pseudo and settings.replay not in ("real", "none"):
            raise ValueError(
                f"replay: got {settings.replay!r}, expected 'real' or 'none' for images"
            )
        self.head: str = kind.head or settings.head
        self.features = "frozen" if kind.head else settings.head_features
        self.masks = settings.mask_classes and kind.trains and not kind.together
        self.own_classes_only = kind.own_classes_only
        self.statistics: dict[str, ClassStatistics] = {}
        self.task_count = 0
        self.choices = torch.zeros(0, 0, dtype=torch.int64)

    def prepare(self, tasks: Sequence[TaskData]) -> tuple[TaskData, ...]:
        """Checks the tasks, and collects their classes.

        Raises:
            ValueError: if the head does not have a row for each class, a row is no image, its class
                is not one of its task's, or a task with one class is masked in training.
        """
        names, head = class_tasks(tasks), getattr(self.model, HEAD)
        if head.out_features != len(names):
            raise ValueError(
                f"model: got a head of {head.out_features} classes, expected {len(names)}, those "
                "of all tasks; load it with num_labels"
            )
        for task in tasks:
            self._check_task(task, alone=len(names) == 1)
        if self.own_classes_only and sum(len(task.labels or ()) for task in tasks) > len(names):
            raise ValueError(
                f"strategy: {self.settings.strategy!r} tells tasks apart by their classes, but "
                "some are in two tasks; expected tasks without common classes"
            )
        self.classes, self.task_count = ClassSpace(names), len(tasks)
        # [T, C], the classes of each task.
        self.owners = torch.tensor([[name in (t.labels or ()) for name in names] for t in tasks])
        wanted = set() if self.head == "own" else {self.features}
        wanted |= {"frozen"} if self.own_classes_only else set()
        widths = {"frozen": self.queries.width, "method": head.in_features}
        self._widths = {name: widths[name] for name in sorted(wanted)}
        self.load_state({})
        return tuple(tasks)

    def _check_task(self, task: TaskData, alone: bool) -> None:
        labels = task.labels or ()
        for split in ("train", "dev", "test"):
            for row in getattr(task, split):
                if not isinstance(row, ImageExample) or row.output not in labels:
                    raise ValueError(
                        f"tasks: {task.name!r} has a {split} row of class {row.output!r} "
                        f"({type(row).__name__}), expected images of {', '.join(labels)}"
                    )
        if len(labels) == 1 and self.masks and not alone:
            raise ValueError(
                f"mask_classes: got a task with one class, {labels[0]!r}, whose masked loss is "
                "always 0; expected more classes per task, or --no-mask-classes"
            )

    def describe(self) -> dict[str, Any]:
        """Returns the transform, and the classes in the order of the head's rows."""
        return {"transform": self.transform.to_dict(), "classes": list(self.classes.classes)}

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        device: torch.device = getattr(self.model, HEAD).weight.device
        return device

    def configure(self, config: TaskConfig[Any]) -> TaskConfig[Any]:
        """Returns the settings of the adapters, with the head among the modules that train."""
        saved = list(config.modules_to_save or ())
        return config if HEAD in saved else replace(config, modules_to_save=[*saved, HEAD])

    # --- batches ---

    def inputs(self, rows: Sequence[Example]) -> Sequence[Any]:
        """Returns the examples: images are read when they are padded."""
        return rows

    def encode(self, rows: Sequence[Example]) -> Any:
        """Returns the examples as `ImageRows`, without augmentation."""
        return ImageRows(rows, self.transform, self.classes)

    def encode_task(self, task: TaskData) -> Any:
        """Returns the training images of a task as `ImageRows`, with augmentation."""
        settings = self.settings
        return ImageRows(
            task.train, self.transform, self.classes, settings.augmentation, settings.seed
        )

    def pad(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Returns the images [B, C, H, W] of examples, on the device."""
        return (torch.stack([self.transform(row.image()) for row in inputs]).to(self.device),)

    def routing_inputs(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """Returns the images of examples, for a router."""
        return {"pixel_values": self.pad(inputs)[0]}

    @property
    def collator(self) -> Any:
        """A function that makes a batch: `pixel_values` [B, C, H, W] and `labels` [B, 1]."""
        return _collated

    def space_of(self, task: TaskData) -> ClassSpace:
        """Returns the classes, masked to those of the task in training if the settings say so."""
        return self.classes.of_task(task.labels or ()) if self.masks else self.classes

    # --- predictions ---

    @torch.no_grad()
    def answers(self, rows: Sequence[Example], mixture: Mixture | None = None) -> list[str]:
        """Returns the predicted class of each image; the model stays in evaluation mode.

        Several processes divide the batches, and each returns all answers.

        Raises:
            ValueError: if logits are NaN or Inf: training has diverged.
        """
        self.model.eval()
        head = None if self.head == "own" else self._closed_head(self.head, self.features)
        found: list[list[int]] = []
        with self.seeded():
            for pixels in self._shared_batches(rows, "predicting"):
                weights = None if mixture is None else mixture(pixels, None)
                if head is None:
                    scores = self._forward(pixels, weights)[0]
                else:
                    scores = head(self.features_of(self.features, pixels, weights))
                if self.own_classes_only and weights is not None:
                    own = self.owners.to(scores.device)[weights.argmax(-1)]
                    scores = scores.masked_fill(~own, -torch.inf)
                found.append(scores.argmax(-1).tolist())
        names = self.classes.classes
        return [names[place] for batch in processes.gathered(found) for place in batch]

    def score(self, rows: Sequence[Example], benchmark: str, mixture: Mixture | None) -> float:
        """Returns the accuracy in percent; names of classes are compared as they are."""
        found = zip(self.answers(rows, mixture), rows, strict=True)
        return 100.0 * sum(answer == row.output for answer, row in found) / len(rows)

    @torch.no_grad()
    def mean_attention(self, rows: Sequence[Example], mixture: Mixture | None) -> Tensor:
        """Returns the mean over the images of the adapters' weights, [K] float32 on the CPU."""
        self.model.eval()
        sums = []
        for pixels in self._shared_batches(rows, "routing"):
            weights = None if mixture is None else mixture(pixels, None)
            if weights is None:
                weights = self.handle.route(pixel_values=pixels)
            sums.append(weights.double().expand(len(pixels), -1).sum(0).cpu())
        return (torch.stack(processes.gathered(sums)).sum(0) / len(rows)).float()

    def task_of(self, pixels: Tensor, learned: int) -> Tensor:
        """Returns the task [B] whose classes are likeliest by LDA on the frozen features.

        Args:
            pixels: [B, C, H, W].
            learned: number of tasks to choose among, the first ones.
        """
        scores = self._closed_head("lda", "frozen")(self.features_of("frozen", pixels, None))
        own = self.owners[:learned].to(scores.device)
        logs = [scores.masked_fill(~classes, -torch.inf).logsumexp(-1) for classes in own]
        return torch.stack(logs, -1).argmax(-1)

    @torch.no_grad()
    def features_of(self, which: str, pixels: Tensor, weights: Tensor | None) -> Tensor:
        """Returns features of images for a head in closed form.

        Args:
            which: "method" for what the model's head reads, [B, head.in_features]; "frozen" for
                what the base model computes, [B, D] (`ImageQueries`).
            pixels: [B, C, H, W].
            weights: of the adapters; None for the router's.
        """
        if which == "method":
            return self._forward(pixels, weights)[1]
        with self.settings.autocast(pixels.device):
            return self.queries(pixels).float()

    def _forward(self, pixels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the logits [B, C], and the head's inputs [B, head.in_features], float32.

        Raises:
            ValueError: if logits are NaN or Inf.
        """
        read: list[Tensor] = []
        hook = getattr(self.model, HEAD).register_forward_pre_hook(
            lambda module, args: read.append(args[0])
        )
        try:
            with self.settings.autocast(pixels.device):
                logits: Tensor = self.model(pixel_values=pixels, mixture=weights).logits
        finally:
            hook.remove()
        return require_scores(logits.float()), read[-1].float()

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """A context in which what is drawn depends on the seed alone, as `choice="random"` does."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed)
            yield

    def _shared_batches(self, rows: Sequence[Example], what: str) -> Iterator[Tensor]:
        size = self.settings.eval_batch_size
        starts = processes.share(range(0, len(rows), size))
        for start in tqdm(
            starts, desc=f"{what} {rows[0].task}", leave=False, disable=not self.settings.progress
        ):
            yield self.pad(rows[start : start + size])[0]

    # --- heads in closed form ---

    def _closed_head(self, head: str, features: str) -> Any:
        statistics, settings = self.statistics[features], self.settings
        if head == "ncm":
            return statistics.nearest_class_mean()
        if head == "lda":
            return statistics.lda(settings.lda_shrinkage)
        return statistics.ridge(settings.ridge_strength)

    def reset(self) -> None:
        """Sets the head to zero; call this while the model is not patched."""
        with torch.no_grad():
            for parameter in getattr(self.model, HEAD).parameters():
                parameter.zero_()

    @torch.no_grad()
    def end_task(self, task: TaskData, mixture: Mixture | None) -> None:
        """Adds the features of the task's training images to the statistics.

        Notes how often each prompt was chosen for them, if the method counts that.
        """
        self.model.eval()
        picked = getattr(self.handle, "picked", None)
        if picked is not None:
            seen = self.choices.sum(0) if len(self.choices) else torch.zeros_like(picked.cpu())
            new = (picked.cpu() - seen)[None]
            self.choices = torch.cat([self.choices, new]) if len(self.choices) else new
        for which, statistics in self.statistics.items():
            for start in range(0, len(task.train), self.settings.eval_batch_size):
                rows = task.train[start : start + self.settings.eval_batch_size]
                (pixels,) = self.pad(rows)
                weights = mixture(pixels, None) if mixture and which == "method" else None
                labels = torch.tensor([self.classes.index(row.output) for row in rows])
                statistics.update(self.features_of(which, pixels, weights), labels)

    @torch.no_grad()
    def report(self, tasks: Sequence[TaskData]) -> dict[str, Any]:
        """Returns which prompts were chosen, of a method that chooses prompts: `prompts`.

        - testing: [T][M], how often each prompt is chosen for a task's scored images after the
          last task.
        - training: [T][M], the same for its training images when it was learned, if the method
          counts that; and `overlap`, sum_m min(training, testing) of the shares, for each task.
        - effective_number: exp(H) of all choices in testing, 1 to M.
        """
        self.model.eval()
        with self.seeded():
            rows = [self._chosen(getattr(task, self.settings.scored)) for task in tasks]
        if any(row is None for row in rows):
            return {}
        testing = torch.stack([row for row in rows if row is not None]).double()
        entry: dict[str, Any] = {
            "testing": testing.long().tolist(),
            "effective_number": effective_number(testing.sum(0)),
        }
        if len(self.choices) == len(testing) and self.choices.shape == testing.shape:
            shares = [counts / counts.sum(1, True) for counts in (self.choices.double(), testing)]
            entry["training"] = self.choices.tolist()
            entry["overlap"] = torch.minimum(*shares).sum(1).tolist()
        return {"prompts": entry}

    def _chosen(self, rows: Sequence[Example]) -> Tensor | None:
        """Returns how often each prompt is chosen, [M] int64; None if no prompts are chosen."""
        handle = self.handle
        if not isinstance(handle.routing, ImageRouting) or handle.method not in _CHOOSING:
            return None
        total = _CHOOSING[handle.method](handle)
        counts = torch.zeros(total, dtype=torch.int64)
        for (pixels,) in self.batches(rows):
            index = handle.signal(pixel_values=pixels)
            counts += torch.bincount(index.flatten().cpu(), minlength=total)
        return counts

    def state(self) -> dict[str, Tensor]:
        state = {
            f"statistics.{which}.{name}": tensor
            for which, statistics in self.statistics.items()
            for name, tensor in statistics.state_dict().items()
        }
        return {**state, "choices": self.choices} if len(self.choices) else state

    def require_state(self, state: Mapping[str, Tensor], folder: Path) -> None:
        for which in self._widths:
            if not any(name.startswith(f"statistics.{which}.") for name in state):
                head = "lda" if self.own_classes_only else self.head
                raise ValueError(
                    f"head: got {head!r}, but {folder} has no statistics of {which} features; "
                    "expected the head of the run, 'own' or that of its settings"
                )

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.statistics = {}
        for which, width in self._widths.items():
            made = ClassStatistics(width, len(self.classes.classes))
            prefix = f"statistics.{which}."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            if own:
                made.load_state_dict(own)
            self.statistics[which] = made
        self.choices = state.get("choices", torch.zeros(0, 0, dtype=torch.int64))


# The number of prompts of the methods that choose some of them, by their names.
_CHOOSING: dict[str, Callable[[Any], int]] = {
    "l2p_images": lambda handle: int(handle.config.prompts),
    "dualprompt": lambda handle: len(handle.tasks),
}


def effective_number(counts: Tensor) -> float:
    """Returns exp(H) of counts [M]: M if all are equal, 1 if one has all."""
    shares = counts[counts > 0] / counts.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _collated(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    labels = torch.tensor([[row["labels"]] for row in rows])
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}
