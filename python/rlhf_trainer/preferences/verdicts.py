"""What a judge's answer decides, and what is asked of it: templates, verdicts, and how two of them settle a pair."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError

TEMPLATES = Path(__file__).with_name("templates")
PLACE = re.compile(r"\{(question|reference|answer_a|answer_b|answer)\}")
PAIRWISE, SINGLE = ({"question", "answer_a", "answer_b"}, {"question", "answer"})
LETTERS, RATINGS = ("A", "B", "C"), tuple(map(str, range(1, 11)))

# What repeats is bounded, or takes a line or the rest at once: else a hostile answer takes hours.
THOUGHTS = re.compile(r"\A.*</think>|<think>.*\Z", re.S)  # up to their last end; or begun, and not ended
BLOCK = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)|^ {0,3}>.*?$", re.M | re.S)  # code or a quote
QUOTED = re.compile(
    r"(?<!`)(`+)(?!`)[^\n]{0,500}?(?<!`)\1(?!`)|“[^”\n]{0,500}”|«[^»\n]{0,500}»|「[^」\n]{0,500}」"
    r"|\"[^\"\n]{0,500}\"|(?<!\w)['‘][^'’\n]{0,500}\]['’]"
)
# A last line that is nothing but a verdict in quotes, perhaps behind a colon: prompts show the form in quotes.
QUOTED_LINE = re.compile(r"^(.*[:：])?[ \t]*[*_]*[\"“'‘](\[\[\w+\]\])[\"”'’][*_.。]*\Z", re.M)
# Whatever looks like a verdict, of any form: anything in two brackets, or one character in one.
OPEN, CLOSED = r"(?:\\?[\[［【])", r"(?:\\?[\]］】])"
LOOSE = re.compile(rf"{OPEN}{{2,3}}[^\[\]［］【】\n]{{0,40}}{CLOSED}{{1,3}}|{OPEN} ?[^\W_] ?{CLOSED}")
WORD = re.compile(r"\w")
SENTENCE_END = re.compile(r"[.!?][^\w\s]{0,3}\s|[。！？\n]")


def parse_verdict(answer: str, allowed: Collection[str] = LETTERS) -> str | None:
    """The verdict of `allowed` that an answer ends with, in the form [[A]]; None where there is none, the last is of
    another form, or the final statement has two different ones.

    Only the last statement counts that has a verdict. What stands in thoughts, in code, in block quotes or in quotation
    marks decides nothing, unless the last line is a verdict in quotation marks and nothing else.
    """
    text = BLOCK.sub("", THOUGHTS.sub("", answer))
    text = QUOTED.sub(" ", QUOTED_LINE.sub(r"\1 \2", text.rstrip()))
    verdicts = list(LOOSE.finditer(text))
    ends = (0, *(verdict.end() for verdict in verdicts))
    before = [text[end : verdict.start()] for end, verdict in zip(ends, verdicts, strict=False)]
    final: set[str] = set()
    for i in range(len(verdicts) - 1, -1, -1):
        final.add(verdicts[i][0])
        *others, _ = SENTENCE_END.split(before[i])
        introduced = i > 0 and WORD.search(SENTENCE_END.split(before[i - 1])[-1])
        if others and (introduced or WORD.search(before[i])):  # [[A]] and [[B]], alone on two lines, are one statement
            break
    (only,) = final if len(final) == 1 else ("",)
    return only[2:-2] if only[2:-2] in allowed and only == f"[[{only[2:-2]}]]" else None


class Template(NamedTuple):
    """A prompt for a judge, with {question}, and {answer_a} and {answer_b} or, for ratings, {answer}; perhaps with
    {reference}, which is the row's column of that name or its ground_truth."""

    text: str
    places: frozenset[str]

    @property
    def allowed(self) -> tuple[str, ...]:
        return RATINGS if "answer" in self.places else LETTERS

    def questions(self, question: str, reference: str, chosen: str, rejected: str) -> tuple[str, str]:
        """What a judge is asked about a pair: in both orders, or about each of the two."""

        def filled(a: str, b: str) -> str:  # in one pass: texts may have braces of their own
            values = {"question": question, "reference": reference, "answer": a, "answer_a": a, "answer_b": b}
            return PLACE.sub(lambda place: values[place[1]], self.text)

        return filled(chosen, rejected), filled(rejected, chosen)

    def settle(self, first: str | None, second: str | None) -> tuple[str, bool]:
        """(verdict on the pair, whether the judge's changed with the order), of the verdicts on `questions`."""
        if first is None or second is None:
            return "unparsed", False
        if "answer" in self.places:
            return ("chosen", "tie", "rejected")[1 + (int(first) < int(second)) - (int(first) > int(second))], False
        same = first == {"A": "B", "B": "A", "C": "C"}[second]
        return ({"A": "chosen", "B": "rejected", "C": "tie"}[first] if same else "tie"), not same


def load_template(name: str) -> Template:
    """The shipped template of this name, or that of a file; UsageError where its places are not a template's."""
    shipped = {path.stem: path for path in TEMPLATES.glob("*.txt")}
    try:
        text = shipped.get(name, Path(name)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(shipped))
        raise UsageError(f"judge_template: expected {known} or a text file, got {name!r}: {error}") from error
    places = frozenset(PLACE.findall(text))
    if places - {"reference"} not in (PAIRWISE, SINGLE):
        raise UsageError(
            f"judge_template: {name} must have {{question}}, and {{answer_a}} and {{answer_b}}, or {{answer}} for a "
            f"rating; it has: {', '.join(sorted(places)) or 'none of them'}"
        )
    return Template(text, places)
