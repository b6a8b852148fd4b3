"""lab/ablations.py: losses, metrics and gradients beside a second implementation; insertions and
deletions beside difflib; two processes; flags; the command."""

import difflib
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT, Words, one_line, read_log

import bert
import diffcse
from data import Batch
from engine import cli, distributed, pretrained
from engine.errors import UserError
from engine.run import Run
from lab import ablations
from lab.ablations import AblationConfig, AblationModel, delete, insert

# ------------------------------------------------------------------------------------------------
# The whole step, written a second time in plain loops


def info_nce(queries, keys, negatives, temperature: float):
    """The mean over queries of -log softmax of their own key, among all keys and negatives."""
    loss = 0.0
    for i, query in enumerate(queries):
        cosines = [F.cosine_similarity(query, key, dim=0) for key in (*keys, *negatives)]
        loss = loss - (torch.stack(cosines) / temperature).log_softmax(0)[i]
    return loss / len(queries)


def reference_step(model: AblationModel, batch: Batch):
    """The loss and the metrics, from the paper and the docstrings."""
    cfg, texts = model.cfg, 1 if model.cfg.condition_on == "same" else 2
    h = model.projector(model.encoder(batch.x[::texts], batch.mask[::texts])[:, 0])
    firsts, seconds = h[::2], h[1::2]
    every = 2 if cfg.views == "first" or cfg.edit_as != "difference" else 1
    losses, metrics = [], []
    for edit in ["replace", "insert", "delete"] if cfg.edit_with == "all" else [cfg.edit_with]:
        for text in {"same": [0], "next": [1], "both": [0, 1]}[cfg.condition_on]:
            part = Batch(*(t[text :: texts * every] for t in batch.tensors()), views=1)
            if cfg.edit_as == "difference":
                loss, counts = reference_prediction(model, part, h[::every], edit)
            else:
                loss, counts = reference_contrast(model, part, firsts, seconds, edit)
            losses.append(loss)
            metrics.append(counts | {"difference": (loss, 1)})
    contrastive = info_nce(firsts, seconds, [], cfg.temperature)
    loss = cfg.contrastive * contrastive + cfg.lam * sum(losses) / len(losses)
    sums = {name: [sum(m[name][i] for m in metrics) for i in (0, 1)] for name in metrics[0]}
    return loss, sums | {"contrastive": (contrastive, 1), "loss": (loss, 1)}


def reference_prediction(model: AblationModel, batch: Batch, h, edit: str):
    cfg, selected, metrics = model.cfg, batch.selected.nonzero().tolist(), {}
    masked = cfg.objective == "masked"
    x_edited, changed, mask = batch.x_masked, None, batch.mask
    if not masked:
        x_edited, changed, mask = getattr(ablations, edit)(model, batch)
    states, loss = model.discriminator(x_edited, mask, cls_vector=h), 0.0
    if not masked:
        logits = (model.head if edit == "replace" else model.heads[edit])(states)
        counted = torch.ones_like(mask) if cfg.pads_in_loss else mask
        loss = F.cross_entropy(logits[counted], changed[counted].long(), reduction=cfg.reduction)
        metrics["share_replaced"] = (changed.sum(), mask.sum())
    if cfg.objective == "replaced":
        return loss, metrics
    correct = 0
    for r, t in selected:
        p = model.mlm_head(states[r, t], model.discriminator.embeddings.word.weight).softmax(0)
        target = batch.x[r, t]
        correct += p.argmax() == target
        p = p[target]
        if not masked:  # a copy of an original token, or a drawn token
            original, replaced = logits[r, t].detach().softmax(0)
            p = original * (x_edited[r, t] == target) + replaced * p
        loss = loss - p.log() / len(selected)
    return loss, metrics | {"accuracy_masked": (correct, len(selected))}


def reference_contrast(model: AblationModel, batch: Batch, firsts, seconds, edit: str):
    x_edited, _, mask = getattr(ablations, edit)(model, batch)
    edits, tau = model.projector(model.encoder(x_edited, mask)[:, 0]), model.cfg.temperature
    own, others = (F.cosine_similarity(firsts, keys) for keys in (edits, seconds))
    if model.cfg.edit_as == "negative":
        loss = info_nce(firsts, seconds, edits, tau) - info_nce(firsts, seconds, [], tau)
        return loss, {"share_nearer": ((own > others).sum(), len(own))}
    cosines = [[F.cosine_similarity(first, key, dim=0) for key in edits] for first in firsts]
    correct = sum(max(row) == row[i] for i, row in enumerate(cosines))
    return info_nce(firsts, edits, [], tau), {"accuracy_edits": (correct, len(own))}


PAPER = {"edit_scope": "masked", "pads_in_loss": False, "views": "first"}
CASES = [
    {},
    {"objective": "masked"},
    {"objective": "masked", "views": "first", "condition_on": "next"},
    {"objective": "masked", "condition_on": "both"},
    {"objective": "corrected"},
    {"objective": "corrected", **PAPER},
    {"objective": "corrected", **PAPER, "condition_on": "both", "contrastive": False},
    {"edit_as": "positive"},
    {"edit_as": "positive", "projector": "tanh", **PAPER},
    {"edit_as": "positive", "condition_on": "next", "contrastive": False},
    {"edit_as": "negative", "views": "first"},
    {"edit_as": "negative", "condition_on": "both", "contrastive": False},
    {"condition_on": "next", "reduction": "sum"},
    {"condition_on": "both", **PAPER},
    {"edit_with": "insert"},
    {"edit_with": "insert", "edit_as": "negative", "projector": "tanh"},
    {"edit_with": "delete", "pads_in_loss": False},
    {"edit_with": "delete", "edit_as": "positive", "condition_on": "both"},
    {"edit_with": "all", "condition_on": "both", "reduction": "sum"},
    {"edit_with": "all", **PAPER},
    {"edit_with": "all", "edit_as": "negative"},
]


def name_of(changes: dict) -> str:
    return ",".join(map(str, changes.values()))


def tiny_model(**changes) -> AblationModel:
    """Random weights in float64, without dropout."""
    torch.manual_seed(0)
    settings = {"lam": 0.5, "temperature": 0.3, "mask_ratio": 0.4, "generator_dropout": False}
    cfg = AblationConfig(**settings | {"text": "paragraphs"} | changes)
    sizes = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(max_position_embeddings=24, initializer_range=0.3, num_hidden_layers=2)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    generator, mlm = (bert.BertForMaskedLM(bert.BertConfig(**sizes)) for _ in "gd")
    for model in (generator, mlm):
        model.head.bias.data[6:16] += 4.0  # words of nasty_batch: some predictions are correct
    parts = [Words, bert.Bert(generator.cfg), generator]
    parts.append(mlm.bert if cfg.edit_as == "difference" else None)
    mlm_head = mlm.head if cfg.objective != "replaced" else None
    return AblationModel(cfg, *parts, mlm_head=mlm_head).double().train()


def nasty_batch(rows: int, views: int) -> Batch:
    """Rows of many lengths, also [CLS] [SEP] alone, with padding and repeated words."""
    lengths = torch.tensor([9, 4, 7, 2, 9, 5, 2, 8, 3, 3, 6, 2]).repeat(2)[:rows]
    mask = torch.arange(9) < lengths[:, None]
    x = torch.randint(6, 16, mask.shape).masked_fill(~mask, Words.pad_id)
    x[:, 0], x[torch.arange(rows), lengths - 1] = Words.cls_id, Words.sep_id
    selected = (torch.rand(x.shape) < 0.4) & (x > 5)
    x_masked = torch.where(selected & (torch.rand(x.shape) < 0.8), Words.mask_id, x)
    return Batch(x, mask, x_masked, selected, views)


def batch_for(model: AblationModel, sentences: int) -> Batch:
    """One of the sentences has equal views: its edit is not nearer than its second view."""
    views = 2 if model.cfg.condition_on == "same" else 4
    batch = nasty_batch(sentences * views, views)
    for tensor in batch.tensors():
        tensor[views // 2] = tensor[0]
    return batch


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no masks"])
@pytest.mark.parametrize("changes", CASES, ids=name_of)
def test_step_equals_a_second_implementation(changes, masks):
    model = tiny_model(**changes)
    batch = batch_for(model, 3)
    if not masks:
        batch = Batch(batch.x, batch.mask, batch.x, torch.zeros_like(batch.mask), batch.views)
    torch.manual_seed(5)
    expected, sums = reference_step(model, batch)
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("generator.")}
    grads = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    for wide in (batch, batch.pad(20, Words.pad_id)):  # on a GPU, batches are padded
        model.zero_grad()
        torch.manual_seed(5)
        loss, metrics = model(wide)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        for name, pair in sums.items():
            for got, want in zip(metrics[name], pair, strict=True):
                got, want = torch.as_tensor(got).item(), torch.as_tensor(want).item()
                assert got == pytest.approx(want, rel=1e-9), name
        for (name, parameter), want in zip(trained.items(), grads):
            got, want = (torch.zeros(1) if g is None else g for g in (parameter.grad, want))
            assert (got - want).norm() <= 1e-9 * want.norm() + 1e-12, name
        assert all(p.grad is None for p in model.generator.parameters())


@pytest.mark.parametrize("projector", ["batchnorm", "tanh"])
@pytest.mark.parametrize("use", ["positive", "negative"])
def test_a_batch_of_one_sentence_has_a_finite_loss(use, projector):
    model = tiny_model(edit_as=use, projector=projector)
    loss, metrics = model(batch_for(model, 1))
    loss.backward()
    assert all(torch.as_tensor(value).isfinite() for value, _ in metrics.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert use == "negative" or metrics["difference"][0] == 0


# ------------------------------------------------------------------------------------------------
# Insertion and deletion, beside an alignment that does not know the random numbers


def difflib_changes(a: list[int], b: list[int], edit: str) -> list[bool]:
    changed = [False] * len(b)
    for kind, _, _, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        assert kind in ("equal", edit)
        if kind == "insert":
            changed[b1:b2] = [True] * (b2 - b1)
        elif kind == "delete":
            changed[b1] = True  # the token that follows
    return changed


def random_batch() -> Batch:
    """[CLS], distinct words, [SEP], padding; two columns are padding in all rows."""
    lengths = torch.cat([torch.tensor([2, 3]), torch.randint(2, 41, (23,))])
    mask = torch.arange(int(lengths.max()) + 2) < lengths[:, None]
    x = torch.stack([6 + torch.randperm(54)[: mask.shape[1]] for _ in lengths])
    x[:, 0], x[torch.arange(len(x)), lengths - 1] = Words.cls_id, Words.sep_id
    x = x.masked_fill(~mask, Words.pad_id)
    return Batch(x, mask, x, mask)


@pytest.mark.parametrize("choice, temperature", [("argmax", None), ("sample", 0.7)])
@pytest.mark.parametrize("edit", [insert, delete], ids=lambda edit: edit.__name__)
def test_changed_tokens_are_those_that_difflib_finds(edit, choice, temperature):
    def predict_tokens(ids, mask, positions, given):
        assert torch.equal(positions, ids == Words.mask_id) and given == temperature
        assert torch.equal(mask, ids != 0)
        new_words = torch.randint(60, 99, ids.shape)  # in no sentence: the alignment is unique
        return torch.where(positions, new_words, ids)

    torch.manual_seed(1)
    generator = SimpleNamespace(predict_tokens=predict_tokens)
    changes, first, last = 0, 0, 0
    for ratio in [0.0, 0.9, *torch.rand(38).mul(0.9).tolist()]:
        cfg = AblationConfig(mask_ratio=ratio, edit=choice, edit_temperature=0.7)
        model = SimpleNamespace(cfg=cfg, tokenizer=Words, generator=generator)
        batch = random_batch()
        before = batch.x.clone()
        x_edited, changed, mask = edit(model, batch)
        assert torch.equal(batch.x, before) and x_edited.shape == changed.shape == mask.shape
        assert changed.dtype == mask.dtype == torch.bool and x_edited.dtype == torch.int64
        assert not (x_edited[~mask].any() or changed[~mask].any())  # padding: id 0, not changed
        for row, original in enumerate(before):
            n = int(mask[row].sum())
            a, b = original[batch.mask[row]].tolist(), x_edited[row, :n].tolist()
            assert mask[row, :n].all() and (b[0], b[-1]) == (Words.cls_id, Words.sep_id)
            exact = ratio * (len(a) - 2)
            assert math.floor(exact) <= abs(n - len(a)) <= math.ceil(exact)
            assert changed[row, :n].tolist() == difflib_changes(a, b, edit.__name__)
            changes += n != len(a)
            first += int(changed[row, 1])
            last += int(changed[row, n - 2 if edit is insert else n - 1])
    assert changes > 700 and first > 100 and last > 100


def test_all_subsets_of_the_candidates_are_equally_likely():
    torch.manual_seed(2)
    n = 60_000
    candidates = torch.tensor([0, 1, 0, 1, 1, 1, 0]).bool().expand(n, -1)
    for count, subsets in ((0, 1), (1, 4), (2, 6), (4, 1)):
        drawn = ablations.random_subset(candidates, torch.full((n,), count))
        assert not drawn[~candidates].any() and (drawn.sum(1) == count).all()
        _, often = drawn.unique(dim=0, return_counts=True)
        assert len(often) == subsets and (often / n - 1 / subsets).abs().max() < 0.01
    counts = torch.arange(n) % 5
    assert torch.equal(ablations.random_subset(candidates, counts).sum(1), counts)


def test_random_counts_are_the_next_integers_with_an_exact_mean(monkeypatch):
    torch.manual_seed(3)
    lengths = torch.arange(40).repeat(500)
    for ratio in (0.0, 0.15, 0.3, 0.5, 0.9):
        error = ablations.random_count(lengths, ratio) - ratio * lengths.double()
        assert (error.abs() < 1).all() and abs(float(error.mean())) < 5 * 0.5 / len(lengths) ** 0.5
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.full(shape, 1 - 2**-24))
    lengths = torch.arange(2000)  # the largest draw never gives more than the ceiling
    for ratio in torch.linspace(0, 1, 41).tolist():
        ceiling = [math.ceil(ratio * n) for n in lengths.tolist()]
        assert ablations.random_count(lengths, ratio).tolist() == ceiling


# ------------------------------------------------------------------------------------------------
# Two processes. Each draws its own insertions and deletions, so replacements alone are compared.

SHARED = [changes for changes in CASES if "edit_with" not in changes]


def results_of(process: int, processes: int, folder: str) -> None:
    """Metrics and averaged gradients, of 4 sentences, and of 2 of which one has no masks."""
    torch.set_num_threads(1)
    if processes > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=process, world_size=processes)
    results = {}
    for changes in SHARED:
        model = tiny_model(**changes)
        for B in (4, 2):
            batch = batch_for(model, B)
            if B == 2:
                batch.selected[: batch.views] = False
            model.zero_grad()
            loss, metrics = model(batch.shard())
            loss.backward()
            trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
            distributed.average_gradients(list(trained.values()))
            tensors = {name: p.grad.clone() for name, p in trained.items()}
            for name, pair in metrics.items():
                total, count = (distributed.all_reduce_sum(torch.as_tensor(v)) for v in pair)
                tensors[name] = total / count.clamp_min(1)
            results[name_of(changes), B] = tensors
    if processes > 1:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{processes}-{process}.pt")


def test_two_processes_compute_what_one_computes(tmp_path):
    results_of(0, 1, str(tmp_path))
    method = "fork" if sys.platform == "linux" else "spawn"
    mp.start_processes(results_of, (2, str(tmp_path)), nprocs=2, start_method=method)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for key, expected in one.items():
        assert any(name.startswith("encoder") for name in expected)
        for result in two:
            assert result[key].keys() == expected.keys()
            for name, want in expected.items():
                error = (result[key][name] - want).norm()
                assert error <= 1e-9 * want.norm() + 1e-12, (key, name)


# ------------------------------------------------------------------------------------------------
# Flags

SMALL_BERT = str(ROOT / "assets" / "small-bert")
SMALL = ["--config", "small", "--model", SMALL_BERT, "--generator", SMALL_BERT]


def parse(*flags: str) -> AblationConfig:
    return cli.parse(AblationConfig, diffcse.PRESETS, [*SMALL, *flags])[1]


def built(*flags: str) -> AblationModel:
    torch.manual_seed(7)
    return AblationModel.from_pretrained(parse(*flags))


def real_batch(model: AblationModel) -> Batch:
    x = torch.randint(1000, 2000, (8, 9))
    x[:, 0], x[:, -1] = model.tokenizer.cls_id, model.tokenizer.sep_id
    selected = torch.zeros_like(x).bool()
    selected[:, 2:5] = True
    x_masked = x.masked_fill(selected, model.tokenizer.mask_id)
    views = 2 if model.cfg.condition_on == "same" else 4
    return Batch(x, torch.ones_like(selected), x_masked, selected, views)


@pytest.mark.parametrize(
    "flags, expected, loaded",  # loaded: of each model that is read, whether with an MLM head
    [
        ("", "generator discriminator head", [0, 0, 1]),
        ("--no-contrastive", "generator discriminator head", [0, 0, 1]),
        ("--lam 0", "", [0]),
        ("--objective masked", "discriminator mlm_head", [0, 1]),
        ("--objective corrected", "generator discriminator head mlm_head", [0, 1, 1]),
        ("--edit-with insert", "generator discriminator insert", [0, 1, 0]),
        ("--edit-with delete", "discriminator delete", [0, 0]),
        ("--edit-with all", "generator discriminator head insert delete", [0, 1, 0]),
        ("--edit-as positive", "generator", [0, 1]),
        ("--edit-as positive --edit-with delete", "", [0]),
        ("--edit-as negative --edit-with all", "generator", [0, 1]),
        ("--text paragraphs --condition-on next", "generator discriminator head", [0, 1, 0]),
    ],
)
def test_flags_load_the_models_that_they_need_and_train_them(flags, expected, loaded, monkeypatch):
    read, load, flags, expected = [], bert.load_bert, flags.split(), set(expected.split())
    new_layers = built().state_dict()

    def load_bert(folder, mlm=False, dropout=None):
        read.append(mlm)
        return load(folder, mlm, dropout)

    for module in (diffcse, pretrained, ablations):
        monkeypatch.setattr(module, "load_bert", load_bert)
    unused = [] if "generator" in expected else ["--generator", "./nowhere"]
    model = built(*flags, "--dropout", "0.3", *unused)
    names = ("generator", "discriminator", "head", "mlm_head")
    parts = {name for name in names if getattr(model, name, None)} | {*getattr(model, "heads", [])}
    assert parts == expected and read == loaded
    state = model.state_dict()  # new layers start alike for a seed, so that ablations compare
    alike = [name for name in state if name.startswith(("projector.", "head."))]
    assert all(torch.equal(new_layers[name], state[name]) for name in alike)
    if model.mlm_head:
        weights = load(SMALL_BERT, mlm=True).head.state_dict()
        assert all(torch.equal(state[f"mlm_head.{n}"], w) for n, w in weights.items())
    encoders = [each for each in (model.encoder, model.discriminator) if each]
    assert {each.cfg.hidden_dropout_prob for each in encoders} == {0.3}
    loss, metrics = model.train()(real_batch(model))
    loss.backward()
    assert loss.isfinite() and ("difference" in metrics) == ("--lam" not in flags)
    grads = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0]
    trained = {name.removeprefix("heads.").partition(".")[0] for name in grads}
    assert trained == {"encoder", "projector"} | expected - {"generator"}
    assert model.cfg.is_ablation == (flags not in ([], ["--no-contrastive"], ["--lam", "0"]))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--condition-on next", "--condition-on next needs --text paragraphs"),
        ("--objective masked --edit-with insert", "--objective masked excludes --edit-with"),
        ("--objective corrected --edit-as negative", "--objective corrected excludes"),
        ("--no-contrastive --lam 0", "--contrastive is False"),
        ("--edit-with insert --lam 0", "--lam is 0; an ablation's lam must be larger"),
        ("--objective words", "replaced, masked, corrected"),
        ("--edit-wiht all", "did you mean --edit-with"),
        ("--edit-as negative --generator ./nowhere", "nowhere"),
        ("--max-length 120 --edit-with insert", "is 120, with inserted tokens 156, but"),  # + 35.4
        ("--max-length 120 --edit-with all", "has 128 positions"),
        ("--max-length 101 --mask-ratio 0.28 --edit-with insert", "tokens 129"),  # + 27.7
    ],
)
def test_flags_that_exclude_each_other_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        built(*flags.split())
    assert message in one_line(error)


def test_the_longest_sentence_with_insertions_is_as_long_as_allowed():
    model = built("--max-length", "100", "--edit-with", "insert", "--mask-ratio", "0.28")
    x, mask = torch.full((16, 100), 1000), torch.ones(16, 100, dtype=torch.bool)
    x_edited, changed, _ = insert(model, Batch(x, mask, x, mask))
    assert x_edited.shape[1] == 128 and set(changed.sum(1).tolist()) == {27, 28}  # of 27.4
    built("--max-length", "128", "--edit-with", "delete")


# ------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    lines = [f"The {a} man plays {b}." for a in ("old", "young") for b in ("chess", "piano", "go")]
    (folder / "text.txt").write_text("\n".join(lines))
    pairs = ["a\tb\tscore", "the cat\tthe dog\t3", "red\tblue\t1", "one two\tone two three\t5"]
    (folder / "pairs.tsv").write_text("\n".join(pairs))
    paths = ["--train-file", str(folder / "text.txt"), "--score", str(folder / "pairs.tsv")]
    return [*paths, "--steps", "4", "--batch-size", "4", "--log-every", "1"]


def test_the_command_with_default_flags_computes_what_diffcse_computes(files, tmp_path):
    command = [sys.executable, "-m", "lab.ablations", *SMALL, *files, "--out-dir"]
    done = subprocess.run([*command, tmp_path / "lab"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = [*SMALL, *files, "--out-dir", str(tmp_path / "core")]
    diffcse.train(cli.parse(diffcse.Config, diffcse.PRESETS, arguments)[1])
    assert read_log(tmp_path / "lab") == read_log(tmp_path / "core")


@pytest.mark.parametrize("whose, views, columns", [("same", 2, 1), ("next", 4, 2), ("both", 4, 2)])
def test_paragraphs_are_read_with_the_next_sentences_where_they_are_needed(
    whose, views, columns, files
):
    sentences = built("--text", "paragraphs", "--condition-on", whose, *files).load_sentences()
    assert (len(sentences), sentences.views, sentences.columns) == (5, views, columns)


def test_a_stopped_ablation_resumes_to_the_same_end(files, tmp_path, monkeypatch):
    """Running text with next sentences, and random edits."""
    flags = [*files, "--text", "paragraphs", "--condition-on", "both", "--edit-with", "all"]
    diffcse.train(parse(*flags, "--out-dir", str(tmp_path / "whole")), "run", AblationModel)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda run: run.step == 2)
        with pytest.raises(SystemExit):
            diffcse.train(parse(*flags, "--out-dir", str(tmp_path / "cut")), "run", AblationModel)
    resume = ["--resume", str(tmp_path / "cut")]
    with pytest.raises(UserError, match="python -m lab.ablations --resume"):
        cli.parse(diffcse.Config, diffcse.PRESETS, resume)
    cfg = cli.parse(AblationConfig, diffcse.PRESETS, resume)[1]
    diffcse.train(cfg, "run", AblationModel)
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")
