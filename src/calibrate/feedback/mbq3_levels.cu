// MBQ3's levels and codes by the feedback: what `Columns::search` (columns.rs) does on the CPU, for the 128 columns of one
// block and any number of rows. Sums are in other orders, so that near ties may fall another way.
//
// Half a warp has a row, each of its threads one of sixteen candidates for the levels. Where columns are worked on side by side,
// a thread has every sixteenth.
#include <cuda_fp16.h>

namespace {

constexpr int N = 128;
constexpr int LANES = 16;
constexpr int OWN = N / LANES;
constexpr int ROWS = 4;
constexpr int PASSES = 4;
constexpr float TOP = 7.0f;
constexpr unsigned ALL = 0xffffffffu;
// Of a row of the output: errors, codes (four in the bits of a float), d and m.
constexpr int WIDTH = N + N / 4 + 2;

struct Levels {
    float d, m;
};

struct Row {
    float errors[N][LANES];
    unsigned places[N / 8][LANES]; // eight of a candidate's in a word
    float targets[N], original[N], ahead[N];
};

__device__ float half_of(float x) {
    return __half2float(__float2half_rn(x));
}

__device__ Levels stored(float d, float m) {
    return {half_of(d), half_of(m)};
}

// The code that is nearest to x; some code for what is not a number.
__device__ float place(float x) {
    x = x > 0.0f ? x : 0.0f;
    return rintf(x < TOP ? x : TOP);
}

template <typename T> __device__ T sum(T x) {
    for (int s = LANES / 2; s > 0; s /= 2) x += __shfl_xor_sync(ALL, x, s, LANES);
    return x;
}

// The lane of the least x, the first of several.
__device__ int least_lane(float x, int lane) {
    int at = lane;
    x = x == x ? x : INFINITY;
    for (int s = LANES / 2; s > 0; s /= 2) {
        const float other = __shfl_xor_sync(ALL, x, s, LANES);
        const int other_at = __shfl_xor_sync(ALL, at, s, LANES);
        if (other < x || (other == x && other_at < at)) x = other, at = other_at;
    }
    return at;
}

// Each column adds to those after it x times M's entry there; AHEAD: x less the column's own sum.
template <bool AHEAD> __device__ void hand_on(const float * __restrict__ m, int lane, const float (&x)[OWN], float (&out)[OWN]) {
#pragma unroll
    for (int q = 0; q < OWN; q++) {
#pragma unroll 4
        for (int j = 0; j < LANES; j++) {
            const float factor = __shfl_sync(ALL, AHEAD ? x[q] - out[q] : x[q], j, LANES);
            const float * row = m + (q * LANES + j) * N + lane;
#pragma unroll
            for (int p = q; p < OWN; p++) {
                if (p > q || lane > j) out[p] += factor * __ldg(row + p * LANES);
            }
        }
    }
}

// Simple::fit: of clipped ranges, each improved by least squares, the one of least weighted error.
__device__ Levels fit(const Row & row, const float * share, int lane) {
    float low = INFINITY, high = -INFINITY;
    double n = 0, y = 0;
    for (int i = lane; i < N; i += LANES) {
        const float w = row.ahead[i];
        low = fminf(low, w), high = fmaxf(high, w);
        n += share[i], y += double(share[i]) * w;
    }
    for (int s = LANES / 2; s > 0; s /= 2) {
        low = fminf(low, __shfl_xor_sync(ALL, low, s, LANES));
        high = fmaxf(high, __shfl_xor_sync(ALL, high, s, LANES));
    }
    n = sum(n), y = sum(y);
    const float step = fmaxf(high - low, 1e-5f) / TOP, d = half_of(step);
    const Levels plain = {d, half_of(0.0f - d * place(-(low / step)))};
    const float part = 1.0f - 0.05f * lane;
    Levels now = lane < 9 ? stored((high - low) * part / TOP, low + (high - low) * (1.0f - part) / 2.0f) : plain;
    Levels best = plain;
    float least = INFINITY;
#pragma unroll 1
    for (int improved = 0; improved < 3; improved++) {
        if (!(isfinite(now.d) && isfinite(now.m))) break;
        const float per_d = 1.0f / now.d;
        float error = 0, c1 = 0, c2 = 0, cy = 0;
#pragma unroll 4
        for (int i = 0; i < N; i++) {
            const float w = row.ahead[i], h = share[i], c = place((w - now.m) * per_d), e = w - (now.d * c + now.m);
            error += h * e * e, c1 += h * c, c2 += h * c * c, cy += h * c * w;
        }
        if (error < least) least = error, best = now;
        const double determinant = n * c2 - double(c1) * c1;
        // Sums of 128 in f32 are good to some 1e-6.
        if (!(determinant > 1e-4 * n * c2)) break;
        now = stored(float((n * cy - c1 * y) / determinant), float((c2 * y - double(c1) * cy) / determinant));
    }
    __syncwarp();
    const int at = least_lane(least, lane);
    return {__shfl_sync(ALL, best.d, at, LANES), __shfl_sync(ALL, best.m, at, LANES)};
}

// Simple::candidates, this thread's.
__device__ Levels candidate(Levels best, int pass, int lane) {
    if (pass == 0 && lane == 0) return best;
    const float far = ldexpf(1.0f, -pass), middle = best.m + best.d * TOP / 2.0f;
    auto at = [&](float step) {
        const float x = 0.5f + float(pass * LANES + lane) * step;
        return 2.0f * (x - truncf(x)) - 1.0f;
    };
    const float d = best.d * (1.0f + 0.15f * far * at(0.7548777f));
    return stored(d, middle - d * TOP / 2.0f + best.d * 0.6f * far * at(0.5698403f));
}

// Rounds the columns with this thread's levels; the error, counting how errors are handed on within the block.
__device__ float race(Row & row, const float * __restrict__ m, const float * share, Levels levels, int lane) {
    constexpr int TILE = 16;
    const float per_d = 1.0f / levels.d;
    float cost = 0;
#pragma unroll 1
    for (int start = 0; start < N; start += TILE) {
        float targets[TILE];
#pragma unroll
        for (int c = 0; c < TILE; c++) targets[c] = row.targets[start + c];
#pragma unroll 4
        for (int j = 0; j < start; j++) {
            const float e = row.errors[j][lane];
            const float4 * by = reinterpret_cast<const float4 *>(m + j * N + start);
#pragma unroll
            for (int c = 0; c < TILE; c += 4) {
                const float4 f = __ldg(by + c / 4);
                targets[c] += e * f.x, targets[c + 1] += e * f.y, targets[c + 2] += e * f.z, targets[c + 3] += e * f.w;
            }
        }
        unsigned places[2] = {0, 0};
#pragma unroll
        for (int c = 0; c < TILE; c++) {
            const int i = start + c;
            const float p = place((targets[c] - levels.m) * per_d), value = levels.d * p + levels.m;
            const float left = targets[c] - value, e = row.original[i] - value;
            cost += share[i] * left * left;
            row.errors[i][lane] = e;
            places[c / 8] |= unsigned(p) << (4 * (c % 8));
#pragma unroll
            for (int next = c + 1; next < TILE; next++) targets[next] += e * __ldg(m + i * N + start + next);
        }
        row.places[start / 8][lane] = places[0];
        row.places[start / 8 + 1][lane] = places[1];
    }
    return cost;
}

} // namespace

// t and original: [rows, N], what the columns should become and what they are; m: [N + 1, N], the corner of M, and under it D's
// share; out: [rows, WIDTH].
extern "C" __global__ void __launch_bounds__(ROWS * LANES)
mbq3_levels(const float * __restrict__ t, const float * __restrict__ original, const float * __restrict__ m, float * __restrict__ out, int rows) {
    __shared__ Row all[ROWS];
    __shared__ float share[N];
    const int lane = threadIdx.x % LANES, wanted = blockIdx.x * ROWS + threadIdx.x / LANES;
    const int r = min(wanted, rows - 1); // a row too many does the last one's work and keeps it to itself
    Row & row = all[threadIdx.x / LANES];
    for (int i = threadIdx.x; i < N; i += ROWS * LANES) share[i] = m[N * N + i];
    float own[OWN], ahead[OWN], a[OWN], ones[OWN], one[OWN], codes[OWN];
    for (int q = 0; q < OWN; q++) {
        const int i = q * LANES + lane;
        own[q] = row.original[i] = original[size_t(r) * N + i];
        ahead[q] = row.targets[i] = t[size_t(r) * N + i];
        a[q] = own[q], ones[q] = one[q] = 1.0f;
    }
    hand_on<true>(m, lane, own, ahead);
    for (int q = 0; q < OWN; q++) row.ahead[q * LANES + lane] = ahead[q];
    __syncthreads();
    // What is left of the block if every value is 0, and of values of 1: Refit in columns.rs.
    hand_on<false>(m, lane, own, a);
    hand_on<false>(m, lane, one, ones);
    for (int q = 0; q < OWN; q++) a[q] += row.targets[q * LANES + lane] - own[q], codes[q] = 0.0f;

    Levels best = fit(row, share, lane);
    float least = INFINITY;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const Levels mine = candidate(best, pass, lane);
        const float cost = race(row, m, share, mine, lane);
        __syncwarp();
        const int winner = least_lane(cost, lane);
        const float error = __shfl_sync(ALL, cost, winner, LANES);
        const float d = __shfl_sync(ALL, mine.d, winner, LANES), shift = __shfl_sync(ALL, mine.m, winner, LANES);
        if (error < least || pass == 0) {
            best = {d, shift}, least = error;
            for (int q = 0; q < OWN; q++) codes[q] = row.places[q * 2 + lane / 8][winner] >> (4 * (lane % 8)) & 15u;
        }
        __syncwarp();
        float p[OWN];
        for (int q = 0; q < OWN; q++) p[q] = codes[q];
        hand_on<false>(m, lane, codes, p);
        double pp = 0, pq = 0, qq = 0, ap = 0, aq = 0;
        for (int q = 0; q < OWN; q++) {
            const double h = share[q * LANES + lane], left = a[q], x = p[q], o = ones[q];
            pp += h * x * x, pq += h * x * o, qq += h * o * o, ap += h * left * x, aq += h * left * o;
        }
        pp = sum(pp), pq = sum(pq), qq = sum(qq), ap = sum(ap), aq = sum(aq);
        const double determinant = pp * qq - pq * pq;
        Levels refitted = best;
        if (determinant > 1e-9 * pp * qq) {
            refitted = stored(float((ap * qq - aq * pq) / determinant), float((aq * pp - ap * pq) / determinant));
        }
        float left = 0;
        for (int q = 0; q < OWN; q++) {
            const float e = a[q] - refitted.d * p[q] - refitted.m * ones[q];
            left += share[q * LANES + lane] * e * e;
        }
        left = sum(left);
        if (left < least) best = refitted, least = left;
    }

    unsigned char * bytes = reinterpret_cast<unsigned char *>(row.places);
    for (int q = 0; q < OWN; q++) bytes[q * LANES + lane] = static_cast<unsigned char>(codes[q]);
    __syncwarp();
    if (wanted >= rows) return;
    float * to = out + size_t(r) * WIDTH;
    for (int q = 0; q < OWN; q++) to[q * LANES + lane] = own[q] - (best.d * codes[q] + best.m);
    const unsigned * words = reinterpret_cast<const unsigned *>(row.places);
    for (int i = lane; i < N / 4; i += LANES) to[N + i] = __uint_as_float(words[i]);
    if (lane == 0) to[N + N / 4] = best.d, to[N + N / 4 + 1] = best.m;
}
