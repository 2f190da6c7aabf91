"""The picture of docs/evidence.md shows the differences of the published cells."""

import re
from statistics import fmean

import pytest

from docs import picture
from helpers import text_of

SVG = text_of(picture.PICTURE)
DRAWS = 16


def numbers(pattern):
    """Return the numbers that a pattern finds in the picture, as one tuple for each place."""
    return [tuple(map(float, found.groups())) for found in re.finditer(pattern, SVG)]


def nats(x):
    """Return the difference at a place of the picture, by two numbers of its scale."""
    lines = numbers(r'<text x="([\d.]+)" y="[\d.]+" class="middle">([-+]0\.\d+)</text>')
    (x1, value1), (x2, value2) = lines[0], lines[-1]
    return value1 + (x - x1) / (x2 - x1) * (value2 - value1)


def test_the_picture_is_that_of_the_cells():
    assert picture.picture(picture.COMPARISONS) == SVG


def test_dots_and_lines_stand_where_the_numbers_say():
    shown = numbers(r">([-+]0\.\d+) \[([-+]0\.\d+), ([-+]0\.\d+)\]</text>")
    dots = numbers(r'<circle cx="([\d.]+)" .* class="draw"/>')
    means = numbers(r'<circle cx="([\d.]+)" .* class="mean"/>')
    intervals = numbers(r'<line x1="([\d.]+)" .* x2="([\d.]+)" .* class="interval"/>')
    assert len(shown) == len(means) == len(intervals) == len(picture.COMPARISONS)
    assert len(dots) == DRAWS * len(shown)
    for i, (mean, low, high) in enumerate(shown):
        draws = [nats(x) for [x] in dots[DRAWS * i : DRAWS * (i + 1)]]
        assert fmean(draws) == pytest.approx(mean, abs=6e-4)
        places = (*means[i], *intervals[i])
        assert [nats(x) for x in places] == pytest.approx([mean, low, high], abs=6e-4)


def test_the_evidence_has_the_numbers_of_the_picture():
    evidence = text_of("docs/evidence.md")
    assert "](differences.svg)" in evidence
    for comparison in picture.COMPARISONS:
        shown = picture.signed(picture.interval_of(picture.differences(comparison)))
        assert f"| {shown} |" in evidence
