"""L2P on vision transformers, against a transformer with prompts that is computed by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_vision import SIZE, VISION, WIDTH, images, vision_model

import sapt_fast
from sapt_fast import L2PConfig
from sapt_fast.sites.image_embeddings import vision_parts
from sapt_fast.sites.image_queries import ImageQueries

M, N, L, B = 6, 2, 3, 4
LABELS = torch.tensor([0, 3, 1, 4])


def made(family="vit", grown=True, model=None, **options):
    """A patched model in float64, in training mode."""
    model = vision_model(family).double() if model is None else model
    sapt_fast.patch(model, L2PConfig(**{"prompts": M, "top": N, "length": L, **options}))
    if grown:
        model.l2p.grow("first")
    return model.train()


def pixels(count=B, **options):
    return images(count, **options).double()


# --- by hand ---


def _part(module, *endings):
    return next(m for n, m in module.named_modules() if n.endswith(endings))


def _scale(layer, name, beit):
    found = getattr(layer, name, None)
    return found.lambda1 if found is not None else getattr(layer, beit, 1.0)


def layer_by_hand(layer, hidden, bias):
    """One encoder layer on [B, S, D]; bias [1, H, S, S]."""
    parts = dict(layer.named_children())
    attention = parts.get("attention", parts.get("self_attn"))
    first, second = (m for m in parts.values() if isinstance(m, torch.nn.LayerNorm))
    x = first(hidden)
    names = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")
    q, k, v = (_part(attention, *n)(x).unflatten(-1, (2, -1)).transpose(1, 2) for n in names)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
    x = (scores @ v).transpose(1, 2).flatten(2)
    x = _part(attention, "o_proj", "out_proj", "output.dense")(x)
    hidden = hidden + _scale(layer, "layer_scale1", "lambda_1") * x
    return hidden + _scale(layer, "layer_scale2", "lambda_2") * parts["mlp"](second(hidden))


def logits_by_hand(model, x, prompts, layer=0, head="prompts"):
    """The logits of images for prompts [B, P, D], of a model without patch."""
    parts = vision_parts(model)
    tower, prefix, length = parts.tower, parts.prefix, prompts.shape[1]
    hidden = parts.embeddings(x)
    if parts.pre_norm is not None and layer > 0:
        hidden = parts.pre_norm(hidden)
    position = parts.cls_position()
    rows = prompts if position is None else prompts + position
    places = [*range(prefix), *[0] * length, *range(prefix, hidden.shape[1])]
    shared = getattr(tower, "shared_position_bias", None)
    for index, block in enumerate(parts.layers):
        own = getattr(block, "relative_position_bias", None)
        bias = own if own is not None else shared
        bias = 0.0 if bias is None else bias((SIZE // 4, SIZE // 4))
        if index == layer:
            hidden = torch.cat([hidden[:, :prefix], rows, hidden[:, prefix:]], 1)
            if layer == 0 and parts.pre_norm is not None:
                hidden = parts.pre_norm(hidden)
        if index >= layer and isinstance(bias, torch.Tensor):
            bias = bias[:, :, places][:, :, :, places]
        hidden = layer_by_hand(block, hidden, bias)
    outputs = hidden[:, prefix : prefix + length]
    rest = torch.cat([hidden[:, :prefix], hidden[:, prefix + length :]], 1)
    norm = parts.norm
    mean = norm(outputs).mean(1)
    kind = type(tower).__name__
    if kind.startswith("Dinov2"):
        last = norm(rest)
        cls = mean if head == "prompts" else last[:, 0]
        read = torch.cat([cls, last[:, prefix:].mean(1)], 1)
    elif head == "prompts":
        read = mean
    elif kind.startswith("Beit") and tower.config.use_mean_pooling:
        read = norm(rest[:, 1:].mean(1))
    elif kind.startswith("CLIP"):
        read = rest[:, 1:].mean(1)
    else:
        read = norm(rest).mean(1) if kind.startswith("Siglip") else norm(rest)[:, 0]
    return parts.classifier(read)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize(("layer", "head"), [(0, None), (2, "model")])
def test_logits_and_gradients_are_those_by_hand(family, layer, head):
    model, plain, x = made(family, layer=layer, head=head), vision_model(family).double(), pixels()
    plain.requires_grad_(False)
    handle = model.l2p
    prompts = handle.prompts.rows.rows().clone().view(M, L, WIDTH).requires_grad_()
    keys = handle.prompt_keys.detach().clone().requires_grad_()
    query = ImageQueries(plain)(x)
    cosines = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
    nearest = cosines.topk(N)[1]
    logits = logits_by_hand(plain, x, prompts[nearest].flatten(1, 2), layer, head or "prompts")
    expected = F.cross_entropy(logits, LABELS) - 0.1 * cosines.gather(1, nearest).sum() / B
    expected.backward()
    out = model(x, labels=LABELS)
    loss = out.loss + handle.key_loss()
    loss.backward()
    assert handle.attention.tolist() == nearest.tolist()
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(loss, expected)
    own = handle.prompts.rows.trainable
    torch.testing.assert_close(own.grad.view(M, L, WIDTH), prompts.grad)
    torch.testing.assert_close(handle.prompt_keys.grad, keys.grad)
    torch.testing.assert_close(handle.key_loss(x), loss - out.loss)
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier", "l2p"}


# --- shapes and surroundings ---


@pytest.mark.parametrize("family", ["deit", "beit", "dinov2", "clip"])
def test_callers_see_the_usual_shapes(family):
    model, plain, x = made(family).eval(), vision_model(family).double(), pixels()
    tower, own = vision_parts(model).tower, vision_parts(plain).tower
    for options in ({"output_hidden_states": True}, {"return_dict": False}):
        found, usual = tower(x, **options), own(x, **options)
        shapes = [
            [[h.shape for h in v] if isinstance(v, tuple) else v.shape for v in values]
            for values in (
                output if isinstance(output, tuple) else output.to_tuple()
                for output in (found, usual)
            )
        ]
        assert shapes[0] == shapes[1]
    assert not torch.allclose(tower(x).last_hidden_state, own(x).last_hidden_state)
    assert model.l2p.attention.shape == (B, N)
    model.set_attn_implementation("eager")
    maps = tower(x, output_attentions=True).attentions
    count = tower(x).last_hidden_state.shape[1]
    assert [m.shape[2:] for m in maps] == [(count, count + N * L)] * len(maps)


@pytest.mark.parametrize("family", ["vit", "beit_shared"])
def test_unpatch_and_an_empty_pool_leave_the_model(family):
    model, x = vision_model(family).requires_grad_(False), images()
    before = model(x).logits
    sapt_fast.patch(model, L2PConfig(prompts=M, top=N))
    assert torch.equal(model(x).logits, before)
    model.l2p.grow("first")
    assert not torch.equal(model(x).logits, before)
    assert torch.equal(sapt_fast.unpatch(model)(x).logits, before)
    assert not hasattr(model, "l2p")


def test_checkpointing_autocast_and_copies():
    model, x = made("beit"), pixels()
    expected = model(x, labels=LABELS)
    (expected.loss + model.l2p.key_loss()).backward()
    grad = model.l2p.prompts.rows.trainable.grad.clone()
    other = copy.deepcopy(model)
    other.zero_grad()
    other.gradient_checkpointing_enable()
    out = other(x, labels=LABELS)
    (out.loss + other.l2p.key_loss()).backward()
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(other.l2p.prompts.rows.trainable.grad, grad)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x.float(), labels=LABELS)
    (out.loss + model.l2p.key_loss()).backward()
    torch.testing.assert_close(out.logits.double(), expected.logits, atol=0.1, rtol=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{}, {"choice": "batch"}, {"layer": 2, "query_layer": 2}])
def test_a_compiled_model_computes_the_same(options):
    model, x = made("vit", **options), pixels()
    expected = model(x, labels=LABELS)
    (expected.loss + model.l2p.key_loss()).backward()
    grads = [p.grad.clone() for p in model.l2p.trainable_parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(x, labels=LABELS)
    (out.loss + model.l2p.key_loss()).backward()
    torch.testing.assert_close(out.logits, expected.logits)
    for parameter, grad in zip(model.l2p.trainable_parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_images_of_another_size_keep_the_position_of_cls():
    model, plain = made("vit").eval(), vision_model("vit").double()
    x = pixels(size=SIZE + 4)
    found = model(x, interpolate_pos_encoding=True).logits
    prompts = model.l2p.prompts.rows.rows().view(M, L, WIDTH)[model.l2p.attention].flatten(1, 2)
    embeddings = plain.base_model.embeddings
    own = type(embeddings).forward
    embeddings.forward = lambda x: own(embeddings, x, interpolate_pos_encoding=True)
    torch.testing.assert_close(found, logits_by_hand(plain, x, prompts))
    with pytest.raises(ValueError, match="pixel_values: got images of 16 x 16, expected 12 x 12"):
        model(x)
    with pytest.raises(ValueError, match="images of 3 channels"):
        model(x[:, :1])
    for family in ("beit", "beit_shared"):  # whose biases are interpolated to the rows' number
        model = made(family).eval()
        usual = model(pixels()).logits
        torch.testing.assert_close(model(pixels(), interpolate_pos_encoding=True).logits, usual)


# --- queries ---


def test_a_low_layer_gives_the_query_in_the_same_forward():
    model, x = made("clip", layer=2, query_layer=2, query_pooling="mean"), pixels()
    calls = []
    vision_parts(model).embeddings.register_forward_hook(lambda *_: calls.append(1))
    own = ImageQueries(model, 2, "mean")(x)
    model.l2p._queries.hidden = None  # not called
    logits = model(x, labels=LABELS).logits
    assert calls == [1]
    cosines = F.normalize(own, dim=1) @ F.normalize(model.l2p.prompt_keys, dim=1).T
    assert model.l2p.attention.tolist() == cosines.topk(N)[1].tolist()
    torch.testing.assert_close(model.l2p.key_loss(), -0.1 * cosines.topk(N)[0].sum() / B)
    with model.l2p.fixed(model.l2p.attention):
        torch.testing.assert_close(model(x).logits, logits)


def test_dropout_does_not_reach_the_query():
    model = VISION["vit"](hidden_dropout_prob=0.5).double()
    made(model=model, layer=2, query_layer=2)
    x = pixels()
    query = ImageQueries(model, 2)(x)
    cosines = F.normalize(query, dim=1) @ F.normalize(model.l2p.prompt_keys, dim=1).T
    model(x)
    torch.testing.assert_close(model.l2p.key_loss(), -0.1 * cosines.topk(N)[0].sum() / B)
    model = made(model=VISION["vit"](hidden_dropout_prob=0.5).double())
    patches = model.train().l2p._patches(x)  # by which prompts can start
    assert torch.equal(patches, model.eval().l2p._patches(x))


def test_given_queries_and_places_replace_computed_ones():
    model, x = made("vit"), pixels()
    query = model.l2p.query(x)
    with model.l2p.queries(query.flip(0)):
        model(x)
    flipped = model.l2p.attention
    model(x)
    assert torch.equal(model.l2p.attention.flip(0), flipped)
    model(x, mixture=torch.tensor([3, 1]))
    assert model.l2p.attention.tolist() == [[3, 1]] * B
    with pytest.raises(RuntimeError, match="did not choose prompts by the keys"):
        model.l2p.key_loss()
    with model.l2p.queries(query[:1]), pytest.raises(ValueError, match="got 1 for 4 images"):
        model(x)
    with pytest.raises(ValueError, match=r"places \[6, 1\], expected 0 to 5"):
        model.l2p.fixed(torch.tensor([6, 1]))


def test_an_encoder_gives_the_queries(tmp_path):
    class Colours(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    model, x = made("siglip", grown=False), pixels()
    model.l2p.look_up_by(Colours().eval())
    model.l2p.grow("first")
    assert model.l2p.prompt_keys.shape == (M, 3)
    expected = model.eval()(x).logits
    model.l2p.save_pretrained(tmp_path)
    other = sapt_fast.load_pretrained(vision_model("siglip").double(), tmp_path)
    with pytest.raises(RuntimeError, match=r"call model\.l2p\.look_up_by"):
        other(x)
    other.l2p.look_up_by(Colours().eval())
    assert torch.equal(other(x).logits, expected)


# --- saving ---


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_what_is_saved_is_loaded(family, tmp_path):
    model, x = made(family, centre_queries=True, head="prompts"), pixels(8)
    model.l2p.start_from([x])
    model.l2p.count_picks([(x,)])
    model.l2p.grow("second")
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    model.save_pretrained(tmp_path)
    kind = type(model)
    base = kind.from_pretrained(tmp_path).double()
    other = sapt_fast.load_pretrained(base, tmp_path)
    assert torch.equal(other.eval()(x).logits, model.eval()(x).logits)
    for name in ("picked", "centre", "prompt_keys"):
        assert torch.equal(getattr(other.l2p, name), getattr(model.l2p, name))
    assert (other.l2p.tasks, other.l2p.begun) == (["first", "second"], 2)
    assert other.l2p.prompts.rows.trainable.requires_grad
    with torch.no_grad():
        other.l2p.prompt_keys.zero_()
        other.l2p.picked.zero_()
    other.l2p.restore_values(tmp_path)
    assert torch.equal(other(x).logits, model(x).logits)


# --- bad input ---


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("vit", {"layer": 3}, "layer: got 3, expected 0 to 2"),
        ("vit", {"query_layer": 9}, "layer: got 9, expected 1 to 3"),
        ("siglip", {"query_pooling": "cls"}, "pooling: got 'cls'"),
        ("vit", {"top": 7}, r"top: got 7, expected 1 to 6 \(prompts\)"),
        ("vit", {"query_layer": 0}, "query_layer: got 0, expected an integer, at least 1"),
        ("vit", {"standardize_query": True}, "standardize_query: got True, expected False"),
        ("vit", {"shared_pool_copy": True}, "False without task_prompts"),
        ("vit", {"choice": "votes"}, "choice: got 'votes'"),
    ],
)
def test_settings_that_do_not_fit_are_named(family, options, message):
    model = vision_model(family)
    before = {*vars(model)}, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        made(model=model, **options)
    assert ({*vars(model)}, [p.requires_grad for p in model.parameters()]) == before


def test_models_without_embeddings_to_prompt_are_named():
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"
    )
    with pytest.raises(ValueError, match=r"'resnet'\) with no vision transformers"):
        sapt_fast.patch(transformers.ResNetForImageClassification(config), L2PConfig())
    bare = vision_model("vit").vit
    with pytest.raises(ValueError, match="head: got 'prompts', expected 'model' or None"):
        sapt_fast.patch(bare, L2PConfig(head="prompts"))
    model = made(model=bare)
    assert model(images()).last_hidden_state.shape == (3, 10, WIDTH)
