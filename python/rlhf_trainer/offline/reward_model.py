"""Reward models: a transformer with a linear head, trained to score the better response of a pair higher.

Bradley-Terry (1952), as in InstructGPT (Ouyang et al., 2022, arXiv:2203.02155, eq. 1): the loss of a pair is
-log sigma(r(chosen) - r(rejected) - margin), with Llama 2's margin (arXiv:2307.09288, eq. 2) where the data has one. A
response's reward is the head's value at its last token. All pairs of a prompt are in one batch, each response once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import margin_ranking_loss
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk

from ..data.batches import Batch
from ..data.encoding import Codec
from ..data.examples import Group, Loaded
from ..errors import UsageError
from ..models.checks import check_vocabulary, have_same_tokens
from ..models.loading import (
    HEADS,
    checkpoint_gradients,
    load_codec_for,
    load_pretrained,
    load_tokenizer,
    loading_of,
    make_room,
    save_result,
)
from ..models.lora import train_adapter
from ..models.scoring import last_values, load_reward_model, value_head_of
from ..training.batch_plan import MicroBatch
from ..training.loop import start_accelerator, train
from ..training.output_folder import begin
from ..training.task import LossOutput, Totals
from .config import RewardConfig
from .pair_batches import GroupTask, PairBatch, collate_groups, read_groups
from .tasks import check_examples_fit, load_tasks

PAD = "<|pad|>"
CALIBRATION_BINS = 10


def train_reward(config: RewardConfig) -> Path:
    """Trains; returns the folder that holds the model, its tokenizer, metrics.jsonl, rlhf_config.yaml and, with
    held-out pairs, report.json."""
    check_loss_options(config)
    accelerator = start_accelerator(config)
    if not begin(config, accelerator.is_main_process):
        return Path(config.output_dir)

    # Everything that can be wrong with the input shows here, before any training.
    codec, largest = load_codec_for(config)
    tokenizer = codec.tokenizer
    model = load_pretrained(  # with its own head of one output, or a new one, drawn by `seed`
        AutoModelForSequenceClassification, config.model_name_or_path, "a language model with a reward head",
        key="model_name_or_path", new=HEADS, num_labels=1, **loading_of(config, trains=True),
    )  # fmt: skip
    check_vocabulary(model, largest)  # before room is made for a template's tokens and a padding token
    give_pad_token(model, tokenizer, grows=not config.use_peft)
    task, held_out = load_tasks(load_task, config, codec, accelerator)
    check_examples_fit(config, (task, held_out), model, tokenizer)
    for name in config.compare_with if held_out is not None else []:
        load_ensemble_member(name, config, tokenizer, held_out)  # a mistake shows now, not after the training
    if config.use_peft:
        train_adapter(model, config, "SEQ_CLS")
    if config.gradient_checkpointing:
        checkpoint_gradients(model)

    def save(trained: nn.Module, folder: Path) -> None:
        save_result(trained.model, tokenizer, folder, config)
        if held_out is not None:
            report = report_of(held_out, config, tokenizer)
            (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
            print(summary(report))

    return train(config, RewardModel(model, bf16=config.bf16), task, held_out, accelerator, save)


def give_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, grows: bool = True) -> None:
    """A padding token that is not the end-of-sequence token: transformers reads the reward at the last token that is
    not padding, which would else be the one before the end. A new one, or, where the model is full and should not grow,
    as below an adapter, another that no response ends with."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        others = {tokenizer.unk_token, tokenizer.bos_token} - {None, tokenizer.eos_token}
        is_full = len(tokenizer) >= model.get_input_embeddings().weight.shape[0]
        tokenizer.add_special_tokens({"pad_token": min(others) if is_full and others and not grows else PAD})
    make_room(model, tokenizer)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def load_task(
    config: RewardConfig,
    codec: Codec,
    source: str,
    split: str,
    accelerator: Accelerator,
    shuffled: bool,
) -> RewardTask:
    """Reads one data set, prints what became of its rows, and plans its batches."""
    data = read_rewarded(config, codec, source, split)
    accelerator.print(data.report(source))
    tokenizer = codec.tokenizer
    for group in data.examples:
        if any(response[-1] == tokenizer.pad_token_id for response in group.responses):
            raise UsageError(f"{source}, row {group.row}: a response ends with the padding token {tokenizer.pad_token}")
    return RewardTask(config, data.examples, tokenizer.pad_token_id, accelerator, shuffled)


def read_rewarded(config: RewardConfig, codec: Codec, source: str, split: str) -> Loaded[Group]:
    return read_groups(config, codec, source, split, keep_rendering=True)


class RewardModel(nn.Module):
    """A sequence classifier with one output, the value at the last token."""

    def __init__(self, model: PreTrainedModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16
        self.head = [value_head_of(model)]  # in a list: it is the model's, and is registered there

    def forward(self, batch: Batch) -> Tensor:
        """batch of [S, T], padded on the right -> rewards [S] fp32."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            return last_values(self.model, self.head[0], batch.input_ids, batch.attention_mask)


class RewardTask(GroupTask):
    """Groups of responses to a prompt, and their loss; means are over their pairs.

    margins: r(chosen) - r(rejected) of every pair at the last evaluation, [P] on the CPU, in the order of the plan.
    """

    margins: Tensor | None = None

    def compute_loss(self, model: nn.Module, indices: MicroBatch) -> LossOutput:
        return self.loss_and_margins(model, indices)[0]

    def loss_and_margins(self, model: nn.Module, indices: MicroBatch) -> tuple[LossOutput, Tensor]:
        """The loss, and r(chosen) - r(rejected) of these examples' pairs, [P]."""
        pairs = collate_groups(self.examples(indices), self.pad_id).to(self.device)
        rewards = model(pairs.batch)
        loss = pair_losses(rewards, pairs, self.config).mean()
        metrics, detached = reward_metrics(loss, rewards, pairs), rewards.detach()
        output = LossOutput(
            loss, metrics, pairs.batch.attention_mask.sum(), {"min_reward": detached.min()},
            {"max_reward": detached.max()},
        )  # fmt: skip
        return output, rewards[pairs.chosen_idxs] - rewards[pairs.rejected_idxs]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The metrics and, as calibration is no mean over pairs, the margins of all pairs; in one pass, shared by the
        processes."""
        rank, world = accelerator.process_index, accelerator.num_processes
        totals, count = Totals(), sum(self.counts)
        placed = []  # (place in the plan, margins)
        for number, batch in enumerate(self.plan):
            part = sum(self.counts[i] for micro in batch for i in micro) / count
            for i, share in enumerate(self.shares(batch, accelerator)):
                output, margins = self.loss_and_margins(model, share.indices)
                totals.add(output, part * share.weight)
                if share.weight > 0:  # 0: a repeated micro-batch
                    placed.append(((number, rank + i * world), margins.cpu()))
        in_order = sorted(gather_object(placed), key=lambda item: item[0])
        self.margins = torch.cat([margins for _, margins in in_order])
        return totals.reduce(accelerator)[0] | {"calibration_error": calibration_error(self.margins)}


def pair_losses(rewards: Tensor, pairs: PairBatch, config: RewardConfig) -> Tensor:
    """The loss of each pair, [P] fp32; rewards: [S] fp32 of the batch's responses."""
    chosen, rejected = rewards[pairs.chosen_idxs], rewards[pairs.rejected_idxs]
    if config.loss_type == "margin_ranking":  # max(0, margin - (chosen - rejected))
        return margin_ranking_loss(chosen, rejected, torch.ones_like(chosen), config.margin, reduction="none")
    return rk.bradley_terry_loss(
        chosen, rejected, margin=pairs.margins if pairs.margins.any() else None,
        label_smoothing=config.label_smoothing, center_coefficient=config.center_rewards_coefficient,
    )  # fmt: skip


def reward_metrics(loss: Tensor, rewards: Tensor, pairs: PairBatch) -> dict[str, Tensor]:
    """Means over the pairs of a micro-batch."""
    rewards = rewards.detach()
    chosen, rejected = rewards[pairs.chosen_idxs], rewards[pairs.rejected_idxs]
    return {
        "loss": loss.detach(),
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "mean_reward": (chosen + rejected).mean() / 2,
    }


@torch.no_grad()
def margins_of(task: RewardTask, model: nn.Module) -> Tensor:
    """r(chosen) - r(rejected) of every pair, [P] on the CPU, in the order of the plan; by this process alone."""
    return torch.cat([task.loss_and_margins(model, micro)[1].cpu() for batch in task.plan for micro in batch])


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error of sigma(|margin|) as the probability of being right, in CALIBRATION_BINS bins
    (Guo et al., 2017, arXiv:1706.04599, eq. 3)."""
    return sum(row["pairs"] / len(margins) * abs(row["right"] - row["claimed"]) for row in calibration(margins))


def calibration(margins: Tensor) -> list[dict[str, float]]:
    """A row for each bin of how sure the model is: the number of pairs, the mean probability that it claims for its
    own ranking, and the share that it ranks right (a tie is half right). margins: [P]."""
    claimed = margins.abs().sigmoid()
    right = (margins.sign() + 1) / 2
    bins = ((claimed - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    rows = []
    for k in bins.unique().tolist():
        inside = bins == k
        shares = {"claimed": claimed[inside].mean().item(), "right": right[inside].mean().item()}
        rows.append({"pairs": int(inside.sum())} | shares)
    return rows


def load_ensemble_member(
    name: str, config: RewardConfig, tokenizer: PreTrainedTokenizerBase, held_out: RewardTask
) -> PreTrainedModel:
    """Another reward model, which must read the same tokens."""
    own = load_tokenizer(name, key="compare_with", trust_remote_code=config.trust_remote_code)
    if not have_same_tokens(tokenizer, own):
        raise UsageError(f"compare_with: {name!r} has another tokenizer, so it cannot judge the same tokens")
    member = load_reward_model(name, key="compare_with", **loading_of(config))
    largest = max(i for group in held_out.groups for ids in (group.prompt, *group.responses) for i in ids)
    check_vocabulary(member, largest)
    return member.to(held_out.device)


def report_of(held_out: RewardTask, config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Accuracy and calibration on held-out pairs, which have just been evaluated; with other models, how far they
    disagree with this one."""
    margins = held_out.margins
    report: dict[str, Any] = {
        "pairs": len(margins),
        "accuracy": (margins > 0).float().mean().item(),
        "calibration_error": calibration_error(margins),
        "calibration": calibration(margins),
    }
    others = []
    for name in config.compare_with:
        other = load_ensemble_member(name, config, tokenizer, held_out)
        others.append(margins_of(held_out, RewardModel(other, bf16=config.bf16)))
    return report | (disagreement(torch.stack([margins, *others])) if others else {})


def disagreement(margins: Tensor) -> dict[str, float]:
    """The share of pairs that K models do not all rank alike, and how far their margins lie apart: the mean over pairs
    of the standard deviation over models. margins: [K, P]."""
    signs = margins.sign()
    return {
        "models": len(margins),
        "disagreement": (signs != signs[0]).any(0).float().mean().item(),
        "margin_std": margins.std(0).mean().item(),
    }


def summary(report: dict[str, Any]) -> str:
    text = f"{report['pairs']} held-out pairs: {report['accuracy']:.1%} right"
    text += f", calibration error {report['calibration_error']:.3f}"
    if "models" in report:
        text += f"; {report['models']} models disagree on {report['disagreement']:.1%} of them"
    return text


def check_loss_options(config: RewardConfig) -> None:
    """UsageError for options that do not go together, before anything is loaded; rlhf_kernels checks its own, on a
    pair of zeros."""
    if config.loss_type == "margin_ranking" and (config.label_smoothing or config.center_rewards_coefficient):
        raise UsageError(
            "label_smoothing and center_rewards_coefficient are bradley_terry's; margin_ranking takes neither"
        )
    try:
        rk.bradley_terry_loss(
            torch.zeros(1), torch.zeros(1), label_smoothing=config.label_smoothing,
            center_coefficient=config.center_rewards_coefficient, backend="reference",
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
