"""BERT from scratch: one encoder that is BERT, RoBERTa or DistilBERT, and the files it is kept in.

Small to large: attention -> layer -> embeddings -> Bert -> MLMHead -> BertForMaskedLM, then safetensors read and
written byte by byte, then the tables that translate the three families' tensor names into ours and back. Hidden
states and masked-LM logits equal transformers' within 1e-5 (tests/test_bert.py).

Letters, the same in every file:
    B  sentences (rows) in a batch        D  hidden size, config.hidden_size
    T  tokens in a row, padding included  H  attention heads
    N  layers                             V  vocabulary size (in data.py and diffcse.py: views of a sentence)

Paper: Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa), Sanh et al. 2019 (DistilBERT).
Not here: token types other than 0, decoders and cross-attention, relative positions, activations other than
erf-GELU. config.json files that ask for one of these are refused.
"""

import contextlib
import itertools
import json
import math
import mmap
import operator
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fast


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong, where, and what to do. Exit code 2."""


# ----------------------------------------------------------------------------------------------------------------
# Configuration: the families differ by numbers only


@dataclass
class BertConfig:
    """Sizes and rates of one encoder, under the names that Hugging Face's config.json uses (defaults: bert-base)."""

    model_type: str = "bert"  # bert, roberta or distilbert
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512  # RoBERTa: 514, of which the first pad_token_id + 1 are never used
    type_vocab_size: int = 2  # RoBERTa: 1; DistilBERT: 0, it has no token types
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.model_type not in list(FAMILIES):  # list(): a JSON list cannot be looked up in a dict
            raise UserError(f"model_type is {self.model_type!r}: only {', '.join(FAMILIES)} are known here")
        if self.model_type == "distilbert":
            self.type_vocab_size = 0
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            if kind is int:
                least = 0 if name in ("num_hidden_layers", "type_vocab_size", "pad_token_id") else 1
                if type(value) is not int or value < least:
                    raise UserError(f"{name} is {value!r}: it must be a whole number of at least {least}")
            if kind is float:
                most = 1 if "dropout" in name else math.inf
                if type(value) not in (int, float) or not 0 <= value < most:
                    raise UserError(f"{name} is {value!r}: it must be a number of at least 0" + " and below 1" * (most == 1))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}")
        if self.pad_token_id >= self.vocab_size:
            raise UserError(f"pad_token_id is {self.pad_token_id}: the vocabulary has only {self.vocab_size} words")

    @classmethod
    def from_dict(cls, raw: dict) -> "BertConfig":
        """From a parsed config.json of any of the three families. Raises UserError for what is not supported."""
        raw = dict(raw)
        family = cls(model_type=raw.get("model_type", "bert")).model_type  # the first to be refused: the rest of another's is another's
        if family == "distilbert":  # the same things under other names
            other_names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
                           "hidden_dim": "intermediate_size", "dropout": "hidden_dropout_prob",
                           "attention_dropout": "attention_probs_dropout_prob", "activation": "hidden_act"}  # fmt: skip
            defaults = {"n_layers": 6}
            raw = {other_names.get(name, name): value for name, value in (defaults | raw).items()}
            raw["layer_norm_eps"] = 1e-12
        elif family == "roberta":
            raw = {"vocab_size": 50265, "pad_token_id": 1, "max_position_embeddings": 512, "type_vocab_size": 2} | raw
        if raw.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"hidden_act is {raw['hidden_act']!r}: only 'gelu' (the erf one) is built here")
        if raw.get("position_embedding_type", "absolute") != "absolute" or raw.get("sinusoidal_pos_embds"):
            raise UserError("only learned absolute position embeddings are built here")
        if raw.get("is_decoder") or raw.get("add_cross_attention"):
            raise UserError("is_decoder or add_cross_attention is set: only encoders are built here")
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})

    def to_dict(self) -> dict:
        """As config.json, with the fields that transformers needs to load the folder."""
        raw = {**asdict(self), "hidden_act": "gelu", "architectures": [FAMILIES[self.model_type].architecture],
               "tie_word_embeddings": True, "dtype": "float32"}  # fmt: skip
        if self.model_type == "distilbert":
            raw |= {"dim": self.hidden_size, "n_layers": self.num_hidden_layers, "n_heads": self.num_attention_heads,
                    "hidden_dim": self.intermediate_size, "dropout": self.hidden_dropout_prob,
                    "attention_dropout": self.attention_probs_dropout_prob, "activation": "gelu"}  # fmt: skip
        return raw


# ----------------------------------------------------------------------------------------------------------------
# The network, from small to large


class Linear(nn.Linear):
    """nn.Linear, multiplied as fast as this machine can. gelu: of GELU(x). Shapes: (..., in) -> (..., out)."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return fast.linear(x, self.weight, self.bias, gelu)


class Dropout(nn.Dropout):
    """nn.Dropout with cheaper random numbers. Shapes: any -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return fast.dropout(x, self.p, self.training)


@dataclass
class Grid:
    """Which places of a padded batch (B, T) are computed. Everything but attention works on their list, (n, D), and never sees the rest.

    Places are counted row by row, from 0 to B*T - 1.
    """

    B: int
    T: int
    mask: Tensor | None  # (B, T) bool, which places are read by attention (None: all)
    tokens: Tensor | None  # (N,) places that are computed, at least all that are read (None: all)
    wanted: Tensor | None  # (n,) those of them whose last layer is wanted (None: all)

    def spread(self, x: Tensor, places: Tensor | None) -> Tensor:
        """The list as a padded batch, zeros where nothing is. Shapes: (n, D), (n,) -> (B, T, D)."""
        return (x if places is None else x.new_zeros(self.B * self.T, x.shape[1]).index_copy(0, places, x)).view(self.B, self.T, x.shape[1])

    def pick(self, x: Tensor, places: Tensor | None) -> Tensor:
        """The list of a padded batch. Shapes: (B, T, D), (n,) -> (n, D)."""
        return x.flatten(0, 1) if places is None else x.flatten(0, 1)[places]

    def listed(self, places: Tensor | None) -> Tensor | None:
        """Where in the list of tokens these places are. Shapes: (n,) -> (n,)."""
        if self.tokens is None or places is None:
            return places
        number = torch.arange(len(self.tokens), device=self.tokens.device)
        return self.tokens.new_zeros(self.B * self.T).index_copy(0, self.tokens, number)[places]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each head. Shapes: (B, H, T, d), mask (B, T) -> (B, H, T, d)."""
    mask = None if mask is None else mask[:, None, None, :]  # every head and query sees the same keys
    if q.device.type != "cpu" or dropout == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (B, H, T, T): PyTorch's dropout here costs more than all the rest
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return fast.dropout(scores.softmax(-1), dropout, True) @ v


class SelfAttention(nn.Module):
    """Multi-head attention. Shapes: (N, D) and those who ask (n, D) -> (n, D)."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.heads, self.dropout = cfg.num_attention_heads, cfg.attention_probs_dropout_prob
        self.query = Linear(cfg.hidden_size, cfg.hidden_size)
        self.key = Linear(cfg.hidden_size, cfg.hidden_size)
        self.value = Linear(cfg.hidden_size, cfg.hidden_size)
        self.output = Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, grid: Grid, asking: Tensor, places: Tensor | None) -> Tensor:
        """x (N, D) is what is read, asking (n, D) who reads, at those places of the grid."""
        q, k, v = (
            grid.spread(project(of), at).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (n, D) -> (B, T, D) -> (B, H, T, D/H)
            for project, of, at in ((self.query, asking, places), (self.key, x, grid.tokens), (self.value, x, grid.tokens))
        )
        x = attention(q, k, v, grid.mask, self.dropout if self.training else 0.0)  # (B, H, T, D/H)
        return self.output(grid.pick(x.transpose(1, 2).flatten(2), places))  # (n, D)


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each followed by add-and-norm ("post-LN"). Shapes: (N, D) -> same, or (n, D) of the wanted."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.attention = SelfAttention(cfg)
        self.attention_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.up = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down = Linear(cfg.intermediate_size, cfg.hidden_size)
        self.norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        # DistilBERT has no dropout between attention and its residual sum: seen only in training, easily missed.
        self.attention_dropout = Dropout(0.0 if cfg.model_type == "distilbert" else cfg.hidden_dropout_prob)
        self.dropout = Dropout(cfg.hidden_dropout_prob)

    def forward(self, x: Tensor, grid: Grid, wanted: Tensor | None = None) -> Tensor:
        """wanted (n,): which of x are wanted; the others are only read, by attention."""
        asking, places = (x, grid.tokens) if wanted is None else (x[wanted], grid.wanted)
        x = self.attention_norm(asking + self.attention_dropout(self.attention(x, grid, asking, places)))
        return self.norm(x + self.dropout(self.down(self.up(x), gelu=True)))  # n x D -> n x 4D -> n x D


def places(where: Tensor, count: int | None = None) -> Tensor:
    """The places of True, row by row. Shapes: (B, T) bool -> (n,) int64, or (count,): with others behind them, so that a GPU need not wait for n."""
    return torch.argsort((~where).flatten().byte(), stable=True)[: int(where.sum()) if count is None else count]


class Embeddings(nn.Module):
    """Word + position (+ token type 0), normalised. Shapes: ids (B, T), places (N,) -> (N, D), N = B*T where no places are given."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.word = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)
        self.token_type = nn.Embedding(cfg.type_vocab_size, cfg.hidden_size) if cfg.type_vocab_size else None
        self.norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = Dropout(cfg.hidden_dropout_prob)

    def forward(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        if self.cfg.model_type == "roberta":  # counted over what is not padding, from pad_token_id + 1 (SPEC 8)
            real = (ids != self.cfg.pad_token_id).long()
            positions = real.cumsum(1) * real + self.cfg.pad_token_id  # (B, T)
        else:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)  # (B, T)
        ids, positions = (t.flatten() if places is None else t.flatten()[places] for t in (ids, positions))  # (N,)
        x = self.word(ids) + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type.weight[0]  # one segment: every token is of type 0
        return self.dropout(self.norm(x))


class Bert(nn.Module):
    """The encoder. Its weights start at N(0, initializer_range); `load_bert` puts pretrained ones in their place."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = Embeddings(cfg)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.pooler: nn.Linear | None = None  # set by load_bert where the file has one; only pooling "cls" uses it
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.cfg.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def max_length(self) -> int:
        """The longest row, in tokens, that the position embeddings allow."""
        offset = self.cfg.pad_token_id + 1 if self.cfg.model_type == "roberta" else 0
        return self.cfg.max_position_embeddings - offset

    @property
    def device(self) -> torch.device:
        return self.embeddings.word.weight.device

    def forward(self, ids: Tensor, mask: Tensor | None = None, cls_vector: Tensor | None = None, all_layers: bool = False,
                tokens: Tensor | None = None, wanted: Tensor | None = None) -> Tensor | list[Tensor]:  # fmt: skip
        """Encode a padded batch.

        Shapes: ids (B, T) int64; mask (B, T), nonzero where a token is real (None: everywhere); cls_vector (B, D).
            Returns the last layer (B, T, D), or with all_layers the list X_0 (embedding output), X_1 .. X_N.
        cls_vector takes the place of position 0 AFTER the embeddings' LayerNorm and dropout, so that nothing of
            the [CLS] token itself is left: this is how the discriminator is told h (SPEC 3).
        tokens (N,) and wanted (n,), from places(), leave work out. tokens: the places of the batch that are computed, at least
            its real ones: the rest is padding. wanted: some of them, of which alone the last layer is computed, past its
            keys and values. With either the last layer comes as a list: (n, D), or (N, D).
        """
        B, T = ids.shape
        grid = Grid(B, T, None if mask is None else mask.bool(), tokens, wanted)
        x = self.embeddings(ids, tokens)  # (N, D)
        if cls_vector is not None:
            x = x.index_copy(0, grid.listed(torch.arange(B, device=ids.device) * T), cls_vector.to(x.dtype))
        states, wanted = [x], grid.listed(wanted)
        for layer in self.layers:
            x = layer(x, grid, wanted if layer is self.layers[-1] else None)
            if all_layers:
                states.append(x)
        if not self.layers and wanted is not None:
            x = x[wanted]
        if all_layers:
            return [x.view(B, T, self.cfg.hidden_size) for x in states]
        return x.view(B, T, self.cfg.hidden_size) if tokens is None and wanted is None else x

    def set_dropout(self, p: float) -> None:
        """Use rate p in place of the two rates of the config."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            if isinstance(module, SelfAttention):
                module.dropout = p
        if self.cfg.model_type == "distilbert":  # after the loop, which visits a layer before the dropouts inside it
            for layer in self.layers:
                layer.attention_dropout.p = 0.0


class MLMHead(nn.Module):
    """From the last layer to a score for every word: dense, GELU, LayerNorm, then the word embeddings again.

    Shapes: (..., D) and the word embeddings (V, D) -> (..., V).
    """

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.dense = Linear(cfg.hidden_size, cfg.hidden_size)
        self.norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def transform(self, x: Tensor) -> Tensor:
        """Shapes: (..., D) -> (..., D), what is compared with every word."""
        return self.norm(F.gelu(self.dense(x)))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return fast.linear(self.transform(x), words, self.bias)


class BertForMaskedLM(nn.Module):
    """Encoder and MLM head. The decoder is the encoder's own word matrix, so there is nothing to re-tie."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.bert = Bert(cfg)
        self.head = MLMHead(cfg)
        self.head.apply(self.bert._init)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shapes: ids, mask (B, T) -> logits (B, T, V)."""
        return self.head(self.bert(ids, mask), self.bert.embeddings.word.weight)

    def fill(self, ids: Tensor, mask: Tensor, tokens: Tensor, wanted: Tensor, vocabulary: int, temperature: float | None = None) -> Tensor:
        """The best of the vocabulary's first words at the wanted places, or with a temperature a drawn one. Shapes: as in Bert.forward -> (n,) int64."""
        x = self.head.transform(self.bert(ids, mask, tokens=tokens, wanted=wanted))  # (n, D)
        return fast.best_words(x, self.bert.embeddings.word.weight[:vocabulary], self.head.bias[:vocabulary], temperature)


# ----------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes of length, a JSON header, the bytes of the tensors. github.com/huggingface/safetensors

DTYPES = {  # in the order in which the reference library lays tensors out
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the reference library's own limit


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of one file, memory-mapped: nothing is read from the disk before it is used.

    The tensors share memory with the file, privately: what is written into one never reaches the disk.
    Raises: UserError that names the file and what is wrong, before anything the size of a lie is allocated.
    """
    path = Path(path)

    def broken(what: str) -> UserError:
        return UserError(f"{path}: not a whole safetensors file: {what}; copy or download it again")

    def unique(pairs: list) -> dict:  # the library takes a tensor's last entry; two readers that differ on a file are how files deceive
        if len(pairs) != len({name for name, _ in pairs}):
            raise broken("a name stands twice in its header")
        return dict(pairs)

    size = path.stat().st_size
    if size < 8:
        raise broken(f"it has {size} bytes, and the length of the header alone takes 8")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header_size = int.from_bytes(data[:8], "little")
    if header_size > min(size - 8, MAX_HEADER):
        raise broken(f"its header claims {header_size} bytes and the file has {size}")
    try:
        header = json.loads(data[8 : 8 + header_size].decode("utf-8"), object_pairs_hook=unique)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
            raise ValueError("__metadata__ must be names and texts")
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        if any([type(part) for part in span] != [int, int, str] for span in spans):
            raise ValueError("data_offsets must be two whole numbers")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise broken(f"its header cannot be read ({type(error).__name__}: {error})") from None

    tensors, start, end_of_data = {}, 0, size - 8 - header_size
    for begin, end, name in spans:
        entry = header[name]
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise broken(f"tensor {name!r} is of type {dtype!r}; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise broken(f"tensor {name!r} has the shape {shape!r}")
        if begin != start or end < begin or end > end_of_data:
            raise broken(f"tensor {name!r} lies at {begin}..{end}, but {start}..{end_of_data} is what is left")
        if any(count >= 2**64 for count in itertools.accumulate(shape, operator.mul)):  # 2^70 x 0: empty, but more than can be counted
            raise broken(f"tensor {name!r} has the shape {shape!r}")
        numel = math.prod(shape)
        if numel * DTYPES[dtype].itemsize != end - begin:
            raise broken(f"tensor {name!r} of shape {shape} and type {dtype} does not fill its {end - begin} bytes")
        if numel:
            flat = torch.frombuffer(data, dtype=torch.uint8, offset=8 + header_size + begin, count=end - begin)
            # The format allows a header of any length, so tensors may start where their type may not: copy those.
            flat = flat.clone() if flat.data_ptr() % DTYPES[dtype].itemsize else flat
            tensors[name] = flat.view(DTYPES[dtype]).view(shape)
        else:
            try:
                tensors[name] = torch.empty(0, dtype=DTYPES[dtype]).reshape(shape)
            except (RuntimeError, TypeError):  # torch counts to 2^63
                raise broken(f"tensor {name!r} has the shape {shape!r}") from None
        start = end
    if start != end_of_data:
        raise broken(f"{end_of_data - start} bytes at its end belong to no tensor")
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write one file, whole or not at all. The layout is the reference library's: by type in the order of DTYPES, then by name."""
    names_of_types = {dtype: name for name, dtype in DTYPES.items()}
    rank = {dtype: i for i, dtype in enumerate(names_of_types)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header, start = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files without this format entry
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names_of_types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8

    def write(file) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)

    write_atomically(path, write)


def write_atomically(path: str | Path, content, advice: str = "what was there before is unharmed") -> None:
    """Write a file under a temporary name, force it to the disk, then rename: never half-written.

    content is text, bytes, or a function that writes to the open binary file. Raises UserError, with the advice, if the disk says no.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}; {advice}") from None
    finally:
        with contextlib.suppress(OSError):  # where its folder could not be made, there is nothing to remove
            temporary.unlink()


# ----------------------------------------------------------------------------------------------------------------
# Names: the three families call the same tensors by other names


@dataclass
class Family:
    """How one family names tensors. Templates map our names to theirs; {i} is a layer's number."""

    architecture: str  # the class that transformers loads a folder with
    prefix: str  # in front of the encoder's names where the file holds a head too
    encoder: dict[str, str]
    head: dict[str, str]
    decoder: str  # where some files repeat the word embeddings; most leave it out


_BERT_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{i}.attention.query": "encoder.layer.{i}.attention.self.query",
    "layers.{i}.attention.key": "encoder.layer.{i}.attention.self.key",
    "layers.{i}.attention.value": "encoder.layer.{i}.attention.self.value",
    "layers.{i}.attention.output": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.norm": "encoder.layer.{i}.output.LayerNorm",
    "pooler": "pooler.dense",
}
_DISTILBERT_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{i}.attention.query": "transformer.layer.{i}.attention.q_lin",
    "layers.{i}.attention.key": "transformer.layer.{i}.attention.k_lin",
    "layers.{i}.attention.value": "transformer.layer.{i}.attention.v_lin",
    "layers.{i}.attention.output": "transformer.layer.{i}.attention.out_lin",
    "layers.{i}.attention_norm": "transformer.layer.{i}.sa_layer_norm",
    "layers.{i}.up": "transformer.layer.{i}.ffn.lin1",
    "layers.{i}.down": "transformer.layer.{i}.ffn.lin2",
    "layers.{i}.norm": "transformer.layer.{i}.output_layer_norm",
}
FAMILIES = {
    "bert": Family("BertForMaskedLM", "bert.", _BERT_NAMES, {
        "dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias"}, "cls.predictions.decoder.weight"),
    "roberta": Family("RobertaForMaskedLM", "roberta.", _BERT_NAMES, {
        "dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"}, "lm_head.decoder.weight"),
    "distilbert": Family("DistilBertForMaskedLM", "distilbert.", _DISTILBERT_NAMES, {
        "dense": "vocab_transform", "norm": "vocab_layer_norm", "bias": "vocab_projector.bias"}, "vocab_projector.weight"),
}  # fmt: skip


def _their_name(ours: str, table: dict[str, str]) -> str:
    """layers.3.up.weight -> encoder.layer.3.intermediate.dense.weight"""
    if ours in table:  # the head's bias is a parameter of its own
        return table[ours]
    stem, _, kind = ours.rpartition(".")  # kind: weight or bias
    number = re.search(r"\.(\d+)\.", stem)
    template = re.sub(r"\.\d+\.", ".{i}.", stem)
    return table[template].replace("{i}", number[1] if number else "") + "." + kind


def to_hf(model: Bert | BertForMaskedLM) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names, prefixed as in a file that holds a head."""
    bert = model if isinstance(model, Bert) else model.bert
    family = FAMILIES[bert.cfg.model_type]
    tensors = {family.prefix + _their_name(k, family.encoder): v for k, v in bert.state_dict().items()}
    if isinstance(model, BertForMaskedLM):  # without the decoder: it is the word embeddings, as in HF's own files
        tensors |= {_their_name(k, family.head): v for k, v in model.head.state_dict().items()}
    return tensors


# ----------------------------------------------------------------------------------------------------------------
# Folders: config.json + model.safetensors, as Hugging Face keeps them


def read_json(path: Path, kind: type = dict) -> dict | list:
    """A JSON object from a file, or with kind=list a JSON array. Raises UserError that names the file and the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read: brackets within brackets, too deep") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON {'object in braces' if kind is dict else 'array in brackets'}, found {type(value).__name__}")
    return value


def load_config(folder: str | Path) -> BertConfig:
    """The folder's config.json. Raises UserError that names it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        return BertConfig.from_dict(read_json(path))
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from None


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder: model.safetensors, else its shards, else pytorch_model.bin without its code."""
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map, tensors = read_json(index).get("weight_map"), {}
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: it has no 'weight_map' from tensors to files")
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard:
                raise UserError(f"{index}: the shard {shard!r} is not a plain file name inside the folder")
            if not (folder / shard).is_file():
                raise UserError(f"{folder} lacks the shard {shard}, which {index.name} lists")
            tensors |= read_safetensors(folder / shard)
        if missing := sorted(set(weight_map) - set(tensors)):
            raise UserError(f"{index}: no shard holds {missing[0]!r}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
        return tensors
    if (folder / "pytorch_model.bin").is_file():
        try:
            tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds here
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{folder / 'pytorch_model.bin'}: cannot be read without running code from it ({reason[:120]})") from None
        if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
            raise UserError(f"{folder / 'pytorch_model.bin'}: it holds something other than named tensors")
        return tensors
    raise UserError(f"{folder} holds no weights: neither model.safetensors, nor its shards, nor pytorch_model.bin")


def _fill(module: nn.Module, prefix: str, table: dict[str, str], tensors: dict[str, Tensor], where) -> None:
    """Copy tensors into module's parameters, taking each out of the dict: what is left at the end was not used."""
    for ours, parameter in module.state_dict().items():
        theirs = prefix + _their_name(ours, table)
        if theirs not in tensors:
            raise UserError(f"{where}: the tensor {theirs!r} is missing")
        tensor = tensors.pop(theirs)
        if tensor.shape != parameter.shape:
            raise UserError(f"{where}: {theirs!r} has the shape {list(tensor.shape)}, config.json asks for {list(parameter.shape)}")
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {theirs!r} is of type {tensor.dtype}, not a floating-point type")
        parameter.copy_(tensor)  # fp16 and bf16 files become fp32 here


@torch.no_grad()
def load_bert(folder: str | Path, mlm: bool = False) -> Bert | BertForMaskedLM:
    """A model folder as Bert, or with its MLM head as BertForMaskedLM; fp32, on the CPU, in eval mode.

    Where any name starts with the family's prefix ("bert."), the encoder is exactly what does: a released DiffCSE
    checkpoint also holds "discriminator." and "generator.distilbert." tensors, which are others' (SPEC 4).
    The names of the tensors that were not used are in the result's `ignored`.
    Raises: UserError naming a tensor that is missing or of the wrong shape.
    """
    cfg = load_config(folder)
    family = FAMILIES[cfg.model_type]
    tensors = {}
    for name, tensor in read_weights(folder).items():
        modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # BERT's first, TensorFlow names
        if modern in tensors:
            raise UserError(f"{folder}: two tensors are both called {modern!r}")
        tensors[modern] = tensor
    prefix = family.prefix if any(name.startswith(family.prefix) for name in tensors) else ""
    with torch.device("meta"):  # no memory and no random numbers are spent on weights that the file replaces
        model = BertForMaskedLM(cfg) if mlm else Bert(cfg)
        bert = model.bert if mlm else model
        if f"{prefix}pooler.dense.weight" in tensors and "pooler" in family.encoder:
            bert.pooler = nn.Linear(cfg.hidden_size, cfg.hidden_size)
    model.to_empty(device="cpu")
    _fill(bert, prefix, family.encoder, tensors, folder)
    if mlm:
        if any(name.startswith("discriminator.") for name in tensors):
            raise UserError(f"{folder}: a DiffCSE checkpoint is no generator: its MLM head was never trained")
        _fill(model.head, "", family.head, tensors, folder)
        decoder = tensors.get(family.decoder)
        if decoder is not None and not torch.equal(decoder.float(), bert.embeddings.word.weight):
            raise UserError(f"{folder}: {family.decoder!r} is not the word embeddings: untied decoders are not built here")
    model.ignored = sorted(tensors)
    return model.eval()


def save_bert(model: Bert | BertForMaskedLM, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors into folder, for load_bert and for transformers.

    dtype is that of the file alone: both compute in fp32, as config.json says.
    """
    bert = model if isinstance(model, Bert) else model.bert
    config = bert.cfg.to_dict()
    if isinstance(model, Bert):
        config["architectures"] = [config["architectures"][0].replace("ForMaskedLM", "Model")]
    write_atomically(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.to(dtype) for name, tensor in to_hf(model).items()}
    write_safetensors(Path(folder) / "model.safetensors", tensors)
