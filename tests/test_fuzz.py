"""Damaged safetensors files, read by bert.py and by the safetensors library.

Both accept the same files, with equal tensors; bert.py refuses the others with a ModelError.
One kind is counted apart: for a name that occurs twice the library uses the last; bert.py refuses.

    python tests/test_fuzz.py --files 100000 --json results/fuzz.json   # pytest runs 3,000
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bert import DTYPES, ModelError, read_safetensors  # noqa: E402

st = pytest.importorskip("safetensors.torch", reason="needs safetensors (requirements-dev.txt)")

ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
NUMBERS = [0, 1, -1, 2, 3, 4, 7, 8, 255, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS += [2**64, 10**30, -(2**63), 0.0, 1.0, 0.5, 1e300, True, False, None, "0", "", [], {}]
OFFSETS = [[], None, {}, "0,4"]
SHAPES = [[], None, 4, {}, "[1]", [[1]], [2**32, 2**32], [0, 2**62, 2**62]]
# Types of the library that bert.py does not read are left out: nothing here uses them.
DTYPE_NAMES = [*DTYPES, "F6_E2M3", "f32", "", "FLOAT", 32, None, [], "F32 "]


def valid_files(r: random.Random) -> list[bytes]:
    """Every type, no dimensions, empty tensors, no tensors, metadata."""
    scalar = {"a": torch.tensor(1.5), "b": torch.zeros(0, 4)}
    files = [st.save({}), st.save({"a": torch.zeros(2, 3)}), st.save(scalar, {"format": "pt"})]
    for _ in range(6):
        tensors = {}
        for dtype in r.sample(list(DTYPES.values()), 5):
            shape = [r.randrange(0, 5) for _ in range(r.randrange(0, 4))]
            name = r.choice("abcxyzé漢") * r.randrange(1, 4)
            tensors[name] = torch.randint(0, 2, shape).to(dtype)
        files.append(st.save(tensors, {"k": "v"} if r.random() < 0.5 else None))
    return files


def edit_entry(header: dict, r: random.Random) -> None:
    """One change: an offset, a shape, a type, a field's name, or something that does not belong."""
    entries = [e for name, e in header.items() if name != "__metadata__" and isinstance(e, dict)]
    kind = r.randrange(10)
    if not entries or kind == 0:
        value = r.choice((dict(ENTRY), {}, {"k": 1}, {"k": "v"}, None, 3, [], "x"))
        header[r.choice(("new", "__metadata__", "", "a"))] = value
        return
    entry = r.choice(entries)
    offsets, shape = entry.get("data_offsets"), entry.get("shape")
    if kind in (1, 2) and isinstance(offsets, list) and offsets:
        i = r.randrange(len(offsets))
        if r.random() < 0.6 and isinstance(offsets[i], int):
            offsets[i] += r.choice((-8, -4, -1, 1, 4, 8))
        else:
            offsets[i] = r.choice(NUMBERS)
    elif kind == 3 and isinstance(offsets, list):
        entry["data_offsets"] = r.choice((offsets[::-1], offsets[:1], [*offsets, 0], *OFFSETS))
    elif kind in (4, 5) and isinstance(shape, list):
        if shape and r.random() < 0.7:
            shape[r.randrange(len(shape))] = r.choice(NUMBERS)
        else:
            entry["shape"] = r.choice(([*shape, 1], [*shape, 0], [1, *shape], shape[::-1], *SHAPES))
    elif kind in (6, 7):
        entry["dtype"] = r.choice(DTYPE_NAMES)
    elif kind == 8 and entry:
        name = r.choice(list(entry))
        if r.random() < 0.5:
            del entry[name]
        else:
            entry[r.choice(("extra", "Dtype", "shape "))] = entry[name]
    else:  # two tensors exchange their bytes
        other = r.choice(entries)
        theirs, ours = other.get("data_offsets"), entry.get("data_offsets")
        entry["data_offsets"], other["data_offsets"] = theirs, ours


def edit_header(header: dict, r: random.Random) -> str:
    """The header as JSON, with one or two changes; sometimes the JSON itself is damaged."""
    for _ in range(r.choice((1, 1, 2))):
        edit_entry(header, r)
    text = json.dumps(header, ensure_ascii=r.random() < 0.5)
    if r.random() < 0.15:
        i = r.randrange(len(text))
        inserted = text[:i] + r.choice('{}[]",:0x \\\t\n') + text[i:]
        comma = (
            text[:-1] + ("," if len(text) > 2 else "") + text[1:]
        )  # joins two copies: names twice
        deep = "[" * r.choice((3, 5000)) + text
        spaces = text + " " * r.randrange(9)
        edits = (
            text[:i] + text[i + 1 :],
            inserted,
            comma,
            spaces,
            " " + text,
            text + "x",
            text * 2,
        )
        text = r.choice((*edits, deep, text.replace('"', "'")))
    return text


def damage(data: bytes, r: random.Random) -> bytes:
    kind, header_size = r.randrange(8), int.from_bytes(data[:8], "little")
    if kind <= 1:  # flipped bits, anywhere or in the header
        flipped = bytearray(data)
        for _ in range(r.randrange(1, 5)):
            flipped[r.randrange(len(data) if kind else 8 + header_size)] ^= 1 << r.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[: r.randrange(len(data))]
    if kind == 3:
        return data + r.randbytes(r.choice((1, 4, 8, 100)))
    if kind == 4:
        near, size = header_size + r.choice((-8, -1, 1, 8)), len(data)
        sizes = (near, r.getrandbits(64), 0, 2**63, 2**64 - 1, 100_000_001, size - 8, size)
        return (r.choice(sizes) % 2**64).to_bytes(8, "little") + data[8:]
    text = edit_header(json.loads(data[8 : 8 + header_size]), r).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + header_size :]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, types, shapes and bytes."""

    def raw(t: torch.Tensor) -> tuple:
        flat = t.contiguous().reshape(-1).view(torch.uint8)
        return t.dtype, t.shape, flat.numpy().tobytes() if t.numel() else b""

    return a.keys() == b.keys() and all(raw(a[name]) == raw(b[name]) for name in a)


def fuzz(files: int, seed: int, folder: Path) -> dict:
    """Raises: AssertionError with the bytes of the first file that the two read differently."""
    r, path = random.Random(seed), folder / "fuzzed.safetensors"
    counts = {"accepted": 0, "refused": 0, "refused_for_a_name_twice_alone": 0}
    valid = valid_files(r)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(files):
        data = damage(r.choice(valid), r)
        path.unlink(missing_ok=True)  # a mapped file must not change
        path.write_bytes(data)
        try:
            theirs = st.load_file(path)
        except Exception:
            theirs = None
        try:
            ours = read_safetensors(path)
        except ModelError as error:
            assert "\n" not in str(error) and str(path) in str(error), (i, str(error))
            ours = None
            if theirs is not None and "a name occurs twice" in str(error):
                counts["refused_for_a_name_twice_alone"] += 1
                continue
        assert (ours is None) == (theirs is None), (i, "refused" if ours is None else "read", data)
        assert ours is None or equal(ours, theirs), (i, data)
        counts["refused" if ours is None else "accepted"] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {**counts, "MB_more_at_its_peak": round(peak / 1024, 1)}


def test_three_thousand_damaged_files(tmp_path):
    found = fuzz(3000, 1, tmp_path)
    assert (
        found["accepted"] > 100 and found["refused"] > 1000 and found["MB_more_at_its_peak"] < 100
    )


def main() -> None:
    from engine.errors import write_atomically

    parser = argparse.ArgumentParser(description="Read damaged safetensors files in two ways.")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = {"files": args.files, "seed": args.seed} | fuzz(
            args.files, args.seed, Path(folder)
        )
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    result |= {"safetensors": version("safetensors"), "torch": torch.__version__}
    print(json.dumps(result))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
