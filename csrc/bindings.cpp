// Every op schema on one page (TORCH_LIBRARY), and the pybind11 module for what is not a tensor op.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

#include "common/cpu/gemm_tile.h"
#include "common/cpu/kept_logits.h"
#include "common/device_plan.h"
#include "common/products.h"
#include "common/simd/tile_kernels.h"
#include "common/tile_plan.h"
#include "common/workspace.h"
#include "kl/linear_kl.h"
#include "logprob/linear_logprobs.h"
#include "preference/preference.h"

namespace rk {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The schemas' flat arguments, gathered into what they belong to.
template <decltype(linear_logprobs_cpu) op>
auto linear_logprobs(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
                     double scale, double softcap, double temperature, int64_t ignore_index, ScalarType gemm,
                     bool entropy, bool is_top1, bool mean_logit, bool log_sum_sq_probs, int64_t kept_logits) {
  return op({hidden, weight, bias, transform_of(scale, softcap, temperature), gemm}, {targets, ignore_index},
            {entropy, is_top1, mean_logit, log_sum_sq_probs}, kept_logits);
}

template <decltype(linear_logprobs_frozen_cpu) op>
auto linear_logprobs_frozen(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                            const OptionalTensor& bias, double scale, double softcap, double temperature,
                            int64_t ignore_index, ScalarType gemm, bool entropy, bool is_top1, bool mean_logit,
                            bool log_sum_sq_probs) {
  return op({hidden, weight, bias, transform_of(scale, softcap, temperature), gemm}, {targets, ignore_index},
            {entropy, is_top1, mean_logit, log_sum_sq_probs});
}

template <decltype(linear_logprobs_backward_cpu) op>
auto linear_logprobs_backward(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_log_sum,
                              const OptionalTensor& grad_entropy, const Tensor& hidden, const Tensor& weight,
                              const Tensor& targets, const OptionalTensor& bias, const Tensor& max_logit,
                              const Tensor& log_sum, const Tensor& entropy, const Tensor& logit_cache, double scale,
                              double softcap, double temperature, int64_t ignore_index, ScalarType gemm,
                              bool need_hidden, bool need_weight, bool need_bias) {
  return op({grad_logprobs, grad_log_sum, grad_entropy}, {max_logit, log_sum, entropy, logit_cache},
            {hidden, weight, bias, transform_of(scale, softcap, temperature), gemm}, {targets, ignore_index},
            {need_hidden, need_weight, need_bias});
}

template <decltype(linear_kl_cpu) op>
auto linear_kl(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, double scale, double softcap,
               double temperature, ScalarType gemm, const Tensor& ref_hidden, const Tensor& ref_weight,
               const OptionalTensor& ref_bias, double ref_scale, double ref_softcap, double ref_temperature,
               ScalarType ref_gemm, const Tensor& mask, bool policy_ref, int64_t kept_logits) {
  return op({{hidden, weight, bias, transform_of(scale, softcap, temperature), gemm},
             {ref_hidden, ref_weight, ref_bias, transform_of(ref_scale, ref_softcap, ref_temperature), ref_gemm},
             mask,
             policy_ref},
            kept_logits);
}

template <decltype(linear_kl_backward_cpu) op>
auto linear_kl_backward(const Tensor& grad_kl, const Tensor& kl, const Tensor& stats, const Tensor& logit_cache,
                        const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, double scale,
                        double softcap, double temperature, ScalarType gemm, const Tensor& ref_hidden,
                        const Tensor& ref_weight, const OptionalTensor& ref_bias, double ref_scale, double ref_softcap,
                        double ref_temperature, ScalarType ref_gemm, const Tensor& mask, bool policy_ref,
                        bool need_hidden, bool need_weight, bool need_bias) {
  return op(grad_kl, {kl, stats, logit_cache},
            {{hidden, weight, bias, transform_of(scale, softcap, temperature), gemm},
             {ref_hidden, ref_weight, ref_bias, transform_of(ref_scale, ref_softcap, ref_temperature), ref_gemm},
             mask,
             policy_ref},
            {need_hidden, need_weight, need_bias});
}

}  // namespace
}  // namespace rk

// A softcap of 0 is none. gemm_dtype: to which the GEMM's operands are rounded.
TORCH_LIBRARY(rlhf_kernels, m) {
  m.def(
      "linear_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float logit_scale, "
      "float logit_softcap, float temperature, int ignore_index, ScalarType gemm_dtype, bool entropy, bool is_top1, "
      "bool mean_logit, bool log_sum_sq_probs, SymInt kept_logits) -> (Tensor logprobs, Tensor max_logit, "
      "Tensor log_sum, Tensor entropy, Tensor is_top1, Tensor mean_logit, Tensor log_sum_sq_probs, Tensor "
      "logit_cache)");
  m.def(
      "linear_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_log_sum, Tensor? grad_entropy, Tensor hidden, "
      "Tensor weight, Tensor targets, Tensor? bias, Tensor max_logit, Tensor log_sum, Tensor entropy, "
      "Tensor logit_cache, float logit_scale, float logit_softcap, float temperature, int ignore_index, "
      "ScalarType gemm_dtype, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_frozen(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float logit_scale, "
      "float logit_softcap, float temperature, int ignore_index, ScalarType gemm_dtype, bool entropy, bool is_top1, "
      "bool mean_logit, bool log_sum_sq_probs) -> (Tensor logprobs, Tensor max_logit, Tensor log_sum, "
      "Tensor entropy, Tensor is_top1, Tensor mean_logit, Tensor log_sum_sq_probs, Tensor directions)");
  m.def(
      "linear_logprobs_frozen_backward(Tensor grad_logprobs, Tensor directions, Tensor targets, int ignore_index, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "linear_kl(Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float logit_softcap, "
      "float temperature, ScalarType gemm_dtype, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, "
      "float ref_logit_scale, float ref_logit_softcap, float ref_temperature, ScalarType ref_gemm_dtype, Tensor mask, "
      "bool policy_ref, SymInt kept_logits) -> (Tensor kl, Tensor stats, Tensor logit_cache)");
  m.def(
      "linear_kl_backward(Tensor grad_kl, Tensor kl, Tensor stats, Tensor logit_cache, Tensor hidden, Tensor weight, "
      "Tensor? bias, float logit_scale, float logit_softcap, float temperature, ScalarType gemm_dtype, "
      "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, float ref_logit_scale, float ref_logit_softcap, "
      "float ref_temperature, ScalarType ref_gemm_dtype, Tensor mask, bool policy_ref, bool need_hidden, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("kl_penalty(Tensor logprobs, Tensor ref_logprobs, int estimator) -> Tensor");
  m.def("kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, int estimator) -> Tensor");
  m.def(
      "dpo_loss(Tensor policy_logps, Tensor? ref_logps, Tensor chosen_idxs, Tensor rejected_idxs, float beta, "
      "int loss_type, float label_smoothing) -> (Tensor losses, Tensor rewards)");
  m.def(
      "dpo_loss_backward(Tensor grad_losses, Tensor policy_logps, Tensor? ref_logps, Tensor chosen_idxs, "
      "Tensor rejected_idxs, float beta, int loss_type, float label_smoothing) -> Tensor");
  m.def(
      "bradley_terry_loss(Tensor chosen, Tensor rejected, Tensor? margin, float label_smoothing, "
      "float center_coefficient) -> Tensor");
  m.def(
      "bradley_terry_loss_backward(Tensor grad_losses, Tensor chosen, Tensor rejected, Tensor? margin, "
      "float label_smoothing, float center_coefficient) -> (Tensor, Tensor)");
}

#define RK_IMPLEMENT(m, device)                                                                            \
  m.impl("linear_logprobs", rk::linear_logprobs<rk::linear_logprobs_##device>);                            \
  m.impl("linear_logprobs_backward", rk::linear_logprobs_backward<rk::linear_logprobs_backward_##device>); \
  m.impl("linear_logprobs_frozen", rk::linear_logprobs_frozen<rk::linear_logprobs_frozen_##device>);       \
  m.impl("linear_logprobs_frozen_backward", rk::linear_logprobs_frozen_backward);                          \
  m.impl("linear_kl", rk::linear_kl<rk::linear_kl_##device>);                                              \
  m.impl("linear_kl_backward", rk::linear_kl_backward<rk::linear_kl_backward_##device>);                   \
  m.impl("kl_penalty", rk::kl_penalty_##device);                                                           \
  m.impl("kl_penalty_backward", rk::kl_penalty_backward_##device);                                         \
  m.impl("dpo_loss", rk::dpo_loss_##device);                                                               \
  m.impl("dpo_loss_backward", rk::dpo_loss_backward_##device);                                             \
  m.impl("bradley_terry_loss", rk::bradley_terry_loss_##device);                                           \
  m.impl("bradley_terry_loss_backward", rk::bradley_terry_loss_backward_##device)

// Autograd of the ops on a number a response or token; the others' is Python's, rlhf_kernels/*/autograd.py.
TORCH_LIBRARY_IMPL(rlhf_kernels, Autograd, m) {
  m.impl("kl_penalty", rk::kl_penalty_autograd);
  m.impl("dpo_loss", rk::dpo_loss_autograd);
  m.impl("bradley_terry_loss", rk::bradley_terry_loss_autograd);
}

#if defined(RK_CUDA_ON_HOST)  // tests execute the CUDA sources on CPU tensors
TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { RK_IMPLEMENT(m, cuda); }
#else
TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { RK_IMPLEMENT(m, cpu); }
#if defined(RLHF_KERNELS_CUDA)
TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) { RK_IMPLEMENT(m, cuda); }
#endif
#endif

#if defined(RLHF_KERNELS_CUDA)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of rlhf_kernels; the ops are under torch.ops.rlhf_kernels.";
  m.def("has_cuda", [] { return kHasCuda; }, "Whether CUDA kernels were compiled.");
  m.def("cpu_isa", [] { return std::string(rk::tile_kernels().name); }, "Instruction set of the CPU kernels in use.");
  m.def("cpu_multiplies_bf16", [] { return rk::runs_on_bf16(at::kBFloat16); }, "Into float32, by AMX or AVX512_BF16.");
  m.def("cpu_isas", [] { return std::string(rk::instruction_sets()); }, "Those this CPU can run, best first.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        if (!rk::use_instruction_set(name.c_str())) {
          throw pybind11::value_error("cpu_isa must be one of " + std::string(rk::instruction_sets()) + "; got " +
                                      name);
        }
      },
      "Chooses the instruction set of the CPU kernels, for tests and measurements.");
  m.def(
      "set_workspace_budget_mib",
      [](int64_t cpu, int64_t cuda) {
        rk::workspace_budget_mib(rk::Memory::cpu) = cpu;
        rk::workspace_budget_mib(rk::Memory::cuda) = cuda;
        rk::trim_kept_logits_memory();
      },
      pybind11::arg("cpu"), pybind11::arg("cuda"));
  m.def("multiply_adds", [] { return rk::multiply_adds().load(); }, "Of all matrix products so far.");
  m.def(
      "plan_forward",
      [](int64_t rows, int64_t vocab, int64_t hidden, int64_t element_size, int64_t budget, int64_t threads) {
        const auto p = rk::plan_forward(rows, vocab, hidden, hidden, element_size, 2, budget, threads);
        return pybind11::make_tuple(p.tile, p.split, p.splits, p.row_chunk, p.row_groups);
      },
      "(tile, split, splits, row_chunk, row_groups) of linear_logprobs' forward.");
  m.def(
      "plan_backward",
      [](int64_t rows, int64_t vocab, int64_t hidden, int64_t element_size, int64_t budget, int64_t ref_hidden) {
        const auto p = rk::plan_backward(rows, vocab, hidden, hidden + ref_hidden, std::max(hidden, ref_hidden),
                                         element_size, budget);
        return pybind11::make_tuple(p.tile, p.vocab_group, p.row_chunk, p.bytes);
      },
      pybind11::arg("rows"), pybind11::arg("vocab"), pybind11::arg("hidden"), pybind11::arg("element_size"),
      pybind11::arg("budget"), pybind11::arg("ref_hidden") = 0,
      "(tile, vocab_group, row_chunk, bytes) of linear_logprobs' backward; with ref_hidden, of linear_kl's.");
  m.def(
      "plan_device",
      [](int64_t rows, int64_t vocab, int64_t hidden, int64_t heads, int64_t element_size, bool bias, bool cast_weight,
         bool copy_hidden, bool backward, int64_t multiprocessors, int64_t l2_bytes, int64_t budget,
         int64_t kept_bytes) {
        const rk::DeviceHeads sizes{hidden, heads * hidden, heads, element_size, bias, cast_weight, copy_hidden};
        const auto p = rk::plan_device(sizes, rows, vocab, backward, {multiprocessors, l2_bytes}, budget, kept_bytes);
        using pybind11::literals::operator""_a;
        return pybind11::dict("nominal_columns"_a = p.nominal_columns, "nominal_rows"_a = p.nominal_rows,
                              "tile"_a = p.tile, "row_chunk"_a = p.row_chunk, "vocab_group"_a = p.vocab_group,
                              "rows_at_once"_a = p.rows_at_once, "bytes"_a = p.bytes, "waves"_a = p.waves,
                              "utilisation"_a = p.utilisation);
      },
      pybind11::arg("rows"), pybind11::arg("vocab"), pybind11::arg("hidden"), pybind11::kw_only(),
      pybind11::arg("heads") = 1, pybind11::arg("element_size") = 2, pybind11::arg("bias") = false,
      pybind11::arg("cast_weight") = false, pybind11::arg("copy_hidden") = false, pybind11::arg("backward") = false,
      pybind11::arg("multiprocessors"), pybind11::arg("l2_bytes"), pybind11::arg("budget"),
      pybind11::arg("kept_bytes") = 0,
      "The fields of DevicePlan (csrc/common/device_plan.h) on CUDA; heads: 1, or 2 of the same width for the KL.");
}
