/* Scaling, rounding and scaling back in one pass: the same IEEE operations, in the same order, as rounding.py and
 * scales.py do with torch, so the same bits. Compile without contraction and without unsafe math. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { MAGIC, BITS, INTEGER, IDENTITY, PLAIN };       /* how a format is rounded to: see rounding.py */
enum { NONE, MAX, POW2, FLOOR, RCEIL, NVFP4 };        /* scale rules */

typedef struct {
    float low, high;        /* what is clamped to before rounding */
    float max_value;        /* the largest element; beyond it, special */
    float special;
    float min_normal;
    float inverse_max;      /* 1 / max_value, rounded */
    float full;             /* max_value times the largest block scale */
    int32_t kind, stochastic, rule;
    int32_t mantissa_bits, min_exponent, max_exponent;
    int32_t draw_bits;      /* random bits that a rounding sees */
    int32_t keeps_sign;     /* whether -0 is a value */
} Format;

static inline float as_float(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }

/* As hash_bits() of random_bits.py: SplitMix64 of the key, lowbias32 of index and key. */
static inline uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

#define GOLDEN 0x9E3779B9u

static inline uint32_t hash(uint32_t h, uint32_t high) { /* h: index * GOLDEN + low half of the mixed key */
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h ^= high;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return h ^ (h >> 16);
}

#define INLINE static inline __attribute__((always_inline))

/* MAGIC, or PLAIN where a format has -0, what is beyond the largest number is cut off before it is rounded, and no tie
 * lies between two powers of two. */
static int kind_of(const Format *f) {
    const int plain = f->keeps_sign && f->high <= f->max_value && (f->mantissa_bits || f->stochastic);
    return f->kind == MAGIC && plain ? PLAIN : f->kind;
}

/* One element, already scaled. KIND and STOCHASTIC are constants where this is inlined. */
INLINE float rounded(float s, const Format *f, const int kind, const int stochastic, uint32_t noise) {
    float a = s > f->high ? f->high : s; /* NaN passes */
    a = a < f->low ? f->low : a;
    if (kind == INTEGER) {
        if (!stochastic) return rintf(a) + 0.0f;
        const float steps = as_float((uint32_t)(f->draw_bits + 127) << 23);
        const float below = floorf(a);
        const float draw = (float)(int32_t)(noise & ((1u << f->draw_bits) - 1));
        return below + (floorf((a - below) * steps) + draw >= steps ? 1.0f : 0.0f) + 0.0f;
    }
    if (kind == IDENTITY) return a;
    const int shift = 23 - f->mantissa_bits;
    const uint32_t sign = as_bits(s) & 0x80000000u;
    const int magic = kind == MAGIC || kind == PLAIN, keeps_sign = kind == PLAIN || f->keeps_sign;
    float q;
    if (magic && !stochastic) {
        const int32_t smallest = (f->min_exponent + 127) << 23;
        int32_t p = (int32_t)(as_bits(a) & 0x7F800000u);
        p = p < smallest ? smallest : p;
        const int32_t even = kind == PLAIN || f->mantissa_bits ? 0 : ((p >> 23) + f->min_exponent + 127) & 1;
        const float c = as_float((uint32_t)p + ((uint32_t)shift << 23) + (1u << 22) + (uint32_t)even);
        q = (a + c) - c;
        if (kind != PLAIN) q = fabsf(q) > f->max_value ? f->special : q;
        return as_float(as_bits(q) | (keeps_sign ? sign : 0u));
    }
    const float m = fabsf(a);
    const uint32_t mask = ~((1u << shift) - 1);
    uint32_t dither;
    if (stochastic)
        dither = (noise & (uint32_t)((1ull << f->draw_bits) - 1)) << (shift - f->draw_bits);
    else
        dither = ((as_bits(m) >> shift) & 1u) + ((1u << (shift - 1)) - 1);
    const float lift = magic && m < f->min_normal ? f->min_normal : 0.0f;
    q = as_float((as_bits(m + lift) + dither) & mask) - lift;
    if (kind != PLAIN) q = q > f->max_value ? f->special : q;
    q = as_float(as_bits(q) | sign);
    if (kind != PLAIN) q += keeps_sign ? -0.0f : 0.0f;
    return s != s ? s : q;
}

/* i * GOLDEN: of few elements the compiler would work them out one by one. */
#define FOUR(i) (i) * GOLDEN, ((i) + 1) * GOLDEN, ((i) + 2) * GOLDEN, ((i) + 3) * GOLDEN
static const uint32_t PRODUCTS[32] = {FOUR(0u),  FOUR(4u),  FOUR(8u),  FOUR(12u),
                                      FOUR(16u), FOUR(20u), FOUR(24u), FOUR(28u)};

enum { UNSCALED, TIMES, OVER }; /* an element is scaled by the factor, or divided by the scale */

/* n elements that share a scale (or, with many, have one each). Whether there was a NaN. */
INLINE int run(const float *x, float *out, int64_t n, const Format *f, const float *scale, const float *factor,
               float unit, uint32_t low, uint32_t high, uint32_t index, const int kind, const int stochastic,
               const int scaling, const int many, const int few) {
    const Format g = *f; /* out could alias *f, for all the compiler knows */
    const float scale0 = *scale, factor0 = *factor;
    const uint32_t start = index * GOLDEN + low;
    uint32_t at = start;
    int nan = 0;
#pragma GCC ivdep /* out is x, or apart from it */
    for (int64_t i = 0; i < n; i++, at += GOLDEN) {
        float s = x[i];
        if (scaling == TIMES) s *= many ? factor[i] : factor0;
        if (scaling == OVER) s /= many ? scale[i] : scale0;
        const float q = rounded(s, &g, kind, stochastic, stochastic ? hash(few ? start + PRODUCTS[i] : at, high) : 0u);
        nan |= s != s;
        out[i] = scaling == UNSCALED ? q : q * (many ? scale[i] : scale0) * unit;
    }
    return nan;
}

#define VARIANT(K, S, D, M)                                                                                        \
    if (kind == K && f->stochastic == S && scaling == D && many == M)                                              \
        return run(x, out, n, f, scale, factor, unit, low, high, index, K, S, D, M, 0);
#define VARIANTS(K) VARIANT(K, 0, UNSCALED, 0) VARIANT(K, 0, TIMES, 0) VARIANT(K, 0, OVER, 0)                      \
                    VARIANT(K, 1, UNSCALED, 0) VARIANT(K, 1, TIMES, 0) VARIANT(K, 1, OVER, 0)                      \
                    VARIANT(K, 0, TIMES, 1) VARIANT(K, 0, OVER, 1) VARIANT(K, 1, TIMES, 1) VARIANT(K, 1, OVER, 1)

static int part(const float *x, float *out, int64_t n, const Format *f, const float *scale, const float *factor,
                float unit, uint32_t low, uint32_t high, uint32_t index, int scaling, int many) {
    const int kind = kind_of(f);
    VARIANTS(PLAIN) VARIANTS(MAGIC) VARIANTS(BITS) VARIANTS(INTEGER) VARIANTS(IDENTITY)
    return 0;
}

/* Elements of which each per_key share a key; the index counts inside them. */
static int keyed(const float *x, float *out, int64_t first, int64_t n, const Format *f, const float *scale,
                 const float *factor, float unit, const uint64_t *keys, int64_t per_key, int scaling, int many) {
    if (!f->stochastic) return part(x, out, n, f, scale, factor, unit, 0, 0, 0, scaling, many);
    int64_t done = 0;
    int nan = 0;
    while (done < n) {
        const int64_t at = first + done, inside = at % per_key;
        const int64_t count = n - done < per_key - inside ? n - done : per_key - inside;
        const uint64_t key = mix(keys[at / per_key]);
        nan |= part(x + done, out + done, count, f, many ? scale + done : scale, many ? factor + done : factor, unit,
                    (uint32_t)key, (uint32_t)(key >> 32), (uint32_t)inside, scaling, many);
        done += count;
    }
    return nan;
}

/* The bits of the largest magnitude: those of a NaN or an infinity, if there is one, are above all numbers'. */
INLINE int32_t top_bits(const float *x, int64_t n) {
    int32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t b = (int32_t)(as_bits(x[i]) & 0x7FFFFFFFu);
        top = b > top ? b : top;
    }
    return top;
}

INLINE float power_of_two(float amax, const Format *f, const int rule) {
    const uint32_t top = as_bits(f->max_value);
    if (rule == RCEIL) amax = amax * f->inverse_max;
    const uint32_t bits = as_bits(amax), mantissa = bits & 0x7FFFFFu;
    int32_t exponent = (int32_t)(bits >> 23), field;
    if (rule == FLOOR) {
        field = exponent - f->max_exponent;
    } else if (rule == RCEIL) {
        field = exponent + (mantissa > (exponent == 0 ? 0x400000u : 0u));
    } else {
        const int subnormal = exponent == 0;
        exponent = subnormal ? 1 : exponent;
        field = exponent - ((int32_t)(top >> 23) - 127) + (!subnormal & (mantissa > (top & 0x7FFFFFu)));
        field = field < 1 ? 1 : field;
        field = amax == 0.0f ? 127 : field;
    }
    field = field < 0 ? 0 : field > 254 ? 254 : field;
    return as_float(field == 0 ? 0x400000u : (uint32_t)field << 23);
}

INLINE void scales_by(const int32_t *tops, int64_t n, float unit_amax, const Format *f, const Format *block_format,
                      float *scale, float *factor, const int rule) {
    const Format g = *f, b = *block_format;
    float encode = g.full / unit_amax;
    encode = encode > 3.40282347e38f ? 3.40282347e38f : encode;
    encode = unit_amax == 0.0f ? 1.0f : encode;
    encode = unit_amax < INFINITY ? encode : NAN;
    const float decode = 1.0f / encode, encode_by_max = encode * g.inverse_max;
    for (int64_t i = 0; i < n; i++) {
        const float amax = as_float((uint32_t)tops[i]);
        if (rule == NVFP4) {
            const float s = rounded(amax * encode_by_max, &b, MAGIC, 0, 0u), e = 1.0f / (s * decode);
            scale[i] = s;
            factor[i] = e > 3.40282347e38f ? 3.40282347e38f : e;
            continue;
        }
        float s;
        if (rule == MAX) {
            s = amax / g.max_value;
            s = s < 1.17549435e-38f ? 1.17549435e-38f : s;
            s = amax == 0.0f ? 1.0f : s;
        } else {
            s = power_of_two(amax, &g, rule);
        }
        s = amax < INFINITY ? s : NAN;
        scale[i] = s;
        factor[i] = 1.0f / s; /* exact for powers of two; not used for MAX */
    }
}

/* Scales and factors of n blocks from the bits of their largest magnitudes; unit_amax: of the unit above, for NVFP4. */
static void scales(const int32_t *tops, int64_t n, float unit_amax, const Format *f, const Format *block_format,
                   float *scale, float *factor) {
    switch (f->rule) {
    case MAX: scales_by(tops, n, unit_amax, f, block_format, scale, factor, MAX); break;
    case POW2: scales_by(tops, n, unit_amax, f, block_format, scale, factor, POW2); break;
    case FLOOR: scales_by(tops, n, unit_amax, f, block_format, scale, factor, FLOOR); break;
    case RCEIL: scales_by(tops, n, unit_amax, f, block_format, scale, factor, RCEIL); break;
    case NVFP4: scales_by(tops, n, unit_amax, f, block_format, scale, factor, NVFP4); break;
    default:
        for (int64_t i = 0; i < n; i++) scale[i] = factor[i] = 1.0f;
    }
}

/* Small blocks in a row, of a size that the compiler knows, all with one key. */
INLINE void small_by(const float *x, float *out, int64_t n, const int64_t size, const Format *f, const float *scale,
                     const float *factor, float unit, uint64_t key, int64_t index, const int kind,
                     const int stochastic, const int scaling) {
    const uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    const Format g = *f;
    for (int64_t i = 0; i < n; i++)
        run(x + i * size, out + i * size, size, &g, scale + i, factor + i, unit, low, high,
            (uint32_t)(index + i * size), kind, stochastic, scaling, 0, 1);
}

/* Rows of elements that have a scale each, the same in every row, all with one key. */
INLINE void columns_by(const float *x, float *out, int64_t rows, int64_t width, int64_t apart, const Format *f,
                       const float *scale, const float *factor, float unit, uint64_t key, int64_t index,
                       const int kind, const int stochastic, const int scaling) {
    for (int64_t j = 0; j < rows; j++)
        run(x + j * apart, out + j * apart, width, f, scale, factor, unit, (uint32_t)key, (uint32_t)(key >> 32),
            (uint32_t)(index + j * apart), kind, stochastic, scaling, 1, 0);
}

/* Whether it did them: only those of the common kinds. */
static int columns(const float *x, float *out, int64_t rows, int64_t width, int64_t apart, const Format *f,
                   const float *scale, const float *factor, float unit, uint64_t key, int64_t index) {
    const int kind = kind_of(f), over = f->rule == MAX;
#define COLUMNS(K, S, D)                                                                                           \
    if (kind == K && f->stochastic == S && over == (D == OVER))                                                    \
        return columns_by(x, out, rows, width, apart, f, scale, factor, unit, key, index, K, S, D), 1;
    COLUMNS(PLAIN, 0, TIMES) COLUMNS(PLAIN, 1, TIMES) COLUMNS(PLAIN, 0, OVER) COLUMNS(MAGIC, 0, TIMES)
    return 0;
}

/* Whether it did them: only those of the common kinds. */
INLINE int small(const float *x, float *out, int64_t n, const int64_t size, const Format *f, const float *scale,
                 const float *factor, float unit, uint64_t key, int64_t index) {
    const int kind = kind_of(f), over = f->rule == MAX;
#define SMALL(K, S, D)                                                                                             \
    if (kind == K && f->stochastic == S && over == (D == OVER))                                                    \
        return small_by(x, out, n, size, f, scale, factor, unit, key, index, K, S, D), 1;
    SMALL(PLAIN, 0, TIMES) SMALL(PLAIN, 1, TIMES) SMALL(PLAIN, 0, OVER) SMALL(MAGIC, 0, TIMES) SMALL(MAGIC, 0, OVER)
    return 0;
}

/* The scale above the blocks, from the bits of the largest magnitude that it covers. */
static float unit_scale(const Format *f, float above) {
    if (f->rule != NVFP4 || above == 0.0f) return 1.0f;
    return above < INFINITY ? above / f->full : NAN;
}

#define BATCH 64
#define CACHED 8192

/* Blocks first..last of x [lines, length, inner], of size elements along each line (the last of a line may be short).
 * unit_amax (bits) of every blocks_per_unit, for NVFP4. */
static void some_blocks(const float *x, float *out, const Format *f, const Format *block_format, int64_t first,
                        int64_t last, int64_t length, int64_t size, int64_t inner, const int32_t *unit_amax,
                        int64_t blocks_per_unit, const uint64_t *keys, int64_t per_key) {
    const int scaling = f->rule == MAX ? OVER : TIMES;
    const int64_t per_line = (length + size - 1) / size;
    const int64_t at_once = size >= CACHED ? 1 : CACHED / size < BATCH ? CACHED / size : BATCH;
    int32_t tops[BATCH];
    float scale[BATCH], factor[BATCH];
    for (int64_t r = first; r < last;) {
        const int64_t line = r / per_line, in_line = r % per_line;
        const float above = f->rule == NVFP4 ? as_float((uint32_t)unit_amax[r / blocks_per_unit]) : 0.0f;
        const float unit = unit_scale(f, above);
        const int64_t start = (line * length + in_line * size) * inner;
        const int64_t left = length - in_line * size;
        if (inner == 1) {
            /* whole blocks of one line, or, where lines have no short block, of one unit */
            int64_t n = left / size;
            if (length % size == 0) {
                const int64_t of_unit = blocks_per_unit - r % blocks_per_unit;
                n = f->rule == NVFP4 ? of_unit : last - r;
            }
            n = n < last - r ? n : last - r;
            n = n < at_once ? n : at_once;
            if (f->stochastic && n) { /* as many as have the first one's key, if that ends between blocks */
                const int64_t of_key = (per_key - start % per_key) / size;
                n = of_key && of_key < n ? of_key : n;
            }
            const int64_t width = n ? size : left, count = n ? n : 1;
            if (size == 16 && n) for (int64_t i = 0; i < n; i++) tops[i] = top_bits(x + start + i * 16, 16);
            else if (size == 32 && n) for (int64_t i = 0; i < n; i++) tops[i] = top_bits(x + start + i * 32, 32);
            else for (int64_t i = 0; i < count; i++) tops[i] = top_bits(x + start + i * width, width);
            scales(tops, count, above, f, block_format, scale, factor);
            const int one_key = !f->stochastic || start / per_key == (start + count * width - 1) / per_key;
            const uint64_t key = f->stochastic && one_key ? mix(keys[start / per_key]) : 0;
            const int64_t index = start % per_key;
            int done = 0;
            if (n && one_key && size == 16)
                done = small(x + start, out + start, n, 16, f, scale, factor, unit, key, index);
            else if (n && one_key && size == 32)
                done = small(x + start, out + start, n, 32, f, scale, factor, unit, key, index);
            for (int64_t i = 0; i < count && !done; i++)
                keyed(x + start + i * width, out + start + i * width, start + i * width, width, f, scale + i,
                      factor + i, unit, keys, per_key, scaling, 0);
            r += count;
            continue;
        }
        const int64_t rows = left < size ? left : size;
        const int one_key = !f->stochastic || start / per_key == (start + rows * inner - 1) / per_key;
        const uint64_t key = f->stochastic && one_key ? mix(keys[start / per_key]) : 0;
        const int64_t index = start % per_key;
        for (int64_t c = 0; c < inner; c += BATCH) {
            const int64_t width = inner - c < BATCH ? inner - c : BATCH;
            memset(tops, 0, sizeof tops);
            for (int64_t j = 0; j < rows; j++)
                for (int64_t i = 0; i < width; i++) {
                    const int32_t b = (int32_t)(as_bits(x[start + j * inner + c + i]) & 0x7FFFFFFFu);
                    tops[i] = b > tops[i] ? b : tops[i];
                }
            scales(tops, width, above, f, block_format, scale, factor);
            const float *from = x + start + c;
            if (one_key && columns(from, out + start + c, rows, width, inner, f, scale, factor, unit, key, index + c))
                continue;
            for (int64_t j = 0; j < rows; j++) {
                const int64_t at = start + j * inner + c;
                keyed(x + at, out + at, at, width, f, scale, factor, unit, keys, per_key, scaling, 1);
            }
        }
        r++;
    }
}

/* --- several threads: each takes the next few items until none is left ------------------------------------------- */

/* GOMP_parallel, of the OpenMP library that torch has loaded: torch's own threads, awake between its operations. */
typedef void Team(void (*)(void *), void *, unsigned, unsigned);

typedef struct Work {
    void (*part)(struct Work *, int64_t first, int64_t last);
    int64_t count, step, next; /* items; how many are taken at a time; the first that nobody has taken */
    const float *x;
    float *out;
    const Format *f, *block_format;
    int64_t height, length, size, inner;
    int32_t *unit_amax;
    int64_t per_unit; /* elements (largest, units) or blocks that share a unit */
    const uint64_t *keys;
    int64_t per_key;
    float scale, factor;
    const struct Walk *walk;
    int32_t found; /* the largest bits, or whether there was a NaN */
} Work;

static void take(void *data) {
    Work *w = data;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&w->next, w->step, __ATOMIC_RELAXED);
        if (first >= w->count) return;
        w->part(w, first, first + w->step < w->count ? first + w->step : w->count);
    }
}

#define TAKEN 65536 /* elements at a time: they stay in a core's cache, and no core waits long for another */

static void share(Work *w, int64_t item, Team *team, int32_t threads) {
    w->step = item < TAKEN ? TAKEN / (item ? item : 1) : 1;
    w->next = 0;
    if (team && threads > 1 && w->count > w->step) team(take, w, (unsigned)threads, 0);
    else take(w);
}

static void part_largest(Work *w, int64_t first, int64_t last) {
    const int32_t top = top_bits(w->x + first, last - first);
    int32_t seen = __atomic_load_n(&w->found, __ATOMIC_RELAXED);
    while (top > seen && !__atomic_compare_exchange_n(&w->found, &seen, top, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

static int32_t largest(const float *x, int64_t count, Team *team, int32_t threads) {
    Work w = {.part = part_largest, .count = count, .x = x};
    share(&w, 1, team, threads);
    return w.found;
}

static void part_flat(Work *w, int64_t first, int64_t last) {
    if (keyed(w->x + first, w->out + first, first, last - first, w->f, &w->scale, &w->factor, 1.0f, w->keys,
              w->per_key, w->f->rule == NONE ? UNSCALED : w->f->rule == MAX ? OVER : TIMES, 0))
        __atomic_store_n(&w->found, 1, __ATOMIC_RELAXED);
}

/* All of x shares one scale. Whether there was a NaN. */
int32_t flat(const float *x, float *out, const Format *f, int64_t count, const uint64_t *keys, int64_t per_key,
             Team *team, int32_t threads) {
    const int32_t amax = f->rule == NONE ? 0 : largest(x, count, team, threads);
    Work w = {.part = part_flat, .count = count, .x = x, .out = out, .f = f, .keys = keys, .per_key = per_key};
    scales(&amax, 1, 0.0f, f, f, &w.scale, &w.factor);
    share(&w, 1, team, threads);
    return w.found;
}

static void part_blocks(Work *w, int64_t first, int64_t last) {
    some_blocks(w->x, w->out, w->f, w->block_format, first, last, w->length, w->size, w->inner, w->unit_amax,
                w->per_unit, w->keys, w->per_key);
}

/* Units first..last, of which each is still in the cache when its largest magnitude is known. */
static void part_units(Work *w, int64_t first, int64_t last) {
    const int64_t lines = w->per_unit / ((w->length + w->size - 1) / w->size), elements = lines * w->length * w->inner;
    for (int64_t u = first; u < last; u++) {
        w->unit_amax[u] = top_bits(w->x + u * elements, elements);
        part_blocks(w, u * w->per_unit, (u + 1) * w->per_unit);
    }
}

/* One scale for each block, of size elements along each line of x [lines, length, inner], and column; for NVFP4 one
 * more for each of the units, equal parts of x. unit_amax: room for one number a unit. */
void blocks(const float *x, float *out, const Format *f, const Format *block_format, int64_t lines, int64_t length,
            int64_t inner, int64_t size, int64_t units, int32_t *unit_amax, const uint64_t *keys, int64_t per_key,
            Team *team, int32_t threads) {
    const int64_t count = lines * ((length + size - 1) / size), elements = lines * length * inner;
    Work w = {.part = part_blocks, .count = count, .x = x, .out = out, .f = f, .block_format = block_format,
              .length = length, .size = size, .inner = inner, .unit_amax = unit_amax, .per_unit = count / units,
              .keys = keys, .per_key = per_key};
    int64_t item = elements / count;
    if (f->rule == NVFP4 && units == 1) {
        *unit_amax = largest(x, elements, team, threads);
    } else if (f->rule == NVFP4) {
        w.part = part_units;
        w.count = units;
        item = elements / units;
    }
    share(&w, item, team, threads);
}

enum { WIDE = 2048 }; /* elements of a row of blocks at a time */

/* Rows first..last of square blocks, of x [planes, height, length, inner]. */
static void part_squares(Work *w, int64_t first, int64_t last) {
    const int64_t size = w->size, inner = w->inner, width = w->length * inner, at_once = WIDE / (size * inner);
    const int64_t per_plane = (w->height + size - 1) / size, most = at_once * size * inner;
    const int scaling = w->f->rule == MAX ? OVER : TIMES;
    const float above = w->f->rule == NVFP4 ? as_float((uint32_t)*w->unit_amax) : 0.0f, unit = unit_scale(w->f, above);
    int32_t peaks[WIDE], tops[WIDE];
    float scale[WIDE], factor[WIDE], scale_of[WIDE], factor_of[WIDE];
    for (int64_t b = first; b < last; b++) {
        const int64_t top = b % per_plane * size, rows = w->height - top < size ? w->height - top : size;
        for (int64_t c = 0; c < width; c += most) {
            const int64_t start = (b / per_plane * w->height + top) * width + c;
            const int64_t n = width - c < most ? width - c : most;
            memset(peaks, 0, sizeof peaks);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < n; i++) {
                    const int32_t bits = (int32_t)(as_bits(w->x[start + r * width + i]) & 0x7FFFFFFFu);
                    peaks[i] = bits > peaks[i] ? bits : peaks[i];
                }
            const int64_t blocks = (n + size * inner - 1) / (size * inner);
            for (int64_t i = 0; i < blocks * inner; i++) {
                tops[i] = 0;
                for (int64_t j = 0, at = i / inner * size * inner + i % inner; j < size; j++, at += inner)
                    tops[i] = peaks[at] > tops[i] ? peaks[at] : tops[i]; /* 0 beyond the last element */
            }
            scales(tops, blocks * inner, above, w->f, w->block_format, scale, factor);
            for (int64_t k = 0; k < blocks * size; k++) {
                memcpy(scale_of + k * inner, scale + k / size * inner, (size_t)inner * 4);
                memcpy(factor_of + k * inner, factor + k / size * inner, (size_t)inner * 4);
            }
            for (int64_t r = 0; r < rows; r++)
                keyed(w->x + start + r * width, w->out + start + r * width, start + r * width, n, w->f, scale_of,
                      factor_of, unit, w->keys, w->per_key, scaling, 1);
        }
    }
}

/* One scale for each block of size by size elements of x [planes, height, length, inner], and column; for NVFP4 one
 * more above all of them. Whether it did: blocks may be too large. */
int32_t squares(const float *x, float *out, const Format *f, const Format *block_format, int64_t planes,
                int64_t height, int64_t length, int64_t inner, int64_t size, const uint64_t *keys, int64_t per_key,
                Team *team, int32_t threads) {
    if (size * inner > WIDE) return 0;
    int32_t amax = f->rule == NVFP4 ? largest(x, planes * height * length * inner, team, threads) : 0;
    Work w = {.part = part_squares, .count = planes * ((height + size - 1) / size), .x = x, .out = out, .f = f,
              .block_format = block_format, .height = height, .length = length, .size = size, .inner = inner,
              .unit_amax = &amax, .keys = keys, .per_key = per_key};
    share(&w, size * length * inner, team, threads);
    return 1;
}

/* --- unfolded rows; also 16 positions at a time times diag(signs) H / 4: see gemms.py and rotation.py -------------- */

enum { TILE = 16, SPAN = 256 }; /* rows rotated together; columns at a time */
typedef float Lanes __attribute__((vector_size(4 * TILE), aligned(4), may_alias));
static const float SIGNS[TILE] = {1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1};

/* Of an image [height, width, channels], padding included, and a convolution over it. */
typedef struct Walk {
    int64_t height, width, channels, groups, kernel[2], stride[2], dilation[2], positions[2];
} Walk;

#define STAGE(APART)                                                                                               \
    _Pragma("GCC unroll 16") for (int t = 0; t < TILE; t++) if (!(t & APART)) {                                    \
        const Lanes a = v[t], b = v[t + APART];                                                                    \
        v[t] = a + b, v[t + APART] = a - b;                                                                        \
    }

/* Columns of 16 rows, read in whole multiples of 16, into rows of a matrix that lie `apart` elements apart. */
static void rotate_columns(const float *const *rows, float *out, int64_t columns, int64_t apart) {
    for (int64_t c = 0; c < columns; c += TILE) {
        Lanes v[TILE];
        _Pragma("GCC unroll 16") for (int t = 0; t < TILE; t++) v[t] = *(const Lanes *)(rows[t] + c) * SIGNS[t];
        STAGE(1) STAGE(2) STAGE(4) STAGE(8)
        for (int t = 0; t < TILE; t++) v[t] *= 0.25f;
        if (columns - c >= TILE)
            _Pragma("GCC unroll 16") for (int t = 0; t < TILE; t++) *(Lanes *)(out + t * apart + c) = v[t];
        else
            for (int t = 0; t < TILE; t++) memcpy(out + t * apart + c, v + t, (size_t)(columns - c) * 4);
    }
}

/* Few numbers at a time: a call of memcpy would cost more. */
INLINE void copy(float *to, const float *from, int64_t n) {
    for (; n >= 8; n -= 8, to += 8, from += 8) memcpy(to, from, 32);
    for (; n > 0; n--) *to++ = *from++;
}

/* What lies in a row in memory: a kernel's row of all channels, or one kernel position's channels. */
INLINE int64_t run_length(const Walk *g) {
    const int64_t own = g->channels / g->groups;
    return g->groups == 1 && g->dilation[1] == 1 ? g->kernel[1] * own : own;
}

/* Positions first..last of out [images, groups, positions, kernel * channels / groups]. */
static void part_unfolded(Work *w, int64_t first, int64_t last) {
    const Walk g = *w->walk;
    const int64_t positions = g.positions[0] * g.positions[1], own = g.channels / g.groups;
    const int64_t length = run_length(&g), across = length == own ? g.kernel[1] : 1;
    const int64_t runs = g.kernel[0] * g.kernel[1] * own / length;
    float *out = w->out + first * runs * length;
    for (int64_t item = first; item < last; item++) {
        const int64_t unit = item / positions, position = item % positions;
        const int64_t y = position / g.positions[1] * g.stride[0], x = position % g.positions[1] * g.stride[1];
        const float *corner = w->x + ((unit / g.groups * g.height + y) * g.width + x) * g.channels + unit % g.groups * own;
        for (int64_t r = 0; r < runs; r++, out += length)
            copy(out, corner + (r / across * g.dilation[0] * g.width + r % across * g.dilation[1]) * g.channels, length);
    }
}

/* x [images, height, width, channels], padding included, unfolded into rows of kernel positions, channels innermost. */
void unfold(const float *x, float *out, int64_t images, const Walk *walk, Team *team, int32_t threads) {
    const int64_t positions = walk->positions[0] * walk->positions[1];
    Work w = {.part = part_unfolded, .count = images * walk->groups * positions, .x = x, .out = out, .walk = walk};
    share(&w, walk->kernel[0] * walk->kernel[1] * (walk->channels / walk->groups), team, threads);
}

/* Tiles first..last of out [images, groups, tiles, TILE, kernel * channels / groups]. */
static void part_rotated(Work *w, int64_t first, int64_t last) {
    const Walk g = *w->walk;
    const int64_t positions = g.positions[0] * g.positions[1], tiles = (positions + TILE - 1) / TILE;
    const int64_t own = g.channels / g.groups, features = g.kernel[0] * g.kernel[1] * own;
    const int64_t length = run_length(&g), across = length == own ? g.kernel[1] : 1, runs = features / length;
    float buffer[TILE][SPAN] __attribute__((aligned(64)));
    const float *buffered[TILE], *corner[TILE], *from[TILE];
    memset(buffer, 0, sizeof buffer);
    for (int t = 0; t < TILE; t++) buffered[t] = buffer[t];
    for (int64_t item = first; item < last; item++) {
        const float *image = w->x + item / tiles / g.groups * (g.height * g.width * g.channels);
        float *out = w->out + item * TILE * features;
        const int64_t position = item % tiles * TILE, left = positions - position, real = left < TILE ? left : TILE;
        for (int64_t t = 0; t < real; t++) {
            const int64_t y = (position + t) / g.positions[1] * g.stride[0], x = (position + t) % g.positions[1] * g.stride[1];
            corner[t] = image + (y * g.width + x) * g.channels + item / tiles % g.groups * own;
        }
        const int whole = real == TILE && length % TILE == 0; /* then nothing is read that is not there */
        int64_t filled = 0;
        for (int64_t r = 0; r < runs; r++) {
            const int64_t to = (r / across * g.dilation[0] * g.width + r % across * g.dilation[1]) * g.channels;
            if (whole) {
                for (int t = 0; t < TILE; t++) from[t] = corner[t] + to;
                rotate_columns(from, out, length, features);
                out += length;
                continue;
            }
            for (int64_t a = 0, count; a < length; a += count) {
                count = length - a < SPAN - filled ? length - a : SPAN - filled;
                for (int64_t t = 0; t < real; t++) copy(buffer[t] + filled, corner[t] + to + a, count);
                filled += count;
                if (filled == SPAN || (r == runs - 1 && a + count == length)) {
                    for (int64_t t = real; t < TILE; t++) memset(buffer[t], 0, sizeof buffer[t]); /* beyond the last */
                    rotate_columns(buffered, out, filled, features);
                    out += filled;
                    filled = 0;
                }
            }
        }
    }
}

/* The same rows, rotated. */
void unfold_and_rotate(const float *x, float *out, int64_t images, const Walk *walk, Team *team, int32_t threads) {
    const int64_t tiles = (walk->positions[0] * walk->positions[1] + TILE - 1) / TILE;
    const int64_t features = walk->kernel[0] * walk->kernel[1] * (walk->channels / walk->groups);
    Work w = {.part = part_rotated, .count = images * walk->groups * tiles, .x = x, .out = out, .walk = walk};
    share(&w, TILE * features, team, threads);
}

/* Asks for large pages inside fresh memory. */
void large_pages(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21, first = ((uintptr_t)memory + page - 1) & -page;
    const uintptr_t last = ((uintptr_t)memory + (uintptr_t)bytes) & -page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}
