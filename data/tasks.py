"""Tasks to fine-tune on: sentence classification, multiple choice, math word problems. Files in, plain tuples out.

    read_sst2    sentiment of a sentence         TSV: sentence, label; with GLUE's header line or without any
    read_csqa    CommonsenseQA, five choices     one JSON object a line
    read_math    ASDiv-A, MAWPS, SVAMP           CSV: Question, Numbers, Equation (prefix notation), Answer
    read_mrpc    do two sentences say the same   TSV of the Microsoft corpus, split by GLUE's list of ids
    read_copa, read_multirc, read_winogrande     one JSON object a line, as SuperGLUE and AllenAI publish them
    read_arc, read_hellaswag                     the same; read_arc also reads OpenBookQA
    read_siqa, read_piqa                         the same, labels in NAME-labels.lst beside NAME.jsonl
    read_wikiqa  does a sentence answer          TSV with a header that names Question, Sentence, Label
    read_squad, read_hotpotqa                    one JSON file, as published: answers of any length

    Example("a gorgeous film", 1)        Example("Where do fish live?", 2, choices=("tree", "sky", "sea", ...))
    Question("Who ran?", context="A fox ran.", answers=("a fox", "fox"))
    Problem("ann has number0 pens and number1 cups . how many things ?", (3.0, 4.0), "+ number0 number1", 7.0)

Readers open the file they are given, read all of it, and refuse what they do not understand with one line that names
the file and the line: a task that is silently shorter is another task. They never download; `task_files` does, on
request, through data/download.py. `scores` computes each task's metrics as its published evaluation script does.
"""

import csv
import itertools
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from data import download


class Example(NamedTuple):
    """One example of a classification or multiple-choice task."""

    text: str
    label: int  # class, or index of the right choice
    pair: str = ""  # the second sentence of a task on two
    choices: tuple[str, ...] = ()  # of a multiple-choice task
    context: str = ""  # what the question is about
    question: int = 0  # of MultiRC: examples with the same number are answers to one question


class Question(NamedTuple):
    """A question to be answered in words, out of a context."""

    text: str
    context: str
    answers: tuple[str, ...]  # each of them right; a model learns the first


class Problem(NamedTuple):
    """A math word problem whose numbers are written number0, number1, ... in question and equation."""

    question: str
    numbers: tuple[float, ...]
    equation: str  # prefix notation: operators + - * /, operands numberN or a constant
    answer: float


OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan,
}


def refuse(path: str | Path, line: int, what: str) -> NoReturn:
    raise ValueError(f"{path}, line {line}: {what}")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, a byte-order mark aside.

    Raises ValueError for bytes that are not UTF-8, an empty line within, or no line at all.
    """
    number, empty = 0, 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                refuse(path, number, "not UTF-8")
            if empty:
                refuse(path, empty, "empty")
            if line.strip():
                yield number, line
            else:
                empty = number
    if number == 0 or (number == 1 and empty):
        raise ValueError(f"{path} is empty")


def read_tsv(path: str | Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """(line number, stripped fields) of a tab-separated file without quoting, as GLUE writes them."""
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != columns:
            refuse(path, number, f"{len(fields)} tab-separated columns, not {columns}")
        yield number, fields


def read_label(path: str | Path, line: int, text: str, num_classes: int) -> int:
    if text not in map(str, range(num_classes)):
        refuse(path, line, f"label {text[:40]!r} is not one of 0 .. {num_classes - 1}")
    return int(text)


def read_sst2(path: str | Path) -> list[Example]:
    """SST-2, label 1 = positive: GLUE's train.tsv and dev.tsv, or the same two columns without a header.

    Raises FileNotFoundError, or ValueError naming file and line.
    """
    examples = []
    for number, (text, label) in read_tsv(path, columns=2):
        if number == 1 and (text, label) == ("sentence", "label"):
            continue
        if number == 1 and (text, label) == ("index", "sentence"):
            refuse(path, 1, "GLUE's test file hides the labels; take dev.tsv")
        if not text:
            refuse(path, number, "the sentence is empty")
        examples.append(Example(text, read_label(path, number, label, 2)))
    return nonempty(path, examples)


def read_csqa(path: str | Path) -> list[Example]:
    """CommonsenseQA: train_rand_split.jsonl, dev_rand_split.jsonl. Raises like read_sst2."""
    examples = []
    for number, line in read_lines(path):
        try:
            item = json.loads(line)
            question, choices = item["question"]["stem"], item["question"]["choices"]
            labels, texts = [choice["label"] for choice in choices], [choice["text"] for choice in choices]
        except (ValueError, LookupError, TypeError):
            refuse(path, number, 'needs {"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"}')
        if labels != list("ABCDE") or not all(isinstance(text, str) and text.strip() for text in [question, *texts]):
            refuse(path, number, "needs a question and five choices labelled A to E, all with text")
        if item.get("answerKey") not in labels:
            refuse(path, number, "has no answerKey from A to E (the test file hides it; take the dev file)")
        label = labels.index(item["answerKey"])
        examples.append(Example(question.strip(), label, choices=tuple(text.strip() for text in texts)))
    return nonempty(path, examples)


def read_mrpc(path: str | Path) -> list[Example]:
    """MRPC, label 1 = paraphrase: the part of msr_paraphrase_train.txt that GLUE trains on (3,668 of 4,076 pairs).

    path is that file, or GLUE's mrpc_dev_ids.tsv beside it (two ids a line): then the pairs that it names, the 408 on
    which GLUE and the papers that use it report. Raises like read_sst2.
    """
    path = Path(path)
    corpus, ids_file = (path.with_name(name) for name in ("msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"))
    examples, unseen, wanted = [], {tuple(ids) for _, ids in read_tsv(ids_file, columns=2)}, path == ids_file
    for number, (label, *ids, first, second) in read_tsv(corpus, columns=5):
        if number == 1:
            if label != "Quality":
                refuse(corpus, 1, "needs the header Quality, #1 ID, #2 ID, #1 String, #2 String")
            continue
        if not first or not second:
            refuse(corpus, number, "a sentence is empty")
        example = Example(first, read_label(corpus, number, label, 2), pair=second)
        examples += [example] if (tuple(ids) in unseen) == wanted else []
    return nonempty(path, examples)


def read_wikiqa(path: str | Path) -> list[Example]:
    """WikiQA, label 1 = the sentence answers the question. Raises like read_sst2."""
    examples, columns = [], None
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if columns is None:
            columns = fields
            if missing := {"Question", "Sentence", "Label"} - set(columns):
                refuse(path, 1, f"the header lacks {', '.join(sorted(missing))}")
            continue
        if len(fields) != len(columns):
            refuse(path, number, f"{len(fields)} tab-separated columns, not {len(columns)}")
        row = dict(zip(columns, fields))
        if not row["Question"] or not row["Sentence"]:
            refuse(path, number, "the question or the sentence is empty")
        examples.append(Example(row["Question"], read_label(path, number, row["Label"], 2), pair=row["Sentence"]))
    return nonempty(path, examples)


def read_objects(path: str | Path, read: Callable[[dict], Iterable[Example]], needed: str) -> list[Example]:
    """The examples of a file with one JSON object a line; read(object) may raise LookupError, TypeError, ValueError."""
    examples = []
    for number, line in read_lines(path):
        try:
            found = list(read(json.loads(line)))
            texts = [text for e in found for text in (e.text, e.context or "-", *e.choices)]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError("an empty text")
        except (ValueError, LookupError, TypeError, AttributeError):
            refuse(path, number, f"needs {needed}")
        examples += found
    return nonempty(path, examples)


def read_copa(path: str | Path) -> list[Example]:
    """COPA: which of two sentences is the cause (or effect) of another; pair says which. Raises like read_sst2."""

    def read(item: dict) -> Iterator[Example]:
        question, label = item["question"], (0, 1).index(item["label"])
        pair = ("cause", "effect")[("cause", "effect").index(question)]
        yield Example(item["premise"], label, pair=pair, choices=(item["choice1"], item["choice2"]))

    return read_objects(path, read, '{"premise", "choice1", "choice2", "question": cause or effect, "label": 0 or 1}')


def read_winogrande(path: str | Path) -> list[Example]:
    """WinoGrande: which of two names fills the gap "_". Raises like read_sst2."""

    def read(item: dict) -> Iterator[Example]:
        if "_" not in item["sentence"]:
            raise ValueError("no gap")
        yield Example(item["sentence"], ("1", "2").index(item["answer"]), choices=(item["option1"], item["option2"]))

    return read_objects(path, read, '{"sentence" with a gap _, "option1", "option2", "answer": "1" or "2"}')


def read_arc(path: str | Path) -> list[Example]:
    """ARC and OpenBookQA: three to five choices, labelled A.. or 1... Raises like read_sst2."""

    def read(item: dict) -> Iterator[Example]:
        question, choices = item["question"]["stem"], item["question"]["choices"]
        labels = [choice["label"] for choice in choices]
        if len(set(labels)) != len(labels) or not 2 <= len(labels) <= 5:
            raise ValueError("labels")
        yield Example(question, labels.index(item["answerKey"]), choices=tuple(choice["text"] for choice in choices))

    return read_objects(path, read, '{"question": {"stem", "choices": [{"text", "label"}]}, "answerKey": a label}')


def read_hellaswag(path: str | Path) -> list[Example]:
    """HellaSwag: which of four endings follows. Raises like read_sst2."""

    def read(item: dict) -> Iterator[Example]:
        if len(item["endings"]) != 4:
            raise ValueError("not four")
        label, endings = range(4).index(item["label"]), tuple(item["endings"])
        yield Example("Which ending follows?", label, choices=endings, context=item["ctx"])

    return read_objects(path, read, '{"ctx", "endings": four, "label": 0 to 3} (the test file hides the label)')


def read_labelled(path: str | Path, make: Callable[[dict, int], Example], labels: tuple[str, ...], needed: str) -> list:
    """The examples of NAME.jsonl, the right answers of which stand in NAME-labels.lst, line by line."""
    path = Path(path)
    answers = path.with_name(f"{path.stem}-labels.lst")
    found = list(read_lines(answers))
    for number, label in found:
        if label.strip() not in labels:
            refuse(answers, number, f"label {label[:40]!r} is not one of {', '.join(labels)}")
    indices = (labels.index(label.strip()) for _, label in found)
    examples = read_objects(path, lambda item: [make(item, next(indices, -1))], needed)
    if len(examples) != len(found):
        raise ValueError(f"{path} has {len(examples)} lines, {answers} has {len(found)}")
    return examples


def read_siqa(path: str | Path) -> list[Example]:
    """SocialIQA: a context, a question, three answers, labels 1 to 3. Raises like read_sst2."""

    def make(item: dict, label: int) -> Example:
        answers = (item["answerA"], item["answerB"], item["answerC"])
        return Example(item["question"], label, choices=answers, context=item["context"])

    return read_labelled(path, make, ("1", "2", "3"), '{"context", "question", "answerA", "answerB", "answerC"}')


def read_piqa(path: str | Path) -> list[Example]:
    """PIQA: which of two solutions reaches the goal, labels 0 and 1. Raises like read_sst2."""
    make = lambda item, label: Example(item["goal"], label, choices=(item["sol1"], item["sol2"]))
    return read_labelled(path, make, ("0", "1"), '{"goal", "sol1", "sol2"}')


def read_multirc(path: str | Path) -> list[Example]:
    """MultiRC, label 1 = the answer is right: one example an answer, text the passage, pair question and answer."""
    number = itertools.count()

    def read(item: dict) -> Iterator[Example]:
        for question in item["passage"]["questions"]:
            which = next(number)
            for answer in question["answers"]:
                pair = f"{question['question'].strip()} {answer['text'].strip()}"
                label = (0, 1).index(answer["label"])
                yield Example(item["passage"]["text"], label, pair=pair, question=which)

    needed = '{"passage": {"text", "questions": [{"question", "answers": [{"text", "label": 0 or 1}]}]}}'
    return read_objects(path, read, needed)


def read_questions(path: str | Path, read: Callable[[object], Iterator[Question]], needed: str) -> list[Question]:
    """The questions of one JSON document. read may raise LookupError, TypeError, ValueError, AttributeError."""
    questions = []
    try:
        for question in read(json.loads(Path(path).read_bytes())):
            texts = (question.text, question.context, *question.answers)
            if not question.answers or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError("an empty text, or no answer")
            questions.append(question)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, after {len(questions)} questions: needs {needed}") from error
    return nonempty(path, questions)


def read_squad(path: str | Path) -> list[Question]:
    """SQuAD 1.1: train-v1.1.json (one answer each), dev-v1.1.json (those of several people). Raises like read_sst2."""

    def read(document: dict) -> Iterator[Question]:
        for paragraph in (paragraph for article in document["data"] for paragraph in article["paragraphs"]):
            for item in paragraph["qas"]:
                answers = tuple(answer["text"] for answer in item["answers"])
                yield Question(item["question"], paragraph["context"], answers)

    form = '{"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}]}]}]}]}'
    return read_questions(path, read, f"{form}; in version 2.0 some questions have no answer, take 1.1")


def read_hotpotqa(path: str | Path) -> list[Question]:
    """HotpotQA: hotpot_train_v1.1.json, hotpot_dev_distractor_v1.json. Raises like read_sst2.

    The context is the supporting sentences alone, each paragraph's after its title, as in M-SMoE's released code: ten
    paragraphs do not fit. A few of the published facts name a sentence that its paragraph lacks; they are passed over.
    """

    def read(document: list) -> Iterator[Question]:
        for item in document:
            paragraphs, facts = dict(item["context"]), {}
            for title, number in item["supporting_facts"]:
                facts.setdefault(title, []).extend(paragraphs[title][number : number + 1])
            context = " ".join(f"{title}: {' '.join(map(str.strip, found))}" for title, found in facts.items())
            yield Question(item["question"], context, (item["answer"],))

    form = '[{"question", "answer", "supporting_facts": [[title, sentence]], "context": [[title, [sentences]]]}]'
    return read_questions(path, read, f"{form} (the test file hides the answers)")


def read_math(path: str | Path) -> list[Problem]:
    """ASDiv-A, MAWPS or SVAMP in the CSV of github.com/arkilpatel/SVAMP. Raises like read_sst2.

    A few equations of MAWPS do not give the stated answer; they are kept as published.
    """
    needed, problems = ("Question", "Numbers", "Equation", "Answer"), []
    lines = [f"{line}\n" for _, line in read_lines(path)]
    reader = csv.DictReader(lines, strict=True)
    try:
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            refuse(path, 1, f"the header lacks {', '.join(missing)}")
        for row in reader:
            number = reader.line_num
            if None in row or None in row.values():
                refuse(path, number, f"not {len(reader.fieldnames)} columns, as the header has")
            try:
                numbers = tuple(map(float, row["Numbers"].split()))
                answer = float(row["Answer"])
            except ValueError:
                refuse(path, number, "Numbers or Answer is not numeric")
            try:
                execute(row["Equation"], numbers)
            except ValueError as error:
                refuse(path, number, str(error))
            if not row["Question"].strip() or not all(map(math.isfinite, (*numbers, answer))):
                refuse(path, number, "the question is empty, or a number is not finite")
            problems.append(Problem(row["Question"].strip(), numbers, " ".join(row["Equation"].split()), answer))
    except csv.Error as error:
        refuse(path, min(reader.line_num + 1, len(lines)), str(error))
    return nonempty(path, problems)


def nonempty(path: str | Path, examples: list) -> list:
    if not examples:
        raise ValueError(f"{path} holds a header and no examples")
    return examples


def execute(equation: str, numbers: tuple[float, ...]) -> float:
    """The value of a prefix equation, "- number1 number0"; NaN when it divides by zero.

    Raises ValueError for an unknown operand, a number that is not given, or operands that do not add up.
    """
    stack: list[float] = []
    for token in reversed(equation.split()):
        if token in OPERATORS and len(stack) >= 2:
            stack.append(OPERATORS[token](stack.pop(), stack.pop()))
        elif token.startswith("number") and token[6:].isdecimal() and int(token[6:]) < len(numbers):
            stack.append(numbers[int(token[6:])])
        elif token.replace(".", "", 1).isdecimal():
            stack.append(float(token))
        else:
            raise ValueError(f"equation {equation[:80]!r}: cannot apply {token!r} with {len(numbers)} numbers")
    if len(stack) != 1:
        raise ValueError(f"equation {equation[:80]!r}: {len(stack)} values are left, not one")
    return stack[0]


def is_solved(equation: str, problem: Problem) -> bool:
    """Whether a predicted equation gives the answer: the problem-solving rate counts these, not equal equations."""
    try:
        return abs(execute(equation, problem.numbers) - problem.answer) <= 1e-3
    except ValueError:  # it names a number that this problem does not have
        return False


def byte_rows(texts: Iterable[str], length: int) -> Tensor:
    """Texts as bytes, [num, length] int64: the end of each, padded with newlines on the left."""
    rows = [text.encode()[-length:].rjust(length, b"\n") for text in texts]
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), length).long()


def pose(train: list, dev: list, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A task as classification of byte rows, one row a choice.

    -> training rows [n, choices, length] and classes [n]; development rows [m, choices, length] and, for every class,
    whether it would be right [m, classes] bool. Choices 1: the classes are the labels, or for math problems the
    different equations of the training set, right when executing one gives the answer. A problem that needs an
    equation the training set lacks cannot be solved. Choices > 1: the class is the choice.
    """
    texts = lambda example: (
        [example.question]
        if isinstance(example, Problem)
        else [f"{example.text} {c}" for c in example.choices or ("",)]
    )
    rows = [
        byte_rows([t for x in part for t in texts(x)], length).unflatten(0, (len(part), -1)) for part in (train, dev)
    ]
    if isinstance(train[0], Problem):
        equations = sorted({problem.equation for problem in train})
        classes = [equations.index(problem.equation) for problem in train]
        right = [[is_solved(equation, problem) for equation in equations] for problem in dev]
    else:
        classes, num_classes = [x.label for x in train], max(x.label for x in train) + 1
        right = [[x.label == c for c in range(max(num_classes, len(x.choices)))] for x in dev]
    return rows[0], torch.tensor(classes), rows[1], torch.tensor(right)


TASKS = {  # name: (reader, data set of data/download.py, training file, development file)
    "sst2": (read_sst2, "sst2", "SST-2/train.tsv", "SST-2/dev.tsv"),
    "csqa": (read_csqa, "csqa", "train_rand_split.jsonl", "dev_rand_split.jsonl"),
    "asdiv-a": (read_math, "svamp", "cv_asdiv-a/fold{fold}/train.csv", "cv_asdiv-a/fold{fold}/dev.csv"),
    "mawps": (read_math, "svamp", "cv_mawps/fold{fold}/train.csv", "cv_mawps/fold{fold}/dev.csv"),
    "svamp": (read_math, "svamp", "mawps-asdiv-a_svamp/train.csv", "mawps-asdiv-a_svamp/dev.csv"),
    "mrpc": (read_mrpc, "mrpc", "msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"),
    "copa": (read_copa, "copa", "COPA/train.jsonl", "COPA/val.jsonl"),
    "multirc": (read_multirc, "multirc", "MultiRC/train.jsonl", "MultiRC/val.jsonl"),
    "winogrande": (read_winogrande, "winogrande", "winogrande_1.1/train_l.jsonl", "winogrande_1.1/dev.jsonl"),
    "wikiqa": (read_wikiqa, "wikiqa", "WikiQACorpus/WikiQA-train.tsv", "WikiQACorpus/WikiQA-dev.tsv"),
    "squad": (read_squad, "squad", "train-v1.1.json", "dev-v1.1.json"),
    "hotpotqa": (read_hotpotqa, "hotpotqa", "hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"),
    # The evaluation sets of AdaMoE's Table 1: development questions, for OpenBookQA the test questions.
    "arc-c": (read_arc, "arc", *(f"ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-{p}.jsonl" for p in ("Train", "Dev"))),
    "arc-e": (read_arc, "arc", *(f"ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-{p}.jsonl" for p in ("Train", "Dev"))),
    "obqa": (read_arc, "obqa", *(f"OpenBookQA-V1-Sep2018/Data/Main/{p}.jsonl" for p in ("train", "test"))),
    "siqa": (read_siqa, "siqa", "socialiqa-train-dev/train.jsonl", "socialiqa-train-dev/dev.jsonl"),
    "piqa": (read_piqa, "piqa", "physicaliqa-train-dev/train.jsonl", "physicaliqa-train-dev/dev.jsonl"),
    "hellaswag": (read_hellaswag, "hellaswag", "hellaswag_train.jsonl", "hellaswag_val.jsonl"),
}


def task_files(name: str, data_dir: str | Path, fold: int = 0) -> tuple[Path, Path]:
    """Training and development file of a task below data_dir; what is not there is downloaded, with a progress bar.

    fold  0-4, of the tasks that are cross-validated. Raises ValueError for an unknown name or fold, DownloadError.
    """
    if name not in TASKS or fold not in range(5):
        raise ValueError(f"task is {name!r}, fold {fold}; allowed: {', '.join(TASKS)}, folds 0 to 4")
    _, dataset, *names = TASKS[name]
    paths = [Path(data_dir).expanduser() / dataset / file.format(fold=fold) for file in names]
    if not all(path.is_file() for path in paths):
        download.fetch(dataset, data_dir)
    return paths[0], paths[1]


def load_task(name: str, data_dir: str | Path, fold: int = 0) -> tuple[list, list]:
    """Training and development examples of a task: see task_files."""
    train, dev = task_files(name, data_dir, fold)
    read = TASKS[name][0]
    return read(train), read(dev)


class Prompt(NamedTuple):
    """A task as text to text: what the model reads, and what it answers."""

    template: Callable[[Example | Question], str]
    words: tuple[str, ...] = ()  # the one-word answer of each class; (): a Question's own answer
    metrics: tuple[str, ...] = ("accuracy",)  # shares; the first is the one that papers quote


SPANS = ("f1", "exact_match")
PROMPTS = {  # what is short comes first: a prompt that is too long loses its end
    "sst2": Prompt(lambda e: f"sst2 sentence: {e.text}", ("negative", "positive")),
    "mrpc": Prompt(lambda e: f"mrpc sentence1: {e.text} sentence2: {e.pair}", ("no", "yes")),
    "copa": Prompt(
        lambda e: f"copa premise: {e.text} question: {e.pair} 1: {e.choices[0]} 2: {e.choices[1]}", ("1", "2")
    ),
    "multirc": Prompt(
        lambda e: f"multirc question and answer: {e.pair} paragraph: {e.text}",
        ("no", "yes"),
        ("f1", "exact_match", "accuracy"),
    ),
    "winogrande": Prompt(lambda e: f"winogrande sentence: {e.text} 1: {e.choices[0]} 2: {e.choices[1]}", ("1", "2")),
    "wikiqa": Prompt(lambda e: f"wikiqa question: {e.text} sentence: {e.pair}", ("no", "yes")),
    "squad": Prompt(lambda q: f"squad question: {q.text} context: {q.context}", metrics=SPANS),
    "hotpotqa": Prompt(lambda q: f"hotpotqa question: {q.text} context: {q.context}", metrics=SPANS),
}


def load_prompts(name: str, data_dir: str | Path) -> tuple[list, list]:
    """Training and development examples of a task in PROMPTS. Raises like load_task."""
    if name not in PROMPTS:
        raise ValueError(f"task is {name!r}; as text to text there are {', '.join(PROMPTS)}")
    return load_task(name, data_dir)


def scores(name: str, examples: Sequence[Example | Question], answers: Sequence) -> dict[str, float]:
    """The metrics of a task in PROMPTS, shares of 1. answers: a class for each example, or for each question a text.

    An answer that is no class (None) is wrong; MultiRC's F1 counts it as a "no".
    """
    if not PROMPTS[name].words:
        found = [best_match(answer, q.answers, name == "hotpotqa") for answer, q in zip(answers, examples)]
        return dict(zip(SPANS, (sum(values) / len(found) for values in zip(*found))))
    right = [answer == e.label for answer, e in zip(answers, examples)]
    if name != "multirc":
        return {"accuracy": sum(right) / len(right)}
    agreed = sum(answer == 1 == e.label for answer, e in zip(answers, examples))
    claimed = sum(answer == 1 for answer in answers) + sum(e.label for e in examples)
    questions = {e.question: True for e in examples}
    for e, is_right in zip(examples, right):
        questions[e.question] &= is_right
    return {
        "f1": 2 * agreed / claimed if claimed else 1.0,  # F1a: over all answers of all questions
        "exact_match": sum(questions.values()) / len(questions),  # questions with every answer judged right
        "accuracy": sum(right) / len(right),
    }


def normal_form(answer: str) -> list[str]:
    """The words that SQuAD compares: small letters, without punctuation and articles."""
    letters = "".join(char for char in answer.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def best_match(answer: str, references: Sequence[str], yes_no: bool = False) -> tuple[float, float]:
    """(F1 of the words, exact match) with the nearest reference, each its own maximum.

    yes_no: as HotpotQA's script has it, a "yes", "no" or "noanswer" shares nothing with any other answer.
    """
    given, best = normal_form(answer), (0.0, 0.0)
    for reference in map(normal_form, references):
        shared = (Counter(given) & Counter(reference)).total()
        if yes_no and given != reference and {"yes", "no", "noanswer"} & {" ".join(given), " ".join(reference)}:
            shared = 0
        f1 = 2 * shared / (len(given) + len(reference)) if shared else 0.0
        best = (max(best[0], f1), max(best[1], float(given == reference)))
    return best


LETTERS = "ABCDE"
LETTER_TASKS = ("arc-c", "arc-e", "obqa", "siqa", "winogrande", "piqa", "hellaswag", "csqa")


def letter_prompt(example: Example) -> str:
    """A multiple-choice question as text that ends where the letter of the right choice belongs (AdaMoE, Figure 1).

    Letter and choice are one line each; the answer is " A", " B", ... after "Answer:".
    """
    lines = [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, example.choices)]
    context = [example.context.strip()] if example.context else []
    return "\n".join([*context, f"Question: {example.text.strip()}", *lines, "Answer:"])


def word_ids(tokenizer, words: Sequence[str]) -> list[int]:
    """The token of each word. Raises ValueError for a word that is not one token, or two words with the same."""
    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for word, ids in zip(words, tokens):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"the answer {word!r} is not one token of this tokenizer: {ids}")
    if len({ids[0] for ids in tokens}) < len(words):
        raise ValueError(f"two of the answers {', '.join(words)} are the same token")
    return [ids[0] for ids in tokens]


def epoch_rows(count: int, step: int, size: int, seed: int) -> Tensor:
    """[size] int64: batch number `step` of the endless sequence of epochs over `count` rows, each in an own order."""
    first, last = step * size, (step + 1) * size
    epochs = range(first // count, (last - 1) // count + 1)
    shuffled = lambda epoch: torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.cat([torch.randperm(count, generator=shuffled(epoch)) for epoch in epochs])
    return order[first - epochs[0] * count : last - epochs[0] * count]


class PromptBatches:
    """A task of PROMPTS for a text-to-text model and its tokenizer (of transformers).

    A batch is {"input_ids", "attention_mask": [batch, tokens], "labels": [batch, answer]}, padded on the right, prompts
    cut at max_tokens; labels are the answer's tokens (one, or up to MAX_ANSWER), the end of text, -100 for padding.
    """

    MAX_ANSWER = 63  # tokens; with the end of text the 64 that one expert of Switch serves in a sequence

    def __init__(self, name: str, data_dir: str | Path, tokenizer, max_tokens: int):
        self.train, self.dev = load_prompts(name, data_dir)
        self.name, self.tokenizer, self.max_tokens = name, tokenizer, max_tokens
        self.words = word_ids(tokenizer, PROMPTS[name].words)

    def encode(self, examples: Sequence[Example | Question]) -> dict[str, Tensor]:
        options = {"truncation": True, "max_length": self.max_tokens, "padding": True, "return_tensors": "pt"}
        batch = self.tokenizer([PROMPTS[self.name].template(example) for example in examples], **options)
        if self.words:
            answers = [[self.words[example.label]] for example in examples]
        else:
            texts = [question.answers[0] for question in examples]
            answers = [ids[: self.MAX_ANSWER] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        rows = [torch.tensor([*ids, self.tokenizer.eos_token_id]) for ids in answers]
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    def read_answers(self, ids: Tensor) -> list[int | None] | list[str]:
        """From generated tokens [batch, time]: the class, None where it is no word of the task; or the text."""
        if self.words:
            return [self.words.index(first) if first in self.words else None for first in ids[:, 0].tolist()]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def train_batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """Batch number `step` of the endless sequence of epochs, each in an order of its own."""
        return self.encode([self.train[i] for i in epoch_rows(len(self.train), step, size, seed).tolist()])

    def sample(self, num: int, size: int, seed: int) -> list[dict[str, Tensor]]:
        """`num` random training examples (all, if there are fewer) in batches."""
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:num].tolist()
        return self._in_batches([self.train[i] for i in chosen], size)

    def dev_batches(self, num: int, size: int) -> list[dict[str, Tensor]]:
        """The development examples in batches; num 0: all."""
        return self._in_batches(self.dev[: num or None], size)

    def _in_batches(self, examples: list, size: int) -> list[dict[str, Tensor]]:
        return [self.encode(examples[i : i + size]) for i in range(0, len(examples), size)]
