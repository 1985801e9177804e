"""The segments keep to their plan: bytes, dtypes, layouts, kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.kernels import codec as codec_module
from flexpipe.kernels.codec import compress
from flexpipe.model import batch as batch_module
from flexpipe.model import cost, matmul, segments
from flexpipe.model.config import attention_tensors, mlp_tensors
from flexpipe.model.families import read_config
from flexpipe.model.sampling import greedy
from flexpipe.model.segments import Batch, LayerWeights, RopeTable, RowSpan, Workspace
from flexpipe.plan.codec import Codec
from tests.hf import TOLERANCE, VARIANTS, widened_checkpoint
from tests.model.loop import Decoder, generate

BOTH = ("compress_weight", "compress_vocabulary")
QWEN3 = read_config(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    }
)


def build(runs: list[list[RowSpan]], config=QWEN3, codec: Codec | None = None) -> Batch:
    rope = RopeTable.build(config.rope, config.head_dim, "cpu") if config.rope else None
    return Batch.build(config, runs, rope, lambda t: t, torch.float32, kv_codec=codec)


# Workspace


def test_workspace_tensors_are_aligned_and_do_not_overlap():
    ws = Workspace(torch.zeros(4096, dtype=torch.uint8)[3:])
    first, second = ws.take((3, 5), torch.float32), ws.take((7,), torch.bfloat16)
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    first.fill_(1)
    second.fill_(2)
    assert first.sum() == 15 and second.sum() == 14


def test_workspace_gives_released_bytes_again_and_remembers_the_peak():
    ws = Workspace(torch.empty(4096, dtype=torch.uint8))
    kept = ws.take((16,), torch.float32)
    mark = ws.mark()
    once = ws.take((32,), torch.float32)
    ws.release(mark)
    again = ws.take((32,), torch.float32)
    assert once.data_ptr() == again.data_ptr() > kept.data_ptr()
    ws.reset()
    assert ws.mark() == 0 and ws.peak_bytes == 192


def test_exhausted_workspace_is_a_bug():
    ws = Workspace(torch.empty(1024, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="cannot hold"):
        ws.take((1025,), torch.uint8)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, Codec(bits=4)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_planned_workspace_holds_what_is_used_and_little_more(variant, wire, kv, hf_checkpoint):
    # rows of equal length are widened together, and no others are
    lengths = [1, 40, 300, 20] if kv == torch.float32 else [150] * 4
    path = hf_checkpoint(variant, dtype=wire)
    decoder = Decoder(path, num_rows=4, region=max(lengths) + 2, max_tokens=sum(lengths), kv=kv)
    generate(decoder, [[7] * n for n in lengths], 2)
    assert decoder.ws.peak_bytes <= decoder.planned_bytes
    assert decoder.ws.peak_bytes >= decoder.planned_bytes // 2


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_planned_workspace_holds_what_compressed_weights_use(variant, wire, hf_checkpoint):
    lengths = [1, 40, 300, 20]
    path = hf_checkpoint(variant, dtype=wire)
    decoder = Decoder(path, num_rows=4, max_tokens=sum(lengths), codec=Codec(bits=4))
    generate(decoder, [[7] * n for n in lengths], 2)
    assert decoder.ws.peak_bytes <= decoder.planned_bytes
    assert decoder.ws.peak_bytes >= decoder.planned_bytes // 2


@pytest.mark.parametrize("num_tokens", [1, 3, 500])
def test_planned_workspace_covers_small_and_large_batches(num_tokens, hf_checkpoint):
    for variant in ("opt-350m", "llama3", "qwen3"):
        path = hf_checkpoint(variant)
        decoder = Decoder(path, num_rows=1, region=512, max_tokens=num_tokens)
        decoder.step([[(0, [9] * num_tokens)]], [0])
        assert decoder.planned_bytes // 2 <= decoder.ws.peak_bytes <= decoder.planned_bytes


# Weights in another dtype


@pytest.mark.parametrize("slice_elements", [cost.CONVERT_ELEMENTS, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_converted_on_the_fly_equal_weights_converted_before(
    variant, slice_elements, hf_checkpoint, monkeypatch
):
    monkeypatch.setattr(matmul, "CONVERT_ELEMENTS", slice_elements)
    path = hf_checkpoint(variant, dtype="bfloat16")
    prompts = [[5, 6, 7], list(range(10, 90))]
    before = generate(Decoder(path, num_rows=2, wire=torch.float32), prompts, 3)
    on_the_fly = generate(Decoder(path, num_rows=2), prompts, 3)
    for expected, logits in zip(before, on_the_fly, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("slice_elements", [cost.CONVERT_ELEMENTS, 1000])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", ["opt", "opt-350m", "llama3-tied", "qwen3"])
def test_compressed_weights_compute_like_what_they_widen_to(
    variant, bits, slice_elements, hf_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(matmul, "CONVERT_ELEMENTS", slice_elements)
    path, knobs = hf_checkpoint(variant), dict.fromkeys(BOTH, str(bits))
    widened = widened_checkpoint(path, tmp_path / "widened", knobs)
    prompts = [[5, 6, 7], list(range(10, 90))]
    before = generate(Decoder(widened, num_rows=2), prompts, 3)
    on_the_fly = generate(Decoder(path, num_rows=2, codec=Codec(bits=bits)), prompts, 3)
    for expected, logits in zip(before, on_the_fly, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


# Products


@pytest.mark.parametrize("kernel", ["mkl", "onednn"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_products_agree_with_float64(kernel, add, weight_dtype, monkeypatch):
    """Blocks of rows and columns that divide nothing, a result that is a slice, with and without
    a bias."""
    if kernel == "onednn" and not matmul._HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "ONEDNN_ELEMENTS", 0 if kernel == "onednn" else 10**18)
    monkeypatch.setattr(matmul, "RESULT_ROWS", 7)
    monkeypatch.setattr(matmul, "RESULT_COLUMNS", 11)
    monkeypatch.setattr(matmul, "CONVERT_ELEMENTS", 13 * 24)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(17, 40, generator=generator)
    x, weight = wide[:, :24], torch.randn(50, 24, generator=generator).to(weight_dtype)
    ws = Workspace(torch.empty(1 << 16, dtype=torch.uint8))
    for bias in (None, torch.randn(50, generator=generator), torch.ones(50, dtype=torch.bfloat16)):
        target = torch.randn(17, 60, generator=generator)
        before = target.clone()
        matmul.multiply(x, weight, bias, target[:, 5:55], ws, add=add)
        expected = x.double() @ weight.double().t()
        expected += 0 if bias is None else bias.double()
        expected += before[:, 5:55].double() if add else 0
        torch.testing.assert_close(target[:, 5:55].double(), expected, rtol=0, atol=5e-5)
        assert torch.equal(target[:, :5], before[:, :5])
        assert torch.equal(target[:, 55:], before[:, 55:])


@pytest.mark.skipif(not matmul._HAS_ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize(("num_out", "num_in"), [(50, 24), (200, 64), (64, 1)])
@pytest.mark.parametrize("num_rows", [1, 17, 300])
def test_packed_weights_multiply_like_plain_ones(num_out, num_in, num_rows):
    """In blocks that divide nothing; what they were packed from may be overwritten."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator)
    buffer = torch.zeros(70 * num_in * 4, dtype=torch.uint8)
    packed = matmul.PackedWeight.make(
        (num_out, num_in), torch.float32, buffer, lambda rows, plain: plain.copy_(weight[rows])
    )
    buffer.fill_(0x3C)
    assert len(packed.blocks) == -(-num_out // 64)
    x, bias = torch.randn(num_rows, num_in, generator=generator), torch.randn(num_out)
    ws = Workspace(torch.empty(1 << 16, dtype=torch.uint8))
    target = torch.ones(num_rows, num_out)
    matmul.multiply(x, packed, bias, target, ws, add=True)
    expected = 1 + x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu", "relu", "gelu", "gelu_tanh"])
def test_activated_products_agree_wherever_they_are_made(activation, dtype, monkeypatch):
    """Fused in oneDNN's kernel for few tokens, afterwards for more."""
    monkeypatch.setattr(matmul, "ONEDNN_ELEMENTS", 0)
    monkeypatch.setattr(matmul, "RESULT_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 24, generator=generator), torch.randn(50, 24, generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = torch.randn(50, generator=generator).bfloat16()
    functions = {
        None: lambda t: t,
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    }
    expected = functions[activation](x.double() @ weight.double().t() + bias.double())
    ws = Workspace(torch.empty(1 << 16, dtype=torch.uint8))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for tokens in (slice(0, 9), slice(0, 40)):
        made = matmul.activated(x[tokens], weight, bias, activation, ws)
        torch.testing.assert_close(made.double(), expected[tokens], rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_onednn_serves_every_family(variant, hf_checkpoint, monkeypatch):
    path = hf_checkpoint(variant)
    prompts = [[5, 6, 7], list(range(10, 90))]
    before = generate(Decoder(path, num_rows=2), prompts, 3)
    monkeypatch.setattr(matmul, "ONEDNN_ELEMENTS", 0)
    for expected, logits in zip(
        before, generate(Decoder(path, num_rows=2), prompts, 3), strict=True
    ):
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["opt", "opt-350m", "llama3", "qwen3"])
def test_computing_in_half_precision_stays_close(variant, compute, hf_checkpoint):
    path = hf_checkpoint(variant, dtype="bfloat16")
    prompts = [[5, 6, 7], list(range(10, 90))]
    exact = generate(Decoder(path, num_rows=2), prompts, 1)
    rounded = generate(Decoder(path, num_rows=2, compute=compute), prompts, 1)
    for expected, logits in zip(exact, rounded, strict=True):
        assert logits.dtype == compute
        assert (logits - expected).norm() < 0.1 * expected.norm()


def test_a_layer_keeps_to_the_device_of_its_tensors():
    """The meta device computes nothing, but refuses operands that live elsewhere."""
    config, device = QWEN3, torch.device("meta")
    rope = RopeTable.build(config.rope, config.head_dim, device)
    runs = [[RowSpan(0, 9), RowSpan(0, 9), RowSpan(3, 1), RowSpan(7, 1)], [RowSpan(30, 20)]]
    batch = Batch.build(config, runs, rope, lambda tensor: tensor.to(device), torch.bfloat16)
    specs = (*attention_tensors(config, 1), *mlp_tensors(config, 1))
    weights = {spec.role: torch.empty(spec.shape, device=device) for spec in specs}
    kvs = [torch.empty(len(run), 64, 2, 2, 32, device=device, dtype=torch.bfloat16) for run in runs]
    hidden = torch.empty(batch.num_tokens, 64, device=device, dtype=torch.bfloat16)
    ws = Workspace(torch.empty(1 << 20, dtype=torch.uint8, device=device))
    segments.decoder_layer(hidden, LayerWeights(**weights), batch, kvs, config, 1, ws)


# Attention pieces


def reference_attention(q, k, v, *, first: int, window: int | None):
    """Row by row, query by query; q [n, N, D] behind `first` tokens, k and v [L, K, D]."""
    num_groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(num_groups, 1), v.repeat_interleave(num_groups, 1)
    results = []
    for place, query in enumerate(q):
        last = first + place + 1
        oldest = 0 if window is None else max(0, last - window)
        scores = torch.einsum("nd,lnd->nl", query, k[oldest:last]) / math.sqrt(q.shape[2])
        results.append(torch.einsum("nl,lnd->nd", scores.softmax(-1), v[oldest:last]))
    return torch.stack(results)


spans = st.builds(RowSpan, st.integers(0, 12), st.sampled_from([0, 1, 1, 1, 2, 3, 9]))
runs_of_spans = st.lists(st.lists(spans, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    runs_of_spans,
    st.sampled_from([0, 1]),
    st.sampled_from([2, 256]),
    st.booleans(),
)
def test_attention_is_exact_for_any_mix_of_rows(runs, layer, block, ragged):
    generator = torch.Generator().manual_seed(0)
    config, region = QWEN3, 24
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "MASK_BLOCK", block)
        if not ragged:
            patch.setattr(batch_module, "runs_here", lambda device: False)
        batch = build(runs)
    q_TND = torch.randn(batch.num_tokens, 4, 32, generator=generator)
    new_T2KD = torch.randn(batch.num_tokens, 2, 2, 32, generator=generator)
    kvs = [torch.randn(len(run), region, 2, 2, 32, generator=generator) for run in runs]
    ws = Workspace(torch.empty(1 << 16, dtype=torch.uint8))
    queries = q_TND.clone()
    segments.append_kv(new_T2KD, batch, kvs, ws)
    attn_TA = segments.attend(queries, batch, kvs, config, layer, ws)
    token = 0
    for run, kv_RL2KD in zip(runs, kvs, strict=True):
        for span, kv_L2KD in zip(run, kv_RL2KD, strict=True):
            new = slice(token, token + span.num_new)
            token += span.num_new
            assert torch.equal(kv_L2KD[span.num_context : span.length], new_T2KD[new])
            if span.num_new:
                k, v = kv_L2KD[: span.length].unbind(1)
                expected = reference_attention(
                    q_TND[new], k, v, first=span.num_context, window=config.window(layer)
                )
                torch.testing.assert_close(
                    attn_TA[new].view(expected.shape), expected, rtol=1e-5, atol=1e-5
                )


def widened(kv: torch.Tensor, codec: Codec, dim: int) -> torch.Tensor:
    """What compressed rows stand for, in float64."""
    out = torch.empty(*kv.shape[:-1], dim)
    codec_module._widen_by_torch(kv, codec, out)
    return out.double()


@settings(max_examples=40, deadline=None)
@given(
    runs=runs_of_spans,
    layer=st.sampled_from([0, 1]),
    form=st.sampled_from(
        [(32, Codec(bits=4)), (80, Codec(bits=8)), (80, Codec(bits=4, group_size=66))]
    ),
    ragged=st.booleans(),
    rows_at_once=st.sampled_from([1, 2, 100]),
    tokens_at_once=st.sampled_from([1, 5, 1000]),
)
def test_attention_over_a_compressed_cache_is_that_over_what_it_stands_for(
    runs, layer, form, ragged, rows_at_once, tokens_at_once
):
    """Heads of half a group, of a group and a quarter, and of a group and a fifth."""
    dim, codec = form
    generator = torch.Generator().manual_seed(0)
    config, region = replace(QWEN3, head_dim=dim), 24
    per_token = 2 * config.num_kv_heads * dim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "MASK_BLOCK", 2)
        patch.setattr(segments, "WIDEN_ROOM", rows_at_once * region * per_token)
        patch.setattr(segments, "WIDEN_ELEMENTS", tokens_at_once * per_token)
        patch.setattr(segments, "COMPRESS_ELEMENTS", tokens_at_once * per_token)
        if not ragged:
            patch.setattr(batch_module, "runs_here", lambda device: False)
        batch = build(runs, config, codec)
        q_TND = torch.randn(batch.num_tokens, 4, dim, generator=generator)
        new_T2KD = torch.randn(batch.num_tokens, 2, 2, dim, generator=generator)
        kvs = [compressed_cache(run, region, codec, dim, generator) for run in runs]
        before = [kv.clone() for kv in kvs]
        ws = Workspace(torch.empty(1 << 20, dtype=torch.uint8))
        queries = q_TND.clone()
        segments.append_kv(new_T2KD, batch, kvs, ws)
        attn_TA = segments.attend(queries, batch, kvs, config, layer, ws)
    token = 0
    for run, kv_RL2KX, old_RL2KX in zip(runs, kvs, before, strict=True):
        for span, kv_L2KX, old_L2KX in zip(run, kv_RL2KX, old_RL2KX, strict=True):
            new = slice(token, token + span.num_new)
            token += span.num_new
            # each token for itself: those before it, and the room behind it, keep their bytes
            assert torch.equal(kv_L2KX[: span.num_context], old_L2KX[: span.num_context])
            assert torch.equal(kv_L2KX[span.length :], old_L2KX[span.length :])
            kv_L2KD = widened(kv_L2KX[: span.length], codec, dim)
            if span.num_new:
                error = (kv_L2KD[span.num_context :] - new_T2KD[new].double()).abs().max()
                assert error < (0.4 if codec.bits == 4 else 0.03)
                k, v = kv_L2KD.unbind(1)
                expected = reference_attention(
                    q_TND[new].double(), k, v, first=span.num_context, window=config.window(layer)
                )
                torch.testing.assert_close(
                    attn_TA[new].view(expected.shape).double(), expected, rtol=1e-5, atol=1e-5
                )


def compressed_cache(run, region, codec, dim, generator) -> torch.Tensor:
    """Some numbers where rows have a context, bytes that are no numbers elsewhere."""
    rows = torch.full((len(run), region, 2, 2, codec.row_bytes(dim)), 255, dtype=torch.uint8)
    for span, kv_L2KX in zip(run, rows, strict=True):
        behind = kv_L2KX[: span.num_context].view(-1, codec.row_bytes(dim))
        compress(torch.randn(len(behind), dim, generator=generator), codec, behind)
    return rows


@settings(max_examples=30, deadline=None)
@given(
    codec=st.builds(Codec, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 64])),
    num_tokens=st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_a_tokens_bytes_do_not_depend_on_what_is_appended_with_it(codec, num_tokens, scale):
    """Any chunking leaves the same cache."""
    generator = torch.Generator().manual_seed(0)
    new_T2KD = torch.randn(num_tokens, 2, 2, 32, generator=generator) * scale
    ws = Workspace(torch.empty(1 << 16, dtype=torch.uint8))
    whole, stepwise = (
        torch.zeros(1, num_tokens, 2, 2, codec.row_bytes(32), dtype=torch.uint8) for _ in range(2)
    )
    segments.append_kv(new_T2KD, build([[RowSpan(0, num_tokens)]], QWEN3, codec), [whole], ws)
    for token in range(num_tokens):
        batch = build([[RowSpan(token, 1)]], QWEN3, codec)
        segments.append_kv(new_T2KD[token : token + 1], batch, [stepwise], ws)
    assert torch.equal(whole, stepwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_torch_takes_no_more_than_planned_while_it_compresses_and_widens(dim, bits, dtype):
    codec = Codec(bits=bits)
    new_T2KD = torch.randn(64, 4, 8, dim).to(dtype)[:, :2]  # keys and values lie behind queries
    batch = build([[RowSpan(0, 64)]], replace(QWEN3, head_dim=dim), codec)
    kv_RL2KX = torch.zeros(1, 64, 2, 8, codec.row_bytes(dim), dtype=torch.uint8)
    wide = torch.empty(1, 64, 2, 8, dim, dtype=dtype)
    ws = Workspace(torch.empty(1 << 20, dtype=torch.uint8))
    planned = cost.CODEC_BYTES * new_T2KD.numel()
    assert taken(lambda: segments.append_kv(new_T2KD, batch, [kv_RL2KX], ws)) <= planned
    assert taken(lambda: codec_module._widen_by_torch(kv_RL2KX, codec, wide)) <= planned


def taken(work: Callable[[], object]) -> int:
    """The most bytes that torch held at a time while it worked."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(accumulate(num_bytes for _, num_bytes in sorted(changes)))


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_that_decode_side_by_side_share_one_call(monkeypatch, ragged):
    monkeypatch.setattr(batch_module, "runs_here", lambda device: ragged)
    batch = build([[RowSpan(n, 1) for n in (3, 8, 5)], [RowSpan(2, 1)]])
    assert [piece.num_rows for piece in batch.pieces[None]] == [3, 1]
    assert [piece.mask is None for piece in batch.pieces[None]] == [ragged, True]
    for piece in batch.pieces[None]:
        assert (piece.ragged is not None) == ragged


def test_ragged_rows_name_the_keys_each_of_them_sees(monkeypatch):
    monkeypatch.setattr(batch_module, "runs_here", lambda device: True)
    batch = build([[RowSpan(n, 1) for n in (3, 8, 5)]])
    whole, windowed = batch.pieces[None][0].ragged, batch.pieces[5][0].ragged
    assert whole.first_R.tolist() == [0, 0, 0] and whole.count_R.tolist() == [4, 9, 6]
    assert windowed.first_R.tolist() == [0, 4, 1] and windowed.count_R.tolist() == [4, 5, 5]
    assert whole.order_R.tolist() == [1, 2, 0]  # longest first: no thread waits for the last row


def test_decoding_rows_of_equal_length_need_no_mask(monkeypatch):
    monkeypatch.setattr(batch_module, "runs_here", lambda device: False)
    for pieces in build([[RowSpan(9, 1)] * 4]).pieces.values():
        (piece,) = pieces
        assert piece.mask is None and piece.num_rows == 4
    assert build([[RowSpan(9, 1)] * 4]).pieces[5][0].keys == slice(5, 10)


def test_indices_reach_the_device_in_one_transfer():
    sent = []

    def to_device(tensor):
        sent.append(tensor)
        return tensor

    rope = RopeTable.build(QWEN3.rope, 32, "cpu")
    runs = [[RowSpan(0, 7), RowSpan(4, 1), RowSpan(6, 1)], [RowSpan(3, 2)]]
    batch = Batch.build(QWEN3, runs, rope, to_device, torch.float32)
    assert len(sent) == 1
    assert batch.positions_T.tolist() == [*range(7), 4, 6, 3, 4]
    assert batch.sample_index_S.tolist() == [6, 7, 8, 10]


def test_only_sampled_rows_reach_the_head():
    runs = [[RowSpan(0, 3, samples=False), RowSpan(2, 1), RowSpan(5, 0), RowSpan(0, 2)]]
    assert build(runs).sample_index_S.tolist() == [3, 5]


@contextmanager
def kernels() -> Iterator[set[str]]:
    seen: set[str] = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield seen
    seen |= {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "runs",
    [
        [[RowSpan(0, 40)]],
        [[RowSpan(0, 40), RowSpan(0, 40)]],
        [[RowSpan(8, 40)]],
        [[RowSpan(8, 1), RowSpan(12, 1)]],
    ],
)
def test_attention_runs_in_the_flash_kernel_without_copies_of_the_cache(monkeypatch, runs):
    monkeypatch.setattr(batch_module, "runs_here", lambda device: False)
    batch = build(runs)
    kvs = [torch.randn(len(run), 64, 2, 2, 32) for run in runs]
    q_TND = torch.randn(batch.num_tokens, 4, 32)
    ws = Workspace(torch.empty(64, dtype=torch.uint8))
    with torch.inference_mode(), kernels() as seen:
        for layer in (0, 1):
            segments.attend(q_TND, batch, kvs, QWEN3, layer, ws)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen
    assert not seen & {"aten::clone", "aten::contiguous", "aten::repeat_interleave", "aten::bmm"}


def test_layer_without_tokens_does_nothing():
    batch = build([[RowSpan(4, 0), RowSpan(0, 0)]])
    hidden = torch.empty(0, 64)
    ws = Workspace(torch.empty(64, dtype=torch.uint8))
    kvs = [torch.zeros(2, 8, 2, 2, 32)]
    segments.decoder_layer(hidden, LayerWeights(), batch, kvs, QWEN3, 0, ws)
    assert not kvs[0].any()


# Cost


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("num_context", "num_new"), [(0, 1), (0, 9), (3, 4), (7, 1), (20, 3)])
def test_attended_keys_are_counted_one_by_one(num_context, num_new, window):
    expected = sum(min(num_context + place + 1, window or math.inf) for place in range(num_new))
    assert cost.num_attended(num_context, num_new, window) == expected


def test_decoder_flops_are_two_per_weight_and_token():
    weights = sum(
        spec.num_elements
        for specs in (attention_tensors(QWEN3, 0), mlp_tensors(QWEN3, 0))
        for spec in specs
        if len(spec.shape) == 2
    )
    assert cost.decoder_flops(QWEN3, 11, 0) == 2 * weights * 11
    assert cost.decoder_flops(QWEN3, 0, 10) == 10 * 4 * 4 * 32
    assert cost.head_flops(QWEN3, 3) == 2 * 3 * 64 * 64


@pytest.mark.parametrize(
    "run",
    [
        [RowSpan(0, 300)],
        [RowSpan(90, 70)],
        [RowSpan(90, 400), RowSpan(0, 40), RowSpan(7, 1), RowSpan(80, 1)],
        [RowSpan(n, 1) for n in (3, 200, 90)],
    ],
)
def test_batch_keeps_no_more_than_planned(run):
    batch = build([run])
    masks = (piece.mask for pieces in batch.pieces.values() for piece in pieces)
    kept = (batch.positions_T, batch.cos_T1D, batch.sin_T1D, *masks)
    storages = [tensor.untyped_storage() for tensor in kept if tensor is not None]
    used = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    planned = cost.batch_bytes(
        QWEN3,
        num_tokens=batch.num_tokens,
        num_rows=batch.num_rows,
        max_length=max(span.length for span in run),
        compute_bytes=4,
    )
    assert used <= planned


# Sampling


def test_greedy_takes_the_best_token_and_flags_rows_that_are_not_finite():
    logits = torch.tensor([[0.0, 3.0, 1.0], [9.0, float("nan"), 1.0], [1.0, 2.0, float("inf")]])
    tokens, finite = greedy(logits)
    assert tokens[0] == 1 and tokens.dtype == torch.int64
    assert finite.tolist() == [True, False, False]
    assert not greedy(torch.tensor([[0.0, -float("inf")]]))[1]
