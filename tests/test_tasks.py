"""data/tasks.py: the published formats are read whole, and what is not understood is refused, naming file and line."""

import json
import math

import pytest

from data import tasks
from data.tasks import Example, Problem, Question

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
    assert [name for name, _ in asked] == [dataset for _, dataset, *_ in tasks.TASKS.values()]
    for name, (_, dataset, *files) in tasks.TASKS.items():  # the table has what the readers ask for
        offered = [file.save_as for file in tasks.download.DATASETS[dataset].files]
        offered += [member for file in tasks.download.DATASETS[dataset].files for member in file.members]
        assert all(file.format(fold=fold) in offered for file in files for fold in range(5)), name


MRPC = 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "no" .\tHe refused .\n0\t9\t10\tOne .\tTwo .\n'
WIKIQA = "QuestionID\tQuestion\tDocumentID\tDocumentTitle\tSentenceID\tSentence\tLabel\n"
WIKIQA += "Q1\thow are glacier caves formed?\tD1\tCave\tD1-0\tIce melts .\t1\nQ1\thow ?\tD1\tCave\tD1-1\tNo .\t0\n"
COPA = {
    "premise": "I fell.",
    "choice1": "It was wet.",
    "choice2": "It was dry.",
    "question": "cause",
    "label": 0,
    "idx": 0,
}
GAP = {"qID": "a-1", "sentence": "Ann thanked Eve because _ helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}
ANSWERS = [{"text": "a fox", "idx": 0, "label": 1}, {"text": "a dog", "idx": 1, "label": 0}]
PASSAGE = {"idx": 0, "passage": {"text": "A fox ran.", "questions": [{"question": "Who ran?", "answers": ANSWERS}]}}


def lines(*items):
    return "".join(json.dumps(item) + "\n" for item in items)


def test_two_sentences(write):
    ids = write("9\t10\n", "mrpc_dev_ids.tsv")
    corpus = write("\ufeff" + MRPC, "msr_paraphrase_train.txt")
    assert tasks.read_mrpc(corpus) == [Example('He said "no" .', 1, "He refused .")]
    assert tasks.read_mrpc(ids) == [Example("One .", 0, "Two .")]
    read = tasks.read_wikiqa(write(WIKIQA))
    assert read == [Example("how are glacier caves formed?", 1, "Ice melts ."), Example("how ?", 0, "No .")]


def test_objects(write):
    assert tasks.read_copa(write(lines(COPA))) == [Example("I fell.", 0, "cause", ("It was wet.", "It was dry."))]
    assert tasks.read_winogrande(write(lines(GAP))) == [Example(GAP["sentence"], 1, choices=("Ann", "Eve"))]
    read = tasks.read_multirc(write(lines(PASSAGE)))
    assert read == [Example("A fox ran.", 1, "Who ran? a fox"), Example("A fox ran.", 0, "Who ran? a dog")]
    assert [e.question for e in tasks.read_multirc(write(lines(PASSAGE, PASSAGE)))] == [0, 0, 1, 1]


FOX = {"context": "A fox ran. It was red.", "qas": [
    {"id": "1", "question": "Who ran?", "answers": [{"answer_start": 0, "text": "A fox"}, {"text": "fox"}]},
    {"id": "2", "question": "Which colour?", "answers": [{"answer_start": 18, "text": "red"}]},
]}  # fmt: skip
SQUAD = {"version": "1.1", "data": [{"title": "Fox", "paragraphs": [FOX]}, {"title": "Empty", "paragraphs": []}]}
HOTPOTQA = {
    "_id": "5a", "type": "bridge", "level": "hard", "question": "Which colour was what ran?", "answer": "red",
    "supporting_facts": [["Fox", 0], ["Colour", 1], ["Fox", 2], ["Colour", 9]],
    "context": [["Dog", ["It slept."]], ["Fox", ["A fox ran.", " Sat.", " It was old."]], ["Colour", ["x", " Red."]]],
}  # fmt: skip


def test_questions_with_answers_in_words(write):
    found = tasks.read_squad(write(json.dumps(SQUAD)))
    assert found == [
        Question("Who ran?", FOX["context"], ("A fox", "fox")),
        Question("Which colour?", FOX["context"], ("red",)),
    ]
    found = tasks.read_hotpotqa(
        write(json.dumps([HOTPOTQA]))
    )  # the supporting sentences; the tenth of two is passed over
    assert found == [Question(HOTPOTQA["question"], "Fox: A fox ran. It was old. Colour: Red.", ("red",))]


def changed(document, *path, to):
    """A copy with one value replaced."""
    document = json.loads(json.dumps(document))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(document)


QAS = ("data", 0, "paragraphs", 0, "qas", 1)


@pytest.mark.parametrize(
    "reader, content, expected",
    [
        (tasks.read_squad, "{", "after 0 questions: needs"),
        (tasks.read_squad, b"\xff{}", "after 0 questions: needs"),
        (tasks.read_squad, json.dumps([SQUAD]), "after 0 questions: needs"),
        (tasks.read_squad, changed(SQUAD, *QAS, "answers", to=[]), "after 1 questions: .* version 2.0"),
        (tasks.read_squad, changed(SQUAD, *QAS, "question", to=" "), "after 1 questions"),
        (tasks.read_squad, changed(SQUAD, *QAS, "answers", 0, "text", to=7), "after 1 questions"),
        (tasks.read_squad, json.dumps({"data": []}), "no examples"),
        (tasks.read_hotpotqa, json.dumps({"data": [HOTPOTQA]}), "after 0 questions: needs"),
        (tasks.read_hotpotqa, changed([HOTPOTQA], 0, "supporting_facts", 0, to=["Cat", 0]), "after 0 questions"),
        (tasks.read_hotpotqa, changed([HOTPOTQA, HOTPOTQA], 1, "supporting_facts", to=[]), "after 1 questions"),
        (tasks.read_hotpotqa, json.dumps([{k: v for k, v in HOTPOTQA.items() if k != "answer"}]), "hides the answers"),
    ],
)
def test_documents_that_are_not_understood_are_refused(write, reader, content, expected):
    path = write(content)
    with pytest.raises(ValueError, match=expected) as caught:
        reader(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer, references, f1, exact",
    [
        ("The Broncos!", ["Denver Broncos", "Broncos"], 1, 1),  # case, article and punctuation do not count
        ("the big  old-dog", ["a big dog", "olddog"], 2 / 3, 0),  # a hyphen is dropped, not a space: big olddog
        ("dog dog", ["dog"], 2 / 3, 0),  # every word counts once
        ("theatre", ["the atre"], 0, 0),  # only whole articles go
        ("big dog cat", ["dog", "cat big"], 0.8, 0),
        ("dog", ["dog", "cat", "big cat"], 1, 1),  # the best of them, wherever it stands
        ("cat", ["dog"], 0, 0),
        ("The", ["a"], 0, 1),  # nothing is left of either: equal, and no word in common
    ],
)
def test_exact_match_and_f1_of_squad(answer, references, f1, exact):
    assert tasks.best_match(answer, references) == (pytest.approx(f1), exact)


def test_a_yes_shares_nothing_with_longer_answers_in_hotpotqa():
    for pair in (("yes", "yes it is"), ("it is not no", "no"), ("no answer", "noanswer")):
        assert tasks.best_match(*pair[:1], pair[1:], yes_no=True) == (0, 0)
    assert tasks.best_match("yes", ["yes it is"])[0] == 0.5
    assert tasks.best_match("Yes.", ["yes"], yes_no=True) == (1, 1)
    assert tasks.best_match("yes it is", ["yes it was"], yes_no=True)[0] == pytest.approx(2 / 3)


def test_scores_by_hand():
    questions = [Question("?", "c", ("red fox", "fox")), Question("?", "c", ("yes",))]
    assert tasks.scores("squad", questions, ["a fox", "yes sir"]) == {"f1": pytest.approx(5 / 6), "exact_match": 0.5}
    assert tasks.scores("hotpotqa", questions, ["a fox", "yes sir"]) == {"f1": 0.5, "exact_match": 0.5}
    pairs = [Example("a", 1), Example("b", 0), Example("c", 1)]
    assert tasks.scores("mrpc", pairs, [1, None, 0]) == {"accuracy": pytest.approx(1 / 3)}
    # MultiRC: three questions with 2, 2 and 1 answers. Said to be right 0, 1, 3, 4; right are 1, 3.
    labels, numbers = [0, 1, 0, 1, 0], [0, 0, 1, 1, 2]
    answers = [Example("p", label, question=number) for label, number in zip(labels, numbers)]
    found = tasks.scores("multirc", answers, [1, 1, 0, 1, 1])
    assert found == {"f1": pytest.approx(2 * 2 / (4 + 2)), "exact_match": pytest.approx(1 / 3), "accuracy": 0.6}
    assert tasks.scores("multirc", answers, [None, 0, 0, 0, 0])["f1"] == 0
    assert tasks.scores("multirc", [answers[0]], [0]) == {"f1": 1.0, "exact_match": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("msr_paraphrase_train.txt", MRPC.split("\n", 1)[1], "line 1: needs the header Quality"),
        ("msr_paraphrase_train.txt", MRPC + "2\t1\t2\ta\tb\n", "line 4: label '2'"),
        ("msr_paraphrase_train.txt", MRPC + "1\t1\t2\ta\n", "line 4: 4 tab-separated columns, not 5"),
        ("msr_paraphrase_train.txt", MRPC + "1\t1\t2\ta\t\n", "line 4: a sentence is empty"),
        ("mrpc_dev_ids.tsv", "9 10\n", "line 1: 1 tab-separated columns, not 2"),
        ("mrpc_dev_ids.tsv", "9\t11\n", "no examples"),
    ],
)
def test_mrpc_refuses(write, name, content, expected):
    write(MRPC, "msr_paraphrase_train.txt"), write("9\t10\n", "mrpc_dev_ids.tsv")
    path = write(content, name)
    with pytest.raises(ValueError, match=expected) as caught:
        tasks.read_mrpc(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "reader, content, expected",
    [
        (tasks.read_wikiqa, WIKIQA.replace("Label", "Answer"), "line 1: the header lacks Label"),
        (tasks.read_wikiqa, WIKIQA + "Q1\tx\n", "line 4: 2 tab-separated columns, not 7"),
        (tasks.read_wikiqa, WIKIQA + "Q1\t\tD\tT\tS\tyes\t1\n", "line 4: the question or the sentence is empty"),
        (tasks.read_copa, lines(COPA, {**COPA, "label": 2}), "line 2: needs"),
        (tasks.read_copa, lines({**COPA, "question": "why"}), "line 1: needs"),
        (tasks.read_copa, lines({**COPA, "choice2": " "}), "line 1: needs"),
        (tasks.read_copa, "[]\n", "line 1: needs"),
        (tasks.read_winogrande, lines({**GAP, "sentence": "no gap"}), "line 1: needs"),
        (tasks.read_winogrande, lines({**GAP, "answer": ""}), "line 1: needs"),
        (tasks.read_multirc, lines({"passage": {"text": "x"}}), "line 1: needs"),
        (tasks.read_multirc, lines({"passage": {"text": "x", "questions": []}}), "no examples"),
    ],
)
def test_the_readers_refuse(write, reader, content, expected):
    path = write(content)
    with pytest.raises(ValueError, match=expected) as caught:
        reader(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_show_all_parts_of_an_example(tmp_path):
    example = Example("first part", 1, "second part", ("left choice", "right choice"))
    for name, prompt in tasks.PROMPTS.items():
        assert name in tasks.TASKS
        if not prompt.words:
            assert prompt.template(Question("who?", "a context", ("x",))) == f"{name} question: who? context: a context"
            continue
        text = prompt.template(example)
        parts = ["first part"] + ([] if name in ("sst2", "winogrande") else ["second part"])
        parts += ["left choice", "right choice"] if name in ("copa", "winogrande") else []
        assert all(part in text for part in parts) and text.startswith(name) and len(prompt.words) == 2
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / "msr_paraphrase_train.txt").write_text(MRPC)
    (tmp_path / "mrpc" / "mrpc_dev_ids.tsv").write_text("9\t10\n")
    train, dev = tasks.load_prompts("mrpc", tmp_path)
    assert (len(train), len(dev)) == (1, 1) and dev == [Example("One .", 0, "Two .")]
    with pytest.raises(ValueError, match="task is 'svamp'; as text to text there are sst2"):
        tasks.load_prompts("svamp", tmp_path)
