/* The parts of a layer that torch makes in many passes over memory, in one each: attention in blocks, gates, norms, turns;
 * products with weights that a cache holds much of, and what adapters add to them; and a whole layer, made of these.
 *
 * float32. Tasks are as many as the work has parts, and each adds up in an order of its own, so what comes out doesn't depend
 * on which thread took which. native.py calls these.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef int64_t whole;

/* --- products --- */

/* Numbers that a register holds, and rows of a tile of C, whose two columns of registers are added up in as many as there are. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 14 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 6 };
#else
enum { LANES = 4, ROWS = 6 };
#endif
enum { PANEL = 2 * LANES, PANELS = 5, DEPTH = 1024 }; /* columns of a tile; of B, what is laid out at once for a thread's cache */
enum { TILES = 8, SHALLOW = 256 };                    /* of A, if its columns are what lies without gaps */
enum { MORE = LANES < 16 }; /* groups of panels for a thread than its cache asks for: small ones keep no thread waiting for a slower one */

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t numbers __attribute__((vector_size(4 * LANES)));

static inline whole padded(whole n) { return (n + LANES - 1) / LANES * LANES; }

/* C = base + A [m, k] B [k, n], row by row. A's numbers lie `a_row` and `a_k` apart; `base` may be C, or NULL for zero. */
struct product {
    whole k;
    const float *a;
    whole a_row, a_k;
    const float *b;
    whole b_step;
    const float *base;
    whole base_step;
    float *c;
    whole c_step;
    const float *ahead; /* what is needed soon: two lines of the cache for each of the k rows of B */
    whole ahead_step;
};

static inline __attribute__((always_inline)) void tile(const int rows, const int columns, const struct product *p) {
    const float *restrict a = p->a, *restrict b = p->b, *ahead = p->ahead;
    const whole a_row = p->a_row, a_k = p->a_k, b_step = p->b_step, ahead_step = p->ahead_step;
    vector sums[ROWS][2] = {0};
    for (whole k = p->k; k > 0; k--, a += a_k, b += b_step, ahead += ahead_step) {
        const vector first = *(const vector *)b, second = columns > 1 ? *(const vector *)(b + LANES) : first;
        if (LANES == 16) { /* where a step takes 14 cycles of multiplying; where it takes 6, this costs more than it saves */
            __builtin_prefetch(ahead, 0, 2);
            __builtin_prefetch(ahead + 16, 0, 2);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const float x = a[r * a_row];
            sums[r][0] += x * first;
            if (columns > 1) sums[r][1] += x * second;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < columns; i++) {
            if (p->base) sums[r][i] += *(const vector *)(p->base + r * p->base_step + i * LANES);
            *(vector *)(p->c + r * p->c_step + i * LANES) = sums[r][i];
        }
}

/* So many rows, in one column of registers or in two. */
static void multiply_tile(whole rows, whole columns, const struct product *p) {
    switch (2 * rows + columns) {
#define TILES(rows) \
    case 2 * rows + 1: tile(rows, 1, p); break; \
    case 2 * rows + 2: tile(rows, 2, p); break;
        TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
#if defined(__AVX512F__)
        TILES(7) TILES(8) TILES(9) TILES(10) TILES(11) TILES(12) TILES(13) TILES(14)
#endif
    }
}

/* C = A B, or added to it; n is a multiple of LANES. */
static void multiply(whole m, whole n, whole k, const float *a, whole a_row, whole a_k, const float *b, whole b_step, int added,
                     float *c, whole c_step) {
    const whole tiles = (m + ROWS - 1) / ROWS;
    for (whole j = 0; j < n; j += PANEL)
        for (whole t = 0; t < tiles; t++) {
            const whole i = t * m / tiles;
            float *to = c + i * c_step + j;
            const struct product p = {k, a + i * a_row, a_row, a_k, b + j, b_step, added ? to : NULL, c_step, to, c_step, a, 0};
            multiply_tile((t + 1) * m / tiles - i, n - j > LANES ? 2 : 1, &p);
        }
}

/* Turn a square of LANES registers: for each bit of the place, what has it in one number only changes sides. */
static inline __attribute__((always_inline)) void turn_square(vector *rows) {
    numbers place;
    for (int i = 0; i < LANES; i++) place[i] = i;
#pragma GCC unroll 4
    for (int bit = LANES / 2; bit > 0; bit /= 2) {
        const numbers low = place + (((place & bit) != 0) & (LANES - bit)), high = low + bit;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & bit)) {
                const vector first = rows[i], second = rows[i + bit];
                rows[i] = __builtin_shuffle(first, second, low);
                rows[i + bit] = __builtin_shuffle(first, second, high);
            }
    }
}

/* to [n, m] = from [m, n] times a number, in squares, or that is `added`; m and n are multiples of LANES */
static inline __attribute__((always_inline)) void turn_rows(float *to, whole to_step, const float *from, whole from_step, whole m,
                                                            whole n, float times, int added) {
    for (whole j = 0; j < n; j += LANES)
        for (whole i = 0; i < m; i += LANES) {
            vector rows[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) rows[r] = *(const vector *)(from + (i + r) * from_step + j);
            turn_square(rows);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                vector *place = (vector *)(to + (j + r) * to_step + i);
                *place = added ? *place + rows[r] * times : rows[r] * times;
            }
        }
}

/* to [k, PANEL] = b [k, PANEL], whose rows lie `step` apart, or with `turned` its columns */
static void lay_panel(float *to, const float *b, whole step, int turned, whole k) {
    if (turned)
        turn_rows(to, PANEL, b, step, PANEL, k, 1, 0);
    else
        for (whole i = 0; i < k; i++, to += PANEL, b += step) memcpy(to, b, PANEL * sizeof(float));
}

/* Columns that `headstart_multiply` takes at a time, 0 where it is no faster than a BLAS. */
int headstart_multiply_columns(void) { return LANES > 4 ? PANEL : 0; }

/* Of B, panel behind panel; of A, tile behind tile. */
static _Thread_local float laid[PANELS * DEPTH * PANEL] __attribute__((aligned(64)));
static _Thread_local float laid_tiles[TILES * ROWS * SHALLOW] __attribute__((aligned(64)));

/* Lay out the next tiles of A [m, k] from tile `t` on, each [k, rows]; A's columns lie `step` apart. */
static void lay_tiles(const float *a, whole step, whole t, whole m, whole k) {
    const whole tiles = (m + ROWS - 1) / ROWS, end = t + TILES < tiles ? t + TILES : tiles;
    for (float *to = laid_tiles; t < end; t++, to += ROWS * k) {
        const whole i = t * m / tiles, rows = (t + 1) * m / tiles - i;
        for (whole column = 0; column < k; column++) {
            const float *from = a + column * step + i;
            if (rows == ROWS)
                memcpy(to + column * ROWS, from, ROWS * sizeof(float));
            else
                for (whole r = 0; r < rows; r++) to[column * rows + r] = from[r];
        }
    }
}

/* C [m, n] = base + A [m, k] B [k, n]; with `turned` B lies as [n, k]. n is a multiple of PANEL, and k of LANES if B is turned.
 *
 * A's numbers lie `a_row` and `a_k` apart, one of which is 1. A thread takes a group of columns at a time. It lays out as many of B as its
 * cache holds, of A what lies by columns, and fetches ahead, where that pays, what it lays out or reads of A next.
 */
void headstart_multiply(const float *a, whole a_row, whole a_k, const float *b, whole b_step, int turned, const float *base,
                        whole base_step, float *c, whole c_step, whole m, whole n, whole k, whole threads) {
    const int by_rows = a_k == 1;
    const whole deepest = by_rows ? DEPTH : SHALLOW, fit = PANELS * DEPTH / deepest;
    const whole panels = n / PANEL, tiles = (m + ROWS - 1) / ROWS, each = (panels + threads - 1) / threads;
    const whole groups = ((each + fit - 1) / fit + MORE) * threads, across = turned ? PANEL * b_step : PANEL;
    const whole steps = (k + deepest - 1) / deepest, most = padded((k + steps - 1) / steps); /* about as many in each */
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (whole g = 0; g < groups; g++) {
        const whole begin = g * panels / groups, end = (g + 1) * panels / groups;
        for (whole from = 0; from < k; from += most) {
            const whole depth = k - from < most ? k - from : most;
            const float *source = b + from * (turned ? 1 : b_step), *add = from ? c : base;
            const whole add_step = from ? c_step : base_step;
            for (whole t = 0; t < tiles; t++) {
                const whole i = t * m / tiles, rows = (t + 1) * m / tiles - i;
                const float *at = a + i * a_row + from * a_k;
                const float *tile = by_rows ? at : laid_tiles + t % TILES * ROWS * depth;
                if (!by_rows && t % TILES == 0) lay_tiles(a + from * a_k, a_k, t, m, depth);
                for (whole j = begin; j < end; j++) {
                    float *panel = laid + (j - begin) * depth * PANEL;
                    const float *place = add ? add + i * add_step + j * PANEL : NULL;
                    struct product p = {.k = depth, .a = tile, .a_row = by_rows ? a_row : 1, .a_k = by_rows ? 1 : rows,
                                        .b = panel, .b_step = PANEL, .base = place, .base_step = add_step,
                                        .c = c + i * c_step + j * PANEL, .c_step = c_step, .ahead = at};
                    if (t == 0) {
                        lay_panel(panel, source + j * across, b_step, turned, depth);
                        if (j + 1 < end) p.ahead = source + (j + 1) * across, p.ahead_step = turned ? PANEL : b_step;
                    } else if (j == begin)
                        p.ahead = at + rows * a_row, p.ahead_step = 16;
                    multiply_tile(rows, 2, &p);
                }
            }
        }
    }
}

/* --- adapters --- */

/* What an adapter adds to outputs [column, column + width) of a linear layer: `scale` B (A x), of A [rank, D] and B [width, rank].
 *
 * Its ranks begin at `first` of those of all adapters of the layer, which are `ranks`. `d_a` and `d_b` are gradients, or NULL; what is
 * `fresh` is written, else it is added to. Width, rank and D are multiples of LANES.
 */
struct adapter {
    const float *a, *b;
    float *d_a, *d_b;
    whole column, width, first, rank;
    int fresh_a, fresh_b;
    float scale;
};

/* Adapters that read the same x [T, D], with at most so wide outputs. */
struct adapters {
    const struct adapter *all;
    whole count, depth, ranks, widest;
};

/* Tokens that a thread takes at a time; those whose products are added up at a time, of so many columns. */
enum { TOKENS = 4 * ROWS, SUMMED = 64, COLUMNS = 2 * PANEL };

/* Floats that the three below work in. */
whole headstart_adapt_room(const struct adapters *f) { return f->ranks * (f->depth + f->widest); }

/* output [T, N] += `times` what adapters make of x [T, D]; narrow [T, R] = A x of all of them */
void headstart_adapt(const struct adapters *f, const float *x, whole x_step, float *output, whole step, float times, float *narrow,
                     whole tokens, float *room, whole threads) {
    const whole R = f->ranks, parts = (tokens + TOKENS - 1) / TOKENS;
    float *a = room, *b = room + R * f->depth; /* turned: [D, R], and [rank, width] of each */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (whole i = 0; i < 2 * f->count; i++) {
            const struct adapter *one = f->all + i / 2;
            if (i % 2)
                turn_rows(b + one->first * f->widest, one->width, one->b, one->rank, one->width, one->rank, one->scale * times, 0);
            else
                turn_rows(a + one->first, R, one->a, f->depth, one->rank, f->depth, 1, 0);
        }
#pragma omp for schedule(dynamic)
        for (whole part = 0; part < parts; part++) {
            const whole begin = part * tokens / parts, rows = (part + 1) * tokens / parts - begin;
            float *made = narrow + begin * R, *to = output + begin * step;
            multiply(rows, R, f->depth, x + begin * x_step, x_step, 1, a, R, 0, made, R);
            for (const struct adapter *one = f->all; one < f->all + f->count; one++) {
                const float *wide = b + one->first * f->widest;
                multiply(rows, one->width, one->rank, made + one->first, R, 1, wide, one->width, 1, to + one->column, step);
            }
        }
    }
}

/* back [T, R] = the outputs' gradient [T, N] behind each B, times its scale; d_x [T, D], or NULL, += that behind A */
void headstart_adapt_back(const struct adapters *f, const float *gradient, whole step, float *back, float *d_x, whole d_step,
                          whole tokens, float *room, whole threads) {
    const whole R = f->ranks, parts = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (whole i = 0; i < f->count; i++)
            memcpy(room + f->all[i].first * f->depth, f->all[i].a, f->all[i].rank * f->depth * sizeof(float));
#pragma omp for schedule(dynamic)
        for (whole part = 0; part < parts; part++) {
            const whole begin = part * tokens / parts, rows = (part + 1) * tokens / parts - begin;
            for (const struct adapter *one = f->all; one < f->all + f->count; one++) {
                float *made = back + begin * R + one->first;
                multiply(rows, one->rank, one->width, gradient + begin * step + one->column, step, 1, one->b, one->rank, 0, made, R);
                for (whole t = 0; t < rows; t++)
                    for (whole r = 0; r < one->rank; r++) made[t * R + r] *= one->scale;
            }
            if (d_x) multiply(rows, f->depth, R, back + begin * R, R, 1, room, f->depth, 1, d_x + begin * d_step, d_step);
        }
    }
}

/* sums [rank, n] = left [T, rank], turned, times rows [T, n], or that is `added` */
static void sum_up(whole rank, whole n, whole tokens, const float *left, whole left_step, const float *rows, whole step, int added,
                   float *sums, whole sums_step) {
    for (whole t = 0; t < tokens; t += SUMMED) {
        const whole depth = tokens - t < SUMMED ? tokens - t : SUMMED;
        multiply(rank, n, depth, left + t * left_step, 1, left_step, rows + t * step, step, added || t, sums, sums_step);
    }
}

/* The gradients of A and B, given that of the outputs [T, N], x [T, D], and what the two above made. */
void headstart_adapt_sum(const struct adapters *f, const float *gradient, whole step, const float *x, whole x_step, const float *narrow,
                         const float *back, whole tokens, float *room, whole threads) {
    const whole R = f->ranks, of_a = (f->depth + COLUMNS - 1) / COLUMNS, of_b = (f->widest + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (whole piece = 0; piece < of_a + f->count * of_b; piece++) {
        if (piece < of_a) {
            const whole from = piece * COLUMNS, n = f->depth - from < COLUMNS ? f->depth - from : COLUMNS;
            for (const struct adapter *one = f->all; one < f->all + f->count; one++) {
                const float *left = back + one->first;
                if (one->d_a) sum_up(one->rank, n, tokens, left, R, x + from, x_step, !one->fresh_a, one->d_a + from, f->depth);
            }
            continue;
        }
        const struct adapter *one = f->all + (piece - of_a) / of_b;
        const whole from = (piece - of_a) % of_b * COLUMNS, left = one->width - from, n = left < COLUMNS ? left : COLUMNS;
        if (n <= 0 || !one->d_b) continue;
        float *sums = room + one->first * f->widest + from;
        sum_up(one->rank, n, tokens, narrow + one->first, R, gradient + one->column + from, step, 0, sums, f->widest);
        turn_rows(one->d_b + from * one->rank, one->rank, sums, f->widest, one->rank, n, one->scale, !one->fresh_b);
    }
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

/* Queries [begin, end), `m` keys in `runs` runs from `first` on, and a mask [high - low, end - begin] or NULL. */
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

/* What one task works on: a block, one group of heads that read the same keys. Weights lie [m, L], a column for each line. */
struct part {
    const struct attention *all;
    const struct block *block;
    whole group, n, m, lines, L, D; /* lines: queries of all heads of the group; L, D: lines and width, padded */
    const uint8_t *kept;
};

static struct part part_of(const struct attention *a, whole block, whole group) {
    const struct block *b = a->blocks + block;
    const whole n = b->end - b->begin, lines = n * (a->heads / a->groups);
    const uint8_t *kept = a->kept ? a->kept + a->places[block] * a->heads + group * lines * b->m : NULL;
    return (struct part){a, b, group, n, b->m, lines, padded(lines), padded(a->width), kept};
}

/* What a thread works in: weights and their gradients [m, L], rows [m, D] and [lines, D], columns [d, L], a number a line [L]. */
struct room {
    float *weights, *slopes, *keys, *values, *queries, *asked, *columns, *most, *inverse, *mean;
};

/* Lay out a room that holds every block; return how many floats it takes. `at` may be NULL to learn only this. */
static whole lay_out(const struct attention *a, float *at, struct room *room) {
    whole scores = 0, m = 0, lines = 0;
    for (whole i = 0; i < a->count; i++) {
        const struct part p = part_of(a, i, 0);
        scores = p.m * p.L > scores ? p.m * p.L : scores;
        m = p.m > m ? p.m : m;
        lines = p.L > lines ? p.L : lines;
    }
    const whole D = padded(a->width), sizes[] = {scores, scores, m * D, m * D, lines * D, lines * D, lines * D, lines, lines, lines};
    float **places[] = {&room->weights, &room->slopes,  &room->keys, &room->values,  &room->queries,
                        &room->asked,   &room->columns, &room->most, &room->inverse, &room->mean};
    whole size = 0;
    for (int i = 0; i < 10; size += sizes[i++]) *places[i] = at ? at + size : NULL;
    return (size + 15) / 16 * 16;
}

/* [n, G, d] of a group -> [G n, D] */
static void gather(const struct part *p, float *to, const float *from, whole step) {
    const whole d = p->all->width;
    from += p->block->begin * step + p->group * (p->lines / p->n) * d;
    for (whole line = 0; line < p->lines; line++, to += p->D) {
        memcpy(to, from + line % p->n * step + line / p->n * d, d * sizeof(float));
        memset(to + d, 0, (p->D - d) * sizeof(float));
    }
}

/* [G n, D] -> [n, G, d], each row times a number of its own */
static void scatter(const struct part *p, float *to, whole step, const float *restrict from, const float *restrict times) {
    const whole d = p->all->width;
    to += p->block->begin * step + p->group * (p->lines / p->n) * d;
    for (whole line = 0; line < p->lines; line++, from += p->D) {
        float *restrict row = to + line % p->n * step + line / p->n * d;
        for (whole i = 0; i < d; i++) row[i] = from[i] * (times ? times[line] : 1);
    }
}

/* [lines, D] -> [d, L], times a number */
static void turn(const struct part *p, float *restrict to, const float *restrict rows, float times) {
    for (whole i = 0; i < p->all->width; i++) {
        for (whole line = 0; line < p->lines; line++) to[i * p->L + line] = rows[line * p->D + i] * times;
        for (whole line = p->lines; line < p->L; line++) to[i * p->L + line] = 0;
    }
}

/* The keys or values that a block sees, [m, D] */
static void pick(const struct part *p, float *to, const float *from) {
    const struct attention *a = p->all;
    const whole *run = a->runs + 2 * p->block->first;
    for (whole r = 0; r < p->block->runs; r++, run += 2)
        for (whole t = run[0]; t < run[1]; t++, to += p->D) {
            memcpy(to, from + t * a->k_step + p->group * a->width, a->width * sizeof(float));
            memset(to + a->width, 0, (p->D - a->width) * sizeof(float));
        }
}

/* sums [T, D] += weights [m, L] of rows [lines, D], where the keys lie. */
static void collect(const struct part *p, const float *weights, const float *rows, float *sums) {
    const whole *run = p->all->runs + 2 * p->block->first;
    for (whole r = 0; r < p->block->runs; r++, run += 2) {
        multiply(run[1] - run[0], p->D, p->lines, weights, p->L, 1, rows, p->D, 1, sums + run[0] * p->D, p->D);
        weights += (run[1] - run[0]) * p->L;
    }
}

/* Scores [m, L] -> e^(scores - the most of a line), and 1 / the sum of a line. */
static void softmax(whole m, whole L, float *restrict scores, float *restrict most, float *restrict inverse) {
    for (whole line = 0; line < L; line++) most[line] = -INFINITY, inverse[line] = 0;
    for (whole j = 0; j < m; j++) {
        const float *restrict row = scores + j * L;
        for (whole line = 0; line < L; line++) most[line] = row[line] > most[line] ? row[line] : most[line];
    }
    for (whole j = 0; j < m; j++) {
        float *restrict row = scores + j * L;
        for (whole line = 0; line < L; line++) {
            const float x = row[line] - most[line];
            row[line] = x < -87.0f ? 0.0f : exponential(x); /* what isn't a number stays so */
            inverse[line] += row[line];
        }
    }
    for (whole line = 0; line < L; line++) inverse[line] = 1 / inverse[line];
}

/* The attention weights before dropout, each line times a number of its own whose inverse is kept. */
static void weigh(const struct part *p, const struct room *room) {
    const struct block *b = p->block;
    gather(p, room->queries, p->all->q, p->all->q_step);
    turn(p, room->columns, room->queries, p->all->scale);
    pick(p, room->keys, p->all->k);
    pick(p, room->values, p->all->v);
    multiply(p->m, p->L, p->all->width, room->keys, p->D, 1, room->columns, p->L, 0, room->weights, p->L);
    for (whole j = b->low; b->mask && j < b->high; j++)
        for (whole head = 0; head < p->lines; head += p->n) {
            float *restrict row = room->weights + j * p->L + head;
            const float *restrict mask = b->mask + (j - b->low) * p->n;
            for (whole i = 0; i < p->n; i++) row[i] += mask[i];
        }
    softmax(p->m, p->L, room->weights, room->most, room->inverse);
}

static void drop(const struct part *p, float *restrict weights) {
    for (whole begin = 0; p->kept && begin < p->lines; begin += LANES) {
        const whole end = begin + LANES < p->lines ? begin + LANES : p->lines;
        for (whole j = 0; j < p->m; j++)
            for (whole line = begin; line < end; line++) weights[j * p->L + line] *= p->kept[line * p->m + j] * p->all->share;
    }
}

/* Floats that each thread works in. */
whole headstart_attend_room(const struct attention *a) {
    struct room room;
    return lay_out(a, NULL, &room);
}

/* Numbers that a head takes in `sums`. */
whole headstart_attend_width(const struct attention *a) { return padded(a->width); }

/* output [T, H, d]; `room` for each thread */
void headstart_attend(const struct attention *a, float *output, whole output_step, float *at) {
#pragma omp parallel num_threads(a->threads)
    {
        struct room room;
        const whole size = lay_out(a, NULL, &room);
        lay_out(a, at + omp_get_thread_num() * size, &room);
#pragma omp for schedule(dynamic)
        for (whole task = a->count * a->groups - 1; task >= 0; task--) {
            const struct part p = part_of(a, task / a->groups, task % a->groups);
            weigh(&p, &room);
            drop(&p, room.weights);
            multiply(p.lines, p.D, p.m, room.weights, 1, p.L, room.values, p.D, 0, room.asked, p.D);
            scatter(&p, output, output_step, room.asked, room.inverse);
        }
    }
}

/* The gradient of a block's queries, and those of the keys and values [T, D] that it sees, to which it is added. */
static void attend_back(const struct part *p, const struct room *room, const float *wanted, whole wanted_step, float *d_q,
                        whole d_q_step, float *d_k, float *d_v) {
    const whole m = p->m, L = p->L, D = p->D;
    float *restrict mean = room->mean, *restrict times = room->most;
    const float *restrict inverse = room->inverse;
    weigh(p, room);
    gather(p, room->asked, wanted, wanted_step);
    turn(p, room->columns, room->asked, 1);
    multiply(m, L, p->all->width, room->values, D, 1, room->columns, L, 0, room->slopes, L);
    drop(p, room->slopes);
    memset(mean, 0, L * sizeof(float));
    for (whole j = 0; j < m; j++) {
        const float *restrict slope = room->slopes + j * L, *restrict weight = room->weights + j * L;
        for (whole line = 0; line < L; line++) mean[line] += slope[line] * weight[line];
    }
    for (whole line = 0; line < L; line++) mean[line] *= inverse[line], times[line] = inverse[line] * p->all->scale;
    for (whole j = 0; j < m; j++) {
        float *restrict slope = room->slopes + j * L;
        const float *restrict weight = room->weights + j * L;
        for (whole line = 0; line < L; line++) slope[line] = (slope[line] - mean[line]) * weight[line] * times[line];
    }
    drop(p, room->weights);
    for (whole line = 0; line < p->lines; line++)
        for (whole i = 0; i < D; i++) room->asked[line * D + i] *= inverse[line];
    collect(p, room->weights, room->asked, d_v);
    collect(p, room->slopes, room->queries, d_k);
    multiply(p->lines, D, m, room->slopes, 1, L, room->keys, D, 0, room->asked, D);
    scatter(p, d_q, d_q_step, room->asked, NULL);
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

/* Gradients of q, k and v, given that of the output; those lie `d_q_step` apart from token to token, or of k and v `d_k_step`.
 *
 * Blocks go in `parts`, from edges[i] to edges[i + 1], whose sums [parts, K, 2, T, D] are added up at the end.
 */
void headstart_attend_back(const struct attention *a, const float *wanted, whole wanted_step, float *d_q, float *d_k,
                           float *d_v, whole d_q_step, whole d_k_step, whole tokens, whole parts, const whole *edges, float *sums,
                           float *at) {
    const whole d = a->width, D = padded(d), groups = a->groups, each = tokens * D;
#pragma omp parallel num_threads(a->threads)
    {
        struct room room;
        const whole size = lay_out(a, NULL, &room);
        lay_out(a, at + omp_get_thread_num() * size, &room);
#pragma omp for schedule(dynamic)
        for (whole task = parts * groups - 1; task >= 0; task--) {
            const whole part = task / groups;
            float *keys = sums + 2 * task * each, *values = keys + each;
            whole begin, end;
            span(a, edges[part], edges[part + 1], &begin, &end);
            memset(keys + begin * D, 0, (end - begin) * D * sizeof(float));
            memset(values + begin * D, 0, (end - begin) * D * sizeof(float));
            for (whole i = edges[part]; i < edges[part + 1]; i++) {
                const struct part p = part_of(a, i, task % groups);
                attend_back(&p, &room, wanted, wanted_step, d_q, d_q_step, keys, values);
            }
        }
#pragma omp for
        for (whole group = 0; group < 2 * groups; group++) {
            float *to = (group % 2 ? d_v : d_k) + group / 2 * d;
            for (whole t = 0; t < tokens; t++) memset(to + t * d_k_step, 0, d * sizeof(float));
            for (whole part = 0; part < parts; part++) {
                const float *from = sums + (2 * part * groups + group) * each;
                whole begin, end;
                span(a, edges[part], edges[part + 1], &begin, &end);
                for (whole t = begin; t < end; t++)
                    for (whole i = 0; i < d; i++) to[t * d_k_step + i] += from[t * D + i];
            }
        }
    }
}

/* --- rows --- */

/* Turn n heads [T, n, d] in place by their positions, or with a `sign` of -1 back: the first r with the next r. cos, sin [T, r]. */
void headstart_turn(float *heads, whole step, whole tokens, whole n, whole d, const float *cos, whole cos_step,
                    const float *sin, whole sin_step, whole r, float sign, whole threads) {
#pragma omp parallel for num_threads(threads)
    for (whole t = 0; t < tokens; t++) {
        const float *restrict c = cos + t * cos_step, *restrict s = sin + t * sin_step;
        for (whole head = 0; head < n; head++) {
            float *restrict first = heads + t * step + head * d, *restrict next = first + r;
            for (whole i = 0; i < r; i++) {
                const float x = first[i], y = next[i];
                first[i] = x * c[i] - y * sign * s[i];
                next[i] = y * c[i] + x * sign * s[i];
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

/* --- a layer --- */

/* A linear layer [k] -> [n]: its weight [n, k], its bias [n] or NULL, which a layer with a residual has not, and its adapters. */
struct linear {
    const float *weight, *bias;
    struct adapters adapters;
    whole n, k;
};

/* Attention and a gated feed-forward, each behind an RMS norm and before a residual, as in Llama; only adapters train. */
struct layer {
    struct linear columns, out, wide, down;
    const float *scale, *mlp_scale; /* of the norms, [D] */
    const float *cos, *sin;         /* of the turns, [T, r] */
    const struct attention *attention;
    const whole *edges; /* of the parts in which attention goes back */
    whole parts, tokens, r, cos_step, sin_step, threads;
    float eps, mlp_eps;
};

/* What a layer keeps of its way forward, and what it works in; [T, width] each, but `room`. */
struct kept {
    float *columns, *attended, *middle, *wide, *inverse, *mlp_inverse, *narrow[4];
};
struct scratch {
    float *room, *normed, *hot, *d_wide, *d_middle, *d_attended, *d_columns, *back;
};

/* Lay out what a layer keeps; return how many floats it takes. `at` may be NULL to learn only this. */
static whole lay_kept(const struct layer *l, float *at, struct kept *k) {
    const whole widths[] = {l->columns.n, l->out.k, l->out.n, l->wide.n, 1, 1, l->columns.adapters.ranks, l->out.adapters.ranks,
                            l->wide.adapters.ranks, l->down.adapters.ranks};
    float **places[] = {&k->columns, &k->attended, &k->middle, &k->wide, &k->inverse, &k->mlp_inverse,
                        &k->narrow[0], &k->narrow[1], &k->narrow[2], &k->narrow[3]};
    whole size = 0;
    for (int i = 0; i < 10; size += l->tokens * widths[i++]) *places[i] = at ? at + size : NULL;
    return size;
}

/* The same of what it works in, forward or back. */
static whole lay_scratch(const struct layer *l, int back, float *at, struct scratch *s) {
    const struct adapters *adapters[] = {&l->columns.adapters, &l->out.adapters, &l->wide.adapters, &l->down.adapters};
    const whole T = l->tokens, D = l->out.n, F = l->down.k;
    whole ranks = 0, room = 0, size = 0;
    for (int i = 0; i < 4; i++) {
        const whole floats = headstart_adapt_room(adapters[i]);
        room = floats > room ? floats : room;
        ranks = adapters[i]->ranks > ranks ? adapters[i]->ranks : ranks;
    }
    const whole hot = back && l->out.k > F ? l->out.k : F, d_wide = 2 * F > l->columns.n ? 2 * F : l->columns.n;
    const whole sizes[] = {room, T * D, T * hot, T * d_wide, T * D, T * ranks};
    float **places[] = {&s->room, &s->normed, &s->hot, &s->d_wide, &s->d_middle, &s->back};
    for (int i = 0; i < (back ? 6 : 3); size += sizes[i++]) *places[i] = at ? at + size : NULL;
    if (back) s->d_attended = s->hot, s->d_columns = s->d_wide; /* whose time is over then */
    return size;
}

/* Floats that a layer keeps, those that it works in, and those that its attention works in: forward or `back`, [3] */
void headstart_layer_floats(const struct layer *l, int back, whole *floats) {
    const struct attention *a = l->attention;
    struct kept kept;
    struct scratch scratch;
    floats[0] = lay_kept(l, NULL, &kept);
    floats[1] = lay_scratch(l, back, NULL, &scratch);
    floats[2] = headstart_attend_room(a) * l->threads + back * l->parts * a->groups * 2 * l->tokens * padded(a->width);
}

/* out [T, n] = base + what a linear layer gives for x [T, k] */
static void apply(const struct layer *l, const struct linear *f, const float *x, const float *base, whole base_step, float *out,
                  float *narrow, const struct scratch *s) {
    const whole T = l->tokens, n = f->n, k = f->k;
    headstart_multiply(x, k, 1, f->weight, k, 1, base, base_step, out, n, T, n, k, l->threads);
    if (f->adapters.count) headstart_adapt(&f->adapters, x, k, out, n, 1, narrow, T, s->room, l->threads);
}

/* d_x [T, k], unless NULL, and what is behind each B, of the outputs' gradient [T, n] */
static void carry(const struct layer *l, const struct linear *f, const float *gradient, float *d_x, const struct scratch *s) {
    const whole T = l->tokens, n = f->n, k = f->k;
    if (d_x) headstart_multiply(gradient, n, 1, f->weight, k, 0, NULL, 0, d_x, k, T, k, n, l->threads);
    if (f->adapters.count) headstart_adapt_back(&f->adapters, gradient, n, s->back, d_x, k, T, s->room, l->threads);
}

/* The gradients of adapters, given that of the outputs, the inputs x [T, k] and what was made of both. */
static void sum(const struct layer *l, const struct linear *f, const float *gradient, const float *x, const float *narrow,
                const struct scratch *s) {
    const struct adapters *all = &f->adapters;
    if (all->count) headstart_adapt_sum(all, gradient, f->n, x, f->k, narrow, s->back, l->tokens, s->room, l->threads);
}

static struct attention attention_of(const struct layer *l, const struct kept *kept) {
    struct attention a = *l->attention;
    a.q = kept->columns, a.k = a.q + a.heads * a.width, a.v = a.k + a.groups * a.width;
    a.q_step = a.k_step = l->columns.n;
    return a;
}

/* out [T, D] of x [T, D]; `at`, `work` and `room` are for the floats that were asked for */
void headstart_layer(const struct layer *l, const float *x, float *out, float *at, float *work, float *room) {
    const whole T = l->tokens, D = l->out.n, F = l->down.k;
    struct kept k;
    struct scratch s;
    lay_kept(l, at, &k);
    lay_scratch(l, 0, work, &s);
    const struct attention a = attention_of(l, &k);
    headstart_norm(x, D, l->scale, l->eps, 0, k.inverse, s.normed, T, D, l->threads);
    apply(l, &l->columns, s.normed, l->columns.bias, 0, k.columns, k.narrow[0], &s);
    headstart_turn(k.columns, l->columns.n, T, a.heads + a.groups, a.width, l->cos, l->cos_step, l->sin, l->sin_step, l->r, 1, l->threads);
    headstart_attend(&a, k.attended, l->out.k, room);
    apply(l, &l->out, k.attended, x, D, k.middle, k.narrow[1], &s);
    headstart_norm(k.middle, D, l->mlp_scale, l->mlp_eps, 0, k.mlp_inverse, s.normed, T, D, l->threads);
    apply(l, &l->wide, s.normed, l->wide.bias, 0, k.wide, k.narrow[2], &s);
    headstart_gate(k.wide, k.wide + F, 2 * F, s.hot, T, F, l->threads);
    apply(l, &l->down, s.hot, k.middle, D, out, k.narrow[3], &s);
}

/* The gradient of x [T, D], unless NULL, and those of the adapters, given that of the output [T, D]. */
void headstart_layer_back(const struct layer *l, const float *x, const float *gradient, float *d_x, float *at, float *work,
                          float *room) {
    const whole T = l->tokens, D = l->out.n, F = l->down.k, N = l->columns.n;
    struct kept k;
    struct scratch s;
    lay_kept(l, at, &k);
    lay_scratch(l, 1, work, &s);
    const struct attention a = attention_of(l, &k);
    carry(l, &l->down, gradient, s.hot, &s);
    headstart_gate_back(k.wide, k.wide + F, 2 * F, s.hot, s.d_wide, s.d_wide + F, 2 * F, T, F, l->threads);
    sum(l, &l->down, gradient, s.hot, k.narrow[3], &s);
    headstart_norm(k.middle, D, l->mlp_scale, l->mlp_eps, 1, k.mlp_inverse, s.normed, T, D, l->threads);
    carry(l, &l->wide, s.d_wide, s.d_middle, &s);
    sum(l, &l->wide, s.d_wide, s.normed, k.narrow[2], &s);
    headstart_norm_back(k.middle, D, l->mlp_scale, k.mlp_inverse, s.d_middle, gradient, D, T, D, l->threads);
    carry(l, &l->out, s.d_middle, s.d_attended, &s);
    sum(l, &l->out, s.d_middle, k.attended, k.narrow[1], &s);
    float *const d_q = s.d_columns, *const d_k = d_q + a.heads * a.width, *const d_v = d_k + a.groups * a.width;
    float *const places = room + l->parts * a.groups * 2 * T * padded(a.width);
    headstart_attend_back(&a, s.d_attended, l->out.k, d_q, d_k, d_v, N, N, T, l->parts, l->edges, room, places);
    headstart_turn(s.d_columns, N, T, a.heads + a.groups, a.width, l->cos, l->cos_step, l->sin, l->sin_step, l->r, -1, l->threads);
    headstart_norm(x, D, l->scale, l->eps, 1, k.inverse, s.normed, T, D, l->threads);
    carry(l, &l->columns, s.d_columns, d_x, &s);
    sum(l, &l->columns, s.d_columns, s.normed, k.narrow[0], &s);
    if (d_x) headstart_norm_back(x, D, l->scale, k.inverse, d_x, s.d_middle, D, T, D, l->threads);
}
