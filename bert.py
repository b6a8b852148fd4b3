"""BERT from scratch: one encoder that is BERT, RoBERTa or DistilBERT, and its files.

Needs only torch: copy this file and use it alone. Outputs equal transformers' within 1e-5.

    model = load_bert("bert-base-uncased/")          # a folder with config.json and weights
    states = model(ids, mask)                        # (R, T), (R, T) bool -> (R, T, D)
    logits = load_bert(folder, mlm=True)(ids, mask)  # (R, T, W)

Reading order: attention, layer, embeddings, Bert, masked-LM head. The rest reads and writes files.
Shapes: R rows, T tokens including padding, D hidden size, H heads, W words of the vocabulary.
Not here: decoders, token types other than 0, relative positions, activations other than erf-GELU.
"""

import ctypes
import json
import math
import mmap
import operator
import re
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class ModelError(ValueError):
    """A model folder that is missing, damaged or not supported."""


@dataclass
class BertConfig:
    """Sizes and dropout rates, named as in Hugging Face's config.json. Defaults: bert-base."""

    model_type: str = "bert"  # bert, roberta or distilbert
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2  # DistilBERT has no token types: 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name, field in self.__dataclass_fields__.items():
            value, below = getattr(self, name), 1 if "dropout" in name else math.inf
            least = 0 if name in ("num_hidden_layers", "type_vocab_size", "pad_token_id") else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ModelError(f"{name} is {value!r}; expected an integer of at least {least}")
            if field.type is float and not (type(value) in (int, float) and 0 <= value < below):
                raise ModelError(f"{name} is {value!r}; expected a number >= 0 and < {below}")
        if self.hidden_size % self.num_attention_heads:
            raise ModelError("hidden_size is not divisible by num_attention_heads")
        if self.pad_token_id >= self.vocab_size:
            raise ModelError("pad_token_id is not below vocab_size")


DISTILBERT_CONFIG = {"dim": "hidden_size", "hidden_dim": "intermediate_size"}  # its field names
DISTILBERT_CONFIG |= {"n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
DISTILBERT_CONFIG |= {"attention_dropout": "attention_probs_dropout_prob"}
DISTILBERT_CONFIG |= {"dropout": "hidden_dropout_prob", "activation": "hidden_act"}
SUPPORTED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
SUPPORTED |= {"add_cross_attention": False}  # no others


class SelfAttention(nn.Module):
    """Multi-head attention. Shapes: queries (R, Q, D), x (R, T, D), mask (R, T) -> (R, Q, D)."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.dropout = cfg.attention_probs_dropout_prob
        self.query = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.key = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.value = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.output = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, queries: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:  # (R, T, D) -> (R, H, T, D / H)
            return t.unflatten(2, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(queries)), split(self.key(x)), split(self.value(x))
        keys = mask[:, None, None, :]  # the same for every head and every query
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)
        return self.output(x.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self-attention and a two-layer MLP, each followed by dropout, residual sum and LayerNorm."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.attention = SelfAttention(cfg)
        self.attention_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.up = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down = nn.Linear(cfg.intermediate_size, cfg.hidden_size)
        self.norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        distilbert = cfg.model_type == "distilbert"  # has no dropout before the residual sum
        self.attention_dropout = nn.Dropout(0.0 if distilbert else cfg.hidden_dropout_prob)
        self.dropout = nn.Dropout(cfg.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor, cls_only: bool = False) -> Tensor:
        queries = x[:, :1] if cls_only else x
        x = self.attention_norm(queries + self.attention_dropout(self.attention(queries, x, mask)))
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Embeddings(nn.Module):
    """Word + position + token-type embeddings, LayerNorm, dropout. Shapes: (R, T) -> (R, T, D)."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        D = cfg.hidden_size
        self.padding_offset = cfg.pad_token_id if cfg.model_type == "roberta" else None
        self.word = nn.Embedding(cfg.vocab_size, D)
        self.position = nn.Embedding(cfg.max_position_embeddings, D)
        self.token_type = nn.Embedding(cfg.type_vocab_size, D) if cfg.type_vocab_size else None
        self.norm = nn.LayerNorm(D, eps=cfg.layer_norm_eps)
        self.dropout = nn.Dropout(cfg.hidden_dropout_prob)

    def forward(self, ids: Tensor) -> Tensor:
        if self.padding_offset is None:
            positions = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        else:  # RoBERTa counts the tokens that are not padding, from pad_token_id + 1
            real = (ids != self.padding_offset).long()
            positions = real.cumsum(1) * real + self.padding_offset  # (R, T)
        x = self.word(ids) + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type.weight[0]  # one segment
        return self.dropout(self.norm(x))


class Bert(nn.Module):
    """The encoder."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = Embeddings(cfg)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.pooler: nn.Linear | None = None  # if the file has one; embed.py uses it
        unused = cfg.pad_token_id + 1 if cfg.model_type == "roberta" else 0
        self.max_length = cfg.max_position_embeddings - unused  # the longest row, in tokens
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.cfg.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return self.embeddings.word.weight.device

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cls_vector: Tensor | None = None,
        all_layers: bool = False,
        cls_only: bool = False,
    ) -> Tensor | list[Tensor]:
        """Shapes: ids (R, T); mask (R, T), True at tokens (default: everywhere) -> (R, T, D).

        cls_vector (R, D) replaces position 0 after the embeddings' LayerNorm and dropout, so
        nothing of [CLS] is left: this conditions DiffCSE's discriminator on h, as published.
        all_layers: returns a list, the embeddings' output and the output of each layer.
        cls_only: computes the last layer for position 0 alone, which is all that training reads.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        x = self.embeddings(ids)
        if cls_vector is not None:
            x = torch.cat([cls_vector[:, None].to(x.dtype), x[:, 1:]], dim=1)
        states = [x]
        for layer in self.layers:
            x = layer(x, mask, cls_only and layer is self.layers[-1])
            states.append(x)
        return states if all_layers else x


class MLMHead(nn.Module):
    """From states to a score for each word: dense, GELU, LayerNorm, tied word embeddings."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.dense = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """Shapes: (..., D), (W, D) -> (..., W)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), word_embeddings, self.bias)


class BertForMaskedLM(nn.Module):
    """Encoder and masked-LM head."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.bert = Bert(cfg)
        self.max_length = self.bert.max_length
        self.head = MLMHead(cfg)
        self.head.apply(self.bert.init_weights)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.bert(ids, mask), self.bert.embeddings.word.weight)

    @torch.no_grad()
    def predict_tokens(
        self, ids: Tensor, mask: Tensor, positions: Tensor, temperature: float | None = None
    ) -> Tensor:
        """The likeliest ids, or sampled ones, at positions (bool); others stay. Shapes: (R, T)."""
        tokens = [ids.new_zeros(0)]  # there may be no positions
        for states in self.bert(ids, mask)[positions].split(256):  # (n, D): all logits are large
            logits = self.head(states, self.bert.embeddings.word.weight)  # (n, W)
            if temperature is None:
                tokens.append(logits.argmax(-1))
            else:  # inverse-CDF sampling: one random number a row, where multinomial draws W
                cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (n, W)
                draw = 1 - torch.rand(len(logits), 1, device=ids.device)  # > 0, so never p = 0
                draw = draw * cumulative[:, -1:]  # the last value is 1 up to rounding
                tokens.append(torch.searchsorted(cumulative, draw).squeeze(1))
        return ids.masked_scatter(positions, torch.cat(tokens))


# ------------------------------------------------------------------------------------------------
# Files. safetensors: 8 bytes with the header's length, a JSON header, then the tensors' bytes

DTYPES = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32}
DTYPES |= {"BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}  # in the reference library's order
MAX_HEADER_SIZE = 100_000_000  # bytes; the reference library's limit


def cannot_read(path: str | Path, reason: object) -> ModelError:
    """The error for a file that cannot be read. A file of git-lfs is recognised."""
    try:
        with open(path, "rb") as file:
            if file.read(99).startswith(b"version https://git-lfs.github.com/spec/v1"):
                return ModelError(f"{path} is a git-lfs pointer, not the file; run: git lfs pull")
    except OSError as error:
        reason = error.strerror
    line = str(reason).split("\n")[0][:200]
    return ModelError(f"{path} cannot be read: {line}; copy or download it again")


def unique_names(pairs: list) -> dict:
    if len(pairs) != len({name for name, _ in pairs}):
        raise ValueError("a name occurs twice")  # readers would disagree about which one counts
    return dict(pairs)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped, copy-on-write: changing a tensor leaves the file as is.

    Raises: ModelError for a damaged file, before memory is allocated for an untrusted size.
    """
    tensors, position = {}, 0  # tensors fill the data without gaps
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        file_bytes = torch.frombuffer(data, dtype=torch.uint8)
        header_size = int.from_bytes(data[:8], "little")
        start, data_size = 8 + header_size, len(data) - 8 - header_size
        if data_size < 0 or header_size > MAX_HEADER_SIZE:
            raise ValueError(f"a header of {header_size} bytes in a file of {len(data)}")
        header = json.loads(data[8:start].decode(), object_pairs_hook=unique_names)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not all(type(text) is str for text in metadata.values()):
            raise ValueError("__metadata__ must map strings to strings")
        for begin, end, name in sorted((*header[name]["data_offsets"], name) for name in header):
            kind, shape = header[name]["dtype"], header[name]["shape"]
            valid = kind in DTYPES and all(type(n) is int and n >= 0 for n in shape + [begin, end])
            if not valid or any(n >= 2**64 for n in accumulate(shape, operator.mul)):
                raise ValueError(f"tensor {name!r} is damaged or not supported: {header[name]}")
            itemsize = DTYPES[kind].itemsize
            if begin != position or not end == begin + math.prod(shape) * itemsize <= data_size:
                raise ValueError(f"tensor {name!r} does not match its bytes: {header[name]}")
            flat, position = file_bytes[start + begin : start + end], end
            if (start + begin) % itemsize:  # the header may have any length
                flat = flat.clone()  # aligned
            tensors[name] = flat.view(DTYPES[kind]).reshape(shape)
        if position != data_size:
            raise ValueError(f"{data_size - position} bytes belong to no tensor")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise cannot_read(path, error) from None
    aliases = metadata or {}  # safetensors' save_model stores a shared tensor under one name
    return {alias: tensors[name] for alias, name in aliases.items() if name in tensors} | tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (list(kinds).index(tensors[name].dtype), name))
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers requires this entry
    for name in names:
        kind, shape = kinds[tensors[name].dtype], list(tensors[name].shape)
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous()
            file.write(ctypes.string_at(flat.data_ptr(), flat.nbytes))


# ------------------------------------------------------------------------------------------------
# Model folders. NAMES: our name, then Hugging Face's: one for all families; or two, of BERT and
# RoBERTa, and of DistilBERT; or three, one for each. A layer's names follow "layers.3.".

NAMES = """
embeddings.word        embeddings.word_embeddings
embeddings.position    embeddings.position_embeddings
embeddings.token_type  embeddings.token_type_embeddings
embeddings.norm        embeddings.LayerNorm
layers                 encoder.layer               transformer.layer
attention.query        attention.self.query        attention.q_lin
attention.key          attention.self.key          attention.k_lin
attention.value        attention.self.value        attention.v_lin
attention.output       attention.output.dense      attention.out_lin
attention_norm         attention.output.LayerNorm  sa_layer_norm
up                     intermediate.dense          ffn.lin1
down                   output.dense                ffn.lin2
norm                   output.LayerNorm            output_layer_norm
pooler                 pooler.dense
head.dense             cls.predictions.transform.dense      lm_head.dense       vocab_transform
head.norm              cls.predictions.transform.LayerNorm  lm_head.layer_norm  vocab_layer_norm
head                   cls.predictions                      lm_head             vocab_projector
decoder                cls.predictions.decoder              lm_head.decoder     vocab_projector
"""
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}  # their classes
Model = Bert | BertForMaskedLM


def hf_name(ours: str, family: str, prefix: str) -> str:
    """layers.3.up.weight -> bert.encoder.layer.3.intermediate.dense.weight"""
    names = {}
    for name, *theirs in map(str.split, NAMES.strip().splitlines()):
        column = {"bert": 0, "roberta": 1 if len(theirs) == 3 else 0, "distilbert": -1}[family]
        names[name] = theirs[column]
    prefix = "" if ours.startswith("head.") else prefix
    module, _, kind = ours.removeprefix("bert.").rpartition(".")  # kind: weight or bias
    if layer := re.match(r"layers\.(\d+)\.", module):
        module, prefix = module[layer.end() :], f"{prefix}{names['layers']}.{layer[1]}."
    return f"{prefix}{names[module]}.{kind}"


def read_json(path: Path, kind: type = dict) -> dict | list:
    """A JSON object, or with kind=list an array. Raises: ModelError with the file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise cannot_read(path, error) from None
    return value


def read_config(folder: str | Path, dropout: float | None = None) -> BertConfig:
    """Raises: ModelError for a model that this file cannot compute."""
    raw = read_json(path := Path(folder) / "config.json")
    family = raw.get("model_type")
    if family not in list(FAMILIES):  # a list, because a damaged value may be unhashable
        raise ModelError(f"{path}: model_type is {family!r}; supported: {', '.join(FAMILIES)}")
    if family == "distilbert":
        raw = {DISTILBERT_CONFIG.get(name, name): value for name, value in raw.items()}
        raw = {"num_hidden_layers": 6} | raw | {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
    if family == "roberta":
        raw = {"vocab_size": 50265, "pad_token_id": 1} | raw
    elif raw.get("pad_token_id", 0) is None:  # RoBERTa alone computes with it
        raw["pad_token_id"] = 0
    for name, supported in SUPPORTED.items():
        if raw.get(name, supported) != supported:
            raise ModelError(f"{path}: {name} is {raw[name]!r}; supported: {supported!r}")
    if dropout is not None:
        raw |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    try:
        return BertConfig(**{name: raw[name] for name in asdict(BertConfig()) if name in raw})
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def read_bin(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file that torch.save wrote; code in it is not run. Raises: ModelError."""
    try:
        items = torch.load(path, map_location="cpu", weights_only=True).items()
        return {str(name): tensor.detach() for name, tensor in items}
    except Exception as error:  # torch raises many types
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ModelError(f"{path} has code ({code[1]!r}), which is never run") from None
        raise cannot_read(path, "it is not whole, or not a dict of tensors") from None


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """From model.safetensors or else pytorch_model.bin, each in one file or in shards."""
    for name, read in ("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin):
        path, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
        if path.is_file():
            return read(path)
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(s)).name != s for s in shards.values()):
                raise ModelError(f"{index} has no weight_map from tensors to files beside it")
            parts = [read(Path(folder) / shard) for shard in sorted({*shards.values()})]
            return {name: tensor for part in parts for name, tensor in part.items()}
    raise ModelError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


@torch.no_grad()
def load_bert(folder: str | Path, mlm: bool = False, dropout: float | None = None) -> Model:
    """A pretrained model in fp32, on the CPU, in eval mode; `dropout` overrides its rates.

    If any name begins with the family's prefix ("bert."), the encoder is those tensors alone, as in
    a DiffCSE checkpoint. `model.ignored`: unused names. Raises: ModelError for a wrong tensor.
    """
    cfg, tensors = read_config(folder, dropout), {}
    for name, tensor in read_weights(folder).items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # old names
        if name in tensors:
            raise ModelError(f"{folder}: two tensors are called {name!r}")
        tensors[name] = tensor
    family = cfg.model_type
    prefix = f"{family}." if any(name.startswith(f"{family}.") for name in tensors) else ""
    if mlm and any(name.startswith("discriminator.") for name in tensors):
        raise ModelError(f"{folder}: a DiffCSE checkpoint has no trained masked-LM head")
    with torch.device("meta"):  # no time is spent on weights that are replaced below
        model = BertForMaskedLM(cfg) if mlm else Bert(cfg)
        bert = model.bert if mlm else model
        if f"{prefix}pooler.dense.weight" in tensors and family != "distilbert":
            bert.pooler = nn.Linear(cfg.hidden_size, cfg.hidden_size)
    model.to_empty(device="cpu")
    for name, parameter in model.state_dict().items():
        theirs = hf_name(name, family, prefix)
        tensor = tensors.pop(theirs, None)
        what = f"{folder}: tensor {theirs!r} (expected: float {list(parameter.shape)})"
        if tensor is None:
            raise ModelError(f"{what} is missing; unused: {sorted(tensors)[:3]}")
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise ModelError(f"{what} is {tensor.dtype} {list(tensor.shape)}")
        parameter.copy_(tensor)  # fp16 and bf16 files become fp32
    if mlm:
        tied = {"decoder.weight": bert.embeddings.word.weight, "decoder.bias": model.head.bias}
        for ours, parameter in tied.items():
            theirs = hf_name(ours, family, "")  # most files leave it out
            if not torch.equal(tensors.get(theirs, parameter).float(), parameter):
                raise ModelError(f"{folder}: {theirs!r} is not tied, which is not supported")
    model.ignored = sorted(tensors)
    return model.eval()


def to_hf(model: Model) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names."""
    family = model.cfg.model_type
    return {hf_name(name, family, f"{family}."): t for name, t in model.state_dict().items()}


def save_bert(model: Model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """config.json and model.safetensors, for load_bert and for transformers."""
    cfg, folder = model.cfg, Path(folder)
    config = asdict(cfg) | {"hidden_act": "gelu", "tie_word_embeddings": True, "dtype": "float32"}
    if cfg.model_type == "distilbert":
        config |= {theirs: config[ours] for theirs, ours in DISTILBERT_CONFIG.items()}
    kind = "ForMaskedLM" if isinstance(model, BertForMaskedLM) else "Model"
    config["architectures"] = [FAMILIES[cfg.model_type] + kind]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.to(dtype) for name, tensor in to_hf(model).items()}
    write_safetensors(folder / "model.safetensors", tensors)
