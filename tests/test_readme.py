"""What the README shows is what the project does: its snippets run, its figures come from committed results."""

import json
import re

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_python_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"torch": torch})


@pytest.mark.parametrize("method", ["adamoe", "btm", "dual_head_kd", "home", "mcsmoe", "mowst", "smoe_dropout"])
def test_claim_figures_come_from_the_committed_results(method):
    report = json.loads((ROOT / "results" / "cpu-2-cores" / f"{method}.json").read_text())
    assert report["seeds"] == [0, 1, 2]
    words = {True: "holds", False: "does not hold", None: "not measured"}
    for claim in report["claims"]:
        row = f"| `{claim['id']}` | {words[claim['holds']]} | {claim['measured']} | {claim['paper']} |"
        assert row in README, f"README lacks the row\n{row}"


def test_every_file_the_readme_names_exists():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_ci_runs_the_test_command_of_the_readme():
    section = README.split("## Run the tests")[1].split("##")[0]
    assert section.count("python3 -m venv .venv") == 1 and "-m pytest" in section
