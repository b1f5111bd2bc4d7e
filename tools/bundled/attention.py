"""Causal attention for training on a CPU: fp32, in query chunks, so that masked halves are never computed."""

from typing import Any

import torch

CHUNK = 128


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T) v with a causal mask; q is already scaled. Two to three times faster than the stock CPU kernel
    at these sizes, and values need not be padded to the width of the keys."""

    @staticmethod
    def forward(ctx: Any, q_NTK: torch.Tensor, k_NTK: torch.Tensor, v_NTV: torch.Tensor) -> torch.Tensor:
        length = q_NTK.shape[1]
        out_NTV = torch.empty_like(v_NTV)
        weights = []
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            scores = torch.bmm(q_NTK[:, start:end], k_NTK[:, :end].transpose(1, 2))
            mask = torch.full((end - start, end - start), float("-inf"), device=scores.device).triu(1)
            scores[..., start:] += mask
            weights.append(torch.softmax(scores, -1))
            out_NTV[:, start:end] = torch.bmm(weights[-1], v_NTV[:, :end])
        ctx.save_for_backward(q_NTK, k_NTK, v_NTV, out_NTV, *weights)
        return out_NTV

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_NTK, k_NTK, v_NTV, out_NTV, *weights = ctx.saved_tensors
        (dout_NTV,) = grads
        dq_NTK = torch.empty_like(q_NTK)
        dk_NTK = torch.zeros_like(k_NTK)
        dv_NTV = torch.zeros_like(v_NTV)
        delta_NT1 = (dout_NTV * out_NTV).sum(-1, keepdim=True)
        for index, weight in enumerate(weights):
            start = index * CHUNK
            end = start + weight.shape[1]
            dout = dout_NTV[:, start:end]
            dv_NTV[:, :end].baddbmm_(weight.transpose(1, 2), dout)
            dscores = torch.bmm(dout, v_NTV[:, :end].transpose(1, 2)).sub_(delta_NT1[:, start:end]).mul_(weight)
            dq_NTK[:, start:end] = torch.bmm(dscores, k_NTK[:, :end])
            dk_NTK[:, :end].baddbmm_(dscores.transpose(1, 2), q_NTK[:, start:end])
        return dq_NTK, dk_NTK, dv_NTV
