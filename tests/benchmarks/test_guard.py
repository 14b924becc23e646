"""benchmarks/guard: its verdicts on recorded times, and the command at tiny sizes, whose times are not judged."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard.instructions import callgrind_total
from benchmarks.guard.verdict import is_bad, judge, median_interval, with_instructions

ROOT = Path(__file__).resolve().parents[2]
# Recorded milliseconds of base and head: of a set of rounds that fell into a slow spell of the machine, of a calm one.
SPELL = [(21.4, 21.6), (33.9, 33.5), (36.2, 36.4), (34.1, 34.2), (22.0, 21.7), (21.3, 21.4), (34.8, 34.6), (21.5, 21.5)]
CALM = [(21.2, 21.3), (21.1, 21.1), (21.5, 21.3), (21.3, 21.4), (21.2, 21.2), (21.4, 21.2), (21.1, 21.2), (21.3, 21.3)]


def slowed(rounds, by):
    return [(base, by * head) for base, head in rounds]


def rounds(seed, slower=1.0, noise=0.02, sets=3, each=20):
    """Times of base and head, drawn. Slow spells of the machine fall on both, noise on each by itself."""
    draw = random.Random(seed)
    return [
        [
            tuple(spell * factor * draw.lognormvariate(0, noise) for factor in (1.0, slower))
            for spell in (draw.choice((1.0, 1.0, 1.6)) for _ in range(each))
        ]
        for _ in range(sets)
    ]


def test_recorded_times_have_their_verdicts():
    assert judge([SPELL, CALM, CALM])[1] == "ok"
    assert judge([slowed(of_set, 1.1) for of_set in (SPELL, CALM, CALM)])[1] == "SLOWER"
    assert judge([slowed(of_set, 0.9) for of_set in (SPELL, CALM, CALM)])[1] == "faster"
    assert judge([CALM[:7]])[1] == "cannot tell", "too few rounds, whatever they say"


def test_one_set_of_processes_that_is_not_slower_acquits():
    assert judge([slowed(CALM, 1.1), slowed(CALM, 1.1), CALM])[1] == "cannot tell"


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        low, _, high = median_interval([draw.lognormvariate(0, 0.1) for _ in range(15)])
        held += low <= 1 <= high
    assert held >= 980  # 990 expected; the deviation of such a count is 3


def test_seven_rounds_bear_no_interval_and_eight_do():
    assert median_interval([1.0] * 7) == (0, 1, float("inf"))
    assert median_interval([float(k) for k in range(1, 9)]) == (1, 4.5, 8)
    assert median_interval([float(k) for k in range(1, 3001)]) == (1429, 1500.5, 1572)  # 2**3000 is no float


def test_a_slowdown_of_a_tenth_is_found():
    verdicts = [judge(rounds(seed, slower=1.1))[1] for seed in range(200)]
    assert verdicts.count("SLOWER") >= 198
    assert judge(rounds(0, slower=0.9))[1] == "faster"


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_equal_sides_are_not_called_slower(noise):
    verdicts = [judge(rounds(seed, noise=noise))[1] for seed in range(400)]
    assert verdicts.count("SLOWER") <= 1


def test_a_noisy_machine_says_that_it_cannot_tell():
    assert judge(rounds(0, noise=0.3))[1] == "cannot tell"


def test_instructions_are_a_finding_and_decide_where_times_cannot():
    assert with_instructions("ok", None) == with_instructions("ok", 1.019) == "ok"
    assert with_instructions("ok", 1.03) == "ok, more instructions"
    assert with_instructions("cannot tell", 1.03) == "MORE INSTRUCTIONS"


def test_what_turns_the_status():
    assert all(map(is_bad, ("SLOWER", "SLOWER, more instructions", "MORE INSTRUCTIONS", "head cannot: it")))
    assert not any(map(is_bad, ("ok", "faster", "cannot tell", "ok, more instructions", "base cannot: it")))


def test_callgrind_totals():
    assert callgrind_total("version: 1\nevents: Ir\nfn=(1) main\n12 34\ntotals: 10526813\n") == 10526813
    with pytest.raises(ValueError, match="no totals"):
        callgrind_total("version: 1\n")


# --- the command ---


def guard(*options):
    command = [sys.executable, "-m", "benchmarks.guard", *map(str, options)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_case_has_a_line_and_a_lost_function_turns_the_status(tmp_path):
    """Head has lost one op; what the times of the other are is not judged."""
    shutil.copytree(ROOT / "rlhf_kernels", tmp_path / "rlhf_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "rlhf_kernels" / "__init__.py", "a") as file:
        file.write("\ndel bradley_terry_loss\n")
    status, output = guard(
        "--base-folder", ROOT, "--head-folder", tmp_path, "--tiny", "--no-instructions", "--sets", "1",
        "--seconds", "0", "--cases", "log-probs fp32, total|Bradley",
    )  # fmt: skip
    assert status == 1, output
    assert f"base the working tree, head {tmp_path.name[:9]}: " in output
    assert "Bradley-Terry, total " in output and "head cannot: AttributeError" in output
    assert re.search(r"^log-probs fp32, total +[\d.]+ +[\d.]+ +[\d.]+-[\d.]+ +[\d.]+ +8 +\w+", output, re.M), output
    assert "KL" not in output and "instructions: not requested" in output
    assert re.search(r"^worse: .*Bradley-Terry, total", output, re.M), output


def test_what_cannot_be_compared_has_status_two(tmp_path):
    status, output = guard("--base", "no-such-revision")
    assert status == 2 and "no-such-revision" in output
    status, output = guard("--base-folder", tmp_path, "--tiny")
    assert status == 2 and str(tmp_path) in output, output
