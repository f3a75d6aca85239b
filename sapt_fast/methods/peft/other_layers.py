"""PEFT's LoRA layers over embeddings and convolutions, with a mixture of their adapters.

Both are linear in the adapters, so a mixture has the same meaning as in a linear layer:

    y = base(x) + sum_k w_k scaling[k] B_k(A_k(x))

The adapters run one after the other, as in PEFT, each on the samples (for embeddings: the tokens)
in which it has weight. Without weights, PEFT's forward runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import layer as pefts
from torch import Tensor, nn

from sapt_fast.methods.peft.looks import can_be_read
from sapt_fast.methods.peft.pooled import Pooled
from sapt_fast.routing.running import checked_mixture
from sapt_fast.sites.merging import Addend


class PooledEmbedding(Pooled, pefts.Embedding):
    """`peft.tuners.lora.Embedding` that mixes its adapters."""

    def sapt_adapters(self) -> Mapping[str, Any]:
        return dict(self.lora_embedding_A.items())

    def sapt_why_not(self, adapters: Sequence[str] | None = None) -> str | None:
        held = list(self.lora_embedding_A)
        variant = _why_variant(self, held, adapters)
        if variant is not None:
            return variant
        if any(name in self.input_fns for name in (held if adapters is None else adapters)):
            return "a tensor-parallel embedding cannot be mixed; it runs through PEFT"
        for stack in (self.lora_embedding_A, self.lora_embedding_B):
            if type(stack) is not nn.ParameterDict:  # torch parametrises by another class
                return "its adapters are parametrised; they run through PEFT"
        return None

    def sapt_addend(self, adapters: Sequence[str], weights: Tensor) -> Addend:
        present = [(k, n) for k, n in enumerate(adapters) if n in self.lora_embedding_A]
        a = torch.cat([self.lora_embedding_A[name].detach() for _, name in present])
        b = [
            self.lora_embedding_B[name].detach().t().double()
            * (float(weights[k]) * self.scaling[name])
            for k, name in present
        ]
        return Addend(self.base_layer, a, torch.cat(b), transposed=True)

    def _weighted(
        self,
        x: Tensor,
        adapters: tuple[str, ...],
        weights: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        # `checked_mixture` expects features in the last dimension; ids have none
        mixture = checked_mixture(weights, x[..., None], len(adapters), self._get_name())
        ids, scale = x.reshape(-1), self._get_embed_scale()
        rows = mixture if mixture.shape[0] == 1 else _per_row(mixture, ids.shape[0])

        def output(name: str, part: Tensor) -> Tensor:
            after_a = self._embed(part, self.lora_embedding_A[name].t())
            delta = after_a @ self.lora_embedding_B[name].t()
            return delta if scale is None else delta * scale.to(delta.dtype)

        return _added(self, y.flatten(0, -2), ids, adapters, rows, output).view(y.shape)


def _why_variant(layer: Any, held: Sequence[str], adapters: Sequence[str] | None) -> str | None:
    """Returns why variants like DoRA among these adapters cannot be mixed; None without variants.

    Args:
        layer: PEFT's layer.
        held: names of its adapters.
        adapters: those to be mixed; None for all.
    """
    if not any(name in layer.lora_variant for name in (held if adapters is None else adapters)):
        return None
    kinds = sorted(name for name in held if name in layer.lora_variant)
    return f"adapters with variants ({kinds}) cannot be mixed; they run through PEFT"


class _PooledConv(Pooled):
    """A convolution with LoRA that mixes its adapters."""

    _kernel_dim: int

    def sapt_adapters(self) -> Mapping[str, Any]:
        return dict(self.lora_A.items())

    def sapt_why_not(self, adapters: Sequence[str] | None = None) -> str | None:
        return _why_variant(self, list(self.lora_A), adapters)

    def sapt_addend(self, adapters: Sequence[str], weights: Tensor) -> Addend:
        base: Any = self.base_layer
        alike = base.groups == 1 and set(base.dilation) == {1} and base.padding_mode == "zeros"
        present = [(k, n) for k, n in enumerate(adapters) if n in self.lora_A]
        stack_a: Any = self.lora_A
        stack_b: Any = self.lora_B
        if not alike or any(stack_b[name].bias is not None for _, name in present):
            raise ValueError(
                "a mixture cannot be merged into a convolution with groups, a dilation, a padding "
                "mode other than zeros, or lora_bias: its adapters are another kind of convolution"
            )
        a = torch.cat([stack_a[name].weight.detach().flatten(1) for _, name in present])
        b = [
            stack_b[name].weight.detach().flatten(1).t().double()
            * (float(weights[k]) * self.scaling[name])
            for k, name in present
        ]
        return Addend(base, a, torch.cat(b), transposed=False)

    def _weighted(
        self,
        x: Tensor,
        adapters: tuple[str, ...],
        weights: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if weights.dim() == 3:
            raise RuntimeError(
                f"{self._get_name()}: got weights per token, of shape {tuple(weights.shape)}, "
                "expected [K] or [B, K]: a convolution reads several tokens at once"
            )
        batched = x.dim() == self._kernel_dim
        samples = x.shape[0] if batched else 1
        if weights.shape[0] not in (1, samples) or weights.shape[1] != len(adapters):
            raise RuntimeError(
                f"{self._get_name()}: got an input of shape {tuple(x.shape)} for mixture weights "
                f"of shape {tuple(weights.shape)}, expected [{len(adapters)}] or "
                f"[{samples}, {len(adapters)}], the samples first"
            )
        y: Tensor = self.base_layer(x, *args, **kwargs)
        inputs, start = (x, y) if batched else (x[None], y[None])

        def output(name: str, part: Tensor) -> Tensor:
            a: Any = self.lora_A[name]
            b: Any = self.lora_B[name]
            dropout: Any = self.lora_dropout[name]
            return cast(Tensor, b(a(dropout(self._cast_input_dtype(part, a.weight.dtype)))))

        return _added(self, start, inputs, adapters, weights, output).view(y.shape)


class PooledConv1d(_PooledConv, pefts.Conv1d):
    """`peft.tuners.lora.layer.Conv1d` that mixes its adapters."""


class PooledConv2d(_PooledConv, pefts.Conv2d):
    """`peft.tuners.lora.layer.Conv2d` that mixes its adapters."""


class PooledConv3d(_PooledConv, pefts.Conv3d):
    """`peft.tuners.lora.layer.Conv3d` that mixes its adapters."""


OTHER_KINDS: dict[type, type[Pooled]] = {
    pefts.Embedding: PooledEmbedding,
    pefts.Conv1d: PooledConv1d,
    pefts.Conv2d: PooledConv2d,
    pefts.Conv3d: PooledConv3d,
}


def _per_row(mixture: Tensor, rows: int) -> Tensor:
    """Repeats weights [S, K] to [rows, K]; S divides rows."""
    return mixture.repeat_interleave(rows // mixture.shape[0], 0)


def _added(
    layer: Any,
    y: Tensor,
    x: Tensor,
    adapters: Sequence[str],
    weights: Tensor,
    output: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """Adds to y each adapter's output on the rows of x in which it has weight.

    Args:
        layer: PEFT's layer.
        y: [N, ...], the base output.
        x: [N, ...], the input.
        adapters: names of the K adapters.
        weights: [N, K], or [1, K] for all rows.
        output: computes an adapter's output on some rows of x, without scaling.

    Returns:
        [N, ...], in y's dtype.
    """
    dtype, result = y.dtype, y
    weights = weights.to(x.device)
    read = can_be_read(weights)
    for k, name in enumerate(adapters):
        if name not in layer.sapt_adapters():
            continue
        column, rows = weights[:, k], None
        if read:
            rows = column.nonzero()[:, 0]
            if not len(rows):
                continue
            rows = None if len(rows) == len(column) else rows
        out = output(name, x if rows is None else x[rows])
        w = (column if rows is None else column[rows]) * layer.scaling[name]
        w = w.to(torch.promote_types(out.dtype, torch.float32)).view(-1, *[1] * (out.dim() - 1))
        if not read:  # weight 0 removes an output even if it is Inf or NaN
            out = torch.where((w == 0) & ~out.isfinite(), 0.0, out)
        part = out * w
        if rows is None:
            result = result + part
        else:
            wide = torch.promote_types(result.dtype, part.dtype)
            result = result.to(wide).index_add(0, rows, part.to(wide))
    return result.to(dtype)
