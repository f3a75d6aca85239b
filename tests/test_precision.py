"""Training in mixed precision, with loss scaling, accumulated gradients and 8-bit optimizers."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import fill, patched, settings, tiny, token_ids

import sapt_fast

HALVES = [torch.bfloat16, torch.float16]
KINDS = ["t5", "llama"]
ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of an update, relative to its norm


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    """The loss on rows [B, T]; of SAPT, with the reflection loss on some of an earlier task."""
    loss = model(input_ids=rows, labels=rows).loss
    if hasattr(model.sapt, "reflection_loss"):
        target = torch.tensor([1.0]).to(loss.device)
        loss = loss + 0.5 * model.sapt.reflection_loss(rows.flip(1), target)
    return loss


def train(model, *, half=None, scaler=None, steps: int = 3) -> dict[str, torch.Tensor]:
    """Plain gradient descent; gives how far each parameter moved, in float64."""
    parameters = trainable(model)
    before = {name: p.detach().to(torch.float64, copy=True) for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for number in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", half, enabled=half is not None):
            loss = loss_of(model, token_ids(4, 9, seed=number))
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return {name: p.detach().double() - before[name] for name, p in parameters.items()}


def assert_moved_alike(moved: dict, expected: dict, tolerance: float) -> None:
    """All updates together agree, and no parameter is left out or moves elsewhere."""
    assert moved.keys() == expected.keys()
    assert all(change.any() for change in expected.values())
    assert all(change.any() for change in moved.values())
    found, wanted = (torch.cat([m[n].flatten() for n in expected]) for m in (moved, expected))
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_with_a_scaled_loss_trains_as_float32(kind, half):
    model = fill(patched(kind, tasks=2), deviation=0.1)  # larger ones magnify rounding
    expected = train(deepcopy(model))
    frozen = {n: v for n, v in snapshot(model).items() if n not in trainable(model)}
    moved = train(model, half=half, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert_moved_alike(moved, expected, ROUNDING[half])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in frozen.items())


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_skips_the_step(kind, half):
    model = patched(kind, tasks=2)
    before = snapshot(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117)
    train(model, half=half, scaler=scaler, steps=1)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert scaler.get_scale() == 2.0**10
    moved = train(model, half=half, scaler=scaler, steps=1)
    assert all(change.any() and change.isfinite().all() for change in moved.values())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_adapters_on_a_half_precision_model(kind, half, scaled):
    model = sapt_fast.patch(tiny(kind).to(half), settings(autocast_adapter_dtype=True))
    for number in range(2):
        model.sapt.add_task(f"task{number}")
        for pool in model.sapt.pools.values():
            torch.nn.init.normal_(pool.b.trainable.data, std=0.1)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    expected = train(deepcopy(model).float())
    base = {n: v for n, v in snapshot(model).items() if "sapt" not in n}
    options = {"half": half, "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)}
    moved = train(model, **options if scaled else {})
    assert_moved_alike(moved, expected, ROUNDING[half])
    assert {v.dtype for v in base.values()} == {half}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.items())


@pytest.mark.parametrize("half", HALVES)
def test_float32_prompts_on_a_half_precision_model(half):
    config = settings(adapter="prompt", autocast_adapter_dtype=True)
    model = sapt_fast.patch(tiny("t5").to(half), config)
    for number in range(2):
        model.sapt.add_task(f"task{number}")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    expected = train(deepcopy(model).float())
    assert_moved_alike(train(model), expected, ROUNDING[half])
    assert model.shared.weight.dtype == half


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_adapters_of_a_float64_model_stay_float64(adapter):
    config = settings(adapter=adapter, autocast_adapter_dtype=True)
    model = sapt_fast.patch(tiny("t5").double(), config)
    model.sapt.add_task("first")
    assert {p.dtype for p in trainable(model).values()} == {torch.float64}


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_float32_adapters_keep_their_bits_through_a_checkpoint(adapter, tmp_path):
    """Their values are between bfloat16 numbers, and so are those of a loaded model."""
    config = settings(adapter=adapter, autocast_adapter_dtype=True)
    model = sapt_fast.patch(tiny("t5").bfloat16(), config)
    for number in range(2):
        model.sapt.add_task(f"task{number}")
    train(model)
    model.sapt.save_pretrained(tmp_path)
    again = sapt_fast.load_pretrained(tiny("t5").bfloat16(), tmp_path)
    assert trainable(again).keys() == trainable(model).keys()
    for name, parameter in trainable(model).items():
        assert torch.equal(trainable(again)[name], parameter), name
        assert not torch.equal(parameter, parameter.bfloat16().float()), name


@pytest.mark.parametrize("half", HALVES)
def test_peft_adapters_on_a_half_precision_model(half):
    """PEFT keeps adapters in float32; patched they stay so, and train."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama").to(half), config, adapter_name="a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(["a", "b"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    expected = train(sapt_fast.patch(deepcopy(model).float()))
    model = sapt_fast.patch(model)
    moved = train(model, half=half, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert_moved_alike(moved, expected, ROUNDING[half])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_the_whole_batch(kind):
    model = patched(kind, tasks=2).double()
    rows = token_ids(8, 9)
    loss_of(model, rows).backward()
    expected = {name: p.grad for name, p in trainable(model).items()}
    model.zero_grad()
    for part in rows.split(2):
        (loss_of(model, part) / 4).backward()
    for name, parameter in trainable(model).items():
        assert expected[name].any()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


class TestEightBitAdam:
    """torchao's, which keeps the moments of tensors with fewer than 4096 numbers in float32."""

    @pytest.fixture(autouse=True)
    def _without_compiling(self):
        pytest.importorskip("torchao.optim")
        with torch.compiler.set_stance("force_eager"):  # it compiles a step for each shape
            yield

    def start(self, tasks: int = 1):
        """A model whose A has 4096 numbers in each layer and whose B has fewer."""
        from torchao.optim import AdamW8bit

        model = patched(tiny("llama", hidden_size=256), tasks=tasks, r=16)
        return model, AdamW8bit(list(trainable(model).values()), lr=0.01)

    def steps(self, model, optimizer, numbers) -> None:
        for number in numbers:
            optimizer.zero_grad()
            rows = token_ids(4, 9, seed=number)
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()

    def quantised(self, model, optimizer) -> set[str]:
        states = {n: optimizer.state[p]["exp_avg"] for n, p in trainable(model).items()}
        return {n for n, moment in states.items() if type(moment) is not torch.Tensor}

    def test_a_step_is_that_of_adamw(self):
        model, optimizer = self.start()
        other = deepcopy(model)
        self.steps(model, optimizer, [0])
        self.steps(other, torch.optim.AdamW(trainable(other).values(), lr=0.01), [0])
        for name, parameter in trainable(other).items():
            torch.testing.assert_close(trainable(model)[name], parameter, msg=name)
        quantised = self.quantised(model, optimizer)
        assert {n.rpartition("sapt_pool.")[2] for n in quantised if "pool" in n} == {"a.trainable"}

    def test_a_new_task_takes_the_place_of_the_last(self):
        model, optimizer = self.start()
        self.steps(model, optimizer, [0, 1])
        learned = [pool.a.rows().clone() for pool in model.sapt.pools.values()]
        model.sapt.add_task("new", optimizer)
        self.steps(model, optimizer, [2, 3])
        pools = model.sapt.pools.values()
        assert {id(p) for p in optimizer.state} == {id(p) for p in trainable(model).values()}
        for pool, rows in zip(pools, learned, strict=True):
            assert torch.equal(pool.adapter(0)[0], rows)
            assert pool.b.trainable.any()

    def test_resumed_it_goes_on_as_it_would_have(self, tmp_path):
        model, optimizer = self.start(tasks=2)
        self.steps(model, optimizer, [0, 1])
        kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(kept, tmp_path / "kept.pt")
        self.steps(model, optimizer, [2, 3])
        resumed, fresh = self.start(tasks=2)
        stored = torch.load(tmp_path / "kept.pt")
        resumed.load_state_dict(stored["model"])
        fresh.load_state_dict(stored["optimizer"])
        assert not torch.equal(resumed.sapt.router.up.weight, model.sapt.router.up.weight)
        self.steps(resumed, fresh, [2, 3])
        assert self.quantised(resumed, fresh) == self.quantised(model, optimizer) != set()
        for name, parameter in trainable(model).items():
            assert torch.equal(trainable(resumed)[name], parameter), name
