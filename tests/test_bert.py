"""bert.py against transformers (networks, names, folders) and safetensors (files).

Every model is random and tiny: sizes, weights and padding are drawn from a seed. test_fuzz.py reads
damaged safetensors files.
"""

import json
import os
import random
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import need_transformers_5, one_line

import bert

transformers = pytest.importorskip("transformers", reason="needs requirements-dev.txt")
st = pytest.importorskip("safetensors.torch", reason="needs requirements-dev.txt")

INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 9\n" % (b"a" * 64)
WORDS = "embeddings.word_embeddings.weight"
every_family = pytest.mark.parametrize("family", bert.FAMILIES)


def pair(family, folder, seed=0, mlm=True):
    """transformers' model, and bert.py's from its files. The seed draws all sizes and weights."""
    r = random.Random(seed)
    heads = r.randint(1, 4)
    sizes = {"hidden_size": heads * r.choice([4, 6, 16]), "num_hidden_layers": r.randint(1, 3)}
    sizes |= {"num_attention_heads": heads, "intermediate_size": r.randint(20, 80)}
    sizes |= {"vocab_size": r.randint(40, 120), "max_position_embeddings": r.randint(20, 40)}
    sizes |= {"pad_token_id": r.randint(0, 3), "type_vocab_size": r.randint(1, 3)}
    sizes |= {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    sizes |= {"layer_norm_eps": r.choice([1e-12, 1e-5, 1e-2]), "hidden_act": "gelu"}
    if family == "distilbert":
        sizes |= {theirs: sizes.pop(ours) for theirs, ours in bert.DISTILBERT_CONFIG.items()}
    torch.manual_seed(seed)
    name = bert.FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**sizes, attn_implementation="eager")
    theirs = getattr(transformers, name + ("ForMaskedLM" if mlm else "Model"))(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # a new LayerNorm is the identity, a new bias 0
            is_scale = "norm" in name.lower() and name.endswith("weight")
            p.copy_(torch.randn_like(p) * 0.2 + is_scale)
    theirs.save_pretrained(folder)
    return theirs, bert.load_bert(folder, mlm=mlm)


def batch(model):
    """Rows of 1, 2, some and all tokens. Half of the padding is other ids: they have no effect."""
    cfg, T = model.cfg, model.max_length
    lengths = torch.tensor([1, 2, T, T - 1, T // 2])
    mask = torch.arange(T) < lengths[:, None]  # (R, T)
    ids = torch.randint(cfg.pad_token_id + 1, cfg.vocab_size, mask.shape)
    ids[~mask & (torch.rand(mask.shape) < 0.5)] = cfg.pad_token_id
    ids[2, [1, 4, 5]] = cfg.pad_token_id  # RoBERTa counts positions by ids, not by the mask
    return ids, mask


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def load(folder, tensors, mlm=True):
    st.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return bert.load_bert(folder, mlm)


def change_config(folder, **fields):
    config = bert.read_json(folder / "config.json") | fields
    (folder / "config.json").write_text(json.dumps(config))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(words, read, *args, **options):
    with pytest.raises(bert.ModelError, match=words) as error:
        read(*args, **options)
    return one_line(error)


# ------------------------------------------------------------------------------------------------
# The network


def assert_equal(theirs, ours, ids, mask, h=None):
    """States of all layers, logits, and h's gradient. h replaces [CLS] after their embeddings."""

    def replace_cls(module, args, x):
        return x if h is None else torch.cat([h[:, None], x[:, 1:]], 1)

    theirs, ours = theirs.double(), ours.double()
    hook = theirs.base_model.embeddings.register_forward_hook(replace_cls)
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
    hook.remove()
    states = ours.bert(ids, mask, h, all_layers=True)
    tokens = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert len(states) == len(expected.hidden_states)
    for x, y in zip(states, expected.hidden_states):
        close(x[tokens], y[tokens])
    close(ours.bert(ids, mask, h), states[-1])
    if not ours.training:
        close(ours.bert(ids, mask, h, cls_only=True), states[-1][:, :1])
    if h is None:
        close(ours(ids, mask)[tokens], expected.logits[tokens])
    else:
        outputs = (x[tokens].sin().sum() for x in (states[-1], expected.hidden_states[-1]))
        close(*(torch.autograd.grad(output, h)[0] for output in outputs))


@pytest.mark.parametrize("seed", range(4))
@every_family
def test_hidden_states_and_logits_equal_transformers(family, seed, tmp_path):
    theirs, ours = pair(family, tmp_path, seed)
    ids, mask = batch(ours)
    h = torch.randn(len(ids), ours.cfg.hidden_size).double().requires_grad_()
    for m in (mask, mask.long(), None):
        assert_equal(theirs, ours, ids, m)
        assert_equal(theirs, ours, ids, m, h)
    with pytest.raises(IndexError):
        ours(torch.full((1, ours.max_length + 1), 7))


@pytest.mark.parametrize("rate", [None, 0.0, 0.4])
@every_family
def test_every_dropout_is_where_transformers_has_it(family, rate, tmp_path, monkeypatch):
    """In train mode, where F.dropout scales by a fixed pattern that depends on its rate and shape.

    A dropout that is missing, misplaced, added or of a wrong rate then changes the result.
    """
    theirs, _ = pair(family, tmp_path, 7)
    ours = bert.load_bert(tmp_path, mlm=True, dropout=rate)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout) and rate is not None:
            module.p = rate

    def dropout(x, p=0.5, training=True, inplace=False):
        pattern = torch.cos(torch.arange(x.numel(), dtype=torch.float32)).view(x.shape)
        return x * (1 + p * pattern) if training else x

    def attention(q, k, v, attn_mask=None, dropout_p=0.0):
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~attn_mask, -torch.inf)
        return dropout(scores.softmax(-1), dropout_p) @ v

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    ids, mask = batch(ours)
    h = torch.randn(len(ids), ours.cfg.hidden_size).double().requires_grad_()
    assert_equal(theirs.train(), ours.train(), ids, mask)
    assert_equal(theirs, ours, ids, mask, h)


def test_predict_tokens_takes_the_best_token_at_the_asked_positions(tmp_path):
    _, model = pair("roberta", tmp_path)
    ids, mask = (torch.cat([t] * 8) for t in batch(model))
    ids = torch.where(mask, torch.randint(4, model.cfg.vocab_size, ids.shape), ids)
    positions = mask & (torch.rand(mask.shape) < 0.8)
    assert positions.sum() > 256  # more than one chunk
    before = ids.clone()
    expected = torch.where(positions, model(ids, mask).argmax(-1), ids)
    assert torch.equal(model.predict_tokens(ids, mask, positions), expected)
    assert torch.equal(ids, before)
    for temperature in (None, 1.0):
        assert torch.equal(model.predict_tokens(ids, mask, mask & False, temperature), ids)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_predict_tokens_samples_from_the_softmax(temperature, monkeypatch):
    """Tokens of probability 0 are never drawn: the first, the last and one between."""
    torch.manual_seed(3)
    cfg = bert.BertConfig("bert", 7, 6, 1, 1, 6)  # W = 7, D = 6, one layer, one head
    model, count = bert.BertForMaskedLM(cfg).eval(), 200_000
    model.head.bias.data = torch.tensor([-torch.inf, 0, 0, -torch.inf, 1, -3, -torch.inf])
    ids = torch.tensor([[1, 2, 3]])
    expected = count * (model(ids)[0, 1] / temperature).softmax(-1).detach()
    ids, positions = (ids.expand(count, 3), torch.tensor([False, True, False]).expand(count, 3))
    drawn = model.predict_tokens(ids, torch.ones_like(ids), positions, temperature)[:, 1]
    counts, possible = drawn.bincount(minlength=7), expected > 0
    assert (counts[~possible] == 0).all() and possible.sum() == 4
    chi_square = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # 3 degrees of freedom: exceeded by 1 in 7,000
    for draw, token in [(0.0, 5), (1 - 2**-24, 1)]:  # the ends of torch.rand
        monkeypatch.setattr(torch, "rand", lambda *shape, draw=draw, **_: torch.full(shape, draw))
        predicted = model.predict_tokens(ids[:1], torch.ones(1, 3), positions[:1], temperature)
        assert predicted.tolist() == [[1, token, 3]]


# ------------------------------------------------------------------------------------------------
# Names in checkpoints


@every_family
def test_names_and_unused_tensors(family, tmp_path):
    """With and without prefix, with gamma and beta, and with a decoder."""
    theirs, model = pair(family, tmp_path)
    tensors = st.load((tmp_path / "model.safetensors").read_bytes())
    prefix, norm = f"{family}.", "embeddings.LayerNorm"
    extra = [f"{prefix}embeddings.position_ids", "cls.seq_relationship.bias", "mlp.dense.weight"]
    extra += [f"{prefix}pooler.dense.weight"] * (family == "distilbert")  # it has no pooler
    again = load(tmp_path, tensors | {name: torch.ones(3) for name in extra})
    assert same(again, model) and again.ignored == sorted(extra)

    words = theirs.get_input_embeddings().weight.detach()
    (decoder,) = (k for k, v in theirs.state_dict().items() if v.equal(words) and family not in k)
    assert same(load(tmp_path, tensors | {decoder: words.clone()}), model)
    untied = tensors | {decoder: words + 1e-3 * torch.eye(*words.shape)}
    assert same(load(tmp_path, untied, mlm=False), model.bert)  # no decoder in the encoder
    refused(f"'{decoder}' is not tied", load, tmp_path, untied)
    if family != "distilbert":  # which has one name for this bias
        bias = decoder.replace("weight", "bias")
        assert same(load(tmp_path, tensors | {bias: model.head.bias.detach().clone()}), model)
        refused(f"'{bias}' is not tied", load, tmp_path, tensors | {bias: words[:, 0].clone()})

    def old(name):
        return name.replace("orm.weight", "orm.gamma").replace("orm.bias", "orm.beta")

    tensors = {old(name): tensor for name, tensor in tensors.items()}
    assert same(load(tmp_path, tensors), model)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert same(load(tmp_path, tensors, mlm=False), model.bert)
    tensors[f"{norm}.weight"] = tensors[f"{norm}.gamma"] + 1
    refused(f"two tensors are called '{norm}.weight'", load, tmp_path, tensors)


@every_family
def test_shared_tensors_stand_under_any_of_their_names(family, tmp_path):
    """As safetensors' save_model writes them; transformers' encoder then has random embeddings."""
    theirs, model = pair(family, tmp_path)
    state, groups, path = theirs.state_dict(), {}, tmp_path / "model.safetensors"
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    assert sum(len(names) > 1 for names in groups.values()) == (1 if family == "distilbert" else 2)
    for kept in ("save_model", 0, -1):
        if kept == "save_model":
            st.save_model(theirs, str(path))
        else:
            others = {name: names[kept] for names in groups.values() for name in names}
            tensors = {name: state[name] for name in others.values()}
            st.save_file(tensors, path, {a: b for a, b in others.items() if a != b})
        assert same(bert.load_bert(tmp_path, mlm=True), model)
        assert same(bert.load_bert(tmp_path), model.bert)
    refused("word_embeddings.weight' .* is missing", load, tmp_path, tensors)  # without metadata


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_released_diffcse_checkpoint_gives_its_own_encoder(family, tmp_path):
    """It has three networks: the encoder is bert.*; its masked-LM head was never trained."""
    _, model = pair(family, tmp_path)
    others = {f"discriminator.{k}": v + 1 for k, v in bert.to_hf(model.bert).items()}
    for name in ("generator.distilbert.transformer.x", "mlp.net.0.weight", WORDS):
        others[name] = torch.ones(3)  # WORDS is not the encoder's, which has the prefix
    heads = bert.to_hf(model).keys() - bert.to_hf(model.bert).keys()
    encoder = load(tmp_path, bert.to_hf(model) | others, mlm=False)
    assert same(encoder, model.bert) and set(encoder.ignored) == others.keys() | heads
    refused("checkpoint has no trained masked-LM head", bert.load_bert, tmp_path, mlm=True)


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.weight", f"bert.{WORDS}"])
def test_missing_misshapen_and_integer_tensors_are_named(name, tmp_path):
    tensors = bert.to_hf(pair("bert", tmp_path)[1])
    tensor = tensors.pop(name)
    refused(f"{tmp_path}.*{name}.* is missing", load, tmp_path, tensors)
    module = {f"module.{name}": tensor for name, tensor in tensors.items()}  # of DataParallel
    refused(r"is missing; unused: \['module.bert.embeddings", load, tmp_path, module)
    for wrong, message in [(tensor.T.contiguous(), "float32"), (tensor.long(), "int64")]:
        refused(f"{tmp_path}.*{name}.* is torch.{message}", load, tmp_path, tensors | {name: wrong})


# ------------------------------------------------------------------------------------------------
# safetensors


def test_safetensors_are_exchanged_with_the_library(tmp_path):
    """Every type, scalars, empty tensors, strides, names in any script: equal byte for byte."""
    torch.manual_seed(18)
    ours, theirs, tensors = tmp_path / "ours", tmp_path / "theirs", {}
    for name, dtype in bert.DTYPES.items():
        x = torch.randn(3, 5) * 1e3 if dtype.is_floating_point else torch.randint(0, 100, (3, 5))
        x = x.to(dtype)
        tensors |= {name: x, f"{name}.0d": x[1, 2], f"{name}.empty": x[:0]}
        tensors |= {f"{name}.T": x.T, f"{name}.::2": x[:, ::2]}
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
    tensors |= {"": special, "ключ 鍵 🔑": special[1:], 'a "quoted"\n\\name\0': special[None, None]}
    tensors["x"] = torch.ones(1).expand(4)

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


def test_the_largest_header_is_the_librarys(tmp_path):
    """A longer header is refused though it would fit into the file."""
    with open(tmp_path / "x", "wb") as file:
        file.write((bert.MAX_HEADER_SIZE + 1).to_bytes(8, "little") + b"{}")
        file.truncate(2 * bert.MAX_HEADER_SIZE)  # sparse: takes no disk
    with pytest.raises(Exception, match="too large"):
        st.load_file(tmp_path / "x")
    refused("a header of 100000001 bytes", bert.read_safetensors, tmp_path / "x")


# ------------------------------------------------------------------------------------------------
# Model folders


@pytest.mark.parametrize("mlm", [True, False])
@every_family
def test_folders_are_exchanged_with_transformers(family, mlm, tmp_path):
    """With and without the head, the pooler included: the same tensors, settings and outputs."""
    if family == "roberta" and mlm:
        need_transformers_5()
    theirs, ours = pair(family, tmp_path / "theirs", 21, mlm)
    assert ours.ignored == []
    bert.save_bert(ours, tmp_path / "ours")
    auto = transformers.AutoModelForMaskedLM if mlm else transformers.AutoModel
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and same(again, theirs)
    architecture = bert.read_json(tmp_path / "ours" / "config.json")["architectures"]
    assert architecture == [type(theirs).__name__] == [type(again).__name__]
    ids, mask = batch(ours)
    close(again.eval()(ids, attention_mask=mask)[0][mask], ours(ids, mask)[mask])
    assert same(bert.load_bert(tmp_path / "ours", mlm), ours)
    assert bert.read_config(tmp_path / "ours") == ours.cfg
    if mlm:
        assert same(bert.load_bert(tmp_path / "ours"), ours.bert)
    else:
        refused("tensor '.*bias' .* is missing", bert.load_bert, tmp_path / "theirs", mlm=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_saved_and_become_fp32(dtype, tmp_path):
    _, model = pair("roberta", tmp_path)
    bert.save_bert(model, tmp_path, dtype)
    stored = st.load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    again = bert.load_bert(tmp_path, mlm=True)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert same(again, model.to(dtype).float())


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("sharded", [False, True])
def test_shards_and_pickles_equal_the_whole_file_and_must_be_whole(sharded, kind, tmp_path):
    """Every file is also cut, missing, or a pointer of git-lfs; no message speaks of code."""
    theirs, whole = pair("bert", tmp_path)
    folder = tmp_path / "parts"
    theirs.save_pretrained(folder, max_shard_size="10KB" if sharded else "1GB")
    for file in [] if kind == "safetensors" else list(folder.glob("model*")):
        pickle = folder / f"pytorch_{file.name}".replace("safetensors", "bin")
        if file.suffix == ".json":
            names = (
                file.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
            )
            pickle.write_text(names)
        else:
            is_zip = kind == "zip"
            torch.save(st.load_file(file), pickle, _use_new_zipfile_serialization=is_zip)
        file.unlink()
    assert same(bert.load_bert(folder, mlm=True), whole)
    again = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    assert same(again, theirs)
    files = list(folder.glob("*model*"))
    assert len(files) > 3 if sharded else len(files) == 1
    for file in files:
        content, cannot = file.read_bytes(), f"^{file} cannot be read: "
        pointer = f"^{file} is a git-lfs pointer, not the file; run: git lfs pull$"
        reason = "" if kind == "safetensors" or file.suffix == ".json" else "it is not whole, or "
        cut = f"{cannot}{reason}.*; copy or download it again$"
        parts = [content[:n] for n in (0, 1, 50, len(content) // 2, len(content) - 2)]
        for damaged, message in [(POINTER, pointer), *((part, cut) for part in parts)]:
            file.unlink()  # it may be mapped
            file.write_bytes(damaged)
            assert " code" not in refused(message, bert.load_bert, folder, mlm=True)
        file.unlink()
        is_shard = sharded and file.suffix != ".json"
        refused(f"{cannot}No such" if is_shard else "has neither", bert.load_bert, folder)
        file.write_bytes(content)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    path, code = tmp_path / "pytorch_model.bin", (os.mkdir, (str(tmp_path / "run"),))
    evil = type("Evil", (), {"__reduce__": lambda self: code})()
    for is_zip in (True, False):
        torch.save({"w": evil}, path, _use_new_zipfile_serialization=is_zip)
        message = r"pytorch_model.bin has code \('\w+.mkdir'\), which is never run$"
        refused(message, bert.read_weights, tmp_path)
    for content in ([torch.ones(1)], {"state_dict": {"w": torch.ones(1)}}):
        torch.save(content, path)
        refused("pytorch_model.bin cannot .* not a dict of tensors", bert.read_weights, tmp_path)
    assert not (tmp_path / "run").exists()
    bert.write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    assert list(bert.read_weights(tmp_path)) == ["w"]  # instead of the pickle


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("distilbert", "sinusoidal_pos_embds", True),  # how the positions were initialised
        ("distilbert", "pad_token_id", None),
        ("bert", "pad_token_id", None),
    ],
)
def test_fields_that_change_no_output(family, field, value, tmp_path):
    _, before = pair(family, tmp_path)
    change_config(tmp_path, **{field: value})
    ours = bert.load_bert(tmp_path, mlm=True)
    ids, mask = batch(ours)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    close(ours(ids, mask)[mask], theirs(ids, attention_mask=mask).logits[mask])
    assert same(ours, before)


@every_family
def test_defaults_are_those_of_transformers(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    cfg = bert.read_config(tmp_path)
    theirs = getattr(transformers, f"{bert.FAMILIES[family]}Config")()
    names = {name: name for name in bert.BertConfig.__dataclass_fields__}
    if family == "distilbert":
        names |= {ours: theirs for theirs, ours in bert.DISTILBERT_CONFIG.items()}
        del names["hidden_act"], names["type_vocab_size"], names["layer_norm_eps"]
    for ours, name in names.items():
        assert getattr(cfg, ours) == getattr(theirs, name), name


BAD_FIELDS = """
num_attention_heads=0 num_hidden_layers=-1 vocab_size=true hidden_size=8.0 hidden_size="768"
pad_token_id=-1 hidden_dropout_prob=1.0 hidden_dropout_prob="0.1" layer_norm_eps=NaN
hidden_act="relu" position_embedding_type="relative_key" is_decoder=true add_cross_attention=true
hidden_act=null position_embedding_type=null is_decoder=null layer_norm_eps=null vocab_size=null
model_type="t5" model_type=["bert"] model_type=null
"""
HUGE = '{"w": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}'
BAD_FILES = [
    ("config.json", '{"model_type": "bert", "hidden_size": 30}', "hidden_size is not divisible"),
    ("config.json", '{"model_type": "bert", "pad_token_id": 30522}', "pad_token_id is not below"),
    ("config.json", '{"model_type": "roberta", "pad_token_id": null}', "pad_token_id is None; exp"),
    ("config.json", '{"architectures": ["RobertaModel"]}', "model_type is None; supported: bert"),
    ("config.json", '{"model_type": "distilbert", "activation": "relu"}', "hidden_act is 'relu'"),
    ("config.json", '{"model_type": "distilbert", "n_layers": -1}', "num_hidden_layers is -1"),
    ("config.json", "[]", "cannot be read: expected dict, found list"),
    ("config.json", '{"a": 1 "b"}', "cannot be read: Expecting .* line 1 column 9"),
    ("config.json", "[" * 100_000, "cannot be read: .*(recursion|Stack overflow)"),
    ("config.json", "\xff", "cannot be read: .*utf-8"),
    ("pytorch_model.bin", "<html>", "cannot be read: it is not whole, or not a dict of tensors"),
    (INDEX, '{"weight_map": {"w": "../outside"}}', "no weight_map from tensors to files beside it"),
    (INDEX, '{"weight_map": {"w": ".."}}', "folder/.. cannot be read: Is a directory"),
    (INDEX, '{"weight_map": {"w": ["shard"]}}', "has no weight_map"),
    (INDEX, '{"weight_map": ["shard"]}', "has no weight_map"),
    (INDEX, "[]", "cannot be read: expected dict"),
    (
        "model.safetensors",
        chr(len(HUGE)) + "\0" * 7 + HUGE,
        "cannot be read: .*Overflow.*; copy or",
    ),
    ("vocab.txt", "", "folder has neither model.safetensors nor pytorch_model.bin"),
]
for field in BAD_FIELDS.split():
    name, value = field.split("=")
    message = re.escape(f"{name} is {json.loads(value)!r}; ")
    content = f'{{"model_type": "bert", "{name}": {value}}}'  # of two model_types the last counts
    BAD_FILES.append(("config.json", content, message))


@pytest.mark.parametrize("name, content, message", BAD_FILES, ids=lambda text: text[:60])
def test_bad_folders_are_refused_with_the_file(name, content, message, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    bert.write_safetensors(tmp_path / "outside", {"w": torch.ones(1)})
    refused(f"{folder}/config.json cannot be read: No such file", bert.load_bert, folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / name).write_text(content, encoding="latin-1")
    assert refused(message, bert.load_bert, folder).count(str(folder)) == 1
