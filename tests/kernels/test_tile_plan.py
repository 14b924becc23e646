"""The division of scratch memory: plain arithmetic, checked without running a kernel."""

import itertools

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

ROWS = [0, 1, 1000, 16384, 1_000_000]


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


@pytest.mark.parametrize(("vocab", "hidden"), HEADS[:-1])
def test_backward_fits_the_budget(compiled, vocab, hidden):
    for rows, budget in itertools.product(ROWS, (8, 64, 256)):
        tile, group, chunk, scratch = compiled.plan_backward(rows, vocab, hidden, 2, budget * MIB)
        assert group % tile == 0 and chunk % 64 == 0 and chunk >= 64, (rows, budget)
        assert scratch <= budget * MIB, f"{scratch / MIB:.0f} MiB of {budget} for {rows} rows"


def test_forward_takes_rows_in_chunks_where_all_would_not_fit(compiled):
    *_, chunk, _ = compiled.plan_forward(1_000_000, 128256, 4096, 2, 64 * MIB, 2)
    assert chunk % 64 == 0
    assert chunk * 4096 * 2 <= 64 * MIB < 1_000_000 * 4096 * 2


def test_small_vocabularies_still_give_every_thread_work(compiled):
    _, _, splits, _, groups = compiled.plan_forward(4096, 1000, 512, 2, 64 * MIB, 8)
    assert splits == 1 and groups >= 8


GPUS = [40 * MIB, 50 * MIB, 126 * MIB]  # L2 of A100, H100 and H200, B200


@pytest.mark.parametrize("l2", GPUS)
@pytest.mark.parametrize(("vocab", "hidden"), HEADS[:-1])
def test_a_gpus_scratch_fits_the_budget(compiled, l2, vocab, hidden):
    both = (False, True)
    for rows, heads, copies, backward in itertools.product(ROWS, (1, 2), both, both):
        for element_size, budget in ((2, 256), (4, 256), (2, 64)):
            sizes = (rows, vocab, hidden, heads, element_size, copies, copies, backward, l2, budget * MIB)
            tile, _, group, chunk, held, scratch = compiled.plan_device(*sizes)
            assert tile >= 1 and group % tile == 0 and chunk >= 1 and held >= 1, sizes
            if backward or not copies:  # forward keeps 32 bytes a row, whatever is held
                assert scratch <= budget * MIB, f"{scratch / MIB:.0f} MiB of {budget} for {sizes}"


@pytest.mark.parametrize("l2", GPUS)
@pytest.mark.parametrize(("vocab", "hidden"), HEADS)
def test_a_gpus_tile_and_its_slice_of_the_head_stay_in_l2(compiled, vocab, hidden, l2):
    plans = {
        compiled.plan_device(rows, vocab, hidden, 1, 2, False, copies, False, l2, budget * MIB)[:2]
        for rows in (1, 8192)
        for copies in (False, True)
        for budget in (64, 256)
    }
    assert len(plans) == 1, "tiles follow from the head and the device, not from the batch, its mask or the budget"
    tile, rows = plans.pop()
    slice_bytes = tile * hidden * 2
    assert 4 * tile * rows + (slice_bytes if hidden < 65536 else 0) <= l2


def test_the_usual_case_needs_no_second_pass(compiled):
    """8192 tokens of Llama 3 8B: operands in place, dlogits of several tiles at a time, dW written as it is."""
    tile, _, group, chunk, held, scratch = compiled.plan_device(
        8192, 128256, 4096, 1, 2, False, False, True, 50 * MIB, 224 * MIB
    )
    assert held == 8192 and group >= 4 * tile and chunk >= 1024
    assert scratch <= 224 * MIB
