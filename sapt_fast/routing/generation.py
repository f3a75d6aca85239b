"""How weights travel through `generate`: pinned for the call, or inside what is passed on.

A decoder-only model's weights are those of the prompt and stay pinned for the whole call. It also
keeps the weights of a text's first forward in its cache, `routing_weights` [B, K], and uses them
for as long as the cache is used, by hand or in another `generate`. Code that moves a cache's rows
to other samples (`reorder_cache`, `batch_select_indices`) must move these alike; beams need not,
they stay within their sample. A cache with weights per token [B, T, K] cannot be continued: they
say nothing about the tokens that follow.

An encoder-decoder model's weights are an entry of the encoder's output, `routing_weights`, which
`generate` passes to every forward of the decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapt_fast.routing.router_call import NO_CONTINUOUS_BATCHING, RouterCall
from sapt_fast.routing.running import Running
from sapt_fast.routing.stand_in import generation_arguments


def _refuse_continuous_batching(own: Any, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(NO_CONTINUOUS_BATCHING)


# Methods of a model that pack the texts of several requests into one row.
REFUSED: dict[str, Callable[..., Any]] = dict.fromkeys(
    ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"),
    _refuse_continuous_batching,
)


def for_rows(weights: Tensor, rows: int, generating: bool) -> Tensor:
    """Gives each row of a forward the weights of its sample, also for beams.

    `generate` repeats every sample of a batch once per beam or returned sequence, the copies of a
    sample one after the other; beam search moves rows only among these copies. So the weights are
    repeated in the same order, and reordering beams changes nothing. (The encoder's output is
    repeated by `generate` itself, and the weights in it alike.)

    Args:
        weights: [S, K] or [S, T, K] of S samples; S = 1 is for all rows alike.
        rows: B, a multiple of S.
        generating: whether `generate` runs; only then is a sample more than one row.

    Returns:
        [B, K] or [B, T, K].

    Raises:
        RuntimeError: if the weights are those of another batch.
    """
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


class Generation:
    """What stands in for one model's `generate`, and reads weights from what it passes on.

    Args:
        model: the transformers model (inside any wrapper).
        running: its running weights.
        router: computes those of a prompt.
    """

    def __init__(self, model: Any, running: Running, router: RouterCall) -> None:
        self.model = model
        self.running = running
        self.router = router

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        """By name, the methods that stand in for the model's own; see `StandIn`."""
        methods: dict[str, Callable[..., Any]] = {"generate": self.generate}
        methods |= REFUSED
        return {name: method for name, method in methods.items() if hasattr(self.model, name)}

    def generate(
        self, own: Callable[..., Any], *args: Any, mixture: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Returns the model's own `generate`, with weights that hold for the whole call.

        Args:
            own: the model's method; args and kwargs are its arguments.
            mixture: weights [K] or [B, K] that override the router's.
        """
        if mixture is not None:
            with self.running.pin(self.running.checked(mixture)):
                return self.generate(own, *args, **kwargs)
        with self.running.generating():
            weights = self._of_prompt(generation_arguments(own, args, kwargs))
            if weights is None:
                return own(*args, **kwargs)
            with self.running.pin(weights):
                return own(*args, **kwargs)

    def _of_prompt(self, named: Mapping[str, Any]) -> Tensor | None:
        """Returns the weights for a whole call of `generate`; None if each forward finds its own.

        Args:
            named: the arguments of the call, by name.
        """
        running = self.running
        if self.router.is_encoder_decoder or running.pinned is not None or not running.routes:
            return None
        cache = named.get("past_key_values")
        if is_filled(cache):
            return self.from_cache(cache)
        prompt = {**prompt_of(self.model, named), "labels": None}
        if prompt.get("input_ids") is None and prompt.get("inputs_embeds") is None:
            return None
        with torch.no_grad():
            weights, segments = self.router.weights(prompt)
        if segments is not None:
            raise RuntimeError(
                f"position_ids: got {len(segments)} texts in {segments.shape[0]} rows, which "
                "generate would continue as one text per row: give it a padded batch"
            )
        return weights

    def from_encoder_outputs(self, encoder_outputs: Any) -> Tensor | None:
        """Returns the weights that the encoder's output carries.

        Raises:
            RuntimeError: if it carries none, and the model routes.
        """
        is_dict = hasattr(encoder_outputs, "get")
        weights: Tensor | None = encoder_outputs.get("routing_weights") if is_dict else None
        if weights is None and self.running.routes:
            raise RuntimeError(
                f"encoder_outputs: got {type(encoder_outputs).__name__} without routing_weights; "
                "pass the encoder's own output object (return_dict=True), or run inside "
                "model.sapt.fixed(weights)"
            )
        return weights

    def from_cache(self, cache: Any) -> Tensor | None:
        """Returns the weights that a filled cache carries.

        Raises:
            RuntimeError: if it carries none and the model routes, or it carries those of tokens.
        """
        weights: Tensor | None = getattr(cache, "routing_weights", None)
        per_token = weights is not None and weights.dim() == 3 and self.running.merged is None
        if per_token or (weights is None and self.running.routes):
            why = "filled with packed rows or weights per token" if per_token else "did not fill"
            raise RuntimeError(
                f"past_key_values: got a {type(cache).__name__} that this model {why}, so the "
                "weights of the tokens that follow are unknown; run the whole input, or run inside "
                "model.sapt.fixed(weights)"
            )
        return weights


def prompt_of(model: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `generate` as the model's forward names them, with their mask.

    Args:
        model: the transformers model.
        named: the arguments by name.
    """
    prompt, main = dict(named), model.main_input_name
    if prompt.get(main) is None:
        prompt[main] = named.get("inputs")
    ids = prompt.get("input_ids")
    if prompt.get("attention_mask") is None and ids is not None:
        config = named.get("generation_config")
        settings = [named, vars(config) if config else {}, vars(model.generation_config)]
        prompt["attention_mask"] = _padding_mask(ids, settings)
    return prompt


def is_filled(cache: Any) -> bool:
    """Returns whether a cache contains tokens; None does not."""
    return cache is not None and int(cache.get_seq_length()) > 0


def _padding_mask(input_ids: Tensor, settings: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Returns the mask that `generate` infers if it is given none.

    Args:
        input_ids: [B, T].
        settings: where the ids of the pad token and the end token may be; the first one counts.

    Returns:
        [B, T] of int64, or None if nothing is masked.
    """
    pad, eos = (
        next((s[name] for s in settings if s.get(name) is not None), None)
        for name in ("pad_token_id", "eos_token_id")
    )
    stops = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in stops or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()
