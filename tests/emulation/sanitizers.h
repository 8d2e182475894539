// What AddressSanitizer and ThreadSanitizer must be told of fibres and shared memory.
#pragma once
#include <cstddef>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace emulation {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

// Nothing in a build without them.
namespace sanitizer {

inline void poison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(memory, bytes);
#endif
}

inline void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
}

// Before the switch to another stack. `kept` is null where this one is not returned to.
inline void leave_stack([[maybe_unused]] void** kept, [[maybe_unused]] const void* next, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(kept, next, size);
#endif
}

// After the switch: what was kept of this stack; and where the other one is.
inline void enter_stack([[maybe_unused]] void* kept, [[maybe_unused]] const void** previous = nullptr,
                        [[maybe_unused]] size_t* size = nullptr) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(kept, previous, size);
#endif
}

// What happened before release(tag) happened before what follows acquire(tag).
inline void release([[maybe_unused]] void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(tag);
#endif
}

inline void acquire([[maybe_unused]] void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(tag);
#endif
}

// A thread to ThreadSanitizer; a switch to it orders nothing.
struct Thread {
  void* handle = nullptr;
#ifdef __SANITIZE_THREAD__
  void create() { handle = __tsan_create_fiber(0); }
  void adopt_current() { handle = __tsan_get_current_fiber(); }
  void switch_to() const { __tsan_switch_to_fiber(handle, __tsan_switch_to_fiber_no_sync); }
  void destroy() { __tsan_destroy_fiber(handle); }
#else
  void create() {}
  void adopt_current() {}
  void switch_to() const {}
  void destroy() {}
#endif
};

// While one exists, what this thread reads and writes is not part of any race: for the scheduler's own memory.
struct Ignore {
  Ignore(const Ignore&) = delete;
#ifdef __SANITIZE_THREAD__
  Ignore() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Ignore() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Ignore() {}
#endif
};

}  // namespace sanitizer

}  // namespace emulation
