"""Whether two answers are mathematically equal, by math-verify, where it is installed (the extra `math`).

It works in a `ChildProcess`: 9^{9^{9^9}} may take for ever. What is no formula (words, formulas of
chemistry, numbers to a base) is not compared: to math-verify "listen" is the product of its letters, as "silent" is.
"""

import functools
import importlib.util
import re

from .child_process import ChildProcess

SECONDS = 5.0  # of one comparison
MOST_CHARACTERS = 200
NO_FORMULA = re.compile(r"(?<![A-Za-z])(?!and(?![A-Za-z]))[A-Za-z]{3,}|[A-Za-z]\d|\d_|\$")
FORMULA = re.compile(r"[\d\\+*/^=<>]")
COMMAND = re.compile(r"\\(?:text|mathrm|mbox|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
SIZES = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\(?=[{}])|[\s$]")
NAME_BEFORE = re.compile(r"^[A-Za-z](?:\([A-Za-z]\))?(?:=|\\in)")
EQUATION = re.compile(r"[\d})]=")
PROCESS = ChildProcess("formulas")


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def are_equal(answer: str, expected: str) -> bool:
    """Whether both are formulas, and the same: values, sets, tuples, intervals, equations, ..."""
    answer, expected = (named(text.strip().strip("$").strip()) for text in (answer, expected))
    if not (is_formula(answer) and is_formula(expected)):
        return False
    forms = [NAME_BEFORE.sub("", SIZES.sub("", text)) for text in (answer, expected)]
    if all("," in form for form in forms) and brackets(forms[0]) != brackets(forms[1]):
        return False  # to math-verify, (1, 2) is {1, 2} too
    if ("=" in forms[0]) != ("=" in forms[1]) and any(map(EQUATION.search, forms)):
        return False  # and x^2 = 1 is 1
    return PROCESS.holds(answer, expected, seconds=SECONDS)


def named(text: str) -> str:
    """Plain pi and sqrt(2) as LaTeX has them."""
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi", text)
    return re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)


def is_formula(text: str) -> bool:
    return len(text) <= MOST_CHARACTERS and bool(FORMULA.search(text)) and not NO_FORMULA.search(COMMAND.sub(" ", text))


def brackets(form: str) -> tuple[str, str]:
    """The round and square brackets around a list; a set's braces are as good as none."""
    return form[0] if form[0] in "([" else "", form[-1] if form[-1] in ")]" else ""
