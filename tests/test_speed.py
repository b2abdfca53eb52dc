"""The side-by-side timings run, on tiny shapes, and refuse a pair that computes different things."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import speed  # noqa: E402

TINY = {
    "adamoe": {"d_model": 16, "d_ff": 8, "batch_size": 2, "context": 16},
    "btm": {"test_blocks": 4, "context": 8},
    "home": {"rows": 2500, "users": 60, "items": 80, "batch_size": 16, "hidden": 8, "width": 4},
    "mcsmoe": {"d_ff": 8},
    "mowst": {"num_nodes": 300, "hidden": 8},
}
CONFIGS = {name: replace(config, **TINY[name]) for name, config in speed.CONFIGS.items()}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers, though there be one core
def test_every_pair_agrees_and_its_ratio_lies_within_its_quartiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "TURN_SECONDS", 0.001)
    speed.main(["--json", str(tmp_path / "speed.json")], CONFIGS, turns=3)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert len(rows) == len(capsys.readouterr().out.splitlines()) >= 8
    for row in rows:
        assert 0 < row["low"] <= row["ratio"] <= row["high"] and row["ours_ms"] > 0 and row["other_ms"] > 0


def test_a_pair_that_gives_other_numbers_is_refused(monkeypatch):
    x, loop = torch.arange(4.0), lambda: [x * 1.001]
    monkeypatch.setattr(speed, "pairs", lambda configs: iter([("doubling", "a slip", (lambda: [x], loop))]))
    with pytest.raises(SystemExit, match="doubling and a slip give different numbers"):
        speed.main([], CONFIGS)


def test_gradients_of_stacked_and_listed_weights_are_compared_by_their_norm():
    out, weights = torch.ones(2), torch.arange(6.0).view(2, 3)
    assert speed.agree([out, out, weights], [out, out, *weights])
    assert not speed.agree([out, out, weights], [out, out, weights[0], 2 * weights[1]])
    assert not speed.agree([out, out, weights], [out, 2 * out, *weights])


def test_a_folder_is_no_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(["--json", str(tmp_path)])
    assert stop.value.code == 2 and "is a folder" in capsys.readouterr().err
