// gemm() by cuBLASLt.
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/cuda/gemm.h"
#include "common/cuda/launch.h"
#include "common/cuda/tile.h"
#include "common/products.h"

namespace rk::cuda {
namespace {

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string(what) + ": " + cublasLtGetStatusString(status));
  }
}

cudaDataType_t type_of(Format format) {
  return format == Format::f32 ? CUDA_R_32F : format == Format::bf16 ? CUDA_R_16BF : CUDA_R_16F;
}

// A descriptor of the library, freed at the end of its scope.
template <class Handle, cublasStatus_t (*destroy)(Handle)>
struct Owned {
  Handle handle = nullptr;
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (handle) destroy(handle);
  }
};
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

// Row-major matrices are column-major ones transposed: c^T = op(b)^T op(a)^T, so that b is the library's first operand.
struct Problem {
  Operation operation;
  Layout first, second, result;

  Problem(const GemmContext& context, const GemmArgs& args) {
    const auto compute =
        args.operands == Format::f32 && context.allow_tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    check(cublasLtMatmulDescCreate(&operation.handle, compute, CUDA_R_32F), "cublasLtMatmulDescCreate");
    set(CUBLASLT_MATMUL_DESC_TRANSA, args.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, args.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    create(first, args.operands, args.b_transposed ? args.k : args.n, args.b_transposed ? args.n : args.k,
           args.b_stride);
    create(second, args.operands, args.a_transposed ? args.m : args.k, args.a_transposed ? args.k : args.m,
           args.a_stride);
    create(result, args.result, args.n, args.m, args.c_stride);
  }

  // Whether an algorithm that was chosen for another problem is one for this.
  bool takes(cublasLtHandle_t library, const cublasLtMatmulAlgo_t& algorithm, int64_t workspace_bytes) const {
    cublasLtMatmulHeuristicResult_t checked{};
    return cublasLtMatmulAlgoCheck(library, operation.handle, first.handle, second.handle, result.handle, result.handle,
                                   &algorithm, &checked) == CUBLAS_STATUS_SUCCESS &&
           checked.state == CUBLAS_STATUS_SUCCESS && checked.workspaceSize <= static_cast<size_t>(workspace_bytes);
  }

 private:
  void set(cublasLtMatmulDescAttributes_t attribute, cublasOperation_t value) {
    check(cublasLtMatmulDescSetAttribute(operation.handle, attribute, &value, sizeof(value)),
          "cublasLtMatmulDescSetAttribute");
  }
  static void create(Layout& layout, Format format, int64_t rows, int64_t columns, int64_t stride) {
    check(cublasLtMatrixLayoutCreate(&layout.handle, type_of(format), rows, columns, stride),
          "cublasLtMatrixLayoutCreate");
  }
};

// The largest power of two, up to 256, that divides a matrix's address and the bytes of its stride.
uint32_t alignment_of(const void* data, int64_t stride, Format format) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(stride * size_of(format)) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// Bits that may not depend on the batch may not depend on the budget either: as much as the smallest one gives.
constexpr int64_t kFixedWorkspaceBytes = int64_t{1} << 20;
constexpr size_t kMostAlgorithms = 1024;  // the sizes of masked batches differ from step to step
constexpr int kCandidates = 16;

// What an algorithm is chosen for.
using Key = std::tuple<int, std::array<int64_t, 3>, std::array<int64_t, 3>, std::array<uint32_t, 3>,
                       std::array<bool, 4>, Format, Format, int64_t>;

// The product that stands for all those whose bits must agree: of the nominal size, c's rows next to each other.
GemmArgs nominal_of(GemmArgs args) {
  if (args.nominal_m == 0) return args;
  args.m = args.nominal_m;
  args.n = args.nominal_n - (args.n % 8 ? 8 - args.n % 8 : 0);
  args.c_stride = args.nominal_n;
  return args;
}

// The library's first choice, and where a nominal size was named, its first that also takes the smallest product: a
// rule that no batch changes.
cublasLtMatmulAlgo_t choose(cublasLtHandle_t library, const GemmContext& context, const GemmArgs& args,
                            int64_t workspace_bytes, const std::array<uint32_t, 3>& alignments) {
  const Problem problem(context, args);
  Preference preference;
  check(cublasLtMatmulPreferenceCreate(&preference.handle), "cublasLtMatmulPreferenceCreate");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference.handle, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments[1]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments[0]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments[2]);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments[2]);
  // No splitting of k: sums then have one order, which m does not change.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> candidates{};
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(
      library, problem.operation.handle, problem.first.handle, problem.second.handle, problem.result.handle,
      problem.result.handle, preference.handle, args.nominal_m > 0 ? kCandidates : 1, candidates.data(), &count);
  const auto end = std::remove_if(candidates.begin(), candidates.begin() + count,
                                  [](const auto& candidate) { return candidate.state != CUBLAS_STATUS_SUCCESS; });
  if (status != CUBLAS_STATUS_SUCCESS || end == candidates.begin()) {
    throw std::runtime_error("cuBLASLt has no algorithm for a product of [" + std::to_string(args.m) + ", " +
                             std::to_string(args.k) + "] and [" + std::to_string(args.k) + ", " +
                             std::to_string(args.n) + "]: " + cublasLtGetStatusString(status));
  }
  if (args.nominal_m == 0) return candidates[0].algo;
  GemmArgs smallest = args;
  smallest.m = 1;
  smallest.n = args.n % 8 ? args.n % 8 : 8;
  const Problem small(context, smallest);
  const auto first = std::find_if(candidates.begin(), end, [&](const auto& candidate) {
    return small.takes(library, candidate.algo, workspace_bytes);
  });
  return (first == end ? candidates.begin() : first)->algo;
}

// One handle a device, and the algorithms chosen so far.
struct Library {
  std::mutex mutex;
  std::map<int, cublasLtHandle_t> handles;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;
};

Library& library() {
  static auto* const instance = new Library;  // lives as long as the process: the driver may be gone before statics are
  return *instance;
}

}  // namespace

void gemm(const GemmContext& context, const GemmArgs& args) {
  if (args.m == 0 || args.n == 0 || args.k == 0) {
    throw std::invalid_argument("gemm: m, n and k must be positive");
  }
  count_product(args.m, args.n, args.k);
  int device = 0;
  cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  const GemmArgs nominal = nominal_of(args);
  const std::array<uint32_t, 3> alignments{alignment_of(nominal.a, nominal.a_stride, nominal.operands),
                                           alignment_of(nominal.b, nominal.b_stride, nominal.operands),
                                           alignment_of(nominal.c, nominal.c_stride, nominal.result)};
  const int64_t workspace_bytes =
      nominal.nominal_m > 0 ? std::min(kFixedWorkspaceBytes, context.workspace_bytes) : context.workspace_bytes;
  const Key key{device,
                {nominal.m, nominal.n, nominal.k},
                {nominal.a_stride, nominal.b_stride, nominal.c_stride},
                alignments,
                {args.a_transposed, args.b_transposed, args.accumulate, context.allow_tf32},
                args.operands,
                args.result,
                workspace_bytes};
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulAlgo_t algorithm;
  {
    Library& shared = library();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    auto& of_device = shared.handles[device];
    if (!of_device) check(cublasLtCreate(&of_device), "cublasLtCreate");
    handle = of_device;
    auto known = shared.algorithms.find(key);
    if (known == shared.algorithms.end()) {
      if (shared.algorithms.size() >= kMostAlgorithms) shared.algorithms.clear();
      const auto chosen = choose(handle, context, nominal, workspace_bytes, alignments);
      known = shared.algorithms.emplace(key, chosen).first;
    }
    algorithm = known->second;
  }
  const Problem problem(context, args);
  if (args.nominal_m > 0 && !problem.takes(handle, algorithm, workspace_bytes)) {
    // Nothing is known to be refused between two sizes that are taken. Right, if maybe not to the same bit.
    GemmArgs alone = args;
    alone.nominal_m = alone.nominal_n = 0;
    algorithm = choose(handle, context, alone, workspace_bytes, alignments);
  }
  const float alpha = 1, beta = args.accumulate ? 1 : 0;
  check(cublasLtMatmul(handle, problem.operation.handle, &alpha, args.b, problem.first.handle, args.a,
                       problem.second.handle, &beta, args.c, problem.result.handle, args.c, problem.result.handle,
                       &algorithm, context.workspace, static_cast<size_t>(context.workspace_bytes), context.stream),
        "cublasLtMatmul");
}

}  // namespace rk::cuda
