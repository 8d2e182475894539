// From the integers of a network program to a Network. Programs may come from anybody: everything is checked.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "network.h"

namespace maml_ext::engine {

// The network of `program` for vectors of `lanes`, with its `pairs` where these are wanted and worth while; throws
// std::runtime_error, naming what is wrong. The last few are remembered, so that a call with a known program costs a
// comparison.
std::shared_ptr<const Network> network_of(const std::vector<int64_t>& program, const std::vector<double>& numbers,
                                          int64_t lanes, bool input_active, bool pairs = false);

}  // namespace maml_ext::engine
