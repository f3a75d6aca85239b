"""Where prompts enter and leave a vision transformer.

Before encoder layer l, the rows of the prompts are put behind those before the patches (CLS,
distillation token, registers), each plus CLS's position embedding. Behind the last layer they are
taken out again, so that callers see outputs of the usual shapes. Hidden states have no prompt
rows either; only the keys' side of attention maps contains them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.pools.prompts import ConcatenatedPrompts
from sapt_fast.routing.forward import Forward
from sapt_fast.routing.images import ImageRouting
from sapt_fast.sites.embeddings import checked_places
from sapt_fast.sites.image_embeddings import VisionParts

__all__ = ["ImagePromptRouting"]


class ImagePromptRouting(ImageRouting):
    """The places of prompts of an image model, and the hooks that insert and remove prompts.

    Args:
        model: the transformers model.
        route: computes places [B, N] from keyword arguments pixel_values and
            interpolate_pos_encoding; or returns None, so that `of_layer` computes them.
        active: whether there are prompts.
        count: N.
        pool: of the prompts.
        parts: of the model's tower.
        layer: the encoder layer before which the prompts enter, from 0.
        reads_prompts: whether the classifier reads the mean of the prompts' outputs.

    Attributes:
        of_layer: a number n of encoder layers, at most `layer`, and a function that computes places
            [B, N] from their output [B, prefix + patches, D]; or None.
    """

    def __init__(
        self,
        model: Any,
        route: Callable[..., Tensor | None],
        active: Callable[[], bool],
        count: Callable[[], int],
        pool: ConcatenatedPrompts,
        parts: VisionParts,
        layer: int,
        reads_prompts: bool,
    ) -> None:
        super().__init__(model, route, active, count)  # type: ignore[arg-type]
        self.pool, self.parts, self.tower = pool, parts, parts.tower
        self.layer, self.reads_prompts = layer, reads_prompts
        self.of_layer: tuple[int, Callable[[Tensor], Tensor]] | None = None
        self.pools.append(pool)

    def checked(self, weights: Tensor) -> Tensor:
        """Places that a caller gives, as [1, N] or [B, N].

        Raises:
            ValueError: if they have another shape or dtype or, on a CPU, there is no such prompt.
        """
        return checked_places(weights, self.count(), self.pool.total)

    def install(self) -> None:
        """Adds the hooks; `remove` takes them away again."""
        super().install()
        parts, hooks = self.parts, self._hooks
        if self.of_layer is not None:
            source = parts.layers[self.of_layer[0] - 1]
            hooks.append(source.register_forward_hook(self._choose_by_layer))
        for block in [*parts.layers][self.layer :]:
            hooks.append(block.register_forward_pre_hook(self._before_layer, with_kwargs=True))
            for name, bias in block.named_modules():
                if name.rpartition(".")[2] == "relative_position_bias":  # BEiT's
                    before = self._before_bias
                    hooks.append(bias.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.append(bias.register_forward_hook(self._after_bias))
        last = parts.layers[-1]
        hooks.append(last.register_forward_hook(self._after_layers, prepend=True))
        # Before the hook that ends the forward.
        hooks.append(parts.tower.register_forward_hook(self._after_tower, prepend=True))
        if self.reads_prompts:
            classifier: Any = parts.classifier
            hooks.append(classifier.register_forward_pre_hook(self._before_classifier))

    # --- the choice, where a layer of the running forward gives the query ---

    def _choose_by_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self.forward
        if forward is None or forward.weights is not None or self.of_layer is None:
            return
        if self.routes:
            hidden = _rows_of(output)
            places = self.of_layer[1](hidden.detach())
            self._set(forward, places, {"pixel_values": hidden})  # of which the rows are counted

    # --- layers ---

    def _places(self) -> tuple[Forward, Tensor] | None:
        """The running forward and its places [1, N] or [B, N]; None without prompts."""
        forward = self.forward
        if forward is None or forward.weights is None or not self.active():
            return None
        return forward, forward.weights

    def _before_layer(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        found = self._places()
        if found is None:
            return None
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None:
            mask = self._with_prompts(mask)
            if len(args) > 1:
                args = (args[0], mask, *args[2:])
            else:
                kwargs = {**kwargs, "attention_mask": mask}
        if module is self.parts.layers[self.layer]:
            if args:
                args = (self._inserted(args[0], found[1]), *args[1:])
            else:
                hidden = self._inserted(kwargs["hidden_states"], found[1])
                kwargs = {**kwargs, "hidden_states": hidden}
        return args, kwargs

    def _inserted(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Returns [B, prefix + P + patches, D] of hidden states [B, prefix + patches, D]."""
        parts, prefix = self.parts, self.parts.prefix
        rows = self.pool.chosen(places.to(self.pool.stack.trainable.device)).to(hidden.device)
        position = parts.cls_position()
        if position is not None:
            rows = rows + position
        rows = rows.to(hidden.dtype)
        if self.layer == 0:  # as any other row of the embeddings
            dropout = getattr(parts.embeddings, "dropout", None)
            rows = rows if dropout is None else dropout(rows)
            rows = rows if parts.pre_norm is None else parts.pre_norm(rows)
        rows = rows.to(hidden.dtype).expand(len(hidden), -1, -1)
        return torch.cat([hidden[:, :prefix], rows, hidden[:, prefix:]], 1)

    def _after_layers(self, module: nn.Module, args: Any, output: Any) -> Any:
        found = self._places()
        if found is None:
            return None
        hidden, first = _rows_of(output), self.parts.prefix
        last = first + self.pool.length
        found[0].prompt_outputs = hidden[:, first:last]
        hidden = torch.cat([hidden[:, :first], hidden[:, last:]], 1)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    # --- masks and biases, in which prompts are as CLS ---

    def _with_prompts(self, mask: Any) -> Tensor:
        """Returns a mask or bias [.., S, S] (or a mask [B, S]) with the prompts' rows and columns.

        Raises:
            ValueError: if the mask is no tensor, or the model has no CLS whose columns count.
        """
        prefix, length = self.parts.prefix, self.pool.length
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or not prefix:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask: got {got}, expected None, [B, S], or [B or 1, heads or 1, S, S] "
                "of a model with a CLS token, whose columns are also those of the prompts"
            )
        places = torch.arange(mask.shape[-1] + length, device=mask.device)
        prompts = (places >= prefix) & (places < prefix + length)
        places = torch.where(places < prefix, places, places - length).masked_fill(prompts, 0)
        mask = mask.index_select(-1, places)
        return mask if mask.dim() == 2 else mask.index_select(-2, places)

    def _before_bias(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._places() is None or kwargs.get("dim_size") is None:
            return None
        return args, {**kwargs, "dim_size": kwargs["dim_size"] - self.pool.length}

    def _after_bias(self, module: nn.Module, args: Any, bias: Tensor) -> Tensor | None:
        return None if self._places() is None else self._with_prompts(bias)

    # --- what callers see ---

    def _after_tower(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._places() is None:
            return None
        values = list(output) if isinstance(output, tuple) else list(output.values())
        self._require_gradient(values[0])
        count = values[0].shape[1] + self.pool.length
        stripped = [self._stripped(value, count) for value in values]
        if isinstance(output, tuple):
            return tuple(stripped)
        for name, value in zip(list(output.keys()), stripped, strict=True):
            output[name] = value
        return output

    def _stripped(self, value: Any, count: int) -> Any:
        """Hidden states and attention maps of `count` rows without those of the prompts."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._stripped(inner, count) for inner in value)
        if not isinstance(value, Tensor) or value.dim() not in (3, 4):
            return value
        first, side = self.parts.prefix, value.dim() - 2
        if value.shape[side] != count:
            return value
        rest = value.narrow(side, first + self.pool.length, count - first - self.pool.length)
        return torch.cat([value.narrow(side, 0, first), rest], side)

    def _before_classifier(self, module: nn.Module, args: tuple) -> tuple | None:
        forward = self.forward
        if forward is None or forward.prompt_outputs is None:
            return None
        self._require_gradient(forward.prompt_outputs)
        read = args[0]
        prompts = self.parts.norm(forward.prompt_outputs).mean(1).to(read.dtype)
        # DINOv2's classifier reads the mean of the patches behind CLS.
        return torch.cat([prompts, read[:, prompts.shape[1] :]], 1), *args[1:]

    def _require_gradient(self, rows: Tensor) -> None:
        """Raises RuntimeError if prompts train, but rows that depend on them have no gradient."""
        trained = self.pool.stack.trainable.requires_grad and torch.is_grad_enabled()
        if trained and not rows.requires_grad:
            raise RuntimeError(
                "the prompts' outputs have no gradient: with this version of transformers, call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                '{"use_reentrant": False})'
            )


def _rows_of(output: Any) -> Tensor:
    rows: Tensor = output if isinstance(output, Tensor) else output[0]
    return rows
