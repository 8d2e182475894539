// The engine for any machine: vectors of 16 bytes (SSE2, NEON).
#define MAML_VECTOR_BYTES 16
#define MAML_ENGINE engine_base
#include "build.h"
