"""How L2P chooses among the prompts of its pool, against the equations and the original code."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from tiny_vision import images, vision_model

import sapt_fast
from sapt_fast import L2PConfig
from sapt_fast.methods.l2p import L2pConfig
from sapt_fast.methods.l2p_choice import votes
from sapt_fast.storage.task_saving import renew_digests

M, N, L = 6, 2, 3


def image_model(**options):
    model = vision_model("vit")
    sapt_fast.patch(model, L2PConfig(**{"prompts": M, "top": N, "length": L, **options}))
    model.l2p.grow("first")
    return model


def text_model(**options):
    model = tiny("t5")
    sapt_fast.patch(model, L2PConfig(**{"prompts": M, "top": N, "length": L, **options}))
    model.l2p.grow("all")
    return model


def as_released(index):
    """What the original code's batchwise choice makes of each input's own choice [B, N]."""
    ids, counts = torch.unique(index, return_counts=True, sorted=True)
    missing = M - len(ids)
    ids = torch.cat([ids, torch.full((missing,), int(index.min()))])
    counts = torch.cat([counts, torch.zeros(missing, dtype=torch.int64)])
    return ids[torch.topk(counts, k=N)[1]]


def test_votes_are_those_of_the_original_code():
    torch.manual_seed(0)
    for count in (1, 2, 3, 4, 5) * 8:  # ties are frequent
        index = torch.rand(count, M).argsort(1)[:, :N]
        assert torch.equal(votes(index, M), as_released(index))


@pytest.mark.parametrize("make", [image_model, text_model])
def test_a_batch_votes_in_evaluation_too(make):
    handle = make(choice="batch").l2p
    query = torch.randn(5, handle.prompt_keys.shape[1])
    cosines = F.normalize(query, dim=1) @ F.normalize(handle.prompt_keys.detach(), dim=1).T
    chosen = as_released(cosines.topk(N)[1])
    found, index = handle.pick(query, False)
    assert index.tolist() == [chosen.tolist()] * 5
    torch.testing.assert_close(found, cosines[:, chosen])
    assert handle.pick(query[:0], True)[1].shape == (0, N)
    handle.picked = torch.tensor([5, 0, 0, 3, 1, 1])  # the penalty, then the vote
    distances = (1 - cosines) * handle.picked / 10
    nearest = torch.stack([
        torch.tensor(sorted(range(M), key=lambda m: (float(d[m]), -float(c[m])))[:N])
        for d, c in zip(distances, cosines, strict=True)
    ])  # fmt: skip
    assert handle.pick(query, True)[1].tolist() == [as_released(nearest).tolist()] * 5


def test_random_and_fixed_choices_read_no_keys():
    fixed, drawn = image_model(choice="fixed").l2p, image_model(choice="random").l2p
    x = images(200)
    assert fixed.signal(pixel_values=x).tolist() == [[0, 1]] * 200
    index = drawn.signal(pixel_values=x)
    assert all(len({*row}) == N for row in index.tolist())
    counts = torch.bincount(index.flatten(), minlength=M)
    assert ((counts - 200 * N / M).abs() < 40).all()
    assert not torch.equal(index, drawn.signal(pixel_values=x))
    for handle in (fixed, drawn):
        assert not handle.prompt_keys.requires_grad
        assert handle.key_loss() == handle.key_loss(x) == 0


def test_one_shared_prompt():
    model = image_model(prompts=1, top=1)
    logits = model.train()(images()).logits
    assert model.l2p.attention.tolist() == [[0]] * 3
    assert torch.equal(model.eval()(images()).logits, logits)


@pytest.mark.parametrize("make", [image_model, text_model])
def test_each_task_trains_its_own_prompts(make):
    model = make(task_prompts=True, shared_pool_copy=True)
    handle = model.l2p
    query = torch.randn(3, handle.prompt_keys.shape[1])
    rows = handle.prompts.rows
    before = rows.rows().clone()
    optimizer = torch.optim.Adam(handle.trainable_parameters(), lr=0.1)
    handle.pull(handle.pick(query, True)[0]).backward()
    assert (handle.prompt_keys.grad != 0).any(1).tolist() == [True] * N + [False] * (M - N)
    rows.trainable.grad = torch.ones_like(rows.trainable)
    optimizer.step()
    assert rows.trainable in optimizer.state
    handle.grow("second", optimizer)
    assert not {rows.trainable, handle.prompt_keys} & {*optimizer.state}  # no momentum is left
    size = N * L
    assert torch.equal(rows.rows()[size : 2 * size], rows.rows()[:size])
    assert not torch.equal(rows.rows()[:size], before[:size])
    assert handle.pick(query, True)[1].tolist() == [[2, 3]] * 3
    cosines = F.normalize(query, dim=1) @ F.normalize(handle.prompt_keys, dim=1).T
    assert handle.pick(query, False)[1].tolist() == cosines.topk(N)[1].tolist()
    handle.grow("third")
    tasks = [*handle.tasks]
    with pytest.raises(ValueError, match=r"got task 4 for a pool of 6 prompts, .*at most 3 tasks"):
        handle.grow("fourth")
    assert (handle.tasks, handle.begun) == (tasks, 3)


def test_centred_queries_spread_the_choice():
    """Queries in a narrow cone have the same nearest keys, until their mean is subtracted."""
    torch.manual_seed(0)
    near = torch.randn(1, 16) + 0.3 * torch.randn(400, 16)
    spread = {}
    for centre in (False, True):
        handle = image_model(centre_queries=centre, keys_start="uniform01").l2p
        if centre:
            with pytest.raises(RuntimeError, match=r"centre_queries .*call model\.l2p\.start_from"):
                handle.pick(near, True)
            handle.start_keys(near)
            torch.testing.assert_close(handle.centre, near.mean(0))
        share = handle.count([near], False) / (400 * N)
        spread[centre] = float(torch.special.entr(share).sum().exp())
    assert spread[True] > spread[False] + 1


def test_keys_and_prompts_start_from_the_first_images():
    model = image_model(keys_start="queries", prompt_start="patches", layer=1)
    handle, x = model.l2p, images(40)
    with pytest.raises(ValueError, match="batches: got 3 inputs, expected at least 6"):
        handle.start_from([images(3)])
    handle.start_from([x[:20], (x[20:],)])
    query = handle.query(x)
    gaps = (handle.prompt_keys.detach()[:, None] - query).norm(dim=2).min(1)
    assert gaps.values.max() < 1e-4
    assert len({*gaps.indices.tolist()}) == M
    hidden = []
    handle._parts.layers[0].register_forward_hook(lambda m, a, y: hidden.append(y[:, 1:]))
    with handle.queries(query):
        model(x)
    rows = handle.prompts.rows.rows() + handle._parts.cls_position()
    patches = hidden[0].flatten(0, 1)
    error = patches.std(0) / (M * L) ** 0.5
    assert ((rows.mean(0) - patches.mean(0)).abs() < 4 * error).all()
    assert 0.6 < (rows.std(0) / patches.std(0)).mean() < 1.4
    with pytest.raises(RuntimeError, match="1 tasks begun, after start_from"):
        handle.start_from([x])


def test_the_histogram_counts_predictions_and_changes_nothing():
    model, x = image_model(), images(10)
    handle = model.l2p
    handle.count_picks([x[:6], x[6:]])
    assert handle.picked.sum() == 10 * N
    before = handle.picked.clone()
    counts = handle.histogram([x])
    index = handle.pick(handle.query(x), False)[1]
    assert counts.tolist() == torch.bincount(index.flatten(), minlength=M).tolist()
    assert torch.equal(handle.picked, before)


@pytest.mark.parametrize("make", [image_model, text_model])
def test_warmup_runs_what_chooses_and_changes_nothing(make, monkeypatch):
    handle, called = make().l2p, []
    chosen = type(handle.routing.pool).chosen
    monkeypatch.setattr(
        type(handle.routing.pool), "chosen", lambda own, i: called.append(i.shape) or chosen(own, i)
    )
    for train in (False, True):
        handle.warmup([(3, 2)], train=train)
    assert set(called) == {(3, N)}
    assert all(p.grad is None for p in handle.parameters())
    assert not handle.picked.any()


def test_the_earlier_name_of_the_config_stays():
    assert L2pConfig is L2PConfig
    for strength in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"strength: got {strength}, expected a finite"):
            L2PConfig(strength=strength)
    with pytest.raises(ValueError, match="layer: got 1, expected 0 for text"):
        sapt_fast.patch(tiny("t5"), L2PConfig(layer=1))


def test_texts_have_a_centre_which_is_saved(tmp_path):
    model = text_model(centre_queries=True, keys_start="queries", prompt_start="normal")
    ids = torch.arange(40).view(8, 5)
    mask = torch.ones_like(ids)
    model.l2p.start_from([(ids, mask)])
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(model.l2p.centre, table[ids].mean(1).mean(0))
    assert 0.01 < model.l2p.prompts.rows.rows().std() < 0.03
    model.l2p.grow("again")
    model.l2p.save_pretrained(tmp_path)
    other = sapt_fast.load_pretrained(tiny("t5"), tmp_path)
    assert torch.equal(other.l2p.centre, model.l2p.centre)
    assert (other.l2p.begun, other.l2p.started) == (2, True)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :2]}
    model.eval()(**inputs)
    other.eval()(**inputs)
    assert torch.equal(other.l2p.attention, model.l2p.attention)


def test_folders_of_earlier_versions_load(tmp_path):
    model = text_model()
    model.l2p.save_pretrained(tmp_path)
    path = tmp_path / "strategy.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n in ("keys", "picked")}, path)
    description = json.loads((tmp_path / "sapt_config.json").read_text())
    new = "choice task_prompts shared_pool_copy centre_queries keys_start prompt_start layer head"
    for name in (*new.split(), "query_layer", "query_pooling"):
        del description["config"][name]
    (tmp_path / "sapt_config.json").write_text(json.dumps(description))
    renew_digests(tmp_path)
    other = sapt_fast.load_pretrained(tiny("t5"), tmp_path)
    assert torch.equal(other.l2p.prompt_keys, model.l2p.prompt_keys)
    assert (other.l2p.tasks, other.l2p.begun) == (["all"], 1)
