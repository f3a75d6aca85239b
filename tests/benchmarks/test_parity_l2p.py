"""parity_l2p replays recordings of any sizes, and finds faults in them."""

import json

import parity_l2p
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

M, N, L, D, B, T = 6, 2, 3, 8, 5, 4


def recording(seed=0):
    """Both choices with mean pooling, computed in plain torch."""
    torch.manual_seed(seed)
    tensors = {}
    for choice in ("per_sample", "batchwise"):
        prompt, key = torch.randn(M, L, D).requires_grad_(), torch.randn(M, D).requires_grad_()
        x, w = torch.randn(B, T, D).requires_grad_(), torch.randn(B, N * L + T, D)
        similarity = F.normalize(x.mean(1), dim=1) @ F.normalize(key, dim=1).T
        index = similarity.topk(N)[1]
        if choice == "batchwise":
            ids, counts = index.unique(return_counts=True, sorted=True)
            index = ids[counts.topk(N)[1]].expand(B, N)
        reduced = similarity.gather(1, index).sum() / B
        out = torch.cat([prompt[index].flatten(1, 2), x], 1)
        ((out * w).sum() - 0.5 * reduced).backward()
        own = {"prompt": prompt, "key": key, "x": x, "w": w, "idx": index, "out": out}
        own |= {"similarity": similarity, "reduce_sim": reduced[None]}
        own |= {"grad.prompt": prompt.grad, "grad.key": key.grad, "grad.x": x.grad}
        tensors |= {f"mean.{choice}.{n}": t.detach().clone() for n, t in own.items()}
    return tensors


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def replayed(tensors):
        path = tmp_path / "recording.safetensors"
        save_file(tensors, path)
        monkeypatch.setattr("sys.argv", ["parity_l2p", str(path)])
        status = parity_l2p.main()
        return status, *capsys.readouterr()

    return replayed


def test_a_recording_is_replayed(run):
    status, out, _ = run(recording())
    found = json.loads(out)
    assert status == 0
    assert found.keys() == {"idx", "similarity", "reduce_sim", "out", "gradients"}
    assert found["idx"] == 0
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize(
    ("name", "found"),
    [("idx", "idx"), ("out", "out"), ("grad.x", "gradients"), ("reduce_sim", "reduce_sim")],
)
def test_faults_are_found(name, found, run):
    tensors = recording()
    wrong = tensors[f"mean.batchwise.{name}"]
    wrong.view(-1)[0] = (wrong.view(-1)[0] + 1) % M
    status, out, _ = run(tensors)
    assert status == 1
    others = {n: v for n, v in json.loads(out).items() if v > 1e-5}
    assert others.keys() == {found}


def test_what_cannot_be_replayed_is_named(run):
    tensors = recording()
    del tensors["mean.per_sample.grad.key"]
    status, out, error = run(tensors)
    assert (status, out) == (2, "")
    assert "mean.per_sample.grad.key: got no such tensor" in error
    assert run({f"sum.{n}": t for n, t in recording().items()})[0] == 0  # any further parts
    assert "got no case" in run({"mean.per_sample.other": torch.zeros(1)})[2]
    assert "unknown case" in run({"median.per_sample.x": torch.zeros(1)})[2]
