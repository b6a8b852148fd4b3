"""Where models and data come from: a path, or the Hugging Face Hub's cache.

Without this file every name would have to be the path of something downloaded by hand.
huggingface_hub obeys its variables: HF_HOME, HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE.
"""

import os
import tarfile
from pathlib import Path

from bert import read_json
from engine.errors import UserError, atomic_folder, expand_home

ROOT = Path(__file__).resolve().parent.parent  # of the repository
DATASET = "princeton-nlp/datasets-for-simcse"
DATASET_TEXTS = ("wiki1m_for_simcse.txt", "nli_for_simcse.csv")
SMALL_FILES = ["config.json", "modules.json", "[0-9]_*/config.json"]
SMALL_FILES += ["tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"]
SMALL_FILES += ["tokenizer_config.json", "special_tokens_map.json"]
SMALL_FILES += ["sentence_*_config.json", "config_sentence_transformers.json"]
SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
SAFETENSORS += ["[0-9]_*/model.safetensors", "[1-9]_*/pytorch_model.bin"]  # a Dense layer's
PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]
PICKLES += ["[0-9]_*/pytorch_model.bin"]  # for repositories without model*.safetensors


def cache_folder() -> Path:
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffcse"


def download(repo: str, patterns: list[str], repo_type: str = "model", revision: str = "") -> Path:
    """A local folder with the matching files of a Hub repository.

    Raises: UserError in one line, whatever fails.
    """
    from huggingface_hub import constants, snapshot_download  # slow to import

    options = {"repo_type": repo_type, "revision": revision or None, "allow_patterns": patterns}
    options["cache_dir"] = expand_home(constants.HF_HUB_CACHE)
    try:
        folder = Path(snapshot_download(repo, **options))
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return folder
        reason = f"it has no {patterns[0]}"
    except Exception as error:  # its errors share no base class across versions
        first_line = str(error).strip().split("\n")[0]
        reason = f"{type(error).__name__}: {first_line[:200]}"
    raise UserError(
        f"{repo!r} is neither a local path nor in the cache ({constants.HF_HUB_CACHE}), and the "
        f"download from {constants.ENDPOINT} failed: {reason}; check the name and the network "
        "(HF_TOKEN for private repositories), or try: python diffcse.py --config demo"
    )


def read_settings(path: Path) -> dict:
    """A JSON file of a model's folder; empty if it does not exist. Raises: ModelError."""
    return read_json(path) if path.is_file() else {}


def local_folder(name: str) -> Path | None:
    """The folder of that name, here or in this repository; of a run, its best model."""
    for path in (os.path.expanduser(name), ROOT / name):
        if os.path.isdir(path):
            best = Path(path) / "best"
            return best if best.is_dir() else Path(path)
    return None


def find_model(name: str) -> Path:
    """The folder of a model: a path or a Hub name (NAME@REVISION: a branch, tag or commit).

    Raises: UserError if it does not exist and cannot be downloaded.
    """
    if folder := local_folder(name):
        return folder
    repo, _, revision = name.partition("@")
    is_path = name.startswith((".", "/", "~")) or repo.count("/") > 1 or len(name) > 200
    if is_path or not repo or os.path.exists(name) or os.path.exists(ROOT / name):
        raise UserError(f"{name}: no such model folder")
    folder = download(repo, SMALL_FILES + SAFETENSORS, revision=revision)
    if not any(folder.glob("model*.safetensors")):
        folder = download(repo, SMALL_FILES + PICKLES, revision=revision)
    return folder


def find_text(name: str, data: str = "") -> Path:
    """A text file: a path, a name in the folder `data` or this repository, or a published one.

    Raises: UserError if it does not exist and cannot be downloaded.
    """
    for folder in ("", os.path.expanduser(data), ROOT):
        path = os.path.join(folder, os.path.expanduser(name))
        if os.path.isfile(path):
            return Path(path)
    if name not in DATASET_TEXTS:
        raise UserError(f"{name}: no such file" + (f", nor in {data}" if data else ""))
    return download(DATASET, [name], "dataset") / name


def unpack(tar: Path, folder: Path) -> None:
    """The plain files of a tar. (Python 3.11.3 and others have no extractall(filter="data").)"""
    with tarfile.open(tar) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):  # no links and no devices
            path = (folder / member.name).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise tarfile.TarError(f"{member.name!r} is outside the folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())


def find_senteval(data: str) -> Path:
    """The folder with STS/ and SICK/: in `data`, or senteval.tar from the Hub, unpacked once.

    Raises: UserError if it does not exist and cannot be downloaded.
    """
    if data:
        for below in ("", "senteval", "downstream", "data/downstream", "SentEval/data/downstream"):
            folder = Path(os.path.expanduser(data)) / below
            if os.path.isdir(folder / "STS"):
                return folder
        raise UserError(f"{data}: no folder STS in it, nor in its senteval/ or data/downstream/")
    tar = download(DATASET, ["senteval.tar"], "dataset") / "senteval.tar"
    name = f"senteval-{tar.resolve().name[:16]}"  # the Hub's cache names a file by its hash
    unpacked = cache_folder() / name
    if not unpacked.is_dir():
        try:
            with atomic_folder(unpacked) as new:
                unpack(tar, new)
        except (tarfile.TarError, EOFError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"cannot unpack {tar}: {reason}; delete it to try again") from None
    for sts in sorted(unpacked.rglob("STS")):
        return sts.parent
    raise UserError(f"{tar}: no folder STS in it")
