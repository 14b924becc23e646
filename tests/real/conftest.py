"""Real models in build/real/models, which `make real` makes; runs of the command line, each done once a model."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from transformers.utils import logging

from tests.real.real_models import GEMMA3, SMOLLM2, metrics_of, rows_of

logging.disable_progress_bar()

# The held-out rows are those that are learned: their loss before and after is that of known rows.
OFFLINE = "--batch_size 4 --micro_batch_size 2 --eval_dataset {rows} --lr_scheduler_type constant "
FLAGS = {
    "sft": OFFLINE + "--max_steps 3 --learning_rate 5e-5",
    "dpo": OFFLINE + "--max_steps 3 --warmup_steps 0 --ref_cache_dir {cache}",
    "reward": OFFLINE + "--max_steps 3",
    "grpo": "--batch_size 8 --micro_batch_size 8 --max_steps 3 --num_generations 4 --max_completion_length 12 "
    "--reward_funcs regex:[.]",
    "sample": "--temperature 0 --num_completions 1 --max_new_tokens 24",
}


def of_one_worker(model):
    """A model's tests share what its runs have made."""
    return pytest.param(model, marks=pytest.mark.xdist_group(model.name), id=model.name)


@pytest.fixture(scope="module", params=map(of_one_worker, (SMOLLM2, GEMMA3)))
def model(request):
    if not request.param.path.is_dir():
        pytest.fail(f"{request.param.path} is missing: run `make real`")
    return request.param


@pytest.fixture(scope="module")
def rlhf(model, tmp_path_factory):
    """command -> the output folder of a few steps of it, from the model; of "sample", from what sft made of it.

    The folders, of up to a gigabyte each, go when the module's tests are done.
    """
    work = tmp_path_factory.mktemp(model.name)
    runs = {}

    def arguments(command):
        rows = work / f"{command}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(command)))
        first = ["--models", str(run("sft"))] if command == "sample" else ["--model_name_or_path", str(model.path)]
        first += [] if command == "sample" else model.flags
        flags = FLAGS[command].format(rows=rows, cache=work / "cache").split()
        return [*first, "--dataset_name", str(rows), *flags]

    def call(*words):
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-m", "rlhf_trainer", *words], capture_output=True, text=True, env=environment
        )

    def run(command):
        if command not in runs:
            result = call(command, *arguments(command), "--output_dir", str(work / command))
            assert result.returncode == 0, f"rlhf {command}: {result.stderr[-3000:]}"
            runs[command] = work / command
        return runs[command]

    run.call, run.arguments = call, arguments
    yield run
    shutil.rmtree(work)


@pytest.fixture(scope="module")
def metrics(rlhf):
    """command -> the lines of its metrics.jsonl, all of whose numbers are finite."""

    def lines(command):
        rows = metrics_of(rlhf(command))
        assert all(math.isfinite(value) for row in rows for value in row.values()), rows
        return rows

    return lines
