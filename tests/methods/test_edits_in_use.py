"""Edits while threads, caches, checkpoints, modes and interruptions come between."""

import pickle
import threading

import pytest
import torch
import transformers
from edited_models import (
    METHODS,
    OTHER,
    PAIRS,
    PROMPTS,
    TARGETS,
    answer,
    edited,
    edits_of,
    fresh,
    hooks,
    patched,
)
from tiny_models import checkpointed, run, tiny, token_ids
from torch.nn import functional as F

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.methods.grace import EditError, GraceConfig, Match
from sapt_fast.pools.edit_log import EditLog


class TestUndo:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("order", [(1, 2), (1, 0), (0, 2)])
    def test_edits_of_one_prompt_in_every_order(self, method, order):
        model = edited(method, pairs=[(PROMPTS[0], TARGETS[0])])
        for target in TARGETS[1:]:
            edits_of(model).edit(PROMPTS[0], target)
        left = [0, 1, 2]
        for edit in order:
            edits_of(model).undo(edit)
            left.remove(edit)
            assert answer(model, PROMPTS[0]) == TARGETS[left[-1]]

    @pytest.mark.parametrize("method", METHODS)
    def test_a_cache_forgets_what_was_taken_back(self, method):
        model, ids, after = edited(method), torch.tensor([PROMPTS[0]]), torch.tensor([[20]])
        with torch.no_grad():
            cache, plain = (
                m(input_ids=ids, use_cache=True).past_key_values for m in (model, fresh())
            )
            for layer, other in zip(cache.layers, plain.layers, strict=True):
                layer.keys, layer.values = other.keys, other.values
            edits_of(model).undo(0)
            got = model(input_ids=after, past_key_values=cache).logits
            assert torch.equal(got, fresh()(input_ids=after, past_key_values=plain).logits)


class TestMaking:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_the_same_edit_again_is_none(self, method, family):
        assert edits_of(edited(method, family)).edit(PAIRS) == [None] * 3

    @pytest.mark.parametrize("method", METHODS)
    def test_in_inference_mode(self, method):
        model = patched(method)
        with torch.inference_mode():
            edits_of(model).edit([(torch.tensor(p), t) for p, t in PAIRS])
            edits_of(model).undo(2)
        assert [answer(model, p) for p in PROMPTS[:2]] == TARGETS[:2]

    @pytest.mark.parametrize("method", METHODS)
    def test_an_interruption_changes_nothing(self, method, monkeypatch):
        model, calls = patched(method).train(), []
        before, handle = hooks(model), edits_of(model)
        own = type(handle).edit_batch

        def interrupted(self, pairs):
            calls.append(own(self, pairs))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return calls[-1]

        monkeypatch.setattr(type(handle), "edit_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handle.edit(PAIRS, batch_size=1)
        assert handle.tasks == []
        assert hooks(model) == before
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("method", METHODS)
    def test_other_threads_run_the_model_meanwhile(self, method):
        model, ids = edited(method, pairs=PAIRS[:1], steps=150), torch.tensor([PROMPTS[0], OTHER])
        expected, got, trained = run(model, ids), [], threading.Event()

        def work():
            while not trained.is_set():
                try:
                    got.append(torch.equal(run(model, ids), expected))
                except RuntimeError:
                    got.append(False)

        thread = threading.Thread(target=work)
        thread.start()
        edits_of(model).config.margin = 1e9  # trains all steps, and adds nothing
        with pytest.raises(EditError):
            edits_of(model).edit(PAIRS[1:])
        trained.set()
        thread.join()
        assert len(got) > 3
        assert all(got)

    @pytest.mark.parametrize("method", METHODS)
    def test_keys_that_are_not_finite(self, method):
        model = patched(method, keys="function")
        edits_of(model).look_up_by(lambda texts: torch.full((len(texts), 3), float("nan")))
        with pytest.raises(ValueError, match="NaN or infinity"):
            edits_of(model).edit(*PAIRS[0])
        assert edits_of(model).tasks == []

    def test_many_prompts_with_near_keys(self):
        """Keys that a matrix product could not tell from equal ones, and the other way round."""
        model = patched(keys="function", radius=1e-3)
        far = torch.full((4,), 1e3)
        model.grace.look_up_by(lambda texts: torch.stack([far + 1e-2 * t[0] for t in texts]))
        book = next(iter(model.grace.books().values()))
        keys = torch.stack([far + 1e-2 * n for n in range(64)])
        book.add(keys, torch.zeros(64, 1, 32), torch.ones(64), torch.arange(64))
        book.split(1.0, torch.arange(64), torch.arange(64))
        torch.testing.assert_close(book.radii, torch.full((64,), 0.01), atol=2e-4, rtol=0.02)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [("BertForTokenClassification", "one row of logits"), ("BertModel", "no logits")],
    )
    def test_models_without_an_answer(self, kind, message):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = transformers.BertConfig(vocab_size=97, num_attention_heads=4, **sizes)
        model = sapt_fast.patch(getattr(transformers, kind)(config).eval(), GraceConfig())
        with pytest.raises(ValueError, match=message):
            model.grace.edit([5, 6], 1)
        config = transformers.ViTConfig(image_size=8, patch_size=4, num_attention_heads=4, **sizes)
        model = sapt_fast.patch(transformers.ViTForImageClassification(config), GraceConfig())
        with pytest.raises(ValueError, match="no table of token embeddings"):
            model.grace.edit([5, 6], 1)

    def test_a_target_longer_than_the_decoder(self):
        model = sapt_fast.patch(tiny("bart"), GraceConfig())
        with pytest.raises(ValueError, match="target: got 70 tokens, expected at most 64"):
            model.grace.edit([5, 6], [7] * 70)

    def test_a_peft_model_is_told_what_to_do(self):
        import peft

        model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="merge_and_unload"):
            sapt_fast.patch(model, GraceConfig())
        merged = sapt_fast.patch(model.merge_and_unload(), GraceConfig(radius=1e-3))
        assert merged.grace.edit([5], [20]) == 0


class TestCaches:
    def test_of_an_earlier_patch(self):
        model = edited(pairs=PAIRS[:1])
        cache = model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
        sapt_fast.unpatch(model)
        sapt_fast.patch(model, GraceConfig(radius=1e-3))
        model.grace.edit(OTHER, [24])  # has the number of the edit that the cache was filled with
        with pytest.raises(RuntimeError, match="filled before the model was edited"):
            model(input_ids=torch.tensor([[20]]), past_key_values=cache)

    def test_cropped_inside_the_prompt(self):
        model = edited(pairs=PAIRS[:1])
        cache = model(input_ids=torch.tensor([[5, 6, 9, 9, 9]]), use_cache=True).past_key_values
        cache.crop(-3)
        with pytest.raises(RuntimeError, match="2 tokens of a prompt of 5"):
            model(input_ids=torch.tensor([PROMPTS[0][2:]]), past_key_values=cache)

    def test_the_encoder_of_another_call(self):
        model = patched(family="t5", keys="function", radius=0.5)
        model.grace.look_up_by(
            lambda texts: torch.stack([F.one_hot(t, 128).sum(0).float() for t in texts])
        )
        model.grace.edit(*PAIRS[0])
        ids = torch.tensor([PROMPTS[0]])
        hidden = model.get_encoder()(torch.tensor([OTHER])).last_hidden_state
        run(model, ids)
        with pytest.raises(RuntimeError, match="encoder_outputs"):
            model.get_decoder()(input_ids=ids, encoder_hidden_states=hidden)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}],
)
def test_a_prompt_counts_once(method, family, options):
    model = edited(method, family, pairs=PAIRS[:2])
    assert answer(model, PROMPTS[1], **options) == TARGETS[1]
    assert [edit.hits for edit in edits_of(model).edits] == [0, 1]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_use_what_was_decided(method, reentrant):
    below = {"key_module": "model.layers.0.self_attn.o_proj"} if method == "melo" else {}
    ids = torch.tensor([PROMPTS[0] + TARGETS[0]])
    labels = torch.where(torch.arange(ids.shape[1]) < len(PROMPTS[0]), -100, ids)
    gradients = []
    for again in (False, True):
        model = edited(method, pairs=PAIRS[:1], target_modules=("layers.1.mlp.down_proj",), **below)
        torch.manual_seed(0)
        sapt_fast.patch(model, SaptConfig(r=2, reserve_tasks=2))
        model.sapt.add_task("a")
        model.train()
        model.enable_input_require_grads()
        if again:
            checkpointed(model, {"use_reentrant": reentrant})
        model(input_ids=ids, labels=labels).loss.backward()
        gradients.append([p.grad for p in model.sapt.trainable_parameters() if p.grad is not None])
        assert edits_of(model).edits[0].hits == 1
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other)


@pytest.mark.parametrize("method", METHODS)
def test_dtypes_of_the_model_do_not_round_keys(method):
    model = edited(method, pairs=PAIRS[:2])
    before = {n: t.clone() for n, t in edits_of(model).stored()[0].items()}
    model.bfloat16()
    assert all(torch.equal(t, before[n]) for n, t in edits_of(model).stored()[0].items())
    assert run(model, token_ids()).dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["prompt", "edits"])
def test_prompts_before_the_tokens_are_refused(first):
    model = fresh()
    configs = [SaptConfig(adapter="prompt"), GraceConfig(radius=1e-3, replacement="per_token")]
    for config in configs[:: 1 if first == "prompt" else -1]:
        sapt_fast.patch(model, config)
    model.sapt.add_task("a")
    with pytest.raises(RuntimeError, match="prompts that another method inserts"):
        model.grace.edit(*PAIRS[0])
    assert model.grace.tasks == []


class TestStates:
    @pytest.mark.parametrize("name", ["radii", "edits", "hits"])
    def test_that_do_not_fit_are_refused(self, name):
        state = edited(pairs=PAIRS[:2]).state_dict()
        wrong = {n: t[:1] if n.endswith(f"codebook.{name}") else t for n, t in state.items()}
        with pytest.raises(RuntimeError, match=r"load_state_dict: model\.grace"):
            patched().load_state_dict(wrong)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_log_alone_is_refused(self, method):
        state = edited(method, pairs=PAIRS[:2]).state_dict()
        part = {n: t for n, t in state.items() if f"sapt_{method}." not in n}
        with pytest.raises(RuntimeError, match=f"load_state_dict: model.{method}"):
            patched(method).load_state_dict(part, strict=False)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("held", [0, 1])
    def test_a_trainer_resumes_with_the_edits(self, method, held, tmp_path):
        rows = [{"input_ids": row, "labels": row} for row in token_ids()]

        def train(model, steps, resume):
            sapt_fast.patch(model, SaptConfig(r=2, reserve_tasks=2))
            model.sapt.add_task("a")
            options = {"max_steps": steps, "save_steps": 1, "report_to": [], "use_cpu": True}
            given = transformers.TrainingArguments(tmp_path, disable_tqdm=True, **options)
            trainer = transformers.Trainer(model, given, train_dataset=rows)
            trainer.train(resume_from_checkpoint=resume)

        model, other = edited(method, pairs=PAIRS[:2]), patched(method)
        train(model, 1, None)
        edits_of(other).edit([(OTHER, [24, 1])][:held])
        train(other, 2, True)
        texts = [(e.prompt, e.target) for e in edits_of(other).edits]
        assert texts == [(tuple(p), tuple(t)) for p, t in PAIRS[:2]]


def test_texts_follow_the_log():
    log = EditLog()
    log.add([torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8]), torch.tensor([9, 1])])
    assert log.texts() == [((5, 6), (8,)), ((7,), (9, 1))]
    other = EditLog()
    other.load_state_dict(log.state_dict())
    log.remove(0)
    log.add([torch.tensor([3])], [torch.tensor([4])])
    assert log.texts() == [((7,), (9, 1)), ((3,), (4,))]
    assert other.texts() == [((5, 6), (8,)), ((7,), (9, 1))]


@pytest.mark.parametrize("method", METHODS)
def test_a_config_whose_pad_token_is_minus_one(method):
    model = patched(method)
    model.config.pad_token_id = -1
    edits_of(model).edit([([5], [20, 1]), ([9, 10, 11], [21, 31, 1])])
    assert answer(model, [5], pad_token_id=0) == [20, 1]


def test_a_layer_that_runs_several_times_in_a_forward():
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.AlbertConfig(
        vocab_size=97, num_hidden_layers=3, num_attention_heads=4, num_labels=5, **sizes
    )
    model = transformers.AlbertForSequenceClassification(config).eval()
    sapt_fast.patch(model, GraceConfig(target_modules=("ffn_output",)))
    with pytest.raises(RuntimeError, match="several times in a forward"):
        model.grace.edit([([5, 6, 7], label) for label in (0,)] + [([8, 9], 1), ([3], 2)])
    assert model.grace.tasks == []


def test_which_of_a_key_that_is_not_finite():
    model, width = patched(keys="function", radius=0.5), torch.eye(128)
    model.grace.look_up_by(lambda texts: torch.stack([width[t[0]] / (t[0] != 40) for t in texts]))
    model.grace.edit(PAIRS[:2])
    assert model.grace.which(OTHER) == Match(None, float("inf"), 0.0, False)


@pytest.mark.parametrize("method", METHODS)
def test_saving_a_given_state(method, tmp_path):
    model = edited(method, pairs=PAIRS[:1])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edits_of(model).edit(*PAIRS[1])
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
    assert edits_of(loaded).edits == edits_of(model).edits[:1]
    assert answer(loaded, PROMPTS[0]) == TARGETS[0]


@pytest.mark.parametrize("method", METHODS)
def test_pickling(method):
    model = pickle.loads(pickle.dumps(edited(method, pairs=PAIRS[:1])))
    assert answer(model, PROMPTS[0]) == TARGETS[0]
    edits_of(model).undo(0)
    assert torch.equal(run(model, token_ids()), run(fresh(), token_ids()))


def test_a_model_without_weights():
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(ValueError, match="meta device"):
        sapt_fast.patch(model, GraceConfig())
