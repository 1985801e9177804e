"""Who a process is among the ranks, from the variables of what started it."""

from __future__ import annotations

import pytest

from flexpipe.errors import InputError
from flexpipe.runtime.ranks import Ranks, first_host

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29401",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
}


def test_torchruns_ranks_meet_at_its_own_store() -> None:
    ranks = Ranks.from_environment(4, 1, TORCHRUN)
    assert ranks == Ranks(
        rank=3,
        num_stages=4,
        local_rank=1,
        address="node-a",
        port=29401,
        starter="torchrun",
        store_is_served=True,
        attempt=2,
    )


@pytest.mark.parametrize(("most", "restarts"), [("0", False), ("3", True)])
def test_ranks_know_whether_a_code_other_than_0_starts_them_again(
    most: str, restarts: bool
) -> None:
    ranks = Ranks.from_environment(4, 1, {**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": most})
    assert ranks is not None and ranks.restarts is restarts


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH])
def test_ranks_that_mpirun_starts_on_one_host_find_each_other_unaided(
    variables: dict[str, str],
) -> None:
    ranks = Ranks.from_environment(2, 2, variables)
    assert ranks is not None and (ranks.rank, ranks.stage, ranks.shard) == (3, 1, 1)
    assert (ranks.address, ranks.local_rank, ranks.store_is_served) == ("127.0.0.1", 3, False)
    first = Ranks.from_environment(2, 2, {**variables, next(iter(variables)): "0"})
    assert first is not None and first.serves_store
    assert (first.address, first.port) == (ranks.address, ranks.port)


def test_ranks_of_several_hosts_under_mpirun_need_the_first_ones_name() -> None:
    variables = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(InputError, match=r"mpirun -x MASTER_ADDR=HOST"):
        Ranks.from_environment(4, 1, variables)
    ranks = Ranks.from_environment(4, 1, variables | {"MASTER_ADDR": "b", "MASTER_PORT": "5000"})
    assert ranks is not None and (ranks.address, ranks.port) == ("b", 5000)


def test_ranks_of_srun_meet_at_the_steps_first_host() -> None:
    ranks = Ranks.from_environment(4, 1, SRUN)
    assert ranks is not None and (ranks.rank, ranks.local_rank) == (3, 1)
    assert (ranks.address, ranks.starter) == ("gpu07", "srun")
    other_step = Ranks.from_environment(4, 1, SRUN | {"SLURM_STEP_ID": "1"})
    assert other_step is not None and other_step.port != ranks.port


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[1-3,7]", "n1"),
        ("n[07,09],m", "n07"),
        ("n[1-2]-ib,m[1-2]", "n1-ib"),
        ("n-1,n-[2-3]", "n-1"),
    ],
)
def test_the_first_of_slurms_hosts(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},  # a batch script
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},
    ],
)
def test_a_process_that_nobody_started_as_one_of_several_is_no_rank(
    variables: dict[str, str],
) -> None:
    assert Ranks.from_environment(4, 1, variables) is None


def test_another_number_of_ranks_than_asked_for_names_both() -> None:
    with pytest.raises(InputError, match=r"torchrun started 4 ranks, but .* 3 x .* 2 asks for 6"):
        Ranks.from_environment(3, 2, TORCHRUN)


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(InputError, match=r"did not set LOCAL_RANK to a number, got 'one'"):
        Ranks.from_environment(4, 1, TORCHRUN | {"LOCAL_RANK": "one"})


def test_the_ring_joins_equal_shards_of_neighbouring_stages() -> None:
    ranks = [Ranks(rank=rank, num_stages=3, num_shards=2, port=1) for rank in range(6)]
    assert [rank.next for rank in ranks] == [2, 3, 4, 5, 0, 1]
    assert all(ranks[rank.next].previous == rank.rank for rank in ranks)
    assert [rank.name() for rank in ranks[:3]] == [
        "stage 0 shard 0",
        "stage 0 shard 1",
        "stage 1 shard 0",
    ]
    assert Ranks(rank=1, num_stages=2, port=1).name() == "stage 1"
