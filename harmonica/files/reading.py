"""Reading files of unknown origin: nothing in them can run code, or take more than it should.

What is wrong with a file is said in one sentence; nothing else is raised.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmonica.errors import HarmonicaError
from harmonica.files.npy import read_header
from harmonica.files.plain import plain

JSON_BYTES = 64 << 20
TEXT_BYTES = 64 << 20
YAML_BYTES = 1 << 20
LONGEST_NUMBER = 100  # characters in YAML


def first_line(error: BaseException, length: int = 120) -> str:
    """What an error says, short enough for a sentence."""
    said = str(error).strip().split("\n")[0] or type(error).__name__
    return said if len(said) <= length else f"{said[:length]}..."


def existing_file(path: Path, flag: str) -> Path:
    """The path, if it is a file that can be read; otherwise one sentence naming the flag."""
    path = Path(path)
    if not path.is_file():
        raise HarmonicaError(f"{flag} {path} is not a file; check the path")
    if not os.access(path, os.R_OK):
        raise HarmonicaError(f"{flag} {path} cannot be read; check its permissions")
    return path


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """A file of UTF-8 text of at most ``limit`` bytes.

    Raises:
        HarmonicaError: it is not; the sentence has no flag in it, and no remedy but the obvious.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > limit else file.read(size)
        if size > limit:
            raise HarmonicaError(f"{path} is larger than {limit >> 20} MB; pass another file")
        return content.decode("utf-8")
    except OSError as error:
        raise HarmonicaError(f"{path} cannot be read ({error.strerror}); check the file") from None
    except UnicodeDecodeError:
        raise HarmonicaError(f"{path} is not UTF-8 text; save it as such") from None


def parse_json(text: str, name: str) -> Any:
    """What JSON text says; ``name`` is what it was found in."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HarmonicaError(
            f"{name} is not readable JSON ({first_line(error)}); export it again"
        ) from None


def read_json(path: Path) -> Any:
    return parse_json(read_text(path, JSON_BYTES), str(path))


class _PlainLoader(yaml.SafeLoader):
    """No long numbers: they are more than a float holds or than Python shows, or take hours."""

    def construct_number(self, node: yaml.Node) -> int | float:
        if len(node.value) > LONGEST_NUMBER:
            raise ValueError(f"a number has more than {LONGEST_NUMBER} digits")
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)

    yaml_constructors: ClassVar = {
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:int": construct_number,
        "tag:yaml.org,2002:float": construct_number,
    }


def read_yaml(path: Path) -> Any:
    """Plain values, lists and mappings; no tag makes anything else."""
    text = read_text(path, YAML_BYTES)
    try:
        return plain(_PlainLoader(text).get_single_data(), len(text))
    except Exception as error:  # dates and numbers that are none raise whatever their classes do
        raise HarmonicaError(
            f"{path} is not readable YAML ({first_line(error)}); check the file"
        ) from None


def read_array(path: Path) -> tuple[np.ndarray, str]:
    """The array of an ``.npy`` file, without Python objects, and the sha256 of the file."""
    try:
        content = Path(path).read_bytes()
        shape, dtype, start = read_header(io.BytesIO(content), len(content))
        array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    except (OSError, ValueError) as error:
        raise HarmonicaError(
            f"{path} is not a whole npy file ({first_line(error)}); make it again"
        ) from None
    return array, hashlib.sha256(content).hexdigest()


def read_image(path: Path, converts: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB or grey image file.

    Args:
        converts: take palettes, CMYK and transparency too, as PIL makes RGB of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if not converts and image.mode not in ("RGB", "L"):
                    raise ValueError(f"its mode is {image.mode}, not RGB")
                return np.array(image.convert("RGB"))
    except Exception as error:  # decoders of a dozen formats raise what they like
        raise HarmonicaError(
            f"{path} cannot be read ({first_line(error)}); replace or remove it"
        ) from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise HarmonicaError(
            f"{path} is not a whole safetensors file ({first_line(error)}); fetch or export it "
            "again"
        ) from None


@contextlib.contextmanager
def confined_extraction() -> Iterator[None]:
    """Archives that libraries unpack meanwhile put nothing outside of their folder."""
    earlier = tarfile.TarFile.__dict__.get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        if earlier is None:
            del tarfile.TarFile.extraction_filter
        else:
            tarfile.TarFile.extraction_filter = earlier


def is_safetensors(path: Path) -> bool:
    """Tell by content: a safetensors file opens with the length of a JSON header."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise HarmonicaError(f"{path} cannot be read ({error.strerror}); check the file") from None
    return len(head) == 9 and head[8:9] == b"{"
