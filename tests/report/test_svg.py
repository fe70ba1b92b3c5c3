"""The plot: well-formed, labels apart, safe names, equal bytes."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import sample_results
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.report import plot, render, scatter, svg
from surgeon.report.labels import Box, Wanted, place, shortened, text_width
from surgeon.report.pareto import Point
from surgeon.report.scatter import Dot
from surgeon.report.summary import summarise

NS = "{http://www.w3.org/2000/svg}"


def sample(**options) -> str:
    return render(sample_results.results(), "svg", **options).decode()


def test_it_is_xml_with_title_description_and_all_models():
    root = ET.fromstring(sample())
    assert root.tag == f"{NS}svg" and root.get("role") == "img"
    ids = root.get("aria-labelledby").split()
    named = {e.get("id"): e.text for e in root.iter() if e.get("id")}
    assert all(named[i] for i in ids)
    assert "ties 0.05 89.0%, 57 tokens" in named[ids[1]]
    texts = [e.text for e in root.iter(f"{NS}text")]
    for name in sample_results.MEASURED:
        assert name in texts
    assert "98.0%, 214 tokens" in texts
    details = [e.text for e in root.iter(f"{NS}title")]
    assert any(
        d.startswith("ties 0.1: 86.0%, 118 tokens; accuracy 80.5–90.1%; tokens 108–128") for d in details
    )


def test_colours_follow_the_reader_and_nothing_is_fetched():
    text = sample()
    assert "@media screen and (prefers-color-scheme:dark)" in text and "var(--s1)" in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg") == 1
    assert "<script" not in text and "url(" not in text and "@import" not in text


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("table", [svg.LIGHT, svg.DARK])
def test_contrast_of_text_and_marks(table):
    assert set(svg.LIGHT) == set(svg.DARK)
    for role in ("ink", "muted"):
        assert contrast(table[role], table["paper"]) >= 4.5
    for role in ("front", "s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(table[role], table["paper"]) >= 3


def test_equal_bytes_whatever_the_hash_seed():
    code = (
        "import sys, json, hashlib; from surgeon.report import render; d = json.load(sys.stdin); "
        "print([hashlib.sha256(render(d, f)).hexdigest() for f in ('svg', 'html', 'markdown')])"
    )
    document = json.dumps(sample_results.results())
    runs = [
        subprocess.run([sys.executable, "-c", code], input=document, capture_output=True, text=True, check=True,
                       env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]


def dots(count: int, seed: int) -> list[Dot]:
    draw = random.Random(seed)
    found = []
    for i in range(count):
        tokens, accuracy = draw.uniform(40, 300), draw.uniform(0.5, 1)
        name = "model " + "x" * draw.randrange(1, 40) + str(i)
        found.append(
            Dot(name, Point(tokens, accuracy, tokens * 0.95, tokens * 1.05, accuracy * 0.95, min(1, accuracy * 1.03)),
                i % 9, i == 0, f"{accuracy:.1%}, {tokens:.0f} tokens")
        )  # fmt: skip
    return found


SERIES = [f"series {i}" for i in range(9)]


@pytest.mark.parametrize("style", [scatter.WIDE, scatter.NARROW])
@pytest.mark.parametrize("seed", range(6))
def test_no_label_over_another_over_a_marker_or_outside(style, seed):
    models = dots(5 + 7 * seed, seed)
    scene = scatter.layout(models, SERIES, style=style, iso_lines=seed % 2 == 0, log_tokens=seed % 3 == 0)
    boxes = [b for b in scene.boxes if b is not None]
    assert len(boxes) >= min(4, len(models))
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlap(b)
    circle = [m for m in scene.items if isinstance(m, scatter.Marker) and m.detail]
    assert len(circle) == len(models)
    for box in boxes:
        assert Box(0, 0, style.width, style.height).holds(box)
        assert not any(box.overlap(Box(m.x - 5, m.y - 5, 10, 10)) for m in circle)


def test_crowded_models_on_the_front_are_named_first():
    models = dots(60, 3)
    scene = scatter.layout(models, SERIES)
    best = set(scatter.front([d.point for d in models]))
    left_out = [i for i, b in enumerate(scene.boxes) if b is None]
    named = len(best - set(left_out)) / len(best)
    assert left_out and named >= 0.8 > 1 - len(left_out) / len(models)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 300), st.integers(5, 150)), max_size=25))
def test_placement_never_overlaps(labels):
    wanted = [Wanted(x, y, w, 14) for x, y, w in labels]
    bounds = Box(0, 0, 400, 300)
    found = [b for b in place(wanted, bounds, solid=[Box(100, 100, 50, 50)]) if b is not None]
    for a, b in itertools.combinations(found, 2):
        assert not a.overlap(b)
    assert all(bounds.holds(b) and not b.overlap(Box(100, 100, 50, 50)) for b in found)


def test_a_single_label_goes_beside_its_point():
    (found,) = place([Wanted(100, 100, 50, 14)], Box(0, 0, 400, 300))
    assert found == Box(111, 93, 50, 14)


def test_text_widths_cover_a_wide_font():
    pytest.importorskip("matplotlib")
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    for text in ("ties density=0.05", "WWMM@%", "illicit fit", "dare-ties lambda 0.7", "98.0%, 214 tokens"):
        path = TextPath((0, 0), text, size=13, prop=FontProperties(family="DejaVu Sans"), usetex=False)
        assert text_width(text, 13) >= 0.93 * path.get_extents().width


def test_shortened_keeps_both_ends():
    assert shortened("abc", 3) == "abc"
    assert shortened("density=0.05-lambda=0.7", 11) == "densi…a=0.7"
    assert len(shortened("x" * 100, 11)) == 11


def test_36_series_differ_in_colour_or_shape():
    assert len({scatter.look(i) for i in range(36)}) == 36


@pytest.mark.parametrize(
    "points",
    [
        [Point(0, 0)],
        [Point(100, 1)],
        [Point(5, 0.5), Point(5, 0.5)],
        [Point(1e-3, 0.1), Point(1e7, 0.9)],
        [Point(0, 0.3, 0, 0, 0.3, 0.3), Point(10, 0.4, -0.0, 20, 0.0, 1.0)],
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_degenerate_points(points, log):
    found = [Dot(f"m{i}", p) for i, p in enumerate(points)]
    for style in (scatter.WIDE, scatter.NARROW):
        text = svg.draw(scatter.layout(found, ["models"], style=style, log_tokens=log, iso_lines=True))
        ET.fromstring(text)
        assert "nan" not in text and "inf" not in text


def test_log_axis_and_iso_lines_are_drawn_when_asked():
    assert "(logarithmic)" in sample(log_tokens=True) and "(logarithmic)" not in sample()
    assert "accuracy per 1,000 tokens" in sample(iso_lines=True) and "dotted" not in sample()


def test_iso_lines_lie_where_accuracy_per_thousand_tokens_is_equal():
    models = [Dot("a", Point(100, 0.5)), Dot("b", Point(400, 0.9))]
    scene = scatter.layout(models, ["models"], iso_lines=True)
    xs = {m.detail[0]: (m.x, m.y) for m in scene.items if isinstance(m, scatter.Marker) and m.detail}
    per_pixel_x = 300 / (xs["b"][0] - xs["a"][0])
    per_pixel_y = 0.4 / (xs["a"][1] - xs["b"][1])
    lines = [i for i in scene.items if isinstance(i, scatter.Line) and i.role == "iso"]
    assert len(lines) >= 2
    for line in lines:
        found = [
            (0.5 + (xs["a"][1] - y) * per_pixel_y) / (100 + (x - xs["a"][0]) * per_pixel_x) * 1000
            for x, y in line.points
        ]
        assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


def test_png_shows_the_same_scene():
    pytest.importorskip("matplotlib")
    first, second = (render(sample_results.results(), "png") for _ in range(2))
    assert first == second and first.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(first[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (2000, 1040)
    import io

    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(first))[..., :3]
    scene = plot.scene(summarise(sample_results.results()))
    for marker in (m for m in scene.items if isinstance(m, scatter.Marker) and m.detail and m.filled):
        colour = [int(svg.LIGHT[marker.role][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert pixels[round(2 * marker.y), round(2 * marker.x)] == pytest.approx(colour, abs=0.02)
