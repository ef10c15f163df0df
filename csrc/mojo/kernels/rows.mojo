"""Rows of elements: sums along them, and sums over blocks of them; shared by the norms and linear."""

from std.memory import unsafe_memset_zero

from .contract import Address, Elements, elements
from .simd import Vector, ceil_div, lanes, load, store
from .threads import Task, parallel_for

comptime GROUP = 4  # rows that share one load of the parameters, or of the partial sums of their gradients
comptime UNIT_ELEMENTS = 4096  # of one unit of work: below it a second thread costs more than it saves


def unit_rows(C: Int) -> Int:
    """Rows of C elements that make a unit of work."""
    return max(1, UNIT_ELEMENTS // max(C, 1))


@always_inline
def for_row[A: DType, F: def(Int, Int, Int) -> None](C: Int, f: F):
    """Calls f(j, n, chain) for every vector of a row of C elements; n of its lanes are elements.

    `chain` cycles through 0..3: a sum kept in four chains does not wait for the four cycles of an addition.
    """
    comptime n = lanes[A]
    var j = 0
    while j + 4 * n <= C:
        comptime for chain in range(4):
            f(j + chain * n, n, chain)
        j += 4 * n
    while j + n <= C:
        f(j, n, 0)
        j += n
    if j < C:
        f(j, C - j, 1)


struct RowSum[A: DType](Copyable):
    """A sum along a row, in the four chains of for_row."""

    var chains: Array[Vector[Self.A], 4]

    @always_inline
    def __init__(out self):
        self.chains = Array[Vector[Self.A], 4](fill=Vector[Self.A](0))

    @always_inline
    def total(self) -> Scalar[Self.A]:
        return ((self.chains[0] + self.chains[1]) + (self.chains[2] + self.chains[3])).reduce_add()


@always_inline
def load_or[P: DType, //, A: DType](p: Optional[Elements[P]], j: Int, n: Int, other: Scalar[A]) -> Vector[A]:
    return load[A](p.unsafe_value().unsafe_offset(j), n) if p else Vector[A](other)


def block_rows(M: Int) -> Int:
    """Rows of one partial sum of a norm's gradients: at most 128 blocks, so that adding them stays cheap."""
    return max(16, ceil_div(ceil_div(M, 128), GROUP) * GROUP)


@always_inline
def cleared[A: DType, //](partial: Optional[Elements[A]], at: Int, count: Int) -> Optional[Elements[A]]:
    """`count` zeros from element `at` of partial sums that are wanted."""
    if not partial:
        return None
    var sums = partial.unsafe_value().unsafe_offset(at)
    unsafe_memset_zero(sums, count)
    return sums


@fieldwise_init
struct AddBlocks[A: DType, P: DType](Task):
    """Partial sums, `stride` elements from block to block, added in the order of the blocks.

    Units are vectors of the C columns.
    """

    var partial: Elements[Self.A]
    var to: Elements[Self.P]
    var blocks: Int
    var stride: Int
    var C: Int

    def run(self, begin: Int, end: Int, thread: Int):
        comptime n = lanes[Self.A]
        for j in range(begin * n, min(end * n, self.C), n):
            var total = Vector[Self.A](0)
            for block in range(self.blocks):
                total += load[Self.A](self.partial.unsafe_offset(block * self.stride + j), self.C - j)
            store(self.to.unsafe_offset(j), total, self.C - j)


def add_blocks[A: DType, P: DType](threads: Int, partial: Elements[A], blocks: Int, stride: Int, C: Int, to: Address):
    """The sums over all blocks to C elements of type P at `to`, where they are wanted."""
    if to:
        parallel_for(threads, ceil_div(C, lanes[A]), AddBlocks[A, P](partial, elements[P](to), blocks, stride, C))
