// SPDX-License-Identifier: Apache-2.0
// Decode attention over 2- to 4-bit pages on Hopper (sm_90a). docs: "How the decode kernel works" in csrc/README.md.
//
// One launch of `decode_kernel` reads everything a step's queries attend to: pages, 16-bit window blocks and the
// step's own tokens. A grid of persistent CTAs shares the work evenly in units of one page or one block; a second
// kernel, `combine_kernel`, merges the partial results of a (request, row tile, KV head) and rotates them back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "decode.h"

namespace vllm_kvcompress {
namespace sm90 {

constexpr int kWarps = 4;                           // compute warps of a CTA; one more warp loads
constexpr int kThreads = 32 * (kWarps + 1);
constexpr int kComputeThreads = 32 * kWarps;
constexpr int kWarpTokens = kPageTokens / kWarps;   // tokens of a page one warp reads
constexpr int kBlockTokens = 16;                    // tokens of a window block, or of a part of one, read at a time
constexpr int kMaxNewTokens = 8;
constexpr int kMaxCtas = 512;                       // bound on the grid, for sizing the workspace
// Steps that read fewer bytes leave the L2 to what others keep there: no page is read twice. Steps that read many times
// the L2 were 2 % slower so when it held another kernel's output.
constexpr int64_t kEvictFirstBytes = 256 << 20;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLazyMax = 4.f;                     // scores may exceed the running maximum by this many powers of 2
constexpr float kCodeUnit = 16777216.f;             // 2^24: the bits of a code, read as fp16, are code * 2^-24

// ---- inline PTX ------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void mbarrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred ready;\nspin:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n"
      "@ready bra done;\nbra spin;\ndone:\n}\n" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(uint32_t destination, const void* source, int bytes, uint32_t bar,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          destination),
      "l"(source), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t evict_normal() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void compute_barrier() {  // the compute warps only
  asm volatile("bar.sync 1, %0;" ::"n"(kComputeThreads) : "memory");
}
// D[16 x 8] += A[16 x 16] B[16 x 8], fp16 operands, float32 accumulators.
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t a) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two floats as an fp16 pair, the first in the low half; beyond fp16's range they saturate (an inf would become NaN).
__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ float2 unpack_half2(uint32_t x) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}
__device__ __forceinline__ uint32_t multiply_half2(uint32_t x, float factor) {
  const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&x), __float2half2_rn(factor));
  return *reinterpret_cast<const uint32_t*>(&product);
}
// The 16-bit elements number `half` (0: low, 1: high) of two words, side by side.
template <int half>
__device__ __forceinline__ uint32_t pair_halves(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, half ? 0x7632 : 0x5410);
}
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Calls f with the compile-time numbers 0 .. N - 1.
template <int N, int I = 0, typename F>
__device__ __forceinline__ void unroll(F&& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    unroll<N, I + 1>(f);
  }
}
// Codes of a lane's channels of a chunk, in halves of words: two tokens, or two times four channels.
struct Codes {
  uint32_t low, high;  // high: the third bits of codes of 3 bits
};
template <int kBytes>
__device__ __forceinline__ uint32_t load_bits(const uint8_t* from) {
  if constexpr (kBytes == 1) return *from;
  if constexpr (kBytes == 2) return *reinterpret_cast<const uint16_t*>(from);
  static_assert(kBytes <= 2 || kBytes == 4);
  return *reinterpret_cast<const uint32_t*>(from);
}
// A lane's 8 channels of a chunk of 32, of a token whose row begins at `row`: channels 0..3 in the low half, 4..7 in the
// high half. kLow: bytes of low bits before the high bits of codes of 3 bits.
template <int kBits, int kLow>
__device__ __forceinline__ Codes key_codes(const uint8_t* row, int chunk, int j) {
  Codes codes{0, 0};
  if constexpr (kBits == 4) {
    codes.low = load_bits<4>(row + 16 * chunk + 4 * j);
  } else if constexpr (kBits == 1) {
    const uint32_t x = load_bits<1>(row + 4 * chunk + j);
    codes.low = x | x << 12;
  } else {
    codes.low = __byte_perm(load_bits<2>(row + 8 * chunk + 2 * j), 0, 0x4140);
    if constexpr (kBits == 3) {
      const uint32_t x = load_bits<1>(row + kLow + 4 * chunk + j);
      codes.high = x | x << 12;
    }
  }
  return codes;
}
template <int N>
__device__ __forceinline__ void load_words(uint32_t (&x)[N], const uint8_t* from) {
  if constexpr (N >= 4) {
    static_assert(N % 4 == 0);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + 4 * i);
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  } else if constexpr (N == 1) {
    x[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    static_assert(N == 2);
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    x[0] = v.x, x[1] = v.y;
  }
}

// ---- codes as fp16 subnormals ----------------------------------------------------------------------------------

// A word holds 16 codes: channels 0..7 in its low half, 8..15 in its high half, 2 bits each. Masking position p leaves
// the fp16 pair (channel p, channel p + 8) as code * 4^shift_of(p) * 2^-24, exactly. Positions 5..7 would reach the
// exponent's sign bits, so they are masked in the word shifted right by 10.
__host__ __device__ constexpr int shift_of(int p) { return p < 5 ? p : p - 5; }
__host__ __device__ constexpr float power4(int s) { return static_cast<float>(1 << (2 * s)); }
__device__ __forceinline__ uint32_t codes_at(uint32_t word, uint32_t word_shifted10, int p) {
  return (p < 5 ? word : word_shifted10) & (0x00030003u << (2 * shift_of(p)));
}

// ---- codes of Lloyd-Max levels ---------------------------------------------------------------------------------

// The levels are a t (1 + b t^2) in the centred code t (quantizers/lloyd_max.py, `cubic`); a goes into the norms. Here a
// pair of codes becomes a pair of 2t (1 + b t^2): the codes, moved to an odd bit position, or-ed into the mantissa of
// 1024 are fp16 numbers from which one exact operation makes the odd integers 2t; three more make the cubic. bend: b / 4.
template <bool kBent = true>
__device__ __forceinline__ uint32_t cubic(uint32_t mantissa, int bit, int bits, __half2 bend) {
  const uint32_t biased = mantissa | 0x64006400u;  // 1024 + code * 2^bit
  const __half2 x = *reinterpret_cast<const __half2*>(&biased);
  const float step = 2.f / static_cast<float>(1 << bit);
  const float offset = -(1024.f * step + static_cast<float>((1 << bits) - 1));
  const __half2 t = bit == 1 ? __hadd2(x, __float2half2_rn(offset))
                             : __hfma2(x, __float2half2_rn(step), __float2half2_rn(offset));
  const __half2 level = kBent ? __hmul2(t, __hfma2(__hmul2(t, t), bend, __float2half2_rn(1.f))) : t;
  return *reinterpret_cast<const uint32_t*>(&level);
}
// Each half of `word` holds four codes of 4 bits; the pair at position p.
__device__ __forceinline__ uint32_t levels4(uint32_t word, int p, __half2 bend) {
  const int bit = p & 1 ? 5 : 1;
  return cubic((p < 2 ? word << 1 : word >> 7) & (0x000f000fu << bit), bit, 4, bend);
}
// Each half of `low` holds the low bits of eight codes of 3 bits, each half of `high` their high bits in its low byte.
__device__ __forceinline__ uint32_t levels3(uint32_t low, uint32_t high, int p, __half2 bend) {
  const int bit = 2 * (p & 3) + 1;
  const int up = bit + 2 - p;
  const uint32_t two = (p < 4 ? low << 1 : low >> 7) & (0x00030003u << bit);
  return cubic(two | ((up < 0 ? high >> -up : high << (up < 0 ? 0 : up)) & (0x00040004u << bit)), bit, 3, bend);
}

// Each half of `word` holds four codes of 2 bits.
template <bool kBent>
__device__ __forceinline__ uint32_t levels2(uint32_t word, int p, __half2 bend) {
  const int bit = 2 * p + 1;
  return cubic<kBent>(word << 1 & (0x00030003u << bit), bit, 2, bend);
}
// Each half of `word` holds codes of 1 bit, from bit 0 on: their levels are -1 and 1.
__device__ __forceinline__ uint32_t levels1(uint32_t word, int p) {
  return (~word << (15 - p) & 0x80008000u) | 0x3c003c00u;
}
template <int kBits, bool kBent>
__device__ __forceinline__ uint32_t levels(const Codes& codes, int p, __half2 bend) {
  if constexpr (kBits == 4) return levels4(codes.low, p, bend);
  if constexpr (kBits == 3) return levels3(codes.low, codes.high, p, bend);
  if constexpr (kBits == 2) return levels2<kBent>(codes.low, p, bend);
  return levels1(codes.low, p);
}

// ---- shapes ----------------------------------------------------------------------------------------------------

// What the formats have in common: how the channels of a head lie in a warp's fragments. Pages of two parts keep the
// parts apart, so that all lanes meet the same kind of code: for `kHalves` all is as for two smaller heads, for `kChunks`
// as for heads of 32 channels.
enum Order : int { kWhole = 1, kHalves = 2, kChunks = 3 };
constexpr int kChunk = 32;

template <int D, int kOrder>
struct Fragments {
  static constexpr int kKeyWords = D / 64;        // groups of 16 channels of one token that a lane multiplies with
  static constexpr int kTiles = D / 16;           // 16-channel tiles of the output
  static constexpr int kSets = kOrder == kChunks ? D / kChunk : kOrder == kHalves || D == 256 ? 2 : 1;
  static constexpr int kPositions = kTiles / kSets;  // tiles of a set: consecutive channels of an accumulator row
  static constexpr int kHighStep = kOrder == kWhole ? 8 : kPositions;  // channels from row g of a tile to row g + 8
  static constexpr int kBlockBytes = kBlockTokens * 4 * D;
  static constexpr int kRowBytes = 4 * D;         // one 16-bit token: K | V

  // First channel of group w of lane j of a quad: its pairs are channels (q, q + 8) from there, of a chunk (q, q + 4).
  __host__ __device__ static constexpr int query_channel(int w, int j) {
    if constexpr (kOrder == kWhole) {
      return 16 * (kKeyWords * j + w);
    } else if constexpr (kOrder == kChunks) {
      return kChunk * w + 8 * j;
    } else {
      constexpr int kHalf = kKeyWords / 2;
      return w / kHalf * (D / 2) + 16 * (kHalf * j + w % kHalf);
    }
  }
  // Channel of row g of the first tile of a set; tile q of the set has the q-th after it.
  __host__ __device__ static constexpr int value_channel(int set, int g) {
    if constexpr (kOrder != kWhole) return set * (D / kSets) + g * (2 * kPositions);
    return D == 64 ? 16 * (g & 3) + 4 * (g >> 2) : D == 128 ? 16 * g : 16 * (2 * g + set);
  }
  // Where channel d of an output row lies among the accumulators, as tile * 16 + row of the tile.
  __host__ __device__ static constexpr int accumulator_of(int d) {
    if constexpr (kOrder != kWhole) {
      const int set = d / (D / kSets), r = d % (D / kSets);
      return (set * kPositions + r % kPositions) * 16 + r / kPositions % 2 * 8 + r / (2 * kPositions);
    }
    const int high = d >> 3 & 1;
    if constexpr (D == 64) return (d & 3) * 16 + high * 8 + (d >> 4) + (d >> 2 & 1) * 4;
    if constexpr (D == 128) return (d & 7) * 16 + high * 8 + (d >> 4);
    return ((d >> 4 & 1) * 8 + (d & 7)) * 16 + high * 8 + (d >> 5);
  }
};

// Where things lie in a head's share of a page (formats/base.py), and in which units they are multiplied.
template <int D, int kCode>
struct Shape;

template <int D>
struct Shape<D, kAffine2> : Fragments<D, kWhole> {
  static constexpr int kCodeBytes = D / 4;        // bytes of codes of one token of one tensor
  static constexpr int kValueCodes = kPageTokens * kCodeBytes;
  static constexpr int kKeyScales = 2 * kValueCodes;
  static constexpr int kValueScales = kKeyScales + kPageTokens * 4;
  static constexpr int kKeyMean = kValueScales + kPageTokens * 4;

  // Masking multiplies the codes at position q by this; queries are divided by it.
  __host__ __device__ static constexpr float key_unit(int q) { return power4(shift_of(q)); }
  // Keeps exact keys times `key_unit` inside fp16.
  static constexpr float kHeadroom = 256.f;
  // Sums over the codes of tile t's channels are in this unit of the values'.
  __host__ __device__ static constexpr float value_unit(int tile) {
    return power4(shift_of(tile % 8)) / kCodeUnit;
  }
};

template <int D, int kOrder>
struct LloydMaxShape : Fragments<D, kOrder> {
  static constexpr float kHeadroom = 1.f;
  __host__ __device__ static constexpr float key_unit(int) { return 1.f; }
  __host__ __device__ static constexpr float value_unit(int) { return 1.f; }
};

template <int D>
struct Shape<D, kLloydMax4> : LloydMaxShape<D, kWhole> {
  static constexpr int kCodeBytes = D / 2;
  static constexpr int kValueCodes = kPageTokens * kCodeBytes;
  static constexpr int kKeyScales = 2 * kValueCodes;
  static constexpr int kValueScales = kKeyScales + kPageTokens * 2;
  static constexpr int kKeyMean = kValueScales + kPageTokens * 2;
};

// Half of the channels with 4 bits, the other half with 3: of the latter all low bits, then all high bits.
template <int D>
struct Shape<D, kLloydMax43> : LloydMaxShape<D, kHalves> {
  static constexpr int kCodeBytes = D / 4;        // of the first half
  static constexpr int kLowBytes = D / 8, kMoreBytes = D / 8 + D / 16;  // of the second half
  static constexpr int kMoreKeyCodes = kPageTokens * kCodeBytes;
  static constexpr int kValueCodes = kMoreKeyCodes + kPageTokens * kMoreBytes;
  static constexpr int kMoreValueCodes = kValueCodes + kPageTokens * kCodeBytes;
  static constexpr int kKeyScales = 2 * kValueCodes;
  static constexpr int kValueScales = kKeyScales + kPageTokens * 4;
  static constexpr int kKeyMean = kValueScales + kPageTokens * 4;
};

// A row of keys or values in parts of whole chunks, each with bits and scale of its own.
template <int D, bool kIsAffine, int kFirstChannels, int kFirstBits, int kRestBits = 0>
struct Row {
  static constexpr bool kAffine = kIsAffine;
  static constexpr int kParts = kFirstChannels == D ? 1 : 2;
  static constexpr int kScaleBytes = kAffine ? 4 : 2 * kParts;
  __host__ __device__ static constexpr int channels(int part) { return part ? D - kFirstChannels : kFirstChannels; }
  __host__ __device__ static constexpr int bits(int part) { return part ? kRestBits : kFirstBits; }
  __host__ __device__ static constexpr int bytes(int part) { return channels(part) * bits(part) / 8; }
  static constexpr int kBytes = bytes(0) + bytes(1);
  __host__ __device__ static constexpr int part_of(int chunk) { return chunk * kChunk >= kFirstChannels; }
  __host__ __device__ static constexpr int chunk_of_part(int chunk) {
    return chunk - (part_of(chunk) ? kFirstChannels / kChunk : 0);
  }
  static_assert(kFirstChannels % kChunk == 0);
};

// Any two rows, and signs of what the keys' codes leave over.
template <int D, typename KeyRow, typename ValueRow, bool kHasSigns>
struct ChunkedShape : LloydMaxShape<D, kChunks> {
  using Keys = KeyRow;
  using Values = ValueRow;
  static constexpr bool kSigns = kHasSigns;
  static constexpr int kValueCodes = kPageTokens * Keys::kBytes;
  static constexpr int kSignCodes = kValueCodes + kPageTokens * Values::kBytes;
  static constexpr int kKeyScales = kSignCodes + (kSigns ? kPageTokens * D / 8 : 0);
  static constexpr int kSignNorms = kKeyScales + kPageTokens * Keys::kScaleBytes;
  static constexpr int kValueScales = kSignNorms + (kSigns ? kPageTokens * 2 : 0);
  static constexpr int kKeyMean = kValueScales + kPageTokens * Values::kScaleBytes;
};
template <>
struct Shape<64, kLloydMax43> : ChunkedShape<64, Row<64, false, 32, 4, 3>, Row<64, false, 32, 4, 3>, false> {};
template <int D>
struct Shape<D, kLloydMax32> : ChunkedShape<D, Row<D, false, D / 4, 3, 2>, Row<D, false, D / 4, 3, 2>, false> {};
template <int D>
struct Shape<D, kLloydMax43Signs> : ChunkedShape<D, Row<D, false, D / 2, 3, 2>, Row<D, false, D / 2, 4, 3>, true> {};
template <int D>
struct Shape<D, kLloydMax32Signs> : ChunkedShape<D, Row<D, false, D / 4, 2, 1>, Row<D, false, D / 4, 3, 2>, true> {};
template <int D>
struct Shape<D, kAffine2Signs> : ChunkedShape<D, Row<D, true, D, 2>, Row<D, true, D, 2>, true> {};

template <int D, int kCode>
constexpr bool kIsChunked = kCode >= kLloydMax32 && kCode != kLloydMax43 || (D == 64 && kCode == kLloydMax43);

// What the other formats do not have, so that they compile beside.
template <typename S, bool kChunked>
struct RowsOf {
  using Keys = Row<64, true, 64, 2>;
  using Values = Keys;
  static constexpr bool kSigns = false;
};
template <typename S>
struct RowsOf<S, true> {
  using Keys = typename S::Keys;
  using Values = typename S::Values;
  static constexpr bool kSigns = S::kSigns;
};

// Scores are summed apart for each part of the keys and the signs; weights are made for each part of the values.
template <int D, int kCode>
constexpr int key_parts() {
  if constexpr (kIsChunked<D, kCode>) return Shape<D, kCode>::Keys::kParts + Shape<D, kCode>::kSigns;
  return kCode == kLloydMax43 ? 2 : 1;
}
template <int D, int kCode>
constexpr int value_parts() {
  if constexpr (kIsChunked<D, kCode>) return Shape<D, kCode>::Values::kParts;
  return kCode == kLloydMax43 ? 2 : 1;
}

// A page with its mean; a block of 16 tokens is smaller.
template <int D, int kCode>
constexpr int kPageBytes = Shape<D, kCode>::kKeyMean + 2 * D;

// ---- the work list ---------------------------------------------------------------------------------------------

// One request's part of the work, the same for each of its row tiles and KV heads. Units in order: sink blocks, pages,
// recent blocks, one unit of new tokens.
struct Request {
  int history;      // tokens before this step's
  int num_new;      // 0: the request has no work
  int sink_end;     // tokens [0, sink_end) are sinks
  int recent_begin; // tokens [recent_begin, history) are recent, sinks excluded
  int sink_units, page_units, recent_units;

  __device__ __forceinline__ int units() const {
    return num_new > 0 ? sink_units + page_units + recent_units + 1 : 0;
  }
};

struct WorkShape {
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  int num_reqs, max_query_len, sink_tokens, recent_tokens;
  int segments;  // row tiles x KV heads: items of a request
};

__device__ __forceinline__ Request load_request(const WorkShape& s, int b) {
  Request r;
  const int begin = __ldg(s.query_start_loc + b);
  r.num_new = min(__ldg(s.query_start_loc + b + 1) - begin, s.max_query_len);
  r.history = max(__ldg(s.seq_lens + b) - r.num_new, 0);
  r.sink_end = min(s.sink_tokens, r.history);
  r.recent_begin = s.recent_tokens > 0 ? max(r.history - s.recent_tokens, r.sink_end) : r.history;
  r.sink_units = (r.sink_end + kBlockTokens - 1) / kBlockTokens;
  r.page_units = (r.history + kPageTokens - 1) / kPageTokens;
  r.recent_units = r.recent_begin < r.history
                       ? (r.history + kBlockTokens - 1) / kBlockTokens - r.recent_begin / kBlockTokens
                       : 0;
  return r;
}

// Units of all requests; every lane of the warp gets the sum.
__device__ __forceinline__ int count_units(const WorkShape& s) {
  int sum = 0;
  for (int b = threadIdx.x & 31; b < s.num_reqs; b += 32) sum += load_request(s, b).units();
  return __reduce_add_sync(~0u, sum) * s.segments;
}

// CTAs that take part: all if each has enough to do, else two a multiprocessor, else one unit each.
__device__ __forceinline__ int active_ctas(int total, int num_ctas, int num_sms) {
  return min(num_ctas, max(min(total, 2 * num_sms), total / 8));
}
__device__ __forceinline__ int first_unit(int cta, int total, int active) {
  return static_cast<int>(static_cast<int64_t>(total) * cta / active);
}

// Where partial results lie. Slot s: kRows x D sums of weighted values, kRows (maximum, sum of weights).
template <int kRows, int D>
struct Workspace {
  float* sums;
  float2* states;
  int2* spans;  // an item's first and last CTA

  __device__ Workspace(const DecodeParams& p, int num_ctas, int segments) {
    const int64_t slots = num_ctas + static_cast<int64_t>(p.num_reqs) * segments;
    sums = static_cast<float*>(p.workspace);
    states = reinterpret_cast<float2*>(sums + slots * (kRows * D));
    spans = reinterpret_cast<int2*>(states + slots * kRows);
  }
};

// A place in the work list: request b, item `segment` of it, unit `unit` of the item.
struct Cursor {
  int b, segment, unit;
};

// The place of global unit `u`, found by the whole warp.
__device__ __forceinline__ Cursor find_unit(const WorkShape& s, int u) {
  const int lane = threadIdx.x & 31;
  int before = 0;
  for (int base = 0;; base += 32) {
    const int b = base + lane;
    const int units = b < s.num_reqs ? load_request(s, b).units() : 0;
    int end = units;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int other = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += other;
    }
    const bool reached = before + end * s.segments > u;
    const unsigned found = __ballot_sync(~0u, reached);
    if (found || base + 32 >= s.num_reqs) {
      const int who = found ? __ffs(found) - 1 : 31;
      const int inside = u - before - __shfl_sync(~0u, end - units, who) * s.segments;
      const int count = max(__shfl_sync(~0u, units, who), 1);
      return {base + who, inside / count, inside % count};
    }
    before += __shfl_sync(~0u, end, 31) * s.segments;
  }
}

// The tables and queries of the whole step into the L2, by all CTAs together: the lengths, the tables and the pages are
// otherwise three latencies in a row.
__device__ __forceinline__ void prefetch_tables(const DecodeParams& p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t table_lines = (p.num_reqs * p.block_table_stride * 4 + 127) / 128;
  const int64_t query_lines = (p.num_tokens * p.q_token_stride * 2 + 127) / 128;
  const char* line = nullptr;
  if (index < table_lines) {
    line = reinterpret_cast<const char*>(p.block_table) + index * 128;
  } else if (index - table_lines < query_lines) {
    line = static_cast<const char*>(p.q) + (index - table_lines) * 128;
  }
  if (line != nullptr) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// ---- what the loader tells the compute warps about a stage -----------------------------------------------------

enum UnitKind : int { kSkip = 0, kPage = 1, kBlock = 2, kNew = 3 };

// kPage: first = position of the page's first token, count = tokens to read, mask = which of its 16-token parts have
//        a window block (those of their tokens that lie in a window are not read here).
// kBlock: rows first <= r < count are read.   kNew: count rows.
struct Unit {
  int kind, first, count, mask;
};

// ---- decode ----------------------------------------------------------------------------------------------------

// kColumns / 8 query tiles of 8 rows. kPacked: at most 4 rows, laid twice side by side so that one score fragment
// serves 32 tokens. kMeans: pages have a mean key. kParts, kValueParts: of
// `kCode`; arguments because cudafe++ 13.0 crashes where a constant of the function sizes a lambda's parameter.
template <int D, int kCode, int kParts, int kValueParts, int NT, bool kPacked, bool kMeans, int kStages, int kCtasPerSm>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) decode_kernel(const DecodeParams p, int num_sms, int row_tiles) {
  using S = Shape<D, kCode>;
  constexpr bool kAffine = kCode == kAffine2, kChunked = kIsChunked<D, kCode>;
  using Rows = RowsOf<S, kChunked>;
  using Keys = typename Rows::Keys;
  using Values = typename Rows::Values;
  constexpr bool kZeros = kAffine || (kChunked && Values::kAffine);  // values have zero-points
  constexpr int kStageBytes = kPageBytes<D, kCode>;
  static_assert(S::kBlockBytes <= kStageBytes && kStageBytes % 128 == 0);
  constexpr int W = S::kKeyWords;
  constexpr int kTiles = S::kTiles;
  constexpr int kRows = kPacked ? 4 : 8 * NT;
  constexpr int kColumns = 8 * NT;
  constexpr int kOutStride = D + 8;
  static_assert(!kPacked || NT == 1);

  extern __shared__ __align__(128) uint8_t shared[];
  uint8_t* const stages = shared;
  float* const out_buffer = reinterpret_cast<float*>(shared + kStages * kStageBytes);  // [warps][kRows][kOutStride]
  float* const max_buffer = out_buffer + kWarps * kRows * kOutStride;                     // [warps][kColumns]
  float* const sum_buffer = max_buffer + kWarps * kColumns;
  float* const zero_buffer = sum_buffer + kWarps * kColumns;
  Unit* const units = reinterpret_cast<Unit*>(zero_buffer + kWarps * kColumns);           // [kStages]
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(units + kStages);                // full, then empty
  const uint32_t full = shared_address(barriers), empty = shared_address(barriers + kStages);

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  prefetch_tables(p);
  const int group = p.num_heads / p.num_kv_heads;
  const bool windows = p.window_cache != nullptr;
  const WorkShape shape{p.query_start_loc, p.seq_lens, p.num_reqs, p.max_query_len, windows ? p.sink_tokens : 0,
                        windows ? p.recent_tokens : 0, row_tiles * p.num_kv_heads};
  const int total = count_units(shape);
  if (threadIdx.x < kStages) {
    mbarrier_init(full + threadIdx.x * 8, 1);
    mbarrier_init(empty + threadIdx.x * 8, kWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  // The combine kernel may start as soon as there is room: it loads the rotation, then waits for the end of this one.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int active = active_ctas(total, gridDim.x, num_sms);
  const int cta = blockIdx.x;
  if (cta >= active) return;
  int u = first_unit(cta, total, active);
  const int u_end = first_unit(cta + 1, total, active);
  Cursor at = find_unit(shape, u);

  // ---- loader ----
  if (warp == kWarps) {
    const uint64_t policy = total * p.head_bytes < kEvictFirstBytes ? evict_first() : evict_normal();
    const int block_parts = windows ? p.window_block_tokens / kBlockTokens : 1;
    int stage = 0;
    uint32_t parity = 1;  // the first round of stages is empty already
    while (u < u_end) {
      // Each lane looks up one unit, so that the table's latency is paid once for 32 units.
      Cursor mine = at;
      Request r = load_request(shape, mine.b);
      int ahead = lane;
      for (;;) {
        const int left = (shape.segments - mine.segment) * r.units() - mine.unit;
        if (ahead < left) {
          const int position = mine.unit + ahead;
          mine.segment += position / r.units();
          mine.unit = position % r.units();
          break;
        }
        if (mine.b + 1 >= shape.num_reqs) break;  // beyond the end: never used
        ahead -= max(left, 0);
        mine = {mine.b + 1, 0, 0};
        r = load_request(shape, mine.b);
      }
      Unit unit{kSkip, 0, 0, 0};
      const uint8_t* source = nullptr;
      int bytes = 0;
      if (u + lane < u_end) {
        const int head = mine.segment % p.num_kv_heads;
        const int32_t* table = p.block_table + mine.b * p.block_table_stride;
        const int32_t* window_table = p.window_table + mine.b * p.window_table_stride;
        int i = mine.unit;
        int block = -1;
        if (i < r.sink_units) {
          block = i;
          unit = {kBlock, 0, min(r.sink_end - i * kBlockTokens, kBlockTokens), 0};
        } else if ((i -= r.sink_units) < r.page_units) {
          const int first = i * kPageTokens, count = min(r.history - first, kPageTokens);
          int mask = 0;
          bool covered = false;
          if (first < r.sink_end || first + count > r.recent_begin) {
            covered = true;
            for (int part = 0; part * kBlockTokens < count; ++part) {
              const int begin = first + part * kBlockTokens, end = min(begin + kBlockTokens, first + count);
              const bool touched = begin < r.sink_end || end > r.recent_begin;
              const bool present = touched && __ldg(window_table + begin / kBlockTokens / block_parts) != 0;
              mask |= present << part;
              covered &= present && (end <= r.sink_end || begin >= r.recent_begin || r.sink_end >= r.recent_begin);
            }
          }
          const int page = covered ? 0 : __ldg(table + i);
          if (page != 0) {
            unit = {kPage, first, count, mask};
            source = static_cast<const uint8_t*>(p.pages) + page * p.page_stride + head * p.head_bytes;
            bytes = static_cast<int>(p.head_bytes);
          }
        } else if ((i -= r.page_units) < r.recent_units) {
          block = r.recent_begin / kBlockTokens + i;
          unit = {kBlock, max(r.recent_begin - block * kBlockTokens, 0),
                  min(r.history - block * kBlockTokens, kBlockTokens), 0};
        } else {
          const int64_t row = __ldg(p.query_start_loc + mine.b);
          unit = {kNew, 0, r.num_new, 0};
          source = static_cast<const uint8_t*>(p.new_kv) + (row * p.new_kv_row_stride + head * 2 * D) * 2;
          bytes = r.num_new * S::kRowBytes;
        }
        if (block >= 0) {
          const int id = __ldg(window_table + block / block_parts);
          if (id == 0) {
            unit = {kSkip, 0, 0, 0};
          } else {
            source = static_cast<const uint8_t*>(p.window_cache) + id * p.window_block_stride +
                     static_cast<int64_t>(head * block_parts + block % block_parts) * S::kBlockBytes;
            bytes = S::kBlockBytes;
          }
        }
      }
      const int batch = min(32, u_end - u);
      for (int s = 0; s < batch; ++s) {
        Unit next{__shfl_sync(~0u, unit.kind, s), __shfl_sync(~0u, unit.first, s), __shfl_sync(~0u, unit.count, s),
                  __shfl_sync(~0u, unit.mask, s)};
        const auto address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(source), s);
        const auto* from = reinterpret_cast<const uint8_t*>(address);
        const int size = __shfl_sync(~0u, bytes, s);
        const uint32_t bar = full + stage * 8, to = shared_address(stages + stage * kStageBytes);
        mbarrier_wait(empty + stage * 8, parity);
        if (lane == 0) {
          units[stage] = next;
          if (size) {
            mbarrier_arrive_expect(bar, size);
          } else {
            mbarrier_arrive(bar);
          }
        }
        __syncwarp();
        if (next.kind == kNew) {
          if (lane < next.count)
            bulk_copy(to + lane * S::kRowBytes, from + lane * p.new_kv_row_stride * 2, S::kRowBytes, bar,
                      policy);
        } else if (size && lane == 0) {
          bulk_copy(to, from, size, bar, policy);
        }
        if (++stage == kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
      u += batch;
      if (u < u_end) {  // continue after the last lane's unit
        at = {__shfl_sync(~0u, mine.b, 31), __shfl_sync(~0u, mine.segment, 31), __shfl_sync(~0u, mine.unit, 31) + 1};
        r = load_request(shape, at.b);
        if (at.unit == r.units()) {
          at.unit = 0;
          ++at.segment;
        }
        while (at.segment == shape.segments || load_request(shape, at.b).units() == 0) at = {at.b + 1, 0, 0};
      }
    }
    // The last pages are on their way: now the rotation, which the combine kernel waits for, into the L2.
    if (p.v_unrotation != nullptr) {
      const int lines = p.num_kv_heads * D * D / 64;
      for (int line = lane * active + cta; line < lines; line += 32 * active)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(p.v_unrotation) + line * 128));
    }
    return;
  }

  // ---- compute warps ----
  // Rows of a score fragment are tokens in the order 0 4 1 5 2 6 3 7, +8: then the values' loads, four consecutive
  // tokens at once, meet no bank conflict, and a word pair (token j, token j + 4) is one operand.
  const int g = lane >> 2, j = lane & 3;
  const int row_token = (g >> 1) + 4 * (g & 1);
  const bool low_columns = j < 2;
  const uint32_t first_half = g < 4 ? ~0u : 0u;
  const float scale = p.scale * kLog2e;
  const bool window_bf16 = p.window_dtype == DType::kBFloat16;
  __half2 bend[2], value_bend[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    bend[part] = __float2half2_rn(p.key_levels.bend[part] * 0.25f);
    value_bend[part] = __float2half2_rn(p.value_levels.bend[part] * 0.25f);
  }

  int stage = 0, turn = 0;
  uint32_t parity = 0;
  while (u < u_end) {
    const Request r = load_request(shape, at.b);
    const int row_tile = at.segment / p.num_kv_heads, head = at.segment % p.num_kv_heads;
    const int first_row = row_tile * kRows;
    const int rows = min(r.num_new * group - first_row, kRows);
    const int64_t token0 = __ldg(p.query_start_loc + at.b);
    const int item_begin = u, item_end = min(u_end, u + r.units() - at.unit);

    // Query fragments: position q's channels are divided by 4^shift, which masking multiplies the codes with.
    uint32_t query[NT][8 * W];
    uint32_t sign_query[NT][Rows::kSigns ? 8 * W : 1];  // S q, for the signs
    float query_sum[NT][2];
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      const int row = (kPacked ? g & 3 : g) + 8 * t;
      const bool real = row < rows;
      const int full_row = first_row + (real ? row : 0);
      const __half* source = static_cast<const __half*>(p.q) + (token0 + full_row / group) * p.q_token_stride +
                             (head * group + full_row % group) * p.q_head_stride;
      float sum = 0.f;
      if constexpr (kChunked) {
        const __half* const signs = static_cast<const __half*>(p.q_signs) + (source - static_cast<const __half*>(p.q));
#pragma unroll
        for (int c = 0; c < 2 * W; ++c) {
          auto pairs = [&](const __half* from, uint32_t* to) {
            const uint4 x = real ? *reinterpret_cast<const uint4*>(from + S::query_channel(c, j)) : make_uint4(0, 0, 0, 0);
            to[0] = pair_halves<0>(x.x, x.z), to[1] = pair_halves<1>(x.x, x.z);
            to[2] = pair_halves<0>(x.y, x.w), to[3] = pair_halves<1>(x.y, x.w);
          };
          pairs(source, query[t] + 4 * c);
          if constexpr (Rows::kSigns) pairs(signs, sign_query[t] + 4 * c);
          if constexpr (Keys::kAffine) {
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              const float2 x = unpack_half2(query[t][4 * c + q]);
              sum += x.x + x.y;
            }
          }
        }
      } else
#pragma unroll
      for (int w = 0; w < W; ++w) {
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (real) {
          low = *reinterpret_cast<const uint4*>(source + S::query_channel(w, j));
          high = *reinterpret_cast<const uint4*>(source + S::query_channel(w, j) + 8);
        }
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          const uint32_t pair = q & 1 ? pair_halves<1>(word_of(low, q / 2), word_of(high, q / 2))
                                      : pair_halves<0>(word_of(low, q / 2), word_of(high, q / 2));
          if constexpr (kAffine) {
            const float2 x = unpack_half2(pair);
            sum += x.x + x.y;
            query[t][w * 8 + q] = pack_half2(x.x / S::key_unit(q), x.y / S::key_unit(q));
          } else {
            query[t][w * 8 + q] = pair;
          }
        }
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      sum *= scale;
      query_sum[t][0] = __shfl_sync(~0u, sum, 8 * j);
      query_sum[t][1] = __shfl_sync(~0u, sum, 8 * j + 4);
    }

    float out[NT][kTiles][4];
    float shift[NT][2], weight_sum[NT][2], zero_sum[NT][2];  // shift = -running maximum
    bool unseen[NT][2];
#pragma unroll
    for (int t = 0; t < NT; ++t) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) out[t][i][0] = out[t][i][1] = out[t][i][2] = out[t][i][3] = 0.f;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        shift[t][k] = weight_sum[t][k] = zero_sum[t][k] = 0.f;
        unseen[t][k] = true;
      }
    }
    bool in_code_units = true;  // `out` holds sums of codes as they are multiplied, else of values

    auto rescale_out = [&](bool to_code_units) {
      if (!kAffine || in_code_units == to_code_units) return;
      in_code_units = to_code_units;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const float unit = S::value_unit(i);
        const float factor = to_code_units ? unit : 1.f / unit;
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int k = 0; k < 4; ++k) out[t][i][k] *= factor;
      }
    };

    // Weights of a 16 x 8 score fragment in place of the scores, from which the maximum is subtracted.
    auto softmax = [&](float(&scores)[NT][4]) {
      bool outgrown = false;
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const float top = fmaxf(fmaxf(scores[t][0], scores[t][1]), fmaxf(scores[t][2], scores[t][3]));
        outgrown |= top > kLazyMax || unseen[t][0] || unseen[t][1];
      }
      if (__any_sync(~0u, outgrown)) {
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float top = fmaxf(scores[t][k], scores[t][k + 2]);
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
            const bool nothing = top == -INFINITY;
            float factor = 1.f;
            if (unseen[t][k]) {
              top = nothing ? 0.f : top;
              unseen[t][k] = nothing;
            } else {
              top = fmaxf(top, 0.f);
              factor = exp2_fast(-top);
            }
            shift[t][k] -= top;
            scores[t][k] -= top;
            scores[t][k + 2] -= top;
            weight_sum[t][k] *= factor;
            zero_sum[t][k] *= factor;
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              out[t][i][k] *= factor;
              out[t][i][k + 2] *= factor;
            }
          }
      }
#pragma unroll
      for (int t = 0; t < NT; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) scores[t][k] = exp2_fast(scores[t][k]);
        weight_sum[t][0] += scores[t][0] + scores[t][2];
        weight_sum[t][1] += scores[t][1] + scores[t][3];
      }
    };
    // Weights times the scales of the two rows' values, as operands of the product with the values.
    auto scaled_weights = [&](const float(&p)[NT][4], float scale0, float scale1, uint32_t(&weights)[NT][2]) {
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        weights[t][0] = transpose8x8(pack_half2(p[t][0] * scale0, p[t][1] * scale0));
        weights[t][1] = transpose8x8(pack_half2(p[t][2] * scale1, p[t][3] * scale1));
      }
    };

    for (; u < item_end; ++u) {
      mbarrier_wait(full + stage * 8, parity);
      const uint8_t* const base = stages + stage * kStageBytes;
      const Unit unit = units[stage];

      if (unit.kind == kPage) {
        if (warp * kWarpTokens < unit.count) {
          rescale_out(true);
          // The page's mean key is one more row of keys; every row of its fragment holds it, so every lane gets its sum.
          float mean_score[NT][4] = {};
          auto add_chunk_mean = [&](int c) {
            const uint4 x = *reinterpret_cast<const uint4*>(base + S::kKeyMean + 2 * S::query_channel(c, j));
            const uint32_t m0 = pair_halves<0>(x.x, x.z), m1 = pair_halves<1>(x.x, x.z);
            const uint32_t m2 = pair_halves<0>(x.y, x.w), m3 = pair_halves<1>(x.y, x.w);
#pragma unroll
            for (int t = 0; t < NT; ++t) {
              mma(mean_score[t], m0, m0, m1, m1, query[t][4 * c], query[t][4 * c + 1]);
              mma(mean_score[t], m2, m2, m3, m3, query[t][4 * c + 2], query[t][4 * c + 3]);
            }
          };
          auto add_mean = [&](int w, int q) {
            // Read anew for each q: the compiler keeps what it has registers for.
            const uint8_t* const from = base + S::kKeyMean + 2 * S::query_channel(w, j) + 4 * (q / 2);
            const uint32_t low = *reinterpret_cast<const uint32_t*>(from);
            const uint32_t high = *reinterpret_cast<const uint32_t*>(from + 16);
            uint32_t x = pair_halves<0>(low, high), y = pair_halves<1>(low, high);
            if constexpr (kAffine) {  // takes back the queries' unit
              x = multiply_half2(x, S::key_unit(q) / S::kHeadroom);
              y = multiply_half2(y, S::key_unit(q + 1) / S::kHeadroom);
            }
#pragma unroll
            for (int t = 0; t < NT; ++t) mma(mean_score[t], x, x, y, y, query[t][w * 8 + q], query[t][w * 8 + q + 1]);
          };
          // Raw scores of kCount tiles of 16 tokens, a part of the channels at a time, and of the mean: independent
          // chains of products, taken in turns so that one's latency hides behind the others.
          auto code_scores = [&](auto count, int first_tile, bool with_mean, float(*c)[kParts][NT][4]) {
            constexpr int kCount = decltype(count)::value;
            if constexpr (kChunked) {
#pragma unroll
              for (int i = 0; i < kCount; ++i)
#pragma unroll
                for (int part = 0; part < kParts; ++part)
#pragma unroll
                  for (int t = 0; t < NT; ++t)
                    c[i][part][t][0] = c[i][part][t][1] = c[i][part][t][2] = c[i][part][t][3] = 0.f;
              const int token = warp * kWarpTokens + row_token + first_tile;
              unroll<2 * W>([&](auto index) {
                constexpr int kAt = decltype(index)::value;
                constexpr int kPart = Keys::part_of(kAt), kIn = Keys::chunk_of_part(kAt), kBits = Keys::bits(kPart);
                constexpr int kRow = Keys::bytes(kPart), kLow = Keys::channels(kPart) / 4;
                const uint8_t* const codes = base + (kPart ? kPageTokens * Keys::bytes(0) : 0) + token * kRow;
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                  const Codes x = key_codes<kBits, kLow>(codes + 16 * i * kRow, kIn, j);
                  const Codes y = key_codes<kBits, kLow>(codes + (16 * i + 8) * kRow, kIn, j);
#pragma unroll
                  for (int q = 0; q < 4; q += 2) {
                    const uint32_t a0 = levels<kBits, !Keys::kAffine>(x, q, bend[kPart]);
                    const uint32_t a1 = levels<kBits, !Keys::kAffine>(y, q, bend[kPart]);
                    const uint32_t a2 = levels<kBits, !Keys::kAffine>(x, q + 1, bend[kPart]);
                    const uint32_t a3 = levels<kBits, !Keys::kAffine>(y, q + 1, bend[kPart]);
#pragma unroll
                    for (int t = 0; t < NT; ++t)
                      mma(c[i][kPart][t], a0, a1, a2, a3, query[t][4 * kAt + q], query[t][4 * kAt + q + 1]);
                  }
                  if constexpr (Rows::kSigns) {
                    const uint8_t* const signs = base + S::kSignCodes + (token + 16 * i) * (D / 8);
                    const Codes u = key_codes<1, 0>(signs, kAt, j), v = key_codes<1, 0>(signs + D, kAt, j);
#pragma unroll
                    for (int q = 0; q < 4; q += 2)
#pragma unroll
                      for (int t = 0; t < NT; ++t)
                        mma(c[i][kParts - 1][t], levels1(u.low, q), levels1(v.low, q), levels1(u.low, q + 1),
                            levels1(v.low, q + 1), sign_query[t][4 * kAt + q], sign_query[t][4 * kAt + q + 1]);
                  }
                }
                if (with_mean) add_chunk_mean(kAt);
              });
              if (with_mean) {
#pragma unroll
                for (int t = 0; t < NT; ++t) mean_score[t][0] *= scale, mean_score[t][1] *= scale;
              }
              return;
            } else {
            constexpr int kGroups = W / kParts;  // of 16 channels
            constexpr int kWords = kAffine ? kGroups : 2 * kGroups;
            const int token = warp * kWarpTokens + row_token + first_tile;
            auto multiply = [&](int i, int part, int group, int q, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
#pragma unroll
              for (int t = 0; t < NT; ++t) {
                const int at = (part * kGroups + group) * 8 + q;
                mma(c[i][part][t], a0, a1, a2, a3, query[t][at], query[t][at + 1]);
              }
            };
            uint32_t x[kCount][kWords], y[kCount][kWords];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
#pragma unroll
              for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int t = 0; t < NT; ++t)
                  c[i][part][t][0] = c[i][part][t][1] = c[i][part][t][2] = c[i][part][t][3] = 0.f;
              const uint8_t* const from = base + (token + 16 * i) * S::kCodeBytes + j * (4 * kWords);
              load_words<kWords>(x[i], from);
              load_words<kWords>(y[i], from + 8 * S::kCodeBytes);
            }
#pragma unroll
            for (int w = 0; w < kGroups; ++w) {
#pragma unroll
              for (int q = 0; q < 8; q += 2) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                  if constexpr (kAffine) {
                    const uint32_t x10 = x[i][w] >> 10, y10 = y[i][w] >> 10;
                    multiply(i, 0, w, q, codes_at(x[i][w], x10, q), codes_at(y[i][w], y10, q),
                             codes_at(x[i][w], x10, q + 1), codes_at(y[i][w], y10, q + 1));
                  } else {
                    // A word holds 8 codes: its halves, beside those of the next word, are pairs 8 channels apart.
                    const uint32_t a = q < 4 ? pair_halves<0>(x[i][2 * w], x[i][2 * w + 1])
                                             : pair_halves<1>(x[i][2 * w], x[i][2 * w + 1]);
                    const uint32_t b = q < 4 ? pair_halves<0>(y[i][2 * w], y[i][2 * w + 1])
                                             : pair_halves<1>(y[i][2 * w], y[i][2 * w + 1]);
                    multiply(i, 0, w, q, levels4(a, q & 3, bend[0]), levels4(b, q & 3, bend[0]),
                             levels4(a, (q & 3) + 1, bend[0]), levels4(b, (q & 3) + 1, bend[0]));
                  }
                }
                if (kMeans && with_mean) add_mean(w, q);
              }
            }
            if constexpr (kParts == 2) {
              // Per token D / 8 bytes of low bits, 16 codes a word, then D / 16 bytes of high bits.
              uint32_t x_high[kCount], y_high[kCount];
              uint32_t x_low[kCount][kGroups], y_low[kCount][kGroups];
#pragma unroll
              for (int i = 0; i < kCount; ++i) {
                const uint8_t* const from = base + S::kMoreKeyCodes + (token + 16 * i) * S::kMoreBytes;
                load_words<kGroups>(x_low[i], from + j * (4 * kGroups));
                load_words<kGroups>(y_low[i], from + 8 * S::kMoreBytes + j * (4 * kGroups));
                x_high[i] = load_bits<2 * kGroups>(from + S::kLowBytes + j * (2 * kGroups));
                y_high[i] = load_bits<2 * kGroups>(from + 8 * S::kMoreBytes + S::kLowBytes + j * (2 * kGroups));
              }
#pragma unroll
              for (int w = 0; w < kGroups; ++w) {
#pragma unroll
                for (int q = 0; q < 8; q += 2) {
#pragma unroll
                  for (int i = 0; i < kCount; ++i) {
                    // The high bits of channels 0..7 in the low half, of 8..15 in the high half.
                    const uint32_t xh = __byte_perm(x_high[i], 0, w ? 0x4342 : 0x4140);
                    const uint32_t yh = __byte_perm(y_high[i], 0, w ? 0x4342 : 0x4140);
                    multiply(i, 1, w, q, levels3(x_low[i][w], xh, q, bend[1]), levels3(y_low[i][w], yh, q, bend[1]),
                             levels3(x_low[i][w], xh, q + 1, bend[1]), levels3(y_low[i][w], yh, q + 1, bend[1]));
                  }
                  if (kMeans && with_mean) add_mean(kGroups + w, q);
                }
              }
            }
            if (kMeans && with_mean) {
#pragma unroll
              for (int t = 0; t < NT; ++t) {
                mean_score[t][0] *= scale * S::kHeadroom;
                mean_score[t][1] *= scale * S::kHeadroom;
              }
            }
            }
          };
          // Scales of the values of two tokens: [token at hand, 8 further on][part].
          float value_scale[2][kValueParts];
          // Scores of the tokens at `token` and `token` + 8 of the page -> weights, in c[0].
          auto page_softmax = [&](int token, float(&c)[kParts][NT][4]) {
            float2 zeros = make_float2(0.f, 0.f);  // of the two tokens' values
            if constexpr (kAffine) {
              const float2 key0 = unpack_half2(*reinterpret_cast<const uint32_t*>(base + S::kKeyScales + token * 4));
              const float2 key1 = unpack_half2(*reinterpret_cast<const uint32_t*>(base + S::kKeyScales + token * 4 + 32));
              const float2 value0 = unpack_half2(*reinterpret_cast<const uint32_t*>(base + S::kValueScales + token * 4));
              const float2 value1 =
                  unpack_half2(*reinterpret_cast<const uint32_t*>(base + S::kValueScales + token * 4 + 32));
              const float scale0 = key0.x * (scale * kCodeUnit), scale1 = key1.x * (scale * kCodeUnit);
              value_scale[0][0] = value0.x, value_scale[1][0] = value1.x;
              zeros = make_float2(value0.y, value1.y);
#pragma unroll
              for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                  const float offset = shift[t][k] + mean_score[t][k];
                  c[0][t][k] = fmaf(scale0, c[0][t][k], fmaf(key0.y, query_sum[t][k], offset));
                  c[0][t][k + 2] = fmaf(scale1, c[0][t][k + 2], fmaf(key1.y, query_sum[t][k], offset));
                }
            } else {
              auto half_at = [&](int offset, int index) {
                return __half2float(*reinterpret_cast<const __half*>(base + offset + index * 2));
              };
              // Codes are multiplied as twice their distance from the middle.
              float key_scale[2][kParts], key_zero[2] = {0.f, 0.f};
              float value_zero[2] = {0.f, 0.f};
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int at = token + 8 * i;
                if constexpr (kChunked && Keys::kAffine) {
                  const float step = half_at(S::kKeyScales, 2 * at);
                  key_scale[i][0] = step * (0.5f * scale);
                  key_zero[i] = half_at(S::kKeyScales, 2 * at + 1) + 1.5f * step;
                } else {
#pragma unroll
                  for (int part = 0; part < kParts - Rows::kSigns; ++part)
                    key_scale[i][part] = half_at(S::kKeyScales, part * kPageTokens + at) * p.key_levels.scale[part] * (0.5f * scale);
                }
                if constexpr (kChunked && Rows::kSigns)
                  key_scale[i][kParts - 1] = half_at(S::kSignNorms, at) * (1.2533141373155003f / D * scale);  // sqrt(pi / 2)
                if constexpr (kChunked && Values::kAffine) {
                  const float step = half_at(S::kValueScales, 2 * at);
                  value_scale[i][0] = 0.5f * step;
                  value_zero[i] = half_at(S::kValueScales, 2 * at + 1) + 1.5f * step;
                } else {
#pragma unroll
                  for (int part = 0; part < kValueParts; ++part)
                    value_scale[i][part] = half_at(S::kValueScales, part * kPageTokens + at) * p.value_levels.scale[part] * 0.5f;
                }
              }
              zeros = make_float2(value_zero[0], value_zero[1]);
#pragma unroll
              for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                  float score = shift[t][k & 1] + mean_score[t][k & 1];
                  if constexpr (kChunked && Keys::kAffine) score = fmaf(key_zero[k >> 1], query_sum[t][k & 1], score);
#pragma unroll
                  for (int part = 0; part < kParts; ++part) score = fmaf(key_scale[k >> 1][part], c[part][t][k], score);
                  c[0][t][k] = score;
                }
            }
            if (unit.count < kPageTokens || unit.mask) {
              const bool has_block = unit.mask >> (token >> 4) & 1;
              auto dead = [&](int x) {
                const int position = unit.first + x;
                return x >= unit.count || (has_block && (position < r.sink_end || position >= r.recent_begin));
              };
              // What nobody wrote may be NaN: its scales and zero are not used either.
              if (dead(token)) {
                zeros.x = 0.f;
#pragma unroll
                for (int t = 0; t < NT; ++t) c[0][t][0] = c[0][t][1] = -INFINITY;
#pragma unroll
                for (int part = 0; part < kValueParts; ++part) value_scale[0][part] = 0.f;
              }
              if (dead(token + 8)) {
                zeros.y = 0.f;
#pragma unroll
                for (int t = 0; t < NT; ++t) c[0][t][2] = c[0][t][3] = -INFINITY;
#pragma unroll
                for (int part = 0; part < kValueParts; ++part) value_scale[1][part] = 0.f;
              }
            }
            softmax(c[0]);
            if constexpr (kZeros) {
#pragma unroll
              for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int k = 0; k < 2; ++k)
                  zero_sum[t][k] = fmaf(c[0][t][k + 2], zeros.y, fmaf(c[0][t][k], zeros.x, zero_sum[t][k]));
            }
          };
          // Values of the 16 tokens from `tile` on; `weights` of each part.
          auto add_values = [&](int tile, const uint32_t(&weights)[kValueParts][NT][2]) {
            const int token = warp * kWarpTokens + tile + j;  // and those 4, 8, 12 further on
            if constexpr (kChunked) {
              unroll<2 * W>([&](auto index) {
                constexpr int kAt = decltype(index)::value;
                constexpr int kPart = Values::part_of(kAt), kIn = Values::chunk_of_part(kAt);
                constexpr int kBits = Values::bits(kPart), kRow = Values::bytes(kPart);
                const uint8_t* const codes =
                    base + S::kValueCodes + (kPart ? kPageTokens * Values::bytes(0) : 0) + token * kRow;
                Codes v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const uint8_t* const from = codes + 4 * i * kRow;
                  if constexpr (kBits == 4) {
                    v[i].low = load_bits<2>(from + 16 * kIn + 2 * g);
                  } else {
                    v[i].low = load_bits<1>(from + 8 * kIn + g);
                    if constexpr (kBits == 3) v[i].high = load_bits<1>(from + Values::channels(kPart) / 4 + 4 * kIn + g / 2);
                  }
                }
                // Halves of words are tokens now; a lane's four codes lie in each.
                Codes near, far;
                near.low = pair_halves<0>(v[0].low, v[1].low), far.low = pair_halves<0>(v[2].low, v[3].low);
                if constexpr (kBits == 3) {
                  near.high = pair_halves<0>(v[0].high, v[1].high) >> (g & 1) * 4;
                  far.high = pair_halves<0>(v[2].high, v[3].high) >> (g & 1) * 4;
                }
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                  const uint32_t a0 = levels<kBits, !Values::kAffine>(near, q, value_bend[kPart]);
                  const uint32_t a1 = levels<kBits, !Values::kAffine>(near, q + 2, value_bend[kPart]);
                  const uint32_t a2 = levels<kBits, !Values::kAffine>(far, q, value_bend[kPart]);
                  const uint32_t a3 = levels<kBits, !Values::kAffine>(far, q + 2, value_bend[kPart]);
#pragma unroll
                  for (int t = 0; t < NT; ++t)
                    mma(out[t][2 * kAt + q], a0, a1, a2, a3, weights[kPart][t][0], weights[kPart][t][1]);
                }
              });
              return;
            } else {
            auto multiply = [&](int i, int part, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
#pragma unroll
              for (int t = 0; t < NT; ++t) mma(out[t][i], a0, a1, a2, a3, weights[part][t][0], weights[part][t][1]);
            };
            constexpr int kSets = S::kSets / kValueParts, kPositions = S::kPositions;
            if constexpr (kAffine) {
              uint32_t v[4][kSets];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const uint8_t* const from = base + S::kValueCodes + (token + 4 * i) * S::kCodeBytes;
                load_words<kSets>(v[i], from + 4 * kSets * (D == 64 ? g & 3 : g));
              }
#pragma unroll
              for (int set = 0; set < kSets; ++set) {
                uint32_t low0 = pair_halves<0>(v[0][set], v[1][set]), high0 = pair_halves<1>(v[0][set], v[1][set]);
                uint32_t low1 = pair_halves<0>(v[2][set], v[3][set]), high1 = pair_halves<1>(v[2][set], v[3][set]);
                if constexpr (D == 64) {  // four words a token: rows 4..7 of a tile are positions 4..7 of the same words
                  const int by = (g >> 2) * 8;
                  low0 >>= by, high0 >>= by, low1 >>= by, high1 >>= by;
                }
                const uint32_t low0s = low0 >> 10, high0s = high0 >> 10, low1s = low1 >> 10, high1s = high1 >> 10;
#pragma unroll
                for (int q = 0; q < kPositions; ++q)
                  multiply(set * kPositions + q, 0, codes_at(low0, low0s, q), codes_at(high0, high0s, q),
                           codes_at(low1, low1s, q), codes_at(high1, high1s, q));
              }
            } else {
              // Rows g of the tiles are the first kPositions channels of a lane, rows g + 8 as many further on: in the
              // words' halves, or in words of their own.
              constexpr int kWords = kPositions == 8 || D == 64 ? 2 : 1;
              uint32_t v[4][kSets * kWords];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const uint8_t* const from = base + S::kValueCodes + (token + 4 * i) * S::kCodeBytes;
                load_words<kSets * kWords>(v[i], from + 4 * kSets * kWords * (D == 64 ? g & 3 : g));
              }
#pragma unroll
              for (int set = 0; set < kSets; ++set)
#pragma unroll
                for (int q = 0; q < kPositions; q += 4) {
                  auto halves = [&](int high, int i) {
                    const uint32_t x = v[i][set * kWords + (kWords == 2 ? high : 0)];
                    const uint32_t y = v[i + 1][set * kWords + (kWords == 2 ? high : 0)];
                    if constexpr (D == 64) return __byte_perm(x, y, g < 4 ? 0x5410 : 0x7632);
                    return (kWords == 2 ? q != 0 : high) ? pair_halves<1>(x, y) : pair_halves<0>(x, y);
                  };
                  const uint32_t low0 = halves(0, 0), high0 = halves(1, 0), low1 = halves(0, 2), high1 = halves(1, 2);
#pragma unroll
                  for (int k = 0; k < 4; ++k)
                    multiply(set * kPositions + q + k, 0, levels4(low0, k, value_bend[0]), levels4(high0, k, value_bend[0]),
                             levels4(low1, k, value_bend[0]), levels4(high1, k, value_bend[0]));
                }
              if constexpr (kValueParts == 2) {
                uint32_t low[4], high[4];  // of 2 * kPositions channels
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const uint8_t* const from = base + S::kMoreValueCodes + (token + 4 * i) * S::kMoreBytes;
                  low[i] = load_bits<kPositions / 2>(from + g * (kPositions / 2));
                  high[i] = load_bits<kPositions / 4>(from + S::kLowBytes + g * (kPositions / 4));
                }
                const uint32_t low0 = pair_halves<0>(low[0], low[1]), low1 = pair_halves<0>(low[2], low[3]);
                const uint32_t high0 = pair_halves<0>(high[0], high[1]), high1 = pair_halves<0>(high[2], high[3]);
                // Channels of rows g + 8: in the same words, or in the upper halves.
                const uint32_t low0s = kPositions == 4 ? low0 : pair_halves<1>(low[0], low[1]);
                const uint32_t low1s = kPositions == 4 ? low1 : pair_halves<1>(low[2], low[3]);
                const uint32_t high0s = kPositions == 4 ? high0 : high0 >> 8, high1s = kPositions == 4 ? high1 : high1 >> 8;
                constexpr int kFurther = kPositions == 4 ? 4 : 0;
#pragma unroll
                for (int q = 0; q < kPositions; ++q)
                  multiply(kPositions + q, kValueParts - 1, levels3(low0, high0, q, value_bend[1]),
                           levels3(low0s, high0s, q + kFurther, value_bend[1]), levels3(low1, high1, q, value_bend[1]),
                           levels3(low1s, high1s, q + kFurther, value_bend[1]));
              }
            }
            }
          };
          if constexpr (kPacked) {
            float c[2][kParts][NT][4];
            code_scores(std::integral_constant<int, 2>(), 0, true, c);
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
              for (int k = 0; k < 4; ++k) c[0][part][0][k] = low_columns ? c[0][part][0][k] : c[1][part][0][k];
            page_softmax(warp * kWarpTokens + row_token + (low_columns ? 0 : 16), c[0]);
            uint32_t of_low[kValueParts][NT][2], of_high[kValueParts][NT][2];
#pragma unroll
            for (int part = 0; part < kValueParts; ++part) {
              uint32_t weights[NT][2];
              scaled_weights(c[0][0], value_scale[0][part], value_scale[1][part], weights);
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                of_low[part][0][k] = weights[0][k] & first_half;
                of_high[part][0][k] = weights[0][k] & ~first_half;
              }
            }
            add_values(0, of_low);
            add_values(16, of_high);
          } else {
#pragma unroll
            for (int tile = 0; tile < kWarpTokens; tile += 16) {
              float c[1][kParts][NT][4];
              uint32_t weights[kValueParts][NT][2];
              code_scores(std::integral_constant<int, 1>(), tile, tile == 0, c);
              page_softmax(warp * kWarpTokens + tile + row_token, c[0]);
#pragma unroll
              for (int part = 0; part < kValueParts; ++part)
                scaled_weights(c[0][0], value_scale[0][part], value_scale[1][part], weights[part]);
              add_values(tile, weights);
            }
          }
        }
      } else if (unit.kind != kSkip) {
        // 16 rows in 16 bits are one warp's work; the warps take turns.
        if (warp == (turn & (kWarps - 1))) {
          rescale_out(false);
          const bool is_new = unit.kind == kNew;
          auto to_half = [&](uint32_t pair, float factor) {
            if (!window_bf16) return factor == 1.f ? pair : multiply_half2(pair, factor);
            return pack_half2(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000u) * factor);
          };
          float c[NT][4] = {};
          if constexpr (kChunked) {
#pragma unroll
            for (int at = 0; at < 2 * W; ++at) {
              const uint8_t* const key0 = base + row_token * S::kRowBytes + 2 * S::query_channel(at, j);
              const uint4 x = *reinterpret_cast<const uint4*>(key0);
              const uint4 y = *reinterpret_cast<const uint4*>(key0 + 8 * S::kRowBytes);
              auto half = [&](uint32_t pair) { return to_half(pair, 1.f); };
#pragma unroll
              for (int t = 0; t < NT; ++t) {
                mma(c[t], half(pair_halves<0>(x.x, x.z)), half(pair_halves<0>(y.x, y.z)), half(pair_halves<1>(x.x, x.z)),
                    half(pair_halves<1>(y.x, y.z)), query[t][4 * at], query[t][4 * at + 1]);
                mma(c[t], half(pair_halves<0>(x.y, x.w)), half(pair_halves<0>(y.y, y.w)), half(pair_halves<1>(x.y, x.w)),
                    half(pair_halves<1>(y.y, y.w)), query[t][4 * at + 2], query[t][4 * at + 3]);
              }
            }
          } else
#pragma unroll
          for (int w = 0; w < W; ++w) {
            const uint8_t* const key0 = base + row_token * S::kRowBytes + 2 * S::query_channel(w, j);
            const uint8_t* const key8 = key0 + 8 * S::kRowBytes;
            const uint4 low0 = *reinterpret_cast<const uint4*>(key0);
            const uint4 high0 = *reinterpret_cast<const uint4*>(key0 + 16);
            const uint4 low8 = *reinterpret_cast<const uint4*>(key8);
            const uint4 high8 = *reinterpret_cast<const uint4*>(key8 + 16);
#pragma unroll
            for (int q = 0; q < 8; q += 2) {
              const float f0 = S::key_unit(q) / S::kHeadroom, f1 = S::key_unit(q + 1) / S::kHeadroom;
              const int i = q / 2;
              const uint32_t a0 = to_half(pair_halves<0>(word_of(low0, i), word_of(high0, i)), f0);
              const uint32_t a1 = to_half(pair_halves<0>(word_of(low8, i), word_of(high8, i)), f0);
              const uint32_t a2 = to_half(pair_halves<1>(word_of(low0, i), word_of(high0, i)), f1);
              const uint32_t a3 = to_half(pair_halves<1>(word_of(low8, i), word_of(high8, i)), f1);
#pragma unroll
              for (int t = 0; t < NT; ++t) mma(c[t], a0, a1, a2, a3, query[t][w * 8 + q], query[t][w * 8 + q + 1]);
            }
          }
          auto is_read = [&](int token) { return token >= unit.first && token < unit.count; };
          const bool live0 = is_read(row_token), live8 = is_read(row_token + 8);
          float scores[NT][4];
          uint32_t weights[NT][2];
#pragma unroll
          for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              // New tokens see themselves and those before; the second copy of packed rows has nothing to add.
              const int query_token = (first_row + 8 * t + 2 * j + k) / group;
              const bool column = !kPacked || low_columns;
              const bool ok0 = column && live0 && (!is_new || row_token <= query_token);
              const bool ok8 = column && live8 && (!is_new || row_token + 8 <= query_token);
              scores[t][k] = ok0 ? fmaf(c[t][k], scale * S::kHeadroom, shift[t][k]) : -INFINITY;
              scores[t][k + 2] = ok8 ? fmaf(c[t][k + 2], scale * S::kHeadroom, shift[t][k]) : -INFINITY;
            }
          softmax(scores);
          scaled_weights(scores, 1.f, 1.f, weights);
          // Rows that are not read may hold anything, NaN included: a weight of zero does not silence NaN.
          const uint32_t keep0 = (is_read(j) ? 0xffffu : 0u) | (is_read(j + 4) ? 0xffff0000u : 0u);
          const uint32_t keep8 = (is_read(j + 8) ? 0xffffu : 0u) | (is_read(j + 12) ? 0xffff0000u : 0u);
          constexpr int kPositions = S::kPositions;
#pragma unroll
          for (int set = 0; set < S::kSets; ++set) {
            // Channels of this lane's accumulator rows: kPositions consecutive ones, and as many kHighStep further on.
            const int channel = S::value_channel(set, g);
            uint32_t v[4][2][kPositions / 2];
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int high = 0; high < 2; ++high) {
                const uint8_t* const from = base + (j + 4 * i) * S::kRowBytes + (D + channel + S::kHighStep * high) * 2;
                if constexpr (kPositions == 2) {
                  v[i][high][0] = *reinterpret_cast<const uint32_t*>(from);
                } else if constexpr (kPositions == 4) {
                  const uint2 x = *reinterpret_cast<const uint2*>(from);
                  v[i][high][0] = x.x, v[i][high][1] = x.y;
                } else {
                  const uint4 x = *reinterpret_cast<const uint4*>(from);
#pragma unroll
                  for (int word = 0; word < kPositions / 2; ++word) v[i][high][word] = word_of(x, word);
                }
              }
#pragma unroll
            for (int q = 0; q < kPositions; ++q) {
              auto operand = [&](int i, int high, uint32_t keep) {
                const uint32_t x = v[i][high][q / 2], y = v[i + 1][high][q / 2];
                return to_half((q & 1 ? pair_halves<1>(x, y) : pair_halves<0>(x, y)) & keep, 1.f);
              };
              const uint32_t a0 = operand(0, 0, keep0), a1 = operand(0, 1, keep0);
              const uint32_t a2 = operand(2, 0, keep8), a3 = operand(2, 1, keep8);
#pragma unroll
              for (int t = 0; t < NT; ++t)
                mma(out[t][set * kPositions + q], a0, a1, a2, a3, weights[t][0], weights[t][1]);
            }
          }
        }
        ++turn;
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty + stage * 8);
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }

    // ---- end of the item, or of this CTA's part of it: merge the warps, write the partial result ----
    rescale_out(true);
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int step = 4; step < 32; step <<= 1) {
          weight_sum[t][k] += __shfl_xor_sync(~0u, weight_sum[t][k], step);
          zero_sum[t][k] += __shfl_xor_sync(~0u, zero_sum[t][k], step);
        }
        if (g == 0) max_buffer[warp * kColumns + 8 * t + 2 * j + k] = unseen[t][k] ? -INFINITY : -shift[t][k];
      }
    compute_barrier();
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int column = 8 * t + 2 * j + k;
        float top = -INFINITY;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          top = fmaxf(top, max_buffer[w * kColumns + column]);
          if constexpr (kPacked) top = fmaxf(top, max_buffer[w * kColumns + (column ^ 4)]);
        }
        const float factor = unseen[t][k] ? 0.f : exp2_fast(-shift[t][k] - top);
        if (g == 0) {
          sum_buffer[warp * kColumns + column] = weight_sum[t][k] * factor;
          zero_buffer[warp * kColumns + column] = zero_sum[t][k] * factor;
        }
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const float f = factor * (1.f / S::value_unit(i));
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            float x = out[t][i][k + 2 * high] * f;
            if constexpr (kPacked) x += __shfl_xor_sync(~0u, x, 2);
            if (!kPacked || low_columns)
              out_buffer[(warp * kRows + (kPacked ? column & 3 : column)) * kOutStride + i * 16 + high * 8 + g] = x;
          }
        }
      }
    compute_barrier();
    // Slots: an item's partial results lie at (CTA + item), which no two (CTA, item) pairs share.
    const int64_t item = static_cast<int64_t>(at.b) * shape.segments + at.segment;
    const Workspace<kRows, D> workspace(p, gridDim.x, shape.segments);
    float* const sums = workspace.sums + (cta + item) * (kRows * D);
    float2* const states = workspace.states + (cta + item) * kRows;
    if (threadIdx.x == 0) {
      if (at.unit == 0) workspace.spans[item].x = cta;
      if (at.unit + (u - item_begin) == r.units()) workspace.spans[item].y = cta;
    }
    for (int i = threadIdx.x; i < rows * D; i += kComputeThreads) {
      const int row = i / D, x = S::accumulator_of(i % D);
      float value = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        value += out_buffer[(w * kRows + row) * kOutStride + x] + zero_buffer[w * kColumns + row];
        if constexpr (kPacked) value += zero_buffer[w * kColumns + row + 4];
      }
      sums[i] = value;
    }
    if (static_cast<int>(threadIdx.x) < rows) {
      const int row = threadIdx.x;
      float top = -INFINITY, sum = 0.f;
      for (int w = 0; w < kWarps; ++w) {
        top = fmaxf(top, max_buffer[w * kColumns + row]);
        sum += sum_buffer[w * kColumns + row];
        if constexpr (kPacked) {
          top = fmaxf(top, max_buffer[w * kColumns + row + 4]);
          sum += sum_buffer[w * kColumns + row + 4];
        }
      }
      states[row] = make_float2(top, sum);
    }
    compute_barrier();

    at.unit = 0;
    ++at.segment;
    if (u < u_end)
      while (at.segment == shape.segments || load_request(shape, at.b).units() == 0) at = {at.b + 1, 0, 0};
  }
}

// ---- combine ---------------------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void load_vector(float (&x)[N], const float* from) {
  if constexpr (N == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    x[0] = v.x, x[1] = v.y;
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + k);
      x[k] = v.x, x[k + 1] = v.y, x[k + 2] = v.z, x[k + 3] = v.w;
    }
  }
}

template <int D>
constexpr int kCombineThreads = D > 128 ? 512 : 256;

// One CTA an item, grid (KV heads, row tiles, requests): merge its partial results, rotate back, divide by the sum of
// the weights, write.
template <int D, int kRows>
__global__ void __launch_bounds__(kCombineThreads<D>) combine_kernel(const DecodeParams p, int num_ctas) {
  constexpr int kThreads = kCombineThreads<D>, kWarps = kThreads / 32;
  constexpr int kRowWarps = kRows < kWarps ? kRows : kWarps;  // warps take a row each; where there are more, they share
  constexpr int kSplits = kWarps / kRowWarps;
  constexpr int kVector = D / 32;             // channels of a lane
  constexpr int kRound = D > 128 ? 3 : 9;     // partial results a lane loads at a time
  constexpr int kPairs = D / 2, kParts = kThreads / kPairs, kPartChannels = D / kParts;
  __shared__ __align__(16) float merged[kSplits][kRows][D];
  __shared__ float weight[kSplits][kRows];
  __shared__ float2 rotated[kParts][4][kPairs];

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int head = blockIdx.x, b = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads;
  const int first_row = blockIdx.y * kRows;
  // out[d] = sum over e of value[e] * rotation[e][d]: a thread has two d and a part of the e. Its share of the rotation
  // is loaded while the decode kernel still runs.
  const int pair = threadIdx.x % kPairs, part = threadIdx.x / kPairs;
  uint32_t matrix[kPartChannels];
  if (p.v_unrotation != nullptr) {
    const auto* column = static_cast<const uint32_t*>(p.v_unrotation) +
                         (static_cast<int64_t>(head) * D + part * kPartChannels) * kPairs + pair;
#pragma unroll
    for (int i = 0; i < kPartChannels; ++i) matrix[i] = __ldg(column + i * kPairs);
  }
  const int token0 = __ldg(p.query_start_loc + b);
  const int num_new = min(__ldg(p.query_start_loc + b + 1) - token0, p.max_query_len);
  const int rows = min(num_new * group - first_row, kRows);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (rows <= 0) return;

  const int segments = gridDim.x * gridDim.y;
  const int64_t item = static_cast<int64_t>(b) * segments + blockIdx.y * gridDim.x + head;
  const Workspace<kRows, D> workspace(p, num_ctas, segments);
  const float* const sums = workspace.sums + item * (kRows * D);
  const float2* const states = workspace.states + item * kRows;
  const int2 span = workspace.spans[item];

  for (int row = warp % kRowWarps; row < rows; row += kRowWarps) {
    const int split = warp / kRowWarps;
    float top = -INFINITY;
    for (int c = span.x + lane; c <= span.y; c += 32) top = fmaxf(top, states[c * kRows + row].x);
    float value[kVector] = {};
    float sum = 0.f;
    // All loads of a round are in flight together, and those of the first while `top` is reduced.
    for (int base = span.x + split; base <= span.y; base += kSplits * kRound) {
      float x[kRound][kVector] = {};
      float2 state[kRound];
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const int c = base + i * kSplits;
        state[i] = make_float2(-INFINITY, 0.f);
        if (c <= span.y) {
          load_vector<kVector>(x[i], sums + static_cast<int64_t>(c) * (kRows * D) + row * D + lane * kVector);
          state[i] = states[c * kRows + row];
        }
      }
      if (base == span.x + split) {
#pragma unroll
        for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      }
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const float factor = state[i].x == -INFINITY ? 0.f : exp2_fast(state[i].x - top);
        sum += state[i].y * factor;
#pragma unroll
        for (int k = 0; k < kVector; ++k) value[k] += x[i][k] * factor;
      }
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) merged[split][row][lane * kVector + k] = value[k];
    if (lane == 0) weight[split][row] = sum;
  }
  __syncthreads();

  auto store = [&](int row, int d, float x, float y) {
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < kSplits; ++s) sum += weight[s][row];
    const float factor = sum > 0.f ? 1.f / sum : 0.f;
    const int full_row = first_row + row;
    const int64_t at = (token0 + full_row / group) * p.out_token_stride +
                       (head * group + full_row % group) * p.out_head_stride + d;
    if (p.out_dtype == DType::kBFloat16) {
      *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) + at) =
          __floats2bfloat162_rn(x * factor, y * factor);
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<__half*>(p.out) + at) = pack_half2(x * factor, y * factor);
    }
  };
  if (p.v_unrotation == nullptr) {
    for (int i = threadIdx.x; i < rows * kPairs; i += kThreads) {
      const int row = i / kPairs, d = 2 * (i % kPairs);
      float x = 0.f, y = 0.f;
#pragma unroll
      for (int s = 0; s < kSplits; ++s) x += merged[s][row][d], y += merged[s][row][d + 1];
      store(row, d, x, y);
    }
    return;
  }
  for (int base = 0; base < rows; base += 4) {
    float2 acc[4] = {};
#pragma unroll
    for (int i = 0; i < kPartChannels; i += 4) {
#pragma unroll
      for (int row = 0; row < 4; ++row) {  // those beyond `rows` hold stale numbers and are not written
        float4 x = *reinterpret_cast<const float4*>(&merged[0][base + row][part * kPartChannels + i]);
#pragma unroll
        for (int s = 1; s < kSplits; ++s) {
          const float4 more = *reinterpret_cast<const float4*>(&merged[s][base + row][part * kPartChannels + i]);
          x.x += more.x, x.y += more.y, x.z += more.z, x.w += more.w;
        }
        const float2 m0 = unpack_half2(matrix[i]), m1 = unpack_half2(matrix[i + 1]);
        const float2 m2 = unpack_half2(matrix[i + 2]), m3 = unpack_half2(matrix[i + 3]);
        acc[row].x = fmaf(x.x, m0.x, fmaf(x.y, m1.x, fmaf(x.z, m2.x, fmaf(x.w, m3.x, acc[row].x))));
        acc[row].y = fmaf(x.x, m0.y, fmaf(x.y, m1.y, fmaf(x.z, m2.y, fmaf(x.w, m3.y, acc[row].y))));
      }
    }
#pragma unroll
    for (int row = 0; row < 4; ++row) rotated[part][row][pair] = acc[row];
    __syncthreads();
    for (int i = threadIdx.x; i < min(rows - base, 4) * kPairs; i += kThreads) {
      const int row = i / kPairs;
      float x = 0.f, y = 0.f;
#pragma unroll
      for (int s = 0; s < kParts; ++s) {
        const float2 v = rotated[s][row][i % kPairs];
        x += v.x, y += v.y;
      }
      store(base + row, 2 * (i % kPairs), x, y);
    }
    __syncthreads();
  }
}

// ---- host ------------------------------------------------------------------------------------------------------

template <int D, int kCode, int NT, bool kPacked>
struct Launch {
  static constexpr int kRows = kPacked ? 4 : 8 * NT;
  static constexpr int kCtasPerSm = D * NT <= 128 ? 3 : 2;
  static constexpr int kMergeBytes = kWarps * (kRows * (D + 8) + 3 * 8 * NT) * 4;
  static constexpr int kPerStage = kPageBytes<D, kCode> + static_cast<int>(sizeof(Unit)) + 16;
  // A multiprocessor has 228 KiB of shared memory, of which a CTA costs 1 KiB.
  static constexpr int kStages = kCtasPerSm * (3 * kPerStage + kMergeBytes + 1024) <= 228 << 10 ? 3 : 2;
  static constexpr int kSharedBytes = kStages * kPerStage + kMergeBytes;
  static_assert(kCtasPerSm * (kSharedBytes + 1024) <= 228 << 10);

  template <bool kMeans>
  static cudaError_t run(const DecodeParams& p, int num_sms, cudaStream_t stream) {
    const int group = p.num_heads / p.num_kv_heads;
    const int row_tiles = (group * p.max_query_len + kRows - 1) / kRows;
    const int ctas = num_sms * kCtasPerSm < kMaxCtas ? num_sms * kCtasPerSm : kMaxCtas;
    auto decode = decode_kernel<D, kCode, key_parts<D, kCode>(), value_parts<D, kCode>(), NT, kPacked, kMeans, kStages, kCtasPerSm>;
    auto combine = combine_kernel<D, kRows>;
    // Idempotent, and cheap beside the launch. Both kernels ask for the same split of L1 and shared memory: changing
    // it between them would drain the multiprocessors.
    cudaError_t error = cudaFuncSetAttribute(decode, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(decode, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(combine, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (error != cudaSuccess) return error;
    decode<<<ctas, kThreads, kSharedBytes, stream>>>(p, num_sms, row_tiles);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;

    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(p.num_kv_heads, row_tiles, p.num_reqs);
    config.blockDim = dim3(kCombineThreads<D>);
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    // The combine kernel starts, loads the rotation and waits while the decode kernel ends.
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, combine, p, ctas);
  }
  static cudaError_t run(const DecodeParams& p, int num_sms, cudaStream_t stream) {
    if constexpr (kCode == kAffine2) {
      if (!p.page_means) return run<false>(p, num_sms, stream);
    }
    return run<true>(p, num_sms, stream);
  }
};

// Explicitly instantiated in decode_sm90_<code>_d<D>.cu, so that they compile side by side.
template <int D, int kCode>
cudaError_t launch(const DecodeParams& p, int num_sms, cudaStream_t stream) {
  const int rows = p.num_heads / p.num_kv_heads * p.max_query_len;
  if (rows <= 4) return Launch<D, kCode, 1, true>::run(p, num_sms, stream);
  if constexpr (D <= 128) {
    if (rows > 8) return Launch<D, kCode, 2, false>::run(p, num_sms, stream);
  }
  return Launch<D, kCode, 1, false>::run(p, num_sms, stream);
}

extern template cudaError_t launch<64, kAffine2>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<128, kAffine2>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<256, kAffine2>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<64, kLloydMax4>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<128, kLloydMax4>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<256, kLloydMax4>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<64, kLloydMax43Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<64, kAffine2Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<128, kLloydMax43Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<128, kAffine2Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<128, kLloydMax32>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<128, kLloydMax32Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<256, kLloydMax43Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<256, kAffine2Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<256, kLloydMax32>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<256, kLloydMax32Signs>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<64, kLloydMax43>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<128, kLloydMax43>(const DecodeParams&, int, cudaStream_t);
extern template cudaError_t launch<256, kLloydMax43>(const DecodeParams&, int, cudaStream_t);

}  // namespace sm90
}  // namespace vllm_kvcompress
