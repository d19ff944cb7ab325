// Softmax of attention scores where each row sees some columns next to one another.

namespace {

constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr unsigned ALL = 0xffffffffu;

// `join` of all threads' x.
template <typename F> __device__ float all_of(float x, float nothing, F join) {
    __shared__ float of_warp[THREADS / WARP];
    for (int s = WARP / 2; s > 0; s /= 2) x = join(x, __shfl_xor_sync(ALL, x, s));
    __syncthreads(); // the last call's are read
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = threadIdx.x % WARP < THREADS / WARP ? of_warp[threadIdx.x % WARP] : nothing;
    for (int s = WARP / 2; s > 0; s /= 2) x = join(x, __shfl_xor_sync(ALL, x, s));
    return x;
}

} // namespace

// scores: [any times rows, n], which become probabilities; seen: of each of `rows` the first column that it sees and the one
// behind the last. A thread block has a row.
extern "C" __global__ void __launch_bounds__(THREADS)
masked_softmax(float * __restrict__ scores, const unsigned * __restrict__ seen, int rows, int n, float scale) {
    float * row = scores + size_t(blockIdx.x) * n;
    const int start = seen[blockIdx.x % rows * 2], end = seen[blockIdx.x % rows * 2 + 1];
    float most = -INFINITY, sum = 0;
    for (int i = start + threadIdx.x; i < end; i += THREADS) most = fmaxf(most, row[i] * scale);
    most = all_of(most, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
    for (int i = start + threadIdx.x; i < end; i += THREADS) sum += row[i] = expf(row[i] * scale - most);
    const float by = 1.0f / all_of(sum, 0, [](float a, float b) { return a + b; });
    // The numbers between are the thread's own: it wrote them.
    for (int i = start + threadIdx.x; i < end; i += THREADS) row[i] *= by;
    for (int i = threadIdx.x; i < start; i += THREADS) row[i] = 0.0f;
    for (int i = end + threadIdx.x; i < n; i += THREADS) row[i] = 0.0f;
}
