"""A compressed KV cache through the whole job: the reference's tokens from any tier, in any order,
and no byte beside those of the compressed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PlanError, PolicyError
from flexpipe.job.probes import Probes
from flexpipe.model import batch as batch_module
from flexpipe.plan.codec import Codec
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import STRATEGIES, percent_shares
from flexpipe.plan.tier import Tier
from tests.hf import (
    CODED_TIE,
    Reference,
    check_tokens,
    load_reference_model,
    ragged_prompts,
    reference_generate,
    widened_checkpoint,
)
from tests.runtime.conftest import LENGTHS, LIMITS
from tests.runtime.jobs import EVERYWHERE, EVERYWHERE_ON_CPU, Outcome, Runner

CODECS = (Codec(bits=4), Codec(bits=8))
FAMILIES = ("opt", "llama3", "mistral", "qwen2", "qwen3")
CHUNKED = {"max_batch_tokens": 12}
EVERY_TIER = {**EVERYWHERE, "micro_batch_size": 2}
# family, bits, device, knobs: all tiers, several micro-batches, chunks; each strategy once or more
CASES: list[tuple[str, Codec, str, Mapping[str, Any]]] = [
    ("opt", CODECS[0], "emulated", {**EVERY_TIER, "strategy": "event"}),
    ("llama3", CODECS[1], "cpu", {**EVERYWHERE_ON_CPU, **CHUNKED, "strategy": "multi"}),
    ("mistral", CODECS[0], "emulated", {**EVERY_TIER, **CHUNKED, "strategy": "single"}),
    ("qwen2", CODECS[0], "cpu", {**EVERYWHERE_ON_CPU, "strategy": "none"}),
    ("qwen3", CODECS[1], "emulated", {**EVERY_TIER, **CHUNKED, "strategy": "event"}),
]
References = Callable[[str, Codec], tuple[Runner, Reference]]


@pytest.fixture(scope="session")
def references(
    hf_checkpoint: Callable[..., Path],
    hf_reference: Callable[..., Reference],
    tmp_path_factory: pytest.TempPathFactory,
) -> References:
    """A family's runner, and what transformers says with a cache that compresses its own."""

    def both(variant: str, codec: Codec) -> tuple[Runner, Reference]:
        answers = hf_reference(variant, lengths=LENGTHS, max_new=max(LIMITS), kv_codec=codec)
        folder = tmp_path_factory.mktemp(variant)
        return Runner(hf_checkpoint(variant), folder, answers.prompts, LIMITS), answers

    return both


def compressing(codec: Codec) -> dict[str, Any]:
    return {"compress_cache": str(codec.bits), "compress_group": codec.group_size}


def check(outcome: Outcome, answers: Reference) -> None:
    """The reference's tokens, up to its ends and ties."""
    assert outcome.errors == (None,) * len(LENGTHS)
    for prompt, (tokens, limit) in enumerate(zip(outcome.tokens, LIMITS, strict=True)):
        tie = check_tokens(answers, prompt, tokens, CODED_TIE)
        expected = answers.tokens[prompt]
        end = expected.index(2) + 1 if 2 in expected else limit
        assert tie is not None or len(tokens) == min(limit, end)


@pytest.mark.parametrize(("variant", "codec", "device", "knobs"), CASES, ids=FAMILIES)
def test_every_family_emits_the_tokens_of_a_reference_that_compresses_its_own(
    references, variant, codec, device, knobs
):
    runner, answers = references(variant, codec)
    probes = Probes(poison=True)
    check(runner({**knobs, **compressing(codec)}, device=device, probes=probes), answers)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(
    ("device", "knobs"), [("emulated", {**EVERY_TIER, **CHUNKED}), ("cpu", EVERYWHERE_ON_CPU)]
)
def test_weights_vocabulary_and_cache_may_be_compressed_at_once(
    hf_checkpoint, tmp_path, device, knobs, codec
):
    """The emulated device's rows attend on the CPU too, where their cache is there."""
    source, bits = hf_checkpoint("llama3"), str(codec.bits)
    both = {"compress_weight": bits, "compress_vocabulary": bits}
    model = load_reference_model(widened_checkpoint(source, tmp_path / "widened", both))
    answers = reference_generate(model, ragged_prompts(LENGTHS), max(LIMITS), codec)
    runner = Runner(source, tmp_path, answers.prompts, LIMITS)
    check(runner({**knobs, **both, **compressing(codec)}, device=device), answers)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_rows_widened_a_few_at_a_time_emit_the_same_tokens(references, device, monkeypatch):
    """As on an accelerator, where no kernel attends in place."""
    monkeypatch.setattr(batch_module, "runs_here", lambda device: False)
    runner, answers = references("mistral", CODECS[0])
    knobs = EVERYWHERE_ON_CPU if device == "cpu" else EVERY_TIER
    probes = Probes(poison=True)
    check(runner({**knobs, **compressing(CODECS[0])}, device=device, probes=probes), answers)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_strategy_emits_them_on_every_tier(references, variant, codec, strategy):
    runner, answers = references(variant, codec)
    for _, _, device, knobs in CASES:
        given = {**knobs, **compressing(codec), "strategy": strategy}
        check(runner(given, device=device), answers)


@st.composite
def policies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    device = draw(st.sampled_from(["cpu", "emulated"]))
    percent = [0, draw(st.sampled_from([0, 50, 100])), 0, 0, 0, 100]
    percent[2:4] = draw(
        st.sampled_from([(0, 100), (0, 0), (0, 50)])
        if device == "cpu"
        else st.sampled_from([(100, 0), (0, 100), (0, 0), (34, 33), (50, 0), (0, 50)])
    )
    return device, {
        **percent_shares(percent),
        "micro_batch_size": draw(st.sampled_from([1, 2, 3, 7])),
        "num_micro_batches": draw(st.sampled_from([1, 2, 3])),
        "strategy": draw(st.sampled_from(STRATEGIES)),
        "separate_layers": draw(st.booleans()),
        "prefetch_depth": draw(st.sampled_from([1, 2, 7])),
        "max_batch_tokens": draw(st.sampled_from([8, 16, 64, 2048])),
        "cpu_attention": draw(st.booleans()),
    }


ANY = {"variant": st.sampled_from(["llama2", "qwen3"]), "codec": st.sampled_from(CODECS)}


def check_policy(
    references: References, variant: str, codec: Codec, policy: tuple[str, dict[str, Any]]
) -> None:
    device, knobs = policy
    runner, answers = references(variant, codec)
    try:
        outcome = runner({**knobs, **compressing(codec)}, device=device)
    except (PolicyError, PlanError) as error:
        assert "kv_cache" in str(error) or "weights" in str(error), str(error)
        return
    check(outcome, answers)


@settings(max_examples=12)
@given(**ANY, policy=policies())
def test_no_placement_and_no_chunking_shows_in_the_tokens(references, variant, codec, policy):
    check_policy(references, variant, codec, policy)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=500)
@given(**ANY, policy=policies())
def test_no_placement_and_no_chunking_shows_in_500_policies(references, variant, codec, policy):
    check_policy(references, variant, codec, policy)


@pytest.mark.parametrize("codec", [None, *CODECS], ids=str)
@pytest.mark.parametrize(("home", "cut"), [("gpu", (100, 0)), ("cpu", (0, 100)), ("disk", (0, 0))])
def test_planned_bytes_are_moved_bytes_are_the_bytes_of_the_codec(references, codec, home, cut):
    """Everything else rests beside the device, so that the links move the KV cache alone."""
    runner, _ = references("llama2", codec or CODECS[0])
    plans: list[Plan] = []
    outcome = runner(
        {
            **percent_shares([100, 0, *cut, 100, 0]),
            "micro_batch_size": 3,
            "num_micro_batches": 2,
            **(compressing(codec) if codec else {}),
        },
        probes=Probes(on_stage=lambda stage: plans.append(stage.plan)),
    )
    (plan,) = plans
    head_bytes = codec.row_bytes(16) if codec else 4 * 16
    token_bytes = 2 * 4 * head_bytes  # the tiny model has 4 KV heads
    assert plan.token_bytes == token_bytes
    kv_pools = {pool.tier: pool.num_bytes for pool in plan.pools if pool.name == "KV cache"}
    rooms = [
        len(mb.kv_homes) * mb.region_bytes(Tier(home), token_bytes) for mb in plan.micro_batches
    ]
    assert kv_pools == {Tier(home): 3 * sum(rooms)}

    moved = {link.name: link.bytes for link in outcome.report.links}
    answered = list(zip(LENGTHS, map(len, outcome.tokens), strict=True))
    loaded = sum(prompt + step for prompt, count in answered for step in range(count - 1))
    stored = sum(prompt + count - 1 for prompt, count in answered)
    fetched = 9 * sum(count for _, count in answered)  # a token and whether it is finite
    travels = home != "gpu"
    assert moved.get("h2d", 0) == 3 * token_bytes * loaded * travels
    missing = 3 * token_bytes * stored * travels - (moved["d2h"] - fetched)
    # nobody waits for the last step's stores, so the end of the run may find them undone
    assert missing % token_bytes == 0
    assert 0 <= missing <= 3 * token_bytes * 3 * travels
