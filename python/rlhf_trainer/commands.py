"""The commands of `rlhf`: for each, where its configuration and its function are, as text, so that importing this costs
nothing and everybody may."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command's configuration and function, "module:name" below this package, which methods import; a summary; and,
    of those that `rlhf inspect` takes, the function (configuration, codec, source, split) that reads the examples."""

    config: str
    function: str
    summary: str
    reader: str | None = None

    def load_config(self) -> type:
        return load(self.config)

    def load_function(self) -> Callable[[Any], Any]:
        return load(self.function)


def load(place: str) -> Any:
    """The object at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(f".{module}", __package__), name)


COMMANDS = {
    "sft": Command(
        "offline.config:SFTConfig", "offline.sft:train_sft", "fine-tune a model on conversations or demonstrations",
        "offline.sft:read_conversations",
    ),
    "reward": Command(
        "offline.config:RewardConfig", "offline.reward_model:train_reward", "train a reward model on preferences",
        "offline.reward_model:read_rewarded",
    ),
    "sample": Command(
        "rollouts.config:SampleConfig", "rollouts.sample:sample", "write completions of prompts with some models",
        "rollouts.loading:read_prompts",
    ),
    "rejection": Command(
        "rewards.config:RejectionConfig", "rewards.rejection:rejection", "keep the completions with the best rewards"
    ),
    "pairs": Command(
        "preferences.config:PairsConfig", "preferences.pairs:make_pairs", "make preferences of scored completions"
    ),
    "judge": Command(
        "preferences.config:JudgeConfig", "preferences.judge:judge", "have a model judge pairs of responses"
    ),
    "dpo": Command(
        "offline.config:DPOConfig", "offline.dpo:train_dpo", "train a model on preferences with DPO",
        "offline.pair_batches:read_groups",
    ),
    "online-dpo": Command(
        "recipes.config:OnlineDPOConfig", "recipes.online_dpo:train_online_dpo",
        "sample, score and train with DPO, round by round",
    ),
    "ppo": Command(
        "online.config:PPOConfig", "online.ppo:train_ppo", "raise rewards with PPO and a KL penalty",
        "online.setup:read_prompts",
    ),
    "grpo": Command(
        "online.config:GRPOConfig", "online.grpo:train_grpo", "raise rewards relative to a group's (GRPO)",
        "online.setup:read_prompts",
    ),
    "evaluate": Command(
        "evaluation.config:EvaluateConfig", "evaluation.evaluate:evaluate", "win rate, reward, KL, length on prompts"
    ),
    "serve-vllm": Command(
        "rollouts.config:ServeVLLMConfig", "rollouts.serve_vllm:serve_vllm", "serve a model by vLLM for grpo and ppo"
    ),
    "merge": Command("models.config:MergeConfig", "models.merge:merge", "write an adapter's whole weights"),
    "recipe": Command(
        "recipes.config:RecipeConfig", "recipes.run:run_recipe", "the stages of a YAML file in order, to one report"
    ),
    "frontier": Command(
        "studies.config:FrontierConfig", "studies.frontier.run:run", "reward over KL of each method, exact, on a CPU"
    ),
    "demo": Command(
        "studies.config:DemoConfig", "studies.demo.run:run", "the pipeline on a CPU in minutes, with a known reward"
    ),
}  # fmt: skip
