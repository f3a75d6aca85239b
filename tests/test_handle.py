"""model.sapt: tasks, routing and losses as a user calls them."""

import pytest
import torch
from tiny_models import WIDTH, patched, settings, tiny, token_ids

import sapt_fast


@pytest.mark.parametrize("name", ["", "task0", "a/b", "..", ".", "router.safetensors"])
def test_bad_task_names_change_nothing(name):
    model = patched("llama", tasks=1)
    with pytest.raises(ValueError, match="name: got"):
        model.sapt.add_task(name)
    assert model.sapt.tasks == ["task0"]
    assert {len(pool) for pool in model.sapt.pools.values()} == {1}


def test_route_follows_the_definition():
    """q = LayerNorm(SiLU(W_up W_down e)), a = softmax(K q / tau), e the mean of the embeddings."""
    model, ids = patched("llama"), token_ids()
    router, embedding = model.sapt.router, model.get_input_embeddings().weight
    pooled = embedding[ids].mean(1)
    hidden = torch.nn.functional.silu(pooled @ router.down.weight.t() @ router.up.weight.t())
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (
        hidden.var(-1, unbiased=False, keepdim=True) + router.norm.eps
    ).sqrt()
    scores = (hidden * router.norm.weight + router.norm.bias) @ router.keys.rows().t() / 1.5
    torch.testing.assert_close(model.sapt.route(ids), torch.softmax(scores, -1))


@pytest.mark.parametrize("kind", ["missing", "unknown", "a", "b", "key"])
def test_what_does_not_fit_is_restored_nowhere(kind):
    model = patched("llama", tasks=1)
    pools = model.sapt.pools
    adapters = {
        p: (torch.randn(2, i.a.width), torch.randn(2, i.b.width), 1.0) for p, i in pools.items()
    }
    key, last = torch.randn(WIDTH), list(pools)[-1]
    a, b, scaling = adapters[last]
    if kind == "missing":
        del adapters[last]
    elif kind == "unknown":
        adapters["elsewhere"] = adapters[last]
    elif kind == "key":
        key = key[:1]
    else:
        adapters[last] = (a[:, :1], b, scaling) if kind == "a" else (a, b[:1], scaling)
    with pytest.raises(ValueError, match="key: got" if kind == "key" else "adapters: "):
        model.sapt.restore_task("new", adapters, key)
    assert model.sapt.tasks == ["task0"]
    assert {len(pool) for pool in pools.values()} == {1}
    assert len(model.sapt.router.keys) == 1


def test_a_mask_that_tells_no_padding_is_refused():
    model, ids = patched("llama"), token_ids()
    square = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    for mask in (square, {"full_attention": square}):
        with pytest.raises(ValueError, match=r"attention_mask: got .* expected \[B, T\]"):
            model.sapt.route(ids, mask)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=square)
    with model.sapt.fixed(model.sapt.route(ids).detach()):
        model(ids, attention_mask=square)
    model = patched("llama", mask_padding=False)
    model(ids, attention_mask=square)
    assert torch.equal(model.sapt.attention, model.sapt.route(ids))


def test_route_needs_inputs():
    with pytest.raises(ValueError, match="input_ids: got None"):
        patched("llama").sapt.route()


def test_route_reaches_the_newest_key_and_the_projection_only():
    model = patched("llama")
    model.sapt.route(token_ids())[:, 0].sum().backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert names == {
        f"sapt.router.{n}"
        for n in ("down.weight", "up.weight", "norm.weight", "norm.bias", "keys.trainable")
    }


@pytest.mark.parametrize("per_sample", [True, False])
def test_reflection_loss_is_the_divergence(per_sample):
    model, ids = patched("t5"), token_ids()
    target = torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.5, 0.5]])
    target = target if per_sample else target[0]
    loss = model.sapt.reflection_loss(ids, target)
    predicted = model.sapt.route(ids)[:, :2]
    expected = (target * (target.log() - predicted.log())).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    # The newest task has no share in the target, so descending must take weight off it.
    key = model.sapt.router.keys.trainable
    before = model.sapt.route(ids)[:, 2].mean()
    with torch.no_grad():
        key -= 0.1 * key.grad / key.grad.norm()
    assert model.sapt.route(ids)[:, 2].mean() < before


@pytest.mark.parametrize("mask", [True, False])
def test_reflection_loss_pools_what_the_forward_pools(mask):
    model, ids = patched("llama"), token_ids()
    labels = torch.where(torch.arange(9) < 5, -100, ids)
    target = model.sapt.route(ids[:, :5]).detach()
    options = {"labels": labels} if not mask else {"attention_mask": (labels == -100).long()}
    assert model.sapt.reflection_loss(ids, target, **options).abs() < 1e-6
    assert model.sapt.reflection_loss(ids, target) > 1e-4


@pytest.mark.parametrize(
    "target", [[-0.1, 1.1], [float("nan"), 1.0], [0.25] * 4, [[0.5, 0.5]] * 2], ids=str
)
def test_bad_targets(target):
    with pytest.raises(ValueError, match="target: got"):
        patched("llama").sapt.reflection_loss(token_ids(), torch.tensor(target))


def test_losses_need_a_task():
    model = sapt_fast.patch(tiny("llama"), settings())
    for call in (
        lambda: model.sapt.reflection_loss(token_ids(), torch.ones(1)),
        lambda: model.sapt.init_key(token_ids()),
        lambda: model.sapt.route(token_ids()),
    ):
        with pytest.raises(RuntimeError, match="add_task"):
            call()
    with pytest.raises(ValueError, match="weights: got shape"):
        model.sapt.fixed([1.0])


def test_init_key_is_the_mean_query():
    model, ids = patched("llama"), token_ids()
    keys = model.sapt.router.keys.rows().clone()
    model.sapt.init_key(ids)
    now = model.sapt.router.keys.rows()
    assert torch.equal(now[:2], keys[:2])
    assert not torch.equal(now[2], keys[2])
    # The key closest to a batch of one input is that input's own query.
    model.sapt.init_key(ids[:1])
    scores = model.sapt.route(ids[:1]).log()
    query = now[2].clone()
    torch.testing.assert_close(scores[0, 2] - scores[0, 0], (query @ query - query @ keys[0]) / 1.5)


def test_standardized_queries_do_not_share_the_common_part():
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 50.0  # what all tokens have in common
    sapt_fast.patch(model, settings(standardize_query=True))
    model.sapt.add_task("first")
    ids = token_ids(batch=64, length=64)
    pooled = model.sapt.router.pool(model.get_input_embeddings(), ids, None, None)
    assert pooled.shape == (64, WIDTH)
    assert pooled.mean(0).abs().max() < 1.0
    assert 0.2 < pooled.std(0).min() <= pooled.std(0).max() < 2
    assert {"sapt.router.query_mean", "sapt.router.query_std"} <= set(model.state_dict())


def test_a_router_of_ones_own():
    """Any module with the router's methods takes its place."""
    model, ids = patched("llama"), token_ids()
    model.sapt.router.weights = lambda pooled: torch.eye(3)
    model(ids)
    assert torch.equal(model.sapt.attention, torch.eye(3))
