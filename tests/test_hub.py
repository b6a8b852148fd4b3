"""A Hub in a box: a local server with the Hub's paths. Train, evaluate and embed by name: cold, cached, offline, broken, private."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import tarfile
import threading
from hashlib import sha1
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import data

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "assets" / "small-bert"
DATASET = "princeton-nlp/datasets-for-simcse"


class Hub(http.server.ThreadingHTTPServer):
    """repos: {"models/org/name" or "datasets/org/name": {revision: {path: bytes}}}; what was asked for is in `asked`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.breaks: set[str] = set()  # files whose body ends half-way
        self.private: set[str] = set()  # repositories that want a token
        self.down = False  # every answer is 503

    def downloaded(self) -> list[str]:
        """The files whose bytes were asked for since the last call."""
        files = [path.partition("/resolve/")[2].partition("/")[2] for method, path in map(str.split, self.asked) if method == "GET" and "/resolve/" in path]
        self.asked.clear()
        return sorted(files)


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        hub.asked.append(f"{self.command} {url.path}")
        parts = unquote(url.path).strip("/").split("/")
        if hub.down:
            return self.answer(503, b"")
        if parts[0] == "api":  # api/models/org/name[/revision/R | /tree/R]
            name, rest = "/".join(parts[1:4]), parts[4:]
        else:  # [datasets/]org/name/resolve/R/path
            parts = parts if parts[0] == "datasets" else ["models", *parts]
            name, rest = "/".join(parts[:3]), parts[3:]
        if name not in hub.repos or name in hub.private and self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        revision = rest[1] if len(rest) > 1 else "main"
        commits = {sha1(f"{name}@{r}".encode()).hexdigest(): r for r in hub.repos[name]}
        revision = commits.get(revision, revision)
        if revision not in hub.repos[name]:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        files, commit = hub.repos[name][revision], sha1(f"{name}@{revision}".encode()).hexdigest()
        if parts[0] == "api" and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": path, "size": len(content), "oid": sha1(content).hexdigest()} for path, content in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        if parts[0] == "api":
            info = {"id": name.partition("/")[2], "sha": commit, "siblings": [{"rfilename": path} for path in files], "private": False, "tags": [], "downloads": 0}
            return self.answer(200, json.dumps(info).encode())
        path = "/".join(rest[2:])
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[path]
        self.answer(200, content, {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, path in hub.breaks)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, breaks: bool = False) -> None:
        total, start = len(body), 0
        if status == 200 and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            status, body, headers = 206, body[start:], {**(headers or {}), "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: max(0, total // 2 - start)] if breaks else body)
        if breaks:
            self.close_connection = True


def files_of(folder: Path, *more: str) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()} | {name: b"not needed" for name in more}


@pytest.fixture(scope="module")
def hub(made, tmp_path_factory):
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    small = files_of(SMALL, "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.onnx")
    hub.repos["models/org/small"] = {"main": small, "v1": small | {"config.json": small["config.json"] + b"\n"}}
    tar = tmp_path_factory.mktemp("tar") / "senteval.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(made, "senteval")
    text = "".join(f"the cat number {i} plays the guitar in {i % 7} houses\n" for i in range(64))
    hub.repos[f"datasets/{DATASET}"] = {"main": {"wiki1m_for_simcse.txt": text.encode(), "senteval.tar": tar.read_bytes(), "nli_for_simcse.csv": b"not needed"}}
    yield hub
    hub.shutdown()


@pytest.fixture
def at_hub(hub, tmp_path):
    """at_hub(script, *args): a command of the repository, in an empty folder, with an empty cache and the Hub in the box."""
    hub.breaks, hub.private, hub.down = set(), set(), False
    hub.asked.clear()
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0",
                   "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    environment.pop("HF_TOKEN", None)

    def run(script: str, *args, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True, cwd=tmp_path / "work",
                              input="a cat\n", env=environment | more)  # fmt: skip

    return run


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def mistake(done: subprocess.CompletedProcess) -> str:
    """The one line, without what huggingface_hub itself says before it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
TRAIN = ["--config", "small", "--model", "org/small", "--generator", "org/small@v1", "--train-file", "wiki1m_for_simcse.txt", "--steps", "2", "--eval-every", "2",
         "--batch-size", "4", "--out-dir"]  # fmt: skip


def test_train_evaluate_and_embed_by_name_cold_cached_and_offline(hub, at_hub, tmp_path):
    """Cold, only what is needed is fetched, once; then nothing; then nothing can be, and the numbers are the same."""
    ok(at_hub("diffcse.py", *TRAIN, "cold"))
    assert hub.downloaded() == sorted([*NEEDED, "config.json", "senteval.tar", "wiki1m_for_simcse.txt"])  # v1 differs in its config alone
    vector = ok(at_hub("embed.py", "encode", "org/small", "-"))
    assert hub.downloaded() == []
    hub.down = True  # what is cached is used, too, where the Hub fails
    assert ok(at_hub("embed.py", "encode", "org/small", "-")) == vector
    hub.asked.clear()
    offline = {"HF_HUB_OFFLINE": "1"}
    ok(at_hub("diffcse.py", *TRAIN, "offline", **offline))
    assert "org/small (cls_before_pooler)" in ok(at_hub("eval_sts.py", "org/small", **offline))
    assert ok(at_hub("embed.py", "encode", "org/small@v1", "-", **offline)) == vector
    assert hub.asked == []
    results = [json.loads((tmp_path / "work" / run / "results.json").read_text()) for run in ("cold", "offline")]
    assert results[0]["after"] == results[1]["after"] and results[0]["after"] != results[0]["before"]
    assert "base_model: org/small\n" in (tmp_path / "work" / "cold" / "best" / "README.md").read_text()


def test_older_and_sentence_transformers_repositories(hub, at_hub, tmp_path, made):
    """Pickles where there is no safetensors, and a folder with its own pooling: only what is read is fetched."""
    import torch

    import bert
    import embed

    opened = embed.open_model(str(SMALL))
    embed.save_model(opened._replace(pooling="mean"), tmp_path / "mean")
    hub.repos["models/org/mean"] = {"main": files_of(tmp_path / "mean", "1_Pooling/notes.txt", "openvino/model.bin")}
    expected = embed.DiffCSE(SMALL, "cpu", pooler="mean").encode("a cat").tolist()
    assert json.loads(ok(at_hub("embed.py", "encode", "org/mean", "-")))["vector"] == pytest.approx(expected, abs=1e-6)
    extra = ["1_Pooling/config.json", "config_sentence_transformers.json", "modules.json", "sentence_bert_config.json"]
    assert hub.downloaded() == sorted([*NEEDED, *extra])
    torch.save(bert.read_safetensors(SMALL / "model.safetensors"), tmp_path / "pytorch_model.bin")
    files = files_of(SMALL) | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    del files["model.safetensors"]
    hub.repos["models/org/pickle"] = {"main": files}
    expected = embed.DiffCSE(SMALL, "cpu").encode("a cat").tolist()
    for offline in ("0", "1"):
        assert json.loads(ok(at_hub("embed.py", "encode", "org/pickle", "-", HF_HUB_OFFLINE=offline)))["vector"] == pytest.approx(expected, abs=1e-6)
        assert "pytorch_model.bin" in hub.downloaded() or offline == "1"


def test_a_broken_download_is_one_line_and_leaves_no_half_file(hub, at_hub, tmp_path):
    """Offline afterwards what is missing is said; with the Hub whole again the same command works."""
    hub.breaks = {"model.safetensors"}
    assert "model 'org/small' is neither a path here nor in the Hub's cache" in mistake(at_hub("embed.py", "encode", "org/small", "-"))
    whole = {len(content) for content in hub.repos["models/org/small"]["main"].values()}
    kept = [f for f in (tmp_path / "hf").rglob("*") if f.is_file() and "snapshots" in f.parts]
    assert all(f.stat().st_size in whole for f in kept) and not any(f.name == "model.safetensors" for f in kept)
    assert "the cache holds only a part of it" in mistake(at_hub("embed.py", "encode", "org/small", "-", HF_HUB_OFFLINE="1"))
    hub.breaks = set()
    ok(at_hub("embed.py", "encode", "org/small", "-"))


def test_what_the_hub_says_no_to_is_one_line(hub, at_hub, tmp_path):
    """What was tried, and why it did not work: no such repository, private, no such revision, no network, a failing Hub."""
    (tmp_path / "work" / "lookups.py").write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import data
for name in sys.argv[1:]:
    try: data.find_model(name); print("found")
    except data.UserError as error: print(error)""")

    def lookups(*names: str, **more: str) -> list[str]:
        lines = ok(at_hub(tmp_path / "work" / "lookups.py", *names, **more)).splitlines()
        assert len(lines) == len(names)
        return lines

    none, revision, name = lookups("org/none", "org/small@v9", "org/sm all")
    assert "neither a path here nor in the Hub's cache" in none and str(tmp_path / "hf") in none and "127.0.0.1" in none
    assert "there is none of that name, or it is private" in none and "it has no such revision" in revision and "that cannot be a name there" in name
    hub.private = {"models/org/small"}
    assert "it is private: `hf auth login` or HF_TOKEN" in lookups("org/small")[0]
    assert lookups("org/small", HF_TOKEN="secret") == ["found"]
    assert "no network, or HF_HUB_OFFLINE is set" in lookups("org/other", HF_HUB_OFFLINE="1")[0]
    assert "no network, or HF_HUB_OFFLINE is set" in lookups("org/other", HF_ENDPOINT="http://127.0.0.1:9")[0]
    hub.down = True
    assert "it answered 503" in lookups("org/other")[0]


def test_a_path_with_an_at_sign_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "run@2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data.find_model("run@2") == Path("run@2")
