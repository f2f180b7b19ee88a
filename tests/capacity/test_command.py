# SPDX-License-Identifier: Apache-2.0
"""`kvcompress plan` as typed: memory is what is left, the table's notes, and bad input."""

import json

import pytest

from vllm_kvcompress.cli import main
from vllm_kvcompress.formats import format_names

GIB = 1 << 30


def figures(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_left(capsys, llama):
    """GPU memory times utilisation, less the weights of a GPU, less the reserve; the rest as with that KV memory."""
    found = figures(capsys, llama, "--gpu-memory", "40GiB", "--weights", "16GiB", "--tp", 4, "--reserve", "2GiB")
    left = int(40 * GIB * 0.92) - 4 * GIB - 2 * GIB
    assert found["memory"]["kv_cache"] == left
    assert found["max_model_len"] == 131072 and found["windows"] == [64, 256]
    exact = figures(capsys, llama, "--kv-cache-memory-bytes", left, "--tp", 4)
    assert exact["formats"] == found["formats"] and exact["memory"] == {"kv_cache": left}


def test_windows(capsys, tmp_path, llama, monkeypatch):
    """Flags, else the environment, else the recipe of the model's name; as when serving."""
    named = tmp_path / "Qwen3-8B"
    named.symlink_to(llama)
    memory = ("--kv-cache-memory-bytes", "1GiB", "--formats", "int2")
    assert figures(capsys, named, *memory)["windows"] == [128, 2048]
    assert figures(capsys, named, *memory, "--recent", 0)["windows"] == [128, 0]
    monkeypatch.setenv("VLLM_KVCOMPRESS_SINK_TOKENS", "32")
    assert figures(capsys, named, *memory, "--recent", 0)["windows"] == [32, 0]
    assert figures(capsys, named, *memory, "--sinks", 0, "--recent", 0)["windows"] == [0, 0]


def test_devices(capsys, llama):
    memory = ("--kv-cache-memory-bytes", "1GiB", "--formats", "auto,int2")
    for arguments, sizes in ((), [16, 128]), (("--device", "cpu"), [128, 128]), (("--block-size", 256), [256, 256]):
        found = figures(capsys, llama, *memory, *arguments)
        assert [row["block_size"] for row in found["formats"]] == sizes


def test_table(capsys, llama):
    assert main(["plan", str(llama), "--gpu-memory", "80GiB", "--weights", "16GiB", "--tp", "16"]) == 0
    out, err = capsys.readouterr()
    assert "8 KV heads (1 on each of 16 GPUs) of size 128, bfloat16, at most 131,072 tokens" in out
    assert "80.00 GiB x 0.92 - 1.00 GiB weights - 3.00 GiB reserve = 69.60 GiB [1]" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.endswith("x")}
    assert list(rows) == ["auto", "fp8", *format_names()]
    assert rows["auto"][1:3] == ["(bfloat16)", "2,048"] and rows["auto"][-1] == "1.00x"
    # 4 layers, one head of size 128: 74 bytes a token in this format, the fp8 half of 2,048.
    assert rows["fp8"][1] == "1,024" and rows["fp8"][-1] == "2.00x" and rows["hadamard-int2"][1] == "296"
    assert "[1] An estimate" in out and "first 64, last 256" in out
    assert "WARNING" not in out and "INFO" not in out + err  # vLLM's log is about an engine


def test_what_does_not_fit(capsys, llama):
    """Too little for the planned length is said, with what fits; so is too little for anything."""
    arguments = ("plan", str(llama), "--kv-cache-memory-bytes")
    assert main([*arguments, "64MiB", "--max-model-len", "8192", "--formats", "auto,hadamard-int2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 64 MiB hold 256 blocks of 16 tokens x 16 KiB, and one of them is the null block.
    assert "auto: does not start with --max-model-len 8192, at most 4080 fit" in lines
    assert not any(line.startswith("hadamard-int2:") for line in lines)
    assert main([*arguments, "1000", "--formats", "auto"]) == 0
    assert "auto: Cannot" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--gpu-memory", "16GiB", "--weights", "14GiB"], ["14.00 GiB", "3.00 GiB", "16.00 GiB", "--tp"]),
        (["--gpu-memory", "80GiB"], ["--weights"]),
        (["--gpu-memory", "80GiB", "--max-model-len", "131073"], ["131073", "131072"]),
        (["--gpu-memory", "80GiB", "--max-model-len", "0"], ["--max-model-len", "got 0"]),
        (["--gpu-memory", "80GiB", "--tp", "0"], ["--tp", "got 0"]),
        (["--gpu-memory", "80GiB", "--gpu-memory-utilization", "92"], ["--gpu-memory-utilization", "92"]),
        (["--gpu-memory", "80GiB", "--block-size", "16"], ["multiple of 128", "oscar-int2", "got 16"]),
        (["--gpu-memory", "80GiB", "--device", "cpu"], ["--kv-cache-memory-bytes"]),
        (["--gpu-memory", "80GiB", "--sinks", "-1"], ["sink_tokens=-1"]),
    ],
)
def test_refusals(capsys, llama, arguments, words):
    assert main(["plan", str(llama), *arguments]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--gpu-memory", "80XB"], ["'80XB'", "80GiB"]),
        (["--gpu-memory", "1g", "--formats", "auto,int3"], ["'int3'", "hadamard-int2"]),
        (["--gpu-memory", "1g", "--kv-cache-memory-bytes", "1g"], ["--gpu-memory"]),
        ([], ["--gpu-memory"]),
    ],
)
def test_usage(capsys, llama, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(llama), *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
