"""Tiny random models, a tokenizer trained here, and preference files: nothing is downloaded."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import rlhf_kernels
import rlhf_trainer
from rlhf_trainer.data.chat import set_chat_template
from rlhf_trainer.offline.config import DPOConfig
from rlhf_trainer.offline.dpo import train_dpo

logging.disable_progress_bar()

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "ate",
    "fish",
    "today",
    "while",
    "dogs",
    "ran",
    "far",
    "over",
    "green",
    "hills",
    "to",
    "see",
    "me",
]
VOCABULARY = 397  # of the models: prime, and more than the tokenizer has, as in models with a padded vocabulary
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Weights are drawn wide and caps low, so that logits spread over several nats: with the usual near-uniform start, a
# forgotten scale, cap or bias would go unnoticed. Dropout stays at each family's default (GPT-2: 0.1).
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA_LIKE = COMMON | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", LLAMA_LIKE | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        LLAMA_LIKE | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "sliding_window": 16},
    ),
    "gpt2": ("GPT2Config", COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}),
    "cohere": ("CohereConfig", LLAMA_LIKE | {"logit_scale": 0.25}),
    # Beyond the five: a head with a bias, a scale that divides, and one that multiplies under the same name.
    "phi": ("PhiConfig", {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "granite": ("GraniteConfig", LLAMA_LIKE | {"logits_scaling": 4.0}),
    "hyperclovax": ("HyperCLOVAXConfig", LLAMA_LIKE | {"logits_scaling": 0.25}),
    "minicpm3": (
        "MiniCPM3Config",
        LLAMA_LIKE | {"dim_model_base": 8, "num_key_value_heads": 4},
    ),  # logits_scaling is 32 / 8
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are faster without waking a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<s>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tok.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def chatml(tokenizer):
    """The tokenizer with a template that says what is learned."""
    tokenizer = copy.deepcopy(tokenizer)
    set_chat_template(tokenizer, "chatml")
    return tokenizer


@pytest.fixture(scope="session")
def make_model():
    def make(family, seed=0, **changes):
        config_name, options = FAMILIES[family]
        config = getattr(transformers, config_name)(**(options | changes))
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # all zero at the start, in which case a dropped bias would not show
                    parameter.normal_(std=0.3)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model_folder(make_model, tokenizer, tmp_path_factory):
    """family -> a save_pretrained folder of a tiny random model and the tokenizer."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return str(made[family])

    return folder


def sentence(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


@pytest.fixture(scope="session")
def rows():
    """count -> preference rows in plain text, of unequal lengths."""

    def make(count, seed=0):
        rng = random.Random(seed)
        return [
            {
                "prompt": sentence(rng, 2, 6),
                "chosen": " " + sentence(rng, 1, 9),
                "rejected": " " + sentence(rng, 1, 9),
            }
            for _ in range(count)
        ]

    return make


@pytest.fixture
def loopback_without_proxy(monkeypatch):
    """Requests to servers of tests go there directly, whatever proxy is set."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def train(tmp_path):
    """Trains with small settings, overridden by keywords; returns (output folder, the lines of metrics.jsonl)."""
    runs = iter(range(100))

    def run(**options):
        small = {
            "output_dir": str(tmp_path / f"out{next(runs)}"), "ref_cache_dir": str(tmp_path / "cache"),
            "learning_rate": 1e-3, "warmup_steps": 0.5, "batch_size": 8, "micro_batch_size": 8, "max_prompt_length": 48,
            "max_length": 96,
        }  # fmt: skip
        folder = train_dpo(DPOConfig(**(small | options)))
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def python(tmp_path):
    """Runs `python ...` in tmp_path, with the packages under test, one thread and no network."""
    roots = [str(Path(package.__file__).parents[1]) for package in (rlhf_trainer, rlhf_kernels)]
    path = os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])
    changes = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words, **environment):
        process = subprocess.Popen(
            [sys.executable, *words], cwd=tmp_path, env=os.environ | changes | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: a launcher then ends the workers it started
            process.communicate()
            raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    return run


@pytest.fixture
def yaml_config(model_folder, rows, write_jsonl, tmp_path):
    """A YAML file for 10 pairs, with a bad row among them."""
    data = write_jsonl([*rows(10), {"prompt": "a", "chosen": "b"}])
    config = {
        "model_name_or_path": model_folder("llama"), "dataset_name": data, "output_dir": "out",
        "ref_cache_dir": "cache", "batch_size": 6, "micro_batch_size": 2, "learning_rate": "1e-3", "warmup_steps": 2,
        "num_train_epochs": 2, "max_prompt_length": 48, "max_length": 96,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run.yaml"
