"""Public data sets: the table datasets.toml, and `fetch(name)`, which downloads once, verifies, and
unpacks safely.

    python -m data.download enwik8      prints the folder with the verified files
    python -m data.download --list      names, sizes, licences, sources

A data set lies under ROOT/<name>/; ROOT is --data-dir, else $MOE_DATA, else data/cache/ of this
repository.

    url -> FILE.part -> size, checksum -> FILE -> (archives) temporary folder -> ROOT/<name>/ ->
    marker

A file put there by hand (FILE itself, or unpacked members that the table can check) passes the same
checks; one that fails is named, never overwritten. While the marker fits the table and every file's
SHA-256, no connection is opened. Archives stay, so that a lost file comes back without a network;
they may be deleted. A new data set is a new section of datasets.toml and nothing else.
"""

import argparse
import difflib
import hashlib
import http.client
import json
import os
import stat
import sys
import tarfile
import tempfile
import tomllib
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

TIMEOUT = 30  # seconds without a byte before a connection counts as dead
CHUNK = 1 << 16  # bytes
MARKER = ".verified.json"
BAD_ARCHIVE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    ValueError,
    RuntimeError,  # zipfile: encrypted, or a compression it does not know
    FileExistsError,  # `a` beside `A` where case is ignored
    NotADirectoryError,  # `a` beside `a/b`
)


class DownloadError(OSError):
    """A data set could not be had; the message is one line that says why and what to put where by
    hand.
    """


@dataclass(frozen=True)
class File:
    """One URL of a data set.

    Checksums are "sha256:..." or "md5:...", None where neither the publisher nor a well-known
    library states one. An archive is unpacked whole, or only the members that are given.
    """

    url: str
    size: int | None = None  # bytes over the wire
    checksum: str | None = None
    unpack: str = "none"  # none | zip | tar (also .tar.gz)
    members: dict[str, tuple[int | None, str | None]] = field(default_factory=dict)
    limit: int = 4 << 30  # bytes that unpacking, or a download of unknown size, may write
    save_as: str = ""  # local name; "": the last part of the URL

    def path(self, folder: Path) -> Path:
        return folder / (self.save_as or self.url.rsplit("/", 1)[-1])


@dataclass(frozen=True)
class Dataset:
    """One row of the table."""

    name: str
    files: tuple[File, ...]
    licence: str
    citation: str

    @property
    def size(self) -> int | None:
        """Bytes to download; None where a file's size is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(sizes)


def read_table(path: Path) -> dict[str, Dataset]:
    """The data sets of a file like datasets.toml, by name."""
    datasets = {}
    for name, row in tomllib.loads(path.read_text(encoding="utf-8")).items():
        files = tuple(_read_entry(entry, row.get("base")) for entry in row["files"])
        datasets[name] = Dataset(name, files, row["licence"], row["citation"])
    return datasets


def _read_entry(entry: dict, base: str | None) -> File:
    members = {}
    for member in entry.pop("members", ()):
        members[member["name"]] = (member.get("size"), member.get("checksum"))
    if base:
        entry["save_as"] = entry["url"]
        entry["url"] = base + entry["url"]
    return File(**entry, members=members)


DATASETS = read_table(Path(__file__).with_name("datasets.toml"))
ENWIK8 = DATASETS["enwik8"].files[0]


def root(data_dir: str | Path | None = None) -> Path:
    """Where data sets lie: data_dir, else $MOE_DATA, else data/cache/ of this repository."""
    given = data_dir or os.environ.get("MOE_DATA") or Path(__file__).resolve().parent / "cache"
    return Path(given).expanduser()


def fetch(name: str, data_dir: str | Path | None = None) -> Path:
    """The folder with the verified files of a data set; downloads what is missing."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown data set {name!r}; the nearest is {near}, --list shows all")
    folder = root(data_dir) / name
    files = DATASETS[name].files
    # In the marker, so that a corrected row is checked anew.
    row = hashlib.sha256(repr(files).encode()).hexdigest()
    if _is_verified(folder, row):
        return folder
    file = files[0]
    digests = {}
    try:
        for file in files:
            for path in _obtain(file, folder):
                digests[path.relative_to(folder).as_posix()] = _digest(path, "sha256")
        part = Path(f"{folder / MARKER}.part")
        part.write_text(json.dumps({"table": row, "sha256": digests}))
        os.replace(part, folder / MARKER)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(_reason(error).split())
        by_hand = f"Run again, or put {file.url} at {file.path(folder)} by hand"
        raise DownloadError(f"{name}: {reason}. {by_hand}") from error
    return folder


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # URLError wraps what happened
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(cause, TimeoutError):
        return f"the server sent nothing for {TIMEOUT} s"
    if isinstance(error, urllib.error.URLError | http.client.HTTPException | ConnectionError):
        return f"no connection to the server ({cause or type(error).__name__})"
    return str(error)


def _is_verified(folder: Path, row: str) -> bool:
    """Whether the files are, byte for byte, those that were fetched and checked for this row."""
    if not (folder / MARKER).is_file():
        return False
    try:
        marker = json.loads((folder / MARKER).read_text())
        known = marker["sha256"].items()
        unchanged = all(_digest(folder / path, "sha256") == digest for path, digest in known)
        return unchanged and marker["table"] == row
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # a file is gone, or this is no marker of ours


def _digest(path: Path, algorithm: str) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise DownloadError(f"{path} is no regular file; delete it first")
    new = partial(hashlib.new, algorithm, usedforsecurity=False)
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, new).hexdigest()


def _check(
    path: Path, size: int | None, checksum: str | None, remedy: str = "delete it first"
) -> None:
    actual = path.stat().st_size
    if size not in (None, actual):
        raise DownloadError(f"{path} has {actual:,} bytes, not {size:,}; {remedy}")
    if checksum:
        algorithm, wanted = checksum.split(":")
        found = _digest(path, algorithm)
        if found != wanted:
            raise DownloadError(f"{path} has {algorithm} {found}, not {wanted}; {remedy}")


def _obtain(file: File, folder: Path) -> list[Path]:
    """One file of the table, verified and in place: the path of the plain file, or of every
    member.
    """
    members = {folder / name: check for name, check in file.members.items()}
    can_check = bool(members) and all(any(check) for check in members.values())
    if can_check and all(path.is_file() for path in members):
        for path, check in members.items():
            _check(path, *check)
        return list(members)
    target = file.path(folder)
    if target.is_file():
        _check(target, file.size, file.checksum)
    else:
        _download(file, target)
    return [target] if file.unpack == "none" else _unpack(file, target, folder)


def _download(file: File, target: Path) -> None:
    """url -> FILE.part -> checks -> FILE.

    Resumes where a checksum would notice two versions joined.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{target}.part")
    if part.is_fifo():
        raise DownloadError(f"{part} is a pipe; delete it first")
    offset = part.stat().st_size if file.checksum and part.exists() else 0
    if file.size is not None and offset > file.size:
        offset = 0
    if not offset or offset != file.size:
        _receive(file, part, offset)
    try:
        _check(part, file.size, file.checksum, "it is deleted now")
    except DownloadError:
        part.unlink()
        raise
    os.replace(part, target)


def _receive(file: File, part: Path, offset: int) -> None:
    """Write FILE.part from offset on, and believe no size that the server announces."""
    headers = {"User-Agent": "data.download"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(file.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # nothing follows: complete, or the checksum will tell
            return
        raise
    with response:
        if response.status != 206:  # a server that ignores Range sends all of it
            offset = 0
        length = response.headers.get("Content-Length", "")
        announced = offset + int(length) if length.isdecimal() else file.size
        if file.size not in (None, announced):
            raise DownloadError(
                f"the server announces {announced:,} bytes, the table says {file.size:,}"
            )
        most = file.limit if file.size is None else file.size
        bar = tqdm(
            total=announced, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None
        )
        with bar, open(part, "ab" if offset else "wb") as out:
            while offset <= most and (chunk := response.read(CHUNK)):
                offset += out.write(chunk)
                bar.update(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if offset > most:
        part.unlink()
        raise DownloadError(f"the server sends more than {most:,} bytes")
    if offset < (announced or 1):
        raise DownloadError(f"the connection ended after {offset:,} of {announced or 1:,} bytes")


class _Header(tarfile.TarInfo):
    """A tar header that is not a file is read into memory whole; a crafted one would ask for
    gigabytes.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type not in tarfile.REGULAR_TYPES and header.size > 1 << 20:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _entries(archive: Path, unpack: str) -> Iterator[tuple]:
    """(name, is a file, is a folder, function that opens it) for everything in an archive."""
    if unpack == "zip":
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                is_file = kind in (0, stat.S_IFREG)  # 0: not written on Unix
                yield info.filename, is_file, info.is_dir(), partial(opened.open, info)
    else:
        with tarfile.open(archive, "r|*", tarinfo=_Header) as opened:
            for info in opened:
                yield info.name, info.isreg(), info.isdir(), partial(opened.extractfile, info)


def _unpack(file: File, archive: Path, folder: Path) -> list[Path]:
    """Archive -> temporary folder -> checks -> folder: what is refused leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
        try:
            names = _write_members(file, archive, Path(temporary))
        except (*BAD_ARCHIVE, DownloadError) as error:
            raise DownloadError(f"{archive} is refused, delete it first: {error}") from error
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary) / name, folder / name)
    return [folder / name for name in names]


def _write_members(file: File, archive: Path, temporary: Path) -> set[str]:
    """What the archive holds, checked name by name and byte by byte; headers say what their writer
    liked.
    """
    names = set()
    written = 0
    for name, is_file, is_folder, opener in _entries(archive, file.unpack):
        inside = _name_inside(name)
        if not (is_file or is_folder):
            raise DownloadError(f"{name!r} is a link, a device or a pipe")
        if is_folder or (file.members and inside not in file.members):
            continue
        if inside in names or inside in (MARKER, archive.name):
            raise DownloadError(f"{name!r} is there twice, or is the name of a file kept here")
        names.add(inside)
        target = temporary / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        with opener() as stream, open(target, "xb") as out:
            while chunk := stream.read(CHUNK):
                written += len(chunk)
                if written > file.limit:
                    raise DownloadError(f"it unpacks to more than {file.limit:,} bytes")
                out.write(chunk)
        _check(target, *file.members.get(inside, (None, None)), "it is not put in place")
    missing = set(file.members) - names
    if missing or not names:
        raise DownloadError(f"it lacks {', '.join(sorted(missing)) or 'any file'}")
    return names


def _name_inside(name: str) -> str:
    """One spelling of a name (x//./a is x/a); refuses what would lead out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or "\\" in name:
        raise DownloadError(f"{name!r} is not a name inside the folder")
    if not name.isprintable():
        raise DownloadError(f"{name!r} is a strange name")
    return str(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code: 1 failed, 2 unknown name, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        "python -m data.download", description="Download and verify a data set."
    )
    parser.add_argument("name", nargs="?", help="one of --list")
    parser.add_argument("--data-dir", help="root folder (default: $MOE_DATA, else data/cache/)")
    parser.add_argument("--list", action="store_true", help="show the data sets and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for dataset in DATASETS.values():
            size = "size not known" if dataset.size is None else f"{dataset.size:,} bytes"
            urls = " ".join(file.url for file in dataset.files)
            print(f"{dataset.name}: {size}; {dataset.licence}; {dataset.citation}; {urls}")
        return 0
    if arguments.name is None:
        parser.error("name a data set, or use --list")
    try:
        print(fetch(arguments.name, arguments.data_dir))
        return 0
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what has arrived is kept, run again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
