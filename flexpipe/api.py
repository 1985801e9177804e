"""flexpipe from Python, in the shape that vLLM's users know.

    from flexpipe import LLM, SamplingParams

    llm = LLM(model="Qwen/Qwen3-8B", policy={"gpu_mem": "22GiB"})
    for output in llm.generate(["What is a lane?"], SamplingParams(max_tokens=64)):
        print(output.prompt, output.outputs[0].text)

Every call is one job through `run_job`, from the reading of the weights to their release, so many
prompts in one call are far faster than many calls. A job of hours belongs on the command line,
where an interrupted one goes on: here its files are temporary.

A prompt that cannot be run (empty, too long for the model) raises an InputError before anything is
loaded, as it does in vLLM. A request that fails later, for itself alone, comes back with
`finish_reason` "error".
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flexpipe.errors import InputError
from flexpipe.job.bench import release_memory
from flexpipe.job.params import SamplingParams
from flexpipe.job.result import FinishReason
from flexpipe.job.spec import JobSpec, LoadFormat
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import Policy
from flexpipe.plan.policy_file import PolicyFile
from flexpipe.preset import policy_file

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

Messages = Sequence[Mapping[str, str]]
Prompt = str | Mapping[str, Any]
_FAIL_FAST = re.compile(r"line (\d+): (.*) \(--fail-fast\)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One answer. `finish_reason` is "stop", "length" or "error", and then `error` says why."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A prompt, as it was given, and its answer: `outputs` always holds one.

    `prompt` is None for token ids and messages, `prompt_token_ids` for everything but token ids.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    """A model and how to use the machine for it; nothing is loaded before `generate`."""

    def __init__(
        self,
        model: str | Path,
        *,
        policy: str | Path | Mapping[str, Any] | None = None,
        device: str = "auto",
        emulation: Emulation | str | None = None,
        load_format: LoadFormat = "auto",
        revision: str | None = None,
        offload_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        """`policy` is a preset's name, a YAML file or a mapping of a policy file's fields; what it
        leaves out the plan chooses. `emulation` reads like `--emulate` and implies the device
        "emulated". `seed` draws dummy weights, and samples where no params are given.
        """
        if isinstance(emulation, str):
            emulation = Emulation.parse(emulation)
        if emulation is not None and device == "auto":
            device = "emulated"
        file = _policy_file(policy)
        Policy(**file.knobs)  # checks itself
        self._spec = JobSpec(
            model=str(model),
            input_path=Path("prompts.jsonl"),  # each call puts its own in their place
            output_path=Path("results.jsonl"),
            device=device,
            emulation=emulation,
            given=file.knobs,
            made_for=file.made_for,
            load_format=load_format,
            revision=revision,
            offload_dir=None if offload_dir is None else Path(offload_dir),
            seed=seed,
            fail_fast=True,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all prompts in one job; the outputs are in the order of the prompts.

        A prompt is a text, or a mapping like a line of `flexpipe run`'s input: one of `prompt`,
        `prompt_token_ids` and `messages`, and maybe an `id` and fields of its own that win over its
        params. Params are one for all or one for each. Without an `id` a request is called by its
        number, from 1, as `flexpipe run` does: samples depend on it and on the seed.
        """
        some = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params(sampling_params, len(some))
        lines = [_line(n, *pair) for n, pair in enumerate(zip(some, params, strict=True))]
        if not lines:
            return []
        records = self._run(lines, use_tqdm)
        ids = (str(line.get("id", number)) for number, line in enumerate(lines, 1))
        return [_output(line, records[id]) for line, id in zip(lines, ids, strict=True)]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        chats = [messages] if any(isinstance(item, Mapping) for item in messages) else messages
        return self.generate([{"messages": chat} for chat in chats], sampling_params, use_tqdm)

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            given = SamplingParams(seed=self._spec.seed)
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise InputError(
                f"{len(given)} sampling_params for {count} prompts; give one for all or one for "
                "each"
            )
        return list(given)

    def _run(self, lines: Sequence[Mapping[str, Any]], progress: bool) -> dict[str, dict[str, Any]]:
        """Each line's record, by its id."""
        with tempfile.TemporaryDirectory(prefix="flexpipe-") as name:
            directory = Path(name)
            spec = replace(
                self._spec,
                input_path=directory / "prompts.jsonl",
                output_path=directory / "results.jsonl",
                progress=progress,
            )
            with spec.input_path.open("w", encoding="utf-8") as file:
                file.writelines(f"{_json(index, line)}\n" for index, line in enumerate(lines))
            _run_job(spec)
            with spec.output_path.open(encoding="utf-8") as file:
                return {str(record["id"]): record for record in map(json.loads, file)}


def _policy_file(policy: str | Path | Mapping[str, Any] | None) -> PolicyFile:
    if policy is None or isinstance(policy, Mapping):
        return PolicyFile.of(policy or {})
    return PolicyFile.read(policy_file(str(policy)))


def _line(index: int, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
    """A prompt as a line of the job's input."""
    if isinstance(prompt, str):
        own: Mapping[str, Any] = {"prompt": prompt}
    elif isinstance(prompt, Mapping):
        own = prompt
    else:
        raise InputError(
            f"prompts[{index}] must be a text or a mapping with prompt, prompt_token_ids or "
            f"messages, got {type(prompt).__name__}"
        )
    return {**asdict(params), **own}


def _json(index: int, line: Mapping[str, Any]) -> str:
    try:
        return json.dumps(line)
    except (TypeError, ValueError) as error:  # arrays and tensors, say; .tolist() helps
        raise InputError(f"prompts[{index}] holds what JSON cannot say: {error}") from None


def _run_job(spec: JobSpec) -> None:
    from flexpipe.job.run import run_job  # imports torch, which `import flexpipe` need not

    release_memory()  # of the call before
    try:
        run_job(spec)
    except InputError as error:
        told = _FAIL_FAST.fullmatch(str(error))
        if told is None:
            raise
        raise InputError(f"prompts[{int(told[1]) - 1}]: {told[2]}") from None


def _output(line: Mapping[str, Any], record: Mapping[str, Any]) -> RequestOutput:
    tokens = line.get("prompt_token_ids")
    return RequestOutput(
        request_id=str(record["id"]),
        prompt=line.get("prompt"),
        prompt_token_ids=None if tokens is None else list(tokens),
        outputs=[
            CompletionOutput(
                index=0,
                text=record["text"],
                token_ids=record["token_ids"],
                finish_reason=record["finish_reason"],
                error=record.get("error"),
            )
        ],
    )
