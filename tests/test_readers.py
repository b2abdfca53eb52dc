"""All readers of data/ under one table of damage: a file is read right or refused by name.

"As before" is damage that the format does not show (a letter of a text) or that changes nothing;
"otherwise" is another file that is sound.
"""

import gzip
import io
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import test_behavior
import test_graphs
import test_tasks
import torch

from data import behavior, graphs, images, reading, tasks, text
from data.arrays import load_arrays, save_arrays

try:
    import scipy.io
except ImportError:
    scipy = None


class Case(NamedTuple):
    """A sound file or folder, how to read it, and which of its files to damage."""

    read: Callable[[], object]
    files: list[Path]
    trials: int = 40  # damages of each file


def write_task(folder, name, content):
    path = folder / name
    path.write_text(content)
    return path


def task_cases(folder):
    lines = test_tasks.lines
    objects = {
        "csqa": (tasks.read_csqa, lines(test_tasks.QUESTION)),
        "arc": (tasks.read_arc, lines(test_tasks.ARC)),
        "copa": (tasks.read_copa, lines(test_tasks.COPA)),
        "winogrande": (tasks.read_winogrande, lines(test_tasks.GAP)),
        "hellaswag": (tasks.read_hellaswag, lines(test_tasks.ENDINGS)),
        "multirc": (tasks.read_multirc, lines(test_tasks.PASSAGE)),
        "squad": (tasks.read_squad, json.dumps(test_tasks.SQUAD)),
        "hotpotqa": (tasks.read_hotpotqa, json.dumps([test_tasks.HOTPOTQA])),
        "siqa": (tasks.read_siqa, lines(test_tasks.SIQA, test_tasks.SIQA)),
        "piqa": (tasks.read_piqa, lines(test_tasks.PIQA)),
        "sst2": (tasks.read_sst2, "sentence\tlabel\na gorgeous film\t1\ndull\t0\n"),
        "wikiqa": (tasks.read_wikiqa, test_tasks.WIKIQA),
        "math": (tasks.read_math, test_tasks.MATH),
        "msr_paraphrase_train": (tasks.read_mrpc, test_tasks.MRPC),
    }
    (folder / "siqa-labels.lst").write_text("3\n1\n")
    (folder / "piqa-labels.lst").write_text("1\n")
    (folder / "mrpc_dev_ids.tsv").write_text("9\t10\n")
    cases = {}
    for name, (read, content) in objects.items():
        path = write_task(folder, f"{name}.txt", content)
        files = [path]
        if name in ("siqa", "piqa"):
            files.append(folder / f"{name}-labels.lst")
        cases[name] = Case(partial(read, path), files)
    ids = folder / "mrpc_dev_ids.tsv"
    cases["mrpc, ids"] = Case(partial(tasks.read_mrpc, ids), [ids])
    return cases


def graph_cases(folder):
    cases = {}
    packed = folder / "graph.npz"
    test_graphs.save_npz(packed)
    cases["graph .npz"] = Case(partial(graphs.load, packed), [packed], 80)
    ogb = test_graphs.ogb_folder(folder / "ogb")
    files = sorted(path for path in ogb.rglob("*.csv.gz"))
    cases["OGB"] = Case(partial(graphs.load, ogb), files, 10)
    flickr = folder / "flickr"
    flickr.mkdir()
    test_graphs.write_flickr(flickr)
    cases["Flickr"] = Case(partial(graphs.load, flickr), sorted(flickr.iterdir()))
    twitch = folder / "twitch"
    test_graphs.write_twitch(twitch)
    files = sorted(path for path in twitch.rglob("*") if path.is_file())
    cases["twitch-gamer"] = Case(partial(graphs.load, twitch), files)
    if scipy is not None:
        path = folder / "pokec.mat"
        arrays = {"edge_index": test_graphs.EDGES.T, "node_feat": test_graphs.X}
        scipy.io.savemat(path, arrays | {"label": test_graphs.Y})
        cases["pokec .mat"] = Case(partial(graphs.read_pokec, path), [path], 3)  # a process each
        school = folder / "school.mat"
        test_graphs.write_facebook(school)
        cases["facebook .mat"] = Case(partial(graphs.read_facebook, school), [school], 3)
    return cases


def image_cases(folder):
    random = np.random.default_rng(0)
    cases = {}
    for kind, (label_bytes, train_files, test_file) in images.FILES.items():
        path = folder / kind
        path.mkdir()
        for name in (*train_files, test_file):
            records = random.integers(0, 256, (4, label_bytes + images.PIXELS), dtype=np.uint8)
            records[:, label_bytes - 1] = [0, 1, 2, 1]
            (path / name).write_bytes(records.tobytes())
        files = [path / test_file, path / train_files[0]]
        cases[kind] = Case(partial(images.read_folder, path), files, 20)
    return cases


def log_cases(folder):
    logs = test_behavior.write_kuairand(folder, rows=150)
    read = partial(behavior.load, "kuairand-1k", folder, hash_bits=8)
    cases = {"KuaiRand": Case(read, sorted(logs.iterdir()), 15)}
    test_behavior.write_census(folder)
    files = sorted((folder / "census").iterdir())
    cases["census"] = Case(partial(behavior.load, "census", folder), files, 15)
    return cases


def text_cases(folder):
    cases = {}
    contents = {".txt": b"some words\0and more", ".jsonl": b'{"text": "some words"}\n' * 5}
    contents[".bin"] = np.arange(9, dtype="<u2").tobytes()
    for ending, content in contents.items():
        domain = folder / ending[1:]
        domain.mkdir()
        for part in text.PARTS:
            (domain / (part + ending)).write_bytes(content)
        files = [domain / f"dev{ending}"]
        if ending == ".bin":
            files.append(write_task(domain, "meta.json", '{"vocab_size": 9}'))
        cases[f"domain {ending}"] = Case(partial(text.load_split, domain), files)
    own = folder / "own.txt"
    own.write_text("a line of text\n" * 30)
    cases["text"] = Case(partial(text.load_text, own), [own])
    exchanged = folder / "arrays.npz"
    arrays = {"w": torch.randn(3, 4), "half": torch.ones(5).bfloat16()}
    save_arrays(exchanged, arrays, {"name": "x"})
    cases["arrays"] = Case(partial(load_arrays, exchanged), [exchanged], 80)
    return cases


@pytest.fixture
def cases(tmp_path):
    found = {}
    for make in (task_cases, graph_cases, image_cases, log_cases, text_cases):
        folder = tmp_path / make.__name__
        folder.mkdir()
        found |= make(folder)
    return found


# ---- damage --------------------------------------------------------------------------------------

ODD_WORDS = [
    b"nan", b"-1", b"1e30", b"inf", b"1.5", b"null", b"true", b"[]", b"{}", b'""', b"9" * 31,
    b"9" * 5000, b"[" * 3000, b"\0", b"\xff", b"\n\n", b'"', b",", b"\t", b"1_0", b"NaN",
    b"\\ud800", b"-124",
]  # fmt: skip


def flip(raw, random):
    for place in random.integers(0, len(raw), random.integers(1, 4)):
        raw[place] ^= int(random.integers(1, 256))


def cut(raw, random):
    del raw[int(random.integers(len(raw))) :]


def insert(raw, random):
    at = int(random.integers(len(raw)))
    raw[at:at] = random.integers(0, 256, int(random.integers(1, 40)), dtype=np.uint8).tobytes()


def double(raw, random):
    at, length = int(random.integers(len(raw))), int(random.integers(1, 40))
    raw[at:at] = raw[at : at + length]


def replace_number(raw, random):
    """One of the numbers in a text becomes another word; a file without any gets it anywhere."""
    places = [i for i, byte in enumerate(raw) if 48 <= byte < 58]
    places = places or [int(random.integers(len(raw)))]
    start = places[random.integers(len(places))]
    end = start + 1
    while end < len(raw) and 48 <= raw[end] < 58:
        end += 1
    raw[start:end] = ODD_WORDS[random.integers(len(ODD_WORDS))]


def double_line(raw, random):
    lines = bytes(raw).splitlines(keepends=True)
    at = int(random.integers(len(lines)))
    raw[:] = b"".join(lines[: at + 1] + lines[at:])


DAMAGES = (flip, cut, insert, double, replace_number, replace_number, double_line)


def damaged(content, packed, random):
    """A gzip file mostly inside: its checksum would hide what its reader does."""
    inside = packed and random.random() < 0.7
    raw = bytearray(gzip.decompress(content) if inside else content)
    DAMAGES[random.integers(len(DAMAGES))](raw, random)
    return gzip.compress(bytes(raw), mtime=0) if inside else bytes(raw)


def fingerprint(found):
    return zlib.crc32(repr(found).encode()), getattr(found, "digest", "")


def check_sound(name, found):
    if isinstance(found, graphs.Graph):
        assert torch.isfinite(found.x).all() and 0 <= int(found.edge_index.max()) < len(found.x)
        assert int(found.y.max()) == found.num_classes - 1 and found.y.min() >= -1
    elif isinstance(found, images.ImageSet):
        assert int(found.test_y.max()) < found.num_classes == len(found.train_y.unique())
    elif isinstance(found, behavior.Behavior):
        behavior.check(found)
    elif isinstance(found, list) and isinstance(found[0], tasks.Example):
        assert all(0 <= example.label < max(2, len(example.choices)) for example in found)
    elif name == "math":
        assert all(np.isfinite([*problem.numbers, problem.answer]).all() for problem in found)


def test_damaged_files_are_read_or_refused_by_name(cases, capsys):
    total = Counter()
    for name, case in cases.items():
        # No case moves the damage of the others.
        random = np.random.default_rng(zlib.crc32(name.encode()))
        counts = Counter()
        sound = fingerprint(case.read())
        for path in case.files:
            content = path.read_bytes()
            for _ in range(case.trials):
                path.write_bytes(damaged(content, path.suffix == ".gz", random))
                try:
                    found = case.read()
                except ValueError as error:
                    message = str(error)
                    assert type(error) is not UnicodeDecodeError and "\n" not in message, message
                    # What does not fit the other files names the folder or the data.
                    places = (path.name, *map(str, path.parents[:2]), "kuairand-1k", "census")
                    assert any(place in message for place in places), message
                    counts["refused"] += 1
                else:
                    check_sound(name, found)
                    counts["as before" if fingerprint(found) == sound else "otherwise"] += 1
            path.write_bytes(content)
        assert fingerprint(case.read()) == sound  # no damage was kept in a cache
        if name not in ("text", "domain .txt"):  # almost anything is a text
            assert counts["refused"] > 0, name
        total += counts
    assert sum(total.values()) > 1200, total


# ---- what no reader may wait for, or die of ------------------------------------------------------


def test_a_pipe_is_refused_and_not_waited_for(cases):
    for case in cases.values():
        for path in case.files:
            kept = path.with_name(path.name + ".kept")
            shutil.move(path, kept)
            os.mkfifo(path)  # nobody ever writes
            named = f"{path.name}|{path.parent.name}"
            with pytest.raises((ValueError, FileNotFoundError), match=named):
                case.read()
            shutil.move(kept, path)


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
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    with reading.reading(path) as at:
        assert read(at) == expected


def read_array(at):
    return reading.read_npy(at.path)


def npy(*values, more=b""):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue() + more


ODD = [
    (read_array, npy(1, 2, more=b"x"), r"shape \[2\] is not what the file holds"),
    (read_array, npy(1, 2)[:-1], r"shape \[2\] does not fit|is not what the file holds"),
    (read_array, npy(True).replace(b"\n\1", b"\n\2"), "a truth value is neither 0 nor 1"),
    (read_table, "", "a.txt: is empty"),
    (read_table, "a,c\n1,2\n", "a.txt, line 1: the header lacks b; it has a, c"),
    (read_table, "a,b,a\n1,2,3\n", "line 1: the header has a column twice"),
    (read_table, "a,b\n1,2\n1,2,3\n", "line 3: 3 columns, not 2 as in the header"),
    (read_table, "a,b\n1\n", "line 2: 1 columns, not 2"),
    (read_table, "a,b\n\n1,2\n", "line 2: empty, with more below"),
    (read_table, "a,b\n1,2", "line 2: has no end: the file is cut off"),  # 2 could be 23
    (read_table, b"a,b\n1,\xe9\n", "line 2: not UTF-8"),
    (read_table, 'a,b\n"1"x,2\n', "line 2: is damaged"),
    (read_table, 'a,b\n"1,2\n', "line 2: is damaged .*unexpected end"),
    (read_table, "a,b\n" + "1" * 2**20, "line 2: has more than 1,048,576 bytes"),
    (read_objects, "not json", "line 1: is damaged .*Expecting value"),
    (read_objects, "[" * 100_000, "line 1: is damaged .*RecursionError"),
    (read_objects, '{"word": "x", "word": "y"}', "a key is there twice"),
    (read_objects, '{"word": "x", "number": NaN}', "NaN is no number of JSON"),
    (read_objects, "[1]", r"needs an object with word, number, not \[1\]"),
    (read_objects, '{"word": "x"}', "needs word, number; 'number' is missing"),
    (read_objects, '{"word": 5, "number": 1}', "word is no text: 5"),
    (read_objects, '{"word": " ", "number": 1}', "word is empty"),
    (read_objects, '{"word": "\\ud800", "number": 1}', "surrogates not allowed"),
    (lambda at: at.number("1_0", "age"), "", "age '1_0' is not numeric"),
    (lambda at: at.number("inf", "age"), "", "age 'inf' is not finite"),
    (lambda at: at.one_of(True, (0, 1), "label"), "", "label True is not one of 0, 1"),
    (lambda at: at.words("ab", "names"), "", "names: a list is needed, not 'ab'"),
    (lambda at: {}["x"], "", "is damaged or of another format .KeyError 'x'"),
]


@pytest.mark.parametrize("read, content, message", ODD)
def test_what_is_odd_is_refused_in_a_line_with_its_place(read, content, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(reading.ReadError, match=message) as caught:
        with reading.reading(path) as at:
            read(at)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
