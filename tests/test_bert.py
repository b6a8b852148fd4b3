"""bert.py against the libraries it stands in for: transformers (networks, names, folders) and safetensors (files).

Every model is random and tiny; sizes, weights and padding are drawn from the seed that pytest shows in the test's name.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bert

transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-dev.txt)")
st = pytest.importorskip("safetensors.torch", reason="needs safetensors (requirements-dev.txt)")

FAMILIES = ["bert", "roberta", "distilbert"]
MODELS = {"bert": transformers.BertForMaskedLM, "roberta": transformers.RobertaForMaskedLM, "distilbert": transformers.DistilBertForMaskedLM}
SHARED = Path(os.environ.get("DIFFCSE_SHARED") or Path(__file__).parents[2] / "shared") / "fixtures"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here (set DIFFCSE_SHARED)")


def their_model(family, seed, cls=None, **options):
    """A transformers model whose sizes and weights, LayerNorms and biases included, are drawn from seed."""
    r = random.Random(seed)
    heads = r.randint(1, 4)
    hidden, layers, inner = heads * r.choice([4, 6, 16]), r.randint(1, 3), r.randint(20, 80)
    options |= dict(vocab_size=r.randint(40, 120), max_position_embeddings=r.randint(20, 40), pad_token_id=r.randint(0, 3))
    if family == "distilbert":
        options |= dict(dim=hidden, n_layers=layers, n_heads=heads, hidden_dim=inner, dropout=0.3, attention_dropout=0.2)
    else:
        options |= dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
                        type_vocab_size=r.randint(1, 3), layer_norm_eps=r.choice([1e-12, 1e-5, 1e-2]),
                        hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)  # fmt: skip
    torch.manual_seed(seed)
    cls = cls or MODELS[family]
    model = cls(cls.config_class(**options, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # drawn again: as made, every LayerNorm is the identity and biases are 0
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name.lower() and name.endswith("weight")))
    return model


def pair(family, seed, folder, **options):
    """One model twice: transformers', and the same weights read by us from what it saved."""
    theirs = their_model(family, seed, **options)
    theirs.save_pretrained(folder)
    return theirs, bert.load_bert(folder, mlm=True)


def batch(cfg, seed, pads_inside=False):
    """Ids and mask of rows of 1, 2, some and all tokens. Half of the padding is not the pad id: it must not matter."""
    torch.manual_seed(seed)
    T = cfg.max_position_embeddings - cfg.pad_token_id - 1  # the longest that RoBERTa can take
    lengths = torch.tensor([1, 2, T, T - 1, T // 2])
    mask = (torch.arange(T) < lengths[:, None]).long()  # (B, T)
    ids = torch.randint(cfg.pad_token_id + 1, cfg.vocab_size, mask.shape)
    ids[(mask == 0) & (torch.rand(mask.shape) < 0.5)] = cfg.pad_token_id
    if pads_inside:  # the pad id where the mask calls it real: RoBERTa counts positions by ids, not by the mask
        ids[2, [1, 4, 5]] = cfg.pad_token_id
    return ids, mask


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def rewrite(folder, change):
    """Pass the tensors of folder/model.safetensors through change(dict) -> dict."""
    st.save_file(change(st.load((folder / "model.safetensors").read_bytes())), folder / "model.safetensors", metadata={"format": "pt"})


def same_encoder(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------------
# The network equals transformers'


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_equal_transformers(family, seed, tmp_path):
    """Every X_0..X_N and the MLM logits, at every real position; padded, and without a mask."""
    theirs, ours = pair(family, seed, tmp_path)
    ids, mask = batch(ours.cfg, seed, pads_inside=True)
    with torch.no_grad():
        for m, rows in [(mask, mask.bool()), (None, torch.ones_like(mask).bool())]:
            expected = theirs(ids, attention_mask=m, output_hidden_states=True)
            states = ours.bert(ids, m, all_layers=True)
            assert len(states) == len(expected.hidden_states) == ours.cfg.num_hidden_layers + 1
            for x, y in zip(states, expected.hidden_states):
                close(x[rows], y[rows])
            close(ours(ids, m)[rows], expected.logits[rows])
            assert torch.equal(ours.bert(ids, m), states[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(family, tmp_path):
    """Of a loss over the real positions, for every parameter, relative to that parameter's largest gradient."""
    theirs, ours = pair(family, 5, tmp_path)
    ids, mask = batch(ours.cfg, 5)
    weights = torch.randn(int(mask.sum()), ours.cfg.vocab_size)
    for logits in (theirs(ids, attention_mask=mask).logits, ours(ids, mask)):
        (F.log_softmax(logits[mask.bool()], -1) * weights).mean().backward()
    for p in ours.parameters():
        p.data = p.grad  # so that to_hf gives the gradients their names
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for name, ours_grad in bert.to_hf(ours).items():
        grad = theirs.get_parameter(name).grad
        zero = 1e-6 * largest if name.endswith(("key.bias", "k_lin.bias")) else 0  # softmax does not see it: rounding alone
        close(ours_grad, grad, float(1e-5 * grad.abs().max() + zero))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pooler_equals_transformers(family, tmp_path):
    theirs = their_model(family, 6, transformers.BertModel if family == "bert" else transformers.RobertaModel)
    theirs.save_pretrained(tmp_path)  # no head in this file, hence no "bert." in front of its names
    ours = bert.load_bert(tmp_path)
    ids, mask = batch(ours.cfg, 6)
    with torch.no_grad():
        close(torch.tanh(ours.pooler(ours(ids, mask)[:, 0])), theirs(ids, attention_mask=mask).pooler_output)
    assert ours.ignored == []
    with pytest.raises(bert.UserError, match="'(cls.predictions|lm_head).bias' is missing"):
        bert.load_bert(tmp_path, mlm=True)
    bert.save_bert(ours, tmp_path / "ours")
    again, info = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(again.pooler.dense.weight, theirs.pooler.dense.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dropout_stands_where_transformers_has_it(family, tmp_path, monkeypatch):
    """Train mode, with dropout's dice loaded: F.dropout(x, p) scales x by a fixed pattern of its rate and shape.

    A dropout too many, too few, misplaced or of the wrong rate then changes the result.
    """
    theirs, ours = pair(family, 7, tmp_path)
    ids, mask = batch(ours.cfg, 7)

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * (1 + p * torch.cos(torch.arange(x.numel(), dtype=torch.float32)).view(x.shape)) if training else x

    def attention(q, k, v, attn_mask=None, dropout_p=0.0):  # the textbook one, so that dropout() is in its middle
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~attn_mask, -torch.inf)
        return dropout(scores.softmax(-1), dropout_p) @ v

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(bert.fast, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with torch.no_grad():
        quiet = ours(ids, mask)
        expected = theirs.train()(ids, attention_mask=mask, output_hidden_states=True)
        for x, y in zip(ours.train().bert(ids, mask, all_layers=True), expected.hidden_states):
            close(x[mask.bool()], y[mask.bool()])
        close(ours(ids, mask)[mask.bool()], expected.logits[mask.bool()])
        assert (ours(ids, mask) - quiet).abs().max() > 0.1  # the dice were thrown at all


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_dropout_is_on_in_training_only_and_set_dropout_sets_it(family, tmp_path):
    _, model = pair(family, 8, tmp_path)
    ids, mask = batch(model.cfg, 8)
    with torch.no_grad():
        quiet = model(ids, mask)
        assert not model.training and torch.equal(model(ids, mask), quiet)
        model.train()
        assert not torch.equal(model(ids, mask), model(ids, mask))
        model.bert.set_dropout(0.0)
        close(model(ids, mask)[mask.bool()], quiet[mask.bool()])
        model.bert.set_dropout(0.4)
        assert not torch.equal(model(ids, mask), model(ids, mask))
    for layer in model.bert.layers:
        assert layer.attention.dropout == layer.dropout.p == model.bert.embeddings.dropout.p == 0.4
        assert layer.attention_dropout.p == (0.0 if family == "distilbert" else 0.4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cls_vector_takes_the_place_of_the_first_token(family, tmp_path):
    """Nothing of ids[:, 0] is left; the vector meets no LayerNorm and no dropout; gradient reaches it (SPEC 3)."""
    _, model = pair(family, 9, tmp_path)
    model, (ids, mask) = model.bert, batch(model.cfg, 9)
    h = torch.randn(len(ids), model.cfg.hidden_size, requires_grad=True)
    others = ids.clone()
    others[:, 0] = (ids[:, 0] - model.cfg.pad_token_id) % (model.cfg.vocab_size - model.cfg.pad_token_id - 1) + model.cfg.pad_token_id + 1
    assert (others[:, 0] != ids[:, 0]).all()
    states, plain = model(ids, mask, cls_vector=h, all_layers=True), model(ids, mask, all_layers=True)
    assert torch.equal(states[-1], model(others, mask, cls_vector=h))
    assert not torch.equal(plain[-1], model(others, mask))
    assert torch.equal(states[0][:, 0], h) and torch.equal(states[0][:, 1:], plain[0][:, 1:])
    states[-1][1:, 1].sum().backward()  # at position 1, of the rows that have one
    assert h.grad[1:].abs().amax(1).min() > 0 and h.grad[0].abs().max() == 0  # no row hears another
    x0 = model.train()(ids, mask, cls_vector=h, all_layers=True)[0]
    assert torch.equal(x0[:, 0], h) and not torch.equal(x0[:, 1:], plain[0][:, 1:])


# ----------------------------------------------------------------------------------------------------------------
# Names: what real checkpoints call their tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_names_with_and_without_prefix_and_with_gamma_and_beta(family, tmp_path):
    """The three spellings of one encoder load as the same encoder, and old position_ids buffers are passed over."""
    _, model = pair(family, 10, tmp_path)
    prefix = family + "."
    rewrite(tmp_path, lambda t: t | {prefix + "embeddings.position_ids": torch.arange(9)[None]})
    again = bert.load_bert(tmp_path, mlm=True)
    assert same_encoder(again, model) and again.ignored == [prefix + "embeddings.position_ids"]
    rewrite(tmp_path, lambda t: {k.replace("orm.weight", "orm.gamma").replace("orm.bias", "orm.beta"): v for k, v in t.items()})
    assert same_encoder(bert.load_bert(tmp_path, mlm=True), model)
    rewrite(tmp_path, lambda t: {k.removeprefix(prefix): v for k, v in t.items()})
    assert same_encoder(bert.load_bert(tmp_path), model.bert)
    rewrite(tmp_path, lambda t: t | {"embeddings.LayerNorm.weight": t["embeddings.LayerNorm.gamma"] + 1})
    with pytest.raises(bert.UserError, match="two tensors are both called 'embeddings.LayerNorm.weight'"):
        bert.load_bert(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_may_repeat_the_word_embeddings_but_not_differ(family, tmp_path):
    theirs, model = pair(family, 11, tmp_path)
    decoder, words = bert.FAMILIES[family].decoder, theirs.get_input_embeddings().weight.detach()
    rewrite(tmp_path, lambda t: t | {decoder: words.clone()})
    assert same_encoder(bert.load_bert(tmp_path, mlm=True), model)
    rewrite(tmp_path, lambda t: t | {decoder: words + 1e-3 * torch.eye(*words.shape)})
    assert same_encoder(bert.load_bert(tmp_path), model.bert)  # the encoder alone does not care
    with pytest.raises(bert.UserError, match=decoder):
        bert.load_bert(tmp_path, mlm=True)


@pytest.mark.parametrize("cls, extra", [
    (transformers.BertForPreTraining, {}), (transformers.BertForMaskedLM, {"mlp.dense.weight": torch.ones(3, 3), "mlp.dense.bias": torch.ones(3)})
])  # fmt: skip
def test_leftovers_of_pretraining_and_of_simcse_are_ignored(cls, extra, tmp_path):
    their_model("bert", 12, cls).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t | extra)
    model = bert.load_bert(tmp_path, mlm=True)
    assert model.ignored == (sorted(extra) or ["cls.seq_relationship.bias", "cls.seq_relationship.weight"])
    assert set(bert.to_hf(model)) == set(st.load_file(tmp_path / "model.safetensors")) - set(model.ignored)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_released_diffcse_checkpoint_gives_its_own_encoder(family, tmp_path):
    """Three networks in one file. The encoder is exactly bert.*, and the untrained lm_head is no generator."""
    base = {"bert": transformers.BertModel, "roberta": transformers.RobertaModel}[family]
    encoder, discriminator = their_model(family, 13, base), their_model(family, 13, base)
    generator = their_model("distilbert", 14)
    width = encoder.config.hidden_size
    with torch.no_grad():
        discriminator.embeddings.word_embeddings.weight += 1
    others = {f"discriminator.{k}": v for k, v in discriminator.state_dict().items()}
    others |= {f"generator.{k}": v for k, v in generator.state_dict().items()}
    others |= {"mlp.net.0.weight": torch.randn(width, width), "mlp.net.1.running_mean": torch.randn(width)}
    others |= {"electra_head.weight": torch.randn(2, width), "electra_head.bias": torch.randn(2)}
    head = their_model(family, 13).state_dict()  # under the very names that an MLM head would have
    others |= {k: v for k, v in head.items() if not k.startswith(family)}
    others["embeddings.word_embeddings.weight"] = torch.zeros(1)  # where "bert." is used, a name without it is no encoder's
    encoder.config.save_pretrained(tmp_path)
    encoder_state = {f"{family}.{k}": v for k, v in encoder.state_dict().items()}
    torch.save({**dict(list(others.items())[:3]), **encoder_state, **others}, tmp_path / "pytorch_model.bin")

    ours = bert.load_bert(tmp_path)
    ids, mask = batch(ours.cfg, 13)
    with torch.no_grad():
        close(ours(ids, mask)[mask.bool()], encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    assert any(".distilbert." in name for name in others) and set(ours.ignored) == set(others)
    with pytest.raises(bert.UserError, match="DiffCSE checkpoint is no generator"):
        bert.load_bert(tmp_path, mlm=True)


@needs_shared
@pytest.mark.parametrize("name", ["bert-base-uncased.pytorch_model.names", "all-MiniLM-L6-v2.safetensors.header"])
def test_real_names(name, tmp_path):
    """Every name in the published files is either used, with its own values, or expected to be ignored.

    The real shapes are shrunk, each size to one of its own, so that no 440 MB are allocated.
    """
    header = json.loads((SHARED / "real-names" / f"{name}.json").read_text())
    header = {k: v if isinstance(v, list) else v["shape"] for k, v in header.items() if k != "__metadata__"}
    shrink = {30522: 50, 512: 16, 768: 24, 384: 24, 3072: 30, 1536: 30, 2: 2, 1: 1}
    tensors = {k: torch.randn([shrink[n] for n in shape]) for k, shape in header.items()}
    mlm = "cls.predictions.bias" in tensors
    if mlm:
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    layers = 1 + max(int(k.split(".layer.")[1].split(".")[0]) for k in tensors if ".layer." in k)
    config = dict(vocab_size=50, hidden_size=24, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=30, max_position_embeddings=16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = bert.load_bert(tmp_path, mlm=mlm)
    used = {k if mlm else k.removeprefix("bert."): v for k, v in bert.to_hf(model).items()}
    modern = {k.replace(".gamma", ".weight").replace(".beta", ".bias"): v for k, v in tensors.items()}
    assert all(torch.equal(used[k], modern.pop(k)) for k in used)
    assert sorted(modern) == model.ignored
    assert set(modern) <= {"cls.seq_relationship.weight", "cls.seq_relationship.bias", "cls.predictions.decoder.weight", "embeddings.position_ids"}


@needs_shared
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "pytorch_model.legacy.bin"])
@pytest.mark.parametrize("name", ["bert-mlm", "bert-pretraining", "bert-model", "distilbert-mlm", "roberta-mlm"])
def test_kept_transformers_files_give_the_kept_outputs(name, file, tmp_path):
    """Files written once by transformers, in its three formats, with the outputs it gave then."""
    shutil.copy(SHARED / "hf-tiny" / name / "config.json", tmp_path)
    shutil.copy(SHARED / "hf-tiny" / name / file, tmp_path / file.replace(".legacy", ""))
    expected = torch.load(SHARED / "hf-tiny" / name / "expected.pt")
    model, mask = bert.load_bert(tmp_path, mlm=name != "bert-model"), expected["attention_mask"]
    with torch.no_grad():
        close(model(expected["input_ids"], mask)[mask.bool()], expected["logits"][mask.bool()])


@pytest.mark.parametrize("change, words", [
    (lambda w: {}, "is missing"), (lambda w: {"": w.T.contiguous()}, "config.json asks for"), (lambda w: {"": w.long()}, "int64, not a floating-point"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"])
def test_missing_misshaped_and_integer_tensors_are_named(name, change, words, tmp_path):
    pair("bert", 16, tmp_path)
    rewrite(tmp_path, lambda t: {name + k: w for k, w in change(t.pop(name)).items()} | t)
    with pytest.raises(bert.UserError, match=f"{tmp_path}.*{name}.*{words}"):
        bert.load_bert(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_fp32(dtype, tmp_path):
    _, model = pair("bert", 17, tmp_path)
    rewrite(tmp_path, lambda t: {k: v.to(dtype) for k, v in t.items()})
    again = bert.load_bert(tmp_path, mlm=True)
    for name, p in again.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, model.state_dict()[name].to(dtype).float())


# ----------------------------------------------------------------------------------------------------------------
# safetensors, byte by byte


def nasty_tensors():
    """Every type, scalars, nothing at all, views with strides, names from everywhere."""
    torch.manual_seed(18)
    tensors = {}
    for name, dtype in bert.DTYPES.items():
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5)) if not dtype.is_floating_point else torch.randn(3, 5) * 1e3
        values = values.to(dtype)
        tensors |= {name: values, f"{name}.0d": values[1, 2], f"{name}.none": values[:0], f"{name}.T": values.T, f"{name}.::2": values[:, ::2]}
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
    return tensors | {"": special, "ключ 鍵 🔑": special[1:], 'a "quoted"\n\\name\0': special[None, None], "x": torch.ones(1).expand(4)}


def assert_identical(a, b):
    """Bit for bit, NaN included."""
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape, k
        assert a[k].contiguous().reshape(-1).view(torch.uint8).equal(b[k].contiguous().reshape(-1).view(torch.uint8)), k


def test_safetensors_round_trip_and_both_ways_with_the_library(tmp_path):
    ours, theirs, tensors = tmp_path / "ours", tmp_path / "theirs", nasty_tensors()
    bert.write_safetensors(ours, tensors)
    st.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, theirs)
    for read in (bert.read_safetensors, st.load_file):
        assert_identical(read(ours), tensors)
        assert_identical(read(theirs), tensors)
    before = ours.read_bytes()
    for tensor in bert.read_safetensors(ours).values():
        tensor.zero_()  # may be written to, but what is written does not reach the file
    assert ours.read_bytes() == before
    bert.write_safetensors(ours, {})
    assert bert.read_safetensors(ours) == st.load_file(ours) == {}


@pytest.mark.parametrize("dtypes, name", [
    (["F32"], "w"), (["F64", "F32", "F16", "U8"], "w"),
    (list(bert.DTYPES), "w"),
    (["F32"], "é"),
])  # fmt: skip
def test_files_are_the_librarys_byte_for_byte(dtypes, name, tmp_path):
    """What makes model.safetensors comparable by hash with one that save_pretrained wrote."""
    tensors = {f"{name}.{i}": torch.ones(i, 3).to(bert.DTYPES[dtype]) for i, dtype in enumerate(dtypes * 2)}
    bert.write_safetensors(tmp_path / "ours", tensors)
    st.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def file_of(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, shape=(2,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end], **more}


TWO = {"a": entry(0, 8), "b": entry(8, 16)}
CORRUPT = {  # what is wrong: the file's bytes
    "empty": b"", "7 bytes": b"\0" * 7, "8 bytes": (2).to_bytes(8, "little"), "no header": bytes(16),
    "header beyond the file": (10**6).to_bytes(8, "little") + b"{}", "header above the limit": b"\xff" * 8 + b"{}",
    "header not JSON": file_of(b"{'a': 1}"), "header not UTF-8": file_of(b'{"\xff": 1}'), "header a list": file_of([]), "header a number": file_of(7),
    "header nested without end": file_of(b"[" * 100_000), "entry not a dict": file_of({"a": 1}),
    "name twice": file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),  # the library keeps the last one
    "overlap": file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "same bytes twice": file_of({"a": entry(), "b": entry()}),
    "gap": file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "gap at the start": file_of({"a": entry(4, 12)}, bytes(12)),
    "backwards": file_of({"a": entry(8, 0)}), "negative": file_of({"a": entry(-8, 0)}), "past the end": file_of({"a": entry(0, 16, (4,))}),
    "shape too small": file_of({"a": entry(shape=(1,))}), "shape too large": file_of({"a": entry(shape=(3,))}), "type too wide": file_of({"a": entry(dtype="F64")}),
    "huge shape": file_of({"a": entry(shape=(2**62, 2**62))}), "shape that wraps to 8 bytes": file_of({"a": entry(shape=(2**63, 2, 2))}),
    "negative dims": file_of({"a": entry(shape=(-2, -1))}), "float dims": file_of({"a": entry(shape=(2.0,))}), "bool dims": file_of({"a": entry(shape=(True, 2))}),
    "shape a number": file_of({"a": entry(shape=2)}), "shape missing": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "type unknown": file_of({"a": entry(dtype="F33")}), "type null": file_of({"a": entry(dtype=None)}),
    "bytes after the last tensor": file_of({"a": entry()}, bytes(9)), "truncated": file_of(TWO, bytes(15)), "header ends early": file_of(TWO, bytes(16))[:40],
    "offset infinite": file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}'),
    "three offsets": file_of({"a": entry() | {"data_offsets": [0, 8, 8]}}),
    "one offset": file_of({"a": entry() | {"data_offsets": [0]}}),
    "type a list": file_of({"a": entry(dtype=["F32"])}),
    "empty but huge": file_of({"a": entry(0, 0, (0, 2**70))}, b""),
    "empty but huge product": file_of({"a": entry(0, 0, (2**62, 2**62, 0))}, b""),
    "float offsets": file_of({"a": entry(0.0, 8.7)}),
    "text offsets": file_of({"a": entry() | {"data_offsets": "08"}}),
}  # fmt: skip


@pytest.mark.parametrize("blob", CORRUPT.values(), ids=CORRUPT.keys())
def test_corrupt_files_are_refused_by_name_as_the_library_refuses_them(blob, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(blob)
    if blob != CORRUPT["name twice"]:
        with pytest.raises(Exception):
            st.load_file(path)
    with pytest.raises(bert.UserError, match="broken.safetensors"):
        bert.read_safetensors(path)


def test_tensors_that_start_at_odd_bytes_are_read_and_aligned(tmp_path):
    """The format allows it; a processor or a vectorised kernel may not."""
    for spaces in range(4):
        (tmp_path / "x").write_bytes(file_of(json.dumps({"a": entry()}).encode() + b" " * spaces, torch.tensor([1.5, -2]).numpy().tobytes()))
        tensor = bert.read_safetensors(tmp_path / "x")["a"]
        assert tensor.tolist() == st.load_file(tmp_path / "x")["a"].tolist() == [1.5, -2] and tensor.data_ptr() % 4 == 0


def test_every_cut_and_any_flipped_byte_gives_tensors_or_a_user_error(tmp_path):
    """Fuzzing, seeded: never another exception, never a crash, and nothing cut short is taken for whole."""
    bert.write_safetensors(tmp_path / "good", {"a.w": torch.randn(3, 2), "b": torch.arange(5), "c": torch.zeros(0, 4)})
    good, r, refused = (tmp_path / "good").read_bytes(), random.Random(19), 0
    for i in range(300):
        blob = bytearray(good)
        for _ in range(r.randint(1, 3)):
            blob[r.randrange(len(blob))] = r.choice([r.randrange(256), *b'019,:"{}[]- '])
        cut = r.random() < 0.2
        path = tmp_path / str(i)
        path.write_bytes(blob[: r.randrange(len(blob))] if cut else blob)
        try:
            tensors = bert.read_safetensors(path)
            assert not cut and all(isinstance(t, torch.Tensor) for t in tensors.values())
        except bert.UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert 100 < refused < 300


def test_max_header_is_the_reference_librarys(tmp_path):
    """A header longer than 100,000,000 bytes is refused on both sides though it would fit the file."""
    with open(tmp_path / "x", "wb") as file:
        file.write((bert.MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
        file.truncate(2 * bert.MAX_HEADER)  # sparse: no disk is used
    for read, refusal in ((st.load_file, "too large"), (bert.read_safetensors, "header claims 100000001 bytes")):
        with pytest.raises(Exception, match=refusal):
            read(tmp_path / "x")


# ----------------------------------------------------------------------------------------------------------------
# Folders


def test_sharded_folder_equals_the_whole_one(tmp_path):
    theirs, whole = pair("bert", 20, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2 and not (tmp_path / "parts/model.safetensors").exists()
    assert same_encoder(bert.load_bert(tmp_path / "parts", mlm=True), whole)


@pytest.mark.parametrize("index, words", [
    ({"weight_map": {"w": "../outside.safetensors"}}, "not a plain file name"), ({"weight_map": {"w": "/etc/passwd"}}, "not a plain file name"),
    ({"weight_map": {"w": ".."}}, "lacks the shard"), ({"weight_map": {"w": "gone.safetensors"}}, "lacks the shard gone.safetensors"),
    ({"weight_map": {"w": "s.safetensors", "lost": "s.safetensors"}}, "no shard holds 'lost'"),
    ({}, "no 'weight_map'"), ({"weight_map": ["s.safetensors"]}, "no 'weight_map'"), ([], "expected a JSON object"),
])  # fmt: skip
def test_broken_shard_indexes_are_refused(index, words, tmp_path):
    folder = tmp_path / "model"
    for path in (tmp_path / "outside.safetensors", folder / "s.safetensors"):
        bert.write_safetensors(path, {"w": torch.ones(1)})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(bert.UserError, match=words):
        bert.read_weights(folder)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    for content, words in [({"w": Evil(tmp_path / "run")}, "without running code"), ([torch.ones(1)], "other than named tensors"),
                           ({"state_dict": {"w": torch.ones(1)}}, "other than named tensors")]:  # fmt: skip
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(bert.UserError, match=f"pytorch_model.bin.*{words}"):
            bert.read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(bert.UserError, match="pytorch_model.bin"):
        bert.read_weights(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    bert.write_atomically(path, "old")
    for raised, expected in [(RuntimeError("oops"), RuntimeError), (OSError(28, "No space left on device"), bert.UserError), (KeyboardInterrupt(), KeyboardInterrupt)]:

        def half(file, raised=raised):
            file.write(b"half of the new")
            raise raised

        with pytest.raises(expected, match="No space left" if expected is bert.UserError else None):
            bert.write_atomically(path, half)
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    os.link(path, tmp_path / "other name")
    bert.write_atomically(path, b"new")
    assert (path.read_text(), (tmp_path / "other name").read_text()) == ("new", "old")  # renamed into place, not written over
    bert.write_atomically(tmp_path / "new/folder/g", "é")  # folders are made
    assert (tmp_path / "new/folder/g").read_bytes() == "é".encode()


@pytest.mark.parametrize("where", [
    "folder", "file/x",
])  # fmt: skip
def test_an_impossible_path_is_a_user_error(where, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(bert.UserError, match="could not be written"):
        bert.write_safetensors(tmp_path / where, {"w": torch.ones(1)})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_save(family, tmp_path):
    """With head and without, every tensor found, none left over, the same outputs; and we load it back ourselves."""
    _, model = pair(family, 21, tmp_path / "theirs")
    ids, mask = batch(model.cfg, 21)
    bert.save_bert(model, tmp_path / "mlm")
    bert.save_bert(model.bert, tmp_path / "encoder")
    with torch.no_grad():
        for auto, folder, expected in [(transformers.AutoModelForMaskedLM, "mlm", model(ids, mask)), (transformers.AutoModel, "encoder", model.bert(ids, mask))]:
            loaded, info = auto.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert {name for name in info["missing_keys"] if "pooler" not in name} == set()  # an MLM file has no pooler
            assert not info["unexpected_keys"] and not info["mismatched_keys"]
            assert type(loaded).__name__ == json.loads((tmp_path / folder / "config.json").read_text())["architectures"][0]
            close(loaded.eval()(ids, attention_mask=mask)[0][mask.bool()], expected[mask.bool()])
    assert same_encoder(bert.load_bert(tmp_path / "mlm", mlm=True), model) and bert.load_config(tmp_path / "encoder") == model.cfg
    assert same_encoder(bert.load_bert(tmp_path / "encoder"), model.bert) and same_encoder(bert.load_bert(tmp_path / "mlm"), model.bert)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_defaults_and_round_trip(family):
    """A config.json that says nothing means what transformers' own defaults mean; to_dict and back is the same."""
    cfg, theirs = bert.BertConfig.from_dict({"model_type": family}), MODELS[family].config_class()
    other = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout", "intermediate_size": "hidden_dim"}
    for name in bert.BertConfig.__dataclass_fields__:
        if family != "distilbert" or name not in ("type_vocab_size", "layer_norm_eps"):
            assert getattr(cfg, name) == getattr(theirs, other.get(name, name) if family == "distilbert" else name), name
    cfg = bert.BertConfig.from_dict(cfg.to_dict() | {"num_hidden_layers": 3, "n_layers": 3, "pad_token_id": 5, "hidden_dropout_prob": 0.25, "dropout": 0.25})
    assert (cfg.num_hidden_layers, cfg.pad_token_id, cfg.hidden_dropout_prob) == (3, 5, 0.25)
    assert bert.BertConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_longest_row():
    """RoBERTa counts positions from pad_token_id + 1, so 514 of them hold 512 tokens."""
    small = dict(vocab_size=10, hidden_size=2, num_hidden_layers=0, num_attention_heads=1, intermediate_size=2)
    roberta = bert.Bert(bert.BertConfig("roberta", **small, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1))
    assert roberta.max_length == 512 and bert.Bert(bert.BertConfig(**small)).max_length == 512
    assert roberta(torch.full((1, 512), 7)).shape == (1, 512, 2)
    with pytest.raises(IndexError):
        roberta(torch.full((1, 513), 7))


@pytest.mark.parametrize("config, words", [
    ({"hidden_size": 30, "num_attention_heads": 4}, "not divisible"), ({"vocab_size": -1}, "vocab_size"), ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"hidden_size": 8.0}, "hidden_size"), ({"hidden_size": "768"}, "hidden_size"), ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"hidden_act": "relu"}, "'relu'"), ({"model_type": "distilbert", "activation": "relu"}, "'relu'"), ({"hidden_act": "gelu_new"}, "'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, "absolute"), ({"model_type": "distilbert", "sinusoidal_pos_embds": True}, "absolute"),
    ({"model_type": "t5"}, "'t5'"), ({"pad_token_id": None}, "pad_token_id"), ({"pad_token_id": 30522}, "pad_token_id"), ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob"),
    ([], "found list"), ('{"a": 1,\n"b"}', "line 2: not JSON"), ("", "not JSON"), ("\udcff", "not UTF-8"),
    ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob"),
    ({"layer_norm_eps": "small"}, "layer_norm_eps"),
    ({"vocab_size": True}, "vocab_size"),
    ({"model_type": ["bert"]}, "model_type"),
    ({"is_decoder": True}, "decoder"),
    ({"add_cross_attention": True}, "cross"),
    ("[" * 100_000, "JSON"),
])  # fmt: skip
def test_bad_configs_are_refused_with_the_files_name(config, words, tmp_path):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(bert.UserError, match=words) as error:
        bert.load_config(tmp_path)
    assert str(error.value).count(str(tmp_path / "config.json")) == 1


def test_folders_without_config_or_weights_are_refused(tmp_path):
    with pytest.raises(bert.UserError, match="no config.json"):
        bert.load_bert(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(bert.UserError, match="holds no weights"):
        bert.load_bert(tmp_path)
