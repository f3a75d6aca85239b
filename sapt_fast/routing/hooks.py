"""How the mixture weights of one forward reach every layer, whatever runs the model.

The weights are computed once, above the layers, and read by each of them. They travel through
generation inside the encoder's output (encoder-decoder models) or pinned for the whole call
(decoder-only models), and through gradient checkpointing as an input of the checkpointed function.
Every thread has its own, so concurrent callers never see each other's. A layer that is reached in
another way (a part of the model called on its own, activation checkpointing that transformers does
not know of) finds none and raises.

A decoder-only model keeps the weights of a text's first forward in its cache, `routing_weights`
[B, K], and uses them for as long as the cache is used, by hand or in another `generate`. Whoever
moves a cache's rows to other samples (`reorder_cache`, `batch_select_indices`) must move these
alike; beams need not, they stay within their sample. A cache with weights per token [B, T, K] is of
no further use: they say nothing about the tokens that follow.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sapt_fast.ops import transforms
from sapt_fast.routing.inputs import for_router, row_counts, unreadable
from sapt_fast.routing.packing import Segments, find_segments
from sapt_fast.routing.stand_in import StandIn, generation_arguments, positional_names

if TYPE_CHECKING:
    from sapt_fast.sites.linear import Waiting
    from sapt_fast.sites.merging import Merged

_ROUTED_BY = ("input_ids", "inputs_embeds", "attention_mask", "labels")
# Arguments of a patched model's forward that the model itself does not see. A decoder-only model's
# `routing_labels` [B, T] tell the router what is prompt, as labels would.
_OURS = ("mixture", "routing_labels")
_CONTINUOUS_BATCHING = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)
_NO_CONTINUOUS_BATCHING = (
    "continuous batching packs all requests into one row, where weights per sample have no "
    "meaning: use generate() with a padded batch, or model.sapt.export_adapter"
)
# Methods by which transformers puts PEFT's layers inside a model.
_ADAPTERS_INSIDE = ("add_adapter", "load_adapter")


class Aligned(Protocol):
    """What must be in place before layers run: an adapter pool, or all pools of a PEFT model."""

    def realign(self) -> None:
        """Puts rows back in place whose parameters were moved."""


class _Forward:
    """A forward in progress.

    Args:
        module: whose call it is; None for the recomputation of a checkpoint.
        outer: the forward that it is part of.
        frame: what runs it, to tell a forward that was interrupted; None if it cannot be.

    Attributes:
        given: the caller's weights, which stand in for the router's.
        weights: what its layers mix by: [B, K], [B, T, K], or [1, K] for all samples alike.
        per_row: the same with a row for each of the B samples.
        segments: the texts of packed rows, where weights are those of each text; or None.
        waiting: outputs of layers that were computed with another one of the same input.
        inserted: whether a prompt stands before its tokens and has to be taken out again.
    """

    def __init__(
        self, module: nn.Module | None, outer: "_Forward | None", frame: FrameType | None
    ) -> None:
        self.module = module
        self.outer = outer
        self.frame = frame
        self.given: Tensor | None = None
        self.weights: Tensor | None = None
        self.per_row: Tensor | None = None
        self.segments: Segments | None = None
        self.waiting: Waiting = {}
        self.inserted = False

    def interrupted(self) -> bool:
        """Whether it ended without a word, as KeyboardInterrupt ends it: its frame is gone."""
        frame = None if self.frame is None else sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not self.frame


class Routing:
    """The running mixture weights of one patched model and the hooks that set them.

    Args:
        model: the transformers model (inside any wrapper).
        route: computes weights [B, K] from keyword arguments input_ids, inputs_embeds,
            attention_mask and labels of texts in rows of their own.
        active: whether there is anything to mix; if not, nothing is routed.
        count: K, of the weights that a caller may give.

    Attributes:
        merged: the layers whose weights hold a mixture by now, so that nothing is routed; or None.
        pools: of the layers; a forward that is not compiled itself makes sure that their rows are
            in place for layers that are.
        admit: looks at the weights of a forward before its layers run; raises if they cannot.
    """

    def __init__(
        self,
        model: Any,
        route: Callable[..., Tensor],
        active: Callable[[], bool],
        count: Callable[[], int],
    ) -> None:
        self.model = model
        self.route = route
        self.active = active
        self.count = count
        self.merged: Merged | None = None
        self.pools: list[Aligned] = []
        self.admit: Callable[[Tensor], None] | None = None
        self._thread = _thread_state()
        self._hooks: list[Any] = []
        self._replaced: dict[str, Any] = {}
        self._argument_names: dict[type[nn.Module], tuple[str, ...]] = {}

    @property
    def weights(self) -> Tensor | None:
        """[B, K] (or [B, T, K]) of the forward that ran last in this thread."""
        return transforms.alive(getattr(self._thread, "weights", None))

    @weights.setter
    def weights(self, value: Tensor | None) -> None:
        self._thread.weights = value

    @property
    def weights_of_texts(self) -> Tensor | None:
        """`weights`, of packed rows one row [K] for each text."""
        weights, segments = self.weights, getattr(self._thread, "segments", None)
        return weights if weights is None or segments is None else segments.of_texts(weights)

    @property
    def running(self) -> Tensor | None:
        """What a layer mixes by: the weights of the forward that it runs in, else the pinned."""
        forward = self._forward
        return self.pinned if forward is None else forward.weights

    @property
    def waiting(self) -> "Waiting | None":
        """Where layers of the running forward leave results for each other."""
        forward = self._forward
        return None if forward is None else forward.waiting

    @property
    def is_running(self) -> bool:
        """Whether a forward of the model runs in this thread."""
        return self._forward is not None

    @property
    def pinned(self) -> Tensor | None:
        """Weights that stand in for the router's until released, in this thread."""
        return getattr(self._thread, "pinned", None)

    @property
    def is_generating(self) -> bool:
        """Whether the model's `generate` runs in this thread."""
        return getattr(self._thread, "generating", False)

    @property
    def _forward(self) -> _Forward | None:
        """The innermost forward of this thread, maybe one that was interrupted."""
        return getattr(self._thread, "forward", None)

    @_forward.setter
    def _forward(self, value: _Forward | None) -> None:
        self._thread.forward = value

    def checked(self, weights: Tensor) -> Tensor:
        """Weights that a caller gives, as [1, K], [B, K] or [B, T, K].

        Raises:
            ValueError: the shape does not fit, or weights are integers or, on a CPU, not finite.
            RuntimeError: a mixture is merged into the base weights.
        """
        self.require_unmerged()
        weights, count = torch.as_tensor(weights), self.count()
        empty = 0 in weights.shape[:-1]
        if weights.dim() not in (1, 2, 3) or weights.shape[-1] != count or empty:
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)}, expected [{count}], [B, {count}] or "
                f"[B, T, {count}]"
            )
        # On a GPU the look would wait for all that runs there.
        known = transforms.values(weights) if weights.device.type == "cpu" else None
        infinite = known is not None and not bool(torch.isfinite(known).all())
        if not weights.is_floating_point() or infinite:
            raise ValueError("weights: got non-finite or integer values, expected finite floats")
        return weights[None] if weights.dim() == 1 else weights

    def unmerge(self) -> None:
        """Takes a merged mixture out of the base weights, where there is one."""
        if self.merged is not None:
            self.merged.restore()
            self.merged = None

    def require_unmerged(self) -> None:
        """Raises RuntimeError if a mixture is merged into the base weights."""
        if self.merged is not None:
            raise RuntimeError(
                "a mixture is merged into the base weights: call model.sapt.unmerge() first"
            )

    @property
    def _routes(self) -> bool:
        return self.merged is None and self.active()

    @contextmanager
    def pin(self, weights: Tensor) -> Iterator[None]:
        """Uses `weights` in every forward of this thread while the context lasts."""
        self._current()
        before, self._thread.pinned = self.pinned, weights
        try:
            yield
        finally:
            self._thread.pinned = before

    @contextmanager
    def resume(self, weights: Tensor | None) -> Iterator[None]:
        """Lets layers run outside of their forward, with the weights that it had."""
        before = self._forward
        forward = self._forward = _Forward(None, before, None)
        forward.weights = weights
        try:
            yield
        finally:
            self._forward = before

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Lets the model run inside one of its own forwards, which it knows nothing of."""
        before, self._forward = self._forward, None
        try:
            yield
        finally:
            self._forward = before

    def install(self) -> None:
        """Adds the hooks; `remove` takes them away again."""
        model = self.model
        # The model with its head, and the one inside it, which may be called on its own.
        for root in dict.fromkeys((model, model.base_model)):
            self._hook(root, self._enter_model, self._leave_model)
        if self._is_encoder_decoder:
            self._hook(model.get_encoder(), self._enter_encoder, self._leave_encoder)
            decoder = model.get_decoder()
            self._hooks.append(decoder.register_forward_pre_hook(self._enter_decoder))
        if hasattr(model, "generate"):
            own = partial(self._own, "generate")
            self._replace("generate", StandIn(self._generate, model.generate, own))
        for name in _CONTINUOUS_BATCHING:
            if hasattr(model, name):
                self._replace(name, self._refuse_continuous_batching)
        for name in _ADAPTERS_INSIDE:
            if hasattr(model, name):
                self._replace(name, self._refuse_adapters_inside)
        self._replace("_set_gradient_checkpointing", self._set_gradient_checkpointing)
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = _Checkpoint(self, function)

    def remove(self) -> None:
        """Restores the model's own methods and takes the hooks away."""
        for hook in self._hooks:
            hook.remove()
        for name, before in self._replaced.items():
            if before is None:
                del self.model.__dict__[name]
            else:
                self.model.__dict__[name] = before
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, _Checkpoint):
                module._gradient_checkpointing_func = function.function
        self._hooks, self._replaced = [], {}

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        self._replaced[name] = self.model.__dict__.get(name)
        self.model.__dict__[name] = method

    def _own(self, name: str) -> Callable[..., Any]:
        """The model's method `name` as it was before `install`."""
        before = self._replaced[name]
        return getattr(type(self.model), name).__get__(self.model) if before is None else before

    def _hook(
        self, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., None]
    ) -> None:
        self._argument_names[type(module)] = positional_names(module.forward)
        self._hooks += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]

    # --- forward hooks ---

    def _enter_model(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel shares one set of weights between its replicas: use "
                "DistributedDataParallel, or launch with torchrun or accelerate"
            )
        forward = self._current()
        inside = forward is not None and forward.module is not module
        if inside and module is not self.model:
            return args, kwargs  # the model with its head has routed
        given, labels = kwargs.get("mixture"), kwargs.get("routing_labels")
        if given is not None:
            given = self.checked(given)
        if any(name in kwargs for name in _OURS):
            kwargs = {name: value for name, value in kwargs.items() if name not in _OURS}
        forward = self._begin(module)
        inputs = self._named(module, args, kwargs)
        if labels is not None:
            inputs = {**inputs, "labels": labels}
        forward.given = self.pinned if given is None else given
        self._set(forward, self._chosen(inputs, given), inputs)
        return args, kwargs

    def _chosen(self, inputs: dict[str, Any], given: Tensor | None) -> Tensor | None:
        """The weights of a forward; `given` with this call, or else found out."""
        cache, encoder_outputs = inputs.get("past_key_values"), inputs.get("encoder_outputs")
        weights = self.pinned if given is None else given
        if weights is not None:
            return weights
        if self._is_encoder_decoder:
            return None if encoder_outputs is None else self._from_encoder_outputs(encoder_outputs)
        if is_filled(cache):
            return self._from_cache(cache)
        weights = self._from_inputs(self.model, inputs)
        if weights is not None and self.is_generating:
            self._thread.pinned = weights  # `generate` was given no text to route by
        return weights

    def _leave_model(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self._forward
        cache = self._named(module, args, kwargs).get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        failed = output is None
        if cache is not None and forward is not None and not (failed or self._is_encoder_decoder):
            cache.routing_weights = forward.per_row
        self._end(module)

    def _enter_encoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        forward = self._current()
        if forward is None or forward.module is module:
            forward = self._begin(module)
        inputs = self._named(module, args, kwargs)
        given = self.pinned if forward.given is None else forward.given
        weights = self._from_inputs(module, inputs) if given is None else given
        self._set(forward, weights, inputs)

    def _leave_encoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self._forward
        if forward is not None and forward.per_row is not None and hasattr(output, "keys"):
            output["routing_weights"] = forward.per_row
        self._end(module)

    def _enter_decoder(self, module: nn.Module, args: tuple) -> None:
        self._current()

    def _current(self) -> _Forward | None:
        """The forward that runs in this thread; forgets those that were interrupted."""
        forward = self._forward
        if not torch.compiler.is_compiling():
            while forward is not None and forward.interrupted():
                forward = forward.outer
            self._forward = forward
        return forward

    def _begin(self, module: nn.Module) -> _Forward:
        """A new forward, that of the module whose hook calls this."""
        frame = None
        if not torch.compiler.is_compiling():
            frame = sys._getframe(2)  # it calls the hook and then the module's forward
        for pool in self.pools:
            pool.realign()
        forward = self._forward = _Forward(module, self._forward, frame)
        return forward

    def _set(self, forward: _Forward, weights: Tensor | None, inputs: dict[str, Any]) -> None:
        forward.weights = forward.per_row = weights
        if weights is not None:
            self._set_rows(forward, weights, inputs)
        if forward.weights is not None and self.admit is not None:
            self.admit(forward.weights)

    def _set_rows(self, forward: _Forward, weights: Tensor, inputs: dict[str, Any]) -> None:
        assert forward.module is not None
        counts = row_counts(forward.module, inputs)
        if counts is None:
            return
        samples, rows = counts
        generating = self.is_generating
        if weights.shape[0] not in (1, rows) and not generating:
            if weights.shape[0] == samples:  # its choices have a sample's weights
                weights = weights.repeat_interleave(rows // samples, 0)
            elif weights.dim() == 2:
                segments = find_segments(for_router(forward.module, inputs), self._is_causal)
                if segments is not None and len(segments) == weights.shape[0]:
                    forward.segments, weights = segments, segments.spread(weights)
        forward.per_row = _for_rows(weights, rows, generating)
        if weights.dim() == 3 or weights.shape[0] > 1:
            forward.weights = forward.per_row

    def _end(self, module: nn.Module) -> None:
        forward = self._forward
        if forward is not None and forward.module is module:
            self.weights = forward.per_row
            self._thread.segments = forward.segments
            self._forward = forward.outer

    def _named(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        return {**dict(zip(self._argument_names[type(module)], args, strict=False)), **kwargs}

    def _from_encoder_outputs(self, encoder_outputs: Any) -> Tensor | None:
        is_dict = hasattr(encoder_outputs, "get")
        weights = encoder_outputs.get("routing_weights") if is_dict else None
        if weights is None and self._routes:
            raise RuntimeError(
                f"encoder_outputs: got {type(encoder_outputs).__name__} without routing_weights; "
                "pass the encoder's own output object (return_dict=True), or run inside "
                "model.sapt.fixed(weights)"
            )
        return weights

    def _from_cache(self, cache: Any) -> Tensor | None:
        weights: Tensor | None = getattr(cache, "routing_weights", None)
        per_token = weights is not None and weights.dim() == 3 and self.merged is None
        if per_token or (weights is None and self._routes):
            why = "filled with packed rows or weights per token" if per_token else "did not fill"
            raise RuntimeError(
                f"past_key_values: got a {type(cache).__name__} that this model {why}, so the "
                "weights of the tokens that follow are unknown; run the whole input, or run inside "
                "model.sapt.fixed(weights)"
            )
        return weights

    def _from_inputs(self, module: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        if not self._routes:
            return None
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            try:
                return self.route(**dict.fromkeys(_ROUTED_BY))
            except Exception as error:
                raise ValueError(unreadable(module, inputs)) from error
        # A paged cache holds the beginnings of the texts.
        if inputs.get("write_index") is not None:
            raise RuntimeError(_NO_CONTINUOUS_BATCHING)
        if self._is_encoder_decoder:
            inputs = {**inputs, "labels": None}
        weights, segments = self.routed(inputs)
        if self._forward is not None:
            self._forward.segments = segments
        return weights

    def routed(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Segments | None]:
        """The router's weights for the inputs of a forward.

        Args:
            inputs: input_ids [B, T] or inputs_embeds [B, T, D], attention_mask, labels,
                position_ids and whatever else the forward is given, by name.

        Returns:
            weights [B, K], of packed rows [B, T, K] and with them their texts.

        Raises:
            ValueError, RuntimeError: as `for_router` and `find_segments`.
        """
        inputs = for_router(self.model, inputs)
        segments = find_segments(inputs, self._is_causal)
        if segments is not None:
            return segments.weights(self.route, inputs), segments
        return self.route(**{name: inputs.get(name) for name in _ROUTED_BY}), None

    def of_texts(self, function: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """[S, D], what `function` returns for each text; arguments and errors as in `routed`."""
        inputs = for_router(self.model, inputs)
        segments = find_segments(inputs, self._is_causal)
        if segments is not None:
            return segments.rows(function, inputs)
        return function(**{name: inputs.get(name) for name in _ROUTED_BY})

    def _is_causal(self) -> bool:
        """Whether the model is decoder-only."""
        model = self.model
        return not self._is_encoder_decoder and (
            bool(model.can_generate())
            or any(getattr(module, "is_causal", False) for module in model.modules())
        )

    # --- methods that stand in for the model's own ---

    def _generate(self, *args: Any, mixture: Tensor | None = None, **kwargs: Any) -> Any:
        if mixture is not None:
            with self.pin(self.checked(mixture)):
                return self._generate(*args, **kwargs)
        generate = self._own("generate")
        before, pinned = self.is_generating, self.pinned
        self._thread.generating = True
        try:
            weights = self._of_prompt(generation_arguments(generate, args, kwargs))
            if weights is None:
                return generate(*args, **kwargs)
            with self.pin(weights):
                return generate(*args, **kwargs)
        finally:
            self._thread.generating, self._thread.pinned = before, pinned

    def _of_prompt(self, named: Mapping[str, Any]) -> Tensor | None:
        """The weights for a whole call of `generate`; None where its forwards choose theirs.

        Args:
            named: the arguments of the call, by name.
        """
        if self._is_encoder_decoder or self.pinned is not None or not self._routes:
            return None
        cache = named.get("past_key_values")
        if is_filled(cache):
            return self._from_cache(cache)
        prompt = {**self._prompt_of(named), "labels": None}
        ids = prompt.get("input_ids")
        if ids is None and prompt.get("inputs_embeds") is None:
            return None
        if prompt.get("attention_mask") is None and ids is not None:
            config = named.get("generation_config")
            own = vars(self.model.generation_config)
            settings = [named, vars(config) if config else {}, own]
            prompt["attention_mask"] = _padding_mask(ids, settings)
        with torch.no_grad():
            weights, segments = self.routed(prompt)
        if segments is not None:
            raise RuntimeError(
                f"position_ids: got {len(segments)} texts in {segments.shape[0]} rows, which "
                "generate would continue as one text per row: give it a padded batch"
            )
        return weights

    def _prompt_of(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` with `inputs` under the name that the model's forward has."""
        prompt, main = dict(named), self.model.main_input_name
        if prompt.get(main) is None:
            prompt[main] = named.get("inputs")
        return prompt

    def _refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_NO_CONTINUOUS_BATCHING)

    def _refuse_adapters_inside(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "this model is patched: an adapter that transformers adds inside of it would act "
            "beside the mixture. For a PeftModel, call add_adapter or load_adapter of the "
            "PeftModel itself; else model.sapt.add_task(name), or sapt_fast.unpatch(model) first"
        )

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        **options: Any,
    ) -> None:
        wrapped = _Checkpoint(self, gradient_checkpointing_func)
        own = self._own("_set_gradient_checkpointing")
        own(enable=enable, gradient_checkpointing_func=wrapped, **options)

    # The thread's weights belong to a running forward: a copy of the model starts without any.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=_thread_state())


class _Checkpoint:
    """A checkpoint function that hands the weights to the recomputation as an input."""

    def __init__(self, routing: Routing, function: Callable[..., Any]) -> None:
        self.routing = routing
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(layer, *args, **kwargs)

        def run(weights: Tensor | None, *inner: Any) -> Any:
            with self.routing.resume(weights):
                return layer(*inner)

        return self.function(run, self.routing.running, *args, **kwargs)


def require_unrouted(model: nn.Module) -> None:
    """Raises ValueError if a model still has the hooks of a patch whose handle is gone."""
    method = vars(model).get("_set_gradient_checkpointing")
    if isinstance(getattr(method, "__self__", None), Routing):
        raise ValueError(
            f"model: this {type(model).__name__} still has the hooks of an earlier patch, whose "
            "handle is on the model that was patched then: call sapt_fast.unpatch on that one first"
        )


def _thread_state() -> threading.local:
    state = threading.local()
    # Present from the start: a compiled forward is compiled again where one appears.
    state.forward = state.pinned = state.segments = None
    state.generating = False
    return state


def is_filled(cache: Any) -> bool:
    return cache is not None and int(cache.get_seq_length()) > 0


def _for_rows(weights: Tensor, rows: int, generating: bool) -> Tensor:
    """The weights of each of the input's rows; `generate` repeats samples, one after the other."""
    samples = weights.shape[0]
    if samples == rows:
        return weights
    if samples == 1:
        return weights.expand(rows, *weights.shape[1:])
    if not generating or rows % samples:
        raise RuntimeError(
            f"mixture weights for {samples} samples, but the model's input has {rows} rows: give "
            "one row per sample, or a single one for all"
        )
    return weights.repeat_interleave(rows // samples, 0)


def _padding_mask(input_ids: Tensor, settings: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """The mask that `generate` infers when it is given none, from the first settings that say."""
    pad, eos = (
        next((s[name] for s in settings if s.get(name) is not None), None)
        for name in ("pad_token_id", "eos_token_id")
    )
    stops = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in stops or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()
