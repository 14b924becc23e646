"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290), from a configuration to a model folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import rlhf_kernels as rk

from .batching import MicroBatch, Share, plan_batches, share_of_process, step_plan
from .checkpoint import check_free, commit_output, open_output, partial_folder, save_model
from .config import DPOConfig, dump_yaml
from .data import Batch, Pair, collate, load_pairs
from .errors import UsageError
from .metrics import MetricsLog, make_accelerator
from .models import FusedLM, LMHead, check_fit, checkpoint_gradients, load_causal_lm, load_tokenizer, pad_id_of
from .reference import content_key, default_cache_dir, reference_logprobs

REFERENCE_FREE = ("simpo",)
# Means over the pairs of a batch, in the order of `pair_metrics`.
PAIR_METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


class PairSet(NamedTuple):
    """Pairs, the batches they train in, and their log-probs under the reference [N, 2] (None if the loss has none)."""

    pairs: list[Pair]
    plan: list[list[MicroBatch]]
    pad_id: int
    device: torch.device
    ref_logps: Tensor | None = None

    def batch(self, indices: MicroBatch) -> Batch:
        return collate([self.pairs[i] for i in indices], self.pad_id).to(self.device)

    def ref_of(self, indices: MicroBatch) -> Tensor | None:
        """[2P] in the order of the batch's sequences: chosen, then rejected."""
        return None if self.ref_logps is None else self.ref_logps[indices].T.reshape(-1)


def train_dpo(config: DPOConfig) -> Path:
    """Trains; returns the folder that holds the model, its tokenizer, metrics.jsonl and rlhf_config.yaml."""
    check_loss_options(config)
    accelerator = make_accelerator(config.report_to, partial_folder(config.output_dir))
    if accelerator.is_main_process:
        check_free(config.output_dir, config.overwrite)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    torch.manual_seed(config.seed)  # training itself draws nothing from it; a model's own code may

    # Everything that can be wrong with the input shows here, before any training.
    key = "model_name_or_path" if config.tokenizer_name_or_path is None else "tokenizer_name_or_path"
    tokenizer = load_tokenizer(getattr(config, key), key=key, trust_remote_code=config.trust_remote_code)
    train = load_set(config, tokenizer, config.dataset, config.dataset_split, accelerator, seed=config.seed)
    held_out = None
    if config.eval_dataset is not None:
        held_out = load_set(config, tokenizer, config.eval_dataset, config.eval_split, accelerator, seed=None)
    fused = load_fused(config, config.model_name_or_path, "model_name_or_path")
    for source, data in ((config.dataset, train), (config.eval_dataset, held_out)):
        if data is not None:
            check_fit(fused.model, tokenizer, data.pairs, source)

    if config.loss_type not in REFERENCE_FREE:
        train, *rest = with_reference(config, fused, [train] + ([held_out] if held_out else []), accelerator)
        held_out = rest[0] if rest else None
    if config.gradient_checkpointing:
        checkpoint_gradients(fused.model)
    policy, optimizer = accelerator.prepare(fused, make_optimizer(config, fused))

    steps = step_plan(len(train.plan), config.num_train_epochs, config.max_steps, config.seed)
    if accelerator.is_main_process:
        open_output(config.output_dir, config.overwrite, dump_yaml(config))
    accelerator.wait_for_everyone()
    work = partial_folder(config.output_dir)
    with contextlib.closing(
        MetricsLog(work, accelerator, len(steps), config.run_name, dataclasses.asdict(config))
    ) as log:
        log.say(f"{len(train.pairs)} pairs, {len(steps)} steps, metrics in {work / 'metrics.jsonl'}")
        if len(steps) < config.warmup_steps:
            log.say(f"note: the warm-up takes {config.warmup_steps} steps, so the learning rate stays below its peak")
        if held_out is not None:
            log.log(0, 0.0, evaluate(policy, held_out, config, accelerator))

        for step, index in enumerate(steps, start=1):
            started = time.perf_counter()
            learning_rate = config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            totals = torch.zeros(len(PAIR_METRICS) + 1, device=device)
            shares = share_of_process(train.plan[index], rank, world)
            for i, share in enumerate(shares):
                # Gradients travel between processes once a step, with the last micro-batch.
                with contextlib.nullcontext() if i == len(shares) - 1 else accelerator.no_sync(policy):
                    result, batch = pair_loss(policy, train, share, config)
                    # The weights of all shares sum to 1, and DDP takes the mean over processes: undo its division.
                    accelerator.backward(result.loss * (share.weight * world))
                totals += pair_metrics(result, batch, share)

            grad_norm = accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm or math.inf)
            *means, tokens = accelerator.reduce(totals, "sum").tolist()
            metrics = dict(zip(PAIR_METRICS, means, strict=True), grad_norm=float(grad_norm))
            if not all(math.isfinite(value) for value in metrics.values()):
                rows = sorted(train.pairs[i].row for micro in train.plan[index] for i in micro)
                raise UsageError(f"step {step}: stopped before the update, {metrics}; rows {rows} of {config.dataset}")
            optimizer.step()
            optimizer.zero_grad()

            metrics |= {
                "learning_rate": learning_rate,
                "tokens_per_second": tokens / (time.perf_counter() - started),
            }
            if held_out is not None and (step == len(steps) or step % (config.eval_steps or len(steps)) == 0):
                metrics |= evaluate(policy, held_out, config, accelerator)
            log.log(step, step / len(train.plan), metrics)
            log.advance(loss=f"{metrics['loss']:.4f}", accuracy=f"{metrics['rewards/accuracies']:.2f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(policy).model, tokenizer, work)
        commit_output(config.output_dir, config.overwrite)
        print(f"saved to {config.output_dir}")
    accelerator.wait_for_everyone()
    return Path(config.output_dir)


def pair_loss(policy: nn.Module, data: PairSet, share: Share, config: DPOConfig) -> tuple[rk.LinearDPOLoss, Batch]:
    """The mean loss over the pairs of one micro-batch; `policy` is a FusedLM, wrapped or not."""
    batch, ref_logps = data.batch(share.indices), data.ref_of(share.indices)

    def use(hidden: Tensor, head: LMHead) -> rk.LinearDPOLoss:
        return rk.linear_dpo_loss(
            hidden, head.weight, batch.labels, ref_logps, **head.options(),
            beta=config.beta, loss_type=config.loss_type, label_smoothing=config.label_smoothing, gamma=config.gamma,
        )  # fmt: skip

    return policy(batch, use), batch


def pair_metrics(result: rk.LinearDPOLoss, batch: Batch, share: Share) -> Tensor:
    """This share's part of PAIR_METRICS and of the batch's token count: [len(PAIR_METRICS) + 1], without gradient."""
    chosen, rejected = result.chosen_rewards, result.rejected_rewards
    chosen_logps, rejected_logps = result.policy_logps.chunk(2)
    means = [
        result.loss.detach(), chosen.mean(), rejected.mean(), (chosen > rejected).float().mean(),
        (chosen - rejected).mean(), chosen_logps.mean(), rejected_logps.mean(),
    ]  # fmt: skip
    tokens = batch.attention_mask.sum() * (share.weight > 0)
    return torch.stack([*(mean.float() * share.weight for mean in means), tokens.float()])


@torch.no_grad()
def evaluate(policy: nn.Module, data: PairSet, config: DPOConfig, accelerator: Accelerator) -> dict[str, float]:
    """PAIR_METRICS over all pairs of `data`, each under `eval/`."""
    totals = torch.zeros(len(PAIR_METRICS) + 1, device=accelerator.device)
    for batch in data.plan:
        part = sum(len(micro) for micro in batch) / len(data.pairs)
        for share in share_of_process(batch, accelerator.process_index, accelerator.num_processes):
            totals += part * pair_metrics(*pair_loss(policy, data, share, config), share)
    means = accelerator.reduce(totals, "sum").tolist()[:-1]
    return {f"eval/{name}": mean for name, mean in zip(PAIR_METRICS, means, strict=True)}


def load_set(
    config: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    split: str,
    accelerator: Accelerator,
    seed: int | None,
) -> PairSet:
    """Reads, reports and plans one data set; seed None keeps its order."""
    data = load_pairs(
        source, tokenizer, split=split, max_prompt_length=config.max_prompt_length, max_length=config.max_length,
        skip_invalid_rows=config.skip_invalid_rows,
    )  # fmt: skip
    accelerator.print(data.report(source))
    micro = min(config.micro_batch_size, math.ceil(config.batch_size / accelerator.num_processes))
    plan = plan_batches([pair.length for pair in data.pairs], config.batch_size, micro, seed)
    return PairSet(data.pairs, plan, pad_id_of(tokenizer), accelerator.device)


def load_fused(config: DPOConfig, name: str, key: str) -> FusedLM:
    model = load_causal_lm(
        name, key=key, attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code
    )
    return FusedLM(model, bf16=config.precision == "bf16")


def with_reference(config: DPOConfig, policy: FusedLM, sets: list[PairSet], accelerator: Accelerator) -> list[PairSet]:
    """The sets with `ref_logps`: of the reference model, or of the policy, which has not been trained yet."""
    reference = policy
    if config.ref_model_name_or_path is not None:
        reference = load_fused(config, config.ref_model_name_or_path, "ref_model_name_or_path")
        sizes = [lm.model.get_output_embeddings().weight.shape[0] for lm in (policy, reference)]
        if sizes[0] != sizes[1]:
            raise UsageError(f"ref_model_name_or_path: a vocabulary of {sizes[1]} tokens, the model has {sizes[0]}")
    reference = reference.to(accelerator.device)
    cache_dir = Path(config.ref_cache_dir) if config.ref_cache_dir else default_cache_dir()
    return [
        data._replace(
            ref_logps=reference_logprobs(
                reference, data.pairs, data.plan, data.batch, accelerator, cache_dir,
                content_key(reference, data.pairs, data.plan, data.pad_id, accelerator.device.type),
            )
        )
        for data in sets
    ]  # fmt: skip


def make_optimizer(config: DPOConfig, policy: nn.Module) -> torch.optim.Optimizer:
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(policy.parameters(), **settings)
    return torch.optim.AdamW(policy.parameters(), fused=True, **settings)  # no temporaries as large as the head


def check_loss_options(config: DPOConfig) -> None:
    """Lets rlhf_kernels judge the options on a pair of zeros, before anything is loaded."""
    zeros, first = torch.zeros(2), torch.tensor([0])
    try:
        rk.dpo_loss(
            zeros, None if config.loss_type in REFERENCE_FREE else zeros, first, first + 1, config.beta,
            loss_type=config.loss_type, label_smoothing=config.label_smoothing, gamma=config.gamma,
            token_counts=torch.ones(2, dtype=torch.int64), backend="reference",
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
