"""How scratch memory is divided: plain arithmetic, checked without running a kernel."""

import pytest

MIB = 1 << 20
HEADS = [  # V, D: tiny; GPT-2; Llama 3 8B; Gemma 2 2B; Qwen 3; wider than any tile's budget
    (1, 1),
    (50257, 768),
    (128256, 4096),
    (256000, 2304),
    (151936, 1024),
    (1000, 65536),
]


@pytest.fixture
def compiled(native):
    from rlhf_kernels import _C

    return _C


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("vocab", "hidden"), HEADS)
def test_a_row_is_cut_the_same_whatever_the_batch(compiled, vocab, hidden, element_size):
    """Tiles and splits follow from the head alone: the batch, the budget and the threads may not move a boundary."""
    cuts = {
        compiled.plan_forward(rows, vocab, hidden, element_size, budget * MIB, threads)[:3]
        for rows in (1, 64, 65, 100_000)
        for budget in (8, 64, 4096)
        for threads in (1, 2, 96)
    }
    assert len(cuts) == 1
    ((tile, split, splits),) = cuts
    assert split % tile == 0 and (splits - 1) * split < vocab <= splits * split


@pytest.mark.parametrize("rows", [0, 1, 1000, 16384, 1_000_000])
@pytest.mark.parametrize(("vocab", "hidden"), HEADS[:-1])
@pytest.mark.parametrize("budget", [8, 64, 256])
def test_backward_fits_the_budget(compiled, rows, vocab, hidden, budget):
    tile, group, chunk, scratch = compiled.plan_backward(rows, vocab, hidden, 2, budget * MIB)
    assert group % tile == 0 and chunk % 64 == 0 and chunk >= 64
    assert scratch <= budget * MIB, f"{scratch / MIB:.0f} MiB of {budget}"


def test_forward_takes_rows_in_chunks_where_all_would_not_fit(compiled):
    *_, chunk, _ = compiled.plan_forward(1_000_000, 128256, 4096, 2, 64 * MIB, 2)
    assert chunk % 64 == 0
    assert chunk * 4096 * 2 <= 64 * MIB < 1_000_000 * 4096 * 2


def test_small_vocabularies_still_give_every_thread_work(compiled):
    _, _, splits, _, groups = compiled.plan_forward(4096, 1000, 512, 2, 64 * MIB, 8)
    assert splits == 1 and groups >= 8
