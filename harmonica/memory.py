"""What does not fit into the memory of a GPU."""

import re

import torch

# Libraries that allocate for themselves, and the driver, raise no OutOfMemoryError.
_SAID = re.compile(r"out of memory|CU[A-Z]+_STATUS_\w*ALLOC")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether smaller batches are the remedy."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_SAID.search(str(error)))
