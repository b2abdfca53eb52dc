"""data/download.py against a local server that misbehaves on request, and hostile archives."""

import gzip
import hashlib
import http.server
import io
import os
import random
import re
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from data import download
from data.download import DATASETS, Dataset, DownloadError, File, fetch, main

REPO = Path(download.__file__).resolve().parents[1]
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
        if body is None or fault == "absent":
            return self.send_error(404)
        if fault == "wrong bytes":
            body = bytes(len(body))
        if fault == "empty":
            body = b""
        start = int(asked[1]) if asked and fault != "ignores range" else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) - start + (fault == "announces more")))
        self.end_headers()
        sent = body[start:]
        self.wfile.write(sent[: len(sent) // 2] if fault in ("drops", "hangs") else sent)
        if fault == "hangs":
            self.server.release.wait(20)

    def log_message(self, *arguments):
        """Keep the test output quiet."""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MOE_DATA", raising=False)


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.fault, server.ranges = {"/toy.bin": BODY}, "", []
    server.release = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def offline():
    """A URL on which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.fixture
def table(monkeypatch):
    """table(File, ...): the row `toy`."""

    def put(*files):
        monkeypatch.setitem(DATASETS, "toy", Dataset("toy", files, "no licence", "nobody"))

    return put


@pytest.fixture
def toy(table, server):
    """The row `toy` is one plain file of known size and checksum."""
    table(File(f"{server.url}/toy.bin", len(BODY), sha256(BODY)))


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

SIZE = {"size": len(BODY)}
SHA = {"checksum": sha256(BODY)}
MD5 = {"checksum": "md5:" + hashlib.md5(BODY).hexdigest()}
KNOWN = SIZE | SHA
FROM_0 = [None]  # a request without a range
LONGER = BODY + b"more"
DELETED = "has (sha256|md5) .* it is deleted now"
DOWNLOADS = {
    # what the table says, the part that an earlier run left, what the server does wrong,
    # what is said ("": nothing, it works), the part that is kept then, ranges asked for
    "nothing wrong": (KNOWN, None, "", "", None, FROM_0),
    "no announced size": (KNOWN, None, "no length", "", None, FROM_0),
    "part, range ignored": (KNOWN, BODY[:1000], "ignores range", "", None, [1000]),
    "part that is complete": (KNOWN, BODY, "", "", None, []),
    "part too long": (KNOWN, LONGER, "", "", None, FROM_0),
    "part empty": (KNOWN, b"", "", "", None, FROM_0),
    "part lacks a byte": (KNOWN, BODY[:-1], "", "", None, [len(BODY) - 1]),
    "size not known, part complete": (SHA, BODY, "", "", None, [len(BODY)]),
    "size not known, part short": (SHA, BODY[:-9], "", "", None, [len(BODY) - 9]),
    # The server says 416 whether it is complete or too long: the checksum decides.
    "size not known, part too long": (SHA, LONGER, "", DELETED, None, [len(LONGER), None]),
    "no checksum: two versions are never joined": (SIZE, b"old version", "", "", None, FROM_0),
    "wrong bytes": (KNOWN, None, "wrong bytes", DELETED, None, [None, None]),
    "wrong bytes, md5": (SIZE | MD5, None, "wrong bytes", DELETED, None, [None, None]),
    "wrong part": (KNOWN, bytes(1000), "", DELETED, None, [1000, None]),
    "wrong part, all of it": (SIZE | MD5, bytes(len(BODY)), "", DELETED, None, FROM_0),
    "drops": (KNOWN, None, "drops", "ended after 131,072 of 262,144", BODY[:HALF], [None, HALF]),
    "absent": ({}, None, "absent", "the server answers 404", None, [None, None]),
    "empty": ({}, None, "empty", "ended after 0 of", b"", [None, None]),
    "announces more": (SIZE, None, "announces more", "262,145 bytes, the table", None, [None] * 2),
    "announces more, size not known": (
        {}, None, "announces more", "ended after 262,144 of 262,145 bytes", BODY, [None, None]
    ),
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


def test_a_server_that_hangs_or_is_not_there_is_named(
    toy, table, server, offline, tmp_path, monkeypatch
):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.fault = "hangs"
    refusal(tmp_path, "sent nothing for 0.2 s")
    assert BODY.startswith(contents(tmp_path).pop("toy.bin.part", b""))
    table(File(f"{offline}/toy.bin"))
    refusal(tmp_path, "no connection to the server")


@pytest.mark.parametrize("known", [{"size": 1000}, {"limit": 1000}], ids=["size", "limit"])
def test_a_server_that_sends_without_end_is_cut_off(known, table, server, tmp_path, monkeypatch):
    received = []
    bar = type("Bar", (download.tqdm,), {"update": lambda self, count: received.append(count)})
    monkeypatch.setattr(download, "tqdm", bar)
    table(File(f"{server.url}/toy.bin", **known))
    server.fault = "no length"
    refusal(tmp_path, "sends more than 1,000 bytes")
    assert sum(received) <= 1000 + download.CHUNK and contents(tmp_path) == {}


CHANGED = {BODY[:-1]: "has 262,143 bytes, not 262,144", bytes(len(BODY)): "sha256"}


def test_a_changed_file_or_row_is_noticed_in_spite_of_the_marker(toy, table, server, tmp_path):
    path = fetch("toy", tmp_path) / "toy.bin"
    for body, message in CHANGED.items():
        path.write_bytes(body)
        refusal(tmp_path, f"{message}.*; delete it first")
    path.write_bytes(BODY)
    table(File(f"{server.url}/toy.bin", len(BODY), sha256(b"the publisher's correction")))
    refusal(tmp_path, "has sha256")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3, "table": 4}', "\0", "[" * 100_000])
def test_a_broken_marker_is_no_marker(text, toy, server, tmp_path):
    left_behind(tmp_path, download.MARKER, text.encode())
    fetch("toy", tmp_path)
    assert contents(tmp_path) == {"toy.bin": BODY} and server.ranges == [None]


def test_pipes_full_disks_and_files_in_the_way_are_named(toy, tmp_path):
    (tmp_path / "toy").write_bytes(b"a file where the folder should be")
    refusal(tmp_path, "File exists")
    (tmp_path / "toy").unlink()
    (tmp_path / "toy").mkdir()
    part = tmp_path / "toy/toy.bin.part"
    os.mkfifo(tmp_path / "toy" / download.MARKER)  # nobody writes: a reader would wait
    os.mkfifo(part)
    refusal(tmp_path, "toy.bin.part is a pipe; delete it first")
    if Path("/dev/full").exists():
        part.unlink()
        part.symlink_to("/dev/full")
        refusal(tmp_path, "No space left on device")


# ---- by hand -------------------------------------------------------------------------------------


def test_files_put_there_by_hand_are_accepted_without_a_network(table, offline, tmp_path):
    packed = zipped(("a", BODY))
    hand = {"plain.bin": BODY, "packed.zip": packed, "member": BODY}
    for name, data in hand.items():
        left_behind(tmp_path, name, data)
    table(
        File(f"{offline}/plain.bin", len(BODY), sha256(BODY)),
        File(f"{offline}/packed.zip", len(packed), unpack="zip"),
        File(f"{offline}/absent.zip", 9, unpack="zip", members={"member": (None, sha256(BODY))}),
    )
    fetch("toy", tmp_path)
    assert contents(tmp_path) == hand | {"a": BODY}


@pytest.mark.parametrize("data", [BODY[:-1], bytes(len(BODY))], ids=["size", "checksum"])
@pytest.mark.parametrize("kind", ["file", "archive", "member"])
def test_a_wrong_file_put_there_by_hand_stays(kind, data, table, offline, tmp_path):
    members = {"toy.bin": (len(BODY), sha256(BODY))} if kind == "member" else {}
    name = "toy.zip" if kind == "member" else "toy.bin"
    unpack = "none" if kind == "file" else "zip"
    table(File(f"{offline}/{name}", len(BODY), sha256(BODY), unpack=unpack, members=members))
    left_behind(tmp_path, "toy.bin", data)
    refusal(tmp_path, "toy.bin has .*delete it first", name)
    assert contents(tmp_path) == {"toy.bin": data}


def test_members_that_the_table_cannot_check_are_not_accepted_by_hand(table, server, tmp_path):
    table(row(server, "toy.zip", zipped(("a", b"real")), members={"a": (None, None)}))
    left_behind(tmp_path, "a", b"unknown")
    fetch("toy", tmp_path)
    assert contents(tmp_path)["a"] == b"real"


def test_the_root_is_the_argument_else_the_environment_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "__file__", str(tmp_path / "repo/data/download.py"))
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # names that are there twice are the point
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
    "toy.tar": tarred(("x", b"", tarfile.DIRTYPE), *GOOD),
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
    for lost in (None, "x/one", name):  # without a network a lost member comes back; and the
        if lost:  # archive may go
            (tmp_path / "toy" / lost).unlink()
        fetch("toy", tmp_path)
        assert contents(tmp_path) == dict(GOOD) | (archive if lost != name else {})
    assert server.ranges == [None, None]


def test_several_files_of_which_one_fails_keep_the_finished_ones(table, server, tmp_path):
    zip_file, tar_file = zipped(("a/one", b"1")), tarred(("b/one", b"2"), mode="w:gz")
    plain = File(f"{server.url}/toy.bin?download=1", len(BODY), save_as="sub/plain.bin")
    table(row(server, "a.zip", zip_file), plain, row(server, "b.tar.gz", tar_file))
    with pytest.raises(DownloadError, match="put .*/toy.bin.download=1 at .*sub/plain.bin by hand"):
        fetch("toy", tmp_path)
    assert contents(tmp_path) == {"a.zip": zip_file, "a/one": b"1"}
    assert not (tmp_path / "toy" / download.MARKER).exists()
    server.bodies["/toy.bin?download=1"] = BODY
    fetch("toy", tmp_path)
    assert len(server.ranges) == 4  # a.zip once
    expected = {"a.zip": zip_file, "b.tar.gz": tar_file, "sub/plain.bin": BODY}
    assert contents(tmp_path) == expected | {"a/one": b"1", "b/one": b"2"}
    assert DATASETS["toy"].size == sum(map(len, expected.values()))
    table(*DATASETS["toy"].files, File(f"{server.url}/size-not-known"))
    assert DATASETS["toy"].size is None


def patched(data: bytes, fields: dict[int, bytes], signature: bytes = b"PK\x01\x02") -> bytes:
    """A zip with bytes at offsets in its directory entry replaced: what no packer would write."""
    data, start = bytearray(data), data.index(signature)
    for offset, value in fields.items():
        data[start + offset : start + offset + len(value)] = value
    return bytes(data)


def huge_header() -> bytes:
    """A tar header that is no file is read into memory whole."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 33
    return gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


MEBIBYTE = (1 << 20).to_bytes(4, "little")
SAYS_A_MEBIBYTE = {10: b"\0\0", 20: MEBIBYTE, 24: MEBIBYTE}
BOMB, PIECES = bytes(4 * len(BODY)), [(str(i), BODY) for i in range(3)]
LINK, DEVICE, FIFO = stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o666, stat.S_IFIFO | 0o666
ONE = zipped(("a", b"x"))
HOSTILE = {
    "zip parent": (zipped(("../evil", b"x")), "not a name inside"),
    "zip parent after a good one": (zipped(("good", b"x"), ("../evil", b"x")), "not a name inside"),
    "zip hidden parent": (zipped(("x/../../evil", b"x")), "not a name inside"),
    "zip backslash": (zipped(("..\\evil", b"x")), "not a name inside"),
    "zip drive": (zipped(("C:evil", b"x")), "not a name inside"),
    "zip absolute": (zipped(("/tmp/evil", b"x")), "not a name inside"),
    "zip symlink": (zipped(("evil", b"/etc/passwd", LINK)), "a link, a device"),
    "zip device": (zipped(("evil", b"", DEVICE)), "a link, a device"),
    "zip fifo": (zipped(("evil", b"", FIFO)), "a link, a device"),
    "zip control": (zipped(("a\nb", b"x")), "strange name"),
    "zip twice": (zipped(("a", b"x"), ("a", b"y")), "there twice"),
    "zip twice, spelt anew": (zipped(("x/a", b"x"), ("x//./a", b"y")), "there twice"),
    "zip marker": (zipped((download.MARKER, b"x")), "a file kept here"),
    "zip itself": (zipped(("toy.zip", b"x")), "a file kept here"),
    "zip file as folder": (zipped(("a", b"x"), ("a/b", b"y")), "refused"),
    "zip bomb": (zipped(("evil", BOMB)), "unpacks to more than 524,288 bytes"),
    "zip bomb in pieces": (zipped(*PIECES), "unpacks to more"),
    "zip says 1 byte": (patched(zipped(("a", BODY)), {24: b"\1\0\0\0"}), "refused"),
    "zip says a mebibyte": (patched(ONE, SAYS_A_MEBIBYTE), "refused"),
    "zip broken name": (patched(ONE, {8: b"\0\x08", 46: b"\xff"}), "refused"),
    "zip broken data": (patched(ONE, {31: b"\xff"}, b"PK\3\4"), "refused"),
    "zip encrypted": (patched(ONE, {8: b"\1\0"}), "refused"),
    "zip empty": (zipped(), "lacks any file"),
    "zip not a zip": (b"<html>please log in</html>", "not a zip file"),
    "zip broken": (ARCHIVES["toy.zip"].replace(BODY[1000:1002], b"??"), "refused"),
    "tar parent": (tarred(("../evil", b"x")), "not a name inside"),
    "tar hidden parent": (tarred(("x/../../evil", b"x")), "not a name inside"),
    "tar absolute": (tarred(("/tmp/evil", b"x")), "not a name inside"),
    "tar symlink": (tarred(("evil", b"", tarfile.SYMTYPE, "/etc")), "a link, a device"),
    "tar hard link": (tarred(("evil", b"", tarfile.LNKTYPE, "/etc/passwd")), "a link, a device"),
    "tar device": (tarred(("evil", b"", tarfile.CHRTYPE)), "a link, a device"),
    "tar fifo": (tarred(("evil", b"", tarfile.FIFOTYPE)), "a link, a device"),
    "tar twice": (tarred(("a", b"x"), ("a", b"y")), "there twice"),
    "tar bomb": (tarred(("evil", BOMB), mode="w:gz"), "unpacks to more than 524,288 bytes"),
    "tar header of 8 GB": (huge_header(), "a header of 8,589,934,592 bytes"),
    "tar cut off": (ARCHIVES["toy.tar.gz"][:-5000], "refused"),
    "tar not a tar": (b"<html>please log in</html>", "refused"),
}


WRONG_MEMBERS = {
    "zip member of another size": ({"x/two": (1, None)}, "it is not put in place"),
    "zip member of another sum": ({"x/two": (None, sha256(b"no"))}, "it is not put in place"),
    "zip member missing": ({"x/one": (1, None), "x/four": (1, None)}, "lacks x/four"),
}


@pytest.mark.parametrize("case", HOSTILE | WRONG_MEMBERS)
def test_a_hostile_archive_leaves_nothing_behind(case, table, server, tmp_path):
    if case in HOSTILE:
        data, match = HOSTILE[case]
        members = {}
    else:
        data = ARCHIVES["toy.zip"]
        members, match = WRONG_MEMBERS[case]
    name = f"toy.{case[:3]}"
    table(row(server, name, data, members=members))
    left_behind(tmp_path, "a", b"from an earlier version")
    before = set(tmp_path.parent.iterdir())
    refusal(tmp_path, match, name)
    assert contents(tmp_path) == {"a": b"from an earlier version", name: data}
    assert set(tmp_path.iterdir()) == {tmp_path / "toy"}
    assert set(tmp_path.parent.iterdir()) == before
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"a", name}


@pytest.mark.parametrize("name", ARCHIVES)
def test_damaged_archives_unpack_whole_or_fail_with_one_line(name, table, server, tmp_path):
    rng = random.Random(1)
    for trial in range(40):
        data = bytearray(ARCHIVES[name])
        if trial % 4 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 4)):  # half of the damage hits where the headers are
            at = rng.choice([rng.randrange(len(data)), -1 - rng.randrange(300), rng.randrange(600)])
            data[at % len(data)] = rng.randrange(256)
        root = tmp_path / str(trial)
        table(row(server, name, bytes(data)))
        try:
            fetch("toy", root)
        except DownloadError as error:
            assert "\n" not in str(error) and list(contents(root)) == [name]
        assert sum(map(len, contents(root).values())) < 4 * len(BODY)
        assert list(root.iterdir()) == [root / "toy"]


# ---- table, command line -------------------------------------------------------------------------


def test_every_row_of_the_table_is_well_formed():
    for name, dataset in DATASETS.items():
        assert name == dataset.name and re.fullmatch(r"[\w.-]+", name)
        assert dataset.licence and dataset.citation
        places = [file.path(Path()) for file in dataset.files]
        assert places and len(set(places)) == len(places)
        for file in dataset.files:
            assert file.unpack in ("none", "zip", "tar")
            assert file.unpack != "none" or not file.members
            checksums = [file.checksum, *(known[1] for known in file.members.values())]
            for checksum in filter(None, checksums):
                assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", checksum)
            assert all(str(PurePosixPath(member)) == member for member in file.members)
            assert sum(known[0] or 0 for known in file.members.values()) <= file.limit
    assert DATASETS["enwik8"].size == 36_445_475


def test_the_command_prints_the_folder_or_one_line(toy, table, server, tmp_path, capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"toy: 262,144 bytes; no licence; nobody; {server.url}/toy.bin"
    assert lines[0].startswith("enwik8: 36,445,475 bytes; ") and server.ranges == []
    assert main(["toy", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'toy'}\n", "")
    table(File(f"{server.url}/absent.bin"))
    assert main(["toy", "--data-dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("toy: the server answers 404") and err.count("\n") == 1


def test_no_name_or_an_unknown_one_is_exit_code_2(tmp_path, capsys):
    for name, nearest in (("enwiki8", "enwik8"), ("", "|".join(DATASETS)), ("/etc", "")):
        assert main([name, "--data-dir", str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and re.search(nearest, err) and "--list" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_ctrl_c_is_one_line_and_exit_code_130_and_keeps_the_part(
    toy, tmp_path, monkeypatch, capsys
):
    def interrupted(self, count):
        raise KeyboardInterrupt

    bar = type("Bar", (download.tqdm,), {"update": interrupted})
    monkeypatch.setattr(download, "tqdm", bar)  # told after each read
    assert main(["toy", "--data-dir", str(tmp_path)]) == 130
    assert contents(tmp_path) == {"toy.bin.part": BODY[: download.CHUNK]}
    err = capsys.readouterr().err
    assert err.startswith("interrupted") and err.count("\n") == 1


def test_python_m_runs_and_importing_does_nothing(tmp_path):
    program = "import sys, data.download; assert not {'torch', 'numpy', 'common'} & {*sys.modules}"
    paths = os.pathsep.join([str(REPO), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True}
    for arguments, code in ((["-c", program], 0), (["-m", "data.download", "enwiki"], 2)):
        ended = subprocess.run([sys.executable, *arguments], **options)
        assert ended.returncode == code and ended.stdout == b"" and b"Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
