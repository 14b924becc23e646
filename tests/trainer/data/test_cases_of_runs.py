"""Situations that other packages met, as small inputs with their right values: dates, files, rewards and whole runs."""

import json
from datetime import datetime, timedelta

import pyarrow
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from rlhf_trainer.cli import main
from rlhf_trainer.data.encoding import Codec, encode_conversation, encode_prompt
from rlhf_trainer.data.examples import load_prompts
from rlhf_trainer.data.rows import read_rows
from rlhf_trainer.rewards.config import RewardsConfig
from rlhf_trainer.rewards.loading import load_rewards
from rlhf_trainer.training import checkpoint, loop, output_folder

from .families import assistant, byte_level, family, user

PLAIN = ("<pad>", "<s>", "</s>")
CHATML_FILE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QUICK = ["--batch_size", "8", "--warmup_steps", "0", "--inspect_rows", "0"]


def save_llama(folder, tokenizer, **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(SMALL | changes)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rlhf(*words):
    return main([str(word) for word in words])


# --- 06: turns that end with another token than the tokenizer's end of sequence


@pytest.mark.parametrize("own_ends", [2, [2, 0]], ids=["one", "several"])
@pytest.mark.parametrize("way", ["a file with marks", "its own template without marks"])
def test_a_model_stops_at_the_end_of_the_turn_that_it_was_trained_on(way, own_ends, tmp_path, write_jsonl):
    """The token that ends turns joins those at which generation stopped before."""
    tokenizer = byte_level((*PLAIN, "<|im_start|>", "<|im_end|>"), bos="<s>", eos="</s>", front=False)
    (tmp_path / "marked.jinja").write_text(CHATML_FILE)
    template = ["--chat_template_path", tmp_path / "marked.jinja"]
    if way != "a file with marks":
        tokenizer.chat_template = CHATML_FILE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        template = []
    model = save_llama(tmp_path / "base", tokenizer, hidden_size=64, intermediate_size=128, eos_token_id=own_ends)
    chats = write_jsonl([{"messages": [user("hi"), assistant("yo")]}] * 8)
    code = rlhf(
        "sft", "--model_name_or_path", model, "--dataset_name", chats, "--output_dir", tmp_path / "sft", *template,
        *QUICK, "--learning_rate", "1e-2", "--num_train_epochs", 40, "--lr_scheduler_type", "constant",
    )  # fmt: skip
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = json.loads((tmp_path / "sft" / "generation_config.json").read_text())["eos_token_id"]
    assert code == 0 and ends == sorted({2, end, *([own_ends] if isinstance(own_ends, int) else own_ends)})

    prompts = write_jsonl([{"prompt": [user("hi")]}], "prompts.jsonl")
    code = rlhf(
        "sample", "--models", tmp_path / "sft", "--dataset_name", prompts, "--output_dir", tmp_path / "s",
        "--temperature", 0, "--max_new_tokens", 12, "--num_completions", 1,
    )  # fmt: skip
    row = json.loads((tmp_path / "s" / "completions.jsonl").read_text())
    assert code == 0 and row["finished"] and row["completion"] == [assistant("yo")]

    trained, again = LlamaForCausalLM.from_pretrained(tmp_path / "sft"), AutoTokenizer.from_pretrained(tmp_path / "sft")
    prompt = again.apply_chat_template([user("hi")], add_generation_prompt=True, return_tensors="pt").input_ids
    drawn = trained.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, prompt.shape[1] :]
    assert again.decode(drawn) == "yo<|im_end|>", "and with transformers alone"


# --- 14: the folder of an adapter


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter beside its base."""
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>")
    base = save_llama(tmp_path / "base", tokenizer)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def train(tmp_path, write_jsonl):
    pairs = write_jsonl([{"prompt": "hi ", "chosen": "yes", "rejected": "no"}] * 8)

    def run(command, model):
        cache = ["--ref_cache_dir", tmp_path / "cache"] if command == "dpo" else []
        data = ["--dataset_name", pairs, "--output_dir", tmp_path / "out"]
        return rlhf(command, "--model_name_or_path", model, *QUICK, *cache, *data)

    return run


@pytest.mark.parametrize("command", ["sft", "dpo", "reward"])
def test_an_adapters_folder_is_a_model_to_train(command, adapter, train, tmp_path, capsys):
    assert train(command, adapter) == 0
    assert f"it is merged into the weights of {tmp_path / 'base'}" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.parametrize("command", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"base_model_name_or_path": None}])
def test_another_adapters_folder_is_refused_in_a_line_and_before_anything_is_written(
    command, change, adapter, train, tmp_path, capsys
):
    facts = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(facts | change))
    before = sorted(tmp_path.iterdir())
    code = train(command, adapter)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and message.startswith(f"rlhf {command}: ") and "Traceback" not in message
    assert "adapter" in message and "LoRA" in message
    assert sorted(tmp_path.iterdir()) == before


# --- 15: the balancing loss of a mixture of experts


def test_the_balancing_loss_is_trained_where_the_config_asks_for_it(tmp_path, write_jsonl):
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>")
    rows = [{"prompt": "hi ", "completion": "yes please"}, {"prompt": "ho ", "completion": "aye"}]
    data, weights, logged = write_jsonl(rows * 4), {}, {}
    for asked in (False, True):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(tokenizer), num_local_experts=4, num_experts_per_tok=2, output_router_logits=asked,
            router_aux_loss_coef=10.0, **SMALL,
        )  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(tmp_path / f"base-{asked}")
        tokenizer.save_pretrained(tmp_path / f"base-{asked}")
        out = tmp_path / f"out-{asked}"
        assert rlhf(
            "sft", "--model_name_or_path", tmp_path / f"base-{asked}", "--dataset_name", data, "--output_dir", out,
            *QUICK, "--learning_rate", "1e-3", "--max_steps", 3, "--num_train_epochs", 3,
        ) == 0  # fmt: skip
        weights[asked] = load_file(out / "model.safetensors")
        logged[asked] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged[True] if "loss" in line]
    # Balanced, the term is the number of experts drawn a token, 2 of 4; it is least there.
    assert steps and all(2 - 1e-3 <= line["aux_loss"] < 4 for line in steps)
    assert not any("aux_loss" in line for line in logged[False])
    router = next(name for name in weights[True] if "gate" in name)
    assert (weights[True][router] - weights[False][router]).abs().max() > 1e-5


# --- 16: templates that write the date

DATED = (
    "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'A:' }}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ 'U:' + m['content'] }}"
    "{% endif %}{% endfor %}"
)


class Clock(datetime):
    """A clock that stands at `moment`."""

    moment = datetime(2024, 7, 26, 23, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.moment


def test_a_run_goes_on_on_another_day(tmp_path, write_jsonl, monkeypatch, capsys):
    """Its rows have the date on which it began, although the day of the resumed process is another."""
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>")
    tokenizer.chat_template = DATED
    model = save_llama(tmp_path / "base", tokenizer)
    chats = write_jsonl([{"messages": [user("hi"), assistant("yo")]}] * 8)
    run = [
        "sft", "--model_name_or_path", model, "--dataset_name", chats, "--output_dir", tmp_path / "out",
        "--warmup_steps", 0, "--batch_size", 2, "--save_steps", 2, "--inspect_rows", 1,
    ]  # fmt: skip
    monkeypatch.setattr(output_folder, "datetime", Clock)

    def save_and_stop(*arguments):
        checkpoint.save_checkpoint(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as first_day:
        first_day.setattr(loop, "save_checkpoint", save_and_stop)
        assert rlhf(*run) == 130
    assert "26 Jul 2024" in shown_text(capsys)
    assert config_of(tmp_path / "out.partial")["chat_template_date"] == "2024-07-26T23:59:00"

    monkeypatch.setattr(Clock, "moment", Clock.moment + timedelta(days=1))
    assert rlhf(*run, "--resume_from_checkpoint", "true") == 0, "same data, same tokenizer"
    assert "26 Jul 2024" in shown_text(capsys)
    assert config_of(tmp_path / "out")["chat_template_date"] == "2024-07-26T23:59:00"
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_the_date_can_be_set(tmp_path, write_jsonl, capsys):
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>")
    tokenizer.chat_template = DATED
    model = save_llama(tmp_path / "base", tokenizer)
    chats = write_jsonl([{"messages": [user("hi"), assistant("yo")]}])
    flags = ["--model_name_or_path", model, "--dataset_name", chats, "--chat_template_date", "2001-02-03"]
    assert rlhf("inspect", "sft", *flags) == 0
    assert "03 Feb 2001" in shown_text(capsys)


def config_of(folder):
    return yaml.safe_load((folder / output_folder.CONFIG_FILE).read_text())


def shown_text(capsys):
    return "".join(capsys.readouterr().out.split("|"))


def test_a_template_writes_the_date_of_the_run():
    tokenizer = family("llama3")[0]
    tokenizer.chat_template = (
        '{% if strftime_now is defined %}{% set date = strftime_now("%d %b %Y") %}{% endif %}'
        "{{ bos_token + date }}" + tokenizer.chat_template.removeprefix("{{ bos_token }}")
    )
    codec = Codec(tokenizer, now=datetime(2024, 7, 26))
    chat = [user("q"), assistant("Hi")]
    for ids in (encode_prompt(codec, chat[:1]), encode_conversation(codec, chat)[0]):
        assert tokenizer.decode(ids).startswith("<|begin_of_text|>26 Jul 2024<|start_header_id|>user")


# --- 20: Parquet with more nested text in a row group than Arrow holds at once


def test_parquet_is_read_by_few_rows_at_a_time(monkeypatch, tmp_path):
    sizes = []
    read = parquet.ParquetFile.iter_batches

    def iter_batches(self, batch_size=65536, *args, **options):
        sizes.append(batch_size)
        return read(self, batch_size, *args, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", iter_batches)
    chat = [user("hi"), assistant("yo")]
    parquet.write_table(pyarrow.table({"messages": [chat] * 600}), tmp_path / "rows.parquet")
    rows = list(read_rows(str(tmp_path / "rows.parquet"), "train"))
    assert rows == [(number, {"messages": chat}) for number in range(1, 601)]
    assert sizes and max(sizes) <= 256


# --- 12: thoughts that the prompt opens


def test_rewards_see_the_thoughts_that_the_prompt_opened(write_jsonl):
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:<think>\n' }}{% endif %}"
    )
    codec = Codec(tokenizer)
    source = write_jsonl([{"prompt": [user("2+2?")], "ground_truth": "4"}])
    prompts = load_prompts(source, codec, max_prompt_length=99, split="train").examples
    assert prompts[0].opening == "<think>\n"
    rewards = load_rewards(
        RewardsConfig(output_dir="none", reward_funcs=["format:think_answer", "exact_answer"]), torch.device("cpu")
    )
    assert rewards(prompts, ["two and two</think><answer>4</answer>"]).parts.tolist() == [[1.0, 1.0]]
    assert rewards(prompts, ["perhaps the answer is 4, but let me"]).parts.tolist() == [[0.0, 0.0]]
