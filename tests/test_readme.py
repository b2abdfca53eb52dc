"""What the README shows is what the project does: its snippets run, its figures come from committed results."""

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


def write_log(path):
    """What the README calls log.csv: one user in two finishes, whatever the video."""
    lines = ["user,video,hour,finish,like,follow"]
    for row in range(6000):
        user = row % 50
        lines.append(f"u{user},v{row % 70},{row % 24},{user % 2},{int(row % 9 == 0)},{int(row % 30 == 0)}")
    path.write_text("\n".join(lines))


def test_python_snippets_run(command_line, tmp_path):
    flags = [*ADAMOE, "--text", ROOT / "README.md", "--pretrain-steps", 1, "--steps", 1, "--workers", 1]
    assert command_line(adamoe, *flags).returncode == 0
    write_log(tmp_path / "log.csv")
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    own_log = []
    for snippet in snippets:
        names = {"torch": torch}
        exec(compile(snippet, "README.md", "exec"), names)
        if "log.csv" in snippet:
            own_log.append(names["home"].evaluate(names["model"], names["data"], names["test"])["auc"])
    assert len(own_log) == 1 and own_log[0][0] > 0.9  # it has learnt who finishes


@pytest.mark.parametrize("page", update_tables.PAGES, ids=["README.md", "results/README.md"])
def test_tables_are_made_from_the_committed_results(page):
    assert page.read_text() == update_tables.updated(page.read_text()), "run python results/update_tables.py"


def is_new(method):
    """Of the second edition: its claims are declared beside what measures them."""
    return not hasattr(importlib.import_module(method), "CLAIMS")


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_a_result_is_of_enough_seeds_and_has_the_claims_of_its_script(method):
    report, module = update_tables.report(method), importlib.import_module(method)
    claims = common.claims_of(module.main) if is_new(method) else module.CLAIMS
    assert report["seeds"] == list(range(8 if is_new(method) else 3))
    declared = {claim.id: claim.required for claim in claims}
    found = {claim["id"]: claim["required"] for claim in report["claims"]}
    assert found == declared


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_a_verdict_follows_from_the_margins_beside_it(method):
    for claim in update_tables.report(method)["claims"]:
        if claim.get("margins"):
            assert claim["verdict"] == common.verdict(claim["margins"]), claim["id"]


@pytest.mark.parametrize("method", update_tables.PAPERS)
def test_a_sample_output_is_of_the_committed_default_run(method):
    report = update_tables.report(f"{method}-default")
    output = (update_tables.RESULTS / f"{method}-default.txt").read_text()
    for claim in report["claims"]:
        if claim.get("verdict") == "not measured":  # its name alone stands there
            assert claim["id"].partition(".")[2] in output
            continue
        assert claim["text"] in output and claim["measured"] in output
    config = importlib.import_module(method).SMALL
    defaults = json.loads(json.dumps(asdict(config)))  # tuples are lists, as in the file
    settled = {name: value for name, value in defaults.items() if value is not None}  # main's choice
    assert report["seeds"] == [0]
    assert settled == {name: report["config"].get(name) for name in settled}


@pytest.mark.parametrize("page", update_tables.PAGES, ids=["README.md", "results/README.md"])
def test_every_file_a_page_names_exists(page):
    for path in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_ci_runs_the_test_command_of_the_readme():
    section = README.split("## Run the tests")[1].split("##")[0]
    assert section.count("python3 -m venv .venv") == 1 and "-m pytest" in section
