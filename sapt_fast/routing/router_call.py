"""Calls the router on the inputs of a forward: once per text, whatever shape the inputs have."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sapt_fast.routing.inputs import for_router, unreadable
from sapt_fast.routing.packing import Segments, find_segments

_READ = ("input_ids", "inputs_embeds", "attention_mask", "labels")
NO_CONTINUOUS_BATCHING = (
    "continuous batching packs all requests into one row, where weights per sample have no "
    "meaning: use generate() with a padded batch, or model.sapt.export_adapter"
)


class RouterCall:
    """The router of one model, and what it reads.

    Args:
        model: the transformers model (inside any wrapper).
        route: computes weights [B, K] from keyword arguments input_ids, inputs_embeds,
            attention_mask and labels of texts in rows of their own.
    """

    def __init__(self, model: Any, route: Callable[..., Tensor]) -> None:
        self.model = model
        self.route = route

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def is_causal(self) -> bool:
        """Returns whether the model is decoder-only."""
        model = self.model
        return not self.is_encoder_decoder and (
            bool(model.can_generate())
            or any(getattr(module, "is_causal", False) for module in model.modules())
        )

    def weights(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Segments | None]:
        """Returns the router's weights for the inputs of a forward.

        Args:
            inputs: input_ids [B, T] or inputs_embeds [B, T, D], attention_mask, labels,
                position_ids and whatever else the forward is given, by name.

        Returns:
            weights [B, K]; for packed rows [B, T, K], and with them their texts.

        Raises:
            ValueError, RuntimeError: as `for_router` and `find_segments`.
        """
        inputs = for_router(self.model, inputs)
        segments = find_segments(inputs, self.is_causal)
        if segments is not None:
            return segments.weights(self.route, inputs), segments
        return self.route(**{name: inputs.get(name) for name in _READ}), None

    def of_forward(
        self, module: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Segments | None]:
        """`weights` for the forward of `module`, which may have been given no text at all.

        Raises:
            ValueError: if there is no text and the router cannot do without.
            RuntimeError: if the inputs are those of continuous batching; and as `weights`.
        """
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            try:
                return self.route(**dict.fromkeys(_READ)), None
            except Exception as error:
                raise ValueError(unreadable(module, inputs)) from error
        # A paged cache contains the beginnings of the texts.
        if inputs.get("write_index") is not None:
            raise RuntimeError(NO_CONTINUOUS_BATCHING)
        if self.is_encoder_decoder:
            inputs = {**inputs, "labels": None}
        return self.weights(inputs)

    def of_texts(self, function: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """[S, D], what `function` returns for each of S texts; inputs and errors as `weights`."""
        inputs = for_router(self.model, inputs)
        segments = find_segments(inputs, self.is_causal)
        if segments is not None:
            return segments.rows(function, inputs)
        return function(**{name: inputs.get(name) for name in _READ})
