"""Encode prompts once, so that training and sampling need no text encoder in memory.

    python scripts/encode_prompts.py --prompts captions.txt --out captions.safetensors

Interrupted, the same command goes on where it stopped.
"""

from dataclasses import dataclass
from pathlib import Path

from harmonica.backbone import select_device
from harmonica.errors import HarmonicaError, run_command
from harmonica.options import Options, option, parse
from harmonica.prompts import BUNDLED_PROMPTS, read_prompts, warn_of_cut
from harmonica.text_encoder import Reading, encode_into, finished
from models import MODELS


@dataclass(frozen=True)
class EncodeConfig(Options):
    """What is encoded, with what."""

    prompts: Path = option(BUNDLED_PROMPTS, "UTF-8 text, a prompt a line")
    model: str = option("PixArt-alpha-XL/2", "model of the zoo that is to read them")
    text_encoder: str | None = option(
        None, "T5, or a pipeline with one: repository of the Hub, or folder; default: the model's"
    )
    max_tokens: int | None = option(
        None, "tokens of a prompt, the rest is cut; default: the model's", low=2
    )
    batch_size: int = option(16, "prompts per forward", low=1)
    out: Path = option(Path("prompts.safetensors"), "embeddings, masks and the null prompt")

    def __post_init__(self):
        spec = MODELS.get(self.model)
        if spec is None or spec.text_encoder is None:
            return  # refused by ``check``
        if self.text_encoder is None:
            object.__setattr__(self, "text_encoder", spec.text_encoder)
        if self.max_tokens is None:
            object.__setattr__(self, "max_tokens", spec.config.max_tokens)

    def check(self) -> None:
        """Also: a model that reads prompts."""
        super().check()
        readers = [name for name, spec in MODELS.items() if spec.text_encoder is not None]
        if self.model not in readers:
            raise HarmonicaError(
                f"--model {self.model} reads no prompts; use {' or '.join(readers)}"
            )

    @property
    def reading(self) -> Reading:
        lowercases = MODELS[self.model].lowercases_prompts
        return Reading(self.text_encoder, self.max_tokens, lowercases)


def check_output(config: EncodeConfig, texts: list[str]) -> bool:
    """Whether the file is there already.

    Raises:
        HarmonicaError: something else is.
    """
    if not config.out.exists():
        return False
    if finished(config.out, texts, config.reading) is not None:
        return True
    raise HarmonicaError(
        f"--out {config.out} holds something else; remove it or pass another --out"
    )


@run_command
def main() -> None:
    config = parse(EncodeConfig, "Encode a text file of prompts with T5.")
    texts = read_prompts(config.prompts)
    if not check_output(config, texts):
        encoded = encode_into(config.out, texts, config.reading, select_device(), config.batch_size)
        warn_of_cut(encoded)
    print(f"{config.out}: {len(texts)} prompts")


if __name__ == "__main__":
    main()
