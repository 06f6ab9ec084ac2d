// Products with matrices in panels of as many output features as a vector has lanes, and the packing
// of such panels: see "Packed panels" in README.md.

#pragma once
#include "vector.h"

// A packed matrix: panels of LANES output features, [n / LANES][K][LANES] (bf16: [K / 2][LANES][2]).

#ifdef __AVX512F__
constexpr int ROWS = 6, PANELS = 4;  // 24 of 32 registers accumulate; a 7th row spilled one
#else
constexpr int ROWS = 6, PANELS = 2;  // 12 of 16 registers
#endif

constexpr idx DEPTH = 128;  // inputs of 4 panels at a time, 32 KiB: they stay in the first-level cache

template <class S> struct Step;  // how many k one step of the inner product takes, and its sum
template <> struct Step<float> {
  static constexpr int K = 1;
  static inline void add(V& sum, const float* source, V w) { sum += *source * w; }
};
template <> struct Step<bf16> {
  static constexpr int K = 2;
  static inline void add(V& sum, const bf16* source, V w) {
    uint32_t pair = get<uint32_t>(source);
#ifdef __AVX512BF16__
    sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)w);
#else
    const uint32_t low = pair << 16, high = pair & 0xffff0000u;
    sum += get<float>(&low) * (V)((VU)w << 16);
    sum += get<float>(&high) * (V)((VU)w & 0xffff0000u);
#endif
  }
};

// Where an operand lies, in elements: a source from row to row, panels from panel to panel (`line`),
// and both from one step of the inner product to the next (`step`).
template <class S> struct Operand { const S* at; idx line, step; };

// dst [R, N * LANES] (+)= source [R, K] times N panels. Asks for what lies `ahead`, going on by
// `bytes` each time, so that the next panels are in the second-level cache when their turn comes.
template <class S, int R, int N>
static void tile(float* dst, idx ldd, Operand<S> source, Operand<S> panels, idx K, bool add,
                 const char* ahead, idx bytes) {
  V sum[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sum[r][n] = add ? load(dst + r * ldd + n * LANES) : V{};
  for (idx k = 0; k < K; k += Step<S>::K) {
    V w[N];
    for (int n = 0; n < N; n++) w[n] = get<V>(panels.at + n * panels.line);
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + 64, _MM_HINT_T1);
    ahead += bytes;
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) Step<S>::add(sum[r][n], source.at + r * source.line, w[n]);
    panels.at += panels.step, source.at += source.step;
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(dst + r * ldd + n * LANES, sum[r][n]);
}

template <class S>
using Tile = void (*)(float*, idx, Operand<S>, Operand<S>, idx, bool, const char*, idx);

template <class S, int N, int R = 1> static Tile<S> tile_of(idx rows) {
  if constexpr (R < ROWS) {
    if (rows != R) return tile_of<S, N, R + 1>(rows);
  }
  return tile<S, R, N>;
}

#ifdef __AMX_BF16__
// As `tile`, for up to 16 rows as configured; reads (and ignores) rows of source beyond `rows`.
template <int N>
static void tile_amx(float* dst, idx ldd, const bf16* source, idx lds, const bf16* panels, idx K,
                     bool add, const char* ahead, idx lines, idx rows) {
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (N > 2) _tile_zero(2);
  if (N > 3) _tile_zero(3);
  for (idx k = 0; k < K; k += 32) {
    const bf16* w = panels + k * LANES;
    for (int l = 0; l < 16 * lines; l++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    _tile_loadd(4, source + k, lds * 2);
    _tile_loadd(5, w, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (N > 1) { _tile_loadd(6, w + K * LANES, 64); _tile_dpbf16ps(1, 4, 6); }
    if (N > 2) { _tile_loadd(7, w + 2 * K * LANES, 64); _tile_dpbf16ps(2, 4, 7); }
    if (N > 3) { _tile_loadd(5, w + 3 * K * LANES, 64); _tile_dpbf16ps(3, 4, 5); }
  }
  alignas(64) float out[4][16][LANES];
  _tile_stored(0, out[0], 64);
  if (N > 1) _tile_stored(1, out[1], 64);
  if (N > 2) _tile_stored(2, out[2], 64);
  if (N > 3) _tile_stored(3, out[3], 64);
  for (idx r = 0; r < rows; r++)
    for (int n = 0; n < N; n++) {
      float* d = dst + r * ldd + n * LANES;
      store(d, add ? load(d) + load(out[n][r]) : load(out[n][r]));
    }
}

static void configure_tiles(idx rows) {
  struct { uint8_t palette, start, zeros[14]; uint16_t bytes[16]; uint8_t rows[16]; } c = {1};
  for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = i < 5 ? (uint8_t)rows : 16;
  _tile_loadconfig(&c);
}
#endif

// dst [B, n * LANES] (+)= source [B, K] times n <= PANELS panels, asking for `lines` of 64 bytes of
// what lies ahead, up to `end`, in a step.
template <class S>
static void group(float* dst, idx ldd, Operand<S> source, Operand<S> panels, idx n, idx K, idx B,
                  bool add, const char* ahead, const char* end, idx lines) {
  const idx blocks = (B + ROWS - 1) / ROWS;
  for (idx k = 0; k < K; k += DEPTH) {
    const idx depth = K - k < DEPTH ? K - k : DEPTH, steps = k / Step<S>::K;
    const Operand<S> w = {panels.at + steps * panels.step, panels.line, panels.step};
    for (idx i = 0; i < blocks; i++) {
      const idx row = B * i / blocks, rows = B * (i + 1) / blocks - row;
      Tile<S> f = tile_of<S, 1>(rows);
      if (n == 2) f = tile_of<S, 2>(rows);
      if constexpr (PANELS == 4)
        f = n == 4 ? tile_of<S, 4>(rows) : n == 3 ? tile_of<S, 3>(rows) : f;
      const S* first = source.at + row * source.line + steps * source.step;
      f(dst + row * ldd, ldd, {first, source.line, source.step}, w, depth, add || k, ahead,
        ahead < end ? 4 * LANES * lines : 0);
      ahead += lines * depth / Step<S>::K * 4 * LANES;
    }
  }
}

// dst [B, n * LANES] (+)= source [B, K] times n panels, wherever both lie.
template <class S>
static void product(float* dst, idx ldd, Operand<S> source, Operand<S> panels, idx n, idx K, idx B,
                    bool add) {
  if (K == 0 && !add)  // an empty sum
    for (idx b = 0; b < B; b++) memset(dst + b * ldd, 0, n * LANES * sizeof(float));
  const idx groups = (n + PANELS - 1) / PANELS;
  for (idx g = 0; g < groups; g++) {
    const idx v = n * g / groups, end = n * (g + 1) / groups;
    const Operand<S> w = {panels.at + v * panels.line, panels.line, panels.step};
    group(dst + v * LANES, ldd, source, w, end - v, K, B, add, (const char*)w.at, nullptr, 0);
  }
}

// The columns of one thread, in panels.
struct Range { idx begin, end; };

// dst [B, n] (+)= source [B, K] @ packed matrix [K, n] in the thread's panels; `next` will be read next.
template <class S>
static void product(float* dst, idx ldd, const S* source, idx lds, const S* matrix, idx K, idx B,
                    Range range, bool add, const S* next) {
#ifdef __AMX_BF16__
  const idx most = sizeof(S) == 2 ? 16 : ROWS;
  const idx widest = sizeof(S) == 2 ? 4 : PANELS;
#else
  const idx most = ROWS, widest = PANELS;
#endif
  const idx blocks = (B + most - 1) / most;
  const idx all = range.end - range.begin, groups = (all + widest - 1) / widest;
  for (idx g = 0; g < groups; g++) {  // of equal width: one panel alone takes almost as long as two
    const idx v = range.begin + all * g / groups, n = range.begin + all * (g + 1) / groups - v;
    const S* panels = matrix + v * K * LANES;
    const char* ahead = (const char*)(v + n < range.end ? panels + n * K * LANES : next);
    const idx lines = n > blocks ? 2 : 1;
#ifdef __AMX_BF16__
    if constexpr (sizeof(S) == 2) {
      auto f = n == 4 ? tile_amx<4> : n == 3 ? tile_amx<3> : n == 2 ? tile_amx<2> : tile_amx<1>;
      const idx height = (B + blocks - 1) / blocks;
      for (idx row = 0, i = 0; row < B; row += height, i++)
        f(dst + row * ldd + v * LANES, ldd, source + row * lds, lds, panels, K, add,
          ahead + i * lines * K * 32, i * lines < n ? lines : 0, B - row < height ? B - row : height);
      continue;
    }
#endif
    group(dst + v * LANES, ldd, Operand<S>{source, lds, Step<S>::K},
          Operand<S>{panels, K * LANES, Step<S>::K * LANES}, n, K, B, add, ahead,
          ahead + n * K * LANES * sizeof(S), lines);
  }
}

// -------------------------------------------------------------------------------------- packing

static inline V load_some(const float* p, idx count) {  // zeros from `count` on
  V v = {};
  if (count >= LANES) return load(p);
  if (count > 0) memcpy(&v, p, count * sizeof(float));
  return v;
}

static inline void transpose(V (&m)[LANES]) {  // swaps off-diagonal blocks of LANES / 2, ..., 2, 1
  VI lane = {};
  for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
  for (int s = LANES / 2; s; s /= 2) {
    const VI upper = (lane & s) ? lane + (int)LANES - s : lane;
    const VI lower = (lane & s) ? lane + (int)LANES : lane + s;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & s) continue;
      const V a = m[i], b = m[i + s];
      m[i] = __builtin_shuffle(a, b, upper);
      m[i + s] = __builtin_shuffle(a, b, lower);
    }
  }
}

static inline void put(float* panel, const V (&m)[LANES]) {
  for (int k = 0; k < LANES; k++) store(panel + k * LANES, m[k]);
}
static inline void put(bf16* panel, const V (&m)[LANES]) {
  for (int k = 0; k < LANES; k += 2)
    store((float*)panel + k / 2 * LANES, (V)(narrow(m[k]) | narrow(m[k + 1]) << 16));
}

// Packs a weight [parts * n, m] for source @ weight.T, each part's panels after the last one's, or
// transposed, for d @ weight, the parts' rows one after the other in each panel.
template <class S>
static void pack(S* dst, const float* w, idx n, idx np, idx m, idx mp, idx parts, idx transposed,
                 idx threads) {
  const idx panels = (transposed ? mp : np) / LANES, Kp = transposed ? np : mp;
  const idx stride = LANES * Kp * (transposed ? parts : 1);  // from panel to panel
  const idx part = LANES * Kp * (transposed ? 1 : panels);
#pragma omp parallel for collapse(2) num_threads((int)threads)
  for (idx g = 0; g < parts; g++)
    for (idx v = 0; v < panels; v++)
      for (idx k = 0; k < Kp; k += LANES) {  // LANES x LANES elements at row, column of the part
        const idx row = transposed ? k : v * LANES, column = transposed ? v * LANES : k;
        V block[LANES];
        for (int i = 0; i < LANES; i++)
          block[i] = load_some(w + (g * n + row + i) * m + column, row + i < n ? m - column : 0);
        if (!transposed) transpose(block);
        put(dst + g * part + v * stride + k * LANES, block);
      }
}
