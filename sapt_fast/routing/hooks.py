"""The hooks by which the weights of a forward are set before its layers run.

`Routing` joins the parts: the running weights (`running`), the router (`router_call`), `generate`
and what it passes on (`generation`) and gradient checkpointing (`recompute`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sapt_fast.routing.forward import Forward
from sapt_fast.routing.generation import Generation, for_rows, is_filled
from sapt_fast.routing.inputs import for_router, row_counts
from sapt_fast.routing.installed import Installed
from sapt_fast.routing.packing import Segments, find_segments
from sapt_fast.routing.recompute import Recomputation
from sapt_fast.routing.router_call import RouterCall
from sapt_fast.routing.stand_in import StandIn

# Arguments of a patched model's forward that the model itself does not see. A decoder-only model's
# `routing_labels` [B, T] tell the router what is prompt, as labels would.
_OURS = ("mixture", "routing_labels")
# Methods by which transformers puts PEFT's layers inside a model.
_ADAPTERS_INSIDE = ("add_adapter", "load_adapter")


class Routing(Installed):
    """The running mixture weights of one patched model and the hooks that set them.

    Args:
        model: the transformers model (inside any wrapper).
        route: computes weights [B, K] from keyword arguments input_ids, inputs_embeds,
            attention_mask and labels of texts in rows of their own.
        active: whether there is anything to mix; if not, nothing is routed.
        count: K, the number of weights per row that a caller has to give.

    Attributes:
        admit: called with the weights of a forward before its layers run; raises if these cannot
            mix by them.
    """

    def __init__(
        self,
        model: Any,
        route: Callable[..., Tensor],
        active: Callable[[], bool],
        count: Callable[[], int],
    ) -> None:
        super().__init__(model, active, count)
        self.router = RouterCall(model, route)
        self.generation = Generation(model, self, self.router)
        self.recomputation = Recomputation(model, self)
        self.admit: Callable[[Tensor], None] | None = None

    def routed(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Segments | None]:
        """As `RouterCall.weights`: [B, K], or of packed rows [B, T, K] and their texts."""
        return self.router.weights(inputs)

    def of_texts(self, function: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """As `RouterCall.of_texts`: [S, D], what `function` returns for each of S texts."""
        return self.router.of_texts(function, inputs)

    # --- installing ---

    def install(self) -> None:
        """Adds the hooks and stand-ins; `remove` takes them away again."""
        model = self.model
        for root in dict.fromkeys(self.roots()):
            self._hook(root, self._enter_model, self._leave_model)
        if self.router.is_encoder_decoder:
            self._hook(model.get_encoder(), self._enter_encoder, self._leave_encoder)
            decoder = model.get_decoder()
            self._hooks.append(decoder.register_forward_pre_hook(self._enter_decoder))
        methods = {**self.generation.stand_ins(), **self.recomputation.stand_ins()}
        for name in _ADAPTERS_INSIDE:
            if hasattr(model, name):
                methods[name] = _refuse_adapters_inside
        self._stand_in(methods)
        self.recomputation.install()

    def roots(self) -> tuple[Any, ...]:
        """The model with its head, and the one inside it, which may be called on its own."""
        return self.model, self.model.base_model

    # --- the model ---

    def _enter_model(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel shares one set of weights between its replicas: use "
                "DistributedDataParallel, or launch with torchrun or accelerate"
            )
        forward = self.current()
        inside = forward is not None and forward.module is not module
        if inside and module is not self.model:
            return args, kwargs  # the model with its head has routed
        given, labels = kwargs.get("mixture"), kwargs.get("routing_labels")
        if given is not None:
            given = self.checked(given)
        if any(name in kwargs for name in _OURS):
            kwargs = {name: value for name, value in kwargs.items() if name not in _OURS}
        forward = self.begin(module)
        inputs = self._named(module, args, kwargs)
        if labels is not None:
            inputs = {**inputs, "labels": labels}
        forward.given = self.pinned if given is None else given
        self._set(forward, self._chosen(forward, inputs, given), inputs)
        return args, kwargs

    def _chosen(
        self, forward: Forward, inputs: dict[str, Any], given: Tensor | None
    ) -> Tensor | None:
        """The weights of a forward: given or pinned ones, else carried ones, else the router's.

        Args:
            forward: has begun.
            inputs: its arguments by name.
            given: weights from its caller.
        """
        cache, encoder_outputs = inputs.get("past_key_values"), inputs.get("encoder_outputs")
        weights = self.pinned if given is None else given
        if weights is not None:
            return weights
        if self.router.is_encoder_decoder:
            if encoder_outputs is None:
                return None  # the encoder's hook sets them
            return self.generation.from_encoder_outputs(encoder_outputs)
        if is_filled(cache):
            return self.generation.from_cache(cache)
        weights = self._routed(forward, self.model, inputs)
        if weights is not None and self.is_generating:
            self.keep_while_generating(weights)  # `generate` was given no text to route by
        return weights

    def _routed(self, forward: Forward, module: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        if not self.routes:
            return None
        weights, forward.segments = self.router.of_forward(module, inputs)
        return weights

    def _leave_model(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self.forward
        cache = self._named(module, args, kwargs).get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        without = output is None or self.router.is_encoder_decoder  # no output after an error
        if cache is not None and forward is not None and not without:
            cache.routing_weights = forward.per_row
        self.end(module)

    # --- encoder and decoder, inside the model or on their own ---

    def _enter_encoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        forward = self.current()
        if forward is None or forward.module is module:
            forward = self.begin(module)
        inputs = self._named(module, args, kwargs)
        given = self.pinned if forward.given is None else forward.given
        weights = self._routed(forward, module, inputs) if given is None else given
        self._set(forward, weights, inputs)

    def _leave_encoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self.forward
        if forward is not None and forward.per_row is not None and hasattr(output, "keys"):
            output["routing_weights"] = forward.per_row
        self.end(module)

    def _enter_decoder(self, module: nn.Module, args: tuple) -> None:
        self.current()

    # --- weights of each row ---

    def _set(self, forward: Forward, weights: Tensor | None, inputs: dict[str, Any]) -> None:
        forward.weights = forward.per_row = weights
        if weights is not None:
            self._set_rows(forward, weights, inputs)
        if forward.weights is not None and self.admit is not None:
            self.admit(forward.weights)

    def _set_rows(self, forward: Forward, weights: Tensor, inputs: dict[str, Any]) -> None:
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
                texts = for_router(forward.module, inputs)
                segments = find_segments(texts, self.router.is_causal)
                if segments is not None and len(segments) == weights.shape[0]:
                    forward.segments, weights = segments, segments.spread(weights)
        forward.per_row = for_rows(weights, rows, generating)
        if weights.dim() == 3 or weights.shape[0] > 1:
            forward.weights = forward.per_row


def require_unrouted(model: nn.Module) -> None:
    """Raises ValueError if a model still has the hooks of a patch whose handle is gone."""
    if isinstance(vars(model).get("_set_gradient_checkpointing"), StandIn):
        raise ValueError(
            f"model: this {type(model).__name__} still has the hooks of an earlier patch, whose "
            "handle is on the model that was patched then: call sapt_fast.unpatch on that one first"
        )


def _refuse_adapters_inside(own: Any, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "this model is patched: an adapter that transformers adds inside of it would act in "
        "addition to the mixture. For a PeftModel, call add_adapter or load_adapter of the "
        "PeftModel itself; else model.sapt.add_task(name), or sapt_fast.unpatch(model) first"
    )
