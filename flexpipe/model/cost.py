"""What the segments of a decoder cost: bytes of workspace, bytes of their own, FLOPs.

Mirrors `flexpipe.model.segments` without torch, so that a plan can size the pools before a tensor
exists. Invariant: a micro-batch within the counts given here takes no more than what is told here;
the tests compare both.

Three kinds of memory: the *workspace* is one buffer per compute lane, taken at the start;
*batch bytes* are the index tensors, rotary factors and masks that a micro-batch keeps for a whole
step; *transient bytes* are what torch's kernels take and free within one op.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexpipe.model.config import DTYPE_BYTES, ModelConfig
from flexpipe.plan.codec import Codec

ALIGNMENT = 64  # bytes; a cache line, and what vector loads like
CONVERT_ELEMENTS = 3 << 19  # a slice of a weight in the compute dtype: it must stay in the caches
CONVERT_STEP = 128  # out features of such a slice come in multiples of this
RESULT_ROWS, RESULT_COLUMNS = 256, 8192  # largest block of a product that torch allocates itself
# elements of a weight: below, what oneDNN takes to make a kernel for a new shape is not won back
ONEDNN_ELEMENTS = 1 << 18
NORM_ELEMENTS = 1 << 20  # a slice of a layer norm's output
NORM_ROWS = 256  # rows of an RMS norm that are widened to float32 at a time
MASK_BLOCK = 256  # queries of one row that share an attention mask
WIDEN_ROOM = 1 << 22  # elements of a KV cache in another form that stand widened, or one row's
COMPRESS_ELEMENTS = 1 << 18  # keys and values compressed at a time
WIDEN_ELEMENTS = 1 << 20  # … and widened
CODEC_BYTES = 12  # that torch takes per number while it compresses or widens; 10 were seen
INDEX_BYTES = 8
FLOAT_BYTES = 4


def workspace_bytes(
    config: ModelConfig,
    *,
    num_tokens: int,
    num_rows: int,
    compute_bytes: int,
    max_convert_elements: int = 0,
    kv_bytes: int | None = None,
    kv_codec: Codec | None = None,
    max_length: int = 0,
    wire_bytes: int | None = None,
) -> int:
    """Bytes the segments take from a `Workspace` for a micro-batch of `num_tokens` new tokens.

    `num_rows` bounds its rows. `max_convert_elements` is the size of the biggest weight that
    arrives in another dtype than the compute dtype, 0 if none does. `kv_bytes` is the width of the
    KV cache's dtype; where it is not `compute_bytes`, or the cache is compressed, rows of
    `max_length` tokens are widened, a few at a time. `wire_bytes` is the width of the weights'
    dtype.
    """
    wire = wire_bytes or DTYPE_BYTES[config.dtype]
    convert = _convert_bytes(config, max_convert_elements, compute_bytes)
    normed = _norm_bytes(config, num_tokens, compute_bytes)
    heads = config.num_heads + config.num_kv_heads
    turned = num_tokens * heads * config.head_dim * compute_bytes if config.rope else 0
    per_head = _rms_bytes(num_tokens, config.num_heads, config.head_dim, compute_bytes)
    other_kv = kv_codec is not None or (kv_bytes or compute_bytes) != compute_bytes
    widened = _widened_kv(config, num_rows, max_length) if other_kv else 0
    qkv = num_tokens * (heads + config.num_kv_heads) * config.head_dim
    mlp = (2 if config.gated_mlp else 1) * _aligned(num_tokens * config.ffn_size * compute_bytes)
    return max(
        _aligned(qkv * compute_bytes)
        + max(
            normed + convert,
            _aligned(turned),
            per_head if config.qk_norm else 0,
            _aligned(widened * compute_bytes),
            _compressed_bytes(config, num_tokens, kv_codec),
        ),
        mlp + normed + convert,
        _embed_bytes(config, num_tokens, compute_bytes, wire) + convert,
        _head_bytes(config, num_rows, compute_bytes) + convert,
    )


def cpu_attention_bytes(
    config: ModelConfig,
    *,
    num_rows: int,
    max_length: int,
    compute_bytes: int,
    kv_codec: Codec | None,
) -> int:
    """Bytes of workspace that attention on the CPU takes for its rows, each with one new token."""
    if kv_codec is None:
        return 0
    widened = _aligned(_widened_kv(config, num_rows, max_length) * compute_bytes)
    return max(widened, _compressed_bytes(config, num_rows, kv_codec))


def batch_bytes(
    config: ModelConfig, *, num_tokens: int, num_rows: int, max_length: int, compute_bytes: int
) -> int:
    """Bytes of what a micro-batch keeps for one step on the compute device, at most."""
    index = INDEX_BYTES * (num_tokens + 2 * num_rows)
    turns = 2 * num_tokens * config.head_dim * compute_bytes if config.rope else 0
    block = min(MASK_BLOCK, num_tokens)
    masks = 0
    for window in distinct_windows(config):
        band = max_length if window is None else min(max_length, window + block)
        masks += (num_rows * max_length + block * band) * compute_bytes
    return index + turns + masks


def transient_bytes(
    config: ModelConfig,
    *,
    num_tokens: int,
    num_rows: int,
    max_length: int,
    compute_bytes: int,
    kv_codec: Codec | None = None,
    num_threads: int = 1,
) -> int:
    """Bytes that torch's kernels take and free within one op, outside the workspace."""
    attended = num_tokens * config.num_heads * (config.head_dim * compute_bytes + FLOAT_BYTES)
    tiles = num_threads * FLOAT_BYTES * MASK_BLOCK * (2 * MASK_BLOCK + 2 * config.head_dim)
    norm = min(num_tokens * config.hidden_size, NORM_ELEMENTS) * compute_bytes
    block = min(MASK_BLOCK, num_tokens)
    masks = (num_rows + block) * max_length * (INDEX_BYTES + 2)
    turns = 4 * num_tokens * config.head_dim * FLOAT_BYTES if config.rope else 0
    rows, attention = min(num_tokens, RESULT_ROWS), config.num_heads * config.head_dim
    widest = max(len(config.vocab_rows), config.hidden_size, attention)
    wide = 2 * min(config.ffn_size, RESULT_COLUMNS) + config.hidden_size
    product = rows * (max(min(widest, RESULT_COLUMNS), wide) + attention) * compute_bytes
    coded = 0
    if kv_codec is not None:
        per_token = 2 * config.num_kv_heads * config.head_dim
        compressed = min(num_tokens * per_token, max(COMPRESS_ELEMENTS, per_token))
        widened = min(num_rows * max_length * per_token, max(WIDEN_ELEMENTS, num_rows * per_token))
        coded = max(compressed, widened) * CODEC_BYTES
    return max(attended + tiles, norm, masks, turns, product, coded)


def widen_bytes(num_elements: int, *, in_slices: bool = True) -> int:
    """Bytes that widening so many compressed numbers takes and frees, where no kernel does it."""
    if in_slices:
        num_elements = min(num_elements, CONVERT_ELEMENTS)
    return num_elements * (2 * FLOAT_BYTES + 1)


def decoder_flops(config: ModelConfig, num_tokens: int, num_attended: int) -> int:
    """FLOPs of one decoder layer; `num_attended` sums the keys that each new token sees."""
    return (
        qkv_flops(config, num_tokens)
        + attend_flops(config, num_attended)
        + out_flops(config, num_tokens)
        + mlp_flops(config, num_tokens)
    )


def qkv_flops(config: ModelConfig, num_tokens: int) -> int:
    heads = config.num_heads + 2 * config.num_kv_heads
    return 2 * num_tokens * config.hidden_size * heads * config.head_dim


def attend_flops(config: ModelConfig, num_attended: int) -> int:
    return 4 * num_attended * config.num_heads * config.head_dim


def out_flops(config: ModelConfig, num_tokens: int) -> int:
    return 2 * num_tokens * config.hidden_size * config.num_heads * config.head_dim


def mlp_flops(config: ModelConfig, num_tokens: int) -> int:
    return 2 * num_tokens * config.hidden_size * config.ffn_size * (3 if config.gated_mlp else 2)


def embed_flops(config: ModelConfig, num_tokens: int) -> int:
    projected = config.has_projections
    return 2 * num_tokens * config.hidden_size * config.input_size if projected else 0


def head_flops(config: ModelConfig, num_rows: int) -> int:
    """FLOPs of the logits of `num_rows` sampled tokens, the projection before them included."""
    logits = 2 * num_rows * config.input_size * len(config.vocab_rows)
    return logits + embed_flops(config, num_rows)


def num_attended(num_context: int, num_new: int, window: int | None = None) -> int:
    """Keys seen by a row's new tokens, summed: each sees the context, its elders and itself."""
    if window is None:
        return num_new * num_context + num_new * (num_new + 1) // 2
    growing = min(num_new, max(0, window - num_context))  # tokens that still see everything
    return num_attended(num_context, growing) + (num_new - growing) * window


def distinct_windows(config: ModelConfig) -> Sequence[int | None]:
    """Every attention window that some layer has, each once."""
    return tuple(dict.fromkeys(config.windows or (None,)))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _convert_bytes(config: ModelConfig, max_convert_elements: int, compute_bytes: int) -> int:
    widest = max(config.hidden_size, config.ffn_size, config.num_heads * config.head_dim)
    return _aligned(min(max_convert_elements, max(CONVERT_ELEMENTS, widest)) * compute_bytes)


def _widened_kv(config: ModelConfig, num_rows: int, max_length: int) -> int:
    """Elements of the rows' caches that stand widened at a time: one row's at least."""
    row = max_length * 2 * config.num_kv_heads * config.head_dim
    return min(max(row, WIDEN_ROOM), num_rows * row)


def _compressed_bytes(config: ModelConfig, num_tokens: int, codec: Codec | None) -> int:
    """Keys and values of new tokens, on their way into a compressed KV cache."""
    row_bytes = codec.row_bytes(config.head_dim) if codec else 0
    return _aligned(num_tokens * 2 * config.num_kv_heads * row_bytes)


def _norm_bytes(config: ModelConfig, num_tokens: int, compute_bytes: int) -> int:
    """The normalized hidden states and what an RMS norm needs beside them."""
    rms = _rms_bytes(num_tokens, 1, config.hidden_size, compute_bytes) * (config.norm == "rms")
    normed = 0 if config.post_norm else num_tokens * config.hidden_size * compute_bytes
    return _aligned(normed) + rms


def _rms_bytes(num_tokens: int, num_heads: int, size: int, compute_bytes: int) -> int:
    """A factor per token and head, and a slice in float32 where the dtype is narrower."""
    if compute_bytes == FLOAT_BYTES:
        return _aligned(num_tokens * num_heads * FLOAT_BYTES)
    rows = min(num_tokens, NORM_ROWS) * num_heads * FLOAT_BYTES
    return max(
        _aligned(num_tokens * num_heads * FLOAT_BYTES), _aligned(rows * size) + _aligned(rows)
    )


def _embed_bytes(config: ModelConfig, num_tokens: int, compute_bytes: int, wire_bytes: int) -> int:
    rows = num_tokens * config.input_size * compute_bytes if config.has_projections else 0
    has_positions = config.learned_positions is not None and config.shard.is_first
    positions = num_tokens * config.hidden_size * wire_bytes if has_positions else 0
    return max(_aligned(rows), _aligned(positions))


def _head_bytes(config: ModelConfig, num_rows: int, compute_bytes: int) -> int:
    selected = _aligned(num_rows * config.hidden_size * compute_bytes)
    factors = _rms_bytes(num_rows, 1, config.hidden_size, compute_bytes)
    factors *= config.norm == "rms"
    projected = num_rows * config.input_size * compute_bytes if config.has_projections else 0
    return selected + factors + _aligned(projected)
