"""The differences between PPO and GRPO, `Algorithm`, and the task that both train on, `EpisodeTask`: the loss of an
iteration's episodes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from ..models.kl import states_of
from ..rollouts.sampler import mismatch
from ..training.batch_plan import MicroBatch
from ..training.task import LossOutput, Metrics, Task
from .config import OnlineConfig
from .episodes import Episode, PolicyOutput, batch_of, forward, pad, unpad
from .setup import Setup


class Advantages(NamedTuple):
    """Episodes with their advantages (and returns), and the metrics of these."""

    episodes: list[Episode]
    metrics: Metrics


class EpisodeBatch(NamedTuple):
    """S episodes and the policy's output for them; tensors [S, T - 1], 0 where not `output.mask`."""

    episodes: list[Episode]
    output: PolicyOutput
    old_logprobs: Tensor  # the policy's before this iteration's updates, which drew the completions
    kl: Tensor | None  # with a gradient, where the KL is in the loss
    beta: float

    def padded(self, name: str) -> Tensor | None:
        """A field of the episodes, [T_i] each, as [S, T - 1]; None where it is unknown."""
        return pad([getattr(episode, name) for episode in self.episodes], self.output.mask)


class Algorithm(ABC):
    """Advantages and loss of `rlhf ppo` or `rlhf grpo`; all else is the loop's."""

    passes: int  # over an iteration's completions
    needs_values = False  # for the advantages

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config

    @abstractmethod
    def compute_advantages(self, episodes: list[Episode], beta: float) -> Advantages:
        """Advantages from the episodes' rewards; `beta`: the strength of the KL penalty in this iteration."""

    @abstractmethod
    def weights(self, episodes: Sequence[Episode]) -> list[float]:
        """Each episode's weight in the means of loss and metrics: 1, or its tokens."""

    def idle(self, episodes: list[Episode], beta: float) -> set[int]:
        """Places of rewarded episodes that have no part in the gradient."""
        return set()

    @abstractmethod
    def loss(self, batch: EpisodeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's mean loss, with gradient, and its metrics."""

    def sampler_weights(self, batch: EpisodeBatch, advantages: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weights [S, T - 1] of the tokens that a server drew, None where none did, and their metrics. A completion
        whose log-probs it does not tell has weight 1."""
        config, output = self.config, batch.output
        if not config.use_vllm:
            return None, {}
        rows = [
            torch.full((one.tokens,), torch.nan) if one.sampler_logprobs is None else one.sampler_logprobs
            for one in batch.episodes
        ]
        sampler, mask = pad(rows, output.mask), output.mask
        weights, (low, high) = mask.float(), config.weight_bounds
        if config.vllm_importance_sampling_correction:
            mode = config.vllm_importance_sampling_mode
            weights = rk.importance_weights(batch.old_logprobs, sampler, mask, mode, clip_min=low, clip_max=high)
        if (threshold := config.off_policy_mask_threshold) is not None:
            weights = weights * rk.off_policy_mask(output.logprobs, sampler, advantages, mask, threshold)
        return weights, {
            "sampling/weight/mean": weights.sum() / mask.sum(),
            "sampling/weight/zeros": (mask & (weights == 0)).sum() / mask.sum(),
        }

    def needs_scores(self, beta: float) -> bool:
        """True if the completions' log-probs, values or KL must be known before the first update: for advantages, or
        because a later update compares its policy with the one before the first."""
        several_updates = self.config.num_mini_batches * self.passes > 1
        return several_updates or self.needs_values or beta != 0


class EpisodeTask(Task):
    """The episodes of one iteration, each with its advantages, and the loss of an algorithm."""

    noun = "completions"

    def __init__(
        self, setup: Setup, algorithm: Algorithm, episodes: list[Episode], plan: list[list[MicroBatch]], beta: float
    ) -> None:
        super().__init__(plan, algorithm.weights(episodes), setup.accelerator.device)
        self.setup, self.config, self.algorithm = setup, setup.config, algorithm
        self.episodes, self.beta = list(episodes), beta
        self.idle = algorithm.idle(episodes, beta)

    def examples(self, indices: MicroBatch) -> list[Any]:
        return [self.episodes[i].record() for i in indices]

    def compute_loss(self, model: nn.Module, indices: MicroBatch) -> LossOutput:
        episodes = [self.episodes[i] for i in indices]
        inputs = batch_of(episodes, self.setup.pad_id).to(self.device)
        has_kl, exact = self.beta != 0 and self.config.kl_in == "loss", self.config.kl_estimator == "exact"
        reference = None
        if has_kl and exact:
            with torch.no_grad():
                reference = states_of(self.setup.reference, inputs)
        output = forward(model, inputs, self.config.temperature, reference)
        kl = output.kl
        if has_kl and not exact:
            ref_logprobs = pad([episode.ref_logprobs for episode in episodes], output.mask)
            kl = rk.kl_penalty(output.logprobs, ref_logprobs, self.config.kl_estimator)
        old_logprobs = self.keep_old_logprobs(indices, output)
        loss, metrics = self.algorithm.loss(EpisodeBatch(episodes, output, old_logprobs, kl, self.beta))
        tokens = torch.tensor(sum(episode.length for episode in episodes), device=self.device)
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()}, tokens)

    def keep_old_logprobs(self, indices: MicroBatch, output: PolicyOutput) -> Tensor:
        """The log-probs of the policy that drew the episodes: those of `score_episodes`, or, where there were
        none, those of this very forward pass, which are kept for the metrics."""
        episodes = [self.episodes[i] for i in indices]
        old = pad([episode.logprobs for episode in episodes], output.mask)
        if old is None:
            old = output.logprobs.detach()
            rows = unpad(old, output.mask, [episode.tokens for episode in episodes])
            for i, episode, logprobs in zip(indices, episodes, rows, strict=True):
                self.episodes[i] = episode._replace(logprobs=logprobs)
        return old

    def mismatch(self) -> Metrics:
        """The distance between the sampler's log-probs and the policy's, over the episodes of this process' updates."""
        learned_from = sorted(i for batch in self.plan for micro_batch in batch for i in micro_batch)
        pairs = [
            (episode.sampler_logprobs, episode.logprobs)
            for episode in (self.episodes[i] for i in learned_from)
            if episode.sampler_logprobs is not None and episode.logprobs is not None
        ]
        return mismatch(*(torch.cat(side) for side in zip(*pairs, strict=True))) if pairs else {}
