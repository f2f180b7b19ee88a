# SPDX-License-Identifier: Apache-2.0
"""The recorder fed step by step without an engine: a linear head on random hidden states."""

import secrets

import pytest
import torch

from vllm_kvcompress.evaluation import recorder
from vllm_kvcompress.evaluation.recorder import EvaluationRecorder, Recording

N, D, VOCABULARY, FEED = 50, 8, 31, 16
START, STOP = 20, 41


class Head:
    """The model's `compute_logits`, with the number of rows of every call."""

    def __init__(self, weight):
        self.weight = weight
        self.calls = []

    def compute_logits(self, hidden):
        self.calls.append(len(hidden))
        return hidden @ self.weight


@pytest.fixture
def generator():
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown by pytest when the test fails
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def prompt(generator):
    return torch.randint(VOCABULARY, (N + 1,), generator=generator)


@pytest.fixture
def hidden(generator):
    return torch.randn(N, D, generator=generator)


@pytest.fixture
def head(generator):
    return Head(torch.randn(D, VOCABULARY, generator=generator))


def feed(recording, head, prompt, hidden, steps, padding=0):
    """Steps of the given sizes, each with `padding` rows behind it as a runner with padded batches has them."""
    first = 0
    for count in steps:
        rows = slice(first, first + count)
        recording.record(
            head,
            torch.cat((prompt[rows].int(), torch.full((padding,), 1, dtype=torch.int32))),
            torch.cat((torch.arange(first, first + count), torch.zeros(padding, dtype=torch.int64))),
            torch.cat((hidden[rows], torch.full((padding, D), torch.nan))),
        )
        first += count


def expected(head, prompt, hidden):
    log_p = (hidden @ head.weight).log_softmax(-1)
    return log_p[torch.arange(START, STOP), prompt[START + 1 : STOP + 1]]


@pytest.mark.parametrize("padding", [0, 3])
def test_scores_only_the_rows_asked_for(head, prompt, hidden, padding):
    recording = Recording(prompt, START, STOP, None, FEED)
    feed(recording, head, prompt, hidden, [16, 16, 16, 2], padding)
    # Rows 20..31 of the second step and 32..40 of the third; none of the first and the last.
    assert head.calls == [12, 9]
    named = recording.tensors()
    assert named.keys() == {"hidden", "logprob", "top1"}
    assert torch.equal(named["hidden"], hidden[START:STOP])
    # float32 sums of 8 products and of 31 exponentials, in another order: far below 1e-5.
    torch.testing.assert_close(named["logprob"], expected(head, prompt, hidden), rtol=1e-5, atol=1e-5)
    assert recording.largest_step == FEED


def test_compares_with_the_reference_row_by_row(generator, head, prompt, hidden):
    other = torch.randn(STOP - START, D, generator=generator)
    recording = Recording(prompt, START, STOP, other, FEED)
    feed(recording, head, prompt, hidden, [16, 16, 16, 2])
    named = recording.tensors()
    log_q = (hidden[START:STOP] @ head.weight).double().log_softmax(-1)
    log_p = (other @ head.weight).double().log_softmax(-1)
    # As above; KL here is some nats.
    torch.testing.assert_close(named["kl"].double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(named["agree"], log_p.argmax(-1) == log_q.argmax(-1))
    assert "hidden" not in named


def test_a_step_never_waits_for_the_device():
    """On the meta device whatever needs a value on the host raises, as a transfer on a GPU would wait."""
    head = Head(torch.empty(D, VOCABULARY, device="meta"))
    prompt = torch.empty(N + 1, dtype=torch.int64, device="meta")
    for reference in (None, torch.empty(STOP - START, D, device="meta")):
        recording = Recording(prompt, START, STOP, reference, FEED)
        for first in range(0, N, FEED):
            count = min(FEED, N - first)
            ids = torch.empty(count, dtype=torch.int32, device="meta")
            recording.record(head, ids, ids.long(), torch.empty(count, D, device="meta"))
        assert recording.fed == N
        assert sum(len(rows.logprob) for rows in recording.rows) == STOP - START


def test_the_memory_of_a_step_may_be_reused(head, prompt, hidden):
    recording = Recording(prompt, START, STOP, None, FEED)
    ids, positions = torch.zeros(FEED, dtype=torch.int32), torch.zeros(FEED, dtype=torch.int64)
    rows = torch.zeros(FEED, D)
    for first in range(0, N, FEED):
        count = min(FEED, N - first)
        ids[:count], positions[:count] = prompt[first : first + count], torch.arange(first, first + count)
        rows[:count] = hidden[first : first + count]
        recording.record(head, ids[:count], positions[:count], rows[:count])
    assert torch.equal(recording.tensors()["hidden"], hidden[START:STOP])


def test_a_step_run_ahead_is_ignored(head, prompt, hidden):
    recording = Recording(prompt, START, STOP, None, FEED)
    feed(recording, head, prompt, hidden, [16, 16, 16, 2])
    recording.record(head, torch.tensor([0]), torch.tensor([N]), torch.full((1, D), torch.nan))
    assert len(recording.tensors()["logprob"]) == STOP - START


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([16, 16, 16], "fed 48 of 50 tokens"),
        # 16 rows are taken for the prompt's and the next step begins at 17.
        ([17, 16, 16, 1], "fed position 17 where the prompt goes on at 16"),
        ([16, 16, 18], "fed 48 of 50 tokens"),
    ],
)
def test_other_steps_are_refused(head, prompt, hidden, steps, message):
    recording = Recording(prompt, START, STOP, None, FEED)
    feed(recording, head, prompt, hidden, steps)
    with pytest.raises(RuntimeError, match=message):
        recording.tensors()


def test_a_preempted_request_is_refused(head, prompt, hidden):
    recording = Recording(prompt, START, STOP, None, FEED)
    feed(recording, head, prompt, hidden, [16, 16])
    feed(recording, head, prompt, hidden, [16, 16, 16, 2])
    with pytest.raises(RuntimeError, match="fed position 0 where the prompt goes on at 32"):
        recording.tensors()


def test_other_tokens_are_refused(head, prompt, hidden):
    recording = Recording(prompt, START, STOP, None, FEED)
    other = prompt.clone()
    other[40] = (other[40] + 1) % VOCABULARY
    feed(recording, head, other, hidden, [16, 16, 16, 2])
    with pytest.raises(RuntimeError, match="fed position 40 where the prompt goes on at 40"):
        recording.tensors()


def test_figures_that_are_not_finite_are_refused(head, prompt, hidden):
    hidden[30] = torch.nan
    recording = Recording(prompt, START, STOP, None, FEED)
    feed(recording, head, prompt, hidden, [16, 16, 16, 2])
    with pytest.raises(RuntimeError, match=r"1 of 21 predictions are not finite, the first at position 30"):
        recording.tensors()


def test_ranks_without_logits_keep_hidden_states_only(prompt, hidden):
    class Silent:
        def compute_logits(self, hidden):
            return None

    recording = Recording(prompt, START, STOP, None, FEED)
    feed(recording, Silent(), prompt, hidden, [16, 16, 16, 2])
    assert recording.tensors().keys() == {"hidden"}


def test_a_result_file_appears_whole(tmp_path, monkeypatch, head, prompt, hidden):
    """Another engine may be waiting for it."""
    recording = Recording(prompt, START, STOP, None, FEED)
    feed(recording, head, prompt, hidden, [16, 16, 16, 2])
    file = tmp_path / "prompt0.safetensors"
    save_file = recorder.save_file

    def save(tensors, path):
        save_file(tensors, path)
        assert not file.exists()

    monkeypatch.setattr(recorder, "save_file", save)
    worker = EvaluationRecorder()
    worker._kvcompress_eval = recording, torch.nn.Identity().register_forward_hook(lambda *args: None)
    assert worker.kvcompress_eval_end(str(file)) == FEED
    assert recorder.load_file(file).keys() == {"hidden", "logprob", "top1"}
    assert list(tmp_path.iterdir()) == [file]
