"""Every way of generating with a patched model, against one merged model per sample."""

import copy

import pytest
import torch
from tiny_models import oracle, patched, tiny, token_ids
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from sapt_fast import routing
from sapt_fast.routing import Routing

NEW = 8
GREEDY = {"do_sample": False}
BEAMS = {"do_sample": False, "num_beams": 4}
FOLLOWED = ("do_sample", "num_beams", "num_return_sequences")  # options the oracle also gets


class Setting:
    """A patched model, its oracle, a batch of prompts of unequal length and their weights."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model = patched(family)
        self.oracle = oracle(self.model, family)
        self.encodes = self.model.config.is_encoder_decoder
        ids = token_ids()
        lengths = (9, 6, 7)
        self.prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        self.ids, self.mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            where = slice(None, len(prompt)) if self.encodes else slice(-len(prompt), None)
            self.ids[row, where], self.mask[row, where] = prompt, 1
        with torch.no_grad():
            self.weights = torch.cat([self.model.sapt.route(p[None]) for p in self.prompts])

    def expected(self, row: int, **options) -> Tensor:
        """[returned, length], what the row's own model generates."""
        options = {k: v for k, v in options.items() if k in FOLLOWED}
        prompt = self.prompts[row][None]
        merged = self.oracle.merged(self.weights[row])
        tokens = merged.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, **options
        )
        return tokens if self.encodes else tokens[:, prompt.shape[1] :]

    def generated(self, rows: int, **options) -> Tensor:
        """[rows, returned, length]"""
        inputs = {"input_ids": self.ids[:rows], "attention_mask": self.mask[:rows], **options}
        tokens = self.model.generate(**inputs, max_new_tokens=NEW)
        tokens = tokens if self.encodes else tokens[:, self.ids.shape[1] :]
        return tokens.view(rows, -1, tokens.shape[1])

    def check(self, rows: int = 3, **options) -> None:
        got = self.generated(rows, **options)
        for row in range(rows):
            expected = self.expected(row, **options)
            length = expected.shape[1]
            assert got[row, :, :length].tolist() == expected.tolist(), f"row {row}"
            assert not got[row, :, length:].any(), f"row {row} goes on after its end"


_SETTINGS: dict[str, Setting] = {}


@pytest.fixture
def setting(request) -> Setting:
    """One `Setting` per family, made once."""
    if request.param not in _SETTINGS:
        _SETTINGS[request.param] = Setting(request.param)
    return _SETTINGS[request.param]


def on(*families: str):
    return pytest.mark.parametrize("setting", families, indirect=True)


MODES = {
    "greedy": GREEDY,
    "beams": BEAMS,
    "several_returned": {**BEAMS, "num_return_sequences": 3},
    "static_cache": {**GREEDY, "cache_implementation": "static"},
    "static_cache_beams": {**BEAMS, "cache_implementation": "static"},
    "no_cache": {**GREEDY, "use_cache": False},
    "no_cache_beams": {**BEAMS, "use_cache": False},
}


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
    """generate() compiles the decoding step; further prompts run in the same graphs."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # not on accelerators alone
    torch._dynamo.reset()  # what other tests compiled
    counters["stats"].clear()
    graphs = []
    for ids in (setting.ids, token_ids(seed=4), token_ids(seed=5)):
        options = {"input_ids": ids, "attention_mask": None, **GREEDY}
        got = setting.generated(3, **options, cache_implementation="static", compile_config=config)
        assert got.tolist() == setting.generated(3, **options).tolist()
        graphs.append(counters["stats"]["unique_graphs"])
    # The second prompt may show dynamo what is dynamic, the third nothing new.
    assert graphs[2] == graphs[1] > 0
    assert graphs[1] - graphs[0] <= 1


@on("t5", "llama")
@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2}], ids=["one", "two_returned"])
def test_sampling_draws_from_the_merged_model(setting, options):
    torch.manual_seed(5)
    out = setting.model.generate(
        setting.ids, attention_mask=setting.mask, max_new_tokens=NEW, do_sample=True,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    logits = torch.stack(out.logits, 1)  # [rows * returned, steps, vocabulary]
    copies, steps = logits.shape[0] // 3, logits.shape[1]
    for i, (tokens, drawn_from) in enumerate(zip(out.sequences, logits, strict=True)):
        merged = setting.oracle.merged(setting.weights[i // copies])
        prompt = setting.prompts[i // copies]
        with torch.no_grad():
            if setting.encodes:
                expected = merged(prompt[None], decoder_input_ids=tokens[None, :steps]).logits[0]
            else:
                whole = torch.cat([prompt, tokens[setting.ids.shape[1] :]])
                expected = merged(whole[None]).logits[0, len(prompt) - 1 : len(prompt) - 1 + steps]
        alive = (tokens[-steps:] != 0).sum()  # what follows the end token is padding
        torch.testing.assert_close(drawn_from[:alive], expected[:alive], atol=1e-4, rtol=1e-4)


@on("t5")
@pytest.mark.parametrize("mode", ["greedy", "beams", "several_returned"])
def test_encoder_outputs_by_hand(setting, mode):
    with torch.no_grad():
        outputs = setting.model.get_encoder()(setting.ids, attention_mask=setting.mask)
        setting.model.sapt.routing.weights = None  # they must come from the outputs
    setting.check(**MODES[mode], encoder_outputs=outputs)


@on("t5")
def test_encoder_outputs_of_two_batches_do_not_mix(setting):
    model, other = setting.model, token_ids(seed=3)
    labels = token_ids(length=4)
    with torch.no_grad():
        expected = model(setting.ids, labels=labels).logits
        first = model.get_encoder()(setting.ids)
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
    first = model.generate(setting.ids[:1], max_new_tokens=3, past_key_values=cache, **GREEDY)
    weights = model.sapt.route(setting.ids[:1])
    whole = torch.cat([first, token_ids(batch=1, length=4, seed=8)], 1)
    assert (model.sapt.route(whole) - weights).abs().max() > 1e-3
    got = model.generate(whole, max_new_tokens=NEW, past_key_values=cache, **GREEDY)
    merged = setting.oracle.merged(weights[0])
    assert got.tolist() == merged.generate(whole, max_new_tokens=NEW, **GREEDY).tolist()


@on("llama")
def test_a_cache_of_another_batch_is_refused(setting):
    cache = setting.model(setting.ids[:2], use_cache=True).past_key_values
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
    model, ids = setting.model, setting.ids
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
    embeds = setting.model.get_input_embeddings()(setting.ids)
    tokens = setting.model.generate(
        inputs_embeds=embeds, attention_mask=setting.mask, max_new_tokens=NEW, **BEAMS
    )
    assert tokens.tolist() == setting.generated(3, **BEAMS)[:, 0].tolist()


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


def _repeated(weights: Tensor, rows: int) -> Tensor:
    return weights.repeat(rows // weights.shape[0], 1)


@on("llama", "gpt2")
@pytest.mark.parametrize("mode", ["beams", "several_returned", "no_cache_beams"])
def test_wrong_order_of_beams_is_noticed(setting, mode, monkeypatch):
    monkeypatch.setattr(routing, "_for_rows", lambda w, rows, _: _repeated(w, rows))
    with pytest.raises(AssertionError, match="row"):
        setting.check(**MODES[mode])
    setting.check(**GREEDY)  # one row per sample: the same either way


@on("t5")
@pytest.mark.parametrize("mode", ["beams", "several_returned"])
def test_wrong_order_of_beams_is_noticed_in_encoder_outputs(setting, mode, monkeypatch):
    own = Routing._from_encoder_outputs

    def wrong(self, outputs):
        weights = own(self, outputs)
        return _repeated(weights[:: weights.shape[0] // 3], weights.shape[0])

    monkeypatch.setattr(Routing, "_from_encoder_outputs", wrong)
    with pytest.raises(AssertionError, match="row"):
        setting.check(**MODES[mode])
    setting.check(**GREEDY)


# --- what cannot work ---


@on("t5", "llama")
def test_data_parallel_raises(setting):
    model = copy.deepcopy(setting.model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(input_ids=setting.ids)


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
    outputs = setting.model.get_encoder()(setting.ids)
    hidden = outputs.last_hidden_state
    outputs = (hidden,) if kind == "tuple" else BaseModelOutput(last_hidden_state=hidden)
    with pytest.raises(RuntimeError, match=r"encoder_outputs: got .* without routing_weights"):
        setting.model(encoder_outputs=outputs, labels=setting.ids)
    with setting.model.sapt.fixed(setting.weights):
        setting.model(encoder_outputs=outputs, labels=setting.ids)


@on("llama")
def test_a_batch_that_the_weights_do_not_divide_raises(setting):
    with (
        setting.model.sapt.fixed(setting.weights[:2]),
        pytest.raises(RuntimeError, match="2 samples"),
    ):
        setting.model(setting.ids)
