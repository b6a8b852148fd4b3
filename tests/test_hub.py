"""engine/hub.py: local names; then a local server with the Hub's paths: cold, cached, offline and
unreachable.
"""

import http.server
import io
import json
import re
import tarfile
import threading
from functools import partial
from hashlib import sha1
from pathlib import Path

import huggingface_hub
import pytest
from conftest import ROOT, one_line, random_sentences, write_small_senteval
from huggingface_hub import constants, file_download

import diffcse
import eval_sts
from engine import hub
from engine.checkpoint import new_folder
from engine.errors import UserError, write_atomically
from engine.model_folder import load_model, save_model

SMALL = ROOT / "assets" / "small-bert"
WEIGHTS = "model.safetensors"
old = huggingface_hub.__version__.startswith("0.")
new_hub = pytest.mark.skipif(
    old, reason="huggingface_hub 0.x names no cause; offline is set at its import"
)


def refused(find, *names: str) -> str:
    with pytest.raises(UserError) as error:
        find(*names)
    return one_line(error)


# ------------------------------------------------------------------------------------------------
# Local names


def test_find_model_takes_folders_first(tmp_path, monkeypatch):
    assert hub.find_model(str(tmp_path)) == tmp_path
    (tmp_path / "run@2" / "best").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.find_model("run@2") == Path("run@2/best")  # a run's best model; not a revision
    assert hub.find_model("assets/small-bert").samefile(SMALL)  # from any folder
    (tmp_path / "file").touch()
    for name in "@v1 ./none ~/none ~no-such-user/m a/b/c file assets/diffcse.svg".split():
        assert refused(hub.find_model, name) == f"{name}: no such model folder"
    assert "no such model folder" in refused(hub.find_model, "x" * 300)


def test_find_text_looks_here_in_the_data_folder_and_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    for path in ("here.txt", "inside/there.txt"):
        Path(path).touch()
    assert hub.find_text("here.txt") == Path("here.txt")
    assert hub.find_text("there.txt", "inside") == Path("inside/there.txt")
    assert hub.find_text(str(tmp_path / "here.txt"), "inside") == tmp_path / "here.txt"
    shipped = "assets/wikipedia_20k.txt.xz"
    assert hub.find_text(shipped, "inside").samefile(ROOT / shipped)
    for name in ("none.txt", "~no-such-user/x.txt", "x" * 300):
        assert refused(hub.find_text, name, "inside") == f"{name}: no such file, nor in inside"
    assert refused(hub.find_text, "none.txt") == "none.txt: no such file"


CHECKOUT = "SentEval/data/downstream"


@pytest.mark.parametrize("below", ["", "senteval", "downstream", CHECKOUT, CHECKOUT[9:]])
def test_find_senteval_in_a_folder(tmp_path, below):
    assert "no folder STS" in refused(hub.find_senteval, str(tmp_path))
    (tmp_path / below / "STS").mkdir(parents=True)
    assert hub.find_senteval(str(tmp_path)) == tmp_path / below


def test_without_a_home_folder_none_is_made(tmp_path, monkeypatch):
    """No folder called ~ where the program was started."""
    pwd = pytest.importorskip("pwd")
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # KeyError, as for an unknown user
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    calls = [hub.cache_folder, partial(hub.find_model, "org/small")]
    calls += [partial(write_atomically, "~/file", ""), new_folder("~/folder", "").__enter__]
    for call in calls:
        message = refused(call)
        assert re.match("~/.*: no home .*set HOME .or XDG_CACHE_HOME for the cache", message)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# A server with the Hub's paths


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves a folder's files. What the Hub computes is written there by publish()."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        super().do_GET()

    def end_headers(self) -> None:
        _, resolve, rest = self.path.partition("/resolve/")
        file = Path(self.translate_path(self.path))
        if resolve and file.is_file():
            self.send_header("ETag", f'"{sha1(file.read_bytes()).hexdigest()}"')
            self.send_header("X-Repo-Commit", rest.partition("/")[0])
        super().end_headers()

    def log_message(self, *args) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Hub, directory=folder))
        self.folder, self.requests = folder, []

    def publish(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        """repo: models/org/name or datasets/org/name."""
        commit = sha1(f"{repo}@{revision}".encode()).hexdigest()
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        api, resolve = f"api/{repo}", f"{repo.removeprefix('models/')}/resolve/{commit}"
        tree, served = [], {f"{api}/revision/{revision}": json.dumps(info).encode()}
        for path, content in files.items():
            oid = sha1(content).hexdigest()
            tree.append({"type": "file", "path": path, "size": len(content), "oid": oid})
            served[f"{resolve}/{path}"] = content
        served[f"{api}/tree/{commit}"] = json.dumps(tree).encode()
        for path, content in served.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content)

    def downloaded(self) -> list[str]:
        """The files whose bytes were requested since the last call."""
        files = [path.partition("/resolve/")[2].partition("/")[2] for path in self.requests]
        self.requests.clear()
        return sorted(filter(None, files))


def files_of(folder: Path, *more: str) -> dict[str, bytes]:
    """The files of a folder, and more that nobody needs."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return files | dict.fromkeys(more, b"not needed")


def use_port(monkeypatch, port: int = 9) -> None:
    """The default port has no server."""
    endpoint = f"http://127.0.0.1:{port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    for module in (constants, file_download):  # before version 1.0 the latter has a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def offline(monkeypatch, on: bool = True) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", on)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """In place of the Hub, with an empty cache."""
    server = Server(tmp_path / "server")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    small = files_of(SMALL, "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.onnx")
    server.publish("models/org/small", small)
    server.publish("models/org/small", small | {"config.json": small["config.json"] + b"\n"}, "v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    offline(monkeypatch, False)
    use_port(monkeypatch, server.server_port)
    yield server
    server.shutdown()


def tar_of(*members: str | tuple[str, bytes, str]) -> bytes:
    """Files, by name; and (name, type, a link's target). No permissions."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for entry in members:
            name, kind, target = (entry, tarfile.REGTYPE, "") if isinstance(entry, str) else entry
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0
            member.size = 3 if member.isfile() else 0
            archive.addfile(member, io.BytesIO(b"abc"))
    return content.getvalue()


NEEDED = ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
TEXT, PAIRS = hub.DATASET_TEXTS
DATASET = f"datasets/{hub.DATASET}"


def test_only_what_is_needed_is_downloaded_and_only_once(server, tmp_path, monkeypatch):
    tar = tar_of("./senteval/STS/STS12-en-test/a.txt", "./senteval/SICK/b.txt")
    server.publish(DATASET, {TEXT: b"a cat\n", PAIRS: b"not needed", "senteval.tar": tar})
    folder = hub.find_model("org/small")
    assert server.downloaded() == sorted(NEEDED)
    assert files_of(folder) == {name: (SMALL / name).read_bytes() for name in NEEDED}
    assert hub.find_model("org/small") == folder and server.downloaded() == []
    older = hub.find_model("org/small@v1")
    assert older != folder and server.downloaded() == ["config.json"]  # the rest is equal
    text, senteval = hub.find_text(TEXT, "no-such-folder"), hub.find_senteval("")
    assert server.downloaded() == ["senteval.tar", TEXT]
    assert text.read_bytes() == b"a cat\n"
    assert (senteval / "STS/STS12-en-test/a.txt").read_bytes() == b"abc"
    (senteval / "SICK/b.txt").write_bytes(b"changed")
    for fail in (use_port, offline):
        fail(monkeypatch)
        assert hub.find_model("org/small") == folder and hub.find_model("org/small@v1") == older
        assert hub.find_text(TEXT) == text and hub.find_senteval("") == senteval
        # The cache has the data set, without this file.
        assert refused(hub.find_text, PAIRS).startswith(f"'{hub.DATASET}' is neither")
    assert (senteval / "SICK/b.txt").read_bytes() == b"changed"  # unpacked once
    unpacked = [path.name for path in (tmp_path / "cache/diffcse").iterdir()]
    assert unpacked == [f"senteval-{sha1(tar).hexdigest()[:16]}"]


def test_bad_senteval_tars_are_refused_and_leave_nothing_outside(server, tmp_path, monkeypatch):
    outside = ("../escaped.txt", "STS/../../escaped.txt", str(tmp_path / "escaped.txt"))
    bad = [tar_of("STS/a.txt", name) for name in outside]
    bad += [tar_of("STS/a.txt")[:600], b"not a tar"]
    for i, tar in enumerate((tar_of("other/a.txt"), *bad)):
        server.publish(DATASET, {"senteval.tar": tar})
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"hf{i}"))
        expected = "^cannot unpack .*; delete it to try" if i else "tar: no folder STS in it$"
        assert re.search(expected, refused(hub.find_senteval, ""))
        assert not list(tmp_path.rglob("escaped.txt")) and not list(tmp_path.rglob("*.tmp"))


def test_plain_files_alone_are_unpacked(tmp_path):
    """Below the folder, and readable; links, pipes and devices are left out."""
    special = [("up", tarfile.SYMTYPE, ".."), ("top", tarfile.SYMTYPE, str(tmp_path))]
    special += [("STS/a.txt", kind, "../../secret") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)]
    special += [("pipe", tarfile.FIFOTYPE, ""), ("device", tarfile.CHRTYPE, "")]
    names = ["up/a.txt", "top/a.txt", "STS/a.txt", "./STS/b/c.txt"]
    tar = tar_of(*special, ("STS/b", tarfile.DIRTYPE, ""), *names)
    (tmp_path / "tar").write_bytes(tar)
    (tmp_path / "secret").write_bytes(b"secret")
    hub.unpack(tmp_path / "tar", tmp_path / "new")
    new = {f"new/{Path(name)}": b"abc" for name in names}
    assert files_of(tmp_path) == new | {"tar": tar, "secret": b"secret"}
    for path in (tmp_path / "new").rglob("*"):
        assert not path.is_symlink() and path.stat().st_mode & 0o600 == 0o600
        assert path.is_dir() or path.is_file()


def test_sentence_transformers_repositories_pickles_and_shards(server, tmp_path):
    """A folder with its own pooling; and pickles only where the encoder has no safetensors file.

    A Dense layer may have stayed a pickle; model.fp16.safetensors is another variant's.
    """
    save_model(load_model(SMALL)._replace(pooling="mean"), tmp_path / "mean")
    mean = files_of(tmp_path / "mean", "1_Pooling/notes.txt", "openvino/model.bin")
    server.publish("models/org/mean", mean)
    assert load_model("org/mean").pooling == "mean"
    assert server.downloaded() == sorted(files_of(tmp_path / "mean").keys() - {"README.md"})

    small = {name: (SMALL / name).read_bytes() for name in NEEDED if name != WEIGHTS}
    more = "vocab.txt vocab.json merges.txt special_tokens_map.json added_tokens.json"
    small |= dict.fromkeys(more.split(), b"{}")
    shards = "model-1-of-2.safetensors model-2-of-2.safetensors model.safetensors.index.json"
    bins = "pytorch_model-1-of-2.bin pytorch_model-2-of-2.bin pytorch_model.bin.index.json"
    unused = dict.fromkeys(["README.md", "model.fp16.safetensors"], b"not needed")
    dense = "1_Pooling/config.json 2_Dense/pytorch_model.bin"
    for i, weights in enumerate(("pytorch_model.bin", shards, bins, f"{WEIGHTS} {dense}")):
        files = small | dict.fromkeys(weights.split(), b"part")
        server.publish(f"models/org/{i}", files | unused)
        assert files_of(hub.find_model(f"org/{i}")) == files


@new_hub
def test_a_refusal_is_one_line_with_the_first_line_of_its_reason(server, tmp_path, monkeypatch):
    message = refused(hub.find_model, "org/none")
    assert message.startswith("'org/none' is neither a local path nor in the cache")
    assert str(tmp_path / "hf") in message and f"127.0.0.1:{server.server_port}" in message
    assert "HF_TOKEN for private repositories" in message and "404" in message
    assert message.endswith("python diffcse.py --config demo")
    assert "404" in refused(hub.find_model, "org/small@v9")
    assert "failed: HFValidationError: Repo id must" in refused(hub.find_model, "org/sm all")
    assert "failed: HFValidationError: " in refused(hub.find_model, "bad name\n!!")
    server.publish("models/org/empty", {"README.md": b""})
    assert "failed: it has no config.json; " in refused(hub.find_model, "org/empty")
    for fail in (use_port, offline):
        fail(monkeypatch)
        assert "failed: LocalEntryNotFoundError: " in refused(hub.find_model, "org/small")


@new_hub
def test_train_and_evaluate_by_name(server, tmp_path, monkeypatch, command):
    write_small_senteval(tmp_path / "senteval", monkeypatch)
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.add(tmp_path / "senteval", "senteval")
    files = {TEXT: "\n".join(random_sentences(16, 1)).encode()}
    server.publish(DATASET, files | {"senteval.tar": (tmp_path / "tar").read_bytes()})
    monkeypatch.chdir(tmp_path)
    train = f"--config small --model org/small --generator org/small@v1 --train-file {TEXT}"
    train += " --batch-size 4 --steps 1 --out-dir out --device cpu"
    assert command(diffcse.main, *train.split()).code == 0
    assert server.downloaded() == sorted([*NEEDED, "config.json", "senteval.tar", TEXT])
    assert "base_model: org/small\n" in Path("out/best/README.md").read_text()
    offline(monkeypatch)
    assert command(eval_sts.main, "org/small", "--json", "scores.json").code == 0
    before = json.loads(Path("out/results.json").read_text())["before"]
    scores = json.loads(Path("scores.json").read_text())
    assert {name: scores[name] for name in before} == pytest.approx(before, abs=0.01)
    assert server.requests == []
