"""engine/hub.py: local names; then a local server with the Hub's paths: cold, cached, offline,
broken and private.
"""

import contextlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from hashlib import sha1
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch

import bert
import embed
from engine import hub
from engine.errors import UserError
from engine.model_folder import load_model, save_model

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
DATASET = hub.DATASET
WEIGHTS = "model.safetensors"


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------
# Local names


def test_find_model_takes_folders_first(tmp_path, monkeypatch):
    assert hub.find_model(str(tmp_path)) == tmp_path
    (tmp_path / "run@2" / "best").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.find_model("run@2") == Path("run@2/best")  # a run's best model; not a revision
    assert hub.find_model("assets/small-bert").resolve() == SMALL.resolve()  # from any folder


@pytest.mark.parametrize(
    "name",
    [
        "@v1",
        "./none",
        "~/none-of-this",
        "~no-such-user/m",
        "a/b/c",
        "assets/diffcse.svg",
        "x" * 300,
    ],
)
def test_names_that_can_only_be_missing_paths(name):
    with pytest.raises(UserError, match="no such model folder"):
        hub.find_model(name)


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
        with pytest.raises(UserError, match=f"^{name}: no such file, nor in inside"):
            hub.find_text(name, "inside")


@pytest.mark.parametrize("below", ["", "senteval", "SentEval/data/downstream", "downstream"])
def test_find_senteval_in_a_folder(tmp_path, below):
    with pytest.raises(UserError, match="no folder STS"):
        hub.find_senteval(str(tmp_path))
    (tmp_path / below / "STS").mkdir(parents=True)
    assert hub.find_senteval(str(tmp_path)) == tmp_path / below


# ------------------------------------------------------------------------------------------------
# senteval.tar


def tar_of(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode = 3, 0o444
            archive.addfile(member, io.BytesIO(b"abc"))
    return path


@pytest.fixture
def downloaded(tmp_path, monkeypatch) -> Path:
    """The folder that every download returns."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "deep" / "snapshot"
    folder.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: str(folder))
    return folder


def test_senteval_tar_is_unpacked_once(downloaded, tmp_path):
    names = "./senteval/STS/STS12-en-test/a.txt", "./senteval/SICK/b.txt"
    tar_of(downloaded / "senteval.tar", *names)
    folder = hub.find_senteval("")
    assert (folder / "STS/STS12-en-test/a.txt").read_bytes() == b"abc"
    (folder / "SICK/b.txt").write_bytes(b"changed")
    assert hub.find_senteval("") == folder and (folder / "SICK/b.txt").read_bytes() == b"changed"
    assert len(list((tmp_path / "cache/diffcse").iterdir())) == 1  # nothing temporary is left


@pytest.mark.parametrize("names", [["STS/a.txt", "../escaped.txt"], ["other/a.txt"], None])
def test_bad_senteval_tars_are_refused_and_leave_nothing_outside(downloaded, tmp_path, names):
    tar = downloaded / "senteval.tar"
    tar_of(tar, *names) if names else tar.write_bytes(b"not a tar")
    with pytest.raises(UserError, match="cannot unpack .*senteval.tar|senteval.tar: no folder STS"):
        hub.find_senteval("")
    assert not list(tmp_path.rglob("escaped.txt")) and not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------
# A server with the Hub's paths


class Hub(http.server.ThreadingHTTPServer):
    """repos: {"models/org/name" or "datasets/org/name": {revision: {path: bytes}}}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.requests.clear()
        self.breaks: set[str] = set()  # files whose body ends half-way
        self.private: set[str] = set()  # repositories that need a token
        self.down = False  # every answer is 503

    def downloaded(self) -> list[str]:
        """The files whose bytes were requested since the last call."""
        paths = [path for method, path in map(str.split, self.requests) if method == "GET"]
        self.requests.clear()
        files = (path.partition("/resolve/")[2].partition("/")[2] for path in paths)
        return sorted(file for file in files if file)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url, repos = urlsplit(self.path), self.server.repos
        self.server.requests.append(f"{self.command} {url.path}")
        if self.server.down:
            return self.answer(503, b"")
        parts = unquote(url.path).strip("/").split("/")
        is_api = parts[0] == "api"  # api/models/org/name[/revision/R | /tree/R]
        if is_api:
            parts = parts[1:]
        elif parts[0] != "datasets":  # [datasets/]org/name/resolve/R/path
            parts = ["models", *parts]
        name, rest = "/".join(parts[:3]), parts[3:]
        authorized = self.headers.get("Authorization") == "Bearer secret"
        if name not in repos or name in self.server.private and not authorized:
            return self.refuse(401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commits = {sha1(f"{name}@{r}".encode()).hexdigest(): r for r in repos[name]}
        revision = commits.get(revision, revision)
        if revision not in repos[name]:
            return self.refuse(404, "RevisionNotFound")
        files, commit = repos[name][revision], sha1(f"{name}@{revision}".encode()).hexdigest()
        if is_api and rest[:1] == ["tree"]:
            return self.answer_json([describe(path, files[path]) for path in files])
        if is_api:
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name.partition("/")[2], "sha": commit, "siblings": siblings}
            return self.answer_json(info | {"private": False, "tags": [], "downloads": 0})
        path = "/".join(rest[2:])
        if path not in files:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        etag = f'"{sha1(files[path]).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.answer(200, files[path], headers, path in self.server.breaks)

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code} | (headers or {}))

    def answer_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode())

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, breaks: bool = False
    ) -> None:
        total, start = len(body), 0
        headers = {"Content-Type": "application/json"} | (headers or {})
        if status == 200 and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            status, body = 206, body[start:]
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: max(0, total // 2 - start)] if breaks else body)
        if breaks:
            self.close_connection = True


def describe(path: str, content: bytes) -> dict[str, str | int]:
    oid = sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


def files_of(folder: Path, *more: str) -> dict[str, bytes]:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return files | {name: b"not needed" for name in more}


@pytest.fixture(scope="module")
def whole_server(made, tmp_path_factory):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    small = files_of(SMALL, "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.onnx")
    other = small | {"config.json": small["config.json"] + b"\n"}
    server.repos["models/org/small"] = {"main": small, "v1": other}
    tar = tmp_path_factory.mktemp("tar") / "senteval.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(made, "senteval")
    lines = [f"the cat number {i} plays the guitar in {i % 7} houses\n" for i in range(64)]
    files = {"wiki1m_for_simcse.txt": "".join(lines).encode(), "nli_for_simcse.csv": b"not needed"}
    server.repos[f"datasets/{DATASET}"] = {"main": files | {"senteval.tar": tar.read_bytes()}}
    yield server
    server.shutdown()


@pytest.fixture
def server(whole_server, tmp_path, monkeypatch):
    """In place of the Hub, with an empty cache."""
    whole_server.reset()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    use_endpoint(monkeypatch, whole_server.server_port)
    return whole_server


def use_endpoint(monkeypatch, port: int) -> None:
    constants, endpoint = huggingface_hub.constants, f"http://127.0.0.1:{port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def offline(monkeypatch, on: bool = True) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", on)


NEEDED = ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "vocab.txt"]


def test_only_what_is_needed_is_downloaded_and_only_once(server, monkeypatch):
    folder = hub.find_model("org/small")
    assert server.downloaded() == sorted(NEEDED)
    assert files_of(folder) == {name: (SMALL / name).read_bytes() for name in NEEDED}
    assert hub.find_model("org/small") == folder and server.downloaded() == []
    older = hub.find_model("org/small@v1")
    assert older != folder and server.downloaded() == ["config.json"]  # the rest is equal
    text = hub.find_text("wiki1m_for_simcse.txt", "no-such-folder")
    senteval = hub.find_senteval("")
    assert server.downloaded() == ["senteval.tar", "wiki1m_for_simcse.txt"]
    server.down = True  # what is cached is used where the Hub fails, too
    assert hub.find_model("org/small") == folder
    server.requests.clear()
    offline(monkeypatch)
    assert hub.find_model("org/small") == folder and hub.find_model("org/small@v1") == older
    assert hub.find_text("wiki1m_for_simcse.txt") == text and hub.find_senteval("") == senteval
    assert server.requests == []
    with pytest.raises(UserError, match=f"^'{DATASET}' is neither"):
        hub.find_text("nli_for_simcse.csv")  # the cache has the data set, without this file


def test_sentence_transformers_repositories_and_older_ones(server, tmp_path, monkeypatch):
    """A folder with its own pooling; and pickles only where there is no safetensors file."""
    save_model(load_model(SMALL)._replace(pooling="mean"), tmp_path / "mean")
    mean = files_of(tmp_path / "mean", "1_Pooling/notes.txt", "openvino/model.bin")
    server.repos["models/org/mean"] = {"main": mean}
    assert load_model("org/mean").pooling == "mean"
    more = ["1_Pooling/config.json", "config_sentence_transformers.json", "modules.json"]
    assert server.downloaded() == sorted([*NEEDED, *more, "sentence_bert_config.json"])
    torch.save(bert.read_safetensors(SMALL / WEIGHTS), tmp_path / "pytorch_model.bin")
    pickled = files_of(SMALL) | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    del pickled[WEIGHTS]
    server.repos["models/org/pickle"] = {"main": pickled}
    expected = embed.DiffCSE(SMALL, "cpu").encode("a cat")
    for without_network in (False, True):
        offline(monkeypatch, without_network)
        torch.testing.assert_close(embed.DiffCSE("org/pickle", "cpu").encode("a cat"), expected)
        assert ("pytorch_model.bin" in server.downloaded()) != without_network


def test_models_in_several_files_are_downloaded_whole(server):
    parts = {f"model-0000{i}-of-00002.safetensors": b"part" for i in (1, 2)}
    files = files_of(SMALL) | parts | {"model.safetensors.index.json": b"{}"}
    del files[WEIGHTS]
    server.repos["models/org/parts"] = {"main": files}
    assert files_of(hub.find_model("org/parts")).keys() == files.keys() - {"README.md"}


def refused(name: str) -> str:
    with pytest.raises(UserError) as error:
        hub.find_model(name)
    return one_line(error)


def test_a_broken_download_is_one_line_and_leaves_no_half_file(server, tmp_path, monkeypatch):
    """Offline, the rest is still missing; with the Hub whole again, the same name works."""
    server.breaks = {WEIGHTS}
    message = refused("org/small")
    assert message.startswith("'org/small' is neither a local path nor in the cache")
    assert str(tmp_path / "hf") in message and server.server_address[0] in message
    assert message.endswith("python diffcse.py --config demo")
    sizes = set(map(len, server.repos["models/org/small"]["main"].values()))
    files = [f for f in (tmp_path / "hf").rglob("*") if f.is_file() and "snapshots" in f.parts]
    assert all(f.stat().st_size in sizes and f.name != WEIGHTS for f in files)
    offline(monkeypatch)
    assert "IncompleteSnapshotError: " in refused("org/small")
    offline(monkeypatch, False)
    server.breaks.clear()
    assert (hub.find_model("org/small") / WEIGHTS).read_bytes() == (SMALL / WEIGHTS).read_bytes()


def test_a_refusal_is_one_line_with_the_first_line_of_its_reason(server, monkeypatch):
    assert "failed: RepositoryNotFoundError: 401 Client Error." in refused("org/none")
    assert "failed: RevisionNotFoundError: 404 Client Error." in refused("org/small@v9")
    assert "failed: HFValidationError: Repo id must" in refused("org/sm all")
    assert "failed: HFValidationError: " in refused("bad name\n!!")
    server.private = {"models/org/small"}
    assert "HF_TOKEN for private repositories" in refused("org/small")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub.find_model("org/small")
    server.down = True
    assert "503" in refused("org/other")
    offline(monkeypatch)
    assert "failed: LocalEntryNotFoundError: " in refused("org/other")
    offline(monkeypatch, False)
    use_endpoint(monkeypatch, 9)
    assert "failed: LocalEntryNotFoundError: " in refused("org/other")


def test_train_evaluate_and_embed_by_name(server, tmp_path):
    """The commands, with huggingface_hub's own variables; all but the first without a network."""
    (tmp_path / "work").mkdir()
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def run(*words: str, offline: str = "1") -> str:
        command = [sys.executable, ROOT / words[0], *words[1:]]
        options = dict(cwd=tmp_path / "work", input="a cat\n", text=True, capture_output=True)
        done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": offline}, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    train = "diffcse.py --config small --model org/small --generator org/small@v1 --batch-size 4"
    train += " --steps 1 --train-file wiki1m_for_simcse.txt --out-dir out"
    run(*train.split(), offline="0")
    expected = [*NEEDED, "config.json", "senteval.tar", "wiki1m_for_simcse.txt"]
    assert server.downloaded() == sorted(expected)
    before = json.loads((tmp_path / "work" / "out" / "results.json").read_text())["before"]
    card = (tmp_path / "work" / "out" / "best" / "README.md").read_text()
    assert "base_model: org/small\n" in card
    run("eval_sts.py", "org/small", "--json", "scores.json")
    scores = json.loads((tmp_path / "work" / "scores.json").read_text())
    assert {name: scores[name] for name in before} == pytest.approx(before, abs=0.01)
    vector = json.loads(run("embed.py", "encode", "org/small", "-"))["vector"]
    ours = embed.DiffCSE(SMALL, "cpu").encode("a cat").tolist()
    assert vector == pytest.approx(ours, abs=1e-6) and server.requests == []
