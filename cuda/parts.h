// What other files compute of a layer, as they say there.
#pragma once

#include "matvec.h"

// a matrix in panels times rows of x (of INT8 rounded already), many or few; to (rows, out)
void products(const Matrix &m, int64_t rows, int threads, const Asked &x, float *to);

extern "C" {

void mix_forward(const int64_t *s, int threads, const float *x, const float *last, const float *const *m,
                 float *const *out);
void prepare_forward(const int64_t *s, int threads, const float *k, const float *zw, const float *za, const float *w0,
                     const float *a0, const float *k_k, const float *k_a, float *w, float *key, float *minus, float *b);
void lean_forward(const int64_t *s, int threads, const float *v, const float *first, const float *z, const float *v0,
                  float *out);
void wkv7_forward(const int64_t *sizes, int threads, const float *r, const float *w, const float *k, const float *v,
                  const float *a, const float *b, const float *start, float *y, float *end, float *states, float *u);
void finish_forward(const int64_t *s, int threads, const float *y, const float *r, const float *k, const float *v,
                    const float *g, const float *r_k, const float *weight, const float *bias, float eps, float *out);
void drift_forward(const int64_t *s, int threads, const float *x, const float *last, const float *const *z,
                   const float *const *m, float *const *out);
void wkv6_forward(const int64_t *sizes, int threads, const float *r, const float *w, const float *k, const float *v,
                  const float *u, const float *start, float *y, float *end, float *states);
void gate_forward(const int64_t *s, int threads, const float *y, const float *z, const float *weight,
                  const float *bias, float eps, float *out);
void sift_forward(const int64_t *s, int threads, const float *z, const float *v, float *out);
void multiply(const int64_t *s, int threads, const float *x, const float *w, float *to);
void square_forward(const int64_t *s, int threads, const float *x, float *out);

}  // extern "C"
