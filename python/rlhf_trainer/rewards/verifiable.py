"""Verifiable rewards: properties of a text that are checked without a model, 1.0 where they hold, else 0.0.

Only what follows the last </think> counts; of a text that thinks and does not come to an end, nothing does.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jsonschema
import referencing.jsonschema
import regex

from ..errors import kind
from . import mathematics, sandbox
from .arithmetic import value_of
from .child_process import ChildProcess

THINK, END_OF_THINK = "<think>", "</think>"
THINK_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
ANSWER_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
BOXED = "\\boxed{"
HASHES = "####"
ANSWER_IS = regex.compile(r"answer(?:\s++is\b\s*+:?|\s*+:)\s*+(\S[^\n]*)", regex.IGNORECASE)  # each blank is read once
END_OF_SENTENCE = re.compile(r"[.!?;](?:\s|$)")
NUMBER = re.compile(
    r"""(?: (?<! [\w).] ) [-+] )?                            # a sign, not of a subtraction
        (?<! [A-Za-z_\d] )                                  # not the number of a name, as in x2
        (?: (?: \d{1,3} (?: ,\d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )? | \.\d+ )
        (?: e [-+]? \d{1,3} (?!\d) )?
        (?: /\d+ )?""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
AROUND = " ,;:!?\"'`*$“”‘’"
MOST_DIGITS = 1000  # of a number; what is longer is text
PATTERN_SECONDS, SCHEMA_SECONDS = 1.0, 5.0
SCHEMAS = ChildProcess("schemas")
NAME_BEFORE = re.compile(r"^[a-z](?:\([a-z]\))?(?:=|\\in(?![a-z]))")  # x=, f(x)=, x\in
PART = r"\s?(\{[^{}]*\}|[^\W_])"  # of a fraction
FRACTION = re.compile(r"(?:(\d{1,20})\s?)?\\[dtc]?frac" + PART + PART)
UNIT_POWER = re.compile(r"(?<![A-Za-z\\])([mcdk]?m|in|ft|yd|mi|units?|inch(?:es)?|feet|miles|meters?) ?\^\{?[23]\}?")
LATEX = [  # its several spellings of the same -> one, which is plain where there is a plain one
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,!]|\\(?=[$%])|\^\s?(?:\\circ|\{\\circ\})|\\degree|°"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[;: ]"), " "),
    (re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\sqrt\s?(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"([\^_])\{(\w)\}"), r"\1\2"),
    (re.compile(r"(?<=\d)\s?(?:\\times|\\cdot|×)\s?10\^\{?([-+]?\d{1,3})\}?"), r"e\1"),
]


class Verifiable(NamedTuple):
    """A reward as `rewards` uses it: `score(text, prepare(value of the first of columns that the row has))`."""

    score: Callable[[str, Any], float]
    columns: tuple[str, ...] = ()
    what: str = ""  # what the column holds, for messages
    prepare: Callable[[Any], Any] = lambda value: value  # ValueError says what is wrong with the value
    is_slow: bool = False  # several at once are worth a thread each


# --- exact answers


def exact_answer(text: str, answers: list[str]) -> float:
    """1.0 if the final answer of a text is one of `answers`.

    The final answer is what stands in the last <answer>...</answer>; if there is none, in the last \\boxed{...}; if
    none, behind the last ####, in its line; if none, behind the last "answer is" or "answer:", in its line. Within
    <answer> tags the other marks are looked for again. A text without a mark answers with its last number, where a
    number is expected, or else with the whole text.

    Numbers are equal by value: 1,234.50 = 1234.5 = 2469/2, and to the number with % behind it also as its hundredth.
    Where a number is expected, a marked answer may have other words, but only one number (behind "answer is": the first
    counts); "72 or 73" is no answer, and what is left to compute, such as 70+2, neither. Other texts are equal without
    regard to case, white space (around punctuation, too), Unicode's compatibility forms, LaTeX's several spellings of
    the same, the name in x = ..., the parentheses of (A), and the punctuation, quotes, * and $ around them; formulas,
    where math-verify is installed, also by what they mean (`mathematics`).
    """
    try:
        return float(any(answers_with(text, expected) for expected in answers))
    except TimeoutError:
        return 0.0


def answers_with(text: str, expected: str) -> bool:
    content = without_thoughts(text)
    if content is None:
        return False
    number = number_of(expected)
    answer, mark = marked_answer(content) or (content, None)
    if number is None:
        return same_text(answer, expected)
    numbers = numbers_in(answer)
    if mark is None:
        return numbers[-1:] == [number]
    if not numbers or (len(numbers) > 1 and mark != "is"):
        return False
    hundredths = [value / 100 if "%" in text else value for value, text in ((numbers[0], answer), (number, expected))]
    return numbers[0] == number or hundredths[0] == hundredths[1]


def same_text(answer: str, expected: str) -> bool:
    texts = normal(answer), normal(expected)
    if bool(NAME_BEFORE.match(texts[0])) != bool(NAME_BEFORE.match(texts[1])):
        texts = NAME_BEFORE.sub("", texts[0]), NAME_BEFORE.sub("", texts[1])
    if texts[0] == texts[1] or number_of(texts[0]) == number_of(texts[1]) is not None:
        return True
    return mathematics.is_installed() and mathematics.are_equal(answer, expected)


def without_thoughts(text: str) -> str | None:
    """The text behind the last </think>; None where a <think> is open at the end."""
    _, _, content = text.rpartition(END_OF_THINK)
    return None if THINK in content else content


def marked_answer(text: str) -> tuple[str, str] | None:
    """The final answer of a text that marks one, and the kind of mark."""
    tagged = ANSWER_TAGS.findall(text)
    if tagged:
        return marked_answer(tagged[-1]) or (tagged[-1], "tags")
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed, "boxed"
    if HASHES in text:
        return text.rpartition(HASHES)[2].strip().partition("\n")[0], "hashes"
    stated = ANSWER_IS.findall(text, timeout=PATTERN_SECONDS)
    return (END_OF_SENTENCE.split(stated[-1])[0], "is") if stated else None


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} with balanced braces; \\{ and \\} are no braces."""
    for piece in reversed(text.split(BOXED)[1:]):
        depth = 1
        for mark in re.finditer(r"\\.|[{}]", piece, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(mark.group(), 0)
            if depth == 0:
                return piece[: mark.start()]
    return None


def normal(text: str) -> str:
    """Texts that count as equal -> the same text."""
    return re.sub(r"^\(([a-z])\)$", r"\1", re.sub(r" ?([^\w\s]) ?", r"\1", trimmed(text)))


def trimmed(text: str) -> str:
    text = " ".join(plain(text).casefold().split())
    return text.rstrip(AROUND + ".").lstrip(AROUND) or text  # a point at the start may be a number's


def numbers_in(text: str) -> list[Fraction]:
    text = UNIT_POWER.sub(r"\1", plain(text))
    numbers = [number_from(match) for match in NUMBER.findall(text)]
    return [number for number in numbers if number is not None]


def number_of(text: str) -> Fraction | None:
    """The number that a text is; None where it is not one, and nothing else."""
    text = trimmed(text).removesuffix("%")
    return number_from(text) if NUMBER.fullmatch(text) else None


def plain(text: str) -> str:
    """Texts, and numbers in them, as LaTeX and Unicode write them -> as plain text has them, where it can."""
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/")
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return FRACTION.sub(plain_fraction, text)


def plain_fraction(match: re.Match[str]) -> str:
    """3\\frac12 -> 7/2; \\frac ab -> \\frac{a}{b}."""
    whole, *parts = match.groups(default="")
    above, below = (part.strip("{} ") for part in parts)
    if all(part.isdecimal() and len(part) <= MOST_DIGITS for part in (above, below)):
        return f"{int(whole or 0) * int(below) + int(above)}/{below}"
    return f"{whole}\\frac{{{above}}}{{{below}}}"


def number_from(text: str) -> Fraction | None:
    text = text.replace(",", "")
    numerator, _, denominator = text.partition("/")
    if len(text) > MOST_DIGITS or (denominator and int(denominator) == 0):
        return None
    return Fraction(numerator) / int(denominator or 1)


def expected_answers(value: Any) -> list[str]:
    """A column's text or number, or a list of those that are right; of a worked answer, the final one it marks."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(each, str | int | float) for each in values):
        raise ValueError(f"expected text or a number, or a list of them, got {kind(value)}")
    answers = []
    for each in map(str, values):
        marked = marked_answer(each)
        answers.append(each if marked is None or marked[1] == "is" else marked[0])
    if not all(answer.strip() for answer in answers):
        raise ValueError("the expected answer is empty")
    return answers


# --- arithmetic


def arithmetic(text: str, value: Fraction) -> float:
    """1.0 if the final answer of a text, as in `exact_answer`, is this number, exactly: 0.33 is not 1/3."""
    return exact_answer(text, [str(value)])


# --- format


def think_answer(text: str, _expected: None = None) -> float:
    """1.0 if a text is <think>...</think><answer>...</answer>, each tag once, neither part blank, and nothing else
    but white space around them."""
    once = all(text.count(tag) == 1 for tag in (THINK, END_OF_THINK, "<answer>", "</answer>"))
    parts = THINK_ANSWER.fullmatch(text) if once else None
    return float(parts is not None and all(part.strip() for part in parts.groups()))


# --- JSON


def json_schema(text: str, schema: dict[str, Any] | bool) -> float:
    """1.0 if a text holds JSON that the schema allows.

    The JSON is the content of the last <answer> tags, or of the last ``` block, or else the whole text. NaN and
    Infinity are not JSON. What takes over five seconds to check is not allowed.
    """
    content = without_thoughts(text)
    if content is None:
        return 0.0
    tagged = ANSWER_TAGS.findall(content)
    return float(SCHEMAS.holds(last_block(tagged[-1] if tagged else content), schema, seconds=SCHEMA_SECONDS))


def checked_schema(value: Any) -> Any:
    """A schema, or the JSON text of one. Its references have to lead to parts of itself."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, dict | bool):
            raise ValueError(f"expected a JSON schema, got {kind(value)}")
        jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
        whole = referencing.Resource.from_contents(schema, referencing.jsonschema.DRAFT202012)
        look_up_references(whole, referencing.Registry().resolver_with_root(whole))
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON schema: {error.message}") from error
    except (RecursionError, OverflowError) as error:
        raise ValueError("not a JSON schema that can be used: nested too deeply, or with too large a number") from error
    return schema


def look_up_references(part: Any, resolver: Any) -> None:
    for name in ("$ref", "$dynamicRef"):
        reference = part.contents.get(name) if isinstance(part.contents, dict) else None
        try:
            if isinstance(reference, str):
                resolver.lookup(reference)
        except referencing.exceptions.Unresolvable as error:
            raise ValueError(f"not a whole JSON schema: its {name} {reference!r} leads to no part of it") from error
    for below in part.subresources():
        look_up_references(below, resolver.in_subresource(below))


def last_block(text: str) -> str:
    """The content of the last ``` block, whatever language it names, or the whole text."""
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", text, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else text


# --- patterns


def regex_of(argument: str) -> Verifiable:
    """The reward 1.0 for a text with a match of the pattern anywhere, thoughts included; \\A and \\Z anchor it. A
    search that takes over a second has none."""
    if not argument:
        raise ValueError("expected regex:PATTERN")
    try:
        pattern = regex.compile(argument)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"not a pattern: {error}") from error

    def search(text: str, _expected: None = None) -> float:
        try:
            return float(pattern.search(text, timeout=PATTERN_SECONDS) is not None)
        except TimeoutError:
            return 0.0

    return Verifiable(search)


# --- unit tests


def unit_tests(text: str, tests: list[str]) -> float:
    """The share of the tests that the code in a text passes: the last ``` block, or the whole text where there is none.

    `sandbox.run_tests` says what passing means, and what a run may use.
    """
    content = without_thoughts(text)
    if content is None:
        return 0.0
    passed = sandbox.run_tests(last_block(content), tests)
    return sum(passed) / len(passed)


def all_unit_tests(text: str, tests: list[str]) -> float:
    """1.0 if the code in a text passes all tests."""
    return float(unit_tests(text, tests) == 1.0)


def checked_tests(value: Any) -> list[str]:
    """A list of tests, or one text, which is one test."""
    tests = value if isinstance(value, list) else [value]
    if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise ValueError(f"expected a list of tests, assert statements say, or one text, got {kind(value)}")
    for test in tests:
        try:
            compile(test, "<test>", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"not Python: {test!r}: {error}") from error
    return tests


# --- by name, beside regex:PATTERN

EXACT = Verifiable(exact_answer, ("ground_truth", "answer", "solution"), "the right answer", expected_answers)
SHARE = Verifiable(
    unit_tests, ("tests", "test_list"), "assert statements, a list or one text", checked_tests, is_slow=True
)
VERIFIABLE = {
    "exact_answer": EXACT,
    "json_schema": Verifiable(json_schema, ("schema",), "a JSON schema", checked_schema),
    "arithmetic": Verifiable(arithmetic, ("expression",), "such as '12 * (3 + 4)'", value_of),
    "format:think_answer": Verifiable(think_answer),
    "unit_tests": SHARE,
    "unit_tests:all": SHARE._replace(score=all_unit_tests),
}
