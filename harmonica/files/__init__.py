"""Every file that the project reads or writes goes through here.

Writes are atomic. What is read may come from anybody: it can be refused in one sentence, and it
can do nothing else.
"""

from harmonica.files.npz import Npz, NpzArray
from harmonica.files.pt import read_torch
from harmonica.files.reading import (
    confined_extraction,
    existing_file,
    first_line,
    is_safetensors,
    parse_json,
    read_array,
    read_image,
    read_json,
    read_safetensors,
    read_text,
    read_yaml,
)
from harmonica.files.writing import (
    DamagedFile,
    atomic_file,
    keep_lines,
    read_checked,
    record_of,
    recorded,
    remove_unfinished,
    sha256,
    write_atomically,
    write_checked,
    write_record,
    write_torch,
)

__all__ = [
    "DamagedFile",
    "Npz",
    "NpzArray",
    "atomic_file",
    "confined_extraction",
    "existing_file",
    "first_line",
    "is_safetensors",
    "keep_lines",
    "parse_json",
    "read_array",
    "read_checked",
    "read_image",
    "read_json",
    "read_safetensors",
    "read_text",
    "read_torch",
    "read_yaml",
    "record_of",
    "recorded",
    "remove_unfinished",
    "sha256",
    "write_atomically",
    "write_checked",
    "write_record",
    "write_torch",
]
