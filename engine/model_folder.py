"""A folder for sentence-transformers and transformers, and back; the model card.

    model = load_model("sentence-transformers/all-MiniLM-L6-v2")  # a folder or a Hub name
    save_model(model, folder, model_card("a title", model, "How it was trained."))

Both libraries open a saved folder and compute the same vectors. Without this file a model would be
load_bert(folder) and Tokenizer(folder), and the user would have to know its pooling and length.
Not here: sentence-transformers' prompts, and modules other than those of read_st_modules.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from tokenizers import normalizers

from bert import FAMILIES, Bert, load_bert, read_json, read_weights, save_bert, write_safetensors
from data import Tokenizer
from engine.errors import UserError, atomic_folder
from engine.hub import find_model, read_settings

RUN_CONFIG = "run_config.json"  # in a model's folder: the settings of the run that made it
MAX_LENGTH = 128  # tokens, unless the folder says otherwise; as in the official diffcse/tool.py
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # of files; they are loaded as fp32
ST_POOLINGS = ("cls_before_pooler", "cls", "mean", "max")  # "cls" is their "cls" and a Dense layer
ST_FLAGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}  # "pooling_mode_..."
UNSUPPORTED = ("default_prompt_name", "truncate_dim", "tokenizer_args", "processor_kwargs")
UNSUPPORTED += ("model_args", "model_kwargs", "config_args", "config_kwargs", "processing_kwargs")
ST_FILES = (*FAMILIES, "camembert", "albert", "xlm-roberta", "xlnet")  # the first that is not empty
ST_TYPES = "sentence_transformers.models"
ST_FOLDERS = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Norm"}


class LoadedModel(NamedTuple):
    bert: Bert
    tokenizer: Tokenizer
    pooling: str  # the folder's own, else cls_before_pooler, for which DiffCSE trains
    max_length: int  # tokens per sentence, including [CLS] and [SEP]


def load_model(name: str | Path) -> LoadedModel:
    """A model folder, a run's folder, a sentence-transformers folder, or a Hub name.

    Raises: UserError or ModelError, with the file, for anything missing or unsupported.
    """
    folder = find_model(str(name))
    is_st = (folder / "modules.json").is_file()
    modules = read_st_modules(folder / "modules.json") if is_st else {"Transformer": folder}
    main = modules["Transformer"]
    bert = load_bert(main)
    tokenizer = Tokenizer(main).check_fits(main, bert.cfg.vocab_size)
    files = (read_settings(main / f"sentence_{kind}_config.json") for kind in ST_FILES)
    st_settings = next(filter(None, files), {})
    pooling = st_settings.get("pooling", "cls_before_pooler")  # written by save_model, not by them
    if is_st:
        pooling = pooling_from_st(modules["Pooling"] / "config.json")
    if "Dense" in modules:
        bert.pooler = load_tanh_layer(modules["Dense"], pooling, bert.cfg.hidden_size)
        pooling = "cls"

    st_config = read_settings(folder / "config_sentence_transformers.json")
    for name, value in (st_config | st_settings).items():
        if value and name in UNSUPPORTED or (name, value) == ("transformer_task", "fill-mask"):
            raise UserError(f"{folder}: sentence-transformers' {name} {value!r} is not supported")
    if st_settings.get("do_lower_case"):  # before the tokenizer's own normalisation
        own = tokenizer.backend.normalizer
        steps = list(own) if isinstance(own, normalizers.Sequence) else [own] if own else []
        if not any(isinstance(step, normalizers.Lowercase) for step in steps):
            steps = [normalizers.Lowercase(), *steps]
            tokenizer.backend.normalizer = normalizers.Sequence(steps)
    max_length = st_settings.get("max_seq_length") or MAX_LENGTH
    if is_st and not st_settings.get("max_seq_length"):  # their default
        tokens = read_settings(main / "tokenizer_config.json")
        max_length = tokens.get("model_max_length", tokens.get("max_len")) or bert.max_length
    if not isinstance(max_length, int) or max_length < 2:
        raise UserError(f"{main}: max_seq_length is {max_length!r}; it must be an integer above 1")
    return LoadedModel(bert, tokenizer, pooling, min(max_length, bert.max_length))


def read_st_modules(path: Path) -> dict[str, Path]:
    """The folder of each module in modules.json, by the module's kind."""
    modules = {}
    for module in read_json(path, list):
        module = module if isinstance(module, dict) else {"path": ""}
        full_name, name = str(module.get("type")), str(module.get("path"))
        kind = full_name.rpartition(".")[2]
        if name == ".." or Path(name).name != name:
            raise UserError(f"{path}: the module folder {name!r} is not a plain name")
        if not full_name.startswith("sentence_transformers."):
            kind = full_name  # code of its own
        if kind in modules:
            kind = f"a second {kind}"
        modules[kind] = path.parent / name
    optional = [kind for kind in ("Dense", "Normalize") if kind in modules]
    if list(modules) != ["Transformer", "Pooling", *optional]:
        known = "Transformer, Pooling, then optionally Dense and Normalize"
        raise UserError(f"{path}: its modules are {', '.join(modules)}; supported are {known}")
    return modules


def pooling_from_st(path: Path) -> str:
    config = read_json(path)
    mode = config.get("pooling_mode")
    if mode is None:  # before their version 6: a flag for each mode
        flags = [flag for flag, on in config.items() if flag.startswith("pooling_mode_") and on]
        names = [flag.removeprefix("pooling_mode_") for flag in flags]
        mode = "+".join(ST_FLAGS.get(name, name) for name in names)
    if mode not in list(known := ST_FLAGS.values()):
        raise UserError(f"{path}: pooling {mode!r} is not supported; supported: {', '.join(known)}")
    return "cls_before_pooler" if mode == "cls" else mode


def load_tanh_layer(folder: Path, pooling: str, D: int) -> nn.Linear:
    """A Dense module after [CLS]: pooling "cls". Shapes: (..., D) -> (..., D)."""
    config, weights = read_json(folder / "config.json"), read_weights(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    tanh = str(config.get("activation_function")).endswith(".Tanh")
    names = {config.get(f"module_{end}put_name") for end in ("in", "out")}
    supported = tanh and not config.get("use_residual") and pooling == "cls_before_pooler"
    supported = supported and names <= {None, "sentence_embedding"}
    if not supported or shapes != {"linear.weight": (D, D), "linear.bias": (D,)}:
        raise UserError(f"{folder}: supported is only a {D} x {D} tanh layer after pooling cls")
    layer = nn.Linear(D, D)
    layer.load_state_dict({name.removeprefix("linear."): t for name, t in weights.items()})
    return layer.eval()


def save_model(
    model: LoadedModel, folder: Path, card: str = "", dtype: str = "fp32", run_config: str = ""
) -> None:
    """Write the whole folder, in place of an existing one, or nothing.

    card: README.md. run_config: the text of RUN_CONFIG. With a pooling that sentence-transformers
    does not have, the folder is not one of theirs.
    """
    bert, tokenizer, pooling, max_length = model
    D, mode = bert.cfg.hidden_size, pooling.removesuffix("_before_pooler")
    files: dict[str, dict | list | str] = {"README.md": card}
    if run_config:
        files[RUN_CONFIG] = run_config
    st_settings = {"max_seq_length": min(max_length, bert.max_length)}
    files["sentence_bert_config.json"] = st_settings
    if pooling not in ST_POOLINGS:
        st_settings["pooling"] = pooling
    else:
        kinds = [kind for kind in ST_FOLDERS if kind != "Dense" or pooling == "cls"]
        files["modules.json"] = [
            {"idx": i, "name": str(i), "path": ST_FOLDERS[kind], "type": f"{ST_TYPES}.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        flags = {f"pooling_mode_{flag}": mode == theirs for flag, theirs in ST_FLAGS.items()}
        files["1_Pooling/config.json"] = {"word_embedding_dimension": D} | flags
        files["config_sentence_transformers.json"] = {"similarity_fn_name": "cosine"}
    if pooling == "cls":
        tanh = {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
        files["2_Dense/config.json"] = {"in_features": D, "out_features": D} | tanh
    with atomic_folder(folder) as new:
        save_bert(bert, new, DTYPES[dtype])
        tokenizer.save(new, bert.max_length)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text, encoding="utf-8")
        if pooling == "cls":
            state = bert.pooler.state_dict().items()
            dense = {f"linear.{name}": tensor.to(DTYPES[dtype]) for name, tensor in state}
            write_safetensors(new / "2_Dense" / "model.safetensors", dense)


def exported_card(title: str, model: LoadedModel, about: str, source: Path) -> str:
    """model_card; or the card of the run in `source`, if its scores are of the same pooling."""
    is_run = (source / RUN_CONFIG).is_file() and (source / "README.md").is_file()
    own = (source / "README.md").read_text(encoding="utf-8") if is_run else ""
    if f"Pooling: `{model.pooling}`." in own:
        return f"{own}\n{about}\n"
    if is_run:
        about += " The scores of its training are left out: its card is of another pooling."
    return model_card(title, model, about)


def model_card(title: str, model: LoadedModel, about: str, base_model: str = "") -> str:
    """README.md: front matter for the Hub, how to use the model, and `about` (Markdown)."""
    theirs = f"sentence-transformers does not have the pooling `{model.pooling}`."
    if model.pooling in ST_POOLINGS:
        theirs = """```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(FOLDER)
model.similarity(model.encode(["a man plays"]), model.encode(["he plays"]))
```"""
    base = f"\nbase_model: {base_model}" if base_model else ""
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, sentence-similarity, feature-extraction, diffcse]{base}
---
# {title}

Sentences to vectors of {model.bert.cfg.hidden_size} numbers, compared by cosine.
Pooling: `{model.pooling}`.

{theirs}

```python
from diffcse import DiffCSE
model = DiffCSE(FOLDER, pooler="{model.pooling}")
model.similarity("a man plays", ["he plays"])
```

`transformers.AutoModel.from_pretrained(FOLDER)` gives the encoder alone.

{about.rstrip()}
"""
