# SPDX-License-Identifier: Apache-2.0
"""Measure what KV page formats cost in quality, on real vLLM engines fed as decoding reads.

Every format runs in its own engine on the same tokens. Text is fed in steps of at most --feed tokens, so each
prediction past the windows reads its history from the KV pages. `auto` always runs as the reference. Reported with 95 %
intervals: perplexity and its ratio to auto, KL(auto || format) over the whole vocabulary, top-1 agreement; and verbatim
recall of a sentence by depth. Several contexts (--context 2048,8192,32768) are fed to one engine a format, and reported
each. The chunks of one context never overlap; chunks of different contexts may share text.

--stress outliers=16 measures on a copy of the model that computes the same function with outliers in a few of its key
channels, as large models have them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation import launch, recall, report, stress, text
from vllm_kvcompress.evaluation.arguments import json_object, numbers
from vllm_kvcompress.evaluation.engine import Job, engine_arguments
from vllm_kvcompress.evaluation.metrics import text_figures
from vllm_kvcompress.evaluation.model_files import check_limit, load_model_files, sufficient_kv_bytes
from vllm_kvcompress.evaluation.plan import Plan, Sizes, pair_sizes
from vllm_kvcompress.evaluation.prompts import Prompt
from vllm_kvcompress.evaluation.specs import FormatSpec, parse_formats

SUMMARY = "measure perplexity, KL, top-1 agreement and recall of page formats against auto"

# Fewer scored positions a chunk than this are not worth starting an engine for.
_MIN_SCORED = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kvcompress eval`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="Hugging Face name or folder")
    parser.add_argument(
        "--formats",
        default="oscar-int2,hadamard-int2,int2",
        help="comma-separated --kv-cache-dtype values; NAME:KEY=VALUE,KEY=VALUE overrides settings of one "
        "(oscar-int2:recent_tokens=256,sink_tokens=64). Default: %(default)s",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help='text: .txt, or .jsonl with {"text": ...} lines')
    skip = "leave out this first part, e.g. what calibration has seen (default %(default)s)"
    parser.add_argument("--skip-fraction", type=float, default=0.6, metavar="F", help=skip)
    contexts = "tokens a chunk; several (2048,8192) are measured one after the other (default %(default)s)"
    parser.add_argument("--context", type=numbers, default="1024", metavar="N[,N...]", help=contexts)
    each = "one number, or one for each context"
    chunks = f"chunks of text: {each} (default %(default)s)"
    parser.add_argument("--chunks", type=numbers, default="8", metavar="N[,N...]", help=chunks)
    parser.add_argument(
        "--feed",
        type=int,
        default=64,
        help="most tokens fed a step; 1 = decoding, slower and a little worse (default %(default)s)",
    )
    outliers = (
        f"multiply the keys of {stress.PAIRS_PER_HEAD} RoPE pairs a KV head by FACTOR and divide the queries: scores "
        "stay. Formats that need a rotation file get one made for this model on the text --skip-fraction leaves out. "
        "Writes a copy of the weights to TMPDIR"
    )
    parser.add_argument("--stress", metavar="outliers=FACTOR", help=outliers)
    windows = parser.add_argument_group("settings of this package's formats")
    windows.add_argument("--sinks", type=int, metavar="S", help="first tokens kept exact")
    windows.add_argument("--recent", type=int, metavar="R", help="last tokens kept exact")
    past = (
        "measure past windows of these sizes even if no format has such, so that runs of different formats compare "
        "(default: the largest among the formats)"
    )
    windows.add_argument("--past-windows", type=numbers, default=[0, 0], metavar="S,R", help=past)
    windows.add_argument("--rotation", metavar="FILE", help="rotation file (default: where the engine looks)")
    windows.add_argument("--additional-config", type=json_object, default={}, metavar="JSON", help="as vLLM's")
    probe = parser.add_argument_group("verbatim-quote recall probe")
    depths = f"distances tried, 0 = no probe: {each} (default %(default)s)"
    probe.add_argument("--recall-depths", type=numbers, default="4", metavar="N[,N...]", help=depths)
    sentences = f"sentences a distance: {each} (default %(default)s)"
    probe.add_argument("--recall-sentences", type=numbers, default="3", metavar="N[,N...]", help=sentences)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", default="auto", help="model dtype (default %(default)s)")
    head = "dtype of the logits; a quantised output head needs `model` (default %(default)s)"
    engine.add_argument("--head-dtype", choices=("float32", "model"), default="float32", help=head)
    engine.add_argument("--max-model-len", type=int, help="default: the largest --context")
    engine.add_argument("--kv-bytes", type=int, help="bytes of KV cache (default: enough for the largest chunk)")
    more = 'further keyword arguments of vllm.LLM, e.g. {"tensor_parallel_size": 2}'
    jobs = (
        "engines at once, auto among them; each takes its own memory for weights and cache, and on one GPU starts only "
        "if gpu_memory_utilization in --engine-args leaves room for the others (default %(default)s)"
    )
    engine.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs)
    engine.add_argument("--engine-args", type=json_object, default={}, metavar="JSON", help=more)
    parser.add_argument("--seed", type=int, default=0, help="of sentences, bootstrap, stress (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("kvcompress-eval"), metavar="DIR", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Run the engines and report; 1 if any format failed."""
    _check_numbers(args)
    sizes = pair_sizes(
        args.context, chunks=args.chunks, recall_depths=args.recall_depths, recall_sentences=args.recall_sentences
    )
    largest = sizes[-1].context
    if args.max_model_len is not None and args.max_model_len < largest:
        raise KVCompressError(f"--max-model-len {args.max_model_len} is below --context {largest}")
    specs = parse_formats(args.formats, common=_common_settings(args), additional_config=args.additional_config)
    factor = None
    if args.stress is not None:
        factor = stress.parse_stress(args.stress)
        specs = stress.stressed_specs(specs, args.model, args.rotation)
    windows = {spec.label: spec.windows(args.model) for spec in specs}
    passed = [*windows.values(), tuple(args.past_windows)]
    first_position = max(sinks + recent for sinks, recent in passed)
    if sizes[0].context - 1 - first_position < _MIN_SCORED:
        raise KVCompressError(
            f"--context {sizes[0].context} leaves too few positions past the windows of {first_position} tokens; raise "
            "--context or lower --sinks and --recent"
        )
    # Before anything slow: a missing file should not be found out after loading a tokenizer.
    skipped, source = text.read_text(args.data, args.skip_fraction)
    model_config, tokenizer = load_model_files(args.model, args.engine_args)
    config = model_config.get_text_config()
    check_limit("--context", largest, config)
    stressed = None
    if factor is not None:
        stressed = stress.plan_stress(args.model, factor, seed=args.seed, config=model_config)
        if stress.needs_calibration(specs) and not skipped.strip():
            raise KVCompressError("--stress calibrates on the text that --skip-fraction leaves out: raise it above 0")
    plans = [_plan(one, source, tokenizer, passed, args) for one in sizes]
    prompts = [prompt for plan in plans for prompt in plan.prompts]
    notes = _notes(args, specs, windows)
    if stressed is not None and stress.needs_calibration(specs):
        notes.append(f"Rotation file made on the stressed model, on the first {args.skip_fraction:.0%} of --data.")
    settings = {
        **{name: value for name, value in vars(args).items() if name != "command"},
        # By ascending context, one number each.
        **{field.name: [getattr(one, field.name) for one in sizes] for field in dataclasses.fields(Sizes)},
        "stress": None if stressed is None else str(stressed),
        "first_position": first_position,
        "windows": windows,
        "kvcompress": version("vllm-kvcompress"),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    outcome = report.Report(settings, [], notes)
    kv_bytes = args.kv_bytes or sufficient_kv_bytes(config, largest)
    with tempfile.TemporaryDirectory(prefix="kvcompress-eval-") as scratch:
        model = args.model
        if stressed is not None:
            copy = Path(scratch) / "stressed"
            stressed.write(copy)
            if stress.needs_calibration(specs):
                stress.calibrate(copy, skipped)
            model = str(copy)
        tasks = [
            launch.Task(
                # The reference is the plain model's.
                _job(number, spec, model if number else args.model, Path(scratch), args, largest, kv_bytes),
                spec.label,
                args.out / "logs" / f"{number}-{spec.kv_cache_dtype}.log",
            )
            for number, spec in enumerate(specs)
        ]
        with closing(launch.run_engines(tasks, prompts, at_once=args.jobs)) as results:
            reference = next(results)
            if isinstance(reference, launch.EngineFailure):
                raise KVCompressError(f"the reference engine (auto) failed: {reference}")
            for number, (spec, recorded) in enumerate(zip(specs, itertools.chain([reference], results), strict=True)):
                if isinstance(recorded, launch.EngineFailure):
                    outcome.rows.extend(report.Row(spec, plan.context, error=str(recorded)) for plan in plans)
                else:
                    outcome.rows.extend(_rows(spec, recorded, reference, plans, args.seed))
                if number == 1 and stressed is not None:
                    notes.append(stress.check_preserved(outcome.rows[: len(plans)], outcome.rows[len(plans) :]))
                # Written after every format: an interrupted run keeps what it has.
                report.write_json(outcome, args.out / "eval.json")
    print(report.table(outcome))
    written = [str(args.out / "eval.json")]
    if report.write_plot(outcome, args.out / "eval.png"):
        written.append(str(args.out / "eval.png"))
    else:
        print("eval.png was not drawn: matplotlib is not installed", file=sys.stderr)
    print(f"Wrote {' and '.join(written)}")
    return 1 if any(row.error for row in outcome.rows) else 0


def _job(
    number: int, spec: FormatSpec, model: str, scratch: Path, args: argparse.Namespace, largest: int, kv_bytes: int
) -> Job:
    return Job(
        folder=scratch / str(number),
        reference_folder=scratch / "0" if number else None,
        feed=args.feed,
        engine_args=engine_arguments(
            model,
            kv_cache_dtype=spec.kv_cache_dtype,
            additional_config=spec.additional_config,
            feed=args.feed,
            max_model_len=args.max_model_len or largest,
            kv_bytes=kv_bytes,
            dtype=args.dtype,
            head_dtype=args.head_dtype,
            seed=args.seed,
            extra=args.engine_args,
        ),
    )


def _plan(sizes: Sizes, source: str, tokenizer: Any, windows: list[tuple[int, int]], args: argparse.Namespace) -> Plan:
    chunks = text.cut_chunks(source, tokenizer, sizes.chunks, sizes.context)
    first_position = max(sinks + recent for sinks, recent in windows)
    probes: list[recall.Probe] = []
    if sizes.recall_depths:
        probes = recall.build_probes(
            tokenizer,
            chunks[0],
            context=sizes.context,
            first_token=max(sinks for sinks, _ in windows),
            # A sentence that straddles the recent window would be read half exact.
            min_depth=max(recent for _, recent in windows) + args.feed,
            depths=sizes.recall_depths,
            sentences=sizes.recall_sentences,
            seed=args.seed,
        )
    return Plan(sizes.context, [Prompt(tokens, first_position, sizes.context - 1) for tokens in chunks], probes)


def _rows(
    spec: FormatSpec, recorded: launch.Recorded, reference: launch.Recorded, plans: list[Plan], seed: int
) -> list[report.Row]:
    rows = []
    first = 0
    for plan in plans:
        chunks = slice(first, first + len(plan.text))
        probes = slice(chunks.stop, chunks.stop + len(plan.probes))
        first = probes.stop
        figures = text_figures(
            recorded.logprob[chunks],
            reference.logprob[chunks],
            None if recorded.kl is None else recorded.kl[chunks],
            None if recorded.agree is None else recorded.agree[chunks],
            seed=seed,
        )
        curve = recall.recall_figures(plan.probes, recorded.logprob[probes], recorded.top1[probes])
        rows.append(report.Row(spec, plan.context, figures, curve, recorded.summary))
    return rows


def _common_settings(args: argparse.Namespace) -> dict[str, Any]:
    rotation = None if args.rotation is None else str(Path(args.rotation).absolute())
    given = {"sink_tokens": args.sinks, "recent_tokens": args.recent, "rotation": rotation}
    return {name: value for name, value in given.items() if value is not None}


def _check_numbers(args: argparse.Namespace) -> None:
    least = {
        "context": 2,
        "chunks": 1,
        "feed": 1,
        "recall_depths": 0,
        "recall_sentences": 1,
        "seed": 0,
        "kv_bytes": 1,
        "jobs": 1,
        "past_windows": 0,
    }
    if len(args.past_windows) != 2:
        raise KVCompressError(f"--past-windows takes two numbers, sinks and recent tokens, got {args.past_windows}")
    for name, low in least.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < low:
                raise KVCompressError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")


def _notes(args: argparse.Namespace, specs: list[FormatSpec], windows: dict[str, tuple[int, int]]) -> list[str]:
    recent = [windows[spec.label][1] for spec in specs if spec.ours]
    if recent and min(recent) < args.feed:
        return [
            f"--feed {args.feed} exceeds a recent window of {min(recent)}: most predictions saw far more exact tokens "
            "than in decoding. Lower --feed."
        ]
    return []
