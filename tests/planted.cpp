// Bugs for `make sanitize` to find: what reports these, compiled and run the same way, would report the engine's.
#include <limits>

extern "C" __attribute__((visibility("default"))) int overrun(int size) {
  volatile int* numbers = new int[size]();
  numbers[size] = 1;
  const int first = numbers[0];
  delete[] numbers;
  return first;
}

extern "C" __attribute__((visibility("default"))) int overflow(int number) {
  return std::numeric_limits<int>::max() + number;
}
