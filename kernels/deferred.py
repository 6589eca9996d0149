"""Device functions on tiles [rows, channels]: h = act(scale x + shift) * gate, its gradient, sums and moments.

Computation is in fp32. ACT is one of dspnet_fast.ops.deferred.ACTS.
"""

import triton
import triton.language as tl


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
def apply_activation(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACT == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3, 0.0), 6.0) * (1 / 6)
    return z


@triton.jit
def activation_gradient(z, ACT: tl.constexpr):
    """act'(z); at the kinks of hardswish, that of its middle part."""
    result = tl.full(z.shape, 1.0, tl.float32)
    if ACT == "relu":
        result = tl.where(z > 0, 1.0, 0.0)
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
def load_output_gradient(dy, y, center, mean_term, variance_factor, offsets, valid, MOMENTS: tl.constexpr):
    """e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt; 0 where not valid."""
    e = tl.load(dy + offsets, mask=valid, other=0.0).to(tl.float32)
    if MOMENTS:
        deviation = tl.load(y + offsets, mask=valid, other=0.0).to(tl.float32) - center
        e = tl.where(valid, e + mean_term + deviation * variance_factor, 0.0)
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
