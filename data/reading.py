"""How the readers of this folder open, parse and check a file: they read it right or refuse it in
one line.

    with reading("notes.jsonl") as at:
        for item in json_lines(at):
            text, label = at.take(item, "text", "label", spare="id")

    ReadError: notes.jsonl, line 7: needs text, label; 'label' is missing

Whatever a parser throws inside the block (RecursionError on nested JSON, MemoryError on an absurd
header, KeyError, csv.Error, a broken zip ...) becomes such a line. Keys and columns that are there
and not used are named in a printed line, unless a reader lists them as spare: nothing is ignored in
silence.
"""

import contextlib
import csv
import functools
import gzip
import hashlib
import json
import math
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

MOST_BYTES = 16 << 30  # that compressed arrays may unpack to: a small file must not fill the memory
LONGEST_LINE = 1 << 20  # bytes: a file may unpack to one endless line


class ReadError(ValueError):
    """A file that is not what it should be: one line that names file, place and what is wrong."""


class Place:
    """Where a reader stands in its file, the checks it makes there, and what it met and did not
    use.
    """

    def __init__(self, path: str | Path, way_out: str = ""):
        self.path = path  # as the person typed it
        self.way_out = way_out
        self.line = 0  # counted from 1; 0: the file as a whole
        self.spot = ""  # another place, in words
        self.unused: set[str] = set()

    def error(self, what: str) -> ReadError:
        parts = [str(self.path)]
        if self.line:
            parts.append(f"line {self.line}")
        if self.spot:
            parts.append(self.spot)
        message = ", ".join(parts) + ": " + what
        if self.way_out:
            message += "; " + self.way_out
        return ReadError(" ".join(message.split()))

    def refuse(self, what: str) -> NoReturn:
        raise self.error(what)

    def need(self, condition: bool, what: str) -> None:
        if not condition:
            raise self.error(what)

    def take(self, item: object, texts: str, other: str = "", spare: str = "") -> list:
        """The values of these keys of a JSON object.

        `texts` hold words, `other` anything; `spare` ones are not used.
        """
        needed = [*texts.split(), *other.split()]
        self.need(
            isinstance(item, dict), f"needs an object with {', '.join(needed)}, not {shown(item)}"
        )
        for name in needed:
            self.need(name in item, f"needs {', '.join(needed)}; {name!r} is missing")
        for name in texts.split():
            self.word(item[name], name)
        self.unused |= item.keys() - {*needed, *spare.split()}
        return [item[name] for name in needed]

    def word(self, value: object, what: str) -> str:
        """A text with something in it."""
        self.need(isinstance(value, str), f"{what} is no text: {shown(value)}")
        self.need(bool(value.strip()), f"{what} is empty")
        value.encode()  # raises for half of a surrogate pair, which no file can hold
        return value

    def items(self, value: object, what: str) -> list:
        self.need(isinstance(value, list), f"{what}: a list is needed, not {shown(value)}")
        return value

    def words(self, values: object, what: str) -> list[str]:
        return [self.word(value, what) for value in self.items(values, what)]

    def one_of(self, value: object, allowed: Sequence, what: str) -> int:
        """Its number in `allowed`, whose type counts: neither true nor 1.0 is 1."""
        for number, known in enumerate(allowed):
            if type(value) is type(known) and value == known:
                return number
        self.refuse(f"{what} {shown(value)} is not one of {', '.join(map(str, allowed))}")

    def number(self, text: str, what: str) -> float:
        """A finite number."""
        try:
            value = float(text.replace("_", "?"))  # Python reads 1_0 as ten
        except ValueError:
            self.refuse(f"{what} {shown(text)} is not numeric")
        self.need(math.isfinite(value), f"{what} {shown(text)} is not finite")
        return value


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


@functools.cache  # once in a process
def say_once(line: str) -> None:
    print(line, file=sys.stderr)


@contextlib.contextmanager
def reading(path: str | Path, way_out: str = "") -> Iterator[Place]:
    """Any exception inside becomes a ReadError; what the system says (missing, forbidden) stays."""
    at = Place(path, way_out)
    try:
        yield at
    except (ReadError, FileNotFoundError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = str(error)[:200]
        if not reason or isinstance(error, LookupError | RecursionError | MemoryError):
            reason = f"{type(error).__name__} {reason}".strip()
        raise at.error(f"is damaged or of another format ({reason})") from error
    if at.unused:
        names = ", ".join(sorted(map(shown, at.unused))[:20])
        say_once(f"{path}: there and not used: {names}")


# --------------------------------------------------------------------------------------------------
# Open
# --------------------------------------------------------------------------------------------------


def open_file(path: str | Path) -> IO[bytes]:
    """A regular file, opened to read bytes: a pipe or a device is refused, not waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(Path(path).expanduser(), flags)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ReadError(f"{path} is no regular file; a pipe, a device or a folder cannot be read")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def sha256(path: str | Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------
# Parse: text, tables, JSON
# --------------------------------------------------------------------------------------------------


def lines(at: Place, whole: bool = False, longest: int = LONGEST_LINE) -> Iterator[str]:
    """The lines of a UTF-8 text (also .gz) without their ends; at.line follows.

    Empty ones may stand at the end.

    whole: the last line must have an end, else a file that was cut inside a number would give
    another number.
    """
    with open_file(at.path) as opened:
        file = gzip.GzipFile(fileobj=opened) if str(at.path).endswith(".gz") else opened
        empty = 0
        while raw := file.readline(longest):
            at.line += 1
            if len(raw) >= longest:
                at.refuse(f"has more than {longest:,} bytes")
            try:
                line = raw.decode("utf-8-sig" if at.line == 1 else "utf-8")
            except UnicodeDecodeError:
                at.refuse("not UTF-8")
            if not line.strip():
                empty = empty or at.line
                continue
            if empty:
                at.line = empty
                at.refuse("empty, with more below")
            if whole and not raw.endswith(b"\n"):
                at.refuse("has no end: the file is cut off (or add a newline)")
            yield line.rstrip("\r\n")
        at.need(at.line > 0 and empty != 1, "is empty")


def table(
    at: Place, needed: Sequence[str], spare: Sequence[str] = (), tabs: bool = False
) -> Iterator[list[str]]:
    """The cells of the needed columns, row by row, of a CSV file with a header. tabs: between
    cells, without quoting.

    A missing or double column and a row of another length are refused; columns that are not `spare`
    are printed.
    """
    if tabs:
        rows = (line.split("\t") for line in lines(at))
    else:
        rows = csv.reader((line + "\n" for line in lines(at, whole=True)), strict=True)
    header = [name.strip() for name in next(rows)]
    missing = [name for name in needed if name not in header]
    at.need(not missing, f"the header lacks {', '.join(missing)}; it has {', '.join(header[:25])}")
    at.need(len(set(header)) == len(header), "the header has a column twice")
    at.unused |= set(header) - {*needed, *spare}
    positions = [header.index(name) for name in needed]
    for row in rows:
        if len(row) != len(header):
            at.refuse(f"{len(row)} columns, not {len(header)} as in the header")
        yield [row[position] for position in positions]


def parse_json(content: str | bytes) -> object:
    """JSON without its two traps: a key that is there twice, and NaN or Infinity."""
    return json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice among {shown([key for key, _ in pairs])}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def json_lines(at: Place, longest: int = LONGEST_LINE) -> Iterator[object]:
    for line in lines(at, longest=longest):
        yield parse_json(line)


# --------------------------------------------------------------------------------------------------
# Parse: arrays
# --------------------------------------------------------------------------------------------------


def read_npz(
    path: str | Path, most: int = MOST_BYTES, packed: bool = True
) -> dict[str, np.ndarray]:
    """All arrays of an .npz, never unpickled. most: bytes they may unpack to; packed False: none is
    compressed.
    """
    with reading(path) as at, open_file(path) as file:
        at.need(zipfile.is_zipfile(file), "no zip archive of arrays (.npz)")
        most = max(most, os.fstat(file.fileno()).st_size)  # what is not compressed may be larger
        arrays = {}
        with zipfile.ZipFile(file) as archive:
            total = sum(member.file_size for member in archive.infolist())
            at.need(total <= most, f"its arrays unpack to {total:,} bytes, more than {most:,}")
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                at.spot = f"array {name!r}"
                at.need(name not in arrays, "is there twice")
                at.need(member.filename.endswith(".npy"), "is no array")
                is_packed = member.compress_type != zipfile.ZIP_STORED
                at.need(packed or not is_packed, "is compressed; use np.savez")
                with archive.open(member) as stream:
                    arrays[name] = parse_npy(at, stream, member.file_size)
    return arrays


def read_npy(path: str | Path) -> np.ndarray:
    """The array of an .npy, never unpickled."""
    with reading(path) as at, open_file(path) as file:
        return parse_npy(at, file, os.fstat(file.fileno()).st_size)


NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def parse_npy(at: Place, file: IO[bytes], size: int) -> np.ndarray:
    """An array in NumPy's format: numbers or strings, in machine order. size: bytes that the file
    has at most.
    """
    read_header = NPY_HEADERS[np.lib.format.read_magic(file)]
    shape, is_fortran, dtype = read_header(file)
    at.need(
        not dtype.hasobject, "it holds Python objects, and nothing is unpickled; text: .astype(str)"
    )
    at.need(dtype.kind in "biufcSU", f"an array of type {dtype} is refused")
    wanted = math.prod(shape) * dtype.itemsize
    fits = min(shape, default=0) >= 0 and wanted <= size
    at.need(fits, f"shape {list(shape)} does not fit into {size:,} bytes")
    content = bytearray(file.read(wanted))
    whole = len(content) == wanted and not file.read(1)
    at.need(whole, f"shape {list(shape)} is not what the file holds")
    array = np.frombuffer(content, dtype)
    if dtype.kind == "b":
        at.need(not (array.view(np.uint8) > 1).any(), "a truth value is neither 0 nor 1")
    array = array.reshape(shape, order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


# --------------------------------------------------------------------------------------------------
# Keep what takes minutes to parse
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cached(
    folder: Path, sources: Sequence[Path], options: str, parse: Callable[[Path], dict]
) -> Iterator[tuple[Path, dict]]:
    """(folder, what parse(folder) returned) with the files that it wrote there, parsed once and
    kept.

    Kept files are used only while the sources, the options and the files themselves have the very
    bytes they had, by SHA-256: neither a time stamp nor a size is proof. A folder that cannot be
    written keeps nothing.
    """
    key = hashlib.sha256(repr([options, *map(sha256, sources)]).encode()).hexdigest()
    info = _kept(folder, key)
    if info is not None:
        yield folder, info
        return
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".parsed-", dir=folder.parent))
        keeps = True
    except OSError as error:
        say_once(f"{folder} cannot be written ({error}); the files are parsed again next time")
        temporary = Path(tempfile.mkdtemp(prefix="parsed-"))
        keeps = False
    try:
        info = parse(temporary)
        if keeps:
            (temporary / "info.json").write_text(json.dumps(info))
            digests = {path.name: sha256(path) for path in temporary.iterdir()}
            (temporary / "meta.json").write_text(json.dumps({"key": key, "sha256": digests}))
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
        yield (folder if keeps else temporary), info
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _kept(folder: Path, key: str) -> dict | None:
    """What a cache holds, if it is of this key and whole."""
    try:
        with reading(folder / "meta.json") as at:
            kept = parse_json(read_bytes(at.path))
            at.need(kept["key"] == key, "other sources or options")
            for name, digest in kept["sha256"].items():
                at.need(sha256(folder / name) == digest, f"{name} has changed")
            return parse_json(read_bytes(folder / "info.json"))
    except (OSError, ReadError):
        return None
