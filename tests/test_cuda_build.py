"""The CUDA kernels as nvcc compiles them, where there is an nvcc: no GPU is needed to see what they will need there."""

import functools

import cuda_resources
import pytest
from cuda_resources import compile_one, generic_accesses, read_table, uses_shared_memory
from resource_table import ARCHITECTURES, more_than, short

NVCC = cuda_resources.setup_script().Nvcc.find()
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc: set CUDA_HOME to have CUDA kernels compiled"),
]
each_architecture = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=short(a), marks=pytest.mark.xdist_group(short(a))) for a in ARCHITECTURES],  # compiled once
)


@functools.cache
def compiled(architecture):
    if "compute_" + architecture.replace(".", "") not in NVCC.ask("--list-gpu-arch").split():
        pytest.skip(f"nvcc {NVCC.version} does not know {short(architecture)}")
    return cuda_resources.compile_all(architecture)


def kernels(architecture):
    return [(file, kernel) for file, result in compiled(architecture).items() for kernel in result.resources]


@each_architecture
def test_kernels_need_no_more_than_recorded(architecture):
    """Registers decide how many warps hide each other's latency; a new number is looked at, then recorded."""
    version, table = read_table()
    if version != NVCC.version:
        pytest.skip(f"resources.txt is of nvcc {version}, here is {NVCC.version}")
    recorded = {row: resources for row, resources in table.items() if row[2] == short(architecture)}
    found = {
        (file, kernel, short(architecture)): compiled(architecture)[file].resources[kernel]
        for file, kernel in kernels(architecture)
    }
    assert set(recorded) == set(found), "make cuda-resources"
    assert not more_than(recorded, found)


@each_architecture
def test_kernels_of_float_do_not_spill(architecture):
    found = {
        (file, kernel): compiled(architecture)[file].resources[kernel]
        for file, kernel in kernels(architecture)
        if "double" not in kernel
    }
    assert found
    assert not {kernel: resources for kernel, resources in found.items() if resources.spills}


@each_architecture
def test_every_access_names_its_memory(architecture):
    for file, kernel in kernels(architecture):
        result = compiled(architecture)[file]
        assert not generic_accesses(result.ptx[kernel]), (file, kernel)
        named, used = uses_shared_memory(result, kernel)
        assert used or not named, (file, kernel)


PLANTED = """
#include <cstdint>
template <class scalar>
__global__ void round_trip(const scalar* in, scalar* out) {
  extern __shared__ __align__(16) unsigned char memory[];
  // The compiler can't follow an address that depends on the data.
  scalar* shared = reinterpret_cast<scalar*>(uintptr_t(memory) ^ uintptr_t(in[0]));
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
template <class scalar>
__global__ void __launch_bounds__(1024) spilled(const scalar* in, scalar* out) {
  scalar all[100];
#pragma unroll
  for (int i = 0; i < 100; i++) all[i] = in[i * 1024 + threadIdx.x];
  for (int n = 0; n < int(in[0]); n++)
#pragma unroll
    for (int i = 0; i < 100; i++) all[i] = all[i] * all[(i + 37) % 100] + in[n + i];
#pragma unroll
  for (int i = 0; i < 100; i++) out[i * 1024 + threadIdx.x] = all[i];
}
template __global__ void round_trip(const float*, float*);
template __global__ void spilled(const float*, float*);
"""


def test_what_is_looked_for_is_found(tmp_path):
    (tmp_path / "planted.cu").write_text(PLANTED)
    result = compile_one(tmp_path / "planted.cu", "8.0")
    assert set(result.resources) == {"round_trip<float>", "spilled<float>"} == set(result.ptx)
    assert generic_accesses(result.ptx["round_trip<float>"]) and not generic_accesses(result.ptx["spilled<float>"])
    assert uses_shared_memory(result, "round_trip<float>") == (True, False)
    assert result.resources["spilled<float>"].spills and not result.resources["round_trip<float>"].spills
    assert result.resources["spilled<float>"].registers == 64
