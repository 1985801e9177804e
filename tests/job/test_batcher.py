"""Requests in, steps out: places, chunks, refill, and when a row ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.job.batcher import Admitted, Batcher, Entry, Finished
from flexpipe.job.params import SamplingParams
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Plan
from flexpipe.runtime.stage import SampledToken
from flexpipe.schedule.step import MicroBatch, Row
from tests.schedule.plans import tiny_plan

EOS = 2
Model = Callable[[Row], int]


def request(index: int, prompt: int, output: int) -> Entry:
    return Entry(index, index, 0, prompt, output)


def tokens_of(entry: Entry) -> tuple[int, ...]:
    return tuple(range(100 * entry.index, 100 * entry.index + entry.num_prompt))


def admitted(entry: Entry) -> Admitted:
    return Admitted(
        entry=entry,
        tokens=tokens_of(entry),
        params=SamplingParams(max_tokens=entry.num_output),
        eos_token_ids=frozenset([EOS]),
    )


def plan_for(requests: Sequence[Entry], *, num_blocks: int = 1, **knobs: int) -> Plan:
    pipeline = Pipeline.whole(3, num_blocks=num_blocks)
    return tiny_plan(needs=[request.need for request in requests], pipeline=pipeline, **knobs)


@dataclass
class Job:
    """Drives a batcher as a dispatcher would: a micro-batch comes back before it is asked again."""

    plan: Plan
    requests: Sequence[Entry]
    model: Model = lambda row: 7
    not_finite: Callable[[Row], bool] = lambda row: False
    ended: list[Finished] = field(default_factory=list)
    steps: list[list[MicroBatch]] = field(default_factory=list)

    def run(self, most: int = 10_000) -> Job:
        self.batcher = Batcher(self.plan, self.requests, admitted, self.ended.append)
        out: list[MicroBatch] = []
        while (batches := self.batcher.steps(len(self.steps))) is not None:
            assert len(self.steps) < most
            self.steps.append([])
            for batch in batches:
                if batch is None:
                    self.commit(out.pop(0))
                    continue
                self.steps[-1].append(batch)
                out.append(batch)
            if not self.steps[-1]:
                self.steps.pop()
        assert not out
        return self

    def commit(self, batch: MicroBatch) -> None:
        sampled = [
            SampledToken(row, self.model(row), not self.not_finite(row))
            for row in batch.rows
            if row.sampled
        ]
        self.batcher.commit(batch, sampled)

    def rows(self, index: int) -> list[Row]:
        """Everything one request was computed for, in order."""
        return [
            row
            for step in self.steps
            for batch in step
            for row in batch.rows
            if row.request == index
        ]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    requests = [
        request(index, draw(st.integers(1, 60)), draw(st.integers(1, 6)))
        for index in range(draw(st.integers(1, 12)))
    ]
    plan = plan_for(
        requests,
        micro_batch_size=draw(st.integers(1, 4)),
        num_micro_batches=draw(st.integers(1, 3)),
        max_batch_tokens=draw(st.sampled_from([4, 16, 2048])),
    )
    stops = draw(st.sets(st.tuples(st.integers(0, 11), st.integers(1, 70))))

    def model(row: Row) -> int:
        return EOS if (row.request, row.num_context + row.num_new) in stops else 7

    return Job(plan, requests, model)


@given(job=jobs())
def test_every_request_ends_once_and_every_token_is_computed_once_in_order(job):
    job.run()
    assert sorted(end.request.entry.index for end in job.ended) == list(range(len(job.requests)))
    ended = {end.request.entry.index: end for end in job.ended}
    for request in job.requests:
        rows = job.rows(request.index)
        end = ended[request.index]
        fed = [token for row in rows for token in row.tokens]
        assert fed == [*tokens_of(request), *end.tokens[:-1]]
        seen = 0
        for row in rows:
            assert row.num_context == seen
            seen += row.num_new
            assert row.sampled is (seen >= request.num_prompt)
        assert len({(row.place) for row in rows}) == 1


@given(job=jobs())
def test_no_step_asks_for_more_than_was_planned(job):
    job.run()
    for step in job.steps:
        indices = [batch.index for batch in step]
        assert indices == sorted(set(indices))
        for batch in step:
            shape = job.plan.micro_batches[batch.index]
            assert 1 <= len(batch.rows) <= shape.num_places
            assert 1 <= batch.num_new <= shape.max_new_tokens
            places = [row.place for row in batch.rows]
            assert places == sorted(set(places))
            for row in batch.rows:
                assert row.num_new >= 1
                assert row.num_context + row.num_new <= shape.region_tokens


@given(job=jobs())
def test_a_row_ends_at_an_end_token_or_at_its_limit(job):
    job.run()
    limits = {request.index: request.num_output for request in job.requests}
    for end in job.ended:
        assert end.error is None
        assert EOS not in end.tokens[:-1]
        if end.reason == "stop":
            assert end.tokens[-1] == EOS
        else:
            assert end.reason == "length"
            assert end.tokens[-1] != EOS and len(end.tokens) == limits[end.request.entry.index]
        assert 1 <= len(end.tokens) <= limits[end.request.entry.index]


def test_requests_are_seated_longest_first():
    requests = [request(0, 3, 2), request(1, 30, 2), request(2, 10, 2)]
    job = Job(plan_for(requests, micro_batch_size=1, num_micro_batches=2), requests).run()
    first = job.steps[0]
    assert [batch.rows[0].request for batch in first] == [1, 2]
    assert job.rows(0)[0].num_context == 0


def test_a_finished_row_leaves_at_once_and_the_next_request_joins_the_others_decode():
    requests = [request(0, 20, 5), request(1, 20, 2), request(2, 8, 3)]
    job = Job(plan_for(requests, micro_batch_size=2), requests).run()
    (mixed,) = job.steps[2]
    assert [(row.request, row.num_context, row.num_new) for row in mixed.rows] == [
        (0, 21, 1),
        (2, 0, 8),
    ]
    assert mixed.rows[1].place == 1  # where request 1 sat


def test_a_long_prompt_is_prefilled_in_chunks_and_only_the_last_one_samples():
    requests = [request(0, 20, 2)]
    job = Job(plan_for(requests, micro_batch_size=1, max_batch_tokens=8), requests).run()
    assert [(row.num_context, row.num_new, row.sampled) for row in job.rows(0)] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
        (20, 1, True),
    ]


def test_rows_that_decode_are_served_before_prompts():
    requests = [request(0, 4, 6), request(1, 12, 1)]
    plan = plan_for(requests, micro_batch_size=2, max_batch_tokens=5)
    job = Job(plan, requests).run()
    seen = {row.request for step in job.steps for batch in step for row in batch.rows}
    assert seen == {0, 1}
    begun = job.steps.index(next(s for s in job.steps if any(r.request == 0 for r in s[0].rows)))
    decoding = job.steps[begun + 1 :]
    for step in decoding[:4]:
        assert 0 in [row.request for row in step[0].rows]


def test_a_micro_batch_that_is_out_is_waited_for():
    requests = [request(0, 4, 2), request(1, 4, 2)]
    batcher = Batcher(
        plan_for(requests, micro_batch_size=1, num_micro_batches=2),
        requests,
        admitted,
        lambda end: None,
    )
    first = list(batcher.steps(0) or ())
    assert [batch.index for batch in first if batch] == [0, 1]
    second = batcher.steps(1)
    assert second is not None
    assert next(second) is None
    batcher.commit(first[1], [SampledToken(first[1].rows[0], 7, True)])
    assert next(second) is None  # micro-batch 0 goes first
    batcher.commit(first[0], [SampledToken(first[0].rows[0], 7, True)])
    assert [batch.index for batch in second if batch] == [0, 1]


def test_rows_whose_logits_are_not_finite_fail_alone_and_keep_what_they_had():
    requests = [request(0, 5, 4), request(1, 5, 4), request(2, 5, 4)]

    def broken(row: Row) -> bool:
        return row.request == 1 and row.num_context + row.num_new == 7

    job = Job(plan_for(requests, micro_batch_size=3), requests, not_finite=broken).run()
    ended = {end.request.entry.index: end for end in job.ended}
    assert ended[1].tokens == (7, 7)
    assert ended[1].reason == "error"
    assert "logits for token 3 are not finite" in (ended[1].error or "")
    for index in (0, 2):
        assert ended[index].error is None
        assert len(ended[index].tokens) == 4


def test_the_place_of_a_failed_row_goes_to_the_next_request():
    requests = [request(0, 9, 4), request(1, 5, 2)]
    plan = plan_for(requests, micro_batch_size=1)
    job = Job(plan, requests, not_finite=lambda row: row.request == 0).run()
    assert [end.request.entry.index for end in job.ended] == [0, 1]
    assert job.ended[1].error is None


def test_tokens_are_counted_by_phase_and_step():
    requests = [request(0, 6, 3), request(1, 4, 1)]
    job = Job(plan_for(requests, micro_batch_size=2), requests).run()
    counts = job.batcher.counts
    assert [(count.prompt_tokens, count.decode_tokens) for count in counts[:3]] == [
        (10, 0),
        (0, 1),
        (0, 1),
    ]
    assert sum(count.prompt_tokens for count in counts) == 10
    ends = [count.end_s for count in counts[:3]]
    assert ends == sorted(ends) and ends[0] > 0


@pytest.mark.parametrize("output", [1, 2])
def test_the_last_token_is_not_computed(output):
    requests = [request(0, 5, output)]
    job = Job(plan_for(requests, micro_batch_size=1), requests).run()
    assert sum(row.num_new for row in job.rows(0)) == 5 + output - 1


def test_tokens_of_an_earlier_run_are_prefilled_and_counted_on():
    entry = request(0, 4, 5)

    def resumed(waiting: Entry) -> Admitted:
        return replace(admitted(waiting), generated=(11, 12))

    ended: list[Finished] = []
    went_on: list[tuple[int, int]] = []
    batcher = Batcher(
        plan_for([entry], micro_batch_size=1),
        [entry],
        resumed,
        ended.append,
        lambda tokens: went_on.extend((entry.index, token) for entry, token in tokens),
    )
    fed: list[int] = []
    answer = iter((13, 14, 15))
    step = 0
    while (batches := batcher.steps(step)) is not None:
        for batch in batches:
            assert batch is not None
            (row,) = batch.rows
            fed += row.tokens
            batcher.commit(batch, [SampledToken(row, next(answer), True)] if row.sampled else [])
        step += 1
    assert fed == [*tokens_of(entry), 11, 12, 13, 14]
    assert ended[0].tokens == (11, 12, 13, 14, 15)
    assert ended[0].reason == "length"
    assert went_on == [(0, 13), (0, 14)]


def test_a_draw_depends_on_seed_id_and_position_only():
    entries = [request(index, 4, 6) for index in range(3)]

    def sampling(waiting: Entry) -> Admitted:
        return replace(admitted(waiting), params=SamplingParams(temperature=1.0, max_tokens=6))

    def draws(size: int) -> dict[tuple[int, int], float]:
        seen: dict[tuple[int, int], float] = {}
        plan = plan_for(entries, micro_batch_size=size)
        batcher = Batcher(plan, entries, sampling, lambda end: None)
        step = 0
        while (batches := batcher.steps(step)) is not None:
            for batch in batches:
                assert batch is not None
                for row in batch.rows:
                    assert row.draw is not None
                    seen[row.request, row.num_context + row.num_new] = row.draw.uniform
                sampled = [SampledToken(row, 7, True) for row in batch.rows]
                batcher.commit(batch, sampled)
            step += 1
        return seen

    assert draws(1) == draws(3)
    assert len(set(draws(3).values())) == 18


def test_latency_is_counted_from_the_step_that_takes_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps of a second each; two requests share a place one after the other."""
    requests = [request(1, 4, 2), request(2, 3, 1)]
    plan = plan_for(requests, micro_batch_size=1, num_micro_batches=1)
    job = Job(plan, requests)
    monkeypatch.setattr("time.perf_counter", lambda: float(len(job.steps)))
    job.run()
    # seated in step 1 and 3, which had not been counted yet; the last tokens came in 2 and 3
    assert job.batcher.latency_s == pytest.approx((2 + 1) / 2)


@given(
    needs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=14),
    num_blocks=st.integers(1, 4),
    size=st.integers(1, 2),
)
def test_blocks_take_turns_and_every_request_is_answered_once(needs, num_blocks, size):
    requests = [request(index, *need) for index, need in enumerate(needs)]
    plan = plan_for(requests, num_blocks=num_blocks, micro_batch_size=size, num_micro_batches=2)
    ended: list[Finished] = []
    batcher = Batcher(plan, requests, admitted, ended.append)
    out: list[MicroBatch] = []
    for index in count():
        batches = batcher.steps(index)
        if batches is None:
            break
        for batch in batches:
            if batch is None:  # its own tokens are awaited, whatever else is on its way
                mine = [one for one in out if one.index in plan.blocks[index % num_blocks]]
                back = mine[0]
                out.remove(back)
                batcher.commit(back, [SampledToken(r, 7, True) for r in back.rows if r.sampled])
                continue
            assert batch.index in plan.blocks[index % num_blocks]
            out.append(batch)
    assert not out
    assert sorted(end.request.entry.index for end in ended) == list(range(len(needs)))


def test_a_job_that_ended_nothing_has_no_latency() -> None:
    requests = [request(1, 4, 2)]
    assert Batcher(plan_for(requests), requests, admitted, lambda end: None).latency_s == 0.0
