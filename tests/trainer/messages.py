"""Conversations of one message, as they stand in rows of data."""


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]
