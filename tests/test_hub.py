"""engine/hub.py: local names; then a local server with the Hub's paths: cold, cached, offline and
unreachable.
"""

import functools
import http.server
import io
import json
import re
import tarfile
import threading
from hashlib import sha1
from pathlib import Path

import pytest
from conftest import ROOT, one_line, random_sentences, write_small_senteval
from huggingface_hub import constants

import diffcse
import eval_sts
from engine import hub
from engine.errors import UserError
from engine.model_folder import load_model, save_model

SMALL = ROOT / "assets" / "small-bert"
WEIGHTS = "model.safetensors"


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


@pytest.mark.parametrize("below", ["", "senteval", "SentEval/data/downstream", "downstream"])
def test_find_senteval_in_a_folder(tmp_path, below):
    assert "no folder STS" in refused(hub.find_senteval, str(tmp_path))
    (tmp_path / below / "STS").mkdir(parents=True)
    assert hub.find_senteval(str(tmp_path)) == tmp_path / below


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
        super().__init__(("127.0.0.1", 0), functools.partial(Hub, directory=folder))
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
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
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


def tar_of(*names: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode = 3, 0o444
            archive.addfile(member, io.BytesIO(b"abc"))
    return content.getvalue()


NEEDED = ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
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
    outside, cut = tar_of("STS/a.txt", "../escaped.txt"), tar_of("STS/a.txt")[:600]
    for i, tar in enumerate((outside, cut, b"not a tar", tar_of("other/a.txt"))):
        server.publish(DATASET, {"senteval.tar": tar})
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"hf{i}"))
        expected = "tar: no folder STS in it$" if i == 3 else "^cannot unpack .*; delete it to try"
        assert re.search(expected, refused(hub.find_senteval, ""))
        assert not list(tmp_path.rglob("escaped.txt")) and not list(tmp_path.rglob("*.tmp"))


def test_sentence_transformers_repositories_pickles_and_shards(server, tmp_path):
    """A folder with its own pooling; and pickles only where there is no safetensors file."""
    save_model(load_model(SMALL)._replace(pooling="mean"), tmp_path / "mean")
    mean = files_of(tmp_path / "mean", "1_Pooling/notes.txt", "openvino/model.bin")
    server.publish("models/org/mean", mean)
    assert load_model("org/mean").pooling == "mean"
    more = ["1_Pooling/config.json", "config_sentence_transformers.json", "modules.json"]
    assert server.downloaded() == sorted([*NEEDED, *more, "sentence_bert_config.json"])

    small = {name: (SMALL / name).read_bytes() for name in NEEDED if name != WEIGHTS}
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for weights in (["pytorch_model.bin"], ["model.safetensors.index.json", *shards]):
        files = small | dict.fromkeys(weights, b"part")
        server.publish(f"models/org/{len(weights)}", files | {"README.md": b"not needed"})
        assert files_of(hub.find_model(f"org/{len(weights)}")) == files


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
