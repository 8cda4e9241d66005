"""Matrix products on CPUs with weights in blocks: a vector holds those of one input for LANES outputs.

Each output is one running sum over the inputs, in their order, whatever the number of rows: a row's numbers are the
same to the bit in any batch. A vector of weights is read once for up to six rows, and the sums stay in registers.
Weights of eight bits meet inputs of (up to) sixteen: a product of integers has no rounding, and takes half the
instructions. Weights that bfloat16 or float16 holds exactly are stored so, and widened in registers: the same sums, to
the bit, for half of the reading.

While rows pass over a block of weights, six at a time, each pass asks for its share of the next block, so that reading
and multiplying take place at the same time.

The inner loops are written in LLVM's own terms: from Python loops it would make other orders of summation for one row
than for six, and would not find the instruction that multiplies pairs of integers and adds them up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from kernels.fastmath import wide_vectors

Floats = npt.NDArray[np.float32]
Blocks = npt.NDArray[Any]

FEATURES = llvmlite.binding.get_host_cpu_features()
WIDE = bool(FEATURES.get("avx512f"))
LANES = 16 if WIDE else 8
VECTORS = 4 if WIDE else 2  # of weights at a time: with those of six rows, all sums fit into the registers
CHANNELS = LANES * VECTORS
ALONE = LANES * 4  # channels of a row that is alone: it waits for its last sums less, and for the memory
MOST_ROWS = 6
TOKENS = 192  # whose inputs stay in a core's cache while the weights pass

SMALL = 1 << 19  # products that cost less than waking other threads
NONE = np.empty(0, np.float32)

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class Matrix(NamedTuple):
    """A projection [N, K] as `project` takes it."""

    # [N', K, LANES], flat, N' = N / LANES, rounded up: float32, or the bits of bfloat16 as uint16, of float16 as int16.
    # Or int8 [N', K / 2, LANES, 2].
    blocks: Blocks
    scale: Floats  # of eight bits, [N]; of others, [1] for all channels or [0] for none
    bias: Floats  # [N], or [0] for none


def to_blocks(weight: Blocks) -> Blocks:
    """weight [N, K] of one of the types -> blocks, flat. Channels that are missing in the last block are zero."""
    N, K = weight.shape
    pair = 2 if weight.dtype == np.int8 else 1
    padded = np.zeros((-(-N // ALONE) * ALONE, -(-K // pair) * pair), weight.dtype)
    padded[:N, :K] = weight
    parted = padded.reshape(-1, LANES, padded.shape[1] // pair, pair)
    return np.ascontiguousarray(parted.transpose(0, 2, 1, 3)).reshape(-1)


def from_blocks(blocks: Blocks, outputs: int, inputs: int) -> Blocks:
    """The inverse of `to_blocks`: [N, K]."""
    pair = 2 if blocks.dtype == np.int8 else 1
    parted = blocks.reshape(-1, -(-inputs // pair), LANES, pair)
    whole = parted.transpose(0, 2, 1, 3).reshape(-1, parted.shape[1] * pair)
    return np.ascontiguousarray(whole[:outputs, :inputs])


@numba.njit(cache=True)
def most(inputs: int) -> int:
    """The largest integer that an input may become: no sum of so many products with weights of eight bits overflows."""
    return min(32767, (2**31 - 1) // (127 * inputs))


Builder = Any  # llvmlite's types have no stubs
Value = Any


def _lanes(b: Builder, scalar: Value) -> Value:
    """A scalar in every lane."""
    vector = ir.VectorType(scalar.type, LANES)
    first = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    return b.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _float_step(b: Builder, total: Value, weights: Value, x: Value) -> Value:
    kind = total.type
    fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{LANES}f32")
    return b.call(fma, [weights, x, total])


def _pair_step(b: Builder, total: Value, weights: Value, x: Value, instruction: bool) -> Value:
    """total [LANES] + the products of pairs of 16 bits, as 32 bits each."""
    kind = total.type
    if instruction:
        name = "llvm.x86.avx512.vpdpwssd.512"
        dot = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), name)
        return b.call(dot, [total, weights, x])
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    wide = ir.VectorType(_I32, 2 * LANES)
    product = b.mul(b.sext(b.bitcast(weights, halves), wide), b.sext(b.bitcast(x, halves), wide))
    even, odd = (
        b.shuffle_vector(
            product, product, ir.Constant(ir.VectorType(_I32, LANES), list(range(at, 2 * LANES, 2)))
        )
        for at in (0, 1)
    )
    return b.add(total, b.add(even, odd))


def _prefetch(b: Builder, at: Value) -> None:
    """Ask for the line of an address, into the second cache."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    b.call(
        cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8"), [at, _I32(0), _I32(2), _I32(1)]
    )


def _widened(b: Builder, at: Value, kind: Any) -> Value:
    """The weights of a step for LANES outputs: float32, or pairs of 16 bits."""

    def load(element: Any, count: int, align: int) -> Value:
        return b.load(b.bitcast(at, ir.VectorType(element, count).as_pointer()), align=align)

    words = ir.VectorType(_I32, LANES)
    if kind == types.float32:
        return load(_F32, LANES, 4)
    if kind == types.int16:
        return b.fpext(load(ir.HalfType(), LANES, 2), ir.VectorType(_F32, LANES))
    if kind == types.uint16:
        high = b.shl(b.zext(load(ir.IntType(16), LANES, 2), words), ir.Constant(words, [16] * LANES))
        return b.bitcast(high, ir.VectorType(_F32, LANES))
    return b.bitcast(
        b.sext(load(ir.IntType(8), 2 * LANES, 1), ir.VectorType(ir.IntType(16), 2 * LANES)), words
    )


def sums_of(rows: int, instruction: bool, channels: int = CHANNELS) -> Callable[..., None]:
    """An intrinsic: the sums of so many rows for so many outputs. With `instruction` integers are multiplied by
    AVX512-VNNI's. Meanwhile the weights from `ahead` on are asked for, `pace` bytes a step."""

    vectors = channels // LANES

    @intrinsic
    def sums(
        context: Any,
        w: Any,
        w_at: Any,
        ahead: Any,
        pace: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        steps: Any,
        out: Any,
    ) -> tuple[Any, Callable[..., Any]]:
        size_t = types.intp
        signature = types.void(w, size_t, size_t, size_t, x, size_t, size_t, size_t, out)
        floats = w.dtype != types.int8
        total_type = ir.VectorType(_F32 if floats else _I32, LANES)
        size = LANES if floats else 2 * LANES  # elements of a step's weights for LANES outputs

        def generate(context: Any, b: Builder, signature: Any, args: Any) -> Any:
            w_array, w_at, ahead, pace, x_array, x_at, x_stride, steps, out_array = args
            w_data, x_data, out_data = (
                context.make_array(kind)(context, b, value).data
                for kind, value in ((w, w_array), (x, x_array), (out, out_array))
            )
            block_stride = b.mul(steps, _I64(size))
            w_starts = [b.gep(w_data, [b.add(w_at, b.mul(block_stride, _I64(v)))]) for v in range(vectors)]
            coming = b.bitcast(b.gep(w_data, [ahead]), ir.IntType(8).as_pointer())
            x_starts = [b.gep(x_data, [b.add(x_at, b.mul(x_stride, _I64(r)))]) for r in range(rows)]
            before = b.block
            loop, after = b.append_basic_block("inputs"), b.append_basic_block("summed")
            b.branch(loop)

            b.position_at_end(loop)
            step = b.phi(_I64)
            step.add_incoming(_I64(0), before)
            totals = [b.phi(total_type) for _ in range(rows * vectors)]
            for total in totals:
                total.add_incoming(ir.Constant(total_type, [0] * LANES), before)
            _prefetch(b, b.gep(coming, [b.mul(step, pace)]))
            at = [b.gep(start, [b.mul(step, _I64(size))]) for start in w_starts]
            weights = [_widened(b, place, w.dtype) for place in at]
            sums = []
            for r, start in enumerate(x_starts):
                at = b.gep(start, [step if floats else b.mul(step, _I64(2))])
                both = b.load(at if floats else b.bitcast(at, _I32.as_pointer()), align=4 if floats else 2)
                lanes = _lanes(b, both)
                for v in range(vectors):
                    total = totals[r * vectors + v]
                    sums.append(
                        _float_step(b, total, weights[v], lanes)
                        if floats
                        else _pair_step(b, total, weights[v], lanes, instruction)
                    )
            following = b.add(step, _I64(1))
            step.add_incoming(following, loop)
            for total, sum_ in zip(totals, sums, strict=True):
                total.add_incoming(sum_, loop)
            b.cbranch(b.icmp_signed("<", following, steps), loop, after)

            b.position_at_end(after)
            vector = ir.VectorType(_F32, LANES)
            for i, sum_ in enumerate(sums):
                value = sum_ if floats else b.sitofp(sum_, vector)
                b.store(value, b.bitcast(b.gep(out_data, [_I64(i * LANES)]), vector.as_pointer()), align=4)
            return context.get_dummy_value()

        return signature, generate

    return sums


VNNI = WIDE and bool(FEATURES.get("avx512vnni"))
_sums_1, _sums_2, _sums_3, _sums_4, _sums_5, _sums_6 = (
    sums_of(rows, VNNI) for rows in range(1, MOST_ROWS + 1)
)
_sums_alone = sums_of(1, VNNI, ALONE)


def _rounded(x, blocks):  # type: ignore[no-untyped-def]  # numba compares the signatures of these two
    """What is multiplied with the blocks, [T, K'], and the step of each row, [T]: for float32 x itself."""
    raise NotImplementedError


@overload(_rounded)
def _rounded_of(x, blocks):  # type: ignore[no-untyped-def]
    if blocks.dtype == types.int8:
        return lambda x, blocks: rounded(x)
    return lambda x, blocks: (x, NONE)


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def rounded(x: Floats) -> tuple[npt.NDArray[np.int16], Floats]:
    """x [T, K] -> integers [T, K'] and the step of each row [T], with x ~ step integers; K' = K, made even. A row's
    largest number becomes `most(K)`."""
    wide_vectors()
    T, K = x.shape
    top = np.float32(most(K))
    whole, steps = np.zeros((T, K + K % 2), np.int16), np.empty(T, np.float32)
    for t in range(T):
        row, to = x[t], whole[t]
        largest = np.float32(0)
        for k in range(K):
            largest = max(largest, abs(row[k]))
        steps[t] = largest / top
        inverse = top / largest if largest > 0 else np.float32(0)
        for k in range(K):
            to[k] = np.int16(np.rint(row[k] * inverse))
    return whole, steps


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def _task(
    rows: Any, steps: Floats, w: Matrix, out: Floats, channel: int, channels: int, first: int, last: int
) -> None:
    """So many outputs from `channel` on, of the rows from `first` to `last`."""
    wide_vectors()
    inner = rows.shape[1] // (2 if w.blocks.itemsize == 1 else 1)
    width = min(channels, out.shape[1] - channel)
    base = channel * rows.shape[1]
    flat = rows.reshape(rows.size)
    stride = rows.shape[1]
    sums = np.empty(MOST_ROWS * CHANNELS, np.float32)
    whole = CHANNELS * stride  # a block
    groups = (last - first + MOST_ROWS - 1) // MOST_ROWS
    # One row reads as fast as the memory gives; asking for more only disturbs it.
    ahead, pace = base + whole, 0 if last - first == 1 else whole * w.blocks.itemsize // (inner * groups)
    r = first
    while r < last:
        left = last - r
        count = 4 if 6 < left < 9 else min(left, MOST_ROWS)  # 4 and 4 rows take less time than 6 and 2
        if channels > CHANNELS:
            _sums_alone(w.blocks, base, ahead, pace, flat, r * stride, stride, inner, sums)
        elif count == 6:
            _sums_6(w.blocks, base, ahead, pace, flat, r * stride, stride, inner, sums)
        elif count == 5:
            _sums_5(w.blocks, base, ahead, pace, flat, r * stride, stride, inner, sums)
        elif count == 4:
            _sums_4(w.blocks, base, ahead, pace, flat, r * stride, stride, inner, sums)
        elif count == 3:
            _sums_3(w.blocks, base, ahead, pace, flat, r * stride, stride, inner, sums)
        elif count == 2:
            _sums_2(w.blocks, base, ahead, pace, flat, r * stride, stride, inner, sums)
        else:
            _sums_1(w.blocks, base, ahead, pace, flat, r * stride, stride, inner, sums)
        ahead += whole // groups
        for j in range(count):
            y = out[r + j, channel : channel + width]
            made = sums[j * channels : j * channels + width]
            if steps.size > 0:
                step, scale = steps[r + j], w.scale[channel : channel + width]
                for c in range(width):
                    made[c] = made[c] * (step * scale[c])
            elif w.scale.size > 0:
                for c in range(width):
                    made[c] *= w.scale[0]
            if w.bias.size > 0:
                bias = w.bias[channel : channel + width]
                for c in range(width):
                    made[c] += bias[c]
            for c in range(width):
                y[c] = made[c]
        r += count


@numba.njit(fastmath=True, error_model="numpy", cache=True, nogil=True)
def project_alone(x: Floats, w: Matrix, out: Floats) -> None:
    """`project` on the calling thread."""
    rows, steps = _rounded(x, w.blocks)
    channels = ALONE if x.shape[0] == 1 else CHANNELS
    for channel in range(0, out.shape[1], channels):
        _task(rows, steps, w, out, channel, channels, 0, x.shape[0])


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)
def project(
    x: Floats,  # [T, K]
    w: Matrix,
    out: Floats,  # [T, N]
) -> None:
    """out = x w^T + bias, by all threads."""
    T, N = out.shape
    rows, steps = _rounded(x, w.blocks)
    channels = ALONE if T == 1 else CHANNELS
    parts = (N + channels - 1) // channels
    for task in numba.prange(parts * ((T + TOKENS - 1) // TOKENS)):
        first = task // parts * TOKENS
        _task(rows, steps, w, out, task % parts * channels, channels, first, min(T, first + TOKENS))


@numba.njit(error_model="numpy", cache=True, nogil=True)
def project_any(x: Floats, w: Matrix, out: Floats) -> None:
    """`project`, by all threads where that pays."""
    if x.shape[0] * w.blocks.size <= SMALL:
        project_alone(x, w, out)
    else:
        project(x, w, out)
