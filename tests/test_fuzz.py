"""Damaged safetensors files, read by bert.py and by the safetensors library.

Both accept the same files, with equal tensors; bert.py refuses the others with a ModelError.
One kind is counted apart: for a name that occurs twice the library uses the last; bert.py refuses.

    python tests/test_fuzz.py --files 100000 > results/fuzz.json   # pytest runs 3,000
"""

import argparse
import contextlib
import copy
import json
import random
import resource
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bert import DTYPES, ModelError, read_safetensors  # noqa: E402

st = pytest.importorskip("safetensors.torch", reason="needs safetensors (requirements-dev.txt)")

NUMBERS = [0, 1, -1, 2, 3, 4, 7, 8, 255, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS += [2**64, 10**30, -(2**63), 0.0, 1.0, 0.5, 1e300, True, False, None, "0"]
# Types of the library that bert.py does not read are left out: nothing here uses them.
STRINGS = [*DTYPES, "F6_E2M3", "f32", "", "FLOAT", "F32 ", 32, None]
LISTS = [[], [0], [1], [0, 0], [[1]], [2**32, 2**32, 0], [0, 2**62, 2**62]]  # also overflows
OTHERS = [{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, {}, {"k": 1}, {"k": "v"}, "0,4"]
OTHERS += [None, 3, "x", *LISTS]


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


def entries(value) -> list[tuple]:
    """(container, key) of everything inside a JSON value."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + sum((entries(value[key]) for key in keys), [])


def edit_header(header: dict, r: random.Random) -> None:
    """One change: a value is replaced, moved by a little, deleted, exchanged or added."""
    kind, found = r.randrange(7), entries(header)
    if kind == 0 or not found:
        header[r.choice(("new", "__metadata__", "", "a"))] = copy.deepcopy(r.choice(OTHERS))
        return
    container, key = r.choice(found)
    value = container[key]
    if kind == 1:
        del container[key]
    elif kind == 2:  # usually with the same field of another tensor
        other, other_key = r.choice([entry for entry in found if entry[1] == key])
        container[key], other[other_key] = other[other_key], value
    elif kind == 3 and type(value) is int:
        container[key] = value + r.choice((-8, -4, -1, 1, 4, 8))
    else:
        similar = {dict: OTHERS, list: LISTS, str: STRINGS}.get(type(value), NUMBERS)
        container[key] = copy.deepcopy(r.choice(similar if r.random() < 0.9 else OTHERS))


def edit_text(text: str, r: random.Random) -> str:
    """The JSON itself is damaged."""
    i = r.randrange(len(text))
    inserted = text[:i] + r.choice('{}[]",:0x \\\t\n') + text[i:]
    twice = text[:-1] + ("," if len(text) > 2 else "") + text[1:]  # every name occurs twice
    edits = [text[:i] + text[i + 1 :], inserted, twice, "[" * 5000 + text, text.replace('"', "'")]
    return r.choice([*edits, " " + text, text + " " * r.randrange(9), text + "x"])


def damage(data: bytes, r: random.Random) -> bytes:
    kind, header_size = r.randrange(8), int.from_bytes(data[:8], "little")
    if kind <= 1:  # flipped bits, anywhere or in the header
        flipped = bytearray(data)
        for _ in range(r.randrange(1, 5)):
            flipped[r.randrange(len(data) if kind else 8 + header_size)] ^= 1 << r.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[: r.choice((0, 7, 8, r.randrange(len(data))))]
    if kind == 3:
        return data + r.randbytes(r.choice((1, 4, 8, 100)))
    if kind == 4:
        near, size = header_size + r.choice((-8, -1, 1, 8)), len(data)
        sizes = (near, r.getrandbits(64), 0, 2**63, 2**64 - 1, 100_000_001, size - 8, size)
        return (r.choice(sizes) % 2**64).to_bytes(8, "little") + data[8:]
    header, json_is_damaged = json.loads(data[8 : 8 + header_size]), r.random() < 0.2
    for _ in range(0 if json_is_damaged else r.choice((1, 1, 2))):
        edit_header(header, r)
    text = json.dumps(header, ensure_ascii=r.random() < 0.5)
    text = edit_text(text, r) if json_is_damaged else text
    encoded = text.encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + header_size :]


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Type, shape and bytes of each tensor."""
    flat = {name: t.reshape(-1).view(torch.uint8).tolist() for name, t in tensors.items()}
    return {name: (t.dtype, t.shape, flat[name]) for name, t in tensors.items()}


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
        ours = theirs = None
        with contextlib.suppress(Exception):  # the library raises several types
            theirs = st.load_file(path)
        try:
            ours = read_safetensors(path)
        except ModelError as error:
            assert "\n" not in str(error) and str(path) in str(error), (i, str(error))
            if theirs is not None and "a name occurs twice" in str(error):
                counts["refused_for_a_name_twice_alone"] += 1
                continue
        assert (ours is None) == (theirs is None), (i, "refused" if ours is None else "read", data)
        if ours is not None:
            assert contents(ours) == contents(theirs), (i, data)
            assert all(t.data_ptr() % t.itemsize == 0 for t in ours.values()), (i, data)
        counts["refused" if ours is None else "accepted"] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {**counts, "MB_more_at_its_peak": round(peak / 1024, 1)}


def test_three_thousand_damaged_files(tmp_path):
    found = fuzz(3000, 1, tmp_path)
    assert found["accepted"] > 100 and found["refused"] > 1000
    assert found["refused_for_a_name_twice_alone"] > 0 and found["MB_more_at_its_peak"] < 100


def main() -> None:
    parser = argparse.ArgumentParser(description="Read damaged safetensors files in two ways.")
    parser.add_argument("--files", type=int, default=100_000)
    files = parser.parse_args().files
    with tempfile.TemporaryDirectory() as folder:
        result = {"files": files, **fuzz(files, 0, Path(folder))}
    result |= {"safetensors": version("safetensors"), "torch": torch.__version__}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
