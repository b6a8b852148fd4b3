"""Command-line flags from a dataclass, whose field comments are the help text.

Without this file every setting would be written three times: as a field, a flag and its help.
"""

import argparse
import difflib
import inspect
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

from bert import read_json
from engine.errors import UserError
from engine.hub import ROOT

# Settings that a resumed run may change, because the result does not depend on them
MAY_CHANGE = ("resume", "data", "device", "compile", "log_every", "eval_every", "save_minutes")
LOCATIONS = ("model", "generator", "train_file", "score")  # may change if the content is the same
UNFINISHED = {"config.json": True, "state.safetensors": True, "results.json": False}  # is a file?
BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
EXPECTED = {bool: "on or off", str: "text", int: "an integer", float: "a number"}


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
    names = [field.name for field in fields(config_class)]
    if missing := [name for name in names if name not in comments]:
        raise TypeError(f"{config_class.__name__}: no comment for {', '.join(missing)}")
    return {name: comments[name] for name in names}


def convert(kind: type, value: object) -> object:
    """The value in the type of a field. Raises: ValueError, KeyError or OverflowError."""
    options = typing.get_args(kind)  # of Literal: the words; of `int | None`: the types
    if typing.get_origin(kind) is Literal:
        return options[options.index(value)]
    if typing.get_origin(kind) is tuple:  # tuple[str, ...]
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(convert(options[0], item) for item in value)
    if options:
        return None if value is None else convert(options[0], value)
    if kind is bool:
        return BOOLEANS[str(value).lower()]
    if type(value) not in ((str,) if kind is str else (str, int, float)):
        raise ValueError
    converted = kind(value)
    is_rounded = isinstance(value, float) and converted != value
    if kind is int and (is_rounded or abs(converted) >= 2**63):
        raise ValueError
    return converted


def parse_field(config_class: type, name: str, value: object) -> object:
    """A value from the command line or a JSON file in the field's type. Raises: UserError."""
    kind = typing.get_type_hints(config_class).get(name)
    if kind is None:
        other = "a run of another program is resumed by it (python -m lab.ablations --resume ...)"
        raise UserError(f"unknown field {name!r}; {other}")
    try:
        return convert(kind, value)
    except (ValueError, KeyError, OverflowError):
        options = typing.get_args(kind)
        is_choice = typing.get_origin(kind) is Literal
        expected = f"one of {', '.join(options)}" if is_choice else EXPECTED[(*options, kind)[0]]
        raise UserError(f"{flag(name)} is {value!r}; it must be {expected}") from None


def check(config: object, rules: Iterable[tuple[str, object, str]]) -> None:
    """rules: a field's name, whether its value is valid, what it must be. Raises: UserError."""
    for name, valid, expected in rules:
        if not valid:
            raise UserError(f"{flag(name)} is {getattr(config, name)}; it must be {expected}")


def load_preset(config_class: type, presets: dict, name: str) -> object:
    """A preset, or a config.json that a run saved. Raises: UserError."""
    if name in presets:
        return config_class(**asdict(presets[name]))
    if not name.endswith(".json"):
        expected = f"a run's config.json or one of {', '.join(presets)}"
        raise UserError(f"--config {name!r}: expected {expected}")
    saved = read_json(Path(name))
    try:
        return config_class(**{n: parse_field(config_class, n, v) for n, v in saved.items()})
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def make_parser(config_class: type, presets: dict) -> Parser:
    names, hints = ", ".join(presets), typing.get_type_hints(config_class)
    parser = Parser(
        prog=program(),
        usage=f"{program()} {'--config NAME ' * (len(presets) > 1)}[--FIELD VALUE ...]",
        description=f"A preset, and flags. The defaults shown are those of {next(iter(presets))}.",
        allow_abbrev=False,
    )
    parser._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)")  # -1e-5 is no flag
    parser.add_argument("--config", metavar="NAME", help=f"a run's config.json, or one of {names}")
    for name, text in field_comments(config_class).items():
        kind, default = hints[name], getattr(config_class, name)
        words = typing.get_args(kind) if typing.get_origin(kind) is Literal else [name.upper()]
        options = {"metavar": "|".join(words), "default": argparse.SUPPRESS}
        if kind is bool:  # --x, --x on, --x off
            options |= {"metavar": "on|off", "nargs": "?", "const": "on"}
            default = "on" if default else "off"
        if typing.get_origin(kind) is tuple:  # --x ONE TWO
            options |= {"metavar": name.upper(), "nargs": "+"}
        text += f" (default: {default})" if default not in (None, "", ()) else ""
        parser.add_argument(flag(name), help=text.replace("%", "%%"), **options)
    return parser


def parse(
    config_class: type, presets: dict, argv: list[str] | None = None, parser: Parser | None = None
) -> tuple[str, object]:
    """The preset's name ("run" for a config.json) and the settings. Raises: UserError.

    Of a single preset, `--config` is not asked.
    """
    parser = parser or make_parser(config_class, presets)
    words = sys.argv[1:] if argv is None else argv
    words = [f"--{word[5:]}=off" if word.startswith("--no-") else word for word in words]
    args, unknown = parser.parse_known_args(words)
    if unknown:
        flags = sorted(parser._option_string_actions)
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {close[0]}?" if close else f"the flags are {', '.join(flags)}"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    known = typing.get_type_hints(config_class)
    changes = {n: parse_field(config_class, n, v) for n, v in vars(args).items() if n in known}
    if folder := changes.get("resume"):
        folder = changes["resume"] = os.path.expanduser(folder)
    saved = str(Path(folder) / "config.json") if folder else ""
    if not args.config and not folder and len(presets) == 1:
        args.config = next(iter(presets))
    if not args.config and not folder:
        raise UserError(f"--config is missing; try --config demo, or {', '.join(presets)}")
    if folder and (mistake := why_no_run(Path(folder))):
        raise UserError(f"--resume {folder}: {mistake}")
    cfg = replace(load_preset(config_class, presets, args.config or saved), **changes)
    if folder:
        before, now = asdict(load_preset(config_class, presets, saved)), asdict(cfg)
        changed = [n for n in now if n not in MAY_CHANGE + LOCATIONS and now[n] != before[n]]
        differ = [f"{flag(n)} is {now[n]!r}, but the run has {before[n]!r}" for n in changed]
        if differ:
            may_change = f"A resumed run keeps its settings, except: {', '.join(MAY_CHANGE[1:])}"
            raise UserError(f"--resume {folder}: {'; '.join(differ)}. {may_change}")
        for name in ("data", *LOCATIONS):
            if Path(path := now.get(name, "")).is_absolute() and not Path(path).exists():
                advice = f"if it was moved, add {flag(name)} and its path"
                raise UserError(f"--resume {folder}: {path} does not exist; {advice}")
    return ("run" if folder or args.config.endswith(".json") else args.config), cfg


def why_no_run(folder: Path) -> str:
    """What is wrong with a folder that cannot be resumed, and which may have been meant; or ""."""
    copy, config = names = folder / "best" / "run_config.json", folder / "config.json"
    if os.path.isfile(config):  # Path.is_file raises PermissionError in another user's folder
        is_model = "model_type" in read_json(config)
        return "a model, not a run" + near_runs(folder) if is_model else ""
    if os.path.isfile(copy):
        return f"its config.json is missing; to restore it: {shlex.join(['cp', *map(str, names)])}"
    return "no run there (it has no config.json)" + near_runs(folder)


def near_runs(folder: Path) -> str:
    """The unfinished runs that may have been meant by a folder, as advice; "" without any."""
    candidates = [folder.parent, Path("runs") / folder, ROOT / folder]
    for parent in filter(os.path.isdir, (folder, folder.parent, "runs")):
        candidates += sorted(Path(parent).glob("*"))
    found = {}
    for path in candidates:
        if all(os.path.isfile(path / name) == has for name, has in UNFINISHED.items()):
            found.setdefault(path.resolve(), str(path))

    def similarity(path: str) -> float:
        return difflib.SequenceMatcher(None, path, str(folder)).ratio()

    closest = sorted(found.values(), key=similarity, reverse=True)[:3]
    return f"; did you mean {' or '.join(closest)}?" if found else ""


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
                expected = f"choose from {', '.join(known)}, separated by commas"
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; {expected}")
        return names

    return parse_list


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that encodes sentences."""
    devices, amps = ("auto", "cpu", "cuda", "mps"), ("off", "bf16")
    add = parser.add_argument
    add("--device", choices=devices, default="auto", help="(default: auto)")
    add("--amp", choices=amps, default="off", help="bf16: faster, with less precision")


def add_model_flags(parser: argparse.ArgumentParser, poolings: Sequence[str]) -> None:
    """Flags of every command that scores models."""
    names, add = comma_list(poolings), parser.add_argument
    pooler_help = f"of {', '.join(poolings)} (default: the folder's, else cls_before_pooler)"
    add("models", metavar="MODEL", nargs="+", help="a model folder, a run's folder or a Hub name")
    add("--pooler", metavar="NAME,...", type=names, default=[None], help=pooler_help)
    add("--data", metavar="DIR", default="", help="SentEval's data (default: download it)")
    add("--batch-size", type=positive_int, default=128, help="(default: 128)")
    add("--json", metavar="FILE", help="also write the numbers, a line per row")
    add_encoder_flags(parser)
