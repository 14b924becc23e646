"""`rlhf demo`: a model from scratch, a known hidden reward, and DPO raising it, in two minutes on a CPU.

The language and its reward are described in demo_language.py. The DPO is that of `rlhf dpo`, on files such as a user
would have; only the making of the starting model and the measuring belong to the demo.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk

from .checkpoint import CONFIG_FILE, check_free, is_taken, save_model
from .config import DemoConfig, DPOConfig, dump_yaml
from .data import IGNORED, Batch, Pair, collate, load_pairs, pad_sequences
from .demo_curves import draw_curves
from .demo_language import all_prompts, hidden_reward, is_grammatical, make_tokenizer, prefers_first, write_review
from .dpo import train_dpo
from .models import FusedLM, LMHead, pad_id_of
from .reference import sequence_logprobs

HELD_OUT_PROMPTS = 30
HELD_OUT_PAIRS_PER_PROMPT = 8
REVIEWS_PER_PROMPT = 16
MAX_NEW_TOKENS = 32
LM_BATCH = 64
LM_PEAK_LEARNING_RATE = 7e-3
DPO_LEARNING_RATE = 1e-4  # a model this small needs a larger one than the default, 1e-6
DPO_BETA = (
    1.0  # the default, 0.1, would make a unit of reward worth a factor e^10: the language breaks on the way there
)

INTRODUCTION = """\
A small language: reviews of dishes at places, such as
    review of the soup at the harbour :  the soup was warm . the waiter was rude . i will happily return .
A hidden reward, which no model is ever told: +1 for every kind word (warm, helpful, happily, ...),
-1 for every unkind word (bland, rude, sadly, ...). The people here are as often pleased as not.
"""


class Score(NamedTuple):
    """What one model does on held-out prompts."""

    reviews: list[list[str]]  # by prompt
    rewards: list[int]  # of all reviews
    kl_nats: float  # KL(model || starting model) of a whole review, mean
    grammatical: float  # share of reviews that the language allows
    accuracy: float  # share of held-out pairs whose better review gets the larger implicit reward


def run(config: DemoConfig) -> Path:
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small are done before a second thread has woken up
    folder = make_folder(config)
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    prompts = all_prompts()
    rng.shuffle(prompts)
    held_out, seen = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS:]
    print(INTRODUCTION)

    print(f"1/4  A tiny GPT-2 learns from scratch to write reviews, in {config.lm_steps} steps.")
    tokenizer = make_tokenizer()
    start = make_model(tokenizer)
    nats = train_lm(start, tokenizer, prompts, config.lm_steps, rng)
    save_model(start, tokenizer, folder / "start_model")
    print(f"     {sum(p.numel() for p in start.parameters()):,} weights, {nats:.2f} nats a token at the end.\n")

    print("2/4  It writes reviews in pairs; a judge who knows the hidden reward, but errs, says which is better.")
    files = [folder / "preferences.jsonl", folder / "held_out.jsonl"]
    asked = [seen[i % len(seen)] for i in range(config.pairs)]
    right = write_preferences(files[0], start, tokenizer, asked, rng)
    write_preferences(files[1], start, tokenizer, held_out * HELD_OUT_PAIRS_PER_PROMPT, rng)
    print(f"     {config.pairs} pairs; where rewards differ, the judge chose the higher one in {right:.0%} of them.\n")

    print(f"3/4  DPO on these pairs, exactly as `rlhf dpo` runs it, with beta {DPO_BETA}.")
    train_dpo(
        DPOConfig(
            model_name_or_path=str(folder / "start_model"), dataset=str(files[0]), eval_dataset=str(files[1]),
            eval_steps=8, output_dir=str(folder / "dpo_model"), ref_cache_dir=str(folder / "reference_logps"),
            num_train_epochs=config.dpo_epochs, learning_rate=DPO_LEARNING_RATE, beta=DPO_BETA, warmup_steps=40,
            micro_batch_size=64, max_prompt_length=16, max_length=64, seed=config.seed, run_name="dpo",
        )
    )  # fmt: skip
    trained = AutoModelForCausalLM.from_pretrained(folder / "dpo_model").eval()

    print("\n4/4  Before and after, on prompts that DPO never saw.\n")
    before, after = (score(model, start, tokenizer, held_out, files[1]) for model in (start, trained))
    report = table(before, after) + "\n\n" + examples(held_out, before, after)
    print(report)
    (folder / "report.txt").write_text(f"{INTRODUCTION}\n{report}\n", encoding="utf-8")
    draw_curves(folder / "dpo_model" / "metrics.jsonl", before.rewards, after.rewards, folder / "curves.png")
    print(f"\nCurves: {folder / 'curves.png'}. The models, the pairs and the metrics of each step lie beside it.")
    print(f"All this took {time.perf_counter() - started:.0f} s. For a model and pairs of your own: rlhf dpo --help")
    return folder


def make_folder(config: DemoConfig) -> Path:
    """output_dir, or without --overwrite the first free of output_dir, output_dir-2, output_dir-3, ..."""
    folder, number = Path(config.output_dir), 2
    if config.overwrite:
        check_free(folder, overwrite=True)
        shutil.rmtree(folder, ignore_errors=True)
    while is_taken(folder):
        folder, number = Path(f"{config.output_dir}-{number}"), number + 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(dump_yaml(config), encoding="utf-8")
    return folder


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=96, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def train_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], steps: int, rng: random.Random
) -> float:
    """Language modelling on fresh reviews; returns the last step's loss in nats a token."""
    policy = FusedLM(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LM_PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LM_PEAK_LEARNING_RATE, total_steps=steps)
    loss = torch.tensor(0.0)
    for _ in tqdm(range(steps), desc="language model", unit="step"):
        asked = rng.choices(prompts, k=LM_BATCH)
        batch = encode(tokenizer, asked, [write_review(prompt, rng) for prompt in asked])
        loss = policy(batch, lambda hidden, head, batch=batch: mean_nats(hidden, head, batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def mean_nats(hidden: Tensor, head: LMHead, batch: Batch) -> Tensor:
    """-log p of a response token, mean over all of them; hidden [S, T, D] -> scalar."""
    logprobs, counts = rk.sequence_logprobs(hidden, head.weight, batch.labels, **head.options())
    return -logprobs.sum() / counts.sum()


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list[str], reviews: list[str]) -> Batch:
    end = [tokenizer.eos_token_id]
    ids = tokenizer(prompts).input_ids, tokenizer(reviews).input_ids
    return pad_sequences([(prompt, review + end) for prompt, review in zip(*ids, strict=True)], pad_id_of(tokenizer))


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """One review for each prompt, at temperature 1. All prompts of the language have the same number of tokens."""
    ids = torch.tensor(tokenizer(prompts).input_ids)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=1,
        max_new_tokens=MAX_NEW_TOKENS, pad_token_id=pad_id_of(tokenizer),
    )  # fmt: skip
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def write_preferences(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], rng: random.Random
) -> float:
    """Two reviews for each prompt, compared by the judge, as rows of a JSONL file.

    Returns how often the judge chose the one with the higher reward, where they differ.
    """
    right = []
    with path.open("x", encoding="utf-8") as file:
        for prompt, a, b in zip(prompts, *(sample(model, tokenizer, prompts) for _ in range(2)), strict=True):
            chosen, rejected = (a, b) if prefers_first(a, b, rng) else (b, a)
            if hidden_reward(a) != hidden_reward(b):
                right.append(hidden_reward(chosen) > hidden_reward(rejected))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return sum(right) / max(1, len(right))


def score(
    model: PreTrainedModel,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    held_out_file: Path,
) -> Score:
    reviews = sample(model, tokenizer, prompts * REVIEWS_PER_PROMPT)
    batch = encode(tokenizer, prompts * REVIEWS_PER_PROMPT, reviews)
    pairs = load_pairs(str(held_out_file), tokenizer, split="train", max_prompt_length=16, max_length=64).pairs
    right = [is_grammatical(*pair) for pair in zip(prompts * REVIEWS_PER_PROMPT, reviews, strict=True)]
    return Score(
        [reviews[i :: len(prompts)] for i in range(len(prompts))],
        [hidden_reward(review) for review in reviews],
        kl_per_sequence(FusedLM(model), FusedLM(start), batch).mean().item(),
        sum(right) / len(right),
        ranking_accuracy(FusedLM(model), FusedLM(start), tokenizer, pairs),
    )


@torch.no_grad()
def kl_per_sequence(policy: FusedLM, reference: FusedLM, batch: Batch) -> Tensor:
    """[S] nats: exact KL(policy || reference) of each token of the policy's own reviews, summed."""
    hidden, head = policy(batch, lambda hidden, head: (hidden, head))
    ref_hidden, ref_head = reference(batch, lambda hidden, head: (hidden, head))
    counted = (batch.labels[:, 1:] != IGNORED).contiguous()
    return rk.linear_kl(
        hidden[:, :-1], head.weight, ref_hidden[:, :-1], ref_head.weight, counted,
        bias=head.bias, ref_bias=ref_head.bias, logit_scale=head.logit_scale, logit_softcap=head.logit_softcap,
        ref_logit_scale=ref_head.logit_scale, ref_logit_softcap=ref_head.logit_softcap,
    ).sum(-1)  # fmt: skip


def ranking_accuracy(
    policy: FusedLM, reference: FusedLM, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]
) -> float:
    """How often the review with the higher hidden reward has the larger log pi - log pi_ref; a tie counts half."""
    batch = collate(pairs, pad_id_of(tokenizer))
    gains = (sequence_logprobs(policy, batch) - sequence_logprobs(reference, batch)).view(2, -1)
    rewards = torch.tensor(
        [hidden_reward(tokenizer.decode(ids)) for ids in [p.chosen for p in pairs] + [p.rejected for p in pairs]]
    ).view(2, -1)
    agreement = (gains[0] - gains[1]).sign() * (rewards[0] - rewards[1]).sign()
    return ((agreement + 1) / 2)[rewards[0] != rewards[1]].mean().item()


def optimum(rewards: list[int], beta: float) -> tuple[float, float]:
    """Mean reward and KL in nats of pi* = pi_start exp(reward / beta) / Z, which DPO approaches (eq. 4 of its paper).

    rewards: of reviews sampled from pi_start, which stand for it.
    """
    scaled = torch.tensor(rewards, dtype=torch.float64) / beta
    log_z = scaled.logsumexp(0) - math.log(len(rewards))
    mean = (scaled.softmax(0) * scaled).sum()
    return (beta * mean).item(), (mean - log_z).item()


def table(before: Score, after: Score) -> str:
    def mean(rewards: list[int]) -> float:
        return sum(rewards) / len(rewards)

    best_reward, best_kl = optimum(before.rewards, DPO_BETA)
    rows = [
        ("", "before", "after", "optimum"),
        (
            "hidden reward of a review, mean",
            f"{mean(before.rewards):+.2f}",
            f"{mean(after.rewards):+.2f}",
            f"{best_reward:+.2f}",
        ),
        ("KL to the starting model, nats a review", f"{before.kl_nats:.2f}", f"{after.kl_nats:.2f}", f"{best_kl:.2f}"),
        ("better review of a held-out pair recognised", f"{before.accuracy:.0%}", f"{after.accuracy:.0%}", "100%"),
        ("reviews that keep to the language", f"{before.grammatical:.0%}", f"{after.grammatical:.0%}", ""),
    ]
    lines = [f"  {name:<44}" + "".join(f"{value:>10}" for value in values) for name, *values in rows]
    note = (
        f"  optimum: the starting model reweighted by exp(reward / beta), beta {DPO_BETA:g}, which is what DPO aims at"
    )
    return "\n".join([lines[0], "  " + "-" * 74, *lines[1:], note])


def examples(prompts: list[str], before: Score, after: Score, count: int = 3) -> str:
    """The first review each model wrote for the first few prompts, with its hidden reward."""
    lines = []
    for i, prompt in enumerate(prompts[:count]):
        lines.append(f"  {prompt}")
        for name, result in (("before", before), ("after", after)):
            review = result.reviews[i][0]
            lines.append(f"    {name:<7}{hidden_reward(review):+d}  {textwrap.shorten(review, 100)}")
    return "\n".join(lines)
