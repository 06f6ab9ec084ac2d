// The output layer of native.py: in fp32 its products and softmax, in bf16 the softmax alone.

#include <math.h>
#include <omp.h>

#include <vector>

#include "product.h"

// --------------------------------------------------------------------------------- softmax of rows

// A row of logits comes from memory once, and lies in the first-level cache for the passes after
// the first.

constexpr float TINY = 1e-30f;  // a probability below is 0: subnormals would be slow

static inline float read(const bf16* p) {
  bf16 lanes[LANES] = {*p};
  return load(lanes)[0];
}
static inline void write(bf16* p, float x) {
  bf16 lanes[LANES];
  store(lanes, V{} + x);
  *p = lanes[0];
}

// -ln p of the target; with `gradient` the row becomes d of that / d logits. `width` is `classes`
// rounded up to whole vectors; what lies between belongs to the row.
static float row_nats(bf16* row, idx classes, idx width, idx target, bool gradient) {
  const V zero = {};
  for (idx v = classes; v < width; v++) write(row + v, -INFINITY);
  V tops = zero - INFINITY, sums[2] = {};
  for (idx v = 0; v < width; v += LANES) {
    const V x = load(row + v);
    tops = x > tops ? x : tops;  // passes over a NaN, which the sum finds
  }
  float top = tops[0], sum = 0;
  for (int i = 1; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
  const float below = top - read(row + target);
  for (idx v = 0; v < width; v += LANES)
    sums[v / LANES % 2] += exponential(load(row + v) - top);  // not kept: bf16 would round twice
  for (int i = 0; i < LANES; i++) sum += sums[0][i] + sums[1][i];
  const float scale = 1 / sum;
  if (gradient) {
    for (idx v = 0; v < width; v += LANES) {
      const V power = exponential(load(row + v) - top);
      store(row + v, power < TINY ? zero : power * scale);
    }
    write(row + target, expf(-below) * scale - 1);
  }
  return below + logf(sum);
}

// --------------------------------------------------------------- the layer, some classes at a time

// The logits lie transposed, [V, pitch]. So each product finds its operands as they are, the weight
// too, and the softmax has the classes of LANES rows below each other.

extern "C" {
// Sizes in brackets: C rows, E features, V classes; C <= pitch and E < width, whole vectors.
struct Layer {
  idx rows, pitch, features, width, classes, block, threads, gradient, add;  // add: to d_weight
  const float *hidden, *weight, *bias;  // [C, width], [V, E], [V] or null
  const int64_t* targets;               // [C]
  float* packed;                        // scratch [C, width], C a multiple of LANES
  float* logits;                        // [V, pitch]; without `gradient` [threads, block, pitch]
  float* sums;                          // scratch [1 + 2 threads, pitch]
  float* nats;                          // [C]
  const float* kept;                    // [C, width], for d_weight: hidden, 1, zeros, each times
                                        // what the row counts
  float *d_weight, *d_hidden;           // [V, width] or null; [threads, E, pitch], added to, or null
};

idx size_of(idx) { return sizeof(Layer); }
idx lanes() { return LANES; }
}

// f(first class, classes) for each block of a thread's own classes.
template <class F> static void each_block(const Layer& j, F f) {
  const idx blocks = (j.classes + j.block - 1) / j.block;
  const idx t = omp_get_thread_num(), threads = omp_get_num_threads();
  for (idx b = blocks * t / threads; b < blocks * (t + 1) / threads; b++) {
    const idx v = b * j.block;
    f(v, j.classes - v < j.block ? j.classes - v : j.block);
  }
}

// f(row, class - v) for each row whose target is one of the n classes from v on.
template <class F> static void each_hit(const Layer& j, idx v, idx n, F f) {
  for (idx r = 0; r < j.rows; r++) {
    const idx i = j.targets[r] - v;
    if (i >= 0 && i < n) f(r, i);
  }
}

// Leaves the nats and, with `gradient`, the logits; in `sums` the rows' targets' logits, then of
// each thread's classes the largest logit and the sum of exp(logit - it), the first thread's become
// all classes' and 1 / the sum.
static void forward(const Layer& j) {
  const idx P = j.pitch;
  const V zero = {};
  for (idx t = 0; t < j.threads; t++)
    for (idx c = 0; c < P; c++) j.sums[(1 + 2 * t) * P + c] = -INFINITY, j.sums[(2 + 2 * t) * P + c] = 0;
  pack(j.packed, j.hidden, j.rows, P, j.width, j.width, 1, 0, j.threads);
#pragma omp parallel num_threads((int)j.threads)
  {
    const idx t = omp_get_thread_num();
    float *tops = j.sums + (1 + 2 * t) * P, *sums = tops + P;
    each_block(j, [&](idx v, idx n) {
      float* x = j.logits + (j.gradient ? v : t * j.block) * P;
      product<float>(x, P, {j.weight + v * j.features, j.features, 1},
                     {j.packed, j.width * LANES, LANES}, P / LANES, j.features, n, false);
      for (idx c = 0; c < P; c += LANES) {
        const V before = load(tops + c);
        V top = before;
        for (idx i = 0; i < n; i++) {
          V logit = load(x + i * P + c);
          if (j.bias) store(x + i * P + c, logit = logit + j.bias[v + i]);
          top = logit > top ? logit : top;  // passes over a NaN, which the sum finds
        }
        const V base = top == -INFINITY ? zero : top;  // -inf - -inf would be NaN
        V sum[2] = {load(sums + c) * exponential(before - base), zero};
        for (idx i = 0; i < n; i++) sum[i % 2] += exponential(load(x + i * P + c) - base);
        store(tops + c, top), store(sums + c, sum[0] + sum[1]);
      }
      each_hit(j, v, n, [&](idx r, idx i) { j.sums[r] = x[i * P + r]; });
    });
  }
  float *tops = j.sums + P, *sums = tops + P;
  for (idx r = 0; r < j.rows; r++) {
    float top = tops[r], sum = 0;
    for (idx t = 1; t < j.threads; t++) top = tops[2 * t * P + r] > top ? tops[2 * t * P + r] : top;
    for (idx t = 0; t < j.threads; t++) sum += sums[2 * t * P + r] * expf(tops[2 * t * P + r] - top);
    tops[r] = top, sums[r] = 1 / sum;
    j.nats[r] = top - j.sums[r] + logf(sum);
  }
}

// d nats / d logits, in their place, and from them the gradients of weight and hidden.
static void backward(const Layer& j) {
  const idx P = j.pitch;
  const float *tops = j.sums + P, *scales = tops + P;
  const V zero = {};
#pragma omp parallel num_threads((int)j.threads)
  {
    float* d_hidden = j.d_hidden ? j.d_hidden + omp_get_thread_num() * j.features * P : nullptr;
    each_block(j, [&](idx v, idx n) {
      float* x = j.logits + v * P;
      for (idx i = 0; i < n; i++)
        for (idx c = 0; c < P; c += LANES) {
          const V power = exponential(load(x + i * P + c) - load(tops + c));
          store(x + i * P + c, power < TINY ? zero : power * load(scales + c));
        }
      each_hit(j, v, n, [&](idx r, idx i) { x[i * P + r] -= 1; });
      if (j.d_weight)
        product<float>(j.d_weight + v * j.width, j.width, {x, P, 1}, {j.kept, LANES, j.width},
                       j.width / LANES, j.rows, n, j.add);
      if (d_hidden)
        product<float>(d_hidden, P, {j.weight + v * j.features, 1, j.features}, {x, LANES, P},
                       P / LANES, n, j.features, true);
    });
  }
}

extern "C" {
void layer_forward(const Layer* j) { forward(*j); }
void layer_backward(const Layer* j) { backward(*j); }
void softmax_bf16(bf16* logits, const int64_t* targets, float* nats, idx rows, idx classes,
                  idx width, idx gradient, idx threads) {
#pragma omp parallel for num_threads((int)threads)
  for (idx r = 0; r < rows; r++)
    nats[r] = row_nats(logits + r * width, classes, width, targets[r], gradient);
}
}
