/* Selective attention on a CPU. kernels/cpu.py calls this; its docstring has the mathematics.

   Part 1 is attention over lists of columns, with a bias for each pair of a row and a column, and
   its gradient. It knows nothing of votes. Part 2 is the walk down the rows: logits of head 0, from
   which Python makes votes, running sums F of the votes, the lists of columns that are still alive,
   and back up again, the gradient of the votes. Part 3, a single row in generation, stands alone.

       rows i      a block of 64; block n begins at row 64 n; the last one may be short
       columns j   those of the block's list: the living ones of earlier blocks, in their order, and
                   then the block's own. Each sequence of the batch has a list of its own
       panels      what a row and a column share is stored with the column first, 64 rows side by
                   side: L[c][i]. So eight or sixteen rows fill a vector, the softmax needs no sum
                   across a vector, and nothing but a block's queries is ever transposed

   A block's columns are worked through in chunks of 64, so that all panels stay in the cache. The
   last chunk is the block's own columns, where rows above the diagonal are left out.

   q, k, v, y and their gradients are (B, T, H, D) in memory, with a distance of their own from one
   token to the next. Everything is deterministic; only how many groups of blocks `backward`
   works on by themselves, which Python chooses, depends on the number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#ifndef real
#define real float /* -Dreal=double is for tests */
#endif
#if defined __AVX512F__
#define BYTES 64
#elif defined __AVX__
#define BYTES 32
#else
#define BYTES 16
#endif
typedef real vec __attribute__((vector_size(BYTES), may_alias));
typedef real unaligned __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
typedef __typeof__((vec){0} < (vec){0}) ivec;
enum { ROWS = 64, LANES = BYTES / sizeof(real), TILE = BYTES == 32 ? 4 : 8 };
#define EACH(x, from, to) for (int64_t x = from; x < to; x++)
#define SMALLEST -69.0 /* a P below exp of it, 1e-30, is 0: products of denormals are slow */

/* A block's panels (B, N, 64), N being the longest list: F of each row; dF, and then the gradient
   of the votes; the gradient of head 0's logits through the votes. */
typedef struct {
    int64_t N;
    real *F, *dF;
    const real *dL0;
} panels;

/* What each function gets, field by field as FIELDS in kernels/cpu.py: numbers, and addresses. */
typedef struct {
    int64_t B, H, T, D, blocks, threads, groups;
    int64_t n, N, skip;                      /* a block, its longest list, whether columns die */
    int64_t q_step, k_step, v_step, dy_step; /* from one token to the next */
    const double *tau, *log_eps;             /* tau 0: no M */
    const real *q, *k, *v;
    real *y, *l;             /* l (B, H, T): log of the sum of exp(L - F) over a row */
    real *F, *M;             /* F (B, T) as it enters the next block; M (B, T) */
    real *norm, *Q, *m;      /* of the bound: (B, H, T), (B, H, blocks), (B, H, blocks) */
    int32_t *list, *count;   /* (blocks, B, T) columns; (blocks, B) how many they are */
    real *L0;                /* block n's panels (B, N, 64): logits of head 0, */
    const real *votes;       /* what Python made of them, */
    real *F_rows;            /* and F of each row */
    const real *dy, *dM;
    real *dq, *dk, *dv;      /* dk and dv (groups, B, T, H, D) */
    real *G;                 /* (B, T) sums of dF over the rows of later blocks */
    const panels *table;     /* of all blocks */
} problem;

_Static_assert(sizeof(void *) == 8, "a field of `problem` has 64 bits");

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
static vec load(const real *x) { return *(const unaligned *)x; }
static vec at(const real *x) { return *(const vec *)x; }
static void put(real *x, vec v) { *(vec *)x = v; }
static vec larger(vec a, vec b)
{
    ivec mask = a > b;
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}
static real scale(const problem *p) { return 1 / sqrt((real)p->D); }

/* exp(x) for x <= 0: 2^n times the series of exp(r), with r = x - n log 2 between -0.35 and 0.35.
   NaN stays NaN. */
static vec exponential(vec x)
{
    vec y;
    if (sizeof(real) == 8) {
        EACH(i, 0, LANES) y[i] = exp(x[i]);
    } else {
        const vec one = (vec){0} + 1;
        vec shifted = x * (real)1.44269504 + (real)12582912; /* 1.5 * 2^23 rounds to integers */
        vec n = shifted - (real)12582912;
        vec r = x - n * (real)0.693359375 + n * (real)2.12194440e-4; /* log 2 in two parts */
        y = one / 5040;
        y = y * r + one / 720;
        y = y * r + one / 120;
        y = y * r + one / 24;
        y = y * r + one / 6;
        y = y * r + one / 2;
        y = y * r + one;
        y = y * r + one;
        y *= (vec)(((ivec)shifted << 23) + (ivec)one); /* n is added to the exponent of 1 */
    }
    return (vec)((ivec)y & ~(x < (real)SMALLEST));
}

/* ---- Products of panels -------------------------------------------------------------------- */

/* TILE rows and `vectors` vectors of   out[r][x] (+)= sum over k of a[r*ar + k*ak] x[k*xs + x] */
static inline __attribute__((always_inline)) void tile(
    real *out, int64_t os, const real *a, int64_t ar, int64_t ak, const real *x, int64_t xs,
    int64_t depth, int add, int vectors)
{
    vec sum[TILE][2];
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
        for (int c = 0; c < vectors; c++)
            sum[r][c] = add ? at(out + r * os + c * LANES) : (vec){0};
    EACH(k, 0, depth) {
#pragma GCC unroll 8
        for (int r = 0; r < TILE; r++)
            for (int c = 0; c < vectors; c++)
                sum[r][c] += a[r * ar + k * ak] * at(x + k * xs + c * LANES);
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
        for (int c = 0; c < vectors; c++)
            put(out + r * os + c * LANES, sum[r][c]);
}

/* The same for a width of any number of vectors. */
static inline __attribute__((always_inline)) void product(
    real *out, int64_t os, const real *a, int64_t ar, int64_t ak, const real *x, int64_t xs,
    int64_t width, int64_t depth, int add)
{
    int64_t c = 0;
    for (; c + 2 * LANES <= width; c += 2 * LANES)
        tile(out + c, os, a, ar, ak, x + c, xs, depth, add, 2);
    if (c < width)
        tile(out + c, os, a, ar, ak, x + c, xs, depth, add, 1);
}

/* L[c][i] = sum over d of k[c][d] qt[d][i], for `rows` from row `from` on */
static void across(real *L, const real *k, const real *qt, int64_t D, int64_t W, int64_t from)
{
    product(L + from, ROWS, k, W, 1, qt + from, ROWS, ROWS - from, D, 0);
}

/* y[i][d] += sum over c of P[c][i] v[c][d] */
static void down(real *y, const real *P, const real *v, int64_t W, int64_t depth)
{
    product(y, W, P, 1, ROWS, v, W, W, depth, 1);
}

/* dk[c][d] = sum over i of dL[c][i] q[i][d], for i from row `from` on */
static void back(real *dk, const real *dL, const real *q, int64_t W, int64_t from)
{
    product(dk, W, dL + from, ROWS, 1, q + from * W, W, W, ROWS - from, 0);
}

/* ---- Chunks of a list ------------------------------------------------------------------------ */

/* What a thread works with. W is D, filled up with zeros to whole vectors. */
typedef struct {
    int64_t W;
    real *q, *qt, *dy, *dyt, *k, *v, *sum, *out; /* (64, W); qt and dyt (W, 64) */
    real *P, *dL;                                /* panels (64, 64) */
    real m[ROWS] __attribute__((aligned(64))), total[ROWS], l[ROWS], delta[ROWS];
} workspace;

static workspace *new_workspace(int64_t D)
{
    int64_t W = up(D, LANES), head = up(sizeof(workspace), 64), n = 8 * ROWS * W + 2 * ROWS * ROWS;
    char *memory = aligned_alloc(64, head + up(n * sizeof(real), 64));
    if (!memory)
        abort();
    workspace *w = (workspace *)memory;
    real *next = (real *)(memory + head);
    w->W = W;
    real **parts[] = {&w->q, &w->qt, &w->dy, &w->dyt, &w->k, &w->v, &w->sum, &w->out};
    EACH(i, 0, 8) {
        *parts[i] = next;
        next += ROWS * W;
    }
    w->P = next;
    w->dL = next + ROWS * ROWS;
    return w;
}

typedef struct {
    int64_t start, n, diagonal; /* columns list[start .. start+n); whether the block's own */
} chunk;

/* The next chunk of a list of `count` columns, of which the last `own` are the block's; or 0. */
static int next_chunk(chunk *c, int64_t count, int64_t own)
{
    c->start += c->n;
    c->diagonal = c->start == count - own;
    c->n = c->diagonal ? own : least(ROWS, count - own - c->start);
    return c->start < count;
}

/* The first row from which column c of a chunk is computed, and the columns that a row needs. */
static int64_t first_row(chunk c, int64_t column) { return c.diagonal ? column & ~15 : 0; }
static int64_t depth(chunk c, int64_t row) { return c.diagonal ? least(c.n, row + TILE) : c.n; }

/* x[list[c]], or x[c] without a list, for n rows of D channels, times `scale`; zeros around it */
static void gather(
    real *to, int64_t W, const real *x, int64_t step, const int32_t *list, int64_t n, int64_t D,
    real scale)
{
    int64_t whole = D / LANES * LANES;
    EACH(c, 0, n) {
        const real *from = x + (list ? list[c] : c) * step;
        real *row = to + c * W;
        for (int64_t d = 0; d < whole; d += LANES)
            put(row + d, load(from + d) * scale);
        if (whole < D) {
            put(row + whole, (vec){0});
            EACH(d, whole, D) row[d] = from[d] * scale;
        }
    }
    memset(to + n * W, 0, (up(n, TILE) - n) * W * sizeof(real));
}

/* to[c][r] = from[r][c] for LANES rows and columns: halves of pairs of rows change places, then
   quarters of rows that lie closer, and so on. clang has no shuffle by a vector of places. */
static void transpose(real *to, int64_t ts, const real *from, int64_t fs)
{
#ifdef __clang__
    EACH(c, 0, LANES) EACH(r, 0, LANES) to[c * ts + r] = from[r * fs + c];
#else
    vec x[LANES];
    EACH(r, 0, LANES) x[r] = at(from + r * fs);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        ivec low, high;
        EACH(i, 0, LANES) {
            low[i] = i & half ? LANES + i - half : i;
            high[i] = i & half ? LANES + i : i + half;
        }
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++)
            if (!(r & half)) {
                vec a = x[r], b = x[r + half];
                x[r] = __builtin_shuffle(a, b, low);
                x[r + half] = __builtin_shuffle(a, b, high);
            }
    }
    EACH(r, 0, LANES) put(to + r * ts, x[r]);
#endif
}

/* The rows of a block, n of 64, and their transpose. */
static void gather_rows(
    real *to, real *transposed, int64_t W, const real *x, int64_t step, int64_t n, int64_t D,
    real scale)
{
    gather(to, W, x, step, NULL, n, D, scale);
    memset(to + n * W, 0, (ROWS - n) * W * sizeof(real));
    for (int64_t d = 0; d < W; d += LANES)
        for (int64_t i = 0; i < ROWS; i += LANES)
            transpose(transposed + d * ROWS + i, ROWS, to + i * W + d, W);
}

/* The opposite: x, times `scale`, is added to the rows of the list. */
static void add_rows(
    real *to, int64_t step, const int32_t *list, const real *x, int64_t W, int64_t n, int64_t D,
    real scale)
{
    int64_t whole = D / LANES * LANES;
    EACH(c, 0, n) {
        real *row = to + (list ? list[c] : c) * step;
        for (int64_t d = 0; d < whole; d += LANES)
            *(unaligned *)(row + d) += at(x + c * W + d) * scale;
        EACH(d, whole, D) row[d] += x[c * W + d] * scale;
    }
}

/* 0 where row i sees a column of its own block, -inf where that is the future: (i - column + 64) */
static real seen[2 * ROWS];

static void __attribute__((constructor)) fill_seen(void)
{
    EACH(x, 0, ROWS) seen[x] = -INFINITY;
}

/* ---- Part 1: attention over lists ------------------------------------------------------------ */

/* Head h of block n of sequence s. The softmax is made in one go: its largest logit so far is m,
   and when that grows, what has been summed up is scaled down. */
static void attend(
    const problem *p, workspace *w, const panels *block, int64_t s, int64_t n, int64_t h)
{
    int64_t D = p->D, W = w->W, a = n * ROWS, R = least(ROWS, p->T - a), step = p->H * D;
    int64_t token = s * p->T, count = p->count[n * p->B + s];
    const int32_t *list = p->list + (n * p->B + s) * p->T;
    const real *F = block->F + s * block->N * ROWS;
    real *P = w->P, *y = w->sum, largest[ROWS] __attribute__((aligned(64)));

    gather_rows(w->q, w->qt, W, p->q + (token + a) * p->q_step + h * D, p->q_step, R, D, scale(p));
    memset(y, 0, ROWS * W * sizeof(real));
    EACH(i, 0, ROWS) {
        w->m[i] = -1e30;
        w->total[i] = 0;
    }
    for (chunk c = {0}; next_chunk(&c, count, R);) {
        gather(w->k, W, p->k + token * p->k_step + h * D, p->k_step, list + c.start, c.n, D, 1);
        gather(w->v, W, p->v + token * p->v_step + h * D, p->v_step, list + c.start, c.n, D, 1);
        for (int64_t j = 0; j < c.n; j += TILE)
            across(P + j * ROWS, w->k + j * W, w->qt, D, W, first_row(c, j));
        memcpy(largest, w->m, sizeof(largest));
        EACH(j, 0, c.n) for (int64_t i = first_row(c, j); i < ROWS; i += LANES) {
            vec L = at(P + j * ROWS + i) - at(F + (c.start + j) * ROWS + i);
            if (c.diagonal)
                L += load(seen + ROWS + i - j);
            put(P + j * ROWS + i, L);
            put(largest + i, larger(L, at(largest + i)));
        }
        for (int64_t i = 0; i < ROWS; i += LANES) {
            vec factor = exponential(at(w->m + i) - at(largest + i));
            put(w->total + i, at(w->total + i) * factor);
            put(w->m + i, factor);
        }
        if (c.start)
            EACH(i, 0, ROWS) for (int64_t d = 0; d < W; d += LANES)
                put(y + i * W + d, at(y + i * W + d) * w->m[i]);
        memcpy(w->m, largest, sizeof(largest));
        EACH(j, 0, c.n) for (int64_t i = first_row(c, j); i < ROWS; i += LANES) {
            vec e = exponential(at(P + j * ROWS + i) - at(w->m + i));
            put(P + j * ROWS + i, e);
            put(w->total + i, at(w->total + i) + e);
        }
        for (int64_t i = 0; i < R; i += TILE)
            down(y + i * W, P + i, w->v, W, depth(c, i));
    }
    EACH(i, 0, R) {
        real *to = p->y + (token + a + i) * step + h * D;
        p->l[(s * p->H + h) * p->T + a + i] = w->m[i] + log(w->total[i]);
        EACH(d, 0, D) to[d] = y[i * W + d] / w->total[i];
    }
}

void forward(const problem *p)
{
#pragma omp parallel num_threads(p->threads)
    {
        workspace *w = new_workspace(p->D);
#pragma omp for schedule(dynamic)
        EACH(task, 0, p->B * p->H * p->blocks) { /* of a head the last block, the longest, first */
            int64_t sh = task / p->blocks, n = p->blocks - 1 - task % p->blocks;
            attend(p, w, p->table + n, sh / p->H, n, sh % p->H);
        }
        free(w);
    }
}

/* Gradients of the same, with P = exp(L - F - l) and delta[i] = dy[i].y[i]:

       dL = P (dP - delta)       dP = dy v^T
       dq = dL k / sqrt(D)       dk = dL^T q / sqrt(D)       dv = P^T dy
       dF = -dL, summed over heads

   dk and dv are those of group g. */
static void attend_back(
    const problem *p, workspace *w, const panels *block, int64_t s, int64_t n, int64_t h, int64_t g)
{
    int64_t D = p->D, W = w->W, a = n * ROWS, R = least(ROWS, p->T - a), step = p->H * D;
    int64_t token = s * p->T, count = p->count[n * p->B + s], all = p->B * p->T * step;
    const int32_t *list = p->list + (n * p->B + s) * p->T;
    const real *F = block->F + s * block->N * ROWS;
    real *dF = block->dF + s * block->N * ROWS;
    real *P = w->P, *dL = w->dL;

    gather_rows(w->q, w->qt, W, p->q + (token + a) * p->q_step + h * D, p->q_step, R, D, scale(p));
    gather_rows(w->dy, w->dyt, W, p->dy + (token + a) * p->dy_step + h * D, p->dy_step, R, D, 1);
    memset(w->sum, 0, ROWS * W * sizeof(real));
    EACH(i, 0, ROWS) {
        const real *y = p->y + (token + a + i) * step + h * D;
        w->l[i] = i < R ? p->l[(s * p->H + h) * p->T + a + i] : INFINITY; /* then P is 0 */
        w->delta[i] = 0;
        if (i < R)
            EACH(d, 0, D) w->delta[i] += w->dy[i * W + d] * y[d];
    }
    for (chunk c = {0}; next_chunk(&c, count, R);) {
        const int32_t *columns = list + c.start;
        gather(w->k, W, p->k + token * p->k_step + h * D, p->k_step, columns, c.n, D, 1);
        gather(w->v, W, p->v + token * p->v_step + h * D, p->v_step, columns, c.n, D, 1);
        for (int64_t j = 0; j < c.n; j += TILE) {
            across(P + j * ROWS, w->k + j * W, w->qt, D, W, first_row(c, j));
            across(dL + j * ROWS, w->v + j * W, w->dyt, D, W, first_row(c, j));
        }
        EACH(j, 0, c.n) for (int64_t i = first_row(c, j); i < ROWS; i += LANES) {
            int64_t x = j * ROWS + i, bias = c.start * ROWS + x;
            vec L = at(P + x) - at(F + bias) - at(w->l + i);
            if (c.diagonal)
                L += load(seen + ROWS + i - j);
            vec e = exponential(L);
            vec gradient = e * (at(dL + x) - at(w->delta + i));
            put(P + x, e);
            put(dL + x, gradient);
            if (h)
                gradient -= at(dF + bias); /* the heads before this one are in it */
            put(dF + bias, -gradient);
        }
        for (int64_t i = 0; i < R; i += TILE)
            down(w->sum + i * W, dL + i, w->k, W, depth(c, i));
        for (int64_t j = 0; j < c.n; j += TILE)
            back(w->out + j * W, dL + j * ROWS, w->q, W, first_row(c, j));
        add_rows(p->dk + g * all + token * step + h * D, step, columns, w->out, W, c.n, D, 1);
        for (int64_t j = 0; j < c.n; j += TILE)
            back(w->out + j * W, P + j * ROWS, w->dy, W, first_row(c, j));
        add_rows(p->dv + g * all + token * step + h * D, step, columns, w->out, W, c.n, D, 1);
    }
    add_rows(p->dq + (token + a) * step + h * D, step, NULL, w->sum, W, R, D, scale(p));
}

/* ---- Part 2: the walk ------------------------------------------------------------------------ */

/* The first row of a block from which on votes on its column count: all rows but for token 0 and
   for the block's own columns. */
static int64_t first_vote(int64_t j, int64_t a)
{
    if (j == 0)
        return ROWS;
    return j < a ? 0 : j - a + 1;
}

/* Head 0's logits of block n. A list that is shorter than N is filled up with token 0. */
void voter_logits(const problem *p)
{
    int64_t D = p->D, n = p->n, N = p->N, a = n * ROWS, R = least(ROWS, p->T - a);
    int64_t chunks = up(N, ROWS) / ROWS;
#pragma omp parallel num_threads(p->threads)
    {
        workspace *w = new_workspace(D);
        int64_t of = -1; /* the sequence whose rows are in w */
#pragma omp for schedule(static)
        EACH(task, 0, p->B * chunks) {
            int64_t s = task / chunks, start = task % chunks * ROWS, here = least(ROWS, N - start);
            int32_t *list = p->list + (n * p->B + s) * p->T + start;
            if (s != of)
                gather_rows(
                    w->q, w->qt, w->W, p->q + (s * p->T + a) * p->q_step, p->q_step, R, D,
                    scale(p));
            of = s;
            gather(w->k, w->W, p->k + s * p->T * p->k_step, p->k_step, list, here, D, 1);
            for (int64_t j = 0; j < here; j += TILE)
                across(w->P + j * ROWS, w->k + j * w->W, w->qt, D, w->W, 0);
            memcpy(p->L0 + (s * N + start) * ROWS, w->P, here * ROWS * sizeof(real));
        }
        free(w);
    }
}

/* F of the rows of block n from the votes, and F as it leaves the block. With tau,
   what M[i] of a row loses: masked (B, chunks, 64), sums of min(F, tau). Returns whether a vote is
   negative; *most is the largest F. */
static int add_votes(const problem *p, real *masked, real *most)
{
    int64_t n = p->n, N = p->N, a = n * ROWS, R = least(ROWS, p->T - a);
    int64_t chunks = up(N, ROWS) / ROWS;
    int negative = 0;
    real largest = 0, tau = *p->tau;
#pragma omp parallel for num_threads(p->threads) reduction(|:negative) reduction(max:largest)
    EACH(task, 0, p->B * chunks) {
        int64_t s = task / chunks, start = task % chunks * ROWS;
        int64_t end = least(start + ROWS, p->count[n * p->B + s]);
        const int32_t *list = p->list + (n * p->B + s) * p->T;
        real *lost = masked + task * ROWS;
        EACH(i, 0, ROWS) lost[i] = 0;
        EACH(c, start, end) {
            const real *S = p->votes + (s * N + c) * ROWS;
            real *row = p->F_rows + (s * N + c) * ROWS, *sum = p->F + s * p->T + list[c], f = *sum;
            int64_t first = least(first_vote(list[c], a), R);
            EACH(i, 0, first) row[i] = f;
            EACH(i, first, R) {
                row[i] = f;
                f += S[i];
                negative |= S[i] < 0;
            }
            EACH(i, R, ROWS) row[i] = f;
            *sum = f;
            largest = f > largest ? f : largest;
            if (tau)
                EACH(i, 0, R) lost[i] += row[i] < tau ? row[i] : tau;
        }
    }
    *most = largest;
    return negative;
}

/* |k|, and at each block's first row the largest |q|/sqrt(D) and the smallest l of all rows from
   there on, l being the log of the sum of exp L over token 0, the row before and the row itself. */
void bounds(const problem *p)
{
    int64_t T = p->T, D = p->D;
#pragma omp parallel num_threads(p->threads)
    {
        workspace *w = new_workspace(D);
        const real *qt = w->qt, *kt = w->dyt;
#pragma omp for schedule(dynamic)
        EACH(x, 0, p->B * p->H) {
            const real *q = p->q + x / p->H * T * p->q_step + x % p->H * D;
            const real *k = p->k + x / p->H * T * p->k_step + x % p->H * D;
            real Q = 0, smallest = INFINITY;
            for (int64_t n = p->blocks - 1; n >= 0; n--) {
                int64_t a = n * ROWS, R = least(ROWS, T - a);
                gather_rows(w->q, w->qt, w->W, q + a * p->q_step, p->q_step, R, D, scale(p));
                gather_rows(w->k, w->dyt, w->W, k + a * p->k_step, p->k_step, R, D, 1);
                for (int64_t i = 0; i < R; i += LANES) {
                    vec qq = {0}, kk = {0}, own = {0}, before = {0}, first = {0};
                    EACH(d, 0, D) {
                        vec u = at(qt + d * ROWS + i), v = at(kt + d * ROWS + i);
                        qq += u * u;
                        kk += v * v;
                        own += u * v;
                        before += u * load(kt + d * ROWS + i - 1);
                        first += u * k[d];
                    }
                    if (i == 0) { /* the row before is not in this block, and row 0 has none */
                        before[0] = a ? 0 : -INFINITY;
                        if (a)
                            EACH(d, 0, D) before[0] += w->q[d] * k[(a - 1) * p->k_step + d];
                    }
                    if (a + i == 0) /* of rows 0 and 1, token 0 is one of these */
                        first[0] = first[1] = -INFINITY;
                    vec top = larger(own, larger(before, first));
                    put(w->m + i, top);
                    put(w->total + i, exponential(own - top) + exponential(before - top)
                                          + exponential(first - top));
                    put(w->l + i, qq);
                    put(w->delta + i, kk);
                }
                EACH(i, 0, R) {
                    real l = w->m[i] + log(w->total[i]), norm = sqrt(w->l[i]);
                    smallest = l < smallest ? l : smallest;
                    Q = norm > Q ? norm : Q;
                    p->norm[x * T + a + i] = sqrt(w->delta[i]);
                }
                p->Q[x * p->blocks + n] = Q;
                p->m[x * p->blocks + n] = smallest;
            }
        }
        free(w);
    }
}

/* Whether no row from block n on gives column j of sequence s more than rounding. */
static int dead(const problem *p, int64_t s, int64_t n, int64_t j)
{
    real F = p->F[s * p->T + j], tau = *p->tau;
    if (j == 0 || (tau && !(F > tau))) /* token 0 stays column 0 of what votes see */
        return 0;
    EACH(x, s * p->H, (s + 1) * p->H) {
        real reach = p->Q[x * p->blocks + n] * p->norm[x * p->T + j] - p->m[x * p->blocks + n];
        if (!(reach - F < *p->log_eps))
            return 0;
    }
    return 1;
}

/* A step down: from the votes of block n its F, M, and the list of block n+1. Before the first
   block, n is -1. Columns die if `skip`. Returns the length of the longest list, or -1 if a
   vote is negative although columns may have died. */
int64_t walk(const problem *p)
{
    int64_t n = p->n, T = p->T, a = n * ROWS, b = least(a + ROWS, T);
    int64_t chunks = up(p->N, ROWS) / ROWS, longest = 0, end = least(b + ROWS, T), skip = p->skip;
    double tau = *p->tau;
    real most = 0;
    if (n >= 0) {
        real *masked = malloc((p->B * chunks * ROWS + 1) * sizeof(real));
        int negative = add_votes(p, masked, &most);
        if (tau)
            EACH(s, 0, p->B) EACH(i, a, b) {
                real lost = 0;
                EACH(x, s * chunks, (s + 1) * chunks) lost += masked[x * ROWS + i - a];
                p->M[s * T + i] = i - (b - p->count[n * p->B + s]) - lost / tau;
            }
        free(masked);
        if (skip && negative)
            return -1;
    }
    if (b == T)
        return 0;
    skip = skip && most > -*p->log_eps; /* before that nothing dies by votes */
#pragma omp parallel for num_threads(p->threads) reduction(max:longest)
    EACH(s, 0, p->B) {
        int32_t *list = p->list + ((n + 1) * p->B + s) * T;
        int64_t count = 0;
        if (n >= 0)
            EACH(c, 0, p->count[n * p->B + s]) {
                int32_t j = list[c - p->B * T];
                list[count] = j;
                count += !(skip && dead(p, s, n + 1, j));
            }
        EACH(j, b, end) list[count++] = j;
        p->count[(n + 1) * p->B + s] = count;
        longest = count > longest ? count : longest;
    }
    EACH(s, 0, p->B) EACH(c, p->count[(n + 1) * p->B + s], longest)
        p->list[((n + 1) * p->B + s) * T + c] = 0;
    return longest;
}

/* The recurrence of F run backwards: dS[k][j] = sum of dF[i][j] over i > k, in the place of dF. The
   columns of a sequence are dealt out in parts. */
static void walk_back(const problem *p, int64_t parts)
{
    const panels *blocks = p->table;
    real tau = *p->tau;
#pragma omp parallel for num_threads(p->threads) collapse(2)
    EACH(s, 0, p->B) EACH(part, 0, parts) for (int64_t n = p->blocks - 1; n >= 0; n--) {
        int64_t a = n * ROWS, R = least(ROWS, p->T - a), N = blocks[n].N;
        const int32_t *list = p->list + (n * p->B + s) * p->T;
        const real *dM = p->dM + s * p->T + a;
        EACH(c, 0, p->count[n * p->B + s]) {
            int64_t j = list[c], first = least(first_vote(j, a), R);
            if (j / ROWS % parts != part)
                continue;
            const real *F = blocks[n].F + (s * N + c) * ROWS;
            real *dF = blocks[n].dF + (s * N + c) * ROWS, g = p->G[s * p->T + j];
            EACH(i, R, ROWS) dF[i] = 0;
            for (int64_t i = R - 1; i >= first; i--) {
                real gradient = dF[i];
                if (tau && F[i] <= tau)
                    gradient -= dM[i] / tau;
                dF[i] = g;
                g += gradient;
            }
            EACH(i, 0, first) dF[i] = 0;
            p->G[s * p->T + j] = g;
        }
        EACH(c, p->count[n * p->B + s], N) if (c % parts == part)
            memset(blocks[n].dF + (s * N + c) * ROWS, 0, ROWS * sizeof(real));
    }
}

/* dq, dk, dv by attention, and dS of every block. A group of blocks has its own dk and dv, so that
   groups can be worked on at the same time. */
void backward(const problem *p)
{
#pragma omp parallel num_threads(p->threads)
    {
        workspace *w = new_workspace(p->D);
#pragma omp for schedule(dynamic)
        EACH(task, 0, p->B * p->groups) {
            int64_t s = task / p->groups, g = task % p->groups;
            for (int64_t n = g; n < p->blocks; n += p->groups)
                EACH(h, 0, p->H) attend_back(p, w, p->table + n, s, n, h, g);
        }
        free(w);
    }
    walk_back(p, p->groups);
}

/* Add to dq and dk of head 0 the gradient through the votes. */
void voter_gradients(const problem *p)
{
    const panels *blocks = p->table;
    int64_t D = p->D, step = p->H * D;
#pragma omp parallel num_threads(p->threads)
    {
        workspace *w = new_workspace(D);
        int64_t W = w->W;
#pragma omp for schedule(dynamic)
        EACH(task, 0, p->B * p->groups) {
            int64_t s = task / p->groups, g = task % p->groups;
            for (int64_t n = g; n < p->blocks; n += p->groups) {
                int64_t a = n * ROWS, R = least(ROWS, p->T - a), token = s * p->T;
                const real *q = p->q + (token + a) * p->q_step, *k = p->k + token * p->k_step;
                const int32_t *list = p->list + (n * p->B + s) * p->T;
                real *dk = p->dk + (g * p->B * p->T + token) * step;
                gather(w->q, W, q, p->q_step, NULL, R, D, scale(p));
                memset(w->q + R * W, 0, (ROWS - R) * W * sizeof(real));
                memset(w->sum, 0, ROWS * W * sizeof(real));
                for (chunk c = {0}; next_chunk(&c, p->count[n * p->B + s], R);) {
                    const real *dL = blocks[n].dL0 + (s * blocks[n].N + c.start) * ROWS;
                    gather(w->k, W, k, p->k_step, list + c.start, c.n, D, 1);
                    memcpy(w->dL, dL, c.n * ROWS * sizeof(real));
                    for (int64_t i = 0; i < R; i += TILE)
                        down(w->sum + i * W, w->dL + i, w->k, W, depth(c, i));
                    for (int64_t j = 0; j < c.n; j += TILE)
                        back(w->out + j * W, w->dL + j * ROWS, w->q, W, first_row(c, j));
                    add_rows(dk, step, list + c.start, w->out, W, c.n, D, 1);
                }
                add_rows(p->dq + (token + a) * step, step, NULL, w->sum, W, R, D, scale(p));
            }
        }
        free(w);
    }
}

/* ---- Part 3: one new row of each sequence, in generation ------------------------------------- */

/* The row, and what the layer's cache holds, see LayerCache in model.py. These are the numbers and
   addresses that `decode` in kernels/cpu.py makes, in its order. */
typedef struct {
    int64_t B, G, K, D, H;       /* H heads share the keys of G; K slots */
    int64_t n, sinks;            /* n slots are in use; sinks 0: eviction by F, else by age */
    const real *qkv;             /* (B, (H + 2 G) D) */
    const int64_t *i;            /* the position of the row */
    real *k, *v, *F;             /* (B, G, K, D), twice; (B, K) */
    int64_t *j;                  /* (B, K) positions */
    real *L, *y;                 /* logits (B, H, K + 16); y (B, H, D), which holds q before */
    const real *cos, *sin;       /* (D / 2) of rotary positions, or NULL */
    const real *q_gain, *k_gain; /* (D) of qk_norm, or NULL */
    const double *eps;           /* of qk_norm */
    const real *votes;           /* (B, n), n with the new row, or NULL */
} row;

static int64_t held(const row *p) { return least(p->n + 1, p->K); }

/* The slot of the new row of sequence s: a free one, or that of the token which is dropped. Token 0
   stays; of equals the oldest goes. */
static int64_t slot(const row *p, int64_t s)
{
    const real *F = p->F + s * p->K;
    const int64_t *j = p->j + s * p->K, first = least(p->sinks, p->K - 1);
    real most = -INFINITY;
    int64_t worst = 0;
    if (p->n < p->K)
        return p->n;
    EACH(c, 0, p->K) {
        real score = p->sinks ? 0 : F[c];
        if (j[c] == 0 || j[c] < first)
            score = -INFINITY;
        if (score > most || (score == most && j[c] < j[worst])) {
            most = score;
            worst = c;
        }
    }
    return worst;
}

/* A query or key x (D), RMS-normalised and rotated as in model.py, times `scale`. */
static void turn(const row *p, real *to, const real *x, const real *gain, real scale)
{
    int64_t D = p->D, half = D / 2;
    real square = 0;
    if (gain) {
        EACH(d, 0, D) square += x[d] * x[d];
        scale /= sqrt(square / D + (real)*p->eps);
    }
    EACH(d, 0, D) to[d] = x[d] * scale * (gain ? gain[d] : 1);
    if (p->cos)
        EACH(d, 0, half) {
            real a = to[d], b = to[d + half];
            to[d] = a * p->cos[d] - b * p->sin[d];
            to[d + half] = a * p->sin[d] + b * p->cos[d];
        }
}

/* Store the row, and make its logits. Returns how many slots are in use then. */
int row_logits(const row *p)
{
    int64_t H = p->H, G = p->G, D = p->D, K = p->K, n = held(p);
    int64_t whole = D / LANES * LANES;
    EACH(s, 0, p->B) {
        const real *x = p->qkv + s * (H + 2 * G) * D;
        int64_t c = slot(p, s);
        EACH(h, 0, H) turn(p, p->y + (s * H + h) * D, x + h * D, p->q_gain, 1 / sqrt((real)D));
        EACH(g, 0, G) {
            int64_t to = ((s * G + g) * K + c) * D;
            turn(p, p->k + to, x + (H + g) * D, p->k_gain, 1);
            memcpy(p->v + to, x + (H + G + g) * D, D * sizeof(real));
        }
        p->F[s * K + c] = 0;
        p->j[s * K + c] = *p->i;
    }
#pragma omp parallel for if (p->B * H * n * D > 1 << 18)
    EACH(sh, 0, p->B * H) {
        const real *q = p->y + sh * D, *k = p->k + sh / (H / G) * K * D;
        real x[2][LANES * LANES] __attribute__((aligned(64)));
        for (int64_t c = 0; c < n; c += LANES) { /* beyond n it repeats the last column */
            EACH(r, 0, LANES) {
                const real *column = k + least(c + r, n - 1) * D;
                vec sum = {0};
                for (int64_t d = 0; d < whole; d += LANES)
                    sum += load(q + d) * load(column + d);
                EACH(d, whole, D) sum[0] += q[d] * column[d];
                put(x[0] + r * LANES, sum);
            }
            transpose(x[1], LANES, x[0], LANES); /* now lane c has the parts of column c */
            vec L = {0};
            EACH(r, 0, LANES) L += at(x[1] + r * LANES);
            *(unaligned *)(p->L + sh * (K + 16) + c) = L;
        }
    }
    return n;
}

/* y of the row. Then its votes are added to F, for later rows. */
void row_attend(const row *p)
{
    int64_t H = p->H, G = p->G, D = p->D, K = p->K, n = held(p), W = up(n, 16);
    int64_t whole = D / LANES * LANES;
#pragma omp parallel for if (p->B * H * n * D > 1 << 18)
    EACH(sh, 0, p->B * H) {
        const real *F = p->F + sh / H * K, *v = p->v + sh / (H / G) * K * D;
        real *P = p->L + sh * (K + 16), *y = p->y + sh * D;
        EACH(c, 0, n) P[c] -= F[c];
        EACH(c, n, W) P[c] = -INFINITY;
        vec tops = load(P), sum = {0};
        for (int64_t c = LANES; c < W; c += LANES)
            tops = larger(load(P + c), tops);
        real most = tops[0], total = 0;
        EACH(r, 1, LANES) most = tops[r] > most ? tops[r] : most;
        for (int64_t c = 0; c < W; c += LANES) {
            vec e = exponential(load(P + c) - most);
            *(unaligned *)(P + c) = e;
            sum += e;
        }
        EACH(r, 0, LANES) total += sum[r];
        memset(y, 0, D * sizeof(real));
        for (int64_t c = 0; c < n; c += 4) {
            const real *v0 = v + c * D, *v1 = v + least(c + 1, n - 1) * D;
            const real *v2 = v + least(c + 2, n - 1) * D, *v3 = v + least(c + 3, n - 1) * D;
            real P0 = P[c], P1 = P[c + 1], P2 = P[c + 2], P3 = P[c + 3];
            for (int64_t d = 0; d < whole; d += LANES)
                *(unaligned *)(y + d) = load(y + d) + P0 * load(v0 + d) + P1 * load(v1 + d)
                                        + P2 * load(v2 + d) + P3 * load(v3 + d);
            EACH(d, whole, D) y[d] += P0 * v0[d] + P1 * v1[d] + P2 * v2[d] + P3 * v3[d];
        }
        EACH(d, 0, D) y[d] /= total;
    }
    if (p->votes)
        EACH(s, 0, p->B) EACH(c, 0, n) {
            int64_t j = p->j[s * K + c];
            if (0 < j && j < *p->i)
                p->F[s * K + c] += p->votes[s * n + c];
        }
}
