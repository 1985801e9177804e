"""One measured run of the engine in this process: what every benchmark here repeats.

Prompts are token ids, weights random in a model's true shapes; a run is timed from its first op to
its last, without the loading before it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one run told: its report, the recorder's sums (and spans if kept), its tokens by id."""

    report: Any
    recorder: Any
    plan: Any
    tokens: Mapping[str, Sequence[int]]
    errors: Mapping[str, str]

    @property
    def wall_s(self) -> float:
        """From the first op to the last; loading lies before it."""
        return float(self.report.total_s - self.report.load_s)

    @property
    def num_ops(self) -> int:
        return sum(self.recorder.num_ops.values())

    def link_bytes(self) -> dict[str, int]:
        return {link.name: link.bytes for link in self.report.links}


def llama_shape(
    directory: Path,
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    vocab: int,
    dtype: str = "float32",
) -> Path:
    """A Llama config of these sizes in `directory`; `load_format="dummy"` gives it weights."""
    config = {
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_prompts(path: Path, prompts: Sequence[Sequence[int]]) -> Path:
    lines = (json.dumps({"id": str(i), "prompt_token_ids": [*p]}) for i, p in enumerate(prompts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def uniform_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """`count` prompts of `length` different tokens each."""
    return [[3 + (7 * i + 13 * j) % (vocab - 3) for j in range(length)] for i in range(count)]


def run_trial(
    directory: Path,
    *,
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    given: Mapping[str, Any],
    device: str = "emulated",
    emulation: Any = None,
    load_format: str = "dummy",
    trace: Path | None = None,
    probes: Any = None,
) -> Trial:
    """Run a job in `directory`; `probes` are the engine's hooks for tests and benchmarks."""
    from flexpipe.job.probes import Probes
    from flexpipe.job.run import run_job
    from flexpipe.job.spec import JobSpec

    seen: dict[str, Any] = {}
    probes = replace(
        probes or Probes(),
        on_recorder=lambda recorder: seen.update(recorder=recorder),
        on_stage=_then(lambda stage: seen.update(plan=stage.plan), probes),
    )
    spec = JobSpec(
        model=str(model),
        input_path=write_prompts(directory / "prompts.jsonl", prompts),
        output_path=directory / "results.jsonl",
        max_tokens=max_tokens,
        device=device,
        emulation=emulation,
        given=given,
        load_format=load_format,  # type: ignore[arg-type]
        offload_dir=directory / "offload",
        trace_path=trace,
        overwrite=True,
        progress=False,
    )
    report = run_job(spec, probes)
    results = [json.loads(line) for line in spec.output_path.read_text("utf-8").splitlines()]
    return Trial(
        report=report,
        recorder=seen["recorder"],
        plan=seen["plan"],
        tokens={result["id"]: result["token_ids"] for result in results},
        errors={r["id"]: r["error"] for r in results if r.get("error")},
    )


def _then(note: Callable[[Any], None], probes: Any) -> Callable[[Any], None]:
    given = None if probes is None else probes.on_stage

    def both(stage: Any) -> None:
        note(stage)
        if given is not None:
            given(stage)

    return both


@dataclass(frozen=True, slots=True)
class Sample:
    """Repeated measurements of one thing: median, least and most."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({min(self.values):.3g}-{max(self.values):.3g})"

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "min": min(self.values), "max": max(self.values),
                "values": list(self.values)}  # fmt: skip


def machine() -> dict[str, Any]:
    """Commit, versions, cores and load: what a figure was measured on."""
    import torch

    facts = {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str | None:
    try:
        ran = subprocess.run(
            ["git", "-C", str(REPO), "describe", "--always", "--dirty"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; figures to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@contextmanager
def scratch(prefix: str = "flexpipe-bench-") -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=prefix) as directory:
        yield Path(directory)
