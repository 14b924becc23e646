"""A policy and the values of its states, in one module: what PPO trains."""

from torch import nn
from transformers import AutoModelForSequenceClassification

from ..errors import UsageError
from ..models.actor_critic import ActorCritic
from ..models.checks import check_fit, have_same_tokens
from ..models.loading import HEADS, checkpoint_gradients, load_pretrained, load_tokenizer, loading_of, make_room
from ..models.lora import train_adapter
from ..models.scoring import value_head_of
from .config import PPOConfig
from .setup import SHORTER, Setup


def make_actor_critic(setup: Setup, config: PPOConfig) -> ActorCritic:
    """The policy with its values: a shared or separate model. A new head is all zeros, so that every state is worth
    nothing at first."""
    policy, tokenizer = setup.policy, setup.tokenizer
    if config.value_model == "shared":
        head = nn.Linear(policy.model.get_output_embeddings().in_features, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return ActorCritic(policy, head)
    key = "value_model_name_or_path"
    if config.value_model_name_or_path is None:
        key = "model_name_or_path" if config.reward_model_name_or_path is None else "reward_model_name_or_path"
    name = getattr(config, key)
    critic = load_pretrained(
        AutoModelForSequenceClassification, name, "a model with one value a token", key=key, new=HEADS, num_labels=1,
        **loading_of(config, trains=True) | {"merges": True},
    )  # fmt: skip
    for source, prompts in setup.sources():
        lengths = [prompt.length + config.max_completion_length for prompt in prompts]
        make_room(critic, tokenizer)
        check_fit(critic, tokenizer, [prompt.row for prompt in prompts], lengths, source, SHORTER)
    if not have_same_tokens(tokenizer, load_tokenizer(name, key=key, trust_remote_code=config.trust_remote_code)):
        raise UsageError(
            f"{key}: {name!r} has another tokenizer, so values cannot start from it; name a model with the policy's "
            "tokens in value_model_name_or_path"
        )
    if not any("ForSequenceClassification" in saved for saved in critic.config.architectures or []):
        nn.init.zeros_(value_head_of(critic).weight)
    if config.use_peft:
        train_adapter(critic, config, "SEQ_CLS")
    if config.gradient_checkpointing:
        checkpoint_gradients(critic)
    return ActorCritic(policy, critic)
