"""The pool of prompts: new tasks, what is frozen, optimizers, dtypes, gradients."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, WIDTH, token_ids
from tiny_prompts import LENGTH, prompted
from torch import nn

from sapt_fast.pools.prompts import PromptPool


def test_new_prompts_are_rows_of_the_vocabulary():
    model = prompted("bart", tasks=0, prompt_length=40)
    model.sapt.add_task("first")
    model.sapt.add_task("second")
    embedding = model.get_input_embeddings()
    table = embedding(torch.arange(VOCABULARY))
    prompts = [model.sapt.prompts.prompt(k) for k in range(2)]
    for prompt in prompts:
        assert (prompt[:, None] == table).all(-1).any(1).all()
        assert len(prompt.unique(dim=0)) > 10
    assert not torch.equal(*prompts)


def test_a_new_task_copies_nothing_and_freezes_the_earlier():
    model = prompted("llama", tasks=2, reserve_tasks=3)
    pool = model.sapt.prompts
    before, address = pool.rows.rows().clone(), pool.rows.rows().data_ptr()
    model.sapt.add_task("next")
    assert pool.rows.rows().data_ptr() == address
    assert torch.equal(pool.rows.rows()[: 2 * LENGTH], before)
    assert not pool.rows.frozen.requires_grad
    assert pool.rows.trainable.shape == (LENGTH, WIDTH)
    model.sapt.add_task("beyond the room")
    assert torch.equal(pool.rows.rows()[: 2 * LENGTH], before)
    assert len(pool) == 4
    trained = {id(p) for p in model.sapt.trainable_parameters()}
    router = model.sapt.router
    expected = [
        pool.rows.trainable,
        *(p for p in router.parameters() if p is not router.keys.frozen),
    ]
    assert trained == {id(p) for p in expected}


def test_an_optimizer_follows_to_the_new_task():
    model, ids = prompted("llama", tasks=1), token_ids()
    optimizer = torch.optim.AdamW(model.sapt.trainable_parameters(), lr=0.1, weight_decay=0.5)

    def step():
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    first = model.sapt.prompts.prompt(0).clone()
    model.sapt.add_task("next", optimizer)
    second = model.sapt.prompts.prompt(1).clone()
    step()
    assert torch.equal(model.sapt.prompts.prompt(0), first)
    assert not torch.equal(model.sapt.prompts.prompt(1), second)
    with pytest.raises(ValueError, match="optimizer: contains none"):
        model.sapt.add_task("third", torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    assert len(model.sapt.prompts) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_pool_follows_the_model(dtype):
    model, ids = prompted("llama"), token_ids()
    values = model.sapt.prompts.rows.rows().clone()
    model.to(dtype)
    rows = model.sapt.prompts.rows
    assert torch.equal(rows.rows(), values.to(dtype))
    assert rows.trainable.data_ptr() == rows.rows()[2 * LENGTH :].data_ptr()
    assert model(ids).logits.dtype == dtype


def test_pool_gradients_in_float64():
    torch.manual_seed(0)
    pool = PromptPool(2, 4, dtype=torch.float64)
    for _ in range(3):
        pool.add(torch.randn(2, 4))
    embedding = nn.Embedding(7, 4, dtype=torch.float64)
    mixture = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (2, 5))

    def mixed(mixture, newest):
        return pool(mixture, embedding, ids)

    assert torch.autograd.gradcheck(mixed, (mixture, pool.rows.trainable))
    prompts = torch.stack([pool.prompt(k) for k in range(3)])
    expected = torch.cat([torch.einsum("bk,kpd->bpd", mixture, prompts), embedding(ids)], 1)
    torch.testing.assert_close(pool(mixture, embedding, ids), expected)
    torch.testing.assert_close(pool(mixture, embedding, None, embedding(ids)), expected)


def test_a_prompt_of_another_shape_changes_nothing():
    model = prompted("llama", tasks=1)
    for prompt, key in (
        (torch.zeros(4, WIDTH), torch.zeros(WIDTH)),
        (torch.zeros(LENGTH, WIDTH), torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match=r"(prompt|key): got shape"):
            model.sapt.restore_task("new", prompt, key)
    assert model.sapt.tasks == ["task0"]
    assert len(model.sapt.prompts) == len(model.sapt.router.keys) == 1


def test_reflection_loss_and_key_init_know_no_prompt():
    """They pool the embeddings of the tokens alone, as the router of a forward does."""
    model, ids = prompted("llama"), token_ids()
    weights = model.sapt.route(ids).detach()
    expected = F.kl_div(weights.log(), torch.eye(3)[0].expand(3, 3), reduction="batchmean")
    torch.testing.assert_close(model.sapt.reflection_loss(ids, torch.ones(1)), expected)
    model(ids)
    torch.testing.assert_close(model.sapt.attention, weights)
    model.sapt.init_key(ids)
    model.sapt.reflection_loss(ids, torch.ones(1)).backward()
    assert model.sapt.router.keys.trainable.grad is not None
    assert model.sapt.prompts.rows.trainable.grad is None
