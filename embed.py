"""Sentences to vectors, and what one does with vectors: similarity and search. Models are opened and kept here too.

    from diffcse import DiffCSE
    model = DiffCSE("runs/demo-1")
    model.encode("a sentence")                      # (D,)
    model.similarity("a man plays", ["he plays"])   # (1,)
    model.build_index(["one", "two"]); model.search("uno", top_k=1, threshold=0)

    python embed.py encode MODEL FILE --out vectors.npy
    python embed.py search MODEL FILE "a question"
    python embed.py index MODEL FILE INDEX              # search takes it in place of FILE
    python embed.py similarity MODEL "a sentence" "another"
    python embed.py export MODEL FOLDER

A saved model is a folder for transformers and sentence-transformers as it is; of sentence-transformers' folders those are
read that have a pooling of POOLINGS and, behind it, nothing but a tanh layer (pooling "cls") and normalisation.

Reference: SPEC 7.2 (poolers), SPEC 9 (the published tool, whose list queries ignored threshold and top_k).
Not here: approximate search; the prompts and other modules of sentence-transformers.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from bert import Bert, UserError, load_bert, read_json, read_safetensors, read_weights, save_bert, write_atomically, write_safetensors
from data import Tokenizer, find_model, read_lines, run_main

POOLINGS = ("cls", "cls_before_pooler", "mean", "max", "avg_first_last", "avg_layer1_last", "avg_top2")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # of files; what is computed is computed in fp32

# ----------------------------------------------------------------------------------------------------------------
# Opening and keeping a model

RUN_CONFIG = "run_config.json"  # in a model's folder: the settings of the run that made it
MAX_LENGTH = 128  # tokens, where a folder says nothing (SPEC 9)
THEIR_POOLING = {"cls_before_pooler": "cls", "mean": "mean", "max": "max"}  # sentence-transformers' names; "cls": a module more


class Opened(NamedTuple):
    bert: Bert
    tokenizer: Tokenizer
    pooling: str  # the folder's own, or what DiffCSE is trained for
    max_length: int  # tokens of a sentence that the folder means to be read


def open_model(name: str) -> Opened:
    """What encode() needs, of a model folder, a run's folder, a sentence-transformers folder or a Hub name.

    Raises: UserError naming the file and what in it is not known here.
    """
    folder = find_model(name)
    modules = _their_modules(folder / "modules.json") if (folder / "modules.json").is_file() else {"Transformer": folder}
    at = modules["Transformer"]
    bert, tokenizer = load_bert(at), Tokenizer(at)
    tokenizer.check_fits(at, bert.cfg.vocab_size)
    if "Pooling" not in modules:
        return Opened(bert, tokenizer, "cls_before_pooler", min(MAX_LENGTH, bert.max_length))
    settings, tokens, theirs = (read_json(path) if path.is_file() else {} for path in (
        at / "sentence_bert_config.json", at / "tokenizer_config.json", folder / "config_sentence_transformers.json"))  # fmt: skip
    if theirs.get("default_prompt_name"):
        raise UserError(f"{folder}: it puts the prompt {theirs['default_prompt_name']!r} before every sentence, which is not done here")
    pooling = _our_pooling(modules["Pooling"] / "config.json")
    if "Dense" in modules:
        bert.pooler, pooling = _tanh_layer(modules["Dense"], pooling, bert.cfg.hidden_size), "cls"
    if settings.get("do_lower_case"):  # before the tokenizer's own normaliser, as there
        own = [tokenizer.backend.normalizer] if tokenizer.backend.normalizer else []
        tokenizer.backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *own])
    max_length = settings.get("max_seq_length") or tokens.get("model_max_length") or bert.max_length
    if not isinstance(max_length, int) or max_length < 2:
        raise UserError(f"{at}: max_seq_length or model_max_length is {max_length!r}: a whole number of at least 2 is meant")
    return Opened(bert, tokenizer, pooling, min(max_length, bert.max_length))


def _their_modules(path: Path) -> dict[str, Path]:
    """The folder of each module that modules.json lists, by its kind."""
    modules = {}
    for module in read_json(path, list):
        kind, inside = (str(module.get(key)) for key in ("type", "path")) if isinstance(module, dict) else ("nothing", "")
        if inside == ".." or Path(inside).name != inside:
            raise UserError(f"{path}: the module folder {inside!r} is not a plain name")
        modules[kind.rpartition(".")[2]] = path.parent / inside
    if list(modules) not in [["Transformer", "Pooling", *dense, *unit] for dense in ([], ["Dense"]) for unit in ([], ["Normalize"])]:
        raise UserError(f"{path}: its modules are {', '.join(modules)}; known are Transformer, Pooling, Dense and Normalize, in this order")
    return modules


def _our_pooling(path: Path) -> str:
    config = read_json(path)
    theirs = config.get("pooling_mode")
    if theirs is None:  # before their version 6: a flag for each
        short = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max"}
        theirs = "+".join(short.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value)
    for ours, name in THEIR_POOLING.items():
        if name == theirs:
            return ours
    raise UserError(f"{path}: the pooling {theirs!r} is not known here; known are {', '.join(THEIR_POOLING.values())}")


def _tanh_layer(folder: Path, pooling: str, D: int) -> nn.Linear:
    """A Dense module as what pooling "cls" puts behind [CLS]. Shapes: (..., D) -> (..., D)."""
    config, weights = read_json(folder / "config.json"), read_weights(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    tanh = str(config.get("activation_function")).endswith(".Tanh") and not config.get("use_residual")
    if pooling != "cls_before_pooler" or not tanh or shapes != {"linear.weight": (D, D), "linear.bias": (D,)}:
        raise UserError(f"{folder}: only a tanh layer of {D} by {D} behind the pooling cls is known here")
    layer = nn.Linear(D, D)
    layer.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in weights.items()})
    return layer.eval()


def save_model(model: Opened, folder: Path, card: str = "", dtype: str = "fp32") -> None:
    """A folder for open_model, transformers (AutoModel) and sentence-transformers; each file whole or not at all.

    card: Markdown about the model, below how it is used. Poolings that sentence-transformers has not are left to the reader of the card.
    """
    bert, tokenizer, pooling, max_length = model
    save_bert(bert, folder, DTYPES[dtype])
    tokenizer.save(folder, bert.max_length)
    D = bert.cfg.hidden_size
    files: dict[str, object] = {}
    if pooling in (*THEIR_POOLING, "cls"):
        kinds = ["Transformer", "Pooling", *["Dense"] * (pooling == "cls"), "Normalize"]
        files["modules.json"] = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
                                 for i, kind in enumerate(kinds)]  # fmt: skip
        theirs = THEIR_POOLING.get(pooling, "cls")
        files["1_Pooling/config.json"] = {"word_embedding_dimension": D, "pooling_mode_cls_token": theirs == "cls",
                                          "pooling_mode_mean_tokens": theirs == "mean", "pooling_mode_max_tokens": theirs == "max"}  # fmt: skip
        files["sentence_bert_config.json"] = {"max_seq_length": max_length, "do_lower_case": False}
        files["config_sentence_transformers.json"] = {"similarity_fn_name": "cosine", "prompts": {}, "default_prompt_name": None}
    if pooling == "cls":
        files["2_Dense/config.json"] = {"in_features": D, "out_features": D, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
        write_safetensors(folder / "2_Dense" / "model.safetensors", {f"linear.{name}": t.to(DTYPES[dtype]) for name, t in bert.pooler.state_dict().items()})
    for name, content in files.items():
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
    write_atomically(folder / "README.md", card)


def model_card(title: str, model: Opened, about: str, base_model: str = "") -> str:
    """README.md of a saved model: front matter for the Hub, how to use it, and what is said about it (Markdown)."""
    front = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity", *[f"base_model: {base_model}"] * bool(base_model),
             "tags: [sentence-transformers, sentence-similarity, feature-extraction, diffcse]"]  # fmt: skip
    if model.pooling in (*THEIR_POOLING, "cls"):
        theirs = ("```python\nfrom sentence_transformers import SentenceTransformer\nmodel = SentenceTransformer(FOLDER)\n"
                  'model.similarity(model.encode(["a man plays"]), model.encode(["he plays"]))\n```\n')  # fmt: skip
    else:
        theirs = f"sentence-transformers has no pooling {model.pooling!r}, so the folder does not say one.\n"
    return ("---\n" + "\n".join(front) + f"\n---\n# {title}\n\nSentences to vectors of {model.bert.cfg.hidden_size} numbers, "
            f"compared by cosine. Pooling: `{model.pooling}`.\n\n{theirs}\n"
            f'```python\nfrom diffcse import DiffCSE\nmodel = DiffCSE(FOLDER, pooler="{model.pooling}")\nmodel.similarity("a man plays", ["he plays"])\n```\n\n'
            "`transformers.AutoModel.from_pretrained(FOLDER)` gives the encoder alone.\n\n" + about.rstrip() + "\n")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Poolings


def check_pooling(bert: Bert, pooling: str) -> None:
    """Raises: UserError if there is no such pooling, or not for this model."""
    if pooling not in POOLINGS:
        raise UserError(f"pooling {pooling!r} is unknown; known are {', '.join(POOLINGS)}")
    if pooling == "cls" and bert.pooler is None:
        raise UserError("pooling 'cls' needs the model's own pooler and its file has none; use 'cls_before_pooler'")


def pool(bert: Bert, ids: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector for each row (SPEC 7.2). Shapes: ids, mask (B, T) -> (B, D).

    cls_before_pooler: the last layer's [CLS], what DiffCSE is trained for; cls: that through the model's own
    pooler, tanh(W x + b); mean, max: over the last layer's real tokens, [CLS] and [SEP] included; avg_first_last,
    avg_layer1_last, avg_top2: mean over the tokens of (X_0 + X_N) / 2, (X_1 + X_N) / 2 and (X_N-1 + X_N) / 2, X_0 being
    the embeddings' output. Both of the first two are called "first-last": the paper's figures are of X_0.
    """
    check_pooling(bert, pooling)
    if pooling in ("cls_before_pooler", "cls"):
        firsts = torch.arange(len(ids), device=ids.device) * ids.shape[1]
        first_token = bert(ids, mask, wanted=firsts)  # (B, D)
        return first_token if pooling == "cls_before_pooler" else torch.tanh(bert.pooler(first_token))
    states = bert(ids, mask, all_layers=True)  # X_0 .. X_N, each (B, T, D)
    weight = mask[:, :, None].to(states[-1].dtype)  # (B, T, 1)
    if pooling == "max":
        return states[-1].masked_fill(weight == 0, -torch.inf).max(dim=1).values
    other = {"mean": -1, "avg_first_last": 0, "avg_layer1_last": 1, "avg_top2": -2}[pooling]
    return ((states[other] + states[-1]) / 2 * weight).sum(1) / weight.sum(1)


CHUNK = 1 << 14  # sentences that are tokenised, and sorted by length, at a time


@torch.no_grad()
def encode(bert: Bert, tokenizer: Tokenizer, sentences: Sequence[str], pooling: str = "cls_before_pooler",
           batch_size: int = 128, max_length: int | None = None, normalize: bool = False, progress: bool | None = None,
           ) -> np.ndarray:  # fmt: skip
    """Vectors of sentences, in their order, in fp32 and without dropout. Shapes: n sentences -> (n, D) float32.

    Sentences are encoded longest first, so that a batch holds like lengths and little padding, and a batch that is
    too large for the memory fails early. max_length None: as long as the model's position embeddings allow.
    normalize: to unit length. progress None: a bar from 5,000 sentences on, where a person watches.
    Raises: UserError for one str in place of a list, and for a sentence that is no str.
    """
    if isinstance(sentences, str) or not isinstance(sentences, Iterable):
        raise UserError(f"a list of sentences is meant, and this is {sentences!r:.80}")
    sentences = list(sentences)
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise UserError(f"sentence {i} of {len(sentences)} is {sentence!r:.80}: it must be a str")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    longest = bert.max_length if max_length is None else min(max_length, bert.max_length)
    vectors = np.zeros((len(sentences), bert.cfg.hidden_size), np.float32)
    training = bert.training
    bert.eval()
    try:
        with (tqdm(total=len(sentences), desc="encoding", unit=" sentences", leave=False,
                   disable=None if (len(sentences) >= 5000 if progress is None else progress) else True) as bar,
              torch.compiler.set_stance("force_eager") if any(layer._compiled_call_impl for layer in bert.layers) else nullcontext()):  # shapes vary
            for first in range(0, len(sentences), CHUNK):
                ids = tokenizer(sentences[first : first + CHUNK], longest)
                order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
                for start in range(0, len(ids), batch_size):
                    rows = order[start : start + batch_size]
                    lengths = torch.tensor([len(ids[i]) for i in rows])
                    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
                    batch = torch.full(mask.shape, tokenizer.pad)
                    batch[mask] = torch.tensor([t for i in rows for t in ids[i]])
                    pooled = pool(bert, batch.to(bert.device), mask.to(bert.device), pooling).float().cpu().numpy()
                    vectors[[first + i for i in rows]] = unit(pooled) if normalize else pooled
                    bar.update(len(rows))
    finally:
        bert.train(training)
    return vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector at length 1; a vector of zeros stays."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


# ----------------------------------------------------------------------------------------------------------------
# The tool

BLOCK = 1 << 16  # vectors of an index that are multiplied at a time
PROBE = "A quick brown fox jumps over 13 lazy dogs; 狐 лиса 🦊."  # its vector says which model made an index


class DiffCSE:
    """A trained encoder as a tool (SPEC 9): vectors, similarity, and exact search.

    name_or_folder: as open_model takes it. device: "cpu", "cuda", ... (default: cuda where there is one).
    pooler: one of POOLINGS (default: the folder's own, else cls_before_pooler).
    """

    def __init__(self, name_or_folder: str | Path, device: str | None = None, pooler: str | None = None):
        self.bert, self.tokenizer, pooling, self.max_length = open_model(str(name_or_folder))
        self.pooler = pooler or pooling
        check_pooling(self.bert, self.pooler)
        try:
            self.bert.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:  # torch raises the second where it was built without CUDA
            raise UserError(f"device {device!r}: {str(error).splitlines()[0]}") from None
        self.sentences: list[str] = []
        self.vectors: list[Tensor] | None = None  # the index: parts (n, D) of unit vectors, fp32 or fp16, in memory or in a file
        self.faiss = None

    def encode(self, sentence: str | Sequence[str], return_numpy: bool = False, normalize_to_unit: bool = True,
               keepdim: bool = False, batch_size: int = 64, max_length: int | None = None) -> Tensor | np.ndarray:  # fmt: skip
        """Shapes: one str -> (D,), or (1, D) with keepdim; a list of n -> (n, D). A CPU tensor, or an array.

        max_length: tokens (default: what the model's folder says, else 128). Raises: UserError for what is no str.
        """
        single = isinstance(sentence, str)
        vectors = encode(self.bert, self.tokenizer, [sentence] if single else sentence, self.pooler,
                         batch_size, self.max_length if max_length is None else max_length, normalize_to_unit)  # fmt: skip
        vectors = vectors[0] if single and not keepdim else vectors
        return vectors if return_numpy else torch.from_numpy(vectors)

    def similarity(self, queries: str | Sequence[str], keys: str | Sequence[str] | np.ndarray | Tensor) -> float | np.ndarray:
        """Cosine. Shapes: list, list -> (n, m); str, list -> (m,); list, str -> (n, 1); str, str -> a float.

        keys may be vectors made before, (m, D) or (D,).
        """
        if isinstance(keys, (np.ndarray, Tensor)):
            key_vectors = unit(np.atleast_2d(torch.as_tensor(keys).float().cpu().numpy()))
            if key_vectors.shape[1:] != (self.bert.cfg.hidden_size,):
                raise UserError(f"keys have the shape {tuple(keys.shape)}: vectors of {self.bert.cfg.hidden_size} are meant")
        else:
            key_vectors = self.encode(keys, return_numpy=True, keepdim=True)
        scores = self.encode(queries, return_numpy=True) @ key_vectors.T  # (n, m) or (m,)
        return float(scores[0]) if isinstance(queries, str) and isinstance(keys, str) else scores

    def build_index(self, sentences: Sequence[str] | str | Path, use_faiss: bool = False, batch_size: int = 64) -> None:
        """Encode what will be searched, in place of what was: a list, or the path of a file with one sentence a line.

        use_faiss: search by faiss' inner product (IndexFlatIP), which must be installed; what is found is the same.
        """
        faiss = _new_faiss(self.bert.cfg.hidden_size) if use_faiss else None
        texts, vectors = self._encode_lines(sentences, batch_size)
        self._set_index(texts, vectors, faiss)

    def add_to_index(self, sentences: Sequence[str] | str | Path, batch_size: int = 64) -> None:
        """Encode more that will be searched. Raises: UserError before build_index or load_index."""
        self._check_index()
        texts, vectors = self._encode_lines(sentences, batch_size)
        self.sentences += texts
        self.vectors.append(vectors)
        if self.faiss is not None:
            self.faiss.add(vectors.numpy())

    def _encode_lines(self, sentences: Sequence[str] | str | Path, batch_size: int) -> tuple[list[str], Tensor]:
        texts = read_lines(Path(sentences)) if isinstance(sentences, (str, Path)) else sentences
        texts = list(texts) if isinstance(texts, Iterable) else texts  # encode says what is wrong with the rest
        vectors = self.encode(texts, batch_size=batch_size)
        return [text.rstrip() for text in texts], vectors

    def _set_index(self, sentences: list[str], vectors: Tensor, faiss) -> None:
        if faiss is not None:
            faiss.add(vectors.float().numpy())
        self.sentences, self.vectors, self.faiss = sentences, [vectors], faiss

    def _check_index(self) -> None:
        if self.vectors is None:
            raise UserError("there is nothing to search yet: call build_index(sentences) or load_index(file) first")

    def search(self, queries: str | Sequence[str], threshold: float = 0.6, top_k: int = 5) -> list:
        """The top_k most similar sentences at or above the threshold, best first, as (sentence, cosine).

        A list of queries gives a list of such lists. Of equal cosines the one that was added first comes first. Memory beside the index:
        a number for each of 16 queries and each sentence. Raises: UserError before build_index or load_index.
        """
        self._check_index()
        if isinstance(queries, str):
            return self.search([queries], threshold, top_k)[0]
        if not isinstance(top_k, int) or top_k < 0:
            raise UserError(f"top_k is {top_k!r}: it must be a whole number of at least 0")
        results = []
        for some in self.encode(queries).split(16):  # (q, D)
            for scores, places in self._scores(some, top_k):
                found = np.flatnonzero(scores >= threshold)
                if 0 < top_k < len(found):  # all that tie with the last: sorting what is few
                    found = found[scores[found] >= np.partition(scores[found], -top_k)[-top_k]]
                best = found[np.argsort(-scores[found], kind="stable")][:top_k]
                results.append([(self.sentences[places[i]], float(scores[i])) for i in best])
        return results

    def _scores(self, queries: Tensor, top_k: int) -> Iterator[tuple[np.ndarray, Sequence[int]]]:
        """Cosines with what may be found, and which sentences those are, of each query. Shapes: (q, D) -> q times (m,), m places."""
        n = len(self.sentences)
        if self.faiss is not None and n and top_k:
            yield from zip(*self.faiss.search(queries.numpy(), min(top_k, n)))
            return
        scores, start = torch.empty(len(queries), n), 0
        for part in self.vectors:
            for block in part.split(BLOCK):  # (b, D); of a file in fp16, only this much is ever fp32
                scores[:, start : start + len(block)] = queries @ block.float().T
                start += len(block)
        yield from ((row, range(n)) for row in scores.numpy())

    def save_index(self, path: str | Path, dtype: str = "fp32") -> None:
        """Sentences and vectors in one safetensors file; dtype "fp16" halves it, at 0.0005 of a cosine."""
        self._check_index()
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}: it must be {' or '.join(DTYPES)}")
        parts = [part.to(DTYPES[dtype]) for part in self.vectors]
        text = torch.frombuffer(bytearray(json.dumps(self.sentences).encode()), dtype=torch.uint8)
        write_safetensors(path, {"vectors": parts[0] if len(parts) == 1 else torch.cat(parts), "sentences": text, "probe": self.encode(PROBE)})

    def load_index(self, path: str | Path, use_faiss: bool = False) -> None:
        """Search what save_index wrote, from the file: only what a search reads is in memory.

        Raises: UserError where the file is none of these, or of another model or pooler.
        """
        faiss = _new_faiss(self.bert.cfg.hidden_size) if use_faiss else None
        if not Path(path).is_file():
            raise UserError(f"{path}: no such index")
        tensors = read_safetensors(path)
        try:
            vectors, probe = tensors["vectors"], tensors["probe"]
            sentences = json.loads(tensors["sentences"].numpy().tobytes())
            if vectors.dtype not in DTYPES.values() or len(vectors) != len(sentences) or probe.shape != vectors.shape[1:]:
                raise ValueError
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{path} is no index: build_index and save_index make one") from None
        if len(probe) != self.bert.cfg.hidden_size:
            raise UserError(f"{path} holds vectors of {len(probe)} numbers, this model's have {self.bert.cfg.hidden_size}: it is another model's")
        if not float(probe @ self.encode(PROBE)) > 1 - 1e-5:  # fp16 weights and other machines move it by less
            raise UserError(f"{path} was made by another model, or with another pooler than {self.pooler}: build it again")
        self._set_index(sentences, vectors, faiss)


def _new_faiss(D: int):
    try:
        import faiss
    except ImportError:
        raise UserError("use_faiss wants faiss: pip install faiss-cpu; without it the search is exact too") from None
    return faiss.IndexFlatIP(D)


# ----------------------------------------------------------------------------------------------------------------
# Command line


def export(args: argparse.Namespace) -> None:
    folder = Path(args.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not an empty folder; name another, or delete it")
    source = find_model(args.model)  # asked for once: the Hub answers slowly
    model = open_model(str(source))
    model = model._replace(pooling=args.pooler or model.pooling)
    check_pooling(model.bert, model.pooling)
    about = f"Made from `{args.model}` by `python embed.py export`, weights in {args.dtype}."
    save_model(model, folder, model_card(folder.resolve().name, model, about), args.dtype)
    if (source / RUN_CONFIG).is_file():  # a model of a run: what its card says of the run is still true
        write_atomically(folder / RUN_CONFIG, (source / RUN_CONFIG).read_bytes())
        write_atomically(folder / "README.md", (source / "README.md").read_text(encoding="utf-8") + "\n" + about + "\n")
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: pooling {model.pooling}, {size / 1e6:.1f} MB of weights"
          + f"; tensors of other parts that were left out: {len(model.bert.ignored)}" * bool(model.bert.ignored))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="embed.py", description="Sentences to vectors, similarity, search.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("model", metavar="MODEL", help="a model folder, a run's folder or a Hub name (NAME@REVISION)")
        sub.add_argument("--pooler", choices=POOLINGS, help="how a vector is made (default: the folder's own, else cls_before_pooler)")
        return sub

    sub = command("encode", "Vectors of the lines of a file.")
    sub.add_argument("file", metavar="FILE", help="one sentence a line, also .gz and .xz; - is standard input")
    sub.add_argument("--out", metavar="FILE.npy", help="a float32 array (n, D); without it, a JSON line for each sentence on standard output")
    sub.add_argument("--no-normalize", action="store_true", help="vectors as they are, not of length 1")
    sub = command("search", "The lines of a file that are most like a question.")
    sub.add_argument("file", metavar="FILE", help="one sentence a line, - is standard input; or an index")
    sub.add_argument("question", nargs="*", metavar="QUESTION", help="without one, each line of standard input is one")
    sub.add_argument("--top-k", type=int, default=5, metavar="K", help="how many at most (default: 5)")
    sub.add_argument("--threshold", type=float, default=-1.0, metavar="COSINE", help="only those at or above it (default: all)")
    sub.add_argument("--json", action="store_true", help="a JSON line for each that is found")
    sub.add_argument("--faiss", action="store_true", help="search by faiss, if it is installed")
    sub = command("index", "Keep the vectors of a file's lines, to be searched.")
    sub.add_argument("file", metavar="FILE", help="one sentence a line; - is standard input")
    sub.add_argument("out", metavar="INDEX", help="the file to write, NAME.safetensors")
    sub.add_argument("--dtype", choices=DTYPES, default="fp32", help="fp16 halves it (default: fp32)")
    sub = command("similarity", "The cosine of a sentence with others.")
    sub.add_argument("sentence", metavar="A")
    sub.add_argument("others", metavar="B", nargs="+")
    sub.add_argument("--json", action="store_true", help="a JSON line for each")
    sub = command("export", "Any checkpoint that is read here as a folder for transformers and sentence-transformers.")
    sub.add_argument("out", metavar="FOLDER")
    sub.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights; fp16 halves the file (default: fp32)")
    args = parser.parse_args()

    if args.command == "export":
        return export(args)
    model = DiffCSE(args.model, pooler=args.pooler)
    if args.command == "encode":
        sentences = list(read_lines(Path(args.file)))
        vectors = model.encode(sentences, return_numpy=True, normalize_to_unit=not args.no_normalize)
        if args.out:
            write_atomically(args.out, lambda file: np.save(file, vectors))
        else:
            for sentence, vector in zip(sentences, vectors):
                print(json.dumps({"sentence": sentence, "vector": vector.tolist()}))
    elif args.command == "similarity":
        for other, cosine in zip(args.others, model.similarity(args.sentence, args.others).tolist()):
            print(json.dumps({"a": args.sentence, "b": other, "cosine": cosine}) if args.json else f"{cosine:.4f}")
    elif args.command == "index":
        model.build_index(args.file)
        model.save_index(args.out, args.dtype)
        print(f"{args.out}: {len(model.sentences):,} sentences, {Path(args.out).stat().st_size / 1e6:.3g} MB")
    else:
        if args.file == "-" and not args.question:
            raise UserError("the sentences and the questions cannot both come from standard input: name a file, or ask a question")
        if args.file.endswith(".safetensors"):
            model.load_index(args.file, args.faiss)
        else:
            model.build_index(args.file, args.faiss)
        for question in args.question or _typed():
            for sentence, cosine in model.search(question, args.threshold, args.top_k):
                print(json.dumps({"question": question, "sentence": sentence, "cosine": cosine}) if args.json else f"{cosine:.4f}\t{sentence}", flush=True)


def _typed() -> Iterator[str]:
    """Lines of standard input; where a person types, after a prompt on stderr."""
    lines = read_lines(Path("-"))
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if (line := next(lines, None)) is None:
            return
        if line.strip():
            yield line


if __name__ == "__main__":
    run_main(main)
