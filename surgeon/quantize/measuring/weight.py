"""Relative errors of weights: needs neither text nor gradient.

    loss = parameters * |D|^2 / |W|^2

Source: HIGGS (arXiv 2411.17525) with all coefficients 1. Integers are rounded to nearest here whatever the method is, since
without text there is no Hessian.
"""

from __future__ import annotations

from dataclasses import replace

from surgeon.calibrate.matrices import read_matrix
from surgeon.quantize.allocation.sensitivity import Sensitivities, weight_error
from surgeon.quantize.measuring.deltas import Quantizer
from surgeon.quantize.measuring.job import Job


def measured(job: Job) -> Sensitivities:
    """Return the table of all matrices."""
    quantizer = Quantizer(job.form, job.menu, replace(job.options, method="rtn"))
    for layer, matrices in enumerate(job.layers):
        job.check_stop()
        if not job.done(layer):
            losses = job.rows(matrices)
            shared = quantizer.shared_scales(job.checkpoint, matrices)
            for row, matrix in enumerate(matrices):
                weight = read_matrix(job.checkpoint, matrix)
                for _, place, delta in quantizer.deltas({matrix: weight}, None, shared):
                    losses[row, place] = weight_error(weight.numpy(), delta.numpy())
            job.keep(layer, losses, [0] * len(matrices))
        job.tell("weights", layer + 1, len(job.layers))
    return job.together()
