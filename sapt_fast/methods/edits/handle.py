"""The handle of a method that edits single answers of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.base import handles
from sapt_fast.methods.edits.inputs import EditError, read_edits, read_prompt
from sapt_fast.methods.edits.texts import EditTexts
from sapt_fast.methods.output import OutputHandle
from sapt_fast.pools.codebook import make_ragged
from sapt_fast.pools.edit_log import EditLog, Text
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.output import listen, silence
from sapt_fast.sites.report import PatchReport
from sapt_fast.storage.method_files import StoredMethod, read_method, write_method

__all__ = ["EditHandle", "LoggedHandle", "Pair", "evaluating", "require_finite_keys"]

Pair = tuple[Tensor, Tensor]  # the tokens [T] int64 of a prompt and of its target


class LoggedHandle(OutputHandle):
    """The base class of handles that answer single prompts, with a log of prompts and targets.

    A subclass defines `make`, `grow`, `parts` and `require_consistent`. With an empty log, nothing
    runs in the model's forward.

    Attributes:
        tokenizer: reads prompts and targets that are text; None: they must be tokens.
        prompts: where the prompts of the running forward end.
        log: the prompts and targets.
        looks_up_each_forward: whether layers look up without knowing where prompts end.
    """

    looks_up_each_forward = False

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self.tokenizer: Any = None
        self.prompts = Prompts(model, self.attribute, self.looks_up_by_tokens)
        self.log = EditLog().to(model.device)
        self.register_load_state_dict_post_hook(_follow_loaded)

    @property
    def looks_up_by_tokens(self) -> bool:
        """Whether prompts are looked up by a function of their tokens, `prompts.query`."""
        return bool(self.config.keys == "function")

    # --- what a subclass defines ---

    def parts(self) -> dict[str, nn.Module]:
        """Returns the modules at the layers whose buffers are the method's state, by name."""
        raise NotImplementedError

    def require_consistent(self) -> None:
        """Raises ValueError if the buffers of `parts` do not fit each other or the log."""
        raise NotImplementedError

    # --- edits ---

    @property
    def tasks(self) -> list[str]:
        """The numbers of the edits, as names."""
        return [str(edit) for edit in self.log.edits.tolist()]

    def present(self) -> dict[tuple[int, ...], int]:
        """Returns the edits that no later edit of the same prompt replaces, by their prompts."""
        return {text[0]: edit for edit, text in self.numbered()}

    def numbered(self) -> list[tuple[int, Text]]:
        """Returns the edits' numbers with their prompts and targets, oldest first."""
        return list(zip(self.log.edits.tolist(), self.log.texts(), strict=True))

    def batch(self, pairs: Sequence[Pair]) -> EditTexts:
        """Returns prompts and targets as a batch for the model, without what looks them up."""
        alone = len(handles(self._model)) == 1
        return EditTexts(self._model, [p for p, _ in pairs], [t for _, t in pairs], not alone)

    def texts(self, pairs: Sequence[Pair]) -> EditTexts:
        """Returns prompts and targets as a batch for the model."""
        found = self.batch(pairs)
        if self.prompts.query is not None:
            query = self.prompts.query([p.to(self._model.device) for p, _ in pairs])
            found.prompt = found.prompt._replace(query=query)
        return found

    def shown(self, tokens: Iterable[int]) -> str:
        """Returns tokens as text if there is a tokenizer, for messages."""
        tokens = [*tokens]
        return repr(tokens if self.tokenizer is None else self.tokenizer.decode(tokens))

    def read(self, prompt: Any) -> Tensor:
        """Returns the tokens [T] int64 of a prompt; errors as in `edit`."""
        return read_prompt(self._model, self.tokenizer, prompt)

    # --- protocol ---

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the state of the layers and the log."""
        tensors = {
            f"{name}:{buffer}": tensor
            for name, part in self._stateful().items()
            for buffer, tensor in part.state_dict().items()
        }
        return tensors, {"edits": len(self.log)}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restores what `stored` returned."""
        before, parts = self._state(), self._stateful()
        tensors = dict(tensors)
        for name in parts:
            make_ragged(tensors, f"{name}:")
        expected = {f"{name}:{b}" for name, part in parts.items() for b in part.state_dict()}
        if set(tensors) != expected:
            raise ValueError(f"tensors: got {sorted(tensors)}, expected {sorted(expected)}")
        try:
            for name, part in parts.items():
                start = f"{name}:"
                held = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
                part.load_state_dict(held)
            self.log.require_consistent()
            if values.get("edits") != len(self.log):
                raise ValueError(f"edits: got {values.get('edits')}, expected {len(self.log)}")
            self.require_consistent()
        except (RuntimeError, ValueError) as error:
            self._restore_state(before)
            raise ValueError(f"tensors: {error}") from None
        self.follow_edits()

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Saves the edits; with the model's state_dict, those in it."""
        if state is None:
            return super().save(directory, is_main_process=is_main_process)
        for one in handles(self._model):
            one.require_unmerged()
        return write_method(self, directory, *self.content(state), is_main_process)

    def content(
        self, state: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what `stored` does, from the model's state_dict if there is one."""
        if state is None:
            return self.stored()
        paths = {module: path for path, module in self._model.named_modules()}
        tensors = {
            f"{name}:{buffer}": state[f"{paths[part]}.{buffer}"]
            for name, part in self._stateful().items()
            for buffer in part.state_dict()
        }
        return tensors, {"edits": len(tensors["log:edits"])}

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Sets the edits to those in a saved folder; errors as `sapt_fast.load_pretrained`."""
        stored = self.read_stored(directory)
        self.restore(stored.tensors, stored.values)

    def read_stored(self, directory: str | os.PathLike[str]) -> StoredMethod:
        """Reads a saved folder; raises ValueError if it is of another config."""
        stored = read_method(Path(directory), self.attribute)
        if self.Config.from_dict(stored.config) != self.config:
            raise ValueError(
                f"{stored.source}: got {stored.config}, expected {self.config.to_dict()}, the "
                "config of the patched model"
            )
        return stored

    def _stateful(self) -> dict[str, nn.Module]:
        return {"log": self.log, **self.parts()}

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {name: dict(part.state_dict()) for name, part in self._stateful().items()}

    def _restore_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.follow_edits()

    # --- hooks ---

    def install(self) -> None:
        """Adds the hooks that forwards need if there are edits."""
        super().install()
        if self.tasks:
            self._find_prompts()

    def remove(self) -> None:
        """Removes the hooks."""
        self.prompts.remove()
        super().remove()

    def require_removable(self) -> None:
        """Raises ValueError if another library has replaced what `install` put there."""
        super().require_removable()
        self.prompts.require_removable()

    def follow_edits(self) -> None:
        """Lets the layers look up prompts if there are edits, and else run as they are."""
        if self.tasks:
            self._listen()
        else:
            self.prompts.remove()
            for path in self.report.patched:
                silence(self._model, path, self.slot)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Lets the layers take part while edits are made; afterwards, if there are any."""
        self._listen()
        try:
            yield
        finally:
            self.follow_edits()

    def _listen(self) -> None:
        for path in self.report.patched:
            listen(self._model, path, self.slot)
        self._find_prompts()

    def _find_prompts(self) -> None:
        if not self.prompts.installed and not self.looks_up_each_forward:
            self.prompts.install()


class EditHandle(LoggedHandle):
    """The base class of handles with `edit` and `undo`.

    A subclass also defines `edit_batch`, `remove_edit` and `set_key_width`.
    """

    # --- what a subclass defines ---

    def edit_batch(self, pairs: Sequence[Pair]) -> tuple[list[int | None], list[int]]:
        """Makes edits of distinct prompts together.

        Returns:
            Their numbers, None for a target that the model gives already; and the places of those
            that training did not reach, for which nothing was added.
        """
        raise NotImplementedError

    def remove_edit(self, edit: int) -> None:
        """Removes an edit, which the log no longer has, from the layers."""
        raise NotImplementedError

    def require_undoable(self, edit: int) -> None:
        """Raises ValueError if an edit cannot be taken back."""

    # --- edits ---

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
            TypeError: if a prompt or target is neither tokens nor text.
            ValueError: if a prompt or target is empty, or too long for the model.
            ValueError: if two edits of a list have the same prompt and different targets.
            ValueError: if the prompt cannot be told apart from that of another edit.
            EditError: if training does not reach a target; `unfitted` has the edits' places.
            FloatingPointError: if the loss is not finite.

        Nothing has changed after an error.
        """
        with torch.inference_mode(False):  # whose tensors cannot be trained, or changed outside
            return self._edit(prompt, target, batch_size)

    def _edit(self, prompt: Any, target: Any, batch_size: int) -> Any:
        pairs, single = read_edits(self._model, self.tokenizer, prompt, target)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size!r}, expected an integer, at least 1")
        self._require_function()
        before = self._state()
        try:
            with self.listening():
                edits = self._edit_all(pairs, batch_size)
        except BaseException:
            self._restore_state(before)
            raise
        return edits[0] if single else edits

    def _edit_all(self, pairs: Sequence[Pair], batch_size: int) -> list[int | None]:
        places: dict[tuple[int, ...], int] = {}  # the first place of each prompt
        for place, (prompt, _) in enumerate(pairs):
            places.setdefault(tuple(prompt.tolist()), place)
        distinct, unfitted = [*places.values()], []
        made: dict[int, int | None] = {}
        for first in range(0, len(distinct), batch_size):
            chosen = distinct[first : first + batch_size]
            edits, missed = self.edit_batch([pairs[i] for i in chosen])
            unfitted += [chosen[i] for i in missed]
            made |= dict(zip(chosen, edits, strict=True))
        if unfitted:
            raise EditError(unfitted, self.config.steps)
        return [made[places[tuple(prompt.tolist())]] for prompt, _ in pairs]

    def undo(self, edit: int) -> None:
        """Takes an edit back; the model answers as if it had never been made.

        Args:
            edit: the number that `edit` returned.

        Raises:
            ValueError: if there is no such edit, or it cannot be taken back.
        """
        if edit not in self.log.edits.tolist():
            here = ", ".join(self.tasks) or "none"
            raise ValueError(f"edit: got {edit!r}, expected the number of an edit ({here})")
        self.require_undoable(edit)
        with torch.inference_mode(False):
            self.log.remove(edit)
            self.remove_edit(edit)
        self.follow_edits()

    # --- keys ---

    def look_up_by(self, function: Callable[[list[Tensor]], Tensor]) -> None:
        """Sets what prompts are looked up by, for a config with `keys="function"`.

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
        probe = torch.zeros(1, dtype=torch.int64, device=self._model.device)
        self.set_key_width(function([probe]).shape[1])
        self.prompts.query = function

    def set_key_width(self, width: int) -> None:
        """Sets D of empty codebooks; raises ValueError if there are keys of another width."""
        raise NotImplementedError

    def _require_function(self) -> None:
        if self.config.keys == "function" and self.prompts.query is None:
            raise ValueError(
                "keys: the config has 'function', but none is set; call "
                f"model.{self.attribute}.look_up_by(function) first"
            )

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Raises TypeError: edits are made by `edit`."""
        raise TypeError(
            f"grow({name!r}): edits are made by model.{self.attribute}.edit(prompt, target)"
        )


def _follow_loaded(handle: nn.Module, keys: Any) -> None:
    """After `load_state_dict`: the layers look up prompts if edits were loaded."""
    given: Any = handle
    if given._model._modules.get(given.attribute) is not handle:
        return
    try:
        given.log.require_consistent()
        given.require_consistent()
    except ValueError as error:
        raise RuntimeError(f"load_state_dict: model.{given.attribute}: {error}") from None
    given.follow_edits()


def require_finite_keys(keys: Tensor, path: str) -> None:
    """Raises ValueError if what prompts are looked up by, [B, D], is not finite."""
    wrong = (~keys.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"prompt: {path} got NaN or infinity as what edit {wrong[0]} of the batch is looked up "
            "by, expected finite numbers; no prompt would match"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off; afterwards every module is as before."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
