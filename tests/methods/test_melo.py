"""MELO: blocks of LoRA act where their edits are, and nowhere else."""

import copy

import pytest
import torch
from tiny_models import run, tiny, token_ids

import sapt_fast
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.methods.edits.inputs import EditError
from sapt_fast.methods.grace import GraceConfig
from sapt_fast.methods.melo import MeloConfig
from sapt_fast.pools.clusters import Clusters

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
TARGETS = [[20, 30, 1], [21, 31, 1], [22, 1]]
PAIRS = list(zip(PROMPTS, TARGETS, strict=True))


def fresh(family):
    if family == "t5":
        return load_backbone()
    return tiny(family, initializer_range=0.3)


def edited(family="llama", pairs=PAIRS, **fields):
    config = MeloConfig(**{"radius": 1e-2, "steps": 400, "margin": 1.0, **fields})
    model = sapt_fast.patch(fresh(family), config)
    model.melo.edit(pairs, batch_size=2)
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def model(request):
    return edited(request.param)


def answers(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    row = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    row = row[1 if model.config.is_encoder_decoder else len(prompt) :]
    return row[: row.index(1) + 1] if 1 in row else row


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_every_edit_is_answered(model, options):
    assert [answers(model, prompt, **options) for prompt in PROMPTS] == TARGETS


def test_other_prompts_give_the_same_bits(model):
    ids = token_ids() % 60 + 3
    assert torch.equal(run(model, ids), run(fresh(model.config.model_type), ids))


def test_edits_trained_together_share_a_block(model):
    (layer,) = model.melo.layers.values()
    assert len(layer.blocks) == 2
    assert model.melo.keys.clusters.blocks.tolist() == [0, 0, 1]


def test_the_equation():
    """A block is LoRA: near its edit, the layer computes as with a changed weight."""
    model, bare = edited(pairs=[([9], [20, 1])]), fresh("llama")
    ((path, layer),) = model.melo.layers.items()
    ids = torch.tensor([[9]])
    with torch.no_grad():
        bare.get_submodule(path).weight += layer.blocks.b[0].t() @ layer.blocks.a[0]
    torch.testing.assert_close(run(model, ids), run(bare, ids))


def test_tokens_before_the_last_are_read_unchanged():
    model, ids = edited(pairs=PAIRS[:1]), torch.tensor([PROMPTS[0]])
    got, before = run(model, ids), run(fresh("llama"), ids)
    torch.testing.assert_close(got[:, :3], before[:, :3])
    assert not torch.allclose(got[:, 3], before[:, 3])


def test_undo():
    model = edited(pairs=PAIRS[:2])
    before = [run(model, torch.tensor([p])) for p in PROMPTS]
    model.melo.undo(model.melo.edit(*PAIRS[2]))
    for prompt, expected in zip(PROMPTS, before, strict=True):
        assert torch.equal(run(model, torch.tensor([prompt])), expected)
    model.melo.undo(0)
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(run(model, ids), run(fresh("llama"), ids))
    assert answers(model, PROMPTS[1]) == TARGETS[1]


def test_a_fact_that_changes():
    model = edited(pairs=PAIRS[:1])
    model.melo.edit(PROMPTS[0], TARGETS[1])
    assert answers(model, PROMPTS[0]) == TARGETS[1]
    model.melo.undo(1)
    assert answers(model, PROMPTS[0]) == TARGETS[0]


def test_save_and_load_beside_grace(tmp_path):
    model = edited(pairs=PAIRS[:2])
    sapt_fast.patch(
        model,
        GraceConfig(target_modules=("layers.0.mlp.up_proj",), radius=1e-3, replacement="per_token"),
    )
    model.grace.edit(*PAIRS[2])
    model.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(fresh("llama"), tmp_path)
    assert loaded.melo.edits == model.melo.edits
    assert [answers(loaded, p) for p in PROMPTS] == TARGETS
    other = copy.deepcopy(loaded)
    sapt_fast.unpatch(other, "melo")
    assert answers(other, PROMPTS[2]) == TARGETS[2]
    assert answers(loaded, PROMPTS[0]) == TARGETS[0]


def test_points_join_the_nearest_ball():
    clusters = Clusters(2, False, 1.0, torch.device("cpu"))
    points = torch.tensor([[0.0, 0.0], [0.8, 0.0], [5.0, 0.0], [1.6, 0.0], [1.3, 0.0]])
    for edit, point in enumerate(points):
        clusters.add(point[None], torch.tensor([edit]), block=edit)
    centres, radii, member = clusters.balls()
    # .8 joins 0 (centre .4); 1.6 is 1.2 from it and begins a ball; 1.3 is nearest to that one
    assert member.tolist() == [0, 0, 1, 2, 2]
    torch.testing.assert_close(centres[:, 0], torch.tensor([0.4, 5.0, 1.45]))
    torch.testing.assert_close(radii, torch.ones(3))
    found = clusters.find(torch.tensor([[0.9, 0.0], [1.0, 0.0], [3.0, 0.0]]))
    assert found.row[:2].tolist() == [1, 4]
    assert found.acts.tolist() == [True, True, False]


def test_a_ball_grows_with_its_farthest_point():
    clusters = Clusters(1, False, 1.0, torch.device("cpu"))
    clusters.add(torch.tensor([[0.0], [0.9], [1.4], [1.9]]), torch.arange(4), block=0)
    _, radii, member = clusters.balls()
    assert member.tolist() == [0, 0, 0, 1]  # 1.9 is 1.13 from the centre .77
    torch.testing.assert_close(radii, torch.ones(2))
    wide = Clusters(1, False, 1.0, torch.device("cpu"))
    wide.add(torch.tensor([[0.0], [-1.0], [0.5], [0.8]]), torch.arange(4), block=0)
    _, radii, member = wide.balls()
    assert member.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(radii, torch.tensor([1.075]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: "),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"keys": "first"}, "keys"),
        ({"key_module": "nothing"}, "key_module: the model has no layer"),
        ({"key_module": "model.layers.1.mlp.down_proj"}, "key_module: got"),
        ({"target_modules": ("nothing",)}, "matches no module"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        sapt_fast.patch(tiny("llama"), MeloConfig(**fields))


def test_what_does_not_fit_changes_nothing():
    model = sapt_fast.patch(tiny("llama"), MeloConfig(steps=1))
    with pytest.raises(EditError, match="after 1 steps"):
        model.melo.edit(PAIRS)
    assert model.melo.tasks == []
    assert not any(m._forward_hooks for m in model.modules())


def test_points_added_one_by_one_join_as_together():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 2, generator=generator) * 2
    one, together = (Clusters(2, False, 1.0, torch.device("cpu")) for _ in range(2))
    together.add(points, torch.arange(60), block=0)
    for edit, point in enumerate(points):
        one.add(point[None], torch.tensor([edit]), block=0)
        one.balls()
    for got, expected in zip(one.balls(), together.balls(), strict=True):
        assert torch.equal(got, expected)
    for clusters in (one, together):
        clusters.replace(3, 59)
        clusters.remove(10)
    for got, expected in zip(one.balls(), together.balls(), strict=True):
        assert torch.equal(got, expected)


def test_points_that_another_cluster_would_catch_are_named():
    clusters = Clusters(1, False, 1.0, torch.device("cpu"))
    clusters.add(torch.tensor([[0.0], [0.9], [1.4], [-1.0]]), torch.arange(4), block=0)
    assert clusters.strays() == []
    clusters.add(torch.tensor([[-0.2]]), torch.tensor([4]), block=1)
    # 0 is .77 from the centre of its own cluster, and .6 from that of -1 and -.2
    assert clusters.balls()[2].tolist() == [0, 0, 0, 1, 1]
    assert clusters.strays() == [0]
