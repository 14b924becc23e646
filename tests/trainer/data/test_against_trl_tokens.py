"""Tokens and labels are those of TRL 1.16's SFTTrainer (assistant_only_loss) and DPOTrainer where these are right;
where they are not, both values stand here, and why."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_trainer.data.chat import set_chat_template
from rlhf_trainer.data.encoding import Codec, encode_conversation, encode_pairs

from .families import CUTS, assistant, byte_level, family, shown, user

SHIPPED = Path(trl.__file__).parent / "chat_templates"  # models' templates as they are, and TRL's marked ones beside


CHAT = [user("q"), assistant("Hi"), user("r"), assistant("yo")]


def dataset_of(trainer, config, tokenizer, row, folder, **options):
    """The row as a TRL trainer tokenizes it."""
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    arguments = config(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        **options,
    )  # fmt: skip
    models = {"model": LlamaForCausalLM(small)}
    if trainer is trl.DPOTrainer:
        models["ref_model"] = LlamaForCausalLM(small)
    return trainer(
        args=arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer, **models
    ).train_dataset[0]  # fmt: skip


def their_turns(tokenizer, messages, folder):
    row = dataset_of(trl.SFTTrainer, trl.SFTConfig, tokenizer, {"messages": messages}, folder, assistant_only_loss=True)
    return shown(tokenizer, row["input_ids"], row["labels"])


def our_turns(tokenizer, messages, **options):
    ids, counted = encode_conversation(Codec(tokenizer), messages, **options)
    return shown(tokenizer, ids, [i if each else -100 for i, each in zip(ids, counted, strict=True)])


def their_pair(tokenizer, prompt, chosen, rejected, folder):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    row = dataset_of(trl.DPOTrainer, trl.DPOConfig, tokenizer, row, folder)
    return [shown(tokenizer, row[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids")]


def our_pair(tokenizer, prompt, chosen, rejected):
    before, responses = encode_pairs(Codec(tokenizer), prompt, [("chosen", chosen), ("rejected", rejected)])
    return [shown(tokenizer, part) for part in (before, *responses)]


# --- SFTTrainer(assistant_only_loss=True)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gemma", "zephyr", "mistral1", "zephyr bytes"])
def test_a_template_with_marks(name, tmp_path):
    """The same conversation by "chatml" on tokenizers of every kind."""
    tokenizer = family(name)[0]
    set_chat_template(tokenizer, "chatml")
    ours = our_turns(tokenizer, CHAT)
    tokenizer.chat_template = tokenizer.chat_template["training"]
    assert ours == their_turns(tokenizer, CHAT, tmp_path)


class Shipped(NamedTuple):
    """What TRL's marked template learns, and ours by the model's own, without marks; the values are of the second
    question and answer."""

    specials: tuple[str, ...]
    theirs: str
    ours: str


IM = ("<|im_start|>", "<|im_end|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
EQUAL = {
    "llama3": (
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|> user <|end_header_id|> ĊĊ r <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ {yo} {<|eot_id|>}",
    ),
    "cohere": (
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> r <|END_OF_TURN_TOKEN|> "
        "<|START_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> {yo} {<|END_OF_TURN_TOKEN|>}",
    ),
}  # fmt: skip
UNEQUAL = {
    # TRL learns the line break of the header, which the prompt has, and that behind the end, where generation stopped.
    "qwen2_5": Shipped(
        IM,
        theirs="<|im_start|> user Ċ r <|im_end|> Ċ <|im_start|> assistant {Ċ} {yo} {<|im_end|>} {Ċ}",
        ours="<|im_start|> user Ċ r <|im_end|> Ċ <|im_start|> assistant Ċ {yo} {<|im_end|>} Ċ",
    ),
    # TRL learns the line break behind the end, where generation stopped.
    "gemma": Shipped(
        GEMMA,
        theirs="<start_of_turn> user Ċ r <end_of_turn> Ċ <start_of_turn> model Ċ {yo} {<end_of_turn>} {Ċ}",
        ours="<start_of_turn> user Ċ r <end_of_turn> Ċ <start_of_turn> model Ċ {yo} {<end_of_turn>} Ċ",
    ),
    # TRL learns the header's token, which the prompt has: generation starts behind it, or behind thoughts.
    "deepseek_r1_distill": Shipped(
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        theirs="<｜User｜> r {<｜Assistant｜>} {yo} {<｜end▁of▁sentence｜>}",
        ours="<｜User｜> r <｜Assistant｜> {yo} {<｜end▁of▁sentence｜>}",
    ),
    # TRL learns all that stands behind the end of the turn, and that the whole ends there.
    "phi3": Shipped(
        ("<|user|>", "<|assistant|>", "<|end|>"),
        theirs="<|user|> Ċ r <|end|> Ċ <|assistant|> Ċ {yo} {<|end|>} {Ċ} {<|end|>}",
        ours="<|user|> Ċ r <|end|> Ċ <|assistant|> Ċ {yo} {<|end|>} Ċ <|end|>",
    ),
}


def with_shipped(name, specials):
    """A tokenizer with a template that TRL knows, so that TRL takes its own marked one; the last special ends turns."""
    bos = "<s>" if "bos_token" in (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8") else None
    tokenizer = byte_level(["<pad>", "<s>", *specials], bos=bos, eos=specials[-1], cuts=CUTS)
    tokenizer.chat_template = (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.mark.parametrize("name", EQUAL)
def test_a_models_own_template_gives_the_tokens_of_trls_marked_one(name, tmp_path):
    specials, tail = EQUAL[name]
    tokenizer = with_shipped(name, specials)
    ours = our_turns(tokenizer, CHAT)
    assert ours.endswith(tail) and ours.count("{") == 4
    assert ours == their_turns(tokenizer, CHAT, tmp_path)


@pytest.mark.parametrize("name", UNEQUAL)
def test_trls_marked_templates_learn_more_than_is_generated(name, tmp_path):
    specials, theirs, ours = UNEQUAL[name]
    tokenizer = with_shipped(name, specials)
    their_text, our_text = their_turns(tokenizer, CHAT, tmp_path), our_turns(tokenizer, CHAT)
    assert their_text.endswith(theirs) and our_text.endswith(ours)
    assert their_text.replace("{", "").replace("}", "") == our_text.replace("{", "").replace("}", ""), "same tokens"
    marked = (SHIPPED / f"{name}_training.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = marked
    by_marks = our_turns(tokenizer, CHAT)
    extra = {"qwen2_5": "assistant {Ċ} {yo}", "deepseek_r1_distill": "{<｜Assistant｜>} {yo}"}
    assert extra.get(name, ours[-20:]) in by_marks, "by its marks ours learns what they say, up to the end of the turn"
    assert by_marks.count(specials[-1] + "}") == 2


def test_thoughts_of_qwen3(tmp_path):
    """TRL's marked template writes thoughts into earlier turns; the model's own leaves them out, so ours refuses all
    turns but the last."""
    tokenizer = with_shipped("qwen3", ("<think>", "</think>", *IM))
    thoughts = "{<think>} {ĊĊ} {</think>} {ĊĊ}"
    header = "<|im_start|> assistant Ċ"
    theirs = their_turns(tokenizer, CHAT, tmp_path)
    assert theirs.count(thoughts) == 2 and theirs.endswith(f"{header} {thoughts} {{yo}} {{<|im_end|>}} {{Ċ}}")
    ours = our_turns(tokenizer, CHAT, last_turn_only=True)
    assert ours.count("<think>") == 1 and ours.endswith(f"{header} {thoughts} {{yo}} {{<|im_end|>}} Ċ")
    single = CHAT[:2]
    assert their_turns(tokenizer, single, tmp_path) == our_turns(tokenizer, single).removesuffix("Ċ") + "{Ċ}"


# --- DPOTrainer

PAIR = ([user("q")], [assistant("Hi")], [assistant("yo")])


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral3", "r1"])
def test_a_chat_pair(name, tmp_path):
    tokenizer = family(name)[0]
    assert our_pair(tokenizer, *PAIR) == their_pair(tokenizer, *PAIR, tmp_path)


@pytest.mark.parametrize(("name", "behind"), [("qwen2.5", "Ċ"), ("smollm2", "Ċ"), ("gemma", "<0x0A>")])
def test_trl_learns_what_stands_behind_the_end_of_the_turn(name, behind, tmp_path):
    """Generation stops at the end, so nothing behind it can be preferred."""
    tokenizer = family(name)[0]
    prompt, *responses = our_pair(tokenizer, *PAIR)
    assert their_pair(tokenizer, *PAIR, tmp_path) == [prompt, *(f"{response} {behind}" for response in responses)]


def test_trl_leaves_out_bos_where_the_template_does(tmp_path):
    """Zephyr's: the model was trained with BOS in front of every text, and the tokenizer puts it there."""
    tokenizer = family("zephyr")[0]
    prompt, *responses = our_pair(tokenizer, *PAIR)
    assert prompt.startswith("<s> ▁ < | user")
    theirs = their_pair(tokenizer, *PAIR, tmp_path)
    assert theirs == [prompt.removeprefix("<s> "), *(f"{response} <0x0A>" for response in responses)]


def test_trl_moves_the_boundary_although_a_token_begins_there(tmp_path):
    """The header's line breaks are one token at the end of a text and two before a word: TRL learns both of them, ours
    the answer, which begins with a token of its own."""
    tokenizer = byte_level(("<pad>", "<s>", "<|eot|>"), bos="<s>", eos="<|eot|>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role ~ '\n\n' ~ m.content ~ '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n\n' }}{% endif %}"
    )
    start = "<s> user Ċ Ċ q <|eot|> assistant"
    assert their_pair(tokenizer, *PAIR, tmp_path) == [start, "Ċ Ċ Hi <|eot|>", "Ċ Ċ yo <|eot|>"]
    assert our_pair(tokenizer, *PAIR) == [f"{start} Ċ Ċ", "Hi <|eot|>", "yo <|eot|>"]


@pytest.mark.parametrize("name", ["llama2", "llama2 old", "llama3", "zephyr bytes"])
@pytest.mark.parametrize("texts", [("1+1=", "2", "3"), ("Hi", " yo", " Hi"), ("Hi ", "yo", "Hi"), ("q\n", "Hi", "yo")])
def test_a_pair_of_plain_text(name, texts, tmp_path):
    tokenizer = family(name)[0]
    tokenizer.chat_template = None
    assert our_pair(tokenizer, *texts) == their_pair(tokenizer, *texts, tmp_path)


def test_a_merge_across_the_boundary(tmp_path):
    """No token begins where the response does: TRL's rule."""
    tokenizer = byte_level(("<pad>", "<s>", "</s>"), bos="<s>", eos="</s>", merges=[("=", "=")])
    pair = ("1=", "=2", "=3")
    assert our_pair(tokenizer, *pair) == their_pair(tokenizer, *pair, tmp_path) == ["<s> 1", "== 2 </s>", "== 3 </s>"]
