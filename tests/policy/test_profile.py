"""A machine's file: what is written is read again, and what cannot be read is told in one line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.tier import Tier
from flexpipe.policy.curve import Curve
from flexpipe.policy.profile import (
    ACTIVITIES,
    LINKS,
    OVERHEADS,
    Profile,
    parse_profile,
    read_profile,
    render_profile,
)
from tests.policy import machine as machines
from tests.policy.machine import machine

WHOLE = machine(
    overhead_s=machines.OVERHEADS,
    slowdown=machines.SLOWDOWN,
    wake_s={1e-3: 0.0, 16e-3: 1e-3},
    host=machines.RATES,
    details={"disk_read_direct_x8": Curve.of({65536.0: 5e8, 2.0**20: 2e9})},
    threads=2,
    quick=True,
    machine="0123abcd",
    mount="/",
)
CONTENT: dict[str, Any] = yaml.safe_load(render_profile(WHOLE))


def read(profile: Profile) -> Profile:
    return parse_profile(yaml.safe_load(render_profile(profile)))


def test_a_profile_is_read_as_it_was_written():
    again = read(WHOLE)
    assert again.overhead_s == pytest.approx(WHOLE.overhead_s)
    assert replace(again, overhead_s=WHOLE.overhead_s) == WHOLE


# figures as a file shows them: three significant digits
ROUND = st.builds(lambda digits, power: float(f"{digits}e{power}"), st.integers(100, 999),
                  st.integers(4, 9))  # fmt: skip
CURVES = st.dictionaries(st.sampled_from([2.0**n for n in range(10, 30)]), ROUND, min_size=1)


@settings(max_examples=20)
@given(
    links=st.fixed_dictionaries(dict.fromkeys(LINKS, CURVES)),
    overheads=st.dictionaries(st.sampled_from(OVERHEADS), st.integers(1, 999)),
    slowdown=st.dictionaries(
        st.tuples(st.sampled_from(ACTIVITIES), st.sampled_from(ACTIVITIES)),
        st.integers(100, 400).map(lambda percent: percent / 100),
    ),
)
def test_whatever_was_measured_survives_its_file_to_three_digits(links, overheads, slowdown):
    made = replace(
        WHOLE,
        links={name: Curve.of(points) for name, points in links.items()},
        overhead_s={name: us * 1e-6 for name, us in overheads.items()},
        slowdown=slowdown,
    )
    again = read(made)
    assert again.slowdown == slowdown
    assert again.overhead_s == pytest.approx(made.overhead_s, rel=5e-3)
    for name, curve in made.links.items():
        back = again.links[name]
        flat = len(curve.sizes) == 1  # one point is a rate at every size
        assert flat or back.sizes == pytest.approx(curve.sizes, rel=5e-3)
        assert back.rates == pytest.approx(curve.rates, rel=5e-3)


def test_a_lane_wakes_the_later_the_longer_it_was_idle():
    wake_s = read(WHOLE).pace.wake_s
    assert [wake_s(idle_s) for idle_s in (0.0, 1e-3, 8.5e-3, 1.0)] == pytest.approx(
        [0, 0, 5e-4, 1e-3]
    )
    assert machine().pace.wake_s(1.0) == 0.0


def test_a_profile_that_was_used_can_be_sent_to_another_process():
    pace = WHOLE.pace
    assert pickle.loads(pickle.dumps(WHOLE)).pace.wake_s(2e-3) == pace.wake_s(2e-3)


def test_a_written_profile_says_where_and_when_it_was_measured(tmp_path):
    text = render_profile(WHOLE)
    first = text.splitlines()[0]
    assert first.startswith("#") and all(word in first for word in ("made up", "2026-11-21"))
    path = tmp_path / "machine.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_profile(path) == read(WHOLE)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(link={}), "unknown key link; did you mean links?"),
        (lambda c: c["links"].update(disc_read="2 GB/s"), "links.disc_read; did you mean disk_"),
        (lambda c: c["overhead_s"].update(layers="2us"), "overhead_s.layers; did you mean layer?"),
        (lambda c: c["slowdown"].update(network={}), "unknown key slowdown.network; known are"),
        (lambda c: c["slowdown"]["compute"].update(copie=2), "compute.copie; did you mean copy?"),
        (lambda c: c["memory"].update(ram="8GiB"), "unknown key memory.ram"),
        (lambda c: c["compute"].update(matmull={}), "compute.matmull; did you mean matmul?"),
        (lambda c: c["links"].update(h2d="12 Gbit"), "links.h2d: cannot read '12 Gbit'"),
        (lambda c: c["links"].update(h2d={"1MiB": "3 GFLOP/s"}), "links.h2d.1MiB: cannot read"),
        (lambda c: c["links"].update(h2d={"a lot": "3 GB/s"}), "links.h2d: cannot read 'a lot'"),
        (lambda c: c["links"].update(h2d={}), "links.h2d: a curve's sizes"),
        (lambda c: c["links"].update(h2d="0 GB/s"), "links.h2d must be positive"),
        (lambda c: c["links"].update(h2d=-5), "links.h2d: cannot read -5"),
        (lambda c: c["links"].update(h2d=None), "links.h2d: cannot read None"),
        (lambda c: c["links"].update(h2d=["1 GB/s"]), "links.h2d: cannot read"),
        (lambda c: c["memory"].update(cpu=-1), "memory.cpu: a size cannot be negative"),
        (lambda c: c["memory"].update(cpu="-8GiB"), "memory.cpu: cannot read '-8GiB'"),
        (lambda c: c["overhead_s"].update(layer="5 parsecs"), "overhead_s.layer: cannot read"),
        (lambda c: c["overhead_s"].update(layer=5), "overhead_s.layer: cannot read 5"),
        (lambda c: c["wake_s"].update({"2 GB": "1 ms"}), "wake_s: cannot read '2 GB' as a time"),
        (lambda c: c["slowdown"]["compute"].update(copy=0.5), "compute.copy is a factor from 1"),
        (lambda c: c["slowdown"]["compute"].update(copy="2x"), "factor from 1, got '2x'"),
        (lambda c: c["load"].update(float32="fast"), "load.float32: cannot read 'fast'"),
        (lambda c: c["compute"]["matmul"].update(float32={}), "matmul.float32 is empty"),
        (lambda c: c["compute"].update(widen=5), "compute.widen must be a mapping, got 5"),
        (lambda c: c.update(compute=[1]), "compute must be a mapping"),
        (lambda c: c.update(threads="many"), "threads must be a whole number from 1, got 'many'"),
        (lambda c: c.update(details=[1]), "details must be a mapping"),
        (lambda c: c.pop("memory"), "needs memory"),
        (lambda c: [c.pop("links"), c.pop("device")], "needs device, links"),
        (lambda c: c["links"].pop("disk_write"), "links needs disk_write"),
        (lambda c: c["compute"].pop("matmul"), "compute needs matmul"),
        (lambda c: c.update(device="cuda") or c["links"].pop("h2d"), "links needs h2d"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_in_one_line_with_its_key(tmp_path, change, told):
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(changed(change)), encoding="utf-8")
    with pytest.raises(PolicyError) as caught:
        read_profile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert told in message


@pytest.mark.parametrize("text", ["", "5", "[1, 2]", "just words"])
def test_a_file_that_is_no_mapping_is_no_profile(tmp_path, text):
    path = tmp_path / "machine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError, match="must be a mapping"):
        read_profile(path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"a: b: c"])
def test_a_file_that_is_no_yaml_is_told_so_in_one_line(tmp_path, content):
    path = tmp_path / "machine.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match="is not a YAML file") as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"cannot read the hardware file .*gone\.yaml"):
        read_profile(tmp_path / "gone.yaml")


def test_a_cpu_needs_no_links_to_an_accelerator():
    content = changed(lambda c: [c["links"].pop("h2d"), c["links"].pop("d2h")])
    assert set(parse_profile(content).links) == {"disk_read", "disk_write"}


def test_without_a_host_the_device_is_the_cpu_that_attends():
    assert machine().on_host is machine().compute
    assert WHOLE.on_host is WHOLE.host


@given(change=st.dictionaries(st.sampled_from(sorted(CONTENT)), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner,
                                                               max_size=2),
)))  # fmt: skip
def test_no_content_ends_in_anything_but_a_profile_or_an_error_that_says_why(change):
    try:
        made = parse_profile({**CONTENT, **change})
    except PolicyError as error:
        assert "\n" not in str(error)
    else:
        assert Tier.CPU in made.memory or made.memory
