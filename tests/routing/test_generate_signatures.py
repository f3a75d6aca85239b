"""`generate` of models whose inputs are not text, and calls of it in every form that it takes."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from tiny_models import Oracle, patched, tiny, token_ids
from tiny_peft import peft_model
from tiny_prompts import prompted
from transformers import GenerationConfig

import sapt_fast

_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
_SPEECH = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_target_positions": 40,
    "decoder_start_token_id": 2,
    **_IDS,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}


def whisper():
    config = transformers.WhisperConfig(
        **_SPEECH, num_mel_bins=8, max_source_positions=30, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def speech2text():
    config = transformers.Speech2TextConfig(
        **_SPEECH, input_feat_per_channel=8, conv_channels=16, max_source_positions=60
    )
    return transformers.Speech2TextForConditionalGeneration(config)


def vision():
    """A ViT that a GPT-2 describes."""
    decoder = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=64, **_IDS
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**_VISION), decoder
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 1
    return transformers.VisionEncoderDecoderModel(config)


def blip():
    text = {"vocab_size": 97, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
    config = transformers.BlipConfig(
        text_config={**text, "encoder_hidden_size": 32, "intermediate_size": 48,
                     "projection_dim": 16, "sep_token_id": 1, **_IDS},
        vision_config={**_VISION, "projection_dim": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )  # fmt: skip
    return transformers.BlipForConditionalGeneration(config)


# What each is given, its shape, and its linear layers.
MODELS = {
    whisper: ("input_features", (3, 8, 60), ["q_proj", "v_proj"]),
    speech2text: ("input_features", (3, 40, 8), ["q_proj", "v_proj"]),
    vision: ("pixel_values", (3, 3, 8, 8), ["q_proj", "v_proj", "c_attn"]),
}
each_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
WEIGHTS = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))


def made(build):
    torch.manual_seed(0)
    return build().eval()


def inputs_of(build):
    name, shape, _ = MODELS[build]
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def row(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


def with_weights(build, kind):
    """A model of that kind, patched, and one that gives what a sample alone must give."""
    model = patched(made(build), target_modules=MODELS[build][2])
    merged = Oracle(model, made(build))
    if kind == "peft":
        merged.peft.base_model.set_adapter(merged.tasks)
        model = sapt_fast.patch(copy.deepcopy(merged.peft))
    return model, merged


@each_model
@pytest.mark.parametrize("kind", ["sapt", "peft"])
def test_given_weights_are_those_of_merged_models(build, kind):
    model, merged = with_weights(build, kind)
    inputs, text = inputs_of(build), token_ids(3, 5)
    greedy, beams = {"max_new_tokens": 5}, {"max_new_tokens": 5, "num_beams": 3}
    with torch.no_grad():
        got = model(**inputs, decoder_input_ids=text, mixture=WEIGHTS).logits
        with model.sapt.fixed(WEIGHTS):
            assert torch.equal(model(**inputs, decoder_input_ids=text).logits, got)
            tokens = model.generate(**inputs, **greedy)
        searched = model.generate(**inputs, **beams, mixture=WEIGHTS)
        for index in range(3):
            one, own = merged.merged(WEIGHTS[index]), row(inputs, index)
            expected = one(**own, decoder_input_ids=text[index : index + 1]).logits[0]
            torch.testing.assert_close(got[index], expected, atol=1e-4, rtol=1e-4)
            for result, options in ((tokens, greedy), (searched, beams)):
                alone = one.generate(**own, **options)[0]
                assert result[index, : len(alone)].tolist() == alone.tolist()


@each_model
def test_what_cannot_be_routed_says_what_works(build):
    name, _, targets = MODELS[build]
    model, inputs = patched(made(build), target_modules=targets), inputs_of(build)
    message = rf"was given {name}.*model.sapt.fixed\(weights\).*mixture=weights"
    with pytest.raises(ValueError, match=message):
        model(**inputs, decoder_input_ids=token_ids(3, 5))
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="weights for 2 samples, but the model's input has 3"):
        model.generate(**inputs, max_new_tokens=2, mixture=WEIGHTS[:2])


def test_a_router_that_needs_text_says_so():
    model, _ = with_weights(whisper, "peft")
    model.sapt.router = torch.nn.Identity()
    model.sapt.router.forward = lambda input_ids, **_: torch.ones(input_ids.shape[0], 3)
    with pytest.raises(ValueError, match="WhisperEncoder was given input_features"):
        model.generate(**inputs_of(whisper), max_new_tokens=2)
    model.sapt.router.forward = lambda **_: WEIGHTS[:1]  # which needs none
    got = model.generate(**inputs_of(whisper), max_new_tokens=2)
    with model.sapt.fixed(WEIGHTS[0]):
        assert got.tolist() == model.generate(**inputs_of(whisper), max_new_tokens=2).tolist()


# --- the call itself ---


@pytest.mark.parametrize("build", [*MODELS, blip], ids=lambda build: build.__name__)
def test_without_tasks_generate_is_as_it_was(build):
    model = made(build)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if build is blip else inputs_of(build)
    [value] = inputs.values()
    calls = [lambda: model.generate(**inputs, max_new_tokens=3)]
    first = next(iter(inspect.signature(model.generate).parameters))
    calls.append(lambda: model.generate(**{first: value}, max_new_tokens=3))
    calls.append(lambda: model.generate(value, max_new_tokens=3))
    if build is not blip:
        calls.append(lambda: model.generate(value, GenerationConfig(max_new_tokens=3, **_IDS)))
    before, signature = [call().tolist() for call in calls], inspect.signature(model.generate)
    targets = ["query", "value", "qkv", "q_proj", "v_proj", "c_attn"]
    sapt_fast.patch(model, sapt_fast.SaptConfig(target_modules=targets))
    assert [call().tolist() for call in calls] == before
    assert inspect.signature(model.generate) == signature
    assert model.generate.__doc__ == type(model).generate.__doc__
    assert model.generate.__name__ == "generate"


CALLS = {
    "keyword": lambda m, ids, c: m.generate(input_ids=ids, generation_config=c),
    "inputs": lambda m, ids, c: m.generate(inputs=ids, generation_config=c),
    "positional": lambda m, ids, c: m.generate(ids, c),
    "none_first": lambda m, ids, c: m.generate(None, c, input_ids=ids),
    "named_none": lambda m, ids, c: m.generate(ids, generation_config=c, inputs_embeds=None),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["lora", "prompt", "encoder_decoder"])
def test_every_form_of_a_call(call, kind):
    model = {
        "lora": lambda: patched("llama"),
        "prompt": lambda: prompted("llama"),
        "encoder_decoder": lambda: patched("t5"),
    }[kind]()
    config = GenerationConfig(max_new_tokens=4, num_beams=3, use_cache=kind == "prompt", **_IDS)
    ids = token_ids()
    ids[0, :2] = 0  # padding that generate finds by its config
    if kind == "encoder_decoder":
        config.decoder_start_token_id, ids = 0, token_ids()
    expected = model.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), generation_config=config
    )
    assert CALLS[call](model, ids, config).tolist() == expected.tolist()


class Renamed(transformers.LlamaForCausalLM):
    """Generates from an argument of another name, behind others."""

    def generate(self, speaker, /, prompt=None, *, input_ids=None, config=None, **kwargs):
        assert speaker == "Ada"
        ids = prompt if input_ids is None else input_ids
        return super().generate(ids, config, **kwargs)


class Handed(transformers.LlamaForCausalLM):
    """Hands all arguments on."""

    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)


def test_methods_of_other_signatures():
    plain, config = patched("llama"), GenerationConfig(max_new_tokens=4, use_cache=False, **_IDS)
    ids = token_ids()
    expected = plain.generate(ids, config).tolist()
    torch.manual_seed(0)
    renamed = patched(Renamed(tiny("llama").config).eval())
    handed = patched(Handed(tiny("llama").config).eval())
    for model in (renamed, handed):
        model.load_state_dict(plain.state_dict())
    assert handed.generate(ids, config).tolist() == expected
    assert renamed.generate("Ada", input_ids=ids, config=config).tolist() == expected
    assert renamed.generate("Ada", None, input_ids=ids, config=config).tolist() == expected
    with pytest.raises(TypeError, match="speaker"):
        renamed.generate(input_ids=ids)


def test_copies_generate_by_themselves():
    model, ids = patched("llama"), token_ids()
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    expected = model.generate(ids, max_new_tokens=3)
    for other in (copied, pickled):
        other.sapt.routing.weights = None
        assert other.generate(ids, max_new_tokens=3).tolist() == expected.tolist()
        assert torch.equal(other.sapt.attention, model.sapt.attention)


def test_peft_hands_the_inputs_on():
    model = sapt_fast.patch(peft_model())
    ids = token_ids()
    expected = model.generate(input_ids=ids, mixture=WEIGHTS, max_new_tokens=3).tolist()
    config = GenerationConfig(max_new_tokens=3)
    assert model.generate(ids, config, mixture=WEIGHTS).tolist() == expected
    assert model.generate(inputs=ids, mixture=WEIGHTS, max_new_tokens=3).tolist() == expected


def test_text_from_nothing_keeps_the_weights_it_began_with():
    """Without a prompt the first forward routes; searching beams without a cache is no other."""
    model = patched("llama")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    cached = model.generate(**options)
    assert cached.tolist() == model.generate(**options, use_cache=False).tolist()
    assert model.sapt.routing.pinned is None


def test_a_failed_forward_leaves_a_cache_its_weights():
    model = sapt_fast.patch(peft_model())
    ids, step = token_ids(), token_ids(3, 1, seed=2)
    with torch.no_grad():
        cache = model(input_ids=ids, mixture=WEIGHTS, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="for 2 samples"):
            model(input_ids=step, past_key_values=cache, mixture=WEIGHTS[:2])
        got = model(input_ids=step, past_key_values=cache).logits
        whole = model(input_ids=torch.cat([ids, step], 1), mixture=WEIGHTS).logits[:, -1:]
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
