// The little that these tests need of a framework: CHECK counts and tells, and main() returns failures().
#pragma once

#include <cstdio>

namespace check {

inline int& failures() {
    static int count = 0;
    return count;
}

inline void that(bool ok, const char* what, const char* file, int line) {
    if (ok) return;
    ++failures();
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
}

}  // namespace check

#define CHECK(condition) check::that(condition, #condition, __FILE__, __LINE__)
#define CHECK_THROWS(expression, part)                                                  \
    do {                                                                                \
        bool thrown = false;                                                            \
        try {                                                                           \
            expression;                                                                 \
        } catch (const std::exception& error) {                                         \
            thrown = std::string(error.what()).find(part) != std::string::npos;         \
            if (!thrown) std::fprintf(stderr, "the message was: %s\n", error.what());    \
        }                                                                               \
        check::that(thrown, #expression " should throw: " part, __FILE__, __LINE__);    \
    } while (false)
