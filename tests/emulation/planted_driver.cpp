// Runs the kernels of planted.cu forward, in reverse and in as many random orders as the argument says. Compares with
// loops. Exit status 3, and a line, at a difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "planted.cu"

namespace {

using planted::Plan;

constexpr int kColumns = 50;  // less than threads, and more than a tile

void require(bool right, const std::string& what) {
  if (right) return;
  std::printf("differs: %s\n", what.c_str());
  std::exit(3);
}

struct Data {
  int rows;
  std::vector<float> in, out;
  float total = 0;

  explicit Data(int rows) : rows(rows), in(rows * kColumns), out(rows * kColumns) {
    for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<float>(i * 7 % 23) - 5;
  }
  Plan plan() { return {in.data(), out.data(), &total, rows, kColumns, {}}; }
  double sum(int row, int columns, int power = 1) const {
    double sum = 0;
    for (int i = 0; i < columns; i++) sum += std::pow(in[row * kColumns + i], power);
    return sum;
  }
};

using Expected = std::function<double(int)>;  // of an element of the result

void compare(const std::string& name, Data& data, cudaError_t (*launch)(const Plan&, cudaStream_t), int count,
             const Expected& expected) {
  data.out.assign(data.out.size(), 0);
  emulation::counters() = {};
  require(launch(data.plan(), nullptr) == cudaSuccess, name + ": error");
  require(emulation::counters().launches == 1, name + ": launches");
  for (int i = 0; i < count; i++) {
    const double right = expected(i);
    require(std::abs(data.out[i] - right) <= 1e-5 * (1 + std::abs(right)), name + " " + std::to_string(i));
  }
}

void run_all() {
  Data data(6), tall(40);
  double total = 0;
  for (int i = 0; i < data.rows; i++) total += data.sum(i, kColumns);
  const Expected row_sum = [&](int i) { return data.sum(i, kColumns); };
  compare("sum_rows<float>", data, planted::launch_sum_rows<float>, data.rows, row_sum);
  require(emulation::counters().blocks == data.rows && emulation::counters().barriers == 8, "counters");
  require(data.total == total, "sum_rows: total");
  compare("sum_rows<double>", data, planted::launch_sum_rows<double>, data.rows, row_sum);
  compare("row_norms", data, planted::launch_row_norms, data.rows,
          [&](int i) { return std::sqrt(data.sum(i, kColumns, 2)); });
  compare("transpose", tall, planted::launch_transpose, tall.rows * kColumns,
          [&](int i) { return tall.in[i % tall.rows * kColumns + i / tall.rows]; });
  compare("sum_heads", data, planted::launch_sum_heads, data.rows, [&](int i) { return data.sum(i, planted::kWarp); });
}

// A launch that the runtime would refuse does not run.
void refuse() {
  Data data(2);
  const auto launch = [&](dim3 grid, dim3 block, size_t bytes) {
    const cudaLaunchConfig_t config = {grid, block, bytes, nullptr};
    emulation::counters() = {};
    const cudaError_t error = cudaLaunchKernelEx(&config, planted::transpose, data.plan());
    require(error == cudaGetLastError() && cudaGetLastError() == cudaSuccess, "the last error");
    require(emulation::counters().launches == (error == cudaSuccess), "whether it ran");
    return error;
  };
  const auto allow = [](int bytes) {
    return cudaFuncSetAttribute(planted::transpose, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  allow(0);
  const dim3 warps(32, 2);
  require(launch(1, warps, 48 << 10) == cudaSuccess, "48 KiB");
  require(launch(1, warps, (48 << 10) + 1) == cudaErrorInvalidValue, "more than 48 KiB");
  require(allow(232448) == cudaSuccess && launch(1, warps, 232448) == cudaSuccess, "all shared memory");
  require(launch(1, warps, 232449) == cudaErrorInvalidValue, "more shared memory than allowed");
  require(allow(232449) == cudaErrorInvalidValue, "more shared memory than there is");
  require(cudaGetLastError() == cudaErrorInvalidValue, "the last error of an attribute");
  for (dim3 block : {dim3(0), dim3(1025), dim3(32, 33), dim3(1, 1, 65), dim3(32, 0)}) {
    require(launch(1, block, 8192) == cudaErrorInvalidConfiguration, "threads");
  }
  for (dim3 grid : {dim3(0), dim3(1, 0), dim3(1, 65536)}) {
    require(launch(grid, warps, 8192) == cudaErrorInvalidConfiguration, "blocks");
  }
  require(launch(1, dim3(32, 32), 8192) == cudaSuccess, "1024 threads");
  require(cudaGetErrorString(cudaErrorInvalidValue) == std::string("invalid argument"), "error string");
}

}  // namespace

int main(int, char** arguments) {
  if (planted::kBug == planted::kNone) refuse();
  emulation::order(emulation::Order::kForward);
  run_all();
  emulation::order(emulation::Order::kReverse);
  run_all();
  for (int seed = 0; seed < std::atoi(arguments[1]); seed++) {
    emulation::order(emulation::Order::kShuffled, seed);
    run_all();
  }
}
