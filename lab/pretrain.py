"""A small BERT from raw text: vocabulary, masked language model, and a folder that transformers loads.

    python -m lab.pretrain --text simplewiki.txt.xz enwiki.txt.xz --minutes 140 --out runs/my-bert
    python -m lab.pretrain --text simplewiki.txt.xz enwiki.txt.xz --score runs/my-bert assets/small-bert
    python -m lab.pretrain --text enwiki.txt.xz --start assets/small-bert --layers 2 --hidden 64 --minutes 5 --out runs/weak     # a generator

In the order of this file: documents -> a WordPiece vocabulary -> sentences as integers -> a start for the word
embeddings -> two losses -> training, for as long as was asked for. What is unusual here is what the small budget and the
purpose ask for (what was tried side by side is in results/pretrain/trials.jsonl):
    Rows are one sentence or a few, of many lengths: sentences are what the encoder is for.
    [CLS] has a loss of its own: it must tell the words of its sentence, the rare ones above all. It counts little while
        the language is learned and much afterwards. So [CLS] holds what the sentence is about.
    Word embeddings start as the truncated SVD of the corpus' positive pointwise mutual information (Levy and
        Goldberg 2014), the output bias as log frequency: what counting can tell need not be learned.
    Whole words are masked: a piece that stands beside the rest of its word is no task.
    No dropout, no next-sentence loss, and the vocabulary's matrix at masked positions only.

Text: UTF-8, a paragraph or a sentence a line, an empty line between documents; .gz and .xz too.
The rate follows the clock, so two runs of a command differ: what is fixed by the seed is the data and its order.
Not here: several GPUs, gradient accumulation, languages without spaces between words.
"""

import argparse
import itertools
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from bert import BertConfig, BertForMaskedLM, UserError, load_bert, load_config, save_bert, write_atomically
from data import TokenizedSentences, Tokenizer, find_model, mask_tokens, read_lines, run_main, split_sentences

HELD_OUT = 1000  # paragraphs, in whole documents, that are only ever scored
MAX_LENGTH = 64  # tokens of a sentence, [CLS] and [SEP] included; 98 of 100 are shorter
BATCH_TOKENS = 4096  # real tokens in a step
RATE, WARM_UP = 1.5e-3, 0.06  # peak learning rate; share of the time in which it rises, before it falls to 0
MASK_RATIO = 0.20
LANGUAGE = 0.7  # share of the time in which masked words come first; then the sentence does
BAG_WEIGHT = (0.1, 4.0)  # of the loss that [CLS] alone answers for: in that time, and after it, when it falls to 0
RARE = 3e-4  # a word this frequent counts half as much in that loss as a very rare one
WINDOW = 5  # words to each side that count as seen together

# ----------------------------------------------------------------------------------------------------------------
# Text -> documents -> vocabulary -> sentences


def read_documents(paths: list[str]) -> list[list[str]]:
    """Every document of the files as a list of its paragraphs. Raises: UserError where there is no text at all.

    Empty lines part documents; in a file without any, such as a list of sentences, every line is one.
    """
    documents = []
    for path in paths:
        lines = [line.strip() for line in read_lines(Path(path))]
        parts = ([line] for line in lines) if all(lines) else (list(group) for full, group in itertools.groupby(lines, bool) if full)
        documents += parts
    if not documents:
        raise UserError(f"{', '.join(paths)}: no text in it")
    return documents


def hold_out(documents: list[list[str]], seed: int) -> tuple[list[list[str]], list[str]]:
    """Documents to train on, and HELD_OUT paragraphs of others (a tenth where there are few). Raises: UserError if there is one."""
    wanted = min(HELD_OUT, math.ceil(sum(map(len, documents)) / 10))
    order = np.random.default_rng([seed, 0]).permutation(len(documents))
    first = int(np.searchsorted(np.cumsum([len(documents[i]) for i in order]), wanted)) + 1  # documents are held out whole
    held_out = [paragraph for i in order[:first] for paragraph in documents[i]]
    if first == len(documents):
        raise UserError(f"the text is {first} documents, {len(held_out)} lines, and some must be kept out of training: more are needed, "
                        "with an empty line between them")  # fmt: skip
    return [documents[i] for i in order[first:]], held_out[:wanted]


def train_vocabulary(documents: list[list[str]], size: int, folder: Path) -> Tokenizer:
    """A lower-cased WordPiece vocabulary of exactly `size`, written where transformers looks for it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    wordpiece = tokenizers.BertWordPieceTokenizer(lowercase=True)
    wordpiece.train_from_iterator((p for d in documents for p in d), vocab_size=size, min_frequency=2, limit_alphabet=min(400, size // 4),
                                  special_tokens=special, show_progress=sys.stderr.isatty())  # fmt: skip
    if wordpiece.get_vocab_size() != size:
        raise UserError(f"--vocab is {size}, and the text has only {wordpiece.get_vocab_size()} pieces that occur twice: "
                        f"take more text, or --vocab {wordpiece.get_vocab_size()} or fewer")  # fmt: skip
    backend = wordpiece._tokenizer
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", special.index("[SEP]")), ("[CLS]", special.index("[CLS]")))
    words = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 2 * MAX_LENGTH,
              **{name.strip("[]").lower() + "_token": name for name in special}}  # fmt: skip
    write_atomically(folder / "vocab.txt", "".join(f"{word}\n" for word, _ in words))
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_atomically(folder / "tokenizer.json", backend.to_str(pretty=True))
    return Tokenizer(folder)


def tokenize(documents: list[list[str]], tokenizer: Tokenizer, seed: int) -> TokenizedSentences:
    """Rows of ids: [CLS] one or more sentences that follow each other in a document [SEP].

    A row takes sentences until the next would make it longer than a length drawn for it between a quarter of MAX_LENGTH
    and MAX_LENGTH: long ones teach words by their context, short ones are what the encoder is for.
    """
    in_document = []  # how many sentences each document has

    def every_sentence() -> Iterator[tuple[str]]:
        for document in documents:
            split = [sentence for paragraph in document for sentence in split_sentences(paragraph)]
            in_document.append(len(split))
            yield from ((sentence,) for sentence in split)

    rows = TokenizedSentences(every_sentence(), tokenizer, MAX_LENGTH)
    limits = np.random.default_rng([seed, 3]).integers(MAX_LENGTH // 4, MAX_LENGTH + 1, len(rows)).tolist()
    first_of_document = set(np.cumsum([0, *in_document]).tolist())
    firsts, room = [], 0
    for i, length in enumerate((np.diff(rows.starts) - 2).tolist()):
        if i in first_of_document or length > room:
            firsts.append(i)
            room = limits[len(firsts) - 1] - 2
        room -= length
    keep = np.ones(len(rows.ids), bool)  # all but [SEP] [CLS] between the sentences of one row
    inner = np.setdiff1d(np.arange(len(rows)), firsts)
    keep[rows.starts[inner]] = keep[rows.starts[inner] - 1] = False
    before = np.concatenate([[0], keep.cumsum()])
    rows.ids, rows.starts = rows.ids[keep], before[rows.starts[[*firsts, -1]]]
    rows.views = 1  # a row stands once in a batch
    return rows


def batches(sentences: TokenizedSentences, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of one step after the other, without end: batches of like lengths and about BATCH_TOKENS tokens.

    A random permutation per epoch, cut into pools; a pool is sorted by length and cut into batches, taken in random
    order. So little is padding, and a step still holds sentences from anywhere.
    """
    lengths = np.diff(sentences.starts)
    epoch = 0
    while True:
        random = np.random.default_rng([seed, 1, epoch])
        order = random.permutation(len(sentences))
        for start in range(0, len(order), 16_384):
            pool = order[start : start + 16_384]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            cuts = np.flatnonzero(np.diff(lengths[pool].cumsum() // BATCH_TOKENS)) + 1
            parts = np.split(pool, cuts)
            for i in random.permutation(len(parts)):
                yield parts[i]
        epoch += 1


# ----------------------------------------------------------------------------------------------------------------
# Where the weights start


def positive_pmi(sentences: TokenizedSentences, tokenizer: Tokenizer, max_tokens: int = 20_000_000) -> Tensor:
    """How much more often than chance two words stand within WINDOW of each other in a sentence. Shapes: -> (V, V).

    max(0, log p(a, b) / p(a) p(b)), where a context's p(b) is smoothed by the power 0.75; special tokens are no words.
    Takes 12 V^2 bytes, 0.8 GB for 8,192 words.
    """
    V = tokenizer.vocab_size
    ids = sentences.ids[:max_tokens].astype(np.int64)
    sentence = np.repeat(np.arange(len(sentences)), np.diff(sentences.starts))[:max_tokens]
    word = ~np.isin(ids, tokenizer.special_ids)
    together = np.zeros(V * V, np.float32)
    for distance in range(1, WINDOW + 1):
        left, right = slice(None, -distance), slice(distance, None)
        pairs = (ids[left] * V + ids[right])[(sentence[left] == sentence[right]) & word[left] & word[right]]
        for start in range(0, len(pairs), 4_000_000):
            together += np.bincount(pairs[start : start + 4_000_000], minlength=V * V)
    counts = torch.from_numpy(together).view(V, V)
    counts = counts + counts.T
    p_a = counts.sum(1) / counts.sum()
    p_b = counts.sum(0).pow(0.75) / counts.sum(0).pow(0.75).sum()
    ratio = counts / counts.sum() / (p_a[:, None] * p_b).clamp_min(1e-30)  # where either is 0, so is the count
    return ratio.clamp_(min=1).log_()


def new_model(tokenizer: Tokenizer, sentences: TokenizedSentences, layers: int, hidden: int) -> BertForMaskedLM:
    """Random weights but for the word embeddings and the output bias. Its config has the usual dropout of 0.1, for later."""
    cfg = BertConfig(vocab_size=tokenizer.vocab_size, hidden_size=hidden, num_hidden_layers=layers,
                     num_attention_heads=hidden // 64, intermediate_size=4 * hidden, max_position_embeddings=2 * MAX_LENGTH,
                     pad_token_id=tokenizer.pad)  # fmt: skip
    model = BertForMaskedLM(cfg)
    U, S, _ = torch.svd_lowrank(positive_pmi(sentences, tokenizer), q=min(hidden + 32, tokenizer.vocab_size), niter=4)
    vectors = (U * S.sqrt())[:, :hidden] @ torch.linalg.qr(torch.randn(hidden, hidden))[0]  # no coordinate is stronger than another
    frequency = torch.from_numpy(np.bincount(sentences.ids, minlength=tokenizer.vocab_size) + 1).float()
    with torch.no_grad():
        model.bert.embeddings.word.weight.copy_(0.05 * vectors / vectors.std())
        model.head.bias.copy_((frequency / frequency.sum()).log())
    return model


# ----------------------------------------------------------------------------------------------------------------
# What is learned


def word_weights(sentences: TokenizedSentences, tokenizer: Tokenizer) -> Tensor:
    """What each word counts in the loss of [CLS]: RARE / (RARE + its frequency), and 0 for special tokens. Shapes: -> (V,).

    "The" and its like are many and say nothing of what a sentence is about (Arora et al. 2017, SIF).
    """
    counts = np.bincount(sentences.ids, minlength=tokenizer.vocab_size).astype(np.float64)
    counts[tokenizer.special_ids] = 0
    weights = RARE / (RARE + counts / counts.sum())
    weights[tokenizer.special_ids] = 0
    return torch.from_numpy(weights).float()


def losses(model: BertForMaskedLM, ids: Tensor, masked: Tensor, selected: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Masked-token loss, and the loss of saying from [CLS] alone which words the sentence has.

    A masked word is told from its neighbours, so masked LM gives [CLS] nothing to do. Here the same head, asked at
    position 0, must give every word of the sentence its share, as a paragraph vector does (Le and Mikolov 2014, PV-DBOW).
    Shapes: ids, masked (B, T); selected, mask (B, T) bool; weights (V,) -> (), ().
    """
    states = model.bert(masked, mask)  # (B, T, D)
    words = model.bert.embeddings.word.weight  # (V, D)
    mlm = F.cross_entropy(model.head(states[selected], words).float(), ids[selected])  # the masked rows only
    log_p = model.head(states[:, 0], words).float().log_softmax(-1)  # (B, V)
    share = weights[ids]  # (B, T)
    return mlm, -(share * log_p.gather(1, ids)).sum() / share.sum().clamp_min(1e-9)


@torch.no_grad()
def held_out_words(model: BertForMaskedLM, tokenizer: Tokenizer, paragraphs: list[str]) -> tuple[Tensor, Tensor]:
    """How well masked words of unseen text are guessed: a measure that does not depend on the vocabulary.

    Paragraphs are cut into stretches of 32 words. 15 % of the words, the same for every lower-cased WordPiece and in the same
    order, are masked with all their pieces; those of letters a to z count. Returns: of each word the loss in nats, the sum over
    its pieces, (N,); whether every piece is right, (N,) bool.
    """
    stretches = [" ".join(words[i : i + 32]) for p in paragraphs for words in [p.split()] for i in range(0, len(words), 32)]
    tokenizer.backend.no_truncation()
    rows, random = [], np.random.default_rng(0)
    for text, encoding in zip(stretches, tokenizer.backend.encode_batch(stretches)):
        spans = {}  # word -> its positions in the row
        for position, word in enumerate(encoding.word_ids):
            if word is not None:  # [CLS] and [SEP]
                spans.setdefault(word, []).append(position)
        chosen = random.random(len(spans)) < 0.15
        words = [(at, text[encoding.offsets[at[0]][0] : encoding.offsets[at[-1]][1]]) for at in spans.values()]
        words = [at for (at, word), yes in zip(words, chosen) if yes and word.isascii() and word.isalpha() and at[-1] < model.bert.max_length]
        rows.append((len(text), torch.tensor(encoding.ids[: model.bert.max_length]), words))

    training = model.training
    model.eval()
    losses_of_words, right = [], []
    rows.sort(key=lambda row: row[0])  # of like lengths together, by a length that no vocabulary changes
    for start in range(0, len(rows), 128):
        part = rows[start : start + 128]
        ids = nn.utils.rnn.pad_sequence([row for _, row, _ in part], batch_first=True, padding_value=tokenizer.pad)  # (B, T)
        word = torch.full(ids.shape, -1)  # number of the masked word that a position is a piece of
        count = 0
        for b, (*_, words) in enumerate(part):
            for at in words:
                word[b, at], count = count, count + 1
        at = word >= 0  # (B, T)
        states = model.bert(ids.masked_fill(at, tokenizer.mask).to(model.bert.device), (ids != tokenizer.pad).to(model.bert.device))
        log_p = model.head(states[at.to(states.device)], model.bert.embeddings.word.weight).float().log_softmax(-1).cpu()  # (pieces, V)
        truth = ids[at]
        losses_of_words.append(torch.zeros(count).index_add(0, word[at], -log_p.gather(1, truth[:, None])[:, 0]))
        right.append(torch.zeros(count).index_add(0, word[at], (log_p.argmax(-1) != truth).float()) == 0)
    model.train(training)
    return torch.cat(losses_of_words), torch.cat(right)


def held_out_scores(losses: Tensor, right: Tensor) -> dict[str, float]:
    """Means of what held_out_words() returns: loss, nats a word; accuracy, the share of words that are right; words, how many."""
    return {"loss": round(losses.mean().item(), 4), "accuracy": round(right.float().mean().item(), 4), "words": len(right)}


# ----------------------------------------------------------------------------------------------------------------
# The run


def rate(done: float) -> float:
    """Learning rate when this share of the time is over: up in a straight line, then down to 0."""
    return RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


def bag_weight(done: float) -> float:
    """The same for the weight of [CLS]: small, then large, and at the end masked words have the last word."""
    return BAG_WEIGHT[0] if done < LANGUAGE else BAG_WEIGHT[1] * (1 - done) / (1 - LANGUAGE)


def pick_device(name: str) -> tuple[torch.device, bool]:
    """The device, and whether matrix products in bf16 are faster there: cards of our day, and CPUs with AVX512-BF16."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch finds none")
    if name == "cuda":
        return torch.device(name), torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private: not in every version
    return torch.device(name), supported is not None and supported()


def load_state(args: argparse.Namespace, fixed: dict) -> dict | None:
    """What --resume goes on with; None for a new run. Raises: UserError if flags and folder do not go together."""
    out = Path(args.out)
    if args.overwrite or not out.exists() and not args.resume:
        return None
    if not args.resume:
        raise UserError(f"--out {out} is there already: --resume goes on with it, --overwrite begins again in its place")
    if not (out / "state.pt").is_file():
        raise UserError(f"--out {out} holds no state.pt, so there is nothing to resume; --overwrite begins again in its place")
    try:
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here
        raise UserError(f"{out / 'state.pt'} cannot be read ({type(error).__name__}); --overwrite begins again") from None
    for name, value in fixed.items():
        if (then := state["fixed"].get(name, "")) != value:  # nothing: of before there was --start
            raise UserError(f"--{name} is {value or 'none'}, but {out} was begun with {then or 'none'}")
    if state["seconds"] >= args.minutes * 60:
        raise UserError(f"{out} has had its {state['seconds'] / 60:.1f} minutes; to go on, give more than that as --minutes")
    return state


def train_step(model: BertForMaskedLM, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], weights: Tensor, done: float,
               bf16: bool) -> tuple[float, float]:  # fmt: skip
    """One update when this share of the time is over; the two losses."""
    device = model.bert.device
    for group in optimizer.param_groups:
        group["lr"] = rate(done)
    # For rows this short the plain formula of attention is a sixth faster on a CPU than the fused kernel.
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16), sdpa_kernel(kernels):
        mlm, bag = losses(model, *(t.to(device) for t in batch), weights)
    optimizer.zero_grad(set_to_none=True)
    (mlm + bag_weight(done) * bag).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return mlm.item(), bag.item()


def pretrain(args: argparse.Namespace) -> None:
    """A whole run; args are the flags of main(). Raises: UserError, before anything is written or thrown away."""
    out, budget = Path(args.out), args.minutes * 60
    device, bf16 = pick_device(args.device)
    start = load_bert(find_model(args.start), mlm=True) if args.start else None
    fixed = {name: getattr(args, name) for name in ("text", "start", "vocab", "layers", "hidden", "seed")}
    saved = load_state(args, fixed)
    torch.manual_seed(args.seed)
    documents, held_out = hold_out(read_documents(args.text), args.seed)
    with tempfile.TemporaryDirectory() as folder:  # --out is not touched before the first step has been taken
        known = out if saved else find_model(args.start) if start else None
        tokenizer = Tokenizer(known) if known else train_vocabulary(documents, args.vocab, Path(folder))
        tokenizer_files = {file.name: file.read_bytes() for file in tokenizer.files}
    sentences = tokenize(documents, tokenizer, args.seed)
    same_size = start and (args.layers, args.hidden) == (start.cfg.num_hidden_layers, start.cfg.hidden_size)
    model = load_bert(out, mlm=True) if saved else start if same_size else new_model(tokenizer, sentences, args.layers, args.hidden)
    model.to(device)
    weights = word_weights(sentences, tokenizer).to(device)
    pieces = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    pieces[[i for piece, i in tokenizer.vocabulary().items() if piece.startswith("##")]] = True
    model.bert.set_dropout(0.0)  # who sees everything about once does not overfit
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)
    step, tokens, seconds, log = 0, 0, 0.0, []  # seconds: of training alone
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, tokens, seconds, log = saved["step"], saved["tokens"], saved["seconds"], saved["log"]
    print(f"{len(sentences):,} sentences of {len(sentences.ids):,} tokens, {len(held_out):,} paragraphs held out; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters on {device.type} ({'bf16' if bf16 else 'fp32'})", flush=True)  # fmt: skip

    def save() -> None:
        """The model in fp16, for everyone, and what --resume needs; each file whole or not at all."""
        for name, content in tokenizer_files.items():
            write_atomically(out / name, content)
        save_bert(model, out, torch.float16)
        write_atomically(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        state = {"fixed": fixed, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "step": step, "tokens": tokens, "seconds": seconds, "log": log}  # fmt: skip
        write_atomically(out / "state.pt", lambda file: torch.save(state, file))

    def score() -> None:
        row = {"step": step, "tokens": tokens, "minutes": round(seconds / 60, 2), **held_out_scores(*held_out_words(model, tokenizer, held_out))}
        log.append(row | {"tokens_per_second": round(tokens / seconds), "mlm": round(mlm, 4), "bag": round(bag, 4)} if step else row)
        bar.write(f"{tokens / 1e6:7.2f} M tokens, {max(budget - seconds, 0) / 60:5.1f} minutes left: held-out loss "
                  f"{row['loss']:.3f} a word, {row['accuracy']:.1%} right")  # fmt: skip

    bar = tqdm(total=round(budget), initial=round(seconds), disable=None, bar_format="{percentage:3.0f}% |{bar}| {remaining} left{postfix}")
    stopped, last_save, recent, mlm, bag = [], seconds, deque(maxlen=100), math.nan, math.nan
    before = [signal.signal(number, lambda *_: stopped.append(True)) for number in (signal.SIGINT, signal.SIGTERM)]
    model.train()
    if not saved:
        score()
    for rows in itertools.islice(batches(sentences, args.seed), step, None):
        started = time.time()
        ids, mask = sentences.batch(rows)
        random = torch.Generator().manual_seed(int(np.random.SeedSequence([args.seed, 2, step]).generate_state(1)[0]))
        masked, selected = mask_tokens(ids, tokenizer, MASK_RATIO, "80-10-10", random, pieces)
        done = seconds / budget
        recent.append(train_step(model, optimizer, (ids, masked, selected, mask), weights, done, bf16))
        mlm, bag = np.mean(recent, axis=0).tolist()
        step, tokens, seconds = step + 1, tokens + int(mask.sum()), seconds + time.time() - started
        if step == 1:
            if seconds >= budget:
                raise UserError(f"--minutes {args.minutes:g} is shorter than one step, which takes {seconds:.1f} seconds here")
            shutil.rmtree(out, ignore_errors=True)  # --overwrite: from here on the new run is the better one
        if not math.isfinite(mlm + bag):
            raise UserError(f"the loss is not a number at step {step}; {out} holds what was saved last, for --resume")
        bar.n = min(round(seconds), bar.total)
        bar.set_postfix_str(f", {tokens / seconds:,.0f} tokens/s, loss {mlm:.3f}, of [CLS] {bag:.3f}")
        over = seconds >= budget or stopped
        if over or int(done * 20) < int(seconds / budget * 20):
            score()
        if over or seconds - last_save > 300:
            save()
            last_save = seconds
        if over:
            break
    bar.close()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)
    if stopped:
        print(f"stopped after {seconds / 60:.1f} of {args.minutes:g} minutes: the same command with --resume goes on", file=sys.stderr)
        raise KeyboardInterrupt
    print(f"{out}: {tokens:,} tokens in {step:,} steps and {seconds / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.pretrain", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text, .txt (also .gz, .xz)")
    parser.add_argument("--minutes", type=float, help="of training; reading and counting take some more")
    parser.add_argument("--out", metavar="DIR", help="folder for the model, log.jsonl and state.pt")
    parser.add_argument("--score", nargs="+", metavar="MODEL", help="train nothing: score these models on the paragraphs held out")
    parser.add_argument("--start", default="", metavar="MODEL", help="take this model's vocabulary, and its weights unless --layers or --hidden ask for another size")
    parser.add_argument("--vocab", type=int, help="WordPiece vocabulary (default: 8192, or that of --start)")
    parser.add_argument("--layers", type=int, help="(default: 4, or those of --start)")
    parser.add_argument("--hidden", type=int, help="hidden size, a multiple of 64, the size of a head (default: 192, or that of --start)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--overwrite", action="store_true", help="begin again in the place of what is in --out")
    args = parser.parse_args()
    if args.score:
        held_out = hold_out(read_documents(args.text), args.seed)[1]
        first = None
        for name in args.score:
            folder = find_model(name)
            model = load_bert(folder, mlm=True).to(pick_device(args.device)[0])
            losses, right = held_out_words(model, Tokenizer(folder), held_out)
            row = {"model": name, **held_out_scores(losses, right)}
            first = losses if first is None else first
            if first is not losses and len(first) == len(losses):  # word by word
                row["loss_minus_first"] = round((losses - first).mean().item(), 4)
                row["standard_error"] = round((losses - first).std().item() / math.sqrt(len(losses)), 4)
            print(json.dumps(row), flush=True)
        return
    if args.minutes is None or args.out is None:
        raise UserError("--minutes and --out are needed: how long to train, and where to put the model")
    if args.start and args.vocab:
        raise UserError(f"--vocab is {args.vocab}: the vocabulary is that of --start {args.start}; leave one of them out")
    sizes = {"vocab": 8192, "layers": 4, "hidden": 192}
    if args.start:
        cfg = load_config(find_model(args.start))
        sizes = {"vocab": cfg.vocab_size, "layers": cfg.num_hidden_layers, "hidden": cfg.hidden_size}
    vars(args).update({name: default for name, default in sizes.items() if getattr(args, name) is None})
    rules = {"minutes": (0 < args.minutes < math.inf, "above 0"), "vocab": (32 <= args.vocab <= 65_536, "between 32 and 65536"),
             "layers": (args.layers >= 1, "at least 1"), "seed": (0 <= args.seed < 1 << 63, "0 or above"),
             "hidden": (64 <= args.hidden <= args.vocab and args.hidden % 64 == 0, "a multiple of 64, the size of a head, and at most --vocab")}  # fmt: skip
    for name, (holds, expected) in rules.items():
        if not holds:
            raise UserError(f"--{name} is {getattr(args, name):g}: it must be {expected}")
    pretrain(args)


if __name__ == "__main__":
    run_main(main)
