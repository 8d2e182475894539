// What the engine runs on: the instruction set, memory kept from call to call, the clock.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "engine.h"

namespace maml_ext::engine {
namespace {

// Buffers of earlier calls. A call of the same kind finds its memory mapped and its halos still zero; without that,
// mapping and zeroing cost as much as a fifth of a convolutional meta-gradient.
struct Buffer {
  void* at;
  int64_t bytes;
  void* start;  // of the allocation
  int64_t key[8];
  bool taken;
  std::thread::id by;
};
std::mutex mutex;
std::vector<Buffer> buffers;
constexpr int64_t kRetained = int64_t(512) << 20;

// Zeros from the beginning of a cache line on: calloc begins within one, and every vector would cross two. It maps much
// memory, and pages nobody touches are never there. (Huge pages were tried: nothing gained, first calls ten times as
// long.)
void allocate(Buffer& b) {
  b.start = std::calloc(b.bytes / 64 + 2, 64);
  b.at = b.start ? (char*)b.start + (64 - int64_t(uintptr_t(b.start) % 64)) % 64 : nullptr;
}

void drop(size_t i) {
  std::free(buffers[i].start);
  buffers.erase(buffers.begin() + i);
}

void* take(int64_t bytes, const int64_t (&key)[8]) {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::thread::id by = std::this_thread::get_id();
  for (Buffer& b : buffers)
    if (!b.taken && b.bytes == bytes && !std::memcmp(b.key, key, sizeof key)) {
      b.taken = true;
      b.by = by;
      return b.at;
    }
  int64_t retained = bytes;
  for (const Buffer& b : buffers) retained += b.bytes;
  for (size_t i = 0; i < buffers.size() && (retained > kRetained || buffers.size() >= 64);)
    if (buffers[i].taken)
      i++;
    else
      retained -= buffers[i].bytes, drop(i);
  Buffer b{nullptr, bytes, nullptr, {}, true, by};
  std::memcpy(b.key, key, sizeof key);
  if (bytes >= 0 && bytes <= int64_t(1) << 44) allocate(b);
  if (!b.at) {
    for (Buffer& other : buffers)  // the call ends here, and gives nothing back
      if (other.by == by) other.taken = false;
    throw std::bad_alloc();
  }
  buffers.push_back(b);
  return b.at;
}

void give(void* at) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (Buffer& b : buffers)
    if (b.at == at) b.taken = false;
}

std::vector<Profile> profile;
size_t settled = 0;  // of its entries
std::atomic<bool> recording{false};

void record(int layer, int rule, int64_t tasks, double seconds) {
  const std::lock_guard<std::mutex> lock(mutex);
  profile.push_back({layer, rule, tasks, seconds, layer, 0.0});
}

// Multiply-adds of a rule for one sample, by the products that contract.h lists.
double needed(const Network& net, const Layer& l, int rule) {
  if (l.kind != kContract) return 0;
  const Slot& weight = net.slot[l.weight];
  const int from_input = net.needs_gradient[l.in], from_weight = !weight.fixed, both = from_input + from_weight;
  const int products[] = {1, both, both, both + 2 * from_input * from_weight};
  return double(products[rule]) * l.forward->count * l.forward->taps * weight.inputs / weight.groups * weight.outputs;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const Engine& choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("MAML_EXT_CPU");
  auto allowed = [&](const char* name) { return !wish || !*wish || !std::strcmp(wish, name); };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed("avx512")) return engine_avx512;
#if !defined(__SANITIZE_ADDRESS__)
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return engine_avx2;
#endif
#endif
  return engine_base;
}

}  // namespace

const Engine& engine_for_this_machine() {
  static const Engine& engine = choose();
  return engine;
}

Machine this_machine(int threads, void (*split)(int64_t, int64_t, void*, void (*)(void*, int64_t, int64_t))) {
  return {threads, split, &take, &give, recording ? &record : nullptr, &seconds_now};
}

void record_profile(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  recording = on;
  if (on) profile.clear(), settled = 0;
}

void settle_profile(const Network& net, int64_t tasks, int64_t support, int64_t query) {
  const std::lock_guard<std::mutex> lock(mutex);
  // Of the passes forward and backward over a layer, each task has one over the query set; all others are over the
  // support set, where there is one.
  std::vector<int64_t> asked(2 * net.layers, query ? tasks : 0);
  for (; settled < profile.size(); settled++) {
    Profile& p = profile[settled];
    if (p.layer < 0 || p.layer >= net.layers) continue;
    const Layer& l = net.layer[p.layer];
    const bool of_query = !support || (p.rule < 2 && asked[2 * p.layer + p.rule] > 0);
    if (of_query && p.rule < 2) asked[2 * p.layer + p.rule] -= p.tasks;
    p.kind = l.kind;
    p.multiply_adds = needed(net, l, p.rule) * double(p.tasks * (of_query ? query : support));
  }
}

int64_t profile_entries(const Profile** entries) {
  thread_local std::vector<Profile> copy;  // others may go on recording
  const std::lock_guard<std::mutex> lock(mutex);
  copy = profile;
  *entries = copy.data();
  return int64_t(copy.size());
}

}  // namespace maml_ext::engine
