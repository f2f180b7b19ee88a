// SPDX-License-Identifier: Apache-2.0
// Decode attention over 2- to 4-bit pages: the framework-free interface of the CUDA kernel. binding.cpp fills it from tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vllm_kvcompress {

// A page holds this many tokens; its head bytes are laid out as vllm_kvcompress/formats/base.py says.
inline constexpr int kPageTokens = 128;

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1 };

// How keys and values are coded: the op's argument `code`.
inline constexpr int kAffine2 = 2;      // 2 bits a channel, scale and zero-point a token
inline constexpr int kLloydMax4 = 4;    // 4 bits a channel, norm a token
inline constexpr int kLloydMax43 = 43;  // half of the channels 4 bits, the other half 3, a norm each
inline constexpr int kLloydMax32 = 32;  // a quarter of the channels 3 bits, the rest 2, a norm each; head sizes 128, 256
// Keys of a bit less, and the signs of a random projection of what that leaves over with its norm; values as above.
inline constexpr int kLloydMax43Signs = 143;
inline constexpr int kLloydMax32Signs = 132;  // head sizes 128, 256
inline constexpr int kAffine2Signs = 102;     // keys of 2 bits and signs

// Lloyd-Max levels are scale * t * (1 + bend * t^2) in the centred code t (quantizers/lloyd_max.py), for each part.
struct Levels {
  float scale[2];
  float bend[2];
};

// Strides count elements of the tensor's type, except those of `pages` and `window_cache`, which are uint8 (bytes).
// The last dimension of every tensor is contiguous. All pointers are device pointers.
struct DecodeParams {
  const void* q;              // [T, Hq, D] float16, cache space of the keys
  const void* q_signs;        // S q, of formats with signs; as q, strides included
  int64_t q_token_stride;
  int64_t q_head_stride;
  const void* new_kv;         // [>= T rows, H, 2 * D] window_dtype: cache-space K | V of the step's own tokens
  int64_t new_kv_row_stride;  // a row is contiguous: [H, 2 * D]
  const void* pages;          // [num_pages, H, head_bytes] uint8
  int64_t page_stride;
  int64_t head_bytes;
  const void* window_cache;   // [num_blocks, H, window_block_tokens, 4 * D] uint8, rows K | V; nullptr: no windows
  int64_t window_block_stride;
  const int32_t* block_table;   // [>= R, block_table_columns]; 0: no page
  int64_t block_table_stride;
  const int32_t* window_table;  // [>= R, window_table_columns]; 0: no block; nullptr exactly if window_cache is
  int64_t window_table_stride;
  const int32_t* query_start_loc;  // [R + 1]
  const int32_t* seq_lens;         // [R], history and new tokens
  const void* v_unrotation;        // [H, D, D] float16 contiguous, R_v^T; nullptr: identity
  void* out;                       // [T, Hq, D] out_dtype
  int64_t out_token_stride;
  int64_t out_head_stride;
  void* workspace;                // float32
  int64_t workspace_elements;     // at least decode_workspace_elements(...)

  int32_t num_reqs;      // R
  int32_t num_tokens;    // T, padding rows included
  int32_t num_heads;     // Hq, a multiple of H
  int32_t num_kv_heads;  // H
  int32_t head_dim;      // D: 64, 128 or 256
  int32_t block_table_columns;
  int32_t window_table_columns;
  int32_t window_block_tokens;
  int32_t max_query_len;  // no request has more new tokens
  int32_t sink_tokens;
  int32_t recent_tokens;
  bool page_means;  // pages carry a mean key after the scales; those of Lloyd-Max codes must
  int32_t code;
  Levels key_levels;
  Levels value_levels;
  DType out_dtype;
  DType window_dtype;
  float scale;  // of q . k
};

// Queues the kernels on `stream` of the current device. No synchronisation, no allocation. Returns nullptr if queued,
// else a message (static storage) saying what is not supported or what CUDA answered.
const char* launch_decode(const DecodeParams& params, cudaStream_t stream);

// How many float32 of workspace any step of at most these sizes needs; group = query heads per KV head.
long long decode_workspace_elements(int num_kv_heads, int group, int head_dim, int max_num_reqs, int max_query_len);

}  // namespace vllm_kvcompress
