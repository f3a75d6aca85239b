"""Heads from running statistics against solutions on all rows at once."""

import pytest
import torch

from sapt_fast.continual.closed_form import ClassStatistics

HEADS = {
    "ncm": lambda statistics: statistics.nearest_class_mean(),
    "lda": lambda statistics: statistics.lda(0.3),
    "ridge": lambda statistics: statistics.ridge(10.0),
}
CLASSES = 5


def rows(count, width, seed=0, classes=CLASSES):
    """Features with unlike scales and a large common offset, and labels of all classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[:classes] = torch.arange(classes)
    means = torch.randn(CLASSES, width, generator=generator)
    scales = torch.logspace(-1, 1, width)
    noise = torch.randn(count, width, generator=generator)
    return 20 + (noise + means[labels]) * scales, labels


def statistics_of(features, labels, parts=1):
    statistics = ClassStatistics(features.shape[1], CLASSES)
    for part in torch.arange(len(labels)).chunk(parts):
        statistics.update(features[part], labels[part])
    return statistics


def scores_at_once(name, features, labels, inputs):
    """The textbook solutions on all rows, in float64, up to a term that all classes share."""
    x, inputs = features.double(), inputs.double()
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
    means = torch.stack([x[labels == c].mean(0) for c in range(CLASSES)])
    if name == "ncm":
        return -0.5 * torch.cdist(inputs, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    if name == "ridge":
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        penalty = torch.eye(x.shape[1] + 1, dtype=x.dtype) * 10.0
        penalty[-1, -1] = 0  # of the bias
        weight = torch.linalg.solve(design.T @ design + penalty, design.T @ one_hot)
        return torch.cat([inputs, torch.ones(len(inputs), 1, dtype=x.dtype)], 1) @ weight
    residual = x - means[labels]
    covariance = residual.T @ residual / len(x)
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    covariance = 0.7 * covariance + 0.3 * covariance.trace() / x.shape[1] * identity
    offsets = inputs[:, None] - means  # [B, C, D]
    distances = (offsets * torch.linalg.solve(covariance, offsets.mT).mT).sum(-1)
    return one_hot.mean(0).log() - 0.5 * distances


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("count", "width"), [(200, 16), (30, 47), (CLASSES, 8)])
def test_sequential_heads_equal_the_batch_solution(name, count, width):
    features, labels = rows(count, width)
    if count == CLASSES and name == "lda":
        name = "ncm"  # no covariance: documented as the nearest class mean
        head = statistics_of(features, labels, parts=CLASSES).lda()
    else:
        # Sorted by class: a class is in one part or two, and parts lack classes.
        order = labels.argsort()
        head = HEADS[name](statistics_of(features[order], labels[order], parts=7))
    inputs, _ = rows(40, width, seed=1)
    found, expected = head(inputs), scores_at_once(name, features, labels, inputs)
    shared = name != "ridge"
    gap = (found - expected) - shared * (found - expected).mean(1, keepdim=True)
    assert gap.abs().max() <= 1e-9 * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("name", HEADS)
def test_order_and_merges_do_not_matter(name):
    features, labels = rows(101, 12)
    whole = HEADS[name](statistics_of(features, labels))
    shuffled = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    first = statistics_of(features[shuffled[:40]], labels[shuffled[:40]], parts=9)
    second = statistics_of(features[shuffled[40:]], labels[shuffled[40:]])
    before = second.state_dict()
    first.merge(ClassStatistics(12, CLASSES))
    first.merge(second)
    empty = ClassStatistics(12, CLASSES)
    empty.load_state_dict(first.state_dict())
    for head in (HEADS[name](first), HEADS[name](empty)):
        torch.testing.assert_close(head.weight, whole.weight, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(head.bias, whole.bias, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in second.state_dict().items())


@pytest.mark.parametrize("name", HEADS)
def test_classes_without_rows_score_minus_infinity(name):
    features, labels = rows(50, 6, classes=3)
    statistics = statistics_of(features, labels * 2 % CLASSES)  # classes 0, 2, 4
    scores = HEADS[name](statistics)(features.bfloat16())
    assert scores.dtype == torch.float64
    assert torch.isneginf(scores[:, [1, 3]]).all()
    assert scores[:, [0, 2, 4]].isfinite().all()
    statistics.update(features, torch.ones(50, dtype=torch.uint8))  # the class is seen later
    assert HEADS[name](statistics)(features)[:, 1].isfinite().all()
    assert HEADS[name](statistics)(features[:0]).shape == (0, CLASSES)


def test_equal_rows_have_no_covariance():
    features, labels = rows(CLASSES, 6)
    statistics = statistics_of(features.repeat(3, 1), labels.repeat(3), parts=4)
    assert torch.equal(statistics.lda().weight, statistics.nearest_class_mean().weight)


def test_float64_sums_under_autocast_and_far_from_zero():
    features, labels = rows(64, 6)
    near, far = statistics_of(features, labels), ClassStatistics(6, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        far.update((features.double() + 1e6).requires_grad_(), labels)
    torch.testing.assert_close(far.scatter, near.scatter, rtol=1e-6, atol=1e-6)
    assert not far.scatter.requires_grad


BAD_ROWS = [
    (torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), [0, 1], "features: got NaN or Inf in row 1"),
    (torch.tensor([[torch.inf, 2.0]]), [0], "features: got NaN or Inf in row 0"),
    (torch.full((1, 2), 1e200, dtype=torch.float64), [0], "features: got values whose squares"),
    (torch.ones(2, 3), [0, 1], r"features: got torch.float32 \[2, 3\], expected floats \[B, 2\]"),
    (torch.ones(2, dtype=torch.float32), [0, 1], "features: got"),
    (torch.ones(2, 2, dtype=torch.int64), [0, 1], "features: got torch.int64"),
    (torch.ones(2, 2), [0], r"labels: got torch.int64 \[1\], expected integers \[2\]"),
    (torch.ones(2, 2), [0.0, 1.0], "labels: got torch.float32"),
    (torch.ones(2, 2), [0, CLASSES], r"labels: got 5, expected classes in \[0, 5\)"),
    (torch.ones(2, 2), [-1, 0], "labels: got -1"),
]


@pytest.mark.parametrize(("features", "labels", "message"), BAD_ROWS)
def test_bad_rows_are_named_and_change_nothing(features, labels, message):
    statistics = statistics_of(torch.eye(2), torch.tensor([0, 1]))
    before = statistics.state_dict()
    with pytest.raises(ValueError, match=message):
        statistics.update(features, torch.tensor(labels))
    assert all(torch.equal(value, before[key]) for key, value in statistics.state_dict().items())


def test_other_bad_input_is_named():
    statistics = ClassStatistics(2, CLASSES)
    for head in (*HEADS.values(), lambda s: s.ridge(0.0), lambda s: s.lda(0.0)):
        with pytest.raises(ValueError, match="statistics: got no rows"):
            head(statistics)
    statistics.update(torch.eye(2), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"features: got NaN or Inf in row 0"):
        statistics.nearest_class_mean()(torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match=r"shrinkage: got 0.0, expected more"):
        statistics.lda(0.0)
    with pytest.raises(ValueError, match=r"strength: got 0.0, expected more"):
        statistics.ridge(0.0)
    with pytest.raises(ValueError, match=r"shrinkage: got 1.5"):
        statistics.lda(1.5)
    with pytest.raises(ValueError, match=r"other: got means of shape \[5, 3\]"):
        statistics.merge(ClassStatistics(3, CLASSES))
    state = statistics.state_dict()
    for name, value in (("scatter", state["scatter"] * torch.nan), ("counts", -state["counts"])):
        with pytest.raises(ValueError, match=f"{name}: got negative counts, NaN or Inf"):
            statistics.load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match=r"means: got torch.float32"):
        statistics.load_state_dict({**state, "means": state["means"].float()})
    with pytest.raises(ValueError, match="state: got"):
        statistics.load_state_dict({"counts": state["counts"]})
