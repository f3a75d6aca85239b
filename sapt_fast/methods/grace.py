"""GRACE: mends single answers of a model by a codebook at one layer, without training the model.

Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.edit_fitting import (
    FittingOptions,
    fit,
    present_answers,
    queries,
    texts_of,
)
from sapt_fast.methods.edit_inputs import Edit, EditError, read_edits, read_prompt
from sapt_fast.methods.edit_sites import default_targets, in_decoder, widths_of
from sapt_fast.methods.edit_texts import kind_of
from sapt_fast.methods.grace_released import edit_as_released
from sapt_fast.methods.output import OutputHandle
from sapt_fast.methods.task_config import require
from sapt_fast.pools.codebook import Codebook
from sapt_fast.pools.edit_log import EditLog
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.edited import REPLACEMENTS, EditedOutput
from sapt_fast.sites.output import find_outputs, listen, silence
from sapt_fast.sites.report import PatchReport

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
        edit: its number; None without edits.
        distance: from the prompt's key to the edit's.
        radius: the largest distance at which the edit acts.
        acts: whether it acts on the prompt.
    """

    edit: int | None
    distance: float
    radius: float
    acts: bool


class GraceHandle(OutputHandle):
    """`model.grace`: edits, one after another, each with a key, a radius and a value.

        y' = v_i  if  i = argmin_j |q - k_j|  and  |q - k_i| <= eps_i,  else  y

    q is what the prompt is looked up by, k_i that of edit i's prompt. y is the layer's output, and
    v_i was trained so that the model gives the edit's target. The nearest edit is found once, at
    the prompt's last token, and acts on that token and on all that follow. A prompt on which no
    edit acts gives the same bits as before.

    Attributes:
        tokenizer: reads prompts and targets that are text; None: they must be tokens.

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

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self.tokenizer: Any = None
        self.prompts = Prompts(model)
        self.log = EditLog().to(model.device)
        self.register_load_state_dict_post_hook(_follow_loaded)

    # --- sites ---

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Finds the layers to edit; raises ValueError if none match."""
        targets = config.target_modules
        return find_outputs(model, default_targets(model) if targets is None else targets)

    def make(self, path: str) -> EditedOutput:
        """Returns an empty codebook for a layer."""
        config = self.config
        device = next(self._model.get_submodule(path).parameters()).device
        key_width, value_width = widths_of(self._model.get_submodule(path), path)
        return EditedOutput(
            path,
            Codebook(key_width, value_width, config.ratio, device),
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
    def layers(self) -> dict[str, EditedOutput]:
        """The edited layers by path, in the order in which the model runs them."""
        return self.modules_at()

    def look_up_by(self, function: Callable[[list[Tensor]], Tensor]) -> None:
        """Sets what prompts are looked up by, for `GraceConfig(keys="function")`.

        Args:
            function: returns one vector per prompt, [B, D], for the tokens [T_b] of each. It is not
                saved with the edits: set it again after loading.

        Raises:
            ValueError: if the config has other keys.
            ValueError: if D is not the width of the keys that there are.
        """
        if self.config.keys != "function":
            raise ValueError(
                f"function: the config has keys={self.config.keys!r}, expected 'function'"
            )
        width = function([torch.zeros(1, dtype=torch.int64, device=self._model.device)]).shape[1]
        for path, layer in self.layers.items():
            held = layer.codebook.keys.shape
            if held[0] and held[1] != width:
                raise ValueError(f"function: got {width} columns, expected {held[1]} ({path})")
            if held[0] == 0:
                layer.codebook.keys = layer.codebook.keys.new_empty(0, width)
        self.prompts.query = function

    # --- edits ---

    @property
    def tasks(self) -> list[str]:
        """The numbers of the edits, as names."""
        return [str(edit) for edit in self.log.edits.tolist()]

    @property
    def edits(self) -> list[Edit]:
        """The edits, oldest first, with their radii and how often they have acted."""
        layer = next(iter(self.layers.values())).codebook
        rows = dict(zip(layer.edits.tolist(), range(len(layer)), strict=True))
        radii, hits = layer.radii.tolist(), layer.hits.tolist()
        found = []
        for edit, (prompt, target) in zip(self.log.edits.tolist(), self.log.texts(), strict=True):
            row = rows.get(edit)
            radius, count = (None, 0) if row is None else (radii[row], hits[row])
            found.append(Edit(edit, prompt, target, radius, count, self.tokenizer))
        return found

    def edit(self, prompt: Any, target: Any = None, *, batch_size: int = 16) -> Any:
        """Makes the model answer a prompt with a target from now on.

        Args:
            prompt: tokens or, with a tokenizer, text; or a list of pairs (prompt, target), which
                are edited in batches.
            target: tokens, to the end token that `generate` stops at; text, to which the end token
                is added; or the class for a classifier.
            batch_size: how many edits train together.

        Returns:
            The edit's number, or None if the model gives the target already; of a list a list.

        Raises:
            ValueError: if a prompt or target is empty, or too long for the model.
            ValueError: if two edits of a list have the same prompt and different targets.
            ValueError: if the prompt cannot be told apart from that of another edit.
            EditError: if training does not reach a target; `unfitted` has the edits' indices.
            FloatingPointError: if the loss is not finite.

        Nothing has changed after an error.
        """
        pairs, single = read_edits(self._model, self.tokenizer, prompt, target)
        self._require_function()
        before = self._state()
        try:
            self._listen()
            edits = self._edit_all(pairs, batch_size)
        except BaseException:
            self._restore_state(before)
            raise
        finally:
            self.follow_edits()
        return edits[0] if single else edits

    def _edit_all(
        self, pairs: Sequence[tuple[Tensor, Tensor]], batch_size: int
    ) -> list[int | None]:
        places: dict[tuple[int, ...], int] = {}  # the first place of each prompt
        for place, (prompt, _) in enumerate(pairs):
            places.setdefault(tuple(prompt.tolist()), place)
        distinct, unfitted = [*places.values()], []
        made: dict[int, int | None] = {}
        size = 1 if self.config.is_released else batch_size
        for first in range(0, len(distinct), size):
            chosen = distinct[first : first + size]
            edits, missed = self._edit_batch([pairs[i] for i in chosen])
            unfitted += [chosen[i] for i in missed]
            made |= dict(zip(chosen, edits, strict=True))
        if unfitted:
            raise EditError(unfitted, self.config.steps)
        return [made[places[tuple(prompt.tolist())]] for prompt, _ in pairs]

    def _edit_batch(
        self, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[list[int | None], list[int]]:
        """Returns the edits' numbers, and the places of those that do not fit."""
        model, layers, prompts = self._model, self.layers, self.prompts
        if self.config.is_released:
            return [edit_as_released(self, *pairs[0])], []
        with evaluating(model):
            texts = self._texts(pairs)
            given = present_answers(texts, layers, prompts, 0.0)
            changing = (~given).nonzero().flatten().tolist()
            made: list[int | None] = [None] * len(pairs)
            if not changing:
                return made, []
            pairs = [pairs[i] for i in changing]
            texts = self._texts(pairs)
            looked, own = queries(texts, layers, prompts, None)
            fitted = fit(texts, layers, prompts, own, self._options())
            missed = [changing[i] for i in (~fitted.fits).nonzero().flatten().tolist()]
            if missed:
                return made, missed
            if len(layers) > 1:  # upper layers look up by what lower ones have replaced
                looked, _ = queries(self._texts(pairs), layers, prompts, fitted.values)
        self._require_apart(pairs, looked)
        for i, edit in zip(changing, self._add(pairs, looked, fitted.values), strict=True):
            made[i] = edit
        return made, []

    def _texts(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        prompts, targets = zip(*pairs, strict=True)
        query = None if self.prompts.query is None else self.prompts.query([*prompts])
        return texts_of(self._model, prompts, targets, query)

    def _options(self) -> FittingOptions:
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
        pairs: Sequence[tuple[Tensor, Tensor]],
        looked: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> list[int]:
        known = {prompt: edit for edit, (prompt, _) in self._present()}
        edits = self.log.add([p for p, _ in pairs], [t for _, t in pairs])
        for path, layer in self.layers.items():
            book = layer.codebook
            radii = torch.full((len(pairs),), self.config.radius)
            book.add(looked[path], values[path], radii, edits.to(book.edits.device))
            for edit, (prompt, _) in zip(edits.tolist(), pairs, strict=True):
                old = known.get(tuple(prompt.tolist()))
                if old is not None:
                    book.replace(old, edit)
        if self.config.rule == "split":
            self._split()
        numbers: list[int] = edits.tolist()
        return numbers

    def _present(self) -> list[tuple[int, tuple[tuple[int, ...], tuple[int, ...]]]]:
        """The edits that no later edit of the same prompt replaces."""
        latest = {
            text[0]: (edit, text)
            for edit, text in zip(self.log.edits.tolist(), self.log.texts(), strict=True)
        }
        return [*latest.values()]

    def _split(self) -> None:
        labels: dict[tuple[int, ...], int] = {}
        numbers = [labels.setdefault(target, len(labels)) for _, target in self.log.texts()]
        for layer in self.layers.values():
            book = layer.codebook
            rows = torch.arange(len(book), device=book.keys.device)
            given = torch.tensor(numbers, dtype=torch.int64, device=book.keys.device)
            book.split(self.config.radius, given, rows)

    def _require_apart(
        self, pairs: Sequence[tuple[Tensor, Tensor]], looked: Mapping[str, Tensor]
    ) -> None:
        """Raises ValueError if another prompt with another target has the same keys."""
        held = self._present()
        texts = [*(text for _, text in held)]
        texts += [(tuple(p.tolist()), tuple(t.tolist())) for p, t in pairs]
        for i, (prompt, target) in enumerate(texts[len(held) :]):
            same = torch.ones(len(held) + i, dtype=torch.bool)
            for path, layer in self.layers.items():
                book, query = layer.codebook, looked[path].float()
                rows = book.rows_of(torch.tensor([e for e, _ in held], device=book.edits.device))
                keys = torch.cat([book.keys[rows.long()], query[:i]])
                distance = (keys - query[i]).norm(dim=1)
                same &= (distance <= _SAME * query[i].norm()).to(same.device)
            for j in same.nonzero().flatten().tolist():
                other = texts[j]
                if other[0] != prompt and other[1] != target:
                    raise ValueError(
                        f"prompt: {self._shown(prompt)} is looked up by the same key as "
                        f"{self._shown(other[0])}, whose target differs, so that the two cannot "
                        "be told apart; choose other keys or another layer in GraceConfig"
                    )

    def _shown(self, tokens: Iterable[int]) -> str:
        tokens = [*tokens]
        return repr(tokens if self.tokenizer is None else self.tokenizer.decode(tokens))

    def undo(self, edit: int) -> None:
        """Takes an edit back; the model answers as if it had never been made.

        Args:
            edit: the number that `edit` returned.

        Raises:
            ValueError: if there is no such edit.
            ValueError: with `GraceConfig.released`, where edits share values.
        """
        if self.config.is_released:
            raise ValueError(
                f"edit: got {edit} under the rule {self.config.rule!r}, by which edits share "
                "values and cannot be taken back; use the rule 'fixed' or 'split'"
            )
        if edit not in self.log.edits.tolist():
            here = ", ".join(self.tasks) or "none"
            raise ValueError(f"edit: got {edit!r}, expected the number of an edit ({here})")
        self.log.remove(edit)
        for layer in self.layers.values():
            layer.codebook.remove(edit)
        if self.config.rule == "split":
            self._split()
        self.follow_edits()

    def which(self, prompt: Any) -> Match:
        """Finds the edit nearest to a prompt, at the first edited layer.

        Args:
            prompt: tokens or, with a tokenizer, text.

        Raises:
            ValueError: if the prompt is empty, or too long for the model.
        """
        tokens = read_prompt(self._model, self.tokenizer, prompt)
        if not self.tasks:
            return Match(None, float("inf"), 0.0, False)
        book = next(iter(self.layers.values())).codebook
        row, distance, acts = (t[0].item() for t in book.find(self.key_of(tokens)))
        number, radius = int(book.edits[int(row)]), float(book.radii[int(row)])
        return Match(number, float(distance), radius, bool(acts))

    def key_of(self, prompt: Any) -> Tensor:
        """Returns what a prompt is looked up by at the first edited layer, [1, D].

        Args:
            prompt: tokens or, with a tokenizer, text.
        """
        self._require_function()
        tokens = read_prompt(self._model, self.tokenizer, prompt)
        texts = self._texts([(tokens, torch.zeros(1, dtype=torch.int64))])
        try:
            self._listen()
            with evaluating(self._model):
                looked, _ = queries(texts, self.layers, self.prompts, None)
        finally:
            self.follow_edits()
        return looked[next(iter(self.layers))]

    def _require_function(self) -> None:
        if self.config.keys == "function" and self.prompts.query is None:
            raise ValueError(
                "keys: the config has 'function', but none is set; call "
                "model.grace.look_up_by(function) first"
            )

    # --- protocol ---

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Raises TypeError: edits are made by `edit`."""
        raise TypeError(f"grow({name!r}): edits are made by model.grace.edit(prompt, target)")

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the codebooks and the log."""
        tensors = {f"log.{name}": t for name, t in self.log.state_dict().items()}
        for path, layer in self.layers.items():
            for name, tensor in layer.codebook.state_dict().items():
                tensors[f"{path}:{name}"] = tensor
        return tensors, {"edits": len(self.log)}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restores what `stored` returned."""
        before = self._state()
        parts: dict[str, nn.Module] = {"log.": self.log}
        parts |= {f"{path}:": layer.codebook for path, layer in self.layers.items()}
        expected = {start + name for start, part in parts.items() for name in part.state_dict()}
        if set(tensors) != expected:
            raise ValueError(f"tensors: got {sorted(tensors)}, expected {sorted(expected)}")
        try:
            for start, part in parts.items():
                held = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
                part.load_state_dict(held)
            self._require_consistent()
        except (RuntimeError, ValueError) as error:
            self._restore_state(before)
            raise ValueError(f"tensors: {error}") from None
        self.follow_edits()

    def _require_consistent(self) -> None:
        count, log = len(self.log), self.log
        sums = [(log.prompts, log.prompt_lengths), (log.targets, log.target_lengths)]
        for flat, lengths in sums:
            if lengths.shape != (count,) or (lengths < 1).any() or lengths.sum() != len(flat):
                raise ValueError(f"log: got lengths that do not sum to {len(flat)} tokens")
        if (log.edits.diff() <= 0).any() or (count and log.next_edit <= log.edits[-1]):
            raise ValueError("log.edits: expected ascending numbers below next_edit")
        for path, layer in self.layers.items():
            book = layer.codebook
            shapes = {name: t.shape[0] for name, t in book.state_dict().items()}
            known = torch.isin(book.edits, log.edits).all()
            if set(shapes.values()) != {len(book)} or not known or (book.edits.diff() <= 0).any():
                raise ValueError(f"{path}: got rows {shapes}, expected one for each edit")

    # --- hooks ---

    def install(self) -> None:
        """Adds the hooks, if there are edits; without edits nothing runs in a forward."""
        super().install()
        if self.tasks:
            self.prompts_installed(True)

    def remove(self) -> None:
        """Removes the hooks."""
        self.prompts_installed(False)
        super().remove()

    def prompts_installed(self, wanted: bool) -> None:
        """Adds or removes the hooks that find the ends of prompts."""
        if wanted and not self.prompts.installed and not self.config.is_released:
            self.prompts.install()
        elif not wanted and self.prompts.installed:
            self.prompts.remove()

    def require_removable(self) -> None:
        """Raises ValueError if another library has replaced what `install` put there."""
        super().require_removable()
        self.prompts.require_removable()

    def follow_edits(self) -> None:
        """Lets the layers look up prompts if there are edits, and else run as they are."""
        if self.tasks:
            self._listen()
        else:
            self._silence()

    def _listen(self) -> None:
        for path in self.report.patched:
            listen(self._model, path, self.slot)
        self.prompts_installed(True)

    def _silence(self) -> None:
        self.prompts_installed(False)
        for path in self.report.patched:
            silence(self._model, path, self.slot)

    def _state(self) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        parts: list[nn.Module] = [self.log, *(x.codebook for x in self.layers.values())]
        return [(part, {n: t.clone() for n, t in part.state_dict().items()}) for part in parts]

    def _restore_state(self, state: list[tuple[nn.Module, dict[str, Tensor]]]) -> None:
        for part, values in state:
            part.load_state_dict(values)


def _follow_loaded(handle: nn.Module, keys: Any) -> None:
    """After `load_state_dict`: the layers look up prompts if edits were loaded."""
    given: Any = handle
    if given._model._modules.get(given.attribute) is handle:
        given.follow_edits()


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Switches dropout off; afterwards every module is as before."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
