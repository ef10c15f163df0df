"""adamw: one step of Adam with decoupled weight decay, in one pass over the parameters.

    g = grad_scale grad,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
    param = decay param - rate m / (sqrt(v) / root_correction + eps),  ema += (1 - ema_decay) (param - ema)

Threads take runs of blocks of 256 numbers, which share a scale where the averages have 8 bits. Memory bound: 28 bytes
per float32 parameter, 16 with averages of 8 bits.
"""

from std.math import sqrt
from std.memory import stack_allocation

from .contract import AdamW, Elements, Parameters, elements, optional
from .simd import Accumulator, Vector, ceil_div, lanes, load, store
from .threads import Task, parallel_for

comptime BLOCK = 256
comptime UNIT = 16  # blocks of one unit of work: below 4,096 numbers a second thread costs more than it saves
comptime CODES = 256
comptime Bytes = Elements[DType.uint8]
comptime Floats = Elements[DType.float32]


@fieldwise_init
struct Settings[A: DType](ImplicitlyCopyable):
    """What is the same for all parameters of a call, in the type of the averages."""

    var decay: Scalar[Self.A]
    var one_minus_beta1: Scalar[Self.A]
    var beta2: Scalar[Self.A]
    var one_minus_beta2: Scalar[Self.A]
    var rate: Scalar[Self.A]
    var eps: Scalar[Self.A]
    var root_correction: Scalar[Self.A]
    var grad_scale: Scalar[Self.A]
    var one_minus_ema_decay: Scalar[Self.A]

    def __init__(out self, p: AdamW):
        self.decay = Scalar[Self.A](1 - p.lr * p.weight_decay)
        self.one_minus_beta1 = Scalar[Self.A](1 - p.beta1)
        self.beta2 = Scalar[Self.A](p.beta2)
        self.one_minus_beta2 = Scalar[Self.A](1 - p.beta2)
        self.rate = Scalar[Self.A](p.lr / p.correction1)
        self.eps = Scalar[Self.A](p.eps)
        self.root_correction = Scalar[Self.A](sqrt(p.correction2))
        self.grad_scale = Scalar[Self.A](p.grad_scale)
        self.one_minus_ema_decay = Scalar[Self.A](1 - p.ema_decay)

    @always_inline
    def step(
        self, param: Vector[Self.A], grad: Vector[Self.A], mut m: Vector[Self.A], mut v: Vector[Self.A]
    ) -> Vector[Self.A]:
        """The moved parameters; m and v are moved along."""
        var g = grad * self.grad_scale
        m += (g - m) * self.one_minus_beta1
        v = v * self.beta2 + g * g * self.one_minus_beta2
        return param * self.decay - self.rate * (m / (sqrt(v) / self.root_correction + self.eps))


@always_inline
def average[A: DType](ema: Optional[Elements[A]], settings: Settings[A], param: Vector[A], i: Int, count: Int):
    """Moves the average of the parameters, where it is wanted."""
    if ema:
        var at = ema.unsafe_value().unsafe_offset(i)
        var kept = load[A](at, count)
        store(at, kept + (param - kept) * settings.one_minus_ema_decay, count)


@fieldwise_init
struct Step[T: DType](Task):
    """Averages that are numbers."""

    comptime A = Accumulator[Self.T]

    var param: Elements[Self.T]
    var grad: Elements[Self.T]
    var exp_avg: Elements[Self.A]
    var exp_avg_sq: Elements[Self.A]
    var ema: Optional[Elements[Self.A]]
    var n: Int
    var settings: Settings[Self.A]

    def run(self, begin: Int, end: Int, thread: Int):
        var stop = min(end * UNIT * BLOCK, self.n)
        for i in range(begin * UNIT * BLOCK, stop, lanes[Self.A]):
            var count = stop - i
            var m = load[Self.A](self.exp_avg.unsafe_offset(i), count)
            var v = load[Self.A](self.exp_avg_sq.unsafe_offset(i), count)
            var grad = load[Self.A](self.grad.unsafe_offset(i), count)
            var param = self.settings.step(load[Self.A](self.param.unsafe_offset(i), count), grad, m, v)
            store(self.exp_avg.unsafe_offset(i), m, count)
            store(self.exp_avg_sq.unsafe_offset(i), v, count)
            store(self.param.unsafe_offset(i), param, count)
            average(self.ema, self.settings, param, i, count)


@always_inline
def nearest(code: Floats, x: Float32) -> Int:
    """The index of the value of the code that is nearest: how many edges, the middles of two values, are below x."""
    var index = 0
    comptime for bit in range(8):
        comptime step = CODES >> (bit + 1)
        var edge = index + step - 1
        if (code[unsafe_offset=edge] + code[unsafe_offset=edge + 1]) / 2 < x:
            index += step
    return index


@always_inline
def encode[roots: Bool](values: Floats, code: Floats, indices: Bytes, count: Int) -> Float32:
    """The indices of the nearest values of the code, and the scale: the largest magnitude, NaN when one is not finite.

    With `roots` a number that is not 0 does not become 0: it would be divided by.
    """
    var largest = Float32(0)
    var not_finite = Float32(0)
    for i in range(count):
        var x = values[unsafe_offset=i]
        largest = max(largest, abs(x))
        not_finite += x - x
    var scale = largest + not_finite
    var divisor = scale if scale > 0 else Float32(1)
    for i in range(count):
        var x = values[unsafe_offset=i]
        var index = nearest(code, x / divisor)
        comptime if roots:
            if x > 0 and index == 0:
                index = 1
        indices[unsafe_offset=i] = UInt8(index)
    return scale


@fieldwise_init
struct Step8bit[T: DType](Task):
    """Averages of 8 bits: m and the root of v."""

    comptime A = DType.float32

    var param: Elements[Self.T]
    var grad: Elements[Self.T]
    var exp_avg: Bytes
    var exp_avg_root: Bytes
    var exp_avg_scale: Floats
    var exp_avg_root_scale: Floats
    var ema: Optional[Floats]
    var code: Floats
    var n: Int
    var settings: Settings[Self.A]

    def run(self, begin: Int, end: Int, thread: Int):
        for block in range(begin * UNIT, min(end * UNIT, ceil_div(self.n, BLOCK))):
            self.one(block)

    @always_inline
    def one(self, block: Int):
        comptime n = lanes[Self.A]
        var first = block * BLOCK
        var count = min(BLOCK, self.n - first)
        var m_of = stack_allocation[BLOCK, DType.float32, alignment=64]()
        var root_of = stack_allocation[BLOCK, DType.float32, alignment=64]()
        var m8 = self.exp_avg.unsafe_offset(first)
        var root8 = self.exp_avg_root.unsafe_offset(first)
        var roots = self.code.unsafe_offset(CODES)
        for i in range(count):
            m_of[unsafe_offset=i] = (
                self.code[unsafe_offset=Int(m8[unsafe_offset=i])] * self.exp_avg_scale[unsafe_offset=block]
            )
            root_of[unsafe_offset=i] = (
                roots[unsafe_offset=Int(root8[unsafe_offset=i])] * self.exp_avg_root_scale[unsafe_offset=block]
            )
        for i in range(0, count, n):
            var left = count - i
            var m = load[Self.A](m_of.unsafe_offset(i), left)
            var root = load[Self.A](root_of.unsafe_offset(i), left)
            var v = root * root
            var grad = load[Self.A](self.grad.unsafe_offset(first + i), left)
            var param = self.settings.step(load[Self.A](self.param.unsafe_offset(first + i), left), grad, m, v)
            store(m_of.unsafe_offset(i), m, left)
            store(root_of.unsafe_offset(i), sqrt(v), left)
            store(self.param.unsafe_offset(first + i), param, left)
            average(self.ema, self.settings, param, first + i, left)
        self.exp_avg_scale[unsafe_offset=block] = encode[False](m_of, self.code, m8, count)
        self.exp_avg_root_scale[unsafe_offset=block] = encode[True](root_of, roots, root8, count)


def adamw[T: DType](p: AdamW):
    comptime A = Accumulator[T]
    var units = ceil_div(p.n, UNIT * BLOCK)
    comptime if A == DType.float32:
        if p.exp_avg_scale:
            var task = Step8bit[T](
                elements[T](p.param),
                elements[T](p.grad),
                elements[DType.uint8](p.exp_avg),
                elements[DType.uint8](p.exp_avg_sq),
                elements[DType.float32](p.exp_avg_scale),
                elements[DType.float32](p.exp_avg_sq_scale),
                optional[DType.float32](p.ema),
                elements[DType.float32](p.code),
                p.n,
                Settings[DType.float32](p),
            )
            parallel_for(p.context.threads(), units, task)
            return
    var task = Step[T](
        elements[T](p.param),
        elements[T](p.grad),
        elements[A](p.exp_avg),
        elements[A](p.exp_avg_sq),
        optional[A](p.ema),
        p.n,
        Settings[A](p),
    )
    parallel_for(p.context.threads(), units, task)
