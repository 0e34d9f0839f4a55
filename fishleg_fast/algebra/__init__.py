"""Pure maths, which knows nothing of models: factors, matrices of low rank, structured inverse Fisher matrices, costs.

A structure approximates the inverse Fisher matrix Q of one block, the parameters θ of a layer seen as a matrix (m, n).
Row-major vec throughout: vec(X u Y) = (X ⊗ Yᵀ) vec(u). λ is ``fishleg_aux``, with the letters of the paper:

    Kron      Q u = A∘(P (A∘u) S), P = RᵀR, S = LLᵀ     R (m, m), L (n, n), A (m, n) where scale=True
    DiagKron  Q u = A∘(Rᵀ (B²∘(R (A∘u) L)) Lᵀ)          R (m, m), L (n, n), A (m, n), B (m, n)
    SumKron   Q u = Σₖ Pₖ u Sₖ                          R1 (m, m), L1 (n, n), R2, L2, ...
    Diagonal  Q u = d²∘u                                d, of the block's shape

Source: Garcia, Freddi et al., Fisher-Legendre (FishLeg) optimization of deep neural networks, ICLR 2023.
"""
