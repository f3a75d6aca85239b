"""How the mixture weights of one forward reach every layer, whatever runs the model.

The weights are computed once, above the layers, and read by each of them. They travel through
generation inside the encoder's output (encoder-decoder models) or pinned for the whole call
(decoder-only models), and through gradient checkpointing as an input of the checkpointed function.
Every thread has its own, so concurrent callers never see each other's.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CONTINUOUS_BATCHING = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)


class Routing:
    """The running mixture weights of one patched model and the hooks that set them.

    Args:
        model: the transformers model (inside any wrapper).
        route: computes weights [B, K] from keyword arguments input_ids, inputs_embeds,
            attention_mask and labels.
        active: whether there is anything to mix; if not, nothing is routed.
    """

    def __init__(
        self, model: Any, route: Callable[..., Tensor], active: Callable[[], bool]
    ) -> None:
        self.model = model
        self.route = route
        self.active = active
        self._thread = threading.local()
        self._hooks: list[Any] = []
        self._replaced: dict[str, Any] = {}
        self._argument_names: dict[type[nn.Module], tuple[str, ...]] = {}

    @property
    def weights(self) -> Tensor | None:
        """[B, K] (or [B, T, K]) of the forward that runs, or ran last, in this thread."""
        return getattr(self._thread, "weights", None)

    @weights.setter
    def weights(self, value: Tensor | None) -> None:
        self._thread.weights = value

    @property
    def pinned(self) -> Tensor | None:
        """Weights that stand in for the router's until released, in this thread."""
        return getattr(self._thread, "pinned", None)

    @contextmanager
    def pin(self, weights: Tensor) -> Iterator[None]:
        """Uses `weights` in every forward of this thread while the context lasts."""
        before = self.pinned
        self._thread.pinned = self.weights = weights
        try:
            yield
        finally:
            self._thread.pinned = before
            if before is not None:
                self.weights = before

    def install(self) -> None:
        """Adds the hooks; `remove` takes them away again."""
        model = self.model
        # The model with its head, and the one inside it, which may be called on its own.
        for root in dict.fromkeys((model, model.base_model)):
            self._hook(root, self._enter_model, self._leave_model)
        if self._is_encoder_decoder:
            self._hook(model.get_encoder(), self._enter_encoder, self._leave_encoder)
        elif hasattr(model, "generate"):
            self._replace("generate", self._generate)
        for name in _CONTINUOUS_BATCHING:
            if hasattr(model, name):
                self._replace(name, self._refuse_continuous_batching)
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
        self, module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]
    ) -> None:
        self._argument_names[type(module)] = tuple(inspect.signature(module.forward).parameters)
        self._hooks += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]

    # --- forward hooks ---

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel shares one set of weights between its replicas: use "
                "DistributedDataParallel, or launch with torchrun or accelerate"
            )
        if module is self.model:
            self._thread.inside = True
        elif getattr(self._thread, "inside", False):
            return  # the model with its head has routed
        inputs = self._named(module, args, kwargs)
        cache, encoder_outputs = inputs.get("past_key_values"), inputs.get("encoder_outputs")
        if self.pinned is not None:
            self.weights = self.pinned
        elif self._is_encoder_decoder:
            if encoder_outputs is not None:
                self.weights = self._from_encoder_outputs(encoder_outputs)
        elif cache is not None and int(cache.get_seq_length()):
            self.weights = self._from_cache(cache)
        else:
            self.weights = self._from_inputs(inputs)

    def _leave_model(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        if module is self.model:
            self._thread.inside = False
        cache = self._named(module, args, kwargs).get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None and not self._is_encoder_decoder:
            cache.routing_weights = self.weights

    def _enter_encoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pinned = self.pinned
        inputs = self._named(module, args, kwargs)
        self.weights = self._from_inputs(inputs) if pinned is None else pinned

    def _leave_encoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.weights is not None and hasattr(output, "keys"):
            output["routing_weights"] = self.weights

    def _named(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        return {**dict(zip(self._argument_names[type(module)], args, strict=False)), **kwargs}

    def _from_encoder_outputs(self, encoder_outputs: Any) -> Tensor | None:
        is_dict = hasattr(encoder_outputs, "get")
        weights = encoder_outputs.get("routing_weights") if is_dict else None
        if weights is None and self.active():
            raise RuntimeError(
                f"encoder_outputs: got {type(encoder_outputs).__name__} without routing_weights; "
                "pass the encoder's own output object (return_dict=True), or run inside "
                "model.sapt.fixed(weights)"
            )
        return weights

    def _from_cache(self, cache: Any) -> Tensor | None:
        weights = getattr(cache, "routing_weights", None)
        if weights is None and self.active():
            raise RuntimeError(
                f"past_key_values: got a {type(cache).__name__} that this model did not fill, so "
                "the weights of its tokens are unknown; run the whole input, or run inside "
                "model.sapt.fixed(weights)"
            )
        return weights

    def _from_inputs(self, inputs: dict[str, Any]) -> Tensor | None:
        if not self.active():
            return None
        return self.route(
            input_ids=inputs.get("input_ids"),
            inputs_embeds=inputs.get("inputs_embeds"),
            attention_mask=inputs.get("attention_mask"),
            labels=None if self._is_encoder_decoder else inputs.get("labels"),
        )

    # --- methods that stand in for the model's own ---

    def _generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        generate = self._own("generate")
        ids, embeds = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
        if self.pinned is not None or not self.active() or (ids is None and embeds is None):
            return generate(inputs, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None and ids is not None:
            config = kwargs.get("generation_config", next(iter(args), None))
            own = vars(self.model.generation_config)
            mask = _padding_mask(ids, [kwargs, vars(config) if config else {}, own])
        with torch.no_grad():
            weights = self.route(input_ids=ids, inputs_embeds=embeds, attention_mask=mask)
        with self.pin(weights):
            return generate(inputs, *args, **kwargs)

    def _refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "continuous batching packs all requests into one row, where weights per sample have no "
            "meaning: use generate() with a padded batch, or model.sapt.export_adapter"
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
        self.__dict__.update(state, _thread=threading.local())


class _Checkpoint:
    """A checkpoint function that hands the weights to the recomputation as an input."""

    def __init__(self, routing: Routing, function: Callable[..., Any]) -> None:
        self.routing = routing
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(layer, *args, **kwargs)

        def run(weights: Tensor | None, *inner: Any) -> Any:
            before, self.routing.weights = self.routing.weights, weights
            try:
                return layer(*inner)
            finally:
                self.routing.weights = before

        return self.function(run, self.routing.weights, *args, **kwargs)


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
