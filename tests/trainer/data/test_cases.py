"""Situations that other packages met, as small inputs with their right values: rows, templates and tokenizers."""

import json
import math

import jinja2
import pytest
from transformers import AutoTokenizer

from rlhf_trainer.data.chat import CHATML, MARKED, set_chat_template
from rlhf_trainer.data.encoding import Codec, encode_conversation, encode_pairs, encode_prompt, encode_text
from rlhf_trainer.data.examples import load_conversations, load_groups, load_prompts
from rlhf_trainer.errors import RowError, UsageError
from rlhf_trainer.rollouts.generation import Completion, completion_text

from .families import assistant, byte_level, family, old_sentence_piece, sentence_piece, shown, user, word_pieces

PLAIN = ("<pad>", "<s>", "</s>")
KINDS = {
    "bytes": lambda: byte_level(PLAIN, bos="<s>", eos="</s>"),
    "bytes, all offsets": lambda: byte_level(PLAIN, bos="<s>", eos="</s>", trim=False),
    "pieces": sentence_piece,
    "old pieces": old_sentence_piece,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def learned(codec, messages, options=None, **how):
    ids, counted = encode_conversation(codec, messages, options or {}, **how)
    labels = [i if each else -100 for i, each in zip(ids, counted, strict=True)]
    return shown(codec.tokenizer, ids, labels)


def conversation(codec, source, **reading):
    loaded = load_conversations(source, codec, max_length=999, split="train", **reading)
    return [shown(codec.tokenizer, each.ids, [i if c else -100 for i, c in zip(each.ids, each.counted, strict=True)])
            for each in loaded.examples]  # fmt: skip


# --- 01: text that has BOS already


@every_kind
def test_one_bos_and_one_eos_whether_the_text_has_them_or_not(kind, write_jsonl):
    codec = Codec(KINDS[kind]())
    bos, eos = codec.tokenizer.bos_token_id, codec.tokenizer.eos_token_id
    for text in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        ids = encode_text(codec, text)
        assert (ids.count(bos), ids.count(eos), ids[0], ids[-1]) == (1, 1, bos, eos), text
        (example,) = load_conversations(write_jsonl([{"text": text}]), codec, max_length=99, split="train").examples
        assert example.ids == ids and example.counted == [False] + [True] * (len(ids) - 1)
    assert encode_prompt(codec, "<s>ab") == encode_text(codec, "<s>ab")[:-1]


@every_kind
def test_a_prompts_own_end_of_sequence_stays(kind):
    codec = Codec(KINDS[kind]())
    assert encode_prompt(codec, "ab</s>") == encode_text(codec, "ab")
    prompt, (response,) = encode_pairs(codec, "ab</s>", [("completion", "Hi")])
    assert prompt == encode_text(codec, "ab")
    # Pieces of the older files put a space behind every special token.
    assert shown(codec.tokenizer, response) == ("▁Hi </s>" if kind == "old pieces" else "Hi </s>")


@every_kind
def test_prompts_and_completions_have_one_of_each(kind):
    codec = Codec(KINDS[kind]())
    for prompt in ("ab", "<s>ab"):
        for completion in (" Hi", " Hi</s>"):
            before, (response,) = encode_pairs(codec, prompt, [("completion", completion)])
            assert before == encode_prompt(codec, prompt)
            assert before + response == encode_text(codec, prompt + " Hi")
            assert (response.count(codec.tokenizer.eos_token_id), before.count(codec.tokenizer.bos_token_id)) == (1, 1)


def test_a_tokenizer_that_puts_both_around_every_text():
    """What it puts behind is the end of sequence, which a prompt does not have."""
    tokenizer = word_pieces()
    codec = Codec(tokenizer)
    assert shown(tokenizer, encode_text(codec, "Hi")) == shown(tokenizer, tokenizer("Hi").input_ids) == "[CLS] Hi [SEP]"
    assert encode_text(codec, "[CLS] Hi [SEP]") == encode_text(codec, "Hi")
    prompt, (response,) = encode_pairs(codec, "Hi", [("completion", " yo")])
    assert shown(tokenizer, prompt) == "[CLS] Hi" and shown(tokenizer, response) == "yo [SEP]"


def test_what_stands_behind_an_end_within_a_response_is_not_learned():
    codec = Codec(KINDS["bytes"]())
    _, (response,) = encode_pairs(codec, "a", [("completion", "b</s> c")])
    assert shown(codec.tokenizer, response) == "b </s>"


def test_a_template_that_writes_bos_gets_no_second_one():
    tokenizer, *_ = family("llama3")
    chat = [user("q"), assistant("Hi")]
    codec = Codec(tokenizer)
    assert (
        encode_prompt(codec, chat[:1]) == tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True).input_ids
    )
    assert encode_conversation(codec, chat)[0].count(tokenizer.bos_token_id) == 1


# --- 02: chatml for a tokenizer that puts BOS in front


@every_kind
def test_chatml_begins_with_bos_with_and_without_this_package(kind):
    tokenizer = KINDS[kind]()
    set_chat_template(tokenizer, "chatml")
    codec, chat = Codec(tokenizer), [user("q"), assistant("Hi")]
    ids, _ = encode_conversation(codec, chat)
    assert ids == tokenizer.apply_chat_template(chat).input_ids
    assert (
        encode_prompt(codec, chat[:1]) == tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True).input_ids
    )
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_chatml_begins_without_bos_where_the_tokenizer_puts_none():
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>", front=False)
    set_chat_template(tokenizer, "chatml")
    assert encode_prompt(Codec(tokenizer), [user("q")])[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


# --- 03: tokenizers that put a space in front of every text


@pytest.mark.parametrize("kind", ["pieces", "old pieces"])
def test_a_response_has_its_tokens_within_the_whole(kind):
    tokenizer = KINDS[kind]()
    codec = Codec(tokenizer)
    prompt, (four,) = encode_pairs(codec, "2+2=", [("completion", "4")])
    assert shown(tokenizer, prompt) == "<s> ▁ 2 + 2 =" and shown(tokenizer, four) == "4 </s>"
    assert tokenizer.decode(prompt + four, skip_special_tokens=True) == "2+2=4"
    drawn = Completion(tokenizer.convert_tokens_to_ids(["▁Hi", "</s>"]), True)
    assert completion_text(tokenizer, drawn, prompt) == " Hi"


@pytest.mark.parametrize("trim", [True, False])
def test_a_merge_across_the_boundary(trim):
    """The token of the whole is learned, and the prompt ends before it, as in TRL; where the two do not meet, each
    stays what it is."""
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>", merges=[("=", "=")], trim=trim)
    codec = Codec(tokenizer)
    prompt, (response,) = encode_pairs(codec, "2=", [("completion", "=4")])
    assert (shown(tokenizer, prompt), shown(tokenizer, response)) == ("<s> 2", "== 4 </s>")
    assert codec.notes
    prompt, (response,) = encode_pairs(codec, "2=", [("completion", "4")])
    assert (shown(tokenizer, prompt), shown(tokenizer, response)) == ("<s> 2 =", "4 </s>")


def test_responses_that_meet_the_prompt_differently_share_a_prompt():
    tokenizer = byte_level(PLAIN, bos="<s>", eos="</s>", merges=[("=", "=")])
    prompt, responses = encode_pairs(Codec(tokenizer), "2=", [("chosen", "4"), ("rejected", "=4")])
    assert shown(tokenizer, prompt) == "<s> 2"
    assert [shown(tokenizer, each) for each in responses] == ["= 4 </s>", "== 4 </s>"]


# --- 08: tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
WITH_TOOLS = (
    "{% if tools %}{{ 'TOOLS ' + (tools | tojson) }}{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'A:' }}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ 'U:' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def templated(template, kind="bytes"):
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = template
    return Codec(tokenizer)


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])], ids=["list", "JSON text"])
def test_tools_are_in_conversations_prompts_and_pairs(tools, write_jsonl):
    codec = templated(WITH_TOOLS)
    chat = [user("hi"), assistant("yo")]
    rendered = codec.tokenizer.apply_chat_template(chat[:1], tools=[WEATHER], add_generation_prompt=True).input_ids
    rows = write_jsonl([{"messages": chat, "tools": tools}])
    (example,) = load_conversations(rows, codec, max_length=999, split="train").examples
    front = [codec.tokenizer.bos_token_id, *rendered]
    assert example.ids[: len(front)] == front and example.counted == [False] * len(front) + [True] * 2
    rows = write_jsonl([{"prompt": chat[:1], "tools": tools}])
    assert load_prompts(rows, codec, max_prompt_length=999, split="train").examples[0].ids == front
    rows = write_jsonl([{"prompt": chat[:1], "chosen": chat[1:], "rejected": [assistant("no")], "tools": tools}])
    (group,) = load_groups(rows, codec, max_prompt_length=999, max_length=999, split="train").examples
    assert group.prompt == front


def test_tools_that_a_template_does_not_write_are_refused(write_jsonl):
    """Also where the question has the name of one."""
    tokenizer = KINDS["bytes"]()
    set_chat_template(tokenizer, "chatml")
    row = {"messages": [user("how is the weather?"), assistant("yo")], "tools": [WEATHER]}
    with pytest.raises(UsageError, match="row 1, field 'tools': the chat template does not write them"):
        conversation(Codec(tokenizer), write_jsonl([row]))


# --- 09, 10: calls of tools

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
WRITES_CALLS = (
    "{% for m in messages %}{{ m.role ~ ':' ~ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %}{{ '(' ~ k ~ '=' ~ v ~ ')' }}{% endfor %}{% endfor %}{{ '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize("question", ["hi", "how is the weather?"])
@pytest.mark.parametrize("keep_rendering", [False, True])
def test_calls_that_a_template_cannot_write_are_refused(question, keep_rendering):
    tokenizer = KINDS["bytes"]()
    set_chat_template(tokenizer, "chatml")
    chat = [user(question), assistant("", tool_calls=[CALL])]
    with pytest.raises(RowError, match=r"'messages.tool_calls': the chat template does not write tool calls"):
        encode_conversation(Codec(tokenizer), chat)
    with pytest.raises(RowError, match=r"'chosen.tool_calls': the chat template does not write tool calls"):
        encode_pairs(Codec(tokenizer), chat[:1], [("chosen", chat[1:])], keep_rendering=keep_rendering)
    with pytest.raises(RowError, match=r"'prompt.tool_calls': the chat template does not write tool calls"):
        encode_prompt(Codec(tokenizer), [*chat, user("so?")])


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'], ids=["mapping", "JSON text"])
def test_calls_are_learned_where_the_template_writes_them(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    codec = templated(WRITES_CALLS)
    ids, counted = encode_conversation(codec, [user("hi"), assistant("", tool_calls=[call])])
    assert (
        codec.tokenizer.decode([i for i, each in zip(ids, counted, strict=True) if each]) == "weather(city=Paris)</s>"
    )


def test_earlier_calls_with_arguments_as_text_are_decoded_in_prompts(write_jsonl):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"c": "x"}'}}
    asked = [user("w?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "9"}]
    broken = [user("w?"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), user("so?")]
    codec = templated(WRITES_CALLS)
    source = write_jsonl([{"prompt": asked}, {"prompt": broken}, {"prompt": [user("ok")]}])
    loaded = load_prompts(source, codec, max_prompt_length=99, split="train", skip_invalid_rows=True)
    assert [each.row for each in loaded.examples] == [1, 3]
    assert loaded.examples[0].text == "user:w?</s>assistant:f(c=x)</s>tool:9</s>assistant:"
    (skipped,) = loaded.skipped
    assert skipped.startswith("row 2, field 'prompt[1].tool_calls[0].function.arguments': expected a mapping, or JSON")


# --- other columns and contents


def test_template_kwargs_of_a_row_reach_its_template(write_jsonl):
    codec = templated("{{ mood | default('calm') }}:{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = [{"prompt": [user("a")]}, {"prompt": [user("a")], "chat_template_kwargs": {"mood": "wild"}},
            {"prompt": [user("a")], "chat_template_kwargs": '{"mood": "odd"}'}]  # fmt: skip
    loaded = load_prompts(write_jsonl(rows), codec, max_prompt_length=99, split="train")
    assert [each.text for each in loaded.examples] == ["calm:a", "wild:a", "odd:a"]


def test_the_end_of_a_turn_does_not_depend_on_earlier_rows():
    """Phi-3's, where nothing says that generation stops at <|end|>: the whole ends with another token."""
    tokenizer = family("phi3")[0]
    single = [user("q"), assistant("Hi")]
    codec = Codec(tokenizer)
    first = learned(codec, single)
    assert first.endswith("<|assistant|> {▁Hi} {<|end|>} <|endoftext|>")
    learned(codec, [*single, *single])
    assert learned(codec, single) == first


def test_content_as_parts():
    codec = Codec(family("zephyr")[0])
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert learned(codec, [user("q"), assistant(parts)]) == learned(codec, [user("q"), assistant("Hi")])
    with pytest.raises(RowError, match=r"messages\[0\].content\[0\]': expected {'type': 'text'"):
        learned(codec, [user([{"type": "image"}]), assistant("Hi")])


@pytest.mark.parametrize("blank", ["", " \n", [{"type": "text", "text": " "}]])
@pytest.mark.parametrize("name", ["zephyr", "qwen3", "llama3"])
def test_a_blank_turn_is_refused(name, blank):
    codec = Codec(family(name)[0])
    with pytest.raises(RowError, match=r"messages\[1\].content': the assistant's turn is empty"):
        encode_conversation(codec, [user("q"), assistant(blank)])
    with pytest.raises(RowError, match="'chosen': the response is empty"):
        encode_pairs(codec, [user("q")], [("chosen", [assistant(blank)])])


@pytest.mark.parametrize("place", ["content", "tools", "text"])
def test_half_a_surrogate_is_its_rows_error(place, write_jsonl):
    """JSON can spell it; it is no text, and can be left out."""
    bad = "\ud83d"
    row = {
        "content": {"messages": [user(bad), assistant("yo")]},
        "tools": {"messages": [user("q"), assistant("yo")], "tools": [{"type": "function", "function": {"name": bad}}]},
        "text": {"text": bad},
    }[place]
    source = write_jsonl([row, {"messages": [user("q"), assistant("yo")], "tools": [WEATHER]}])
    codec = templated(WITH_TOOLS)
    with pytest.raises(UsageError, match=r"1 of 2 rows cannot be used:\n  row 1, field '(messages|text)': is not text"):
        conversation(codec, source)
    assert len(conversation(codec, source, skip_invalid_rows=True)) == 1


def test_deep_nesting_is_its_rows_error(write_jsonl):
    deep = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
    source = write_jsonl([deep, {"messages": [user("q"), assistant("yo")]}])
    assert len(conversation(Codec(family("zephyr")[0]), source, skip_invalid_rows=True)) == 1


def test_a_failing_template_is_its_rows_error(write_jsonl):
    codec = templated("{% for m in messages %}{{ m.content + m.mood }}{% endfor %}")
    source = write_jsonl([{"prompt": [user("q")]}, {"prompt": [user("q") | {"mood": "!"}]}])
    loaded = load_prompts(source, codec, max_prompt_length=99, split="train", skip_invalid_rows=True)
    assert [each.text for each in loaded.examples] == ["q!"]
    assert "row 1, field 'prompt': the chat template" in loaded.skipped[0]


def test_several_templates_without_a_default():
    tokenizer = KINDS["bytes"]()
    tokenizer.chat_template = {"tool_use": WITH_TOOLS, "rag": WITH_TOOLS}
    codec = Codec(tokenizer)
    with pytest.raises(RowError, match="several chat templates, tool_use, rag, and none is called default: pass one"):
        encode_prompt(codec, [user("q")])
    assert encode_prompt(codec, [user("q")], options={"tools": [WEATHER]}), "one of them is for tools"


def test_not_a_number_and_windows_lines(write_jsonl, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "ab", "mark": math.nan})
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\r\n".encode())
    loaded = load_prompts(str(path), Codec(KINDS["bytes"]()), max_prompt_length=9, split="train")
    assert [shown(KINDS["bytes"](), each.ids) for each in loaded.examples] == ["<s> a b"] * 2


# --- marks


def test_marks_that_end_with_white_space_which_the_tokenizer_drops():
    """They do not run on into the next turn."""
    tokenizer = word_pieces()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>\n  ' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    chat = [user("q"), assistant("Hi"), user("r"), assistant("yo")]
    assert learned(Codec(tokenizer), chat) == (
        "[CLS] <|im_start|> user q <|im_end|> <|im_start|> assistant {Hi} {<|im_end|>} "
        "<|im_start|> user r <|im_end|> <|im_start|> assistant {yo} {<|im_end|>}"
    )


def test_marks_that_end_before_the_end_of_the_turn_are_refused():
    """Or the model would never learn to stop."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' ' }}{% endgeneration %}"
        "</s>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RowError, match="ends the assistant's turn with 'Hi', an ordinary token"):
        learned(templated(template), [user("q"), assistant("Hi")])


def test_marks_that_part_a_turn_are_one():
    """The end apart from the content; and a second end behind it, as in Phi-3's, is not learned."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}{{ '</s>\n' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% generation %}{{ '</s>' }}{% endgeneration %}"
    )
    chat = [user("q"), assistant("Hi"), user("r"), assistant("yo")]
    assert learned(templated(template), chat) == "<s> q {Hi} {</s>} Ċ r {yo} {</s>} Ċ </s>"


@every_kind
def test_a_saved_template_is_plain_jinja_and_keeps_its_marks(kind, tmp_path):
    tokenizer = KINDS[kind]()
    set_chat_template(tokenizer, "chatml")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = [user("q"), assistant("Hi"), user("r"), assistant(" yo ")]
    plain = jinja2.Environment().from_string(again.get_chat_template()).render(messages=chat, bos_token="<s>")
    assert plain == (
        "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    )
    assert plain == again.apply_chat_template(chat, tokenize=False)
    assert set(again.chat_template) == {"default", MARKED} and again.chat_template[MARKED].endswith(CHATML)
    assert encode_conversation(Codec(again), chat) == encode_conversation(Codec(tokenizer), chat)
    mask = again.apply_chat_template(
        chat, chat_template=again.chat_template[MARKED], return_assistant_tokens_mask=True, return_dict=True
    )
    if kind != "old pieces":  # transformers' mask starts a token late behind a space that is not in the text
        ids, counted = encode_conversation(Codec(again), chat)
        assert (mask.input_ids, mask.assistant_masks) == (ids, [int(each) for each in counted])
