"""README's paper map is true: what it names exists, and says so itself.

A row reads `| Alg. 1 lines 4-5 | `file.py`: `function`, `Class.method`; `other.py`: `function` |`.
"""

import ast
import re

import pytest
from conftest import ROOT

NUMBERS = r"\(?\d+\b\)?(?:-\(?\d+\b\)?)?"  # 4, 4-5, (4), (4)-(6)
LIST = rf"{NUMBERS}(?:(?:, | and ){NUMBERS})*"
CITED = {"Eq.": rf"Eq\. (?=\()({LIST})", "line": rf"\b[Ll]ines? ({LIST})"}
EQUATIONS = {*range(1, 18)} - {7}  # (7), on parameters, is background
LINES = {*range(3, 34)}  # of Algorithm 1; 1 and 2 are its input and output


def cited(text):
    """What a text cites: ("Eq.", n) and ("line", n), ranges in full."""
    found = set()
    for kind, pattern in CITED.items():
        for match in re.findall(pattern, text):
            for first, last in re.findall(r"(\d+)\)?(?:-\(?(\d+))?", match):
                found |= {(kind, n) for n in range(int(first), int(last or first) + 1)}
    return found


def paper_map():
    """The rows that cite equations or lines: what they cite, and [(file, name), ...]."""
    section = (ROOT / "README.md").read_text().split("## Paper map")[1].split("\n## ")[0]
    rows = []
    for left, right in re.findall(r"^\| (.+?) \| (.+) \|$", section, re.M):
        places = [
            (file, name)
            for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", right)
            for name in re.findall(r"`([\w.]+)`", names)
        ]
        if cited(left):
            rows.append(pytest.param(cited(left), places, id=left))
    return rows


ROWS = paper_map()


def source_of(file, name):
    """The lines of a function, a class or a method; AssertionError if there is none."""
    text, nodes = (ROOT / file).read_text(), None
    for part in name.split("."):
        nodes = ast.parse(text).body if nodes is None else nodes.body
        nodes = next((x for x in nodes if getattr(x, "name", "") == part), None)
        assert nodes is not None, f"{file} has no {name}"
    return "\n".join(text.splitlines()[nodes.lineno - 1 : nodes.end_lineno])


def test_every_equation_and_every_line_is_in_the_map():
    """Eq. (1) to (17) but the background of (7), and lines 3 to 33 of Algorithm 1."""
    wanted = {("Eq.", n) for n in EQUATIONS} | {("line", n) for n in LINES}
    assert not wanted - set.union(*(row.values[0] for row in ROWS))


@pytest.mark.parametrize("wanted, places", ROWS)
def test_what_the_map_names_exists_and_cites_it(wanted, places):
    """A row's equations and lines stand in the code it names, and each place cites one of them."""
    found = {place: cited(source_of(*place)) for place in places}
    assert not wanted - set.union(*found.values())
    assert not [place for place, citations in found.items() if not citations & wanted]


def test_citations_are_read_as_a_reader_reads_them():
    """Lists and ranges, of equations and of lines, in the ways that the code writes them."""
    text = "# Eq. (8), (12), (17): argmin; Eq. (13)-(15), Alg. 1 lines 4-5; line 9, Lines 16 and 24"
    equations = {("Eq.", n) for n in (8, 12, 13, 14, 15, 17)}
    assert cited(text) == equations | {("line", n) for n in (4, 5, 9, 16, 24)}
    assert cited("40 lines 4x, Eq. 7, newline 3, inline 5") == set()
