"""What the pages show is what the project does: snippets run, figures come from results."""

import importlib
import json
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT
from tiny import ADAMOE

import adamoe
import common

sys.path.insert(0, str(ROOT / "results"))
import update_tables  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in update_tables.PAGES]


def snippets_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def write_log(path):
    """What a page calls log.csv: one user in two finishes, whatever the video."""
    lines = ["user,video,hour,finish,like,follow"]
    for row in range(6000):
        user, video, hour = row % 50, row % 70, row % 24
        like, follow = int(row % 9 == 0), int(row % 30 == 0)
        lines.append(f"u{user},v{video},{hour},{user % 2},{like},{follow}")
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("page", update_tables.PAGES, ids=PAGE_NAMES)
def test_python_snippets_run(page, command_line, tmp_path):
    if "runs/adamoe-small" in page.read_text():
        text = ["--text", ROOT / "README.md"]
        flags = [*ADAMOE, *text, "--pretrain-steps", 1, "--steps", 1, "--workers", 1]
        assert command_line(adamoe, *flags).returncode == 0
    write_log(tmp_path / "log.csv")
    for snippet in snippets_of(page):
        needs = re.findall(r"^(?:import|from) (transformers|peft)", snippet, flags=re.MULTILINE)
        for name in needs:
            pytest.importorskip(name)
        names = {}
        exec(compile(snippet, page.name, "exec"), names)
        if "log.csv" in snippet:
            auc = names["home"].evaluate(names["model"], names["data"], names["test"])["auc"]
            assert auc[0] > 0.9  # it has learnt who finishes


@pytest.mark.parametrize("page", update_tables.PAGES, ids=PAGE_NAMES)
def test_tables_are_made_from_the_committed_results(page):
    assert page.read_text() == update_tables.updated(page.read_text()), "update_tables.py"


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_a_result_is_of_eight_seeds_and_has_the_claims_of_its_script(method):
    report, module = update_tables.report(method), importlib.import_module(method)
    assert report["seeds"] == list(range(8))
    declared = {claim.id: claim.required for claim in common.claims_of(module.main)}
    assert {claim["id"]: claim["required"] for claim in report["claims"]} == declared


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_a_verdict_follows_from_the_margins_beside_it(method):
    for claim in update_tables.report(method)["claims"]:
        if claim["margins"]:
            assert claim["verdict"] == common.verdict(claim["margins"]), claim["id"]


# A figure: 0.0054 or -0.002, perhaps with its interval, 0.0054 ± 0.0032; or whole numbers with one.
FIGURE = re.compile(r"(?<![\w.-])-?(\d+\.\d+|\d+(?= ±))(?: ± (\d+(?:\.\d+)?))?")


def figures_in(text):
    """[(figure without its sign, half interval or None, digits after the point)]."""
    found, text = [], re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)  # not code, nor addresses
    for figure, half in FIGURE.findall(" ".join(text.split())):
        digits = len(figure.partition(".")[2])
        found.append((float(figure), float(half) if half else None, digits))
    return found


def means_of(result):
    """The mean over seeds of every column of every arm, of each place of a list."""
    for seeds in result["results"]["arms"].values():
        for column in seeds[0]:
            values = [seed.get(column) for seed in seeds]
            try:
                means = np.array(values, dtype=float).mean(axis=0)
            except (TypeError, ValueError):  # words, or lists of unequal length
                continue
            yield from np.abs(means).ravel().tolist()
            yield abs(float(means.mean()))


def prose_of(method):
    """What is said of a result: the docstring's "Found", and the paragraphs of results/README."""
    lecture = importlib.import_module(method).__doc__
    found = lecture.partition("Found    (")[2].partition("Differences from the paper")[0]
    page = (update_tables.FOLDER / "README.md").read_text()
    after_the_table = page.partition(f"<!-- claims: {method} -->")[2].partition("<!-- end -->")[2]
    return found, after_the_table.partition("\n## ")[0]


def printed_by(result):
    """Every figure that a run printed, and every column's mean over seeds."""
    printed = figures_in(json.dumps(result["claims"], ensure_ascii=False))
    printed += figures_in(json.dumps(result["results"]["tables"], ensure_ascii=False))
    return printed + [(mean, None, 0) for mean in means_of(result)]


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_figures_in_the_prose_stand_in_the_committed_result(method):
    """Each is one that the run printed, perhaps with more digits, or a column's mean over seeds."""
    printed = printed_by(update_tables.report(method))
    found, paragraphs = prose_of(method)
    assert figures_in(found)
    for figure, half, digits in [*figures_in(found), *figures_in(paragraphs)]:
        slack = 0.5 * 10**-digits + 1e-9  # as rounded there
        near = [other for other in printed if abs(other[0] - figure) <= slack]
        if half is not None:
            near = [other for other in near if other[1] is not None]
            near = [other for other in near if abs(other[1] - half) <= slack]
        assert near, f"{figure} ± {half}" if half else figure


@pytest.mark.parametrize("method", ("adamoe", "mcsmoe", "home", "mowst"))
def test_figures_of_break_it_yourself_stand_in_committed_results(method):
    printed = printed_by(update_tables.report(method))
    for path in update_tables.RESULTS.glob(f"{method}-break*.json"):
        printed += printed_by(json.loads(path.read_text()))
    edits = importlib.import_module(method).__doc__.partition("Break it yourself")[2]
    assert figures_in(edits)
    for figure, _, digits in figures_in(edits):
        slack = 0.5 * 10**-digits + 1e-9
        assert any(abs(other[0] - figure) <= slack for other in printed), figure


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_a_sample_output_is_of_the_committed_default_run(method):
    report = update_tables.report(f"{method}-default")
    output = (update_tables.RESULTS / f"{method}-default.txt").read_text()
    for claim in report["claims"]:
        if claim["verdict"] == "not measured":  # its name alone stands there
            assert claim["id"].partition(".")[2] in output
            continue
        assert claim["text"] in output and claim["measured"] in output
    config = importlib.import_module(method).SMALL
    defaults = json.loads(json.dumps(asdict(config)))  # tuples are lists, as in the file
    settled = {name: value for name, value in defaults.items() if value is not None}
    assert report["seeds"] == [0]
    assert settled == {name: report["config"].get(name) for name in settled}


@pytest.mark.parametrize("page", update_tables.PAGES, ids=PAGE_NAMES)
def test_every_file_a_page_names_exists(page):
    for path in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_ci_runs_the_test_command_of_the_readme():
    section = README.split("## Run the tests")[1].split("##")[0]
    assert section.count("python3 -m venv .venv") == 1 and "-m pytest" in section
