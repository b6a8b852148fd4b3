"""What a run can be told: Config, the presets, and the command line that is made of them.

    Config      every setting, its default and its reason; the comments are the text of -h
    PRESETS     the paper's models, the baseline, and what runs on a laptop
    parse_args  a flag for each field, on top of a preset or of an earlier run's config.json

Where the paper and its published code differ the default is the code, and the field's other value is the paper's reading.
Numbers in brackets are sections of SPEC, what the published code does.
"""

import argparse
import difflib
import inspect
import math
import os
import re
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from bert import UserError, read_json
from embed import POOLINGS

# ----------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config:
    # What is trained, and on what
    model: str = "bert-base-uncased"  # encoder and discriminator start here: a model folder or a Hub name
    generator: str = "distilbert-base-uncased"  # masked language model with the encoder's vocabulary; it stays fixed
    train_file: str = "wiki1m_for_simcse.txt"  # sentences: .txt, .csv, .tsv (also .gz, .xz), or 'docs': Python's documentation
    text: Literal["sentences", "paragraphs"] = "sentences"  # the train file's lines; paragraphs are running text, split into sentences, with an empty line between documents
    data: str = ""  # folder with STS/ and SICK/ (and the train file): nothing is downloaded that lies there
    score: str = "stsb"  # what chooses the best checkpoint: stsb (dev: and the test sets stay shut), docs: finding documentation, or your own pairs: a .tsv or .csv
    dtype: Literal["fp32", "fp16"] = "fp32"  # of the best model's file; fp16 halves it
    out_dir: str = ""  # folder for the best model, config.json, log.jsonl and results.json (default: runs/NAME-1, -2, ...)
    resume: str = ""  # folder of a run that was stopped: goes on with it to the same end, by its own config
    explain: str = ""  # a sentence: prints one training step of it with all its numbers, and trains nothing
    seed: int = 42  # decides all that is random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: on cuda bf16, or fp16 where the card has no bf16. A CPU with AVX512-BF16 gains by bf16

    compile: bool | None = None  # compile the layers (needs a C++ compiler), and on a GPU make a step one CUDA graph (default: on for cuda)

    # Optimisation [6]: AdamW (0.9, 0.999), eps 1e-8, no weight decay; linear from lr to 0, no warm-up
    epochs: int = 2  # times through the train file
    steps: int | None = None  # stop after this many steps; the rate falls to 0 over them
    batch_size: int = 64  # sentences in a step, each of them seen in 2 views
    max_length: int = 32  # tokens kept of a sentence, [CLS] and [SEP] included
    lr: float = 7e-6  # learning rate of everything that is trained
    clip: float = 1.0  # gradients are scaled down to this norm, over all parameters together
    dropout: float | None = None  # rate in encoder and discriminator (default: the model's own, 0.1 for bert-base)

    # Contrastive loss [4, 5]
    projector: Literal["batchnorm", "tanh"] = "batchnorm"  # from [CLS] to h: two layers with BatchNorm, or SimCSE's tanh layer
    temperature: float = 0.05  # cosines are divided by it
    hard_negative_weight: float = 0.0  # added to the logit of a sentence's own hard negative (files with 3 columns)

    # Difference prediction [2, 3]
    lam: float = 0.005  # weight of the replaced-token loss; 0 builds neither generator nor discriminator: SimCSE
    mask_ratio: float = 0.30  # chance of a token to be masked
    mask: Literal["80-10-10", "all"] = "80-10-10"  # BERT's mixture of [MASK], random and unchanged; the paper writes all [MASK]
    edit: Literal["argmax", "sample"] = "argmax"  # the generator's best token; the paper says a sampled one
    edit_temperature: float = 1.0  # of the sampling
    edit_scope: Literal["all", "masked"] = "all"  # where the generator's token is taken: everywhere; the paper: masked positions
    generator_dropout: bool = True  # generator in train mode, its dropout on; the paper's fixed G would have it off
    protect_sep: bool = False  # keep the final [SEP] as it is; the published code lets the generator overwrite it
    views: Literal["both", "first"] = "both"  # views that are edited; the paper has one edit of a sentence
    pads_in_loss: bool = True  # padding counts in the loss as "not replaced"; the paper sums over the sentence's tokens
    reduction: Literal["mean", "sum"] = "mean"  # of the replaced-token loss; the paper writes a sum, for which lam is far too large

    # Ablations (paper Tables 3, 4 and 15; lab/ablations.py)
    contrastive: bool = True  # off: the difference prediction alone
    objective: Literal["replaced", "masked", "corrected"] = "replaced"  # what the discriminator says: which tokens were replaced; the masked tokens (conditional MLM); which were replaced, and what stood there (conditional corrective LM)
    condition_on: Literal["same", "next", "both"] = "same"  # whose edit it sees beside h: that of h's own sentence, of the next one in the text, or of both
    edit_with: Literal["replace", "insert", "delete", "all"] = "replace"  # how a sentence is edited; insert and delete that share of its tokens that mask_ratio says
    edit_as: Literal["difference", "positive", "negative"] = "difference"  # what the edit is for: the discriminator, or one more positive or negative of the contrastive loss, weighted by lam

    # Looking at it
    pooling: Literal[POOLINGS] = "cls_before_pooler"  # the vector that is scored; training always uses [CLS]
    eval_every: int = 125  # steps between two scores; the best is kept
    log_every: int = 100  # steps between two lines of log.jsonl
    save_minutes: float = 5.0  # what a crash may cost: how often the state of the run is saved (0: at every step)

    def check(self) -> "Config":
        """Itself, if every number makes sense. Raises: UserError that names the field."""
        rules = {
            "batch_size": (self.batch_size >= 2, "at least 2: one sentence alone has no negatives, and the loss would always be 0"),
            "max_length": (self.max_length >= 3, "at least 3: [CLS], a token and [SEP]"),
            "mask_ratio": (0 <= self.mask_ratio <= 1, "between 0 and 1"),
            "dropout": (self.dropout is None or 0 <= self.dropout < 1, "at least 0 and below 1"),
            "lam": (0 <= self.lam < math.inf and (self.lam > 0 or not self.ablated()), "0 or above; above 0 with --objective, --condition-on, --edit-with or --edit-as"),
            "hard_negative_weight": (math.isfinite(self.hard_negative_weight), "a finite number"),
            "contrastive": (self.contrastive or self.lam > 0, "on where lam is 0: nothing else would be trained"),
            "text": (self.text == "sentences" or self.train_file != "docs", "sentences for the documentation, which is taken sentence by sentence"),
            "condition_on": (self.condition_on == "same" or self.text == "paragraphs", "same, unless --text paragraphs says that the train file keeps the order of its sentences"),
            "objective": (self.objective == "replaced" or (self.edit_with, self.edit_as) == ("replace", "difference"), "replaced where --edit-with or --edit-as is given"),
            "seed": (0 <= self.seed < 1 << 63, "0 or above, below 2^63"),
            "steps": (self.steps is None or self.steps >= 1, "at least 1"),
            "save_minutes": (self.save_minutes >= 0, "0 or above"),
            "score": (self.score in ("stsb", "dev", "docs") or self.score.endswith((".tsv", ".csv")), "stsb, dev, docs, or a .tsv or .csv of rated pairs"),
        }
        for name in ("epochs", "eval_every", "log_every"):
            rules[name] = (getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "temperature", "edit_temperature", "clip"):
            rules[name] = (0 < getattr(self, name) < math.inf, "above 0")
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be {expected}")
        return self

    def ablated(self) -> bool:
        """Whether it is one of the paper's ablations, and not the difference prediction of h's own sentence, tokens replaced."""
        return (self.objective, self.condition_on, self.edit_with, self.edit_as) != ("replaced", "same", "replace", "difference")

    def generates(self) -> bool:
        return self.objective != "masked" and self.edit_with != "delete"

    def longest(self) -> int:
        """Tokens that a sentence may have once it is edited."""
        return self.max_length + (math.ceil(self.mask_ratio * (self.max_length - 2)) if self.edit_with in ("insert", "all") else 0)


ROBERTA = dict(model="roberta-base", generator="distilroberta-base")
SIMCSE = dict(lam=0.0, projector="tanh", epochs=1)

PRESETS = {
    # DiffCSE-BERT for STS (paper Table 12). 31,250 steps; the authors' 2080 Ti took 3 to 6 hours. Paper: STS-B dev
    # 84.56, seven sets 78.49. Others who ran the official code got 75.25 to 77.44: seed and machine move it by points.
    "bert_sts": Config(lr=7e-6, mask_ratio=0.30, lam=0.005, batch_size=64),
    # DiffCSE-BERT for transfer tasks (Table 13). The same cost. Paper: 86.86 on the seven transfer tasks.
    "bert_transfer": Config(lr=2e-6, mask_ratio=0.15, lam=0.05, batch_size=64),
    # DiffCSE-RoBERTa for STS (Table 12). The same cost. Paper: seven sets 78.21.
    "roberta_sts": Config(**ROBERTA, lr=1e-5, mask_ratio=0.20, lam=0.005, batch_size=64),
    # DiffCSE-RoBERTa for transfer tasks (Table 13). 15,626 steps of 128. Paper: 87.04 on the seven transfer tasks.
    "roberta_transfer": Config(**ROBERTA, lr=3e-6, mask_ratio=0.15, lam=0.05, batch_size=128),
    # SimCSE-BERT, the baseline (SPEC 6). 15,625 steps of about a third of DiffCSE's work. Paper: seven sets 76.25.
    "simcse_bert": Config(**SIMCSE, lr=3e-5, batch_size=64),
    # SimCSE-RoBERTa. 1,954 steps of 512. Paper: seven sets 76.57.
    "simcse_roberta": Config(**SIMCSE, **ROBERTA, lr=1e-5, batch_size=512),
    # The small BERT on sentences of Wikipedia: what the paper does, in minutes on a laptop. Small encoders want far larger
    # rates than bert-base (TACL 2023, SCT: 1e-4 to 5e-4).
    "small": Config(model="assets/small-bert", generator="assets/small-bert", steps=100, lr=1e-4, lam=0.05, eval_every=20, log_every=20),
    # The embedded default: the small BERT that ships with the code learns from the documentation on this machine.
    # Rate and temperature were chosen on one half of the pairs: small encoders move within a few steps, and back.
    "demo": Config(model="assets/small-bert", generator="assets/small-bert", train_file="docs", score="docs",
                   steps=60, lr=3e-5, temperature=0.02, eval_every=10, log_every=10),
}  # fmt: skip


MAY_CHANGE = ("resume", "explain", "data", "device", "compile", "log_every", "eval_every", "save_minutes")  # when a run is resumed; not what it computes


def field_help() -> dict[str, str]:
    """Each field's comment in the source of Config."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))


def parse_field(name: str, value) -> object:
    """A value from the command line or a JSON file as the type that Config gives the field. Raises UserError."""
    kind = typing.get_type_hints(Config)[name]
    options = typing.get_args(kind)  # of Literal: the words; of `int | None`: the types
    flag = f"--{name.replace('_', '-')}"
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise UserError(f"{flag} is {value!r}: it must be one of {', '.join(options)}")
        return value
    if type(None) in options:
        if value is None:
            return None
        kind = options[0]
    if kind is bool:
        words = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
        if str(value).lower() not in words:
            raise UserError(f"{flag} is {value!r}: it must be on or off")
        return words[str(value).lower()]
    if kind is str and not isinstance(value, str) or isinstance(value, (bool, list, dict, type(None))):
        raise UserError(f"{flag} is {value!r}: it must be of type {kind.__name__}")
    try:
        number = kind(value)
        if kind is int and (isinstance(value, float) and number != value or abs(number) >= 1 << 63):
            raise ValueError
        return number
    except (ValueError, OverflowError):
        raise UserError(f"{flag} is {value!r}: it must be {'a whole number' if kind is int else 'a number'}") from None


def load_preset(name: str) -> Config:
    """A preset, or a config.json that an earlier run saved. Raises: UserError that lists what there is."""
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        raise UserError(f"--config {name!r} is unknown: it must be a saved config.json or one of {', '.join(PRESETS)}")
    saved, known = read_json(Path(name)), {f.name for f in fields(Config)}
    if unknown := sorted(set(saved) - known):
        raise UserError(f"{name}: unknown field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
    try:
        return Config(**{field: parse_field(field, value) for field, value in saved.items()})
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def parse_args(argv: list[str]) -> tuple[str, Config]:
    """The preset's name and the configuration. A flag for each field; -h comes from the comments."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):  # argparse's own mistakes in one line too
            raise UserError(f"{message}; see python diffcse.py -h")

    parser = Parser(
        prog="diffcse.py", usage="python diffcse.py --config NAME [--FIELD VALUE ...]", allow_abbrev=False,
        description="Train DiffCSE: a preset, and flags that change fields of it.",
        epilog="The defaults shown are those of bert_sts.")  # fmt: skip
    parser._negative_number_matcher = re.compile(r"^-(\d|\.\d|inf|nan)")  # -1e-5 is a number, not a flag (Python < 3.14)
    parser.add_argument("--config", metavar="NAME", help="a saved config.json, or one of " + ", ".join(PRESETS))
    flags = {"--config": "config"}
    for name, text in field_help().items():
        kind, default = typing.get_type_hints(Config)[name], getattr(Config, name)
        flag = f"--{name.replace('_', '-')}"
        flags[flag] = name
        if bool in (kind, *typing.get_args(kind)):  # --x, --x on, --no-x, --x off
            words, default = "on|off", {True: "on", False: "off"}.get(default)
            flags[f"--no-{flag[2:]}"] = name
            parser.add_argument(f"--no-{flag[2:]}", dest=name, action="store_const", const="off", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            more = {"nargs": "?", "const": "on"}
        else:
            words, more = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else name.upper(), {}
        text += f" (default: {default})" if default not in (None, "") else ""
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, metavar=words, help=text.replace("%", "%%"), **more)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise UserError(f"unknown flag {unknown[0]}{hint} the flags are {', '.join(sorted(flags))}")
    changed = {name: parse_field(name, value) for name, value in vars(args).items() if name != "config"}
    folder = Path(changed.get("resume", ""))
    saved = str(folder / "config.json") if changed.get("resume") else None
    if saved and not os.path.isfile(saved):
        raise UserError(f"--resume {folder}: there is no run in it" + (", it can be the --out-dir of a new one" if folder.is_dir() else ""))
    if args.config is None and saved is None:
        raise UserError(f"--config is missing: try --config demo, or one of {', '.join(PRESETS)}, or a saved config.json")
    name = args.config or saved
    cfg = replace(load_preset(name), **changed).check()
    if saved:
        old = load_preset(saved)
        other = [f"{f.name} is {getattr(old, f.name)!r} there and {getattr(cfg, f.name)!r} here" for f in fields(Config)
                 if f.name not in MAY_CHANGE and getattr(old, f.name) != getattr(cfg, f.name)]  # fmt: skip
        if other:
            raise UserError(f"--resume {folder}: {'; '.join(other)}. A run goes on as it began; {', '.join(MAY_CHANGE[2:])} may change")
    return "run" if name.endswith(".json") else name, cfg
