"""Byte corpora that any machine with Python and torch already holds, and the reader's own text.

A language model needs text; a first run should need no download. Every Python brings several megabytes of source
code, its documentation and licences, and torch brings the headers of its C++ library. Each of these is a *domain*:

    python     top-level modules of the standard library        about 4.5 MB
    docs       the language reference behind `help()`           about 0.4 MB
    headers    C++ headers that come with torch                 about 30 MB

A token is a byte, so the vocabulary is 256 and a loss in nats/byte needs no tokenizer to be understood. Documents
are split whole, and a paragraph that stands in several (help topics quote each other, headers share their licence)
is kept once, so that validation does not ask for what training has shown. The bytes differ between installations:
their hash is printed, and losses are compared within a machine, never across machines.
"""

import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

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
        if path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in name.parts):
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
        packages = [doc for name in ("email", "json", "http", "xml") for doc in _files(stdlib / name, "**/*.py")]
        return (packages, "this Python has no pydoc_data; the packages email, json, http and xml stand in for it")
    return [(name, text.encode()) for name, text in sorted(topics.items())], ""


def _headers() -> tuple[list[Document], str]:
    return list(_files(Path(torch.__file__).parent / "include", "**/*.h")), ""


DOMAINS = {"python": _python, "docs": _docs, "headers": _headers}


def load_domain(name: str, val_share: float = 0.1) -> Corpus:
    """One of DOMAINS, split by document. Raises ValueError for an unknown or empty domain."""
    if name not in DOMAINS:
        raise ValueError(f"no text domain {name!r}; there are {', '.join(DOMAINS)}")
    documents, note = DOMAINS[name]()
    return split_documents(name, documents, val_share, note)


def load_text(path: str | Path, val_share: float = 0.1) -> Corpus:
    """A file (its last val_share becomes validation) or a folder (split by file; binary files are skipped).

    Raises FileNotFoundError when the path is missing, ValueError when it holds no text.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"text {path}: no such file or folder")
    if path.is_dir():
        return split_documents(path.name, list(_files(path, "**/*")), val_share)
    content = path.read_bytes()
    if _is_binary(content):
        raise ValueError(f"text {path} is a binary file")
    return split_documents(path.name, [(path.name, content)], val_share)


def split_documents(name: str, documents: list[Document], val_share: float, note: str = "") -> Corpus:
    """Drop what repeats, hold whole documents out until val_share of the bytes is reached, join the rest.

    Which documents are held out depends on their contents alone (the order of their hashes), so the split does not
    move when files are renamed or found in another order. A single document is cut at a line end instead.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share is {val_share}; it must lie between 0 and 1")
    by_hash = drop_repeats(sorted({content for _, content in documents}, key=lambda c: hashlib.sha256(c).digest()))
    if not by_hash:
        raise ValueError(f"text {name!r} holds no text ({len(documents)} text files, none with words)")
    budget = val_share * sum(map(len, by_hash))
    if len(by_hash) == 1:
        cut = int(len(by_hash[0]) - budget)
        cut = by_hash[0].rfind(b"\n", int(0.99 * cut), cut) + 1 or cut
        train, val = [by_hash[0][:cut]], [by_hash[0][cut:]]
    else:
        train, val, taken = [], [], 0
        for content in by_hash:
            held_out = taken + len(content) <= budget
            (val if held_out else train).append(content)
            taken += len(content) * held_out
        if not val:  # every document is larger than the budget: hold out the smallest
            val = [train.pop(min(range(len(train)), key=lambda i: len(train[i])))]
    train_bytes, val_bytes = b"\n".join(train), b"\n".join(val)
    digest = hashlib.sha256(train_bytes + b"\0" + val_bytes).hexdigest()[:12]
    as_tensor = lambda raw: (
        torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    )
    return Corpus(name, as_tensor(train_bytes), as_tensor(val_bytes), digest, len(by_hash), note)


def drop_repeats(documents: list[bytes], least: int = 30) -> list[bytes]:
    """Keep the first of equal paragraphs (text between blank lines, at least `least` bytes, white space aside)."""
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
    """num random windows of `length` bytes. data [bytes] uint8 -> [num, length] int64, on data's device.

    Raises ValueError when the text is shorter than a window.
    """
    if len(data) < length:
        raise ValueError(f"the text has {len(data)} bytes; a window needs {length}")
    start = torch.randint(len(data) - length + 1, (num, 1), generator=generator)
    return data[(start + torch.arange(length)).to(data.device)].long()


def all_windows(data: Tensor, context: int) -> Tensor:
    """Windows that predict every byte once: [num, context + 1] int64, each starting at the last byte of the one before.

    What is left at the end and fills no window is dropped. Raises ValueError when there is not one window.
    """
    if len(data) < context + 1:
        raise ValueError(f"the text has {len(data)} bytes; a window of context {context} needs {context + 1}")
    return data.unfold(0, context + 1, context).long()


if __name__ == "__main__":
    for domain in sys.argv[1:] or DOMAINS:
        corpus = load_domain(domain)
        sizes = f"{len(corpus.train):10,d} + {len(corpus.val):9,d} bytes"
        print(f"{domain:10s} {corpus.num_documents:6d} documents  {sizes}  sha256 {corpus.digest}  {corpus.note}")
