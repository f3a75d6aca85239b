"""Memory and time of the recipes by formulas; nothing here is measured.

    python recipes/estimate.py            # prints the line that stands in each recipe
    python recipes/estimate.py --write    # puts it there

Memory: frozen weights in float32 (autocast casts them as they are used), adapters of all tasks
with gradients and AdamW's two moments for one, and activations of a micro-batch at full length,
tokens * layers * (34 width + 5 heads * length) bytes without recomputation and
tokens * layers * 2 width bytes with it, plus one layer (Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models, 2022). Time: 4 operations per weight and token (forward,
and backward to the inputs alone; 6 with recomputation) at 40 % of an H100's 989 TFLOP/s in
bfloat16, every row at full length; evaluation and the generators are left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml

from sapt_fast.continual.data.orders import resolve_order
from sapt_fast.continual.settings import ContinualSettings

FOLDER = Path(__file__).parent
MARK = "# Estimate, not measured: "
FLOPS = 0.4 * 989e12
# Training rows of all 15 tasks of a benchmark.
ROWS = {"superni": 15 * 1000, "long_sequence": 55_650}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `decoder_layers` of an encoder-decoder, 0 for a decoder alone."""

    width: int
    inner: int
    feed_forward: int
    heads: int
    layers: int
    decoder_layers: int
    vocabulary: int

    @property
    def layer(self) -> int:
        """Weights of an encoder layer, or of a decoder alone: attention and a gated network."""
        return 4 * self.width * self.inner + 3 * self.width * self.feed_forward

    @property
    def decoder_layer(self) -> int:
        """Weights of a decoder layer with cross-attention."""
        return self.layer + 4 * self.width * self.inner

    @property
    def weights(self) -> int:
        """All, with input and output embeddings apart."""
        embeddings = 2 * self.vocabulary * self.width
        return embeddings + self.layers * self.layer + self.decoder_layers * self.decoder_layer


SHAPES = {
    "google/flan-t5-large": Shape(1024, 1024, 2816, 16, 24, 24, 32128),
    "google/flan-t5-xl": Shape(2048, 2048, 5120, 32, 24, 24, 32128),
    "google/flan-t5-xxl": Shape(4096, 4096, 10240, 64, 24, 24, 32128),
    "meta-llama/Llama-2-7b-hf": Shape(4096, 4096, 11008, 32, 32, 0, 32000),
    "meta-llama/Llama-2-13b-hf": Shape(5120, 5120, 13824, 40, 40, 0, 32000),
}


def estimate(recipe: dict) -> tuple[float, float]:
    """Bytes of GPU memory and seconds of training of a recipe's run over all its tasks."""
    shape = SHAPES[recipe["model"]]
    settings = ContinualSettings.of(
        recipe["preset"], gradient_checkpointing=recipe.get("gradient_checkpointing")
    )
    source, target = settings.max_source_length, settings.max_target_length
    tasks, recompute = len(resolve_order(recipe["order"])), settings.gradient_checkpointing
    if shape.decoder_layers:
        lengths = [(shape.layers, source), (shape.decoder_layers, target)]
        mixed = 2 * shape.layers + 4 * shape.decoder_layers
        per_row = shape.layers * shape.layer * source
        per_row += shape.decoder_layers * shape.decoder_layer * target
    else:
        lengths, mixed = [(shape.layers, source + target)], 2 * shape.layers
        per_row = shape.layers * shape.layer * (source + target)
    per_row += shape.vocabulary * shape.width * lengths[-1][1]

    adapter = mixed * settings.sapt.r * (shape.width + shape.inner)
    memory = 4.0 * shape.weights + 4.0 * tasks * adapter + 3 * 4.0 * adapter
    layer_bytes = 0.0
    for layers, length in lengths:
        tokens = settings.batch_size * length
        whole = tokens * (34 * shape.width + 5 * shape.heads * length)
        memory += tokens * layers * 2 * shape.width if recompute else layers * whole
        layer_bytes = max(layer_bytes, whole)
    memory += layer_bytes if recompute else 0.0
    # Logits in float32 and their gradient.
    memory += 2 * 4.0 * settings.batch_size * lengths[-1][1] * shape.vocabulary
    work = (6 if recompute else 4) * per_row * ROWS[recipe["benchmark"]] * settings.epochs
    return memory, work / FLOPS


def line(recipe: dict) -> str:
    """What stands in the recipe."""
    memory, seconds = estimate(recipe)
    return f"{MARK}{memory / 1e9:.0f} GB of GPU memory, {seconds / 3600:.1f} h on one H100."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the lines into the recipes")
    write = parser.parse_args().write
    for path in sorted(FOLDER.glob("*.yaml")):
        text = path.read_text()
        now = line(yaml.safe_load(text))
        print(f"{path.name}: {now.removeprefix(MARK)}")
        if write:
            kept = [x for x in text.splitlines() if not x.startswith(MARK)]
            path.write_text("\n".join([kept[0], now, *kept[1:]]) + "\n")


if __name__ == "__main__":
    main()
