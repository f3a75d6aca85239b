"""Every way of generating with a patched model, against one merged model per sample."""

import copy

import pytest
import torch
from generation_cases import BEAMS, GREEDY, MODES, NEW, Setting, made_once, on, repeated
from tiny_models import oracle, patched, tiny, token_ids
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from sapt_fast.routing import hooks
from sapt_fast.routing.generation import Generation


class Adapters(Setting):
    """Of a model that mixes adapters."""

    def __init__(self, family: str) -> None:
        super().__init__(family, patched(family))
        self.oracle = oracle(self.model, family)

    def alone(self, text: Tensor, weights: Tensor, **options) -> Tensor:
        mask = torch.ones_like(text)
        tokens = self.oracle.merged(weights).generate(text, attention_mask=mask, **options)
        return tokens if self.encodes else tokens[:, text.shape[1] :]

    def logits(self, text: Tensor, weights: Tensor, decoder_ids: Tensor | None = None) -> Tensor:
        given = {"decoder_input_ids": decoder_ids} if self.encodes else {}
        return self.oracle.merged(weights)(text, **given).logits[0]


setting = made_once(Adapters)


@on("t5", "llama")
@pytest.mark.parametrize("mode", MODES)
def test_matches_the_merged_model_of_each_sample(setting, mode):
    setting.check(**MODES[mode])


@on("t5_narrow", "bart", "qwen2", "mistral", "gemma", "gpt2")
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_other_families(setting, mode):
    setting.check(**MODES[mode])


@on("t5", "llama")
def test_prompt_lookup_decoding(setting):
    setting.check(rows=1, **GREEDY, prompt_lookup_num_tokens=3)


@on("t5", "llama")
def test_assisted_decoding(setting):
    setting.check(rows=1, **GREEDY, assistant_model=tiny(setting.family, seed=1))


@on("llama")
def test_assisted_decoding_by_a_patched_assistant(setting):
    setting.check(rows=1, **GREEDY, assistant_model=patched("llama", seed=1))


@on("llama")
def test_early_exit_decoding(setting):
    setting.check(rows=1, **GREEDY, assistant_early_exit=1)


@on("llama", "gpt2")
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_chunked_prefill(setting, mode):
    setting.check(**MODES[mode], prefill_chunk_size=4)


@on("t5", "llama")
def test_compiled_static_cache(setting):
    setting.check_compiled()


class Noise(LogitsProcessor):
    """What sampling at a low temperature draws by (Gumbel), the same for every row of a step."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape[-1], generator=self.generator)
        return scores - 0.12 * uniform.log().neg().log()


@on("t5", "llama")
def test_sampling_with_equal_noise_gives_equal_answers(setting):
    """With the noise in the scores only the best token can be drawn, in a batch or alone."""
    options = {"do_sample": True, "top_k": 1}
    got = setting.generated(**options, logits_processor=[Noise()])
    with setting.model.sapt.fixed(setting.weights.roll(1, 0)):
        others = setting.generated(**options, logits_processor=[Noise()])
    for row, text in enumerate(setting.batch.texts):
        noise = {**options, "logits_processor": [Noise()], "max_new_tokens": NEW}
        expected = setting.alone(text, setting.weights[row], **noise)
        assert got[row, :, : expected.shape[1]].tolist() == expected.tolist(), f"row {row}"
        assert got[row].tolist() != others[row].tolist()  # so other weights are noticed
    assert got.tolist() != setting.generated(**GREEDY).tolist()


@on("t5", "llama")
@pytest.mark.parametrize("copies", [1, 2], ids=["one", "two_returned"])
def test_sampling_draws_from_the_merged_model(setting, copies):
    setting.check_sampling(copies)


@on("t5")
@pytest.mark.parametrize("mode", ["greedy", "beams", "several_returned"])
def test_encoder_outputs_by_hand(setting, mode):
    with torch.no_grad():
        outputs = setting.model.get_encoder()(setting.batch.ids, attention_mask=setting.batch.mask)
        setting.model.sapt.routing.weights = None  # they must come from the outputs
    setting.check(**MODES[mode], encoder_outputs=outputs)


@on("t5")
def test_encoder_outputs_of_two_batches_do_not_mix(setting):
    model, other = setting.model, token_ids(seed=3)
    labels = token_ids(length=4)
    with torch.no_grad():
        expected = model(setting.batch.ids, labels=labels).logits
        first = model.get_encoder()(setting.batch.ids)
        model.get_encoder()(other)
        assert torch.equal(model(encoder_outputs=first, labels=labels).logits, expected)


@on("llama", "gpt2")
@pytest.mark.parametrize("chunks", [(9,), (4, 5), (1, 7, 1)], ids=str)
def test_decoding_by_hand_keeps_each_caches_weights(setting, chunks):
    """Two prompts decoded in turns: a cache brings the weights of its own prompt."""
    model, ids, new = setting.model, token_ids(), token_ids(length=4, seed=4)
    with torch.no_grad():
        expected = []
        for row in range(3):
            merged = setting.oracle.merged(model.sapt.route(ids[row : row + 1, : chunks[0]])[0])
            expected.append(merged(torch.cat([ids, new], 1)[row : row + 1]).logits[0, -4:])
        cache, start = None, 0
        for size in chunks:
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = copy.deepcopy(out.past_key_values), start + size
            model(token_ids(seed=5))
        for step in range(4):
            out = model(new[:, step : step + 1], past_key_values=cache)
            torch.testing.assert_close(out.logits[:, 0], torch.stack(expected)[:, step])
            model(token_ids(seed=6))


@on("llama")
def test_a_second_turn_goes_on_with_the_weights_of_the_first(setting):
    """What the cache holds of the first turn was computed with them."""
    model, cache = setting.model, DynamicCache(config=setting.model.config)
    first = model.generate(setting.batch.ids[:1], max_new_tokens=3, past_key_values=cache, **GREEDY)
    weights = model.sapt.route(setting.batch.ids[:1])
    whole = torch.cat([first, token_ids(batch=1, length=4, seed=8)], 1)
    assert (model.sapt.route(whole) - weights).abs().max() > 1e-3
    got = model.generate(whole, max_new_tokens=NEW, past_key_values=cache, **GREEDY)
    merged = setting.oracle.merged(weights[0])
    assert got.tolist() == merged.generate(whole, max_new_tokens=NEW, **GREEDY).tolist()


@on("llama")
def test_a_cache_of_another_batch_is_refused(setting):
    cache = setting.model(setting.batch.ids[:2], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    with pytest.raises(RuntimeError, match="for 2 samples, but the model's input has 4 rows"):
        setting.model(token_ids(batch=4, length=1), past_key_values=cache)


@on("llama")
def test_a_cache_of_another_model_is_refused(setting):
    ids = token_ids()
    cache = tiny("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="past_key_values"):
        setting.model(ids[:, :1], past_key_values=cache)


@on("llama")
def test_padding_mask_is_inferred_as_generate_does(setting):
    assert (
        setting.generated(3, **BEAMS).tolist()
        == setting.generated(3, **BEAMS, attention_mask=None).tolist()
    )


@on("llama")
def test_no_padding_mask_where_the_pad_token_ends_the_text(setting):
    """Padded with the end token, generate() takes padding for text, and so does the router."""
    model, ids = setting.model, setting.batch.ids
    whole, masked = model.sapt.route(ids), setting.weights
    assert (whole - masked)[1:].abs().min(1).values.max() > 1e-3
    for options in ({"eos_token_id": 0}, {"generation_config": GenerationConfig(eos_token_id=0)}):
        model.generate(ids, max_new_tokens=1, **options)
        torch.testing.assert_close(model.sapt.attention, whole.detach())
    model.generate(ids, GenerationConfig(eos_token_id=[0, 5]), max_new_tokens=1)
    torch.testing.assert_close(model.sapt.attention, whole.detach())
    model.generate(ids, GenerationConfig(eos_token_id=5), max_new_tokens=1)
    torch.testing.assert_close(model.sapt.attention, masked)


@on("llama")
def test_inputs_embeds(setting):
    setting.check_inputs_embeds()


@on("t5", "llama")
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_fixed_weights_hold_for_the_whole_call(setting, mode):
    turned = setting.weights.roll(1, 0)
    with setting.model.sapt.fixed(turned):
        got = setting.generated(3, **MODES[mode])
    routed, setting.weights = setting.weights, turned
    try:
        for row in range(3):
            expected = setting.expected(row, **MODES[mode])
            assert got[row, :, : expected.shape[1]].tolist() == expected.tolist()
    finally:
        setting.weights = routed


def test_nothing_stays_pinned_after_a_failed_call():
    model = patched("llama")
    with pytest.raises(ValueError):
        model.generate(token_ids(), max_new_tokens=-3)
    assert model.sapt.routing.pinned is None


# --- negative controls: a wrong match of rows to samples must show ---


@on("llama", "gpt2")
@pytest.mark.parametrize("mode", ["beams", "several_returned", "no_cache_beams"])
def test_wrong_order_of_beams_is_noticed(setting, mode, monkeypatch):
    monkeypatch.setattr(hooks, "for_rows", lambda w, rows, _: repeated(w, rows))
    with pytest.raises(AssertionError, match="row"):
        setting.check(**MODES[mode])
    setting.check(**GREEDY)  # one row per sample: the same either way


@on("t5")
@pytest.mark.parametrize("mode", ["beams", "several_returned"])
def test_wrong_order_of_beams_is_noticed_in_encoder_outputs(setting, mode, monkeypatch):
    own = Generation.from_encoder_outputs

    def wrong(self, outputs):
        weights = own(self, outputs)
        return repeated(weights[:: weights.shape[0] // 3], weights.shape[0])

    monkeypatch.setattr(Generation, "from_encoder_outputs", wrong)
    with pytest.raises(AssertionError, match="row"):
        setting.check(**MODES[mode])
    setting.check(**GREEDY)


# --- what cannot work ---


@on("t5", "llama")
def test_data_parallel_raises(setting):
    model = copy.deepcopy(setting.model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(input_ids=setting.batch.ids)


@on("llama")
@pytest.mark.parametrize(
    "method", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_raises(setting, method):
    with pytest.raises(RuntimeError, match="continuous batching"):
        getattr(setting.model, method)()


@on("t5")
@pytest.mark.parametrize("kind", ["tuple", "without_weights"])
def test_encoder_outputs_without_weights_raise(setting, kind):
    outputs = setting.model.get_encoder()(setting.batch.ids)
    hidden = outputs.last_hidden_state
    outputs = (hidden,) if kind == "tuple" else BaseModelOutput(last_hidden_state=hidden)
    with pytest.raises(RuntimeError, match=r"encoder_outputs: got .* without routing_weights"):
        setting.model(encoder_outputs=outputs, labels=setting.batch.ids)
    with setting.model.sapt.fixed(setting.weights):
        setting.model(encoder_outputs=outputs, labels=setting.batch.ids)


@on("llama")
def test_a_batch_that_the_weights_do_not_divide_raises(setting):
    with (
        setting.model.sapt.fixed(setting.weights[:2]),
        pytest.raises(RuntimeError, match="2 samples"),
    ):
        setting.model(setting.batch.ids)
