"""Command-line flags from a dataclass, whose field comments are the help text.

Without this file every setting would be written three times: as a field, a flag and its help.
"""

import argparse
import difflib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

from bert import read_json
from engine.errors import UserError

# Settings that a resumed run may change, because the result does not depend on them
MAY_CHANGE = ("resume", "data", "device", "compile", "log_every", "eval_every", "save_minutes")
BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} -h")


def program() -> str:
    """The command that started this process."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def field_comments(config_class: type) -> dict[str, str]:
    """The comment of each field, base classes first. Raises: TypeError for a field without one."""
    comments = {}
    for base in config_class.__mro__[-2::-1]:
        comments |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE)
    if missing := {field.name for field in fields(config_class)} - comments.keys():
        raise TypeError(f"{config_class.__name__}: no comment for {', '.join(sorted(missing))}")
    return comments


def parse_field(config_class: type, name: str, value: object) -> object:
    """A value from the command line or a JSON file in the field's type. Raises: UserError."""
    kind = typing.get_type_hints(config_class)[name]
    options = typing.get_args(kind)  # of Literal: the words; of `int | None`: the types
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise UserError(f"{flag(name)} is {value!r}; it must be one of {', '.join(options)}")
        return value
    if type(None) in options:
        if value is None:
            return None
        kind = options[0]
    if kind is bool:
        if str(value).lower() not in BOOLEANS:
            raise UserError(f"{flag(name)} is {value!r}; it must be on or off")
        return BOOLEANS[str(value).lower()]
    expected = {str: "text", int: "an integer", float: "a number"}[kind]
    try:
        if isinstance(value, (bool, list, dict, type(None))) or kind is str is not type(value):
            raise ValueError
        number = kind(value)
        if kind is int and (isinstance(value, float) and number != value or abs(number) >= 2**63):
            raise ValueError
        return number
    except (ValueError, OverflowError):
        raise UserError(f"{flag(name)} is {value!r}; it must be {expected}") from None


def load_preset(config_class: type, presets: dict, name: str) -> object:
    """A preset, or a config.json that a run saved. Raises: UserError."""
    if name in presets:
        return config_class(**asdict(presets[name]))
    if not name.endswith(".json"):
        known = ", ".join(presets)
        raise UserError(f"--config {name!r}: expected a run's config.json or one of {known}")
    saved, known = read_json(Path(name)), [field.name for field in fields(config_class)]
    if unknown := sorted(set(saved) - set(known)):
        raise UserError(
            f"{name}: unknown field {unknown[0]!r}. A run of another program is resumed by that "
            f"program (python -m lab.ablations --resume ...). Known: {', '.join(sorted(known))}"
        )
    try:
        return config_class(**{n: parse_field(config_class, n, v) for n, v in saved.items()})
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def make_parser(config_class: type, presets: dict) -> Parser:
    parser = Parser(
        prog=program(),
        usage=f"{program()} --config NAME [--FIELD VALUE ...]",
        description="Settings: a preset, and flags that change its fields.",
        epilog=f"Defaults are those of {next(iter(presets))}.",
        allow_abbrev=False,
    )
    parser._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)")  # -1e-5 is no flag
    parser.add_argument(
        "--config", metavar="NAME", help=f"a run's config.json, or one of {', '.join(presets)}"
    )
    for name, text in field_comments(config_class).items():
        kind, default = typing.get_type_hints(config_class)[name], getattr(config_class, name)
        settings = {"dest": name, "default": argparse.SUPPRESS}
        metavar = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else None
        if kind is bool:  # --x, --x on, --no-x, --x off
            metavar, default = "on|off", "on" if default else "off"
            parser.add_argument(
                flag("no_" + name),
                action="store_const",
                const="off",
                help=argparse.SUPPRESS,
                **settings,
            )
            settings |= {"nargs": "?", "const": "on"}
        text += f" (default: {default})" if default not in (None, "") else ""
        metavar = metavar or name.upper()
        parser.add_argument(flag(name), metavar=metavar, help=text.replace("%", "%%"), **settings)
    return parser


def parse(
    config_class: type, presets: dict, argv: list[str] | None = None, parser: Parser | None = None
) -> tuple[str, object]:
    """The preset's name ("run" for a config.json) and the settings. Raises: UserError."""
    parser = parser or make_parser(config_class, presets)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = sorted(parser._option_string_actions)
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {close[0]}?" if close else f"the flags are {', '.join(flags)}"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    known = {field.name for field in fields(config_class)}
    changes = {n: parse_field(config_class, n, v) for n, v in vars(args).items() if n in known}
    if "resume" not in changes:
        if not args.config:
            raise UserError(f"--config is missing; try --config demo, or {', '.join(presets)}")
        name = "run" if args.config.endswith(".json") else args.config
        return name, replace(load_preset(config_class, presets, args.config), **changes)
    folder = Path(changes["resume"])
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: no run there (it has no config.json)")
    old = load_preset(config_class, presets, str(folder / "config.json"))
    base = load_preset(config_class, presets, args.config) if args.config else old
    cfg = replace(base, **changes)
    for name in known - set(MAY_CHANGE):
        before, now = getattr(old, name), getattr(cfg, name)
        if before != now:
            raise UserError(
                f"--resume {folder}: {flag(name)} is {now!r}, but the run has {before!r}. A "
                f"resumed run keeps its settings, except: {', '.join(MAY_CHANGE[1:])}"
            )
    return "run", cfg


# ------------------------------------------------------------------------------------------------
# Flags of commands that score models


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def comma_list(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        for name in (names := text.split(",")):
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown; choose from {', '.join(known)}, separated by commas"
                )
        return names

    return parse_list


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that encodes sentences."""
    devices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument("--device", choices=devices, default="auto", help="(default: auto)")
    parser.add_argument(
        "--amp", choices=("off", "bf16"), default="off", help="bf16: faster, with less precision"
    )


def add_model_flags(parser: argparse.ArgumentParser, poolings: Sequence[str]) -> None:
    """Flags of every command that scores models."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a model folder, a run's folder or a Hub name"
    )
    parser.add_argument(
        "--pooler",
        type=comma_list(poolings),
        default=[None],
        metavar="NAME,...",
        help=f"of {', '.join(poolings)} (default: the folder's, else cls_before_pooler)",
    )
    parser.add_argument(
        "--data", metavar="DIR", default="", help="folder with SentEval's data (default: the Hub)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=128, help="(default: 128)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers, a line per row")
    add_encoder_flags(parser)
