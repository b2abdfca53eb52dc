"""All readers of data/ under one kind of damage: a file is read right or refused by name."""

import gzip
import json
import os
import re
import zlib
from functools import partial

import numpy as np
import pytest
import test_behavior
import test_graphs
import test_images
import test_tasks
import torch

from data import behavior, graphs, images, reading, tasks, text
from data.arrays import load_arrays, save_arrays


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def of_every_kind(folder):
    """(name, how to read it, which of its files to damage)"""
    written = {
        "csqa": (tasks.read_csqa, test_tasks.lines(test_tasks.QUESTION)),
        "squad": (tasks.read_squad, json.dumps(test_tasks.SQUAD)),
        "sst2": (tasks.read_sst2, "sentence\tlabel\na gorgeous film\t1\ndull\t0\n"),
        "math": (tasks.read_math, test_tasks.MATH),
    }
    for name, (read, content) in written.items():
        path = write(folder / f"{name}.txt", content)
        yield name, partial(read, path), [path]
    packed = test_graphs.save_npz(folder / "graph.npz")
    yield "graph .npz", partial(graphs.load, packed), [packed]
    ogb = test_graphs.ogb_folder(folder / "ogb")
    yield "OGB", partial(graphs.load, ogb), sorted(ogb.rglob("*.csv.gz"))
    flickr = test_graphs.write_flickr(folder / "flickr")
    yield "Flickr", partial(graphs.load, flickr), sorted(flickr.iterdir())
    cifar = test_images.write_cifar100(folder / "cifar100")
    yield "cifar100", partial(images.read_folder, cifar), sorted(cifar.iterdir())
    logs = test_behavior.write_kuairand(folder, rows=150)
    read = partial(behavior.load, "kuairand-1k", folder, hash_bits=8)
    yield "KuaiRand", read, sorted(logs.iterdir())
    test_behavior.write_census(folder)
    files = sorted((folder / "census").iterdir())
    yield "census", partial(behavior.load, "census", folder), files
    for part in text.PARTS:
        write(folder / "jsonl" / f"{part}.jsonl", '{"text": "some words"}\n' * 5)
        write(folder / "bin" / f"{part}.bin", np.arange(9, dtype="<u2").tobytes())
    yield "domain .jsonl", partial(text.load_split, folder / "jsonl"), [folder / "jsonl/dev.jsonl"]
    meta = write(folder / "bin" / "meta.json", '{"vocab_size": 9}')
    yield "domain .bin", partial(text.load_split, folder / "bin"), [folder / "bin/dev.bin", meta]
    exchanged = folder / "arrays.npz"
    save_arrays(exchanged, {"w": torch.randn(3, 4), "half": torch.ones(5).bfloat16()})
    yield "arrays", partial(load_arrays, exchanged), [exchanged]


@pytest.fixture
def cases(tmp_path):
    return list(of_every_kind(tmp_path))


# ---- damage --------------------------------------------------------------------------------------

ODD_WORDS = (
    b"nan", b"-1", b"1e30", b"inf", b"1.5", b"null", b"true", b"[]", b"{}", b'""', b"9" * 31,
    b"[" * 3000, b"\0", b"\xff", b"\n\n", b'"', b",", b"\t", b"1_0", b"\\ud800", b"-124",
)  # fmt: skip


def damage(raw, random):
    """A bit flipped, the end cut off, a line twice, or a number that becomes another word."""
    at, way = int(random.integers(len(raw))), random.integers(5)
    if way == 0:
        return raw[:at] + bytes([raw[at] ^ int(random.integers(1, 256))]) + raw[at + 1 :]
    if way == 1:
        return raw[:at]
    if way == 2:
        lines = raw.splitlines(keepends=True)
        at %= len(lines)
        return b"".join(lines[: at + 1] + lines[at:])
    number = re.compile(rb"\d+").search(raw, at)
    start, end = number.span() if number else (at, at)
    return raw[:start] + ODD_WORDS[random.integers(len(ODD_WORDS))] + raw[end:]


def damaged(content, is_packed, random):
    """A gzip file inside: its checksum would hide what its reader does."""
    if is_packed:
        return gzip.compress(damage(gzip.decompress(content), random), mtime=0)
    return damage(content, random)


def fingerprint(found):
    return zlib.crc32(repr(found).encode()), getattr(found, "digest", "")


def check_sound(found):
    if isinstance(found, graphs.Graph):
        assert torch.isfinite(found.x).all() and 0 <= int(found.edge_index.max()) < len(found.x)
        assert int(found.y.max()) == found.num_classes - 1 and found.y.min() >= -1
    elif isinstance(found, images.ImageSet):
        assert int(found.test_y.max()) < found.num_classes == len(found.train_y.unique())
    elif isinstance(found, behavior.Behavior):
        behavior.check(found)
    elif isinstance(found, list) and isinstance(found[0], tasks.Example):
        assert all(0 <= example.label < max(2, len(example.choices)) for example in found)


def test_damaged_files_are_read_or_refused_by_name(cases):
    for name, read, files in cases:
        # No case moves the damage of the others.
        random = np.random.default_rng(zlib.crc32(name.encode()))
        sound = fingerprint(read())
        refused = 0
        for path in files:
            content = path.read_bytes()
            for _ in range(10):
                path.write_bytes(damaged(content, path.suffix == ".gz", random))
                try:
                    check_sound(read())
                except ValueError as error:
                    message = str(error)
                    assert type(error) is not UnicodeDecodeError and "\n" not in message, message
                    # What does not fit the other files names the folder or the data.
                    places = (path.name, *map(str, path.parents[:2]), "kuairand-1k", "census")
                    assert any(place in message for place in places), message
                    refused += 1
            path.write_bytes(content)
        assert fingerprint(read()) == sound  # no damage was kept in a cache
        assert refused > 0, name


# ---- what no reader may wait for, or die of ------------------------------------------------------


def test_a_pipe_is_refused_and_not_waited_for(cases):
    for _, read, files in cases:
        path = files[0]
        path.unlink()
        os.mkfifo(path)  # nobody ever writes
        with pytest.raises(
            (ValueError, FileNotFoundError), match=f"{path.name}|{path.parent.name}"
        ):
            read()


# ---- what all readers are made of ----------------------------------------------------------------


def read_table(at):
    return list(reading.table(at, ("a", "b"), spare=("c",)))


def read_objects(at):
    return [at.take(item, "word", "number") for item in reading.json_lines(at)]


SOUND = [
    (read_table, "c,b,a\n1,2,3\n", [["3", "2"]]),
    (read_table, "\ufeffa , b\r\n1,2\r\n\n\n", [["1", "2"]]),  # as a spreadsheet saves it
    (read_table, 'a,b\n"x, ""y""",\n', [['x, "y"', ""]]),
    (read_objects, '{"number": 1, "word": "x"}', [["x", 1]]),
]


@pytest.mark.parametrize("read, content, expected", SOUND)
def test_tables_and_lines_of_json_are_read(read, content, expected, tmp_path):
    path = write(tmp_path / "a.txt", content)
    with reading.reading(path) as at:
        assert read(at) == expected


ODD = [
    (read_table, "", "a.txt: is empty"),
    (read_table, "a,c\n1,2\n", "a.txt, line 1: the header lacks b; it has a, c"),
    (read_table, "a,b,a\n1,2,3\n", "line 1: the header has a column twice"),
    (read_table, "a,b\n1,2\n1,2,3\n", "line 3: 3 columns, not 2 as in the header"),
    (read_table, "a,b\n\n1,2\n", "line 2: empty, with more below"),
    (read_table, "a,b\n1,2", "line 2: has no end: the file is cut off"),  # 2 could be 23
    (read_table, b"a,b\n1,\xe9\n", "line 2: not UTF-8"),
    (read_table, "a,b\n" + "1" * 2**20, "line 2: has more than 1,048,576 bytes"),
    (read_objects, "not json", "line 1: is damaged .*Expecting value"),
    (read_objects, "[" * 100_000, "line 1: is damaged .*RecursionError"),
    (read_objects, '{"word": "x", "word": "y"}', "a key is there twice"),
    (read_objects, '{"word": "x", "number": NaN}', "NaN is no number of JSON"),
    (read_objects, '{"word": "x"}', "needs word, number; 'number' is missing"),
    (read_objects, '{"word": " ", "number": 1}', "word is empty"),
    (lambda at: at.number("1_0", "age"), "", "age '1_0' is not numeric"),
    (lambda at: at.number("inf", "age"), "", "age 'inf' is not finite"),
    (lambda at: at.one_of(True, (0, 1), "label"), "", "label True is not one of 0, 1"),
    (lambda at: {}["x"], "", "is damaged or of another format .KeyError 'x'"),
]


@pytest.mark.parametrize("read, content, message", ODD)
def test_what_is_odd_is_refused_in_a_line_with_its_place(read, content, message, tmp_path):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(reading.ReadError, match=message) as caught:
        with reading.reading(path) as at:
            read(at)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
