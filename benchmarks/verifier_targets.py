r"""Targets of `benchmarks/verifier_cases.py` that are no single number: expressions, sets, intervals,
tuples, matrices. Each has spellings that are right, others that are wrong, and the problem restated:
equal in value, and still to be worked out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EACH = 16
"""Targets of each family."""


@dataclass(frozen=True, slots=True)
class Formula:
    target: str
    right: Sequence[str]
    wrong: Sequence[str]
    restated: Sequence[str]


def formulas(seed: int) -> list[Formula]:
    """`EACH` distinct targets of every family."""
    made: list[Formula] = []
    for family in _FAMILIES:
        rng, own = random.Random(f"{seed} {family.__name__}"), {}
        while len(own) < EACH:
            formula = family(rng)
            own[formula.target] = formula
        made += own.values()
    return made


def _linear(r: random.Random) -> Formula:
    a, b, x = r.randint(3, 19), r.randint(1, 40), r.choice("xytn")
    return Formula(
        f"{a}{x} + {b}",
        (f"{a}{x}+{b}", f"{b} + {a}{x}"),
        (f"{a}{x} - {b}", f"{a + 1}{x} + {b}", f"{b}", f"{a}"),
        (f"{a - 1}{x} + {x} + {b}", f"{a}{x} + {b - 1} + 1"),
    )


def _quadratic(r: random.Random) -> Formula:
    p, q = r.sample(range(1, 30), 2)
    b, c = p + q, p * q
    return Formula(
        f"x^2 + {b}x + {c}",
        (f"x^2+{b}x+{c}", f"{c} + {b}x + x^2"),
        (f"x^2 - {b}x + {c}", f"{c}", f"x^2 + {b}x + {c + 1}", f"y^2+{b}x+{c}"),
        (f"(x+{p})(x+{q})", f"x(x+{b}) + {c}"),
    )


def _square_plus(r: random.Random) -> Formula:
    c, x = r.randint(2, 60), r.choice("xyzt")
    return Formula(
        f"{x}^2+{c}",
        (f"{x}^2 + {c}", f"{c} + {x}^2", f"{x}^{{2}}+{c}"),
        (f"{c}", f"{x}^2-{c}", f"w^2+{c}", f"{x}^3+{c}"),
        (f"{x}^2+{c - 1}+1", f"{x} \\cdot {x} + {c}"),
    )


def _factored(r: random.Random) -> Formula:
    p, q = r.sample(range(1, 20), 2)
    return Formula(
        f"(x+{p})(x-{q})",
        (f"(x-{q})(x+{p})", f"(x + {p})(x - {q})", rf"(x+{p})\cdot(x-{q})"),
        (f"(x-{p})(x-{q})", f"(x+{p})(x-{q + 1})", f"{p}"),
        (f"x^2+{p}x-{q}x-{p * q}",),
    )


def _surd(r: random.Random) -> Formula:
    a, b = r.randint(2, 20), r.choice((2, 3, 5, 6, 7, 10, 11, 13))
    return Formula(
        rf"{a}\sqrt{{{b}}}",
        (rf"{a} \sqrt{{{b}}}", rf"{a}\cdot\sqrt{{{b}}}", rf"{a}\sqrt {{{b}}}"),
        (rf"{a + 1}\sqrt{{{b}}}", rf"{a}\sqrt{{{b + 1}}}", f"{a}", f"{b}"),
        (rf"{a - 1}\sqrt{{{b}}}+\sqrt{{{b}}}", rf"\sqrt{{{b}}}+\sqrt{{{(a - 1) ** 2 * b}}}"),
    )  # fmt: skip


def _pi(r: random.Random) -> Formula:
    a, b = r.randint(2, 19), r.randint(3, 19)
    while math.gcd(a, b) > 1:
        b = r.randint(3, 19)
    return Formula(
        rf"\frac{{{a}\pi}}{{{b}}}",
        (rf"\frac{{{a}}}{{{b}}}\pi", rf"\dfrac{{{a}\pi}}{{{b}}}", rf"{a}\pi/{b}"),
        (rf"\frac{{{b}\pi}}{{{a}}}", f"{a}", rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a + 1}\pi}}{{{b}}}"),
        (rf"\frac{{\pi}}{{{b}}} + \frac{{{a - 1}\pi}}{{{b}}}",),
    )  # fmt: skip


def _logarithm(r: random.Random) -> Formula:
    a = r.randint(2, 60)
    return Formula(
        rf"\ln {a}",
        (rf"\ln({a})", rf"\ln{{{a}}}", rf"\log_e {a}"),
        (rf"\ln {a + 1}", f"{a}", rf"\log_{{10}} {a}"),
        (rf"\ln {2 * a} - \ln 2", rf"\ln {3 * a} - \ln 3"),
    )


def _exponential(r: random.Random) -> Formula:
    a = r.randint(2, 40)
    return Formula(
        f"e^{{{a}}}",
        (f"e^{{{a}}}", f"e^{{ {a} }}"),
        (f"e^{{{a + 1}}}", f"{a}", f"e^{{-{a}}}"),
        (rf"e^{{{a - 1}}} \cdot e", rf"e^{{{a + 1}}}/e"),
    )


def _power(r: random.Random) -> Formula:
    a, n = r.choice((2, 3, 5, 7)), r.randint(25, 90)
    return Formula(
        f"{a}^{{{n}}}",
        (f"{a}^{{{n}}}", f"{a}^{{ {n} }}"),
        (f"{a}^{{{n + 1}}}", f"{n}", f"{a}", f"{a + 1}^{{{n}}}"),
        (rf"{a}^{{{n - 10}}}\cdot {a}^{{10}}", rf"{a}^{{{n + 1}}}/{a}"),
    )


def _complex(r: random.Random) -> Formula:
    a, b = r.randint(2, 40), r.randint(2, 40)
    return Formula(
        f"{a}+{b}i",
        (f"{a} + {b}i", f"{b}i + {a}"),
        (f"{a}-{b}i", f"{a}", f"{b}", f"{a + 1}+{b}i"),
        (f"{a - 1}+{b}i+1", f"{a}+{b - 1}i+i"),
    )


def _set(r: random.Random) -> Formula:
    a, b, c = sorted(r.sample(range(-20, 40), 3))
    return Formula(
        rf"\{{{a}, {b}, {c}\}}",
        (rf"\{{{b}, {a}, {c}\}}", rf"\left\{{{a}, {b}, {c}\right\}}", rf"\{{{c},{b},{a}\}}"),
        (rf"\{{{a}, {b}, {c + 1}\}}", rf"\{{{a}, {b}\}}", f"{c}", rf"\{{{a}\}}"),
        (rf"\{{{a}, {b}, {c - 3} + 3\}}",),
    )


def _interval(r: random.Random) -> Formula:
    a, b = sorted(r.sample(range(-30, 50), 2))
    return Formula(
        f"[{a}, {b})",
        (f"[{a},{b})", rf"\left[{a}, {b}\right)", rf"{a} \le x < {b}"),
        (f"({a}, {b})", f"[{a}, {b}]", f"[{a}, {b + 1})", f"{a}", rf"{a} < x < {b}"),
        (f"[{a}, {b - 2} + 2)",),
    )


def _tuple(r: random.Random) -> Formula:
    a, b = r.sample(range(-20, 60), 2)
    return Formula(
        f"({a}, {b})",
        (f"({a},{b})", rf"\left({a}, {b}\right)", f"x = {a}, y = {b}", f"(x, y) = ({a}, {b})"),
        (f"({b}, {a})", f"({a}, {b + 1})", f"{a}", f"x = {b}, y = {a}"),
        (f"({a}, {b - 2} + 2)",),
    )


def _union(r: random.Random) -> Formula:
    a, b = sorted(r.sample(range(-30, 50), 2))
    return Formula(
        rf"(-\infty, {a}) \cup ({b}, \infty)",
        (rf"(-\infty,{a})\cup({b},\infty)", rf"({b}, \infty) \cup (-\infty, {a})"),
        (rf"(-\infty, {a}] \cup ({b}, \infty)", rf"(-\infty, {a})", f"{a}"),
        (rf"(-\infty, {a}) \cup ({b - 1} + 1, \infty)",),
    )


def _roots(r: random.Random) -> Formula:
    a, b = sorted(r.sample(range(-20, 40), 2))
    return Formula(
        f"{a}, {b}",
        (f"{b}, {a}", f"{a},{b}", rf"x = {a} \text{{ or }} x = {b}", rf"{a} \text{{ and }} {b}"),
        (f"{a}", f"{b}", f"{a}, {b + 1}", rf"x = {a}"),
        (f"{a}, {b - 2} + 2",),
    )


def _plus_minus(r: random.Random) -> Formula:
    a, b = r.randint(2, 30), r.choice((2, 3, 5, 7, 11))
    return Formula(
        rf"{a} \pm \sqrt{{{b}}}",
        (rf"{a}\pm\sqrt{{{b}}}", rf"{a} \pm \sqrt{{ {b} }}"),
        (
            rf"{a} \pm \sqrt{{{b + 1}}}",
            rf"{a} + \sqrt{{{b}}}",
            f"{a}",
            rf"{a + 1} \pm \sqrt{{{b}}}",
        ),
        (rf"\frac{{{2 * a} \pm 2\sqrt{{{b}}}}}{{2}}",),
    )


def _matrix(r: random.Random) -> Formula:
    a, b, c, d = r.sample(range(1, 30), 4)
    grid = rf"{a} & {b} \\ {c} & {d}"
    return Formula(
        rf"\begin{{pmatrix}} {grid} \end{{pmatrix}}",
        (rf"\begin{{bmatrix}} {grid} \end{{bmatrix}}", rf"\begin{{pmatrix}}{grid}\end{{pmatrix}}"),
        (rf"\begin{{pmatrix}} {b} & {a} \\ {c} & {d} \end{{pmatrix}}", f"{a}"),
        (rf"2\begin{{pmatrix}} {grid} \end{{pmatrix}} - \begin{{pmatrix}} {grid} \end{{pmatrix}}",),
    )


def _vector(r: random.Random) -> Formula:
    a, b, c, d = r.sample(range(1, 40), 4)
    return Formula(
        rf"\begin{{pmatrix}} {a + c} \\ {b + d} \end{{pmatrix}}",
        (rf"\begin{{bmatrix}} {a + c} \\ {b + d} \end{{bmatrix}}",),
        (rf"\begin{{pmatrix}} {a + c + 1} \\ {b + d} \end{{pmatrix}}", f"{a + c}"),
        (
            rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}"
            rf" + \begin{{pmatrix}} {c} \\ {d} \end{{pmatrix}}",
            rf"\begin{{pmatrix}} {a} + {c} \\ {b} + {d} \end{{pmatrix}}",
        ),
    )


def _line(r: random.Random) -> Formula:
    a, b = r.randint(2, 19), r.randint(1, 30)
    return Formula(
        f"y = {a}x + {b}",
        (f"y={a}x+{b}", f"y = {b} + {a}x"),
        (f"y = {a}x - {b}", f"{b}", f"y = {a + 1}x + {b}", f"x = {a}y + {b}"),
        (f"y = {a - 1}x + x + {b}", f"y = {a}(x - 1) + {a + b}"),
    )


def _ratio(r: random.Random) -> Formula:
    a, b = r.sample(range(1, 30), 2)
    return Formula(
        rf"\frac{{x+{a}}}{{x-{b}}}",
        (rf"\dfrac{{x+{a}}}{{x-{b}}}", f"(x+{a})/(x-{b})", rf"\frac{{{a} + x}}{{x - {b}}}"),
        (rf"\frac{{x-{a}}}{{x-{b}}}", f"{a}", rf"\frac{{x-{b}}}{{x+{a}}}"),
        (rf"1 + \frac{{{a + b}}}{{x-{b}}}",),
    )


def _monomial(r: random.Random) -> Formula:
    k, x, n = r.randint(2, 12), r.choice("xyzt"), r.randint(2, 4)
    return Formula(
        f"{k**n}{x}^{n}",
        (f"{k**n} {x}^{{{n}}}", f"{k**n}{x}^{{{n}}}", rf"{k**n} \cdot {x}^{n}"),
        (f"{k**n + 1}{x}^{n}", f"{k**n}", f"{k**n}{x}^{n + 1}", f"{k**n}w^{n}"),
        (f"({k}{x})^{n}", f"{k**n - 1}{x}^{n} + {x}^{n}"),
    )


def _mixed_surd(r: random.Random) -> Formula:
    a, b, c = r.randint(1, 30), r.randint(3, 12), r.choice((2, 3, 5, 7))
    return Formula(
        rf"{a} + {b}\sqrt{{{c}}}",
        (rf"{b}\sqrt{{{c}}}+{a}", rf"{a}+{b}\sqrt{{{c}}}"),
        (rf"{a} - {b}\sqrt{{{c}}}", f"{a}", rf"{a} + {b}\sqrt{{{c + 1}}}"),
        (rf"{a} + \sqrt{{{c}}} + {b - 1}\sqrt{{{c}}}",),
    )


def _inequality(r: random.Random) -> Formula:
    a = r.randint(-30, 60)
    return Formula(
        f"x < {a}",
        (f"x<{a}", f"{a} > x", rf"x \lt {a}"),
        (f"x > {a}", rf"x \le {a}", f"{a}", f"x < {a + 1}"),
        (f"x < {a - 2} + 2",),
    )


def _wave(r: random.Random) -> Formula:
    a, f = r.randint(3, 30), r.choice(("sin", "cos", "tan"))
    other = "cos" if f == "sin" else "sin"
    return Formula(
        rf"{a}\{f} x",
        (rf"{a} \{f}(x)", rf"{a}\cdot\{f} x"),
        (rf"{a}\{other} x", f"{a}", rf"{a + 1}\{f} x", rf"{a}\{f} (2x)"),
        (rf"{a - 1}\{f} x + \{f} x",),
    )


_FAMILIES: tuple[Callable[[random.Random], Formula], ...] = (
    _linear, _quadratic, _square_plus, _factored, _surd, _pi, _logarithm, _exponential, _power,
    _complex, _set, _interval, _tuple, _union, _roots, _plus_minus, _matrix, _vector, _line, _ratio,
    _monomial, _mixed_surd, _inequality, _wave,
)  # fmt: skip
