"""Every way of generating with a model that mixes prompts, against the bare model, one sample at a
time, given the mixed prompt as embeddings."""

import copy

import pytest
import torch
from generation_cases import GREEDY, MODES, NEW, Setting, made_once, on, repeated
from tiny_models import patched, tiny, token_ids
from tiny_prompts import LENGTH, prompt_oracle, prompted
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from sapt_fast.routing import hooks
from sapt_fast.sites import embeddings, prompt_generation


class Prompts(Setting):
    """Of a model that mixes prompts."""

    last_fill = 1  # beams are filled up with the end token, since the pad token is 0

    def __init__(self, family: str) -> None:
        super().__init__(family, prompted(family))
        self.oracle = prompt_oracle(self.model, family)

    def alone(self, text: Tensor, weights: Tensor, **options) -> Tensor:
        return self.oracle.generate(text, weights, **options)

    def logits(self, text: Tensor, weights: Tensor, decoder_ids: Tensor | None = None) -> Tensor:
        return self.oracle.logits(text, weights, decoder_ids)


setting = made_once(Prompts)


@on("t5", "llama")
@pytest.mark.parametrize("mode", MODES)
def test_matches_the_bare_model_of_each_sample(setting, mode):
    setting.check(**MODES[mode])


@on("t5_narrow", "bart", "qwen2", "mistral", "gemma", "gpt2")
@pytest.mark.parametrize("mode", ["greedy", "beams", "static_cache"])
def test_other_families(setting, mode):
    setting.check(**MODES[mode])


@on("t5", "llama")
def test_prompts_decide_what_is_generated(setting):
    """Else every other test here could pass without them."""
    turned = setting.weights.roll(1, 0)
    with setting.model.sapt.fixed(turned):
        got = setting.generated(**GREEDY)
    for row in range(3):
        options = {"max_new_tokens": NEW, **GREEDY}
        expected = setting.oracle.generate(setting.batch.texts[row], turned[row], **options)
        assert got[row, 0, : expected.shape[1]].tolist() == expected[0].tolist()
    assert got.tolist() != setting.generated(**GREEDY).tolist()


@on("t5", "llama", "gpt2")
def test_prompt_lookup_decoding(setting):
    setting.check(rows=1, **GREEDY, prompt_lookup_num_tokens=3)


@on("t5", "llama", "gpt2")
def test_assisted_decoding(setting):
    setting.check(rows=1, **GREEDY, assistant_model=tiny(setting.family, seed=1))


@on("llama")
def test_assisted_decoding_by_an_assistant_with_adapters(setting):
    setting.check(rows=1, **GREEDY, assistant_model=patched("llama", seed=1))


@on("t5")
def test_assisted_decoding_by_an_assistant_with_prompts(setting):
    setting.check(rows=1, **GREEDY, assistant_model=prompted("t5", seed=1))


@on("llama", "gpt2")
@pytest.mark.parametrize("mode", ["greedy", "beams", "static_cache"])
def test_chunked_prefill(setting, mode):
    setting.check(**MODES[mode], prefill_chunk_size=4)


@on("t5", "llama")
def test_compiled_static_cache(setting):
    setting.check_compiled()


@on("t5", "llama")
@pytest.mark.parametrize("copies", [1, 2])
def test_sampling_draws_from_the_mixed_model(setting, copies):
    setting.check_sampling(copies)


@on("t5", "bart")
@pytest.mark.parametrize("mode", ["greedy", "beams", "several_returned"])
def test_encoder_outputs_by_hand(setting, mode):
    with torch.no_grad():
        outputs = setting.model.get_encoder()(setting.batch.ids, attention_mask=setting.batch.mask)
    assert outputs.last_hidden_state.shape[1] == LENGTH + 9
    setting.check(**MODES[mode], encoder_outputs=outputs)


@on("t5")
def test_encoder_outputs_keep_their_prompt(setting):
    """Weights that are fixed later cannot change it, and `attention` says which are in."""
    batch, labels = setting.batch, token_ids(length=4)
    with torch.no_grad():
        expected = setting.model(batch.ids, attention_mask=batch.mask, labels=labels).logits
        outputs = setting.model.get_encoder()(batch.ids, attention_mask=batch.mask)
        given = {"encoder_outputs": outputs, "attention_mask": batch.mask, "labels": labels}
        with setting.model.sapt.fixed(setting.weights.roll(1, 0)):
            got = setting.model(**given).logits
    assert torch.equal(got, expected)
    torch.testing.assert_close(setting.model.sapt.attention, setting.weights)
    with pytest.raises(ValueError, match="mixture: got weights and a BaseModelOutput"):
        setting.model(**given, mixture=setting.weights)


@on("llama", "gpt2")
@pytest.mark.parametrize("chunks", [(9,), (4, 5), (1, 7, 1)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_by_hand(setting, chunks, padded):
    """In turns with another text; masks are as long as the tokens."""
    model, batch, new = setting.model, setting.batch, token_ids(length=4, seed=4)
    ids = batch.ids if padded else token_ids()
    mask = batch.mask if padded else torch.ones_like(ids)
    with torch.no_grad():
        # Which weights the first chunk alone gives, is the router's affair.
        weights = model.sapt.route(ids, mask)
        expected = []
        for row in range(3):
            text = torch.cat([ids[row][mask[row] > 0], new[row]])[None]
            expected.append(setting.oracle.logits(text, weights[row])[-4:])
        cache, start = None, 0
        for size in chunks:
            end = start + size
            given = {"attention_mask": mask[:, :end]} if padded else {}
            with model.sapt.fixed(weights):
                out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **given)
            cache, start = copy.deepcopy(out.past_key_values), end
            model(token_ids(seed=5))
        assert cache.get_seq_length() == LENGTH + 9
        for step in range(4):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            given = {"attention_mask": mask} if padded else {}
            out = model(new[:, step : step + 1], past_key_values=cache, **given)
            torch.testing.assert_close(
                out.logits[:, 0], torch.stack(expected)[:, step], atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(model.sapt.attention, weights)
            model(token_ids(seed=6))


@on("llama")
@torch.no_grad()
def test_a_text_keeps_the_prompt_it_began_with(setting):
    cache = setting.model(setting.batch.ids, use_cache=True).past_key_values
    began, token = setting.model.sapt.attention, token_ids(length=1)
    expected = setting.model(token, past_key_values=copy.deepcopy(cache)).logits
    with setting.model.sapt.fixed(began.roll(1, 0)):
        got = setting.model(token, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="mixture: got weights and a DynamicCache that contains"):
        setting.model(token, past_key_values=cache, mixture=began)


@on("llama")
@pytest.mark.parametrize("masked", [False, True])
def test_a_second_turn(setting, masked):
    """The earlier tokens, which the input repeats, are told from the prompt's positions."""
    model, batch = setting.model, setting.batch
    cache = DynamicCache(config=model.config)
    weights = model.sapt.route(batch.texts[0])[0]
    first = model.generate(batch.texts[0], max_new_tokens=3, past_key_values=cache, **GREEDY)
    whole = torch.cat([first, token_ids(batch=1, length=4, seed=8)], 1)
    options = {"attention_mask": torch.ones_like(whole)} if masked else {}
    got = model.generate(whole, max_new_tokens=NEW, past_key_values=cache, **GREEDY, **options)
    expected = setting.oracle.generate(whole, weights, max_new_tokens=NEW, **GREEDY)
    assert got[:, whole.shape[1] :].tolist() == expected.tolist()
    with pytest.raises(ValueError, match="expected none with inputs_embeds or prefill_chunk_size"):
        model.generate(got, past_key_values=cache, prefill_chunk_size=2, max_new_tokens=2)


@on("llama")
def test_a_static_cache_is_used_again_after_a_reset(setting):
    model, batch = setting.model, setting.batch
    cache = StaticCache(config=model.config, max_cache_len=9 + NEW + LENGTH)
    other = {"input_ids": token_ids(seed=5), "attention_mask": None}
    setting.generated(**other, **GREEDY, past_key_values=cache)
    cache.reset()
    setting.check(**GREEDY, past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        got = model(batch.ids, attention_mask=batch.mask, past_key_values=cache).logits
        expected = model(batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(got[:, -1], expected[:, -1])


@on("llama")
def test_a_cache_of_another_model_is_refused(setting):
    ids = token_ids()
    cache = tiny("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="past_key_values"):
        setting.model(ids[:, :1], past_key_values=cache)
    with (
        setting.model.sapt.fixed(setting.weights),
        pytest.raises(RuntimeError, match="past_key_values"),
    ):
        setting.model(ids[:, :1], past_key_values=cache)


@on("llama", "t5")
def test_inputs_embeds(setting):
    setting.check_inputs_embeds()


# --- negative controls: a wrong match of rows to samples must show ---


@on("llama", "gpt2")
@pytest.mark.parametrize("mode", ["beams", "several_returned", "no_cache_beams"])
def test_wrong_order_of_beams_is_noticed(setting, mode, monkeypatch):
    monkeypatch.setattr(hooks, "for_rows", lambda w, rows, _: repeated(w, rows))
    with pytest.raises(AssertionError, match="row"):
        # As many beams as samples: the first beam of each, from which all go on, is a wrong one.
        setting.check(**{**MODES[mode], "num_beams": 3})
    setting.check(**GREEDY)  # one row per sample: the same either way


@on("llama", "gpt2", "t5")
def test_a_mask_that_leaves_the_prompt_out_is_noticed(setting, monkeypatch):
    own = embeddings.extended_mask

    def wrong(mask, length):
        extended = own(mask, length)
        extended[:, :length] = 0
        return extended

    for module in (embeddings, prompt_generation):
        monkeypatch.setattr(module, "extended_mask", wrong)
    with pytest.raises(AssertionError, match="row"):
        setting.check(**GREEDY)


@on("gpt2")
def test_positions_that_leave_the_prompt_out_are_noticed(setting, monkeypatch):
    own = embeddings.moved_positions
    monkeypatch.setattr(
        embeddings, "moved_positions", lambda given, *rest: own(given - LENGTH, *rest)
    )
    with pytest.raises(AssertionError, match="row"):
        setting.check(**GREEDY)


# --- what cannot work ---


def test_drafting_with_prompts_is_refused():
    """By a model of its own: transformers drafts with fewer layers, and an error leaves it so."""
    ids, model = token_ids(batch=1), prompted("llama")
    with pytest.raises(RuntimeError, match="cannot draft"):
        tiny("llama").generate(ids, assistant_model=model, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="by early exit"):
        model.generate(ids, assistant_early_exit=1, max_new_tokens=4)


@on("llama")
def test_continuous_batching_raises(setting):
    with pytest.raises(RuntimeError, match="continuous batching"):
        setting.model.generate_batch()


@on("t5")
@pytest.mark.parametrize("kind", ["tuple", "without_prompt"])
def test_encoder_outputs_without_a_prompt_raise(setting, kind):
    hidden = tiny("t5").get_encoder()(setting.batch.ids).last_hidden_state
    outputs = (hidden,) if kind == "tuple" else BaseModelOutput(last_hidden_state=hidden)
    for weights in (None, setting.weights):
        with pytest.raises(RuntimeError, match=r"encoder_outputs: got .* without routing_weights"):
            setting.model(encoder_outputs=outputs, labels=setting.batch.ids, mixture=weights)
