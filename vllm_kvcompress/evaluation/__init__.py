# SPDX-License-Identifier: Apache-2.0
"""`kvcompress eval`: what a KV page format costs in quality, measured on the engine that serves it.

**Fed as decoding reads.** In a prompt prefilled in one step every token attends to the exact keys and values of that
step, so its predictions say nothing about the pages. Here one prompt at a time is fed in steps of at most `feed` tokens
(`max_num_batched_tokens = feed`, `max_num_seqs = 1`), so all earlier history is read from the pages. The recorder
checks the size of every step. `long_prefill_token_threshold` would not do: vLLM ignores it for a request that is
alone in the batch.

**What a larger step flatters.** The recent window counts back from the step's first token, so the last prediction of a
step sees feed - 1 exact tokens more than in decoding, and a page mean may be taken over more tokens. `--feed 1` is
decoding itself and slow; figures of different `feed` must not be compared with each other.

**Exact KL in little space.** A distribution over the vocabulary for every position is gigabytes; the hidden state it
follows from is a few hundred numbers. The reference engine (`auto`) stores the final hidden states of the scored
positions. The engine under test, which holds the same output head, computes both logits of a step together and keeps
one number per position: KL(reference || format) over the whole vocabulary, in nats. Both go through the model's own
`compute_logits`, by default with a float32 head, for bf16 logits (steps of 0.125 near 20) tie too often for argmax.

**Several contexts, one engine.** An engine start takes longer than many prompts, so one engine a format reads the
prompts of every context, one request at a time; its figures at one context are those of a run of that context alone.
Chunks of one context are disjoint; those of different contexts are cut from the same text and overlap.

**Several engines at once.** With `--jobs` above 1 the engines start together with the reference and wait at each prompt
for its hidden states of that prompt. Files another process looks for are written under another name first.

**Under stress.** With `--stress` all but the reference run on a copy of the model that computes the same function with
outliers in its keys. `auto` runs on both: on the plain model as the reference, on the copy to show that it is the same
function.

Modules: `specs` what to run; `text`, `recall`, `prompts` what to feed and `plan` how much of it at each context;
`stress` the copy of the model; `launch` the process, `engine` and `recorder` the run inside it; `metrics` figures and
intervals; `report` table, JSON and PNG; `command` the command line; `model_files` and `arguments` what it shares with
`kvcompress eval-conversations`, whose modules begin with `conversation`; `locomo` and `routing` are its data.
"""
