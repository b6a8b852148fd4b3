"""lab/explain.py: its numbers are those of the training step, whatever the sentence."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diffcse
from bert import load_bert
from data import Batch, Tokenizer, mask_tokens
from diffcse import PRESETS, Config, DiffCSEModel, derive_seed
from engine import cli, fast
from engine.checkpoint import load_state, load_state_dict
from engine.errors import UserError
from engine.run import Run
from engine.tokens import TokenizedSentences
from lab import explain

DEMO = PRESETS["demo"]
PLAIN = "The cat sat on the mat ."
LONG = "one two three four five six seven eight nine ten red green blue black white king queen"
LONG = LONG.replace(" ", " and ")


def expected(cfg: Config, sentence: str) -> tuple[list[str], list[list[list[str]]]]:
    """Phrases and tables' cells of the text, by DiffCSEModel.forward as train calls it."""
    torch.manual_seed(cfg.seed)
    model, step, h, edits, logits = DiffCSEModel.from_pretrained(cfg), 0, [], [], []
    if cfg.resume:
        tensors, state = load_state(Path(cfg.resume))
        load_state_dict(tensors, model, diffcse.make_optimizer(model))
        step = state["step"]
    texts = list(dict.fromkeys([sentence, *explain.OTHERS]))
    sentences = TokenizedSentences([(text,) for text in texts], model.tokenizer, cfg.max_length)
    x, mask = sentences.rows(np.arange(len(texts)))
    rng = torch.Generator().manual_seed(derive_seed(cfg.seed, step, 0))
    x_masked, selected = mask_tokens(x, model.tokenizer, cfg.mask_ratio, cfg.masking, rng)
    model.train().projector.register_forward_hook(lambda m, args, out: h.append(out))
    if cfg.lam:
        record = lambda m, args: edits.append((torch.get_rng_state(), args))  # noqa: E731
        model.discriminator.register_forward_pre_hook(record)
        model.head.register_forward_hook(lambda m, args, out: logits.append(out[0]))

    def forward(batch):
        metrics = model(batch)[1]
        if cfg.lam:  # without h, and with the same dropout
            torch.set_rng_state(edits[0][0])
            model.head(model.discriminator(*edits[0][1]))
        return {name: total / count for name, (total, count) in metrics.items()}

    torch.manual_seed(derive_seed(cfg.seed, step, 1))
    metrics = fast.accelerate(forward, model, cfg.fast)(Batch(x, mask, x_masked, selected))
    cosines = F.cosine_similarity(h[0][:1], h[0][1::2])
    softmax = (cosines / cfg.temperature).softmax(0)
    phrases = [f"contrastive loss: {metrics['contrastive']:.4f} "]
    phrases += [f"its own is {-softmax[0].log():.4f}.", f"Its {mask[0].sum()} tokens: [CLS] "]
    rows = [[f"{c:.3f}", f"{c / cfg.temperature:.2f}"] for c in cosines]
    texts[0] += "   <- its own"
    rows = [[*row, f"{100 * p:.2f} %", text[:30]] for row, p, text in zip(rows, softmax, texts)]
    if cfg.lam == 0:
        return [*phrases, "this is the whole loss: SimCSE."], [rows]
    phrases += [f"all edited sentences: {metrics['difference']:.4f} (without h "]
    phrases += [f" = {metrics['loss']:.4f}"]
    x_edited, table = edits[0][1][0], []
    word = model.tokenizer.backend.id_to_token
    for t in range(int(mask[0].sum())):
        replaced = int(x_edited[0, t] != x[0, t])
        cells = [str(t), word(x[0, t]), word(x_masked[0, t]) + " *" * selected[0, t]]
        cells += [word(x_edited[0, t]) if t else "h", ("original", "replaced")[replaced]]
        cells += [f"{100 * each[t].softmax(0)[1]:.1f} %" for each in logits]
        table.append([*cells, f"{-logits[0][t].log_softmax(0)[replaced]:.3f}"])
    return phrases, [rows, table]


def check(cfg: Config, sentence: str, text: str) -> None:
    phrases, tables = expected(cfg, sentence)
    said = " ".join(text.split())
    assert [phrase for phrase in phrases if phrase not in said] == []
    parts = [part.splitlines()[2:] for part in text.split("\n\n") if part.startswith("|")]
    told = [[[c.strip()[:30] for c in row[1:-1].split(" | ")] for row in part] for part in parts]
    assert told == tables
    assert ("second view has" in text) == (cfg.lam > 0 and cfg.views == "both")
    assert ("Cut off" in text) == (sentence is LONG and cfg.max_length == 32)


PAPER = dict(edit="sample", edit_scope="masked", masking="all", generator_dropout=False)
PAPER |= dict(pads_in_loss=False, views="first", protect_sep=True)


@pytest.mark.parametrize(
    "sentence, changes, phrase",
    [
        (PLAIN, {}, "The second view has its own mask and edit: h "),
        ("THE KING OF FRANCE", {}, "THE KING OF FRANCE Its 6 tokens: [CLS] the king of france"),
        (LONG, {}, "Cut off by --max-length 32: king and queen"),
        (
            "Snow ☃ falls on 東 Zürich 🦊 .",
            {},
            "[UNK] stands for ☃, 東, 🦊: not in the vocabulary.",
        ),
        ("x", {}, "The discriminator's last layer is new"),
        (explain.OTHERS[0], {}, "7 sentences with 2 views"),
        (PLAIN, PAPER, "predicts the masked tokens of x'; its sampled tokens make x''"),
        (PLAIN, {"reduction": "sum"}, "The sum of the loss over all positions"),
        (PLAIN, {"fast": False}, "8 sentences with 2 views"),
        ("Snow ☃ falls", {"lam": 0.0}, "[UNK] stands for ☃: not in the vocabulary."),
        (PLAIN, {"lam": 0.3, "contrastive": False}, "= 0.0000 + 0.3 * "),
        (LONG, {"seed": 7, "projector": "tanh", "max_length": 64}, "Step 1, seed 7"),
    ],
)
def test_numbers_are_those_of_the_step(sentence, changes, phrase):
    cfg = replace(DEMO, **changes)
    text = explain.explain(cfg, sentence)
    check(cfg, sentence, text)
    assert phrase in " ".join(text.split()) and max(map(len, text.splitlines())) <= 100


def test_the_command(command):
    done = command(explain.main, "--config", "demo", *PLAIN.split(), "--seed", 1)
    expected = explain.explain(replace(DEMO, seed=1), PLAIN) + "\n"
    assert done == (0, expected, "") and expected != explain.explain(DEMO, PLAIN) + "\n"
    for words, message in (([], "required: SENTENCE"), (["  "], "the sentence is empty")):
        done = command(explain.main, "--config", "demo", *words)
        assert (done.code, done.out) == (2, "") and message in done.err


def test_the_next_step_of_a_stopped_run(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "stop_requested", lambda run: run.step == 3)
    with pytest.raises(SystemExit):
        train_tiny()
    out = tmp_path / "out"
    _, cfg = cli.parse(Config, PRESETS, ["--resume", str(out)])
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    text = explain.explain(cfg, "the cat sleeps")
    assert text.startswith(f"Step 4 of the run in {out}") and "is new" not in text
    check(cfg, "the cat sleeps", text)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    (out / "state.safetensors").unlink()
    with pytest.raises(UserError, match="no saved step. A finished run keeps its encoder only"):
        explain.explain(cfg, "the cat sleeps")


# ------------------------------------------------------------------------------------------------
# What the notebook draws


def test_attention_to_first_is_transformers():
    """With the embedding of [CLS] in place of itself. Rows of different lengths."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    folder = Path(explain.__file__).parents[1] / "assets" / "small-bert"
    bert, tokenizer = load_bert(folder).eval(), Tokenizer(folder)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    rows = tokenizer([PLAIN, LONG, "x"], 32)
    mask = torch.zeros(3, max(map(len, rows)), dtype=torch.bool)
    ids = torch.zeros_like(mask, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    with torch.no_grad():
        attentions = theirs(ids, mask.long(), output_attentions=True).attentions
        cls = bert.embeddings(ids)[:, 0]
        found = explain.attention_to_first(bert.train(), ids, mask, cls)  # without dropout
    assert bert.training
    expected = torch.stack(attentions)[..., 0].mean(2)  # (L, R, T)
    assert found.shape == (4, *ids.shape)
    assert torch.allclose(found[:, mask], expected[:, mask], atol=1e-5)


@pytest.mark.parametrize("sentence", [PLAIN, "cat", "東京 は 雨", LONG * 3])
def test_edit_as_tokens(sentence):
    """Each line has the row's tokens; marks follow from the labels and the probabilities."""
    model, _ = explain.load_model(DEMO)
    texts, batch = explain.make_batch(model, sentence)
    assert texts[0] == " ".join(sentence.split()) and batch.x.shape[0] == 2 * len(texts)
    x_edited, replaced = diffcse.edit_sentences(model.generator, batch, model.tokenizer, DEMO)
    p = torch.rand(x_edited.shape)
    lines = explain.edit_as_tokens(model.tokenizer, batch, x_edited, replaced, p)
    T = int(batch.mask[0].sum())
    assert list(lines) == ["x", "x'", "x''"] and {len(tokens) for tokens in lines.values()} == {T}
    assert T <= 32
    for tokens, ids in zip(lines.values(), (batch.x, batch.x_masked, x_edited)):
        words = [explain.token(model.tokenizer, int(i)) for i in ids[0, :T]]
        assert [text for text, *_ in tokens][1:] == words[1:]
    assert [tokens[0][0] for tokens in lines.values()] == ["[CLS]", "[CLS]", "h"]
    assert [shade for _, shade, _ in lines["x'"]] == batch.selected[0, :T].float().tolist()
    assert [shade for _, shade, _ in lines["x''"]] == p[0, :T].tolist()
    for (_, q, mark), label in zip(lines["x''"], replaced[0, :T].tolist()):
        assert mark == {(1, 1): "found", (1, 0): "missed", (0, 1): "false alarm"}.get(
            (int(label), int(q > 0.5)), ""
        )


@pytest.mark.parametrize("sentence", ["", "  \n "])
def test_an_empty_sentence_is_refused(sentence):
    model, _ = explain.load_model(DEMO)
    with pytest.raises(UserError, match="the sentence is empty"):
        explain.make_batch(model, sentence)
