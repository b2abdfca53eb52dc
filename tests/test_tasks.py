"""data/tasks.py: the published formats are read whole, and what is not understood is refused, naming file and line."""

import json
import math

import pytest

from data import tasks
from data.tasks import Example, Problem

MATH = """Question,Numbers,Equation,Answer,Type
ann has number0 pens and number1 cups . how many things ?,3 4.0,+ number0 number1,7.0,Addition
"how many are left , of number0 , after number1 a day for number2 days ?",9 2 3,- number0 * number1 number2,3,Mixed
"""
CHOICES = [{"label": label, "text": text} for label, text in zip("ABCDE", ("tree", "sky", "sea", "car", "hat"))]
QUESTION = {"answerKey": "C", "id": "1", "question": {"stem": "Where do fish live?", "choices": CHOICES}}


@pytest.fixture
def write(tmp_path):
    def write(content, name="file.txt"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_sst2_with_and_without_glue_header(write):
    expected = [Example("a gorgeous film", 1), Example("no 'fun' \"at\" all", 0)]
    rows = "a gorgeous film \t1\nno 'fun' \"at\" all\t0\n"
    assert tasks.read_sst2(write(rows)) == expected
    assert tasks.read_sst2(write("sentence\tlabel\n" + rows)) == expected
    assert tasks.read_sst2(write(b"\xef\xbb\xbfsentence\tlabel\r\n" + rows.replace("\n", "\r\n").encode())) == expected
    assert tasks.read_sst2(write(rows + "\n")) == expected  # an empty last line is no example


@pytest.mark.parametrize(
    "content, expected",
    [
        ("good\t1\nbad\t2\n", "line 2: label '2' is not one of 0 .. 1"),
        ("good\t1\nbad\n", "line 2: 1 tab-separated columns, not 2"),
        ("good\t1\nbad\t0\textra\n", "line 2: 3 tab-separated"),
        ("good\t1\n\nbad\t0\n", "line 2: empty"),
        ("good\t1\n \t0\n", "line 2: the sentence is empty"),
        ("index\tsentence\n0\tgood\n", "line 1: GLUE's test file hides the labels"),
        ("good\t1\nsentence\tlabel\n", "line 2: label 'label'"),
        (b"good\t1\nb\xe9d\t0\n", "line 2: not UTF-8"),
        ("", "is empty"),
        ("sentence\tlabel\n", "no examples"),
    ],
)
def test_sst2_refuses(write, content, expected):
    path = write(content)
    with pytest.raises(ValueError, match=expected) as caught:
        tasks.read_sst2(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_csqa(write):
    path = write(json.dumps(QUESTION) + "\n" + json.dumps({**QUESTION, "answerKey": "E"}) + "\n")
    first, second = tasks.read_csqa(path)
    assert first == Example("Where do fish live?", 2, choices=("tree", "sky", "sea", "car", "hat"))
    assert second.label == 4


@pytest.mark.parametrize(
    "item, expected",
    [
        ("not json", "line 2: needs"),
        ([1], "line 2: needs"),
        ({"question": {"stem": "?"}}, "line 2: needs"),
        ({**QUESTION, "answerKey": "F"}, "line 2: has no answerKey"),
        ({"question": QUESTION["question"]}, "line 2: has no answerKey"),
        ({**QUESTION, "question": {"stem": "?", "choices": CHOICES[:4]}}, "five choices"),
        ({**QUESTION, "question": {"stem": "?", "choices": CHOICES[::-1]}}, "five choices"),
        ({**QUESTION, "question": {"stem": 5, "choices": CHOICES}}, "five choices"),
    ],
)
def test_csqa_refuses(write, item, expected):
    path = write(json.dumps(QUESTION) + "\n" + (item if isinstance(item, str) else json.dumps(item)) + "\n")
    with pytest.raises(ValueError, match=expected):
        tasks.read_csqa(path)


def test_math(write):
    problems = tasks.read_math(write(MATH))
    assert problems[0] == Problem(
        "ann has number0 pens and number1 cups . how many things ?", (3.0, 4.0), "+ number0 number1", 7.0
    )
    assert problems[1].question.startswith("how many are left , of number0")
    assert [tasks.is_solved(problem.equation, problem) for problem in problems] == [True, True]
    assert not tasks.is_solved("- number0 number1", problems[0])
    assert tasks.is_solved("+ number1 number0", problems[0])  # another equation, the same answer
    assert not tasks.is_solved("+ number0 number2", problems[0])  # a number that is not there


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (",Answer", ",Result", "line 1: the header lacks Answer"),
        ("7.0,Addition", "seven,Addition", "line 2: Numbers or Answer is not numeric"),
        ("9 2 3", "9 two 3", "line 3: Numbers or Answer"),
        ("9 2 3", "9 2", "line 3: equation .* cannot apply 'number2' with 2 numbers"),
        ("+ number0 number1", "number0 number1", "line 2: .* 2 values are left"),
        ("+ number0 number1", "+ number0", "line 2: .* cannot apply '\\+'"),
        ("+ number0 number1", "__import__", "line 2: .* cannot apply '__import__'"),
        (",Addition", "", "line 2: not 5 columns"),
        (",Mixed", ",Mixed,more", "line 3: not 5 columns"),
        ("7.0", "nan", "line 2: .* not finite"),
        ('days ?"', 'days ?"x', "line 3: "),
        ('days ?"', "days ?", "line 3: unexpected end"),
    ],
)
def test_math_refuses(write, old, new, expected):
    assert old in MATH
    with pytest.raises(ValueError, match=expected):
        tasks.read_math(write(MATH.replace(old, new, 1)))


def test_equations():
    assert tasks.execute("- number0 * number1 2.5", (10.0, 2.0)) == 5
    assert tasks.execute("/ - number1 number0 2", (1.0, 7.0)) == 3
    assert math.isnan(tasks.execute("/ number0 0", (1.0,)))
    assert not tasks.is_solved("/ number0 0", Problem("?", (1.0,), "number0", 1.0))


def test_byte_rows_keep_the_end_and_pad_on_the_left():
    assert tasks.byte_rows(["ab", "abcdef", "é"], 4).tolist() == [
        [10, 10, 97, 98],
        [99, 100, 101, 102],
        [10, 10, 195, 169],
    ]


def test_files_that_are_there_are_used_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.download, "fetch", lambda name, root: pytest.fail(f"downloads {name}"))
    for fold, count in ((0, 1), (3, 2)):
        folder = tmp_path / "svamp" / "cv_mawps" / f"fold{fold}"
        folder.mkdir(parents=True)
        (folder / "train.csv").write_text(MATH)
        (folder / "dev.csv").write_text("".join(MATH.splitlines(keepends=True)[: 1 + count]))
        train, dev = tasks.load_task("mawps", tmp_path, fold=fold)
        assert (len(train), len(dev)) == (2, count)
    with pytest.raises(ValueError, match="task is 'mnli', fold 0; allowed: sst2, csqa"):
        tasks.load_task("mnli", tmp_path)
    with pytest.raises(ValueError, match="fold 5"):
        tasks.load_task("mawps", tmp_path, fold=5)


def test_missing_files_are_asked_of_the_download_table(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tasks.download, "fetch", lambda name, root: asked.append((name, root)))
    for name in tasks.TASKS:
        with pytest.raises(FileNotFoundError):
            tasks.load_task(name, tmp_path)
    assert [name for name, _ in asked] == ["sst2", "csqa", "svamp", "svamp", "svamp"]
    for name, (_, dataset, *files) in tasks.TASKS.items():  # the table has what the readers ask for
        offered = [file.save_as for file in tasks.download.DATASETS[dataset].files]
        offered += [member for file in tasks.download.DATASETS[dataset].files for member in file.members]
        assert all(file.format(fold=fold) in offered for file in files for fold in range(5)), name
