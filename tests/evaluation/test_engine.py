# SPDX-License-Identifier: Apache-2.0
"""Real engines on a tiny random Llama: noise of auto against auto, agreement with transformers, the whole command."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_kvcompress.cli import main
from vllm_kvcompress.evaluation.engine import Job, engine_arguments
from vllm_kvcompress.evaluation.launch import EngineFailure, run_engine
from vllm_kvcompress.evaluation.prompts import Prompt

START, CONTEXT = 96, 257


def job(folder, model, feed, reference=None, kv_cache_dtype="auto"):
    return Job(
        folder=folder,
        reference_folder=reference,
        feed=feed,
        engine_args=engine_arguments(
            str(model),
            kv_cache_dtype=kv_cache_dtype,
            additional_config={},
            feed=feed,
            max_model_len=CONTEXT,
            kv_bytes=64 << 20,
            dtype="auto",
            head_dtype="float32",
            seed=0,
            extra={},
        ),
    )


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return [Prompt(rng.integers(3, 303, CONTEXT).tolist(), START, CONTEXT - 1) for _ in range(2)]


def test_auto_against_auto(tmp_path, tiny_model, prompts):
    """The recorder scores what transformers scores, and the instrument's own noise is far below any figure reported."""
    reference = run_engine(job(tmp_path / "0", tiny_model, 64), prompts, "auto", tmp_path / "0.log")
    assert reference.summary.largest_step == 64
    assert reference.kl is None
    again = run_engine(job(tmp_path / "1", tiny_model, 32, tmp_path / "0"), prompts, "auto", tmp_path / "1.log")
    assert again.summary.largest_step == 32
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            log_p = model(torch.tensor([prompt.tokens])).logits[0, START:-1].log_softmax(-1)
        expected = log_p.gather(-1, torch.tensor(prompt.tokens[START + 1 :]).unsqueeze(-1)).squeeze(-1).numpy()
        # bf16 keeps 8 bits: logits of size ~10 come out within a few percent of a float32 model's, and unbiased.
        # A row scored against the wrong token or position would be off by whole nats.
        difference = reference.logprob[index] - expected
        assert np.abs(difference).max() < 0.25
        assert abs(difference.mean()) < 0.02
        # Half the step changes the order of sums in bf16 and nothing else. KL is about half the variance of the logits'
        # differences, some 1e-5 with bf16's relative steps of 2^-8; 2-bit pages cost a thousand times more.
        print("noise of auto against auto, nat:", again.kl[index].mean())
        assert 0 <= again.kl[index].mean() < 1e-3
        assert again.agree[index].mean() > 0.95


def test_an_engine_that_refuses_says_why(tmp_path, tiny_model, prompts):
    broken = job(tmp_path / "0", tiny_model, 64, kv_cache_dtype="oscar-int2")
    broken.engine_args["additional_config"] = {"kvcompress": {"rotation": str(tmp_path / "none.safetensors")}}
    with pytest.raises(EngineFailure, match=r"none\.safetensors"):
        run_engine(broken, prompts, "oscar-int2", tmp_path / "0.log")


def evaluate(out, model, *arguments, status=0):
    """eval.json of `kvcompress eval`, for int2 unless the arguments say otherwise, on made-up text."""
    rng = np.random.default_rng(6)
    data = out.parent / "text.txt"
    data.write_text("\n".join(" ".join(f"w{word}" for word in rng.integers(0, 300, 12)) for _ in range(300)))
    base = ["eval", str(model), "--formats", "int2", "--data", str(data), "--sinks", "16", "--recent", "64"]
    assert main([*base, "--recall-sentences", "1", "--out", str(out), *arguments]) == status
    return json.loads((out / "eval.json").read_text())


@pytest.fixture(scope="module")
def one_context(tmp_path_factory, tiny_model):
    out = tmp_path_factory.mktemp("one") / "out"
    return evaluate(out, tiny_model, "--chunks", "2", "--context", "256", "--recall-depths", "2"), out


def test_the_command(one_context):
    report, out = one_context
    auto, int2 = report["formats"]
    assert report["settings"]["first_position"] == 80
    assert (auto["format"], int2["format"]) == ("auto", "int2")
    assert auto["text"]["kl"]["value"] == 0
    assert auto["text"]["positions"] == int2["text"]["positions"] == 2 * (255 - 80)
    # History past the windows is read at 2 bits, and it shows: far above the noise bound of the test above.
    assert int2["text"]["kl"]["value"] > 1e-3
    assert int2["engine"]["largest_step"] == 64
    assert [len(row["recall"]) for row in report["formats"]] == [2, 2]
    assert int2["additional_config"] == {"kvcompress": {"sink_tokens": 16, "recent_tokens": 64}}
    pytest.importorskip("matplotlib")
    assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_engines_at_once(tmp_path, tiny_model, one_context):
    """The figures are those of engines that ran one after the other; an engine that refuses costs only its row."""
    sizes = ["--chunks", "2", "--context", "256", "--recall-depths", "2"]
    # No rotation file lies beside the model.
    formats = ["--formats", "oscar-int2,int2", "--jobs", "3"]
    report = evaluate(tmp_path / "out", tiny_model, *sizes, *formats, status=1)
    auto, oscar, int2 = report["formats"]
    assert (auto["format"], oscar["format"], int2["format"]) == ("auto", "oscar-int2", "int2")
    assert "rotation" in oscar["error"]
    for together, alone in zip((auto, int2), one_context[0]["formats"], strict=True):
        assert together["text"] == alone["text"]
        assert together["recall"] == alone["recall"]


def test_several_contexts_share_an_engine(tmp_path, tiny_model, one_context, capsys):
    """Each context has the figures it has alone, whatever the engine has read before."""
    out = tmp_path / "out"
    sizes = ["--context", "256,192", "--chunks", "2,3", "--recall-depths", "2,0"]
    report = evaluate(out, tiny_model, *sizes)
    assert [(row["context"], row["format"]) for row in report["formats"]] == [
        (192, "auto"),
        (192, "int2"),
        (256, "auto"),
        (256, "int2"),
    ]
    settings = report["settings"]
    assert (settings["context"], settings["chunks"], settings["recall_depths"]) == ([192, 256], [3, 2], [0, 2])
    assert settings["recall_sentences"] == [1, 1]
    # One start a format.
    assert sorted(file.name for file in (out / "logs").iterdir()) == ["0-auto.log", "1-int2.log"]
    assert report["formats"][0]["engine"] == report["formats"][2]["engine"]
    assert [row["text"]["positions"] for row in report["formats"]] == [3 * (191 - 80)] * 2 + [2 * (255 - 80)] * 2
    assert [len(row["recall"]) for row in report["formats"]] == [0, 0, 2, 2]
    for together, alone in zip(report["formats"][2:], one_context[0]["formats"], strict=True):
        assert together["text"] == alone["text"]
        assert together["recall"] == alone["recall"]
    printed = capsys.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()[2:6]] == [
        ["192", "auto"],
        ["192", "int2"],
        ["256", "auto"],
        ["256", "int2"],
    ]
    # The bar counts the tokens fed: 3 x 191 and (2 chunks + 2 probes) x 255.
    assert "1.59k/1.59k" in printed.err
    pytest.importorskip("matplotlib")
    assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "missing.txt: no such file"),
        (["--context", "1024"], "beyond the model's limit of 512"),
        (["--context", "330"], "too few positions past the windows"),
        (["--chunks", "50"], "too little text for 50 chunks"),
        (["--formats", "int9"], "unknown format 'int9'"),
        (["--feed", "0"], "--feed must be at least 1"),
        (["--max-model-len", "100"], "--max-model-len 100 is below --context"),
        (["--context", "400,512,1024", "--chunks", "1"], "--context 1024 is beyond the model's limit of 512"),
        (["--context", "330,400"], "--context 330 leaves too few positions past the windows"),
        (["--context", "400,500", "--max-model-len", "400"], "--max-model-len 400 is below --context 500"),
        (["--context", "440,500", "--chunks", "2,30"], "too little text for 30 chunks of 500 tokens"),
        (["--context", "400,500", "--chunks", "2,0"], "--chunks must be at least 1, got 0"),
        (["--context", "400,500", "--recall-depths", "1,2,3"], "--recall-depths has 3 numbers for the 2 of --context"),
        (["--sinks", "-1"], "sink_tokens"),
        (["--recent", "250"], "no room for the recall probe"),
    ],
)
def test_refusals(tmp_path, tiny_model, capsys, arguments, message):
    data = tmp_path / "text.txt"
    data.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9\n" * 900)
    base = ["eval", str(tiny_model), "--formats", "int2", "--data", str(data), "--context", "400", "--chunks", "2"]
    assert main([*base, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["", "1024,", "1K", "1024;2048"])
def test_malformed_numbers(capsys, value):
    with pytest.raises(SystemExit):
        main(["eval", "model", "--data", "text.txt", "--context", value])
    assert "argument --context: not a number or comma-separated numbers" in capsys.readouterr().err


def test_a_missing_model(tmp_path, capsys):
    data = tmp_path / "text.txt"
    data.write_text("text " * 100)
    assert main(["eval", str(tmp_path / "nowhere"), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "cannot load" in capsys.readouterr().err
