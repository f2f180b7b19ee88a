# SPDX-License-Identifier: Apache-2.0
"""`kvcompress eval-conversations`: what is fed, the figures, the command line, and a real engine on a tiny model."""

import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_kvcompress.cli import main
from vllm_kvcompress.episodic.template import ChatTemplate
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation import conversation_command, conversation_report
from vllm_kvcompress.evaluation.conversation_engine import Reading, Reply
from vllm_kvcompress.evaluation.conversation_figures import FULL, Outcome, Setup, setup_figures
from vllm_kvcompress.evaluation.conversations import AskedQuestion, answerable, ask_questions, cut_history
from vllm_kvcompress.evaluation.locomo import Category, Question, read_folder

TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def chat_model(tiny_model, tmp_path):
    """The tiny Llama with a chat template and 2048 positions."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def template(tokenizer):
    mine = copy.deepcopy(tokenizer)  # other tests' models come without a template
    mine.chat_template = TEMPLATE
    return ChatTemplate(mine)


def write_talk(folder, sessions=6, turns=20, seed=0):
    """A talk of 12 words a turn; of each session a question about its third turn, and one that has no answer."""
    rng = random.Random(seed)

    def some(count):
        return " ".join(f"w{rng.randrange(300)}" for _ in range(count))

    talk, questions = {"speaker_a": "Ann", "speaker_b": "Bob"}, []
    for session in range(1, sessions + 1):
        talk[f"session_{session}_date_time"] = f"{session} May"
        talk[f"session_{session}"] = [
            {"speaker": ("Ann", "Bob")[turn % 2], "text": some(12), "dia_id": f"D{session}:{turn + 1}"}
            for turn in range(turns)
        ]
        evidence = [f"D{session}:3"]
        questions.append({"question": some(6), "answer": some(3), "evidence": evidence, "category": 4})
        questions.append({"question": some(6), "evidence": evidence, "category": 5})
    folder.mkdir(exist_ok=True)
    (folder / f"talk{seed}.json").write_text(json.dumps({"conversation": talk, "qa": questions}))
    return folder


@pytest.fixture
def talk(tmp_path):
    return read_folder(write_talk(tmp_path / "data"))[0]


@pytest.mark.parametrize("limit", (512, 700, 1024))
def test_a_history_has_whole_blocks(talk, template, limit):
    history = cut_history(talk, template, limit=limit, block=256)
    assert len(history.tokens) == limit // 256 * 256
    whole = template.tokens(history.messages)
    protected = history.protected_tokens
    # The system prompt and the end are whole, and what was cut is less than two turns.
    assert history.tokens[:protected] == whole[:protected]
    assert history.tokens[protected:] == whole[len(whole) - len(history.tokens) + protected :]
    assert len(whole) - len(history.tokens) < 2 * 22
    roles = [message["role"] for message in history.messages]
    assert roles == ["system", *("user", "assistant") * (len(roles) // 2)]


def test_what_a_cut_history_does_not_hold_is_not_asked(talk, template):
    history = cut_history(talk, template, limit=768, block=256)
    ids = [utterance.id for utterance in history.conversation.utterances]
    text = " ".join(message["content"] for message in history.messages)
    assert ids[0] in ("D1:2", "D1:3")  # cut into, or as a whole
    for utterance in talk.utterances:
        assert (utterance.text in text) == (utterance.id in ["D1:1", "D1:2", *ids])
    sessions = {name.split(":")[0] for name in ids}
    assert 1 < len(sessions) < 6
    asked = {name.split(":")[0] for question in history.conversation.questions for name in question.evidence}
    assert asked == {name.split(":")[0] for name in ids if name.endswith(":3")}
    assert len(answerable(history.conversation)) == len(asked)  # of twice as many


def test_a_conversation_shorter_than_asked_for(talk, template):
    whole = cut_history(talk, template, limit=1 << 20, block=1)
    assert whole.conversation.utterances == talk.utterances
    assert whole.tokens == template.tokens(whole.messages)
    assert len(cut_history(talk, template, limit=1 << 20, block=1024).tokens) == len(whole.tokens) // 1024 * 1024
    with pytest.raises(KVCompressError, match=r"shorter than a block of 4096; raise --max-history"):
        cut_history(talk, template, limit=1 << 20, block=4096)


def test_questions_follow_their_history(talk, template):
    history = cut_history(talk, template, limit=1024, block=256)
    asked = ask_questions([history], template, per_history=2, block=256, seed=1)
    assert len(asked) == 2
    for one in asked:
        prompt = template.tokens(history.messages) + one.suffix
        message = {
            "role": "user",
            "content": f"Answer with a short phrase, from our conversations. {one.question.text}",
        }
        assert prompt == template.tokens([*history.messages, message], answer=True)
        assert one.gold == template.encode(one.question.answer)
    assert asked == ask_questions([history], template, per_history=2, block=256, seed=1)
    with pytest.raises(KVCompressError, match="longer than --block-tokens 16"):
        ask_questions([history], template, per_history=2, block=16, seed=1)
    nothing = cut_history(talk, template, limit=64, block=64)
    with pytest.raises(KVCompressError, match="no questions with all their evidence in histories of 64 tokens"):
        ask_questions([nothing], template, per_history=2, block=64, seed=1)


def outcome(shift, lengths=(3, 1, 5), f1=0.5):
    rng = np.random.default_rng(0)
    logprob = [rng.normal(-3, 1, length) + shift for length in lengths]
    return Outcome(logprob, [f1] * len(lengths), ["x"] * len(lengths), [2.0] * len(lengths))


def test_figures_are_paired_by_question():
    mine, baseline = Setup("snapkv", 0.25), Setup("epicache", 0.25)
    outcomes = {FULL: outcome(0), mine: outcome(-0.5, f1=0.25), baseline: outcome(-0.2, f1=0.75)}
    figures = setup_figures(outcomes, mine)
    # The same loss on every token: paired, the interval is a point.
    for estimate, value in (
        (figures.likelihood_to_full, -0.5),
        (figures.likelihood_to_baseline, -0.3),
        (figures.f1_to_full, -0.25),
        (figures.f1_to_baseline, -0.5),
    ):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((value,) * 3)
    assert figures.likelihood.value == pytest.approx(np.concatenate(outcomes[mine].logprob).mean())
    assert figures.likelihood.low < figures.likelihood.value < figures.likelihood.high
    assert setup_figures(outcomes, baseline).likelihood_to_baseline is None
    del outcomes[baseline]
    assert setup_figures(outcomes, mine).f1_to_baseline is None


def test_budgets_are_whole_pages():
    assert [Setup("snapkv", share).budget(3072, 128) for share in (0.125, 0.25, 0.3)] == [384, 768, 1024]


def test_rows_pair_replies_with_questions(tokenizer):
    setups = [FULL, Setup("streaming", 0.5)]
    questions = [Question("q", answer, (), Category.SINGLE_HOP) for answer in ("w1 w2", "w3")]
    asked = [AskedQuestion(0, question, [], [1]) for question in questions]
    said = ["w1 w2", "w9", "w3", "w3 w8"]
    replies = [
        Reply(logprobs=[-float(number)], tokens=tokenizer(answer, add_special_tokens=False)["input_ids"], seconds=3)
        for number, answer in enumerate(said)
    ]
    order = [(setups[0], 0), (setups[1], 0), (setups[0], 1), (setups[1], 1)]
    spec = SimpleNamespace(label="toy")
    rows = conversation_command._rows(spec, replies, order, setups, asked, tokenizer, 1024, 0)
    assert [row.budget for row in rows] == [None, 512]
    assert [[one["f1"] for one in row.questions] for row in rows] == [[1, 1], [0, pytest.approx(2 / 3)]]
    assert [[one["likelihood"] for one in row.questions] for row in rows] == [[0, -2], [-1, -3]]
    assert rows[1].figures.likelihood_to_full.value == -1
    assert rows[1].figures.seconds == 3
    report = conversation_report.ConversationReport({"model": "m", "asked": 2, "history": 1024}, None, rows, ["so"])
    table = conversation_report.table(report)
    assert "512 (50.0%)  -2.000      -1.000 [-1.000, -1.000]" in table and table.endswith("Note: so")


def test_a_history_is_read_once_for_each_setup_and_guide():
    histories = [
        SimpleNamespace(tokens=[0] * 512, protected_tokens=3),
        SimpleNamespace(tokens=[1] * 256, protected_tokens=0),
    ]
    asked = [AskedQuestion(history, None, [7, number], [8]) for number, history in enumerate((1, 0, 0, 0))]
    guides = [[1], [2], [3], [2]]
    setups = [FULL, Setup("epicache", 0.5), Setup("keydiff", 0.5)]
    found = conversation_command._readings(histories, asked, setups, guides)
    readings, order = [reading for reading, _ in found], [place for _, places in found for place in places]
    assert [(one.history, one.extra_args.get("kvcompress_guide"), len(one.asked)) for one in readings] == [
        (0, None, 3), (0, [2], 2), (0, None, 3), (0, [3], 1), (1, None, 1), (1, [1], 1), (1, None, 1),
    ]  # fmt: skip
    assert sorted(order, key=str) == sorted([(setup, index) for setup in setups for index in range(4)], key=str)
    flat = [one.suffix[1] for reading in readings for one in reading.asked]
    assert flat == [index for _, index in order]
    assert readings[1].extra_args == {
        "kvcompress_budget": 256, "kvcompress_policy": "epicache", "kvcompress_protect": 3, "kvcompress_guide": [2],
    }  # fmt: skip


@pytest.mark.parametrize(("jobs", "expected"), [(1, [[0, 1, 2]]), (2, [[0, 2], [1]]), (7, [[0], [1], [2]])])
def test_engines_share_whole_histories(jobs, expected):
    readings = [(Reading(history=number, extra_args={}, asked=[]), [number]) for number in (0, 0, 1, 2, 2)]
    parts = conversation_command._parts(readings, jobs)
    assert [sorted({reading.history for reading, _ in part}) for part in parts] == expected
    assert sorted(place for part in parts for _, (place,) in part) == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--budgets", "0.5,0.5"], "--budgets names one more than once"),
        (["--budgets", "1"], "--budgets: 1.0 must be a share of the history above 0 and below 1"),
        (["--budgets", "0.01"], "is 128 tokens, below the least, 256; raise it or --max-history"),
        (["--policies", "h2o,lru"], "--policies: 'lru' must be one of epicache,"),
        (["--block-tokens", "100"], "--block-tokens must be a multiple of 128, got 100"),
        (["--questions", "0"], "--questions must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--formats", "fp8"], "--formats: fp8 cannot evict; auto and"),
        (["--formats", "turboquant-5"], "unknown format 'turboquant-5'"),
        (["--max-history", "100"], "shorter than a block of 256"),
        (["--max-history", "1700"], "is beyond the model's limit of 2048 tokens"),
    ],
)
def test_refusals(chat_model, tmp_path, capsys, arguments, error):
    data = write_talk(tmp_path / "data")
    given = ["--max-history", "1024", "--block-tokens", "256", *arguments]
    assert main(["eval-conversations", str(chat_model), "--data", str(data), *given]) == 2
    assert error in capsys.readouterr().err


def test_a_model_without_a_template(tiny_model, tmp_path, capsys):
    data = write_talk(tmp_path / "data")
    assert main(["eval-conversations", str(tiny_model), "--data", str(data)]) == 2
    assert "the model's chat template does not take this conversation" in capsys.readouterr().err


def test_real_engines(chat_model, tmp_path, capsys):
    """A budget that holds the history changes nothing; one that does not, and another policy, do.

    Batches differ, which 16-bit pages (float32 here) hardly show. Of 4-bit ones the recent window is read in 16 bits
    where the prefix cache still has it, and kept pages have none.
    """
    data = write_talk(tmp_path / "data")
    arguments = ["--max-history", "1024", "--block-tokens", "256", "--questions", "2", "--max-tokens", "4"]
    arguments += ["--budgets", "0.25,0.99", "--policies", "epicache,streaming", "--dtype", "float32", "--jobs", "2"]
    tolerances = {"auto": 1e-3, "turboquant-4": 0.1}
    arguments += ["--formats", ",".join(tolerances), "--out", str(out := tmp_path / "out")]
    assert main(["eval-conversations", str(chat_model), "--data", str(data), *arguments]) == 0
    document = json.loads((out / "conversations.json").read_text())
    for dtype, tolerance in tolerances.items():
        found = {
            (row["setup"]["policy"], row["setup"]["share"]): [one["likelihood"] for one in row["questions"]]
            for row in document["rows"]
            if row["format"] == dtype
        }
        assert len(found) == 5
        full = found[None, None]
        assert len(full) == 2
        for policy in ("epicache", "streaming"):
            assert found[policy, 0.99] == pytest.approx(full, abs=tolerance)
            assert found[policy, 0.25] != pytest.approx(full, abs=1e-3)
        assert found["epicache", 0.25] != pytest.approx(found["streaming", 0.25], abs=1e-3)
    printed = capsys.readouterr().out
    for expected in ("Routing, ", "category 5", "full cache", "from 2 questions are too narrow"):
        assert expected in printed
