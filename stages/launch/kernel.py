"""A Triton kernel of one line. Run as a script (compiler.py does), it shows whether kernels can be built here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_one(place):  # type: ignore[no-untyped-def]  # Triton would look the types up
    """Write a 1."""
    tl.store(place, 1)


if __name__ == "__main__":
    number = torch.zeros(1, dtype=torch.int32, device="cuda")
    write_one[(1,)](number)
    assert number.item() == 1
