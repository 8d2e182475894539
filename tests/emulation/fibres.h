// Runs the threads of a grid as fibres: each until it waits at a barrier or shuffle, or ends; one block after another.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "sanitizers.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

enum class Order { kForward, kReverse, kShuffled };

struct Counters {
  long launches = 0, blocks = 0;
  long barriers = 0;  // __syncthreads of a block, the most there were in one
};

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;   // a page below each stack that nobody may touch
constexpr size_t kMargin = 4096;  // around shared memory, poisoned

// Contexts: where a fibre goes on. EMULATION_UCONTEXT tests the portable way where there is a fast one.
#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
using Context = void*;  // the stack pointer; what a function must preserve lies above it

__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void swap(Context*, Context*) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq (%rsi), %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  std::fill(top - 8, top, nullptr);  // six registers, then where `swap` returns to, then where `entry` would
  top[-2] = reinterpret_cast<void*>(entry);
  context = top - 8;
}
#else
using Context = ucontext_t;

inline void swap(Context* from, Context* to) { swapcontext(from, to); }

inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { kReady, kAtBarrier, kAtWarp, kEnded };

struct Fibre {
  uint3 index{};        // threadIdx
  unsigned number = 0;  // the same in one number
  State state = State::kReady;
  std::source_location where{};   // it waits
  unsigned mask = 0, source = 0;  // kAtWarp: the lanes to wait for, and the one whose value it wants
  uint64_t value = 0;             // kAtWarp: its own value, afterwards that of `source`
  char* stack = nullptr;
  Context context{};
  void* kept = nullptr;
  sanitizer::Thread thread;

  unsigned lane() const { return number % kWarp; }
  std::string describe() const {
    const std::string name = "thread " + std::to_string(number);
    if (state == State::kEnded) return name + " has ended";
    return name + (state == State::kAtBarrier ? " waits for its block at " : " waits for its warp at ") +
           where.file_name() + ":" + std::to_string(where.line());
  }
};

[[noreturn]] inline void stop(const char* what, const Fibre& one, const Fibre& other) {
  std::fprintf(stderr, "emulation: %s in block (%u, %u, %u): %s, %s\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               one.describe().c_str(), other.describe().c_str());
  std::abort();
}

// Dynamic shared memory of one block.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : all_(::operator new(bytes + 2 * kMargin, kAlignment)) {
    std::memset(all_, 0xff, bytes + 2 * kMargin);  // NaN in every floating type, -1 in every integer
    sanitizer::poison(all_, kMargin);
    sanitizer::poison(begin() + bytes, kMargin);
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { ::operator delete(all_, kAlignment); }
  unsigned char* begin() const { return static_cast<unsigned char*>(all_) + kMargin; }

 private:
  static constexpr std::align_val_t kAlignment{128};
  void* all_;
};

// One block, while it runs. Each is new on the heap: what ThreadSanitizer knows of its tags must not outlive it.
struct Block {
  SharedMemory memory;
  std::vector<Fibre> fibres;
  std::vector<std::vector<Fibre*>> warps;  // in the order of their turns, as are the lanes of each
  long barriers = 0;
  // Tags of barriers by parity: who leaves one late does not see what others did on their way to the next.
  char tags[2] = {};
  struct Group {
    long barriers = 0;
    char tags[2] = {};
  };
  std::map<std::pair<unsigned, unsigned>, Group> groups;  // by warp and mask

  Block(unsigned threads, size_t bytes) : memory(bytes), fibres(threads), warps((threads + kWarp - 1) / kWarp) {}
  Group& group(const Fibre& fibre) { return groups[{fibre.number / kWarp, fibre.mask}]; }
};

struct Machine {
  Order order = Order::kForward;
  std::mt19937_64 random;
  Counters counters;
  std::mutex one_launch;

  void (*kernel)(const void*) = nullptr;  // what a thread runs, and what it is given
  const void* arguments = nullptr;
  std::unique_ptr<Block> block;
  Fibre* current = nullptr;
  std::vector<char*> stacks;  // kept from block to block
  char began = 0, ended = 0;  // tags of the launch

  // The host's side of a switch.
  Context context{};
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* kept = nullptr;
  sanitizer::Thread thread;

  template <class T>
  void put_in_order(std::vector<T>& turns) {
    if (order == Order::kReverse) std::reverse(turns.begin(), turns.end());
    if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
  }
};
inline Machine machine;

inline char* map_stack(char* at) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* stack = at ? mmap(at, kStack, PROT_READ | PROT_WRITE, kFlags | MAP_FIXED, -1, 0)
                   : mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (stack == MAP_FAILED || (!at && mprotect(stack, kGuard, PROT_NONE) != 0)) {
    std::perror("emulation: no memory for a stack");
    std::abort();
  }
  return at ? at : static_cast<char*>(stack) + kGuard;
}

inline char* clean_stack(unsigned number) {
  if (number == machine.stacks.size()) machine.stacks.push_back(map_stack(nullptr));
  char* stack = machine.stacks[number];
  sanitizer::unpoison(stack, kStack);
#ifdef __SANITIZE_THREAD__
  map_stack(stack);  // it forgets the accesses of the fibre that was here before
#endif
  return stack;
}

inline void switch_to(Fibre& fibre) {
  machine.current = &fibre;
  threadIdx = fibre.index;
  sanitizer::leave_stack(&machine.kept, fibre.stack, kStack);
  fibre.thread.switch_to();
  swap(&machine.context, &fibre.context);
  sanitizer::enter_stack(machine.kept);
}

inline void switch_to_host(Fibre& fibre) {
  sanitizer::leave_stack(fibre.state == State::kEnded ? nullptr : &fibre.kept, machine.stack, machine.stack_size);
  machine.thread.switch_to();
  swap(&fibre.context, &machine.context);
  sanitizer::enter_stack(fibre.kept, &machine.stack, &machine.stack_size);
}

inline void run_fibre() {
  sanitizer::enter_stack(nullptr, &machine.stack, &machine.stack_size);
  sanitizer::acquire(&machine.began);
  machine.kernel(machine.arguments);
  {
    sanitizer::Ignore ignore;
    machine.current->state = State::kEnded;
  }
  sanitizer::release(&machine.ended);
  switch_to_host(*machine.current);
}

inline void wait_for_block(std::source_location where) {
  sanitizer::Ignore ignore;
  Fibre& fibre = *machine.current;
  void* tag = &machine.block->tags[machine.block->barriers % 2];
  fibre.state = State::kAtBarrier;
  fibre.where = where;
  sanitizer::release(tag);
  switch_to_host(fibre);
  sanitizer::acquire(tag);
}

// Waits for the lanes of `mask`, hands over a value and returns that of lane `source`. Of the two kinds of calls only
// __syncwarp orders accesses to memory: CUDA promises it for no shuffle.
inline uint64_t wait_for_warp(unsigned mask, unsigned source, uint64_t value, bool fence, std::source_location where) {
  sanitizer::Ignore ignore;
  Fibre& fibre = *machine.current;
  fibre.state = State::kAtWarp;
  fibre.where = where;
  fibre.mask = mask;
  Block::Group& group = machine.block->group(fibre);
  void* tag = &group.tags[group.barriers % 2];
  fibre.source = source;
  fibre.value = value;
  if (!(mask >> fibre.lane() & 1)) stop("a lane that its own mask lacks", fibre, fibre);
  if (fence) sanitizer::release(tag);
  switch_to_host(fibre);
  if (fence) sanitizer::acquire(tag);
  return fibre.value;
}

inline bool same_place(const Fibre& one, const Fibre& other) {
  return one.state == other.state && one.where.line() == other.where.line() &&
         !std::strcmp(one.where.file_name(), other.where.file_name());
}

// Lets a block go on from a barrier that all of its threads have reached.
inline bool open_barrier(Block& block) {
  const Fibre* first = nullptr;
  for (const Fibre& fibre : block.fibres) {
    if (fibre.state == State::kReady || fibre.state == State::kAtWarp) return false;
    if (fibre.state == State::kAtBarrier && !first) first = &fibre;
  }
  if (!first) return false;
  for (Fibre& fibre : block.fibres) {
    if (!same_place(*first, fibre)) stop("divergent __syncthreads", *first, fibre);
  }
  for (Fibre& fibre : block.fibres) fibre.state = State::kReady;
  block.barriers++;
  return true;
}

// Lets the lanes go on that wait for each other with `fibre`. A lane that has ended, or that the block lacks, is waited
// for by nobody; who shuffles with such a lane, or with one outside of the mask, gets NaN.
inline void open_warp(Block& block, Fibre& fibre) {
  const unsigned first = fibre.number - fibre.lane();
  Fibre* lanes[kWarp] = {};
  uint64_t values[kWarp];
  std::fill(values, values + kWarp, ~uint64_t{0});
  for (unsigned lane = 0; lane < kWarp && first + lane < block.fibres.size(); lane++) {
    Fibre& other = block.fibres[first + lane];
    if (!(fibre.mask >> lane & 1) || other.state == State::kEnded) continue;
    if (other.state != State::kAtWarp || other.mask != fibre.mask) return;
    if (!same_place(fibre, other)) stop("divergent warp", fibre, other);
    values[lane] = other.value;
    lanes[lane] = &other;
  }
  block.group(fibre).barriers++;
  for (Fibre* lane : lanes) {
    if (!lane) continue;
    lane->value = values[lane->source];
    lane->state = State::kReady;
  }
}

[[noreturn]] inline void dead_lock(const Block& block) {
  const Fibre* first = nullptr;
  for (const Fibre& fibre : block.fibres) {
    if (fibre.state == State::kEnded) continue;
    if (!first) first = &fibre;
    if (!same_place(*first, fibre)) stop("dead lock", *first, fibre);
  }
  stop("dead lock", *first, *first);
}

inline void prepare(Block& block) {
  for (unsigned i = 0; i < block.fibres.size(); i++) {
    Fibre& fibre = block.fibres[i];
    fibre.number = i;
    fibre.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fibre.stack = clean_stack(i);
    fibre.thread.create();
    prepare(fibre.context, fibre.stack, run_fibre);
    block.warps[i / kWarp].push_back(&fibre);
  }
  machine.put_in_order(block.warps);
  for (std::vector<Fibre*>& lanes : block.warps) machine.put_in_order(lanes);
}

// Runs a warp until all of its lanes wait for the block or have ended: one that can run ahead of the others does. In
// random order it may get less far. Returns whether there was anything to run.
inline bool run_warp(Block& block, std::vector<Fibre*>& lanes) {
  const bool random = machine.order == Order::kShuffled;
  const auto is_ready = [](const Fibre* lane) { return lane->state == State::kReady; };
  for (bool ran = false;; ran = true) {
    if (std::none_of(lanes.begin(), lanes.end(), is_ready)) return ran;
    if (random && ran && machine.random() % 2) return true;
    if (random) machine.put_in_order(lanes);
    for (Fibre* lane : lanes) {
      if (is_ready(lane)) switch_to(*lane);
    }
    for (Fibre* lane : lanes) {
      if (lane->state == State::kAtWarp) open_warp(block, *lane);
    }
  }
}

inline void run(Block& block) {
  prepare(block);
  const auto has_ended = [](const Fibre& fibre) { return fibre.state == State::kEnded; };
  while (!std::all_of(block.fibres.begin(), block.fibres.end(), has_ended)) {
    if (machine.order == Order::kShuffled) machine.put_in_order(block.warps);
    bool progress = false;
    for (std::vector<Fibre*>& lanes : block.warps) progress |= run_warp(block, lanes);
    progress |= open_barrier(block);
    if (!progress) dead_lock(block);
  }
  for (Fibre& fibre : block.fibres) fibre.thread.destroy();
}

inline void run_grid(dim3 grid, dim3 block, size_t shared, void (*kernel)(const void*), const void* arguments) {
  std::lock_guard lock(machine.one_launch);
  machine.kernel = kernel;
  machine.arguments = arguments;
  sanitizer::release(&machine.began);
  {
    sanitizer::Ignore ignore;
    machine.thread.adopt_current();
    gridDim = grid;
    blockDim = block;
    std::vector<uint3> blocks;
    for (unsigned z = 0; z < gridDim.z; z++) {
      for (unsigned y = 0; y < gridDim.y; y++) {
        for (unsigned x = 0; x < gridDim.x; x++) blocks.push_back({x, y, z});
      }
    }
    machine.put_in_order(blocks);
    for (const uint3& index : blocks) {
      blockIdx = index;
      machine.block = std::make_unique<Block>(blockDim.x * blockDim.y * blockDim.z, shared);
      run(*machine.block);
      machine.counters.barriers = std::max(machine.counters.barriers, machine.block->barriers);
      machine.block.reset();
    }
    machine.counters.launches++;
    machine.counters.blocks += static_cast<long>(blocks.size());
  }
  sanitizer::acquire(&machine.ended);
}

}  // namespace emulation
