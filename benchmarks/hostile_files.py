"""Ways to spoil a file: damage, bombs, and what would run code if it were trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Spoiler", "spoilers"]


@dataclass(frozen=True)
class Spoiler:
    """One way to spoil a file.

    Attributes:
        write: takes the undamaged file's path, one that code in the file would create, and a
            generator.
        random: another file each time.
        harmless: the result may load as something else: nothing in the format can tell.
    """

    name: str
    write: Callable[[Path, Path, random.Random], None]
    random: bool = False
    harmless: bool = False


class _Code:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


# --- any file ---


def _truncate(path: Path, canary: Path, generator: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content))])


def _flip(path: Path, canary: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def _overwrite(path: Path, canary: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    length = min(len(content), 64)
    start = generator.randrange(len(content) - length + 1)
    content[start : start + length] = generator.randbytes(length)
    path.write_bytes(content)


def _bytes(make: Callable[[random.Random], bytes]) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        path.write_bytes(make(generator))

    return write


def _replace(make: Callable[[Path], None]) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        path.unlink()
        make(path)

    return write


def _sparse_file(path: Path, canary: Path, generator: random.Random) -> None:
    """8 GB of zeros behind the content, of which the disk has none."""
    os.truncate(path, 8 << 30)


def any_file(bits_matter: bool) -> list[Spoiler]:
    return [
        Spoiler("truncated", _truncate, random=True, harmless=not bits_matter),
        Spoiler("flipped bit", _flip, random=True, harmless=not bits_matter),
        Spoiler("overwritten", _overwrite, random=True, harmless=not bits_matter),
        Spoiler("empty", _bytes(lambda _: b"")),
        Spoiler("noise", _bytes(lambda generator: generator.randbytes(4096)), random=True),
        Spoiler("FIFO", _replace(lambda path: os.mkfifo(path))),
        Spoiler("link to /dev/zero", _replace(lambda path: path.symlink_to("/dev/zero"))),
        Spoiler("link to itself", _replace(lambda path: path.symlink_to(path.name))),
        Spoiler("folder", _replace(lambda path: path.mkdir())),
        Spoiler("missing", _replace(lambda path: None)),
    ]


# --- .pt ---


def _edit_pt(edit: Callable[[Any], Any]) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        torch.save(edit(torch.load(path, weights_only=True)), path)

    return write


def _each_tensor(change: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        if isinstance(content, torch.Tensor):
            return change(content.detach())
        return {name: change(tensor.detach()) for name, tensor in content.items()}

    return edit


def _zip_bomb(name: str) -> Callable[..., None]:
    """A member of 3 GB of zeros in 3 MB."""

    def write(path: Path, canary: Path, generator: random.Random) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {entry: archive.read(entry) for entry in archive.namelist()}
        victim = next(entry for entry in members if entry.endswith(name))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for entry, content in members.items():
                if entry != victim:
                    archive.writestr(entry, content)
            with archive.open(victim, "w", force_zip64=True) as member:
                member.write(members[victim])
                zeros = bytes(1 << 24)
                for _ in range(192):
                    member.write(zeros)

    return write


def _pt_with_pickle(content: Callable[[Path], bytes]) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for entry, old in members.items():
                archive.writestr(entry, content(canary) if entry.endswith("data.pkl") else old)

    return write


def _torch_code(path: Path, canary: Path, generator: random.Random) -> None:
    torch.save({"0.weight": _Code(canary)}, path)


def _legacy_code(path: Path, canary: Path, generator: random.Random) -> None:
    torch.save({"0.weight": _Code(canary)}, path, _use_new_zipfile_serialization=False)


def _huge_stride(tensor: torch.Tensor) -> torch.Tensor:
    """A few bytes that stand for 10**9 rows."""
    return torch.zeros(1, 1, dtype=tensor.dtype).expand(10**9, tensor.shape[-1])


def _overlapping(tensor: torch.Tensor) -> torch.Tensor:
    """The right shape over storage that is too small for it."""
    return tensor.flatten()[:1].clone().expand(tensor.shape)


def _nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([tensor, tensor])


def _large_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The right tensor in the middle of 64 MB of others."""
    storage = torch.zeros(tensor.numel() + (1 << 24), dtype=tensor.dtype)
    storage[: tensor.numel()] = tensor.flatten()
    return storage[: tensor.numel()].view(tensor.shape)


def _pt() -> list[Spoiler]:
    changes: dict[str, Callable[[torch.Tensor], Any]] = {
        "stride 0": _huge_stride,
        "stride 0 in the right shape": _overlapping,
        "sparse": lambda t: t.to_sparse(),
        "sparse rows": lambda t: t.reshape(1, -1).to_sparse_csr(),
        "meta": lambda t: t.to("meta"),
        "nested": _nested,
        "not finite": lambda t: torch.full_like(t, float("nan")),
        "infinite": lambda t: torch.full_like(t, float("inf")),
        "complex": lambda t: t.to(torch.complex64),
        "integers": lambda t: t.to(torch.int64),
        "booleans": lambda t: t.bool(),
        "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "no rows": lambda t: t[:0],
        "scalar": lambda t: t.sum(),
        "eight dimensions": lambda t: t.reshape(*t.shape, *[1] * (8 - t.dim())),
        "numbers for tensors": lambda t: 3,
    }
    made = [Spoiler(name, _edit_pt(_each_tensor(change))) for name, change in changes.items()]
    return [
        *made,
        Spoiler("large storage", _edit_pt(_each_tensor(_large_storage))),
        Spoiler("list", _edit_pt(lambda content: [content])),
        Spoiler("no entries", _edit_pt(lambda content: {})),
        Spoiler("number keys", _edit_pt(lambda content: {1: torch.zeros(2, 2)})),
        Spoiler("zip bomb as pickle", _zip_bomb("data.pkl")),
        Spoiler("zip bomb as storage", _zip_bomb("data/0")),
        Spoiler("code", _torch_code),
        Spoiler("code, old format", _legacy_code),
        *(
            Spoiler(f"{name} in the archive", _pt_with_pickle(content))
            for name, content in _PICKLES.items()
        ),
    ]


# --- .pkl ---

_DEEP = 200_000
_PICKLES: dict[str, Callable[[Path], bytes]] = {
    "code": lambda canary: pickle.dumps(_Code(canary)),
    "code, protocol 0": lambda canary: pickle.dumps(_Code(canary), 0),
    "memo bomb": lambda _: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo bomb of 1 GB": lambda _: b"\x80\x02Nr\xff\xff\xff\x03.",
    "LONG bomb": lambda _: b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 64 + b".",
    "long integer": lambda _: b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    "bytes of 2**60": lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "bytes of 4 GB": lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 32) + b"x.",
    "text of 4 GB": lambda _: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 32) + b"x.",
    "bytearray of 8 GB": lambda _: b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"x.",
    "frame of 2**60": lambda _: b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "deep tuples": lambda _: b"\x80\x02)" + b"\x85" * _DEEP + b".",
    "deep lists": lambda _: b"\x80\x02" + b"]" * _DEEP + b"a" * (_DEEP - 1) + b".",
    "digits": lambda _: b"I" + b"9" * 100_000 + b"\n.",
    "persistent name": lambda _: b"Pname\n.",
    "builtins.eval": lambda _: b"cbuiltins\neval\n(S'1'\ntR.",
    "array by multiplication": lambda _: (
        b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86tR."
    ),
    "empty stack": lambda _: b".",
    "nothing but marks": lambda _: b"(" * 1_000_000 + b".",
}


def _array(**changed: Any) -> Callable[..., None]:
    """The pickle of an array whose state says something else."""

    def write(path: Path, canary: Path, generator: random.Random) -> None:
        state = {"shape": (1,), "kind": "f4", "order": "<", "data": struct.pack("<f", 1.0)}
        state.update(changed)
        stream = io.BytesIO()
        stream.write(
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b"
        )
        stream.write(b"\x87R(K\x01" + _pickled(state["shape"]))
        stream.write(b"cnumpy\ndtype\n" + _pickled(state["kind"]) + b"K\x00K\x01\x87R(K\x03")
        stream.write(_pickled(state["order"]) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        stream.write(_pickled(state["data"]) + b"tb.")
        path.write_bytes(stream.getvalue())

    return write


def _pickled(value: Any) -> bytes:
    """Its opcodes alone."""
    return pickle.dumps(value, 3)[2:-1]


def _pkl() -> list[Spoiler]:
    states: dict[str, dict[str, Any]] = {
        "array of 2**62 numbers": {"shape": (1 << 62,)},
        "array of huge shape": {"shape": (10**4300,)},
        "array of negative shape": {"shape": (-1, -1)},
        "array of many dimensions": {"shape": (1,) * 1000},
        "array of nan": {"data": struct.pack("<f", float("nan"))},
        "array of objects": {"kind": "O8", "order": "|"},
        "array of text": {"kind": "f4", "order": "<" * 10**6},
        "array without bytes": {"data": None},
        "array of numbers for bytes": {"data": 7},
        "array of records": {"kind": "V10000000"},
        "array of none": {"shape": (0,), "data": b""},
    }
    return [
        *(Spoiler(name, _array(**state)) for name, state in states.items()),
        *(Spoiler(name, _pickle_file(content)) for name, content in _PICKLES.items()),
    ]


def _pickle_file(content: Callable[[Path], bytes]) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        path.write_bytes(content(canary))

    return write


# --- .safetensors ---


def _header(change: Callable[[dict[str, Any]], Any], tail: int = 0) -> Callable[..., None]:
    """Another header before the same bytes; `tail` more of them."""

    def write(path: Path, canary: Path, generator: random.Random) -> None:
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + bytes(tail))

    return write


def _entries(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Every tensor's description with other fields."""
    return lambda header: {
        name: entry if name == "__metadata__" else {**entry, **fields}
        for name, entry in header.items()
    }


def _values(number: float) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        save_file({n: torch.full_like(t, number) for n, t in tensors.items()}, path)

    return write


def _safetensors() -> list[Spoiler]:
    def of_length(length: int) -> Callable[..., None]:
        return _bytes(lambda _: struct.pack("<Q", length) + b"{}")

    return [
        Spoiler("header of 2**63", of_length((1 << 63) + 5)),
        Spoiler("header of 4 GB", of_length(1 << 32)),
        Spoiler("header of no bytes", of_length(0)),
        Spoiler("deep header", _header(lambda _: b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
        Spoiler(
            "header of 60 MB",
            _header(lambda h: json.dumps(h)[:-1].encode() + b" " * 60_000_000 + b"}"),
            harmless=True,
        ),
        Spoiler(
            "many entries",
            _header(lambda h: {**h, **{str(i): next(iter(h.values())) for i in range(200_000)}}),
        ),
        Spoiler("all offsets the same", _header(_entries(data_offsets=[0, 8]))),
        Spoiler("offsets backwards", _header(_entries(data_offsets=[8, 0]))),
        Spoiler("offsets beyond", _header(_entries(data_offsets=[0, 1 << 62]))),
        Spoiler("huge shape", _header(_entries(shape=[1 << 40, 1 << 40]))),
        Spoiler("negative shape", _header(_entries(shape=[-1, 2]))),
        Spoiler("unknown type", _header(_entries(dtype="F99"))),
        Spoiler("integers", _header(_entries(dtype="I32"))),
        Spoiler("more bytes", _header(lambda h: h, tail=1000)),
        Spoiler("8 GB more, sparse", _sparse_file),
        Spoiler("not finite", _values(float("nan"))),
        Spoiler("infinite", _values(float("inf"))),
        Spoiler("other numbers", _values(0.25)),
    ]


# --- .json and .yaml ---


def _edit_json(edit: Callable[[dict[str, Any]], Any]) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        edited = edit(json.loads(path.read_text()))
        path.write_text(edited if isinstance(edited, str) else json.dumps(edited))

    return write


def _with(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Every number in the file is another value."""

    def changed(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: changed(item) for name, item in node.items()}
        if isinstance(node, list):
            return [changed(item) for item in node]
        number = isinstance(node, (int, float)) and not isinstance(node, bool)
        return value if number else node

    return changed


def _json() -> list[Spoiler]:
    deep = "[" * 200_000 + "]" * 200_000
    fields = ("tasks", "config", "settings", "scores", "source", "base_model")

    def in_fields(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda content: {n: value if n in fields else old for n, old in content.items()}

    def long_integer(content: dict[str, Any]) -> str:
        return json.dumps(_with("@")(content)).replace('"@"', "9" * 400)

    def too_long_integer(content: dict[str, Any]) -> str:
        return json.dumps(_with("@")(content)).replace('"@"', "9" * 10_000)

    return [
        Spoiler("deep lists", _edit_json(lambda _: deep)),
        Spoiler("deep objects", _edit_json(lambda _: '{"a":' * 200_000)),
        Spoiler(
            "deep field",
            _edit_json(lambda content: json.dumps({**content, "tasks": "@"}).replace('"@"', deep)),
        ),
        Spoiler("integer of 400 digits", _edit_json(long_integer)),
        Spoiler("integer of 10000 digits", _edit_json(too_long_integer)),
        Spoiler("numbers not finite", _edit_json(_with(float("nan")))),
        Spoiler("numbers infinite", _edit_json(_with(float("inf")))),
        Spoiler("numbers of 1e308", _edit_json(_with(1e308))),
        Spoiler("numbers negative", _edit_json(_with(-7))),
        Spoiler("numbers as text", _edit_json(_with("many"))),
        Spoiler("fields null", _edit_json(in_fields(None))),
        Spoiler("fields lists", _edit_json(in_fields([]))),
        Spoiler("fields text", _edit_json(in_fields("../../x"))),
        Spoiler("fields lists of null", _edit_json(in_fields([None]))),
        Spoiler("list", _edit_json(lambda content: [content])),
        Spoiler("null", _edit_json(lambda _: None)),
        Spoiler("no fields", _edit_json(lambda _: {})),
        Spoiler("more fields", _edit_json(lambda content: {**content, "x\0": 1})),
        Spoiler("UTF-16", _edit_bytes(lambda text: text.encode("utf-16"))),
        Spoiler("NUL bytes", _edit_bytes(lambda text: text.encode().replace(b'"', b'"\0'))),
        Spoiler("surrogates", _edit_bytes(lambda text: text.encode().replace(b'"', b'"\xed\xa0'))),
    ]


def _edit_bytes(edit: Callable[[str], bytes]) -> Callable[..., None]:
    def write(path: Path, canary: Path, generator: random.Random) -> None:
        path.write_bytes(edit(path.read_text()))

    return write


def _yaml() -> list[Spoiler]:
    def text(content: str | Callable[[Path], str]) -> Callable[..., None]:
        def write(path: Path, canary: Path, generator: random.Random) -> None:
            path.write_text(content if isinstance(content, str) else content(canary))

        return write

    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    merges = ["a0: &a0 {x: 1}"]
    merges += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
    return [
        Spoiler("deep lists", text("tasks: " + "[" * 100_000)),
        Spoiler("deep mappings", text("tasks: " + "{a: " * 100_000)),
        Spoiler("a billion laughs", text("\n".join(laughs))),
        Spoiler("laughs in an option", text("\n".join([*laughs[:1], "tasks: *a0", *laughs[1:]]))),
        Spoiler("merged keys", text("\n".join(merges))),
        Spoiler("integer of 10000 digits", text("max_train: " + "9" * 10_000)),
        Spoiler("sexagesimal", text("max_train: 1" + ":59" * 10_000), harmless=True),
        Spoiler(
            "code",
            text(lambda canary: f"tasks: !!python/object/apply:os.system ['touch {canary}']"),
        ),
        Spoiler("a date that is none", text("tasks: 2026-99-99")),
        Spoiler("binary that is none", text("tasks: !!binary '*'"), harmless=True),
        Spoiler("unhashable key", text("[1, 2]: 3\n? {a: 1}\n: 2")),
        Spoiler("recursive", text("tasks: &a [*a]")),
        Spoiler("recursive key", text("&a {*a : 1}")),
        Spoiler("two documents", text("tasks: a\n---\ntasks: b")),
        Spoiler("list", text("- tasks")),
        Spoiler("UTF-16", _edit_bytes(lambda content: content.encode("utf-16") + b"\xff")),
        Spoiler("control characters", text("tasks: \x07")),
    ]


_OF_KIND: dict[str, Callable[[], list[Spoiler]]] = {
    ".pt": _pt,
    ".pkl": _pkl,
    ".safetensors": _safetensors,
    ".json": _json,
    ".yaml": _yaml,
}


def spoilers(suffix: str) -> list[Spoiler]:
    """The ways to spoil a file with this suffix."""
    # only our own checkpoints carry digests of their content
    return [*any_file(bits_matter=suffix == ".safetensors"), *_OF_KIND[suffix]()]
