"""delete_task, rename_task and reorder_tasks: outputs, gradients, optimizers, saved folders."""

import copy

import pytest
import torch
from tiny_models import patched, run, settings, tiny, token_ids
from tiny_prompts import prompted
from tiny_vision import images, vision_model

import sapt_fast
from sapt_fast.methods.epi import EpiConfig
from sapt_fast.methods.gainlora import GainLoraConfig
from sapt_fast.methods.lora_sum import LoraSumConfig
from sapt_fast.methods.sd_lora import SdLoraConfig


def with_targets(model):
    with torch.no_grad():
        weights = model.sapt.route(token_ids()).mean(0)
    for k, name in enumerate(model.sapt.tasks):
        model.sapt.targets[name] = weights[: k + 1] / weights[: k + 1].sum()
    return model


def logits(model, ids, weights=None):
    with torch.no_grad():
        if weights is None:
            return run(model, ids)
        with model.sapt.fixed(weights):
            return run(model, ids)


@pytest.mark.parametrize("deleted", [0, 2])
@pytest.mark.parametrize("make", [patched, prompted])
def test_deleted_tasks_leave_the_renormalised_mixture(make, deleted):
    model, ids = with_targets(make("t5")).eval(), token_ids()
    weights = model.sapt.route(ids).detach()
    kept = [k for k in range(3) if k != deleted]
    renormalised = weights[:, kept] / weights[:, kept].sum(1, keepdim=True)
    whole = torch.zeros_like(weights)
    whole[:, kept] = renormalised
    expected = logits(model, ids, whole)
    targets = dict(model.sapt.targets)
    model.sapt.delete_task(f"task{deleted}")
    assert model.sapt.tasks == [f"task{k}" for k in kept]
    torch.testing.assert_close(model.sapt.route(ids), renormalised)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert model.sapt.attention.shape[1] == 2
    assert model.sapt.targets.keys() == set(model.sapt.tasks)
    last = targets[f"task{kept[1]}"]
    left = last[[k for k in kept if k < len(last)]]
    torch.testing.assert_close(model.sapt.targets[f"task{kept[1]}"], left / left.sum())


def test_the_last_task_trains_after_any_change(tmp_path):
    """Gradients, requires_grad, a saved folder and a later task are those of a model built so."""
    config = {"modules_to_save": ["classifier"], "modules_per_task": True}
    made = patched(tiny("bert"), **config)
    model, ids = copy.deepcopy(made), token_ids()
    model.sapt.reorder_tasks(["task2", "task0", "task1"])
    model.sapt.delete_task("task0")
    model.sapt.rename_task("task1", "last")
    saved = tmp_path / "saved"
    model.sapt.save_pretrained(saved)
    again = sapt_fast.load_pretrained(tiny("bert"), saved)
    assert again.sapt.tasks == model.sapt.tasks == ["task2", "last"]
    for one in (model, again):
        one(ids).logits.square().mean().backward()
    grads = {n: (p.grad, p.requires_grad) for n, p in model.named_parameters()}
    for name, parameter in again.named_parameters():
        grad, trains = grads[name]
        assert trains == parameter.requires_grad, name
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            torch.testing.assert_close(grad, parameter.grad)
    with model.sapt.fixed(torch.tensor([0.0, 1.0])), made.sapt.fixed(torch.tensor([0.0, 1.0, 0.0])):
        torch.testing.assert_close(model(ids).logits, made(ids).logits)


def test_optimizers_follow_the_task_that_trains():
    model, ids = patched("llama").eval(), token_ids()
    optimizer = torch.optim.AdamW(model.sapt.trainable_parameters(), lr=1e-2)

    def step():
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def held():
        return [p for group in optimizer.param_groups for p in group["params"]]

    step()
    before = {id(p): optimizer.state[p]["step"].item() for p in held()}
    model.sapt.delete_task("task0", optimizer)  # the newest task stays: so do its parameters
    assert {id(p): optimizer.state[p]["step"].item() for p in held()} == before
    step()
    trained = {id(p) for p in model.sapt.trainable_parameters()}
    assert {id(p) for p in held()} == trained == before.keys()
    model.sapt.delete_task("task2", optimizer)
    trained = {id(p) for p in model.sapt.trainable_parameters()}
    assert {id(p) for p in held()} == trained
    key = model.sapt.router.keys.trainable
    assert key not in optimizer.state
    old = key.detach().clone()
    step()
    assert not torch.equal(key, old)
    assert model.sapt.tasks == ["task1"]
    with pytest.raises(ValueError, match="optimizer: contains none"):
        model.sapt.delete_task("task1", torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1.0))
    model.sapt.delete_task("task1", optimizer)
    fresh = sapt_fast.patch(tiny("llama"), settings())
    torch.testing.assert_close(logits(model, ids), logits(tiny("llama"), ids))
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    assert trains == {n: p.requires_grad for n, p in fresh.named_parameters()}
    model.sapt.add_task("again", optimizer)
    step()


def test_errors_change_nothing():
    model = patched("llama")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    sapt = model.sapt
    with pytest.raises(ValueError, match="name: got 'x', expected one of the tasks"):
        sapt.delete_task("x")
    for names in (["task0", "task1"], ["task0", "task0", "task1"], "task0"):
        with pytest.raises(ValueError, match=r"names: got .* expected a permutation"):
            sapt.reorder_tasks(names)
    for new in ("task1", "a/b", "TASK1"):
        with pytest.raises(ValueError, match="new: got"):
            sapt.rename_task("task0", new)
    with pytest.raises(ValueError, match="old: got 'x'"):
        sapt.rename_task("x", "y")
    with sapt.fixed(torch.ones(3)), pytest.raises(RuntimeError, match=r"inside model\.sapt\.fixed"):
        sapt.delete_task("task0")
    sapt.merge([1.0, 0.0, 0.0])
    with pytest.raises(RuntimeError, match="merged"):
        sapt.delete_task("task0")
    sapt.unmerge()
    last = list(sapt.pools.values())[-1].b
    own = last.frozen
    last.frozen = torch.nn.Parameter(own.detach().to("meta"))
    with pytest.raises(RuntimeError, match="deleted or moved"):
        sapt.delete_task("task0")
    last.frozen = own
    assert sapt.tasks == ["task0", "task1", "task2"]
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in state.items())
    sapt.rename_task("task0", "Task0")  # only the case changes


def test_other_methods():
    ids = token_ids()
    model = sapt_fast.patch(tiny("llama"), LoraSumConfig(r=2))
    for name in "ab":
        model.sapt.add_task(name)
    model.sapt.targets["b"] = torch.ones(2)
    model.sapt.delete_task("a")
    assert model.sapt.route(ids).tolist() == [[1.0]]
    assert model.sapt.targets["b"].tolist() == [1.0]
    assert not model.sapt.router.keys.trainable.requires_grad

    model = sapt_fast.patch(tiny("llama"), EpiConfig(r=2)).eval()
    batches = [token_ids(seed=seed) for seed in range(3)]
    for name, batch in zip("abc", batches, strict=True):
        model.sapt.add_task(name)
        if name != "c":
            model.sapt.fit([(batch, torch.ones_like(batch))])
    with pytest.raises(ValueError, match="'c' has no Gaussian"):
        model.sapt.reorder_tasks(["c", "a", "b"])
    model.sapt.reorder_tasks(["b", "a", "c"])
    model.sapt.fit([(batches[2], torch.ones_like(batches[2]))])
    before = model.sapt.route(ids)
    model.sapt.reorder_tasks(["c", "b", "a"])
    assert torch.equal(model.sapt.route(ids), before[:, [2, 0, 1]])

    options = {"pool": 6, "n_tasks": 3, "layers": [0], "modules_to_save": ["classifier"]}
    for config in (
        sapt_fast.CodaConfig(**options),
        sapt_fast.DualPromptConfig(g_layers=[0], e_layers=[1]),
    ):
        model = sapt_fast.patch(vision_model("vit"), config).eval()
        handle = sapt_fast.handle(model, type(config))
        for name in "abc":
            handle.add_task(name)
        expected = model(images()).logits
        handle.reorder_tasks(["c", "a", "b"])
        torch.testing.assert_close(model(images()).logits, expected)
        handle.delete_task("c")
        handle.rename_task("b", "d")
        assert handle.tasks == ["a", "d"]
        assert {len(s) for s in handle.stacks().values()} <= {2, 4}

    model = sapt_fast.patch(tiny("llama"), sapt_fast.L2PConfig(prompts=4, top=2))
    model.l2p.add_task("pool")
    with pytest.raises(ValueError, match="one pool"):
        model.l2p.delete_task("pool")


def test_trainable_parameters_are_printed_as_by_peft(capsys):
    model = patched("llama", tasks=2)
    model.sapt.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.sapt.trainable_parameters())
    total = sum(p.numel() for p in model.parameters())
    out = capsys.readouterr().out
    assert out.startswith(f"trainable params: {trainable:,} || all params: {total:,} ||")


def grown(config):
    model = sapt_fast.patch(tiny("llama"), config).eval()
    for name in ("a", "b", "c"):
        model.sapt.add_task(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.sapt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_gates_of_gainlora_follow_their_tasks():
    model, ids = grown(GainLoraConfig(r=2)), token_ids()
    weights = model.sapt.route(ids).detach()
    assert weights.std(1).min() > 1e-3  # the tasks differ
    model.sapt.reorder_tasks(["c", "a", "b"])
    torch.testing.assert_close(model.sapt.route(ids), weights[:, [2, 0, 1]])
    model.sapt.delete_task("b")
    torch.testing.assert_close(model.sapt.route(ids), weights[:, [2, 0]])
    assert [p.shape[0] for p in model.sapt._growing()][:2] == [100, 32]


def test_sd_lora_refuses_what_its_magnitudes_cannot_follow():
    model, ids = grown(SdLoraConfig(r=2)), token_ids()
    before = run(model, ids)
    for change in (lambda: model.sapt.delete_task("a"), lambda: model.sapt.reorder_tasks([*"bac"])):
        with pytest.raises(ValueError, match="magnitudes"):
            change()
    model.sapt.rename_task("a", "first")
    assert model.sapt.tasks == ["first", "b", "c"]
    assert torch.equal(run(model, ids), before)
