"""Prefixes of attention layers against attention over concatenated keys and values."""

import copy

import pytest
import torch
import transformers
from tiny_models import FAMILIES
from tiny_vision import _TEXT, _VIT, VISION, WIDTH, images, vision_model
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sapt_fast.sites.prefix import (
    AtAttention,
    PrefixedConfig,
    attach_prefix,
    detach_prefix,
    find_attention,
    prefixed_attention,
    require_prefix,
)

P = 3


class Given(AtAttention):
    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def prefix(self, like: Tensor) -> Tensor | None:
        return self.rows


def with_prefix(model, paths, width=WIDTH, batch=1):
    torch.manual_seed(5)
    for path in paths:
        attach_prefix(model, path, "slot", Given(torch.randn(batch, 2, P, width)))


def dense(layer, hidden, mask=None, prefix=None):
    """The layer's attention, written out: softmax(q [P_K; K]^T / sqrt(d) + [0, mask]) [P_V; V]."""

    named = dict(layer.named_children())
    old = "query" in named  # the DINOv2 of earlier transformers
    size = layer.attention_head_size if old else layer.head_dim

    def by_head(x):
        return x.unflatten(2, (-1, size)).transpose(1, 2)

    names = ("query", "key", "value") if old else ("q_proj", "k_proj", "v_proj")
    q, k, v = (named[name](hidden) for name in names)
    if prefix is not None:
        rows = prefix.expand(len(hidden), -1, -1, -1)
        k, v = torch.cat([rows[:, 0], k], 1), torch.cat([rows[:, 1], v], 1)
    q, k, v = by_head(q), by_head(k), by_head(v)
    scores = q @ k.mT / size**0.5
    if mask is not None:
        scores[..., scores.shape[-1] - mask.shape[-1] :] += mask
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return y if old else named["o_proj" if "o_proj" in named else "out_proj"](y)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["vit", "beit", "dinov2", "clip"])
def test_matches_attention_over_concatenated_rows(family, attention):
    model = vision_model(family).requires_grad_(False)
    model.set_attn_implementation(attention)
    (path,) = find_attention(model, [1]).patched
    before = model(images()).logits
    with_prefix(model, [path], batch=3)
    layer, seen = model.get_submodule(path), []
    layer.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    after = model(images()).logits
    ((_, args, kwargs, output),) = seen
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    assert (mask is not None) == (family == "beit")  # its relative position bias
    hidden = args[0] if args else kwargs["hidden_states"]
    expected = dense(layer, hidden, mask, layer.slot.rows)
    torch.testing.assert_close(output[0], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before)

    after.sum().backward()
    (gradient,) = torch.autograd.grad(model(images()).logits.sum(), layer.slot.rows)
    torch.testing.assert_close(layer.slot.rows.grad, gradient)
    assert (gradient != 0).any(dim=-1).all()
    own = copy.deepcopy(model)
    torch.testing.assert_close(own(images()).logits, after, rtol=0, atol=0)
    require_prefix(model, path, "slot")
    detach_prefix(model, path, "slot")
    assert torch.equal(model(images()).logits, before)
    assert not isinstance(layer.config, PrefixedConfig)
    assert "slot" not in layer._modules


@pytest.mark.parametrize("family", VISION)
def test_every_model_of_images(family):
    model = vision_model(family).requires_grad_(False)
    paths = find_attention(model, [0, 2]).patched
    assert len(paths) == 2
    assert ".0." in paths[0]
    assert ".2." in paths[1]
    before = model(images()).logits
    with_prefix(model, paths)
    assert not torch.allclose(model(images()).logits, before)
    for path in paths:
        detach_prefix(model, path, "slot")
    assert torch.equal(model(images()).logits, before)


def test_attention_maps_begin_with_the_prefix():
    model = vision_model("vit")
    model.set_attn_implementation("eager")
    with_prefix(model, find_attention(model, [0]).patched)
    first, second, _ = model(images(), output_attentions=True).attentions
    assert first.shape[3] == second.shape[3] + P == first.shape[2] + P
    assert model(images(), output_hidden_states=True).hidden_states[1].shape[1] == first.shape[2]


# Text: the prefix is read at every step, and no cache contains it.


def text_model(attention):
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval().requires_grad_(False)
    model.set_attn_implementation(attention)
    with_prefix(model, [f"model.layers.{i}.self_attn" for i in range(2)], 2 * 8, batch=2)
    return model


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_decoding_with_a_cache(attention, cache):
    model = text_model(attention)
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    if cache == "dynamic":
        options.pop("cache_implementation")
    with_cache = model.generate(ids, attention_mask=mask, **options)
    ones, text = torch.ones(2, 4, dtype=mask.dtype), ids
    for step in range(4):  # all tokens again
        seen = torch.cat([mask, ones[:, :step]], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = model(text, attention_mask=seen, position_ids=positions, use_cache=False).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert with_cache.tolist() == text.tolist()
    # Left padding stays hidden: the first text alone gives the same logits.
    for path in (f"model.layers.{i}.self_attn" for i in range(2)):
        source = model.get_submodule(path).slot
        source.rows = nn.Parameter(source.rows[:1])
    alone = model(ids[:1, 2:]).logits
    padded = model(ids[:1], attention_mask=mask[:1], position_ids=(mask[:1].cumsum(1) - 1))
    torch.testing.assert_close(padded.logits[:, 2:], alone, rtol=1e-5, atol=1e-5)


def test_a_causal_layer_stays_causal():
    outputs = []
    for attention in ("eager", "sdpa"):  # sdpa gets no mask
        model = text_model(attention)
        ids = torch.arange(3, 15).view(2, 6)
        logits = model(ids).logits
        changed = ids.clone()
        changed[:, 4:] = 50
        torch.testing.assert_close(model(changed).logits[:, :4], logits[:, :4])
        outputs.append(logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_position_biases(attention):
    torch.manual_seed(0)
    model = FAMILIES["t5"]().eval().requires_grad_(False)
    model.set_attn_implementation(attention)
    places = [f"{part}.block.0.layer.0.SelfAttention" for part in ("encoder", "decoder")]
    layer, seen = model.get_submodule(places[0]), []
    layer.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    with_prefix(model, places, 32)
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    text = torch.zeros(2, 1, dtype=torch.int64)
    for _ in range(4):
        logits = model(ids, decoder_input_ids=text, use_cache=False).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert model.generate(ids, **options).tolist() == text.tolist()

    _, (hidden, *_), _, output = seen[0]
    rows = layer.slot.rows.expand(2, -1, -1, -1)
    k, v = torch.cat([rows[:, 0], layer.k(hidden)], 1), torch.cat([rows[:, 1], layer.v(hidden)], 1)
    q, k, v = (x.unflatten(2, (4, 8)).transpose(1, 2) for x in (layer.q(hidden), k, v))
    scores = q @ k.mT
    scores[..., P:] += layer.compute_bias(5, 5)
    expected = layer.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output[0], expected, rtol=1e-5, atol=1e-5)


class FlashLayer(nn.Module):
    """An attention layer whose flash attention is a function that looks at its arguments."""

    is_causal = False

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": "flash_of_test"})()
        self.k_proj = nn.Linear(4, 4)


def test_what_flash_attention_gets():
    def flash(module, query, key, value, mask, **options):
        assert module.config._attn_implementation == "flash_of_test"  # it loads what this names
        return key, mask

    layer = FlashLayer()
    layer.slot = Given(torch.randn(2, 2, P, 4))
    layer.config = PrefixedConfig(layer.config, "slot", flash)
    ALL_ATTENTION_FUNCTIONS["flash_of_test"] = flash
    try:
        q = torch.randn(2, 2, 5, 2)
        key, mask = prefixed_attention(layer, q, q, q, None)
        assert key.shape == (2, 2, P + 5, 2)
        assert mask is None
        padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        _, mask = prefixed_attention(layer, q, q, q, padding)
        assert mask.tolist() == [[1] * P + row for row in padding.tolist()]
        with pytest.raises(RuntimeError, match="sliding window"):
            prefixed_attention(layer, q, q, q, None, sliding_window=3)
        with pytest.raises(RuntimeError, match="causal layer without a mask"):
            prefixed_attention(layer, q, q, q, None, is_causal=True)
        with pytest.raises(RuntimeError, match="mask of shape"):
            prefixed_attention(layer, q, q, q, padding[:, :3])
        with pytest.raises(RuntimeError, match=r"expected \[3, 2, P, 4\]"):
            prefixed_attention(layer, *[torch.randn(3, 2, 5, 2)] * 3, None)
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_of_test"]


def test_what_is_refused():
    model = vision_model("vit")
    with pytest.raises(ValueError, match=r"layers: got .3., expected 0 to 2"):
        find_attention(model, [3])
    with pytest.raises(ValueError, match="layer 0 of GPT2LMHeadModel has no attention"):
        find_attention(FAMILIES["gpt2"](), [0])
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=_VIT, text_config=_TEXT))
    with pytest.raises(ValueError, match=r"takes input_ids, pixel_values; .*of texts alone"):
        find_attention(clip, [0])
    (path,) = find_attention(model, [0]).patched
    with_prefix(model, [path])
    with pytest.raises(ValueError, match="with a prefix"):
        attach_prefix(model, path, "other", Given(torch.zeros(1, 2, 1, WIDTH)))
    delattr(model.get_submodule(path), "slot")
    with pytest.raises(ValueError, match="without slot"):
        require_prefix(model, path, "slot")
    layer = vision_model("vit").vit.layers[0]
    layer.attention.forward = None
    layer.attention.__class__ = type("Other", (type(layer.attention),), {"forward": lambda x: x})
    other = vision_model("vit")
    other.vit.layers[0] = layer
    with pytest.raises(ValueError, match="no attention"):
        find_attention(other, [0])
