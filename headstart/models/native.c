/* The parts of a layer that torch makes in many passes over memory, in one each: attention in blocks, gates, norms, turns.
 *
 * float32. Large products are the BLAS of torch, one of its threads each. Tasks are as many as the work has parts, and each
 * adds up in an order of its own, so what comes out doesn't depend on which thread took which. native.py calls these.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef int64_t whole;
typedef void gemm(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                  const int *, const float *, const int *, const float *, float *, const int *);

static gemm *sgemm;

void headstart_begin(gemm *found) { sgemm = found; }

/* Row by row: C [m, n] = alpha A [m, k] B [k, n] + beta C; with `a_turned` A lies as [k, m], with `b_turned` B as [n, k]. */
static void multiply(int a_turned, int b_turned, int m, int n, int k, float alpha, const float *a, int a_step,
                     const float *b, int b_step, float beta, float *c, int c_step) {
    sgemm(b_turned ? "T" : "N", a_turned ? "T" : "N", &n, &m, &k, &alpha, b, &b_step, a, &a_step, &beta, c, &c_step);
}

/* e^x for -87 < x < 88, to 2 units in the last place: x = n ln 2 + r, and a polynomial in r (Cephes, expf). */
static inline float exponential(float x) {
    const float n = __builtin_rintf(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

/* --- attention --- */

/* Queries [begin, end), `m` keys in `runs` runs from `first` on, and a mask [end - begin, high - low] or NULL. */
struct block {
    whole begin, end, m, first, runs, low, high;
    const float *mask;
};

/* Queries lie [T, H, d], keys and values [T, K, d], with so many numbers from token to token. */
struct attention {
    const float *q, *k, *v;
    whole q_step, k_step, heads, groups, width, count, threads;
    const struct block *blocks;
    const whole *runs;
    const uint8_t *kept; /* [K, H / K, n, m] of each block behind each other, or NULL */
    const whole *places; /* of each block in `kept`, counted for one head */
    float scale, share;  /* what scores are multiplied by, and kept weights */
};

/* What one task works on: a block, one group of heads that read the same keys. */
struct part {
    const struct attention *all;
    const struct block *block;
    whole group, n, lines; /* lines: queries of all heads of the group */
    const uint8_t *kept;
};

static struct part part_of(const struct attention *a, whole block, whole group) {
    const struct block *b = a->blocks + block;
    const whole n = b->end - b->begin, lines = n * (a->heads / a->groups);
    return (struct part){a, b, group, n, lines, a->kept ? a->kept + a->places[block] * a->heads + group * lines * b->m : NULL};
}

/* [n, G, d] of a group -> [G, n, d] in a row, and back. */
static void gather(const struct part *p, float *to, const float *from, whole step) {
    const whole d = p->all->width;
    from += p->block->begin * step + p->group * (p->lines / p->n) * d;
    for (whole line = 0; line < p->lines; line++)
        memcpy(to + line * d, from + line % p->n * step + line / p->n * d, d * sizeof(float));
}

static void scatter(const struct part *p, float *to, whole step, const float *from) {
    const whole d = p->all->width;
    to += p->block->begin * step + p->group * (p->lines / p->n) * d;
    for (whole line = 0; line < p->lines; line++)
        memcpy(to + line % p->n * step + line / p->n * d, from + line * d, d * sizeof(float));
}

/* out [lines, m] = scale rows [lines, d] of each key or value that the block sees, transposed. */
static void against(const struct part *p, float scale, const float *rows, const float *keys, float *out) {
    const struct attention *a = p->all;
    const whole *run = a->runs + 2 * p->block->first, d = a->width, m = p->block->m;
    for (whole r = 0; r < p->block->runs; r++, run += 2) {
        const whole count = run[1] - run[0];
        multiply(0, 1, p->lines, count, d, scale, rows, d, keys + run[0] * a->k_step + p->group * d, a->k_step, 0, out, m);
        out += count;
    }
}

/* out [lines, d] = weights [lines, m] of the keys or values. */
static void combine(const struct part *p, const float *weights, const float *values, float *out) {
    const struct attention *a = p->all;
    const whole *run = a->runs + 2 * p->block->first, d = a->width, m = p->block->m;
    for (whole r = 0; r < p->block->runs; r++, run += 2) {
        const whole count = run[1] - run[0];
        const float *from = values + run[0] * a->k_step + p->group * d;
        multiply(0, 0, p->lines, d, count, 1, weights, m, from, a->k_step, r > 0, out, d);
        weights += count;
    }
}

/* sums [T, d] += weights^T [m, lines] of rows [lines, d], where the keys lie. */
static void collect(const struct part *p, const float *weights, const float *rows, float *sums) {
    const whole *run = p->all->runs + 2 * p->block->first, d = p->all->width, m = p->block->m;
    for (whole r = 0; r < p->block->runs; r++, run += 2) {
        const whole count = run[1] - run[0];
        multiply(1, 0, count, d, p->lines, 1, weights, m, rows, d, 1, sums + run[0] * d, d);
        weights += count;
    }
}

static void softmax(float *restrict row, whole m) {
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (whole j = 0; j < m; j++) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : sum)
    for (whole j = 0; j < m; j++) {
        const float x = row[j] - most;
        row[j] = x < -87.0f ? 0.0f : exponential(x); /* what isn't a number stays so */
        sum += row[j];
    }
    const float inverse = 1 / sum;
    for (whole j = 0; j < m; j++) row[j] *= inverse;
}

static void drop(float *restrict row, const uint8_t *restrict kept, float share, whole m) {
    for (whole j = 0; j < m; j++) row[j] *= kept[j] * share;
}

/* The attention weights [lines, m], before dropout. */
static void weigh(const struct part *p, const float *queries, float *weights) {
    const struct block *b = p->block;
    const whole hidden = b->high - b->low;
    against(p, p->all->scale, queries, p->all->k, weights);
    for (whole line = 0; line < p->lines; line++) {
        float *restrict row = weights + line * b->m;
        if (b->mask) {
            const float *restrict mask = b->mask + line % p->n * hidden;
            for (whole j = 0; j < hidden; j++) row[b->low + j] += mask[j];
        }
        softmax(row, b->m);
    }
}

static void drop_all(const struct part *p, float *weights) {
    if (p->kept) drop(weights, p->kept, p->all->share, p->lines * p->block->m);
}

/* Floats that `weights` of a block take at most, and rows of heads, to the next whole 16. */
static void measure(const struct attention *a, whole *weights, whole *rows) {
    *weights = *rows = 0;
    for (whole i = 0; i < a->count; i++) {
        const struct part p = part_of(a, i, 0);
        const whole both[2] = {p.lines * p.block->m, p.lines * a->width};
        if (both[0] > *weights) *weights = both[0];
        if (both[1] > *rows) *rows = both[1];
    }
    *weights = (*weights + 15) / 16 * 16;
    *rows = (*rows + 15) / 16 * 16;
}

/* Floats that each thread works in, going forward or back. */
whole headstart_attend_room(const struct attention *a, int back) {
    whole weights, rows;
    measure(a, &weights, &rows);
    return back ? 2 * weights + 3 * rows : weights + 2 * rows;
}

/* output [T, H, d]; `room` for each thread */
void headstart_attend(const struct attention *a, float *output, whole output_step, float *room) {
    whole size, rows;
    measure(a, &size, &rows);
#pragma omp parallel num_threads(a->threads)
    {
        float *weights = room + omp_get_thread_num() * (size + 2 * rows);
        float *queries = weights + size, *attended = queries + rows;
#pragma omp for schedule(dynamic)
        for (whole task = a->count * a->groups - 1; task >= 0; task--) {
            const struct part p = part_of(a, task / a->groups, task % a->groups);
            gather(&p, queries, a->q, a->q_step);
            weigh(&p, queries, weights);
            drop_all(&p, weights);
            combine(&p, weights, a->v, attended);
            scatter(&p, output, output_step, attended);
        }
    }
}

/* The gradient of a block's queries, and those of the keys and values [T, d] that it sees, to which it is added. */
static void attend_back(const struct part *p, const float *wanted, whole wanted_step, float *d_q, whole d_q_step,
                        float *d_k, float *d_v, float *weights, float *slopes, float *queries, float *asked, float *turned) {
    const struct attention *a = p->all;
    const whole m = p->block->m;
    gather(p, queries, a->q, a->q_step);
    gather(p, asked, wanted, wanted_step);
    weigh(p, queries, weights);
    against(p, 1, asked, a->v, slopes);
    drop_all(p, slopes);
    for (whole line = 0; line < p->lines; line++) {
        float *restrict slope = slopes + line * m;
        const float *restrict weight = weights + line * m;
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (whole j = 0; j < m; j++) mean += slope[j] * weight[j];
        for (whole j = 0; j < m; j++) slope[j] = (slope[j] - mean) * weight[j] * a->scale;
    }
    drop_all(p, weights);
    collect(p, weights, asked, d_v);
    collect(p, slopes, queries, d_k);
    combine(p, slopes, a->k, turned);
    scatter(p, d_q, d_q_step, turned);
}

/* [begin, end) of the keys that some blocks see. */
static void span(const struct attention *a, whole from, whole to, whole *begin, whole *end) {
    *begin = *end = 0;
    for (whole i = from; i < to; i++) {
        const struct block *b = a->blocks + i;
        const whole first = a->runs[2 * b->first], last = a->runs[2 * (b->first + b->runs) - 1];
        *begin = i == from || first < *begin ? first : *begin;
        *end = last > *end ? last : *end;
    }
}

/* Gradients of q, k and v, given that of the output; those lie `d_step` apart from token to token, of q and of k and v.
 *
 * Blocks go in `parts`, from edges[i] to edges[i + 1], whose sums [parts, K, 2, T, d] are added up at the end.
 */
void headstart_attend_back(const struct attention *a, const float *wanted, whole wanted_step, float *d_q, float *d_k,
                           float *d_v, const whole *d_step, whole tokens, whole parts, const whole *edges, float *sums, float *room) {
    const whole d = a->width, groups = a->groups, each = tokens * d;
    whole size, rows;
    measure(a, &size, &rows);
#pragma omp parallel num_threads(a->threads)
    {
        float *weights = room + omp_get_thread_num() * (2 * size + 3 * rows);
        float *slopes = weights + size, *queries = slopes + size, *asked = queries + rows, *turned = asked + rows;
#pragma omp for schedule(dynamic)
        for (whole task = parts * groups - 1; task >= 0; task--) {
            const whole part = task / groups;
            float *keys = sums + 2 * task * each, *values = keys + each;
            whole begin, end;
            span(a, edges[part], edges[part + 1], &begin, &end);
            memset(keys + begin * d, 0, (end - begin) * d * sizeof(float));
            memset(values + begin * d, 0, (end - begin) * d * sizeof(float));
            for (whole i = edges[part]; i < edges[part + 1]; i++) {
                const struct part p = part_of(a, i, task % groups);
                attend_back(&p, wanted, wanted_step, d_q, d_step[0], keys, values, weights, slopes, queries, asked, turned);
            }
        }
#pragma omp for
        for (whole group = 0; group < 2 * groups; group++) {
            float *to = (group % 2 ? d_v : d_k) + group / 2 * d;
            for (whole t = 0; t < tokens; t++) memset(to + t * d_step[1], 0, d * sizeof(float));
            for (whole part = 0; part < parts; part++) {
                const float *from = sums + (2 * part * groups + group) * each;
                whole begin, end;
                span(a, edges[part], edges[part + 1], &begin, &end);
                for (whole t = begin; t < end; t++)
                    for (whole i = 0; i < d; i++) to[t * d_step[1] + i] += from[t * d + i];
            }
        }
    }
}

/* --- rows --- */

/* Turn n heads [T, n, d] in place by their positions: the first r with the next r. cos, sin [T, r]. */
void headstart_turn(float *heads, whole step, whole tokens, whole n, whole d, const float *cos, whole cos_step,
                    const float *sin, whole sin_step, whole r, whole threads) {
#pragma omp parallel for num_threads(threads)
    for (whole t = 0; t < tokens; t++) {
        const float *restrict c = cos + t * cos_step, *restrict s = sin + t * sin_step;
        for (whole head = 0; head < n; head++) {
            float *restrict first = heads + t * step + head * d, *restrict next = first + r;
            for (whole i = 0; i < r; i++) {
                const float x = first[i], y = next[i];
                first[i] = x * c[i] - y * s[i];
                next[i] = y * c[i] + x * s[i];
            }
        }
    }
}

static inline float sigmoid(float x) {
    const float share = 1 / (1 + exponential(x > 80.0f ? -80.0f : x < -80.0f ? 80.0f : -x));
    return x < -80.0f ? 0.0f : share;
}

/* out [T, F] = silu(gate) up, of gate and up [T, F] */
void headstart_gate(const float *gate, const float *up, whole step, float *out, whole tokens, whole width, whole threads) {
#pragma omp parallel for num_threads(threads)
    for (whole t = 0; t < tokens; t++) {
        const float *restrict g = gate + t * step, *restrict u = up + t * step;
        float *restrict o = out + t * width;
        for (whole i = 0; i < width; i++) o[i] = g[i] * sigmoid(g[i]) * u[i];
    }
}

/* Gradients of gate and up given that of `out`, in whose place `out` itself is written then. */
void headstart_gate_back(const float *gate, const float *up, whole step, float *d_out, float *d_gate, float *d_up,
                         whole d_step, whole tokens, whole width, whole threads) {
#pragma omp parallel for num_threads(threads)
    for (whole t = 0; t < tokens; t++) {
        const float *restrict g = gate + t * step, *restrict u = up + t * step;
        float *restrict d = d_out + t * width, *restrict dg = d_gate + t * d_step, *restrict du = d_up + t * d_step;
        for (whole i = 0; i < width; i++) {
            const float share = sigmoid(g[i]), active = g[i] * share;
            dg[i] = d[i] * u[i] * (share + active * (1 - share));
            du[i] = d[i] * active;
            d[i] = active * u[i];
        }
    }
}

/* out [T, D] = x / rms(x) * scale, and inverse [T] = 1 / rms(x); `inverse` is taken as it is where it is known. */
void headstart_norm(const float *x, whole step, const float *restrict scale, float eps, int known, float *inverse,
                    float *out, whole tokens, whole width, whole threads) {
#pragma omp parallel for num_threads(threads)
    for (whole t = 0; t < tokens; t++) {
        const float *restrict row = x + t * step;
        float *restrict o = out + t * width;
        if (!known) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (whole i = 0; i < width; i++) sum += row[i] * row[i];
            inverse[t] = 1 / sqrtf(sum / width + eps);
        }
        for (whole i = 0; i < width; i++) o[i] = row[i] * inverse[t] * scale[i];
    }
}

/* The gradient of x [T, D] in the place of that of the normed rows, plus `add` [T, D] or NULL. */
void headstart_norm_back(const float *x, whole step, const float *restrict scale, const float *inverse, float *gradient,
                         const float *add, whole add_step, whole tokens, whole width, whole threads) {
#pragma omp parallel for num_threads(threads)
    for (whole t = 0; t < tokens; t++) {
        const float *restrict row = x + t * step, r = inverse[t];
        float *restrict g = gradient + t * width, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (whole i = 0; i < width; i++) sum += g[i] * scale[i] * row[i];
        const float mean = sum / width * r * r * r;
        if (add) {
            const float *restrict more = add + t * add_step;
            for (whole i = 0; i < width; i++) g[i] = g[i] * scale[i] * r - row[i] * mean + more[i];
        } else {
            for (whole i = 0; i < width; i++) g[i] = g[i] * scale[i] * r - row[i] * mean;
        }
    }
}
