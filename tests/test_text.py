"""Text corpora: split by document without leakage, the same on every call, honest about what is missing."""

import hashlib

import pytest
import torch

from data import text


def documents(*sizes):
    return [(f"{i}.txt", bytes([65 + i]) * size) for i, size in enumerate(sizes)]


def whole(tensor):
    return bytes(tensor.tolist())


def test_no_document_has_a_part_on_both_sides():
    corpus = text.split_documents("x", documents(*[50] * 20), 0.1)
    train, val = set(whole(corpus.train)) - {10}, set(whole(corpus.val)) - {10}
    assert not train & val and len(train | val) == 20 and corpus.num_documents == 20
    assert len(val) == 2  # a tenth of the bytes


@pytest.mark.parametrize("domain", ["python", "docs"])
def test_validation_is_not_a_copy_of_training(domain):
    """Help topics quote each other word for word: split by topic alone, two fifths of validation stood in training."""
    corpus = text.load_domain(domain)
    train, val = whole(corpus.train), whole(corpus.val)
    pieces = [val[i : i + 64] for i in range(0, len(val) - 64, 64)][:600]
    assert sum(piece in train for piece in pieces) < 0.01 * len(pieces)


def test_a_paragraph_that_repeats_is_kept_once():
    long, short = b"a paragraph of some length, quoted elsewhere", b"short"
    documents = [long + b"\n\n" + short, short + b"\n \n" + long.replace(b" ", b"  ") + b"\n\nnew words", long]
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
    assert whole(single.train).endswith(b"\n") and whole(single.train) + whole(single.val) == b"line one\n" * 100


@pytest.mark.parametrize("domain", list(text.DOMAINS))
def test_every_domain_is_found_here_and_is_the_same_twice(domain):
    corpus = text.load_domain(domain)
    assert len(corpus.train) > 1000 and len(corpus.val) > 100 and corpus.train.dtype == torch.uint8
    assert 0.01 < len(corpus.val) / (len(corpus.train) + len(corpus.val)) <= 0.11
    again = text.load_domain(domain)
    assert again.digest == corpus.digest
    raw = hashlib.sha256(whole(corpus.train[:50_000])).hexdigest()
    assert raw == hashlib.sha256(whole(again.train[:50_000])).hexdigest()


def test_without_pydoc_data_packages_stand_in_and_say_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    corpus = text.load_domain("docs")
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
    with pytest.raises(ValueError, match="no text domain 'poems'; there are python"):
        text.load_domain("poems")


def test_windows_predict_every_byte_once():
    data = torch.arange(21, dtype=torch.uint8)
    windows = text.all_windows(data, context=5)
    assert windows.tolist() == [list(range(i, i + 6)) for i in (0, 5, 10, 15)] and windows.dtype == torch.int64
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
