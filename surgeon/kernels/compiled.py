"""The hot loops as machine code (numba), bit for bit what the NumPy paths compute.

Numbers travel as bits: 16-bit arrays hold bfloat16, 32-bit arrays hold float32, and ``shift`` (16 or
0) widens either. A block is worked in pieces that stay in the first-level cache: widen, subtract,
mask, elect, divide, round and pack happen on 2,048 entries at a time, so that memory is touched
once for each input and once for the result. Nothing here may be contracted or reassociated
(``fastmath`` stays off); loops are written so that the compiler can use vector instructions
without doing either.

Importing this module imports numba; only `surgeon.kernels.fused` does.
"""

from __future__ import annotations

import numpy as np
from numba import njit

PIECE = 2048
HIGH_BINS = 1 << 16
LANES = 64
OPTIONS = {"nogil": True, "cache": True, "boundscheck": False, "fastmath": False, "error_model": "numpy"}
INNER = njit(error_model="numpy", boundscheck=False, nogil=True)
INLINE = njit(inline="always")

U0 = np.uint32(0)
U1 = np.uint32(1)
U16 = np.uint32(16)
LOW = np.uint32(15)
HALF = np.uint32(0x7FFF)
TOP = np.uint32(0xFFFF0000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
LOW_MASK = np.uint32(0x7FFF)
F0 = np.float32(0)
F1 = np.float32(1)

# What happens to one task vector in `task_vectors`.
KEEP, DROP, ABOVE, BAND, RANDOM, RANKED = 0, 1, 2, 3, 4, 5


@INLINE
def _rounded(bits):
    """Round float32 bits to bfloat16, to nearest, ties to even; they stay 32 wide."""
    return np.uint32((bits + (HALF + ((bits >> U16) & U1))) & TOP)


@INNER
def _round_piece(bits, count):
    for j in range(count):
        bits[j] = _rounded(bits[j])


@INNER
def _load(source, shift, start, count, bits, narrow):
    piece = source[start : start + count]  # a slice: indices that may be negative cannot be vectorised
    for j in range(count):
        bits[j] = np.uint32(piece[j]) << shift
    if narrow:
        _round_piece(bits, count)


@INNER
def _store(bits, count, out, start, out_shift):
    piece = out[start : start + count]
    if out_shift:
        for j in range(count):
            piece[j] = _rounded(bits[j]) >> U16
    else:
        for j in range(count):
            piece[j] = bits[j]


@INNER
def _delta(source, shift, start, count, base, delta, bits, narrow):
    """Fill ``delta`` (whose bits are ``bits``) with source - base, rounded where ``narrow``."""
    _load(source, shift, start, count, bits, narrow)
    for j in range(count):
        delta[j] -= base[j]
    if narrow:
        _round_piece(bits, count)


@njit(**OPTIONS)
def nonfinite16(bits):
    """Return whether bfloat16 bits hold a NaN or an infinity."""
    worst = np.uint16(0)
    for k in range(len(bits)):
        worst = max(worst, np.uint16(bits[k] & np.uint16(0x7FFF)))
    return worst >= np.uint16(0x7F80)


@njit(**OPTIONS)
def linear(arrays, shift, weights, divisor, normalize, narrow, out, out_shift):
    """out = sum_i w_i x_i, one rounding a step, / divisor."""
    bits = np.empty(PIECE, np.uint32)
    value = bits.view(np.float32)
    total_bits = np.empty(PIECE, np.uint32)
    total = total_bits.view(np.float32)
    elements = len(out)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        for j in range(count):
            total[j] = F0
        for i in range(len(arrays)):
            _load(arrays[i], shift, start, count, bits, narrow)
            weight = weights[i]
            for j in range(count):
                total[j] = np.float32(np.float64(value[j]) * weight + np.float64(total[j]))
        if normalize:
            for j in range(count):
                total[j] = total[j] / divisor
        if narrow:
            _round_piece(total_bits, count)
        _store(total_bits, count, out, start, out_shift)


@njit(**OPTIONS)
def delta_high(base, other, shift, narrow, histogram):
    """Count the upper 16 of the 31 magnitude bits of other - base into ``histogram`` [2, 65536]."""
    base_bits = np.empty(PIECE, np.uint32)
    base_value = base_bits.view(np.float32)
    bits = np.empty(PIECE, np.uint32)
    value = bits.view(np.float32)
    elements = len(base)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        _load(base, shift, start, count, base_bits, narrow)
        _delta(other, shift, start, count, base_value, value, bits, narrow)
        for j in range(count):
            bits[j] = (bits[j] & MAGNITUDE) >> LOW
        # Two tables: equal neighbours would otherwise wait for each other's store.
        pairs = count // 2
        for j in range(pairs):
            histogram[0, bits[2 * j]] += U1
            histogram[1, bits[2 * j + 1]] += U1
        if count % 2:
            histogram[0, bits[count - 1]] += U1


@njit(**OPTIONS)
def delta_low(base, other, shift, narrow, wanted, counts):
    """Count the lower 15 magnitude bits of other - base inside bin ``wanted``."""
    inside = np.empty(PIECE + 1, np.uint32)
    base_bits = np.empty(PIECE, np.uint32)
    base_value = base_bits.view(np.float32)
    bits = np.empty(PIECE, np.uint32)
    value = bits.view(np.float32)
    elements = len(base)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        _load(base, shift, start, count, base_bits, narrow)
        _delta(other, shift, start, count, base_value, value, bits, narrow)
        if narrow:  # bfloat16 differences have no lower bits
            found = U0
            for j in range(count):
                found += np.uint32(((bits[j] & MAGNITUDE) >> LOW) == wanted)
            counts[0] += found
        else:
            found = 0
            for j in range(count):
                key = bits[j] & MAGNITUDE
                inside[found] = key & LOW_MASK
                found += np.int64((key >> LOW) == wanted)
            for n in range(found):
                counts[inside[n]] += U1


@INLINE
def _mix(counter):
    """SplitMix64's finaliser."""
    z = counter
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z >> np.uint64(11)


@INNER
def _spread(bits, count, key, quota, ties, phase, keep):
    """Keep entries above ``key`` and, of those equal to it, one whenever phase + quota passes ``ties``.

    phase = (ordinal of the tie * quota) mod ties, which says floor((j+1) q / T) > floor(j q / T)
    without a division. Returns the phase after the piece.
    """
    equal = U0
    for j in range(count):
        magnitude = bits[j] & MAGNITUDE
        keep[j] = np.uint32(magnitude > key)
        equal += np.uint32(magnitude == key)
    if equal and quota >= ties:
        for j in range(count):
            keep[j] |= np.uint32((bits[j] & MAGNITUDE) == key)
    elif equal and quota > 0:
        # First where the ties are, without a branch that cannot be predicted; then only those.
        where = np.empty(PIECE + 1, np.uint32)
        found = 0
        for j in range(count):
            where[found] = np.uint32(j)
            found += np.int64((bits[j] & MAGNITUDE) == key)
        for n in range(found):
            phase += quota
            less = phase - ties
            keep[where[n]] = np.uint32(less >= 0)
            phase = less if less >= 0 else phase
    return phase


@INNER
def _band(bits, count, outer_key, outer_quota, outer_ties, outer_phase,
          inner_key, inner_quota, phase, keep):  # fmt: skip
    """As `_spread` for two thresholds on the same key: the inner's share is taken out of the outer's kept ties.

    phase = (number of the outer's kept ties so far * inner_quota) mod outer_quota.
    """
    for j in range(count):
        magnitude = bits[j] & MAGNITUDE
        keep[j] = U0
        if magnitude == outer_key and outer_ties > 0:
            outer_phase += outer_quota
            if outer_phase >= outer_ties:
                outer_phase -= outer_ties
                phase += inner_quota
                if phase >= outer_quota:
                    phase -= outer_quota
                else:
                    keep[j] = U1
    return outer_phase, phase


@INNER
def _mask(mode, bits, delta, count, first, keep, limits, phases):
    """Set dropped entries of one task vector to 0.

    limits (int64): 0 key, 1 quota, 2 ties of the threshold; 3, 4, 5 those of the inner one; 6 whether
    both fall on one key; 7 the random stream's key and 8 its bound. phases: running phases.
    """
    if mode == KEEP:
        return
    if mode == DROP:
        for j in range(count):
            delta[j] = F0
        return
    if mode == RANDOM:
        seed = np.uint64(limits[7])
        bound = np.uint64(limits[8])
        gamma = np.uint64(0x9E3779B97F4A7C15)
        for j in range(count):
            counter = np.uint64(first + j + 1) * gamma + seed
            keep[j] = np.uint32(_mix(counter) < bound)
    elif mode == ABOVE:
        phases[0] = _spread(bits, count, np.uint32(limits[0]), limits[1], limits[2], phases[0], keep)
    elif limits[6]:
        phases[0], phases[1] = _band(
            bits, count, np.uint32(limits[0]), limits[1], limits[2], phases[0],
            np.uint32(limits[3]), limits[4], phases[1], keep,
        )  # fmt: skip
    else:
        other = np.empty(PIECE, np.uint32)
        phases[0] = _spread(bits, count, np.uint32(limits[0]), limits[1], limits[2], phases[0], keep)
        phases[1] = _spread(bits, count, np.uint32(limits[3]), limits[4], limits[5], phases[1], other)
        for j in range(count):
            keep[j] &= ~other[j] & U1
    for j in range(count):
        delta[j] = delta[j] if keep[j] else F0


@INNER
def _rank_row(work, columns, order, spare, ranks, counts):
    """Rank the magnitudes of one row ascending, ties by column, by radix sort; fill ``ranks``.

    Digits that all entries share cost nothing: bfloat16 differences have 15 live bits of 31.
    """
    counts[:] = U0
    for j in range(columns):
        key = work[j] & MAGNITUDE
        counts[0, key & np.uint32(255)] += U1
        counts[1, (key >> np.uint32(8)) & np.uint32(255)] += U1
        counts[2, (key >> U16) & np.uint32(255)] += U1
        counts[3, key >> np.uint32(24)] += U1
        order[j] = j
    for digit in range(4):
        move = np.uint32(8 * digit)
        if counts[digit, ((work[0] & MAGNITUDE) >> move) & np.uint32(255)] == columns:
            continue
        position = U0
        for b in range(256):
            held = counts[digit, b]
            counts[digit, b] = position
            position += held
        for j in range(columns):
            which = order[j]
            b = ((work[which] & MAGNITUDE) >> move) & np.uint32(255)
            spare[counts[digit, b]] = which
            counts[digit, b] += U1
        for j in range(columns):
            order[j] = spare[j]
    for j in range(columns):
        ranks[order[j]] = j


@njit(**OPTIONS)
def ranked_keep(base, source, shift, narrow, columns, first, seed, low, step, keep):
    """Set keep[k] where the entry's draw is below low + rank in its row * step (DELLA)."""
    base_bits = np.empty(columns, np.uint32)
    base_value = base_bits.view(np.float32)
    bits = np.empty(columns, np.uint32)
    value = bits.view(np.float32)
    order = np.empty(columns, np.uint32)
    spare = np.empty(columns, np.uint32)
    ranks = np.empty(columns, np.uint32)
    counts = np.empty((4, 256), np.uint32)
    gamma = np.uint64(0x9E3779B97F4A7C15)
    for start in range(0, len(base), columns):
        _load(base, shift, start, columns, base_bits, narrow)
        _delta(source, shift, start, columns, base_value, value, bits, narrow)
        _rank_row(bits, columns, order, spare, ranks, counts)
        for j in range(columns):
            counter = np.uint64(first + start + j + 1) * gamma + seed
            draw = np.float64(_mix(counter)) * (1.0 / 9007199254740992.0)
            keep[start + j] = draw < low + np.float64(ranks[j]) * step


@njit(**OPTIONS)
def delta_l1(base, other, shift, narrow, mode, first, limits, phases, ranked, before, after):
    """Add |d| and |M d| of one task vector to the lanes ``before`` and ``after``."""
    base_bits = np.empty(PIECE, np.uint32)
    base_value = base_bits.view(np.float32)
    bits = np.empty(PIECE, np.uint32)
    value = bits.view(np.float32)
    keep = np.empty(PIECE, np.uint32)
    elements = len(base)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        _load(base, shift, start, count, base_bits, narrow)
        _delta(other, shift, start, count, base_value, value, bits, narrow)
        _add_magnitudes(value, count, before)
        if mode == RANKED:
            kept = ranked[start : start + count]
            for j in range(count):
                value[j] = value[j] if kept[j] else F0
        else:
            _mask(mode, bits, value, count, first + start, keep, limits, phases)
        _add_magnitudes(value, count, after)


@INNER
def _add_magnitudes(value, count, lanes):
    whole = count // LANES
    for r in range(whole):
        row = value[r * LANES : (r + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] += np.float64(abs(row[lane]))
    for j in range(whole * LANES, count):
        lanes[j - whole * LANES] += np.float64(abs(value[j]))


@njit(**OPTIONS)
def task_vectors(arrays, shift, narrow, modes, first, limits, phases, ranked, scales, weights,
                 elect, normalize, divisor, lam, out, out_shift):  # fmt: skip
    """The map of the task-vector family; arrays[0] is the base. See `surgeon.merge.task_vectors`."""
    vectors = len(arrays) - 1
    base_bits = np.empty(PIECE, np.uint32)
    base_value = base_bits.view(np.float32)
    part_bits = np.empty((vectors, PIECE), np.uint32)
    part_value = part_bits.view(np.float32)
    total_bits = np.empty(PIECE, np.uint32)
    total = total_bits.view(np.float32)
    mixed_bits = np.empty(PIECE, np.uint32)
    mixed = mixed_bits.view(np.float32)
    share_bits = np.empty(PIECE, np.uint32)
    share = share_bits.view(np.float32)
    keep = np.empty(PIECE, np.uint32)
    elements = len(out)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        _load(arrays[0], shift, start, count, base_bits, narrow)
        for j in range(count):
            total[j] = F0
        for i in range(vectors):
            bits = part_bits[i]
            value = part_value[i]
            _delta(arrays[i + 1], shift, start, count, base_value, value, bits, narrow)
            if modes[i] == RANKED:
                kept = ranked[i, start : start + count]
                for j in range(count):
                    value[j] = value[j] if kept[j] else F0
            else:
                _mask(modes[i], bits, value, count, first + start, keep, limits[i], phases[i])
            if scales[i] != F1:
                scale = scales[i]
                for j in range(count):
                    value[j] *= scale
                if narrow:
                    _round_piece(bits, count)
            weight = weights[i]
            if weight != F1:
                for j in range(count):
                    value[j] *= weight
                if narrow:
                    _round_piece(bits, count)
            for j in range(count):
                total[j] += value[j]
        if elect:
            if narrow:
                _round_piece(total_bits, count)
            for j in range(count):
                mixed[j] = F0
                share[j] = F0
            for i in range(vectors):
                value = part_value[i]
                weight = weights[i]
                for j in range(count):
                    agrees = (value[j] > F0) if total[j] >= F0 else (value[j] < F0)
                    mixed[j] += value[j] if agrees else F0
                    share[j] += weight if agrees else F0
            if narrow:
                _round_piece(share_bits, count)
                _round_piece(mixed_bits, count)
            if normalize:
                for j in range(count):
                    mixed[j] /= share[j] if share[j] != F0 else F1
                if narrow:
                    _round_piece(mixed_bits, count)
        else:
            for j in range(count):
                mixed[j] = total[j]
            if narrow:
                _round_piece(mixed_bits, count)
            if normalize:
                for j in range(count):
                    mixed[j] /= divisor
                if narrow:
                    _round_piece(mixed_bits, count)
        if lam != F1:
            for j in range(count):
                mixed[j] *= lam
            if narrow:
                _round_piece(mixed_bits, count)
        for j in range(count):
            mixed[j] = base_value[j] - (F0 - mixed[j])
        if narrow:
            _round_piece(mixed_bits, count)
        _store(mixed_bits, count, out, start, out_shift)


@njit(**OPTIONS)
def gram(arrays, shift, narrow, has_base, sums):
    """Add the inner products of arrays (or of their differences from the last one) to lanes [pairs, LANES]."""
    vectors = len(arrays) - 1 if has_base else len(arrays)
    base_bits = np.zeros(PIECE, np.uint32)
    base_value = base_bits.view(np.float32)
    bits = np.empty((vectors, PIECE), np.uint32)
    value = bits.view(np.float32)
    elements = len(arrays[0])
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        if has_base:
            _load(arrays[vectors], shift, start, count, base_bits, narrow)
        for i in range(vectors):
            _load(arrays[i], shift, start, count, bits[i], narrow)
            if has_base:
                for j in range(count):
                    value[i, j] -= base_value[j]
        whole = count // LANES
        pair = 0
        for i in range(vectors):
            for k in range(i, vectors):
                left = value[i]
                right = value[k]
                lanes = sums[pair]
                for r in range(whole):
                    a = left[r * LANES : (r + 1) * LANES]
                    b = right[r * LANES : (r + 1) * LANES]
                    for lane in range(LANES):
                        lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
                for at in range(whole * LANES, count):
                    lanes[at - whole * LANES] += np.float64(left[at]) * np.float64(right[at])
                pair += 1


@njit(**OPTIONS)
def combine(arrays, shift, narrow, has_base, coefficients, out, out_shift):
    """out = sum_i c_i x_i, or b + sum_i c_i (x_i - b) with b the last array."""
    vectors = len(arrays) - 1 if has_base else len(arrays)
    base_bits = np.zeros(PIECE, np.uint32)
    base_value = base_bits.view(np.float32)
    bits = np.empty(PIECE, np.uint32)
    value = bits.view(np.float32)
    total_bits = np.empty(PIECE, np.uint32)
    total = total_bits.view(np.float32)
    elements = len(out)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        if has_base:
            _load(arrays[vectors], shift, start, count, base_bits, narrow)
        for j in range(count):
            total[j] = F0
        for i in range(vectors):
            _load(arrays[i], shift, start, count, bits, narrow)
            c = coefficients[i]
            if has_base:
                for j in range(count):
                    total[j] += (value[j] - base_value[j]) * c
            else:
                for j in range(count):
                    total[j] += value[j] * c
        if has_base:
            for j in range(count):
                total[j] = base_value[j] - (F0 - total[j])
        if narrow:
            _round_piece(total_bits, count)
        _store(total_bits, count, out, start, out_shift)


@INNER
def _deltas(arrays, shift, start, count, narrow, base_bits, base_value, part_bits, part_value):
    _load(arrays[0], shift, start, count, base_bits, narrow)
    for i in range(len(arrays) - 1):
        _delta(arrays[i + 1], shift, start, count, base_value, part_value[i], part_bits[i], narrow)


@INNER
def _variance(part_value, count, narrow, mean, square, bits, value):
    """Fill ``value`` (bits in ``bits``) with the variance across models, by Welford's recurrence in float64."""
    vectors = len(part_value)
    for j in range(count):
        mean[j] = 0.0
        square[j] = 0.0
    for i in range(vectors):
        delta = part_value[i]
        number = np.float64(i + 1)
        for j in range(count):
            step = np.float64(delta[j]) - mean[j]
            mean[j] += step / number
            square[j] += step * (np.float64(delta[j]) - mean[j])
    divisor = np.float64(vectors)
    for j in range(count):
        value[j] = np.float32(square[j] / divisor)
    if narrow:
        _round_piece(bits, count)


@njit(**OPTIONS)
def variance_count(arrays, shift, narrow, wanted, histogram, counts):
    """Count variances across task vectors (arrays[0] is the base).

    ``wanted`` < 0: the upper 16 magnitude bits into ``histogram``, whose last entry counts the non-zero
    ones; else the lower 15 bits inside bin ``wanted`` into ``counts``.
    """
    vectors = len(arrays) - 1
    base_bits = np.empty(PIECE, np.uint32)
    part_bits = np.empty((vectors, PIECE), np.uint32)
    bits = np.empty(PIECE, np.uint32)
    mean = np.empty(PIECE)
    square = np.empty(PIECE)
    base_value = base_bits.view(np.float32)
    part_value = part_bits.view(np.float32)
    value = bits.view(np.float32)
    elements = len(arrays[0])
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        _deltas(arrays, shift, start, count, narrow, base_bits, base_value, part_bits, part_value)
        _variance(part_value, count, narrow, mean, square, bits, value)
        if wanted < 0:
            for j in range(count):
                key = bits[j] & MAGNITUDE
                histogram[key >> LOW] += 1
                histogram[HIGH_BINS] += np.int64(key != U0)
        else:
            for j in range(count):
                key = bits[j] & MAGNITUDE
                if np.int64(key >> LOW) == wanted:
                    counts[key & LOW_MASK] += U1


@njit(**OPTIONS)
def selected_squares(arrays, shift, narrow, mode, limits, phases, sums):
    """Add the squares of each task vector's selected entries to its lanes."""
    vectors = len(arrays) - 1
    base_bits = np.empty(PIECE, np.uint32)
    part_bits = np.empty((vectors, PIECE), np.uint32)
    bits = np.empty(PIECE, np.uint32)
    keep = np.empty(PIECE, np.uint32)
    mean = np.empty(PIECE)
    square = np.empty(PIECE)
    base_value = base_bits.view(np.float32)
    part_value = part_bits.view(np.float32)
    value = bits.view(np.float32)
    elements = len(arrays[0])
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        _deltas(arrays, shift, start, count, narrow, base_bits, base_value, part_bits, part_value)
        if mode == ABOVE:
            _variance(part_value, count, narrow, mean, square, bits, value)
            phases[0] = _spread(bits, count, np.uint32(limits[0]), limits[1], limits[2], phases[0], keep)
        for i in range(vectors):
            delta = part_value[i]
            if mode == ABOVE:
                for j in range(count):
                    value[j] = delta[j] * delta[j] if keep[j] else F0
            else:
                for j in range(count):
                    value[j] = delta[j] * delta[j]
            if narrow:
                _round_piece(bits, count)
            _add_magnitudes(value, count, sums[i])


@njit(**OPTIONS)
def elected_mean(arrays, shift, narrow, mode, limits, phases, weights, tiny, out, out_shift):
    """The map of SCE: select by variance, elect signs, average what agrees. See `surgeon.merge.methods.sce`."""
    vectors = len(arrays) - 1
    base_bits = np.empty(PIECE, np.uint32)
    part_bits = np.empty((vectors, PIECE), np.uint32)
    bits = np.empty(PIECE, np.uint32)
    keep = np.empty(PIECE, np.uint32)
    total_bits = np.empty(PIECE, np.uint32)
    mixed_bits = np.empty(PIECE, np.uint32)
    share_bits = np.empty(PIECE, np.uint32)
    mean = np.empty(PIECE)
    square = np.empty(PIECE)
    base_value = base_bits.view(np.float32)
    part_value = part_bits.view(np.float32)
    value = bits.view(np.float32)
    total = total_bits.view(np.float32)
    mixed = mixed_bits.view(np.float32)
    share = share_bits.view(np.float32)
    elements = len(out)
    for start in range(0, elements, PIECE):
        count = min(PIECE, elements - start)
        _deltas(arrays, shift, start, count, narrow, base_bits, base_value, part_bits, part_value)
        if mode == ABOVE:
            _variance(part_value, count, narrow, mean, square, bits, value)
            phases[0] = _spread(bits, count, np.uint32(limits[0]), limits[1], limits[2], phases[0], keep)
        for j in range(count):
            total[j] = F0
            mixed[j] = F0
            share[j] = F0
        for i in range(vectors):
            delta = part_value[i]
            if mode == ABOVE:
                for j in range(count):
                    delta[j] = delta[j] if keep[j] else F0
            for j in range(count):
                total[j] += delta[j]
        if narrow:
            _round_piece(total_bits, count)
        for i in range(vectors):
            delta = part_value[i]
            weight = weights[i]
            for j in range(count):
                value[j] = delta[j] * weight
            if narrow:
                _round_piece(bits, count)
            for j in range(count):
                agrees = (delta[j] > F0) if total[j] >= F0 else (delta[j] < F0)
                mixed[j] += value[j] if agrees else F0
                share[j] += weight if agrees else F0
        if narrow:
            _round_piece(share_bits, count)
            _round_piece(mixed_bits, count)
        for j in range(count):
            mixed[j] /= share[j] if share[j] > tiny else tiny
        if narrow:
            _round_piece(mixed_bits, count)
        for j in range(count):
            mixed[j] = base_value[j] - (F0 - mixed[j])
        if narrow:
            _round_piece(mixed_bits, count)
        _store(mixed_bits, count, out, start, out_shift)
