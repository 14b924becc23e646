"""linear_dpo_loss of packed sequences equals that of padded rows; torch.compile traces both packed functions."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import testing as T
from tests.kernels.packed_batches import Packed, assert_same, both_forms

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = [9, 5, 64, 3, 17, 40]


def reference_of(batch, kind):
    """Keyword arguments for the packed call, and for the padded one."""
    if kind == "none":
        return {}, {}
    if kind == "logps":
        arguments = {"ref_logps": -T.randn(len(batch.lengths), seed=9, device=batch.cu.device).abs() * 20}
        return arguments, arguments
    ref = T.make_head(len(batch.labels), 36, 129, dtype=batch.hidden.dtype, bias=True, seed=50, device=batch.cu.device)
    head = {"ref_weight": ref.weight, "ref_bias": ref.bias}
    return {"ref_hidden": ref.hidden, **head}, {"ref_hidden": batch.padded(ref.hidden)[0], **head}


def check(backend, batch, reference="logps", **options):
    """Everything that the loss returns, and its gradients."""
    packed_reference, padded_reference = reference_of(batch, reference)
    results = []

    def op(leaves, hidden, labels, packing):
        ref = packed_reference if packing else padded_reference
        out = rk.linear_dpo_loss(
            hidden, leaves[1], labels, bias=leaves[2], beta=0.05, backend=backend, **options, **ref, **packing
        )
        results.append(out)
        return out.loss

    assert_same(backend, *both_forms(batch, op), batch.hidden.dtype)
    packed, padded = results
    assert packed.policy_logps.shape == (len(batch.lengths),)
    for got, want in zip(packed[1:], padded[1:], strict=True):
        if reference == "none" and want is None:  # ref_logps
            assert got is None
            continue
        assert not got.requires_grad and (backend != "native" or torch.equal(got, want))
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference", ["logps", "hidden"])
def test_equals_the_padded_form(backend, device, reference, dtype):
    check(backend, Packed(LENGTHS, dtype=dtype, device=device), reference)


def test_length_normalised_and_reference_free_types(backend, device):
    """They divide by token counts, which are those of the packed sequences."""
    batch = Packed(LENGTHS, device=device)
    check(backend, batch, "hidden", loss_type="ipo_mean")
    check(backend, batch, "none", loss_type="simpo")


def test_index_pairs_are_numbers_of_sequences(backend, device):
    """The number of sequences is odd; one is empty, and one is in two pairs."""
    batch = Packed([9, 5, 0, 3, 17], device=device)
    pairs = {"chosen_idxs": [0, 4, 2], "rejected_idxs": [1, 1, 3]}
    check(backend, batch, **{name: torch.tensor(side, device=device) for name, side in pairs.items()})


@pytest.mark.parametrize("rows", [1, 2])
def test_position_ids_and_cu_seqlens_are_one(backend, device, rows):
    batch = Packed([9, 5, 4, 10], device=device)  # two rows of fourteen
    ref = reference_of(batch, "hidden")[0]
    want = rk.linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, cu_seqlens=batch.cu, backend=backend, **ref
    )  # fmt: skip
    shape = (rows, 28 // rows)
    ref["ref_hidden"] = ref["ref_hidden"].view(*shape, -1)
    got = rk.linear_dpo_loss(
        batch.hidden.view(*shape, -1), batch.weight, batch.labels.view(shape),
        position_ids=batch.position_ids().view(shape), backend=backend, **ref,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


FUNCTIONS = {
    "sequence_logprobs": lambda *args, **options: rk.sequence_logprobs(*args, **options).logprobs.sum(),
    "linear_dpo_loss": lambda *args, **options: rk.linear_dpo_loss(*args, loss_type="simpo", **options).loss,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_in_one_graph_for_all_lengths(backend, device, name):
    """cu_seqlens travels as an argument; neither its values nor its length nor the number of tokens is a constant."""
    torch.compiler.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def op(hidden, weight, labels, cu_seqlens):
        return FUNCTIONS[name](hidden, weight, labels, cu_seqlens=cu_seqlens, backend=backend)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counting)
    for lengths in ([9, 5, 4, 10], [3, 4, 17, 8, 2, 5], [4, 5, 9, 10], [0, 0, 70, 6]):
        batch = Packed(lengths, device=device)
        eager_leaves, leaves = T.leaves_of(batch.leaves[:2]), T.leaves_of(batch.leaves[:2])
        want, got = op(*eager_leaves, batch.labels, batch.cu), compiled(*leaves, batch.labels, batch.cu)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
        grads = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, eager_leaves), strict=True)
        assert all(T.relative_error(a, b) < 3e-6 for a, b in grads)
    assert len(graphs) == 1, f"{len(graphs)} graphs for four packings"


def test_compiled_graphs_make_wrong_cu_seqlens_nan(backend, device):
    """Nothing can be read back there. Neither is anything read out of bounds, and every gradient is NaN as well."""
    torch.compiler.reset()
    batch = Packed([4, 6], d=8, v=17, masked=0.0, device=device)

    def op(hidden, weight, cu_seqlens):
        return rk.sequence_logprobs(hidden, weight, batch.labels, cu_seqlens=cu_seqlens, backend=backend)

    leaves = T.leaves_of(batch.leaves[:2])
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for cu in ([0, 4, 9], [1, 4, 10], [0, 6, 4, 10], [0, 2**40, 10], [0, -(2**40), 10]):
        got = compiled(*leaves, torch.tensor(cu, device=device))
        assert got.logprobs.isnan().all() and got.logprobs.shape == (len(cu) - 1,), cu
        assert (got.token_counts >= 0).all() and got.token_counts.sum() <= 10, cu
        assert all(grad.isnan().any() for grad in torch.autograd.grad(got.logprobs.sum(), leaves)), cu


def test_compiled_graphs_refuse_position_ids(backend, device):
    torch.compiler.reset()
    batch = Packed([4, 6], d=8, v=17, device=device)

    def op(position_ids):
        packing = {"position_ids": position_ids, "backend": backend}
        return rk.sequence_logprobs(batch.hidden, batch.weight, batch.labels, **packing).logprobs

    with pytest.raises(Exception, match="cannot be done while a graph is traced or captured: pass cu_seqlens"):
        torch.compile(op, backend="aot_eager")(batch.position_ids())
