"""The Triton programs of linear_logprob. README.md has the derivation and the layout.

Shapes: hidden [n, depth] and weight [V, depth], rows contiguous; bias [V] or None; a vector with a value a row [n]. The
vocabulary from `first` up to `last` is computed; `scale` is 1 / temperature. Products of DOT_DTYPE operands sum in
float32.
"""

# The type checker takes Triton's block values for tensors of Python numbers.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# They change from batch to batch, and nothing gains from a program compiled for their divisors.
_SIZES = ["n", "first", "last", "tiles", "all_tiles"]


@triton.jit
def _tile_logits(
    hidden,
    weight,
    bias,
    n,
    first,
    last,
    depth,
    hidden_stride,
    weight_stride,
    scale,
    EVEN_DEPTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """Rows [ROWS], columns [VOCAB] and tempered logits [ROWS, VOCAB] of this program's tile, and its column of tiles.

    Tiles go in bands of BAND tiles of rows, within a band column by column: a column of the weight is then read once a
    band, and the band's rows stay in the cache. Rows and columns beyond the end repeat others, and count for nothing.
    """
    column_tiles = tl.cdiv(last - first, VOCAB)
    program = tl.program_id(0)
    band = program // (BAND * column_tiles)
    height = tl.minimum(tl.cdiv(n, ROWS) - band * BAND, BAND)
    within = program % (BAND * column_tiles)
    tile = within // height
    rows = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    columns = first + tile * VOCAB + tl.arange(0, VOCAB)
    d = tl.arange(0, DEPTH)
    hidden_at = hidden + (rows % n).to(tl.int64)[:, None] * hidden_stride + d[None, :]
    near_columns = tl.minimum(columns, last - 1)
    weight_at = weight + near_columns.to(tl.int64)[None, :] * weight_stride + d[:, None]
    z = tl.zeros((ROWS, VOCAB), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN_DEPTH:
            h = tl.load(hidden_at)
            w = tl.load(weight_at)
        else:
            h = tl.load(hidden_at, mask=(start + d < depth)[None, :], other=0.0)
            w = tl.load(weight_at, mask=(start + d < depth)[:, None], other=0.0)
        z = tl.dot(h.to(DOT_DTYPE), w.to(DOT_DTYPE), z, input_precision=PRECISION)
        hidden_at += DEPTH
        weight_at += DEPTH
    if bias is not None:
        z += tl.load(bias + near_columns).to(tl.float32)[None, :]
    return rows, columns, z * scale, tile


@triton.jit(do_not_specialize=_SIZES)
def statistics(
    hidden,
    weight,
    bias,
    targets,
    tile_statistics,
    target_logit,
    n,
    first,
    last,
    depth,
    hidden_stride,
    weight_stride,
    scale,
    EVEN_DEPTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """Of one tile: the largest logit, sum exp(z - largest) and sum exp(z - largest) (z - largest), into [3, tiles, n].

    The tile that holds a row's target writes the target's logit.
    """
    rows, columns, z, tile = _tile_logits(
        hidden, weight, bias, n, first, last, depth, hidden_stride, weight_stride, scale,
        EVEN_DEPTH, DOT_DTYPE, PRECISION, ROWS, VOCAB, DEPTH, BAND,
    )  # fmt: skip
    is_row = rows < n
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    # Few tiles hold a target, and looking for it costs a pass over the tile.
    here = (target >= first + tile * VOCAB) & (target < first + (tile + 1) * VOCAB)
    if tl.max(here.to(tl.int32), 0) > 0:
        found = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        tl.store(target_logit + rows, found, mask=is_row & here)
    # Columns beyond the end repeat the last one, so the maximum is right as it is.
    largest = tl.max(z, 1)
    shifted = z - largest[:, None]
    exp = tl.where((columns < last)[None, :], tl.exp(shifted), 0.0)
    tiles = tl.cdiv(last - first, VOCAB)
    at = tile_statistics + tile.to(tl.int64) * n + rows
    plane = tiles.to(tl.int64) * n
    tl.store(at, largest, mask=is_row)
    tl.store(at + plane, tl.sum(exp, 1), mask=is_row)
    tl.store(at + 2 * plane, tl.sum(exp * shifted, 1), mask=is_row)


@triton.jit(do_not_specialize=_SIZES)
def merge(
    tile_statistics,
    target_logit,
    logprob,
    entropy,
    row_largest,
    row_log_total,
    n,
    tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of each row, from the statistics of its tiles: log-prob, entropy, largest logit, log sum exp(z - largest)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n
    plane = tiles.to(tl.int64) * n
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    moment = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = tile_statistics + tile.to(tl.int64)[:, None] * n + rows[None, :]
        mask = (tile < tiles)[:, None] & is_row[None, :]
        tile_largest = tl.load(at, mask=mask, other=float("-inf"))
        tile_total = tl.load(at + plane, mask=mask, other=0.0)
        tile_moment = tl.load(at + 2 * plane, mask=mask, other=0.0)
        new = tl.maximum(largest, tl.max(tile_largest, 0))
        # Moving the zero of z by a tile's distance to the new maximum moves its moment by distance * total. Rows beyond
        # the end have no maximum, and their -inf must not meet itself.
        new = tl.where(is_row, new, 0.0)
        distance = tl.where(mask, tile_largest - new[None, :], 0.0)
        rescale = tl.exp(distance)
        kept = tl.where(total > 0, largest - new, 0.0)
        moment = (moment + kept * total) * tl.exp(kept) + tl.sum((tile_moment + distance * tile_total) * rescale, 0)
        total = total * tl.exp(kept) + tl.sum(tile_total * rescale, 0)
        largest = new
    total = tl.where(is_row, total, 1.0)
    log_total = tl.log(total)
    tl.store(row_largest + rows, largest, mask=is_row)
    tl.store(row_log_total + rows, log_total, mask=is_row)
    target = tl.load(target_logit + rows, mask=is_row, other=0.0)
    tl.store(logprob + rows, (target - largest) - log_total, mask=is_row)
    tl.store(entropy + rows, log_total - moment / total, mask=is_row)


@triton.jit(do_not_specialize=_SIZES)
def target_logits(
    hidden,
    weight,
    bias,
    targets,
    target_logit,
    n,
    depth,
    hidden_stride,
    weight_stride,
    scale,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The tempered logit of each row's target. Its error is common to all ratios of the row, hence the float64 sum."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n
    target = tl.load(targets + rows, mask=is_row, other=0).to(tl.int64)
    d = tl.arange(0, DEPTH)
    hidden_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + d[None, :]
    weight_at = weight + target[:, None] * weight_stride + d[None, :]
    z = tl.zeros((ROWS,), dtype=tl.float64)
    for start in range(0, depth, DEPTH):
        mask = is_row[:, None] & (start + d < depth)[None, :]
        h = tl.load(hidden_at + start, mask=mask, other=0.0).to(tl.float64)
        z += tl.sum(h * tl.load(weight_at + start, mask=mask, other=0.0).to(tl.float64), 1)
    if bias is not None:
        z += tl.load(bias + target, mask=is_row, other=0.0).to(tl.float64)
    tl.store(target_logit + rows, (z * scale).to(tl.float32), mask=is_row)


@triton.jit(do_not_specialize=_SIZES)
def odds(
    hidden,
    weight,
    bias,
    targets,
    target_logit,
    sums,
    all_tiles,
    out,
    out_stride,
    n,
    first,
    last,
    depth,
    hidden_stride,
    weight_stride,
    scale,
    EVEN_DEPTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """e_j = p_j / p_target of one tile, 0 for the target itself, into out [n, last - first].

    Its sums, of e and of e log e, go into sums [2, all_tiles, n]; a tile's place is that in the whole vocabulary.
    """
    rows, columns, z, tile = _tile_logits(
        hidden, weight, bias, n, first, last, depth, hidden_stride, weight_stride, scale,
        EVEN_DEPTH, DOT_DTYPE, PRECISION, ROWS, VOCAB, DEPTH, BAND,
    )  # fmt: skip
    is_row = rows < n
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    z -= tl.load(target_logit + rows, mask=is_row, other=0.0)[:, None]
    counts = (columns < last)[None, :] & (columns[None, :] != target[:, None])
    e = tl.where(counts, tl.exp(z), 0.0)
    at = out + rows.to(tl.int64)[:, None] * out_stride + (columns - first)[None, :]
    tl.store(at, e.to(out.dtype.element_ty), mask=is_row[:, None] & (columns < last)[None, :])
    at = sums + (first // VOCAB + tile).to(tl.int64) * n + rows
    tl.store(at, tl.sum(e, 1), mask=is_row)
    tl.store(at + all_tiles.to(tl.int64) * n, tl.sum(e * z, 1), mask=is_row)


@triton.jit(do_not_specialize=_SIZES)
def grad_logits(
    hidden,
    weight,
    bias,
    targets,
    row_largest,
    row_log_total,
    entropy,
    grad_logprob,
    grad_entropy,
    grad,
    grad_stride,
    n,
    first,
    last,
    depth,
    hidden_stride,
    weight_stride,
    scale,
    EVEN_DEPTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """g_l (onehot - p) - g_H p (log p + H) of one tile, from logits computed again, into grad [n, last - first]."""
    rows, columns, z, _ = _tile_logits(
        hidden, weight, bias, n, first, last, depth, hidden_stride, weight_stride, scale,
        EVEN_DEPTH, DOT_DTYPE, PRECISION, ROWS, VOCAB, DEPTH, BAND,
    )  # fmt: skip
    is_row = rows < n
    target = tl.load(targets + rows, mask=is_row, other=-1).to(tl.int32)
    largest = tl.load(row_largest + rows, mask=is_row, other=0.0)
    log_total = tl.load(row_log_total + rows, mask=is_row, other=0.0)
    h = tl.load(entropy + rows, mask=is_row, other=0.0)
    g_l = tl.load(grad_logprob + rows, mask=is_row, other=0.0)
    g_h = tl.load(grad_entropy + rows, mask=is_row, other=0.0)
    # In two steps: the log-partition itself is large, and its rounding would be common to the whole row.
    log_p = (z - largest[:, None]) - log_total[:, None]
    # -p (g_l + g_H (log p + H)), with what is the same along a row put together.
    value = -tl.exp(log_p) * (log_p * g_h[:, None] + (g_l + g_h * h)[:, None])
    value += tl.where(columns[None, :] == target[:, None], g_l[:, None], 0.0)
    at = grad + rows.to(tl.int64)[:, None] * grad_stride + (columns - first)[None, :]
    tl.store(at, value.to(grad.dtype.element_ty), mask=is_row[:, None] & (columns < last)[None, :])
