"""A table of keys [N, D] in which rows may be absent, shared by exact and approximate indexes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapt_fast.ops._common import FLOATS
from sapt_fast.pools.key_index.base import KeyIndex

__all__ = ["TableIndex"]


class TableIndex(KeyIndex):
    """An index over one table. It begins without keys.

    Rows without a key contain NaN: their scores rank below all others. A state_dict contains only
    the rows with keys, as `rows` [P] int64 and `keys` [P, D].

    Args:
        num_keys, width, metric: as in `KeyIndex`.
        dtype: of the keys; float32, bfloat16 or float16, on a CPU also float64.
        device: of the keys.

    Attributes:
        keys: [N, D].
    """

    keys: Tensor

    def __init__(
        self,
        num_keys: int,
        width: int,
        *,
        metric: str = "dot",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_keys, width, metric)
        require_dtype(dtype)
        with torch.inference_mode(False):
            keys = torch.full((num_keys, width), float("nan"), dtype=dtype, device=device)
        self.register_buffer("keys", keys)
        self._spans: tuple[Any, tuple[int, int]] | None = None

    @property
    def num_present(self) -> int:
        return self._span()[0]

    def present_keys(self) -> tuple[Tensor, Tensor]:
        rows = self._present().nonzero().squeeze(1)
        keys = self.keys.detach()
        return (keys if rows.shape[0] == self.num_keys else keys[rows]), rows

    def set_rows(self, rows: Tensor, keys: Tensor) -> None:
        self._write(*self._checked(rows, keys))

    def remove_rows(self, rows: Tensor) -> None:
        self._write(self._checked_rows(rows), float("nan"))

    def keys_at(self, rows: Tensor) -> Tensor:
        """Returns the keys [M, D] in rows [M]; NaN in a row without a key."""
        return self.keys[rows]

    def require_rows(self, rows: Tensor) -> None:
        """Raises ValueError unless these rows have keys, and no others."""
        present = self.present_keys()[1]
        if not torch.equal(rows.sort().values, present):
            raise ValueError(f"index: got {len(present)} keys, expected {len(rows)}, one per fact")

    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(self, rows: Tensor, keys: Tensor | float) -> None:
        count, end = self._span()
        before = self._present(rows).sum()
        self.keys[rows] = keys
        change = int(self._present(rows).sum() - before)
        if change > 0:
            end = max(end, int(rows.max()) + 1)
        # Known without a pass over all keys, also to a graph that was compiled before.
        self._spans = self._fingerprint(), (count + change, end)

    def _checked(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Returns rows and keys as `set_rows` writes them."""
        rows = self._checked_rows(rows)
        if keys.shape != (rows.shape[0], self.width):
            raise ValueError(
                f"keys: got shape {tuple(keys.shape)}, expected [{rows.shape[0]}, {self.width}]"
            )
        if keys.dtype not in FLOATS:
            raise TypeError(f"keys: got dtype {keys.dtype}, expected one of {FLOATS}")
        keys = keys.to(self.keys)
        if not bool(torch.isfinite(keys).all()):
            raise ValueError(
                f"keys: got NaN or infinite values, expected values that are finite in "
                f"{self.keys.dtype}"
            )
        return rows, keys

    def _checked_rows(self, rows: Tensor) -> Tensor:
        if rows.dtype != torch.int64:
            raise TypeError(f"rows: got dtype {rows.dtype}, expected torch.int64")
        if rows.dim() != 1:
            raise ValueError(f"rows: got shape {tuple(rows.shape)}, expected [U]")
        if rows.numel():
            least, most = (int(end) for end in rows.aminmax())
            if least < 0 or most >= self.num_keys:
                raise ValueError(
                    f"rows: got values from {least} to {most}, expected 0 to {self.num_keys - 1}"
                )
        if rows.unique().shape[0] != rows.shape[0]:
            raise ValueError("rows: got a row twice, expected each once")
        return rows.to(self.keys.device)

    def _table(self) -> Tensor:
        return self.keys

    def _present(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns which rows have a key, [N] or [U] bool."""
        return ~self.keys.detach()[rows, 0].isnan()

    def _fingerprint(self) -> tuple[Any, ...]:
        """Returns what differs after every change of the keys, except one through `.data`."""
        return self.keys.data_ptr(), self.keys._version

    def _span(self) -> tuple[int, int]:
        """Returns the number of rows with keys, and an end behind the last one."""
        if self._spans is not None and torch.compiler.is_compiling():
            return self._spans[1]  # which a graph cannot check
        version = self._fingerprint()
        if self._spans is None or self._spans[0] != version:
            rows = self._present().nonzero()
            self._spans = version, (rows.shape[0], int(rows[-1]) + 1 if rows.shape[0] else 0)
        return self._spans[1]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "keys"], destination[prefix + "rows"] = self.present_keys()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in ("rows", "keys")]
        missing_keys += [name for name in names if name not in state_dict]
        if any(name not in state_dict for name in names):
            return
        try:
            rows, keys = self._checked(*(state_dict[name] for name in names))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{error}")
            return
        keys = keys.clone()  # a full index saves its own table
        self.keys.fill_(float("nan"))
        self.keys[rows] = keys
        self._span()

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        known = self._spans if self._spans and self._spans[0] == self._fingerprint() else None
        super()._apply(fn, recurse)
        self._spans = known and (self._fingerprint(), known[1])  # another memory, the same keys
        return self


def require_dtype(dtype: torch.dtype) -> None:
    """Raises TypeError unless keys can have this dtype."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected one of {FLOATS}")
