"""Chat templates: what of a conversation is learned, token by token, and what is refused."""

import copy

import pytest
from transformers import PreTrainedTokenizer

from rlhf_trainer.data.chat import CHATML, set_chat_template
from rlhf_trainer.data.encoding import Codec, encode_conversation, encode_pairs, encode_prompt
from rlhf_trainer.errors import RowError, UsageError


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def chatml(tokenizer):
    """The tokenizer with the strict template."""
    tokenizer = copy.deepcopy(tokenizer)
    assert set_chat_template(tokenizer, "chatml") == 0  # both tokens were there
    return tokenizer


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def marked(tokenizer, messages, **options):
    """The conversation's tokens; those that are learned stand in brackets."""
    ids, counted = encode_conversation(Codec(tokenizer), messages, **options)
    assert len(ids) == len(counted) and {type(mark) for mark in counted} <= {bool}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return " ".join(f"[{token}]" if mark else token for token, mark in zip(tokens, counted, strict=True))


# --- masks, token by token (Ċ is a line break, Ġ a space, as byte-level tokenizers write them)

USER = "<|im_start|> u s er Ċ"
ASSISTANT = "<|im_start|> a s s is t an t Ċ"
END = "<|im_end|> Ċ"


def test_a_single_turn(chatml):
    text = marked(chatml, [user("the cat"), assistant("the mat")])
    assert text == f"{USER} the Ġcat {END} {ASSISTANT} [the] [Ġmat] [<|im_end|>] Ċ"


def test_all_turns_or_the_last(chatml):
    messages = [user("a cat"), assistant("the"), user("the fish"), assistant("a mat")]
    begin = f"{USER} a Ġcat {END} {ASSISTANT}"
    assert marked(chatml, messages) == (
        f"{begin} [the] [<|im_end|>] Ċ {USER} the Ġfish {END} {ASSISTANT} [a] [Ġmat] [<|im_end|>] Ċ"
    )
    assert marked(chatml, messages, last_turn_only=True) == (
        f"{begin} the <|im_end|> Ċ {USER} the Ġfish {END} {ASSISTANT} [a] [Ġmat] [<|im_end|>] Ċ"
    )


def test_the_last_turn_need_not_be_the_last_message(chatml):
    messages = [user("a"), assistant("the"), user("a"), assistant("a"), user("a")]
    question = f"{USER} a {END}"
    assert marked(chatml, messages, last_turn_only=True) == (
        f"{question} {ASSISTANT} the <|im_end|> Ċ {question} {ASSISTANT} [a] [<|im_end|>] Ċ {question}"
    )


def test_a_system_message_is_not_learned(chatml):
    text = marked(chatml, [system("the"), user("a"), assistant("the")])
    begin, _, rest = text.partition(f" {USER}")
    assert begin.startswith("<|im_start|> s") and begin.endswith(f"Ċ the {END}") and "[" not in begin
    assert rest == f" a {END} {ASSISTANT} [the] [<|im_end|>] Ċ"


def test_a_whole_conversation(chatml, tokenizer):
    """assistant_only_loss=False: every token is learned, and the template need not say who wrote it."""
    messages = [system("the"), user("a cat"), assistant("the mat")]
    ids, counted = encode_conversation(Codec(chatml), messages, assistant_only_loss=False)
    assert ids == encode_conversation(Codec(chatml), messages)[0] and counted == [True] * len(ids)
    unmarked = with_template(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(RowError, match="ends the assistant's turn with ' mat', an ordinary token, at which generation"):
        encode_conversation(Codec(unmarked), messages)
    ids, counted = encode_conversation(Codec(unmarked), messages, assistant_only_loss=False)
    assert unmarked.decode(ids) == "thea catthe mat" and counted == [True] * len(ids)
    ids, _ = encode_conversation(Codec(unmarked), [user("a cat")], assistant_only_loss=False)
    assert unmarked.decode(ids) == "a cat", "nor need the assistant say anything"


@pytest.mark.parametrize("content", ["Größe: ½ – 猫が座った 🐈‍⬛", "e\u0301", "a\n\nb\n"])
def test_content_of_many_bytes_is_learned_whole_and_nothing_else(content, chatml):
    ids, counted = encode_conversation(
        Codec(chatml), [user(content), assistant(content), user("💬"), assistant(content)]
    )
    learned = [i for i, mark in zip(ids, counted, strict=True) if mark]
    assert chatml.decode(learned) == f"{content.strip()}<|im_end|>" * 2
    others = [i for i, mark in zip(ids, counted, strict=True) if not mark]
    assert chatml.decode(others) == (
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n\n"
        "<|im_start|>user\n💬<|im_end|>\n<|im_start|>assistant\n\n"
    )


@pytest.mark.parametrize("content", ["the cat", "\n\n the cat\n", "  the"])
def test_a_conversation_has_the_tokens_of_its_prompt_and_response(content, chatml):
    """The learned tokens continue exactly those that generation starts from, and stop where it stops."""
    prompt, response = [system("the"), user("a"), assistant("and"), user(content)], [assistant(content)]
    ids, counted = encode_conversation(Codec(chatml), prompt + response, last_turn_only=True)
    before = encode_prompt(Codec(chatml), prompt)
    _, (answer,) = encode_pairs(Codec(chatml), prompt, [("completion", response)])
    assert ids == before + answer + chatml("\n").input_ids
    assert counted == [False] * len(before) + [True] * len(answer) + [False]
    assert answer[-1] == chatml.eos_token_id


def test_a_template_of_ones_own(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}=>{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    own = copy.deepcopy(tokenizer)
    assert set_chat_template(own, str(path)) == 0
    assert marked(own, [user("a"), assistant("the")]) == "a = > [the] [<|im_end|>]"
    assert own.eos_token == tokenizer.eos_token


# --- what is refused

ALTERNATE = r"field 'messages': the chat template refuses these messages: .*must alternate user, assistant"
BAD_ROLES = {
    "the assistant begins": ([assistant("a"), user("b"), assistant("c")], "message 0 has role assistant"),
    "the user twice": ([user("a"), user("b"), assistant("c")], "message 1 has role user"),
    "the assistant twice": ([user("a"), assistant("b"), assistant("c")], "message 2 has role assistant"),
    "a late system message": ([user("a"), system("b"), assistant("c")], "message 1 has role system"),
    "the system twice": ([system("a"), system("b"), assistant("c")], "message 1 has role system"),
    "an unknown role": ([user("a"), assistant("b"), {"role": "tool", "content": "c"}], "message 2 has role tool"),
    "user after system missing": ([system("a"), assistant("b")], "message 1 has role assistant"),
}


@pytest.mark.parametrize("case", BAD_ROLES)
def test_roles_must_alternate(case, chatml):
    messages, where = BAD_ROLES[case]
    with pytest.raises(RowError, match=f"{ALTERNATE}.*; {where}$"):
        encode_conversation(Codec(chatml), messages)


@pytest.mark.parametrize("prompt", [[user("a"), assistant("b")], [system("a")]])
def test_a_prompt_ends_with_the_user(prompt, chatml):
    with pytest.raises(
        RowError,
        match=f"field 'prompt': .*a prompt must end with a message of the user, not of role {prompt[-1]['role']}",
    ):
        encode_prompt(Codec(chatml), prompt)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("text", "field 'messages': expected a list of messages, got text"),
        ([], "field 'messages': the list of messages is empty"),
        ([user("a"), {"role": "assistant"}], r"field 'messages\[1\].content': expected text, got nothing"),
        ([user("a")], "field 'messages': no message is the assistant's: there is nothing to learn"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(messages, problem, chatml):
    with pytest.raises(RowError, match=problem):
        encode_conversation(Codec(chatml), messages)


def test_a_response_is_one_message(chatml):
    """The user's words in between would be learned as if the model had written it."""
    with pytest.raises(RowError, match="field 'chosen': expected one message, what the assistant answers, got 3"):
        encode_pairs(Codec(chatml), [user("a")], [("chosen", [assistant("b"), user("c"), assistant("d")])])


@pytest.mark.parametrize("last_turn_only", [False, True])
def test_a_template_that_marks_nothing_of_a_row(last_turn_only, tokenizer):
    quiet = with_template(tokenizer, "{{ messages[0].content }}{% generation %}{% endgeneration %}")
    with pytest.raises(RowError, match=r"field 'messages': \{% generation %\} marks 0 of 1 turns of the assistant"):
        encode_conversation(Codec(quiet), [user("a"), assistant("b")], last_turn_only=last_turn_only)


def test_a_template_that_marks_some_turns_only(tokenizer):
    """The others would silently not be learned."""
    template = (
        "{% for m in messages %}|{% if loop.last and m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endif %}{% endfor %}"
    )
    some, messages = with_template(tokenizer, template), [user("a"), assistant("the"), user("a"), assistant("the")]
    assert marked(some, messages, last_turn_only=True) == "| a | the <|im_end|> | a | [the] [<|im_end|>]"
    with pytest.raises(RowError, match=r"field 'messages': \{% generation %\} marks 1 of 2 turns of the assistant"):
        encode_conversation(Codec(some), messages)


def test_a_template_that_rewrites_earlier_turns_cannot_tell_the_last_one(chatml):
    odd = with_template(chatml, "{{ messages | length }}" + CHATML)
    messages = [user("a"), assistant("b"), user("a"), assistant("c")]
    assert "[b]" in marked(odd, messages)
    with pytest.raises(RowError, match="renders earlier turns differently once the last one follows"):
        encode_conversation(Codec(odd), messages, last_turn_only=True)


def test_a_tokenizer_without_a_template(tokenizer):
    with pytest.raises(RowError, match=r"field 'messages': .*no chat template"):
        encode_conversation(Codec(with_template(tokenizer, None)), [user("a"), assistant("b")])


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return 0

        def _convert_id_to_token(self, index):
            return "a"

    slow = Slow()
    slow.chat_template = CHATML
    with pytest.raises(UsageError, match="Slow cannot tell where in a text its tokens lie: use a fast tokenizer"):
        encode_conversation(Codec(slow), [user("a"), assistant("b")])


# --- setting a template


def test_chatml_brings_its_tokens_where_they_are_missing(tokenizer, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdst<>|_im\n")}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    bare = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", extra_special_tokens=["<mine>"])
    before = len(bare)
    assert set_chat_template(bare, "chatml") == len(bare) - before == 2
    assert bare.eos_token == "<|im_end|>"
    assert set_chat_template(bare, "chatml") == 0

    bare.save_pretrained(tmp_path / "saved")
    for tok in (bare, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert {"<eos>", "<mine>", "<|im_start|>", "<|im_end|>"} <= tok.get_vocab().keys()
        ids, counted = encode_conversation(Codec(tok), [user("ab"), assistant("cd")])
        learned = [i for i, mark in zip(ids, counted, strict=True) if mark]
        assert tok.convert_ids_to_tokens(learned) == ["c", "d", "<|im_end|>"]
        assert learned[-1] == tok.eos_token_id
        assert tok.decode(learned, skip_special_tokens=True).replace(" ", "") == "cd"
        assert "<mine>" in tok.all_special_tokens


def test_what_is_no_template(tokenizer, tmp_path):
    own = copy.deepcopy(tokenizer)
    with pytest.raises(
        UsageError, match=r"chat_template_path: expected chatml or a Jinja file, got 'chat_ml': .*No such file"
    ):
        set_chat_template(own, "chat_ml")
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}\n{{ m.content ")
    with pytest.raises(UsageError, match=r"chat_template_path: .*broken.jinja, line 2: "):
        set_chat_template(own, str(broken))
    picky = tmp_path / "picky.jinja"
    picky.write_text("{{ raise_exception('no') }}")
    assert set_chat_template(own, str(picky)) == 0  # it may well take the messages of the data


def test_the_end_of_the_templates_turns_is_known_without_data(tokenizer):
    """So that completions stop there which a command draws of prompts alone."""
    own = with_template(tokenizer, "{% for m in messages %}{{ m.content + '<s>' }}{% endfor %}")
    assert Codec(own).ends == {own.eos_token_id, own.bos_token_id}
    assert Codec(with_template(tokenizer, None), ends=[7]).ends == {own.eos_token_id, 7}
