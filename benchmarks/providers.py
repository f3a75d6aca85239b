"""One set-up for every way to compute a layer's mixture of adapters; `base` is the layer alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from released import released_mixture
from torch import Tensor, nn

from sapt_fast import dispatch
from sapt_fast.pools.lora import AdapterPool

FEW_ROWS = 64  # what the CUDA kernels are made for


class OneDnnLinear(torch.autograd.Function):
    """x W^T by oneDNN, which our float32 layers call on CPUs; F.linear calls torch's BLAS."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], ""), None


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer: x is [batch, tokens, width], the pool K adapters of one rank."""

    batch: int
    tokens: int
    width: int
    out: int
    adapters: int
    rank: int
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"B{self.batch} T{self.tokens} d{self.width}->{self.out} "
            f"K{self.adapters} r{self.rank} {dtype}"
        )


class Providers:
    """All providers over the same numbers. The newest adapter, x and the mixture train.

    Every provider is a function without arguments that returns y; `leaves` get the gradients.
    """

    def __init__(self, layer: Layer, *, training: bool, seed: int = 0) -> None:
        self.layer = layer
        generator = torch.Generator(layer.device).manual_seed(seed)
        on_device: dict[str, Any] = {"generator": generator, "device": layer.device}

        def draw(*size: int) -> Tensor:
            return (torch.randn(*size, **on_device) / math.sqrt(size[-1])).to(layer.dtype)

        count, rank = layer.adapters, layer.rank
        self.x = draw(layer.batch, layer.tokens, layer.width).mul_(math.sqrt(layer.width))
        self.weight = draw(layer.out, layer.width)
        self.lora_a = [draw(rank, layer.width) for _ in range(count)]
        # As large as makes the mixture's part of y and dx weigh as much as the layer's: an error
        # in it must not drown in the rounding of the rest.
        self.lora_b = [draw(rank, layer.out).mul_(math.sqrt(layer.out)) for _ in range(count)]
        self.mixture = torch.randn(layer.batch, count, **on_device).softmax(-1)
        self.scaling = 2.0
        self.grad = draw(layer.batch, layer.tokens, layer.out)
        self.leaves: list[Tensor] = []
        if training:
            self.leaves = [self.x, self.mixture, self.lora_a[-1], self.lora_b[-1]]
            for leaf in self.leaves:
                leaf.requires_grad_()
        self.frozen_a, self.frozen_b = (
            torch.cat(rows[:-1]) if count > 1 else rows[0][:0]
            for rows in (self.lora_a, self.lora_b)
        )
        self.all_a, self.all_b = (torch.cat(r).detach() for r in (self.lora_a, self.lora_b))
        self._pool = self._make_pool()
        self._get_gradients = [*self.leaves, *self._pool.parameters()]
        self._peft_layers: dict[torch.dtype, nn.Module] = {}
        # PEFT keeps adapters in float32 unless told otherwise.
        halves = layer.dtype in (torch.bfloat16, torch.float16)
        self._peft_dtype = torch.float32 if halves else layer.dtype
        self._compiled: Callable[[], Tensor] | None = None

    def forward(self) -> dict[str, Callable[[], Tensor]]:
        """The providers by name; ours once per backend that runs here."""
        layer_dtype = self.layer.dtype
        functions: dict[str, Callable[[], Tensor]] = {
            "base": lambda: F.linear(self.x, self.weight),
            "stacked": self.stacked,
            "stacked_compiled": self.stacked_compiled,
            "peft": lambda: self.peft_layer(layer_dtype)(self.x),
            "peft_default": lambda: self.peft_layer(self._peft_dtype)(self.x),
            "released": self.released,
        }
        if self._has_onednn():
            functions["base_onednn"] = lambda: OneDnnLinear.apply(self.x, self.weight)
            functions["stacked_onednn"] = lambda: self.stacked(OneDnnLinear.apply)
        for backend in ("cpu", "triton", "cuda"):
            device_type = torch.device(self.layer.device).type
            interpreted = backend == "triton" and device_type == "cpu"
            rows = self.layer.batch * self.layer.tokens
            if backend == "cuda" and rows > FEW_ROWS:
                continue
            if not interpreted and dispatch.unavailable("mixed_lora", backend, device_type) is None:
                functions[f"ours_{backend}"] = lambda backend=backend: self.ours(backend)
        return functions

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward of a provider, gradients dropped."""

        def run() -> None:
            forward().backward(self.grad)
            for leaf in self._get_gradients:
                leaf.grad = None

        return run

    def peft_layer(self, dtype: torch.dtype) -> nn.Module:
        """PEFT's layer with adapters of a dtype, built by the first call."""
        if dtype not in self._peft_layers:
            self._peft_layers[dtype] = self._make_peft(dtype)
            self._get_gradients += self._peft_layers[dtype].parameters()
        return self._peft_layers[dtype]

    def ours(self, backend: str) -> Tensor:
        return self._pool(self.x, self.weight, None, self.mixture, backend=backend)

    def _has_onednn(self) -> bool:
        """Whether a float32 GEMM of torch's can be had from another library than F.linear's."""
        on_cpu = self.layer.device == "cpu" and self.layer.dtype == torch.float32
        return on_cpu and torch.backends.mkldnn.is_available()

    def stacked(self, linear: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """The strongest plain torch: one skinny GEMM each way over the concatenated adapters."""
        a, b = self.all_a, self.all_b
        if self.leaves:  # the newest adapter trains
            a = torch.cat([self.frozen_a, self.lora_a[-1]])
            b = torch.cat([self.frozen_b, self.lora_b[-1]])
        weights = self.mixture.repeat_interleave(self.layer.rank, 1).mul(self.scaling)
        h = F.linear(self.x, a) * weights.to(self.x.dtype)[:, None]
        base = linear(self.x, self.weight)
        rows = h.flatten(0, 1)
        return torch.addmm(base.flatten(0, 1), rows, b).view_as(base)

    def stacked_compiled(self) -> Tensor:
        if self._compiled is None:
            on_gpu = self.layer.device.startswith("cuda")
            mode = "max-autotune-no-cudagraphs" if on_gpu else None
            # For these sizes alone: a second layer would get a graph of symbolic sizes, and from
            # the ninth on none at all.
            torch._dynamo.reset()
            self._compiled = torch.compile(self.stacked, mode=mode, dynamic=False)
        return self._compiled()

    def released(self) -> Tensor:
        """The published loop over adapters."""
        adapters = list(zip(self.lora_a, self.lora_b, strict=True))
        delta = released_mixture(self.x, adapters[:-1], adapters[-1], self.mixture, self.scaling)
        return F.linear(self.x, self.weight) + delta

    def _make_pool(self) -> AdapterPool:
        layer = self.layer
        pool = AdapterPool(
            layer.width,
            layer.out,
            reserve=layer.adapters * layer.rank,
            device=torch.device(layer.device),
            dtype=layer.dtype,
        )
        for a, b in zip(self.lora_a, self.lora_b, strict=True):
            pool.add(layer.rank, self.scaling)
            with torch.no_grad():
                pool.a.trainable.copy_(a)
                pool.b.trainable.copy_(b)
        pool.requires_grad_(False)
        if self.leaves:
            pool.a.trainable.requires_grad_()
            pool.b.trainable.requires_grad_()
        return pool

    def _make_peft(self, dtype: torch.dtype) -> nn.Module:
        """PEFT's own layer with all adapters active (it has no weights per sample)."""
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        layer = self.layer
        base = nn.Linear(layer.width, layer.out, bias=False, device="meta")
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        names = [str(k) for k in range(layer.adapters)]
        config = LoraConfig(r=layer.rank, lora_alpha=int(self.scaling * layer.rank))
        module = Linear(base, names[0], config, r=layer.rank, lora_alpha=config.lora_alpha)
        for name in names[1:]:
            module.update_layer(name, layer.rank, config.lora_alpha, config=config)
        module.set_adapter(names)
        for adapters in (module.lora_A, module.lora_B):
            adapters.to(device=layer.device, dtype=dtype)
        module.requires_grad_(False)
        for name, a, b in zip(names, self.lora_a, self.lora_b, strict=True):
            module.lora_A[name].weight.data.copy_(a)
            module.lora_B[name].weight.data.copy_(b.t())
        if self.leaves:
            module.lora_A[names[-1]].weight.requires_grad_()
            module.lora_B[names[-1]].weight.requires_grad_()
        return module
