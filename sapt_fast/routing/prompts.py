"""Where prompts end, for methods whose layers decide something about each prompt.

A decision is made at the last token of a prompt, when that token is read, and holds for all tokens
that follow. It travels with the model's cache, as mixture weights do (`routing.generation`).

The last token of a prompt is

- in `generate`: the last token that the call is given, also if it continues a filled cache or
  reads the prompt in chunks;
- in a forward with labels of a decoder-only model: the last token before the first label;
- in a forward that continues a filled cache: that of the forward that filled it;
- in the decoder of an encoder-decoder model: its first token;
- else the last token that is no padding.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.routing.forward import Forward, Prompt
from sapt_fast.routing.generation import REFUSED, for_rows, prompt_of
from sapt_fast.routing.inputs import for_router
from sapt_fast.routing.installed import Installed
from sapt_fast.routing.packing import find_segments
from sapt_fast.routing.recompute import Recomputation
from sapt_fast.routing.stand_in import generation_arguments

__all__ = ["Prompts"]


_OF_GENERATE = ("generation", "samples", "decided")


class Prompts(Installed):
    """The prompts of one model's forwards, as the layers of a method see them.

    Args:
        model: the transformers model (inside any wrapper).
        name: of the method's handle, under which caches and encoder outputs carry decisions.
        by_function: whether prompts are looked up by `query`, which has to be set.

    Attributes:
        query: computes what prompts are looked up by, [B, D], from the tokens [T_b] of each; None
            if layers look up by their input.
        together: whether processes generate together, each until all have finished.
    """

    def __init__(self, model: Any, name: str, by_function: bool) -> None:
        super().__init__(model, bool, int)  # there are no weights
        self.name = name
        self.by_function = by_function
        # Its own name: the numbers in caches of another patch are those of other edits.
        self.carried = f"prompts_of_{name}_{uuid.uuid4().hex}"
        self.query: Callable[[list[Tensor]], Tensor] | None = None
        self.together = False
        self.recomputation = Recomputation(model, self)
        self._call = threading.local()

    # --- what layers read ---

    def of_layer(self, x: Tensor, in_decoder: bool) -> Prompt:
        """Returns the prompts of the running forward.

        Args:
            x: [B, T, D], the layer's input.
            in_decoder: whether the layer is in the decoder of an encoder-decoder model.

        Raises:
            RuntimeError: if no forward of the model runs, or it has other rows or tokens.
        """
        prompt = self._given
        if prompt is not None and in_decoder:  # it is the encoder's
            prompt = _of_decoder(torch.zeros_like(prompt.last), prompt.query, prompt.decided)
        if prompt is None and self.forward is not None:
            prompt = self.forward.prompt
        if prompt is None:
            raise RuntimeError(
                "an edited layer looks at the end of the prompt: call the model itself with "
                "input_ids or inputs_embeds, not a part of it"
            )
        rows, tokens = x.shape[:2]
        if prompt.last.shape[0] != rows:
            raise RuntimeError(
                f"an edited layer got {rows} rows for {prompt.last.shape[0]} prompts: expected a "
                "layer whose first dimension is the batch, and a cache of the same rows"
            )
        if prompt.tokens not in (None, tokens):
            raise RuntimeError(
                f"an edited layer got {tokens} tokens where the model got {prompt.tokens}: "
                "expected a layer that sees the model's tokens, and no prompts that another method "
                "inserts"
            )
        return prompt._replace(first=prompt.first.to(x.device), last=prompt.last.to(x.device))

    @property
    def running(self) -> Any:
        """What a checkpoint hands to its recomputation: the prompts of the running forward."""
        return None if self.forward is None else self.forward.prompt

    @contextmanager
    def resume(self, weights: Any) -> Iterator[None]:
        """Lets layers run inside a checkpoint, with the prompts that `running` gave it.

        When they run again, they act by what they have decided, without counting it again.
        """
        outer = self.forward
        first = outer is not None and outer.prompt is weights
        with super().resume(None):
            if weights is not None and self.forward is not None:
                again = weights if first else weights._replace(start=weights.length, copies=0)
                self.forward.prompt = again
            yield

    @contextmanager
    def given(self, prompt: Prompt) -> Iterator[None]:
        """Uses `prompt` in every forward of this thread while the context lasts."""
        before, self._call.prompt = self._given, prompt
        try:
            yield
        finally:
            self._call.prompt = before

    @property
    def is_free(self) -> bool:
        """Whether no prompts are given by `given` in this thread."""
        return self._given is None

    @property
    def _given(self) -> Prompt | None:
        return getattr(self._call, "prompt", None)

    # --- installing ---

    def install(self) -> None:
        """Adds the hooks and stand-ins; `remove` takes them away again."""
        model, methods = self.model, self.recomputation.stand_ins()
        roots: dict[nn.Module, Callable[..., None]]
        if self._is_encoder_decoder:
            roots = dict.fromkeys((model, model.base_model), self._enter_both)
            roots |= {model.get_encoder(): self._enter, model.get_decoder(): self._enter_decoder}
        else:
            # The model with its head, and the one inside it, which may be called on its own.
            roots = dict.fromkeys((model, model.base_model), self._enter)
        for root, enter in roots.items():
            self._hook(root, enter, self._leave)
        methods |= REFUSED
        methods["generate"] = self._generate
        self._stand_in({name: m for name, m in methods.items() if hasattr(model, name)})
        self.recomputation.install()

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def _is_causal(self) -> bool:
        return not self._is_encoder_decoder and bool(self.model.can_generate())

    # --- forwards ---

    def _generate(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = {name: getattr(self._call, name, None) for name in _OF_GENERATE}
        inputs = prompt_of(self.model, generation_arguments(own, args, kwargs))
        if not self._is_encoder_decoder:
            self._call.generation = self._of_text({**inputs, "labels": None})
        text = _tokens(inputs)
        self._call.samples = text.shape[0] if isinstance(text, Tensor) else None
        self._call.decided = {}
        if self.together:
            kwargs.setdefault("synced_gpus", True)
        try:
            with self.generating():
                return own(*args, **kwargs)
        finally:
            vars(self._call).update(before)

    @property
    def _samples(self) -> int | None:
        """How many prompts `generate` is given, in this thread; None outside of it."""
        return getattr(self._call, "samples", None)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begins the forward of a decoder-only or encoder-only model, or of an encoder."""
        outer = self.current()
        if not self.is_free:
            return  # the prompts are known
        if outer is not None and outer.module is not module and module is not self.model:
            return  # the model with its head has begun
        forward = self.begin(module)
        inputs = self._named(module, args, kwargs)
        start, carried = self._carried(inputs)
        prompt = getattr(self._call, "generation", None)
        if prompt is not None:
            rows = _tokens(inputs).shape[0]
            first, last = (for_rows(t, rows, True) for t in (prompt.first, prompt.last))
            query = None if prompt.query is None else for_rows(prompt.query, rows, True)
            decided = prompt.decided  # of the steps before, without a cache
            if inputs.get("past_key_values") is not None:
                of_it = carried is not None and carried.length == prompt.length
                decided = dict(carried.decided) if carried is not None and of_it else {}
            prompt = Prompt(first, last, prompt.length, 0, query, decided)
        elif start == 0:
            prompt = self._of_text(inputs)
        elif carried is None:
            raise RuntimeError(
                f"past_key_values: got a {type(inputs['past_key_values']).__name__} that was "
                "filled before the model was edited, so what holds for its prompts is unknown; run "
                "the whole input"
            )
        elif start < carried.length:
            raise RuntimeError(
                f"past_key_values: got {start} tokens of a prompt of {carried.length}, so where "
                "the prompt that continues them ends is unknown: run the whole input, or use "
                "generate"
            )
        else:
            prompt = carried._replace(decided=dict(carried.decided))
        self._set(forward, prompt, start, _tokens(inputs))

    def _enter_both(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begins the forward of an encoder-decoder model."""
        if not self.is_free:
            return
        given: Any = self._named(module, args, kwargs).get("encoder_outputs")
        self._call.query = given.get(self.carried) if hasattr(given, "get") else None

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.current()
        if not self.is_free:
            return
        forward = self.begin(module)
        inputs = self._named(module, args, kwargs)
        start, carried = self._carried(inputs)
        tokens = _tokens(inputs)
        query = getattr(self._call, "query", None)
        if self.by_function and query is None:
            raise RuntimeError(
                "encoder_outputs: got none that carry what edits are looked up by: pass the "
                "encoder's own output object (return_dict=True)"
            )
        zeros = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        decided = {} if carried is None else dict(carried.decided)
        held = getattr(self._call, "decided", None)
        if inputs.get("past_key_values") is None and held is not None:
            decided = held  # of the steps before, without a cache
        self._set(forward, _of_decoder(zeros, query, decided), start, tokens)

    def _set(self, forward: Forward, prompt: Prompt | None, start: int, tokens: Any) -> None:
        if prompt is None:
            return
        rows = prompt.last.shape[0]
        copies = max(1, rows // (self._samples or rows)) if rows else 1
        count = tokens.shape[-2] if tokens.is_floating_point() else tokens.shape[-1]
        forward.prompt = prompt.moved(start)._replace(tokens=count, copies=copies)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        forward = self.forward
        if forward is not None and forward.module is module and output is not None:
            cache = self._named(module, args, kwargs).get("past_key_values")
            cache = getattr(output, "past_key_values", None) if cache is None else cache
            if cache is not None:
                setattr(cache, self.carried, forward.prompt)
            if self._is_encoder_decoder and module is self.model.get_encoder():
                self._keep_query(None if forward.prompt is None else forward.prompt.query, output)
        if self._is_encoder_decoder and module in (self.model, self.model.base_model):
            self._call.query = None  # the decoder on its own cannot know it
        self.end(module)

    def _keep_query(self, query: Tensor | None, output: Any) -> None:
        """Lets the encoder's output carry what its texts are looked up by."""
        self._call.query = query
        if query is not None and hasattr(output, "keys"):
            output[self.carried] = query

    def _of_text(self, inputs: Mapping[str, Any]) -> Prompt | None:
        """Finds the prompts of texts that begin in this forward; None if it is given no tokens."""
        inputs = for_router(self.model, inputs)
        if find_segments(inputs, self._is_causal) is not None:
            raise RuntimeError(
                "position_ids: got several texts in a row, expected one text per row, whose end "
                "decides which edit acts: give the model a padded batch"
            )
        text = _tokens(inputs)
        if text is None:
            return None
        shape = text.shape[:2]
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=text.device)
        elif not isinstance(mask, Tensor) or mask.shape != shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise RuntimeError(
                f"attention_mask: got {got}, expected {tuple(shape)}, which tells where the "
                "prompts end"
            )
        mask, labels = mask.bool(), inputs.get("labels")
        if labels is not None and labels.shape == shape and self._is_causal():
            before = mask & (((labels != -100) & mask).long().cumsum(1) == 0)
            mask = torch.where(before.any(1, keepdim=True), before, mask)
        first = mask.long().argmax(1)
        last = shape[1] - 1 - mask.long().flip(1).argmax(1)
        query = self._query_of(inputs.get("input_ids"), mask)
        return Prompt(first, last, shape[1], 0, query, {})

    def _query_of(self, ids: Tensor | None, mask: Tensor) -> Tensor | None:
        if not self.by_function:
            return None
        if self.query is None:
            raise RuntimeError(
                "edits of this model are looked up by a function, which is not saved with them: "
                f"call model.{self.name}.look_up_by(function) first"
            )
        if ids is None:
            raise RuntimeError("input_ids: got None, expected tokens, to look up their edits by")
        query = self.query([row[kept] for row, kept in zip(ids, mask, strict=True)])
        if query.dim() != 2 or query.shape[0] != ids.shape[0]:
            raise RuntimeError(
                f"query: got shape {tuple(query.shape)}, expected [{ids.shape[0]}, D]"
            )
        return query

    def _carried(self, inputs: Mapping[str, Any]) -> tuple[int, Prompt | None]:
        """Returns how many tokens the cache has, and the prompts that it carries."""
        cache = inputs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        return start, getattr(cache, self.carried, None) if start else None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._call = threading.local()


def _of_decoder(zeros: Tensor, query: Tensor | None, decided: dict[str, Tensor]) -> Prompt:
    """The prompts of a decoder: its first token [B]."""
    return Prompt(zeros, zeros, 1, 0, query, decided)


def _tokens(inputs: Mapping[str, Any]) -> Any:
    """Returns input_ids or inputs_embeds."""
    ids = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if ids is None else ids
