"""rlhf_kernels.parallel on 1 to 4 gloo processes: the cases of parallel_cases.py, which takes in those of its siblings,
all in one launch."""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from rlhf_kernels import _triton
from rlhf_kernels.parallel.shards import fingerprint
from tests.kernels.parallel import parallel_cases

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 300
TRACED = "compiled_without_a_graph_break"  # what torch.compile takes to start is long
ALL = tuple(name for name in parallel_cases.CASES if name != TRACED)
BASIC = ("every_output_and_gradient", "kl_near_and_far", "dtensor_heads", "collectives_are_counted")
UNEQUAL = ("top1_ties_across_shards", "a_shard_that_allows_no_token", "same_bits_on_every_rank", "split_sequences")
RUNS = ((1, BASIC), (2, (*ALL, TRACED)), (3, (*BASIC, *UNEQUAL)), (4, ALL))
FOR_TRITON = ("each_output_alone", "mixed_dtypes", "kl_with_every_option", "kl_over_shards_without_mass",
              "frozen_heads_near_certainty", "frozen_heads_with_other_gradients")  # fmt: skip


@functools.cache
def launched(runs):
    """Runs cases in as many processes as the largest run takes: one launch, since importing torch is most of the time.
    -> (results of each rank, see `parallel_ranks.run`, and what they printed)."""
    processes = max(ranks for ranks, _ in runs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-m", "tests.kernels.parallel.parallel_cases", folder, json.dumps(runs))
        files, started = [Path(folder, f"{rank}.txt") for rank in range(processes)], []
        for rank, path in enumerate(files):
            with path.open("w") as to:
                own = {**environment, "RANK": str(rank)}
                started.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=to, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + TIMEOUT_S
        for process in started:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reports = [Path(folder, f"{rank}.json") for rank in range(processes)]
        results = [json.loads(file.read_text()) if file.exists() else {} for file in reports]
        return results, [file.read_text() for file in files]


def check(ranks, name, runs):
    per_rank, output = launched(runs)
    for rank, results in enumerate(per_rank[:ranks]):
        failure = results.get(f"{ranks} {name}", f"did not reach it:\n{output[rank]}")
        assert failure is None, f"rank {rank}: {failure}"


@pytest.mark.xdist_group("parallel")  # one worker, one launch
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in RUNS for name in names])
def test_on_ranks(native, ranks, name):
    check(ranks, name, RUNS)


def test_fingerprints_of_short_masks_and_targets_all_differ():
    for values, length in ((2, 12), (6, 4)):
        every = [torch.tensor(x) for x in itertools.product(range(values), repeat=length)]
        assert len({fingerprint(x).item() for x in every}) == len(every)
    assert fingerprint(torch.tensor([True, False])) == fingerprint(torch.tensor([1, 0]))
    assert fingerprint(torch.arange(5).view(5, 1)) == fingerprint(torch.arange(5))


@pytest.mark.skipif(not _triton.INTERPRETED, reason="TRITON_INTERPRET=1 (make triton-interpreted) runs it")
@pytest.mark.xdist_group("parallel_triton")
@pytest.mark.parametrize("name", FOR_TRITON)
def test_triton_interpreted(name):
    """The Triton ops take the whole vocabulary's statistics as the compiled ones do."""
    check(2, name, ((2, FOR_TRITON),))
