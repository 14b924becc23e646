"""Completions of causal language models, the same on every run: seeded batch by batch, by nothing but the arguments."""

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..models.checks import pad_id_of
from ..training.journal import RunBatch, batches_of_like_length, compute_only

NAMED = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
T = TypeVar("T")
TAIL = 16  # tokens of a prompt that a completion is decoded behind: more than a character has, or a run of bytes


class Sampling(NamedTuple):
    """The options of drawing a token: from logits over temperature, the top_k of them, and of these the top_p."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0


class Completion(NamedTuple):
    """The tokens that a model wrote after a prompt, without padding; `finished`: the last one ends the sequence.

    `logprobs`: of each of ids, nats, under the distribution that it was drawn from: of the logits over the temperature,
    renormalised over what top_k and top_p left. At temperature 0, where nothing is drawn, under the model's own.
    """

    ids: list[int]
    finished: bool
    logprobs: list[float] | None = None
    learned: list[bool] | None = None  # which of ids the model drew, where an environment's are between them
    reward: float | None = None  # the environment's

    def own(self, values: list[T]) -> list[T]:
        """Of one value for each of ids those of what the model drew."""
        return values if self.learned is None else list(compress(values, self.learned))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    seed: int,
    bf16: bool = False,
    run: RunBatch = compute_only,
) -> list[Completion]:
    """One completion for each of prompts (token ids), in their order; a prompt may be there several times.

    `run` runs each batch; that of a `Journal` keeps the results.
    """
    completions: list[Completion | None] = [None] * len(prompts)
    for number, positions in enumerate(batches_of_like_length([len(prompt) for prompt in prompts], batch_size)):

        def write(number: int = number, positions: list[int] = positions) -> list[Completion]:
            batch = [prompts[i] for i in positions]
            return generate_batch(model, tokenizer, batch, sampling, seed=seed, number=number, bf16=bf16)

        for i, completion in zip(positions, run(write), strict=True):
            completions[i] = Completion(*completion)  # what was kept as JSON is a list
    return completions


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    seed: int,
    number: int,
    bf16: bool = False,
    with_logprobs: bool = False,
) -> list[Completion]:
    """One completion for each prompt, all at once; draws depend on (seed, number) and leave torch's own state alone.

    As far as the model's cache has rows, a prompt that is there several times goes through the model once; when half
    of the completions have ended, `generate` is called anew for the others.
    """
    width = max(len(prompt) for prompt in prompts)
    pad_id, ends, device = pad_id_of(tokenizer), end_ids(model, tokenizer), model.device
    # Padded on the left, so that each prompt's last token is where generation begins.
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    distinct, places = torch.unique(torch.stack([ids, mask], dim=1), dim=0, return_inverse=True)
    # The distribution is made here: in a config, top_k would be 50 by default, and warpers would come after `keeper`.
    draws = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}
    draws |= {"pad_token_id": pad_id, "eos_token_id": ends or None}
    options = {"synced_gpus": False}  # where weights are sharded, they are whole now: `unsharded`
    rows, end_tokens = list(range(len(prompts))), ids.new_tensor(ends)
    drawn, logprobs = [[] for _ in rows], [[] for _ in rows]  # of each row, maybe with padding behind its end

    def half_ended(input_ids: Tensor, _scores: Tensor, **_: object) -> Tensor:  # stops all rows, or none
        ended = torch.isin(input_ids[:, ids.shape[1] :], end_tokens).any(1)
        return (2 * ended.sum() >= len(ended)).expand(len(ended))

    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        without_own_settings(model),
        without_checkpointing(model),
    ):
        torch.manual_seed(random.Random(f"{seed}, batch {number}").getrandbits(63))
        if (cache := cache_of_rows(model)) is not None:
            options |= {"past_key_values": cache, "stopping_criteria": StoppingCriteriaList([half_ended])}
        if cache is not None and len(distinct) < len(prompts) and min(map(len, prompts)) > 1:
            first = GenerationConfig(max_new_tokens=1, pad_token_id=pad_id)  # a token that is thrown away
            model.generate(distinct[:, 0, :-1], attention_mask=distinct[:, 1, :-1], generation_config=first, **options)
            cache.batch_select_indices(places)
        while rows:
            settings = GenerationConfig(max_new_tokens=sampling.max_new_tokens - len(drawn[rows[0]]), **draws)
            keeper = DrawnLogprobs()
            processors = LogitsProcessorList([*warpers(sampling), *([keeper] if with_logprobs else [])])
            out = model.generate(
                ids, attention_mask=mask, generation_config=settings, logits_processor=processors, **options
            )
            new = out[:, ids.shape[1] :]
            kept = keeper.of(new).tolist() if with_logprobs else [[]] * len(rows)
            for row, tokens, values in zip(rows, new.tolist(), kept, strict=True):
                drawn[row] += tokens
                logprobs[row] += values
            if len(drawn[rows[0]]) == sampling.max_new_tokens:
                break
            going = [k for k, row in enumerate(rows) if not up_to_end(drawn[row], ends).finished]
            rows, ids = [rows[k] for k in going], out[going]
            mask = torch.cat([mask[going], torch.ones_like(new[going])], dim=1)
            if cache is not None:
                cache.batch_select_indices(going)
    completions = [up_to_end(row, ends) for row in drawn]
    if not with_logprobs:
        return completions
    return [done._replace(logprobs=row[: len(done.ids)]) for done, row in zip(completions, logprobs, strict=True)]


def cache_of_rows(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache of the model's whose rows can be selected and repeated; None where it has states of other kinds
    beside keys and values (state space models, hybrids), which a cache does not select."""
    cache = DynamicCache(config=model.config)
    known = (DynamicLayer, DynamicSlidingWindowLayer)  # and not what inherits from them, as hybrids' layers do
    takes_it = "past_key_values" in inspect.signature(model.forward).parameters
    return cache if takes_it and cache.layers and all(type(layer) in known for layer in cache.layers) else None


def warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """The processors that make of logits those of the distribution to draw from; none at temperature 0."""
    if sampling.temperature == 0:
        return []
    return [
        *([TemperatureLogitsWarper(float(sampling.temperature))] if sampling.temperature != 1 else []),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
    ]


class DrawnLogprobs(LogitsProcessor):
    """Stands behind all other processors and keeps the log-prob of each token drawn: [B] a step.

    A processor sees a step's scores before the draw. So it holds them until the next step, whose input ends in what was
    drawn: one [B, V] at a time, where `output_scores` would keep one of every step.
    """

    def __init__(self) -> None:
        self.scores: Tensor | None = None  # [B, V] fp32, of the step whose token is not known yet
        self.logprobs: list[Tensor] = []  # [B] fp32 each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores is not None:
            self._take(input_ids[:, -1])
        self.scores = scores
        return scores

    def of(self, drawn: Tensor) -> Tensor:
        """drawn [B, steps], the tokens as generated -> their log-probs [B, steps]; meaningless behind a row's end."""
        steps = drawn.shape[1]
        if len(self.logprobs) < steps:  # else generate ran ahead of its stopping check, and took steps back
            self._take(drawn[:, -1])
        return torch.stack(self.logprobs[:steps], dim=1)

    def _take(self, drawn: Tensor) -> None:
        chosen = self.scores.gather(1, drawn[:, None])[:, 0]
        self.logprobs.append(chosen - self.scores.logsumexp(dim=1))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which nothing follows: those of the model's generation_config, and the tokenizer's eos.

    Both, because a model may know several (<|im_end|>, <|endoftext|>) where its tokenizer knows one, and because what
    a model was trained to end with is the tokenizer's (`encode_response`), which its generation_config may not say.
    """
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({id for id in [*own, tokenizer.eos_token_id] if id is not None})


def up_to_end(ids: list[int], ends: list[int]) -> Completion:
    """ids as generated, maybe with padding behind the end; padding and end may be the same token."""
    end = next((i for i, id in enumerate(ids) if id in ends), None)
    return Completion(ids, False) if end is None else Completion(ids[: end + 1], True)


def completion_text(tokenizer: PreTrainedTokenizerBase, completion: Completion, prompt_ids: Sequence[int]) -> str:
    """The text that continues the prompt's, without the end and without the tokenizer's own named special tokens.

    Other special tokens stay: tags such as <think> are some models' tokens of their own. The text is decoded in its
    place, behind the prompt's last tokens, as decoders may drop the space that a text begins with; where they make
    another text of the prompt with the completion behind it (of bytes that are no character, say), apart.
    """
    named = {getattr(tokenizer, f"{name}_token_id") for name in NAMED}
    ids = [id for id in completion.ids[: -1 if completion.finished else None] if id not in named]
    tail = list(prompt_ids[-TAIL:])
    before, whole, apart = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (tail, tail + ids, ids)
    )
    return whole[len(before) :] if whole.startswith(before) else apart


@contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no generation_config of its own.

    `generate` takes options that are not passed from there (repetition_penalty, min_length, suppressed tokens, ...):
    the samples would not be from the distribution that losses and KL are computed of.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def without_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, blocks do not checkpoint gradients: in train mode, one that does leaves its cache of keys and values
    empty, and every token after the first would be drawn as if nothing stood before it."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    trained = [block.training for block in blocks]
    for block in blocks:
        block.training = False
    try:
        yield
    finally:
        for block, was in zip(blocks, trained, strict=True):
            block.training = was
