"""merge and unmerge of a static mixture: the mixture's logits, then every bit as before."""

import pytest
import tiny_peft
import torch
from peft import LoraConfig
from tiny_models import patched, tiny, token_ids
from tiny_peft import config, peft_model

import sapt_fast

WEIGHTS = torch.tensor([0.7, -0.4, 1.2])


def run(model, **extra):
    return tiny_peft.run(model, model.config.model_type, **extra)


def peft_pool(family="llama", targets=("q_proj", "v_proj")):
    """Three adapters of different ranks, one of which leaves a layer out."""
    ranks = {4: targets[:1], 2: targets, 7: targets}
    configs = [config(family, r=r, target_modules=list(names)) for r, names in ranks.items()]
    return sapt_fast.patch(peft_model(family, configs))


POOLS = {
    "sapt_t5": lambda: patched("t5"),
    "sapt_gpt2": lambda: patched("gpt2"),
    "sapt_llama": lambda: patched("llama"),
    "peft_llama": peft_pool,
    "peft_gpt2": lambda: peft_pool("gpt2", ("c_attn", "c_proj")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", POOLS)
def test_merged_logits_and_exact_unmerge(pool, dtype):
    model = POOLS[pool]().to(dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with model.sapt.fixed(WEIGHTS):
        expected = run(model)
    model.sapt.merge(WEIGHTS)
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert len(changed) == len(model.sapt.report.patched)
    got = run(model)
    exact = dtype == torch.float32
    assert (got - expected).norm() <= (1e-5 if exact else 0.1) * expected.norm()
    pointers = [p.data_ptr() for p in model.parameters()]
    model.sapt.unmerge()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    with model.sapt.fixed(WEIGHTS):
        assert torch.equal(run(model), expected)
    model.sapt.unmerge()


@pytest.mark.parametrize("pool", ["sapt_llama", "peft_llama"])
def test_while_merged(pool, tmp_path):
    model = POOLS[pool]()
    before = run(model)
    model.sapt.merge(WEIGHTS)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert model.generate(input_ids=token_ids(), **options).shape == (3, 12)
    refused = [
        lambda: model.sapt.merge(WEIGHTS),
        lambda: model.sapt.fixed(WEIGHTS),
        lambda: model(input_ids=token_ids(), mixture=WEIGHTS),
        lambda: sapt_fast.unpatch(model),
    ]
    if pool == "sapt_llama":
        refused.append(lambda: model.sapt.add_task("late"))
        refused.append(lambda: model.sapt.save_pretrained(tmp_path))
    else:
        refused.append(lambda: model.merge_adapter())
        refused.append(lambda: model.unload())
        refused.append(lambda: model.merge_and_unload())
    merged = run(model)
    for call in refused:
        with pytest.raises(RuntimeError, match=r"call model\.sapt\.unmerge\(\) first"):
            call()
        assert torch.equal(run(model), merged)
    assert not any(tmp_path.iterdir())
    if pool == "peft_llama":
        with pytest.raises(RuntimeError, match="unmerge"):
            run(model, adapter_names=["a0", "a1", "a2"])
        assert torch.equal(run(model), merged)
    model.sapt.unmerge()
    assert torch.equal(run(model), before)


def test_export_of_each_task_and_of_the_mixture_is_the_merged_model(tmp_path):
    from peft import PeftModel

    model = patched("llama")
    for k, name in enumerate(model.sapt.tasks):
        alone = torch.eye(3)[k]
        model.sapt.export_adapter(alone, tmp_path / name)
        model.sapt.merge(alone)
        static = PeftModel.from_pretrained(tiny("llama"), tmp_path / name)
        torch.testing.assert_close(run(static), run(model), rtol=1e-5, atol=1e-5)
        model.sapt.unmerge()


BAD = [
    torch.tensor([1.0, 2.0]),
    torch.tensor([1.0, float("nan"), 0.0]),
    torch.ones(1, 3),
    torch.tensor([1, 0, 0]),
]


@pytest.mark.parametrize("pool", ["sapt_llama", "peft_llama"])
def test_bad_weights_change_nothing(pool):
    model = POOLS[pool]()
    with model.sapt.fixed(WEIGHTS):
        before = run(model)
    for weights in BAD:
        with pytest.raises(ValueError, match="weights: got"):
            model.sapt.merge(weights)
        with model.sapt.fixed(WEIGHTS):
            assert torch.equal(run(model), before)


def test_weights_that_cannot_be_merged():
    quantised = peft_pool()
    last = quantised.get_submodule(quantised.sapt.report.patched[-1]).base_layer
    own = last.weight
    first = quantised.get_submodule(quantised.sapt.report.patched[0]).base_layer.weight.clone()
    for weight, match in [
        (torch.nn.Parameter(own.to(torch.int8), requires_grad=False), "quantised or sharded"),
        (torch.nn.Parameter(own[:0]), "not completely in memory"),
        (torch.nn.Parameter(own.to("meta")), "not completely in memory"),
    ]:
        last.weight = weight
        with pytest.raises(ValueError, match=match):
            quantised.sapt.merge(WEIGHTS)
        now = quantised.get_submodule(quantised.sapt.report.patched[0]).base_layer.weight
        assert torch.equal(now, first), "a layer was merged before the error"
    last.weight = own
    for tied in (own, torch.nn.Parameter(own.data, requires_grad=False)):
        quantised.get_base_model().model.layers[0].mlp.tied = tied
        with pytest.raises(ValueError, match="the weight is shared"):
            quantised.sapt.merge(WEIGHTS)


def test_adapters_that_peft_has_merged_or_that_cannot_be_mixed():
    model = peft_pool()
    model.merge_adapter(["a1"])
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        model.sapt.merge(WEIGHTS)
    model.unmerge_adapter()
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"nothing is merged, because .* variants"):
        model.sapt.merge(torch.ones(4))


def test_adapters_that_would_act_while_merged():
    model = peft_pool()
    before = run(model)
    model.sapt.merge(WEIGHTS)
    merged = run(model)
    model.add_adapter("more", LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    model.set_adapter("more")
    assert torch.equal(run(model), merged)  # a linear layer's, of which nothing is computed
    late = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.up_proj.weight"],
        init_lora_weights=False,
    )
    model.add_adapter("late", late)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"up_proj: .* while a mixture is merged"):
            run(model)
    model.delete_adapter("late")
    assert torch.equal(run(model), merged)
    model.add_adapter("late", late)
    model.sapt.unmerge()
    model.base_model.set_adapter(["a0", "a1", "a2"])
    torch.testing.assert_close(run(model), before)


def test_prompts_cannot_be_merged():
    model = sapt_fast.patch(tiny("t5"), sapt_fast.SaptConfig(adapter="prompt"))
    model.sapt.add_task("only")
    with pytest.raises(ValueError, match="not available for prompts"):
        model.sapt.merge(torch.ones(1))


def test_another_dtype_when_unmerging():
    model = patched("llama")
    model.sapt.merge(WEIGHTS)
    merged = run(model)
    model.double()
    with pytest.raises(ValueError, match="convert the model back"):
        model.sapt.unmerge()
    model.float()
    torch.testing.assert_close(run(model), merged)
    model.sapt.unmerge()
