"""The experiments on images: selection, heads, tuning splits, and what the tables say."""

import image_data
import image_selection
import image_tables
import image_targets
import images_frozen
import pytest
import torch

from sapt_fast import L2PConfig
from sapt_fast.methods.l2p_choice import PromptChoice

TASKS = [[0, 1], [2, 3]]


def split(seed: int) -> image_data.Split:
    """Ten images of each of four classes, of which the means are apart."""
    draws = torch.Generator().manual_seed(seed)
    means = 3 * torch.eye(4, 12)
    labels = torch.arange(4).repeat_interleave(10)
    features = 2 + means[labels] + torch.randn(40, 12, generator=draws)
    names = ("a", "b", "c", "d")
    return image_data.Split(labels, names, dict.fromkeys(images_frozen.FEATURES, features))


def test_tasks_and_held_out_rows():
    names = tuple("abcdef")
    tasks = image_data.tasks_of(names, 2, seed=1)
    assert sorted(sum(tasks, [])) == list(range(6))  # noqa: RUF017
    assert tasks == image_data.tasks_of(names, 2, seed=1) != image_data.tasks_of(names, 2, seed=2)
    mask = image_data.held_out(split(0).labels, 0.3, 0)
    assert mask.view(4, 10).sum(1).tolist() == [3, 3, 3, 3]


def test_choice_by_rule():
    keys = torch.eye(image_selection.PROMPTS, 16)
    query = torch.arange(16.0, 0, -1)[None]  # nearest to key 0, then 1, ...
    draws, counts = torch.Generator(), torch.zeros(image_selection.PROMPTS)
    counts[:3] = torch.tensor([5.0, 1.0, 0.0])
    nearest = image_selection.select(query, keys, "nearest", counts, draws)[1]
    assert nearest.tolist() == [[0, 1, 2, 3]]
    penalty = image_selection.select(query, keys, "penalty", counts, draws)[1]
    assert penalty.tolist() == [[2, 3, 4, 5]]
    drawn = image_selection.select(query, keys, "random", counts, draws)[1]
    assert len(set(drawn[0].tolist())) == image_selection.TOP


class Choice(torch.nn.Module, PromptChoice):
    """The library's choice of prompts, without a model."""

    attribute = "l2p"

    def __init__(self, config, keys, counts):
        super().__init__()
        self.config = config
        self.init_choice(keys.shape[1], keys.device, keys.dtype)
        self.prompt_keys = torch.nn.Parameter(keys)
        self.picked += counts.long()


@pytest.mark.parametrize("rule", ["nearest", "penalty"])
def test_the_choice_is_the_librarys(rule):
    draws = torch.Generator().manual_seed(0)
    keys = torch.rand(image_selection.PROMPTS, 16, generator=draws)
    query = torch.randn(30, 16, generator=draws)
    counts = torch.randint(5, (image_selection.PROMPTS,), generator=draws).float()
    config = L2PConfig(
        prompts=image_selection.PROMPTS, top=image_selection.TOP, diversified=rule == "penalty"
    )
    expected = Choice(config, keys, counts).pick(query, training=True)
    found = image_selection.select(query, keys, rule, counts, draws)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def test_spread():
    groups = torch.tensor([0, 0, 1, 1])
    apart = image_selection.spread(torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]]), groups)
    assert apart["exp(H)"] == pytest.approx(4)
    assert apart["mutual information"] == pytest.approx(torch.tensor(2.0).log().item())
    assert apart["one set"] == 0.5
    alike = image_selection.spread(torch.tensor([[0, 1]] * 4), groups)
    assert alike["exp(H)"] == pytest.approx(2)
    assert alike["mutual information"] == pytest.approx(0, abs=1e-12)
    assert alike["one set"] == 1


@pytest.fixture(scope="module")
def frozen():
    patch = pytest.MonkeyPatch()
    patch.setattr(images_frozen, "STEPS", 3)
    patch.setattr(images_frozen, "RATES", (0.01, 0.1))
    patch.setattr(image_selection, "STEPS", 2)
    patch.setattr(image_selection, "PROMPTS", 5)
    patch.setitem(images_frozen.CLASSES_A_TASK, "toy", 2)
    splits = {seed: (split(seed), split(seed + 10)) for seed in (0, 1)}
    found = {
        "features": {name: images_frozen.heads("toy", name, splits) for name in ("mean.9",)},
        "selection": {
            kind: {seed: image_selection.selection(kind, *parts, TASKS, seed)
                   for seed, parts in splits.items()}
            for kind in image_selection.SELECTIONS
        },
    }  # fmt: skip
    patch.undo()
    return found


def test_heads_equal_the_solutions_on_all_rows(frozen):
    for name, heads in frozen["features"]["mean.9"]["heads"].items():
        for run in heads.values() if name in images_frozen.HEADS else ():
            assert run["accuracy"] > 0.7
            assert run["relative gap to all rows at once"] < 1e-12
            assert run["predictions that differ"] == 0
            assert [len(row) for row in run["matrix"]] == [1, 2]


def test_targets_and_tables(frozen):
    targets = images_frozen.targets({"sets": {"mnist": frozen}})
    heads = frozen["features"]["mean.9"]["heads"]
    best = max(images_frozen.mean(heads[name]) for name in ("LDA", "ridge"))
    assert targets[0]["target"] == "mnist: LDA or ridge >= 0.87"
    assert (targets[0]["value"], targets[0]["reached"]) == (best, best >= 0.87)
    assert len(targets) == 7
    result = {
        "only": "images-frozen",
        "environment": {"cpu": "a CPU", "torch": "2", "date": "2026-01-01", "commit": "abc"},
        "sets": {"mnist": frozen},
        "targets": [*targets, {"target": "x >= 2", "value": 1.0, "reached": False}],
    }
    drawn = image_tables.block(result)
    assert "| x >= 2 | 1 (missed) |" in drawn
    assert "| mean patch, layer 9 | LDA |" in drawn


def test_what_did_not_run_is_named():
    run = {
        "accuracy": {"own": 0.5, "NCM": 0.4, "LDA": 0.6, "ridge": 0.7},
        "matrix": {"own": [[0.9], [0.6, 0.4]]},
        "rate": 0.001,
        "head_rate": 0.003,
        "chosen": {"exp(H)": 3.0},
        "refitted": {"LDA": 0.65, "ridge": 0.5},
        "loss of the last steps": [1.0, 0.25],
        "seconds": 61.0,
    }
    other = {**run, "accuracy": {**run["accuracy"], "own": 0.6}}
    result = {
        "only": "images",
        "environment": {"cpu": "a CPU", "torch": "2", "date": "2026-01-01", "commit": "abc"},
        "runs": {"emoji": {"L2P": {"0": run, "1": other}}},
        "not run": {"emoji": {"L2P, penalty": [0, 2]}},
        "tuning": {"L2P": {"0.01": 0.3, "0.001": 0.4}, "SAPT": {}},
        "bar": {"emoji": {"LDA": {"0": 0.7, "1": 0.8}, "sequential": {"0": 0.3, "1": 0.5}}},
    }
    result["targets"] = image_targets.targets(result["runs"], result["bar"])
    drawn = image_tables.block(result)
    assert "| L2P | 2 | 55.0 (50.0 to 60.0) | 40.0 (40.0 to 40.0) |" in drawn
    assert "| 65.0 (65.0 to 65.0) | 30.0 (30.0 to 30.0) | 0.001 / 0.003 |" in drawn  # .9 fell to .6
    assert "**Not run on emoji:** L2P, penalty (seeds 0, 2)." in drawn
    assert "| L2P | 0.001: 40.0, 0.01: 30.0 |" in drawn
    assert "SAPT |" not in drawn
    assert "| **frozen features, LDA** | 2 | 75.0 (70.0 to 80.0) |" in drawn
    assert "| emoji: L2P, own head, above sequential linear >= 0.15 | 0.15 |" in drawn
    assert "| emoji: L2P, ridge refitted on all images >= 0.5 | 0.5 |" in drawn
    assert "| emoji: L2P, ridge above own head, in each seed >= 0 | 0.1 |" in drawn
