"""The released behaviour of GRACE, against a second implementation of its rules."""

import pytest
import torch
from tiny_models import tiny
from torch import nn

import sapt_fast
from sapt_fast.methods.grace import GraceConfig

LAYER = "encoder.block.1.layer.1.DenseReluDense.wo"
STEPS = 6


class Adapter(nn.Module):
    """A codebook around a linear layer, worked through one edit at a time on plain lists."""

    def __init__(self, layer, epsilon, rule, replacement):
        super().__init__()
        self.layer = [layer]
        self.weight = layer.weight
        self.epsilon, self.rule, self.replacement = epsilon, rule, replacement
        self.keys, self.epsilons, self.values, self.labels = [], [], [], []
        self.label = None  # of the edit whose first step comes next

    def nearest(self, query):
        distances = [float((query - key).pow(2).sum().sqrt()) for key in self.keys]
        return min(range(len(distances)), key=distances.__getitem__), min(distances)

    def place(self, query, value):
        if not self.keys:
            return self.append(query, value, self.epsilon)
        i, d = self.nearest(query)
        if d > self.epsilon + self.epsilons[i]:
            return self.append(query, value, self.epsilon)
        if self.label.float().mean() != self.labels[i].float().mean():
            self.append(query, value, d / 2)
            self.epsilons[i] = d / 2 - 1e-5
        elif d > self.epsilons[i]:
            self.epsilons[i] = d
            if self.rule == "moving_average":
                self.keys[i] = 0.5 * query + 0.5 * self.keys[i]
        return None

    def append(self, query, value, epsilon):
        self.keys.append(query.detach().clone())
        self.values.append(nn.Parameter(value.detach().clone()))
        self.epsilons.append(epsilon)
        self.labels.append(self.label)

    def forward(self, x):
        out = self.layer[0](x)
        query = x[0, -1]
        if self.label is not None:
            self.place(query, out[0, -1])
            self.label = None
        if not self.keys:
            return out
        i, d = self.nearest(query)
        if d > self.epsilons[i]:
            return out
        out = out.clone()
        where = {
            "replace_all": slice(None),
            "replace_last": slice(-1, None),
            "replace_prompt": slice(None, -1),
        }
        out[:, where[self.replacement]] = self.values[i]
        return out


def edits(count):
    generator = torch.Generator().manual_seed(3)
    near = torch.randint(3, 97, (1, 7), generator=generator)
    for number in range(count):
        ids = near.clone()
        ids[0, number % 3] = 3 + number  # a few texts that are near each other
        labels = torch.tensor([[20 + number % 2, 30, 1]])
        if number == 4:
            labels = torch.tensor([[30, 20, 1]])  # another label with the same mean
        yield ids, labels


@pytest.mark.parametrize(
    ("rule", "replacement", "epsilon"),
    [
        ("coverage", "replace_all", 0.05),
        ("coverage", "replace_prompt", 1.0),
        ("moving_average", "replace_last", 0.05),
        ("moving_average", "replace_all", 1.0),
    ],
)
def test_the_rules(rule, replacement, epsilon):
    model, other = tiny("t5"), tiny("t5")
    other.requires_grad_(False)
    parent = other.get_submodule(LAYER.rpartition(".")[0])
    adapter = Adapter(parent.wo, epsilon, rule, replacement)
    parent.wo = adapter
    config = GraceConfig.released(
        (LAYER,), rule=rule, replacement=replacement, radius=epsilon, steps=STEPS
    )
    sapt_fast.patch(model, config)
    (book,) = model.grace.books().values()
    for ids, labels in edits(7):
        model.grace.edit(ids[0], labels[0])
        adapter.label = labels
        other(input_ids=ids, labels=labels)
        optimizer = torch.optim.Adam([*adapter.values], lr=1.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = other(input_ids=ids, labels=labels).loss
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(book.keys, torch.stack(adapter.keys))
        torch.testing.assert_close(book.radii, torch.tensor(adapter.epsilons), atol=2e-5, rtol=1e-4)
        values = torch.stack([value.detach() for value in adapter.values])
        torch.testing.assert_close(book.values, values, atol=1e-4, rtol=1e-3)
        with torch.no_grad():
            pair = [m(input_ids=ids, labels=labels).logits for m in (model, other)]
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3)
    assert 1 <= len(book) <= 7


def test_edits_share_values_and_cannot_be_taken_back():
    model = sapt_fast.patch(tiny("t5"), GraceConfig.released((LAYER,), radius=50.0, steps=2))
    model.grace.edit([5, 6, 7], [20, 1])
    model.grace.edit([5, 6, 8], [20, 1])
    assert [e.radius is None for e in model.grace.edits] == [False, True]
    with pytest.raises(ValueError, match="cannot be taken back"):
        model.grace.undo(1)


def test_every_forward_looks_up_again():
    """The last token decides, also in a decoding step."""
    layer = "model.layers.0.mlp.down_proj"
    model = tiny("llama")
    config = GraceConfig.released((layer,), radius=1e-3, steps=2)
    model = sapt_fast.patch(model, config)
    model.grace.edit([5, 6, 7], [20, 1])
    (edited,) = model.grace.layers.values()
    edited.codebook.hits.zero_()
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert edited.codebook.hits.tolist() == [1]
