// SPDX-License-Identifier: Apache-2.0
// Host side of the decode kernel: which instantiation serves a call, and how much workspace it needs.
#include "decode_sm90.cuh"

namespace vllm_kvcompress {

namespace sm90 {
template <int D>
cudaError_t launch_code(const DecodeParams& p, int num_sms, cudaStream_t stream) {
  switch (p.code) {
    case kAffine2: return launch<D, kAffine2>(p, num_sms, stream);
    case kAffine2Signs: return launch<D, kAffine2Signs>(p, num_sms, stream);
    case kLloydMax4: return launch<D, kLloydMax4>(p, num_sms, stream);
    case kLloydMax43: return launch<D, kLloydMax43>(p, num_sms, stream);
    case kLloydMax43Signs: return launch<D, kLloydMax43Signs>(p, num_sms, stream);
    default:
      if constexpr (D > 64) {
        if (p.code == kLloydMax32) return launch<D, kLloydMax32>(p, num_sms, stream);
        if (p.code == kLloydMax32Signs) return launch<D, kLloydMax32Signs>(p, num_sms, stream);
      }
      return cudaErrorNotSupported;
  }
}
}  // namespace sm90

const char* launch_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.num_reqs == 0 || p.num_tokens == 0) return nullptr;
  if (p.max_query_len < 1 || p.max_query_len > sm90::kMaxNewTokens) return "max_query_len must be 1 to 8";
  if (p.window_cache != nullptr && p.window_block_tokens % sm90::kBlockTokens)
    return "window blocks must hold a multiple of 16 tokens";
  if (p.workspace_elements < decode_workspace_elements(p.num_kv_heads, p.num_heads / p.num_kv_heads, p.head_dim,
                                                       p.num_reqs, p.max_query_len))
    return "the workspace is smaller than decode_workspace_elements says";
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    switch (p.head_dim) {
      case 64: error = sm90::launch_code<64>(p, num_sms, stream); break;
      case 128: error = sm90::launch_code<128>(p, num_sms, stream); break;
      case 256: error = sm90::launch_code<256>(p, num_sms, stream); break;
      default: return "head_dim must be 64, 128 or 256";
    }
    if (error == cudaErrorNotSupported) return "codes of 3 and 2 bits need a head_dim of 128 or 256";
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

long long decode_workspace_elements(int num_kv_heads, int group, int head_dim, int max_num_reqs, int max_query_len) {
  // Rows are padded to whole tiles of 4, 8 or 16; a partial result is head_dim sums, a maximum and a weight a row, and
  // each item has a span of two integers.
  const long long rows = static_cast<long long>(group) * max_query_len;
  const int tile = rows <= 4 ? 4 : rows <= 8 || head_dim > 128 ? 8 : 16;
  const long long tiles = (rows + tile - 1) / tile;
  const long long items = static_cast<long long>(max_num_reqs) * num_kv_heads * tiles;
  return (sm90::kMaxCtas + items) * tile * (head_dim + 2) + 2 * items;
}

}  // namespace vllm_kvcompress
