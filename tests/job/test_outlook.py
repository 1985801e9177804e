"""What a prediction or a search needs, from a shape, some requests and a machine on paper."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexpipe.errors import FlexpipeError, InputError, ModelError, PlanError, PolicyError
from flexpipe.job.outlook import Inquiry, Outlook, Shape
from flexpipe.plan.block import Need
from flexpipe.plan.policy import Policy, percent_shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.predict import predict
from flexpipe.units import GIB
from tests.conftest import REPO

NEEDS = [Need(512, 32)] * 64
# leaves the search little to play but the shares
BLOCK = {
    "micro_batch_size": 16,
    "num_micro_batches": 4,
    "max_batch_tokens": 2048,
    "separate_layers": False,
    "prefetch_depth": 1,
}


@pytest.fixture
def slow_bfloat16(tmp_path: Path) -> Path:
    """A CPU on paper that multiplies bfloat16 at half the rate of float32."""
    profile = yaml.safe_load((REPO / "tests" / "profile.yaml").read_text())
    profile["compute"]["matmul"] = {
        "float32": {1: "100 GFLOP/s"},
        "bfloat16": {1: "50 GFLOP/s"},
    }
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


def test_a_model_of_350_gigabytes_is_planned_for_a_machine_on_paper() -> None:
    outlook = Outlook.on_paper(Shape.open("opt-175b"), NEEDS, "t4-gcp", BLOCK)
    assert (outlook.device_tier, outlook.compute_dtype) == (Tier.GPU, "float16")
    plan = outlook.choose(BLOCK)
    assert not plan.shortfalls() and plan.placement.achieved_bytes[Tier.DISK] > 100 * GIB
    assert predict(plan, outlook.needs, outlook.profile).total_s > 0


def test_compressed_weights_can_be_planned_without_a_checkpoint() -> None:
    given = {"compress_weight": "4", **percent_shares([0, 100, 0, 100, 100, 0])}
    outlook = Outlook.on_paper(Shape.open("opt-30b"), NEEDS, "t4-gcp", given)
    whole = sum(tensor.num_bytes for tensor in outlook.shape.stored.values())
    plan = outlook.planner()(Policy(**given))
    held = sum(placed.num_bytes for placed in plan.placement.tensors.values())
    assert 0.25 * whole < held < 0.35 * whole


def test_budgets_are_the_machines_unless_the_user_grants_less() -> None:
    shape = Shape.open("opt-6.7b")
    has = Outlook.on_paper(shape, NEEDS, "t4-gcp", {}).budgets
    given = {"gpu_mem": 5 * GIB, "cpu_mem": 10**15}
    bound = Outlook.on_paper(shape, NEEDS, "t4-gcp", given).budgets
    assert has.gpu > bound.gpu == 5 * GIB
    assert bound.cpu == has.cpu and bound.disk == has.disk


def test_a_cpu_computes_in_whichever_dtype_it_multiplies_faster(slow_bfloat16: Path) -> None:
    shape = Shape.open("llama-3-8b")  # bfloat16
    fast = Outlook.on_paper(shape, NEEDS, str(REPO / "tests" / "profile.yaml"), {})
    slow = Outlook.on_paper(shape, NEEDS, str(slow_bfloat16), {})
    assert (fast.compute_dtype, slow.compute_dtype) == ("bfloat16", "float32")
    assert fast.device_tier == Tier.CPU
    given = {"compute_dtype": "bfloat16"}
    assert Outlook.on_paper(shape, NEEDS, str(slow_bfloat16), given).compute_dtype == "bfloat16"


def test_a_plan_that_does_not_fit_is_refused_as_in_a_run() -> None:
    given = {"gpu_mem": GIB // 8}
    outlook = Outlook.on_paper(Shape.open("opt-30b"), NEEDS, "t4-gcp", given)
    with pytest.raises(PlanError, match="the plan does not fit: gpu needs"):
        outlook.choose(given)


def lines(path: Path, *items: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_requests_of_a_file_have_their_real_lengths(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING, "flexpipe")
    path = lines(
        tmp_path / "in.jsonl",
        {"prompt_token_ids": [5] * 40, "max_tokens": 7},
        {"prompt_token_ids": [5] * 3},
        {"prompt_token_ids": [5] * 3000},  # opt has 2048 positions
    )
    asked = Inquiry(model="opt-6.7b", hardware="t4-gcp", input_path=path, max_tokens=50)
    assert asked.outlook({}).needs == [Need(40, 7), Need(3, 50)]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 lines of {path} cannot be run and do not count"
    ]


def test_texts_are_counted_by_the_checkpoints_tokenizer(demo_model: Path, tmp_path) -> None:
    path = lines(tmp_path / "in.jsonl", {"prompt": "My order is late"}, {"prompt": "late"})
    asked = Inquiry(model=str(demo_model), hardware="t4-gcp", input_path=path)
    first, second = asked.outlook({"compute_dtype": "float16"}).needs
    assert first.prompt > second.prompt > 0 and first.output == 128


@pytest.fixture
def demo_model() -> Path:
    return REPO / "flexpipe" / "demo" / "model"


def test_prompts_alike_fill_one_block_unless_their_number_is_given() -> None:
    asked = Inquiry(model="opt-6.7b", hardware="t4-gcp")
    block = {"micro_batch_size": 4, "num_micro_batches": 3}
    assert asked.outlook(block).needs == [Need(512, 32)] * 12
    asked = Inquiry(model="opt-6.7b", hardware="t4-gcp", num_prompts=5, prompt_len=10, gen_len=20)
    assert asked.outlook(block).needs == [Need(10, 20)] * 5


@pytest.mark.parametrize(
    ("fields", "kind", "named"),
    [
        ({"model": "opt-175c"}, ModelError, "did you mean opt-175b?"),
        ({"hardware": "t4"}, PolicyError, "no hardware preset is called 't4'"),
        ({"hardware": "./none.yaml"}, PolicyError, "cannot read the hardware file"),
        ({"model": "llama-3-8b"}, PolicyError, "t4-gcp has no products in bfloat16; give --dtype"),
        ({"prompt_len": 3000}, InputError, "--prompt-len 3000 and --gen-len 32 make 3032"),
        ({"device": "cpu"}, InputError, "--hardware and --device exclude each other"),
        ({"input_path": Path("in.jsonl"), "gen_len": 3}, InputError, "--input-file and --gen-len"),
        ({"input_path": Path("none.jsonl")}, InputError, "none.jsonl"),
        ({"max_tokens": 3}, InputError, "--max-tokens goes with --input-file"),
        ({"hardware": None, "device": "gpu"}, InputError, "--device 'gpu' is unknown"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(
    fields: dict[str, Any], kind: type[FlexpipeError], named: str
) -> None:
    with pytest.raises(kind) as refused:
        Inquiry(**{"model": "opt-6.7b", "hardware": "t4-gcp", **fields}).outlook({})
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_texts_for_a_shape_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", {"prompt": "Hello"})
    with pytest.raises(InputError, match=r"opt-6\.7b is a shape without a tokenizer"):
        Inquiry(model="opt-6.7b", hardware="t4-gcp", input_path=path).outlook({})


def test_a_gpu_share_on_a_cpu_on_paper_is_refused() -> None:
    given = percent_shares([50, 50, 0, 100, 0, 100])
    with pytest.raises(PolicyError, match=r"weights\.gpu is 0\.5"):
        Outlook.on_paper(Shape.open("opt-6.7b"), NEEDS, str(REPO / "tests" / "profile.yaml"), given)


def test_a_machine_on_paper_needs_no_torch(demo_model: Path) -> None:
    program = (
        "import sys\n"
        "from flexpipe.job.outlook import Inquiry\n"
        f"asked = dict(model={str(demo_model)!r}, prompt_len=16, gen_len=4)\n"
        "given = dict(compute_dtype='float16')\n"
        "Inquiry(**asked, hardware='t4-gcp').outlook(given).choose(given)\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
