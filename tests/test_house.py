"""One look and feel: what all seven scripts have in common, read from them without running them."""

import dataclasses
import importlib
import inspect
import re

import pytest
import tiny

import common

METHODS = [name.removesuffix(".py") for name in tiny.SCRIPTS]
PARTS = (
    "\nRun      python {}.py",
    "\nYou see  ",
    "\nFound    (seeds 0-",
    "\nDifferences from the paper",
    "\nBreak it yourself",
)
STEPS = {  # what `--steps` finds where a script has no single number of steps
    "mcsmoe": "--finetune-steps or --recover-steps or --compress-steps or --pretrain-steps",
    "mowst": "--epochs or --turn-epochs or --star-epochs",
}


@pytest.mark.parametrize("method", METHODS)
def test_the_docstring_is_the_lecture(method):
    text = importlib.import_module(method).__doc__
    places = [text.find(part.format(method)) for part in PARTS]
    assert -1 not in places and places == sorted(places), dict(zip(PARTS, places))
    assert "arXiv" in text[: places[0]]
    edits = text[places[-1] :].split(";")
    assert len(edits) == 3 and all("(" in edit for edit in edits), (
        edits
    )  # each says what one will see


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_explained_and_can_be_typed(method, command_line):
    module = importlib.import_module(method)
    comments = common.field_comments(module.Config)
    names = [item.name for item in dataclasses.fields(module.Config)]
    assert [name for name in names if not comments.get(name)] == []
    flags = [f"--{name.replace('_', '-')}" for name in names]
    known = set(re.findall(r"--[a-z][a-z0-9-]*", command_line(module, "--help").stdout))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", inspect.getdoc(module)))
    own = {
        "--" + name.replace("_", "-")
        for name in (*common.FLAGS, *getattr(module, "ACTIONS", {}), "theory")
    }
    assert set(flags) <= known
    assert mentioned <= {*flags, *own, "--nproc-per-node", "--array", "--gpus", "--wrap"}, (
        mentioned - {*flags, *own}
    )


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_a_setting_or_one_line_says_which_are(method, command_line):
    module = importlib.import_module(method)
    if method not in STEPS:
        assert "steps" in {item.name for item in dataclasses.fields(module.Config)}
        return
    done = command_line(module, "--steps", 5)
    assert (
        done.returncode == 2
        and f"did you mean {STEPS[method]}?" in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("method", METHODS)
def test_claims_are_sentences_with_the_papers_number(method):
    module = importlib.import_module(method)
    claims = common.claims_of(module.main)
    prefixes = {claim.id.split(".")[0] for claim in claims}
    assert prefixes == {method} and any(claim.required for claim in claims)
    without = ("not verified", "by design", "by construction")
    for claim in claims:
        has_number = re.search(r"\d|comparable|figure|abstract", claim.paper)
        assert claim.paper.startswith(without) or has_number, claim.id


@pytest.mark.parametrize("method", METHODS)
def test_trained_weights_can_be_loaded(method):
    load = importlib.import_module(method).load_trained
    assert f"runs/{method}-small/" in load.__doc__ and "Raises" in load.__doc__
    assert next(iter(inspect.signature(load).parameters)) == "path"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_every_script_runs_on_a_gpu(command_line, name, dtype):
    module = importlib.import_module(name.removesuffix(".py"))
    flags = ["--device", "cuda", "--dtype", dtype, "--ablate", "--workers", 1]
    done = command_line(module, *tiny.SCRIPTS[name], *flags)
    assert done.returncode == 0, done.stderr
