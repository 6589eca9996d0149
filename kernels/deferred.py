"""Device functions on tiles [rows, channels]: h = act(scale x + shift) * gate, its gradient, sums and moments.

Computation is in fp32. ACT is one of dspnet_fast.ops.deferred.ACTS.
"""

import triton
import triton.language as tl

NOT_POOLED = tl.constexpr("")  # Triton 3.6 takes a plain default of an inner function for a run-time value


@triton.jit
def assume_multiple_of(channels, VECTORIZED: tl.constexpr):
    """The number of channels; VECTORIZED states that it is a multiple of 8, which allows loads of up to 16 bytes."""
    if VECTORIZED:
        channels = channels // 8 * 8  # a hint to the compiler: tl.multiple_of has no effect on arguments
    return channels


@triton.jit
def program_columns(channels, VECTORIZED: tl.constexpr, BLOCK_C: tl.constexpr):
    """The prologue of kernels that process blocks of columns.

    Returns channels as `assume_multiple_of` does, the index of the program among those with the same columns, its
    columns, and the mask column < channels.
    """
    channels = assume_multiple_of(channels, VECTORIZED)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return channels, program, column, column < channels


@triton.jit
def row_tile(first, size, segment, column, inside, channels, BLOCK_M: tl.constexpr):
    """BLOCK_M rows from `first` on, of a segment of `size` rows: their indices, the mask and the offsets of a tile."""
    row = first + tl.arange(0, BLOCK_M)
    valid = (row < size)[:, None] & inside[None, :]
    return row, valid, (segment.to(tl.int64) * size + row)[:, None] * channels + column[None, :]


@triton.jit
def normal_cdf(z, power):
    """The distribution function of the standard normal distribution, within 7.5e-8: Abramowitz and Stegun, 7.1.26.

    power: exp(-z^2 / 2), which the gradient needs too.
    """
    t = 1 / (1 + tl.abs(z) * (0.3275911 * 0.70710678))
    total = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.5 * t * (0.254829592 + t * (-0.284496736 + t * total)) * power  # that of -|z|
    return tl.where(z > 0, 1 - tail, tail)


@triton.jit
def gelu_sigmoid(z):
    """The factor of z in GELU's tanh approximation: sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3))."""
    return tl.sigmoid(z * (1.5957691216 + 0.0713548163 * z * z))


@triton.jit
def apply_activation(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACT == "relu6":
        z = tl.minimum(tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL)
    if ACT == "silu":
        z = z * tl.sigmoid(z)
    if ACT == "gelu":
        z = z * normal_cdf(z, tl.exp(-0.5 * z * z))
    if ACT == "gelu_tanh":
        z = z * gelu_sigmoid(z)
    if ACT == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3, 0.0), 6.0) * (1 / 6)
    return z


@triton.jit
def activation_gradient(z, ACT: tl.constexpr):
    """act'(z); at the kinks of hardswish, that of its middle part."""
    result = tl.full(z.shape, 1.0, tl.float32)
    if ACT == "relu":
        result = tl.where(z > 0, 1.0, 0.0)
    if ACT == "relu6":
        result = tl.where((z > 0) & (z < 6), 1.0, 0.0)
    if ACT == "silu":
        sigmoid = tl.sigmoid(z)
        result = sigmoid * (1 + z * (1 - sigmoid))
    if ACT == "gelu":
        power = tl.exp(-0.5 * z * z)
        result = normal_cdf(z, power) + z * power * 0.39894228  # the density is power / sqrt(2 pi)
    if ACT == "gelu_tanh":
        sigmoid = gelu_sigmoid(z)
        result = sigmoid * (1 + z * (1.5957691216 + 3 * 0.0713548163 * z * z) * (1 - sigmoid))
    if ACT == "hardswish":
        result = tl.where(z < -3, 0.0, tl.where(z > 3, 1.0, z * (1 / 3) + 0.5))
    return result


@triton.jit
def load_row(scale, shift, row, column, inside, channels, DEFERRED: tl.constexpr):
    """Scale and shift of these columns, [1, columns]; 1 and 0 without deferred normalisation."""
    if DEFERRED:
        factor = tl.load(scale + row * channels + column, mask=inside, other=0.0)[None, :]
        offset = tl.load(shift + row * channels + column, mask=inside, other=0.0)[None, :]
    else:
        factor = tl.full((1, column.shape[0]), 1.0, tl.float32)
        offset = tl.full((1, column.shape[0]), 0.0, tl.float32)
    return factor, offset


@triton.jit
def normalized(x, factor, offset, DEFERRED: tl.constexpr):
    z = x.to(tl.float32)
    if DEFERRED:
        z = z * factor + offset
    return z


@triton.jit
def load_moment_gradients(mean, dmean, dvariance, view, column, channels, inverse_count, MOMENTS: tl.constexpr):
    """mean, dmean / cnt and 2 dvariance / cnt of a view's columns, [1, columns]; 0 without moments."""
    center = tl.full((1, column.shape[0]), 0.0, tl.float32)
    mean_term = center
    variance_factor = center
    if MOMENTS:
        offsets = view * channels + column
        inside = column < channels
        center = tl.load(mean + offsets, mask=inside, other=0.0)[None, :]
        mean_term = inverse_count * tl.load(dmean + offsets, mask=inside, other=0.0)[None, :]
        variance_factor = 2 * inverse_count * tl.load(dvariance + offsets, mask=inside, other=0.0)[None, :]
    return center, mean_term, variance_factor


@triton.jit
def load_output_gradient(
    dy, y, center, mean_term, variance_factor, offsets, valid, MOMENTS: tl.constexpr,
    pooled_share=0.0, pooled_factor=1.0, pooled_offset=0.0, POOLED: tl.constexpr = NOT_POOLED,
):  # fmt: skip
    """e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt; 0 where not valid.

    If POOLED names an activation function, plus pooled_share act'(pooled_factor y + pooled_offset).
    """
    e = tl.load(dy + offsets, mask=valid, other=0.0).to(tl.float32)
    if MOMENTS or POOLED != "":
        output = tl.load(y + offsets, mask=valid, other=0.0).to(tl.float32)
        if MOMENTS:
            e += mean_term + (output - center) * variance_factor
        if POOLED != "":
            e += pooled_share * activation_gradient(output * pooled_factor + pooled_offset, POOLED)
        e = tl.where(valid, e, 0.0)
    return e


@triton.jit
def materialize_gradient(
    dh, x, factor, offset, gates, valid, ACT: tl.constexpr, DEFERRED: tl.constexpr, GATED: tl.constexpr
):
    """dz, 0 where not valid, from dh; and the sum over the tile's rows of dh act(z), for the gate."""
    z = normalized(x, factor, offset, DEFERRED)
    dgate = tl.zeros((dh.shape[1],), tl.float32)
    if GATED:
        dgate = tl.sum(tl.where(valid, dh * apply_activation(z, ACT), 0.0), 0)
        dh *= gates
    return tl.where(valid, dh * activation_gradient(z, ACT), 0.0), dgate


@triton.jit
def store_sums(partial, program, programs, channels, column, first, second):
    """Stores two sums of a program in partial[0] and partial[1], [programs, C] each."""
    inside = column < channels
    to = partial + program * channels + column
    tl.store(to, first, mask=inside)
    tl.store(to + programs * channels, second, mask=inside)


@triton.jit
def zero_column_sums(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """An accumulator for the column sums of tiles [ROWS, COLUMNS].

    It has a partial sum per column and thread, so that threads exchange values only once, in `reduce_column_sums`.
    """
    if ROWS < 64:  # small tiles: fp32, without tensor cores
        sums = tl.zeros((1, ROWS, COLUMNS), tl.float32)
    else:
        sums = tl.zeros((ROWS // 16, 8, COLUMNS), tl.float32)
    return sums


@triton.jit
def partial_column_sums(x):
    """The partial sums of a tile [rows, columns], to be added to an accumulator of `zero_column_sums`.

    It adds up rows 8 apart, which a single thread holds in tensor cores' accumulator layout.
    """
    ROWS: tl.constexpr = x.shape[0]
    if ROWS < 64:
        x = tl.expand_dims(x, 0)
    else:
        x = tl.sum(tl.reshape(x, (ROWS // 16, 2, 8, x.shape[1])), 1)
    return x


@triton.jit
def reduce_column_sums(sums):
    """The sums [columns] of an accumulator of `zero_column_sums`."""
    return tl.sum(tl.sum(sums, 1), 0)


@triton.jit
def deviation(y, pivot, first, begin, size):
    """The pivot of a program's moments, and the deviations from it of a tile whose rows begin at `first`.

    y: 0 in rows from `size` on. The pivot is the mean of the program's first tile, which begins at `begin`. It is near
    the values, so sums of deviations and of their squares do not cancel.
    """
    ROWS: tl.constexpr = y.shape[0]
    if first == begin:
        pivot = tl.sum(y, 0) / tl.minimum(ROWS, size - first)
    y -= pivot[None, :]
    if first + ROWS > size:
        y = tl.where((first + tl.arange(0, ROWS) < size)[:, None], y, 0.0)
    return pivot, y


@triton.jit
def moments_from(pivot, sums, squares, count):
    """Mean and sum of squared deviations of `count` rows, from sums of deviations from a pivot and of their squares."""
    delta = sums / count
    squares -= sums * delta
    return pivot + delta, tl.where(squares < 0, 0.0, squares)


@triton.jit
def reduce_rows(x, ROWS_PER_LOAD: tl.constexpr):
    """Adds up the rows of a tile that one thread holds: [ROWS_PER_LOAD, columns]. Needs no exchange between threads."""
    return tl.sum(tl.reshape(x, (x.shape[0] // ROWS_PER_LOAD, ROWS_PER_LOAD, x.shape[1])), 0)


@triton.jit
def sum_per_image(x, image, row_inside, IMAGES: tl.constexpr, SPLIT: tl.constexpr):
    """The sums [IMAGES, columns] of each image's rows of x, as a product with a matrix of ones and zeros."""
    # row_inside makes the matrix depend on the tile: otherwise the compiler would keep it in registers.
    ones = tl.where((tl.arange(0, IMAGES)[:, None] == image[None, :]) & row_inside[None, :], 1.0, 0.0)
    if SPLIT:  # on tensor cores: the sum of two bf16 products, of the upper and the lower bits of x
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        low = (x - high).to(tl.bfloat16)
        ones = ones.to(tl.bfloat16)
        sums = tl.dot(ones, low, tl.dot(ones, high.to(tl.bfloat16)))
    else:
        sums = tl.dot(ones, x, input_precision="ieee")
    return sums
