"""Freed memory goes back before the embeddings' gradient comes."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf_trainer.training import memory


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))


@pytest.fixture
def gradients_at_trims(model, monkeypatch):
    """Which parameters had gradients at each call of malloc_trim."""
    calls = []

    def trim(_pad):
        calls.append([name for name, weight in model.named_parameters() if weight.grad is not None])

    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trim))
    return calls


def test_trimmed_once_a_backward_behind_all_but_the_embeddings(model, gradients_at_trims, monkeypatch):
    monkeypatch.setattr(memory, "LARGE_BYTES", model[0].weight.nbytes)
    memory.give_back_freed_memory(model)
    model(torch.tensor([1, 2])).sum().backward()
    assert gradients_at_trims == [["1.weight", "1.bias"]]
    with torch.no_grad():
        model(torch.tensor([1]))
    assert len(gradients_at_trims) == 1


def test_small_or_frozen_embeddings_cost_nothing(model, gradients_at_trims, monkeypatch):
    memory.give_back_freed_memory(model)
    model(torch.tensor([1, 2])).sum().backward()
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    memory.give_back_freed_memory(model.requires_grad_(False))
    model[1].requires_grad_()
    model(torch.tensor([1, 2])).sum().backward()
    assert gradients_at_trims == []
