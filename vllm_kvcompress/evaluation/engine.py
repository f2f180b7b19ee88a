# SPDX-License-Identifier: Apache-2.0
"""One format's engine, in a process of its own: `python -m vllm_kvcompress.evaluation.engine JOB.json`."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvcompress.errors import KVCompressError

_POLL_SECONDS = 0.05


class EngineJob(BaseModel):
    """What the process of an engine is told, and the files by which it answers."""

    model_config = ConfigDict(extra="forbid")

    folder: Path
    """Where what is to be fed lies, and results, summary.json or error.txt go."""
    engine_args: dict[str, Any]
    """Keyword arguments of vllm.LLM."""
    parent: int = Field(default_factory=os.getpid)
    """Who wants the results: the process that makes the job and starts its engine."""

    @property
    def gpus(self) -> int:
        """How many the engine takes, on a machine that has them."""
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        return math.prod(self.engine_args.get(size, 1) for size in sizes)

    @property
    def progress_file(self) -> Path:
        """One byte for each prompt done."""
        return self.folder / "progress"

    @property
    def error_file(self) -> Path:
        return self.folder / "error.txt"

    @property
    def summary_file(self) -> Path:
        return self.folder / "summary.json"

    def count_one(self) -> None:
        """One more prompt is done."""
        with self.progress_file.open("ab") as progress:
            progress.write(b".")

    def check_parent(self) -> None:
        """
        Raises:
            KVCompressError: nobody is left to want the results.
        """
        if os.getppid() != self.parent:
            raise KVCompressError(f"the evaluation that started this engine (process {self.parent}) has ended")


class Job(EngineJob):
    """One format's text chunks and probes. Files of one prompt carry its index."""

    reference_folder: Path | None
    """The reference's folder; None when this is the reference. It may still be filling."""
    feed: int

    def result_file(self, index: int) -> Path:
        return self.folder / f"prompt{index}.safetensors"

    @property
    def reference(self) -> Job | None:
        """Where the reference's files lie."""
        return None if self.reference_folder is None else self.model_copy(update={"folder": self.reference_folder})


class Summary(BaseModel):
    """What the engine reports about itself."""

    start_seconds: float
    feed_seconds: float
    """Without waiting for the reference."""
    largest_step: int
    versions: dict[str, str]
    device: str
    dtype: str
    kv_cache_blocks: int | None
    block_size: int | None


def engine_arguments(
    model: str,
    *,
    kv_cache_dtype: str,
    additional_config: dict[str, Any],
    feed: int,
    max_model_len: int,
    kv_bytes: int,
    dtype: str,
    head_dtype: str,
    seed: int,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM under which history is read from the pages as in decoding."""
    arguments: dict[str, Any] = {
        "model": model,
        "kv_cache_dtype": kv_cache_dtype,
        "additional_config": additional_config,
        # One request alone, in steps of `feed`: see the package's docstring.
        "max_num_seqs": 1,
        "max_num_batched_tokens": feed,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "max_model_len": max_model_len,
        "kv_cache_memory_bytes": kv_bytes,
        "dtype": dtype,
        "seed": seed,
        # The recorder's hook must run in every step; it also starts without compiling or capturing graphs.
        "enforce_eager": True,
        "worker_extension_cls": "vllm_kvcompress.evaluation.recorder.EvaluationRecorder",
        # Tokens in, numbers out.
        "skip_tokenizer_init": True,
    }
    if head_dtype != "model":
        arguments["hf_overrides"] = {"head_dtype": head_dtype}
    return arguments | extra


def run_job(job: Job) -> Summary:
    """Start the engine, feed every prompt, leave one result file each."""
    from vllm import LLM, SamplingParams

    prompts = json.loads((job.folder / "prompts.json").read_text())
    started = time.perf_counter()
    llm = LLM(**job.engine_args)
    ready = time.perf_counter()
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    largest = 0
    waited = 0.0
    for index, prompt in enumerate(prompts):
        asked = time.perf_counter()
        reference = await_reference(job, index)
        waited += time.perf_counter() - asked
        llm.collective_rpc(
            "kvcompress_eval_begin", args=(prompt["tokens"], prompt["start"], prompt["stop"], reference, job.feed)
        )
        llm.generate({"prompt_token_ids": prompt["tokens"][:-1]}, sampling, use_tqdm=False)
        steps = llm.collective_rpc("kvcompress_eval_end", args=(str(job.result_file(index)),))
        largest = max(largest, *steps)
        job.count_one()
    return Summary(
        start_seconds=ready - started,
        feed_seconds=time.perf_counter() - ready - waited,
        largest_step=largest,
        **describe(llm),
    )


def await_reference(job: Job, index: int) -> str | None:
    """File of the reference's result of one prompt, once it is there; None when this is the reference.

    Raises:
        KVCompressError: it will not come, or nobody is left to want it.
    """
    while True:
        job.check_parent()
        reference = job.reference
        if reference is None:
            return None
        if reference.result_file(index).exists():
            return str(reference.result_file(index))
        if reference.error_file.exists():
            raise KVCompressError(f"the reference engine failed: {reference.error_file.read_text().strip()}")
        time.sleep(_POLL_SECONDS)


def describe(llm: Any) -> dict[str, Any]:
    """What `Summary` says of an engine besides times."""
    import torch
    import transformers
    import vllm

    config = llm.llm_engine.vllm_config
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "vllm": vllm.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
    }


def _reason(error: BaseException) -> str:
    """What to tell the user: pydantic wraps a refusal in a dump of the whole configuration, which nobody reads."""
    if isinstance(error, ValidationError):
        return "; ".join(details["msg"].removeprefix("Value error, ") for details in error.errors(include_input=False))
    return str(error) if isinstance(error, KVCompressError) else f"{type(error).__name__}: {error}"


def main(argv: list[str]) -> int:
    """Run the job of a file; on failure leave the reason in error.txt, for the parent to tell."""
    job = Job.model_validate_json(Path(argv[0]).read_text())
    return report_outcome(job, lambda: run_job(job))


def report_outcome(job: EngineJob, run: Callable[[], Summary]) -> int:
    """Run, and leave the summary or the reason of a failure where the parent looks; the process's exit status."""
    try:
        summary = run()
    except BaseException as error:
        traceback.print_exc()
        _write(job.error_file, _reason(error))
        return 1
    _write(job.summary_file, summary.model_dump_json())
    return 0


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another process may be looking for the file."""
    partial = path.with_suffix(".part")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
