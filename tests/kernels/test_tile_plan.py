"""The division of scratch memory: plain arithmetic, checked without running a kernel."""

import itertools
from pathlib import Path

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


# --- on a GPU ---

GPUS = {  # multiprocessors, bytes of L2
    "A100": (108, 40 * MIB),
    "H100": (132, 50 * MIB),
    "H200": (132, 60 * 10**6),
    "B200": (148, 126 * 10**6),
}
SHAPES = [  # N, D, V: those of benchmarks/on_gpu.py, and the one of published figures
    *((8192, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 151936), (4096, 1024, 50257)),
    (8192, 4096, 151936),
]
BUDGET = (256 - 32) * MIB  # the default, less what cuBLASLt works in
NOTES = Path(__file__).resolve().parents[2] / "docs" / "gpu-notes.md"


def plan_of(shape, gpu="H100", budget=BUDGET, **options):
    from rlhf_kernels import _C

    (rows, hidden, vocab), (multiprocessors, l2) = shape, GPUS[gpu]
    return _C.plan_device(
        rows, vocab, hidden, multiprocessors=multiprocessors, l2_bytes=l2, budget=budget, **options
    )  # fmt: skip


def utilisation(gpu, rows, columns):
    """Of the multiprocessors by one product, in tiles of 128 x 256."""
    ctas, multiprocessors = -(-rows // 128) * -(-columns // 256), GPUS[gpu][0]
    return ctas / (-(-ctas // multiprocessors) * multiprocessors)


def table():
    """The plans, for docs/gpu-notes.md: `python -m tests.kernels.test_tile_plan`."""
    lines = [
        "| GPU | N, D, V | forward: rows x columns | slices | waves | used | backward: rows x columns | waves | used | "
        "dlogits held | dW, dH used | scratch, MiB |",
        "| --- " * 12 + "|",
    ]
    for gpu in GPUS:
        for shape in SHAPES:
            n, d, v = shape
            f, b = plan_of(shape, gpu), plan_of(shape, gpu, backward=True)
            sizes = [f"{p['row_chunk']} x {p['tile']}" for p in (f, b)]
            used = [f"{p['waves']:.2f} | {p['utilisation']:.2f}" for p in (f, b)]
            held, group = b["rows_at_once"], b["vocab_group"]
            behind = f"{utilisation(gpu, group, d):.2f}, {utilisation(gpu, held, d):.2f}"
            scratch = f"{f['bytes'] / MIB:.0f}, {b['bytes'] / MIB:.0f}"
            lines.append(
                f"| {gpu} | {n}, {d}, {v} | {sizes[0]} | {-(-v // f['tile'])} | {used[0]} | {sizes[1]} | {used[1]} | "
                f"{held} x {group} | {behind} | {scratch} |"
            )
    return "\n".join(lines)


def test_the_notes_have_the_plans(compiled):
    assert table() in NOTES.read_text(), "`python -m tests.kernels.test_tile_plan` prints the table for the notes"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gpu", GPUS)
def test_a_gpus_waves_are_full(compiled, gpu, shape, backward):
    """Two to four waves a tile; the whole pass, ends of rows and vocabulary included, leaves a tenth idle at most."""
    for heads in (1, 2):
        plan = plan_of(shape, gpu, heads=heads, backward=backward)
        assert plan["utilisation"] >= 0.9, plan
        assert 1.9 <= plan["waves"] <= 4, plan


def tiles_of(total, tile):
    return [min(tile, total - begin) for begin in range(0, total, tile)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gpu", GPUS)
def test_utilisation_is_what_the_products_use(compiled, gpu, shape):
    """Counted here product by product."""
    rows, _, vocab = shape
    for backward in (False, True):
        plan, ctas, waves = plan_of(shape, gpu, backward=backward), 0, 0
        for m, n in itertools.product(tiles_of(rows, plan["row_chunk"]), tiles_of(vocab, plan["tile"])):
            here = -(-m // 128) * -(-n // 256)
            ctas, waves = ctas + here, waves + -(-here // GPUS[gpu][0])
        assert plan["utilisation"] == pytest.approx(ctas / (waves * GPUS[gpu][0]))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("vocab", "hidden"), HEADS)
def test_a_gpus_slices_are_equal(compiled, gpu, vocab, hidden):
    """Whole columns of CTAs, no more slices than such sizes need, and no sliver at the end."""
    for backward, heads in itertools.product((False, True), (1, 2)):
        tile = plan_of((8192, hidden, vocab), gpu, backward=backward, heads=heads)["tile"]
        if tile >= vocab:
            assert tile % 64 == 0 and tile < vocab + 64
            continue
        blocks, columns = -(-vocab // 256), tile // 256
        slices = -(-blocks // columns)
        assert tile % 256 == 0 and columns == -(-blocks // slices)
        assert 2 * (blocks - (slices - 1) * columns) >= columns


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("vocab", "hidden"), HEADS[:-1])
def test_a_gpus_scratch_fits_the_budget(compiled, gpu, vocab, hidden):
    both = (False, True)
    for rows, heads, copies, bias, backward in itertools.product(ROWS, (1, 2), both, both, both):
        for element_size, budget in ((2, 224), (4, 224), (2, 56)):
            options = {"heads": heads, "cast_weight": copies, "copy_hidden": copies, "bias": bias, "backward": backward}
            plan = plan_of((rows, hidden, vocab), gpu, budget * MIB, element_size=element_size, **options)
            assert all(plan[name] >= 1 for name in ("tile", "row_chunk", "rows_at_once")), (plan, options)
            assert plan["vocab_group"] % plan["tile"] == 0
            if backward or not copies:  # forward keeps 32 bytes a row, whatever is held
                assert plan["bytes"] <= budget * MIB, (plan, options, element_size)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("vocab", "hidden"), HEADS)
@pytest.mark.parametrize("heads", [1, 2])
def test_a_row_is_cut_the_same_on_a_gpu_whatever_the_batch(compiled, gpu, vocab, hidden, heads):
    """The order of a row's sums and the algorithm of its logits follow from the head, the device and the budget: not
    from the batch, its mask, or whether its logits are kept, and backward recomputes with the same algorithm."""
    plans = [
        plan_of((rows, hidden, vocab), gpu, heads=heads, copy_hidden=copies, backward=backward, kept_bytes=kept)
        for rows in (1, 129, 8192, 100_000)
        for copies in (False, True)
        for backward in (False, True)
        for kept in (0, 192 * MIB)
    ]
    assert len({(plan["nominal_rows"], plan["nominal_columns"]) for plan in plans}) == 1
    forward = [plan for i, plan in enumerate(plans) if i // 2 % 2 == 0]
    assert {plan["tile"] for plan in forward} == {forward[0]["nominal_columns"]}


def test_the_usual_case_needs_no_second_pass(compiled):
    """8192 tokens of Llama 3 8B: operands in place, much of the dlogits at a time, dW written as it is."""
    plan = plan_of(SHAPES[0], backward=True)
    assert plan["rows_at_once"] == 8192 and plan["vocab_group"] >= 8192
    assert plan["bytes"] <= BUDGET


def test_a_small_batch_fills_the_device_too(compiled):
    """Forward's tile may not follow the batch, so it is wide enough for 512 rows to make a wave."""
    assert all(plan_of((512, 4096, 128256), gpu)["utilisation"] >= 0.9 for gpu in GPUS)


if __name__ == "__main__":
    print(table())
