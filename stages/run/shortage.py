"""Tells whether an error means that memory ran out."""

from __future__ import annotations

# What torch, its libraries and CUDA say. Only torch's own allocator raises torch.OutOfMemoryError; cuBLAS and cuDNN
# fetch workspaces of their own and report a failure as an ordinary RuntimeError with the name of their status, and so
# does torch's allocator on a processor.
SAYINGS = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether a failure of torch or of a library under it (all are RuntimeErrors) was for want of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SAYINGS)
