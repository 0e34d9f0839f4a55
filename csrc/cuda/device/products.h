// Grouped matrix products (products.cu), P X S at once (chain.cu) and the start of polar factors (polar.cu).
// Host functions; each is one launch (one for every few hundred products).
#pragma once

#include <vector>

#include "cuda/tables.h"

namespace fishleg::cuda {

/// Tiles of a product, and so the number of Sums that it writes. Fills in ``tiles_n``.
int64_t tiles(Product& p);

/// C = A B for all of them; either all or none with ``plus_transpose``.
void multiply_all(std::vector<Product>& products, Precision precision, Stream stream);

constexpr int chain_width = 256;  // the most columns of a chain

int64_t tiles(Chain& c);

/// C = outer∘(P X S) for all of them; n at most ``chain_width``.
void chain_all(std::vector<Chain>& chains, Precision precision, Stream stream);

/// B and the scale of all of them.
void first_step_all(std::vector<FirstStep>& steps, Stream stream);

}  // namespace fishleg::cuda
