"""Text corpora: split by document without leakage, the same on every call, honest about what is
missing.
"""

import hashlib
import json
import os

import pytest
import torch

from data import text


def documents(*sizes):
    return [(f"{i}.txt", bytes([65 + i]) * size) for i, size in enumerate(sizes)]


def whole(tensor):
    return tensor.numpy().tobytes()


def test_no_document_has_a_part_on_both_sides():
    corpus = text.split_documents("x", documents(*[50] * 20), 0.1)
    train, val = set(whole(corpus.train)) - {10}, set(whole(corpus.val)) - {10}
    assert not train & val and len(train | val) == 20 and corpus.num_documents == 20
    assert len(val) == 2  # a tenth of the bytes


@pytest.mark.parametrize("domain", ["python", "docs"])
def test_validation_is_not_a_copy_of_training(domain):
    """Help topics quote each other word for word: split by topic alone, two fifths of validation
    stood in training.
    """
    corpus = text.load_domain.__wrapped__(domain)
    train, val = whole(corpus.train), whole(corpus.val)
    pieces = [val[i : i + 64] for i in range(0, len(val) - 64, 64)][:600]
    assert sum(piece in train for piece in pieces) < 0.01 * len(pieces)


def test_a_paragraph_that_repeats_is_kept_once():
    long, short = b"a paragraph of some length, quoted elsewhere", b"short"
    documents = [
        long + b"\n\n" + short,
        short + b"\n \n" + long.replace(b" ", b"  ") + b"\n\nnew words",
        long,
    ]
    assert text.drop_repeats(documents) == [documents[0], b"short\n\nnew words"]


def test_duplicates_are_dropped_and_neither_names_nor_order_move_the_split():
    found = documents(*[50] * 20)
    corpus = text.split_documents("x", found, 0.2)
    renamed = [("copy-" + name, content) for name, content in reversed(found)]
    assert text.split_documents("x", renamed + found, 0.2).digest == corpus.digest
    assert text.split_documents("x", found[:-1], 0.2).digest != corpus.digest


def test_few_or_uneven_documents_leave_something_on_both_sides():
    for sizes in [(10, 1000), (1000, 1000), (5, 5, 5), (1, 100_000)]:
        corpus = text.split_documents("x", documents(*sizes), 0.1)
        assert len(corpus.train) and len(corpus.val)
    early = text.split_documents("x", [("a", b"Title\n" + b"one long line " * 1000)], 0.1)
    assert len(early.val) == pytest.approx(1400, rel=0.01)
    single = text.split_documents("x", [("a", b"line one\n" * 100)], 0.1)
    assert (
        whole(single.train).endswith(b"\n")
        and whole(single.train) + whole(single.val) == b"line one\n" * 100
    )


@pytest.mark.parametrize("domain", list(text.DOMAINS))
def test_every_domain_is_found_here_and_is_the_same_twice(domain):
    corpus = text.load_domain.__wrapped__(domain)
    assert len(corpus.train) > 1000 and len(corpus.val) > 100 and corpus.train.dtype == torch.uint8
    assert 0.01 < len(corpus.val) / (len(corpus.train) + len(corpus.val)) <= 0.11
    again = text.load_domain.__wrapped__(domain)
    assert again.digest == corpus.digest
    raw = hashlib.sha256(whole(corpus.train[:50_000])).hexdigest()
    assert raw == hashlib.sha256(whole(again.train[:50_000])).hexdigest()


def test_without_pydoc_data_packages_stand_in_and_say_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    corpus = text.load_domain.__wrapped__("docs")
    assert "stand in" in corpus.note and len(corpus.val) > 1000


def test_own_text_file_folder_and_mistakes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello\n" * 100)
    (tmp_path / "image.bin").write_bytes(b"\0" * 1000)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes(b"world\n" * 100)
    (tmp_path / "loop").symlink_to(tmp_path / "a.txt")
    assert text.load_text(tmp_path).num_documents == 2
    assert len(text.load_text(tmp_path / "a.txt").train) == 540
    (tmp_path / "sub" / ".hidden").mkdir()
    (tmp_path / "sub" / ".hidden" / "c.txt").write_bytes(b"hidden\n" * 100)
    assert text.load_text(tmp_path).num_documents == 2
    with pytest.raises(ValueError, match="image.bin is a binary file"):
        text.load_text(tmp_path / "image.bin")
    with pytest.raises(FileNotFoundError, match="missing.txt: no such file"):
        text.load_text(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    with pytest.raises(ValueError, match="holds no text"):
        text.load_text(tmp_path / "empty.txt")
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes: a reader would wait for ever
    with pytest.raises(ValueError, match="pipe is no regular file"):
        text.load_text(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no text domain 'poems'; there are python"):
        text.load_domain("poems")


def test_windows_predict_every_byte_once():
    data = torch.arange(21, dtype=torch.uint8)
    windows = text.all_windows(data, context=5)
    assert (
        windows.tolist() == [list(range(i, i + 6)) for i in (0, 5, 10, 15)]
        and windows.dtype == torch.int64
    )
    assert windows[:, 1:].flatten().tolist() == list(range(1, 21))
    with pytest.raises(ValueError, match="21 bytes; a window of context 21 needs 22"):
        text.all_windows(data, 21)


def test_sampled_windows_are_consecutive_bytes_and_repeat_with_the_generator():
    data = torch.arange(50, dtype=torch.uint8)
    draw = lambda seed: text.sample_windows(data, 200, 7, torch.Generator().manual_seed(seed))
    windows = draw(0)
    assert torch.equal(windows, draw(0)) and not torch.equal(windows, draw(1))
    assert (windows.diff(dim=1) == 1).all() and windows.min() == 0 and windows.max() == 49
    with pytest.raises(ValueError, match="a window needs 51"):
        text.sample_windows(data, 1, 51, torch.Generator())


# --- domains by provenance, in three parts --------------------------------------------------------


def verbatim(piece_source: bytes, within: bytes, size: int = 64) -> float:
    """Share of blocks of `size` bytes that stand word for word in `within`; table rules are form,
    not content.
    """
    pieces = [piece_source[i : i + size] for i in range(0, len(piece_source) - size, size)][:400]
    pieces = [piece for piece in pieces if sum(chr(byte).isalnum() for byte in piece) > size // 3]
    return sum(piece in within for piece in pieces) / max(1, len(pieces))


@pytest.fixture(scope="module")
def provenance():
    return {name: text.load_provenance(name) for name in text.PROVENANCE}


def test_domains_are_whole_distinct_and_the_same_twice(provenance):
    for name, split in provenance.items():
        sizes = [len(getattr(split, part)) for part in text.PARTS]
        # btm.py reads 128 test blocks of 64 bytes; the pins bring 11,455 bytes of licences for them
        assert sizes[0] >= 60_000 and sizes[1] >= 5_000 and sizes[2] > 128 * 64, (name, sizes)
        assert all(size <= text.SMALL_SIZES[part] for part, size in zip(text.PARTS, sizes))
        assert split.train.dtype == torch.uint8 and split.vocab_size == 256
    assert len({split.digest for split in provenance.values()}) == len(provenance)
    for name in ("python", "licences", "sums"):
        assert text.load_provenance(name).digest == provenance[name].digest


def test_no_part_of_a_domain_quotes_another_part(provenance):
    """Also across domains: what an expert learns must not be the text that a novel domain asks
    for.
    """
    whole_of = {
        name: {part: whole(getattr(split, part)) for part in text.PARTS}
        for name, split in provenance.items()
    }
    tables = {
        "operators": 0.12,
        "stubs": 0.04,
    }  # generated entries that differ in a word: their form repeats
    for name, parts in whole_of.items():
        bound = tables.get(name, 0.02)
        assert verbatim(parts["test"], parts["train"]) <= bound, name
        assert (
            verbatim(parts["test"], parts["dev"]) <= bound
            and verbatim(parts["dev"], parts["train"]) <= bound
        ), name
        for other in ("python", "headers", "docs", "operators", "unicode", "tests"):
            if other != name:
                assert verbatim(parts["test"], whole_of[other]["train"]) <= 0.01, (name, other)


def test_near_repeats_are_dropped_and_different_words_are_kept():
    licence = b"permission is hereby granted free of charge to any person obtaining a copy of this software and to use it"
    other = b"the cat sat on the mat and looked at the moon for a long while before it went home to sleep again"
    documents = [
        b"Copyright 2001 A\n\n" + licence,
        b"Copyright 2020 B\n\n" + licence.replace(b" to ", b"\nto  ", 1),
        other,
    ]
    assert text.drop_near_repeats(documents) == [documents[0], b"Copyright 2020 B", other]
    assert text.drop_near_repeats(documents, wanted=10) == documents[:1]


def test_three_parts_share_no_document_and_do_not_move_with_names_or_order():
    found = [(f"{i}", f"document {i} of words {i * 7919} ".encode() * 20) for i in range(60)]
    split = text.split_in_three("x", found)
    numbers = {part: set(whole(getattr(split, part)).split(b"\0")) for part in text.PARTS}
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values())) == 60
    assert len(numbers["test"]) in (6, 7) and len(numbers["dev"]) in (3, 4)
    again = text.split_in_three(
        "x", [("new " + name, content) for name, content in reversed(found)]
    )
    assert again.digest == split.digest
    assert text.split_in_three("x", found[1:]).digest != split.digest
    with pytest.raises(ValueError, match="'x' is too short: .* cannot fill three parts"):
        text.split_in_three("x", found[:1])


def test_cut_pieces_are_the_text_and_end_at_lines():
    content = b"".join(b"line %d of some length\n" % i + b"\n" * (i % 40 == 0) for i in range(2000))
    pieces = list(text._cut(content))
    assert b"".join(pieces) == content and all(piece.endswith(b"\n") for piece in pieces)
    assert all(1900 <= len(piece) <= 4000 for piece in pieces[:-1])
    assert b"".join(text._cut(b"x" * 9001)) == b"x" * 9001


def test_a_missing_source_is_replaced_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "STDLIB", tmp_path)
    split = text.load_provenance("tests")
    assert "'tests' is missing here; generated numerals stand in" in split.note
    assert b"MMXII" in whole(split.train)
    monkeypatch.setitem(__import__("sys").modules, "torchgen", None)
    assert "generated records stand in" in text.load_provenance("operators").note
    with pytest.raises(ValueError, match="no text domain 'poems'; there are python, headers"):
        text.load_provenance("poems")
    with pytest.raises(ValueError, match="no generated text 'poems'"):
        list(text.generated("poems"))


def test_packages_are_not_part_of_the_standard_library(monkeypatch, tmp_path):
    """Where they lie inside its folder, numpy (a novel domain) would be learnt as python."""
    for name in (
        "os.py",
        "json/decoder.py",
        "site-packages/numpy/a.py",
        "dist-packages/numpy/b.py",
        "test/c.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    monkeypatch.setattr(text, "STDLIB", tmp_path)
    assert sorted(name for name, _ in text.PROVENANCE["python"]()) == ["json/decoder.py", "os.py"]


def test_domains_read_what_the_pins_bring_and_no_file_of_a_build(monkeypatch, tmp_path):
    """Else a corpus, its hash and all losses changed with `pip install`, or with torch's CUDA."""
    before = text.load_provenance("licences").digest
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "RECORD").write_text("other-1.0.dist-info/LICENSE,,\n")
    (folder / "LICENSE").write_text(
        "\n\n".join(f"you may do {i} things {i * i}" for i in range(9999))
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    assert text.load_provenance("licences").digest == before
    found = {name.split("/")[0] for name, _ in text.PROVENANCE["licences"]()}
    assert found == {"torch", "numpy", "tqdm", "LICENSE.txt"}
    for domain, of_a_build in {
        "python": ("_sysconfigdata", "sitecustomize"),
        "numpy": ("__config__",),
        "headers": ("tensorpipe", "caffe2", "cuda"),
        "cmake": ("Caffe2Config.cmake", "Caffe2Targets.cmake", "Targets-release.cmake"),
    }.items():
        names = [f"/{name}" for name, _ in text.PROVENANCE[domain]()]
        assert len(names) > 20
        for word in of_a_build:
            assert not [name for name in names if f"/{word}" in name or name.endswith(word)], domain


def test_generated_text_is_true_and_the_same_everywhere():
    line = whole(text.load_provenance("sums").test).split(b"\n")[3].decode()
    left, right = line.split(" = ")
    assert eval(left) == int(right)
    digests = [
        hashlib.sha256(next(text.generated(kind))[1]).hexdigest()[:8] for kind in text.GENERATED
    ]
    assert digests == ["66d159da", "adced52c", "de09ee21", "ef862b63"]


def write_domain(folder, ending=".txt", **parts):
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in parts.items():
        (folder / (part + ending)).write_bytes(content)
    return folder


def test_a_domain_on_disk_in_three_formats(tmp_path):
    train, dev, test = b"to train on " * 9, b"to develop", b"to test"
    plain = text.load_split(write_domain(tmp_path / "plain", train=train, valid=dev, test=test))
    assert [whole(plain.train), whole(plain.dev), whole(plain.test)] == [
        train,
        dev,
        test,
    ] and plain.name == "plain"
    lines = b'{"text": "one"}\n{"text": "tw\\u00f6", "meta": 1}\n'
    jsonl = text.load_split(
        write_domain(tmp_path / "lines", ".jsonl", train=lines, dev=lines, test=lines)
    )
    assert whole(jsonl.train) == b"one\0tw\xc3\xb6"
    ids = torch.tensor([1, 300, 65_000]).to(torch.uint16).numpy().astype("<u2").tobytes()
    folder = write_domain(tmp_path / "ids", ".bin", train=ids, dev=ids, test=ids)
    with pytest.raises(ValueError, match='meta.json: is missing; it must hold {"vocab_size": n}'):
        text.load_split(folder)
    (folder / "meta.json").write_text('{"vocab_size": 65001, "eot": 0}')
    loaded = text.load_split(folder)
    assert loaded.vocab_size == 65_001 and text.sample_windows(
        loaded.train, 1, 3, torch.Generator()
    ).tolist() == [[1, 300, 65_000]]
    loaded.train[0] = 7  # a mapped file is never written to
    assert text.load_split(folder).digest == loaded.digest
    (folder / "meta.json").write_text('{"vocab_size": 65000}')
    with pytest.raises(ValueError, match="meta.json: token id 65000, but vocab_size is 65000"):
        text.load_split(folder)


def test_mistakes_in_a_domain_on_disk_are_named(tmp_path):
    good = {"train": b"train text", "valid": b"valid text", "test": b"test text"}
    with pytest.raises(
        FileNotFoundError, match="no such folder; --prepare makes one .data.README.md."
    ):
        text.load_split(tmp_path / "none")
    folder = write_domain(tmp_path / "a", train=b"x" * 9, test=b"x" * 9)
    with pytest.raises(FileNotFoundError, match="there is no valid.txt"):
        text.load_split(folder)
    write_domain(folder, **good)
    write_domain(folder, ".jsonl", train=b'{"text": "x"}\n')
    with pytest.raises(ValueError, match="train.txt and train.jsonl; keep one"):
        text.load_split(folder)
    write_domain(
        tmp_path / "b", ".jsonl", **{part: b'{"text": "fine"}\n{"text": 3}\n' for part in good}
    )
    with pytest.raises(ValueError, match="train.jsonl, line 2"):
        text.load_split(tmp_path / "b")
    write_domain(tmp_path / "c", **good | {"test": b""})
    with pytest.raises(ValueError, match="test.txt: is empty"):
        text.load_split(tmp_path / "c")
    write_domain(tmp_path / "d", ".bin", **{part: b"odd" for part in good})
    with pytest.raises(ValueError, match="odd number of bytes"):
        text.load_split(tmp_path / "d")
    deep = b'{"text": "fine"}\n' + b"[" * 100_000 + b"\n"
    for lines, message in (
        (deep, "train.jsonl, line 2"),
        (b'{"text": ""}\n', "train.jsonl: holds no text"),
    ):
        write_domain(tmp_path / "f", ".jsonl", **dict.fromkeys(good, lines))
        with pytest.raises(ValueError, match=message):
            text.load_split(tmp_path / "f")
    folder = write_domain(tmp_path / "g", ".bin", **dict.fromkeys(good, b"even"))
    for vocab_size in (
        "1e999",
        "NaN",
        "1000000",
        "-1",
        "[]",
        "3e4",
        "true",
        '"30000"',
        "[" * 100_000,
    ):
        (folder / "meta.json").write_text(f'{{"vocab_size": {vocab_size}}}')
        with pytest.raises(ValueError, match="meta.json"):
            text.load_split(folder)
    folder = write_domain(tmp_path / "e", ".bin", train=b"even", valid=b"even")
    write_domain(folder, ".txt", test=b"text")
    with pytest.raises(ValueError, match="cannot be mixed"):
        text.load_split(folder)


def pile_lines(num=400, names=tuple(text.PILE)):
    for i in range(num):
        name = names[i % len(names)]
        yield (
            json.dumps({"text": f"{name} document {i} {i * i}", "meta": {"pile_set_name": name}})
            + "\n"
        )


def test_prepare_deals_the_pile_out_by_label(tmp_path):
    source = tmp_path / "val.jsonl"
    lines = list(pile_lines(6400))
    source.write_text(
        "".join(lines + lines[:50])
        + '{"text": "other", "meta": {"pile_set_name": "Books3"}}\n{"text": "no label"}\n'
    )
    sizes, labels = text.prepare(source, tmp_path / "btm")
    assert labels["ArXiv"] in (400, 404) and labels["Books3"] == labels[""] == 1
    assert list(sizes) == sorted(text.PILE.values()) and all(
        set(parts) == set(text.PARTS) for parts in sizes.values()
    )
    split = text.load_split(tmp_path / "btm" / "arxiv")
    documents = [set(whole(getattr(split, part)).strip(b"\0").split(b"\0")) for part in text.PARTS]
    assert (
        sum(map(len, documents)) == len(set.union(*documents)) == 400
    )  # equal documents are kept once
    assert all(document.startswith(b"ArXiv document") for document in set.union(*documents))
    source.write_text(
        "".join(reversed(lines))
    )  # which part a document goes to depends on its contents alone
    text.prepare(source, tmp_path / "again")
    again = text.load_split(tmp_path / "again" / "arxiv")
    for part in text.PARTS:
        dealt = [sorted(whole(getattr(one, part)).split(b"\0")) for one in (split, again)]
        assert dealt[0] == dealt[1]
    assert not list((tmp_path / "btm").rglob(".*"))
    source.write_text("".join(pile_lines(100, ("ArXiv 2", "Books3"))))
    with pytest.raises(
        ValueError, match=r"no domain can be filled; found: ArXiv 2 \(50\), Books3 \(50\)"
    ):
        text.prepare(source, tmp_path / "btm")
    source.write_text("".join(lines[:3000]) + "{")
    with pytest.raises(ValueError, match="val.jsonl, line 3001"):
        text.prepare(source, tmp_path / "btm")
    assert (
        text.load_split(tmp_path / "btm" / "arxiv").digest == split.digest
    )  # what was there stays
    assert not list((tmp_path / "btm").rglob(".*"))


def test_prepare_makes_a_domain_of_anything(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(
            "\n\n".join(f"note {i}, thought {j * i}, word {j + 1000 * i}" for j in range(60))
        )
    (folder / "photo.jpg").write_bytes(b"\0\1\2" * 100)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret " * 100)
    sizes = text.prepare(folder, tmp_path / "btm", "notes")[0]["notes"]
    assert sizes["train"] > 5 * sizes["test"] > sizes["dev"] > 0
    split = text.load_split(tmp_path / "btm" / "notes")
    assert (
        b"\1\2" not in whole(split.train)
        and b"secret" not in whole(split.train)
        and b"thought" in whole(split.test)
    )
    for i in range(120):  # many documents, one of which is most of the text
        content = "\n\n".join(
            f"leaf {i} {i * j} {j * j + i} of the tree {j}" for j in range(4000 if i == 7 else 40)
        )
        (tmp_path / "book" / f"{i}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "book" / f"{i}.txt").write_text(content)
    sizes = text.prepare(tmp_path / "book", tmp_path / "btm", "book")[0]["book"]
    assert sizes["train"] > 5 * sizes["test"] > 5 * sizes["dev"] > 0
    with pytest.raises(ValueError, match="a domain cannot be called '../x'"):
        text.prepare(folder, tmp_path / "btm", "../x")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        text.prepare(tmp_path / "none", tmp_path / "btm", "x")


def test_a_packed_file_is_named_with_its_tool_and_does_not_spoil_a_folder(tmp_path, capsys):
    source = tmp_path / "pile"
    source.mkdir()
    (source / "val.jsonl").write_text("".join(pile_lines(6400)))
    alone = text.prepare(source, tmp_path / "alone")[0]
    for ending, tool in (
        (".zst", "zstd -d"),
        (".gz", "gunzip"),
        (".xz", "unxz"),
        (".zip", "unzip"),
    ):
        packed = source / f"train.jsonl{ending}"
        packed.write_bytes(b"packed")
        with pytest.raises(ValueError, match=f"{ending} is packed; {tool} unpacks it"):
            text.prepare(packed, tmp_path / "btm")
    assert text.prepare(source, tmp_path / "btm")[0] == alone
    assert capsys.readouterr().err.count("passed over: ") == 4
