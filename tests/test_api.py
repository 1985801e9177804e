"""The Python interface: vLLM's shape over the one way a job runs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flexpipe
from flexpipe import LLM, SamplingParams
from flexpipe.demo.tickets import tickets
from flexpipe.errors import InputError, PolicyError
from flexpipe.job.result import Result, ResultWriter
from flexpipe.job.spec import JobSpec
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import Shares

DEMO = Path(flexpipe.__file__).parent / "demo" / "model"
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
TICKETS = list(tickets("held-out", 6, 0))


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return LLM(DEMO, device="cpu", offload_dir=tmp_path / "offload")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[JobSpec, list[dict[str, Any]]]]:
    """Puts a job in place that fails every request; returns what it was asked last."""
    kept: list[tuple[JobSpec, list[dict[str, Any]]]] = []

    def run_job(spec: JobSpec) -> None:
        lines = [json.loads(line) for line in spec.input_path.read_text().splitlines()]
        kept.append((spec, lines))
        with ResultWriter(spec.output_path) as writer:
            for number, line in reversed(list(enumerate(lines, 1))):
                writer.write(
                    Result(
                        id=line.get("id", str(number)),
                        text="so far",
                        token_ids=[5],
                        finish_reason="error",
                        prompt_tokens=1,
                        error="not finite",
                    )
                )

    monkeypatch.setattr("flexpipe.job.run.run_job", run_job)
    return lambda: kept[-1]


Asked = Callable[[], tuple[JobSpec, list[dict[str, Any]]]]


def test_answers_come_in_the_order_of_the_prompts_and_are_right(llm: LLM) -> None:
    prompts = [ticket.prompt for ticket in TICKETS]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=64), use_tqdm=False)
    assert [out.prompt for out in outputs] == prompts
    assert [out.outputs[0].text.strip() for out in outputs] == [t.answer for t in TICKETS]
    for number, out in enumerate(outputs, 1):
        (answer,) = out.outputs
        assert (out.request_id, out.finished, out.prompt_token_ids) == (str(number), True, None)
        assert (answer.index, answer.finish_reason, answer.error) == (0, "stop", None)
        assert answer.token_ids and all(isinstance(token, int) for token in answer.token_ids)


def test_each_prompt_may_have_its_own_params_and_form(llm: LLM) -> None:
    outputs = llm.generate(
        ["one", {"prompt_token_ids": (5, 6, 7)}, {"prompt": "three", "max_tokens": 2, "id": "c"}],
        [SHORT, SamplingParams(max_tokens=4, ignore_eos=True), SHORT],
        use_tqdm=False,
    )
    assert [len(out.outputs[0].token_ids) for out in outputs] == [6, 4, 2]
    assert {out.outputs[0].finish_reason for out in outputs} == {"length"}
    assert [out.prompt for out in outputs] == ["one", None, "three"]
    assert [out.prompt_token_ids for out in outputs] == [None, [5, 6, 7], None]
    assert [out.request_id for out in outputs] == ["1", "2", "c"]


def test_placement_changes_no_answer_and_a_second_call_is_like_the_first(
    llm: LLM, tmp_path: Path
) -> None:
    prompts = [ticket.prompt for ticket in TICKETS]
    sampled = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    first = llm.generate(prompts, sampled, use_tqdm=False)
    moved = LLM(
        str(DEMO),
        policy={"weights": {"cpu": 0.5, "disk": 0.5}, "micro_batch_size": 2, "gpu_mem": "64MiB"},
        emulation="h2d=8GB/s,memory=64MiB",
        offload_dir=tmp_path / "other",
    )
    assert llm.generate(prompts, sampled, use_tqdm=False) == first
    assert moved.generate(prompts, sampled, use_tqdm=False) == first


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "prompt is empty"),
        ("long " * 5000, "more than the model's"),
        ({"prompt": "a", "temprature": 1}, 'unknown key "temprature"'),
        ({"messages": [{"role": "user", "content": "hello"}]}, "no chat template"),
    ],
)
def test_prompt_that_cannot_be_run_is_named_before_anything_is_loaded(
    llm: LLM, prompt: Any, reason: str
) -> None:
    with pytest.raises(InputError) as error:
        llm.generate(["fine", prompt], SHORT, use_tqdm=False)
    assert str(error.value).startswith("prompts[1]: ") and reason in str(error.value)
    assert "--fail-fast" not in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "params", "reason"),
    [
        ([[1, 2, 3]], None, "prompts[0] must be a text or a mapping"),
        (["a", {"prompt_token_ids": {1}}], None, "prompts[1] holds what JSON cannot say"),
        (["a", "b"], [SHORT], "1 sampling_params for 2 prompts"),
    ],
)
def test_what_is_no_prompt_is_refused(
    llm: LLM, asked: Asked, prompts: Any, params: Any, reason: str
) -> None:
    with pytest.raises(InputError) as error:
        llm.generate(prompts, params)
    assert reason in str(error.value)


def test_no_prompts_are_no_job(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_one_prompt_may_stand_alone(llm: LLM, asked: Asked) -> None:
    (output,) = llm.generate("hello", SamplingParams(max_tokens=9, stop="\n", seed=4))
    assert output.prompt == "hello"
    spec, (line,) = asked()
    assert (line["prompt"], line["max_tokens"], line["stop"], line["seed"]) == (
        "hello",
        9,
        ["\n"],
        4,
    )
    assert spec.progress and not spec.input_path.parent.exists()


def test_request_that_fails_for_itself_comes_back_as_an_error(llm: LLM, asked: Asked) -> None:
    outputs = llm.generate(["a", "b"], use_tqdm=False)
    assert not asked()[0].progress
    for out in outputs:
        (answer,) = out.outputs
        assert (answer.finish_reason, answer.error) == ("error", "not finite")
        assert (answer.text, answer.token_ids) == ("so far", [5])


def test_chat_takes_one_conversation_or_several(llm: LLM, asked: Asked) -> None:
    hello = [{"role": "user", "content": "hello"}]
    again = [*hello, {"role": "assistant", "content": "hi"}, *hello]
    for messages, chats in ((hello, [hello]), ([hello, again], [hello, again])):
        outputs = llm.chat(messages, SHORT)
        assert [line["messages"] for line in asked()[1]] == chats
        assert [out.prompt for out in outputs] == [None] * len(chats)


def test_arguments_become_the_spec(asked: Asked, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("micro_batch_size: 4\nweights: {cpu: 1}\n")
    LLM(
        "org/name",
        policy=file,
        emulation=Emulation(h2d_bytes_per_s=1e9),
        load_format="dummy",
        revision="v2",
        offload_dir="~/scratch",
        seed=7,
    ).generate("a")
    spec, (line,) = asked()
    assert (spec.model, spec.revision, spec.load_format) == ("org/name", "v2", "dummy")
    assert (spec.device, spec.emulation) == ("emulated", Emulation(h2d_bytes_per_s=1e9))
    assert spec.given == {"micro_batch_size": 4, "weights": Shares(cpu=1)}
    assert (spec.offload_dir, spec.seed, line["seed"]) == (Path("~/scratch"), 7, 7)


def test_policy_may_be_a_preset(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text("micro_batch_size: 4\n")
    monkeypatch.setattr("flexpipe.preset.presets_dir", lambda: tmp_path)
    LLM("m", policy="small").generate("a")
    assert asked()[0].given == {"micro_batch_size": 4}


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": {"micro_batch_sizes": 4}},
        {"policy": {"micro_batch_size": 0}},
        {"policy": "no-such-preset"},
        {"device": "tpu"},
        {"device": "cpu", "emulation": "h2d=1GB/s"},
        {"load_format": "gguf"},
    ],
)
def test_wrong_arguments_are_refused_before_a_prompt_is_asked_for(wrong: dict[str, Any]) -> None:
    with pytest.raises((InputError, PolicyError)):
        LLM("m", **wrong)


def test_nothing_is_left_behind(llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flexpipe"):
        llm.generate("hello", SHORT, use_tqdm=False)
    assert list((tmp_path / "offload" / "jobs").iterdir()) == [] and caplog.records == []


def test_importing_the_interface_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, flexpipe\n"
        "assert 'flexpipe.api' not in sys.modules\n"
        "from flexpipe import LLM, CompletionOutput, RequestOutput, SamplingParams\n"
        "LLM('m')\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = flexpipe.Engine
    assert all(hasattr(flexpipe, name) for name in flexpipe.__all__)
