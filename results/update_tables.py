"""Write the tables of the pages anew from the results: `python results/update_tables.py`.

A table stands between `<!-- claims: adamoe -->` (or `<!-- papers -->`, `<!-- kernels -->`, ...) and
`<!-- end -->`; a test checks that every page is what this command makes of it.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "cpu-2-cores"
PAGES = (ROOT / "README.md", FOLDER / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Script: paper, idea, and what its result teaches. {claim:digits} is that claim's mean margin over
# the committed seeds with half its 90 % interval, {-claim:digits} the same with its sign turned.
PAPERS = {
    "adamoe": (
        "AdaMoE (Zeng et al. 2024)",
        "null experts let every token use a different number of true ones",
        "The load follows the formula, and null experts beat a mix of top-1 and top-2. But they are"
        " {-beats_top_k:4} nats/byte behind top-2, and at the same load {-beats_top_p:4} behind"
        " top-p routing put on the trained top-2 model, which needs no null expert.",
    ),
    "smoe_dropout": (
        "SMoE-Dropout (Chen et al. 2023)",
        "a frozen random router and a growing k make a model that can be slimmed",
        "The model can be slimmed, and beats a dense one by {beats_dense:3} bits/byte; the FLOPs"
        " that a growing k saves are not time saved here.",
    ),
    "mcsmoe": (
        "Merge, then Compress (Li et al. 2024)",
        "merge experts that are routed alike, then low rank plus sparse",
        "Lining up and averaging by use matter; with whom an expert is merged hardly does:"
        " random members are as good as those that the router hints at ({routing_groups:4} nats).",
    ),
    "btm": (
        "Branch-Train-Merge (Li et al. 2022)",
        "expert language models trained apart, ensembled or averaged",
        "In every training domain the forest beats one model of equal cost, by {in_domain:3}"
        " bits/byte in the weakest, and the more domains the more; on novel ones it is undecided."
        " An expert is not confined to its domain: removing one can change another more.",
    ),
    "home": (
        "HoME (Wang et al. 2024)",
        "a hierarchy of multi-gate experts for multi-task ranking",
        "BatchNorm and Swish in the experts are most of it: HoME beats the best plain model by"
        " {beats_plain:4} AUC, and is level with one that has them ({beats_starred:4}).",
    ),
    "dual_head_kd": (
        "Dual-Head Knowledge Distillation (Yang et al. 2024)",
        "a second classification head for the logit-level loss",
        "The loss on logits helps ({beats_ce:1} points over cross-entropy); that a second head"
        " does is not seen: two heads against one make {two_heads_recover:1} points.",
    ),
    "mowst": (
        "Mowst (Zeng et al. 2024)",
        "a weak MLP answers what it is sure of, a strong GNN the rest",
        "It helps where a GNN blurs what the node itself knows (GCN, GIN); SAGE, which does not,"
        " loses by it ({beats_strong:1} points); on four public graphs it is nowhere above the"
        " better of its experts. On a whole graph nothing is saved.",
    ),
}


def report(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def claims_table(method: str) -> str:
    """Every claim of a method as measured over the seeds of its committed result."""
    lines = ["| claim | | verdict | measured | paper |", "|---|---|---|---|---|"]
    for claim in report(method)["claims"]:
        kind = "required" if claim["required"] else "check" if claim["is_check"] else "open"
        name = claim["id"].partition(".")[2]
        cells = [f"`{name}`", kind, claim["verdict"], claim["measured"], claim["paper"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def required_verdicts(method: str) -> str:
    """ "3 of 5 hold; undecided: `a`; contradicted: `b`", of the required claims."""
    required = [claim for claim in report(method)["claims"] if claim["required"]]
    by_verdict: dict[str, list[str]] = {}
    for claim in required:
        by_verdict.setdefault(claim["verdict"], []).append(claim["id"].partition(".")[2])
    good = len(by_verdict.pop("holds", []))
    parts = [f"{good} of {len(required)} hold"]
    for word, names in sorted(by_verdict.items()):
        parts.append(f"{word}: " + ", ".join(f"`{name}`" for name in names))
    return "; ".join(parts)


def filled(sentence: str, method: str) -> str:
    """The sentence with the margins of the committed result in it."""
    margins = {}
    for claim in report(method)["claims"]:
        margins[claim["id"].partition(".")[2]] = claim["margins"]

    def number(match: re.Match) -> str:
        sign = -1 if match[1] else 1
        return common.show([sign * value for value in margins[match[2]]], int(match[3]))

    return re.sub(r"\{(-?)(\w+):(\d)\}", number, sentence)


def papers_table() -> str:
    lines = ["| script | paper | time | the abstract's claims | what the result teaches |"]
    lines.append("|---" * 5 + "|")
    for method, (paper, idea, teaches) in PAPERS.items():
        seconds = f"{report(method + '-default')['wall_seconds']:.0f} s"  # on two cores, one seed
        seeds = report(method)["seeds"]
        verdicts = f"{required_verdicts(method)} (seeds {seeds[0]}-{seeds[-1]})"
        link = f"[{method}.py]({method}.py)"
        cells = [link, f"{paper}: {idea}", seconds, verdicts, filled(teaches, method)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chance_line() -> str:
    """How many claims are judged, and how many of them one expects to hold by chance."""
    judged, held = 0, 0
    for method in PAPERS:
        for claim in report(method)["claims"]:
            judged += bool(claim["margins"])
            held += claim["verdict"] == "holds"
    by_chance = f"{judged / 20:.0f} would hold by chance"
    return f"The seven scripts judge {judged} claims; if none were true, {by_chance}. {held} hold."


def kernels_table() -> str:
    """Speed as a share of the dense layer's, and of the fastest contender's."""
    names = {"ours": "kernels.py", "F.grouped_mm": "F.grouped_mm"}
    names |= {"transformers grouped": "transformers, grouped", "where loop": "loop over experts"}
    header = ["tokens - picks of experts - widths", *names.values(), "kernels.py / fastest"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    shapes: dict[str, dict] = {}
    for row in report("kernels")["rows"]:
        shapes.setdefault(row["shape"], {})[row["contender"]] = row
    for shape, row in shapes.items():
        cells = [shape]
        for name in names:
            share = row.get(name, {}).get("total_vs_dense")
            cells.append("" if share is None else f"{share:.2f}")
        cells.append(f"{row['ours']['of_best']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


GRAPHS = (
    ("actor", "gcn"),
    ("chameleon_filtered", "gcn"),
    ("chameleon_filtered", "gat"),
    ("squirrel_filtered", "gin"),
    ("minesweeper", "sage"),
)


def graphs_table() -> str:
    """Mowst on public graphs, a file a graph and GNN: means over published splits."""
    columns = {
        "MLP": ("mlp", "accuracy"),
        "GNN": ("gnn", "accuracy"),
        "mean of both": ("ensemble", "accuracy"),
        "C = D untrained, mixed": ("posthoc", "accuracy"),
        "Mowst, sampled": ("mowst", "sampled"),
        "Mowst, mixed": ("mowst", "accuracy"),
        "Mowst*, mixed": ("mowst_star", "accuracy"),
    }
    lines = [f"| graph, GNN | splits | {' | '.join(columns)} | sampled over the better expert |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for graph, backbone in GRAPHS:
        name = f"mowst-{graph}-{backbone}"
        found = report(name)
        results = common.Results(found["results"]["arms"])
        cells = [f"[{graph}, {backbone}](cpu-2-cores/{name}.json)", str(len(found["seeds"]))]
        cells += [common.show(results.of(arm, key), 1) for arm, key in columns.values()]
        better = max(("mlp", "gnn"), key=lambda arm: results.of(arm, "accuracy").mean())
        lead = results.of("mowst", "sampled") - results.of(better, "accuracy")
        lines.append(f"| {' | '.join(cells)} | {common.show(lead, 1)} ({better}) |")
        if graph == "minesweeper":  # whose publishers report the area under the curve
            areas = [100 * results.of(arm, "auc") for arm, key in columns.values()]
            texts = [common.show(area, 1) for area in areas]
            texts[list(columns).index("Mowst, sampled")] = ""  # an answer is no score
            lines.append(f"| the same, AUC | {cells[1]} | {' | '.join(texts)} | |")
    return "\n".join(lines)


def updated(page: str) -> str:
    tables = {"papers": papers_table, "kernels": kernels_table, "chance": chance_line}
    tables["graphs"] = graphs_table

    def table(match: re.Match) -> str:
        kind, _, method = match[2].partition(": ")
        made = claims_table(method) if method else tables[kind]()
        return f"{match[1]}\n{made}\n{match[4]}"

    kinds = "|".join([*tables, r"claims: \w+"])
    return re.sub(rf"(<!-- ({kinds}) -->)\n(.*?)(<!-- end -->)", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path.read_text()))
