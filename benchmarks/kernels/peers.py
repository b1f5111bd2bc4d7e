"""Other implementations of MLA decode on the same tensors; each is there when it can be imported.

FlashMLA (module flash_mla: DeepSeek's releases to 2026-04, or the fork in the wheel sgl-flash-mla, which keeps the
dense kernel for Hopper) and FlashInfer's MLA wrapper, backend fa3. torch's SDPA gets keys that lie contiguous already:
it knows no pages, and is here as what a program without a kernel of its own would use.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_timing import Call
from benchmarks.kernels.cells import BLOCK, LATENT, ROPE, ROW, SCALE, Cell, Inputs

SDPA_MOST_BYTES = 2 << 30  # of contiguous keys
_FLASHINFER_WORKSPACE = 128 << 20


class Peer(NamedTuple):
    """Calls on one cell's inputs; outputs are [rows, H, 512] once flattened."""

    whole: Call | None  # with its schedule; None where the schedule is made on the host
    kernels: Call


class Peers:
    """Those that can be imported; `missing` has a line for each of the others."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._flash_mla = self._import("FlashMLA", "flash_mla")
        self._flashinfer = self._import("FlashInfer", "flashinfer.mla")
        self._workspace: Tensor | None = None

    def of(self, cell: Cell, inputs: Inputs) -> dict[str, Callable[[], Peer]]:
        """By name, what makes the peer: that may fail too. Nobody else has these fp8 rows in a dense kernel."""
        makers: dict[str, Callable[[], Peer]] = {}
        if cell.rows == "fp8":
            return makers
        if self._flash_mla is not None and inputs.cache.device.type == "cuda":
            makers["FlashMLA"] = lambda: flash_mla(self._flash_mla, cell, inputs)
        if self._flashinfer is not None and inputs.cache.device.type == "cuda":
            makers["FlashInfer fa3"] = lambda: self._of_flashinfer(cell, inputs)
        if cell.q_len == 1 and not cell.is_varied and cell.num_bytes * inputs.rotations <= SDPA_MOST_BYTES:
            makers["torch SDPA"] = lambda: sdpa(cell, inputs)
        return makers

    def _import(self, name: str, module: str) -> ModuleType | None:
        try:
            return import_module(module)
        except Exception as error:  # noqa: BLE001 — extensions fail in many ways when they do not fit this torch
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else str(error).splitlines()[0][:160]
            self.missing.append(f"peer {name}: {reason}")
            return None

    def _of_flashinfer(self, cell: Cell, inputs: Inputs) -> Peer:
        if self._workspace is None:
            self._workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=inputs.cache.device)
        return flashinfer(self._flashinfer, self._workspace, cell, inputs)


def flash_mla(module: ModuleType | None, cell: Cell, inputs: Inputs) -> Peer:
    """Its schedule is a kernel of its own, run by the first call with fresh metadata (older: by get_mla_metadata)."""
    assert module is not None
    q = inputs.q_RNHL.unflatten(1, (cell.batch, cell.q_len))
    cache = inputs.cache.unsqueeze(2)
    decode = module.flash_mla_with_kvcache
    metadata = module.get_mla_metadata
    extra = {"use_legacy": True} if "use_legacy" in inspect.signature(decode).parameters else {}
    per_latent_head = cell.q_len * cell.heads

    def run(rotation: int, plan: tuple[object, object]) -> Tensor:
        out, _ = decode(
            q[rotation],
            cache,
            inputs.tables_RBM[rotation],
            inputs.lengths_B,
            LATENT,
            *plan,
            softmax_scale=SCALE,
            causal=cell.q_len > 1,
            **extra,
        )
        return out.flatten(0, 1)

    planned = metadata(inputs.lengths_B, per_latent_head, 1)
    return Peer(lambda i: run(i, metadata(inputs.lengths_B, per_latent_head, 1)), lambda i: run(i, planned))


def flashinfer(module: ModuleType | None, workspace: Tensor, cell: Cell, inputs: Inputs) -> Peer:
    """One plan, made on the host, serves all rotations: they differ in their page indices alone."""
    assert module is not None
    device = inputs.cache.device
    rows = cell.q_len
    wrapper = module.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    blocks = [-(-length // BLOCK) for length in cell.lengths]
    starts = torch.tensor([0, *blocks]).cumsum(0).int().to(device)
    pages = [torch.cat([table[:n] for table, n in zip(t, blocks, strict=True)]) for t in inputs.tables_RBM]
    queries = torch.arange(0, cell.batch * rows + 1, rows, dtype=torch.int32, device=device)
    shape = (cell.heads, LATENT, ROPE, BLOCK, rows > 1, SCALE, torch.bfloat16, torch.bfloat16)
    wrapper.plan(queries, starts, pages[0], inputs.lengths_B, *shape)
    ckv, kpe = inputs.cache.split((LATENT, ROPE), dim=-1)

    def run(rotation: int) -> Tensor:
        wrapper._kv_indices_buf = pages[rotation]  # noqa: SLF001 — what `plan` keeps of the indices
        q_nope, q_pe = inputs.q_RNHL[rotation].split((LATENT, ROPE), dim=-1)
        return wrapper.run(q_nope, q_pe, ckv, kpe)

    return Peer(None, run)


def sdpa(cell: Cell, inputs: Inputs) -> Peer:
    """All heads of a sequence as query rows of one head; no mask is needed for one query at the end."""
    keys = torch.stack([inputs.cache[table.long()].flatten(1, 2)[:, : cell.context] for table in inputs.tables_RBM])
    assert keys.shape[-1] == ROW

    def run(rotation: int) -> Tensor:
        k = keys[rotation].unsqueeze(1)
        q = inputs.q_RNHL[rotation].unsqueeze(1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k[..., :LATENT], scale=SCALE)
        return out.squeeze(1)

    return Peer(run, run)
