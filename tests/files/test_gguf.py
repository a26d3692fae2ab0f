"""The GGUF reader: what the ``gguf`` package writes is read back, and no damaged file gets past a LoadError."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydflash.errors import BadMetadata, LoadError, MissingTensor, StateError
from pydflash.files import GGUFFile
from pydflash.ggml_types import GGMLType

U8, U16, U32, I32, F32, BOOL, STR, ARR, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10


# --- Files, written by hand so that every byte can be wrong -----------------------------------------------------------


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(
    name: str | bytes = "a", ne: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    rank = len(ne) if rank is None else rank
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", rank, *ne, kind, offset)


def build(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(64),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def save(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def rejection(path: Path) -> str:
    """The message of the LoadError that ``path`` raises when opened: quick, naming the file and saying what to do."""
    start = time.process_time()
    with pytest.raises(LoadError) as caught:
        GGUFFile.open(path)
    assert time.process_time() - start < 1.0
    message = str(caught.value)
    assert str(path.parent) in message
    assert "; " in message
    return message


# --- What the gguf package writes -------------------------------------------------------------------------------------

SCALARS: dict[str, Any] = {
    "u8": (gguf.GGUFValueType.UINT8, 255),
    "i8": (gguf.GGUFValueType.INT8, -128),
    "u16": (gguf.GGUFValueType.UINT16, 65_535),
    "i16": (gguf.GGUFValueType.INT16, -32_768),
    "u32": (gguf.GGUFValueType.UINT32, 2**32 - 1),
    "i32": (gguf.GGUFValueType.INT32, -(2**31)),
    "f32": (gguf.GGUFValueType.FLOAT32, 0.15625),
    "yes": (gguf.GGUFValueType.BOOL, True),
    "no": (gguf.GGUFValueType.BOOL, False),
    "text": (gguf.GGUFValueType.STRING, "naïve Ωmega 日本語 \N{GRINNING FACE}\0 end"),
    "empty": (gguf.GGUFValueType.STRING, ""),
    "u64": (gguf.GGUFValueType.UINT64, 2**64 - 1),
    "i64": (gguf.GGUFValueType.INT64, -(2**63)),
    "f64": (gguf.GGUFValueType.FLOAT64, 1e-300),
}

ARRAYS: dict[str, Any] = {
    "ints": [1, -2, 3],
    "floats": [0.5, -2.25],
    "bools": [True, False, True],
    "strings": ["a", "", "Ġhello", "日本"],
    "nested": [[1, 2], [3], [4, 5, 6]],
    "nested_strings": [["a", "b"], ["c"]],
    "deep": [[[1], [2, 3]], [[4]]],
}


def write(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, Any]] = MappingProxyType({})
) -> Path:
    """Write a file with the gguf package; scalars as (type, value), arrays as lists, tensors as (data, raw type)."""
    writer = gguf.GGUFWriter(path, "qwen35")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value[1], value[0])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [as_list(item) for item in value] if isinstance(value, list) else value


def test_every_value_type_reads_back_with_its_value_and_python_type(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path / "m.gguf", SCALARS | ARRAYS)) as file:
        assert file.metadata["general.architecture"] == "qwen35"
        assert len(file.metadata) == 1 + len(SCALARS) + len(ARRAYS)
        for key, (_, value) in SCALARS.items():
            assert type(file.metadata[key]) is type(value)
            assert file.metadata[key] == value
        for key, value in ARRAYS.items():
            assert as_list(file.metadata[key]) == value
            assert file.metadata.count(key) == len(value)
        assert file.metadata["ints"].dtype == np.int32
        assert file.metadata["bools"].dtype == np.bool_
        assert not file.metadata["floats"].flags.writeable


def test_the_gguf_package_reads_the_same_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", SCALARS | {key: ARRAYS[key] for key in ("ints", "strings", "bools")})
    peer = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
    with GGUFFile.open(path) as file:
        assert {key: as_list(value) for key, value in file.metadata.items()} == peer


def written_tensors() -> dict[str, tuple[np.ndarray, Any]]:
    """One tensor of random bytes for every type the gguf package knows, in ranks 1 to 4, and the numpy types."""
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[np.ndarray, Any]] = {}
    for index, (kind, (_, size)) in enumerate(gguf.GGML_QUANT_SIZES.items()):
        if kind.name == "Q8_1":  # gguf 0.19 gives its block 40 bytes, ggml has 36
            continue
        shape = [*[2, 3, 5][: index % 4], 3 * size]
        tensors[f"blk.0.{kind.name}"] = (rng.integers(0, 256, shape, dtype=np.uint8), kind)
    return tensors


def test_every_tensor_type_reads_back_byte_for_byte(tmp_path: Path) -> None:
    tensors = written_tensors()
    path = write(tmp_path / "m.gguf", {}, tensors)
    peers = {peer.name: peer for peer in gguf.GGUFReader(path).tensors}
    with GGUFFile.open(path) as file:
        assert set(file.tensors) == set(tensors) == set(peers)
        for name, (data, kind) in tensors.items():
            info, peer = file.tensors[name], peers[name]
            assert (info.name, info.type, info.type.name, info.part) == (name, kind, kind.name, 0)
            assert info.shape == tuple(int(n) for n in reversed(peer.shape))
            assert (info.elements, info.nbytes, info.offset) == (peer.n_elements, peer.n_bytes, peer.data_offset)
            assert info.shape[:-1] == data.shape[:-1]
            assert file.data(name).tobytes() == data.tobytes()


def test_type_sizes_are_those_of_the_gguf_package() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        ours = GGMLType[kind.name]
        assert int(ours) == int(kind)
        if kind.name != "Q8_1":
            assert (ours.block_size, ours.type_size) == sizes
    assert (GGMLType.Q8_1.block_size, GGMLType.Q8_1.type_size) == (32, 36)
    assert GGMLType.Q4_K.nbytes(512) == 288
    with pytest.raises(ValueError, match="whole Q4_K blocks"):
        GGMLType.Q4_K.nbytes(100)


def test_custom_alignment_is_honoured(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen35")
    writer.add_custom_alignment(4096)
    for name in ("a", "b"):
        writer.add_tensor(name, np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert [info.offset % 4096 for info in file.tensors.values()] == [0, 0]
        assert file.data("b").view(np.float32).tolist() == [0, 1, 2, 3, 4]


# --- Views, accessors and closing -------------------------------------------------------------------------------------

GOOD = build(
    (
        pair("general.architecture", STR, string("qwen35")),
        pair("count", U32, u32(7)),
        pair("flag", BOOL, b"\1"),
        pair("scale", F32, struct.pack("<f", 0.5)),
        pair("sections", ARR, array(I32, 4, struct.pack("<4i", 11, 11, 10, 0))),
        pair("tokens", ARR, array(STR, 3, string("a") + string("") + string(b"\xff\xfe"))),
        pair("nested", ARR, array(ARR, 2, array(U8, 2, b"\1\2") + array(STR, 1, string("x")))),
    ),
    (tensor("a", (4, 2)), tensor("b", (32,), 8, 32)),
    bytes(range(32)) + bytes(34),
)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save(tmp_path, GOOD)


def test_typed_access_widens_but_does_not_guess(good: Path) -> None:
    with GGUFFile.open(good) as file:
        assert file.require("count", int) == 7
        assert file.require("count", float) == 7.0
        assert file.require("flag", bool) is True
        assert file.require("scale", float) == 0.5
        assert file.require("sections", list) == [11, 11, 10, 0]
        assert file.require("sections", np.ndarray).tolist() == [11, 11, 10, 0]
        assert file.get("missing", int) is None
        assert file.get("missing", int, 3) == 3
        assert file.get("count", int, 3) == 7
        for key, kind in [("flag", int), ("scale", int), ("count", str), ("count", bool), ("tokens", np.ndarray)]:
            with pytest.raises(BadMetadata, match=f"'{key}' is needed as {kind.__name__} and is .* \\(byte "):
                file.get(key, kind, None)
        with pytest.raises(BadMetadata, match="'missing' is needed as int and is missing"):
            file.require("missing", int)


def test_keys_count_as_read_when_their_value_was_given_away(good: Path) -> None:
    with GGUFFile.open(good) as file:
        file.get("missing", int)
        file.describe()
        with pytest.raises(BadMetadata):
            file.require("count", str)
        assert file.keys_read == set()
        file.get("count", int, 3)
        file.require_within("count", 0, 9)
        file.require("scale", float)
        file.integers("sections", 4)
        assert file.keys_read == {"count", "scale", "sections"}


def test_a_list_of_integers_has_a_length_that_fits(good: Path) -> None:
    with GGUFFile.open(good) as file:
        assert file.integers("sections", 4) == [11, 11, 10, 0]
        with pytest.raises(BadMetadata, match="sections lists 4 values; at most 3 fit"):
            file.integers("sections", 3)
        for key, found in (("tokens", "must list integers"), ("count", "is needed as list"), ("missing", "is missing")):
            with pytest.raises(BadMetadata, match=found):
                file.integers(key, 4)


def test_bytes_that_are_not_utf8_survive_in_strings(good: Path) -> None:
    with GGUFFile.open(good) as file:
        tokens = [token.encode("utf-8", "surrogateescape") for token in file.metadata["tokens"]]
    assert tokens == [b"a", b"", b"\xff\xfe"]


def test_tensor_data_is_a_read_only_view_of_the_mapping(good: Path) -> None:
    with GGUFFile.open(good) as file:
        data, base = file.data("a"), np.frombuffer(file.mapping(0), np.uint8)
        assert np.shares_memory(data, base)
        assert not data.flags.writeable
        assert base.ctypes.data % os.sysconf("SC_PAGE_SIZE") == 0
        assert data.tolist() == list(range(32))
        assert file.tensors["a"].shape == (2, 4)
        with pytest.raises(MissingTensor, match="'c' is not among the 2 tensors"):
            file.data("c")
        with pytest.raises(TypeError):
            file.tensors["a"] = file.tensors["b"]  # type: ignore[index]


def test_arrays_outlive_the_file_and_the_file_says_when_it_is_closed(good: Path) -> None:
    with GGUFFile.open(good) as file:
        data = file.data("a")
        decoded = file.metadata["sections"]
    assert data.tolist() == list(range(32))
    assert file.metadata["sections"] is decoded
    uses: list[Callable[[], object]] = [
        file.mapping,
        file.fingerprint_digest,
        file.full_digest,
        lambda: file.data("a"),
        lambda: file.metadata["tokens"],
    ]
    for use in uses:
        with pytest.raises(StateError, match="after the file was closed"):
            use()
    file.close()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see mappings")
def test_closing_and_failing_leave_nothing_open_or_mapped(good: Path, tmp_path: Path) -> None:
    bad = save(tmp_path, GOOD[:-1], "bad.gguf")

    def held() -> bool:
        open_files = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
        return str(tmp_path) in Path("/proc/self/maps").read_text() or str(good) in open_files or str(bad) in open_files

    with GGUFFile.open(good) as file:
        assert file.data("a")[3] == 3
        assert held()
    assert not held()
    rejection(bad)
    assert not held()


def test_version_2_is_read(tmp_path: Path) -> None:
    with GGUFFile.open(save(tmp_path, GOOD.replace(b"GGUF\3", b"GGUF\2", 1))) as file:
        assert file.require("count", int) == 7


def test_a_file_without_tensors_or_keys_is_valid(tmp_path: Path) -> None:
    with GGUFFile.open(save(tmp_path, build(data=b"")[:24])) as file:
        assert (len(file.metadata), len(file.tensors)) == (0, 0)
        described = file.describe()
    assert (described["architecture"], described["quantisation"], described["parameters"]) == (None, None, 0)


# --- Malformed files: one for each way in which published parsers have been broken ------------------------------------

HUGE = 2**63


def nested(depth: int) -> bytes:
    return array(ARR, 1) * depth + array(U8, 0)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "wrong magic": (build(magic=b"GGML"), "starts with b'GGUF'"),
    "version 0": (build(version=0), "version 0"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count over the ceiling": (build(n_tensors=HUGE), "claims 9,223,372,036,854,775,808 tensors"),
    "tensor count over the file": (build(n_tensors=1000), "bytes are missing: a list of 1,000 tensors"),
    "key count over the ceiling": (build(n_keys=2**64 - 1), "claims 18,446,744,073,709,551,615 keys"),
    "key count over the file": (build(n_keys=1000), "bytes are missing: a list of 1,000 keys"),
    "one more key than there are": (build((pair("k", U32, u32(1)),), n_keys=2), "key 1 is 0 bytes long"),
    "key length 2**63": (build((string("k", HUGE),), n_keys=1), "bytes long, allowed are 1 to 65,535"),
    "key length over the file": (build((string("k", 5000),), n_keys=1), "bytes are missing: key 0"),
    "empty key": (build((pair("", U32, u32(1)),)), "key 0 is 0 bytes long"),
    "key is not UTF-8": (build((pair(b"k\xff", U32, u32(1)),)), "not UTF-8"),
    "duplicate key": (build((pair("k", U32, u32(1)), pair("k", U32, u32(1)))), "'k' appears twice"),
    "unknown value type": (build((pair("k", 13, u32(1)),)), "value type 13"),
    "unknown element type": (build((pair("k", ARR, array(99, 1, u32(1))),)), "value type 99"),
    "string length 2**63": (build((pair("k", STR, string("x", HUGE)),)), "9,223,372,036,854,775,808 bytes, allowed"),
    "string length wraps": (build((pair("k", STR, string("x", 2**64 - 8)),)), "bytes, allowed"),
    "string length over the file": (build((pair("k", STR, string("x", 10_000)),)), "bytes are missing"),
    "array length 2**63": (build((pair("k", ARR, array(U64, HUGE)),)), "items, allowed are 100,000,000"),
    "array bytes wrap": (build((pair("k", ARR, array(U64, 2**61)),)), "items, allowed are 100,000,000"),
    "array length over the file": (build((pair("k", ARR, array(U64, 10**8)),)), "bytes are missing: 100,000,000 items"),
    "string array over the file": (
        build((pair("k", ARR, array(STR, 10**7)),)),
        r"79,999,9\d\d bytes are missing: 10,000,000",
    ),
    "string array over the ceiling": (build((pair("k", ARR, array(STR, 10**8)),)), "allowed are 16,777,216"),
    "string in array 2**63": (build((pair("k", ARR, array(STR, 1, string("x", HUGE))),)), "bytes, allowed"),
    "string in array over the file": (build((pair("k", ARR, array(STR, 1, string("x", 999))),)), "bytes are missing"),
    "nested too deep": (build((pair("k", ARR, nested(5)),)), "more than 4 deep"),
    "nesting bomb": (build((pair("k", ARR, nested(100_000)),)), "more than 4 deep"),
    "nested count over the file": (build((pair("k", ARR, array(ARR, 10**7, nested(1))),)), "value type|missing"),
    "nested length 2**63": (build((pair("k", ARR, array(ARR, HUGE)),)), "allowed are 16,777,216"),
    "alignment 0": (build((pair("general.alignment", U32, u32(0)),)), "power of two .* is uint32 0"),
    "alignment 3": (build((pair("general.alignment", U32, u32(3)),)), "power of two .* is uint32 3"),
    "alignment 4": (build((pair("general.alignment", U32, u32(4)),)), "power of two .* is uint32 4"),
    "alignment 2 GiB": (build((pair("general.alignment", U32, u32(1 << 31)),)), "is uint32 2,147,483,648"),
    "alignment is a string": (build((pair("general.alignment", STR, string("32")),)), "and is string"),
    "alignment is an array": (build((pair("general.alignment", ARR, array(U32, 1, u32(32))),)), "and is array of 1"),
    "tensor name empty": (build((), (tensor(""),)), "a tensor name is 0 bytes long"),
    "tensor name too long": (build((), (tensor("n" * 64),)), "a tensor name is 64 bytes long, allowed are 1 to 63"),
    "tensor name 2**63": (build((), (string("a", HUGE) + bytes(64),)), "bytes long"),
    "tensor name is not UTF-8": (build((), (tensor(b"\xc3"),)), "not UTF-8"),
    "duplicate tensor": (build((), (tensor("a"), tensor("a", offset=32))), "'a' appears twice"),
    "0 dimensions": (build((), (tensor("a", ()), tensor("b"))), "has 0 dimensions"),
    "5 dimensions": (build((), (tensor("a", (1, 1, 1, 1, 8)),)), "has 5 dimensions"),
    "2**32 - 1 dimensions": (build((), (tensor("a", (8,), rank=2**32 - 1),)), "has 4,294,967,295 dimensions"),
    "dimension 0": (build((), (tensor("a", (8, 0)),)), r"shape \(0, 8\)"),
    "negative dimension": (build((), (tensor("a", (2**64 - 8,)),)), "product below"),
    "product overflows to 0": (build((), (tensor("a", (2**32, 2**32)),)), "product below"),
    "product overflows to 8": (build((), (tensor("a", (8, 2**61 + 1, 8, 2**61)),)), "product below"),
    "an exabyte in a small file": (build((), (tensor("a", (2**60,)),)), "bytes are missing: tensor 'a'"),
    "bytes overflow": (build((), (tensor("a", (2**62,), 28),)), "bytes are missing: tensor 'a'"),
    "unknown type": (build((), (tensor("a", kind=43),)), "ggml type 43"),
    "removed type": (build((), (tensor("a", kind=4),)), "ggml type 4,"),
    "negative type": (build((), (tensor("a", kind=2**32 - 1),)), "ggml type 4294967295"),
    "row is not whole blocks": (build((), (tensor("a", (33,), 8),)), "rows of 33 elements and Q8_0 blocks of 32"),
    "rows are not whole blocks but the total is": (build((), (tensor("a", (16, 2), 8),)), "rows of 16 elements"),
    "offset not aligned": (build((), (tensor("a", offset=8),)), "offset 8, which is not aligned to 32"),
    "offset beyond the file": (build((), (tensor("a", offset=1 << 20),)), "bytes are missing: tensor 'a'"),
    "offset wraps": (build((), (tensor("a", offset=2**64 - 32),)), "bytes are missing: tensor 'a'"),
    "offset + size beyond the file": (build((), (tensor("a", (17,)),)), "4 bytes are missing: tensor 'a'"),
    "same bytes twice": (build((), (tensor("a"), tensor("b"))), "'a' and 'b' overlap"),
    "overlap": (build((), (tensor("a", (9,)), tensor("b", (1,), offset=32))), "'a' and 'b' overlap"),
    "overlap out of order": (build((), (tensor("b", (1,), offset=32), tensor("a", (9,)))), "'a' and 'b' overlap"),
    "no data at all": (build((), (tensor("a"),), b""), "32 bytes are missing: tensor 'a'"),
    "split count is a string": (build((pair("split.count", STR, string("3")),)), "must be a count and is string"),
    "split number is negative": (
        build((pair("split.count", U32, u32(3)), pair("split.no", I32, struct.pack("<i", -1)))),
        "must be a count and is -1",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_rejected_with_its_reason(name: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[name]
    path = save(tmp_path, content)
    with pytest.raises(LoadError, match=expected) as caught:
        GGUFFile.open(path)
    assert rejection(path) == str(caught.value)
    assert "byte" in str(caught.value), "the message says where"
    assert isinstance(caught.value, BadMetadata) == name.startswith(("alignment", "split"))


def test_a_file_truncated_anywhere_says_how_much_is_missing(tmp_path: Path) -> None:
    for size in range(len(GOOD)):
        path = save(tmp_path, GOOD[:size])
        assert "bytes are missing" in rejection(path), f"cut at byte {size}"
    with GGUFFile.open(save(tmp_path, GOOD)) as file:
        assert len(file.tensors) == 2


def test_truncated_data_is_counted_exactly(tmp_path: Path) -> None:
    for missing in (1, 2, 33, 34):
        assert f" {missing} bytes are missing" in rejection(save(tmp_path, GOOD[:-missing]))


def test_paths_that_are_no_regular_files_are_rejected(tmp_path: Path) -> None:
    assert "does not exist" in rejection(tmp_path / "none.gguf")
    assert "not a regular file" in rejection(tmp_path)
    assert "24 bytes are missing" in rejection(save(tmp_path, b"", "empty.gguf"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        assert "not a regular file" in rejection(tmp_path / "pipe.gguf")


def check_parses_or_raises_load_error(path: Path) -> None:
    """Whatever a file that opens promises can be read; any other exception than LoadError fails the test."""
    try:
        file = GGUFFile.open(path)
    except LoadError:
        return
    with file:
        for value in file.metadata.values():
            repr(value)
        for name in file.tensors:
            file.data(name).sum()
        json.dumps(file.describe())
        file.fingerprint_digest()


@settings(max_examples=600, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_either_parse_or_raise_load_error(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for position, value in flips:
        content[position] = value
    path = save(tmp_path, bytes(content))
    check_parses_or_raises_load_error(path)


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), counts=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_random_bytes_behind_a_valid_header_either_parse_or_raise_load_error(
    tmp_path: Path, body: bytes, counts: tuple[int, int]
) -> None:
    path = save(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, *counts) + body)
    check_parses_or_raises_load_error(path)


# --- Split files ------------------------------------------------------------------------------------------------------


def split_part(number: int, count: int, name: str, *, total: int = 3, data: int = 0) -> bytes:
    keys: tuple[bytes, ...] = (
        pair("split.no", U16, struct.pack("<H", number)),
        pair("split.count", U16, struct.pack("<H", count)),
        pair("split.tensors.count", I32, struct.pack("<i", total)),
    )
    if number == 0:
        keys += (pair("general.architecture", STR, string("qwen35")),)
    return build(keys, (tensor(name),), bytes([data]) * 32)


def split_model(folder: Path, **changes: bytes | None) -> list[Path]:
    """Three parts; ``changes`` replaces (or with None removes) a part by the name of its tensor."""
    paths = []
    for number, name in enumerate("abc"):
        paths.append(folder / f"m-0000{number + 1}-of-00003.gguf")
        content = changes.get(name, split_part(number, 3, name, data=number))
        if content is not None:
            paths[-1].write_bytes(content)
    return paths


def test_the_first_part_opens_all_parts(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    with GGUFFile.open(paths[0]) as file:
        assert file.paths == tuple(paths)
        assert file.nbytes == sum(path.stat().st_size for path in paths)
        assert [(info.name, info.part) for info in file.tensors.values()] == [("a", 0), ("b", 1), ("c", 2)]
        assert [int(file.data(name)[0]) for name in "abc"] == [0, 1, 2]
        assert file.metadata["general.architecture"] == "qwen35"
        info = file.tensors["c"]
        assert file.mapping(2)[info.offset : info.offset + info.nbytes] == b"\2" * 32
        assert file.full_digest() == hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
        assert file.describe()["parts"] == 3


def test_parts_written_by_the_gguf_package_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen35", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full(8, index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "m-00001-of-00003.gguf") as file:
        assert len(file.paths) == 3
        assert [file.data(f"t{index}").view(np.float32)[7] for index in range(5)] == [0, 1, 2, 3, 4]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    message = rejection(split_model(tmp_path, b=None)[0])
    assert "m-00002-of-00003.gguf: missing" in message


def test_a_later_part_says_which_file_to_open(tmp_path: Path) -> None:
    for path in split_model(tmp_path)[1:]:
        assert "open m-00001-of-00003.gguf" in rejection(path)


def test_a_renamed_part_says_how_it_must_be_named(tmp_path: Path) -> None:
    first = split_model(tmp_path)[0]
    assert "named ...-00001-of-00003.gguf" in rejection(first.rename(tmp_path / "model.gguf"))
    assert "rename it to m-00001-of-00003.gguf" in rejection(
        (tmp_path / "model.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
    )


@pytest.mark.parametrize(
    ("part", "content", "expected"),
    [
        ("b", split_part(2, 3, "b"), "says that it is part 3 of 3, but part 2 of 3 was expected"),
        ("b", split_part(1, 4, "b"), "says that it is part 2 of 4"),
        ("c", split_part(2, 3, "b"), "'b' is also in part 2"),
        ("a", split_part(0, 3, "a", total=4), "promises 4 tensors and the 3 parts hold 3"),
        ("c", split_part(2, 3, "c")[:-1], "1 bytes are missing"),
        ("c", build(), "says that it is part 1 of 1"),
    ],
)
def test_parts_that_do_not_belong_together_are_rejected(
    tmp_path: Path, part: str, content: bytes, expected: str
) -> None:
    assert expected in rejection(split_model(tmp_path, **{part: content})[0])


# --- Digests, description, speed --------------------------------------------------------------------------------------


def test_full_digest_is_sha256_of_the_file_and_reports_progress(good: Path) -> None:
    seen: list[tuple[int, int]] = []
    with GGUFFile.open(good) as file:
        assert file.full_digest(lambda done, total: seen.append((done, total))) == hashlib.sha256(GOOD).hexdigest()
    assert seen == [(len(GOOD), len(GOOD))]


def test_a_file_that_shrinks_while_open_is_an_error_and_not_a_crash(good: Path) -> None:
    with GGUFFile.open(good) as file:
        os.truncate(good, len(GOOD) - 1)
        for digest in (file.full_digest, file.fingerprint_digest):
            with pytest.raises(LoadError, match="1 bytes are missing: its digest"):
                digest()


def test_fingerprint_sees_metadata_shapes_and_sampled_weights_but_not_the_inside_of_a_tensor(tmp_path: Path) -> None:
    def digest(change: int | None = None, **kwargs: Any) -> str:
        data = bytearray(40_000)
        if change is not None:
            data[change] = 1
        content = build((pair("k", U32, u32(kwargs.get("value", 1))),), (tensor("a", (10_000,)),), bytes(data))
        with GGUFFile.open(save(tmp_path, content, kwargs.get("name", "m.gguf"))) as file:
            return file.fingerprint_digest()

    same = digest()
    assert digest(name="renamed.gguf") == same
    assert digest(value=2) != same
    for seen in (0, 4095, 40_000 - 4096, 39_999):
        assert digest(seen) != same
    for unseen in (4096, 20_000, 40_000 - 4097):
        assert digest(unseen) == same


def test_fingerprint_covers_all_of_small_tensors(tmp_path: Path) -> None:
    digests = set()
    for position in (None, 0, 4095, 4096, 5000, 8191):
        data = bytearray(8192)
        if position is not None:
            data[position] = 1
        with GGUFFile.open(save(tmp_path, build((), (tensor("a", (2048,)),), bytes(data)))) as file:
            digests.add(file.fingerprint_digest())
    assert len(digests) == 6


def test_describe_states_what_the_file_says_as_json(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    path = write(
        tmp_path / "m.gguf",
        {
            "general.name": (kinds.STRING, "Tiny"),
            "qwen35.block_count": (kinds.UINT32, 8),
            "qwen35.embedding_length": (kinds.UINT32, 256),
            "qwen35.attention.head_count": (kinds.UINT32, 4),
            "qwen35.attention.head_count_kv": [0, 0, 0, 2],
            "qwen35.context_length": (kinds.UINT32, 4096),
            "tokenizer.ggml.model": (kinds.STRING, "gpt2"),
            "tokenizer.ggml.pre": (kinds.STRING, "qwen35"),
            "tokenizer.ggml.tokens": [f"t{index}" for index in range(64)],
            "tokenizer.chat_template": (kinds.STRING, "{{ messages }}"),
        },
        {
            "token_embd.weight": (np.zeros((64, 144), np.uint8), gguf.GGMLQuantizationType.Q4_K),
            "output_norm.weight": (np.zeros(256, np.float32), None),
        },
    )
    with GGUFFile.open(path) as file:
        described = file.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "architecture": "qwen35",
        "name": "Tiny",
        "parameters": 64 * 256 + 256,
        "bytes": path.stat().st_size,
        "parts": 1,
        "tensors": 2,
        "types": {
            "Q4_K": {"tensors": 1, "parameters": 64 * 256, "bytes": 64 * 144},
            "F32": {"tensors": 1, "parameters": 256, "bytes": 1024},
        },
        "quantisation": "Q4_K 90%, F32 10%, 4.92 bits per weight",
        "layers": 8,
        "hidden": 256,
        "heads": 4,
        "kv_heads": [0, 0, 0, 2],
        "context": 4096,
        "tokenizer": {"model": "gpt2", "pre": "qwen35", "vocab_size": 64},
        "has_chat_template": True,
    }


def test_a_real_vocabulary_opens_fast_and_decodes_on_demand(tmp_path: Path) -> None:
    """248,320 tokens and 247,587 merges must not take 1 s together; the bound leaves a factor 5 for busy machines."""
    tokens = [f"Ġtoken{index}" for index in range(248_320)]
    merges = [f"Ġ{index} n{index}" for index in range(247_587)]
    content = build(
        (
            pair("tokenizer.ggml.tokens", ARR, array(STR, len(tokens), b"".join(map(string, tokens)))),
            pair("tokenizer.ggml.token_type", ARR, array(I32, len(tokens), bytes(4 * len(tokens)))),
            pair("tokenizer.ggml.merges", ARR, array(STR, len(merges), b"".join(map(string, merges)))),
        )
    )
    path = save(tmp_path, content)
    start = time.perf_counter()
    with GGUFFile.open(path) as file:
        opened = time.perf_counter()
        assert file.metadata.count("tokenizer.ggml.tokens") == len(tokens)
        read_tokens, read_merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
        decoded = time.perf_counter()
        assert (read_tokens, read_merges) == (tokens, merges)
        assert len(file.metadata["tokenizer.ggml.token_type"]) == len(tokens)
    print(f"open {opened - start:.3f} s, decode {decoded - opened:.3f} s")
    assert decoded - start < 5.0
