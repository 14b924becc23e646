"""A command's two tasks: the one that it trains on and, with eval_dataset, the one that it is evaluated on."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.base import TrainConfig
from ..data.encoding import Codec
from ..data.views import first_rows, has_colours
from ..models.checks import check_fit
from ..training.batch_plan import step_plan
from ..training.optimizers import check_warmup
from ..training.task import Task

AnyTask = TypeVar("AnyTask", bound=Task)


def load_tasks(
    load_task: Callable[..., AnyTask], config: TrainConfig, codec: Codec, accelerator: Accelerator
) -> tuple[AnyTask, AnyTask | None]:
    """The task of dataset_name, whose examples are shuffled, and that of eval_dataset, or None.

    `load_task(config, codec, source, split, accelerator, shuffled)` makes each of them.
    """
    task = load_task(config, codec, config.dataset_name, config.dataset_train_split, accelerator, shuffled=True)
    check_warmup(config, len(step_plan(len(task.plan), config.num_train_epochs, config.max_steps, config.seed)))
    if config.inspect_rows:
        examples = sorted(task.examples(range(len(task.counts))), key=lambda example: example.row)
        accelerator.print(first_rows(examples, codec.tokenizer, config.inspect_rows, has_colours()))
    if config.eval_dataset is None:
        return task, None
    split = config.dataset_test_split
    return task, load_task(config, codec, config.eval_dataset, split, accelerator, shuffled=False)


def check_examples_fit(
    config: TrainConfig, tasks: Sequence[Task | None], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """UsageError, naming the row, where the model has too few embeddings or positions for the tasks' examples."""
    for task, source in zip(tasks, (config.dataset_name, config.eval_dataset), strict=True):
        if task is not None:
            examples = task.examples(range(len(task.counts)))
            rows, lengths = [example.row for example in examples], [example.length for example in examples]
            check_fit(model, tokenizer, rows, lengths, str(source))
