"""data/arrays.py: what was saved comes back bit for bit, and nothing else comes back."""

import json
import math
import os
import pickle

import numpy as np
import pytest
import torch

from data.arrays import load_arrays, save_arrays

ARRAYS = {"w": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "n": torch.arange(3)}
EXPECTED = {"w": ((3, 4), "float32"), "half": ((5,), "bfloat16"), "n": ((3,), "int64")}


def test_arrays_round_trip_bit_for_bit_with_their_digest(tmp_path):
    path = tmp_path / "new" / "a.npz"
    digest = save_arrays(path, ARRAYS, {"domain": "python"})
    arrays, meta = load_arrays(path, EXPECTED, digest)
    assert meta == {"domain": "python"}
    assert all(torch.equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]


UNEXPECTED = [
    ({**EXPECTED, "w": ((4, 3), "float32")}, None, r"w is float32 \[3, 4\]; float32 \[4, 3\]"),
    ({name: EXPECTED[name] for name in ("w", "n")}, None, "half"),
    (None, "0" * 64, "SHA-256"),
]


@pytest.mark.parametrize("expected, digest, message", UNEXPECTED)
def test_arrays_that_are_not_what_was_expected_are_refused(tmp_path, expected, digest, message):
    save_arrays(tmp_path / "a.npz", ARRAYS)
    with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
        load_arrays(tmp_path / "a.npz", expected, digest)


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="'w' holds NaN or infinity"):
        save_arrays(tmp_path / "a.npz", {"w": torch.tensor([math.nan])})
    assert not list(tmp_path.iterdir())


INT32 = np.arange(4, dtype=np.int32)
LIARS = [  # array w, dtypes that the header tells, what is said
    (INT32, {"w": "bfloat16"}, "w is stored as int32, not as bfloat16"),  # twice as wide
    (INT32, {"w": "int32", "v": "int32"}, "names other arrays"),
    (np.array([math.nan]), {"w": "float64"}, "w holds NaN"),
]


@pytest.mark.parametrize("array, dtypes, message", LIARS)
def test_files_that_say_something_else_are_refused(tmp_path, array, dtypes, message):
    header = json.dumps({"dtypes": dtypes, "meta": {}}).encode()
    np.savez(tmp_path / "a.npz", w=array, __meta__=np.frombuffer(header, np.uint8))
    with pytest.raises(ValueError, match=f"a.npz.*({message})"):
        load_arrays(tmp_path / "a.npz")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_hostile_array_files_are_refused_without_executing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.npz"

    def refused(message):
        with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
            load_arrays(path)

    np.savez(path, w=np.array([Bomb()], dtype=object))
    refused("nothing is unpickled")
    path.write_bytes(pickle.dumps(Bomb()))
    refused("no zip archive")
    assert not (tmp_path / "exploded").exists()
