"""GRACE: mends single answers of a model by a codebook at one layer, without training the model.

Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.edits.fitting import FittingOptions, fit, present_answers, queries
from sapt_fast.methods.edits.handle import EditHandle, Pair, evaluating, require_finite_keys
from sapt_fast.methods.edits.inputs import Edit, EditError
from sapt_fast.methods.edits.sites import default_targets, device_of, in_decoder, widths_of
from sapt_fast.methods.edits.texts import kind_of
from sapt_fast.methods.grace_released import edit_as_released
from sapt_fast.methods.task_config import require
from sapt_fast.pools.codebook import Codebook, differences
from sapt_fast.sites.edited import REPLACEMENTS, EditedOutput
from sapt_fast.sites.output import find_outputs
from sapt_fast.sites.report import PatchReport
from sapt_fast.storage.tensors import require_finite

__all__ = ["EditError", "GraceConfig", "GraceHandle", "Match"]

RULES = ("fixed", "split", "coverage", "moving_average")
RELEASED = ("coverage", "moving_average")
_REPLACEMENTS = {
    "causal": "generation",
    "encoder-decoder": "per_token",
    "classifier": "replace_all",
}
_SAME = 1e-4  # keys nearer than this share of their length cannot be told apart


@dataclass
class GraceConfig(MethodConfig["GraceHandle"]):
    """Where edits act, how prompts are looked up, and how values are trained.

    `GraceConfig.released` returns the settings of the released code.
    """

    target_modules: tuple[str, ...] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers whose output is replaced: last parts of paths, or one regular "
            "expression. None: the last projection of an MLP, by the model's type."
        },
    )
    keys: str = field(
        default="last",
        metadata={
            "help": "What prompts are looked up by: the layer's input at the prompt's last token "
            "(last), its mean over the prompt (mean), or what `model.grace.look_up_by` computes "
            "(function)."
        },
    )
    radius: float = field(
        default=1.0, metadata={"help": "eps, the largest distance at which an edit acts."}
    )
    ratio: float | None = field(
        default=None,
        metadata={
            "help": "The largest distance to the nearest key as a share of that to the second."
        },
    )
    rule: str = field(
        default="fixed",
        metadata={
            "help": "How radii change: not at all (fixed), halved between keys with different "
            "targets (split), or as released (coverage, moving_average)."
        },
    )
    replacement: str | None = field(
        default=None,
        metadata={
            "help": "The tokens whose output is replaced: the prompt's last and all behind it "
            "(generation), the same with one value per token of the target (per_token), the last "
            "alone (replace_last), those before it (replace_prompt), or all (replace_all). None: "
            "generation for decoder-only models, per_token for encoder-decoder models, else "
            "replace_all."
        },
    )
    steps: int = field(default=100, metadata={"help": "The largest number of training steps."})
    learning_rate: float = field(default=1.0, metadata={"help": "Adam's learning rate."})
    cold: bool = field(
        default=False,
        metadata={"help": "Whether values start at random, else at the layer's own output."},
    )
    margin: float = field(
        default=0.1,
        metadata={
            "help": "Training ends once each token of the target leads by this much (logits)."
        },
    )

    def __post_init__(self) -> None:
        for name, allowed in (("keys", ("last", "mean", "function")), ("rule", RULES)):
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        known = (None, *REPLACEMENTS)
        require(self.replacement in known, "replacement", self.replacement, f"one of {known}")
        for name in ("radius", "learning_rate"):
            value = getattr(self, name)
            require(0 < value < float("inf"), name, value, "a positive number")
        require(self.margin >= 0, "margin", self.margin, "at least 0")
        require(type(self.steps) is int and self.steps >= 1, "steps", self.steps, "at least 1")
        ratio_fits = self.ratio is None or 0 < self.ratio <= 1
        require(ratio_fits, "ratio", self.ratio, "None, or more than 0 and at most 1")
        if self.rule in RELEASED:
            fits = self.keys == "last" and self.ratio is None and self.replacement != "per_token"
            got = f"keys={self.keys}, ratio={self.ratio}, replacement={self.replacement}"
            require(fits, "rule", self.rule, f"fixed or split with {got}")
        if isinstance(self.target_modules, list):
            self.target_modules = tuple(self.target_modules)

    @classmethod
    def released(
        cls,
        target_modules: tuple[str, ...] | list[str] | str,
        *,
        rule: str = "coverage",
        replacement: str = "replace_last",
        **fields: Any,
    ) -> GraceConfig:
        """Returns a config that behaves as the released code.

        Edits with the same label share a value, which later edits train on. Labels are compared by
        the mean of their token ids. The key token is the last one, padding or not, and every
        forward looks up again. All `steps` are taken. Edits cannot be undone.

        Args:
            target_modules: the layer, e.g. `("encoder.block.4.layer.1.DenseReluDense.wo",)`.
            rule: "coverage" or "moving_average".
            replacement: "replace_last", "replace_prompt" or "replace_all".
            **fields: the other fields.
        """
        if rule not in RELEASED:
            raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RELEASED)}")
        return cls(target_modules=target_modules, rule=rule, replacement=replacement, **fields)

    @property
    def is_released(self) -> bool:
        """Whether edits follow the released code."""
        return self.rule in RELEASED

    @property
    def method(self) -> str:
        """The name of the method."""
        return "grace"


@dataclass(frozen=True)
class Match:
    """The edit nearest to a prompt.

    Attributes:
        edit: its number; None without edits, or if the prompt's key is not finite.
        distance: from the prompt's key to the edit's.
        radius: the largest distance at which the edit acts.
        acts: whether it acts on the prompt.
    """

    edit: int | None
    distance: float
    radius: float
    acts: bool


class GraceHandle(EditHandle):
    """`model.grace`: edits, one after another, each with a key, a radius and a value.

        y' = v_i  if  i = argmin_j |q - k_j|  and  |q - k_i| <= eps_i,  else  y

    q is what the prompt is looked up by, k_i that of edit i's prompt. y is the layer's output, and
    v_i was trained so that the model gives the edit's target. The nearest edit is found once, at
    the prompt's last token, and acts on that token and on all that follow. A prompt on which no
    edit acts gives the same bits as before.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> from sapt_fast.methods.grace import GraceConfig
        >>> model = sapt_fast.patch(load_backbone(), GraceConfig())
        >>> edit = model.grace.edit([5, 6, 7], [9, 1])
        >>> model.grace.which([5, 6, 7]).acts
        True
        >>> model.grace.undo(edit)
        >>> len(model.grace.edits)
        0
    """

    Config = GraceConfig
    method = "grace"
    attribute = "grace"

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Finds the layers to edit; raises ValueError if none match."""
        targets = config.target_modules
        return find_outputs(model, default_targets(model) if targets is None else targets)

    def make(self, path: str) -> EditedOutput:
        """Returns an empty codebook for a layer."""
        layer, config = self._model.get_submodule(path), self.config
        key_width, value_width = widths_of(layer, path)
        device = device_of(layer, path)
        return EditedOutput(
            path,
            Codebook(key_width, value_width, config.keys == "function", config.ratio, device),
            self.prompts,
            self.replacement,
            "mean" if config.keys == "mean" else "last",
            each_forward=config.is_released,
            in_decoder=in_decoder(self._model, path),
        )

    @property
    def replacement(self) -> str:
        """The tokens whose output is replaced: `config.replacement`, or the model's default."""
        own: str | None = self.config.replacement
        return own or _REPLACEMENTS[kind_of(self._model)]

    @property
    def looks_up_each_forward(self) -> bool:  # type: ignore[override]
        """Whether layers look up without knowing where prompts end, as the released code."""
        return bool(self.config.is_released)

    @property
    def layers(self) -> dict[str, EditedOutput]:
        """The edited layers by path, in the order in which the model has them."""
        return self.modules_at()

    def books(self) -> dict[str, Codebook]:
        """Returns the codebook of each layer, by the layer's path."""
        return {path: layer.codebook for path, layer in self.layers.items()}

    def parts(self) -> dict[str, nn.Module]:
        """Returns the codebooks."""
        return {**self.books()}

    def set_key_width(self, width: int) -> None:
        """Sets D of empty codebooks; raises ValueError if there are keys of another width."""
        for path, book in self.books().items():
            if len(book) and book.keys.shape[1] != width:
                raise ValueError(
                    f"function: got {width} columns, expected {book.keys.shape[1]} ({path})"
                )
        for book in self.books().values():
            if len(book) == 0:
                book.keys = book.keys.new_empty(0, width)

    # --- edits ---

    @property
    def edits(self) -> list[Edit]:
        """The edits, oldest first, with their radii and how often they have acted."""
        book = next(iter(self.books().values()))
        rows = {edit: row for row, edit in enumerate(book.edits.tolist())}
        radii, hits = book.radii.tolist(), book.hits.tolist()
        found = []
        for edit, (prompt, target) in self.numbered():
            row = rows.get(edit)
            radius, count = (None, 0) if row is None else (radii[row], hits[row])
            found.append(Edit(edit, prompt, target, radius, count, self.tokenizer))
        return found

    def edit_batch(self, pairs: Sequence[Pair]) -> tuple[list[int | None], list[int]]:
        """Makes edits together; see `EditHandle.edit_batch`."""
        if self.config.is_released:
            return [edit_as_released(self, *pair) for pair in pairs], []
        layers, prompts = self.layers, self.prompts
        with evaluating(self._model):
            given = present_answers(self.texts(pairs), prompts)
            changing = (~given).nonzero().flatten().tolist()
            made: list[int | None] = [None] * len(pairs)
            if not changing:
                return made, []
            pairs = [pairs[i] for i in changing]
            looked, own = queries(self.texts(pairs), layers, prompts, None)
            fitted = fit(self.texts(pairs), layers, prompts, own, self.options())
            missed = [changing[i] for i in (~fitted.fits).nonzero().flatten().tolist()]
            if missed:
                return made, missed
            if len(layers) > 1:  # upper layers look up by what lower ones have replaced
                looked, _ = queries(self.texts(pairs), layers, prompts, fitted.values)
        self._require_apart(pairs, looked)
        for i, edit in zip(changing, self._add(pairs, looked, fitted.values), strict=True):
            made[i] = edit
        return made, []

    def options(self) -> FittingOptions:
        """Returns how values are trained."""
        config = self.config
        return FittingOptions(
            steps=config.steps,
            learning_rate=config.learning_rate,
            per_token=self.replacement == "per_token",
            cold=config.cold,
            stop=not config.is_released,
            margin=config.margin,
            behind_cache=self.replacement in ("generation", "per_token", "replace_last"),
        )

    def _add(
        self,
        pairs: Sequence[Pair],
        looked: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> list[int]:
        before = self.present()
        edits = self.log.add([p for p, _ in pairs], [t for _, t in pairs])
        for path, book in self.books().items():
            radii = torch.full((len(pairs),), self.config.radius)
            own = [
                value[: len(target)]  # those behind it belong to the longest of the batch
                for value, (_, target) in zip(values[path], pairs, strict=True)
            ]
            book.add(looked[path], own, radii, edits.to(book.edits.device))
            for edit, (prompt, _) in zip(edits.tolist(), pairs, strict=True):
                old = before.get(tuple(prompt.tolist()))
                if old is not None:
                    book.replace(old, edit)
        self._split()
        numbers: list[int] = edits.tolist()
        return numbers

    def _split(self) -> None:
        if self.config.rule != "split":
            return
        labels: dict[tuple[int, ...], int] = {}
        numbers = [labels.setdefault(target, len(labels)) for _, target in self.log.texts()]
        for book in self.books().values():
            device = book.keys.device
            given = torch.tensor(numbers, dtype=torch.int64, device=device)
            book.split(self.config.radius, given, torch.arange(len(book), device=device))

    def _require_apart(self, pairs: Sequence[Pair], looked: Mapping[str, Tensor]) -> None:
        """Raises ValueError if keys are NaN, or those of a prompt with another target."""
        targets = dict(self.numbered())
        held = [(edit, targets[edit]) for edit in self.present().values()]
        texts = [text for _, text in held]
        texts += [(tuple(p.tolist()), tuple(t.tolist())) for p, t in pairs]
        same: Any = True
        for path, book in self.books().items():
            rows = book.rows_of(torch.tensor([e for e, _ in held], device=book.edits.device).long())
            query = looked[path].float()
            require_finite_keys(query, path)
            distance = differences(query, torch.cat([book.keys[rows], query]))
            same = same & (distance <= _SAME * query.norm(dim=1, keepdim=True)).cpu()
        for i, j in same.nonzero().tolist():
            (prompt, target), other = texts[len(held) + i], texts[j]
            if other[0] != prompt and other[1] != target:
                raise ValueError(
                    f"prompt: {self.shown(prompt)} is looked up by the same key as "
                    f"{self.shown(other[0])}, whose target differs, so that the two cannot be told "
                    f"apart; choose other keys or another layer in {type(self.config).__name__}"
                )

    def require_undoable(self, edit: int) -> None:
        """Raises ValueError with `GraceConfig.released`, where edits share values."""
        if self.config.is_released:
            raise ValueError(
                f"edit: got {edit} under the rule {self.config.rule!r}, by which edits share "
                "values and cannot be taken back; use the rule 'fixed' or 'split'"
            )

    def remove_edit(self, edit: int) -> None:
        """Removes the row of an edit from each codebook."""
        for book in self.books().values():
            book.remove(edit)
        self._split()

    def which(self, prompt: Any) -> Match:
        """Finds the edit nearest to a prompt, at the first edited layer.

        Args:
            prompt: tokens or, with a tokenizer, text.

        Raises:
            ValueError: if the prompt is empty, or too long for the model.
        """
        tokens = self.read(prompt)
        if len(self.log) == 0:
            return Match(None, float("inf"), 0.0, False)
        book = next(iter(self.layers.values())).codebook
        row, distance, acts = (t[0].item() for t in book.find(self.key_of(tokens)))
        if row < 0:  # the codebook is empty, or the key is not finite
            return Match(None, float("inf"), 0.0, False)
        number, radius = int(book.edits[int(row)]), float(book.radii[int(row)])
        return Match(number, float(distance), radius, bool(acts))

    def key_of(self, prompt: Any) -> Tensor:
        """Returns what a prompt is looked up by at the first edited layer, [1, D].

        Args:
            prompt: tokens or, with a tokenizer, text.
        """
        self._require_function()
        tokens = self.read(prompt)
        texts = self.texts([(tokens, torch.zeros(1, dtype=torch.int64))])
        with self.listening(), evaluating(self._model):
            looked, _ = queries(texts, self.layers, self.prompts, None)
        return looked[next(iter(self.layers))]

    def require_consistent(self) -> None:
        """Raises ValueError if the codebooks do not fit the log, or are not finite."""
        for path, book in self.books().items():
            book.require_consistent(self.log.edits, path)
            require_finite(path, dict(book.named_buffers()))
            if not self.config.is_released and len(book) != len(self.log):
                raise ValueError(
                    f"{path}: got {len(book)} rows, expected one for each of {len(self.log)} edits"
                )
