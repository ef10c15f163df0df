"""The structs of csrc/vit.h, field by field: C++ passes pointers to its own, nothing is copied or converted.

Longer than 400 lines: one file beside one header.

An address may be null; `elements` makes typed pointers of those that are not.
"""

from std.sys import size_of

comptime Opaque = Pointer[NoneType, MutUntrackedOrigin]
comptime Address = Optional[Opaque]
comptime Elements[T: DType] = Pointer[Scalar[T], MutUntrackedOrigin]
comptime Parameters[P: AnyType] = Pointer[P, ImmUntrackedOrigin]

# vit::Activation
comptime NONE = 0
comptime GELU = 1
comptime GELU_TANH = 2
comptime QUICK_GELU = 3
comptime SILU = 4
comptime RELU = 5

# vit::Pairing
comptime INTERLEAVED = 0
comptime HALF = 1

comptime DTYPES = [DType.float32, DType.float64, DType.bfloat16]
"""The element types by their codes in vit::DType."""
comptime FLOAT64 = 1


@always_inline
def elements[T: DType](address: Address) -> Elements[T]:
    """A typed pointer; the address must not be null if it is read or written."""
    return address.unsafe_value().unsafe_bitcast[Scalar[T]]()


@always_inline
def optional[T: DType](address: Address) -> Optional[Elements[T]]:
    """A typed pointer, or none."""
    return elements[T](address) if address else None


struct Context:
    var stream: Address
    var device: Int32
    var num_threads: Int32
    var allow_tf32: Bool

    @always_inline
    def threads(self) -> Int:
        return Int(self.num_threads)


struct Matrices:
    """What vit.h calls Matrix: a batch of them."""

    var data: Address
    var batch: Int
    var row: Int
    var col: Int


struct Heads:
    """Both HeadsOf of vit.h."""

    var data: Address
    var batch: Int
    var token: Int
    var head: Int

    @always_inline
    def at[T: DType](self, b: Int, n: Int, h: Int) -> Elements[T]:
        """The first element of a head of a token."""
        return elements[T](self.data).unsafe_offset(b * self.batch + n * self.token + h * self.head)


struct View:
    var data: Address
    var strides: Array[Int, 6]


struct LayerNormFwd:
    var x: Address
    var weight: Address
    var bias: Address
    var y: Address
    var mean: Address
    var rstd: Address
    var M: Int
    var C: Int
    var x_stride: Int
    var eps: Float64
    var dtype: Int32
    var param_dtype: Int32
    var context: Context


struct LayerNormBwd:
    var dy: Address
    var x: Address
    var weight: Address
    var mean: Address
    var rstd: Address
    var dx: Address
    var dweight: Address
    var dbias: Address
    var workspace: Address
    var M: Int
    var C: Int
    var x_stride: Int
    var dtype: Int32
    var param_dtype: Int32
    var context: Context


struct RmsNormFwd:
    var x: Address
    var weight: Address
    var y: Address
    var rstd: Address
    var M: Int
    var C: Int
    var x_stride: Int
    var eps: Float64
    var dtype: Int32
    var param_dtype: Int32
    var context: Context


struct RmsNormBwd:
    var dy: Address
    var x: Address
    var weight: Address
    var rstd: Address
    var dx: Address
    var dweight: Address
    var workspace: Address
    var M: Int
    var C: Int
    var x_stride: Int
    var dtype: Int32
    var param_dtype: Int32
    var context: Context


struct GeluFwd:
    var x: Address
    var y: Address
    var n: Int
    var activation: Int32
    var dtype: Int32
    var context: Context


struct GeluBwd:
    var dy: Address
    var x: Address
    var dx: Address
    var n: Int
    var activation: Int32
    var dtype: Int32
    var context: Context


struct SwigluFwd:
    var x: Address
    var gate: Address
    var y: Address
    var M: Int
    var C: Int
    var x_stride: Int
    var gate_stride: Int
    var dtype: Int32
    var context: Context


struct SwigluBwd:
    var dy: Address
    var x: Address
    var gate: Address
    var dx: Address
    var dgate: Address
    var M: Int
    var C: Int
    var x_stride: Int
    var gate_stride: Int
    var dx_stride: Int
    var dgate_stride: Int
    var dtype: Int32
    var context: Context


struct MatmulFwd:
    var a: Matrices
    var b: Matrices
    var c: Address
    var workspace: Address
    var batch: Int
    var M: Int
    var N: Int
    var K: Int
    var dtype: Int32
    var context: Context


struct MatmulBwd:
    var dc: Address
    var a: Matrices
    var b: Matrices
    var da: Address
    var db: Address
    var workspace: Address
    var batch: Int
    var M: Int
    var N: Int
    var K: Int
    var dtype: Int32
    var context: Context


struct LinearFwd:
    var x: Address
    var weight: Address
    var bias: Address
    var scale: Address
    var residual: Address
    var y: Address
    var preact: Address
    var workspace: Address
    var M: Int
    var N: Int
    var K: Int
    var x_stride: Int
    var weight_stride: Int
    var activation: Int32
    var dtype: Int32
    var param_dtype: Int32
    var out_dtype: Int32
    var context: Context


struct LinearBwd:
    var dy: Address
    var x: Address
    var weight: Address
    var scale: Address
    var preact: Address
    var dx: Address
    var dweight: Address
    var dbias: Address
    var dscale: Address
    var workspace: Address
    var M: Int
    var N: Int
    var K: Int
    var x_stride: Int
    var weight_stride: Int
    var activation: Int32
    var dtype: Int32
    var param_dtype: Int32
    var out_dtype: Int32
    var context: Context


struct RotaryFwd:
    var x: Heads
    var table: Heads
    var y: Heads
    var B: Int
    var N: Int
    var H: Int
    var D: Int
    var prefix: Int
    var pairing: Int32
    var dtype: Int32
    var param_dtype: Int32
    var context: Context


struct RotaryBwd:
    var dy: Heads
    var x: Heads
    var table: Heads
    var dx: Heads
    var dtable: Address
    var B: Int
    var N: Int
    var H: Int
    var D: Int
    var table_B: Int
    var table_H: Int
    var prefix: Int
    var pairing: Int32
    var dtype: Int32
    var param_dtype: Int32
    var context: Context


struct AttentionFwd:
    var q: Heads
    var k: Heads
    var v: Heads
    var out: Address
    var stats: Address
    var workspace: Address
    var B: Int
    var N: Int
    var L: Int
    var H: Int
    var D: Int
    var scale: Float64
    var dtype: Int32
    var context: Context


struct AttentionBwd:
    var dout: Address
    var q: Heads
    var k: Heads
    var v: Heads
    var out: Address
    var stats: Address
    var dq: Heads
    var dk: Heads
    var dv: Heads
    var workspace: Address
    var B: Int
    var N: Int
    var L: Int
    var H: Int
    var D: Int
    var scale: Float64
    var dtype: Int32
    var context: Context


struct AttentionRows:
    var q: Heads
    var k: Heads
    var queries: Address
    var rows: Heads
    var workspace: Address
    var B: Int
    var N: Int
    var R: Int
    var L: Int
    var H: Int
    var D: Int
    var scale: Float64
    var dtype: Int32
    var context: Context


struct Move:
    var a: View
    var lead: View
    var b: View
    var out: Address
    var sizes: Array[Int, 6]
    var leads: Int
    var terms: Int
    var term: Int
    var divisor: Float64
    var dtype: Int32
    var context: Context


struct LinearInt8:
    var x: Address
    var weight: Address
    var weight_scale: Address
    var bias: Address
    var scale: Address
    var residual: Address
    var y: Address
    var workspace: Address
    var M: Int
    var N: Int
    var K: Int
    var x_stride: Int
    var weight_stride: Int
    var activation: Int32
    var dtype: Int32
    var out_dtype: Int32
    var context: Context


struct AdamW:
    var param: Address
    var grad: Address
    var exp_avg: Address
    var exp_avg_sq: Address
    var exp_avg_scale: Address
    var exp_avg_sq_scale: Address
    var ema: Address
    var code: Address
    var n: Int
    var lr: Float64
    var beta1: Float64
    var beta2: Float64
    var eps: Float64
    var weight_decay: Float64
    var correction1: Float64
    var correction2: Float64
    var grad_scale: Float64
    var ema_decay: Float64
    var dtype: Int32
    var context: Context


def check_layout():
    """What kernels.h asserts about the same structs."""
    comptime assert size_of[Context]() == 24
    comptime assert size_of[LayerNormFwd]() == 112
    comptime assert size_of[LayerNormBwd]() == 128
    comptime assert size_of[RmsNormFwd]() == 96
    comptime assert size_of[RmsNormBwd]() == 112
    comptime assert size_of[GeluFwd]() == 56
    comptime assert size_of[GeluBwd]() == 64
    comptime assert size_of[SwigluFwd]() == 88
    comptime assert size_of[SwigluBwd]() == 120
    comptime assert size_of[MatmulFwd]() == 144
    comptime assert size_of[MatmulBwd]() == 160
    comptime assert size_of[LinearFwd]() == 144
    comptime assert size_of[LinearBwd]() == 160
    comptime assert size_of[RotaryFwd]() == 176
    comptime assert size_of[RotaryBwd]() == 232
    comptime assert size_of[AttentionFwd]() == 200
    comptime assert size_of[AttentionBwd]() == 304
    comptime assert size_of[AttentionRows]() == 200
    comptime assert size_of[Move]() == 288
    comptime assert size_of[LinearInt8]() == 144
    comptime assert size_of[AdamW]() == 176
