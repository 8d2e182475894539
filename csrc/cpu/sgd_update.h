// The SGD update and its derivative by gradient and learning rates, on raw pointers. Callers split the work over
// threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../segment.h"

namespace maml_ext {

// out = first - lr * grad for the elements [begin, end) of all segments in a row.
// Moves 3 scalars an element (2 where first is null), each once.
template <class scalar>
void sgd_update(const std::vector<Segment<scalar>>& segments, int64_t begin, int64_t end);

// Some columns of a segment, over all its rows: the unit of work of sgd_update_backward.
struct Tile {
  int64_t segment, begin, end;
  double sum;
};

// The tiles do not depend on the number of threads, so neither do the bits of the result.
template <class scalar>
std::vector<Tile> tiles_of(const std::vector<Segment<scalar>>& segments);

// out = - lr * first, if it is wanted, and rate_out = - sum of first * grad: over rows, and over columns where one rate
// is for all. Sums are in double. First all tiles (in any order, any split), then one call of finish.
// Moves 3 scalars an element (2 where out is null), each once.
template <class scalar>
void sgd_update_backward(const std::vector<Segment<scalar>>& segments, std::vector<Tile>& tiles, int64_t begin,
                         int64_t end);
template <class scalar>
void finish_rate_gradient(const std::vector<Segment<scalar>>& segments, const std::vector<Tile>& tiles);

}  // namespace maml_ext
