"""data/download.py against a local server that misbehaves on request, and hostile archives."""

import gzip
import hashlib
import http.server
import io
import os
import random
import re
import signal
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
        if body is None:
            return self.send_error(404)
        if fault == "wrong bytes":
            body = bytes(len(body))
        start = int(asked[1]) if asked and fault != "ignores range" else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
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


def refusal(root: Path, match: str, file: str = "toy.bin") -> str:
    """fetch fails with one line that holds `match`, the URL and the path to fill by hand."""
    with pytest.raises(DownloadError, match=match) as caught:
        fetch("toy", root)
    line = str(caught.value)
    assert "\n" not in line and DATASETS["toy"].files[0].url in line
    assert str(root / "toy" / file) in line
    return line


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the data set `toy` except the marker."""
    folder = root / "toy"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != download.MARKER]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---- download ------------------------------------------------------------------------------------


def left_behind(root: Path, name: str, data: bytes) -> None:
    """A file that lies there before anything is fetched."""
    (root / "toy").mkdir(exist_ok=True)
    (root / "toy" / name).write_bytes(data)


def test_downloads_verifies_and_leaves_only_the_file(toy, server, tmp_path):
    for _ in range(2):  # the second time without a connection
        assert fetch("toy", tmp_path) == tmp_path / "toy"
        assert contents(tmp_path) == {"toy.bin": BODY} and server.ranges == [None]


CHANGED = {BODY[:-1]: "has 262,143 bytes, not 262,144", bytes(len(BODY)): "sha256"}


@pytest.mark.parametrize("body, message", CHANGED.items(), ids=["size", "bytes"])
def test_a_file_that_changed_is_noticed_in_spite_of_the_marker(body, message, toy, tmp_path):
    (fetch("toy", tmp_path) / "toy.bin").write_bytes(body)
    refusal(tmp_path, f"{message}.*; delete it first")


def test_pipes_are_not_waited_for(toy, tmp_path):
    (tmp_path / "toy").mkdir()
    os.mkfifo(tmp_path / "toy/toy.bin.part")
    os.mkfifo(tmp_path / "toy" / download.MARKER)
    refusal(tmp_path, "toy.bin.part is a pipe; delete it first")


def test_a_corrected_row_is_checked_in_spite_of_the_marker(toy, table, server, tmp_path):
    fetch("toy", tmp_path)
    table(File(f"{server.url}/toy.bin", len(BODY), sha256(b"the publisher's correction")))
    refusal(tmp_path, "has sha256")


BROKEN = ["", "[]", "{}", '{"sha256": 3, "table": 4}', '{"sha256": {}}', "\0", "[" * 100_000]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_marker_is_no_marker(text, toy, server, tmp_path):
    left_behind(tmp_path, download.MARKER, text.encode())
    fetch("toy", tmp_path)
    assert contents(tmp_path) == {"toy.bin": BODY} and server.ranges == [None]


def test_a_dropped_connection_keeps_the_part_and_the_rerun_resumes_it(toy, server, tmp_path):
    server.fault = "drops"
    refusal(tmp_path, f"ended after {HALF:,} of {len(BODY):,} bytes")
    assert contents(tmp_path) == {"toy.bin.part": BODY[:HALF]}
    server.fault = ""
    fetch("toy", tmp_path)
    assert server.ranges == [None, HALF] and contents(tmp_path) == {"toy.bin": BODY}


PARTS = {
    "range ignored": (BODY[:1000], "ignores range", [1000]),
    "complete": (BODY, "", []),
    "too long": (BODY + b"more", "", [None]),
    "empty": (b"", "", [None]),
    "one byte missing": (BODY[:-1], "", [len(BODY) - 1]),
}


@pytest.mark.parametrize("part, fault, ranges", PARTS.values(), ids=PARTS)
def test_parts_that_an_earlier_run_left(part, fault, ranges, toy, server, tmp_path):
    left_behind(tmp_path, "toy.bin.part", part)
    server.fault = fault
    fetch("toy", tmp_path)
    assert server.ranges == ranges and contents(tmp_path) == {"toy.bin": BODY}


@pytest.mark.parametrize("extra", [0, -1000, 4], ids=["complete", "short", "too long"])
def test_parts_of_a_file_whose_size_is_not_known(extra, table, server, tmp_path):
    table(File(f"{server.url}/toy.bin", checksum=sha256(BODY)))
    left_behind(tmp_path, "toy.bin.part", (BODY + b"more")[: len(BODY) + extra])
    if extra > 0:  # the server says 416 whether complete or too long: the checksum decides
        refusal(tmp_path, "has sha256")
    fetch("toy", tmp_path)
    assert contents(tmp_path) == {"toy.bin": BODY}


def test_without_a_checksum_two_versions_are_never_joined(table, server, tmp_path):
    table(File(f"{server.url}/toy.bin", len(BODY)))
    left_behind(tmp_path, "toy.bin.part", b"old version")
    fetch("toy", tmp_path)
    assert server.ranges == [None] and contents(tmp_path) == {"toy.bin": BODY}


@pytest.mark.parametrize("checksum", [sha256(BODY), "md5:" + hashlib.md5(BODY).hexdigest()])
@pytest.mark.parametrize("part", [b"", bytes(1000), bytes(len(BODY))])
def test_after_a_wrong_checksum_a_rerun_is_clean(part, checksum, table, server, tmp_path):
    table(File(f"{server.url}/toy.bin", len(BODY), checksum))
    left_behind(tmp_path, "toy.bin.part", part)
    server.fault = "wrong bytes"
    refusal(tmp_path, "has (sha256|md5) .* it is deleted now")
    assert contents(tmp_path) == {}
    server.fault = ""
    fetch("toy", tmp_path)
    assert contents(tmp_path) == {"toy.bin": BODY} and server.ranges[-1] is None


FAULTS = [  # what goes wrong, the size in the table, what is said, how much of the body is kept
    ("absent", None, "the server answers 404", 0),
    ("offline", None, "no connection to the server", 0),
    ("hangs", len(BODY), "sent nothing for 0.3 s", HALF),
    ("announces more", len(BODY), "announces 262,145 bytes, the table says 262,144", 0),
    ("announces more", None, "ended after 262,144 of 262,145 bytes", len(BODY)),
    ("empty", None, "ended after 0 of", 0),
]


@pytest.mark.parametrize("fault, size, match, kept", FAULTS)
def test_what_the_server_did_is_named(
    fault, size, match, kept, table, server, offline, tmp_path, monkeypatch
):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.fault = fault
    server.bodies["/toy.bin"] = None if fault == "absent" else b"" if fault == "empty" else BODY
    table(File(f"{offline if fault == 'offline' else server.url}/toy.bin", size))
    refusal(tmp_path, match)
    found = b"".join(contents(tmp_path).values())
    assert found == BODY[:kept] and "toy.bin" not in contents(tmp_path)


@pytest.mark.parametrize("known", [{"size": 1000}, {"limit": 1000}], ids=["size", "limit"])
def test_a_server_that_sends_without_end_is_cut_off(known, table, server, tmp_path, monkeypatch):
    received = []
    bar = type("Bar", (download.tqdm,), {"update": lambda self, count: received.append(count)})
    monkeypatch.setattr(download, "tqdm", bar)
    table(File(f"{server.url}/toy.bin", **known))
    server.fault = "no length"
    refusal(tmp_path, "sends more than 1,000 bytes")
    assert sum(received) <= 1000 + download.CHUNK and contents(tmp_path) == {}


def test_no_announced_size_is_no_fault(toy, server, tmp_path):
    server.fault = "no length"
    fetch("toy", tmp_path)
    assert contents(tmp_path) == {"toy.bin": BODY}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named(toy, tmp_path):
    left_behind(tmp_path, "other", b"")
    (tmp_path / "toy/toy.bin.part").symlink_to("/dev/full")
    refusal(tmp_path, "No space left on device")


def test_a_folder_that_cannot_be_made_is_named(toy, tmp_path):
    (tmp_path / "toy").write_bytes(b"a file where the folder should be")
    refusal(tmp_path, "File exists")


# ---- by hand -------------------------------------------------------------------------------------


def test_files_put_there_by_hand_are_accepted_without_a_network(table, offline, tmp_path):
    packed = zipped(("a", BODY))
    hand = {"plain.bin": BODY, "packed.zip": packed, "member": BODY}
    for name, data in hand.items():
        left_behind(tmp_path, name, data)
    members = {"member": (None, sha256(BODY))}
    table(
        File(f"{offline}/plain.bin", len(BODY), sha256(BODY)),
        File(f"{offline}/packed.zip", len(packed), unpack="zip"),
        File(f"{offline}/absent.zip", 10**9, unpack="zip", members=members),
    )
    fetch("toy", tmp_path)
    assert contents(tmp_path) == hand | {"a": BODY}


@pytest.mark.parametrize("data", [BODY[:-1], bytes(len(BODY))], ids=["size", "checksum"])
@pytest.mark.parametrize("unpack", ["none", "zip", "member"])
def test_a_wrong_file_put_there_by_hand_stays(unpack, data, table, offline, tmp_path):
    members = {"toy.bin": (len(BODY), sha256(BODY))} if unpack == "member" else {}
    name, unpack = ("toy.zip", "zip") if members else ("toy.bin", unpack)
    table(File(f"{offline}/{name}", len(BODY), sha256(BODY), unpack=unpack, members=members))
    left_behind(tmp_path, "toy.bin", data)
    assert "delete it first" in refusal(tmp_path, "toy.bin has ", name)
    assert contents(tmp_path) == {"toy.bin": data}


def test_members_that_the_table_cannot_check_are_not_accepted_by_hand(table, server, tmp_path):
    server.bodies["/toy.zip"] = zipped(("a", b"real"))
    table(File(f"{server.url}/toy.zip", unpack="zip", members={"a": (None, None)}))
    left_behind(tmp_path, "a", b"unknown")
    fetch("toy", tmp_path)
    assert (tmp_path / "toy/a").read_bytes() == b"real"


def test_the_root_is_the_argument_else_the_environment_else_the_cache(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "__file__", str(tmp_path / "repo/data/download.py"))
    assert fetch("toy") == tmp_path.resolve() / "repo/data/cache/toy"
    monkeypatch.setenv("MOE_DATA", str(tmp_path / "environment"))
    assert fetch("toy") == tmp_path / "environment/toy"
    assert fetch("toy", str(tmp_path / "argument")) == tmp_path / "argument/toy"


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


GOOD = (("./", b"", 0), ("x/one", b"1"), ("x/two", BODY), ("three", b""))
ARCHIVES = {
    "toy.zip": zipped(("x/", b"", stat.S_IFDIR | 0o755), *GOOD[1:]),
    "toy.tar": tarred(("x", b"", tarfile.DIRTYPE), *GOOD[1:]),
    "toy.tar.gz": tarred(("./", b"", tarfile.DIRTYPE), *GOOD[1:], mode="w:gz"),
}


def row(server, name: str, data: bytes, **more) -> File:
    server.bodies[f"/{name}"] = data
    unpack = "zip" if name.endswith("zip") else "tar"
    options = {"size": len(data), "unpack": unpack, "limit": 2 * len(BODY)} | more
    return File(f"{server.url}/{name}", **options)


@pytest.mark.parametrize("name", ARCHIVES)
def test_unpacks_every_file(name, table, server, tmp_path):
    table(row(server, name, ARCHIVES[name]))
    fetch("toy", tmp_path)
    fetch("toy", tmp_path)
    expected = {"x/one": b"1", "x/two": BODY, "three": b""}
    assert contents(tmp_path) == expected | {name: ARCHIVES[name]}
    assert server.ranges == [None]


@pytest.mark.parametrize("name", ARCHIVES)
def test_unpacks_only_the_members_of_the_table(name, table, server, tmp_path):
    table(row(server, name, ARCHIVES[name], members={"x/two": (len(BODY), sha256(BODY))}))
    fetch("toy", tmp_path)
    assert contents(tmp_path) == {"x/two": BODY, name: ARCHIVES[name]}


def test_several_files_under_one_name(table, server, tmp_path):
    table(
        row(server, "a.zip", zipped(("a/one", b"1"))),
        row(server, "b.tar.gz", tarred(("b/one", b"2"), mode="w:gz")),
        File(f"{server.url}/toy.bin?download=1", len(BODY), save_as="sub/plain.bin"),
    )
    server.bodies["/toy.bin?download=1"] = BODY
    fetch("toy", tmp_path)
    found = contents(tmp_path)
    assert (found["a/one"], found["b/one"], found["sub/plain.bin"]) == (b"1", b"2", BODY)
    archives = [found[name] for name in ("a.zip", "b.tar.gz", "sub/plain.bin")]
    assert DATASETS["toy"].size == sum(map(len, archives))
    table(*DATASETS["toy"].files, File(f"{server.url}/size-not-known"))
    assert DATASETS["toy"].size is None


def test_a_failed_file_keeps_its_finished_neighbours(table, server, tmp_path):
    first = File(f"{server.url}/toy.bin", len(BODY), sha256(BODY))
    table(first, File(f"{server.url}/absent.bin"))
    with pytest.raises(DownloadError, match="put .*/absent.bin at .*absent.bin by hand"):
        fetch("toy", tmp_path)
    assert contents(tmp_path) == {"toy.bin": BODY}
    assert not (tmp_path / "toy" / download.MARKER).exists()
    server.bodies["/absent.bin"] = b"now"
    fetch("toy", tmp_path)
    assert server.ranges == [None] * 3


def test_without_a_network_a_lost_member_comes_back_and_the_archive_may_go(table, server, tmp_path):
    table(row(server, "toy.zip", ARCHIVES["toy.zip"]))
    (fetch("toy", tmp_path) / "x/one").unlink()
    fetch("toy", tmp_path)
    assert (tmp_path / "toy/x/one").read_bytes() == b"1"
    (tmp_path / "toy/toy.zip").unlink()
    fetch("toy", tmp_path)
    assert server.ranges == [None]


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


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_leaves_nothing_behind(case, table, server, tmp_path):
    data, match = HOSTILE[case]
    name = f"toy.{case[:3]}"
    table(row(server, name, data))
    left_behind(tmp_path, "a", b"from an earlier version")
    before = set(tmp_path.parent.iterdir())
    refusal(tmp_path, match, name)
    assert contents(tmp_path) == {"a": b"from an earlier version", name: data}
    assert set(tmp_path.iterdir()) == {tmp_path / "toy"}
    assert set(tmp_path.parent.iterdir()) == before
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"a", name}


WRONG_MEMBERS = [
    ({"x/two": (1, None)}, "it is not put in place"),
    ({"x/two": (None, sha256(b"other"))}, "it is not put in place"),
    ({"x/one": (1, None), "x/four": (1, None)}, "lacks x/four"),
]


@pytest.mark.parametrize("members, match", WRONG_MEMBERS)
def test_members_that_are_not_those_of_the_table(members, match, table, server, tmp_path):
    table(row(server, "toy.zip", ARCHIVES["toy.zip"], members=members))
    refusal(tmp_path, match, "toy.zip")
    assert list(contents(tmp_path)) == ["toy.zip"]


def test_a_disk_that_fills_while_unpacking(table, server, tmp_path, monkeypatch):
    def full(path, mode):
        if mode == "xb":
            raise OSError(28, "No space left on device", str(path))
        return open(path, mode)

    table(row(server, "toy.zip", ARCHIVES["toy.zip"]))
    fetch("toy", tmp_path)
    (tmp_path / "toy/x/one").unlink()
    monkeypatch.setattr(download, "open", full, raising=False)
    refusal(tmp_path, "No space left on device", "toy.zip")
    assert contents(tmp_path) == {"x/two": BODY, "three": b"", "toy.zip": ARCHIVES["toy.zip"]}


@pytest.mark.parametrize("name", ARCHIVES)
def test_damaged_archives_unpack_whole_or_fail_with_one_line(name, table, server, tmp_path):
    rng = random.Random(1)
    for trial in range(60):
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
    assert main(["toy", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'toy'}\n", "")
    table(File(f"{server.url}/absent.bin"))
    assert main(["toy", "--data-dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("toy: the server answers 404") and err.count("\n") == 1


def test_the_list_names_size_licence_citation_and_source(toy, server, capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"toy: 262,144 bytes; no licence; nobody; {server.url}/toy.bin"
    assert lines[0].startswith("enwik8: 36,445,475 bytes; ") and server.ranges == []


@pytest.mark.parametrize("name", ["enwiki8", "", "/etc", "zzz"])
def test_an_unknown_name_is_exit_code_2_and_names_the_nearest(name, tmp_path, capsys):
    assert main([name, "--data-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    nearest = "enwik8" if name == "enwiki8" else "|".join(DATASETS)
    assert out == "" and re.search(nearest, err) and "--list" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_name_is_exit_code_2():
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_is_one_line_and_exit_code_130_and_keeps_the_part(server, tmp_path):
    program = f"""
import signal, sys
from data import download as d
signal.signal(signal.SIGINT, signal.default_int_handler)
file = d.File("{server.url}/toy.bin", {len(BODY)}, "{sha256(BODY)}")
d.DATASETS["toy"] = d.Dataset("toy", (file,), "", "")
sys.exit(d.main(["toy", "--data-dir", {str(tmp_path)!r}]))
"""
    server.fault = "hangs"
    part = tmp_path / "toy/toy.bin.part"
    command = [sys.executable, "-c", program]
    child = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not (part.exists() and part.stat().st_size == HALF):
        threading.Event().wait(0.01)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=20)[1]
    assert (child.returncode, part.read_bytes()) == (130, BODY[:HALF])
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
