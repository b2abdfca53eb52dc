"""One look and feel: what all seven scripts have in common, read from them without training."""

import dataclasses
import importlib
import inspect
import json
import re

import pytest
import tiny
from conftest import ROOT, imports_of_the_page

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
    assert len(edits) == 3 and all("(" in edit for edit in edits)  # each says what one will see


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_explained_and_can_be_typed(method, command_line):
    module = importlib.import_module(method)
    comments = common.field_comments(module.Config)
    names = [item.name for item in dataclasses.fields(module.Config)]
    assert [name for name in names if not comments.get(name)] == []
    flags = [f"--{name.replace('_', '-')}" for name in names]
    known = set(re.findall(r"--[a-z][a-z0-9-]*", command_line(module, "--help").stdout))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", inspect.getdoc(module)))
    own = (*common.FLAGS, *getattr(module, "ACTIONS", {}), "theory")
    others = {"--nproc-per-node", "--array", "--gpus", "--wrap"}  # of torchrun and clusters
    others |= {"--" + name.replace("_", "-") for name in own}
    assert set(flags) <= known and mentioned <= {*flags, *others}


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_a_setting_or_one_line_says_which_are(method, command_line):
    module = importlib.import_module(method)
    if method not in STEPS:
        assert "steps" in {item.name for item in dataclasses.fields(module.Config)}
        return
    done = command_line(module, "--steps", 5)
    assert done.returncode == 2 and f"did you mean {STEPS[method]}?" in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_committed_claims_follow_from_what_the_committed_arms_found(method):
    module = importlib.import_module(method)
    found = json.loads((ROOT / "results" / "cpu-2-cores" / f"{method}.json").read_text())
    settings = {}
    for name, value in found["config"].items():
        settings[name] = tuple(value) if isinstance(value, list) else value
    results, config = common.Results(found["results"]["arms"]), module.Config(**settings)
    committed = {claim["id"]: claim for claim in found["claims"]}
    for claim in common.claims_of(module.main):
        claim.judge(results, config)
        assert claim.verdict == committed[claim.id]["verdict"], claim.id
        assert claim.margins == pytest.approx(committed[claim.id]["margins"]), claim.id


@pytest.mark.parametrize("method", METHODS)
def test_every_script_draws_its_picture(method, tiny_run):
    pytest.importorskip("matplotlib")
    folder = tiny_run(importlib.import_module(method)).folder
    assert (folder / f"{method}.png").read_bytes().startswith(b"\x89PNG")


PASTED = {  # where the method ends, and what is done with it
    "adamoe": (
        "# Null experts in a model of trans",
        """
        layer = AdaMoE(6, 5, num_experts=4, num_null=4, top_k=3)
        loss = layer(torch.randn(9, 6)).sum() + take_aux_loss([layer])
        """,
    ),
    "dual_head_kd": (
        "# Baselines\n",
        """
        model = DualHead(Student(nn.Linear(7, 5), nn.Linear(5, 3)), 3)
        main, aux = model(torch.randn(4, 7))
        teacher = torch.randn(4, 3)
        loss = F.cross_entropy(main, torch.arange(4) % 3) + binary_kl_norm_loss(aux, teacher)
        """,
    ),
    "home": (
        "# Config\n",
        """
        model = HoME(6, {"watch": ["view", "finish"], "interact": ["like"]})
        loss, _ = multitask_loss(model(torch.randn(9, 6)), torch.ones(9, 3))
        """,
    ),
    "mcsmoe": (
        "# Config\n",
        """
        experts = DenseExperts(Expert(torch.randn(4, 8, 6), torch.randn(4, 6, 8)))
        layer = SparseMoE(torch.randn(4, 8), experts)
        layer = merge_layer(layer, torch.ones(4), torch.tensor([0, 1, 0, 1]))
        layer.experts = LowRankExperts(layer.experts, rank=2)
        loss = layer(torch.randn(3, 8)).sum()
        """,
    ),
    "smoe_dropout": (
        "# Config\n",
        """
        layer = SMoEDropout(6, 8, 4)
        set_k(layer, k_at(3, 10, 2, 4))
        loss = layer(torch.randn(9, 6)).sum()
        """,
    ),
}


@pytest.mark.parametrize("method", PASTED)
def test_the_method_runs_pasted_into_an_empty_file(method):
    """Nothing of data/, common.py or the experiment is needed. btm and mowst test it themselves."""
    end, use = PASTED[method]
    source = inspect.getsource(importlib.import_module(method))
    pasted = source.split("\n# The method", 1)[1].partition("\n")[2].split(end)[0]
    empty = {"__name__": "pasted"}
    exec(imports_of_the_page(method) + pasted + inspect.cleandoc(use), empty)
    empty["loss"].backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_every_script_runs_on_a_gpu(command_line, name, dtype):
    module = importlib.import_module(name.removesuffix(".py"))
    flags = ["--device", "cuda", "--dtype", dtype, "--ablate", "--workers", 1]
    done = command_line(module, *tiny.SCRIPTS[name], *flags)
    assert done.returncode == 0, done.stderr
