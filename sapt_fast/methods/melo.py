"""MELO: mends answers of a model by blocks of LoRA that a codebook chooses.

Yu et al., "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", AAAI 2024.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.edits.fitting import gives, losses_of, present_answers, require_finite
from sapt_fast.methods.edits.handle import EditHandle, Pair, evaluating, require_finite_keys
from sapt_fast.methods.edits.inputs import Edit
from sapt_fast.methods.edits.sites import default_targets, device_of, in_decoder, widths_of
from sapt_fast.methods.edits.texts import EditTexts, held_below, kind_of
from sapt_fast.methods.task_config import require
from sapt_fast.pools.clusters import Clusters
from sapt_fast.sites.edit_blocks import BlockOutput, Blocks, KeyOutput
from sapt_fast.sites.output import find_outputs
from sapt_fast.sites.report import PatchReport
from sapt_fast.storage.tensors import require_finite as require_finite_values

__all__ = ["MeloConfig", "MeloHandle"]

logger = logging.getLogger(__name__)


@dataclass
class MeloConfig(MethodConfig["MeloHandle"]):
    """Where edits are looked up and where their blocks act, and how blocks are trained."""

    key_module: str | None = field(
        default=None,
        metadata={
            "help": "Path of the layer by whose output prompts are looked up. None: the first of "
            "target_modules one block lower or, in the first block, the last linear layer before "
            "its MLP."
        },
    )
    target_modules: tuple[str, ...] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers to which blocks are added: last parts of paths, or one regular "
            "expression. None: the last projection of an MLP, by the model's type."
        },
    )
    keys: str = field(
        default="last",
        metadata={
            "help": "What prompts are looked up by: the output at the prompt's last token (last), "
            "its mean over the prompt (mean), or what `model.melo.look_up_by` computes (function)."
        },
    )
    r: int = field(default=4, metadata={"help": "The rank of a block."})
    scaling: float = field(default=1.0, metadata={"help": "s, by which a block is multiplied."})
    radius: float = field(default=1.0, metadata={"help": "The smallest radius of a cluster."})
    steps: int = field(default=200, metadata={"help": "The largest number of training steps."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Adam's learning rate."})
    margin: float = field(
        default=0.1,
        metadata={
            "help": "Training ends once each token of the targets leads by this much (logits)."
        },
    )

    def __post_init__(self) -> None:
        allowed = ("last", "mean", "function")
        require(self.keys in allowed, "keys", self.keys, f"one of {', '.join(allowed)}")
        for name in ("r", "steps"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, name, value, "an integer, at least 1")
        for name in ("scaling", "radius", "learning_rate"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "a positive number")
        require(self.margin >= 0, "margin", self.margin, "at least 0")
        if isinstance(self.target_modules, list):
            self.target_modules = tuple(self.target_modules)

    @property
    def method(self) -> str:
        """The name of the method."""
        return "melo"


class MeloHandle(EditHandle):
    """`model.melo`: edits, each with a point in a cluster, and blocks of LoRA that they share.

        y' = y + s B_k A_k x,  k the block of the point nearest to q in the cluster nearest to q

    q is the output of `key_module` at the prompt's last token. The edits that are trained together
    share a block. No block acts on a prompt outside of all clusters, which gives the same bits as
    before. Decoder-only models are changed from the prompt's last token on, so that a cache of the
    tokens before it stays right.

    This class differs from the paper's code in that training ends once each target is given, and
    in how edits are decided: once, at the prefill.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.melo import MeloConfig
        >>> model = sapt_fast.patch(load_backbone(), MeloConfig(steps=400))
        >>> edits = model.melo.edit([([5, 6, 7], [9, 1]), ([8, 7, 6, 5], [10, 1])])
        >>> len(model.melo.edits)
        2
    """

    Config = MeloConfig
    method = "melo"
    attribute = "melo"

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Finds the layers; raises ValueError if none match, or the keys come too late."""
        targets = config.target_modules
        report = find_outputs(model, default_targets(model) if targets is None else targets)
        key = _key_path(model, config, report.patched)
        order = [path for path, _ in model.named_modules()]
        late = [path for path in report.patched if order.index(path) <= order.index(key)]
        sides = {in_decoder(model, path) for path in [key, *report.patched]}
        if late or len(sides) > 1:
            raise ValueError(
                f"key_module: got {key}, expected a layer that runs before {report.patched[0]}, on "
                "the same side of an encoder-decoder model"
            )
        report.patched = [key, *report.patched]
        return report

    def make(self, path: str) -> KeyOutput | BlockOutput:
        """Returns the module for a layer: the first one looks up, the others have blocks."""
        layer, config = self._model.get_submodule(path), self.config
        inside = in_decoder(self._model, path)
        widths = widths_of(layer, path)
        device = device_of(layer, path)
        key_path = self.report.patched[0]
        if path == key_path:
            clusters = Clusters(widths[1], config.keys == "function", config.radius, device)
            pooling = "mean" if config.keys == "mean" else "last"
            return KeyOutput(path, clusters, self.prompts, pooling, inside)
        replacement = "generation" if kind_of(self._model) == "causal" else "replace_all"
        blocks = Blocks(config.r, widths, device)
        return BlockOutput(
            path, blocks, self.prompts, key_path, replacement, config.scaling, inside
        )

    @property
    def keys(self) -> KeyOutput:
        """The module that looks up."""
        found: KeyOutput = self.modules_at()[self.report.patched[0]]
        return found

    @property
    def layers(self) -> dict[str, BlockOutput]:
        """The modules with blocks, by path."""
        return {path: m for path, m in self.modules_at().items() if isinstance(m, BlockOutput)}

    def parts(self) -> dict[str, nn.Module]:
        """Returns the clusters and the blocks."""
        blocks = {path: layer.blocks for path, layer in self.layers.items()}
        return {self.report.patched[0]: self.keys.clusters, **blocks}

    def set_key_width(self, width: int) -> None:
        """Sets D of empty clusters; raises ValueError if there are points of another width."""
        clusters = self.keys.clusters
        if len(clusters) and clusters.points.shape[1] != width:
            raise ValueError(f"function: got {width} columns, expected {clusters.points.shape[1]}")
        if len(clusters) == 0:
            clusters.points = clusters.points.new_empty(0, width)

    # --- edits ---

    @property
    def edits(self) -> list[Edit]:
        """The edits, oldest first, with the radii of their clusters and how often they acted."""
        clusters = self.keys.clusters
        _, radii, member = clusters.balls()
        found = []
        rows = zip(self.numbered(), member.tolist(), clusters.hits.tolist(), strict=True)
        for (edit, (prompt, target)), cluster, hits in rows:
            radius = None if cluster < 0 else float(radii[cluster])
            found.append(Edit(edit, prompt, target, radius, hits, self.tokenizer))
        return found

    def edit_batch(self, pairs: Sequence[Pair]) -> tuple[list[int | None], list[int]]:
        """Makes edits that share a block; see `EditHandle.edit_batch`."""
        with evaluating(self._model):
            given = present_answers(self.texts(pairs), self.prompts)
            changing = (~given).nonzero().flatten().tolist()
            made: list[int | None] = [None] * len(pairs)
            if not changing:
                return made, []
            pairs = [pairs[i] for i in changing]
            texts = self.texts(pairs)
            points = self._points(texts)
            require_finite_keys(points, self.keys.path)
            block, fits = self._fit(texts)
        missed = [changing[i] for i in (~fits).nonzero().flatten().tolist()]
        if missed:
            return made, missed
        for i, edit in zip(changing, self._add(pairs, points, block), strict=True):
            made[i] = edit
        return made, []

    @torch.no_grad()
    def _points(self, texts: EditTexts) -> Tensor:
        keys = self.keys
        keys.recording = True
        try:
            with self.prompts.given(texts.prompt._replace(decided={})):
                texts.whole()
        finally:
            keys.recording = False
        if keys.recorded is None:
            raise ValueError(f"key_module: {keys.path} takes no part in the model's forward")
        return keys.recorded

    def _fit(self, texts: EditTexts) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Trains one block for all prompts; returns it by path, and whether each target fits."""
        config = self.config
        trained = {path: _new_block(layer.blocks) for path, layer in self.layers.items()}
        parameters = [factor for block in trained.values() for factor in block]
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        lowest = next(iter(trained))
        with (
            _trying(self.keys, self.layers, trained),
            self.prompts.given(texts.prompt._replace(decided={})),
            held_below(self._model, lowest),
        ):
            with torch.no_grad():
                texts.whole()  # from here on, blocks below the lowest are held
            for step in range(config.steps + 1):
                with torch.enable_grad():
                    logits = texts.whole()
                    losses = losses_of(logits, texts.labels)
                require_finite(losses, step)
                fits = gives(logits.detach(), texts.labels, config.margin)
                if step == config.steps or bool(fits.all()):
                    break
                gradients = torch.autograd.grad(losses.sum(), parameters)
                for factor, gradient in zip(parameters, gradients, strict=True):
                    factor.grad = gradient
                optimizer.step()
        return trained, fits

    def _add(
        self,
        pairs: Sequence[Pair],
        points: Tensor,
        block: dict[str, tuple[Tensor, Tensor]],
    ) -> list[int]:
        before, clusters = self.present(), self.keys.clusters
        number = len(next(iter(self.layers.values())).blocks)
        for path, layer in self.layers.items():
            layer.blocks.add(*block[path])
        edits = self.log.add([p for p, _ in pairs], [t for _, t in pairs])
        clusters.add(points, edits.to(clusters.edits.device), number)
        for edit, (prompt, _) in zip(edits.tolist(), pairs, strict=True):
            old = before.get(tuple(prompt.tolist()))
            if old is not None:
                clusters.replace(old, edit)
        strays = clusters.strays()
        if strays:
            logger.warning(
                "clusters: the prompts of edits %s are nearer to another cluster than to their own "
                "and may get its answers; use a smaller radius than %g", strays, clusters.radius
            )  # fmt: skip
        numbers: list[int] = edits.tolist()
        return numbers

    def remove_edit(self, edit: int) -> None:
        """Removes an edit's point; its block stays, for the edits that share it."""
        self.keys.clusters.remove(edit)

    def require_consistent(self) -> None:
        """Raises ValueError if points and blocks do not fit the log, or are not finite."""
        clusters = self.keys.clusters
        shapes = {name: tuple(buffer.shape) for name, buffer in clusters.named_buffers()}
        same = torch.equal(clusters.edits.cpu(), self.log.edits.cpu())
        if {shape[0] for shape in shapes.values()} != {len(clusters)} or not same:
            raise ValueError(f"{self.keys.path}: got {shapes}, expected one row for each edit")
        counts = {path: len(layer.blocks) for path, layer in self.layers.items()}
        most = int(clusters.blocks.max()) + 1 if len(clusters) else 0
        least = int(clusters.blocks.min()) if len(clusters) else 0
        same_b = all(layer.blocks.b.shape[0] == len(layer.blocks) for layer in self.layers.values())
        if len(set(counts.values())) > 1 or min(counts.values()) < most or least < 0 or not same_b:
            raise ValueError(f"blocks: got {counts}, expected at least {most} in each layer")
        for path, part in self.parts().items():
            require_finite_values(path, dict(part.named_buffers()))


def _key_path(model: Any, config: MeloConfig, targets: Sequence[str]) -> str:
    """Returns the path of the layer that looks up.

    Raises:
        ValueError: if there is no such layer, or no block below the targets.
    """
    paths = {path for path, _ in model.named_modules()}
    if config.key_module is not None:
        if config.key_module not in paths:
            raise ValueError(f"key_module: the model has no layer {config.key_module!r}")
        return config.key_module
    names = targets[0].split(".")
    number = next((i for i, name in enumerate(names) if name.isdigit()), None)
    if number is not None:
        below = [*names]
        below[number] = str(int(names[number]) - 1)
        if ".".join(below) in paths:
            return ".".join(below)
        block, mlp = ".".join(names[: number + 1]), targets[0].rpartition(".")[0]
        for path, module in reversed([*model.named_modules()]):
            in_block = path.startswith(f"{block}.") and not path.startswith(f"{mlp}.")
            if in_block and isinstance(module, (nn.Linear, Conv1D)):
                return path
    raise ValueError(f"key_module: got None, and no layer before {targets[0]} is known; name one")


def _new_block(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """A block that changes nothing yet: a [r, I] random, b [r, O] zero."""
    a = torch.empty_like(blocks.a.new_empty(blocks.a.shape[1:]))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a.requires_grad_(True), torch.zeros(blocks.b.shape[1:]).to(a).requires_grad_(True)


@contextmanager
def _trying(
    keys: KeyOutput, layers: dict[str, BlockOutput], block: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Lets one block act on every row."""
    keys.recording = True  # it decides nothing
    for path, layer in layers.items():
        layer.trial = block[path]
    try:
        yield
    finally:
        keys.recording = False
        for layer in layers.values():
            layer.trial = None
