// The least that a test program needs: EXPECT counts and prints what does not hold, report() is main's result.
#pragma once

#include <cstdio>
#include <cstdlib>

inline int failures = 0;

inline void expect(bool ok, const char* what, const char* file, int line) {
  if (ok) return;
  if (++failures <= 20) std::printf("%s:%d: expected %s\n", file, line, what);
}
#define EXPECT(condition) expect((condition), #condition, __FILE__, __LINE__)

inline int report() {
  if (failures > 0) std::printf("%d expectations failed\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
