"""Text and messages to token ids: prompts, and the responses that continue them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RowError
from .chat import prompt_text, response_text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Any, field: str = "prompt") -> list[int]:
    """Token ids of a prompt, text or messages, up to where the response begins; RowError where there is none.

    Prompt and response are tokenised apart: all responses then continue the same prompt tokens, the very ones from
    which generation starts.
    """
    text = prompt_text(tokenizer, prompt, field)
    is_chat = not isinstance(prompt, str)  # a template writes the special tokens itself
    ids = _ids(tokenizer, text, field, add_special_tokens=not is_chat)
    if not is_chat and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; this one goes on
    if not ids:
        raise RowError(field, "has no tokens: the first token of a response is predicted from the prompt's last")
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: Any, field: str) -> list[int]:
    """Token ids of what follows the prompt, up to and with the token that ends the turn; RowError where none do."""
    ids = _ids(tokenizer, response_text(tokenizer, prompt, response, field), field, add_special_tokens=False)
    if not ids:
        raise RowError(field, "all tokens are masked: the tokenizer makes no token of the response")
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, field: str, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise RowError(field, f"is not text: {error}") from error
    return tokenizer(text, add_special_tokens=add_special_tokens).input_ids


def encode_bounded_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, max_prompt_length: int, field: str = "prompt"
) -> list[int]:
    ids = encode_prompt(tokenizer, prompt, field)
    if len(ids) > max_prompt_length:
        raise RowError(field, f"has {len(ids)} tokens, over max_prompt_length={max_prompt_length}")
    return ids


def like_prompt(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt: text after text, a message of the assistant after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def is_empty(completion: Any) -> bool:
    """Whether a completion, text or messages, says nothing: `encode_response` refuses it."""
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        completion = completion[-1].get("content")
    return isinstance(completion, str) and not completion.strip()
