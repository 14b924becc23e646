"""A model and pairs on disk, trainers in a process each, who take turns step by step, and the rows that come of it."""

import math
import random
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.harness.measuring import spread
from benchmarks.harness.peers import ROOT, TRL
from benchmarks.harness.worker import Ended, Worker
from benchmarks.steps.inputs import Sizes, make_model, make_pairs
from benchmarks.steps.trainers import TRAINERS

WARM_UP = 2  # steps that are not timed
LARGEST_LOSS_DIFFERENCE = 1e-4  # in fp32, in nats; what rounding makes of the losses of a few steps is a tenth of it
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def label_of(trainer: str) -> str:
    return trainer.replace("TRL", TRL)


CASE = "DPO steps: one pair of 255 tokens"
NOTE = (
    "A whole step, and its part up to the gradients: the policy's forward, its backward and clipping. The reference's "
    "log-probs were computed before. Extra MiB are those above weights, optimizer state and gradients."
)
OURS = ("rlhf", "rlhf, share_prefix", "rlhf, padding_free")
# Of the gradients of rlhf over those of TRL, in bf16; the first loss is log 2 whatever the dtype.
TARGETS = {"gradients": {label_of("TRL"): 0.6, label_of("TRL, fused"): 1.0}, "memory": 0.25, "first_loss_error": 1e-6}
REAL_TARGETS, LORA_TARGETS = TARGETS | {"memory": 1.0}, TARGETS | {"memory": 0.5}  # activations are most of it


@dataclass
class Track:
    folder: Path
    sizes: Sizes = field(default_factory=Sizes)
    dtype: str = "float32"
    trainers: tuple[str, ...] = tuple(TRAINERS)
    learning_rate: float = 1e-5  # Adam makes much of gradients that are rounding alone
    longest_s: float = 300  # that is waited for a trainer's start, or for a step
    model: Path | None = None  # a real one; its pairs are there already, of a batch's size each
    lora: bool = False
    case: str = CASE
    targets: dict = field(default_factory=lambda: TARGETS)

    def run(self) -> list[dict]:
        """A row for each trainer, measured or not."""
        if self.model is None:
            make_model(self.folder / "model", self.sizes)
            make_pairs(self.folder / "pairs.jsonl", self.sizes)
        results: dict[str, dict] = {}
        with ExitStack() as stack:
            workers = {name: stack.enter_context(self.start(name)) for name in self.trainers}

            def receive(name: str) -> None:
                """The trainer stands before its next step, or it has ended, with its result."""
                try:
                    result = workers[name].receive(self.longest_s)
                except Ended as error:
                    result = {"status": f"cannot run here: {error}"}
                if result:
                    results[name] = result

            for name in workers:
                receive(name)
            order = random.Random(0)  # drawn anew each turn
            for _ in range(self.sizes.steps + 1):  # after the last step comes the result
                for name in order.sample(list(workers), len(workers)):
                    if name not in results:
                        workers[name].send({})
                        receive(name)
        return [self.row(name, results) for name in self.trainers]

    def start(self, trainer: str) -> Worker:
        """They start side by side; none takes a step unasked."""
        worker = Worker(
            [sys.executable, "-m", "benchmarks.steps.dpo"], ROOT,
            OFFLINE | {"HF_DATASETS_CACHE": str(self.folder / "datasets")},
        )  # fmt: skip
        run = {
            "model": str(self.model or self.folder / "model"), "data": str(self.folder / "pairs.jsonl"),
            "folder": str(self.folder / f"run of {trainer}"), "batch": self.sizes.batch,
            "learning_rate": self.learning_rate, "dtype": self.dtype, "lora": self.lora,
        }  # fmt: skip
        worker.send({"trainer": trainer, "run": run, "warm_up": WARM_UP})
        return worker

    def row(self, name: str, results: dict[str, dict]) -> dict:
        """Times over those of `rlhf`; losses beside those of TRL."""
        result = results[name]
        row = {
            "trainer": label_of(name),
            "status": result["status"],
            "dtype": self.dtype,
            "case": self.case,
            "note": NOTE,
        }
        if name in OURS:
            row |= {"targets": self.targets, "judged": self.dtype == "bfloat16"}
        about = asdict(self.sizes) if self.model is None else {"name": self.model.name, "lora": self.lora}
        row |= {"model": about, "batch": self.sizes.batch}
        if row["status"] != "measured":
            return row
        row["rounds"] = len(result["step_ms"])
        for kind, over in (("step_ms", "over_rlhf"), ("gradients_ms", "gradients_over_rlhf")):
            row[kind] = spread(result[kind])
            if kind in results["rlhf"]:
                row[over] = round(row[kind]["median"] / statistics.median(results["rlhf"][kind]), 3)
        row |= {"peak_extra_mib": result["peak_extra_mib"], "losses": result["losses"]}
        row["first_loss_error"] = abs(result["losses"][0] - math.log(2))  # which every DPO starts at
        if "losses" in (trl := results.get("TRL", {})):
            pairs = zip(result["losses"], trl["losses"], strict=True)
            row["max_loss_difference"] = max(abs(a - b) for a, b in pairs)
        return row


def check(rows: list[dict]) -> None:
    """Raises AssertionError if `rlhf dpo` or TRL was not measured, or if losses are not TRL's: who is faster at
    something else is no rival."""
    status = {row["trainer"]: row["status"] for row in rows}
    assert status["rlhf"] == status[label_of("TRL")] == "measured", status
    for row in rows:
        if row["dtype"] == "float32" and row["status"] == "measured":
            assert row["max_loss_difference"] <= LARGEST_LOSS_DIFFERENCE, row
