"""X-LoRA generation with caches: PEFT's tokens, logits and scalings, or PEFT's own way."""

import copy
import inspect
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, XLoraConfig, get_peft_model
from tiny_models import VOCABULARY, WIDTH, token_ids
from transformers import GenerationConfig, GenerationMixin

import sapt_fast
from sapt_fast.methods.peft.xlora_generation import _CAUSAL_MODELS, PairedCache

EXPERTS = 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "use_cache": False,
}
OWN_SIZES = {
    # windows shorter than the texts
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "phi": {"partial_rotary_factor": 0.5},
}


def base(family="llama", **changed):
    sizes = {**SIZES, **OWN_SIZES.get(family, {}), **changed}
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(family, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Folders of LoRA experts for a family, made once."""
    made = {}

    def folders(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            for k in range(EXPERTS):
                config = LoraConfig(r=2 + k, target_modules=["q_proj", "v_proj"])
                model = get_peft_model(base(family), config)
                generator = torch.Generator().manual_seed(k)
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if "lora_" in name:
                            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
                model.save_pretrained(made[family] / str(k))
        return {str(k): str(made[family] / str(k)) for k in range(EXPERTS)}

    return folders


def pair(experts, family="llama", settings=None, **changed):
    """PEFT's model and a patched one with the same numbers."""
    models = []
    for _ in range(2):
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=WIDTH,
            adapters=experts(family),
            xlora_depth=2,
            xlora_size=16,
            **(settings or {}),
        )
        model = base(family, **changed)
        torch.manual_seed(6)
        model = get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for p in model.base_model.internal_xlora_classifier.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.8)  # tokens differ much
        models.append(model)
    sapt_fast.patch(models[1])
    return models


def padded():
    ids = token_ids(batch=3, length=7)
    mask = torch.ones_like(ids)
    for row, length in enumerate((0, 3, 1)):
        ids[row, :length], mask[row, :length] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def steps(model):
    """The number of tokens of each forward of the base model, whose hooks all passes meet."""
    lengths = []
    inner = model.get_base_model().get_decoder()
    inner.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def generated(model, **options):
    torch.manual_seed(12)
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    return model.generate(**padded(), output_logits=True, return_dict_in_generate=True, **options)


def assert_same(models, **options):
    expected, got = (generated(model, **options) for model in models)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == len(expected.logits) > 1
    for ours, pefts in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, pefts, rtol=1e-4, atol=1e-4)
    scalings = [model.base_model.get_latest_scalings() for model in models]
    seen = padded()["attention_mask"].bool()
    rows = scalings[0].shape[0] // seen.shape[0]
    seen = torch.nn.functional.pad(seen, (0, scalings[0].shape[1] - 7), value=True)
    seen = seen.repeat_interleave(rows, 0)
    assert scalings[1].shape == scalings[0].shape
    torch.testing.assert_close(scalings[1][seen], scalings[0][seen], rtol=1e-4, atol=1e-4)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0},
    "beams_sampled": {"do_sample": True, "num_beams": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_generate(experts, mode):
    models = pair(experts)
    lengths = steps(models[1])
    assert_same(models, **MODES[mode])
    assert lengths[:2] == [7, 7]
    assert set(lengths[2:]) == {1}


@pytest.mark.parametrize(
    "settings",
    [
        {"layerwise_scalings": True},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        {"scaling_pass_value": 0.5, "global_scaling_weight": 1.5, "softmax_temperature": 0.5},
        {"use_trainable_adapters": True},
    ],
    ids=str,
)
def test_settings_of_x_lora(experts, settings):
    models = pair(experts, settings=settings)
    lengths = steps(models[1])
    assert_same(models, num_beams=2)
    assert set(lengths[2:]) == {1}


@pytest.mark.parametrize("family", _CAUSAL_MODELS)
def test_families(experts, family):
    models = pair(experts, family)
    lengths = steps(models[1])
    assert_same(models)
    assert set(lengths[2:]) == {1}


MOVING = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
UNCACHED = {
    "moving rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {},
    ),
    "not causal": ({"is_causal": False}, {}),
    "use_cache": ({}, {"use_cache": False}),
    "hidden states": ({}, {"output_hidden_states": True}),
}


@pytest.mark.parametrize("case", UNCACHED)
def test_what_is_left_to_peft(experts, case, caplog):
    changed, options = UNCACHED[case]
    models = pair(experts, **changed)
    assert bool(models[1].sapt.report.notes) == bool(changed)
    lengths = steps(models[1])
    for _ in range(2):
        assert torch.equal(*(generated(m, **options).sequences for m in models))
    assert not {1} & set(lengths[:4])
    assert sum("without a cache" in record.message for record in caplog.records) == 1


def test_settings_that_are_given_by_position(experts):
    ours = pair(experts)[1].sapt.generation
    ids, config = padded()["input_ids"], GenerationConfig(prompt_lookup_num_tokens=2)
    assert ours._call_obstacle((ids, config), {}) == "prompt_lookup_num_tokens was given"
    assert ours._call_obstacle((ids, GenerationConfig()), {}) is None
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    values = [object() if name == "assistant_model" else None for name in names]
    count = names.index("assistant_model") + 1
    assert ours._call_obstacle((ids, *values[1:count]), {}) == "assistant_model was given"


def test_training_mode_disabled_adapters_and_logging(experts):
    peft, ours = models = pair(experts)
    ours.train()
    lengths = steps(ours)
    generated(ours)
    assert lengths[2:4] == [8, 8]
    ours.eval()
    with peft.disable_adapter(), ours.disable_adapter():
        assert torch.equal(*(generated(m).sequences for m in models))
    for model in models:
        model.base_model.enable_scalings_logging()
        generated(model)
    logs = [model.base_model.get_scalings_log() for model in models]
    assert [s.shape for s in logs[0]] == [s.shape for s in logs[1]]


def test_ambiguous_top_k_of_the_scaling_pass(experts):
    models = pair(experts, settings={"scaling_pass_value": 0.5, "top_k_lora": 1})
    assert torch.equal(*(generated(m).sequences for m in models))
    lengths = steps(models[1])
    generated(models[1])
    assert lengths[2] == 8


def test_a_forward_after_generation_and_unpatch(experts):
    peft, ours = pair(experts)
    ids = token_ids()
    generated(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, peft(input_ids=ids).logits)
    before = generated(peft).sequences
    sapt_fast.unpatch(ours)
    assert "generate" not in vars(ours)
    assert not {"generate", "_enable_peft_forward_hooks"} & set(vars(ours.base_model))
    lengths = steps(ours)
    assert torch.equal(generated(ours).sequences, before)
    assert lengths[2] == 8


def test_a_config_that_changes_after_patch(experts):
    models = pair(experts)
    assert models[1].sapt.generation.obstacle is None
    for model in models:
        model.get_base_model().config.is_causal = False
    lengths = steps(models[1])
    assert torch.equal(*(generated(m).sequences for m in models))
    assert lengths[2] == 8


def test_a_second_turn(experts):
    """PEFT returns no cache, so what it returned can be passed on."""
    turns = []
    for model in pair(experts):
        first = generated(model)
        text = torch.cat([first.sequences, token_ids(length=3, seed=4)], 1)
        cache = first.past_key_values
        turns.append(
            model.generate(
                text, past_key_values=cache, attention_mask=torch.ones_like(text), max_new_tokens=4
            )
        )
        assert "past_key_values" not in first
        assert len(first.logits) == 5
    assert torch.equal(*turns)


def test_scalings_while_it_runs_are_those_of_the_newest_tokens(experts):
    _, ours = pair(experts)
    shapes = []

    class Looks(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            shapes.append(ours.base_model.get_latest_scalings().shape[:2])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ours.generate(**padded(), stopping_criteria=[Looks()], max_new_tokens=3, do_sample=False)
    assert shapes == [(3, 7), (3, 1), (3, 1)]
    assert ours.base_model.get_latest_scalings().shape[:2] == (3, 9)


@pytest.mark.parametrize("cached", [True, False])
def test_a_generate_inside_a_generate(experts, cached):
    models = pair(experts)
    inner = []

    class Asks(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            options = {} if cached else {"use_cache": False}
            inner.append(model.generate(input_ids, max_new_tokens=2, do_sample=False, **options))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    outer = []
    for model in models:
        outer.append(
            model.generate(
                **padded(), stopping_criteria=[Asks()], max_new_tokens=4, do_sample=False
            )
        )
    assert torch.equal(*outer)
    assert all(map(torch.equal, inner[:4], inner[4:]))


ERRORS = {
    "layer": lambda model: model.get_base_model().model.layers[1].self_attn.q_proj.base_layer,
    "classifier": lambda model: model.base_model.internal_xlora_classifier,
    "head": lambda model: model.get_base_model().lm_head,
}


def left(model):
    """What a forward or `generate` could leave in a model."""
    xlora, layers = model.base_model, list(model.modules())
    return {
        "hooks": [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in layers],
        "disabled": [getattr(m, "_disable_adapters", None) for m in layers] + [xlora.disabled],
        "training": [m.training for m in layers],
        "trainable": [p.requires_grad for p in model.parameters()],
        "use_cache": model.get_base_model().config.use_cache,
        "running": dict(vars(model.sapt.generation.running)) if hasattr(model, "sapt") else {},
    }


@pytest.mark.parametrize("call", ["forward", "generate", "generate without a cache"])
@pytest.mark.parametrize("where", ERRORS)
def test_an_error_inside_leaves_what_peft_leaves(experts, where, call):
    """In the scaling pass, between the passes, in the mixed pass, and later in a generation."""
    ids, models = token_ids(), pair(experts)
    generates = {"max_new_tokens": 3, "do_sample": False}
    options = {
        "forward": {},
        "generate": generates,
        "generate without a cache": {**generates, "use_cache": False},
    }[call]
    with torch.no_grad():
        expected = [(m(ids).logits, m.generate(ids, **generates)) for m in models]
    raised = []
    for count in range(1, 5):
        scalings = []
        for model, (logits, tokens) in zip(models, expected, strict=True):
            before, calls = left(model), []

            def broken(*_, calls=calls, count=count):
                calls.append(1)
                if len(calls) == count:
                    raise KeyboardInterrupt

            model.base_model.internal_xlora_scalings = None
            hook = ERRORS[where](model).register_forward_pre_hook(broken)
            run = model.forward if call == "forward" else model.generate
            try:
                run(input_ids=ids, **options)
            except KeyboardInterrupt:
                raised.append(count)
            hook.remove()
            assert left(model) == before
            latest = model.base_model.get_latest_scalings()
            scalings.append(torch.zeros(0) if latest is None else latest)
            with torch.no_grad():
                assert torch.equal(model(ids).logits, logits)
            assert torch.equal(model.generate(ids, **generates), tokens)
        torch.testing.assert_close(*scalings, rtol=1e-4, atol=1e-4)
    passes = 1 if where == "classifier" else 2
    expected_errors = passes if call == "forward" else min(3 * passes, 4)
    assert raised == [count for count in range(1, expected_errors + 1) for _ in models]


def test_the_model_called_inside_its_own_generate(experts):
    _, ours = pair(experts)

    class Asks(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return ours(input_ids=input_ids).logits[:, -1]

    with pytest.raises(RuntimeError, match="inside its own generate"):
        ours.generate(**padded(), logits_processor=[Asks()], max_new_tokens=2)


def test_threads_and_copies(experts):
    _, ours = pair(experts)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in other.base_model.internal_xlora_classifier.parameters():
            p.neg_()
    ids = [token_ids(seed=seed) for seed in range(4)]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = [ours.generate(input_ids=i, **options) for i in ids]
    assert any(
        not torch.equal(other.generate(input_ids=i, **options), e)
        for i, e in zip(ids, expected, strict=True)
    )
    got = [None] * len(ids)

    def work(k):
        got[k] = ours.generate(input_ids=ids[k], **options)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_beams_need_both_caches_reordered(experts, monkeypatch):
    """Without it the tokens must differ, or the tests above would see nothing."""
    models = pair(experts)
    monkeypatch.setattr(
        PairedCache,
        "reorder_cache",
        lambda self, i: transformers.DynamicCache.reorder_cache(self, i),
    )
    outputs = [generated(model, num_beams=4) for model in models]
    assert any(
        ours.shape != pefts.shape or (ours - pefts).abs().max() > 1e-2
        for ours, pefts in zip(outputs[1].logits, outputs[0].logits, strict=False)
    )
