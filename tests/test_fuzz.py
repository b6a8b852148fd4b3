"""Damaged safetensors files, read by us and by the safetensors library: the same accepted, equal tensors, for the rest one UserError each.

But one kind: a header with a name twice, of which the library takes the last, is refused here and counted by itself.

    python tests/test_fuzz.py [--files 100000] [--seed 0] [--json results/fuzz.json]     # the long one; pytest runs a short one
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bert import DTYPES, UserError, read_safetensors, write_atomically  # noqa: E402

st = pytest.importorskip("safetensors.torch", reason="needs safetensors (requirements-dev.txt)")


def whole_files(r: random.Random) -> list[bytes]:
    """Some honest files: every type, no dimensions, empty tensors, no tensors, metadata."""
    files = [st.save({}), st.save({"a": torch.zeros(2, 3)}), st.save({"a": torch.tensor(1.5), "b": torch.zeros(0, 4)}, {"format": "pt"})]
    for _ in range(6):
        tensors = {}
        for dtype in r.sample(list(DTYPES.values()), 5):
            shape = [r.randrange(0, 5) for _ in range(r.randrange(0, 4))]
            tensors[r.choice("abcxyzé漢") * r.randrange(1, 4)] = torch.randint(0, 2, shape).to(dtype)
        files.append(st.save(tensors, {"k": "v"} if r.random() < 0.5 else None))
    return files


NUMBERS = [0, 1, -1, 2, 3, 4, 7, 8, 255, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.0, 1.0, 0.5, 1e300, True, False, None, "0", "", [], {}]
# Not F4, which the library takes and we refuse: two numbers in a byte, which no BERT is kept in.
DTYPE_NAMES = [*DTYPES, "F6_E2M3", "f32", "", "FLOAT", 32, None, [], "F32 "]


def edit_header(header: dict, r: random.Random) -> str:
    """The header as JSON with one or two things in it changed: offsets, shapes, types, names, what should not be there."""
    for _ in range(r.choice((1, 1, 2))):
        entries = [entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
        kind = r.randrange(10)
        if not entries or kind == 0:
            header[r.choice(("new", "__metadata__", "", "a"))] = r.choice(({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, {}, {"k": 1}, {"k": "v"}, None, 3, [], "x"))
            continue
        entry = r.choice(entries)
        offsets, shape = entry.get("data_offsets"), entry.get("shape")
        if kind in (1, 2) and isinstance(offsets, list) and offsets:
            i = r.randrange(len(offsets))
            offsets[i] = offsets[i] + r.choice((-8, -4, -1, 1, 4, 8)) if r.random() < 0.6 and isinstance(offsets[i], int) else r.choice(NUMBERS)
        elif kind == 3 and isinstance(offsets, list):
            entry["data_offsets"] = r.choice((offsets[::-1], offsets[:1], offsets + [0], [], None, {}, "0,4"))
        elif kind in (4, 5) and isinstance(shape, list):
            if shape and r.random() < 0.7:
                shape[r.randrange(len(shape))] = r.choice(NUMBERS)
            else:
                entry["shape"] = r.choice((shape + [1], shape + [0], [1] + shape, shape[::-1], [], None, 4, {}, "[1]", [[1]], [2**32, 2**32], [0, 2**62, 2**62]))
        elif kind in (6, 7):
            entry["dtype"] = r.choice(DTYPE_NAMES)
        elif kind == 8 and entry:
            name = r.choice(list(entry))
            if r.random() < 0.5:
                del entry[name]
            else:
                entry[r.choice(("extra", "Dtype", "shape "))] = entry[name]
        else:  # two tensors change places
            other = r.choice(entries)
            entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
    text = json.dumps(header, ensure_ascii=r.random() < 0.5)
    if r.random() < 0.15:  # JSON itself damaged, or a name twice
        i = r.randrange(len(text))
        text = r.choice((text[:i] + text[i + 1 :], text[:i] + r.choice('{}[]",:0x \\\t\n') + text[i:], text[:-1] + ("," if len(text) > 2 else "") + text[1:],
                         text + " " * r.randrange(9), " " + text, text + "x", text * 2, "[" * r.choice((3, 5000)) + text, text.replace('"', "'")))  # fmt: skip
    return text


def mutate(data: bytes, r: random.Random) -> bytes:
    kind, size = r.randrange(8), int.from_bytes(data[:8], "little")
    if kind <= 1:  # bits anywhere, or in the header
        data = bytearray(data)
        for _ in range(r.randrange(1, 5)):
            data[r.randrange(len(data) if kind else 8 + size)] ^= 1 << r.randrange(8)
        return bytes(data)
    if kind == 2:
        return data[: r.randrange(len(data))]
    if kind == 3:
        return data + r.randbytes(r.choice((1, 4, 8, 100)))
    if kind == 4:
        length = r.choice((size + r.choice((-8, -1, 1, 8)), r.getrandbits(64), 0, 2**63, 2**64 - 1, 100_000_001, len(data) - 8, len(data)))
        return (length % 2**64).to_bytes(8, "little") + data[8:]
    text = edit_header(json.loads(data[8 : 8 + size]), r).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(t: torch.Tensor) -> bytes:
        return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""

    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and raw(a[n]) == raw(b[n]) for n in a)


def fuzz(files: int, seed: int, folder: Path) -> dict:
    """Raises: AssertionError with the file's bytes for the first that the two do not take alike."""
    r, path, counts = random.Random(seed), folder / "fuzzed.safetensors", {"accepted": 0, "refused": 0, "refused_for_a_name_twice_alone": 0}
    seeds = whole_files(r)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(files):
        data = mutate(r.choice(seeds), r)
        path.unlink(missing_ok=True)  # what is mapped stays as it was
        path.write_bytes(data)
        try:
            theirs = st.load_file(path)
        except Exception:
            theirs = None
        try:
            ours = read_safetensors(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), (i, str(error))
            ours = None
            if theirs is not None and "a name stands twice" in str(error):
                counts["refused_for_a_name_twice_alone"] += 1
                continue
        assert (ours is None) == (theirs is None), (i, "ours took it" if theirs is None else "ours refused it", data)
        assert ours is None or same(ours, theirs), (i, data)
        counts["refused" if ours is None else "accepted"] += 1
    return {**counts, "MB_more_at_its_peak": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)}


def test_three_thousand_damaged_files(tmp_path):
    found = fuzz(3000, 1, tmp_path)
    assert found["accepted"] > 100 and found["refused"] > 1000 and found["MB_more_at_its_peak"] < 100


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged safetensors files, read by us and by the safetensors library.")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        result = {"files": args.files, "seed": args.seed, **fuzz(args.files, args.seed, Path(temporary))}
    result |= {"minutes": round((time.time() - started) / 60, 1), "safetensors": __import__("safetensors").__version__, "torch": torch.__version__}
    print(json.dumps(result))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
