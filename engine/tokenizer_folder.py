"""A model folder's tokenizer: the ids that transformers' AutoTokenizer gives, or a refusal.

Without this file a tokenizer would be tokenizers.Tokenizer.from_file(folder / "tokenizer.json"). In
transformers the class decides more. BertTokenizer and RobertaTokenizer take only the vocabulary
from tokenizer.json, and the rest from tokenizer_config.json. Three more files may add tokens.
Reference: transformers 5, tokenization_utils_base.py (_from_pretrained), models/bert and roberta.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from bert import ModelError, cannot_read
from engine.errors import UserError
from engine.hub import read_settings

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BERT_TOKENS = dict(zip(ROLES[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")))
ROBERTA_TOKENS = dict(zip(ROLES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")))
CLASSES = {"BertTokenizer": BERT_TOKENS, "DistilBertTokenizer": BERT_TOKENS}
CLASSES |= {"RobertaTokenizer": ROBERTA_TOKENS}  # these three take only the vocabulary: rebuild()
CLASSES |= {"PreTrainedTokenizer": {}, "TokenizersBackend": {}, "XLMRobertaTokenizer": {}}
BPE_FILES = ["vocab.json", "merges.txt"]
EXTRA = ("extra_special_tokens", "additional_special_tokens")


def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, int | None]]:
    """The tokenizer, and its special tokens' ids by role; only that of mask_token may be None."""
    try:
        config = read_settings(folder / "tokenizer_config.json")
        name = find_class(folder, config)
        backend = read_backend(folder, name)
        settings = {"truncation_side": (backend.truncation or {}).get("direction")} | config
        for key in ("truncation_side", "split_special_tokens", "auto_map", EXTRA[0]):
            value = settings.get(key) or "right"
            if value != "right" and not isinstance(value, list):
                raise UserError(f"{folder}: the tokenizer's {key} {value!r:.60} is unsupported")
        pad = (backend.padding or {}).get("pad_token")
        backend.no_padding()
        added, special, extra = read_tokens(folder, name, config, backend)
        special = dict.fromkeys(ROLES) | {"pad_token": pad} | CLASSES[name] | special
        special = {r: t for r, t in special.items() if isinstance(t, (str, AddedToken))}
        family = BERT_TOKENS if backend.token_to_id("[CLS]") is not None else ROBERTA_TOKENS
        texts = family | {role: str(token) for role, token in special.items()}
        ids = {role: backend.token_to_id(text) for role, text in texts.items()}
        if missing := [texts[role] for role in ROLES[2:-1] if ids[role] is None]:
            raise ValueError(f"the vocabulary has no {missing[0]}")  # or git-lfs has not fetched it
        if CLASSES[name]:
            backend = rebuild(backend, config, texts, ids)
        elif name == "XLMRobertaTokenizer":  # of the normalizer it keeps sentencepiece's table only
            if ids["unk_token"] != 3:
                raise UserError(f"{folder}: the <unk> of an XLMRobertaTokenizer must have the id 3")
            scheme = "always" if config.get("add_prefix_space", True) else "never"
            splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", scheme)]
            backend.pre_tokenizer, steps = pre_tokenizers.Sequence(splits), backend.normalizer
            steps = steps if isinstance(steps, normalizers.Sequence) else [steps]
            kept = [step for step in steps if isinstance(step, normalizers.Precompiled)]
            backend.normalizer = normalizers.Sequence(kept)
        add_tokens(backend, folder, added, special, extra)
        a, ends = backend.encode("a").ids, [ids["cls_token"], ids["sep_token"]]
        if backend.num_special_tokens_to_add(False) != 2 or [a[0], a[-1]] != ends:
            raise UserError(f"{folder}: its {name} adds no [CLS] and [SEP]; a BertTokenizer would")
        return backend, ids
    except (UserError, ModelError):
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        files = (folder / file for file in ("tokenizer.json", "vocab.txt", "vocab.json"))
        reason = f"{error} (or a setting in tokenizer_config.json is wrong)"
        raise cannot_read(next(filter(Path.is_file, files), folder), reason) from None


def find_class(folder: Path, config: dict) -> str:
    """The class without "Fast": tokenizer_config.json's, else config.json's, else the family's."""
    model = read_settings(folder / "config.json")
    family = "RobertaTokenizer" if model.get("model_type") == "roberta" else "BertTokenizer"
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or family)
    if name.removesuffix("Fast") not in CLASSES:
        raise UserError(f"{folder}: the tokenizer {name} is not one of {', '.join(CLASSES)}")
    return name.removesuffix("Fast")


def read_backend(folder: Path, name: str) -> Tokenizer:
    """tokenizer.json's tokenizer, or one of the vocabulary's files and nothing else."""
    kind, parts = (WordPiece, ["vocab.txt"]) if CLASSES[name] is BERT_TOKENS else (BPE, BPE_FILES)
    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if not CLASSES[name] or isinstance(backend.model, kind):
            return backend
    elif CLASSES[name] and all((folder / part).is_file() for part in parts):
        return Tokenizer(kind.from_file(*(str(folder / part) for part in parts)))
    needed = f" of type {kind.__name__}, or {' and '.join(parts)}" if CLASSES[name] else ""
    raise UserError(f"{folder}: a {name} needs a tokenizer.json{needed}")


def read_tokens(folder: Path, name: str, config: dict, file: Tokenizer) -> tuple:
    """Added tokens by id, special ones by role, and special ones without a role."""

    def token(t: object) -> object:  # a string, or an AddedToken with its flags
        return AddedToken(**{k: t[k] for k in t if k != "__type"}) if isinstance(t, dict) else t

    in_file = file.get_added_tokens_decoder()
    numbered = config.get("added_tokens_decoder")  # None: written before transformers 4.34
    saved = read_settings(folder / "special_tokens_map.json") if numbered is None else {}
    special = {k: token(v) for k, v in (config | saved).items() if k.endswith("_token")}
    lists = [settings.get(key) or [] for settings in (config, saved) for key in EXTRA]
    extra = [token(value) for values in lists for value in values]
    added = {int(i): token(value) for i, value in (numbered or {}).items()}
    if numbered is None:
        texts = list(map(str, (*special.values(), *sum(lists[:3], []))))  # not saved's additional
        for text, i in read_settings(folder / "added_tokens.json").items():
            added[i] = AddedToken(text, special=text in texts, normalized=text not in texts)
        added |= in_file
    return added if CLASSES[name] else in_file | added, special, extra


def rebuild(backend: Tokenizer, config: dict, texts: dict, ids: dict) -> Tokenizer:
    """A BertTokenizer or a RobertaTokenizer with the vocabulary of `backend`, and nothing else."""
    model, backend, flag = backend.model, Tokenizer(backend.model), config.get
    ends = [(texts[role], ids[role]) for role in ("sep_token", "cls_token")]
    if isinstance(model, WordPiece):
        model.unk_token, model.continuing_subword_prefix = texts["unk_token"], "##"
        model.max_input_chars_per_word = 100
        cjk, lowercase = flag("tokenize_chinese_chars", True), flag("do_lower_case", True)
        backend.normalizer = normalizers.BertNormalizer(True, cjk, flag("strip_accents"), lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.post_processor = processors.BertProcessing(*ends)
        backend.decoder = decoders.WordPiece()
    else:
        model.dropout = model.unk_token = None
        model.fuse_unk = model.byte_fallback = model.ignore_merges = False
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(flag("add_prefix_space", False))
        backend.post_processor = processors.RobertaProcessing(*ends)
        backend.decoder = decoders.ByteLevel()
    return backend


def add_tokens(backend: Tokenizer, folder: Path, added: dict, special: dict, extra: list) -> None:
    """New tokens get the ids after the vocabulary's: added ones by id, special ones by role."""
    words, mask = backend.get_vocab(with_added_tokens=False), special.get("mask_token")
    texts, new = {str(token) for token in added.values()}, [*special.values(), *extra]
    new = [t for i, t in enumerate(new) if str(t) not in texts and t not in new[:i]]
    is_dense = max(words.values()) < len(words)  # no unused ids, which new tokens would overlap
    if is_dense and new and new[-1] == mask and str(mask) not in words:
        new.pop()  # a vocabulary without [MASK]: its model has no row for it
    new = [AddedToken(t, special=True) if isinstance(t, str) else t for t in new]
    backend.add_tokens([added[i] for i in sorted(added)] + new)
    misfits = [str(token) for i, token in added.items() if backend.token_to_id(str(token)) != i]
    if misfits or (not is_dense and backend.get_vocab_size() > len(words)):
        raise UserError(f"{folder}: added ids do not follow the vocabulary's: {misfits or 'gaps'}")
