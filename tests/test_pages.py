"""The site shows every script whole: each line once, prose beside the code it speaks of."""

import ast
import html
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import pages  # noqa: E402

SOURCE = '''"""Lecture."""

import math

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


@staticmethod
def area(radius):
    """Of a circle: `pi` times *radius* squared.

    radius  in metres
    """
    # why not cubed
    return math.pi * radius**2  # a trailing comment stays
'''


def test_prose_stands_beside_the_code_it_speaks_of():
    top, heading, function, comment = pages.segments(SOURCE)
    assert not top.prose and heading.heading == "The method"
    assert function.prose[0].startswith("Of a circle")
    code = [SOURCE.splitlines()[line - 1] for line in function.lines]
    assert code == ["@staticmethod", "def area(radius):"]
    assert comment.prose == ["why not cubed"]
    assert "<code>pi</code> times <i>radius</i>" in pages.code_rows(SOURCE)


@pytest.mark.parametrize("name", (*pages.METHODS, *pages.SHARED))
def test_no_line_of_a_script_is_lost_or_shown_twice(name):
    source = (ROOT / f"{name}.py").read_text()
    lines, cut = source.splitlines(), pages.segments(source)
    shown = [number for segment in cut for number in segment.lines]
    assert shown == sorted(set(shown))
    said = "\n".join(text for segment in cut for text in (*segment.prose, segment.heading))
    first = ast.parse(source).body[0].end_lineno
    for number in set(range(first + 1, len(lines) + 1)) - set(shown):
        text = lines[number - 1].strip().strip('"').removeprefix("#").strip()
        assert text in said or pages.RULER.match(lines[number - 1]), lines[number - 1]
    coloured = [re.sub("<[^>]+>", "", line) for line in pages.coloured(source)]
    assert [html.unescape(line) for line in coloured] == lines


def test_the_site_needs_no_network_and_its_links_lead_somewhere(tmp_path, monkeypatch):
    out = tmp_path / "site"
    monkeypatch.setattr(sys, "argv", ["pages.py", "--out", str(out)])
    pages.main()
    for path in out.glob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"]+)"', path.read_text()):
            assert link.startswith("https://arxiv.org/abs/") or (out / link).exists(), link
