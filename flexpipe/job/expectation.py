"""What a job should take, told before anything is loaded, and how near it came.

Answers that ended before their limits are no fault of the prediction: the job is then predicted
once more for the lengths that came, and the report says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpipe.errors import FlexpipeError
from flexpipe.job.predicted import Predicted
from flexpipe.plan.block import Need
from flexpipe.policy.predict import Assignment, Effort, Prediction, predict_stages
from flexpipe.units import format_seconds

EFFORT = Effort(exact_ops=10_000, sampled_ops=10_000)  # half a second's worth

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """A job's prediction and what it was made from.

    `needs` are what is left of each request, in the order of the job's entries; they take places in
    `order`.
    """

    stages: Sequence[Assignment]
    needs: Sequence[Need]
    order: Sequence[int]
    prediction: Prediction

    @classmethod
    def of(
        cls,
        stages: Sequence[Assignment],
        needs: Sequence[Need],
        order: Sequence[int],
    ) -> Expectation | None:
        """None where nothing can be predicted; a line in the log says why."""
        try:
            prediction = predict_stages(stages, needs, order=order, effort=EFFORT)
        except FlexpipeError as error:
            log.info("nothing is predicted: %s", error)
            return None
        return cls(stages=stages, needs=needs, order=order, prediction=prediction)

    def compare(self, measured: Mapping[str, float], fewer: Mapping[int, int]) -> Predicted:
        """Beside what was measured; `fewer` has the tokens of those needs that generated less."""
        profile = self.stages[0].profile
        if not fewer:
            return Predicted.of(self.prediction, profile, measured)
        came = [
            Need(need.prompt, max(1, fewer.get(index, need.output)))
            for index, need in enumerate(self.needs)
        ]
        again = predict_stages(self.stages, came, order=self.order, effort=EFFORT)
        return Predicted.of(again, profile, measured, lengths_came=True)


def eta(prediction: Prediction) -> str:
    """One line: how fast, how long, and what bounds it."""
    return (
        f"predicted {prediction.generated_tokens_per_s:.1f} tokens/s, "
        f"{format_seconds(prediction.total_s)} in all, {format_seconds(prediction.load_s)} of it "
        f"to load; bottleneck {prediction.bottleneck}, {prediction.bound_share:.0%} of its bound"
    )
