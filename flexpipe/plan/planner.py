"""From policies to plans: each knob resolved for one model, one set of requests and one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from flexpipe.model.config import DTYPE_BYTES, ModelConfig, TensorSpec
from flexpipe.plan.block import MicroBatchPlan, Need, Queue, block_shape
from flexpipe.plan.layer import LayerPlan, stage_layers
from flexpipe.plan.layer_bytes import LayerBytes
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import FormOf, Placement, Stored, place_weights, stage_tensors
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.policy import Policy
from flexpipe.plan.stage import kv_token_bytes
from flexpipe.plan.tier import Tier


class Planner:
    """Resolves policies for one model, one set of requests and one device.

    A search asks for many: what depends on the weights' knobs alone, or on the block's alone, is
    made once.
    """

    def __init__(
        self,
        config: ModelConfig,
        needs: Sequence[Need] | Queue,
        stored: Mapping[str, Stored],
        budgets: Budgets,
        *,
        device_tier: Tier,
        compute_dtype: str,
        form_of: FormOf | None = None,
        pipeline: Pipeline | None = None,
        rank: int = 0,
        never_stops: bool = False,
    ) -> None:
        """`form_of` tells where weights in another form lie, for policies that ask for them. Plans
        are those of stage `rank` of `pipeline`; without one they are of the whole model. A row that
        `never_stops` generates all it may."""
        self._config = config
        self._pipeline = pipeline or Pipeline.whole(config.num_layers)
        self._rank = rank
        self._queue = needs if isinstance(needs, Queue) else Queue.of(needs)
        self._stored = stored
        self._budgets = budgets
        self._device_tier = device_tier
        self._compute_dtype = compute_dtype
        self._form_of = form_of
        self._never_stops = never_stops
        self._placements: dict[object, Placement] = {}
        self._layers: dict[object, tuple[tuple[LayerPlan, ...], LayerBytes]] = {}
        self._blocks: dict[object, tuple[MicroBatchPlan, ...]] = {}

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline

    @property
    def compute_dtype(self) -> str:
        return self._compute_dtype

    def __call__(self, policy: Policy) -> Plan:
        """The plan for `policy`; raises PolicyError where a share cannot be met."""
        return Plan(
            config=self._config,
            policy=policy,
            pipeline=self._pipeline,
            rank=self._rank,
            device_tier=self._device_tier,
            compute_dtype=self._compute_dtype,
            placement=self._placement(policy),
            layers=self._layers_of(policy)[0],
            layer_bytes=self._layers_of(policy)[1],
            micro_batches=self._block(policy),
            num_row_counts=self._num_row_counts(self._block(policy)),
            budgets=self._budgets,
        )

    def _num_row_counts(self, micro_batches: Sequence[MicroBatchPlan]) -> int:
        """Rows leave one by one, or those together that never stop and may generate as much;
        whoever takes a place brings a prompt as long as no other."""
        num_places = [mb.num_places for mb in micro_batches]
        if self._queue.is_even:
            return 0
        leaving = max(num_places)
        if self._never_stops:
            leaving = min(leaving, len({need.output for need in self._queue.needs}))
        return leaving + max(0, len(self._queue.needs) - sum(num_places))

    def _placement(self, policy: Policy) -> Placement:
        key = _weight_knobs(policy)
        if key not in self._placements:
            self._placements[key] = place_weights(
                self._tensors,
                policy.weights,
                self._stored,
                device_tier=self._device_tier,
                compute_dtype=self._compute_dtype,
                resident_dtype=policy.resident_dtype,
                weight_codec=policy.weight_codec,
                vocabulary_codec=policy.vocabulary_codec,
                form_of=self._form_of,
            )
        return self._placements[key]

    @cached_property
    def _tensors(self) -> tuple[TensorSpec, ...]:
        return stage_tensors(self._config, self._pipeline, self._rank)

    def _layers_of(self, policy: Policy) -> tuple[tuple[LayerPlan, ...], LayerBytes]:
        key = (*_weight_knobs(policy), policy.separate_layers)
        if key not in self._layers:
            placement = self._placement(policy)
            layers = stage_layers(
                self._config, policy, placement, self._device_tier, self._pipeline, self._rank
            )
            looked_up = self._config.tensor_names["embed_tokens"]
            embeds = self._pipeline.embeds(self._rank)
            embedding = placement.tensors[looked_up] if embeds else None
            sizes = LayerBytes.of(
                layers, placement, embedding, self._device_tier, self._compute_dtype
            )
            self._layers[key] = layers, sizes
        return self._layers[key]

    def _block(self, policy: Policy) -> tuple[MicroBatchPlan, ...]:
        rows = (policy.micro_batch_size, policy.num_micro_batches, policy.max_batch_tokens)
        codec = policy.cache_codec
        key = (*rows, policy.kv_cache, policy.hidden, codec)
        if key not in self._blocks:
            self._blocks[key] = block_shape(
                policy,
                self._queue,
                token_bytes=kv_token_bytes(self._config, self._compute_dtype, codec),
                hidden_bytes=self._config.hidden_size * DTYPE_BYTES[self._compute_dtype],
                num_blocks=self._pipeline.num_blocks,
            )
        return self._blocks[key]


def _weight_knobs(policy: Policy) -> tuple[object, ...]:
    codecs = policy.weight_codec, policy.vocabulary_codec
    return policy.weights, policy.resident_dtype, *codecs
