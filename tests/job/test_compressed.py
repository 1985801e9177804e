"""Compressed weights end to end: the tokens of a model that holds what is left of its matrices."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flexpipe.errors import InputError, ModelError, PlanError
from flexpipe.job.probes import Probes
from flexpipe.memory.disk import DiskFile
from flexpipe.plan.codec import Codec
from flexpipe.plan.layout import Part
from flexpipe.plan.placement import is_shared, meets_vocabulary
from flexpipe.plan.policy import percent_shares
from flexpipe.plan.tier import Tier
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.op import Kind, Op
from tests.hf import load_reference_model, ragged_prompts, reference_generate, widened_checkpoint
from tests.job.test_run import MAX_NEW, Logits, check_logits, check_records, run

LENGTHS = (1, 31, 70)
BOTH = {"compress_weight": "4", "compress_vocabulary": "8"}
TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float16",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

# (variant, dtype, device, shares, knobs): together every home, tied and untied, heads in slices
CASES: Mapping[str, tuple[str, str, str, tuple[int, ...], Mapping[str, Any]]] = {
    "resident": ("llama3", "float32", "cpu", (0, 100, 0, 100, 0, 100), BOTH),
    "tied from disk": ("qwen2", "bfloat16", "cpu", (0, 0, 0, 100, 0, 100), BOTH),
    "tied, resident": (
        *("llama3-tied", "float16", "cpu", (0, 100, 0, 50, 0, 100)),
        {**BOTH, "compress_vocabulary": "4", "strategy": "none"},
    ),
    "projections on every tier": (
        *("opt-350m", "float32", "emulated", (30, 40, 30, 40, 50, 50)),
        {**BOTH, "compress_group": 32},
    ),
    "all tiers": (
        *("mistral", "bfloat16", "emulated", (30, 40, 100, 0, 100, 0)),
        {**BOTH, "strategy": "none", "separate_layers": True},
    ),
    "from host memory": (
        *("opt", "float16", "emulated", (0, 100, 0, 100, 100, 0)),
        {**BOTH, "compress_weight": "8", "compress_group": 96},
    ),
    "resident on the accelerator": (
        *("qwen3", "float32", "emulated", (100, 0, 0, 100, 0, 100)),
        {"compress_weight": "8", "compress_vocabulary": "4", "strategy": "none"},
    ),
    "vocabulary alone": (
        *("qwen2", "float32", "emulated", (0, 0, 0, 100, 0, 100)),
        {"compress_vocabulary": "4"},
    ),
    "matrices alone": (
        *("llama-linear", "float32", "cpu", (0, 30, 0, 40, 0, 100)),
        {"compress_weight": "4", "resident_dtype": "checkpoint"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_are_those_of_the_widened_matrices(
    hf_checkpoint: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    variant, dtype, device, shares, knobs = CASES[case]
    source = hf_checkpoint(variant, dtype=dtype)
    model = load_reference_model(widened_checkpoint(source, tmp_path / "widened", knobs))
    reference = reference_generate(model, ragged_prompts(LENGTHS), MAX_NEW)
    given = {
        **percent_shares(shares),
        **knobs,
        "micro_batch_size": 2,
        "num_micro_batches": 2,
        "max_batch_tokens": 90,
        "compute_dtype": "float32",
    }
    seen = Logits()
    probes = Probes(before_op=seen.before_op, on_stage=seen.on_stage, poison=True)
    _, records = run(source, tmp_path, reference.prompts, device, given, probes=probes)
    check_records(reference, records)
    check_logits(reference, records, seen)


@dataclass
class Moves:
    """What the ops that a run has done should have moved, by link, told by their plan."""

    num_bytes: Counter[str] = field(default_factory=Counter)
    stage: Stage | None = None

    def on_stage(self, stage: Stage) -> None:
        self.stage = stage

    def on_recorder(self, recorder: Recorder) -> None:
        add = recorder.add

        def noted(op: Op, start_s: float, end_s: float) -> None:
            add(op, start_s, end_s)
            self._done(op)

        recorder.add = noted  # type: ignore[method-assign]

    def _done(self, op: Op) -> None:
        assert self.stage is not None
        plan = self.stage.plan
        layout = plan.layers[op.layer].streamed
        tokens = [token for row in op.batch.rows for token in row.tokens] if op.batch else []
        row_bytes = Codec(bits=8).row_bytes(plan.config.input_size)
        if op.kind == Kind.LOAD_WEIGHT:
            self.num_bytes["h2d"] += layout.num_bytes
        elif op.kind == Kind.READ_WEIGHT:
            self.num_bytes["disk_read"] += layout.read_bytes
        elif op.kind == Kind.LOAD_EMBED:
            self.num_bytes["h2d"] += len(tokens) * row_bytes
        elif op.kind == Kind.READ_EMBED and plan.embed_home == Tier.DISK:
            self.num_bytes["disk_read"] += len(set(tokens)) * row_bytes


@pytest.mark.parametrize(
    ("device", "shares"),
    [("emulated", (0, 100)), ("emulated", (0, 0)), ("emulated", (30, 40)), ("cpu", (0, 40))],
)
def test_planned_bytes_are_moved_bytes_and_those_of_the_codec(
    hf_checkpoint: Callable[..., Path],
    tmp_path: Path,
    device: str,
    shares: tuple[int, int],
) -> None:
    moves = Moves()
    probes = Probes(on_stage=moves.on_stage, on_recorder=moves.on_recorder)
    rest = (100, 0, 100, 0) if device == "emulated" else (0, 100, 0, 100)
    given = {**percent_shares((*shares, *rest)), **BOTH, "micro_batch_size": 3}
    report, _ = run(
        hf_checkpoint("llama3"), tmp_path, ragged_prompts((5, 9, 20)), device, given, probes=probes
    )
    moved = {link.name: link.bytes for link in report.links if link.name != "d2h"}
    assert moved == +moves.num_bytes != {}

    assert moves.stage is not None
    plan = moves.stage.plan
    seen = 0
    for layer in plan.layers:
        parts = layer.streamed.parts
        codes = [codec_bytes(part) for part in parts if part.tensor.codec]
        seen += sum(codes)
        least = sum(codes) + sum(part.num_bytes for part in parts if not part.tensor.codec)
        # packed tensors start on a cache line, those from disk come in whole blocks
        assert (
            least
            <= layer.streamed.num_bytes
            <= least
            + 64 * len(parts)
            + 4096 * (1 + 2 * sum(part.tensor.home == Tier.DISK for part in parts))
        )
    matrices = [placed for placed in plan.placement.tensors.values() if is_shared(placed.spec)]
    assert all(
        placed.codec and placed.num_bytes == codec_bytes(Part(placed)) for placed in matrices
    )
    assert seen > 0
    uses = {use.tier: use.bytes for use in report.shares if use.kind == "weights"}
    assert uses == {
        tier: total
        for tier in Tier
        if (total := sum(placed.num_bytes for placed in matrices if placed.home == tier))
    }


def codec_bytes(part: Part) -> int:
    """Of the part's rows, scales included: FlexGen's figures for 64 in features and a group."""
    spec = part.tensor.spec
    bits = 8 if meets_vocabulary(spec) else 4
    groups = -(-spec.shape[1] // 64)
    return part.shape[0] * (-(-spec.shape[1] * bits // 8) + 4 * groups)


def test_the_next_run_reads_compressed_weights_and_no_others(
    hf_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_checkpoint("llama3")
    reads: list[tuple[Path, int, int]] = []
    real = DiskFile.read_into

    def read_into(file: DiskFile, out: Any, offset: int) -> None:
        reads.append((file.path, offset, len(out)))
        real(file, out, offset)

    monkeypatch.setattr(DiskFile, "read_into", read_into)
    given = {**percent_shares((30, 40, 100, 0, 100, 0)), **BOTH}
    prompts = ragged_prompts(LENGTHS)
    _, first = run(source, tmp_path, prompts, "emulated", given)
    from_source = sum(size for path, _, size in reads if path.parent == source)
    reads.clear()
    _, second = run(source, tmp_path, prompts, "emulated", given)
    again = [(offset, size) for path, offset, size in reads if path.parent == source]
    norms = 64 * 4  # vectors of one row
    assert from_source > 100_000 and {size for _, size in again} == {norms}
    assert [record["token_ids"] for record in first.values()] == [
        record["token_ids"] for record in second.values()
    ]


def test_a_damaged_file_is_noticed_by_the_next_run(
    hf_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {**percent_shares((0, 0, 0, 100, 0, 100)), **BOTH}
    prompts = ragged_prompts((20, 7))
    _, before = run(hf_checkpoint("qwen2"), tmp_path, prompts, "cpu", given)
    files = sorted((tmp_path / "offload/cache/forms").glob("*[!k]"))
    for path in files[::2]:
        data = bytearray(path.read_bytes())
        data[5000] ^= 0xFF
        path.write_bytes(data)
    _, after = run(hf_checkpoint("qwen2"), tmp_path, prompts, "cpu", given)
    assert after == before
    told = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(told) == len(files[::2]) > 5


def test_a_plan_is_refused_before_anything_is_compressed(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    given = {**percent_shares((100, 0, 100, 0, 100, 0)), **BOTH, "gpu_mem": 200 * 1024}
    with pytest.raises(PlanError, match="gpu needs"):
        run(hf_checkpoint("llama3"), tmp_path, [[5] * 20], "emulated", given)
    given = {**percent_shares((0, 100, 0, 100, 0, 100)), **BOTH, "disk_mem": 4096}
    with pytest.raises(PlanError, match=r"disk needs .*\(weights to compress or repack .* KiB\)"):
        run(hf_checkpoint("llama3"), tmp_path, [[5] * 20], "cpu", given)
    assert not (tmp_path / "offload/cache/forms").exists()


def test_what_the_disk_takes_is_what_was_planned(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    given = {**percent_shares((0, 100, 0, 100, 0, 100)), **BOTH}
    report, _ = run(hf_checkpoint("llama3"), tmp_path, [[5] * 20], "cpu", given)
    (disk,) = (use for use in report.tiers if use.tier == "disk")
    files = (tmp_path / "offload/cache/forms").glob("*[!k]")
    assert disk.measured_bytes == disk.planned_bytes == sum(path.stat().st_size for path in files)
    report, _ = run(hf_checkpoint("llama3"), tmp_path, [[5] * 20], "cpu", given)
    assert "disk" not in {use.tier for use in report.tiers}


def test_weights_that_cannot_be_compressed_are_refused_by_name(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(hf_checkpoint("llama3"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds numbers"):
        run(source, tmp_path, [[5] * 20], "cpu", {"compress_weight": "4"})


def test_a_job_goes_on_only_with_the_compression_it_began_with(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = hf_checkpoint("llama3")

    def go_on(**given: Any) -> None:
        run(source, tmp_path, [[5] * 20], "cpu", given, overwrite=False)

    go_on()
    go_on(compress_group=128)  # nothing has groups
    with pytest.raises(InputError, match="compressed weights was absent, is 4 bits"):
        go_on(compress_weight="4")
    run(source, tmp_path, [[5] * 20], "cpu", {"compress_vocabulary": "8"})
    with pytest.raises(InputError, match="of 64, format 1, is 8 bits in groups of 128"):
        go_on(compress_vocabulary="8", compress_group=128)


def test_the_layers_of_a_dummy_share_their_files(tmp_path: Path) -> None:
    shape = {**TINY_LLAMA, "num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    given = {"compress_weight": "4", **percent_shares((0, 0, 0, 100, 0, 100))}
    run(tmp_path, tmp_path, [[5] * 20], "cpu", given, load_format="dummy")
    files = list((tmp_path / "offload/cache/forms").glob("*[!k]"))
    assert len(files) == 7  # q, k, v, o, gate, up, down
