"""One program's GPTQ, run by `layer_speed.py` in that program's own environment: ``python layer_worker.py NAME``.

Reads one job a line from standard input (JSON), answers one line each. Jobs and answers are described at `serve`.
Needs torch, safetensors and the program called NAME; nothing of the others.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CHUNK = 2048
"""Tokens that arrive at once, as one sequence of a calibration text would."""


class Surgeon:
    """surgeon.quantize.gptq."""

    scale = "BF16"

    def __init__(self) -> None:
        from surgeon.formats.scheme import Scheme
        from surgeon.quantize import gptq
        from surgeon.quantize.moments import Moments

        self.scheme, self.gptq, self.moments = Scheme, gptq, Moments

    def prepare(self, weight, job):
        return weight

    def matrix(self, weight, hessian, job):
        wanted = self.scheme("int", job["bits"], job["group"])
        factor = self.gptq.factorise(hessian, order="static-act", group=job["group"], damp=job["damp"])
        codes, _ = self.gptq.quantize_with(weight, factor, wanted, scale_dtype=self.scale, clip=job["clip"])
        return codes

    def layer(self, weights, inputs, feeds, job):
        """Matrices that read the same inputs share their Hessian and its factor."""
        wanted, made = self.scheme("int", job["bits"], job["group"]), {}
        for source, tokens in inputs.items():
            sums = self.moments.empty(tokens.shape[1])
            for part in tokens.split(CHUNK):
                sums.add(part)
            factor = self.gptq.factorise(
                sums.hessian, order="static-act", group=job["group"], damp=job["damp"]
            )
            for name, fed in feeds.items():
                if fed == source:
                    made[name], _ = self.gptq.quantize_with(
                        weights[name], factor, wanted, scale_dtype=self.scale, clip=job["clip"]
                    )
        return made

    def result(self, made, job):
        codes = torch.from_numpy(made.codes).to(torch.int16) - torch.from_numpy(made.zeros).to(
            torch.int16
        ).repeat_interleave(job["group"], 1)
        return codes.to(torch.int16), torch.from_numpy(made.scales)


class SurgeonHalf(Surgeon):
    """The same with scales in float16, which GPTQModel stores."""

    scale = "F16"


class LLMCompressor:
    """The functions GPTQModifier calls, in its order (llmcompressor 0.14.0, modifiers/gptq/base.py)."""

    def __init__(self) -> None:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
        from llmcompressor.modifiers.gptq import gptq_quantize, helpers
        from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe

        self.arguments, self.scheme, self.initialize = (
            QuantizationArgs,
            QuantizationScheme,
            initialize_module_for_quantization,
        )
        self.observer, self.observe, self.helpers, self.quantize = (
            initialize_observer,
            observe,
            helpers,
            gptq_quantize.quantize_weight,
        )

    def prepare(self, weight, job):
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").to(weight.dtype)
        module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        wanted = self.arguments(
            num_bits=job["bits"], type="int", symmetric=True, strategy="group", group_size=job["group"],
            actorder="static", observer="memoryless_mse" if job["clip"] else "memoryless_minmax",
        )  # fmt: skip
        self.initialize(module, self.scheme(targets=["Linear"], weights=wanted))
        self.observer(module, "weight")
        return module

    def _solve(self, module, hessian, count, job):
        self.observe([module], base_name="weight")
        found = [module.weight_observer.get_qparams()]
        weights, hessians, scales, zeros, shared = self.helpers.prepare_batch(
            [module], found, {module: hessian}, {module: count}
        )
        made, _, fallback = self.quantize(
            weights=weights, hessians=hessians, scale=scales, zero_point=zeros, global_scale=shared,
            quant_args=module.quantization_scheme.weights, blocksize=128, percdamp=job["damp"],
        )  # fmt: skip
        if bool(fallback.any()):
            raise RuntimeError("rounded to nearest")
        self.helpers.update_batch_qparams(
            [module], made, scales, zeros, shared, module.quantization_scheme.weights
        )
        return module

    def matrix(self, module, hessian, job):
        with torch.no_grad():
            return self._solve(module, hessian, torch.ones(()), job)

    def layer(self, modules, inputs, feeds, job):
        """Every module accumulates a Hessian of its own, as the modifier's hooks do."""
        with torch.no_grad():
            sums = {name: self.helpers.make_empty_hessian(module) for name, module in modules.items()}
            counts = {name: torch.zeros(()) for name in modules}
            for name, source in feeds.items():
                for part in inputs[source].split(CHUNK):
                    sums[name], counts[name] = self.helpers.accumulate_hessian(
                        part, modules[name], sums[name], counts[name]
                    )
            return {
                name: self._solve(module, sums.pop(name), counts[name], job)
                for name, module in modules.items()
            }

    def result(self, made, job):
        scales = made.weight_scale.detach().float()
        wide = scales.repeat_interleave(job["group"], 1)
        # The weight holds code * scale rounded to bfloat16; the file stores the code.
        codes = (made.weight.detach().float() / wide).round()
        half = 2 ** (job["bits"] - 1)
        return codes.clamp_(-half, half - 1).to(torch.int16), scales


class GPTQModel:
    """gptqmodel.quantization.GPTQ (7.6.0), in the order of activations with static groups."""

    def __init__(self) -> None:
        from gptqmodel.quantization import GPTQ, QuantizeConfig

        self.gptq, self.config = GPTQ, QuantizeConfig

    def prepare(self, weight, job):
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").to(weight.dtype)
        module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        config = self.config(
            bits=job["bits"], group_size=job["group"], sym=True, desc_act=True, act_group_aware=False, static_groups=True,
            damp_percent=job["damp"], mse=2.4 if job["clip"] else 0.0,
        )  # fmt: skip
        task = self.gptq(module, config)
        task.quantizer.configure(perchannel=True)
        return task

    def _solve(self, task):
        found = task.quantize(blocksize=128)
        return task, found[0], found[1]

    def matrix(self, task, hessian, job):
        """The Hessian is given to it where one device has summed it up."""
        with torch.no_grad():
            device = torch.device("cpu")
            task._device_hessian_partials[device] = hessian
            task._device_sample_counts[device] = task.nsamples = job["tokens"]
            task._hessian_dirty = True
            return self._solve(task)

    def layer(self, tasks, inputs, feeds, job):
        with torch.no_grad():
            for name, source in feeds.items():
                for part in inputs[source].split(CHUNK):
                    tasks[name].add_batch(part[None], part[None])
            return {name: self._solve(task) for name, task in tasks.items()}

    def result(self, made, job):
        _, values, scales = made
        wide = scales.float().repeat_interleave(job["group"], 1)
        half = 2 ** (job["bits"] - 1)
        codes = (values.float() / wide).round().clamp_(-half, half - 1)
        return codes.to(torch.int16), scales.half().float()


PROGRAMS = {
    "surgeon": Surgeon,
    "surgeon-f16": SurgeonHalf,
    "llmcompressor": LLMCompressor,
    "gptqmodel": GPTQModel,
}


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux")


def settled() -> int:
    """Give freed memory back, forget the peak so far, and return what is resident now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def serve(program, job: dict) -> dict:
    """Do one job.

    Args:
        program: one of `PROGRAMS`.
        job: "problem" a safetensors file with ``weight.NAME`` [out, in] and ``inputs.SOURCE`` [tokens, in] or
            ``hessian.SOURCE`` [in, in] (mean of x x'); "feeds" {NAME: SOURCE}; "kind" "matrix" (from Hessians) or
            "layer" (from inputs); "bits", "group", "clip", "damp", "tokens"; "out" a file for codes and scales, or None.

    Returns:
        {"seconds": CPU time, "wall", "peak": bytes above what was resident with the problem in memory}.
    """
    held = load_file(job["problem"])
    weights = {name: held[f"weight.{name}"].clone() for name in job["feeds"]}
    sources = dict.fromkeys(job["feeds"].values())
    prepared = {name: program.prepare(weight, job) for name, weight in weights.items()}
    kind = "inputs" if job["kind"] == "layer" else "hessian"
    given = {source: held[f"{kind}.{source}"].clone() for source in sources}  # out of the mapped file
    del held, weights
    before = settled()
    cpu, wall = time.process_time(), time.perf_counter()
    if job["kind"] == "layer":
        made = program.layer(prepared, given, job["feeds"], job)
    else:
        made = {
            name: program.matrix(prepared[name], given[source], job) for name, source in job["feeds"].items()
        }
    answer = {
        "seconds": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "peak": resident("VmHWM") - before,
    }
    if job["out"]:
        found = {}
        for name, one in made.items():
            found[f"codes.{name}"], found[f"scales.{name}"] = (
                tensor.contiguous() for tensor in program.result(one, job)
            )
        save_file(found, job["out"])
    return answer


def main() -> None:
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    program = PROGRAMS[sys.argv[1]]()
    print(json.dumps({"ready": sys.argv[1]}), file=channel, flush=True)
    for line in sys.stdin:
        try:
            answer = serve(program, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main()
