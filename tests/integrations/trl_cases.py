"""Ingredients of the tests of TRL's trainers: tiny models, a tokenizer trained here, rows, and the runs to compare."""

from __future__ import annotations

import functools
import math
import random
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_kernels.integrations import scores

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ate", "fish", "today", "while", "dogs", "ran", "far", "over"]
VOCABULARY = 397  # prime, and more than the tokenizer has, as in models with a padded vocabulary

# Weights drawn wide and a low cap: a forgotten cap or temperature, or a head that is not the model's, would show.
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "gemma2": (  # a soft cap and a tied head
        "Gemma2Config",
        LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "sliding_window": 64},
    ),
    "mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
TRAINERS = {name: getattr(trl, f"{name}Trainer") for name in ("DPO", "GRPO", "RLOO", "SFT")}
CONFIGS = {name: getattr(trl, f"{name}Config") for name in TRAINERS}
VERSION = tuple(int(part) for part in trl.__version__.split(".")[:2])
ROWS = 8
KEPT: list[tempfile.TemporaryDirectory] = []  # folders, for as long as the process lives

# What a step logs that is no number of the model's.
NOT_COMPARED = {"step_time", "epoch", "learning_rate", "runtime", "samples_per_second", "steps_per_second"} | {
    "model_preparation_time"
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


@functools.cache
def _folder(family: str, seed: int, **changes: Any) -> str:
    """A model in a folder, as TRL loads a reference model of its own by the policy's name."""
    name, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**(options | changes)))
    folder = tempfile.TemporaryDirectory()
    KEPT.append(folder)
    model.save_pretrained(folder.name)
    return folder.name


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(_folder(family, seed, **changes))


def rows(kind: str, count: int = ROWS, seed: int = 0) -> Dataset:
    """Rows of unequal lengths."""
    rng = random.Random(seed)

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    pairs = [
        {"prompt": sentence(2, 6), "chosen": " " + sentence(1, 9), "rejected": " " + sentence(1, 9)}
        for _ in range(count)
    ]
    if kind == "SFT":
        return Dataset.from_list([{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs])
    return Dataset.from_list(pairs if kind == "DPO" else [{"prompt": pair["prompt"]} for pair in pairs])


def count_of_es(completions: list[str], **_: Any) -> list[float]:
    return [text.count("e") + len(text) / 50 for text in completions]


DEFAULTS: dict[str, dict[str, Any]] = {
    "DPO": {"max_length": 64, "beta": 0.2},
    "SFT": {"max_length": 64, "completion_only_loss": True},
    "GRPO": {"max_completion_length": 12, "num_generations": 4, "temperature": 0.7},
    "RLOO": {"max_completion_length": 12, "num_generations": 4, "temperature": 0.7, "beta": 0.05},
}


def make_trainer(cls: Any, kind: str, folder: Any, model: Any, train: Any = None, **options: Any) -> Any:
    """`options` are the config's, but for arguments of the constructor."""
    passed = {
        name: options.pop(name)
        for name in ("ref_model", "peft_config", "compute_metrics", "compute_loss_func", "eval_dataset", "callbacks")
        if name in options
    }
    if kind in ("GRPO", "RLOO"):
        passed["reward_funcs"] = count_of_es
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": ROWS, "max_steps": 2, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1e9, "optim": "sgd", "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "seed": 0, "disable_tqdm": True,
    }  # fmt: skip
    args = CONFIGS[kind](**(common | DEFAULTS[kind] | options))
    return cls(
        model=model, args=args, train_dataset=rows(kind) if train is None else train, processing_class=tokenizer(),
        **passed,
    )  # fmt: skip


def steps_of(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]], relative: float = 1e-4) -> None:
    """Every number that TRL logged, among them loss and gradient norm."""
    assert len(ours) == len(theirs) > 0
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.keys() == their.keys()
        for name in their.keys() - {key for key in their if key.removeprefix("eval_") in NOT_COMPARED}:
            if their[name] is None:  # of no token at all
                assert our[name] is None, name
                continue
            a, b = float(our[name]), float(their[name])
            close = math.isclose(a, b, rel_tol=relative, abs_tol=1e-5 if "grad" not in name else 0.0)
            assert close or (math.isnan(a) and math.isnan(b)), f"{name} of step {step}: {a} instead of {b}"


def calls_of_the_op(monkeypatch: Any) -> list[int]:
    """A list with an entry for every time that a fused trainer calls the op: how many tokens it scored."""
    calls: list[int] = []
    own = scores.linear_logprobs

    def counted(hidden: Any, weight: Any, targets: Any, **options: Any) -> Any:
        calls.append(int((targets != -100).sum()))
        return own(hidden, weight, targets, **options)

    monkeypatch.setattr(scores, "linear_logprobs", counted)
    return calls
