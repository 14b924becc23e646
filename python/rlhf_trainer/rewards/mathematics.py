"""Whether two answers are mathematically equal, by math-verify, where it is installed (the extra `math`).

It works in a process of its own, which is ended where a comparison takes long: what a completion holds, 9^{9^{9^9}}
say, may take for ever, and no signal ends Python while it computes a power. What is no formula (words, formulas of
chemistry, numbers to a base) is not compared: to math-verify "listen" is the product of its letters, as "silent" is.
"""

import atexit
import functools
import importlib.util
import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer

SECONDS = 5.0  # of one comparison
START_SECONDS = 120.0  # sympy is large
MOST_CHARACTERS = 200
CHILD = Path(__file__).with_name("mathematics_child.py")
NO_FORMULA = re.compile(r"(?<![A-Za-z])(?!and(?![A-Za-z]))[A-Za-z]{3,}|[A-Za-z]\d|\d_|\$")
FORMULA = re.compile(r"[\d\\+*/^=<>]")
COMMAND = re.compile(r"\\(?:text|mathrm|mbox|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
SIZES = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\(?=[{}])|[\s$]")
NAME_BEFORE = re.compile(r"^[A-Za-z](?:\([A-Za-z]\))?(?:=|\\in)")
EQUATION = re.compile(r"[\d})]=")


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
    return PROCESS.compare(answer, expected)


def named(text: str) -> str:
    """Plain pi and sqrt(2) as LaTeX has them."""
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi", text)
    return re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)


def is_formula(text: str) -> bool:
    return len(text) <= MOST_CHARACTERS and bool(FORMULA.search(text)) and not NO_FORMULA.search(COMMAND.sub(" ", text))


def brackets(form: str) -> tuple[str, str]:
    """The round and square brackets around a list; a set's braces are as good as none."""
    return form[0] if form[0] in "([" else "", form[-1] if form[-1] in ")]" else ""


class Process:
    """The process that compares: started when it is needed, and ended where it takes too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = Lock()
        atexit.register(self.stop)

    def compare(self, answer: str, expected: str) -> bool:
        with self.lock:
            if self.process is None:
                command, pipe = [sys.executable, "-P", str(CHILD)], subprocess.PIPE
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
                if not self.receive(START_SECONDS):
                    return False
            with suppress(BrokenPipeError):  # it has ended since
                print(json.dumps([answer, expected]), file=self.process.stdin, flush=True)
            return self.receive(SECONDS) == "equal"

    def receive(self, seconds: float) -> str:
        """The next line; nothing where the process ends first, which it has to after so many seconds."""
        timer = Timer(seconds, self.process.kill)
        timer.start()
        line = self.process.stdout.readline().strip()
        timer.cancel()
        if not line:
            self.stop()
        return line

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


PROCESS = Process()
