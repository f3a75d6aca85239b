"""Two patches of one model at once: each sees its calls, and either may be removed first."""

import copy

import pytest
import torch
from tiny_models import checkpointed, patched, tiny, token_ids
from tiny_peft import peft_model
from transformers import PreTrainedModel

import sapt_fast
from sapt_fast.routing.hooks import Routing, require_unrouted


class Recorded(Routing):
    """A routing whose router notes that it was called."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, self._note, lambda: True, lambda: 1)
        self.calls = 0

    def _note(self, **_: object) -> torch.Tensor:
        self.calls += 1
        return torch.ones(1, 1)


def state(model: PreTrainedModel) -> list[dict[str, object]]:
    """All attributes of the model and its parts, and which hooks are where."""
    return [
        {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(module).items()
            if name not in ("_parameters", "_buffers", "_modules")
        }
        for module in model.modules()
    ]


def calls_of_generate(model: PreTrainedModel, routings: list[Recorded]) -> list[int]:
    before = [routing.calls for routing in routings]
    model.generate(token_ids(), max_new_tokens=2, do_sample=False)
    return [routing.calls - old for routing, old in zip(routings, before, strict=True)]


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("first", [0, 1], ids=["older_first", "newer_first"])
@pytest.mark.parametrize("replaced", [False, True], ids=["classes", "replaced_before"])
def test_either_may_be_removed_first(family, first, replaced):
    model = checkpointed(tiny(family))
    if replaced:  # by another library, before
        model.generate = model.generate
    before = state(model)
    routings = [Recorded(model), Recorded(model)]
    for routing in routings:
        routing.install()
    assert calls_of_generate(model, routings) == [1, 1]
    routings[first].remove()
    assert calls_of_generate(model, routings) == [first, 1 - first]
    with pytest.raises(ValueError, match="hooks of an earlier patch"):
        require_unrouted(model)
    routings[1 - first].remove()
    assert calls_of_generate(model, routings) == [0, 0]
    assert state(model) == before
    require_unrouted(model)


@pytest.mark.parametrize("first", [0, 1], ids=["older_first", "newer_first"])
def test_checkpointing_keeps_the_weights_of_the_one_that_stays(first):
    model = checkpointed(tiny("llama")).train()
    seen = []
    own = model.model.layers[0].self_attn.q_proj
    routings = [Recorded(model), Recorded(model)]
    for routing in routings:
        routing.install()
    routings[first].remove()
    stays = routings[1 - first]
    own.register_forward_pre_hook(lambda *_: seen.append(stays.running))
    model(token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    assert len(seen) == 2  # forward and recomputation
    assert all(weights is not None for weights in seen)
    assert routings[first].running is None


def test_a_stand_in_that_was_replaced_since_is_not_lost():
    model = tiny("llama")
    before = state(model)
    routing = Recorded(model)
    routing.install()
    ours, hooks = model.generate, dict(model._forward_pre_hooks)
    model.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match=r"generate: .* was replaced by"):
        routing.remove()
    assert model._forward_pre_hooks == hooks
    assert calls_of_generate(model, [routing]) == [1]
    model.generate = ours
    routing.remove()
    assert state(model) == before


@pytest.mark.parametrize("leave", ["unpatch", "unpatch_peft", "unload", "merge_and_unload"])
def test_unpatch_changes_nothing_if_a_stand_in_was_replaced(leave):
    if leave == "unpatch":
        model = inner = patched("llama")
    else:
        model = sapt_fast.patch(peft_model())
        inner = model.get_base_model()
    weights = torch.full((3, model.sapt.routing.count()), 0.3)

    def logits():
        with torch.no_grad():
            return model(input_ids=token_ids(), mixture=weights).logits

    expected, ours = logits(), inner.generate
    inner.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    call = getattr(model, leave) if leave.endswith("unload") else lambda: sapt_fast.unpatch(model)
    with pytest.raises(ValueError, match=r"generate: .* was replaced by"):
        call()
    assert torch.equal(logits(), expected)
    inner.generate = ours
    call()
    assert "generate" not in vars(inner)


def test_a_copy_is_removed_on_its_own():
    model = tiny("llama")
    routings = [Recorded(model), Recorded(model)]
    for routing in routings:
        routing.install()
    model.routings = routings  # as handles are
    copied = copy.deepcopy(model)
    for routing in copied.routings:
        routing.remove()
    assert calls_of_generate(model, routings) == [1, 1]
    assert calls_of_generate(copied, copied.routings) == [0, 0]
