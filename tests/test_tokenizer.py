"""A folder's tokenizer: transformers' ids, or a refusal that names the reason.

`python tests/test_tokenizer.py --folders 3000` makes more random folders than the suite, and prints
how many are equal, and why the others are refused. results/tokenizer.json: for two versions of
tokenizers, of which transformers accepts the second (its check of versions was turned off).
"""

# ruff: noqa: E402
import argparse
import collections
import json
import random
import re
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import NASTY, ROOT, SPECIAL_WORDS, WORDS, make_model, need_transformers_5, one_line
from sentence_transformers import SentenceTransformer
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, XLMRobertaTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from bert import BertConfig, BertForMaskedLM, ModelError, read_json, save_bert
from data import Tokenizer
from diffcse import DiffCSE
from embed import main as embed_main
from engine.errors import UserError
from engine.tokenizer_folder import CLASSES

SMALL = ROOT / "assets" / "small-bert"
BERT_WORDS = [*SPECIAL_WORDS, *"the cat sat on mat 1 2 The user É é ß 漢 字 🙂 ##é".split()]
BERT_WORDS += [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
BERT_WORDS += list("[]<>#,.-'AİC")
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ADDED = ["[USER]", "<ent>", "cat", "newword", "@handle", "İß", "ab cd", "[unused1]", "the", "漢字x"]
BERT_NAMES = ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer"]
BPE_NAMES = ["RobertaTokenizer", "RobertaTokenizerFast"]
COMPLETE_NAMES = ["PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer"]
FLAGS = ("do_lower_case", "tokenize_chinese_chars", "add_prefix_space", "trim_offsets")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def small_config(**changes) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 140, "initializer_range": 0.3}
    return BertConfig(**sizes | changes)


# ------------------------------------------------------------------------------------------------
# Random folders


def random_vocabulary(folder: Path, rng: random.Random, roberta: bool) -> tokenizers.Tokenizer:
    """Files of a vocabulary, at times without [MASK], shuffled, or with an unused id."""
    kept = rng.choice([4, 5, 5, 5, 5, 5])
    if roberta:
        bpe = tokenizers.ByteLevelBPETokenizer()
        special = ROBERTA_SPECIAL[:kept]
        bpe.train_from_iterator(NASTY, 330, show_progress=False, special_tokens=special)
        bpe.save_model(str(folder))
        return bpe._tokenizer
    words = [word for word in BERT_WORDS if word not in SPECIAL_WORDS[kept:]]
    if rng.random() < 0.15:
        words.insert(rng.randrange(5, len(words)), "the")  # twice
    if rng.random() < 0.2:
        rng.shuffle(words)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    ids = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=rng.random() < 0.5)
    splitters = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Whitespace()]
    backend.pre_tokenizer = rng.choice(splitters)
    return backend


def save_backend(folder: Path, rng: random.Random, backend, roberta: bool, added: list) -> None:
    """tokenizer.json, at times without a post-processor."""
    special = ROBERTA_SPECIAL if roberta else SPECIAL_WORDS
    known = [word for word in special if backend.token_to_id(word) is not None]
    if rng.random() < 0.5:
        backend.add_special_tokens(known)
    if rng.random() < 0.3:
        backend.add_tokens(added)
    cls, sep = (
        (w, backend.token_to_id(w)) for w in (special[::2] if roberta else special[2:4])[:2]
    )
    kind = processors.RobertaProcessing if roberta else processors.BertProcessing
    if rng.random() < 0.7:
        backend.post_processor = kind(sep, cls)
    elif roberta:
        backend.post_processor = processors.ByteLevel()
    if rng.random() < 0.1:
        backend.enable_truncation(7, direction=rng.choice(["left", "right"]))
    if rng.random() < 0.2:
        backend.enable_padding(length=9, pad_token=special[1 if roberta else 0])
    backend.save(str(folder / "tokenizer.json"))
    if rng.random() < 0.5:
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)


def random_folder(folder: Path, rng: random.Random) -> list[str]:
    """Any combination of the files and flags. Returns the added tokens."""

    def chance(p: float) -> bool:
        return rng.random() < p

    def token(text: str) -> dict:
        names = ("single_word", "lstrip", "rstrip", "normalized")
        return {"content": text} | {name: chance(0.3) for name in names}

    def place(key: str, values: list[str]) -> None:
        """In tokenizer_config.json, or in special_tokens_map.json, which has other fields."""
        more = {"special": chance(0.5), "__type": "AddedToken"} if (here := chance(0.6)) else {}
        plain = chance(0.5) or not here and not key.endswith("_token")
        values = [text if plain else token(text) | more for text in values]
        (config if here else saved)[key] = values[0] if key.endswith("_token") else values

    family = rng.choice(["bert", "bert", "roberta", "roberta", "distilbert"])
    roberta = family == "roberta" and chance(0.9)  # some RoBERTas have a BERT's vocabulary
    backend = random_vocabulary(folder, rng, roberta)
    size, added = backend.get_vocab_size(), rng.sample(ADDED, rng.choice([0, 0, 1, 2, 3]))
    known, config, saved = backend.get_vocab(), {}, {}
    if has_json := chance(0.6):
        save_backend(folder, rng, backend, roberta, added)
    names = (BPE_NAMES if roberta else BERT_NAMES) + COMPLETE_NAMES * has_json
    if chance(0.7) or roberta != (family == "roberta"):
        config["tokenizer_class"] = rng.choice(names if chance(0.95) else BERT_NAMES + BPE_NAMES)
    config |= {flag: chance(0.5) for flag in FLAGS if chance(0.5)}
    if chance(0.5):
        config["strip_accents"] = rng.choice([None, True, False])
    for role, text in CLASSES["RobertaTokenizer" if roberta else "BertTokenizer"].items():
        if chance(0.3):
            place(role, [text])
    if chance(0.1):
        texts = rng.choice([sorted(known), ["<bos>", "<eos>"]])
        config["bos_token"], config["eos_token"] = rng.sample(texts, 2)
    for key, values, p in [
        ("mask_token", [None], 0.03),
        ("add_bos_token", [True, False], 0.1),
        ("truncation_side", ["left", "right"], 0.05),
        ("split_special_tokens", [True, False], 0.04),
    ]:
        if chance(p):
            config[key] = rng.choice(values)
    new = [text for text in added if text not in known]
    shift = rng.choice([0] * 20 + [3])
    ids = {text: known.get(text, size + shift + i) for i, text in enumerate(new)} | {
        text: known[text] for text in added if text in known
    }
    if chance(0.4):
        write_json(folder / "added_tokens.json", dict(rng.sample(list(ids.items()), len(ids))))
    if chance(0.3):
        ids |= {text: i for text, i in known.items() if i < 5 and chance(0.5)}
        config["added_tokens_decoder"] = {str(i): token(text) for text, i in ids.items()}
    if chance(0.3):
        place(rng.choice(["additional_special_tokens", "extra_special_tokens"]), added[:2])
    elif chance(0.1):
        config["extra_special_tokens"] = {}  # as transformers 4.48 to 4.57 write it
    elif chance(0.05):
        config["extra_special_tokens"] = {f"own{i}_token": text for i, text in enumerate(added)}
    if saved:
        write_json(folder / "special_tokens_map.json", saved)
    if config:
        write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": family})
    return added


def random_texts(rng: random.Random, tokens: list[str]) -> list[str]:
    """Nasty ones, and tokens alone, inside words, in other case, and beside spaces."""
    rows = [text[:400] for text in rng.sample(NASTY, 30)]
    for text in [*tokens, "[MASK]", "<mask>", "<s>", "[SEP]"]:
        rows += [text, f"un{text}ly a", f"the {text} .", f" {text.upper()}\u200d{text.lower()}  x"]
    return rows


def compare(folders: int, root: Path) -> dict[str, int]:
    """How many folders are equal; the reasons of the others, and how often each occurs."""
    counts = collections.Counter()
    for seed in range(folders):
        rng, folder = random.Random(seed), root / str(seed)
        folder.mkdir()
        rows = random_texts(rng, random_folder(folder, rng))
        try:
            ours = Tokenizer(folder)
        except (UserError, ModelError) as error:
            assert "\n" not in str(error) and str(error).startswith(str(folder))
            reason = re.sub(r"a \w+Tokenizer|[\[{]'.*", "X", str(error).split(maxsplit=1)[1])
            counts[reason] += 1
            continue
        theirs = AutoTokenizer.from_pretrained(folder)
        if ours.mask_id is None:  # they add one, whose id no model has a row for
            rows = [row for row in rows if "mask" not in row.lower()]
        for max_length in (2, 5, 4000):
            expected = theirs(rows, truncation=True, max_length=max_length)["input_ids"]
            for row, a, b in zip(rows, ours(rows, max_length), expected, strict=True):
                assert a == b, (seed, row, a, b)
        for role in ("cls", "sep", "pad", "unk", "mask"):
            their_id = getattr(theirs, f"{role}_token_id")
            assert getattr(ours, f"{role}_id") == their_id or None in (ours.mask_id, their_id), seed
        counts["equal"] += 1
    return dict(counts)


def test_random_folders_equal_transformers_or_are_refused(tmp_path):
    need_transformers_5()
    assert len(set(BERT_WORDS)) == len(BERT_WORDS)
    counts = compare(400, tmp_path)
    assert counts.pop("equal") > 290 and len(counts) >= 6, counts


# ------------------------------------------------------------------------------------------------
# Folders that people have


@pytest.fixture
def small(tmp_path) -> Path:
    """The small BERT with the files of a BertTokenizer."""
    folder = Path(shutil.copytree(SMALL, tmp_path / "small"))
    words = read_json(folder / "tokenizer.json")["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    change_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    return folder


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, content | changes)


TRIO = ("Save an array to a file.", "Store a matrix on disk.", "Open a web page.")


def test_a_tokenizer_json_without_post_processor(small):
    change_json(small / "tokenizer.json", post_processor=None)
    model = DiffCSE(small)
    cosines = [m.similarity(TRIO[0], list(TRIO[1:])) for m in (model, DiffCSE(SMALL))]
    assert np.allclose(*cosines, atol=1e-6)
    assert -1 <= model.similarity("", "x") <= 1
    change_json(small / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    template = {"single": [{"SpecialToken": {"id": t, "type_id": 0}} for t in ("[CLS]", "[SEP]")]}
    template["single"][1:1] = [{"Sequence": {"id": "A", "type_id": 0}}, template["single"][1]]
    ids = {"[CLS]": 2, "[SEP]": 3}
    words = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()}
    template |= {"type": "TemplateProcessing", "pair": template["single"], "special_tokens": words}
    for processor in (None, template):  # nothing, and two [SEP]
        change_json(small / "tokenizer.json", post_processor=processor)
        with pytest.raises(UserError, match=r"adds no \[CLS\] and \[SEP\]; a BertTokenizer"):
            Tokenizer(small)


def test_an_added_token_is_one_token_in_training_files_and_saved_models(small, tmp_path, command):
    """vocab.txt and added_tokens.json, and a model that has a row for the new id."""
    (small / "tokenizer.json").unlink()
    write_json(small / "added_tokens.json", {"[USER]": 8192})
    with pytest.raises(UserError, match=r"'\[USER\]' has id 8192; the model has 8192 ids"):
        Tokenizer(small).check_fits(small, 8192)
    save_bert(BertForMaskedLM(small_config(vocab_size=8193)), small)
    assert command(embed_main, "export", small, tmp_path / "new").code == 0
    for folder in (small, tmp_path / "new"):
        ids = Tokenizer(folder)(["dear [USER] !"], 32)[0]
        assert ids == AutoTokenizer.from_pretrained(folder)("dear [USER] !")["input_ids"]
        assert ids.count(8192) == 1
        assert DiffCSE(folder).encode("dear [USER] !").isfinite().all()


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("flag", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
@pytest.mark.parametrize("value", [True, False])
def test_the_config_wins(small, with_json, flag, value):
    if not with_json:
        (small / "tokenizer.json").unlink()
    change_json(small / "tokenizer_config.json", **{flag: value})
    ours, theirs = Tokenizer(small), AutoTokenizer.from_pretrained(small)
    assert ours(NASTY, 100_000) == theirs(NASTY)["input_ids"]
    changed = ours(["ÀÉÎ Cafés 漢字かな"], 99) != Tokenizer(SMALL)(["ÀÉÎ Cafés 漢字かな"], 99)
    assert changed != value  # small-bert has all three


@pytest.mark.parametrize("name", ["BertJapaneseTokenizer", "PhobertTokenizer", "BertweetTokenizer"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_class_with_code_of_its_own_is_refused_by_name(small, name, file):
    change_json(small / "tokenizer_config.json", tokenizer_class=None)
    change_json(small / file, tokenizer_class=name)
    with pytest.raises(
        UserError, match=f"the tokenizer {name} is not one of BertTokenizer, "
    ) as error:
        Tokenizer(small)
    assert one_line(error)


def test_a_sentencepiece_tokenizer_json_is_taken_as_it_is(tmp_path):
    """As of multilingual MiniLM and E5: model_type bert, tokenizer_class XLMRobertaTokenizer."""
    need_transformers_5()
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁the", "▁cat", "s", "a", "漢", "<mask>"]
    theirs = XLMRobertaTokenizer([(piece, -float(i)) for i, piece in enumerate(pieces)])
    theirs.save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    path, spaces = tmp_path / "tokenizer.json", ["the  cat", " the\tcats", "THE ﬁ"]
    lower = {"type": "Lowercase"}
    metaspace = json.loads(path.read_text())["pre_tokenizer"]["pretokenizers"][1]
    for changes, config in [
        ({}, {}),
        ({"normalizer": lower}, {}),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, lower]}}, {}),
        ({"pre_tokenizer": metaspace}, {"add_prefix_space": False}),
    ]:
        change_json(path, **changes)
        change_json(tmp_path / "tokenizer_config.json", **config)
        ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert ours(NASTY + spaces, 100_000) == theirs(NASTY + spaces)["input_ids"]
        assert ours.pad_id == 1 and ours.mask_id == 10


def test_an_xlm_roberta_tokenizer_of_another_order_is_refused(tmp_path):
    """transformers takes id 3 for <unk>, whatever tokenizer.json says."""
    pieces = [(piece, 0.0) for piece in ["<unk>", "<s>", "</s>", "<pad>", "▁a"]]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    with pytest.raises(UserError, match="the <unk> of an XLMRobertaTokenizer must have the id 3"):
        Tokenizer(tmp_path)


def test_settings_of_a_bpe_model_that_transformers_drops(tmp_path):
    need_transformers_5()
    vocabulary = {word: i for i, word in enumerate([*ROBERTA_SPECIAL, *"abcd", "ab", "bc", "abc"])}
    flags = {"dropout": 0.9, "unk_token": "<unk>", "fuse_unk": True, "ignore_merges": True}
    bpe = tokenizers.models.BPE(vocabulary, [("a", "b")], byte_fallback=True, **flags)
    tokenizers.Tokenizer(bpe).save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"model_type": "roberta"})
    rows = ["abc", "zz", "abzzc", "bcd", "", "é"] * 9
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer(tmp_path)(rows, 99) == theirs(rows)["input_ids"]


def test_a_special_token_that_only_the_older_files_name(small):
    """In any case, if the text is lower-cased: transformers 5 does not call it special."""
    need_transformers_5()
    (small / "tokenizer.json").unlink()
    write_json(small / "added_tokens.json", {"[User]": 8192})
    write_json(small / "special_tokens_map.json", {"additional_special_tokens": ["[User]"]})
    rows = ["a [User] b", "a [USER] b", "a[user]b"]
    ids = Tokenizer(small)(rows, 99)
    assert ids == AutoTokenizer.from_pretrained(small)(rows)["input_ids"]
    assert all(8192 in row for row in ids)


def test_a_complete_tokenizer_that_names_no_special_token(tmp_path, small):
    """A saved one can pad in transformers. Its own tokens stay though the config lists others."""
    need_transformers_5()
    change_json(small / "tokenizer.json", added_tokens=[])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 9}
    write_json(small / "tokenizer_config.json", config)
    tokenizer = Tokenizer(small)
    tokenizer.save(tmp_path / "saved", 9)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.pad_token, theirs.mask_token) == ("[PAD]", None)
    rows = ["a [MASK] b", "the cat", "[CLS] a", "un[MASK]ly"]
    assert tokenizer(rows, 99) == theirs(rows)["input_ids"]

    shutil.copy(SMALL / "tokenizer.json", small)
    mask = {"content": "[MASK]", "single_word": True, "__type": "AddedToken"}
    change_json(small / "tokenizer_config.json", mask_token=mask, added_tokens_decoder={})
    theirs = AutoTokenizer.from_pretrained(small)
    assert Tokenizer(small)(rows, 99) == theirs(rows)["input_ids"] != tokenizer(rows, 99)


def test_unused_ids_count(tmp_path):
    """A vocabulary's largest id is what the model must have a row for."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_WORDS, "a", "a", "b"]))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, len(tokenizer.vocabulary())) == (8, 7)
    assert tokenizer(["a b"], 9) == [[2, 6, 7, 3]]
    with pytest.raises(UserError, match="'b' has id 7; the model has 7 ids"):
        tokenizer.check_fits(tmp_path, 7)
    write_json(tmp_path / "added_tokens.json", {"new": 7})  # transformers would number it so
    no_mask = "\n".join([*SPECIAL_WORDS[:4], "a", "a", "b"])  # and [MASK], as it adds one
    for vocabulary in ((tmp_path / "vocab.txt").read_text(), no_mask):
        (tmp_path / "vocab.txt").write_text(vocabulary)
        with pytest.raises(UserError, match="added ids do not follow the vocabulary's: gaps"):
            Tokenizer(tmp_path)
        (tmp_path / "added_tokens.json").unlink(missing_ok=True)


def test_without_mask_token_a_model_encodes_and_is_not_trained(tmp_path, train_tiny):
    words = [*SPECIAL_WORDS[:4], "the", "cat"]
    make_model(tmp_path / "model", len(words))
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words))
    assert DiffCSE(tmp_path / "model").encode("the cat").isfinite().all()
    with pytest.raises(UserError, match="has no mask token, which is needed"):
        train_tiny(model=str(tmp_path / "model"), lam=0.0)


MERGES = "#version: 0.2\n"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
BERT_VOCAB = "\n".join(BERT_WORDS)
BAD_FOLDERS = [
    ({}, "a BertTokenizer needs a tokenizer.json of type WordPiece, or vocab.txt"),
    ({"config.json": '{"model_type": "roberta"}', "vocab.json": "{}"}, "or vocab.json and merges"),
    (
        {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizer"}'},
        "needs a tokenizer.json$",
    ),
    ({"tokenizer.json": "{}"}, "cannot be read"),
    ({"tokenizer.json": LFS_POINTER}, "tokenizer.json is a git-lfs pointer.*git lfs pull"),
    ({"vocab.txt": LFS_POINTER}, "vocab.txt is a git-lfs pointer.*git lfs pull"),
    ({"vocab.txt": ""}, "cannot be read"),
    ({"vocab.txt": BERT_VOCAB, "added_tokens.json": '{"[A]": 99}'}, r"vocabulary's: \['\[A\]'\]"),
    (
        {
            "vocab.txt": BERT_VOCAB,
            "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["a", null]}}',
        },
        "auto_map",
    ),
    ({"vocab.txt": "\n".join(["[CLS]", *WORDS])}, r"the vocabulary has no \[UNK\] \(or"),
    ({"vocab.txt": "", "tokenizer_config.json": "{"}, "tokenizer_config.json"),
    (
        {
            "config.json": '{"model_type": "roberta"}',
            "vocab.json": '{"a": 0}',
            "merges.txt": MERGES,
        },
        "cannot be read",
    ),
]


@pytest.mark.parametrize("files, message", BAD_FOLDERS)
def test_bad_folders_are_user_errors(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises((UserError, ModelError), match=message) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "RobertaTokenizer",
            "a RobertaTokenizer needs a tokenizer.json of type BPE, or vocab.json",
        ),
        ("PreTrainedTokenizerFast", r"the vocabulary has no \[PAD\]"),
    ],
)
def test_tokenizer_json_of_another_kind_or_without_padding(tmp_path, name, message):
    words = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name})
    with pytest.raises((UserError, ModelError), match=message):
        Tokenizer(tmp_path)


def test_mistakes_of_a_call_are_user_errors():
    tokenizer = Tokenizer(SMALL)
    with pytest.raises(UserError, match=r"'half of .* is not valid Unicode: a lone surr") as error:
        tokenizer(["fine", "half of \ud83d"], 4)
    assert one_line(error)
    with pytest.raises(UserError, match=r"max_length is 1: \[CLS\] and \[SEP\] alone take 2"):
        tokenizer(["a"], 1)


# ------------------------------------------------------------------------------------------------
# Saved models, threads


def random_model(folder: Path, rng: random.Random) -> list[str] | None:
    """A model that fits a random folder's tokenizer, if that is not refused. Returns texts."""
    folder.mkdir(parents=True)
    rows = random_texts(rng, random_folder(folder, rng))[::3]
    try:
        tokenizer = Tokenizer(folder)
    except (UserError, ModelError):
        return None
    family = json.loads((folder / "config.json").read_text())["model_type"]
    sizes = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    sizes["type_vocab_size"] = 0 if family == "distilbert" else 2
    save_bert(BertForMaskedLM(small_config(model_type=family, **sizes)), folder)
    named = AutoTokenizer.from_pretrained(folder)  # without pad_token, it cannot pad
    return rows if tokenizer.mask_id is not None and named.pad_token else None


def test_models_saved_from_random_folders_are_the_same_in_three_libraries(tmp_path, command):
    need_transformers_5()
    folders = {tmp_path / str(seed): random.Random(seed) for seed in range(24)}
    texts = {folder: random_model(folder, rng) for folder, rng in folders.items()}
    assert len(texts := {folder: rows for folder, rows in texts.items() if rows}) >= 10
    for source, rows in texts.items():
        saved = source.with_name(f"{source.name}-saved")
        assert command(embed_main, "export", source, saved).code == 0
        expected = DiffCSE(source).encode(rows, return_numpy=True)
        theirs = AutoTokenizer.from_pretrained(saved)
        assert Tokenizer(saved)(rows, 128) == Tokenizer(source)(rows, 128)
        batch = theirs(rows, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            cls = AutoModel.from_pretrained(saved).eval()(**batch).last_hidden_state[:, 0]
        vectors = [
            DiffCSE(saved).encode(rows, return_numpy=True),
            SentenceTransformer(str(saved), device="cpu").encode(rows),
            torch.nn.functional.normalize(cls).numpy(),
        ]
        for v in vectors:
            assert np.abs(v - expected).max() < 1e-5, source


def test_a_saved_tokenizer_is_saved_the_same_again(tmp_path):
    """Settings inside tokenizer.json do not pad or truncate."""
    backend = tokenizers.Tokenizer.from_file(str(SMALL / "tokenizer.json"))
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    Tokenizer(tmp_path).save(tmp_path / "one", 77)
    Tokenizer(tmp_path / "one").save(tmp_path / "two", 77)
    assert len(files := list((tmp_path / "one").iterdir())) == 2
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert theirs.model_max_length == 77
    for ours in (Tokenizer(tmp_path / "two"), Tokenizer(SMALL)):
        assert ours(NASTY, 100_000) == theirs(NASTY, truncation=False)["input_ids"]


def test_eight_threads_with_two_lengths():
    """10,000 calls of one tokenizer, and some of one model: the cut is nobody else's."""
    tokenizer, model = Tokenizer(SMALL), DiffCSE(SMALL)
    rows = ["a rather long sentence of many more words than four", "short", "a word"]
    lengths = (4, 9)
    ids = {length: tokenizer(rows, length) for length in lengths}
    vectors = {length: model.encode(rows, True, max_length=length) for length in lengths}
    assert len(ids[4][0]) == 4 and not np.allclose(vectors[4], vectors[9])
    start = threading.Barrier(8)

    def work(thread: int) -> bool:
        start.wait()
        mine = [lengths[(thread + i) % 2] for i in range(1250)]
        equal = [tokenizer(rows, length) == ids[length] for length in mine]
        for length in mine[:25]:
            v = model.encode(rows, True, max_length=length)
            equal.append(np.allclose(v, vectors[length], atol=1e-6))
        return all(equal)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare random tokenizer folders.")
    parser.add_argument("--folders", type=int, default=3000)
    folders = parser.parse_args().folders
    with tempfile.TemporaryDirectory() as root:
        result = {"folders": folders, **compare(folders, Path(root))}
    result |= {name: version(name) for name in ("tokenizers", "transformers")}
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
