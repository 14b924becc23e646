"""Two processes with each half of every sequence: hidden states of many families, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from rlhf_trainer.errors import UsageError
from rlhf_trainer.models.sequence_parallel import SequenceParallel, start_sequence_parallel
from rlhf_trainer.offline.config import DPOConfig, SFTConfig

SCRIPT = str(Path(__file__).with_name("shared_sequences.py"))
NAMES = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
RIGHT = ("llama", "qwen3", "gpt2", "cohere", "one-key-head", "window")
REFUSED = {
    "gemma2": "has softcap", "one-head": "expected a divisor of the 1 attention heads of one-head",
    "mamba": "sp_size 2: ",
}  # fmt: skip


def test_hidden_states_are_those_of_whole_sequences(python, model_folder, make_model, tmp_path):
    """Or the model is refused: one that does more than attend from token to token, or by rules of its own."""
    folders = {name: model_folder(name) for name in ("llama", "qwen3", "gpt2", "cohere", "gemma2")}
    small = {"vocab_size": 397, "hidden_size": 16, "num_hidden_layers": 1}
    window = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 9}
    made = {
        "one-key-head": make_model("llama", num_key_value_heads=1),
        "window": MistralForCausalLM(MistralConfig(**small, **window)),
        "one-head": make_model("llama", num_attention_heads=1, num_key_value_heads=1),
        "mamba": MambaForCausalLM(MambaConfig(**small, state_size=4)),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    words = [f"{name}={folder}" for name, folder in {**folders, **{name: tmp_path / name for name in made}}.items()]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = python(*launch, SCRIPT, *words, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-6000:]
    tried = {name: rest for name, *rest in (line.split("\t") for line in done.stdout.splitlines() if "\t" in line)}
    for name in RIGHT:
        assert float(tried.pop(name)[0]) < 1e-6, name
    assert {name: result for name, (result, _) in tried.items()} == dict.fromkeys(REFUSED, "refused")
    for name, message in REFUSED.items():
        assert message in tried[name][1]


def test_parts_are_padded_to_one_length():
    labels = torch.tensor([[-100, 5, 6, 7, 8]])
    parts = [SequenceParallel(None, rank, 2).targets(labels).tolist() for rank in range(2)]
    assert parts == [[[5, 6, 7]], [[8, -100, -100]]]


def test_options_that_do_not_go_together():
    with pytest.raises(UsageError, match="packing: rows that hold more than one sequence are not shared"):
        SFTConfig(**NAMES, packing=True, sp_size=2)
    with pytest.raises(UsageError, match="share_prefix: rows that hold more than one sequence are not shared"):
        DPOConfig(**NAMES, share_prefix=True, sp_size=2)


def test_processes_that_groups_do_not_divide_are_refused():
    class Three:
        num_processes = 3

    with pytest.raises(UsageError, match="sp_size 2: expected a multiple of it as processes, got 3"):
        start_sequence_parallel(Three(), 2)
