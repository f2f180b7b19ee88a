// SPDX-License-Identifier: Apache-2.0
// torch.ops.vllm_kvcompress: checks tensors and hands their pointers to the kernels. Only PyTorch's stable C interface
// is used, so one binary serves every torch from TORCH_TARGET_VERSION (set by setup.py) on, and every Python.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "decode.h"

#ifndef TORCH_TARGET_VERSION
#error "TORCH_TARGET_VERSION is the oldest torch served; setup.py sets it"
#endif

// A CPU build of torch lacks it; weak, the library still loads there, and says so when called.
#pragma weak aoti_torch_get_current_cuda_stream

namespace vllm_kvcompress {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;  // bytes: rows are read in 16-byte vectors and bulk copies
constexpr int64_t kAny = -1;        // a size that is free

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "vllm_kvcompress::decode: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    default: return torch::headeronly::toString(dtype);
  }
}

template <typename Integers>
std::string list(const Integers& integers) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < integers.size(); ++i) {
    text << (i ? ", " : "");
    integers[i] == kAny ? text << "any" : text << integers[i];
  }
  text << "]";
  return text.str();
}

std::string describe(const Tensor& tensor) {
  return std::string(dtype_name(tensor.scalar_type())) + " " + list(tensor.sizes());
}

// Rows of the last `contiguous` dimensions lie without gaps; strides of the others are free, but start rows on
// multiples of kAlignment where `aligned`.
void expect(const char* name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& sizes,
            int64_t contiguous, bool aligned) {
  const auto actual = tensor.sizes();
  bool fits = tensor.scalar_type() == dtype && actual.size() == sizes.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == kAny || sizes[i] == actual[i];
  if (!fits) fail(name, " must be ", dtype_name(dtype), " ", list(sizes), ", got ", describe(tensor));

  const auto strides = tensor.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  const int64_t element_bytes = static_cast<int64_t>(tensor.element_size());
  int64_t packed = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    if (actual[i] <= 1) continue;  // its stride is never used
    if (i >= dims - contiguous) {
      if (strides[i] != packed)
        fail("the last ", contiguous, " dimensions of ", name, " must be contiguous, got sizes ", list(actual),
             " with strides ", list(strides));
      packed *= actual[i];
    } else if (strides[i] < packed || (aligned && strides[i] * element_bytes % kAlignment)) {
      fail("stride ", i, " of ", name, " must be at least ", packed, " elements",
           aligned ? " and a multiple of 16 bytes" : "",
           ", got strides ", list(strides), " of ", element_bytes, "-byte elements");
    }
  }
  if (aligned && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment)
    fail(name, " must begin at a multiple of ", kAlignment, " bytes");
}

void expect_device(const char* name, const Tensor& tensor, const Tensor& q) {
  if (!tensor.is_cuda())
    fail(name, " must be on a CUDA device of capability 9.0, it is on ",
         tensor.is_cpu() ? "the CPU" : "another device");
  if (tensor.get_device_index() != q.get_device_index())
    fail(name, " is on cuda:", tensor.get_device_index(), ", q on cuda:", q.get_device_index());
}

int32_t narrow(const char* name, int64_t value, int64_t least) {
  if (value < least || value > std::numeric_limits<int32_t>::max())
    fail(name, " must lie in [", least, ", 2^31), got ", value);
  return static_cast<int32_t>(value);
}

bool has_signs(int64_t code) { return code == kAffine2Signs || code == kLloydMax43Signs || code == kLloydMax32Signs; }

int64_t head_bytes(int64_t head_dim, bool page_means, int64_t code) {
  // vllm_kvcompress/formats/base.py: codes of keys and values, signs, scale and zero or norms of each token, mean; rounded
  // up to whole bytes a token. Bits of the channels, keys and values together, in eighths of a bit:
  const int64_t eighths = code == kAffine2 || code == kAffine2Signs ? 8 * (2 + 2)
                          : code == kLloydMax4                      ? 8 * (4 + 4)
                          : code == kLloydMax43                     ? 4 * (4 + 3) * 2
                          : code == kLloydMax43Signs                ? 4 * (3 + 2) + 4 * (4 + 3)
                          : code == kLloydMax32                     ? 2 * (3 + 3 * 2) * 2
                                                                    : 2 * (2 + 3 * 1) + 2 * (3 + 3 * 2);
  const int64_t scales = code == kLloydMax4 ? 4 : 8;
  const int64_t token = head_dim * eighths / 64 + scales + (has_signs(code) ? head_dim / 8 + 2 : 0);
  const int64_t used = kPageTokens * token + (page_means ? 2 * head_dim : 0);
  return (used + kPageTokens - 1) / kPageTokens * kPageTokens;
}

void decode(const Tensor& q, const Tensor& new_kv, const Tensor& pages, const std::optional<Tensor>& window_cache,
            const Tensor& block_table, const std::optional<Tensor>& window_table, const Tensor& query_start_loc,
            const Tensor& seq_lens, const std::optional<Tensor>& v_unrotation, const Tensor& out,
            const Tensor& workspace, const std::optional<Tensor>& q_signs, int64_t max_query_len, int64_t head_dim,
            int64_t code, double k_scale, double k_bend, double k_rest_scale, double k_rest_bend, double v_scale,
            double v_bend, double v_rest_scale, double v_rest_bend, bool page_means, bool window_is_bf16,
            int64_t sink_tokens, int64_t recent_tokens, double scale) {
  DecodeParams params{};
  if (code != kAffine2 && code != kLloydMax4 && code != kLloydMax43 && code != kLloydMax32 && !has_signs(code))
    fail("code must be 2 or 102 (affine), 4, 43, 32, 143 or 132 (Lloyd-Max), got ", code);
  if (has_signs(code) != q_signs.has_value()) fail("q_signs goes with codes that have signs, got code ", code);
  params.code = static_cast<int32_t>(code);
  if (params.code != kAffine2 && !page_means) fail("pages of other codes than affine ones must have means");
  if (head_dim != 64 && head_dim != 128 && head_dim != 256)
    fail("head_dim must be 64, 128 or 256, got ", head_dim);
  if (q.dim() != 3 || pages.dim() != 3)
    fail("q must be [T, Hq, D] and pages [num_pages, H, head_bytes], got ", describe(q), " and ", describe(pages));
  const int64_t tokens = q.size(0), heads = q.size(1), kv_heads = pages.size(1), requests = seq_lens.numel();
  if (kv_heads == 0 || heads == 0 || heads % kv_heads)
    fail("q's ", heads, " heads are no multiple of pages' ", kv_heads, " KV heads");
  if (window_cache.has_value() != window_table.has_value())
    fail("window_cache and window_table must both be given, or neither");

  const ScalarType window_dtype = window_is_bf16 ? ScalarType::BFloat16 : ScalarType::Half;
  const ScalarType out_dtype = out.scalar_type();
  if (out_dtype != ScalarType::Half && out_dtype != ScalarType::BFloat16)
    fail("out must be float16 or bfloat16, got ", describe(out));
  expect("q", q, ScalarType::Half, {tokens, heads, head_dim}, 1, true);
  if (q_signs) {
    expect("q_signs", *q_signs, ScalarType::Half, {tokens, heads, head_dim}, 1, true);
    if (q_signs->stride(0) != q.stride(0) || q_signs->stride(1) != q.stride(1))
      fail("q_signs must have q's strides, got ", list(q_signs->strides()), " and ", list(q.strides()));
  }
  expect("out", out, out_dtype, {tokens, heads, head_dim}, 1, true);
  expect("new_kv", new_kv, window_dtype, {kAny, kv_heads, 2 * head_dim}, 2, true);
  if (new_kv.size(0) < tokens) fail("new_kv must have a row for each of q's ", tokens, ", got ", describe(new_kv));
  expect("pages", pages, ScalarType::Byte, {kAny, kv_heads, head_bytes(head_dim, page_means, params.code)}, 2, true);
  expect("seq_lens", seq_lens, ScalarType::Int, {requests}, 1, false);
  expect("query_start_loc", query_start_loc, ScalarType::Int, {requests + 1}, 1, false);
  expect("block_table", block_table, ScalarType::Int, {kAny, kAny}, 1, false);
  if (block_table.size(0) < requests)
    fail("block_table must have a row for each of ", requests, " requests, got ", describe(block_table));
  if (window_cache) {
    expect("window_cache", *window_cache, ScalarType::Byte, {kAny, kv_heads, kAny, 4 * head_dim}, 3, true);
    if (window_cache->size(2) == 0) fail("window_cache's blocks must hold tokens, got ", describe(*window_cache));
    expect("window_table", *window_table, ScalarType::Int, {kAny, kAny}, 1, false);
    if (window_table->size(0) < requests)
      fail("window_table must have a row for each of ", requests, " requests, got ", describe(*window_table));
  }
  if (v_unrotation) expect("v_unrotation", *v_unrotation, ScalarType::Half, {kv_heads, head_dim, head_dim}, 3, true);
  expect("workspace", workspace, ScalarType::Float, {kAny}, 1, true);

  params.q_token_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.new_kv_row_stride = new_kv.stride(0);
  params.page_stride = pages.stride(0);
  params.head_bytes = pages.size(2);
  params.block_table_stride = block_table.stride(0);
  params.out_token_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.workspace_elements = workspace.numel();
  params.num_reqs = narrow("the number of requests", requests, 0);
  params.num_tokens = narrow("the number of tokens", tokens, 0);
  params.num_heads = narrow("the number of heads", heads, 1);
  params.num_kv_heads = narrow("the number of KV heads", kv_heads, 1);
  params.head_dim = static_cast<int32_t>(head_dim);
  params.block_table_columns = narrow("block_table's width", block_table.size(1), 0);
  params.max_query_len = narrow("max_query_len", max_query_len, 1);
  params.sink_tokens = narrow("sink_tokens", sink_tokens, 0);
  params.recent_tokens = narrow("recent_tokens", recent_tokens, 0);
  params.page_means = page_means;
  params.key_levels = {{static_cast<float>(k_scale), static_cast<float>(k_rest_scale)},
                       {static_cast<float>(k_bend), static_cast<float>(k_rest_bend)}};
  params.value_levels = {{static_cast<float>(v_scale), static_cast<float>(v_rest_scale)},
                         {static_cast<float>(v_bend), static_cast<float>(v_rest_bend)}};
  params.out_dtype = out_dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16;
  params.window_dtype = window_is_bf16 ? DType::kBFloat16 : DType::kFloat16;
  params.scale = static_cast<float>(scale);
  if (window_cache) {
    params.window_block_stride = window_cache->stride(0);
    params.window_block_tokens = narrow("window_cache's block size", window_cache->size(2), 1);
    params.window_table_stride = window_table->stride(0);
    params.window_table_columns = narrow("window_table's width", window_table->size(1), 0);
  }

  expect_device("q", q, q);
  if (q_signs) expect_device("q_signs", *q_signs, q);
  expect_device("new_kv", new_kv, q);
  expect_device("pages", pages, q);
  expect_device("block_table", block_table, q);
  expect_device("query_start_loc", query_start_loc, q);
  expect_device("seq_lens", seq_lens, q);
  expect_device("out", out, q);
  expect_device("workspace", workspace, q);
  if (window_cache) {
    expect_device("window_cache", *window_cache, q);
    expect_device("window_table", *window_table, q);
  }
  if (v_unrotation) expect_device("v_unrotation", *v_unrotation, q);
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("this torch is built without CUDA");
  if (requests == 0 || tokens == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t needed = decode_workspace_elements(params.num_kv_heads, params.num_heads / params.num_kv_heads,
                                                   params.head_dim, params.num_reqs, params.max_query_len);
  if (params.workspace_elements < needed)
    fail("workspace must hold ", needed, " float32 (decode_workspace_elements), got ", params.workspace_elements);
  params.q = q.const_data_ptr();
  params.q_signs = q_signs ? q_signs->const_data_ptr() : nullptr;
  params.new_kv = new_kv.const_data_ptr();
  params.pages = pages.const_data_ptr();
  params.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  params.query_start_loc = static_cast<const int32_t*>(query_start_loc.const_data_ptr());
  params.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.workspace = workspace.mutable_data_ptr();
  if (window_cache) {
    params.window_cache = window_cache->const_data_ptr();
    params.window_table = static_cast<const int32_t*>(window_table->const_data_ptr());
  }
  if (v_unrotation) params.v_unrotation = v_unrotation->const_data_ptr();

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const char* error = launch_decode(params, static_cast<cudaStream_t>(stream));
  if (error != nullptr) fail(error);
}

int64_t workspace_elements(int64_t num_kv_heads, int64_t group, int64_t head_dim, int64_t max_num_reqs,
                           int64_t max_query_len) {
  return decode_workspace_elements(narrow("num_kv_heads", num_kv_heads, 1), narrow("group", group, 1),
                                   narrow("head_dim", head_dim, 1), narrow("max_num_reqs", max_num_reqs, 1),
                                   narrow("max_query_len", max_query_len, 1));
}

// Of the CUDA runtime linked in and of the newest the driver serves (0: no driver); 13000 is CUDA 13.0. The runtime
// needs a driver of its major version.
std::tuple<int64_t, int64_t> cuda_versions() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {CUDART_VERSION, driver};
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_kvcompress, m) {
  m.def(
      "decode(Tensor q, Tensor new_kv, Tensor pages, Tensor? window_cache, Tensor block_table, Tensor? window_table, "
      "Tensor query_start_loc, Tensor seq_lens, Tensor? v_unrotation, Tensor(a!) out, Tensor(b!) workspace, "
      "Tensor? q_signs, int max_query_len, int head_dim, int code, float k_scale, float k_bend, float k_rest_scale, "
      "float k_rest_bend, float v_scale, float v_bend, float v_rest_scale, float v_rest_bend, bool page_means, "
      "bool window_is_bf16, int sink_tokens, int recent_tokens, float scale) -> ()");
  m.def(
      "decode_workspace_elements(int num_kv_heads, int group, int head_dim, int max_num_reqs, int max_query_len) "
      "-> int");
  m.def("cuda_versions() -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_kvcompress, CUDA, m) { m.impl("decode", TORCH_BOX(&decode)); }

// On CPU tensors it ends in the message of expect_device, which the dispatcher's own would bury in a list of backends.
STABLE_TORCH_LIBRARY_IMPL(vllm_kvcompress, CPU, m) { m.impl("decode", TORCH_BOX(&decode)); }

STABLE_TORCH_LIBRARY_IMPL(vllm_kvcompress, CompositeExplicitAutograd, m) {
  m.impl("decode_workspace_elements", TORCH_BOX(&workspace_elements));
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}

}  // namespace vllm_kvcompress
