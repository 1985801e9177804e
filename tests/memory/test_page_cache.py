"""What streams from disk does not fill the page cache, and the report says where it came from."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flexpipe.job.measure import DISK_BOUND_SHARE
from flexpipe.job.probes import Probes
from flexpipe.job.report import Report
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.memory import disk
from flexpipe.memory.disk import physical_bytes_read
from flexpipe.plan.policy import percent_shares
from tests.memory.test_disk import cached_share, on_disk

MIB = 1 << 20
SHAPE: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 96_000,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}


def run(folder: Path, probes: Probes | None = None) -> Report:
    """Three steps with all weights on disk."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    rng = random.Random(0)
    ids = [rng.randrange(3, 96_000) for _ in range(12)]
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt_token_ids": ids}) + "\n")
    return run_job(
        JobSpec(
            model=str(folder / "config.json"),
            input_path=folder / "prompts.jsonl",
            output_path=folder / "results.jsonl",
            max_tokens=3,
            device="cpu",
            given=percent_shares([0, 0, 0, 100, 0, 100]),
            load_format="dummy",
            offload_dir=folder / "offload",
            overwrite=True,
            progress=False,
        ),
        probes,
    )


def checkpoint(folder: Path) -> Path:
    (file,) = (folder / "offload" / "cache").glob("*.safetensors")
    return file


@pytest.mark.parametrize("direct", [True, False])
def test_streaming_weights_leaves_the_page_cache_flat(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(disk, "_direct_works", lambda path, device, writing: False)
    before = physical_bytes_read()
    report = run(tmp_path)
    after = physical_bytes_read()
    file = checkpoint(tmp_path)
    if not os.major(os.stat(file).st_dev):
        pytest.skip("the temporary directory is no real disk")
    (link,) = (link for link in report.links if link.name == "disk_read")
    cached = cached_share(file) * file.stat().st_size
    print(f"read {link.bytes / MIB:.0f} MiB, {cached / MIB:.1f} MiB in the page cache")
    assert file.stat().st_size > 200_000_000 and link.bytes > 2.5 * file.stat().st_size
    assert cached < 0.05 * link.bytes
    if direct and on_disk(file):
        assert before is not None and after is not None
        assert after - before >= DISK_BOUND_SHARE * link.bytes
    if direct and on_disk(file):
        assert report.notes == []


def test_a_run_fed_from_a_cache_says_that_it_tells_nothing_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file lies in the page cache beforehand and is read through it."""
    monkeypatch.setattr(disk, "_direct_works", lambda path, device, writing: False)
    monkeypatch.setattr(disk.DiskFile, "_used", lambda self, offset, num_bytes, dirty=False: None)
    run(tmp_path)
    for _ in range(3):  # pages may go again where memory is short
        with checkpoint(tmp_path).open("rb", buffering=0) as file:
            while file.read(64 * MIB):
                pass
        if cached_share(checkpoint(tmp_path)) == 1:
            break
    (note,) = run(tmp_path).notes
    assert note.startswith("the device read 0% of the bytes asked of the disk")
    assert "says nothing about the disk" in note
