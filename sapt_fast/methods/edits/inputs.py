"""What users give as edits: tokens or text, checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapt_fast.methods.edits.texts import kind_of

__all__ = ["Edit", "EditError", "as_text", "read_edits", "read_prompt"]


class EditError(RuntimeError):
    """Training did not reach the targets of some edits; nothing was changed.

    Attributes:
        unfitted: the places of these edits in the list that was given.
    """

    def __init__(self, unfitted: Sequence[int], steps: int) -> None:
        self.unfitted = [*unfitted]
        places = ", ".join(map(str, self.unfitted))
        super().__init__(
            f"after {steps} steps the model does not give the targets of edits {places} (counted "
            "from 0), and no edit was made; leave these out, allow more steps, or choose a lower "
            "layer in the config"
        )


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        edit: its number.
        prompt, target: their tokens.
        radius: the largest distance at which it acts; None if it shares an older edit's key.
        hits: on how many prompts it has acted.
    """

    edit: int
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    radius: float | None
    hits: int
    _tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> tuple[str, str]:
        """Prompt and target as text; needs a tokenizer.

        Raises:
            ValueError: if the handle has no tokenizer.
        """
        where = "model.grace.tokenizer (model.melo.tokenizer)"
        return as_text(self._tokenizer, self.prompt, self.target, where)


def as_text(
    tokenizer: Any, prompt: Sequence[int], target: Sequence[int], where: str
) -> tuple[str, str]:
    """Returns a prompt and a target as text; raises ValueError without the tokenizer of `where`."""
    if tokenizer is None:
        raise ValueError(f"tokenizer: got None; set {where}")
    return tokenizer.decode([*prompt]), tokenizer.decode([*target], skip_special_tokens=True)


def read_edits(
    model: Any, tokenizer: Any, prompt: Any, target: Any, name: str = "edits"
) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    """Returns pairs of tokens [T] int64 on the CPU, and whether it was one edit.

    Args:
        model: the transformers model.
        tokenizer: reads text; or None.
        prompt, target: as in `GraceHandle.edit`.
        name: of the list, for messages.

    Raises:
        TypeError: if something is neither tokens nor text.
        ValueError: as in `GraceHandle.edit`.
    """
    single = target is not None
    given = [(prompt, target)] if single else prompt
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"prompt: got {type(given).__name__} without target, expected a list")
    pairs = []
    for place, pair in enumerate(given):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"{name}[{place}]: got {pair!r}, expected (prompt, target)")
        where = "" if single else f"{name}[{place}]: "
        tokens = read_prompt(model, tokenizer, pair[0], where)
        pairs.append((tokens, _target(model, tokenizer, pair[1], len(tokens), where)))
    _require_agreement(pairs, name)
    return pairs, single


def read_prompt(model: Any, tokenizer: Any, prompt: Any, where: str = "") -> Tensor:
    """Returns the tokens [T] int64 of a prompt, on the CPU; errors as `read_edits`."""
    tokens = _tokens(tokenizer, prompt, f"{where}prompt", special=True)
    _require_ids(model, tokens, f"{where}prompt")
    _require_room(model, len(tokens), f"{where}prompt")
    return tokens


def _target(model: Any, tokenizer: Any, target: Any, before: int, where: str) -> Tensor:
    name = f"{where}target"
    if kind_of(model) == "classifier":
        classes = model.config.num_labels
        if type(target) is not int or not 0 <= target < classes:
            raise ValueError(f"{name}: got {target!r}, expected a class, 0 to {classes - 1}")
        return torch.tensor([target])
    tokens = _tokens(tokenizer, target, name, special=False)
    _require_ids(model, tokens, name)
    if kind_of(model) == "causal":
        _require_room(model, before + len(tokens), f"{where}prompt and target")
    else:
        _require_room(model, len(tokens), name)
    return tokens


def _tokens(tokenizer: Any, given: Any, name: str, special: bool) -> Tensor:
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError(f"{name}: got text, but the method's tokenizer is None; set it")
        if not given.strip():
            raise ValueError(f"{name}: got {given!r}, expected text")
        ids = list(tokenizer(given, add_special_tokens=special).input_ids)
        if not special and tokenizer.eos_token_id is not None:
            ids += [tokenizer.eos_token_id]
        given = ids
    try:
        tokens = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {given!r}, expected text or a list of tokens") from None
    if tokens.dim() == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or tokens.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)}, expected at least one token")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"{name}: got {tokens.dtype}, expected integers")
    return tokens.detach().to("cpu", torch.int64).clone()  # no inference tensor


def _require_ids(model: Any, tokens: Tensor, name: str) -> None:
    try:
        size = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        raise ValueError(
            f"model: got {type(model).__name__}, which has no table of token embeddings; only "
            "models of text can be edited"
        ) from None
    outside = tokens[(tokens < 0) | (tokens >= size)]
    if outside.numel():
        raise ValueError(f"{name}: got token {int(outside[0])}, expected 0 to {size - 1}")


def _require_room(model: Any, tokens: int, name: str) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"{name}: got {tokens} tokens, expected at most {longest}")


def _require_agreement(pairs: Sequence[tuple[Tensor, Tensor]], name: str) -> None:
    targets: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
    for place, (prompt, target) in enumerate(pairs):
        wanted = tuple(target.tolist())
        first, held = targets.setdefault(tuple(prompt.tolist()), (place, wanted))
        if held != wanted:
            raise ValueError(
                f"{name}: {first} and {place} have the same prompt and different targets"
            )
