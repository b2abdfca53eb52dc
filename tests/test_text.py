"""Text corpora: split by document without leakage, the same on every call, honest about what is
missing.
"""

import hashlib
import json
import os
import sys

import pytest
import torch

from data import text


def documents(*sizes):
    return [(f"{i}.txt", bytes([65 + i]) * size) for i, size in enumerate(sizes)]


def whole(tensor):
    return tensor.numpy().tobytes()


def parts_of(split):
    return {part: whole(getattr(split, part)) for part in text.PARTS}


# --- a corpus in two parts ------------------------------------------------------------------------


def test_no_document_has_a_part_on_both_sides_and_neither_names_nor_order_move_the_split():
    found = documents(*[50] * 20)
    corpus = text.split_documents("x", found, 0.1)
    train, val = set(whole(corpus.train)) - {10}, set(whole(corpus.val)) - {10}
    assert not train & val and len(train | val) == 20 and corpus.num_documents == 20
    assert len(val) == 2  # a tenth of the bytes
    renamed = [("copy-" + name, content) for name, content in reversed(found)]
    assert text.split_documents("x", renamed + found, 0.1).digest == corpus.digest
    assert text.split_documents("x", found[:-1], 0.1).digest != corpus.digest


def test_few_or_uneven_documents_leave_something_on_both_sides():
    for sizes in [(10, 1000), (1000, 1000), (5, 5, 5), (1, 100_000)]:
        corpus = text.split_documents("x", documents(*sizes), 0.1)
        assert len(corpus.train) and len(corpus.val)
    one_line = text.split_documents("x", [("a", b"Title\n" + b"one long line " * 1000)], 0.1)
    assert len(one_line.val) == pytest.approx(1400, rel=0.01)
    single = text.split_documents("x", [("a", b"line one\n" * 100)], 0.1)
    assert whole(single.train).endswith(b"\n")
    assert whole(single.train) + whole(single.val) == b"line one\n" * 100
    with pytest.raises(ValueError, match="val_share is 1"):
        text.split_documents("x", documents(5, 5), 1)


def test_a_paragraph_that_repeats_is_kept_once():
    long, short = b"a paragraph of some length, quoted elsewhere", b"short"
    quoting = short + b"\n \n" + long.replace(b" ", b"  ") + b"\n\nnew words"
    found = [long + b"\n\n" + short, quoting, long]
    assert text.drop_repeats(found) == [found[0], b"short\n\nnew words"]


@pytest.mark.parametrize("domain", text.DOMAINS)
def test_every_domain_is_found_here_the_same_twice_and_without_copies(domain):
    """Help topics quote each other word for word: split by topic alone, two fifths of validation
    stood in training.
    """
    found, note = text.DOMAINS[domain]()
    corpus = text.split_documents(domain, found[:400], 0.1, note)
    train, val = whole(corpus.train), whole(corpus.val)
    assert len(train) > 1000 and len(val) > 100 and corpus.train.dtype == torch.uint8
    assert 0.01 < len(val) / (len(train) + len(val)) <= 0.11
    if domain != "headers":  # a program wrote them: a quarter of validation stands in training
        assert text.load_domain(domain).digest == corpus.digest
        pieces = [val[i : i + 64] for i in range(0, len(val) - 64, 64)][:600]
        most = 0.1 if domain == "python" else 0.02  # how often modules repeat hangs on the version
        assert sum(piece in train for piece in pieces) < most * len(pieces)


def test_without_pydoc_data_packages_stand_in_and_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    corpus = text.load_domain.__wrapped__("docs")
    assert "stand in" in corpus.note and len(corpus.val) > 1000


def test_own_text_file_folder_and_mistakes(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    files = {"a.txt": b"hello\n", "sub/b.txt": b"world\n", "sub/.hidden/c.txt": b"hidden\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content * 100)
    (tmp_path / "image.bin").write_bytes(b"\0" * 1000)
    (tmp_path / "loop").symlink_to(tmp_path / "a.txt")
    assert text.load_text(tmp_path).num_documents == 2
    assert len(text.load_text(tmp_path / "a.txt").train) == 540
    (tmp_path / "empty.txt").write_bytes(b" \n")
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes: a reader would wait for ever
    refused = {
        "image.bin": "image.bin is a binary file",
        "missing.txt": "missing.txt: no such file",
        "empty.txt": "holds no text",
        "pipe": "pipe is no regular file",
    }
    for name, message in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            text.load_text(tmp_path / name)
    with pytest.raises(ValueError, match="no text domain 'poems'; there are python"):
        text.load_domain("poems")


def test_windows_predict_every_byte_once():
    data = torch.arange(21, dtype=torch.uint8)
    windows = text.all_windows(data, context=5)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [list(range(i, i + 6)) for i in (0, 5, 10, 15)]
    assert windows[:, 1:].flatten().tolist() == list(range(1, 21))
    assert torch.equal(text.spread_windows(data, 5, 2), windows[[0, 3]])
    assert torch.equal(text.spread_windows(data, 5, 9), windows)
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
        assert sizes[0] >= 60_000 and sizes[1] >= 4_000 and sizes[2] > 128 * 64, (name, sizes)
        assert all(size <= text.SMALL_SIZES[part] for part, size in zip(text.PARTS, sizes))
        assert split.train.dtype == torch.uint8 and split.vocab_size == 256
    assert len({split.digest for split in provenance.values()}) == len(provenance)
    assert text.load_provenance("numpy").digest == provenance["numpy"].digest


def test_no_part_of_a_domain_quotes_another_part(provenance):
    """Also across domains: what an expert learns must not be the text that a novel domain asks
    for.
    """
    whole_of = {name: parts_of(split) for name, split in provenance.items()}
    # generated entries that differ in a word: their form repeats; so do some sentences of licences
    tables = {"operators": 0.12, "stubs": 0.04, "licences": 0.05}
    for name, parts in whole_of.items():
        for part, other in (("test", "train"), ("test", "dev"), ("dev", "train")):
            assert verbatim(parts[part], parts[other]) <= tables.get(name, 0.02), name
        for other in {"python", "headers", "docs", "operators", "unicode", "tests"} - {name}:
            assert verbatim(parts["test"], whole_of[other]["train"]) <= 0.01, (name, other)


def test_near_repeats_are_dropped_and_different_words_are_kept():
    licence = (
        b"permission is hereby granted free of charge to any person obtaining a copy of this "
        b"software and to use it"
    )
    other = b"the cat sat on the mat and looked at the moon for a long while before it went home"
    newer = b"Copyright 2020 B\n\n" + licence.replace(b" to ", b"\nto  ", 1)
    found = [b"Copyright 2001 A\n\n" + licence, newer, other]
    assert text.drop_near_repeats(found) == [found[0], b"Copyright 2020 B", other]
    assert text.drop_near_repeats(found, wanted=10) == found[:1]


def test_three_parts_share_no_document_and_do_not_move_with_names_or_order():
    found = [(f"{i}", f"document {i} of words {i * 7919} ".encode() * 20) for i in range(60)]
    split = text.split_in_three("x", found)
    dealt = {part: set(content.split(b"\0")) for part, content in parts_of(split).items()}
    assert sum(map(len, dealt.values())) == len(set.union(*dealt.values())) == 60
    assert len(dealt["test"]) in (6, 7) and len(dealt["dev"]) in (3, 4)
    renamed = [("new " + name, content) for name, content in reversed(found)]
    assert text.split_in_three("x", renamed).digest == split.digest
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
    monkeypatch.setitem(sys.modules, "torchgen", None)
    assert "generated records stand in" in text.load_provenance("operators").note
    with pytest.raises(ValueError, match="no text domain 'poems'; there are python, headers"):
        text.load_provenance("poems")
    with pytest.raises(ValueError, match="no generated text 'poems'"):
        list(text.generated("poems"))


def test_packages_are_not_part_of_the_standard_library(monkeypatch, tmp_path):
    """Where they lie inside its folder, numpy (a novel domain) would be learnt as python."""
    kept = ["json/decoder.py", "os.py"]
    for name in (*kept, "site-packages/numpy/a.py", "dist-packages/numpy/b.py", "test/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    monkeypatch.setattr(text, "STDLIB", tmp_path)
    assert sorted(name for name, _ in text.PROVENANCE["python"]()) == kept


OF_A_BUILD = {
    "python": ("_sysconfigdata", "sitecustomize"),
    "numpy": ("__config__",),
    "headers": ("tensorpipe", "caffe2", "cuda"),
    "cmake": ("Caffe2Config.cmake", "Caffe2Targets.cmake", "Targets-release.cmake"),
}


def test_domains_read_what_the_pins_bring_and_no_file_of_a_build(monkeypatch, tmp_path):
    """Else a corpus, its hash and all losses changed with `pip install`, or with torch's CUDA."""
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "RECORD").write_text("other-1.0.dist-info/LICENSE,,\n")
    (folder / "LICENSE").write_text("you may do other things")
    monkeypatch.syspath_prepend(tmp_path)
    found = {name.split("/")[0] for name, _ in text.PROVENANCE["licences"]()}
    assert found == {"torch", "numpy", "tqdm", "LICENSE.txt"}
    for domain, words in OF_A_BUILD.items():
        names = [f"/{name}" for name, _ in text.PROVENANCE[domain]()]
        assert len(names) > 20
        for word in words:
            assert not [name for name in names if f"/{word}" in name or name.endswith(word)], domain


def test_generated_text_is_true_and_the_same_everywhere(provenance):
    left, right = whole(provenance["sums"].test).split(b"\n")[3].decode().split(" = ")
    assert eval(left) == int(right)
    made = [next(text.generated(kind))[1] for kind in text.GENERATED]
    digests = [hashlib.sha256(content).hexdigest()[:8] for content in made]
    assert digests == ["66d159da", "adced52c", "de09ee21", "ef862b63"]


# --- domains on disk ------------------------------------------------------------------------------


def write_domain(folder, ending=".txt", **parts):
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in parts.items():
        (folder / (part + ending)).write_bytes(content)
    return folder


def test_a_domain_on_disk_in_three_formats(tmp_path):
    parts = {"train": b"to train on " * 9, "valid": b"to develop", "test": b"to test"}
    plain = text.load_split(write_domain(tmp_path / "plain", **parts))
    assert list(parts_of(plain).values()) == list(parts.values()) and plain.name == "plain"
    lines = b'{"text": "one"}\n{"text": "tw\\u00f6", "meta": 1}\n'
    folder = write_domain(tmp_path / "lines", ".jsonl", **dict.fromkeys(parts, lines))
    assert whole(text.load_split(folder).train) == b"one\0tw\xc3\xb6"
    ids = torch.tensor([1, 300, 65_000]).to(torch.uint16).numpy().astype("<u2").tobytes()
    folder = write_domain(tmp_path / "ids", ".bin", **dict.fromkeys(parts, ids))
    (folder / "meta.json").write_text('{"vocab_size": 65001, "eot": 0}')
    loaded = text.load_split(folder)
    assert loaded.vocab_size == 65_001
    windows = text.sample_windows(loaded.train, 1, 3, torch.Generator())
    assert windows.tolist() == [[1, 300, 65_000]]
    loaded.train[0] = 7  # a mapped file is never written to
    assert text.load_split(folder).digest == loaded.digest


EVEN = dict.fromkeys(("train.bin", "valid.bin", "test.bin"), b"even")
TEXTS = {"train.txt": b"some text", "valid.txt": b"some text", "test.txt": b"some text"}
JSONL = dict.fromkeys(("train.jsonl", "valid.jsonl", "test.jsonl"), b'{"text": "fine"}\n')
DEEP = b"[" * 100_000
WRONG_DOMAINS = [  # files, what is said
    ({"train.txt": b"x" * 9, "test.txt": b"x" * 9}, "there is no valid.txt"),
    (TEXTS | {"train.jsonl": b'{"text": "x"}\n'}, "train.txt and train.jsonl; keep one"),
    (TEXTS | {"test.txt": b""}, "test.txt: is empty"),
    (JSONL | {"train.jsonl": b'{"text": "fine"}\n{"text": 3}\n'}, "train.jsonl, line 2"),
    (JSONL | {"train.jsonl": b'{"text": "fine"}\n' + DEEP}, "train.jsonl, line 2"),
    (JSONL | {"train.jsonl": b'{"text": ""}\n'}, "train.jsonl: holds no text"),
    (EVEN | {"train.bin": b"odd"}, "odd number of bytes"),
    (EVEN, 'meta.json: is missing; it must hold {"vocab_size": n}'),
    (EVEN | {"meta.json": b'{"vocab_size": 30309}'}, "token id 30309, but vocab_size is 30309"),
    ({"train.bin": b"even", "valid.bin": b"even", "test.txt": b"text"}, "cannot be mixed"),
]
for size in (b"1e999", b"NaN", b"1000000", b"-1", b"[]", b"3e4", b"true", b'"30000"', DEEP):
    WRONG_DOMAINS.append((EVEN | {"meta.json": b'{"vocab_size": ' + size + b"}"}, "meta.json"))


@pytest.mark.parametrize("files, message", WRONG_DOMAINS)
def test_mistakes_in_a_domain_on_disk_are_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        text.load_split(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder; --prepare makes one"):
        text.load_split(tmp_path / "none")


# --- domains that prepare makes -------------------------------------------------------------------


PILE = ("ArXiv", "Github", "Pile-CC", "Wikipedia (en)")


def pile_lines(num=1600, names=PILE):
    lines = []
    for i in range(num):
        meta = {"pile_set_name": names[i % len(names)]}
        line = {"text": f"{meta['pile_set_name']} document {i} {i * i}", "meta": meta}
        lines.append(json.dumps(line) + "\n")
    return lines


def test_prepare_deals_the_pile_out_by_label(tmp_path):
    source, root = tmp_path / "val.jsonl", tmp_path / "btm"
    lines = pile_lines()
    others = ['{"text": "other", "meta": {"pile_set_name": "Books3"}}\n', '{"text": "no label"}\n']
    source.write_text("".join(lines + lines[:50] + others))
    sizes, labels = text.prepare(source, root)
    assert labels["ArXiv"] == 413 and labels["Books3"] == labels[""] == 1
    assert list(sizes) == ["arxiv", "github", "web", "wikipedia"]
    assert all(set(parts) == set(text.PARTS) for parts in sizes.values())
    split = text.load_split(root / "arxiv")
    dealt = [sorted(content.strip(b"\0").split(b"\0")) for content in parts_of(split).values()]
    together = sum(dealt, [])
    assert len(together) == len(set(together)) == 400  # equal documents are kept once
    assert all(document.startswith(b"ArXiv document") for document in together)
    # which part a document goes to depends on its contents alone
    source.write_text("".join(reversed(lines)))
    text.prepare(source, tmp_path / "again")
    again = parts_of(text.load_split(tmp_path / "again" / "arxiv")).values()
    assert [sorted(content.strip(b"\0").split(b"\0")) for content in again] == dealt
    # What cannot be finished leaves what was there.
    source.write_text("".join(pile_lines(100, ("ArXiv 2", "Books3"))))
    told = r"no domain can be filled; found: ArXiv 2 \(50\), Books3 \(50\)"
    with pytest.raises(ValueError, match=told):
        text.prepare(source, root)
    source.write_text("".join(lines[:1000]) + "{")
    with pytest.raises(ValueError, match="val.jsonl, line 1001"):
        text.prepare(source, root)
    assert text.load_split(root / "arxiv").digest == split.digest
    assert not list(root.rglob(".*"))


def test_prepare_makes_a_domain_of_anything(tmp_path):
    notes, book = tmp_path / "notes", tmp_path / "book"
    (notes / ".git").mkdir(parents=True)
    book.mkdir()
    for i in range(40):
        thoughts = [f"note {i}, thought {j * i}, word {j + 1000 * i}" for j in range(60)]
        (notes / f"{i}.txt").write_text("\n\n".join(thoughts))
    (notes / "photo.jpg").write_bytes(b"\0\1\2" * 100)
    (notes / ".git" / "config").write_text("secret " * 100)
    for i in range(120):  # many documents, one of which is most of the text
        count = 4000 if i == 7 else 40
        leaves = [f"leaf {i} {i * j} {j * j + i} of the tree {j}" for j in range(count)]
        (book / f"{i}.txt").write_text("\n\n".join(leaves))
    for folder in (notes, book):
        sizes = text.prepare(folder, tmp_path / "btm", folder.name)[0][folder.name]
        assert sizes["train"] > 5 * sizes["test"] > sizes["dev"] > 0
    split = text.load_split(tmp_path / "btm" / "notes")
    assert b"\1\2" not in whole(split.train) and b"secret" not in whole(split.train)
    assert b"thought" in whole(split.test)
    with pytest.raises(ValueError, match="a domain cannot be called '../x'"):
        text.prepare(notes, tmp_path / "btm", "../x")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        text.prepare(tmp_path / "none", tmp_path / "btm", "x")


def test_a_packed_file_is_named_with_its_tool_and_does_not_spoil_a_folder(tmp_path, capsys):
    source = tmp_path / "pile"
    source.mkdir()
    (source / "val.jsonl").write_text("".join(pile_lines()))
    alone = text.prepare(source, tmp_path / "alone")[0]
    for ending, tool in text.UNPACK.items():
        packed = source / f"train.jsonl{ending}"
        packed.write_bytes(b"packed")
        with pytest.raises(ValueError, match=f"{ending} is packed; {tool} unpacks it"):
            text.prepare(packed, tmp_path / "btm")
    assert text.prepare(source, tmp_path / "btm")[0] == alone
    assert capsys.readouterr().err.count("passed over: ") == 4
