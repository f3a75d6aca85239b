"""Modules that train in full beside the adapters: shared by all tasks, or a copy for each."""

from copy import deepcopy

import pytest
import torch
import transformers
from peft import PeftModel
from tiny_models import fill, settings, tiny, token_ids

import sapt_fast


def with_copies(family="bert", names=("classifier",), tasks=2, **changed):
    """A patched model whose tasks have copies of these modules, each with other values."""
    model = sapt_fast.patch(
        tiny(family), settings(modules_to_save=names, modules_per_task=True, **changed)
    )
    for k in range(tasks):
        model.sapt.add_task(f"task{k}")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for copies in model.sapt.task_modules.copies:
            for own in copies:
                for parameter in own.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return fill(model)


def input_of(model, path, **inputs):
    """(the output of the model, what one of its modules was given)."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = model(**inputs)
    hook.remove()
    return output, seen[-1]


def test_copies_are_mixed_by_the_weights_of_the_adapters():
    model = with_copies()
    output, x = input_of(model, "classifier", input_ids=token_ids())
    weights = model.sapt.attention
    copies = model.sapt.task_modules.copies[0]
    expected = sum(weights[:, k, None] * own(x) for k, own in enumerate(copies))
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize("task", [0, 1])
def test_one_hot_weights_give_that_tasks_head(task):
    """The other's copy counts for nothing, even if it is broken."""
    model = with_copies()
    other = model.sapt.task_modules.copies[0][1 - task]
    with torch.no_grad():
        other.weight.fill_(float("inf"))
    with model.sapt.fixed(torch.eye(2)[task]):
        output, x = input_of(model, "classifier", input_ids=token_ids())
    own = model.sapt.task_modules.copies[0][task]
    assert torch.equal(output.logits, own(x))


def test_per_token_heads_in_generation_equal_merged_ones():
    """A language model's head: greedy tokens of samples with other weights, one by one."""
    model, ids = with_copies("llama", ("lm_head",)), token_ids()
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    for row, weights in enumerate(model.sapt.route(ids).detach()):
        alone = deepcopy(model)
        alone.sapt.merge(weights)
        expected = alone.generate(ids[row : row + 1], max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens[row : row + 1], expected)
        alone.sapt.unmerge()
        assert torch.equal(alone(ids).logits, model(ids).logits)


def test_only_the_newest_copy_trains_and_an_optimizer_follows_it():
    model = with_copies()
    optimizer = torch.optim.AdamW(model.sapt.trainable_parameters(), lr=0.1)
    model(token_ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    model.sapt.add_task("new", optimizer)
    copies = model.sapt.task_modules.copies[0]
    flags = [[p.requires_grad for p in own.parameters()] for own in copies]
    assert flags == [[False, False], [False, False], [True, True]]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.sapt.trainable_parameters()} == held
    assert torch.equal(copies[2].weight, model.classifier.weight)


def test_a_shared_module_trains_in_place_for_all_tasks():
    model = sapt_fast.patch(tiny("bert"), settings(modules_to_save=["classifier"]))
    for name in ("first", "second"):
        model.sapt.add_task(name)
        trains = set(map(id, model.sapt.trainable_parameters()))
        assert {id(p) for p in model.classifier.parameters()} <= trains
    assert model.sapt.trained_tensors().keys() == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("per_task", [False, True])
def test_unpatch_gives_the_module_back(per_task):
    model = tiny("bert")
    names, output = list(model.state_dict()), model(token_ids()).logits
    config = settings(modules_to_save=["classifier"], modules_per_task=per_task)
    sapt_fast.patch(model, config)
    model.sapt.add_task("one")
    sapt_fast.unpatch(model)
    assert list(model.state_dict()) == names
    assert not model.classifier._forward_hooks
    assert torch.equal(model(token_ids()).logits, output)


def test_a_replaced_module_with_copies_is_noticed():
    model = with_copies()
    model.classifier = torch.nn.Linear(32, 5)
    with pytest.raises(RuntimeError, match="classifier: was replaced after patch"):
        model(token_ids())
    with model.sapt.fixed(torch.ones(2)), pytest.raises(RuntimeError, match="was replaced"):
        model(token_ids())


class TestWhatWasTrained:
    def test_unfrozen_parameters(self):
        model = sapt_fast.patch(tiny("bert"), settings())
        model.classifier.bias.requires_grad_(True)
        assert model.sapt.trained_tensors().keys() == {"classifier.bias"}

    def test_trained_and_frozen_again(self):
        model = sapt_fast.patch(tiny("bert"), settings())
        model.sapt.add_task("one")
        model.classifier.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(token_ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        model.requires_grad_(False)
        expected = {"classifier.weight", "classifier.bias"}
        assert model.sapt.trained_tensors().keys() == expected
        model.load_state_dict(model.state_dict())
        model.sapt.merge([1.0])
        model.sapt.unmerge()
        assert model.sapt.trained_tensors().keys() == expected

    def test_loads_and_merges_train_nothing(self):
        model = sapt_fast.patch(tiny("bert"), settings())
        model.sapt.add_task("one")
        model.load_state_dict(model.state_dict())
        model.sapt.merge([0.5])
        model.sapt.unmerge()
        model.half().float()
        assert not model.sapt.trained_tensors()


def trained(model, names=("classifier",)):
    """The model after a few steps of an optimizer on all that trains, and on these modules."""
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(token_ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    return model


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


class TestSaved:
    """What comes back computes the same, in a model that never saw the training."""

    @pytest.mark.parametrize("per_task", [False, True])
    @pytest.mark.parametrize("way", ["sapt", "transformers"])
    def test_named_modules(self, way, per_task, tmp_path):
        config = settings(modules_to_save=["classifier"], modules_per_task=per_task)
        model = sapt_fast.patch(tiny("bert"), config)
        for name in ("first", "second"):
            model.sapt.add_task(name)
            trained(fill(model), ())
        base = tiny("bert")
        if way == "sapt":
            model.sapt.save_pretrained(tmp_path)
        else:
            model.save_pretrained(tmp_path)
            base = type(base).from_pretrained(tmp_path)
        again = sapt_fast.load_pretrained(base, tmp_path)
        assert torch.equal(logits(again), logits(model))
        flags = {name: p.requires_grad for name, p in again.named_parameters()}
        assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
        assert not torch.equal(logits(sapt_fast.unpatch(again)), logits(model))

    @pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen again"])
    @pytest.mark.parametrize(
        "path", ["classifier", "bert.pooler.dense", "bert.embeddings", "bert.encoder.layer.1"]
    )
    def test_whatever_was_trained(self, path, frozen, tmp_path):
        model = sapt_fast.patch(tiny("bert"), settings())
        model.sapt.add_task("one")
        trained(fill(model), [path])
        if frozen:
            model.get_submodule(path).requires_grad_(False)
        model.sapt.save_pretrained(tmp_path)
        again = sapt_fast.load_pretrained(tiny("bert"), tmp_path)
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize("per_task", [False, True])
    def test_a_tasks_folder_in_peft(self, per_task, tmp_path):
        config = settings(modules_to_save=["classifier"], modules_per_task=per_task)
        model = sapt_fast.patch(tiny("bert"), config)
        for name in ("first", "second"):
            model.sapt.add_task(name)
            trained(fill(model), ())
        model.sapt.save_pretrained(tmp_path)
        for index, name in enumerate(model.sapt.tasks):
            alone = PeftModel.from_pretrained(tiny("bert"), tmp_path / name)
            with model.sapt.fixed(torch.eye(2)[index]):
                torch.testing.assert_close(logits(alone), logits(model))

    @pytest.mark.parametrize("weights", [[0.0, 1.0], [0.3, 0.6]])
    @pytest.mark.parametrize("per_task", [False, True])
    def test_export(self, per_task, weights, tmp_path):
        model = with_copies() if per_task else None
        if model is None:
            model = sapt_fast.patch(tiny("bert"), settings(modules_to_save=["classifier"]))
            for name in ("first", "second"):
                model.sapt.add_task(name)
            trained(fill(model), ())
        model.sapt.export_adapter(weights, tmp_path)
        exported = PeftModel.from_pretrained(tiny("bert"), tmp_path)
        with model.sapt.fixed(torch.tensor(weights)):
            torch.testing.assert_close(logits(exported), logits(model))

    def test_prompts(self, tmp_path):
        config = {"adapter": "prompt", "prompt_length": 3, "modules_to_save": ["lm_head"]}
        for per_task in (False, True):
            model = sapt_fast.patch(tiny("llama"), settings(**config, modules_per_task=per_task))
            model.sapt.add_task("one")
            with torch.no_grad():
                for parameter in model.sapt.trainable_parameters():
                    parameter.add_(0.1)
            model.sapt.save_pretrained(tmp_path)
            again = sapt_fast.load_pretrained(tiny("llama"), tmp_path)
            assert torch.equal(logits(again), logits(model))
            with pytest.raises(ValueError, match="PEFT's prompt tuning cannot store"):
                model.sapt.export_adapter([1.0], tmp_path / "exported")

    def test_another_head_is_refused(self, tmp_path):
        model = sapt_fast.patch(tiny("bert"), settings(modules_to_save=["classifier"]))
        model.sapt.add_task("one")
        model.sapt.save_pretrained(tmp_path)
        other = tiny("bert", num_labels=3)
        with pytest.raises(
            ValueError, match=r"classifier.weight: got .*\(5, 32\), expected .*\(3, 32\)"
        ):
            sapt_fast.load_pretrained(other, tmp_path)
        assert not hasattr(other, "sapt")


class TestRefused:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["nothing"],
                r"modules_to_save: 'nothing' matches no module .* named \['classifier'\]",
            ),
            (["attention"], "modules_to_save: bert.encoder.layer.0.attention .* has adapters"),
        ],
    )
    def test_names_that_cannot_be(self, names, message):
        model = tiny("bert")
        with pytest.raises(ValueError, match=message):
            sapt_fast.patch(model, settings(modules_to_save=names))
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "sapt")

    def test_copies_of_nothing(self):
        with pytest.raises(ValueError, match="modules_per_task: got True"):
            settings(modules_per_task=True)

    def test_outputs_that_cannot_be_mixed(self):
        model = with_copies("bert", ["encoder"], target_modules=["classifier"])
        with pytest.raises(RuntimeError, match=r"bert.encoder: got an output of type"):
            model(token_ids())


def test_a_head_that_is_frozen_is_named(caplog):
    model = sapt_fast.patch(tiny("bert"))
    assert "classifier is frozen" in str(model.sapt.report)
    assert "modules_to_save=['classifier']" in caplog.text
    caplog.clear()
    sapt_fast.patch(tiny("bert"), settings(modules_to_save="classifier"))
    sapt_fast.patch(tiny("llama"))
    assert not caplog.text


class TestCopies:
    def test_an_absent_copy_counts_in_no_gradient(self):
        """Even if it is broken: the gradients are those of the model with a whole copy."""
        found = []
        for value in (float("inf"), float("nan"), 1.0):
            model = with_copies(tasks=3)
            with torch.no_grad():
                model.sapt.task_modules.copies[0][0].weight.fill_(value)
            weights = torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
            with model.sapt.fixed(weights.requires_grad_()):
                model(token_ids()).logits.square().sum().backward()
            trained = [p.grad for p in model.sapt.trainable_parameters() if p.grad is not None]
            assert trained
            found.append([*trained, weights.grad[:, 1:]])
        for broken in found[:2]:
            for got, expected in zip(broken, found[2], strict=True):
                torch.testing.assert_close(got, expected)

    def test_weights_per_token_never_meet_features(self):
        """T tokens and as many labels: [B, T, K] does not fit a head's [B, T]."""
        model = with_copies()
        per_token = torch.rand(3, 5, 2)
        with model.sapt.fixed(per_token), pytest.raises(RuntimeError, match=r"classifier: .*3, 5"):
            model(token_ids(3, 5))

    def test_a_module_inside_another_is_copied_with_it(self):
        model = with_copies(names=("pooler", "dense"), target_modules=["query"])
        # BERT's other dense layers are in no pooler.
        assert "bert.pooler" in model.sapt.task_modules.paths
        assert "bert.pooler.dense" not in model.sapt.task_modules.paths
        copied = sum(p.numel() for p in model.sapt.task_modules.parameters())
        base = [model.get_submodule(path) for path in model.sapt.task_modules.paths]
        assert copied == 2 * sum(p.numel() for module in base for p in module.parameters())
        model(token_ids())

    def test_names_that_the_router_has_too(self, tmp_path):
        """`norm` of Llama is not the router's."""
        model = with_copies("llama", ("norm",))
        model.sapt.save_pretrained(tmp_path)
        again = sapt_fast.patch(tiny("llama"), model.sapt.config)
        sapt_fast.load_pretrained(again, tmp_path)
        assert torch.equal(logits(again), logits(model))

    def test_hooks_run_once_on_the_mixture(self):
        model, calls = tiny("bert"), []

        def double(module, args, output):
            calls.append(1)
            return 2 * output

        hook = model.classifier.register_forward_hook(double)
        sapt_fast.patch(model, settings(modules_to_save=["classifier"], modules_per_task=True))
        for name in ("first", "second"):
            model.sapt.add_task(name)
        hooked = logits(model)
        assert len(calls) == 1
        hook.remove()
        torch.testing.assert_close(hooked, 2 * logits(model))

    def test_of_modules_that_accelerate_dispatched(self):
        accelerate = pytest.importorskip("accelerate")
        model = tiny("bert")
        accelerate.hooks.add_hook_to_module(
            model.classifier, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
        )
        sapt_fast.patch(model, settings(modules_to_save=["classifier"], modules_per_task=True))
        model.sapt.add_task("one")
        own = model.sapt.task_modules.copies[0][0]
        with torch.no_grad():
            own.weight.mul_(3)
        output, x = input_of(model, "classifier", input_ids=token_ids())
        expected = torch.nn.functional.linear(x, own.weight, own.bias)
        torch.testing.assert_close(output.logits, expected)


class TestUnseenChanges:
    """Ways to train a head that torch does not count as writes."""

    def fused(self, model):
        model.classifier.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=0.1, fused=True)
        model(token_ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()

    def data(self, model):
        model.classifier.weight.data.add_(1)

    def state(self, model):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["classifier.weight"] += 1
        model.load_state_dict(state)

    def module(self, model):
        model.classifier = torch.nn.Linear(32, 5)

    def norm(self, model):
        norm = model.bert.encoder.layer[1].output.LayerNorm
        norm.requires_grad_(True)
        optimizer = torch.optim.AdamW(norm.parameters(), lr=1e-3, fused=True)
        model(token_ids(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()

    @pytest.mark.parametrize("way", ["fused", "data", "state", "module", "norm"])
    def test_are_saved(self, way, tmp_path):
        model = sapt_fast.patch(tiny("bert"), settings())
        model.sapt.add_task("one")
        fill(model)
        before = logits(model)
        getattr(self, way)(model)
        model.requires_grad_(False)
        assert not torch.equal(logits(model), before)
        model.sapt.save_pretrained(tmp_path)
        again = sapt_fast.load_pretrained(tiny("bert"), tmp_path)
        assert torch.equal(logits(again), logits(model))


def test_tied_parameters_of_a_module_reach_peft(tmp_path):
    """BERT's language modelling head has one bias under two names, at two depths."""
    bert = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    kinds = transformers.BertConfig(num_hidden_layers=1, **bert)

    def base():
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(kinds).eval()

    model = sapt_fast.patch(base(), settings(modules_to_save=["cls"]))
    model.sapt.add_task("one")
    with torch.no_grad():
        for parameter in model.cls.parameters():
            parameter.add_(0.1)
    fill(model).sapt.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(), tmp_path / "one")), logits(model)
    )
    assert torch.equal(logits(sapt_fast.load_pretrained(base(), tmp_path)), logits(model))


@pytest.mark.parametrize("per_task", [False, True])
def test_values_that_the_models_dtype_cannot_hold(per_task, tmp_path):
    config = settings(modules_to_save=["classifier"], modules_per_task=per_task)
    model = sapt_fast.patch(tiny("bert"), config)
    model.sapt.add_task("one")
    head = model.sapt.task_modules.copies[0][0] if per_task else model.classifier
    with torch.no_grad():
        head.weight.fill_(1e6)
    model.sapt.save_pretrained(tmp_path)
    other = tiny("bert").half()
    with pytest.raises(ValueError, match=r"classifier.weight: got NaN or infinite"):
        sapt_fast.load_pretrained(other, tmp_path)
    assert not hasattr(other, "sapt")


def test_modules_that_cannot_train_are_refused():
    quantised = tiny("bert")
    quantised.classifier.weight = torch.nn.Parameter(
        torch.ones(5, 32, dtype=torch.int8), requires_grad=False
    )
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(tiny("bert"), execution_device=torch.device("cpu"))
    for model, reason in ((quantised, "weight is quantised"), (offloaded, "offloads")):
        with pytest.raises(ValueError, match=f"classifier cannot train: .*{reason}"):
            sapt_fast.patch(model, settings(modules_to_save=["classifier"]))
        assert not hasattr(model, "sapt")


def test_all_linear_leaves_them_out():
    pooler = settings(modules_to_save=["pooler"], target_modules="all-linear")
    patched = sapt_fast.patch(tiny("bert"), pooler).sapt.report.patched
    assert len(patched) == 12  # six in each of two layers
    assert "bert.pooler.dense" not in patched


def test_copies_of_an_embedding_that_is_no_plain_table_are_refused():
    config = settings(modules_to_save=["embed_tokens"], modules_per_task=True)
    with pytest.raises(ValueError, match=r"modules_to_save: tasks cannot have copies of .*Gemma"):
        sapt_fast.patch(tiny("gemma"), config)
