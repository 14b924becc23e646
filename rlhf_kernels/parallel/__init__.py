"""The losses over a head that is split over the ranks of a process group (tensor parallel), and over sequences that are
(context parallel). Same arguments as the functions of the same names in `rlhf_kernels`, and the groups.

Vocabulary. Each rank holds rows of the head: weight [V_local, D], bias [V_local], in the order of the ranks; shards may
be of any sizes, empty ones included. Pass `group`, or a weight that is a DTensor sharded on dim 0 over a 1-D mesh, from
which group and sizes follow. hidden, targets and everything else are replicated: the same on every rank of the group.
So are the results, bit for bit. A loss made of them is computed on every rank alike, and its backward gives each rank

    hidden         the whole gradient, already summed over the group: do not sum it again
    weight, bias   that of its own rows

Gradients cannot be differentiated again: create_graph=True raises, with every backend.

Sequences. With `sequence_group` each rank holds a part of every sequence's positions. Results are per whole sequence,
replicated over that group too; backward gives each rank the gradient of its own positions, once. The head's gradient is
then that of these positions as well: sum it over the group (a wrapper that takes means divides by its size).

Communicated, per row that counts: forward one all-gather of each rank's statistics, 4 bytes (the reference backend: 8)
times 3 for log-probs and 1 for each other output, times 7 for a KL; backward one all-reduce of the gradient of hidden,
4 D bytes. Ranks merge in one order, so that a row's bits do not depend on the other rows. With `group` some integers go
round first, by which ranks exchange the sizes of their shards and whether their arguments fit together; a DTensor knows
its sizes, and compiles without a graph break. Sums over sequences: 16 bytes a sequence.

What a rank refuses (a wrong shape, a target out of range), and arguments that differ between ranks, raise on every rank
of `group` and of `sequence_group`. Two mistakes leave ranks waiting for each other until their group's timeout: that
some do not call at all, and that only some of them raise where each checks for itself: with a DTensor, and the options,
pairs and reference of `linear_dpo_loss`.
"""

from .dpo import linear_dpo_loss
from .kl import linear_kl
from .logprobs import linear_logprobs
from .sequences import sequence_logprobs

__all__ = ["linear_dpo_loss", "linear_kl", "linear_logprobs", "sequence_logprobs"]
