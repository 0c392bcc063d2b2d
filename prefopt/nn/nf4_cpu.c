/* 4-bit codes -> float32 or bfloat16, for the CPU: out[i] = round(table[code i] * a[i / block]).

   The scale a of a block is a float32, or of 8 bits: a = dynamic[k] * nested[block / 256] + offset.
   Every operation is rounded to float32 on its own, so the bits are those of the torch
   specification (nf4.py). The first of two codes stands in the high half of its byte. Compiled at
   first use by nf4_cpu.py; without AVX-512 the plain loops below serve, in the same bits. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

typedef struct {
    const uint8_t *codes;
    const void *scales; /* uint8 if nested, else float32 */
    const float *nested, *dynamic, *table;
    float offset;
    void *out;
    long n, block, begin, end; /* elements, elements per scale, range of blocks */
} Job;

static float scale_of(const Job *job, long b) {
    if (!job->nested) return ((const float *)job->scales)[b];
    return job->dynamic[((const uint8_t *)job->scales)[b]] * job->nested[b / 256] + job->offset;
}

/* To bfloat16: to nearest, ties to even; a NaN stays one. */
#ifdef WIDE
static __m512i bf16_table(const float *table, float scale) { /* 16 results in the low half */
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i high = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    high = _mm512_srli_epi32(high, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    high = _mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_castsi256_si512(_mm512_cvtepi32_epi16(high));
}
#else
static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#endif

static void decode_f32(const Job *job, long b) {
    const long from = b * job->block;
    const long count = from + job->block < job->n ? job->block : job->n - from;
    const uint8_t *codes = job->codes + from / 2;
    float *out = (float *)job->out + from;
    const float scale = scale_of(job, b);
    long i = 0;
#ifdef WIDE
    const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(job->table), _mm512_set1_ps(scale));
    for (; i + 16 <= count; i += 16) { /* a byte to 64 bits, its halves to 32 each */
        __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
        __m512i low = _mm512_slli_epi64(_mm512_and_si512(byte, _mm512_set1_epi64(15)), 32);
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), low);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, table));
    }
#endif
    for (; i < count; i++) {
        const int shift = i & 1 ? 0 : 4;
        out[i] = job->table[codes[i / 2] >> shift & 15] * scale;
    }
}

static void decode_bf16(const Job *job, long b) {
    const long from = b * job->block;
    const long count = from + job->block < job->n ? job->block : job->n - from;
    const uint8_t *codes = job->codes + from / 2;
    const float scale = scale_of(job, b);
    uint16_t *out = (uint16_t *)job->out + from, table[16];
    long i = 0;
#ifdef WIDE
    const __m512i wide = bf16_table(job->table, scale);
    _mm256_storeu_si256((__m256i *)table, _mm512_castsi512_si256(wide));
    for (; i + 32 <= count; i += 32) { /* a byte to 32 bits, its halves to 16 each */
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i low = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(15)), 16);
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), low);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, wide));
    }
#else
    for (int k = 0; k < 16; k++) table[k] = to_bf16(job->table[k] * scale);
#endif
    for (; i < count; i++) {
        const int shift = i & 1 ? 0 : 4;
        out[i] = table[codes[i / 2] >> shift & 15];
    }
}

static void *run_f32(void *job) {
    for (long b = ((Job *)job)->begin; b < ((Job *)job)->end; b++) decode_f32(job, b);
    return 0;
}

static void *run_bf16(void *job) {
    for (long b = ((Job *)job)->begin; b < ((Job *)job)->end; b++) decode_bf16(job, b);
    return 0;
}

/* block is even. Threads live for this call only: nothing is left behind that a fork could break. */
void decode(const uint8_t *codes, const void *scales, const float *nested, const float *offset,
            const float *dynamic, const float *table, void *out, long n, long block, int bf16,
            int threads) {
    enum { MOST = 64 };
    void *(*run)(void *) = bf16 ? run_bf16 : run_f32;
    const long blocks = (n + block - 1) / block;
    Job jobs[MOST];
    pthread_t started[MOST];
    int ok[MOST] = {0};
    if (threads > MOST) threads = MOST;
    for (int t = 0; t < threads; t++) {
        jobs[t] = (Job){codes, scales, nested, dynamic, table, nested ? *offset : 0, out, n, block,
                        blocks * t / threads, blocks * (t + 1) / threads};
        if (t + 1 < threads) ok[t] = !pthread_create(&started[t], 0, run, &jobs[t]);
        if (!ok[t]) run(&jobs[t]); /* the last range, or no thread to be had */
    }
    for (int t = 0; t < threads; t++)
        if (ok[t]) pthread_join(started[t], 0);
}
