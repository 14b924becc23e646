"""benchmarks/guard/guard.py: its statistics on times that are made up, and the command itself at tiny sizes."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard.guard import callgrind_total, judge, median_interval, verdict_with

ROOT = Path(__file__).resolve().parents[2]


def rounds(seed, slower=1.0, noise=0.02, sets=3, each=20):
    """Times of base, base again and head. Slow spells of the machine fall on all three, noise on each by itself."""
    draw = random.Random(seed)
    return [
        [
            tuple(spell * factor * draw.lognormvariate(0, noise) for factor in (1.0, 1.0, slower))
            for spell in (draw.choice((1.0, 1.0, 1.6)) for _ in range(each))
        ]
        for _ in range(sets)
    ]


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
    verdicts = [judge(rounds(seed, slower=1.1)).verdict for seed in range(200)]
    assert verdicts.count("SLOWER") >= 198
    assert judge(rounds(0, slower=0.9)).verdict == "faster"


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_equal_sides_are_not_called_slower(noise):
    verdicts = [judge(rounds(seed, noise=noise)).verdict for seed in range(400)]
    assert verdicts.count("SLOWER") <= 1


def test_a_quiet_machine_says_ok_and_a_noisy_one_that_it_cannot_tell():
    assert judge(rounds(0)).verdict == "ok"
    assert judge(rounds(0, noise=0.3)).verdict == "cannot tell"
    assert judge(rounds(0, sets=1, each=7)).verdict == "cannot tell"  # too few rounds, whatever they say


def test_noise_between_processes_is_part_of_the_bound():
    """Base again is 6% slower in one set of three: the median does not see it, the bound does."""
    sets = rounds(0, slower=1.04, noise=0.002)
    sets[1] = [(base, 1.06 * other, head) for base, other, head in sets[1]]
    assert judge(sets).bound > 0.05 and judge(sets).verdict == "cannot tell"


def test_one_set_of_processes_that_is_not_slower_acquits():
    sets = rounds(0, slower=1.1, noise=0.002)
    sets[1] = [(base, other, 0.99 * base) for base, other, _ in sets[1]]
    assert judge(sets).verdict != "SLOWER"


def test_instructions_are_a_finding_and_decide_where_times_cannot():
    assert verdict_with("ok", None) == verdict_with("ok", 1.019) == "ok"
    assert verdict_with("ok", 1.03) == "ok, more instructions"
    assert verdict_with("cannot tell", 1.03) == "MORE INSTRUCTIONS"


def test_callgrind_totals():
    assert callgrind_total("version: 1\nevents: Ir\nfn=(1) main\n12 34\ntotals: 10526813\n") == 10526813
    with pytest.raises(Exception, match="no totals"):
        callgrind_total("version: 1\n")


# --- the command ---

TINY = ("--tiny", "--no-instructions", "--cases", "log-probs fp32, total|Bradley", "--seconds", "4")
# A head that does everything four times in one op, and has lost another.
WORSE = """
_once = linear_logprobs
def linear_logprobs(*args, **options):
    for _ in range(3):
        _once(*args, **options)
    return _once(*args, **options)
del bradley_terry_loss
"""


def guard(*options):
    command = [sys.executable, "-m", "benchmarks.guard.guard", *map(str, options)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worse")
    shutil.copytree(ROOT / "rlhf_kernels", folder / "rlhf_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "rlhf_kernels" / "__init__.py", "a") as file:
        file.write(WORSE)
    return folder


def test_the_working_tree_is_not_slower_than_itself():
    status, said = guard("--base-folder", ROOT, "--sets", "2", *TINY)
    assert status == 0, said
    assert "base the working tree, head the working tree" in said
    assert "log-probs fp32, total" in said and "Bradley-Terry, total" in said and "KL" not in said
    assert "nothing is seen to be slower" in said and "instructions: not asked" in said


def test_a_planted_slowdown_and_a_lost_function_turn_the_status(worse):
    status, said = guard("--base-folder", ROOT, "--head-folder", worse, "--sets", "1", *TINY)
    assert status == 1, said
    assert "head cannot: AttributeError" in said
    assert "worse: log-probs fp32, total, Bradley-Terry, total\n" in said


def test_what_only_head_can_has_a_row_and_what_is_faster_is_welcome(worse):
    status, said = guard("--base-folder", worse, "--sets", "1", *TINY)
    assert status == 0, said
    assert "faster" in said and "base cannot: AttributeError" in said


def test_what_cannot_be_compared_has_status_two(tmp_path):
    status, said = guard("--base", "no-such-revision")
    assert status == 2 and "no-such-revision" in said
    status, said = guard("--base-folder", tmp_path, "--tiny")
    assert status == 2 and str(tmp_path) in said, said
