"""Published networks are run as they were published: in single precision, deterministically."""

from contextlib import AbstractContextManager

import torch


def single_precision() -> AbstractContextManager[None]:
    """Convolutions without TensorFloat-32, which GPUs use by default."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
