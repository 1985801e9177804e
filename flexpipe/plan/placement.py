"""Which tensor rests on which tier.

Shares are asked of the whole model; tensors are whole. What rounding leaves over is carried from
one tensor to the next, so that over the model each tier holds what was asked within one tensor, and
every layer streams about as much as its neighbours. What the vocabulary meets may be larger than a
layer, so it is dealt first and its rounding is spread over all layers. Vectors (norms, biases) and
position tables are a thousandth of the bytes: they stay beside the compute device and are left out
of the shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from flexpipe.errors import PolicyError
from flexpipe.model.config import (
    DTYPE_BYTES,
    HELD_BYTES,
    ModelConfig,
    TensorSpec,
    attention_tensors,
    embed_tensors,
    head_tensors,
    mlp_tensors,
)
from flexpipe.plan.codec import Codec
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.policy import Shares
from flexpipe.plan.tier import Tier


class Stored(Protocol):
    """What a plan needs to know of a tensor in a checkpoint."""

    @property
    def dtype(self) -> str: ...
    @property
    def path(self) -> object: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def stride(self) -> int | None: ...  # from row to row, where they are parts of longer ones


class Form(Stored, Protocol):
    """The same of a tensor's other form, which may have to be made first."""

    @property
    def new_bytes(self) -> int: ...  # that making it writes; 0 where it is there already


# where a tensor lies compressed, or without a codec just row behind row
FormOf = Callable[[str, Codec | None], Form]


@dataclass(slots=True)
class Diffusion:
    """Deals items of different sizes to tiers so that each tier's sum follows its share.

    Two binary decisions, fastest tier first; each keeps the running sum within half an item of
    what was asked (error diffusion), so the result is within one item on every tier.
    """

    shares: Shares
    seen: int = 0
    rest_seen: int = 0
    given: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))

    def deal(self, size: int) -> Tier:
        """The tier that takes the next item of `size` bytes."""
        self.seen += size
        if self._takes(Tier.GPU, self.shares.gpu, self.seen, size):
            tier = Tier.GPU
        else:
            self.rest_seen += size
            rest = self.shares.cpu + self.shares.disk
            cpu = self.shares.cpu / rest if rest else 0.0
            takes = self._takes(Tier.CPU, cpu, self.rest_seen, size)
            tier = Tier.CPU if takes else Tier.DISK
        self.given[tier] += size
        return tier

    def _takes(self, tier: Tier, share: float, seen: int, size: int) -> bool:
        if share <= 0:
            return False
        return share >= 1 or self.given[tier] + size / 2 <= share * seen


def check_all_given(what: str, unit: str, shares: Shares, given: Mapping[Tier, int]) -> None:
    """A tier that was asked to hold something and got nothing is an error, not a surprise."""
    for tier in shares.tiers:
        if not given[tier]:
            raise PolicyError(
                f"{what}.{tier.value} asks for a share of {shares.of(tier):g}, but no whole {unit} "
                f"fits it; raise the share, or set it to 0"
            )


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and where it rests: its tier, the dtype it has there, the file it comes from.

    With a `codec` it is compressed wherever it rests or travels: rows of bytes.
    """

    spec: TensorSpec
    home: Tier
    dtype: str
    stored: Stored
    codec: Codec | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what lies at home, in items of `dtype`."""
        if self.codec is None:
            return self.spec.shape
        num_rows, size = self.spec.shape
        return num_rows, self.codec.row_bytes(size)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * HELD_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes at home."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The home of each tensor, by checkpoint name, and what the shares became."""

    tensors: Mapping[str, PlacedTensor]
    asked: Shares
    achieved_bytes: Mapping[Tier, int]  # of shared tensors, in bytes of their files
    new_bytes: int = 0  # of forms that are yet to be written


def model_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor of the model once, in the order of use (a tied head is the embedding)."""
    return stage_tensors(config, Pipeline.whole(config.num_layers), 0)


def stage_tensors(config: ModelConfig, pipeline: Pipeline, rank: int) -> tuple[TensorSpec, ...]:
    """The same of one stage; both ends of a pipeline hold a tied table."""
    specs: dict[str, TensorSpec] = {}
    groups: list[Iterable[TensorSpec]] = []
    if pipeline.embeds(rank):
        groups.append(embed_tensors(config))
    for layer in chain.from_iterable(pipeline.chunks(rank)):
        groups += [attention_tensors(config, layer), mlp_tensors(config, layer)]
    if pipeline.has_head(rank):
        groups.append(head_tensors(config))
    for group in groups:
        for spec in group:
            specs.setdefault(spec.name, spec)
    return tuple(specs.values())


def is_shared(spec: TensorSpec) -> bool:
    """Whether the policy's shares decide the home of this tensor."""
    return len(spec.shape) == 2 and spec.role != "embed_positions"


def meets_vocabulary(spec: TensorSpec) -> bool:
    return spec.role in ("embed_tokens", "lm_head")


def place_weights(
    specs: Sequence[TensorSpec],
    shares: Shares,
    stored: Mapping[str, Stored],
    *,
    device_tier: Tier,
    compute_dtype: str,
    resident_dtype: str,
    weight_codec: Codec | None = None,
    vocabulary_codec: Codec | None = None,
    form_of: FormOf | None = None,
) -> Placement:
    """Deal the tensors of a model, or of one stage, to tiers.

    Tensors at home on `device_tier` are held in the compute dtype unless `resident_dtype` is
    "checkpoint"; tensors that travel are held in the smaller of checkpoint and compute dtype; on
    disk they stay as they are, but for rows with gaps between them, which are repacked. Where a
    codec is given, shared tensors are compressed everywhere. `form_of` tells where such a form of a
    tensor lies.
    """
    shared = [spec for spec in specs if is_shared(spec)]
    codecs = {
        spec.name: codec
        for spec in shared
        if (codec := vocabulary_codec if meets_vocabulary(spec) else weight_codec)
    }
    assert form_of is not None or not codecs
    forms = {name: form_of(name, codec) for name, codec in codecs.items() if form_of}
    files: dict[str, Stored] = {**stored, **forms}
    homes, given = _deal_weights(shares, shared, files)
    for name, home in homes.items():
        if home == Tier.DISK and files[name].stride is not None:
            assert form_of is not None
            files[name] = forms[name] = form_of(name, None)
    placed: dict[str, PlacedTensor] = {}
    for spec in specs:
        source = files[spec.name]
        home = homes.get(spec.name, device_tier)
        dtype = source.dtype
        if spec.name in codecs:
            dtype = files[spec.name].dtype
        elif home == device_tier:
            if resident_dtype == "compute" or not is_shared(spec):
                dtype = compute_dtype
        elif home == Tier.CPU and DTYPE_BYTES[compute_dtype] < DTYPE_BYTES[dtype]:
            dtype = compute_dtype
        placed[spec.name] = PlacedTensor(spec, home, dtype, source, codecs.get(spec.name))
    check_all_given("weights", "tensor", shares, given)
    # tensors may share a file
    new = {str(form.path): form.new_bytes for form in forms.values()}
    return Placement(
        tensors=placed, asked=shares, achieved_bytes=given, new_bytes=sum(new.values())
    )


def _deal_weights(
    shares: Shares, specs: Sequence[TensorSpec], stored: Mapping[str, Stored]
) -> tuple[dict[str, Tier], dict[Tier, int]]:
    """Homes by name and bytes per tier: first what the vocabulary meets, then the layers."""
    sizes = {spec.name: stored[spec.name].num_bytes for spec in specs}
    vocabulary = [spec.name for spec in specs if meets_vocabulary(spec)]
    first = Diffusion(shares)
    homes = {name: first.deal(sizes[name]) for name in vocabulary}
    total = sum(sizes.values())
    left = {tier: max(0.0, shares.of(tier) * total - first.given[tier]) for tier in Tier}
    scale = sum(left.values())
    rest = Diffusion(Shares(**{tier.value: left[tier] / scale for tier in Tier}))
    homes |= {name: rest.deal(size) for name, size in sizes.items() if name not in homes}
    return homes, {tier: first.given[tier] + rest.given[tier] for tier in Tier}


def deal_places(what: str, unit: str, shares: Shares, sizes: Sequence[int]) -> tuple[Tier, ...]:
    """Homes for a sequence of rows or micro-batches of the given bytes."""
    diffusion = Diffusion(shares)
    homes = tuple(diffusion.deal(size) for size in sizes)
    check_all_given(what, unit, shares, diffusion.given)
    return homes
