//! The arithmetic of aggregation: SIMD kernels for weighted sums over f32, f16 and bf16.
