// SPDX-License-Identifier: Apache-2.0
#include "decode_sm90.cuh"

template cudaError_t vllm_kvcompress::sm90::launch<128, vllm_kvcompress::kLloydMax32>(const DecodeParams&, int, cudaStream_t);
