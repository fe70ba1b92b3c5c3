"""Which quantized models stock readers load: the forms refuse what they must, and the page says what the code does."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "quantization"))
import cells as table
import compatibility
import gguf_cells
from cells import FAMILIES, RECIPES, Cell
from compatibility import PAGE, Result, percent, run, run_gguf
from gguf_cells import COLUMNS, GgufCell, GgufResult

from surgeon.formats.scheme import Scheme

EXACT_KERNELS = ("int", "nvfp4", "mxfp4")
"""Kinds that compressed-tensors decodes before it multiplies."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return {family: table.shapes_of(table.source(family, tmp_path_factory.mktemp("source"))) for family in FAMILIES}  # fmt: skip


def as_expected(cell: Cell, result: Result, schemes: set[Scheme]) -> None:
    """What is not refused loads, computes what is meant and generates; what is refused and can be written does not."""
    if result.refused:
        assert not result.read, f"{cell} is refused, but its reader reads it"
        return
    assert result.error is None and result.unwritten is None and not result.faults, (cell, result)
    assert result.decoded < 1e-4 and result.generates, (cell, result)
    limit = 0.3 if cell.family in table.MIXTURES else 0.05
    if cell.form == table.CT:
        limit = 0.0 if all(scheme.kind in EXACT_KERNELS for scheme in schemes) else max(limit, 0.2)
    assert result.as_run <= limit, (cell, result.as_run)


def check(results: dict[Cell, Result], shapes) -> None:
    for cell, result in results.items():
        schemes = {scheme for scheme in table.modules_of(cell, shapes[cell.family]).values() if scheme}
        as_expected(cell, result, schemes)


HANDFUL = [
    Cell("int8 rows, int4g32, int4g64, int3g32, int2g32 mixed", "qwen2, tied"),
    Cell("nf4, some modules plain", "qwen2, tied"),
    Cell("auto-round int8g32, int3g64, int2g32, int4g32 mixed", "qwen2, tied"),
    Cell("experts int3g32, other modules int8", "olmoe"),
    Cell("auto-round experts of 8, 3, 2 and 4 bits, each matrix its own", "olmoe"),
    Cell("experts int4g32 or int8g32 by layer", "olmoe"),
    Cell("experts int4g32, down projections int8g32", "olmoe"),
    Cell("nf4 of a mixture", "olmoe"),
]  # fmt: skip


def test_a_handful(tmp_path, shapes):
    """A cell of each form, dense and with experts; refusals are right: written by force, the reader fails or is wrong."""
    results = run(HANDFUL, tmp_path)
    check(results, shapes)
    assert [bool(results[cell].refused) for cell in HANDFUL] == [False] * 5 + [True] * 3
    by_layer, by_matrix, mixture = (results[cell] for cell in HANDFUL[5:])
    assert by_layer.decoded > 0.05 and by_matrix.decoded > 0.05  # in silence: nothing missing, no error
    assert not by_layer.faults and not by_matrix.faults
    assert mixture.error


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_table(tmp_path, shapes, family):
    check(run([cell for cell in table.cells() if cell.family == family], tmp_path), shapes)


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"
)

GGUF_HANDFUL = [
    GgufCell("llama", "Q4_K"),
    GgufCell("qwen2, tied", "mixed"),
    GgufCell("qwen3_moe", "Q5_1"),
    GgufCell("llama, layers of different sizes", "MXFP4"),
    GgufCell("mistral, sliding window", "Q8_0"),
]


def as_llama_cpp_runs_it(cell: GgufCell, result: GgufResult) -> None:
    """What is written computes what is meant, generates, and differs from its numbers by the rounding of inputs alone."""
    assert result.error is None and result.read and result.generates, (cell, result)
    limit = 0.3 if cell.family.startswith(("mixtral", "qwen3_moe")) else 0.1  # routers choose otherwise
    assert 1e-3 < result.as_run < limit and result.same >= 0.8 * result.tokens, (cell, result)


@needs_llama_cpp
def test_a_handful_of_gguf(tmp_path):
    """Dense, mixed, experts, layers that differ; each by the command that takes it; a refusal."""
    results = run_gguf(GGUF_HANDFUL, tmp_path)
    for cell in GGUF_HANDFUL[:-1]:
        as_llama_cpp_runs_it(cell, results[cell])
    assert [results[cell].way for cell in GGUF_HANDFUL] == ["export", "quantize", "quantize", "export", ""]
    assert "slides its attention window" in str(results[GGUF_HANDFUL[-1]].refused)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", gguf_cells.FAMILIES)
def test_the_whole_table_of_gguf(tmp_path, family):
    results = run_gguf([cell for cell in gguf_cells.cells() if cell.family == family], tmp_path)
    refused = {cell for cell, result in results.items() if result.refused}
    assert refused in (set(), set(results)), refused
    for cell in results.keys() - refused:
        as_llama_cpp_runs_it(cell, results[cell])


@needs_llama_cpp
def test_a_wrong_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cells.gguf, "_turned", lambda rows, piece: rows)
    (result,) = run_gguf([GgufCell("llama", "Q8_0")], tmp_path).values()
    assert not result.read and result.exact > 0.05 and result.refused is None


def test_the_page_has_every_family_and_type_of_gguf(tmp_path):
    head, *body = rows("gguf")
    assert head == ["family", *COLUMNS] and [row[0].removesuffix(" *") for row in body] == list(
        gguf_cells.FAMILIES
    )
    whole = {row[0].removesuffix(" *"): row[1:] for row in body}
    for family, found in whole.items():
        assert found == ["refused"] * len(COLUMNS) or all(
            re.fullmatch(r"\d+(\.\d+)? %", one) for one in found
        ), family
    reasons = {
        what.partition(": every type")[0]: why
        for form, what, why, _ in rows("Refusals")[1:]
        if form == "gguf"
    }
    assert reasons.keys() == {family for family, found in whole.items() if found[0] == "refused"}
    for number, family in enumerate(("llama", "qwen2, layers of different sizes", "gemma2", "olmoe", "gpt2")):
        way, why = gguf_cells.way_of(gguf_cells.source(family, tmp_path / str(number)), "Q4_0")
        assert why == reasons.get(family) and (way is None) == (whole[family][0] == "refused")
        assert (way == "export") == (f"{family} *" in [row[0] for row in body])


@pytest.mark.slow
def test_the_page_gives_the_reasons_of_the_code_for_gguf(tmp_path):
    reasons = {
        what.partition(": every type")[0]: why
        for form, what, why, _ in rows("Refusals")[1:]
        if form == "gguf"
    }
    for number, family in enumerate(gguf_cells.FAMILIES):
        _, why = gguf_cells.way_of(gguf_cells.source(family, tmp_path / str(number)), "Q4_0")
        assert why == reasons.get(family), family


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of the page, without its head."""
    text = PAGE.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines if not re.fullmatch(r"[|\- ]+", line)]  # fmt: skip


def test_the_page_lists_the_cells_and_refusals_of_the_code(shapes):
    known = {str(cell) for cell in table.cells()}
    seen = set()
    for form in (table.CT, table.AR, table.BNB):
        head, *body = rows(form)
        assert head[1:-1] == list(FAMILIES)
        for recipe, *found, vllm in body:
            assert RECIPES[recipe].form == form
            assert vllm == compatibility.vllm(recipe, shapes)
            for family, value in zip(FAMILIES, found, strict=True):
                cell = Cell(recipe, family)
                assert (str(cell) in known) == bool(value), cell
                if value:
                    seen.add(str(cell))
                    refused = bool(table.refusals(cell, shapes[family]))
                    assert (value == "refused") == refused, cell
                    assert refused or re.fullmatch(r"0|\d+(\.\d+)? %", value), cell
    assert seen == known


def test_the_page_gives_the_reasons_of_the_code(shapes):
    listed = {(form, recipe): why for form, recipe, why, _ in rows("Refusals")[1:] if form != "gguf"}
    wanted = {}
    for cell in table.cells():
        found = table.refusals(cell, shapes[cell.family])
        if found:
            wanted.setdefault((cell.form, cell.recipe), found[0].message.replace("|", " "))
    assert listed == wanted


def test_choices_never_offer_what_is_refused(shapes):
    """What an allocator may choose has no scheme that the form refuses for a single matrix."""
    for family in ("llama, tied", "mixtral", "deepseek_v3"):
        for form in (table.CT, table.AR, table.BNB):
            recipe = next(name for name, one in RECIPES.items() if one.form == form)
            made = table.form_of(Cell(recipe, family))
            matrices = {n: s for n, s in shapes[family].items() if len(s) == 2}
            menu = [Scheme("int", 4, 32), Scheme("int", 8, 32), Scheme("int", 4, 32, False), table.FLOAT8, table.NVFP4, *_bnb(), None]  # fmt: skip
            for alternative in made.choices(matrices, menu):
                assert sorted(n for choice in alternative for n in choice.names) == sorted(matrices)
                for choice in alternative:
                    for scheme in choice.schemes:
                        if scheme is not None:
                            one = {n: (matrices[n], scheme) for n in choice.names}
                            assert made.refusals(one) == [], (family, form, choice.names[0], scheme)


def _bnb() -> list[Scheme]:
    return [table.bnb.NF4, table.bnb.INT8]


def test_figures():
    assert [percent(v) for v in (0, 0.00012, 0.0123, 0.3)] == ["0", "0.012 %", "1.2 %", "30 %"]
    assert Result(decoded=0.0, as_run=0.01).read and not Result(decoded=0.2).read
    assert (
        not Result(decoded=0.0, faults={"missing_keys": 1}).read and not Result(error="x", decoded=0.0).read
    )
    assert "wrong in silence" in Result(decoded=0.2).fate()
