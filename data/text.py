"""Byte corpora that any machine with Python and torch already holds, and the reader's own text.

A language model needs text; a first run should need no download. Every Python brings several
megabytes of source code, its documentation and licences, and torch brings the headers of its C++
library. Each of these is a *domain*:

    python     top-level modules of the standard library        about 4.5 MB
    docs       the language reference behind `help()`           about 0.4 MB
    headers    C++ headers that come with torch                 about 30 MB

A token is a byte, so the vocabulary is 256 and a loss in nats/byte needs no tokenizer to be
understood. Documents are split whole, and a paragraph that stands in several (help topics quote
each other, headers share their licence) is kept once, so that validation does not ask for what
training has shown. Only equal paragraphs are: in `headers`, thousands of which a program wrote, a
quarter of validation (in blocks of 64 bytes) stands in training, elsewhere half a percent. The
bytes differ between installations: their hash is printed, and losses are compared within a machine.

Where models are compared *by domain* there are more of them, told apart by where they come from
(PROVENANCE), each in three parts, without near copies: `load_provenance(name)`. A domain of your
own is a folder; `prepare` makes one.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import re
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.reading import (
    ReadError,
    json_lines,
    open_file,
    parse_json,
    read_bytes,
    reading,
    say_once,
    shown,
)

Document = tuple[str, bytes]  # (name, contents)


class Corpus(NamedTuple):
    name: str
    train: Tensor  # [train_bytes] uint8
    val: Tensor  # [val_bytes] uint8
    digest: str  # first 12 hex digits of the SHA-256 over both parts
    num_documents: int
    note: str = ""  # what a reader should know about where the bytes came from


def _files(root: Path, pattern: str) -> Iterator[Document]:
    """Readable text: no links, nothing hidden, nothing binary."""
    for path in sorted(root.glob(pattern), key=lambda p: p.as_posix()):
        name = path.relative_to(root)
        if (
            path.is_file()
            and not path.is_symlink()
            and not any(part.startswith(".") for part in name.parts)
        ):
            content = path.read_bytes()
            if not _is_binary(content):
                yield name.as_posix(), content


def _is_binary(content: bytes) -> bool:
    return b"\0" in content[:8192]


def _python() -> tuple[list[Document], str]:
    return list(_files(Path(sysconfig.get_path("stdlib")), "*.py")), ""


def _docs() -> tuple[list[Document], str]:
    try:
        from pydoc_data.topics import topics  # a dict of strings, topic -> text
    except ImportError:  # slim installations leave it out
        stdlib = Path(sysconfig.get_path("stdlib"))
        packages = []
        for name in ("email", "json", "http", "xml"):
            packages += _files(stdlib / name, "**/*.py")
        stand_in = "the packages email, json, http and xml stand in for it"
        return packages, f"this Python has no pydoc_data; {stand_in}"
    return [(name, text.encode()) for name, text in sorted(topics.items())], ""


def _headers() -> tuple[list[Document], str]:
    return list(_files(Path(torch.__file__).parent / "include", "**/*.h")), ""


DOMAINS = {"python": _python, "docs": _docs, "headers": _headers}


@functools.cache  # read once in a process, whatever the number of arms
def load_domain(name: str, val_share: float = 0.1) -> Corpus:
    """One of DOMAINS, split by document. Raises ValueError for an unknown or empty domain."""
    if name not in DOMAINS:
        raise ValueError(f"no text domain {name!r}; there are {', '.join(DOMAINS)}")
    documents, note = DOMAINS[name]()
    return split_documents(name, documents, val_share, note)


def load_text(path: str | Path, val_share: float = 0.1) -> Corpus:
    """A file (its last val_share becomes validation) or a folder (split by file; binary files are
    skipped).

    Raises FileNotFoundError when the path is missing, ValueError when it holds no text.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"text {path}: no such file or folder")
    if path.is_dir():
        return split_documents(path.name, list(_files(path, "**/*")), val_share)
    content = read_bytes(path)
    if _is_binary(content):
        raise ReadError(f"text {path} is a binary file")
    return split_documents(path.name, [(path.name, content)], val_share)


def split_documents(
    name: str, documents: list[Document], val_share: float, note: str = ""
) -> Corpus:
    """Drop what repeats, hold whole documents out until val_share of the bytes is reached, join the
    rest.

    Which documents are held out depends on their contents alone (the order of their hashes), so the
    split does not move when files are renamed or found in another order. A single document is cut
    at a line end instead.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share is {val_share}; it must lie between 0 and 1")
    by_hash = drop_repeats(
        sorted({content for _, content in documents}, key=lambda c: hashlib.sha256(c).digest())
    )
    if not by_hash:
        raise ValueError(
            f"text {name!r} holds no text ({len(documents)} text files, none with words)"
        )
    budget = val_share * sum(map(len, by_hash))
    if len(by_hash) == 1:
        cut = int(len(by_hash[0]) - budget)
        cut = by_hash[0].rfind(b"\n", int(0.99 * cut), cut) + 1 or cut
        train, val = [by_hash[0][:cut]], [by_hash[0][cut:]]
    else:
        train = []
        val = []
        taken = 0
        for content in by_hash:
            held_out = taken + len(content) <= budget
            (val if held_out else train).append(content)
            taken += len(content) * held_out
        if not val:  # every document is larger than the budget: hold out the smallest
            val = [train.pop(min(range(len(train)), key=lambda i: len(train[i])))]
    train_bytes, val_bytes = b"\n".join(train), b"\n".join(val)
    digest = hashlib.sha256(train_bytes + b"\0" + val_bytes).hexdigest()[:12]
    return Corpus(name, _as_tensor(train_bytes), _as_tensor(val_bytes), digest, len(by_hash), note)


def _as_tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.uint8))


def drop_repeats(documents: list[bytes], least: int = 30) -> list[bytes]:
    """Keep the first of equal paragraphs (text between blank lines, at least `least` bytes, white
    space aside).
    """
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in re.split(rb"\n[ \t\r]*\n", document):
            key = b" ".join(paragraph.split())
            if len(key) < least or key not in seen:
                paragraphs.append(paragraph)
                seen.add(key)
        kept.append(b"\n\n".join(paragraphs))
    return [document for document in kept if document.strip()]


def sample_windows(data: Tensor, num: int, length: int, generator: torch.Generator) -> Tensor:
    """num random windows of `length` bytes. data [bytes] uint8 -> [num, length] int64, on data's
    device.

    Raises ValueError when the text is shorter than a window.
    """
    if len(data) < length:
        raise ValueError(f"the text has {len(data)} bytes; a window needs {length}")
    start = torch.randint(len(data) - length + 1, (num, 1), generator=generator)
    return data[(start + torch.arange(length)).to(data.device)].long()


def all_windows(data: Tensor, context: int) -> Tensor:
    """Windows that predict every byte once: [num, context + 1] int64.

    Each starts at the last byte of the one before. What is left at the end and fills no window is
    dropped. Raises ValueError when there is not one window.
    """
    return _windows(data, context).long()


def spread_windows(data: Tensor, context: int, num: int) -> Tensor:
    """At most `num` of `all_windows`, evenly spread over the text; the others are not read."""
    windows = _windows(data, context)
    return windows[torch.linspace(0, len(windows) - 1, min(num, len(windows))).long()].long()


def _windows(data: Tensor, context: int) -> Tensor:
    if len(data) < context + 1:
        raise ValueError(
            f"the text has {len(data)} bytes; a window of context {context} needs {context + 1}"
        )
    return data.unfold(0, context + 1, context)


# --------------------------------------------------------------------------------------------------
# Domains by provenance, in three parts
# --------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """One domain; its parts share no document.

    Tokens are bytes unless a meta.json says otherwise.
    """

    name: str
    train: Tensor  # [tokens] uint8 (bytes) or uint16 (token ids)
    dev: Tensor
    test: Tensor
    digest: str  # 12 hex digits of a SHA-256; from disk over sizes, dev, test, ends of train
    note: str = ""
    vocab_size: int = 256


PARTS = ("train", "dev", "test")
SEPARATOR = b"\0"  # between documents
LONGEST_DOCUMENT = 20_000  # bytes; one huge file must not be a domain
SMALL_SIZES = {"test": 40_000, "dev": 20_000, "train": 400_000}  # bytes
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _under(
    root: Path, endings: tuple[str, ...], skip: tuple[str, ...] = (), names: str = ""
) -> Iterator[Document]:
    """Text files below root whose folders are not skipped, in an order that depends on their names
    alone.
    """
    found = []
    for folder, subfolders, files in os.walk(root):
        shown = [name for name in subfolders if not name.startswith((".", "__"))]
        subfolders[:] = [name for name in shown if name not in skip]  # os.walk goes into these
        for name in files:
            path = Path(folder, name)
            is_wanted = name.endswith(endings) and re.match(names, name)
            if is_wanted and path.is_file() and not path.is_symlink():
                found.append(path)
    by_name = {path.relative_to(root).as_posix(): path for path in found}
    for name in sorted(by_name, key=lambda name: hashlib.sha256(name.encode()).digest()):
        content = by_name[name].read_bytes()
        if not _is_binary(content):
            yield name, content


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"there is no package {name}")
    return Path(spec.origin).parent


STDLIB = Path(sysconfig.get_path("stdlib"))
NOT_PYTHON = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
)


# What a build writes into its own files (paths, options, what it links) differs between machines
# and between torch with and without CUDA; the rest is the same for the same Python and pins.
OF_A_BUILD = r"(?!_sysconfigdata|sitecustomize|usercustomize|__config__)"
NOT_BUILT = r"(?!.*(Config|Targets|Targets-release)\.cmake$)"
NOT_HEADERS = ("ops", "cuda", "hip", "torch", "google", "tensorpipe", "caffe2")


def _licences() -> Iterator[Document]:
    """Those of three pins, and Python's own: not of whatever else happens to be installed."""
    for package in ("torch", "numpy", "tqdm"):
        for file in importlib.metadata.files(package) or ():
            is_licence = re.match("(?i)(LICEN[CS]E|COPYING|NOTICE)", file.name)
            if is_licence and file.parts[0].endswith(".dist-info"):
                yield f"{package}/{file.name}", file.locate().read_bytes()
    yield from _under(STDLIB, ("LICENSE.txt",), skip=NOT_PYTHON)


def _unicode() -> Iterator[Document]:
    lines = []
    for code in range(0x20, 0x20000):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(("CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")):
            lines.append(f"{code:04X};{name};{unicodedata.category(chr(code))}")
    yield "names", "\n".join(lines).encode()


def generated(kind: str, num_lines: int = 12_000) -> Iterator[Document]:
    """Text that needs no files: sums, dates, numerals or records. The same bytes everywhere."""
    rng, lines = random.Random(kind), []
    numerals = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"))
    numerals += ((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
    for _ in range(num_lines):
        a, b = rng.randrange(4000), rng.randrange(1, 1000)
        if kind == "sums":
            lines.append(f"{a} + {b} = {a + b}" if a % 2 else f"{a} - {b} = {a - b}")
        elif kind == "dates":
            month = ("January", "April", "June", "August", "October", "December")[b % 6]
            lines.append(f"on {1 + a % 28} {month} {1800 + b % 250} at {a % 24:02d}:{b % 60:02d}")
        elif kind == "numerals":
            text, rest = "", a + 1
            for value, letters in numerals:
                text, rest = text + letters * (rest // value), rest % value
            lines.append(f"{a + 1} is {text}")
        elif kind == "records":
            lines.append(json.dumps({"id": a, "size": [b, b % 7], "ok": a % 3 == 0}))
        else:
            raise ValueError(f"no generated text {kind!r}; there are {', '.join(GENERATED)}")
    yield kind, "\n".join(lines).encode()


GENERATED = ("sums", "dates", "numerals", "records")
PROVENANCE: dict[str, Callable[[], Iterable[Document]]] = {
    "python": lambda: _under(STDLIB, (".py",), NOT_PYTHON, OF_A_BUILD),
    "headers": lambda: _under(_package("torch") / "include", (".h",), NOT_HEADERS),
    "docs": lambda: _docs()[0],
    "operators": lambda: _under(_package("torchgen"), (".yaml",)),
    "unicode": _unicode,
    "tests": lambda: _under(STDLIB / "test", (".py",), names="test_"),
    "licences": _licences,
    "numpy": lambda: _under(_package("numpy"), (".py",), ("tests", "typing"), OF_A_BUILD),
    "cmake": lambda: _under(_package("torch"), (".cmake", "CMakeLists.txt"), (), NOT_BUILT),
    "stubs": lambda: _under(_package("torch"), (".pyi",)),
} | {kind: functools.partial(generated, kind) for kind in GENERATED}
STAND_INS = {"headers": "sums", "docs": "dates", "operators": "records", "tests": "numerals"}
STAND_INS |= {"licences": "dates", "numpy": "sums", "cmake": "records", "stubs": "numerals"}
FEW_FILES = ("docs", "operators", "unicode", "licences", "cmake", "stubs", *GENERATED)


def load_provenance(name: str, sizes: dict[str, int] = SMALL_SIZES) -> Split:
    """One of PROVENANCE in three parts of at most `sizes` bytes.

    A source that this machine lacks is replaced.

    Raises ValueError for an unknown name. Every part is made of whole documents; files that are few
    and large are cut into documents first.
    """
    if name not in PROVENANCE:
        raise ValueError(f"no text domain {name!r}; there are {', '.join(PROVENANCE)}")
    least = sum(sizes.values()) // 10
    source, note = name, ""
    try:
        documents = _enough(PROVENANCE[name](), 3 * sum(sizes.values()))
    except ImportError:
        documents = []
    if sum(len(content) for _, content in documents) < least and name in STAND_INS:
        source = STAND_INS[name]
        documents = list(generated(source))
        note = f"text {name!r} is missing here; generated {source} stand in for it"
    return split_in_three(name, documents, sizes, source in FEW_FILES, note)


def _enough(documents: Iterable[Document], num_bytes: int) -> list[Document]:
    """Documents until they have num_bytes, so that a domain does not read all of a large source."""
    taken, found = 0, []
    for name, content in documents:
        found.append((name, content))
        taken += min(len(content), LONGEST_DOCUMENT)
        if taken > num_bytes and len(found) > 60:
            break
    return found


def split_in_three(
    name: str,
    documents: list[Document],
    sizes: dict[str, int] | None = None,
    few_files: bool = False,
    note: str = "",
) -> Split:
    """Whole documents into test, dev and train; by contents alone, so that names and order do not
    matter.

    sizes      at most so many bytes a part; None: a tenth for test, a twentieth for dev, the rest
               for train
    few_files  cut the documents into pieces of about 4 kB, at blank lines or line ends, and deal
               those out
    What nearly repeats an earlier paragraph is dropped first. Raises ValueError when a part stays
    empty.
    """
    pieces = [
        piece for _, content in documents for piece in (_cut(content) if few_files else [content])
    ]
    longest = LONGEST_DOCUMENT if sizes else None
    pieces = sorted(
        {piece[:longest] for piece in pieces}, key=lambda piece: hashlib.sha256(piece).digest()
    )
    wanted = sum(sizes.values()) * 2 if sizes else None
    pieces = [piece.replace(SEPARATOR, b"") for piece in drop_near_repeats(pieces, wanted)]
    pieces = [piece for piece in pieces if len(piece) >= 200]
    total = sum(map(len, pieces))
    budget = {"test": total // 10, "dev": total // 20, "train": total}
    if sizes:
        budget = {part: min(sizes[part], budget[part]) for part in budget}
    parts: dict[str, list[bytes]] = {part: [] for part in budget}
    taken = Counter()
    for piece in pieces:
        part = next((part for part in budget if taken[part] < budget[part]), None)
        if part is not None:
            parts[part].append(piece)
            taken[part] += len(piece) + 1
    if not all(parts.values()):
        found = f"{total} bytes in {len(pieces)} documents"
        raise ValueError(f"text {name!r} is too short: {found} cannot fill three parts")
    joined = [SEPARATOR.join(parts[part]) for part in PARTS]
    if sizes:
        joined = [text[: sizes[part]] for part, text in zip(PARTS, joined)]
    digest = hashlib.sha256(b"\0\0".join(joined)).hexdigest()[:12]
    return Split(name, *map(_as_tensor, joined), digest, note)


def _cut(content: bytes, size: int = 4000) -> Iterator[bytes]:
    start = 0
    while start < len(content):
        end = start + size
        if end < len(content):
            blank = content.rfind(b"\n\n", start + size // 2, end)
            line = content.rfind(b"\n", start, end)
            end = blank + 2 if blank >= 0 else line + 1 if line >= 0 else end
        yield content[start:end]
        start = end


def drop_near_repeats(
    documents: Iterable[bytes], wanted: int | None = None, words: int = 8
) -> list[bytes]:
    """Drop a paragraph when a tenth of its runs of 8 words stood before: licences that differ in
    name and year, tables whose entries differ in one field. Stops after `wanted` bytes."""
    seen: set[int] = set()
    kept, taken = [], 0
    for document in documents:
        paragraphs = []
        for paragraph in re.split(rb"\n[ \t\r]*\n", document):
            split = paragraph.split()
            runs = [
                hash(tuple(split[i : i + words])) for i in range(max(1, len(split) - words + 1))
            ]
            if len(paragraph) < 30 or 10 * sum(run in seen for run in runs) < len(runs):
                paragraphs.append(paragraph)
                seen.update(runs)
        kept.append(b"\n\n".join(paragraphs))
        taken += len(kept[-1])
        if wanted is not None and taken >= wanted:
            break
    return [document for document in kept if document.strip()]


def load_split(folder: str | Path) -> Split:
    """A domain on disk: train, dev (or valid) and test, each a .txt, .jsonl or .bin file in
    `folder`.

    txt    raw bytes, mapped into memory, documents separated by a zero byte
    jsonl  {"text": "..."} a line
    bin    token ids, little-endian uint16, mapped; meta.json beside it holds {"vocab_size": n}
    Raises FileNotFoundError for a missing folder or part, ValueError for contents that do not fit.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"domain {folder}: no such folder; --prepare makes one (data/README.md)"
        )
    files = [_part_file(path, *names) for names in (("train",), ("dev", "valid"), ("test",))]
    endings = {file.suffix for file in files}
    if ".bin" in endings and len(endings) > 1:
        raise ReadError(f"domain {folder}: token ids (.bin) and text cannot be mixed")
    parts = [_read_part(file) for file in files]
    vocab_size = _vocab_size(path / "meta.json", parts) if ".bin" in endings else 256
    train, dev, test = parts
    hashed = [repr([len(part) for part in parts]).encode()]
    hashed += [part.numpy().tobytes() for part in (train[:100_000], train[-100_000:], dev, test)]
    digest = hashlib.sha256(b"\0\0".join(hashed)).hexdigest()[:12]
    return Split(path.name, *parts, digest, "", vocab_size)


def _part_file(folder: Path, *names: str) -> Path:
    """The one file of a part; of its names the last is asked for."""
    found = [folder / (name + ending) for name in names for ending in (".txt", ".jsonl", ".bin")]
    found = [path for path in found if path.exists()]
    if not found:
        raise FileNotFoundError(f"domain {folder}: there is no {names[-1]}.txt, .jsonl or .bin")
    if len(found) > 1:
        raise ReadError(f"domain {folder}: {found[0].name} and {found[1].name}; keep one of them")
    return found[0]


def _vocab_size(path: Path, parts: list[Tensor]) -> int:
    with reading(path, 'it must hold {"vocab_size": n}') as at:
        at.need(path.exists(), "is missing")
        (vocab_size,) = at.take(parse_json(read_bytes(path)), "", "vocab_size")
        # An embedding of that size is made, and ids of 16 bits end there.
        at.need(
            type(vocab_size) is int and 0 < vocab_size <= 65_536,
            f"vocab_size is {shown(vocab_size)}",
        )
        largest = max(int(part.numpy().max()) for part in parts)
        at.need(largest < vocab_size, f"token id {largest}, but vocab_size is {vocab_size}")
    return vocab_size


def find_split(name: str, root: Path) -> Split:
    """root/<name> if it is there, otherwise the domain of that name that every machine has.

    Raises ValueError for an impossible name, and whatever load_split raises for what it finds.
    """
    check_name(name)
    here = (root / name).is_dir() or name not in PROVENANCE
    return load_split(root / name) if here else load_provenance(name)


def check_name(name: str) -> None:
    """Raises ValueError for a name that leads out of its folder, or is kept for the seed of a
    forest.
    """
    if not NAME.fullmatch(name) or name == "seed":
        raise ValueError(
            f"a domain cannot be called {name[:80]!r}: letters, digits, _ . - and not 'seed'"
        )


def _read_part(path: Path) -> Tensor:
    with reading(path) as at:
        if path.suffix == ".jsonl":
            text = SEPARATOR.join(document["text"].encode() for document in _documents(path))
            at.need(bool(text), "holds no text")
            return _as_tensor(text)
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            at.need(size >= 2, "is empty")
            at.need(
                path.suffix != ".bin" or size % 2 == 0,
                "has an odd number of bytes; token ids are uint16",
            )
            dtype = np.dtype("<u2") if path.suffix == ".bin" else np.uint8
            return torch.from_numpy(
                np.memmap(file, dtype, mode="c")
            )  # copy-on-write: torch wants writable memory


def _documents(path: Path) -> Iterator[dict]:
    """The objects of a file with {"text": "..."} a line."""
    with reading(path, 'a line must be {"text": "..."}') as at:
        for document in json_lines(at, longest=1 << 28):
            (text,) = at.take(document, "", "text", spare="meta")
            at.need(isinstance(text, str), f"text is {shown(text)}")
            text.encode()  # raises for half of a surrogate pair
            yield document


# The Pile's names of its parts: the public corpus whose documents say where they come from (Gao et
# al. 2020).
PILE = {
    "Pile-CC": "web",
    "ArXiv": "arxiv",
    "PubMed Central": "pubmed-central",
    "FreeLaw": "freelaw",
    "Github": "github",
    "Wikipedia (en)": "wikipedia",
    "StackExchange": "stackexchange",
    "USPTO Backgrounds": "uspto",
    "HackerNews": "hackernews",
    "Enron Emails": "enron",
    "EuroParl": "europarl",
    "PhilPapers": "philpapers",
    "NIH ExPorter": "nih-exporter",
    "PubMed Abstracts": "pubmed-abstracts",
    "Gutenberg (PG-19)": "gutenberg",
    "DM Mathematics": "mathematics",
}


def prepare(
    source: str | Path, root: str | Path, domain: str = ""
) -> tuple[dict[str, dict[str, int]], Counter]:
    """Write root/<domain>/{train,dev,test}.txt from a file or folder.

    Returns ({domain: {part: bytes}}, labels found).
    With `domain`, everything in `source` (text files; .jsonl with a "text" a line) is that one
    domain. Without, the lines of .jsonl files are dealt out by their meta.pile_set_name. Documents
    that are equal are kept once; which part a document goes to depends on its contents alone. A
    domain is replaced only when all of it is written. Raises FileNotFoundError, or ValueError
    naming what was found.
    """
    if domain:
        check_name(domain)
    paths = _sources(source)
    found: Counter[str] = Counter()
    if not domain:
        sizes = _write_parts(
            _pile_parts([path for path in paths if path.suffix == ".jsonl"], found), Path(root)
        )
        if not sizes:
            labels = [
                f"{label or 'no meta.pile_set_name'} ({count})"
                for label, count in found.most_common(20)
            ]
            raise ReadError(
                f"{source}: no domain can be filled; found: {', '.join(labels) or 'no .jsonl file'}"
            )
        return sizes, found
    documents = []
    for path in paths:
        if path.suffix == ".jsonl":
            documents += [(path.name, document["text"].encode()) for document in _documents(path)]
        elif not _is_binary(content := read_bytes(path)):
            documents.append((path.name, content))
    sizes = [len(text) for _, text in documents]
    few_or_huge = len(documents) < 100 or 20 * max(sizes) > sum(
        sizes
    )  # else one could fill a part, or be one
    split = split_in_three(domain, documents, few_files=few_or_huge)
    texts = ((domain, part, getattr(split, part).numpy().tobytes()) for part in PARTS)
    return _write_parts(texts, Path(root)), found


UNPACK = {".zst": "zstd -d", ".gz": "gunzip", ".xz": "unxz", ".zip": "unzip"}


def _sources(source: str | Path) -> list[Path]:
    """A file itself, or the files of a folder: no links, nothing hidden, nothing packed."""
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if not path.is_dir():
        found = [path]
    else:
        found = [
            child for child in sorted(path.rglob("*")) if child.is_file() and not child.is_symlink()
        ]
        found = [child for child in found if "/." not in f"/{child.relative_to(path).as_posix()}"]
    packed = [child for child in found if child.suffix in UNPACK]
    for child in packed:
        needed = f"{child} is packed; {UNPACK[child.suffix]} unpacks it"
        if len(found) == 1:
            raise ReadError(needed)
        say_once(f"passed over: {needed}")
    return [child for child in found if child not in packed]


def _pile_parts(paths: list[Path], found: Counter) -> Iterator[tuple[str, str, bytes]]:
    """(domain, part, text) of every document of the Pile that is new; counts the labels in
    `found`.
    """
    seen: set[bytes] = set()
    for document in itertools.chain.from_iterable(map(_documents, paths)):
        meta = document.get("meta")
        label = str(meta.get("pile_set_name", "")) if isinstance(meta, dict) else ""
        found[label] += 1
        text = document["text"].encode().replace(SEPARATOR, b"")
        digest = hashlib.sha256(text).digest()
        if label in PILE and digest[:12] not in seen and text.strip():
            seen.add(digest[:12])
            part = "train"  # 96 %
            if digest[-1] < 5:  # of 256: 2 %
                part = "test"
            elif digest[-1] < 10:
                part = "dev"
            yield PILE[label], part, text + SEPARATOR


def _write_parts(texts: Iterable[tuple[str, str, bytes]], root: Path) -> dict[str, dict[str, int]]:
    """Append (domain, part, text) to files that replace root/<domain>/<part>.txt once all three
    parts are there.
    """
    sizes: dict[str, dict[str, int]] = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for domain, part, text in texts:
            if (domain, part) not in files:
                (root / domain).mkdir(parents=True, exist_ok=True)
                temporary = root / domain / f".{part}.tmp"
                stack.callback(temporary.unlink, missing_ok=True)  # whatever happens
                files[domain, part] = stack.enter_context(open(temporary, "wb"))
            files[domain, part].write(text)
        for file in files.values():
            file.close()
        for domain in sorted({domain for domain, _ in files}):
            if all((domain, part) in files for part in PARTS):
                for part in PARTS:
                    path = root / domain / f"{part}.txt"
                    os.replace(root / domain / f".{part}.tmp", path)
                    sizes.setdefault(domain, {})[part] = path.stat().st_size
    return sizes
