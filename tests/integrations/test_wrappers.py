"""Wrappers that shard or replicate a patched model: three steps on two and four processes, over gloo here.

`wrapped_torch.py` and `wrapped_deepspeed.py` run every case in one launch, each against the unpatched model's logits in
fp64, in one process on the whole batch; here is what must have come out.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = ROOT / "build/peers"
RANKS = [pytest.param(n, marks=pytest.mark.xdist_group(f"wrappers-{n}")) for n in (2, 4)]
ZERO_RANKS = [pytest.param(n, marks=pytest.mark.xdist_group(f"zero-{n}")) for n in (2, 4)]

Results = dict[str, dict[str, dict[str, Any]]]  # group -> case -> its numbers

# Beside what the unpatched model in fp32, on halves of the batches, comes to. Relative to how far three steps moved a
# parameter, about a hundredth of its size, and to the loss.
PARAMETERS, LOSS = 5e-6, 2e-7
TIMEOUT = 500  # seconds of a launch, which takes about 60 where the cores are free


def launched(script: str, ranks: int, overlay: str = "") -> Results:
    """All results of `script`, on so many ranks. It runs once, also where it fails."""
    results, output = _launched(script, ranks, overlay)
    assert results is not None, output
    return results


@functools.cache
def _launched(script: str, ranks: int, overlay: str) -> tuple[Results | None, str]:
    """The results of `script`, or None, and the end of its output."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join(filter(None, [str(ROOT), overlay, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.jsonl")
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
             "-m", f"tests.integrations.{script}", str(results)],
            cwd=folder, env=os.environ | environment | {"PYTHONPATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: a launcher then ends the workers it started
            output, _ = process.communicate()
            output += (
                f"\nended after {TIMEOUT} s; done by then: {results.read_text() if results.exists() else 'nothing'}"
            )
        if process.returncode != 0:
            return None, output[-8000:]
        outcomes: Results = {}
        for line in results.read_text().splitlines():
            values = json.loads(line)
            outcomes.setdefault(values.pop("group"), {})[values.pop("case")] = values
    return outcomes, ""


def with_deepspeed(ranks: int) -> Results:
    overlay = ""
    if importlib.util.find_spec("deepspeed") is None:
        folders = sorted(HOSTS.glob("deepspeed-*"))
        if not folders:
            pytest.skip("DeepSpeed is not installed: make hosts")
        overlay = str(folders[-1])
    return launched("wrapped_deepspeed", ranks, overlay)


def assert_equal(cases: dict[str, dict[str, Any]]) -> None:
    unlike = {
        name: results
        for name, results in cases.items()
        if not (
            results["difference"] <= 1.25 * results["unfused"] + PARAMETERS
            and results["loss_difference"] <= 2 * results["unfused_loss"] + LOSS
        )
    }
    assert not unlike
    assert cases


@pytest.mark.parametrize("ranks", RANKS)
def test_ddp_fsdp2_and_accelerate_train_as_one_process(ranks):
    cases = launched("wrapped_torch", ranks)["equal"]
    assert {name.split(",")[0] for name in cases} == {"DDP", "FSDP2", "accelerate"}
    assert_equal(cases)


@pytest.mark.parametrize("ranks", RANKS)
def test_without_the_wrapper_the_difference_shows(ranks):
    """The same script, but for the inner model being called: no gradient is synchronised, and the bar sees that."""
    cases = launched("wrapped_torch", ranks)["unequal"]
    assert cases
    for name, results in cases.items():
        assert results["difference"] > 0.1, name
        with pytest.raises(AssertionError):
            assert_equal({name: results})


@pytest.mark.parametrize("ranks", RANKS)
def test_in_bf16_no_further_from_fp32_than_the_unpatched_model(ranks):
    cases = launched("wrapped_torch", ranks)["bf16"]
    assert cases
    for name, results in cases.items():
        assert results["difference"] <= 1.2 * results["unfused"] + 0.01, (name, results)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_sharded_or_wrapped_head_is_refused_where_it_is_not_whole(ranks):
    refused = launched("wrapped_torch", ranks)["refused"]
    assert "DTensor where it is used" in refused["FSDP2, head read outside"]["message"]
    assert "DTensor where it is used" in refused["FSDP2, patched after without options"]["message"]
    assert "expected torch.nn.Linear, got" in refused["DDP, head checkpointed"]["message"]


@pytest.mark.parametrize("ranks", ZERO_RANKS)
def test_zero_trains_as_one_process(ranks):
    cases = with_deepspeed(ranks)["equal"]
    assert {name.split(",")[0] for name in cases} == {"ZeRO-1", "ZeRO-2", "ZeRO-3"}
    assert_equal(cases)


@pytest.mark.parametrize("ranks", ZERO_RANKS)
def test_zero_3_is_refused_where_weights_are_not_gathered(ranks):
    refused = with_deepspeed(ranks)["refused"]
    assert len(refused) == 2
    for name, results in refused.items():
        assert "are not there yet" in results["message"] and "LogitOptions" in results["message"], name
