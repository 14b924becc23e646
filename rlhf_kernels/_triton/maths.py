"""Device maths of the Triton kernels: logits, streaming softmax statistics, KL statistics. In nats.

The functions and the equations behind them are those of csrc/common/online_softmax.h; what is derived there is only
named here. z, y are tiles [rows, columns]; a state is a tuple of [rows].
"""

import triton
import triton.language as tl

IDENTITY, AFFINE, SOFTCAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how a GEMM's output becomes a logit
LOWEST_LOG_P = tl.constexpr(-100.0)  # e^-100 is 0 in fp32: keeps 0 * -inf from being NaN
MAX_EXPONENT = tl.constexpr(60.0)  # e^60 times a vocabulary stays finite
LOG2_E = tl.constexpr(1.4426950408889634)


# ---- elementary functions ------------------------------------------------------------------------------------------


@triton.jit
def exp(u):
    """e^u as tl.exp computes it, but that what is below 2^-126 becomes 0, which spares three of five instructions."""
    return tl.exp2(u * LOG2_E)


@triton.jit
def expm1_minus_identity(u):
    """e^u - 1 - u without cancellation: for |u| < 1 u^2 (1/2! + u/3! + ... + u^10/12!), by Horner."""
    near = tl.abs(u) < 1.0
    v = tl.where(near, u, 0.0)
    s = v * (1.0 / 12.0) + 1.0
    s = s * v * (1.0 / 11.0) + 1.0
    s = s * v * (1.0 / 10.0) + 1.0
    s = s * v * (1.0 / 9.0) + 1.0
    s = s * v * (1.0 / 8.0) + 1.0
    s = s * v * (1.0 / 7.0) + 1.0
    s = s * v * (1.0 / 6.0) + 1.0
    s = s * v * (1.0 / 5.0) + 1.0
    s = s * v * (1.0 / 4.0) + 1.0
    s = s * v * (1.0 / 3.0) + 1.0
    return tl.where(near, 0.5 * v * v * s, exp(u) - 1.0 - u)


@triton.jit
def expm1(u):
    near = tl.abs(u) < 1.0
    v = tl.where(near, u, 0.0)
    return tl.where(near, expm1_minus_identity(v) + v, exp(u) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: the rounding of 1 + x is taken back to first order."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * tl.div_rn(x, tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def tanh(x):
    """For |x| < 0.55 the odd polynomial that fits tanh(x) / x best in x^2, else 1 - 2 / (e^2|x| + 1): within 2 ulp."""
    z = x * x
    p = z * -0.00661578269 + 0.0213127636
    p = p * z - 0.0539100708
    p = p * z + 0.133331177
    p = p * z - 0.33333332
    near = x + x * (z * p)
    far = 1.0 - tl.div_rn(2.0, exp(2.0 * tl.abs(x)) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    return tl.where(z < 0.55 * 0.55, near, far)


# ---- final logits ----------------------------------------------------------------------------------------------------


@triton.jit
def final_logits(x, bias_ptr, columns, vocab, gain, cap, KIND: tl.constexpr):
    """x: the GEMM's output, z = cap * tanh(gain * (x + bias)) or gain * (x + bias)."""
    if KIND != IDENTITY:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < vocab, other=0.0).to(tl.float32)
            x = x + bias[None, :]
        x = x * gain
        if KIND == SOFTCAP:
            x = cap * tanh(x)
    return x


@triton.jit
def filled_past(z, first, end, COLUMNS: tl.constexpr, value: tl.constexpr):
    """z [ROWS, COLUMNS], columns from `first`: `value` in those from `end` on. All tiles but the last have none."""
    if first + COLUMNS > end:
        z = tl.where((first + tl.arange(0, COLUMNS) < end)[None, :], z, value)
    return z


@triton.jit
def logit_slope(z, inverse_cap, slope, KIND: tl.constexpr):
    """dz/dx from the final logit z."""
    if KIND == SOFTCAP:
        t = z * inverse_cap
        return slope * (1.0 - t * t)
    else:
        return slope


@triton.jit
def scaled_exponent(z, scale):
    """The exponent z - scale log 2 of 2^-scale e^z for a whole number, with log 2 in two parts."""
    return (z - scale * 0.693359375) - scale * -2.12194440e-4


@triton.jit
def power_of_2(exponent, base):
    """2^(exponent - base) <= 1; -inf stands for no term at all."""
    return tl.where(exponent == base, 1.0, tl.exp2(exponent - base))


# ---- softmax statistics: (max, sum, shifted, squares) ----------------------------------------------------------------


@triton.jit
def finite_max(m):
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def empty_softmax(ROWS: tl.constexpr):
    """The statistics of no tokens."""
    zero = tl.zeros([ROWS], tl.float32)
    return tl.full([ROWS], -float("inf"), tl.float32), zero, zero, zero


@triton.jit
def rescale_softmax(m, s, shifted, squares, new_max):
    """Restates sums taken relative to m relative to new_max >= m."""
    delta = tl.where(m == -float("inf"), 0.0, m - new_max)
    factor = exp(delta)
    return factor * s, factor * (shifted + delta * s), factor * factor * squares


@triton.jit
def merge_softmax(m, s, shifted, squares, other_m, other_s, other_shifted, other_squares):
    new_max = tl.maximum(m, other_m)
    s, shifted, squares = rescale_softmax(m, s, shifted, squares, new_max)
    other_s, other_shifted, other_squares = rescale_softmax(other_m, other_s, other_shifted, other_squares, new_max)
    return new_max, s + other_s, shifted + other_shifted, squares + other_squares


# ---- KL statistics: (max, sum, other_max, other_sum, centre, second, first) ------------------------------------------


@triton.jit
def empty_kl(ROWS: tl.constexpr):
    """The statistics of no tokens."""
    none, zero = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    return none, zero, none, zero, zero, zero, zero


@triton.jit
def kl_of_tile(z, y):
    """Statistics of one tile, about the difference z - y where z is largest."""
    m, other_m = tl.max(z, 1), tl.max(y, 1)
    difference = z - y
    centre = tl.max(tl.where(z == m[:, None], difference, -float("inf")), 1)
    centre = tl.where(centre - centre == 0.0, centre, 0.0)
    w = exp(z - finite_max(m)[:, None])
    other_s = tl.sum(exp(y - finite_max(other_m)[:, None]), 1)
    u = difference - centre[:, None]
    allowed = w != 0.0  # where p is 0 a term's limit is 0, though u may be infinite or NaN
    minus_u = tl.where(-u < MAX_EXPONENT, -u, MAX_EXPONENT)
    second = tl.sum(tl.where(allowed, w * expm1_minus_identity(minus_u), 0.0), 1)
    first = tl.sum(tl.where(allowed, w * u, 0.0), 1)
    return m, tl.sum(w, 1), other_m, other_s, centre, second, first


@triton.jit
def recentre(s, centre, second, first, new_centre):
    delta = tl.where(s == 0.0, 0.0, new_centre - centre)
    bounded = tl.maximum(tl.minimum(delta, MAX_EXPONENT), -MAX_EXPONENT)
    second = second + (second - first) * expm1(bounded) + expm1_minus_identity(bounded) * s
    return second, first - delta * s


@triton.jit
def rescaling(m, new_max):
    return exp(tl.where(m == -float("inf"), 0.0, m - new_max))


@triton.jit
def merge_kl(am, asum, ao, aos, ac, a2, a1, bm, bsum, bo, bos, bc, b2, b1):
    """Both parts, about the centre of the part with the larger maximum."""
    m, o = tl.maximum(am, bm), tl.maximum(ao, bo)
    centre = tl.where(bm > am, bc, ac)
    a2, a1 = recentre(asum, ac, a2, a1, centre)
    b2, b1 = recentre(bsum, bc, b2, b1, centre)
    fa, fb = rescaling(am, m), rescaling(bm, m)
    other_s = rescaling(ao, o) * aos + rescaling(bo, o) * bos
    return m, fa * asum + fb * bsum, o, other_s, centre, fa * a2 + fb * b2, fa * a1 + fb * b1
