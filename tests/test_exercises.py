"""The course keeps working: stubs fail, the repository's functions pass, and each common mistake
has its own message. EXERCISES.md says what was measured."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import diffcse
from engine import cli
from engine.tokens import TokenizedSentences

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "exercises"))

import answers  # noqa: E402
import detached  # noqa: E402
import mends  # noqa: E402
import test_fix_it as bugs  # noqa: E402
import test_write_it as checks  # noqa: E402
import write_it  # noqa: E402

CHECKS = [name for name in vars(checks) if name.startswith("test_ex")]  # in the file's order
FUNCTIONS = [
    n for n, thing in vars(write_it).items() if getattr(thing, "__module__", "") == "write_it"
]


def arguments(function) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def call(check: str, answer, tmp_path) -> None:
    function = getattr(checks, check)
    function(answer, tmp_path) if "tmp_path" in arguments(function) else function(answer)


def message_of(number: int, answer, tmp_path) -> str:
    """The message of the first test of an exercise that fails; "" if all pass."""
    for check in CHECKS:
        if check.startswith(f"test_ex{number:02}"):
            try:
                call(check, answer, tmp_path)
            except pytest.fail.Exception as failure:
                return str(failure)
    return ""


@pytest.mark.parametrize("check", CHECKS)
def test_the_stub_fails_and_the_repository_s_function_passes(check, tmp_path):
    with pytest.raises(NotImplementedError, match=f"exercise {int(check[7:9])}: "):
        call(check, write_it, tmp_path)
    call(check, answers, tmp_path)


def test_each_of_twelve_exercises_has_an_answer_tests_and_text():
    text = (ROOT / "EXERCISES.md").read_text()
    assert {int(check[7:9]) for check in CHECKS} == set(range(1, 13))
    assert len(FUNCTIONS) == 13  # the twelfth exercise has two
    for name in FUNCTIONS:
        stub, answer = getattr(write_it, name), getattr(answers, name)
        assert f"`{name}`" in text, name
        if answer.__module__ == "answers":
            assert arguments(answer) == arguments(stub), name


# ------------------------------------------------------------------------------------------------
# Answers with a mistake


def looped(a, b):
    rows = [torch.stack([F.cosine_similarity(x, y, dim=0) for y in b]) for x in a]
    return torch.stack(rows)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def shifted_unit(x):
    return x / (x.norm(dim=1, keepdim=True) + 1e-6)


def infonce(how):
    def contrastive_loss(h, temperature):
        z = F.normalize(h, dim=-1)
        logits, eye = z[:, 0] @ z[:, 1].T / temperature, torch.eye(len(h)).bool()
        nll, products = checks.nll(logits), h[:, 0] @ h[:, 1].T / temperature
        exp, others = logits.exp(), logits.masked_fill(eye, -torch.inf).logsumexp(1)
        half_detached = z[:, 0] @ z[:, 1].detach().T / temperature
        return {
            "multiplied": checks.nll(logits * temperature**2).mean(),
            "no temperature": checks.nll(logits * temperature).mean(),
            "transposed": checks.nll(logits.T).mean(),
            "both": (nll + checks.nll(logits.T)).mean() / 2,
            "sum": nll.sum(),
            "each": nll,
            "sign": -nll.mean(),
            "own missing": -(logits.diagonal() - others).mean(),
            "products": checks.nll(products).mean(),
            "detached": checks.nll(half_detached).mean(),
            "overflow": -(exp / exp.sum(1, keepdim=True)).diagonal().log().mean(),
            "underflow": -logits.softmax(1).diagonal().log().mean(),
            "twice": F.cross_entropy(logits.softmax(1), torch.arange(len(h))),
        }[how]

    return {"contrastive_loss": contrastive_loss}


def masked(
    share=0.8,
    half=0.5,
    special_too=None,
    in_place=False,
    sentence_share=False,
    own_generator=True,
    same_rows=False,
    top=None,
    more_words=0,
    by_row=False,
    selected_is_changed=False,
):
    def mask_tokens(ids, special, mask_id, vocab_size, ratio, generator):
        generator = generator if own_generator else None

        def draw(*shape):
            return torch.rand(shape, generator=generator)

        R, T = ids.shape
        first = draw(1 if same_rows else R, T).expand(R, T)
        may = ~special if special_too is None else ~special | (ids == special_too)
        selected = (first < ratio) & may
        if sentence_share:
            order = first.masked_fill(~may, 2).argsort(1).argsort(1)
            selected = (order < (may.sum(1, keepdim=True) * ratio).round()) & may
        x_masked = ids if in_place else ids.clone()
        rest = selected & ~(draw(R, 1 if by_row else T) < share)
        random = rest & (draw(R, T) < half)
        words = torch.randint(top or vocab_size + more_words, (R, T), generator=generator)
        x_masked[selected & ~rest] = mask_id
        x_masked[random] = words[random]
        return x_masked, x_masked != ids if selected_is_changed else selected

    return {"mask_tokens": mask_tokens}


def edited(
    keep_cls=True,
    keep_pads=True,
    source="x_masked",
    only_masked=False,
    keep_sep=False,
    grad=False,
    in_place=False,
    blind=False,
    cls_of=lambda x, x_masked: x[:, :1],
    pads_of_x=False,
    dtype=torch.int64,
    stop_gradients=False,
    mode=lambda generator: None,
):
    def edit_sentences(generator, x, x_masked, mask):
        mode(generator)
        ids = {"x": x, "x_masked": x_masked}[source]
        with torch.set_grad_enabled(grad):
            best = generator(ids, torch.ones_like(mask) if blind else mask).argmax(-1)
        best = torch.where(x != x_masked, best, x) if only_masked else best
        best = torch.where(x == 2, x, best) if keep_sep else best
        best = torch.where(mask, best, x if pads_of_x else 0) if keep_pads else best
        best = torch.cat([cls_of(x, x_masked), best[:, 1:]], 1) if keep_cls else best
        if stop_gradients:
            torch.set_grad_enabled(False)
        return x.copy_(best) if in_place else best.to(dtype)

    return {"edit_sentences": edit_sentences}


def eval_for_a_moment(generator):
    forward = generator.forward

    def in_eval(*inputs):
        generator.eval()
        logits = forward(*inputs)
        generator.train()
        return logits

    generator.forward = in_eval


def replaced_loss(
    pads=False,
    swapped=False,
    total=False,
    labels_of_pads=False,
    divide_by_all=False,
    skip_cls=False,
    pads_by_id=False,
    softmax=False,
    zero_logits=False,
    dtype=torch.bool,
):
    def replaced_token_loss(logits, x, x_edited, mask):
        logits = logits.softmax(-1) if softmax else logits
        logits = logits * mask[..., None] if zero_logits else logits
        right = (x != x_edited) & mask
        replaced = (x != x_edited) if labels_of_pads else right
        replaced = (x != x_edited) & (x_edited != 0) if pads_by_id else replaced
        labels = (x == x_edited).long() if swapped else right.long()
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(x)
        counted = torch.ones_like(mask) if pads or zero_logits else mask.clone()
        counted[:, 0] &= not skip_cls
        number = 1 if total else x.numel() if divide_by_all else counted.sum()
        return replaced.to(dtype), (each * counted).sum() / number

    return {"replaced_token_loss": replaced_token_loss}


def unstable(logits, x, x_edited, mask):
    replaced = (x != x_edited) & mask
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return replaced, -torch.where(replaced, p[..., 1], p[..., 0])[mask].log().mean()


def only_second_logit(logits, x, x_edited, mask):
    replaced = (x != x_edited) & mask
    labels = replaced[mask].to(logits)
    return replaced, F.binary_cross_entropy_with_logits(logits[..., 1][mask], labels)


def with_h(how):
    def read_with_h(bert, ids, mask, h):
        x, first = bert.embeddings(ids), h[:, None]
        if how == "in place":
            x[:, 0] = h
        elif how == "added":
            x = torch.cat([x[:, :1] + first, x[:, 1:]], 1)
        elif how == "after":
            for layer in bert.layers:
                x = layer(x, mask)
            return torch.cat([first, x[:, 1:]], 1)
        elif how == "longer":
            x, mask = torch.cat([first, x], 1), torch.cat([mask[:, :1], mask], 1)
        elif how == "early":
            x = torch.cat([first, bert.embeddings(ids[:, 1:])], 1)
        elif how == "cold":
            x = torch.cat([first, x[:, 1:].detach()], 1)
        elif how == "inserted":
            x = torch.cat([first, x[:, :-1]], 1)
        elif how != "nothing":
            x = torch.cat([first.detach() if how == "detached" else first, x[:, 1:]], 1)
        for layer in bert.layers:
            x = torch.cat([first, x[:, 1:]], 1) if how == "before each" else x
            x = layer(x, torch.ones_like(mask) if how == "unmasked" else mask)
            x = torch.cat([first, x[:, 1:]], 1) if how == "again" else x
        return x

    return {"read_with_h": read_with_h}


def attention(
    scale=lambda d, T: d**-0.5,
    keys=True,
    fill=-torch.inf,
    added=None,
    after=False,
    dim=-1,
    of_output=lambda out, mask: out,
):
    def attend(q, k, v, mask):
        where = mask[:, None, None, :] if keys else mask[:, None, :, None]
        scores = q @ k.transpose(-1, -2) * scale(q.shape[-1], q.shape[2])
        if after:
            weights = scores.softmax(-1) * where
        elif added:
            weights = (scores + ~where * added).softmax(-1)
        else:
            weights = scores.masked_fill(~where, fill).softmax(dim)
        return of_output(weights @ v, mask)

    return {"attention": attend}


def reader(
    start=None,
    order="little",
    metadata=False,
    shapes=True,
    checked=True,
    encoding="utf-8",
    offsets=True,
    skip="__metadata__",
):
    """A reader of safetensors files, correct or with one mistake."""

    def read_safetensors(path):
        raw = Path(path).read_bytes()
        if len(raw) < 8:
            raise ValueError("no header")
        size = int.from_bytes(raw[:8], order)
        header = json.loads(raw[8 : 8 + size].decode(encoding))
        data = raw[{None: 8 + size, "file": 0, "header": size}[start] :]
        tensors, position = {}, 0
        for name, entry in header.items():
            if name == skip:
                tensors |= {name: torch.tensor(0.0)} if metadata else {}
                continue
            begin, end = entry["data_offsets"]
            if not offsets:
                begin, end = position, position + end - begin
            position = end
            if end > len(data) and checked:
                raise ValueError("too short")
            part, dtype = bytearray(data[begin:end]), write_it.DTYPES[entry["dtype"]]
            flat = torch.empty(0, dtype=dtype)
            if len(part) // dtype.itemsize:
                flat = torch.frombuffer(part, dtype=dtype)
            fits = flat.numel() == math.prod(entry["shape"])
            tensors[name] = flat.view(entry["shape"]) if shapes and fits else flat
        return tensors

    return {"read_safetensors": read_safetensors}


def correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def with_ranks(kind="average"):
    return lambda a, b: correlation(checks.ranks_of(a, kind), checks.ranks_of(b, kind))


def without_ties(a, b):
    d = checks.ranks_of(a) - checks.ranks_of(b)
    return 1 - 6 * float(d @ d) / (len(a) * (len(a) ** 2 - 1))


def sorted_before(a, b):
    a.sort(), b.sort()
    return with_ranks()(a, b)


def sorted_after(a, b):
    value = with_ranks()(a, b)
    a.sort()
    return value


def spaces(square=2, factor=2, diagonal=1, log_of_mean=True, mean=np.mean, half=1, plus=0):
    def alignment_and_uniformity(u, v):
        x = np.concatenate([u, v])
        distance = np.linalg.norm(x[:, None] - x, axis=-1)[np.triu_indices(len(x), diagonal)]
        exponents = -factor * distance**square
        align = half * mean(np.linalg.norm(u - v, axis=1) ** square)
        uniform = np.log(np.exp(exponents).mean()) if log_of_mean else exponents.mean()
        return float(align), float(uniform) + plus

    return {"alignment_and_uniformity": alignment_and_uniformity}


def recall_with_zero_diagonal(u, v, k):
    x, P = np.concatenate([u, v]), len(u)
    cosines = x @ x.T
    np.fill_diagonal(cosines, 0.0)
    partner = cosines[np.arange(2 * P), (np.arange(2 * P) + P) % (2 * P)]
    return 100 * float(((cosines > partner[:, None] + 1e-9).sum(1) < k).mean())


def checkpoint(
    buffers=True, moments=True, count=True, floats=False, names=None, number=int, in_order=False
):
    def state_dict(model, optimizer):
        saved = model.state_dict() if buffers else dict(model.named_parameters())
        tensors = {f"m.{name}": tensor for name, tensor in saved.items()}
        states = optimizer.state_dict()["state"].items() if moments else ()
        if in_order:  # a parameter without a state moves the numbers of the later ones
            states = enumerate(optimizer.state.values())
        for i, state in states:
            for name, value in state.items():
                wanted = (count or name != "step") and (names is None or name in names)
                if torch.is_tensor(value) and wanted:
                    tensors[f"o.{i}.{name}"] = value
        return tensors | ({"steps": 3.0} if floats else {})

    def load_state_dict(tensors, model, optimizer):
        of_model = {name[2:]: t for name, t in tensors.items() if name.startswith("m.")}
        model.load_state_dict(of_model, strict=False)
        state = {}
        for key in (key for key in tensors if key.startswith("o.")):
            _, i, name = key.split(".")
            empty = {} if name == "momentum_buffer" else {"step": torch.tensor(0.0)}
            state.setdefault(number(i), empty)[name] = tensors[key]
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    return {"state_dict": state_dict, "load_state_dict": load_state_dict}


def other_parameters():
    def load_state_dict(tensors, model, optimizer):
        for name, _ in list(model.named_parameters()):
            module, _, kind = name.rpartition(".")
            setattr(model.get_submodule(module), kind, nn.Parameter(tensors[f"m.{name}"]))

    return checkpoint() | {"load_state_dict": load_state_dict}


def assumes_adam(model, optimizer):
    moments = {str(i): optimizer.state[p]["exp_avg"] for i, p in enumerate(model.parameters())}
    return model.state_dict() | moments


# ------------------------------------------------------------------------------------------------
# The message of each mistake: exercise, answer, a regular expression

of_cosine = "cosine_matrix"
MISTAKES = [
    (1, {of_cosine: lambda a, b: F.normalize(b) @ F.normalize(a).T}, "transposed"),
    (1, {of_cosine: lambda a, b: a @ b.T}, "products, not cosines"),
    (1, {of_cosine: lambda a, b: F.normalize(a) @ b.T}, "only a's vectors"),
    (1, {of_cosine: lambda a, b: unit(a) @ unit(b).T}, "zeros gives NaN"),
    (1, {of_cosine: lambda a, b: shifted_unit(a) @ shifted_unit(b).T}, "short vector"),
    (1, {of_cosine: looped}, "a loop in it"),
    (
        1,
        {of_cosine: lambda a, b: F.cosine_similarity(a[:, None], b[None], dim=-1, eps=1e-12)},
        "40 x 50 x 60 numbers",
    ),
    (
        1,
        {of_cosine: lambda a, b: a.div_(a.norm(dim=1, keepdim=True)) @ F.normalize(b).T},
        "a itself was changed",
    ),
    (
        1,
        {of_cosine: lambda a, b: (F.normalize(a)[:, None] * F.normalize(b)[None]).sum(-1)},
        "40 x 50 x 60 numbers",
    ),
    (2, infonce("multiplied"), "multiplied by the temperature"),
    (2, infonce("no temperature"), "no effect"),
    (2, infonce("transposed"), "transposed"),
    (2, infonce("both"), "both directions"),
    (2, infonce("sum"), "it is the sum"),
    (2, infonce("each"), "one loss for each"),
    (2, infonce("sign"), "sign"),
    (2, infonce("own missing"), "own second view is missing"),
    (2, infonce("products"), "cosines"),
    (2, infonce("detached"), "second views have no gradient"),
    (2, infonce("overflow"), "overflows"),
    (2, infonce("underflow"), "underflows"),
    (2, infonce("twice"), "softmax is applied twice"),
    (2, {"contrastive_loss": checks.simclr}, "as in SimCLR"),
    (3, masked(special_too=3), r"touches \[SEP\]"),
    (3, masked(special_too=2), r"touches \[CLS\]"),
    (3, masked(special_too=0), "touches padding"),
    (3, masked(in_place=True), "ids itself was changed"),
    (3, masked(share=1.0), r"became \[MASK\]"),
    (3, masked(half=0.1), "18 % of the selected tokens stay"),
    (3, masked(half=0.9), "2 % of the selected tokens stay"),
    (3, masked(by_row=True), "draw once more"),
    (3, masked(sentence_share=True), "draw for each token on its own"),
    (3, masked(own_generator=False), "come from `generator`"),
    (3, masked(same_rows=True), "all rows are masked at the same positions"),
    (3, masked(top=1), "few different values"),
    (3, masked(more_words=-1), "any from 0 to 7"),
    (3, masked(more_words=1), "none above"),
    (3, masked(selected_is_changed=True), "selected and stay count"),
    (4, edited(keep_cls=False), r"keep x's \[CLS\]"),
    (4, edited(keep_pads=False), "padding has the generator's tokens"),
    (4, edited(source="x"), "the generator was given x;"),
    (4, edited(only_masked=True), "the paper's reading"),
    (4, edited(keep_sep=True), r"\[SEP\] is kept"),
    (4, edited(in_place=True), "x itself was changed"),
    (4, edited(grad=True), "ran with gradients"),
    (4, edited(blind=True), "not given the mask"),
    (4, edited(stop_gradients=True), "still switched off afterwards"),
    (4, edited(mode=lambda generator: generator.eval()), "eval mode"),
    (4, edited(mode=eval_for_a_moment), "eval mode"),
    (4, edited(cls_of=lambda x, x_masked: x_masked[:, :1]), "from x', where it may be masked"),
    (4, edited(dtype=torch.int32), "int64"),
    (4, edited(pads_of_x=True), "padding is as in x"),
    (4, edited(cls_of=lambda x, x_masked: x[:1, :1].expand(len(x), 1)), "first row's"),
    (5, replaced_loss(pads=True), "padding counts"),
    (5, replaced_loss(divide_by_all=True), "divided by"),
    (5, replaced_loss(swapped=True), "classes are swapped"),
    (5, replaced_loss(total=True), "sum"),
    (5, replaced_loss(labels_of_pads=True), "padding counts as replaced"),
    (5, replaced_loss(skip_cls=True), "position 0"),
    (5, replaced_loss(dtype=torch.int64), "expected bool"),
    (5, replaced_loss(pads_by_id=True), "not where an id is 0"),
    (5, {"replaced_token_loss": unstable}, "large logits"),
    (5, replaced_loss(softmax=True), "softmax is applied twice"),
    (5, {"replaced_token_loss": only_second_logit}, "only the second logit"),
    (5, replaced_loss(zero_logits=True), "log 2 each"),
    (6, with_h("nothing"), "h is not used"),
    (6, with_h("in place"), "overwritten"),
    (6, with_h("added"), r"added to \[CLS\]"),
    (6, with_h("after"), "after the layers"),
    (6, with_h("inserted"), "h was inserted"),
    (6, with_h("detached"), "no gradient reaches h"),
    (6, with_h("unmasked"), "not given the mask"),
    (6, with_h("again"), "again after a layer"),
    (6, with_h("before each"), "again before each layer"),
    (6, with_h("longer"), "one token longer"),
    (6, with_h("early"), "of the token before"),
    (6, with_h("cold"), "none reaches the other positions"),
    (7, attention(scale=lambda d, T: 1), r"not divided by sqrt\(d\)"),
    (7, attention(scale=lambda d, T: 1 / d), "divided by d;"),
    (7, attention(keys=False), "applied to queries"),
    (7, attention(fill=0), "score 0"),
    (7, attention(fill=-100), "lower than any"),
    (7, attention(added=-10000.0), "large numbers"),
    (7, attention(scale=lambda d, T: T**-0.5), r"sqrt\(T\)"),
    (
        7,
        attention(lambda d, T: 1, of_output=lambda out, mask: out / out.shape[-1] ** 0.5),
        "output is divided",
    ),
    (
        7,
        attention(of_output=lambda out, mask: out * mask[:, None, :, None]),
        "outputs of queries at padding are 0",
    ),
    (7, attention(keys=False, fill=-1e9), "applied to queries"),
    (7, attention(dim=-2, fill=-1e9), "over queries"),
    (7, attention(after=True), "no longer sum to 1"),
    (7, attention(dim=-2), "over queries"),
    (
        7,
        {"attention": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v)},
        "padding is read",
    ),
    (8, reader(start="file"), "not of the file"),
    (8, reader(start="header"), "AND the 8 bytes"),
    (8, reader(metadata=True), "__metadata__ is not a tensor"),
    (8, reader(skip="nothing"), "__metadata__ is not a tensor"),
    (8, reader(shapes=False), "has the shape"),
    (8, reader(checked=False), "read as if it were complete"),
    (8, reader(order="big"), "little-endian"),
    (8, reader(encoding="latin-1"), "the file holds"),
    (8, reader(offsets=False), "in any order|cut short"),
    (
        9,
        {"spearman": with_ranks("in order")},
        "^the worked example: equal values are ranked in their order in the list; expected the "
        "mean of their ranks$",
    ),
    (9, {"spearman": with_ranks("dense")}, "densely"),
    (9, {"spearman": with_ranks("lowest")}, "lowest of their ranks"),
    (9, {"spearman": with_ranks("highest")}, "highest of their ranks"),
    (9, {"spearman": correlation}, "Pearson's correlation of the values"),
    (9, {"spearman": without_ties}, "only without ties"),
    (9, {"spearman": sorted_before}, "expected|itself was changed"),
    (9, {"spearman": sorted_after}, "a itself was changed"),
    (
        9,
        {"spearman": lambda a, b: correlation(np.argsort(a), np.argsort(b))},
        "argsort returns which element is first, not the rank of the first element$",
    ),
    (
        9,
        {"spearman": lambda a, b: float(np.float32(with_ranks()(a, b)))},
        r"-0\.3590924\d+; expected -0\.3590924\d+",
    ),
    (10, spaces(square=1), "square"),
    (10, spaces(mean=np.sum), "it is the sum"),
    (10, spaces(half=0.5), "1 - cosine"),
    (10, spaces(plus=1), "expected"),
    (10, spaces(factor=1), "factor 2"),
    (10, spaces(diagonal=0), "row is paired with itself"),
    (10, spaces(log_of_mean=False), "mean of the logs"),
    (11, {"recall_at_k": recall_with_zero_diagonal}, "finds itself"),
    (12, checkpoint(buffers=False), "buffer 1.running_mean"),
    (12, checkpoint(moments=False), "optimizer starts anew"),
    (12, checkpoint(count=False), "bias correction"),
    (12, checkpoint(floats=True), "'steps' is a float"),
    (12, other_parameters(), "no longer share parameters"),
    (
        12,
        checkpoint(names=("step", "exp_avg", "exp_avg_sq")),
        "starts anew|has none of them|expected|differs from the straight",
    ),
    (12, checkpoint(number=str), "whole numbers"),
    (12, checkpoint(in_order=True), "mixed up|whole numbers|starts anew|parameter"),
    (12, {"state_dict": assumes_adam}, "whatever state"),
]


@pytest.mark.parametrize("number, wrong, message", MISTAKES)
def test_a_common_mistake_has_its_own_message(number, wrong, message, tmp_path):
    found = message_of(number, SimpleNamespace(**(vars(answers) | wrong)), tmp_path)
    assert re.search(message, found), found


@pytest.mark.parametrize("mistake", [m for m in checks.recalls(np.eye(2), np.eye(2), 1) if m])
def test_mistakes_of_recall(mistake, tmp_path):
    def recall_at_k(u, v, k):
        return float(checks.recalls(u, v, k)[mistake])

    found = message_of(11, SimpleNamespace(recall_at_k=recall_at_k), tmp_path)
    assert mistake in found, found


@pytest.mark.parametrize(
    "value, message",
    [(None, "is a return missing"), ([[0.6]], "a list"), (torch.zeros(2, 2), r"shape is \(2, 2\)")],
)
def test_an_answer_of_another_type_or_shape(value, message, tmp_path):
    answer = SimpleNamespace(cosine_matrix=lambda a, b: value)
    assert re.search(message, message_of(1, answer, tmp_path))


# ------------------------------------------------------------------------------------------------
# As a student runs it


def course(folder: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "exercises", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_one_exercise_in_a_copy_of_the_repository(tmp_path):
    """The stub, a mistake and a correct answer, as they look in a terminal."""
    for part in ("exercises", "lab", "engine"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    file = tmp_path / "exercises/write_it.py"
    stubs = file.read_text()
    stub = 'raise NotImplementedError("exercise 9: spearman is not written yet")'

    def write(ranks: str) -> tuple[int, str]:
        body = f"a, b = ({ranks} for x in (a, b))\n    return float(np.corrcoef(a, b)[0, 1])"
        file.write_text(stubs.replace(stub, body))
        return course(tmp_path, "-k", "ex09")

    code, output = course(tmp_path, "-k", "ex09")
    assert code == 1 and "exercise 9: spearman is not written yet" in output
    code, output = write("np.argsort(np.argsort(x, kind='stable'))")
    assert code == 1 and "equal values are ranked in their order in the list" in output
    assert "Error" not in output and "test_write_it.py:" not in output
    code, output = write("(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2")
    assert code == 0 and "1 passed" in output


# ------------------------------------------------------------------------------------------------
# Fix it

BUGS = [name for name in vars(bugs) if name.startswith(("test_bug", "test_mended"))]


def failures(module) -> dict[str, str]:
    """The tests of test_fix_it.py that fail on this module, and their messages."""
    failed = {}
    for name in BUGS:
        function = getattr(bugs, name)
        capsys = [SimpleNamespace(readouterr=lambda: None)] * ("capsys" in arguments(function))
        try:
            function(module, *capsys)
        except pytest.fail.Exception as failure:
            failed[name] = str(failure)
    return failed


@pytest.mark.parametrize("left", [(), *((n,) for n in mends.MENDS), tuple(mends.MENDS)], ids=str)
def test_each_planted_bug_fails_its_own_test_and_no_other(left):
    """With these bugs left and the others fixed. test_mended sees all but 4, 5 and 8, which are
    outside of a step."""
    failed = failures(mends.mended(*(n for n in mends.MENDS if n not in left)))
    own = {name for n in left for name in BUGS if name.startswith(f"test_bug{n}_")}
    assert len(BUGS) == 9 and failed.keys() - {"test_mended"} == own
    assert ("test_mended" in failed) == bool({1, 2, 3, 6, 7} & set(left))
    for name, message in failed.items():
        pattern = rf"bug {name[8]}: .{{20,}}"
        assert name == "test_mended" or re.match(pattern, message, re.DOTALL), message


# ------------------------------------------------------------------------------------------------
# What was measured


def measured_symptoms() -> list[dict]:
    return json.loads((ROOT / "results/exercises/fix_it.json").read_text())["runs"]


def at(run: dict, name: str, step: int) -> float:
    return next(line[name] for line in run["log"] if line["step"] == step)


def column(run: dict, name: str, first: int = 1) -> list[float]:
    return [line[name] for line in run["log"] if line["step"] >= first]


def test_the_symptoms_in_the_text_are_those_that_were_measured():
    text = (ROOT / "EXERCISES.md").read_text()
    section = text[text.index("## Fix it") : text.index("## Explore it")]
    settings, runs = (0.05, 3e-5, 0), measured_symptoms()
    of = {r["bug"]: r for r in runs if (r["lam"], r["lr"], r["seed"]) == settings}
    three_digits = [
        *(at(of[bug], "contrastive", 1) for bug in (None, 7)),
        at(of[None], "contrastive", 40),
        *(at(of[bug], "difference", 40) for bug in (None, 6)),
        *(at(of[bug], "accuracy_replaced", 40) for bug in (None, 3, 6)),
        *(of[bug]["share_replaced"][0] for bug in (None, 3)),
        *of[6]["padded_losses"],
    ]
    two_digits = [
        *(at(of[1], "contrastive", step) for step in (1, 40)),
        *(at(of[bug], "score", step) for bug in (None, 4) for step in (0, 40)),
    ]
    for digits, numbers in ((3, three_digits), (2, two_digits)):
        for number in numbers:
            assert f"{number:.{digits}f}" in section, number
    assert at(of[5], "positive_cosine", 11) > 0.99995 > at(of[5], "positive_cosine", 10)


@pytest.mark.parametrize("seed", range(3))
def test_each_symptom_shows_with_every_seed(seed):
    runs = [run for run in measured_symptoms() if run["seed"] == seed]
    of = {(run["bug"], run["lam"], run["lr"]): run for run in runs}
    right, bug = of[None, 0.05, 3e-5], {n: of[n, 0.05, 3e-5] for n in mends.MENDS}
    other_lam = {n: of[n, 5.0, 3e-5] for n in (None, 2)}
    assert min(column(bug[1], "contrastive")) > 3.4 > 1 > at(right, "contrastive", 1)
    assert column(bug[2], "contrastive") == column(other_lam[2], "contrastive")
    assert column(right, "contrastive") != column(other_lam[None], "contrastive")
    assert bug[3]["share_replaced"][0] - right["share_replaced"][0] > 0.03
    assert at(right, "score", 0) - at(bug[4], "score", 0) > 2
    assert min(column(bug[5], "positive_cosine", first=11)) > 0.9999
    assert max(column(right, "positive_cosine")) < 0.6
    little, much = bug[6]["padded_losses"]
    assert little > 1.2 * much and np.isclose(*right["padded_losses"], rtol=1e-5)
    assert (bug[7]["num_batches_tracked"], right["num_batches_tracked"]) == (80, 40)
    with_bug, without = of[8, 0.05, 1e-3], of[None, 0.05, 1e-3]
    assert with_bug["share_replaced"][1] > 1.2 * without["share_replaced"][1]
    assert with_bug["generator_moved"] > 0 == without["generator_moved"]


SEEN = [  # experiment, group, field of the log or "score", digits; last mean ± std in the text
    ("1_seeds", "run", "score", 2),
    ("1_seeds", "run", "share_replaced", 3),
    ("2_lam", "lam 0", "contrastive", 3),
    ("2_lam", "lam 5", "contrastive", 3),
    ("2_lam", "lam 500", "contrastive", 3),
    ("2_lam", "lam 500", "score", 2),
    ("2_lam", "lam 500", "difference", 3),
    ("3_mask", "mask_ratio 0.05", "score", 2),
    ("3_mask", "mask_ratio 0.9", "score", 2),
    ("3_mask", "mask_ratio 0.9", "accuracy_replaced", 2),
    ("3_mask", "mask_ratio 0.9", "accuracy_original", 2),
    ("4_edit", "edit sample", "score", 2),
    ("4_edit", "edit argmax", "score", 2),
    ("4_edit", "edit sample", "accuracy_replaced", 2),
    ("5_detach", "program diffcse.py", "contrastive", 3),
    ("5_detach", "program detached.py", "contrastive", 3),
    ("5_detach", "program detached.py", "difference", 3),
    ("5_detach", "program detached.py", "score", 2),
    ("6_projector", "projector tanh", "contrastive", 3),
    ("6_projector", "projector tanh", "score", 2),
    ("6_projector", "projector batchnorm", "score", 2),
    ("7_generator", "generator runs/weak", "score", 2),
    ("7_generator", "generator runs/weak", "accuracy_replaced", 2),
    ("8_temperature", "temperature 1", "score", 2),
    ("8_temperature", "temperature 0.005", "score", 2),
]


@pytest.mark.parametrize("experiment, name, field, digits", SEEN)
def test_what_was_seen_is_what_was_measured(experiment, name, field, digits):
    measured = json.loads((ROOT / f"results/exercises/explore_{experiment}.json").read_text())
    group = next(group for group in measured["groups"] if group["name"] == name)
    mean, std = (group["curves"][field][key][-1] for key in ("mean", "std"))
    text = (ROOT / "EXERCISES.md").read_text()
    section = text[text.index(f"### {experiment[0]}. ") :]
    section = section.partition("\n### ")[0].partition("\n## ")[0]
    assert f"{mean:.{digits}f} ± {std:.{digits}f}" in section, (mean, std)


def test_the_experiments_have_the_demo_s_settings():
    path = str(ROOT / "exercises/explore.json")
    saved = cli.load_preset(diffcse.Config, diffcse.PRESETS, path)
    assert saved == replace(diffcse.PRESETS["demo"], steps=30)


def test_no_experiment_took_more_than_five_minutes():
    seconds = json.loads((ROOT / "results/exercises/seconds.json").read_text())
    assert sorted(seconds["runs"]) == list("12345678")
    assert max(seconds["runs"].values()) + max(seconds["page"].values()) <= 300


def test_detached_gives_the_encoder_no_gradient_of_the_discriminator():
    sentences, cfg = ["a man plays", "two cats sleep"], replace(diffcse.PRESETS["demo"], lam=1.0)
    norms = []
    for model_class in (diffcse.DiffCSEModel, detached.Detached):
        torch.manual_seed(0)
        model = model_class.from_pretrained(replace(cfg, contrastive=False)).train()
        rows = TokenizedSentences([(s,) for s in sentences], model.tokenizer, cfg.max_length)
        model(diffcse.draw_batch(rows, model.tokenizer, cfg, 0))[0].backward()
        norms.append([bugs.gradients(part).norm() for part in (model.encoder, model.discriminator)])
    (encoder, _), (encoder_detached, discriminator) = norms
    assert encoder > 0 == encoder_detached and discriminator > 0
