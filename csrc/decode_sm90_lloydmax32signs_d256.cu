// SPDX-License-Identifier: Apache-2.0
#include "decode_sm90.cuh"

template cudaError_t vllm_kvcompress::sm90::launch<256, vllm_kvcompress::kLloydMax32Signs>(const DecodeParams&, int, cudaStream_t);
