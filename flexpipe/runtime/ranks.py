"""Which of a job's processes this one is, and where the others are met.

N stages, each served by T processes, are N x T ranks: rank = stage x T + shard. Who starts them
says so in variables: torchrun, mpirun (Open MPI, MPICH, Intel), srun, or flexpipe itself, which
uses torchrun's. Nothing here imports torch: it is asked before a process knows what it will be.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexpipe.errors import InputError

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000  # below those that systems hand out by themselves
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process, `rank` of num_stages x num_shards, and the store at which all meet.

    `local_rank` counts the ranks of one host. Rank 0 serves the store unless whoever started the
    ranks does. `attempt` tells the starts of one gang apart; with `restarts` whoever started it
    starts it again when a rank ends with another code than 0.
    """

    rank: int
    num_stages: int
    num_shards: int = 1
    local_rank: int = 0
    address: str = _LOOPBACK
    port: int
    starter: str = "flexpipe"
    store_is_served: bool = True
    attempt: int = 0
    restarts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise InputError(f"rank {self.rank} is not one of {self.size}, counted from 0")

    @property
    def size(self) -> int:
        return self.num_stages * self.num_shards

    @property
    def stage(self) -> int:
        return self.rank // self.num_shards

    @property
    def shard(self) -> int:
        return self.rank % self.num_shards

    @property
    def serves_store(self) -> bool:
        return self.rank == 0 and not self.store_is_served

    @property
    def next(self) -> int:
        """The rank of the following stage that holds the same shard."""
        return (self.rank + self.num_shards) % self.size

    @property
    def previous(self) -> int:
        return (self.rank - self.num_shards) % self.size

    @classmethod
    def from_environment(
        cls,
        num_stages: int,
        num_shards: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> Ranks | None:
        """What the variables say; None where nobody started more than one process.

        Raises InputError where other ranks were started than the stages ask for.
        """
        variables = os.environ if environment is None else environment
        starter = next((one for one in _STARTERS if one.started(variables)), None)
        if starter is None:
            return None
        size = starter.number(variables, *starter.size)
        if size == 1:
            return None
        if size != num_stages * num_shards:
            raise InputError(
                f"{starter.name} started {size} ranks, but --pipeline-parallel-size {num_stages} "
                f"x --tensor-parallel-size {num_shards} asks for {num_stages * num_shards}; "
                "change one of the two"
            )
        address, port = starter.meeting_place(variables, size)
        return cls(
            rank=starter.number(variables, starter.rank),
            num_stages=num_stages,
            num_shards=num_shards,
            local_rank=starter.number(variables, *starter.local_rank),
            address=address,
            port=port,
            starter=starter.name,
            store_is_served=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=int(variables.get("TORCHELASTIC_RESTART_COUNT", "0")),
            restarts=int(variables.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0,
        )

    def name(self, rank: int | None = None) -> str:
        """What messages call a rank: by its stage, and its shard where there are several."""
        return rank_name(self.rank if rank is None else rank, self.num_shards)


def rank_name(rank: int, num_shards: int) -> str:
    """`stage 2`, or `stage 2 shard 1` where several ranks serve a stage."""
    stage, shard = divmod(rank, num_shards)
    return f"stage {stage}" if num_shards == 1 else f"stage {stage} shard {shard}"


def place_name(rank: int, num_shards: int, layers: Sequence[range]) -> str:
    """A rank with its decoder layers, as errors name it."""
    ranges = ", ".join(f"{chunk.start}-{chunk.stop - 1}" for chunk in layers)
    return f"{rank_name(rank, num_shards)} (rank {rank}, layers {ranges})"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Starter:
    """The names under which a program tells its processes who they are; of several, any one.

    `mark` is set in what it started and nowhere else.
    """

    name: str
    mark: str
    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: str = ""
    job: tuple[str, ...] = ()

    def started(self, variables: Mapping[str, str]) -> bool:
        return all(_first(variables, names) for names in ((self.mark,), (self.rank,), self.size))

    def number(self, variables: Mapping[str, str], *names: str) -> int:
        text = _first(variables, names)
        if text is None or not text.isdigit():
            raise InputError(
                f"{self.name} did not set {names[0]} to a number, got {text!r}; start the ranks "
                "with torchrun, mpirun or srun, or let flexpipe start them"
            )
        return int(text)

    def meeting_place(self, variables: Mapping[str, str], size: int) -> tuple[str, int]:
        """Address and port of the store: as told, else as all ranks work out alike."""
        address = variables.get("MASTER_ADDR") or self._first_host(variables, size)
        port = variables.get("MASTER_PORT")
        return address, int(port) if port else self._common_port(variables)

    def _first_host(self, variables: Mapping[str, str], size: int) -> str:
        if variables.get(self.local_size) == str(size):
            return _LOOPBACK
        nodes = variables.get("SLURM_STEP_NODELIST")
        if nodes:
            return first_host(nodes)
        raise InputError(
            f"{self.name} does not say where rank 0 runs; name its host in the variable "
            "MASTER_ADDR, as in mpirun -x MASTER_ADDR=HOST"
        )

    def _common_port(self, variables: Mapping[str, str]) -> int:
        job = ".".join(variables[name] for name in self.job if name in variables)
        return _FIRST_PORT + zlib.crc32((job or str(os.getppid())).encode()) % _NUM_PORTS


_SLURM_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID")
_STARTERS = (
    _Starter(
        name="torchrun",
        mark="RANK",
        rank="RANK",
        size=("WORLD_SIZE",),
        local_rank=("LOCAL_RANK",),
        local_size="LOCAL_WORLD_SIZE",
    ),
    _Starter(
        name="mpirun",
        mark="OMPI_COMM_WORLD_RANK",
        rank="OMPI_COMM_WORLD_RANK",
        size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        job=("PMIX_NAMESPACE",),
    ),
    _Starter(
        name="mpirun",
        mark="PMI_RANK",
        rank="PMI_RANK",
        size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID", "SLURM_LOCALID"),
        local_size="MPI_LOCALNRANKS",
        job=_SLURM_JOB,
    ),
    _Starter(
        name="srun",
        mark="SLURM_STEP_NODELIST",  # a batch script has the others too
        rank="SLURM_PROCID",
        size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank=("SLURM_LOCALID",),
        job=_SLURM_JOB,
    ),
)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: `gpu[07-09,12],login` starts with gpu07."""
    found = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\])?([^,\[]*)", nodes)
    if found is None:
        raise InputError(f"SLURM_STEP_NODELIST {nodes!r} names no host; set MASTER_ADDR instead")
    return "".join(part or "" for part in found.groups())


def _first(variables: Mapping[str, str], names: Iterable[str]) -> str | None:
    return next((variables[name] for name in names if variables.get(name)), None)
