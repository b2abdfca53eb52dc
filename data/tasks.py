"""Tasks to fine-tune on: sentence classification, multiple choice, math problems. Files in, plain
tuples out.

    read_sst2        sentiment of a sentence; TSV: sentence, label
    read_csqa        CommonsenseQA, five choices; one JSON object a line
    read_math        ASDiv-A, MAWPS, SVAMP; CSV: Question, Numbers, Equation (prefix), Answer
    read_mrpc        do two sentences say the same; TSV, split by GLUE's list of ids
    read_wikiqa      does a sentence answer a question; TSV with a header
    read_copa, read_multirc, read_winogrande, read_hellaswag, read_arc (also OpenBookQA)
                     one JSON object a line, as SuperGLUE and AllenAI publish them
    read_siqa, read_piqa
                     the same, labels in NAME-labels.lst beside NAME.jsonl
    read_squad, read_hotpotqa
                     one JSON file, as published: answers of any length

    Example("a gorgeous film", 1)
    Example("Where do fish live?", 2, choices=("tree", "sky", "sea", ...))
    Question("Who ran?", context="A fox ran.", answers=("a fox", "fox"))
    Problem("ann has number0 pens and number1 cups .", (3.0, 4.0), "+ number0 number1", 7.0)

Readers open the file they are given, read all of it, and refuse what they do not understand in one
line that names the file and the line (ReadError, a ValueError): a task that is silently shorter is
another task. They never download; `task_files` does, on request, through data/download.py. `scores`
computes each task's metrics as its published evaluation script does.
"""

import functools
import itertools
import math
import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import download
from data.reading import Place, json_lines, lines, parse_json, read_bytes, reading, table


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
    """A math word problem whose numbers are written number0, number1, ... in question and
    equation.
    """

    question: str
    numbers: tuple[float, ...]
    equation: str  # prefix notation: operators + - * /, operands numberN or a constant
    answer: float


# --------------------------------------------------------------------------------------------------
# Readers: what a file of each format must hold
# --------------------------------------------------------------------------------------------------


def reader(read: Callable[[Place], Iterator]) -> Callable[[str | Path], list]:
    """read(at) yields the examples of the file at.path -> a function from a path to all of them, at
    least one.
    """

    @functools.wraps(read)
    def read_file(path: str | Path) -> list:
        with reading(path) as at:
            examples = list(read(at))
            at.need(len(examples) > 0, "holds no examples")
        return examples

    return read_file


@reader
def read_sst2(at: Place) -> Iterator[Example]:
    """SST-2, label 1 = positive.

    GLUE's train.tsv and dev.tsv, or the same two columns without a header.
    """
    for line in lines(at):
        text, label = _cells(at, line, 2)
        if at.line == 1 and (text, label) == ("sentence", "label"):
            continue
        if at.line == 1 and (text, label) == ("index", "sentence"):
            at.refuse("GLUE's test file hides the labels; take dev.tsv")
        yield Example(at.word(text, "the sentence"), at.one_of(label, ("0", "1"), "label"))


def _cells(at: Place, line: str, count: int) -> list[str]:
    cells = [cell.strip() for cell in line.split("\t")]
    at.need(len(cells) == count, f"{len(cells)} tab-separated columns, not {count}")
    return cells


@reader
def read_csqa(at: Place) -> Iterator[Example]:
    """CommonsenseQA: train_rand_split.jsonl, dev_rand_split.jsonl."""
    for item in json_lines(at):
        if isinstance(item, dict) and "answerKey" not in item:
            at.refuse("has no answerKey from A to E (the test file hides it; take the dev file)")
        text, labels, choices, key = _stem_and_choices(at, item)
        at.need(labels == list("ABCDE"), "needs five choices labelled A to E")
        right = at.one_of(key, labels, "answerKey")
        yield Example(text.strip(), right, choices=tuple(choice.strip() for choice in choices))


def _stem_and_choices(at: Place, item: object) -> tuple[str, list[str], list[str], str]:
    """The question, labels and texts of its choices, and the right label.

    Of CommonsenseQA, ARC, OpenBookQA.
    """
    key, question = at.take(item, "answerKey", "question", spare="id")
    stem, choices = at.take(question, "stem", "choices", spare="question_concept")
    pairs = [at.take(choice, "label text") for choice in at.items(choices, "choices")]
    labels = [label for label, _ in pairs]
    at.need(len(set(labels)) == len(labels), "a label stands at two choices")
    return stem, labels, [text for _, text in pairs], key


@reader
def read_arc(at: Place) -> Iterator[Example]:
    """ARC and OpenBookQA: two to five choices, labelled A.. or 1..."""
    for item in json_lines(at):
        text, labels, choices, key = _stem_and_choices(at, item)
        at.need(2 <= len(labels) <= 5, f"{len(labels)} choices; two to five are known")
        yield Example(text, at.one_of(key, labels, "answerKey"), choices=tuple(choices))


MRPC_COLUMNS = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def read_mrpc(path: str | Path) -> list[Example]:
    """MRPC, label 1 = paraphrase: what GLUE trains on of msr_paraphrase_train.txt (3,668 of 4,076
    pairs).

    The path is that file, or GLUE's mrpc_dev_ids.tsv beside it (two ids a line): then the pairs
    that it names, the 408 on which GLUE and the papers that use it report.
    """
    ids_path = Path(path).with_name("mrpc_dev_ids.tsv")
    with reading(ids_path) as at:
        dev_ids = {tuple(_cells(at, line, 2)) for line in lines(at)}
    found = set()
    train = []
    dev = []
    with reading(ids_path.with_name("msr_paraphrase_train.txt")) as at:
        for row in table(at, MRPC_COLUMNS, tabs=True):
            label, first_id, second_id, first, second = (cell.strip() for cell in row)
            number = at.one_of(label, ("0", "1"), "label")
            first = at.word(first, "a sentence")
            second = at.word(second, "a sentence")
            ids = (first_id, second_id)
            found.add(ids)
            part = dev if ids in dev_ids else train
            part.append(Example(first, number, pair=second))
        at.need(len(train) > 0, "holds no pairs to train on")
    with reading(ids_path) as at:
        missing = sorted(dev_ids - found)[:3]
        at.need(not missing, f"names pairs that msr_paraphrase_train.txt lacks: {missing}")
    return dev if Path(path).name == ids_path.name else train


@reader
def read_wikiqa(at: Place) -> Iterator[Example]:
    """WikiQA, label 1 = the sentence answers the question."""
    spare = ("QuestionID", "DocumentID", "DocumentTitle", "SentenceID")
    for row in table(at, ("Question", "Sentence", "Label"), spare, tabs=True):
        question, sentence, label = (cell.strip() for cell in row)
        right = at.one_of(label, ("0", "1"), "label")
        at.word(question, "the question")
        yield Example(question, right, pair=at.word(sentence, "the sentence"))


@reader
def read_copa(at: Place) -> Iterator[Example]:
    """COPA: which of two sentences is the cause (or effect) of another; pair says which."""
    for item in json_lines(at):
        names = "premise choice1 choice2 question"
        premise, first, second, question, label = at.take(item, names, "label", spare="idx")
        at.one_of(question, ("cause", "effect"), "question")
        right = at.one_of(label, (0, 1), "label")
        yield Example(premise, right, pair=question, choices=(first, second))


@reader
def read_winogrande(at: Place) -> Iterator[Example]:
    """WinoGrande: which of two names fills the gap "_"."""
    for item in json_lines(at):
        names = "sentence option1 option2 answer"
        sentence, first, second, answer = at.take(item, names, spare="qID")
        at.need("_" in sentence, "the sentence has no gap _")
        yield Example(sentence, at.one_of(answer, ("1", "2"), "answer"), choices=(first, second))


@reader
def read_hellaswag(at: Place) -> Iterator[Example]:
    """HellaSwag: which of four endings follows. The test file hides the label."""
    spare = "ind activity_label ctx_a ctx_b split split_type source_id"
    for item in json_lines(at):
        context, endings, label = at.take(item, "ctx", "endings label", spare)
        endings = at.words(endings, "endings")
        at.need(len(endings) == 4, f"needs four endings, not {len(endings)}")
        right = at.one_of(label, (0, 1, 2, 3), "label")
        yield Example("Which ending follows?", right, choices=tuple(endings), context=context)


def _labelled(at: Place, allowed: Sequence[str]) -> Iterator[tuple[object, int]]:
    """The objects of NAME.jsonl, each with its label, line by line, from NAME-labels.lst."""
    path = Path(at.path)
    answers = path.with_name(f"{path.stem}-labels.lst")
    with reading(answers) as labels_at:
        labels = [labels_at.one_of(line.strip(), allowed, "label") for line in lines(labels_at)]
    items = list(json_lines(at))
    at.line = 0
    at.need(len(items) == len(labels), f"has {len(items)} lines, {answers} has {len(labels)}")
    for item, label in zip(items, labels):
        at.line += 1
        yield item, label


@reader
def read_siqa(at: Place) -> Iterator[Example]:
    """SocialIQA: a context, a question, three answers, labels 1 to 3."""
    for item, label in _labelled(at, ("1", "2", "3")):
        context, question, *answers = at.take(item, "context question answerA answerB answerC")
        yield Example(question, label, choices=tuple(answers), context=context)


@reader
def read_piqa(at: Place) -> Iterator[Example]:
    """PIQA: which of two solutions reaches the goal, labels 0 and 1."""
    for item, label in _labelled(at, ("0", "1")):
        goal, first, second = at.take(item, "goal sol1 sol2", spare="id")
        yield Example(goal, label, choices=(first, second))


@reader
def read_multirc(at: Place) -> Iterator[Example]:
    """MultiRC, label 1 = the answer is right: one example an answer, text the passage, pair
    question and answer.
    """
    number = itertools.count()
    for item in json_lines(at):
        (passage,) = at.take(item, "", "passage", spare="idx version")
        text, questions = at.take(passage, "text", "questions")
        for entry in at.items(questions, "questions"):
            question, answers = at.take(entry, "question", "answers", spare="idx")
            which = next(number)
            for answer in at.items(answers, "answers"):
                words, label = at.take(answer, "text", "label", spare="idx")
                right = at.one_of(label, (0, 1), "label")
                pair = f"{question.strip()} {words.strip()}"
                yield Example(text, right, pair=pair, question=which)


@reader
def read_squad(at: Place) -> Iterator[Question]:
    """SQuAD 1.1: train-v1.1.json (one answer each), dev-v1.1.json (those of several people)."""
    number = 0
    (data,) = at.take(parse_json(read_bytes(at.path)), "", "data", spare="version")
    for article in at.items(data, "data"):
        (paragraphs,) = at.take(article, "", "paragraphs", spare="title")
        for paragraph in at.items(paragraphs, "paragraphs"):
            context, entries = at.take(paragraph, "context", "qas")
            for entry in at.items(entries, "qas"):
                number += 1
                at.spot = f"question {number}"
                question, answers = at.take(entry, "question", "answers", spare="id")
                texts = []
                for answer in at.items(answers, "answers"):
                    texts += at.take(answer, "text", spare="answer_start")
                at.need(len(texts) > 0, "has no answer, as some in version 2.0; take 1.1")
                yield Question(question, context, tuple(texts))


@reader
def read_hotpotqa(at: Place) -> Iterator[Question]:
    """HotpotQA: hotpot_train_v1.1.json, hotpot_dev_distractor_v1.json.

    The test file hides the answers.

    The context is the supporting sentences alone, each paragraph's after its title, as in M-SMoE's
    released code: ten paragraphs do not fit. A few of the published facts name a sentence that its
    paragraph lacks; they are passed over.
    """
    number = 0
    for item in at.items(parse_json(read_bytes(at.path)), "the file"):
        number += 1
        at.spot = f"question {number}"
        text, answer, facts, context = at.take(
            item, "question answer", "supporting_facts context", spare="_id type level"
        )
        paragraphs = {}
        for title, sentences in at.items(context, "context"):
            kept = paragraphs.setdefault(title, sentences)
            at.need(kept == sentences, f"two paragraphs are called {title!r}")
        supporting = {}
        for title, place in at.items(facts, "supporting_facts"):
            at.need(type(place) is int and place >= 0, f"sentence number {place!r} counts from 0")
            at.need(title in paragraphs, f"supporting_facts names {title!r}, which context lacks")
            sentences = at.items(paragraphs[title], "sentences")
            supporting.setdefault(title, []).extend(sentences[place : place + 1])
        told = []
        for title, sentences in supporting.items():
            told.append(f"{title}: {' '.join(map(str.strip, sentences))}")
        yield Question(text, at.word(" ".join(told), "supporting_facts"), (answer,))


MATH_COLUMNS = ("Question", "Numbers", "Equation", "Answer")
MATH_SPARE = ("group_nums", "Type", "Variation Type", "Body", "Ques", "Ques_Statement")


@reader
def read_math(at: Place) -> Iterator[Problem]:
    """ASDiv-A, MAWPS or SVAMP in the CSV of github.com/arkilpatel/SVAMP.

    A few equations of MAWPS do not give the stated answer; they are kept as published.
    """
    for question, numbers, equation, answer in table(at, MATH_COLUMNS, MATH_SPARE):
        at.word(question, "the question")
        values = tuple(at.number(text, "a number of Numbers") for text in numbers.split())
        try:
            execute(equation, values)
        except ValueError as error:
            at.refuse(str(error))
        result = at.number(answer, "Answer")
        yield Problem(question.strip(), values, " ".join(equation.split()), result)


# --------------------------------------------------------------------------------------------------
# Math problems as classification
# --------------------------------------------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def execute(equation: str, numbers: tuple[float, ...]) -> float:
    """The value of a prefix equation, "- number1 number0"; NaN when it divides by zero.

    Raises ValueError for an unknown operand, a number that is not given, or operands that do not
    add up.
    """
    stack: list[float] = []
    for token in reversed(equation.split()):
        if token == "/" and len(stack) >= 2:
            top, bottom = stack.pop(), stack.pop()
            stack.append(top / bottom if bottom else math.nan)
        elif token in OPERATORS and len(stack) >= 2:
            stack.append(OPERATORS[token](stack.pop(), stack.pop()))
        elif token.startswith("number") and token[6:].isdecimal() and int(token[6:]) < len(numbers):
            stack.append(numbers[int(token[6:])])
        elif token.replace(".", "", 1).isdecimal():
            stack.append(float(token))
        else:
            raise ValueError(
                f"equation {equation[:80]!r}: cannot apply {token!r} with {len(numbers)} numbers"
            )
    if len(stack) != 1:
        raise ValueError(f"equation {equation[:80]!r}: {len(stack)} values are left, not one")
    return stack[0]


def is_solved(equation: str, problem: Problem) -> bool:
    """Whether a predicted equation gives the answer: the problem-solving rate counts these, not
    equal equations.
    """
    try:
        return abs(execute(equation, problem.numbers) - problem.answer) <= 1e-3
    except ValueError:  # it names a number that this problem does not have
        return False


def byte_rows(texts: Iterable[str], length: int) -> Tensor:
    """Texts as bytes, [num, length] int64: the end of each, padded with newlines on the left."""
    rows = [text.encode()[-length:].rjust(length, b"\n") for text in texts]
    joined = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    return joined.view(len(rows), length).long()


def pose(train: list, dev: list, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A task as classification of byte rows, one row a choice.

    -> training rows [n, choices, length] and classes [n]; development rows [m, choices, length]
    and, for every class, whether it would be right [m, classes] bool. Choices 1: the classes are
    the labels, or for math problems the different equations of the training set, right when
    executing one gives the answer. A problem that needs an equation the training set lacks cannot
    be solved. Choices > 1: the class is the choice.
    """
    train_rows = _choice_rows(train, length)
    dev_rows = _choice_rows(dev, length)
    if isinstance(train[0], Problem):
        equations = sorted({problem.equation for problem in train})
        classes = [equations.index(problem.equation) for problem in train]
        right = [[is_solved(equation, problem) for equation in equations] for problem in dev]
    else:
        classes = [example.label for example in train]
        num_classes = max(max(classes) + 1, len(train[0].choices))
        right = [[example.label == label for label in range(num_classes)] for example in dev]
    return train_rows, torch.tensor(classes), dev_rows, torch.tensor(right)


def _choice_rows(examples: list, length: int) -> Tensor:
    texts = []
    for example in examples:
        if isinstance(example, Problem):
            texts.append(example.question)
        else:
            texts += [f"{example.text} {choice}" for choice in example.choices or ("",)]
    return byte_rows(texts, length).unflatten(0, (len(examples), -1))


# --------------------------------------------------------------------------------------------------
# Tasks by name
# --------------------------------------------------------------------------------------------------

TASKS = {  # name: (reader, data set of data/download.py, training file, development file)
    "sst2": (read_sst2, "sst2", "SST-2/train.tsv", "SST-2/dev.tsv"),
    "csqa": (read_csqa, "csqa", "train_rand_split.jsonl", "dev_rand_split.jsonl"),
    "asdiv-a": (
        read_math,
        "svamp",
        "cv_asdiv-a/fold{fold}/train.csv",
        "cv_asdiv-a/fold{fold}/dev.csv",
    ),
    "mawps": (read_math, "svamp", "cv_mawps/fold{fold}/train.csv", "cv_mawps/fold{fold}/dev.csv"),
    "svamp": (read_math, "svamp", "mawps-asdiv-a_svamp/train.csv", "mawps-asdiv-a_svamp/dev.csv"),
    "mrpc": (read_mrpc, "mrpc", "msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"),
    "copa": (read_copa, "copa", "COPA/train.jsonl", "COPA/val.jsonl"),
    "multirc": (read_multirc, "multirc", "MultiRC/train.jsonl", "MultiRC/val.jsonl"),
    "winogrande": (
        read_winogrande,
        "winogrande",
        "winogrande_1.1/train_l.jsonl",
        "winogrande_1.1/dev.jsonl",
    ),
    "wikiqa": (
        read_wikiqa,
        "wikiqa",
        "WikiQACorpus/WikiQA-train.tsv",
        "WikiQACorpus/WikiQA-dev.tsv",
    ),
    "squad": (read_squad, "squad", "train-v1.1.json", "dev-v1.1.json"),
    "hotpotqa": (
        read_hotpotqa,
        "hotpotqa",
        "hotpot_train_v1.1.json",
        "hotpot_dev_distractor_v1.json",
    ),
    # The evaluation sets of AdaMoE's Table 1: development questions, for OpenBookQA the test
    # questions.
    "arc-c": (
        read_arc,
        "arc",
        "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Train.jsonl",
        "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Dev.jsonl",
    ),
    "arc-e": (
        read_arc,
        "arc",
        "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Train.jsonl",
        "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Dev.jsonl",
    ),
    "obqa": (
        read_arc,
        "obqa",
        "OpenBookQA-V1-Sep2018/Data/Main/train.jsonl",
        "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl",
    ),
    "siqa": (read_siqa, "siqa", "socialiqa-train-dev/train.jsonl", "socialiqa-train-dev/dev.jsonl"),
    "piqa": (
        read_piqa,
        "piqa",
        "physicaliqa-train-dev/train.jsonl",
        "physicaliqa-train-dev/dev.jsonl",
    ),
    "hellaswag": (read_hellaswag, "hellaswag", "hellaswag_train.jsonl", "hellaswag_val.jsonl"),
}


def task_files(name: str, data_dir: str | Path, fold: int = 0) -> tuple[Path, Path]:
    """Training and development file of a task below data_dir; what is not there is downloaded, with
    a progress bar.

    fold  0-4, of the tasks that are cross-validated. Raises ValueError for an unknown name or fold,
          DownloadError.
    """
    if name not in TASKS or fold not in range(5):
        raise ValueError(
            f"task is {name!r}, fold {fold}; allowed: {', '.join(TASKS)}, folds 0 to 4"
        )
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


LETTERS = "ABCDE"
LETTER_TASKS = ("arc-c", "arc-e", "obqa", "siqa", "winogrande", "piqa", "hellaswag", "csqa")


def letter_prompt(example: Example) -> str:
    """A multiple-choice question as text that ends where the letter of the right choice belongs
    (AdaMoE, Figure 1).

    Letter and choice are one line each; the answer is " A", " B", ... after "Answer:".
    """
    prompt = [example.context.strip()] if example.context else []
    prompt.append(f"Question: {example.text.strip()}")
    prompt += [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, example.choices)]
    return "\n".join([*prompt, "Answer:"])


# --------------------------------------------------------------------------------------------------
# Tasks as text to text
# --------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """What the model reads, and what it answers."""

    template: str  # with the names of Example or Question
    words: tuple[str, ...] = ()  # the one-word answer of each class; (): a Question's own answer
    metrics: tuple[str, ...] = ("accuracy",)  # shares; the first is the one that papers quote

    def write(self, example: Example | Question) -> str:
        return self.template.format(**example._asdict())


NO_YES = ("no", "yes")
SPANS = ("f1", "exact_match")
PROMPTS = {  # what is short comes first: a prompt that is too long loses its end
    "sst2": Prompt("sst2 sentence: {text}", ("negative", "positive")),
    "mrpc": Prompt("mrpc sentence1: {text} sentence2: {pair}", NO_YES),
    "copa": Prompt(
        "copa premise: {text} question: {pair} 1: {choices[0]} 2: {choices[1]}", ("1", "2")
    ),
    "multirc": Prompt(
        "multirc question and answer: {pair} paragraph: {text}",
        NO_YES,
        ("f1", "exact_match", "accuracy"),
    ),
    "winogrande": Prompt("winogrande sentence: {text} 1: {choices[0]} 2: {choices[1]}", ("1", "2")),
    "wikiqa": Prompt("wikiqa question: {text} sentence: {pair}", NO_YES),
    "squad": Prompt("squad question: {text} context: {context}", metrics=SPANS),
    "hotpotqa": Prompt("hotpotqa question: {text} context: {context}", metrics=SPANS),
}


def load_prompts(name: str, data_dir: str | Path) -> tuple[list, list]:
    """Training and development examples of a task in PROMPTS. Raises like load_task."""
    if name not in PROMPTS:
        raise ValueError(f"task is {name!r}; as text to text there are {', '.join(PROMPTS)}")
    return load_task(name, data_dir)


def scores(
    name: str, examples: Sequence[Example | Question], answers: Sequence
) -> dict[str, float]:
    """The metrics of a task in PROMPTS, shares of 1. answers: a class for each example, or for each
    question a text.

    An answer that is no class (None) is wrong; MultiRC's F1 counts it as a "no".
    """
    if not PROMPTS[name].words:
        yes_no = name == "hotpotqa"
        found = [best_match(answer, q.answers, yes_no) for answer, q in zip(answers, examples)]
        f1, exact = zip(*found)
        return {"f1": sum(f1) / len(found), "exact_match": sum(exact) / len(found)}
    right = [answer == example.label for answer, example in zip(answers, examples)]
    accuracy = sum(right) / len(right)
    if name != "multirc":
        return {"accuracy": accuracy}
    agreed = sum(answer == 1 == example.label for answer, example in zip(answers, examples))
    claimed = sum(answer == 1 for answer in answers) + sum(example.label for example in examples)
    questions = {example.question: True for example in examples}
    for example, is_right in zip(examples, right):
        questions[example.question] &= is_right
    return {
        "f1": 2 * agreed / claimed if claimed else 1.0,  # F1a: over all answers of all questions
        "exact_match": sum(questions.values())
        / len(questions),  # questions with every answer judged right
        "accuracy": accuracy,
    }


def normal_form(answer: str) -> list[str]:
    """The words that SQuAD compares: small letters, without punctuation and articles."""
    letters = "".join(char for char in answer.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def best_match(answer: str, references: Sequence[str], yes_no: bool = False) -> tuple[float, float]:
    """(F1 of the words, exact match) with the nearest reference, each its own maximum.

    yes_no: as HotpotQA's script has it, a "yes", "no" or "noanswer" shares nothing with any other
    answer.
    """
    given = normal_form(answer)
    best_f1 = exact = 0.0
    for reference in map(normal_form, references):
        shared = (Counter(given) & Counter(reference)).total()
        apart = {"yes", "no", "noanswer"} & {" ".join(given), " ".join(reference)}
        if yes_no and given != reference and apart:
            shared = 0
        if shared:
            best_f1 = max(best_f1, 2 * shared / (len(given) + len(reference)))
        exact = max(exact, float(given == reference))
    return best_f1, exact


def word_ids(tokenizer, words: Sequence[str]) -> list[int]:
    """The token of each word.

    Raises ValueError for a word that is not one token, or two words with the same.
    """
    tokens = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"the answer {word!r} is not one token of this tokenizer: {ids}")
        tokens += ids
    if len(set(tokens)) < len(words):
        raise ValueError(f"two of the answers {', '.join(words)} are the same token")
    return tokens


def epoch_rows(count: int, step: int, size: int, seed: int) -> Tensor:
    """[size] int64: batch number `step` of the endless sequence of epochs over `count` rows, each
    in an own order.
    """
    first_epoch, start = divmod(step * size, count)
    orders = []
    while len(orders) * count < start + size:
        generator = torch.Generator().manual_seed(1_000_003 * seed + first_epoch + len(orders))
        orders.append(torch.randperm(count, generator=generator))
    return torch.cat(orders)[start : start + size]


class PromptBatches:
    """A task of PROMPTS for a text-to-text model and its tokenizer (of transformers).

    A batch is {"input_ids", "attention_mask": [batch, tokens], "labels": [batch, answer]}, padded
    on the right, prompts cut at max_tokens; labels are the answer's tokens (one, or up to
    MAX_ANSWER), the end of text, -100 for padding.
    """

    # Tokens; with the end of text the 64 that one expert of Switch serves in a sequence.
    MAX_ANSWER = 63

    def __init__(self, name: str, data_dir: str | Path, tokenizer, max_tokens: int):
        self.train, self.dev = load_prompts(name, data_dir)
        self.name = name
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.words = word_ids(tokenizer, PROMPTS[name].words)

    def encode(self, examples: Sequence[Example | Question]) -> dict[str, Tensor]:
        prompts = [PROMPTS[self.name].write(example) for example in examples]
        batch = self.tokenizer(
            prompts, truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
        )
        if self.words:
            answers = [[self.words[example.label]] for example in examples]
        else:
            texts = [question.answers[0] for question in examples]
            answers = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        rows = [torch.tensor([*ids[: self.MAX_ANSWER], end]) for ids in answers]
        found = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found["labels"] = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=-100
        )
        return found

    def read_answers(self, ids: Tensor) -> list[int | None] | list[str]:
        """From generated tokens [batch, time]: the class, None where it is no word of the task; or
        the text.
        """
        if self.words:
            classes = {token: label for label, token in enumerate(self.words)}
            return [classes.get(first) for first in ids[:, 0].tolist()]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def train_batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """Batch number `step` of the endless sequence of epochs, each in an order of its own."""
        rows = epoch_rows(len(self.train), step, size, seed)
        return self.encode([self.train[row] for row in rows.tolist()])

    def sample(self, num: int, size: int, seed: int) -> list[dict[str, Tensor]]:
        """`num` random training examples (all, if there are fewer) in batches."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self._in_batches([self.train[row] for row in order[:num].tolist()], size)

    def dev_batches(self, num: int, size: int) -> list[dict[str, Tensor]]:
        """The development examples in batches; num 0: all."""
        return self._in_batches(self.dev[: num or None], size)

    def _in_batches(self, examples: list, size: int) -> list[dict[str, Tensor]]:
        return [self.encode(examples[i : i + size]) for i in range(0, len(examples), size)]
