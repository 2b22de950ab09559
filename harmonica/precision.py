"""Rounding in float32: what sampling may, and what published networks are run without."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_rounding(rounds: bool) -> None:
    """Whether a GPU rounds float32 factors of products and convolutions to TensorFloat-32."""
    torch.set_float32_matmul_precision("high" if rounds else "highest")
    torch.backends.cudnn.allow_tf32 = rounds


@contextmanager
def single_precision() -> Iterator[None]:
    """As networks were published: without rounding, which sampling may use, deterministically."""
    products = torch.get_float32_matmul_precision()
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            set_rounding(False)
            yield
    finally:
        torch.set_float32_matmul_precision(products)
