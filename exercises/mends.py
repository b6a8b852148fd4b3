"""For the teacher: what is wrong in fix_it.py, as old and new lines, and what each mistake looks like in a log.

    python exercises/mends.py symptoms --json results/exercises/fix_it.json              # a run for each mistake, six minutes
    python exercises/mends.py symptoms --json results/exercises/fix_it.json --seeds 0,1,2
    python exercises/mends.py lines                                                      # the old and new lines

"symptoms" runs the trainer with everything mended, and with each mistake alone, all others mended; for 2 once more with another
lam, for 8 with another lr. Of each run's model at the end it says what a log does not: the loss of eight sentences padded little
and much (6), what BatchNorm counted (7), and how far G's weights are from their folder's (8).
The tests say the same of tiny models: test_fix_it.py.
Not here: mends that are written otherwise and are right too. The tests take them.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bert.py and the others lie one folder up

from bert import load_bert, write_atomically
from data import TokenizedSentences, find_model, mask_tokens, run_main

FILE = Path(__file__).with_name("fix_it.py")

NAMES = {
    1: "cosines times the temperature",
    2: "h detached before the discriminator",
    3: "labels taken before [CLS] is put back",
    4: "projector on at evaluation",
    5: "dropout off after a score",
    6: "padding counted as kept",
    7: "BatchNorm for each view",
    8: "generator trained with the encoder",
}
MENDS = {  # the mistake, and what is meant
    1: ("F.cross_entropy(cosines * temperature, ",
        "F.cross_entropy(cosines / temperature, "),
    2: ("cls_vector=h.detach()",
        "cls_vector=h"),
    3: ("""\
    replaced = x_edited != x  # a masked token that G restores is not replaced
    x_edited[:, 0] = x[:, 0]  # G knows no [CLS]: it was never asked for one
""", """\
    x_edited[:, 0] = x[:, 0]  # G knows no [CLS]: it was never asked for one
    replaced = x_edited != x  # a masked token that G restores is not replaced
"""),
    4: ("""\
    vectors = torch.from_numpy(encode(model.encoder, tokenizer, sentences))
    with torch.no_grad():
        vectors = model.projector(vectors)  # to where the cosines were trained
    return vectors.numpy()
""", """\
    return encode(model.encoder, tokenizer, sentences)
"""),
    5: ("""\
    model.train()
    for number in range(1, steps + 1):
""", """\
    for number in range(1, steps + 1):
        model.train()
"""),
    6: ("F.cross_entropy(logits.flatten(0, 1), replaced.flatten().long())",
        "F.cross_entropy(logits[mask], replaced[mask].long())"),
    7: ("h = torch.stack([self.projector(cls[0::2]), self.projector(cls[1::2])], dim=1)  # (B, 2, D)",
        "h = self.projector(cls).view(-1, 2, cls.shape[1])  # (B, 2, D)"),
    8: ("encoder = generator.bert  # the MLM head sits on top of it",
        "encoder = load_bert(folder)"),
}  # fmt: skip


def mended(*numbers: int) -> ModuleType:
    """fix_it.py as a module, with these mistakes mended. Raises: ValueError where one's lines are not there exactly once."""
    text = FILE.read_text()
    for number in numbers:
        old, new = MENDS[number]
        if text.count(old) != 1:
            raise ValueError(f"mistake {number} stands in {FILE.name} {text.count(old)} times:\n{old}")
        text = text.replace(old, new)
    module = ModuleType("fix_it")
    module.__file__ = str(FILE)
    exec(compile(text, str(FILE), "exec"), module.__dict__)
    return module


def all_mended() -> ModuleType:
    return mended(*MENDS)


def only(mistake: int | None) -> ModuleType:
    """fix_it.py with this one mistake left, or with none."""
    return mended(*(number for number in MENDS if number != mistake))


# ----------------------------------------------------------------------------------------------------------------
# The runs


def padded_losses(module: ModuleType, model, tokenizer, sentences: list[str]) -> list[float]:
    """The replaced-token loss of the same sentences and masks, padded to their longest and to MAX_LENGTH. Without dropout."""
    data = TokenizedSentences(((sentence,) for sentence in sentences), tokenizer, module.MAX_LENGTH)
    x, mask = data.batch(np.arange(len(sentences)))  # (R, T)
    x_masked, _ = mask_tokens(x, tokenizer, module.MASK_RATIO, "all", torch.Generator().manual_seed(0))
    model.eval()
    losses, filled = [], ((x, tokenizer.pad), (mask, False), (x_masked, tokenizer.pad))
    for width in (x.shape[1], module.MAX_LENGTH):
        batch = (F.pad(t, (0, width - t.shape[1]), value=value) for t, value in filled)
        with torch.no_grad():
            losses.append(model(*batch, lam=0.0)[1]["prediction"])
    return losses


def run(mistake: int | None, sentences: list[str], short: list[str], score, **settings) -> dict:
    """A whole run with one mistake, or none: its log, and of its model at the end what a log does not show."""
    module, since, built = only(mistake), time.time(), []
    build = module.build
    module.build = lambda: built.append(build()) or built[-1]  # train() keeps its model to itself
    rows = module.train(sentences, score, **settings)
    (model, tokenizer), fixed = built[0], load_bert(find_model(module.MODEL), mlm=True).state_dict()
    moved = max(float((p - fixed[name]).abs().max()) for name, p in model.generator.state_dict().items())
    return {"mistake": mistake, **settings, "seconds": round(time.time() - since, 1),
            "padded_losses": padded_losses(module, model, tokenizer, short),
            "num_batches_tracked": int(model.projector[1].num_batches_tracked), "generator_moved": moved,
            "rows": rows}  # fmt: skip


def symptoms(seeds: list[int], steps: int, batch_size: int, lr: float, lam: float, other_lr: float, other_lam: float) -> dict:
    """All runs, with their logs. Prints a table's line after each, and the table at the end."""
    import docs  # imports hundreds of modules to read what is written about them: once, for all runs

    started, sentences, score = time.time(), docs.training_sentences(), docs.DocsScore().dev
    short = sorted(set(sentences), key=lambda sentence: (abs(len(sentence) - 40), sentence))[:8]  # of like length: little padding
    plan = [(None, lr, lam), *((number, lr, lam) for number in MENDS), (None, lr, other_lam), (2, lr, other_lam),
            (None, other_lr, lam), (8, other_lr, lam)]  # fmt: skip
    runs, lines = [], [HEADER]
    for seed in seeds:
        for mistake, rate, weight in plan:
            settings = dict(steps=steps, batch_size=batch_size, lr=rate, lam=weight, seed=seed)
            runs.append(run(mistake, sentences, short, score, **settings))
            lines.append(line(runs[-1]))
            print(f"\n{HEADER}\n{lines[-1]}\n", flush=True)
    print("\n".join(lines))
    return {"command": shlex.join(["python", *sys.argv]), "mistakes": NAMES, "padded": short,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()},
            "seconds": round(time.time() - started, 1), "runs": runs}  # fmt: skip


HEADER = ("mistake seed    lr  lam  contrastive first, last  cosines + last, - last  prediction first, last  replaced first, last"
          "  accuracy_replaced _kept   score 0, best, last   prediction padded little, much"
          "  tracked  generator moved")  # fmt: skip


def line(run: dict) -> str:
    """A run's line of the table. First and last are step 1 and the last one, but of share_replaced the means of ten steps."""
    rows, scores = run["rows"][1:], [row["score"] for row in run["rows"] if "score" in row]
    first, last = rows[0], rows[-1]
    shares = [sum(row["share_replaced"] for row in ten) / len(ten) for ten in (rows[:10], rows[-10:])]
    own, wide = run["padded_losses"]
    return (f"{run['mistake'] or '-':>7}{run['seed']:>5}{run['lr']:>6g}{run['lam']:>5g}"
            f"{first['contrastive']:>14.6f}{last['contrastive']:>11.6f}"
            f"{last['positive_cosine']:>14.4f}{last['negative_cosine']:>10.4f}"
            f"{first['prediction']:>15.4f}{last['prediction']:>10.4f}{shares[0]:>14.4f}{shares[1]:>9.4f}"
            f"{last['accuracy_replaced']:>15.3f}{last['accuracy_kept']:>10.3f}"
            f"{scores[0]:>9.2f}{max(scores):>7.2f}{scores[-1]:>7.2f}{own:>22.4f}{wide:>9.4f}"
            f"{run['num_batches_tracked']:>11}{run['generator_moved']:>17.1e}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What is wrong in fix_it.py, and what one sees of it.")
    parser.add_argument("what", choices=("symptoms", "lines"))
    parser.add_argument("--json", metavar="FILE", help="symptoms: keep all rows of the logs here")
    parser.add_argument("--seeds", default="0", help="symptoms: with commas between (default: 0)")
    for name, default in (("steps", 40), ("batch-size", 32), ("lr", 3e-5), ("lam", 0.05), ("other-lr", 1e-3), ("other-lam", 5.0)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"symptoms: (default: {default})")
    args = vars(parser.parse_args())
    what, file, seeds = args.pop("what"), args.pop("json"), [int(seed) for seed in args.pop("seeds").split(",")]
    if what == "lines":
        for number, (old, new) in MENDS.items():
            print(f"{number}. {NAMES[number]}")
            for sign, text in (("-", old), ("+", new)):
                print("\n".join(f"    {sign} {part}" for part in text.splitlines()))
        return
    found = symptoms(seeds, **args)
    if file:
        write_atomically(file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
