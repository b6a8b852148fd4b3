"""The end of `python diffcse.py --config demo`: the baseline beside it, and nearest sentences.

Without this file the demo would end with a table of one run.
"""

import textwrap

from data import read_sentences
from embed import DiffCSE
from engine.hub import find_text
from eval_sts import format_table

QUERIES = (
    "The band released its second album in the spring.",
    "He was elected to the city council.",
    "Heavy rain caused floods in several villages.",
)
TOP_K = 2
READS = 0.001  # nats a token; below, h_gap moves up and down around 0


def show(cfg, diffcse: dict, simcse: dict) -> None:
    """diffcse, simcse: the results of two runs, whose settings differ in lam alone."""
    if "after" not in diffcse:  # not the main process
        return
    rows = {
        "BERT, first-last average": diffcse["before_first_last"],
        "BERT, [CLS] (before)": diffcse["before"],
        "SimCSE (lam = 0)": simcse["after"],
        "DiffCSE": diffcse["after"],
    }
    test_set = list(diffcse["after"])[-1]  # the sets before it select the step
    print("\nSpearman x 100 on the test pairs")
    print(format_table(rows, [test_set]))
    if (gap := diffcse["h_gap"]) is not None:  # lam is not 0
        reads = "reads h" if gap >= READS else "does not read h yet"
        gap = round(gap, 3) + 0.0  # no -0.000
        print(f"\nThe discriminator {reads}: another sentence's h costs it {gap:.3f} nats a token")

    sentences = [row[0] for row in read_sentences(find_text(cfg.train_file, cfg.data))]
    print(f"\nNearest of the {len(sentences):,} training sentences, before and after")
    hits, dtype = [], "bf16" if diffcse["precision"] == "bfloat16" else "fp32"  # as in training
    for folder in (cfg.model, diffcse["folder"]):
        model = DiffCSE(folder, dtype=dtype)
        model.build_index(sentences)
        hits.append(model.search(list(QUERIES), threshold=-1, top_k=TOP_K))
    for query, before, after in zip(QUERIES, *hits):
        print(f"\n{query}")
        for label, found in (("before", before), ("after", after)):
            for sentence, cosine in found:
                print(f"  {label:<7}{cosine:.2f}  {textwrap.shorten(sentence, 84)}")
