// One build of the engine, for MAML_VECTOR_BYTES and whatever instruction set is in force. All of it is in an
// anonymous namespace and uses no std template: an inline function that builds share could be the one for AVX-512 on
// a machine without it.
#include "engine.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace maml_ext::engine {
namespace {

#include "simd.h"
#include "product.h"
#include "frame.h"
#include "parameters.h"
#include "winograd.h"
#include "contract.h"
#include "linear.h"
#include "../../engine/activation.h"
#include "block.h"
#include "norm.h"
#include "pool.h"
#include "reshape.h"
#include "combine.h"
#include "softmax.h"
#include "../../engine/dual.h"
#include "../../engine/losses.h"
#include "loss.h"
#include "task.h"
#include "work.h"

}  // namespace

const Engine MAML_ENGINE = {MAML_VECTOR_BYTES, &run<float>, &run<double>};

}  // namespace maml_ext::engine
