"""Deferred normalisation as tiles [rows, channels] see it: h = act(scale x + shift) * gate, and the way back.

Everything is fp32 but what is stored. ACT is one of dspnet_fast.ops.deferred.ACTS.
"""

import triton
import triton.language as tl


@triton.jit
def assume_multiple_of(channels, WIDE: tl.constexpr):
    """The number of channels, known to the compiler as a multiple of 8 if it is: loads are then up to 16 bytes wide."""
    if WIDE:
        channels = channels // 8 * 8  # which says so to the compiler; tl.multiple_of says nothing of arguments
    return channels


@triton.jit
def columns_of(channels, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels as `assume_multiple_of` gives them, the program's row block, its columns, and which of them exist."""
    channels = assume_multiple_of(channels, WIDE)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return channels, program, column, column < channels


@triton.jit
def apply_activation(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACT == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3, 0.0), 6.0) * (1 / 6)
    return z


@triton.jit
def activation_gradient(z, ACT: tl.constexpr):
    """act'(z); at hardswish's kinks that of the middle piece."""
    result = tl.full(z.shape, 1.0, tl.float32)
    if ACT == "relu":
        result = tl.where(z > 0, 1.0, 0.0)
    if ACT == "hardswish":
        result = tl.where(z < -3, 0.0, tl.where(z > 3, 1.0, z * (1 / 3) + 0.5))
    return result


@triton.jit
def load_row(scale, shift, row, column, inside, channels, DEFERRED: tl.constexpr):
    """Scale and shift of these columns, [1, columns]."""
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
    """mean, dmean / cnt and 2 dvariance / cnt of a view's columns, [1, columns]."""
    centre = tl.full((1, column.shape[0]), 0.0, tl.float32)
    to_mean = centre
    to_square = centre
    if MOMENTS:
        of_view = view * channels + column
        inside = column < channels
        centre = tl.load(mean + of_view, mask=inside, other=0.0)[None, :]
        to_mean = inverse_count * tl.load(dmean + of_view, mask=inside, other=0.0)[None, :]
        to_square = 2 * inverse_count * tl.load(dvariance + of_view, mask=inside, other=0.0)[None, :]
    return centre, to_mean, to_square


@triton.jit
def load_output_gradient(dy, y, centre, to_mean, to_square, offsets, valid, MOMENTS: tl.constexpr):
    """e = dy + dmean / cnt + 2 (y - mean) dvariance / cnt; 0 where not valid."""
    e = tl.load(dy + offsets, mask=valid, other=0.0).to(tl.float32)
    if MOMENTS:
        deviation = tl.load(y + offsets, mask=valid, other=0.0).to(tl.float32) - centre
        e = tl.where(valid, e + to_mean + deviation * to_square, 0.0)
    return e


@triton.jit
def materialize_gradient(
    dh, x, factor, offset, gates, valid, ACT: tl.constexpr, DEFERRED: tl.constexpr, GATED: tl.constexpr
):
    """From dh to dz, 0 where not valid, and the sum over the tile's rows that is the gate's gradient."""
    z = normalized(x, factor, offset, DEFERRED)
    of_gate = tl.zeros((dh.shape[1],), tl.float32)
    if GATED:
        of_gate = tl.sum(tl.where(valid, dh * apply_activation(z, ACT), 0.0), 0)
        dh *= gates
    return tl.where(valid, dh * activation_gradient(z, ACT), 0.0), of_gate


@triton.jit
def store_sums(partial, program, programs, channels, column, of_scale, of_shift):
    """What a program has summed for scale and shift, into the first two of partial [kinds, programs, C]."""
    inside = column < channels
    to = partial + program * channels + column
    tl.store(to, of_scale, mask=inside)
    tl.store(to + programs * channels, of_shift, mask=inside)


@triton.jit
def folded(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Room for the sums of tiles' columns as threads hold them: `unfold` adds them up once, when all tiles are in."""
    if ROWS < 64:  # products without tensor cores, whose tiles are small
        sums = tl.zeros((1, ROWS, COLUMNS), tl.float32)
    else:
        sums = tl.zeros((ROWS // 16, 8, COLUMNS), tl.float32)
    return sums


@triton.jit
def fold(x):
    """What a tile [rows, columns] adds to `folded`: of an accumulator of tensor cores, a thread holds rows 8 apart."""
    ROWS: tl.constexpr = x.shape[0]
    if ROWS < 64:
        x = tl.expand_dims(x, 0)
    else:
        x = tl.sum(tl.reshape(x, (ROWS // 16, 2, 8, x.shape[1])), 1)
    return x


@triton.jit
def unfold(sums):
    """[columns]."""
    return tl.sum(tl.sum(sums, 1), 0)


@triton.jit
def deviation(y, pivot, first, begin, size):
    """The pivot of a program's moments and the deviations from it of a tile, whose rows begin at `first`.

    y: 0 in rows from `size` on. The pivot is the mean of the program's first tile, which begins at `begin`. So it lies
    among what it is subtracted from, and sums of deviations and of their squares lose nothing by it.
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
    """Mean and sum of squared deviations, of `count` rows' sums of deviations from a pivot and of their squares."""
    apart = sums / count
    squares -= sums * apart
    return pivot + apart, tl.where(squares < 0, 0.0, squares)
