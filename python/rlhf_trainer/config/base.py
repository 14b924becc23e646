"""Configurations: what each command can be told, with defaults. `config_file.py` reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UsageError

LossType = Literal[
    "sigmoid", "hinge", "ipo", "ipo_mean", "robust", "simpo", "apo_zero", "apo_down", "sppo", "nca", "exo", "aot",
    "discopop",
]  # fmt: skip
RowFormat = Literal["auto", "plain", "hh", "tldr", "imdb", "ultrafeedback", "gsm8k"]
Pairing = Literal["best_worst", "all"]


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def needed(help: str) -> Any:
    return field(metadata={"help": help})


def listed(help: str) -> Any:
    return field(default_factory=list, metadata={"help": help})


@dataclass(kw_only=True)
class OutputConfig:
    """What every command that leaves files can be told."""

    output_dir: str = needed("Where the results and this configuration go.")
    overwrite: bool = option(False, "Replace output_dir if it exists; without this flag nothing is replaced.")
    resume: bool = option(False, "Go on where a run into output_dir stopped; from the start if there is none.")
    trust_remote_code: bool = option(False, "Run model code that comes with a hub repository.")
    attn_implementation: str | None = option(None, "Passed to transformers: eager, sdpa, flash_attention_2, ...")
    precision: Literal["fp32", "bf16"] = option("fp32", "bf16 computes in bfloat16, with fp32 master weights.")
    seed: int = option(42, "Seeds everything that is drawn.")

    def __post_init__(self) -> None:
        at_least(self, 0, "seed")
        if self.seed >= 2**32:
            raise UsageError(f"seed must be below 2**32, got {self.seed}")


@dataclass(kw_only=True)
class TrainConfig(OutputConfig):
    """What every command that trains can be told."""

    model_name_or_path: str = needed("The model to train: a local folder or a hub id.")
    tokenizer_name_or_path: str | None = option(None, "The tokenizer; default: the model's.")

    dataset: str = needed("A .jsonl or .parquet file, or a hub id.")
    dataset_split: str = option("train", "The split of a hub data set.")
    dataset_format: RowFormat = option("auto", "How rows are laid out; auto goes by their columns.")
    streaming: bool = option(False, "Read a hub data set row by row instead of downloading it whole first.")
    eval_dataset: str | None = option(None, "Held-out rows, in the same formats.")
    eval_split: str = option("test", "The split of a hub evaluation set.")
    eval_steps: int | None = option(None, "Evaluate every so many steps; default: before training and at its end.")
    skip_invalid_rows: bool = option(False, "Leave invalid rows out and report them, instead of stopping.")

    num_train_epochs: int = option(1, "Passes over the data.")
    max_steps: int | None = option(None, "Stop after so many optimizer steps, whatever num_train_epochs says.")
    batch_size: int = option(64, "Examples per optimizer step, over all processes and micro-batches together.")
    micro_batch_size: int = option(8, "Examples per forward pass; changes memory and speed, not the result.")
    optimizer: Literal["rmsprop", "adamw"] = option("adamw", "The optimizer.")
    learning_rate: float = option(1e-5, "The learning rate after the warm-up.")
    lr_schedule: Literal["constant", "linear", "cosine"] = option("constant", "After the warm-up: stay, or fall to 0.")
    warmup_steps: int = option(0, "Steps over which the learning rate rises linearly from 0.")
    weight_decay: float = option(0.0, "Decoupled for adamw, added to the gradient for rmsprop.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    workspace_mib: int | None = option(None, "Scratch memory of the losses; what holds the logits twice saves time.")

    save_steps: int = option(100, "Save what --resume needs every so many steps.")
    report_to: list[str] = listed("Trackers of accelerate: tensorboard, wandb, trackio, ...")
    run_name: str = option("rlhf", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm", "learning_rate")
        if not self.learning_rate < math.inf:
            raise UsageError(f"learning_rate must be finite, got {self.learning_rate}")
        if self.eval_steps is not None and self.eval_dataset is None:
            raise UsageError("eval_steps: there is nothing to evaluate on, so pass eval_dataset")
        at_least(self, 1, "num_train_epochs", "max_steps", "batch_size", "micro_batch_size", "eval_steps")
        at_least(self, 1, "save_steps")
        at_least(self, 8, "workspace_mib")


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
    """Everything `rlhf sft` can be told. Batches of 256, as InstructGPT's and Tulu 3's are of that order."""

    chat_template: str | None = option(None, "chatml, or a Jinja file; default: the tokenizer's own.")
    assistant_turns: Literal["all", "last"] = option("all", "Which turns of a conversation are learned.")
    max_length: int = option(1024, "Tokens of a sequence; what is longer is cut, and the cuts counted.")
    packing: bool = option(False, "Put several conversations into a row of max_length; none sees another.")
    batch_size: int = option(256, "Conversations per optimizer step, over all processes and micro-batches together.")
    lr_schedule: Literal["constant", "linear", "cosine"] = option("cosine", "After the warm-up: stay, or fall to 0.")
    run_name: str = option("rlhf-sft", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "max_length")


@dataclass(kw_only=True)
class PairConfig(TrainConfig):
    """What commands that train on pairs of responses can be told."""

    max_prompt_length: int = option(512, "A prompt with more tokens is invalid: it is never cut silently.")
    max_length: int = option(1024, "Tokens of a sequence; what is longer is cut, and the cuts counted.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_prompt_length")
        if self.max_length <= self.max_prompt_length:
            raise UsageError(
                f"max_length must leave room for a response: it must exceed "
                f"max_prompt_length={self.max_prompt_length}, got {self.max_length}"
            )


@dataclass(kw_only=True)
class RewardConfig(PairConfig):
    """Everything `rlhf reward` can be told. One epoch: more of them overfit, says InstructGPT, appendix C.2."""

    loss_type: Literal["bradley_terry", "margin_ranking"] = option("bradley_terry", "The pair loss.")
    margin: float = option(1.0, "How far apart margin_ranking wants the two rewards.")
    label_smoothing: float = option(0.0, "The share of labels taken to be flipped (bradley_terry).")
    center_coefficient: float = option(0.0, "Holds a pair's rewards near 0; 0.01 is usual (bradley_terry).")
    compare_with: list[str] = listed("Reward models, say of other seeds: their disagreement on eval_dataset is told.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    run_name: str = option("rlhf-reward", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "margin", "label_smoothing", "center_coefficient")
        if self.margin != 1.0 and self.loss_type != "margin_ranking":
            raise UsageError(f"margin is for loss_type margin_ranking; {self.loss_type} takes margins from the data")
        if self.compare_with and self.eval_dataset is None:
            raise UsageError("compare_with: models are compared on held-out pairs, so pass eval_dataset")


@dataclass(kw_only=True)
class DPOConfig(PairConfig):
    """Everything `rlhf dpo` can be told. The defaults of the algorithm are those of the DPO paper, appendix B."""

    ref_model_name_or_path: str | None = option(None, "The reference model; default: the model before training.")
    ref_cache_dir: str | None = option(None, "Reference log-probs are kept here; default: ~/.cache/rlhf_trainer.")
    beta: float = option(0.1, "How strongly the reference holds the policy back.")
    loss_type: LossType = option("sigmoid", "The pair loss.")
    label_smoothing: float = option(0.0, "The share of labels taken to be flipped (cDPO; robust; exo).")
    gamma: float = option(0.5, "SimPO's target margin, in units of beta.")
    share_prefix: bool = option(False, "Run a prompt once for all its responses, where the model's attention can.")
    optimizer: Literal["rmsprop", "adamw"] = option("rmsprop", "The optimizer.")
    learning_rate: float = option(1e-6, "The learning rate after the warm-up.")
    warmup_steps: int = option(150, "Steps over which the learning rate rises linearly from 0.")
    max_grad_norm: float = option(10.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    run_name: str = option("rlhf-dpo", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "beta")


@dataclass(kw_only=True)
class ServerConfig(OutputConfig):
    """What commands can be told whose completions may come from an HTTP server."""

    server_url: str | None = option(None, "An OpenAI-compatible server that generates, as http://host:8000.")
    server_model: str | None = option(None, "The model's name on the server; default: its name here.")
    server_prompts: Literal["ids", "text"] = option("ids", "How prompts travel: vLLM and SGLang take token ids.")
    server_sync: Literal["none", "folder", "reload"] = option(
        "none", "The policy goes to the server: never; as a folder that is asked for by name; by reloading (SGLang)."
    )
    server_timeout: float = option(600.0, "Seconds to wait for an answer.")
    server_retries: int = option(4, "How often a request that failed is sent again, after 1, 2, 4, ... seconds.")
    server_concurrency: int = option(64, "Requests under way at the same time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "server_retries")
        at_least(self, 1, "server_concurrency")
        if not 0 < self.server_timeout < math.inf:
            raise UsageError(f"server_timeout must be a positive number of seconds, got {self.server_timeout}")
        if self.server_url is not None and not self.server_url.startswith(("http://", "https://")):
            raise UsageError(f"server_url must start with http:// or https://, got {self.server_url!r}")
        if self.server_url is None and (self.server_model is not None or self.server_sync != "none"):
            raise UsageError("server_model and server_sync are for a server: pass server_url")


@dataclass(kw_only=True)
class GenerationConfig(OutputConfig):
    """What commands that generate can be told."""

    dataset: str = needed("Prompts: a .jsonl or .parquet file, or a hub id.")
    dataset_split: str = option("train", "The split of a hub data set.")
    dataset_format: RowFormat = option("auto", "How rows are laid out; auto goes by their columns.")
    streaming: bool = option(False, "Read a hub data set row by row instead of downloading it whole first.")
    max_prompts: int | None = option(None, "Take only so many prompts, from the start.")
    max_prompt_length: int = option(512, "A prompt with more tokens is invalid: it is never cut silently.")
    max_new_tokens: int = option(512, "A completion ends here at the latest.")
    skip_invalid_rows: bool = option(False, "Leave invalid rows out and report them, instead of stopping.")
    temperature: float = option(1.0, "Divides the logits; 0 takes the likeliest token.")
    top_k: int = option(0, "Sample from the k likeliest tokens; 0: from all.")
    top_p: float = option(1.0, "Sample from the likeliest tokens that together have this probability.")
    batch_size: int = option(32, "Completions generated, or scored, at once.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "temperature", "top_k")
        at_least(self, 1, "max_prompts", "max_prompt_length", "max_new_tokens", "batch_size")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(kw_only=True)
class SampleConfig(GenerationConfig, ServerConfig):
    """Everything `rlhf sample` can be told."""

    models: list[str] = listed("The models that write: local folders or hub ids. Each writes num_completions a prompt.")
    num_completions: int = option(10, "Completions a prompt, of each model; 10 to 30 is usual.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_completions")
        if not self.models:
            raise UsageError("models: name at least one model that writes")
        if self.server_sync != "none":
            raise UsageError("server_sync: nothing changes the models, so there is nothing to send to the server")
        if self.server_model is not None and len(self.models) > 1:
            raise UsageError("server_model is the name of one model on the server, and models has several")


@dataclass(kw_only=True)
class RoundsConfig(DPOConfig, GenerationConfig):
    """Everything `rlhf rounds` can be told. What `rlhf dpo` can be told is meant for each round."""

    dataset: str = needed("Prompts: a .jsonl or .parquet file, or a hub id.")
    reward_model: str = needed("The reward model that judges: a local folder or a hub id.")
    rounds: int = option(3, "How often to sample, score and train; each round goes on with the model of the last.")
    num_completions: int = option(4, "Completions a prompt and round.")
    pairing: Pairing = option(
        "best_worst", "Pairs of a prompt: its best completion against its worst, or all whose rewards differ."
    )
    reference: Literal["previous", "first"] = option(
        "previous", "The reference model: the one that the round starts from, or for all rounds the first one."
    )
    generation_batch_size: int = option(32, "Completions generated, or scored, at once.")
    warmup_steps: int = option(10, "Steps of each round over which the learning rate rises linearly from 0.")
    run_name: str = option("rlhf-rounds", "The project's name in the trackers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rounds", "generation_batch_size")
        at_least(self, 2, "num_completions")
        if self.temperature == 0:
            raise UsageError("temperature must be above 0: at 0 all completions of a prompt are the same")
        if self.tokenizer_name_or_path is not None:
            raise UsageError(
                "tokenizer_name_or_path: a model writes with its own tokenizer, so rounds cannot train it with another "
                "one; save that one into the model's folder"
            )
        if self.ref_model_name_or_path is not None and self.reference != "first":
            raise UsageError(
                "ref_model_name_or_path: with reference: previous, each round has a reference of its own; pass "
                "reference: first to hold all rounds to this model"
            )


@dataclass(kw_only=True)
class JudgeConfig(OutputConfig):
    """What commands that reward completions can be told: a reward model, reward functions, or a weighted sum."""

    reward_model: str | None = option(None, "A reward model that judges: a local folder or a hub id.")
    rewards: list[str] = listed("Reward functions: exact_answer, regex:PATTERN, ..., module:function, model:FOLDER.")
    reward_weights: list[float] = listed("Their weights in the reward, the reward_model's first; default: 1 each.")

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.rewards) + (self.reward_model is not None)
        if count == 0:
            raise UsageError("nothing judges: name a reward_model or rewards")
        if self.reward_weights and len(self.reward_weights) != count:
            raise UsageError(f"reward_weights: expected {count}, one for each judge, got {len(self.reward_weights)}")
        if not all(math.isfinite(weight) for weight in self.reward_weights):
            raise UsageError(f"reward_weights must be finite, got {self.reward_weights}")


@dataclass(kw_only=True)
class RejectConfig(JudgeConfig):
    """Everything `rlhf reject` can be told."""

    completions: list[str] = listed("Files of `rlhf sample`, or folders that hold them.")
    min_reward: float | None = option(None, "Select only completions with at least this reward, say the correct ones.")
    selection: Literal["top_per_prompt", "top_overall", "random"] = option(
        "top_per_prompt", "The best of each prompt; the best of all; or as many at random, to compare with."
    )
    k: int = option(1, "How many: of each prompt (top_per_prompt, random), or in all (top_overall).")
    max_per_prompt: int | None = option(None, "At most so many of one prompt (top_overall).")
    batch_size: int = option(32, "Completions scored at once.")
    max_length: int = option(1024, "Tokens of prompt and completion to reward models; what is longer is left out.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "k", "max_per_prompt", "batch_size", "max_length")
        if self.max_per_prompt is not None and self.selection != "top_overall":
            raise UsageError(f"max_per_prompt is for selection top_overall; with {self.selection}, k is per prompt")
        if not self.completions:
            raise UsageError("completions: name at least one file of completions")
        if self.min_reward is not None and math.isnan(self.min_reward):
            raise UsageError("min_reward must be a number, got nan")


@dataclass(kw_only=True)
class PairsConfig(OutputConfig):
    """Everything `rlhf pairs` can be told."""

    scored: list[str] = listed("Files scored.jsonl of `rlhf reject`, or folders that hold them.")
    pairing: Pairing = option(
        "best_worst", "Pairs of a prompt: its best completion against its worst, or all whose rewards differ."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scored:
            raise UsageError("scored: name at least one file of scored completions")


@dataclass(kw_only=True)
class EvaluateConfig(GenerationConfig):
    """Everything `rlhf evaluate` can be told."""

    model_name_or_path: str = needed("The model that answers: a local folder or a hub id.")
    ref_model_name_or_path: str | None = option(None, "The model that KL is measured from; none: no KL.")
    reward_model: str = needed("The reward model that judges: a local folder or a hub id.")
    resamples: int = option(1000, "Bootstrap resamples of the prompts behind each interval.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "resamples")


@dataclass
class DemoConfig:
    """Everything `rlhf demo` can be told."""

    output_dir: str = option("demo_output", "Where models, preferences, metrics and the picture go.")
    overwrite: bool = option(False, "Replace output_dir if it exists; without it, the next free name is used.")
    lm_steps: int = option(400, "Steps of language modelling that make the first model.")
    demonstrations: int = option(2048, "Reviews for SFT.")
    pairs: int = option(4096, "Pairs of reviews to compare.")
    completions: int = option(16, "Reviews a prompt that rejection sampling chooses from.")
    dpo_epochs: int = option(3, "Passes over the pairs.")
    seed: int = option(0, "Seeds everything.")

    def __post_init__(self) -> None:
        at_least(self, 1, "lm_steps", "demonstrations", "pairs", "completions", "dpo_epochs")


@dataclass
class RecipeConfig:
    """Everything `rlhf recipe` can be told; what its stages are told stands in the recipe."""

    recipe: str = needed("The name of a recipe that is shipped, or a YAML file.")
    output_dir: str = needed("Where the stages' folders and the report go.")
    overwrite: bool = option(False, "Replace output_dir if it exists; without this flag nothing is replaced.")
    resume: bool = option(False, "Go on where a run into output_dir stopped; from the start if there is none.")
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "Changes: variable=value, or stage.key=value, as often as wanted.", "action": "extend"},
    )
    dry_run: bool = option(False, "Check the recipe and print its stages as commands, without running them.")


@dataclass
class FrontierConfig:
    """Everything `rlhf frontier` can be told."""

    output_dir: str = option("frontier_output", "Where models, results and pictures go.")
    overwrite: bool = option(False, "Replace output_dir if it exists; without this flag nothing is replaced.")
    resume: bool = option(False, "Go on where a run into output_dir stopped; from the start if there is none.")
    quick: bool = option(False, "One seed, few strengths, short trainings: to see that all runs, not how it comes out.")
    seeds: int = option(3, "How often every training is repeated, with other data and another order.")
    reward_model_seeds: int = option(9, "The same of reward models, which differ more and cost less.")
    workers: int | None = option(None, "Trainings at once, with one thread each; default: as many as there are cores.")
    seed: int = option(0, "Seeds everything.")

    def __post_init__(self) -> None:
        at_least(self, 1, "seeds", "reward_model_seeds", "workers")
        at_least(self, 0, "seed")


def at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise UsageError(f"{name} must be at least {minimum}, got {value}")
