// The tensors of an engine file and their places in a network.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/file.h"
#include "engine/network.h"

namespace vit::engine {

// One tensor of an engine file and where the network keeps its address.
struct Part {
  std::string name;
  float** vector;  // of `count` floats, or
  Linear* matrix;  // a packed weight, or
  int32_t** sums;  // of a quantized weight
  int64_t count;
  bool optional;  // zeros where the source lacks it
  bool derived;   // made when the weight is packed
};

// Whether a layer may have a precision in an engine of another one.
bool allowed(const std::string& name, Precision layer, Precision engine);

// The precision of a layer outside the blocks: the ends of an int8 network stay what its activations are, the head of
// every network is float32.
Precision precision_of_end(const std::string& name, Precision engine);

bool in_block(const std::string& name);

// The precision of packed weights of a dtype of the file; false for a dtype that none has.
bool precision_of_dtype(const std::string& dtype, Precision& precision);

// Every linear layer with its sizes [N, K], the embedding first and the head last.
void for_linears(Network& network,
                 const std::function<void(const std::string& name, Linear& linear, int64_t N, int64_t K)>& f);

// All tensors of the network; the precision of every linear layer is known.
std::vector<Part> parts_of(Network& network);

// What the file says of a part that begins there.
Record record_of(const Part& part, int64_t begin);

// Tells the network where a part lies.
void point(const Part& part, char* at);

}  // namespace vit::engine
