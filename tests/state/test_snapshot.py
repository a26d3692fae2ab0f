"""A snapshot's file is written whole or not at all, and is believed only if every byte of it is as it was written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from pydflash import Snapshot
from pydflash.errors import LoadError, WriteError
from pydflash.models import Model
from pydflash.runtime import Session
from pydflash.state import FORMAT, DeltaSpec, Fingerprint

Load = Callable[..., Model]

REFUSALS = "is not a snapshot|is truncated or damaged|has format"


@pytest.fixture(scope="module")
def snapshot(model_of: Load) -> Snapshot:
    with Session(model_of("equal"), 64, "q4_0", "q8_0") as session:
        session.forward([5, 6, 7], "none")
        session.commit(2)
        return session.snapshot()


@pytest.fixture
def path(snapshot: Snapshot, tmp_path: Path) -> Path:
    snapshot.save(tmp_path / "prefix.snapshot")
    return tmp_path / "prefix.snapshot"


def refused(path: Path, words: str) -> None:
    with pytest.raises(LoadError, match=words) as caught:
        Snapshot.load(path)
    assert str(caught.value).startswith(f"{path}: ")


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_file_holds_the_snapshot(snapshot: Snapshot, path: Path) -> None:
    loaded = Snapshot.load(path)
    for name in ("fingerprint", "sequence", "length", "replay"):
        assert getattr(loaded, name) == getattr(snapshot, name)
    assert list(loaded.arrays) == list(snapshot.arrays)
    for name, values in snapshot.arrays.items():
        assert np.array_equal(loaded.arrays[name], values)
        assert not loaded.arrays[name].flags.writeable


def test_the_file_is_a_safetensors_file(snapshot: Snapshot, path: Path) -> None:
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(snapshot.arrays)
        for name, values in snapshot.arrays.items():
            assert np.array_equal(file.get_tensor(name), values)
        assert json.loads(file.metadata()["pydflash.snapshot"])["length"] == 2


def test_an_empty_session_can_be_kept_in_a_file(model_of: Load, tmp_path: Path) -> None:
    with Session(model_of("equal"), 64) as session:
        session.snapshot().save(tmp_path / "empty")
        wanted = session.forward([1, 2]).logits
        session.commit(2)
        session.restore(Snapshot.load(tmp_path / "empty"))
        assert session.length == 0
        assert np.array_equal(session.forward([1, 2]).logits, wanted)


def test_only_the_owner_reads_the_file(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    snapshot: Snapshot, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        snapshot.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_symlink_is_followed_and_a_device_is_left_alone(snapshot: Snapshot, path: Path) -> None:
    link = path.with_name("latest")
    link.symlink_to(path.name)
    path.write_bytes(b"old")
    snapshot.save(link)
    assert link.is_symlink()
    assert Snapshot.load(path).length == 2
    master, device = os.openpty()  # a device in a folder where not even root makes files, should this test fail
    try:
        with pytest.raises(WriteError, match="is no regular file"):
            snapshot.save(os.ttyname(device))
        assert stat.S_ISCHR(os.stat(os.ttyname(device)).st_mode)
    finally:
        os.close(master)
        os.close(device)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_any_flipped_byte_is_refused(path: Path) -> None:
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = [*range(header), *np.random.default_rng(1).integers(header, len(content), 200).tolist(), len(content) - 1]
    rng = np.random.default_rng(2)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        refused(path, REFUSALS)
    path.write_bytes(content)
    assert Snapshot.load(path).length == 2


def test_any_other_length_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for count in [*range(0, 40), *range(40, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:count])
        refused(path, "is not a snapshot, found|truncated or damaged, it has [0-9,]+ bytes and its header requires")
    path.write_bytes(content + b"\0")
    refused(path, rf"it has {len(content) + 1:,} bytes and its header requires {len(content):,}")


def test_other_kinds_of_files_are_refused(model_of: Load, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist; check its spelling")
    refused(tmp_path, "is not a regular file")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "is not a snapshot, found 0 bytes")
    (tmp_path / "text").write_text("a text that is longer than eight bytes\n" * 100)
    refused(tmp_path / "text", "is not a snapshot")
    (tmp_path / "model.gguf").write_bytes(model_of("equal").path.read_bytes()[:10_000])
    refused(tmp_path / "model.gguf", "is not a snapshot, found a GGUF file; give a file that Snapshot.save wrote")
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "other.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abcd")
    refused(tmp_path / "other.safetensors", "is not a snapshot or is damaged: its header lacks a snapshot's metadata")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000, b'{"__metadata__":' * 10_000, b"null", b"[]", b'{"__metadata__":7}', b"\xff\xfe{}", b"9" * 9000,
        b'{"__metadata__":{"pydflash.snapshot":1,"sha256":2}}',
        b'{"__metadata__":{"pydflash.snapshot":"{}","sha256":""}}',
    ],
    ids=lambda header: header[:40].decode("latin-1"),
)  # fmt: skip
def test_headers_made_to_hurt_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    refused(path, REFUSALS)


@pytest.mark.parametrize("size", [0, 1, 101, 1 << 20, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_header_of_an_impossible_size_is_refused_unread(tmp_path: Path, size: int) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(struct.pack("<Q", size) + b"{}" + b" " * 98)
    refused(path, "is not a snapshot, found 108 bytes without a header of a valid size")


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, statement and data of a file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["pydflash.snapshot"]), content[8 + length :]


def spelled(header: dict[str, Any], statement: dict[str, Any], data: bytes) -> bytes:
    """A file of these with a right checksum."""
    text = json.dumps(statement, separators=(",", ":"))
    digest = hashlib.sha256(text.encode() + data).hexdigest()
    metadata = {"__metadata__": {"pydflash.snapshot": text, "sha256": digest}}
    head = json.dumps(header | metadata, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + data


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the statement of a file, and make its checksum right again."""
    header, statement, data = parts(path)
    change(statement)
    path.write_bytes(spelled(header, statement, data))


def test_a_forgery_that_changes_nothing_is_read(path: Path) -> None:
    """The helper is right, so that the refusals below are for what was changed."""
    before = path.read_bytes()
    forge(path, lambda statement: None)
    assert path.read_bytes() == before
    forge(path, lambda statement: statement.update(sequence="a"))
    assert Snapshot.load(path).sequence == "a"


def delta(statement: dict[str, Any]) -> dict[str, Any]:
    """What the statement says of the first layer, a delta-net layer."""
    layer: dict[str, Any] = statement["fingerprint"]["layers"][0]
    assert layer["kind"] == "delta"
    return layer


def attention(statement: dict[str, Any]) -> dict[str, Any]:
    """What the statement says of the last layer, an attention layer."""
    layer: dict[str, Any] = statement["fingerprint"]["layers"][-1]
    assert layer["kind"] == "attention"
    return layer


@pytest.mark.parametrize("found", [1, 2, 0, -3, "3", 2.5, None, [3]], ids=repr)
def test_a_file_of_another_format_is_refused_with_both_numbers(path: Path, found: Any) -> None:
    forge(path, lambda statement: statement["fingerprint"].update(format=found))
    refused(path, rf"has format {re.escape(repr(found))}, this version reads 3; take the snapshot again")


def test_the_arrays_lie_layer_by_layer(path: Path) -> None:
    header, statement, data = parts(path)
    names = [f"{part}.{i}" for i in range(3) for part in ("state", "window")] + ["k.3", "v.3"]
    assert [name for name in header if name != "__metadata__"] == names
    assert statement["fingerprint"]["format"] == FORMAT == 3
    assert [layer["kind"] for layer in statement["fingerprint"]["layers"]] == ["delta"] * 3 + ["attention"]
    ends = [header[name]["data_offsets"] for name in names]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == len(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(length=3), "its arrays are not those that its fingerprint requires"),
        (lambda s: s.update(length=(1 << 31) - 1), "metadata are not those of a snapshot"),
        (lambda s: s.update(length=1 << 24), "its arrays are not those"),
        (lambda s: s.update(length=-1), "metadata are not those"),
        (lambda s: s.update(length=2.0), "metadata are not those"),
        (lambda s: s.update(length=True), "metadata are not those"),
        (lambda s: s.update(length="2"), "metadata are not those"),
        (lambda s: s.update(length=10**4000), "metadata are not those"),
        (lambda s: s.update(replay=3), "2 positions with 3 rows to replay"),
        (lambda s: s.update(replay=0), "its arrays are not those"),
        (lambda s: s.update(replay=17, length=40), "40 positions with 17 rows to replay"),
        (lambda s: s.update(sequence=7), "metadata are not those"),
        (lambda s: s.pop("replay"), "metadata are not those"),
        (lambda s: s.update(fingerprint=[]), "metadata are not those"),
        (lambda s: s["fingerprint"].pop("model"), "metadata are not those"),
        (lambda s: s["fingerprint"].pop("layers"), "metadata are not those"),
        (lambda s: s["fingerprint"].update(draft=None), "metadata are not those"),
        (lambda s: s["fingerprint"].update(taps=[0, "1"]), "metadata are not those"),
        (lambda s: s["fingerprint"].update(taps=7), "metadata are not those"),
        (lambda s: s["fingerprint"].update(layers=7), "metadata are not those"),
        (lambda s: s["fingerprint"].update(layers=[7]), "metadata are not those"),
        (lambda s: s["fingerprint"].update(layers={}), "its arrays are not those"),
        (lambda s: s["fingerprint"]["layers"].reverse(), "its arrays are not those"),
        (lambda s: s["fingerprint"]["layers"].pop(), "its arrays are not those"),
        (lambda s: s["fingerprint"]["layers"].append(s["fingerprint"]["layers"][0]), "its arrays are not those"),
        (lambda s: delta(s).update(kind="mamba"), "metadata are not those"),
        (lambda s: delta(s).update(kind=[]), "metadata are not those"),
        (lambda s: delta(s).update(kind="attention"), "metadata are not those"),
        (lambda s: delta(s).update(kind="ring"), "metadata are not those"),
        (lambda s: delta(s).pop("kind"), "metadata are not those"),
        (lambda s: delta(s).pop("v_heads"), "metadata are not those"),
        (lambda s: delta(s).update(v_heads=True), "metadata are not those"),
        (lambda s: delta(s).update(state_size=33), "its arrays are not those"),
        (lambda s: delta(s).update(state_size=1 << 31), "metadata are not those"),
        (lambda s: attention(s).update(cache_k="q9_9"), "metadata are not those"),
        (lambda s: attention(s).update(cache_k="f32"), "its arrays are not those"),
        (lambda s: attention(s).update(head_size=33), "metadata are not those"),
        (lambda s: attention(s).update(head_size=1 << 30, kv_heads=1 << 30), "its arrays are not those"),
        (lambda s: attention(s)["rope"].update(base=10), "metadata are not those"),
        (lambda s: attention(s)["rope"].update(low=-1), "metadata are not those"),
        (lambda s: attention(s)["rope"].pop("factor"), "metadata are not those"),
        (lambda s: attention(s).update(rope=None), "metadata are not those"),
        (lambda s: attention(s).update(rope=[1, 2.0]), "metadata are not those"),
    ],
)
def test_a_statement_that_lies_is_refused(path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    forge(path, change)
    refused(path, words)


@pytest.mark.parametrize(
    "layers",
    [
        (DeltaSpec(1, 1, 32, conv_kernel=0), DeltaSpec(1, 1, 32, conv_kernel=2)),  # together, no byte is missing
        (DeltaSpec(1, 0, state_size=2**31 - 1, conv_kernel=1),),
    ],
    ids=["a negative size", "a size that is none, but for its product"],
)
def test_sizes_that_no_array_has_are_refused(path: Path, layers: tuple[DeltaSpec, ...]) -> None:
    fingerprint = Fingerprint(FORMAT, "model", "", (), layers)
    statement = {"sequence": "", "length": 0, "replay": 0, "fingerprint": fingerprint.as_json()}
    header: dict[str, Any] = {"__metadata__": {}}
    end = 0
    for name, (shape, dtype) in fingerprint.layout(0, 0).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    path.write_bytes(spelled(header, statement, bytes(end)))
    refused(path, "its arrays cannot be made")


def test_text_that_is_no_text_is_refused(path: Path) -> None:
    header, statement, data = parts(path)
    statement["sequence"] = "\ud800"  # half a character, which JSON can spell and UTF-8 cannot
    header["__metadata__"] = {"pydflash.snapshot": json.dumps(statement, separators=(",", ":")), "sha256": "0" * 64}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    refused(path, REFUSALS)


def test_a_file_larger_than_the_memory_is_refused_before_memory_is_taken(path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _, statement, _ = parts(path)
    rows, k_width, v_width = 1 << 24, 72, 136
    layers = list(range(memory // (rows * k_width) + 1))
    statement |= {"length": rows}
    statement["fingerprint"]["layers"] = [attention(statement)] * len(layers)
    header: dict[str, Any] = {"__metadata__": {}}
    end = 0
    for layer in layers:
        for side, width in (("k", k_width), ("v", v_width)):
            start, end = end, end + rows * width
            header[f"{side}.{layer}"] = {"dtype": "U8", "shape": [rows, width], "data_offsets": [start, end]}
    path.write_bytes(spelled(header, statement, b""))
    os.truncate(path, path.stat().st_size + end)  # a sparse file: no disk is taken
    refused(path, "this machine has [0-9,]+ bytes of memory")
    path.unlink()
