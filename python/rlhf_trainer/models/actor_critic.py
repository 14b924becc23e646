"""A policy and the values of its states, in one module: the model that PPO trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batches import Batch
from .fused_lm import FusedLM, LMHead, inputs_of
from .scoring import value_head_of, values_of


class ActorCritic(nn.Module):
    """`forward(batch, use)` -> use(hidden [S, T, D], LM head, values [S, T] fp32).

    values[:, t] is of the state before token t + 1. With a shared trunk it is a linear layer on the policy's hidden
    states, whose gradient shapes them, too; else a model of its own, of the make of a reward model.
    """

    def __init__(self, policy: FusedLM, critic: PreTrainedModel | nn.Linear) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        self.shared = isinstance(critic, nn.Linear)
        self.head = [] if self.shared else [value_head_of(critic)]  # in a list: it is the critic's

    def forward(self, batch: Batch, use: Callable[[Tensor, LMHead, Tensor], Any]) -> Any:
        if self.shared:
            return self.policy(batch, lambda hidden, head: use(hidden, head, values_of(self.critic, hidden)))
        values = self.values(batch)
        return self.policy(batch, lambda hidden, head: use(hidden, head, values))

    def values(self, batch: Batch) -> Tensor:
        """The separate model's values, [S, T] fp32."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.policy.bf16):
            hidden = self.critic.base_model(**inputs_of(batch), use_cache=False).last_hidden_state
        return values_of(self.head[0], hidden)
