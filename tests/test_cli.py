"""engine/cli.py, and the settings of diffcse.py."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

import diffcse
from diffcse import PRESETS, Config
from engine import cli
from engine.errors import UserError


def parse(*words: str) -> Config:
    return cli.parse(Config, PRESETS, [*map(str, words)])[1]


# ------------------------------------------------------------------------------------------------
# Any dataclass


@dataclass
class Settings:
    """A base class."""

    # Not a field's comment
    size: int = 3  # how large; 50 % is half
    kind: Literal["a", "b"] = "a"  # which


@dataclass
class MoreSettings(Settings):
    fast: bool = True  # quickly
    kind: Literal["a", "b", "c"] = "b"  # which of three
    files: tuple[str, ...] = ()  # some


@dataclass
class Bare(Settings):
    other: int = 1
    commented: int = 2  # fine


def test_fields_comments_are_the_help_of_base_classes_first():
    expected = {"size": "how large; 50 % is half", "kind": "which of three", "fast": "quickly"}
    expected |= {"files": "some"}
    assert cli.field_comments(MoreSettings) == expected
    with pytest.raises(TypeError, match="^Bare: no comment for other$"):
        cli.field_comments(Bare)
    shown = cli.make_parser(MoreSettings, {"one": MoreSettings()}).format_help()
    shown = re.sub(r"\s+", " ", shown)
    assert "The defaults shown are those of one." in shown
    assert "--size SIZE how large; 50 % is half (default: 3)" in shown
    assert "--kind a|b|c which of three (default: b)" in shown
    assert "--fast [on|off] quickly (default: on)" in shown
    assert shown.endswith("--files FILES [FILES ...] some ") and "--config NAME [" not in shown
    preset = {"one": Settings(size=4)}  # a preset of the base class is a preset of the other
    parsed = cli.parse(MoreSettings, preset, ["--config", "one", "--kind", "c"])
    assert parsed == ("one", MoreSettings(4, "c", True))
    # With one preset, --config is not needed
    parsed = cli.parse(MoreSettings, preset, ["--files", "a b", "c", "--no-fast"])
    assert parsed == ("one", MoreSettings(4, "a", False, ("a b", "c")))


def test_several_words_are_saved_and_read_again(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(MoreSettings(files=("a b", "c")))))
    words, presets = ["--config", str(tmp_path / "config.json")], {"one": MoreSettings()}
    assert cli.parse(MoreSettings, presets, words)[1].files == ("a b", "c")
    for wrong in ("a b", 3, ["a", 3]):
        (tmp_path / "config.json").write_text(json.dumps({"files": wrong}))
        with pytest.raises(UserError, match="--files is .*; it must be text"):
            cli.parse(MoreSettings, presets, words)


# ------------------------------------------------------------------------------------------------
# The settings of a run


def test_presets_are_the_papers():
    """Tables 12 and 13, and SimCSE's (Gao et al., 2021); the rest as published."""
    published = Config(
        **dict(model="bert-base-uncased", generator="distilbert-base-uncased", batch_size=64),
        **dict(epochs=2, temperature=0.05, max_length=32, clip=1.0, eval_every=125, seed=42),
        **dict(masking="80-10-10", edit="argmax", edit_scope="all", views="both", dropout=None),
        **dict(projector="batchnorm", reduction="mean", pads_in_loss=True, protect_sep=False),
    )
    roberta = replace(published, model="roberta-base", generator="distilroberta-base")
    simcse = dict(lam=0.0, projector="tanh", epochs=1)
    expected = {
        "bert_sts": replace(published, lr=7e-6, mask_ratio=0.30, lam=0.005),
        "roberta_sts": replace(roberta, lr=1e-5, mask_ratio=0.20, lam=0.005),
        "bert_transfer": replace(published, lr=2e-6, mask_ratio=0.15, lam=0.05),
        "roberta_transfer": replace(roberta, lr=3e-6, mask_ratio=0.15, lam=0.05, batch_size=128),
        "simcse_bert": replace(published, **simcse, lr=3e-5),
        "simcse_roberta": replace(roberta, **simcse, lr=1e-5, batch_size=512),
    }
    assert {name: PRESETS[name] for name in expected} == expected


def test_flags_change_a_preset_or_a_saved_config(tmp_path):
    words = "--lr 1e-4 --steps 7 --masking all --protect-sep on --contrastive=ON --compile".split()
    words += "--generator-dropout off --fast --no-fast --no-pads-in-loss".split()
    words += "--hard-negative-weight -.5 --train-file=a=b.txt".split()
    changes = dict(lr=1e-4, steps=7, masking="all", protect_sep=True, contrastive=True)
    changes |= dict(compile=True, generator_dropout=False, fast=False, pads_in_loss=False)
    changes |= dict(hard_negative_weight=-0.5, train_file="a=b.txt")
    for name, cfg in PRESETS.items():
        changed = replace(cfg, **changes)
        assert cli.parse(Config, PRESETS, ["--config", name, *words]) == (name, changed)
        (tmp_path / "c.json").write_text(json.dumps(asdict(changed)))
        saved = parse("--config", tmp_path / "c.json", "--epochs", 9)
        assert repr(saved) == repr(replace(changed, epochs=9))  # types too: True is not 1


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("lr", [1, 1.0, "1"], 1.0),
        ("steps", ["10", 10, 10.0], 10),
        ("steps", [None], None),
        ("seed", ["9007199254740993"], 2**53 + 1),  # no detour through a float
        ("protect_sep", ["ON", "on", "yes", "true", True], True),
        ("protect_sep", ["no", "off", "False", False], False),
        ("edit", ["sample"], "sample"),
        ("model", ["3"], "3"),
        ("steps", ["1.5", 1.5, True, "nan", 10**400, [1], "9" * 5000], UserError("an integer")),
        ("seed", [None, {}], UserError("an integer")),
        ("lr", ["", "fast", None, False, 10**400], UserError("a number")),
        ("protect_sep", [1, None, "perhaps", []], UserError("on or off")),
        ("edit", ["Sample", ["sample"], None], UserError("one of argmax, sample")),
        ("model", [3, None], UserError("text")),
    ],
)
def test_parse_field(name, values, expected):
    for value in values:
        if isinstance(expected, UserError):
            message = f"^{cli.flag(name)} is .*; it must be {expected}$"
            with pytest.raises(UserError, match=message):
                cli.parse_field(Config, name, value)
        else:
            assert repr(cli.parse_field(Config, name, value)) == repr(expected)


# A flag, a value that is refused, and one near it that is accepted
BOUNDS = """batch-size 1 2, max-length 2 3, epochs 0 1, steps 0 1, eval-every 0 1, log-every 0 1,
    mask-ratio 1.01 1, mask-ratio -0.01 0, dropout 1 0.99, dropout -0.01 0, lam -0.01 0, lam inf 9,
    save-minutes -0.01 0, hard-negative-weight -inf -9, seed -1 0, lr 0 1e-9, lr inf 1e9, lr nan 1,
    clip 0 1e-9, temperature 0 1e-9, edit-temperature 0 1e-9,
    seed 9223372036854775808 9223372036854775807"""


@pytest.mark.parametrize("row", BOUNDS.split(","))
def test_numbers_have_bounds(row):
    flag, refused, accepted = row.split()
    parse("--config", "demo", f"--{flag}", accepted)
    with pytest.raises(UserError, match=f"^--{flag} is .*; it must be "):
        parse("--config", "demo", f"--{flag}", refused)


SAVED = {
    "negative.json": {"lam": -1},
    "run/config.json": {"lr": 0.01, "lam": 0.05, "train_file": "mine.txt"},
    "ablation/config.json": {"objective": "masked"},
    "moved/config.json": {"train_file": "/no/such/text.txt"},
    "lost/best/run_config.json": {},
    "pretrained/config.json": {"text": ["a.txt"]},
    # Unfinished, finished, the demo's second run
    "runs/a-1/config.json": {},
    "runs/a-1/state.safetensors": {},
    "runs/a-1/best/config.json": {"model_type": "bert"},
    "runs/demo-1/config.json": {},
    "runs/demo-1/results.json": {},
    "runs/demo-1-simcse/config.json": {},
    "runs/demo-1-simcse/state.safetensors": {},
}
MISTAKES = [
    ("", "--config is missing; try --config demo"),
    ("--config nope", "--config 'nope': expected a run's config.json or one of bert_sts"),
    ("--config demo --batch_sise=3", "did you mean --batch-size?"),
    ("--config demo --xyz", "unknown argument --xyz; the flags are --amp, --batch-size, "),
    ("--config demo --step 3", "did you mean --steps?"),  # no abbreviations
    ("--config demo --lam 0 --contrastive off", "--contrastive is False; it must be on"),
    ("--config negative.json", "negative.json: --lam is -1.0; it must be 0 or larger"),
    ("--resume lab", "--resume lab: no run there (it has no config.json); did you mean runs/"),
    ("--resume runs", "no config.json); did you mean runs/a-1 or runs/demo-1-simcse?\n"),
    ("--resume a-1", "--resume a-1: no run there (it has no config.json); did you mean runs/a-1 "),
    ("--resume runs/a-1/best", "runs/a-1/best: a model, not a run; did you mean runs/a-1 or "),
    ("--resume runs/a-1/config.json", "config.json); did you mean runs/a-1 or "),
    ("--resume runs/demo1-simcse", "did you mean runs/demo-1-simcse or "),
    ("--resume lost", "missing; to restore it: cp lost/best/run_config.json lost/config.json"),
    ("--resume pretrained", "unknown field 'text'; a run of another program is resumed by it"),
    ("--resume moved", "/no/such/text.txt does not exist; if it was moved, add --train-file and"),
    ("--resume ~/runs/nothing", "HOME/runs/nothing: no run there"),
    ("--resume ablation", "unknown field 'objective'; a run of another program is resumed by it"),
    (
        "--resume run --lr 0.1 --lam 0",
        "--resume run: --lr is 0.1, but the run has 0.01; --lam is 0.0, but the run has 0.05. "
        "A resumed run keeps its settings, except: data, device, compile, log_every, eval_every, "
        "save_minutes\n",
    ),
]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The files of SAVED, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/HOME")
    for name, content in SAVED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))


def test_a_run_is_named_that_may_have_been_meant(saved, tmp_path, monkeypatch):
    assert cli.near_runs(Path("runs/demo-1")) == "; did you mean runs/demo-1-simcse or runs/a-1?"
    monkeypatch.chdir(tmp_path / "lost")
    assert cli.near_runs(Path("runs/a-1")) == ""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.near_runs(Path("runs/a-1")) == f"; did you mean {tmp_path}/runs/a-1?"


@pytest.mark.parametrize("words, message", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(saved, command, words, message):
    code, out, err = command(diffcse.main, *words.split())
    assert code == 2 and out == "" and message in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_resumed_run_keeps_its_settings_but_may_be_looked_at_differently(saved):
    words = "--eval-every 3 --log-every 1 --save-minutes 9 --device cpu --data there --compile"
    changes = dict(eval_every=3, log_every=1, save_minutes=9.0, device="cpu", data="there")
    expected = Config(**SAVED["run/config.json"], resume="run")
    parsed = cli.parse(Config, PRESETS, ["--resume", "run", *words.split()])
    assert parsed == ("run", replace(expected, compile=True, **changes))
    same = ["--resume", "run", "--lr", "0.01", "--config", "run/config.json"]
    assert parse(*same) == expected
    moved = ["--model", "m", "--generator", "g", "--train-file", "t", "--score", "s.tsv"]
    files = dict(model="m", generator="g", train_file="t", score="s.tsv")  # their content counts
    assert parse("--resume", "run", *moved) == replace(expected, **files)
    assert parse("--config", "demo", "--resume", "") == PRESETS["demo"]


def test_commands_that_score_models_refuse_a_batch_size_of_0():
    parser = cli.Parser(prog="score.py")
    cli.add_model_flags(parser, ["cls", "mean"])
    for words in ("m --batch-size 0", "m --pooler cls,"):
        with pytest.raises(UserError, match="; see score.py -h$"):
            parser.parse_args(words.split())
