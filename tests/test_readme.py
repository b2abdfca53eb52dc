"""What the pages show is what the project does: snippets run, figures come from results."""

import importlib
import json
import re
import sys
from dataclasses import asdict

import pytest
import torch
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
        names = {"torch": torch}
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


INTERVAL = re.compile(r"-?(\d+(?:\.(\d+))?) ± (\d+(?:\.\d+)?)")


def intervals_in(text):
    """[(mean without its sign, half width, digits after the point)] of every "a ± b"."""
    found = INTERVAL.findall(" ".join(text.split()))
    return [(float(mean), float(half), len(decimals)) for mean, decimals, half in found]


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_intervals_in_a_docstring_stand_in_the_committed_result(method):
    """Every "a ± b" under "Found" is one that the run printed, perhaps with more digits."""
    lecture = importlib.import_module(method).__doc__
    found = lecture.partition("Found    (")[2].partition("Differences from the paper")[0]
    printed = json.dumps(update_tables.report(method), ensure_ascii=False)
    assert intervals_in(found)
    for mean, half, digits in intervals_in(found):
        slack = 0.5 * 10**-digits + 1e-9  # as rounded there
        near = [
            (other, width)
            for other, width, _ in intervals_in(printed)
            if abs(other - mean) <= slack and abs(width - half) <= slack
        ]
        assert near, f"{mean} ± {half}"


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
