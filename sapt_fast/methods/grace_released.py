"""An edit as the released code of GRACE makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapt_fast.methods.edits.fitting import fit, queries
from sapt_fast.methods.edits.handle import evaluating
from sapt_fast.methods.edits.texts import kind_of
from sapt_fast.pools.codebook import Codebook

__all__ = ["edit_as_released"]


def edit_as_released(handle: Any, prompt: Tensor, target: Tensor) -> int:
    """Makes one edit; returns its number.

    With (d, i) the distance and index of the nearest key, eps the radius of new keys:

        no keys, or d > eps + eps_i : a new key, radius eps
        another label               : a new key, radius d / 2, and eps_i = d / 2 - 1e-5
        d > eps_i                   : eps_i = d, with moving_average also k_i = (q + k_i) / 2

    Then the value of the key that is nearest now is trained, whichever edit made it.

    Args:
        handle: the `GraceHandle`.
        prompt, target: [T] int64.
    """
    layers = handle.layers
    with evaluating(handle._model):
        texts = handle.texts([(prompt, target)])
        looked, own = queries(texts, layers, handle.prompts, None)
        (edit,) = handle.log.add([prompt], [target]).tolist()
        start, rows = {}, {}
        for path, layer in layers.items():
            query = looked[path]
            _place(handle, layer.codebook, query, own[path], edit)
            found = layer.codebook.find(query)
            if bool(found.acts):
                rows[path] = int(found.row)
                start[path] = layer.codebook.values_at(found.row, found.row[:, None] * 0)[:, 0]
        if rows:
            trained = {path: layers[path] for path in rows}
            values = fit(texts, trained, handle.prompts, start, handle.options()).values
            for path, row in rows.items():
                layers[path].codebook.set_value(row, values[path][0])
    return int(edit)


def _place(handle: Any, book: Codebook, query: Tensor, own: Tensor, edit: int) -> None:
    """Adds a key, or moves and widens the nearest one."""
    config = handle.config
    found = book.find(query)
    distance, row = float(found.distance), int(found.row)
    near = row >= 0 and distance <= config.radius + float(book.radii[row])
    if near and _labels_match(handle, edit, int(book.edits[row])):
        if distance > float(book.radii[row]):
            moving = config.rule == "moving_average"
            book.move(row, distance, (query[0].float() + book.keys[row]) / 2 if moving else None)
        return
    value = torch.rand_like(own) if config.cold else own
    radius = distance / 2 if near else config.radius
    numbers = torch.tensor([edit], device=book.edits.device)
    book.add(query, [value], torch.tensor([radius]), numbers)
    if near:
        book.move(row, distance / 2 - 1e-5, None)


def _labels_match(handle: Any, edit: int, other: int) -> bool:
    """Whether the labels of two edits have the same mean, as the released code compares them.

    Labels of a decoder-only model are -100 for each token of the prompt.
    """
    causal = kind_of(handle._model) == "causal"
    texts = dict(handle.numbered())
    means = []
    for number in (edit, other):
        prompt, target = texts[number]
        labels = [-100] * len(prompt) * causal + [*target]
        means.append(torch.tensor(labels, dtype=torch.float32).mean())
    return bool(means[0] == means[1])
