"""All scripts at small scale, every arm: required claims hold, every id is there, every row carries a number."""

import importlib
import json

import pytest
from tiny import NEED_FILES, SCRIPTS

# Required claims that do not hold on seeds 0-2 (results/README.md): such a script is an expected failure here.
KNOWN = {"mcsmoe.routing_groups"}
ARMS = "ce,kd,bkl,ce+bkl,dual-bkl,dhkd,ce@tuned,kd@tuned,dhkd@tuned"
# Where one seed decides nothing: 3 seeds, of the arms that the claims need.
FLAGS = {"dual_head_kd.py": ("--seeds", "3", "--arms", ARMS)}


@pytest.mark.claims
@pytest.mark.parametrize("name", SCRIPTS)
def test_claims(script, tmp_path, name):
    done = script(name, *FLAGS.get(name, ("--ablate",)), timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    method = name.removesuffix(".py")
    claims = json.loads((tmp_path / "runs" / f"{method}-small" / "results.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == [claim.id for claim in importlib.import_module(method).CLAIMS]
    failed = {claim["id"] for claim in claims if claim["required"] and claim["holds"] is not True}
    for claim in claims:
        if claim["id"] in NEED_FILES:
            assert claim["holds"] is None and not claim["required"], claim
            continue
        assert claim["holds"] in (True, False), claim
        assert any(character.isdigit() for character in claim["measured"]) and claim["values"], claim
    assert failed <= KNOWN, f"required claims that do not hold: {', '.join(sorted(failed - KNOWN))}"
    if failed:
        pytest.xfail(f"known: {', '.join(sorted(failed))}")
