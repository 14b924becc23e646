"""Loss and gradient norm over five steps are those of TRL's trainers: same model, rows and optimizer, in fp32."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig as TrlDPOConfig
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl import RewardConfig as TrlRewardConfig
from trl import SFTConfig as TrlSFTConfig

from rlhf_trainer.data.chat import MARKED, set_chat_template
from rlhf_trainer.offline.config import RewardConfig, SFTConfig
from rlhf_trainer.offline.reward_model import PAD, train_reward
from rlhf_trainer.offline.sft import train_sft

STEPS, ROWS, LEARNING_RATE = 5, 8, 1e-3


def theirs(config, trainer, folder, data, **options):
    """(loss, gradient norm) of each step of one batch of all rows."""
    arguments = config(
        output_dir=str(folder), per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, optim="adamw_torch", weight_decay=0.0,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    made = trainer(args=arguments, train_dataset=Dataset.from_list(data))
    made.train()
    return [(entry["loss"], float(entry["grad_norm"])) for entry in made.state.log_history if "loss" in entry]


def common(tmp_path, source, model):
    return {
        "model_name_or_path": model, "dataset_name": source, "output_dir": str(tmp_path / "ours"), "batch_size": ROWS,
        "micro_batch_size": 3, "num_train_epochs": STEPS, "learning_rate": LEARNING_RATE, "max_length": 96,
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
    }  # fmt: skip


def assert_same(records, expected):
    assert len(records) == len(expected) == STEPS
    assert expected[-1][0] < expected[0][0] - 0.05, "nothing was learned, so equality would show little"
    for record, (loss, norm) in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(loss, abs=2e-4)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.fixture
def records_of(request):
    import json

    return lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sft_on_prompts_and_completions(model_folder, rows, write_jsonl, records_of, tmp_path):
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(ROWS)]
    model = model_folder("llama")
    records = records_of(train_sft(SFTConfig(**common(tmp_path, write_jsonl(data), model))))

    def trainer(**options):
        return SFTTrainer(model=AutoModelForCausalLM.from_pretrained(model), processing_class=tokenizer, **options)

    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = theirs(TrlSFTConfig, trainer, tmp_path / "theirs", data, completion_only_loss=True, max_length=96)
    assert_same(records, expected)


def test_sft_on_the_assistants_turns(model_folder, rows, write_jsonl, records_of, tmp_path):
    """Several turns, masked by {% generation %}."""
    data = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["chosen"].strip()},
                {"role": "user", "content": "and"},
                {"role": "assistant", "content": row["rejected"].strip()},
            ]
        }
        for row in rows(ROWS)
    ]
    model = model_folder("llama")
    options = common(tmp_path, write_jsonl(data), model)
    records = records_of(train_sft(SFTConfig(**options, chat_template_path="chatml")))

    def trainer(**options):
        return SFTTrainer(model=AutoModelForCausalLM.from_pretrained(model), processing_class=tokenizer, **options)

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert set_chat_template(tokenizer, "chatml") == 0, "the tokens are there"
    tokenizer.chat_template = tokenizer.chat_template[MARKED]  # TRL wants the marks in the only one
    expected = theirs(TrlSFTConfig, trainer, tmp_path / "theirs", data, assistant_only_loss=True, max_length=96)
    assert_same(records, expected)


def test_reward(model_folder, rows, write_jsonl, records_of, tmp_path):
    """Both start from the same head, with a padding token of its own."""
    data = rows(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    tokenizer.add_special_tokens({"pad_token": PAD})
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder("llama"), num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    options = common(tmp_path, write_jsonl(data), str(tmp_path / "start"))
    records = records_of(train_reward(RewardConfig(**options, max_prompt_length=48)))

    def trainer(**options):
        return RewardTrainer(model=model, processing_class=tokenizer, **options)

    expected = theirs(TrlRewardConfig, trainer, tmp_path / "theirs", data, max_length=96, disable_dropout=True)
    assert_same(records, expected)


def test_dpo(model_folder, rows, write_jsonl, train, tmp_path):
    data, model = rows(ROWS), model_folder("llama")
    options = common(tmp_path, write_jsonl(data), model) | {"output_dir": str(tmp_path / "ours")}
    records = train(**options, warmup_steps=0, max_grad_norm=1.0, beta=0.2)[1]
    tokenizer = AutoTokenizer.from_pretrained(model)

    def trainer(**options):
        return DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model), ref_model=AutoModelForCausalLM.from_pretrained(model),
            processing_class=tokenizer, **options,
        )  # fmt: skip

    expected = theirs(TrlDPOConfig, trainer, tmp_path / "theirs", data, beta=0.2, max_length=96)
    assert_same(records, expected)


LORA = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.0}


def with_adapter(folder, seed=42):
    """The model with the adapter that a run of that seed begins with: A is drawn, B is 0."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    names = {name.removeprefix("lora_"): value for name, value in LORA.items() if "dropout" not in name}
    return get_peft_model(
        model, LoraConfig(r=names.pop("r"), lora_alpha=names.pop("alpha"), task_type="CAUSAL_LM", **names)
    )


def test_sft_by_lora(model_folder, rows, write_jsonl, records_of, tmp_path):
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(ROWS)]
    model = model_folder("llama")
    options = common(tmp_path, write_jsonl(data), model) | {"learning_rate": 1e-2}
    records = records_of(train_sft(SFTConfig(**options, use_peft=True, dtype="float32", **LORA)))

    def trainer(args, **options):
        args.learning_rate = 1e-2
        return SFTTrainer(model=with_adapter(model), processing_class=tokenizer, args=args, **options)

    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = theirs(TrlSFTConfig, trainer, tmp_path / "theirs", data, completion_only_loss=True, max_length=96)
    assert_same(records, expected)


@pytest.mark.parametrize("start", ["a new adapter", "an adapter that was trained"])
def test_dpo_by_lora(start, model_folder, rows, write_jsonl, train, tmp_path):
    """The reference is the model as it begins: with the adapter that it came with, if it came with one."""
    data, model = rows(ROWS), model_folder("llama")
    adapted = with_adapter(model)
    if start != "a new adapter":
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        adapted.save_pretrained(tmp_path / "start")
    options = common(tmp_path, write_jsonl(data), model if start == "a new adapter" else str(tmp_path / "start"))
    options |= {"learning_rate": 1e-2, "warmup_steps": 0, "max_grad_norm": 1.0, "beta": 0.2, "dtype": "float32"}
    records = train(**options, use_peft=True, **LORA)[1]
    tokenizer = AutoTokenizer.from_pretrained(model)

    def trainer(args, **options):
        args.learning_rate = 1e-2
        return DPOTrainer(model=adapted, processing_class=tokenizer, args=args, **options)

    expected = theirs(TrlDPOConfig, trainer, tmp_path / "theirs", data, beta=0.2, max_length=96)
    assert_same(records, expected)
