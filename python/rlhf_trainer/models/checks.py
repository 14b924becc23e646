"""Checks that a model, a tokenizer and the data fit together."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError

AT_MOST = "set max_length to at most {positions}"


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: any valid one serves, as padding is masked in attention and in labels."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values())


def have_same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both mean the same by an id, where both know the token: one may have more, such as a padding token."""
    vocabulary = other.get_vocab()
    return all(vocabulary.get(token, i) == i for token, i in tokenizer.get_vocab().items())


def check_vocabulary(model: PreTrainedModel, largest: int) -> None:
    """UsageError where the model does not embed `largest`, the largest id that the tokenizer makes."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise UsageError(
            f"the tokenizer does not belong to the model: its ids go up to {largest}, the model embeds {vocabulary} "
            f"tokens (ids up to {vocabulary - 1}). Pass the model's own tokenizer (tokenizer_name_or_path) or resize "
            "the model's embeddings and save it."
        )


def check_fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[int],
    lengths: Sequence[int],
    source: str,
    advice: str = AT_MOST,
) -> None:
    """UsageError where the model lacks a token id that the tokenizer can make, or a position that the data need.

    rows, lengths: of the examples, in tokens; `source` and `advice` are for the message.
    """
    check_vocabulary(model, largest_id(tokenizer))
    check_lengths(model, rows, lengths, source, advice)


def check_lengths(
    model: PreTrainedModel, rows: Sequence[int], lengths: Sequence[int], source: str, advice: str = AT_MOST
) -> None:
    """UsageError where the model has fewer positions than the longest example has tokens."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    if positions is not None and lengths[longest] > positions:
        raise UsageError(
            f"{source}, row {rows[longest]}: {lengths[longest]} tokens, but the model has {positions} positions; "
            + advice.format(positions=positions)
        )
