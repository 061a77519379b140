"""Modules that stand in for others whose code fixes a width: same parameters under the same names, same results.

An adapter reads its widths off its tensors when it runs, so it goes on working once they are sliced.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

M = TypeVar("M", bound=nn.Module)


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with packed projections, whose heads may be fewer than its width asks for."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight = original.in_proj_weight
        self.in_proj_bias = original.in_proj_bias
        self.out_proj = original.out_proj
        self.head_dim = original.head_dim
        self.dropout = original.dropout
        self.batch_first = original.batch_first
        self._qkv_same_embed_dim = False  # keeps TransformerEncoderLayer off the fused path, which knows no slices
        self.training = original.training

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the original: (output, attention weights or None)."""
        del is_causal  # a hint: the original needs the mask beside it, which says the same
        same = key is query and value is key
        batched = query.dim() == 3
        q, k, v = (self.batch_leading(x, batched) for x in (query, key, value))
        if same:
            q, k, v = functional.linear(q, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (functional.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        q, k, v = (x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
        mask = self.bias(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attention = (scores if mask is None else scores + mask).softmax(-1)
            mixed = functional.dropout(attention, dropout) @ v
            attention = attention.mean(1) if average_attn_weights else attention
            attention = attention if batched else attention.squeeze(0)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), attention
        return (output if self.batch_first else output.transpose(0, 1)), attention

    def batch_leading(self, x: torch.Tensor, batched: bool) -> torch.Tensor:
        """(batch, length, width) whatever the layout of the call."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def bias(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor
    ) -> torch.Tensor | None:
        """Both masks as one that is added to the scores, broadcastable to (batch, heads, length, length)."""
        total = None
        for mask in (attn_mask, key_padding_mask):
            if mask is None:
                continue
            added = (
                torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
                if mask.dtype == torch.bool
                else mask
            )
            if mask is key_padding_mask:
                added = added.reshape(-1, 1, 1, added.shape[-1])
            elif added.dim() == 3:
                added = added.reshape(len(q), -1, *added.shape[1:])
            total = added if total is None else total + added
        return total


def adapt_multihead_attention(module: nn.MultiheadAttention) -> MultiheadAttention | None:
    """None where the module does what the adapter does not: separate projections, extra keys."""
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return None
    return MultiheadAttention(module)


ADAPTERS: dict[type[nn.Module], Callable[..., nn.Module | None]] = {nn.MultiheadAttention: adapt_multihead_attention}


def adapt(model: M) -> M:
    """Replace, in place, every submodule that has an adapter; subclasses of an adapted class are left alone."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            make = ADAPTERS.get(type(child))
            stand_in = make(child) if make is not None else None
            if stand_in is not None:
                setattr(parent, name, stand_in)
    return model
