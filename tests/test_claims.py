"""All scripts at small scale, every arm: required claims hold, every id is there, every row carries a number."""

import importlib
import json

import pytest
from tiny import NEED_FILES, SCRIPTS


@pytest.mark.claims
@pytest.mark.parametrize("name", SCRIPTS)
def test_claims(script, tmp_path, name):
    done = script(name, "--ablate", "--strict", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    method = name.removesuffix(".py")
    claims = json.loads((tmp_path / "runs" / f"{method}-small" / "results.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == [claim.id for claim in importlib.import_module(method).CLAIMS]
    for claim in claims:
        if claim["id"] in NEED_FILES:
            assert claim["holds"] is None and not claim["required"], claim
            continue
        assert claim["holds"] in ((True,) if claim["required"] else (True, False)), claim
        assert any(character.isdigit() for character in claim["measured"]) and claim["values"], claim
