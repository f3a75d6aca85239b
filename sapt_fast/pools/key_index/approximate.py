"""Approximate search by faiss: inverted lists (IVF) and navigable graphs (HNSW)."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.checks import require_count
from sapt_fast.files.directories import atomic_write_bytes
from sapt_fast.files.reading import open_regular
from sapt_fast.ops.formulas import scores_of
from sapt_fast.pools.key_index.table import TableIndex

__all__ = ["ApproximateIndex", "HnswIndex", "IvfIndex"]

_FILE_BYTES = 2**40


class ApproximateIndex(TableIndex):
    """An index that faiss derives from the table of keys.

    The first search builds it, or `build`. Afterwards a changed key makes it stale: `search` raises
    an error until `build` is called again. Changes through `.data` are not noticed. Candidates are
    scored again from the table, so scores are those of the exact search, and differentiable in the
    query.

    Args:
        num_keys, width, metric, dtype, device: as in `TableIndex`.
        host_copy: whether keys may be on another device. faiss runs on the CPU: each search then
            copies the queries there and the result back.

    Raises:
        ImportError: if faiss is not installed.
    """

    def __init__(
        self, num_keys: int, width: int, *, host_copy: bool = False, **options: Any
    ) -> None:
        require_faiss()
        super().__init__(num_keys, width, **options)
        self.host_copy = host_copy
        self._built: tuple[Any, Tensor, tuple[Any, ...]] | None = None

    def build(self, threads: int = 1) -> None:
        """Builds the index from the keys, on the CPU.

        Args:
            threads: of faiss. One thread builds equal indexes from equal keys; with more, "hnsw"
                depends on their order.

        Raises:
            ValueError: if `threads` is not at least 1.
            RuntimeError: if the keys are on another device, and `host_copy` is false.
        """
        require_count("threads", threads)
        self._require_readable()
        keys, rows = self.present_keys()
        version = self._fingerprint()
        if rows.shape[0] == 0:
            self._built = None
            return
        with _faiss_threads(threads) as faiss:
            index = self._made(faiss, self._for_faiss(keys))
        self._built = index, rows.cpu(), version

    @property
    def stale(self) -> bool:
        return self._built is not None and self._built[2] != self._fingerprint()

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the built index to a file of its own, so that it need not be built again.

        Args:
            path: the file.

        Returns:
            `path` as a `Path`.

        Raises:
            RuntimeError: if the index is not built, or older than its keys.
            OSError: if the file cannot be written.
        """
        from safetensors.torch import save

        index = self._current()
        data = torch.from_numpy(require_faiss().serialize_index(index))
        text = json.dumps(self._about() | {"content": _digest(data)}).encode()
        about = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return atomic_write_bytes(path, save({"index": data, "about": about}))

    def load(self, path: str | PathLike[str]) -> None:
        """Reads a built index that `save` wrote for the same keys and options.

        Read only files that you trust: faiss does not check the content of its own format.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: if it is damaged, or was built from other keys or with other options.
        """
        from safetensors.torch import load

        with open_regular(Path(path), _FILE_BYTES) as file:
            read = file.read()
        try:
            stored = load(read)
            data, about = stored["index"], json.loads(bytes(stored["about"].tolist()))
            content = about.pop("content")
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise ValueError(f"{path}: truncated, or not a key index ({error})") from error
        if content != _digest(data):
            raise ValueError(f"{path}: damaged: its content has another digest than it states")
        expected = self._about()
        if about != expected:
            differs = [name for name in expected if about.get(name) != expected[name]]
            raise ValueError(
                f"{path}: the index was built from other keys or options ({', '.join(differs)}): "
                "call build()"
            )
        index = require_faiss().deserialize_index(data.numpy())
        self._built = index, self.present_keys()[1].cpu(), self._fingerprint()

    # --- search ---

    def _search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self._require_readable()
        if self._built is None:
            self.build()
        faiss_index = self._current()
        assert self._built is not None
        with torch.no_grad():
            places = self._candidates(faiss_index, self._for_faiss(query), k)
            at = torch.from_numpy(places)
            index = torch.where(at >= 0, self._built[1][at.clamp(min=0)], -1).to(query.device)
        none = index < 0
        scores = scores_of(query, self.keys, index.clamp(min=0), self.metric)
        scores = scores.masked_fill(none, float("-inf"))
        # By score, then by index; the second sort is stable.
        by_index = index.masked_fill(none, self.num_keys).argsort(1)
        order = scores.detach().gather(1, by_index).neg().argsort(dim=1, stable=True)
        order = by_index.gather(1, order)
        return scores.gather(1, order), index.gather(1, order)

    def _current(self) -> Any:
        """Returns the built index of faiss."""
        if self._built is None:
            raise RuntimeError(f"the {self.kind} index is not built: call build()")
        if self.stale:
            raise RuntimeError(
                f"the {self.kind} index is older than its keys, which changed after it was built: "
                "call build()"
            )
        return self._built[0]

    def _require_readable(self) -> None:
        if self.keys.device.type != "cpu" and not self.host_copy:
            raise RuntimeError(
                f"the {self.kind} index cannot read keys on {self.keys.device}: faiss runs on the "
                "CPU. Pass host_copy=True to copy queries and results in every search, or use the "
                "exact index"
            )

    def _for_faiss(self, vectors: Tensor) -> Any:
        vectors = vectors.detach().float().cpu().contiguous()
        if self.metric == "cosine":
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors.numpy()

    def _metric(self, faiss: Any) -> int:
        code: int = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        return code

    def _about(self) -> dict[str, Any]:
        """Returns what an index was built from and how, with a digest of the keys."""
        keys, rows = self.present_keys()
        return {
            "kind": self.kind,
            "metric": self.metric,
            "dtype": str(keys.dtype),
            "num_keys": self.num_keys,
            "keys": _digest(keys),
            "rows": _digest(rows),
            **self._options(),
        }

    @abstractmethod
    def _made(self, faiss: Any, keys: Any) -> Any:
        """Returns faiss's index over keys [P, D], a numpy array of float32."""

    @abstractmethod
    def _candidates(self, index: Any, query: Any, k: int) -> Any:
        """Returns the places [M, k] of the keys found, -1 for none; numpy arrays."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Returns the options that change what is built."""

    # --- a module's life ---

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.keys
        super()._apply(fn, recurse)
        if self.keys is not before:
            self._built = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._built = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None, "_spans": None}


class IvfIndex(ApproximateIndex):
    """Inverted lists: searches only the keys near the centroids that are nearest to the query.

    Args:
        num_keys, width, metric, dtype, device, host_copy: as in `ApproximateIndex`.
        lists: number of centroids [default: sqrt(P), for P keys].
        probes: number of lists that are searched for each query.
    """

    kind = "ivf"

    def __init__(
        self,
        num_keys: int,
        width: int,
        *,
        lists: int | None = None,
        probes: int = 32,
        **options: Any,
    ) -> None:
        if lists is not None:
            require_count("lists", lists)
        require_count("probes", probes)
        super().__init__(num_keys, width, **options)
        self.lists = lists
        self.probes = probes

    def _made(self, faiss: Any, keys: Any) -> Any:
        lists = min(self.lists or max(1, round(len(keys) ** 0.5)), len(keys))
        index = faiss.index_factory(self.width, f"IVF{lists},Flat", self._metric(faiss))
        index.cp.min_points_per_centroid = 1  # else few keys print a warning
        index.train(keys)
        index.add(keys)
        return index

    def _candidates(self, index: Any, query: Any, k: int) -> Any:
        faiss = require_faiss()
        return index.search(query, k, params=faiss.SearchParametersIVF(nprobe=self.probes))[1]

    def _options(self) -> dict[str, Any]:
        return {"lists": self.lists}


class HnswIndex(ApproximateIndex):
    """A navigable small-world graph: walks from key to key towards the query.

    Args:
        num_keys, width, metric, dtype, device, host_copy: as in `ApproximateIndex`.
        links: number of neighbours of each key.
        build_candidates: number of candidates while a key is added (`efConstruction`).
        search_candidates: number of candidates in a search (`efSearch`); at least k are used.
    """

    kind = "hnsw"

    def __init__(
        self,
        num_keys: int,
        width: int,
        *,
        links: int = 32,
        build_candidates: int = 40,
        search_candidates: int = 64,
        **options: Any,
    ) -> None:
        require_count("links", links, least=2)
        require_count("build_candidates", build_candidates)
        require_count("search_candidates", search_candidates)
        super().__init__(num_keys, width, **options)
        self.links = links
        self.build_candidates = build_candidates
        self.search_candidates = search_candidates

    def _made(self, faiss: Any, keys: Any) -> Any:
        index = faiss.IndexHNSWFlat(self.width, self.links, self._metric(faiss))
        index.hnsw.efConstruction = self.build_candidates
        index.add(keys)
        return index

    def _candidates(self, index: Any, query: Any, k: int) -> Any:
        wide = max(k, self.search_candidates)
        params = require_faiss().SearchParametersHNSW(efSearch=wide)
        return index.search(query, k, params=params)[1]

    def _options(self) -> dict[str, Any]:
        return {"links": self.links, "build_candidates": self.build_candidates}


def require_faiss() -> Any:
    """Imports faiss.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "index kinds 'ivf' and 'hnsw' need the extra 'faiss': pip install faiss-cpu"
        ) from error
    return faiss


@contextmanager
def _faiss_threads(threads: int) -> Iterator[Any]:
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def _digest(tensor: Tensor) -> str:
    return sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
