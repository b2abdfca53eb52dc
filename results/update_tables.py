"""Write the tables of README.md and results/README.md anew from the results: `python results/update_tables.py`.

A table stands between `<!-- claims: adamoe -->` (or `<!-- papers -->`, `<!-- numbers -->`, ...) and `<!-- end -->`; a
test checks that both files are what this command makes of them.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

FOLDER = Path(__file__).resolve().parent
RESULTS, PAGES = FOLDER / "cpu-2-cores", (FOLDER.parent / "README.md", FOLDER / "README.md")
EXACT = ("mcsmoe.memory", "mcsmoe.flops", "btm.cost_matched", "adamoe.null_free", "adamoe.causal")
PAPERS = {  # script: (paper, problem, idea, the claim whose number the README quotes)
    "adamoe": (
        "AdaMoE (Zeng et al. 2024)",
        "every token costs the same number of experts, easy or hard",
        "null experts let every token use a different number of true ones",
        "flops",
    ),
    "smoe_dropout": (
        "SMoE-Dropout (Chen et al. 2023)",
        "experts end up alike, and more of them than in training do not help",
        "a frozen random router and a growing k make a model that can be slimmed",
        "slimmable",
    ),
    "mcsmoe": (
        "Merge, then Compress (Li et al. 2024)",
        "sparse models fill memory with experts that are hardly used",
        "merge experts that are routed alike, then low rank plus sparse",
        "memory",
    ),
    "btm": (
        "Branch-Train-Merge (Li et al. 2022)",
        "one large language model keeps every machine in step with all others",
        "expert language models trained apart, ensembled or averaged",
        "in_domain",
    ),
    "home": (
        "HoME (Wang et al. 2024)",
        "with many tasks, shared experts collapse and rare tasks ignore their own",
        "a hierarchy of multi-gate experts for multi-task ranking",
        "collapse",
    ),
    "dual_head_kd": (
        "Dual-Head Knowledge Distillation (Yang et al. 2024)",
        "losses on logits and on probabilities pull one classifier apart",
        "a second classification head for the logit-level loss",
        "two_heads_recover",
    ),
    "mowst": (
        "Mowst (Zeng et al. 2024)",
        "a GNN spends neighbours on nodes that their own features tell",
        "a weak MLP answers what it is sure of, a strong GNN the rest",
        "beats_strong",
    ),
}


def report(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def verdict_of(claim: dict) -> str:
    """The verdict by the one rule; results of the first edition recorded margins, not verdicts."""
    if "verdict" in claim:
        return claim["verdict"]
    if claim["holds"] is None:
        return "not measured"
    margins = claim["values"].get("margin")
    if isinstance(margins, list):
        return common.verdict(margins)
    if claim["id"] in EXACT:
        return "passed" if claim["holds"] else "failed"
    several = [value for value in claim["values"].values() if isinstance(value, list)]
    verdicts = {common.verdict(margins) for margins in several if len(margins) == 3}
    worst = [word for word in ("contradicted", "undecided", "holds") if word in verdicts]
    return worst[0]


def claims_table(method: str) -> str:
    """Every claim of a method as measured over the seeds of its committed result."""
    lines = ["| claim | | verdict | measured | paper |", "|---|---|---|---|---|"]
    for claim in report(method)["claims"]:
        kind = "required" if claim["required"] else "open"
        if claim.get("is_check"):
            kind = "check"
        name = claim["id"].partition(".")[2]
        cells = [f"`{name}`", kind, verdict_of(claim), claim["measured"], claim["paper"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def speed_table() -> str:
    lines = ["| what | alternative | times its speed | quartiles | ms | alternative, ms |", "|---|---|---|---|---|---|"]
    for row in report("speed")["rows"]:
        cells = "{what} | {alternative} | {ratio:.3g} | {low:.3g} to {high:.3g} | {ours_ms:.3g} | {other_ms:.3g}"
        lines.append(f"| {cells.format(**row)} |")
    return "\n".join(lines)


def required_verdicts(method: str) -> str:
    """ "3 of 5 hold; undecided: `a`; contradicted: `b`", of the required claims."""
    required = [claim for claim in report(method)["claims"] if claim["required"]]
    by_verdict: dict[str, list[str]] = {}
    for claim in required:
        by_verdict.setdefault(verdict_of(claim), []).append(claim["id"].partition(".")[2])
    good = len(by_verdict.pop("holds", [])) + len(by_verdict.pop("passed", []))
    parts = [f"{good} of {len(required)} hold"]
    for word, names in sorted(by_verdict.items()):
        parts.append(f"{word}: " + ", ".join(f"`{name}`" for name in names))
    return "; ".join(parts)


def papers_table() -> str:
    lines = ["| script | paper | problem | idea | time | the abstract's claims | seeds |"]
    lines += ["|---" * 7 + "|"]
    for method, (paper, problem, idea, _) in PAPERS.items():
        seconds = f"{report(method + '-default')['wall_seconds']:.0f} s"  # python NAME.py on two cores
        seeds = f"0-{max(report(method)['seeds'])}"
        cells = [f"[{method}.py]({method}.py)", paper, problem, idea, seconds]
        lines.append(f"| {' | '.join([*cells, required_verdicts(method), seeds])} |")
    return "\n".join(lines)


def numbers_table() -> str:
    """One claim of each method: its number beside the paper's."""
    lines = ["| claim | this code, small scale | the paper |", "|---|---|---|"]
    for method, (*_, quoted) in PAPERS.items():
        claim = next(claim for claim in report(method)["claims"] if claim["id"].endswith(f".{quoted}"))
        lines.append(f"| `{claim['id']}` | {claim['measured']} | {claim['paper']} |")
    return "\n".join(lines)


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


def updated(page: str) -> str:
    tables = {"papers": papers_table, "numbers": numbers_table, "speed": speed_table, "kernels": kernels_table}

    def table(match: re.Match) -> str:
        kind, _, method = match[2].partition(": ")
        made = claims_table(method) if method else tables[kind]()
        return f"{match[1]}\n{made}\n{match[4]}"

    kinds = "|".join([*tables, r"claims: \w+"])
    return re.sub(rf"(<!-- ({kinds}) -->)\n(.*?)(<!-- end -->)", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path.read_text()))
