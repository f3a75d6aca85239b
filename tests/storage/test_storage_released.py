"""Hostile files in the format of the original SAPT code are refused without excess memory."""

import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sapt_fast.released import _read
from sapt_fast.storage.released_files import read_array, read_torch

RUN = Path(__file__).parents[1] / "data" / "oracle" / "t5" / "task2" / "saved_weights"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "saved_weights"))


def entry(value):
    """Puts a value in the place of the projection's first matrix."""

    def change(folder):
        path = folder / "trans_input.pt"
        torch.save({**torch.load(path, weights_only=True), "0.weight": value}, path)

    return change


def adapters(side, edit):
    """Changes one matrix of LoRA."""

    def change(folder):
        path = folder / f"lora_weights_{side}.pt"
        tensors = torch.load(path, weights_only=True)
        name = sorted(tensors)[-1]
        torch.save({**tensors, name: edit(tensors[name].detach()).clone()}, path)

    return change


def repacked(edit, compression=zipfile.ZIP_STORED):
    def change(folder):
        path = folder / "trans_input.pt"
        with zipfile.ZipFile(path) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", compression) as new:
            for name, data in parts.items():
                new.writestr(name, edit(name, data))

    return change


def attention(data):
    return lambda folder: (folder / "attention_weights.pkl").write_bytes(data)


def replaced(make):
    def change(folder):
        (folder / "trans_input.pt").unlink()
        make(folder / "trans_input.pt")

    return change


def sized(name):
    def change(folder):
        with open(folder / name, "r+b") as file:
            file.truncate(2**34)

    return change


NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
MEMO = b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"."
HUGE_COUNT = (rb"(cpuq.)(K.|M..|J....)", lambda m: m[1] + b"\x8a\x05\0\0\0\0\x7f")
SPOILED = {
    "stride 0": (entry(torch.zeros(1, 1).expand(10**9, 64)), "0.weight: got .* overlap in memory"),
    "overlap": (entry(torch.arange(40.0).as_strided((10, 8), (1, 1))), "0.weight: .* overlap"),
    "sparse": (entry(torch.eye(3).to_sparse()), "0.weight: got a sparse tensor"),
    "sparse rows": (entry(torch.eye(3).to_sparse_csr()), "0.weight: got a sparse tensor"),
    "meta": (entry(torch.empty(10**9, 64, device="meta")), "0.weight: got .*meta device"),
    "nested": (entry(NESTED), "0.weight: got a nested tensor"),
    "quantised": (
        entry(torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)),
        "0.weight: got a quantised tensor",
    ),
    "complex": (entry(torch.ones(2, 2, dtype=torch.complex64)), "tensor of type ComplexFloat"),
    "integers": (entry(torch.ones(2, 2, dtype=torch.int64)), "0.weight: .* type Long"),
    "float8": (entry(torch.ones(2, 2).to(torch.float8_e4m3fn)), "0.weight: got a tensor of a"),
    "no rows": (entry(torch.empty(0, 64)), r"0.weight: got shape \(0, 64\)"),
    "scalar": (entry(torch.tensor(1.0)), r"0.weight: got shape \(\)"),
    "A of no rows": (adapters("A", lambda t: t[:0]), r"A.pt: .* got shape \(0, "),
    "B of no rows": (adapters("B", lambda t: t[:0]), r"B.pt: .* got shape \(0, "),
    "A of another rank": (adapters("A", lambda t: t[:1]), r"A.pt: .* got shape \(1, "),
    "beyond float32": (
        attention(pickle.dumps(np.full(3, 1e300), 4)),
        r"attention_weights.pkl: got \[inf",
    ),
    "NaN": (entry(torch.full((2, 2), torch.nan)), "0.weight: got NaN"),
    "no tensor": (entry("text"), "0.weight: got str"),
    "zip bomb": (
        repacked(lambda n, d: b"\0" * 2**20 if n.endswith("/0") else d, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "memo": (repacked(lambda n, d: MEMO if n.endswith("pkl") else d), "memo indices beyond"),
    "huge storage": (
        repacked(lambda n, d: re.sub(*HUGE_COUNT, d, count=1) if n.endswith("pkl") else d),
        "a storage of 545460846592 numbers",
    ),
    "before torch 1.6": (
        lambda f: torch.save(
            {}, f / "trans_input.pt", _use_new_zipfile_serialization=False
        ),
        "not an archive of torch.save since",
    ),
    "16 GB of zeros": (sized("trans_input.pt"), "not an archive"),
    "16 GB of attention": (sized("attention_weights.pkl"), "at most"),
    "pipe": (replaced(os.mkfifo), "got a pipe, expected a regular file"),
    "device": (replaced(lambda p: p.symlink_to("/dev/zero")), "got a device"),
    "folder": (replaced(Path.mkdir), "got a folder"),
    "frame": (attention(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N."), "frame"),
    "bytes": (attention(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"aa."), "not a pickled"),
    "buffer": (attention(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"aa."), "not a pickled"),
    "long": (attention(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"aa."), "not a pickled"),
    "memo of the array": (attention(MEMO), "memo indices beyond"),
    "number in text": (attention(b"L" + b"9" * 10**5 + b"L\n."), "not a pickled numpy"),
    "deep": (attention(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."), "not a pickled numpy"),
    "shape": (
        attention(
            pickle.dumps(np.ones(3, np.float32), 4).replace(b"K\3\x85", b"J\xff\xff\xff\x7f\x85")
        ),
        "not a pickled numpy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_hostile_files_are_refused_by_name(name, folder):
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        _read(folder, 3)
    assert str(folder) in str(error.value)


def test_no_memory_beyond_the_file(folder):
    """In a process that may have only a little more than it has after its imports."""
    bomb = repacked(lambda n, d: b"\0" * 2**28 if n.endswith("/0") else d, zipfile.ZIP_DEFLATED)
    spoil = [bomb, *(SPOILED[n][0] for n in ("stride 0", "memo", "huge storage", "16 GB of zeros"))]
    files = [folder / "trans_input.pt"]
    for number, change in enumerate(spoil):
        copy = Path(shutil.copytree(RUN, folder.parent / str(number)))
        change(copy)
        files.append(copy / "trans_input.pt")
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sapt_fast.storage.released_files import Refused, read_torch\n"
        "read_torch(Path(sys.argv[1]))\n"  # everything that is imported late
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))\n"
        "for name in sys.argv[2:]:\n"
        "    try:\n"
        "        found = read_torch(Path(name))\n"
        "    except ValueError as error:\n"
        "        assert name in str(error) and 'MemoryError' not in str(error), error\n"
        "    else:\n"
        "        assert isinstance(found['0.weight'], Refused)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_torch_saves_is_read(dtype, tmp_path):
    base = torch.randn(6, 8, dtype=dtype)
    saved = {
        "whole": base,
        "view": base[1:, 2:],
        "transposed": base.t(),
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "empty": torch.empty(0, 4, dtype=dtype),
        "scalar": torch.tensor(2.5, dtype=dtype),
    }
    torch.save(saved, tmp_path / "x.pt")
    found = read_torch(tmp_path / "x.pt")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    assert found["whole"].dtype == dtype


def test_damage_to_an_archive_is_noticed(folder):
    path = folder / "trans_input.pt"
    data = bytearray(path.read_bytes())
    place = data.index(read_torch(path)["0.weight"].numpy().tobytes())
    data[place + 100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"trans_input\.pt: damaged.*CRC"):
        read_torch(path)


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD with attributes for the function that a name stands for."""
    text = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(N}X\x0c\0\0\0__defaults__)sX\1\0\0\0xtb."
    )
    (tmp_path / "x.pkl").write_bytes(text)
    with pytest.raises(ValueError, match="not a pickled numpy"):
        read_array(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(np.ones(2)))
    assert read_array(tmp_path / "x.pkl").tolist() == [1.0, 1.0]
