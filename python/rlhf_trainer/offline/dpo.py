"""Direct preference optimisation, from a configuration to a model folder.

The loss of a pair (Rafailov et al., 2023, arXiv:2305.18290, eq. 7) is -log sigma(beta * (r(chosen) - r(rejected))),
where r(y) = log pi(y | prompt) - log pi_ref(y | prompt). `rk.linear_dpo_loss` computes it, and the other loss types,
from hidden states. The reference does not change, so its log-probs are computed once, before training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import rlhf_kernels as rk

from ..data.encoding import Codec
from ..data.examples import Group
from ..errors import UsageError
from ..models.checks import pad_id_of
from ..models.fused_lm import FusedLM, LMHead, check_same_vocabulary, load_fused, load_policy, share_positions
from ..models.loading import load_codec_for, make_room, save_result
from ..models.lora import Reference
from ..models.sequence_parallel import SequenceParallel, over_group, start_sequence_parallel
from ..training.batch_plan import MicroBatch
from ..training.fsdp import place
from ..training.loop import start_accelerator, train
from ..training.output_folder import begin
from ..training.task import LossOutput
from .config import DPOConfig
from .packing import check_packing
from .pair_batches import GroupTask, PairBatch, collate_flat, collate_groups, read_groups
from .reference_logprobs import content_key, default_cache_dir, reference_logprobs
from .shared_prefix import attention_of, can_share, collate_shared
from .tasks import check_examples_fit, load_tasks

REFERENCE_FREE = ("simpo",)


def train_dpo(config: DPOConfig) -> Path:
    """Trains; returns the folder that holds the model, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    check_loss_options(config)
    accelerator = start_accelerator(config)
    if not begin(config, accelerator.is_main_process):
        return Path(config.output_dir)
    if config.loss_type == "aot" and accelerator.num_processes > 1:
        raise UsageError("loss_type aot sorts the margins of a batch, which several processes would share: use one")

    # Everything that can be wrong with the input shows here, before any training.
    codec, largest = load_codec_for(config)
    sequence = start_sequence_parallel(accelerator, config.sp_size)
    task, held_out = load_tasks(load_task, config, codec, accelerator)
    policy = load_policy(config, codec, largest)
    check_examples_fit(config, (task, held_out), policy.model, codec.tokenizer)

    tasks = [data for data in (task, held_out) if data is not None]
    if config.share_prefix:
        check_sharing(policy, "model_name_or_path")
        for data in tasks:
            data.sharing_attention = attention_of(policy.model)
    if config.padding_free:
        check_packing(policy, "padding_free")
    share_positions(policy, sequence, "model_name_or_path")
    for data in tasks:
        data.sequence = sequence
    if config.loss_type not in REFERENCE_FREE:
        add_reference_logprobs(config, policy, tasks, codec, accelerator)
    return train(
        config, policy, task, held_out, accelerator,
        save=lambda trained, folder: save_result(trained.model, codec.tokenizer, folder, config),
    )  # fmt: skip


def load_task(
    config: DPOConfig,
    codec: Codec,
    source: str,
    split: str,
    accelerator: Accelerator,
    shuffled: bool,
) -> DPOTask:
    """Reads one data set, prints what became of its rows, and plans its batches."""
    data = read_groups(config, codec, source, split)
    accelerator.print(data.report(source))
    return DPOTask(config, data.examples, pad_id_of(codec.tokenizer), accelerator, shuffled)


class DPOTask(GroupTask):
    """Groups of responses to a prompt, and their loss; means are over their pairs.

    `train_dpo` sets, as the model and the configuration want it: `ref_logps`, log pi_ref of each group's responses,
    [K] fp32 in nats, None where the loss has no reference; `sharing_attention`, the model's attention implementation
    where all responses to a prompt stand in one row, None where each has a row of its own; `sequence`, with whom this
    process shares sequences.
    """

    sequence: SequenceParallel | None = None
    ref_logps: list[Tensor] | None = None
    sharing_attention: str | None = None

    def batch(self, indices: MicroBatch) -> PairBatch:
        groups = self.examples(indices)
        if self.sharing_attention is not None:
            return collate_shared(groups, self.pad_id, self.sharing_attention).to(self.device)
        collate = collate_flat if self.config.padding_free else collate_groups
        return collate(groups, self.pad_id).to(self.device)

    def compute_loss(self, model: nn.Module, indices: MicroBatch) -> LossOutput:
        pairs = self.batch(indices)
        ref_logps = None if self.ref_logps is None else torch.cat([self.ref_logps[i] for i in indices])
        result = pair_loss(model, pairs, ref_logps, self.config, self.sequence)
        tokens = torch.tensor(tokens_of(self.examples(indices)) / self.together, device=self.device)
        metrics = {name: value / self.together for name, value in pair_metrics(result, pairs).items()}
        return LossOutput(result.loss, metrics, tokens)

    def depends_on(self) -> bytes:
        return b"" if self.ref_logps is None else torch.cat(self.ref_logps).cpu().numpy().tobytes()


def pair_loss(
    policy: nn.Module, pairs: PairBatch, ref_logps: Tensor | None, config: DPOConfig,
    sequence: SequenceParallel | None = None,
) -> rk.LinearDPOLoss:  # fmt: skip
    """The mean loss over the pairs of one micro-batch; `policy` is a FusedLM, wrapped or not.

    ref_logps: [S] fp32 in nats, in the order of the batch's responses. `sequence`: as of the policy.
    """
    options: dict[str, Any] = {
        "chosen_idxs": pairs.chosen_idxs, "rejected_idxs": pairs.rejected_idxs, "beta": config.beta,
        "loss_type": config.loss_type, "label_smoothing": config.label_smoothing, "gamma": config.gamma_beta_ratio,
    }  # fmt: skip

    def loss_in_head(hidden: Tensor, head: LMHead) -> rk.LinearDPOLoss:
        loss, labels, shared = over_group(rk.linear_dpo_loss, sequence, pairs.labels)
        hidden = pairs.hidden_of(hidden)
        return loss(
            hidden, head.weight, labels, ref_logps, cu_seqlens=pairs.cu_seqlens, **head.options(), **options, **shared
        )

    return policy(pairs.batch, loss_in_head)


def pair_metrics(result: rk.LinearDPOLoss, pairs: PairBatch) -> dict[str, Tensor]:
    """Means over the pairs. A reward is beta * (log pi - log pi_ref) of a response, a logp log pi, both in nats."""
    chosen, rejected = result.chosen_rewards, result.rejected_rewards
    return {
        "loss": result.loss.detach(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": result.policy_logps[pairs.chosen_idxs].mean(),
        "logps/rejected": result.policy_logps[pairs.rejected_idxs].mean(),
    }


def tokens_of(groups: list[Group]) -> int:
    """The number of tokens of all responses, each with its prompt, however often a prompt is computed."""
    return sum(len(group.prompt) + len(response) for group in groups for response in group.responses)


def add_reference_logprobs(
    config: DPOConfig, policy: FusedLM, tasks: list[DPOTask], codec: Codec, accelerator: Accelerator
) -> None:
    """Sets the tasks' `ref_logps`, by the reference model or, without one, by the policy, which is untrained yet."""
    reference = policy
    if config.ref_model_name_or_path is not None:
        reference = load_fused(config, config.ref_model_name_or_path, "ref_model_name_or_path")
        make_room(reference.model, codec.tokenizer)
        share_positions(reference, policy.sequence, "ref_model_name_or_path")
        check_same_vocabulary(policy, reference, "ref_model_name_or_path")
        if config.share_prefix:
            check_sharing(reference, "ref_model_name_or_path")
        if config.padding_free:
            check_packing(reference, "padding_free")
    device = accelerator.device.type
    layout = "flat" if config.padding_free else config.share_prefix
    keys = [content_key(reference, t.groups, t.plan, t.pad_id, device, layout) for t in tasks]
    dtype = config.trained_dtype if reference is policy else None
    frozen = Reference(policy) if config.use_peft and reference is policy else reference
    place(reference, accelerator, bf16=config.bf16, dtype=dtype)
    cache_dir = Path(config.ref_cache_dir) if config.ref_cache_dir else default_cache_dir()
    for task, key in zip(tasks, keys, strict=True):
        task.ref_logps = reference_logprobs(
            frozen, task.groups, task.plan, task.batch, accelerator, cache_dir, key, task.sequence
        )


def check_sharing(fused: FusedLM, key: str) -> None:
    """UsageError where the model cannot have several responses in one row."""
    if not can_share(fused.model):
        raise UsageError(
            f"share_prefix: the attention of {key} ({type(fused.model).__name__}, {attention_of(fused.model)}) does "
            "not keep responses apart that stand in one row: sliding windows, flash attention and states that run "
            "along the row do not. Leave share_prefix off, or try attn_implementation: sdpa"
        )


def check_loss_options(config: DPOConfig) -> None:
    """UsageError for options that do not go together, before anything is loaded; rlhf_kernels checks its own, on a
    pair of zeros."""
    if config.loss_type == "aot" and config.micro_batch_size < config.batch_size:
        raise UsageError(
            f"loss_type aot sorts the margins of a batch, so a batch must be one micro-batch: micro_batch_size must be "
            f"at least batch_size={config.batch_size}, got {config.micro_batch_size}"
        )
    if config.loss_type in REFERENCE_FREE and config.ref_model_name_or_path is not None:
        raise UsageError(f"ref_model_name_or_path: loss_type {config.loss_type} has no reference")
    zeros, first = torch.zeros(2), torch.tensor([0])
    try:
        rk.dpo_loss(
            zeros, None if config.loss_type in REFERENCE_FREE else zeros, first, first + 1, config.beta,
            loss_type=config.loss_type, label_smoothing=config.label_smoothing, gamma=config.gamma_beta_ratio,
            token_counts=torch.ones(2, dtype=torch.int64), backend="reference",
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
