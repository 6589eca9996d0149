// Deliberate errors: test_sanitized.py checks that the sanitizers abort the process at each.
#include <cstdint>

extern "C" float read_at(const float* values, int64_t index) {
  return values[index];
}

extern "C" int64_t add(int64_t a, int64_t b) {
  return a + b;
}
