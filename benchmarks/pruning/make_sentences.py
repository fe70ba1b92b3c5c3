"""Write the sentences of the encoder benchmark: 1,024 to calibrate with and 256 others to evaluate.

They are English sentences of 8 to 40 words from the prose that ships with surgeon
(surgeon/calibrate/texts/prose.jsonl; its rights are in text/README.md). The order is that of their sha256; no
source gives more than 200 of the first 768 (512 and the 256), and no more than 500 in all; none occurs twice.

    python benchmarks/pruning/make_sentences.py
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROSE = HERE.parents[1] / "surgeon" / "calibrate" / "texts" / "prose.jsonl"
FIRST, EVALUATION, MORE = 512, 256, 512
MOST_FROM_ONE, MOST_IN_ALL = 200, 500


def sources() -> dict[str, str]:
    """Return the texts by source: a book, or all entries of one collection."""
    found: dict[str, list[str]] = {}
    for line in PROSE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(re.split(r"[,:]", record["title"])[0], []).append(record["text"])
    return {
        title: "\n\n".join(texts) for title, texts in found.items() if not title.startswith("own writing")
    }


def sentences(text: str) -> list[str]:
    """Return the sentences of 8 to 40 words of plain letters."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = re.sub(r"\s+", " ", paragraph)
        for sentence in re.split(r"(?<=[.!?])['\"]? +(?=[A-Z`'\"])", flat):
            words = sentence.split()
            plain = sentence.isascii() and sentence[:1].isupper() and sentence[-1:] in ".!?"
            if plain and 8 <= len(words) <= 40 and not re.search(r"[{}<>_=\[\]|]|\.\.", sentence):
                found.append(sentence)
    return found


def main() -> None:
    pool = {s: title for title, text in sources().items() for s in sentences(text)}
    order = sorted(pool, key=lambda s: hashlib.sha256(s.encode()).hexdigest())
    taken: Counter[str] = Counter()
    head = _take(order, pool, taken, MOST_FROM_ONE, FIRST + EVALUATION)
    tail = _take([s for s in order if s not in set(head)], pool, taken, MOST_IN_ALL, MORE)
    parts = {"calibration": [*head[:FIRST], *tail], "evaluation": head[FIRST:]}
    for name, part in parts.items():
        (HERE / "text" / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    for title, count in Counter(pool[sentence] for part in parts.values() for sentence in part).most_common():
        print(count, title)


def _take(order: list[str], pool: dict[str, str], taken: Counter[str], most: int, wanted: int) -> list[str]:
    """Return the next sentences whose sources have not given too many."""
    chosen = []
    for sentence in order:
        if len(chosen) < wanted and taken[pool[sentence]] < most:
            taken[pool[sentence]] += 1
            chosen.append(sentence)
    assert len(chosen) == wanted, f"only {len(chosen)} sentences"
    return chosen


if __name__ == "__main__":
    main()
