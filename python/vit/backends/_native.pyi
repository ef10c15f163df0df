# What every compiled module vit._<backend> holds. Made by build_backend/stub.py from csrc/ops.def and csrc/vit.h.
from enum import IntEnum
from typing import Any, Protocol

class Native(Protocol):
    __file__: str
    contract: int
    fields: dict[str, list[str]]
    DType: type[IntEnum]
    Activation: type[IntEnum]
    Pairing: type[IntEnum]

    def info(self) -> list[tuple[str, str]]: ...
    def listen(self) -> None: ...
    def repeats(self, exchange: Any, *of_torch: Any) -> tuple[Any, Any] | None: ...
    def layer_norm_fwd(
        self, x: int, weight: int, bias: int, y: int, mean: int, rstd: int, M: int, C: int, x_stride: int, eps: float, dtype: int, param_dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def layer_norm_bwd(
        self, dy: int, x: int, weight: int, mean: int, rstd: int, dx: int, dweight: int, dbias: int, M: int, C: int, x_stride: int, dtype: int, param_dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def rms_norm_fwd(
        self, x: int, weight: int, y: int, rstd: int, M: int, C: int, x_stride: int, eps: float, dtype: int, param_dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def rms_norm_bwd(
        self, dy: int, x: int, weight: int, rstd: int, dx: int, dweight: int, M: int, C: int, x_stride: int, dtype: int, param_dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def gelu_fwd(
        self, x: int, y: int, n: int, activation: int, dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def gelu_bwd(
        self, dy: int, x: int, dx: int, n: int, activation: int, dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def swiglu_fwd(
        self, x: int, gate: int, y: int, M: int, C: int, x_stride: int, gate_stride: int, dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def swiglu_bwd(
        self, dy: int, x: int, gate: int, dx: int, dgate: int, M: int, C: int, x_stride: int, gate_stride: int, dx_stride: int, dgate_stride: int, dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def matmul_fwd(
        self, a: int, a_batch: int, a_row: int, a_col: int, b: int, b_batch: int, b_row: int, b_col: int, c: int, batch: int, M: int, N: int, K: int, dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def matmul_bwd(
        self, dc: int, a: int, a_batch: int, a_row: int, a_col: int, b: int, b_batch: int, b_row: int, b_col: int, da: int, db: int, batch: int, M: int, N: int, K: int, dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def linear_fwd(
        self, x: int, weight: int, bias: int, scale: int, residual: int, y: int, preact: int, M: int, N: int, K: int, x_stride: int, weight_stride: int, activation: int, dtype: int, param_dtype: int, out_dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def linear_bwd(
        self, dy: int, x: int, weight: int, scale: int, preact: int, dx: int, dweight: int, dbias: int, dscale: int, M: int, N: int, K: int, x_stride: int, weight_stride: int, activation: int, dtype: int, param_dtype: int, out_dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def rotary_fwd(
        self, x: int, x_batch: int, x_token: int, x_head: int, table: int, table_batch: int, table_token: int, table_head: int, y: int, y_batch: int, y_token: int, y_head: int, B: int, N: int, H: int, D: int, prefix: int, pairing: int, dtype: int, param_dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def rotary_bwd(
        self, dy: int, dy_batch: int, dy_token: int, dy_head: int, x: int, x_batch: int, x_token: int, x_head: int, table: int, table_batch: int, table_token: int, table_head: int, dx: int, dx_batch: int, dx_token: int, dx_head: int, dtable: int, B: int, N: int, H: int, D: int, table_B: int, table_H: int, prefix: int, pairing: int, dtype: int, param_dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def attention_fwd(
        self, q: int, q_batch: int, q_token: int, q_head: int, k: int, k_batch: int, k_token: int, k_head: int, v: int, v_batch: int, v_token: int, v_head: int, out: int, stats: int, B: int, N: int, L: int, H: int, D: int, scale: float, dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def attention_bwd(
        self, dout: int, q: int, q_batch: int, q_token: int, q_head: int, k: int, k_batch: int, k_token: int, k_head: int, v: int, v_batch: int, v_token: int, v_head: int, out: int, stats: int, dq: int, dq_batch: int, dq_token: int, dq_head: int, dk: int, dk_batch: int, dk_token: int, dk_head: int, dv: int, dv_batch: int, dv_token: int, dv_head: int, B: int, N: int, L: int, H: int, D: int, scale: float, dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def adamw(
        self, param: int, grad: int, exp_avg: int, exp_avg_sq: int, exp_avg_scale: int, exp_avg_sq_scale: int, ema: int, code: int, n: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, correction1: float, correction2: float, grad_scale: float, ema_decay: float, dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def move(
        self, a: int, a_0: int, a_1: int, a_2: int, a_3: int, a_4: int, a_5: int, lead: int, lead_0: int, lead_1: int, lead_2: int, lead_3: int, lead_4: int, lead_5: int, b: int, b_0: int, b_1: int, b_2: int, b_3: int, b_4: int, b_5: int, out: int, sizes_0: int, sizes_1: int, sizes_2: int, sizes_3: int, sizes_4: int, sizes_5: int, leads: int, terms: int, term: int, divisor: float, dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def attention_rows(
        self, q: int, q_batch: int, q_token: int, q_head: int, k: int, k_batch: int, k_token: int, k_head: int, queries: int, rows: int, rows_batch: int, rows_token: int, rows_head: int, B: int, N: int, R: int, L: int, H: int, D: int, scale: float, dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def linear_int8(
        self, x: int, weight: int, weight_scale: int, bias: int, scale: int, residual: int, y: int, M: int, N: int, K: int, x_stride: int, weight_stride: int, activation: int, dtype: int, out_dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
    def adamw_captured(
        self, param: int, grad: int, exp_avg: int, exp_avg_sq: int, exp_avg_scale: int, exp_avg_sq_scale: int, ema: int, code: int, numbers: int, n: int, beta1: float, beta2: float, eps: float, ema_decay: float, dtype: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> None: ...  # fmt: skip
    def linear_fp8(
        self, x: int, weight: int, weight_scale: int, bias: int, scale: int, residual: int, y: int, M: int, N: int, K: int, x_stride: int, weight_stride: int, activation: int, dtype: int, out_dtype: int, workspace: int, workspace_bytes: int, stream: int, device: int, num_threads: int, allow_tf32: bool, /
    ) -> int | None: ...  # fmt: skip
