"""Each method makes its edits, can be continued from its state, and restores the model."""

import numpy as np
import pytest
import torch
from tiny_models import tiny

from sapt_fast.demo.backbone import load_backbone
from sapt_fast.editing.answers import Examiner
from sapt_fast.editing.editors.base import GIVEN, MADE
from sapt_fast.editing.editors.defer import DeferEditor
from sapt_fast.editing.editors.finetune import FineTuneEditor
from sapt_fast.editing.editors.registry import EDITORS, editor_type, options_of
from sapt_fast.editing.editors.ultraedit import RunningStatistics, UltraEditEditor

PROMPTS = [(5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16)]
TARGETS = [(20, 30, 1), (21, 31, 1), (22, 32, 33, 1)]
OTHER = [(40, 41, 42), (43, 44)]
FAMILIES = ("llama", "gpt2", "t5", "bert")
OPTIONS = {
    "grace": {"replacement": "per_token", "radius": 1e-3},
    "grace-released": {"replacement": "replace_all", "steps": 5},
    "retrain": {"learning_rate": 0.03},
    "melo": {"radius": 1e-3, "learning_rate": 0.05},
    "ft": {"learning_rate": 0.03},
    "ft-l2": {"learning_rate": 0.03, "strength": 1e-4},
    "defer": {"learning_rate": 0.03},
}


def fresh(family="llama"):
    return load_backbone() if family == "t5" else tiny(family, initializer_range=0.3)


def pairs(family="llama", rows=range(3)):
    if family == "bert":
        return [(torch.tensor(PROMPTS[i]), torch.tensor([i])) for i in rows]
    return [(torch.tensor(PROMPTS[i]), torch.tensor(TARGETS[i])) for i in rows]


def editor_on(model, name, **options):
    given = {**OPTIONS.get(name, {}), **options}
    if model.config.model_type == "bert" and name == "grace":
        given.pop("replacement")
    torch.manual_seed(0)
    return editor_type(name)(model, options_of(name, given))


def answers(model, prompts):
    return Examiner(model, 4, 6).answers(prompts)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "llama") for name in EDITORS),
        *((name, family) for name in ("grace", "defer", "ultraedit") for family in FAMILIES[1:]),
    ],
)
def test_the_model_is_restored(name, family):
    model, other = fresh(family), fresh(family)
    editor = editor_on(model, name)
    editor.edit(pairs(family, [0]))
    with editor.measuring():
        assert len(answers(model, PROMPTS)) == 3
    if name == "grace":
        assert editor.size()["edits"] == 1
    assert sum(t.numel() for t in editor.state().values()) > 0
    editor.close()
    assert vars(model).keys() == vars(other).keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    state = other.state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in other.parameters()
    ]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["grace", "melo", "ft", "ft-l2", "retrain", "defer"])
def test_an_edit_is_answered(name):
    model = fresh()
    assert editor_on(model, name).edit(pairs(rows=[0, 1])) == [MADE, MADE]
    assert answers(model, PROMPTS[:2]) == TARGETS[:2]


def test_retraining_in_several_batches():
    """What is held below the trained layer is that of each batch."""
    model = fresh()
    options = {"train_batch": 1, "target_modules": ("layers.1.mlp.down_proj",)}
    assert editor_on(model, "retrain", **options).edit(pairs(rows=[0, 1])) == [MADE, MADE]
    assert answers(model, PROMPTS[:2]) == TARGETS[:2]


@pytest.mark.parametrize("name", EDITORS)
def test_a_restored_state_continues_to_the_same_bits(name):
    whole = editor_on(fresh(), name)
    for i in range(3):
        torch.manual_seed(i)
        whole.edit(pairs(rows=[i]))
    first, second = editor_on(fresh(), name), editor_on(fresh(), name)
    for i in range(2):
        torch.manual_seed(i)
        first.edit(pairs(rows=[i]))
    saved = {k: v.clone() for k, v in first.state().items()}
    second.restore(saved, pairs(rows=[0, 1]))
    torch.manual_seed(2)
    second.edit(pairs(rows=[2]))
    expected, got = whole.state(), second.state()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], v) for k, v in expected.items())
    assert answers(second.model, PROMPTS + OTHER) == answers(whole.model, PROMPTS + OTHER)
    saved.pop(next(iter(saved)))
    with pytest.raises(ValueError, match="tensors"):
        editor_on(fresh(), name).restore(saved, [])


class TestGrace:
    def test_what_fits_is_made_and_what_does_not_is_named(self):
        editor = editor_on(fresh(), "grace", steps=4)
        outcomes = editor.edit(pairs())
        alone = [editor_on(fresh(), "grace", steps=4).edit(pairs(rows=[i]))[0] for i in range(3)]
        assert outcomes == alone
        assert MADE in outcomes
        assert any("4 steps" in outcome for outcome in outcomes)

    def test_an_answer_that_is_given_already(self):
        model = fresh()
        given = torch.tensor(answers(model, OTHER)[0])
        editor = editor_on(model, "grace")
        assert editor.edit([(torch.tensor(OTHER[0]), given), *pairs(rows=[1])]) == [GIVEN, MADE]
        editor.undo(0)
        assert editor.size() == {"edits": 0, "keys": 0, "values": 0}

    def test_measuring_counts_no_hits(self):
        model = fresh()
        editor = editor_on(model, "grace")
        editor.edit(pairs())
        with editor.measuring():
            answers(model, PROMPTS)
        assert [edit.hits for edit in editor.handle.edits] == [0, 0, 0]
        answers(model, PROMPTS)
        assert [edit.hits for edit in editor.handle.edits] == [1, 1, 1]

    @pytest.mark.parametrize("name", ["grace", "melo"])
    def test_keys_by_a_function(self, name):
        def count(texts):
            return torch.stack([torch.bincount(text, minlength=97) for text in texts]).float()

        model, other = fresh(), fresh()
        editor = editor_on(model, name, keys="function", radius=0.5)
        editor.look_up_by(count)
        assert editor.edit(pairs(rows=[0])) == [MADE]
        assert answers(model, PROMPTS[:1]) == TARGETS[:1]
        reordered = [PROMPTS[0][::-1]]
        assert answers(model, reordered) != answers(other, reordered)
        with pytest.raises(ValueError, match="looks nothing up"):
            editor_on(fresh(), "ft").look_up_by(count)


class TestWeights:
    def test_fine_tuning_forgets_and_retraining_does_not(self):
        kept = {}
        for name in ("ft", "retrain"):
            model = fresh()
            editor = editor_on(model, name)
            for i in range(3):
                editor.edit(pairs(rows=[i]))
            kept[name] = [a == t for a, t in zip(answers(model, PROMPTS), TARGETS, strict=True)]
        assert kept["ft"][-1]
        assert not all(kept["ft"])
        assert all(kept["retrain"])

    def test_retraining_takes_the_last_target_of_a_prompt(self):
        model = fresh()
        editor = editor_on(model, "retrain")
        editor.edit(pairs(rows=[0, 1]))
        editor.edit([(torch.tensor(PROMPTS[0]), torch.tensor(TARGETS[1]))])
        assert answers(model, PROMPTS[:2]) == [TARGETS[1], TARGETS[1]]

    def test_the_penalty_holds_the_weights(self):
        distances = []
        for strength in (0.0, 1.0):
            editor = editor_on(fresh(), "ft-l2", strength=strength, steps=20)
            editor.edit(pairs(rows=[0]))
            distances.append(editor.penalty()().item() / max(strength, 1e-30))
            moved = sum((w - editor.original[p]).square().sum() for p, w in editor.weights.items())
            distances[-1] = moved.item()
        assert 0 < distances[1] < 0.5 * distances[0]

    def test_a_loss_that_is_not_finite_changes_nothing(self):
        for name in ("ft", "retrain", "defer"):
            model = fresh()
            editor = editor_on(model, name, learning_rate=0.01)
            before = {k: v.clone() for k, v in editor.state().items()}
            with torch.no_grad():
                model.lm_head.weight[50] = float("nan")
            (outcome,) = editor.edit(pairs(rows=[0]))
            assert "the loss is nan" in outcome
            assert all(torch.equal(v, before[k]) for k, v in editor.state().items())


class TestDeferral:
    def test_the_gate_decides(self):
        model, other = fresh(), fresh()
        editor = editor_on(model, "defer")
        assert answers(model, OTHER) == answers(other, OTHER), "untrained, the gate does not act"
        editor.edit(pairs(rows=[0]))
        assert isinstance(editor, DeferEditor)
        with torch.no_grad():
            editor.deferral.gate.bias.fill_(-1e4)
        assert answers(model, PROMPTS + OTHER) == answers(other, PROMPTS + OTHER)
        with torch.no_grad():
            editor.deferral.gate.bias.fill_(1e4)
        assert answers(model, PROMPTS[:1]) == TARGETS[:1]

    def test_one_layer(self):
        with pytest.raises(ValueError, match="got 2 layers, expected one"):
            editor_on(fresh(), "defer", target_modules=("mlp.down_proj",))


class TestUltraEdit:
    def test_running_statistics(self):
        torch.manual_seed(0)
        rows = torch.randn(11, 3)
        statistics = RunningStatistics(3, rows.device)
        for part in rows.split([1, 4, 6]):
            statistics.update(part)
        expected = (rows - rows.mean(0)) / rows.std(0)
        torch.testing.assert_close(statistics.standardised(rows), expected, rtol=1e-5, atol=1e-5)

    def test_the_change_by_hand(self):
        model = fresh()
        editor = editor_on(model, "ultraedit", learning_rate=0.01)
        assert isinstance(editor, UltraEditEditor)
        (path,) = editor.paths
        layer = model.get_submodule(path)
        seen = {}

        def watch(layer, args, output):
            output.retain_grad()
            seen.update(h=args[0], out=output)

        handle = layer.register_forward_hook(watch)
        ids = torch.tensor([[*PROMPTS[0], *TARGETS[0]]])
        logits = model(ids).logits[0]
        start, count = len(PROMPTS[0]) - 1, len(TARGETS[0])
        chosen = logits[start : start + count].log_softmax(-1)
        loss = -chosen[torch.arange(count), torch.tensor(TARGETS[0])].mean()
        loss.backward()
        handle.remove()
        model.zero_grad(set_to_none=True)
        h = seen["h"][0, start : start + count].detach().double().numpy()
        g = seen["out"].grad[0, start : start + count].double().numpy()

        def standardised(x):
            return (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-8)

        v = -0.01 * (standardised(h) ** 2).sum(1, keepdims=True) * standardised(g)
        change = np.linalg.inv(h.T @ h + np.eye(h.shape[1])) @ h.T @ v
        before = layer.weight.detach().clone()
        editor.edit(pairs(rows=[0]))
        got = (layer.weight.detach() - before).T.numpy()
        np.testing.assert_allclose(got, change, rtol=2e-3, atol=2e-6)

    def test_the_loss_falls(self):
        model = fresh()
        forced = Examiner(model, 4, 6).forced
        asked = list(zip(PROMPTS, TARGETS, strict=True))
        before = sum(forced(asked))
        editor = editor_on(model, "ultraedit", learning_rate=0.05)
        for _ in range(8):
            editor.edit(pairs())
        assert sum(forced(asked)) > before


def test_names_and_options():
    with pytest.raises(ValueError, match="method: got 'magic', expected one of grace"):
        editor_type("magic")
    with pytest.raises(ValueError, match="ratio: method 'ft' has no such option"):
        options_of("ft", {"ratio": 0.5})
    for name, values, message in (
        ("ft", {"steps": 0}, "steps"),
        ("ft-l2", {"strength": -1.0}, "strength"),
        ("retrain", {"train_batch": 0}, "train_batch"),
        ("ultraedit", {"learning_rate": 0.0}, "learning_rate"),
        ("grace", {"radius": -1.0}, "radius"),
        ("grace-released", {"rule": "fixed"}, "rule"),
    ):
        with pytest.raises(ValueError, match=message):
            options_of(name, values)
    with pytest.raises(ValueError, match="matches no module"):
        editor_on(fresh(), "ft", target_modules=("none",))
    with pytest.raises(NotImplementedError, match="FineTuneEditor cannot take"):
        FineTuneEditor(fresh(), options_of("ft")).undo(0)
