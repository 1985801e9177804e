"""Every dependency of the schedule is needed, and together they are enough.

The mutants are real runs of a tiny model. Slots hold rubbish until they are filled; an adversary
drops one kind of edge and turns a few of the pairs that it had ordered around. The output must show
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from flexpipe.errors import RunError
from flexpipe.job.probes import Probes
from flexpipe.plan.policy import percent_shares
from flexpipe.plan.tier import Tier
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.check import edge_kinds, find_hazards, without_edges
from flexpipe.schedule.op import Kind, Op
from tests.runtime.adversary import Adversary, Jitter, OpLog
from tests.runtime.jobs import Outcome, Runner, Tokens
from tests.schedule.plans import EDGE_KINDS

TRIES = range(5)
MANY_TRIES = range(12)


@dataclass(frozen=True)
class Scenario:
    """A policy, and the kinds of edges that are dropped from its schedule."""

    device: str
    knobs: Mapping[str, Any]
    kinds: tuple[str, ...]
    shallow: bool = False


SCENARIOS: Mapping[str, Scenario] = {
    "all on disk, in chunks": Scenario(
        "emulated",
        {
            **percent_shares([0, 30, 0, 30, 0, 0]),
            "micro_batch_size": 2,
            "num_micro_batches": 3,
            "separate_layers": True,
            "max_batch_tokens": 16,
        },
        (
            "freed:hidden_read_stage",
            "freed:hidden_slot",
            "freed:hidden_write_stage",
            "freed:kv_read_stage",
            "freed:kv_write_stage",
            "freed:logits",
            "freed:weight_stage",
            "produced:embed_slot",
            "produced:embed_stage",
            "produced:hidden",
            "produced:hidden_read_stage",
            "produced:hidden_slot",
            "produced:hidden_write_stage",
            "produced:kv_read_stage",
            "produced:kv_slot",
            "produced:kv_write_stage",
            "produced:weight_slot",
        ),
    ),
    "host memory first, two layers ahead": Scenario(
        "emulated",
        {
            **percent_shares([0, 50, 30, 20, 0, 100]),
            "micro_batch_size": 2,
            "num_micro_batches": 3,
            "separate_layers": True,
            "prefetch_depth": 2,
        },
        (
            "freed:embed_slot",
            "freed:embed_stage",
            "freed:kv_slot",
            "freed:weight_slot",
            "produced:head_input+produced:logits",
            "produced:hidden+freed:hidden_slot",
            "produced:host_tokens",
            "produced:logits",
            "produced:tokens",
            "produced:weight_stage",
        ),
    ),
    "one micro-batch, KV cache in host memory": Scenario(
        "emulated",
        {
            **percent_shares([100, 0, 0, 100, 100, 0]),
            "micro_batch_size": 6,
            "num_micro_batches": 1,
        },
        ("produced:kv+freed:kv_slot",),
    ),
    "one micro-batch, KV cache on disk": Scenario(
        "emulated",
        {
            **percent_shares([100, 0, 0, 0, 100, 0]),
            "micro_batch_size": 6,
            "num_micro_batches": 1,
        },
        ("produced:kv",),
    ),
    "some rows attend on the CPU, some on the device": Scenario(
        "emulated",
        {
            **percent_shares([0, 50, 50, 50, 100, 0]),
            "micro_batch_size": 2,
            "num_micro_batches": 3,
            "cpu_attention": True,
        },
        (
            "produced:attention_slot",
            "produced:kv+produced:attention_slot",
            "produced:query_stage",
        ),
    ),
    "some rows attend on the CPU, some come from disk": Scenario(
        "emulated",
        {
            **percent_shares([100, 0, 0, 50, 100, 0]),
            "micro_batch_size": 2,
            "num_micro_batches": 3,
            "cpu_attention": True,
        },
        ("produced:kv_slot+produced:attention_slot",),
    ),
    "rows of one micro-batch on three tiers": Scenario(
        "emulated",
        {
            **percent_shares([100, 0, 34, 33, 100, 0]),
            "micro_batch_size": 6,
            "num_micro_batches": 1,
            "cpu_attention": True,
        },
        ("produced:kv+produced:kv_slot+produced:attention_slot",),
    ),
    "all rows attend on the CPU": Scenario(
        "emulated",
        {
            **percent_shares([100, 0, 0, 100, 100, 0]),
            "micro_batch_size": 3,
            "num_micro_batches": 2,
            "cpu_attention": True,
        },
        ("produced:hidden+produced:attention_slot",),
    ),
    "weights on disk, in chunks": Scenario(
        "cpu",
        {
            **percent_shares([0, 0, 0, 50, 0, 50]),
            "micro_batch_size": 2,
            "num_micro_batches": 3,
            "separate_layers": True,
            "max_batch_tokens": 16,
        },
        (
            "freed:embed_slot",
            "freed:kv_slot",
            "freed:weight_slot",
            "produced:embed_slot",
            "produced:head_input+produced:logits",
            "produced:hidden",
            "produced:host_tokens",
            "produced:kv+freed:kv_slot",
            "produced:kv_slot",
            "produced:logits",
            "produced:tokens",
            "produced:weight_slot",
        ),
    ),
    "hidden of some on disk": Scenario(
        "cpu",
        {
            **percent_shares([0, 100, 0, 100, 0, 30]),
            "micro_batch_size": 2,
            "num_micro_batches": 3,
        },
        ("freed:hidden_slot", "freed:logits", "produced:hidden_slot"),
    ),
    "hidden of all on disk": Scenario(
        "cpu",
        {
            **percent_shares([0, 100, 0, 100, 0, 0]),
            "micro_batch_size": 2,
            "num_micro_batches": 3,
        },
        ("produced:hidden+freed:hidden_slot",),
    ),
    "two layers, KV cache on disk": Scenario(
        "cpu",
        {
            **percent_shares([0, 100, 0, 0, 0, 100]),
            "micro_batch_size": 6,
            "num_micro_batches": 1,
        },
        ("produced:kv",),
        shallow=True,
    ),
}
MUTANTS = [(name, why) for name, scenario in SCENARIOS.items() for why in scenario.kinds]
IMPLIED = {"known:rows"}  # the job itself keeps these


@pytest.fixture(scope="session")
def clean(run: Runner, run_shallow: Runner) -> dict[str, tuple[Tokens, OpLog]]:
    """Each scenario with all its edges: what it answers, and its ops."""
    found = {}
    for name, scenario in SCENARIOS.items():
        log = OpLog()
        runner = run_shallow if scenario.shallow else run
        outcome = runner(scenario.knobs, device=scenario.device, probes=log.probes)
        found[name] = (outcome.tokens, log)
    return found


def test_rubbish_in_the_slots_shows_nowhere_with_all_edges(clean, reference):
    for name, scenario in SCENARIOS.items():
        if not scenario.shallow:
            assert clean[name][0] == reference, name


@pytest.mark.parametrize("tier", [Tier.GPU, Tier.CPU])
def test_every_kind_of_edge_that_occurs_is_dropped_by_a_mutant(tier):
    devices = {Tier.GPU: "emulated", Tier.CPU: "cpu"}
    dropped = {why for s in SCENARIOS.values() if s.device == devices[tier] for why in s.kinds}
    assert dropped == EDGE_KINDS[tier] - IMPLIED


def test_scenarios_have_no_other_kinds_of_edges(clean):
    for name, scenario in SCENARIOS.items():
        tier = Tier.CPU if scenario.device == "cpu" else Tier.GPU
        assert set(edge_kinds(clean[name][1].ops)) <= EDGE_KINDS[tier]


@pytest.mark.parametrize(("name", "why"), MUTANTS)
def test_the_checker_objects_to_a_run_without_one_kind_of_edge(clean, name, why):
    ops = clean[name][1].ops
    assert not find_hazards(ops)
    assert find_hazards(op for op in without_edges(ops, why) if op is not None)


@pytest.mark.parametrize(("name", "why"), MUTANTS)
def test_without_one_kind_of_edge_the_output_is_wrong(clean, run, run_shallow, name, why):
    """Within few tries: an op that runs far too early may be harmless again, as where a slot is
    loaded before the output that it should hold anyway is computed into it."""
    runner = run_shallow if SCENARIOS[name].shallow else run
    seeds = _shown(runner, name, why, *clean[name], TRIES)
    assert next(seeds, None) is not None, "nobody noticed"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "why"), MUTANTS)
def test_without_one_kind_of_edge_the_output_is_mostly_wrong(clean, run, run_shallow, name, why):
    runner = run_shallow if SCENARIOS[name].shallow else run
    seeds = list(_shown(runner, name, why, *clean[name], MANY_TRIES))
    assert len(seeds) > len(MANY_TRIES) // 2


def _shown(
    runner: Runner, name: str, why: str, tokens: Tokens, log: OpLog, seeds: range
) -> Iterator[int]:
    """The seeds whose mutant shows."""
    for seed in seeds:
        mutant = Adversary(why, log.pairs(why), seed)
        if _shows(runner, SCENARIOS[name], mutant.probes, tokens):
            yield seed


def _shows(runner: Runner, scenario: Scenario, probes: Probes, tokens: Tokens) -> bool:
    """Whether a run gives other tokens, or fails."""
    try:
        outcome = runner(scenario.knobs, device=scenario.device, probes=probes)
    except RunError:
        return True
    return outcome.tokens != tokens


def test_the_adversary_alone_changes_nothing(clean, run):
    """It is the missing edge that shows, not the waiting."""
    name = "host memory first, two layers ahead"
    tokens, log = clean[name]
    for why in ("freed:weight_slot", "produced:kv_slot"):
        mutant = Adversary(why, log.pairs(why), seed=0)
        mutant.drops = False
        outcome = run(SCENARIOS[name].knobs, probes=mutant.probes)
        assert outcome.tokens == tokens
        assert not mutant.num_inverted


@pytest.mark.parametrize("name", ["all on disk, in chunks", "weights on disk, in chunks"])
def test_rows_are_not_known_before_their_commit_even_without_the_edge(clean, run, name):
    """The one kind that the run keeps by itself: the job names no row before its COMMIT."""
    scenario, (tokens, log) = SCENARIOS[name], clean[name]
    assert find_hazards(op for op in without_edges(log.ops, "known:rows") if op is not None)
    pairs = [pair for pair in log.pairs("known:rows") if pair[1].step <= 3]
    mutant = Adversary("known:rows", pairs, seed=0, num_pairs=2)
    outcome = run(scenario.knobs, device=scenario.device, probes=mutant.probes)
    assert outcome.tokens == tokens
    assert not mutant.num_inverted


@dataclass
class Watched:
    """A run under jitter, and a hash of the logits at every SAMPLE."""

    jitter: Jitter
    hashes: dict[int, str] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)

    @property
    def probes(self) -> Probes:
        return Probes(before_op=self._before, on_stage=self.stages.append, poison=True)

    def _before(self, op: Op) -> None:
        self.jitter(op)
        if op.kind == Kind.SAMPLE:
            logits = self.stages[0].logits(op)[1]
            self.hashes[op.id] = hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


def _jittered(run: Runner, name: str, seed: int) -> tuple[Outcome, dict[int, str]]:
    watched = Watched(Jitter(seed))
    scenario = SCENARIOS[name]
    outcome = run(scenario.knobs, device=scenario.device, probes=watched.probes)
    return outcome, watched.hashes


def _check_jitter(run: Runner, tokens: Tokens, name: str, seeds: range) -> None:
    calm, expected = _jittered(run, name, seeds[0])
    assert calm.tokens == tokens
    assert len(expected) > len(run.prompts)
    for seed in seeds[1:]:
        outcome, hashes = _jittered(run, name, seed)
        assert outcome.tokens == tokens, f"seed {seed}"
        assert hashes == expected, f"seed {seed}: logits differ in some bit"


JITTERED = [
    "all on disk, in chunks",
    "host memory first, two layers ahead",
    "weights on disk, in chunks",
    "hidden of some on disk",
]


@pytest.mark.parametrize("name", JITTERED)
def test_random_delays_change_no_bit_of_the_logits(clean, run, name):
    _check_jitter(run, clean[name][0], name, range(3))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", JITTERED)
def test_two_hundred_random_delays_change_no_bit_of_the_logits(clean, run, name):
    _check_jitter(run, clean[name][0], name, range(200))


@dataclass
class Swap:
    """Exchanges two rows' caches at home before the second step; runs without any overlap."""

    tier: Tier
    stages: list[Stage] = field(default_factory=list)
    done: bool = False

    @property
    def probes(self) -> Probes:
        return Probes(before_op=self._before, on_stage=self.stages.append)

    def _before(self, op: Op) -> None:
        if self.done or op.step != 1 or op.kind != Kind.COMPUTE:
            return
        self.done = True
        stage = self.stages[0]
        one, other = stage.plan.micro_batches[0].places(self.tier)[:2]
        stage.stores.kv_cache.swap_rows(0, one, other)


@pytest.mark.parametrize(("kv", "tier"), [((100, 0), Tier.GPU), ((0, 100), Tier.CPU)])
def test_two_rows_that_exchange_their_kv_cache_give_other_tokens(run, reference, kv, tier):
    knobs = {
        **percent_shares([100, 0, *kv, 100, 0]),
        "micro_batch_size": 6,
        "num_micro_batches": 1,
        "strategy": "none",
    }
    swap = Swap(tier)
    outcome = run(knobs, probes=swap.probes)
    assert swap.done
    assert outcome.tokens != reference
