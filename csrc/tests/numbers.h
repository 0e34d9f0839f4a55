// Numbers for tests.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

using Numbers = std::vector<float>;

inline Numbers random_numbers(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    Numbers numbers(count);
    for (float& x : numbers) x = normal(generator);
    return numbers;
}
