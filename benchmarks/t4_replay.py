"""Does the simulator tell what FlexGen measured, and does the search find better than its policies?

    PYTHONPATH=. python benchmarks/t4_replay.py [--json FILE]

Plays the policies that FlexGen published for one NVIDIA T4 (policies/flexgen-*.yaml) on the machine
of its paper, as policies/hardware/t4-gcp.yaml describes it, and what `flexpipe plan` finds there
for the same requests: 512 tokens in, 32 out, one block of FlexGen's. Nothing is run, and no
figure of the machine that plays them enters.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from flexpipe.job.outlook import Outlook, Shape
from flexpipe.job.table import markdown_table
from flexpipe.plan.block import Need
from flexpipe.plan.policy import Policy
from flexpipe.plan.policy_file import PolicyFile
from flexpipe.policy.predict import predict
from flexpipe.policy.search import search
from flexpipe.preset import policy_file

HARDWARE = "t4-gcp"
NEED = Need(512, 32)
# preset: model, prompts of one block, generated token/s published (arXiv 2303.06865)
PUBLISHED = {
    "flexgen-opt-30b-t4": ("opt-30b", 144, 7.32),
    "flexgen-opt-30b-t4-no-overlap": ("opt-30b", 144, 5.86),
    "flexgen-opt-30b-t4-no-cpu-attention": ("opt-30b", 144, 4.03),
    "flexgen-opt-175b-t4": ("opt-175b", 256, 0.69),
}


@dataclass(frozen=True, kw_only=True)
class Played:
    """One policy in the simulator, beside what was published for it."""

    name: str
    model: str
    num_prompts: int
    published: float | None
    tokens_per_s: float
    prefill_s: float
    decode_s: float
    bottleneck: str
    bound_share: float
    search_s: float | None = None
    policy: object = None

    @property
    def row(self) -> tuple[str, ...]:
        beside = ("", "")
        if self.published is not None:
            beside = f"{self.published:g}", f"{self.tokens_per_s / self.published - 1:+.1%}"
        times = f"{self.prefill_s:.0f} + {self.decode_s:.0f}"
        bound = f"{self.bottleneck}, {self.bound_share:.0%}"
        return self.name, beside[0], f"{self.tokens_per_s:.3g}", beside[1], times, bound


def outlook(model: str, num_prompts: int) -> Outlook:
    return Outlook.on_paper(Shape.open(model), [NEED] * num_prompts, HARDWARE, {})


def played(preset: str) -> Played:
    model, num_prompts, published = PUBLISHED[preset]
    look = outlook(model, num_prompts)
    policy = Policy(**PolicyFile.read(policy_file(preset)).knobs)
    plan = look.planner(policy.compute_dtype)(policy)
    missing = plan.shortfalls()
    assert not missing, f"{preset} does not fit {HARDWARE}: {missing}"
    made = predict(plan, look.needs, look.machine.profile)
    return Played(
        name=preset,
        model=model,
        num_prompts=num_prompts,
        published=published,
        tokens_per_s=made.generated_tokens_per_s,
        prefill_s=made.prefill_s,
        decode_s=made.decode_s,
        bottleneck=made.bottleneck,
        bound_share=made.bound_share,
        policy=policy.to_dict(),
    )


def found(model: str, num_prompts: int) -> Played:
    look = outlook(model, num_prompts)
    began = time.perf_counter()
    best = search({}, look.planner(), look.needs, look.machine).best
    took_s = time.perf_counter() - began
    assert best is not None
    made = predict(best.plan, look.needs, look.machine.profile)
    return Played(
        name=f"flexpipe plan, {model}",
        model=model,
        num_prompts=num_prompts,
        published=None,
        tokens_per_s=made.generated_tokens_per_s,
        prefill_s=made.prefill_s,
        decode_s=made.decode_s,
        bottleneck=made.bottleneck,
        bound_share=made.bound_share,
        search_s=took_s,
        policy=best.plan.policy.to_dict(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="keep the raw figures")
    arguments = parser.parse_args()
    rows = [played(preset) for preset in PUBLISHED]
    blocks = dict.fromkeys((model, count) for model, count, _ in PUBLISHED.values())
    rows += [found(model, count) for model, count in blocks]
    head = (
        "policy",
        "published",
        "played",
        "off by",
        "prefill + decode, s",
        "bottleneck, of bound",
    )
    print(markdown_table(head, [row.row for row in rows]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
