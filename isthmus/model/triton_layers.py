"""One decoder layer over the kernels: the weights of `isthmus.model.attention` and `mlp` as the kernels take them.

Nothing is copied: matrices are the stored [out, in] ones. Activations are bf16, one row a token; in decode and prefill
alike a row's bits depend on that row, its position and its cache alone.
"""

from dataclasses import dataclass

from torch import Tensor

from isthmus.model.attention import Attention
from isthmus.model.linear import ExpertStack, Fp8ExpertStack, Fp8Linear, Linear
from isthmus.model.mlp import DenseMlp, ExpertsMlp, Mlp
from isthmus.model.rope import PositionTables
from kernels.attention_decode.attend import paged_mla_decode
from kernels.attention_decode.schedule import DecodeScratch
from kernels.attention_prefill.attend import paged_mla_prefill
from kernels.attention_prefill.plan import PrefillPlan
from kernels.elementwise.rows import rms_norm, swiglu
from kernels.experts.definition import Matrices
from kernels.experts.mixture import Fp8Matrix, experts
from kernels.experts.routing import route
from kernels.latents.store import rotate_queries, store_latents
from kernels.products.bf16 import Role, head_matmul, linear, router_logits
from kernels.products.fp8 import fp8_linear, quantise_rows
from kernels.table import UnsupportedKernel


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix in bf16, or in block-FP8 with a scale for every 128 elements of a row."""

    weight: Tensor  # [out, in]
    scales: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, matrix: Linear | Fp8Linear) -> "Projection":
        if isinstance(matrix, Fp8Linear):
            return cls(matrix.weight, matrix.scales, matrix.bias)
        return cls(matrix.weight.t(), None, matrix.bias)

    def apply(self, x_NK: Tensor, role: Role) -> Tensor:
        """x @ weight + bias in bf16: [N, out]."""
        if self.scales is None:
            return linear(x_NK, self.weight, self.bias, role=role)
        x, scales = quantise_rows(x_NK)
        return fp8_linear(x, scales, self.weight, self.scales, self.bias, role=role)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of a step are, for every layer alike. A row of padding has position and slot -1."""

    positions_N: Tensor  # int32
    slots_N: Tensor  # int64: where each row's latent is stored
    scale_N: Tensor  # fp32: of each row's queries
    num_real: Tensor | None  # int32 on the device: rows from there on are padding


class TritonAttention:
    def __init__(self, attention: Attention, tables: PositionTables) -> None:
        self.shape = attention.shape
        self.norm = attention.norm
        self.norm_eps = attention.norm_eps
        self._latent_eps = attention.latent_norm_eps
        self._tables = tables
        self._qkv_a = Projection.of(attention.qkv_a)
        self._o = Projection.of(attention.o)
        self._q_a_norm = attention.q_a_norm
        self._q_b = None if attention.q_b is None else Projection.of(attention.q_b)
        self._kv_a_norm = attention.kv_a_norm
        self._kv_b = attention.kv_b.t()
        self._key_up = attention.key_up
        self._value_up = attention.value_up

    def project_and_store(self, x_ND: Tensor, rows: Rows, cache: Tensor, role: Role) -> Tensor:
        """Queries [N, H, nope + R], not rotated; the rows' latents are in the cache when what is launched has run."""
        shape = self.shape
        qkv = self._qkv_a.apply(x_ND, role)
        latent_start = qkv.shape[1] - shape.latent - shape.rope
        q = qkv.narrow(1, 0, latent_start)
        if self._q_b is not None and self._q_a_norm is not None:
            q = self._q_b.apply(rms_norm(q, self._q_a_norm, self._latent_eps), role)
        norm = (self._kv_a_norm, self._latent_eps)
        rotation = (self._tables.cos, self._tables.signed_sin)
        places = (rows.positions_N, rows.slots_N, cache)
        store_latents(qkv, *norm, *rotation, *places, latent_start=latent_start)
        return q.unflatten(1, (shape.num_heads, shape.nope + shape.rope))

    def decode(self, q_BHK: Tensor, rows: Rows, cache: Tensor, block_tables: Tensor, scratch: DecodeScratch) -> Tensor:
        """[B, D] of the attention block, absorbed."""
        shape = self.shape
        q_BHL = q_BHK.new_empty(q_BHK.shape[0], shape.num_heads, shape.latent + shape.rope)
        self._rotate(q_BHK, rows, q_BHL.narrow(2, shape.latent, shape.rope))
        head_matmul(q_BHK.narrow(2, 0, shape.nope), self._key_up, q_BHL.narrow(2, 0, shape.latent), role="decode")
        attended_BHC = paged_mla_decode(
            q_BHL, rows.scale_N, cache, block_tables, rows.positions_N, scratch, latent_rank=shape.latent
        )
        out_BHV = q_BHK.new_empty(q_BHK.shape[0], shape.num_heads, shape.value)
        head_matmul(attended_BHC, self._value_up, out_BHV, role="decode")
        return self._o.apply(out_BHV.flatten(1), "decode")

    def prefill(self, q_NHK: Tensor, rows: Rows, cache: Tensor, plan: PrefillPlan) -> Tensor:
        """[N, D] of the attention block, expanded; rotates the queries where they are."""
        shape = self.shape
        self._rotate(q_NHK, rows, q_NHK.narrow(2, shape.nope, shape.rope))
        out_NHV = paged_mla_prefill(q_NHK, rows.scale_N, cache, plan, self._kv_b, shape=shape, linear=linear)
        return self._o.apply(out_NHV.flatten(1), "prefill")

    def _rotate(self, q_NHK: Tensor, rows: Rows, out_NHR: Tensor) -> None:
        cos = self._tables.cos
        signed_sin = self._tables.signed_sin
        rotate_queries(q_NHK, cos, signed_sin, rows.positions_N, out_NHR, nope=self.shape.nope)


class TritonDense:
    def __init__(self, mlp: DenseMlp) -> None:
        self._gate_up = Projection.of(mlp.gate_up)
        self._down = Projection.of(mlp.down)

    def forward(self, x_ND: Tensor, rows: Rows, role: Role) -> Tensor:
        """[N, D]."""
        return self._down.apply(swiglu(self._gate_up.apply(x_ND, role)), role)


class TritonExperts:
    def __init__(self, mlp: ExpertsMlp) -> None:
        self._router = mlp.router.t()
        self._bias = mlp.bias
        self._rule = mlp.rule
        self._gate_up = _stack(mlp.gate_up)
        self._down = _stack(mlp.down)
        self._shared = None if mlp.shared is None else TritonDense(mlp.shared)
        self._norm = mlp.norm
        self._norm_eps = mlp.norm_eps

    def forward(self, x_ND: Tensor, rows: Rows, role: Role) -> Tensor:
        """[N, D]; rows of padding get the shared expert alone, or zeros."""
        logits = router_logits(x_ND, self._router, role)
        weights_NA, ids_NA = route(logits, self._bias, self._rule)
        shared = None if self._shared is None else self._shared.forward(x_ND, rows, role)
        chosen = (x_ND, weights_NA, ids_NA, self._gate_up, self._down, rows.num_real)
        out = experts(*chosen, role=role, shared_ND=shared, out_dtype=x_ND.dtype)
        return out if self._norm is None else rms_norm(out, self._norm, self._norm_eps)


def _stack(matrices: Matrices) -> Tensor | Fp8Matrix:
    if isinstance(matrices, ExpertStack):
        return matrices.weight
    if isinstance(matrices, Fp8ExpertStack):
        return Fp8Matrix(matrices.weight, matrices.scales)
    raise UnsupportedKernel(f"experts kept as {type(matrices).__name__}, not as one stack")


def triton_mlp(mlp: Mlp) -> TritonDense | TritonExperts:
    return TritonExperts(mlp) if isinstance(mlp, ExpertsMlp) else TritonDense(mlp)
