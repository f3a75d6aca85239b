"""Modules that train in full beside the adapters: shared by all tasks, or a copy for each."""

from copy import deepcopy

import pytest
import torch
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


class TestRefused:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["nothing"],
                r"modules_to_save: 'nothing' matches no module .* named \['classifier'\]",
            ),
            (["attention"], "modules_to_save: bert.encoder.layer.0.attention .* gets adapters"),
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
    assert "classifier stays as it is" in str(model.sapt.report)
    assert "modules_to_save=['classifier']" in caplog.text
    caplog.clear()
    sapt_fast.patch(tiny("bert"), settings(modules_to_save="classifier"))
    sapt_fast.patch(tiny("llama"))
    assert not caplog.text
