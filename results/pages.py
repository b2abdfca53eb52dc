"""A site to read the scripts in a browser: `python results/pages.py` writes it to site/.

Every script becomes a page: its lecture, its picture, its claims with their verdicts, and then the
file from top to bottom, docstrings and comments on the left, the code they speak of on the right.
Plain HTML and one style sheet (pages.css), from the standard library; nothing is fetched when it
is read.
"""

import argparse
import ast
import html
import io
import json
import keyword
import re
import shutil
import sys
import textwrap
import tokenize
from dataclasses import dataclass, field
from os.path import relpath
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "cpu-2-cores"
METHODS = ("adamoe", "smoe_dropout", "mcsmoe", "btm", "home", "dual_head_kd", "mowst")
SHARED = ("common", "kernels")
RULER = re.compile(r"# [-=]{20,}$")


@dataclass
class Segment:
    """Lines of code and what is said about them."""

    prose: list[str] = field(default_factory=list)  # pieces of text
    lines: list[int] = field(default_factory=list)  # numbers of lines of code, from 1
    heading: str = ""  # a section begins here


def docstrings(tree: ast.Module) -> dict[int, tuple[int, str]]:
    """First line -> last line and text, of every docstring below the module's."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            expression = node.body[0]
            found[expression.lineno] = (expression.end_lineno, ast.get_docstring(node))
    return found


def definitions(tree: ast.Module) -> set[int]:
    """The lines at which a function, a class or a method begins, decorators included."""
    starts = set()
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for item in [node, *inner]:
            if isinstance(item, (ast.FunctionDef, ast.ClassDef)):
                starts.add(min([item.lineno, *(mark.lineno for mark in item.decorator_list)]))
    return starts


def own_line_comments(source: str) -> dict[int, str]:
    """Line -> comment, of comments that have the line to themselves."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            found[token.start[0]] = token.string
    return found


def segments(source: str) -> list[Segment]:
    """The file below its docstring, cut where a definition or a comment begins."""
    tree = ast.parse(source)
    texts = docstrings(tree)
    starts = definitions(tree)
    comments = own_line_comments(source)
    count, number = len(source.splitlines()), tree.body[0].end_lineno + 1
    cut = [Segment()]
    while number <= count:
        comment = comments.get(number)
        is_heading = comment and RULER.match(comment) and number + 2 in comments
        if is_heading and RULER.match(comments[number + 2]):
            cut.append(Segment(heading=comments[number + 1].removeprefix("# ")))
            number += 3
            continue
        if (comment or number in starts) and cut[-1].lines:
            cut.append(Segment())
        if comment:
            block = []
            while number in comments and not (block and RULER.match(comments[number])):
                block.append(comments[number].removeprefix("#").removeprefix(" "))
                number += 1
            cut[-1].prose.append("\n".join(block))
        elif number in texts:
            last, text = texts[number]
            cut[-1].prose.append(text)
            number = last + 1
        else:
            cut[-1].lines.append(number)
            number += 1
    return cut


def coloured(source: str) -> list[str]:
    """Every line as HTML: keywords, strings and comments marked."""
    marks: dict[int, list[tuple[int, int, str]]] = {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        kind = "s" if "STRING" in name else "c" if name == "COMMENT" else ""
        if name == "NAME" and keyword.iskeyword(token.string):
            kind = "k"
        if not kind:
            continue
        for number in range(token.start[0], token.end[0] + 1):
            begin = token.start[1] if number == token.start[0] else 0
            end = token.end[1] if number == token.end[0] else len(lines[number - 1])
            marks.setdefault(number, []).append((begin, end, kind))
    made = []
    for number, line in enumerate(lines, start=1):
        out, place = "", 0
        for begin, end, kind in marks.get(number, []):
            out += html.escape(line[place:begin])
            out += f'<span class="{kind}">{html.escape(line[begin:end])}</span>'
            place = end
        made.append(out + html.escape(line[place:]))
    return made


def inline(text: str) -> str:
    shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    shown = re.sub(r"\*\*(\w[^*]*)\*\*", r"<b>\1</b>", shown)
    return re.sub(r"(?<![\w*])\*(\w[^*\n]*)\*(?![\w*])", r"<i>\1</i>", shown)


def prose(text: str) -> str:
    """Paragraphs as they are, lists as lists; what is set in columns stays so."""
    made = []
    for part in re.split(r"\n\s*\n|\n(?=(?:You see|Found|Differences|Break it|\d+\.) )", text):
        label = re.match(r"(Run|You see|Found) +", part)
        if label:
            part = textwrap.dedent(" " * len(label[0]) + part[len(label[0]) :])
            made.append(f"<h3>{label[1]}</h3>")
        is_set = part.startswith("    ") or (label and label[1] == "Run")
        if is_set or re.search(r"\S {3,}\S", part):
            made.append(f"<pre>{html.escape(part, quote=False)}</pre>")
        elif re.match(r"\d+\. ", part):
            made.append(f'<p class="item">{inline(part)}</p>')
        else:
            made.append(f"<p>{inline(part)}</p>")
    return "".join(made)


def code_rows(source: str) -> str:
    """The whole file, prose beside code."""
    lines, made = coloured(source), []
    for segment in segments(source):
        if segment.heading:
            made.append(f"<h2>{html.escape(segment.heading)}</h2>")
        code = "\n".join(lines[number - 1] for number in segment.lines).strip("\n")
        said = "".join(prose(text) for text in segment.prose)
        if code.strip() or said:
            source_cell = f'<pre class="source">{code}</pre>' if code.strip() else ""
            made.append(f'<div class="row"><div class="prose">{said}</div>{source_cell}</div>')
    return "\n".join(made)


def claims_table(report: dict) -> str:
    """Claim, verdict, this code's number and the paper's."""
    rows = ["<tr><th>claim</th><th>verdict</th><th>measured</th><th>paper</th></tr>"]
    for claim in report["claims"]:
        name = html.escape(claim["id"].partition(".")[2])
        kind = "required" if claim["required"] else "check" if claim["is_check"] else "open"
        verdict = claim["verdict"]
        sentence = html.escape(claim["text"])
        cells = [
            f'<code>{name}</code> <span class="quiet">{kind}</span><br>{sentence}',
            f'<span class="{verdict.split()[0]}">{html.escape(verdict)}</span>',
            html.escape(claim["measured"]),
            html.escape(claim["paper"]),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    seeds = f"Seeds {report['seeds'][0]}-{report['seeds'][-1]}, small scale, two CPU cores."
    table = "\n".join(rows)
    return f'<p>{seeds}</p><table class="claims">\n{table}\n</table>'


def page(title: str, body: str) -> str:
    links = " ".join(f'<a href="{name}.html">{name}</a>' for name in (*METHODS, *SHARED))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="style.css"></head><body>
<nav><a href="index.html">start</a>{links}</nav>
<main>{body}</main></body></html>
"""


def script_page(name: str, out: Path) -> str:
    source = (ROOT / f"{name}.py").read_text()
    title, _, lecture = ast.get_docstring(ast.parse(source)).partition("\n")
    links = [f'<a href="{relpath(ROOT / f"{name}.py", out)}">{name}.py</a>']
    links.append(f'<a href="{relpath(ROOT / "tests" / f"test_{name}.py", out)}">its tests</a>')
    paper = re.search(r"arXiv[: ](\d{4}\.\d{5})", lecture)
    if paper and name in METHODS:
        links.append(f'<a href="https://arxiv.org/abs/{paper[1]}">the paper</a>')
    body = f"<h1>{html.escape(title)}</h1><p>{' · '.join(links)}</p>{prose(lecture)}"
    if name in METHODS:
        shutil.copyfile(RESULTS / f"{name}.png", out / f"{name}.png")
        report = json.loads((RESULTS / f"{name}.json").read_text())
        body += '<h2>What the claims became</h2><div class="scroll">'
        body += f'<img src="{name}.png" alt="{name}: results"></div>'
        body += claims_table(report)
    return page(f"{name}.py", body + code_rows(source))


def index_page() -> str:
    rows = []
    for name in (*METHODS, *SHARED):
        title = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())).partition("\n")[0]
        link = f'<a href="{name}.html">{name}.py</a>'
        rows.append(f"<tr><td>{link}</td><td>{html.escape(title)}</td></tr>")
    heading = "Mixture-of-experts and distillation papers you can run"
    return page(heading, f"<h1>{heading}</h1><table>{''.join(rows)}</table>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="default: site/")
    out = parser.parse_args().out
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "results" / "pages.css", out / "style.css")
        (out / "index.html").write_text(index_page())
        for name in (*METHODS, *SHARED):
            (out / f"{name}.html").write_text(script_page(name, out))
    except OSError as error:
        sys.exit(f"pages.py: {error}")
    print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
    main()
