"""FLOPs of ops: what parts of a layer compute adds up to the layer."""

from __future__ import annotations

import pytest

from flexpipe.model.cost import decoder_flops, head_flops, num_attended
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import percent_shares
from flexpipe.schedule.flops import compute_flops, num_attended_by
from flexpipe.schedule.op import Kind, Op
from tests.schedule.plans import ops_of, step_of, tiny_config, tiny_plan

CONTEXT, ROWS = 8, 2
ON_DEVICE = percent_shares([100, 0, 100, 0, 100, 0])


def flops_of(plan: Plan, wanted: str) -> int:
    """Of all ops of one step on layers of that name."""
    return sum(
        _flops(plan, op)
        for op in ops_of(plan, [step_of(plan, context=CONTEXT)])
        if op.kind == Kind.COMPUTE and wanted in plan.layers[op.layer].name
    )


def _flops(plan: Plan, op: Op) -> int:
    assert op.batch is not None
    return compute_flops(
        plan,
        op,
        num_new=op.batch.num_new,
        num_sampled=op.batch.num_sampled,
        attended=num_attended_by(plan, op),
    )


@pytest.mark.parametrize(
    "knobs", [{}, {"separate_layers": True}, percent_shares([0, 100, 100, 0, 100, 0])]
)
def test_halves_and_slices_compute_what_the_whole_layer_does(knobs):
    config = tiny_config(vocab_size=1000)  # in slices, where it travels
    plan = tiny_plan({**ON_DEVICE, **knobs}, config=config, micro_batch_size=ROWS)
    attended = ROWS * num_attended(CONTEXT, 1)
    assert flops_of(plan, "decoder 0") == decoder_flops(plan.config, ROWS, attended)
    assert flops_of(plan, "head") == head_flops(plan.config, ROWS)


def test_what_the_cpu_attends_to_is_not_the_devices():
    shares = percent_shares([100, 0, 0, 100, 100, 0])
    plan = tiny_plan(shares, micro_batch_size=ROWS, cpu_attention=True)
    assert flops_of(plan, "decoder 0") == decoder_flops(plan.config, ROWS, 0)


def test_looking_tokens_up_is_no_arithmetic():
    assert flops_of(tiny_plan(ON_DEVICE), "embed") == 0
