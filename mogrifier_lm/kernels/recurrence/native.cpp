// The LSTM recurrence with mogrification on a CPU: the two loops over time of native.py.
//
// Threads share the work in one of two ways. By streams: each thread runs its own rows of B through
// all steps and never waits. By columns: each owns a range of output features of every product, for
// all streams; each weight is then read once a step by one core, and what follows a product
// elementwise touches only the thread's own columns, but a barrier stands where a product needs all
// columns of its source. native.py chooses.
//
// Shape legend: T steps, B streams, I input size, H hidden size, k rank. Sizes I, H, k are padded
// to 16 (fp32) or 32 (bf16) with zeros, in tensors and in packed weights, so that no loop
// has a remainder; zeros stay zeros through every equation. S is the type of sources of products
// and of saved activations: float, or bf16 with everything else in float.

#include <omp.h>

#include <vector>

#include "product.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

// ---------------------------------------------------------------------------------- elementwise

static inline V sigmoid(V x) { return inverse(1.0f + exponential(-x)); }

// Cephes tanhf: a polynomial near 0, else through e^2x. (The rational function that Eigen and XLA
// use has one division in place of an exponential but four times the error.)
static inline V tanh_(V x) {
  V y = x * x;
  V p = -5.70498872745e-3f * y + 2.06390887954e-2f;
  p = p * y + -5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y + -3.33332819422e-1f;
  p = p * y * x + x;
  V far = 1.0f - 2.0f * inverse(1.0f + exponential(2.0f * x));
  return y < 0.390625f ? p : far;
}

// ------------------------------------------------------------------------------------ the loops

extern "C" {

// All sizes padded, all tensors contiguous. Sizes in brackets; slots = T, or 1 without a backward.
struct Round {
  idx k;                       // 0 at full rank
  const void *left, *right;    // packed for the loop that runs; at full rank the matrix is `left`
  const float* bias;           // [n] or null
  void *inner, *gates, *targets;   // [slots, B, k or n] of S
  void *d_inner, *d_gates;
};

struct Job {
  idx T, B, I, H, rounds, threads, slots, zigzag, cap, mask_step;  // mask_step 0: one for all t
  idx by_streams, rows, pre_width;  // rows: of B, those of this thread
  const float *x, *xw;         // [T, B, I]; or its product and bias, [T, B, 4H], where x is not gated
  const void* x_source;        // x in S, without zigzag
  const float *bias, *mask;    // [4H], [1 or T, B, H] or null
  const void *ih, *hh;         // packed
  const Round* round;
  float *h, *c, *pre;          // running [B, H], masked h and c; scratch [B, pre_width]
  float *xs;                   // scratch [B, I]
  float* output;               // [T, B, H]
  void *hs, *cs, *acts;        // [slots + 1, B, H], states that enter (h masked); [slots, B, 4H]
  const float* d_output;       // [T, B, H]
  float *d_h, *d_c, *d_x;      // running [B, H]; [T, B, I]
  float *d_h0, *d_x0;          // scratch [B, H], [B, I] without zigzag
  void* d_acts;                // [T, B, 4H]
};
}

struct Team {
  idx rank, size;
  Range columns(idx n) const {
    idx panels = n / LANES;
    return {panels * rank / size, panels * (rank + 1) / size};
  }
  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

template <class F> static inline void each(idx B, idx ld, Range r, F f) {  // f(offset, column)
  for (idx b = 0; b < B; b++)
    for (idx v = r.begin; v < r.end; v++) f(b * ld + v * LANES, v * LANES);
}

static inline const float* mask_at(const Job& j, idx t) {
  return j.mask ? j.mask + (t < j.T ? t : j.T - 1) * j.mask_step * j.B * j.H : nullptr;
}

template <class S> static void forward_loop(const Job& j, Team team) {
  const idx B = j.B, R = j.rows, I = j.I, H = j.H;
  const Range own_x = team.columns(I), own_h = team.columns(H);
  const S* first = (const S*)(j.rounds == 0 ? j.hh : j.round[0].k ? j.round[0].right : j.round[0].left);
  for (idx t = 0; t < j.T; t++) {
    const idx a = j.slots > 1 ? t : 0;
    const idx enters = j.slots > 1 ? t : t % 2, leaves = j.slots > 1 ? t + 1 : (t + 1) % 2;
    const S* h0 = (S*)j.hs + enters * B * H;
    const S *h = h0, *x = (const S*)j.x_source + t * B * I, *x0 = x;
    const float* x_prev = j.x + t * B * I;
    for (idx i = 0; i < j.rounds; i++) {
      const Round& r = j.round[i];
      const bool odd = i % 2;
      const idx n = odd ? H : I, m = odd ? I : H;
      const S* source = odd ? (j.zigzag ? x : x0) : (j.zigzag ? h : h0);
      idx K = m;
      if (r.k) {
        const Range own = team.columns(r.k);
        S* z = (S*)r.inner + a * B * r.k;
        product(j.pre, r.k, source, m, (const S*)r.right, m, R, own, false, (const S*)r.left);
        each(R, r.k, own, [&](idx p, idx) { store(z + p, load(j.pre + p)); });
        team.barrier();
        source = z, K = r.k;
      }
      const Range own = odd ? own_h : own_x;
      const Round* later = i + 1 < j.rounds ? &r + 1 : nullptr;
      const void* next = later ? (later->k ? later->right : later->left) : j.ih;
      float* pre = j.pre;
      product(pre, n, source, K, (const S*)r.left, K, R, own, false, (const S*)next);
      S *gates = (S*)r.gates + a * B * n, *targets = (S*)r.targets + a * B * n;
      const float* prev = odd ? j.h : x_prev;
      float* now = odd ? j.h : j.xs;
      each(R, n, own, [&](idx p, idx col) {
        V pre_p = load(pre + p);
        V gate = 2.0f * sigmoid(r.bias ? pre_p + load(r.bias + col) : pre_p);
        V target = gate * load(prev + p);
        store(gates + p, gate);
        store(now + p, target);
        store(targets + p, target);
      });
      if (odd) h = targets; else x = targets, x_prev = j.xs;
      team.barrier();
    }
    for (int g = 0; g < 4; g++) {
      float* pre = j.pre + g * H;
      const S *ih = (const S*)j.ih + g * H * I, *hh = (const S*)j.hh + g * H * H;
      if (!j.xw) product(pre, 4 * H, x, I, ih, I, R, own_h, false, hh);
      product(pre, 4 * H, h, H, hh, H, R, own_h, !j.xw, g == 3 ? first : j.xw ? hh + H * H : ih + H * I);
    }
    S *acts = (S*)j.acts + a * B * 4 * H, *cs = (S*)j.cs + leaves * B * H;
    S* hs = (S*)j.hs + leaves * B * H;
    float* output = j.output + t * B * H;
    const float *mask = mask_at(j, t + 1), *xw = j.xw + t * B * 4 * H;
    for (idx b = 0; b < R; b++)
      for (idx v = own_h.begin; v < own_h.end; v++) {
        const idx col = v * LANES, p = b * H + col;
        V pre[4];
        for (int g = 0; g < 4; g++) {
          const idx q = b * 4 * H + g * H + col;
          pre[g] = load(j.pre + q);
          if (j.xw) pre[g] += load(xw + q);
          else if (j.bias) pre[g] += load(j.bias + g * H + col);
        }
        V i = sigmoid(pre[0]), f = sigmoid(pre[1]), u = tanh_(pre[2]), o = sigmoid(pre[3]);
        V act[4] = {i, f, u, o};
        for (int g = 0; g < 4; g++) store(acts + b * 4 * H + g * H + col, act[g]);
        V capped = j.cap ? (i > 1.0f - f ? 1.0f - f : i) : i;
        V c = f * load(j.c + p) + capped * u;
        V h_out = o * tanh_(c);
        store(j.c + p, c);
        store(cs + p, c);
        store(output + p, h_out);
        V h_in = mask ? h_out * load(mask + p) : h_out;
        store(j.h + p, h_in);
        store(hs + p, h_in);
      }
    team.barrier();
  }
}

template <class S> static void backward_loop(const Job& j, Team team) {
  const idx B = j.B, R = j.rows, I = j.I, H = j.H;
  const Range own_x = team.columns(I), own_h = team.columns(H);
  const bool hoisted = j.rounds == 0;
  for (idx t = j.T - 1; t >= 0; t--) {
    const S *acts = (S*)j.acts + t * B * 4 * H, *cs = (S*)j.cs + t * B * H;
    S* d_acts = (S*)j.d_acts + t * B * 4 * H;
    const float *d_output = j.d_output + t * B * H, *mask = mask_at(j, t);
    float* d_x = j.d_x + t * B * I;
    for (idx b = 0; b < R; b++)
      for (idx v = own_h.begin; v < own_h.end; v++) {
        const idx p = b * H + v * LANES, q = b * 4 * H + v * LANES;
        V i = load(acts + q), f = load(acts + q + H), u = load(acts + q + 2 * H);
        V o = load(acts + q + 3 * H), c_prev = load(cs + p), tc = tanh_(load(cs + B * H + p));
        V dh = load(j.d_h + p) + load(d_output + p);
        V dc = load(j.d_c + p) + dh * o * (1.0f - tc * tc);
        V share = {}, capped = i;
        share += 1.0f;
        if (j.cap) {  // half of the gradient to each at ties, as torch.minimum's
          V rest = 1.0f - f, zero = {};
          share = i < rest ? share : (i == rest ? share * 0.5f : zero);
          capped = i < rest ? i : rest;
        }
        store(d_acts + q, dc * u * share * i * (1.0f - i));
        store(d_acts + q + H, dc * (c_prev - (1.0f - share) * u) * f * (1.0f - f));
        store(d_acts + q + 2 * H, dc * capped * (1.0f - u * u));
        store(d_acts + q + 3 * H, dh * tc * o * (1.0f - o));
        store(j.d_c + p, dc * f);
      }
    team.barrier();
    const Round* last = hoisted ? nullptr : j.round + j.rounds - 1;
    const S* after = (const S*)(last ? last->left : j.hh);
    if (!hoisted)
      product(d_x, I, d_acts, 4 * H, (const S*)j.ih, 4 * H, R, own_x, false, (const S*)j.hh);
    product(j.d_h, H, d_acts, 4 * H, (const S*)j.hh, 4 * H, R, own_h, false, after);
    float *d_h0 = j.zigzag ? j.d_h : j.d_h0, *d_x0 = j.zigzag ? d_x : j.d_x0;
    if (!j.zigzag) {
      each(R, H, own_h, [&](idx p, idx) { store(d_h0 + p, V{}); });
      each(R, I, own_x, [&](idx p, idx) { store(d_x0 + p, V{}); });
    }
    for (idx i = j.rounds - 1; i >= 0; i--) {
      const Round& r = j.round[i];
      const bool odd = i % 2;
      const idx n = odd ? H : I, m = odd ? I : H;
      const Range own = odd ? own_h : own_x, own_source = odd ? own_x : own_h;
      const S *gates = (S*)r.gates + t * B * n, *targets = (S*)r.targets + t * B * n;
      S* d_gates = (S*)r.d_gates + t * B * n;
      float *d_target = odd ? j.d_h : d_x, *d_source = odd ? d_x0 : d_h0;
      each(R, n, own, [&](idx p, idx) {
        V gate = load(gates + p), d = load(d_target + p);
        store(d_gates + p, d * load(targets + p) * (1.0f - 0.5f * gate));
        store(d_target + p, d * gate);
      });
      team.barrier();
      const S* d = d_gates;
      const S* next = (const S*)(i ? (&r - 1)->left : j.ih);
      if (r.k) {
        const Range own_k = team.columns(r.k);
        S* d_z = (S*)r.d_inner + t * B * r.k;
        product(j.pre, r.k, d, n, (const S*)r.left, n, R, own_k, false, (const S*)r.right);
        each(R, r.k, own_k, [&](idx p, idx) { store(d_z + p, load(j.pre + p)); });
        team.barrier();
        product(d_source, m, d_z, r.k, (const S*)r.right, r.k, R, own_source, true, next);
      } else {
        product(d_source, m, d, n, (const S*)r.left, n, R, own_source, true, next);
      }
    }
    each(R, H, own_h, [&](idx p, idx) {
      V d = load(j.d_h + p);
      if (!j.zigzag) d += load(d_h0 + p);
      store(j.d_h + p, mask ? d * load(mask + p) : d);
    });
    if (!j.zigzag) each(R, I, own_x, [&](idx p, idx) { store(d_x + p, load(d_x + p) + load(d_x0 + p)); });
  }
}

// The job of `rows` streams from `row` on: every pointer to [.., B, n] moved, `rounds` to fill.
template <class S> static Job part(Job j, idx row, idx rows, Round* rounds) {
  auto move = [row](auto*& p, idx n) { if (p) p += row * n; };
  auto move_void = [row](auto*& p, idx n) { if (p) p = (S*)p + row * n; };
  j.rows = rows;
  move(j.x, j.I), move(j.xw, 4 * j.H), move(j.mask, j.H), move(j.output, j.H);
  move(j.h, j.H), move(j.c, j.H), move(j.pre, j.pre_width), move(j.xs, j.I);
  move(j.d_output, j.H), move(j.d_h, j.H), move(j.d_c, j.H), move(j.d_x, j.I);
  move(j.d_h0, j.H), move(j.d_x0, j.I);
  move_void(j.x_source, j.I), move_void(j.hs, j.H), move_void(j.cs, j.H);
  move_void(j.acts, 4 * j.H), move_void(j.d_acts, 4 * j.H);
  for (idx i = 0; i < j.rounds; i++) {
    Round& r = rounds[i] = j.round[i];
    const idx n = i % 2 ? j.H : j.I;
    move_void(r.inner, r.k), move_void(r.d_inner, r.k);
    move_void(r.gates, n), move_void(r.d_gates, n), move_void(r.targets, n);
  }
  j.round = rounds;
  return j;
}

template <class S> static void run(const Job& j, void (*loop)(const Job&, Team)) {
#pragma omp parallel num_threads((int)j.threads)
  {
    const idx thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const idx row = j.by_streams ? j.B * thread / threads : 0;
    const idx rows = j.by_streams ? j.B * (thread + 1) / threads - row : j.B;
    std::vector<Round> rounds(j.rounds);
    const Job own = part<S>(j, row, rows, rounds.data());
#ifdef __AMX_BF16__
    if (sizeof(S) == 2) {
      const idx blocks = (rows + 15) / 16;
      configure_tiles((rows + blocks - 1) / blocks);
    }
#endif
    loop(own, j.by_streams ? Team{0, 1} : Team{thread, threads});
#ifdef __AMX_BF16__
    if (sizeof(S) == 2) _tile_release();
#endif
  }
}

extern "C" {

// Of what native.py describes a second time, to be compared with its own.
idx size_of(idx i) { return i == 0 ? sizeof(Job) : sizeof(Round); }

// 0, or 1 where the operating system refuses AMX tiles.
int prepare() {
#ifdef __AMX_BF16__
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0;
#else
  return 0;
#endif
}

void forward_fp32(const Job* j) { run<float>(*j, forward_loop<float>); }
void forward_bf16(const Job* j) { run<bf16>(*j, forward_loop<bf16>); }
void backward_fp32(const Job* j) { run<float>(*j, backward_loop<float>); }
void backward_bf16(const Job* j) { run<bf16>(*j, backward_loop<bf16>); }

// A weight's gradient [n, m], m whole vectors: d [rows, n]^T @ source [rows, m], rows ldd, lds apart.
void gradient_fp32(float* dst, const float* d, const float* source, idx ldd, idx lds, idx n, idx m,
                   idx rows, idx threads) {
#pragma omp parallel for num_threads((int)threads)
  for (idx t = 0; t < threads; t++) {
    const idx first = n * t / threads, count = n * (t + 1) / threads - first;
    idx k = 0;
    do {  // so many rows of d stay in the second-level cache
      product<float>(dst + first * m, m, {d + k * ldd + first, 1, ldd},
                     {source + k * lds, LANES, lds}, m / LANES, rows - k < DEPTH ? rows - k : DEPTH,
                     count, k > 0);
    } while ((k += DEPTH) < rows);
  }
}

void pack_fp32(float* dst, const float* w, idx n, idx np, idx m, idx mp, idx parts, idx transposed,
               idx threads) {
  pack(dst, w, n, np, m, mp, parts, transposed, threads);
}
void pack_bf16(bf16* dst, const float* w, idx n, idx np, idx m, idx mp, idx parts, idx transposed,
               idx threads) {
  pack(dst, w, n, np, m, mp, parts, transposed, threads);
}
}
