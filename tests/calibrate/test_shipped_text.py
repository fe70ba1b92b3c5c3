"""The calibration text in the package: sizes, sums, rights, and whether its mathematics is right.

The answers are worked out again here from the words of the questions alone, by other means than
the generator's, and every equation in a solution is evaluated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from surgeon.calibrate.data import load
from surgeon.calibrate.shipped import DOMAINS, FOLDER, NAME, VERSION, shipped_records

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "models" / "long"

SUMS = {  # name -> (sha256, records); a change here needs a new VERSION
    "chat.jsonl": ("46aa138f42f0d2ef63c1816aed553149913447fe1ffa769f11b3ee612eeb7084", 248),
    "code.jsonl": ("37259baf190e277b21ce6889fccc74b05c0e84af6b2a5e3be634b6467917aa53", 103),
    "mathematics.jsonl": ("dce212c2b82761f96f70395e3b1c95d465efecdf0c28c56e239af1ef79eb078c", 285),
    "prose.jsonl": ("f34bb35f053da624572269807241b7deb0a456027c9e2858de16aa17f9f513bd", 135),
}


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


MATHEMATICS = read("mathematics.jsonl")


@pytest.mark.parametrize("name", SUMS)
def test_a_shipped_file_is_the_one_that_was_reviewed(name):
    raw = (FOLDER / name).read_bytes()
    assert (hashlib.sha256(raw).hexdigest(), raw.count(b"\n")) == SUMS[name], (
        "raise VERSION in shipped.py with every change"
    )
    assert VERSION == "1"
    assert {r["domain"] for r in read(name)} == {name.removesuffix(".jsonl")}


def test_the_text_is_about_a_megabyte_in_four_domains():
    sizes = {name: (FOLDER / name).stat().st_size for name in SUMS}
    assert 900_000 < sum(sizes.values()) < 1_200_000 and min(sizes.values()) > 150_000
    assert sorted(p.name for p in FOLDER.glob("*.jsonl")) == sorted(SUMS)
    assert sorted(name.removesuffix(".jsonl") for name in SUMS) == list(DOMAINS)


def test_every_title_is_in_the_readme_and_every_licence_lies_beside_it():
    readme = (FOLDER / "README.md").read_text("utf-8")
    for name in ("prose.jsonl", "code.jsonl"):
        for title in {r["title"] for r in read(name)}:
            head = title.split(",")[0]
            assert head in readme or head == "own writing", title
    for file, words in (
        ("python.txt", "PYTHON SOFTWARE FOUNDATION LICENSE"),
        ("brotli.txt", "Brotli Authors"),
        ("lodash.txt", "OpenJS Foundation"),
    ):
        assert words in (FOLDER / "LICENCES" / file).read_text() and f"LICENCES/{file}" in readme


def test_no_header_of_an_edition_and_no_trademark_is_left():
    for record in read("prose.jsonl"):
        assert not re.search(r"gutenberg|\betexts?\b|all rights reserved", record["text"], re.IGNORECASE), (
            record["title"]
        )


def test_no_text_occurs_twice():
    for name in SUMS:
        texts = [json.dumps(r, sort_keys=True) for r in read(name)]
        assert len(set(texts)) == len(texts)
    prompts = [r["prompt"] for r in MATHEMATICS]
    assert len(set(prompts)) == len(prompts)


def test_mathematics_and_conversations_can_be_made_again():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import make_texts, json\n"
        "sys.stdout.buffer.write(json.dumps(make_texts.generated()).encode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks/calibrate")], capture_output=True, check=True
    )
    for name, text in json.loads(done.stdout).items():
        assert (FOLDER / name).read_bytes() == text.encode(), name


# --- the mathematics is right ----------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"(?<![\w.])-?\d+", text)]


def solved(kind: str, prompt: str) -> str:
    """Answer a question from its words; search and libraries instead of the school's methods."""
    n = numbers(prompt)
    if kind == "addition":
        return str(sum(n))
    if kind == "multiplication":
        return str(int(np.prod(n)))
    if kind == "division":
        return f"quotient {n[0] // n[1]}, remainder {n[0] % n[1]}"
    if kind == "linear_equation":
        left, right = re.fullmatch(r"Solve (.*) = (.*) for x\.", prompt).groups()
        return next(f"x = {x}" for x in range(-500, 501) if value(left, x) == value(right, x))
    if kind == "linear_system":
        first, a, b, second = re.fullmatch(
            r"Solve the system x \+ y = (-?\d+), (\d+)x - (\d+)y = (-?\d+)\.", prompt
        ).groups()
        x, y = np.linalg.solve([[1, 1], [int(a), -int(b)]], [int(first), int(second)])
        return f"x = {round(x)}, y = {round(y)}"
    if kind == "quadratic":
        left = re.fullmatch(r"Find the roots of (.*) = 0\.", prompt)[1]
        roots = [x for x in range(-100, 101) if value(left, x) == 0]
        assert len(roots) == 2
        return f"x = {roots[0]} or x = {roots[1]}"
    if kind == "greatest_common_divisor":
        return str(max(d for d in range(1, min(n) + 1) if n[0] % d == n[1] % d == 0))
    if kind == "factorisation":
        left, found = n[0], []
        while left > 1:
            found.append(next(d for d in range(2, left + 1) if left % d == 0))
            left //= found[-1]
        return " × ".join(map(str, found))
    if kind == "modular_power":
        base, power, modulus = map(int, re.search(r"(\d+)\^(\d+) is divided by (\d+)", prompt).groups())
        return str(base**power % modulus)
    if kind == "series":
        first, step, count = n
        return str(sum(range(first, first + step * count, step)))
    if kind == "percentages":
        price, down, up = n
        return f"{float(price * (1 - Fraction(down, 100)) * (1 + Fraction(up, 100))):.2f} dollars"
    if kind == "journey":
        s, v, t, w = n
        return f"{sum([Fraction(v)] * s + [Fraction(w)] * t) / (s + t)} km/h"
    if kind == "shopping":
        a, p, b, q, paid = n
        return f"{paid - sum([p] * a) - sum([q] * b)} dollars"
    if kind == "committees":
        k, people = n
        return str(sum(1 for _ in itertools.combinations(range(people), k)))
    if kind == "right_triangle":
        a, b = n
        return f"hypotenuse {math.hypot(a, b):.0f}, area {a * b / 2:.0f}"
    if kind == "dice":
        hits = sum(a + b == n[-1] for a, b in itertools.product(range(1, 7), repeat=2))
        return str(Fraction(hits, 36))
    if kind == "derivative":
        a, b, c, x = map(
            int,
            re.fullmatch(
                r"Let f\(x\) = (\d+)x\^3 \+ (\d+)x\^2 - (\d+)x\. Find f'\((-?\d+)\)\.", prompt
            ).groups(),
        )
        return str(int(np.polyval(np.polyder([a, b, -c, 0]), x)))
    if kind == "binary":
        number, base = n
        digits = next(d for d in itertools.product(range(base), repeat=math.floor(math.log(number + 0.5, base)) + 1)
                      if sum(x * base**i for i, x in enumerate(reversed(d))) == number) if base > 2 else f"{number:b}"  # fmt: skip
        return "".join(map(str, digits))
    if kind == "mean_and_median":
        return f"mean {statistics.mean(n)}, median {statistics.median(n)}"
    raise AssertionError(f"no check for {kind}")


def value(text: str, x: int) -> int:
    """Evaluate a polynomial such as "3x^2 - x + 4" at x."""
    return eval(re.sub(r"(\d)x", r"\1*x", text).replace("^", "**"), {"__builtins__": {}}, {"x": x})


@pytest.mark.parametrize("kind", sorted({r["kind"] for r in MATHEMATICS}))
def test_the_answers_are_right(kind):
    records = [r for r in MATHEMATICS if r["kind"] == kind]
    assert len(records) == 15
    for record in records:
        expected = f"\n\nAnswer: {solved(kind, record['prompt'])}"
        assert record["short"].endswith(expected), (record["prompt"], expected, record["short"])
        assert record["long"].endswith(expected), (record["prompt"], expected, record["long"])


_RUN = re.compile(r"[-+×/^()=\d. ]+")


def equations(text: str) -> list[tuple[str, str]]:
    """Return both sides of every equation between plain numbers; those with letters are left out."""
    found = []
    for run in _RUN.finditer(text):
        sides = [side.strip(" .") for side in run[0].split("=")]
        if not run[0].startswith(" ") and text[: run.start()][-1:].strip():
            sides[0] = ""  # an argument, as in "f'(4) = 250"
        after = text[run.end() : run.end() + 1]
        if after.isalpha() and not run[0].endswith(" "):
            sides = sides[:-1]  # the last number is a coefficient, as in "= 13x"
        for left, right in itertools.pairwise(sides):
            if re.match(r"$|[+×/^)]|- ", left) or not right:
                continue  # what stands before the run is a part of it, as in "13x + 55 = -49"
            if left.count("(") == left.count(")") and right.count("(") == right.count(")"):
                found.append((left, right))
    return found


def arithmetic(text: str) -> Fraction:
    text = re.sub(r"\d+(?:\.\d+)?", lambda m: f"F('{m[0]}')", text.replace("×", "*").replace("^", "**"))
    return eval(text, {"__builtins__": {}}, {"F": Fraction})


def test_every_equation_in_the_solutions_holds():
    checked = 0
    for record in MATHEMATICS:
        for text in (record["short"], record["long"]):
            for left, right in equations(text):
                assert arithmetic(left) == arithmetic(right), (record["prompt"], f"{left} = {right}")
                checked += 1
    assert checked > 1500, checked


def test_the_equation_check_can_fail():
    assert equations("Step 1: 12 + 7 = 18. So 3x + 4 = 10 and 5 = 2x, thus 4 × (-3) - 2 = -14.") == [
        ("12 + 7", "18"),
        ("4 × (-3) - 2", "-14"),
    ]
    assert [arithmetic(a) == arithmetic(b) for a, b in equations("12 + 7 = 18.")] == [False]


def test_long_answers_reason_and_short_ones_do_not():
    for record in MATHEMATICS:
        assert len(record["long"]) > 2 * len(record["short"])
        assert re.search(r"double-check|verify|check this|re-examine", record["long"])
        assert not re.search(r"wait|let me", record["short"], re.IGNORECASE)


# --- as calibration text ---------------------------------------------------------------------------


def test_the_shipped_text_is_sampled_evenly_over_its_domains():
    pytest.importorskip("transformers")
    made = load(None, MODEL, samples=32, sequence_length=1024)
    assert made.record["name"] == NAME == "surgeon shipped text 1"
    assert made.record["domains"] == dict.fromkeys(DOMAINS, 8)
    assert [s.domain for s in made.samples[:4]] == list(DOMAINS)
    assert (
        made.record["sha256"]
        == hashlib.sha256("".join(f"{SUMS[n][0]}  {n}\n" for n in sorted(SUMS)).encode()).hexdigest()
    )
    assert all((s.answer_start > 0) == (s.domain in {"chat", "mathematics"}) for s in made.samples)
    assert not made.warnings
    other = load(None, MODEL, samples=32, sequence_length=1024, seed=1)
    assert other.record["ids_sha256"] != made.record["ids_sha256"]


@pytest.mark.parametrize("answer", ["short", "long"])
def test_short_and_long_answers_come_from_the_mathematics(answer):
    pytest.importorskip("transformers")
    assert len(shipped_records(answer).records) == 285 and len(shipped_records().records) == 771
    made = load(None, MODEL, samples=10, answer=answer)
    assert made.record["domains"] == {"mathematics": 10}
    by_line = {line: record for line, record in enumerate(MATHEMATICS, 1)}
    decode = load_decoder()
    for sample in made.samples:
        assert decode(sample.ids[sample.answer_start :]) == by_line[sample.line][answer] + "<|eos|>"


def load_decoder():
    from surgeon.calibrate.tokens import load_encoder

    return load_encoder(MODEL).tokenizer.decode


def test_every_shipped_conversation_fits_a_template():
    pytest.importorskip("transformers")
    made = load(None, MODEL, samples=2000, sequence_length=1024)
    assert made.record["samples"] == 771 and made.record["dropped"] == 0
