"""Training without padding: the rows of a pass lie end to end, and attention stays within each of them.

    without_padding(model)      # before the trainer is made; `bench/gpu.py --try padding-free`

It is here and not in the stages, because it has never run on a GPU. Only the layers in the middle of the model see rows
end to end. What goes in and what comes out is padded as before, so that every trainer, loss and figure stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

KERNEL = "variable_length"


def without_padding(model: Any) -> None:
    """Let the layers of a PEFT model compute real tokens only.

    On a GPU attention is torch's kernel for rows of different lengths. A CPU has none. There transformers makes a mask
    that keeps rows apart. That computes far more than is needed, but it shows that the result is the same.
    """
    layers = model.get_base_model().base_model
    padded_forward = layers.forward
    if next(model.parameters()).is_cuda:
        use_kernel(model)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: Any) -> Any:
        real = attention_mask.bool()
        lengths = real.sum(1)
        borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
        output = padded_forward(
            input_ids=input_ids[real][None],
            position_ids=(real.cumsum(1) - 1)[real][None],  # begins anew with every row
            cu_seq_lens_q=borders,
            cu_seq_lens_k=borders,
            max_length_q=longest,
            max_length_k=longest,
            **more,
        )
        hidden = output.last_hidden_state[0]
        output.last_hidden_state = hidden.new_zeros(*real.shape, hidden.shape[-1]).index_put(
            real.nonzero(as_tuple=True), hidden
        )
        return output

    layers.forward = forward


def use_kernel(model: Any) -> None:
    """Compute the model's attention by torch's flash kernel for rows of different lengths; no mask is made."""
    AttentionInterface.register(KERNEL, attend)
    AttentionMaskInterface.register(KERNEL, lambda *_, **__: None)
    model.get_base_model().set_attn_implementation(KERNEL)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **borders: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row: tensors of (1, heads, tokens, size) give one of (1, tokens, heads, size)."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        *(part[0].transpose(0, 1).contiguous() for part in (query, key, value)),
        borders["cu_seq_lens_q"],
        borders["cu_seq_lens_k"],
        borders["max_length_q"],
        borders["max_length_k"],
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None  # type: ignore[index]
