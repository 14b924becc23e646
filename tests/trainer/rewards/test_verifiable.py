"""Verifiable rewards: what counts as a final answer, a number, JSON, a format or a pattern, and what does not."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import regex

from rlhf_trainer.rewards import mathematics, verifiable
from rlhf_trainer.rewards.arithmetic import MOST_BITS, value_of
from rlhf_trainer.rewards.verifiable import (
    all_unit_tests,
    arithmetic,
    checked_schema,
    checked_tests,
    exact_answer,
    expected_answers,
    json_schema,
    regex_of,
    think_answer,
    unit_tests,
)

needs_math_verify = pytest.mark.skipif(not mathematics.is_installed(), reason="needs the extra math")


def rewards(cases, expected):
    return {text: exact_answer(text, [expected]) for text in cases}


# --- exact answers


RIGHT = [
    "72", " 72.\n", "72.0", "+72", "072", "$72", "**72**", "７２",  # full-width digits
    "It costs $3 and $69, in all 72 dollars.",  # without a mark, the last number
    "#### 72", "3 + 4 = 7\n#### 72\n", "#### $72.00",
    "The answer is 72.", "the answer is: **72**.", "Answer: 72", "The final answer is 72 because 3 * 24 = 72, not 71.",
    "<answer>72</answer>", "<answer> 72 apples </answer>", "<answer>x = 72</answer>", "71 <answer>72</answer> 73",
    "\\boxed{72}", "so $\\boxed{72}$, not 5", "\\boxed{5} no, \\boxed{72}", "<answer>\\boxed{72}</answer>",
    "\\boxed{144/2}", "\\boxed{\\frac{144}{2}}", "\\boxed{7.2e1}",
    "<think>71? <answer>70</answer></think>72", "<answer>71</answer> wait: <answer>72</answer>",
]  # fmt: skip
WRONG = [
    "", "  ", "no number", "71", "-72", "72.5", "7 2 3", "720", "x72",  # a name, not a number
    "72 or 73 <answer>72 or 73</answer>",  # a hedge is no answer
    "\\boxed{72, 73}", "#### 72 73", "<answer></answer> 72", "<answer>72", "<answer>71</answer>72",
    "The answer is 71, or 72.", "<answer>72</answer><answer>71</answer>",
    "<think>72",  # thinks and does not come to an end
    "<think>72</think>", "<think>a</think><think>72",
    "\\boxed{71} is 72", "\\boxed{72} <answer>71</answer>", "1/72", "72/0", "72!73",
]  # fmt: skip


def test_a_number_is_found_where_an_answer_is_marked_or_last():
    assert [text for text, reward in rewards(RIGHT, "72").items() if reward != 1.0] == []
    assert [text for text, reward in rewards(WRONG, "72").items() if reward != 0.0] == ["<answer>72"]


def test_an_answer_tag_that_does_not_close_is_no_mark():
    """So the last number counts, as in any text without a mark."""
    assert exact_answer("<answer>72", ["72"]) == 1.0 and exact_answer("<answer>72 or 73", ["72"]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234,567.50", "1234567.5"), ("1234567.5", "1,234,567.50"), ("-3", "−3"), ("5-3 = 2", "2"), ("is −7", "-7"),
        ("0.5", "1/2"), ("\\boxed{\\dfrac{1}{2}}", ".5"), (".50", "0.5"), ("1e3", "1000"), ("12{,}345", "12345"),
        ("9" * 900, "9" * 900), ("9" * 900 + ".0", "9" * 900), ("0", "-0"),
    ],
)  # fmt: skip
def test_numbers_are_equal_by_value(text, expected):
    assert exact_answer(text, [expected]) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.333", "1/3"), ("9" * 900, "9" * 899 + "8"), ("1e400", "1e399"), ("10000000000000001", "10000000000000000"),
        ("5-3", "-3"), ("1.5", "15"), ("1,5", "15"),
    ],
)  # fmt: skip
def test_numbers_are_compared_exactly(text, expected):
    assert exact_answer(text, [expected]) == 0.0


def test_numbers_too_large_to_compute_with_are_texts():
    start = time.monotonic()
    assert exact_answer("9" * 100_000, ["9" * 100_000]) == 1.0
    assert exact_answer("1e999999999", ["1e999999999"]) == 1.0
    assert exact_answer("1e999999999", ["7"]) == 0.0 and exact_answer("9" * 100_000, ["7"]) == 0.0
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "expected", "reward"),
    [
        ("olleh", "olleh", 1), (" Olleh.\n", "olleh", 1), ("'olleh'", "olleh", 1), ("hello", "olleh", 0),
        ("The answer is Paris. It is in France.", "Paris", 1), ("The answer is not Paris", "Paris", 0),
        ("I think Paris", "Paris", 0),  # without a mark, the whole text
        ("<answer>\n New   York \n</answer>", "new york", 1), ("\\boxed{x^{2}+1}", "x^{2}+1", 1),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", 1), ("\\boxed{a{b}", "a{b", 0),
        ("\\boxed{\\boxed{a}}", "a", 1), ("ﬁne café", "FINE CAFE\u0301", 1), ("straße", "STRASSE", 1), ("猫", "猫", 1),
        ("C++", "C", 0), ("!", "?", 0), ("", "a", 0), ("<answer></answer>", "a", 0), ("(B)", "B", 1), ("(B)", "A", 0),
        ("<answer><answer>a</answer>", "a", 1), ("<ANSWER>a</ANSWER>", "a", 0),
    ],
)  # fmt: skip
def test_texts_are_equal_but_for_case_space_and_punctuation_around(text, expected, reward):
    assert exact_answer(text, [expected]) == reward


RIGHT_LATEX = [
    ("\\frac12", "1/2"), ("\\dfrac{1}{2}", "0.5"), ("-\\tfrac1{2}", "-\\frac12"), ("3\\frac{1}{2}", "7/2"),
    ("\\text{Tuesday}", "Tuesday"), ("5\\text{ cm}^2", "5"), ("5 cm^2", "5"), ("5\\,\\mathrm{m}^{2}", "5"),
    ("(A)", "A"), ("\\textbf{(A)}", "A"), ("\\text{A}", "(A)"), ("1{,}000", "1000"), ("1{,}234{,}567", "1234567"),
    ("50\\%", "50"), ("50\\%", "0.5"), ("50", "50\\%"), ("0.5", "50\\%"), ("\\$5", "5"), ("5", "\\$5.00"),
    ("90^\\circ", "90"), ("90", "90^{\\circ}"), ("x=5", "5"), ("5.0", "x = 5"), ("y=2x+1", "2x + 1"),
    ("x\\in[0,1]", "[0,1]"),
    ("(1,2)", "(1, 2)"), ("\\left[0, 1\\right)", "[0,1)"), ("\\{1,2\\}", "\\{ 1, 2 \\}"), ("\\sqrt2", "\\sqrt{2}"),
    ("1.5\\times10^{3}", "1500"), ("x^{2}", "x^2"), ("\\frac ab", "\\dfrac{a}{b}"), ("2\\!\\pi", "2\\pi"),
]  # fmt: skip
RIGHT_FORMULAS = [  # to math-verify
    ("\\{2,1\\}", "\\{1,2\\}"), ("2, 1", "1,2"), ("\\sqrt{8}", "2\\sqrt{2}"), ("x^2+2x+1", "(x+1)^2"),
    ("pi/2", "\\frac{\\pi}{2}"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt3}"), ("25\\pi\\text{ cm}^2", "25\\pi"), ("2*sqrt(2)", "\\sqrt{8}"),
    ("x=1\\text{ or }x=2", "1,2"), ("(\\frac12, 3)", "(0.5,3)"),
    ("(3,\\infty)\\cup(-\\infty,2)", "(-\\infty,2)\\cup(3,\\infty)"),
    ("4i+3", "3+4i"), ("\\log_2 3", "\\frac{\\ln 3}{\\ln 2}"), ("5 \\ge x", "x \\le 5"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
]  # fmt: skip
WRONG_FORMULAS = [
    ("\\frac12", "2"), ("\\frac12", "12"), ("3\\frac12", "31/2"), ("\\text{Tuesday}", "Thursday"), ("5 cm^2", "25"),
    ("(A)", "B"), ("1{,}5", "15"), ("1, 234", "1234"), ("1,234", "1, 2, 34"), ("50\\%", "5"), ("0.5\\%", "50\\%"),
    ("x=5", "6"), ("(2,1)", "(1,2)"), ("[0,1]", "[0,1)"), ("(0,1)", "[0,1]"), ("(1,2)", "\\{1,2\\}"),
    ("(1,2)", "1,2"), ("1", "1,2"),
    ("1,2,3", "1,2"), ("1.732", "\\sqrt{3}"), ("3.14159", "\\pi"), ("(0.3333333,1)", "(1/3,1)"), ("2x", "x^2"),
    ("x<5", "x>5"), ("x=1", "y=1"), ("x^2=1", "1"), ("listen", "silent"), ("no", "on"), ("C2O", "CO2"),
    ("120_3", "120_5"), ("70+2", "72"),
    ("9^{9^{9^9}}", "9^{9^{9^9}}+1"), ("\\frac{1}{", "x/2"), ("((((((((+", "x+1"), ("\\begin{pmatrix}1", "x+1"),
    ("xy^2", "xy^3"),
]  # fmt: skip


def boxed(cases):
    return {case: exact_answer(f"So \\boxed{{{case[0]}}}.", [case[1]]) for case in cases}


def test_answers_in_latex_without_math_verify(monkeypatch):
    monkeypatch.setattr(mathematics, "is_installed", lambda: False)
    assert [case for case, reward in boxed(RIGHT_LATEX).items() if reward != 1.0] == []
    assert [case for case, reward in boxed(WRONG_FORMULAS + RIGHT_FORMULAS).items() if reward != 0.0] == []


@needs_math_verify
def test_formulas_are_equal_by_what_they_mean():
    assert [case for case, reward in boxed(RIGHT_LATEX + RIGHT_FORMULAS).items() if reward != 1.0] == []
    assert [case for case, reward in boxed(WRONG_FORMULAS).items() if reward != 0.0] == []
    assert exact_answer("x^2+2x+1", ["(x+1)^2"]) == 1.0  # the whole of a text without a mark
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda n: exact_answer(f"{n}*sqrt(2)", [f"\\sqrt{{{2 * n * n}}}"]), range(2, 12)))


@needs_math_verify
def test_a_comparison_that_takes_too_long_is_given_up(monkeypatch):
    """A power of integers has three hundred million digits, and no signal ends Python while it computes them."""
    assert exact_answer("x+x", ["2x"]) == 1.0
    process = mathematics.PROCESS.process
    monkeypatch.setattr(mathematics, "SECONDS", 0.5)
    assert exact_answer("9^{9^{9}}+x", ["x+1"]) == 0.0
    assert process.poll() is not None and mathematics.PROCESS.process is None
    monkeypatch.undo()
    assert exact_answer("x+x", ["2x"]) == 1.0


def test_any_of_several_right_answers():
    assert exact_answer("color", ["colour", "color"]) == 1.0 and exact_answer("red", ["colour", "color"]) == 0.0


def test_what_a_row_expects():
    assert expected_answers("3 * 24 = 72\n#### 72") == ["72"]  # GSM8K's worked answers
    assert expected_answers("so \\boxed{\\frac{1}{2}}.") == ["\\frac{1}{2}"]  # MATH's
    assert expected_answers("the answer is in the box") == ["the answer is in the box"]
    assert expected_answers(72) == ["72"] and expected_answers([1.5, "x"]) == ["1.5", "x"]
    for bad in ({}, [], "", ["a", " "], [None], "#### "):
        with pytest.raises(ValueError, match="expected"):
            expected_answers(bad)


def test_long_texts_are_searched_in_time_that_grows_with_their_length():
    start = time.monotonic()
    for text in ("<answer>" * 50_000, "\\boxed{" * 50_000, "answer " + " " * 200_000, "answer is" + " " * 200_000,
                 "1,234" * 50_000, "#" * 300_000,
                 "</think>" * 50_000, "```\n" * 50_001, "<think>" + " " * 200_000 + "</think>"):  # fmt: skip
        assert exact_answer(text, ["no"]) == json_schema(text, False) == think_answer(text) == 0.0
    assert time.monotonic() - start < 10


def test_a_search_for_an_answer_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(verifiable, "ANSWER_IS", regex.compile(r"(a|aa)+$"))
    monkeypatch.setattr(verifiable, "PATTERN_SECONDS", 0.01)
    assert exact_answer("a" * 80 + "c", ["a" * 80 + "c"]) == 0.0


# --- arithmetic


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 34", 46), ("12+34=", 46), ("2 + 3 * 4 = ?", 14), ("(2+3)*4", 20), ("1/3 + 1/6", Fraction(1, 2)),
        ("0.1 + 0.2", Fraction(3, 10)), ("7 // 2 % 2", 1), ("-2 ** 2", -4), ("2^10", 1024), ("2 ** -2", Fraction(1, 4)),
        ("6 × 7", 42), ("8 ÷ 4 − 1", 1), ("－(3)", -3), ("0.12345678901234567890", Fraction("0.1234567890123456789")),
    ],
)  # fmt: skip
def test_expressions_have_exact_values(expression, value):
    assert value_of(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", "=", "2 +", "x", "f(2)", "__import__('os').system('true')", "(1).real", "[1]", "'a' * 3", "1 if 2 else 3",
        "1j", "True", "1 == 1", "~1", "1 << 9", "1; 2", "lambda: 1", "1 / 0", "0 ** -1", "5 % 0", "1e5",
        "1e999999999", "2 ** 0.5",
        "9 ** 9 ** 9", "9 ** 99999999999999", "(9 ** 900) ** 900", "*".join(["9 ** 900"] * 50),
        "(" * 400 + "1" + ")" * 400, "-" * 990 + "1", "1" * 1001, 7, None, "1_0 + x",
    ],
)  # fmt: skip
def test_what_is_no_expression_or_too_large(expression):
    start = time.monotonic()
    with pytest.raises(ValueError):
        value_of(expression)
    assert time.monotonic() - start < 1


def test_nesting_is_bounded_whatever_the_recursion_limit():
    """torch's compiler raises the limit for the whole process."""
    limit = sys.getrecursionlimit()
    try:
        for other in (limit, 20_000):
            sys.setrecursionlimit(other)
            assert value_of("1" + "+1" * 499) == 500
            with pytest.raises(ValueError):
                value_of("-" * 990 + "1")
    finally:
        sys.setrecursionlimit(limit)


def test_arithmetic_compares_the_final_number():
    assert arithmetic("2 + 2 is 4", value_of("2 + 2")) == 1.0
    assert arithmetic("<answer>5</answer> 4", value_of("2 + 2")) == 0.0
    assert arithmetic("1/3", value_of("1 / 3")) == arithmetic("2/6", value_of("1 / 3")) == 1.0
    assert arithmetic("0.3333333333", value_of("1 / 3")) == 0.0
    large = value_of(f"2 ** {MOST_BITS // 2}")
    assert arithmetic(f"It is {large}.", large) == 1.0 and arithmetic(f"It is {large + 1}.", large) == 0.0


# --- format


GOOD_FORMAT = "<think>\nIt is 2.\n</think>\n\n<answer>2</answer>\n"


@pytest.mark.parametrize(
    "text",
    [
        "", "<think>a</think>", "<answer>2</answer>", "<answer>2</answer><think>a</think>", "Well: " + GOOD_FORMAT,
        GOOD_FORMAT + "Done.", GOOD_FORMAT * 2, "<think></think><answer>2</answer>",
        "<think>a</think><answer> </answer>",
        "<think>a</think> so <answer>2</answer>", "<think><think>a</think></think><answer>2</answer>",
        "<think>a <answer>1</answer></think><answer>2</answer>", "<think>a</think><answer>2</answer></answer>",
        "<Think>a</Think><answer>2</answer>", "<think>a<answer>2</answer></think>",
    ],
)  # fmt: skip
def test_a_format_is_kept_whole_or_not_at_all(text):
    assert think_answer(GOOD_FORMAT) == 1.0
    assert think_answer(text) == 0.0


# --- JSON


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"n": 3}', 1), (' {"n": 3}\n', 1), ('Here:\n```json\n{"n": 3}\n```\nDone.', 1), ('```\n{"n": 3}\n```', 1),
        ('<think>{"n": "x"}</think><answer>{"n": 3}</answer>', 1), ('```json\n[]\n```\n```json\n{"n": 3}\n```', 1),
        ('{"n": "3"}', 0), ('{"n": 3, "m": 1}', 0), ("{}", 0), ("", 0), ("n: 3", 0), ("{'n': 3}", 0),
        ('{"n": NaN}', 0), ('{"n": ' + "9" * 5000 + "}", 0), ("[" * 100_000, 0), ('{"n": 3} ok', 0),
        ('```json\n{"n": 3}\n```\n```\n[]\n```', 0),
        ('```json\n{"n": 3}', 0),  # the block does not end
        ('<think>{"n": 3}', 0), ('{"n": 3.0}', 1),  # to JSON Schema 3.0 is an integer
    ],
)  # fmt: skip
def test_json_that_a_schema_allows(text, reward):
    assert json_schema(text, SCHEMA) == reward


def test_schemas_of_other_drafts_and_of_all_and_nothing():
    fourth = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}
    assert json_schema("3", checked_schema(fourth)) == 0.0 and json_schema("2", checked_schema(fourth)) == 1.0
    assert json_schema("3", checked_schema(True)) == 1.0 and json_schema("3", checked_schema("false")) == 0.0
    assert checked_schema(json.dumps(SCHEMA)) == SCHEMA
    for bad in ("{", 3, [], {"type": 3}, {"required": "n"}):
        with pytest.raises(ValueError):
            checked_schema(bad)


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("1e400", {"multipleOf": 0.1}), ("1" * 400, {"multipleOf": 0.1}), ("-1e400", {"multipleOf": 3}),
        ("1" * 5000, {}), ("[" * 900 + "]" * 900, {"items": {"$ref": "#"}, "type": "array", "minItems": 1}),
        ('"' + "\\ud800" * 9 + '"', {"pattern": "a"}), ("\ud800", {}), ("1", {"$ref": "#/nowhere"}),
    ],
)  # fmt: skip
def test_json_that_cannot_be_checked_is_not_allowed(text, schema):
    assert json_schema(text, schema) == 0.0 and json_schema("3", {"multipleOf": 3}) == 1.0


@pytest.mark.parametrize(
    ("value", "schema"),
    [("a" * 60 + "b", {"pattern": "^(a+)+$"}), ([{"a": [i]} for i in range(20_000)], {"uniqueItems": True})],
)
def test_a_check_that_takes_too_long_is_given_up(value, schema, monkeypatch):
    assert json_schema("1", checked_schema(schema)) == 1.0
    process = verifiable.SCHEMAS.process
    monkeypatch.setattr(verifiable, "SCHEMA_SECONDS", 0.3)
    assert json_schema(json.dumps(value), schema) == 0.0
    assert process.poll() is not None and verifiable.SCHEMAS.process is None
    monkeypatch.undo()
    assert json_schema("1", schema) == 1.0


DEEP = "[" * 50_000 + "]" * 50_000


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "#/nowhere"}, "'#/nowhere'"), ({"items": {"$ref": "http://a.example/b"}}, "'http://a.example/b'"),
        ({"$defs": {"a": {"not": {"$ref": "#b"}}}}, "'#b'"), ({"patternProperties": {"(": {}}}, "regex"),
        ({"pattern": "("}, "regex"), ('{"const": ' + DEEP + "}", "deep"), ('{"multipleOf": 0}', "schema"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_used_are_refused_before_training(schema, problem):
    with pytest.raises(ValueError, match=problem):
        checked_schema(schema)


def test_references_within_a_schema_are_followed():
    tree = {"$defs": {"n": {"$anchor": "number", "type": "integer"}}, "items": {"$ref": "#/$defs/n"}}
    tree |= {"properties": {"$ref": {"$ref": "#number"}}, "enum": [[1], {"$ref": 2}], "examples": [{"$ref": "#/x"}]}
    assert json_schema("[1]", checked_schema(tree)) == json_schema('{"$ref": 2}', checked_schema(tree)) == 1.0


# --- patterns


def test_a_pattern_is_found_anywhere_unless_anchored():
    assert regex_of("a+b").score("xx aab yy") == 1.0
    assert regex_of(r"\Aa+b\Z").score("xx aab") == 0.0
    assert regex_of(r"\Aa+b\Z").score("aab") == 1.0
    assert regex_of("(?s)a.b").score("a\nb") == 1.0 and regex_of("a.b").score("a\nb") == 0.0
    assert regex_of("a").score("") == 0.0


def test_a_pattern_that_backtracks_without_end_is_not_found_in_a_second():
    start = time.monotonic()
    assert regex_of(r"(a|aa)+$").score("a" * 80 + "c") == 0.0
    assert time.monotonic() - start < 10


# --- unit tests: what the sandbox makes of them is in test_sandbox.py


ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ba'"]


@pytest.mark.parametrize(
    "text",
    [
        ADD,
        f"Here it is:\n```python\n{ADD}```\nDone.",
        f"```\nadd = 3\n```\n```py\n{ADD}```\n",
        f"<think>```python\nx\n```</think>\n```python\n{ADD}```",
    ],
)
def test_the_share_of_tests_that_pass(text):
    assert unit_tests(text, TESTS) == pytest.approx(2 / 3)


def test_all_tests_or_nothing():
    assert all_unit_tests(ADD, TESTS) == 0.0 and all_unit_tests(ADD, TESTS[:2]) == 1.0


def test_code_that_is_none():
    for text in ("", "def add(a, b)", "I cannot.", "```python\nadd = ", f"<think>{ADD}"):
        assert unit_tests(text, TESTS) == 0.0


def test_tests_are_a_list_or_one_text():
    whole = "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"
    assert checked_tests(whole) == [whole] and unit_tests(ADD, checked_tests(whole)) == 1.0
    assert checked_tests(TESTS) == TESTS
    for bad in ([], "", [3], None, [" "], ["assert ("], ["a\0b"]):
        with pytest.raises(ValueError, match=r"expected a list of tests|not Python"):
            checked_tests(bad)
