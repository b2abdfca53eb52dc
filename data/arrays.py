"""Arrays to exchange with other people: an uncompressed .npz without pickle, checked before
anything is used.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from data.reading import ReadError, parse_json, read_npz, reading, sha256

META = "__meta__"
RESERVED = (META, "file", "allow_pickle")  # the last two are arguments of np.savez


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Write beside `path`, then rename: a reader finds the old file or the new one, never half of
    it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(
    path: str | Path, arrays: dict[str, Tensor | np.ndarray], meta: dict | None = None
) -> str:
    """Write `arrays` and `meta` (any JSON), whole or not at all. Returns the file's SHA-256 (hex).

    bfloat16, which NumPy lacks, is stored as its 16 bits. Raises ValueError for a non-finite array
    or a reserved name.
    """
    stored = {}
    dtypes = {}
    for name, array in arrays.items():
        if name in RESERVED:
            raise ValueError(f"{name!r} is a reserved array name")
        tensor = torch.as_tensor(array).detach().cpu().contiguous()
        if not is_finite(tensor):
            raise ValueError(f"array {name!r} holds NaN or infinity; nothing was written")
        dtypes[name] = dtype_name(tensor)
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
        stored[name] = tensor.numpy()
    header = json.dumps({"dtypes": dtypes, "meta": meta or {}}).encode()
    stored[META] = np.frombuffer(header, dtype=np.uint8)

    with atomic_file(path) as file:
        np.savez(file, **stored)
    return sha256(path)


def load_arrays(
    path: str | Path,
    expected: dict[str, tuple[Sequence[int], str]] | None = None,
    digest: str | None = None,
) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_arrays` wrote, trusting nothing: (arrays, meta).

    expected  name -> (shape, dtype); it must match exactly
    digest    the SHA-256 that the file must have
    Raises ValueError naming the file and what is wrong: damage, pickled objects, compressed members
    (which could unpack to any size), missing or extra arrays, other shapes or dtypes, NaN.
    """
    if digest not in (None, sha256(path)):
        raise ReadError(f"{path}: the SHA-256 is not the recorded one; the file was changed")
    stored = read_npz(path, packed=False)
    with reading(path) as at:
        at.need(META in stored, f"it lacks {META}, which save_arrays writes")
        header = parse_json(stored.pop(META).tobytes())
        dtypes, meta = at.take(header, texts="", other="dtypes meta")
        at.need(not at.unused, f"{META} holds more than dtypes and meta")
        same = dtypes.keys() == stored.keys()
        at.need(same, f"{META} names other arrays: {', '.join(sorted(dtypes)[:5])}")
        arrays = {}
        for name, array in stored.items():
            tensor = torch.from_numpy(array)
            # Of any other width a view would have another shape.
            if dtypes[name] == "bfloat16" and tensor.dtype == torch.int16:
                tensor = tensor.view(torch.bfloat16)
            found = dtype_name(tensor)
            at.need(found == dtypes[name], f"{name} is stored as {found}, not as {dtypes[name]}")
            at.need(is_finite(tensor), f"{name} holds NaN or infinity")
            arrays[name] = tensor
        if expected is not None:
            odd = sorted(arrays.keys() ^ expected.keys())
            at.need(not odd, f"missing or unexpected arrays: {', '.join(odd[:5])}")
            for name, (shape, dtype) in expected.items():
                found = f"{dtype_name(arrays[name])} {list(arrays[name].shape)}"
                wanted = f"{dtype} {list(shape)}"
                at.need(found == wanted, f"{name} is {found}; {wanted} is needed")
    return arrays, meta


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def is_finite(tensor: Tensor) -> bool:
    may_be_odd = tensor.is_floating_point() or tensor.is_complex()
    return not may_be_odd or bool(torch.isfinite(tensor).all())
