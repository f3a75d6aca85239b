"""Turns images into tensors as a model's image processor does, with PIL and torch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sapt_fast.checks import require_choice, require_count, require_number

__all__ = ["ImageTransform"]

_MODES = {1: "L", 3: "RGB"}  # PIL's, by number of channels
_BILINEAR = 2
# By the names of image processors: what their files may leave out, else as ViT's.
_BICUBIC = ("DeiT", "Beit", "Bit", "CLIP", "Siglip")
_CROPPING = ("DeiT", "Bit", "CLIP")
_SHORTEST = ("Bit", "CLIP")  # a size that is a number is that of the shortest edge
_CROP_AREA, _CROP_RATIO = (0.05, 1.0), (3 / 4, 4 / 3)  # those of the original L2P code
_CROP_TRIES = 10


@dataclass(frozen=True)
class ImageTransform:
    """Resizes, crops and normalises an image. In a continual run it replaces the tokenizer.

    torchvision's transforms of PIL images call the same functions of PIL, so results do not depend
    on whether it is installed.

    Args:
        size: (H, W) of the result.
        resize: an int resizes the shorter edge to it, (H, W) the image; None keeps the size.
        crop: whether to cut `size` from the centre.
        mean, std: of each channel, after scaling; None leaves the values as they are.
        scale: factor of the values 0 to 255.
        resample: PIL's number of the filter; 2 is bilinear, 3 bicubic.
        channels: 1 or 3.
        convert: whether to convert images of other modes (grey, palette, transparent, ...).
            Transparent parts become white. Otherwise they are errors.

    Raises:
        ValueError: if sizes do not fit each other, or a value is out of range.

    Example:
        >>> transform = ImageTransform(size=(16, 16), resize=16, crop=True)
        >>> transform(Image.new("RGB", (40, 20))).shape
        torch.Size([3, 16, 16])
    """

    size: tuple[int, int]
    resize: int | tuple[int, int] | None = None
    crop: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float = 1 / 255
    resample: int = _BILINEAR
    channels: int = 3
    convert: bool = False

    def __post_init__(self) -> None:
        require_choice("channels", self.channels, tuple(_MODES))
        for edge in self.size:
            require_count("size", edge)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if (values is None) != (self.mean is None) or (
                values is not None and len(values) != self.channels
            ):
                raise ValueError(f"{name}: got {values}, expected {self.channels} numbers")
        require_number("scale", self.scale, positive=True)
        require_choice("resample", self.resample, tuple(map(int, Image.Resampling)))
        for value in self.mean or ():
            require_number("mean", value, least=-1e9)
        for value in self.std or ():
            require_number("std", value, positive=True)
        if not self.crop and isinstance(self.resize, tuple) and self.resize != self.size:
            raise ValueError(f"resize: got {self.resize} without a crop, expected {self.size}")

    @classmethod
    def of_processor(
        cls,
        values: Mapping[str, Any],
        *,
        channels: int = 3,
        image_size: int | None = None,
        convert: bool = False,
    ) -> ImageTransform:
        """Makes the transform of a model's preprocessor_config.json.

        Args:
            values: the content of the file.
            channels: of the model.
            image_size: height and width of the result, instead of those in the file.
            convert: as in the class.

        Raises:
            ValueError: if the file gives no size, or a value does not fit.
        """
        kind = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
        resize = _edges(values.get("size")) if values.get("do_resize", True) else None
        cropped = values.get("do_center_crop", kind.startswith(_CROPPING))
        crop = _edges(_present(values, "crop_size")) if cropped else None
        if isinstance(resize, int) and not (
            isinstance(values["size"], Mapping) or kind.startswith(_SHORTEST)
        ):
            resize = (resize, resize)
        if image_size is not None:
            require_count("image_size", image_size)
            pair = (image_size, image_size)
            resize, crop = (pair, None) if crop is None else (image_size, pair)
        if isinstance(crop, int):
            crop = (crop, crop)
        target = crop if crop is not None else resize
        if isinstance(target, int):
            raise ValueError(
                f"preprocessor_config.json: size: got shortest_edge {target} without a crop, which "
                "gives images of different sizes; expected height and width, or pass --image-size"
            )
        if target is None:
            raise ValueError(
                "preprocessor_config.json: got neither size nor crop_size, expected the size of "
                "the model's images"
            )
        normalised = values.get("do_normalize", True)
        resample = values.get("resample", 3 if kind.startswith(_BICUBIC) else _BILINEAR)
        return cls(
            size=target,
            resize=resize,
            crop=crop is not None,
            mean=_channels(_present(values, "image_mean"), channels) if normalised else None,
            std=_channels(_present(values, "image_std"), channels) if normalised else None,
            scale=values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0,
            resample=int(resample) if isinstance(resample, int) else resample,
            channels=channels,
            convert=convert,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the image as [C, H, W] float32.

        Raises:
            ValueError: as `require`.
        """
        self.require(image.mode, image.size, "image")
        image = self._converted(image)
        if self.resize is not None:
            image = image.resize(self._resized(image.size), Image.Resampling(self.resample))
        if self.crop:
            (height, width), (across, down) = self.size, image.size
            left, top = (across - width) // 2, (down - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return self._tensor(image)

    def augmented(self, image: Image.Image, augmentation: str, draw: random.Random) -> Tensor:
        """Returns a training image as [C, H, W] float32.

        Args:
            image: the image.
            augmentation: "none"; "flip", half of the images mirrored; or "crop_flip", a random part
                of the image too (5 to 100 % of its area, aspect ratio 3/4 to 4/3), as in the
                original L2P code.
            draw: what is random.
        """
        if augmentation == "none":
            return self(image)
        self.require(image.mode, image.size, "image")
        image = self._converted(image)
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augmentation == "flip":
            return self(image)
        height, width = self.size
        box = _random_box(*image.size, draw)
        return self._tensor(image.resize((width, height), Image.Resampling(self.resample), box))

    def require(self, mode: str, size: tuple[int, int], name: str) -> None:
        """Raises ValueError unless an image has the model's channels and becomes of its size.

        Args:
            mode: PIL's name of the image's mode.
            size: (W, H) of the image.
            name: of the image, for the message.
        """
        expected = _MODES[self.channels]
        if mode != expected and not self.convert:
            raise ValueError(
                f"{name}: got an image of mode {mode!r}, expected {expected!r} ({self.channels} "
                "channels, as the model has); convert the files, or pass --convert-images"
            )
        if mode in ("I", "F") or mode.startswith("I;16"):
            raise ValueError(f"{name}: got an image of mode {mode!r}, expected 8 bits per channel")
        width, height = size if self.resize is None else self._resized(size)
        fits = (height, width) == self.size
        if self.crop:
            fits = height >= self.size[0] and width >= self.size[1]
        if not fits:
            raise ValueError(
                f"{name}: got an image of {height} x {width} pixels, expected "
                f"{'at least ' if self.crop else ''}{self.size[0]} x {self.size[1]}, to which the "
                "model's image processor does not resize"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready description."""
        values = asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    def _converted(self, image: Image.Image) -> Image.Image:
        mode = _MODES[self.channels]
        clear = self.convert and image.has_transparency_data  # also of grey and RGB images
        if image.mode == mode and not clear:
            return image
        if clear:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert(mode)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (W, H) of an image of (W, H) once it is resized."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        shorter, longer = sorted(size)
        other = int(self.resize * longer / shorter)
        return (self.resize, other) if size[0] <= size[1] else (other, self.resize)

    def _tensor(self, image: Image.Image) -> Tensor:
        values = np.array(image, dtype=np.float32) * np.float32(self.scale)
        tensor = torch.from_numpy(values.reshape(*values.shape[:2], self.channels)).permute(2, 0, 1)
        if self.mean is not None and self.std is not None:
            mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
            tensor = (tensor - mean) / std
        return tensor.contiguous()


def _edges(size: Any) -> int | tuple[int, int] | None:
    """Reads a size of a preprocessor_config.json: an edge, (H, W), or None."""
    found = size
    if isinstance(size, Mapping):
        names = {name for name, value in size.items() if value is not None}
        if names == {"shortest_edge"}:
            found = size["shortest_edge"]
        elif names == {"height", "width"}:
            found = (size["height"], size["width"])
    if isinstance(found, (list, tuple)) and len(found) == 2 and all(type(e) is int for e in found):
        return found[0], found[1]
    if found is None or type(found) is int:
        return found
    raise ValueError(
        f"preprocessor_config.json: size: got {size!r}, expected height and width, or shortest_edge"
    )


def _present(values: Mapping[str, Any], name: str) -> Any:
    """Returns a value that the image processor uses."""
    if values.get(name) is None:
        raise ValueError(
            f"preprocessor_config.json: got no {name}, which the image processor uses; save it "
            "again with AutoImageProcessor.save_pretrained"
        )
    return values[name]


def _channels(values: Any, channels: int) -> tuple[float, ...]:
    numbers = [values] * channels if isinstance(values, (int, float)) else values
    return tuple(float(number) for number in numbers)


def _random_box(width: int, height: int, draw: random.Random) -> tuple[float, float, float, float]:
    """Draws a part of an image, (left, top, right, bottom), as torchvision's RandomResizedCrop."""
    for _ in range(_CROP_TRIES):
        area = width * height * draw.uniform(*_CROP_AREA)
        ratio = np.exp(draw.uniform(*np.log(_CROP_RATIO)))
        across, down = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < across <= width and 0 < down <= height:
            left, top = draw.randint(0, width - across), draw.randint(0, height - down)
            return left, top, left + across, top + down
    least, most = _CROP_RATIO
    across, down = min(width, round(height * most)), min(height, round(width / least))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
