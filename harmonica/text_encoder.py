"""T5, which encodes prompts: gone from memory as soon as it has, its work kept for later."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from harmonica import downloads
from harmonica.errors import HarmonicaError
from harmonica.files import first_line
from harmonica.hub import part_folder, whole
from harmonica.prompts import FORMAT, EncodedPrompts, load_prompts, save_prompts
from models import T5, ModelSpec


@dataclass(frozen=True)
class Reading:
    """How prompts are read for a model.

    Attributes:
        encoder: repository on the Hub or folder: a diffusers pipeline (``tokenizer/`` and
            ``text_encoder/`` in it), or a T5 alone.
        max_tokens: L; longer prompts are cut.
        lowercases: whether they are put into lower case.
    """

    encoder: str
    max_tokens: int
    lowercases: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, encoder: str) -> "Reading":
        """What a model was trained with, but for the encoder."""
        return cls(encoder, spec.config.max_tokens, spec.lowercases_prompts)


class TextEncoder:
    """A T5 encoder with its tokenizer, at the lengths a model was trained with."""

    def __init__(self, reading: Reading):
        """The tokenizer; the encoder itself is loaded by the first prompt that needs it."""
        try:
            import transformers  # heavy, and only prompts need it
        except ImportError:
            raise HarmonicaError(
                "prompts need transformers; install the project with its extra [text]"
            ) from None
        self.name, self.reading = reading.encoder, reading
        self._source = str(part_folder(T5)) if self.name == T5.repository else self.name
        self._transformers, self._model = transformers, None
        self._tokenizer = self._load(transformers.AutoTokenizer, "tokenizer")

    def _load(
        self,
        kind: Any,
        subfolder: str,
        checked: Callable[[Any], Any] = lambda loaded: loaded,
        **options: Any,
    ) -> Any:
        """A part of the encoder; ``checked`` makes it of what ``from_pretrained`` gives."""
        places = [{"subfolder": subfolder}, {}]  # of a pipeline, or a T5 alone
        folder, first = Path(self._source), None
        if folder.is_dir():
            places = places[:1] if (folder / subfolder).is_dir() else places[1:]
        # Nothing that could be code; a tokenizer has no weights and takes no notice of the first.
        load = partial(kind.from_pretrained, use_safetensors=True, trust_remote_code=False)
        for place in places:
            try:
                return checked(load(self._source, **place, **options))
            except Exception as error:  # what is wrong in a config fails wherever it is first used
                first = first or error
        remedy = "pass a T5 or a pipeline of the Hub, or the folder of a copy"
        if self.name == T5.repository:
            remedy = f"run `download.py {T5.arguments}` where there is a network"
        if subfolder == "tokenizer" and find_spec("sentencepiece") is None:
            remedy += ", and install the project with its extra [text] for sentencepiece"
        raise HarmonicaError(
            f"--text-encoder {self.name} has no {subfolder} that can be loaded "
            f"({first_line(first, 160)}); {remedy}"
        )

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of every prompt without blanks around it, and how many prompts were cut.

        PixArt-alpha wants lower case. Its own preparation also takes addresses, file names, HTML
        and the like out of captions that were found on the web; here a prompt is what it says.
        PixArt-Sigma takes prompts as they are written.
        """
        plain = [text.strip() for text in texts]
        if self.reading.lowercases:
            plain = [text.lower() for text in plain]
        length = self.reading.max_tokens
        uncut = self._tokenizer(plain).input_ids
        cut = self._tokenizer(plain, truncation=True, max_length=length).input_ids
        return cut, sum(len(a) > len(b) for a, b in zip(uncut, cut, strict=True))

    def _load_model(self, device: torch.device) -> Any:
        # Half precision on a GPU; transformers keeps in float32 what overflows in it.
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = self._load(
            self._transformers.T5EncoderModel,
            "text_encoder",
            partial(whole, may_hold_more=True),  # files of a whole T5 hold its decoder
            dtype=dtype,
            output_loading_info=True,
        )
        if len(self._tokenizer) > model.config.vocab_size:
            raise HarmonicaError(
                f"--text-encoder {self.name} has a tokenizer of {len(self._tokenizer)} tokens and "
                f"an encoder of {model.config.vocab_size}; pass one whose parts belong together"
            )
        return model.eval().to(device)

    @torch.inference_mode()
    def encode(self, ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens (m, d) float16 of all prompts, and mask (n, L) of their places, on the CPU."""
        if self._model is None:
            self._model = self._load_model(device)
        # No longer than the longest: the rest is masked out, and is most of the work.
        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
        states = self._model(batch.input_ids, attention_mask=batch.attention_mask)[0]
        length = states.shape[1]
        mask = torch.zeros(len(ids), self.reading.max_tokens, dtype=torch.bool)
        mask[:, :length] = batch.attention_mask.bool().cpu()
        tokens = states.cpu().half()[mask[:, :length]]
        if not tokens.isfinite().all():
            raise HarmonicaError(
                f"--text-encoder {self.name} gives numbers that are not finite in half precision; "
                "use the encoder that the model was trained with"
            )
        return tokens, mask


def encode_prompts(
    texts: Sequence[str],
    reading: Reading,
    device: torch.device,
    batch_size: int = 16,
    progress: str | None = None,
    parts: Path | None = None,
) -> EncodedPrompts:
    """Encode prompts with a T5 that is gone from memory afterwards.

    Args:
        progress: label of a progress bar; None shows none.
        parts: folder in which finished batches are kept, and found again by the next call.

    Raises:
        HarmonicaError: no prompts, or an encoder that cannot be loaded or used in half precision.
    """
    texts = tuple(texts)
    if not texts:
        raise HarmonicaError("--prompts holds no prompt; write one per line")
    t5 = TextEncoder(reading)
    _, num_cut = t5.tokenize(texts)
    null: tuple[Tensor, Tensor] | None = None
    batches = []
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
        batch = None if part is None else finished(part, some, reading)
        if batch is None:
            if null is None:
                null = t5.encode(t5.tokenize([""])[0], device)
            tokens, mask = t5.encode(t5.tokenize(some)[0], device)
            batch = EncodedPrompts(
                some, tokens, mask, null[0], null[1][0], reading.encoder, reading.lowercases
            )
            if part is not None:
                save_prompts(part, batch)
        batches.append(batch)
    del t5
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the encoder held is for the transformer
    return EncodedPrompts(
        texts,
        torch.cat([batch.tokens for batch in batches]),
        torch.cat([batch.mask for batch in batches]),
        batches[0].null_tokens,
        batches[0].null_mask,
        reading.encoder,
        reading.lowercases,
        num_cut,
    )


def finished(path: Path, texts: Sequence[str], reading: Reading) -> EncodedPrompts | None:
    """What an earlier call has left in a file, if it is there and what is wanted."""
    if not path.is_file():
        return None
    try:
        found = load_prompts(path)
    except HarmonicaError:
        return None
    was_read = Reading(found.encoder, found.mask.shape[1], found.lowercased)
    return found if (found.texts, was_read) == (tuple(texts), reading) else None


def encode_into(
    path: Path,
    texts: Sequence[str],
    reading: Reading,
    device: torch.device,
    batch_size: int = 16,
) -> EncodedPrompts:
    """Encode prompts into a file, with a progress bar; an interrupted call is gone on with."""
    parts = path.with_name(f"{path.name}.parts")
    encoded = encode_prompts(texts, reading, device, batch_size, "prompts", parts)
    save_prompts(path, encoded)
    shutil.rmtree(parts, ignore_errors=True)
    return encoded


def kept_file(texts: Sequence[str], reading: Reading) -> Path:
    """Where these prompts are kept once they are encoded, beside the weights that are fetched."""
    files = [file for file in sorted(Path(reading.encoder).rglob("*")) if file.is_file()]
    # Of a folder, which may change; a name on the Hub has no files here.
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps([FORMAT, list(texts), asdict(reading), stamps])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return downloads.CACHE / "prompts" / f"{name}.safetensors"


def encode_once(texts: Sequence[str], reading: Reading, device: torch.device) -> EncodedPrompts:
    """Encoded prompts, by one process and once: others wait for it, later calls find the file.

    Raises:
        HarmonicaError: they cannot be encoded, or kept.
    """
    path = kept_file(texts, reading)
    found = finished(path, texts, reading)
    if found is not None:
        return found
    with downloads.in_turn(path):
        found = finished(path, texts, reading)
        return found or encode_into(path, texts, reading, device)
