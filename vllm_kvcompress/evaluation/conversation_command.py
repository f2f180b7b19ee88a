# SPDX-License-Identifier: Apache-2.0
"""Measure what eviction costs a model's memory of long conversations, on real vLLM engines.

Questions of LoCoMo are asked about histories that were evicted before: for every policy and budget, and for the full
cache, how likely is the gold answer (mean ln p a token, teacher forced), and how good is the greedy answer (F1)? With
95 % intervals, paired by question, against the full cache and against epicache. Adversarial questions (category 5),
which have no gold answer, are left out.

A history is read once for each policy and budget, and for each guide prompt; its pages are kept and all its questions
asked about them. The bar shows the tokens still to be read of each format and how long they will take. On a CPU keep
--max-history and --questions small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kvcompress.config import NAMESPACE, load_settings
from vllm_kvcompress.episodic.embed import served_embedder
from vllm_kvcompress.episodic.guide import guide_tokens
from vllm_kvcompress.episodic.policies import POLICIES
from vllm_kvcompress.episodic.request import BUDGET, GUIDE, POLICY, PROTECT
from vllm_kvcompress.episodic.router import EpisodeRouter
from vllm_kvcompress.episodic.settings import MIN_BUDGET, PAGE_TOKENS, EpisodicSettings
from vllm_kvcompress.episodic.template import ChatTemplate
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation import conversation_report as report
from vllm_kvcompress.evaluation import launch, locomo
from vllm_kvcompress.evaluation.arguments import json_object
from vllm_kvcompress.evaluation.conversation_engine import Asked, ConversationJob, Reading, Reply
from vllm_kvcompress.evaluation.conversation_figures import BASELINE, FULL, Outcome, Setup, setup_figures
from vllm_kvcompress.evaluation.conversations import AskedQuestion, History, ask_questions, cut_history
from vllm_kvcompress.evaluation.engine import engine_arguments
from vllm_kvcompress.evaluation.model_files import check_limit, load_model_files, sufficient_kv_bytes
from vllm_kvcompress.evaluation.routing import route_questions, routing_figures
from vllm_kvcompress.evaluation.specs import REFERENCE, FormatSpec, parse_formats
from vllm_kvcompress.rotations import model_folder

SUMMARY = "measure answers about long conversations under eviction: LoCoMo, by policy and budget"

_AT_ONCE = 8
"""Questions about one history"""
_FEW_QUESTIONS = 20
"""Below this, percentile intervals cover far less than they say."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kvcompress eval-conversations`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="Hugging Face name or folder of a chat model")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FOLDER",
        help="LoCoMo's conversations, one JSON file each (https://github.com/snap-research/locomo)",
    )  # fmt: skip
    what = parser.add_argument_group("what is asked")
    what.add_argument("--conversations", type=int, metavar="N", help="the first N files (default: all)")
    history = "tokens of a history, in whole blocks: its first ones (default %(default)s)"
    what.add_argument("--max-history", type=int, default=3072, metavar="TOKENS", help=history)
    questions = "questions a conversation, drawn among those with all evidence in the history (default %(default)s)"
    what.add_argument("--questions", type=int, default=5, metavar="N", help=questions)
    what.add_argument("--max-tokens", type=int, default=24, metavar="N", help="of an answer (default %(default)s)")
    kept = parser.add_argument_group("what is kept")
    budgets = "shares of the history's tokens (default %(default)s)"
    kept.add_argument("--budgets", type=_shares, default="0.125,0.25,0.5", metavar="F[,F...]", help=budgets)
    policies = f"of {', '.join(POLICIES)} (default %(default)s)"
    kept.add_argument("--policies", type=_names, default="epicache,snapkv,keydiff,streaming", help=policies)
    block = "tokens read between two evictions, and most of a guide prompt (default %(default)s)"
    kept.add_argument("--block-tokens", type=int, default=1024, metavar="N", help=block)
    formats = (
        "comma-separated --kv-cache-dtype values: auto (16-bit pages) and those of this package; "
        "NAME:KEY=VALUE,KEY=VALUE overrides settings of one (default %(default)s)"
    )
    kept.add_argument("--formats", default="turboquant-4", help=formats)
    kept.add_argument("--additional-config", type=json_object, default={}, metavar="JSON", help="as vLLM's")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", default="auto", help="model dtype (default %(default)s)")
    head = "dtype of the logits; a quantised output head needs `model` (default %(default)s)"
    engine.add_argument("--head-dtype", choices=("float32", "model"), default="float32", help=head)
    engine.add_argument("--kv-bytes", type=int, help="bytes of KV cache (default: enough for the longest history)")
    jobs = (
        "engines at once, which share the histories, one a GPU where there are several; on one GPU each starts only if "
        "gpu_memory_utilization in --engine-args leaves room for the others (default %(default)s)"
    )
    engine.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs)
    more = 'further keyword arguments of vllm.LLM, e.g. {"tensor_parallel_size": 2}'
    engine.add_argument("--engine-args", type=json_object, default={}, metavar="JSON", help=more)
    parser.add_argument("--seed", type=int, default=0, help="of questions and bootstrap (default %(default)s)")
    out = Path("kvcompress-eval-conversations")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="default: %(default)s")


def _shares(value: str) -> list[float]:
    try:
        return [float(share) for share in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a share or comma-separated shares: {value!r}") from None


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",")]


def run(args: argparse.Namespace) -> int:
    """Run the engines and report; 1 if any format failed."""
    _check_arguments(args)
    settings = EpisodicSettings.model_validate({"budget": MIN_BUDGET, "block_tokens": args.block_tokens})
    specs = _specs(args, settings)
    conversations = locomo.read_folder(args.data)[: args.conversations]
    config, tokenizer = load_model_files(args.model, args.engine_args)
    template = ChatTemplate(tokenizer)
    histories = [cut_history(one, template, limit=args.max_history, block=args.block_tokens) for one in conversations]
    asked = ask_questions(histories, template, per_history=args.questions, block=args.block_tokens, seed=args.seed)
    setups = [FULL, *(Setup(policy, share) for share in args.budgets for policy in args.policies)]
    longest = max(len(history.tokens) for history in histories)
    _check_budgets(args, setups, histories, specs)
    router = EpisodeRouter(settings, _embedder(args, settings, template))
    guides = _guides(histories, asked, router, template, args.block_tokens)
    routed = [one for history in histories for one in route_questions(history.conversation, router)]
    # Room for the question, its answer, and the positions of a guide that is read after them.
    model_len = longest + 2 * args.block_tokens + args.max_tokens
    check_limit("--max-history with two --block-tokens and --max-tokens:", model_len, config.get_text_config())
    outcome = report.ConversationReport(
        settings={
            **{name: value for name, value in vars(args).items() if name != "command"},
            "history": longest,
            "asked": len(asked),
            "kvcompress": version("vllm-kvcompress"),
        },
        routing=routing_figures(routed) if routed else None,
        rows=[],
        notes=_notes(args, specs, histories, asked),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    parts = _parts(_readings(histories, asked, setups, guides), -(-args.jobs // len(specs)))
    order = [place for part in parts for _, places in part for place in places]
    with tempfile.TemporaryDirectory(prefix="kvcompress-eval-") as scratch:
        tasks: list[launch.Task[ConversationJob]] = []
        for spec, part in itertools.product(specs, parts):
            job = ConversationJob(
                folder=Path(scratch) / str(len(tasks)),
                engine_args=engine_arguments(
                    args.model,
                    kv_cache_dtype=spec.kv_cache_dtype,
                    additional_config=spec.additional_config,
                    feed=args.block_tokens,
                    max_model_len=model_len,
                    # A history's pages and those of the questions about it.
                    kv_bytes=args.kv_bytes or 2 * sufficient_kv_bytes(config.get_text_config(), model_len),
                    dtype=args.dtype,
                    head_dtype=args.head_dtype,
                    seed=args.seed,
                    extra={"enable_prefix_caching": True, "max_num_seqs": _AT_ONCE, **args.engine_args},
                ),
                sizes=[len(histories[reading.history].tokens) for reading, _ in part],
                max_tokens=args.max_tokens,
                stop_tokens=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
            )
            job.write([history.tokens for history in histories], [reading for reading, _ in part])
            log = args.out / "logs" / f"{len(tasks)}-{spec.kv_cache_dtype}.log"
            tasks.append(launch.Task(job, spec.label, log))
        with closing(launch.run_at_once(tasks, _run_engine, at_once=args.jobs)) as results:
            for spec in specs:
                found = [next(results) for _ in parts]
                failure = next((one for one in found if isinstance(one, launch.EngineFailure)), None)
                if failure is not None:
                    outcome.rows.append(report.ConversationRow(spec.label, FULL, error=str(failure)))
                else:
                    replies = [reply for one in found if isinstance(one, list) for reply in one]
                    outcome.rows.extend(_rows(spec, replies, order, setups, asked, tokenizer, longest, args.seed))
                # Written after every format: an interrupted run keeps what it has.
                report.write_json(outcome, args.out / "conversations.json")
    print(report.table(outcome))
    written = [str(args.out / "conversations.json")]
    if report.write_plot(outcome, args.out / "conversations.png"):
        written.append(str(args.out / "conversations.png"))
    else:
        print("conversations.png was not drawn: matplotlib is not installed", file=sys.stderr)
    print(f"Wrote {' and '.join(written)}")
    return 1 if any(row.error for row in outcome.rows) else 0


def _run_engine(
    task: launch.Task[ConversationJob], stop: threading.Event, device: str | None
) -> list[Reply] | launch.EngineFailure:
    module = "vllm_kvcompress.evaluation.conversation_engine"
    try:
        launch.watch_engine(
            task.job, task.job.sizes, task.label, task.log_file, module=module, stop=stop, device=device
        )
    except launch.EngineFailure as failure:
        return failure
    return task.job.replies()


def _check_arguments(args: argparse.Namespace) -> None:
    for name in ("conversations", "max_history", "questions", "max_tokens", "kv_bytes", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise KVCompressError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.block_tokens < PAGE_TOKENS or args.block_tokens % PAGE_TOKENS:
        raise KVCompressError(f"--block-tokens must be a multiple of {PAGE_TOKENS}, got {args.block_tokens}")
    for policy in args.policies:
        if policy not in POLICIES:
            raise KVCompressError(f"--policies: {policy!r} must be one of {', '.join(POLICIES)}")
    for share in args.budgets:
        if not 0 < share < 1:
            raise KVCompressError(f"--budgets: {share} must be a share of the history above 0 and below 1")
    for name in ("policies", "budgets"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            raise KVCompressError(f"--{name} names one more than once: {json.dumps(given)}")


def _specs(args: argparse.Namespace, settings: EpisodicSettings) -> list[FormatSpec]:
    """Formats to run; of others than ours only `auto`."""
    common = {"episodic": settings.model_dump(include={"budget", "block_tokens"})}
    reference, *specs = parse_formats(args.formats, common=common, additional_config=args.additional_config)
    reference = replace(reference, additional_config={**reference.additional_config, NAMESPACE: common})
    for spec in specs:
        if not spec.ours:
            raise KVCompressError(
                f"--formats: {spec.label} cannot evict; {REFERENCE} and the formats of this package can"
            )
    return [reference, *specs] if REFERENCE in _names(args.formats) else specs


def _check_budgets(
    args: argparse.Namespace, setups: list[Setup], histories: list[History], specs: list[FormatSpec]
) -> None:
    sinks = max(load_settings(spec.additional_config).windows(args.model)[0] for spec in specs)
    for history in histories:
        kept_always = max(sinks, history.protected_tokens)
        least = -(-kept_always // PAGE_TOKENS) * PAGE_TOKENS + PAGE_TOKENS
        for setup in setups:
            if setup != FULL and (budget := setup.budget(len(history.tokens), PAGE_TOKENS)) < least:
                raise KVCompressError(
                    f"--budgets: {setup.share} of the {len(history.tokens)} tokens of {history.conversation.name} is "
                    f"{budget} tokens, below the least, {least}; raise it or --max-history"
                )


def _embedder(args: argparse.Namespace, settings: EpisodicSettings, template: ChatTemplate) -> Any:
    folder = model_folder(args.model)
    if folder is None:
        raise KVCompressError(f"the weights of {args.model} are not on this machine; fetch them: hf download MODEL")
    return served_embedder(settings.embedder, folder, template.encode)


def _guides(
    histories: list[History], asked: list[AskedQuestion], router: EpisodeRouter, template: ChatTemplate, limit: int
) -> list[list[int]]:
    """The guide of the episode that each question is routed to."""
    episodes = [router.episodes(history.conversation.utterances) for history in histories]
    guides = []
    for one in asked:
        found = episodes[one.history]
        guides.append(guide_tokens(found, found.route(one.question.text).episode, template.encode, limit)[0])
    return guides


Place = tuple[Setup, int]
"""A setup, and a question by its index."""


def _readings(
    histories: list[History], asked: list[AskedQuestion], setups: list[Setup], guides: list[list[int]]
) -> list[tuple[Reading, list[Place]]]:
    """What is to be read, history by history, and whose its replies will be, in their order."""
    found: dict[tuple[int, Setup, tuple[int, ...]], list[int]] = {}
    for index, (one, guide) in enumerate(zip(asked, guides, strict=True)):
        for setup in setups:
            guided = setup.policy is not None and POLICIES[setup.policy].queries == "guide"
            found.setdefault((one.history, setup, tuple(guide) if guided else ()), []).append(index)
    readings = []
    for (number, setup, guiding), questions in sorted(found.items(), key=lambda item: item[0][0]):
        history = histories[number]
        extra: dict[str, Any] = {}
        if setup.policy is not None:
            extra = {
                BUDGET: setup.budget(len(history.tokens), PAGE_TOKENS),
                POLICY: setup.policy,
                PROTECT: history.protected_tokens,
            }
            if guiding:
                extra[GUIDE] = list(guiding)
        mine = [Asked(suffix=asked[index].suffix, gold=asked[index].gold) for index in questions]
        reading = Reading(history=number, extra_args=extra, asked=mine)
        readings.append((reading, [(setup, index) for index in questions]))
    return readings


def _parts(readings: list[tuple[Reading, list[Place]]], count: int) -> list[list[tuple[Reading, list[Place]]]]:
    """At most `count` parts of about as many tokens to read: whole histories, each in one part alone."""
    numbers = sorted({reading.history for reading, _ in readings})
    shares = [numbers[start :: min(count, len(numbers))] for start in range(min(count, len(numbers)))]
    return [[one for one in readings if one[0].history in share] for share in shares]


def _rows(
    spec: FormatSpec,
    replies: list[Reply],
    order: list[Place],
    setups: list[Setup],
    asked: list[AskedQuestion],
    tokenizer: Any,
    longest: int,
    seed: int,
) -> list[report.ConversationRow]:
    outcomes = {setup: Outcome([], [], [], []) for setup in setups}
    found = dict(zip(order, replies, strict=True))
    for setup, outcome in outcomes.items():
        for index, one in enumerate(asked):
            reply = found[setup, index]
            said = tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()
            outcome.logprob.append(np.array(reply.logprobs))
            outcome.answers.append(said)
            outcome.f1.append(locomo.score(said, one.question))
            outcome.seconds.append(reply.seconds)
    rows = []
    for setup, outcome in outcomes.items():
        questions = [
            {
                "history": one.history,
                "question": one.question.text,
                "category": one.question.category.name.lower(),
                "gold": one.question.answer,
                "answer": said,
                "f1": f1,
                "likelihood": float(logprob.mean()),
            }
            for one, said, f1, logprob in zip(asked, outcome.answers, outcome.f1, outcome.logprob, strict=True)
        ]
        budget = None if setup == FULL else setup.budget(longest, PAGE_TOKENS)
        rows.append(report.ConversationRow(spec.label, setup, budget, setup_figures(outcomes, setup, seed), questions))
    return rows


def _notes(
    args: argparse.Namespace, specs: list[FormatSpec], histories: list[History], asked: list[AskedQuestion]
) -> list[str]:
    recent = max(spec.windows(args.model)[1] for spec in specs)
    late = max(2, -(-recent // PAGE_TOKENS) + 1) * PAGE_TOKENS
    tokens = sum(len(one.gold) for one in asked)
    notes = [
        f"{len(asked)} questions with {tokens} tokens of gold answers about {len(histories)} conversations; "
        "adversarial questions (category 5) are left out: they have no gold answer.",
        f"Beside its budget every policy still has the latest {late} tokens of the history or less, which are not "
        "evicted yet when the question is read.",
    ]
    if len(asked) < _FEW_QUESTIONS:
        notes.append(f"Intervals resampled from {len(asked)} questions are too narrow; raise --questions.")
    if BASELINE not in args.policies:
        notes.append(f"Without {BASELINE} among --policies nothing is compared with it.")
    return notes
