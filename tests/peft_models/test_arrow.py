"""patch of a model with Arrow routing: PEFT's numbers from one pass over the experts."""

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from tiny_models import tiny, token_ids

import sapt_fast
from sapt_fast.methods.peft.layers import mixes_by_arrow

TASKS, GENERAL = 4, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of one rank, as Arrow asks for, for the tasks and for general knowledge."""
    folder = tmp_path_factory.mktemp("arrow")
    for k in range(TASKS + GENERAL):
        config = LoraConfig(r=4, lora_alpha=4 * (k + 1), target_modules=["q_proj", "v_proj"])
        model = get_peft_model(tiny("llama"), config)
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        model.save_pretrained(folder / str(k))
    return [str(folder / str(k)) for k in range(TASKS + GENERAL)]


def arrow(folders, dtype=torch.float32, **changed):
    config = ArrowConfig(**{"top_k": 2, "router_temperature": 0.7, "rng_seed": 3, **changed})
    general = folders[TASKS:] if config.use_gks else None
    return create_arrow_model(tiny("llama").to(dtype), folders[:TASKS], config, general).eval()


def run(model, **extra):
    with torch.no_grad():
        return model(input_ids=token_ids(), **extra).logits


@pytest.mark.parametrize("changed", [{}, {"top_k": 4}, {"top_k": 1}, {"use_gks": True}], ids=str)
def test_logits_gradients_and_tokens_are_pefts(folders, changed):
    models = [arrow(folders, **changed) for _ in range(2)]
    sapt_fast.patch(models[1], strict=True)
    assert len(models[1].sapt.report.patched) == 4
    expected, got = map(run, models)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with models[0].disable_adapter():
        assert (expected - run(models[0])).abs().max() > 0.05
    embeddings = [m.get_input_embeddings()(token_ids()).detach().requires_grad_() for m in models]
    for model, x in zip(models, embeddings, strict=True):
        model(inputs_embeds=x).logits.square().sum().backward()
    torch.testing.assert_close(embeddings[1].grad, embeddings[0].grad, rtol=1e-4, atol=1e-4)
    options = {"input_ids": token_ids(), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(*(m.generate(**options) for m in models))


def test_one_pass_is_taken_and_peft_is_not_called(folders, monkeypatch):
    model = sapt_fast.patch(arrow(folders))
    layer = model.get_submodule(model.sapt.report.patched[0])
    router = layer.lora_arrow["arrow_router"]
    assert mixes_by_arrow(layer)
    monkeypatch.setattr(type(router), "forward", None)
    run(model)


def test_bfloat16(folders):
    exact = run(arrow(folders))
    models = [arrow(folders, torch.bfloat16) for _ in range(2)]
    sapt_fast.patch(models[1])
    plain, got = (run(m).float() for m in models)
    assert (got - exact).norm() <= 2 * (plain - exact).norm()


def test_what_is_left_to_peft(folders):
    """One of the experts alone, disabled adapters, names per sample; and Arrow again after."""
    peft, ours = models = [arrow(folders) for _ in range(2)]
    sapt_fast.patch(ours)
    for model in models:
        model.set_adapter("task_1")
    torch.testing.assert_close(run(ours), run(peft), rtol=1e-5, atol=1e-5)
    for model in models:
        model.set_adapter("arrow_router")
    with peft.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(run(ours), run(peft))
    torch.testing.assert_close(run(ours), run(peft), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_comes_later_is_routed_to(folders):
    models = [arrow(folders) for _ in range(2)]
    sapt_fast.patch(models[1])
    before = run(models[1])
    for model in models:
        model.load_adapter(folders[TASKS], "task_4")
        model.set_adapter("arrow_router")
    expected, got = map(run, models)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 1e-3


def test_weights_for_all_adapters_are_refused(folders):
    """The router is an adapter, too, with matrices that Arrow never multiplies by."""
    model = sapt_fast.patch(arrow(folders))
    before = run(model)
    with pytest.raises(ValueError, match="nothing is merged"):
        model.sapt.merge(torch.ones(len(model.sapt.tasks)))
    with pytest.raises(RuntimeError, match="cannot be mixed"):
        run(model, mixture=torch.ones(len(model.sapt.tasks)))
    assert torch.equal(run(model), before)


def test_unpatch(folders):
    model = arrow(folders)
    before = run(model)
    assert torch.equal(run(sapt_fast.unpatch(sapt_fast.patch(model))), before)
