"""Options: a frozen dataclass is a command line, a YAML preset, and a record of what ran.

A field is a flag: ``num_sampling_steps`` is ``--num-sampling-steps``. ``aliases`` keep the flags
of the published scripts working. Unknown keys are errors.
"""

import argparse
import contextlib
import math
import reprlib
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, NoReturn, TypeVar, get_args

import yaml

from harmonica.errors import HarmonicaError
from harmonica.files import first_line, read_yaml


def option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    many: bool = False,
) -> Any:
    """A dataclass field with its flag: help, further names, and the values it may take."""
    metadata = {"help": help, "aliases": aliases, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata={**metadata, "many": many})


@dataclass(frozen=True)
class Options:
    """Base of everything that a command line resolves to.

    Attributes:
        REPLACED_BY_FLAG: (flags, names): one of the flags, where it says something else than a
            preset or a file, replaces what that says of the names; so does one of the names that
            was replaced, in rows below.
        SMALL: what ``--quick`` sets unless a flag says otherwise.
    """

    REPLACED_BY_FLAG: ClassVar[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = ()
    SMALL: ClassVar[dict[str, Any]] = {}

    @classmethod
    def known_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fields that follow from files named in ``values``, where nothing else says them."""
        return {}

    def check(self) -> None:
        """Refuse values that cannot work, naming the flag and the remedy.

        Raises:
            HarmonicaError: there is one.
        """
        for spec in fields(self):
            value, flag, rule = getattr(self, spec.name), flag_of(spec.name), spec.metadata
            for item in value if isinstance(value, tuple) else (value,):
                if rule["choices"] and item is not None and item not in rule["choices"]:
                    raise HarmonicaError(
                        f"{flag} {item} is unknown; use one of {', '.join(rule['choices'])}"
                    )
                _check_number(flag, item, rule["low"], rule["high"])


Config = TypeVar("Config", bound=Options)


def _check_number(flag: str, value: Any, low: float | None, high: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise HarmonicaError(f"{flag} {value} is not a finite number; pass one")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise HarmonicaError(f"{flag} {value} is out of range; use a value {allowed}")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _types_of(spec: Any) -> tuple[type, ...]:
    """The types of a field, None left out."""
    kinds = get_args(spec.type) if isinstance(spec.type, UnionType) else (spec.type,)
    return tuple(kind for kind in kinds if kind is not type(None))


class CommandParser(argparse.ArgumentParser):
    """An argument parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise HarmonicaError(f"{message}; see --help")


def build_parser(cls: type[Options], description: str) -> CommandParser:
    """A parser with one flag per field and no default of its own."""
    parser = CommandParser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML preset; flags override it")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    for spec in fields(cls):
        names = (flag_of(spec.name), *spec.metadata["aliases"])
        kind = _types_of(spec)[0]
        shown = spec.metadata["help"]
        if spec.default not in (None, False):
            shown += f" (default: {spec.default})"
        if kind is bool:
            parser.add_argument(
                *names, dest=spec.name, action=argparse.BooleanOptionalAction, help=shown
            )
        elif spec.metadata["many"]:
            item = get_args(kind)[0]
            parser.add_argument(*names, dest=spec.name, type=item, nargs="+", help=shown)
        else:
            parser.add_argument(*names, dest=spec.name, type=kind, help=shown)
    return parser


def _from_yaml(spec: Any, value: Any, path: Path) -> Any:
    """A preset's value in the type of its field."""
    kind = _types_of(spec)[0]
    if value is None and type(None) in get_args(spec.type):
        return None
    if spec.metadata["many"] and isinstance(value, list) and value:
        item = get_args(kind)[0]
        return tuple(_scalar_from_yaml(spec.name, item, element, path) for element in value)
    return _scalar_from_yaml(spec.name, kind, value, path)


def _scalar_from_yaml(name: str, kind: type, value: Any, path: Path) -> Any:
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 7e-8 as a string
        with contextlib.suppress(ValueError):
            return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is int and type(value) is int and abs(value) >= 2**63:
        raise HarmonicaError(f"--config {path}: {name} is too large; correct the preset")
    if kind in (int, bool, str) and type(value) is kind:
        return value
    wanted = getattr(kind, "__name__", "list") if kind in (int, float, bool, str, Path) else "list"
    raise HarmonicaError(
        f"--config {path}: {name} = {reprlib.repr(value)} is not a {wanted} to be used; "
        "correct the preset"
    )


def read_preset(cls: type[Config], path: Path) -> dict[str, Any]:
    """The fields that a YAML preset sets.

    Raises:
        HarmonicaError: unreadable, unknown keys, or values of the wrong type.
    """
    try:
        content = read_yaml(path)
    except HarmonicaError as error:
        raise HarmonicaError(f"--config {error}") from None
    if not isinstance(content, dict):
        raise HarmonicaError(f"--config {path} is not a mapping of options; check the file")
    known = {spec.name: spec for spec in fields(cls)}
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise HarmonicaError(
            f"--config {path} sets {first_line(', '.join(unknown))}, which this command does not "
            "know; remove it or correct its spelling"
        )
    return {key: _from_yaml(known[key], value, path) for key, value in content.items()}


def resolve(cls: type[Config], arguments: argparse.Namespace) -> Config:
    """Defaults, then the preset, then the flags; checked."""
    given = dict(vars(arguments))
    given.pop("dry_run", None)
    preset = given.pop("config", None)
    values = read_preset(cls, preset) if preset is not None else {}
    if given.get("quick", values.get("quick")):
        values.update(cls.SMALL)
    defaults = {spec.name: spec.default for spec in fields(cls)}
    said = {**defaults, **values}
    changed = {name for name, value in given.items() if value != said[name]}
    for flags, replaced in cls.REPLACED_BY_FLAG:
        if changed & set(flags):
            values = {name: value for name, value in values.items() if name not in replaced}
            changed |= {name for name in replaced if said[name] != defaults[name]}
    values.update({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    known = cls.known_from_files(values)
    for flags, replaced in cls.REPLACED_BY_FLAG:
        if any(name in known and values.get(name, known[name]) != known[name] for name in flags):
            known = {name: value for name, value in known.items() if name not in replaced}
    config = cls(**{**known, **values})
    config.check()
    return config


def parse(cls: type[Config], description: str) -> Config:
    """The configuration of a command line; ``--dry-run`` prints it and ends the program."""
    arguments = build_parser(cls, description).parse_args()
    config = resolve(cls, arguments)
    if getattr(arguments, "dry_run", False):
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def plain(config: Options) -> dict[str, Any]:
    """The configuration as strings, numbers and lists, for YAML, JSON and trackers."""
    values = {}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        values[spec.name] = str(value) if isinstance(value, Path) else value
    return values


def to_yaml(config: Options) -> str:
    """The configuration as a preset that gives it back."""
    return yaml.safe_dump(plain(config), sort_keys=False)
