"""Prompts as a text-to-image model takes them: T5 embeddings with masks, and the files of them."""

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from harmonica.errors import HarmonicaError, HarmonicaWarning
from harmonica.files import (
    existing_file,
    parse_json,
    read_safetensors,
    read_text,
    write_atomically,
)

FORMAT = "harmonica-prompts-1"
LOWERCASED_ONCE = "true"  # files that do not say it are of when all prompts were lower-cased
TENSORS = ("tokens", "mask", "null_tokens", "null_mask")
BYTE_ORDER_MARK = "\ufeff"  # with which some editors open a file
ROWS_AT_ONCE = 1 << 16  # of tokens that are looked through
# Captions written for this project, one per line.
BUNDLED_PROMPTS = Path(__file__).parent / "data" / "prompts.txt"


@dataclass(frozen=True)
class EncodedPrompts:
    """n prompts, encoded, and the null prompt of classifier-free guidance.

    Only what the masks keep is held, a fifth of all embeddings or less.

    Attributes:
        texts: the prompts as they were given.
        tokens: (m, d) float16, those of the first prompt, then those of the second, ...
        mask: (n, L) bool, True at the m tokens of prompts.
        null_tokens: (k, d) float16, of the empty prompt.
        null_mask: (L,) bool.
        encoder: the text encoder, by its name on the Hub or its folder.
        lowercased: whether it was given the texts in lower case.
        num_cut: how many prompts were longer than L tokens.
    """

    texts: tuple[str, ...]
    tokens: Tensor
    mask: Tensor
    null_tokens: Tensor
    null_mask: Tensor
    encoder: str
    lowercased: bool
    num_cut: int = 0

    @cached_property
    def _ends(self) -> list[int]:
        """Of every prompt, in ``tokens``."""
        return self.mask.sum(dim=1).cumsum(dim=0).tolist()

    def embeddings(self, rows: list[int]) -> Tensor:
        """Of these prompts: (len(rows), L, d) float16, zero where masked out."""
        starts = [0, *self._ends]
        tokens = [self.tokens[starts[row] : self._ends[row]] for row in rows]
        return _unpacked(torch.cat(tokens), self.mask[rows])

    @property
    def null_embedding(self) -> Tensor:
        """(L, d) float16, of the empty prompt, zero where masked out."""
        return _unpacked(self.null_tokens, self.null_mask)


def warn_of_cut(prompts: EncodedPrompts) -> None:
    """Say how many prompts are not whole, if any is not."""
    if prompts.num_cut:
        warnings.warn(
            f"{prompts.num_cut} of {len(prompts.texts)} prompts are longer than "
            f"{len(prompts.null_mask)} tokens and were cut",
            HarmonicaWarning,
            stacklevel=2,
        )


def read_prompts(path: Path) -> list[str]:
    """One prompt per line of a UTF-8 text file; an empty line is the empty prompt.

    Empty lines at the end are none: editors leave them there.

    Raises:
        HarmonicaError: unreadable, or nothing but empty lines.
    """
    existing_file(path, "--prompts")
    try:
        text = read_text(path)
    except HarmonicaError as error:
        raise HarmonicaError(f"--prompts {error}") from None
    # Not splitlines, for which there are ends of lines that no editor shows as such.
    lines = [line.removesuffix("\r") for line in text.removeprefix(BYTE_ORDER_MARK).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise HarmonicaError(f"--prompts {path} is empty; write one prompt per line")
    return lines


def save_prompts(path: Path, prompts: EncodedPrompts) -> None:
    """Write a safetensors file."""
    tensors = {name: getattr(prompts, name) for name in TENSORS}
    metadata = {
        "format": FORMAT,
        "encoder": prompts.encoder,
        "lowercased": json.dumps(prompts.lowercased),
        "texts": json.dumps(prompts.texts),
        "cut": str(prompts.num_cut),
    }
    write_atomically(path, safetensors_bytes(tensors, metadata))


def load_prompts(path: Path) -> EncodedPrompts:
    """Read what :func:`save_prompts` wrote.

    Raises:
        HarmonicaError: no such file, another kind of file, or parts that do not fit together.
    """
    tensors, metadata = read_safetensors(existing_file(path, "--prompts"))
    fault = _fault(tensors, metadata)
    if fault is not None:
        raise HarmonicaError(
            f"--prompts {path} is not a whole file of encoded prompts ({fault}); make it again "
            "with scripts/encode_prompts.py"
        )
    return EncodedPrompts(
        texts=tuple(parse_json(metadata["texts"], "its texts")),
        encoder=metadata["encoder"],
        lowercased=metadata.get("lowercased", LOWERCASED_ONCE) == "true",
        num_cut=int(metadata.get("cut", 0)),
        **tensors,
    )


def _fault(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str | None:
    """What is wrong with the content of a file; None if nothing is."""
    if metadata.get("format") != FORMAT:
        return f"its format is {metadata.get('format')}, not {FORMAT}"
    if set(tensors) != set(TENSORS) or "encoder" not in metadata:
        return "something is missing or unknown"
    if metadata.get("lowercased", LOWERCASED_ONCE) not in ("true", "false"):
        return "it does not say whether its texts were put into lower case"
    try:
        texts = parse_json(metadata.get("texts", ""), "its texts")
    except HarmonicaError:
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "its texts are not a list"
    if metadata.get("cut", "0") not in map(str, range(len(texts) + 1)):
        return "it has another number of prompts that were cut"
    mask, null_mask = tensors["mask"], tensors["null_mask"]
    if mask.dtype != torch.bool or null_mask.dtype != torch.bool:
        return "its masks are not boolean"
    if not texts or mask.shape != (len(texts), *null_mask.shape) or null_mask.dim() != 1:
        return f"{len(texts)} texts do not go with masks of shape {tuple(mask.shape)}"
    if not (mask.any(dim=1).all() and null_mask.any()):
        return "a prompt has no token"
    for name, kept in (("tokens", mask), ("null_tokens", null_mask)):
        rows = tensors[name]
        if rows.dtype != torch.float16 or rows.dim() != 2 or len(rows) != kept.sum():
            return f"{name} is {tuple(rows.shape)} {rows.dtype} for {int(kept.sum())} tokens"
        if not all(some.isfinite().all() for some in rows.split(ROWS_AT_ONCE)):
            return f"{name} holds numbers that are not finite"
    if tensors["tokens"].shape[1] != tensors["null_tokens"].shape[1]:
        return "the null prompt has another width"
    return None


def _unpacked(tokens: Tensor, mask: Tensor) -> Tensor:
    """Rows of ``tokens`` (m, d) at the m places of ``mask`` (..., L), zeros elsewhere."""
    embeddings = tokens.new_zeros(*mask.shape, tokens.shape[1])
    embeddings[mask] = tokens
    return embeddings
