"""The bank of experts and its optimizers: what is stored, what is computed, what is trained."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sapt_fast.ops import mix_experts
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.id_map import IdMap
from sapt_fast.pools.row_cache import RowCache
from sapt_fast.pools.row_optimizers import ROW_OPTIMIZERS, RowAdam
from sapt_fast.pools.row_table import RowTable
from sapt_fast.pools.sharded_experts import RowShards
from sapt_fast.pools.slot_choice import SlotUse
from sapt_fast.pools.split_floats import joined, split

N, R, IN, OUT = 50, 2, 6, 5
IDS = torch.tensor([7, 3, 31])
INDEX = torch.tensor([[3, 7, 3], [-1, 31, 0], [49, 12, -1]])


def filled(**options):
    """A bank in which the experts IDS have been trained."""
    torch.manual_seed(0)
    bank = ExpertBank(N, R, IN, OUT, **options)
    bank.write(IDS, torch.randn(3, R, IN), torch.randn(3, R, OUT))
    return bank


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, IN, dtype=dtype), torch.randn(3, 3)


def dense_mix(bank, x, weights):
    a, b = bank.dense()
    return mix_experts(x, a.to(x), b.to(x), INDEX, weights, scaling=0.5)


@pytest.mark.parametrize("storage", ["device", "pinned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mix_is_that_of_all_experts(storage, dtype, x_dtype):
    bank, (x, weights) = filled(storage=storage, dtype=dtype), inputs(x_dtype)
    expected = dense_mix(bank, x.double(), weights.double())
    tolerance = 2e-2 if x_dtype == torch.bfloat16 else 1e-5
    for _ in range(2):
        delta = bank.mix(x, INDEX, weights, 0.5)
        assert delta.dtype == x_dtype
        torch.testing.assert_close(delta.double(), expected, rtol=tolerance, atol=tolerance)
    chosen = bank.select(INDEX, x.dtype)
    assert torch.equal(bank.mix(x, chosen, weights, 0.5), delta)
    with torch.inference_mode():
        bank.write(torch.tensor([0]), torch.ones(1, R, IN), torch.ones(1, R, OUT))
    bank.write(torch.tensor([0]), torch.ones(1, R, IN), torch.zeros(1, R, OUT))
    torch.testing.assert_close(bank.mix(x, INDEX, weights, 0.5), delta)
    with pytest.raises(RuntimeError, match="from before the bank changed"):
        bank.mix(x, chosen, weights, 0.5)
    other = filled(storage=storage, dtype=dtype)
    with pytest.raises(RuntimeError, match="of another bank"):
        filled(storage=storage, dtype=dtype).mix(x, other.select(INDEX, x.dtype), weights)


def test_untouched_rows_follow_from_the_seed_and_take_nothing():
    small, large = ExpertBank(N, R, IN, OUT, seed=4), ExpertBank(10**6, R, IN, OUT, seed=4)
    a, b = small.rows(torch.tensor([9, 2]))
    more, _ = large.rows(torch.tensor([2, 999_999, 9]))
    assert torch.equal(a, more[[2, 0]])
    assert not b.any()
    assert a.abs().max() <= IN**-0.5
    assert not torch.equal(a, ExpertBank(N, R, IN, OUT, seed=5).rows(torch.tensor([9, 2]))[0])
    many = ExpertBank(10**6, 1, 500, 1).rows(torch.arange(0, 10**6, 9999))[0] * 500**0.5
    assert abs(many.mean()) < 0.01
    assert abs(many.square().mean() - 1 / 3) < 0.01
    assert abs(torch.corrcoef(many[:, 0]).triu(1)).max() < 0.25  # rows do not depend on each other
    assert large.nbytes <= 10**6 / 16 + 300
    assert [len(x) for n, x in large.state_dict().items() if n != "seed"] == [0, 0, 0]


@pytest.mark.parametrize("storage", ["device", "pinned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_handed_out_rows_get_gradients(storage, dtype):
    """Gradients equal those of the dense bank; experts that are not handed out still act."""
    bank, (x, weights) = filled(storage=storage, dtype=dtype), inputs()
    weights.requires_grad_()
    ids = torch.tensor([12, 7, 31])
    a, b = bank.training_rows(ids)
    assert a.dtype == torch.float32
    whole = [rows.float().requires_grad_() for rows in bank.dense()]
    with torch.no_grad():
        for rows, mine in zip(whole, (a, b), strict=True):
            rows[ids] = mine
    expected = mix_experts(x, *whole, INDEX, weights, scaling=0.5)
    delta = bank.mix(x, INDEX, weights, 0.5)
    torch.testing.assert_close(delta, expected)
    wanted = torch.autograd.grad(expected.square().sum(), [weights, *whole])
    found = torch.autograd.grad(delta.square().sum(), [weights, a, b])
    for want, got in zip((wanted[0], wanted[1][ids], wanted[2][ids]), found, strict=True):
        torch.testing.assert_close(got, want)
    bank.stop_training()
    assert not bank.mix(x, INDEX, weights.detach()).requires_grad


def train(bank, optimizer, steps):
    """Experts are trained at different times, so that their numbers of steps differ."""
    torch.manual_seed(2)
    for step in range(steps):
        ids = torch.tensor([[7, 12], [3, 12, 40], [12]][step % 3])
        a, b = bank.training_rows(ids)
        optimizer.step(ids, (torch.randn_like(a), torch.randn_like(b)))


OPTIONS = {
    "adam": [{"weight_decay": 0.1}],
    "adamw": [{"weight_decay": 0.1}],
    "sgd": [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {}],
}
TORCH = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_optimizers_are_those_of_torch(name, storage):
    for options in OPTIONS[name]:
        bank = filled(storage=storage)
        optimizer = ROW_OPTIMIZERS[name](bank, lr=0.03, **options)
        before = bank.dense()
        rows = {i: [nn.Parameter(rows[i].clone()) for rows in before] for i in (3, 7, 12, 40)}
        theirs = TORCH[name]([p for pair in rows.values() for p in pair], lr=0.03, **options)
        train(bank, optimizer, 7)
        torch.manual_seed(2)
        for step in range(7):
            ids = [[7, 12], [3, 12, 40], [12]][step % 3]
            theirs.zero_grad()
            for side, width in enumerate((IN, OUT)):
                for i, grad in zip(ids, torch.randn(len(ids), R, width), strict=True):
                    rows[i][side].grad = grad
            theirs.step()
        after = bank.dense()
        for i in range(N):
            for side in range(2):
                expected = rows[i][side].detach() if i in rows else before[side][i]
                torch.testing.assert_close(after[side][i], expected, rtol=1e-6, atol=1e-7)
        assert sorted(optimizer.touched.tolist()) == [3, 7, 12, 40]
        assert sorted(bank.touched.tolist()) == [3, 7, 12, 31, 40]


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit_in_a_larger_bank(name, dtype):
    options = OPTIONS[name][0]
    bank = filled(dtype=dtype, seed=3)
    optimizer = ROW_OPTIMIZERS[name](bank, lr=0.03, **options)
    train(bank, optimizer, 4)
    kept = pickle.loads(pickle.dumps((bank.state_dict(), optimizer.state_dict())))
    other = ExpertBank(2 * N, R, IN, OUT, dtype=dtype)
    again = ROW_OPTIMIZERS[name](other)
    other.load_state_dict(kept[0])
    again.load_state_dict(kept[1])
    for each, its in ((bank, optimizer), (other, again)):
        train(each, its, 5)
    for ours, theirs in zip(bank.dense(), other.dense(), strict=True):
        assert torch.equal(ours, theirs[:N])
    assert torch.equal(bank.master_rows(IDS)[0], other.master_rows(IDS)[0])
    assert again.lr == 0.03


def test_bytes_follow_the_trained_experts():
    """A rank-1 expert of width 576: state of at most 10 KB, and a spare part of at most a tenth."""
    bank = ExpertBank(10**6, 1, 576, 576)
    optimizer = RowAdam(bank)
    for start in range(0, 1200, 200):
        ids = torch.arange(start, start + 200) * 7
        optimizer.step(ids, (torch.ones(200, 1, 576), torch.ones(200, 1, 576)))
    assert len(optimizer.touched) == 1200
    per_row = 2 * 2 * 576 * 4
    assert optimizer.state_bytes <= 1.1 * 1200 * per_row
    assert bank.nbytes <= 1.1 * 1200 * per_row / 2


@pytest.mark.parametrize("num_ids", [1, 63, 64, 65, 500])
def test_a_map_finds_what_was_set(num_ids):
    ids_map, expected = IdMap(num_ids, torch.device("cpu")), {}
    generator = torch.Generator().manual_seed(num_ids)
    for place in range(0, 300, 10):
        ids = torch.randperm(num_ids, generator=generator)[:10]
        places = torch.arange(place, place + len(ids))
        ids_map.set(ids, places)
        expected |= dict(zip(ids.tolist(), places.tolist(), strict=True))
        gone = torch.randperm(num_ids, generator=generator)[:3]
        ids_map.drop(gone)
        expected |= dict.fromkeys(gone.tolist(), -1)
        asked = torch.arange(-1, num_ids + 1)
        assert ids_map.find(asked).tolist() == [expected.get(i, -1) for i in asked.tolist()]
    assert ids_map.nbytes <= (4 + 256) * (num_ids // 64 + 1) + 256


def test_what_is_not_finite_changes_nothing():
    bank = filled()
    optimizer = RowAdam(bank)
    train(bank, optimizer, 2)
    before = copy.deepcopy((bank.state_dict(), optimizer.state_dict()["tensors"]))
    grads = torch.ones(2, R, IN), torch.ones(2, R, OUT)
    grads[1][1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"grads: got NaN .* 1 experts \(\[3\]\)"):
        optimizer.step(torch.tensor([7, 3]), grads)
    optimizer.lr = 1e38
    with pytest.raises(ValueError, match="lr: too large"):
        optimizer.step(torch.tensor([3]), (torch.ones(1, R, IN) * 1e30, torch.ones(1, R, OUT)))
    optimizer.lr = 0.1
    with pytest.raises(ValueError, match="grads: too large, their moments"):  # squares: infinite
        optimizer.step(torch.tensor([3]), (torch.ones(1, R, IN) * 1e25, torch.ones(1, R, OUT)))
    with pytest.raises(ValueError, match="got 3 twice"):
        optimizer.step(torch.tensor([3, 3]), (torch.ones(2, R, IN), torch.ones(2, R, OUT)))
    with pytest.raises(ValueError, match="b: got NaN"):
        bank.write(torch.tensor([1]), torch.ones(1, R, IN), torch.full((1, R, OUT), torch.inf))
    with pytest.raises(ValueError, match=r"a: got NaN .* finite in torch.float32"):
        bank.write(torch.tensor([1]), torch.ones(1, R, IN).double() * 1e300, torch.ones(1, R, OUT))
    with pytest.raises(ValueError, match=r"a: got NaN .* finite in torch.bfloat16"):
        filled(dtype=torch.bfloat16).write(
            torch.tensor([1]), torch.full((1, R, IN), 3.4e38), torch.ones(1, R, OUT)
        )
    gpu_nan = torch.full((1, R, IN), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    with pytest.raises(ValueError, match=r"a: got NaN"):
        filled(dtype=torch.bfloat16).write(torch.tensor([1]), gpu_nan, torch.ones(1, R, OUT))
    for old, new in zip(
        before, (bank.state_dict(), optimizer.state_dict()["tensors"]), strict=True
    ):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_reset_rows_are_as_at_the_start(storage):
    bank, fresh = filled(storage=storage), ExpertBank(N, R, IN, OUT)
    x, weights = inputs()
    bank.mix(x, INDEX, weights)  # so that the cache has them
    bank.reset_rows(torch.tensor([7, 40]))
    assert sorted(bank.touched.tolist()) == [3, 31]
    expected = [rows.clone() for rows in fresh.dense()]
    for rows, kept in zip(expected, filled().dense(), strict=True):
        rows[[3, 31]] = kept[[3, 31]]
    assert all(map(torch.equal, bank.dense(), expected))
    torch.testing.assert_close(bank.mix(x, INDEX, weights, 0.5), dense_mix(bank, x, weights))


def test_moves_keep_the_dtype_and_copies_are_independent():
    model = nn.Sequential(filled(), nn.Linear(2, 2)).half()
    bank = model[0]
    assert model[1].weight.dtype == torch.float16
    assert bank.rows(IDS)[0].dtype == torch.float32
    bank.training_rows(IDS)
    other = copy.deepcopy(bank)
    assert other._trained is None
    other.write(IDS[:1], torch.zeros(1, R, IN), torch.zeros(1, R, OUT))
    assert bank.rows(IDS)[0].all()
    moved = copy.deepcopy(bank).to("meta")
    assert moved.device.type == moved.home.type == "meta"
    hosted = filled(storage="pinned").to("meta")
    assert (hosted.device.type, hosted.home.type) == ("meta", "cpu")


def test_float32_survives_the_split():
    torch.manual_seed(0)
    values = torch.cat(
        [torch.randn(1000) * 10.0 ** torch.randint(-38, 38, (1000,)), torch.zeros(1)]
    )
    values[:2] = torch.tensor([1.00390625, -1.00390625])  # halfway between two bfloat16
    rounded, rest = split(values)
    assert torch.equal(joined(rounded, rest).view(torch.int32), values.view(torch.int32))
    assert ((rounded.float() - values).abs() <= (values.bfloat16().float() - values).abs()).all()
    bank = ExpertBank(N, 1, 1, 1, dtype=torch.bfloat16)
    bank.write(IDS, values[:3, None, None], values[:3, None, None])
    assert torch.equal(bank.rows(IDS)[0], bank.stored()["down"])  # also halfway


def test_the_cache_keeps_the_rows_that_were_used_last():
    table = RowTable(100, {"down": ((1,), torch.float32)}, torch.device("cpu"))
    ids = torch.arange(0, 100, 2)
    table.write(table.add(ids), {"down": ids[:, None] * 1.0})
    cache = RowCache(4, 100, {"down": ((1,), torch.float32)}, torch.device("cpu"))
    asked = []
    table.gather = lambda name, at: asked.append(at.tolist()) or table.tables[name][at]
    for wanted in ([2, 4, 6], [8], [2], [10], [2, 4], [0, 2, 4, 6, 8, 10]):
        wanted = torch.tensor(wanted)
        rows = cache.rows(wanted, table.find(wanted), table)
        assert rows["down"].flatten().tolist() == wanted.tolist()
    # 10 takes the place of 4 or 6; then 4 takes that of another one, unless 6 had to go.
    assert asked[:3] == [[1, 2, 3], [4], [5]]
    assert cache.hits + cache.misses == 14
    cache.drop(torch.tensor([2]))
    table.write(table.find(torch.tensor([2])), {"down": torch.tensor([[5.0]])})
    assert cache.rows(torch.tensor([2]), torch.tensor([1]), table)["down"].item() == 5


def test_threads_share_a_cache():
    """A cache that is smaller than what the threads use together."""
    bank = ExpertBank(64, 1, 16, 16, storage="pinned", cache_rows=6)
    ids = torch.arange(64)
    bank.write(ids, torch.ones(64, 1, 16), (ids + 1.0)[:, None, None].expand(64, 1, 16))

    def mixed(start):
        for i in range(start, start + 40):
            index = torch.tensor([[i % 64, 7 * i % 64]])
            with torch.no_grad():
                delta = bank.mix(torch.ones(1, 16), index, torch.ones(1, 2))
            assert delta[0, 0] == 16 * (index.sum() + 2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(mixed, (0, 9, 20, 41)))


def test_bad_arguments_are_named():
    bank = filled()
    with pytest.raises(ValueError, match="storage: got 'disk'"):
        ExpertBank(N, R, IN, OUT, storage="disk")
    with pytest.raises(ValueError, match="index: got values from -2 to 49"):
        bank.mix(torch.ones(3, IN), INDEX.clone().masked_fill_(INDEX == -1, -2), torch.ones(3, 3))
    with pytest.raises(ValueError, match=f"ids: got values from 0 to {N}, expected 0 to {N - 1}"):
        bank.rows(torch.tensor([N, 0]))
    with pytest.raises(TypeError, match=r"ids: got torch.int32"):
        bank.training_rows(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match="b: got shape"):
        bank.write(torch.tensor([1]), torch.ones(1, R, IN), torch.ones(1, R, IN))
    with pytest.raises(RuntimeError, match="ids: got values from 3 to 31"):
        ExpertBank(8, R, IN, OUT).load_state_dict(bank.state_dict())
    part = ExpertBank(N, R, IN, OUT, first=N)  # experts N to 2 N - 1
    with pytest.raises(RuntimeError, match="ids: got values from -47 to -19"):
        part.load_state_dict(bank.state_dict())
    with pytest.raises(ValueError, match="name: got 'adam', expected 'sgd'"):
        ROW_OPTIMIZERS["sgd"](bank).load_state_dict(RowAdam(bank).state_dict())


def test_a_compiled_forward_is_one_graph():
    bank, (x, weights) = filled(), inputs()
    called = torch.compile(bank.mix, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(called(x, INDEX, weights), bank.mix(x, INDEX, weights))
        a, b = bank.training_rows(torch.tensor([3, 12]))
        delta = called(x, INDEX, weights)
        assert torch.equal(delta, bank.mix(x, INDEX, weights))
        delta.sum().backward()
        RowAdam(bank, lr=0.1).step(torch.tensor([3, 12]), (a.grad, b.grad))


@pytest.mark.parametrize(("rows", "processes"), [(9, 4), (5, 4), (10, 3), (12, 4), (4, 4), (7, 1)])
def test_every_process_has_rows_of_a_sharded_bank(rows, processes):
    parts = torch.tensor_split(torch.arange(rows), processes)
    for rank, part in enumerate(parts):
        shards = RowShards(rows, SimpleNamespace(rank=rank, size=processes))
        assert (shards.first, shards.count) == (part[0], len(part))
        assert shards.owner(part).tolist() == [rank] * len(part)
        assert shards.local(part).tolist() == [*range(len(part))]
    assert shards.owner(torch.tensor([-1, rows])).tolist() == [-1, -1]
    with pytest.raises(ValueError, match=f"num_experts: got {rows} for {rows + 1} processes"):
        RowShards(rows, SimpleNamespace(rank=0, size=rows + 1))


def test_slot_choice_is_tf_idf():
    use, generator = SlotUse(N), torch.Generator().manual_seed(0)
    background = [torch.randint(-1, 8, (4, 3), generator=generator) for _ in range(5)]
    for batch in background:
        use.add(batch)
    again = SlotUse(N)
    again.load_state_dict(use.state_dict())
    batch = torch.tensor([[0, 1, 2], [1, 2, 30], [2, -1, 30]])
    flat = batch[batch >= 0].tolist()
    scores = {
        i: -flat.count(i) / 8 * math.log(6 / (sum(bool((b == i).any()) for b in background) + 1))
        for i in set(flat)
    }
    for count in (1, 2, 3, 9):
        expected = sorted(sorted(scores, key=lambda i: (scores[i], i))[:count])
        assert again.choose(batch, count).tolist() == expected


@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_what_is_made_in_inference_mode_can_train(storage):
    with torch.inference_mode():
        bank = ExpertBank(N, R, IN, OUT, storage=storage)
        bank.load_state_dict(filled().state_dict())
        bank = bank.to("cpu")
    x, weights = inputs()
    bank.mix(x.requires_grad_(), INDEX, weights).sum().backward()
    train(bank, RowAdam(bank), 2)
    assert x.grad.any()
