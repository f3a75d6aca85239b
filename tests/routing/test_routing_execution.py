"""The mixture weights under threads, gradient checkpointing, compilation, autocast, dropout."""

import threading

import pytest
import torch
from tiny_models import checkpointed, error, fill, patched, run, tiny, token_ids
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sapt_fast.routing.recompute import Checkpoint
from sapt_fast.sites import linear as layers


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- two callers at once ---


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_threads_keep_their_own_weights(family):
    """Both threads are held inside the forward, once each has routed."""
    model, rounds = patched(family), 30
    inputs = [[token_ids(seed=2 * i + t) for i in range(rounds)] for t in range(2)]
    expected = [[run(model, ids) for ids in thread] for thread in inputs]
    barrier, got, errors = threading.Barrier(2), [[], []], []

    def meet(*_):
        barrier.wait(30)

    first = model.get_submodule(model.sapt.report.patched[0])
    handle = first.register_forward_pre_hook(meet)

    def work(t):
        try:
            got[t].extend(run(model, ids) for ids in inputs[t])
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert not errors
    for t in range(2):
        assert all(torch.equal(a, b) for a, b in zip(got[t], expected[t], strict=True))


def test_threads_generate_with_their_own_weights():
    model = patched("llama")
    prompts = [token_ids(seed=s) for s in range(2)]
    options = {"max_new_tokens": 6, "num_beams": 2, "use_cache": False}
    expected = [model.generate(ids, **options) for ids in prompts]
    barrier, got = threading.Barrier(2), {}

    def work(t):
        barrier.wait(30)
        got[t] = [model.generate(prompts[t], **options) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for t in range(2):
        assert all(tokens.tolist() == expected[t].tolist() for tokens in got[t])


def test_two_models_at_once():
    """One model runs in the middle of the other's forward."""
    model, other = patched("llama"), patched("llama", seed=1)
    ids, others = token_ids(), token_ids(seed=2)
    expected, expected_other = run(model, ids), run(other, others)
    got = []
    layer = model.get_submodule(model.sapt.report.patched[1])
    layer.register_forward_pre_hook(lambda *_: got.append(run(other, others)))
    assert torch.equal(run(model, ids), expected)
    assert torch.equal(got[0], expected_other)


# --- gradient checkpointing ---


def two_forwards(model):
    """Gradients of two batches' losses, one backward."""
    model.train()
    model.zero_grad()
    loss = torch.zeros(())
    for seed in (1, 2):
        ids = token_ids(seed=seed)
        loss = loss + model(input_ids=ids, labels=ids, use_cache=False).loss
    with model.sapt.fixed(torch.eye(3)):  # a backward has nothing to do with what is pinned
        loss.backward()
    return gradients(model)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("before", [True, False], ids=["before_patch", "after_patch"])
def test_checkpointing_gives_the_same_gradients(family, reentrant, before):
    expected = two_forwards(patched(family))
    options = {"use_reentrant": reentrant}
    model = tiny(family)
    if before:
        checkpointed(model, options)
    model = patched(model)
    if not before:
        checkpointed(model, options)
    got = two_forwards(model)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert error(grad, expected[name]) < 1e-4, name


def test_recomputation_that_nobody_hands_weights_to_raises():
    model, ids = patched("llama"), token_ids()
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    loss = model(ids, labels=ids, use_cache=False).loss
    with pytest.raises(RuntimeError, match="no mixture weights"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_without_handing_the_weights_over_is_noticed(reentrant, monkeypatch):
    monkeypatch.setattr(Checkpoint, "__call__", lambda s, *a, **k: s.function(*a, **k))
    expected = two_forwards(patched("llama"))
    model = patched("llama")
    checkpointed(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if not reentrant:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            two_forwards(model)
        return
    got = two_forwards(model)
    name = "model.layers.1.self_attn.v_proj.sapt_pool.b.trainable"
    assert error(got[name], expected[name]) > 0.05


# --- compile, autocast, dropout ---


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("family", ["t5", pytest.param("llama", marks=pytest.mark.thorough)])
def test_compiled_in_one_frame_with_new_weights_each_call(family):
    model = patched(tiny(family))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    eager, compiled = Loss(model), torch.compile(Loss(model), fullgraph=True, backend=counter)
    seen = []
    for seed in (1, 2, 3):
        results = []
        for call in (compiled, eager):
            model.zero_grad()
            loss = call(token_ids(seed=seed))
            loss.backward()
            results.append((loss.detach(), gradients(model), model.sapt.attention))
        (loss, grads, weights), (expected_loss, expected, expected_weights) = results
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(weights, expected_weights)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert error(grad, expected[name]) < 1e-4, name
        seen.append(weights)
    assert counter.frame_count == 1
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_compiled_model_with_cache_and_pinned_weights():
    model, ids = patched("llama"), token_ids()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in (1, 2):
            with model.sapt.fixed(torch.rand(3, 3, generator=torch.Generator().manual_seed(seed))):
                torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        out, expected = compiled(ids, use_cache=True), model(ids, use_cache=True)
        compiled(token_ids(seed=4))
        model(token_ids(seed=4))
        torch.testing.assert_close(
            compiled(ids[:, :1], past_key_values=out.past_key_values).logits,
            model(ids[:, :1], past_key_values=expected.past_key_values).logits,
        )


@pytest.mark.parametrize("moved", ["frozen", "trainable"])
def test_compiled_layers_follow_parameters_that_were_moved(moved):
    """As vector_to_parameters and some averages of weights do: p.data = ..."""
    model, ids = patched("llama"), token_ids()
    torch._dynamo.reset()
    run(model, ids)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    before = run(model, ids)
    for pool in model.sapt.pools.values():
        part = getattr(pool.b, moved)
        part.data = part.data * 3
    got = run(model, ids)
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    torch.testing.assert_close(got, run(model, ids))
    assert error(got, before) > 1e-2


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_autocast(family):
    model, ids = fill(patched(family), deviation=0.1), token_ids()
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids=ids, labels=ids).loss
    mixed.backward()
    torch.testing.assert_close(mixed, loss, atol=0.05, rtol=0.05)
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        assert error(grad, expected[name]) < 0.3, name


def test_dropout_is_on_the_adapters_input_alone(monkeypatch):
    model, ids = patched("llama", lora_dropout=0.9), token_ids()
    plain = run(model, ids)
    model.train()
    assert (run(model, ids) - plain).abs().max() > 1e-3
    for pool in model.sapt.pools.values():
        pool.b.rows().zero_()
    torch.testing.assert_close(run(model, ids), run(tiny("llama"), ids))
    seen = []
    monkeypatch.setattr(layers, "drawn", lambda rate, x, count: seen.append((rate, count)))
    again = patched("llama", lora_dropout=0.9).train()
    torch.testing.assert_close(run(again, ids), plain, atol=1e-6, rtol=1e-5)
    assert seen == [(0.9, 2)] * 2  # queries and values together


def test_dropout_is_the_same_when_a_layer_is_computed_again():
    model, ids = patched("llama", lora_dropout=0.5).train(), token_ids()
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(*found)
