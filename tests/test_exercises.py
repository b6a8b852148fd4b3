"""The course keeps working: stubs fail, correct answers pass, and each common mistake has its own
message. EXERCISES.md says what was measured."""

import inspect
import json
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
import torch.nn.functional as F
from conftest import ROOT

import diffcse
from engine import cli
from engine.tokens import TokenizedSentences

sys.path.insert(0, str(ROOT / "exercises"))

import answers  # noqa: E402
import detached  # noqa: E402
import mends  # noqa: E402
import test_fix_it as bugs  # noqa: E402
import test_write_it as checks  # noqa: E402
import write_it  # noqa: E402
from test_write_it import nll, ranks_of  # noqa: E402

CHECKS = [name for name in vars(checks) if name.startswith("test_ex")]  # in the file's order


def arguments(function) -> list[str]:
    return list(inspect.signature(function).parameters)


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
    stubs = [f for f in vars(write_it).values() if inspect.getmodule(f) is write_it]
    assert len(stubs) == 13  # the twelfth exercise has two
    for stub in stubs:
        answer = getattr(answers, stub.__name__)
        assert f"`{stub.__name__}`" in text, stub
        if answer.__module__ == "answers":
            assert arguments(answer) == arguments(stub), stub


# ------------------------------------------------------------------------------------------------
# Correct answers, in whose source the mistakes are made


def cosine_matrix(a, b):
    a, b = F.normalize(a), F.normalize(b)
    return a @ b.T


def contrastive_loss(h, temperature):
    z = F.normalize(h, dim=-1)
    logits = z[:, 0] @ z[:, 1].T / temperature
    return nll(logits).mean()


def mask_tokens(ids, special, mask_id, vocab_size, ratio, generator):
    def draw(*shape):
        return torch.rand(shape, generator=generator)

    (R, T), x_masked = ids.shape, ids.clone()
    selected = (draw(R, T) < ratio) & ~special
    rest = selected & (draw(R, T) >= 0.8)
    random = rest & (draw(R, T) < 0.5)
    words = torch.randint(vocab_size, (R, T), generator=generator)
    x_masked[selected & ~rest] = mask_id
    x_masked[random] = words[random]
    return x_masked, selected


def edit_sentences(generator, x, x_masked, mask):
    with torch.no_grad():
        best = generator(x_masked, mask).argmax(-1)
    best[:, 0] = x[:, 0]
    return torch.where(mask, best, 0)


def replaced_token_loss(logits, x, x_edited, mask):
    replaced = (x != x_edited) & mask
    loss = F.cross_entropy(logits[mask], replaced[mask].long())
    return replaced, loss


def read_with_h(bert, ids, mask, h):
    x = bert.embeddings(ids)
    x = torch.cat([h[:, None], x[:, 1:]], 1)
    for layer in bert.layers:
        x = layer(x, mask)
    return x


def attention(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
    return weights @ v


def read_safetensors(path):
    raw = Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size].decode())
    data, tensors, end = raw[8 + size :], {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise ValueError("too short")
        part, dtype = bytearray(data[begin:end]), write_it.DTYPES[entry["dtype"]]
        flat = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def spearman(a, b):
    a, b = (ranks_of(x, "average") for x in (a, b))
    return float(np.corrcoef(a, b)[0, 1])


def alignment_and_uniformity(u, v):
    x = np.concatenate([u, v])
    distance = np.linalg.norm(x[:, None] - x, axis=-1)[np.triu_indices(len(x), 1)]
    align = (np.linalg.norm(u - v, axis=1) ** 2).mean()
    return align, np.log(np.exp(-2 * distance**2).mean())


def recall_at_k(u, v, k):
    x, P = np.concatenate([u, v]), len(u)
    cosines = x @ x.T
    partner = cosines[np.arange(2 * P), (np.arange(2 * P) + P) % (2 * P)]
    np.fill_diagonal(cosines, -np.inf)
    closer = (cosines > partner[:, None] + 1e-9).sum(1)
    return 100 * (closer < k).mean()


def state_dict(model, optimizer):
    tensors = {f"m.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if torch.is_tensor(value):
                tensors[f"o.{i}.{name}"] = value
    return tensors


def load_state_dict(tensors, model, optimizer):
    of_model = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("m.")}
    model.load_state_dict(of_model, strict=False)
    state = {}
    for key in (key for key in tensors if key.startswith("o.")):
        _, i, name = key.split(".")
        state.setdefault(int(i), {})[name] = tensors[key]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


ANSWERS = [(cosine_matrix,), (contrastive_loss,), (mask_tokens,), (edit_sentences,)]
ANSWERS += [(replaced_token_loss,), (read_with_h,), (attention,), (read_safetensors,), (spearman,)]
ANSWERS += [(alignment_and_uniformity,), (recall_at_k,), (state_dict, load_state_dict)]

# Of each exercise: what the message must contain (a regular expression), then old and new text
NORM, BOTH = "F.normalize(a), F.normalize(b)", "logits[mask], replaced[mask]"
REST, CAT = "[:, 1:][mask[:, 1:]]", "torch.cat([h[:, None], x[:, 1:]], 1)"
SCALE, HIDE = " / q.shape[-1] ** 0.5", ".masked_fill(~mask[:, None, None, :], -torch.inf)"
OFFSETS, RANKS = 'entry["data_offsets"]', 'ranks_of(x, "average")'
IS_TENSOR, ADAM = "torch.is_tensor(value)", "('step', 'exp_avg', 'exp_avg_sq')"
MISTAKES = {
    1: [
        ("transposed", "a @ b.T", "b @ a.T"),
        ("products, not cosines", NORM, "a, b"),
        ("only a's vectors", ", F.normalize(b)", ", b"),
        ("zeros gives NaN", NORM, "(x / x.norm(dim=1, keepdim=True) for x in (a, b))"),
        ("short vector", NORM, "(x / (x.norm(dim=1, keepdim=True) + 1e-6) for x in (a, b))"),
        ("a loop in it", "a @ b.T", "torch.stack([(x * b).sum(1) for x in a])"),
        ("40 x 50 x 60 numbers", "a @ b.T", "F.cosine_similarity(a[:, None], b[None], dim=-1)"),
        ("40 x 50 x 60 numbers", "a @ b.T", "(a[:, None] * b[None]).sum(-1)"),
        ("a itself was changed", "F.normalize(a)", "a.div_(a.norm(dim=1, keepdim=True))"),
        ("is a return missing", "return ", ""),
        ("a list", "a @ b.T", "(a @ b.T).tolist()"),
        (r"shape is \(2, 2\)", "a @ b.T", "(a @ b.T)[:, :2]"),
    ],
    2: [
        ("multiplied by the temperature", "/ temperature", "* temperature"),
        ("no effect", "/ temperature", ""),
        ("transposed", "(logits)", "(logits.T)"),
        ("both directions", "nll(logits)", "((nll(logits) + nll(logits.T)) / 2)"),
        ("it is the sum", ".mean()", ".sum()"),
        ("one loss for each", ".mean()", ""),
        ("sign", "return", "return -"),
        (
            "own second view is missing",
            "nll(logits)",
            "((logits - 1e9 * torch.eye(len(h))).logsumexp(1) - logits.diagonal())",
        ),
        ("cosines", "F.normalize(h, dim=-1)", "h"),
        ("second views have no gradient", "z[:, 1]", "z[:, 1].detach()"),
        ("overflows", "nll(logits)", "-(logits.exp() / logits.exp().sum(1)).diagonal().log()"),
        ("underflows", "nll(logits)", "-logits.softmax(1).diagonal().log()"),
        ("softmax is applied twice", "(logits)", "(logits.softmax(1))"),
        ("as in SimCLR", "nll(logits).mean()", "checks.simclr(h, temperature)"),
    ],
    3: [
        (r"touches \[SEP\]", "~special", "(~special | (ids == 3))"),
        (r"touches \[CLS\]", "~special", "(~special | (ids == 2))"),
        ("touches padding", "~special", "(~special | (ids == 0))"),
        ("ids itself was changed", ".clone()", ""),
        (r"became \[MASK\]", "0.8", "1.0"),
        ("18 % of the selected tokens stay", "0.5", "0.1"),
        ("2 % of the selected tokens stay", "0.5", "0.9"),
        ("draw once more", "draw(R, T) >= 0.8", "draw(R, 1) >= 0.8"),
        (
            "draw for each token on its own",
            "draw(R, T) < ratio",
            "(draw(R, T) + special).argsort(1).argsort(1) < (~special).sum(1, True) * ratio - 0.5",
        ),
        ("come from `generator`", "torch.rand(shape, generator=generator)", "torch.rand(shape)"),
        ("for the random ids, too", "(R, T), generator=generator", "(R, T)"),
        ("all rows are masked at the same positions", "draw(R, T) < ratio", "draw(T) < ratio"),
        ("few different values", "randint(vocab_size", "randint(1"),
        ("any from 0 to 7", "randint(vocab_size", "randint(vocab_size - 1"),
        ("none above", "randint(vocab_size", "randint(vocab_size + 1"),
        ("selected and stay count", "masked, selected", "masked, x_masked != ids"),
    ],
    4: [
        (r"keep x's \[CLS\]", "best[:, 0] = x[:, 0]", ""),
        ("padding has the generator's tokens", "torch.where(mask, best, 0)", "best"),
        ("the generator was given x;", "(x_masked, mask)", "(x, mask)"),
        ("the paper's reading", "mask, best", "mask, torch.where(x == x_masked, x, best)"),
        (r"\[SEP\] is kept", "mask, best", "mask, torch.where(x == 2, x, best)"),
        ("x itself was changed", "torch.where(mask, best, 0)", "x.copy_(best * mask)"),
        ("ran with gradients", "torch.no_grad()", "torch.enable_grad()"),
        ("not given the mask", "(x_masked, mask)", "(x_masked, mask | True)"),
        ("switched off", "with torch.no_grad()", "torch.set_grad_enabled(False)\n    if True"),
        ("eval mode", "generator(", "generator.eval()("),
        ("eval mode", "generator(", "generator.eval()(", "best[", "generator.train()\n    best["),
        ("from x', where it may be masked", "= x[:, 0]", "= x_masked[:, 0]"),
        ("int64", "best, 0)", "best, 0).int()"),
        ("padding is as in x", "best, 0)", "best, x)"),
        ("first row's", "= x[:, 0]", "= x[0, 0]"),
    ],
    5: [
        ("padding counts", BOTH, "logits.flatten(0, 1), replaced.flatten()"),
        ("divided by", ".long())", ".long()) * mask.double().mean()"),
        ("classes are swapped", "replaced[mask]", "(~replaced)[mask]"),
        ("sum", ".long())", ".long(), reduction='sum')"),
        ("padding counts as replaced", "& mask", ""),
        ("position 0", "logits[mask]", f"logits{REST}", "replaced[mask]", f"replaced{REST}"),
        ("expected bool", "return replaced", "return replaced.long()"),
        ("not where an id is 0", "& mask", "& (x_edited != 0)"),
        ("large logits", "logits[mask]", "(logits.exp() / logits.exp().sum(-1, True)).log()[mask]"),
        ("softmax is applied twice", "logits[mask]", "logits[mask].softmax(-1)"),
        ("only the second logit", "logits[mask]", "logits[mask] * torch.tensor([0, 1])"),
        ("log 2 each", BOTH, "(logits * mask[..., None]).flatten(0, 1), replaced.flatten()"),
    ],
    6: [
        ("h is not used", CAT, "x"),
        ("overwritten", f"x = {CAT}", "x[:, 0] = h"),
        (r"added to \[CLS\]", "[h[:, None]", "[x[:, :1] + h[:, None]"),
        ("after the layers", "return x", f"x = bert(ids, mask)\n    return {CAT}"),
        ("h was inserted", "x[:, 1:]", "x[:, :-1]"),
        ("no gradient reaches h", "h[:, None]", "h.detach()[:, None]"),
        ("not given the mask", "(x, mask)", "(x, mask | True)"),
        ("again after a layer", "layer(x, mask)", f"layer(x, mask)\n        x = {CAT}"),
        ("again before each layer", "layer(x, mask)", f"layer({CAT}, mask)"),
        ("one token longer", "x[:, 1:]", "x"),
        ("token longer", "x[:, 1:]], 1)", "x], 1)\n    mask = F.pad(mask, (1, 0), value=True)"),
        ("of the token before", "x[:, 1:]", "bert.embeddings(ids[:, 1:])"),
        ("none reaches the other positions", "x[:, 1:]", "x[:, 1:].detach()"),
    ],
    7: [
        (r"not divided by sqrt\(d\)", SCALE, ""),
        ("divided by d;", " ** 0.5", ""),
        ("applied to queries", "None, None, :]", "None, :, None]"),
        ("applied to queries", "None, None, :]", "None, :, None]", "-torch.inf", "-1e9"),
        ("score 0", "-torch.inf", "0"),
        ("lower than any", "-torch.inf", "-100"),
        ("large numbers", HIDE, ".sub(1e4 * ~mask[:, None, None, :])"),
        (r"sqrt\(T\)", "q.shape[-1]", "q.shape[2]"),
        ("output is divided", SCALE, "", "weights @ v", f"weights @ v{SCALE}"),
        ("outputs of queries at padding are 0", "@ v", "@ v * mask[:, None, :, None]"),
        ("over queries", "softmax(-1)", "softmax(-2)"),
        ("over queries", "softmax(-1)", "softmax(-2)", "-torch.inf", "-1e9"),
        ("no longer sum to 1", HIDE + ".softmax(-1)", ".softmax(-1) * mask[:, None, None, :]"),
        ("padding is read", HIDE, ""),
    ],
    8: [
        ("not of the file", "raw[8 + size :]", "raw"),
        ("AND the 8 bytes", "raw[8 + size :]", "raw[size:]"),
        ("__metadata__ is not a tensor", "continue", "tensors[name] = 0\n            continue"),
        ("__metadata__ is not a tensor", "__metadata__", ""),
        ("has the shape", '.view(entry["shape"])', ""),
        ("as if it were complete", "raise", "", "end]", "end].ljust(end - begin)"),
        ("raises RuntimeError; expected a ValueError", "raise", ""),
        ("little-endian", '"little"', '"big"'),
        ("the file holds", "decode()", 'decode("latin-1")'),
        ("in any order", f"= {OFFSETS}", f"= (n - {OFFSETS}[0] + end for n in {OFFSETS})"),
    ],
    9: [
        ("^the worked example: equal values are ranked in.*their ranks$", "average", "in order"),
        ("densely", "average", "dense"),
        ("lowest of their ranks", "average", "lowest"),
        ("highest of their ranks", "average", "highest"),
        ("Pearson's correlation of the values", RANKS, "x"),
        (
            "only without ties",
            "float(np.corrcoef(a, b)[0, 1])",
            "1 - 6 * ((a - b) ** 2).sum() / (len(a) ** 3 - len(a))",
        ),
        ("a itself was changed", RANKS, f"(x.sort() or {RANKS})"),
        ("a itself was changed", RANKS, f"{RANKS} + 0 * (x.sort() or 0)"),
        ("argsort returns which element is first, .*the first element$", RANKS, "np.argsort(x)"),
        (r"-0\.3590924\d+; expected -0\.3590924\d+", "float(", "np.float32("),
    ],
    10: [
        ("alignment.*square", "axis=1) ** 2", "axis=1)"),
        ("uniformity.*square", "distance**2", "distance"),
        ("it is the sum", "** 2).mean()", "** 2).sum()"),
        ("1 - cosine", "** 2).mean()", "** 2).mean() / 2"),
        ("expected", "np.log(", "1 + np.log("),
        ("factor 2", "-2 *", "-"),
        ("row is paired with itself", ", 1)]", ", 0)]"),
        ("mean of the logs", "np.log(np.exp(-2", "((-2"),
    ],
    11: [("finds itself", "-np.inf", "0.0")],
    12: [
        ("buffer 1.running_mean", "model.state_dict()", "dict(model.named_parameters())"),
        ("optimizer starts anew", 'optimizer.state_dict()["state"]', "{}"),
        ("bias correction", IS_TENSOR, "name != 'step'", ", {})", ", {'step': torch.zeros(())})"),
        ("load_state_dict looked for 'step'", IS_TENSOR, "name != 'step'"),
        ("'steps' is a float", "return tensors", "return tensors | {'steps': 3.0}"),
        ("no longer share parameters", "strict=False", "strict=False, assign=True"),
        ("optimizer starts anew", IS_TENSOR, f"name in {ADAM}"),
        ("whole numbers", "int(i)", "i"),
        (
            "the states were mixed up",
            'optimizer.state_dict()["state"].items()',
            "enumerate(optimizer.state.values())",
        ),
        ("whatever state", "state.items()", f"[(n, state[n]) for n in {ADAM}]"),
    ],
}
MISTAKES[11] += [
    (re.escape(mistake), "100 * (closer < k).mean()", f"checks.recalls(u, v, k)[{mistake!r}]")
    for mistake in filter(None, checks.recalls(np.eye(2), np.eye(2), 1))
]


def answer_with(number: int, *edits: str, folder: Path) -> SimpleNamespace:
    """The correct answer's functions, with each old text, which occurs once, replaced."""
    source = "\n".join(map(inspect.getsource, ANSWERS[number - 1]))
    for old, new in zip(edits[::2], edits[1::2]):
        assert source.count(old) == 1, (old, source)
        source = source.replace(old, new)
    file = folder / "answer.py"  # a check reads the source
    file.write_text(source)
    names = dict(globals())
    exec(compile(source, file, "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("number", MISTAKES)
def test_a_correct_answer_passes(number, tmp_path):
    assert message_of(number, answer_with(number, folder=tmp_path), tmp_path) == ""


@pytest.mark.parametrize(
    "number, mistake", [(n, mistake) for n, mistakes in MISTAKES.items() for mistake in mistakes]
)
def test_a_common_mistake_has_its_own_message(number, mistake, tmp_path):
    message, *edits = mistake
    found = message_of(number, answer_with(number, *edits, folder=tmp_path), tmp_path)
    assert re.search(message, found), found


# ------------------------------------------------------------------------------------------------
# As a student runs it


def test_one_exercise_in_a_copy_of_the_repository(tmp_path):
    """The stub, a mistake and a correct answer, as they look in a terminal."""
    shutil.copytree(ROOT / "exercises", tmp_path / "exercises")
    for path in [*ROOT.glob("*.py"), *map(ROOT.joinpath, ("assets", "engine", "lab"))]:
        (tmp_path / path.name).symlink_to(path)
    file = tmp_path / "exercises/write_it.py"
    stub = 'raise NotImplementedError("exercise 9: spearman is not written yet")'

    def run(ranks: str | None) -> tuple[int, str]:
        if ranks:
            body = f"a, b = ({ranks} for x in (a, b))\n    return float(np.corrcoef(a, b)[0, 1])"
            file.write_text(Path(write_it.__file__).read_text().replace(stub, body))
        command = [sys.executable, "-m", "pytest", "exercises", "-k", "ex09"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, output = run(None)
    assert code == 1 and "exercise 9: spearman is not written yet" in output
    code, output = run("np.argsort(np.argsort(x, kind='stable'))")
    assert code == 1 and "equal values are ranked in their order in the list" in output
    assert "Error" not in output and "test_write_it.py:" not in output
    code, output = run("(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2")
    assert code == 0 and "1 passed" in output


# ------------------------------------------------------------------------------------------------
# Fix it

BUGS = [name for name in vars(bugs) if name.startswith(("test_bug", "test_mended"))]


def failures(module) -> dict[str, str]:
    """The tests of test_fix_it.py that fail on this module, and their messages."""
    failed, capsys = {}, SimpleNamespace(readouterr=lambda: None)
    for name in BUGS:
        function = getattr(bugs, name)
        try:
            function(*(module, capsys)[: len(arguments(function))])
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

TEXT = (ROOT / "EXERCISES.md").read_text()
SYMPTOMS = json.loads((ROOT / "results/exercises/fix_it.json").read_text())["runs"]


def at(run: dict, name: str, step: int) -> float:
    return next(line[name] for line in run["log"] if line["step"] == step)


def column(run: dict, name: str, first: int = 1) -> list[float]:
    return [line[name] for line in run["log"] if line["step"] >= first]


def test_the_symptoms_in_the_text_are_those_that_were_measured():
    section = TEXT[TEXT.index("## Fix it") : TEXT.index("## Explore it")]
    settings = (0.05, 3e-5, 0)
    of = {r["bug"]: r for r in SYMPTOMS if (r["lam"], r["lr"], r["seed"]) == settings}
    three_digits = [
        *(at(of[bug], "contrastive", 1) for bug in (None, 7)),
        *(at(of[None], name, step) for name, step in (("contrastive", 40), ("difference", 1))),
        *(at(of[bug], "difference", 40) for bug in (None, 6)),
        *(at(of[bug], "accuracy_replaced", 40) for bug in (None, 3)),
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
    of = {(run["bug"], run["lam"], run["lr"]): run for run in SYMPTOMS if run["seed"] == seed}
    right, bug = of[None, 0.05, 3e-5], {n: of[n, 0.05, 3e-5] for n in mends.MENDS}
    other_lam = {n: of[n, 5.0, 3e-5] for n in (None, 2)}
    assert min(column(bug[1], "contrastive")) > 3.4 > 1 > at(right, "contrastive", 1)
    assert column(bug[2], "contrastive") == column(other_lam[2], "contrastive")
    assert column(right, "contrastive") != column(other_lam[None], "contrastive")
    assert bug[3]["share_replaced"][0] - right["share_replaced"][0] > 0.03
    assert at(right, "score", 0) - at(bug[4], "score", 0) > 1.5
    assert min(column(bug[5], "positive_cosine", first=11)) > 0.9999
    assert max(column(right, "positive_cosine")) < 0.65
    little, much = bug[6]["padded_losses"]
    assert little > 1.2 * much and np.isclose(*right["padded_losses"], rtol=1e-5)
    assert (bug[7]["num_batches_tracked"], right["num_batches_tracked"]) == (80, 40)
    with_bug, without = of[8, 0.05, 1e-3], of[None, 0.05, 1e-3]
    assert with_bug["share_replaced"][1] > 1.2 * without["share_replaced"][1]
    assert with_bug["generator_moved"] > 0 == without["generator_moved"]


def measured_means(file: Path) -> set[str]:
    """Every mean ± standard deviation of an experiment, with two and three digits."""
    found = set()
    for group in json.loads(file.read_text())["groups"]:
        pairs = [(row["mean"], row["std"]) for row in group["table"].values()]
        for curve in group["curves"].values():
            pairs += zip(curve["mean"], curve["std"])
        found |= {f"{m:.{digits}f} ± {std:.{digits}f}" for m, std in pairs for digits in (2, 3)}
    return found


def test_the_means_in_the_text_are_those_that_were_measured():
    files = sorted((ROOT / "results/exercises").glob("explore_*.json"))
    sections = re.split(r"^### \d\. ", TEXT[TEXT.index("### 1. ") :], flags=re.MULTILINE)[1:]
    assert len(files) == len(sections) == 9
    for file, section in zip(files, sections):
        means = re.findall(r"[\d.]+ ± [\d.]*\d", section.partition("\n## ")[0])
        assert len(means) >= 5  # some are repeated from experiment 1
        assert set(means) <= measured_means(file) | measured_means(files[0])


def test_the_experiments_have_the_demo_s_settings_and_took_five_minutes_at_most():
    path = str(ROOT / "exercises/explore.json")
    saved = cli.load_preset(diffcse.Config, diffcse.PRESETS, path)
    assert saved == replace(diffcse.PRESETS["demo"], steps=30)
    seconds = json.loads((ROOT / "results/exercises/seconds.json").read_text())
    assert sorted(seconds["runs"]) == list("123456789")
    assert max(seconds["runs"].values()) + max(seconds["page"].values()) <= 300


def test_detached_gives_the_encoder_no_gradient_of_the_discriminator():
    cfg, norms = replace(diffcse.PRESETS["demo"], lam=1.0, contrastive=False), []
    for model_class in (diffcse.DiffCSEModel, detached.Detached):
        torch.manual_seed(0)
        model = model_class.from_pretrained(cfg).train()
        rows = TokenizedSentences([("a man plays",), ("two cats",)], model.tokenizer, 32)
        model(diffcse.draw_batch(rows, model.tokenizer, cfg, 0))[0].backward()
        norms.append([bugs.gradients(part).norm() for part in (model.encoder, model.discriminator)])
    (encoder, _), (encoder_detached, discriminator) = norms
    assert encoder > 0 == encoder_detached and discriminator > 0
