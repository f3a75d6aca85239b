"""A patched PeftModel keeps up with changes: compiled, in threads, with stand-in parameters."""

import copy
import sys
import threading

import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from tiny_models import tiny, token_ids
from tiny_peft import config, mixture, peft_model, pooled_layers, run

import sapt_fast


def add_new(model):
    torch.manual_seed(3)
    model.add_adapter("new", config("llama", r=3, init_lora_weights=False))
    model.base_model.set_adapter(["a0", "new"])
    return model


def rescale(model):
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("a0", 5.0)
    return model


def train(model, forward):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(2):
        ids = token_ids(seed=step)
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", **options)


CHANGES = {
    "add": add_new,
    "to": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "set_scale": rescale,
}


@pytest.mark.parametrize(
    ("change", "ran"), [("add", False), ("to", False), ("deepcopy", False), ("set_scale", True)]
)
def test_a_compiled_forward_follows_changes(change, ran):
    model, reference = (peft_model(base=tiny("llama")) for _ in range(2))
    sapt_fast.patch(model)
    if ran:
        with torch.no_grad():
            compiled(model)(input_ids=token_ids(), use_cache=False)
    model, reference = CHANGES[change](model), CHANGES[change](reference)
    forward = torch.compile(model, backend="aot_eager") if ran else compiled(model)
    train(model, forward)
    train(reference, reference)
    with torch.no_grad():
        got = forward(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(got, run(reference), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(model), got, rtol=1e-5, atol=1e-5)


def test_what_one_graph_cannot_follow_is_refused():
    model = add_new(sapt_fast.patch(peft_model(base=tiny("llama"))))
    forward = compiled(model.get_base_model(), fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="adapters have changed"):
        forward(input_ids=token_ids(), use_cache=False)
    expected = run(model)
    with torch.no_grad():
        got = forward(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(got, expected)


def test_one_graph_follows_scalings_that_are_tensors():
    configs = [config("llama")]
    models = [peft_model(configs=configs, base=tiny("llama")) for _ in range(2)]
    for model in models:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    model, reference = sapt_fast.patch(models[0]), models[1]
    run(model)
    forward = compiled(model.get_base_model(), fullgraph=True)
    for scale in (2.0, 0.5):
        for m in models:
            for layer in m.modules():
                if hasattr(layer, "set_scale"):
                    layer.scaling["a0"].fill_(scale)
        with torch.no_grad():
            got = forward(input_ids=token_ids(), use_cache=False).logits
        torch.testing.assert_close(got, run(reference), rtol=1e-5, atol=1e-5)


def test_first_forwards_in_several_threads():
    """Only one of them moves the parameters; switching often brings races out."""
    weights, interval = torch.tensor([0.1, 0.2, 0.3, 0.4]), sys.getswitchinterval()
    expected = run(sapt_fast.patch(add_new(peft_model())), mixture=weights)
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(15):
            model = add_new(sapt_fast.patch(peft_model()))
            got = [None] * 4

            def forward(k, model=model, got=got):
                got[k] = run(model, mixture=weights)

            threads = [threading.Thread(target=forward, args=(k,)) for k in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for logits in got:
                assert logits is not None
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("weights", [None, mixture()], ids=["sum", "mixture"])
def test_stand_in_parameters_are_left_where_they_are(weights):
    """torch.func.functional_call: a caller's own tensors keep their memory and get gradients."""
    model = sapt_fast.patch(peft_model())
    inputs = {"input_ids": token_ids(), "labels": token_ids(seed=3), "mixture": weights}
    stand_in = {n: (p.detach() * 1.1).requires_grad_() for n, p in model.named_parameters()}
    addresses = {name: tensor.data_ptr() for name, tensor in stand_in.items()}
    before = run(model)
    torch.func.functional_call(model, stand_in, (), inputs).loss.backward()
    assert addresses == {name: tensor.data_ptr() for name, tensor in stand_in.items()}
    torch.testing.assert_close(run(model), before)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(stand_in[name])
    model(**inputs).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(stand_in[name].grad, p.grad, rtol=1e-5, atol=1e-6)


def test_pefts_parameters_stay_as_they_are():
    """What optimizers, checkpoints and sharding see does not depend on patch."""
    model = peft_model()
    before = {n: (p, p.data_ptr(), p.stride()) for n, p in model.named_parameters()}
    sapt_fast.patch(model).train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    sapt_fast.unpatch(model)
    after = {n: (p, p.data_ptr(), p.stride()) for n, p in model.named_parameters()}
    assert before.keys() == after.keys()
    for name, (p, address, stride) in after.items():
        assert p is before[name][0]
        assert (address, stride) == before[name][1:]


def test_an_inactive_adapter_between_active_ones_gets_no_gradient():
    model = sapt_fast.patch(peft_model()).train()
    model.base_model.set_adapter(["a0", "a2"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"a0", "a2"}


def test_weights_for_merged_adapters_are_refused():
    model = sapt_fast.patch(peft_model())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        run(model, mixture=torch.ones(3))
    model.unmerge_adapter()
    run(model, mixture=torch.ones(3))


def test_factors_of_two_dtypes_are_left_to_peft():
    model = sapt_fast.patch(peft_model())
    for layer in pooled_layers(model):
        layer.lora_B["a0"].to(torch.bfloat16)
    assert model.sapt.report.patched == []
    with pytest.raises(RuntimeError, match="dtype"):  # as PEFT's own
        run(model)
