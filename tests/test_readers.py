"""All readers of data/ under one table of damage: a file is read right or refused by name.

The table that it prints says what happened to every kind of file. "As before" is damage that the
format does not show (a letter of a text) or that changes nothing; "otherwise" is another file that
is sound.
"""

import gzip
import json
import os
import shutil
import time
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

from data import behavior, graphs, images, tasks, text
from data.arrays import load_arrays, save_arrays

try:
    import scipy.io
except ImportError:
    scipy = None


class Case(NamedTuple):
    """A sound file or folder, how to read it, and which of its files to damage."""

    read: Callable[[], object]
    files: list[Path]
    trials: int = 90  # damages of each file


def example_labels(found):
    assert found and all(0 <= example.label < max(2, len(example.choices)) for example in found)


def finite_graph(found):
    assert torch.isfinite(found.x).all() and 0 <= int(found.edge_index.max()) < len(found.x)
    assert int(found.y.max()) == found.num_classes - 1 and found.y.min() >= -1


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
    cases["graph .npz"] = Case(partial(graphs.load, packed), [packed], 180)
    ogb = test_graphs.ogb_folder(folder / "ogb")
    files = sorted(path for path in ogb.rglob("*.csv.gz"))
    cases["OGB"] = Case(partial(graphs.load, ogb), files, 20)
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
        cases["pokec .mat"] = Case(partial(graphs.read_pokec, path), [path], 6)  # a process each
        school = folder / "school.mat"
        test_graphs.write_facebook(school)
        cases["facebook .mat"] = Case(partial(graphs.read_facebook, school), [school], 6)
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
        cases[kind] = Case(partial(images.read_folder, path), files, 40)
    return cases


def log_cases(folder):
    logs = test_behavior.write_kuairand(folder, rows=150)
    read = partial(behavior.load, "kuairand-1k", folder, hash_bits=8)
    cases = {"KuaiRand": Case(read, sorted(logs.iterdir()), 30)}
    test_behavior.write_census(folder)
    files = sorted((folder / "census").iterdir())
    cases["census"] = Case(partial(behavior.load, "census", folder), files, 30)
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
    cases["arrays"] = Case(partial(load_arrays, exchanged), [exchanged], 180)
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
        finite_graph(found)
    elif isinstance(found, images.ImageSet):
        assert int(found.test_y.max()) < found.num_classes == len(found.train_y.unique())
    elif isinstance(found, behavior.Behavior):
        behavior.check(found)
    elif isinstance(found, list) and isinstance(found[0], tasks.Example):
        example_labels(found)
    elif name == "math":
        assert all(np.isfinite([*problem.numbers, problem.answer]).all() for problem in found)


WIDTHS = {"refused": 8, "otherwise": 10, "as before": 10}


def test_damaged_files_are_read_or_refused_by_name(cases, capsys):
    table = []
    for name, case in cases.items():
        # No case moves the damage of the others.
        random = np.random.default_rng(zlib.crc32(name.encode()))
        start = time.process_time()
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
        table.append((name, counts, time.process_time() - start))
    with capsys.disabled():
        print(f"\n{'reader':22}{'refused':>8}{'otherwise':>10}{'as before':>10}{'seconds':>8}")
        for name, counts, seconds in table:
            shown = [f"{counts[word]:{width}}" for word, width in WIDTHS.items()]
            print(f"{name:22}{''.join(shown)}{seconds:8.1f}")
        total = sum((counts for _, counts, _ in table), Counter())
        print(f"{sum(total.values()):,} damaged files: {dict(total)}; anything else: 0")
    assert sum(total.values()) > 3000


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


JSON = "csqa arc copa winogrande hellaswag multirc squad hotpotqa siqa piqa".split()
JSON.append("domain .jsonl")
ODD_JSON = ["[" * 100_000, "null", "[null]", '{"a": 1, "a": 2}', "9" * 5000, "1e999", '"\\ud800"']


@pytest.mark.parametrize("content", ODD_JSON)
def test_odd_json_is_refused_by_name(cases, content):
    for name in JSON:
        case = cases[name]
        case.files[0].write_text(content)
        with pytest.raises(ValueError, match=case.files[0].name) as caught:
            case.read()
        assert "\n" not in str(caught.value)
