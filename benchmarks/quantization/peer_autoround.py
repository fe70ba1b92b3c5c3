"""AutoRound's AutoScheme on one model: ``python peer_autoround.py MODEL CALIBRATION OUT --bits 3.0``.

Its own loss (delta loss), its own budget (average bits of the quantized matrices, scales and zero points counted) and
its own solver choose among W2A16, W3A16, W4A16 and W8A16 of one group size; its own tuning (SignRound) or rounding finds
the codes. Without ``--bits``, one width for all: ``--uniform 4``. Written in its own format.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme
from auto_round.schemes import QuantizationScheme


def scheme(bits: int, group: int) -> QuantizationScheme:
    """Return what it calls W{bits}A16 of a group size."""
    return QuantizationScheme.from_dict(
        {"bits": bits, "sym": True, "group_size": group, "data_type": "int", "act_bits": 16}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="AutoRound's AutoScheme on one model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="JSONL with text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=float, help="average, with scales and zero points")
    parser.add_argument("--uniform", type=int, help="one width for all")
    parser.add_argument("--widths", default="2,3,4,8")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument(
        "--iters", type=int, default=200, help="steps of tuning a block; 0 rounds to nearest, its way"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.uniform:
        wanted = scheme(given.uniform, given.group)
    else:
        wanted = AutoScheme(
            avg_bits=given.bits, options=[scheme(int(width), given.group) for width in given.widths.split(",")],
            nsamples=given.samples, seqlen=given.length, dataset=str(given.calibration),
        )  # fmt: skip
    begun = time.perf_counter()
    rounder = AutoRound(
        str(given.model), scheme=wanted, dataset=str(given.calibration), nsamples=given.samples, seqlen=given.length,
        iters=given.iters, device_map="cpu", enable_torch_compile=False, batch_size=8,
    )  # fmt: skip
    rounder.quantize_and_save(str(given.out), format="auto_round")
    found = next(given.out.rglob("config.json")).parent
    print(json.dumps({"folder": str(found), "seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
