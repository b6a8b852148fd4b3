"""From sentences to vectors; similarity and search.

    from diffcse import DiffCSE
    model = DiffCSE("runs/demo-1")                          # a folder or a Hub name
    model.encode("a sentence")                              # (D,)
    model.similarity("a man plays", ["he plays"])           # (1,)
    model.build_index(["one", "two"]); model.search("uno")  # [(sentence, cosine), ...]

    python embed.py encode MODEL FILE --out vectors.npy
    python embed.py search MODEL FILE "a question"
    python embed.py index MODEL FILE INDEX.safetensors      # search takes it in place of FILE
    python embed.py similarity MODEL "a sentence" "another"
    python embed.py export MODEL FOLDER                     # for sentence-transformers

Shapes: B sentences of a batch, n of a call, T tokens including padding, D hidden size.
Reference: diffcse/tool.py, which ignores threshold and top_k for a list of queries.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from bert import Bert
from data import Tokenizer, read_lines
from engine import cli
from engine.device import pick_device
from engine.errors import UserError, atomic_file, expand_home, run_main
from engine.fast import operations
from engine.hub import find_model
from engine.index import Index
from engine.model_folder import DTYPES, RUN_CONFIG, exported_card, load_model, save_model

AVERAGES = {"mean": -1, "avg_first_last": 0, "avg_layer1_last": 1, "avg_top2": -2}
POOLINGS = ("cls", "cls_before_pooler", "max", *AVERAGES)
ENCODE_CHUNK_SIZE = 1 << 14  # sentences that are tokenised, and sorted by length, at a time
PROBE = "A quick brown fox jumps over 13 lazy dogs; 狐 лиса 🦊."

Sentences = str | Sequence[str]
Lines = Sentences | Path  # a list, or the path of a file with a sentence per line


def check_pooling(bert: Bert, pooling: str) -> None:
    """Raises: UserError for an unknown pooling, or one that the model does not have."""
    if pooling not in POOLINGS:
        raise UserError(f"pooling {pooling!r} is unknown; known are {', '.join(POOLINGS)}")
    if pooling == "cls" and bert.pooler is None:
        raise UserError("pooling 'cls' needs a model with a pooler; use 'cls_before_pooler'")


def pool(bert: Bert, ids: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector for each row. Shapes: ids, mask (B, T) -> (B, D).

    cls_before_pooler: the last layer at [CLS], for which DiffCSE trains.
    cls: tanh(W x + b) of it, the model's own pooler.
    mean, max: over the tokens of the last layer, including [CLS] and [SEP].
    avg_first_last, avg_layer1_last, avg_top2: the mean over the tokens of X_N and X_0, X_1 or
    X_N-1. X_0 is the embeddings' output; the paper's "first-last average" uses it.
    """
    check_pooling(bert, pooling)
    if pooling in ("cls_before_pooler", "cls"):
        cls = bert(ids, mask, cls_only=True)[:, 0]  # (B, D)
        return torch.tanh(bert.pooler(cls)) if pooling == "cls" else cls
    states = bert(ids, mask, all_layers=True)  # X_0 .. X_N, each (B, T, D)
    last, mask = states[-1].float(), mask[:, :, None]
    if pooling == "max":
        return last.masked_fill(~mask, -torch.inf).amax(dim=1)
    return ((states[AVERAGES[pooling]].float() + last) / 2 * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def encode(
    bert: Bert,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    pooling: str = "cls_before_pooler",
    batch_size: int = 32,  # fits a CPU's cache; a GPU likes more
    max_length: int | None = None,
    normalize: bool = False,
    amp: torch.dtype | None = None,
    fast: bool = True,
) -> np.ndarray:
    """Vectors of sentences, in their order, without dropout. Shapes: n sentences -> (n, D) float32.

    The longest are encoded first: batches have little padding, and a lack of memory shows early.
    max_length: in tokens (default: the number of positions). normalize: to unit length. amp: the
    dtype of mixed precision. fast: use engine/fast.py.
    """
    sentences, training = check_sentences(sentences), bert.training
    max_length = bert.max_length if max_length is None else min(max_length, bert.max_length)
    vectors = np.empty((len(sentences), bert.cfg.hidden_size), np.float32)
    bar = tqdm(desc="encode", total=len(vectors), leave=False, disable=len(vectors) < 5000 or None)
    bert.eval()
    try:
        with bar, torch.autocast(bert.device.type, amp, bool(amp)), operations(fast, bert.device):
            for start in range(0, len(sentences), ENCODE_CHUNK_SIZE):
                ids = tokenizer(sentences[start : start + ENCODE_CHUNK_SIZE], max_length)
                lengths = torch.tensor([len(row) for row in ids])
                for rows in lengths.argsort(descending=True, stable=True).split(batch_size):
                    x = [torch.tensor(ids[row]) for row in rows.tolist()]
                    x = pad_sequence(x, batch_first=True, padding_value=tokenizer.pad_id)  # (B, T)
                    mask = torch.arange(x.shape[1]) < lengths[rows, None]
                    pooled = pool(bert, x.to(bert.device), mask.to(bert.device), pooling)  # (B, D)
                    pooled = pooled.float().cpu().numpy()
                    vectors[start + rows.numpy()] = l2_normalize(pooled) if normalize else pooled
                    bar.update(len(rows))
    finally:
        bert.train(training)
    return vectors


def check_sentences(sentences: Iterable[str]) -> list[str]:
    if isinstance(sentences, str) or not isinstance(sentences, Iterable):
        raise UserError(f"expected a list of sentences, found {sentences!r:.80}")
    for i, sentence in enumerate(sentences := list(sentences)):
        if not isinstance(sentence, str):
            raise UserError(f"sentence {i} of {len(sentences)} is {sentence!r:.80}; expected a str")
    return sentences


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """Unit length; a vector of zeros stays. Shapes: (..., D) -> (..., D)."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


class DiffCSE:
    """A trained encoder with similarity and exact search.

    name: see load_model. device: by default cuda if available. pooler: one of POOLINGS, by default
    the folder's. dtype "bf16": 2.5 times as fast on a CPU with AVX512-BF16, also on AMX or a GPU.
    """

    def __init__(self, name: str | Path, device=None, pooler: str | None = None, dtype="fp32"):
        if dtype not in ("fp32", "bf16"):
            raise UserError(f"dtype is {dtype!r}; it must be fp32 or bf16")
        self.bert, self.tokenizer, pooling, self.max_length = load_model(name)
        self.pooler = pooler or pooling
        check_pooling(self.bert, self.pooler)
        self.bert.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.index, self.amp = Index(self.bert.cfg.hidden_size), None
        self.probe = self.encode(PROBE)  # identifies this model in an index, whatever the dtype
        if dtype == "bf16":
            self.amp = torch.bfloat16
            for module in self.bert.modules():  # sums and LayerNorms stay fp32, at no cost
                if isinstance(module, torch.nn.Linear):
                    module.to(self.amp)

    def encode(
        self,
        sentence: Sentences,
        return_numpy: bool = False,
        normalize_to_unit: bool = True,
        keepdim: bool = False,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> Tensor | np.ndarray:
        """A CPU tensor. Shapes: str -> (D,), or (1, D) with keepdim; list -> (n, D)."""
        single = isinstance(sentence, str)
        max_length = self.max_length if max_length is None else max_length
        options = (self.pooler, batch_size, max_length, normalize_to_unit, self.amp)
        vectors = encode(self.bert, self.tokenizer, [sentence] if single else sentence, *options)
        vectors = vectors[0] if single and not keepdim else vectors
        return vectors if return_numpy else torch.from_numpy(vectors)

    def similarity(self, queries: Sentences, keys: Sentences | Tensor | np.ndarray):
        """Cosines. Shapes: lists -> (n, m); str, list -> (m,); list, str -> (n, 1); two str -> a
        float. keys may be vectors, (m, D) or (D,)."""
        if isinstance(keys, (Tensor, np.ndarray)):
            vectors = l2_normalize(np.atleast_2d(torch.as_tensor(keys).float().cpu().numpy()))
        else:
            vectors = self.encode(keys, return_numpy=True, keepdim=True)
        cosines = self.encode(queries, return_numpy=True) @ vectors.T  # (n, m) or (m,)
        return float(cosines[0]) if isinstance(queries, str) and isinstance(keys, str) else cosines

    def build_index(self, sentences: Lines, use_faiss: bool = False, batch_size: int = 32) -> None:
        """Encode what search() searches. use_faiss: with faiss.IndexFlatIP, which is exact too."""
        index = Index(self.bert.cfg.hidden_size, use_faiss)
        index.add(*self._encode_lines(sentences, batch_size))
        self.index = index

    def add_to_index(self, sentences: Lines, batch_size: int = 32) -> None:
        self.index.add(*self._encode_lines(sentences, batch_size))

    def _encode_lines(self, sentences: Lines, batch_size: int) -> tuple[list[str], Tensor]:
        is_path = isinstance(sentences, (str, Path))
        lines = check_sentences(read_lines(Path(sentences)) if is_path else sentences)
        return [line.rstrip() for line in lines], self.encode(lines, batch_size=batch_size)

    def search(self, queries: Sentences, threshold: float = 0.6, top_k: int = 5) -> list:
        """At most top_k (sentence, cosine >= threshold), best first; a list of them per query."""
        results = self.index.search(self.encode(queries, keepdim=True), threshold, top_k)
        return results[0] if isinstance(queries, str) else results

    def save_index(self, path: str | Path, dtype: str = "fp32") -> None:
        """A safetensors file. dtype "fp16" halves it and moves a cosine by up to 0.0005."""
        self.index.save(path, self.probe, dtype)

    def load_index(self, path: str | Path, use_faiss: bool = False) -> None:
        """Search what save_index wrote, from the file. Raises: UserError if another model did."""
        self.index = Index.load(path, self.probe, use_faiss)


def export(args) -> None:
    folder = expand_home(args.out).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; name another, or delete it")
    source = find_model(args.model)
    model = load_model(source)
    model = model._replace(pooling=args.pooler or model.pooling)
    check_pooling(model.bert, model.pooling)
    about = f"Made from `{args.model}` by `python embed.py export`; weights in {args.dtype}."
    card, run_config = exported_card(folder.name, model, about, source), ""
    if (source / RUN_CONFIG).is_file():  # a run's model
        run_config = (source / RUN_CONFIG).read_text(encoding="utf-8")
    save_model(model, folder, card, args.dtype, run_config)
    print(f"{folder}: pooling {model.pooling}; tensors left out: {len(model.bert.ignored)}")


def parse_args():
    parser = cli.Parser(prog="embed.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("model", metavar="MODEL", help="a folder, a run, or a Hub NAME@REVISION")
        sub.add_argument("--pooler", choices=POOLINGS, help="(default: the folder's own)")
        if name != "export":
            cli.add_encoder_flags(sub)
        return sub.add_argument

    encode = command("encode", "Vectors of the lines of a file.")
    search = command("search", "The lines of a file that are most similar to a question.")
    index = command("index", "Save the vectors of a file's lines for search.")
    similarity = command("similarity", "Cosines of a sentence with others.")
    export = command("export", "Any supported checkpoint as a sentence-transformers folder.")
    for add in (encode, search, index):
        add("file", metavar="FILE", help="a sentence per line, also .gz and .xz; - is stdin")
    for add in (search, similarity):
        add("--json", action="store_true", help="print JSON lines")
    encode("--out", metavar="FILE.npy", help="float32 array (n, D) (default: print JSON lines)")
    encode("--no-normalize", action="store_true", help="keep the vectors' lengths")
    search("question", nargs="*", metavar="QUESTION", help="(default: the lines of stdin)")
    search("--top-k", type=int, default=5, metavar="K", help="results per question (default: 5)")
    search("--threshold", type=float, default=-1.0, metavar="COSINE", help="(default: none)")
    search("--faiss", action="store_true", help="search with faiss, if it is installed")
    index("out", metavar="INDEX.safetensors", help="search takes it in place of FILE")
    similarity("sentence", metavar="A")
    similarity("others", metavar="B", nargs="+")
    export("out", metavar="FOLDER")
    for add in (index, export):
        add("--dtype", choices=DTYPES, default="fp32", help="fp16: half as large (default: fp32)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.command == "export":
        return export(args)
    device, amp = pick_device(args.device, args.amp)
    model = DiffCSE(args.model, device, args.pooler, "bf16" if amp else "fp32")
    if args.command == "encode":
        sentences = list(read_lines(Path(args.file)))
        vectors = model.encode(sentences, True, not args.no_normalize)
        if args.out:
            with atomic_file(args.out) as new, open(new, "wb") as file:
                np.save(file, vectors)
        else:
            for sentence, vector in zip(sentences, vectors):
                print(json.dumps({"sentence": sentence, "vector": vector.tolist()}))
    elif args.command == "similarity":
        for b, cosine in zip(args.others, model.similarity(args.sentence, args.others).tolist()):
            row = {"a": args.sentence, "b": b, "cosine": cosine}
            print(json.dumps(row) if args.json else f"{cosine:.4f}")
    elif args.command == "index":
        model.build_index(args.file)
        model.save_index(args.out, args.dtype)
        print(f"{args.out}: {len(model.index.sentences):,} sentences")
    else:
        if args.file == "-" and not args.question:
            raise UserError("sentences and questions cannot both come from standard input")
        is_index = args.file.endswith(".safetensors")
        (model.load_index if is_index else model.build_index)(args.file, args.faiss)
        if not args.question and sys.stdin.isatty():
            print("One question per line; Ctrl-D ends.", file=sys.stderr)
        for question in args.question or filter(str.strip, read_lines(Path("-"))):
            for sentence, cosine in model.search(question, args.threshold, args.top_k):
                row = {"question": question, "sentence": sentence, "cosine": cosine}
                print(json.dumps(row) if args.json else f"{cosine:.4f}\t{sentence}", flush=True)


if __name__ == "__main__":
    run_main(main)
