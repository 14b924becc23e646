"""The metrics of a run: a line of metrics.jsonl a step, accelerate's trackers, one progress bar."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, LoggerType
from tqdm.auto import tqdm

from ..errors import UsageError
from .fsdp import sharding


def make_accelerator(report_to: list[str], folder: Path) -> Accelerator:
    """Devices and processes as `accelerate launch` or `torchrun` set them up; precision stays with `FusedLM`."""
    report_to = [name for name in report_to if name != "none"]  # transformers' word for no tracker
    installed = [str(tracker) for tracker in get_available_trackers()]
    shipped = [str(name) for name in LoggerType.list()]
    known = sorted({*map(str, LOGGER_TYPE_TO_CLASS), "all"})
    for name in report_to:  # accelerate leaves a missing tracker out without a word
        if name not in known:
            raise UsageError(f"report_to: unknown tracker {name!r}; accelerate knows: {', '.join(known)}")
        if name in shipped and name not in [*installed, "all"]:
            raise UsageError(f"report_to: {name} is not installed here; installed: {', '.join(installed) or 'none'}")
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # others wait for one that asks a server
    sharding()  # before accelerate reads the environment, which would leave it only what its own `prepare` shards
    accelerator = Accelerator(
        mixed_precision="no", log_with=report_to or None, project_dir=str(folder), kwargs_handlers=[patient]
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UsageError(f"{kind}: one process, or several by DDP or FSDP2, is what is supported; launch without it")
    return accelerator


class MetricsLog:
    """Writes each step's metrics to `folder`/metrics.jsonl, the trackers, and the progress bar, on the main process."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        total_steps: int,
        project: str,
        config: dict,
        done_steps: int = 0,
        kept_bytes: int = 0,
    ) -> None:
        """done_steps, kept_bytes: of a resumed run; its metrics beyond `kept_bytes` are written again."""
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        if accelerator.log_with:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
            accelerator.init_trackers(project, config=plain)
        self.file = None
        if self.is_main:
            path = folder / "metrics.jsonl"
            path.touch()
            if path.stat().st_size < kept_bytes:
                warnings.warn(f"{path} has lost lines; what it has of this run is kept", stacklevel=2)
            os.truncate(path, min(kept_bytes, path.stat().st_size))
            self.file = path.open("a", encoding="utf-8")
        disable = None if self.is_main else True  # None: where there is no terminal
        self.bar = tqdm(total=total_steps, initial=done_steps, desc=project, unit="step", disable=disable)
        self.total, self.logging_steps = total_steps, config["logging_steps"]

    def log(self, step: int, epoch: float, metrics: dict[str, float], shown: Sequence[str] = ()) -> None:
        """The metrics of a step, or of the evaluation before the first. `shown`: those that a person watches."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **metrics}) + "\n")
            self.file.flush()
        if self.accelerator.log_with:
            self.accelerator.log(metrics, step=step)
        texts = {
            name: f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
            for name, value in metrics.items()
            if name in shown or name.startswith("eval/")
        }
        held_out = [f"{name} {text}" for name, text in texts.items() if name not in shown]
        watched = {name: texts[name] for name in shown if name in texts}
        if watched:
            self.bar.set_postfix(watched, refresh=False)
            self.bar.update()
        if self.bar.disable and watched and (step % self.logging_steps == 0 or step == self.total):
            self.write(" ".join([f"step {step}/{self.total}", *(f"{name} {text}" for name, text in watched.items())]))
        if held_out:
            self.write(" ".join([f"step {step}/{self.total}", *held_out]))

    def bytes_written(self) -> int:
        return 0 if self.file is None else os.fstat(self.file.fileno()).st_size

    def write(self, text: str) -> None:
        """Prints without breaking the bar."""
        if self.is_main:
            self.bar.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group as well
            tracker.finish()
