"""Patched models under torch.func and forward-mode AD, against plain PEFT and differences.

transformers normalises in float32 whatever the model's dtype, which bounds what differences show.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from tiny_models import patched, tiny, token_ids
from tiny_peft import TARGETS, mixture, peft_model
from torch.func import functional_call, grad, hessian, jvp, vmap

import sapt_fast

D64 = torch.float64
STEP = 3e-3
FAMILIES = ("llama", "t5")


def base(family):
    """torch's fused attention has no forward-mode derivative, whoever calls it."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    return model


def pair(family):
    """The same PEFT model twice: PEFT's own, and patched; and the values of its adapters."""
    plain = peft_model(family, dtype=D64, base=base(family).double())
    values = {n: p.detach() for n, p in plain.named_parameters() if "lora_" in n}
    return plain, sapt_fast.patch(copy.deepcopy(plain)), values


def loss(model, values, row, **inputs):
    """Of one text."""
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = row[None, :5]
    output = functional_call(model, values, (), {"input_ids": row[None], **inputs})
    return output.logits.square().mean()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=5e-6, atol=1e-8)


def tangents(values):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in values.items()}


@pytest.mark.parametrize("extra", [{}, {"adapter_names": ["a1"]}], ids=["active", "named"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_peft_model_is_as_differentiable_as_peft(family, extra):
    plain, model, values = pair(family)
    ids, moves = token_ids(2, 6), tangents(values)

    def each(m):
        return vmap(grad(lambda v, r: loss(m, v, r, **extra)), (None, 0))(values, ids)

    def pushed(m):
        return jvp(lambda v: loss(m, v, ids[0], **extra), (values,), (moves,))

    def curved(m):
        return jvp(grad(lambda v: loss(m, v, ids[0], **extra)), (values,), (moves,))

    for of in (each, pushed, curved):
        close(of(model), of(plain))
    with torch.no_grad():
        close(*(vmap(lambda r, m=m: loss(m, values, r, **extra))(ids) for m in (model, plain)))
    close(model(input_ids=ids, **_decoder(model, ids)).logits, _logits(plain, ids))


def _decoder(model, ids):
    return {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}


def _logits(model, ids):
    return model(input_ids=ids, **_decoder(model, ids)).logits


def test_values_for_many_models_at_once():
    """An ensemble: vmap over stacked adapters."""
    plain, model, values = pair("llama")
    row = token_ids(1, 6)[0]
    many = {n: torch.stack([t, 2 * t, -t]) for n, t in values.items()}
    got = vmap(lambda v: loss(model, v, row))(many)
    want = [loss(plain, {n: t[k] for n, t in many.items()}, row) for k in range(3)]
    close(got, torch.stack(want).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_in_the_mixture_weights(family):
    _, model, _ = pair(family)
    ids, weights = token_ids(3, 6), mixture().to(D64)

    def run(w):
        return model(input_ids=ids, mixture=w, **_decoder(model, ids)).logits.square().mean()

    move = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1), dtype=D64)
    step = STEP
    leaf = weights.clone().requires_grad_()
    [backward] = torch.autograd.grad(run(leaf), leaf)
    close(grad(run)(weights), backward)
    close(jvp(run, (weights,), (move,))[1], (backward * move).sum())
    with fwAD.dual_level():
        y = run(fwAD.make_dual(weights, move))
        close(fwAD.unpack_dual(y).tangent, (backward * move).sum())
    if family == "llama":  # T5's ReLUs have kinks
        slope = (run(weights + step * move) - run(weights - step * move)).item() / (2 * step)
        assert (backward * move).sum().item() == pytest.approx(slope, rel=2e-3)
    [first] = torch.autograd.grad(run(leaf), leaf, create_graph=True)
    [second] = torch.autograd.grad((first * move).sum(), leaf)
    close(second, (hessian(run)(weights) * move).sum((-2, -1)))
    with model.sapt.fixed(weights):
        close(run(None), run(weights))
    got = vmap(run)(torch.stack([weights, weights * 2]))
    assert model.sapt.attention is None  # those of a transform end with it
    close(got, torch.stack([run(weights), run(weights * 2)]))
    with pytest.raises(ValueError, match="weights: got non-finite"):
        vmap(run)(torch.stack([weights, weights / 0]))


@pytest.mark.parametrize("changed", [{}, {"grad_through_frozen": False}], ids=["all", "official"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sapt_model_is_differentiable(family, changed):
    model = patched(base(family), **changed).double()
    ids = token_ids(2, 6)
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert all(any(part in n for n in values) for part in ("keys", ".a.", ".b."))

    def one_by_one(k):
        model.zero_grad()
        loss(model, {}, ids[k]).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    want = [one_by_one(k) for k in range(2)]
    got = vmap(grad(lambda v, r: loss(model, v, r)), (None, 0))(values, ids)
    close(got, {n: torch.stack([each[n] for each in want]) for n in values})
    moves = tangents(values)
    pushed = jvp(lambda v: loss(model, v, ids[0]), (values,), (moves,))[1]
    close(pushed, sum((moves[n] * want[0][n]).sum() for n in values))
    if family == "llama" and not changed:
        ahead, behind = ({n: t + s * moves[n] for n, t in values.items()} for s in (STEP, -STEP))
        slope = (loss(model, ahead, ids[0]) - loss(model, behind, ids[0])).item() / (2 * STEP)
        assert pushed.item() == pytest.approx(slope, rel=2e-3)

    def reflection(v, target):
        run = lambda **inputs: model.sapt.reflection_loss(ids, target)  # noqa: E731
        return functional_call(_Calls(model, run), {f"model.{n}": t for n, t in v.items()}, ())

    targets = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=D64)
    each = vmap(grad(reflection), (None, 0))(values, targets)
    for k, target in enumerate(targets):
        close({n: t[k] for n, t in each.items()}, grad(reflection)(values, target))


class _Calls(torch.nn.Module):
    """A module whose forward is a function that uses the model's parts."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self):
        return self.function()


def test_frozen_rows_that_a_caller_gives_are_differentiated():
    model = patched(base("llama")).double()
    row = token_ids(1, 6)[0]
    values = {n: p.detach() for n, p in model.named_parameters() if ".frozen" in n}
    got = grad(lambda v: loss(model, v, row))(values)
    moves = tangents(values)
    ahead, behind = ({n: t + s * moves[n] for n, t in values.items()} for s in (STEP, -STEP))
    slope = (loss(model, ahead, row) - loss(model, behind, row)).item() / (2 * STEP)
    assert sum((got[n] * moves[n]).sum() for n in got).item() == pytest.approx(slope, rel=2e-3)
    leaves = {n: t.clone().requires_grad_() for n, t in values.items()}
    loss(model, leaves, row).backward()
    close({n: t.grad for n, t in leaves.items()}, got)


def test_targets_of_the_tests_are_patched():
    assert len(pair("llama")[1].sapt.report.patched) == 2 * len(TARGETS["llama"])
