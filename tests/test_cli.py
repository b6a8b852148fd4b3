"""engine/cli.py: flags from a dataclass, presets, saved configs, and what --resume accepts; and the
settings of diffcse.py.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import pytest

import diffcse
from diffcse import PRESETS, Config
from engine import cli
from engine.errors import UserError, run_main


def parse(*words: str) -> Config:
    return cli.parse(Config, PRESETS, [*map(str, words)])[1]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------
# Any dataclass


@dataclass
class Settings:
    """A base class."""

    # Not a field's comment
    size: int = 3  # how large; 50 % is half
    kind: Literal["a", "b"] = "a"  # which

    def method(self) -> None:
        local: int = 1  # not a field
        del local


@dataclass
class MoreSettings(Settings):
    fast: bool = True  # quickly
    kind: Literal["a", "b", "c"] = "b"  # which of three


def test_fields_comments_are_the_help_of_base_classes_first():
    expected = {"size": "how large; 50 % is half", "kind": "which of three", "fast": "quickly"}
    assert cli.field_comments(MoreSettings) == expected
    shown = re.sub(
        r"\s+", " ", cli.make_parser(MoreSettings, {"one": MoreSettings()}).format_help()
    )
    assert "--size SIZE how large; 50 % is half (default: 3)" in shown
    assert "--kind a|b|c which of three (default: b)" in shown
    assert (
        "--fast [on|off] quickly (default: on)" in shown
        and "The defaults shown are those of one." in shown
    )
    preset = {"one": Settings(size=4)}  # a preset of the base class is a preset of the other
    assert cli.parse(MoreSettings, preset, ["--config", "one", "--kind", "c"]) == (
        "one",
        MoreSettings(4, "c", True),
    )


@dataclass
class Bare(Settings):
    other: int = 1
    commented: int = 2  # fine


def test_a_field_without_a_comment_is_an_error():
    with pytest.raises(TypeError, match="^Bare: no comment for other$"):
        cli.parse(Bare, {"one": Bare()}, ["--config", "one"])


# ------------------------------------------------------------------------------------------------
# The settings of a run


def test_presets_are_the_papers():
    """Tables 12 and 13: learning rate, mask ratio, lambda, batch; the rest as published."""
    table = {
        "bert_sts": (7e-6, 0.30, 0.005, 64),
        "roberta_sts": (1e-5, 0.20, 0.005, 64),
        "bert_transfer": (2e-6, 0.15, 0.05, 64),
        "roberta_transfer": (3e-6, 0.15, 0.05, 128),
    }
    published = Config(epochs=2, temperature=0.05, max_length=32, clip=1.0, projector="batchnorm")
    published = replace(published, seed=42, eval_every=125, edit="argmax", edit_scope="all")
    published = replace(published, masking="80-10-10", reduction="mean", views="both")
    published = replace(published, generator_dropout=True, pads_in_loss=True, protect_sep=False)
    published = replace(published, model="bert-base-uncased", generator="distilbert-base-uncased")
    roberta = dict(model="roberta-base", generator="distilroberta-base")
    for name, (lr, mask_ratio, lam, batch_size) in table.items():
        numbers = dict(lr=lr, mask_ratio=mask_ratio, lam=lam, batch_size=batch_size)
        models = roberta if "roberta" in name else {}
        assert (
            PRESETS[name] == replace(published, **numbers, **models) and not PRESETS[name].dropout
        )
    simcse = dict(lam=0.0, projector="tanh", epochs=1)
    expected = replace(published, **simcse, lr=3e-5, batch_size=64)
    assert PRESETS["simcse_bert"] == expected
    expected = replace(published, **simcse, **roberta, lr=1e-5, batch_size=512)
    assert PRESETS["simcse_roberta"] == expected


def test_presets_can_be_saved_and_read_back(tmp_path):
    for name, cfg in PRESETS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(asdict(cfg)))
        assert parse("--config", tmp_path / f"{name}.json") == cfg == parse("--config", name)


def test_every_field_is_a_flag_and_help_is_no_mistake(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffcse.py", "-h"])
    with pytest.raises(SystemExit) as stop:
        run_main(diffcse.main)
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in shown for name in PRESETS)
    assert all(f"  {cli.flag(field.name)} " in shown for field in fields(Config))


def test_flags_change_a_preset_or_a_saved_config(tmp_path):
    words = "--config bert_sts --protect-sep on --lr 1e-4 --steps 7 --masking all".split()
    changes = dict(protect_sep=True, lr=1e-4, steps=7, masking="all")
    cfg = replace(PRESETS["bert_sts"], **changes)
    assert cli.parse(Config, PRESETS, words) == ("bert_sts", cfg)
    (tmp_path / "c.json").write_text(json.dumps(asdict(cfg)))
    words = ["--config", str(tmp_path / "c.json"), "--lam", "0"]
    assert cli.parse(Config, PRESETS, words) == ("run", replace(cfg, lam=0.0))


@pytest.mark.parametrize(
    "words, name, expected",
    [
        ("--compile", "compile", True),
        ("--compile --steps 3", "compile", True),
        ("--compile off", "compile", False),
        ("--compile=ON", "compile", True),
        ("--no-compile", "compile", False),
        ("--no-generator-dropout --steps 3", "generator_dropout", False),
        ("--fast --no-fast", "fast", False),
        ("--hard-negative-weight -1e-1", "hard_negative_weight", -0.1),
        ("--hard-negative-weight -.5", "hard_negative_weight", -0.5),
        ("--train-file=a=b.txt", "train_file", "a=b.txt"),
        ("--lr 1 --lr 2", "lr", 2.0),
    ],
)
def test_values_of_flags(words, name, expected):
    value = getattr(parse("--config", "demo", *words.split()), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"lrr": 1}, "unknown field 'lrr'"),
        ({"lr": "fast"}, "--lr is 'fast'; it must be a number"),
        ({"steps": 1.5}, "--steps is 1.5; it must be an integer"),
        ({"seed": True}, "--seed"),
        ({"lam": -1}, "--lam"),
        ([], "expected dict"),
    ],
)
def test_bad_saved_configs_are_one_line_that_names_the_file(tmp_path, saved, message):
    (tmp_path / "c.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message) as error:
        parse("--config", tmp_path / "c.json")
    assert "c.json" in one_line(error)


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("lr", ["1e-5"], 1e-5),
        ("lr", [1, 1.0, "1"], 1.0),
        ("steps", ["10", 10, 10.0], 10),
        ("steps", [None], None),
        ("seed", ["9007199254740993"], 2**53 + 1),  # no detour through a float
        ("dropout", ["0", 0], 0.0),
        ("dropout", [None], None),
        ("protect_sep", ["ON", "on", "yes", "true", True], True),
        ("protect_sep", ["no", "off", "False", False], False),
        ("edit", ["sample"], "sample"),
        ("model", ["3"], "3"),
        ("steps", ["1.5", 1.5, True, "nan", 10**400, [1], "9" * 5000], UserError),
        ("seed", [None, {}], UserError),
        ("lr", ["", "fast", None, False, 10**400], UserError),
        ("protect_sep", [1, None, "perhaps", []], UserError),
        ("edit", ["Sample", ["sample"], None], UserError),
        ("model", [3, None], UserError),
    ],
)
def test_parse_field(name, values, expected):
    for value in values:
        if expected is UserError:
            with pytest.raises(UserError, match=f"^{cli.flag(name)} is .*; it must be ") as error:
                cli.parse_field(Config, name, value)
            assert one_line(error)
        else:
            parsed = cli.parse_field(Config, name, value)
            assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--config is missing; try --config demo"),
        ("--config", "--config"),
        ("--config nope", "--config 'nope': expected a run's config.json or one of bert_sts"),
        ("--config none.json", "none.json"),
        ("demo", "unknown argument demo"),
        ("--config demo --lerning-rate 1", "unknown argument --lerning-rate"),
        ("--config demo --batch_sise=3", "did you mean --batch-size?"),
        ("--config demo --xyz", "the flags are --amp, --batch-size, "),
        ("--config demo --step 3", "did you mean --steps?"),  # no abbreviations
        ("--config demo --batch-size 1", "--batch-size is 1; it must be at least 2"),
        ("--config demo --mask-ratio 1.5", "--mask-ratio is 1.5; it must be between 0 and 1"),
        ("--config demo --lr", "--lr"),
        ("--config demo --lr nan", "--lr is nan; it must be positive"),
        ("--config demo --lr -1e-5", "--lr is -1e-05; it must be positive"),
        ("--config demo --lam=-1", "--lam"),
        ("--config demo --edit max", "--edit is 'max'; it must be one of argmax, sample"),
        (
            "--config demo --pads-in-loss perhaps",
            "--pads-in-loss is 'perhaps'; it must be on or off",
        ),
        ("--config demo --seed -1", "--seed"),
        ("--config demo --steps 0", "--steps is 0; it must be at least 1"),
        ("--config demo --max-length 2", "--max-length is 2; it must be at least 3"),
        ("--config demo --epochs x", "--epochs is 'x'; it must be an integer"),
        ("--config demo --save-minutes -1", "--save-minutes is -1.0; it must be 0 or larger"),
        ("--config demo --lam 0 --contrastive off", "--contrastive is False; it must be on"),
        ("--config demo --amp fp16 --device cpu", "--amp fp16"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["diffcse.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        run_main(diffcse.main)
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == "" and message in shown.err
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# --resume


@pytest.fixture
def run(tmp_path):
    """A run's folder, as it is before the first checkpoint."""
    cfg = replace(PRESETS["demo"], lr=1e-2, lam=0.05, train_file="mine.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(cfg)))
    return tmp_path / "run", cfg


def test_a_resumed_run_keeps_its_settings_but_may_be_looked_at_differently(run):
    folder, cfg = run
    words = "--eval-every 3 --log-every 1 --save-minutes 9 --device cpu --data there --compile"
    changes = dict(eval_every=3, log_every=1, save_minutes=9.0, device="cpu", data="there")
    expected = replace(cfg, resume=str(folder), compile=True, **changes)
    parsed = cli.parse(Config, PRESETS, ["--resume", str(folder), *words.split()])
    assert parsed == ("run", expected)
    same = ["--resume", folder, "--lr", "0.01", "--config", folder / "config.json"]
    assert parse(*same) == replace(cfg, resume=str(folder))


def test_a_resumed_run_refuses_other_settings(run):
    folder, _ = run
    with pytest.raises(UserError, match=f"^--resume {folder}: --lr is 0.1, but") as error:
        parse("--resume", folder, "--lam", "0", "--lr", "0.1")
    assert "--lam is 0.0, but the run has 0.05" in one_line(error)
    assert one_line(error).endswith(
        "except: data, device, compile, log_every, eval_every, save_minutes"
    )
    with pytest.raises(
        UserError, match="--train-file is '.*20k.txt.xz', but the run has 'mine.txt'"
    ):
        parse("--config", "demo", "--resume", folder)


def test_only_a_run_can_be_resumed(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=f"^--resume {folder}: no run there"):
            parse("--resume", folder)
    (tmp_path / "config.json").write_text(json.dumps({"objective": "masked"}))
    with pytest.raises(UserError, match="unknown field 'objective'.*python -m lab.ablations"):
        parse("--resume", tmp_path)
    assert parse("--config", "demo", "--resume", "") == PRESETS["demo"]


# ------------------------------------------------------------------------------------------------
# Commands that score models


def score_flags(*words: str):
    parser = cli.Parser(prog="score.py")
    cli.add_model_flags(parser, ["cls", "mean"])
    return parser.parse_args(words)


def test_flags_of_commands_that_score_models():
    args = score_flags("model")
    assert (args.models, args.pooler, args.data, args.batch_size) == (["model"], [None], "", 128)
    assert (args.json, args.device, args.amp) == (None, "auto", "off")
    words = "a b --pooler mean,cls --batch-size 7 --json f --device cpu --amp bf16 --data d"
    args = score_flags(*words.split())
    assert (args.models, args.pooler, args.data) == (["a", "b"], ["mean", "cls"], "d")
    assert (args.batch_size, args.json, args.device, args.amp) == (7, "f", "cpu", "bf16")


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "MODEL"),
        ("m --pooler nonsense", "'nonsense' is unknown; choose from cls, mean"),
        ("m --batch-size 0", "'0' is not a positive integer"),
        ("m --batch-size 1.5", "'1.5' is not a positive integer"),
        ("m --device tpu", "--device"),
        ("m --amp fp16", "--amp"),
    ],
)
def test_their_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match="; see score.py -h$") as error:
        score_flags(*words.split())
    assert message in one_line(error)
