"""bert.py against transformers (networks, names, folders) and safetensors (files).

Every model is random and tiny: sizes, weights and padding are drawn from a seed.
"""

import ast
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bert

transformers = pytest.importorskip("transformers", reason="needs requirements-dev.txt")
st = pytest.importorskip("safetensors.torch", reason="needs requirements-dev.txt")

BASE = {family: getattr(transformers, f"{cls}Model") for family, cls in bert.FAMILIES.items()}
MLM = {family: getattr(transformers, f"{cls}ForMaskedLM") for family, cls in bert.FAMILIES.items()}
SHARED = Path(os.environ.get("DIFFCSE_SHARED") or Path(__file__).parents[2] / "shared") / "fixtures"
PUBLISHED = ["bert-base-uncased.pytorch_model.names", "all-MiniLM-L6-v2.safetensors.header"]
STORED = ["bert-mlm", "bert-pretraining", "bert-model", "distilbert-mlm", "roberta-mlm"]
OLD_PICKLE = "pytorch_model.legacy.bin"
needs_fixtures = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} does not exist")
every_family = pytest.mark.parametrize("family", bert.FAMILIES)
WORDS = "embeddings.word_embeddings.weight"


def their_model(family, seed, cls=None):
    """A transformers model. Sizes and all weights, also LayerNorms and biases, follow the seed."""
    r = random.Random(seed)
    heads = r.randint(1, 4)
    config = {"hidden_size": heads * r.choice([4, 6, 16]), "num_hidden_layers": r.randint(1, 3)}
    config |= {"num_attention_heads": heads, "intermediate_size": r.randint(20, 80)}
    config |= {"vocab_size": r.randint(40, 120), "max_position_embeddings": r.randint(20, 40)}
    config |= {"pad_token_id": r.randint(0, 3), "type_vocab_size": r.randint(1, 3)}
    config |= {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    config |= {"layer_norm_eps": r.choice([1e-12, 1e-5, 1e-2]), "hidden_act": "gelu"}
    if family == "distilbert":
        config |= {theirs: config.pop(ours) for theirs, ours in bert.DISTILBERT_CONFIG.items()}
    torch.manual_seed(seed)
    cls = cls or MLM[family]
    model = cls(cls.config_class(**config, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # a new LayerNorm is the identity, a new bias 0
            is_scale = "norm" in name.lower() and name.endswith("weight")
            p.copy_(torch.randn_like(p) * 0.2 + is_scale)
    return model


def batch(cfg, seed):
    """Rows of 1, 2, some and all tokens. Half of the padding is other ids: they have no effect."""
    torch.manual_seed(seed)
    T = cfg.max_position_embeddings - cfg.pad_token_id - 1  # RoBERTa's longest row
    lengths = torch.tensor([1, 2, T, T - 1, T // 2])
    mask = torch.arange(T) < lengths[:, None]  # (B, T)
    ids = torch.randint(cfg.pad_token_id + 1, cfg.vocab_size, mask.shape)
    ids[~mask & (torch.rand(mask.shape) < 0.5)] = cfg.pad_token_id
    ids[2, [1, 4, 5]] = cfg.pad_token_id  # RoBERTa counts positions by ids, not by the mask
    return ids, mask


def pair(family, seed, folder):
    """Transformers' model, the same weights loaded from the folder that it saved, and a batch."""
    theirs = their_model(family, seed)
    theirs.save_pretrained(folder)
    ours = bert.load_bert(folder, mlm=True)
    return theirs, ours, *batch(ours.cfg, seed)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def rewrite(folder, change):
    """Pass the tensors of folder/model.safetensors through change(dict) -> dict."""
    path = folder / "model.safetensors"
    st.save_file(change(st.load(path.read_bytes())), path, metadata={"format": "pt"})


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(words):
    """The error is one line."""
    return pytest.raises(bert.ModelError, match=f"^[^\n]*{words}[^\n]*$")


# ------------------------------------------------------------------------------------------------
# The network


def test_bert_needs_torch_and_the_standard_library_only():
    imported = set()
    for node in ast.walk(ast.parse(Path(bert.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add("a neighbour" if node.level else node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("seed", range(4))
@every_family
def test_hidden_states_and_logits_equal_transformers(family, seed, tmp_path):
    """At every token, in a padded batch and without a mask."""
    theirs, ours, ids, mask = pair(family, seed, tmp_path)
    with torch.no_grad():
        for m, tokens in [(mask, mask), (mask.long(), mask), (None, torch.ones_like(mask))]:
            expected = theirs(ids, attention_mask=m, output_hidden_states=True)
            states = ours.bert(ids, m, all_layers=True)
            assert len(states) == len(expected.hidden_states) == ours.cfg.num_hidden_layers + 1
            for x, y in zip(states, expected.hidden_states):
                close(x[tokens], y[tokens])
            close(ours(ids, m)[tokens], expected.logits[tokens])
            assert torch.equal(ours.bert(ids, m), states[-1])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pooler_equals_transformers(family, tmp_path):
    theirs = their_model(family, 6, BASE[family])
    theirs.save_pretrained(tmp_path)  # this file has no head, hence no "bert." in its names
    ours = bert.load_bert(tmp_path)
    ids, mask = batch(ours.cfg, 6)
    with torch.no_grad():
        pooled = torch.tanh(ours.pooler(ours(ids, mask)[:, 0]))
        close(pooled, theirs(ids, attention_mask=mask).pooler_output)
    assert ours.ignored == []
    with refused(r"tensor '(cls.predictions|lm_head).bias' .* is missing"):
        bert.load_bert(tmp_path, mlm=True)
    bert.save_bert(ours, tmp_path / "ours")
    auto = transformers.AutoModel
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again.pooler.dense.weight, theirs.pooler.dense.weight)


@every_family
def test_every_dropout_is_where_transformers_has_it(family, tmp_path, monkeypatch):
    """In train mode, where F.dropout scales by a fixed pattern that depends on its rate and shape.

    A dropout that is missing, misplaced, added or of a wrong rate then changes the result.
    """
    theirs, ours, ids, mask = pair(family, 7, tmp_path)

    def dropout(x, p=0.5, training=True, inplace=False):
        pattern = torch.cos(torch.arange(x.numel(), dtype=torch.float32)).view(x.shape)
        return x * (1 + p * pattern) if training else x

    def attention(q, k, v, attn_mask=None, dropout_p=0.0):
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~attn_mask, -torch.inf)
        return dropout(scores.softmax(-1), dropout_p) @ v

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with torch.no_grad():
        without = ours(ids, mask)
        expected = theirs.train()(ids, attention_mask=mask, output_hidden_states=True)
        for x, y in zip(ours.train().bert(ids, mask, all_layers=True), expected.hidden_states):
            close(x[mask], y[mask])
        close(ours(ids, mask)[mask], expected.logits[mask])
        assert (ours(ids, mask) - without).abs().max() > 0.1  # dropout was applied at all


@every_family
def test_dropout_is_for_training_and_load_bert_can_override_its_rates(family, tmp_path):
    _, model, ids, mask = pair(family, 8, tmp_path)
    zero, high = (bert.load_bert(tmp_path, mlm=True, dropout=p).train() for p in (0.0, 0.4))
    with torch.no_grad():
        expected = model(ids, mask)
        assert not model.training and torch.equal(model(ids, mask), expected)
        close(zero(ids, mask)[mask], expected[mask])
        for noisy in (model.train(), high):
            assert not torch.equal(noisy(ids, mask), noisy(ids, mask))
    for changed, hidden, attention in [(model, 0.3, 0.2), (zero, 0.0, 0.0), (high, 0.4, 0.4)]:
        assert changed.bert.embeddings.dropout.p == changed.cfg.hidden_dropout_prob == hidden
        for layer in changed.bert.layers:
            assert (layer.dropout.p, layer.attention.dropout) == (hidden, attention)
            assert layer.attention_dropout.p == (0.0 if family == "distilbert" else hidden)


@every_family
def test_cls_vector_replaces_the_first_token(family, tmp_path):
    """Nothing of ids[:, 0] is left. The vector meets no LayerNorm or dropout; it has a gradient."""
    _, model, ids, mask = pair(family, 9, tmp_path)
    model, cfg = model.bert, model.cfg
    h = torch.randn(len(ids), cfg.hidden_size, requires_grad=True)
    others, first = ids.clone(), cfg.pad_token_id + 1
    others[:, 0] = (ids[:, 0] - first + 1) % (cfg.vocab_size - first) + first
    assert (others[:, 0] != ids[:, 0]).all()
    states, plain = (model(ids, mask, cls_vector=v, all_layers=True) for v in (h, None))
    assert torch.equal(states[-1], model(others, mask, cls_vector=h))
    assert not torch.equal(plain[-1], model(others, mask))
    assert torch.equal(states[0][:, 0], h) and torch.equal(states[0][:, 1:], plain[0][:, 1:])
    states[-1][1:, 1].sum().backward()  # position 1 of the rows that have one
    assert h.grad[1:].abs().amax(1).min() > 0 and h.grad[0].abs().max() == 0
    x0 = model.train()(ids, mask, cls_vector=h, all_layers=True)[0]
    assert torch.equal(x0[:, 0], h) and not torch.equal(x0[:, 1:], plain[0][:, 1:])


@every_family
def test_cls_only_equals_the_first_position_of_the_full_output(family, tmp_path):
    _, _, ids, mask = pair(family, 10, tmp_path)
    model = bert.load_bert(tmp_path, dropout=0.0)
    for training in (False, True):
        full, cls = model.train(training)(ids, mask), model(ids, mask, cls_only=True)
        assert cls.shape == (len(ids), 1, model.cfg.hidden_size)
        close(cls, full[:, :1])
        sums = (full[:, 0].sum(), cls.sum())
        for a, b in zip(*(torch.autograd.grad(x, model.layers.parameters()) for x in sums)):
            close(a, b, float(1e-5 * max(a.abs().max(), 1)))


@every_family
def test_predict_tokens_takes_the_best_word_at_the_asked_positions(family, tmp_path):
    _, model, ids, mask = pair(family, 15, tmp_path)
    ids, mask = (torch.cat([t] * 8) for t in (ids, mask))
    ids = torch.where(mask, torch.randint(4, model.cfg.vocab_size, ids.shape), ids)
    positions = mask & (torch.rand(mask.shape) < 0.8)
    assert positions.sum() > 256  # more than one chunk
    with torch.no_grad():
        best = model(ids, mask).argmax(-1)
    before = ids.clone()
    predicted = model.predict_tokens(ids, mask, positions)
    assert torch.equal(predicted, torch.where(positions, best, ids)) and torch.equal(ids, before)
    nowhere = torch.zeros_like(mask)
    for temperature in (None, 1.0):
        assert torch.equal(model.predict_tokens(ids, mask, nowhere, temperature), ids)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_predict_tokens_samples_from_the_softmax(temperature, monkeypatch):
    """Words of probability 0 are never drawn: the first, the last and one between."""
    torch.manual_seed(3)
    cfg = bert.BertConfig("bert", 7, 6, 1, 1, 6)  # W = 7, D = 6, one layer, one head
    model, count = bert.BertForMaskedLM(cfg).eval(), 200_000
    model.head.bias.data = torch.tensor([-torch.inf, 0, 0, -torch.inf, 1, -3, -torch.inf])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = count * (model(ids)[0, 1] / temperature).softmax(-1)
    ids, positions = ids.expand(count, 3), torch.tensor([False, True, False]).expand(count, 3)
    drawn = model.predict_tokens(ids, torch.ones_like(ids), positions, temperature)[:, 1]
    counts, possible = drawn.bincount(minlength=7), expected > 0
    assert (counts[~possible] == 0).all() and possible.sum() == 4
    chi_square = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # 3 degrees of freedom: exceeded by 1 in 7,000
    for draw, word in [(0.0, 5), (1 - 2**-24, 1)]:  # the ends of torch.rand
        monkeypatch.setattr(torch, "rand", lambda *shape, draw=draw, **_: torch.full(shape, draw))
        predicted = model.predict_tokens(ids[:1], torch.ones(1, 3), positions[:1], temperature)
        assert predicted.tolist() == [[1, word, 3]]


def test_an_edit_of_a_layer_changes_the_model(tmp_path, monkeypatch):
    """No faster copy of a layer runs in its place."""
    _, model, ids, mask = pair("bert", 22, tmp_path)
    model, before = model.bert, model.bert(ids, mask)
    monkeypatch.setattr(bert.Layer, "forward", lambda self, x, mask, cls_only=False: x + 1)
    after = model(ids, mask)
    assert not torch.equal(after, before)
    close(after, model.embeddings(ids) + model.cfg.num_hidden_layers)


def test_longest_row():
    """RoBERTa counts positions from pad_token_id + 1: 514 positions hold 512 tokens."""
    cfg = bert.BertConfig("roberta", 10, 2, 0, 1, 2, max_position_embeddings=514, pad_token_id=1)
    roberta = bert.Bert(cfg)
    assert roberta.max_length == bert.BertForMaskedLM(cfg).max_length == 512
    assert bert.Bert(bert.BertConfig("bert", 10, 2, 0, 1, 2)).max_length == 512
    assert roberta(torch.full((1, 512), 7)).shape == (1, 512, 2)
    with pytest.raises(IndexError):
        roberta(torch.full((1, 513), 7))


# ------------------------------------------------------------------------------------------------
# Names in checkpoints


@every_family
def test_names_with_and_without_prefix_with_gamma_and_beta_and_unused_ones(family, tmp_path):
    _, model, *_ = pair(family, 10, tmp_path)
    prefix, buffer = f"{family}.", f"{family}.embeddings.position_ids"  # a buffer of old files
    extra = [buffer, "cls.seq_relationship.bias", "mlp.dense.weight"]  # of pretraining, of SimCSE
    assert set(bert.to_hf(model)) == set(st.load_file(tmp_path / "model.safetensors"))
    rewrite(tmp_path, lambda t: t | {name: torch.ones(3) for name in extra})
    again = bert.load_bert(tmp_path, mlm=True)
    assert same(again, model) and again.ignored == sorted(extra)

    def old(name):
        return name.replace("orm.weight", "orm.gamma").replace("orm.bias", "orm.beta")

    rewrite(tmp_path, lambda t: {old(k): v for k, v in t.items()})
    assert same(bert.load_bert(tmp_path, mlm=True), model)
    rewrite(tmp_path, lambda t: {k.removeprefix(prefix): v for k, v in t.items()})
    assert same(bert.load_bert(tmp_path), model.bert)
    norm = "embeddings.LayerNorm"
    rewrite(tmp_path, lambda t: t | {f"{norm}.weight": t[f"{norm}.gamma"] + 1})
    with refused(f"two tensors are called '{norm}.weight'"):
        bert.load_bert(tmp_path)


@every_family
def test_the_decoder_may_repeat_the_word_embeddings_but_not_differ(family, tmp_path):
    theirs, model, *_ = pair(family, 11, tmp_path)
    decoder = bert.hf_name("decoder.weight", family, "")
    words = theirs.get_input_embeddings().weight.detach()
    assert theirs.get_parameter(decoder) is theirs.get_input_embeddings().weight
    rewrite(tmp_path, lambda t: t | {decoder: words.clone()})
    assert same(bert.load_bert(tmp_path, mlm=True), model)
    rewrite(tmp_path, lambda t: t | {decoder: words + 1e-3 * torch.eye(*words.shape)})
    assert same(bert.load_bert(tmp_path), model.bert)  # no decoder in the encoder
    with refused(decoder):
        bert.load_bert(tmp_path, mlm=True)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_released_diffcse_checkpoint_gives_its_own_encoder(family, tmp_path):
    """It has three networks: the encoder is bert.*; its masked-LM head was never trained."""
    encoder, discriminator = (their_model(family, 13, BASE[family]) for _ in range(2))
    generator, D = their_model("distilbert", 14), encoder.config.hidden_size
    with torch.no_grad():
        discriminator.embeddings.word_embeddings.weight += 1
    others = {f"discriminator.{k}": v for k, v in discriminator.state_dict().items()}
    others |= {f"generator.{k}": v for k, v in generator.state_dict().items()}
    others |= {"mlp.net.0.weight": torch.randn(D, D), "mlp.net.1.running_mean": torch.randn(D)}
    others |= {"electra_head.weight": torch.randn(2, D), "electra_head.bias": torch.randn(2)}
    head = their_model(family, 13).state_dict()
    others |= {k: v for k, v in head.items() if not k.startswith(family)}
    others[WORDS] = torch.zeros(1)  # not the encoder's, which has the prefix
    encoder.config.save_pretrained(tmp_path)
    tensors = {f"{family}.{k}": v for k, v in encoder.state_dict().items()}
    torch.save(others | tensors, tmp_path / "pytorch_model.bin")

    ours = bert.load_bert(tmp_path)
    ids, mask = batch(ours.cfg, 13)
    with torch.no_grad():
        close(ours(ids, mask)[mask], encoder(ids, attention_mask=mask)[0][mask])
    assert any(".distilbert." in name for name in others) and set(ours.ignored) == set(others)
    with refused("a DiffCSE checkpoint has no trained masked-LM head"):
        bert.load_bert(tmp_path, mlm=True)


@needs_fixtures
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_published_files(name, tmp_path):
    """Every tensor is used with its own values, or expected to be ignored. Sizes are shrunk."""
    header = json.loads((SHARED / "real-names" / f"{name}.json").read_text())
    header = {k: v if isinstance(v, list) else v["shape"] for k, v in header.items() if k[0] != "_"}
    small = {30522: 50, 512: 16, 768: 24, 384: 24, 3072: 30, 1536: 30, 2: 2, 1: 1}
    tensors = {k: torch.randn([small[n] for n in shape]) for k, shape in header.items()}
    mlm = "cls.predictions.bias" in tensors
    if mlm:
        tensors["cls.predictions.decoder.weight"] = tensors[f"bert.{WORDS}"]
    layers = 1 + max(int(k.split(".layer.")[1].split(".")[0]) for k in tensors if ".layer." in k)
    config = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": layers}
    config |= {"intermediate_size": 30, "max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = bert.load_bert(tmp_path, mlm=mlm)
    used = {k if mlm else k.removeprefix("bert."): v for k, v in bert.to_hf(model).items()}
    new = {k: k.replace(".gamma", ".weight").replace(".beta", ".bias") for k in tensors}
    renamed = {new[k]: tensor for k, tensor in tensors.items()}
    assert all(torch.equal(used[k], renamed.pop(k)) for k in used)
    assert sorted(renamed) == model.ignored
    ignored = {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    assert set(renamed) <= ignored | {"cls.predictions.decoder.weight", "embeddings.position_ids"}


@needs_fixtures
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", OLD_PICKLE])
def test_stored_files_of_transformers_give_the_stored_outputs(name, file, tmp_path):
    folder = SHARED / "hf-tiny" / name
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / file, tmp_path / file.replace(OLD_PICKLE, "pytorch_model.bin"))
    expected = torch.load(folder / "expected.pt")
    model, mask = bert.load_bert(tmp_path, mlm=name != "bert-model"), expected["attention_mask"]
    with torch.no_grad():
        logits, mask = model(expected["input_ids"], mask), mask.bool()
        close(logits[mask], expected["logits"][mask])


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.weight", f"bert.{WORDS}"])
def test_missing_misshapen_and_integer_tensors_are_named(name, tmp_path):
    pair("bert", 16, tmp_path)
    tensor = st.load_file(tmp_path / "model.safetensors")[name].clone()
    changes = {"torch.float32": tensor.T.contiguous(), "torch.int64": tensor.long()}
    changes["missing"] = None
    for words, changed in changes.items():
        new = {} if changed is None else {name: changed}
        rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != name} | new)  # noqa: B023
        with refused(f"{tmp_path}.*{name}.* is {words}"):
            bert.load_bert(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_saved_and_become_fp32(dtype, tmp_path):
    _, model, *_ = pair("roberta", 17, tmp_path)
    bert.save_bert(model, tmp_path, dtype)
    stored = st.load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    again, state = bert.load_bert(tmp_path, mlm=True).state_dict(), model.state_dict()
    for name, p in again.items():
        assert p.dtype == torch.float32 and torch.equal(p, state[name].to(dtype).float())


# ------------------------------------------------------------------------------------------------
# safetensors


def odd_tensors():
    """Every type, scalars, empty tensors, strides, names in any script."""
    torch.manual_seed(18)
    tensors = {}
    for name, dtype in bert.DTYPES.items():
        x = torch.randn(3, 5) * 1e3 if dtype.is_floating_point else torch.randint(0, 100, (3, 5))
        x = x.to(dtype)
        tensors |= {name: x, f"{name}.0d": x[1, 2], f"{name}.empty": x[:0]}
        tensors |= {f"{name}.T": x.T, f"{name}.::2": x[:, ::2]}
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
    tensors |= {"": special, "ключ 鍵 🔑": special[1:], 'a "quoted"\n\\name\0': special[None, None]}
    return tensors | {"x": torch.ones(1).expand(4)}


def test_safetensors_are_exchanged_with_the_library(tmp_path):
    """Files are equal byte for byte."""
    ours, theirs, tensors = tmp_path / "ours", tmp_path / "theirs", odd_tensors()

    def library(tensors):
        tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
        st.save_file(tensors, theirs, metadata={"format": "pt"})
        return theirs.read_bytes()

    bert.write_safetensors(ours, tensors)
    before = ours.read_bytes()
    assert before == library(tensors) == library(bert.read_safetensors(ours))
    for tensor in bert.read_safetensors(ours).values():
        tensor.zero_()  # changes the memory, not the file
    assert ours.read_bytes() == before
    bert.write_safetensors(ours, {})
    assert ours.read_bytes() == library({}) and bert.read_safetensors(ours) == {}


def header_of(entries):
    """The JSON of tensors a and b. "F32 [2] 0,8 + U8 [3] 8,11": types, shapes and offsets."""
    text = '"%s":{"dtype":"%s","shape":%s,"data_offsets":[%s]}'
    return "{" + ",".join(text % (n, *e.split()) for n, e in zip("ab", entries.split(" + "))) + "}"


def file_of(header, data=bytes(8)):
    header = header.encode("latin-1")
    return len(header).to_bytes(8, "little") + header + data


GOOD = header_of("F32 [2] 0,8")
ENTRIES = f"""
U8 [6] 0,6 + U8 [4] 4,8; F32 [2] 0,8 + F32 [2] 0,8; U8 [2] 0,2 + U8 [4] 4,8; U8 [4] 4,8; F32 [1] 0,4
F32 [2] 0,8 + F32 [2] 8,16; F32 [4] 0,16; F32 [2] 8,0; F32 [2] -8,0; F32 [2] 0.0,8.7
F32 [2] 0,Infinity; F32 [2] 0; F32 [2] 0,8,8; F32 [1] 0,8; F32 [3] 0,8; F64 [2] 0,8; F33 [2] 0,8
F32 2 0,8; F32 [-2,-1] 0,8; F32 [2.0] 0,8; F32 [true,2] 0,8
F32 [{2**62},{2**62}] 0,8; F32 [{2**63},2,2] 0,8; F32 [2] 0,8 + F32 [0,{2**70}] 8,8
F32 [2] 0,8 + F32 [{2**32},{2**32},0] 8,8; F32 [2] false,8; F32 [3,{(2**64 + 2) // 3}] 0,8
"""
HEADERS = [header_of(entries) for entries in re.split("[;\n] *", ENTRIES.strip())]
HEADERS += ["[]", "7", "{'a': 1}", '{"a": 1}', '{"\xff": 1}', "[" * 100_000, GOOD[:-1]]
HEADERS += [GOOD.replace(*change) for change in [('"F32"', "null"), ('"F32"', '["F32"]')]]
HEADERS += [GOOD.replace(*change) for change in [("[0,8]", '"08"'), ('"shape":[2],', "")]]
HEADERS += [GOOD[:-1] + "," + GOOD[1:]]  # a name twice: the library uses the last one
FILES = [b"", bytes(7), (2).to_bytes(8, "little"), bytes(16), bytes([9, 9]) + bytes(6) + b"{}"]
FILES += [b"\xff" * 8 + b"{}", file_of(GOOD)[:-1], file_of(GOOD)[:40], file_of(GOOD) + b"0"]
FILES += [file_of(header) for header in HEADERS]


@pytest.mark.parametrize("data", FILES, ids=lambda data: data[8:60])
def test_damaged_files_are_refused_as_the_library_refuses_them(data, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    if data != file_of(HEADERS[-1]):
        with pytest.raises(Exception):
            st.load_file(path)
    with refused("broken.safetensors"):
        bert.read_safetensors(path)


def test_tensors_that_start_at_odd_bytes_are_aligned(tmp_path):
    """The format allows them; a vectorised kernel may not."""
    data = torch.tensor([1.5, -2]).numpy().tobytes()
    for spaces in range(4):
        (tmp_path / "x").write_bytes(file_of(GOOD + " " * spaces, data))
        tensor = bert.read_safetensors(tmp_path / "x")["a"]
        assert tensor.tolist() == st.load_file(tmp_path / "x")["a"].tolist() == [1.5, -2]
        assert tensor.data_ptr() % 4 == 0


def test_the_largest_header_is_the_librarys(tmp_path):
    """A longer header is refused though it would fit into the file."""
    with open(tmp_path / "x", "wb") as file:
        file.write((bert.MAX_HEADER_SIZE + 1).to_bytes(8, "little") + b"{}")
        file.truncate(2 * bert.MAX_HEADER_SIZE)  # sparse: takes no disk
    with pytest.raises(Exception, match="too large"):
        st.load_file(tmp_path / "x")
    with refused("a header of 100000001 bytes"):
        bert.read_safetensors(tmp_path / "x")


# ------------------------------------------------------------------------------------------------
# Model folders


def test_shards_equal_the_whole_file(tmp_path):
    theirs, whole, *_ = pair("bert", 20, tmp_path / "whole")
    parts = tmp_path / "parts"
    theirs.save_pretrained(parts, max_shard_size="10KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    assert not (parts / "model.safetensors").exists()
    assert same(bert.load_bert(parts, mlm=True), whole)


BAD_INDEXES = """
{"weight_map": {"w": "../outside.safetensors"}}  model/outside.safetensors cannot be read .No such
{"weight_map": {"w": "/etc/passwd"}}             model/passwd cannot be read .No such
{"weight_map": {"w": ".."}}                      cannot be read .Is a directory
{"weight_map": {"w": "gone.safetensors"}}        model/gone.safetensors cannot be read .No such
{"weight_map": ["s.safetensors"]}                index.json has no weight_map
{}                                               index.json has no weight_map
[]                                               cannot be read: expected dict, found list
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD_INDEXES)
def test_broken_indexes_of_shards_are_refused(line, tmp_path):
    index, words = re.split("  +", line)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path / "outside.safetensors", folder / "s.safetensors"):
        bert.write_safetensors(path, {"w": torch.ones(1)})
    (folder / "model.safetensors.index.json").write_text(index)
    with refused(words):
        bert.read_weights(folder)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    path, code = tmp_path / "pytorch_model.bin", (os.mkdir, (str(tmp_path / "run"),))
    evil = type("Evil", (), {"__reduce__": lambda self: code})()
    for content in ({"w": evil}, [torch.ones(1)], {"state_dict": {"w": torch.ones(1)}}, None):
        torch.save(content, path)
        if content is None:
            path.write_bytes(b"not a pickle")
        with refused("pytorch_model.bin is not a file of named tensors"):
            bert.read_weights(tmp_path)
    assert not (tmp_path / "run").exists()


@every_family
def test_transformers_loads_what_save_bert_writes(family, tmp_path):
    """With and without the head: no tensor missing or left over, and the same outputs."""
    _, model, ids, mask = pair(family, 21, tmp_path / "theirs")
    autos = [transformers.AutoModelForMaskedLM, transformers.AutoModel]
    for auto, part in zip(autos, (model, model.bert)):
        folder, mlm = tmp_path / auto.__name__, part is model
        bert.save_bert(part, folder)
        loaded, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not {name for name in info["missing_keys"] if "pooler" not in name}
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        architecture = json.loads((folder / "config.json").read_text())["architectures"]
        assert architecture == [type(loaded).__name__]
        with torch.no_grad():
            theirs = loaded.eval()(ids, attention_mask=mask)[0]
            close(theirs[mask], part(ids, mask)[mask])
        assert same(bert.load_bert(folder, mlm=mlm), part)
        assert same(bert.load_bert(folder), model.bert)
        assert bert.read_config(folder) == model.cfg


@every_family
def test_defaults_are_those_of_transformers(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    cfg, theirs = bert.read_config(tmp_path), MLM[family].config_class()
    names = {ours: theirs for theirs, ours in bert.DISTILBERT_CONFIG.items()}
    for name in bert.BertConfig.__dataclass_fields__:
        if family != "distilbert":
            assert getattr(cfg, name) == getattr(theirs, name), name
        elif name not in ("type_vocab_size", "layer_norm_eps"):
            assert getattr(cfg, name) == getattr(theirs, names.get(name, name)), name


BAD_FIELDS = """
num_attention_heads=0 num_hidden_layers=-1 vocab_size=-1 vocab_size=true hidden_size=8.0
hidden_size="768" pad_token_id=null hidden_dropout_prob=1.0 hidden_dropout_prob="0.1"
layer_norm_eps="small" layer_norm_eps=NaN hidden_act="relu" hidden_act="gelu_new"
sinusoidal_pos_embds=true position_embedding_type="relative_key" is_decoder=true
add_cross_attention=true model_type="t5" model_type=["bert"]
"""
BAD_CONFIGS = """
{"hidden_size": 30, "num_attention_heads": 4}       hidden_size is not divisible by num_attention
{"pad_token_id": 30522}                             pad_token_id is not below vocab_size
{"model_type": "distilbert", "activation": "relu"}  hidden_act is 'relu'; supported: 'gelu'
{"model_type": "distilbert", "n_layers": -1}        num_hidden_layers is -1
[]                                                  cannot be read: expected dict, found list
{"a": 1 "b"}                                        cannot be read: Expecting .* line 1 column 9
\xff                                                cannot be read: .*utf-8
"""
CASES = [re.split("  +", line) for line in BAD_CONFIGS.strip().splitlines()]
CASES += [["[" * 100_000, "cannot be read: .*recursion"]]
for field in BAD_FIELDS.split():
    name, value = field.split("=")
    CASES += [[f'{{"{name}": {value}}}', re.escape(f"{name} is {json.loads(value)!r}; ")]]


@pytest.mark.parametrize("text, words", CASES, ids=lambda text: text[:60])
def test_bad_configs_are_refused_with_file_and_field(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with refused(words) as error:
        bert.read_config(tmp_path)
    assert str(error.value).count(str(tmp_path / "config.json")) == 1


def test_folders_without_config_or_weights_are_refused(tmp_path):
    with refused("config.json cannot be read: No such file"):
        bert.load_bert(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with refused("neither model.safetensors nor pytorch_model.bin"):
        bert.load_bert(tmp_path)
