"""A bank of up to millions of LoRA experts, of which only those ever trained take memory.

Expert n computes x A_n^T B_n. Its A starts at random and its B at zero, so an untouched expert adds
nothing, and its A follows from the seed (`start_rows`). Both are stored from the first training on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.checks import require_choice, require_count
from sapt_fast.ops import mix_experts
from sapt_fast.ops._common import compute_dtype
from sapt_fast.pools.mapped_rows import MappedRows
from sapt_fast.pools.own import Own, keeping_dtype
from sapt_fast.pools.row_cache import RowCache
from sapt_fast.pools.row_table import RowTable, require_ids
from sapt_fast.pools.selections import Selection, Trained, require_index
from sapt_fast.pools.split_floats import joined, split
from sapt_fast.pools.start_rows import start_rows

__all__ = ["STORAGES", "ExpertBank", "Selection"]

STORAGES = ("device", "pinned", "mapped")
_DTYPES = (torch.float32, torch.bfloat16)
_MOST_EXPERTS = 2**31 - 2  # rows are numbered in int32
_TABLES = ("down", "up")
_VERSIONS = itertools.count(1)  # of all banks, so that no bank takes another's selection


class ExpertBank(Own, nn.Module):
    """The experts of one layer, or of several layers that share them.

    The bank's numbers are no parameters: no optimizer, DDP or FSDP sees N rows. To train, ask for
    the rows of a batch (`training_rows`), which `mix` then uses instead of the stored ones, and
    give their gradients to an optimizer of `pools.row_optimizers`.

    A bank in bfloat16 also stores what rounding took from every trained number (16 bits, see
    `split_floats`), so that training reads and writes exact float32. `mix` reads bfloat16 only.

    `model.half()` and `model.to(dtype)` do not change the dtype. `.to(device)` moves the place of
    computation, and with storage "device" the rows. A deep copy has no rows in training.

    Args:
        num_experts: N, at most 2**31 - 2.
        r: rank of an expert.
        in_features: I.
        out_features: O.
        dtype: torch.float32 or torch.bfloat16.
        storage: where trained rows are stored. "device": on `device`. "pinned": in host memory;
            chosen rows are gathered into pinned memory and copied to a cache on `device`. Without
            CUDA it is ordinary memory. "mapped": as "pinned", but rows of a saved bank stay in its
            files until they are chosen (see `storage.bank_files`).
        cache_rows: experts in that cache; a call that selects more copies them without it.
        seed: of the start values.
        first: number of this bank's first expert in the larger bank of which it is a part.
        device: where `mix` computes.

    Attributes:
        seed: as above; a loaded state brings its own.
        version: changes whenever stored rows do.
    """

    def __init__(
        self,
        num_experts: int,
        r: int,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        storage: str = "device",
        cache_rows: int = 4096,
        seed: int = 0,
        first: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        require_count("num_experts", num_experts, most=_MOST_EXPERTS)
        require_count("r", r)
        require_count("in_features", in_features)
        require_count("out_features", out_features)
        require_choice("dtype", dtype, _DTYPES)
        require_choice("storage", storage, STORAGES)
        require_count("cache_rows", cache_rows)
        require_count("seed", seed, least=0, most=2**63 - 1)
        require_count("first", first, least=0, most=2**40)
        self.num_experts, self.r = num_experts, r
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.storage, self.cache_rows = dtype, storage, cache_rows
        self.seed, self.first = seed, first
        # Moves with the module and tells where it computes.
        self.register_buffer("_place", torch.empty(0, device=device), persistent=False)
        home = self.device if storage == "device" else torch.device("cpu")
        self._rows: RowTable | MappedRows = RowTable(num_experts, self.shapes(), home)
        self._cache = self._new_cache()
        self._trained: Trained | None = None
        self.version = next(_VERSIONS)

    @property
    def device(self) -> torch.device:
        """Where `mix` computes."""
        place: Any = self._place
        return place.device

    @property
    def home(self) -> torch.device:
        """Where trained rows are stored."""
        return self._rows.device

    @property
    def touched(self) -> Tensor:
        """The experts that are stored, [T] int64, in the order in which they were first trained."""
        return self._rows.used_ids()

    @property
    def stored_rows(self) -> RowTable | MappedRows:
        """What stores the touched experts; only for reading."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes of all stored rows and of the maps from experts to rows, without the cache."""
        return self._rows.nbytes

    @property
    def hit_rate(self) -> float:
        """Share of the selected stored rows that the cache had; NaN before the first selection."""
        return math.nan if self._cache is None else self._cache.hit_rate

    # --- rows ---

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copies the rows of some experts to the compute device.

        Args:
            ids: [U] int64, distinct.

        Returns:
            A [U, r, I] and B [U, r, O] in the bank's dtype.

        Raises:
            TypeError, ValueError: if ids are not int64, out of range or not distinct.
        """
        a, b = self.master_rows(ids)
        return (a, b) if self.dtype == torch.float32 else (split(a)[0], split(b)[0])

    @torch.no_grad()
    def master_rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `rows`, in float32, without the rounding of a bank in bfloat16."""
        require_ids("ids", ids, self.num_experts)
        ids = ids.to(self.home)
        at = self._rows.find(ids)
        found = at >= 0
        stored = self._rows.read(at[found])
        whole = [self._joined(stored, name).to(self.device) for name in _TABLES]
        if len(whole[0]) == len(ids):
            return whole[0], whole[1]
        ids, found = ids.to(self.device), found.to(self.device)
        a = start_rows(self.seed, ids + self.first, self.r, self.in_features)
        b = a.new_zeros(len(ids), self.r, self.out_features)
        a[found], b[found] = whole
        return a, b

    def current_rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `master_rows`, but copies of the rows in training if these are the ones."""
        trained = self._trained
        if trained is None or not torch.equal(trained.ids, ids.to(self.device)):
            return self.master_rows(ids)
        return trained.a.detach().clone(), trained.b.detach().clone()

    @torch.no_grad()
    def write(self, ids: Tensor, a: Tensor, b: Tensor) -> None:
        """Replaces the rows of some experts, which are stored from then on.

        Rows in training are dropped: ask for `training_rows` again.

        Args:
            ids: [U] int64, distinct.
            a: [U, r, I], any floating-point dtype.
            b: [U, r, O].

        Raises:
            TypeError, ValueError: if ids are not int64, out of range or not distinct.
            ValueError: if a shape does not fit, or a value is not finite in the bank's dtype.
        """
        require_ids("ids", ids, self.num_experts)
        given = {"down": a, "up": b}
        for name, value in zip(("a", "b"), given.values(), strict=True):
            expected = (len(ids), self.r, self._width("down" if name == "a" else "up"))
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected {list(expected)}"
                )
        ids = ids.to(self.home)
        values = {}
        for name, (table, value) in zip(("a", "b"), given.items(), strict=True):
            value = value.to(self.home, torch.float32)  # which a float64 may not fit into
            finite = torch.isfinite(value).all()
            values[table] = value
            if self.dtype == torch.bfloat16:
                values[table], values[f"{table}_rest"] = split(value)
                finite &= torch.isfinite(values[table]).all()
            if not finite:
                raise ValueError(
                    f"{name}: got NaN or infinite values, expected values that are finite in "
                    f"{self.dtype}"
                )
        self._rows.write(self._rows.add(ids), values)
        self._forget(ids)

    @torch.no_grad()
    def reset_rows(self, ids: Tensor) -> None:
        """Gives experts their start values again (A by the seed, B zero); they take no memory then.

        Rows in training are dropped. An optimizer keeps its state: call its `reset_rows` as well.

        Args:
            ids: [U] int64, distinct.

        Raises:
            TypeError, ValueError: if ids are not int64, out of range or not distinct.
        """
        require_ids("ids", ids, self.num_experts)
        ids = ids.to(self.home)
        self._rows.remove(ids)
        self._forget(ids)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Returns A [N, r, I] and B [N, r, O] of all experts, untouched ones included."""
        return self.rows(torch.arange(self.num_experts, device=self.device))

    # --- computing ---

    def training_rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hands out the rows of some experts as leaves, which `mix` uses until the next `write`.

        Other experts take part in `mix` without a gradient. A step needs memory only for these
        rows, whatever N.

        Args:
            ids: [U] int64, distinct.

        Returns:
            A [U, r, I] and B [U, r, O] in float32, which require a gradient.

        Raises:
            TypeError, ValueError: if ids are not int64, out of range or not distinct.

        Example:
            >>> import torch
            >>> from sapt_fast.pools.experts import ExpertBank
            >>> from sapt_fast.pools.row_optimizers import RowAdam
            >>> bank, ids = ExpertBank(1000000, 1, 8, 6), torch.tensor([3, 70000])
            >>> optimizer = RowAdam(bank, lr=0.03)
            >>> a, b = bank.training_rows(ids)
            >>> delta = bank.mix(torch.ones(1, 8), ids[None], torch.ones(1, 2))
            >>> (delta - 1).square().sum().backward()
            >>> optimizer.step(ids, (a.grad, b.grad))
            >>> bank.touched
            tensor([    3, 70000])
        """
        a, b = (rows.requires_grad_() for rows in self.master_rows(ids))
        ids = ids.to(self.device)
        self._trained = Trained(ids, a, b, *ids.sort())
        return a, b

    def stop_training(self) -> None:
        """Lets `mix` use the stored rows again; changes made to `training_rows` are lost."""
        self._trained = None

    def select(self, index: Tensor, dtype: torch.dtype) -> Selection:
        """Finds the stored rows of experts, to mix them more than once.

        Storages "pinned" and "mapped" wait for the device and move rows that the cache lacks.

        Args:
            index: [M, k] int64, experts; -1 for none.
            dtype: that of the x to mix. A bank in bfloat16 is converted for another one.

        Returns:
            Rows and index for `mix`, until the bank changes (`write`, `reset_rows`, a load).

        Raises:
            TypeError, ValueError: if the index is not [M, k] int64, or (on a CPU) out of range.
        """
        return Selection(*self._selected(index, dtype), self.version)

    def mix(
        self,
        x: Tensor,
        index: Tensor | Selection,
        weights: Tensor,
        scaling: float = 1.0,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Computes the weighted sum of the selected experts' outputs (`ops.mix_experts`).

        Args:
            x: [M, I]; float32, float16, bfloat16, on a CPU also float64.
            index: [M, k] int64, the experts of each row, -1 for none; or a `select` of it.
            weights: [M, k], any floating-point dtype.
            scaling: of all experts.
            backend: as in `dispatch.resolve`.

        Returns:
            delta, [M, O], in x's dtype; differentiable in x, weights and the rows in training.

        Raises:
            ValueError, TypeError: if a shape, index, dtype or device does not fit.
            RuntimeError: if the bank has changed since the selection, the selection is another
                bank's, or the bank has rows in training, which no selection contains.
        """
        if isinstance(index, Selection):
            if index.version != self.version:
                raise RuntimeError(
                    "index: got a selection of another bank, or from before the bank changed"
                )
            if self._trained is not None:
                raise RuntimeError("index: got a selection, which has no rows in training")
            a, b, at, _ = index
            return mix_experts(x, a, b, at, weights, scaling=scaling, backend=backend)
        trained, delta = self._trained, None
        if trained is not None:
            require_index(index, self.num_experts)
            at = trained.find(index)
            delta = mix_experts(
                x, trained.a, trained.b, at, weights, scaling=scaling, backend=backend
            )
            index = index.masked_fill(at >= 0, -1)
        a, b, at = self._selected(index, compute_dtype(x))
        stored = mix_experts(x, a, b, at, weights, scaling=scaling, backend=backend)
        return stored if delta is None else delta + stored

    def _selected(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        # Reads no number that changes with every step: a compiled graph would be made again.
        require_index(index, self.num_experts)
        convert = self.dtype == torch.bfloat16 and dtype != torch.bfloat16
        rows = self._rows
        if self._cache is None and not convert and isinstance(rows, RowTable):
            at = rows.find(index.clamp(-1, self.num_experts))
            return rows.tables["down"], rows.tables["up"], at
        a, b, at = self._select_rows(index)
        return (a.float(), b.float(), at) if convert else (a, b, at)

    @torch.compiler.disable
    @torch.no_grad()
    def _select_rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows [R, ...] on the compute device and the index into them."""
        ids, inverse = torch.unique(index.clamp(-1, self.num_experts), return_inverse=True)
        ids = ids.to(self.home)
        at = self._rows.find(ids)
        found = at >= 0
        place = torch.full_like(at, -1)
        place[found] = torch.arange(int(found.sum()), device=at.device)
        if self._cache is None:
            stored = {name: self._rows.gather(name, at[found]) for name in _TABLES}
        else:
            stored = self._cache.rows(ids[found], at[found], self._rows)
        return stored["down"], stored["up"], place.to(index.device)[inverse]

    # --- storing ---

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns shape and dtype of what is stored of an expert, by name (as `stored`)."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in _TABLES:
            shape = (self.r, self._width(name))
            shapes[name] = shape, self.dtype
            if self.dtype == torch.bfloat16:
                shapes[f"{name}_rest"] = shape, torch.int16
        return shapes

    def _width(self, name: str) -> int:
        return self.in_features if name == "down" else self.out_features

    def _joined(self, stored: dict[str, Tensor], name: str) -> Tensor:
        if self.dtype == torch.float32:
            return stored[name]
        return joined(stored[name], stored[f"{name}_rest"])

    def _forget(self, ids: Tensor) -> None:
        """Drops what was copied from rows that have changed."""
        self._trained = None
        self.version = next(_VERSIONS)
        if self._cache is not None:
            self._cache.drop(ids)

    def _new_cache(self) -> RowCache | None:
        if self.storage == "device":
            return None
        shapes = {name: shape for name, shape in self.shapes().items() if name in _TABLES}
        return RowCache(
            min(self.cache_rows, self.num_experts), self.num_experts, shapes, self.device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertBank:
        before, fn = self.device, keeping_dtype(fn)
        super()._apply(fn, recurse)
        if self.storage == "device" and isinstance(self._rows, RowTable):
            self._rows.apply(fn)
        elif self.device != before:
            self._cache = self._new_cache()
        if self.device != before:
            self._trained = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trained": None}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Saves the touched rows only."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor

    def stored(self) -> dict[str, Tensor]:
        """Returns the bank's state by name, sharing memory with it where that is possible.

        Returns:
            seed: [] int64.
            ids: [T] int64, the touched experts, counted in the larger bank (from `first`).
            down: [T, r, I] and up: [T, r, O] in the bank's dtype.
            down_rest, up_rest: int16, of a bank in bfloat16: see `split_floats`.
        """
        seed = torch.tensor(self.seed, dtype=torch.int64)
        tables = {name: self._rows.used(name) for name in self._rows.shapes}
        return {"seed": seed, "ids": self._rows.used_ids() + self.first, **tables}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Replaces the bank's state by one that `stored` returned, also of another N.

        Raises:
            KeyError: if a tensor is missing.
            ValueError, TypeError: if a shape, dtype or id does not fit; nothing has changed then.
        """
        ids = state["ids"] - self.first
        require_ids("ids", ids, self.num_experts)
        for name, (shape, dtype) in self.shapes().items():
            given = state[name]
            if tuple(given.shape) != (len(ids), *shape) or given.dtype != dtype:
                raise ValueError(
                    f"{name}: got {given.dtype} of shape {tuple(given.shape)}, expected {dtype} of "
                    f"shape {[len(ids), *shape]}"
                )
            if not torch.isfinite(given).all():
                raise ValueError(f"{name}: got NaN or infinite values, expected finite ones")
        rows = RowTable(self.num_experts, self.shapes(), self.home)
        rows.reserve(len(ids))
        rows.write(rows.add(ids.to(self.home)), {name: state[name] for name in self.shapes()})
        self.adopt(rows, int(state["seed"]))

    def adopt(self, rows: RowTable | MappedRows, seed: int) -> None:
        """Replaces all rows, and the seed of the untouched ones.

        Args:
            rows: of the bank's N and `shapes`; on `home`.
            seed: as the argument of the constructor.
        """
        self._rows, self.seed = rows, seed
        self.version = next(_VERSIONS)
        self._trained, self._cache = None, self._new_cache()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("seed", "ids", *self.shapes())
        state = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing = [prefix + name for name in names if name not in state]
        if missing:
            missing_keys.extend(missing)
            return
        try:
            self.restore(state)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{error}")

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, r={self.r}, in_features={self.in_features}, "
            f"out_features={self.out_features}, dtype={self.dtype}, storage={self.storage}, "
            f"touched={len(self._rows)}"
        )
