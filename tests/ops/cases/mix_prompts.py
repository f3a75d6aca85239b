"""Op `mix_prompts`."""

import importlib
from collections.abc import Iterator

import torch
from ops.cases import SAME_OR_FLOAT32, Bad, Case, Pair, Sample, device, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops import mix_prompts, mix_prompts_with_tokens

op = importlib.import_module("sapt_fast.ops.mix_prompts")

IDS = torch.tensor([[1, 4, 4], [0, 2, 5]])
X, M = draw(2, 3, 4), draw(2, 3).abs()
FORMULAS = {
    "mix_prompts": Case(
        mix_prompts,
        lambda p, m, e: torch.cat([torch.einsum("bk,kpd->bpd", m, p), e], 1),
        (draw(3, 2, 4), M, X),
    ),
    "mix_prompts_with_tokens": Case(
        lambda p, m, t, **k: mix_prompts_with_tokens(p, m, IDS, t, **k),
        lambda p, m, t: torch.cat([torch.einsum("bk,kpd->bpd", m, p), t[IDS]], 1),
        (draw(3, 2, 4), M, draw(6, 4)),
    ),
}


def _with_tokens(prompts, mixture, table, input_ids, backend):
    return mix_prompts_with_tokens(prompts, mixture, input_ids, table, backend=backend)


def _inputs(batch, count, length, tokens, width):
    return floats(
        prompts=(count, length, width), mixture=(batch, count), embeds=(batch, tokens, width)
    )


_TABLE = floats(prompts=(3, 4, 20), mixture=(3, 3), table=(11, 20))
_IDS = torch.tensor([[3, 0, 3, 7, 1], [10, 9, 9, 9, 2], [5, 4, 3, 2, 1]])
SAMPLES = {
    "embeddings": Sample(mix_prompts, _inputs(3, 5, 7, 9, 33), wide=("mixture",)),
    "samples in parts": Sample(mix_prompts, _inputs(19, 5, 3, 4, 33), wide=("mixture",)),
    "without tokens": Sample(mix_prompts, _inputs(3, 5, 7, 0, 33), wide=("mixture",)),
    "tokens": Sample(_with_tokens, {**_TABLE, "input_ids": _IDS}, wide=("mixture",)),
}
EMPTY = {
    "no samples": Sample(mix_prompts, _inputs(0, 3, 4, 5, 8)),
    "no prompts": Sample(mix_prompts, _inputs(2, 0, 4, 5, 8)),
    "no prompt tokens": Sample(mix_prompts, _inputs(2, 3, 0, 5, 8)),
    "no width": Sample(mix_prompts, _inputs(2, 3, 4, 5, 0)),
}


def _pair(x, other, backend):
    prompts, mixture = draw(3, 2, 8).to(other), draw(2, 3).to(other)
    return mix_prompts(prompts, mixture, draw(2, 4, 8).to(x), backend=backend)


PAIRS = Pair(_pair, SAME_OR_FLOAT32, "prompts")


def _bad(error, message, backend=None, **changes):
    given = {**_inputs(2, 3, 4, 5, 8), **changes}
    return Bad(lambda: mix_prompts(**given, backend=backend), error, message)


def _bad_tokens(error, message, **changes):
    given = {**_inputs(2, 3, 4, 5, 8), "input_ids": torch.zeros(2, 5).long()}
    given |= {"table": torch.zeros(11, 8), **changes}
    del given["embeds"]
    return Bad(lambda: mix_prompts_with_tokens(**given), error, message)


BAD = {
    "embeds": _bad(ValueError, r"embeds: .*expected \[B, T, D\]", embeds=torch.zeros(5, 8)),
    "embeds dtype": _bad(TypeError, "embeds: got dtype", embeds=torch.zeros(2, 5, 8).int()),
    "prompts": _bad(ValueError, r"expected \[K, P, 8\]", prompts=torch.zeros(3, 4, 7)),
    "prompts dtype": _bad(TypeError, "prompts: got dtype", prompts=torch.zeros(3, 4, 8).half()),
    "mixture": _bad(ValueError, r"mixture: .*expected \[2, 3\]", mixture=torch.zeros(2, 4)),
    "mixture dtype": _bad(TypeError, "mixture: got dtype", mixture=torch.zeros(2, 3).int()),
    "device": _bad(ValueError, "mixture: got device", mixture=torch.zeros(2, 3, device="meta")),
    "ids": _bad_tokens(
        ValueError, r"input_ids: .*expected \[B, T\]", input_ids=torch.zeros(5).long()
    ),
    "ids dtype": _bad_tokens(TypeError, "input_ids: got dtype", input_ids=torch.zeros(2, 5)),
    "table": _bad_tokens(ValueError, r"table: .*expected \[V, D\]", table=torch.zeros(8)),
    "ids batch": _bad_tokens(
        ValueError, r"mixture: .*expected \[1, 3\]", input_ids=torch.zeros(1, 5).long()
    ),
    "no cpu kernel": _bad(dispatch.BackendError, "cpu", backend="cpu"),
    "no cuda kernel": _bad(dispatch.BackendError, "cuda", backend="cuda"),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    given = (t.to(device(backend)) for t in _inputs(2, 3, 4, 5, 8).values())
    prompts, mixture, embeds = (t.requires_grad_() for t in given)
    ids = torch.randint(0, 2, (2, 5), device=embeds.device)
    table = embeds.detach()[:, 0].clone().requires_grad_()
    yield op._forward_op, (prompts, mixture, embeds, None, backend)
    yield op._forward_op, (prompts, mixture, table, ids, backend)
    dy = torch.randn(2, 9, 8, device=prompts.device)
    for needs in ((True, True), (True, False), (False, True)):
        yield op._backward_op, (dy, prompts.detach(), mixture.detach(), *needs, backend)
