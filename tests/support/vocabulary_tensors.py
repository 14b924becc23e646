"""Watching for tensors as wide as the vocabulary."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestVocabularyTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor, made by any op, whose last dimension is the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 1 and leaf.shape[-1] == self.vocabulary:
                self.elements = max(self.elements, leaf.numel())
        return result
