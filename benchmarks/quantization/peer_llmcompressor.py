"""llm-compressor's GPTQ on one model, in its own environment: ``python peer_llmcompressor.py MODEL CALIBRATION OUT --bits 4``.

GPTQModifier with its defaults (order of activations with static groups, damping 0.01, blocks of 128), one symmetric
scheme for all linear layers but the head. ``--observer memoryless_mse`` searches the range of each group.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="llm-compressor's GPTQ on one model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="JSONL with text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument(
        "--observer", default="memoryless_minmax", choices=("memoryless_minmax", "memoryless_mse")
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = [json.loads(line)["text"] for line in given.calibration.read_text().splitlines()][: given.samples]
    rows = [
        tokenizer(text, truncation=True, max_length=given.length, add_special_tokens=False).input_ids
        for text in texts
    ]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    weights = QuantizationArgs(
        num_bits=given.bits, type="int", symmetric=True, strategy="group", group_size=given.group,
        observer=given.observer,
    )  # fmt: skip
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    begun = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=given.length, num_calibration_samples=len(rows),
            shuffle_calibration_samples=False)  # fmt: skip
    model.save_pretrained(given.out, save_compressed=True)
    tokenizer.save_pretrained(given.out)
    print(json.dumps({"folder": str(given.out), "seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
