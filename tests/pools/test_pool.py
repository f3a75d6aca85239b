"""The pool: tasks are added without moving what is there, and only the newest one trains."""

import copy
import io
import time
import weakref

import pytest
import torch
from tiny_models import RANK, WIDTH, fill, patched, settings, tiny, token_ids
from torch import nn
from torch._subclasses import FakeTensorMode

import sapt_fast
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.pools.lora import AdapterPool, RowStack

IN, OUT = 6, 5


def stack(rows=(2, 3), reserve=16, dtype=torch.float32):
    made = RowStack(4, reserve, device=torch.device("cpu"), dtype=dtype)
    for count in rows:
        made.append(count, lambda values: values.normal_())
    return made


def pool(ranks=(2, 3), reserve=16, dtype=torch.float64):
    made = AdapterPool(IN, OUT, reserve=reserve, dtype=dtype)
    for rank in ranks:
        made.add(rank, 2.0)
        with torch.no_grad():
            made.b.trainable.normal_()
    return made


def loop(made, x, weight, bias, mixture):
    """The mixture by its formula, adapter by adapter; x [B, T, I], mixture [B, K]."""
    y = nn.functional.linear(x, weight, bias)
    for k in range(len(made)):
        a, b = made.adapter(k)
        y = y + mixture[:, k, None, None] * made.scaling[k] * (x @ a.t() @ b)
    return y


def inputs(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, IN), (OUT, IN), (OUT,), (3, count)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


# --- storage ---


def test_adding_within_the_reserve_moves_nothing():
    made = stack(rows=(2,))
    address, values = made.rows().data_ptr(), made.rows().clone()
    for rows in (3, 0, 4):
        made.append(rows, lambda new: new.fill_(7.0))
        assert made.rows().data_ptr() == address
    assert len(made) == 9
    assert torch.equal(made.rows()[:2], values)
    assert made.frozen.shape == (5, 4)
    assert made.trainable.shape == (4, 4)
    assert made.frozen.data_ptr() == address
    assert made.trainable.data_ptr() == made.rows()[5:].data_ptr()


def test_growth_beyond_the_reserve_keeps_every_row():
    made, expected, moves = stack(rows=(), reserve=2), [], set()
    for task in range(20):
        made.append(3, lambda new, task=task: new.fill_(float(task)))
        expected += [float(task)] * 3
        moves.add(made._memory.shape[0])
        assert made.rows()[:, 0].tolist() == expected
    assert len(moves) <= 6  # it doubles: the copies stay few
    assert made._memory.shape[0] <= 2 * len(made)


def test_rows_of_earlier_tasks_are_frozen():
    made = stack(rows=(2, 3))
    assert not made.frozen.requires_grad
    assert made.trainable.requires_grad
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {"trainable"}


def test_the_parameter_of_an_earlier_task_is_let_go():
    made = stack(rows=(2,))
    old, kept = weakref.ref(made.trainable), made.trainable.detach().clone()
    made.append(3, torch.zero_)
    assert old() is None
    assert torch.equal(made.frozen, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_keeps_the_rows_in_one_piece(dtype):
    made = stack()
    values = made.rows().clone()
    made.to(dtype)
    assert made._memory.dtype == dtype
    assert made.rows().data_ptr() == made.frozen.data_ptr()
    assert made.trainable.data_ptr() == made.rows()[2:].data_ptr()
    assert torch.equal(made.rows(), values.to(dtype))
    made.append(2, nn.init.ones_)
    assert made.rows().dtype == made.trainable.dtype == dtype
    assert torch.equal(made.rows()[:5], values.to(dtype))


def test_one_parameter_moved_by_hand_is_put_back():
    made = stack()
    values = made.rows().clone()
    made.frozen.data = made.frozen.data.clone()
    made.trainable.data = made.trainable.data.double()
    assert torch.equal(made.rows(), values.double())
    with torch.no_grad():
        made.trainable.zero_()
        made.frozen.fill_(2.0)
    assert made.rows().tolist() == [[2.0] * 4] * 2 + [[0.0] * 4] * 3


def test_a_copy_is_in_one_piece_at_once():
    made = stack()
    other = copy.deepcopy(made)
    assert other._memory.data_ptr() == other.frozen.data_ptr() != made.frozen.data_ptr()
    assert other.trainable.data_ptr() == other._memory[2:].data_ptr()
    assert torch.equal(other._memory[:5], made.rows())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    made, other = stack(), stack()
    assert set(made.state_dict()) == {"frozen", "trainable"}
    state = {name: value.clone() for name, value in other.state_dict().items()}
    made.load_state_dict(state, assign=assign)
    assert torch.equal(made._memory[:5], other.rows())  # at once: a compiled forward reads it
    assert torch.equal(made.rows(), other.rows())
    made.append(1, nn.init.ones_)
    assert torch.equal(made.rows()[:5], other.rows())


def test_state_dict_of_other_ranks_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        stack().load_state_dict(stack(rows=(2, 2)).state_dict())


def test_a_loaded_stack_knows_where_its_rows_are(monkeypatch):
    file = io.BytesIO()
    torch.save(stack(), file)
    file.seek(0)
    made = torch.load(file, weights_only=False)
    monkeypatch.setattr(RowStack, "_realign", lambda self: pytest.fail("looks again each time"))
    assert made.rows().shape == (5, 4)


def test_tensors_that_stand_in_are_read_and_left_alone():
    made, x = pool((2, 3)), torch.randn(3, 4, IN, dtype=torch.float64)
    mixture = torch.rand(3, 2, dtype=torch.float64)
    own = {name: p.detach().clone() for name, p in made.named_parameters()}
    given = {name: torch.randn_like(p, requires_grad=True) for name, p in own.items()}
    addresses = {name: p.data_ptr() for name, p in given.items()}

    def call(parameters):
        return torch.func.functional_call(made, parameters, (x, None, None, mixture))

    got = call(given)
    assert {name: p.data_ptr() for name, p in given.items()} == addresses
    a = torch.cat([given["a.frozen"], given["a.trainable"]])
    b = torch.cat([given["b.frozen"], given["b.trainable"]])
    weights = mixture.repeat_interleave(torch.tensor([2, 3]), 1)[:, None] * 2.0
    expected = (x @ a.t() * weights) @ b
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected.square().sum(), given["b.trainable"])
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), given["b.trainable"]), wanted
    )
    assert all(torch.equal(p, own[name]) for name, p in made.named_parameters())
    assert made.a.rows().data_ptr() == made.a.frozen.data_ptr()


def test_nothing_is_added_while_other_tensors_stand_in():
    made = stack()
    made._parameters["trainable"] = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="other tensors have replaced"):
        made.append(1, torch.zero_)
    assert len(made) == 5


# --- the mixture ---


@pytest.mark.parametrize("ranks", [(2,), (2, 3), (1, 0, 4), (0, 3), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("through", [True, False])
def test_forward_and_gradients_match_the_formula(ranks, through):
    made = pool(ranks)
    x, weight, bias, mixture = inputs(len(ranks))
    x.requires_grad_()
    mixture.requires_grad_()
    grad = torch.randn(3, 4, OUT, dtype=x.dtype)
    leaves = [x, mixture, made.a.trainable, made.b.trainable]
    y = made(x, weight, bias, mixture, grad_through_frozen=through)
    got = torch.autograd.grad(y, leaves, grad, allow_unused=True)

    newest = [t.detach().clone().requires_grad_() for t in made.adapter(len(ranks) - 1)]
    expected = nn.functional.linear(x, weight, bias)
    for k in range(len(ranks)):
        last = k == len(ranks) - 1
        a, b = newest if last else made.adapter(k)
        seen = x if through or last else x.detach()
        expected = expected + mixture[:, k, None, None] * 2.0 * (seen @ a.t() @ b)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected, [x, mixture, *newest], grad)
    for one, other in zip(got, wanted, strict=True):
        if other.numel():
            torch.testing.assert_close(one, other)


def test_only_trainable_rows_get_gradients_and_optimizer_state():
    made = pool((2, 3, 4), dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad])
    x, weight, bias, mixture = inputs(3, torch.float32)
    made(x, weight, bias, mixture).square().sum().backward()
    frozen = made.a.rows()[:5].clone(), made.b.rows()[:5].clone()
    optimizer.step()
    assert made.a.frozen.grad is None
    assert made.b.frozen.grad is None
    states = [state["exp_avg"].shape for state in optimizer.state.values()]
    assert states == [(4, IN), (4, OUT)]
    assert torch.equal(made.a.rows()[:5], frozen[0])
    assert torch.equal(made.b.rows()[:5], frozen[1])
    assert torch.equal(made.a.rows()[5:], made.a.trainable)


def test_given_weights_are_copied():
    made = pool((2,), dtype=torch.float32)
    a, b = torch.randn(3, IN, dtype=torch.float64), torch.randn(3, OUT, dtype=torch.float64)
    made.add(3, 0.5, (a, b))
    got = made.adapter(1)
    assert torch.equal(got[0], a.float())
    assert torch.equal(got[1], b.float())
    assert made.scaling == (2.0, 0.5)


def test_given_weights_that_require_grad_leave_no_graph():
    made = pool((2,), dtype=torch.float32)
    made.add(3, 0.5, (nn.Parameter(torch.randn(3, IN)), nn.Parameter(torch.randn(3, OUT))))
    assert not made.a.rows().requires_grad
    assert made.a.trainable.is_leaf
    made.add(2, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((4, IN), (1, OUT), rf"weights: got B of shape \(1, {OUT}\), expected \[4, {OUT}\]"),
        ((4, IN), (4, 1), "weights: got B"),
        ((IN,), (4, OUT), "weights: got A"),
        ((3, IN), (4, OUT), "weights: got A"),
    ],
)
def test_weights_of_another_shape_change_nothing(a, b, message):
    made = pool((2,))
    with pytest.raises(ValueError, match=message):
        made.add(4, 1.0, (torch.randn(a), torch.randn(b)))
    assert (len(made), len(made.a), len(made.b)) == (1, 2, 2)


def test_ranks_and_scaling_change_by_adding_alone():
    made = pool()
    with pytest.raises(TypeError):
        made.scaling[0] = 5.0
    with pytest.raises(TypeError):
        made.ranks[0] = 5


@pytest.mark.parametrize("through", [True, False])
def test_factors_that_do_not_train_cost_no_gradient(through, monkeypatch):
    x, weight, bias, mixture = inputs(2)
    x.requires_grad_()
    made = pool()
    expected = torch.autograd.grad(
        made(x, weight, bias, mixture, grad_through_frozen=through).sum(), x
    )
    made.requires_grad_(False)
    seen = []
    monkeypatch.setattr(sapt_fast.pools.lora, "mix", lambda *args: seen.append(args) or mix(*args))
    got = torch.autograd.grad(made(x, weight, bias, mixture, grad_through_frozen=through).sum(), x)
    torch.testing.assert_close(got, expected)
    [projection] = seen[0][2]
    assert projection.train_rows == ([] if through else [2, 5])


def test_realign_brings_moved_rows_to_a_compiled_forward():
    made = pool()
    given = inputs(2)
    compiled = torch.compile(lambda: made(*given), backend="eager", fullgraph=True)
    before = compiled()
    made.b.trainable.data = made.b.trainable.data * 3
    made.realign()
    assert not torch.equal(compiled(), before)
    torch.testing.assert_close(compiled(), loop(made, *given))


def test_tables_made_while_tracing_are_not_kept():
    made = pool(dtype=torch.float32)
    made._tables.clear()
    x, weight, bias, mixture = inputs(2, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made(*(mode.from_tensor(t) for t in (x, weight, bias, mixture)))
    expected = loop(made, x, weight, bias, mixture)
    torch.testing.assert_close(made(x, weight, bias, mixture), expected)


# --- tasks of a model under an optimizer ---


def step(model, optimizer, seed=0):
    ids = token_ids(seed=seed)
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def adapters(model, count):
    """Copies of the first `count` adapters and keys."""
    handle = model.sapt
    pairs = [p.adapter(k) for p in handle.pools.values() for k in range(count)]
    return [t.clone() for pair in pairs for t in pair] + [handle.router.keys.rows()[:count].clone()]


@pytest.mark.parametrize("stale", [False, True], ids=["", "stale_gradient"])
def test_an_optimizer_of_the_task_before_cannot_touch_its_rows(stale):
    model = patched("llama", tasks=1)
    optimizer = torch.optim.AdamW(model.sapt.trainable_parameters(), lr=0.1, weight_decay=0.5)
    step(model, optimizer)
    held, growing = optimizer.param_groups[0]["params"], list(model.sapt._growing())
    before = adapters(model, 1)
    model.sapt.add_task("next")
    assert all(p.grad is None for p in growing)
    if stale:
        for parameter in held:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    else:
        step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(adapters(model, 1), before, strict=True))


def test_a_given_optimizer_follows_to_the_new_task():
    model = patched("llama", tasks=1)
    growing = list(model.sapt._growing())
    router = model.sapt.router
    others = [*router.down.parameters(), *router.up.parameters(), *router.norm.parameters()]
    optimizer = torch.optim.AdamW([{"params": growing, "lr": 0.1}, {"params": others, "lr": 0.01}])
    step(model, optimizer)
    before, shared = adapters(model, 1), router.up.weight.detach().clone()
    model.sapt.add_task("next", optimizer=optimizer)
    new = list(model.sapt._growing())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in new]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert not any(p in optimizer.state for p in [*growing, *new])
    assert all(p in optimizer.state for p in others)
    values = [p.detach().clone() for p in new]
    step(model, optimizer)
    step(model, optimizer)  # B starts at zero, so A learns from the second step on
    assert all(not torch.equal(p, v) for p, v in zip(new, values, strict=True))
    assert not torch.equal(router.up.weight, shared)
    assert all(torch.equal(a, b) for a, b in zip(adapters(model, 1), before, strict=True))


def test_an_optimizer_of_something_else_is_refused_before_anything_changes():
    model = patched("llama", tasks=1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="optimizer: contains none"):
        model.sapt.add_task("next", optimizer=optimizer)
    assert model.sapt.tasks == ["task0"]
    assert {len(p) for p in model.sapt.pools.values()} == {1}
    assert len(model.sapt.router.keys) == 1


def test_a_pending_backward_does_not_train_the_frozen_task():
    """A graph built before `add_task` either fails or leaves the frozen rows alone."""
    model = patched("llama", tasks=1)
    optimizer = torch.optim.AdamW(model.sapt.trainable_parameters(), lr=0.1, weight_decay=0.5)
    loss = model(token_ids(), labels=token_ids()).loss
    model.sapt.add_task("next")
    before = adapters(model, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(adapters(model, 1), before, strict=True))


def test_two_hundred_tasks():
    model = sapt_fast.patch(tiny("llama"), settings(r=2, reserve_tasks=4))
    parameters, started = len(list(model.parameters())), time.perf_counter()
    for k in range(200):
        model.sapt.add_task(f"task{k}")
    assert time.perf_counter() - started < 20
    assert len(list(model.parameters())) == parameters
    assert (
        sum(p.numel() for p in model.sapt.trainable_parameters() if p.dim() == 2)
        == sum(2 * (WIDTH + out) for out in (32, 16) for _ in range(2)) + WIDTH + 2 * 100 * WIDTH
    )
    fill(model, deviation=0.05)
    layer = model.get_submodule(model.sapt.report.patched[0])
    seen = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    weights = model.sapt.attention
    assert weights.shape == (3, 200)
    with torch.no_grad():
        expected = loop(layer.sapt_pool, seen["x"], layer.weight, layer.bias, weights)
    torch.testing.assert_close(seen["y"], expected, atol=1e-5, rtol=1e-4)
    assert layer.sapt_pool.a.trainable.grad.shape == (2, WIDTH)


def test_tasks_after_a_change_of_dtype():
    model = patched("t5", tasks=2).to(torch.bfloat16)
    model.sapt.add_task("later")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for made in model.sapt.pools.values():
        assert made.a.trainable.grad.shape == (RANK, made.a.width)
        assert made.b.trainable.grad.dtype == torch.bfloat16
