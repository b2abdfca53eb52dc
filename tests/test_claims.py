"""All scripts at small scale on three seeds: no verdict is the opposite of the committed one."""

import json
import sys

import pytest
from conftest import ROOT
from tiny import SCRIPTS

sys.path.insert(0, str(ROOT / "results"))
import update_tables  # noqa: E402

OPPOSITES = {("holds", "contradicted"), ("contradicted", "holds")}


@pytest.mark.claims
@pytest.mark.parametrize("name", SCRIPTS)
def test_claims(script, tmp_path, name):
    """The arms of the default run, which the required claims need."""
    method = name.removesuffix(".py")
    done = script(name, "--seeds", 3, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / f"{method}-small" / "results.json").read_text())
    default = update_tables.report(f"{method}-default")["claims"]
    measured = {claim["id"] for claim in default if claim["verdict"] != "not measured"}
    committed = {}
    for claim in update_tables.report(method)["claims"]:
        committed[claim["id"]] = claim["verdict"]
    for claim in report["claims"]:
        found = claim["verdict"]
        print(f"{claim['id']}: {found}, committed: {committed.get(claim['id'])}")
        assert found != "failed", claim
        assert (found, committed.get(claim["id"])) not in OPPOSITES, claim
        if claim["id"] in measured:
            assert found != "not measured", claim
