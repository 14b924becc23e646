"""Tasks with a known answer, for models of characters: reversing a word, adding two numbers."""

import json
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

LETTERS = "abcd"
CHARACTERS = [*"0123456789", *"+=", *LETTERS, ">", "."]


def character_tokenizer():
    """One token a character; "." ends."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".", pad_token=".", unk_token=".")


def reversals(length):
    """Every word of LETTERS, and the same from behind."""
    words = [""]
    for _ in range(length):
        words = [word + letter for word in words for letter in LETTERS]
    return [{"prompt": f"{word}>", "answer": word[::-1]} for word in words]


def additions():
    """Every sum of two numbers below 100."""
    return [{"prompt": f"{a:02}+{b:02}=", "answer": f"{a + b:03}"} for a in range(100) for b in range(100)]


def small_gpt2(tokenizer, width=64, layers=2):
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=width, n_layer=layers, n_head=4,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def half_taught(model, tokenizer, rows, steps, seed, wrong=0.5, learning_rate=3e-3):
    """Teaches answers of which a share has one wrong character: the form is learned, the truth in part."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        texts = []
        for row in rng.choices(rows, k=128):
            answer = list(row["answer"])
            if rng.random() < wrong:
                answer[rng.randrange(len(answer))] = rng.choice(rows)["answer"][0]
            texts.append(row["prompt"] + "".join(answer) + ".")
        ids = torch.tensor(tokenizer(texts).input_ids)
        labels = ids.clone()
        labels[:, : len(tokenizer(rows[0]["prompt"]).input_ids)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
