"""Rewards that models give: a reward model's value, and a classifier's log-odds."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..data.encoding import encode_rendering, is_empty, like_prompt
from ..data.examples import Prompt
from ..errors import RowError, UsageError
from ..models.checks import check_fit, check_vocabulary, largest_id, pad_id_of
from ..models.loading import load_codec, load_pretrained, load_tokenizer, loading_of
from ..models.scoring import batch_count, load_reward_model, score_sequences
from ..training.journal import RunBatch, batches_of_like_length
from .config import RewardsConfig

# Their positions begin behind that of the padding token, whatever their tables hold.
OFFSET_MODELS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm")


class ModelReward:
    """A reward model's value of prompt and completion, as the model's own tokenizer and chat template write them.

    A completion that did not end is scored as if it had ended there. An empty one is scored, too: the model's value of
    silence.
    """

    name = "reward_model"

    def __init__(self, name: str, config: RewardsConfig, device: torch.device, batch_size: int, *, key: str) -> None:
        self.source, self.device, self.batch_size = name, device, batch_size
        self.bf16 = config.bf16
        self.codec = load_codec(name, config, key=key)
        self.tokenizer = self.codec.tokenizer
        self.model = load_reward_model(name, key=key, **loading_of(config))
        check_vocabulary(self.model, largest_id(self.tokenizer))

    def check(self, prompts: Sequence[Prompt], source: str, max_completion_length: int) -> None:
        lengths = []
        for prompt in prompts:
            try:
                lengths.append(len(self._ids(prompt, "")) + max_completion_length)
            except RowError as error:
                raise UsageError(f"{source}, row {prompt.row}, for the tokenizer of {self.source}: {error}") from error
        advice = f"the reward model {self.source!r} reads {{positions}} tokens at most, prompt and completion together"
        check_fit(self.model, self.tokenizer, [prompt.row for prompt in prompts], lengths, source, advice)

    def batch_count(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> int:
        return batch_count(list(map(self.ids, prompts, texts)), self.batch_size)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str], run: RunBatch) -> Tensor:
        sequences = list(map(self.ids, prompts, texts))
        check_positions(self.model, self.source, prompts, [len(ids) for ids in sequences])
        return score_sequences(
            self.model, sequences, self.batch_size, pad_id_of(self.tokenizer), self.device, bf16=self.bf16, run=run
        )

    def ids(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of prompt and completion; UsageError naming the prompt where the tokenizer cannot make them."""
        try:
            return self._ids(prompt, text)
        except RowError as error:
            raise UsageError(f"the reward model {self.source!r}: row {prompt.row}, {error}") from error

    def _ids(self, prompt: Prompt, text: str) -> list[int]:
        if not isinstance(prompt.prompt, str):  # plain text has the opening in the prompt
            text = prompt.opened(text)
        completion = like_prompt(prompt.prompt, "" if is_empty(text) else text)
        return encode_rendering(self.codec, prompt.prompt, completion, "completion", prompt.options)


def check_positions(model: PreTrainedModel, name: str, prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
    """UsageError where a sequence has more tokens than the model has positions, naming its prompt."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and model.config.model_type in OFFSET_MODELS:
        positions -= model.config.pad_token_id + 1
    for prompt, length in zip(prompts, lengths, strict=True):
        if positions is not None and length > positions:
            raise UsageError(
                f"row {prompt.row}: prompt and completion are {length} tokens to the model {name!r}, which has "
                f"{positions} positions; let completions be shorter"
            )


class ClassifierReward:
    """The log-odds of one label, logit - log(sum of exp of the others' logits), of prompt and completion as one text.

    The model may be an encoder; it reads messages as their contents, a blank line between two. In fp32, whatever the
    configuration says of other models: of a logit rounded to bf16 three digits are left.
    """

    name = "classifier"

    def __init__(self, name: str, label: str, config: RewardsConfig, device: torch.device, batch_size: int) -> None:
        self.source, self.batch_size = name, batch_size
        self.tokenizer = load_tokenizer(name, key="reward_funcs", trust_remote_code=config.trust_remote_code)
        if self.tokenizer.pad_token_id is None:
            raise UsageError(f"reward_funcs: the tokenizer of the classifier {name!r} has no padding token")
        self.model = load_pretrained(
            AutoModelForSequenceClassification, name, "a classifier", key="reward_funcs",
            **loading_of(config) | {"dtype": torch.float32},
        ).to(device)  # fmt: skip
        check_vocabulary(self.model, largest_id(self.tokenizer))
        labels = {name: i for i, name in self.model.config.id2label.items()}
        if len(labels) < 2:
            raise UsageError(f"reward_funcs: {name!r} has one output, so it is a reward model: name it as model:{name}")
        if label not in labels:
            raise UsageError(
                f"reward_funcs: the classifier {name!r} has no label {label!r}; it has {', '.join(labels)}"
            )
        self.label = labels[label]
        # Some tokenizers write token types for models that take none.
        self.with_types = "token_type_ids" in inspect.signature(self.model.forward).parameters

    def check(self, prompts: Sequence[Prompt], source: str, max_completion_length: int) -> None:
        lengths = [len(self.tokenizer(joined(prompt)).input_ids) + max_completion_length for prompt in prompts]
        check_positions(self.model, self.source, prompts, lengths)

    def batch_count(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> int:
        return len(self.batches(self.encode(prompts, texts)))

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str], run: RunBatch) -> list[float]:
        encoded = self.encode(prompts, texts)
        check_positions(self.model, self.source, prompts, [len(ids) for ids in encoded])
        rewards = [0.0] * len(encoded)
        for positions in self.batches(encoded):
            whole = [joined(prompts[i], texts[i]) for i in positions]
            for i, reward in zip(positions, run(lambda whole=whole: self.log_odds(whole).tolist()), strict=True):
                rewards[i] = reward
        return rewards

    def encode(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer(joined(*pair)).input_ids for pair in zip(prompts, texts, strict=True)]

    def batches(self, encoded: Sequence[list[int]]) -> list[list[int]]:
        return batches_of_like_length([len(ids) for ids in encoded], self.batch_size)

    @torch.no_grad()
    def log_odds(self, texts: list[str]) -> Tensor:
        """[S] fp32 of S texts."""
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=self.with_types)
        logits = self.model(**inputs.to(self.model.device)).logits.float()  # [S, labels]
        others = [i for i in range(logits.shape[1]) if i != self.label]
        return (logits[:, self.label] - logits[:, others].logsumexp(1)).cpu()


def joined(prompt: Prompt, text: str = "") -> str:
    """Prompt and completion as one text."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt + text
    return "\n\n".join([*(message["content"] for message in prompt.prompt), text])
