"""The decoder says what transformers says: every family, every step, in any company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexpipe.model import batch as batch_module
from flexpipe.model.segments import Batch, RopeTable
from flexpipe.plan.codec import Codec
from tests.hf import (
    CODED_TIE,
    CODED_TOLERANCE,
    TOLERANCE,
    VARIANTS,
    Disagreement,
    Reference,
    check_tokens,
)
from tests.model.loop import Decoder, generate

LENGTHS = (1, 2, 31, 64, 65, 130, 300)  # around windows (48, 64) and rope thresholds (128)
MAX_NEW = 8


def check(reference: Reference, outputs: Sequence[Tensor]) -> float:
    """Raises `Disagreement` unless logits and tokens match; returns the largest difference."""
    largest = 0.0
    for prompt, logits in enumerate(outputs):
        tie = check_tokens(reference, prompt, logits.argmax(-1).tolist())
        compared = len(logits) if tie is None else tie + 1
        difference = (logits[:compared] - reference.logits[prompt][:compared]).abs().max().item()
        if not difference <= TOLERANCE:
            raise Disagreement(f"prompt {prompt}: logits differ by {difference:.2e}")
        largest = max(largest, difference)
    return largest


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture
def reference(variant, hf_reference) -> Reference:
    return hf_reference(variant, lengths=LENGTHS, max_new=MAX_NEW)


@pytest.fixture
def decoder(variant, hf_checkpoint) -> Decoder:
    return Decoder(hf_checkpoint(variant), num_rows=len(LENGTHS))


def test_reference_outputs_are_diverse(reference):
    assert len({token for tokens in reference.tokens for token in tokens}) >= 20


def test_ragged_batch_matches_the_reference_at_every_step(decoder, reference, record_property):
    difference = check(reference, generate(decoder, reference.prompts, MAX_NEW))
    record_property("max_logit_difference", difference)
    print(f"max |Δlogit| {difference:.2e}")


def test_each_prompt_alone_equals_itself_in_the_batch(decoder, reference):
    together = generate(decoder, reference.prompts, MAX_NEW)
    for row, prompt in enumerate(reference.prompts):
        decoder.lengths = [0] * len(LENGTHS)
        (alone,) = generate(decoder, [prompt], MAX_NEW)
        torch.testing.assert_close(alone, together[row], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [7, 100])
def test_chunked_prefill_beside_decoding_rows_matches_the_reference(decoder, reference, chunk):
    check(reference, generate(decoder, reference.prompts, MAX_NEW, chunk=chunk))


def test_short_mask_blocks_match_the_reference(decoder, reference, monkeypatch):
    monkeypatch.setattr(batch_module, "MASK_BLOCK", 16)
    check(reference, generate(decoder, reference.prompts, MAX_NEW))
    decoder.lengths = [0] * len(LENGTHS)
    check(reference, generate(decoder, reference.prompts, MAX_NEW, chunk=90))


FOUR, EIGHT, SHORT = Codec(bits=4), Codec(bits=8), Codec(bits=4, group_size=32)
# opt's heads have fewer numbers than a group, a wide qwen3's have a group and a quarter
SAMPLE = [
    ("opt", SHORT, False),
    ("llama3", EIGHT, True),
    ("mistral", FOUR, False),
    ("qwen2", EIGHT, False),
    ("qwen3-wide", FOUR, True),
]
REST = [
    (variant, codec, kernel)
    for variant in ("opt", "llama3", "mistral", "qwen2", "qwen3-wide")
    for codec in (FOUR, EIGHT, SHORT)
    for kernel in (True, False)
    if (variant, codec, kernel) not in SAMPLE
]


@pytest.mark.parametrize(
    ("variant", "codec", "kernel"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_compressed_cache_matches_a_reference_that_compresses_its_own(
    variant, codec, kernel, hf_checkpoint, hf_reference, monkeypatch
):
    """Ragged rows, prefilled in one piece or in chunks, decoded in place or from widened rows."""
    if not kernel:
        monkeypatch.setattr(batch_module, "runs_here", lambda device: False)
    path, lengths = hf_checkpoint(variant), (1, 31, 65, 130)
    reference = hf_reference(variant, lengths=lengths, max_new=MAX_NEW, kv_codec=codec)
    plain = generate(Decoder(path, num_rows=len(lengths)), reference.prompts, 1)
    for one, other in zip(reference.logits, plain, strict=True):
        assert (one[0] - other[0]).abs().max() > 10 * TOLERANCE  # compression is to be seen
    exact = 0
    for chunk in (None, 50):
        decoder = Decoder(path, num_rows=len(lengths), kv=codec)
        for prompt, logits in enumerate(generate(decoder, reference.prompts, MAX_NEW, chunk=chunk)):
            tie = check_tokens(reference, prompt, logits.argmax(-1).tolist(), CODED_TIE)
            compared = len(logits) if tie is None else tie + 1
            differences = (logits - reference.logits[prompt])[:compared].abs().amax(-1)
            assert differences.max() <= CODED_TOLERANCE
            exact += int((differences <= TOLERANCE).sum())
    print(f"{exact / (2 * len(lengths) * MAX_NEW):.0%} of all logits within {TOLERANCE}")
    assert exact >= len(lengths) * MAX_NEW // 4  # where no code turned over behind them


def test_rows_of_equal_length_match_the_reference(variant, hf_checkpoint, hf_reference):
    """Equal rows share their attention calls, without masks while they decode."""
    reference = hf_reference(variant, lengths=(90, 90, 90), max_new=MAX_NEW)
    decoder = Decoder(hf_checkpoint(variant), num_rows=3)
    check(reference, generate(decoder, reference.prompts, MAX_NEW))
    decoder.lengths = [0] * 3
    check(reference, generate(decoder, reference.prompts, MAX_NEW, chunk=40))


def test_rows_in_several_runs_match_the_reference(decoder, reference):
    """A refilled place prefills in one run while rows of another decode and one waits."""
    prompts = [list(prompt) for prompt in reference.prompts]
    first = decoder.step([[(0, prompts[0]), (1, prompts[1])], [(4, prompts[4])]], [0, 1, 4])
    tokens = {row: int(logits.argmax()) for row, logits in zip((0, 1, 4), first, strict=True)}
    second = decoder.step(
        [
            [(0, [tokens[0]]), (1, []), (2, prompts[2]), (3, prompts[3])],
            [(4, [tokens[4]]), (5, prompts[5])],
        ],
        [0, 2, 3, 4, 5],
    )
    expected = [(0, 0), (1, 0), (4, 0), (0, 1), (2, 0), (3, 0), (4, 1), (5, 0)]
    for (row, step), logits in zip(expected, [*first, *second], strict=True):
        assert (logits - reference.logits[row][step]).abs().max() <= TOLERANCE


def test_cache_in_another_dtype_is_rounded_alike_for_any_placement(variant, hf_checkpoint):
    """A bf16 cache changes logits, but chunked, alone and batched rows see the same rounding."""
    path = hf_checkpoint(variant)
    prompts = [[5] * 3, list(range(3, 83)), list(range(100, 140))]
    whole, chunked = (
        generate(Decoder(path, num_rows=3, kv=torch.bfloat16), prompts, 4, chunk=chunk)
        for chunk in (None, 33)
    )
    for one, other in zip(whole, chunked, strict=True):
        # a product that differs in its last bit may round to the neighbouring bf16
        assert (one - other).abs().max() < 0.1


CONTROLS = ("opt", "llama3", "mistral", "qwen2-windows", "qwen3")


@pytest.mark.parametrize("variant", CONTROLS, indirect=True)
def test_two_swapped_kv_rows_are_noticed(decoder, reference):
    def swap(step: int) -> None:
        if step == 2:
            decoder.arena[1, [5, 6]] = decoder.arena[1, [6, 5]]

    with pytest.raises(Disagreement):
        check(reference, generate(decoder, reference.prompts, MAX_NEW, before_step=swap))


@pytest.mark.parametrize("variant", CONTROLS, indirect=True)
def test_a_position_off_by_one_is_noticed(decoder, reference):
    def shift_late_tokens(batch: Batch) -> Batch:
        if batch.num_tokens > len(LENGTHS):  # the prefill stays as it is
            return batch
        positions = batch.positions_T + 1
        turns: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(decoder.rope, RopeTable):
            turns = decoder.rope.turns(positions, torch.float32)
        return replace(batch, positions_T=positions, cos_T1D=turns[0], sin_T1D=turns[1])

    decoder.tamper = shift_late_tokens
    with pytest.raises(Disagreement):
        check(reference, generate(decoder, reference.prompts, MAX_NEW))


@pytest.mark.parametrize("variant", CONTROLS, indirect=True)
def test_a_skipped_layer_is_noticed(decoder, reference):
    decoder.skipped_layer = 1
    with pytest.raises(Disagreement):
        check(reference, generate(decoder, reference.prompts, MAX_NEW))


@pytest.mark.parametrize("variant", ["mistral", "qwen2-windows"], indirect=True)
def test_a_window_one_token_too_wide_is_noticed(decoder, reference):
    wider = tuple(window and window + 1 for window in decoder.config.windows)
    decoder.config = replace(decoder.config, windows=wider)
    with pytest.raises(Disagreement):
        check(reference, generate(decoder, reference.prompts, MAX_NEW))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_prompt_length_matches_the_reference(variant, seed, hf_checkpoint, hf_reference):
    lengths = tuple(range(1 + seed, 301, 7))
    reference = hf_reference(variant, lengths=lengths, max_new=24, seed=seed)
    decoder = Decoder(hf_checkpoint(variant), num_rows=len(lengths), max_tokens=8192)
    check(reference, generate(decoder, reference.prompts, 24))
