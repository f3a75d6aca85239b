"""Op `mix_prompts`: sizes, traffic and launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from op_case import Draw, Inputs, NewTensor, OpCase, Timed
from passes import INT64, Pass, Passes, Row
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import mix_prompts, mix_prompts_with_tokens


@dataclass(frozen=True)
class PromptCase(OpCase):
    """A mixture of prompts in front of embeddings, or of tokens."""

    batch: int
    tokens: int
    width: int
    adapters: int
    length: int
    from_ids: bool = False
    op: str = "mix_prompts"
    trains: tuple[str, ...] = ("prompts", "mixture", "source")

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = Draw(dtype, device)
        source = (32128,) if self.from_ids else (self.batch, self.tokens)
        given = {
            "prompts": draw(self.adapters, self.length, self.width),
            "mixture": draw.weights(self.batch, self.adapters),
            "source": draw(*source, self.width),
        }
        if self.from_ids:
            given["ids"] = draw.integers(32128, self.batch, self.tokens)
        return given

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        prompts, mixture, source = (inputs[n] for n in self.trains)
        if self.from_ids:
            y = mix_prompts_with_tokens(prompts, mixture, inputs["ids"], source, backend=backend)
        else:
            y = mix_prompts(prompts, mixture, source, backend=backend)
        return {"y": y}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        prompts, mixture, source = (inputs[n] for n in self.trains)

        def plain() -> Tensor:
            rows = source[inputs["ids"]] if self.from_ids else source
            mixed = mixture.to(prompts.dtype) @ prompts.flatten(1)
            return torch.cat([mixed.view(-1, *prompts.shape[1:]), rows], 1)

        return {"torch": plain}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        rows = self.adapters * self.length + self.batch * (self.length + 2 * self.tokens)
        return rows * self.width * dtype.itemsize + 8 * self.batch * self.tokens * self.from_ids


CHECKED = (
    PromptCase(8, 512, 1024, 15, 10),
    PromptCase(8, 512, 1024, 15, 10, from_ids=True),
    PromptCase(3, 33, 100, 7, 5),
)
CHECKED_QUICK = (PromptCase(2, 9, 64, 3, 4), PromptCase(2, 9, 64, 3, 4, from_ids=True))
TIMED = (
    Timed(PromptCase(64, 512, 1024, 15, 10), CHECKED_QUICK[0], "mix_prompts", share={"ours": 0.8}),
)


# --- traffic -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Sizes of K prompts [P, D] mixed in front of B sequences of T embeddings.

    Attributes:
        rows: of the table that the ids name; None for embeddings as such.
        tile: prompts of a tile of the backward.
    """

    b: int
    t: int
    d: int
    count: int
    length: int
    rows: int | None = None
    tile: int = 16
    itemsize: int = 2
    prompt_itemsize: int = 2

    @property
    def pool(self) -> int:
        """Bytes of all prompts."""
        return self.count * self.length * self.d * self.prompt_itemsize


def prompts_forward(c: Prompts) -> Passes:
    """A copy of B T D elements, or their gather, and 2 B K P D FLOPs for the mixture.

    Each sample reads all prompts, and each token its row of the table.
    """
    source = {"embeds": c.b * c.t * c.d * c.itemsize}
    rereads = {"prompts": (c.b - 1) * c.pool}
    if c.rows is not None:
        source = {"ids": INT64 * c.b * c.t, "table": c.rows * c.d * c.itemsize}
        rereads["table"] = (c.b * c.t - c.rows) * c.d * c.itemsize
    return [
        Pass(
            "mix",
            {"prompts": c.pool, "mixture": 4 * c.b * c.count, **source},
            {"y": c.b * (c.length + c.t) * c.d * c.itemsize},
            2 * c.b * c.count * c.length * c.d,
            rereads=rereads,
        )
    ]


def prompts_backward(c: Prompts) -> Passes:
    """Two products with the first P rows of dy, 2 B K P D FLOPs each; the rest passes through.

    Each tile of prompts reads dy, and for the mixture's gradient each sample all prompts, of which
    the last tile reads another one where it has none.
    """
    dy = {"dy": c.b * c.length * c.d * c.itemsize}
    tiles = -(-c.count // c.tile)
    again = {"dy": (tiles - 1) * dy["dy"]}
    read = c.b * tiles * c.tile * c.length * c.d * c.prompt_itemsize
    mixture, flops = 4 * c.b * c.count, 2 * c.b * c.count * c.length * c.d
    return [
        Pass("d_prompts", {**dy, "mixture": mixture}, {"d_prompts": c.pool}, flops, rereads=again),
        Pass(
            "d_mixture",
            {**dy, "prompts": c.pool},
            {"d_mixture": mixture},
            flops,
            rereads={**again, "prompts": read - c.pool},
        ),
    ]


def roofline() -> Iterable[Row]:
    """In front of embeddings."""
    for d in (1024, 4096):
        prompts = Prompts(8, 512, d, 15, 10)
        sizes = f"B 8, T 512, D {d}, K 15, P 10"
        yield Row("mix_prompts forward", sizes, prompts_forward(prompts))
        yield Row("mix_prompts backward", sizes, prompts_backward(prompts))


# --- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Sizes of one mixture of prompts, in front of embeddings and of tokens."""

    name: str
    batch: int
    tokens: int
    d: int
    count: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    prompt_dtype: torch.dtype | None = None
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """Both forwards and the backward."""
        kernels = dispatch.kernels("mix_prompts", "triton")
        prompt_dtype = self.prompt_dtype or self.dtype
        prompts = tensor(self.count, self.length, self.d, dtype=prompt_dtype)
        mixture = tensor(self.batch, self.count, dtype=torch.float32)
        embeds = tensor(self.batch, self.tokens, self.d)
        ids = tensor(self.batch, self.tokens, dtype=torch.int64)
        y = kernels.mix_prompts_fwd(prompts, mixture, embeds, None)
        kernels.mix_prompts_fwd(prompts, mixture, tensor(32128, self.d), ids)
        kernels.mix_prompts_bwd(y, prompts, mixture, True, True)


LAUNCHES = (
    Launch("prompts", 8, 512, 1024, 15, 10, quick=True),
    Launch("prompts, one sample", 1, 64, 4096, 15, 10),
    Launch("prompts, many samples", 512, 64, 1024, 15, 10),
    Launch("prompts, float32 pool", 8, 512, 1024, 15, 10, prompt_dtype=torch.float32),
    Launch("prompts, float16", 8, 512, 1024, 15, 10, dtype=torch.float16),
    Launch("prompts, float32", 8, 512, 1024, 15, 10, dtype=torch.float32),
    Launch("prompts, odd width", 8, 50, 100, 3, 7, aligned=False),
)
