// The softmax of native.py: a row of logits comes from memory once, and lies in the
// first-level cache for the passes after the first.

#include <math.h>

#include "vector.h"

template <class S> static inline float read(const S* p) {
  S lanes[LANES] = {*p};
  return load(lanes)[0];
}
template <class S> static inline void write(S* p, float x) {
  S lanes[LANES];
  store(lanes, V{} + x);
  *p = lanes[0];
}

// -ln p of the target; with `gradient` the row becomes d of that / d logits. `width` is `classes`
// rounded up to whole vectors; what lies between belongs to the row.
template <class S>
static float row_nats(S* row, idx classes, idx width, idx target, bool gradient) {
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
  const bool keep = gradient && sizeof(S) == sizeof(float);  // bf16 would round twice
  for (idx v = 0; v < width; v += LANES) {
    const V power = exponential(load(row + v) - top);
    sums[v / LANES % 2] += power;
    if (keep) store(row + v, power);
  }
  for (int i = 0; i < LANES; i++) sum += sums[0][i] + sums[1][i];
  const float scale = 1 / sum;
  if (gradient) {
    for (idx v = 0; v < width; v += LANES) {
      const V power = keep ? load(row + v) : exponential(load(row + v) - top);
      store(row + v, power < 1e-30f ? zero : power * scale);  // subnormals would be slow
    }
    write(row + target, expf(-below) * scale - 1);
  }
  return below + logf(sum);
}

template <class S>
static void all_rows(S* logits, const int64_t* targets, float* nats, idx rows, idx classes,
                     idx width, idx gradient, idx threads) {
#pragma omp parallel for num_threads((int)threads)
  for (idx r = 0; r < rows; r++)
    nats[r] = row_nats(logits + r * width, classes, width, targets[r], gradient);
}

extern "C" {
void softmax_fp32(float* logits, const int64_t* targets, float* nats, idx rows, idx classes,
                  idx width, idx gradient, idx threads) {
  all_rows(logits, targets, nats, rows, classes, width, gradient, threads);
}
void softmax_bf16(bf16* logits, const int64_t* targets, float* nats, idx rows, idx classes,
                  idx width, idx gradient, idx threads) {
  all_rows(logits, targets, nats, rows, classes, width, gradient, threads);
}
}
