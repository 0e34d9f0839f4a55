#include "cpu/gemm/engine.h"

#include <stdexcept>

namespace fishleg::cpu {

std::vector<const Engine*> engines() {
    std::vector<const Engine*> all;
    for (const Engine* engine : {amx_engine(), amx_split_engine(), avx512_engine()})
        if (engine) all.push_back(engine);
    return all;
}

const Engine& engine_of(const std::string& name) {
    std::string names;
    for (const Engine* engine : engines()) {
        if (name == engine->name) return *engine;
        names += (names.empty() ? "" : ", ") + std::string(engine->name);
    }
    throw std::invalid_argument("engine should be one that this processor has (" +
                                (names.empty() ? "none" : names) + ") but is: " + name);
}

}  // namespace fishleg::cpu
