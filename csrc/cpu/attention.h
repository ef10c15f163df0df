// One thread's share of attention_fwd, for callers that have divided their threads already (the inference engine).
#pragma once

#include "vit.h"

namespace vit::VIT_ISA {

// A unit is a block of queries of one head; consecutive units of a head share its packed keys and values.
int64_t attention_fwd_units(const AttentionFwd&);

// Bytes of scratch memory a thread needs (64-byte aligned).
int64_t attention_fwd_scratch(const AttentionFwd&);

// Units [begin, end) on the calling thread; workspace and context of the parameters are not used.
void attention_fwd_range(const AttentionFwd&, char* scratch, int64_t begin, int64_t end);

}  // namespace vit::VIT_ISA
