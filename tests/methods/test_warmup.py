"""`warmup` runs the kernels of a method for given sizes, and leaves everything as it was."""

import importlib

import accelerate
import peft
import pytest
import tiny_models
import torch

import sapt_fast
from sapt_fast import dispatch

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def _patched(family="llama", **settings):
    torch.manual_seed(0)
    model = tiny_models.FAMILIES[family]()
    model = sapt_fast.patch(model, sapt_fast.SaptConfig(**settings))
    for name in ("one", "two"):
        model.sapt.add_task(name)
    return model


def _peft():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_models.FAMILIES["llama"](), config, adapter_name="one")
    model.add_adapter("two", config)
    return sapt_fast.patch(model)


MODELS = {
    "llama": lambda: _patched(lora_dropout=0.1),
    "t5": lambda: _patched("t5"),
    "gpt2": lambda: _patched("gpt2"),
    "prompts": lambda: _patched(adapter="prompt"),
    "peft": _peft,
}


@pytest.fixture
def planned(monkeypatch):
    """The ops whose Triton kernels are asked for, in order; they run in the interpreter."""
    seen = []
    for op in ("mixed_lora", "mix_prompts", "pool_tokens", "route"):
        module = importlib.import_module(f"sapt_fast.triton_kernels.{op}")

        def spy(options, inputs, kept, compute, op=op):
            seen.append((op, options, inputs[0].shape))
            return compute()

        monkeypatch.setattr(module, "planned", spy)
    monkeypatch.setenv(dispatch.ENV_VARIABLE, "triton")
    return seen


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_visible_changes(name, train):
    model = MODELS[name]()
    model.train(train)
    calls = []
    # The router calls an embedding that has hooks.
    ours = "sapt", "embed", "wte", "shared"
    paths = [p for p, _ in model.named_modules() if not any(word in p for word in ours)]
    for module in map(model.get_submodule, paths):
        module.register_forward_hook(lambda *_: calls.append(1))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.register_hook(lambda grad: calls.append(grad))
    tensors = {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    attention, state = model.sapt.attention, torch.get_rng_state()
    calls.clear()
    model.sapt.warmup([(3, 4), (2, 1)], train=train)
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    for p, grad, values in grads:
        assert p.grad is grad
        assert grad is None or torch.equal(grad, values)
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    assert (model.sapt.attention is None) == (attention is None)
    assert attention is None or torch.equal(model.sapt.attention, attention)
    assert model.training == train
    assert torch.is_grad_enabled()


def test_it_asks_for_the_kernels_that_the_model_asks_for(planned):
    model = _patched("t5").eval()
    model.sapt.warmup([(2, 3)])
    warmed = {(op, options, shape) for op, options, shape in planned}
    planned.clear()
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), decoder_input_ids=IDS)
    asked = {(op, options, shape) for op, options, shape in planned}
    assert {op for op, _, _ in asked} == {"mixed_lora", "pool_tokens", "route"}
    assert asked <= warmed


def test_in_training_it_asks_for_the_backward(planned):
    model = _patched().train()
    model.sapt.warmup([(2, 3)])
    assert "backward" not in {options[0] for _, options, _ in planned}
    planned.clear()
    model.sapt.warmup([(2, 3)], train=True)
    warmed = {(op, options[0], shape) for op, options, shape in planned}
    planned.clear()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {(op, options[0], shape) for op, options, shape in planned} <= warmed


@pytest.mark.parametrize("name", ["llama", "peft"])
def test_offloaded_weights_are_loaded(planned, name):
    model = accelerate.cpu_offload(MODELS[name]().eval(), execution_device="cpu")
    model.sapt.warmup([(2, 3)])
    assert "mixed_lora" in {op for op, _, _ in planned}
    assert any(p.is_meta for p in model.parameters())


def test_prompts_are_mixed(planned):
    _patched(adapter="prompt").eval().sapt.warmup([(2, 3)])
    assert "mix_prompts" in {op for op, _, _ in planned}


def test_what_does_not_fit_is_refused():
    model = _patched()
    for batches in ([(0, 3)], [(2, 1.5)], [3], [(1, 2, 3)]):
        with pytest.raises(ValueError, match="batches: got"):
            model.sapt.warmup(batches)
    model.sapt.merge([0.5, 0.5])
    with pytest.raises(RuntimeError, match="merged"):
        model.sapt.warmup([(2, 3)])
    bare = sapt_fast.patch(tiny_models.FAMILIES["llama"]())
    with pytest.raises(RuntimeError, match="no task"):
        bare.sapt.warmup([(2, 3)])
