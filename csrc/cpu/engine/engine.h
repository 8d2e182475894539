// The engine for the CPU: built once for each instruction set (engine_*.cpp), chosen for the machine it runs on.
#pragma once

#include <cstdint>

#include "../../engine/call.h"

namespace maml_ext::engine {

// What the engine needs of its surroundings.
struct Machine {
  int threads;
  void (*split)(int64_t count, int64_t grain, void* context, void (*run)(void*, int64_t, int64_t));
  // Memory of at least `bytes`, zeros unless the last to hold it had the same key; `give` returns it. May throw: only
  // the thread that calls the engine takes.
  void* (*take)(int64_t bytes, const int64_t (&key)[8]);
  void (*give)(void*);
  // Called, where not null, with the seconds that a rule of a layer took, for so many tasks.
  void (*record)(int layer, int rule, int64_t tasks, double seconds);
  double (*clock)();
};

struct Engine {
  int vector_bytes;
  void (*run_float)(const Call<float>&, const Machine&);
  void (*run_double)(const Call<double>&, const Machine&);
};

extern const Engine engine_base;
#if defined(__x86_64__)
extern const Engine engine_avx2;
extern const Engine engine_avx512;
#endif

// By what the processor has, or by MAML_EXT_CPU=base|avx2|avx512 in the environment.
const Engine& engine_for_this_machine();
// Threads of `threads`, `split` as given, and memory that is kept from call to call.
Machine this_machine(int threads, void (*split)(int64_t, int64_t, void*, void (*)(void*, int64_t, int64_t)));

struct Profile {
  int layer, rule;       // the layer below 0: work beside layers (task.h)
  int64_t tasks;
  double seconds;
  int kind;              // of the layer; below 0 as above
  double multiply_adds;  // what the rule needs, over all samples of the pass; 0 where it is no product
};
// While it records, every rule of every layer is noted; turning it on drops what was recorded before.
void record_profile(bool on);
// At the end of a call: sets kind and multiply-adds of what it recorded.
void settle_profile(const Network& net, int64_t tasks, int64_t support, int64_t query);
int64_t profile_entries(const Profile** entries);

}  // namespace maml_ext::engine
