"""The whole space of policies: what is legal runs and says the same, the rest is refused by
name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from flexpipe.errors import PlanError, PolicyError
from flexpipe.plan.policy import OPTION_NAMES, RESIDENT_DTYPES, STRATEGIES, percent_shares
from tests.hf import (
    Reference,
    load_reference_model,
    ragged_prompts,
    reference_generate,
    widened_checkpoint,
)
from tests.runtime.conftest import LENGTHS, LIMITS
from tests.runtime.jobs import EVERYWHERE, EVERYWHERE_ON_CPU, MIB, Runner

KNOBS = ("weights", "kv_cache", "hidden", *OPTION_NAMES, *OPTION_NAMES.values())


def pairs(*cuts: int) -> st.SearchStrategy[tuple[int, int]]:
    """Percent on gpu and on cpu of one kind of tensor, cut at these places."""
    ends = st.tuples(st.sampled_from([0, 100, *cuts]), st.sampled_from([0, 100, *cuts]))
    return ends.map(lambda ends: (min(ends), max(ends) - min(ends)))


@st.composite
def percents(draw: st.DrawFn, device: str) -> list[int]:
    """Six numbers; few items are cut more coarsely than many, and some are nonsense."""
    cut = [*draw(pairs(*range(10, 100, 5))), *draw(pairs(35, 50, 65)), *draw(pairs(50))]
    if device == "cpu" and draw(st.integers(0, 9)):
        cut = [0, cut[0] + cut[1], 0, cut[2] + cut[3], 0, cut[4] + cut[5]]
    if draw(st.integers(0, 20)) == 0:
        cut[draw(st.integers(0, 5))] += 7
    return cut


@st.composite
def jobs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A device and everything a user can set, each knob now and then left to the rule."""
    device = draw(st.sampled_from(["cpu", "emulated", "emulated"]))
    drawn = {
        "percent": draw(percents(device)),
        "micro_batch_size": draw(st.sampled_from([1, 2, 2, 3, 7])),
        "num_micro_batches": draw(st.sampled_from([1, 2, 3, 4])),
        "strategy": draw(st.sampled_from(STRATEGIES)),
        "separate_layers": draw(st.booleans()),
        "prefetch_depth": draw(st.sampled_from([1, 2, 3, 7, 50])),
        "max_batch_tokens": draw(st.sampled_from([8, 16, 64, 2048])),
        "resident_dtype": draw(st.sampled_from(RESIDENT_DTYPES)),
        "pin_weights": draw(st.booleans()),
        "cpu_attention": draw(st.booleans()),
    }
    left_out = draw(st.sets(st.sampled_from(sorted(drawn)), max_size=3))
    return device, {name: value for name, value in drawn.items() if name not in left_out}


EVERY_TIER = {
    **EVERYWHERE,
    "micro_batch_size": 2,
}  # three micro-batches, a tier for each one's hidden
VARIANTS = {"llama2": {}, "qwen2": {}, "opt-350m": {"dtype": "float16"}}
ANY = {
    "variant": st.sampled_from([*VARIANTS, "llama2"]),
    "job": jobs(),
}


@pytest.fixture(scope="session")
def runners(
    hf_checkpoint: Callable[..., Path],
    hf_reference: Callable[..., Reference],
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, tuple[Runner, Reference]]:
    """Models of several families: tied or not, narrow embeddings, weights in another dtype."""
    made = {}
    for variant, how in VARIANTS.items():
        answers = hf_reference(variant, lengths=LENGTHS, max_new=max(LIMITS), **how)
        folder = tmp_path_factory.mktemp(variant)
        runner = Runner(hf_checkpoint(variant, **how), folder, answers.prompts, LIMITS)
        made[variant] = (runner, answers)
    return made


@pytest.fixture(scope="session")
def compressed(
    hf_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[Runner, Reference]]:
    """By bits of the matrices: a tied model, and what is said of it with widened weights."""
    source, made = hf_checkpoint("qwen2"), {}
    for weight in ("none", "4"):
        folder = tmp_path_factory.mktemp("compressed")
        knobs = {"compress_weight": weight, "compress_vocabulary": "8"}
        model = load_reference_model(widened_checkpoint(source, folder / "widened", knobs))
        answers = reference_generate(model, ragged_prompts(LENGTHS), max(LIMITS))
        made[weight] = Runner(source, folder, answers.prompts, LIMITS), answers
    return made


def check_policy(runner: Runner, answers: Reference, device: str, asked: dict[str, Any]) -> None:
    """A policy runs and gives the reference's tokens, or is refused with a knob's name."""
    try:
        given = {name: value for name, value in asked.items() if name != "percent"}
        if "percent" in asked:
            given |= percent_shares(asked["percent"])
        outcome = runner(given, device=device)
    except (PolicyError, PlanError) as error:
        event(f"refused: {type(error).__name__}")
        assert any(name in str(error) for name in KNOBS), str(error)
        return
    event(f"ran on {device}")
    assert outcome.errors == (None,) * len(LENGTHS)
    for tokens, expected, limit in zip(outcome.tokens, answers.tokens, LIMITS, strict=True):
        end = expected.index(2) + 1 if 2 in expected else limit  # 2 ends a text
        assert tokens == expected[: min(limit, end)]


@settings(max_examples=25)
@given(**ANY)
def test_any_policy_runs_with_the_reference_tokens_or_is_refused_by_name(runners, variant, job):
    check_policy(*runners[variant], *job)


@settings(max_examples=15)
@given(job=jobs(), weight=st.sampled_from(["none", "4"]))
def test_any_policy_with_compressed_weights_gives_the_tokens_of_the_widened_model(
    compressed, job, weight
):
    device, asked = job
    knobs = {"compress_weight": weight, "compress_vocabulary": "8"}
    check_policy(*compressed[weight], device, {**asked, **knobs})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1000)
@given(**ANY)
def test_a_thousand_policies_run_with_the_reference_tokens_or_are_refused_by_name(
    runners, variant, job
):
    check_policy(*runners[variant], *job)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("device", "base"), [("emulated", EVERY_TIER), ("cpu", EVERYWHERE_ON_CPU)])
def test_every_strategy_emits_the_reference_tokens(run, reference, device, base, strategy):
    assert run({**base, "strategy": strategy}, device=device).tokens == reference


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_without_any_knob_the_rule_makes_a_plan_that_runs(run, reference, device):
    assert run({}, device=device).tokens == reference


@pytest.mark.parametrize("name", ["weights", "kv_cache", "hidden"])
def test_a_gpu_share_on_the_cpu_is_refused_with_the_way_out(run, name):
    percent = {"weights": [50, 50, 0, 100, 0, 100], "kv_cache": [0, 100, 50, 50, 0, 100]}
    shares = percent_shares(percent.get(name, [0, 100, 0, 100, 50, 50]))
    with pytest.raises(PolicyError, match=rf"{name}\.gpu is 0\.5.*use --device emulated"):
        run(shares, device="cpu")


def test_a_tier_that_was_asked_for_and_got_nothing_is_refused_by_name(run):
    shares = percent_shares([99, 1, 100, 0, 100, 0])
    with pytest.raises(PolicyError, match=r"weights\.cpu asks for a share of 0\.01"):
        run(shares)


def test_bytes_asked_and_achieved_are_reported_per_tier(run):
    report = run({**EVERY_TIER, **percent_shares([20, 50, 34, 33, 34, 33])}).report
    found = {(use.kind, use.tier): use for use in report.shares}
    assert len(found) == 9
    for use in report.shares:
        assert use.bytes > 0
        assert use.asked > 0
    assert sum(found["weights", tier].achieved for tier in ("gpu", "cpu", "disk")) == (
        pytest.approx(1)
    )
    assert math.isclose(found["weights", "gpu"].achieved, 0.2, abs_tol=0.1)


@settings(max_examples=12)
@given(gpu_kib=st.integers(200, 4000), extra_mib=st.integers(0, 40))
def test_whatever_budget_is_given_the_run_fits_it_or_is_refused_with_the_shortfall(
    run, reference, gpu_kib, extra_mib
):
    given = {"gpu_mem": gpu_kib * 1024, "cpu_mem": (600 + extra_mib) * MIB}
    try:
        outcome = run(given)
    except PlanError as error:
        assert "gpu needs" in str(error) or "cpu needs" in str(error)
        assert "more than its budget" in str(error)
        return
    for tokens, expected, problem in zip(outcome.tokens, reference, outcome.errors, strict=True):
        if problem is None:
            assert tokens == expected
        else:  # a request too long for the rest
            assert "does not fit the budgets even alone" in problem
    gpu = next(use for use in outcome.report.tiers if use.tier == "gpu")
    assert gpu.planned_bytes <= gpu_kib * 1024
    assert gpu.measured_bytes <= gpu.planned_bytes
