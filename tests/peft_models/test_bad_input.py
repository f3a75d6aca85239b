"""What a patched PeftModel refuses, before anything has changed."""

import pytest
import tiny_peft
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, token_ids
from tiny_peft import config, run
from torch import nn

import sapt_fast


def peft_model(**bases):
    model = tiny_peft.peft_model(configs=[config("llama"), config("llama")])
    for name, base in bases.items():
        model.peft_config[name].base_model_name_or_path = base
    return model


def first_layer(model):
    return next(m for m in model.modules() if hasattr(m, "lora_A"))


def test_an_adapter_whose_matrices_are_of_another_base():
    model = peft_model()
    layer = first_layer(model)
    own = layer.lora_A["a1"]
    layer.lora_A["a1"] = nn.Linear(48, 4, bias=False)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"'a1': got A .* it belongs to another base model"):
        sapt_fast.patch(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model, "sapt")
    layer.lora_A["a1"] = own
    sapt_fast.patch(model)


def test_a_base_that_is_not_of_transformers():
    base = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="got Sequential, expected a transformers PreTrainedModel"):
        sapt_fast.patch(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model, "sapt")


def test_adapters_that_name_several_bases(caplog):
    model = sapt_fast.patch(peft_model(a0="org/base-7b", a1="org/other-7b"))
    assert "several base models: ['base-7b', 'other-7b']" in str(model.sapt.report)
    assert "several base models" in caplog.text
    same = sapt_fast.patch(peft_model(a0="org/base-7b", a1="/models/base-7b"))
    assert not same.sapt.report.notes


def test_an_adapter_that_is_not_there():
    model = sapt_fast.patch(peft_model())
    before = run(model)
    with pytest.raises(ValueError, match="nope"):
        run(model, adapter_names=["a0", "nope", "a1"])
    assert torch.equal(run(model), before)
    with pytest.raises(ValueError, match="adapter_names"):  # by PEFT, inside the forward
        run(model, adapter_names=["a0", "a1"])
    assert torch.equal(run(model), before)


def broken(module, args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_error_inside_leaves_nothing_of_adapter_names(call):
    model, names = sapt_fast.patch(peft_model()), ["a0", "a1", "__base__"]
    before, by_name = run(model), run(model, adapter_names=names)
    hooks = [dict(m._forward_pre_hooks) for m in model.modules()]
    last = model.get_base_model().lm_head.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        getattr(model, call)(input_ids=token_ids(), adapter_names=names)
    last.remove()
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(run(model), before)
    assert torch.equal(run(model, adapter_names=names), by_name)


def test_names_as_well_as_weights():
    model = sapt_fast.patch(peft_model())
    before, names = run(model), ["a0", "a1", "__base__"]
    for _ in range(2):
        with pytest.raises(ValueError, match="names as well as weights"):
            run(model, adapter_names=names, mixture=torch.ones(2))
        with pytest.raises(ValueError, match="names as well as weights"):
            model.generate(token_ids(), adapter_names=names, mixture=torch.ones(2))
        with (
            model.sapt.fixed(torch.ones(2)),
            pytest.raises(ValueError, match="names as well as weights"),
        ):
            run(model, adapter_names=names)
        assert torch.equal(run(model), before)
    model.sapt.router = Given(torch.ones(3, 2))
    by_name = run(model, adapter_names=names)
    model.sapt.router = None
    assert torch.equal(by_name, run(model, adapter_names=names))


BAD_WEIGHTS = {
    "too many adapters": torch.ones(3, 3),
    "too few": torch.ones(3, 1),
    "not finite": torch.tensor([[1.0, float("nan")]] * 3),
    "of another batch": torch.ones(2, 2),
    "of another length": torch.ones(3, 5, 2),
    "integers": torch.ones(3, 2, dtype=torch.int64),
    "a number": torch.tensor(1.0),
}


class Given(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, **_):
        return self.weights


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_of_a_caller_and_of_a_router(case):
    model = sapt_fast.patch(peft_model())
    before = run(model)
    with pytest.raises((ValueError, RuntimeError), match="weights"):
        run(model, mixture=BAD_WEIGHTS[case])
    assert torch.equal(run(model), before)
    model.sapt.router = Given(BAD_WEIGHTS[case])
    with pytest.raises((ValueError, RuntimeError), match="weights"):
        run(model)
    model.sapt.router = None
    assert torch.equal(run(model), before)


def test_a_layer_that_another_library_has_swapped_again():
    model = sapt_fast.patch(peft_model())
    layer = first_layer(model)
    ours = type(layer)

    class Theirs(ours):
        pass

    layer.__class__ = Theirs
    before = run(model)
    with pytest.raises(ValueError, match=r"Theirs, expected the layer that patch created"):
        sapt_fast.unpatch(model)
    assert torch.equal(run(model), before)
    layer.__class__ = ours
    sapt_fast.unpatch(model)
    assert torch.allclose(run(model), before, atol=1e-5)


def test_a_second_peft_around_a_patched_model():
    model = sapt_fast.patch(peft_model())
    before = run(model)
    again = model.get_base_model()
    with pytest.raises(ValueError, match=r"patched already|earlier patch"):
        sapt_fast.patch(again)
    assert torch.equal(run(model), before)
    assert run(model).shape[-1] == VOCABULARY
