"""Followers see the very steps that rank 0 forms, and leave nothing in the store."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from torch.distributed import Store, TCPStore

from flexpipe.memory.disk import Stopped
from flexpipe.model.draw import Draw
from flexpipe.runtime.control import Follower, Publisher
from flexpipe.schedule.step import MicroBatch, Row
from tests.waiting import eventually

DRAW = Draw(temperature=0.7, top_k=3, top_p=0.9, uniform=1 / 3)
STEPS = [
    [
        MicroBatch(0, (Row(0, 0, 0, (5, 6, 7), False), Row(4, 2, 31, (9,), True, DRAW))),
        MicroBatch(1, (Row(2, 0, 0, (1, 2), True),)),
    ],
    [],
    [MicroBatch(1, (Row(2, 0, 2, (8,), True, DRAW),))],
]


@pytest.fixture
def server() -> Store:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def publisher(server: TCPStore) -> Publisher:
    return Publisher(server, followers=(1, 2), embedding=(2,))


@pytest.fixture
def followers(server: TCPStore) -> Iterator[list[Follower]]:
    stores = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(2)]
    made = [Follower(store, rank) for rank, store in enumerate(stores, start=1)]
    yield made
    for follower in made:
        follower.close()


def steps(index: int) -> Iterator[MicroBatch | None] | None:
    return iter(STEPS[index]) if index < len(STEPS) else None


def publish(publisher: Publisher) -> None:
    told, index = publisher.wrap(steps), 0
    while (batches := told(index)) is not None:
        assert list(batches) == STEPS[index]
        index += 1


def follow(follower: Follower) -> list[list[MicroBatch]]:
    """Its steps, asked again at every None."""
    told: list[list[MicroBatch]] = []
    while (batches := follower.steps(len(told))) is not None:
        told.append([batch for batch in batches if batch is not None])
    return told


def without_ids(batch: MicroBatch) -> MicroBatch:
    return MicroBatch(
        batch.index,
        tuple(
            Row(row.request, row.place, row.num_context, range(row.num_new), row.sampled, row.draw)
            for row in batch.rows
        ),
    )


def test_a_follower_gets_the_same_steps_with_tokens_counted(
    publisher: Publisher, followers: list[Follower]
) -> None:
    publish(publisher)
    told = follow(followers[0])
    assert told == [[without_ids(batch) for batch in step] for step in STEPS] + [[]]
    assert follow(followers[1]) == [
        [
            MicroBatch(
                batch.index,
                tuple(
                    Row(r.request, r.place, r.num_context, list(r.tokens), r.sampled, r.draw)
                    for r in batch.rows
                ),
            )
            for batch in step
        ]
        for step in STEPS
    ] + [[]]


def test_what_was_read_is_gone_from_the_store(
    server: Store, publisher: Publisher, followers: list[Follower]
) -> None:
    before = server.num_keys()
    publish(publisher)
    for follower in followers:
        follow(follower)
    assert server.num_keys() <= before


def test_a_step_that_was_not_told_yet_is_none_and_its_coming_wakes(
    publisher: Publisher, followers: list[Follower]
) -> None:
    woken = threading.Event()
    followers[0].wake = woken.set
    batches = followers[0].steps(0)
    assert batches is not None and next(batches) is None and not woken.is_set()
    publish(publisher)
    assert woken.wait(30)
    assert next(batches) == without_ids(STEPS[0][0])


def test_a_micro_batch_is_told_before_rank_0_works_on_it(
    publisher: Publisher, followers: list[Follower]
) -> None:
    batches = publisher.wrap(steps)(0)
    assert batches is not None
    first = next(batches)
    told = followers[0].steps(0)
    assert told is not None and first is not None
    seen: list[MicroBatch] = []

    def came() -> bool:
        batch = next(told)
        seen.extend([batch] if batch is not None else [])
        return bool(seen)

    assert eventually(came)
    assert seen == [without_ids(first)]


def test_a_follower_stops_when_the_store_is_gone() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    follower = Follower(TCPStore("127.0.0.1", server.port, is_master=False), 1)
    batches = follower.steps(0)
    assert batches is not None
    del server

    def stopped() -> bool:
        try:
            return next(batches) is not None
        except Stopped:
            return True

    assert eventually(stopped)
    follower.close()
