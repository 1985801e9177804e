"""Tiny plans without a checkpoint, and steps without a job.

Plans here are what `flexpipe.plan` makes of a policy for a model that exists only as shapes. Steps
are drawn freely, within what a job could ask: micro-batches may be absent, rows prefill in chunks
or decode, and some steps sample nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.model.config import DTYPE_BYTES, ModelConfig, Shard, shard_config
from flexpipe.model.families import read_config
from flexpipe.plan.block import Need
from flexpipe.plan.codec import Codec
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import model_tensors
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import COMPRESSIONS, STRATEGIES, Policy, Shares
from flexpipe.plan.tier import Tier
from flexpipe.schedule.build import schedule
from flexpipe.schedule.op import LANE_OF, PEER_LANES, Kind, Op
from flexpipe.schedule.step import MicroBatch, Row

# every kind of dependency that an `event` schedule can have, by the tier beside the device
_EVERYWHERE = frozenset(
    {
        "freed:embed_slot",
        "freed:hidden_slot",
        "freed:kv_slot",
        "freed:logits",
        "freed:weight_slot",
        "known:rows",
        "produced:embed_slot",
        "produced:head_input+produced:logits",
        "produced:hidden",
        "produced:hidden+freed:hidden_slot",
        "produced:hidden_slot",
        "produced:host_tokens",
        "produced:kv",
        "produced:kv+freed:kv_slot",
        "produced:kv_slot",
        "produced:logits",
        "produced:tokens",
        "produced:weight_slot",
    }
)
_STAGED = frozenset(
    {
        "freed:embed_stage",
        "freed:hidden_read_stage",
        "freed:hidden_write_stage",
        "freed:kv_read_stage",
        "freed:kv_write_stage",
        "freed:weight_stage",
        "produced:embed_stage",
        "produced:hidden_read_stage",
        "produced:hidden_write_stage",
        "produced:kv_read_stage",
        "produced:kv_write_stage",
        "produced:weight_stage",
        "produced:attention_slot",
        "produced:hidden+produced:attention_slot",
        "produced:kv+produced:attention_slot",
        "produced:kv+produced:kv_slot+produced:attention_slot",
        "produced:kv_slot+produced:attention_slot",
        "produced:query_stage",
    }
)
EDGE_KINDS = {Tier.CPU: _EVERYWHERE, Tier.GPU: _EVERYWHERE | _STAGED}

# what a stage without neighbours does
OF_ONE_STAGE = tuple(kind for kind in Kind if LANE_OF[kind] not in PEER_LANES)

ROOMY = Budgets(gpu=2**50, cpu=2**50, disk=2**50)


def tiny_config(**changes: Any) -> ModelConfig:
    """A Llama of three small layers; keys of config.json may be changed."""
    return read_config(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "rope_theta": 10000.0,
            "eos_token_id": 2,
            **changes,
        }
    )


@dataclass(frozen=True)
class FakeTensor:
    """A tensor of a checkpoint that is not there."""

    dtype: str
    offset: int
    num_bytes: int
    path: object = "model.safetensors"
    stride: int | None = None


def stored_tensors(config: ModelConfig, dtype: str | None = None) -> dict[str, FakeTensor]:
    """All tensors of a model, one behind the other in one file."""
    found, offset = {}, 4096
    for spec in model_tensors(config):
        num_bytes = spec.num_elements * DTYPE_BYTES[dtype or config.dtype]
        found[spec.name] = FakeTensor(dtype or config.dtype, offset, num_bytes)
        offset += num_bytes
    return found


@dataclass(frozen=True)
class FakeForm(FakeTensor):
    """Another form of a tensor that is not there either."""

    new_bytes: int = 0

    @classmethod
    def of(cls, config: ModelConfig, name: str, codec: Codec | None) -> FakeForm:
        num_rows, size = {spec.name: spec.shape for spec in model_tensors(config)}[name]
        if codec is None:
            num_bytes = num_rows * size * DTYPE_BYTES[config.dtype]
            return cls(config.dtype, 4096, num_bytes, f"{name}.whole", new_bytes=num_bytes)
        num_bytes = num_rows * codec.row_bytes(size)
        return cls("uint8", 4096, num_bytes, f"{name}.{codec.bits}", new_bytes=num_bytes)


NEEDS = (Need(70, 6), Need(30, 6), Need(12, 6), Need(9, 6), Need(5, 6), Need(3, 6), Need(1, 6))


def tiny_plan(
    policy: Policy | Mapping[str, Any] | None = None,
    *,
    tier: Tier = Tier.GPU,
    config: ModelConfig | None = None,
    needs: Sequence[Need] = NEEDS,
    budgets: Budgets = ROOMY,
    dtype: str | None = None,
    pipeline: Pipeline | None = None,
    rank: int = 0,
    never_stops: bool = False,
    **knobs: Any,
) -> Plan:
    """The plan for a policy, or for knobs of one, on a device beside `tier`."""
    config = config or tiny_config()
    given = policy if isinstance(policy, Policy) else Policy(**{**(policy or {}), **knobs})
    planner = Planner(
        config,
        needs,
        stored_tensors(config, dtype),
        budgets,
        device_tier=tier,
        compute_dtype="float32",
        form_of=partial(FakeForm.of, config),
        pipeline=pipeline,
        rank=rank,
        never_stops=never_stops,
    )
    return planner(given)


def step_of(plan: Plan, *, context: int = 8, tokens: int = 1, sampled: bool = True) -> MicroBatches:
    """All rows of the block doing the same."""
    ids = tuple(range(3, 3 + tokens))
    return tuple(
        MicroBatch(
            mb.index,
            tuple(Row(p, p, context, ids, sampled) for p in range(mb.num_places)),
        )
        for mb in plan.micro_batches
    )


MicroBatches = tuple[MicroBatch, ...]


def ops_of(plan: Plan, steps: Sequence[MicroBatches]) -> list[Op]:
    """The whole schedule of these steps."""
    ops = schedule(plan, lambda index: iter(steps[index]) if index < len(steps) else None)
    return [op for op in ops if op is not None]


def shares(tier: Tier) -> st.SearchStrategy[Shares]:
    """Shares in tenths of what tiers a device beside `tier` has."""

    def cut(ends: tuple[int, int]) -> Shares:
        low, high = sorted(ends)
        gpu, cpu, disk = low, high - low, 10 - high
        if tier == Tier.CPU:
            gpu, cpu = 0, gpu + cpu
        return Shares(gpu=gpu / 10, cpu=cpu / 10, disk=disk / 10)

    tenths = st.one_of(st.sampled_from([0, 10]), st.integers(0, 10))
    return st.tuples(tenths, tenths).map(cut)


@st.composite
def plans(draw: st.DrawFn, *, strategy: str | None = None, num_shards: int = 1) -> Plan:
    """Any plan of the tiny model, or of one of its shards; policies whose shares no whole item fits
    are drawn again."""
    tier = draw(st.sampled_from([Tier.GPU, Tier.CPU]))
    whole = tiny_config(
        num_hidden_layers=draw(st.integers(1, 4)),
        vocab_size=draw(st.sampled_from([96, 320, 1000])),
        tie_word_embeddings=draw(st.booleans()),
    )
    whole = replace(whole, post_norm=num_shards > 1 and draw(st.booleans()))
    config = shard_config(whole, Shard(draw(st.integers(0, num_shards - 1)), num_shards))
    num_rows = draw(st.integers(1, 9))
    for _ in range(20):
        try:
            return tiny_plan(
                tier=tier,
                config=config,
                needs=NEEDS[:num_rows] if num_rows <= len(NEEDS) else (*NEEDS, *NEEDS[:2]),
                weights=draw(shares(tier)),
                kv_cache=draw(shares(tier)),
                hidden=draw(shares(tier)),
                micro_batch_size=draw(st.integers(1, 3)),
                num_micro_batches=draw(st.integers(1, 5)),
                max_batch_tokens=draw(st.sampled_from([8, 64])),
                prefetch_depth=draw(st.sampled_from([1, 1, 2, 3, 9])),
                separate_layers=draw(st.booleans()),
                cpu_attention=draw(st.booleans()),
                compress_weight=draw(st.sampled_from(COMPRESSIONS)),
                compress_vocabulary=draw(st.sampled_from(COMPRESSIONS)),
                strategy=strategy or draw(st.sampled_from(STRATEGIES)),
            )
        except PolicyError:
            continue
    return tiny_plan(tier=tier, config=config, strategy=strategy or "event")


@st.composite
def steps_for(draw: st.DrawFn, plan: Plan, *, most: int = 4) -> list[MicroBatches]:
    """A sequence of steps: empty micro-batches, chunks, mixed phases, nothing sampled."""
    contexts: dict[tuple[int, int], int] = {}
    made: list[MicroBatches] = []
    for _ in range(draw(st.integers(1, most))):
        block = plan.blocks[len(made) % len(plan.blocks)]
        batches = tuple(_batches(draw, plan, contexts, block))
        if not batches and len(plan.blocks) == 1:  # a job forms no step without rows
            continue
        made.append(batches)
    return made


def _batches(
    draw: st.DrawFn, plan: Plan, contexts: dict[tuple[int, int], int], block: range
) -> Iterator[MicroBatch]:
    for mb in (plan.micro_batches[index] for index in block):
        rows = []
        for place in range(mb.num_places):
            does = draw(st.sampled_from(["idle", "begin", "chunk", "go on", "decode", "decode"]))
            context = contexts.get((mb.index, place), 0)
            if does == "begin":
                context = 0
            new = 1 if does == "decode" else 3
            if does == "idle" or context + new > mb.region_tokens:
                continue
            contexts[mb.index, place] = context + new
            rows.append(
                Row(place, place, context, tuple(range(new)), does not in ("chunk", "begin"))
            )
        if rows:
            yield MicroBatch(mb.index, tuple(rows))
