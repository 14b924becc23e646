"""`rlhf demo`: a model from nothing, a known hidden reward, and the supervised pipeline raising it, on a CPU.

The language and its reward are described in language.py. Every stage is the one a user runs (`rlhf sft`, `reward`,
`sample`, `rejection`, `dpo`), on files such as a user would have; only the making of the first model, the annotator and
the measuring belong to the demo.
"""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_kernels as rk

from ...config.parse import dump_yaml
from ...data.batches import Batch, pad_sequences
from ...data.encoding import Codec
from ...data.examples import load_groups
from ...models.fused_lm import FusedLM, LMHead
from ...models.loading import load_causal_lm, save_model
from ...models.scoring import load_reward_model
from ...recipes.file import read_recipe
from ...recipes.run import run_stage
from ...training.journal import write_jsonl
from ...training.output_folder import CONFIG_FILE, check_replaceable, is_taken
from ..config import DemoConfig
from ..tiny import prefers_first, tiny_gpt2
from .curves import draw_curves
from .language import all_prompts, hidden_reward, make_tokenizer, write_review
from .measure import is_grammatical, report_of, sample_reviews, score

HELD_OUT_PROMPTS = 30
HELD_OUT_PAIRS_PER_PROMPT = 8
REVIEWS_PER_PROMPT = 16
POSITIONS = 64
LM_BATCH, LM_TOKENS = 64, 40
LM_PEAK_LEARNING_RATE = 7e-3
# The default, 0.1, would make a unit of reward worth a factor e^10: the language breaks on the way there.
DPO_BETA = 1.0
RECIPE = Path(__file__).with_name("recipe.yaml")

INTRODUCTION = """\
A small language: reviews of dishes at places, such as
    review of the soup at the harbour :  the soup was warm . the waiter was rude . i will happily return .
A hidden reward, which no model ever sees: +1 for every kind word (warm, helpful, happily, ...),
-1 for every unkind word (bland, rude, sadly, ...). The people here are as often pleased as not.
"""


def run(config: DemoConfig) -> Path:
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small are done before a second thread has woken up
    folder = make_folder(config)
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    prompts = all_prompts()
    rng.shuffle(prompts)
    held_out, train = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS:]
    print(INTRODUCTION)

    changes = {"seed": config.seed, "drawn": config.completions, "dpo_epochs": config.dpo_epochs, "beta": DPO_BETA}
    recipe = read_recipe(str(RECIPE), [f"{name}={value}" for name, value in changes.items()])
    stages = {stage.name: stage for stage in recipe.stages}

    print(f"1/5  Pretraining: a tiny GPT-2 reads text of the language from scratch, in {config.lm_steps} steps.")
    tokenizer = make_tokenizer()
    base = tiny_gpt2(len(tokenizer), POSITIONS, width=96, layers=2)
    nats = train_lm(base, lambda: running_text(tokenizer, prompts, rng), config.lm_steps, LM_PEAK_LEARNING_RATE)
    save_model(base, tokenizer, folder / "base_model")
    stops = ends_in_time(base, tokenizer, held_out, config.seed)
    print(f"     {sum(p.numel() for p in base.parameters()):,} weights, {nats:.2f} nats a token at the end.")
    print(f"     Asked for a review, it writes on and on: {stops:.0%} are one review and stop.\n")

    print(f"2/5  SFT: {config.demonstrations} demonstrations, a prompt and one review each.")
    demonstrations = [
        {"prompt": p, "completion": f" {write_review(p, rng)}"} for p in rng.choices(train, k=config.demonstrations)
    ]
    write_jsonl(folder / "demonstrations.jsonl", demonstrations)
    run_stage(stages["sft_model"], folder)
    sft = load_causal_lm(str(folder / "sft_model"), key="sft_model")
    print(f"     Of its answers, {ends_in_time(sft, tokenizer, held_out, config.seed):.0%} are one review and stop.\n")

    print("3/5  An annotator who knows the hidden reward, but errs, compares reviews; a reward model learns from that.")
    repeated = [train[i % len(train)] for i in range(config.pairs)]
    right = write_preferences(folder / "preferences.jsonl", sft, tokenizer, repeated, rng)
    write_preferences(folder / "held_out.jsonl", sft, tokenizer, held_out * HELD_OUT_PAIRS_PER_PROMPT, rng)
    print(
        f"     {config.pairs} pairs; where rewards differ, the annotator chose the higher one in {right:.0%} of them."
    )
    run_stage(stages["reward_model"], folder)

    print(f"\n4/5  Rejection sampling: {config.completions} reviews a prompt, of which the best 4 are learned.")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in train])
    for name in ("completions", "selected", "rejection_model"):
        run_stage(stages[name], folder)

    print(f"\n5/5  DPO on the same pairs, without the reward model, with beta {DPO_BETA}.")
    run_stage(stages["dpo_model"], folder)

    print("\nOn prompts that no stage after pretraining has seen:\n")
    groups = load_groups(
        str(folder / "held_out.jsonl"), Codec(tokenizer), split="train", max_prompt_length=16, max_length=POSITIONS
    ).examples
    reward_model = load_reward_model(str(folder / "reward_model"), key="reward_model_name_or_path")
    scores = {}
    for name, stage in (("SFT", "sft_model"), ("rejection", "rejection_model"), ("DPO", "dpo_model")):
        model = load_causal_lm(str(folder / stage), key=stage)
        repeated = held_out * REVIEWS_PER_PROMPT
        scores[name] = score(model, sft, reward_model, tokenizer, repeated, groups, config.seed)
    report = report_of(held_out, scores, DPO_BETA)
    print(report)
    (folder / "report.txt").write_text(f"{INTRODUCTION}\n{report}\n", encoding="utf-8")
    rewards = {name: result.rewards for name, result in scores.items()}
    draw_curves(folder / "dpo_model" / "metrics.jsonl", rewards, folder / "curves.png")
    print(f"\nCurves: {folder / 'curves.png'}. Models, data and the metrics of each step lie beside it.")
    print(f"All this took {time.perf_counter() - started:.0f} s. For models and data of your own: rlhf --help")
    return folder


def make_folder(config: DemoConfig) -> Path:
    """output_dir, or without --overwrite_output_dir the first free of output_dir, output_dir-2, output_dir-3, ..."""
    folder, number = Path(config.output_dir), 2
    if config.overwrite_output_dir:
        check_replaceable(folder)
        shutil.rmtree(folder, ignore_errors=True)
    while is_taken(folder):
        folder, number = Path(f"{config.output_dir}-{number}"), number + 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(dump_yaml(config), encoding="utf-8")
    return folder


def train_lm(model: PreTrainedModel, draw: Callable[[], Batch], steps: int, peak: float) -> float:
    """Language modelling on batches of running text; returns the last step's loss in nats a token."""
    fused = FusedLM(model)
    optimizer = torch.optim.AdamW(fused.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
    loss = torch.tensor(0.0)
    for _ in tqdm(range(steps), desc="pretraining", unit="step", disable=None):
        batch = draw()
        loss = fused(batch, lambda hidden, head, batch=batch: mean_nats(hidden, head, batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def running_text(tokenizer: PreTrainedTokenizerBase, prompts: list[str], rng: random.Random) -> Batch:
    """LM_BATCH pieces of text in which one review follows the other, [LM_BATCH, LM_TOKENS]; nothing marks an end."""
    rows = []
    for _ in range(LM_BATCH):
        ids: list[int] = []
        while len(ids) < LM_TOKENS:
            prompt = rng.choice(prompts)
            ids += tokenizer(f"{prompt} {write_review(prompt, rng)}").input_ids
        rows.append(([], ids[:LM_TOKENS]))
    return pad_sequences(rows, pad_id=0)


def mean_nats(hidden: Tensor, head: LMHead, batch: Batch) -> Tensor:
    """-log p of a learned token, mean over all of them; hidden [S, T, D] -> scalar."""
    logprobs, counts = rk.sequence_logprobs(hidden, head.weight, batch.labels, **head.options())
    return -logprobs.sum() / counts.sum()


def ends_in_time(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int) -> float:
    """The share of answers that are one review of the language, and nothing else."""
    reviews = sample_reviews(model, tokenizer, prompts, seed)
    return fmean(map(is_grammatical, prompts, reviews))


def write_preferences(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], rng: random.Random
) -> float:
    """Writes two reviews for each prompt, compared by the annotator, as rows of a JSONL file.

    Returns how often the annotator chose the one with the higher reward, where they differ.
    """
    right, rows = [], []
    both = [sample_reviews(model, tokenizer, prompts, seed=rng.getrandbits(32)) for _ in range(2)]
    for prompt, a, b in zip(prompts, *both, strict=True):
        if not (a and b):  # nobody is shown an empty review
            continue
        rewards = hidden_reward(a), hidden_reward(b)
        chosen, rejected = (a, b) if prefers_first(*rewards, rng) else (b, a)
        if rewards[0] != rewards[1]:
            right.append(hidden_reward(chosen) == max(rewards))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_jsonl(path, rows)
    return sum(right) / max(1, len(right))
