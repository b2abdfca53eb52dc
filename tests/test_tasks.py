"""data/tasks.py: published formats are read whole, the rest is refused, naming file and line."""

import json
import math

import pytest

from data import tasks
from data.tasks import Example, Problem, Question

MATH = """Question,Numbers,Equation,Answer,Type
ann has number0 pens and number1 cups . how many things ?,3 4.0,+ number0 number1,7.0,Addition
"how many are left , of number0 , after number1 a day for number2 days ?",9 2 3,\
- number0 * number1 number2,3,Mixed
"""
WORDS = ("tree", "sky", "sea", "car", "hat")
CHOICES = [{"label": label, "text": text} for label, text in zip("ABCDE", WORDS)]
STEM = {"stem": "Where do fish live?", "choices": CHOICES}
QUESTION = {"answerKey": "C", "id": "1", "question": STEM}


@pytest.fixture
def write(tmp_path):
    def write(content, name="file.txt"):
        (tmp_path / name).write_bytes(content.encode())
        return tmp_path / name

    return write


def test_sst2_with_and_without_glue_header(write):
    expected = [Example("a gorgeous film", 1), Example("no 'fun' \"at\" all", 0)]
    rows = "a gorgeous film \t1\nno 'fun' \"at\" all\t0\n"
    windows = "\ufeffsentence\tlabel\r\n" + rows.replace("\n", "\r\n")
    for content in (rows, "sentence\tlabel\n" + rows, windows, rows + "\n"):
        assert tasks.read_sst2(write(content)) == expected


def test_math(write):
    problems = tasks.read_math(write(MATH))
    question = "ann has number0 pens and number1 cups . how many things ?"
    assert problems[0] == Problem(question, (3.0, 4.0), "+ number0 number1", 7.0)
    assert problems[1].question.startswith("how many are left , of number0")
    assert [tasks.is_solved(problem.equation, problem) for problem in problems] == [True, True]
    assert not tasks.is_solved("- number0 number1", problems[0])
    assert tasks.is_solved("+ number1 number0", problems[0])  # another equation, the same answer
    assert not tasks.is_solved("+ number0 number2", problems[0])  # a number that is not there


def test_equations():
    assert tasks.execute("- number0 * number1 2.5", (10.0, 2.0)) == 5
    assert tasks.execute("/ - number1 number0 2", (1.0, 7.0)) == 3
    assert math.isnan(tasks.execute("/ number0 0", (1.0,)))
    assert not tasks.is_solved("/ number0 0", Problem("?", (1.0,), "number0", 1.0))


def test_byte_rows_keep_the_end_and_pad_on_the_left():
    rows = [[10, 10, 97, 98], [99, 100, 101, 102], [10, 10, 195, 169]]
    assert tasks.byte_rows(["ab", "abcdef", "é"], 4).tolist() == rows


def test_files_that_are_there_are_used_and_nothing_is_downloaded(tmp_path, monkeypatch):
    downloads = lambda name, root: pytest.fail(f"downloads {name}")
    monkeypatch.setattr(tasks.download, "fetch", downloads)
    for fold, count in ((0, 1), (3, 2)):
        folder = tmp_path / "svamp" / "cv_mawps" / f"fold{fold}"
        folder.mkdir(parents=True)
        (folder / "train.csv").write_text(MATH)
        (folder / "dev.csv").write_text("".join(MATH.splitlines(keepends=True)[: 1 + count]))
        train, dev = tasks.load_task("mawps", tmp_path, fold=fold)
        assert (len(train), len(dev)) == (2, count)


MRPC = """Quality\t#1 ID\t#2 ID\t#1 String\t#2 String
1\t7\t8\tHe said "no" .\tHe refused .
0\t9\t10\tOne .\tTwo .
"""
WIKIQA = """QuestionID\tQuestion\tDocumentID\tDocumentTitle\tSentenceID\tSentence\tLabel
Q1\thow are glacier caves formed?\tD1\tCave\tD1-0\tIce melts .\t1
Q1\thow ?\tD1\tCave\tD1-1\tNo .\t0
"""
COPA = {"premise": "I fell.", "choice1": "It was wet.", "choice2": "It was dry."}
COPA |= {"question": "cause", "label": 0, "idx": 0}
GAP = {"qID": "a-1", "sentence": "Ann thanked Eve because _ helped."}
GAP |= {"option1": "Ann", "option2": "Eve", "answer": "2"}
ANSWERS = [{"text": "a fox", "idx": 0, "label": 1}, {"text": "a dog", "idx": 1, "label": 0}]
PASSAGE = {"text": "A fox ran.", "questions": [{"question": "Who ran?", "answers": ANSWERS}]}
PASSAGE = {"idx": 0, "passage": PASSAGE}


def lines(*items):
    return "".join(json.dumps(item) + "\n" for item in items)


def test_published_formats_of_examples(write):
    ids = write("9\t10\n", "mrpc_dev_ids.tsv")
    corpus = write("\ufeff" + MRPC, "msr_paraphrase_train.txt")
    assert tasks.read_mrpc(corpus) == [Example('He said "no" .', 1, "He refused .")]
    assert tasks.read_mrpc(ids) == [Example("One .", 0, "Two .")]
    first = Example("how are glacier caves formed?", 1, "Ice melts .")
    assert tasks.read_wikiqa(write(WIKIQA)) == [first, Example("how ?", 0, "No .")]
    fish = Example("Where do fish live?", 2, choices=WORDS)
    questions = lines(QUESTION, {**QUESTION, "answerKey": "E"})
    assert tasks.read_csqa(write(questions)) == [fish, fish._replace(label=4)]
    fell = Example("I fell.", 0, "cause", ("It was wet.", "It was dry."))
    assert tasks.read_copa(write(lines(COPA))) == [fell]
    thanked = Example(GAP["sentence"], 1, choices=("Ann", "Eve"))
    assert tasks.read_winogrande(write(lines(GAP))) == [thanked]
    fox = Example("A fox ran.", 1, "Who ran? a fox")
    dog = Example("A fox ran.", 0, "Who ran? a dog")
    assert tasks.read_multirc(write(lines(PASSAGE))) == [fox, dog]
    assert [e.question for e in tasks.read_multirc(write(lines(PASSAGE, PASSAGE)))] == [0, 0, 1, 1]
    assert tasks.read_arc(write(lines(ARC))) == [Example("why ?", 1, choices=("so", "not"))]
    ends = Example("Which ending follows?", 3, choices=("a", "b", "c", "d"), context="He")
    assert tasks.read_hellaswag(write(lines(ENDINGS))) == [ends]


def test_labels_in_a_file_of_their_own(write):
    siqa, piqa = write(lines(SIQA, SIQA), "siqa.jsonl"), write(lines(PIQA), "piqa.jsonl")
    write("3\n1\n", "siqa-labels.lst")
    write("1\n", "piqa-labels.lst")
    first = Example("Why?", 2, choices=("a", "b", "c"), context="Ann ran.")
    assert tasks.read_siqa(siqa) == [first, first._replace(label=0)]
    assert tasks.read_piqa(piqa) == [Example("open", 1, choices=("push", "pull"))]
    write("3\n", "siqa-labels.lst")
    with pytest.raises(ValueError, match="has 2 lines.*has 1"):
        tasks.read_siqa(siqa)


FOX = {"context": "A fox ran. It was red.", "qas": [
    {"id": "1", "question": "Who ran?",
     "answers": [{"answer_start": 0, "text": "A fox"}, {"text": "fox"}]},
    {"id": "2", "question": "Which colour?", "answers": [{"answer_start": 18, "text": "red"}]},
]}  # fmt: skip
PAGES = [{"title": "Fox", "paragraphs": [FOX]}, {"title": "Empty", "paragraphs": []}]
SQUAD = {"version": "1.1", "data": PAGES}
HOTPOTQA = {"_id": "5a", "type": "bridge", "question": "Which colour was what ran?"}
HOTPOTQA["answer"] = "red"
HOTPOTQA["supporting_facts"] = [["Fox", 0], ["Colour", 1], ["Fox", 2], ["Colour", 9]]
HOTPOTQA["context"] = [["Dog", ["It slept."]], ["Fox", ["A fox ran.", " Sat.", " It was old."]]]
HOTPOTQA["context"] += [["Colour", ["x", " Red."]]]


def test_questions_with_answers_in_words(write):
    who = Question("Who ran?", FOX["context"], ("A fox", "fox"))
    which = Question("Which colour?", FOX["context"], ("red",))
    assert tasks.read_squad(write(json.dumps(SQUAD))) == [who, which]
    # the supporting sentences; the tenth of two is passed over
    shown = Question(HOTPOTQA["question"], "Fox: A fox ran. It was old. Colour: Red.", ("red",))
    assert tasks.read_hotpotqa(write(json.dumps([HOTPOTQA]))) == [shown]


WHY = {"stem": "why ?", "choices": [{"text": "so", "label": "1"}, {"text": "not", "label": "2"}]}
ARC = {"question": WHY, "answerKey": "2"}
ENDINGS = {"ctx": "He", "endings": ["a", "b", "c", "d"], "label": 3}
SIQA = {"context": "Ann ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c"}
PIQA = {"goal": "open", "sol1": "push", "sol2": "pull"}
REVERSED = {**STEM, "choices": CHOICES[::-1]}
REFUSED = [  # one case of a kind
    (tasks.read_sst2, "good\t1\nbad\t2\n", "line 2: label '2' is not one of 0, 1"),
    (tasks.read_csqa, lines({**QUESTION, "answerKey": "F"}), "answerKey 'F' is not one of A, B"),
    (tasks.read_csqa, lines({**QUESTION, "question": REVERSED}), "needs five choices"),
    (tasks.read_math, MATH.replace("9 2 3", "9 2"), "line 3: equation .* cannot apply 'number2'"),
    (tasks.read_math, MATH.replace("+ number0", "__import__"), "cannot apply '__import__'"),
    (tasks.read_copa, lines({**COPA, "label": 1.0}), "label 1.0 is not one of 0, 1"),
]


@pytest.mark.parametrize("read, content, expected", REFUSED)
def test_what_is_not_understood_is_refused_by_file_and_place(write, read, content, expected):
    path = write(content)
    with pytest.raises(ValueError, match=f"{path}.*{expected}"):
        read(path)


MATCHES = [  # answer, references, F1, exact match
    ("The Broncos!", ["Denver Broncos", "Broncos"], 1, 1),  # without case, article, punctuation
    ("the big  old-dog", ["a big dog", "olddog"], 2 / 3, 0),  # a hyphen is dropped: big olddog
    ("dog dog", ["dog"], 2 / 3, 0),  # every word counts once
    ("theatre", ["the atre"], 0, 0),  # only whole articles go
    ("dog", ["dog", "cat", "big cat"], 1, 1),  # the best of them, wherever it stands
    ("The", ["a"], 0, 1),  # nothing is left of either: equal, and no word in common
]


@pytest.mark.parametrize("answer, references, f1, exact", MATCHES)
def test_exact_match_and_f1_of_squad(answer, references, f1, exact):
    assert tasks.best_match(answer, references) == (pytest.approx(f1), exact)


def test_a_yes_shares_nothing_with_longer_answers_in_hotpotqa():
    for pair in (("yes", "yes it is"), ("it is not no", "no"), ("no answer", "noanswer")):
        assert tasks.best_match(*pair[:1], pair[1:], yes_no=True) == (0, 0)
    assert tasks.best_match("yes", ["yes it is"])[0] == 0.5
    assert tasks.best_match("Yes.", ["yes"], yes_no=True) == (1, 1)
    assert tasks.best_match("yes it is", ["yes it was"], yes_no=True)[0] == pytest.approx(2 / 3)


def test_scores_by_hand():
    close, said = pytest.approx, ["a fox", "yes sir"]
    questions = [Question("?", "c", ("red fox", "fox")), Question("?", "c", ("yes",))]
    assert tasks.scores("squad", questions, said) == {"f1": close(5 / 6), "exact_match": 0.5}
    assert tasks.scores("hotpotqa", questions, said) == {"f1": 0.5, "exact_match": 0.5}
    pairs = [Example("a", 1), Example("b", 0), Example("c", 1)]
    assert tasks.scores("mrpc", pairs, [1, None, 0]) == {"accuracy": close(1 / 3)}
    # MultiRC: three questions with 2, 2 and 1 answers. Said to be right 0, 1, 3, 4; right are 1, 3.
    labels, numbers = [0, 1, 0, 1, 0], [0, 0, 1, 1, 2]
    answers = [Example("p", label, question=number) for label, number in zip(labels, numbers)]
    found = tasks.scores("multirc", answers, [1, 1, 0, 1, 1])
    expected = {"f1": close(2 * 2 / (4 + 2)), "exact_match": close(1 / 3), "accuracy": 0.6}
    assert found == expected
    assert tasks.scores("multirc", answers, [None, 0, 0, 0, 0])["f1"] == 0
    perfect = {"f1": 1.0, "exact_match": 1.0, "accuracy": 1.0}
    assert tasks.scores("multirc", [answers[0]], [0]) == perfect


def test_prompts_show_all_parts_of_an_example():
    example = Example("first part", 1, "second part", ("left choice", "right choice"))
    for name, prompt in tasks.PROMPTS.items():
        if not prompt.words:
            asked = prompt.write(Question("who?", "a context", ("x",)))
            assert asked == f"{name} question: who? context: a context"
            continue
        written = prompt.write(example)
        assert written.startswith(name) and "first part" in written
        assert name in ("sst2", "winogrande") or "second part" in written
        if name in ("copa", "winogrande"):
            assert "left choice" in written and "right choice" in written
