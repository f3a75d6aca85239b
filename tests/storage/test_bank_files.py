"""Saved banks of experts: complete, resumable, read lazily; damage is named."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch

from sapt_fast.files import directories
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.row_optimizers import RowAdam
from sapt_fast.storage import bank_files
from sapt_fast.storage.bank_files import load_bank, read_bank, save_bank

N, R, IN, OUT = 200, 1, 8, 6
SHARD = 5 * R * (IN + OUT) * 4  # bytes of five experts


def step(bank, optimizer, number):
    torch.manual_seed(number)
    ids = torch.randperm(N)[:7]
    a, b = bank.training_rows(ids)
    optimizer.step(ids, (torch.randn_like(a), torch.randn_like(b)))


def trained(steps=4, **options):
    bank = ExpertBank(N, R, IN, OUT, seed=9, **options)
    optimizer = RowAdam(bank, lr=0.02)
    for number in range(steps):
        step(bank, optimizer, number)
    return bank, optimizer


def same(one, other):
    assert all(map(torch.equal, one.dense(), other.dense()))
    ids = torch.arange(N)
    assert all(map(torch.equal, one.master_rows(ids), other.master_rows(ids)))
    x, index = torch.ones(2, IN), torch.stack([one.touched[:5], torch.arange(5)])
    x = x.to(one.dtype)
    assert torch.equal(one.mix(x, index, torch.ones(2, 5)), other.mix(x, index, torch.ones(2, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["device", "pinned", "mapped"])
def test_training_goes_on_bit_for_bit(storage, dtype, tmp_path):
    """Also after several saves into the folder from which a mapped bank reads."""
    bank, optimizer = trained(dtype=dtype)
    save_bank(tmp_path / "bank", bank, optimizer, shard_bytes=SHARD)
    for number in (4, 5):
        step(bank, optimizer, number)
        other, its = load_bank(tmp_path / "bank", storage=storage, cache_rows=3)
        copies = copy.deepcopy(other), pickle.loads(pickle.dumps(other))
        assert (other.storage, its.lr) == (storage, 0.02)
        step(other, its, number)
        same(bank, other)
        assert torch.equal(copies[0].dense()[0], copies[1].dense()[0])
        assert not torch.equal(copies[0].dense()[0], other.dense()[0])
        save_bank(tmp_path / "bank", other, its, shard_bytes=SHARD)
        same(bank, other)
        assert len(other.touched) == len(bank.touched)
        other.reset_rows(bank.touched[:3])
        assert len(other.touched) == len(bank.touched) - 3
    last, _ = load_bank(tmp_path / "bank")
    same(bank, last)
    names = {path.name.split("-")[0] for path in (tmp_path / "bank").iterdir()}
    rest = {"rest"} if dtype == torch.bfloat16 else set()
    assert names == {"bank.json", "index.safetensors", "experts", "optimizer"} | rest
    assert len(list((tmp_path / "bank").glob("experts-*"))) == -(-len(bank.touched) // 5)


def test_a_mapped_bank_reads_chosen_rows_only(tmp_path):
    """All other rows are destroyed, and the system has brought only few pages into memory."""
    rows = 4000
    bank = ExpertBank(10**6, 1, 512, 512)
    ids = torch.arange(rows) * 250
    bank.write(ids, torch.ones(rows, 1, 512), torch.ones(rows, 1, 512))
    save_bank(tmp_path / "bank", bank)
    path = tmp_path / "bank" / "experts-00000.safetensors"
    assert path.stat().st_size < rows * 4096 + 1000
    assert sum(p.stat().st_size for p in path.parent.iterdir()) < rows * 4096 * 1.02
    with open(path, "r+b") as file:  # A is first; row 10 and the B's stay
        file.seek(path.stat().st_size - rows * 4096)
        file.write(bytes(10 * 2048))
        file.seek(2048, 1)
        file.write(bytes((rows - 11) * 2048))
    other, _ = load_bank(tmp_path / "bank", storage="mapped", cache_rows=8)
    index = torch.tensor([[2500, 1, -1]])  # a stored expert, an untouched one, none
    for _ in range(3):
        delta = other.mix(torch.ones(1, 512), index, torch.ones(1, 3))
        assert torch.equal(delta, torch.full((1, 512), 512.0))
    assert other.stored_rows.rows_read == 2  # A and B of one expert, once
    assert other.hit_rate == pytest.approx(2 / 3)
    smaps = Path("/proc/self/smaps")
    if smaps.exists():
        maps = smaps.read_text().split(str(path))[1:]
        assert maps
        assert (
            sum(int(re.search(r"Rss:\s+(\d+)", part)[1]) for part in maps) <= 8192
        )  # kB of 16,000
    with pytest.raises(ValueError, match=r"experts-00000.safetensors: down: .* \(\[0\]\)"):
        other.mix(torch.ones(1, 512), index * 0, torch.ones(1, 3))


@pytest.mark.parametrize("storage", ["device", "mapped"])
@pytest.mark.parametrize("name", ["experts-00001", "optimizer-00002", "index", "bank.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_what_is_damaged_is_named_and_nothing_changes(storage, name, damage, tmp_path):
    bank, optimizer = trained()
    save_bank(tmp_path / "bank", bank, optimizer, shard_bytes=SHARD)
    name = name if "." in name else f"{name}.safetensors"
    path = tmp_path / "bank" / name
    digest = json.loads((tmp_path / "bank" / "bank.json").read_text())["files"].get(name, "")
    data = path.read_bytes()
    flipped = bytes([data[-3] ^ 1])
    path.write_bytes(data[:-20] if damage == "truncated" else data[:-3] + flipped + data[-2:])
    if damage == "missing":
        path.unlink()
    target, _ = trained(2)
    before = trained(2)[0]
    target.storage = storage
    lazily = storage == "mapped" and damage == "flipped" and name.startswith("experts")
    if lazily:
        read_bank(tmp_path / "bank", target)
        with pytest.raises(ValueError, match=f"{name}: up: the checksums of 1 experts"):
            target.dense()
        return
    with pytest.raises((ValueError, FileNotFoundError), match=name) as error:
        read_bank(tmp_path / "bank", target)
    if damage == "missing" or (damage == "flipped" and "." not in name):
        assert digest[:16] in str(error.value)
    same(before, target)


def test_another_bank_is_refused(tmp_path):
    bank, optimizer = trained()
    save_bank(tmp_path / "bank", bank)
    assert load_bank(tmp_path / "bank")[1] is None
    with pytest.raises(ValueError, match="in_features: got 8, expected 9"):
        read_bank(tmp_path / "bank", ExpertBank(N, R, 9, OUT))
    with pytest.raises(ValueError, match=r"index.safetensors: ids: got values .* expected 0 to 9"):
        read_bank(tmp_path / "bank", ExpertBank(10, R, IN, OUT))
    with pytest.raises(ValueError, match="optimizer: got one of another bank"):
        save_bank(tmp_path / "bank", trained()[0], optimizer)
    part = ExpertBank(N, R, IN, OUT, first=N)
    with pytest.raises(ValueError, match=f"bank: got a part .* from expert {N} on"):
        save_bank(tmp_path / "part", part)
    with pytest.raises(ValueError, match="bank: got a part"):
        read_bank(tmp_path / "bank", part)
    larger = ExpertBank(2 * N, R, IN, OUT)
    read_bank(tmp_path / "bank", larger)
    assert torch.equal(larger.dense()[0][:N], bank.dense()[0])


def test_a_mapped_bank_does_not_become_that_of_another_saver(tmp_path, monkeypatch):
    bank, _ = trained()
    save_bank(tmp_path / "bank", bank)
    mapped, _ = load_bank(tmp_path / "bank", storage="mapped")
    read = bank_files.read_directory

    def later(*arguments):
        save_bank(tmp_path / "bank", trained(2)[0])
        return read(*arguments)

    monkeypatch.setattr(bank_files, "read_directory", later)
    save_bank(tmp_path / "bank", mapped)
    same(bank, mapped)


def test_a_failed_save_keeps_the_old_bank(tmp_path, monkeypatch):
    bank, optimizer = trained()
    save_bank(tmp_path / "bank", bank, optimizer)
    (tmp_path / "bank" / "notes.txt").write_text("mine")
    changed, its = trained(6)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(directories.os, "rename", full)
        with pytest.raises(OSError, match="no space"):
            save_bank(tmp_path / "bank", changed, its)
    same(bank, load_bank(tmp_path / "bank")[0])
    save_bank(tmp_path / "bank", changed, its, shard_bytes=SHARD)
    save_bank(tmp_path / "bank", changed, its)
    same(changed, load_bank(tmp_path / "bank")[0])
    assert (tmp_path / "bank" / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "bank").iterdir())) == 5
