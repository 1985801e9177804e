"""Whatever the number of stages, blocks and chunks: the tokens are those of one stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError, RunError
from flexpipe.job.params import SamplingParams
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.policy import percent_shares
from flexpipe.runtime.stage import OpHook
from flexpipe.schedule.op import Kind, Op
from tests.hf import Reference
from tests.runtime.conftest import LENGTHS, LIMITS
from tests.runtime.policies import placements, policies
from tests.runtime.ring import Ring, Tokens

VARIANTS = ("llama2-deep", "qwen2-windows-deep")  # the second one is tied
NUM_LAYERS = 8
PERCENT = (
    [100, 0, 100, 0, 100, 0],
    [0, 100, 0, 100, 0, 100],
    [0, 0, 0, 0, 0, 0],
    [20, 40, 50, 50, 50, 50],
    [0, 50, 50, 0, 0, 50],
)


def cut(num_stages: int, num_chunks: int = 1, **how: Any) -> Pipeline:
    """Eight layers, the earlier stages having fewer where they do not divide."""
    count = num_stages * num_chunks
    size, more = divmod(NUM_LAYERS, count)
    layers = tuple(size + (stage >= count - more) for stage in range(count))
    return Pipeline(layers=layers, num_stages=num_stages, **how)


@pytest.fixture(scope="session")
def rings(
    hf_checkpoint: Callable[..., Path],
    hf_reference: Callable[..., Reference],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Ring, Tokens]]:
    """A model of a family and what transformers answers, cut where our runs stop."""

    @cache
    def made(variant: str) -> tuple[Ring, Tokens]:
        answers = hf_reference(variant, lengths=LENGTHS, max_new=max(LIMITS))
        ring = Ring(
            hf_checkpoint(variant), tmp_path_factory.mktemp(variant), answers.prompts, LIMITS
        )
        ends = set(ring.config.eos_token_ids)
        expected = tuple(
            tokens[: next((i + 1 for i, t in enumerate(tokens[:limit]) if t in ends), limit)]
            for tokens, limit in zip(answers.tokens, LIMITS, strict=True)
        )
        return ring, expected

    return made


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    num_stages = draw(st.integers(1, 4))
    num_chunks = draw(st.sampled_from([1, 1, 2])) if num_stages > 1 else 1
    num_blocks = draw(st.sampled_from([1, num_stages, 2 * num_stages]))
    return cut(num_stages, num_chunks, num_blocks=num_blocks, async_comm=draw(st.booleans()))


def check(ring: Ring, expected: Tokens, data: st.DataObject) -> None:
    pipeline = data.draw(pipelines())
    device = data.draw(st.sampled_from(["cpu", "emulated", "emulated"]))
    if data.draw(st.booleans()):
        given: Any = data.draw(policies(device, PERCENT))
    else:  # every stage places its tensors as it likes
        given = [data.draw(policies(device, PERCENT))] * pipeline.num_stages
        for rank in range(1, pipeline.num_stages):
            given[rank] = {**given[0], **data.draw(placements(device, PERCENT))}
    try:
        tokens = ring(given, pipeline, device=device)
    except PolicyError as error:
        assert "asks for a share" in str(error)
        assume(False)
    assert tokens == expected


@settings(max_examples=12)
@given(data=st.data(), variant=st.sampled_from(VARIANTS))
def test_any_pipeline_gives_the_reference_tokens(rings, variant, data):
    check(*rings(variant), data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=1000)
@given(data=st.data(), variant=st.sampled_from([*VARIANTS, "opt-350m-deep"]))
def test_a_thousand_pipelines_give_the_reference_tokens(rings, variant, data):
    check(*rings(variant), data)


EVERYWHERE = {
    **percent_shares([20, 40, 50, 0, 50, 0]),
    "micro_batch_size": 1,
    "num_micro_batches": 2,
    "max_batch_tokens": 8,
}


def test_stages_that_place_rows_differently_understand_each_other(rings):
    """Where homes differ, rows lie in another order; messages have one of their own."""
    ring, expected = rings("llama2-deep")
    apart = [
        {**EVERYWHERE, **percent_shares(percent), "micro_batch_size": 3, "cpu_attention": True}
        for percent in ([0, 100, 40, 30, 100, 0], [0, 100, 0, 50, 100, 0], [0, 100, 60, 0, 0, 100])
    ]
    assert ring(apart, cut(3, num_blocks=2)) == expected


def test_compressed_weights_give_the_tokens_of_one_stage_with_compressed_weights(rings):
    ring, _ = rings("qwen2-windows-deep")
    knobs = {**EVERYWHERE, "compress_weight": "4", "compress_vocabulary": "8"}
    assert ring(knobs, cut(2, num_blocks=2)) == ring(knobs)


def test_samples_do_not_depend_on_the_number_of_stages(rings):
    greedy, _ = rings("llama2-deep")
    params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, seed=3)
    ring = Ring(greedy.model, greedy.folder / "sampled", greedy.prompts, LIMITS, params)
    assert ring(EVERYWHERE, cut(4, num_blocks=4)) == ring(EVERYWHERE)


FAULTS = {
    Kind.COMPUTE: 1,
    Kind.LOAD_WEIGHT: 1,
    Kind.RECEIVE_HIDDEN: 2,
    Kind.SEND_HIDDEN: 1,
    Kind.SEND_TOKENS: 2,
    Kind.RECEIVE_TOKENS: 0,
    Kind.COMMIT: 0,
}


@pytest.mark.parametrize(("kind", "rank"), FAULTS.items())
def test_a_failure_on_any_stage_ends_all_and_names_stage_layers_and_op(rings, kind, rank):
    ring, _ = rings("llama2-deep")

    def hook(of: int) -> OpHook:
        def fail(op: Op) -> None:
            if of == rank and op.kind == kind and op.step == 2:
                raise ValueError("too hot")

        return fail

    before, began = threading.active_count(), time.monotonic()
    layers = ["0-1", "2-4", "5-7"][rank]
    told = rf"^stage {rank} \(rank {rank}, layers {layers}\): {kind.value} .*ValueError: too hot"
    with pytest.raises(RunError, match=told):
        ring(EVERYWHERE, cut(3, num_blocks=3), before_op=hook)
    assert time.monotonic() - began < 20
    assert threading.active_count() == before
