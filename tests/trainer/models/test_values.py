"""Values of states: from a head on the policy's trunk, or from a model of their own, such as the reward model."""

import pytest
import torch
import transformers

from rlhf_trainer.data.batches import pad_sequences
from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.fused_lm import FusedLM
from rlhf_trainer.models.loading import load_tokenizer
from rlhf_trainer.models.scoring import load_reward_model, score_sequences
from rlhf_trainer.online.config import PPOConfig
from rlhf_trainer.online.critic import make_actor_critic
from rlhf_trainer.online.setup import Setup
from tests.trainer.known_models import save_word_reward_model

SEQUENCES = [([5, 6], [7, 8, 9]), ([5], [11]), ([12, 13, 14], [15, 16])]


@pytest.fixture
def config(model_folder):
    return lambda **options: PPOConfig(
        model_name_or_path=model_folder("llama"), dataset_name="unused", output_dir="unused",
        **({"reward_funcs": ["regex:a"]} | options),
    )  # fmt: skip


def setup_of(config, tokenizer, model):
    return Setup(config, None, tokenizer, [], [], FusedLM(model), None, None)


def values_of(config, tokenizer, model):
    """[S, T] as they reach the loss, and the module."""
    module = make_actor_critic(setup_of(config, tokenizer, model), config)
    batch = pad_sequences(SEQUENCES, pad_id=0)
    return module(batch, lambda hidden, head, values: values), module


def test_a_separate_critic_starts_as_the_reward_model(config, tokenizer, make_model, tmp_path):
    """Its value at a sequence's last token is the reward of that sequence."""
    reward_model = save_word_reward_model(tmp_path / "judge", tokenizer, "cat")
    values, _ = values_of(config(reward_model_name_or_path=reward_model), tokenizer, make_model("llama"))
    whole = [prompt + response for prompt, response in SEQUENCES]
    rewards = score_sequences(load_reward_model(reward_model, key="reward_model"), whole, 4, 0, torch.device("cpu"))
    last = torch.tensor([len(ids) - 1 for ids in whole])
    torch.testing.assert_close(values[torch.arange(3), last], rewards)


def test_a_language_model_to_start_from_brings_no_head(config, tokenizer, make_model, model_folder):
    """Its head is new, so all zeros, whichever option names it; and it recomputes activations like the policy."""
    options = config(value_model_name_or_path=model_folder("llama"), gradient_checkpointing=True)
    values, module = values_of(options, tokenizer, make_model("llama"))
    assert not values.any()
    assert any(getattr(part, "gradient_checkpointing", False) and part.training for part in module.critic.modules())


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_a_new_head_says_nothing_at_first_and_learns(config, tokenizer, make_model, kind):
    """The values' gradient reaches the policy through a shared trunk, but not from a separate one."""
    model = make_model("llama")
    values, module = values_of(config(value_model=kind), tokenizer, model)
    assert values.shape == (3, 5) and not values.any()
    head = module.critic if kind == "shared" else module.critic.score
    with torch.no_grad():
        head.weight.normal_()
    values = module(pad_sequences(SEQUENCES, pad_id=0), lambda hidden, head, values: values)
    values.sum().backward()
    assert head.weight.grad.abs().sum() > 0
    reached = any(weight.grad is not None and weight.grad.any() for weight in model.parameters())
    assert reached == (kind == "shared")


def test_a_critic_with_other_tokens_is_refused(config, make_model, tokenizer, tmp_path):
    reward_model = save_word_reward_model(tmp_path / "judge", tokenizer, "cat")
    other = load_tokenizer(reward_model, key="reward_model")
    other.add_tokens(["zebra"])
    swapped = other.get_vocab()
    assert swapped["zebra"] not in tokenizer.get_vocab().values()
    policy_tokens = transformers.AutoTokenizer.from_pretrained(reward_model)
    policy_tokens.add_tokens(["lion"])  # at the place where the reward model's tokenizer, saved below, has "zebra"
    other.save_pretrained(reward_model)
    policy_tokens.add_tokens(["zebra"])
    options = config(reward_model_name_or_path=reward_model)
    with pytest.raises(UsageError, match="has another tokenizer, so values cannot start from it; name a model with"):
        make_actor_critic(setup_of(options, policy_tokens, make_model("llama")), options)
