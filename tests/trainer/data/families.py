"""Chat templates of known model families, written anew from their public shape, and small tokenizers of their kinds."""

import re
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GemmaTokenizer, GenerationConfig, LlamaConfig, LlamaTokenizer, PreTrainedTokenizerFast

SYSTEM = {
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}
WORDS = (
    "assistant",
    "user",
    "system",
    *dict.fromkeys(re.findall(r"\w\w+", " ".join(SYSTEM.values()))),
    "model",
    "Hi",
    "yo",
    "INST",
)
# How Llama 3 and Qwen cut text before merging: punctuation takes the line breaks behind it, line breaks stay together.
CUTS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def chains(words):
    """Merges that make each word one token, letter by letter from the left."""
    merges = {(word[:i], word[i]): None for word in words for i in range(1, len(word))}
    return list(merges)


def byte_level(specials, *, bos=None, eos=None, front=True, trim=True, merges=(), cuts=None):
    """Byte-level BPE. Ġ is a space, Ċ a line break. front: it puts BOS in front; trim: offsets leave spaces out."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*chains([*WORDS, "ĊĊ"]), *(("Ġ", word) for word in WORDS), *merges]
    vocabulary = {token: None for token in [*specials, *letters, *(left + right for left, right in merges)]}
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cuts is not None:
        split = pre_tokenizers.Split(cuts, behavior="isolated")
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    tokenizer.decoder = decoders.ByteLevel()
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos and front:
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
        )  # fmt: skip
    tokenizer.post_processor = processors.Sequence(steps)
    return fast(tokenizer, specials, bos, eos)


def fast(tokenizer, specials, bos, eos):
    more = [special for special in specials if special not in (bos, eos, specials[0])]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=specials[0], extra_special_tokens=more
    )


def pieces(specials):
    """The vocabulary and merges of a SentencePiece BPE: ▁ is a space, and bytes stand for what it does not have."""
    merges = [*chains([*WORDS, "▁▁"]), *(("▁", word) for word in WORDS)]
    joined = [left + right for left, right in merges]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *specials, *map(chr, range(33, 127)), "▁"]
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, *joined]))}, merges


def sentence_piece(specials=(), **options):
    """SentencePiece as Llama 2 has it: a space in front of every text, and BOS."""
    vocabulary, merges = pieces(specials)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **options)
    tokenizer.add_special_tokens({"extra_special_tokens": list(specials)})
    return tokenizer


def old_sentence_piece(specials=(), eos="</s>"):
    """SentencePiece as most tokenizer.json files have it: a space in front of what follows every special token, too.
    Specials are plain text or AddedToken."""
    names = [str(getattr(special, "content", special)) for special in specials]
    vocabulary, merges = pieces(names)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens([special for special in specials if isinstance(special, AddedToken)])
    return fast(tokenizer, ["<unk>", "<s>", "</s>", *names], "<s>", eos)


def gemma_pieces():
    """SentencePiece as Gemma has it: no space in front, BOS in front of every text."""
    specials = ("<start_of_turn>", "<end_of_turn>")
    vocabulary, merges = pieces(specials)
    own = [token for token in vocabulary if token not in ("<unk>", "<s>", "</s>", *specials)]
    ordered = ["<pad>", "<eos>", "<bos>", "<unk>", *specials, "\n", *own]
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate(ordered)}, merges=merges)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens({"extra_special_tokens": list(specials)})
    return tokenizer


def phi_pieces():
    """Phi-3's: its tokens of roles and ends take the white space behind them."""
    names = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    taking = [AddedToken(name, rstrip=True, special=True, normalized=False) for name in names]
    return old_sentence_piece([*taking, "<|endoftext|>"], eos="<|endoftext|>")


def word_pieces(specials=("<|im_start|>", "<|im_end|>")):
    """WordPiece as BERT has it: white space is dropped, [CLS] in front and [SEP], the end of sequence, behind."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *specials]
    rest = [*WORDS, *map(chr, range(33, 127)), *(f"##{chr(i)}" for i in range(97, 123))]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*names, *rest]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return fast(tokenizer, names, "[CLS]", "[SEP]")


class Family(NamedTuple):
    """A family's tokenizer, its template, and the tokens at which its generation_config stops."""

    tokenizer: PreTrainedTokenizerFast
    template: str
    stops: tuple[str, ...]


def chatml(default_system=None):
    """ChatML, with a system prompt of its own where the messages have none."""
    system = ""
    if default_system:
        system = (
            "{% if messages[0].role != 'system' %}"
            f"{{{{ '<|im_start|>system\n{default_system}<|im_end|>\n' }}}}"
            "{% endif %}"
        )
    return (
        f"{system}{{% for message in messages %}}"
        "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# Thoughts are in reasoning_content, or in the content before </think>; those of turns before the last question are
# left out. enable_thinking=False makes the generation prompt write empty ones.
QWEN3 = """
{%- set state = namespace(question=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set state.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thoughts = message.reasoning_content or '' %}
        {%- if not thoughts and '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > state.question and (loop.last or thoughts) %}
            {{- '<think>\n' ~ thoughts.strip('\n') ~ '\n</think>\n\n' ~ content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""

TEMPLATES = {
    "qwen2.5": chatml(SYSTEM["qwen2.5"]),
    "smollm2": chatml(SYSTEM["smollm2"]),
    "chatml": chatml(),
    "llama2": (
        "{% if messages[0].role == 'system' %}"
        "{% set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if message.role == 'user' %}"
        "{{ bos_token ~ '[INST] ' ~ ((system if loop.first else '') ~ message.content).strip() ~ ' [/INST]' }}"
        "{% else %}{{ ' ' ~ message.content.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content | trim ~ '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral1": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST] ' ~ message.content ~ ' [/INST]' }}{% else %}{{ message.content ~ eos_token ~ ' ' }}{% endif %}"
        "{% endfor %}"
    ),
    "mistral3": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST] ' ~ message.content ~ '[/INST]' }}{% else %}{{ ' ' ~ message.content | trim ~ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\n' }}"
        "{{ message.content | trim ~ '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "qwen3": QWEN3,
    "phi3": (
        "{% for message in messages %}{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "r1": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '<|User|>' ~ message.content }}"
        "{% else %}{{ '<|Assistant|>' ~ message.content.split('</think>')[-1] ~ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ eos_token ~ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
R1_TOKENS = ("<pad>", "<bos>", "<eos>", "<|User|>", "<|Assistant|>")


def family(name, trim=True):
    """The family of a name: a template's, and the kind of the tokenizer behind it where there are several. trim: of
    byte-level tokenizers, whether offsets leave spaces out."""
    cut = {"trim": trim, "cuts": CUTS}
    thoughts = ("<think>", "</think>")
    header = [("|", ">"), ("|>", "Ċ")]
    known = {
        "qwen2.5": lambda: byte_level(CHATML_TOKENS, eos="<|im_end|>", **cut),
        "smollm2": lambda: byte_level(CHATML_TOKENS, bos="<|im_start|>", eos="<|im_end|>", front=False, trim=trim),
        "llama2": sentence_piece,
        "llama2 old": old_sentence_piece,
        "llama3": lambda: byte_level(LLAMA3_TOKENS, bos="<|begin_of_text|>", eos="<|eot_id|>", **cut),
        "mistral1": old_sentence_piece,
        "mistral3": lambda: old_sentence_piece(("[INST]", "[/INST]")),
        "gemma": gemma_pieces,
        "qwen3": lambda: byte_level([*CHATML_TOKENS, *thoughts], eos="<|im_end|>", **cut),
        "phi3": phi_pieces,
        "r1": lambda: byte_level([*R1_TOKENS, *thoughts], bos="<bos>", eos="<eos>", **cut),
        "zephyr": sentence_piece,
        "zephyr old": old_sentence_piece,
        "zephyr bytes": lambda: byte_level(("<pad>", "<s>", "</s>"), bos="<s>", eos="</s>", merges=header, **cut),
        "chatml words": word_pieces,
        "zephyr words": lambda: word_pieces(()),
    }
    stops = {
        "qwen2.5": ("<|im_end|>", "<|endoftext|>"), "qwen3": ("<|im_end|>", "<|endoftext|>"),
        "llama3": ("<|end_of_text|>", "<|eot_id|>"), "gemma": ("<eos>", "<end_of_turn>"),
        "phi3": ("<|endoftext|>", "<|end|>"), "chatml words": ("[SEP]", "<|im_end|>"),
    }  # fmt: skip
    tokenizer = known[name]()
    tokenizer.chat_template = TEMPLATES[name.split()[0]]
    return Family(tokenizer, tokenizer.chat_template, stops.get(name, (tokenizer.eos_token,)))


def save(name, folder, trim=True):
    """A folder of a tiny model's configuration with the family's tokenizer; returns the tokenizer."""
    tokenizer, _, stops = family(name, trim)
    ids = tokenizer.convert_tokens_to_ids(list(stops))
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=2048, bos_token_id=None, eos_token_id=ids[0],
    ).save_pretrained(folder)  # fmt: skip
    GenerationConfig(eos_token_id=ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def shown(tokenizer, ids, labels=None):
    """The tokens as text, a space between two; learned ones stand in braces."""
    tokens = [token.replace("\n", "<0x0A>") for token in tokenizer.convert_ids_to_tokens(ids)]
    labels = [-100] * len(ids) if labels is None else labels
    return " ".join(token if label == -100 else f"{{{token}}}" for token, label in zip(tokens, labels, strict=True))
