"""Prompts as a text-to-image model takes them: T5 embeddings with masks, made once and kept."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from tqdm import tqdm

from harmonica.errors import HarmonicaError
from harmonica.files import (
    existing_file,
    parse_json,
    read_safetensors,
    read_text,
    write_atomically,
)

FORMAT = "harmonica-prompts-1"
# Captions written for this project, one per line.
BUNDLED_PROMPTS = Path(__file__).parent / "data" / "prompts.txt"


@dataclass(frozen=True)
class EncodedPrompts:
    """n prompts, encoded, and the null prompt of classifier-free guidance.

    Attributes:
        texts: the prompts as they were given.
        embeddings: (n, L, d) float16, zero where masked out.
        mask: (n, L) bool, True at the tokens of a prompt.
        null_embedding: (L, d) float16, of the empty prompt.
        null_mask: (L,) bool.
        encoder: the text encoder, by its name on the Hub or its folder.
    """

    texts: tuple[str, ...]
    embeddings: Tensor
    mask: Tensor
    null_embedding: Tensor
    null_mask: Tensor
    encoder: str


def read_prompts(path: Path) -> list[str]:
    """One prompt per line of a UTF-8 text file.

    Raises:
        HarmonicaError: unreadable, no line at all, or a line without a prompt.
    """
    existing_file(path, "--prompts")
    try:
        lines = read_text(path).splitlines()
    except HarmonicaError as error:
        raise HarmonicaError(f"--prompts {error}") from None
    if not lines:
        raise HarmonicaError(f"--prompts {path} is empty; write one prompt per line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise HarmonicaError(
                f"--prompts {path}: line {number} is empty; give every image a prompt"
            )
    return lines


def save_prompts(path: Path, prompts: EncodedPrompts) -> None:
    """Write a safetensors file; only what the masks keep, about a fifth of the embeddings."""
    tensors = {
        "tokens": prompts.embeddings[prompts.mask].half(),
        "mask": prompts.mask,
        "null_tokens": prompts.null_embedding[prompts.null_mask].half(),
        "null_mask": prompts.null_mask,
    }
    metadata = {"format": FORMAT, "encoder": prompts.encoder, "texts": json.dumps(prompts.texts)}
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors_bytes(content, metadata))


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
        embeddings=_unpacked(tensors["tokens"], tensors["mask"]),
        mask=tensors["mask"],
        null_embedding=_unpacked(tensors["null_tokens"], tensors["null_mask"]),
        null_mask=tensors["null_mask"],
        encoder=metadata["encoder"],
    )


def _fault(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str | None:
    """What is wrong with the content of a file; None if nothing is."""
    if metadata.get("format") != FORMAT:
        return f"its format is {metadata.get('format')}, not {FORMAT}"
    if set(tensors) != {"tokens", "mask", "null_tokens", "null_mask"} or "encoder" not in metadata:
        return "something is missing or unknown"
    try:
        texts = parse_json(metadata.get("texts", ""), "its texts")
    except HarmonicaError:
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "its texts are not a list"
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
        if not rows.isfinite().all():
            return f"{name} holds numbers that are not finite"
    if tensors["tokens"].shape[1] != tensors["null_tokens"].shape[1]:
        return "the null prompt has another width"
    return None


def _unpacked(tokens: Tensor, mask: Tensor) -> Tensor:
    """Rows of ``tokens`` (m, d) at the m places of ``mask`` (..., L), zeros elsewhere."""
    embeddings = tokens.new_zeros(*mask.shape, tokens.shape[1])
    embeddings[mask] = tokens
    return embeddings


class TextEncoder:
    """A T5 encoder with its tokenizer, at the lengths a model was trained with."""

    def __init__(self, name: str, max_tokens: int):
        """The tokenizer; the encoder itself is loaded by the first prompt that needs it.

        Args:
            name: repository on the Hub or folder: a diffusers pipeline (``tokenizer/`` and
                ``text_encoder/`` in it), or a T5 alone.
            max_tokens: L.
        """
        try:
            import transformers  # heavy, and only prompts need it
        except ImportError:
            raise HarmonicaError(
                "prompts need transformers; install the project with its extra [text]"
            ) from None
        self.name, self.max_tokens = name, max_tokens
        self._transformers, self._model = transformers, None
        self._tokenizer = self._load(transformers.AutoTokenizer, "tokenizer")

    def _load(self, kind: Any, subfolder: str, **options: Any) -> Any:
        folder = Path(self.name)
        # Nothing that could be code; a tokenizer has no weights and takes no notice of the first.
        load = partial(kind.from_pretrained, use_safetensors=True, trust_remote_code=False)
        try:
            if folder.is_dir() and not (folder / subfolder).is_dir():
                return load(folder, **options)
            try:
                return load(self.name, subfolder=subfolder, **options)
            except (OSError, ValueError):
                if folder.is_dir():
                    raise
                return load(self.name, **options)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:160]
            remedy = "pass a T5 or a pipeline of the Hub, or the folder of a copy"
            if subfolder == "tokenizer" and find_spec("sentencepiece") is None:
                remedy += ", and install the project with its extra [text] for sentencepiece"
            raise HarmonicaError(
                f"--text-encoder {self.name} has no {subfolder} that can be loaded ({reason}); "
                f"{remedy}"
            ) from None

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of every prompt, in lower case as PixArt wants them, and how many were cut."""
        plain = [text.lower().strip() for text in texts]
        whole = self._tokenizer(plain).input_ids
        cut = self._tokenizer(plain, truncation=True, max_length=self.max_tokens).input_ids
        return cut, sum(len(a) > len(b) for a, b in zip(whole, cut, strict=True))

    @torch.inference_mode()
    def encode(self, ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings (n, L, d) float16, zero where masked out, and mask (n, L), on the CPU."""
        if self._model is None:
            # Half precision on a GPU; transformers keeps in float32 what overflows in it.
            dtype = torch.float16 if device.type == "cuda" else torch.float32
            kind = self._transformers.T5EncoderModel
            self._model = self._load(kind, "text_encoder", dtype=dtype).eval().to(device)
        # No longer than the longest: the rest is masked out, and is most of the work.
        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
        states = self._model(batch.input_ids, attention_mask=batch.attention_mask)[0]
        length = states.shape[1]
        mask = torch.zeros(len(ids), self.max_tokens, dtype=torch.bool)
        mask[:, :length] = batch.attention_mask.bool().cpu()
        tokens = states.cpu().half()[mask[:, :length]]
        if not tokens.isfinite().all():
            raise HarmonicaError(
                f"--text-encoder {self.name} gives numbers that are not finite in half precision; "
                "use the encoder that the model was trained with"
            )
        return _unpacked(tokens, mask), mask


def encode_prompts(
    texts: Sequence[str],
    encoder: str,
    device: torch.device,
    max_tokens: int = 120,
    batch_size: int = 16,
    progress: str | None = None,
    parts: Path | None = None,
) -> EncodedPrompts:
    """Encode prompts with a T5 that is gone from memory afterwards.

    Args:
        encoder: a T5, or a diffusers pipeline with one: a repository of the Hub, or a folder.
        max_tokens: L; longer prompts are cut, with a warning.
        progress: label of a progress bar; None shows none.
        parts: folder in which finished batches are kept, and found again by the next call.

    Raises:
        HarmonicaError: no prompts, or an encoder that cannot be loaded or used in half precision.
    """
    texts = tuple(texts)
    if not texts:
        raise HarmonicaError("--prompts holds no prompt; write one per line")
    t5 = TextEncoder(encoder, max_tokens)
    _, num_cut = t5.tokenize(texts)
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(texts)} prompts are longer than {max_tokens} tokens and were cut",
            stacklevel=2,
        )
    null: tuple[Tensor, Tensor] | None = None
    batches, tokens = [], []
    for number, start in enumerate(
        tqdm(
            range(0, len(texts), batch_size),
            desc=progress,
            disable=progress is None,
            unit="batch",
        )
    ):
        some = texts[start : start + batch_size]
        part = None if parts is None else Path(parts) / f"{number:06}.safetensors"
        batch = _finished(part, some, encoder, max_tokens)
        if batch is None:
            if null is None:
                null = t5.encode(t5.tokenize([""])[0], device)
            embeddings, mask = t5.encode(t5.tokenize(some)[0], device)
            batch = EncodedPrompts(some, embeddings, mask, null[0][0], null[1][0], encoder)
            if part is not None:
                save_prompts(part, batch)
        tokens.append(batch.embeddings[batch.mask])
        batches.append(replace(batch, embeddings=batch.embeddings[:0]))  # five times the tokens
    del t5
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the encoder held is for the transformer
    mask = torch.cat([batch.mask for batch in batches])
    embeddings = _unpacked(torch.cat(tokens), mask)
    return replace(batches[0], texts=texts, embeddings=embeddings, mask=mask)


def _finished(
    part: Path | None, texts: tuple[str, ...], encoder: str, max_tokens: int
) -> EncodedPrompts | None:
    """A batch that an earlier call has left, if it is the one that is wanted."""
    if part is None or not part.is_file():
        return None
    try:
        batch = load_prompts(part)
    except HarmonicaError:
        return None
    same = (batch.texts, batch.encoder, batch.mask.shape[1]) == (texts, encoder, max_tokens)
    return batch if same else None
