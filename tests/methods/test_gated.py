"""Mixtures of experts by gates, against loops over the experts in plain torch."""

import copy

import pytest
import torch
from tiny_models import checkpointed, tiny
from torch import nn
from transformers import Trainer, TrainingArguments

import sapt_fast
from sapt_fast import GatedConfig

FAMILIES = ("llama", "gpt2", "t5")
KINDS = {
    "mixlora": {"top_k": 2, "balance": 0.5},
    "loramoe": {"top_k": None, "router_init": "linear"},
    "hydralora": {"top_k": None, "shared_a": True, "router_init": "linear"},
    "many": {"num_experts": 16, "top_k": 2, "balance": 0.5},  # whose chosen experts are computed
    "shared_top": {"shared_a": True, "gate": "sigmoid", "top_k": 2, "balance": 0.5},
    "relu": {"gate": "relu", "top_k": None, "renormalize": True},
}


def next_tokens(logits, labels, **others):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def patched(family="llama", dtype=torch.float64, model=None, seed=5, **changed):
    """A model in training mode with gated experts that all do something."""
    model = (tiny(family) if model is None else model).to(dtype)
    if dtype == torch.float64 and not model.config.is_encoder_decoder:
        model.loss_function = next_tokens  # transformers' own converts to float32
    given = {"r": 3, "lora_alpha": 6, "num_experts": 4, **changed}
    sapt_fast.patch(model, GatedConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pool in model.gated.pools.values():
            for tensor in pool.tensors().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.train()


def texts(rows=3, length=30):
    """Left-padded token ids, their mask, and labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Loop(nn.Module):
    """A linear layer plus its experts, one after the other."""

    def __init__(self, layer, pool, config, masks, log):
        super().__init__()
        self.layer, self.config, self.log = layer, config, log
        self.mask = masks[0 if pool.reads_encoder else -1]
        values = {name: t.detach().clone() for name, t in pool.tensors().items()}
        self.own = nn.ParameterDict(values)

    def forward(self, x):
        config, y = self.config, self.layer(x)
        scores = x @ self.own["router"].T
        if config.gate == "softmax":
            full = scores.exp() / scores.exp().sum(-1, keepdim=True)
        else:
            full = 1 / (1 + (-scores).exp()) if config.gate == "sigmoid" else scores.clamp(min=0)
        least = full.sort(-1).values[..., -(config.top_k or config.num_experts)]
        kept = torch.where(full >= least[..., None], full, 0.0)
        weights = kept
        if config.renormalize or (config.gate == "softmax" and config.renormalize is None):
            weights = kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)
        a, b, r = self.own["lora_A"], self.own["lora_B"], config.r
        for k in range(config.num_experts):
            rows = slice(k * r, (k + 1) * r)
            reduced = x @ (a if config.shared_a else a[rows]).T
            y = y + config.lora_alpha / r * weights[..., k, None] * (reduced @ b[rows])
        shares = full / full.sum(-1, keepdim=True).clamp(min=1e-30)
        counted = self.mask.bool()
        used = (kept[counted] > 0).double().mean(0)
        self.log.append(config.num_experts * (used * shares[counted].mean(0)).sum())
        return y


def with_loops(model, given):
    """A copy of a patched model whose layers are loops; and where these put balance losses."""
    bare, log, loops = sapt_fast.unpatch(copy.deepcopy(model)), [], {}
    masks = [given["attention_mask"], given["attention_mask"]]
    if model.config.is_encoder_decoder:
        masks[1] = given["labels"] != -100
    for path, pool in model.gated.pools.items():
        parent, _, name = path.rpartition(".")
        layer = bare.get_submodule(path)
        loops[path] = Loop(layer, pool, model.gated.config, masks, log)
        setattr(bare.get_submodule(parent), name, loops[path])
    return bare.train(), log, loops


def loss_by_loops(model, given):
    """Loss and gradients of a patched model, computed by loops."""
    bare, log, loops = with_loops(model, given)
    loss = bare(**given).loss
    balance = model.gated.config.coefficient() * torch.stack(log).mean()
    (loss + balance).backward()
    grads = {f"{p}.{n}": t.grad for p, loop in loops.items() for n, t in loop.own.items()}
    return loss + balance, balance, grads


def assert_grads(model, expected):
    own = model.gated._own()
    assert own.keys() == expected.keys()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_a_loop_over_the_experts(family, kind):
    model, given = patched(family, **KINDS[kind]), texts()
    expected, balance, grads = loss_by_loops(model, given)
    loss = model(**given).loss
    torch.testing.assert_close(loss, expected)
    if model.gated.config.coefficient():
        torch.testing.assert_close(model.gated.balance_loss(), balance.detach())
        assert not model.gated.balance_loss().requires_grad
    loss.backward()
    assert_grads(model, grads)


def test_chosen_experts_and_all_experts_are_the_same_mixture():
    model = patched(num_experts=16, top_k=2)
    pool = next(iter(model.gated.pools.values()))
    x = torch.randn(70, pool.a.width, dtype=torch.float64)
    assert pool.computes_chosen(x)
    weights, _ = pool.weights(x)
    found = pool(x, None, None, weights)
    expected = pool(x, None, None, weights, backend="reference")  # all
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        pool.b.trainable[:3] = float("inf")  # the first expert
    absent = weights[:, 0] == 0
    assert absent.any()
    assert pool(x, None, None, weights)[absent].isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_recomputed_layers_count_once(family, reentrant):
    model, given = patched(family, **KINDS["mixlora"]), texts()
    expected, _, grads = loss_by_loops(model, given)
    checkpointed(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(**given, use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert_grads(model, grads)


def test_the_balance_loss_is_for_training_and_for_loops_of_ones_own():
    model, given = patched(**KINDS["mixlora"]), texts()
    bare = given.pop("labels")
    logits = model(**given).logits
    alone = model.gated.balance_loss()
    assert alone.requires_grad  # no labels: nothing was added
    own = model(**given, labels=bare)
    torch.testing.assert_close(own.loss - alone, model.eval()(**given, labels=bare).loss)
    with pytest.raises(RuntimeError, match=r"the last forward was not one of model.train\(\)"):
        model.gated.balance_loss()
    torch.testing.assert_close(own.logits, logits)
    model.train().gated.gates.in_loss = False
    assert model(**given, labels=bare, return_dict=False)[0] < own.loss
    assert model.gated.balance_loss().requires_grad
    tuples = patched(**KINDS["mixlora"])(**given, labels=bare, return_dict=False)
    torch.testing.assert_close(tuples[0], own.loss)


def test_padding_changes_nothing():
    model, given = patched(**KINDS["mixlora"]), texts()
    given["labels"][given["attention_mask"].cumsum(-1) == 1] = -100  # follows padding, or nothing
    wider = {n: nn.functional.pad(t, (5, 0), value=-100 if n == "labels" else 0)
             for n, t in given.items()}  # fmt: skip
    wider["position_ids"] = (wider["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**wider).loss, model(**given).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_gives_the_logits_of_a_whole_forward(family):
    model, given = patched(family, **KINDS["mixlora"]).eval(), texts()
    del given["labels"]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 4}
    by_cache, whole = (
        model.generate(
            **given, **options, use_cache=cached, return_dict_in_generate=True, output_logits=True
        )
        for cached in (True, False)
    )
    assert torch.equal(by_cache.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(by_cache.logits), torch.stack(whole.logits))
    beams = model.generate(**given, **options, num_beams=2)
    assert beams.shape == whole.sequences.shape


class TestSaved:
    """Experts, routers and trained modules on disk."""

    @pytest.mark.parametrize("by", ["handle", "model"])
    @pytest.mark.parametrize("kind", ["mixlora", "hydralora"])
    def test_all_that_trains_is_saved_and_loaded(self, by, kind, tmp_path):
        changed = {**KINDS[kind], "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        model, given = patched(dtype=torch.float32, **changed), texts()
        with torch.no_grad():
            model.lm_head.weight += 0.1
        (model.gated if by == "handle" else model).save_pretrained(tmp_path)
        loaded = sapt_fast.load_pretrained(tiny("llama"), tmp_path)
        assert loaded.gated.config == model.gated.config
        assert loaded.lm_head.weight.requires_grad
        assert torch.equal(loaded(**given).logits, model.eval()(**given).logits)
        again = sapt_fast.load_pretrained(patched(dtype=torch.float32, seed=9, **changed), tmp_path)
        assert torch.equal(again.eval()(**given).logits, model(**given).logits)

    def test_a_wrong_folder_changes_nothing(self, tmp_path):
        patched(dtype=torch.float32).gated.save_pretrained(tmp_path)
        model = patched(dtype=torch.float32, num_experts=6)
        before = {n: t.clone() for n, t in model.gated._own().items()}
        with pytest.raises(ValueError, match="num_experts"):
            sapt_fast.load_pretrained(model, tmp_path)
        assert all(torch.equal(before[n], t) for n, t in model.gated._own().items())

    def test_a_state_dict_is_complete(self):
        model, given = patched(**KINDS["mixlora"]), texts()
        other = patched(seed=4, **KINDS["mixlora"])
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(**given).loss, model(**given).loss)


def test_nothing_is_left_after_unpatch_and_copies_are_their_own():
    model, given = tiny("t5"), texts()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    classes, expected = [type(m) for m in model.modules()], model(**given).logits
    patched(dtype=torch.float32, model=model).eval()
    found = model(**given).logits
    other = copy.deepcopy(model)
    for pool in other.gated.pools.values():
        pool.b.trainable.data.zero_()
    assert torch.equal(model(**given).logits, found)
    torch.testing.assert_close(other(**given).logits, expected)
    other.train()(**given).loss.backward()
    assert other.gated.gates.balance_loss is not None
    assert model.gated.gates.balance_loss is None
    sapt_fast.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (values, trained) in before.items():
        assert torch.equal(after[name], values), name
        assert after[name].requires_grad == trained
    assert torch.equal(model(**given).logits, expected)


class TestTrainer:
    """transformers' Trainer without any change."""

    def trainer(self, model, folder, **options):
        rows = [{name: t[i] for name, t in texts(6).items()} for i in range(6)]
        rows[1]["labels"] = rows[1]["labels"].masked_fill(torch.arange(30) < 25, -100)
        given = {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 2,
            "use_cpu": True, "report_to": [], "learning_rate": 0.05, "logging_steps": 1,
            "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_steps": 1, "seed": 1,
            "weight_decay": 0.0, "disable_tqdm": True, "optim": "sgd", **options,
        }  # fmt: skip
        return Trainer(model, TrainingArguments(str(folder), **given), train_dataset=rows)

    def test_it_adds_the_balance_loss_once_per_label_and_resumes(self, tmp_path):
        model = patched(dtype=torch.float32, **KINDS["mixlora"])
        start = {n: t.clone() for n, t in model.gated._own().items()}
        seen = []
        model.register_forward_pre_hook(lambda m, a, k: seen.append(dict(k)), with_kwargs=True)
        self.trainer(model, tmp_path).train()
        end = {n: t.clone() for n, t in model.gated._own().items()}

        # one step by hand: the loss is the mean over the labels of all micro-batches
        first, labels = seen[:3], [(s["labels"][..., 1:] != -100).sum().item() for s in seen[:3]]
        assert len({*labels}) > 1
        expected = patched(dtype=torch.float32, **KINDS["mixlora"])
        for given, count in zip(first, labels, strict=True):
            given.pop("num_items_in_batch")
            _, _, grads = loss_by_loops(expected, given)
            for name, own in expected.gated._own().items():
                own.grad = (own.grad if own.grad is not None else 0) + grads[name] * count
        resumed = patched(dtype=torch.float32, **KINDS["mixlora"])
        for t in resumed.gated._own().values():
            t.data.zero_()
        trainer = self.trainer(resumed, tmp_path)
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
        for name, own in resumed.gated._own().items():
            step = 0.05 * expected.gated._own()[name].grad / sum(labels)
            torch.testing.assert_close(own.data, start[name] - step, rtol=1e-3, atol=1e-5)
        self.trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert all(torch.equal(t, end[n]) for n, t in resumed.gated._own().items())


def test_routers_stay_in_float32():
    model, given = patched(dtype=torch.float32, **KINDS["mixlora"]), texts()
    exact = model(**given).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**given).loss
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    loss.backward()
    before = {n: p.router.clone() for n, p in model.gated.pools.items()}
    half = model.to(torch.bfloat16)
    assert all(torch.equal(p.router, before[n]) for n, p in half.gated.pools.items())
    half(**given).loss.backward()
    assert all(p.router.grad.dtype == torch.float32 for p in half.gated.pools.values())
    made = sapt_fast.patch(tiny("llama").to(torch.bfloat16), GatedConfig())
    assert {t.dtype for t in made.gated._own().values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["mixlora", "hydralora", "many"])
def test_fullgraph_compile_of_a_layer(kind):
    model = patched(dtype=torch.float32, **KINDS[kind])
    layer = model.get_submodule(model.gated.report.patched[0])
    x = torch.randn(2, 40, layer.in_features, requires_grad=True)
    expected = layer(x)
    want = torch.autograd.grad(expected.square().sum(), [x, *layer.sapt_pool.tensors().values()])
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), [x, *layer.sapt_pool.tensors().values()])
    torch.testing.assert_close(found, want)


def test_jitter_and_dropout_act_in_training_alone():
    model, given = patched(jitter=0.3, lora_dropout=0.3, shared_a=True), texts()
    assert not torch.equal(model(**given).logits, model(**given).logits)
    plain = patched(shared_a=True).eval()
    assert torch.equal(model.eval()(**given).logits, plain(**given).logits)


def test_it_stands_beside_sapt(tmp_path):
    model = sapt_fast.patch(tiny("llama"), sapt_fast.SaptConfig(r=2, target_modules=["q_proj"]))
    model.sapt.add_task("a")
    patched(dtype=torch.float32, model=model, target_modules=["up_proj"], top_k=2, balance=0.5)
    given = texts()
    model(**given).loss.backward()
    assert model.gated.balance_loss() > 0
    model.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(loaded(**given).logits, model.eval()(**given).logits)
    sapt_fast.unpatch(model, "gated")
    assert model.sapt.trainable_parameters()
    with pytest.raises(ValueError, match="patched already, by another method"):
        sapt_fast.patch(model, GatedConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k: got 5, expected at most 4"),
        ({"gate": "topk"}, "gate: got 'topk'"),
        ({"top_k": None, "balance": 0.1}, "balance: got 0.1, expected 0, because"),
        ({"jitter": 1.0}, "jitter: got 1.0, expected"),
        ({"r": 0}, "r: got 0"),
        ({"router_init": "uniform"}, "router_init: got 'uniform'"),
        ({"balance": float("nan")}, "balance: got nan"),
    ],
)
def test_bad_settings_raise(changed, words):
    with pytest.raises(ValueError, match=words):
        GatedConfig(**changed)


def test_presets_and_their_changes():
    for preset in (GatedConfig.mixlora, GatedConfig.loramoe, GatedConfig.hydralora):
        config = preset(r=2)
        assert config.r == 2
        assert GatedConfig.from_dict(config.to_dict()) == config
        sapt_fast.patch(tiny("llama"), config)
    assert GatedConfig.mixlora().coefficient() == 0.001
    assert GatedConfig.loramoe().coefficient() == 0.0


def test_what_patch_makes_trains_and_does_nothing_yet(capsys):
    model, given = tiny("gpt2"), texts()
    expected = model(**given).logits
    sapt_fast.patch(model, GatedConfig(modules_to_save=None))
    assert torch.equal(model(**given).logits, expected)
    model.gated.print_trainable_parameters()
    trained = sum(p.numel() for p in model.gated.trainable_parameters())
    assert f"trainable params: {trained:,d} ||" in capsys.readouterr().out
    assert isinstance(sapt_fast.handle(model, GatedConfig), type(model.gated))
    with pytest.raises(TypeError, match="num_experts"):
        model.gated.grow("more")
    model.gated.warmup([(2, 3)], train=True)
    assert all(p.grad is None for p in model.gated.trainable_parameters())


def test_a_mask_that_shows_no_padding_raises():
    model, given = patched(**KINDS["mixlora"]), texts()
    given["attention_mask"] = torch.ones(3, 1, 30, 30, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"attention_mask: got \(3, 1, 30, 30\)"):
        model(**given)
    assert not model.gated.gates.is_running
    model.eval()(**given)
