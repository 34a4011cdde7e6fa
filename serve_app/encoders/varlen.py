"""Attention over sequences end to end in one kernel: PyTorch's variable-length one, where the device has it.

Nothing is padded or gathered. `packed.py` asks before it calls, and loops over groups of a length where it may not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.attention.varlen import varlen_attn

WIDEST, MULTIPLE = 256, 8  # of a head, in FlashAttention 2
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where sequences begin, and where the last one ends: int32 [sequences + 1], on the device. longest: tokens."""

    starts: torch.Tensor
    longest: int


def fits(query: torch.Tensor, key: torch.Tensor, window: int | None) -> bool:
    """Whether the kernel takes these. query, key: [tokens, heads, width]; window: as in `attend`."""
    grouped = query.shape[1] != key.shape[1]
    return _works(query.device, query.dtype, query.shape[-1], grouped, window is not None)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, width: int, grouped: bool, windowed: bool) -> bool:
    """Tried out, on values that are all alike: what the kernel takes depends on GPU and build, and is told nowhere."""
    if dtype not in DTYPES or width % MULTIPLE or width > WIDEST:
        return False
    key = torch.ones(5, 1, width, dtype=dtype, device=device)
    query = torch.ones(5, 2 if grouped else 1, width, dtype=dtype, device=device)
    bounds = Bounds(torch.tensor([0, 2, 5], dtype=torch.int32, device=device), 3)
    try:
        found = attend(query, key, key, bounds, causal=False, window=2 if windowed else None, scale=None)
        return bool(torch.equal(found, torch.ones_like(query)))
    except Exception:  # a CPU, an old GPU, a build without FlashAttention
        return False


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Bounds,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Inside each sequence. query [tokens, heads, width], key and value with as many heads or a divisor of it.

    causal: tokens see only those before them, and themselves. window: only tokens nearer than that.
    """
    back = -1 if window is None else window - 1
    found = varlen_attn(
        query,
        key,
        value,
        bounds.starts,
        bounds.starts,
        bounds.longest,
        bounds.longest,
        scale=scale,
        window_size=(back, 0 if causal else back),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(torch.Tensor, found)  # more comes only when it is asked for
