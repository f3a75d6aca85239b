"""How a prompt pool's keys come to serve the images, learned on queries alone, without a backbone.

The loss of the keys does not depend on the prompts: `-sum cos(q, k_s) / B` over the N keys that a
query selects. So which prompts serve which images can be followed in seconds.
"""

from __future__ import annotations

import torch
from image_data import Split
from torch import Tensor

from sapt_fast.ops import topk_keys

PROMPTS, TOP = 10, 4
STEPS, BATCH, RATE = 100, 16, 0.002  # of a task; L2P's learning rate at this batch size is 0.001875
QUERY = "mean.9"
# Name: whether queries are centred, how keys start, what training selects by.
SELECTIONS: dict[str, tuple[bool, str, str]] = {
    "raw, keys uniform(0, 1)": (False, "uniform", "nearest"),
    "raw, keys from queries": (False, "queries", "nearest"),
    "centred, keys uniform(0, 1)": (True, "uniform", "nearest"),
    "centred, keys from queries": (True, "queries", "nearest"),
    "raw, penalty": (False, "uniform", "penalty"),
    "centred, penalty": (True, "uniform", "penalty"),
    "random": (False, "uniform", "random"),
}


def selection(
    kind: str, train: Split, test: Split, tasks: list[list[int]], seed: int
) -> dict[str, float]:
    """Learns the keys task after task, then selects prompts for the test images.

    Args:
        kind: a name of `SELECTIONS`.
        train, test: with the queries [N, D].
        tasks: classes of each task.
        seed: of keys and batches.

    Returns:
        "exp(H)": the effective number of prompts, from 1 to 10, of all selections of test images.
        "one set": share of test images that select the most frequent set of prompts.
        "mutual information": of a selection and the image's task, in nats; the most is log of the
        number of tasks.
        "overlap": share of the prompts that a training image selected when its task was learned, by
        the rule of training, which it selects by the rule of prediction at the end.
        "query cosine": mean cosine of two test queries.
    """
    centred, start, rule = SELECTIONS[kind]
    draws = torch.Generator().manual_seed(seed)
    queries, rows = train.states[QUERY], _rows(train, tasks)
    offset = queries[rows[0]].mean(0) * centred  # the mean of the first task, as later are unknown
    queries, inputs = queries - offset, test.states[QUERY] - offset
    keys = torch.rand(PROMPTS, queries.shape[1], generator=draws)
    if start == "queries":
        drawn = torch.randperm(len(rows[0]), generator=draws)[:PROMPTS]
        keys = queries[rows[0][drawn]].clone()
    keys.requires_grad_()
    counts = torch.zeros(PROMPTS)
    learned = torch.empty(len(queries), TOP, dtype=torch.int64)
    for task in rows:
        optimizer = torch.optim.Adam([keys], lr=RATE)
        for _ in range(STEPS):
            batch = queries[task[torch.randint(len(task), (BATCH,), generator=draws)]]
            cosines, _ = select(batch, keys, rule, counts, draws)
            optimizer.zero_grad()
            (-cosines.sum(1).mean()).backward()
            optimizer.step()
        learned[task] = select(queries[task], keys, rule, counts, draws)[1]
        counts += torch.bincount(learned[task].flatten(), minlength=PROMPTS)
    at_end = "random" if rule == "random" else "nearest"
    chosen = select(inputs, keys, at_end, counts, draws)[1]
    again = select(queries, keys, at_end, counts, draws)[1]
    common = (learned[:, :, None] == again[:, None, :]).any(2).float().mean()
    groups = torch.tensor(
        [next(i for i, task in enumerate(tasks) if int(c) in task) for c in test.labels]
    )
    unit = torch.nn.functional.normalize(inputs, dim=1)
    alike = (unit.sum(0).square().sum() - len(unit)) / (len(unit) * (len(unit) - 1))
    return {**spread(chosen, groups), "overlap": float(common), "query cosine": float(alike)}


def select(
    queries: Tensor, keys: Tensor, rule: str, counts: Tensor, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns cosines [B, N] and prompts [B, N].

    Args:
        queries: [B, D].
        keys: [M, D].
        rule: "nearest"; "penalty", cosine distance times the share of past tasks' selections;
            "random".
        counts: [M], selections of past tasks.
        draws: of "random".
    """
    if rule == "nearest" or (rule == "penalty" and not counts.any()):
        return topk_keys(queries, keys, TOP, metric="cosine")
    cosines, places = topk_keys(queries, keys, PROMPTS, metric="cosine")
    if rule == "random":
        order = torch.rand(cosines.shape, generator=draws).argsort(1)
    else:
        order = ((1 - cosines) * (counts / counts.sum())[places]).argsort(dim=1, stable=True)
    return cosines.gather(1, order[:, :TOP]), places.gather(1, order[:, :TOP])


def spread(chosen: Tensor, groups: Tensor, prompts: int = PROMPTS) -> dict[str, float]:
    """Returns "exp(H)", "one set" and "mutual information" of selections.

    Args:
        chosen: [B, N] prompts.
        groups: [B] tasks.
        prompts: M.
    """
    table = torch.zeros(int(groups.max()) + 1, prompts, dtype=torch.float64)
    table.index_put_(
        (groups[:, None].expand_as(chosen), chosen), torch.ones((), dtype=torch.float64), True
    )
    joint = table / table.sum()
    shares, tasks = joint.sum(0), joint.sum(1)
    information = _entropy(shares) + _entropy(tasks) - _entropy(joint.flatten())
    sets = chosen.sort(1).values.unique(dim=0, return_counts=True)[1]
    return {
        "exp(H)": float(_entropy(shares).exp()),
        "one set": float(sets.max() / len(chosen)),
        "mutual information": float(information),
    }


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum()


def _rows(split: Split, tasks: list[list[int]]) -> list[Tensor]:
    """Returns the rows of each task's images."""
    return [torch.isin(split.labels, torch.tensor(task)).nonzero()[:, 0] for task in tasks]
