// MBQ3's levels and codes by the feedback: what `Columns::search` (columns.rs) does on the CPU, for the 128 columns of one
// block and any number of rows. Sums are in other orders, so that near ties may fall another way.
//
// Two warps have a row. Where candidates for the levels race, eight threads have two candidates, and of the columns every
// eighth four; everywhere else both warps do the same, each thread with four columns next to one another.
#include <cuda_fp16.h>

namespace {

constexpr int N = 128;
constexpr int WARP = 32;
constexpr int THREADS = 2 * WARP; // of a row
constexpr int OWN = N / WARP;
constexpr int CANDIDATES = 16;
constexpr int TEAM = 8; // threads of two candidates
constexpr int TURNS = N / (TEAM * OWN);
constexpr int PASSES = 4;
constexpr float TOP = 7.0f;
constexpr unsigned ALL = 0xffffffffu;

struct Levels {
    float d, m;
};

struct Row {
    float targets[N], original[N], share[N];
    // Of a pass, by its parity, and a warp: the best candidate's codes, which it is, and its error.
    unsigned codes[2][2][N / OWN];
    int winner[2][2];
    float error[2][2];
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

// Over threads whose numbers differ by less than `width`.
template <typename T> __device__ T sum(T x, int width = WARP) {
    for (int s = width / 2; s > 0; s /= 2) x += __shfl_xor_sync(ALL, x, s);
    return x;
}

// The number with the least x, the first of several.
__device__ void least_of(float & x, int & number, int from) {
    x = x == x ? x : INFINITY;
    for (int s = from; s < WARP; s *= 2) {
        const float other = __shfl_xor_sync(ALL, x, s);
        const int other_number = __shfl_xor_sync(ALL, number, s);
        if (other < x || (other == x && other_number < number)) x = other, number = other_number;
    }
}

__device__ void store(float * to, const float (&x)[OWN]) {
    *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ void load(float (&x)[OWN], const float * from) {
    const float4 all = *reinterpret_cast<const float4 *>(from);
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
}

// M^T x: each column adds to itself and to those after it x times M's entry there.
__device__ void handed(const float * m, const float * x, int lane, float (&out)[OWN]) {
    for (int c = 0; c < OWN; c++) out[c] = 0.0f;
#pragma unroll 4
    for (int i = 0; i < N; i += OWN) {
        float by[OWN], row[OWN];
        load(by, x + i);
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            load(row, m + (i + j) * N + lane * OWN);
#pragma unroll
            for (int c = 0; c < OWN; c++) out[c] += by[j] * row[c];
        }
    }
}

// The targets as they would be without any rounding: each column hands on its weight less its target.
__device__ void look_ahead(const float * m, int lane, const float (&own)[OWN], float (&ahead)[OWN]) {
#pragma unroll 4
    for (int owner = 0; owner < WARP; owner++) {
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const float e = __shfl_sync(ALL, own[j] - ahead[j], owner);
            float row[OWN];
            load(row, m + (owner * OWN + j) * N + lane * OWN);
            // Not to itself, which M has a 1 for.
#pragma unroll
            for (int c = 0; c < OWN; c++) ahead[c] += c <= j && lane == owner ? 0.0f : e * row[c];
        }
    }
}

// Simple::fit: of clipped ranges, each improved by least squares, the one of least weighted error. Two threads have a range.
__device__ Levels fit(const float * ahead, const float * share, int lane) {
    float low = INFINITY, high = -INFINITY, w[OWN], h[OWN];
    double n = 0, y = 0;
    load(w, ahead + lane * OWN), load(h, share + lane * OWN);
    for (int c = 0; c < OWN; c++) {
        low = fminf(low, w[c]), high = fmaxf(high, w[c]);
        n += h[c], y += double(h[c]) * w[c];
    }
    for (int s = WARP / 2; s > 0; s /= 2) {
        low = fminf(low, __shfl_xor_sync(ALL, low, s));
        high = fmaxf(high, __shfl_xor_sync(ALL, high, s));
    }
    n = sum(n), y = sum(y);
    const float step = fmaxf(high - low, 1e-5f) / TOP, d = half_of(step);
    const Levels plain = {d, half_of(0.0f - d * place(-(low / step)))};
    int range = lane / 2;
    const float part = 1.0f - 0.05f * range;
    Levels now = range < 9 ? stored((high - low) * part / TOP, low + (high - low) * (1.0f - part) / 2.0f) : plain;
    Levels best = plain;
    float least = INFINITY;
    bool improving = true;
#pragma unroll 1
    for (int improved = 0; improved < 3; improved++) {
        improving = improving && isfinite(now.d) && isfinite(now.m);
        const float per_d = 1.0f / now.d;
        float error = 0, c1 = 0, c2 = 0, cy = 0;
#pragma unroll 4
        for (int i = lane % 2; i < N; i += 2) {
            const float w = ahead[i], h = share[i], c = place((w - now.m) * per_d), e = w - (now.d * c + now.m);
            error += h * e * e, c1 += h * c, c2 += h * c * c, cy += h * c * w;
        }
        error = sum(error, 2), c1 = sum(c1, 2), c2 = sum(c2, 2), cy = sum(cy, 2);
        if (improving && error < least) least = error, best = now;
        const double determinant = n * c2 - double(c1) * c1;
        // Sums of 128 in f32 are good to some 1e-6.
        improving = improving && determinant > 1e-4 * n * c2;
        if (improving) now = stored(float((n * cy - c1 * y) / determinant), float((c2 * y - double(c1) * cy) / determinant));
    }
    least_of(least, range, 2);
    return {__shfl_sync(ALL, best.d, 2 * range), __shfl_sync(ALL, best.m, 2 * range)};
}

// Simple::candidates, one of them.
__device__ Levels candidate(Levels best, int pass, int number) {
    if (pass == 0 && number == 0) return best;
    const float far = ldexpf(1.0f, -pass), middle = best.m + best.d * TOP / 2.0f;
    auto at = [&](float step) {
        const float x = 0.5f + float(pass * CANDIDATES + number) * step;
        return 2.0f * (x - truncf(x)) - 1.0f;
    };
    const float d = best.d * (1.0f + 0.15f * far * at(0.7548777f));
    return stored(d, middle - d * TOP / 2.0f + best.d * 0.6f * far * at(0.5698403f));
}

// Rounds the columns with two candidates' levels, the team's threads taking turns of four columns; their errors, counting how
// errors are handed on within the block, and this thread's codes, four bits each.
__device__ void race(const Row & row, const float * m, const Levels (&levels)[2], int member, float (&cost)[2], unsigned (&codes)[2][2]) {
    // A number of this size has no bits for fractions: adding it rounds to the nearest whole, which is left in the lowest bits.
    constexpr float WHOLE = 12582912.0f;
    float t[2][TURNS][OWN], scale[2], shift[2];
    for (int k = 0; k < 2; k++) {
        scale[k] = 1.0f / (levels[k].d * TOP), shift[k] = -levels[k].m * scale[k];
        codes[k][0] = codes[k][1] = 0;
    }
    for (int q = 0; q < TURNS; q++) {
        load(t[0][q], row.targets + (q * TEAM + member) * OWN);
        for (int c = 0; c < OWN; c++) t[1][q][c] = t[0][q][c];
    }
#pragma unroll
    for (int q = 0; q < TURNS; q++) {
        float original[OWN];
        load(original, row.original + (q * TEAM + member) * OWN);
#pragma unroll 1
        for (int turn = 0; turn < TEAM; turn++) {
            const bool mine = turn == member;
            const float * rows = m + (q * TEAM + turn) * OWN * N + member * OWN;
#pragma unroll
            for (int c = 0; c < OWN; c++) {
                float by[TURNS][OWN];
#pragma unroll
                for (int p = q; p < TURNS; p++) load(by[p], rows + c * N + p * TEAM * OWN);
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float whole = __saturatef(t[k][q][c] * scale[k] + shift[k]) * TOP + WHOLE;
                    const float value = levels[k].d * (whole - WHOLE) + levels[k].m, left = t[k][q][c] - value;
                    const float e = __shfl_sync(ALL, original[c] - value, turn, TEAM);
#pragma unroll
                    for (int p = q; p < TURNS; p++) {
#pragma unroll
                        for (int j = 0; j < OWN; j++) t[k][p][j] += e * by[p][j];
                    }
                    // Nothing is added to it any more: below its diagonal M is zero.
                    if (mine) t[k][q][c] = left;
                    if (mine) codes[k][q / 2] |= (__float_as_uint(whole) & 7u) << (q % 2 * 16 + c * 4);
                }
            }
        }
    }
    for (int k = 0; k < 2; k++) {
        cost[k] = 0;
        for (int q = 0; q < TURNS; q++) {
            float share[OWN];
            load(share, row.share + (q * TEAM + member) * OWN);
            for (int c = 0; c < OWN; c++) cost[k] += share[c] * t[k][q][c] * t[k][q][c];
        }
        cost[k] = sum(cost[k], TEAM);
    }
}

// The best of this pass' candidates among both warps': its number and error, and this thread's four codes as whole bytes.
__device__ int best_of(Row & row, const float * m, Levels best, int pass, int thread, float & error, unsigned & codes) {
    const int lane = thread % WARP, warp = thread / WARP, member = lane % TEAM, first = thread / TEAM * 2;
    const Levels levels[2] = {candidate(best, pass, first), candidate(best, pass, first + 1)};
    float cost[2];
    unsigned found[2][2];
    race(row, m, levels, member, cost, found);
    const bool second = cost[1] < cost[0] || !(cost[0] == cost[0]);
    int winner = first + second;
    error = second ? cost[1] : cost[0];
    least_of(error, winner, TEAM);
    unsigned (&to)[N / OWN] = row.codes[pass % 2][warp];
    if (winner / 2 == first / 2) {
        for (int q = 0; q < TURNS; q++) {
            const unsigned four = (winner % 2 ? found[1][q / 2] : found[0][q / 2]) >> (q % 2 * 16);
            to[q * TEAM + member] = (four & 7u) | (four >> 4 & 7u) << 8 | (four >> 8 & 7u) << 16 | (four >> 12 & 7u) << 24;
        }
    }
    if (lane == 0) row.winner[pass % 2][warp] = winner, row.error[pass % 2][warp] = error;
    __syncthreads();
    const int other = row.error[pass % 2][1] < row.error[pass % 2][0];
    error = row.error[pass % 2][other];
    codes = row.codes[pass % 2][other][lane];
    return row.winner[pass % 2][other];
}

// Refit::levels: those of least error for codes of which `p` is what is handed on, and that error; `now` where codes do not
// determine them.
__device__ Levels refit(const Row & row, int lane, const float (&a)[OWN], const float (&p)[OWN], const float (&ones)[OWN], Levels now, float & error) {
    double pp = 0, pq = 0, qq = 0, ap = 0, aq = 0;
    float share[OWN];
    load(share, row.share + lane * OWN);
    for (int c = 0; c < OWN; c++) {
        const double h = share[c], left = a[c], x = p[c], o = ones[c];
        pp += h * x * x, pq += h * x * o, qq += h * o * o, ap += h * left * x, aq += h * left * o;
    }
    pp = sum(pp), pq = sum(pq), qq = sum(qq), ap = sum(ap), aq = sum(aq);
    const double determinant = pp * qq - pq * pq;
    if (determinant > 1e-9 * pp * qq) {
        now = stored(float((ap * qq - aq * pq) / determinant), float((aq * pp - ap * pq) / determinant));
    }
    error = 0;
    for (int c = 0; c < OWN; c++) {
        const float e = a[c] - now.d * p[c] - now.m * ones[c];
        error += share[c] * e * e;
    }
    error = sum(error);
    return now;
}

// One row. `all`: room for N floats of this warp, for what all its threads are to see.
__device__ Levels search(Row & row, const float * m, float * all, int thread, unsigned & codes) {
    const int lane = thread % WARP;
    float own[OWN], ahead[OWN], a[OWN], ones[OWN], p[OWN];
    load(own, row.original + lane * OWN), load(ahead, row.targets + lane * OWN);
    // What is left of the block if every value is 0, and of values of 1: Refit in columns.rs.
    handed(m, row.original, lane, a);
    for (int c = 0; c < OWN; c++) a[c] += ahead[c] - own[c], p[c] = 1.0f;
    store(all + lane * OWN, p);
    __syncwarp();
    handed(m, all, lane, ones);
    look_ahead(m, lane, own, ahead);
    __syncwarp();
    store(all + lane * OWN, ahead);
    __syncwarp();
    Levels best = fit(all, row.share, lane);
    float least = INFINITY;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        float error;
        unsigned found;
        const int winner = best_of(row, m, best, pass, thread, error, found);
        if (error < least || pass == 0) best = candidate(best, pass, winner), least = error, codes = found;
        for (int c = 0; c < OWN; c++) p[c] = float(codes >> (8 * c) & 7u);
        __syncwarp();
        store(all + lane * OWN, p);
        __syncwarp();
        handed(m, all, lane, p);
        const Levels refitted = refit(row, lane, a, p, ones, best, error);
        if (error < least) best = refitted, least = error;
    }
    return best;
}

} // namespace

// Columns of one block: w: what they are, [rows, N] of [rows, n]; product: what the columns before add to that, [rows, N], if
// there are any; m: M's corner, of [n, n]; share: D over its largest. errors: w less values; values; numbers: of each
// row, `fetched` apart, codes, four in the bits of a float, then d and m.
extern "C" __global__ void __launch_bounds__(2 * THREADS)
mbq3_levels(const float * __restrict__ w, const float * __restrict__ product, const float * __restrict__ m, const float * __restrict__ share,
            float * __restrict__ errors, float * __restrict__ values, float * __restrict__ numbers, int rows, int n, int fetched, int first) {
    extern __shared__ __align__(16) float room[];
    float * corner = room; // N x N
    const int thread = threadIdx.x % THREADS, lane = thread % WARP, slot = threadIdx.x / THREADS, slots = blockDim.x / THREADS;
    float * all = room + N * N + threadIdx.x / WARP * N;
    Row & row = reinterpret_cast<Row *>(room + N * N + slots * 2 * N)[slot];
#pragma unroll 8
    for (int i = threadIdx.x * OWN; i < N * N; i += blockDim.x * OWN) {
        *reinterpret_cast<float4 *>(corner + i) = *reinterpret_cast<const float4 *>(m + size_t(i / N) * n + i % N);
    }
    for (int start = blockIdx.x * slots; start < rows; start += gridDim.x * slots) {
        // A row too many does the last one's work and keeps it to itself.
        const size_t r = min(start + slot, rows - 1);
        __syncthreads();
        for (int i = thread; i < N; i += THREADS) {
            const float own = w[r * n + i];
            row.original[i] = own;
            row.targets[i] = first ? own : own + product[r * N + i];
            row.share[i] = share[i];
        }
        __syncthreads();
        unsigned codes;
        const Levels best = search(row, corner, all, thread, codes);
        if (thread >= WARP || start + slot >= rows) continue;
        float own[OWN], value[OWN];
        load(own, row.original + lane * OWN);
        for (int c = 0; c < OWN; c++) {
            // The product is exact: a half has eleven bits, a code three.
            value[c] = best.d * float(codes >> (8 * c) & 7u) + best.m, own[c] -= value[c];
        }
        store(values + r * n + lane * OWN, value), store(errors + r * n + lane * OWN, own);
        float * to = numbers + r * fetched;
        to[lane] = __uint_as_float(codes);
        if (lane == 0) to[N / OWN] = best.d, to[N / OWN + 1] = best.m;
    }
}
