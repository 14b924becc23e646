"""A policy and the values of its states, in one module: what PPO trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..data.examples import Batch
from ..errors import UsageError
from ..models.loading import (
    FusedLM,
    LMHead,
    check_fit,
    checkpoint_gradients,
    have_same_tokens,
    inputs_of,
    load_pretrained,
    load_tokenizer,
)
from ..models.scoring import value_head_of
from .config import PPOConfig
from .setup import SHORTER, Setup


class ActorCritic(nn.Module):
    """`forward(batch, use)` -> use(hidden [S, T, D], LM head, values [S, T] fp32).

    values[:, t] is of the state before token t + 1. With a shared trunk it is a linear layer on the policy's hidden
    states, whose gradient shapes them, too; else a model of its own, of the make of a reward model.
    """

    def __init__(self, policy: FusedLM, critic: PreTrainedModel | nn.Linear) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        self.shared = isinstance(critic, nn.Linear)
        self.head_name = None if self.shared else name_of_head(critic)

    def forward(self, batch: Batch, use: Callable[[Tensor, LMHead, Tensor], Any]) -> Any:
        if self.shared:
            return self.policy(batch, lambda hidden, head: use(hidden, head, values_of(self.critic, hidden)))
        values = self.values(batch)
        return self.policy(batch, lambda hidden, head: use(hidden, head, values))

    def values(self, batch: Batch) -> Tensor:
        """Of the separate model, [S, T]."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.policy.bf16):
            hidden = self.critic.base_model(**inputs_of(batch), use_cache=False).last_hidden_state
        return values_of(getattr(self.critic, self.head_name), hidden)


def values_of(head: nn.Linear, hidden: Tensor) -> Tensor:
    """[..., D] -> [...] fp32, computed in fp32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


def make_actor_critic(setup: Setup, config: PPOConfig) -> ActorCritic:
    """With a new head, all zeros, where there is none to start from: every state is then worth nothing at first."""
    policy, tokenizer = setup.policy, setup.tokenizer
    if config.value_model == "shared":
        head = nn.Linear(policy.model.get_output_embeddings().in_features, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return ActorCritic(policy, head)
    key = "value_model_name_or_path"
    if config.value_model_name_or_path is None:
        key = "model_name_or_path" if config.reward_model is None else "reward_model"
    name = getattr(config, key)
    critic = load_pretrained(
        AutoModelForSequenceClassification, name, "a model with one value a token", key=key,
        attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code,
        new=("score.", "classifier."), num_labels=1,
    )  # fmt: skip
    for source, prompts in setup.sources():
        lengths = [prompt.length + config.max_new_tokens for prompt in prompts]
        check_fit(critic, tokenizer, [prompt.row for prompt in prompts], lengths, source, SHORTER)
    if not have_same_tokens(tokenizer, load_tokenizer(name, key=key, trust_remote_code=config.trust_remote_code)):
        raise UsageError(
            f"{key}: {name!r} has another tokenizer, so values cannot start from it; name a model with the policy's "
            "tokens in value_model_name_or_path"
        )
    if not any("ForSequenceClassification" in saved for saved in critic.config.architectures or []):
        nn.init.zeros_(getattr(critic, name_of_head(critic)).weight)
    if config.gradient_checkpointing:
        checkpoint_gradients(critic)
    return ActorCritic(policy, critic)


def name_of_head(critic: PreTrainedModel) -> str:
    head = value_head_of(critic)
    return next(name for name, child in critic.named_children() if child is head)
