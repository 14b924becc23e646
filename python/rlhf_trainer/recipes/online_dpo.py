"""`rlhf online-dpo`: DPO on the model's own completions, again and again (online, or iterative, DPO).

A round samples completions of the prompts from the current model, rewards them, makes pairs of them, and
trains on these with DPO; the next round goes on with the trained model. Each step is a stage that can be run alone
(`rlhf sample`, `rejection`, `dpo`), with a folder of its own in output_dir/round-N, and resumes where it stopped; so
a run of rounds does, too. The prompts are the same in all rounds, the draws are not.
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config.base import OutputConfig
from ..data.completions import COMPLETIONS_FILE, in_numbers, left_out, read_completions
from ..data.encoding import Codec
from ..data.examples import Prompt
from ..data.rows import read_rows
from ..errors import UsageError
from ..models.checks import check_fit
from ..models.fused_lm import check_same_vocabulary, load_fused
from ..models.loading import load_codec_for
from ..offline.config import DPOConfig
from ..offline.dpo import check_loss_options, check_sharing, load_task, train_dpo
from ..preferences.pairs import pair_up
from ..rewards.config import RejectionConfig
from ..rewards.loading import load_rewards
from ..rewards.rejection import rejection
from ..rollouts.config import SampleConfig
from ..rollouts.loading import prompts_of
from ..rollouts.sample import sample
from ..training.checkpoint import FOLDER as CHECKPOINTS
from ..training.journal import write_jsonl
from ..training.metrics import make_accelerator
from ..training.output_folder import CONFIG_FILE, begin, commit_output, open_output, partial_folder
from ..training.processes import single_process
from .config import OnlineDPOConfig

Config = TypeVar("Config", bound=OutputConfig)


def train_online_dpo(config: OnlineDPOConfig) -> Path:
    """Trains; returns the folder that holds the last round's model, report.json, and a folder of each round."""
    device = single_process("rlhf online-dpo")
    if not begin(config):
        return Path(config.output_dir)
    reward_codecs = check_input(config, device)
    work = open_output(config)
    model = config.model_name_or_path
    reports: list[dict[str, Any]] = []
    for number in range(1, config.rounds + 1):
        print(f"round {number} of {config.rounds} starts from {model}")
        folder = work / f"round-{number}"
        seed = random.Random(f"{config.seed}, round {number}").getrandbits(31)  # the next round draws anew
        completions = sample(stage(SampleConfig, config, folder / "completions", models=[model], seed=seed))
        written = read_completions(str(completions / COMPLETIONS_FILE), reward_codecs, config.max_length)
        if all(row.left_out is not None for row in written):
            raise no_pair(number, model, left_out(written), noun="completions")
        scored = rejection(
            stage(
                RejectionConfig, config, folder / "scored", completions=[str(completions)], seed=seed,
                per_device_eval_batch_size=config.per_device_generation_batch_size,
            )
        )  # fmt: skip

        lines = [line for _, line in read_rows(str(scored / "scored.jsonl"), split="train")]
        rows, without = pair_up(lines, config.pairing)
        if not rows:
            raise no_pair(number, model, without)
        write_jsonl(folder / "pairs.jsonl", rows)
        rewards = json.loads((scored / "report.json").read_text(encoding="utf-8"))
        reports.append(report_of(number, rewards, sum(len(row["pairs"]) for row in rows), without))
        (work / "report.json").write_text(json.dumps({"rounds": reports}, indent=2) + "\n", encoding="utf-8")
        print(in_words(reports[-1]))

        first = config.ref_model_name_or_path or config.model_name_or_path
        trained = train_dpo(
            stage(
                DPOConfig, config, folder / "model", model_name_or_path=model, seed=seed,
                ref_model_name_or_path=first if config.reference == "first" else None,
                dataset_name=str(folder / "pairs.jsonl"), dataset_format="auto", save_only_model=True,
            )
        )  # fmt: skip
        model = str(trained)

    link_model(Path(model), work)
    folder = commit_output(config)
    print(f"saved to {folder}; `rlhf evaluate` measures this model, report.json those that the rounds started from")
    return folder


def stage(cls: type[Config], config: OnlineDPOConfig, folder: Path, **changes: Any) -> Config:
    """The configuration of a stage in `folder`: the rounds' options of the same names, but for `changes`."""
    same = {field.name: getattr(config, field.name) for field in fields(cls) if hasattr(config, field.name)}
    places = {"output_dir": str(folder), "overwrite_output_dir": False, "resume_from_checkpoint": True}
    return cls(**same | places | changes)


def check_input(config: OnlineDPOConfig, device: torch.device) -> list[Codec]:
    """UsageError for mistakes that would show only after hours of sampling; returns the reward models' codecs."""
    check_loss_options(config)
    (codec, _), work = load_codec_for(config), partial_folder(config.output_dir)
    tokenizer = codec.tokenizer
    prompts = prompts_of(config, codec, config.dataset_train_split).examples
    rows, written = [prompt.row for prompt in prompts], [prompt.length + config.max_new_tokens for prompt in prompts]
    reward_codecs = check_rewards(config, prompts, [min(length, config.max_length) for length in written], device)

    keys = [key for key in ("model_name_or_path", "ref_model_name_or_path") if getattr(config, key) is not None]
    models = [load_fused(config, getattr(config, key), key) for key in keys]
    for key, model in zip(keys, models, strict=True):
        check_same_vocabulary(models[0], model, key)
        if config.share_prefix:
            check_sharing(model, key)
    check_fit(models[0].model, tokenizer, rows, written, config.dataset_name)
    accelerator = make_accelerator(config.report_to, work)  # checks report_to, too
    if config.eval_dataset is not None:
        dpo_config = stage(DPOConfig, config, work, dataset_format="auto")
        load_task(dpo_config, codec, config.eval_dataset, config.dataset_test_split, accelerator, shuffled=False)
    return reward_codecs


def check_rewards(
    config: OnlineDPOConfig, prompts: Sequence[Prompt], lengths: Sequence[int], device: torch.device
) -> list[Codec]:
    """Checks the rewards, which are gone afterwards, before the others take memory; returns the models' codecs."""
    rewards = load_rewards(config, device)
    rewards.check(prompts, config.dataset_name)
    for reward in rewards.models:
        check_fit(reward.model, reward.tokenizer, [prompt.row for prompt in prompts], lengths, config.dataset_name)
    return [reward.codec for reward in rewards.models]


def no_pair(number: int, model: str, counts: dict[str, int], noun: str = "prompts") -> UsageError:
    goes_on = "" if number == 1 else f" What the rounds before have made is in {model}: a new run can start from there."
    return UsageError(
        f"round {number}: no prompt gives a pair, which takes two completions with different rewards "
        f"({noun}: {in_numbers(counts)}). Raise num_completions or temperature; where completions are unfinished, "
        f"max_new_tokens; where they are too long, max_length.{goes_on}"
    )


def report_of(number: int, rewards: dict[str, Any], pairs: int, without: dict[str, int]) -> dict[str, Any]:
    """A round's report; `rewards`: that of `rlhf rejection`. The completions are of the model that the round starts
    from."""
    return {
        "round": number,
        "mean_reward": rewards["candidates"]["mean_reward"],
        "completions": rewards["candidates"]["completions"],
        "left_out": rewards["left_out"],
        "prompts": rewards["prompts"],
        "pairs": pairs,
        "prompts_without_pair": without,
    }


def in_words(report: dict[str, Any]) -> str:
    return (
        f"round {report['round']}: mean reward {report['mean_reward']:+.4f} of {report['completions']} completions "
        f"(left out: {in_numbers(report['left_out'])}); {report['pairs']} pairs of {report['prompts']} prompts "
        f"(without a pair: {in_numbers(report['prompts_without_pair'])})"
    )


def link_model(source: Path, target: Path) -> None:
    """Puts a model into `target`, too, as hard links: no copy of the weights, and either folder may go."""
    not_its = shutil.ignore_patterns(CONFIG_FILE, "metrics.jsonl", CHECKPOINTS)
    shutil.copytree(source, target, copy_function=link_file, ignore=not_its, dirs_exist_ok=True)


def link_file(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)  # left by a run that died here
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
