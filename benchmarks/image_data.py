"""Image folders as tensors, their tasks, and the frozen states of a model, kept on disk."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZE = 56  # pixels a side, 4 x 4 patches
# Mean and deviation of ImageNet's pixels, with which DINOv2 was trained.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES_A_TASK = {"emoji": 4, "mnist": 2, "digits": 2}
_BATCH = 50


@dataclass(frozen=True)
class Split:
    """Frozen states of images, in the order of their files.

    Attributes:
        labels: [N] int64, indices of `names`.
        names: C class names, sorted.
        states: by name, for example "mean.9": [N, D] or [N, T, D] float32.
    """

    labels: Tensor
    names: tuple[str, ...]
    states: dict[str, Tensor]


def tasks_of(names: tuple[str, ...], size: int, seed: int) -> list[list[int]]:
    """Returns the classes of each task, in an order that the seed draws."""
    order = random.Random(f"order {seed}").sample(range(len(names)), len(names))
    return [sorted(order[start : start + size]) for start in range(0, len(order), size)]


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Returns a mask [N] of as many rows of each class: the share that settings are chosen by."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    draws = torch.Generator().manual_seed(seed)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        drawn = torch.randperm(len(rows), generator=draws)[: round(share * len(rows))]
        mask[rows[drawn]] = True
    return mask


def read_split(folder: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """Returns the files of `<class>/*.png`, their labels [N] and the names of the classes."""
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    files = [sorted((folder / name).glob("*.png")) for name in names]
    labels = [label for label, group in enumerate(files) for _ in group]
    return [path for group in files for path in group], torch.tensor(labels), names


def pixels_of(files: list[Path]) -> Tensor:
    """Returns normalised images [N, 3, 56, 56]."""
    images = []
    for path in files:
        image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    scaled = torch.stack(images).float() / 255
    return (scaled - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1)


@torch.no_grad()
def frozen_states(model: Any, pixels: Tensor, below: int) -> dict[str, Tensor]:
    """Returns states of the frozen model.

    Args:
        model: a `Dinov2Model`.
        pixels: [N, 3, 56, 56].
        below: of the state [N, T, D] to keep as "below": the input of that layer, from 0.

    Returns:
        "below"; "mean.9" [N, D], the mean patch after nine layers; "cls.9" and "cls.11" [N, D], the
        CLS token after nine and eleven layers; none has the final norm.
    """
    parts = []
    for batch in pixels.split(_BATCH):
        states = model(batch, output_hidden_states=True).hidden_states
        parts.append(
            {
                "below": states[below],
                "mean.9": states[9][:, 1:].mean(1),
                "cls.9": states[9][:, 0],
                "cls.11": states[11][:, 0],
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def load_split(folder: Path, model: Path, work: Path, *, below: int = 5) -> Split:
    """Returns the states of a folder's images, from `work` if they were computed before.

    Args:
        folder: of `<class>/*.png`.
        model: the folder of a `Dinov2Model`.
        work: where the states are kept, by a digest of model and images.
        below: as in `frozen_states`.
    """
    files, labels, names = read_split(folder)
    digest = hashlib.sha256(f"{below} {SIZE}".encode())
    for path in (model / "model.safetensors", *files):
        digest.update(path.read_bytes())
    kept = work / f"{folder.parent.name}-{folder.name}-{digest.hexdigest()[:16]}.safetensors"
    if not kept.exists():
        from transformers import Dinov2Model

        start = time.monotonic()
        states = frozen_states(Dinov2Model.from_pretrained(model).eval(), pixels_of(files), below)
        work.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(".draft")
        save_file(states, draft)
        draft.replace(kept)
        print(f"{folder}: {len(files)} images in {time.monotonic() - start:.0f} s", flush=True)
    return Split(labels, names, load_file(kept))
