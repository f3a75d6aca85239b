"""L2P, ProgPrompt and EPI by themselves generate what the bare model of each sample does, which is
given its prompts as embeddings or has its adapter merged."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from generation_cases import GREEDY, MODES, Setting, on
from tiny_models import Padded, fill, oracle, run, tiny, token_ids
from tiny_prompts import bare
from torch import Tensor

import sapt_fast
from sapt_fast.methods.epi import EpiConfig
from sapt_fast.methods.l2p import L2pConfig
from sapt_fast.methods.progprompt import ProgPromptConfig

ROWS = 3  # of a prompt
SOME = ["greedy", "beams", "several_returned", "static_cache", "static_cache_beams", "no_cache"]


def l2p(family: str):
    model = bare(family)
    torch.manual_seed(1)
    sapt_fast.patch(model, L2pConfig(prompts=6, top=2, length=ROWS))
    model.l2p.grow("all")
    return model


def progprompt(family: str):
    model = bare(family)
    torch.manual_seed(1)
    sapt_fast.patch(model, ProgPromptConfig(prompt_length=ROWS))
    for name in ("first", "second"):
        model.sapt.add_task(name)
    return model


class Prompts(Setting):
    """Of a model whose inputs begin with whole prompts."""

    last_fill = 1

    def __init__(self, family: str, make) -> None:
        model = make(family)
        self.handle = model.l2p if make is l2p else model.sapt
        with torch.no_grad():
            rows = self.handle.prompts.rows.rows()
            rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(7)))
        super().__init__(family, model)
        self.base = bare(family)
        self.prompts = rows.detach().view(-1, ROWS, rows.shape[1])

    def embeds(self, text: Tensor, places: Tensor) -> Tensor:
        prompts = self.prompts[places].flatten(0, 1)
        return torch.cat([prompts[None], self.base.get_input_embeddings()(text)], 1)

    def alone(self, text: Tensor, weights: Tensor, **options) -> Tensor:
        embeds = self.embeds(text, weights)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return self.base.generate(inputs_embeds=embeds, attention_mask=mask, **options)


class Adapters(Setting):
    """Of EPI, each of whose three tasks saw one of the texts."""

    def __init__(self, family: str) -> None:
        model = tiny(family)
        torch.manual_seed(1)
        sapt_fast.patch(model, EpiConfig(r=4, lora_alpha=8))
        for k, text in enumerate(Padded(model.config.is_encoder_decoder).texts):
            model.sapt.add_task(f"task{k}")
            model.sapt.fit([(text, torch.ones_like(text))])
        super().__init__(family, fill(model))
        self.oracle = oracle(model, family)

    def alone(self, text: Tensor, weights: Tensor, **options) -> Tensor:
        mask = torch.ones_like(text)
        tokens = self.oracle.merged(weights).generate(text, attention_mask=mask, **options)
        return tokens if self.encodes else tokens[:, text.shape[1] :]


MADE = {
    "l2p": lambda family: Prompts(family, l2p),
    "progprompt": lambda family: Prompts(family, progprompt),
    "epi": Adapters,
}
_made = cache(lambda method, family: MADE[method](family))


@pytest.fixture
def setting(request, method) -> Setting:
    """One `Setting` per method and family, made once."""
    return _made(method, request.param)


every_method = pytest.mark.parametrize("method", MADE)


@every_method
@on("t5", "llama")
@pytest.mark.parametrize("mode", SOME)
def test_matches_the_bare_model_of_each_sample(setting, mode):
    setting.check(**MODES[mode])


@every_method
@on("bart", "gpt2")
@pytest.mark.parametrize("mode", ["greedy", "static_cache"])
def test_other_families(setting, mode):
    setting.check(**MODES[mode])


@every_method
@on("t5", "llama")
def test_samples_differ_in_what_they_get(setting, method):
    """Else the tests above could pass if all rows got what the first one does."""
    different = set(map(tuple, setting.weights.tolist()))
    assert (len(different) > 1) == (method != "progprompt")
    got = setting.generated(**GREEDY)
    ids, mask = setting.batch.ids, setting.batch.mask
    base = (bare if method != "epi" else tiny)(setting.family)
    plain = base.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert got[:, 0].tolist() != plain[:, -got.shape[2] :].tolist()


@every_method
@on("t5", "llama")
def test_compiled_static_cache(setting):
    setting.check_compiled()


@every_method
@on("llama", "gpt2")
def test_decoding_by_hand(setting):
    """A prompt, then one token at a time, in turns with another text."""
    texts = setting.batch.texts[1:]
    with torch.no_grad():
        outs = [setting.model(text[:, :4]) for text in texts]  # which choose
        chosen = [out.past_key_values.routing_weights for out in outs]
        pairs = zip(texts, chosen, strict=True)
        whole = [setting.model(text[:, :6], mixture=weights).logits for text, weights in pairs]
        parts = [[out.logits] for out in outs]
        for start in range(4, 6):
            for text, out, logits in zip(texts, outs, parts, strict=True):
                cache = out.past_key_values
                step = setting.model(text[:, start : start + 1], past_key_values=cache)
                logits.append(step.logits)
    for logits, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["l2p", "progprompt"])
@on("t5", "llama")
def test_a_batch_computes_what_each_text_does(setting, method):
    batch, labels = setting.batch, token_ids(length=4)
    given = {"decoder_input_ids": labels} if setting.encodes else {}
    with torch.no_grad():
        out = setting.model(batch.ids, attention_mask=batch.mask, **given).logits
        for row, (text, where) in enumerate(zip(batch.texts, batch.where, strict=True)):
            embeds = setting.embeds(text, setting.weights[row % len(setting.weights)])
            given = {"decoder_input_ids": labels[row : row + 1]} if setting.encodes else {}
            expected = setting.base(inputs_embeds=embeds, **given).logits[0]
            got = out[row] if setting.encodes else out[row, where]
            expected = expected if setting.encodes else expected[-text.shape[1] :]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["l2p", "progprompt"])
@on("t5", "llama")
def test_places_that_a_caller_gives(setting, method):
    places = torch.tensor([[1, 0], [0, 1], [1, 1]])
    batch = setting.batch
    options = {"attention_mask": batch.mask, "max_new_tokens": 8, **GREEDY}
    got = setting.model.generate(batch.ids, mixture=places, **options)
    with setting.handle.fixed(places):
        assert setting.model.generate(batch.ids, **options).tolist() == got.tolist()
    got = got if setting.encodes else got[:, batch.ids.shape[1] :]
    for row, text in enumerate(batch.texts):
        expected = setting.alone(text, places[row], max_new_tokens=8, **GREEDY)
        assert got[row, : expected.shape[1]].tolist() == expected[0].tolist()
    one_for_all = setting.model.generate(batch.ids, mixture=places[0], **options)
    repeated = setting.model.generate(batch.ids, mixture=places[:1].expand(3, 2), **options)
    assert one_for_all.tolist() == repeated.tolist()


@pytest.mark.parametrize("method", ["l2p", "progprompt"])
@on("llama")
@pytest.mark.parametrize(
    ("places", "message"),
    [
        (torch.tensor([-1, 0]), r"got places \[-1, 0\], expected 0 to"),
        (torch.tensor([0, 6]), r"got places \[0, 6\], expected 0 to"),
        (torch.tensor([0]), r"expected the places of prompts, int64 \[2\]"),
        (torch.tensor([0.5, 0.5]), "got torch.float32"),
    ],
)
def test_places_that_there_are_not(setting, method, places, message):
    with pytest.raises(ValueError, match=message):
        setting.model(token_ids(), mixture=places)
    with pytest.raises(ValueError, match=message):
        setting.handle.fixed(places)


def test_l2p_takes_the_nearest_keys():
    setting = _made("l2p", "llama")
    table, keys = setting.base.get_input_embeddings().weight, setting.handle.prompt_keys
    for text, places in zip(setting.batch.texts, setting.weights, strict=True):
        cosines = F.cosine_similarity(table[text[0]].mean(0)[None], keys)
        assert places.tolist() == cosines.argsort(descending=True)[:2].tolist()


def test_l2p_has_one_pool():
    model = l2p("llama")
    expected = run(model, token_ids())
    model.l2p.add_task("second")
    model.l2p.grow("third")
    assert (model.l2p.tasks, len(model.l2p.prompts)) == (["all"], 1)
    assert torch.equal(run(model, token_ids()), expected)
    with pytest.raises(ValueError, match="all tasks train one pool"):
        model.l2p.restore_task("second", model.l2p.prompts.prompt(0), torch.zeros(32))


@pytest.mark.parametrize("config", [L2pConfig, ProgPromptConfig])
def test_outputs_of_modules_are_not_mixed_by_places(config):
    with pytest.raises(ValueError, match="modules_per_task: got True, expected False"):
        config(modules_to_save=["lm_head"], modules_per_task=True)


@pytest.mark.parametrize("make", [l2p, progprompt])
def test_prompts_that_are_not_mixed_are_not_exported(make, tmp_path):
    model = make("llama")
    handle = model.l2p if make is l2p else model.sapt
    with pytest.raises(ValueError, match="export_adapter: not available"):
        handle.export_adapter([1.0] * len(handle.tasks), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["prompts", "top", "length"])
@pytest.mark.parametrize("value", [0, 1.5, True, "2"])
def test_l2p_counts_are_integers(field, value):
    with pytest.raises(ValueError, match=rf"{field}: got .*, expected an integer, at least 1"):
        L2pConfig(**{field: value})
