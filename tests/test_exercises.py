"""The course cannot rot: stubs pass no test, the repository's own functions pass all, each common mistake has its own message."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "exercises"))

import answers  # noqa: E402
import mends  # noqa: E402
import test_fix_it as bugs  # noqa: E402
import test_write_it as checks  # noqa: E402
import write_it  # noqa: E402

CHECKS = [name for name in vars(checks) if name.startswith("test_ex")]  # in the order of the file
FUNCTIONS = [name for name, thing in vars(write_it).items() if getattr(thing, "__module__", "") == "write_it"]


def call(check: str, answer, tmp_path) -> None:
    function = getattr(checks, check)
    function(answer, tmp_path) if "tmp_path" in function.__code__.co_varnames[: function.__code__.co_argcount] else function(answer)


def message_of(number: int, answer, tmp_path) -> str:
    """What the first failing check of an exercise says of an answer; "" if all pass."""
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


def test_there_are_twelve_exercises_each_with_answer_checks_and_text():
    text = (ROOT / "EXERCISES.md").read_text()
    assert {int(check[7:9]) for check in CHECKS} == set(range(1, 13)) and len(FUNCTIONS) == 13  # the twelfth is two functions
    for name in FUNCTIONS:
        stub, answer = getattr(write_it, name), getattr(answers, name)
        assert f"`{name}`" in text, name
        if answer.__module__ == "answers":
            assert answer.__code__.co_varnames[: answer.__code__.co_argcount] == stub.__code__.co_varnames[: stub.__code__.co_argcount], name


# ----------------------------------------------------------------------------------------------------------------
# Common mistakes: a wrong answer, and what must be said of it


def looped(a, b):
    return torch.stack([torch.stack([F.cosine_similarity(x, y, dim=0) for y in b]) for x in a])


def masked(share=0.8, half=0.5, special_too=None, in_place=False, sentence_share=False, own_generator=True, same_rows=False, top=None, by_row=False):
    def mask_tokens(ids, special, mask_id, vocab_size, ratio, generator):
        generator = generator if own_generator else None
        draw = torch.rand((1, ids.shape[1]) if same_rows else ids.shape, generator=generator).expand(ids.shape)
        may = ~special if special_too is None else ~special | (ids == special_too)
        selected = (draw < ratio) & may
        if sentence_share:
            draw = draw.masked_fill(~may, 2)
            selected = (draw.argsort(1).argsort(1) < (may.sum(1, keepdim=True) * ratio).round()) & may
        out = ids if in_place else ids.clone()
        rest = selected & ~(torch.rand((len(ids), 1) if by_row else ids.shape, generator=generator) < share)
        random = rest & (torch.rand(ids.shape, generator=generator) < half)
        out[selected & ~rest] = mask_id
        out[random] = torch.randint(top or vocab_size, ids.shape, generator=generator)[random]
        return out, selected

    return mask_tokens


def edited(keep_cls=True, keep_pads=True, source="x_masked", where=None, keep_sep=False, grad=False, in_place=False, blind=False):
    def edit_sentences(generator, x, x_masked, mask):
        with torch.set_grad_enabled(grad):
            best = generator({"x": x, "x_masked": x_masked}[source], torch.ones_like(mask) if blind else mask).argmax(-1)
        best = torch.where(x != x_masked, best, x) if where == "masked" else best
        best = torch.where(x == 2, x, best) if keep_sep else best
        best = torch.where(mask, best, 0) if keep_pads else best
        if keep_cls:
            best[:, 0] = x[:, 0]
        return x.copy_(best) if in_place else best

    return edit_sentences


def replaced_loss(pads=False, turned=False, total=False, labels_of_pads=False, divide_by_all=False, skip_cls=False):
    def replaced_token_loss(logits, x, x_edited, mask):
        replaced = (x != x_edited) if labels_of_pads else (x != x_edited) & mask
        labels = (x == x_edited).long() if turned else ((x != x_edited) & mask).long()
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(x)
        counted = torch.ones_like(mask) if pads else mask.clone()
        counted[:, 0] &= not skip_cls
        return replaced, (each * counted).sum() / (1 if total else x.numel() if divide_by_all else counted.sum())

    return replaced_token_loss


def unstable(logits, x, x_edited, mask):
    replaced = (x != x_edited) & mask
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return replaced, -torch.where(replaced, p[..., 1], p[..., 0])[mask].log().mean()


def with_h(how):
    def read_with_h(bert, ids, mask, h):
        x = bert.embed(ids)
        if how == "in place":
            x[:, 0] = h
        elif how == "added":
            x = torch.cat([x[:, :1] + h[:, None], x[:, 1:]], 1)
        elif how == "after":
            for layer in bert.layers:
                x = layer(x, mask)
            return torch.cat([h[:, None], x[:, 1:]], 1)
        elif how == "longer":
            x, mask = torch.cat([h[:, None], x], 1), torch.cat([mask[:, :1], mask], 1)
        elif how == "early":
            x = torch.cat([h[:, None], bert.embed(ids[:, 1:])], 1)
        elif how == "cold":
            x = torch.cat([h[:, None], x[:, 1:].detach()], 1)
        elif how == "in front":
            x = torch.cat([h[:, None], x[:, :-1]], 1)
        elif how != "nothing":
            x = torch.cat([(h.detach() if how == "detached" else h)[:, None], x[:, 1:]], 1)
        for layer in bert.layers:
            x = torch.cat([h[:, None], x[:, 1:]], 1) if how == "before each" else x
            x = layer(x, torch.ones_like(mask) if how == "unmasked" else mask)
            x = torch.cat([h[:, None], x[:, 1:]], 1) if how == "again" else x
        return x

    return read_with_h


def attention(scale=lambda d: d**-0.5, keys=True, fill=-torch.inf, after=False, dim=-1):
    def attend(q, k, v, mask):
        where = mask[:, None, None, :] if keys else mask[:, None, :, None]
        scores = q @ k.transpose(-1, -2) * scale(q.shape[-1])
        return (scores.softmax(-1) * where if after else scores.masked_fill(~where, fill).softmax(dim)) @ v

    return attend


def reader(start=None, order="little", metadata=False, shapes=True, checked=True, encoding="utf-8", offsets=True, skip="__metadata__"):
    """A reader of safetensors files, whole or with one mistake."""

    def read_safetensors(path):
        raw = Path(path).read_bytes()
        if len(raw) < 8:
            raise ValueError("no header")
        size = int.from_bytes(raw[:8], order)
        header = json.loads(raw[8 : 8 + size].decode(encoding))
        at = 0
        data = raw[{None: 8 + size, "file": 0, "header": size}[start] :]
        out = {}
        for name, entry in header.items():
            if name == skip:
                if metadata:
                    out[name] = torch.tensor(0.0)
                continue
            begin, end = entry["data_offsets"] if offsets else (at, at + entry["data_offsets"][1] - entry["data_offsets"][0])
            at = end
            if end > len(data) and checked:
                raise ValueError("too short")
            cut = bytearray(data[begin:end])
            dtype = write_it.DTYPES[entry["dtype"]]
            flat = torch.frombuffer(cut, dtype=dtype) if len(cut) // dtype.itemsize else torch.empty(0, dtype=dtype)
            out[name] = flat.view(entry["shape"]) if shapes and flat.numel() == math.prod(entry["shape"]) else flat
        return out

    return read_safetensors


def spearman_with(kind):
    return lambda a, b: float(np.corrcoef(checks.ranks_of(a, kind), checks.ranks_of(b, kind))[0, 1])


def no_ties(a, b):
    d = checks.ranks_of(a) - checks.ranks_of(b)
    return 1 - 6 * float(d @ d) / (len(a) * (len(a) ** 2 - 1))


def spaces(square=2, factor=2, diagonal=1, log_of_mean=True, mean=np.mean):
    def alignment_and_uniformity(u, v):
        x = np.concatenate([u, v])
        far = np.linalg.norm(x[:, None] - x, axis=-1)[np.triu_indices(len(x), diagonal)]
        kernel = -factor * far**square
        return float(mean(np.linalg.norm(u - v, axis=1) ** square)), float(np.log(np.exp(kernel).mean()) if log_of_mean else kernel.mean())

    return alignment_and_uniformity


def recall(u, v, k, own):
    x, P = np.concatenate([u, v]), len(u)
    cosines = x @ x.T
    np.fill_diagonal(cosines, own)
    partner = cosines[np.arange(2 * P), (np.arange(2 * P) + P) % (2 * P)]
    return 100 * float(((cosines > partner[:, None] + 1e-9).sum(1) < k).mean())


def kept(buffers=True, moments=True, count=True, floats=False, names=None, numbers=int):
    def state_of(model, optimizer):
        tensors = {f"m.{n}": t for n, t in (model.state_dict() if buffers else dict(model.named_parameters())).items()}
        for i, state in optimizer.state_dict()["state"].items() if moments else ():
            tensors |= {f"o.{i}.{n}": t for n, t in state.items() if torch.is_tensor(t) and (count or n != "step") and (names is None or n in names)}
        return tensors | ({"steps": 3.0} if floats else {})

    def restore(tensors, model, optimizer):
        model.load_state_dict({n[2:]: t for n, t in tensors.items() if n.startswith("m.")}, strict=False)
        state = {}
        for n, t in tensors.items():
            if n.startswith("o."):
                _, i, name = n.split(".")
                state.setdefault(numbers(i), {} if name == "momentum_buffer" else {"step": torch.tensor(0.0)})[name] = t
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    return {"state_of": state_of, "restore": restore}


def in_order():
    """State numbered as it stands in optimizer.state: a parameter without any moves all others on."""
    def state_of(model, optimizer):
        return {f"m.{n}": t for n, t in model.state_dict().items()} | {f"o.{i}.{n}": t for i, state in enumerate(optimizer.state.values()) for n, t in state.items()}

    return kept() | {"state_of": state_of}


def other_parameters():
    def restore(tensors, model, optimizer):
        for name, _ in list(model.named_parameters()):
            holder = model.get_submodule(name.rpartition(".")[0])
            setattr(holder, name.rpartition(".")[2], nn.Parameter(tensors[f"m.{name}"]))

    return kept() | {"restore": restore}


def infonce(how):
    def contrastive_loss(h, temperature):
        z = F.normalize(h, dim=-1)
        scores = z[:, 0] @ z[:, 1].T / temperature
        nll = -scores.log_softmax(1).diagonal()
        if how == "multiplied":
            return -(scores * temperature**2).log_softmax(1).diagonal().mean()
        if how == "overflow":
            return -(scores.exp() / scores.exp().sum(1, keepdim=True)).diagonal().log().mean()
        if how == "underflow":
            return -scores.softmax(1).diagonal().log().mean()
        if how == "twice":
            return F.cross_entropy(scores.softmax(1), torch.arange(len(h)))
        if how == "products":
            return -(h[:, 0] @ h[:, 1].T / temperature).log_softmax(1).diagonal().mean()
        if how == "detached":
            return -(z[:, 0] @ z[:, 1].detach().T / temperature).log_softmax(1).diagonal().mean()
        return {"transposed": -scores.T.log_softmax(1).diagonal().mean(), "sum": nll.sum(), "each": nll, "sign": -nll.mean(),
                "both": (nll - scores.T.log_softmax(1).diagonal()).mean() / 2, "no temperature": -(scores * temperature).log_softmax(1).diagonal().mean(),
                "own missing": -(scores.diagonal() - scores.masked_fill(torch.eye(len(scores)).bool(), -torch.inf).logsumexp(1)).mean()}[how]  # fmt: skip

    return contrastive_loss


MISTAKES = [
    (1, {"cosine_matrix": lambda a, b: F.normalize(b) @ F.normalize(a).T}, "transposed"),
    (1, {"cosine_matrix": lambda a, b: a @ b.T}, "products, not cosines"),
    (1, {"cosine_matrix": lambda a, b: F.normalize(a) @ b.T}, "only a's vectors"),
    (1, {"cosine_matrix": lambda a, b: (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T}, "zeros gives NaN"),
    (1, {"cosine_matrix": lambda a, b: (a / (a.norm(dim=1, keepdim=True) + 1e-6)) @ (b / (b.norm(dim=1, keepdim=True) + 1e-6)).T}, "short vector"),
    (1, {"cosine_matrix": looped}, "a loop in it"),
    (1, {"cosine_matrix": lambda a, b: F.cosine_similarity(a[:, None], b[None], dim=-1, eps=1e-12)}, "40 x 50 x 60 numbers"),
    (1, {"cosine_matrix": lambda a, b: a.div_(a.norm(dim=1, keepdim=True)) @ F.normalize(b).T}, "a itself was changed"),
    (1, {"cosine_matrix": lambda a, b: (F.normalize(a)[:, None] * F.normalize(b)[None]).sum(-1)}, "40 x 50 x 60 numbers"),
    (2, {"contrastive_loss": infonce("multiplied")}, "multiplied by the temperature"),
    (2, {"contrastive_loss": infonce("no temperature")}, "no effect"),
    (2, {"contrastive_loss": infonce("transposed")}, "transposed"),
    (2, {"contrastive_loss": infonce("both")}, "both directions"),
    (2, {"contrastive_loss": infonce("sum")}, "it is the sum"),
    (2, {"contrastive_loss": infonce("each")}, "one loss for each"),
    (2, {"contrastive_loss": infonce("sign")}, "sign"),
    (2, {"contrastive_loss": infonce("own missing")}, "own second view is missing"),
    (2, {"contrastive_loss": infonce("products")}, "cosines"),
    (2, {"contrastive_loss": infonce("detached")}, "second views get no gradient"),
    (2, {"contrastive_loss": infonce("overflow")}, "more than a float holds"),
    (2, {"contrastive_loss": infonce("underflow")}, "less than a float holds"),
    (2, {"contrastive_loss": infonce("twice")}, "softmax is taken twice"),
    (2, {"contrastive_loss": checks.simclr}, "as in SimCLR"),
    (3, {"mask_tokens": masked(special_too=3)}, r"touches \[SEP\]"),
    (3, {"mask_tokens": masked(special_too=2)}, r"touches \[CLS\]"),
    (3, {"mask_tokens": masked(special_too=0)}, "touches padding"),
    (3, {"mask_tokens": masked(in_place=True)}, "ids themselves were changed"),
    (3, {"mask_tokens": masked(share=1.0)}, r"became \[MASK\]"),
    (3, {"mask_tokens": masked(half=0.1)}, "18 % of the selected stay"),
    (3, {"mask_tokens": masked(half=0.9)}, "2 % of the selected stay"),
    (3, {"mask_tokens": masked(by_row=True)}, "its own draw again"),
    (3, {"mask_tokens": masked(sentence_share=True)}, "draw of its own|own draw"),
    (3, {"mask_tokens": masked(own_generator=False)}, "come from `generator`"),
    (3, {"mask_tokens": masked(same_rows=True)}, "all rows are masked at the same places"),
    (3, {"mask_tokens": masked(top=1)}, "few different ones"),
    (3, {"mask_tokens": lambda ids, special, mask_id, V, ratio, g: masked()(ids, special, mask_id, V - 1, ratio, g)}, "any from 0 to 7"),
    (3, {"mask_tokens": lambda ids, special, mask_id, V, ratio, g: masked()(ids, special, mask_id, V + 1, ratio, g)}, "none above"),
    (3, {"mask_tokens": lambda ids, *others: (x := masked()(ids, *others)[0], x != ids)}, "selected and stayed count"),
    (4, {"edit_sentences": edited(keep_cls=False)}, r"\[CLS\] is to be put back"),
    (4, {"edit_sentences": edited(keep_pads=False)}, "padding has the generator's tokens"),
    (4, {"edit_sentences": edited(source="x")}, "the generator was given x;"),
    (4, {"edit_sentences": edited(where="masked")}, "the paper's reading"),
    (4, {"edit_sentences": edited(keep_sep=True)}, r"\[SEP\] is kept"),
    (4, {"edit_sentences": edited(in_place=True)}, "x itself was changed"),
    (4, {"edit_sentences": edited(grad=True)}, "gradients on"),
    (4, {"edit_sentences": edited(blind=True)}, "not given the mask"),
    (4, {"edit_sentences": lambda *a: (torch.set_grad_enabled(False), edited(grad=False)(*a))[1]}, "still switched off afterwards"),
    (4, {"edit_sentences": lambda g, *others: edited()(g.eval(), *others)}, "eval mode"),
    (4, {"edit_sentences": lambda g, *others: (edited()(g.eval(), *others), g.train())[0]}, "eval mode"),
    (4, {"edit_sentences": lambda g, x, m, mask: torch.cat([m[:, :1], edited()(g, x, m, mask)[:, 1:]], 1)}, "that of x', where it may be masked"),
    (4, {"edit_sentences": lambda *a: edited()(*a).int()}, "int64"),
    (4, {"edit_sentences": lambda g, x, m, mask: torch.where(mask, edited()(g, x, m, mask), x)}, "padding is as it was in x"),
    (4, {"edit_sentences": lambda g, x, m, mask: torch.cat([x[:1, :1].expand(len(x), 1), edited()(g, x, m, mask)[:, 1:]], 1)}, "first row's"),
    (5, {"replaced_token_loss": replaced_loss(pads=True)}, "padding counts"),
    (5, {"replaced_token_loss": replaced_loss(divide_by_all=True)}, "divided by"),
    (5, {"replaced_token_loss": replaced_loss(turned=True)}, "classes are turned"),
    (5, {"replaced_token_loss": replaced_loss(total=True)}, "sum"),
    (5, {"replaced_token_loss": replaced_loss(labels_of_pads=True)}, "padding counts as replaced"),
    (5, {"replaced_token_loss": replaced_loss(skip_cls=True)}, "position 0"),
    (5, {"replaced_token_loss": lambda *a: (replaced_loss()(*a)[0].long(), replaced_loss()(*a)[1])}, "bool is wanted"),
    (5, {"replaced_token_loss": lambda logits, x, e, mask: ((x != e) & (e != 0), replaced_loss()(logits, x, e, mask)[1])}, "not where an id is 0"),
    (5, {"replaced_token_loss": unstable}, "large logits"),
    (5, {"replaced_token_loss": lambda logits, *others: replaced_loss()(logits.softmax(-1), *others)}, "softmax is taken twice"),
    (5, {"replaced_token_loss": lambda logits, x, e, mask: (r := (x != e) & mask, F.binary_cross_entropy_with_logits(logits[..., 1][mask], r[mask].to(logits)))}, "only the second logit"),
    (5, {"replaced_token_loss": lambda logits, x, e, mask: replaced_loss(pads=True)(logits * mask[..., None], x, e, mask)}, "log 2 each"),
    (6, {"read_with_h": with_h("nothing")}, "h is not there"),
    (6, {"read_with_h": with_h("in place")}, "overwritten"),
    (6, {"read_with_h": with_h("added")}, r"added to \[CLS\]"),
    (6, {"read_with_h": with_h("after")}, "after the layers"),
    (6, {"read_with_h": with_h("in front")}, "one place further"),
    (6, {"read_with_h": with_h("detached")}, "no gradient reaches h"),
    (6, {"read_with_h": with_h("unmasked")}, "not given the mask"),
    (6, {"read_with_h": with_h("again")}, "again after a layer"),
    (6, {"read_with_h": with_h("before each")}, "again before each layer"),
    (6, {"read_with_h": with_h("longer")}, "one place longer"),
    (6, {"read_with_h": with_h("early")}, "one place too early"),
    (6, {"read_with_h": with_h("cold")}, "none reaches the other positions"),
    (7, {"attention": attention(scale=lambda d: 1)}, r"not divided by sqrt\(d\)"),
    (7, {"attention": attention(scale=lambda d: 1 / d)}, "divided by d;"),
    (7, {"attention": attention(keys=False)}, "laid over the queries"),
    (7, {"attention": attention(fill=0)}, "score 0"),
    (7, {"attention": attention(fill=-100)}, "lower than any"),
    (7, {"attention": lambda q, k, v, mask: (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + ~mask[:, None, None, :] * -10000.0).softmax(-1) @ v}, "wild numbers"),
    (7, {"attention": lambda q, k, v, mask: attention(scale=lambda d: q.shape[2] ** -0.5)(q, k, v, mask)}, "root of T"),
    (7, {"attention": lambda q, k, v, mask: attention(scale=lambda d: 1)(q, k, v, mask) / q.shape[-1] ** 0.5}, "output is divided"),
    (7, {"attention": lambda q, k, v, mask: attention()(q, k, v, mask) * mask[:, None, :, None]}, "queries at padding were set to 0"),
    (7, {"attention": attention(keys=False, fill=-1e9)}, "laid over the queries"),
    (7, {"attention": attention(dim=-2, fill=-1e9)}, "over the queries"),
    (7, {"attention": attention(after=True)}, "no longer sum to 1"),
    (7, {"attention": attention(dim=-2)}, "over the queries"),
    (7, {"attention": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v)}, "padding is read"),
    (8, {"read_safetensors": reader(start="file")}, "not from the file's"),
    (8, {"read_safetensors": reader(start="header")}, "AND the 8 bytes"),
    (8, {"read_safetensors": reader(metadata=True)}, "__metadata__ is no tensor"),
    (8, {"read_safetensors": reader(skip="nothing")}, "__metadata__ is no tensor"),
    (8, {"read_safetensors": reader(shapes=False)}, "has the shape"),
    (8, {"read_safetensors": reader(checked=False)}, "read as if it were whole"),
    (8, {"read_safetensors": reader(order="big")}, "lowest byte first"),
    (8, {"read_safetensors": reader(encoding="latin-1")}, "the file holds"),
    (8, {"read_safetensors": reader(offsets=False)}, "header's order|cut short|whole"),
    (9, {"spearman": spearman_with("in order")}, "the worked example: equal values are ranked in the order in which they stand; they are to share the mean of their ranks$"),
    (9, {"spearman": spearman_with("dense")}, "densely"),
    (9, {"spearman": spearman_with("lowest")}, "lowest of their ranks"),
    (9, {"spearman": spearman_with("highest")}, "highest of their ranks"),
    (9, {"spearman": lambda a, b: float(np.corrcoef(a, b)[0, 1])}, "Pearson's correlation of the values"),
    (9, {"spearman": no_ties}, "only without ties"),
    (9, {"spearman": lambda a, b: (a.sort(), b.sort(), spearman_with("average")(a, b))[2]}, "expected|itself was changed"),
    (9, {"spearman": lambda a, b: (spearman_with("average")(a, b), a.sort())[0]}, "a itself was changed"),
    (9, {"spearman": lambda a, b: float(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1])}, "argsort says which element comes first, not which rank the first element has$"),
    (9, {"spearman": lambda a, b: float(np.float32(spearman_with("average")(a, b)))}, r"-0\.3590924\d+ where -0\.3590924\d+"),
    (10, {"alignment_and_uniformity": spaces(square=1)}, "squared"),
    (10, {"alignment_and_uniformity": spaces(mean=np.sum)}, "it is the sum"),
    (10, {"alignment_and_uniformity": lambda u, v: (float((1 - (u * v).sum(1)).mean()), spaces()(u, v)[1])}, "1 - cosine"),
    (10, {"alignment_and_uniformity": lambda u, v: (spaces()(u, v)[0], (spaces()(u, u[::-1])[1] + 1))}, "expected"),
    (10, {"alignment_and_uniformity": spaces(factor=1)}, "factor 2"),
    (10, {"alignment_and_uniformity": spaces(diagonal=0)}, "row is paired with itself"),
    (10, {"alignment_and_uniformity": spaces(log_of_mean=False)}, "mean of the logs"),
    (11, {"recall_at_k": lambda u, v, k: recall(u, v, k, 0.0)}, "finds itself"),
    (12, kept(buffers=False), "buffer 1.running_mean"),
    (12, kept(moments=False), "optimizer begins anew"),
    (12, kept(count=False), "bias correction"),
    (12, kept(floats=True), "'steps' is a float"),
    (12, other_parameters(), "other parameters now"),
    (12, kept(names=("step", "exp_avg", "exp_avg_sq")), "begins anew|has none of them|expected|another at step"),
    (12, kept(numbers=str), "whole numbers"),
    (12, in_order(), "mixed up|whole numbers|begins anew|parameter"),
    (12, {"state_of": lambda model, optimizer: model.state_dict() | {f"{i}": optimizer.state[p]["exp_avg"] for i, p in enumerate(model.parameters())}}, "whatever state"),
]  # fmt: skip


@pytest.mark.parametrize("number, wrong, message", MISTAKES)
def test_a_common_mistake_is_told_by_its_name(number, wrong, message, tmp_path):
    said = message_of(number, SimpleNamespace(**(vars(answers) | wrong)), tmp_path)
    assert re.search(message, said), said


@pytest.mark.parametrize("mistake", [name for name in checks.recalls(np.eye(2), np.eye(2), 1) if name])
def test_mistakes_of_recall(mistake, tmp_path):
    said = message_of(11, SimpleNamespace(recall_at_k=lambda u, v, k: float(checks.recalls(u, v, k)[mistake])), tmp_path)
    assert mistake in said, said


@pytest.mark.parametrize("answer, message", [(lambda a, b: None, "is a return missing"), (lambda a, b: [[0.6]], "a list"), (lambda a, b: torch.zeros(2, 2), r"shape is \(2, 2\)")])
def test_what_is_no_answer_at_all(answer, message, tmp_path):
    assert re.search(message, message_of(1, SimpleNamespace(cosine_matrix=answer), tmp_path))


def test_loops_are_seen_and_products_are_not():
    assert checks.loops(looped) and not checks.loops(answers.cosine_matrix)


# ----------------------------------------------------------------------------------------------------------------
# As a student runs it


def course(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "pytest", "exercises", *words], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_one_exercise_in_a_copy_of_the_repository(tmp_path):
    """A stub, then a mistake, then the right thing, as they look in a terminal."""
    for part in ("exercises", "lab"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    stubs = (tmp_path / "exercises/write_it.py").read_text()

    def write(body: str) -> tuple[int, str]:
        (tmp_path / "exercises/write_it.py").write_text(stubs.replace('raise NotImplementedError("exercise 9: spearman is not written yet")', body))
        return course(tmp_path, "-k", "ex09")

    code, said = course(tmp_path, "-k", "ex09")
    assert code == 1 and "exercise 9: spearman is not written yet" in said
    ranks = "a, b = (np.argsort(np.argsort(x, kind='stable')) for x in (a, b))\n    return float(np.corrcoef(a, b)[0, 1])"
    code, said = write(ranks)
    assert code == 1 and "equal values are ranked in the order in which they stand" in said and "Error" not in said and "test_write_it.py:" not in said
    code, said = write(ranks.replace("np.argsort(np.argsort(x, kind='stable'))", "(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2"))
    assert code == 0 and "1 passed" in said


# ----------------------------------------------------------------------------------------------------------------
# Fix it: the bugs

BUGS = [name for name in vars(bugs) if name.startswith(("test_bug", "test_mended"))]


def outcome(module) -> dict[str, str]:
    """Which tests of test_fix_it.py fail on this module, and with what."""
    failed = {}
    for name in BUGS:
        function = getattr(bugs, name)
        wants = function.__code__.co_varnames[: function.__code__.co_argcount]
        try:
            function(module, *([SimpleNamespace(readouterr=lambda: None)] if "capsys" in wants else []))
        except pytest.fail.Exception as failure:
            failed[name] = str(failure)
    return failed


@pytest.mark.parametrize("left", [(), *((n,) for n in mends.MENDS), tuple(mends.MENDS)], ids=str)
def test_each_planted_bug_fails_its_own_test_and_no_other(left):
    """With these bugs left and all others mended. What a whole step shows of them the last test sees too: not 4, 5 and 8, which are outside of it."""
    failed = outcome(mends.mended(*(n for n in mends.MENDS if n not in left)))
    assert len(BUGS) == 9 and {name for name in failed if name != "test_mended"} == {name for n in left for name in BUGS if name.startswith(f"test_bug{n}_")}
    assert ("test_mended" in failed) == bool({1, 2, 3, 6, 7} & set(left))
    for name, message in failed.items():
        assert name == "test_mended" or re.match(rf"bug {name[8]}: .{{20,}}", message, re.DOTALL), message


def test_the_symptoms_in_the_text_are_those_that_were_measured():
    text, measured = (ROOT / "EXERCISES.md").read_text(), json.loads((ROOT / "results/exercises/fix_it.json").read_text())
    rows = {run["mistake"]: run["rows"] for run in measured["runs"] if (run["lam"], run["lr"], run["seed"]) == (0.05, 3e-5, 0)}

    def mean(which, name, steps):
        return np.mean([row[name] for row in rows[which] if row["step"] in steps])

    for number in (rows[None][1]["contrastive"], rows[None][40]["contrastive"], rows[7][1]["contrastive"], rows[5][10]["contrastive"], rows[6][40]["prediction"],
                   rows[6][40]["accuracy_replaced"], rows[3][40]["accuracy_replaced"], rows[None][40]["accuracy_replaced"], mean(3, "share_replaced", range(1, 11)),
                   mean(None, "share_replaced", range(1, 11))):  # fmt: skip
        assert f"{number:.3f}" in text, number
    for number in (rows[1][1]["contrastive"], rows[1][40]["contrastive"], rows[4][0]["score"], rows[4][40]["score"], rows[None][0]["score"], rows[None][40]["score"]):
        assert f"{number:.2f}" in text, number
    assert rows[5][11]["positive_cosine"] > 0.99995 > rows[5][10]["positive_cosine"]


@pytest.mark.parametrize("seed", range(3))
def test_each_symptom_shows_with_every_seed(seed):
    runs = json.loads((ROOT / "results/exercises/fix_it.json").read_text())["runs"]
    of = {(run["mistake"], run["lam"], run["lr"]): run for run in runs if run["seed"] == seed}
    right, bug = of[None, 0.05, 3e-5], {n: of[n, 0.05, 3e-5] for n in mends.MENDS}

    def column(run, name, steps=range(1, 41)):
        return [run["rows"][step][name] for step in steps]

    assert min(column(bug[1], "contrastive")) > 3.4 > 1 > column(right, "contrastive")[0]
    assert column(bug[2], "contrastive") == column(of[2, 5.0, 3e-5], "contrastive") and column(right, "contrastive") != column(of[None, 5.0, 3e-5], "contrastive")
    assert np.mean(column(bug[3], "share_replaced")) - np.mean(column(right, "share_replaced")) > 0.04
    assert bug[4]["rows"][0]["score"] < 47 < 55 < right["rows"][0]["score"]
    assert min(column(bug[5], "positive_cosine", range(11, 41))) > 0.9999 and max(column(right, "positive_cosine")) < 0.6
    assert bug[6]["padded_losses"][0] > 1.5 * bug[6]["padded_losses"][1] and np.isclose(*right["padded_losses"], rtol=1e-5)
    assert (bug[7]["num_batches_tracked"], right["num_batches_tracked"]) == (80, 40)
    warm, warm_right = of[8, 0.05, 1e-3], of[None, 0.05, 1e-3]
    assert np.mean(column(warm, "share_replaced", range(31, 41))) > 0.4 > 0.3 > np.mean(column(warm_right, "share_replaced", range(31, 41)))
    assert warm["generator_moved"] > 0 == warm_right["generator_moved"]


SEEN = [  # experiment, the group's name, a field of the log or "score": its last mean ± std, as the text has it
    ("1_seeds", "demo", "score", 2), ("2_lam", "lam 0", "contrastive", 3), ("2_lam", "lam 5", "contrastive", 3), ("2_lam", "lam 500", "contrastive", 3),
    ("2_lam", "lam 500", "score", 2), ("2_lam", "lam 500", "prediction", 3), ("3_mask", "mask_ratio 0.05", "score", 2), ("3_mask", "mask_ratio 0.9", "score", 2),
    ("3_mask", "mask_ratio 0.9", "accuracy_replaced", 2), ("3_mask", "mask_ratio 0.9", "accuracy_kept", 2), ("4_edit", "edit sample", "score", 2),
    ("4_edit", "edit argmax", "score", 2), ("4_edit", "edit sample", "accuracy_replaced", 2), ("5_detach", "program diffcse.py", "contrastive", 3),
    ("5_detach", "program detached.py", "contrastive", 3), ("5_detach", "program detached.py", "prediction", 3), ("5_detach", "program detached.py", "score", 2),
    ("6_projector", "projector tanh", "contrastive", 3), ("6_projector", "projector tanh", "score", 2), ("6_projector", "projector batchnorm", "score", 2),
    ("7_generator", "generator runs/weak", "score", 2), ("8_temperature", "temperature 1", "score", 2), ("8_temperature", "temperature 0.005", "score", 2)]  # fmt: skip


@pytest.mark.parametrize("experiment, name, field, digits", SEEN)
def test_what_was_seen_is_what_was_measured(experiment, name, field, digits):
    measured = json.loads((ROOT / f"results/exercises/explore_{experiment}.json").read_text())
    curve = next(group["curves"][field] for group in measured["groups"] if group["name"] == name)
    text = (ROOT / "EXERCISES.md").read_text()
    section = text[text.index(f"### {experiment[0]}. ") :].partition("\n### ")[0].partition("\n## ")[0]
    assert f"{curve['mean'][-1]:.{digits}f} ± {curve['std'][-1]:.{digits}f}" in section, (curve["mean"][-1], curve["std"][-1])


def test_no_experiment_took_more_than_five_minutes():
    seconds = json.loads((ROOT / "results/exercises/seconds.json").read_text())
    assert sorted(seconds["runs"]) == list("12345678") and max(seconds["runs"].values()) + max(seconds["page"].values()) <= 300
