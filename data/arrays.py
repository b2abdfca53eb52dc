"""Arrays to exchange with other people: .npz without pickle, checked before anything is used."""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb"):
    """Write beside `path`, then rename: a reader finds the old file or the new one, never half of it."""
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


def save_arrays(path: str | Path, arrays: dict[str, Tensor | np.ndarray], meta: dict | None = None) -> str:
    """Arrays to hand to other people: an uncompressed .npz without pickle. Returns its SHA-256 (hex).

    `meta` is any JSON. bfloat16, which NumPy lacks, is stored as its 16 bits. Raises ValueError for a non-finite
    array or a reserved name.
    """
    stored, dtypes = {}, {}
    for name, array in arrays.items():
        if name in ("__meta__", "file", "allow_pickle"):  # the last two are arguments of np.savez
            raise ValueError(f"{name!r} is a reserved array name")
        tensor = torch.as_tensor(array).detach().cpu().contiguous()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"array {name!r} holds NaN or infinity; nothing was written")
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        stored[name] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    header = json.dumps({"dtypes": dtypes, "meta": meta or {}}).encode()
    with atomic_file(path) as file:
        np.savez(file, **stored, __meta__=np.frombuffer(header, dtype=np.uint8))
    return sha256(path)


def load_arrays(
    path: str | Path, expected: dict[str, tuple[Sequence[int], str]] | None = None, digest: str | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_arrays` wrote, trusting nothing: (arrays, meta).

    `expected` maps every name to (shape, dtype) and must match exactly; `digest` is the SHA-256 the file must have.
    Raises ValueError naming the file and what is wrong: damage, pickled objects, compressed members (which could
    unpack to any size), missing or extra arrays, other shapes or dtypes, NaN.
    """
    path = Path(path)
    if digest is not None and sha256(path) != digest:
        raise ValueError(f"{path}: the SHA-256 is not the recorded one; the file is damaged or was changed")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed members are refused")
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
        header = json.loads(stored.pop("__meta__").tobytes())
        dtypes, meta = header["dtypes"], header["meta"]
        arrays = {name: torch.from_numpy(array.copy()) for name, array in stored.items()}
        for name, tensor in arrays.items():
            arrays[name] = tensor.view(torch.bfloat16) if dtypes[name] == "bfloat16" else tensor
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip can fail in any way
        raise ValueError(f"{path} is not a readable array file: {error}") from error
    if expected is not None and set(arrays) != set(expected):
        odd = sorted(set(arrays) ^ set(expected))
        raise ValueError(f"{path}: missing or unexpected arrays: {', '.join(odd[:5])}")
    for name, tensor in arrays.items():
        found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if expected is not None and found != (tuple(expected[name][0]), expected[name][1]):
            raise ValueError(f"{path}: {name} is {found[1]} {list(found[0])}; {expected[name]} is needed")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    return arrays, meta


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
