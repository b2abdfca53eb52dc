"""data/download.py against a local server that misbehaves on request, and hostile archives."""

import hashlib
import http.server
import io
import random
import re
import stat
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from data import download
from data.download import DATASETS, Dataset, DownloadError, File, fetch, main

BODY = random.Random(0).randbytes(4 * download.CHUNK)  # four reads of the downloader
HALF = len(BODY) // 2


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.bodies with Range; server.fault names what goes wrong."""

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.ranges.append(asked and int(asked[1]))
        body, fault = self.server.bodies.get(self.path), self.server.fault
        if body is None:
            return self.send_error(404)
        start = int(asked[1]) if asked and fault != "ignores range" else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        sent = body[start:]
        self.wfile.write(sent[: len(sent) // 2] if fault == "drops" else sent)

    def log_message(self, *arguments):
        """Keep the test output quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.fault, server.ranges = {"/toy.bin": BODY}, "", []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def table(monkeypatch, server):
    """table(File, ...): the row `toy`; at first one plain file of known size and checksum."""

    def put(*files):
        monkeypatch.setitem(DATASETS, "toy", Dataset("toy", files, "no licence", "nobody"))

    put(File(f"{server.url}/toy.bin", len(BODY), sha256(BODY)))
    return put


def refusal(root: Path, match: str, file: str = "toy.bin") -> None:
    """fetch fails with one line that holds `match`, the URL and the path to fill by hand."""
    with pytest.raises(DownloadError, match=match) as caught:
        fetch("toy", root)
    line = str(caught.value)
    assert "\n" not in line and DATASETS["toy"].files[0].url in line
    assert str(root / "toy" / file) in line


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the data set `toy` except the marker."""
    folder = root / "toy"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != download.MARKER]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def left_behind(root: Path, name: str, data: bytes) -> None:
    """A file that lies there before anything is fetched."""
    (root / "toy").mkdir(exist_ok=True)
    (root / "toy" / name).write_bytes(data)


# ---- download ------------------------------------------------------------------------------------

SIZE = len(BODY)
SHA = {"checksum": sha256(BODY)}
KNOWN = {"size": SIZE} | SHA
DELETED = "has sha256 .* it is deleted now"
DOWNLOADS = {
    # what the table says, the part that an earlier run left, what the server does wrong,
    # what is said ("": nothing, it works), the part that is kept then, ranges asked for (None: all)
    "part, range ignored": (KNOWN, BODY[:1000], "ignores range", "", None, [1000]),
    "size not known, part complete": (SHA, BODY, "", "", None, [len(BODY)]),
    # The server says 416 whether it is complete or too long: the checksum decides.
    "size not known, part too long": (SHA, BODY + b"more", "", DELETED, None, [SIZE + 4, None]),
    "no checksum, never joined": ({"size": SIZE}, b"old version", "", "", None, [None]),
    "wrong part": (KNOWN, bytes(1000), "", DELETED, None, [1000, None]),
    "drops": (KNOWN, None, "drops", "ended after 131,072 of 262,144", BODY[:HALF], [None, HALF]),
}  # fmt: skip


@pytest.mark.parametrize("case", DOWNLOADS)
def test_a_download_is_whole_or_fails_with_one_line_and_runs_again(case, table, server, tmp_path):
    known, part, server.fault, message, kept, ranges = DOWNLOADS[case]
    table(File(f"{server.url}/toy.bin", **known))
    if part is not None:
        left_behind(tmp_path, "toy.bin.part", part)
    if message:
        refusal(tmp_path, message)
        assert contents(tmp_path) == ({} if kept is None else {"toy.bin.part": kept})
        server.fault = ""
    for _ in range(2):  # the second time without a connection
        assert fetch("toy", tmp_path) == tmp_path / "toy"
        assert contents(tmp_path) == {"toy.bin": BODY} and server.ranges == ranges


def test_a_changed_file_or_row_is_noticed_in_spite_of_the_marker(table, server, tmp_path):
    path = fetch("toy", tmp_path) / "toy.bin"
    for body, message in ((BODY[:-1], "has 262,143 bytes, not 262,144"), (bytes(SIZE), "sha256")):
        path.write_bytes(body)
        refusal(tmp_path, f"{message}.*; delete it first")
        assert contents(tmp_path) == {"toy.bin": body}
    path.write_bytes(BODY)
    table(File(f"{server.url}/toy.bin", SIZE, sha256(b"the publisher's correction")))
    refusal(tmp_path, "has sha256")


# ---- by hand -------------------------------------------------------------------------------------


def test_files_put_there_by_hand_are_accepted_without_a_network(table, server, tmp_path):
    packed = zipped(("a", BODY))
    hand = {"plain.bin": BODY, "packed.zip": packed, "member": BODY}
    for name, data in hand.items():
        left_behind(tmp_path, name, data)
    table(
        File(f"{server.url}/plain.bin", len(BODY), sha256(BODY)),
        File(f"{server.url}/packed.zip", len(packed), unpack="zip"),
        File(f"{server.url}/absent.zip", 9, unpack="zip", members={"member": (None, sha256(BODY))}),
    )
    fetch("toy", tmp_path)
    assert contents(tmp_path) == hand | {"a": BODY} and server.ranges == []


def test_members_put_there_by_hand_are_taken_as_far_as_the_table_can_check(table, server, tmp_path):
    left_behind(tmp_path, "a", b"wrong")
    table(row(server, "toy.zip", zipped(("a", b"real")), members={"a": (4, sha256(b"real"))}))
    refusal(tmp_path, "a has 5 bytes, not 4; delete it first", "toy.zip")
    assert contents(tmp_path) == {"a": b"wrong"} and server.ranges == []
    table(row(server, "toy.zip", zipped(("a", b"real")), members={"a": (None, None)}))
    fetch("toy", tmp_path)
    assert contents(tmp_path)["a"] == b"real"


def test_the_root_is_the_argument_else_the_environment_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "__file__", str(tmp_path / "repo/data/download.py"))
    monkeypatch.delenv("MOE_DATA", raising=False)
    assert download.root() == tmp_path.resolve() / "repo/data/cache"
    monkeypatch.setenv("MOE_DATA", str(tmp_path / "environment"))
    assert download.root() == tmp_path / "environment"
    assert download.root(str(tmp_path / "argument")) == tmp_path / "argument"


# ---- archives ------------------------------------------------------------------------------------


def zipped(*entries) -> bytes:
    """entries: (name, bytes[, Unix mode]). Written without the checks of a well-meaning packer."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data, *mode in entries:
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.compress_type = name, zipfile.ZIP_DEFLATED
            info.external_attr = (mode[0] if mode else stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def tarred(*entries, mode: str = "w") -> bytes:
    """entries: (name, bytes[, tar type[, link target]])."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data, *kind in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type, info.linkname = (*kind, tarfile.REGTYPE, "")[0], (*kind, "", "")[1]
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


GOOD = (("x/one", b"1"), ("x/two", BODY), ("three", b""))
ARCHIVES = {
    "toy.zip": zipped(("x/", b"", stat.S_IFDIR | 0o755), *GOOD),
    "toy.tar.gz": tarred(("./", b"", tarfile.DIRTYPE), *GOOD, mode="w:gz"),
}


def row(server, name: str, data: bytes, **more) -> File:
    server.bodies[f"/{name}"] = data
    unpack = "zip" if name.endswith("zip") else "tar"
    options = {"size": len(data), "unpack": unpack, "limit": 2 * len(BODY)} | more
    return File(f"{server.url}/{name}", **options)


@pytest.mark.parametrize("name", ARCHIVES)
def test_unpacks_every_file_or_those_of_the_table(name, table, server, tmp_path):
    archive = {name: ARCHIVES[name]}
    table(row(server, name, ARCHIVES[name], members={"x/two": (len(BODY), sha256(BODY))}))
    fetch("toy", tmp_path / "some")
    assert contents(tmp_path / "some") == archive | {"x/two": BODY}
    table(row(server, name, ARCHIVES[name]))
    # Without a network a lost member comes back, and the archive may go.
    for lost in (None, "x/one", name):
        if lost:
            (tmp_path / "toy" / lost).unlink()
        fetch("toy", tmp_path)
        assert contents(tmp_path) == dict(GOOD) | (archive if lost != name else {})
    assert server.ranges == [None, None]
    for members, message in (
        ({"x/two": (None, sha256(b"no"))}, "it is not put in place"),
        ({"x/one": (1, None), "x/four": (1, None)}, "lacks x/four"),
    ):
        table(row(server, name, ARCHIVES[name], members=members))
        refusal(tmp_path / "none", message, name)
        assert list(contents(tmp_path / "none")) == [name]


BOMB, PIECES = bytes(4 * len(BODY)), [(str(i), BODY) for i in range(3)]
LINK = stat.S_IFLNK | 0o777
HOSTILE = {
    "zip parent after a good one": (zipped(("good", b"x"), ("../evil", b"x")), "not a name inside"),
    "zip backslash": (zipped(("..\\evil", b"x")), "not a name inside"),
    "zip symlink": (zipped(("evil", b"/etc/passwd", LINK)), "a link, a device"),
    "zip twice, spelt anew": (zipped(("x/a", b"x"), ("x//./a", b"y")), "there twice"),
    "zip marker": (zipped((download.MARKER, b"x")), "a file kept here"),
    "zip bomb in pieces": (zipped(*PIECES), "unpacks to more than 524,288 bytes"),
    "zip broken": (ARCHIVES["toy.zip"].replace(BODY[1000:1002], b"??"), "refused"),
    "tar hidden parent": (tarred(("x/../../evil", b"x")), "not a name inside"),
    "tar absolute": (tarred(("/tmp/evil", b"x")), "not a name inside"),
    "tar symlink": (tarred(("evil", b"", tarfile.SYMTYPE, "/etc")), "a link, a device"),
    "tar hard link": (tarred(("evil", b"", tarfile.LNKTYPE, "/etc/passwd")), "a link, a device"),
    "tar bomb": (tarred(("evil", BOMB), mode="w:gz"), "unpacks to more than 524,288 bytes"),
    "tar cut off": (ARCHIVES["toy.tar.gz"][:-5000], "refused"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_leaves_nothing_behind(case, table, server, tmp_path):
    data, match = HOSTILE[case]
    name = f"toy.{case[:3]}"
    table(row(server, name, data))
    left_behind(tmp_path, "a", b"from an earlier version")
    refusal(tmp_path, match, name)
    assert contents(tmp_path) == {"a": b"from an earlier version", name: data}
    assert set(tmp_path.iterdir()) == {tmp_path / "toy"}
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"a", name}


def test_the_command_prints_the_folder_or_one_line(table, server, tmp_path, capsys):
    assert main(["toy", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'toy'}\n", "")
    table(File(f"{server.url}/absent.bin"))
    for name, code, message in (("toy", 1, "the server answers 404"), ("enwiki8", 2, "enwik8")):
        assert main([name, "--data-dir", str(tmp_path)]) == code
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
