# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else made: what is wrong with them is said in words, within bounds of time and memory."""

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_kvcompress.cli import main
from vllm_kvcompress.errors import KVCompressError, RotationError
from vllm_kvcompress.rotations import model_fingerprint, read_metadata, read_rotation, read_zoo, write_rotation

pytestmark = [pytest.mark.filterwarnings("ignore:Sparse CSR"), pytest.mark.filterwarnings("ignore:torch.quantize")]
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
HEADS, DIM = 2, 8
# Numbers that overflow something, texts that are none, names that lead elsewhere.
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**4000, True, 0.5, math.nan, math.inf]),
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["../../etc/passwd", "/dev/zero", "\ud800", "\x1b[2J", "9" * 5000])
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
DEEP = "[" * 100_000


def refused_or_read(read, *args, **kwargs):
    """What was read, None where it was refused in a message that fits a terminal."""
    try:
        return read(*args, **kwargs)
    except KVCompressError as error:
        assert 10 < len(str(error)) < 2000 and str(error).replace("\n", "").isprintable()
        return None


# --- rotation files ---------------------------------------------------------------------------------------------------


def parts(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def assemble(header: object, payload: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


@FUZZ
@given(data=st.data())
def test_headers(make_set, data):
    """A valid file, of whose header one entry is another: of a tensor, of the strings, or of the metadata in them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.safetensors"
        write_rotation(path, make_set())
        header, payload = parts(path)
        name = data.draw(st.sampled_from(sorted(header)))
        length = None
        match data.draw(st.sampled_from(["entry", "tensor", "rename", "strings", "metadata", "length", "payload"])):
            case "entry":
                header[name] = data.draw(JSON)
            case "tensor":
                key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
                kinds = {
                    "dtype": st.sampled_from(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "x", ""]),
                    "shape": st.lists(NUMBERS, max_size=5),
                    "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
                }
                header["k_mean"][key] = data.draw(st.one_of(kinds[key], JSON))
            case "rename":
                header[data.draw(TEXTS)] = header.pop(name)
            case "strings":
                header["__metadata__"][data.draw(st.sampled_from(["format", "metadata", "sha256"]))] = data.draw(JSON)
            case "metadata":
                metadata = json.loads(header["__metadata__"]["metadata"])
                metadata[data.draw(st.sampled_from([*metadata, "surprise"]))] = data.draw(JSON)
                text = json.dumps(metadata)
                # Whoever forges a file can sum it up too.
                names = ("k_rotation", "v_rotation", "k_mean", "k_clip", "v_clip")
                spans = [header[one]["data_offsets"] for one in names]
                summed = hashlib.sha256(text.encode() + b"".join(payload[a:b] for a, b in spans)).hexdigest()
                header["__metadata__"] |= {"metadata": text, "sha256": summed}
            case "length":
                length = data.draw(st.one_of(st.integers(0, 4096), st.integers(0, 2**64 - 1)))
            case "payload":
                payload = data.draw(st.sampled_from([b"", payload[:-4], payload + b"\0" * 4, payload * 2]))
        path.write_bytes(assemble(header, payload, length))
        found = refused_or_read(read_rotation, path)
        refused_or_read(read_metadata, path)
        if found is not None:  # then it is one that could have been written
            again = Path(folder) / "again.safetensors"
            write_rotation(again, found)
            assert read_rotation(again).metadata == found.metadata
            assert main(["inspect", str(path)]) == 0


@pytest.mark.parametrize("where", ["header", "strings", "metadata", "version", "digits"])
def test_deep_and_long_json(make_set, tmp_path, where):
    path = tmp_path / "r.safetensors"
    write_rotation(path, make_set())
    header, payload = parts(path)
    metadata = header["__metadata__"]["metadata"]
    forged = {
        "header": DEEP,
        "strings": json.dumps(header).replace(json.dumps(header["__metadata__"]), DEEP),
        "metadata": json.dumps(header).replace(json.dumps(metadata), json.dumps(DEEP)),
        "version": json.dumps(header).replace(
            '\\"schema_version\\":1', '\\"schema_version\\":' + "[" * 900 + "]" * 900
        ),
        "digits": json.dumps(header).replace('\\"seed\\":0', '\\"seed\\":' + "9" * 5000),
    }[where]
    assert forged != json.dumps(header)
    path.write_bytes(assemble(forged, payload))
    for read in (read_rotation, read_metadata):
        with pytest.raises(RotationError, match="kvcompress calibrate"):
            read(path)


def test_a_file_of_nothing_but_size_is_not_read(make_set, tmp_path):
    """Sparse files of 128 GiB: the header asks for them, or says nothing of them."""
    path = tmp_path / "r.safetensors"
    rotation = make_set()
    write_rotation(path, rotation)
    header, payload = parts(path)
    whole = path.read_bytes()
    many = {**rotation.metadata.model_dump(), "layer_ids": list(range(256)), "num_kv_heads": 128, "head_dim": 512}
    many |= {"sensitivity": [], "k_channels": [], "v_channels": []}
    header["__metadata__"]["metadata"] = json.dumps(many)
    for content in (whole, assemble(header, payload)):
        path.write_bytes(content)
        os.truncate(path, 128 << 30)
        with pytest.raises(RotationError, match="is no rotation file: 137438953472 bytes"):
            read_rotation(path)


@pytest.mark.parametrize("command", [["inspect", "FIFO"], ["import-zoo", "FIFO", "FIFO", "--model", "MODEL"]])
def test_pipes_are_not_waited_for(tmp_path, command, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    places = {"FIFO": str(tmp_path / "fifo"), "MODEL": str(tmp_path)}
    assert main([places.get(word, word) for word in command]) == 2
    assert f"{tmp_path / 'fifo'} is " in capsys.readouterr().err


def test_escape_sequences_do_not_reach_the_terminal(make_set, tmp_path, capsys):
    path = tmp_path / "r.safetensors"
    write_rotation(path, make_set(model="\x1b]0;mine\x07tiny", recipe={"\x1b[2J": "\x07"}))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "tiny" in out and out.replace("\n", "").isprintable()


# --- RotationZoo ------------------------------------------------------------------------------------------------------


def rotations_() -> st.SearchStrategy:
    eye = torch.eye(DIM)
    good = [eye, eye.expand(HEADS, DIM, DIM), eye.double(), eye.bfloat16(), eye.flip(0), torch.nn.Parameter(eye)]
    bad = [
        eye * math.nan, eye * 2, eye.to_sparse(), eye.int(), eye.to(torch.complex64), eye[:4], eye.reshape(-1),
        eye.bool(), torch.zeros(()), torch.zeros(0, DIM, DIM), torch.zeros(1).expand(HEADS, 1 << 20, 1 << 20),
        eye.to_sparse_csr(), torch.eye(DIM, device="meta"), torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8),
        eye.to(torch.float8_e4m3fn),
    ]  # fmt: skip
    return st.one_of(st.sampled_from(good), st.sampled_from(bad), JSON)


KEYS = st.one_of(
    NUMBERS, TEXTS, st.none(), st.tuples(st.integers()), st.sampled_from(["0", "1", "٣", "-1", " 1", "1_0"])
)


@st.composite
def zoos(draw) -> object:
    layers = {0: {"rotation": torch.eye(DIM)}, 1: {"rotation": torch.eye(DIM), "k_mean": torch.zeros(DIM)}}
    content = {"format_version": 1, "objective": "o", "source_grouping": "layer", "layers": layers}
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(["field", "key", "rotation", "mean", "other", "whole"])):
            case "field":
                content[draw(st.sampled_from(["format_version", "objective", "layers"]))] = draw(
                    st.one_of(JSON, rotations_())
                )
            case "key":
                layers[draw(KEYS)] = {"rotation": draw(rotations_())}
            case "rotation":
                layers[draw(st.sampled_from([0, 1]))]["rotation"] = draw(rotations_())
            case "mean":
                layers[0]["k_mean"] = draw(st.one_of(rotations_(), st.just(torch.zeros(HEADS, DIM))))
            case "other":
                layers[0][draw(st.sampled_from(["q_rotation", "o_rotation", "layer_id"]))] = draw(JSON)
            case "whole":
                return draw(JSON)
    return content


@FUZZ
@given(content=zoos(), legacy=st.booleans(), which=st.sampled_from(["keys", "values", "both"]))
@example(content={"objective": "\ud800" * 600, "layers": {0: {"rotation": torch.eye(DIM)}}}, legacy=False, which="both")
def test_zoo_contents(content, legacy, which):
    """Whatever pickle without code can say; what is accepted can be written and read."""
    with tempfile.TemporaryDirectory() as folder:
        # A file name that is no text
        good, odd = Path(folder) / "good.pt", Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b.pt"))
        torch.save({"layers": {i: {"rotation": torch.eye(DIM)} for i in (0, 1)}}, good)
        torch.save(content, odd, _use_new_zipfile_serialization=not legacy)
        k, v = {"keys": (odd, good), "values": (good, odd), "both": (odd, odd)}[which]
        found = refused_or_read(read_zoo, k, v, num_kv_heads=HEADS, num_query_heads=HEADS, head_dim=DIM)
        if found is not None:
            path = Path(folder) / "r.safetensors"
            write_rotation(path, found)
            assert read_rotation(path).metadata == found.metadata


@FUZZ
@given(data=st.data(), legacy=st.booleans())
def test_zoo_bytes(data, legacy):
    """A valid file of which a piece is missing, twice there, or another."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.pt"
        torch.save({"layers": {0: {"rotation": torch.eye(DIM)}}}, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(at, min(len(whole), at + 64)))
        piece = data.draw(st.one_of(st.binary(max_size=16), st.just(whole[at:end] * 2)))
        path.write_bytes(whole[:at] + piece + whole[end:])
        refused_or_read(read_zoo, path, path, num_kv_heads=HEADS, num_query_heads=HEADS, head_dim=DIM)


class Touch:
    """Pickled, it says to make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["whole", "layer", "key", "plain pickle"])
def test_no_pickled_code_runs_wherever_it_is(tmp_path, place, legacy):
    code, path = Touch(tmp_path / "ran"), tmp_path / "k.pt"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(code))
    else:
        layers = {0: {"rotation": code if place == "layer" else torch.eye(DIM)}}
        content = code if place == "whole" else {"layers": layers | ({code: 1} if place == "key" else {})}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RotationError, match=r"could run code|not a readable"):
        read_zoo(path, path, num_kv_heads=HEADS, num_query_heads=HEADS, head_dim=DIM)
    assert not (tmp_path / "ran").exists()


def test_a_zip_that_unpacks_to_much_more_is_not_unpacked(tmp_path):
    path = tmp_path / "k.pt"
    torch.save({"layers": {0: {"rotation": torch.eye(DIM)}}}, path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("k/bomb", "w", force_zip64=True) as file,
    ):
        for _ in range(5):
            file.write(bytes(1 << 20))
    content = bytearray(path.read_bytes())
    # What the directory says of its size decides: 5 MiB here, written as 5 GiB without taking the time to pack them.
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(RotationError, match="bytes, at most 4294967296 are read"):
        read_zoo(path, path, num_kv_heads=HEADS, num_query_heads=HEADS, head_dim=DIM)


# --- what a model's folder says ---------------------------------------------------------------------------------------


@FUZZ
@given(config=JSON, index=JSON, holder=TEXTS, header=JSON, offsets=st.lists(NUMBERS, max_size=3))
@example(config={}, index=None, holder="../outside.safetensors", header={}, offsets=[])
@example(
    config={}, index={"metadata": {"total_size": math.inf}}, holder="model.safetensors", header={}, offsets=[-9, -9]
)
def test_model_folders(config, index, holder, header, offsets):
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "model"
        folder.mkdir()
        save_file({"w": torch.zeros(8)}, Path(outer) / "outside.safetensors")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        table = index if isinstance(index, dict) else {}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": holder}, **table}))
        header = {"w": {"data_offsets": offsets}} if header == {} else header
        (folder / "model.safetensors").write_bytes(assemble(header, bytes(64)))
        found = refused_or_read(model_fingerprint, folder)
        if found is not None:
            assert len(found) == 32 and ".." not in Path(holder).parts


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_model_folders_with_deep_json(tmp_path, name):
    save_file({"w": torch.zeros(8)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(RotationError, match="cannot be read"):
        model_fingerprint(tmp_path)


# --- guided by coverage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["rotation", "zoo"])
def test_ten_seconds_guided_by_coverage(tmp_path, target):
    pytest.importorskip("atheris", reason="atheris is not installed; it has wheels for Linux on x86-64")
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(script), target, str(tmp_path), "-max_total_time=10", "-timeout=20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
