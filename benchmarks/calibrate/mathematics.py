"""Worked mathematics for the shipped calibration text: one question, a short and a long answer.

Each kind of question is one function from a random generator to (prompt, steps, answer). The
short answer states the result with one step; the long one plans, works through every step, has
second thoughts and checks, the way slow-thinking models write. Seeded, so the file can be made
again byte by byte.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

PER_KIND = 15
NAMES = ("Amira", "Ben", "Chen", "Dana", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lucia")


@dataclass(frozen=True)
class Worked:
    """One question: how it is planned, worked, checked and answered."""

    prompt: str
    plan: str
    steps: tuple[str, ...]
    check: tuple[str, ...]
    brief: str
    answer: str


def addition(rng: random.Random) -> Worked:
    terms = [rng.randint(120, 9800) for _ in range(rng.randint(3, 5))]
    total, steps = terms[0], []
    for term in terms[1:]:
        steps.append(f"{total} + {term} = {total + term}.")
        total += term
    back = total
    check = []
    for term in reversed(terms[1:]):
        check.append(f"{back} - {term} = {back - term}.")
        back -= term
    check.append(f"That leaves {back}, the first number, as it should.")
    words = ", ".join(map(str, terms[:-1])) + f" and {terms[-1]}"
    return Worked(f"Add {words}.", "I will add the numbers one after the other.", tuple(steps), tuple(check),
                  " + ".join(map(str, terms)) + f" = {total}.", str(total))  # fmt: skip


def multiplication(rng: random.Random) -> Worked:
    a, b = rng.randint(23, 987), rng.randint(12, 98)
    tens, ones = b // 10 * 10, b % 10
    steps = [f"Split the second factor: {b} = {tens} + {ones}.", f"{a} × {tens} = {a * tens}.", f"{a} × {ones} = {a * ones}.",
             f"{a * tens} + {a * ones} = {a * b}."]  # fmt: skip
    near = round(a, -1)
    check = [f"A rough figure: {near} × {b} = {near * b}, which differs by {abs(near * b - a * b)}.",
             f"The difference should be {abs(near - a)} × {b} = {abs(near - a) * b}, and it is."]  # fmt: skip
    return Worked(f"What is {a} × {b}?", "I will multiply by the tens and by the ones, and add.", tuple(steps), tuple(check),
                  f"{a} × {b} = {a * b}.", str(a * b))  # fmt: skip


def division(rng: random.Random) -> Worked:
    divisor, quotient = rng.randint(7, 48), rng.randint(21, 399)
    rest = rng.randint(0, divisor - 1)
    number = divisor * quotient + rest
    steps, left, parts = [], number, []
    for place in (100, 10, 1):
        digit = left // (divisor * place)
        if digit:
            steps.append(
                f"{divisor} × {digit * place} = {divisor * digit * place} fits, and {left} - {divisor * digit * place} = {left - divisor * digit * place}."
            )
            left -= divisor * digit * place
            parts.append(digit * place)
    steps.append(
        f"The quotient is {' + '.join(map(str, parts))} = {quotient}; what is left, {left}, is smaller than {divisor}."
    )
    check = [f"{divisor} × {quotient} = {divisor * quotient}.", f"{divisor * quotient} + {rest} = {number}."]
    return Worked(f"Divide {number} by {divisor}. Give the quotient and the remainder.",
                  "I will take away large multiples of the divisor first.", tuple(steps), tuple(check),
                  f"{number} = {divisor} × {quotient} + {rest}.", f"quotient {quotient}, remainder {rest}")  # fmt: skip


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"


def linear_equation(rng: random.Random) -> Worked:
    a, x, c = rng.randint(3, 14), rng.randint(-9, 25), rng.randint(-3, 1)
    b = rng.choice([n for n in range(-40, 60) if n])
    if c in (-1, 0, 1):
        c = rng.randint(2, a + 3)
        c = c if c != a else a + 1
    right = a * x + b - c * x
    side = f"{c}x {_signed(right)}"
    steps = [f"Bring the terms with x to one side: ({a} - {c})x {_signed(b)} = {right}." if c > 0 else f"Bring the terms with x to one side: ({a} + {-c})x {_signed(b)} = {right}.",
             f"So {a - c}x {_signed(b)} = {right}.", f"Bring the number over: {right} - ({b}) = {right - b}, so {a - c}x = {right - b}.",
             f"Divide: {right - b} / ({a - c}) = {x}."]  # fmt: skip
    check = [f"The left side becomes {a} × ({x}) {_signed(b)} = {a * x + b}.", f"The right side becomes {c} × ({x}) {_signed(right)} = {c * x + right}.",
             "Both sides agree."]  # fmt: skip
    return Worked(f"Solve {a}x {_signed(b)} = {side} for x.", "I will collect x on the left and the numbers on the right.",
                  tuple(steps), tuple(check), f"{a - c}x = {right - b}, so x = {x}.", f"x = {x}")  # fmt: skip


def linear_system(rng: random.Random) -> Worked:
    x, y = rng.randint(-8, 14), rng.randint(-8, 14)
    a, b = rng.randint(2, 7), rng.randint(2, 7)
    first, second = x + y, a * x - b * y
    steps = [f"From the first equation, y = {first} - x.",
             f"Put that into the second: {a}x - {b}({first} - x) = {second}.",
             f"{b} × ({first}) = {b * first}, so {a}x - ({b * first}) + {b}x = {second}.",
             f"{a} + {b} = {a + b} and {second} + ({b * first}) = {second + b * first}, so {a + b}x = {second + b * first}.",
             f"{second + b * first} / {a + b} = {x}, so x = {x}.", f"{first} - ({x}) = {y}, so y = {y}."]  # fmt: skip
    check = [
        f"First equation: {x} + ({y}) = {first}.",
        f"Second equation: {a} × ({x}) - {b} × ({y}) = {second}.",
    ]
    return Worked(f"Solve the system x + y = {first}, {a}x - {b}y = {second}.", "I will express y by x and substitute.",
                  tuple(steps), tuple(check), f"Adding {b} times the first equation gives {a + b}x = {second + b * first}, so x = {x} and y = {y}.",
                  f"x = {x}, y = {y}")  # fmt: skip


def quadratic(rng: random.Random) -> Worked:
    r, s = sorted((rng.randint(-9, 12), rng.randint(-9, 12)))
    if r == s:
        s += 1
    p, q = -(r + s), r * s
    middle = f" {_signed(p)}x" if p else ""
    last = f" {_signed(q)}" if q else ""
    disc = p * p - 4 * q
    root = math.isqrt(disc)
    steps = [f"In x^2 + px + q = 0 we have p = {p} and q = {q}.", f"The discriminant is ({p})^2 - 4 × ({q}) = {disc}.",
             f"Its square root is {root}, because {root} × {root} = {disc}.",
             f"(-({p}) - {root}) / 2 = {r} and (-({p}) + {root}) / 2 = {s}."]  # fmt: skip
    check = [
        f"The sum of the roots is {r} + ({s}) = {r + s}, which is -p.",
        f"Their product is ({r}) × ({s}) = {q}, which is q.",
    ]
    return Worked(f"Find the roots of x^2{middle}{last} = 0.", "I will use the quadratic formula.", tuple(steps), tuple(check),
                  f"The discriminant is {disc}, so the roots are {r} and {s}.", f"x = {r} or x = {s}")  # fmt: skip


def greatest_common_divisor(rng: random.Random) -> Worked:
    factor = rng.randint(2, 36)
    a, b = factor * rng.randint(8, 60), factor * rng.randint(5, 40)
    a, b = (max(a, b), min(a, b)) if a != b else (a + factor, b)
    steps, x, y = [], a, b
    while y:
        steps.append(f"{x} = {x // y} × {y} + {x % y}.")
        x, y = y, x % y
    steps.append(f"The last divisor without a remainder is {x}.")
    check = [
        f"{a} / {x} = {a // x} and {b} / {x} = {b // x}.",
        f"{a // x} and {b // x} have no common factor any more.",
    ]
    return Worked(f"Find the greatest common divisor of {a} and {b}.", "I will use Euclid's algorithm.", tuple(steps), tuple(check),
                  f"Euclid's algorithm ends at {x}.", str(x))  # fmt: skip


def factorisation(rng: random.Random) -> Worked:
    number = math.prod(rng.choice((2, 2, 3, 3, 5, 7, 11, 13, 17, 19)) for _ in range(rng.randint(3, 6)))
    steps, left, factors, prime = [], number, [], 2
    while left > 1:
        if left % prime:
            prime += 1
            continue
        steps.append(f"{left} is divisible by {prime}: {left} / {prime} = {left // prime}.")
        factors.append(prime)
        left //= prime
    product = " × ".join(map(str, factors))
    check = [f"Multiply back: {product} = {number}.", "Each factor is a prime number."]
    return Worked(f"Write {number} as a product of prime numbers.", "I will divide by small primes as long as possible.",
                  tuple(steps), tuple(check), f"{number} = {product}.", product)  # fmt: skip


def modular_power(rng: random.Random) -> Worked:
    base, power, modulus = rng.randint(2, 19), rng.randint(9, 60), rng.randint(7, 53)
    steps, square, found, bits = [], base % modulus, 1, []
    steps.append(f"{base} leaves {square} when divided by {modulus}.")
    for bit in range(power.bit_length()):
        if bit:
            value = square * square
            steps.append(f"Power {2**bit}: {square} × {square} = {value}, which leaves {value % modulus}.")
            square = value % modulus
        if power >> bit & 1:
            bits.append(2**bit)
            value = found * square
            steps.append(
                f"Power {2**bit} is needed: {found} × {square} = {value}, which leaves {value % modulus}."
            )
            found = value % modulus
    steps.append(f"All needed powers are used, since {' + '.join(map(str, bits))} = {power}.")
    half = pow(base, power // 2, modulus)
    rest = half * half * (base if power % 2 else 1)
    factor = f" × {base}" if power % 2 else ""
    check = [
        f"Another way: power {power // 2} leaves {half}, and {half} × {half}{factor} = {rest}, which leaves {rest % modulus}."
    ]
    return Worked(f"What is the remainder when {base}^{power} is divided by {modulus}?", "I will square repeatedly and multiply what the exponent needs.",
                  tuple(steps), tuple(check), f"By repeated squaring, {base}^{power} leaves {found}.", str(found))  # fmt: skip


def series(rng: random.Random) -> Worked:
    first, step, count = rng.randint(1, 30), rng.randint(2, 12), rng.randint(8, 60)
    last = first + (count - 1) * step
    total = count * (first + last) // 2
    steps = [f"The last term is {first} + {count - 1} × {step} = {last}.", f"First and last together: {first} + {last} = {first + last}.",
             f"There are {count} terms, so the sum is {count} × {first + last} / 2 = {total}."]  # fmt: skip
    middle = Fraction(first + last, 2)
    check = [
        f"The average term is {first + last} / 2, about {float(middle):.1f}, and there are {count} of them, which fits {total}."
    ]
    return Worked(f"Find the sum of the arithmetic series with first term {first}, common difference {step} and {count} terms.",
                  "I need the last term, then the average of first and last times the number of terms.", tuple(steps), tuple(check),
                  f"{count} × ({first} + {last}) / 2 = {total}.", str(total))  # fmt: skip


def percentages(rng: random.Random) -> Worked:
    price = rng.randint(2, 40) * 20
    down, up = rng.choice((5, 10, 15, 20, 25, 30, 40)), rng.choice((5, 10, 20, 25, 50))
    lower = Fraction(price * (100 - down), 100)
    final = lower * (100 + up) / 100
    thing = rng.choice(("coat", "bicycle", "lamp", "camera", "desk", "tent"))

    def money(value: Fraction) -> str:
        return f"{float(value):.2f}"

    steps = [f"After the first change {100 - down} percent are left: {price} × {100 - down} / 100 = {money(lower)}.",
             f"The second change makes it {100 + up} percent of that: {money(lower)} × {100 + up} / 100 = {money(final)}."]  # fmt: skip
    check = [f"The changes do not simply add: {up} - {down} = {up - down} percent of {price} would be wrong, because the second one is taken of the lower price.",
             f"In one go: {price} × {100 - down} × {100 + up} / 10000 = {money(final)}."]  # fmt: skip
    return Worked(f"A {thing} costs {price} dollars. Its price is lowered by {down} percent and later raised by {up} percent. What does it cost then?",
                  "Each percentage applies to the price at that time.", tuple(steps), tuple(check),
                  f"{price} × {100 - down} / 100 × {100 + up} / 100 = {money(final)}.", f"{money(final)} dollars")  # fmt: skip


def journey(rng: random.Random) -> Worked:
    v, w = rng.randint(4, 11) * 10, rng.randint(4, 11) * 10
    s, t = rng.randint(1, 4), rng.randint(1, 4)
    far = v * s + w * t
    mean = Fraction(far, s + t)
    shown = str(mean) if mean.denominator == 1 else f"{mean.numerator}/{mean.denominator}"
    steps = [f"First part: {v} × {s} = {v * s} kilometres.", f"Second part: {w} × {t} = {w * t} kilometres.",
             f"Together {v * s} + {w * t} = {far} kilometres in {s} + {t} = {s + t} hours.", f"{far} / {s + t} = {shown} kilometres per hour."]  # fmt: skip
    check = [f"The mean of the speeds, ({v} + {w}) / 2 = {Fraction(v + w, 2)}, is right only when both parts take equally long.",
             f"{shown} lies between {min(v, w)} and {max(v, w)}, as it must."]  # fmt: skip
    who = rng.choice(NAMES)
    return Worked(f"{who} drives {s} hours at {v} km/h and then {t} hours at {w} km/h. What is the average speed?",
                  "Average speed is the whole distance divided by the whole time.", tuple(steps), tuple(check),
                  f"({v} × {s} + {w} × {t}) / ({s} + {t}) = {shown}.", f"{shown} km/h")  # fmt: skip


def shopping(rng: random.Random) -> Worked:
    who = rng.choice(NAMES)
    a, b = rng.sample(("notebooks", "pens", "apples", "tickets", "stamps", "candles", "cups", "plants"), 2)
    n, m, p, q = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 15), rng.randint(2, 15)
    cost = n * p + m * q
    paid = (cost // 50 + 1) * 50
    steps = [f"The {a} cost {n} × {p} = {n * p} dollars.", f"The {b} cost {m} × {q} = {m * q} dollars.",
             f"Together that is {n * p} + {m * q} = {cost} dollars.", f"The change is {paid} - {cost} = {paid - cost} dollars."]  # fmt: skip
    check = [f"Price and change together must be what was paid: {cost} + {paid - cost} = {paid}."]
    return Worked(f"{who} buys {n} {a} at {p} dollars each and {m} {b} at {q} dollars each, and pays with {paid} dollars. How much change does {who} get?",
                  "I need the price of each kind, the total, and the difference to what was paid.", tuple(steps), tuple(check),
                  f"{paid} - ({n} × {p} + {m} × {q}) = {paid - cost}.", f"{paid - cost} dollars")  # fmt: skip


def committees(rng: random.Random) -> Worked:
    n, k = rng.randint(6, 14), rng.randint(2, 4)
    above, below = [n - i for i in range(k)], list(range(1, k + 1))
    ordered, orders = math.perm(n, k), math.factorial(k)
    steps = [f"If order mattered there would be {' × '.join(map(str, above))} = {ordered} ways.",
             f"Each group is counted once for each order of its members: {' × '.join(map(str, below))} = {orders}.",
             f"{ordered} / {orders} = {ordered // orders}."]  # fmt: skip
    smaller = math.comb(n - 1, k - 1)
    check = [f"Look at one person: with that person there are {smaller} groups, without {math.comb(n - 1, k)}.",
             f"{smaller} + {math.comb(n - 1, k)} = {ordered // orders}."]  # fmt: skip
    return Worked(f"In how many ways can a committee of {k} be chosen from {n} people?", "Order does not matter, so I divide by the number of orders.",
                  tuple(steps), tuple(check), f"{ordered} / {orders} = {ordered // orders}.", str(ordered // orders))  # fmt: skip


def right_triangle(rng: random.Random) -> Worked:
    m = rng.randint(2, 6)
    n, scale = rng.randint(1, m - 1), rng.randint(1, 4)
    a, b, c = scale * (m * m - n * n), scale * 2 * m * n, scale * (m * m + n * n)
    area = a * b // 2
    steps = [f"{a}^2 + {b}^2 = {a * a + b * b}.", f"The root of {a * a + b * b} is {c}, since {c} × {c} = {c * c}.",
             f"The legs enclose the right angle, so the area is {a} × {b} / 2 = {area}."]  # fmt: skip
    check = [
        f"The hypotenuse must be longer than each leg and shorter than both together: {a} + {b} = {a + b}, and {c} fits."
    ]
    return Worked(f"A right triangle has legs of length {a} and {b}. Find its hypotenuse and its area.", "I will use the theorem of Pythagoras, then half the product of the legs.",
                  tuple(steps), tuple(check), f"{a}^2 + {b}^2 = {c}^2 and {a} × {b} / 2 = {area}.", f"hypotenuse {c}, area {area}")  # fmt: skip


def dice(rng: random.Random) -> Worked:
    total = rng.randint(3, 11)
    pairs = [(i, total - i) for i in range(1, 7) if 1 <= total - i <= 6]
    chance = Fraction(len(pairs), 36)
    extra = rng.choice(("two fair dice", "a red and a blue die, both fair,", "a fair die twice"))
    listed = ", ".join(f"({i}, {j})" for i, j in pairs)
    steps = [
        "There are 6 × 6 = 36 equally likely results.",
        f"The sum is {total} for {listed}.",
        f"That is {len(pairs)} of 36, so the probability is {chance}.",
    ]
    check = [
        f"By the usual pattern a sum of {total} has 6 - {abs(total - 7)} = {len(pairs)} results, because 7 has six and each step away from 7 loses one."
    ]
    return Worked(f"You roll {extra} and add the numbers. What is the probability of a sum of {total}?", "I will count results among all pairs.",
                  tuple(steps), tuple(check), f"{len(pairs)} of 36 results fit.", str(chance))  # fmt: skip


def derivative(rng: random.Random) -> Worked:
    a, b, c, x = rng.randint(1, 6), rng.randint(1, 9), rng.randint(1, 12), rng.randint(-4, 6)
    value = 3 * a * x * x + 2 * b * x - c
    steps = [f"The derivative of {a}x^3 is {3 * a}x^2, because 3 × {a} = {3 * a}.", f"The derivative of {b}x^2 is {2 * b}x, because 2 × {b} = {2 * b}.",
             f"The derivative of -{c}x is -{c}; constants vanish.",
             f"So f'(x) = {3 * a}x^2 + {2 * b}x - {c}, and at x = {x}: {3 * a} × ({x})^2 + {2 * b} × ({x}) - {c} = {value}."]  # fmt: skip

    def f(at: int) -> int:
        return a * at**3 + b * at**2 - c * at

    # A cubic's symmetric difference exceeds its derivative by its leading coefficient.
    check = [f"The symmetric difference (f({x + 1}) - f({x - 1})) / 2 is ({f(x + 1)} - ({f(x - 1)})) / 2 = {(f(x + 1) - f(x - 1)) // 2}.",
             f"For a cubic it is larger by the first coefficient: {(f(x + 1) - f(x - 1)) // 2} - {a} = {value}."]  # fmt: skip
    return Worked(f"Let f(x) = {a}x^3 + {b}x^2 - {c}x. Find f'({x}).", "I will differentiate term by term and put in the number.",
                  tuple(steps), tuple(check), f"f'(x) = {3 * a}x^2 + {2 * b}x - {c}, so f'({x}) = {value}.", str(value))  # fmt: skip


def binary(rng: random.Random) -> Worked:
    number, base = rng.randint(40, 990), rng.choice((2, 3, 5, 8))
    steps, left, digits = [], number, []
    while left:
        steps.append(f"{left} = {base} × {left // base} + {left % base}, so the next digit is {left % base}.")
        digits.append(left % base)
        left //= base
    text = "".join(map(str, reversed(digits)))
    steps.append(f"Read from the last to the first the digits are {text}.")
    terms = " + ".join(f"{d} × {base**i}" for i, d in enumerate(digits) if d)
    check = [f"Back again: {terms} = {number}."]
    return Worked(f"Write {number} in base {base}.", "I will divide by the base again and again and keep the remainders.", tuple(steps), tuple(check),
                  f"Repeated division gives {text}.", text)  # fmt: skip


def mean_and_median(rng: random.Random) -> Worked:
    count = rng.choice((5, 7))
    numbers = [rng.randint(2, 60) for _ in range(count - 1)]
    numbers.append((-sum(numbers)) % count + count * rng.randint(0, 5))
    rng.shuffle(numbers)
    ordered, total = sorted(numbers), sum(numbers)
    mean, median = total // count, ordered[count // 2]
    steps = [f"{' + '.join(map(str, numbers))} = {total}.", f"There are {count} numbers, so the mean is {total} / {count} = {mean}.",
             f"In order they are {', '.join(map(str, ordered))}.", f"The one in the middle, number {count // 2 + 1}, is {median}."]  # fmt: skip
    check = [
        f"{count} × {mean} = {total}, so the mean is right.",
        f"{count // 2} numbers stand before {median} and {count // 2} after it.",
    ]
    return Worked(f"Find the mean and the median of {', '.join(map(str, numbers))}.", "The mean is the sum over the count; for the median I have to sort.",
                  tuple(steps), tuple(check), f"{total} / {count} = {mean}; in the middle stands {median}.", f"mean {mean}, median {median}")  # fmt: skip


KINDS: tuple[Callable[[random.Random], Worked], ...] = (
    addition, multiplication, division, linear_equation, linear_system, quadratic, greatest_common_divisor, factorisation,
    modular_power, series, percentages, journey, shopping, committees, right_triangle, dice, derivative, binary, mean_and_median,
)  # fmt: skip

_OPENINGS = (
    "Let me think about this step by step.",
    "Okay, let me look at what is asked.",
    "Let me work through this carefully.",
    "First I should see what is given.",
)
_DOUBTS = (
    "Wait, let me double-check that.",
    "Let me verify this before I answer.",
    "Hmm, I should check this another way.",
    "Let me re-examine the result.",
)
_RECAPS = (
    "To recap: everything fits.",
    "So the check agrees with what I found.",
    "Good, both ways lead to the same result.",
)


def _long(worked: Worked, rng: random.Random) -> str:
    lines = [f"{rng.choice(_OPENINGS)} {worked.plan}", ""]
    lines += [f"Step {number}: {step}" for number, step in enumerate(worked.steps, 1)]
    lines += ["", rng.choice(_DOUBTS), *worked.check, rng.choice(_RECAPS), "", f"Answer: {worked.answer}"]
    return "\n".join(lines)


def records() -> list[dict[str, str]]:
    """Return all questions, kinds in turn, no question twice."""
    made: list[dict[str, str]] = []
    asked: set[str] = set()
    for number in range(PER_KIND):
        for kind in KINDS:
            attempt = 0
            while True:
                rng = random.Random(f"{kind.__name__}-{number}-{attempt}")
                worked = kind(rng)
                attempt += 1
                if worked.prompt not in asked or attempt > 50:
                    break
            if worked.prompt in asked:
                continue
            asked.add(worked.prompt)
            made.append({
                "domain": "mathematics", "kind": kind.__name__, "prompt": worked.prompt,
                "short": f"{worked.brief}\n\nAnswer: {worked.answer}", "long": _long(worked, rng),
            })  # fmt: skip
    return made
