"""CODA-Prompt and DualPrompt, worked out another way; and what all methods have."""

import copy
import pickle

import pytest
import torch
from tiny_vision import WIDTH, images, vision_model

import sapt_fast
from sapt_fast.methods.coda import coda_weights
from sapt_fast.pools.prefixes import orthonormal_rows

CODA = {"pool": 6, "n_tasks": 3, "length": 4, "layers": [0, 2], "modules_to_save": ["classifier"]}
DUAL = {
    "g_length": 2,
    "e_length": 3,
    "g_layers": [0],
    "e_layers": [1, 2],
    "modules_to_save": ["classifier"],
}
METHODS = {
    "coda": sapt_fast.CodaConfig(**CODA, orthogonality=0.5),
    "dualprompt": sapt_fast.DualPromptConfig(**DUAL),
}


def patched(method, family="vit", tasks=2, **changed):
    config = METHODS[method]
    config = type(config).from_dict({**config.to_dict(), **changed})
    model = sapt_fast.patch(vision_model(family), config)
    torch.manual_seed(3)
    for index in range(tasks):
        handle(model).grow(f"task {index}")
    return model.eval()


def handle(model):
    return model.coda if hasattr(model, "coda") else model.dualprompt


def train(model, steps=2, optimizer=None):
    model.train()
    optimizer = optimizer or torch.optim.Adam(handle(model).trainable_parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        labels = torch.tensor([0, 1, 2])
        x = images(seed=step)
        (model(x, labels=labels).loss + handle(model).key_loss(x)).backward()
        optimizer.step()
    model.eval()
    return optimizer


def rows_of(model):
    return {name: stack.rows().clone() for name, stack in handle(model).stacks().items()}


# --- CODA-Prompt ---


def test_weights_and_prefixes_are_those_of_the_equation():
    model = patched("coda")
    train(model)
    x = images()
    logits = model(x).logits
    query = model.coda.query(x).double()
    weights, prefixes = [], []
    for pool in model.coda.sources().values():
        a, k = pool.attention.rows().double(), pool.keys.rows().double()
        weights.append(torch.cosine_similarity(query[:, None] * a, k[None], dim=2))
        p = pool.prompts.rows().double().view(4, 2, 2, WIDTH)
        prefixes.append(torch.einsum("bk,k...->b...", weights[-1], p))
    torch.testing.assert_close(model.coda.attention.double(), torch.cat(weights, 1))
    like = x.new_zeros(3, 2, 5, WIDTH // 2)
    with model.coda.fixed(model.coda.attention):
        for pool, expected in zip(model.coda.sources().values(), prefixes, strict=True):
            torch.testing.assert_close(pool.prefix(like).double(), expected)
        torch.testing.assert_close(model(x).logits, logits)
    base = sapt_fast.unpatch(copy.deepcopy(model))
    assert not torch.allclose(base(x).logits, logits)


def test_gradients_of_the_weights():
    torch.manual_seed(0)
    a, k = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    query = torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *own: coda_weights(query, *own), (a, k))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_weights_of_any_scale_and_of_zeros(scale):
    torch.manual_seed(0)
    query, a, k = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4, 8)
    expected = coda_weights(query, a, k)
    expected[0] = expected[:, 1] = expected[:, 2] = 0
    query, a, k = query * scale, (a * scale), k * scale
    query[0], a[1], k[2] = 0, 0, 0
    a.requires_grad_(), k.requires_grad_()
    weights = coda_weights(query, a, k)
    torch.testing.assert_close(weights, expected)
    weights.sum().backward()
    assert (a.grad[1] == 0).all()
    assert (k.grad[2] == 0).all()
    assert a.grad.isfinite().all()
    assert k.grad.isfinite().all()


def test_new_rows_are_orthonormal_and_old_rows_stay():
    model = patched("coda", tasks=1)
    for rows in rows_of(model).values():
        torch.testing.assert_close(rows @ rows.t(), torch.eye(2), rtol=0, atol=1e-6)
    optimizer = train(model)
    before = rows_of(model)
    model.coda.grow("more", optimizer)
    for name, rows in rows_of(model).items():
        old, new = rows[:2], rows[2:]
        assert torch.equal(old, before[name])
        torch.testing.assert_close(new @ rows.t(), torch.eye(4)[2:], rtol=0, atol=1e-6)
    learned = rows_of(model)
    train(model, optimizer=optimizer)
    for name, rows in rows_of(model).items():
        assert torch.equal(rows[:2], before[name])
        assert (rows[2:] != learned[name][2:]).any(1).all()
    skewed = torch.randn(3, 2) @ torch.randn(2, 8)  # earlier rows may depend on each other
    fresh = orthonormal_rows(skewed, 4)
    assert (fresh @ skewed.double().t()).abs().max() < 1e-12


def test_the_penalty_is_that_of_the_equation():
    model = patched("coda")
    train(model)
    expected = 0.0
    for rows in rows_of(model).values():
        rows = rows.double()
        expected += 0.5 * (rows @ rows.t() - torch.eye(4)).square().mean()
    penalty = model.coda.key_loss(images())
    torch.testing.assert_close(penalty.double(), expected)
    penalty.backward()
    assert all(s.trainable.grad.abs().sum() > 0 for s in model.coda.stacks().values())
    assert patched("coda", orthogonality=0).coda.key_loss(images()) == 0


def test_warmup_runs_the_kernels_and_changes_nothing():
    model, calls = patched("coda"), []
    for pool in model.coda.sources().values():
        own = pool.prefix
        pool.prefix = lambda like, own=own: calls.append(own(like)) or calls[-1]
    model.coda.warmup([(3, 5)], train=True)
    assert [tuple(rows.shape) for rows in calls] == [(3, 2, 2, WIDTH)] * 6
    assert all(rows.requires_grad for rows in calls)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="no task"):
        patched("coda", tasks=0).coda.warmup([(3, 5)])


# --- DualPrompt ---


def test_prediction_takes_the_nearest_key_and_training_the_newest():
    model = patched("dualprompt", tasks=3)
    x = images(8)
    torch.manual_seed(0)
    with torch.no_grad():
        for stack in model.dualprompt.stacks().values():
            stack.rows().copy_(torch.randn_like(stack.rows()))
        model.dualprompt.keys.rows().copy_(model.dualprompt.query(x[:3]))
    cosines = torch.cosine_similarity(
        model.dualprompt.query(x)[:, None], model.dualprompt.keys.rows()[None], dim=2
    )
    logits, chosen = model(x).logits, cosines.argmax(1, keepdim=True)
    assert len(chosen.unique()) > 1
    assert torch.equal(model.dualprompt.attention, chosen)
    for place in range(3):
        with model.dualprompt.fixed(torch.tensor([place])):
            alike = model(x).logits
        own = (chosen == place)[:, 0]
        torch.testing.assert_close(logits[own], alike[own])
        assert own.all() or not torch.allclose(logits, alike)
    model.train()
    model(x)
    assert model.dualprompt.attention.tolist() == [[2]] * 8
    loss = model.dualprompt.key_loss()  # of the last forward
    torch.testing.assert_close(loss, -cosines[:, 2].mean())
    torch.testing.assert_close(loss, model.dualprompt.key_loss(x))
    loss.backward()
    assert model.dualprompt.keys.trainable.grad.abs().sum() > 0


def test_the_key_loss_is_that_of_the_last_forward():
    model, x, others = patched("dualprompt").train(), images(), images(seed=5)
    model(x)
    loss = model.dualprompt.key_loss()
    model.dualprompt.signal(pixel_values=others)
    assert torch.equal(model.dualprompt.key_loss(), loss)
    for training, gradients, given in (
        (True, True, True),
        (False, True, False),
        (True, False, False),
    ):
        model.train()
        model(x)
        model.train(bool(training))
        place = model.dualprompt.attention[:1]
        with torch.set_grad_enabled(bool(gradients)):
            model(others, mixture=place) if given else model(others)
        with pytest.raises(RuntimeError, match="key_loss: got no images"):
            model.dualprompt.key_loss()


def test_tasks_start_from_the_previous_one_and_share_g_prompts():
    model = patched("dualprompt", tasks=1)
    optimizer = train(model)
    before, general = rows_of(model), model.dualprompt.kept()["0.rows"].clone()
    model.dualprompt.grow("more", optimizer)
    for name, rows in rows_of(model).items():
        assert torch.equal(rows[:1], before[name])
        assert torch.equal(rows[1], rows[0]) == (name != "keys")
    train(model, optimizer=optimizer)
    for name, rows in rows_of(model).items():
        assert torch.equal(rows[:1], before[name])
        assert not torch.equal(rows[1], rows[0])
    assert not torch.equal(model.dualprompt.kept()["0.rows"], general)
    small = patched("dualprompt", prompt_start="normal", copy_previous=False)
    for name, rows in (rows_of(small) | small.dualprompt.kept()).items():
        assert (rows.abs().max() < 0.1) == (name != "keys")
    apart = patched("dualprompt", copy_previous=False)
    assert all(not torch.equal(*rows) for rows in rows_of(apart).values())


# --- both ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "clip", "siglip"])
def test_save_and_load(method, family, tmp_path):
    model = patched(method, family)
    train(model)
    own = handle(model)
    logits, rows = model(images()).logits, rows_of(model)
    own.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(vision_model(family), tmp_path)
    assert handle(loaded).tasks == own.tasks
    assert handle(loaded).config == own.config
    torch.testing.assert_close(rows_of(loaded), rows, rtol=0, atol=0)
    torch.testing.assert_close(loaded(images()).logits, logits, rtol=0, atol=0)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trained[0] == trained[1]
    assert "classifier.weight" in trained[0]
    with pytest.raises(ValueError, match="another base model"):
        sapt_fast.load_pretrained(vision_model(family, seed=1), tmp_path)
    fresh = patched(method, family, tasks=0)
    tensors, values = own.stored()
    broken = {**tensors, "surplus": torch.zeros(1)}
    with pytest.raises(ValueError, match="surplus"):
        handle(fresh).restore(broken, values)
    with pytest.raises(ValueError, match="tasks: got"):
        handle(fresh).restore(tensors, {**values, "tasks": ["a", "a"]})
    assert handle(fresh).tasks == []
    train(model)
    assert not torch.equal(model(images()).logits, logits)
    own.restore_values(tmp_path)
    assert torch.equal(model(images()).logits, logits)
    handle(loaded).grow("more")
    with pytest.raises(ValueError, match="more"):
        handle(loaded).restore_values(tmp_path)


class Encoder(torch.nn.Module):
    """Another frozen model: the mean colours of the halves of an image."""

    def forward(self, pixel_values):
        return pixel_values.unflatten(2, (2, -1)).mean((3, 4)).flatten(1)


@pytest.mark.parametrize("method", METHODS)
def test_another_model_computes_the_queries(method, tmp_path):
    model, encoder = patched(method, tasks=0), Encoder().eval()
    with pytest.raises(RuntimeError, match="training mode"):
        handle(model).look_up_by(Encoder())
    handle(model).look_up_by(encoder)
    handle(model).grow("first")
    train(model)
    x = images()
    logits = model(x).logits
    assert torch.equal(handle(model).query(x), encoder(x))
    handle(model).save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(vision_model("vit"), tmp_path)
    with pytest.raises(RuntimeError, match="look_up_by"):
        loaded(x)
    handle(loaded).look_up_by(encoder)
    assert torch.equal(loaded(x).logits, logits)
    tensors, values = handle(patched(method)).stored()
    fresh = patched(method, tasks=0)
    handle(fresh).look_up_by(encoder)
    with pytest.raises(ValueError, match="own queries"):
        handle(fresh).restore(tensors, values)
    with pytest.raises(RuntimeError, match="width 6, expected 16"):
        handle(patched(method)).look_up_by(encoder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("of_all", [True, False])
def test_an_optimizer_from_before_the_first_task(method, of_all):
    model = patched(method, tasks=0)
    own = model.parameters() if of_all else handle(model).trainable_parameters()
    optimizer = torch.optim.SGD(own, lr=0.1)
    for name in ("first", "second"):
        handle(model).grow(name, optimizer)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len({*held})
        assert {id(p) for p in handle(model).trainable_parameters()} <= {*held}


@pytest.mark.parametrize("method", METHODS)
def test_unpatch_restores_the_model(method):
    model = vision_model("dinov2")
    base = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(images()).logits
    sapt_fast.patch(model, METHODS[method])
    with torch.no_grad():
        assert torch.equal(model(images()).logits, before)  # no task yet
    handle(model).grow("first")
    assert not torch.allclose(model(images()).logits, before)
    sapt_fast.unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(images()).logits, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == base
    assert not [n for n, m in model.named_modules() if "sapt" in n or m._forward_pre_hooks]


@pytest.mark.parametrize("method", METHODS)
def test_given_queries_replace_the_second_forward(method):
    model = patched(method)
    x = images()
    logits, query = model(x).logits, handle(model).query(x)
    calls = []
    own = handle(model)._queries
    handle(model)._queries = lambda *args: calls.append(args) or own(*args)
    handle(model)._queries.width = own.width
    with handle(model).queries(query):
        assert torch.equal(model(x).logits, logits)
        assert not calls
        with pytest.raises(ValueError, match="3 for 2 images"):
            model(x[:2])
    with pytest.raises(ValueError, match=r"floats \[B, 16\]"):
        handle(model).queries(query[:, :3])
    model(x)
    assert len(calls) == 1
    moved = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    with handle(model).queries(moved):
        assert not torch.equal(handle(model).signal(pixel_values=x), handle(model).attention)
    with handle(model).queries(query.half()):
        rounded = handle(model).signal(pixel_values=x)
    with handle(model).queries(query.half().float()):
        assert torch.equal(handle(model).signal(pixel_values=x), rounded)  # computed in float32
    with torch.inference_mode():
        stored = handle(model).query(x)
    with handle(model).queries(stored):
        (model.train()(x).logits.sum() + handle(model).key_loss()).backward()


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_autocast_and_copies(method):
    model, x = patched(method), images()
    model.train()

    def gradients():
        model.zero_grad()
        model(x).logits.square().sum().backward()
        return [p.grad.clone() for p in handle(model).trainable_parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if method == "coda":  # whose weights have a gradient
        torch.testing.assert_close(gradients(), expected)
    else:
        with pytest.raises(RuntimeError, match=r'ViTLayer .* reentrant.*"use_reentrant": False'):
            gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    logits = model(x).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).logits.float(), logits, rtol=0.1, atol=0.1)
    own = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in handle(model).trainable_parameters():
            parameter.add_(0.5)
    torch.testing.assert_close(own(x).logits, logits, rtol=0, atol=0)
    assert handle(own).attention is not handle(model).attention
    torch.testing.assert_close(own(x[1:2]).logits, logits[1:2])
    again = pickle.loads(pickle.dumps(own))
    torch.testing.assert_close(again(x).logits, logits, rtol=0, atol=0)
    half = copy.deepcopy(own).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).logits.float(), logits, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("method", ["coda", pytest.param("dualprompt", marks=pytest.mark.thorough)])
def test_a_compiled_training_step(method):
    layers = {"layers": [1]} if method == "coda" else {"g_layers": [0], "e_layers": [1]}
    model, x = patched(method, **layers), images()
    model.train()
    query, gradients = handle(model).query(x), []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        with handle(model).queries(query):
            run(x).logits.square().sum().backward()
        found = (p.grad for p in handle(model).trainable_parameters())
        gradients.append([g.clone() for g in found if g is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("method", "field", "value", "message"),
    [
        ("coda", "pool", 7, "multiple of n_tasks"),
        ("coda", "length", 3, "even"),
        ("coda", "layers", [], "each at least 0"),
        ("coda", "layers", [1, 1], "named once"),
        ("coda", "orthogonality", -1, "at least 0"),
        ("coda", "query_layer", 0, "at least 1"),
        ("coda", "query_pooling", "max", "one of"),
        ("dualprompt", "prompt_start", "zero", "one of"),
        ("dualprompt", "copy_previous", 1, "True or False"),
        ("dualprompt", "e_layers", [0, 1], "without G-prompts"),
        ("dualprompt", "g_length", 0, "at least 1"),
        ("dualprompt", "strength", float("nan"), "at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(method, field, value, message):
    values = {**METHODS[method].to_dict(), field: value}
    with pytest.raises(ValueError, match=f"{field}: got .*{message}"):
        type(METHODS[method]).from_dict(values)


@pytest.mark.parametrize("method", METHODS)
def test_the_classifier_trains_unless_others_are_named(method):
    for named, expected in ((None, ["classifier"]), ([], [])):
        model = patched(method, modules_to_save=named)
        assert handle(model).config.modules_to_save == expected
        assert model.classifier.weight.requires_grad == bool(expected)


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match=r"layers: got .9., expected 0 to 2"):
        patched("coda", layers=[9])
    model = patched("coda", tasks=3)
    with pytest.raises(ValueError, match="task number 4, expected at most 3"):
        model.coda.grow("more")
    with pytest.raises(ValueError, match="task 0"):
        patched("dualprompt").dualprompt.grow("task 0")
    with pytest.raises(ValueError, match="orthogonal"):
        patched("coda", pool=18, n_tasks=1)
    with pytest.raises(ValueError, match=r"expected \[12\] or \[B, 12\]"):
        model.coda.fixed(torch.ones(3, 5, 12))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        patched("dualprompt").dualprompt.fixed(torch.tensor([2]))
    clip = patched("coda", "clip")
    assert clip.vision_model(images()).pooler_output.shape == (3, WIDTH)  # a forward of its own
    assert clip.coda.attention.shape == (3, 8)
    with pytest.raises(RuntimeError, match="call the patched model itself"):
        model.vit.layers[0](torch.randn(2, 5, WIDTH))
    with pytest.raises(ValueError, match="no task"):
        patched("coda", tasks=0).coda.stored()
    with pytest.raises(TypeError, match="pixel_values"):
        model(None)
