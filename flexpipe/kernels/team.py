"""Machine code for this CPU, run by the team of threads that torch computes with.

A kernel is compiled when it is first wanted, in some 0.2 s. It runs on torch's own OpenMP threads
(GNU's entry point, which LLVM's and Intel's libraries offer as well), so that it finds them awake
and never beside another team. Where llvmlite or that entry point is missing `available` says so,
and torch's operations serve.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

try:
    import llvmlite.binding as llvm
except ImportError:  # no wheel for this machine, or an environment without it
    llvm = None

__all__ = ["Kernel", "available"]


@functools.cache
def available() -> bool:
    """Whether kernels can be made and run here."""
    return llvm is not None and _parallel() is not None


class Kernel:
    """A compiled `void f(int64 *fields)`."""

    def __init__(self, name: str, text: str) -> None:
        machine = _machine()
        module = llvm.parse_assembly(text)
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        # the text says which loops are vectors and which are unrolled
        options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        self._engine = llvm.create_mcjit_compiler(module, machine)  # owns the code
        self._engine.finalize_object()
        self._address = self._engine.get_function_address(name)

    def run(self, fields: Sequence[int]) -> None:
        """Every thread of torch's team calls it once with the same fields; returns when all have.

        Whoever passes addresses keeps what lies there alive.
        """
        array = (ctypes.c_int64 * len(fields))(*fields)
        parallel = _parallel()
        assert parallel is not None
        parallel(self._address, ctypes.addressof(array), torch.get_num_threads(), 0)


def _machine() -> llvm.TargetMachine:
    """For one engine, which takes it over."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


@functools.cache
def _parallel() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch has loaded."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
    return function
