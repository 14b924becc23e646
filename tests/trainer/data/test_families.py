"""`rlhf inspect` on the templates and tokenizers of known model families, token by token against values written out."""

import json
from typing import NamedTuple

import pytest

from rlhf_trainer.cli import main

from .families import assistant, family, save, shown, user


class Expected(NamedTuple):
    """Tokens as `shown` writes them; learned ones in braces.

    prompt: of the user's q, up to where the answer begins; chosen, rejected: the answers Hi and yo; between: from the
    end of an answer to where that to r begins; behind: what the template writes behind the last answer. sample: the
    prompt as generation has it, reward: as reward models do, which get no BOS that the template does not write;
    earlier: the answer Hi once another turn follows.
    """

    prompt: str
    chosen: str
    rejected: str
    between: str
    behind: str = ""
    sample: str | None = None
    reward: str | None = None
    earlier: str | None = None


def plain(learned):
    return learned.replace("{", "").replace("}", "")


def joined(*parts):
    return " ".join(part for part in parts if part)


def chatml_tokens(front, end, line=" Ċ"):
    """ChatML's: a line break behind every header and every turn, of which the model writes neither."""
    header = f"{end}{line} <|im_start|> assistant{line}"
    return Expected(
        prompt=joined(front, f"<|im_start|> user{line} q {header}"),
        chosen=f"{{Hi}} {{{end}}}",
        rejected=f"{{yo}} {{{end}}}",
        between=joined(line.strip(), f"<|im_start|> user{line} r {header}"),
        behind=line.strip(),
    )


QWEN_SYSTEM = (
    "<|im_start|> system Ċ You Ġare ĠQwen , Ġcreated Ġby ĠAlibaba ĠCloud . ĠYou Ġare Ġ a Ġhelpful Ġassistant . "
    "<|im_end|> Ċ"
)
SMOLLM_SYSTEM = (
    "<|im_start|> system Ċ You Ġare Ġ a Ġhelpful ĠAI Ġassistant Ġnamed ĠSmolLM , Ġtrained Ġby ĠHugging ĠFace "
    "<|im_end|> Ċ"
)
EXPECTED = {
    "qwen2.5": chatml_tokens(QWEN_SYSTEM, "<|im_end|>"),
    "smollm2": chatml_tokens(SMOLLM_SYSTEM, "<|im_end|>"),
    # The template writes BOS before every question, and spaces around every answer.
    "llama2": Expected(
        prompt="<s> [ INST ] ▁ q ▁ [ / INST ]",
        chosen="{▁Hi} {▁} {</s>}",
        rejected="{▁yo} {▁} {</s>}",
        between="<s> [ INST ] ▁ r ▁ [ / INST ]",
    ),
    # What follows a special token gets a space of the tokenizer's.
    "llama2 old": Expected(
        prompt="<s> ▁ [ INST ] ▁ q ▁ [ / INST ]",
        chosen="{▁Hi} {▁} {</s>}",
        rejected="{▁yo} {▁} {</s>}",
        between="<s> ▁ [ INST ] ▁ r ▁ [ / INST ]",
    ),
    "llama3": Expected(
        prompt="<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ q <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
        chosen="{Hi} {<|eot_id|>}",
        rejected="{yo} {<|eot_id|>}",
        between="<|start_header_id|> user <|end_header_id|> ĊĊ r <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
    ),
    # The answer follows its header without a space; behind its end stand the template's and the tokenizer's.
    "mistral1": Expected(
        prompt="<s> ▁ [ INST ] ▁ q ▁ [ / INST ]",
        chosen="{Hi} {</s>}",
        rejected="{yo} {</s>}",
        between="▁▁ [ INST ] ▁ r ▁ [ / INST ]",
        behind="▁▁",
    ),
    # [INST] and [/INST] are tokens; two spaces follow each, the template's and the tokenizer's.
    "mistral3": Expected(
        prompt="<s> [INST] ▁▁ q [/INST]",
        chosen="{▁▁} {Hi} {</s>}",
        rejected="{▁▁} {yo} {</s>}",
        between="[INST] ▁▁ r [/INST]",
    ),
    "gemma": Expected(
        prompt="<bos> <start_of_turn> user <0x0A> q <end_of_turn> <0x0A> <start_of_turn> model <0x0A>",
        chosen="{Hi} {<end_of_turn>}",
        rejected="{yo} {<end_of_turn>}",
        between="<0x0A> <start_of_turn> user <0x0A> r <end_of_turn> <0x0A> <start_of_turn> model <0x0A>",
        behind="<0x0A>",
    ),
    # The last turn begins with thoughts, empty ones here, which generation has to write; earlier turns have none.
    "qwen3": chatml_tokens("", "<|im_end|>")._replace(
        chosen="{<think>} {ĊĊ} {</think>} {ĊĊ} {Hi} {<|im_end|>}",
        rejected="{<think>} {ĊĊ} {</think>} {ĊĊ} {yo} {<|im_end|>}",
        earlier="Hi <|im_end|>",
    ),
    # Tokens of roles and ends take the line breaks behind them. The end of sequence stands behind the whole alone.
    "phi3": Expected(
        prompt="<s> <|user|> ▁ q <|end|> <|assistant|>",
        chosen="{▁Hi} {<|end|>}",
        rejected="{▁yo} {<|end|>}",
        between="<|user|> ▁ r <|end|> <|assistant|>",
        behind="<|endoftext|>",
        reward="<|user|> ▁ q <|end|> <|assistant|>",
    ),
    # Generation starts behind an opened <think>; a finished turn has no thoughts.
    "r1": Expected(
        prompt="<bos> <|User|> q <|Assistant|>",
        chosen="{Hi} {<eos>}",
        rejected="{yo} {<eos>}",
        between="<|User|> r <|Assistant|>",
        sample="<bos> <|User|> q <|Assistant|> <think> Ċ",
    ),
    # The template writes no BOS; the tokenizer puts one in front.
    "zephyr": Expected(
        prompt="<s> ▁ < | user | > <0x0A> q </s> <0x0A> < | assistant | > <0x0A>",
        chosen="{Hi} {</s>}",
        rejected="{yo} {</s>}",
        between="<0x0A> < | user | > <0x0A> r </s> <0x0A> < | assistant | > <0x0A>",
        behind="<0x0A>",
        reward="▁ < | user | > <0x0A> q </s> <0x0A> < | assistant | > <0x0A>",
    ),
    "zephyr old": Expected(
        prompt="<s> ▁ < | user | > <0x0A> q </s> ▁ <0x0A> < | assistant | > <0x0A>",
        chosen="{Hi} {</s>}",
        rejected="{yo} {</s>}",
        between="▁ <0x0A> < | user | > <0x0A> r </s> ▁ <0x0A> < | assistant | > <0x0A>",
        behind="▁ <0x0A>",
        reward="▁ < | user | > <0x0A> q </s> ▁ <0x0A> < | assistant | > <0x0A>",
    ),
    # The end of the header and its line break are one token.
    "zephyr bytes": Expected(
        prompt="<s> < | user |>Ċ q </s> Ċ < | assistant |>Ċ",
        chosen="{Hi} {</s>}",
        rejected="{yo} {</s>}",
        between="Ċ < | user |>Ċ r </s> Ċ < | assistant |>Ċ",
        behind="Ċ",
        reward="< | user |>Ċ q </s> Ċ < | assistant |>Ċ",
    ),
    # White space is no token. [CLS] comes in front; no [SEP] behind, where another token ends the turn.
    "chatml words": chatml_tokens("[CLS]", "<|im_end|>", line="")._replace(
        reward="<|im_start|> user q <|im_end|> <|im_start|> assistant"
    ),
    "zephyr words": Expected(
        prompt="[CLS] < | user | > q [SEP] < | assistant | >",
        chosen="{Hi} {[SEP]}",
        rejected="{yo} {[SEP]}",
        between="< | user | > r [SEP] < | assistant | >",
        reward="< | user | > q [SEP] < | assistant | >",
    ),
}
BYTE_LEVEL = ("qwen2.5", "smollm2", "llama3", "qwen3", "r1", "zephyr bytes")
CASES = [(name, True) for name in EXPECTED] + [(name, False) for name in BYTE_LEVEL]
every_family = pytest.mark.parametrize(("name", "trim"), CASES)


@pytest.fixture
def inspect(tmp_path, write_jsonl, capsys):
    """`inspect(family, command, rows, flags)` -> (the family's tokenizer, a mapping per row); the message where the
    rows are refused."""

    def run(name, command, rows, *flags, trim=True):
        folder = tmp_path / "model"
        tokenizer = save(name, folder, trim)
        model = "--models" if command == "sample" else "--model_name_or_path"
        code = main(["inspect", command, model, str(folder), "--dataset_name", write_jsonl(rows), "--json", *flags])
        printed, message = capsys.readouterr()
        return tokenizer, [json.loads(line) for line in printed.splitlines()] if code == 0 else message

    return run


CHAT = {"messages": [user("q"), assistant("Hi"), user("r"), assistant("yo")]}
PAIR = {"prompt": [user("q")], "chosen": [assistant("Hi")], "rejected": [assistant("yo")]}


@pytest.mark.parametrize(("name", "trim"), [case for case in CASES if case[0] != "qwen3"])
def test_every_turn_is_learned(name, trim, inspect):
    """Qwen 3's is refused, below."""
    wanted = EXPECTED[name]
    tokenizer, (row,) = inspect(name, "sft", [CHAT], trim=trim)
    assert shown(tokenizer, row["input_ids"], row["labels"]) == joined(
        wanted.prompt, wanted.chosen, wanted.between, wanted.rejected, wanted.behind
    )


@every_family
def test_the_last_turn_is_learned(name, trim, inspect):
    wanted = EXPECTED[name]
    tokenizer, (row,) = inspect(name, "sft", [CHAT], "--last_turn_only", "true", trim=trim)
    assert shown(tokenizer, row["input_ids"], row["labels"]) == joined(
        wanted.prompt, wanted.earlier or plain(wanted.chosen), wanted.between, wanted.rejected, wanted.behind
    )


@every_family
def test_a_pair(name, trim, inspect):
    """Nothing behind the token that ends the turn is learned."""
    wanted = EXPECTED[name]
    tokenizer, (row,) = inspect(name, "dpo", [PAIR], trim=trim)
    assert shown(tokenizer, row["prompt_ids"]) == wanted.prompt
    responses = [shown(tokenizer, each["input_ids"], each["labels"]) for each in row["responses"]]
    assert responses == [wanted.chosen, wanted.rejected]


@every_family
def test_a_pair_as_reward_models_read_it(name, trim, inspect):
    """All of what transformers' apply_chat_template makes; the reward is read at the last token."""
    wanted = EXPECTED[name]
    tokenizer, (row,) = inspect(name, "reward", [PAIR], trim=trim)
    assert shown(tokenizer, row["prompt_ids"]) == (wanted.reward or wanted.prompt)
    for response, answer, text in zip(row["responses"], (wanted.chosen, wanted.rejected), ("Hi", "yo"), strict=True):
        assert shown(tokenizer, response["input_ids"]) == joined(plain(answer), wanted.behind)
        whole = tokenizer.apply_chat_template([user("q"), assistant(text)], tokenize=True)["input_ids"]
        assert row["prompt_ids"] + response["input_ids"] == whole
        assert response["labels"] == [-100] * (len(response["labels"]) - 1) + whole[-1:]


@every_family
def test_a_prompt(name, trim, inspect):
    wanted = EXPECTED[name]
    tokenizer, (row,) = inspect(name, "sample", [{"prompt": [user("q")]}], trim=trim)
    assert shown(tokenizer, row["prompt_ids"]) == (wanted.sample or wanted.prompt)
    rendered = tokenizer.apply_chat_template([user("q")], add_generation_prompt=True)["input_ids"]
    front = [] if wanted.reward is None else [tokenizer.bos_token_id]
    assert row["prompt_ids"] == front + rendered


# --- thoughts, and other keys of the families


def test_earlier_thoughts_that_are_stripped_are_refused(inspect):
    """Qwen 3: what the first answer would be learned as is not what the whole has."""
    _, message = inspect("qwen3", "sft", [CHAT])
    assert "row 1, field 'messages'" in message and "--last_turn_only" in message
    assert r"by itself the beginning is ...'>user\nq<|im_end|>\n<|im_start|>assistant\n<think>" in message
    assert r"in the whole it is ...'>user\nq<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>" in message


LAST_WITH_THOUGHTS = [user("q"), assistant("yo", reasoning_content="Hi")]


@pytest.mark.parametrize("trim", [True, False])
def test_thoughts_of_the_last_turn_are_learned(trim, inspect):
    """Those of earlier turns are not in the text, hence neither in the way nor learned."""
    earlier = [user("q"), assistant("Hi", reasoning_content="gone"), user("r"), assistant("yo", reasoning_content="Hi")]
    rows = [{"messages": LAST_WITH_THOUGHTS}, {"messages": earlier}]
    tokenizer, (short, long) = inspect("qwen3", "sft", rows, "--last_turn_only", "true", trim=trim)
    learned = "{<think>} {Ċ} {Hi} {Ċ} {</think>} {ĊĊ} {yo} {<|im_end|>}"
    prompt, between = EXPECTED["qwen3"].prompt, EXPECTED["qwen3"].between
    assert shown(tokenizer, short["input_ids"], short["labels"]) == f"{prompt} {learned} Ċ"
    assert shown(tokenizer, long["input_ids"], long["labels"]) == f"{prompt} Hi <|im_end|> {between} {learned} Ċ"


def test_thoughts_within_the_content_are_learned_too(inspect):
    content = [user("q"), assistant("<think>\nHi\n</think>\n\nyo")]
    _, rows = inspect("qwen3", "sft", [{"messages": LAST_WITH_THOUGHTS}, {"messages": content}])
    assert rows[0]["labels"] == rows[1]["labels"]


def test_thinking_turned_off_for_a_row(inspect):
    """The generation prompt then writes the empty thoughts, so they are not learned."""
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    prompt = EXPECTED["qwen3"].prompt + " <think> ĊĊ </think> ĊĊ"
    tokenizer, (on, row) = inspect(
        "qwen3", "sft", [{"messages": CHAT["messages"][:2]}, {"messages": CHAT["messages"][:2]} | off]
    )
    assert on["input_ids"] == row["input_ids"], "the finished turn has them in any case"
    assert shown(tokenizer, row["input_ids"], row["labels"]) == prompt + " {Hi} {<|im_end|>} Ċ"
    tokenizer, (row,) = inspect("qwen3", "dpo", [PAIR | off])
    assert shown(tokenizer, row["prompt_ids"]) == prompt
    assert [shown(tokenizer, each["input_ids"], each["labels"]) for each in row["responses"]] == [
        "{Hi} {<|im_end|>}", "{yo} {<|im_end|>}",
    ]  # fmt: skip
    tokenizer, (row,) = inspect("qwen3", "sample", [{"prompt": [user("q")]} | off])
    assert shown(tokenizer, row["prompt_ids"]) == prompt


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_thoughts_that_the_template_drops_are_refused(command, inspect):
    """DeepSeek R1: the finished turn has only what follows </think>, so thoughts would be paid for and not learned."""
    thoughtful = [assistant("<think>Hi</think>yo")]
    rows = [{"messages": [user("q"), *thoughtful]}] if command == "sft" else [PAIR | {"chosen": thoughtful}]
    _, message = inspect("r1", command, rows)
    assert "the chat template does not write it as it is" in message and "<think>Hi</think>yo" in message
    assert "--chat_template_path" in message


def test_an_answer_that_begins_as_thoughts_do(inspect):
    """DeepSeek R1: "<answer>" shares its first letter with the "<think>" that the generation prompt opens."""
    tokenizer, (row,) = inspect("r1", "sft", [{"messages": [user("q"), assistant("<a>Hi")]}])
    assert shown(tokenizer, row["input_ids"], row["labels"]) == (
        "<bos> <|User|> q <|Assistant|> {<} {a} {>} {Hi} {<eos>}"
    )


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2"])
def test_a_system_message_takes_the_place_of_the_default(name, inspect):
    rows = [{"messages": [{"role": "system", "content": "yo"}, user("q"), assistant("Hi")]}]
    tokenizer, (row,) = inspect(name, "sft", rows)
    assert shown(tokenizer, row["input_ids"], row["labels"]) == (
        "<|im_start|> system Ċ yo <|im_end|> Ċ <|im_start|> user Ċ q <|im_end|> Ċ <|im_start|> assistant Ċ "
        "{Hi} {<|im_end|>} Ċ"
    )


def test_a_system_message_within_the_first_question(inspect):
    rows = [{"messages": [{"role": "system", "content": "yo"}, user("q"), assistant("Hi")]}]
    tokenizer, (row,) = inspect("llama2", "sft", rows)
    assert shown(tokenizer, row["input_ids"], row["labels"]) == (
        "<s> [ INST ] ▁ < < S Y S > > <0x0A> yo <0x0A> < < / S Y S > > <0x0A> <0x0A> q ▁ [ / INST ] {▁Hi} {▁} {</s>}"
    )


# --- contents that meet the edges of turns

CONTENTS = [
    "Hi",
    " Hi",
    "Hi ",
    "\nHi",
    "Hi\n",
    "\n\nHi\n\n",
    "a  b",
    "é 猫 🙂",
    "Hi\n\nyo",
    "|>\nHi",
    "</s",
    "<answer>4</answer>",
    "1+1=2",
]


@pytest.mark.parametrize("content", CONTENTS)
@every_family
def test_one_turn_is_the_same_in_every_command(name, trim, content, inspect, write_jsonl, capsys):
    """The whole has the tokens of its rendering; a conversation's are those of the prompt and the response of a pair;
    what is learned is the answer and one end."""
    tokenizer, _, stops = family(name, trim)
    messages = [user("q"), assistant(content)]
    _, (turn,) = inspect(name, "sft", [{"messages": messages}], trim=trim)
    row = {"prompt": messages[:1], "chosen": messages[1:], "rejected": [assistant("other")]}
    _, (pair,) = inspect(name, "dpo", [row], trim=trim)
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    front = [] if EXPECTED[name].reward is None else [tokenizer.bos_token_id]
    assert turn["input_ids"] == front + whole
    response = pair["responses"][0]["input_ids"]
    prompt_and_response = pair["prompt_ids"] + response
    assert turn["input_ids"][: len(prompt_and_response)] == prompt_and_response
    learned = [label for label in turn["labels"] if label != -100]
    assert turn["labels"][len(prompt_and_response) - len(learned) :][: len(learned)] == learned, "they stand together"
    assert tokenizer.convert_ids_to_tokens(learned[-1]) in stops
    ends = tokenizer.convert_tokens_to_ids(list(stops))
    assert sum(token in ends for token in learned) == 1
    squeezed = "".join(tokenizer.decode(learned).split())
    wanted = "".join(tokenizer.decode(tokenizer(content, add_special_tokens=False).input_ids).split())
    assert squeezed.endswith(wanted + tokenizer.decode(learned[-1:]))
