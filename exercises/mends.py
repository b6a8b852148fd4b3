"""For the teacher: the bugs of fix_it.py as old and new lines, and their symptoms in a log.

    python exercises/mends.py lines                        # the old and the new lines
    python exercises/mends.py symptoms --json FILE --seeds 0,1,2    # ten minutes per seed

"symptoms" runs the trainer with all bugs fixed, then with each bug alone. Bug 2 is also run with
another lam and bug 8 with another lr. For each run it also reports what a log does not show: the
loss of eight sentences with little and with much padding (bug 6), how many batches BatchNorm
counted (bug 7), and how far G's weights moved (bug 8). test_fix_it.py tests the same in tiny
models. Not here: other correct fixes. The tests accept them.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of bert.py

from bert import load_bert
from data import mask_tokens, read_sentences
from engine.errors import run_main, write_atomically
from engine.hub import find_model, find_text
from engine.tokens import TokenizedSentences
from eval_sts import make_score

FILE = Path(__file__).with_name("fix_it.py")
KEPT_STEPS = (0, 1, 2, 10, 11, 20, 30, 40)  # of a log, in the JSON

NAMES = {
    1: "cosines multiplied by the temperature",
    2: "h detached before the discriminator",
    3: "labels computed before [CLS] is restored",
    4: "projector used at evaluation",
    5: "dropout off after an evaluation",
    6: "padding counted as original",
    7: "BatchNorm per view",
    8: "generator trained with the encoder",
}
MENDS = {  # old and new lines
    1: (
        "F.cross_entropy(cosines * temperature, ",
        "F.cross_entropy(cosines / temperature, ",
    ),
    2: (
        "cls_vector=h.detach()",
        "cls_vector=h",
    ),
    3: (
        """\
    replaced = x_edited != x  # a masked token that G restores is not replaced
    x_edited[:, 0] = x[:, 0]  # G was never trained to predict [CLS]
""",
        """\
    x_edited[:, 0] = x[:, 0]  # G was never trained to predict [CLS]
    replaced = x_edited != x  # a masked token that G restores is not replaced
""",
    ),
    4: (
        """\
    vectors = torch.from_numpy(encode(model.encoder, tokenizer, sentences))
    with torch.no_grad():
        vectors = model.projector(vectors)  # where the cosines were trained
    return vectors.numpy()
""",
        """\
    return encode(model.encoder, tokenizer, sentences)
""",
    ),
    5: (
        """\
    model.train()
    for step in range(1, steps + 1):
""",
        """\
    for step in range(1, steps + 1):
        model.train()
""",
    ),
    6: (
        "F.cross_entropy(logits.flatten(0, 1), replaced.flatten().long())",
        "F.cross_entropy(logits[mask], replaced[mask].long())",
    ),
    7: (
        "h = torch.stack([self.projector(cls[0::2]), self.projector(cls[1::2])], dim=1)",
        "h = self.projector(cls).unflatten(0, (-1, 2))",
    ),
    8: (
        "encoder = generator.bert  # the MLM head is on top of it",
        "encoder = load_bert(folder)",
    ),
}


def mended(*numbers: int) -> ModuleType:
    """fix_it.py as a module, with these bugs fixed. Raises: ValueError if a bug is not found."""
    text = FILE.read_text()
    for number in numbers:
        old, new = MENDS[number]
        if text.count(old) != 1:
            raise ValueError(f"bug {number} occurs {text.count(old)} times in {FILE.name}:\n{old}")
        text = text.replace(old, new)
    module = ModuleType("fix_it")
    module.__file__ = str(FILE)
    exec(compile(text, str(FILE), "exec"), module.__dict__)
    return module


def all_mended() -> ModuleType:
    return mended(*MENDS)


def only(bug: int | None) -> ModuleType:
    """fix_it.py with this one bug, or with none."""
    return mended(*(number for number in MENDS if number != bug))


# ------------------------------------------------------------------------------------------------
# The runs


def padded_losses(module: ModuleType, model, tokenizer, short: list[str]) -> list[float]:
    """The difference loss of sentences padded to their longest, and to MAX_LENGTH; no dropout."""
    rows = [(sentence,) for sentence in short]
    sentences = TokenizedSentences(rows, tokenizer, module.MAX_LENGTH)
    x, mask = sentences.rows(np.arange(len(short)))  # (R, T)
    rng = torch.Generator().manual_seed(0)
    x_masked, _ = mask_tokens(x, tokenizer, module.MASK_RATIO, "all", rng)
    model.eval()
    losses, values = [], (tokenizer.pad_id, False, tokenizer.pad_id)
    for width in (x.shape[1], module.MAX_LENGTH):
        more = (0, width - x.shape[1])
        batch = (F.pad(t, more, value=value) for t, value in zip((x, mask, x_masked), values))
        with torch.no_grad():
            losses.append(model(*batch, lam=0.0)[1]["difference"])
    return losses


def run(
    bug: int | None, rows: list[tuple[str]], short: list[str], score: Callable, **settings
) -> dict:
    """A whole run with one bug or none: its log, and what the log does not show."""
    module, started, built = only(bug), time.monotonic(), []
    build = module.build
    module.build = lambda: built.append(build()) or built[-1]  # train() does not return its model
    log = module.train(rows, score, **settings)
    shares = [line["share_replaced"] for line in log[1:]]
    model, tokenizer = built[0]
    fixed = load_bert(find_model(module.MODEL), mlm=True).state_dict()
    generator = model.generator.state_dict()
    return {
        "bug": bug,
        **settings,
        "seconds": round(time.monotonic() - started, 1),
        "padded_losses": padded_losses(module, model, tokenizer, short),
        "num_batches_tracked": int(model.projector[1].num_batches_tracked),
        "generator_moved": max(float((generator[n] - fixed[n]).abs().max()) for n in fixed),
        "share_replaced": [round(float(np.mean(ten)), 6) for ten in (shares[:10], shares[-10:])],
        "log": [rounded(line) for line in log if line["step"] in KEPT_STEPS],
    }


def rounded(line: dict) -> dict:
    return {name: round(value, 6) for name, value in line.items()}


def symptoms(
    seeds: list[int],
    steps: int,
    batch_size: int,
    lr: float,
    lam: float,
    other_lr: float,
    other_lam: float,
    file: str | None,
) -> None:
    """All runs. Prints a line of the table after each, and the table at the end.

    file: the logs, written anew after each run.
    """
    started, score = time.monotonic(), make_score("captions", "").dev
    rows = list(read_sentences(find_text(all_mended().TRAIN_FILE)))
    sentences = {sentence for row in rows for sentence in row}
    by_length = sorted(sentences, key=lambda sentence: (abs(len(sentence) - 40), sentence))
    short = by_length[:8]  # of similar length, so they need little padding
    plan = [(bug, lr, lam) for bug in (None, *MENDS)]
    plan += [(bug, lr, other_lam) for bug in (None, 2)]
    plan += [(bug, other_lr, lam) for bug in (None, 8)]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "bugs": NAMES,
        "padded": short,
        "versions": versions | {"threads": torch.get_num_threads()},
        "seconds": 0.0,
        "runs": [],
    }
    lines = [HEADER]
    for seed in seeds:
        for bug, run_lr, run_lam in plan:
            settings = dict(steps=steps, batch_size=batch_size, lr=run_lr, lam=run_lam, seed=seed)
            found["runs"].append(run(bug, rows, short, score, **settings))
            found["seconds"] = round(time.monotonic() - started, 1)
            if file:
                write_atomically(file, to_json(found))
            lines.append(format_run(found["runs"][-1]))
            print(f"\n{HEADER}\n{lines[-1]}\n", flush=True)
    print("\n".join(lines))


def to_json(found: dict) -> str:
    """A line for each run."""
    runs = ",\n".join(f"  {json.dumps(run)}" for run in found["runs"])
    head = json.dumps(found | {"runs": []}, indent=1)
    return head.replace('"runs": []', f'"runs": [\n{runs}\n ]') + "\n"


HEADER = (
    "bug seed    lr  lam  contrastive first, last  cosines + last, - last"
    "  difference first, last  replaced first, last  accuracy_replaced _original"
    "   score 0, best, last   difference padded little, much  tracked  generator moved"
)


def format_run(run: dict) -> str:
    """A line of the table: the first and last step; share_replaced: means of ten steps."""
    scores = [line["score"] for line in run["log"] if "score" in line]
    first, last = run["log"][1], run["log"][-1]
    shares, (little, much) = run["share_replaced"], run["padded_losses"]
    return (
        f"{run['bug'] or '-':>3}{run['seed']:>5}{run['lr']:>6g}{run['lam']:>5g}"
        f"{first['contrastive']:>14.6f}{last['contrastive']:>11.6f}"
        f"{last['positive_cosine']:>14.4f}{last['negative_cosine']:>10.4f}"
        f"{first['difference']:>15.4f}{last['difference']:>10.4f}"
        f"{shares[0]:>14.4f}{shares[1]:>9.4f}"
        f"{last['accuracy_replaced']:>15.3f}{last['accuracy_original']:>13.3f}"
        f"{scores[0]:>9.2f}{max(scores):>7.2f}{scores[-1]:>7.2f}{little:>22.4f}{much:>9.4f}"
        f"{run['num_batches_tracked']:>11}{run['generator_moved']:>17.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The bugs of fix_it.py and their symptoms.")
    parser.add_argument("what", choices=("symptoms", "lines"))
    parser.add_argument("--json", metavar="FILE", help="symptoms: also write the logs")
    parser.add_argument("--seeds", default="0", help="symptoms: separated by commas (default: 0)")
    settings = {"steps": 40, "batch-size": 32, "lr": 3e-5, "lam": 0.05}
    settings |= {"other-lr": 1e-3, "other-lam": 5.0}
    for name, value in settings.items():
        help = f"symptoms: (default: {value})"
        parser.add_argument(f"--{name}", type=type(value), default=value, help=help)
    args = vars(parser.parse_args())
    what, file, seeds = args.pop("what"), args.pop("json"), args.pop("seeds").split(",")
    if what == "lines":
        for number, pair in MENDS.items():
            print(f"{number}. {NAMES[number]}")
            for sign, text in zip("-+", pair):
                print("\n".join(f"    {sign} {line}" for line in text.splitlines()))
        return
    symptoms([int(seed) for seed in seeds], **args, file=file)


if __name__ == "__main__":
    run_main(main)
