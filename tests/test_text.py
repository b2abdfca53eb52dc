"""Text corpora: split by document without leakage, the same on every call."""

import hashlib
import json

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
    single = text.split_documents("x", [("a", b"line one\n" * 100)], 0.1)
    assert whole(single.train).endswith(b"\n")
    assert whole(single.train) + whole(single.val) == b"line one\n" * 100


@pytest.mark.parametrize("domain, most", [("python", 0.1), ("docs", 0.02)])
def test_validation_does_not_stand_in_training_word_for_word(domain, most):
    """Help topics quote each other: split by topic alone, two fifths of validation did."""
    corpus = text.load_domain(domain)
    train, val = whole(corpus.train), whole(corpus.val)
    assert 0.01 < len(val) / (len(train) + len(val)) <= 0.11
    pieces = [val[i : i + 64] for i in range(0, len(val) - 64, 64)][:600]
    assert sum(piece in train for piece in pieces) < most * len(pieces)


def test_own_text_file_folder_and_mistakes(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    files = {"a.txt": b"hello\n", "sub/b.txt": b"world\n", "sub/.hidden/c.txt": b"hidden\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content * 100)
    (tmp_path / "image.bin").write_bytes(b"\0" * 1000)
    assert text.load_text(tmp_path).num_documents == 2
    assert len(text.load_text(tmp_path / "a.txt").train) == 540
    with pytest.raises(ValueError, match="image.bin is a binary file"):
        text.load_text(tmp_path / "image.bin")


def test_windows_predict_every_byte_once():
    data = torch.arange(21, dtype=torch.uint8)
    windows = text.all_windows(data, context=5)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [list(range(i, i + 6)) for i in (0, 5, 10, 15)]
    assert windows[:, 1:].flatten().tolist() == list(range(1, 21))
    assert torch.equal(text.spread_windows(data, 5, 2), windows[[0, 3]])
    assert torch.equal(text.spread_windows(data, 5, 9), windows)


def test_sampled_windows_are_consecutive_bytes_and_repeat_with_the_generator():
    data = torch.arange(50, dtype=torch.uint8)
    draw = lambda seed: text.sample_windows(data, 200, 7, torch.Generator().manual_seed(seed))
    windows = draw(0)
    assert torch.equal(windows, draw(0)) and not torch.equal(windows, draw(1))
    assert (windows.diff(dim=1) == 1).all() and windows.min() == 0 and windows.max() == 49


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
        assert split.train.dtype == torch.uint8 and split.vocab_size == 256
    assert len({split.digest for split in provenance.values()}) == len(provenance)
    assert text.load_provenance("numpy").digest == provenance["numpy"].digest


def test_no_part_of_a_domain_quotes_another_part(provenance):
    """Also across domains: an expert must not learn the text that a novel domain asks for."""
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


def test_three_parts_share_no_document_and_do_not_move_with_names_or_order():
    found = [(f"{i}", f"document {i} of words {i * 7919} ".encode() * 20) for i in range(60)]
    split = text.split_in_three("x", found)
    dealt = {part: set(content.split(b"\0")) for part, content in parts_of(split).items()}
    assert sum(map(len, dealt.values())) == len(set.union(*dealt.values())) == 60
    assert len(dealt["test"]) in (6, 7) and len(dealt["dev"]) in (3, 4)
    renamed = [("new " + name, content) for name, content in reversed(found)]
    assert text.split_in_three("x", renamed).digest == split.digest
    assert text.split_in_three("x", found[1:]).digest != split.digest


def test_packages_are_not_part_of_the_standard_library(monkeypatch, tmp_path):
    """Where they lie inside its folder, numpy (a novel domain) would be learnt as python."""
    kept = ["json/decoder.py", "os.py"]
    for name in (*kept, "site-packages/numpy/a.py", "dist-packages/numpy/b.py", "test/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    monkeypatch.setattr(text, "STDLIB", tmp_path)
    assert sorted(name for name, _ in text.PROVENANCE["python"]()) == kept


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
    of_a_build = {"python": "/_sysconfigdata", "headers": "/cuda", "cmake": "Caffe2Config"}
    for domain, word in of_a_build.items():
        names = [f"/{name}" for name, _ in text.PROVENANCE[domain]()]
        assert len(names) > 20 and not [name for name in names if word in name], domain


def test_generated_text_is_the_same_everywhere():
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
JSONL = dict.fromkeys(("train.jsonl", "valid.jsonl", "test.jsonl"), b'{"text": "fine"}\n')
WRONG_DOMAINS = [  # files, what is said
    ({"train.txt": b"x" * 9, "test.txt": b"x" * 9}, "there is no valid.txt"),
    (JSONL | {"train.jsonl": b'{"text": "fine"}\n{"text": 3}\n'}, "train.jsonl, line 2"),
    (EVEN | {"train.bin": b"odd"}, "odd number of bytes"),
    (EVEN, 'meta.json: is missing; it must hold {"vocab_size": n}'),
    (EVEN | {"meta.json": b'{"vocab_size": 30309}'}, "token id 30309, but vocab_size is 30309"),
    (EVEN | {"meta.json": b'{"vocab_size": 3e4}'}, "meta.json"),
    ({"train.bin": b"even", "valid.bin": b"even", "test.txt": b"text"}, "cannot be mixed"),
]


@pytest.mark.parametrize("files, message", WRONG_DOMAINS)
def test_mistakes_in_a_domain_on_disk_are_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        text.load_split(tmp_path)


def pile_lines():
    names = ("ArXiv", "Github", "Pile-CC", "Wikipedia (en)")
    lines = []
    for i in range(1600):
        meta = {"pile_set_name": names[i % 4]}
        line = {"text": f"{names[i % 4]} document {i} {i * i}", "meta": meta}
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
    split = text.load_split(root / "arxiv")
    dealt = [content.strip(b"\0").split(b"\0") for content in parts_of(split).values()]
    together = sum(dealt, [])
    assert len(together) == len(set(together)) == 400  # equal documents are kept once
    assert all(document.startswith(b"ArXiv document") for document in together)
    # What cannot be finished leaves what was there.
    source.write_text("".join(lines[:1000]) + "{")
    with pytest.raises(ValueError, match="val.jsonl, line 1001"):
        text.prepare(source, root)
    assert text.load_split(root / "arxiv").digest == split.digest and not list(root.rglob(".*"))


def test_prepare_makes_a_domain_of_a_folder(tmp_path):
    notes = tmp_path / "notes"
    (notes / ".git").mkdir(parents=True)
    for i in range(40):
        thoughts = [f"note {i}, thought {j * i}, word {j + 1000 * i}" for j in range(60)]
        (notes / f"{i}.txt").write_text("\n\n".join(thoughts))
    (notes / "photo.jpg").write_bytes(b"\0\1\2" * 100)
    (notes / ".git" / "config").write_text("secret " * 100)
    sizes = text.prepare(notes, tmp_path / "btm", "notes")[0]["notes"]
    assert sizes["train"] > 5 * sizes["test"] > sizes["dev"] > 0
    split = text.load_split(tmp_path / "btm" / "notes")
    assert b"\1\2" not in whole(split.train) and b"secret" not in whole(split.train)
