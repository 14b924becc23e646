"""`rlhf sft`: what it learns from, the mean it takes, and packing. (test_against_trl.py has it beside TRL's.)"""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.data.chat import set_chat_template
from rlhf_trainer.errors import UsageError
from rlhf_trainer.offline.config import SFTConfig
from rlhf_trainer.offline.sft import train_sft

ASSISTANT = "<|im_start|>assistant\n"


@pytest.fixture
def sft(tmp_path):
    """Trains with small settings; returns (output folder, the lines of metrics.jsonl)."""
    runs = iter(range(100))

    def run(**options):
        small = {"output_dir": str(tmp_path / f"sft{next(runs)}"), "learning_rate": 1e-3, "max_length": 96}
        small |= {"batch_size": 8, "micro_batch_size": 8, "lr_scheduler_type": "constant"}
        folder = train_sft(SFTConfig(**(small | options)))
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def conversations(rows):
    """count -> rows of two turns each, of unequal lengths."""

    def make(count, seed=0):
        return [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"].strip()},
                    {"role": "user", "content": "and then"},
                    {"role": "assistant", "content": row["rejected"].strip()},
                ]
            }
            for row in rows(count, seed)
        ]

    return make


def eager_metrics(folder, data, learned_spans):
    """The means of -log p, top-1 and entropy over the learned tokens, from full logits, conversation by conversation.

    learned_spans: texts of the first 0, 1, ..., 4 messages -> (first, last) places in the text that are learned.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_chat_template(tokenizer, "chatml")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    values = []
    for row in data:
        texts = [""] + [tokenizer.apply_chat_template(row["messages"][:k], tokenize=False) for k in range(1, 5)]
        ids = tokenizer(texts[4], add_special_tokens=False, return_offsets_mapping=True)
        learned = torch.zeros(len(ids.input_ids), dtype=torch.bool)
        for first, last in learned_spans(texts):
            learned |= torch.tensor([first <= a and b <= last and b > a for a, b in ids.offset_mapping])
        with torch.no_grad():
            log_p = F.log_softmax(model(torch.tensor([ids.input_ids])).logits[0, :-1].double(), -1)
        targets = torch.tensor(ids.input_ids[1:])
        rows = [
            -log_p.gather(-1, targets[:, None])[:, 0],
            (log_p.argmax(-1) == targets).double(),
            -(log_p.exp() * log_p).sum(-1),
        ]
        values.append(torch.stack(rows)[:, learned[1:]])
    means = torch.cat(values, dim=1).mean(1).tolist()
    return dict(zip(("loss", "mean_token_accuracy", "entropy"), means, strict=True))


def turn(texts, k):
    """The place of the assistant's words in message k, without its header and the line break behind it."""
    return len(texts[k - 1]) + len(ASSISTANT), len(texts[k]) - len("\n")


LEARNED = {
    "every turn of the assistant": ({}, lambda texts: [turn(texts, 2), turn(texts, 4)]),
    "its last turn": ({"last_turn_only": True}, lambda texts: [turn(texts, 4)]),
    "the whole conversation": ({"assistant_only_loss": False}, lambda texts: [(0, len(texts[4]))]),
}


@pytest.mark.parametrize(("options", "learned_spans"), LEARNED.values(), ids=LEARNED)
def test_the_loss_is_the_mean_over_learned_tokens(
    options, learned_spans, model_folder, conversations, write_jsonl, sft
):
    """The mean is of the whole batch, whatever the micro-batches; headers and users' turns are not learned."""
    data, folder = conversations(7), model_folder("llama")
    expected = eager_metrics(folder, data, learned_spans)
    common = {"model_name_or_path": folder, "dataset_name": write_jsonl(data), "chat_template_path": "chatml"}
    common |= options | {"max_steps": 1}
    for micro in (8, 2):
        record = sft(**common, micro_batch_size=micro)[1][0]
        assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-4), micro


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_packing_changes_nothing_but_the_time(family, model_folder, conversations, write_jsonl, sft):
    """Gemma 2's layers have sliding windows. All rows are one batch, so only the packing differs."""
    common = {"model_name_or_path": model_folder(family), "dataset_name": write_jsonl(conversations(8))}
    common |= {"chat_template_path": "chatml", "num_train_epochs": 4}
    (_, plain), (_, packed) = (sft(**common, packing=packing) for packing in (False, True))
    assert plain[3]["loss"] < plain[0]["loss"] - 0.1
    for a, b in zip(plain, packed, strict=True):
        for key in ("loss", "grad_norm", "mean_token_accuracy", "entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key


def test_packing_is_refused_where_attention_leaks(tokenizer, conversations, write_jsonl, sft, tmp_path):
    """Bloom knows no positions."""
    config = transformers.BloomConfig(vocab_size=397, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    common = {"model_name_or_path": str(tmp_path / "bloom"), "dataset_name": write_jsonl(conversations(4))}
    common |= {"chat_template_path": "chatml", "max_steps": 1}
    with pytest.raises(UsageError, match=r"packing: in BloomForCausalLM .* see each other. Leave packing off"):
        sft(**common, packing=True)
    sft(**common)


def test_chatml_brings_its_tokens(make_model, tokenizer, conversations, write_jsonl, sft, tmp_path):
    """A tokenizer without them gains them, and a model without room for them gains embeddings; old logits stay."""
    fresh = transformers.GPT2TokenizerFast(
        tokenizer_object=tokenizers_without(tokenizer, ("<|im_start|>", "<|im_end|>")), eos_token="<s>"
    )
    make_model("llama", vocab_size=len(fresh), pad_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "start")
    fresh.save_pretrained(tmp_path / "start")
    folder, _ = sft(
        model_name_or_path=str(tmp_path / "start"), dataset_name=write_jsonl(conversations(4)),
        chat_template_path="chatml", max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "start", folder))
    assert after.lm_head.weight.shape[0] == len(fresh) + 2
    trained = AutoTokenizer.from_pretrained(folder)
    assert trained.eos_token == "<|im_end|>" and trained.convert_tokens_to_ids("<|im_start|>") >= len(fresh)
    assert trained.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith(
        "<|im_start|>user"
    )
    ends = sorted([fresh.eos_token_id, trained.eos_token_id])  # those of before, and the template's
    assert after.generation_config.eos_token_id == after.config.eos_token_id == ends
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(after(ids).logits[..., : len(fresh)], before(ids).logits)


def tokenizers_without(tokenizer, names):
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    kept = [
        name for name, _ in sorted(content["model"]["vocab"].items(), key=lambda item: item[1]) if name not in names
    ]
    content["model"]["vocab"] = {name: i for i, name in enumerate(kept)}
    return Tokenizer.from_str(json.dumps(content))


def test_the_chosen_answers_give_the_reference(model_folder, rows, write_jsonl, sft):
    """Preference rows: the same as prompts with the chosen answer as completion."""
    data = rows(6)
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in data]
    common = {"model_name_or_path": model_folder("llama"), "num_train_epochs": 2}
    results = [
        sft(**common, dataset_name=write_jsonl(content, name))[1]
        for content, name in ((data, "pairs.jsonl"), (demonstrations, "demonstrations.jsonl"))
    ]
    assert [r["loss"] for r in results[0]] == [r["loss"] for r in results[1]]


def test_held_out_conversations(model_folder, conversations, write_jsonl, sft):
    data = write_jsonl(conversations(8))
    _, records = sft(
        model_name_or_path=model_folder("llama"), dataset_name=data, eval_dataset=data, eval_steps=2,
        num_train_epochs=3, chat_template_path="chatml",
    )  # fmt: skip
    by_step = {record["step"]: record for record in records}
    assert [step for step, record in by_step.items() if "eval/loss" in record] == [0, 2, 3]
    assert by_step[2]["eval/loss"] == pytest.approx(by_step[3]["loss"], abs=1e-4)


def test_a_template_without_marks_trains_as_one_with_them(model_folder, conversations, write_jsonl, sft):
    common = {"model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(conversations(4))}
    _, own = sft(**common)
    _, marked = sft(**common, chat_template_path="chatml")
    assert [record["loss"] for record in own] == [record["loss"] for record in marked]


def test_a_whole_conversation_needs_no_marks(model_folder, conversations, write_jsonl, sft):
    """The tokenizer's own template says nothing of who wrote what."""
    common = {"model_name_or_path": model_folder("llama"), "dataset_name": write_jsonl(conversations(4))}
    _, records = sft(**common, assistant_only_loss=False, num_train_epochs=4)
    assert records[3]["loss"] < records[0]["loss"] - 0.1
